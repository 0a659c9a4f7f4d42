mod builder;
mod close;
mod connect;
mod connect_error;
mod connections;
mod failure;
mod group;
mod identifier;
mod migrate;
mod params;
mod prepared;
mod project;
mod queries;
mod session;
mod targets;
mod transaction;
mod unresponsive;

use std::fmt;
use std::sync::Arc;

use postgres::{Client, Transaction};
use r2d2::{ManageConnection, Pool};

pub use self::builder::PostgresCheckpointStoreBuilder;
pub use self::connections::PooledClient;
pub(crate) use self::failure::transience;
pub use self::project::Batch;
pub use self::transaction::InTransaction;

use self::connections::Connections;
use self::failure::no_connection;
use self::group::{Group, Write};
use self::identifier::Table;
use self::migrate::{Migration, migrate};
use self::queries::Queries;
use crate::validate::{validate_advance, validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, CheckpointStore, Error, Result};

/// Checkpoints in a PostgreSQL table, through a pool of connections.
///
/// A clone is another handle on the same pool. Threads may share one store, or hold clones.
///
/// # Connections
///
/// An operation takes a connection from the pool for as long as it runs, one round trip, and waits
/// for one up to [`connection_timeout`](PostgresCheckpointStoreBuilder::connection_timeout), 30 seconds
/// by default. So long does it also try again. The caller sees [`Unavailable`](Error::Unavailable) only
/// when that time has passed, or within about a second when the server refuses every connection, a
/// password say; its cause says whether no connection could be made or all are in use.
///
/// | What happens to the connection | What the store does |
/// |---|---|
/// | it is lost: the server was restarted, the backend ended, FATAL or PANIC | `find`, `get`, `all`, `save`, `save_many` and `delete` run again on a fresh one; `advance` is `Unavailable`, for a second one would find the first one's offset: read the offset again |
/// | it is suspect: it has not worked since the last loss, since a server was found to be read-only, or for a second | `advance` and [`connection`](Self::connection) test it first, at the price of a round trip, so an outage, or a server that turns read-only under the caller's transactions, is at most one error to who is in a call and none to who comes after |
/// | the server has become read-only (25006), or a failed transaction was left open (25P02) | nothing was executed: it is thrown away, and every operation, `advance` too, runs again on a fresh one |
/// | the server rolls back because of others: a deadlock, a serialization failure | nothing has happened: it runs again |
///
/// A repeated `delete` may say `false` for what its first try has deleted.
///
/// After an outage a store is back within about 2 seconds of its server. With a pool of the
/// caller's own that is up to half of its `connection_timeout`, because `r2d2` pauses that long
/// between two attempts to connect.
///
/// A server may still be at a request whose client is gone, so the offset that is read at once may
/// be the one from before. Nothing is lost or counted twice by that: `lock` waits for what is
/// under way, and an `advance` from such an offset is a [`Conflict`](Error::Conflict), upon which
/// the caller reads again. A `save` that is so late sets the checkpoint back to its own offset;
/// where that would be a harm, use `advance` or a transaction.
///
/// Where a trigger discards rows, the write is an error; other rows of the same `save_many` are
/// stored then.
///
/// When the last handle is dropped its connections are closed. Three idle threads of `r2d2` live on
/// for up to 30 seconds, until they notice.
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
#[derive(Clone)]
pub struct PostgresCheckpointStore {
    shared: Arc<Shared>,
}

/// What every handle on the same store has in common.
struct Shared {
    queries: Queries,
    connections: Connections,
    updated_at_index: bool,
    group: Option<Group>,
}

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
    pub fn new<M>(pool: Pool<M>) -> Self
    where
        M: ManageConnection<Connection = Client>,
    {
        let connections = Connections::of(pool, None, false);
        let queries = Queries::new(Table::default());
        let shared = Shared { queries, connections, updated_at_index: false, group: None };
        Self { shared: Arc::new(shared) }
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
        let Shared { queries: Queries { table, .. }, connections, updated_at_index, .. } =
            &*self.shared;
        let migration =
            connections.run_until_answered("migrate", format_args!("table {table}"), |client| {
                migrate(client, table, *updated_at_index)
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
        let Shared { queries, connections, .. } = &*self.shared;
        InTransaction { queries, connections, tx }
    }

    /// A connection of the pool, for the caller's own statements and transactions. It goes back when
    /// it is dropped.
    ///
    /// It waits for one as every operation does. A suspect one, see [above](Self#connections), is
    /// tested first, and replaced if it is dead.
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
    pub fn connection(&self) -> Result<PooledClient> {
        let connections = &self.shared.connections;
        connections.check_out_tested("connection", "the store's pool", &mut connections.patience())
    }

    /// How many connections the pool has, and how many of them are idle.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// # let store = PostgresCheckpointStore::connect("host=localhost user=app")?;
    /// println!("{} connections are open", store.pool_state().connections);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn pool_state(&self) -> r2d2::State {
        self.shared.connections.state()
    }

    /// Writes alone, or with group commit perhaps together with others.
    fn write(
        &self,
        operation: &'static str,
        (projection, from, to): (&str, Option<i64>, i64),
        alone: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Shared { queries, connections, group, .. } = &*self.shared;
        let Some(group) = group else { return alone() };
        group.write(
            Write { projection: projection.to_owned(), from, to },
            |writes| {
                let subject = queries.about_so_many(writes.len());
                connections.run_unless_lost("group commit", subject, |client| {
                    queries.write_together(client, writes)
                })
            },
            alone,
            |cause| no_connection(operation, queries.about(projection), InGroup(cause)),
        )
    }

    fn read(&self, operation: &'static str, projection: &str) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        let Shared { queries, connections, .. } = &*self.shared;
        connections.run_until_answered(operation, queries.about(projection), |client| {
            queries.find(client, projection)
        })
    }
}

/// The connection was lost under a statement that several calls shared.
#[derive(Debug, thiserror::Error)]
#[error("in a group of calls")]
struct InGroup(#[source] Arc<Error>);

impl fmt::Debug for PostgresCheckpointStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresCheckpointStore")
            .field("table", &format_args!("{}", self.shared.queries.table))
            .field("pool", &self.pool_state())
            .finish_non_exhaustive()
    }
}

impl CheckpointStore for PostgresCheckpointStore {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.read("find", projection)
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        let Shared { queries, connections, .. } = &*self.shared;
        connections.run_until_answered("all", format_args!("table {}", queries.table), |client| {
            queries.all(client)
        })
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        let Shared { queries, connections, .. } = &*self.shared;
        self.write("save", (projection, None, offset), || {
            connections.run_until_answered("save", queries.about(projection), |client| {
                queries.save(client, projection, offset)
            })
        })
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let Shared { queries, connections, .. } = &*self.shared;
        self.write("advance", (projection, Some(from), to), || {
            connections
                .run_unless_lost("advance", queries.about(projection), |client| {
                    queries.advance(client, projection, from, to)
                })?
                .or_conflict(projection, from)
        })
    }

    fn delete(&self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        let Shared { queries, connections, .. } = &*self.shared;
        connections.run_until_answered("delete", queries.about(projection), |client| {
            queries.delete(client, projection)
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
        let Shared { queries, connections, .. } = &*self.shared;
        connections.run_until_answered("save_many", queries.about_many(checkpoints), |client| {
            queries.save_many(client, checkpoints)
        })
    }
}
