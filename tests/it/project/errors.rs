//! An error names the step that failed and the projection.

use std::time::{Duration, Instant};

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use super::stage::{Stage, apply};
use crate::harness::{Options, Server, chain, server};

#[test]
fn a_save_that_a_trigger_discards_is_an_error() {
    let stage = Stage::new();
    let store = stage.store();
    assert_eq!(store.project("orders", apply).unwrap(), Some(1));
    stage
        .client()
        .batch_execute(
            "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RETURN NULL; END $$;
             CREATE TRIGGER discard BEFORE UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION discard()",
        )
        .unwrap();
    let error = store.project("orders", apply).unwrap_err();
    assert!(
        error.to_string().starts_with("save failed: projection \"orders\" in table"),
        "{error}"
    );
    assert_eq!(stage.truth(), (Some(1), vec![1]));
}

#[test]
fn a_server_that_is_away_fails_at_begin_in_time() {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let server = Server::start(Options::fast());
    let store = PostgresCheckpointStore::builder()
        .connection_timeout(TIMEOUT)
        .connect(&server.params())
        .unwrap();
    store.migrate().unwrap();
    server.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    store.project("orders", apply).unwrap();
    server.crash();
    for _ in 0..2 {
        let started = Instant::now();
        let error = store.project("orders", apply).unwrap_err();
        assert!(started.elapsed() < TIMEOUT + Duration::from_secs(10), "{:?}", started.elapsed());
        assert!(matches!(error, Error::Unavailable { operation: "begin", .. }), "{error:?}");
        let told = "the checkpoint store is not available: begin: projection \"orders\" in table";
        assert!(error.to_string().starts_with(told), "{error}");
        assert!(error.is_transient());
    }
    server.restart();
    crate::harness::wait_until("it works again", || store.project("orders", apply).is_ok());
}

/// The last loss is what it says, when there was a connection to lose.
#[test]
fn who_holds_the_only_connection_and_projects_is_told_so() {
    let stage = Stage::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&stage.schema.name)
        .max_connections(1)
        .connection_timeout(Duration::from_millis(200))
        .connect(&server().params())
        .unwrap();
    let held = store.connection().unwrap();
    let error = store.project("orders", |_, _| panic!("nothing to apply")).unwrap_err();
    assert!(matches!(error, Error::Unavailable { operation: "begin", .. }), "{error:?}");
    assert!(chain(&error).contains("all connections of the pool are in use (1)"), "{error:?}");
    drop(held);
    assert_eq!(store.project("orders", |_, _| Ok(Some(1))).unwrap(), Some(1));
}

/// Its work is committed or rolled back by then, and the checkpoint is not locked any more.
#[test]
fn a_closure_that_ends_the_transaction_is_an_error_and_its_offset_is_not_saved() {
    for end in [
        "COMMIT",
        "ROLLBACK",
        "ROLLBACK AND CHAIN",
        "COMMIT AND CHAIN",
        "COMMIT; BEGIN",
        // These have a transaction id, as the transaction that holds the lock has.
        "COMMIT; BEGIN; SELECT pg_current_xact_id()",
        "ROLLBACK AND CHAIN; CREATE TEMPORARY TABLE work () ON COMMIT DROP",
    ] {
        for prepared in [false, true] {
            for is_there in [false, true] {
                let stage = Stage::new();
                let store = stage.store_at(&server().params(), "", prepared);
                if is_there {
                    store.save("orders", 1).unwrap();
                }
                let before = store.find("orders").unwrap();
                let apply = |tx: &mut Transaction<'_>, offset: i64| {
                    tx.batch_execute(end)?;
                    Ok(Some(offset + 10))
                };
                let what = format!("{end}, {prepared}, {is_there}");
                for _ in 0..3 {
                    let error = store.project("orders", apply).expect_err(&what);
                    assert!(!error.is_transient(), "{what}: {error:?}");
                    assert!(
                        error.report().to_string().contains("ended the transaction"),
                        "{what}: {error:?}"
                    );
                    assert_eq!(store.find("orders").unwrap(), before, "{what}");
                }
                assert_eq!(store.project("orders", |_, _| Ok(Some(5))).unwrap(), Some(5), "{what}");
            }
        }
    }
}
