//! Handles events in several threads, and never checkpoints past one that is not handled.
//!
//! ```text
//! cargo run --release --example threaded_batch                 # 20,000 events, in memory
//!
//! export DATABASE_URL=postgres://app:secret@localhost/app      # keep it all in PostgreSQL
//! cargo run --release --example threaded_batch -- --crash-after 5000
//! cargo run --release --example threaded_batch                 # resumes; so it does after Ctrl-C
//! ```
//!
//! # Threads
//!
//! ```text
//!           events                     complete
//! reader ------------> 4 workers ------------------> watermark
//!    |                                                   |
//!    |      window     (begun, in stream order)          | passes an event
//!    +--------------------------------------------> main thread ---> checkpointer ---> store
//! ```
//!
//! * The reader begins each event in the [`Watermark`], and hands it to whichever worker is free.
//! * A worker handles the event, again after a while if that fails, and completes it. Meanwhile
//!   the other workers go on; the watermark stays before the event that is not complete.
//! * The main thread tells the [`Checkpointer`] of each event that the watermark has passed. That
//!   saves every 500 events or within one second, whichever comes first.
//!
//! Both channels are bounded, and so is everything that one slow event keeps waiting: the reader
//! waits when it is a thousand events beyond the checkpointer.
//!
//! A worker that cannot handle its event ends the run, and the next run goes on from the
//! checkpoint. A job that must go on instead puts the event aside, where somebody will look at it,
//! and completes it then.
//!
//! # The proof
//!
//! Before a worker completes an event it puts it on record: with `DATABASE_URL` in the table
//! `handled`, one row per event, created when it is missing. When the program starts, after each
//! save and at the end it reads the checkpoint from the store, and looks for an event up to there
//! that is not on record. If there is one, it says which, and exits with 1. So a run that ends well
//! after any number of crashes has handled each event at least once, and found the checkpoint of
//! every one of those crashes before the first event that was not handled.
//!
//! Without `DATABASE_URL` record and checkpoint are in memory, and a crash loses both: the next
//! run starts from the first event.

use std::collections::BTreeMap;
use std::env::{self, VarError};
use std::io::{self, Write as _};
use std::num::NonZeroU64;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle, Thread};
use std::time::Duration;
use std::{iter, mem, panic};

use anyhow::{Result, bail, ensure};
use checkpoint_store::postgres::types::Type;
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore, PostgresCheckpointStore,
    Watermark,
};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory as _, Parser, value_parser};

const PROJECTION: &str = "threaded-batch";
const CADENCE: Cadence = Cadence::every(500).or_within(Duration::from_secs(1));

/// How many events the reader may be ahead.
const WINDOW: usize = 1_000;
/// How long the main thread waits before it looks whether a save is due.
const TICK: Duration = Duration::from_millis(100);
/// How often a worker tries an event, and how much longer it waits after each failure.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// Set by Ctrl-C: the reader reads no further.
static STOP: AtomicBool = AtomicBool::new(false);

const MORE_HELP: &str = "\
Ctrl-C handles what was begun, saves the checkpoint and ends; a second one ends
at once.

Environment:
  DATABASE_URL  the PostgreSQL database to keep the checkpoint and the record of
                handled events in; without it they are in memory

Exit code:
  0  all events are handled, or Ctrl-C was pressed
  1  a failure, or the proof failed
  2  the command line makes no sense";

/// Handles events in several threads, and resumes where it was
#[derive(Parser)]
#[command(name = "threaded_batch", after_help = MORE_HELP, args_override_self = true)]
struct Arguments {
    /// How many threads handle events, 1 to 1000
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        value_parser = value_parser!(u16).range(1..=1_000),
        allow_negative_numbers = true
    )]
    workers: u16,

    /// How many events the stream has
    #[arg(
        long,
        value_name = "N",
        default_value_t = 20_000,
        value_parser = value_parser!(i64).range(1..),
        allow_negative_numbers = true
    )]
    events: i64,

    /// Abort the process once this run has handled N events; the last one is then on record, but
    /// not complete
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    crash_after: Option<NonZeroU64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|mut error| {
        // With a value that makes no sense clap does not show the usage by itself.
        let usage = Arguments::command().render_usage();
        error.insert(ContextKind::Usage, ContextValue::StyledStr(usage));
        error.exit()
    });
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            process::exit(1);
        }
    })?;
    match env::var("DATABASE_URL") {
        Ok(url) => {
            let store = PostgresCheckpointStore::connect(&url)?;
            store.migrate()?;
            let record = InPostgres::open(&store)?;
            handle_all(arguments, &store, &record)
        }
        Err(VarError::NotPresent) => {
            let store = MemoryCheckpointStore::new();
            writeln!(io::stdout(), "in memory: a crash loses the record and the checkpoint")?;
            handle_all(arguments, &store, &InMemory::default())
        }
        // Its own message would show the value, password and all.
        Err(VarError::NotUnicode(_)) => bail!("DATABASE_URL is not valid Unicode"),
    }
}

/// Starts the threads, checkpoints what they handle, and reports.
fn handle_all(
    arguments: &Arguments,
    store: &dyn CheckpointStore,
    record: &dyn Record,
) -> Result<()> {
    let mut proof = Proof { store, record, proved: 0 };
    let mut checkpointer = Checkpointer::resume(store, PROJECTION, CADENCE)?;
    let checkpoint = proof.check()?;
    writeln!(io::stdout(), "starts after checkpoint {checkpoint}, each event up to it on record")?;

    let job = &Job {
        record,
        watermark: Watermark::starting_at(checkpointer.offset()),
        crash_after: arguments.crash_after.map(NonZeroU64::get),
        handled: AtomicU64::new(0),
        repeated: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    let unread = checkpointer.offset() + 1..=arguments.events;
    let (to_workers, events) = sync_channel(WINDOW);
    let (to_window, window) = sync_channel(WINDOW);
    thread::scope(|scope| {
        // Each thread owns its end of a channel: when it ends, so do those at the other ends.
        let reader = scope.spawn(move || job.read(unread, &to_window, &to_workers));
        let events = Arc::new(Mutex::new(events));
        let workers: Vec<_> = iter::repeat_n(events, arguments.workers.into())
            .map(|events| {
                let checkpointing = thread::current();
                scope.spawn(move || job.work(&events, &checkpointing))
            })
            .collect();
        let saved = job.checkpoint(window, &mut checkpointer, &mut proof);
        let threads = iter::once(reader).chain(workers);
        threads.map(outcome).fold(saved, Result::and)
    })?;

    proof.report(job, checkpointer.pending(), arguments.events)
}

fn outcome(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// What the threads share.
struct Job<'a> {
    record: &'a dyn Record,
    watermark: Watermark,
    crash_after: Option<u64>,
    handled: AtomicU64,
    repeated: AtomicU64,
    /// Whether a worker is gone, and its event with it: the watermark will never pass that one.
    failed: AtomicBool,
}

impl Job<'_> {
    /// The reader. Here the events are numbers; they might as well come from a table or a file,
    /// and their offsets leave gaps.
    fn read(
        &self,
        unread: impl Iterator<Item = i64>,
        window: &SyncSender<i64>,
        workers: &SyncSender<i64>,
    ) -> Result<()> {
        for event in unread {
            if STOP.load(Ordering::Relaxed) {
                break;
            }
            self.watermark.begin(event)?;
            if window.send(event).is_err() || workers.send(event).is_err() {
                break; // those who fail say why themselves
            }
        }
        Ok(())
    }

    /// A worker. Ctrl-C does not stop it: it ends when all that was read is handled.
    fn work(&self, events: &Mutex<Receiver<i64>>, checkpointing: &Thread) -> Result<()> {
        let alarm = Alarm(&self.failed);
        let next = || events.lock().unwrap_or_else(PoisonError::into_inner).recv();
        while let Ok(event) = next() {
            self.handle_until_it_works(event)?;
            // What this returns may be old news by the time that another thread hears of it; the
            // main thread asks the watermark itself.
            self.watermark.complete(event)?;
            checkpointing.unpark();
        }
        mem::forget(alarm);
        Ok(())
    }

    fn handle_until_it_works(&self, event: i64) -> Result<()> {
        let mut attempt = 1;
        while let Err(error) = self.handle(event, attempt) {
            if attempt == ATTEMPTS {
                return Err(error.context(format!("event {event} failed {ATTEMPTS} times")));
            }
            thread::sleep(PAUSE * attempt);
            attempt += 1;
            self.repeated.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where the work of a real job is done. An event may come twice, so it must do no harm then.
    fn handle(&self, event: i64, attempt: u32) -> Result<()> {
        ensure!(attempt > failures(event), "out of order, try again");
        self.record.add(event)?;
        let handled = self.handled.fetch_add(1, Ordering::Relaxed) + 1;
        if self.crash_after == Some(handled) {
            eprintln!("crash: {handled} events were handled");
            process::abort();
        }
        Ok(())
    }

    /// The main thread: saves as events pass the watermark, and what is left at the end.
    fn checkpoint(
        &self,
        window: Receiver<i64>,
        checkpointer: &mut Checkpointer<&dyn CheckpointStore>,
        proof: &mut Proof<'_>,
    ) -> Result<()> {
        loop {
            let saved = match window.recv_timeout(TICK) {
                Ok(event) => {
                    if !self.wait_for(event, checkpointer, proof)? {
                        break;
                    }
                    // The checkpointer hears of every single event, not only of where the
                    // watermark has jumped to: it counts what it hears of, so 500 are 500.
                    checkpointer.processed(event)?
                }
                Err(RecvTimeoutError::Timeout) => checkpointer.save_if_due()?,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            proof.check_if(saved)?;
        }
        drop(window); // the reader stops, if it has not yet
        let saved = checkpointer.flush()?;
        proof.check_if(saved)
    }

    /// Waits until the watermark passes the event, and returns false when that can never be.
    fn wait_for(
        &self,
        event: i64,
        checkpointer: &mut Checkpointer<&dyn CheckpointStore>,
        proof: &mut Proof<'_>,
    ) -> Result<bool> {
        while self.watermark.offset() < event {
            if self.failed.load(Ordering::Relaxed) {
                return Ok(false);
            }
            thread::park_timeout(TICK); // until a worker completes an event
            proof.check_if(checkpointer.save_if_due()?)?;
        }
        Ok(true)
    }
}

/// Raised when a worker ends before its time, by an error or by a panic.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How often an event fails before it can be handled: one in 100 once, one in 100 twice.
fn failures(event: i64) -> u32 {
    match fastrand::Rng::with_seed(event.unsigned_abs()).u8(..100) {
        0 => 1,
        1 => 2,
        _ => 0,
    }
}

/// Holds the checkpoint in the store against the record of what was handled.
struct Proof<'a> {
    store: &'a dyn CheckpointStore,
    record: &'a dyn Record,
    /// Each event up to here was on record already.
    proved: i64,
}

impl Proof<'_> {
    /// Looks for an event up to the checkpoint that is not on record, and returns the checkpoint.
    fn check(&mut self) -> Result<i64> {
        let checkpoint = self.store.get(PROJECTION)?;
        if let Some(event) = self.record.first_missing(self.proved, checkpoint)? {
            bail!("the checkpoint is at {checkpoint}, and event {event} was never handled");
        }
        self.proved = checkpoint;
        Ok(checkpoint)
    }

    fn check_if(&mut self, saved: bool) -> Result<()> {
        if saved {
            let checkpoint = self.check()?;
            writeln!(io::stdout(), "saved checkpoint {checkpoint}, each event up to it on record")?;
        }
        Ok(())
    }

    fn report(mut self, job: &Job<'_>, pending: u64, events: i64) -> Result<()> {
        let stopped = STOP.load(Ordering::Relaxed);
        self.proved = 0; // once more, from the first event
        let checkpoint = self.check()?;
        let totals = self.record.totals()?;
        let mut out = io::stdout().lock();
        writeln!(out, "{}", if stopped { "stopped" } else { "finished" })?;
        writeln!(out, "checkpoint: {checkpoint}, not saved: {pending}")?;
        writeln!(out, "handled in this run: {}", job.handled.load(Ordering::Relaxed))?;
        writeln!(out, "tried again in this run: {}", job.repeated.load(Ordering::Relaxed))?;
        writeln!(out, "handled in all runs: {}", totals.handled)?;
        writeln!(out, "handled more than once: {}", totals.more_than_once)?;
        ensure!(
            stopped || checkpoint >= events,
            "the checkpoint is at {checkpoint}, not at {events}"
        );
        writeln!(out, "proved: each event from 1 to {checkpoint} was handled at least once")?;
        Ok(())
    }
}

/// Which events were handled, and how often.
trait Record: Sync {
    fn add(&self, event: i64) -> Result<()>;

    /// The first event after `from` and up to `to` that is not on record.
    fn first_missing(&self, from: i64, to: i64) -> Result<Option<i64>>;

    fn totals(&self) -> Result<Totals>;
}

struct Totals {
    handled: i64,
    more_than_once: i64,
}

struct InPostgres<'a> {
    store: &'a PostgresCheckpointStore,
}

impl<'a> InPostgres<'a> {
    fn open(store: &'a PostgresCheckpointStore) -> Result<Self> {
        let mut client = store.connection()?;
        let mut tx = client.transaction()?;
        // `CREATE TABLE IF NOT EXISTS` fails when two run at once; under the lock they take turns.
        store.in_transaction(&mut tx).lock(PROJECTION)?;
        tx.batch_execute(
            "CREATE TABLE IF NOT EXISTS handled (event BIGINT PRIMARY KEY, times BIGINT NOT NULL)",
        )?;
        tx.commit()?;
        Ok(Self { store })
    }
}

impl Record for InPostgres<'_> {
    fn add(&self, event: i64) -> Result<()> {
        self.store.connection()?.execute_typed(
            "INSERT INTO handled AS stored VALUES ($1, 1)
             ON CONFLICT (event) DO UPDATE SET times = stored.times + 1",
            &[(&event, Type::INT8)],
        )?;
        Ok(())
    }

    fn first_missing(&self, from: i64, to: i64) -> Result<Option<i64>> {
        let missing = self.store.connection()?.query_typed(
            "SELECT event FROM generate_series($1 + 1, $2) AS event
             WHERE NOT EXISTS (SELECT FROM handled WHERE handled.event = event.event)
             ORDER BY event LIMIT 1",
            &[(&from, Type::INT8), (&to, Type::INT8)],
        )?;
        Ok(missing.first().map(|row| row.try_get(0)).transpose()?)
    }

    fn totals(&self) -> Result<Totals> {
        let totals = self.store.connection()?.query_typed_one(
            "SELECT COALESCE(sum(times), 0)::BIGINT, count(*) FILTER (WHERE times > 1)
             FROM handled",
            &[],
        )?;
        Ok(Totals { handled: totals.try_get(0)?, more_than_once: totals.try_get(1)? })
    }
}

#[derive(Default)]
struct InMemory {
    times: Mutex<BTreeMap<i64, i64>>,
}

impl InMemory {
    fn times(&self) -> MutexGuard<'_, BTreeMap<i64, i64>> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record for InMemory {
    fn add(&self, event: i64) -> Result<()> {
        *self.times().entry(event).or_default() += 1;
        Ok(())
    }

    fn first_missing(&self, from: i64, to: i64) -> Result<Option<i64>> {
        let times = self.times();
        Ok((from + 1..=to).find(|event| !times.contains_key(event)))
    }

    fn totals(&self) -> Result<Totals> {
        let times = self.times();
        let handled = times.values().sum();
        let more_than_once = times.values().filter(|&&times| times > 1).map(|_| 1).sum();
        Ok(Totals { handled, more_than_once })
    }
}
