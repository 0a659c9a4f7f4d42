//! Many operations by many threads while connections die: nothing is left over.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use fastrand::Rng;

use super::{Row, this_program};
use crate::harness::{self, Options, Server, wait_until};

const SERVER_VARIABLE: &str = "CHECKPOINT_STORE_SOAK_PARAMS";
const SOAK: &str = "faults::soak::nothing_is_left_over";
const THREADS: usize = 16;
const CONNECTIONS: u32 = 8;
/// One backend is ended in so many operations.
const OPERATIONS_A_KILL: usize = 1_000;

/// Figures of this whole process, so it soaks in one of its own: other tests run here.
#[test]
fn nothing_is_left_over() {
    if let Ok(params) = std::env::var(SERVER_VARIABLE) {
        return soak(&params, harness::rounds(20_000, 1_000_000));
    }
    let server = Server::start(Options::fast());
    let output = this_program(SOAK)
        .env(SERVER_VARIABLE, server.params())
        .output()
        .expect("this program starts");
    let (told, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{told}");
    assert!(output.status.success(), "{told}\n{complaint}");
    assert!(told.contains("operations"), "{told}");
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").expect("Linux").count()
}

/// Of a process of its own, for the same reason.
#[test]
fn a_connect_that_fails_leaves_no_thread() {
    const VARIABLE: &str = "CHECKPOINT_STORE_REFUSED_PARAMS";
    if let Ok(params) = std::env::var(VARIABLE) {
        let before = threads();
        for _ in 0..50 {
            let refused = PostgresCheckpointStore::connect(&params);
            assert!(matches!(refused, Err(Error::Unavailable { .. })), "{refused:?}");
        }
        wait_until("those of the last attempts have ended", || threads() <= before);
        return;
    }
    let output = this_program("faults::soak::a_connect_that_fails_leaves_no_thread")
        .env(VARIABLE, format!("host=127.0.0.1 port={} user=postgres", harness::free_port()))
        .output()
        .expect("this program starts");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
}

fn resident_kilobytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim_end_matches("kB").trim().parse().expect("a number")
}

/// What all threads of one round came to.
#[derive(Default)]
struct Tally {
    lost: usize,
    /// Writes whose outcome was unknown to the caller.
    unknown: usize,
    longest_wait: Duration,
}

fn round(store: &PostgresCheckpointStore, operations: usize, done: &AtomicUsize) -> Tally {
    thread::scope(|scope| {
        let callers: Vec<_> = (0..THREADS)
            .map(|i| scope.spawn(move || caller(i, store, operations / THREADS, done)))
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).fold(
            Tally::default(),
            |sum, one| Tally {
                lost: sum.lost + one.lost,
                unknown: sum.unknown + one.unknown,
                longest_wait: sum.longest_wait.max(one.longest_wait),
            },
        )
    })
}

fn caller(
    number: usize,
    store: &PostgresCheckpointStore,
    operations: usize,
    done: &AtomicUsize,
) -> Tally {
    let (one, two) = (format!("one {number}"), format!("two {number}"));
    let mut tally = Tally::default();
    let mut offset = store.get(&one).unwrap();
    let mut in_doubt = None;
    for i in 0..operations {
        let started = Instant::now();
        match i % 6 {
            0 => {
                offset += 1;
                store.save(&one, offset).unwrap();
            }
            1 => {
                offset += 1;
                match store.save_many(&[(&one, offset), (&two, offset)]) {
                    Ok(()) => {}
                    // It was deleted below, and what is not there does not tell by whom.
                    Err(Error::Unavailable { .. }) => {
                        tally.unknown += 1;
                        let found = store.get(&one).unwrap();
                        tally.lost += usize::from(found < offset - 1);
                        offset = found;
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
            2 => match store.advance(&one, offset, offset + 1) {
                Ok(()) => offset += 1,
                Err(Error::Unavailable { .. }) => {
                    tally.unknown += 1;
                    in_doubt = Some(offset + 1);
                    let found = store.get(&one).unwrap();
                    tally.lost += usize::from(found < offset);
                    offset = found;
                }
                Err(Error::Conflict { found, .. }) if in_doubt == Some(found) => {
                    tally.unknown += 1;
                    offset = found;
                }
                Err(other) => panic!("{other:?}"),
            },
            3 => drop(store.delete(&two).unwrap()),
            4 => drop(store.all().unwrap()),
            _ => tally.lost += usize::from(store.get(&one).unwrap() != offset),
        }
        tally.longest_wait = tally.longest_wait.max(started.elapsed());
        done.fetch_add(1, Ordering::SeqCst);
    }
    tally
}

/// Ends one of the store's backends: mostly as an administrator does, sometimes with `kill -9`.
fn end_a_backend(params: &str, random: &mut Rng) {
    let mut attempt = || -> Result<(), checkpoint_store::postgres::Error> {
        let mut client =
            checkpoint_store::postgres::Client::connect(params, checkpoint_store::postgres::NoTls)?;
        let pids = client.query(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'soak' ORDER BY pid",
            &[],
        )?;
        if pids.is_empty() {
            return Ok(());
        }
        let pick = random.usize(..pids.len());
        let pid: i32 = pids[pick].get(0);
        if random.u64(..10) == 0 {
            drop(client);
            harness::kill_process(pid);
        } else {
            client.execute("SELECT pg_terminate_backend($1)", &[&pid])?;
        }
        Ok(())
    };
    // The server may be recovering from the one before.
    let _ = attempt();
}

fn soak(params: &str, operations: usize) {
    let threads_before = threads();
    let store = PostgresCheckpointStore::builder()
        .max_connections(CONNECTIONS)
        .connect(&format!("{params} application_name=soak"))
        .unwrap();
    store.migrate().unwrap();
    let done = AtomicUsize::new(0);
    round(&store, 2_000, &done);
    let (threads_warm, memory_warm) = (threads(), resident_kilobytes());

    done.store(0, Ordering::SeqCst);
    let started = Instant::now();
    let mut kills = 0;
    let tally = thread::scope(|scope| {
        let work = scope.spawn(|| round(&store, operations, &done));
        let mut random = Rng::with_seed(5);
        while !work.is_finished() {
            if done.load(Ordering::SeqCst) >= (kills + 1) * OPERATIONS_A_KILL {
                end_a_backend(params, &mut random);
                kills += 1;
            }
            thread::sleep(Duration::from_millis(1));
        }
        work.join().unwrap()
    });
    let elapsed = started.elapsed();
    let (threads_after, memory_after) = (threads(), resident_kilobytes());

    let mut observer = None;
    let mut connections = || {
        let client = observer.get_or_insert_with(|| harness::client(params));
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'soak'";
        client.query_one(query, &[]).unwrap().get::<_, i64>(0)
    };
    wait_until("the server has forgotten the dead ones", || connections() <= CONNECTIONS.into());
    let connections_after = connections();
    println!(
        "{operations} operations, {kills} backends ended, {elapsed:.1?}; threads {threads_warm} -> \
         {threads_after}, memory {memory_warm} -> {memory_after} kB, {connections_after} connections"
    );
    let row = Row {
        fault: "soak: 16 threads on 8 connections, backends ended (errors: outcome unknown)",
        times: kills,
        lost: tally.lost,
        twice: 0,
        errors: tally.unknown,
        longest_wait: tally.longest_wait,
    };
    row.print();
    assert_eq!(row.lost, 0);
    assert!(threads_after <= threads_warm, "{threads_warm} -> {threads_after}");
    assert!(memory_after < memory_warm + 16 * 1024, "{memory_warm} -> {memory_after} kB");

    drop(store);
    wait_until("every connection is closed", || connections() == 0);
    // r2d2's threads notice it when they next look for idle connections: within half a minute.
    if harness::is_soak() {
        wait_until("every thread has ended", || threads() == threads_before);
    }
}
