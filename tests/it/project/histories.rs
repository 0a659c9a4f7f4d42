//! What six threads were told while their connections ended, recorded; and an order of it that
//! explains each answer. A call whose outcome is unknown may have happened at any time since, or never.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use checkpoint_store::postgres::Transaction;
use checkpoint_store::postgres::types::Type;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use fastrand::Rng;
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use crate::faults::Row;
use crate::harness::{self, Cut, Options, Proxy, Server, wait_until};

#[derive(Debug, Clone, PartialEq)]
enum Call {
    Get,
    Advance {
        from: i64,
        to: i64,
    },
    /// Of `save_many` too, on each of its projections.
    Save(i64),
    Delete,
    /// One run of the closure of a call of `project`.
    Batch {
        call: u64,
    },
    /// A call of `project` as a whole.
    Project,
}

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Got(i64),
    Advanced,
    Conflict(i64),
    Saved,
    Deleted(bool),
    /// By the first attempt of a call that was repeated, or by nobody.
    Gone,
    /// Its own batch.
    Committed(i64),
    /// A rival has got there, or beyond, after a COMMIT of its own was lost.
    Overtaken(i64),
}

/// One projection's checkpoint, as a single thread would see it.
#[derive(Debug, Clone, Default)]
struct Model(Option<i64>);

impl Model {
    fn offset(&self) -> i64 {
        self.0.unwrap_or(0)
    }
}

impl SequentialSpec for Model {
    type Op = Call;
    type Ret = Answer;

    fn invoke(&mut self, call: &Call) -> Answer {
        match *call {
            Call::Get => Answer::Got(self.offset()),
            Call::Advance { from, .. } if from != self.offset() => Answer::Conflict(self.offset()),
            Call::Advance { to, .. } => {
                self.0 = Some(to);
                Answer::Advanced
            }
            Call::Save(to) => {
                self.0 = Some(to);
                Answer::Saved
            }
            Call::Delete => Answer::Deleted(self.0.take().is_some()),
            Call::Batch { .. } => {
                self.0 = Some(self.offset() + 1);
                Answer::Committed(self.offset())
            }
            Call::Project => Answer::Overtaken(self.offset()),
        }
    }

    fn is_valid_step(&mut self, call: &Call, answer: &Answer) -> bool {
        match *answer {
            Answer::Overtaken(to) => self.offset() >= to,
            Answer::Gone => {
                self.0 = None;
                true
            }
            _ => self.invoke(call) == *answer,
        }
    }
}

#[derive(Debug, Clone)]
enum Event {
    Invoked(u64, Call),
    Returned(u64, Answer),
}

/// A thread whose call has an unknown outcome goes on as another one: the call is never over.
type History = Vec<Event>;

fn is_explained(history: &History) -> bool {
    let mut tester = LinearizabilityTester::new(Model::default());
    for event in history.iter().cloned() {
        match event {
            Event::Invoked(thread, call) => tester.on_invoke(thread, call).map(drop),
            Event::Returned(thread, answer) => tester.on_return(thread, answer).map(drop),
        }
        .expect("each thread has one call at a time");
    }
    tester.is_consistent()
}

const THREADS: u64 = 6;
const CALLS: usize = 4;
const PROJECTIONS: [&str; 2] = ["one", "other"];

/// What the threads do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Calls {
    Forwards,
    /// And `save`, `save_many` and `delete`.
    AndMoves,
}

thread_local! {
    /// Whether the call of this thread was attempted again.
    static WAS_REPEATED: Cell<bool> = const { Cell::new(false) };
}

type Histories = BTreeMap<&'static str, Mutex<History>>;

/// One of the threads. Each call of unknown outcome, and each run of a closure, has an identity of its own.
struct Caller<'a> {
    store: &'a PostgresCheckpointStore,
    round: usize,
    histories: &'a Histories,
    next_identity: &'a AtomicU64,
    identity: u64,
}

impl Caller<'_> {
    fn record(&self, projection: &str, event: Event) {
        self.histories[projection].lock().unwrap().push(event);
    }

    fn new_identity(&self) -> u64 {
        self.next_identity.fetch_add(1, Ordering::SeqCst)
    }

    fn name(&self, projection: &str) -> String {
        format!("{projection} {}", self.round)
    }

    /// A call of one attempt's effect, on one projection or on several.
    fn call(
        &mut self,
        projections: &[&str],
        call: &Call,
        work: impl FnOnce(&PostgresCheckpointStore) -> Result<Answer, Error>,
    ) {
        for projection in projections {
            self.record(projection, Event::Invoked(self.identity, call.clone()));
        }
        let answer = match work(self.store) {
            Ok(answer) => answer,
            Err(Error::Conflict { found, .. }) => Answer::Conflict(found),
            Err(Error::Unavailable { .. }) if *call != Call::Get => {
                self.identity = self.new_identity();
                return;
            }
            Err(other) => panic!("{other:?}"),
        };
        for projection in projections {
            self.record(projection, Event::Returned(self.identity, answer.clone()));
        }
    }

    fn project(&self, projection: &str) {
        let (call, name) = (self.new_identity(), self.name(projection));
        let mut batch = None;
        self.record(projection, Event::Invoked(call, Call::Project));
        let outcome = self.store.project(&name, |tx, offset| {
            let identity = *batch.insert(self.new_identity());
            self.record(projection, Event::Invoked(identity, Call::Batch { call }));
            sign(tx, &name, offset + 1, identity)?;
            Ok(Some(offset + 1))
        });
        match outcome {
            Ok(offset) => {
                let offset = offset.expect("there is a next one");
                let batch = batch.expect("the closure has run");
                self.record(projection, Event::Returned(batch, Answer::Committed(offset)));
                self.record(projection, Event::Returned(call, Answer::Overtaken(offset)));
            }
            // It gives up when it is lost three times in its closure.
            Err(Error::Unavailable { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }

    /// What is saved is far from everything else, so that no other order explains it by chance.
    fn save(&mut self, projections: &[&str]) {
        let offset = 1_000 * i64::try_from(self.new_identity()).unwrap();
        let names: Vec<_> = projections.iter().map(|projection| self.name(projection)).collect();
        let checkpoints: Vec<_> = names.iter().map(|name| (name.as_str(), offset)).collect();
        self.call(projections, &Call::Save(offset), |store| match checkpoints[..] {
            [(name, offset)] => store.save(name, offset).map(|()| Answer::Saved),
            _ => store.save_many(&checkpoints).map(|()| Answer::Saved),
        });
    }

    fn delete(&mut self, projection: &str) {
        let name = self.name(projection);
        self.call(&[projection], &Call::Delete, |store| {
            WAS_REPEATED.set(false);
            let was_there = store.delete(&name)?;
            let is_sure = was_there || !WAS_REPEATED.get();
            Ok(if is_sure { Answer::Deleted(was_there) } else { Answer::Gone })
        });
    }

    fn advance(&mut self, projection: &str, from: i64, to: i64) {
        let name = self.name(projection);
        self.call(&[projection], &Call::Advance { from, to }, |store| {
            store.advance(&name, from, to).map(|()| Answer::Advanced)
        });
    }

    fn get(&mut self, projection: &str) {
        let name = self.name(projection);
        self.call(&[projection], &Call::Get, |store| store.get(&name).map(Answer::Got));
    }
}

/// Lets six threads call, and records a history for each projection of this round.
fn record(
    store: &PostgresCheckpointStore,
    calls: Calls,
    round: usize,
) -> BTreeMap<&'static str, History> {
    let histories: Histories =
        PROJECTIONS.map(|projection| (projection, Mutex::new(History::new()))).into();
    let next_identity = AtomicU64::new(THREADS);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (histories, next_identity) = (&histories, &next_identity);
            scope.spawn(move || {
                let mut random = Rng::with_seed((round as u64) << 8 | thread);
                let mut caller =
                    Caller { store, round, histories, next_identity, identity: thread };
                for _ in 0..CALLS {
                    let projection = PROJECTIONS[random.usize(..PROJECTIONS.len())];
                    match (calls, random.u8(..3), random.u8(..4)) {
                        (Calls::AndMoves, 0, 0 | 1) => caller.save(&[projection]),
                        (Calls::AndMoves, 0, 2) => caller.save(&PROJECTIONS),
                        (Calls::AndMoves, 0, _) => caller.delete(projection),
                        (Calls::AndMoves, 1, 1..) => caller.project(projection),
                        (_, 0, _) => caller.get(projection),
                        (_, 1, _) => {
                            let from = random.i64(0..5);
                            caller.advance(projection, from, from + random.i64(0..3));
                        }
                        _ => caller.project(projection),
                    }
                }
            });
        }
    });
    histories.into_iter().map(|(name, history)| (name, history.into_inner().unwrap())).collect()
}

/// Notes in the closure's transaction whose batch it is.
fn sign(tx: &mut Transaction<'_>, projection: &str, to: i64, identity: u64) -> Result<(), Error> {
    let identity = i64::try_from(identity).unwrap();
    tx.execute("INSERT INTO batches VALUES ($1, $2, $3)", &[&projection, &to, &identity])?;
    Ok(())
}

/// Whose batches there are, and to which offset.
fn batches(server: &Server, projection: &str) -> Vec<(u64, i64)> {
    let mut client = server.client();
    let query = "SELECT identity, \"to\" FROM batches WHERE projection = $1";
    let rows = client.query_typed(query, &[(&projection, Type::TEXT)]).unwrap();
    rows.iter().map(|row| (u64::try_from(row.get::<_, i64>(0)).unwrap(), row.get(1))).collect()
}

/// Leaves the batches that were committed, whatever their callers were told of it. A call without one was
/// overtaken by another that has brought the projection there.
fn tell_whose_batches(history: &mut History, batches: &[(u64, i64)], calls: Calls) {
    let committed: BTreeMap<u64, i64> = batches.iter().copied().collect();
    assert_eq!(committed.len(), batches.len(), "one run of a closure, one batch: {batches:?}");
    let mut last_of_call = BTreeMap::new();
    for event in history.iter() {
        let Event::Invoked(identity, Call::Batch { call }) = event else { continue };
        let Some(&to) = committed.get(identity) else { continue };
        // After a move back by hand the events in between are to be applied again, by this call too.
        let is_first = last_of_call.insert(*call, to).is_none();
        assert!(is_first || calls == Calls::AndMoves, "one call, one batch: {history:#?}");
    }
    let returned: BTreeSet<u64> = history
        .iter()
        .filter_map(|event| match event {
            Event::Returned(identity, _) => Some(*identity),
            Event::Invoked(..) => None,
        })
        .collect();
    let runs: BTreeSet<u64> = history
        .iter()
        .filter_map(|event| match event {
            Event::Invoked(identity, Call::Batch { .. }) => Some(*identity),
            _ => None,
        })
        .collect();
    let projects: BTreeSet<u64> = history
        .iter()
        .filter_map(|event| match event {
            Event::Invoked(identity, Call::Project) => Some(*identity),
            _ => None,
        })
        .collect();
    history.retain(|event| {
        let (Event::Invoked(identity, _) | Event::Returned(identity, _)) = event;
        if runs.contains(identity) {
            committed.contains_key(identity)
        } else if projects.contains(identity) {
            returned.contains(identity) && !last_of_call.contains_key(identity)
        } else {
            true
        }
    });
    // They were committed at the latest when the history was over.
    for (identity, to) in committed {
        if !returned.contains(&identity) {
            history.push(Event::Returned(identity, Answer::Committed(to)));
        }
    }
}

#[test]
fn every_history_has_an_order_that_explains_each_answer() {
    let rounds = harness::rounds(40, 100);
    let crash_every = rounds / 4;
    let server = Server::start(Options::durable());
    let store = PostgresCheckpointStore::builder()
        .prepared_statements(true)
        .connect(&format!("{} application_name=recorded", server.params()))
        .unwrap();
    store.migrate().unwrap();
    let table = "CREATE TABLE batches (projection text, \"to\" bigint, identity bigint)";
    server.client().batch_execute(table).unwrap();
    let (mut kills, mut crashes, mut unknown) = (0, 0, 0);
    for round in 1..=rounds {
        let histories = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                if round % crash_every == 0 {
                    server.crash();
                    server.restart();
                    return 0;
                }
                let mut killed = 0;
                let mut admin = server.client();
                let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                           WHERE application_name = 'recorded' ORDER BY random() LIMIT 2";
                let mut random = Rng::with_seed(round as u64);
                // Not without a pause, or nobody would ever get anything done.
                for _ in 0..4 {
                    thread::sleep(Duration::from_micros(random.u64(200..3_000)));
                    killed += admin.execute(end, &[]).unwrap();
                }
                killed
            });
            let histories = record(&store, Calls::Forwards, round);
            kills += killer.join().unwrap();
            histories
        });
        crashes += usize::from(round % crash_every == 0);
        for (projection, mut history) in histories {
            let batches = batches(&server, &format!("{projection} {round}"));
            tell_whose_batches(&mut history, &batches, Calls::Forwards);
            let count = |wanted: fn(&&Event) -> bool| history.iter().filter(wanted).count();
            unknown += count(|event| matches!(event, Event::Invoked(..)))
                - count(|event| matches!(event, Event::Returned(..)));
            assert!(is_explained(&history), "{projection} {round}: {history:#?}");
        }
    }
    wait_until("the server takes connections", || store.get("any").is_ok());
    println!("{kills} backends ended, {crashes} crashes, {unknown} calls of unknown outcome");
    assert!(kills > 100 && unknown > 0, "nothing was tried");
    let fault = "histories of `get`, `advance`, `project`: backends ended, server crashed (errors: outcome unknown)";
    Row::asserted(fault, usize::try_from(kills).unwrap() + crashes, unknown, Duration::ZERO)
        .print();
}

#[test]
fn moves_by_hand_that_are_repeated_beside_workers_have_an_order_that_explains_each_answer() {
    const ROUNDS: usize = 150;
    /// Pieces of the statements, and whether a cut connection may have executed them.
    const CUTS: [(&str, Cut); 9] = [
        ("VALUES ($1, $2", Cut::BeforeTheAnswer),
        ("VALUES ($1, $2", Cut::BeforeTheRequest),
        ("FROM given", Cut::BeforeTheAnswer),
        ("FROM given", Cut::BeforeTheRequest),
        ("held.wanted", Cut::BeforeTheAnswer),
        ("DELETE FROM", Cut::BeforeTheAnswer),
        ("DELETE FROM", Cut::BeforeTheRequest),
        ("COMMIT", Cut::BeforeTheAnswer),
        ("COMMIT", Cut::BeforeTheRequest),
    ];
    let server = Server::start(Options::fast());
    let proxy = Proxy::to(server.port());
    let repeats = std::sync::Arc::new(AtomicU64::new(0));
    let counter = std::sync::Arc::clone(&repeats);
    let store = PostgresCheckpointStore::builder()
        .on_retry(move |_| {
            WAS_REPEATED.set(true);
            counter.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(2)); // in which rivals do what they do
        })
        .connect(&proxy.params())
        .unwrap();
    store.migrate().unwrap();
    let table = "CREATE TABLE batches (projection text, \"to\" bigint, identity bigint)";
    server.client().batch_execute(table).unwrap();
    let mut unknown = 0;
    for round in 1..=ROUNDS {
        let is_over = AtomicBool::new(false);
        let histories = thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Rng::with_seed(round as u64);
                while !is_over.load(Ordering::SeqCst) {
                    let (text, place) = CUTS[random.usize(..CUTS.len())];
                    proxy.cut(text, place);
                    thread::sleep(Duration::from_micros(random.u64(500..3_000)));
                }
                proxy.disarm();
            });
            let histories = record(&store, Calls::AndMoves, round);
            is_over.store(true, Ordering::SeqCst);
            histories
        });
        for (projection, mut history) in histories {
            let batches = batches(&server, &format!("{projection} {round}"));
            tell_whose_batches(&mut history, &batches, Calls::AndMoves);
            let count = |wanted: fn(&&Event) -> bool| history.iter().filter(wanted).count();
            unknown += count(|event| matches!(event, Event::Invoked(..)))
                - count(|event| matches!(event, Event::Returned(..)));
            assert!(is_explained(&history), "{projection} {round}: {history:#?}");
        }
    }
    let repeats = usize::try_from(repeats.load(Ordering::SeqCst)).unwrap();
    println!("{repeats} repeats, {unknown} calls of unknown outcome");
    assert!(repeats > ROUNDS && unknown > 0, "nothing was tried");
    let fault = "histories of `save`, `save_many`, `delete` beside `project`: connections cut (errors: outcome unknown)";
    Row::asserted(fault, repeats, unknown, Duration::ZERO).print();
}

fn history(calls: &[(u64, Call, Option<Answer>)]) -> History {
    calls
        .iter()
        .cloned()
        .flat_map(|(thread, call, answer)| {
            let returned = answer.map(|answer| Event::Returned(thread, answer));
            std::iter::once(Event::Invoked(thread, call)).chain(returned)
        })
        .collect()
}

#[test]
fn a_stale_read_and_a_second_winner_are_found() {
    use Answer::{Advanced, Committed, Conflict, Got, Overtaken};
    let batch = || Call::Batch { call: 0 };
    let advance = |from, to| Call::Advance { from, to };
    let mut calls = vec![
        (0, advance(0, 3), Some(Advanced)),
        (1, advance(3, 4), None), // it may have happened, or may yet
        (2, Call::Get, Some(Got(3))),
        (3, Call::Get, Some(Got(4))),
        (4, batch(), Some(Committed(5))),
    ];
    assert!(is_explained(&history(&calls)));
    for wrong in [
        (5, Call::Get, Some(Got(4))),
        (5, advance(3, 9), Some(Advanced)),
        (5, advance(0, 3), Some(Advanced)),
        (5, advance(5, 6), Some(Conflict(4))),
        (5, batch(), Some(Committed(7))),
        (5, batch(), Some(Committed(5))),
        (5, Call::Project, Some(Overtaken(6))),
    ] {
        calls.push(wrong.clone());
        assert!(!is_explained(&history(&calls)), "{wrong:?}");
        calls.pop();
    }
    calls.push((5, Call::Project, Some(Overtaken(5))));
    assert!(is_explained(&history(&calls)));
    // What was never acknowledged may not be there at all.
    calls.truncate(3);
    calls.push((4, batch(), Some(Committed(4))));
    assert!(is_explained(&history(&calls)));
}

#[test]
fn a_repeat_that_undoes_the_work_of_a_rival_is_found() {
    use Answer::{Committed, Deleted, Gone, Got, Saved};
    let batch = || Call::Batch { call: 0 };
    // A save is stored and its answer is lost, a worker goes on from there, and the save is repeated.
    let save = |then: &[(u64, Call, Option<Answer>)]| {
        let mut history = history(then);
        history.insert(0, Event::Invoked(0, Call::Save(41)));
        history
    };
    let worker = || (1, batch(), Some(Committed(42)));
    let found = |offset| (2, Call::Get, Some(Got(offset)));
    assert!(is_explained(&save(&[worker(), found(42)])));
    let mut undone = save(&[worker()]);
    undone.push(Event::Returned(0, Saved));
    assert!(is_explained(&undone));
    undone.extend(history(&[found(41)]));
    assert!(!is_explained(&undone));
    // And with a delete.
    let mut undone = history(&[(0, Call::Save(6), Some(Saved))]);
    undone.push(Event::Invoked(1, Call::Delete));
    undone.extend(history(&[(2, batch(), Some(Committed(1)))]));
    let mut in_order = undone.clone();
    in_order.push(Event::Returned(1, Deleted(true)));
    in_order.extend(history(&[found(1)]));
    assert!(is_explained(&in_order));
    undone.push(Event::Returned(1, Gone));
    undone.extend(history(&[found(0)]));
    assert!(!is_explained(&undone));
}
