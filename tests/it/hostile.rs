//! Input that nobody would think of, and the memory store as the model of what comes of it.

use std::time::Duration;

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{
    Checkpoint, CheckpointStore, Error, MemoryCheckpointStore, PostgresCheckpointStore, Result,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::harness::{self, Schema, rounds};

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

fn names() -> impl Strategy<Value = String> {
    let few = || prop::sample::select(vec!["a", "b", "B", "c d", "ü", "é' --"]);
    prop_oneof![
        // The same ones again and again, for what a sequence does to one of them.
        8 => few().prop_map(ToOwned::to_owned),
        1 => any_text(0..24),
        1 => prop::sample::select(vec!["", "\0", "nul \0 inside", "\u{feff}", "$1", "\\", "%s"])
            .prop_map(ToOwned::to_owned),
        1 => prop::sample::select(vec![512_usize, 1_023, 1_024, 1_025, 3_000])
            .prop_flat_map(|length| (Just(length), prop::sample::select(vec!["x", "ü", "📦"])))
            .prop_map(|(length, of)| of.repeat(length / of.len())),
    ]
}

fn any_text(length: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    vec(any::<char>(), length).prop_map(|chars| chars.into_iter().collect())
}

fn offsets() -> impl Strategy<Value = i64> {
    prop_oneof![
        6 => 0..5_i64,
        1 => any::<i64>(),
        1 => prop::sample::select(vec![-1, -2, i64::MIN, i64::MAX, i64::MAX - 1]),
    ]
}

#[derive(Debug, Clone)]
enum Operation {
    Find(String),
    Get(String),
    All,
    Save(String, i64),
    SaveMany(Vec<(String, i64)>),
    Advance(String, i64, i64),
    /// From where it is, as a worker does.
    Step(String, i64),
    Delete(String),
}

fn operations() -> impl Strategy<Value = Operation> {
    use Operation::{Advance, All, Delete, Find, Get, Save, SaveMany, Step};
    prop_oneof![
        names().prop_map(Find),
        names().prop_map(Get),
        Just(All),
        (names(), offsets()).prop_map(|(name, offset)| Save(name, offset)),
        vec((names(), offsets()), 0..6).prop_map(SaveMany),
        (names(), offsets(), offsets()).prop_map(|(name, from, to)| Advance(name, from, to)),
        (names(), offsets()).prop_map(|(name, by)| Step(name, by)),
        names().prop_map(Delete),
    ]
}

#[derive(Debug, Clone)]
enum InTransaction {
    Do(Operation),
    Lock(String),
    TryLock(String),
}

#[derive(Debug, Clone)]
enum Step {
    Pooled(Operation),
    Transaction { steps: Vec<InTransaction>, commit: bool },
}

fn sequences() -> impl Strategy<Value = Vec<Step>> {
    let in_transaction = prop_oneof![
        4 => operations().prop_map(InTransaction::Do),
        1 => names().prop_map(InTransaction::Lock),
        1 => names().prop_map(InTransaction::TryLock),
    ];
    let step = prop_oneof![
        5 => operations().prop_map(Step::Pooled),
        1 => (vec(in_transaction, 0..4), any::<bool>())
            .prop_map(|(steps, commit)| Step::Transaction { steps, commit }),
    ];
    vec(step, 1..8)
}

/// What an operation said, without the time of the saves.
fn said(outcome: Result<impl std::fmt::Debug>) -> String {
    match outcome {
        Ok(value) => format!("{value:?}"),
        Err(
            error @ (Error::InvalidProjection { .. }
            | Error::InvalidOffset { .. }
            | Error::Conflict { .. }),
        ) => format!("refused: {error:?}"),
        Err(error) => format!("failed: {error:?}"),
    }
}

fn timeless(checkpoint: Checkpoint) -> (String, i64) {
    (checkpoint.projection, checkpoint.offset)
}

fn borrowed(checkpoints: &[(String, i64)]) -> Vec<(&str, i64)> {
    checkpoints.iter().map(|(name, offset)| (name.as_str(), *offset)).collect()
}

fn answer(store: &dyn CheckpointStore, operation: &Operation) -> String {
    use Operation::{Advance, All, Delete, Find, Get, Save, SaveMany, Step};
    match operation {
        Find(name) => said(store.find(name).map(|found| found.map(timeless))),
        Get(name) => said(store.get(name)),
        All => said(store.all().map(|all| all.into_iter().map(timeless).collect::<Vec<_>>())),
        Save(name, offset) => said(store.save(name, *offset)),
        SaveMany(checkpoints) => said(store.save_many(&borrowed(checkpoints))),
        Advance(name, from, to) => said(store.advance(name, *from, *to)),
        Step(name, by) => {
            said(store.get(name).and_then(|from| store.advance(name, from, from.wrapping_add(*by))))
        }
        Delete(name) => said(store.delete(name)),
    }
}

fn answer_in(
    store: &PostgresCheckpointStore,
    tx: &mut Transaction<'_>,
    step: &InTransaction,
) -> String {
    use Operation::{Advance, All, Delete, Find, Get, Save, SaveMany, Step};
    let mut here = store.in_transaction(tx);
    let operation = match step {
        InTransaction::Lock(name) => return said(here.lock(name)),
        InTransaction::TryLock(name) => return said(here.try_lock(name)),
        InTransaction::Do(operation) => operation,
    };
    match operation {
        Find(name) => said(here.find(name).map(|found| found.map(timeless))),
        Get(name) => said(here.get(name)),
        All => "a transaction has no such operation".to_owned(),
        Save(name, offset) => said(here.save(name, *offset)),
        SaveMany(checkpoints) => said(here.save_many(&borrowed(checkpoints))),
        Advance(name, from, to) => said(here.advance(name, *from, *to)),
        Step(name, by) => {
            said(here.get(name).and_then(|from| here.advance(name, from, from.wrapping_add(*by))))
        }
        Delete(name) => said(here.delete(name)),
    }
}

fn model_answer(model: &MemoryCheckpointStore, step: &InTransaction) -> String {
    let lock = |name: &str| match model.find(name)? {
        Some(found) => Ok(found.offset),
        None => model.save(name, 0).map(|()| 0),
    };
    match step {
        InTransaction::Lock(name) => said(lock(name)),
        InTransaction::TryLock(name) => said(lock(name).map(Some)),
        InTransaction::Do(Operation::All) => "a transaction has no such operation".to_owned(),
        InTransaction::Do(operation) => answer(model, operation),
    }
}

fn copy(model: &MemoryCheckpointStore) -> MemoryCheckpointStore {
    let copy = MemoryCheckpointStore::new();
    for found in model.all().unwrap() {
        copy.save(&found.projection, found.offset).unwrap();
    }
    copy
}

fn same_answers(
    store: &PostgresCheckpointStore,
    client: &mut Client,
    steps: &[Step],
) -> std::result::Result<(), TestCaseError> {
    let mut model = MemoryCheckpointStore::new();
    for step in steps {
        match step {
            Step::Pooled(operation) => {
                prop_assert_eq!(answer(store, operation), answer(&model, operation));
            }
            Step::Transaction { steps, commit } => {
                let inside = copy(&model);
                let mut tx = client.transaction().unwrap();
                for step in steps {
                    prop_assert_eq!(
                        answer_in(store, &mut tx, step),
                        model_answer(&inside, step),
                        "{:?}",
                        step
                    );
                }
                if *commit {
                    tx.commit().unwrap();
                    model = inside;
                } else {
                    tx.rollback().unwrap();
                }
            }
        }
    }
    prop_assert_eq!(answer(store, &Operation::All), answer(&model, &Operation::All));
    Ok(())
}

#[test]
fn the_memory_store_gives_the_answers_and_the_refusals_of_postgres() {
    let schema = Schema::new();
    let mut client = schema.client();
    let client = std::cell::RefCell::new(&mut client);
    runner(rounds(1_500, 6_000))
        .run(&sequences(), |steps| {
            let mut client = client.borrow_mut();
            client.batch_execute("DELETE FROM projection_checkpoints").unwrap();
            same_answers(&schema.store, &mut client, &steps)
        })
        .unwrap();
}

#[test]
fn any_name_and_offset_comes_back_as_it_was_given_or_is_refused() {
    let schema = Schema::new();
    let store = &schema.store;
    let name = prop_oneof![any_text(0..40), any_text(0..600), names()];
    runner(rounds(1_000, 4_000))
        .run(&(name, any::<i64>()), |(name, offset)| {
            let good_name = !name.is_empty() && name.len() <= 1_024 && !name.contains('\0');
            match store.save(&name, offset) {
                Ok(()) => {
                    prop_assert!(good_name && offset >= 0);
                    let listed: Vec<_> = store.all().unwrap().into_iter().map(timeless).collect();
                    prop_assert_eq!(listed, [(name.clone(), offset)]);
                    prop_assert_eq!(store.get(&name).unwrap(), offset);
                    prop_assert!(store.delete(&name).unwrap());
                }
                Err(Error::InvalidProjection { name: named, .. }) => {
                    prop_assert!(!good_name && named == name);
                }
                Err(Error::InvalidOffset { offset: named, .. }) => {
                    prop_assert!(good_name && offset < 0 && named == offset);
                }
                Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
            }
            Ok(())
        })
        .unwrap();
}

/// What could end a quoted name too soon, or go on behind it.
fn identifiers() -> impl Strategy<Value = String> {
    let tricky = prop::sample::select(vec![
        "\"",
        "\"\"",
        "'",
        ".",
        ";",
        "--",
        "/*",
        "*/",
        "\\",
        "$$",
        "$1",
        "U&",
        " ",
        "\n",
        "\0",
        "é",
        "📦",
        "%",
        "public",
        "projection_checkpoints",
        "public.projection_checkpoints",
        "a",
    ]);
    prop_oneof![
        3 => vec(tricky, 0..12).prop_map(|parts| parts.concat()),
        1 => any_text(0..30),
    ]
}

#[test]
fn any_schema_and_table_is_the_one_that_the_server_finds_under_that_name() {
    let database = harness::fresh_database();
    let pool = harness::pool(&database, 1, Duration::from_secs(30));
    let admin = std::cell::RefCell::new(harness::client(&database));
    runner(rounds(100, 300))
        .run(&(identifiers(), identifiers()), |(schema, table)| {
            let good = |name: &str| !name.is_empty() && name.len() <= 63 && !name.contains('\0');
            let reserved = schema.starts_with("pg_");
            let built = PostgresCheckpointStore::builder()
                .schema(&schema)
                .table(&table)
                .updated_at_index(true)
                .build(pool.clone());
            let store = match built {
                Ok(store) => store,
                Err(Error::InvalidIdentifier { identifier, .. }) => {
                    prop_assert!(!good(&identifier), "{:?}", identifier);
                    prop_assert!(identifier == schema || identifier == table);
                    return Ok(());
                }
                Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
            };
            prop_assert!(good(&schema) && good(&table));
            prop_assume!(!reserved);

            let mut admin = admin.borrow_mut();
            // The server's own reader of names, and its own writer.
            let shown = format!("{store:?}");
            let quoted = shown.split("table: ").nth(1).unwrap().split(", pool: ").next().unwrap();
            let row = admin.query_one("SELECT parse_ident($1)", &[&quoted]).unwrap();
            prop_assert_eq!(row.get::<_, Vec<String>>(0), [schema.clone(), table.clone()]);
            let sql = "SELECT format('%I.%I', $1::text, $2::text)::regclass::oid
                           = to_regclass($3)::oid";
            store.migrate().unwrap();
            store.save("orders", 7).unwrap();
            let same: bool = admin.query_one(sql, &[&schema, &table, &quoted]).unwrap().get(0);
            prop_assert!(same, "{}", quoted);
            let mut made = admin
                .query(
                    "SELECT schemaname::text, tablename::text FROM pg_tables
                        WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
                    &[],
                )
                .unwrap();
            prop_assert_eq!(made.len(), 1, "one table, and no other");
            let made = made.remove(0);
            prop_assert_eq!(
                (made.get::<_, String>(0), made.get::<_, String>(1)),
                (schema.clone(), table)
            );
            prop_assert_eq!(store.get("orders").unwrap(), 7);
            let mut tx = admin.transaction().unwrap();
            prop_assert_eq!(store.in_transaction(&mut tx).lock("orders").unwrap(), 7);
            prop_assert_eq!(store.in_transaction(&mut tx).try_lock("orders").unwrap(), Some(7));
            drop(tx);
            let drop_it = "SELECT format('DROP TABLE %I.%I', schemaname, tablename) FROM pg_tables
                        WHERE schemaname NOT IN ('pg_catalog', 'information_schema')";
            let drop_it: String = admin.query_one(drop_it, &[]).unwrap().get(0);
            admin.batch_execute(&drop_it).unwrap();
            Ok(())
        })
        .unwrap();
}
