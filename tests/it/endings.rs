//! A store, and what it has lent, may end anywhere: on a thread that ends, on a thread of an async runtime,
//! beside a server that does not answer, and where no thread can be started.

use std::any::Any;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PooledClient, PostgresCheckpointStore,
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::faults::this_program;
use crate::harness::{self, Guard, Options, Server, pool, signal_pid, wait_until};

/// Tells a test that it runs in a process of its own, and on which server.
const PARAMS: &str = "CHECKPOINT_STORE_ENDINGS_PARAMS";
/// A drop that waits for nobody.
const AT_ONCE: Duration = Duration::from_secs(2);

fn run_by_itself(program: &mut Command, params: &str) {
    let output = program.env(PARAMS, params).output().expect("this program starts");
    let (told, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{told}\n{complaint}", output.status);
    assert!(told.contains("1 passed"), "{told}\n{complaint}");
}

/// Both kinds of a store, with one open connection.
fn both_kinds(params: &str, size: u32, timeout: Duration) -> [PostgresCheckpointStore; 2] {
    let builder =
        || PostgresCheckpointStore::builder().max_connections(size).connection_timeout(timeout);
    let stores =
        [builder().connect(params).unwrap(), builder().build(pool(params, size, timeout)).unwrap()];
    stores[0].migrate().unwrap();
    for store in &stores {
        store.save("orders", 1).unwrap();
    }
    stores
}

type Make = fn(PostgresCheckpointStore) -> Box<dyn Any + Send>;

/// What holds connections, and is dropped.
const HOLDERS: [(&str, Make); 6] = [
    ("a store", |store| Box::new(store)),
    ("a checkpointer", |store| {
        Box::new(Checkpointer::resume(store, "orders", Cadence::every(1)).unwrap())
    }),
    ("a connection", |store| Box::new(store.connection().unwrap())),
    ("a connection that has run a statement", |store| {
        let mut client = store.connection().unwrap();
        client.query_one("SELECT 1", &[]).unwrap();
        Box::new(client)
    }),
    ("a store and its connection", |store| {
        let client = store.connection().unwrap();
        Box::new((store, client))
    }),
    ("a connection and its store", |store| {
        let client = store.connection().unwrap();
        Box::new((client, store))
    }),
];

thread_local! {
    static KEPT: RefCell<Vec<Box<dyn Any + Send>>> = const { RefCell::new(Vec::new()) };
}

/// An abort would end all tests, so this one has a process of its own.
#[test]
fn a_thread_that_ends_drops_what_its_storage_holds() {
    let Ok(params) = std::env::var(PARAMS) else {
        let program = &mut this_program("endings::a_thread_that_ends_drops_what_its_storage_holds");
        return run_by_itself(program, &harness::fresh_database());
    };
    let before = harness::client(&params);
    drop(before);
    for (what, make) in HOLDERS {
        for kind in 0..2 {
            for is_registered_first in [false, true] {
                println!("{what}, kind {kind}, registered first: {is_registered_first}");
                let params = params.clone();
                let ended = thread::spawn(move || {
                    // Thread-local values are dropped in the order of their first use, or the other way
                    // round: `tokio` has some too.
                    if is_registered_first {
                        KEPT.with(|kept| kept.borrow_mut().clear());
                    }
                    let [one, two] = both_kinds(&params, 2, Duration::from_secs(30));
                    let store = if kind == 0 { one } else { two };
                    let holder = make(store);
                    KEPT.with(|kept| kept.borrow_mut().push(holder));
                });
                ended.join().expect("no panic");
            }
        }
    }
    wait_until("the connections are closed", || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()";
        harness::client(&params).query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
    });
}

/// A connection that is closed, and so discarded when it comes back.
#[test]
fn a_thread_that_ends_discards_a_lost_connection() {
    let Ok(params) = std::env::var(PARAMS) else {
        let program = &mut this_program("endings::a_thread_that_ends_discards_a_lost_connection");
        return run_by_itself(program, &harness::fresh_database());
    };
    let [store, _] = both_kinds(&params, 1, Duration::from_secs(30));
    for is_registered_first in [false, true] {
        let store_there = store.clone();
        thread::spawn(move || {
            if is_registered_first {
                KEPT.with(|kept| kept.borrow_mut().clear());
            }
            let mut client = store_there.connection().unwrap();
            client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
            KEPT.with(|kept| kept.borrow_mut().push(Box::new(client)));
        })
        .join()
        .expect("no panic");
        store.save("orders", 2).unwrap();
    }
}

fn on_a_runtime<T>(work: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async { work() })
}

#[test]
fn a_runtimes_thread_drops_what_holds_connections() {
    let params = harness::fresh_database();
    for (what, make) in HOLDERS {
        for store in both_kinds(&params, 2, Duration::from_secs(30)) {
            let holder = make(store);
            println!("{what}");
            on_a_runtime(move || drop(holder));
        }
    }
    // A connection that is lost.
    let [store, _] = both_kinds(&params, 1, Duration::from_secs(30));
    let mut client = store.connection().unwrap();
    client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
    on_a_runtime(move || drop(client));
    store.save("orders", 2).unwrap();
    on_a_runtime(move || drop(store));
    wait_until("the connections are closed", || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()";
        harness::client(&params).query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
    });
}

/// A backend that is stopped until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn stop(pid: i32) -> Self {
        signal_pid(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal_pid(self.0, Signal::CONT);
    }
}

type Use = fn(&mut PooledClient);

#[test]
fn a_drop_does_not_wait_for_a_backend_that_is_stopped() {
    let server = Server::start(Options::fast());
    let uses: [(&str, Use); 3] = [
        ("typed", |client| drop(client.query_typed("SELECT 1", &[]).unwrap())),
        ("untyped", |client| drop(client.query_one("SELECT 1", &[]).unwrap())),
        ("prepared", |client| {
            let statement = client.prepare("SELECT 1").unwrap();
            client.query(&statement, &[]).unwrap();
        }),
    ];
    for (what, use_it) in uses {
        for (holder, make) in HOLDERS {
            for store in both_kinds(&server.params(), 1, Duration::from_secs(30)) {
                let mut client = store.connection().unwrap();
                let pid = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
                use_it(&mut client);
                drop(client);
                let holder_of_it = make(store);
                let stopped = Stopped::stop(pid);
                let started = Instant::now();
                drop(holder_of_it);
                let took = started.elapsed();
                drop(stopped);
                assert!(took < AT_ONCE, "{what}, {holder}: {took:?}");
            }
        }
    }
    wait_until("the connections are closed", || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
        server.client().query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
    });
}

/// The last use was a statement of the caller's after which its result is dropped late.
#[test]
fn the_last_statement_before_a_stop_may_be_the_very_last_use() {
    let server = Server::start(Options::fast());
    for store in both_kinds(&server.params(), 1, Duration::from_secs(30)) {
        let mut client = store.connection().unwrap();
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        let stopped = Stopped::stop(pid);
        let started = Instant::now();
        drop(client);
        drop(store);
        let took = started.elapsed();
        drop(stopped);
        assert!(took < AT_ONCE, "{took:?}");
    }
}

// Where no thread can be started.

/// The limit of threads holds for a user other than root: an unused one, so that nobody else's count.
fn as_a_user_of_its_own(test: &str) -> (Command, Guard) {
    let guard = Guard::new("checkpoint-store-threads-");
    if !rustix::process::geteuid().is_root() {
        return (this_program(test), guard);
    }
    let folder = guard.folder();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("own folder");
    let (this, copy) = (std::env::current_exe().expect("this program"), folder.join("it"));
    fs::hard_link(&this, &copy).or_else(|_| fs::copy(&this, &copy).map(drop)).expect("a copy");
    let user = 60_000 + std::process::id() % 5_000;
    let mut program = Command::new("setpriv");
    program
        .args([format!("--reuid={user}"), format!("--regid={user}")])
        .args(["--clear-groups", "--"])
        .arg(copy)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .current_dir("/");
    (program, guard)
}

/// No thread can be started until this is dropped.
struct NoThreads(Rlimit);

impl NoThreads {
    fn begin() -> Self {
        let before = getrlimit(Resource::Nproc);
        let none = Rlimit { current: Some(1), maximum: before.maximum };
        setrlimit(Resource::Nproc, none).expect("a lower limit");
        let thread = thread::Builder::new().spawn(|| {});
        assert!(thread.is_err(), "the limit does not bind this user");
        Self(before)
    }
}

impl Drop for NoThreads {
    fn drop(&mut self) {
        let before = Rlimit { current: self.0.current, maximum: self.0.maximum };
        setrlimit(Resource::Nproc, before).expect("up to the maximum");
    }
}

fn count_panics() -> &'static AtomicUsize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        hook(panic);
    }));
    &PANICS
}

/// Each of the pool's places is there.
fn all_places_are_there(store: &PostgresCheckpointStore, size: u32) {
    wait_until("the store works again", || store.save("orders", 2).is_ok());
    let held: Vec<_> = (0..size).map(|_| store.connection().unwrap()).collect();
    drop(held);
    assert!(store.project("orders", |_, at| Ok(Some(at + 1))).unwrap().is_some());
}

/// The `connection_timeout` of stores that cannot connect.
const TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn without_threads_a_store_is_unavailable_and_works_again_with_them() {
    let Ok(params) = std::env::var(PARAMS) else {
        let test = "endings::without_threads_a_store_is_unavailable_and_works_again_with_them";
        let (mut program, _guard) = as_a_user_of_its_own(test);
        return run_by_itself(&mut program, &harness::fresh_database());
    };
    let panics = count_panics();
    let mut admin = harness::client(&params);
    for size in 1..=3 {
        let stores = both_kinds(&params, size, TIMEOUT);
        for (kind, store) in stores.iter().enumerate() {
            println!("{size} connections, kind {kind}");
            let none = NoThreads::begin();
            // What is open serves.
            store.save("orders", 2).unwrap();
            let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE pid <> pg_backend_pid() AND datname = current_database()";
            admin.execute(sql, &[]).unwrap();
            for _ in 0..2 {
                let started = Instant::now();
                let outcome = store.get("orders");
                assert!(started.elapsed() < TIMEOUT + Duration::from_secs(2));
                // r2d2 has threads of its own to connect with.
                if kind == 0 {
                    let error = outcome.unwrap_err();
                    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
                    assert!(error.is_transient(), "{error:?}");
                    println!("{}", error.report());
                }
                drop(store.project("orders", |_, at| Ok(Some(at + 1))));
            }
            drop(none);
            all_places_are_there(store, size);
        }
    }
    assert_eq!(panics.load(Ordering::SeqCst), 0);
}

#[test]
fn without_threads_connections_are_discarded_and_dropped_and_a_connect_fails() {
    let Ok(params) = std::env::var(PARAMS) else {
        let test =
            "endings::without_threads_connections_are_discarded_and_dropped_and_a_connect_fails";
        let (mut program, _guard) = as_a_user_of_its_own(test);
        return run_by_itself(&mut program, &harness::fresh_database());
    };
    let panics = count_panics();
    for store in both_kinds(&params, 2, Duration::from_secs(1)) {
        let mut client = store.connection().unwrap();
        let other = store.connection().unwrap();
        let none = NoThreads::begin();
        client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
        drop(client);
        drop(other);
        drop(store.get("orders"));
        drop(none);
        all_places_are_there(&store, 2);
        let none = NoThreads::begin();
        drop(store);
        drop(none);
    }
    assert_eq!(panics.load(Ordering::SeqCst), 0);
    // r2d2 panics where it cannot start its threads, and that is caught.
    let none = NoThreads::begin();
    for _ in 0..3 {
        let refused = PostgresCheckpointStore::builder()
            .connection_timeout(Duration::from_secs(1))
            .connect(&params);
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!(error.is_transient(), "{error:?}");
    }
    drop(none);
    PostgresCheckpointStore::connect(&params).unwrap().save("orders", 3).unwrap();
}
