//! Rivals at every isolation level, and deadlocks.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, IsolationLevel, Transaction};
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use fastrand::Rng;

use super::Row;
use crate::harness::{Schema, sql_state};

const THREADS: u64 = 8;

#[test]
fn save_many_in_any_order_never_deadlocks_and_is_never_seen_half_done() {
    const TIMES: i64 = 100;
    let schema = Schema::new();
    let store = &schema.store;
    let names: Vec<_> = (0..30).map(|i| format!("projection {i}")).collect();
    let next = AtomicI64::new(1);
    let longest_wait = Mutex::new(Duration::ZERO);
    thread::scope(|scope| {
        for seed in 0..THREADS {
            let (names, next, longest_wait) = (&names, &next, &longest_wait);
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed);
                for _ in 0..TIMES {
                    let offset = next.fetch_add(1, Ordering::SeqCst);
                    let mut checkpoints: Vec<_> =
                        names.iter().map(|name| (name.as_str(), offset)).collect();
                    random.shuffle(&mut checkpoints);
                    let started = Instant::now();
                    store.save_many(&checkpoints).unwrap();
                    let mut longest = longest_wait.lock().unwrap();
                    *longest = longest.max(started.elapsed());
                    drop(longest);
                    let all = store.all().unwrap();
                    assert!(all.iter().all(|it| it.offset == all[0].offset), "{all:?}");
                }
            });
        }
    });
    assert_eq!(store.all().unwrap().len(), names.len());
    let fault = "`save_many` of 30 in random orders, 8 threads";
    let (times, longest_wait) = (800, longest_wait.into_inner().unwrap());
    Row::asserted(fault, times, 0, longest_wait).print();
}

/// One step of a rival, booked in the same transaction: `booked` adds up to the offset.
fn step(
    store: &PostgresCheckpointStore,
    tx: &mut Transaction<'_>,
    kind: u64,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let booked = match kind {
        0 | 1 => {
            let offset = store.in_transaction(tx).lock("orders")?;
            store.in_transaction(tx).save("orders", offset + 1)?;
            1
        }
        2 | 3 => {
            let offset = store.in_transaction(tx).get("orders")?;
            store.in_transaction(tx).advance("orders", offset, offset + 1)?;
            1
        }
        4 => {
            let Some(offset) = store.in_transaction(tx).try_lock("orders")? else { return Ok(()) };
            store.in_transaction(tx).save("orders", offset + 1)?;
            1
        }
        _ => {
            let offset = store.in_transaction(tx).lock("orders")?;
            assert!(store.in_transaction(tx).delete("orders")?, "it was locked");
            -offset
        }
    };
    tx.execute("INSERT INTO booked VALUES ($1)", &[&booked])?;
    Ok(())
}

/// Whether a transaction with this error in it is worth another try.
fn is_worth_a_retry(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<Error>() {
        return error.is_transient() || error.is_conflict();
    }
    // At SERIALIZABLE the caller's own statement and COMMIT may fail too.
    sql_state(error).as_deref() == Some("40001")
}

/// Eight threads lock, advance and delete one projection; whoever is refused tries again.
fn rivals(fault: &'static str, level: IsolationLevel) {
    const STEPS: usize = 40;
    let schema = Schema::new();
    schema.client().batch_execute("CREATE TABLE booked (delta bigint NOT NULL)").unwrap();
    let store = &schema.store;
    let retries = AtomicUsize::new(0);
    let advanced = AtomicI64::new(0);
    let longest_wait = Mutex::new(Duration::ZERO);
    thread::scope(|scope| {
        for seed in 0..THREADS {
            let (schema, retries, advanced) = (&schema, &retries, &advanced);
            let longest_wait = &longest_wait;
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed);
                let mut client: Client = schema.client();
                for _ in 0..STEPS {
                    let kind = random.u64(..7);
                    let started = Instant::now();
                    loop {
                        let outcome = if kind == 6 {
                            let from = store.get("orders").unwrap();
                            store
                                .advance("orders", from, from + 1)
                                .map(|()| _ = advanced.fetch_add(1, Ordering::SeqCst))
                                .map_err(Into::into)
                        } else {
                            let mut tx =
                                client.build_transaction().isolation_level(level).start().unwrap();
                            step(store, &mut tx, kind)
                                .and_then(|()| tx.commit().map_err(Into::into))
                        };
                        let Err(error) = outcome else { break };
                        assert!(is_worth_a_retry(error.as_ref()), "{error:?}");
                        retries.fetch_add(1, Ordering::SeqCst);
                    }
                    let mut longest = longest_wait.lock().unwrap();
                    *longest = longest.max(started.elapsed());
                }
            });
        }
    });
    let booked: i64 = schema
        .client()
        .query_one("SELECT COALESCE(sum(delta), 0)::bigint FROM booked", &[])
        .unwrap()
        .get(0);
    let (found, expected) = (store.get("orders").unwrap(), booked + advanced.into_inner());
    let row = Row {
        fault,
        times: STEPS * usize::try_from(THREADS).unwrap(),
        lost: usize::try_from((expected - found).max(0)).unwrap(),
        twice: usize::try_from((found - expected).max(0)).unwrap(),
        errors: retries.into_inner(),
        longest_wait: longest_wait.into_inner().unwrap(),
    };
    row.print();
    assert_eq!(found, expected, "each step counts once");
}

#[test]
fn no_update_is_lost_at_read_committed() {
    let fault =
        "`lock`, `advance`, `delete` as rivals, READ COMMITTED (errors: refused and tried again)";
    rivals(fault, IsolationLevel::ReadCommitted);
}

#[test]
fn no_update_is_lost_at_repeatable_read() {
    let fault =
        "`lock`, `advance`, `delete` as rivals, REPEATABLE READ (errors: refused and tried again)";
    rivals(fault, IsolationLevel::RepeatableRead);
}

#[test]
fn no_update_is_lost_at_serializable() {
    let fault =
        "`lock`, `advance`, `delete` as rivals, SERIALIZABLE (errors: refused and tried again)";
    rivals(fault, IsolationLevel::Serializable);
}

#[test]
fn of_two_transactions_that_deadlock_one_commits_and_the_other_may_try_again() {
    let schema = Schema::new();
    let store = &schema.store;
    let started = Instant::now();
    let both_hold_one = Barrier::new(2);
    let save_two = |first: &str, second: &str, offset: i64| {
        let mut client = schema.client();
        let mut tx = client.transaction().unwrap();
        store.in_transaction(&mut tx).save(first, offset).unwrap();
        both_hold_one.wait();
        store.in_transaction(&mut tx).save(second, offset)?;
        tx.commit().unwrap();
        Ok(())
    };
    let outcomes: [Result<(), Error>; 2] = thread::scope(|scope| {
        let rival = scope.spawn(|| save_two("b", "a", 2));
        [save_two("a", "b", 1), rival.join().unwrap()]
    });
    let winner = i64::from(outcomes[0].is_err()) + 1;
    let all: Vec<_> =
        store.all().unwrap().into_iter().map(|it| (it.projection, it.offset)).collect();
    assert_eq!(all, [("a".to_owned(), winner), ("b".to_owned(), winner)]);
    let errors: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    let [error] = errors.as_slice() else { panic!("one of the two: {errors:?}") };
    assert!(error.is_transient(), "{error:?}");
    assert_eq!(sql_state(error).as_deref(), Some("40P01"));
    let fault = "deadlock of two transactions that save in opposite orders";
    let longest_wait = started.elapsed();
    Row::asserted(fault, 1, 1, longest_wait).print();
}

#[test]
fn a_rival_that_has_committed_since_the_snapshot_is_a_transient_error() {
    type Call = fn(&PostgresCheckpointStore, &mut Transaction<'_>) -> Result<(), Error>;
    for level in [IsolationLevel::RepeatableRead, IsolationLevel::Serializable] {
        let calls: [Call; 5] = [
            |store, tx| store.in_transaction(tx).lock("orders").map(drop),
            |store, tx| store.in_transaction(tx).save("orders", 9),
            |store, tx| store.in_transaction(tx).save_many(&[("orders", 9)]),
            |store, tx| store.in_transaction(tx).advance("orders", 1, 9),
            |store, tx| store.in_transaction(tx).delete("orders").map(drop),
        ];
        for call in calls {
            let schema = Schema::new();
            schema.store.save("orders", 1).unwrap();
            let mut client = schema.client();
            let mut tx = client.build_transaction().isolation_level(level).start().unwrap();
            assert_eq!(schema.store.in_transaction(&mut tx).get("orders").unwrap(), 1);
            schema.store.save("orders", 2).unwrap();
            let error = call(&schema.store, &mut tx).unwrap_err();
            assert!(error.is_transient(), "{error:?}");
            assert_eq!(sql_state(&error).as_deref(), Some("40001"));
            drop(tx);
            assert_eq!(schema.store.get("orders").unwrap(), 2);
        }
    }
}
