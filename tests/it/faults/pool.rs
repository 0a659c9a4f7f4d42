//! Fewer connections than threads that want one.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use super::{Row, store_on};
use crate::harness::{self, Options, Server, chain, fresh_database, unique, wait_until};

/// Sixteen threads save and read back, fifty times each; the longest wait.
fn all_get_done(store: &PostgresCheckpointStore) -> Duration {
    const THREADS: usize = 16;
    let start = Barrier::new(THREADS);
    let longest = thread::scope(|scope| {
        let callers: Vec<_> = (0..THREADS)
            .map(|i| {
                let start = &start;
                scope.spawn(move || {
                    let projection = format!("orders {i}");
                    let mut longest = Duration::ZERO;
                    start.wait();
                    for offset in 1..=50 {
                        let started = Instant::now();
                        store.advance(&projection, offset - 1, offset).unwrap();
                        assert_eq!(store.get(&projection).unwrap(), offset);
                        longest = longest.max(started.elapsed() / 2);
                    }
                    longest
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).max()
    });
    longest.unwrap()
}

#[test]
fn more_threads_than_connections_all_get_done() {
    let store = store_on(&fresh_database(), 2, Duration::from_secs(30));
    store.migrate().unwrap();
    let longest_wait = all_get_done(&store);
    assert!(store.pool_state().connections <= 2);
    let fault = "16 threads on a pool of 2 connections";
    Row::asserted(fault, 1_600, 0, longest_wait).print();
}

#[test]
fn a_server_that_gives_fewer_connections_than_the_pool_may_have_is_no_error() {
    let database = fresh_database();
    let role = unique("limited");
    harness::client(&database)
        .batch_execute(&format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 2"))
        .unwrap();
    let owner = store_on(&database, 1, Duration::from_secs(30));
    owner.migrate().unwrap();
    harness::client(&database)
        .batch_execute(&format!("GRANT ALL ON projection_checkpoints TO {role}"))
        .unwrap();
    let store =
        PostgresCheckpointStore::connect(&database.replace("postgres@", &format!("{role}@")))
            .unwrap();
    let longest_wait = all_get_done(&store);
    assert!(store.pool_state().connections <= 2);
    let fault = "16 threads, a pool of 10, a server that gives 2 connections";
    Row::asserted(fault, 1_600, 0, longest_wait).print();
}

/// The error of each operation while the store's pool has no connection to give.
fn refusals(store: &PostgresCheckpointStore) -> Vec<(Error, Duration)> {
    let calls: [&dyn Fn() -> Result<(), Error>; 9] = [
        &|| store.find("orders").map(drop),
        &|| store.get("orders").map(drop),
        &|| store.all().map(drop),
        &|| store.save("orders", 42),
        &|| store.save_many(&[("orders", 42)]),
        &|| store.advance("orders", 41, 42),
        &|| store.delete("orders").map(drop),
        &|| store.migrate(),
        &|| store.connection().map(drop),
    ];
    let refusal = |call: &dyn Fn() -> Result<(), Error>| {
        let started = Instant::now();
        (call().unwrap_err(), started.elapsed())
    };
    calls.into_iter().map(refusal).collect()
}

#[test]
fn who_holds_the_only_connection_and_calls_the_store_is_told_so() {
    const TIMEOUT: Duration = Duration::from_millis(200);
    let store = store_on(&fresh_database(), 1, TIMEOUT);
    store.migrate().unwrap();
    store.save("orders", 41).unwrap();
    let mut held = store.connection().unwrap();
    let mut tx = held.transaction().unwrap();
    assert_eq!(store.in_transaction(&mut tx).lock("orders").unwrap(), 41);

    let refusals = refusals(&store);
    for (error, waited) in &refusals {
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        let told = chain(error);
        assert!(told.contains("all connections of the pool are in use (1)"), "{told}");
        let bounds = TIMEOUT..TIMEOUT + Duration::from_secs(2);
        assert!(bounds.contains(waited), "{waited:?}");
    }
    store.in_transaction(&mut tx).save("orders", 43).unwrap();
    tx.commit().unwrap();
    drop(held);
    assert_eq!(store.get("orders").unwrap(), 43);
    let fault = "the caller itself holds the pool's only connection (time-out 0.2 s here)";
    let longest_wait = refusals.iter().map(|(_, waited)| *waited).max().unwrap();
    Row::asserted(fault, refusals.len(), refusals.len(), longest_wait).print();
}

#[test]
fn who_waits_in_vain_because_nobody_listens_is_told_that() {
    let server = Server::start(Options::fast());
    let store = store_on(&server.params(), 2, Duration::from_millis(200));
    store.migrate().unwrap();
    server.crash();
    for (error, _) in refusals(&store) {
        let told = chain(&error);
        assert!(told.contains("error connecting to server"), "{told}");
        assert!(!told.contains("in use"), "{told}");
    }
}

/// r2d2 wakes nobody when a dead connection leaves room for a new one.
#[test]
fn who_waits_for_a_connection_gets_a_new_one_when_the_one_in_use_dies() {
    let database = fresh_database();
    let store = PostgresCheckpointStore::builder().max_connections(1).connect(&database).unwrap();
    store.migrate().unwrap();
    let mut longest_wait = Duration::ZERO;
    for round in 1..=5 {
        let mut held = store.connection().unwrap();
        let pid = super::process_id(&mut held);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let started = Instant::now();
                store.save("orders", round).unwrap();
                started.elapsed()
            });
            // Nothing tells from outside that the other thread waits. Where it does not yet, it
            // has nothing to wait for, and this round shows nothing.
            thread::sleep(Duration::from_millis(50));
            harness::client(&database).execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
            wait_until("the connection is dead", || held.batch_execute("SELECT").is_err());
            drop(held);
            longest_wait = longest_wait.max(waiting.join().unwrap());
        });
    }
    let fault = "the pool's only connection dies in another thread's hands";
    Row::asserted(fault, 5, 0, longest_wait).print();
    assert!(longest_wait < Duration::from_secs(10), "{longest_wait:?}");
}
