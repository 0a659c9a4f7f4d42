//! What six threads were told while their connections ended, recorded; and an order of it that
//! explains each answer. A call whose outcome is unknown may have happened at any time since, or never.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use checkpoint_store::postgres::Transaction;
use checkpoint_store::postgres::types::Type;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use fastrand::Rng;
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use crate::faults::Row;
use crate::harness::{Options, Server, wait_until};

#[derive(Debug, Clone, PartialEq)]
enum Call {
    Get,
    Advance { from: i64, to: i64 },
    Project,
}

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Got(i64),
    Advanced,
    Conflict(i64),
    /// Its own batch.
    Projected(i64),
    /// A rival has got there, or beyond, after a COMMIT of its own was lost.
    Overtaken(i64),
}

/// One projection's checkpoint, as a single thread would see it.
#[derive(Debug, Clone, Default)]
struct Model(i64);

impl SequentialSpec for Model {
    type Op = Call;
    type Ret = Answer;

    fn invoke(&mut self, call: &Call) -> Answer {
        match *call {
            Call::Get => Answer::Got(self.0),
            Call::Advance { from, .. } if from != self.0 => Answer::Conflict(self.0),
            Call::Advance { to, .. } => {
                self.0 = to;
                Answer::Advanced
            }
            Call::Project => {
                self.0 += 1;
                Answer::Projected(self.0)
            }
        }
    }

    fn is_valid_step(&mut self, call: &Call, answer: &Answer) -> bool {
        match *answer {
            Answer::Overtaken(to) => self.0 >= to,
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

/// Lets six threads call, and records a history for each projection of this round.
fn record(store: &PostgresCheckpointStore, round: usize) -> BTreeMap<&'static str, History> {
    let histories: BTreeMap<_, _> =
        PROJECTIONS.map(|projection| (projection, Mutex::new(History::new()))).into();
    let next_identity = AtomicU64::new(THREADS);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (histories, next_identity) = (&histories, &next_identity);
            scope.spawn(move || {
                let mut random = Rng::with_seed((round as u64) << 8 | thread);
                let mut identity = thread;
                // A history has no call of this thread's under way when it is asked anew.
                for _ in 0..CALLS {
                    let projection = PROJECTIONS[random.usize(..PROJECTIONS.len())];
                    let name = format!("{projection} {round}");
                    let history = &histories[projection];
                    let record = |event| history.lock().unwrap().push(event);
                    let call = match random.u8(..3) {
                        0 => Call::Get,
                        1 => {
                            let from = random.i64(0..5);
                            Call::Advance { from, to: from + random.i64(0..3) }
                        }
                        _ => Call::Project,
                    };
                    if call == Call::Project {
                        // Which signs its batch.
                        identity = next_identity.fetch_add(1, Ordering::SeqCst);
                    }
                    record(Event::Invoked(identity, call.clone()));
                    let answer = match call {
                        Call::Get => store.get(&name).map(Answer::Got),
                        Call::Advance { from, to } => {
                            store.advance(&name, from, to).map(|()| Answer::Advanced)
                        }
                        Call::Project => store
                            .project(&name, |tx, offset| {
                                sign(tx, &name, offset + 1, identity)?;
                                Ok(Some(offset + 1))
                            })
                            .map(|offset| Answer::Projected(offset.expect("there is a next one"))),
                    };
                    match answer {
                        Ok(answer) => record(Event::Returned(identity, answer)),
                        Err(Error::Conflict { found, .. }) => {
                            record(Event::Returned(identity, Answer::Conflict(found)));
                        }
                        // `project` too gives up when it is lost three times in its closure.
                        Err(Error::Unavailable { .. }) if call != Call::Get => {
                            identity = next_identity.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(other) => panic!("{other:?}"),
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

/// A call that has not done the batch up to the offset that it returned was overtaken by whoever has.
fn tell_whose_batches(history: &mut History, batches: &[(u64, i64)]) {
    let callers: BTreeSet<_> = batches.iter().map(|(identity, _)| identity).collect();
    assert_eq!(callers.len(), batches.len(), "one call, one batch: {batches:?}");
    for event in history {
        let Event::Returned(identity, answer) = event else { continue };
        match *answer {
            Answer::Projected(to) if !batches.contains(&(*identity, to)) => {
                *answer = Answer::Overtaken(to);
            }
            _ => {}
        }
    }
}

#[test]
fn every_history_has_an_order_that_explains_each_answer() {
    const ROUNDS: usize = 100;
    const CRASH_EVERY: usize = 25;
    let server = Server::start(Options::durable());
    let store = PostgresCheckpointStore::builder()
        .prepared_statements(true)
        .connect(&format!("{} application_name=recorded", server.params()))
        .unwrap();
    store.migrate().unwrap();
    let table = "CREATE TABLE batches (projection text, \"to\" bigint, identity bigint)";
    server.client().batch_execute(table).unwrap();
    let (mut kills, mut crashes, mut unknown) = (0, 0, 0);
    for round in 1..=ROUNDS {
        let histories = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                if round % CRASH_EVERY == 0 {
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
            let histories = record(&store, round);
            kills += killer.join().unwrap();
            histories
        });
        crashes += usize::from(round % CRASH_EVERY == 0);
        for (projection, mut history) in histories {
            tell_whose_batches(&mut history, &batches(&server, &format!("{projection} {round}")));
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
    use Answer::{Advanced, Conflict, Got, Overtaken, Projected};
    let advance = |from, to| Call::Advance { from, to };
    let mut calls = vec![
        (0, advance(0, 3), Some(Advanced)),
        (1, advance(3, 4), None), // it may have happened, or may yet
        (2, Call::Get, Some(Got(3))),
        (3, Call::Get, Some(Got(4))),
        (4, Call::Project, Some(Projected(5))),
    ];
    assert!(is_explained(&history(&calls)));
    for wrong in [
        (5, Call::Get, Some(Got(4))),
        (5, advance(3, 9), Some(Advanced)),
        (5, advance(0, 3), Some(Advanced)),
        (5, advance(5, 6), Some(Conflict(4))),
        (5, Call::Project, Some(Projected(7))),
        (5, Call::Project, Some(Projected(5))),
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
    calls.push((4, Call::Project, Some(Projected(4))));
    assert!(is_explained(&history(&calls)));
}
