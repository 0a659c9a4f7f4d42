//! Calls that wait at the same time share a statement, and nobody pays for anybody else. The
//! interleavings are tried by an exhaustive scheduler beside the code.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Client;
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PostgresCheckpointStore, conformance,
};

use crate::faults::Row;
use crate::harness::{
    self, Options, Proxy, Schema, Server, chain, sql_state, wait_for_a_waiter, wait_until,
};

/// Far more than go alone.
const THREADS: u32 = 24;

fn grouped(schema: &str, params: &str, prepared: bool) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder()
        .schema(schema)
        .group_commit(true)
        .prepared_statements(prepared)
        .max_connections(2 * THREADS)
        .connect(params)
        .unwrap()
}

fn grouped_on(schema: &Schema) -> PostgresCheckpointStore {
    grouped(&schema.name, &harness::server().params(), false)
}

/// Does something in so many threads that begin together; what each of them returned.
fn in_threads<T: Send>(work: impl Fn(u32) -> T + Sync) -> Vec<T> {
    let start = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        let spawn = |thread| {
            let (work, start) = (&work, &start);
            scope.spawn(move || {
                start.wait();
                work(thread)
            })
        };
        let threads: Vec<_> = (0..THREADS).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn the_contract_holds() {
    for prepared in [false, true] {
        let schema = Schema::new();
        conformance::verify(&grouped(&schema.name, &harness::server().params(), prepared));
    }
}

#[test]
fn calls_that_wait_at_the_same_time_share_round_trips() {
    const ROUNDS: u32 = 100;
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for prepared in [false, true] {
        let store = PostgresCheckpointStore::builder()
            .schema(&schema.name)
            .group_commit(true)
            .prepared_statements(prepared)
            .connect(&proxy.params())
            .unwrap();
        let names: Vec<_> = (0..THREADS).map(|thread| format!("{prepared} {thread}")).collect();
        let calls = (THREADS * ROUNDS * 2) as usize;
        let work = || {
            in_threads(|thread| {
                let name = &names[thread as usize];
                for from in (1..).step_by(2).take(ROUNDS as usize) {
                    store.advance(name, from, from + 1).unwrap();
                    store.save(name, from + 2).unwrap();
                }
            });
        };
        // On a busy machine fewer calls come at the same time, so it has a few trials.
        let mut trials = Vec::new();
        while trials.len() < 5 && trials.last().is_none_or(|trips| *trips >= calls / 4) {
            for name in &names {
                store.save(name, 1).unwrap();
            }
            trials.push(proxy.round_trips(work));
        }
        println!("{calls} calls in {trials:?} round trips");
        assert!(
            trials.last().is_some_and(|trips| *trips < calls / 4),
            "{trials:?} for {calls} calls"
        );
        for name in &names {
            assert_eq!(schema.store.get(name).unwrap(), i64::from(ROUNDS * 2 + 1));
        }
    }
}

#[test]
fn every_thread_finds_its_own_calls_done_and_in_their_order() {
    let schema = Schema::new();
    let store = grouped_on(&schema);
    in_threads(|thread| {
        let name = format!("worker {thread}");
        for round in 0..20 {
            let offset = round * 10;
            store.save(&name, offset + 1).unwrap();
            assert_eq!(schema.store.get(&name).unwrap(), offset + 1);
            store.advance(&name, offset + 1, offset + 2).unwrap();
            let conflict = store.advance(&name, offset + 1, offset + 3).unwrap_err();
            assert!(matches!(conflict, Error::Conflict { found, .. } if found == offset + 2));
            store.save(&name, offset).unwrap();
            store.advance(&name, offset, offset + 4).unwrap();
            assert_eq!(schema.store.get(&name).unwrap(), offset + 4);
            assert!(store.delete(&name).unwrap());
            store.advance(&name, 0, 5).unwrap();
            assert_eq!(store.get(&name).unwrap(), 5);
        }
    });
}

#[test]
fn of_rivals_on_one_projection_exactly_one_wins_and_the_others_are_told() {
    let schema = Schema::new();
    let store = grouped_on(&schema);
    for round in 0..20 {
        let outcomes = in_threads(|thread| {
            // Others, so that the rivals are not the only ones in their group.
            store.save(&format!("other {thread}"), round).unwrap();
            store.advance("contested", round, round + 1)
        });
        let won = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(won, 1, "round {round}: {outcomes:?}");
        for lost in outcomes.into_iter().filter_map(Result::err) {
            assert!(
                matches!(lost, Error::Conflict { expected, found, .. }
                    if (expected, found) == (round, round + 1)),
                "{lost:?}"
            );
        }
    }
}

/// What the database refuses, or discards, is one caller's error, with that caller's subject.
#[test]
fn a_write_that_is_refused_is_an_error_of_its_caller_and_of_nobody_else() {
    let schema = Schema::new();
    schema
        .client()
        .batch_execute(
            "ALTER TABLE projection_checkpoints ADD CHECK (\"offset\" < 1000);
             CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.projection_name = 'discarded' THEN RETURN NULL; END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER discard BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION discard();",
        )
        .unwrap();
    let store = grouped_on(&schema);
    in_threads(|thread| {
        let name = format!("worker {thread}");
        for offset in 1..=30 {
            let refused = match thread {
                0 => store.save(&name, 1_000 + offset).unwrap_err(),
                1 => store.advance(&name, 0, 1_000).unwrap_err(),
                2 => store.save("discarded", offset).unwrap_err(),
                _ => {
                    store.save(&name, offset).unwrap();
                    store.advance(&name, offset, offset + 1).unwrap();
                    continue;
                }
            };
            assert!(matches!(refused, Error::Backend { .. }), "{refused:?}");
            let (told, subject) = (chain(&refused), if thread == 2 { "discarded" } else { &name });
            assert!(told.contains(&format!("projection \"{subject}\"")), "{told}");
            match thread {
                2 => assert!(told.contains("wrote no row"), "{told}"),
                _ => assert_eq!(sql_state(&refused).as_deref(), Some("23514"), "{told}"),
            }
        }
    });
    for thread in 3..THREADS {
        assert_eq!(schema.store.get(&format!("worker {thread}")).unwrap(), 31);
    }
    assert_eq!(schema.store.all().unwrap().len(), THREADS as usize - 3);
}

#[test]
fn a_name_that_the_servers_encoding_cannot_hold_is_an_error_of_its_caller_alone() {
    let name = harness::unique("latin");
    harness::server()
        .client()
        .batch_execute(&format!(
            "CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
        ))
        .unwrap();
    let store = grouped("public", &harness::server().url(&name), false);
    store.migrate().unwrap();
    in_threads(|thread| {
        for offset in 1..=20 {
            if thread == 0 {
                let refused = store.save("日本語", offset).unwrap_err();
                assert!(chain(&refused).contains("日本語"), "{}", chain(&refused));
                assert!(!refused.is_transient(), "{refused:?}");
            } else {
                store.save(&format!("für {thread}"), offset).unwrap();
            }
        }
    });
    assert_eq!(store.all().unwrap().len(), THREADS as usize - 1);
}

#[test]
fn rows_that_another_transaction_holds_delay_those_who_want_them_and_nobody_else() {
    // More than go alone: the last of them would each be a group.
    const HELD: usize = 12;
    let schema = Schema::new();
    let store = grouped_on(&schema);
    let held: Vec<_> = (0..HELD).map(|row| format!("held {row}")).collect();
    let mut client = schema.client();
    let mut holder = client.transaction().unwrap();
    for name in &held {
        store.save(name, 1).unwrap();
        schema.store.in_transaction(&mut holder).lock(name).unwrap();
    }
    let slowest = Mutex::new(Duration::ZERO);
    thread::scope(|scope| {
        let store = &store;
        let waiting = held.iter().map(|name| scope.spawn(move || store.advance(name, 1, 2)));
        let waiting: Vec<_> = waiting.collect();
        let mut observer = schema.client();
        wait_until("all of them wait for their rows", || waiters(&mut observer) == HELD);
        // All of this is done while the rows are held.
        in_threads(|thread| {
            for offset in 1..=50 {
                let begun = Instant::now();
                store.save(&format!("worker {thread}"), offset).unwrap();
                let mut slowest = slowest.lock().unwrap();
                *slowest = begun.elapsed().max(*slowest);
            }
        });
        assert!(waiting.iter().all(|waiter| !waiter.is_finished()));
        holder.rollback().unwrap();
        for waiter in waiting {
            waiter.join().unwrap().unwrap();
        }
    });
    assert!(held.iter().all(|name| store.get(name).unwrap() == 2));
    let slowest = slowest.into_inner().unwrap();
    let fault = "group commit: 12 rows are held while 24 threads save others";
    Row::asserted(fault, THREADS as usize * 50, 0, slowest).print();
}

/// How many connections wait for a lock in a statement of a store's.
fn waiters(observer: &mut Client) -> usize {
    let query =
        "SELECT count(DISTINCT pg_locks.pid) FROM pg_locks JOIN pg_stat_activity USING (pid)
                 WHERE NOT granted AND query LIKE 'UPDATE%' || current_schema() || '%'";
    usize::try_from(observer.query_one(query, &[]).unwrap().get::<_, i64>(0)).unwrap()
}

/// As many calls as go alone, so that the next one is a group, and those after it wait for its end.
const OTHERS: usize = 8;

/// A table in which a write of "slow" or "other .." waits, in a trigger, until the test lets go of a
/// lock. All these rows are there, and "p".
fn schema_with_slow_rows() -> Schema {
    let schema = Schema::new();
    for name in ["slow", "p"].into_iter().chain(OTHER_NAMES) {
        schema.store.save(name, 1).unwrap();
    }
    schema
        .client()
        .batch_execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM pg_advisory_xact_lock_shared(hashtext(TG_TABLE_SCHEMA), hashtext(prefix))
                 FROM (VALUES ('slow'), ('other')) AS held (prefix)
                 WHERE NEW.projection_name LIKE prefix || '%';
                 RETURN NEW;
             END $$;
             CREATE TRIGGER wait BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION wait();",
        )
        .unwrap();
    schema
}

const OTHER_NAMES: [&str; OTHERS] =
    ["other 1", "other 2", "other 3", "other 4", "other 5", "other 6", "other 7", "other 8"];

/// Makes writes of these rows wait until the client is dropped, by a panic too.
fn hold(schema: &Schema, prefix: &str) -> Client {
    let mut holder = schema.client();
    let lock = "SELECT pg_advisory_lock(hashtext(current_schema()), hashtext($1))";
    holder.execute(lock, &[&prefix]).unwrap();
    holder
}

#[test]
fn a_waiting_call_goes_alone_when_few_are_left_and_no_later_one_overtakes_it() {
    let schema = schema_with_slow_rows();
    let store = grouped_on(&schema);
    thread::scope(|scope| {
        let store = &store;
        let save =
            |name: &'static str, offset| scope.spawn(move || store.save(name, offset).unwrap());
        let mut observer = schema.client();
        let (slow_is_held, others_are_held) = (hold(&schema, "slow"), hold(&schema, "other"));
        let others = OTHER_NAMES.map(|name| save(name, 2));
        wait_until("the others wait in their statements", || waiting(&mut observer) == OTHERS);
        let slow = save("slow", 2);
        wait_until("the group waits too", || waiting(&mut observer) == OTHERS + 1);
        let first = save("p", 2);
        drop(others_are_held);
        for other in others {
            other.join().unwrap();
        }
        wait_until("the first call has returned", || first.is_finished());
        store.save("p", 3).unwrap();
        assert_eq!(store.get("p").unwrap(), 3);
        assert!(!slow.is_finished());
        drop(slow_is_held);
        slow.join().unwrap();
    });
    assert_eq!((store.get("p").unwrap(), store.get("slow").unwrap()), (3, 2));
}

#[test]
fn a_call_that_waits_for_the_end_of_a_group_returns_in_time_and_has_sent_nothing() {
    const LIMIT: Duration = Duration::from_secs(2);
    let schema = schema_with_slow_rows();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .group_commit(true)
        .max_connections(2 * THREADS)
        .connection_timeout(LIMIT)
        .connect(&harness::server().params())
        .unwrap();
    thread::scope(|scope| {
        let store = &store;
        let save =
            |name: &'static str, offset| scope.spawn(move || store.save(name, offset).unwrap());
        let mut observer = schema.client();
        let held = (hold(&schema, "slow"), hold(&schema, "other"));
        let others = OTHER_NAMES.map(|name| save(name, 2));
        wait_until("the others wait in their statements", || waiting(&mut observer) == OTHERS);
        let slow = save("slow", 2);
        wait_until("the group waits too", || waiting(&mut observer) == OTHERS + 1);
        for call in [&|| store.save("p", 2), &|| store.advance("p", 1, 2)]
            as [&dyn Fn() -> checkpoint_store::Result<()>; 2]
        {
            let begun = Instant::now();
            let error = call().unwrap_err();
            let took = begun.elapsed();
            assert!(took < LIMIT + Duration::from_secs(2), "{took:?}");
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(
                error.is_transient() && chain(&error).contains("nothing was sent"),
                "{error:?}"
            );
        }
        assert!(!slow.is_finished() && others.iter().all(|other| !other.is_finished()));
        drop(held);
        slow.join().unwrap();
        for other in others {
            other.join().unwrap();
        }
    });
    assert_eq!(store.get("p").unwrap(), 1);
    store.advance("p", 1, 2).unwrap();
}

/// How many connections wait for one of the test's advisory locks.
fn waiting(observer: &mut Client) -> usize {
    let query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
                 AND classid = (hashtext(current_schema())::bigint & 4294967295)::oid";
    usize::try_from(observer.query_one(query, &[]).unwrap().get::<_, i64>(0)).unwrap()
}

#[test]
fn while_the_server_is_down_no_call_takes_longer_than_its_limit() {
    const LIMIT: Duration = Duration::from_secs(3);
    let server = Server::start(Options::fast());
    let store = PostgresCheckpointStore::builder()
        .group_commit(true)
        .max_connections(4)
        .connection_timeout(LIMIT)
        .connect(&server.params())
        .unwrap();
    store.migrate().unwrap();
    in_threads(|thread| store.save(&format!("worker {thread}"), 1).unwrap());
    server.crash();
    in_threads(|thread| {
        let name = format!("worker {thread}");
        let timed = |call: &dyn Fn() -> checkpoint_store::Result<()>| {
            let begun = Instant::now();
            let error = call().unwrap_err();
            let took = begun.elapsed();
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.is_transient() && error.to_string().contains(&name), "{error:?}");
            assert!(took < LIMIT + Duration::from_secs(2), "{took:?}: {}", chain(&error));
        };
        timed(&|| store.save(&name, 2));
        timed(&|| store.advance(&name, 1, 2));
    });
}

/// PostgreSQL would not see such a deadlock: one of the two waits in this process.
#[test]
fn a_thread_that_holds_a_row_can_save_another_while_others_wait_for_the_first() {
    let schema = Schema::new();
    let store = grouped_on(&schema);
    store.save("locked", 1).unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    store.in_transaction(&mut tx).lock("locked").unwrap();
    let (done, is_done) = channel();
    thread::scope(|scope| {
        // More than go alone, so that what comes now is in a group with them.
        for offset in 2..2 + i64::from(THREADS) {
            let (store, done) = (&store, done.clone());
            scope.spawn(move || {
                store.save("locked", offset).unwrap();
                done.send(()).unwrap();
            });
        }
        wait_for_a_waiter(&mut schema.client(), "INSERT INTO");
        for offset in 1..=20 {
            store.save("another", offset).unwrap();
            store.advance("another", offset, offset + 1).unwrap();
        }
        assert!(is_done.try_recv().is_err(), "nobody has got the row");
        tx.commit().unwrap();
    });
    assert_eq!(is_done.iter().take(THREADS as usize).count(), THREADS as usize);
}

#[test]
fn backends_that_end_and_servers_that_crash_lose_nothing_that_was_acknowledged() {
    const CHECKPOINTERS: usize = 16;
    const CRASHES: usize = 4;
    let server = Server::start(Options::durable());
    let store = grouped("public", &server.params(), true);
    store.migrate().unwrap();
    let (done, begun) = (AtomicBool::new(false), AtomicUsize::new(0));
    let errors = AtomicUsize::new(0);
    let longest = Mutex::new(Duration::ZERO);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..CHECKPOINTERS)
            .map(|worker| {
                let (store, done, begun) = (&store, &done, &begun);
                let (errors, longest) = (&errors, &longest);
                scope.spawn(move || {
                    let name = format!("worker {worker}");
                    let mut checkpointer =
                        Checkpointer::resume(store, &name, Cadence::every(1)).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        let started = Instant::now();
                        let next = checkpointer.offset() + 1;
                        match checkpointer.processed(next) {
                            Ok(saved) => assert!(saved && checkpointer.saved() == next),
                            Err(error) => {
                                assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
                                assert!(error.is_transient(), "{error:?}");
                                errors.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        begun.fetch_add(1, Ordering::Relaxed);
                        let mut longest = longest.lock().unwrap();
                        *longest = started.elapsed().max(*longest);
                    }
                    // A save may fail as long as the server is away.
                    wait_until("the last one is saved", || checkpointer.flush().is_ok());
                    assert_eq!(store.get(&name).unwrap(), checkpointer.offset(), "{name}");
                })
            })
            .collect();
        for crash in 0..CRASHES {
            let before = begun.load(Ordering::Relaxed);
            wait_until("they are at work", || begun.load(Ordering::Relaxed) > before + 400);
            if crash % 2 == 0 {
                harness::end_sessions(&mut server.client());
            } else {
                server.crash();
                server.restart();
            }
        }
        let before = begun.load(Ordering::Relaxed);
        wait_until("they go on", || begun.load(Ordering::Relaxed) > before + 400);
        done.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap();
        }
    });
    let (errors, longest) = (errors.into_inner(), longest.into_inner().unwrap());
    let fault =
        "group commit, 16 `Checkpointer`s: backends ended, server crashed (errors: of `advance`)";
    Row::asserted(fault, CRASHES, errors, longest).print();
}

#[test]
fn a_table_that_is_not_there_is_each_callers_own_error() {
    let schema = Schema::new();
    schema.client().batch_execute("DROP TABLE projection_checkpoints").unwrap();
    let store = grouped_on(&schema);
    in_threads(|thread| {
        let error = store.save(&format!("worker {thread}"), 1).unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("42P01"), "{error:?}");
        assert!(error.to_string().contains(&format!("\"worker {thread}\"")), "{error}");
        assert!(!error.is_transient());
    });
}
