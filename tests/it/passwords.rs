//! Passwords that a provider gives for each new connection.

use std::collections::HashSet;
use std::error::Error as StdError;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{
    CheckpointStore, Error, PostgresCheckpointStore, PostgresCheckpointStoreBuilder,
};

use crate::harness::{self, Options, Server, chain, sessions, sql_state, wait_until};

const PASSWORD: &str = "correct horse hunter2";
/// Far more than any of these waits takes, for a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(20);

fn scram() -> Server {
    Server::start(Options { password: Some(PASSWORD.to_owned()), ..Options::fast() })
}

/// Without a password that is the right one.
fn params(server: &Server) -> String {
    format!(
        "host=127.0.0.1 port={} user=postgres password=outdated application_name=provided",
        server.port()
    )
}

fn admin(server: &Server) -> checkpoint_store::postgres::Client {
    harness::client(&format!(
        "host=127.0.0.1 port={} user=postgres password='{PASSWORD}'",
        server.port()
    ))
}

fn builder(
    provider: impl Fn() -> Result<String, Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
) -> PostgresCheckpointStoreBuilder {
    PostgresCheckpointStore::builder().password_provider(provider)
}

/// Of a provider's service.
#[derive(Debug)]
struct Away;

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the token service is away")
    }
}

impl StdError for Away {}

fn is_transient_and_tells_no_secret(error: &Error, says: &str) {
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    let shown = format!("{error:?} {}", chain(error));
    assert!(shown.contains(says), "{shown}");
    assert!(!shown.contains("hunter2") && !shown.contains("outdated"), "{shown}");
}

#[test]
fn a_provider_is_asked_for_each_new_connection() {
    let server = scram();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let store = builder(move || {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(PASSWORD.to_owned())
    })
    .connect(&params(&server))
    .unwrap();
    store.migrate().unwrap();
    let before = asked.load(Ordering::SeqCst);
    for offset in 1..=10 {
        store.save("orders", offset).unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), before, "not for a connection that is there");
    harness::end_sessions(&mut admin(&server));
    store.save("orders", 11).unwrap();
    assert!(asked.load(Ordering::SeqCst) > before);
}

#[test]
fn a_password_of_the_provider_that_the_server_refuses_is_a_refusal() {
    let server = scram();
    let error = builder(|| Ok("wrong hunter2".to_owned())).connect(&params(&server)).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
    assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
    let shown = format!("{error:?} {}", chain(&error));
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_provider_that_fails_for_a_while_is_waited_for() {
    let server = scram();
    let away = Arc::new(AtomicBool::new(true));
    let is_away = Arc::clone(&away);
    let builder = builder(move || {
        if is_away.load(Ordering::SeqCst) { Err(Away.into()) } else { Ok(PASSWORD.to_owned()) }
    });
    let error = builder.clone().connect(&params(&server)).unwrap_err();
    is_transient_and_tells_no_secret(&error, "the token service is away");
    let mut causes =
        std::iter::successors(Some(&error as &(dyn StdError + 'static)), |&error| error.source());
    assert!(causes.any(<dyn StdError>::is::<Away>), "{error:?}");

    away.store(false, Ordering::SeqCst);
    let store = builder.connect(&params(&server)).unwrap();
    store.migrate().unwrap();
    store.save("orders", 0).unwrap();
    away.store(true, Ordering::SeqCst);
    harness::end_sessions(&mut admin(&server));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.save("orders", 1));
        thread::sleep(Duration::from_secs(2));
        assert!(!waiting.is_finished());
        away.store(false, Ordering::SeqCst);
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(store.get("orders").unwrap(), 1);
}

/// What the provider's database refused is no refusal of the store's.
#[test]
fn a_provider_whose_own_database_refuses_it_is_waited_for() {
    let server = scram();
    let outdated = params(&server);
    let error = builder(move || {
        let refused = checkpoint_store::postgres::Client::connect(
            &outdated,
            checkpoint_store::postgres::NoTls,
        );
        Err(refused.map(drop).unwrap_err().into())
    })
    .connect(&params(&server))
    .unwrap_err();
    is_transient_and_tells_no_secret(&error, "the password provider failed");
}

#[test]
fn a_provider_that_hangs_is_an_error_in_time_and_few_calls_of_it_are_left() {
    const CALLS_AT_ONCE: usize = 8;
    let server = scram();
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let (waiting, asked) = (Arc::clone(&gate), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    let builder = builder(move || {
        count.fetch_add(1, Ordering::SeqCst);
        let (is_open, opened) = &*waiting;
        let is_open = opened.wait_while(is_open.lock().unwrap(), |is_open| !*is_open).unwrap();
        assert!(*is_open);
        Ok(PASSWORD.to_owned())
    });
    let impatient = format!("{} connect_timeout=1", params(&server));
    thread::scope(|scope| {
        for _ in 0..CALLS_AT_ONCE {
            scope.spawn(|| {
                let started = Instant::now();
                let store = builder.clone().connection_timeout(Duration::from_secs(3));
                let error = store.connect(&impatient).unwrap_err();
                // Those that wait for a place at the server do not ask.
                let says = if chain(&error).contains("no answer from") { "" } else { "provider" };
                is_transient_and_tells_no_secret(&error, says);
                assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
            });
        }
    });
    assert!(asked.load(Ordering::SeqCst) <= CALLS_AT_ONCE, "{asked:?}");
    // Another store has nothing to do with that.
    self::builder(|| Ok(PASSWORD.to_owned())).connect(&params(&server)).unwrap();

    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    wait_until("the provider is asked again", || builder.clone().connect(&params(&server)).is_ok());
}

/// As many as the others wait for, in one store.
#[test]
fn a_store_whose_provider_hangs_does_not_ask_it_for_ever() {
    let server = scram();
    let (hangs, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (is_hanging, count) = (Arc::clone(&hangs), Arc::clone(&asked));
    let store = builder(move || {
        count.fetch_add(1, Ordering::SeqCst);
        while is_hanging.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(PASSWORD.to_owned())
    })
    .connection_timeout(Duration::from_secs(60))
    .connect(&format!("{} connect_timeout=1", params(&server)))
    .unwrap();
    store.migrate().unwrap();
    (0..6).for_each(|worker| store.save(&format!("worker {worker}"), 0).unwrap());
    let before = asked.load(Ordering::SeqCst);
    hangs.store(true, Ordering::SeqCst);
    harness::end_sessions(&mut admin(&server));
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..6)
            .map(|worker| {
                let store = &store;
                scope.spawn(move || store.save(&format!("worker {worker}"), 1))
            })
            .collect();
        wait_until("some calls hang", || asked.load(Ordering::SeqCst) >= before + 4);
        thread::sleep(Duration::from_secs(5));
        // Three hung, and as many as may log in at once at one address.
        let hung = asked.load(Ordering::SeqCst) - before;
        assert!(hung <= 3 + 4, "{hung}");
        hangs.store(false, Ordering::SeqCst);
        for waiter in waiting {
            waiter.join().unwrap().unwrap();
        }
    });
}

#[test]
fn a_provider_that_panics_is_an_error_that_does_not_repeat_the_panic() {
    let server = scram();
    let panics = Arc::new(AtomicBool::new(true));
    let is_panicking = Arc::clone(&panics);
    let builder = builder(move || {
        assert!(!is_panicking.load(Ordering::SeqCst), "on purpose: {PASSWORD}");
        Ok(PASSWORD.to_owned())
    });
    let started = Instant::now();
    let error = builder.clone().connect(&params(&server)).unwrap_err();
    is_transient_and_tells_no_secret(&error, "the password provider panicked");
    assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
    panics.store(false, Ordering::SeqCst);
    builder.connect(&params(&server)).unwrap().migrate().unwrap();
}

#[test]
fn a_builder_shows_neither_the_provider_nor_a_password() {
    let shown = format!("{:?}", builder(|| Ok(PASSWORD.to_owned())).schema("staging"));
    assert!(shown.contains("staging") && !shown.contains("hunter2"), "{shown}");
    assert!(!shown.contains("provider"), "{shown}");
}

#[test]
fn a_provider_does_not_apply_to_a_pool_of_the_callers_own() {
    let pool = harness::pool("host=127.0.0.1 user=app", 1, Duration::from_secs(1));
    let error = builder(|| Ok(PASSWORD.to_owned())).build(pool).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "build", .. }), "{error:?}");
    assert!(!error.is_transient() && chain(&error).contains("password_provider"), "{error:?}");
}

#[test]
fn a_password_that_changes_under_eight_working_threads_is_no_error_to_any_of_them() {
    const THREADS: u32 = 8;
    const CHANGES: usize = 10;
    let server = scram();
    let mut admin = admin(&server);
    admin
        .batch_execute(
            "CREATE ROLE app LOGIN PASSWORD 'password 0';
             CREATE SCHEMA staging AUTHORIZATION app;
             CREATE TABLE applied (projection text, event bigint);
             GRANT ALL ON applied TO app",
        )
        .unwrap();
    let password = Arc::new(Mutex::new("password 0".to_owned()));
    let current = Arc::clone(&password);
    let store = builder(move || Ok(current.lock().unwrap().clone()))
        .schema("staging")
        .max_connections(THREADS)
        .connect(&params(&server).replace("user=postgres", "user=app dbname=postgres"))
        .unwrap();
    store.migrate().unwrap();

    let is_over = AtomicBool::new(false);
    let progress: Vec<_> = (0..THREADS).map(|_| AtomicI64::new(0)).collect();
    thread::scope(|scope| {
        for (worker, done) in progress.iter().enumerate() {
            let (store, is_over) = (&store, &is_over);
            scope.spawn(move || {
                let name = format!("worker {worker}");
                while !is_over.load(Ordering::SeqCst) {
                    let batch = store.project(&name, |tx, offset| {
                        let insert = "INSERT INTO applied VALUES ($1, $2)";
                        tx.execute(insert, &[&name, &(offset + 1)])?;
                        Ok(Some(offset + 1))
                    });
                    done.store(batch.unwrap().unwrap(), Ordering::SeqCst);
                }
            });
        }
        for change in 1..=CHANGES {
            // Each has a connection, so no login is under way with the password of before.
            wait_until("all are connected", || {
                sessions(&mut admin, "provided") == i64::from(THREADS)
            });
            let before: Vec<_> = progress.iter().map(|done| done.load(Ordering::SeqCst)).collect();
            wait_until("all have worked", || {
                progress
                    .iter()
                    .zip(&before)
                    .all(|(done, before)| done.load(Ordering::SeqCst) > *before)
            });
            let new = format!("password {change}");
            admin.batch_execute(&format!("ALTER ROLE app PASSWORD '{new}'")).unwrap();
            *password.lock().unwrap() = new;
            harness::end_sessions(&mut admin);
        }
        is_over.store(true, Ordering::SeqCst);
    });

    let rows = admin.query("SELECT projection, event FROM applied", &[]).unwrap();
    let applied: HashSet<(String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(applied.len(), rows.len(), "nothing is applied twice");
    let checkpoints = store.all().unwrap();
    assert_eq!(checkpoints.len(), progress.len());
    let sum: i64 = checkpoints.iter().map(|checkpoint| checkpoint.offset).sum();
    assert_eq!(i64::try_from(rows.len()).unwrap(), sum, "nothing is lost");
    for (worker, done) in progress.iter().enumerate() {
        let stored = store.get(&format!("worker {worker}")).unwrap();
        assert_eq!(stored, done.load(Ordering::SeqCst));
    }
}
