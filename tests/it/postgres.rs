//! The pooled PostgreSQL store: one round trip, dead connections, errors that say what and where.

use std::time::{Duration, Instant};

use checkpoint_store::postgres::NoTls;
use checkpoint_store::r2d2::Pool;
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, conformance};

use crate::harness::{self, Proxy, Schema, chain, sql_state, wait_until};

#[test]
fn a_pooled_operation_is_one_round_trip() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let store =
        PostgresCheckpointStore::builder().schema(&schema.name).connect(&proxy.params()).unwrap();
    store.save("warm", 1).unwrap();
    assert_eq!(proxy.round_trips(|| store.find("warm").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.get("warm").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.all().unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.save("warm", 2).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.save("new", 2).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.save_many(&[("warm", 3), ("a", 1)]).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.save_many(&[]).unwrap()), 0);
    assert_eq!(proxy.round_trips(|| store.advance("warm", 3, 4).unwrap()), 1);
    // What creates the row, or finds out why it was not moved, follows only where none was.
    assert_eq!(proxy.round_trips(|| store.advance("fresh", 0, 4).unwrap()), 2);
    assert_eq!(proxy.round_trips(|| store.advance("warm", 3, 4).unwrap_err()), 2);
    assert_eq!(proxy.round_trips(|| store.delete("warm").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.save("warm", -1).unwrap_err()), 0);
}

#[test]
fn in_a_transaction_an_operation_adds_one_round_trip() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let mut client = harness::client(&proxy.params());
    let mut tx = client.transaction().unwrap();
    let store = &schema.store;
    let mut here = store.in_transaction(&mut tx);
    assert_eq!(proxy.round_trips(|| here.lock("orders").unwrap()), 2);
    assert_eq!(proxy.round_trips(|| here.lock("orders").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.try_lock("orders").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.save("orders", 1).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.find("orders").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.get("orders").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.advance("orders", 1, 2).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.save_many(&[("a", 1), ("b", 1)]).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.delete("a").unwrap()), 1);
    assert_eq!(proxy.round_trips(|| here.save("", 1).unwrap_err()), 0);
    assert_eq!(proxy.round_trips(|| tx.commit().unwrap()), 1);
}

#[test]
fn the_callers_own_pool_and_manager_serve() {
    let schema = Schema::new();
    let config = harness::server().params().parse().unwrap();
    let pool =
        Pool::builder().max_size(2).build(PostgresConnectionManager::new(config, NoTls)).unwrap();
    let store = PostgresCheckpointStore::builder().schema(&schema.name).build(pool).unwrap();
    store.save("orders", 42).unwrap();
    assert_eq!(store.pool_state().connections, 2);
    assert_eq!(schema.store.get("orders").unwrap(), 42);
}

#[test]
fn new_uses_the_default_table() {
    let database = harness::fresh_database();
    let pool = Pool::builder()
        .max_size(1)
        .build(PostgresConnectionManager::new(database.parse().unwrap(), NoTls))
        .unwrap();
    let store = PostgresCheckpointStore::new(pool);
    store.migrate().unwrap();
    store.save("orders", 42).unwrap();
    let row = harness::client(&database)
        .query_one("SELECT \"offset\" FROM public.projection_checkpoints", &[])
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 42);
}

#[test]
fn a_clone_is_another_handle_on_the_same_pool() {
    let schema = Schema::new();
    let clone = schema.store.clone();
    clone.save("orders", 1).unwrap();
    assert_eq!(schema.store.get("orders").unwrap(), 1);
    assert_eq!(clone.pool_state().connections, schema.store.pool_state().connections);
}

/// Ends every connection of the store from outside, as an administrator does.
fn terminate_connections(schema: &Schema, application: &str) {
    let mut client = harness::server().client();
    let query =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1";
    let ended = client.execute(query, &[&application]).unwrap();
    assert!(ended > 0, "{} has connections", schema.name);
    wait_until("the connections are gone", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        client.query_one(query, &[&application]).unwrap().get::<_, i64>(0) == 0
    });
}

/// A store that holds as many open connections as it may, all of them idle.
fn store_with_connections(
    schema: &Schema,
    application: &str,
    count: u32,
) -> PostgresCheckpointStore {
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(count)
        .connect(&format!("{} application_name={application}", harness::server().params()))
        .unwrap();
    let held: Vec<_> = (0..count).map(|_| store.connection().unwrap()).collect();
    drop(held);
    assert_eq!(store.pool_state().idle_connections, count);
    store
}

#[test]
fn what_can_be_repeated_goes_on_with_a_fresh_connection() {
    let schema = Schema::new();
    let store = store_with_connections(&schema, "repeated", 4);
    store.save("orders", 1).unwrap();

    terminate_connections(&schema, "repeated");
    store.save("orders", 2).unwrap();
    terminate_connections(&schema, "repeated");
    assert_eq!(store.get("orders").unwrap(), 2);
    terminate_connections(&schema, "repeated");
    assert_eq!(store.find("orders").unwrap().unwrap().offset, 2);
    terminate_connections(&schema, "repeated");
    assert_eq!(store.all().unwrap().len(), 1);
    terminate_connections(&schema, "repeated");
    store.save_many(&[("orders", 3)]).unwrap();
    terminate_connections(&schema, "repeated");
    store.migrate().unwrap();
    terminate_connections(&schema, "repeated");
    assert!(store.delete("orders").unwrap());
}

#[test]
fn an_advance_is_not_repeated_and_one_outage_is_one_error() {
    let schema = Schema::new();
    let store = store_with_connections(&schema, "once", 4);
    store.save("orders", 1).unwrap();
    terminate_connections(&schema, "once");

    let error = store.advance("orders", 1, 2).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(error.is_transient());
    assert!(chain(&error).contains("advance: projection \"orders\""), "{}", chain(&error));

    let offset = store.get("orders").unwrap();
    store.advance("orders", offset, 2).unwrap();
    for offset in 2..10 {
        store.advance("orders", offset, offset + 1).unwrap();
    }

    // One that is noticed by what can be repeated is no error at all.
    terminate_connections(&schema, "once");
    assert_eq!(store.get("orders").unwrap(), 10);
    for offset in 10..20 {
        store.advance("orders", offset, offset + 1).unwrap();
    }
}

#[test]
fn a_connection_that_has_worked_since_the_last_loss_is_not_tested_before_an_advance() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .connect(&format!("{} application_name=tested", proxy.params()))
        .unwrap();
    store.save("orders", 1).unwrap();
    assert_eq!(proxy.round_trips(|| store.advance("orders", 1, 2).unwrap()), 1);
    terminate_connections(&schema, "tested");
    store.save("orders", 2).unwrap();
    assert_eq!(proxy.round_trips(|| store.advance("orders", 2, 3).unwrap()), 1);
    assert_eq!(proxy.round_trips(|| store.advance("orders", 3, 4).unwrap()), 1);
}

#[test]
fn an_error_names_the_operation_the_projection_and_the_table_and_keeps_the_cause() {
    let schema = Schema::new();
    let gone = format!("DROP TABLE {}.projection_checkpoints", schema.name);
    harness::server().client().batch_execute(&gone).unwrap();

    let error = schema.store.save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert!(!error.is_transient());
    assert_eq!(sql_state(&error).as_deref(), Some("42P01"));
    let message = format!(
        "save failed: projection \"orders\" in table \"{}\".\"projection_checkpoints\", \
         which does not exist: call `migrate` to create it",
        schema.name
    );
    assert_eq!(error.to_string(), message);
    let told = chain(&error);
    assert!(told.starts_with(&format!("{message}: db error: ")), "{told}");
    let cause = std::error::Error::source(&error).unwrap();
    assert!(cause.is::<checkpoint_store::postgres::Error>(), "{cause:?}");
    assert!(told.contains("does not exist"), "{told}");
    assert_eq!(told.matches("projection \"orders\"").count(), 1, "{told}");
}

#[test]
fn a_write_that_the_server_discards_is_an_error() {
    let schema = Schema::new();
    schema
        .client()
        .batch_execute(
            "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER discard BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION discard();",
        )
        .unwrap();
    let store = &schema.store;
    for error in [
        store.save("orders", 1).unwrap_err(),
        store.save_many(&[("orders", 1)]).unwrap_err(),
        store.advance("orders", 0, 1).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Backend { .. }), "{error:?}");
        assert!(chain(&error).contains("wrote no row"), "{}", chain(&error));
    }
    assert_eq!(store.get("orders").unwrap(), 0);
}

#[test]
fn a_write_of_which_the_server_discards_a_part_is_an_error() {
    let schema = Schema::new();
    schema.store.save("kept", 5).unwrap();
    schema
        .client()
        .batch_execute(
            "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.projection_name = 'discarded' OR TG_OP = 'UPDATE' THEN RETURN NULL; END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER discard BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION discard();",
        )
        .unwrap();
    let store = &schema.store;
    for error in [
        store.save_many(&[("a", 1), ("discarded", 1), ("z", 1)]).unwrap_err(),
        // Its offset is the expected one, so this is no rival's doing.
        store.advance("kept", 5, 6).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Backend { .. }), "{error:?}");
        assert!(chain(&error).contains("wrote no row"), "{}", chain(&error));
    }
    assert_eq!(store.get("kept").unwrap(), 5);
}

/// A trigger that fails each `save` in its own way, and counts the tries.
fn failing(how: &str) -> Schema {
    let schema = Schema::new();
    schema
        .client()
        .batch_execute(&format!(
            "INSERT INTO projection_checkpoints VALUES ('orders', 0, '2000-01-01');
             CREATE SEQUENCE tries;
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM nextval('{}.tries');
                 {how};
                 RETURN NEW;
             END $$;
             CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION fail();",
            schema.name
        ))
        .unwrap();
    schema
}

fn tries(schema: &Schema) -> i64 {
    schema.client().query_one("SELECT last_value FROM tries", &[]).unwrap().get(0)
}

#[test]
fn a_save_that_ends_its_connection_each_time_is_given_up_in_time() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let schema = failing("PERFORM pg_terminate_backend(pg_backend_pid())");
    let pool = harness::pool(&harness::server().params(), 2, TIMEOUT);
    let store = PostgresCheckpointStore::builder().schema(&schema.name).build(pool).unwrap();
    let started = Instant::now();
    let error = store.save("orders", 1).unwrap_err();
    assert!(started.elapsed() < TIMEOUT + Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    // Not that no connection was to be had: there was one each time.
    assert!(!chain(&error).contains("timed out"), "{}", chain(&error));
    // With pauses between them, which grow.
    assert!((2..30).contains(&tries(&schema)), "{}", tries(&schema));
}

#[test]
fn an_error_that_only_sounds_like_a_lost_connection_is_not_repeated() {
    let schema = failing("RAISE SQLSTATE '08006'");
    let error = schema.store.save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert_eq!(tries(&schema), 1);
}

#[test]
fn what_the_server_rolls_back_because_of_others_is_run_again() {
    for state in ["40001", "40P01"] {
        let schema = failing(&format!("IF lastval() < 4 THEN RAISE SQLSTATE '{state}'; END IF"));
        schema.store.save("orders", 1).unwrap();
        // The one that succeeds fires the trigger for INSERT and for UPDATE.
        assert_eq!((schema.store.get("orders").unwrap(), tries(&schema)), (1, 5));
        let schema = failing(&format!("IF lastval() < 4 THEN RAISE SQLSTATE '{state}'; END IF"));
        schema.store.advance("orders", 0, 1).unwrap();
        assert_eq!((schema.store.get("orders").unwrap(), tries(&schema)), (1, 4));
    }
}

#[test]
fn the_contract_holds_whatever_isolation_the_database_defaults_to() {
    for level in ["repeatable read", "serializable"] {
        let database = harness::fresh_database();
        let name = database.rsplit('/').next().unwrap();
        harness::client(&database)
            .batch_execute(&format!(
                "ALTER DATABASE {name} SET default_transaction_isolation = '{level}'"
            ))
            .unwrap();
        let store = PostgresCheckpointStore::connect(&database).unwrap();
        store.migrate().unwrap();
        conformance::verify(&store);
    }
}

#[test]
fn the_time_of_a_save_is_the_servers() {
    let schema = Schema::new();
    schema.store.save("orders", 1).unwrap();
    let saved_at = schema.store.find("orders").unwrap().unwrap().updated_at;
    let now: std::time::SystemTime =
        schema.client().query_one("SELECT clock_timestamp()", &[]).unwrap().get(0);
    assert!(saved_at < now);
    assert!(now.duration_since(saved_at).unwrap().as_secs() < 60);
}

#[test]
fn the_debug_output_tells_the_table_and_no_parameter() {
    let schema = Schema::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .connect(&format!("{} password=hunter2", harness::server().params()))
        .unwrap();
    let shown = format!("{store:?}");
    assert!(shown.contains(&schema.name), "{shown}");
    assert!(!shown.contains("hunter2") && !shown.contains("127.0.0.1"), "{shown}");
}
