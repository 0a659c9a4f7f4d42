//! Connections that die without a word: the network forgets them, or the server stands still.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};
use rustix::process::Signal;

use crate::harness::{
    self, Cut, Gate, Network, Options, Proxy, Server, chain, signal_pid, wait_until,
};

/// How long a connection may take to answer its test.
const TEST: Duration = Duration::from_secs(2);
/// For a login, on a machine that has other things to do.
const SLACK: Duration = Duration::from_secs(2);

type Operation = (&'static str, fn(&PostgresCheckpointStore) -> Result<()>);

/// All of them may run again and again.
const OPERATIONS: [Operation; 5] = [
    ("save", |store| store.save("save", 1)),
    ("advance", |store| store.advance("advance", 1, 1)),
    ("project", |store| store.project("project", |_, offset| Ok(Some(offset + 1))).map(drop)),
    ("connection", |store| Ok(store.connection()?.batch_execute("SELECT")?)),
    ("find", |store| store.find("find").map(drop)),
];

/// A server with the rows of all operations.
fn server() -> Server {
    let server = Server::start(Options::fast());
    let store = PostgresCheckpointStore::connect(&server.params()).unwrap();
    store.migrate().unwrap();
    store.save_many(&OPERATIONS.map(|(name, _)| (name, 1))).unwrap();
    server
}

fn builders(params: &str, size: u32, timeout: Duration) -> PostgresCheckpointStore {
    let builder = PostgresCheckpointStore::builder().max_connections(size);
    builder.connection_timeout(timeout).connect(params).unwrap()
}

fn on_a_pool(params: &str, size: u32, timeout: Duration) -> PostgresCheckpointStore {
    PostgresCheckpointStore::new(harness::pool(params, size, timeout))
}

/// Opens so many connections and leaves them idle. The port by which the server knows each.
fn fill(store: &PostgresCheckpointStore, connections: u32) -> Vec<u16> {
    let mut held: Vec<_> = (0..connections).map(|_| store.connection().unwrap()).collect();
    let ports = held.iter_mut().map(|client| port(client)).collect();
    drop(held);
    assert_eq!(store.pool_state().idle_connections, connections);
    ports
}

fn port(client: &mut Client) -> u16 {
    let port: i32 = client.query_one("SELECT inet_client_port()", &[]).unwrap().get(0);
    u16::try_from(port).unwrap()
}

fn process_id(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// Lets more time pass than a connection is used without a test.
fn let_connections_age() {
    thread::sleep(Duration::from_millis(1_050));
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    (work(), started.elapsed())
}

/// It is no error, and no more than a test's time.
fn succeeds_in_time(what: &str, call: impl FnOnce() -> Result<()>) {
    let (outcome, took) = timed(call);
    outcome.unwrap_or_else(|error| panic!("{what}: {took:?}: {error:?}"));
    assert!(took < TEST + SLACK, "{what}: {took:?}");
}

/// A pool of the builder's with so many connections, of which some fall silent.
struct Case {
    size: u32,
    silent: usize,
    timeout: Duration,
}

#[test]
fn however_many_fall_silent_every_operation_succeeds_within_one_test_and_a_login() {
    let server = server();
    for (size, silent, seconds) in
        [(1, 1, 2), (1, 1, 20), (4, 4, 3), (7, 3, 10), (8, 8, 10), (12, 12, 30)]
    {
        let case = Case { size, silent, timeout: Duration::from_secs(seconds) };
        thread::scope(|scope| {
            for (what, operation) in OPERATIONS {
                let (case, server) = (&case, &server);
                scope.spawn(move || {
                    let gate = Gate::to(server.port());
                    let store = builders(&gate.params(), case.size, case.timeout);
                    let ports = fill(&store, case.size);
                    let_connections_age();
                    ports[..case.silent].iter().for_each(|port| gate.silence(*port));
                    let what = format!("{what}: {silent} of {size}, {seconds} s");
                    succeeds_in_time(&what, || operation(&store));
                    // No other one costs a test, whoever takes it.
                    succeeds_in_time(&what, || {
                        let held: Result<Vec<_>> =
                            (0..case.size).map(|_| store.connection()).collect();
                        held.map(drop).and_then(|()| operation(&store))
                    });
                });
            }
        });
    }
}

#[test]
fn calls_at_the_same_time_do_not_wait_for_each_others_tests() {
    const SIZE: u32 = 8;
    let server = server();
    let gate = Gate::to(server.port());
    let store = builders(&gate.params(), SIZE, Duration::from_secs(20));
    fill(&store, SIZE);
    let_connections_age();
    gate.silence_established();
    thread::scope(|scope| {
        for (what, operation) in OPERATIONS.iter().chain(&OPERATIONS).chain(&OPERATIONS) {
            let store = &store;
            scope.spawn(move || {
                succeeds_in_time(what, || operation(store));
            });
        }
    });
}

#[test]
fn a_pool_of_the_callers_does_not_give_a_silent_connection_out_again() {
    const SIZE: u32 = 4;
    let server = server();
    thread::scope(|scope| {
        for (what, operation) in OPERATIONS {
            let server = &server;
            scope.spawn(move || {
                let gate = Gate::to(server.port());
                let store = on_a_pool(&gate.params(), SIZE, Duration::from_secs(10));
                fill(&store, SIZE);
                let silent = port(&mut store.connection().unwrap()); // the next one, too
                let_connections_age();
                gate.silence(silent);
                succeeds_in_time(what, || operation(&store));
                for round in 0..2 {
                    succeeds_in_time(what, || (0..10).try_for_each(|_| operation(&store)));
                    let mut held: Vec<_> = (1..SIZE).map(|_| store.connection().unwrap()).collect();
                    assert!(held.iter_mut().all(|client| port(client) != silent), "{what}");
                    assert_eq!(store.pool_state().idle_connections, 0, "{what}");
                    drop(held);
                    if round == 0 {
                        let_connections_age();
                    }
                }
                // Once it is closed the pool makes another.
                gate.hang_up();
                let held: Vec<_> = (0..SIZE).map(|_| store.connection().unwrap()).collect();
                drop(held);
                operation(&store).unwrap();
            });
        }
    });
}

#[test]
fn a_pool_of_the_callers_with_nothing_but_silent_connections_says_so_in_time() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let server = server();
    thread::scope(|scope| {
        for (what, operation) in OPERATIONS {
            let server = &server;
            scope.spawn(move || {
                let gate = Gate::to(server.port());
                let store = on_a_pool(&gate.params(), 2, TIMEOUT);
                fill(&store, 2);
                let_connections_age();
                gate.silence_established();
                for _ in 0..2 {
                    let (outcome, took) = timed(|| operation(&store));
                    let error = outcome.expect_err(what);
                    assert!(matches!(error, Error::Unavailable { .. }), "{what}: {error:?}");
                    assert!(error.is_transient(), "{what}: {error:?}");
                    assert!(took < TIMEOUT + Duration::from_secs(1) + SLACK, "{what}: {took:?}");
                }
                gate.hang_up();
                wait_until("the pool has made others", || operation(&store).is_ok());
            });
        }
    });
}

/// Stops processes of a server, and lets them go on, whatever becomes of the test.
struct Frozen(Vec<i32>);

impl Frozen {
    fn new(pids: Vec<i32>) -> Self {
        for pid in &pids {
            signal_pid(*pid, Signal::STOP);
        }
        Self(pids)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            signal_pid(*pid, Signal::CONT);
        }
    }
}

/// The backends of a store's idle connections.
fn backends(store: &PostgresCheckpointStore, connections: u32) -> Vec<i32> {
    let mut held: Vec<_> = (0..connections).map(|_| store.connection().unwrap()).collect();
    held.iter_mut().map(|client| process_id(client)).collect()
}

#[test]
fn backends_that_stand_still_are_left_behind_while_the_server_takes_new_connections() {
    let server = server();
    for (what, operation) in OPERATIONS {
        let ours = builders(&server.params(), 3, Duration::from_secs(20));
        let theirs = on_a_pool(&server.params(), 3, Duration::from_secs(20));
        for (store, frozen) in [(&ours, 3), (&theirs, 1)] {
            let mut pids = backends(store, 3);
            let pids = pids.split_off(3 - frozen); // the next one is the one that came back last
            let_connections_age();
            let frozen = Frozen::new(pids);
            for _ in 0..3 {
                succeeds_in_time(what, || operation(store));
            }
            drop(frozen);
            operation(store).unwrap();
        }
    }
}

#[test]
fn a_server_that_stands_still_is_a_transient_error_in_time_and_used_again_when_it_goes_on() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let server = server();
    let stores: Vec<_> = OPERATIONS
        .iter()
        .map(|operation| (operation, builders(&server.params(), 2, TIMEOUT)))
        .collect();
    let mut pids: Vec<_> = stores.iter().flat_map(|(_, store)| backends(store, 2)).collect();
    pids.push(server.pid());
    let_connections_age();
    let frozen = Frozen::new(pids);
    thread::scope(|scope| {
        for ((what, operation), store) in &stores {
            scope.spawn(move || {
                let (outcome, took) = timed(|| operation(store));
                let error = outcome.expect_err(what);
                assert!(matches!(error, Error::Unavailable { .. }), "{what}: {error:?}");
                assert!(error.is_transient(), "{what}: {error:?}");
                assert!(took < TIMEOUT + Duration::from_secs(1) + SLACK, "{what}: {took:?}");
            });
        }
    });
    drop(frozen);
    for ((what, operation), store) in &stores {
        let (outcome, took) = timed(|| operation(store));
        outcome.unwrap_or_else(|error| panic!("{what}: {took:?}: {error:?}"));
    }
}

/// The kernel finds out, by what the parameters say: nothing else ends the wait for an answer.
#[test]
fn a_connection_that_falls_silent_in_mid_call_is_given_up_and_the_call_goes_on() {
    let network = Network::new();
    let server = network.server();
    let params = format!(
        "{} connect_timeout=1 tcp_user_timeout=2 keepalives_idle=1 keepalives_interval=1 \
         keepalives_retries=2",
        server.params()
    );
    let store = builders(&params, 4, Duration::from_secs(60));
    store.migrate().unwrap();
    let names = ["save", "advance", "project", "find"];
    store.save_many(&names.map(|name| (name, 1))).unwrap();
    let sql = "UPDATE projection_checkpoints SET updated_at = updated_at - interval '1 hour'";
    store.connection().unwrap().batch_execute(sql).unwrap();

    let mut holder = harness::client(&params);
    let mut held = holder.transaction().unwrap();
    for name in &names[..3] {
        store.in_transaction(&mut held).lock(name).unwrap();
    }
    let (outcomes, took) = timed(|| {
        thread::scope(|scope| {
            let calls = [
                scope.spawn(|| store.save("save", 2)),
                scope.spawn(|| store.advance("advance", 1, 2)),
                scope.spawn(|| store.project("project", |_, _| Ok(Some(2))).map(drop)),
            ];
            wait_until("all of them wait for their rows", || {
                let sql = "SELECT count(*) FROM pg_locks WHERE NOT granted";
                held.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 3
            });
            network.cut();
            // Its only way to learn of it is the kernel's, so wait until that has told one of them.
            wait_until("the loss is noticed", || calls[1].is_finished());
            network.mend();
            calls.map(|call| call.join().unwrap())
        })
    });
    println!("{took:?}: {outcomes:?}");
    let [save, advance, project] = outcomes;
    // The server still has the first attempt of each, and runs it when the row is free.
    save.unwrap();
    project.unwrap();
    let lost = advance.unwrap_err();
    assert!(matches!(lost, Error::Unavailable { .. }) && lost.is_transient(), "{lost:?}");
    assert_eq!(store.get("save").unwrap(), 2);
    assert_eq!(store.get("project").unwrap(), 2);
}

#[test]
fn a_commit_in_doubt_stays_in_the_error_when_the_server_is_away_from_then_on() {
    const TIMEOUT: Duration = Duration::from_secs(2);
    for ours in [true, false] {
        let server = Arc::new(server());
        let proxy = Proxy::to(server.port());
        let told = Arc::new(Mutex::new(Vec::new()));
        let (to_stop, telling) = (Arc::clone(&server), Arc::clone(&told));
        let builder = PostgresCheckpointStore::builder().on_retry(move |retry| {
            telling.lock().unwrap().push(chain(retry.error));
            if retry.attempt == 1 {
                to_stop.stop();
            }
        });
        let store = if ours {
            builder.connection_timeout(TIMEOUT).connect(&proxy.params())
        } else {
            builder.build(harness::pool(&proxy.params(), 2, TIMEOUT))
        };
        let store = store.unwrap();
        let direct = PostgresCheckpointStore::connect(&server.params()).unwrap();
        let project = |to| store.project("orders", |_, _| Ok(Some(to)));
        let try_project = |to| store.try_project("orders", |_, _| Ok(Some(to))).map(|_| None);
        let calls: [&dyn Fn(i64) -> Result<Option<i64>>; 2] = [&project, &try_project];
        for (call, to) in calls.into_iter().zip([10, 20]) {
            store.get("orders").unwrap();
            told.lock().unwrap().clear();
            proxy.cut("COMMIT", Cut::BeforeTheAnswer);
            let (outcome, took) = timed(|| call(to));
            let error = outcome.unwrap_err();
            assert!(
                matches!(error, Error::Unavailable { operation: "commit", .. }),
                "{error:?}, after {:?}",
                told.lock().unwrap()
            );
            assert!(error.is_transient(), "{error:?}");
            assert!(chain(&error).contains("the batch may be committed"), "{}", chain(&error));
            assert!(took < TIMEOUT + Duration::from_secs(1) + SLACK, "{took:?}");
            assert!(told.lock().unwrap()[0].contains(": commit: "), "{:?}", told.lock().unwrap());
            server.restart();
            assert_eq!(direct.get("orders").unwrap(), to, "it was committed");
            // The next call goes on from what is stored.
            wait_until("the store works again", || {
                let next = store.project("orders", |_, offset| {
                    assert_eq!(offset, to);
                    Ok(None)
                });
                next.is_ok_and(|next| next.is_none())
            });
        }
    }
}

/// The fewest of several: a connection that was not used for a second is tested, and this machine may be slow.
fn fewest_round_trips(proxy: &Proxy, work: impl Fn()) -> usize {
    (0..10).map(|_| proxy.round_trips(&work)).min().unwrap()
}

#[test]
fn what_is_not_there_takes_a_second_round_trip() {
    let server = server();
    let proxy = Proxy::to(server.port());
    let store = PostgresCheckpointStore::connect(&proxy.params()).unwrap();
    let count = |work: &dyn Fn()| fewest_round_trips(&proxy, work);
    assert_eq!(count(&|| assert_eq!(store.get("find").unwrap(), 1)), 1);
    assert_eq!(count(&|| assert!(store.find("find").unwrap().is_some())), 1);
    assert_eq!(count(&|| assert_eq!(store.get("absent").unwrap(), 0)), 2);
    assert_eq!(count(&|| assert!(store.find("absent").unwrap().is_none())), 2);
    assert_eq!(count(&|| assert!(!store.delete("absent").unwrap())), 2);
    assert_eq!(count(&|| assert!(!store.all().unwrap().is_empty())), 1);
    assert_eq!(count(&|| store.save("save", 1).unwrap()), 1);
    assert_eq!(count(&|| store.advance("advance", 1, 1).unwrap()), 1);
}

#[test]
fn to_lock_a_row_that_is_to_be_created_takes_five_round_trips_at_most() {
    let server = server();
    let proxy = Proxy::to(server.port());
    let store = PostgresCheckpointStore::connect(&proxy.params()).unwrap();
    let mut client = harness::client(&proxy.params());
    let mut tx = client.transaction().unwrap();
    for (name, is_there) in [("new", false), ("new", true)] {
        let try_lock = proxy.round_trips(|| {
            assert_eq!(store.in_transaction(&mut tx).try_lock(name).unwrap(), Some(0));
        });
        assert!(try_lock <= if is_there { 1 } else { 5 }, "{try_lock}");
        println!("try_lock, there: {is_there}: {try_lock}");
    }
    let lock = proxy.round_trips(|| {
        assert_eq!(store.in_transaction(&mut tx).lock("newer").unwrap(), 0);
    });
    println!("lock: {lock}");
    assert!(lock <= 2, "{lock}");
}

/// What a store is used for, and in how many round trips.
type FirstUse = (&'static str, fn(&PostgresCheckpointStore), usize);

#[test]
fn a_connection_that_was_made_just_now_is_not_tested() {
    let server = server();
    let proxy = Proxy::to(server.port());
    let first_use: [FirstUse; 3] = [
        ("save", |store| store.save("save", 1).unwrap(), 1),
        ("advance", |store| store.advance("advance", 1, 1).unwrap(), 1),
        (
            "project",
            |store| assert_eq!(store.project("project", |_, _| Ok(None)).unwrap(), None),
            3,
        ),
    ];
    for (what, work, expected) in first_use {
        let fewest = (0..10).map(|_| {
            let store = PostgresCheckpointStore::connect(&proxy.params()).unwrap();
            proxy.round_trips(|| work(&store))
        });
        assert_eq!(fewest.min(), Some(expected), "{what}, on the connection of `connect`");

        // Of a login there is nothing to wait for but the login: with `trust`, one round trip.
        let fewest = (0..10).map(|_| {
            let store = PostgresCheckpointStore::connect(&proxy.params()).unwrap();
            let _first = store.connection().unwrap();
            proxy.round_trips(|| work(&store))
        });
        assert_eq!(fewest.min(), Some(1 + expected), "{what}, on a second connection");
    }
}

#[test]
fn the_first_use_of_a_store_makes_no_second_login() {
    let server = server();
    let gate = Gate::to(server.port());
    let store = PostgresCheckpointStore::connect(&gate.params()).unwrap();
    assert_eq!(gate.accepted(), 1);
    for (_, operation) in OPERATIONS {
        operation(&store).unwrap();
    }
    store.migrate().unwrap();
    assert_eq!(gate.accepted(), 1);
    assert_eq!(store.pool_state().connections, 1);
}
