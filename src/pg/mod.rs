//! The PostgreSQL store: what users call.
//!
//! How a `save` travels. [`PostgresCheckpointStore::save`] checks its arguments and that the thread is not
//! [`inside`] the closure of `project`. A [`Call`] says what it is about and until when it is tried. With group
//! commit, [`group`] decides whether the call writes alone or shares a statement. Either way
//! [`Connections::run`] is the loop: it takes a connection from the [`pool`], tests it if it is suspect
//! ([`client`] knows), makes one in an empty slot ([`connect`], [`targets`]), and runs the statement, a function
//! of [`queries`], in a [`session`]. After an error [`errors`] says what it means for the connection and for
//! another attempt, and the `Call`, in [`retry`], how long to pause, when to give up, and what the observer is
//! told.
//!
//! How a `project` travels. [`attempt`] is one attempt, from BEGIN to COMMIT; [`project`] repeats it: the
//! connection comes from [`Connections::client`], the lock and the save from [`queries`], and the `Call`
//! decides. It differs in that a lost COMMIT is looked up, under the lock, by the next attempt.
//!
//! The caller's own transaction, [`transaction`], uses [`queries`] and nothing else: there nothing is repeated.

mod attempt;
mod builder;
mod client;
mod close;
mod connect;
mod connect_error;
mod connections;
mod errors;
mod group;
mod identifier;
mod inside;
mod manager;
mod migrate;
mod params;
mod pool;
mod prepared;
mod project;
mod queries;
mod repeat;
mod retry;
mod session;
mod statements;
mod targets;
mod transaction;
mod unresponsive;
mod waiting;

use std::cell::RefCell;
use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::{Client, Transaction};
use r2d2::{ManageConnection, Pool};

pub use self::attempt::Batch;
pub use self::builder::PostgresCheckpointStoreBuilder;
pub use self::client::PooledClient;
pub(crate) use self::errors::{postgres_error, transience};
pub use self::retry::Retry;
pub use self::transaction::InTransaction;

use self::connect_error::no_connection;
use self::connections::{AfterLoss, Connections};
use self::errors::Subject;
use self::group::{Executed, Group, GroupError, Write};
use self::identifier::Table;
use self::migrate::{Migration, migrate};
use self::queries::Queries;

use self::retry::{Call, deadline_after};
use crate::store::poll;
use crate::validate::{validate_advance, validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, CheckpointStore, Error, Result};

/// A [`CheckpointStore`] that keeps checkpoints in a PostgreSQL table, and uses a pool of connections.
///
/// If the read model is in the same database, use [`project`](Self::project) or
/// [`in_transaction`](Self::in_transaction), which save the checkpoint together with it. If it is elsewhere,
/// use a [`Checkpointer`](crate::Checkpointer) on top of a store.
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
///
/// # Sharing between threads
///
/// A clone is another handle on the same pool. Threads may share one store, or each hold a clone. A store may
/// be dropped on any thread, also on one that drives an async runtime, because other threads close its
/// connections. A store remains usable after a panic.
///
/// # Round trips
///
/// An operation takes one round trip, and holds a connection of the pool for that time. `advance` takes a
/// second one if the row does not exist or holds another offset. A read that finds no checkpoint takes a second
/// one, to check that row-level security does not hide it.
///
/// # Lost connections
///
/// | Situation | What the store does |
/// |---|---|
/// | A connection has been idle for more than a second; or another connection was lost, or found to be read-only, since it was last used. | Before the connection is used it is tested, which takes one more round trip, and replaced if it does not answer within 2 seconds. Before `save`, `save_many` and `delete` it is tested after 25 milliseconds, because a write that was not sent yet can safely be sent again. |
/// | The connection is lost during `find`, `get` or `all`. | The operation runs again on another connection. |
/// | The connection is lost during `save`, `save_many` or `delete`. | The operation runs again if `updated_at` shows that no other client has written the checkpoint since the first attempt began. Otherwise it returns [`Unavailable`](Error::Unavailable): the outcome is unknown. If the row does not exist there is nothing to compare, so the first `save` of a projection is not repeated. |
/// | The connection is lost during `advance`. | It returns [`Unavailable`](Error::Unavailable): read the offset again. |
/// | The statement fails with 25006 (read-only server), 57P05 (idle session ended) or 25P02 (failed transaction left open). | Nothing was executed. The connection is discarded, and the operation, including `advance`, runs again on another one. |
/// | The statement fails with a deadlock or a serialization failure. | Nothing was executed. The operation runs again. |
///
/// To decide whether to repeat a write, the store compares `updated_at` with the server's clock. It assumes
/// that this clock is not set forward during the call. The comparison is accurate to one round trip: a write of
/// another client less than one round trip before the call may be taken for a later one, and the call then
/// returns `Unavailable`. Within a minute after a failover no lost write is repeated, because the row may have
/// the time of the old server's clock. A repeated `delete` may return `false` although its first attempt
/// deleted the checkpoint.
///
/// After a connection is lost, the server may still be executing its last statement, so an offset that is read
/// immediately afterwards may not include it. This is safe with `lock`, which waits for the transaction of that
/// statement, and with `advance`, which returns a [`Conflict`](Error::Conflict). A `save` that is executed late
/// moves the checkpoint back to its own offset. If several clients write the same projection, use `advance` or
/// a transaction.
///
/// # Time limits
///
/// Each call has one deadline: [`connection_timeout`](PostgresCheckpointStoreBuilder::connection_timeout) after
/// it begins, 30 seconds by default. Waiting for a connection, tests, logins, retries and group commit share
/// it. A call returns at most one second after its deadline, unless one of these takes longer:
///
/// - a statement that the server is executing, or whose answer is outstanding;
/// - a running closure of [`project`](Self::project);
/// - a row lock that `lock` or `project` waits for.
///
/// [`wait_for`](CheckpointStore::wait_for) has its own time-out instead.
///
/// A call that finds no connection returns [`Unavailable`](Error::Unavailable) at its deadline, or immediately
/// if the server refuses the login, for example because of the password. The cause distinguishes a pool whose
/// connections are all in use from a server that cannot be reached. When a server comes back, the store
/// reconnects within about 2 seconds. With a pool of your own that takes up to half of the pool's
/// `connection_timeout`, because `r2d2` pauses that long between two attempts to connect.
///
/// # Retries
///
/// The first retry after a lost connection is immediate. After that the pauses double from 50 milliseconds up
/// to 1 second; after a deadlock or a serialization failure, from 5 up to 200 milliseconds. Each pause is
/// shortened at random by up to a half, so that clients do not all retry at the same moment.
/// [`on_retry`](PostgresCheckpointStoreBuilder::on_retry) reports each retry.
///
/// # Triggers, rules and policies
///
/// Each write checks that the stored row has the given name and offset. If a trigger, a rule or a policy has
/// discarded or altered the row, the call fails, and nothing of the write is kept.
///
/// # Poolers
///
/// Statements are unnamed, so the store works through a pooler such as PgBouncer in transaction mode, unless
/// [`prepared_statements`](PostgresCheckpointStoreBuilder::prepared_statements) is on.
///
/// # Panics
///
/// On a thread that drives an async runtime, every operation panics; see [the crate's
/// page](crate#from-async-code).
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

    /// Creates the table, and its schema, if they do not exist. No other operation of this crate runs DDL.
    ///
    /// The table gets a `fillfactor` of 25: room on each page for new versions of its rows, so that more than
    /// 99 percent of saves are heap-only (HOT) updates and the table stays small; see `benches/storage.rs`. An
    /// existing table is checked and not changed.
    ///
    /// Any number of processes may call it at the same time. If the table exists, no right to create anything
    /// is needed. Every operation then needs no more than `USAGE` on the schema and `SELECT`, `INSERT`,
    /// `UPDATE`, `DELETE` on the table.
    ///
    /// # Errors
    ///
    /// - [`IncompatibleTable`](Error::IncompatibleTable) if the table has other columns, types, nullability or
    ///   another primary key. It may have more columns if a row needs no value for them.
    /// - [`Backend`](Error::Backend) if the role lacks the right to create what is missing.
    /// - [`Unavailable`](Error::Unavailable).
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
        let Shared { queries, connections, updated_at_index, .. } = &*self.shared;
        let table = &queries.table;
        let mut call = connections.call("migrate", queries.about_all());
        let migration = connections.run(&mut call, AfterLoss::RepeatIfUnwritten, |client, _| {
            migrate(client, table, *updated_at_index)
        })?;
        match migration {
            Migration::Ready => Ok(()),
            Migration::Incompatible(reason) => {
                Err(Error::IncompatibleTable { table: table.to_string(), reason })
            }
        }
    }

    /// Returns the store's operations inside the caller's transaction, on any connection. Read model and
    /// checkpoint are then committed together.
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

    /// Takes a connection from the pool, for the caller's own statements and transactions. The connection
    /// returns to the pool when it is dropped.
    ///
    /// Like every operation, it waits for a connection, and tests one that may be lost; see
    /// [above](Self#lost-connections).
    ///
    /// Leave the connection as it was: begin transactions with `transaction()`, which rolls back when it is
    /// dropped, and change no setting that outlasts them. After a `BEGIN` of your own that is still open, the
    /// store's next operation on that connection is part of that transaction: a `save` would return `Ok`, and
    /// never be committed.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](Error::Unavailable), with the cause. If a thread holds the pool's last connection and
    /// asks for another one, or calls the store itself, the call fails at its deadline.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore) -> checkpoint_store::Result<()> {
    /// let mut client = store.connection()?;
    /// println!("{} orders", client.query_one("SELECT count(*) FROM orders", &[])?.get::<_, i64>(0));
    /// # Ok(()) }
    /// ```
    pub fn connection(&self) -> Result<PooledClient> {
        let connections = &self.shared.connections;
        connections.client(&mut connections.call("connection", Subject::Pool))
    }

    /// Returns how many connections the pool has, and how many of them are idle.
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

    /// Writes alone, or with group commit perhaps together with others. If its group may have executed the
    /// write, the call that `alone` gets says when it began.
    fn write(
        &self,
        operation: &'static str,
        (projection, from, to): (&str, Option<i64>, i64),
        alone: impl FnOnce(&mut Call<'_>) -> Result<()>,
    ) -> Result<()> {
        self.refuse_inside_the_closure(operation)?;
        let Shared { queries, connections, group, .. } = &*self.shared;
        let subject = queries.about(projection);
        let mut call = connections.call(operation, subject);
        let Some(group) = group else { return alone(&mut call) };
        let (began, deadline, call) = (Instant::now(), call.deadline, RefCell::new(call));
        let together = |writes: &[&Write]| {
            let call = &mut *call.borrow_mut();
            (call.operation, call.subject) = ("group commit", queries.about_many(writes.len()));
            let mut is_sent = false;
            let stored = connections.run(call, AfterLoss::Fail, |client, _| {
                is_sent = true;
                queries.write_together(client, writes)
            });
            (call.operation, call.subject) = (operation, subject);
            stored.map_err(|error| match error {
                Error::Unavailable { .. } if is_sent => GroupError::Lost(error),
                Error::Unavailable { .. } => GroupError::NotSent(error),
                _ => GroupError::Refused,
            })
        };
        group.write(
            Write { projection: projection.to_owned(), from, to },
            deadline,
            together,
            |executed| {
                let call = &mut *call.borrow_mut();
                call.lost = (executed == Executed::Unknown).then_some(began);
                alone(call)
            },
            || connections.observe_outage(&mut call.borrow_mut()),
            |cause| no_connection(operation, subject, cause),
        )
    }

    fn read(&self, projection: &str, call: &mut Call<'_>) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        let Shared { queries, connections, .. } = &*self.shared;
        connections.run(call, AfterLoss::Repeat, |client, _| queries.find(client, projection))
    }

    fn call<'a>(&'a self, operation: &'static str, projection: &'a str) -> Call<'a> {
        let Shared { queries, connections, .. } = &*self.shared;
        connections.call(operation, queries.about(projection))
    }
}

impl fmt::Debug for PostgresCheckpointStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresCheckpointStore")
            .field("table", &format_args!("{}", self.shared.queries.table))
            .field("pool", &self.pool_state())
            .finish_non_exhaustive()
    }
}

/// Nothing panics while something of the store is half changed.
impl UnwindSafe for PostgresCheckpointStore {}
impl RefUnwindSafe for PostgresCheckpointStore {}

impl CheckpointStore for PostgresCheckpointStore {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.read(projection, &mut self.call("find", projection))
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        let Shared { queries, connections, .. } = &*self.shared;
        let mut call = connections.call("all", queries.about_all());
        connections.run(&mut call, AfterLoss::Repeat, |client, _| queries.all(client))
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        let Shared { queries, connections, .. } = &*self.shared;
        self.write("save", (projection, None, offset), |call| {
            connections.run(call, AfterLoss::RepeatIfUnwritten, |client, lost| match lost {
                None => queries.save(client, projection, offset),
                Some(lost) => queries.save_again(client, &[(projection, offset)], lost),
            })
        })
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let Shared { queries, connections, .. } = &*self.shared;
        self.write("advance", (projection, Some(from), to), |call| {
            let advance = connections.run(call, AfterLoss::Fail, |client, _| {
                queries.advance(client, projection, from, to)
            })?;
            advance.or_conflict(projection, from)
        })
    }

    fn delete(&self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        self.refuse_inside_the_closure("delete")?;
        let Shared { queries, connections, .. } = &*self.shared;
        let mut call = self.call("delete", projection);
        connections.run(&mut call, AfterLoss::RepeatIfUnwritten, |client, lost| match lost {
            None => queries.delete(client, projection),
            Some(lost) => queries.delete_again(client, projection, lost),
        })
    }

    fn get(&self, projection: &str) -> Result<i64> {
        let found = self.read(projection, &mut self.call("get", projection))?;
        Ok(found.map_or(0, |checkpoint| checkpoint.offset))
    }

    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        self.refuse_inside_the_closure("save_many")?;
        if checkpoints.is_empty() {
            return Ok(());
        }
        let Shared { queries, connections, .. } = &*self.shared;
        let mut call = connections.call("save_many", queries.about_many(checkpoints.len()));
        connections.run(&mut call, AfterLoss::RepeatIfUnwritten, |client, lost| match lost {
            None => queries.save_many(client, checkpoints),
            Some(lost) => queries.save_again(client, checkpoints, lost),
        })
    }

    fn wait_for(&self, projection: &str, offset: i64, timeout: Duration) -> Result<bool> {
        /// The time of a question that begins when the time-out is over.
        const LAST_QUESTION: Duration = Duration::from_millis(250);
        validate_projection(projection)?;
        validate_offset(offset)?;
        let deadline = deadline_after(timeout);
        let mut call = self.call("wait_for", projection);
        poll(timeout, || {
            call.deadline = deadline.max(deadline_after(LAST_QUESTION));
            let found = self.read(projection, &mut call)?;
            Ok(found.map_or(0, |checkpoint| checkpoint.offset) >= offset)
        })
    }
}
