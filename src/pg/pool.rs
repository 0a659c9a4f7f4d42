//! r2d2's pool without the type of its manager, so that the builder's pool and the caller's look the same.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use r2d2::{Extensions, ManageConnection, PooledConnection};

use super::close::close;
use super::manager::{Slot, SlotManager};

/// A pool. The last handle on it closes the connections in the background.
pub(crate) struct Pool {
    /// `None` only while it is dropped.
    erased: Option<Box<dyn ErasedPool>>,
    pub(crate) max_size: u32,
    /// The slots that r2d2 counts as connections and that have none.
    empty: Arc<AtomicU32>,
}

impl Pool {
    /// The builder's pool, without a connection.
    pub(crate) fn with_slots(size: u32) -> Result<Self, NoThread> {
        let manager = SlotManager::default();
        let empty = Arc::clone(&manager.empty);
        let build = || {
            r2d2::Pool::builder()
                .max_size(size)
                .min_idle(Some(0))
                .test_on_check_out(false)
                .error_handler(Box::new(r2d2::NopErrorHandler))
                .build_unchecked(manager)
        };
        // r2d2 panics where it cannot start its threads.
        let pool = catch_unwind(AssertUnwindSafe(build)).map_err(|_| NoThread)?;
        Ok(Self { erased: Some(Box::new(pool)), max_size: size, empty })
    }

    pub(crate) fn of_the_caller<M>(pool: r2d2::Pool<M>) -> Self
    where
        M: ManageConnection<Connection = Client>,
    {
        Self { max_size: pool.max_size(), erased: Some(Box::new(pool)), empty: Arc::default() }
    }

    fn erased(&self) -> &dyn ErasedPool {
        match &self.erased {
            Some(pool) => &**pool,
            None => unreachable!("it is taken only when it is dropped"),
        }
    }

    /// Takes a connection, or an empty slot for one, as soon as there is one.
    pub(crate) fn take(&self, timeout: Duration) -> Result<Box<dyn Loan>, r2d2::Error> {
        self.erased().take(timeout)
    }

    pub(crate) fn state(&self) -> r2d2::State {
        let empty = self.empty.load(Ordering::Relaxed);
        let mut state = self.erased().state();
        state.connections = state.connections.saturating_sub(empty);
        state.idle_connections = state.idle_connections.saturating_sub(empty);
        state
    }

    /// Pauses, but not longer than until a connection is idle: a server may give fewer connections than the
    /// pool may have.
    pub(crate) fn wait_for_an_idle_one(&self, pause: Duration) {
        const STEP: Duration = Duration::from_millis(10);
        let end = Instant::now() + pause;
        while self.state().idle_connections == 0 && Instant::now() < end {
            thread::sleep(STEP.min(pause));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(pool) = self.erased.take() {
            close(pool);
        }
    }
}

/// The pool could not start its threads.
#[derive(Debug, thiserror::Error)]
#[error("the connection pool could not start a thread")]
pub(crate) struct NoThread;

trait ErasedPool: Send + Sync {
    fn take(&self, timeout: Duration) -> Result<Box<dyn Loan>, r2d2::Error>;
    fn state(&self) -> r2d2::State;
}

impl<M> ErasedPool for r2d2::Pool<M>
where
    M: ManageConnection,
    PooledConnection<M>: Loan,
{
    fn take(&self, timeout: Duration) -> Result<Box<dyn Loan>, r2d2::Error> {
        Ok(Box::new(self.get_timeout(timeout)?))
    }

    fn state(&self) -> r2d2::State {
        r2d2::Pool::state(self)
    }
}

/// Whether the server answers on a connection that is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Responsive,
    Unresponsive,
}

/// What a pool has lent. It goes back when it is dropped.
pub(crate) trait Loan: Send + 'static {
    /// `None` in a slot in which the connection is to be made.
    fn client(&self) -> Option<&Client>;
    fn client_mut(&mut self) -> Option<&mut Client>;
    /// What is kept with the connection for as long as it lives.
    fn extensions(&mut self) -> &mut Extensions;
    /// Puts a new connection into a slot. A pool of the caller's has none that are empty.
    fn fill(&mut self, client: Client) {
        close(client);
    }
    /// Keeps the connection from being lent again.
    fn discard(self: Box<Self>, peer: Peer);
    /// Gives up a slot in which no connection could be made.
    fn abandon(self: Box<Self>) {}
}

impl Loan for PooledConnection<SlotManager> {
    fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    fn client_mut(&mut self) -> Option<&mut Client> {
        self.client.as_mut()
    }

    fn extensions(&mut self) -> &mut Extensions {
        PooledConnection::extensions_mut(self)
    }

    fn fill(&mut self, client: Client) {
        *PooledConnection::extensions_mut(self) = Extensions::new();
        Slot::fill(self, client);
    }

    fn discard(mut self: Box<Self>, _: Peer) {
        self.clear();
    }

    fn abandon(mut self: Box<Self>) {
        self.is_abandoned = true;
    }
}

/// A pool of the caller's, whose manager makes the connections and decides which of them are broken: those
/// that are closed.
impl<M> Loan for PooledConnection<M>
where
    M: ManageConnection<Connection = Client>,
{
    fn client(&self) -> Option<&Client> {
        Some(self)
    }

    fn client_mut(&mut self) -> Option<&mut Client> {
        Some(self)
    }

    fn extensions(&mut self) -> &mut Extensions {
        PooledConnection::extensions_mut(self)
    }

    fn discard(mut self: Box<Self>, peer: Peer) {
        *PooledConnection::extensions_mut(&mut self) = Extensions::new();
        match peer {
            Peer::Responsive => {
                let end =
                    "ROLLBACK; SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())";
                // It ends this very session, so there is no other answer than an error.
                drop(self.batch_execute(end));
                // The client learns of the end with the next request.
                drop(self.batch_execute(""));
            }
            Peer::Unresponsive if self.is_closed() => {}
            Peer::Unresponsive => hold_back(self),
        }
    }
}

/// Keeps a connection of the caller's that does not answer out of the pool until it is closed, or answers
/// after all. If no thread can be had it goes back.
fn hold_back<M>(mut connection: Box<PooledConnection<M>>)
where
    M: ManageConnection<Connection = Client>,
{
    let waiting = thread::Builder::new().name("checkpoint-held-back".to_owned());
    drop(waiting.spawn(move || drop(connection.batch_execute(""))));
}
