//! What the documents say, tried: their SQL runs, and the remedy for gaps is one.

use std::path::Path;
use std::process::Command;
use std::thread;

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use crate::harness;

/// The fenced blocks of a language, in the order in which they stand.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let info = line.strip_prefix("```").unwrap_or_default();
        if info.split_whitespace().next() == Some(language) {
            let block: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push(block.join("\n"));
        }
    }
    blocks
}

const README: &str = include_str!("../../README.md");

#[test]
fn the_sql_of_the_readme_runs_and_its_grants_are_enough() {
    let database = harness::fresh_database();
    let mut admin = harness::client(&database);
    admin
        .batch_execute("DROP ROLE IF EXISTS app; CREATE ROLE app LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC")
        .unwrap();
    let mut sql = blocks(README, "sql");
    sql.sort_by_key(|block| !block.contains("CREATE TABLE"));
    assert_eq!(sql.len(), 4);
    for block in sql {
        admin.batch_execute(&block).unwrap();
    }
    let store = PostgresCheckpointStore::connect(&database.replace("postgres@", "app@")).unwrap();
    store.migrate().unwrap();
    checkpoint_store::conformance::verify(&store);
    let mut client = store.connection().unwrap();
    let mut tx = client.transaction().unwrap();
    store.in_transaction(&mut tx).lock("orders").unwrap();
    store.in_transaction(&mut tx).save("orders", 1).unwrap();
    tx.commit().unwrap();
    assert_eq!(store.get("orders").unwrap(), 1);
}

#[test]
fn the_table_of_the_readme_is_the_one_that_migrate_makes() {
    let by_hand = harness::fresh_database();
    let sql = blocks(README, "sql");
    let table = sql.iter().find(|block| block.contains("projection_name text PRIMARY KEY"));
    harness::client(&by_hand).batch_execute(table.unwrap()).unwrap();
    let migrated = harness::fresh_database();
    PostgresCheckpointStore::connect(&migrated).unwrap().migrate().unwrap();
    let describe = |database: &str| {
        let output = harness::server_program("psql")
            .args(["-X", "-c", "\\d+ public.projection_checkpoints", database])
            .output()
            .expect("psql runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(describe(&by_hand), describe(&migrated));
    assert!(describe(&by_hand).contains("fillfactor=25"), "{}", describe(&by_hand));
}

/// The SQL between quotes in the first worker of the front page.
#[test]
fn the_query_of_the_readme_applies_each_event_once() {
    let database = harness::fresh_database();
    let mut client = harness::client(&database);
    let sql = blocks(README, "sql");
    client
        .batch_execute(sql.iter().find(|block| block.contains("CREATE TABLE events")).unwrap())
        .unwrap();
    client
        .batch_execute(
            "INSERT INTO events (order_id, amount) SELECT i % 7, i FROM generate_series(1, 1200) i",
        )
        .unwrap();
    let worker = blocks(README, "rust,no_run").remove(0);
    let query = worker.split('"').find(|piece| piece.starts_with("WITH batch")).unwrap();
    let (mut offset, mut counts) = (0_i64, Vec::new());
    loop {
        let row = client.query_one(query, &[&offset]).unwrap();
        counts.push(row.get::<_, i64>(0));
        match row.get::<_, Option<i64>>(1) {
            Some(last) => offset = last,
            None => break,
        }
    }
    assert_eq!((counts, offset), (vec![500, 500, 200, 0], 1200));
    let query = "SELECT sum(total)::bigint, count(*) FROM order_totals";
    let row = client.query_one(query, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1200 * 1201 / 2, 7));
}

/// The SQL of the section on gaps: a table whose appends take turns, and a reader that waits.
fn remedies() -> [String; 2] {
    let docs: String = include_str!("../../src/lib.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    blocks(&docs, "sql").try_into().expect("two remedies")
}

const APPEND: &str = "INSERT INTO events (payload) VALUES ('{}')";

fn events_after(reader: &mut Client, offset: i64) -> Vec<i64> {
    let sql = "SELECT id FROM events WHERE id > $1 ORDER BY id";
    reader.query(sql, &[&offset]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// The second transaction began before the first one, and appends before and after it.
#[test]
fn where_appends_take_turns_events_commit_in_the_order_of_their_ids() {
    let [table, _] = remedies();
    let database = harness::fresh_database();
    let mut reader = harness::client(&database);
    reader.batch_execute(&table).unwrap();
    let (mut one, mut other) = (harness::client(&database), harness::client(&database));
    let mut early = one.transaction().unwrap();
    early.execute("CREATE TABLE something_else ()", &[]).unwrap();
    let mut open = other.transaction().unwrap();
    open.execute(APPEND, &[]).unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            early.execute(APPEND, &[]).unwrap();
            early.execute(APPEND, &[]).unwrap();
            early.commit().unwrap();
        });
        harness::wait_for_a_waiter(&mut reader, "INSERT INTO events");
        assert!(events_after(&mut reader, 0).is_empty());
        open.execute(APPEND, &[]).unwrap();
        open.commit().unwrap();
        waits.join().unwrap();
    });
    assert_eq!(events_after(&mut reader, 0), [1, 2, 3, 4]);
}

#[test]
fn a_reader_behind_appends_that_take_turns_misses_none() {
    const WRITERS: usize = 6;
    const TRANSACTIONS: usize = 60;
    let [table, _] = remedies();
    let database = harness::fresh_database();
    let mut reader = harness::client(&database);
    reader.batch_execute(&table).unwrap();
    let mut read = Vec::new();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let mut client = harness::client(&database);
                scope.spawn(move || {
                    for i in 0..TRANSACTIONS {
                        let mut tx = client.transaction().unwrap();
                        for _ in 0..=(i + writer) % 3 {
                            tx.execute(APPEND, &[]).unwrap();
                        }
                        if i % 5 == 0 { tx.rollback() } else { tx.commit() }.unwrap();
                    }
                })
            })
            .collect();
        while !writers.iter().all(thread::ScopedJoinHandle::is_finished) {
            let checkpoint = read.last().copied().unwrap_or(0);
            read.extend(events_after(&mut reader, checkpoint));
        }
    });
    read.extend(events_after(&mut reader, read.last().copied().unwrap_or(0)));
    assert_eq!(read, events_after(&mut reader, 0));
    assert!(read.len() > WRITERS * TRANSACTIONS);
}

#[test]
fn a_reader_that_locks_the_table_learns_how_far_the_stream_is_complete() {
    let [_, complete_up_to] = remedies();
    let sql: Vec<_> = complete_up_to.lines().collect();
    let [begin, lock, query, commit] = sql[..] else { panic!("{sql:?}") };
    let database = harness::fresh_database();
    let mut observer = harness::client(&database);
    observer
        .batch_execute(
            "CREATE TABLE events (
                 id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload jsonb NOT NULL
             )",
        )
        .unwrap();
    let (mut one, mut other) = (harness::client(&database), harness::client(&database));
    let mut slow = one.transaction().unwrap();
    slow.execute(APPEND, &[]).unwrap();
    other.execute(APPEND, &[]).unwrap();
    assert_eq!(events_after(&mut observer, 0), [2], "event 1 is not there yet");
    let mut reader = harness::client(&database);
    thread::scope(|scope| {
        let complete = scope.spawn(|| -> i64 {
            reader.batch_execute(begin).unwrap();
            reader.batch_execute(lock).unwrap();
            let head = reader.query_one(query, &[]).unwrap().get(0);
            reader.batch_execute(commit).unwrap();
            head
        });
        harness::wait_for_a_waiter(&mut observer, "LOCK TABLE events");
        slow.execute(APPEND, &[]).unwrap();
        slow.commit().unwrap();
        assert_eq!(complete.join().unwrap(), 3);
    });
    assert_eq!(events_after(&mut observer, 0), [1, 2, 3]);
}

/// The crates that a program gets with this one, by the features that it asks for.
#[test]
fn four_crates_come_with_it_and_one_without_features() {
    let dependencies = |features: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--locked", "--edges=normal", "--depth=1", "--prefix=none"])
            .args(["--format={lib}", "--manifest-path"])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
            .args(features)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut names: Vec<_> =
            String::from_utf8(output.stdout).unwrap().lines().skip(1).map(str::to_owned).collect();
        names.sort();
        names
    };
    let four = ["postgres", "r2d2", "r2d2_postgres", "thiserror"];
    assert_eq!(dependencies(&[]), four);
    assert_eq!(dependencies(&["--all-features"]), four);
    assert_eq!(dependencies(&["--no-default-features"]), ["thiserror"]);
    assert_eq!(dependencies(&["--no-default-features", "--features=conformance"]), ["thiserror"]);
}
