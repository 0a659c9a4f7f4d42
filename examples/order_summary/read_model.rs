use std::sync::Arc;

use anyhow::Result;
use checkpoint_store::postgres::IsolationLevel;
use checkpoint_store::{CheckpointStore, MemoryCheckpointStore, PostgresCheckpointStore};

use crate::events::OrderEvent;
use crate::projections::{Projection, Rows};
use crate::report::Projected;
use crate::{Crash, apply_exactly_once};

/// Where a projection's rows and its checkpoint are kept, together.
pub(crate) enum ReadModel<'a, P: Projection> {
    InPostgres(&'a PostgresCheckpointStore),
    InMemory(&'a MemoryCheckpointStore, Rows<P>),
}

impl<P: Projection> ReadModel<'_, P> {
    /// Creates what is missing, and returns the checkpoint.
    pub(crate) fn open(&self) -> Result<i64> {
        match self {
            Self::InPostgres(store) => {
                let mut client = store.connection()?;
                let mut tx = client.transaction()?;
                // `CREATE TABLE IF NOT EXISTS` fails when two run at once; under the lock they
                // take turns.
                let checkpoint = store.in_transaction(&mut tx).lock(P::NAME)?;
                tx.batch_execute(P::CREATE)?;
                tx.commit()?;
                Ok(checkpoint)
            }
            Self::InMemory(store, _) => Ok(store.get(P::NAME)?),
        }
    }

    /// Applies the events beyond the checkpoint, moves the checkpoint to the last of them, and
    /// returns it. The batch follows `from`, the checkpoint as it was returned last.
    pub(crate) fn apply(
        &mut self,
        from: i64,
        batch: &[Arc<OrderEvent>],
        crash: &Crash,
    ) -> Result<i64> {
        match self {
            Self::InPostgres(store) => apply_exactly_once::<P>(store, from, batch, crash),
            Self::InMemory(store, rows) => {
                for event in batch {
                    P::fold(rows, event);
                }
                crash.count(batch.len());
                let to = batch.last().map_or(from, |event| event.offset);
                store.advance(P::NAME, from, to)?;
                Ok(to)
            }
        }
    }

    /// Checkpoint and rows as of the same moment.
    pub(crate) fn read(self) -> Result<Projected<P>> {
        match self {
            Self::InPostgres(store) => {
                let mut client = store.connection()?;
                let snapshot =
                    client.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
                let mut tx = snapshot.read_only(true).start()?;
                let checkpoint = store.in_transaction(&mut tx).get(P::NAME)?;
                Ok(Projected { checkpoint, rows: P::read(&mut tx)? })
            }
            Self::InMemory(store, rows) => Ok(Projected { checkpoint: store.get(P::NAME)?, rows }),
        }
    }
}
