//! One batch exactly once: lock, apply, save, commit, and what to do when the connection is lost on
//! the way.

use std::cell::RefCell;
use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use postgres::Transaction;
use postgres::error::SqlState;

use super::PostgresCheckpointStore;
use super::client::{PooledClient, takes_writes};
use super::connections::{AfterLoss, next_after};
use super::errors::{
    Cause, ErrorClass, Outcome, Rivals, failure, no_connection, postgres_error, sql_state,
};
use super::prepared::name_the_pooler;
use super::queries::{LockedRow, Queries, is_not_as_given};
use super::retry::Next;
use super::session::{Cached, Session, StatementCache, is_stale};
use crate::validate::{validate_offset, validate_projection};
use crate::{Error, Result};

/// How often the connection may be lost between the start of the closure and the answer to the save: the
/// closure's own statement, or the time that it takes, may be what ends the connection.
const LOSSES_WHILE_APPLYING: u32 = 3;

/// What became of [`try_project`](PostgresCheckpointStore::try_project).
///
/// # Examples
///
/// ```
/// use checkpoint_store::Batch;
///
/// fn is_worth_asking_again_at_once(batch: Batch) -> bool {
///     matches!(batch, Batch::Committed(_))
/// }
/// assert!(is_worth_asking_again_at_once(Batch::Committed(42)));
/// assert!(!is_worth_asking_again_at_once(Batch::Taken));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "it tells whether there was anything to apply, and whether another worker has the projection"]
#[non_exhaustive]
pub enum Batch {
    /// It is committed; the projection is at this offset.
    Committed(i64),
    /// There was nothing new. Nothing was written.
    NothingNew,
    /// Another worker has the projection. The closure was not run.
    Taken,
}

/// What to do while another worker has the projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WhileTaken {
    Wait,
    GiveUp,
}

/// Why an attempt has come to nothing.
enum Failed {
    /// At a step of the store's own.
    At(&'static str, Cause),
    /// The connection was lost with the message that saves and commits: the batch may be committed.
    InDoubt(Cause),
    /// The closure has failed, or has returned what cannot be saved.
    InClosure(Error),
    /// The connection was lost while the closure was running.
    LostInClosure(Error),
    /// The server has rolled back in the closure because of concurrent transactions.
    RolledBackInClosure(Error),
    /// The closure has come upon a server, or a transaction, that is read-only.
    ReadOnlyInClosure(Error),
}

fn at(step: &'static str) -> impl Fn(Cause) -> Failed {
    move |cause| Failed::At(step, cause)
}

impl PostgresCheckpointStore {
    /// Applies one batch of events exactly once.
    ///
    /// It begins a transaction, locks the projection, calls `apply` with the transaction and the offset, saves
    /// the offset that `apply` returns, and commits. Read model and checkpoint are committed together or not
    /// at all. Returns the new offset, or `None` if `apply` found nothing new. When several workers call it for
    /// one projection, each waits until the one before has committed, and continues from there.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use checkpoint_store::postgres::Transaction;
    /// use checkpoint_store::{PostgresCheckpointStore, Result};
    /// use std::{thread::sleep, time::Duration};
    ///
    /// fn apply_next(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    ///     let sql = "SELECT id, amount FROM events WHERE id > $1 ORDER BY id LIMIT 1";
    ///     let Some(event) = tx.query_opt(sql, &[&offset])? else { return Ok(None) };
    ///     let amount: i64 = event.get("amount");
    ///     tx.execute("UPDATE revenue SET total = total + $1", &[&amount])?;
    ///     Ok(Some(event.get("id")))
    /// }
    ///
    /// fn run() -> Result<()> {
    ///     let store = PostgresCheckpointStore::connect("host=localhost user=app")?;
    ///     store.migrate()?;
    ///     loop {
    ///         match store.project("revenue", apply_next) {
    ///             Ok(Some(offset)) => println!("revenue is at {offset}"),
    ///             Ok(None) => sleep(Duration::from_millis(200)),
    ///             Err(error) if error.is_transient() => {
    ///                 eprintln!("{}", error.report());
    ///                 sleep(Duration::from_secs(1));
    ///             }
    ///             Err(error) => return Err(error),
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # The closure
    ///
    /// `apply` reads the events after the offset, applies them through the transaction that it is given, and
    /// returns the offset of the last one: `Ok(Some(last))`, or `Ok(None)` if there is none. An error or a panic
    /// rolls everything back. `?` converts errors of `postgres`, of `r2d2` and `Box<dyn Error + Send + Sync>`;
    /// another error is converted in one line:
    ///
    /// ```
    /// # use checkpoint_store::Error;
    /// # fn parse(payload: &str) -> checkpoint_store::Result<u64> {
    /// let amount: u64 = payload.parse().map_err(|error| Error::backend("parse", error))?;
    /// # Ok(amount) }
    /// # assert!(parse("x").is_err());
    /// ```
    ///
    /// **It may run more than once**, so it must have no effect outside the transaction, and must use the offset
    /// that it is given.
    ///
    /// It must not end the transaction. Put what is expected to fail into a savepoint, `tx.transaction()`: a
    /// statement that fails outside of one fails the batch. If the closure swallows that error, the batch
    /// fails with a [`Backend`](Error::Backend) error that is not transient, whatever the swallowed one was.
    ///
    /// Inside the closure, do not write through the store. `save`, `save_many`, `advance`, `delete`, `project`
    /// and `try_project` of the same store return an error there, because they would wait for the closure's own
    /// transaction. Use [`in_transaction`](Self::in_transaction) with the transaction of the closure.
    ///
    /// # Retries
    ///
    /// After a lost connection at any step, a deadlock, a serialization failure, and on a server that has
    /// become read-only, the batch starts over on another connection, from the offset that is stored then.
    /// It retries for [`connection_timeout`](super::PostgresCheckpointStoreBuilder::connection_timeout),
    /// counted from the first failure, because the closure may have run for long before.
    ///
    /// If the answer to COMMIT is lost the batch is in doubt, and the next attempt looks, under the lock, whether
    /// the checkpoint has reached the offset of this call. If it has, the batch is committed, and the call
    /// returns it. So one call never applies two batches, unless the checkpoint is moved back by hand or deleted
    /// in between. If the time is over before that is known, the error
    /// names the `commit` and says that the batch may be committed; the next call continues from what is
    /// stored.
    ///
    /// A connection that is lost three times between the start of `apply` and the answer to the save is
    /// given up: a statement of `apply`, or the time that it takes, may be what ends it. If the closure ran for
    /// longer than `idle_in_transaction_session_timeout` or `transaction_timeout` allows, the error says so:
    /// apply fewer events in a batch, or set a longer limit. A read-only error is not retried if the server takes
    /// writes, and so the closure itself has made its transaction read-only.
    ///
    /// # Round trips
    ///
    /// A batch is three round trips besides those of `apply`, because the save and the COMMIT are one message; a
    /// call that finds nothing new is three as well. While the projection has no checkpoint they are two more.
    /// An idle call costs the server a transaction id and 96 bytes of log, because it locks the row. If many
    /// projections are idle, first compare [`get`](crate::CheckpointStore::get) with the end of the stream.
    ///
    /// # Or `in_transaction`?
    ///
    /// [`in_transaction`](Self::in_transaction) is for a transaction that exists already. There the caller locks,
    /// saves, commits, and decides what to retry.
    ///
    /// # Errors
    ///
    /// What `apply` returned, as it is. [`InvalidOffset`](Error::InvalidOffset) if its offset is not beyond the
    /// one that it was given; nothing is kept then. [`InvalidProjection`](Error::InvalidProjection).
    /// [`Unavailable`](Error::Unavailable) and [`Backend`](Error::Backend) name the step that failed, `begin`,
    /// `lock`, `apply`, `save` or `commit`, and the projection.
    ///
    /// # Panics
    ///
    /// If `apply` panics. Its work is rolled back, and the connection serves the next call.
    pub fn project(
        &self,
        projection: &str,
        apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Option<i64>> {
        Ok(match self.project_one_batch(projection, WhileTaken::Wait, apply)? {
            Batch::Committed(offset) => Some(offset),
            Batch::NothingNew | Batch::Taken => None,
        })
    }

    /// Like [`project`](Self::project), but does not wait for another worker: if one has the projection, it
    /// returns [`Taken`](Batch::Taken). For a few threads that share many projections.
    ///
    /// It waits in two cases. If the answer to its own COMMIT is lost, it waits for that COMMIT to end. If the
    /// projection has no checkpoint, its save waits for a transaction that is creating one by `save` or
    /// `advance`.
    ///
    /// # Errors
    ///
    /// As [`project`](Self::project).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use checkpoint_store::postgres::Transaction;
    /// use checkpoint_store::{Batch, PostgresCheckpointStore, Result};
    ///
    /// /// Visits each projection once, without those that another worker has. Was there anything new?
    /// fn round(
    ///     store: &PostgresCheckpointStore,
    ///     projections: &[&str],
    ///     apply: impl Fn(&str, &mut Transaction<'_>, i64) -> Result<Option<i64>>,
    /// ) -> Result<bool> {
    ///     let mut was_there_anything = false;
    ///     for name in projections {
    ///         let batch = store.try_project(name, |tx, offset| apply(name, tx, offset))?;
    ///         was_there_anything |= matches!(batch, Batch::Committed(_));
    ///     }
    ///     Ok(was_there_anything)
    /// }
    /// ```
    pub fn try_project(
        &self,
        projection: &str,
        apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch> {
        self.project_one_batch(projection, WhileTaken::GiveUp, apply)
    }

    fn project_one_batch(
        &self,
        projection: &str,
        while_taken: WhileTaken,
        mut apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch> {
        validate_projection(projection)?;
        self.refuse_inside_the_closure(match while_taken {
            WhileTaken::Wait => "project",
            WhileTaken::GiveUp => "try_project",
        })?;
        let (queries, connections) = (&self.shared.queries, &self.shared.connections);
        let subject = queries.about(projection);
        let mut apply = |tx: &mut Transaction<'_>, offset| {
            let _applying = Applying::with(self.id());
            apply(tx, offset)
        };
        let mut attempt = Attempt::new(queries, projection, while_taken);
        let mut retries = connections.call();
        let mut has_prepared_again = false;
        loop {
            let mut client = connections.client("begin", subject, &mut retries)?;
            let failed = match attempt.run(&mut client, &mut apply) {
                Ok(batch) => {
                    client.mark_used();
                    return Ok(batch);
                }
                Err(failed) => failed,
            };
            if attempt.in_doubt.is_none() || matches!(failed, Failed::InDoubt(_)) {
                retries.end_of_doubt(subject);
            }
            // However long the closure has run: the time to retry begins with the first failure.
            if !retries.has_failed() {
                retries.extend(connections.deadline());
            }
            // After what is retried nothing has happened, or the next lock will tell.
            let (error, next) = match failed {
                Failed::At(step, cause)
                    if is_stale(cause.as_ref()) && client.prepares && !has_prepared_again =>
                {
                    client.kept::<StatementCache>().clear(step == "save");
                    has_prepared_again = true;
                    continue;
                }
                Failed::At(step, cause) => {
                    let class = client.check_in_after(cause.as_ref());
                    (
                        failure(step, subject, name_the_pooler(cause)),
                        next_after(class, AfterLoss::Repeat),
                    )
                }
                Failed::InDoubt(cause) => {
                    client.check_in_after(cause.as_ref());
                    let subject = format!("{subject}, and the batch may be committed");
                    thread::sleep(retries.after_a_doubt(failure("commit", subject, cause))?);
                    continue;
                }
                Failed::InClosure(error) => return Err(error),
                // An observer of retries may need the connection that this call has had.
                Failed::LostInClosure(error) if attempt.losses < LOSSES_WHILE_APPLYING => {
                    drop(client);
                    (error, Next::Reconnect)
                }
                Failed::LostInClosure(error) => return Err(attempt.explain(retries.last(error))),
                Failed::RolledBackInClosure(error) => {
                    drop(client);
                    (error, Next::Repeat)
                }
                Failed::ReadOnlyInClosure(error) => {
                    // The closure may have made its own transaction read-only.
                    let is_its_own = takes_writes(&mut client).unwrap_or(false);
                    if let Some(cause) = postgres_error(&error).filter(|_| !is_its_own) {
                        client.check_in_after(cause);
                    }
                    (error, if is_its_own { Next::Fail } else { Next::Reconnect })
                }
            };
            thread::sleep(retries.after(error, next)?);
        }
    }

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
struct Applying;

thread_local! {
    static APPLYING: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

impl Applying {
    fn with(store: usize) -> Self {
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

/// What does not change from one attempt to the next, and what the last one has left open.
struct Attempt<'a> {
    queries: &'a Queries,
    projection: &'a str,
    while_taken: WhileTaken,
    /// Where a COMMIT that was not answered was to bring the checkpoint.
    in_doubt: Option<i64>,
    /// How often the connection was lost since the closure began.
    losses: u32,
    /// How long the closure ran before the last of them.
    ran: Duration,
    /// The time limit of the server's that the closure has exceeded.
    exceeded: Option<String>,
    /// Whether to create a row that is absent before the closure runs, because another transaction has
    /// created it in the meantime once already.
    creates_first: bool,
}

impl<'a> Attempt<'a> {
    fn new(queries: &'a Queries, projection: &'a str, while_taken: WhileTaken) -> Self {
        Self {
            queries,
            projection,
            while_taken,
            in_doubt: None,
            losses: 0,
            ran: Duration::ZERO,
            exceeded: None,
            creates_first: false,
        }
    }

    fn run(
        &mut self,
        client: &mut PooledClient,
        apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Failed> {
        let mut cache = client.prepares.then(|| mem::take(client.kept::<StatementCache>()));
        let outcome = self.run_with(client, cache.as_mut(), apply);
        if let Some(cache) = cache {
            *client.kept() = cache;
        }
        match outcome {
            // The transaction has been rolled back by now, so a lost connection has been noticed.
            Err(Failed::InClosure(error)) if client.is_closed() => {
                self.losses += 1;
                Err(Failed::LostInClosure(error))
            }
            outcome => outcome,
        }
    }

    fn run_with(
        &mut self,
        client: &mut PooledClient,
        mut cache: Option<&mut StatementCache>,
        mut apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Failed> {
        let mut tx = client.transaction().map_err(|cause| Failed::At("begin", cause.into()))?;
        let mut session = Cached { client: &mut tx, cache: cache.as_deref_mut() };
        let locked = self.lock(&mut session).map_err(at("lock"))?;
        let Some((row, from)) = locked else { return Ok(Batch::Taken) };
        if let Some(cache) = &mut cache {
            self.queries.prepare_to_save(cache, &mut tx).map_err(at("lock"))?;
        }
        if let Some(in_doubt) = self.in_doubt.take() {
            // Whoever has brought it there, every event up to there is applied, and once.
            if from >= in_doubt {
                return Ok(Batch::Committed(in_doubt));
            }
        }
        if self.losses > 0 {
            self.exceeded = exceeded_limit(&mut tx, self.ran).map_err(at("lock"))?;
        }
        if self.losses >= LOSSES_WHILE_APPLYING {
            let subject = self.queries.about(self.projection);
            return Err(Failed::LostInClosure(no_connection("save", subject, LostTooOften)));
        }
        let began = Instant::now();
        let applied = apply(&mut tx, from);
        self.ran = began.elapsed();
        let applied = applied.map_err(|error| match class_of(&error) {
            Some(ErrorClass::RolledBack) => Failed::RolledBackInClosure(error),
            Some(ErrorClass::ReadOnly) if is_aborted(&mut tx).unwrap_or(false) => {
                Failed::ReadOnlyInClosure(error)
            }
            _ => Failed::InClosure(error),
        })?;
        let Some(to) = applied else {
            return match end(tx, "SELECT; ROLLBACK") {
                Ok(()) => Ok(Batch::NothingNew),
                Err((_, cause)) if is_lost(&cause) => {
                    self.losses += 1;
                    let subject = self.queries.about(self.projection);
                    Err(Failed::LostInClosure(failure("apply", subject, cause)))
                }
                Err((_, cause)) => Err(self.not_finished("apply", row, cause)),
            };
        };
        validate_offset(to).map_err(Failed::InClosure)?;
        if to <= from {
            let reason = "the batch has to end beyond the offset that it began from";
            return Err(Failed::InClosure(Error::InvalidOffset { offset: to, reason }));
        }
        let save = self.queries.save_and_commit(cache.as_deref(), row, self.projection, to);
        let Err((mut tx, cause)) = end(tx, &save) else { return Ok(Batch::Committed(to)) };
        if is_lost(&cause) {
            self.in_doubt = Some(to);
            self.losses += 1;
            return Err(Failed::InDoubt(cause));
        }
        // After a COMMIT that failed there is no transaction any more. If the connection is lost before that is
        // known, nothing has happened all the same.
        let step = if is_aborted(&mut tx).map_err(at("save"))? { "save" } else { "commit" };
        Err(self.not_finished(step, row, cause))
    }

    /// Why it does not go on after the closure has returned `Ok`.
    fn not_finished(&mut self, step: &'static str, row: LockedRow, cause: Cause) -> Failed {
        match sql_state(cause.as_ref()) {
            Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
                let subject = self.queries.about(self.projection);
                Failed::InClosure(failure("apply", subject, SWALLOWED))
            }
            Some(&SqlState::NO_ACTIVE_SQL_TRANSACTION) => {
                Failed::At("save", TransactionEnded.into())
            }
            _ if is_not_as_given(&cause) => Failed::At("save", NotSaved(cause).into()),
            Some(&SqlState::UNIQUE_VIOLATION) if step == "save" && row == LockedRow::Absent => {
                self.creates_first = true;
                Failed::At(step, Rivals.into())
            }
            _ => Failed::At(step, cause),
        }
    }

    fn lock(&self, session: &mut impl Session) -> Outcome<Option<(LockedRow, i64)>> {
        let Self { queries, projection, .. } = *self;
        let there = |offset| (LockedRow::There, offset);
        // A COMMIT in doubt may still be under way, and only a call that waits for it learns of its outcome.
        let waits = self.while_taken == WhileTaken::Wait || self.in_doubt.is_some();
        let found = if waits {
            queries.lock_if_there(session, projection)?
        } else {
            queries.lock_if_free(session, projection)?
        };
        if let Some(offset) = found {
            return Ok(Some(there(offset)));
        }
        if !waits {
            if !queries.try_lock_absent(session, projection)? {
                return Ok(None);
            }
            if !self.creates_first {
                return Ok(Some((LockedRow::Absent, 0)));
            }
        }
        if self.creates_first {
            queries.lock_new(session, projection)?;
        } else {
            queries.lock_absent(session, projection)?;
        }
        // It may have been created while this transaction waited.
        let offset = queries.lock_if_there(session, projection)?;
        Ok(Some(offset.map_or((LockedRow::Absent, 0), there)))
    }

    /// Says which time limit of the server's has ended the connection under the closure, if one has.
    fn explain(&self, error: Error) -> Error {
        let Some(limit) = &self.exceeded else { return error };
        let subject = format!("{}: {limit}", self.queries.about(self.projection));
        Error::Unavailable {
            operation: "apply",
            subject: Some(subject),
            transient: error.is_transient(),
            source: error.into(),
        }
    }
}

const SWALLOWED: &str = "a statement has failed in the closure, which has not returned its error";

/// The guard in the message that saves and commits has failed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the server wrote no row, or another checkpoint than it was given: a trigger, rule or policy discards or \
     alters it, or the closure has deleted it"
)]
struct NotSaved(#[source] Cause);

#[derive(Debug, thiserror::Error)]
#[error("the closure has ended the transaction that it was given, so the checkpoint was not saved")]
struct TransactionEnded;

#[derive(Debug, thiserror::Error)]
#[error(
    "the connection was lost {LOSSES_WHILE_APPLYING} times between the start of the closure and the answer to \
         the save"
)]
struct LostTooOften;

/// Ends the transaction with these statements, in one message. A transaction that has ended must not be
/// dropped, which would send a ROLLBACK; it owns nothing.
fn end<'c>(mut tx: Transaction<'c>, statements: &str) -> Result<(), (Transaction<'c>, Cause)> {
    match tx.batch_execute(statements) {
        Ok(()) => {
            mem::forget(tx);
            Ok(())
        }
        Err(error) => Err((tx, error.into())),
    }
}

fn is_lost(cause: &Cause) -> bool {
    ErrorClass::of(cause.as_ref()) == ErrorClass::ConnectionLost
}

fn class_of(error: &Error) -> Option<ErrorClass> {
    postgres_error(error).map(|cause| ErrorClass::of(cause))
}

/// Whether a statement has failed in this very transaction: the closure may use other ones too.
fn is_aborted(tx: &mut Transaction<'_>) -> Outcome<bool> {
    match tx.batch_execute("SELECT") {
        Ok(()) => Ok(false),
        Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The time limit of the session's that is shorter than the closure has run.
fn exceeded_limit(tx: &mut Transaction<'_>, ran: Duration) -> Outcome<Option<String>> {
    let sql = "SELECT name, setting
        FROM pg_catalog.pg_settings
        WHERE name OPERATOR(pg_catalog.=) ANY
            (ARRAY['idle_in_transaction_session_timeout', 'transaction_timeout']::pg_catalog.text[])";
    for row in tx.query_typed(sql, &[])? {
        let (name, setting): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let limit = Duration::from_millis(setting.parse().unwrap_or(0));
        if !limit.is_zero() && limit <= ran {
            return Ok(Some(format!(
                "the closure ran for {ran:.1?}, and the server's {name} is {limit:?}; apply fewer events in a \
                 batch, or set a longer limit"
            )));
        }
    }
    Ok(None)
}
