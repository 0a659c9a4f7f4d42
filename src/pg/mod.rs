mod builder;
mod failure;
mod identifier;
mod migrate;
mod pool;
mod prepared;
mod queries;
mod session;
mod transaction;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use postgres::{Client, NoTls, Transaction};
use r2d2::{ManageConnection, Pool, PooledConnection};
use r2d2_postgres::PostgresConnectionManager;

pub use self::builder::PostgresCheckpointStoreBuilder;
pub(crate) use self::failure::{subject, transience};
pub use self::transaction::InTransaction;

use self::failure::{Outcome, failure, is_connection_loss, is_rolled_back, no_connection};
use self::identifier::Table;
use self::migrate::{Migration, migrate};
use self::pool::{AllInUse, ConnectWatch, OPERATION_TIMEOUT, Patience, take};
use self::prepared::{Pooled, SessionCheck};
use self::queries::Queries;
use crate::checkpoint::{validate_advance, validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, CheckpointStore, Error, Result};

/// Checkpoints in a PostgreSQL table, through a pool of connections.
///
/// A clone is another handle on the same pool. Threads may share one store, or hold clones.
///
/// # Connections
///
/// An operation takes a connection from the pool for as long as it runs, one round trip, and waits
/// for one up to 30 seconds, or with a pool of the caller's own up to its `connection_timeout`. No
/// connection is tested when it is taken out. When one turns out to be dead, because the server
/// was restarted, say, operations that can be repeated safely go on with a fresh one: `find`,
/// `get`, `all`, `save`, `save_many` and `delete`. The caller sees
/// [`Unavailable`](Error::Unavailable) only when that time has passed, or within about a second when
/// the server refuses every connection, a password say; its cause says whether no connection could
/// be made or all are in use. A repeated `delete` may say `false` for what its
/// first try has deleted.
///
/// After an outage a store is back within about 2 seconds of its server. With a pool of the
/// caller's own that is up to half of its `connection_timeout`, because `r2d2` pauses that long
/// between two attempts to connect.
///
/// `advance` is not repeated once the server may have seen it, for the second one would find the
/// first one's offset: it returns `Unavailable`, and the caller reads the offset again. Once a
/// connection was lost, the others from before are tested before an `advance` uses them, so that
/// one outage is one error, not one for each connection.
///
/// A server may still be at a request whose client is gone, so the offset that is read at once may
/// be the one from before. Nothing is lost or counted twice by that: `lock` waits for what is
/// under way, and an `advance` from such an offset is a [`Conflict`](Error::Conflict), upon which
/// the caller reads again. A `save` that is so late sets the checkpoint back to its own offset;
/// where that would be a harm, use `advance` or a transaction.
///
/// What the server rolls back because of others, with a serialization failure or a deadlock, is run
/// again by the store: it has certainly not happened.
///
/// Where a trigger discards rows, the write is an error; other rows of the same `save_many` are
/// stored then.
///
/// # Panics
///
/// On a thread that drives an async runtime, dropping the last handle there included; see
/// [the crate's page](crate#from-async-code).
///
/// # Statements
///
/// Statements are unnamed, so a pooler such as PgBouncer in transaction mode may stand between;
/// unless they are [kept](PostgresCheckpointStoreBuilder::prepared_statements).
///
/// # Examples
///
/// ```no_run
/// use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};
///
/// let store = PostgresCheckpointStore::connect("postgres://app:secret@localhost/app")?;
/// store.migrate()?;
/// store.save("orders", 42)?;
/// assert_eq!(store.get("orders")?, 42);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
pub struct PostgresCheckpointStore<M = PostgresConnectionManager<NoTls>>
where
    M: ManageConnection<Connection = Client>,
{
    pool: Pool<M>,
    shared: Arc<Shared>,
}

/// What every handle on the same store has in common, besides the pool.
struct Shared {
    queries: Queries,
    options: Options,
    /// What is known of the connections, where the builder made the pool.
    watch: Option<ConnectWatch>,
    sessions: SessionCheck,
    /// How many connections were lost so far.
    losses: AtomicU64,
}

/// What the builder was told, besides the table and the pool.
#[derive(Debug, Clone, Copy, Default)]
struct Options {
    updated_at_index: bool,
    prepared_statements: bool,
}

/// Kept with a pooled connection: the count of losses at which it was last known to work.
struct KnownToWork(u64);

impl PostgresCheckpointStore {
    /// Connects with all defaults: no TLS, table `public.projection_checkpoints`, at most 10
    /// connections.
    ///
    /// # Errors
    ///
    /// As [`PostgresCheckpointStoreBuilder::connect`], which says more about the parameters too.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let store = PostgresCheckpointStore::connect("host=localhost user=app dbname=app")?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn connect(params: &str) -> Result<Self> {
        Self::builder().connect(params)
    }

    /// Starts to configure a store.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().schema("staging").max_connections(4);
    /// ```
    pub fn builder() -> PostgresCheckpointStoreBuilder {
        PostgresCheckpointStoreBuilder::default()
    }
}

impl<M: ManageConnection<Connection = Client>> PostgresCheckpointStore<M> {
    /// Uses the caller's pool, with the table `public.projection_checkpoints`. For another table
    /// see [`PostgresCheckpointStoreBuilder::build`]. No connection is made.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::PostgresCheckpointStore;
    /// use checkpoint_store::postgres::NoTls;
    /// use checkpoint_store::r2d2::Pool;
    /// use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
    ///
    /// let params = "host=localhost user=app".parse().expect("valid parameters");
    /// let pool = Pool::builder()
    ///     .test_on_check_out(false) // each operation is one round trip, not two
    ///     .build_unchecked(PostgresConnectionManager::new(params, NoTls));
    /// let store = PostgresCheckpointStore::new(pool);
    /// ```
    #[must_use]
    pub fn new(pool: Pool<M>) -> Self {
        Self::assemble(pool, Table::default(), Options::default(), None, SessionCheck::default())
    }

    fn assemble(
        pool: Pool<M>,
        table: Table,
        options: Options,
        watch: Option<ConnectWatch>,
        sessions: SessionCheck,
    ) -> Self {
        let queries = Queries::new(table);
        let shared = Shared { queries, options, watch, sessions, losses: AtomicU64::new(0) };
        Self { pool, shared: Arc::new(shared) }
    }

    /// Makes the table, and the schema, where they are missing. Nothing else of this crate runs
    /// DDL.
    ///
    /// The table gets a `fillfactor` of 25: room on each page for new versions of its rows, so that
    /// more than 99 percent of saves are heap-only (HOT) updates and the table stays small; see
    /// `benches/storage.rs`. A table that is there already is left as it is.
    ///
    /// Any number of processes may call it at once. Where the table stands already nothing is
    /// created, and no right to create anything is needed; its columns are checked. Once it
    /// stands, `USAGE` on the schema and `SELECT`, `INSERT`, `UPDATE`, `DELETE` on the table are
    /// enough for everything.
    ///
    /// # Errors
    ///
    /// [`IncompatibleTable`](Error::IncompatibleTable) when the table has other columns, types,
    /// nullability or another primary key; columns besides are fine if rows can do without them.
    /// [`Backend`](Error::Backend) when the role lacks the right to create what is missing;
    /// [`Unavailable`](Error::Unavailable).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let store = PostgresCheckpointStore::connect("host=localhost user=app")?;
    /// store.migrate()?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn migrate(&self) -> Result<()> {
        let Queries { table, .. } = &self.shared.queries;
        let migration = self.repeatable("migrate", format_args!("table {table}"), |session| {
            migrate(session.connection, table, self.shared.options.updated_at_index)
        })?;
        match migration {
            Migration::Ready => Ok(()),
            Migration::Incompatible(reason) => {
                Err(Error::IncompatibleTable { table: table.to_string(), reason })
            }
        }
    }

    /// The store's operations inside the caller's transaction, on whatever connection that is; so
    /// the read model and the checkpoint commit together, and each event counts exactly once.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore) -> checkpoint_store::Result<()> {
    /// let mut client = store.connection()?;
    /// let mut tx = client.transaction()?;
    /// let offset = store.in_transaction(&mut tx).lock("orders")?;
    /// tx.execute("UPDATE totals SET orders = orders + 1", &[])?;
    /// store.in_transaction(&mut tx).save("orders", offset + 1)?;
    /// tx.commit()?;
    /// # Ok(()) }
    /// ```
    pub fn in_transaction<'a, 'c>(&'a self, tx: &'a mut Transaction<'c>) -> InTransaction<'a, 'c> {
        InTransaction { queries: &self.shared.queries, tx }
    }

    /// A connection of the pool, for the caller's own statements and transactions. It goes back when
    /// it is dropped.
    ///
    /// It waits for one as every operation does, and does not test it: a dead one is an error at its
    /// first use, and replaced for the next try. Unlike `get` of the [`pool`](Self::pool) it says in
    /// its error why there is none, and [`is_transient`](Error::is_transient) judges that.
    ///
    /// Give it back as it was: begin transactions with `transaction()`, which rolls back when it is
    /// dropped, and change no setting that outlasts them. After a `BEGIN` of your own that is still
    /// open, the store's next operation on that connection is part of it: a `save` would return
    /// `Ok`, and never be committed.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](Error::Unavailable), with the cause. A thread that holds the pool's last
    /// connection and wants another one, or calls the store itself, gets it after the time-out.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore) -> checkpoint_store::Result<()> {
    /// let mut client = store.connection()?;
    /// let mut tx = client.transaction()?;
    /// tx.execute("UPDATE totals SET orders = orders + 1", &[])?;
    /// store.in_transaction(&mut tx).save("orders", 42)?;
    /// tx.commit()?;
    /// # Ok(()) }
    /// ```
    pub fn connection(&self) -> Result<PooledConnection<M>> {
        self.take("connection", "the store's pool", self.patience().deadline)
    }

    /// The pool itself.
    ///
    /// Its `Debug` output tells the parameters, host and user among them, without the password;
    /// that of the store tells none.
    ///
    /// If the builder made it, its `get` waits up to 4 seconds, and its error does not always say why;
    /// [`connection`](Self::connection) does.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// # let store = PostgresCheckpointStore::connect("host=localhost user=app")?;
    /// println!("{} connections are open", store.pool().state().connections);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn pool(&self) -> &Pool<M> {
        &self.pool
    }

    fn read(&self, operation: &'static str, projection: &str) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        let queries = &self.shared.queries;
        self.repeatable(operation, queries.about(projection), |session| {
            queries.find(session, projection)
        })
    }

    /// Runs what may run twice, on fresh connections for as long as the store's patience lasts.
    fn repeatable<T>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        mut query: impl FnMut(&mut Pooled<'_, M>) -> Outcome<T>,
    ) -> Result<T> {
        let mut patience = self.patience();
        loop {
            let mut connection = self.take(operation, &subject, patience.deadline)?;
            match self.run(&mut connection, &mut patience, &mut query) {
                Err(cause) if is_connection_loss(cause.as_ref()) => {
                    drop(connection);
                    if !patience.pause() {
                        return Err(failure(operation, subject, cause));
                    }
                }
                outcome => return outcome.map_err(|cause| failure(operation, subject, cause)),
            }
        }
    }

    /// Runs what must not run twice. After a connection was lost, the others from before are tested
    /// first, at the price of a round trip, so that one outage is one error.
    fn once<T>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        query: impl FnMut(&mut Pooled<'_, M>) -> Outcome<T>,
    ) -> Result<T> {
        let mut patience = self.patience();
        let losses = self.shared.losses.load(Ordering::Relaxed);
        let mut connection = loop {
            let mut connection = self.take(operation, &subject, patience.deadline)?;
            let known = PooledConnection::extensions(&connection).get::<KnownToWork>();
            if losses == known.map_or(0, |known| known.0) {
                break connection;
            }
            match connection.check_connection() {
                Ok(()) => {
                    PooledConnection::extensions_mut(&mut connection).insert(KnownToWork(losses));
                    break connection;
                }
                Err(cause) => {
                    drop(connection);
                    if !patience.pause() {
                        return Err(failure(operation, subject, cause));
                    }
                }
            }
        };
        self.run(&mut connection, &mut patience, query)
            .map_err(|cause| failure(operation, subject, cause))
    }

    /// Runs a query again where others have made the server roll it back: nothing has happened then.
    fn run<T>(
        &self,
        connection: &mut PooledConnection<M>,
        patience: &mut Patience,
        mut query: impl FnMut(&mut Pooled<'_, M>) -> Outcome<T>,
    ) -> Outcome<T> {
        let prepared_statements = self.shared.options.prepared_statements;
        loop {
            let outcome = query(&mut Pooled { connection, prepared_statements });
            match &outcome {
                Err(cause) if is_rolled_back(cause.as_ref()) && patience.pause() => continue,
                Err(cause) if is_connection_loss(cause.as_ref()) => {
                    self.shared.losses.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            }
            return outcome;
        }
    }

    fn patience(&self) -> Patience {
        let ours = self.shared.watch.is_some();
        let time = if ours { OPERATION_TIMEOUT } else { self.pool.connection_timeout() };
        Patience::until(Instant::now() + time, self.pool.max_size())
    }

    fn take(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        deadline: Instant,
    ) -> Result<PooledConnection<M>> {
        let last_failure = || self.shared.watch.as_ref().and_then(ConnectWatch::last_failure);
        // A refused password, say: none is left to come back, and waiting does not bring a new one.
        let hopeless = || {
            self.pool.state().connections == 0
                && last_failure().is_some_and(|cause| transience(&cause) == Some(false))
        };
        let connection = take(&self.pool, deadline, hopeless).map_err(|timeout| {
            let size = self.pool.max_size();
            if self.pool.state().connections == size {
                return no_connection(operation, &subject, AllInUse(size));
            }
            match last_failure() {
                Some(cause) => no_connection(operation, &subject, cause),
                None => no_connection(operation, &subject, timeout),
            }
        })?;
        self.shared.sessions.outcome().map_err(|cause| failure(operation, subject, cause))?;
        Ok(connection)
    }
}

impl<M: ManageConnection<Connection = Client>> Clone for PostgresCheckpointStore<M> {
    fn clone(&self) -> Self {
        Self { pool: self.pool.clone(), shared: Arc::clone(&self.shared) }
    }
}

impl<M: ManageConnection<Connection = Client>> fmt::Debug for PostgresCheckpointStore<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresCheckpointStore")
            .field("table", &format_args!("{}", self.shared.queries.table))
            .field("pool", &self.pool.state())
            .finish_non_exhaustive()
    }
}

impl<M: ManageConnection<Connection = Client>> CheckpointStore for PostgresCheckpointStore<M> {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.read("find", projection)
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        let queries = &self.shared.queries;
        self.repeatable("all", format_args!("table {}", queries.table), |session| {
            queries.all(session)
        })
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        let queries = &self.shared.queries;
        self.repeatable("save", queries.about(projection), |session| {
            queries.save(session, projection, offset)
        })
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let queries = &self.shared.queries;
        self.once("advance", queries.about(projection), |session| {
            queries.advance(session, projection, from, to)
        })?
        .or_conflict(projection, from)
    }

    fn delete(&self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        let queries = &self.shared.queries;
        self.repeatable("delete", queries.about(projection), |session| {
            queries.delete(session, projection)
        })
    }

    fn get(&self, projection: &str) -> Result<i64> {
        Ok(self.read("get", projection)?.map_or(0, |checkpoint| checkpoint.offset))
    }

    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        if checkpoints.is_empty() {
            return Ok(());
        }
        let queries = &self.shared.queries;
        self.repeatable("save_many", queries.about_many(checkpoints), |session| {
            queries.save_many(session, checkpoints)
        })
    }
}
