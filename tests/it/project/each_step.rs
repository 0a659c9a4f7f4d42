//! The connection is lost at each step of `project`, and its caller hears nothing of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use super::stage::{Stage, apply, batch_after, process_id};
use crate::faults::Row;
use crate::harness::{
    Cut, Proxy, end_backend, pool, rounds, server, unique, wait_for_a_waiter, wait_until,
};

/// What loses the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    /// The proxy, at this request of the transaction.
    At(usize, Cut),
    /// The administrator, while the closure has not run its statement yet.
    BeforeApplying,
    /// The administrator, when the closure has run its statement.
    AfterApplying,
    /// The administrator, when the backend is at its COMMIT and cannot end it.
    BackendInCommit,
    /// The network, when the backend is at its COMMIT; it goes on with it later.
    ConnectionInCommit,
    /// The administrator, when the call has returned.
    AfterTheCall,
}

// What the client asks for in one call, if its statements are unnamed or prepared already.
const BEGIN: usize = 0;
const LOCK: usize = 1;
const APPLY: usize = 2;
const SAVE_AND_COMMIT: usize = 3;

/// One projection, one worker, one connection.
struct Worker {
    stage: Stage,
    proxy: Proxy,
    store: PostgresCheckpointStore,
    admin: Client,
    offset: i64,
    longest_wait: Duration,
}

impl Worker {
    fn new(serializable: bool, make: impl FnOnce(&Stage, &str) -> PostgresCheckpointStore) -> Self {
        let stage = Stage::new();
        let proxy = Proxy::to(server().port());
        let level = "-c default_transaction_isolation=serializable";
        let settings = if serializable { level } else { "" };
        let store = make(&stage, &stage.params_at(&proxy.params(), settings));
        let admin = stage.client();
        Self { stage, proxy, store, admin, offset: 0, longest_wait: Duration::ZERO }
    }

    /// Of each kind that a store of the builder's can be.
    fn of_each_kind() -> Vec<Self> {
        let kinds = [(false, false), (false, true), (true, false), (true, true)];
        kinds
            .map(|(prepared, serializable)| {
                Self::new(serializable, |stage, params| {
                    PostgresCheckpointStore::builder()
                        .schema(&stage.schema.name)
                        .prepared_statements(prepared)
                        .max_connections(1)
                        .connect(params)
                        .unwrap()
                })
            })
            .into()
    }

    /// Has a COMMIT wait for whoever holds the advisory lock.
    fn with_commits_that_can_be_held(mut self) -> Self {
        self.admin
            .batch_execute(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     PERFORM pg_advisory_xact_lock_shared(hashtext(TG_TABLE_SCHEMA));
                     RETURN NULL;
                 END $$;
                 CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON applied
                     DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold()",
            )
            .unwrap();
        self
    }

    /// One call, which is one batch whatever happens; how often the closure ran.
    fn project(&mut self, strike: Option<Strike>) -> usize {
        let Self { store, admin, .. } = self;
        let mut runs = 0;
        let started = Instant::now();
        let outcome = store.project("orders", |tx, offset| {
            runs += 1;
            let is_struck = |moment| runs == 1 && strike == Some(moment);
            if is_struck(Strike::BeforeApplying) {
                end_backend(admin, process_id(tx));
            }
            let applied = apply(tx, offset)?;
            if is_struck(Strike::AfterApplying) {
                end_backend(admin, process_id(tx));
            }
            Ok(applied)
        });
        self.longest_wait = self.longest_wait.max(started.elapsed());
        self.offset = batch_after(self.offset);
        assert_eq!(outcome.unwrap(), Some(self.offset), "{strike:?}: one call, one batch");
        runs
    }

    fn strike(&mut self, strike: Strike) -> usize {
        match strike {
            Strike::At(request, cut) => {
                self.proxy.cut_at_step(request, cut);
                let runs = self.project(Some(strike));
                assert!(!self.proxy.disarm(), "{strike:?}");
                runs
            }
            Strike::BeforeApplying | Strike::AfterApplying => self.project(Some(strike)),
            Strike::AfterTheCall => {
                let runs = self.project(Some(strike));
                let pid =
                    self.store.connection().unwrap().query_one("SELECT pg_backend_pid()", &[]);
                end_backend(&mut self.admin, pid.unwrap().get(0));
                runs
            }
            Strike::BackendInCommit | Strike::ConnectionInCommit => self.strike_in_commit(strike),
        }
    }

    fn strike_in_commit(&mut self, strike: Strike) -> usize {
        let name = self.stage.schema.name.clone();
        let mut holder = server().client();
        holder.execute("SELECT pg_advisory_lock(hashtext($1))", &[&name]).unwrap();
        if matches!(strike, Strike::ConnectionInCommit) {
            self.proxy.cut_at_step(SAVE_AND_COMMIT, Cut::AfterTheRequest);
        }
        let mut observer = server().client();
        thread::scope(|scope| {
            let call = scope.spawn(|| self.project(Some(strike)));
            let held = wait_for_a_held_commit(&mut observer, &name);
            if matches!(strike, Strike::BackendInCommit) {
                end_backend(&mut observer, held);
            } else {
                // The call looks what has become of its batch, and has to wait for the answer.
                wait_for_a_waiter(&mut observer, &name);
            }
            drop(holder);
            call.join().unwrap()
        })
    }

    fn assert_each_event_is_applied_once(&self) {
        let (offset, applied) = self.stage.truth();
        assert_eq!(offset, Some(self.offset));
        assert_eq!(applied, (1..=self.offset).collect::<Vec<_>>());
    }
}

fn wait_for_a_held_commit(observer: &mut Client, schema: &str) -> i32 {
    let mut pid = None;
    wait_until("a backend waits in its COMMIT", || {
        let query = "SELECT pid FROM pg_locks
                     WHERE locktype = 'advisory' AND NOT granted
                       AND objid::bigint = hashtext($1)::bigint & 4294967295";
        pid = observer.query_opt(query, &[&schema]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    pid.unwrap()
}

/// Strikes in each of these ways in turn, each with how often the closure runs then.
fn strike_each(fault: &'static str, mut workers: Vec<Worker>, strikes: &[(Strike, usize)]) {
    let mut longest_wait = Duration::ZERO;
    let kills = rounds(10, 50);
    let times = kills * workers.len();
    for worker in &mut workers {
        for &(strike, runs) in strikes.iter().cycle().take(kills) {
            // So that its statements are prepared, if it prepares them.
            worker.project(None);
            assert_eq!(worker.strike(strike), runs, "{strike:?}");
        }
        // Whatever the last strike has left behind is nothing to the next call.
        worker.project(None);
        worker.assert_each_event_is_applied_once();
        longest_wait = longest_wait.max(worker.longest_wait);
    }
    Row::asserted(fault, times, 0, longest_wait).print();
}

#[test]
fn a_connection_that_is_lost_before_begin_is_no_error() {
    strike_each(
        "`project`: lost when connected",
        Worker::of_each_kind(),
        &[
            (Strike::At(BEGIN, Cut::BeforeTheRequest), 1),
            (Strike::At(BEGIN, Cut::BackendEnded), 1),
            (Strike::At(BEGIN, Cut::AfterTheRequest), 1),
            (Strike::At(BEGIN, Cut::BeforeTheAnswer), 1),
        ],
    );
}

#[test]
fn a_connection_that_is_lost_when_the_transaction_has_begun_is_no_error() {
    strike_each(
        "`project`: lost when begun",
        Worker::of_each_kind(),
        &[
            (Strike::At(BEGIN, Cut::AfterTheAnswer), 1),
            (Strike::At(LOCK, Cut::BeforeTheRequest), 1),
            (Strike::At(LOCK, Cut::BackendEnded), 1),
            (Strike::At(LOCK, Cut::AfterTheRequest), 1),
        ],
    );
}

#[test]
fn a_connection_that_is_lost_when_the_projection_is_locked_is_no_error() {
    strike_each(
        "`project`: lost when locked",
        Worker::of_each_kind(),
        &[
            (Strike::At(LOCK, Cut::BeforeTheAnswer), 1),
            (Strike::At(APPLY, Cut::BeforeTheRequest), 2),
            (Strike::At(APPLY, Cut::BackendEnded), 2),
        ],
    );
}

#[test]
fn a_connection_that_is_lost_in_the_closure_is_no_error() {
    strike_each(
        "`project`: lost in the closure",
        Worker::of_each_kind(),
        &[(Strike::BeforeApplying, 2), (Strike::At(APPLY, Cut::AfterTheRequest), 2)],
    );
}

#[test]
fn a_connection_that_is_lost_when_the_batch_is_applied_is_no_error() {
    strike_each(
        "`project`: lost when applied",
        Worker::of_each_kind(),
        &[
            (Strike::AfterApplying, 2),
            (Strike::At(APPLY, Cut::BeforeTheAnswer), 2),
            (Strike::At(APPLY, Cut::AfterTheAnswer), 2),
            (Strike::At(SAVE_AND_COMMIT, Cut::BeforeTheRequest), 2),
            (Strike::At(SAVE_AND_COMMIT, Cut::BackendEnded), 2),
        ],
    );
}

#[test]
fn a_connection_that_is_lost_inside_the_commit_is_no_error() {
    let workers = Worker::of_each_kind();
    let workers = workers.into_iter().map(Worker::with_commits_that_can_be_held).collect();
    strike_each(
        "`project`: lost inside COMMIT",
        workers,
        &[(Strike::BackendInCommit, 2), (Strike::ConnectionInCommit, 1)],
    );
}

#[test]
fn a_commit_that_does_not_reach_the_server_is_no_error() {
    strike_each(
        "`project`: COMMIT lost on its way",
        Worker::of_each_kind(),
        &[(Strike::At(SAVE_AND_COMMIT, Cut::BeforeTheRequest), 2)],
    );
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_out_and_not_applied_again() {
    strike_each(
        "`project`: the answer to COMMIT lost",
        Worker::of_each_kind(),
        &[
            (Strike::At(SAVE_AND_COMMIT, Cut::BeforeTheAnswer), 1),
            (Strike::At(SAVE_AND_COMMIT, Cut::AfterTheRequest), 1),
        ],
    );
}

#[test]
fn a_connection_that_is_lost_after_the_commit_is_nothing_to_the_next_call() {
    strike_each(
        "`project`: lost when committed",
        Worker::of_each_kind(),
        &[(Strike::At(SAVE_AND_COMMIT, Cut::AfterTheAnswer), 1), (Strike::AfterTheCall, 1)],
    );
}

/// A fresh connection prepares the lock, so there is one request more.
#[test]
fn a_connection_that_is_lost_while_it_prepares_is_no_error() {
    const REQUESTS: usize = 5;
    const TIMES_EACH: usize = 2;
    let cuts =
        [Cut::BeforeTheRequest, Cut::AfterTheRequest, Cut::BeforeTheAnswer, Cut::BackendEnded];
    let mut longest_wait = Duration::ZERO;
    for mut worker in Worker::of_each_kind().into_iter().skip(2) {
        for request in 0..REQUESTS {
            for cut in cuts.into_iter().cycle().take(cuts.len() * TIMES_EACH) {
                worker.strike(Strike::AfterTheCall);
                worker.strike(Strike::At(request, cut));
            }
        }
        worker.assert_each_event_is_applied_once();
        longest_wait = longest_wait.max(worker.longest_wait);
    }
    let times = 2 * REQUESTS * cuts.len() * TIMES_EACH;
    let fault = "`project`: lost while a fresh connection prepares";
    Row::asserted(fault, times, 0, longest_wait).print();
}

#[test]
fn a_pool_of_the_callers_own_survives_the_same() {
    // Such a store has the default table, so a database of its own.
    let database = unique("project");
    server().client().batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    let proxy = Proxy::to(server().port());
    let params = format!("{} dbname={database}", proxy.params());
    let store = PostgresCheckpointStore::new(pool(&params, 1, Duration::from_secs(30)));
    store.migrate().unwrap();
    let direct = format!("{} dbname={database}", server().params());
    let mut admin = crate::harness::client(&direct);
    admin.batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let cuts = [
        Cut::BeforeTheRequest,
        Cut::AfterTheRequest,
        Cut::BeforeTheAnswer,
        Cut::AfterTheAnswer,
        Cut::BackendEnded,
    ];
    let mut longest_wait = Duration::ZERO;
    let mut offset = 0;
    for _ in 0..2 {
        for request in [BEGIN, LOCK, APPLY, SAVE_AND_COMMIT] {
            for cut in cuts {
                proxy.cut_at_step(request, cut);
                let started = Instant::now();
                offset = batch_after(offset);
                let outcome = store.project("orders", apply);
                longest_wait = longest_wait.max(started.elapsed());
                assert_eq!(outcome.unwrap(), Some(offset), "{request} {cut:?}");
                assert!(!proxy.disarm());
            }
        }
    }
    let row = admin.query_one("SELECT count(*), max(event) FROM applied", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1), store.get("orders").unwrap()), (offset, offset, offset));
    let fault = "`project` on a pool of the caller's own: lost at each step";
    Row::asserted(fault, 40, 0, longest_wait).print();
}

/// A rival gets the projection between the two tries, and does the very same batch.
#[test]
fn a_batch_that_a_rival_has_done_after_the_commit_was_lost_is_not_done_again() {
    let mut worker = Worker::of_each_kind().swap_remove(0);
    worker.project(None);
    worker.proxy.cut_at_step(SAVE_AND_COMMIT, Cut::BeforeTheRequest);
    let runs = AtomicUsize::new(0);
    let next = batch_after(worker.offset);
    let rival = worker.stage.store();
    thread::scope(|scope| {
        let (mut waits, stage) = (server().client(), &worker.stage);
        let mut holds = false;
        let outcome = worker.store.project("orders", |tx, offset| {
            // The rival waits for the projection from here on, and so is the next to have it.
            if !std::mem::replace(&mut holds, true) {
                scope.spawn(|| rival.project("orders", apply).unwrap());
                wait_for_a_waiter(&mut waits, &stage.schema.name);
            }
            runs.fetch_add(1, Ordering::SeqCst);
            apply(tx, offset)
        });
        assert_eq!(outcome.unwrap(), Some(next));
    });
    assert_eq!(runs.into_inner(), 1);
    worker.offset = next;
    worker.assert_each_event_is_applied_once();
}
