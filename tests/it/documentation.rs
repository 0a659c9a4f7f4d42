//! What the documents say, tried: their SQL runs, and the remedy for gaps is one.

use std::path::Path;
use std::process::Command;

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
    assert_eq!(sql.len(), 3);
    for block in sql {
        admin.batch_execute(&block).unwrap();
    }
    let store = PostgresCheckpointStore::connect(&database.replace("postgres@", "app@")).unwrap();
    store.migrate().unwrap();
    checkpoint_store::conformance::verify(&store);
    let mut client = store.pool().get().unwrap();
    let mut tx = client.transaction().unwrap();
    store.in_transaction(&mut tx).lock("orders").unwrap();
    store.in_transaction(&mut tx).save("orders", 1).unwrap();
    tx.commit().unwrap();
    assert_eq!(store.get("orders").unwrap(), 1);
}

#[test]
fn the_remedy_for_gaps_waits_for_the_event_that_commits_late() {
    let docs: String = include_str!("../../src/lib.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    let sql = blocks(&docs, "sql").remove(0);
    let (table, query) = sql.split_once("-- the next events").unwrap();
    let (_, query) = query.split_once('\n').unwrap();

    let database = harness::fresh_database();
    let mut reader = harness::client(&database);
    reader.batch_execute(table).unwrap();
    let mut next = |after: i64| -> Vec<i64> {
        reader.query(query, &[&after]).unwrap().iter().map(|row| row.get("id")).collect()
    };
    let append = "INSERT INTO events (payload) VALUES ('{}')";
    let (mut slow, mut quick) = (harness::client(&database), harness::client(&database));
    let mut late = slow.transaction().unwrap();
    late.execute(append, &[]).unwrap();
    quick.execute(append, &[]).unwrap();
    assert!(next(0).is_empty(), "event 2 is there, event 1 is not: nothing is safe to read");
    late.commit().unwrap();
    assert_eq!(next(0), [1, 2]);
    assert_eq!(next(1), [2]);
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
