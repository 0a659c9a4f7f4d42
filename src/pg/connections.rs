//! The one loop in which every operation runs: take a connection that works, run the statement, and decide
//! whether a failure is followed by another attempt.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use r2d2::ManageConnection;

use super::client::{History, PooledClient, TRUSTED, TRUSTED_BEFORE_A_WRITE};
use super::close::close;
use super::connect::Connector;
use super::connect_error::{AllInUse, ConnectError, NoConnection, Outage, no_connection};
use super::errors::{Cause, ErrorClass, Outcome, failure, names_its_cause};
use super::logins::Logins;
use super::pool::{Loan, Peer, Pool};
use super::prepared::SharedSession;
use super::retry::{Next, Observer, Retries, deadline_after};
use crate::Result;

/// How long an operation waits and retries, unless the builder is given another time.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait before the pool is asked again: r2d2 wakes no waiting call when a broken connection
/// leaves room for a new one.
const ROUND: Duration = Duration::from_secs(1);
/// How long a suspect connection may take to answer its test, and for how long it is asked at least.
const LONGEST_TEST: Duration = Duration::from_secs(2);
const SHORTEST_TEST: Duration = Duration::from_millis(200);

/// The connections of one store and all its clones.
pub(crate) struct Connections {
    pool: Arc<Pool>,
    timeout: Duration,
    /// Whether statements are prepared and kept with the connections.
    prepares: bool,
    observer: Option<Arc<Observer>>,
    history: Arc<History>,
    /// Why no connection could be made last, until one can: for the calls that wait for one meanwhile.
    outage: Mutex<Option<Arc<Outage>>>,
    /// `None` where the manager of the caller's pool makes the connections.
    logins: Option<Logins>,
}

/// What a statement may do after it was lost with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterLoss {
    /// Run again: it only reads, or does the same however often it runs.
    Repeat,
    /// Run again as a statement that finds out whether it may.
    RepeatIfUnwritten,
    /// Be reported: it may have been executed.
    Fail,
}

impl Connections {
    /// A pool of the builder's, with a first connection in it.
    pub(crate) fn open(
        connector: Connector,
        first: Client,
        size: u32,
        timeout: Duration,
        prepares: bool,
    ) -> Outcome<Self> {
        /// A slot is there as soon as a thread of r2d2 has run.
        const TIME_FOR_A_SLOT: Duration = Duration::from_secs(1);
        let pool = match Pool::with_slots(size) {
            Ok(pool) => pool,
            Err(error) => {
                close(first);
                return Err(error.into());
            }
        };
        let connections = Self {
            pool: Arc::new(pool),
            timeout,
            prepares,
            observer: None,
            history: Arc::default(),
            outage: Mutex::default(),
            logins: Some(Logins::new(connector, prepares)),
        };
        match connections.pool.take(TIME_FOR_A_SLOT) {
            Ok(mut slot) => {
                slot.fill(first);
                connections.lend(slot).mark_tested();
            }
            Err(_) => close(first),
        }
        Ok(connections)
    }

    /// A pool of the caller's, and its time-out unless there is another.
    pub(crate) fn of<M>(pool: r2d2::Pool<M>, timeout: Option<Duration>, prepares: bool) -> Self
    where
        M: ManageConnection<Connection = Client>,
    {
        Self {
            timeout: timeout.unwrap_or_else(|| pool.connection_timeout()),
            pool: Arc::new(Pool::of_the_caller(pool)),
            prepares,
            observer: None,
            history: Arc::default(),
            outage: Mutex::default(),
            logins: None,
        }
    }

    pub(crate) fn observed_by(mut self, observer: Option<Arc<Observer>>) -> Self {
        self.observer = observer;
        self
    }

    pub(crate) fn state(&self) -> r2d2::State {
        self.pool.state()
    }

    /// What was found out in the caller's transaction makes other connections suspect.
    pub(crate) fn note(&self, class: ErrorClass) {
        self.history.note(class);
    }

    /// The deadline of a call that begins now.
    pub(crate) fn deadline(&self) -> Instant {
        deadline_after(self.timeout)
    }

    /// The attempts of a call that begins now.
    pub(crate) fn call(&self) -> Retries<'_> {
        self.call_until(self.deadline())
    }

    pub(crate) fn call_until(&self, deadline: Instant) -> Retries<'_> {
        Retries::until(deadline, self.observer.as_deref())
    }

    /// Tells the observer of a call that waits for others why they wait, if no connection can be made.
    pub(crate) fn observe_outage(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        retries: &mut Retries<'_>,
    ) {
        let outage = self.outage().clone();
        if let Some(cause) = outage {
            retries.observe(no_connection(operation, subject, NoConnection(cause)));
        }
    }

    /// Runs a statement until it is executed or refused, or the time is over. `lost` is when an earlier
    /// attempt began that may have been executed; the statement is told.
    pub(crate) fn run<T>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        retries: &mut Retries<'_>,
        after_loss: AfterLoss,
        mut lost: Option<Instant>,
        mut statement: impl FnMut(&mut PooledClient, Option<Instant>) -> Outcome<T>,
    ) -> Result<T> {
        loop {
            let trusted = match after_loss {
                AfterLoss::RepeatIfUnwritten => TRUSTED_BEFORE_A_WRITE,
                AfterLoss::Repeat | AfterLoss::Fail => TRUSTED,
            };
            let mut client = self.client_trusted_for(trusted, operation, &subject, retries)?;
            let taken = client.taken();
            let cause = match statement(&mut client, lost) {
                Ok(answer) => {
                    client.mark_used();
                    return Ok(answer);
                }
                Err(cause) => cause,
            };
            let class = client.check_in_after(cause.as_ref());
            let mut error = failure(operation, &subject, cause);
            if lost.is_some() {
                error = error.with_unknown_outcome();
            }
            if class == ErrorClass::ConnectionLost {
                lost.get_or_insert(taken);
            }
            thread::sleep(retries.after(error, next_after(class, after_loss))?);
        }
    }

    /// Takes a connection that is known to work: a suspect one is tested, and replaced if it does not
    /// answer. A connection that fails its test is not an attempt of the call.
    pub(crate) fn client(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        retries: &mut Retries<'_>,
    ) -> Result<PooledClient> {
        self.client_trusted_for(TRUSTED, operation, subject, retries)
    }

    fn client_trusted_for(
        &self,
        trusted: Duration,
        operation: &'static str,
        subject: impl fmt::Display,
        retries: &mut Retries<'_>,
    ) -> Result<PooledClient> {
        loop {
            if self.logins.as_ref().is_some_and(Logins::found_shared_session) {
                return Err(failure(operation, subject, SharedSession { cause: None }));
            }
            let left = retries.left();
            let mut loan = match self.pool.take(left.min(ROUND)) {
                Ok(loan) => {
                    if self.logins.is_none() {
                        *self.outage() = None;
                    }
                    loan
                }
                Err(timeout) => {
                    let (cause, is_failure) = self.why_there_is_none(timeout);
                    let error = no_connection(operation, &subject, cause);
                    if left <= ROUND {
                        return Err(retries.last_without_a_connection(error));
                    }
                    if is_failure {
                        retries.observe(error);
                    }
                    continue;
                }
            };
            if let Some(logins) = self.logins.as_ref().filter(|_| loan.client().is_none()) {
                let deadline = retries.deadline();
                let mut waiting = |cause: ConnectError| {
                    let cause = self.note_outage(cause);
                    retries.observe(no_connection(operation, &subject, NoConnection(cause)));
                };
                match logins.login(deadline, &mut waiting) {
                    Ok(client) => {
                        *self.outage() = None;
                        loan.fill(client);
                    }
                    Err(cause) => {
                        loan.abandon();
                        let is_hopeless = cause.is_refusal() && self.pool.state().connections == 0;
                        let next = if is_hopeless { Next::Fail } else { Next::Reconnect };
                        let cause = NoConnection(self.note_outage(cause));
                        let error = no_connection(operation, &subject, cause);
                        let pause = retries.after_no_connection(error, next)?;
                        self.wait_for_another(pause);
                        continue;
                    }
                }
                let mut client = self.lend(loan);
                client.mark_tested();
                if logins.found_shared_session() {
                    continue;
                }
                return Ok(client);
            }
            let mut client = self.lend(loan);
            if !client.is_suspect(trusted) {
                return Ok(client);
            }
            if client.is_presumed_dead() {
                client.discard(Peer::Unresponsive);
                continue;
            }
            // Half of the time is left to make a connection in its place.
            let limit = (left / 2).clamp(SHORTEST_TEST, LONGEST_TEST);
            let waiting = |cause| retries.observe(no_connection(operation, &subject, cause));
            match client.test(limit, waiting) {
                Ok(true) => {
                    client.mark_tested();
                    return Ok(client);
                }
                Ok(false) => client.discard(Peer::Responsive),
                Err(cause) => {
                    client.discard(Peer::Unresponsive);
                    if retries.left().is_zero() {
                        return Err(retries
                            .last_without_a_connection(no_connection(operation, subject, cause)));
                    }
                }
            }
        }
    }

    /// Waits before the next attempt to connect, but not longer than until another connection is idle: a
    /// server may give fewer connections than the pool may have.
    fn wait_for_another(&self, pause: Duration) {
        const STEP: Duration = Duration::from_millis(10);
        let end = Instant::now() + pause;
        while self.pool.state().idle_connections == 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(STEP));
        }
    }

    fn lend(&self, loan: Box<dyn Loan>) -> PooledClient {
        PooledClient::new(loan, self.prepares, &self.history, &self.pool)
    }

    fn outage(&self) -> MutexGuard<'_, Option<Arc<Outage>>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_outage(&self, cause: impl std::error::Error + Send + Sync + 'static) -> Arc<Outage> {
        let cause: Arc<Outage> = Arc::new(cause);
        *self.outage() = Some(Arc::clone(&cause));
        cause
    }

    /// Why a call gets no connection, and whether that is because none can be made.
    fn why_there_is_none(&self, timeout: r2d2::Error) -> (Cause, bool) {
        let size = self.pool.max_size();
        if self.pool.state().connections == size {
            return (AllInUse(size).into(), false);
        }
        let outage = self.outage().clone();
        match outage.filter(|_| !names_its_cause(&timeout)) {
            Some(cause) => (NoConnection(cause).into(), true),
            None if self.logins.is_some() => (AllInUse(size).into(), false),
            None => (NoConnection(self.note_outage(timeout)).into(), true),
        }
    }
}

/// A failed statement asks for another attempt if nothing has happened, or if it may happen again.
pub(crate) fn next_after(class: ErrorClass, after_loss: AfterLoss) -> Next {
    match class {
        ErrorClass::ConnectionLost if after_loss == AfterLoss::Fail => Next::Fail,
        ErrorClass::ConnectionLost
        | ErrorClass::IdleSessionEnded
        | ErrorClass::AbortedTransaction
        | ErrorClass::ReadOnly => Next::Reconnect,
        ErrorClass::RolledBack => Next::Repeat,
        ErrorClass::Permanent => Next::Fail,
    }
}
