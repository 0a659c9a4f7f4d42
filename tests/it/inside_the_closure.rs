//! Inside the closure of `project` the same store refuses to write, because the write would wait for the
//! closure's own transaction.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PostgresCheckpointStore, Result,
};

use crate::harness::{self, Proxy, Schema, chain, pool};

type Write = fn(&PostgresCheckpointStore) -> Result<()>;

/// Each on another projection than the one that the closure projects, too: two closures may wait for each other.
const WRITES: [(&str, Write); 9] = [
    ("save", |store| store.save("orders", 9)),
    ("save", |store| store.save("another", 9)),
    ("save_many", |store| store.save_many(&[("another", 9), ("orders", 9)])),
    ("advance", |store| store.advance("orders", 0, 9)),
    ("delete", |store| store.delete("orders").map(drop)),
    ("project", |store| store.project("orders", |_, _| unreachable!()).map(drop)),
    ("project", |store| store.project("another", |_, _| unreachable!()).map(drop)),
    ("try_project", |store| store.try_project("orders", |_, _| unreachable!()).map(drop)),
    ("try_project", |store| store.try_project("another", |_, _| unreachable!()).map(drop)),
];

fn stores(schema: &Schema, params: &str) -> Vec<PostgresCheckpointStore> {
    let builder = || PostgresCheckpointStore::builder().schema(&schema.name).max_connections(2);
    vec![
        builder().connect(params).unwrap(),
        builder().prepared_statements(true).connect(params).unwrap(),
        builder().group_commit(true).connect(params).unwrap(),
        builder().build(pool(params, 2, Duration::from_secs(30))).unwrap(),
    ]
}

#[track_caller]
fn assert_refused(operation: &str, outcome: Result<()>) {
    let error = outcome.expect_err(operation);
    assert!(
        matches!(&error, Error::Backend { operation: named, .. } if *named == operation),
        "{error:?}"
    );
    assert!(!error.is_transient(), "{error:?}");
    assert!(chain(&error).contains("in_transaction"), "{}", chain(&error));
}

#[test]
fn every_write_of_the_same_store_is_refused_and_nothing_is_sent() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for store in stores(&schema, &proxy.params()) {
        let clone = store.clone();
        store.save("orders", 1).unwrap();
        let refuse_all = || {
            for (operation, write) in WRITES {
                for handle in [&store, &clone] {
                    let mut outcome = None;
                    assert_eq!(
                        proxy.round_trips(|| outcome = Some(write(handle))),
                        0,
                        "{operation}"
                    );
                    assert_refused(operation, outcome.expect("it has run"));
                }
            }
        };
        let committed = store.project("orders", |_, offset| {
            refuse_all();
            Ok(Some(offset + 1))
        });
        assert_eq!(committed.unwrap(), Some(2));
        let tried = clone.try_project("orders", |_, offset| {
            refuse_all();
            Ok(Some(offset + 1))
        });
        assert_eq!(tried.unwrap(), checkpoint_store::Batch::Committed(3));
        // An empty slice has nothing to wait for, but a rule has no exceptions.
        store
            .project("orders", |_, _| {
                assert_refused("save_many", store.save_many(&[]));
                Ok(None)
            })
            .unwrap();
        assert_eq!(store.get("another").unwrap(), 0);
        everything_works(&store);
        store.delete("orders").unwrap();
    }
}

/// Every write, after whatever has happened in a closure.
fn everything_works(store: &PostgresCheckpointStore) {
    store.save("orders", 1).unwrap();
    store.advance("orders", 1, 2).unwrap();
    store.save_many(&[("orders", 3)]).unwrap();
    assert_eq!(store.project("orders", |_, _| Ok(Some(4))).unwrap(), Some(4));
    assert!(store.delete("orders").unwrap());
    let tried = store.try_project("orders", |_, _| Ok(Some(5))).unwrap();
    assert_eq!(tried, checkpoint_store::Batch::Committed(5));
}

#[test]
fn an_error_a_panic_and_nothing_new_end_it() {
    let schema = Schema::new();
    for store in stores(&schema, &harness::server().params()) {
        store.project("orders", |_, _| Ok(None)).unwrap();
        everything_works(&store);
        store.project("orders", |_, _| Err(Error::backend("apply", "on purpose"))).unwrap_err();
        everything_works(&store);
        store.project("orders", |_, _| Ok(Some(-1))).unwrap_err();
        everything_works(&store);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            store.project("orders", |_, _| std::panic::resume_unwind(Box::new("on purpose")))
        }));
        assert!(panicked.is_err());
        everything_works(&store);
        // The error of a refused write that the closure returns.
        let refused = store.project("orders", |_, _| {
            store.save("orders", 9)?;
            Ok(Some(9))
        });
        assert_refused("save", refused.map(drop));
        everything_works(&store);
        // A refused write that the closure ignores costs it nothing: nothing was sent.
        store.save("orders", 1).unwrap();
        let ignored = store.project("orders", |_, _| {
            let _ = store.save("orders", 9);
            Ok(Some(2))
        });
        assert_eq!(ignored.unwrap(), Some(2));
        // A retry that runs the closure again.
        let mut runs = 0;
        let again = store.project("orders", |tx, offset| {
            runs += 1;
            assert_refused("save", store.save("orders", 9));
            if runs < 3 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")?;
            }
            Ok(Some(offset + 1))
        });
        assert_eq!((again.unwrap(), runs), (Some(3), 3));
        everything_works(&store);
    }
}

#[test]
fn reads_connections_the_transaction_other_threads_and_other_stores_work() {
    let schema = Schema::new();
    let other = Schema::new();
    for store in stores(&schema, &harness::server().params()) {
        store.delete("orders").unwrap();
        store.save_many(&[("orders", 1), ("another", 7)]).unwrap();
        let same_table = &schema.store;
        let committed = store.project("orders", |tx, offset| {
            assert_eq!(store.get("orders")?, 1);
            assert_eq!(store.find("another")?.map(|it| it.offset), Some(7));
            assert_eq!(store.all()?.len(), 2);
            assert!(store.wait_for("another", 7, Duration::from_secs(60))?);
            store.connection()?.batch_execute("SELECT")?;
            store.in_transaction(tx).save("another", 8)?;
            other.store.save("orders", 1)?;
            assert_eq!(other.store.project("orders", |_, _| Ok(Some(2)))?, Some(2));
            other.store.delete("orders")?;
            // Another store on the same table has not to do with this one, and another row is free.
            same_table.save("of another store", 1)?;
            assert!(same_table.delete("of another store")?);
            thread::scope(|scope| {
                scope.spawn(|| store.save("of another thread", 1)).join().expect("no panic")
            })?;
            assert!(thread::scope(|scope| {
                scope.spawn(|| store.delete("of another thread")).join().expect("no panic")
            })?);
            assert_refused("save", store.save("another", 9));
            Ok(Some(offset + 1))
        });
        assert_eq!(committed.unwrap(), Some(2));
        assert_eq!(store.get("another").unwrap(), 8);
    }
}

#[test]
fn a_checkpointer_over_the_store_is_refused_and_keeps_what_it_has_to_save() {
    let schema = Schema::new();
    let store = &schema.store;
    let mut checkpointer = Checkpointer::resume(store, "another", Cadence::every(1)).unwrap();
    store
        .project("orders", |_, _| {
            assert_refused("advance", checkpointer.processed(1).map(drop));
            assert_refused("advance", checkpointer.flush().map(drop));
            Ok(None)
        })
        .unwrap();
    assert!(checkpointer.flush().unwrap());
    assert_eq!(store.get("another").unwrap(), 1);
}

#[test]
fn in_nested_closures_both_stores_refuse() {
    let (one, two) = (Schema::new(), Schema::new());
    let (one, two) = (&one.store, &two.store);
    let committed = one.project("orders", |_, _| {
        let inner = two.project("orders", |_, _| {
            assert_refused("save", one.save("orders", 9));
            assert_refused("save", two.save("orders", 9));
            assert_refused("project", one.project("another", |_, _| Ok(None)).map(drop));
            Ok(Some(1))
        });
        assert_eq!(inner?, Some(1));
        two.save("orders", 2)?;
        assert_refused("save", one.save("orders", 9));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            two.project("orders", |_, _| std::panic::resume_unwind(Box::new("on purpose")))
        }));
        assert!(panicked.is_err());
        two.save("orders", 3)?;
        assert_refused("save", one.save("orders", 9));
        Ok(Some(1))
    });
    assert_eq!(committed.unwrap(), Some(1));
    everything_works(one);
    everything_works(two);
}

/// What PostgreSQL cannot see: each waits for the other one's closure, and each closure for its thread.
#[test]
fn two_closures_that_save_each_others_projection_do_not_wait_for_each_other() {
    let schema = Schema::new();
    let store = &schema.store;
    store.save_many(&[("one", 1), ("two", 1)]).unwrap();
    let both_are_in = std::sync::Barrier::new(2);
    thread::scope(|scope| {
        for (mine, theirs) in [("one", "two"), ("two", "one")] {
            let both_are_in = &both_are_in;
            scope.spawn(move || {
                let committed = store.project(mine, |_, offset| {
                    both_are_in.wait();
                    assert_refused("save", store.save(theirs, 9));
                    Ok(Some(offset + 1))
                });
                assert_eq!(committed.unwrap(), Some(2));
            });
        }
    });
}
