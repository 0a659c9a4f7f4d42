//! A projection's name and its offsets, changed under workers that run.

use std::thread;
use std::time::{Duration, SystemTime};

use checkpoint_store::{CheckpointStore, Health, HealthCheck};

use super::{GUIDE, OPERATIONS, append, apply_ten, each_event_counts_once, number, sql_with};
use super::{store_and_stream, until_nothing_is_new};
use crate::harness::{sql_state, wait_for_a_waiter};

/// Workers under the old name run, the SQL is run, and each of them ends with the same error.
fn under_workers(sql: &str) -> (checkpoint_store::PostgresCheckpointStore, super::Client) {
    let (store, mut client) = store_and_stream();
    append(&mut client, 20_000, "i % 30", "i");
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let store = store.clone();
            thread::spawn(move || {
                loop {
                    if let Err(error) = store.project("orders", apply_ten) {
                        return error;
                    }
                }
            })
        })
        .collect();
    assert!(store.wait_for("orders", 200, Duration::from_secs(60)).unwrap());
    client.batch_execute(sql).unwrap();
    append(&mut client, 1_000, "i % 30", "i");
    for worker in workers {
        let error = worker.join().unwrap();
        assert_eq!(sql_state(&error).as_deref(), Some("23514"), "{error:?}");
        assert!(!error.is_transient(), "{error:?}");
    }
    for outcome in [store.save("orders", 1), store.advance("orders", 0, 1)] {
        assert_eq!(sql_state(&outcome.unwrap_err()).as_deref(), Some("23514"));
    }
    assert_eq!(store.find("orders").unwrap(), None);
    store.migrate().unwrap(); // it is still a table for checkpoints
    (store, client)
}

#[test]
fn a_projection_is_renamed_while_its_workers_run() {
    let (store, mut client) = under_workers(&sql_with(GUIDE, "SET projection_name"));
    let renamed_at = store.get("sales").unwrap();
    assert!((200..21_000).contains(&renamed_at), "{renamed_at}");
    until_nothing_is_new(|| store.project("sales", apply_ten));
    assert_eq!(store.get("sales").unwrap(), 21_000);
    each_event_counts_once(&mut client);
}

#[test]
fn a_projection_is_removed_while_its_workers_run() {
    let rename = sql_with(GUIDE, "SET projection_name");
    let (constraint, _) = rename.split_once("UPDATE").unwrap();
    let delete =
        "DELETE FROM public.projection_checkpoints WHERE projection_name = 'orders'; COMMIT";
    let (_, mut client) = under_workers(&format!("{constraint}{delete}"));
    let read = number(&mut client, "SELECT sum(total)::bigint FROM order_totals");
    let all = number(&mut client, "SELECT sum(amount)::bigint FROM events");
    assert!(read < all, "no worker has begun anew");
}

#[test]
fn ids_that_begin_anew_are_applied_if_the_sequence_was_set_beyond_the_checkpoints() {
    for is_set in [true, false] {
        let (store, mut client) = store_and_stream();
        append(&mut client, 200, "i % 30", "i");
        until_nothing_is_new(|| store.project("orders", apply_ten));
        client.batch_execute("TRUNCATE events RESTART IDENTITY; TRUNCATE order_totals").unwrap();
        if is_set {
            client.batch_execute(&sql_with(GUIDE, "setval")).unwrap();
        }
        let health = |head| {
            let status = store.find("orders").unwrap().unwrap().status(head);
            HealthCheck::new().assess(&status, SystemTime::now())
        };
        let head = append(&mut client, 150, "i % 30", "i");
        assert_eq!(
            health(head),
            if is_set { Health::Lagging { lag: 150 } } else { Health::AheadOfHead { by: 50 } }
        );
        // The query of the guide says the same, as long as the stream is behind.
        let lag =
            client.query_one(&sql_with(OPERATIONS, "AS lag"), &[]).unwrap().get::<_, i64>("lag");
        assert_eq!(lag, if is_set { 150 } else { -50 });
        let head = append(&mut client, 50, "i % 30", "i");
        until_nothing_is_new(|| store.project("orders", apply_ten));
        assert_eq!(health(head), Health::CaughtUp, "whether or not events were lost");
        if is_set {
            each_event_counts_once(&mut client);
        } else {
            assert_eq!(
                number(&mut client, "SELECT count(*) FROM order_totals"),
                0,
                "all 200 are lost"
            );
        }
    }
}

#[test]
fn a_checkpoint_is_moved_in_psql_under_the_lock() {
    let (store, mut client) = store_and_stream();
    append(&mut client, 50, "i", "i");
    store.project("orders", apply_ten).unwrap();
    let by_hand = sql_with(OPERATIONS, "SET \"offset\" = 41");
    let (by_hand, _) = by_hand.split_once("DELETE").unwrap();
    let mut other = store.connection().unwrap();
    let mut worker = other.transaction().unwrap();
    assert_eq!(store.in_transaction(&mut worker).lock("orders").unwrap(), 10);
    thread::scope(|scope| {
        let moved = scope.spawn(|| client.batch_execute(by_hand));
        let mut observer = store.connection().unwrap();
        wait_for_a_waiter(&mut observer, "FOR UPDATE");
        store.in_transaction(&mut worker).save("orders", 20).unwrap();
        worker.commit().unwrap();
        moved.join().unwrap().unwrap();
    });
    assert_eq!(store.get("orders").unwrap(), 41);
}
