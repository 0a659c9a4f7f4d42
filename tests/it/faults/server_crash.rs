//! The server dies under the traffic of eight threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use fastrand::Rng;

use super::{Row, kill_backend_and_wait, store_on};
use crate::harness::{Options, Server, chain, wait_until};

const THREADS: usize = 8;
/// Each way of ending.
const TIMES: usize = 10;

/// What one thread saw.
#[derive(Default)]
struct Seen {
    lost: usize,
    errors: Vec<String>,
    /// Writes that were lost, and are not repeated.
    in_doubt: usize,
    longest_wait: Duration,
}

impl Seen {
    fn timed<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let outcome = work();
        self.longest_wait = self.longest_wait.max(started.elapsed());
        outcome
    }

    /// A save that was lost is not repeated if, as far as the clocks tell, the one before it may have been
    /// written since it began.
    fn note_save(&mut self, outcome: Result<(), Error>) -> bool {
        match outcome {
            Err(error @ Error::Unavailable { .. })
                if chain(&error).contains("unknown whether the write was executed") =>
            {
                assert!(error.is_transient(), "{error:?}");
                self.in_doubt += 1;
                false
            }
            outcome => self.note(outcome).is_some(),
        }
    }

    fn note<T>(&mut self, outcome: Result<T, Error>) -> Option<T> {
        outcome.inspect_err(|error| self.errors.push(chain(error))).ok()
    }
}

/// Moves two projections of its own on until it is told to stop, and reads each offset back.
fn caller(
    number: usize,
    store: &PostgresCheckpointStore,
    steps: &AtomicUsize,
    stop: &AtomicBool,
) -> Seen {
    let (one, two) = (format!("one {number}"), format!("two {number}"));
    let mut seen = Seen::default();
    let mut acknowledged = 0;
    let mut in_doubt = None;
    while !stop.load(Ordering::SeqCst) {
        let next = acknowledged + 1;
        match number % 4 {
            0 | 1 => {
                let saved = seen.timed(|| store.save(&one, next));
                if seen.note_save(saved) {
                    acknowledged = next;
                }
            }
            2 => {
                let saved = seen.timed(|| store.save_many(&[(&one, next), (&two, next)]));
                if seen.note_save(saved) {
                    acknowledged = next;
                }
                let other = seen.timed(|| store.get(&two));
                seen.lost += usize::from(seen.note(other).is_some_and(|it| it < acknowledged));
            }
            _ => match seen.timed(|| store.advance(&one, acknowledged, next)) {
                Ok(()) => acknowledged = next,
                Err(error @ Error::Unavailable { .. }) => {
                    assert!(error.is_transient(), "{error:?}");
                    seen.in_doubt += 1;
                    in_doubt = Some(next);
                    // It happened or it did not; to read the offset again is to find out.
                    let read = seen.timed(|| store.get(&one));
                    if let Some(found) = seen.note(read) {
                        assert!(found <= next, "{found} > {next}");
                        seen.lost += usize::from(found < acknowledged);
                        acknowledged = found;
                    }
                }
                // What was read came from the server in its last moments, when it had written the
                // `advance` to its log and did not show it yet.
                Err(Error::Conflict { found, .. }) if in_doubt == Some(found) => {
                    seen.in_doubt += 1;
                    acknowledged = found;
                }
                Err(other) => panic!("{other:?}"),
            },
        }
        let read = seen.timed(|| store.get(&one));
        seen.lost += usize::from(seen.note(read).is_some_and(|it| it < acknowledged));
        steps.fetch_add(1, Ordering::SeqCst);
    }
    seen
}

/// Runs eight callers on one store while `faults` goes about it.
fn traffic(
    store: &PostgresCheckpointStore,
    faults: impl FnOnce(&[AtomicUsize]) + Send,
) -> Vec<Seen> {
    let stop = AtomicBool::new(false);
    let steps: Vec<_> = (0..THREADS).map(|_| AtomicUsize::new(0)).collect();
    thread::scope(|scope| {
        let callers: Vec<_> = steps
            .iter()
            .enumerate()
            .map(|(i, steps)| {
                let (store, stop) = (store.clone(), &stop);
                scope.spawn(move || caller(i, &store, steps, stop))
            })
            .collect();
        let faults = scope.spawn(|| faults(&steps)).join();
        stop.store(true, Ordering::SeqCst);
        let seen = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        faults.unwrap();
        seen
    })
}

/// Waits until every caller has got some way on from here.
fn wait_for_steps(steps: &[AtomicUsize], count: usize) {
    let start: Vec<_> = steps.iter().map(|steps| steps.load(Ordering::SeqCst)).collect();
    wait_until("every caller goes on", || {
        steps.iter().zip(&start).all(|(now, then)| now.load(Ordering::SeqCst) >= then + count)
    });
}

fn end_under_traffic(fault: &'static str, mut random: Rng, end: impl Fn(&Server) + Sync) {
    let server = Server::start(Options::durable());
    let store = PostgresCheckpointStore::connect(&server.params()).unwrap();
    store.migrate().unwrap();
    let seen = traffic(&store, |steps| {
        for _ in 0..TIMES {
            wait_for_steps(steps, 1 + random.usize(..20));
            end(&server);
        }
        wait_for_steps(steps, 3);
    });
    let errors: Vec<_> = seen.iter().flat_map(|seen| &seen.errors).collect();
    let in_doubt: Vec<_> = seen.iter().map(|seen| seen.in_doubt).collect();
    let row = Row {
        fault,
        times: TIMES,
        lost: seen.iter().map(|seen| seen.lost).sum(),
        twice: 0,
        errors: errors.len() + in_doubt.iter().sum::<usize>(),
        longest_wait: seen.iter().map(|seen| seen.longest_wait).max().unwrap(),
    };
    row.print();
    assert_eq!(row.lost, 0);
    assert!(errors.is_empty(), "save, get and save_many go on by themselves: {errors:#?}");
    assert!(in_doubt.iter().all(|&errors| errors <= 2 * TIMES), "{in_doubt:?}");
    let saves = (0..THREADS).filter(|number| number % 4 != 3).map(|number| in_doubt[number]);
    assert!(saves.sum::<usize>() <= TIMES, "most saves are repeated: {in_doubt:?}");
}

#[test]
fn nothing_acknowledged_is_lost_when_the_server_crashes() {
    let fault = "server stopped as by a crash and restarted, 8 threads (errors: outcome unknown)";
    end_under_traffic(fault, Rng::with_seed(1), |server| {
        server.crash();
        server.restart();
    });
}

#[test]
fn nothing_acknowledged_is_lost_when_the_server_is_restarted() {
    let fault = "server restarted by its administrator, 8 threads (errors: outcome unknown)";
    end_under_traffic(fault, Rng::with_seed(6), |server| {
        server.stop();
        server.restart();
    });
}

#[test]
fn nothing_acknowledged_is_lost_when_a_backend_is_killed() {
    let fault = "backend killed with kill -9, 8 threads (errors: outcome unknown)";
    end_under_traffic(fault, Rng::with_seed(2), |server| {
        let mut client = server.client();
        let query = "SELECT pid FROM pg_stat_activity
                     WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
                     ORDER BY state_change DESC LIMIT 1";
        let busiest = client.query_one(query, &[]).unwrap().get(0);
        drop(client);
        kill_backend_and_wait(server, busiest);
    });
}

#[test]
fn while_the_server_is_down_calls_end_in_time_and_the_store_works_again_when_it_is_back() {
    const TIMEOUT: Duration = Duration::from_millis(400);
    let server = Server::start(Options::fast());
    let store = store_on(&server.params(), 3, TIMEOUT);
    store.migrate().unwrap();
    store.save("orders", 41).unwrap();
    server.crash();

    let mut longest_wait = Duration::ZERO;
    let mut errors = 0;
    for _ in 0..2 {
        let calls: [&dyn Fn() -> Result<(), Error>; 7] = [
            &|| store.find("orders").map(drop),
            &|| store.get("orders").map(drop),
            &|| store.all().map(drop),
            &|| store.save("orders", 42),
            &|| store.save_many(&[("orders", 42)]),
            &|| store.advance("orders", 41, 42),
            &|| store.delete("orders").map(drop),
        ];
        for call in calls {
            let started = Instant::now();
            let error = call().unwrap_err();
            longest_wait = longest_wait.max(started.elapsed());
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.is_transient());
            errors += 1;
        }
    }
    let bound = TIMEOUT + Duration::from_secs(2);
    assert!(longest_wait < bound, "{longest_wait:?}");

    server.restart();
    wait_until("the store works again", || store.save("orders", 43).is_ok());
    let fault = "server down for longer than the pool's time-out (0.4 s here), each operation";
    Row::asserted(fault, 14, errors, longest_wait).print();
    assert_eq!(store.get("orders").unwrap(), 43);
}

/// r2d2 pauses between its attempts to connect, longer each time.
#[test]
fn waiting_calls_return_soon_after_the_server_is_back() {
    // The next attempts that double their pause would come 6 seconds after the end of this outage.
    const OUTAGE: Duration = Duration::from_millis(6_500);
    let server = Server::start(Options::fast());
    // As many as threads, so that nobody's attempts come at another time than the others'.
    let store = PostgresCheckpointStore::builder()
        .max_connections(u32::try_from(THREADS).unwrap())
        .connect(&server.params())
        .unwrap();
    store.migrate().unwrap();
    // A save that is lost is repeated only where the row tells that nobody has written since.
    for i in 0..THREADS {
        store.save(&format!("orders {i}"), 41).unwrap();
    }
    let returned: Vec<Duration> = thread::scope(|scope| {
        let mut began = Vec::new();
        let all_connections: Vec<_> =
            (0..THREADS).map(|_| store.connection().expect("a connection")).collect();
        server.crash();
        drop(all_connections);
        for i in 0..THREADS {
            let store = store.clone();
            began.push(scope.spawn(move || {
                store.save(&format!("orders {i}"), 42).unwrap();
                Instant::now()
            }));
        }
        thread::sleep(OUTAGE);
        server.restart();
        let back = Instant::now();
        began.into_iter().map(|call| call.join().unwrap().saturating_duration_since(back)).collect()
    });
    let longest_wait = *returned.iter().max().unwrap();
    let fault = "server away for 6.5 s, 8 calls waiting (wait: after it was back)";
    Row::asserted(fault, 1, 0, longest_wait).print();
    assert!(longest_wait < Duration::from_secs(4), "{returned:?}");
}
