//! A connection on loan: what is known of it, and of the others of its pool, and whether it can be trusted.

use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postgres::{Client, Row};

use super::errors::{ErrorClass, Outcome};
use super::pool::{Loan, Peer, Pool};
use super::prepared::name_the_pooler;
use super::retry::{Call, NOTICE_AFTER};
use super::session::{DirectSession, Parameters, Query, Session, StatementCache, is_stale};
use crate::sync::lock;

/// A connection that was used less than this time ago is used without a test.
pub(crate) const TRUSTED: Duration = Duration::from_secs(1);
/// The same before a write that is repeated only if the row shows that this undoes nothing: what is lost
/// before anything was sent needs no proof.
pub(crate) const TRUSTED_BEFORE_A_WRITE: Duration = Duration::from_millis(25);
/// How long a suspect connection may take to answer its test, and for how long it is asked at least.
const LONGEST_TEST: Duration = Duration::from_secs(2);
const SHORTEST_TEST: Duration = Duration::from_millis(200);

/// A connection of the store's pool; made by
/// [`connection`](super::PostgresCheckpointStore::connection). It is a [`postgres::Client`], and goes
/// back to the pool when it is dropped.
///
/// It may be dropped on any thread: to close a connection is left to a thread of the store's.
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
    /// `None` only while it is dropped or discarded.
    loan: Option<Box<dyn Loan>>,
    pub(crate) prepares: bool,
    /// When it was taken from the pool: before anything is sent.
    taken: Instant,
    history: Arc<History>,
    /// Keeps the pool until the connection is back, so that it is not closed on the caller's thread.
    _pool: Arc<Pool>,
}

/// What the store knows of a connection that it has used; kept with it.
#[derive(Clone, Copy)]
struct Times {
    /// When it was last taken, and has answered since.
    last_used: Instant,
    /// Since when it has led to a server that takes writes, as far as anybody has found out.
    writable_since: Instant,
}

/// When one connection of a pool last told what holds for the others, too.
#[derive(Debug, Default)]
pub(crate) struct History {
    loss: Moment,
    read_only: Moment,
    /// When a test began that was not answered in time.
    unanswered: Moment,
}

impl History {
    pub(crate) fn note(&self, class: ErrorClass) {
        match class {
            ErrorClass::ConnectionLost | ErrorClass::IdleSessionEnded => {
                self.loss.set(Instant::now());
            }
            ErrorClass::ReadOnly => self.read_only.set(Instant::now()),
            ErrorClass::AbortedTransaction | ErrorClass::RolledBack | ErrorClass::Permanent => {}
        }
    }
}

#[derive(Debug, Default)]
struct Moment(Mutex<Option<Instant>>);

impl Moment {
    fn set(&self, moment: Instant) {
        *lock(&self.0) = Some(moment);
    }

    fn is_before(&self, other: Instant) -> bool {
        let moment = *lock(&self.0);
        moment.is_none_or(|moment| moment < other)
    }
}

impl PooledClient {
    pub(crate) fn new(
        loan: Box<dyn Loan>,
        prepares: bool,
        history: &Arc<History>,
        pool: &Arc<Pool>,
    ) -> Self {
        Self {
            loan: Some(loan),
            prepares,
            taken: Instant::now(),
            history: Arc::clone(history),
            _pool: Arc::clone(pool),
        }
    }

    fn loan(&mut self) -> &mut dyn Loan {
        match &mut self.loan {
            Some(loan) => &mut **loan,
            None => unreachable!("it is taken only when it is dropped"),
        }
    }

    /// When it was taken from the pool: before anything was sent.
    pub(crate) fn taken(&self) -> Instant {
        self.taken
    }

    /// What the pool keeps with the connection for as long as it lives.
    pub(crate) fn kept<T: Default + Send + Sync + 'static>(&mut self) -> &mut T {
        let kept = self.loan().extensions();
        if kept.get::<T>().is_none() {
            kept.insert(T::default());
        }
        kept.get_mut().unwrap_or_else(|| unreachable!("it was inserted just now"))
    }

    /// Runs something with the connection and, if the store prepares, with its statement cache.
    pub(crate) fn with_cache<T>(
        &mut self,
        run: impl FnOnce(&mut Client, Option<&mut StatementCache>) -> T,
    ) -> T {
        if !self.prepares {
            return run(self, None);
        }
        let mut cache = mem::take(self.kept::<StatementCache>());
        let outcome = run(self, Some(&mut cache));
        *self.kept() = cache;
        outcome
    }

    fn times(&mut self) -> Option<Times> {
        *self.kept()
    }

    /// The connection, if it can be trusted or passes its test; `None` if it was discarded.
    pub(crate) fn tested(
        mut self,
        trusted: Duration,
        call: &mut Call<'_>,
    ) -> crate::Result<Option<Self>> {
        if !self.is_suspect(trusted) {
            return Ok(Some(self));
        }
        if self.is_presumed_dead() {
            self.discard(Peer::Unresponsive);
            return Ok(None);
        }
        // Half of the time is left to make a connection in its place.
        let limit = (call.left() / 2).clamp(SHORTEST_TEST, LONGEST_TEST);
        match self.test(limit, |cause| call.observe(call.no_connection(cause))) {
            Ok(true) => {
                self.mark_tested();
                return Ok(Some(self));
            }
            Ok(false) => self.discard(Peer::Responsive),
            Err(cause) => {
                self.discard(Peer::Unresponsive);
                call.end_if_time_is_over(call.no_connection(cause))?;
            }
        }
        Ok(None)
    }

    /// Whether it may be lost, or lead to a server that has become read-only. To find that out before
    /// anything is sent costs a round trip; afterwards it may be unknown whether a write was executed.
    fn is_suspect(&mut self, trusted: Duration) -> bool {
        let taken = self.taken;
        self.may_be_read_only()
            || self.times().is_none_or(|Times { last_used, .. }| {
                taken.saturating_duration_since(last_used) >= trusted
                    || !self.history.loss.is_before(last_used)
            })
    }

    /// Whether it has been idle since before another one did not answer. Whatever dropped that one in
    /// silence, a NAT or a firewall, has dropped this one too, and a test would take its whole time.
    fn is_presumed_dead(&mut self) -> bool {
        self.times().is_some_and(|times| !self.history.unanswered.is_before(times.last_used))
    }

    /// Whether it is from before a server was found to be read-only. One that was made since then leads
    /// to where the parameters lead now, whatever that is.
    fn may_be_read_only(&mut self) -> bool {
        self.times().is_some_and(|times| !self.history.read_only.is_before(times.writable_since))
    }

    /// Whether it answers within the time, and, if that is in doubt, whether its server takes writes. Only
    /// the first question has a time limit, so it comes first. `waiting` is called if that takes almost a second.
    fn test(
        &mut self,
        limit: Duration,
        waiting: impl FnOnce(postgres::Error),
    ) -> Result<bool, postgres::Error> {
        let is_unanswered =
            |error: &postgres::Error| error.as_db_error().is_none() && !error.is_closed();
        let began = Instant::now();
        let answer = match self.is_valid(limit.min(NOTICE_AFTER)) {
            Err(error) if is_unanswered(&error) && limit > NOTICE_AFTER => {
                waiting(error);
                self.is_valid(limit.saturating_sub(NOTICE_AFTER))
            }
            answer => answer,
        };
        if let Err(error) = answer {
            if is_unanswered(&error) {
                self.history.unanswered.set(began);
            }
            self.history.note(ErrorClass::ConnectionLost);
            return Err(error);
        }
        Ok(!self.may_be_read_only() || takes_writes(self)?)
    }

    /// It has answered a request that was sent after it was taken.
    pub(crate) fn mark_used(&mut self) {
        let taken = self.taken;
        let new = Times { last_used: taken, writable_since: taken };
        self.kept::<Option<Times>>().get_or_insert(new).last_used = taken;
    }

    /// It was made or tested just now.
    pub(crate) fn mark_tested(&mut self) {
        let now = Instant::now();
        self.taken = now;
        *self.kept() = Some(Times { last_used: now, writable_since: now });
    }

    /// Gives the connection back, or discards it if the error has made it useless.
    pub(crate) fn check_in_after(self, cause: &(dyn std::error::Error + 'static)) -> ErrorClass {
        let class = ErrorClass::of(cause);
        self.history.note(class);
        match class {
            ErrorClass::ConnectionLost | ErrorClass::IdleSessionEnded => {
                self.discard(Peer::Unresponsive);
            }
            ErrorClass::AbortedTransaction | ErrorClass::ReadOnly => self.discard(Peer::Responsive),
            ErrorClass::RolledBack | ErrorClass::Permanent => {}
        }
        class
    }

    /// Keeps the connection from being lent again.
    pub(crate) fn discard(mut self, peer: Peer) {
        if let Some(loan) = self.loan.take() {
            loan.discard(peer);
        }
    }
}

/// Whether the server takes writes at the moment, outside of a transaction.
pub(crate) fn takes_writes(client: &mut Client) -> Result<bool, postgres::Error> {
    let sql = "SELECT pg_catalog.current_setting('transaction_read_only')::pg_catalog.text";
    let setting: String = client.query_typed_one(sql, &[])?.try_get(0)?;
    Ok(setting == "off")
}

/// With the statement cache of the connection if the store prepares. A statement that the server has forgotten,
/// or would not run again, was not executed; so it is prepared again and runs once more.
impl Session for PooledClient {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        self.with_cache(|client, cache| {
            let mut session = DirectSession { client, cache };
            let mut outcome = session.query(query, parameters);
            let Some(cache) = &mut session.cache else { return outcome };
            if outcome.as_ref().is_err_and(|cause| is_stale(cause.as_ref())) {
                cache.clear(false);
                outcome = session.query(query, parameters);
            }
            outcome.map_err(name_the_pooler)
        })
    }
}

impl Deref for PooledClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        match self.loan.as_ref().and_then(|loan| loan.client()) {
            Some(client) => client,
            None => unreachable!("a slot is filled before it becomes a client"),
        }
    }
}

impl DerefMut for PooledClient {
    fn deref_mut(&mut self) -> &mut Client {
        match self.loan.as_mut().and_then(|loan| loan.client_mut()) {
            Some(client) => client,
            None => unreachable!("a slot is filled before it becomes a client"),
        }
    }
}

impl Drop for PooledClient {
    fn drop(&mut self) {
        // The caller's own statements may have found out that connections are being lost.
        if self.loan.is_some() && self.is_closed() {
            self.history.note(ErrorClass::ConnectionLost);
        }
    }
}

impl fmt::Debug for PooledClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledClient").field("is_closed", &self.is_closed()).finish_non_exhaustive()
    }
}
