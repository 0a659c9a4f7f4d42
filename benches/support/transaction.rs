use checkpoint_store::PostgresCheckpointStore;
use checkpoint_store::postgres::Client;
use checkpoint_store::postgres::types::Type;

use super::saves::SAVE;
use super::{Server, client, store};

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
    pub(crate) fn new(server: &Server, events: i64) -> Self {
        let mut client = client(&server.params());
        client
            .batch_execute(
                "CREATE TABLE IF NOT EXISTS totals (customer bigint PRIMARY KEY, amount bigint)",
            )
            .expect("a read model");
        let customers = (0..events).map(|event| event % 100).collect();
        let amounts = (0..events).collect();
        Self { client, store: store(server), customers, amounts, offset: 0 }
    }

    /// Begin, apply the batch in one statement, save, commit.
    pub(crate) fn process(&mut self, saved_by: SavedBy) {
        const APPLY: &str = "
            INSERT INTO totals (customer, amount)
            SELECT customer, sum(amount)
            FROM unnest($1::bigint[], $2::bigint[]) AS events (customer, amount)
            GROUP BY customer
            ON CONFLICT (customer) DO UPDATE SET amount = totals.amount + EXCLUDED.amount";
        let projection = "totals";
        self.offset += 1;
        let mut tx = self.client.transaction().expect("a transaction");
        let events: [(&(dyn checkpoint_store::postgres::types::ToSql + Sync), Type); 2] =
            [(&self.customers, Type::INT8_ARRAY), (&self.amounts, Type::INT8_ARRAY)];
        tx.execute_typed(APPLY, &events).expect("applied");
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
