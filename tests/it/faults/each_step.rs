//! A fault after each step of lock, apply, save and commit, and what is true afterwards.

use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, NoTls};
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, InTransaction, PostgresCheckpointStore,
};
use fastrand::Rng;

use super::{Row, kill_backend_and_wait, process_id};
use crate::harness::{Cut, Options, Proxy, Server, end_backend, rounds, unique, wait_until};

type Outcome = Result<i64, Box<dyn std::error::Error + Send + Sync>>;

/// The offset, if there is a checkpoint, and the events that are applied.
type Truth = (Option<i64>, Vec<i64>);

/// One server for all of these tests, one after the other.
struct Stage {
    server: MutexGuard<'static, Option<Server>>,
    schema: String,
    store: PostgresCheckpointStore,
    /// The longest that a worker took to go on, or a call to end.
    longest_wait: Mutex<Duration>,
}

impl Stage {
    fn new() -> Self {
        static SERVER: Mutex<Option<Server>> = Mutex::new(None);
        let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
        let params = server.get_or_insert_with(|| Server::start(Options::fast())).params();
        let schema = unique("each_step");
        let store =
            PostgresCheckpointStore::builder().schema(&schema).connect(&params).expect("a store");
        store.migrate().expect("a table");
        let stage = Self { server, schema, store, longest_wait: Mutex::default() };
        // No unique index: it would hide an event that is applied twice behind an error.
        stage.client().batch_execute("CREATE TABLE applied (event bigint)").expect("a table");
        stage
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("started")
    }

    fn client(&self) -> Client {
        self.client_at(&self.server().params())
    }

    fn client_at(&self, params: &str) -> Client {
        Client::connect(&format!("{params} options='-c search_path={}'", self.schema), NoTls)
            .expect("a connection")
    }

    fn truth(&self) -> Truth {
        let query = "SELECT (SELECT \"offset\" FROM projection_checkpoints),
                            (SELECT array_agg(event ORDER BY event) FROM applied)";
        let row = self.client().query_one(query, &[]).expect("a row");
        (row.get(0), row.get::<_, Option<_>>(1).unwrap_or_default())
    }

    /// Applies the next event, as a worker does it.
    fn work(&self, client: &mut Client, mut after: impl FnMut(Step)) -> Outcome {
        let mut tx = client.transaction()?;
        let event = self.store.in_transaction(&mut tx).lock("orders")? + 1;
        after(Step::Lock);
        tx.execute("INSERT INTO applied VALUES ($1)", &[&event])?;
        after(Step::Apply);
        self.store.in_transaction(&mut tx).save("orders", event)?;
        after(Step::Save);
        tx.commit()?;
        after(Step::Commit);
        Ok(event)
    }

    fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let outcome = work();
        let mut longest = self.longest_wait.lock().expect("no test panics here");
        *longest = longest.max(started.elapsed());
        outcome
    }

    fn row(&self, fault: &'static str, times: usize, errors: usize) {
        let longest_wait = *self.longest_wait.lock().expect("no test panics here");
        Row::asserted(fault, times, errors, longest_wait).print();
    }

    /// Works with a new connection, as a worker does it after an error.
    fn recover(&self) -> i64 {
        self.timed(|| {
            let mut client = self.client();
            self.work(&mut client, |_| {}).expect("nothing is in the way")
        })
    }

    fn strike(&self, fault: Fault, pid: i32) {
        match fault {
            Fault::ServerCrash => {
                self.server().crash();
                self.server().restart();
            }
            Fault::BackendKilled => kill_backend_and_wait(self.server(), pid),
            Fault::BackendTerminated => end_backend(&mut self.client(), pid),
        }
    }

    /// Strikes after one step, for a new projection and for one that is at 1 already, and then
    /// compares with what is to be there.
    fn strike_after(&self, step: Step, survives: bool) {
        for fault in [Fault::ServerCrash, Fault::BackendKilled, Fault::BackendTerminated] {
            for before in [0, 1] {
                self.store.delete("orders").expect("a server");
                self.client().batch_execute("TRUNCATE applied").expect("a server");
                if before == 1 {
                    assert_eq!(self.recover(), 1);
                }
                let mut client = self.client();
                let pid = process_id(&mut client);
                let outcome = self.work(&mut client, |reached| {
                    if reached == step {
                        self.strike(fault, pid);
                    }
                });
                assert_eq!(outcome.is_ok(), survives, "{fault:?} after {step:?}: {outcome:?}");
                if let Err(Some(error)) = outcome.map_err(|error| error.downcast::<Error>().ok()) {
                    assert!(matches!(*error, Error::Unavailable { .. }), "{error:?}");
                    assert!(error.is_transient());
                }
                let now = before + i64::from(survives);
                let events: Vec<_> = (1..=now).collect();
                let offset = (now > 0).then_some(now);
                assert_eq!(self.truth(), (offset, events), "{fault:?} after {step:?}");
                // Nobody holds the projection any more, and the work goes on from there.
                assert_eq!(self.recover(), now + 1);
            }
        }
    }

    /// Lets the work's connection be cut off at its COMMIT; what it came to, and the truth.
    fn cut_at_commit(&self, place: Cut) -> (Outcome, Truth) {
        assert_eq!(self.recover(), 1);
        let proxy = Proxy::to(self.server().port());
        let mut client = self.client_at(&proxy.params());
        proxy.cut("COMMIT", place);
        let outcome = self.timed(|| self.work(&mut client, |_| {}));
        self.wait_until_the_projection_is_free();
        (outcome, self.truth())
    }

    fn wait_until_the_projection_is_free(&self) {
        let mut client = self.client();
        wait_until("the projection is free", || {
            let mut tx = client.transaction().expect("a server");
            self.store.in_transaction(&mut tx).try_lock("orders").expect("a server").is_some()
        });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Lock,
    Apply,
    Save,
    Commit,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    ServerCrash,
    BackendKilled,
    BackendTerminated,
}

#[test]
fn after_lock_nothing_has_happened_and_the_projection_is_free() {
    let stage = Stage::new();
    stage.strike_after(Step::Lock, false);
    stage.row("connection lost after `lock`: server, backend, administrator", 6, 6);
}

#[test]
fn after_apply_nothing_has_happened_and_the_projection_is_free() {
    let stage = Stage::new();
    stage.strike_after(Step::Apply, false);
    stage.row("connection lost after applying: server, backend, administrator", 6, 6);
}

#[test]
fn after_save_nothing_has_happened_and_the_projection_is_free() {
    let stage = Stage::new();
    stage.strike_after(Step::Save, false);
    stage.row("connection lost after `save`: server, backend, administrator", 6, 6);
}

#[test]
fn after_commit_both_are_there() {
    let stage = Stage::new();
    stage.strike_after(Step::Commit, true);
    stage.row("connection lost after the commit: server, backend, administrator", 6, 0);
}

#[test]
fn a_commit_that_did_not_reach_the_server_has_not_happened() {
    let stage = Stage::new();
    let (outcome, truth) = stage.cut_at_commit(Cut::BeforeTheRequest);
    assert!(outcome.is_err());
    assert_eq!(truth, (Some(1), vec![1]));
    // The worker reads the offset again, which is what `lock` does, and does not skip the event.
    assert_eq!(stage.recover(), 2);
    assert_eq!(stage.truth(), (Some(2), vec![1, 2]));
    stage.row("COMMIT lost on its way to the server", 1, 1);
}

#[test]
fn a_commit_whose_answer_is_lost_has_happened_and_the_offset_tells() {
    let stage = Stage::new();
    let (outcome, truth) = stage.cut_at_commit(Cut::BeforeTheAnswer);
    assert!(outcome.is_err(), "to the worker it looks the same");
    assert_eq!(truth, (Some(2), vec![1, 2]));
    // The worker reads the offset again, and does not apply the event a second time.
    assert_eq!(stage.recover(), 3);
    assert_eq!(stage.truth(), (Some(3), vec![1, 2, 3]));
    stage.row("the answer to COMMIT lost on its way back", 1, 1);
}

/// About half of the time of a durable transaction is its COMMIT.
#[test]
fn a_server_that_crashes_during_the_commit_has_both_or_neither() {
    let times = rounds(10, 20);
    let stage = Stage::new();
    let mut random = Rng::with_seed(3);
    for _ in 0..times {
        let mut client = stage.client();
        let (committed, is_at_work) = mpsc::channel();
        let acknowledged = thread::scope(|scope| {
            let work = scope.spawn(|| {
                let mut acknowledged = stage.store.get("orders").unwrap();
                while let Ok(event) = stage.work(&mut client, |_| {}) {
                    acknowledged = event;
                    let _ = committed.send(());
                }
                acknowledged
            });
            is_at_work.recv().unwrap();
            thread::sleep(Duration::from_micros(random.u64(..2_000)));
            stage.server().crash();
            work.join().unwrap()
        });
        stage.server().restart();
        let (offset, events) = stage.truth();
        let offset = offset.unwrap_or_default();
        assert_eq!(events, (1..=offset).collect::<Vec<_>>());
        assert!(offset == acknowledged || offset == acknowledged + 1, "{acknowledged} {offset}");
    }
    let fault = "server crashes under a worker that commits without a pause";
    stage.row(fault, times, times);
}

#[test]
fn an_advance_that_did_not_reach_the_server_has_not_happened() {
    let stage = Stage::new();
    let (error, found) = advance_cut_off(&stage, Cut::BeforeTheRequest);
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert_eq!(found, 1);
    stage.store.advance("orders", found, 2).unwrap();
    stage.row("`advance` lost on its way to the server", 1, 1);
}

#[test]
fn an_advance_whose_answer_is_lost_has_happened_and_the_offset_tells() {
    let stage = Stage::new();
    let (error, found) = advance_cut_off(&stage, Cut::BeforeTheAnswer);
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert_eq!(found, 2);
    let blindly = stage.store.advance("orders", 1, 2).unwrap_err();
    assert!(blindly.is_conflict(), "{blindly:?}");
    stage.row("the answer to `advance` lost on its way back", 1, 1);
}

/// What was read at once may be out of date: the server does not know yet that nobody listens.
#[test]
fn an_advance_that_is_still_under_way_happens_later_and_the_next_one_finds_out() {
    let stage = Stage::new();
    let proxy = Proxy::to(stage.server().port());
    let store = store_through(&proxy, &stage);
    store.save("orders", 1).unwrap();
    let mut holder = stage.client();
    let mut held = holder.transaction().unwrap();
    stage.store.in_transaction(&mut held).lock("orders").unwrap();

    proxy.cut(ADVANCE, Cut::AfterTheRequest);
    let error = stage.timed(|| store.advance("orders", 1, 2)).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert_eq!(store.get("orders").unwrap(), 1);
    let mut observer = stage.client();
    wait_until("the server is at it", || {
        let query = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        observer.query_one(query, &[]).unwrap().get::<_, i64>(0) == 1
    });
    held.rollback().unwrap();
    wait_until("it has happened", || store.get("orders").unwrap() == 2);
    let error = store.advance("orders", 1, 2).unwrap_err();
    assert!(matches!(error, Error::Conflict { expected: 1, found: 2, .. }), "{error:?}");
    stage.row("connection lost while the server is still at `advance`", 1, 1);
}

/// The part of `sql/advance.sql` that no other statement has.
const ADVANCE: &str = "SET \"offset\" = $3";

fn store_through(proxy: &Proxy, stage: &Stage) -> PostgresCheckpointStore {
    // Were an operation to wait for what the test itself holds, it would do so for ever.
    let params = format!("{} options='-c statement_timeout=20s'", proxy.params());
    PostgresCheckpointStore::builder().schema(&stage.schema).connect(&params).unwrap()
}

fn advance_cut_off(stage: &Stage, place: Cut) -> (Error, i64) {
    let proxy = Proxy::to(stage.server().port());
    let store = store_through(&proxy, stage);
    store.save("orders", 1).unwrap();
    proxy.cut(ADVANCE, place);
    let error = stage.timed(|| store.advance("orders", 1, 2)).unwrap_err();
    (error, store.get("orders").unwrap())
}

#[test]
fn a_checkpointer_finds_out_whether_its_save_has_happened() {
    let stage = Stage::new();
    let proxy = Proxy::to(stage.server().port());
    let store = store_through(&proxy, &stage);
    for place in [Cut::BeforeTheRequest, Cut::BeforeTheAnswer] {
        let mut checkpointer = Checkpointer::resume(&store, "orders", Cadence::every(2)).unwrap();
        assert!(!checkpointer.processed(1).unwrap());
        proxy.cut(ADVANCE, place);
        let error = stage.timed(|| checkpointer.processed(2)).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!(checkpointer.processed(3).unwrap(), "{place:?}");
        assert_eq!(stage.store.get("orders").unwrap(), 3);
        stage.store.delete("orders").unwrap();
    }
    stage.row("a `Checkpointer`'s save cut off, before and after it happened", 2, 2);
}

#[test]
fn what_may_be_repeated_is_repeated_and_the_caller_sees_no_error() {
    let stage = Stage::new();
    let proxy = Proxy::to(stage.server().port());
    let store = store_through(&proxy, &stage);
    // A write that came before the call by less than the time of an answer may count as written since.
    let let_it_age = || {
        let written = Instant::now();
        wait_until("the last write is old enough", || {
            written.elapsed() > Duration::from_millis(200)
        });
    };
    // Of a checkpoint that is not there nothing tells whether it was deleted since.
    store.save("orders", 0).unwrap();
    let mut offset = 1;
    for place in [Cut::BeforeTheRequest, Cut::BeforeTheAnswer] {
        store.save("warm", 1).unwrap();
        let_it_age();
        proxy.cut("VALUES ($1, $2", place);
        stage.timed(|| store.save("orders", offset)).unwrap();
        let_it_age();
        proxy.cut("unnest", place);
        stage.timed(|| store.save_many(&[("orders", offset + 1)])).unwrap();
        proxy.cut("SELECT", place);
        assert_eq!(stage.timed(|| store.get("orders")).unwrap(), offset + 1);
        proxy.cut("SELECT", place);
        assert_eq!(store.all().unwrap().len(), 2);
        proxy.cut("DELETE", place);
        // The first try deleted it; the second finds nothing, and says so.
        assert_eq!(store.delete("warm").unwrap(), place == Cut::BeforeTheRequest);
        assert_eq!(stage.store.find("warm").unwrap(), None);
        offset += 2;
    }
    stage.row("`save`, `save_many`, `get`, `all`, `delete` cut off, before and after", 10, 0);
}

#[test]
fn in_a_transaction_nothing_is_repeated() {
    type Call = fn(&mut InTransaction<'_, '_>) -> Result<(), Error>;
    let calls: [(&'static str, Call); 7] = [
        ("SELECT", |here| here.find("orders").map(drop)),
        ("VALUES ($1, $2", |here| here.save("orders", 9)),
        ("unnest", |here| here.save_many(&[("orders", 9)])),
        (ADVANCE, |here| here.advance("orders", 1, 9)),
        ("DELETE", |here| here.delete("orders").map(drop)),
        ("FOR UPDATE", |here| here.lock("orders").map(drop)),
        ("SKIP LOCKED", |here| here.try_lock("orders").map(drop)),
    ];
    let stage = Stage::new();
    let proxy = Proxy::to(stage.server().port());
    stage.store.save("orders", 1).unwrap();
    for (text, call) in calls {
        for place in [Cut::BeforeTheRequest, Cut::BeforeTheAnswer] {
            let mut client = stage.client_at(&proxy.params());
            let mut tx = client.transaction().unwrap();
            tx.batch_execute("SELECT").unwrap();
            proxy.cut(text, place);
            let here = &mut stage.store.in_transaction(&mut tx);
            let error = stage.timed(|| call(here)).unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{text}: {error:?}");
            assert!(error.is_transient());
            tx.commit().unwrap_err();
            stage.wait_until_the_projection_is_free();
            assert_eq!(stage.truth(), (Some(1), vec![]), "{text} {place:?}");
        }
    }
    stage.row("each operation in a transaction cut off, before and after", 14, 14);
}
