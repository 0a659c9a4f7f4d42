//! `project` with statements that are kept with the connection, and what it costs with either kind.

use checkpoint_store::postgres::types::Type;
use checkpoint_store::{Batch, CheckpointStore, PostgresCheckpointStore};

use super::stage::{Stage, apply};

/// The texts of what the store's only connection keeps.
fn kept(store: &PostgresCheckpointStore) -> Vec<String> {
    let mut client = store.connection().unwrap();
    let sql = "SELECT statement FROM pg_prepared_statements ORDER BY prepare_time";
    client.query_typed(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn lock_and_save_are_prepared_once_and_kept() {
    let stage = Stage::new();
    let store = stage.prepared_store();
    store.save("orders", 1).unwrap();
    for _ in 0..5 {
        store.project("orders", apply).unwrap();
    }
    let statements = kept(&store);
    assert_eq!(statements.len(), 4, "{statements:#?}");
    for (statement, part) in
        statements.iter().zip(["ON CONFLICT", "FOR UPDATE", "PREPARE", "count(*)"])
    {
        assert!(statement.contains(part), "{statements:#?}");
    }
}

#[test]
fn without_prepared_statements_nothing_is_kept() {
    let stage = Stage::new();
    let store = stage.store();
    for _ in 0..3 {
        store.project("orders", apply).unwrap();
        assert!(matches!(store.try_project("orders", apply), Ok(Batch::Committed(_))));
    }
    assert_eq!(kept(&store), Vec::<String>::new());
}

/// So does a pooler that gives the next transaction another server session. The closure runs twice the first
/// time; after that the connection saves without `EXECUTE`.
#[test]
fn a_closure_that_throws_the_statements_away_harms_nobody() {
    let stage = Stage::new();
    let store = stage.prepared_store();
    for expected_runs in [2, 1, 1] {
        store.project("orders", apply).unwrap();
        let mut runs = 0;
        let committed = store.project("orders", |tx, offset| {
            runs += 1;
            if runs == 1 {
                tx.batch_execute("DEALLOCATE ALL")?;
            }
            apply(tx, offset)
        });
        assert!(committed.unwrap().is_some());
        assert_eq!(runs, expected_runs);
    }
    assert!(!kept(&store).iter().any(|it| it.contains("PREPARE")));
    let (offset, applied) = stage.truth();
    assert_eq!(applied, (1..=offset.unwrap()).collect::<Vec<_>>());
}

#[test]
fn a_table_that_was_altered_or_made_again_is_found() {
    let stage = Stage::new();
    let store = stage.prepared_store();
    let mut admin = stage.client();
    let alterations = [
        "ALTER TABLE projection_checkpoints ADD note text",
        "ALTER TABLE projection_checkpoints ALTER updated_at TYPE timestamptz(0)",
        // What the lock returns is of another type: its plan may not go on as it was.
        "ALTER TABLE projection_checkpoints ALTER \"offset\" TYPE integer;
         ALTER TABLE projection_checkpoints ALTER \"offset\" TYPE bigint",
        "CREATE TABLE other (LIKE projection_checkpoints INCLUDING ALL);
         INSERT INTO other SELECT * FROM projection_checkpoints;
         DROP TABLE projection_checkpoints;
         ALTER TABLE other RENAME TO projection_checkpoints",
    ];
    for alteration in alterations {
        store.project("orders", apply).unwrap();
        admin.batch_execute(alteration).unwrap();
        assert!(store.project("orders", apply).unwrap().is_some(), "{alteration}");
    }
    let (offset, applied) = stage.truth();
    assert_eq!(applied, (1..=offset.unwrap()).collect::<Vec<_>>());
}

/// `offset` is read as a bigint, so this ends as an error, but as one that says what is wrong.
#[test]
fn a_table_whose_offset_is_of_another_type_is_an_error_and_a_mended_one_is_not() {
    let stage = Stage::new();
    let store = stage.prepared_store();
    let mut admin = stage.client();
    store.project("orders", apply).unwrap();
    admin
        .batch_execute("ALTER TABLE projection_checkpoints ALTER \"offset\" TYPE integer")
        .unwrap();
    let error = store.project("orders", apply).unwrap_err();
    assert!(error.to_string().starts_with("lock failed: projection \"orders\""), "{error}");
    admin.batch_execute("ALTER TABLE projection_checkpoints ALTER \"offset\" TYPE bigint").unwrap();
    assert_eq!(store.project("orders", apply).unwrap(), Some(3));
}

#[test]
fn the_closures_own_prepared_statements_live_beside() {
    let stage = Stage::new();
    let store = stage.prepared_store();
    for _ in 0..3 {
        store
            .project("orders", |tx, offset| {
                let insert = tx.prepare_typed("INSERT INTO applied VALUES ($1)", &[Type::INT8])?;
                tx.execute(&insert, &[&(offset + 1)])?;
                Ok(Some(offset + 1))
            })
            .unwrap();
    }
    assert_eq!(stage.truth(), (Some(3), vec![1, 2, 3]));
    let statements = kept(&store);
    assert!(!statements.iter().any(|it| it.contains("applied")), "{statements:#?}");
}
