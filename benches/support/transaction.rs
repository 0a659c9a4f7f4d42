use checkpoint_store::postgres::types::Type;
use checkpoint_store::postgres::{Client, Statement, Transaction};
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use super::client;
use super::saves::SAVE;

/// Batches of events for a read model, each processed in a transaction.
pub(crate) struct Batches {
    client: Client,
    store: PostgresCheckpointStore,
    customers: Vec<i64>,
    amounts: Vec<i64>,
    offset: i64,
}

/// Who saves the checkpoint in the transaction.
#[derive(Clone, Copy)]
pub(crate) enum SavedBy {
    Nobody,
    Us,
    Hand,
}

impl Batches {
    pub(crate) fn new(params: &str, events: i64) -> Self {
        let mut client = client(params);
        client
            .batch_execute(
                "CREATE TABLE IF NOT EXISTS totals (customer bigint PRIMARY KEY, amount bigint);
                 INSERT INTO totals SELECT n, 0 FROM generate_series(0, 99) AS n
                 ON CONFLICT DO NOTHING",
            )
            .expect("a read model");
        let customers = (0..events).map(|event| event % 100).collect();
        let amounts = (0..events).collect();
        let store = PostgresCheckpointStore::connect(params).expect("a store");
        Self { client, store, customers, amounts, offset: 0 }
    }

    /// Begin, apply the batch in one statement, save, commit.
    pub(crate) fn process(&mut self, saved_by: SavedBy) {
        let projection = "totals";
        self.offset += 1;
        let mut tx = self.client.transaction().expect("a transaction");
        apply(&mut tx, &self.customers, &self.amounts);
        match saved_by {
            SavedBy::Nobody => {}
            SavedBy::Us => {
                self.store.in_transaction(&mut tx).save(projection, self.offset).expect("saved");
            }
            SavedBy::Hand => {
                tx.execute_typed(SAVE, &[(&projection, Type::TEXT), (&self.offset, Type::INT8)])
                    .expect("saved");
            }
        }
        tx.commit().expect("committed");
    }
}

/// What a batch does to the read model, in one unnamed statement.
fn apply(tx: &mut Transaction<'_>, customers: &[i64], amounts: &[i64]) {
    const APPLY_ONE: &str = "UPDATE totals SET amount = amount + $2 WHERE customer = $1";
    const APPLY: &str = "
        INSERT INTO totals (customer, amount)
        SELECT customer, sum(amount)
        FROM unnest($1::bigint[], $2::bigint[]) AS events (customer, amount)
        GROUP BY customer
        ON CONFLICT (customer) DO UPDATE SET amount = totals.amount + EXCLUDED.amount";
    if let ([customer], [amount]) = (customers, amounts) {
        tx.execute_typed(APPLY_ONE, &[(customer, Type::INT8), (amount, Type::INT8)])
            .expect("applied");
        return;
    }
    tx.execute_typed(APPLY, &[(&customers, Type::INT8_ARRAY), (&amounts, Type::INT8_ARRAY)])
        .expect("applied");
}

/// Batches that are processed exactly once: lock, apply, save, commit.
pub(crate) struct Projected {
    batches: Batches,
    prepared: PostgresCheckpointStore,
    by_hand: Option<(Statement, Statement)>,
    projection: &'static str,
}

const LOCK: &str =
    "SELECT \"offset\" FROM projection_checkpoints WHERE projection_name = $1 FOR UPDATE";

impl Projected {
    /// `projection` is one of its own, for a row of its own.
    pub(crate) fn new(params: &str, events: i64, projection: &'static str) -> Self {
        let batches = Batches::new(params, events);
        batches.store.save(projection, 0).expect("a checkpoint");
        let prepared = PostgresCheckpointStore::builder()
            .prepared_statements(true)
            .connect(params)
            .expect("a store");
        Self { batches, prepared, by_hand: None, projection }
    }

    pub(crate) fn project(&self) {
        self.project_by(&self.batches.store);
    }

    pub(crate) fn project_prepared(&self) {
        self.project_by(&self.prepared);
    }

    fn project_by(&self, store: &PostgresCheckpointStore) {
        let Batches { customers, amounts, .. } = &self.batches;
        let batch = store.project(self.projection, |tx, offset| {
            apply(tx, customers, amounts);
            Ok(Some(offset + 1))
        });
        assert!(batch.expect("projected").is_some());
    }

    pub(crate) fn in_transaction(&mut self) {
        let Batches { client, store, customers, amounts, .. } = &mut self.batches;
        let mut tx = client.transaction().expect("a transaction");
        let offset = store.in_transaction(&mut tx).lock(self.projection).expect("locked");
        apply(&mut tx, customers, amounts);
        store.in_transaction(&mut tx).save(self.projection, offset + 1).expect("saved");
        tx.commit().expect("committed");
    }

    /// As somebody writes it who knows that an unnamed statement is one round trip.
    pub(crate) fn by_hand(&mut self) {
        let Batches { client, customers, amounts, .. } = &mut self.batches;
        let mut tx = client.transaction().expect("a transaction");
        let row = tx.query_typed_one(LOCK, &[(&self.projection, Type::TEXT)]).expect("locked");
        let next = row.get::<_, i64>(0) + 1;
        apply(&mut tx, customers, amounts);
        tx.execute_typed(SAVE, &[(&self.projection, Type::TEXT), (&next, Type::INT8)])
            .expect("saved");
        tx.commit().expect("committed");
    }

    /// As somebody writes it first: `query` and `execute` prepare each statement, and forget it.
    pub(crate) fn by_hand_at_first(&mut self) {
        let Batches { client, customers, amounts, .. } = &mut self.batches;
        let mut tx = client.transaction().expect("a transaction");
        let row = tx.query_one(LOCK, &[&self.projection]).expect("locked");
        let next = row.get::<_, i64>(0) + 1;
        apply(&mut tx, customers, amounts);
        tx.execute(SAVE, &[&self.projection, &next]).expect("saved");
        tx.commit().expect("committed");
    }

    pub(crate) fn by_hand_prepared(&mut self) {
        let Batches { client, customers, amounts, .. } = &mut self.batches;
        let (lock, save) = &*self.by_hand.get_or_insert_with(|| {
            (client.prepare(LOCK).expect("prepared"), client.prepare(SAVE).expect("prepared"))
        });
        let mut tx = client.transaction().expect("a transaction");
        let next = tx.query_one(lock, &[&self.projection]).expect("locked").get::<_, i64>(0) + 1;
        apply(&mut tx, customers, amounts);
        tx.execute(save, &[&self.projection, &next]).expect("saved");
        tx.commit().expect("committed");
    }

    /// The same work without a checkpoint: what is lost at a crash, or done twice.
    pub(crate) fn without(&mut self) {
        self.batches.process(SavedBy::Nobody);
    }
}
