//! One batch exactly once in one call: what the closure may do, and what it cannot do wrong.

mod each_step;
mod errors;
mod histories;
mod kills;
mod mistakes;
mod names;
mod passing;
mod prepared;
mod stage;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{Batch, CheckpointStore, Error, PostgresCheckpointStore, Result};

use crate::harness::{self, Cut, Proxy, Schema, chain, sql_state, wait_for_a_waiter, wait_until};

/// A read model that takes every event as often as it comes: a unique index would hide one that is
/// applied twice behind an error.
fn with_read_model() -> Schema {
    let schema = Schema::new();
    schema.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    schema
}

/// A store with one connection, which finds the schema's tables without naming it.
fn store_of(schema: &Schema, prepared: bool) -> PostgresCheckpointStore {
    store_at(&harness::server().params(), schema, prepared)
}

fn store_at(params: &str, schema: &Schema, prepared: bool) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(prepared)
        .max_connections(1)
        .connect(&format!("{params} options='-c search_path={}'", schema.name))
        .unwrap()
}

fn apply(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    tx.execute("INSERT INTO applied VALUES ($1)", &[&(offset + 1)])?;
    Ok(Some(offset + 1))
}

fn applied(client: &mut Client) -> Vec<i64> {
    let rows = client.query("SELECT event FROM applied ORDER BY event", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn read_model_and_checkpoint_are_committed_together() {
    for prepared in [false, true] {
        let schema = with_read_model();
        let store = store_of(&schema, prepared);
        for event in 1..=5 {
            assert_eq!(store.project("orders", apply).unwrap(), Some(event));
            assert_eq!(store.get("orders").unwrap(), event);
        }
        assert_eq!(store.try_project("orders", apply).unwrap(), Batch::Committed(6));
        assert_eq!(applied(&mut schema.client()), [1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn a_batch_is_begin_lock_apply_and_one_message_that_saves_and_commits() {
    let schema = with_read_model();
    let proxy = Proxy::to(harness::server().port());
    for prepared in [false, true] {
        let store = store_at(&proxy.params(), &schema, prepared);
        let one_round_trip = |tx: &mut Transaction<'_>, offset| {
            tx.execute_typed("INSERT INTO applied VALUES (1)", &[])?;
            Ok(Some(offset + 1))
        };
        store.project("orders", one_round_trip).unwrap();
        // A connection is trusted for a second, and this machine may be slow: the fewest count.
        let fewest = (0..10)
            .map(|_| proxy.round_trips(|| store.project("orders", one_round_trip).unwrap()))
            .min();
        assert_eq!(fewest, Some(4));
        let idle = (0..10)
            .map(|_| proxy.round_trips(|| store.project("orders", |_, _| Ok(None)).unwrap()))
            .min();
        assert_eq!(idle, Some(3));
    }
}

#[test]
fn nothing_new_leaves_no_row_and_no_write() {
    let schema = with_read_model();
    let store = store_of(&schema, true);
    let nothing = |tx: &mut Transaction<'_>, _| {
        tx.execute("INSERT INTO applied VALUES (99)", &[])?;
        Ok(None)
    };
    assert_eq!(store.project("orders", nothing).unwrap(), None);
    assert_eq!(store.try_project("orders", nothing).unwrap(), Batch::NothingNew);
    assert_eq!(store.find("orders").unwrap(), None);
    store.save("orders", 7).unwrap();
    let before = store.find("orders").unwrap();
    assert_eq!(store.project("orders", nothing).unwrap(), None);
    assert_eq!(store.find("orders").unwrap(), before);
    assert!(applied(&mut schema.client()).is_empty());
    assert_eq!(store.project("orders", apply).unwrap(), Some(8));
}

#[test]
fn an_offset_that_does_not_move_on_is_refused_and_nothing_is_kept() {
    let schema = with_read_model();
    let store = store_of(&schema, false);
    for (stored, returned) in [(0, 0), (0, -1), (5, 5), (5, 4), (5, i64::MIN)] {
        if stored > 0 {
            store.save("orders", stored).unwrap();
        }
        let before = store.find("orders").unwrap();
        let error = store
            .project("orders", |tx, offset| {
                apply(tx, offset)?;
                Ok(Some(returned))
            })
            .unwrap_err();
        assert!(
            matches!(error, Error::InvalidOffset { offset, .. } if offset == returned),
            "{error:?}"
        );
        assert_eq!(store.find("orders").unwrap(), before);
    }
    assert!(applied(&mut schema.client()).is_empty());
    for name in ["", "nul \0", &"x".repeat(1_025)] {
        let refused = store.project(name, |_, _| unreachable!("nothing is sent")).unwrap_err();
        assert!(matches!(refused, Error::InvalidProjection { .. }));
    }
    assert_eq!(store.project("orders", |_, _| Ok(Some(i64::MAX))).unwrap(), Some(i64::MAX));
}

#[test]
fn an_error_of_the_closure_undoes_its_work_and_comes_out_as_it_is() {
    let schema = with_read_model();
    let store = store_of(&schema, true);
    let fail_with = |error: fn() -> Error| {
        let mut runs = 0;
        let outcome = store.project("orders", |tx, offset| {
            runs += 1;
            apply(tx, offset)?;
            Err(error())
        });
        (outcome.unwrap_err(), runs)
    };
    let (error, runs) =
        fail_with(|| Error::backend("apply", std::io::Error::other("search index is full")));
    assert!(matches!(&error, Error::Backend { operation: "apply", source, .. }
        if source.is::<std::io::Error>()));
    assert_eq!(runs, 1);
    // Of some other service, and worth another try, but not here.
    let (error, runs) = fail_with(|| Error::unavailable("search index", "connection reset"));
    assert!(matches!(error, Error::Unavailable { operation: "search index", .. }), "{error:?}");
    assert_eq!(runs, 1);
    assert_eq!(store.find("orders").unwrap(), None);
    assert!(applied(&mut schema.client()).is_empty());
}

/// What happens on another connection of the closure's says nothing about this transaction.
#[test]
fn a_failure_of_another_database_connection_is_not_taken_for_one_of_the_batchs_own() {
    let schema = with_read_model();
    let store = store_of(&schema, false);
    let mut other = schema.client();
    for statement in [
        "DO $$ BEGIN RAISE SQLSTATE '25006'; END $$",
        "SELECT pg_terminate_backend(pg_backend_pid())",
    ] {
        let mut runs = 0;
        let error = store
            .project("orders", |tx, offset| {
                runs += 1;
                apply(tx, offset)?;
                other.batch_execute(statement)?;
                unreachable!("it fails")
            })
            .unwrap_err();
        assert_eq!(runs, 1, "{statement}: {error:?}");
        assert_eq!(store.project("orders", |_, _| Ok(None)).unwrap(), None);
    }
    assert!(applied(&mut schema.client()).is_empty());
}

#[test]
fn a_failed_statement_that_is_swallowed_fails_the_batch() {
    let schema = with_read_model();
    for prepared in [false, true] {
        let store = store_of(&schema, prepared);
        for returned in [Some(9), None] {
            let error = store
                .project("orders", |tx, offset| {
                    apply(tx, offset)?;
                    tx.batch_execute("SELECT 1 / 0").unwrap_err();
                    Ok(returned)
                })
                .unwrap_err();
            let told = chain(&error);
            assert!(
                !error.is_transient() && told.starts_with("apply failed: projection"),
                "{told}"
            );
            assert_eq!(store.find("orders").unwrap(), None);
        }
        // In a savepoint it is nobody's business.
        let skipping = |tx: &mut Transaction<'_>, offset| {
            let mut savepoint = tx.transaction()?;
            savepoint.batch_execute("SELECT 1 / 0").unwrap_err();
            savepoint.rollback()?;
            apply(tx, offset)
        };
        assert_eq!(store.project("orders", skipping).unwrap(), Some(1));
        assert!(store.delete("orders").unwrap());
    }
    assert_eq!(applied(&mut schema.client()), [1, 1]);
}

#[test]
fn a_panic_undoes_the_batch_and_the_only_connection_serves_the_next_caller() {
    let schema = with_read_model();
    for prepared in [false, true] {
        let store = store_of(&schema, prepared);
        for _ in 0..3 {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                store.project("orders", |tx, offset| {
                    apply(tx, offset)?;
                    std::panic::resume_unwind(Box::new("on purpose"))
                })
            }));
            assert!(panicked.is_err());
            assert_eq!(store.find("orders").unwrap(), None);
        }
        assert_eq!(store.project("orders", apply).unwrap(), Some(1));
        assert!(store.delete("orders").unwrap());
    }
    assert_eq!(applied(&mut schema.client()), [1, 1]);
}

#[test]
fn a_closure_that_ends_its_own_connection_is_given_up_after_three_times() {
    let schema = with_read_model();
    let store = store_of(&schema, true);
    let mut runs = 0;
    let error = store
        .project("orders", |tx, offset| {
            runs += 1;
            apply(tx, offset)?;
            tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")?;
            Ok(Some(offset + 1))
        })
        .unwrap_err();
    assert_eq!(runs, 3);
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert_eq!(store.project("orders", apply).unwrap(), Some(1));
    assert_eq!(applied(&mut schema.client()), [1]);
}

#[test]
fn what_the_server_undoes_because_of_others_starts_over() {
    let schema = with_read_model();
    schema.client().batch_execute("CREATE TABLE rows AS VALUES (1), (2)").unwrap();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .connect(&format!(
            "{} options='-c search_path={}'",
            harness::server().params(),
            schema.name
        ))
        .unwrap();
    // Both hold one row before either wants the other's: a deadlock. Without the wait the loser might
    // lock its row again before the winner has woken up: another deadlock.
    let (meet, runs, done) = (Barrier::new(2), AtomicUsize::new(0), AtomicUsize::new(0));
    let project_in_order = |projection: &str, first: i32, second: i32| {
        let mut is_first_run = true;
        let outcome = store.project(projection, |tx, offset| {
            runs.fetch_add(1, Ordering::SeqCst);
            if !is_first_run {
                wait_until("the winner has committed", || done.load(Ordering::SeqCst) == 1);
            }
            let sql = "SELECT FROM rows WHERE column1 = $1 FOR UPDATE";
            tx.execute(sql, &[&first])?;
            if std::mem::take(&mut is_first_run) {
                meet.wait();
            }
            tx.execute(sql, &[&second])?;
            apply(tx, offset)
        });
        done.fetch_add(1, Ordering::SeqCst);
        outcome
    };
    thread::scope(|scope| {
        let one = scope.spawn(|| project_in_order("one", 1, 2));
        let other = scope.spawn(|| project_in_order("other", 2, 1));
        assert_eq!(one.join().unwrap().unwrap(), Some(1));
        assert_eq!(other.join().unwrap().unwrap(), Some(1));
    });
    assert_eq!(runs.into_inner(), 3);

    // And a serialization failure, whatever the closure makes of its error.
    let mut failures = 2;
    let outcome = store.project("serialized", |tx, offset| {
        if failures > 0 {
            failures -= 1;
            let failed = tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$");
            return Err(Error::backend("apply", failed.unwrap_err()));
        }
        apply(tx, offset)
    });
    assert_eq!((outcome.unwrap(), failures), (Some(1), 0));
    assert_eq!(applied(&mut schema.client()), [1, 1, 1]);
}

#[test]
fn another_worker_is_waited_for_or_not() {
    let schema = with_read_model();
    let store = &schema.store;
    for row_is_there in [true, false] {
        if row_is_there {
            store.save("orders", 5).unwrap();
        }
        let mut client = schema.client();
        let mut tx = client.transaction().unwrap();
        let from = store.in_transaction(&mut tx).lock("orders").unwrap();
        let taken = store.try_project("orders", |_, _| unreachable!("another worker has it"));
        assert_eq!(taken.unwrap(), Batch::Taken);
        thread::scope(|scope| {
            let waits = scope.spawn(|| store.project("orders", |_, offset| Ok(Some(offset + 1))));
            wait_for_a_waiter(&mut schema.client(), "projection_checkpoints");
            store.in_transaction(&mut tx).save("orders", from + 1).unwrap();
            tx.commit().unwrap();
            assert_eq!(waits.join().unwrap().unwrap(), Some(from + 2));
        });
        assert_eq!(store.try_project("free", |_, _| Ok(None)).unwrap(), Batch::NothingNew);
        store.delete("orders").unwrap();
    }
}

#[test]
fn of_many_threads_each_applies_what_the_others_have_not() {
    const EVENTS: i64 = 400;
    let schema = with_read_model();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .connect(&format!(
            "{} options='-c search_path={}'",
            harness::server().params(),
            schema.name
        ))
        .unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let up_to_the_end = |tx: &mut Transaction<'_>, offset| {
                    if offset < EVENTS { apply(tx, offset) } else { Ok(None) }
                };
                while store.project("orders", up_to_the_end).unwrap().is_some() {}
            });
        }
    });
    assert_eq!(applied(&mut schema.client()), (1..=EVENTS).collect::<Vec<_>>());
}

#[test]
fn an_error_names_the_step_and_the_projection() {
    let schema = with_read_model();
    let store = store_of(&schema, true);
    schema
        .client()
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE 'not today'; END $$;
             CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON applied DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION refuse();
             ALTER TABLE projection_checkpoints ADD CHECK (\"offset\" < 9);",
        )
        .unwrap();
    let table = format!("table \"{}\".\"projection_checkpoints\"", schema.name);
    let told = chain(&store.project("orders", apply).unwrap_err());
    assert!(
        told.starts_with(&format!("commit failed: projection \"orders\" in {table}: ")),
        "{told}"
    );
    assert!(told.contains("not today"), "{told}");
    let told = chain(&store.project("orders", |_, _| Ok(Some(9))).unwrap_err());
    assert!(
        told.starts_with(&format!("save failed: projection \"orders\" in {table}: ")),
        "{told}"
    );
    schema.client().batch_execute("DROP TABLE projection_checkpoints").unwrap();
    let told = chain(&store.project("orders", apply).unwrap_err());
    assert!(
        told.starts_with(&format!("lock failed: projection \"orders\" in {table}, ")),
        "{told}"
    );
}

#[test]
fn prepared_statements_that_are_forgotten_are_prepared_anew() {
    let schema = with_read_model();
    let store = store_of(&schema, true);
    let kept = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%checkpoints%'";
    let mut expected = 0;
    for change in [
        "SELECT",
        "DISCARD ALL",
        "DEALLOCATE ALL",
        "ALTER TABLE projection_checkpoints ADD COLUMN note text",
        "ALTER TABLE projection_checkpoints ALTER COLUMN updated_at SET DEFAULT now()",
        "DROP TABLE projection_checkpoints; CREATE TABLE projection_checkpoints (
             note text, updated_at timestamptz NOT NULL DEFAULT now(),
             \"offset\" bigint NOT NULL, projection_name text PRIMARY KEY)",
    ] {
        let change = change
            .replace("projection_checkpoints", &format!("{}.projection_checkpoints", schema.name));
        let mut client = store.connection().unwrap();
        client.batch_execute(&change).unwrap();
        // The caller's own setting is gone with all others.
        client.batch_execute(&format!("SET search_path = {}", schema.name)).unwrap();
        drop(client);
        expected = store.get("orders").unwrap() + 1;
        assert_eq!(store.project("orders", apply).unwrap(), Some(expected), "{change}");
        let statements: i64 = store.connection().unwrap().query_one(kept, &[]).unwrap().get(0);
        assert!(statements >= 2, "{change}: {statements}");
    }
    assert_eq!(expected, 1, "the table was made anew");
}

#[test]
fn a_commit_that_was_not_answered_is_looked_for_and_not_repeated() {
    let schema = with_read_model();
    let proxy = Proxy::to(harness::server().port());
    let store = store_at(&proxy.params(), &schema, false);
    let mut runs = 0;
    for cut in [harness::Cut::BeforeTheRequest, harness::Cut::BeforeTheAnswer] {
        proxy.cut("COMMIT", cut);
        let outcome = store.project("orders", |tx, offset| {
            runs += 1;
            apply(tx, offset)
        });
        outcome.unwrap().unwrap();
    }
    // The first COMMIT never came, and its batch started over. The second one was done.
    assert_eq!(runs, 3);
    assert_eq!(applied(&mut schema.client()), [1, 2]);
}

#[test]
fn a_batch_in_doubt_that_others_have_gone_beyond_is_committed() {
    let schema = with_read_model();
    let proxy = Proxy::to(harness::server().port());
    let store = store_at(&proxy.params(), &schema, false);
    schema.store.save("orders", 1).unwrap();
    let mut runs = 0;
    thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        // It waits for the row, gets it as soon as the COMMIT is done, and goes on from there.
        let rival = scope.spawn(|| {
            let told = told;
            told.recv().unwrap();
            schema.store.project("orders", |_, offset| Ok(Some(offset + 10))).unwrap()
        });
        proxy.cut("COMMIT", harness::Cut::BeforeTheAnswer);
        let ours = store.project("orders", |tx, offset| {
            runs += 1;
            if runs == 1 {
                tell.send(()).unwrap();
                wait_for_a_waiter(&mut schema.client(), "FOR UPDATE");
            }
            apply(tx, offset)
        });
        assert_eq!(ours.unwrap(), Some(2));
        assert_eq!(rival.join().unwrap(), Some(12));
    });
    assert_eq!(runs, 1);
    assert_eq!(applied(&mut schema.client()), [2]);
}

#[test]
fn a_long_closure_does_not_use_up_the_patience_that_a_loss_needs() {
    const PATIENCE: Duration = Duration::from_millis(500);
    let schema = with_read_model();
    let proxy = Proxy::to(harness::server().port());
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .connection_timeout(PATIENCE)
        .connect(&format!("{} options='-c search_path={}'", proxy.params(), schema.name))
        .unwrap();
    proxy.cut("COMMIT", harness::Cut::BeforeTheAnswer);
    let outcome = store.project("orders", |tx, offset| {
        let begun = std::time::Instant::now();
        wait_until("more time has passed than it may try again", || begun.elapsed() > PATIENCE * 2);
        apply(tx, offset)
    });
    assert_eq!(outcome.unwrap(), Some(1));
    assert_eq!(applied(&mut schema.client()), [1]);
    assert_eq!(
        sql_state(
            &schema
                .store
                .project("orders", |tx, _| {
                    tx.batch_execute("SELECT 1 / 0")?;
                    Ok(None)
                })
                .unwrap_err()
        )
        .as_deref(),
        Some("22012")
    );
}

/// The save comes upon a row that another transaction has created, and the connection is lost before it is known
/// whether the transaction has been ended.
#[test]
fn a_rival_that_creates_the_row_is_nothing_to_the_caller_even_if_the_connection_is_lost_then() {
    let schema = with_read_model();
    let proxy = Proxy::to(harness::server().port());
    let store = store_at(&proxy.params(), &schema, false);
    let mut from = Vec::new();
    let outcome = store.project("orders", |tx, offset| {
        if from.is_empty() {
            schema.store.save("orders", 10).unwrap();
            proxy.cut("SELECT\0", Cut::BeforeTheRequest);
        }
        from.push(offset);
        apply(tx, offset)
    });
    assert_eq!(outcome.unwrap(), Some(11));
    assert!(!proxy.disarm());
    assert_eq!(from, [0, 10]);
    assert_eq!(applied(&mut schema.client()), [11]);
}
