//! The mistakes that a worker written by hand can make, each tried on `project`, which cannot.

use checkpoint_store::{CheckpointStore, Error, Result};

use super::stage::{Stage, apply, insert, process_id};
use crate::harness::{end_backend, sql_state, wait_for_a_waiter};

/// A worker that keeps one connection for ever stops with it.
#[test]
fn no_connection_is_kept_that_could_be_lost_for_ever() {
    let stage = Stage::new();
    let store = stage.store();
    let mut admin = stage.client();
    for _ in 0..10 {
        let mut pid = 0;
        let committed = store.project("orders", |tx, offset| {
            pid = process_id(tx);
            apply(tx, offset)
        });
        assert!(committed.unwrap().is_some());
        end_backend(&mut admin, pid);
    }
    let (offset, applied) = stage.truth();
    assert_eq!(applied, (1..=offset.unwrap()).collect::<Vec<_>>());
}

/// A worker that does not roll back after an error has its next save in a transaction that is
/// aborted, or commits with it what has failed.
#[test]
fn what_a_failed_batch_has_done_is_not_there_for_the_next_one() {
    let stage = Stage::new();
    let store = stage.store();
    for _ in 0..3 {
        let error = store
            .project("orders", |tx, offset| {
                insert(tx, offset, offset + 1)?;
                Err(Error::backend("apply", "it fails after its statement"))
            })
            .unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "apply", .. }), "{error:?}");
    }
    let committed = store.project("orders", |tx, offset| {
        let seen = tx.query_one("SELECT count(*) FROM applied", &[])?;
        assert_eq!(seen.get::<_, i64>(0), 0);
        apply(tx, offset)
    });
    assert_eq!(committed.unwrap(), Some(1));
    assert_eq!(stage.truth(), (Some(1), vec![1]));
}

/// A worker that saves first, and then runs a statement that fails, has an `Ok` from its commit.
#[test]
fn a_save_that_comes_first_is_not_taken_for_one_that_is_committed() {
    let stage = Stage::new();
    let store = stage.store();
    let error = store
        .project("orders", |tx, offset| {
            store.in_transaction(tx).save("orders", offset + 1)?;
            let _ = tx.execute("INSERT INTO applied VALUES (1 / 0)", &[]);
            Ok(Some(offset + 1))
        })
        .unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "apply", .. }), "{error:?}");
    assert_eq!(stage.truth(), (None, vec![]));
}

/// A worker that goes on after a failed statement skips its event.
#[test]
fn an_event_whose_statement_has_failed_is_not_skipped() {
    let stage = Stage::new();
    let store = stage.store();
    let apply_or_go_on = |swallow: bool| {
        store.project("orders", |tx, offset| {
            let sql = if swallow { "SELECT 1 / 0" } else { "SELECT" };
            let _ = tx.batch_execute(sql);
            let _ = insert(tx, offset, offset + 1);
            Ok(Some(offset + 1))
        })
    };
    assert_eq!(apply_or_go_on(false).unwrap(), Some(1));
    apply_or_go_on(true).unwrap_err();
    assert_eq!(apply_or_go_on(false).unwrap(), Some(2));
    assert_eq!(stage.truth(), (Some(2), vec![1, 2]));
}

/// A worker that forgets its commit applies the same batch for ever, and never knows.
#[test]
fn what_has_come_back_as_committed_is_seen_by_others() {
    let stage = Stage::new();
    let store = stage.store();
    for _ in 0..5 {
        let committed = store.project("orders", apply).unwrap();
        let (offset, applied) = stage.truth();
        assert_eq!((committed, applied.last().copied()), (offset, offset));
    }
}

/// A worker that tries everything again never says that something is wrong.
#[test]
fn what_would_fail_again_is_not_tried_again() {
    let stage = Stage::new();
    let store = stage.store();
    let failures = [
        ("SELECT 1 / 0", "22012"),
        ("INSERT INTO nowhere VALUES (1)", "42P01"),
        ("DO $$ BEGIN RAISE unique_violation; END $$", "23505"),
        // Passing, but not undone by others: the caller says when to try again.
        ("DO $$ BEGIN RAISE SQLSTATE '53200'; END $$", "53200"),
        ("DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$", "55P03"),
        ("SET LOCAL statement_timeout = '1ms'; SELECT pg_sleep(60)", "57014"),
        // On a connection that lives, so it is not a lost one.
        ("DO $$ BEGIN RAISE SQLSTATE '08006'; END $$", "08006"),
        ("DO $$ BEGIN RAISE SQLSTATE '57P01'; END $$", "57P01"),
    ];
    for (sql, code) in failures {
        let mut runs = 0;
        let error = store
            .project("orders", |tx, offset| {
                runs += 1;
                insert(tx, offset, offset + 1)?;
                tx.batch_execute(sql)?;
                Ok(Some(offset + 1))
            })
            .unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some(code));
        assert_eq!(runs, 1, "{code}");
    }
    assert_eq!(stage.truth(), (None, vec![]));
    stage.serves_the_next_caller(&store);
}

/// A worker that acts after its save does so beyond the checkpoint, or moves it.
#[test]
fn the_save_is_what_comes_last_and_it_is_the_returned_offset() {
    let stage = Stage::new();
    stage
        .client()
        .batch_execute(
            "CREATE TABLE log (position bigint GENERATED ALWAYS AS IDENTITY, what text);
             CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO log (what) VALUES (TG_ARGV[0]); RETURN NULL; END $$;
             CREATE TRIGGER log AFTER INSERT ON applied EXECUTE FUNCTION log('apply');
             CREATE TRIGGER log AFTER UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION log('save');",
        )
        .unwrap();
    let store = stage.store();
    store.save("orders", 1).unwrap();
    let committed = store.project("orders", |tx, offset| {
        store.in_transaction(tx).save("orders", 99)?;
        insert(tx, offset, offset + 1)?;
        Ok(Some(offset + 1))
    });
    assert_eq!(committed.unwrap(), Some(2));
    assert_eq!(stage.truth(), (Some(2), vec![2]));
    let rows = stage.client().query("SELECT what FROM log ORDER BY position", &[]).unwrap();
    let log: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(log, ["save", "apply", "save"], "the closure's, and then the store's");
}

/// A worker that reads the offset before it has the projection goes on from one that is out of
/// date.
#[test]
fn the_offset_is_the_one_under_the_lock() {
    let stage = Stage::new();
    let store = stage.store();
    store.save("orders", 1).unwrap();
    let mut holder = stage.client();
    let mut held = holder.transaction().unwrap();
    stage.schema.store.in_transaction(&mut held).save("orders", 10).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            store.project("orders", |tx, offset| {
                assert_eq!(offset, 10);
                apply(tx, offset)
            })
        });
        wait_for_a_waiter(&mut stage.client(), &stage.schema.name);
        held.commit().unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), Some(12));
    });
}

/// A worker that tries again from the offset that it has in a variable does a batch twice.
#[test]
fn another_try_begins_from_what_is_stored_then() {
    let stage = Stage::new();
    let store = stage.store();
    let mut admin = stage.client();
    let mut seen = Vec::new();
    let committed = store.project("orders", |tx, offset| -> Result<_> {
        seen.push(offset);
        if seen.len() == 1 {
            end_backend(&mut admin, process_id(tx));
            stage.schema.store.save("orders", 6)?;
        }
        apply(tx, offset)
    });
    assert_eq!(committed.unwrap(), Some(7));
    assert_eq!(seen, [0, 6]);
}
