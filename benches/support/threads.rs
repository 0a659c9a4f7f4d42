use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use checkpoint_store::{Cadence, Checkpointer, PostgresCheckpointStore};

use super::Server;
use super::harness::server_program;
use super::saves::SAVE;

/// How long all threads take for their work, from when the first one begins.
pub(crate) fn in_threads(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let ready = Barrier::new(threads);
    let times: Vec<_> = thread::scope(|scope| {
        let (ready, work) = (&ready, &work);
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    ready.wait();
                    let begun = Instant::now();
                    work(thread);
                    (begun, Instant::now())
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    let begun = times.iter().map(|times| times.0).min().expect("a thread");
    let ended = times.iter().map(|times| times.1).max().expect("a thread");
    ended - begun
}

/// How long it takes until every thread has done something so many times, to a projection of its
/// own and with an offset that goes up.
pub(crate) fn times_each(
    threads: usize,
    times: u64,
    operation: impl Fn(&str, i64) + Sync,
) -> Duration {
    in_threads(threads, |thread| {
        let projection = thread.to_string();
        for offset in 0..i64::try_from(times).expect("not so many") {
            operation(&projection, offset);
        }
    })
}

/// The same for a `Checkpointer` each, that saves after every event.
pub(crate) fn checkpointed_each(
    threads: usize,
    times: u64,
    store: &PostgresCheckpointStore,
) -> Duration {
    in_threads(threads, |thread| {
        let name = format!("checkpointer {thread}");
        let mut checkpointer =
            Checkpointer::resume(store, name, Cadence::every(1)).expect("resumed");
        for _ in 0..times {
            let next = checkpointer.offset() + 1;
            checkpointer.processed(next).expect("saved");
        }
    })
}

/// Does something while so many other threads keep the processors busy.
pub(crate) fn beside_busy_threads<T>(threads: usize, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Stores that threads share, each with 8 connections, however many the threads are.
pub(crate) struct SharedStores {
    pub(crate) ours: PostgresCheckpointStore,
    pub(crate) prepared: PostgresCheckpointStore,
    pub(crate) grouped: PostgresCheckpointStore,
    pub(crate) grouped_prepared: PostgresCheckpointStore,
}

impl SharedStores {
    pub(crate) fn new(server: &Server) -> Self {
        let store = |prepared, grouped| {
            PostgresCheckpointStore::builder()
                .max_connections(8)
                .prepared_statements(prepared)
                .group_commit(grouped)
                .connect(&server.params())
                .expect("a store")
        };
        Self {
            ours: store(false, false),
            prepared: store(true, false),
            grouped: store(false, true),
            grouped_prepared: store(true, true),
        }
    }
}

pub(crate) fn has_pgbench() -> bool {
    server_program("pgbench").arg("--version").output().is_ok()
}

/// The same by `pgbench -M prepared`, which comes with PostgreSQL and has a connection for each
/// projection. Without the time that it takes to connect.
pub(crate) fn pgbench(server: &Server, connections: usize, times: u64) -> Duration {
    let script = tempfile::NamedTempFile::new().expect("a file");
    let save = SAVE.replace("$1", ":client_id").replace("$2", ":number");
    fs::write(script.path(), format!("\\set number :number + 1\n{save}")).expect("a script");
    let readable_by_all = fs::Permissions::from_mode(0o644);
    fs::set_permissions(script.path(), readable_by_all).expect("own file");

    let cores = thread::available_parallelism().map_or(1, usize::from);
    let output = server_program("pgbench")
        .args(["--no-vacuum", "--protocol=prepared", "--define=number=0"])
        .args(["--host=127.0.0.1", &format!("--port={}", server.port()), "--username=postgres"])
        .arg(format!("--client={connections}"))
        .arg(format!("--jobs={}", connections.min(cores)))
        .arg(format!("--transactions={times}"))
        .arg(format!("--file={}", script.path().display()))
        .arg("postgres")
        .output()
        .expect("pgbench runs");
    let report = String::from_utf8_lossy(&output.stdout);
    // Before version 14 there are two such lines, the second without the time to connect.
    let rate: f64 = report
        .lines()
        .filter_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok())
        .next_back()
        .unwrap_or_else(|| panic!("pgbench: {}", String::from_utf8_lossy(&output.stderr)));
    Duration::from_secs_f64(times as f64 * connections as f64 / rate)
}

/// What the memory store is compared with: a map behind a lock that does the same, and does not
/// ask whether name and offset are valid.
#[derive(Default)]
pub(crate) struct BareMap(Mutex<HashMap<String, (i64, SystemTime)>>);

impl BareMap {
    pub(crate) fn save(&self, projection: &str, offset: i64) {
        let mut rows = self.0.lock().expect("no panic");
        let row = (offset, SystemTime::now());
        match rows.get_mut(projection) {
            Some(stored) => *stored = row,
            None => drop(rows.insert(projection.to_owned(), row)),
        }
    }

    pub(crate) fn get(&self, projection: &str) -> i64 {
        self.0.lock().expect("no panic").get(projection).map_or(0, |row| row.0)
    }
}
