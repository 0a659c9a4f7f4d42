use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use postgres::{Client, Config};
use r2d2::event::AcquireEvent;
use r2d2::{
    CustomizeConnection, HandleError, HandleEvent, ManageConnection, Pool, PooledConnection,
};

/// How long an operation waits for a connection of a pool that the builder made.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The time-out of such a pool itself. It is shorter because r2d2 pauses for up to half of it
/// between two attempts to connect, and so long does an outage seem to last after its end.
pub(crate) const POOL_TIMEOUT: Duration = Duration::from_secs(4);
/// How long to wait before the pool is asked anew. r2d2 wakes nobody when a dead connection leaves
/// room for a new one, and opens none until somebody asks.
const ROUND: Duration = Duration::from_secs(1);

/// How long one address may take to answer a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long data that was sent may stay unacknowledged.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// When, how often and how many times a silent peer is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_RETRIES: u32 = 3;
/// What `postgres` says when the parameters do not name it.
const POSTGRES_KEEPALIVE_IDLE: Duration = Duration::from_hours(2);

/// Bounds the time that a dead network can take, where the caller has not.
pub(crate) fn bound_network_waits(config: &mut Config) {
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_USER_TIMEOUT);
    }
    if config.get_keepalives_idle() == POSTGRES_KEEPALIVE_IDLE {
        config.keepalives_idle(KEEPALIVE_IDLE);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(KEEPALIVE_INTERVAL);
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(KEEPALIVE_RETRIES);
    }
}

/// Takes a connection out of the pool, and waits for one until the deadline.
pub(crate) fn take<M: ManageConnection>(
    pool: &Pool<M>,
    deadline: Instant,
) -> Result<PooledConnection<M>, r2d2::Error> {
    let mut reason: Option<r2d2::Error> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = match pool.get_timeout(left.min(ROUND)) {
            Ok(connection) => return Ok(connection),
            Err(timeout) => timeout,
        };
        // r2d2 tells only once why an attempt to connect has failed.
        let told = match reason.take() {
            Some(earlier) if earlier.to_string().len() > timeout.to_string().len() => earlier,
            _ => timeout,
        };
        if left <= ROUND {
            return Err(told);
        }
        reason = Some(told);
    }
}

/// None of the pool's connections was given back in time.
#[derive(Debug, thiserror::Error)]
#[error("all connections of the pool are in use ({0})")]
pub(crate) struct AllInUse(pub(crate) u32);

/// Keeps what r2d2 only logs: why the last attempt to connect failed.
#[derive(Clone, Default)]
pub(crate) struct ConnectWatch(Arc<Watched>);

#[derive(Default)]
struct Watched {
    last: Mutex<Option<Attempt>>,
    changed: Condvar,
    shared_session: AtomicBool,
}

enum Attempt {
    Connected,
    Failed(Arc<postgres::Error>),
}

impl ConnectWatch {
    fn last(&self) -> MutexGuard<'_, Option<Attempt>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, attempt: Attempt) {
        *self.last() = Some(attempt);
        self.0.changed.notify_all();
    }

    /// Waits for the first attempt to end, either way.
    pub(crate) fn first_attempt(&self, timeout: Duration) -> Result<(), NoConnection> {
        let deadline = Instant::now() + timeout;
        let mut last = self.last();
        loop {
            match &*last {
                Some(Attempt::Connected) => return Ok(()),
                Some(Attempt::Failed(cause)) => {
                    return Err(NoConnection { cause: Some(Arc::clone(cause)) });
                }
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoConnection { cause: None });
            }
            let waited = self.0.changed.wait_timeout(last, left);
            last = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Why there is no connection to be had, if attempts to make one are failing.
    pub(crate) fn last_failure(&self) -> Option<NoConnection> {
        match &*self.last() {
            Some(Attempt::Failed(cause)) => Some(NoConnection { cause: Some(Arc::clone(cause)) }),
            _ => None,
        }
    }

    /// Fails once a new connection has been found to be another one's server session.
    pub(crate) fn sessions_of_our_own(&self) -> Result<(), SharedSession> {
        if self.0.shared_session.load(Ordering::Relaxed) {
            return Err(SharedSession { cause: None });
        }
        Ok(())
    }
}

/// Looks at each new connection of a store that keeps prepared statements.
///
/// The `postgres` crate names them `s0`, `s1` and so on, in every program alike. A server session
/// begins without any, so one that has such names is passed around by a pooler, and `s0` may be
/// another program's. A pooler that keeps its clients' statements apart gives them other names.
impl CustomizeConnection<Client, postgres::Error> for ConnectWatch {
    fn on_acquire(&self, client: &mut Client) -> Result<(), postgres::Error> {
        let sql = "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE name ~ '^s[0-9]+$')";
        if client.query_typed_one(sql, &[])?.try_get(0)? {
            self.0.shared_session.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Prepared statements cannot be kept here.
#[derive(Debug, thiserror::Error)]
#[error(
    "prepared statements of several clients meet in one server session: a pooler hands out \
     connections by the transaction, and prepared_statements(true) does not go with that"
)]
pub(crate) struct SharedSession {
    #[source]
    pub(crate) cause: Option<postgres::Error>,
}

impl fmt::Debug for ConnectWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectWatch")
    }
}

impl HandleError<postgres::Error> for ConnectWatch {
    fn handle_error(&self, error: postgres::Error) {
        self.record(Attempt::Failed(Arc::new(error)));
    }
}

impl HandleEvent for ConnectWatch {
    fn handle_acquire(&self, _: AcquireEvent) {
        self.record(Attempt::Connected);
    }
}

/// No connection could be made in time.
#[derive(Debug)]
pub(crate) struct NoConnection {
    cause: Option<Arc<postgres::Error>>,
}

impl fmt::Display for NoConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cause {
            Some(_) => "no connection could be made",
            None => "the server did not answer in time",
        })
    }
}

impl std::error::Error for NoConnection {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}
