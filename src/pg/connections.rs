//! The one loop in which every operation runs: take a connection that works, run the statement, and decide
//! whether a failure is followed by another attempt.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use r2d2::ManageConnection;

use super::client::{History, PooledClient, TRUSTED, TRUSTED_BEFORE_A_WRITE};
use super::close::close;
use super::connect::Connector;
use super::connect_error::{AllInUse, ConnectError, NoConnection};
use super::errors::{Cause, ErrorClass, Outcome, Subject, names_its_cause};
use super::pool::{Loan, NoThread, Pool};
use super::prepared::{SharedSession, is_shared};
use super::retry::{Call, Next, Observer, deadline_after};
use crate::Result;
use crate::sync::lock;

/// How long an operation waits and retries, unless the builder is given another time.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait before the pool is asked again: r2d2 wakes no waiting call when a broken connection
/// leaves room for a new one.
const ROUND: Duration = Duration::from_secs(1);

/// The connections of one store and all its clones.
pub(crate) struct Connections {
    pool: Arc<Pool>,
    timeout: Duration,
    /// Whether statements are prepared and kept with the connections.
    prepares: bool,
    observer: Option<Arc<Observer>>,
    history: Arc<History>,
    /// `None` where the manager of the caller's pool makes the connections.
    connector: Option<Arc<Connector>>,
    /// Whether a new connection came upon the prepared statements of another.
    found_shared_session: AtomicBool,
    /// Why no connection could be made last, until one can: for the calls that wait for one meanwhile.
    outage: Mutex<Option<NoConnection>>,
}

/// What a statement may do after it was lost with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterLoss {
    /// Run again: it only reads, or does the same however often it runs.
    Repeat,
    /// Run again, as a statement that finds out whether it may.
    RepeatIfUnwritten,
    /// Be reported: it may have been executed.
    Fail,
}

impl Connections {
    /// A pool of the builder's, with a first connection in it.
    pub(crate) fn open(
        connector: Arc<Connector>,
        first: Client,
        size: u32,
        timeout: Duration,
        prepares: bool,
    ) -> Outcome<Self> {
        let Ok(pool) = Pool::with_slots(size) else {
            close(first);
            return Err(NoThread.into());
        };
        let connections = Self::new(pool, Some(connector), timeout, prepares);
        // A slot is there as soon as a thread of r2d2 has run.
        match connections.pool.take(Duration::from_secs(1)) {
            Ok(slot) => drop(connections.fill(slot, first)),
            Err(_) => close(first),
        }
        Ok(connections)
    }

    /// A pool of the caller's, and its time-out unless there is another.
    pub(crate) fn of<M>(pool: r2d2::Pool<M>, timeout: Option<Duration>, prepares: bool) -> Self
    where
        M: ManageConnection<Connection = Client>,
    {
        let timeout = timeout.unwrap_or_else(|| pool.connection_timeout());
        Self::new(Pool::of_the_caller(pool), None, timeout, prepares)
    }

    fn new(
        pool: Pool,
        connector: Option<Arc<Connector>>,
        timeout: Duration,
        prepares: bool,
    ) -> Self {
        Self {
            pool: Arc::new(pool),
            timeout,
            prepares,
            observer: None,
            history: Arc::default(),
            connector,
            found_shared_session: AtomicBool::new(false),
            outage: Mutex::default(),
        }
    }

    pub(crate) fn observed_by(self, observer: Option<Arc<Observer>>) -> Self {
        Self { observer, ..self }
    }

    pub(crate) fn state(&self) -> r2d2::State {
        self.pool.state()
    }

    /// What was found out in the caller's transaction makes other connections suspect.
    pub(crate) fn note(&self, class: ErrorClass) {
        self.history.note(class);
    }

    /// The deadline of a call whose time begins now.
    pub(crate) fn deadline(&self) -> Instant {
        deadline_after(self.timeout)
    }

    /// A call that begins now.
    pub(crate) fn call<'a>(&'a self, operation: &'static str, subject: Subject<'a>) -> Call<'a> {
        Call::new(operation, subject, self.deadline(), self.observer.as_deref())
    }

    /// Tells the observer of a call that waits for others why they wait, if no connection can be made.
    pub(crate) fn observe_outage(&self, call: &mut Call<'_>) {
        let outage = lock(&self.outage).clone();
        if let Some(cause) = outage {
            call.observe(call.no_connection(cause));
        }
    }

    /// Runs a statement until it is executed or refused, or the time is over. The statement is told when an
    /// earlier attempt began that may have been executed.
    pub(crate) fn run<T>(
        &self,
        call: &mut Call<'_>,
        after_loss: AfterLoss,
        mut statement: impl FnMut(&mut PooledClient, Option<Instant>) -> Outcome<T>,
    ) -> Result<T> {
        let trusted = match after_loss {
            AfterLoss::RepeatIfUnwritten => TRUSTED_BEFORE_A_WRITE,
            AfterLoss::Repeat | AfterLoss::Fail => TRUSTED,
        };
        loop {
            let mut client = self.client_trusted_for(trusted, call)?;
            let taken = client.taken();
            let cause = match statement(&mut client, call.lost) {
                Ok(answer) => {
                    client.mark_used();
                    return Ok(answer);
                }
                Err(cause) => cause,
            };
            let class = client.check_in_after(cause.as_ref());
            let error = call.failure(cause);
            if class == ErrorClass::ConnectionLost && after_loss == AfterLoss::RepeatIfUnwritten {
                call.lost.get_or_insert(taken);
            }
            thread::sleep(call.after(error, next_after(class, after_loss))?);
        }
    }

    /// Takes a connection that is known to work: a suspect one is tested, and replaced if it does not
    /// answer. A connection that fails its test is not an attempt of the call.
    pub(crate) fn client(&self, call: &mut Call<'_>) -> Result<PooledClient> {
        self.client_trusted_for(TRUSTED, call)
    }

    fn client_trusted_for(&self, trusted: Duration, call: &mut Call<'_>) -> Result<PooledClient> {
        loop {
            if self.found_shared_session.load(Ordering::Relaxed) {
                let error = call.failure(SharedSession { cause: None });
                return Err(call.last(error));
            }
            let loan = match self.pool.take(call.left().min(ROUND)) {
                Ok(loan) => loan,
                Err(timeout) => {
                    let (cause, is_failure) = self.why_there_is_none(timeout);
                    let error = call.end_if_time_is_over(call.no_connection(cause))?;
                    if is_failure {
                        call.observe(error);
                    }
                    continue;
                }
            };
            let client = match &self.connector {
                Some(connector) if loan.client().is_none() => {
                    self.connect(connector, loan, call)?
                }
                Some(_) => self.lend(loan).tested(trusted, call)?,
                None => {
                    *lock(&self.outage) = None;
                    self.lend(loan).tested(trusted, call)?
                }
            };
            if let Some(client) = client {
                return Ok(client);
            }
        }
    }

    /// Makes a connection in an empty slot. `None`: it was not made, or must not be used.
    fn connect(
        &self,
        connector: &Arc<Connector>,
        slot: Box<dyn Loan>,
        call: &mut Call<'_>,
    ) -> Result<Option<PooledClient>> {
        let deadline = call.deadline;
        let mut tell = |cause| call.observe(call.no_connection(self.note_outage(cause)));
        match connector.connect(deadline, &mut tell).and_then(|client| self.inspect(client)) {
            Ok(client) => {
                *lock(&self.outage) = None;
                let client = self.fill(slot, client);
                Ok((!self.found_shared_session.load(Ordering::Relaxed)).then_some(client))
            }
            Err(cause) => {
                slot.abandon();
                let is_hopeless = cause.is_refusal() && self.pool.state().connections == 0;
                let next = if is_hopeless { Next::Fail } else { Next::Reconnect };
                let error = call.no_connection(self.note_outage(cause));
                self.pool.wait_for_an_idle_one(call.after_no_connection(error, next)?);
                Ok(None)
            }
        }
    }

    /// Looks for the prepared statements of others on a new connection.
    fn inspect(&self, mut client: Client) -> std::result::Result<Client, ConnectError> {
        if self.prepares {
            match is_shared(&mut client) {
                Ok(is_shared) => self.found_shared_session.fetch_or(is_shared, Ordering::Relaxed),
                Err(error) => {
                    close(client);
                    return Err(error.into());
                }
            };
        }
        Ok(client)
    }

    fn fill(&self, mut slot: Box<dyn Loan>, client: Client) -> PooledClient {
        slot.fill(client);
        let mut client = self.lend(slot);
        client.mark_tested();
        client
    }

    fn lend(&self, loan: Box<dyn Loan>) -> PooledClient {
        PooledClient::new(loan, self.prepares, &self.history, &self.pool)
    }

    fn note_outage(&self, cause: impl Into<Cause>) -> NoConnection {
        let cause = NoConnection(cause.into().into());
        *lock(&self.outage) = Some(cause.clone());
        cause
    }

    /// Why a call gets no connection, and whether that is because none can be made.
    fn why_there_is_none(&self, timeout: r2d2::Error) -> (Cause, bool) {
        let size = self.pool.max_size;
        if self.pool.state().connections == size {
            return (AllInUse(size).into(), false);
        }
        let outage = lock(&self.outage).clone();
        match outage.filter(|_| !names_its_cause(&timeout)) {
            Some(cause) => (cause.into(), true),
            None if self.connector.is_some() => (AllInUse(size).into(), false),
            None => (self.note_outage(timeout).into(), true),
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
