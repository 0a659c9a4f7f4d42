use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Config, NoTls, Socket};
use r2d2::{ManageConnection, Pool};

use super::close::close;
use super::connect::{Connector, PasswordProvider};
use super::connect_error::no_connection;
use super::connections::{Connections, DEFAULT_TIMEOUT};
use super::errors::failure;
use super::group::Group;
use super::identifier::Table;
use super::params;
use super::prepared::refuse_shared_sessions;
use super::queries::Queries;
use super::retry::{Observer, Retry, deadline_after};
use super::targets::server_name;
use super::{PostgresCheckpointStore, Shared};
use crate::{Error, Result};

/// Configures a [`PostgresCheckpointStore`]; made by [`PostgresCheckpointStore::builder`].
///
/// # Examples
///
/// ```no_run
/// use checkpoint_store::PostgresCheckpointStore;
///
/// let store = PostgresCheckpointStore::builder()
///     .schema("billing")
///     .table("checkpoints")
///     .max_connections(4)
///     .connect("host=localhost user=app")?;
/// store.migrate()?;
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "a builder does nothing until `connect`, `connect_tls`, `connect_config` or `build`"]
pub struct PostgresCheckpointStoreBuilder {
    schema: String,
    table: String,
    updated_at_index: bool,
    prepared_statements: bool,
    group_commit: bool,
    max_connections: u32,
    connection_timeout: Option<Duration>,
    observer: Option<Arc<Observer>>,
    password_provider: Option<Arc<PasswordProvider>>,
}

/// PostgreSQL itself takes no more: `MAX_BACKENDS` in its source.
const MOST_CONNECTIONS: u32 = 262_143;

impl Default for PostgresCheckpointStoreBuilder {
    fn default() -> Self {
        Self {
            schema: Table::DEFAULT_SCHEMA.to_owned(),
            table: Table::DEFAULT_TABLE.to_owned(),
            updated_at_index: false,
            prepared_statements: false,
            group_commit: false,
            max_connections: 10,
            connection_timeout: None,
            observer: None,
            password_provider: None,
        }
    }
}

impl PostgresCheckpointStoreBuilder {
    /// Sets the table's schema. The default is `public`.
    ///
    /// The name is quoted, so it is case-sensitive and may contain any character except NUL. It is limited to
    /// 63 bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().schema("staging");
    /// ```
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Sets the table's name. The default is `projection_checkpoints`.
    ///
    /// The name is quoted, so it is case-sensitive and may contain any character except NUL, including a dot:
    /// the schema has a [setter of its own](PostgresCheckpointStoreBuilder::schema). It is limited to 63 bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().table("checkpoints");
    /// ```
    pub fn table(mut self, table: impl Into<String>) -> Self {
        self.table = table.into();
        self
    }

    /// Sets whether [`migrate`](PostgresCheckpointStore::migrate) also creates an index on `updated_at`. The
    /// default is `false`.
    ///
    /// The index speeds up queries for stale checkpoints in a very large table. With it, no save is a heap-only
    /// (HOT) update any more: on PostgreSQL 15, 200,000 saves of 10 projections wrote 1.75 times the WAL, and
    /// table and indexes grew to 13 MB rather than 0.9 MB (`benches/storage.rs`).
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().updated_at_index(true);
    /// ```
    pub fn updated_at_index(mut self, wanted: bool) -> Self {
        self.updated_at_index = wanted;
        self
    }

    /// Sets whether pooled operations use prepared statements, which are kept with their connections, instead
    /// of sending the text of each statement. The default is `false`.
    ///
    /// This saves the server the parsing and planning of every call. If the server has discarded a statement,
    /// or the table has changed since it was prepared, the statement is prepared again. Operations in the
    /// caller's transaction are not prepared.
    ///
    /// # Poolers
    ///
    /// Do not use it with a pooler that assigns a server session to each transaction. The `postgres` crate
    /// names its statements `s0`, `s1` and so on, in every program. If two programs share a server session, a
    /// call may fail because its statement is missing (70 percent of the calls with `PgBouncer` 1.18), or
    /// **execute the other program's statement of the same name**: writes went to the table of the other
    /// program without an error.
    ///
    /// - `connect` checks whether a second connection sees what the first one has prepared. For each new
    ///   connection, the pool checks for statements with such names, which a new session cannot have. If there
    ///   are any, `connect` and every later operation of the store fail with
    ///   [`Backend`](crate::Error::Backend), not transient.
    /// - The same error is returned if the name of a statement is already in use, or if a statement disappears
    ///   right after it was prepared. Both mean that there is such a pooler: stop the program and turn this
    ///   option off.
    /// - Detection is not certain: on a busy pooler, a new connection may never be assigned to a shared
    ///   session. Nothing is checked on the connections of a pool given to
    ///   [`build`](PostgresCheckpointStoreBuilder::build).
    ///
    /// `PgBouncer` in session mode is fine, and so is a pooler that gives the statements names of its own, such
    /// as `PgBouncer` 1.21 and later with `max_prepared_statements` above 0. Such a pooler does not translate
    /// the names in an SQL `EXECUTE`, which the save of [`project`](crate::PostgresCheckpointStore::project)
    /// uses. That save may then fail once for each connection; `project` runs the closure again, and later
    /// saves on that connection are sent as text.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().prepared_statements(true);
    /// ```
    pub fn prepared_statements(mut self, kept: bool) -> Self {
        self.prepared_statements = kept;
        self
    }

    /// Sets whether pooled `save` and `advance` calls that wait at the same time share one statement and one
    /// flush of the database's log. The default is `false`.
    ///
    /// Use it if many threads each save a projection of their own often, also through a
    /// [`Checkpointer`](crate::Checkpointer). It has no effect on up to 8 concurrent calls, which are sent
    /// alone, on rare saves, and on saves in a transaction. The [guide](crate::guide::threads#group-commit) has
    /// figures.
    ///
    /// A call returns when its own offset is durable, with the same result as without group commit. A row that
    /// another transaction has locked delays only the calls on that row. If the database refuses one write,
    /// only the call that made it fails. Two calls on one projection keep their order. If the connection is
    /// lost during a shared statement, each `advance` in it is [`Unavailable`](crate::Error::Unavailable), and
    /// each `save` is repeated as it is without group commit. A call that waits for others does not wait beyond
    /// its own [`connection_timeout`](PostgresCheckpointStoreBuilder::connection_timeout).
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().group_commit(true);
    /// ```
    pub fn group_commit(mut self, wanted: bool) -> Self {
        self.group_commit = wanted;
        self
    }

    /// Sets the size of the pool that `connect`, `connect_tls` and `connect_config` create. The default is 10.
    ///
    /// Connections are opened as they are needed. The size must be between 1 and 262,143, the maximum that
    /// PostgreSQL supports; `connect` refuses any other. A pool given to
    /// [`build`](PostgresCheckpointStoreBuilder::build) keeps its size.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().max_connections(2);
    /// ```
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }

    /// Sets the time limit of each call: how long it waits for a connection and retries. The default is 30
    /// seconds, or with [`build`](PostgresCheckpointStoreBuilder::build) the `connection_timeout` of that pool.
    ///
    /// While the database is down, a program may take this long to shut down. The limit does not apply to the
    /// time that a server takes to answer; see [time limits](PostgresCheckpointStore#time-limits). `connect`
    /// and `build` refuse zero.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// use std::time::Duration;
    ///
    /// let for_a_health_check =
    ///     PostgresCheckpointStore::builder().connection_timeout(Duration::from_secs(2));
    /// ```
    pub fn connection_timeout(mut self, timeout: Duration) -> Self {
        self.connection_timeout = Some(timeout);
        self
    }

    /// Sets a function that is called before each retry, so that an operator sees what a call is waiting for.
    ///
    /// It is called on the thread of the call, before each new attempt, with the error that made the attempt
    /// necessary. If no connection can be made, it is called within a second, and then for each attempt, at
    /// most about five times per second and call. An attempt that is not answered within a second is reported
    /// while it continues. The function is not called for a call that succeeds at once, nor for what happens in
    /// the caller's own transactions, which are not retried.
    ///
    /// The function may use the store. No lock of the store is held while it runs. Its time counts towards the
    /// deadline of the call. A panic in it reaches the caller, and leaves the store usable.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let builder = PostgresCheckpointStore::builder().on_retry(|retry| {
    ///     eprintln!("retry {} after {:.1?}: {}", retry.attempt, retry.elapsed, retry.error.report());
    /// });
    /// ```
    pub fn on_retry(mut self, observer: impl Fn(&Retry<'_>) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Sets a function that returns the password for each new connection. By default, the password in the
    /// parameters is used.
    ///
    /// This is for passwords that are rotated, and for passwords that expire, such as the tokens of managed
    /// databases, which are valid for minutes. A server checks the password only at the login, so an open
    /// connection stays usable after its password has expired.
    ///
    /// The function is called on a separate thread, once for each login at each host. It may run up to four
    /// times at once for the same address. Its time counts towards the limit of that login: `connect_timeout`
    /// and one second, 5 seconds by default. If a token is slow to get, keep it until shortly before it
    /// expires, and give the request a time-out.
    ///
    /// If the function fails, the error is [`Unavailable`](crate::Error::Unavailable), transient, with the
    /// function's error in its chain of causes, and the operation retries as in any outage. A panic and a
    /// time-out are reported in the same way. While four calls have not returned, the function is not called
    /// again. A password that the server refuses is an error that is not transient, as it is without a
    /// provider.
    ///
    /// The password appears in no error and in no `Debug` output. The text of the function's own error does
    /// appear.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let store = PostgresCheckpointStore::builder()
    ///     .password_provider(|| Ok(std::fs::read_to_string("/run/secrets/db")?.trim().to_owned()))
    ///     .connect("host=db.example user=app")?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn password_provider(
        mut self,
        provider: impl Fn() -> std::result::Result<String, Box<dyn StdError + Send + Sync>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.password_provider = Some(Arc::new(provider));
        self
    }

    /// Connects without TLS. `params` is a URL, or `key=value` pairs separated by blanks, as in
    /// [`postgres::Config`], which lists them.
    ///
    /// One connection is made before this returns, so that a mistake in the configuration is reported
    /// immediately. It becomes the first connection of the pool.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::PostgresCheckpointStore;
    /// let store = PostgresCheckpointStore::builder()
    ///     .schema("staging")
    ///     .connect("postgres://app:secret@db.example/app")?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    ///
    /// # Parameters
    ///
    /// Surrounding white space is ignored. `user` defaults to the user of the operating system. Unlike with
    /// libpq, `tcp_user_timeout` is in seconds, and `PG*` environment variables, `.pgpass` and service files
    /// are not read. Certificates are verified by the connector given to
    /// [`connect_tls`](PostgresCheckpointStoreBuilder::connect_tls), not by parameters.
    ///
    /// If the parameters cannot be parsed, the error says why. It never contains a value, and it names an
    /// unknown option only if the name cannot be a piece of a password. A host with a character that no host
    /// has, and a user, database or option that appears to contain a password (`password=`, `pwd=`, `token=`
    /// and the like), are refused before anything is sent, because the server would repeat them in its error.
    ///
    /// Unless the parameters set them, or set them to the defaults of `postgres`, these are used:
    /// `connect_timeout` 4 seconds per address, `tcp_user_timeout` 10 seconds, `keepalives_idle` 10 seconds,
    /// `keepalives_interval` 3 seconds, `keepalives_retries` 3.
    ///
    /// # Hosts and time limits
    ///
    /// Several hosts, or several addresses of one host, are tried in turn, and the first successful one is
    /// used. Each attempt, including the login, is limited to `connect_timeout` and one second, or to an equal
    /// share of the time that is left if that is less. `connect` returns within
    /// [`connection_timeout`](PostgresCheckpointStoreBuilder::connection_timeout) and one second. A host name
    /// is looked up when its turn comes.
    ///
    /// If an address does not respond to a login, it is tried last for ten minutes. Before the next login at
    /// that address, the store sends a probe, the first two messages of a login, so an address that has
    /// recovered is used again within about two seconds. A process has at most four unanswered logins open for
    /// each address; a few more behind a pooler that answers probes while its server is down.
    ///
    /// If no host gives a connection, the error names the reason of each. If a PostgreSQL server has refused
    /// the login, for example because of the password, that decides whether the error is transient, wherever
    /// the host stands in the list.
    ///
    /// # When the network is down
    ///
    /// Every operation returns [`Unavailable`](crate::Error::Unavailable) until the network is back. With the
    /// values above and the link to the server down, the calls return after:
    ///
    /// | Call | Seconds |
    /// |---|---:|
    /// | `connect` | 4 for each address |
    /// | `advance`, and operations in a transaction on a connection of the pool | 10 |
    /// | the others, which retry until then | 30, and at most 50: 20 more until TCP gives up on an outstanding answer |
    ///
    /// Behind `PgBouncer` the maximum is its `query_wait_timeout`, 120 seconds by default, if that is longer. A
    /// connection of your own, not from [`connection`](PostgresCheckpointStore::connection), has the limits
    /// that you set, by default none.
    ///
    /// The server notices later, and keeps the locks of the lost client until then: two hours by default. Set
    /// `tcp_keepalives_idle` or `idle_in_transaction_session_timeout` there.
    ///
    /// # When the server is frozen
    ///
    /// A server that is stopped, or that waits for a dead disk, while its kernel still acknowledges what is
    /// sent, looks alive to TCP. `connect` fails after 5 seconds per address, and a call that needs a new
    /// connection fails after 30. **A call whose statement has been sent waits until the server continues**,
    /// and then succeeds. The `postgres` crate has no time-out for an answer, `statement_timeout` is enforced
    /// by the server, and a request to cancel would wait as well. If you need a limit, have a watchdog end the
    /// process once the projection has made no progress for too long. That is as safe as any other crash.
    ///
    /// # Panics
    ///
    /// On a thread that drives an async runtime; see [the crate's page](crate#from-async-code).
    ///
    /// # Errors
    ///
    /// - [`Unavailable`](crate::Error::Unavailable) if no connection can be made, with the cause: an unknown
    ///   host, a wrong password or database, connection refused, TLS required, no thread or file descriptor
    ///   left. It [is transient](crate::Error::is_transient) unless the server refused the login or the TLS
    ///   connector the certificate.
    /// - [`Backend`](crate::Error::Backend) if the parameters cannot be parsed, or a setting of the builder is
    ///   out of its range.
    /// - [`InvalidIdentifier`](crate::Error::InvalidIdentifier).
    pub fn connect(self, params: &str) -> Result<PostgresCheckpointStore> {
        self.connect_tls(params, NoTls)
    }

    /// Like [`connect`](PostgresCheckpointStoreBuilder::connect), with the given TLS connector, for example that
    /// of `postgres-native-tls`, `postgres-openssl` or `tokio-postgres-rustls`.
    ///
    /// TLS is used if the server offers it. Put `sslmode=require` into the parameters to refuse
    /// anything else.
    ///
    /// # Errors
    ///
    /// As [`connect`](PostgresCheckpointStoreBuilder::connect); a certificate that the connector
    /// refuses is `Unavailable`, not transient, with the connector's cause.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use checkpoint_store::{PostgresCheckpointStore, postgres};
    /// # let tls_connector = postgres::NoTls;
    /// let store = PostgresCheckpointStore::builder()
    ///     .connect_tls("host=db.example user=app sslmode=require", tls_connector)?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn connect_tls<T>(self, params: &str, tls: T) -> Result<PostgresCheckpointStore>
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.connect_config(params::parse(params)?, tls)
    }

    /// Like [`connect_tls`](PostgresCheckpointStoreBuilder::connect_tls), with a [`Config`] that you have
    /// built. A password needs no quoting there.
    ///
    /// The time limits that [`connect`](PostgresCheckpointStoreBuilder::connect) lists are set where the
    /// `Config` has no value, or the default of `postgres`. Use [`NoTls`] for a connection without TLS.
    ///
    /// A `notice_callback` is kept if the `Config` has one host. With several hosts it is dropped, because
    /// `Config` has no getter for it.
    ///
    /// # Errors
    ///
    /// As [`connect_tls`](PostgresCheckpointStoreBuilder::connect_tls). A `Config` without a host, or whose
    /// hosts, addresses and ports do not match in number, is [`Unavailable`](crate::Error::Unavailable), not
    /// transient.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use checkpoint_store::PostgresCheckpointStore;
    /// use checkpoint_store::postgres::{Config, NoTls};
    ///
    /// let mut config = Config::new();
    /// config.host("db.example").user("app").password("it's a \\ secret").dbname("app");
    /// let store = PostgresCheckpointStore::builder().connect_config(config, NoTls)?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn connect_config<T>(self, config: Config, tls: T) -> Result<PostgresCheckpointStore>
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let table = Table::new(&self.schema, &self.table)?;
        self.check_timeout("connect")?;
        if !(1..=MOST_CONNECTIONS).contains(&self.max_connections) {
            let reason = format!(
                "max_connections is {}, and must be 1 to {MOST_CONNECTIONS}",
                self.max_connections
            );
            return Err(Error::backend("connect", reason));
        }
        let timeout = self.connection_timeout.unwrap_or(DEFAULT_TIMEOUT);
        let server = server_name(&config);
        let log_in = move |config: &Config| config.connect(tls.clone());
        let connector = Connector::new(config, self.password_provider.clone(), log_in);
        let deadline = deadline_after(timeout);
        let mut first = connector
            .connect(deadline, &mut drop)
            .map_err(|error| no_connection("connect", &server, error.into_cause()))?;
        if self.prepared_statements {
            // Where no more than one connection is to be had, there is nothing to find out.
            let another = || connector.connect(deadline, &mut drop).ok();
            if let Err(cause) = refuse_shared_sessions(&mut first, another) {
                close(first);
                return Err(failure("connect", server, cause));
            }
        }
        let (size, prepares) = (self.max_connections, self.prepared_statements);
        let connections = Connections::open(connector, first, size, timeout, prepares)
            .map_err(|cause| no_connection("connect", server, cause))?;
        Ok(self.assemble(table, connections))
    }

    /// Builds a store that uses an existing pool. No connection is made.
    ///
    /// Set `test_on_check_out(false)` on the pool: the store replaces dead connections itself, and the test would
    /// double the round trips.
    ///
    /// # Errors
    ///
    /// [`InvalidIdentifier`](crate::Error::InvalidIdentifier); [`Backend`](crate::Error::Backend) if
    /// `connection_timeout` is 0, or if there is a
    /// [`password_provider`](PostgresCheckpointStoreBuilder::password_provider), which does not apply to the
    /// connections that another pool makes.
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
    ///     .max_size(4)
    ///     .test_on_check_out(false)
    ///     .build_unchecked(PostgresConnectionManager::new(params, NoTls));
    /// let store = PostgresCheckpointStore::builder().schema("staging").build(pool)?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn build<M>(self, pool: Pool<M>) -> Result<PostgresCheckpointStore>
    where
        M: ManageConnection<Connection = Client>,
    {
        let table = Table::new(&self.schema, &self.table)?;
        self.check_timeout("build")?;
        if self.password_provider.is_some() {
            let reason = "password_provider does not apply to a pool of the caller's own, whose manager \
                          makes the connections";
            return Err(Error::backend("build", reason));
        }
        let connections = Connections::of(pool, self.connection_timeout, self.prepared_statements);
        Ok(self.assemble(table, connections))
    }

    fn assemble(&self, table: Table, connections: Connections) -> PostgresCheckpointStore {
        let shared = Shared {
            queries: Queries::new(table),
            connections: connections.observed_by(self.observer.clone()),
            updated_at_index: self.updated_at_index,
            group: self.group_commit.then(Group::new),
        };
        PostgresCheckpointStore { shared: Arc::new(shared) }
    }

    fn check_timeout(&self, operation: &'static str) -> Result<()> {
        match self.connection_timeout {
            Some(Duration::ZERO) => Err(Error::backend(operation, "connection_timeout is 0")),
            _ => Ok(()),
        }
    }
}

/// Without what might hold a secret, and without the observer.
impl fmt::Debug for PostgresCheckpointStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresCheckpointStoreBuilder")
            .field("schema", &self.schema)
            .field("table", &self.table)
            .field("updated_at_index", &self.updated_at_index)
            .field("prepared_statements", &self.prepared_statements)
            .field("group_commit", &self.group_commit)
            .field("max_connections", &self.max_connections)
            .field("connection_timeout", &self.connection_timeout)
            .finish_non_exhaustive()
    }
}
