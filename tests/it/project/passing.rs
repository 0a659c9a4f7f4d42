//! What passes by itself: other transactions, a server that is read-only for a moment, what a
//! caller has left on a connection. None of it is an error to who calls `project`.

use std::time::Duration;

use checkpoint_store::postgres::error::SqlState;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use super::stage::{Stage, apply, batch_after, process_id};
use crate::harness::{self, Options, Server, end_backend, server, sql_state, wait_until};

#[test]
fn a_serialization_failure_in_the_closure_is_tried_again() {
    for level in ["repeatable\\\\ read", "serializable"] {
        for prepared in [false, true] {
            let stage = Stage::new();
            let settings = format!("-c default_transaction_isolation={level}");
            let store = stage.store_at(&server().params(), &settings, prepared);
            let mut rival = stage.client();
            rival
                .batch_execute("CREATE TABLE total (amount bigint); INSERT INTO total VALUES (0)")
                .unwrap();
            let mut runs = 0;
            let committed = store.project("orders", |tx, offset| {
                runs += 1;
                if runs <= 3 {
                    // Since the snapshot that the lock has taken.
                    rival.batch_execute("UPDATE total SET amount = amount + 10").unwrap();
                }
                tx.batch_execute("UPDATE total SET amount = amount + 1")?;
                apply(tx, offset)
            });
            assert_eq!(committed.unwrap(), Some(1));
            assert_eq!(runs, 4);
            let total: i64 = rival.query_one("SELECT amount FROM total", &[]).unwrap().get(0);
            assert_eq!(total, 31);
            assert_eq!(stage.truth(), (Some(1), vec![1]));
        }
    }
}

/// Serializable transactions may be refused as late as at their COMMIT.
#[test]
fn a_serialization_failure_at_the_commit_is_tried_again() {
    let stage = Stage::new();
    let settings = "-c default_transaction_isolation=serializable";
    let store = stage.store_at(&server().params(), settings, false);
    stage
        .client()
        .batch_execute(
            "CREATE TABLE doctors (name text, on_call bool); INSERT INTO doctors VALUES ('a', true), ('b', true)",
        )
        .unwrap();
    let mut rival = crate::harness::client(&stage.params_at(&server().params(), settings));
    let mut runs = 0;
    let committed = store.project("orders", |tx, offset| {
        runs += 1;
        let count = "SELECT count(*) FROM doctors WHERE on_call";
        let on_call: i64 = tx.query_typed_one(count, &[])?.get(0);
        if runs == 1 {
            // Each of the two has read what the other one writes: one of them has to give way.
            let mut other = rival.transaction().unwrap();
            other.query_typed_one(count, &[]).unwrap();
            other.batch_execute("UPDATE doctors SET on_call = false WHERE name = 'b'").unwrap();
            tx.batch_execute("UPDATE doctors SET on_call = false WHERE name = 'a'")?;
            other.commit().unwrap();
        }
        assert_eq!(on_call, if runs == 1 { 2 } else { 1 });
        apply(tx, offset)
    });
    assert_eq!(committed.unwrap(), Some(1));
    assert_eq!(runs, 2);
    assert_eq!(stage.truth(), (Some(1), vec![1]));
}

/// What would never end is ended by the store's patience.
#[test]
fn a_closure_that_is_undone_each_time_is_given_up_when_the_time_is_over() {
    let stage = Stage::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&stage.schema.name)
        .connection_timeout(Duration::from_millis(300))
        .connect(&stage.params_at(&server().params(), ""))
        .unwrap();
    let mut runs = 0;
    let error = store
        .project("orders", |tx, offset| {
            runs += 1;
            apply(tx, offset)?;
            tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")?;
            Ok(Some(offset + 1))
        })
        .unwrap_err();
    assert_eq!(sql_state(&error).as_deref(), Some("40001"));
    assert!(error.is_transient() && runs > 1, "{runs}");
    assert_eq!(stage.truth(), (None, vec![]));
    stage.serves_the_next_caller(&store);
}

/// As a demoted server does it to a transaction in progress, and to those that begin after it.
#[test]
fn a_closure_that_comes_upon_a_read_only_server_is_tried_again() {
    let server = Server::start(Options::fast());
    let become_read_only = {
        let params = server.params();
        move |setting: &str| {
            let mut admin = harness::client(&params);
            let sql = format!("ALTER SYSTEM SET default_transaction_read_only = {setting}");
            admin.batch_execute(&sql).unwrap();
            admin.batch_execute("SELECT pg_reload_conf()").unwrap();
            wait_until("new transactions know it", || {
                let mut client = harness::client(&params);
                let row = client.query_one("SHOW default_transaction_read_only", &[]).unwrap();
                row.get::<_, &str>(0) == setting
            });
        }
    };
    let turn_back = become_read_only.clone();
    let store = PostgresCheckpointStore::builder()
        .on_retry(move |_| turn_back("off"))
        .connect(&server.params())
        .unwrap();
    store.migrate().unwrap();
    server.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let (mut runs, mut pids) = (0, Vec::new());
    let committed = store.project("orders", |tx, offset| {
        runs += 1;
        pids.push(process_id(tx));
        if runs == 1 {
            become_read_only("on");
            tx.batch_execute("SET TRANSACTION READ ONLY")?;
        }
        apply(tx, offset)
    });
    assert_eq!(committed.unwrap(), Some(1));
    assert_eq!(runs, 2);
    assert_ne!(pids[0], pids[1], "not on the connection that has led there");
    assert_eq!(store.get("orders").unwrap(), 1);
}

#[test]
fn a_closure_that_makes_its_own_transaction_read_only_fails_at_once() {
    let stage = Stage::new();
    let store = stage.store();
    let mut runs = 0;
    let error = store
        .project("orders", |tx, offset| {
            runs += 1;
            tx.batch_execute("SET TRANSACTION READ ONLY")?;
            apply(tx, offset)
        })
        .unwrap_err();
    assert_eq!(runs, 1);
    assert!(!error.is_transient(), "{error:?}");
    assert_eq!(error.sql_state(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    assert_eq!(stage.truth(), (None, vec![]));
    stage.serves_the_next_caller(&store);
}

/// Two losses are the server's; the third may be the closure's doing.
#[test]
fn a_closure_under_which_the_connection_is_lost_twice_is_no_error() {
    let stage = Stage::new();
    let store = stage.store();
    let mut admin = stage.client();
    for losses in 0..=3 {
        let before = store.get("orders").unwrap();
        let mut runs = 0;
        let outcome = store.project("orders", |tx, offset| {
            runs += 1;
            if runs <= losses {
                end_backend(&mut admin, process_id(tx));
            }
            apply(tx, offset)
        });
        if losses < 3 {
            assert_eq!(outcome.unwrap(), Some(batch_after(before)));
            assert_eq!(runs, losses + 1);
        } else {
            let error = outcome.unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert_eq!(runs, 3);
        }
    }
}

#[test]
fn a_restart_of_the_server_between_any_two_batches_is_no_error() {
    let server = Server::start(Options::fast());
    let store = PostgresCheckpointStore::connect(&server.params()).unwrap();
    store.migrate().unwrap();
    server.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let mut offset = 0;
    for round in 0..4 {
        if round % 2 == 0 {
            server.stop();
        } else {
            server.crash();
        }
        server.restart();
        offset = batch_after(offset);
        assert_eq!(store.project("orders", apply).unwrap(), Some(offset));
    }
    let row = server.client().query_one("SELECT count(*), max(event) FROM applied", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), (offset, offset));
}
