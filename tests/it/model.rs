//! The memory store as the model of PostgreSQL: whatever is done to both, they answer alike.

use std::cell::RefCell;

use checkpoint_store::{CheckpointStore, Error, MemoryCheckpointStore, validate_projection};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::harness::{self, Schema};

const CASES: u32 = 10_000;

#[derive(Debug, Clone)]
enum Operation {
    Find(String),
    Get(String),
    All,
    Save(String, i64),
    SaveMany(Vec<(String, i64)>),
    Advance(String, i64, i64),
    Delete(String),
}

/// What an operation answers, less the time and the causes, which differ by nature.
#[derive(Debug, PartialEq)]
enum Answer {
    Done,
    Deleted(bool),
    Offset(i64),
    Checkpoints(Vec<(String, i64)>),
    Conflict { projection: String, expected: i64, found: i64 },
    InvalidProjection(String),
    InvalidOffset(i64),
    Failed(String),
}

fn answer(store: &dyn CheckpointStore, operation: &Operation) -> Answer {
    let listed = |found: Vec<checkpoint_store::Checkpoint>| {
        Answer::Checkpoints(found.into_iter().map(|c| (c.projection, c.offset)).collect())
    };
    let answer = match operation {
        Operation::Find(name) => store.find(name).map(|found| listed(found.into_iter().collect())),
        Operation::Get(name) => store.get(name).map(Answer::Offset),
        Operation::All => store.all().map(listed),
        Operation::Save(name, offset) => store.save(name, *offset).map(|()| Answer::Done),
        Operation::SaveMany(checkpoints) => {
            let borrowed: Vec<_> =
                checkpoints.iter().map(|(name, offset)| (name.as_str(), *offset)).collect();
            store.save_many(&borrowed).map(|()| Answer::Done)
        }
        Operation::Advance(name, from, to) => {
            store.advance(name, *from, *to).map(|()| Answer::Done)
        }
        Operation::Delete(name) => store.delete(name).map(Answer::Deleted),
    };
    answer.unwrap_or_else(|error| match error {
        Error::Conflict { projection, expected, found } => {
            Answer::Conflict { projection, expected, found }
        }
        Error::InvalidProjection { name, .. } => Answer::InvalidProjection(name),
        Error::InvalidOffset { offset, .. } => Answer::InvalidOffset(offset),
        other => Answer::Failed(harness::chain(&other)),
    })
}

/// A few names that come again, and now and then one that is hostile, odd or refused.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => prop::sample::select(vec!["a", "A", "b", "ä", "orders"]).prop_map(str::to_owned),
        2 => any::<String>(),
        1 => "[\"'\\\\;$%_\\x00-\\x1f{}()*-]{0,12}",
        1 => (1_020_usize..1_030).prop_map(|length| "x".repeat(length)),
    ]
}

fn offset() -> impl Strategy<Value = i64> {
    prop_oneof![
        8 => 0_i64..4,
        1 => any::<i64>(),
        1 => prop::sample::select(vec![i64::MIN, -2, -1, i64::MAX - 1, i64::MAX]),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        name().prop_map(Operation::Find),
        name().prop_map(Operation::Get),
        Just(Operation::All),
        (name(), offset()).prop_map(|(name, offset)| Operation::Save(name, offset)),
        prop::collection::vec((name(), offset()), 0..4).prop_map(Operation::SaveMany),
        (name(), offset(), offset())
            .prop_map(|(name, from, to)| Operation::Advance(name, from, to)),
        name().prop_map(Operation::Delete),
    ]
}

#[test]
fn memory_and_postgres_answer_alike() {
    let schema = Schema::new();
    let memory = MemoryCheckpointStore::new();
    // A case is a short run of operations on what the cases before it have left behind.
    let tried = RefCell::new(0_u32);
    let run = 5;
    let config = Config { cases: CASES / run, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&prop::collection::vec(operation(), run as usize), |operations| {
            for operation in operations {
                let (model, real) =
                    (answer(&memory, &operation), answer(&schema.store, &operation));
                prop_assert_eq!(model, real, "{:?}", operation);
                *tried.borrow_mut() += 1;
            }
            Ok(())
        })
        .unwrap();
    assert!(*tried.borrow() >= CASES);
    assert_eq!(answer(&memory, &Operation::All), answer(&schema.store, &Operation::All));
}

#[test]
fn in_a_transaction_the_answers_are_the_same() {
    let schema = Schema::new();
    let memory = MemoryCheckpointStore::new();
    let client = RefCell::new(schema.client());
    let config = Config { cases: 500, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&(name(), offset(), offset()), |(name, from, to)| {
            let mut client = client.borrow_mut();
            let mut tx = client.transaction().unwrap();
            let mut here = schema.store.in_transaction(&mut tx);
            prop_assert_eq!(here.save(&name, from).is_ok(), memory.save(&name, from).is_ok());
            prop_assert_eq!(
                here.advance(&name, from, to).is_ok(),
                memory.advance(&name, from, to).is_ok()
            );
            let valid = validate_projection(&name).is_ok();
            prop_assert_eq!(here.get(&name).ok(), memory.get(&name).ok());
            prop_assert_eq!(here.lock(&name).ok(), valid.then(|| memory.get(&name).unwrap()));
            tx.commit().unwrap();
            if valid {
                memory.delete(&name).unwrap();
                schema.store.delete(&name).unwrap();
            }
            Ok(())
        })
        .unwrap();
}

/// What is quoted here is read back by the server as the very same name, and as nothing else.
#[test]
fn any_identifier_is_a_name_to_the_server() {
    let database = harness::fresh_database();
    let client = RefCell::new(harness::client(&database));
    let identifier = prop_oneof![
        3 => "[^\\x00]{1,15}",
        1 => "[\"'\\\\;.$\\s-]{1,20}",
        1 => "(\"; DROP TABLE x; --|public|\"){1,3}",
    ];
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&(identifier.clone(), identifier), |(schema, table)| {
            prop_assume!(!schema.starts_with("pg_"));
            let mut client = client.borrow_mut();
            let store = checkpoint_store::PostgresCheckpointStore::builder()
                .schema(&schema)
                .table(&table)
                .max_connections(1)
                .connect(&database)
                .unwrap();
            store.migrate().unwrap();
            store.save("orders", 1).unwrap();
            let there = client
                .query_one(
                    "SELECT count(*) FROM pg_tables
                     WHERE schemaname = $1 AND tablename = $2
                       AND schemaname NOT IN ('pg_catalog', 'information_schema')",
                    &[&schema, &table],
                )
                .unwrap();
            prop_assert_eq!(there.get::<_, i64>(0), 1);
            Ok(())
        })
        .unwrap();
    let all: i64 = client
        .borrow_mut()
        .query_one(
            "SELECT count(*) FROM pg_tables
             WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
            &[],
        )
        .unwrap()
        .get(0);
    assert!(all <= 151, "{all} tables: a name was more than a name");
}
