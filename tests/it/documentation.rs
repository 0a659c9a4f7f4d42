//! What the documents say, tried: their SQL runs, and the remedy for gaps is one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use crate::harness::{self, wait_until};

/// The fenced blocks of a language, in the order in which they stand.
pub(crate) fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        let info = line.trim_start().strip_prefix("```").unwrap_or_default();
        if info.split_whitespace().next() == Some(language) {
            let lines = lines.by_ref().take_while(|line| line.trim_start() != "```");
            let block: Vec<_> = lines.map(|line| line.get(indent..).unwrap_or_default()).collect();
            blocks.push(block.join("\n"));
        }
    }
    blocks
}

const README: &str = include_str!("../../README.md");

/// The one that its grants are for. All databases of a server have the same roles.
fn make_the_role_of_the_readme() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        harness::server().client().batch_execute("CREATE ROLE app LOGIN").unwrap();
    });
}

#[test]
fn the_sql_of_the_readme_runs_and_its_grants_are_enough() {
    let database = harness::fresh_database();
    let mut admin = harness::client(&database);
    make_the_role_of_the_readme();
    admin.batch_execute("REVOKE ALL ON SCHEMA public FROM PUBLIC").unwrap();
    let mut sql = blocks(README, "sql");
    sql.sort_by_key(|block| !block.contains("CREATE TABLE"));
    assert_eq!(sql.len(), 2);
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
    make_the_role_of_the_readme();
    let by_hand = harness::fresh_database();
    let sql = blocks(README, "sql");
    let table = sql.iter().find(|block| block.contains("projection_name text"));
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

/// The worker of the front page, as it stands there, in a program of its own; built offline, with what
/// this crate was built with.
fn build_the_worker(database: &str) -> (tempfile::TempDir, PathBuf) {
    let worker = blocks(README, "rust,no_run").remove(0);
    let lines = worker.lines().count();
    assert!(worker.contains("fn main()") && lines <= 30, "{lines} lines");
    let url = "postgres://app:secret@localhost/app";
    assert!(worker.contains(url));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("src")).unwrap();
    fs::write(folder.path().join("src/main.rs"), worker.replace(url, database)).unwrap();
    fs::copy(root.join("Cargo.lock"), folder.path().join("Cargo.lock")).unwrap();
    let manifest = format!(
        "[package]\nname = \"worker\"\nversion = \"0.0.0\"\nedition = \"2024\"\n
         [dependencies]\ncheckpoint-store.path = \"{}\"\n[workspace]\n",
        root.display()
    );
    fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
    let target = root.join("target/readme");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--offline"])
        .current_dir(folder.path())
        .env("CARGO_TARGET_DIR", &target)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (folder, target.join("debug/worker"))
}

#[test]
fn the_worker_of_the_readme_counts_each_event_once_though_it_is_killed() {
    let database = harness::fresh_database();
    let mut client = harness::client(&database);
    let sql = blocks(README, "sql");
    client
        .batch_execute(sql.iter().find(|block| block.contains("CREATE TABLE events")).unwrap())
        .unwrap();
    let (_folder, program) = build_the_worker(&database);
    let mut events = 0;
    for round in 0..4 {
        let append = "INSERT INTO events (order_id, amount)
                      SELECT i % 7, i FROM generate_series(1, 1200) i";
        events += client.execute(append, &[]).unwrap();
        let mut worker = Command::new(&program).spawn().unwrap();
        // All of it the last time, and some of it before.
        let wanted = if round == 3 { events } else { events - 1_000 };
        wait_until("it makes progress", || {
            let query = "SELECT COALESCE(max(\"offset\"), 0) FROM projection_checkpoints";
            client
                .query_one(query, &[])
                .is_ok_and(|row| row.get::<_, i64>(0).unsigned_abs() >= wanted)
        });
        worker.kill().unwrap();
        worker.wait().unwrap();
    }
    let query = "SELECT sum(total)::bigint, count(*) FROM order_totals";
    let row = client.query_one(query, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (4 * 1200 * 1201 / 2, 7));
}

/// Ids that a session has drawn ahead are committed late, whatever turns the appends take.
#[test]
fn where_ids_are_drawn_ahead_an_event_is_lost_and_with_a_cache_of_1_none_is() {
    for (cache, lost) in [(10, true), (1, false)] {
        let [table, _] = remedies();
        let database = harness::fresh_database();
        let mut reader = harness::client(&database);
        reader.batch_execute(&table).unwrap();
        let sequence = "SELECT pg_get_serial_sequence('events', 'id')";
        let sequence: String = reader.query_one(sequence, &[]).unwrap().get(0);
        reader.batch_execute(&format!("ALTER SEQUENCE {sequence} CACHE {cache}")).unwrap();
        let (mut one, mut other) = (harness::client(&database), harness::client(&database));
        one.execute(APPEND, &[]).unwrap();
        other.execute(APPEND, &[]).unwrap();
        let checkpoint = events_after(&mut reader, 0).last().copied().unwrap();
        one.execute(APPEND, &[]).unwrap();
        assert_eq!(events_after(&mut reader, checkpoint).is_empty(), lost, "CACHE {cache}");
    }
}

/// The SQL of the section on gaps: a table whose appends take turns, and a reader that waits.
fn remedies() -> [String; 2] {
    blocks(include_str!("../../src/guide/exactly_once.md"), "sql").try_into().expect("two remedies")
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
