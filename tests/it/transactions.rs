//! The caller's own transaction: what commits, what is rolled back, and what a failed statement
//! does to both.

use std::time::SystemTime;

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{CheckpointStore, Error, InTransaction, Result};

use crate::harness::{Schema, chain, wait_for_a_waiter};

fn with_read_model() -> Schema {
    let schema = Schema::new();
    schema.client().batch_execute("CREATE TABLE totals (amount bigint)").unwrap();
    schema
}

fn total(schema: &Schema) -> i64 {
    let query = "SELECT COALESCE(sum(amount), 0)::bigint FROM totals";
    schema.client().query_one(query, &[]).unwrap().get(0)
}

#[test]
fn read_model_and_checkpoint_commit_together() {
    let schema = with_read_model();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    tx.execute("INSERT INTO totals VALUES (10)", &[]).unwrap();
    schema.store.in_transaction(&mut tx).save("totals", 1).unwrap();
    assert_eq!(schema.store.get("totals").unwrap(), 0, "nobody sees it before the commit");
    assert_eq!(schema.store.in_transaction(&mut tx).get("totals").unwrap(), 1);
    tx.commit().unwrap();
    assert_eq!((schema.store.get("totals").unwrap(), total(&schema)), (1, 10));
}

#[test]
fn read_model_and_checkpoint_are_rolled_back_together() {
    let schema = with_read_model();
    schema.store.save("totals", 7).unwrap();
    let mut client = schema.client();
    for by_dropping in [true, false] {
        let mut tx = client.transaction().unwrap();
        tx.execute("INSERT INTO totals VALUES (10)", &[]).unwrap();
        let mut here = schema.store.in_transaction(&mut tx);
        here.save("totals", 8).unwrap();
        here.save("other", 8).unwrap();
        if by_dropping {
            drop(tx);
        } else {
            tx.rollback().unwrap();
        }
        assert_eq!((schema.store.get("totals").unwrap(), total(&schema)), (7, 0));
        assert_eq!(schema.store.find("other").unwrap(), None);
    }
}

#[test]
fn a_savepoint_takes_its_checkpoint_back_and_leaves_the_one_before() {
    let schema = with_read_model();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    schema.store.in_transaction(&mut tx).save("totals", 1).unwrap();
    let mut savepoint = tx.transaction().unwrap();
    savepoint.execute("INSERT INTO totals VALUES (10)", &[]).unwrap();
    schema.store.in_transaction(&mut savepoint).save("totals", 2).unwrap();
    savepoint.rollback().unwrap();
    assert_eq!(schema.store.in_transaction(&mut tx).get("totals").unwrap(), 1);
    tx.commit().unwrap();
    assert_eq!((schema.store.get("totals").unwrap(), total(&schema)), (1, 0));
}

#[test]
fn a_failed_statement_aborts_the_transaction_though_commit_returns_ok() {
    let schema = with_read_model();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    schema.store.in_transaction(&mut tx).save("totals", 1).unwrap();
    tx.execute("INSERT INTO totals VALUES ('not a number'::text::bigint)", &[]).unwrap_err();
    tx.commit().expect("the postgres crate does not tell");
    assert_eq!(schema.store.find("totals").unwrap(), None, "nothing was stored");
}

#[test]
fn a_save_after_a_failed_statement_is_an_error() {
    let schema = with_read_model();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    tx.execute("INSERT INTO nowhere VALUES (1)", &[]).unwrap_err();
    let error = schema.store.in_transaction(&mut tx).save("totals", 1).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert_eq!(crate::harness::sql_state(&error).as_deref(), Some("25P02"));
}

#[test]
fn bad_input_leaves_the_transaction_usable() {
    let schema = with_read_model();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let mut here = schema.store.in_transaction(&mut tx);
    here.save("totals", 3).unwrap();
    let too_long = "x".repeat(1_025);
    for name in ["", "nul\0", &too_long] {
        let refusals = [
            here.find(name).map(drop),
            here.get(name).map(drop),
            here.save(name, 1),
            here.save_many(&[("totals", 4), (name, 1)]),
            here.advance(name, 0, 1),
            here.delete(name).map(drop),
            here.lock(name).map(drop),
            here.try_lock(name).map(drop),
        ];
        for refusal in refusals {
            assert!(matches!(refusal, Err(Error::InvalidProjection { .. })), "{refusal:?}");
        }
    }
    for refusal in [
        here.save("totals", -1),
        here.save_many(&[("totals", 4), ("other", -1)]),
        here.advance("totals", -1, 4),
        here.advance("totals", 3, 2),
    ] {
        assert!(matches!(refusal, Err(Error::InvalidOffset { .. })), "{refusal:?}");
    }
    tx.commit().unwrap();
    assert_eq!(schema.store.get("totals").unwrap(), 3);
}

#[test]
fn a_conflict_leaves_the_transaction_usable() {
    let schema = with_read_model();
    schema.store.save("totals", 5).unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let error = schema.store.in_transaction(&mut tx).advance("totals", 4, 5).unwrap_err();
    assert!(matches!(error, Error::Conflict { expected: 4, found: 5, .. }), "{error:?}");
    schema.store.in_transaction(&mut tx).advance("totals", 5, 6).unwrap();
    tx.commit().unwrap();
    assert_eq!(schema.store.get("totals").unwrap(), 6);
}

#[test]
fn every_operation_works_in_a_transaction() {
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let mut here = schema.store.in_transaction(&mut tx);
    assert_eq!(here.find("orders").unwrap(), None);
    assert_eq!(here.get("orders").unwrap(), 0);
    here.advance("orders", 0, 5).unwrap();
    here.save_many(&[("orders", 6), ("twice", 1), ("twice", 2)]).unwrap();
    here.save_many(&[]).unwrap();
    assert_eq!(here.find("orders").unwrap().unwrap().offset, 6);
    assert_eq!(here.get("twice").unwrap(), 2);
    assert!(here.delete("twice").unwrap());
    assert!(!here.delete("twice").unwrap());
    tx.commit().unwrap();
    let all = schema.store.all().unwrap();
    assert_eq!(
        all.iter().map(|c| (c.projection.as_str(), c.offset)).collect::<Vec<_>>(),
        [("orders", 6)]
    );
}

#[test]
fn the_time_of_a_save_is_that_of_the_save_not_of_the_transaction() {
    type Save = fn(&mut InTransaction<'_, '_>, i64) -> Result<()>;
    let saves: [(&str, Save); 6] = [
        ("save, new", |here, offset| here.save("save", offset)),
        ("save", |here, offset| here.save("save", offset)),
        ("save_many, new", |here, offset| here.save_many(&[("many", offset)])),
        ("save_many", |here, offset| here.save_many(&[("many", offset)])),
        ("advance, new", |here, offset| here.advance("advance", 0, offset)),
        ("advance", |here, offset| here.advance("advance", offset - 1, offset)),
    ];
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let now = |tx: &mut Transaction<'_>| -> SystemTime {
        tx.query_one("SELECT clock_timestamp()", &[]).unwrap().get(0)
    };
    for (offset, (operation, save)) in (1..).zip(saves) {
        let before = now(&mut tx);
        save(&mut schema.store.in_transaction(&mut tx), offset).unwrap();
        let sql = "SELECT max(updated_at) FROM projection_checkpoints";
        let stored: SystemTime = tx.query_one(sql, &[]).unwrap().get(0);
        assert!(before <= stored && stored <= now(&mut tx), "{operation}: {before:?} {stored:?}");
    }
    let before = now(&mut tx);
    schema.store.in_transaction(&mut tx).lock("lock").unwrap();
    let locked = schema.store.in_transaction(&mut tx).find("lock").unwrap().unwrap();
    assert!(before <= locked.updated_at, "a lock that creates the checkpoint");
}

#[test]
fn a_save_that_waited_for_a_rival_is_as_late_as_it_ended() {
    let schema = Schema::new();
    schema.store.save("totals", 1).unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    schema.store.in_transaction(&mut tx).save("totals", 2).unwrap();
    let mut observer = schema.client();
    std::thread::scope(|scope| {
        let rival = scope.spawn(|| schema.store.save("totals", 3));
        wait_for_a_waiter(&mut observer, &schema.name);
        let at: std::time::SystemTime =
            observer.query_one("SELECT clock_timestamp()", &[]).unwrap().get(0);
        tx.commit().unwrap();
        rival.join().unwrap().unwrap();
        assert!(schema.store.find("totals").unwrap().unwrap().updated_at > at);
    });
}

/// As a worker's loop sees them: one type of error, and one question to ask of it.
#[test]
fn the_callers_own_failures_become_errors_of_this_crate_through_a_question_mark() {
    let schema = Schema::new();
    let run = |sql: &str| -> Result<()> {
        let mut client = schema.store.connection()?;
        let mut tx = client.transaction()?;
        tx.batch_execute(sql)?;
        schema.store.in_transaction(&mut tx).save("orders", 1)?;
        tx.commit()?;
        Ok(())
    };
    let refused = run("SELECT 1 / 0").unwrap_err();
    assert!(matches!(refused, Error::Backend { operation: "statement", .. }), "{refused:?}");
    assert!(!refused.is_transient() && chain(&refused).contains("division by zero"));

    let lost = run("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
    assert!(matches!(lost, Error::Unavailable { .. }) && lost.is_transient(), "{lost:?}");

    let deadlock = run("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$").unwrap_err();
    assert!(deadlock.is_transient(), "{deadlock:?}");

    run("SELECT").unwrap();
    assert_eq!(schema.store.get("orders").unwrap(), 1);
}

#[test]
fn a_transaction_that_idles_for_too_long_is_unavailable() {
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let pid: i32 = tx.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    tx.batch_execute("SET LOCAL idle_in_transaction_session_timeout = '200ms'").unwrap();
    let mut observer = schema.client();
    crate::harness::wait_until("the server has ended it", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
        observer.query_one(query, &[&pid]).unwrap().get::<_, i64>(0) == 0
    });
    let error = schema.store.in_transaction(&mut tx).save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
}
