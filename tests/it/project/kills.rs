//! Connections and workers that end at every step, and callers who notice nothing.

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};
use fastrand::Rng;

use super::{applied, apply};
use crate::faults::{Row, this_program};
use crate::harness::{self, Cut, Proxy, end_backend, rounds, wait_until};

const PLACES: [Cut; 3] = [Cut::BeforeTheRequest, Cut::AfterTheRequest, Cut::BeforeTheAnswer];
const ISOLATION: [&str; 2] = ["read committed", "serializable"];

/// A database with a read model, and the parameters that lead to it by this port.
struct Stage {
    database: String,
    isolation: &'static str,
    store: PostgresCheckpointStore,
}

impl Stage {
    fn new(port: u16, isolation: &'static str, prepared: bool) -> Self {
        let direct = harness::fresh_database();
        let database = direct.rsplit('/').next().unwrap().to_owned();
        harness::client(&direct).batch_execute("CREATE TABLE applied (event bigint)").unwrap();
        PostgresCheckpointStore::connect(&direct).unwrap().migrate().unwrap();
        let isolation_option = isolation.replace(' ', "\\\\ ");
        let store = PostgresCheckpointStore::builder()
            .prepared_statements(prepared)
            .max_connections(2)
            .connect(&format!(
                "host=127.0.0.1 port={port} user=postgres dbname={database} \
                 application_name=killed_{database} \
                 options='-c default_transaction_isolation={isolation_option}'"
            ))
            .unwrap();
        Self { database, isolation, store }
    }

    fn client(&self) -> Client {
        harness::client(&harness::server().url(&self.database))
    }

    /// Every event up to here, once, and the checkpoint with it.
    fn check(&self, events: i64) {
        assert_eq!(applied(&mut self.client()), (1..=events).collect::<Vec<_>>());
        assert_eq!(self.store.get("orders").unwrap(), events);
    }
}

#[test]
fn a_connection_that_is_cut_off_at_any_step_is_not_noticed_by_the_caller() {
    // With statements that have to be prepared first there are two steps more.
    const STEPS: usize = 7;
    let times = rounds(3, 17);
    let (mut kills, mut longest) = (0, Duration::ZERO);
    for isolation in ISOLATION {
        for prepared in [false, true] {
            let proxy = Proxy::to(harness::server().port());
            let stage = Stage::new(proxy.port(), isolation, prepared);
            let mut events = 0;
            for step in 0..STEPS {
                for place in PLACES {
                    for _ in 0..times {
                        proxy.cut_at_step(step, place);
                        let started = Instant::now();
                        let committed = stage.store.project("orders", apply).unwrap();
                        longest = longest.max(started.elapsed());
                        events += 1;
                        assert_eq!(committed, Some(events), "{isolation} {step} {place:?}");
                        kills += usize::from(!proxy.disarm());
                    }
                }
            }
            stage.check(events);
        }
    }
    assert!(kills >= 4 * 5 * PLACES.len() * times, "{kills}");
    let fault = "`project`: connection cut off at each step, before and after it happened";
    Row::asserted(fault, kills, 0, longest).print();
}

/// The step of the closure at which its own backend is ended, from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    BeforeItsStatement,
    AfterItsStatement,
}

#[test]
fn a_backend_that_is_ended_under_the_closure_is_not_noticed_by_the_caller() {
    let (mut kills, mut longest) = (0, Duration::ZERO);
    for isolation in ISOLATION {
        for prepared in [false, true] {
            let stage = Stage::new(harness::server().port(), isolation, prepared);
            let mut admin = stage.client();
            let mut events = 0;
            for ended in [Ended::BeforeItsStatement, Ended::AfterItsStatement] {
                for _ in 0..rounds(10, 50) {
                    let mut is_to_end = true;
                    let started = Instant::now();
                    let committed = stage.store.project("orders", |tx, offset| {
                        let pid: i32 = tx.query_one("SELECT pg_backend_pid()", &[])?.get(0);
                        let mut end = |here| {
                            if here == ended && std::mem::take(&mut is_to_end) {
                                end_backend(&mut admin, pid);
                            }
                        };
                        end(Ended::BeforeItsStatement);
                        let applied = apply(tx, offset);
                        end(Ended::AfterItsStatement);
                        applied
                    });
                    longest = longest.max(started.elapsed());
                    events += 1;
                    kills += 1;
                    assert_eq!(committed.unwrap(), Some(events), "{isolation} {ended:?}");
                }
            }
            stage.check(events);
        }
    }
    let fault = "`project`: backend ended under the closure";
    Row::asserted(fault, kills, 0, longest).print();
}

#[test]
fn backends_that_are_ended_at_any_moment_are_not_noticed_by_the_caller() {
    let times = rounds(20, 50);
    let (mut kills, mut longest) = (0, Duration::ZERO);
    for isolation in ISOLATION {
        for prepared in [false, true] {
            let stage = Stage::new(harness::server().port(), isolation, prepared);
            let events = AtomicI64::new(0);
            thread::scope(|scope| {
                let worker = scope.spawn(|| {
                    let mut longest = Duration::ZERO;
                    while events.load(Ordering::SeqCst) >= 0 {
                        let started = Instant::now();
                        let committed = stage.store.project("orders", apply).unwrap().unwrap();
                        longest = longest.max(started.elapsed());
                        // One call, one batch; unless it was told to end meanwhile.
                        let before = events.fetch_max(committed, Ordering::SeqCst);
                        assert!(
                            before < 0 || committed == before + 1,
                            "{committed} after {before}"
                        );
                        if before < 0 {
                            return (committed, longest);
                        }
                    }
                    (stage.store.get("orders").unwrap(), longest)
                });
                let mut admin = stage.client();
                let end = format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE application_name = 'killed_{}'",
                    stage.database
                );
                let mut random = Rng::with_seed(9);
                for _ in 0..times {
                    let before = events.load(Ordering::SeqCst);
                    wait_until("it gets on", || events.load(Ordering::SeqCst) > before);
                    thread::sleep(Duration::from_micros(random.u64(..1_500)));
                    kills += usize::try_from(admin.execute(&end, &[]).unwrap()).unwrap();
                }
                events.store(i64::MIN, Ordering::SeqCst);
                let (last, waited) = worker.join().unwrap();
                longest = longest.max(waited);
                assert!(stage.isolation == isolation && last > 0);
                stage.check(last);
            });
        }
    }
    let fault = "`project`: backends ended at any moment";
    Row::asserted(fault, kills, 0, longest).print();
}

const WORKER_VARIABLE: &str = "CHECKPOINT_STORE_RIVAL";
const WORKER: &str = "project::kills::a_rival_works_until_it_is_killed";

/// In a process of its own: works until it is killed. `project`, or the control, which saves outside
/// of its transaction.
#[test]
fn a_rival_works_until_it_is_killed() {
    let Ok(told) = std::env::var(WORKER_VARIABLE) else { return };
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    let (how, params) = told.split_once(' ').unwrap();
    let store =
        PostgresCheckpointStore::builder().prepared_statements(true).connect(params).unwrap();
    loop {
        if how == "project" {
            store.project("orders", apply).unwrap();
            continue;
        }
        let mut client = store.connection().unwrap();
        let mut tx = client.transaction().unwrap();
        let offset = store.in_transaction(&mut tx).lock("orders").unwrap();
        apply(&mut tx, offset).unwrap();
        tx.commit().unwrap();
        drop(client);
        store.save("orders", offset + 1).unwrap();
    }
}

fn start_rival(how: &str, params: &str) -> Child {
    this_program(WORKER)
        .env(WORKER_VARIABLE, format!("{how} {params}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this program starts")
}

/// Has three rivals at work, and kills one after another; what they have applied in the end.
fn killed_again_and_again(how: &str, kills: usize) -> (Vec<i64>, i64) {
    let params = harness::fresh_database();
    let store = PostgresCheckpointStore::connect(&params).unwrap();
    store.migrate().unwrap();
    let mut client = harness::client(&params);
    client.batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let mut rivals: Vec<_> = (0..3).map(|_| start_rival(how, &params)).collect();
    let mut random = Rng::with_seed(11);
    for kill in 0..kills {
        let count = "SELECT count(*) FROM applied";
        let mut counted = || client.query_one(count, &[]).unwrap().get::<_, i64>(0);
        let before = counted();
        wait_until("the rivals get on", || counted() > before + 2);
        thread::sleep(Duration::from_micros(random.u64(..2_000)));
        let place = kill % rivals.len();
        let mut killed = std::mem::replace(&mut rivals[place], start_rival(how, &params));
        killed.kill().expect("a child can be killed");
        killed.wait().expect("a killed child ends");
    }
    for mut rival in rivals {
        rival.kill().expect("a child can be killed");
        rival.wait().expect("a killed child ends");
    }
    wait_until("nobody is at work any more", || {
        let others = "SELECT count(*) FROM pg_stat_activity
                      WHERE backend_type = 'client backend' AND application_name = ''
                        AND state <> 'idle' AND datname = current_database()
                        AND pid <> pg_backend_pid()";
        client.query_one(others, &[]).unwrap().get::<_, i64>(0) == 0
    });
    (applied(&mut client), store.get("orders").unwrap())
}

#[test]
fn rival_processes_that_are_killed_lose_nothing_and_apply_nothing_twice() {
    let kills = rounds(40, 100);
    let started = Instant::now();
    let (applied, offset) = killed_again_and_again("project", kills);
    assert_eq!(applied, (1..=offset).collect::<Vec<_>>());
    let per_kill = started.elapsed() / u32::try_from(kills).unwrap();
    let fault = "`project`: three rival processes, killed with kill -9 (wait: a kill on average)";
    Row::asserted(fault, kills, 0, per_kill).print();
}

/// The control: the same test finds out a worker that does it wrong.
#[test]
fn a_save_outside_of_the_transaction_is_found_out() {
    let (applied, offset) = killed_again_and_again("outside", 20);
    assert_ne!(applied, (1..=offset).collect::<Vec<_>>());
}
