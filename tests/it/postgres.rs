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

/// A table with three checkpoints, and a trigger on each write of a row.
fn altering(body: &str) -> Schema {
    let schema = Schema::new();
    schema.store.save_many(&[("orders", 50), ("rival", 7), ("Zebra", 30)]).unwrap();
    schema
        .client()
        .batch_execute(&format!(
            "CREATE FUNCTION alter_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
             CREATE TRIGGER alter_it BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION alter_it();"
        ))
        .unwrap();
    schema
}

/// As somebody else sees it.
fn rows(schema: &Schema) -> Vec<(String, i64)> {
    let query = "SELECT projection_name, \"offset\" FROM projection_checkpoints ORDER BY 1";
    let rows = schema.client().query(query, &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

type Write = fn(&PostgresCheckpointStore, &str, i64, i64) -> checkpoint_store::Result<()>;

fn in_transaction(
    store: &PostgresCheckpointStore,
    work: impl FnOnce(&mut checkpoint_store::InTransaction<'_, '_>) -> checkpoint_store::Result<()>,
) -> checkpoint_store::Result<()> {
    let mut client = store.connection()?;
    let mut tx = client.transaction()?;
    let outcome = work(&mut store.in_transaction(&mut tx));
    // Even a caller that ignores the error keeps nothing of it.
    let _ = tx.commit();
    outcome
}

const WRITES: [(&str, Write); 8] = [
    ("save", |store, name, _, to| store.save(name, to)),
    ("save_many", |store, name, _, to| {
        store.save_many(&[("rival", 100), (name, to), ("zoo", 1_000)])
    }),
    ("advance", |store, name, from, to| store.advance(name, from, to)),
    ("project", |store, name, _, to| store.project(name, |_, _| Ok(Some(to))).map(drop)),
    ("try_project", |store, name, _, to| store.try_project(name, |_, _| Ok(Some(to))).map(drop)),
    ("save in a transaction", |store, name, _, to| in_transaction(store, |it| it.save(name, to))),
    ("save_many in a transaction", |store, name, _, to| {
        in_transaction(store, |it| it.save_many(&[("rival", 100), (name, to), ("zoo", 1_000)]))
    }),
    ("advance in a transaction", |store, name, from, to| {
        in_transaction(store, |it| it.advance(name, from, to))
    }),
];

#[test]
fn a_write_that_the_server_alters_is_an_error_and_nothing_of_it_is_kept() {
    const NOT_BACK: &str = "IF TG_OP = 'UPDATE' THEN NEW.\"offset\" := GREATEST(OLD.\"offset\", NEW.\"offset\"); END IF; RETURN NEW;";
    const ROUNDED: &str = "NEW.\"offset\" := NEW.\"offset\" / 10 * 10; RETURN NEW;";
    const OLD: &str = "IF TG_OP = 'UPDATE' THEN RETURN OLD; END IF; RETURN NEW;";
    const LOWER: &str = "NEW.projection_name := lower(NEW.projection_name); RETURN NEW;";
    const CAPPED: &str = "NEW.\"offset\" := LEAST(NEW.\"offset\", 1000); RETURN NEW;";
    const ONE_MORE: &str = "NEW.\"offset\" := NEW.\"offset\" + 1; RETURN NEW;";
    const RENAMED: &str = "NEW.projection_name := 'rival'; RETURN NEW;";
    const RENAMED_LATER: &str = "IF TG_OP = 'UPDATE' THEN NEW.projection_name := NEW.projection_name || '!'; END IF; RETURN NEW;";
    const TRIMMED: &str = "NEW.projection_name := btrim(NEW.projection_name); RETURN NEW;";
    let trials = [
        (NOT_BACK, "orders", 50, 10),
        (OLD, "orders", 50, 60),
        (OLD, "orders", 50, 10),
        (ROUNDED, "orders", 50, 55),
        (ROUNDED, "fresh", 0, 5),
        (CAPPED, "orders", 50, 2_000),
        (ONE_MORE, "orders", 50, 60),
        (ONE_MORE, "fresh", 0, 60),
        (LOWER, "Orders", 0, 60),
        (LOWER, "Fresh", 0, 60),
        (LOWER, "Zebra", 30, 60),
        (RENAMED, "fresh", 0, 60),
        (RENAMED_LATER, "orders", 50, 60),
        (TRIMMED, " orders", 0, 60),
    ];
    for (body, name, from, to) in trials {
        let schema = altering(body);
        let before = rows(&schema);
        let builder = || PostgresCheckpointStore::builder().schema(&schema.name).max_connections(2);
        let params = harness::server().params();
        for (kind, store) in [
            ("plain", builder().connect(&params).unwrap()),
            ("prepared", builder().prepared_statements(true).connect(&params).unwrap()),
            ("grouped", builder().group_commit(true).connect(&params).unwrap()),
        ] {
            for (operation, write) in WRITES {
                if to < from && (operation.starts_with("advance") || operation.contains("project"))
                {
                    continue; // refused before it is sent
                }
                let what = format!("{body}: {kind} {operation} of {name:?} from {from} to {to}");
                let error = write(&store, name, from, to).expect_err(&what);
                assert!(matches!(error, Error::Backend { .. }), "{what}: {error:?}");
                assert!(!error.is_transient(), "{what}: {error:?}");
                // Two rows that become one are an error of the server's own.
                let is_named = chain(&error).contains("trigger")
                    || sql_state(&error).as_deref() == Some("21000");
                assert!(is_named, "{what}: {}", chain(&error));
                assert_eq!(rows(&schema), before, "{what}");
            }
        }
        // Where the trigger changes nothing everything works.
        if !matches!(body, ONE_MORE | OLD | RENAMED | RENAMED_LATER) {
            for (operation, write) in WRITES {
                write(&schema.store, "later", 0, 10)
                    .unwrap_or_else(|error| panic!("{operation}: {error:?}"));
                schema.store.delete("later").unwrap();
            }
        }
    }
}

/// What is altered after the row was written shows only when it is read again, as `project` does.
#[test]
fn a_batch_whose_checkpoint_is_altered_after_the_write_is_an_error_and_nothing_of_it_is_kept() {
    for body in ["\"offset\" = \"offset\" - 1", "projection_name = 'rival'"] {
        let schema = Schema::new();
        schema.store.save("orders", 50).unwrap();
        harness::client(&harness::server().params())
            .batch_execute(&format!(
                "SET search_path = {};
                 CREATE FUNCTION alter_it() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     UPDATE {0}.projection_checkpoints SET {body}
                     WHERE projection_name = NEW.projection_name;
                     RETURN NULL;
                 END $$;
                 CREATE TRIGGER alter_it AFTER INSERT OR UPDATE ON projection_checkpoints
                     FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION alter_it()",
                schema.name,
            ))
            .unwrap();
        let before = rows(&schema);
        for prepared in [false, true] {
            let store = PostgresCheckpointStore::builder()
                .schema(&schema.name)
                .prepared_statements(prepared)
                .connect(&harness::server().params())
                .unwrap();
            for name in ["orders", "fresh"] {
                let error = store.project(name, |_, offset| Ok(Some(offset + 10))).unwrap_err();
                assert!(chain(&error).contains("trigger"), "{body}: {}", chain(&error));
                assert!(!error.is_transient());
                assert_eq!(rows(&schema), before, "{body}");
            }
        }
    }
}

/// A row that `lock` creates has to be the one that was asked for.
#[test]
fn a_lock_whose_row_is_made_under_another_name_is_an_error() {
    let schema = altering("NEW.projection_name := lower(NEW.projection_name); RETURN NEW;");
    let before = rows(&schema);
    for name in ["Orders", "Fresh"] {
        in_transaction(&schema.store, |it| it.lock(name).map(drop)).unwrap_err();
        in_transaction(&schema.store, |it| it.try_lock(name).map(drop)).unwrap_err();
        assert_eq!(rows(&schema), before);
    }
}

/// The statement of a group is refused as a whole, and then each call has its own answer.
#[test]
fn in_a_group_a_write_that_is_altered_is_an_error_and_the_others_are_stored() {
    const THREADS: usize = 24;
    let schema = altering(
        "IF NEW.projection_name LIKE 'rounded%' THEN NEW.\"offset\" := NEW.\"offset\" / 10 * 10; END IF;
         RETURN NEW;",
    );
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .group_commit(true)
        .connect(&harness::server().params())
        .unwrap();
    let name = |i: usize| format!("{} {i}", if i % 3 == 0 { "rounded" } else { "kept" });
    for i in 0..THREADS {
        store.save(&name(i), 10).unwrap();
    }
    let store = &store;
    std::thread::scope(|scope| {
        for i in 0..THREADS {
            scope.spawn(move || {
                let name = name(i);
                for offset in 11..20 {
                    let outcome = if i % 2 == 0 {
                        store.save(&name, offset)
                    } else {
                        store.advance(&name, if i % 3 == 0 { 10 } else { offset - 1 }, offset)
                    };
                    match outcome {
                        Ok(()) => assert_ne!(i % 3, 0, "{name} at {offset}"),
                        Err(error) => {
                            assert_eq!(i % 3, 0, "{name} at {offset}: {error:?}");
                            assert!(chain(&error).contains("trigger"), "{}", chain(&error));
                        }
                    }
                }
            });
        }
    });
    for i in 0..THREADS {
        assert_eq!(store.get(&name(i)).unwrap(), if i % 3 == 0 { 10 } else { 19 });
    }
}

#[test]
fn a_delete_that_the_server_discards_is_an_error() {
    let schema = Schema::new();
    schema.store.save("orders", 50).unwrap();
    schema
        .client()
        .batch_execute(
            "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER discard BEFORE DELETE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION discard();",
        )
        .unwrap();
    for error in [
        schema.store.delete("orders").unwrap_err(),
        in_transaction(&schema.store, |it| it.delete("orders").map(drop)).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Backend { operation: "delete", .. }), "{error:?}");
        assert!(!error.is_transient(), "{error:?}");
        assert!(chain(&error).contains("trigger"), "{}", chain(&error));
    }
    assert_eq!(schema.store.get("orders").unwrap(), 50);
    assert!(!schema.store.delete("never there").unwrap());
}

/// A division by zero of the caller's trigger is not taken for the store's own.
#[test]
fn an_error_of_a_trigger_comes_out_as_it_is() {
    let schema = altering("PERFORM 1 / (NEW.\"offset\" - 60); RETURN NEW;");
    for (operation, write) in WRITES {
        let error = write(&schema.store, "orders", 50, 60).expect_err(operation);
        assert_eq!(sql_state(&error).as_deref(), Some("22012"), "{operation}: {}", chain(&error));
    }
}
