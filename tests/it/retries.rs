//! What `on_retry` observes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{
    CheckpointStore, Error, PostgresCheckpointStore, PostgresCheckpointStoreBuilder, Result, Retry,
};

use crate::deadlines::Frozen;
use crate::harness::{self, Cut, Options, Proxy, Schema, Server, pool, sql_state, wait_until};

/// What an observer was told.
#[derive(Debug, Clone)]
struct Told {
    thread: ThreadId,
    at: Instant,
    attempt: u32,
    elapsed: Duration,
    report: String,
    has_source: bool,
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Told>>>);

impl Log {
    fn observes(&self, builder: PostgresCheckpointStoreBuilder) -> PostgresCheckpointStoreBuilder {
        let log = self.clone();
        builder.on_retry(move |retry: &Retry<'_>| {
            log.0.lock().unwrap().push(Told {
                thread: thread::current().id(),
                at: Instant::now(),
                attempt: retry.attempt,
                elapsed: retry.elapsed,
                report: retry.error.report().to_string(),
                has_source: std::error::Error::source(retry.error).is_some(),
            });
        })
    }

    fn told(&self) -> Vec<Told> {
        self.0.lock().unwrap().clone()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// How many threads have been told.
    fn threads(&self) -> usize {
        let mut threads: Vec<_> = self.told().iter().map(|it| format!("{:?}", it.thread)).collect();
        threads.sort();
        threads.dedup();
        threads.len()
    }
}

/// With the builder's pool and with the caller's.
fn both_kinds(
    params: &str,
    connections: u32,
    configure: impl Fn(PostgresCheckpointStoreBuilder) -> PostgresCheckpointStoreBuilder,
) -> [PostgresCheckpointStore; 2] {
    let builder = || configure(PostgresCheckpointStore::builder().max_connections(connections));
    [
        builder().connect(params).unwrap(),
        builder().build(pool(params, connections, Duration::from_secs(30))).unwrap(),
    ]
}

type Call = fn(&PostgresCheckpointStore) -> Result<()>;

const CALLS: [(&str, Call); 9] = [
    ("find", |store| store.find("orders").map(drop)),
    ("get", |store| store.get("orders").map(drop)),
    ("all", |store| store.all().map(drop)),
    ("save", |store| store.save("orders", 2)),
    ("save_many", |store| store.save_many(&[("orders", 2)])),
    ("delete", |store| store.delete("orders").map(drop)),
    ("begin", |store| store.project("orders", |_, at| Ok(Some(at + 1))).map(drop)),
    ("migrate", |store| store.migrate()),
    ("connection", |store| store.connection().map(drop)),
];

#[test]
fn each_call_tells_of_an_outage_within_a_second_and_at_most_five_times_a_second() {
    const OUTAGE: Duration = Duration::from_secs(3);
    let server = Server::start(Options::fast());
    let mut trials = Vec::new();
    for (operation, call) in CALLS {
        for is_callers_pool in [false, true] {
            let log = Log::default();
            // A table of its own, for after a loss it matters whether others have written the checkpoint.
            let table = harness::unique("table");
            let [builders, callers] =
                both_kinds(&server.params(), 1, |it| log.observes(it.table(&table)));
            let store = if is_callers_pool { callers } else { builders };
            store.migrate().unwrap();
            store.save("orders", 1).unwrap();
            trials.push((operation, call, is_callers_pool, log, store));
        }
    }
    let idle = Instant::now();
    wait_until("no connection is trusted", || idle.elapsed() > Duration::from_millis(1_200));
    server.stop();
    let stopped = Instant::now();
    let failures: Vec<String> = thread::scope(|scope| {
        let calls: Vec<_> = trials
            .iter()
            .map(|(_, call, _, _, store)| {
                scope.spawn(move || {
                    let outcome = call(store);
                    (outcome, thread::current().id())
                })
            })
            .collect();
        wait_until("the outage has lasted for long enough", || stopped.elapsed() > OUTAGE);
        let lasted = stopped.elapsed();
        let told_by_then: Vec<_> = trials.iter().map(|(.., log, _)| log.told()).collect();
        server.restart();
        let mut failures = Vec::new();
        for ((trial, call), told) in trials.iter().zip(calls).zip(told_by_then) {
            let (operation, _, is_callers_pool, _, _) = trial;
            let (outcome, thread) = call.join().unwrap();
            let what = format!("{operation}, caller's pool {is_callers_pool}");
            if let Err(error) = outcome {
                failures.push(format!("{what}: {}", error.report()));
            }
            let Some(first) = told.first() else {
                failures.push(format!("{what}: nothing was told"));
                continue;
            };
            // Two seconds of grace for a slow machine.
            if first.at > stopped + Duration::from_secs(3) {
                failures.push(format!("{what}: first told after {:?}", first.at - stopped));
            }
            // The first two retries of a lost connection follow each other closely.
            let most = usize::try_from(lasted.as_secs() + 1).unwrap() * 5 + 3;
            if told.len() > most {
                failures.push(format!("{what}: told {} times", told.len()));
            }
            if told.len() < 2 {
                failures.push(format!("{what}: told only once: {told:?}"));
            }
            for (attempt, one) in (1..).zip(&told) {
                let is_in_order = one.attempt == attempt
                    && one.thread == thread
                    && one.has_source
                    && (*operation == "migrate"
                        || *operation == "connection"
                        || *operation == "all"
                        || one.report.contains("orders")
                        || one.report.contains("1 checkpoints"))
                    && one.report.contains(operation);
                if !is_in_order {
                    failures.push(format!("{what}: {one:?} instead of attempt {attempt}"));
                }
            }
            if !told.is_sorted_by_key(|one| one.elapsed)
                || first.elapsed > Duration::from_millis(100)
            {
                failures.push(format!("{what}: elapsed does not grow from 0: {told:?}"));
            }
        }
        failures
    });
    assert!(failures.is_empty(), "{failures:#?}");
}

/// It accepts connections and never answers: no login fails for as long as it may take.
#[test]
fn each_call_beside_a_frozen_server_is_told_within_a_second() {
    let server = Server::start(Options::fast());
    let mut trials = Vec::new();
    for (operation, call) in CALLS.into_iter().chain([("wait_for", wait_for as Call)]) {
        // An idle connection does not answer its test, an empty slot no login.
        for (kind, is_empty) in [("idle", false), ("empty", true), ("caller's pool", true)] {
            let log = Log::default();
            let params = format!("{} connect_timeout=15", server.params());
            let [builders, callers] = both_kinds(&params, 1, |it| log.observes(it));
            let store = if kind == "caller's pool" { callers } else { builders };
            store.migrate().unwrap();
            if is_empty {
                harness::lose_the_only_connection(&store);
            }
            trials.push((format!("{operation}, {kind}"), call, log, store));
        }
    }
    let idle = Instant::now();
    wait_until("no connection is trusted", || idle.elapsed() > Duration::from_millis(1_200));
    let frozen = Frozen::freeze(&server);
    let began = Instant::now();
    thread::scope(|scope| {
        for (_, call, _, store) in &trials {
            scope.spawn(|| drop(call(store)));
        }
        wait_until("all have been told, or it is too late", || {
            trials.iter().all(|(_, _, log, _)| log.len() > 0)
                || began.elapsed() > Duration::from_secs(4)
        });
        let untold: Vec<_> =
            trials.iter().filter(|(_, _, log, _)| log.len() == 0).map(|it| &it.0).collect();
        drop(frozen);
        assert!(untold.is_empty(), "not told within a second and some grace: {untold:?}");
    });
}

fn wait_for(store: &PostgresCheckpointStore) -> Result<()> {
    store.wait_for("orders", 1_000, Duration::from_secs(10)).map(drop)
}

/// More callers than may log in at once, and more than the pool has places.
#[test]
fn callers_that_wait_for_a_frozen_server_behind_each_other_are_told_too() {
    const THREADS: usize = 8;
    let server = Server::start(Options::fast());
    let log = Log::default();
    let store = log
        .observes(PostgresCheckpointStore::builder().max_connections(6))
        .connect(&format!("{} connect_timeout=15", server.params()))
        .unwrap();
    store.migrate().unwrap();
    harness::lose_the_only_connection(&store);
    let frozen = Frozen::freeze(&server);
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| drop(store.get("orders")));
        }
        wait_until("all have been told, or it is too late", || {
            log.threads() == THREADS || began.elapsed() > Duration::from_secs(5)
        });
        let told = log.threads();
        drop(frozen);
        assert_eq!(told, THREADS, "{:#?}", log.told());
    });
    let reasons = log.told().iter().filter(|it| it.report.contains("no answer")).count();
    assert!(reasons >= THREADS, "{:#?}", log.told());
}

/// A login that takes no longer than it should, and a connection that answers its test, are nothing to report.
#[test]
fn a_connection_that_is_made_in_time_is_not_told_of() {
    let server = Server::start(Options::fast());
    let log = Log::default();
    for store in both_kinds(&server.params(), 2, |it| log.observes(it)) {
        store.migrate().unwrap();
        for _ in 0..3 {
            let (one, other) = (store.connection().unwrap(), store.connection().unwrap());
            drop((one, other));
            harness::end_sessions(&mut server.client());
        }
        store.connection().unwrap();
    }
    assert!(log.told().iter().all(|it| !it.report.contains("no answer")), "{:#?}", log.told());
}

/// One call makes the connection; the others wait for the slot, and are told why there is none.
#[test]
fn calls_that_wait_for_a_slot_are_told_too() {
    const THREADS: usize = 6;
    let server = Server::start(Options::fast());
    for group_commit in [false, true] {
        let log = Log::default();
        let builder =
            PostgresCheckpointStore::builder().max_connections(1).group_commit(group_commit);
        let store = log.observes(builder).connect(&server.params()).unwrap();
        store.migrate().unwrap();
        server.stop();
        let (store, log) = (&store, &log);
        thread::scope(|scope| {
            let calls: Vec<_> = (0..THREADS)
                .map(|i| {
                    scope.spawn(move || {
                        let name = format!("projection {i}");
                        store.get(&name).unwrap();
                        thread::current().id()
                    })
                })
                .collect();
            wait_until("all have been told", || log.threads() == THREADS);
            server.restart();
            for call in calls {
                assert_ne!(call.join().unwrap(), thread::current().id());
            }
        });
    }
}

/// The calls that wait for their group, for a group under way, and for an earlier call on their projection.
#[test]
fn each_call_in_a_group_is_told_of_an_outage() {
    const THREADS: usize = 24;
    let time = Duration::from_secs(8);
    let server = Server::start(Options::fast());
    for is_callers_pool in [false, true] {
        let log = Log::default();
        let builder = log.observes(
            PostgresCheckpointStore::builder().group_commit(true).connection_timeout(time),
        );
        let store = if is_callers_pool {
            builder.build(pool(&server.params(), 2, time)).unwrap()
        } else {
            builder.max_connections(2).connect(&server.params()).unwrap()
        };
        store.migrate().unwrap();
        for i in 0..THREADS {
            store.save(&format!("projection {i}"), 1).unwrap();
        }
        server.stop();
        let (store, log) = (&store, &log);
        thread::scope(|scope| {
            let calls: Vec<_> = (0..THREADS)
                .map(|i| scope.spawn(move || drop(store.save(&format!("projection {i}"), 2))))
                .collect();
            let began = Instant::now();
            wait_until("all have been told, or the time is over", || {
                log.threads() == THREADS || began.elapsed() > Duration::from_secs(5)
            });
            let told = log.threads();
            server.restart();
            for call in calls {
                call.join().unwrap();
            }
            assert_eq!(told, THREADS, "calls that were told, caller's pool {is_callers_pool}");
        });
    }
}

#[test]
fn while_nothing_is_retried_nothing_is_told() {
    let schema = Schema::new();
    let log = Log::default();
    let stores = both_kinds(&harness::server().params(), 2, |builder| {
        log.observes(builder.schema(&schema.name))
    });
    for store in &stores {
        store.migrate().unwrap();
        store.save("orders", 1).unwrap();
        store.advance("orders", 1, 2).unwrap();
        store.advance("orders", 1, 2).unwrap_err();
        store.save_many(&[("orders", 3), ("another", 1)]).unwrap();
        store.all().unwrap();
        assert_eq!(store.project("orders", |_, _| Ok(Some(4))).unwrap(), Some(4));
        store.project("orders", |_, _| Ok(None)).unwrap();
        store.project("orders", |_, _| Err(Error::backend("apply", "on purpose"))).unwrap_err();
        store.project("fresh", |_, _| Ok(Some(1))).unwrap();
        assert!(!store.wait_for("orders", 9, Duration::from_millis(20)).unwrap());
        store.save("orders", -1).unwrap_err();
        // An error that another attempt would meet again.
        let broken = PostgresCheckpointStore::builder().schema("nowhere");
        let broken = log.observes(broken).connect(&harness::server().params()).unwrap();
        broken.save("orders", 1).unwrap_err();
        // A connection that turns out to be dead when it is tested.
        let mut one = store.connection().unwrap();
        let pid: i32 = one.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        drop(one);
        harness::end_backend(&mut harness::server().client(), pid);
        let idle = Instant::now();
        wait_until("it is suspect", || idle.elapsed() > Duration::from_millis(1_200));
        store.advance("orders", 4, 5).unwrap();
        store.save("orders", 6).unwrap();
        assert_eq!(log.len(), 0, "{:?}", log.told());
        for name in ["orders", "another", "fresh"] {
            store.delete(name).unwrap();
        }
    }
    // Calls that wait for each other's connections.
    for store in &stores {
        thread::scope(|scope| {
            for i in 0..8 {
                scope.spawn(move || {
                    for offset in 0..50 {
                        store.save(&format!("projection {i}"), offset).unwrap();
                    }
                });
            }
        });
    }
    assert_eq!(log.len(), 0, "{:?}", log.told());
}

/// What is used up is no outage, and another attempt is not made.
#[test]
fn a_pool_that_is_used_up_is_not_told_of() {
    let schema = Schema::new();
    let log = Log::default();
    let stores = both_kinds(&harness::server().params(), 1, |builder| {
        log.observes(builder.schema(&schema.name).connection_timeout(Duration::from_millis(2_500)))
    });
    for store in &stores {
        let held = store.connection().unwrap();
        store.save("orders", 1).unwrap_err();
        drop(held);
        assert_eq!(log.len(), 0, "{:?}", log.told());
    }
}

#[test]
fn a_lost_answer_is_told_once_with_its_cause_at_each_step() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let log = Log::default();
    let stores =
        both_kinds(&proxy.params(), 1, |builder| log.observes(builder.schema(&schema.name)));
    for store in &stores {
        store.save("orders", 1).unwrap();
        for (text, place, call, operation) in [
            ("SELECT", Cut::BeforeTheAnswer, CALLS[1].1, "get"),
            ("INSERT", Cut::BeforeTheAnswer, CALLS[3].1, "save"),
            ("START", Cut::BeforeTheAnswer, CALLS[6].1, "begin"),
            ("FOR UPDATE", Cut::BeforeTheAnswer, CALLS[6].1, "lock"),
            ("COMMIT", Cut::BeforeTheAnswer, CALLS[6].1, "commit"),
            ("COMMIT", Cut::BeforeTheRequest, CALLS[6].1, "commit"),
        ] {
            let before = log.len();
            proxy.cut(text, place);
            call(store).unwrap();
            assert!(!proxy.disarm(), "{text}");
            let told = &log.told()[before..];
            assert_eq!(told.len(), 1, "{text}: {told:?}");
            assert_eq!(told[0].attempt, 1);
            assert!(told[0].report.contains(operation), "{text}: {:?}", told[0]);
            assert!(told[0].report.contains("\"orders\"") && told[0].has_source, "{:?}", told[0]);
            assert_eq!(told[0].thread, thread::current().id());
        }
        // What is not repeated is not told.
        let before = log.len();
        let at = store.get("orders").unwrap();
        proxy.cut("UPDATE", Cut::BeforeTheAnswer);
        store.advance("orders", at, at + 1).unwrap_err();
        assert_eq!(log.len(), before);
    }
}

#[test]
fn a_deadlock_and_a_serialization_failure_are_told_of() {
    let schema = Schema::new();
    let log = Log::default();
    let stores = both_kinds(&harness::server().params(), 1, |builder| {
        log.observes(builder.schema(&schema.name))
    });
    for store in &stores {
        for state in ["40001", "40P01"] {
            let before = log.len();
            let mut runs = 0;
            store
                .project("orders", |tx, offset| {
                    runs += 1;
                    if runs < 4 {
                        tx.batch_execute(&format!("DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$"))?;
                    }
                    Ok(Some(offset + 1))
                })
                .unwrap();
            let told = &log.told()[before..];
            assert_eq!(told.iter().map(|it| it.attempt).collect::<Vec<_>>(), [1, 2, 3], "{told:?}");
        }
    }
}

/// Of many that deadlock with each other each retry is told, on the thread of its call.
#[test]
fn a_storm_of_deadlocks_is_told_of_and_gets_done() {
    const THREADS: usize = 4;
    const BATCHES: i64 = 5;
    let schema = Schema::new();
    schema
        .client()
        .batch_execute(
            "CREATE TABLE totals (id int PRIMARY KEY, amount bigint);
             INSERT INTO totals SELECT i, 0 FROM generate_series(1, 2) AS i",
        )
        .unwrap();
    let log = Log::default();
    let store = log
        .observes(PostgresCheckpointStore::builder())
        .schema(&schema.name)
        .connect(&format!(
            "{} options='-c search_path={} -c deadlock_timeout=10ms'",
            harness::server().params(),
            schema.name
        ))
        .unwrap();
    let store = &store;
    let runs = AtomicUsize::new(0);
    let update = |tx: &mut Transaction<'_>, id: i32| {
        tx.execute("UPDATE totals SET amount = amount + 1 WHERE id = $1", &[&id])
    };
    thread::scope(|scope| {
        for i in 0..THREADS {
            let runs = &runs;
            scope.spawn(move || {
                let name = format!("projection {i}");
                for batch in 1..=BATCHES {
                    let committed = store.project(&name, |tx, offset| {
                        runs.fetch_add(1, Ordering::SeqCst);
                        let [one, two] = if i % 2 == 0 { [1, 2] } else { [2, 1] };
                        update(tx, one)?;
                        // Long enough for the others to have theirs.
                        tx.batch_execute("SELECT pg_sleep(0.005)")?;
                        update(tx, two)?;
                        Ok(Some(offset + 1))
                    });
                    assert_eq!(committed.unwrap(), Some(batch));
                }
            });
        }
    });
    let batches = THREADS * usize::try_from(BATCHES).unwrap();
    assert_eq!(log.len(), runs.into_inner() - batches, "one for each run that was undone");
    assert!(log.len() > 0, "there was a deadlock");
    let rows = schema.client().query("SELECT amount FROM totals", &[]).unwrap();
    assert!(rows.iter().all(|row| row.get::<_, i64>(0) == i64::try_from(batches).unwrap()));
}

#[test]
fn a_failover_is_told_of() {
    let primary = Server::start(Options::fast());
    let standby = Server::prepare(Options::fast());
    standby.follow(&primary);
    standby.restart();
    let log = Log::default();
    let store = log
        .observes(PostgresCheckpointStore::builder())
        .connect(&format!(
            "host=127.0.0.1,127.0.0.1 port={},{} user=postgres target_session_attrs=read-write",
            primary.port(),
            standby.port()
        ))
        .unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    wait_until("the standby has it", || {
        let sql = "SELECT count(*) FROM projection_checkpoints";
        standby.client().query_one(sql, &[]).is_ok_and(|row| row.get::<_, i64>(0) == 1)
    });
    primary.stop();
    thread::scope(|scope| {
        let calls = [
            scope.spawn(|| store.get("orders").map(drop)),
            scope.spawn(|| store.project("another", |_, _| Ok(Some(1))).map(drop)),
        ];
        wait_until("both are told", || {
            let told = log.told();
            ["get", "begin"].iter().all(|it| told.iter().any(|one| one.report.contains(it)))
        });
        standby.client().query_one("SELECT pg_promote()", &[]).unwrap();
        for call in calls {
            call.join().unwrap().unwrap();
        }
    });
    let told = log.len();
    store.save("orders", 2).unwrap();
    assert_eq!(log.len(), told, "not after it is over");
}

#[test]
fn a_panic_of_the_observer_reaches_the_caller_and_leaves_the_store_usable() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for group_commit in [false, true] {
        let panics = Arc::new(AtomicBool::new(true));
        let stores = both_kinds(&proxy.params(), 1, |builder| {
            let panics = Arc::clone(&panics);
            builder
                .schema(&schema.name)
                .group_commit(group_commit)
                .connection_timeout(Duration::from_secs(10))
                .on_retry(move |_| {
                    if panics.load(Ordering::SeqCst) {
                        std::panic::resume_unwind(Box::new("on purpose"));
                    }
                })
        });
        for store in &stores {
            store.save("orders", 1).unwrap();
            for (text, call) in [
                ("SELECT", CALLS[0].1),
                ("INSERT", CALLS[3].1),
                ("DELETE", CALLS[5].1),
                ("START", CALLS[6].1),
                ("COMMIT", CALLS[6].1),
            ] {
                store.save("orders", 1).unwrap();
                panics.store(true, Ordering::SeqCst);
                proxy.cut(text, Cut::BeforeTheAnswer);
                let outcome = catch_unwind(AssertUnwindSafe(|| call(store)));
                assert!(!proxy.disarm(), "{text}");
                let panic = outcome.expect_err(text);
                assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
                panics.store(false, Ordering::SeqCst);
                // The pool's only place is there.
                store.get("orders").unwrap();
                store.save("orders", 2).unwrap();
                assert!(store.project("orders", |_, at| Ok(Some(at + 1))).unwrap().is_some());
                drop(store.connection().unwrap());
                assert_eq!(store.pool_state().connections, 1);
            }
        }
    }
}

/// Also while a call waits for a connection that cannot be made.
#[test]
fn a_panic_of_the_observer_in_an_outage_leaves_the_pool_all_its_places() {
    let server = Server::start(Options::fast());
    let panics = Arc::new(AtomicBool::new(true));
    let stores = both_kinds(&server.params(), 2, |builder| {
        let panics = Arc::clone(&panics);
        builder.on_retry(move |_| {
            if panics.load(Ordering::SeqCst) {
                std::panic::resume_unwind(Box::new("on purpose"));
            }
        })
    });
    stores[0].migrate().unwrap();
    for store in &stores {
        store.save("orders", 1).unwrap();
    }
    server.stop();
    for store in &stores {
        for _ in 0..5 {
            catch_unwind(AssertUnwindSafe(|| store.get("orders"))).unwrap_err();
        }
    }
    panics.store(false, Ordering::SeqCst);
    server.restart();
    for store in &stores {
        assert_eq!(store.get("orders").unwrap(), 1);
        let held = [store.connection().unwrap(), store.connection().unwrap()];
        drop(held);
    }
}

#[test]
fn the_observer_may_use_the_store() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (group_commit, connections) in [(false, 1), (true, 1), (false, 2)] {
        let handle: Arc<OnceLock<PostgresCheckpointStore>> = Arc::default();
        let observed = Arc::new(AtomicUsize::new(0));
        let [store, _] = both_kinds(&proxy.params(), connections, |builder| {
            let (handle, observed) = (Arc::clone(&handle), Arc::clone(&observed));
            builder.schema(&schema.name).group_commit(group_commit).on_retry(move |_| {
                if let Some(store) = handle.get() {
                    let retries = observed.fetch_add(1, Ordering::SeqCst) + 1;
                    store.save("retries", i64::try_from(retries).unwrap()).unwrap();
                    store.advance("retries", i64::try_from(retries).unwrap(), 99).unwrap();
                    assert_eq!(store.get("retries").unwrap(), 99);
                    assert!(
                        store.project("projected", |_, at| Ok(Some(at + 1))).unwrap().is_some()
                    );
                }
            })
        });
        handle.set(store.clone()).unwrap();
        store.save("orders", 1).unwrap();
        for (text, call) in [("SELECT", CALLS[0].1), ("INSERT", CALLS[3].1), ("COMMIT", CALLS[6].1)]
        {
            let before = observed.load(Ordering::SeqCst);
            proxy.cut(text, Cut::BeforeTheAnswer);
            call(&store).unwrap();
            assert!(!proxy.disarm(), "{text}");
            assert_eq!(observed.load(Ordering::SeqCst), before + 1, "{text}");
        }
        // A closure that is retried does not make the observer part of it.
        let mut runs = 0;
        store
            .project("orders", |tx, offset| {
                runs += 1;
                if runs == 1 {
                    tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")?;
                }
                Ok(Some(offset + 1))
            })
            .unwrap();
        assert_eq!(runs, 2);
    }
}

/// The caller decides there.
#[test]
fn what_happens_in_the_callers_own_transaction_is_not_told() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let log = Log::default();
    let store = log
        .observes(PostgresCheckpointStore::builder())
        .schema(&schema.name)
        .connect(&proxy.params())
        .unwrap();
    let mut client = store.connection().unwrap();
    let mut tx = client.transaction().unwrap();
    proxy.cut("INSERT", Cut::BeforeTheAnswer);
    let error = store.in_transaction(&mut tx).save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    drop(tx);
    drop(client);
    let mut client = harness::server().client();
    let mut tx = client.transaction().unwrap();
    tx.batch_execute("SET TRANSACTION READ ONLY").unwrap();
    let error = store.in_transaction(&mut tx).save("orders", 1).unwrap_err();
    assert_eq!(sql_state(&error).as_deref(), Some("25006"));
    assert_eq!(log.len(), 0, "{:?}", log.told());
}

/// The error that ends the call is returned, not told.
#[test]
fn the_last_error_is_returned_and_the_others_are_told() {
    let server = Server::start(Options::fast());
    let log = Log::default();
    let stores = both_kinds(&server.params(), 1, |builder| {
        log.observes(builder).connection_timeout(Duration::from_millis(1_500))
    });
    stores[0].migrate().unwrap();
    server.stop();
    for store in &stores {
        let before = log.len();
        let error = store.get("orders").unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!(log.len() > before);
    }
}
