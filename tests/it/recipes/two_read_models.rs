//! Two read models that one transaction writes.

use std::thread::{self, sleep};
use std::time::Duration;

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};

use super::{append, each_event_counts_once, number, store_and_stream, until_nothing_is_new};
use crate::harness::{self, sql_state, wait_until};

const BATCH: &str = "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500)";
const SIZES: &str =
    "INSERT INTO order_sizes AS s SELECT amount, count(*) FROM batch GROUP BY amount
    ON CONFLICT (amount) DO UPDATE SET events = s.events + EXCLUDED.events";
const TOTALS: &str =
    "INSERT INTO order_totals AS t SELECT order_id, sum(amount) FROM batch GROUP BY order_id
    ON CONFLICT (order_id) DO UPDATE SET total = t.total + EXCLUDED.total";

fn apply_to_both(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    let sql =
        format!("{BATCH}, sizes AS ({SIZES}), totals AS ({TOTALS}) SELECT max(id) FROM batch");
    Ok(tx.query_one(&sql, &[&offset])?.get(0))
}

/// Every program takes the locks in this order; otherwise two workers may deadlock.
const IN_ORDER: [(&str, &str); 2] = [("order-sizes", SIZES), ("order-totals", TOTALS)];

fn apply_each(store: &PostgresCheckpointStore, client: &mut Client) -> Result<bool> {
    let mut tx = client.transaction()?;
    let mut is_new = false;
    for (name, apply) in IN_ORDER {
        let offset = store.in_transaction(&mut tx).lock(name)?; // its own offset, not the other's
        let sql = format!("{BATCH}, applied AS ({apply}) SELECT max(id) FROM batch");
        if let Some(last) = tx.query_one(&sql, &[&offset])?.get::<_, Option<i64>>(0) {
            store.in_transaction(&mut tx).save(name, last)?;
            is_new = true;
        }
    }
    tx.commit()?;
    Ok(is_new)
}

fn work(store: &PostgresCheckpointStore) -> Result<()> {
    loop {
        match store.connection().and_then(|mut client| apply_each(store, &mut client)) {
            Ok(true) => {}
            Ok(false) => sleep(Duration::from_millis(200)), // nothing new
            Err(error) if error.is_transient() => {
                eprintln!("{}", error.report());
                sleep(Duration::from_secs(1));
            }
            Err(error) => return Err(error),
        }
    }
}

fn with_sizes() -> (PostgresCheckpointStore, Client) {
    let (store, mut client) = store_and_stream();
    client
        .batch_execute(
            "CREATE TABLE order_sizes (amount bigint PRIMARY KEY, events bigint NOT NULL)",
        )
        .unwrap();
    (store, client)
}

#[track_caller]
fn both_are_right(client: &mut Client) {
    each_event_counts_once(client);
    let wrong = "SELECT count(*) FROM order_sizes s
                 FULL JOIN (SELECT amount, count(*) AS events FROM events GROUP BY 1) e
                 USING (amount) WHERE s.events IS DISTINCT FROM e.events";
    assert_eq!(number(client, wrong), 0);
}

/// Empties one read model and sets its checkpoint back, as the guide does.
fn reset(store: &PostgresCheckpointStore, name: &str, table: &str) -> Result<()> {
    let mut client = store.connection()?;
    let mut tx = client.transaction()?;
    store.in_transaction(&mut tx).lock(name)?;
    tx.execute(&format!("DELETE FROM {table}"), &[])?;
    store.in_transaction(&mut tx).save(name, 0)?;
    Ok(tx.commit()?)
}

#[test]
fn one_projection_writes_two_tables_and_both_are_rebuilt_together() {
    let (store, mut client) = with_sizes();
    let head = append(&mut client, 2_000, "i % 30", "i % 7");
    until_nothing_is_new(|| store.project("orders", apply_to_both));
    both_are_right(&mut client);
    reset(&store, "orders", "order_totals").unwrap();
    client.batch_execute("DELETE FROM order_sizes").unwrap();
    until_nothing_is_new(|| store.project("orders", apply_to_both));
    assert_eq!(store.get("orders").unwrap(), head);
    both_are_right(&mut client);
}

/// One worker on the store's own pool, one on a pool of the caller's.
#[test]
fn one_of_two_projections_is_reset_while_workers_apply_both_in_one_transaction() {
    let (store, mut client) = with_sizes();
    let database: String = client.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
    let pool = harness::pool(&harness::server().url(&database), 2, Duration::from_secs(30));
    let on_the_callers_pool = PostgresCheckpointStore::new(pool);
    let workers = [store.clone(), on_the_callers_pool, store.clone()]
        .map(|store| thread::spawn(move || work(&store)));
    let mut head = 0;
    for round in 0..6 {
        head = append(&mut client, 2_000, "i % 30", "i % 7");
        wait_until("they are at work", || {
            IN_ORDER.iter().all(|(name, _)| store.get(name).unwrap() > head - 1_900)
        });
        let (name, table) = if round % 2 == 0 {
            ("order-totals", "order_totals")
        } else {
            ("order-sizes", "order_sizes")
        };
        reset(&store, name, table).unwrap();
        if round % 3 == 1 {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database() AND pid <> pg_backend_pid()";
            client.execute(end, &[]).unwrap();
        }
    }
    for (name, _) in IN_ORDER {
        wait_until("both are at the end", || store.get(name).unwrap() == head);
    }
    both_are_right(&mut client);
    client.batch_execute("DROP TABLE order_sizes").unwrap();
    for worker in workers {
        let error: Error = worker.join().unwrap().unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("42P01"), "{error:?}");
    }
}
