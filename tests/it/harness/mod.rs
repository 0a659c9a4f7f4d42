//! Throwaway PostgreSQL servers, started from the installed binaries.

mod example;
mod gate;
mod guard;
mod network;
mod pgbouncer;
mod proxy;
mod server;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use checkpoint_store::PostgresCheckpointStore;
use checkpoint_store::postgres::{Client, NoTls};
use checkpoint_store::r2d2::Pool;
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;

pub(crate) use example::{Running, example, failure, stderr, stdout, success};
pub(crate) use gate::Gate;
pub(crate) use guard::{Guard, kill_process, signal, signal_pid};
pub(crate) use network::{Network, privileged};
pub(crate) use pgbouncer::PgBouncer;
pub(crate) use proxy::{Cut, Proxy};
pub(crate) use server::{Options, Server, free_port, give_away, server_program};

/// Makes the tests that repeat something repeat it more often.
const SOAK_VARIABLE: &str = "CHECKPOINT_STORE_SOAK";

pub(crate) fn is_soak() -> bool {
    std::env::var_os(SOAK_VARIABLE).is_some()
}

/// How often a test repeats something: usually, and in a soak.
pub(crate) fn rounds<T>(usual: T, in_a_soak: T) -> T {
    if is_soak() { in_a_soak } else { usual }
}

/// The server that all tests share which do not need to stop one.
pub(crate) fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(Options::fast()))
}

/// A name that no other test has.
pub(crate) fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{prefix}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The parameters of an empty database of its own on the shared server.
pub(crate) fn fresh_database() -> String {
    let name = unique("db");
    server().client().batch_execute(&format!("CREATE DATABASE {name}")).expect("a new database");
    server().url(&name)
}

pub(crate) fn client(params: &str) -> Client {
    Client::connect(params, NoTls).expect("a connection")
}

/// A pool of the caller's own.
pub(crate) fn pool(
    params: &str,
    size: u32,
    timeout: Duration,
) -> Pool<PostgresConnectionManager<NoTls>> {
    Pool::builder()
        .max_size(size)
        .min_idle(Some(0))
        .connection_timeout(timeout)
        .test_on_check_out(false)
        .build_unchecked(PostgresConnectionManager::new(params.parse().expect("parameters"), NoTls))
}

/// A schema of its own on the shared server, with the checkpoint table in it.
pub(crate) struct Schema {
    pub(crate) name: String,
    pub(crate) store: PostgresCheckpointStore,
}

impl Schema {
    pub(crate) fn new() -> Self {
        let name = unique("test");
        let store = PostgresCheckpointStore::builder()
            .schema(&name)
            .connect(&server().params())
            .expect("a store");
        store.migrate().expect("a table");
        Self { name, store }
    }

    /// A connection that finds the schema's tables without naming it.
    pub(crate) fn client(&self) -> Client {
        let mut client = server().client();
        client.batch_execute(&format!("SET search_path TO {}", self.name)).expect("a search path");
        client
    }
}

/// Waits until a connection waits for a lock, in a statement with this text in it.
pub(crate) fn wait_for_a_waiter(observer: &mut Client, text: &str) {
    wait_until("somebody waits for a lock", || {
        let query = "SELECT count(*) FROM pg_stat_activity, pg_locks
                     WHERE pg_locks.pid = pg_stat_activity.pid AND NOT granted
                       AND query LIKE '%' || $1 || '%'";
        observer.query_one(query, &[&text]).unwrap().get::<_, i64>(0) > 0
    });
}

/// How many connections an application has.
pub(crate) fn sessions(observer: &mut Client, application: &str) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    observer.query_one(query, &[&application]).expect("a row").get(0)
}

/// Ends every session but that of who asks.
pub(crate) fn end_sessions(admin: &mut Client) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    admin.execute(end, &[]).expect("a superuser");
    // For so long a connection that was just used is not tested before a write, which may then be in doubt.
    let ended = Instant::now();
    wait_until("idle connections are tested", || ended.elapsed() > Duration::from_millis(30));
}

/// Ends a backend as an administrator does, and waits until it is gone.
pub(crate) fn end_backend(admin: &mut Client, pid: i32) {
    admin.execute("SELECT pg_terminate_backend($1)", &[&pid]).expect("a superuser");
    wait_until("the backend is gone", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
        admin.query_one(query, &[&pid]).expect("a row").get::<_, i64>(0) == 0
    });
}

/// Ends the session of the connection that the store lends next, and lets its client learn of it.
pub(crate) fn lose_the_only_connection(store: &PostgresCheckpointStore) {
    let mut client = store.connection().expect("a connection");
    client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
    wait_until("the client knows of it", || {
        client.batch_execute("").is_err() && client.is_closed()
    });
}

/// Waits until something holds, and fails loudly when it never does.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited a minute in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Every message in an error's chain of causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// The SQLSTATE in an error's chain of causes.
pub(crate) fn sql_state(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    std::iter::successors(Some(error), |error| error.source())
        .find_map(|cause| cause.downcast_ref::<checkpoint_store::postgres::Error>())
        .and_then(|error| error.code())
        .map(|code| code.code().to_owned())
}
