//! Each call returns within its time limit, whatever the server and the pool do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PostgresCheckpointStore, Result,
};
use rustix::process::Signal;

use crate::harness::{
    self, Options, Proxy, Schema, Server, chain, pool, signal_pid, sql_state, wait_until,
};

/// The `connection_timeout` of the stores here.
const LIMIT: Duration = Duration::from_millis(1_500);
/// The time-out of `wait_for`, which has its own.
const WAIT: Duration = Duration::from_millis(500);
/// What a slow machine may add.
const GRACE: Duration = Duration::from_secs(2);
/// From this time on a connection that was idle is tested.
const SUSPECT: Duration = Duration::from_millis(1_200);

/// What a call is made on.
struct Subject {
    params: String,
    store: Option<PostgresCheckpointStore>,
    checkpointer: Checkpointer<PostgresCheckpointStore>,
}

impl Subject {
    fn store(&self) -> &PostgresCheckpointStore {
        self.store.as_ref().expect("it is dropped by the last call only")
    }
}

type Call = fn(&mut Subject) -> Result<bool>;

/// Every public call that may wait for a server. `true`: it has succeeded.
const CALLS: [(&str, Call); 16] = [
    ("find", |it| it.store().find("orders").map(|_| true)),
    ("get", |it| it.store().get("orders").map(|_| true)),
    ("all", |it| it.store().all().map(|_| true)),
    ("save", |it| it.store().save("orders", 2).map(|()| true)),
    ("save_many", |it| it.store().save_many(&[("orders", 2), ("a", 1)]).map(|()| true)),
    ("advance", |it| it.store().advance("orders", 1, 2).map(|()| true)),
    ("delete", |it| it.store().delete("orders")),
    ("wait_for", |it| it.store().wait_for("orders", 99, WAIT)),
    ("wait_for, no time", |it| it.store().wait_for("orders", 99, Duration::ZERO)),
    ("connection", |it| it.store().connection().map(|_| true)),
    ("project", |it| it.store().project("orders", |_, _| Ok(Some(2))).map(|_| true)),
    ("try_project", |it| it.store().try_project("orders", |_, _| Ok(Some(2))).map(|_| true)),
    ("migrate", |it| it.store().migrate().map(|()| true)),
    ("Checkpointer::flush", |it| it.checkpointer.flush()),
    ("connect", |it| {
        let builder = PostgresCheckpointStore::builder().connection_timeout(LIMIT);
        builder.connect(&it.params).map(|_| true)
    }),
    ("drop", |it| {
        drop(it.store.take());
        Ok(false)
    }),
];

fn limit(call: &str) -> Duration {
    match call {
        "wait_for" => WAIT,
        "wait_for, no time" | "drop" => Duration::ZERO,
        _ => LIMIT,
    }
}

struct Trial {
    call: &'static str,
    setting: String,
    run: Call,
    subject: Subject,
}

/// Each call on a store of its own with one open connection: with the builder's pool and the caller's, with
/// group commit and without.
fn trials(params: &str) -> Vec<Trial> {
    PostgresCheckpointStore::connect(params).unwrap().migrate().unwrap();
    let settings = [(false, false), (false, true), (true, false), (true, true)];
    let mut trials = Vec::new();
    for (call, run) in CALLS {
        // `connect` makes the builder's pool.
        let settings = &settings[..if call == "connect" { 1 } else { settings.len() }];
        for &(is_callers_pool, group_commit) in settings {
            let builder = PostgresCheckpointStore::builder()
                .max_connections(1)
                .connection_timeout(LIMIT)
                .group_commit(group_commit);
            let store = if is_callers_pool {
                builder.build(pool(params, 1, LIMIT)).unwrap()
            } else {
                builder.connect(params).unwrap()
            };
            store.save("orders", 1).unwrap();
            let flushed = if call == "Checkpointer::flush" {
                store.clone()
            } else {
                // Another store, so that the drop of this one is that of its last handle.
                PostgresCheckpointStore::new(pool(params, 1, LIMIT))
            };
            let checkpointer = match call {
                "Checkpointer::flush" => {
                    let mut it =
                        Checkpointer::resume(flushed, "orders", Cadence::every(100)).unwrap();
                    it.processed(2).unwrap();
                    it
                }
                _ => Checkpointer::resume(flushed, "orders", Cadence::every(1)).unwrap(),
            };
            let subject = Subject { params: params.to_owned(), store: Some(store), checkpointer };
            let setting = format!(
                "{} pool, group commit {group_commit}",
                if is_callers_pool { "the caller's" } else { "the builder's" }
            );
            trials.push(Trial { call, setting, run, subject });
        }
    }
    trials
}

/// Makes all calls at once, and says which of them were late or had an unexpected outcome.
fn faults_of(trials: &mut [Trial]) -> Vec<String> {
    thread::scope(|scope| {
        let calls: Vec<_> = trials
            .iter_mut()
            .map(|trial| {
                scope.spawn(move || {
                    let started = Instant::now();
                    let outcome = (trial.run)(&mut trial.subject);
                    let took = started.elapsed();
                    let is_late = took > limit(trial.call) + GRACE;
                    let is_expected = match &outcome {
                        Ok(has_succeeded) => {
                            !has_succeeded
                                && ["wait_for", "wait_for, no time", "drop"].contains(&trial.call)
                                // One that was used within the last second is lent as it is.
                                || trial.call == "connection"
                        }
                        Err(Error::Unavailable { .. }) => true,
                        Err(_) => false,
                    };
                    let what =
                        format!("{}, {}: {took:.1?}, {outcome:?}", trial.call, trial.setting);
                    (is_late || !is_expected).then_some(what)
                })
            })
            .collect();
        calls.into_iter().filter_map(|call| call.join().unwrap()).collect()
    })
}

#[test]
fn every_call_is_in_time_while_the_server_is_down() {
    let server = Server::start(Options::fast());
    let mut trials = trials(&server.params());
    server.stop();
    let faults = faults_of(&mut trials);
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn every_call_is_in_time_while_the_server_is_frozen() {
    let server = Server::start(Options::fast());
    let mut trials = trials(&server.params());
    let idle = Instant::now();
    wait_until("idle connections are suspect", || idle.elapsed() > SUSPECT);
    let frozen = Frozen::freeze(&server);
    let faults = faults_of(&mut trials);
    drop(frozen);
    assert!(faults.is_empty(), "{faults:#?}");
}

/// `connect` makes a connection of its own, so it is not in this trial.
#[test]
fn every_call_is_in_time_while_the_pool_is_used_up() {
    let server = Server::start(Options::fast());
    let mut trials = trials(&server.params());
    trials.retain(|trial| trial.call != "connect");
    let held: Vec<_> = trials.iter().map(|it| it.subject.store().connection().unwrap()).collect();
    let faults = faults_of(&mut trials);
    drop(held);
    assert!(faults.is_empty(), "{faults:#?}");
}

/// A server that is stopped with all its processes, until this is dropped.
pub(crate) struct Frozen(Vec<i32>);

impl Frozen {
    pub(crate) fn freeze(server: &Server) -> Self {
        let postmaster = server.pid();
        signal_pid(postmaster, Signal::STOP);
        let mut frozen = vec![postmaster];
        for process in fs::read_dir("/proc").expect("Linux").flatten() {
            let Ok(pid) = process.file_name().to_string_lossy().parse() else { continue };
            let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            // After the name, which is in parentheses: the state and the parent.
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
            if parent.and_then(|it| it.parse().ok()) == Some(postmaster) {
                signal_pid(pid, Signal::STOP);
                frozen.push(pid);
            }
        }
        Self(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // One that was ending already may be gone.
        let is_there = |pid: &&i32| fs::exists(format!("/proc/{pid}")).unwrap_or(false);
        for pid in self.0.iter().filter(is_there) {
            signal_pid(*pid, Signal::CONT);
        }
    }
}

/// Calls that wait for each other in groups share no more than the limit of one.
#[test]
fn calls_in_groups_are_in_time_while_the_server_is_down() {
    let server = Server::start(Options::fast());
    for is_callers_pool in [false, true] {
        let builder = PostgresCheckpointStore::builder()
            .max_connections(4)
            .connection_timeout(LIMIT)
            .group_commit(true);
        let params = server.params();
        let store = if is_callers_pool {
            builder.build(pool(&params, 4, LIMIT)).unwrap()
        } else {
            builder.connect(&params).unwrap()
        };
        store.migrate().unwrap();
        server.stop();
        let store = &store;
        let longest = thread::scope(|scope| {
            let calls: Vec<_> = (0..24)
                .map(|i| {
                    scope.spawn(move || {
                        let mut longest = Duration::ZERO;
                        for round in 0..2 {
                            let started = Instant::now();
                            let name = format!("projection {}", i % 20);
                            let outcome = if i % 2 == round {
                                store.save(&name, 1)
                            } else {
                                store.advance(&name, 0, 1)
                            };
                            longest = longest.max(started.elapsed());
                            let error = outcome.unwrap_err();
                            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
                            assert!(error.is_transient(), "{error:?}");
                        }
                        longest
                    })
                })
                .collect();
            calls.into_iter().map(|call| call.join().unwrap()).max().unwrap()
        });
        assert!(longest < LIMIT + GRACE, "{longest:?}");
        server.restart();
        wait_until("the store works again", || store.save("orders", 1).is_ok());
    }
}

/// The store works again after a server that was frozen goes on.
#[test]
fn a_server_that_was_frozen_is_used_again() {
    let server = Server::start(Options::fast());
    for is_callers_pool in [false, true] {
        let builder =
            PostgresCheckpointStore::builder().max_connections(2).connection_timeout(LIMIT);
        let store = if is_callers_pool {
            builder.build(pool(&server.params(), 2, LIMIT)).unwrap()
        } else {
            builder.connect(&server.params()).unwrap()
        };
        store.migrate().unwrap();
        store.save("orders", 1).unwrap();
        let idle = Instant::now();
        wait_until("the connection is suspect", || idle.elapsed() > SUSPECT);
        let frozen = Frozen::freeze(&server);
        store.save("orders", 2).unwrap_err();
        drop(frozen);
        wait_until("the store works again", || store.save("orders", 3).is_ok());
        let held = [store.connection().unwrap(), store.connection().unwrap()];
        drop(held);
        assert_eq!(store.get("orders").unwrap(), 3);
    }
}

#[test]
fn wait_for_without_time_asks_once() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let builder = || PostgresCheckpointStore::builder().schema(&schema.name).max_connections(1);
    let stores = [
        builder().connect(&proxy.params()).unwrap(),
        builder().build(pool(&proxy.params(), 1, LIMIT)).unwrap(),
    ];
    for store in &stores {
        store.save("orders", 5).unwrap();
        for (offset, is_reached) in [(5, true), (6, false)] {
            let mut outcome = None;
            let asked = proxy.round_trips(|| {
                outcome = Some(store.wait_for("orders", offset, Duration::ZERO).unwrap());
            });
            assert_eq!((outcome, asked), (Some(is_reached), 1));
        }
        let idle = Instant::now();
        wait_until("the connection is suspect", || idle.elapsed() > SUSPECT);
        assert!(store.wait_for("orders", 5, Duration::ZERO).unwrap(), "after a test");
    }
    // A store whose connection was lost connects for it.
    for store in &stores {
        store
            .connection()
            .unwrap()
            .batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")
            .unwrap_err();
        wait_until("it asks", || store.wait_for("orders", 5, Duration::ZERO).unwrap_or(false));
    }
}

/// It waits while it cannot ask.
#[test]
fn wait_for_goes_on_when_a_connection_comes_back_in_time() {
    let schema = Schema::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .connection_timeout(Duration::from_millis(100))
        .connect(&harness::server().params())
        .unwrap();
    store.save("orders", 5).unwrap();
    let held = store.connection().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.wait_for("orders", 5, Duration::from_secs(60)));
        let begun = Instant::now();
        wait_until("it has waited for longer than other calls may", || {
            begun.elapsed() > Duration::from_millis(500)
        });
        drop(held);
        assert!(waiting.join().unwrap().unwrap());
    });
}

fn store_with_idle_limit(schema: &Schema, prepared: bool) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(prepared)
        .connection_timeout(Duration::from_secs(20))
        .connect(&format!(
            "{} options='-c idle_in_transaction_session_timeout=300ms'",
            harness::server().params()
        ))
        .unwrap()
}

#[test]
fn a_closure_that_outlasts_the_idle_limit_of_its_session_is_run_three_times() {
    let schema = Schema::new();
    for prepared in [false, true] {
        for is_there in [false, true] {
            for runs_a_statement in [false, true] {
                let store = store_with_idle_limit(&schema, prepared);
                store.delete("orders").unwrap();
                if is_there {
                    store.save("orders", 1).unwrap();
                }
                let mut runs = 0;
                let error = store
                    .project("orders", |tx, offset| {
                        runs += 1;
                        let begun = Instant::now();
                        wait_until("it has computed for long", || {
                            begun.elapsed() > Duration::from_millis(600)
                        });
                        if runs_a_statement {
                            tx.batch_execute("SELECT")?;
                        }
                        Ok(Some(offset + 1))
                    })
                    .unwrap_err();
                let told = chain(&error);
                let what = format!("{prepared} {is_there} {runs_a_statement}: {told}");
                assert_eq!(runs, 3, "{what}");
                assert!(matches!(error, Error::Unavailable { .. }), "{what}");
                assert!(error.is_transient(), "{what}");
                assert!(told.contains("idle_in_transaction_session_timeout"), "{what}");
                assert!(told.contains("300ms"), "{what}");
                assert_eq!(store.get("orders").unwrap(), i64::from(is_there));
                assert_eq!(
                    store.project("orders", |_, at| Ok(Some(at + 1))).unwrap(),
                    Some(1 + i64::from(is_there))
                );
            }
        }
    }
}

/// The limit is not blamed for what it has not done.
#[test]
fn a_closure_that_ends_its_session_by_itself_is_not_told_of_a_limit_that_it_has_kept() {
    let schema = Schema::new();
    let store = store_with_idle_limit(&schema, false);
    // `postgres` does not read the server's text in every attempt, and in none of a call's at times.
    wait_until("a call returns the server's text of one of its attempts", || {
        let mut runs = 0;
        let error = store
            .project("orders", |tx, _| {
                runs += 1;
                tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")?;
                Ok(Some(1))
            })
            .unwrap_err();
        assert_eq!(runs, 3);
        assert!(!chain(&error).contains("idle_in_transaction"), "{}", chain(&error));
        assert!(error.is_transient());
        let state = sql_state(&error);
        assert!(matches!(state.as_deref(), None | Some("57P01")), "{}", chain(&error));
        state.is_some()
    });
}

/// What was waited for before the closure ran is no failure of an attempt.
#[test]
fn the_time_to_retry_begins_after_the_closure_also_after_a_slow_login() {
    let limit = Duration::from_secs(3);
    let schema = Schema::new();
    schema.store.save("orders", 1).unwrap();
    let is_slow: &AtomicBool = Box::leak(Box::default());
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .connection_timeout(limit)
        .password_provider(|| {
            let asked = Instant::now();
            while is_slow.load(Ordering::SeqCst) && asked.elapsed() < Duration::from_millis(1_500) {
                thread::yield_now();
            }
            Ok(String::new())
        })
        .connect(&harness::server().params())
        .unwrap();
    harness::lose_the_only_connection(&store);
    is_slow.store(true, Ordering::SeqCst);
    let mut runs = 0;
    let applied = store.project("orders", |tx, offset| {
        is_slow.store(false, Ordering::SeqCst);
        runs += 1;
        if runs == 1 {
            let began = Instant::now();
            wait_until("the closure has taken longer than the limit", || began.elapsed() > limit);
            tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")?;
        }
        Ok(Some(offset + 1))
    });
    assert_eq!(applied.unwrap(), Some(2));
    assert_eq!(runs, 2);
}
