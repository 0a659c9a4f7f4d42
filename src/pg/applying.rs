//! Calls of a store in the closure of its own `project`.

use std::cell::RefCell;

use super::PostgresCheckpointStore;
use crate::{Error, Result};

impl PostgresCheckpointStore {
    /// Refuses what would wait for the transaction of the closure that the calling thread is in, and so for
    /// itself, or for another closure that waits for this one. PostgreSQL cannot see such a deadlock.
    pub(super) fn refuse_inside_the_closure(&self, operation: &'static str) -> Result<()> {
        if Applying::is_with(self.id()) {
            return Err(Error::backend(operation, InsideTheClosure));
        }
        Ok(())
    }
}

/// A write through the store, from the closure of `project` on the same store.
#[derive(Debug, thiserror::Error)]
#[error(
    "the store was called inside the closure of `project`, and would wait for that closure's own transaction: \
     use `in_transaction` with the transaction that the closure is given, and return the offset to save it"
)]
struct InsideTheClosure;

/// The calling thread is in the closure of `project` of a store; until this is dropped, by a panic too.
pub(super) struct Applying;

thread_local! {
    static APPLYING: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

impl Applying {
    pub(super) fn with(store: usize) -> Self {
        // Without the storage of the thread, at its end, nothing can be refused.
        let _ = APPLYING.try_with(|stores| stores.borrow_mut().push(store));
        Self
    }

    fn is_with(store: usize) -> bool {
        APPLYING.try_with(|stores| stores.borrow().contains(&store)).unwrap_or(false)
    }
}

impl Drop for Applying {
    fn drop(&mut self) {
        let _ = APPLYING.try_with(|stores| stores.borrow_mut().pop());
    }
}
