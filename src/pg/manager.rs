//! What r2d2 manages in the builder's pool: slots for connections, not the connections.
//!
//! r2d2 makes connections on threads of its own, and of a failure it keeps no more than a text. A slot is
//! made at once and cannot fail. The call that takes an empty one makes the connection itself, within its
//! own deadline, and has the cause for its own error.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use postgres::Client;
use r2d2::ManageConnection;

use super::close::close;

/// A slot of the pool, with or without a connection.
pub(crate) struct Slot {
    pub(crate) client: Option<Client>,
    /// How many slots of the pool are without one.
    empty: Arc<AtomicU32>,
    /// Has the pool forget the slot: after a failed attempt to connect the next call is to get an idle
    /// connection rather than this.
    pub(crate) is_abandoned: bool,
}

impl Slot {
    pub(crate) fn fill(&mut self, client: Client) {
        self.clear();
        self.client = Some(client);
        self.empty.fetch_sub(1, Ordering::Relaxed);
    }

    /// Closes the connection, and leaves the slot to the next call.
    pub(crate) fn clear(&mut self) {
        if let Some(client) = self.client.take() {
            self.empty.fetch_add(1, Ordering::Relaxed);
            close(client);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clear();
        self.empty.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Makes empty slots.
#[derive(Default)]
pub(crate) struct SlotManager {
    pub(crate) empty: Arc<AtomicU32>,
}

impl ManageConnection for SlotManager {
    type Connection = Slot;
    type Error = Infallible;

    fn connect(&self) -> Result<Slot, Infallible> {
        self.empty.fetch_add(1, Ordering::Relaxed);
        Ok(Slot { client: None, empty: Arc::clone(&self.empty), is_abandoned: false })
    }

    /// Never asked: connections are tested by the call that takes them.
    fn is_valid(&self, _: &mut Slot) -> Result<(), Infallible> {
        Ok(())
    }

    /// Asked when a slot comes back.
    fn has_broken(&self, slot: &mut Slot) -> bool {
        if slot.client.as_ref().is_some_and(Client::is_closed) {
            slot.clear();
        }
        slot.is_abandoned
    }
}
