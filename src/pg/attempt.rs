//! One attempt at a batch: lock, apply, save, commit.

use std::mem;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::{Client, Transaction};

use super::client::PooledClient;
use super::connect_error::no_connection;
use super::errors::{
    Cause, ErrorClass, Outcome, Rivals, Subject, failure, postgres_error, sql_state,
};
use super::queries::{Lock, LockedRow, Queries, WhileTaken, is_not_as_given};
use super::session::{DirectSession, Session, StatementCache};
use crate::validate::validate_offset;
use crate::{Error, Result};

/// The outcome of [`try_project`](super::PostgresCheckpointStore::try_project).
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
#[must_use = "the result says whether a batch was committed or another worker has locked the projection"]
#[non_exhaustive]
pub enum Batch {
    /// The batch was committed. The field is the new checkpoint.
    Committed(i64),
    /// The closure found no new events. The checkpoint is unchanged.
    NothingNew,
    /// Another worker has locked the projection. The closure was not run.
    Taken,
}

/// How often the connection may be lost between the start of the closure and the answer to the save: the
/// closure's own statement, or the time that it takes, may be what ends the connection.
pub(super) const LOSSES_WHILE_APPLYING: u32 = 3;
/// Why an attempt has come to nothing.
pub(super) enum Failed {
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

/// What does not change from one attempt to the next, and what the last one has left open.
pub(super) struct Attempt<'a> {
    queries: &'a Queries,
    projection: &'a str,
    subject: Subject<'a>,
    while_taken: WhileTaken,
    /// Where a COMMIT that was not answered was to bring the checkpoint.
    pub(super) in_doubt: Option<i64>,
    /// How often the connection was lost since the closure began.
    pub(super) losses: u32,
    /// How long the closure ran before the last of them.
    ran: Duration,
    /// The time limit of the server's that the closure has exceeded.
    exceeded: Option<String>,
    /// Whether to create a row that is absent before the closure runs, because another transaction has
    /// created it in the meantime once already.
    creates_first: bool,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(queries: &'a Queries, projection: &'a str, while_taken: WhileTaken) -> Self {
        Self {
            queries,
            projection,
            subject: queries.about(projection),
            while_taken,
            in_doubt: None,
            losses: 0,
            ran: Duration::ZERO,
            exceeded: None,
            creates_first: false,
        }
    }

    pub(super) fn run(
        &mut self,
        client: &mut PooledClient,
        apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Failed> {
        match client.with_cache(|client, cache| self.run_with(client, cache, apply)) {
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
        client: &mut Client,
        mut cache: Option<&mut StatementCache>,
        mut apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Failed> {
        let mut tx = client.transaction().map_err(|cause| Failed::At("begin", cause.into()))?;
        let mut session = DirectSession { client: &mut tx, cache: cache.as_deref_mut() };
        let locked = self.lock(&mut session).map_err(at("lock"))?;
        let Some(lock) = locked else { return Ok(Batch::Taken) };
        let from = lock.offset;
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
            return Err(Failed::LostInClosure(no_connection("save", self.subject, LostTooOften)));
        }
        if let Some(cache) = &mut cache {
            self.queries.prepare_to_save(cache, &mut tx).map_err(at("lock"))?;
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
                    Err(Failed::LostInClosure(failure("apply", self.subject, cause)))
                }
                Err((_, cause)) => Err(self.not_finished("apply", &lock, cause)),
            };
        };
        validate_offset(to).map_err(Failed::InClosure)?;
        if to <= from {
            let reason = "the batch has to end beyond the offset that it began from";
            return Err(Failed::InClosure(Error::InvalidOffset { offset: to, reason }));
        }
        let save = self.queries.save_and_commit(cache.as_deref(), &lock, self.projection, to);
        let Err((mut tx, cause)) = end(tx, &save) else { return Ok(Batch::Committed(to)) };
        if is_lost(&cause) {
            self.in_doubt = Some(to);
            self.losses += 1;
            return Err(Failed::InDoubt(cause));
        }
        // After a COMMIT that failed there is no transaction any more. If the connection is lost before that is
        // known, nothing has happened all the same.
        let step = if is_aborted(&mut tx).map_err(at("save"))? { "save" } else { "commit" };
        Err(self.not_finished(step, &lock, cause))
    }

    /// Why it does not go on after the closure has returned `Ok`.
    fn not_finished(&mut self, step: &'static str, lock: &Lock, cause: Cause) -> Failed {
        match sql_state(cause.as_ref()) {
            Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
                Failed::InClosure(failure("apply", self.subject, SWALLOWED))
            }
            _ if is_not_as_given(&cause) => Failed::At("save", NotSaved(cause).into()),
            Some(&SqlState::UNIQUE_VIOLATION)
                if step == "save" && lock.row == LockedRow::Absent =>
            {
                self.creates_first = true;
                Failed::At(step, Rivals.into())
            }
            _ => Failed::At(step, cause),
        }
    }

    fn lock(&self, session: &mut impl Session) -> Outcome<Option<Lock>> {
        let Self { queries, projection, creates_first, .. } = *self;
        // A COMMIT in doubt may still be under way, and only a call that waits for it learns of its outcome.
        let while_taken = if self.in_doubt.is_some() { WhileTaken::Wait } else { self.while_taken };
        if let Some(lock) = queries.lock_if_there(session, projection, while_taken)? {
            return Ok(Some(lock));
        }
        let Some(absent) = queries.lock_absent(session, projection, while_taken)? else {
            return Ok(None);
        };
        if creates_first {
            // Under the same advisory lock, which this transaction has already.
            queries.lock_new(session, projection)?;
        } else if while_taken == WhileTaken::GiveUp {
            // It was absent when the lock was taken.
            return Ok(Some(absent));
        }
        // It may have been created while this transaction waited.
        let there = queries.lock_if_there(session, projection, WhileTaken::Wait)?;
        Ok(Some(there.unwrap_or(absent)))
    }

    /// Says which time limit of the server's has ended the connection under the closure, if one has.
    pub(super) fn explain(&self, error: Error) -> Error {
        let Some(limit) = &self.exceeded else { return error };
        let subject = format!("{}: {limit}", self.subject);
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
     alters it, or the closure has deleted it or ended the transaction"
)]
struct NotSaved(#[source] Cause);

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
