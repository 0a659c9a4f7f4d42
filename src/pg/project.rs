//! Applies a batch exactly once: attempts follow each other until one has committed or is not to be repeated.

use std::thread;

use postgres::Transaction;

use super::PostgresCheckpointStore;
use super::attempt::{Attempt, Batch, Failed, LOSSES_WHILE_APPLYING};
use super::client::takes_writes;
use super::connections::{AfterLoss, next_after};
use super::errors::{failure, postgres_error};
use super::inside::{Inside, is_inside};
use super::prepared::name_the_pooler;
use super::queries::WhileTaken;
use super::retry::Next;
use super::session::{StatementCache, is_stale};
use crate::validate::validate_projection;
use crate::{Error, Result};

impl PostgresCheckpointStore {
    /// Applies one batch of events exactly once.
    ///
    /// It begins a transaction, locks the projection, calls `apply` with the transaction and the offset, saves
    /// the offset that `apply` returns, and commits. Read model and checkpoint are committed together or not at
    /// all. Returns the new offset, or `None` if `apply` found nothing new. When several workers call it for one
    /// projection, they run one after another, and each starts at the offset that the previous one has saved.
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
    /// any other error is converted with one line:
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
    /// It must not end the transaction: if it runs COMMIT or ROLLBACK, `project` returns an error and does not
    /// save the offset, although what was committed stays. That is so even if the closure begins another
    /// transaction; it is not found out only if another worker has meanwhile saved the very same offset. If a
    /// statement may fail, run it inside a savepoint, which `tx.transaction()` creates. A statement that fails
    /// outside a savepoint fails the whole batch. If the closure ignores that error, the batch fails with a
    /// [`Backend`](crate::Error::Backend) error that is not transient, whatever the ignored one was.
    ///
    /// Inside the closure, do not write through the store. `save`, `save_many`, `advance`, `delete`, `project`
    /// and `try_project` of the same store return an error there, because they would wait for the closure's own
    /// transaction. To write another checkpoint there, pass the closure's transaction to
    /// [`in_transaction`](Self::in_transaction).
    ///
    /// # Retries
    ///
    /// After a lost connection at any step, a deadlock, a serialization failure, and on a server that has become
    /// read-only, the batch starts over on another connection, from the offset that is stored then. It retries
    /// for [`connection_timeout`](super::PostgresCheckpointStoreBuilder::connection_timeout), counted from the
    /// first attempt that fails and not from the start of the call, so that a long closure does not use up the
    /// time.
    ///
    /// If the response to COMMIT is lost, the batch is in doubt. The next attempt takes the lock and checks
    /// whether the checkpoint has reached the offset that this call was to save. If it has, the batch was
    /// committed, and the call returns that offset. So one call never applies two batches, unless the checkpoint
    /// is moved back by hand or deleted in between. If the time runs out before that is known, the error names
    /// the step `commit` and says that the batch may be committed. The next call continues from the stored
    /// offset.
    ///
    /// If the connection is lost three times between the start of `apply` and the response to the save, `project`
    /// stops retrying, because a statement of `apply`, or the time that it takes, may be the cause. If the
    /// closure ran for longer than `idle_in_transaction_session_timeout` or `transaction_timeout` allows, the
    /// error says so: apply fewer events in a batch, or set a longer limit. A read-only error is not retried if
    /// the server accepts writes, because then the closure itself has made its transaction read-only.
    ///
    /// # Round trips
    ///
    /// Besides those of `apply`, a call takes three round trips: BEGIN, the lock, and the save together with the
    /// COMMIT, or a ROLLBACK if there are no events. If the projection has no checkpoint yet, there are two more.
    /// An idle call costs the server a transaction id and 96 bytes of write-ahead log, because it locks the row.
    /// If many projections are idle, first compare [`all`](crate::CheckpointStore::all) with the end of the
    /// stream.
    ///
    /// # When to use `in_transaction` instead
    ///
    /// [`in_transaction`](Self::in_transaction) is for a transaction that exists already. There the caller locks,
    /// saves, commits, and decides what to retry.
    ///
    /// # Errors
    ///
    /// An error of `apply` is returned unchanged. [`InvalidOffset`](crate::Error::InvalidOffset) if the offset that
    /// `apply` returns is not greater than the one that it was given; everything is rolled back then.
    /// [`InvalidProjection`](crate::Error::InvalidProjection) if the name is not valid.
    /// [`Unavailable`](crate::Error::Unavailable) and [`Backend`](crate::Error::Backend) name the step that failed, `begin`,
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

    /// Like [`project`](Self::project), but does not wait for another worker: if one has locked the projection,
    /// it returns [`Taken`](Batch::Taken) immediately. It is for a few threads that share many projections.
    ///
    /// There are two cases in which it does wait. If the answer to its own COMMIT is lost, it waits for that
    /// COMMIT to end. If the projection has no checkpoint, its save waits for a transaction that is creating one
    /// by `save` or `advance`.
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
    /// /// Applies one batch of each projection that no other worker has locked. Returns whether there was any.
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
            let _inside = Inside::enter(queries);
            apply(tx, offset)
        };
        let mut attempt = Attempt::new(queries, projection, while_taken);
        let mut call = connections.call("begin", subject);
        let (mut is_first_attempt, mut has_prepared_again) = (true, false);
        loop {
            let mut client = connections.client(&mut call)?;
            let failed = match attempt.run(&mut client, &mut apply) {
                Ok(batch) => {
                    client.mark_used();
                    return Ok(batch);
                }
                Err(failed) => failed,
            };
            if attempt.in_doubt.is_none() || matches!(failed, Failed::InDoubt(_)) {
                call.end_of_doubt();
            }
            // However long the closure has run: the time to retry begins with the first attempt that fails.
            if is_first_attempt {
                is_first_attempt = false;
                call.deadline = connections.deadline();
            }
            // Another attempt is safe: nothing was committed, or the next one finds out under the lock.
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
                    thread::sleep(call.after_a_doubt(failure("commit", subject, cause))?);
                    continue;
                }
                Failed::InClosure(error) => return Err(error),
                // An observer of retries may need the connection that this call has had.
                Failed::LostInClosure(error) if attempt.losses < LOSSES_WHILE_APPLYING => {
                    drop(client);
                    (error, Next::Reconnect)
                }
                Failed::LostInClosure(error) => return Err(attempt.explain(call.last(error))),
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
            thread::sleep(call.after(error, next)?);
        }
    }

    /// Refuses what would wait for the transaction of the closure that the calling thread is in, and so for
    /// itself, or for another closure that waits for this one. PostgreSQL cannot see such a deadlock.
    pub(super) fn refuse_inside_the_closure(&self, operation: &'static str) -> Result<()> {
        if is_inside(&self.shared.queries) {
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
