//! Workers die at any moment, and now and then the server too.
//!
//! The worker is this test program itself, started anew with one test's name and told by an
//! environment variable what to work on. Without that variable the same test runs a worker that
//! nobody kills.

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, GenericClient, Transaction};
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PostgresCheckpointStore, Watermark,
};
use fastrand::Rng;

use super::{Row, kill_backend_and_wait, process_id, this_program};
use crate::harness::{Options, Server, rounds, wait_until};

const PARAMS_VARIABLE: &str = "CHECKPOINT_STORE_WORKER_PARAMS";
const WORKER: &str = "faults::worker_crash::a_worker_gets_to_the_head_of_the_stream";
/// In so many of the rounds the server crashes under the worker first.
const SERVER_CRASHES: usize = 10;
const EXACTLY_ONCE: [&str; 3] = ["locks", "advances", "projects"];
const AT_LEAST_ONCE: [&str; 2] = ["checkpointer", "watermark"];
/// How many events a projection that saves now and then applies between two saves.
const EVERY: u64 = 5;
const WATERMARK_THREADS: usize = 3;

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// The stream is the numbers from 1 to the head; each projection is a table of what it applied.
/// No unique index: it would hide an event that is applied twice behind an error.
fn set_up(client: &mut Client, head: i64) {
    client
        .batch_execute(&format!(
            "CREATE TABLE stream (head bigint); INSERT INTO stream VALUES ({head})"
        ))
        .unwrap();
    for projection in EXACTLY_ONCE.iter().chain(&AT_LEAST_ONCE) {
        client.batch_execute(&format!("CREATE TABLE {projection} (event bigint)")).unwrap();
    }
}

/// What is a reason to begin anew with the offset that is stored: a lost connection, a pool that
/// has none, and a checkpoint that a worker before this one has still moved after it was read.
fn begins_anew(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<Error>() {
        return error.is_transient() || error.is_conflict();
    }
    match error.downcast_ref::<checkpoint_store::postgres::Error>() {
        Some(error) => error.code().is_none_or(|code| code.code().starts_with("57P")),
        None => error.is::<checkpoint_store::r2d2::Error>(),
    }
}

/// Runs until it is done, again and again for as long as there is a reason.
fn insist(mut work: impl FnMut() -> Outcome) {
    while let Err(error) = work() {
        assert!(begins_anew(error.as_ref()), "{error:?}");
    }
}

fn head(client: &mut impl GenericClient) -> Result<i64, checkpoint_store::postgres::Error> {
    Ok(client.query_one("SELECT head FROM stream", &[])?.get(0))
}

/// Exactly once with `lock` and `save`: read model and checkpoint in one transaction.
fn work_with_lock(store: &PostgresCheckpointStore) -> Outcome {
    loop {
        let mut client = store.connection()?;
        let mut tx = client.transaction()?;
        let from = store.in_transaction(&mut tx).lock("locks")?;
        let to = head(&mut tx)?.min(from + 1 + from % 4);
        tx.execute("INSERT INTO locks SELECT generate_series($1::bigint + 1, $2)", &[&from, &to])?;
        store.in_transaction(&mut tx).save("locks", to)?;
        tx.commit()?;
        if to == from {
            return Ok(());
        }
    }
}

/// The same with `project`, by two threads that are each other's rivals. No error is a reason to begin
/// anew here: there is none.
fn work_with_project(store: &PostgresCheckpointStore) -> Outcome {
    let project = || -> Outcome {
        let apply = |tx: &mut Transaction<'_>, from: i64| {
            let to = head(tx)?.min(from + 1 + from % 4);
            let sql = "INSERT INTO projects SELECT generate_series($1::bigint + 1, $2)";
            tx.execute(sql, &[&from, &to])?;
            Ok((to > from).then_some(to))
        };
        while store.project("projects", apply)?.is_some() {}
        Ok(())
    };
    thread::scope(|scope| {
        let rival = scope.spawn(project);
        project()?;
        rival.join().expect("no panic")
    })
}

/// The same with `get` and `advance`.
fn work_with_advance(store: &PostgresCheckpointStore) -> Outcome {
    loop {
        let from = store.get("advances")?;
        let mut client = store.connection()?;
        let mut tx = client.transaction()?;
        let to = head(&mut tx)?.min(from + 1 + from % 4);
        let apply = "INSERT INTO advances SELECT generate_series($1::bigint + 1, $2)";
        tx.execute(apply, &[&from, &to])?;
        store.in_transaction(&mut tx).advance("advances", from, to)?;
        tx.commit()?;
        if to == from {
            return Ok(());
        }
    }
}

/// At least once: each event on its own, and a checkpoint every few.
fn work_with_checkpointer(store: &PostgresCheckpointStore) -> Outcome {
    let mut checkpointer = Checkpointer::resume(store, "checkpointer", Cadence::every(EVERY))?;
    loop {
        let event = checkpointer.offset() + 1;
        let mut client = store.connection()?;
        if event > head(&mut *client)? {
            drop(client);
            checkpointer.flush()?;
            return Ok(());
        }
        client.execute("INSERT INTO checkpointer VALUES ($1)", &[&event])?;
        drop(client);
        checkpointer.processed(event)?;
    }
}

/// At least once, by several threads in any order.
fn work_with_watermark(store: &PostgresCheckpointStore) -> Outcome {
    let checkpointer = Checkpointer::resume(store, "watermark", Cadence::every(EVERY))?;
    let watermark = Watermark::starting_at(checkpointer.offset());
    let next = Mutex::new(checkpointer.offset() + 1);
    let checkpointer = Mutex::new(checkpointer);
    let work = || -> Outcome {
        loop {
            let mut client = store.connection()?;
            let head = head(&mut *client)?;
            let event = {
                let mut next = next.lock().unwrap();
                if *next > head {
                    return Ok(());
                }
                watermark.begin(*next)?;
                *next += 1;
                *next - 1
            };
            client.execute("INSERT INTO watermark VALUES ($1)", &[&event])?;
            drop(client);
            watermark.complete(event)?;
            let mut checkpointer = checkpointer.lock().unwrap();
            checkpointer.processed(watermark.offset())?;
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..WATERMARK_THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    checkpointer.into_inner().unwrap().flush()?;
    Ok(())
}

/// Works on all five projections at once until each has come to the head.
fn work(params: &str) {
    let store = loop {
        match PostgresCheckpointStore::connect(params) {
            Ok(store) => break store,
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    };
    thread::scope(|scope| {
        for work in [work_with_lock, work_with_advance, work_with_checkpointer, work_with_watermark]
        {
            let store = &store;
            scope.spawn(move || insist(|| work(store)));
        }
        scope.spawn(|| work_with_project(&store).expect("the caller sees no error"));
    });
}

/// What one projection has come to, all of it seen at one moment.
struct State {
    offset: i64,
    applied: i64,
    distinct: i64,
    /// The distinct events up to the checkpoint.
    covered: i64,
}

fn state(client: &mut Client, projection: &str) -> State {
    let query = format!(
        "SELECT checkpoint, count(event), count(DISTINCT event),
                count(DISTINCT event) FILTER (WHERE event <= checkpoint)
         FROM (SELECT COALESCE((SELECT \"offset\" FROM projection_checkpoints
                                WHERE projection_name = $1), 0) AS checkpoint) AS saved
              LEFT JOIN {projection} ON true
         GROUP BY checkpoint"
    );
    let row = client.query_one(&query, &[&projection]).unwrap();
    State { offset: row.get(0), applied: row.get(1), distinct: row.get(2), covered: row.get(3) }
}

/// What must be true at every moment, whoever has just died.
fn check(client: &mut Client) {
    for projection in EXACTLY_ONCE {
        let State { offset, applied, distinct, covered } = state(client, projection);
        assert_eq!([applied, distinct, covered], [offset; 3], "{projection}");
    }
    for projection in AT_LEAST_ONCE {
        let State { offset, covered, .. } = state(client, projection);
        assert_eq!(covered, offset, "{projection}: the checkpoint is never ahead");
    }
}

#[test]
fn a_worker_gets_to_the_head_of_the_stream() {
    if let Ok(params) = std::env::var(PARAMS_VARIABLE) {
        // Whoever started this process holds the other end; when it is gone, this one goes too.
        thread::spawn(|| {
            let _ = std::io::stdin().read(&mut [0]);
            std::process::exit(1);
        });
        return work(&params);
    }
    let params = crate::harness::fresh_database();
    let mut client = crate::harness::client(&params);
    PostgresCheckpointStore::connect(&params).unwrap().migrate().unwrap();
    set_up(&mut client, 50);
    work(&params);
    check(&mut client);
    for projection in EXACTLY_ONCE.iter().chain(&AT_LEAST_ONCE) {
        let State { offset, applied, .. } = state(&mut client, projection);
        assert_eq!((offset, applied), (50, 50), "{projection}");
    }
}

fn start_worker(params: &str) -> Child {
    this_program(WORKER)
        .env(PARAMS_VARIABLE, params)
        .stdin(Stdio::piped())
        .spawn()
        .expect("this program starts")
}

/// Waits until a worker has moved one of the projections so many times since this call.
fn wait_for_saves(client: &mut Client, worker: &mut Child, saves: u64) {
    let seen = |client: &mut Client| -> i64 {
        client
            .query_one(
                "SELECT COALESCE(sum(\"offset\"), 0)::bigint FROM projection_checkpoints",
                &[],
            )
            .unwrap()
            .get(0)
    };
    let start = seen(client);
    wait_until("the worker works", || {
        let ended = worker.try_wait().expect("a child's state");
        assert!(ended.is_none(), "the worker has ended: {}", output(worker));
        seen(client) >= start + i64::try_from(saves).unwrap()
    });
}

fn output(worker: &mut Child) -> String {
    let mut text = String::new();
    if let Some(mut stdout) = worker.stdout.take() {
        let _ = stdout.read_to_string(&mut text);
    }
    if let Some(mut stderr) = worker.stderr.take() {
        let _ = stderr.read_to_string(&mut text);
    }
    text
}

#[test]
fn each_event_counts_once_however_often_the_worker_is_killed() {
    let kills = rounds(40, 100);
    let server = Server::start(Options::durable());
    let params = server.params();
    PostgresCheckpointStore::connect(&params).unwrap().migrate().unwrap();
    let mut client = server.client();
    set_up(&mut client, i64::MAX / 2);
    let mut random = Rng::with_seed(4);
    let mut server_crashes = 0;
    let mut longest_wait = Duration::ZERO;

    for round in 1..=kills {
        let started = Instant::now();
        let mut worker = start_worker(&params);
        // Some die before they have done anything.
        if random.u64(..10) > 0 {
            wait_for_saves(&mut client, &mut worker, 1 + random.u64(..40));
            longest_wait = longest_wait.max(started.elapsed());
        }
        if round % (kills / SERVER_CRASHES) == 0 {
            if server_crashes % 2 == 0 {
                drop(client);
                server.crash();
                server.restart();
            } else {
                let pid = process_id(&mut client);
                kill_backend_and_wait(&server, pid);
            }
            server_crashes += 1;
            client = server.client();
            wait_for_saves(&mut client, &mut worker, 1 + random.u64(..40));
        }
        thread::sleep(Duration::from_micros(random.u64(..3_000)));
        worker.kill().expect("a child can be killed");
        worker.wait().expect("a killed child ends");
        check(&mut client);
    }

    // The stream ends a little beyond where they are, and one more worker gets there.
    let query = "UPDATE stream SET head = (SELECT max(\"offset\") FROM projection_checkpoints) + 40
                 RETURNING head";
    let head: i64 = client.query_one(query, &[]).unwrap().get(0);
    let mut worker = start_worker(&params);
    wait_until("the last worker is done", || worker.try_wait().expect("a child's state").is_some());
    let status = worker.wait().expect("it has ended");
    assert!(status.success(), "{}", output(&mut worker));
    check(&mut client);

    for projection in EXACTLY_ONCE.iter().chain(&AT_LEAST_ONCE) {
        let State { offset, applied, distinct, .. } = state(&mut client, projection);
        let row = Row {
            fault: match *projection {
                "locks" => "worker killed with kill -9, server crashed 10 times: `lock`, `save`",
                "projects" => "the same: `project`, two threads",
                "advances" => "the same: `get`, `advance` in the transaction",
                "checkpointer" => "the same: `Checkpointer` every 5 (applied twice: allowed)",
                _ => "the same: `Watermark`, 3 threads, every 5 (applied twice: allowed)",
            },
            times: kills,
            lost: usize::try_from(head - distinct).unwrap(),
            twice: usize::try_from(applied - distinct).unwrap(),
            errors: 0,
            longest_wait,
        };
        row.print();
        assert_eq!(offset, head, "{projection}");
        assert_eq!(row.lost, 0, "{projection}");
        // Between two saves, and what is in flight.
        let at_risk = usize::try_from(EVERY).unwrap() + WATERMARK_THREADS;
        let limit = if EXACTLY_ONCE.contains(projection) {
            0
        } else {
            at_risk * (kills + server_crashes * 3)
        };
        assert!(row.twice <= limit, "{projection}: {} twice", row.twice);
    }
}
