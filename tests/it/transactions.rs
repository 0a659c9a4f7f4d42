//! The caller's own transaction: what commits, what is rolled back, and what a failed statement
//! does to both.

use checkpoint_store::{CheckpointStore, Error};

use crate::harness::Schema;

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
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let began: std::time::SystemTime = tx.query_one("SELECT now()", &[]).unwrap().get(0);
    tx.execute("SELECT pg_sleep(0.01)", &[]).unwrap();
    schema.store.in_transaction(&mut tx).save("totals", 1).unwrap();
    tx.commit().unwrap();
    let saved = schema.store.find("totals").unwrap().unwrap().updated_at;
    assert!(saved.duration_since(began).unwrap().as_millis() >= 10);
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
        crate::harness::wait_until("the rival waits", || {
            let query = "SELECT count(*) FROM pg_stat_activity, pg_locks
                         WHERE pg_locks.pid = pg_stat_activity.pid AND NOT granted
                           AND query LIKE '%' || $1 || '%'";
            observer.query_one(query, &[&schema.name]).unwrap().get::<_, i64>(0) == 1
        });
        let at: std::time::SystemTime =
            observer.query_one("SELECT clock_timestamp()", &[]).unwrap().get(0);
        tx.commit().unwrap();
        rival.join().unwrap().unwrap();
        assert!(schema.store.find("totals").unwrap().unwrap().updated_at > at);
    });
}
