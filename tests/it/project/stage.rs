//! Where a projection is tried: a schema, a store of one connection, batches of different lengths.

use checkpoint_store::postgres::types::Type;
use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore, Result};

use crate::harness::{Schema, server};

/// A schema with the checkpoints and what is applied.
pub(super) struct Stage {
    pub(super) schema: Schema,
}

impl Stage {
    pub(super) fn new() -> Self {
        let schema = Schema::new();
        // No unique index: it would hide an event that is applied twice behind an error.
        schema.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
        Self { schema }
    }

    /// A store of one connection, so that whatever happens to it happens to the next call.
    pub(super) fn store(&self) -> PostgresCheckpointStore {
        self.store_at(&server().params(), "", false)
    }

    pub(super) fn prepared_store(&self) -> PostgresCheckpointStore {
        self.store_at(&server().params(), "", true)
    }

    /// A store whose sessions have these settings besides.
    pub(super) fn store_at(
        &self,
        params: &str,
        settings: &str,
        prepared: bool,
    ) -> PostgresCheckpointStore {
        PostgresCheckpointStore::builder()
            .schema(&self.schema.name)
            .prepared_statements(prepared)
            .max_connections(1)
            .connect(&self.params_at(params, settings))
            .unwrap()
    }

    pub(super) fn params_at(&self, params: &str, settings: &str) -> String {
        format!("{params} options='-c search_path={} {settings}'", self.schema.name)
    }

    pub(super) fn client(&self) -> Client {
        self.schema.client()
    }

    /// The offset, or `None` when there is no checkpoint, and the events that are applied.
    pub(super) fn truth(&self) -> (Option<i64>, Vec<i64>) {
        let checkpoint = self.schema.store.find("orders").unwrap();
        let query = "SELECT event FROM applied ORDER BY event";
        let rows = self.client().query(query, &[]).unwrap();
        (checkpoint.map(|it| it.offset), rows.iter().map(|row| row.get(0)).collect())
    }

    /// The store's only connection is there for the next caller, and in order.
    pub(super) fn serves_the_next_caller(&self, store: &PostgresCheckpointStore) {
        let (before, _) = self.truth();
        let next = batch_after(before.unwrap_or_default());
        assert_eq!(store.project("orders", apply).unwrap(), Some(next));
        assert_eq!(self.truth().0, Some(next));
    }
}

/// Where the batch after this offset ends; batches differ in length.
pub(super) fn batch_after(offset: i64) -> i64 {
    offset + 1 + offset % 3
}

/// Applies the next batch, in one statement of one round trip.
pub(super) fn apply(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    let to = batch_after(offset);
    insert(tx, offset, to)?;
    Ok(Some(to))
}

pub(super) fn insert(tx: &mut Transaction<'_>, from: i64, to: i64) -> Result<()> {
    tx.execute_typed(
        "INSERT INTO applied SELECT generate_series($1 + 1, $2)",
        &[(&from, Type::INT8), (&to, Type::INT8)],
    )?;
    Ok(())
}

pub(super) fn process_id(tx: &mut Transaction<'_>) -> i32 {
    tx.query_typed_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}
