//! Handles events in several threads, and never checkpoints past one that is not handled.
//!
//! ```text
//! cargo run --release --example threaded_batch               # 20,000 events, 4 workers, in memory
//! cargo run --release --example threaded_batch -- 100000 16  # so many events, so many workers
//!
//! export DATABASE_URL=postgres://app:secret@localhost/app    # the checkpoint in PostgreSQL
//! cargo run --release --example threaded_batch -- 100000     # Ctrl-C or kill it, and run it again
//! ```
//!
//! It is for work outside of the database, which cannot be committed together with its checkpoint. So
//! each event is handled at least once. (Inside of the database do as `exactly_once.rs` does.)
//!
//! * The main thread begins each event in the [`Watermark`], in the order of the stream, and queues it.
//!   It tells the [`Checkpointer`] how far the watermark has come.
//! * A worker takes an event, handles it, again after a while if that fails, and completes it. The
//!   watermark stays before an event that is not complete, whatever comes after it.
//!
//! A worker that cannot handle its event ends the run, and the next run begins before that event. A job
//! that must go on puts such an event aside, where somebody will look at it, and completes it.

use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;
use std::{env, panic};

use anyhow::{Context as _, Result, ensure};
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore, PostgresCheckpointStore,
    Watermark,
};

const CADENCE: Cadence = Cadence::every(500).or_within(Duration::from_secs(1));
/// How far the reader may be ahead of the watermark: behind a slow event no more than these are handled.
const WINDOW: i64 = 1_000;
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

static STOP: AtomicBool = AtomicBool::new(false);

/// What the threads share.
struct Job<'a> {
    watermark: Watermark,
    queue: Mutex<Receiver<i64>>,
    database: Option<&'a PostgresCheckpointStore>,
}

impl Job<'_> {
    /// A worker. It ends when the queue is closed and empty.
    fn work(&self) -> Result<()> {
        let next = || self.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        while let Ok(event) = next() {
            let mut attempt = 1;
            while let Err(error) = self.handle(event, attempt) {
                if attempt == ATTEMPTS {
                    return Err(error.context(format!("event {event} failed {ATTEMPTS} times")));
                }
                thread::sleep(PAUSE * attempt);
                attempt += 1;
            }
            self.watermark.complete(event)?;
        }
        Ok(())
    }

    /// The work itself. An event may come twice, after a crash, and must do no harm then. This one
    /// counts how often it came, if there is a database to count in.
    fn handle(&self, event: i64, attempt: u32) -> Result<()> {
        ensure!(event % 100 != 0 || attempt > 1, "busy, try again later");
        if let Some(database) = self.database {
            let count = "INSERT INTO handled AS h VALUES ($1, 1)
                         ON CONFLICT (event) DO UPDATE SET times = h.times + 1";
            database.connection()?.execute(count, &[&event])?;
        }
        Ok(())
    }

    /// The main thread: begins the events up to `last`, and checkpoints while they are completed.
    fn feed(
        &self,
        last: i64,
        to_workers: SyncSender<i64>,
        workers: &[ScopedJoinHandle<'_, Result<()>>],
        checkpointer: &mut Checkpointer<&dyn CheckpointStore>,
    ) -> Result<()> {
        let has_failed = || workers.iter().any(ScopedJoinHandle::is_finished);
        let is_over = || STOP.load(Ordering::Relaxed) || has_failed();
        for event in checkpointer.offset() + 1..=last {
            while event - checkpointer.offset() > WINDOW && !is_over() {
                thread::sleep(PAUSE);
                self.checkpoint(checkpointer)?;
            }
            if is_over() {
                break;
            }
            self.watermark.begin(event)?;
            to_workers.send(event)?;
            self.checkpoint(checkpointer)?;
        }
        drop(to_workers); // closes the queue
        while !workers.iter().all(ScopedJoinHandle::is_finished) {
            thread::sleep(PAUSE);
            self.checkpoint(checkpointer)?;
        }
        Ok(())
    }

    fn checkpoint(&self, checkpointer: &mut Checkpointer<&dyn CheckpointStore>) -> Result<()> {
        let mut save = || {
            // Of each event, not of the last one alone: the checkpointer counts what it is told of.
            for event in checkpointer.offset() + 1..=self.watermark.offset() {
                if checkpointer.processed(event)? {
                    println!("saved checkpoint {event}");
                }
            }
            checkpointer.save_if_due()
        };
        match save() {
            Err(error) if error.is_transient() => {
                eprintln!("saved later: {}", error.report());
                thread::sleep(100 * PAUSE);
            }
            saved => drop(saved?),
        }
        Ok(())
    }
}

fn run() -> Result<()> {
    let (last, workers) = (argument(1, 20_000)?, argument(2, 4)?);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            process::exit(1); // the second Ctrl-C does not wait
        }
    })?;
    let (memory, database) = (MemoryCheckpointStore::new(), database()?);
    let store = database.as_ref().map_or(&memory as &dyn CheckpointStore, |database| database);

    let mut checkpointer = Checkpointer::resume(store, "threaded-batch", CADENCE)?;
    println!("resumes after event {}", checkpointer.offset());
    let watermark = Watermark::starting_at(checkpointer.offset());
    let (to_workers, queue) = sync_channel(usize::try_from(WINDOW)?);
    let job = &Job { watermark, queue: Mutex::new(queue), database: database.as_ref() };
    let ended = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(|| job.work())).collect();
        let fed = job.feed(last, to_workers, &workers, &mut checkpointer);
        workers.into_iter().fold(fed, |ended, worker| {
            ended.and(worker.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
        })
    });
    // However it has ended, what is handled is saved.
    let saved = job.checkpoint(&mut checkpointer).and_then(|()| Ok(checkpointer.flush()?));
    println!("ends after event {}", checkpointer.saved());
    ended.and(saved.map(drop))
}

fn argument(place: usize, usual: i64) -> Result<i64> {
    let Some(text) = env::args().nth(place) else { return Ok(usual) };
    text.parse().with_context(|| text)
}

fn database() -> Result<Option<PostgresCheckpointStore>> {
    let Some(url) = env::var_os("DATABASE_URL") else { return Ok(None) };
    let url = url.to_str().context("DATABASE_URL is not UTF-8")?;
    // While the database is away who checkpoints waits so long, and at Ctrl-C a few times.
    let patience = Duration::from_secs(3);
    let store = PostgresCheckpointStore::builder().connection_timeout(patience).connect(url)?;
    store.migrate()?;
    store.connection()?.batch_execute(
        "CREATE TABLE IF NOT EXISTS handled (event bigint PRIMARY KEY, times bigint NOT NULL)",
    )?;
    Ok(Some(store))
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
