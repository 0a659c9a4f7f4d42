//! The pool, whatever its type: how a connection is taken out, suspected, lost and replaced, and for
//! how long an operation tries again.

use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Row};
use r2d2::{CustomizeConnection, Extensions, ManageConnection, Pool, PooledConnection};

use super::close::close;
use super::connect::{ConnectError, Connector};
use super::failure::{Aftermath, Cause, Outcome, failure, is_refusal, no_connection};
use super::prepared::{Keeping, Prepared, SharedSession, is_shared, is_stale, name_the_pooler};
use super::session::{Parameters, Query, Session, Unnamed};
use crate::{Error, Result};

/// How long an operation waits and tries again, if the builder is told nothing else.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The time-out of the builder's pool itself. It is shorter because r2d2 pauses for up to half of
/// it between two attempts to connect, and so long does an outage seem to last after its end.
const POOL_TIMEOUT: Duration = Duration::from_secs(4);
/// How long to wait before the pool is asked anew. r2d2 wakes nobody when a dead connection leaves
/// room for a new one, and opens none until somebody asks.
const ROUND: Duration = Duration::from_secs(1);
/// For how long a connection that has worked is trusted to work still.
const TRUSTED: Duration = Duration::from_secs(1);
/// How long a suspect connection may take to answer.
const TEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The connections of one store and all its clones.
pub(crate) struct Connections {
    pool: Box<dyn AnyPool>,
    timeout: Duration,
    /// Whether statements are kept with the connections.
    prepares: bool,
    /// Where the builder has made the pool.
    ours: Option<Ours>,
    found: Arc<Found>,
}

/// What is known of connections that were made by the [`Manager`].
#[derive(Clone, Default)]
struct Ours {
    /// Why the last attempt to connect has failed, if it has.
    last_failure: Arc<Mutex<Option<Arc<ConnectError>>>>,
    /// Whether a new connection came upon the prepared statements of another.
    found_shared_session: Arc<AtomicBool>,
}

impl Connections {
    /// A pool of the builder's.
    pub(crate) fn open(connector: Connector, size: u32, timeout: Duration, prepares: bool) -> Self {
        let ours = Ours::default();
        let manager =
            Manager { connector, looks_for_shared_sessions: prepares, ours: ours.clone() };
        let pool = Pool::builder()
            .max_size(size)
            .min_idle(Some(0))
            .connection_timeout(POOL_TIMEOUT)
            .test_on_check_out(false)
            .error_handler(Box::new(r2d2::NopErrorHandler))
            .connection_customizer(Box::new(LetGo))
            .build_unchecked(manager);
        Self { pool: Box::new(pool), timeout, prepares, ours: Some(ours), found: Arc::default() }
    }

    /// A pool of the caller's own, and its time-out unless there is another.
    pub(crate) fn of<M>(pool: Pool<M>, timeout: Option<Duration>, prepares: bool) -> Self
    where
        M: ManageConnection<Connection = Client>,
    {
        let timeout = timeout.unwrap_or_else(|| pool.connection_timeout());
        Self { pool: Box::new(pool), timeout, prepares, ours: None, found: Arc::default() }
    }

    pub(crate) fn state(&self) -> r2d2::State {
        self.pool.state()
    }

    /// What was found out in the caller's transaction makes other connections suspect.
    pub(crate) fn note(&self, aftermath: Aftermath) {
        self.found.note(aftermath);
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience::for_the_next(self.timeout, self.pool.max_size())
    }

    /// Runs a statement that may run twice: after a lost connection it runs again, on a fresh one.
    pub(crate) fn run_until_answered<T>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        statement: impl FnMut(&mut PooledClient) -> Outcome<T>,
    ) -> Result<T> {
        self.run(PooledClient::may_be_read_only, Aftermath::is_final, operation, subject, statement)
    }

    /// Runs a statement that must not run twice: it runs again only if it has certainly not
    /// happened. A suspect connection is tested first.
    pub(crate) fn run_unless_lost<T>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        statement: impl FnMut(&mut PooledClient) -> Outcome<T>,
    ) -> Result<T> {
        let is_over = |aftermath: Aftermath| aftermath == Aftermath::Lost || aftermath.is_final();
        self.run(PooledClient::is_suspect, is_over, operation, subject, statement)
    }

    fn run<T>(
        &self,
        is_in_doubt: fn(&mut PooledClient) -> bool,
        is_over: fn(Aftermath) -> bool,
        operation: &'static str,
        subject: impl fmt::Display,
        mut statement: impl FnMut(&mut PooledClient) -> Outcome<T>,
    ) -> Result<T> {
        let mut patience = self.patience();
        let mut unfit = None;
        loop {
            let mut connection = self
                .check_out_unless(is_in_doubt, operation, &subject, &mut patience)
                .map_err(|none| told_before(unfit.take(), none, operation, &subject))?;
            let cause = match statement(&mut connection) {
                Ok(answer) => {
                    connection.mark_working();
                    return Ok(answer);
                }
                Err(cause) => cause,
            };
            let aftermath = connection.check_in_after(cause.as_ref());
            if is_over(aftermath) || !patience.pause() {
                return Err(failure(operation, subject, cause));
            }
            unfit = aftermath.is_of_the_connection().then_some(cause);
        }
    }

    /// Takes a connection that is known to work: a suspect one is tested, and replaced if it does
    /// not answer.
    pub(crate) fn check_out_tested(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        patience: &mut Patience,
    ) -> Result<PooledClient> {
        self.check_out_unless(PooledClient::is_suspect, operation, subject, patience)
    }

    /// Takes a connection, and where it is in doubt one that has been tested.
    fn check_out_unless(
        &self,
        is_in_doubt: fn(&mut PooledClient) -> bool,
        operation: &'static str,
        subject: impl fmt::Display,
        patience: &mut Patience,
    ) -> Result<PooledClient> {
        loop {
            let mut connection = self.check_out(operation, &subject, patience)?;
            if !is_in_doubt(&mut connection) {
                return Ok(connection);
            }
            let tested = connection.is_valid(TEST_TIMEOUT);
            match tested.and_then(|()| connection.has_become_read_only()) {
                Ok(false) => {
                    connection.mark_tested();
                    return Ok(connection);
                }
                Ok(true) => connection.item.throw_away(Responsive::Yes),
                Err(cause) => {
                    connection.item.throw_away(Responsive::No);
                    if !patience.pause() {
                        return Err(no_connection(operation, subject, cause));
                    }
                }
            }
        }
    }

    /// Takes a connection, and waits for one until the deadline, unless there is no hope.
    fn check_out(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        patience: &Patience,
    ) -> Result<PooledClient> {
        let mut reason: Option<r2d2::Error> = None;
        let item = loop {
            let left = patience.deadline.saturating_duration_since(Instant::now());
            let timeout = match self.pool.get_timeout(left.min(ROUND)) {
                Ok(item) => break item,
                Err(timeout) => timeout,
            };
            // r2d2 puts into one message, and one only, why an attempt to connect has failed: keep
            // the one that has it, which is the longer one.
            let told = match reason.take() {
                Some(earlier) if earlier.to_string().len() > timeout.to_string().len() => earlier,
                _ => timeout,
            };
            if left <= ROUND || self.is_hopeless() {
                return Err(self.none_to_be_had(operation, subject, told));
            }
            reason = Some(told);
        };
        if self.ours.as_ref().is_some_and(Ours::found_shared_session) {
            return Err(failure(operation, subject, SharedSession { cause: None }));
        }
        Ok(PooledClient { item, prepares: self.prepares, found: Arc::clone(&self.found) })
    }

    /// A refused password, say: no connection is left to come back, and waiting brings no new one.
    fn is_hopeless(&self) -> bool {
        let last_failure = self.ours.as_ref().and_then(|ours| ours.last_failure().clone());
        self.pool.state().connections == 0
            && last_failure.is_some_and(|cause| is_refusal(&NoConnection(cause)))
    }

    fn none_to_be_had(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        timeout: r2d2::Error,
    ) -> Error {
        let size = self.pool.max_size();
        let cause: Cause = if self.pool.state().connections == size {
            AllInUse(size).into()
        } else {
            match self.ours.as_ref().and_then(|ours| ours.last_failure().clone()) {
                Some(cause) => NoConnection(cause).into(),
                None => timeout.into(),
            }
        };
        no_connection(operation, subject, cause)
    }
}

/// When the time is over while a connection is made in place of one that was thrown away: why that was
/// says more than that there is none.
fn told_before(
    unfit: Option<Cause>,
    none: Error,
    operation: &'static str,
    subject: impl fmt::Display,
) -> Error {
    match unfit {
        Some(cause) => failure(operation, subject, cause),
        None => none,
    }
}

impl Ours {
    fn last_failure(&self) -> MutexGuard<'_, Option<Arc<ConnectError>>> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found_shared_session(&self) -> bool {
        self.found_shared_session.load(Ordering::Relaxed)
    }
}

/// How long one operation goes on trying, and how long it pauses before it tries again.
pub(crate) struct Patience {
    deadline: Instant,
    tries_at_once: u32,
    next_pause: Duration,
}

impl Patience {
    const FIRST_PAUSE: Duration = Duration::from_millis(5);
    const LONGEST_PAUSE: Duration = Duration::from_millis(200);
    /// For an `Instant` that cannot be so far away.
    const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

    /// Does not pause while what fails may be one of the pool's idle connections after another.
    fn for_the_next(time: Duration, connections: u32) -> Self {
        let deadline = Self::deadline(time);
        Self { deadline, tries_at_once: connections, next_pause: Self::FIRST_PAUSE }
    }

    pub(crate) fn deadline(time: Duration) -> Instant {
        Instant::now() + time.min(Self::FOR_EVER)
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

/// When one connection last told of what may have happened to the others.
#[derive(Default)]
struct Found {
    loss: Last,
    read_only: Last,
}

impl Found {
    fn note(&self, aftermath: Aftermath) {
        match aftermath {
            Aftermath::Lost => self.loss.is_now(),
            Aftermath::ReadOnly => self.read_only.is_now(),
            Aftermath::Unfit | Aftermath::RolledBack | Aftermath::Refused => {}
        }
    }
}

/// When something has happened for the last time.
#[derive(Default)]
struct Last(Mutex<Option<Instant>>);

impl Last {
    fn is_now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_before(&self, moment: Instant) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_none_or(|last| last < moment)
    }
}

/// A connection of the store's pool; made by
/// [`connection`](super::PostgresCheckpointStore::connection). It is a [`postgres::Client`], and goes
/// back to the pool when it is dropped.
///
/// # Examples
///
/// ```no_run
/// use checkpoint_store::{PooledClient, PostgresCheckpointStore};
///
/// fn count(client: &mut PooledClient) -> checkpoint_store::Result<i64> {
///     Ok(client.query_one("SELECT count(*) FROM orders", &[])?.get(0))
/// }
///
/// let store = PostgresCheckpointStore::connect("host=localhost user=app")?;
/// println!("{} orders", count(&mut store.connection()?)?);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
pub struct PooledClient {
    item: Box<dyn Item>,
    pub(crate) prepares: bool,
    found: Arc<Found>,
}

/// Kept with a connection: when it was last known to work, and since when it is known to lead where
/// one can write, as far as anybody has noticed.
#[derive(Clone, Copy, Default)]
struct Known(Option<Times>);

#[derive(Clone, Copy)]
struct Times {
    worked: Instant,
    writable_since: Instant,
}

impl PooledClient {
    /// What r2d2 keeps with the connection for as long as it lives.
    pub(crate) fn kept<T: Default + Send + Sync + 'static>(&mut self) -> &mut T {
        let kept = self.item.extensions();
        if kept.get::<T>().is_none() {
            kept.insert(T::default());
        }
        kept.get_mut().unwrap_or_else(|| unreachable!("it was inserted just now"))
    }

    pub(crate) fn forget<T: Send + Sync + 'static>(&mut self) {
        self.item.extensions().remove::<T>();
    }

    /// Whether it may be lost, or lead to a server that has become read-only.
    fn is_suspect(&mut self) -> bool {
        let Known(times) = *self.kept();
        self.may_be_read_only()
            || times.is_none_or(|Times { worked, .. }| {
                worked.elapsed() >= TRUSTED || !self.found.loss.is_before(worked)
            })
    }

    /// Whether it is from before a server was found to be read-only. One that has been made since
    /// leads to where the parameters lead now, whatever that is.
    fn may_be_read_only(&mut self) -> bool {
        let Known(times) = *self.kept();
        times.is_some_and(|Times { writable_since, .. }| {
            !self.found.read_only.is_before(writable_since)
        })
    }

    /// Asked of no other: what a fresh one leads to is for the caller's statement to find out.
    fn has_become_read_only(&mut self) -> Result<bool, postgres::Error> {
        if !self.may_be_read_only() {
            return Ok(false);
        }
        let sql = "SELECT pg_catalog.current_setting('transaction_read_only') = 'on'";
        self.query_typed_one(sql, &[])?.try_get(0)
    }

    pub(crate) fn mark_working(&mut self) {
        let now = Instant::now();
        let Known(times) = self.kept();
        times.get_or_insert(Times { worked: now, writable_since: now }).worked = now;
    }

    fn mark_tested(&mut self) {
        let now = Instant::now();
        *self.kept() = Known(Some(Times { worked: now, writable_since: now }));
    }

    /// Gives the connection back, or throws it away if this has made it useless.
    pub(crate) fn check_in_after(mut self, cause: &(dyn std::error::Error + 'static)) -> Aftermath {
        let aftermath = Aftermath::of(cause);
        self.found.note(aftermath);
        match aftermath {
            Aftermath::Lost => self.item.throw_away(Responsive::No),
            Aftermath::Unfit | Aftermath::ReadOnly => self.item.throw_away(Responsive::Yes),
            Aftermath::RolledBack | Aftermath::Refused => {}
        }
        aftermath
    }
}

/// With prepared statements if the store wants them.
impl Session for PooledClient {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        if !self.prepares {
            return Unnamed(&mut **self).query(query, parameters);
        }
        with_statements(self, |mut keeping| keeping.query(query, parameters))
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        if !self.prepares {
            return Unnamed(&mut **self).execute(query, parameters);
        }
        with_statements(self, |mut keeping| keeping.execute(query, parameters))
    }
}

/// Runs a query with the statements of the connection. One that the server does not know any more,
/// or would not run again, has done nothing: so it is prepared anew and run once more.
fn with_statements<T>(
    connection: &mut PooledClient,
    run_query: impl Fn(Keeping<'_, Client>) -> Outcome<T>,
) -> Outcome<T> {
    let mut statements = mem::take(connection.kept::<Prepared>());
    let mut outcome = run_query(Keeping { client: connection, statements: &mut statements });
    if outcome.as_ref().is_err_and(|cause| is_stale(cause.as_ref())) {
        statements = Prepared::default();
        outcome = run_query(Keeping { client: connection, statements: &mut statements });
    }
    *connection.kept() = statements;
    outcome.map_err(name_the_pooler)
}

impl Deref for PooledClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.item.client()
    }
}

impl DerefMut for PooledClient {
    fn deref_mut(&mut self) -> &mut Client {
        self.item.client_mut()
    }
}

impl Drop for PooledClient {
    fn drop(&mut self) {
        // Whatever the caller has run on it may have lost it.
        if self.is_closed() {
            self.found.loss.is_now();
        }
    }
}

impl fmt::Debug for PooledClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledClient").field("is_closed", &self.is_closed()).finish_non_exhaustive()
    }
}

/// r2d2's pool, without the type of what manages its connections.
trait AnyPool: Send + Sync {
    fn get_timeout(&self, timeout: Duration) -> Result<Box<dyn Item>, r2d2::Error>;
    fn state(&self) -> r2d2::State;
    fn max_size(&self) -> u32;
}

impl<M> AnyPool for Pool<M>
where
    M: ManageConnection,
    M::Connection: Connection,
{
    fn get_timeout(&self, timeout: Duration) -> Result<Box<dyn Item>, r2d2::Error> {
        Ok(Box::new(Pool::get_timeout(self, timeout)?))
    }

    fn state(&self) -> r2d2::State {
        Pool::state(self)
    }

    fn max_size(&self) -> u32 {
        Pool::max_size(self)
    }
}

/// What r2d2's pool gives out, without that type.
trait Item: Send {
    fn client(&self) -> &Client;
    fn client_mut(&mut self) -> &mut Client;
    fn extensions(&mut self) -> &mut Extensions;
    /// Keeps the connection from being given out again.
    fn throw_away(&mut self, server: Responsive);
}

impl<M> Item for PooledConnection<M>
where
    M: ManageConnection,
    M::Connection: Connection,
{
    fn client(&self) -> &Client {
        (**self).client()
    }

    fn client_mut(&mut self) -> &mut Client {
        (**self).client_mut()
    }

    fn extensions(&mut self) -> &mut Extensions {
        PooledConnection::extensions_mut(self)
    }

    fn throw_away(&mut self, server: Responsive) {
        PooledConnection::extensions_mut(self).remove::<Known>();
        (**self).throw_away(server);
    }
}

/// Whether the server answers on the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Responsive {
    Yes,
    No,
}

/// What a pool holds: a plain client in a pool of the caller's, and one of ours.
trait Connection: Send + 'static {
    fn client(&self) -> &Client;
    fn client_mut(&mut self) -> &mut Client;
    fn throw_away(&mut self, server: Responsive);
}

impl Connection for Client {
    fn client(&self) -> &Client {
        self
    }

    fn client_mut(&mut self) -> &mut Client {
        self
    }

    /// The manager of the caller's pool decides what is thrown away, and what it knows of is a closed
    /// connection. One that does not answer stays, suspect, until TCP gives up on it.
    fn throw_away(&mut self, server: Responsive) {
        if server == Responsive::Yes {
            // It ends this very session, so there is no other answer than an error.
            let _ = self.batch_execute("ROLLBACK; SELECT pg_terminate_backend(pg_backend_pid())");
            // And it is seen to be closed only by who asks once more.
            let _ = self.batch_execute("");
        }
    }
}

/// A connection of the builder's pool.
struct Disposable {
    client: Client,
    thrown_away: bool,
}

impl Connection for Disposable {
    fn client(&self) -> &Client {
        &self.client
    }

    fn client_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    fn throw_away(&mut self, _: Responsive) {
        self.thrown_away = true;
    }
}

/// Lets go of connections without waiting for them: to drop a client is to wait until its last request
/// is answered, and that of a server that stands still never is.
#[derive(Debug)]
struct LetGo;

impl CustomizeConnection<Disposable, NoConnection> for LetGo {
    fn on_release(&self, connection: Disposable) {
        if connection.thrown_away && !connection.client.is_closed() {
            close(connection.client);
        }
    }
}

/// Makes the connections of the builder's pool.
struct Manager {
    connector: Connector,
    looks_for_shared_sessions: bool,
    ours: Ours,
}

impl Manager {
    fn client(&self) -> Result<Client, ConnectError> {
        let mut client = self.connector.connect(Instant::now() + DEFAULT_TIMEOUT)?;
        if self.looks_for_shared_sessions && is_shared(&mut client)? {
            self.ours.found_shared_session.store(true, Ordering::Relaxed);
        }
        Ok(client)
    }
}

impl ManageConnection for Manager {
    type Connection = Disposable;
    type Error = NoConnection;

    fn connect(&self) -> Result<Disposable, NoConnection> {
        match self.client() {
            Ok(client) => {
                *self.ours.last_failure() = None;
                Ok(Disposable { client, thrown_away: false })
            }
            Err(error) => {
                let error = Arc::new(error);
                *self.ours.last_failure() = Some(Arc::clone(&error));
                Err(NoConnection(error))
            }
        }
    }

    fn is_valid(&self, connection: &mut Disposable) -> Result<(), NoConnection> {
        let tested = connection.client.is_valid(TEST_TIMEOUT);
        tested.map_err(|error| NoConnection(Arc::new(error.into())))
    }

    fn has_broken(&self, connection: &mut Disposable) -> bool {
        connection.thrown_away || connection.client.is_closed()
    }
}

/// No connection could be made. Whoever waits for one is told the same cause.
#[derive(Debug)]
struct NoConnection(Arc<ConnectError>);

impl fmt::Display for NoConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the pool has none")
    }
}

impl std::error::Error for NoConnection {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

/// None of the pool's connections was given back in time.
#[derive(Debug, thiserror::Error)]
#[error("all connections of the pool are in use ({0}), perhaps by the calling thread itself")]
struct AllInUse(u32);
