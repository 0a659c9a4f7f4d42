//! The rights that the README names are enough, and each that is missing is named.

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};

use crate::harness::{self, chain, sql_state};

type InTransaction = fn(&PostgresCheckpointStore, &mut Transaction<'_>) -> Result<()>;
type Pooled = fn(&PostgresCheckpointStore) -> Result<()>;

/// What fails for want of each right; everything else goes on working.
const NEEDS: [(&str, &[(&str, Pooled)]); 4] = [
    (
        "SELECT",
        &[
            ("find", |store| store.find("orders").map(drop)),
            ("find", |store| store.get("orders").map(drop)),
            ("all", |store| store.all().map(drop)),
            ("save", |store| store.save("orders", 1)),
            ("save_many", |store| store.save_many(&[("orders", 1)])),
            ("advance", |store| store.advance("orders", 1, 2)),
            ("delete", |store| store.delete("orders").map(drop)),
        ],
    ),
    (
        "INSERT",
        &[
            ("save", |store| store.save("orders", 1)),
            ("save_many", |store| store.save_many(&[("orders", 1)])),
            ("advance", |store| store.advance("orders", 1, 2)),
        ],
    ),
    (
        "UPDATE",
        &[
            ("save", |store| store.save("orders", 1)),
            ("save_many", |store| store.save_many(&[("orders", 1)])),
            ("advance", |store| store.advance("orders", 1, 2)),
        ],
    ),
    ("DELETE", &[("delete", |store| store.delete("orders").map(drop))]),
];

const LOCKS: [(&str, InTransaction); 2] = [
    ("lock", |store, tx| store.in_transaction(tx).lock("orders").map(drop)),
    ("try_lock", |store, tx| store.in_transaction(tx).try_lock("orders").map(drop)),
];

#[track_caller]
fn assert_names(refusal: Result<()>, missing: &str, operation: &str) {
    let error = refusal.expect_err(missing);
    let told = chain(&error);
    assert!(
        matches!(error, Error::Backend { operation: failed, .. } if failed == operation),
        "without {missing}, {operation}: {told}"
    );
    assert_eq!(sql_state(&error).as_deref(), Some("42501"), "{told}");
    assert!(told.contains("\"public\".\"projection_checkpoints\""), "{told}");
    assert!(told.contains("permission denied"), "{told}");
    assert!(!error.is_transient());
}

#[test]
fn each_right_that_is_missing_is_named_with_the_operation_and_the_table() {
    let database = harness::fresh_database();
    PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
    let mut admin = harness::client(&database);
    for (missing, refused) in NEEDS {
        let role = format!("without_{}", missing.to_lowercase());
        admin
            .batch_execute(&format!(
                "DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN;
                 GRANT USAGE ON SCHEMA public TO {role};
                 GRANT SELECT, INSERT, UPDATE, DELETE ON public.projection_checkpoints TO {role};
                 REVOKE {missing} ON public.projection_checkpoints FROM {role};"
            ))
            .unwrap();
        let url = database.replace("postgres@", &format!("{role}@"));
        let store = PostgresCheckpointStore::connect(&url).unwrap();
        store.migrate().expect("the table is there and has the right shape");
        for (operation, run) in refused {
            assert_names(run(&store), missing, operation);
        }
        let mut client = harness::client(&url);
        for (operation, lock) in LOCKS {
            let locked = lock(&store, &mut client.transaction().unwrap());
            match missing {
                "DELETE" => locked.expect("a lock deletes nothing"),
                _ => assert_names(locked, missing, operation),
            }
        }
    }
}

#[test]
fn a_schema_that_may_not_be_used_is_named() {
    let database = harness::fresh_database();
    let mut admin = harness::client(&database);
    let owner = PostgresCheckpointStore::builder().schema("private").connect(&database).unwrap();
    owner.migrate().unwrap();
    admin
        .batch_execute(
            "DROP ROLE IF EXISTS stranger; CREATE ROLE stranger LOGIN;
             GRANT SELECT, INSERT, UPDATE, DELETE ON private.projection_checkpoints TO stranger;",
        )
        .unwrap();
    let url = database.replace("postgres@", "stranger@");
    let store = PostgresCheckpointStore::builder().schema("private").connect(&url).unwrap();
    let error = store.save("orders", 1).unwrap_err();
    assert!(chain(&error).contains("permission denied for schema private"), "{}", chain(&error));
    let error = store.migrate().unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "migrate", .. }), "{error:?}");
    assert!(chain(&error).contains("\"private\".\"projection_checkpoints\""), "{}", chain(&error));
}
