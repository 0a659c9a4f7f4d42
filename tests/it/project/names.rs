//! Names with odd characters, and tables that are called something else and are elsewhere.

use checkpoint_store::{Batch, CheckpointStore, PostgresCheckpointStore};

use super::stage::{Stage, apply};
use crate::harness::{Schema, server, unique};

#[test]
fn a_projection_may_be_called_anything_that_is_valid() {
    let longest = "ü".repeat(512);
    let names =
        ["o'rders", "\"orders\"", "orders; --", "$1", "%s\\", " ", "\n\t", "注文", "🦀", &longest];
    for prepared in [false, true] {
        let stage = Stage::new();
        let store = stage.store_at(&server().params(), "", prepared);
        for name in names {
            assert_eq!(store.project(name, |_, _| Ok(Some(2))).unwrap(), Some(2), "{name:?}");
            let batch = store.try_project(name, |_, offset| Ok(Some(offset + 1)));
            assert_eq!(batch.unwrap(), Batch::Committed(3), "{name:?}");
            assert_eq!(store.get(name).unwrap(), 3, "{name:?}");
        }
        assert_eq!(store.all().unwrap().len(), names.len());
    }
}

#[test]
fn the_table_may_be_called_anything_and_be_in_any_schema() {
    let (stage, schema) = (Stage::new(), unique("odd \"schema\"; --"));
    for prepared in [false, true] {
        let store = PostgresCheckpointStore::builder()
            .schema(&schema)
            .table("Check;\"points\"")
            .prepared_statements(prepared)
            .connect(&stage.params_at(&server().params(), ""))
            .unwrap();
        store.migrate().unwrap();
        store.delete("orders").unwrap();
        for _ in 0..3 {
            assert!(store.project("orders", apply).unwrap().is_some());
        }
        assert_eq!(store.try_project("orders", |_, _| Ok(None)).unwrap(), Batch::NothingNew);
        assert_eq!(store.get("orders").unwrap(), 4);
        assert_eq!(stage.truth().0, None, "the other table is another one");
    }
}

/// The projection's table in one schema, what it applies in another, and both commit together.
#[test]
fn two_schemas_keep_their_projections_apart() {
    let (one, other) = (Schema::new(), Schema::new());
    for (schema, to) in [(&one, 5), (&other, 7)] {
        assert_eq!(schema.store.project("orders", |_, _| Ok(Some(to))).unwrap(), Some(to));
    }
    assert_eq!((one.store.get("orders").unwrap(), other.store.get("orders").unwrap()), (5, 7));
}
