//! Rights, limits and settings of the database.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore, Result, Retry, conformance};

use super::{GUIDE, blocks};
use super::{OPERATIONS, append, apply_ten, each_event_counts_once, sql_with, store_and_stream};
use crate::harness::{self, Options, Server, sql_state, wait_until};

static RETRIES: AtomicU64 = AtomicU64::new(0); // a counter for your metrics
static LAST_LINE: Mutex<Option<Instant>> = Mutex::new(None);

fn log_retry(retry: &Retry<'_>) {
    RETRIES.fetch_add(1, Ordering::Relaxed);
    let mut last_line = LAST_LINE.lock().unwrap_or_else(PoisonError::into_inner);
    if last_line.is_none_or(|at| at.elapsed() >= Duration::from_secs(10)) {
        *last_line = Some(Instant::now());
        eprintln!("retry {} after {:.1?}: {}", retry.attempt, retry.elapsed, retry.error.report());
    }
}

fn connect(params: &str) -> Result<PostgresCheckpointStore> {
    PostgresCheckpointStore::builder().on_retry(log_retry).connect(params)
}

#[test]
fn after_the_owner_has_migrated_the_grants_are_enough_for_a_worker() {
    let database = harness::fresh_database();
    let mut owner = harness::client(&database);
    let worker = harness::unique("worker");
    owner
        .batch_execute(&format!(
            "CREATE ROLE {worker} LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC"
        ))
        .unwrap();
    PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
    let params = database.replace("postgres@", &format!("{worker}@"));
    let store = PostgresCheckpointStore::connect(&params).unwrap();
    assert_eq!(sql_state(&store.save("orders", 1).unwrap_err()).as_deref(), Some("42501"));
    let grants = sql_with(OPERATIONS, "TO worker").replace("worker", &worker);
    owner.batch_execute(&grants).unwrap();
    store.migrate().unwrap();
    conformance::verify(&store);
    assert_eq!(store.project("orders", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(1));
}

#[test]
fn a_statement_of_the_closure_that_runs_into_a_limit_fails_again_until_the_batch_is_smaller() {
    let (store, mut client) = store_and_stream();
    append(&mut client, 20, "i", "i");
    let slow = |events: i64| {
        move |tx: &mut Transaction<'_>, offset: i64| -> Result<Option<i64>> {
            tx.batch_execute("SET LOCAL statement_timeout = '1s'")?;
            let sql = "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT $2)
                       SELECT max(id), pg_sleep(0.2 * count(*)) FROM batch";
            tx.query_one(sql, &[&offset, &events])?;
            tx.batch_execute("SET LOCAL statement_timeout = 0")?;
            apply_ten(tx, offset)
        }
    };
    for _ in 0..2 {
        let error = store.project("orders", slow(20)).unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("57014"));
        assert!(!error.is_transient(), "{error:?}");
        assert_eq!(store.get("orders").unwrap(), 0);
    }
    while store.project("orders", slow(1)).is_ok_and(|offset| offset.is_some()) {}
    each_event_counts_once(&mut client);
}

#[test]
fn a_setting_without_local_reaches_the_next_user_of_the_connection_and_with_local_it_does_not() {
    let database = harness::fresh_database();
    let store = PostgresCheckpointStore::builder().max_connections(1).connect(&database).unwrap();
    store.migrate().unwrap();
    let setting = || -> String {
        let mut client = store.connection().unwrap();
        client.query_one("SHOW work_mem", &[]).unwrap().get(0)
    };
    let before = setting();
    for (sql, after) in [("SET LOCAL work_mem = '5MB'", &*before), ("SET work_mem = '6MB'", "6MB")]
    {
        let apply = |tx: &mut Transaction<'_>, offset| {
            tx.batch_execute(sql)?;
            Ok(Some(offset + 1))
        };
        store.project("orders", apply).unwrap();
        assert_eq!(setting(), after);
    }
}

#[test]
fn a_transaction_that_the_closure_has_prepared_is_an_error_and_keeps_the_row_lock() {
    let server = Server::start(Options::fast().set("max_prepared_transactions", "1"));
    let params = format!("{} options='-c lock_timeout=300ms'", server.params());
    let store = PostgresCheckpointStore::builder()
        .connection_timeout(Duration::from_secs(2))
        .connect(&params)
        .unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    let prepare = |tx: &mut Transaction<'_>, offset| {
        tx.batch_execute("PREPARE TRANSACTION 'batch'")?;
        Ok(Some(offset + 1))
    };
    assert!(!store.project("orders", prepare).unwrap_err().is_transient());
    let waits = store.project("orders", |_, offset| Ok(Some(offset + 1))).unwrap_err();
    assert_eq!(sql_state(&waits).as_deref(), Some("55P03"), "{waits:?}");
    server.client().batch_execute("ROLLBACK PREPARED 'batch'").unwrap();
    assert_eq!(store.project("orders", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(2));
}

#[test]
fn the_query_for_the_lag_reads_checkpoints_and_head_at_one_moment() {
    let (store, mut client) = store_and_stream();
    append(&mut client, 25, "i", "i");
    store.project("orders", apply_ten).unwrap();
    let row = client.query_one(&sql_with(OPERATIONS, "AS lag"), &[]).unwrap();
    assert_eq!(
        (row.get("projection_name"), row.get("offset"), row.get("lag")),
        ("orders", 10_i64, 15_i64)
    );
    assert_eq!(blocks(GUIDE, "sql")[0].matches("CREATE TABLE events").count(), 1);
}

#[test]
fn retries_are_counted_and_logged_once_and_then_every_ten_seconds() {
    let retries = || RETRIES.load(Ordering::Relaxed);
    let last_line = || *LAST_LINE.lock().unwrap();
    let server = Server::start(Options::fast());
    let store = connect(&server.params()).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    assert_eq!((retries(), last_line()), (0, None), "nothing was retried");
    server.stop();
    thread::scope(|scope| {
        let saved = scope.spawn(|| store.save("orders", 2));
        wait_until("it is retried", || retries() >= 1);
        let first = Instant::now();
        wait_until("it is retried more often", || retries() >= 3);
        let line = last_line().unwrap();
        assert!(line <= first || first.elapsed() > Duration::from_secs(9), "one line so far");
        let long_ago = line.checked_sub(Duration::from_secs(10)).unwrap();
        *LAST_LINE.lock().unwrap() = Some(long_ago);
        wait_until("the next line is due", || last_line() != Some(long_ago));
        server.restart();
        saved.join().unwrap().unwrap();
    });
}
