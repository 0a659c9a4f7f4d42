//! One batch exactly once: lock, apply, save, commit, and what to do when the connection is lost on
//! the way.

use std::mem;

use postgres::Transaction;
use postgres::error::SqlState;

use super::PostgresCheckpointStore;
use super::connections::PooledClient;
use super::failure::{Aftermath, Cause, Outcome, failure, postgres_error, sql_state};
use super::prepared::{Keeping, Prepared, is_stale, name_the_pooler};
use super::queries::Queries;
use super::session::{Parameters, Query, Session, Unnamed};
use super::transaction::lock_if_absent;
use crate::validate::{validate_offset, validate_projection};
use crate::{Error, Result};

/// How often the connection may be lost while the closure runs: its own statement may be what kills
/// the server.
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
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhileTaken {
    Wait,
    GiveUp,
}

/// Why an attempt has come to nothing.
enum Ended {
    /// A step of the store's own has failed.
    At(&'static str, Cause),
    /// COMMIT has failed, which was to bring the checkpoint here.
    AtCommit(i64, Cause),
    /// The closure has failed, or has returned what cannot be saved.
    Applying(Error),
    /// The connection was lost while the closure was at work.
    LostWhileApplying(Error),
    /// The server has undone the closure's work because of others, or has become read-only.
    UndoneWhileApplying(Error),
}

fn at(step: &'static str) -> impl Fn(Cause) -> Ended {
    move |cause| Ended::At(step, cause)
}

impl PostgresCheckpointStore {
    /// Applies one batch of events exactly once: begins a transaction, takes the projection, calls
    /// `apply` with the transaction and the offset, saves the offset that it returns, and commits.
    ///
    /// Returns where the projection is now, or `None` when `apply` found nothing new. Then nothing
    /// was written, and no checkpoint was made. Of two workers on one projection the second waits
    /// until the first has committed, and goes on from there.
    ///
    /// # What `apply` does
    ///
    /// It reads the events after the offset, applies them through the transaction that it is given,
    /// and returns the offset of the last one: `Ok(Some(last))`, or `Ok(None)` when there is none.
    /// `?` makes its failed statements errors of this crate; any other error goes out by
    /// [`Error::backend`]. An error, or a panic, undoes all of it.
    ///
    /// **It may run more than once**, so it must have no effect outside of the transaction, and take
    /// the offset that it is given. A connection that is lost at any step, a deadlock, a
    /// serialization failure and a server that has become read-only are nothing to the caller: the
    /// batch starts over on a fresh connection, from the offset that is stored then, for as long as
    /// the store's [`connection_timeout`](super::PostgresCheckpointStoreBuilder::connection_timeout)
    /// since the first failure. When the answer to COMMIT was lost the store looks: if the
    /// checkpoint is where this call wanted it, the batch is committed, and this call returns it. So
    /// one call is never two batches. A connection that is lost *while `apply` runs* is given up
    /// after three times, for its own statement may be what kills the server. That is known by the
    /// error that `apply` returns: where it swallows it, the loss shows at the save, and is tried
    /// again for the whole time.
    ///
    /// It need not roll back or commit, and must not do so by a statement of its own: after a
    /// hand-written ROLLBACK the save would be a transaction of its own. What is expected to fail
    /// goes into a savepoint, `tx.transaction()`: a statement that fails outside of one fails the
    /// batch, even if its error is swallowed.
    ///
    /// # Or `in_transaction`?
    ///
    /// [`in_transaction`](Self::in_transaction) is for a transaction that is there already, and for
    /// several projections in one. There the caller locks, saves, commits, and judges what to try
    /// again.
    ///
    /// # Idle projections
    ///
    /// A call that finds nothing new is four round trips besides those of `apply`, and costs the server
    /// a transaction id and 96 bytes of log, because it takes the row. Where many projections are idle,
    /// ask cheaply first: compare [`get`](crate::CheckpointStore::get) with the end of the stream.
    ///
    /// # Errors
    ///
    /// What `apply` returned, as it is. [`InvalidOffset`](Error::InvalidOffset) when its offset is
    /// not beyond the one it was given; nothing was kept then.
    /// [`InvalidProjection`](Error::InvalidProjection). [`Unavailable`](Error::Unavailable) and
    /// [`Backend`](Error::Backend) name the step that failed, `begin`, `lock`, `save` or `commit`, and
    /// the projection. After `Unavailable` the batch may be committed; the next call goes on from
    /// what is stored, so call again.
    ///
    /// # Panics
    ///
    /// When `apply` does; its work is undone, and the connection serves the next caller.
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
    ///             Err(error) if error.is_transient() => eprintln!("{}", error.report()),
    ///             Err(error) => return Err(error),
    ///         }
    ///     }
    /// }
    /// ```
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

    /// As [`project`](Self::project), but does not wait for another worker: then it is
    /// [`Taken`](Batch::Taken). For a few threads that share many projections.
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
    /// /// Goes once over all projections, past those that another worker has. Was there anything?
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
        let (queries, connections) = (&self.shared.queries, &self.shared.connections);
        let subject = queries.about(projection);
        let mut attempt = Attempt { queries, projection, while_taken, in_doubt: None };
        let mut patience = connections.patience();
        let (mut has_failed, mut losses_while_applying, mut has_prepared_anew) = (false, 0, false);
        let mut unfit = None;
        loop {
            let mut client = connections
                .check_out_tested("begin", subject, &mut patience)
                .map_err(|none| unfit.take().unwrap_or(none))?;
            let ended = match attempt.run(&mut client, &mut apply) {
                Ok(batch) => {
                    client.mark_working();
                    return Ok(batch);
                }
                Err(ended) => ended,
            };
            // However long the closure has run: the time to try again begins with the first failure.
            if !mem::replace(&mut has_failed, true) {
                patience = connections.patience();
            }
            // After what is not final nothing has happened, or the lock will tell.
            let (worth_another_try, error) = match ended {
                Ended::At(_, cause)
                    if is_stale(cause.as_ref()) && client.prepares && !has_prepared_anew =>
                {
                    client.forget::<Prepared>();
                    has_prepared_anew = true;
                    continue;
                }
                Ended::At(step, cause) => {
                    let aftermath = client.check_in_after(cause.as_ref());
                    (!aftermath.is_final(), failure(step, subject, name_the_pooler(cause)))
                }
                Ended::AtCommit(to, cause) => {
                    let aftermath = client.check_in_after(cause.as_ref());
                    if aftermath == Aftermath::Lost {
                        attempt.in_doubt = Some(to);
                    }
                    (!aftermath.is_final(), failure("commit", subject, cause))
                }
                Ended::Applying(error) => (false, error),
                Ended::LostWhileApplying(error) => {
                    losses_while_applying += 1;
                    (losses_while_applying < LOSSES_WHILE_APPLYING, error)
                }
                Ended::UndoneWhileApplying(error) => {
                    if let Some(cause) = postgres_error(&error) {
                        client.check_in_after(cause);
                    }
                    (true, error)
                }
            };
            if !worth_another_try || !patience.pause() {
                return Err(error);
            }
            // Why a connection was thrown away says more than that there is no other in time.
            unfit = matches!(error, Error::Backend { .. }).then_some(error);
        }
    }
}

/// What does not change from one try to the next, and what the last one has left open.
struct Attempt<'a> {
    queries: &'a Queries,
    projection: &'a str,
    while_taken: WhileTaken,
    /// Where a COMMIT that was not answered was to bring the checkpoint.
    in_doubt: Option<i64>,
}

impl Attempt<'_> {
    fn run(
        &mut self,
        client: &mut PooledClient,
        apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Ended> {
        let mut statements = client.prepares.then(|| mem::take(client.kept::<Prepared>()));
        let outcome = self.run_with(client, statements.as_mut(), apply);
        if let Some(statements) = statements {
            *client.kept() = statements;
        }
        match outcome {
            // The transaction has been rolled back by now, so a lost connection has been noticed.
            Err(Ended::Applying(error)) if client.is_closed() => {
                Err(Ended::LostWhileApplying(error))
            }
            outcome => outcome,
        }
    }

    fn run_with(
        &mut self,
        client: &mut PooledClient,
        mut statements: Option<&mut Prepared>,
        mut apply: impl FnMut(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
    ) -> Result<Batch, Ended> {
        let Self { queries, projection, .. } = *self;
        let mut tx = client.transaction().map_err(|cause| Ended::At("begin", cause.into()))?;
        let locked = self.lock(&mut tx, statements.as_deref_mut()).map_err(at("lock"))?;
        let Some(from) = locked else { return Ok(Batch::Taken) };
        if let Some(in_doubt) = self.in_doubt.take() {
            // Whoever has brought it there, every event up to there is applied, and once.
            if from >= in_doubt {
                return Ok(Batch::Committed(in_doubt));
            }
        }
        let applied = match apply(&mut tx, from) {
            Ok(applied) => applied,
            Err(error) if is_undone_by_others(&error) && is_aborted(&mut tx) => {
                return Err(Ended::UndoneWhileApplying(error));
            }
            Err(error) => return Err(Ended::Applying(error)),
        };
        let Some(to) = applied else {
            return match probe(&mut tx) {
                Ok(()) => Ok(Batch::NothingNew),
                Err(cause) => Err(self.stopped_after_applying("apply", cause.into())),
            };
        };
        validate_offset(to).map_err(Ended::Applying)?;
        if to <= from {
            let reason = "the batch has to end beyond the offset that it began from";
            return Err(Ended::Applying(Error::InvalidOffset { offset: to, reason }));
        }
        let saved = queries.save(&mut Step { tx: &mut tx, statements }, projection, to);
        saved.map_err(|cause| self.stopped_after_applying("save", cause))?;
        tx.commit().map_err(|cause| Ended::AtCommit(to, cause.into()))?;
        Ok(Batch::Committed(to))
    }

    /// Why it does not go on after the closure has returned `Ok`.
    fn stopped_after_applying(&self, step: &'static str, cause: Cause) -> Ended {
        if sql_state(cause.as_ref()) != Some(&SqlState::IN_FAILED_SQL_TRANSACTION) {
            return Ended::At(step, cause);
        }
        let swallowed = "a statement has failed in the closure, which has not returned its error";
        Ended::Applying(failure("apply", self.queries.about(self.projection), swallowed))
    }

    fn lock(
        &self,
        tx: &mut Transaction<'_>,
        statements: Option<&mut Prepared>,
    ) -> Outcome<Option<i64>> {
        let Self { queries, projection, .. } = *self;
        // A COMMIT in doubt may still be under way, and only who waits for it learns what came of it.
        if self.while_taken == WhileTaken::Wait || self.in_doubt.is_some() {
            return queries.lock(&mut Step { tx, statements }, projection).map(Some);
        }
        match queries.lock_if_free(&mut Step { tx: &mut *tx, statements }, projection)? {
            Some(offset) => Ok(Some(offset)),
            None => lock_if_absent(queries, tx, projection),
        }
    }
}

/// Whether the closure's error says that the server has undone its work because of others.
fn is_undone_by_others(error: &Error) -> bool {
    postgres_error(error).is_some_and(|cause| match Aftermath::of(cause) {
        Aftermath::RolledBack | Aftermath::ReadOnly => true,
        Aftermath::Lost | Aftermath::Unfit | Aftermath::Refused => false,
    })
}

/// Asks whether the transaction is in order.
fn probe(tx: &mut Transaction<'_>) -> Result<(), postgres::Error> {
    tx.execute_typed("SELECT", &[]).map(drop)
}

/// Whether a statement has failed in this very transaction: the closure may use other ones too.
fn is_aborted(tx: &mut Transaction<'_>) -> bool {
    probe(tx).is_err_and(|error| error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION))
}

/// Runs the steps of the store in the transaction, as statements of the connection where it keeps
/// them.
struct Step<'a, 'b, 'c> {
    tx: &'a mut Transaction<'c>,
    statements: Option<&'b mut Prepared>,
}

impl Session for Step<'_, '_, '_> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<postgres::Row>> {
        match &mut self.statements {
            Some(statements) => Keeping { client: self.tx, statements }.query(query, parameters),
            None => Unnamed(self.tx).query(query, parameters),
        }
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        match &mut self.statements {
            Some(statements) => Keeping { client: self.tx, statements }.execute(query, parameters),
            None => Unnamed(self.tx).execute(query, parameters),
        }
    }
}
