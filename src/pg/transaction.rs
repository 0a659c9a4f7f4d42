//! The store's operations in the caller's own transaction.

use std::fmt;

use postgres::Transaction;
use postgres::error::SqlState;

use super::connections::Connections;
use super::errors::{ErrorClass, Outcome, Subject, failure, sql_state};
use super::queries::{Queries, WhileTaken};
use super::session::DirectSession;
use crate::validate::{validate_advance, validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, Result};

/// The store's operations inside the caller's own transaction; made by
/// [`in_transaction`](super::PostgresCheckpointStore::in_transaction).
///
/// What it writes is visible to no other transaction until the caller commits, and is gone if the caller
/// rolls back, to a savepoint too. It never commits, rolls back or changes a setting that outlasts the call,
/// and never repeats a statement on another connection.
///
/// Invalid input is refused before anything is sent, and leaves the transaction usable. Any other error
/// has aborted it, unless a method says otherwise: roll back then.
///
/// # Or `project`?
///
/// [`project`](super::PostgresCheckpointStore::project) is one call that begins, locks, saves, commits and
/// retries. This is for a transaction that exists already, and for several projections in one.
///
/// Do not call the store itself for a projection that your own open transaction holds: `store.save` waits
/// for that transaction, which waits for your thread. Neither this crate nor PostgreSQL can see that
/// deadlock; see [`lock`](InTransaction::lock) for how to bound the wait. After a ROLLBACK by a statement of
/// your own, the save is a transaction by itself.
///
/// # Save last, and return on `Err`
///
/// A failed statement aborts a PostgreSQL transaction, and a `COMMIT` then rolls back. The `commit` method of
/// the `postgres` crate returns `Ok` nevertheless. Therefore let `?` carry every error out of the function
/// that owns the transaction, and make the save its last statement: if the save has succeeded and nothing
/// follows, nothing has aborted the transaction.
///
/// # Examples
///
/// ```no_run
/// use checkpoint_store::{PostgresCheckpointStore, postgres};
///
/// fn project(
///     store: &PostgresCheckpointStore,
///     client: &mut postgres::Client,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let mut tx = client.transaction()?;
///     let offset = store.in_transaction(&mut tx).lock("orders")?;
///     let last = tx.query_one(
///         "WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 100),
///               applied AS (INSERT INTO orders SELECT order_id, amount FROM batch)
///          SELECT COALESCE(max(id), $1) FROM batch",
///         &[&offset],
///     )?;
///     store.in_transaction(&mut tx).save("orders", last.get(0))?;
///     tx.commit()?;
///     Ok(())
/// }
/// ```
#[must_use = "it does nothing until one of its methods is called"]
pub struct InTransaction<'a, 'c> {
    pub(super) queries: &'a Queries,
    pub(super) connections: &'a Connections,
    pub(super) tx: &'a mut Transaction<'c>,
}

impl fmt::Debug for InTransaction<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InTransaction")
            .field("table", &format_args!("{}", self.queries.table))
            .finish_non_exhaustive()
    }
}

impl<'c> InTransaction<'_, 'c> {
    /// The projection's checkpoint as this transaction sees it, or `None`. One round trip.
    ///
    /// It locks nothing: another worker may move the checkpoint before the commit. To continue from what was
    /// read use [`lock`](InTransaction::lock) or [`advance`](InTransaction::advance).
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::find`](crate::CheckpointStore::find).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// let checkpoint = store.in_transaction(&mut tx).find("orders")?;
    /// # Ok(()) }
    /// ```
    pub fn find(&mut self, projection: &str) -> Result<Option<Checkpoint>> {
        self.read("find", projection)
    }

    /// The projection's offset as this transaction sees it, 0 when there is none. One round trip.
    ///
    /// # Errors
    ///
    /// As [`find`](InTransaction::find).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// let offset = store.in_transaction(&mut tx).get("orders")?;
    /// # Ok(()) }
    /// ```
    pub fn get(&mut self, projection: &str) -> Result<i64> {
        Ok(self.read("get", projection)?.map_or(0, |checkpoint| checkpoint.offset))
    }

    /// Every checkpoint as this transaction sees it, ordered by the bytes of the projection's name. One
    /// round trip.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::all`](crate::CheckpointStore::all).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// for checkpoint in store.in_transaction(&mut tx).all()? {
    ///     println!("{} is at {}", checkpoint.projection, checkpoint.offset);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn all(&mut self) -> Result<Vec<Checkpoint>> {
        let subject = self.queries.about_all();
        self.run("all", subject, |queries, session| queries.all(session))
    }

    /// Sets the checkpoint, forwards or back, from the commit on. One round trip.
    ///
    /// It holds the row lock until the transaction ends, and another writer of the same projection waits.
    /// `updated_at` is the time of this call, not of the start of the transaction.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::save`](crate::CheckpointStore::save).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// tx.execute("UPDATE orders SET state = 'paid' WHERE id = $1", &[&17_i64])?;
    /// store.in_transaction(&mut tx).save("orders", 43)?;
    /// tx.commit()?;
    /// # Ok(()) }
    /// ```
    pub fn save(&mut self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        self.run("save", self.queries.about(projection), |queries, session| {
            queries.save(session, projection, offset)
        })
    }

    /// Saves several checkpoints. If a name is given twice, the last one counts. One round trip, and none for
    /// an empty slice.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::save_many`](crate::CheckpointStore::save_many).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// store.in_transaction(&mut tx).save_many(&[("orders", 43), ("revenue", 43)])?;
    /// # Ok(()) }
    /// ```
    pub fn save_many(&mut self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        if checkpoints.is_empty() {
            return Ok(());
        }
        let subject = self.queries.about_many(checkpoints.len());
        self.run("save_many", subject, |queries, session| queries.save_many(session, checkpoints))
    }

    /// Moves the checkpoint to `to`, only if it is still at `from`. One round trip, and one or two more if
    /// there is no checkpoint yet or it is elsewhere.
    ///
    /// It waits for another transaction that holds the row lock, and then compares with what that one has
    /// left. A `Conflict` leaves the transaction usable, but another worker has done the work of this batch:
    /// roll it back.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::advance`](crate::CheckpointStore::advance). In a `REPEATABLE READ` or
    /// `SERIALIZABLE` transaction, the commit of another worker is a serialization failure rather than a
    /// `Conflict`; it [is transient](crate::Error::is_transient).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// let from = store.in_transaction(&mut tx).get("orders")?;
    /// // apply events from + 1 to from + 100 ...
    /// store.in_transaction(&mut tx).advance("orders", from, from + 100)?;
    /// tx.commit()?;
    /// # Ok(()) }
    /// ```
    pub fn advance(&mut self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let advance = self.run("advance", self.queries.about(projection), |queries, session| {
            queries.advance(session, projection, from, to)
        })?;
        advance.or_conflict(projection, from)
    }

    /// Deletes the checkpoint, and returns whether there was one. One round trip, and a second one if there
    /// was none.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::delete`](crate::CheckpointStore::delete).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// tx.execute("TRUNCATE orders", &[])?;
    /// store.in_transaction(&mut tx).delete("orders")?;
    /// tx.commit()?;
    /// # Ok(()) }
    /// ```
    pub fn delete(&mut self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        self.run("delete", self.queries.about(projection), |queries, session| {
            queries.delete(session, projection)
        })
    }

    /// Locks the projection for this transaction, and returns its offset. One round trip, two if the
    /// checkpoint has to be created.
    ///
    /// It creates the checkpoint at 0 if there is none. When two workers lock one projection, the second waits
    /// until the transaction of the first ends, and then sees the offset that the first has left. If a `delete`
    /// commits while a worker waits here, that worker begins at 0.
    ///
    /// It waits as long as that takes. `SET LOCAL lock_timeout = '5s'` bounds the wait in this transaction, and
    /// `options='-c lock_timeout=5s'` in the connection parameters bounds it in all of them. The error of a
    /// wait that is too long [is transient](crate::Error::is_transient).
    ///
    /// While the transaction is open, do not write the same projection through the store itself, as with
    /// `store.save`: that call waits for this transaction, on the thread that is to commit it. Only
    /// `lock_timeout` ends such a wait.
    ///
    /// With [`save`](InTransaction::save) and the commit, each event is applied exactly once. Call it first in
    /// the transaction: what was read before it may be out of date.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection); [`Unavailable`](crate::Error::Unavailable) or
    /// [`Backend`](crate::Error::Backend), which is transient after a deadlock and, in a
    /// `REPEATABLE READ` or `SERIALIZABLE` transaction, when a rival has committed since its
    /// snapshot.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// let offset = store.in_transaction(&mut tx).lock("orders")?;
    /// # Ok(()) }
    /// ```
    pub fn lock(&mut self, projection: &str) -> Result<i64> {
        validate_projection(projection)?;
        self.run("lock", self.queries.about(projection), |queries, session| {
            queries.lock(session, projection)
        })
    }

    /// Like [`lock`](InTransaction::lock), but returns `None` immediately if another transaction has locked the
    /// projection, or is creating it. One round trip if the projection is free, two if it is locked, five if it
    /// has to be created.
    ///
    /// `None` leaves the transaction usable. It never waits for the row lock of another transaction. It does
    /// wait for a lock on the whole table, such as that of `VACUUM FULL`; while the table can only be read, as
    /// during `CREATE INDEX`, it returns `None` for a projection that would have to be created.
    ///
    /// # Errors
    ///
    /// As [`lock`](InTransaction::lock).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore, mut tx: checkpoint_store::postgres::Transaction<'_>) -> checkpoint_store::Result<()> {
    /// match store.in_transaction(&mut tx).try_lock("orders")? {
    ///     Some(offset) => println!("ours, from {offset}"),
    ///     None => println!("another worker has it"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn try_lock(&mut self, projection: &str) -> Result<Option<i64>> {
        validate_projection(projection)?;
        self.run("try_lock", self.queries.about(projection), |queries, session| {
            match queries.lock_if_there(session, projection, WhileTaken::GiveUp)? {
                None => lock_if_absent(queries, session.client, projection),
                Some(lock) => Ok(Some(lock.offset)),
            }
        })
    }

    fn read(&mut self, operation: &'static str, projection: &str) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        self.run(operation, self.queries.about(projection), |queries, session| {
            queries.find(session, projection)
        })
    }

    /// What a failure says about connections goes for those of the store too.
    fn run<T>(
        &mut self,
        operation: &'static str,
        subject: Subject<'_>,
        statement: impl FnOnce(&Queries, &mut DirectSession<'_, Transaction<'c>>) -> Outcome<T>,
    ) -> Result<T> {
        statement(self.queries, &mut DirectSession::unnamed(self.tx)).map_err(|cause| {
            self.connections.note(ErrorClass::of(cause.as_ref()));
            failure(operation, subject, cause)
        })
    }
}

/// The rest of `try_lock` if no row was free: creates the row if there is none.
///
/// To create it is to wait for any other transaction that is creating it: here a millisecond, the shortest
/// time that PostgreSQL knows. The savepoint keeps a time-out from aborting the caller's transaction. The
/// caller's own setting waits in a setting of this crate's, which ends with the transaction.
pub(super) fn lock_if_absent(
    queries: &Queries,
    tx: &mut Transaction<'_>,
    projection: &str,
) -> Outcome<Option<i64>> {
    const BEGIN: &str = "SAVEPOINT checkpoint_store;
        SELECT pg_catalog.set_config(
            'checkpoint_store.lock_timeout', pg_catalog.current_setting('lock_timeout'), true);
        SELECT pg_catalog.set_config('lock_timeout', '1ms', true)";
    const RELEASE: &str = "SELECT pg_catalog.set_config(
            'lock_timeout', pg_catalog.current_setting('checkpoint_store.lock_timeout'), true);
        RELEASE SAVEPOINT checkpoint_store";
    const UNDO: &str = "ROLLBACK TO SAVEPOINT checkpoint_store; RELEASE SAVEPOINT checkpoint_store";
    if queries.is_there(&mut DirectSession::unnamed(tx), projection)? {
        return Ok(None);
    }
    tx.batch_execute(BEGIN)?;
    match queries.lock_new(&mut DirectSession::unnamed(tx), projection) {
        Ok(offset) => {
            tx.batch_execute(RELEASE)?;
            Ok(Some(offset))
        }
        Err(cause) if sql_state(cause.as_ref()) == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            tx.batch_execute(UNDO)?;
            Ok(None)
        }
        Err(cause) => Err(cause),
    }
}
