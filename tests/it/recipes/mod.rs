//! The code of the guide, tried as it stands there: each piece of it is a piece of these files.

mod names;
mod operating;
mod own_pool;
mod two_read_models;
mod waking;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{Batch, CheckpointStore, Error, PostgresCheckpointStore, Result};

use crate::documentation::blocks;
use crate::harness::{self, wait_for_a_waiter};

const GUIDE: &str = include_str!("../../../src/guide/recipes.md");
const OPERATIONS: &str = include_str!("../../../src/guide/operations.md");

/// The SQL of a page that has this text in it.
fn sql_with(page: &str, text: &str) -> String {
    let found = blocks(page, "sql").into_iter().find(|block| block.contains(text));
    found.unwrap_or_else(|| panic!("no SQL has `{text}` in it"))
}

/// A store, its database with the guide's stream of events in it, and a connection of its own.
fn store_and_stream() -> (PostgresCheckpointStore, Client) {
    let database = harness::fresh_database();
    let store = PostgresCheckpointStore::connect(&database).unwrap();
    store.migrate().unwrap();
    let mut client = harness::client(&database);
    client.batch_execute(&blocks(GUIDE, "sql")[0]).unwrap();
    client
        .batch_execute(
            "CREATE TABLE order_totals (order_id bigint PRIMARY KEY, total numeric NOT NULL)",
        )
        .unwrap();
    (store, client)
}

/// Appends events, and returns the id of the last one.
fn append(client: &mut Client, events: i64, order: &str, amount: &str) -> i64 {
    let sql = format!(
        "WITH appended AS (INSERT INTO events (order_id, amount)
                           SELECT {order}, {amount} FROM generate_series(1, $1::bigint) i RETURNING id)
         SELECT max(id) FROM appended"
    );
    client.query_one(&sql, &[&events]).unwrap().get(0)
}

fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

#[track_caller]
fn each_event_counts_once(client: &mut Client) {
    let wrong = "SELECT count(*) FROM order_totals t
                 FULL JOIN (SELECT order_id, sum(amount) AS total FROM events GROUP BY 1) e
                 USING (order_id) WHERE t.total IS DISTINCT FROM e.total";
    assert_eq!(number(client, wrong), 0);
}

/// Until it is told, or somebody has failed to.
fn until_done(done: &AtomicBool, mut work: impl FnMut()) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done.load(Ordering::Relaxed) && Instant::now() < deadline {
        work();
    }
}

fn until_nothing_is_new(mut project: impl FnMut() -> Result<Option<i64>>) {
    while project().unwrap().is_some() {}
}

#[test]
fn the_code_of_the_guide_is_the_code_that_is_tried() {
    let without_blanks = |text: &str| text.split_whitespace().collect::<String>();
    let tried = without_blanks(
        &[
            include_str!("mod.rs"),
            include_str!("names.rs"),
            include_str!("operating.rs"),
            include_str!("own_pool.rs"),
            include_str!("two_read_models.rs"),
            include_str!("waking.rs"),
        ]
        .concat(),
    );
    let mut pieces = Vec::new();
    for page in [GUIDE, OPERATIONS] {
        for language in ["rust,no_run", "rust"] {
            pieces.extend(blocks(page, language));
        }
    }
    pieces.retain(|piece| !piece.contains("connect_tls")); // tried in `tls`
    assert_eq!(pieces.len(), 13);
    for piece in pieces {
        let lines = piece.lines().filter(|line| !line.starts_with("use "));
        let piece = lines.collect::<Vec<_>>().join("\n");
        assert!(tried.contains(&without_blanks(&piece)), "{piece}");
    }
}

const LARGE_ORDERS: &str =
    "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500),
         applied AS (INSERT INTO large_orders SELECT id, amount FROM batch WHERE amount >= 1000)
    SELECT max(id) FROM batch";

fn apply_large_orders(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    Ok(tx.query_one(LARGE_ORDERS, &[&offset])?.get(0))
}

#[test]
fn a_projection_of_few_events_checkpoints_what_it_has_read() {
    let (store, mut client) = store_and_stream();
    client.batch_execute("CREATE TABLE large_orders (event bigint, amount bigint)").unwrap();
    append(&mut client, 3, "i", "i * 1000");
    let head = append(&mut client, 1_200, "i", "1");
    until_nothing_is_new(|| store.project("large-orders", apply_large_orders));
    assert_eq!(store.get("large-orders").unwrap(), head, "the last that matched was 3");
    assert_eq!(number(&mut client, "SELECT count(*) FROM large_orders"), 3);
    assert!(store.wait_for("large-orders", head, Duration::ZERO).unwrap());
}

const SEGMENT: &str = "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500),
         applied AS (INSERT INTO order_totals AS t (order_id, total)
                     SELECT order_id, sum(amount) FROM batch WHERE order_id % 4 = $2 GROUP BY order_id
                     ON CONFLICT (order_id) DO UPDATE SET total = t.total + EXCLUDED.total)
    SELECT max(id) FROM batch";

fn project_segment(store: &PostgresCheckpointStore, segment: i64) -> Result<Option<i64>> {
    store.project(&format!("orders/{segment}"), |tx, offset| {
        Ok(tx.query_one(SEGMENT, &[&offset, &segment])?.get(0))
    })
}

fn split(store: &PostgresCheckpointStore) -> Result<()> {
    let mut client = store.connection()?;
    let mut tx = client.transaction()?;
    let offset = store.in_transaction(&mut tx).lock("orders")?;
    let segments = ["orders/0", "orders/1", "orders/2", "orders/3"].map(|name| (name, offset));
    store.in_transaction(&mut tx).save_many(&segments)?;
    Ok(tx.commit()?)
}

fn is_split(tx: &mut Transaction<'_>) -> Result<bool> {
    let sql = "SELECT count(*) > 0 FROM projection_checkpoints WHERE projection_name = 'orders/0'";
    Ok(tx.query_one(sql, &[])?.get(0))
}

/// The worker from before, ten events at a time.
fn apply_unless_split(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    if is_split(tx)? { Ok(None) } else { apply_ten(tx, offset) }
}

fn apply_ten(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    let sql = "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 10),
                    applied AS (INSERT INTO order_totals AS t (order_id, total)
                                SELECT order_id, sum(amount) FROM batch GROUP BY order_id
                                ON CONFLICT (order_id) DO UPDATE SET total = t.total + EXCLUDED.total)
               SELECT max(id) FROM batch";
    Ok(tx.query_one(sql, &[&offset])?.get(0))
}

#[test]
fn a_projection_is_split_into_segments_while_its_worker_runs() {
    let (store, mut client) = store_and_stream();
    let head = append(&mut client, 20_000, "i % 30", "i");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let old_worker = scope.spawn(|| {
            until_done(&done, || {
                store.project("orders", apply_unless_split).unwrap();
            });
        });
        assert!(store.wait_for("orders", 200, Duration::from_secs(60)).unwrap());
        split(&store).unwrap();
        let segments: Vec<_> = (0..4)
            .map(|segment| {
                let store = &store;
                scope.spawn(move || until_nothing_is_new(|| project_segment(store, segment)))
            })
            .collect();
        for segment in segments {
            segment.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        old_worker.join().unwrap();
    });
    let split_at = store.get("orders").unwrap();
    assert!((200..head).contains(&split_at), "{split_at}");
    for segment in 0..4 {
        assert_eq!(store.get(&format!("orders/{segment}")).unwrap(), head);
    }
    each_event_counts_once(&mut client);
}

fn switch(store: &PostgresCheckpointStore, stream_head: i64) -> Result<bool> {
    let has_caught_up = store.wait_for("orders@2", stream_head, Duration::from_secs(60))?;
    if has_caught_up {
        let sql = "CREATE OR REPLACE VIEW order_totals AS SELECT * FROM order_totals_2";
        store.connection()?.batch_execute(sql)?;
    }
    Ok(has_caught_up)
}

#[test]
fn a_read_model_is_rebuilt_beside_the_old_one_and_switched_to() {
    let (store, mut client) = store_and_stream();
    client
        .batch_execute(
            "ALTER TABLE order_totals RENAME TO order_totals_1;
             CREATE TABLE order_totals_2 (LIKE order_totals_1 INCLUDING ALL);
             CREATE VIEW order_totals AS SELECT * FROM order_totals_1",
        )
        .unwrap();
    let head = append(&mut client, 1_000, "i % 7", "i");
    let project = |version: i64, factor: i64| {
        let sql = format!(
            "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 100),
                  applied AS (INSERT INTO order_totals_{version} AS t (order_id, total)
                              SELECT order_id, {factor} * sum(amount) FROM batch GROUP BY order_id
                              ON CONFLICT (order_id) DO UPDATE SET total = t.total + EXCLUDED.total)
             SELECT max(id) FROM batch"
        );
        store.project(&format!("orders@{version}"), |tx, offset| {
            Ok(tx.query_one(&sql, &[&offset])?.get(0))
        })
    };
    until_nothing_is_new(|| project(1, 2)); // the version that is to be mended counts all twice
    let shown = "SELECT sum(total)::bigint FROM order_totals";
    assert_eq!(number(&mut client, shown), 2 * 500_500);
    thread::scope(|scope| {
        let switched = scope.spawn(|| switch(&store, head));
        until_nothing_is_new(|| project(2, 1));
        assert!(switched.join().unwrap().unwrap());
    });
    assert_eq!(number(&mut client, shown), 500_500);
    assert!(store.delete("orders@1").unwrap());
    client.batch_execute("DROP TABLE order_totals_1").unwrap();
}

fn start_at(store: &dyn CheckpointStore, stream_head: i64) -> Result<()> {
    match store.advance("order-mail", 0, stream_head) {
        Err(error) if error.is_conflict() => Ok(()), // it has begun already
        outcome => outcome,
    }
}

#[test]
fn a_projection_that_starts_at_the_head_leaves_out_the_past_and_nothing_else() {
    let (store, mut client) = store_and_stream();
    let head = append(&mut client, 10, "i", "i");
    start_at(&store, head).unwrap();
    assert_eq!(store.get("order-mail").unwrap(), head);
    let head = append(&mut client, 10, "i", "i");
    start_at(&store, head).unwrap(); // the program starts again
    assert_eq!(store.get("order-mail").unwrap(), head - 10, "those ten are to be sent");
}

fn apply_or_put_aside(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    let sql = "SELECT id, order_id, amount FROM events WHERE id > $1 ORDER BY id LIMIT 1";
    let Some(event) = tx.query_opt(sql, &[&offset])? else { return Ok(None) };
    let (id, order, amount): (i64, i64, i64) = (event.get(0), event.get(1), event.get(2));
    let mut savepoint = tx.transaction()?;
    match savepoint.execute("INSERT INTO shares VALUES ($1, 1000 / $2::bigint)", &[&order, &amount])
    {
        Ok(_) => savepoint.commit()?,
        Err(error) if is_about_data(&error) => {
            savepoint.rollback()?;
            tx.execute("INSERT INTO put_aside VALUES ($1, $2)", &[&id, &error.to_string()])?;
        }
        Err(error) => return Err(error.into()), // a deadlock, a lost connection: `project` tries again
    }
    Ok(Some(id))
}

/// Class 22 is bad data, such as a division by zero; class 23 a constraint that does not hold.
fn is_about_data(error: &checkpoint_store::postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code().starts_with("22") || code.code().starts_with("23"))
}

#[test]
fn an_event_that_cannot_be_applied_is_put_aside_and_the_others_are_applied() {
    let (store, mut client) = store_and_stream();
    client
        .batch_execute(
            "CREATE TABLE shares (order_id bigint PRIMARY KEY, share bigint);
             CREATE TABLE put_aside (event bigint, why text)",
        )
        .unwrap();
    let head = append(&mut client, 10, "i % 9", "i - 4"); // the fourth divides by 0, the tenth is a duplicate
    until_nothing_is_new(|| store.project("shares", apply_or_put_aside));
    assert_eq!(store.get("shares").unwrap(), head);
    assert_eq!(number(&mut client, "SELECT count(*) FROM shares"), 8);
    let aside: Vec<i64> = client
        .query("SELECT event FROM put_aside ORDER BY event", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(aside, [4, 10]);
    // What is not about the data holds the projection up, as it should.
    append(&mut client, 1, "50", "1");
    client.batch_execute("DROP TABLE shares").unwrap();
    assert!(matches!(store.project("shares", apply_or_put_aside), Err(Error::Backend { .. })));
    assert_eq!(store.get("shares").unwrap(), head);
}

#[test]
fn a_projection_pauses_while_its_row_is_held_in_psql() {
    let (store, mut client) = store_and_stream();
    store.save("orders", 0).unwrap();
    append(&mut client, 10, "i", "i");
    let pause = sql_with(GUIDE, "look around");
    let (hold, release) = pause.split_once("COMMIT;").unwrap();
    assert_eq!(release.trim(), "");
    client.batch_execute(hold).unwrap();
    let taken = store.try_project("orders", apply_unless_split).unwrap();
    assert_eq!(taken, Batch::Taken);
    thread::scope(|scope| {
        let waits = scope.spawn(|| store.project("orders", apply_unless_split));
        let mut observer = store.connection().unwrap();
        wait_for_a_waiter(&mut observer, "projection_checkpoints");
        assert!(!waits.is_finished());
        client.batch_execute("COMMIT").unwrap();
        assert_eq!(waits.join().unwrap().unwrap(), Some(10));
    });
}

/// `appended` is the offset of the event that this request has just appended.
fn is_up_to_date(store: &dyn CheckpointStore, appended: i64) -> Result<bool> {
    store.wait_for("orders", appended, Duration::from_secs(2))
}

#[test]
fn who_waits_for_the_projection_reads_what_it_has_written() {
    let (store, mut client) = store_and_stream();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            until_done(&done, || {
                store.project("orders", apply_unless_split).unwrap();
                thread::sleep(Duration::from_millis(5));
            });
        });
        for order in 1..=20 {
            let appended = append(&mut client, 1, &order.to_string(), "1");
            assert!(is_up_to_date(&store, appended).unwrap());
            let orders = number(&mut client, "SELECT count(*) FROM order_totals");
            assert_eq!(orders, order);
        }
        done.store(true, Ordering::Relaxed);
    });
    let appended = append(&mut client, 1, "21", "1"); // nobody projects any more
    assert!(!is_up_to_date(&store, appended).unwrap());
}

/// A worker with `get` and `advance` that has read a value of the old read model, and a reset of which
/// it hears nothing. With `lock` it cannot happen: see `locks`.
#[test]
fn a_worker_with_get_and_advance_that_runs_on_during_a_reset_writes_an_old_value_over_the_new_one()
{
    let (store, mut client) = store_and_stream();
    client.batch_execute("CREATE TABLE revenue AS SELECT 410::bigint AS total").unwrap(); // 50 too many
    client
        .batch_execute(
            "INSERT INTO events (order_id, amount) VALUES (1, 100), (2, 120), (3, 140), (4, 100)",
        )
        .unwrap();
    store.save("revenue", 3).unwrap();
    let mut worker = store.connection().unwrap();
    let mut tx = worker.transaction().unwrap();
    let offset = store.in_transaction(&mut tx).get("revenue").unwrap();
    let old: i64 = tx.query_one("SELECT total FROM revenue", &[]).unwrap().get(0);
    // Meanwhile the projection is reset, and rebuilt up to the same offset.
    client.batch_execute("UPDATE revenue SET total = 0").unwrap();
    store.save("revenue", 0).unwrap();
    for _ in 0..3 {
        store
            .project("revenue", |tx, offset| {
                let next = offset + 1;
                let sql =
                    "UPDATE revenue SET total = total + (SELECT amount FROM events WHERE id = $1)";
                tx.execute(sql, &[&next])?;
                Ok(Some(next))
            })
            .unwrap();
    }
    tx.execute("UPDATE revenue SET total = $1::bigint + 100", &[&old]).unwrap();
    store.in_transaction(&mut tx).advance("revenue", offset, 4).unwrap();
    tx.commit().unwrap();
    assert_eq!(number(&mut client, "SELECT total FROM revenue"), 510);
    assert_eq!(number(&mut client, "SELECT sum(amount)::bigint FROM events"), 460);
}
