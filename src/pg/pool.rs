use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Config};
use r2d2::event::AcquireEvent;
use r2d2::{HandleError, HandleEvent, ManageConnection, Pool, PooledConnection};
use r2d2_postgres::PostgresConnectionManager;

/// How long an operation waits for a connection of a pool that the builder made.
pub(crate) const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
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

/// How long one operation goes on trying, and how long it pauses before it tries again.
pub(crate) struct Patience {
    pub(crate) deadline: Instant,
    tries_at_once: u32,
    next_pause: Duration,
}

impl Patience {
    const FIRST_PAUSE: Duration = Duration::from_millis(5);
    const LONGEST_PAUSE: Duration = Duration::from_millis(200);

    /// Does not pause while what fails may be one of the pool's idle connections after another.
    pub(crate) fn until(deadline: Instant, connections: u32) -> Self {
        Self { deadline, tries_at_once: connections, next_pause: Self::FIRST_PAUSE }
    }

    /// Pauses before the next try; `false` when there is no time for one.
    pub(crate) fn pause(&mut self) -> bool {
        let mut pause = Duration::ZERO;
        if self.tries_at_once > 0 {
            self.tries_at_once -= 1;
        } else {
            pause = self.next_pause;
            self.next_pause = (pause * 2).min(Self::LONGEST_PAUSE);
        }
        let in_time = Instant::now() + pause < self.deadline;
        if in_time {
            thread::sleep(pause);
        }
        in_time
    }
}

/// Takes a connection out of the pool, and waits for one until the deadline, unless there is no hope.
pub(crate) fn take<M: ManageConnection>(
    pool: &Pool<M>,
    deadline: Instant,
    hopeless: impl Fn() -> bool,
) -> Result<PooledConnection<M>, r2d2::Error> {
    let mut reason: Option<r2d2::Error> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = match pool.get_timeout(left.min(ROUND)) {
            Ok(connection) => return Ok(connection),
            Err(timeout) => timeout,
        };
        // r2d2 puts into one message, and one only, why an attempt to connect has failed: keep the
        // one that has it, which is the longer one.
        let told = match reason.take() {
            Some(earlier) if earlier.to_string().len() > timeout.to_string().len() => earlier,
            _ => timeout,
        };
        if left <= ROUND || hopeless() {
            return Err(told);
        }
        reason = Some(told);
    }
}

/// None of the pool's connections was given back in time.
#[derive(Debug, thiserror::Error)]
#[error("all connections of the pool are in use ({0}), perhaps by the calling thread itself")]
pub(crate) struct AllInUse(pub(crate) u32);

/// Makes one connection, to hear at once what is wrong with it. In a thread of its own, for nothing
/// else bounds how long a server that stands still may take; and not by the pool, whose threads
/// would live on for half a minute when there is no store in the end.
pub(crate) fn connect_within<T>(
    timeout: Duration,
    manager: PostgresConnectionManager<T>,
) -> Result<Client, NoConnection>
where
    PostgresConnectionManager<T>: ManageConnection<Connection = Client, Error = postgres::Error>,
{
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        // Nobody listens any more when the time is over.
        let _ = sender.send(manager.connect());
    });
    match receiver.recv_timeout(timeout) {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(cause)) => Err(NoConnection { cause: Some(Arc::new(cause)) }),
        Err(_) => Err(NoConnection { cause: None }),
    }
}

/// Keeps what r2d2 only logs: why the last attempt to connect failed, if it did.
#[derive(Clone, Default)]
pub(crate) struct ConnectWatch(Arc<Mutex<Option<Arc<postgres::Error>>>>);

impl ConnectWatch {
    fn last(&self) -> MutexGuard<'_, Option<Arc<postgres::Error>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn last_failure(&self) -> Option<NoConnection> {
        self.last().clone().map(|cause| NoConnection { cause: Some(cause) })
    }
}

impl fmt::Debug for ConnectWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectWatch")
    }
}

impl HandleError<postgres::Error> for ConnectWatch {
    fn handle_error(&self, error: postgres::Error) {
        *self.last() = Some(Arc::new(error));
    }
}

impl HandleEvent for ConnectWatch {
    fn handle_acquire(&self, _: AcquireEvent) {
        *self.last() = None;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_network_is_bounded_where_the_caller_has_not_bounded_it() {
        let bounds = |params: &str| -> Result<_, postgres::Error> {
            let mut config = params.parse()?;
            bound_network_waits(&mut config);
            Ok((
                config.get_connect_timeout().copied(),
                config.get_tcp_user_timeout().copied(),
                config.get_keepalives_idle(),
                config.get_keepalives_interval(),
                config.get_keepalives_retries(),
            ))
        };
        let seconds = Duration::from_secs;
        assert_eq!(
            bounds("host=localhost").expect("valid parameters"),
            (Some(seconds(4)), Some(seconds(10)), seconds(10), Some(seconds(3)), Some(3))
        );
        let of_the_callers = "host=localhost connect_timeout=61 tcp_user_timeout=62 \
                              keepalives_idle=63 keepalives_interval=64 keepalives_retries=65";
        assert_eq!(
            bounds(of_the_callers).expect("valid parameters"),
            (Some(seconds(61)), Some(seconds(62)), seconds(63), Some(seconds(64)), Some(65))
        );
    }
}
