//! Handles the lines of a file in several threads, each at least once, and resumes where it stopped.
//!
//! ```text
//! cargo run --release --example threaded_batch  # a file of 200,000 lines of its own, the checkpoint in memory
//! DATABASE_URL=postgres://app:secret@localhost/app cargo run --release --example threaded_batch -- orders.txt 16
//! ```
//!
//! It is for work outside of the database; for work in it see `exactly_once.rs`. A line's offset is the byte
//! position behind it: a restart seeks there, and the file's length is the stream head. The path is the projection.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{JoinHandle, sleep, spawn};
use std::{env, mem, process, str, sync::Mutex, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, Retry, Watermark};
use checkpoint_store::{MemoryCheckpointStore, PostgresCheckpointStore};
use indicatif::{ProgressBar, ProgressStyle};

/// How many bytes the reader may be ahead of the checkpoint. It bounds memory, and what a crash repeats.
const WINDOW: u64 = 32 << 20;
const SAVE_INTERVAL: Duration = Duration::from_millis(250);
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(10);
/// How many lines that failed are put aside. One more ends the run; with 0 the first one does.
const MAX_PUT_ASIDE: u64 = 100;

static STOP: AtomicBool = AtomicBool::new(false);
static SAVED: AtomicU64 = AtomicU64::new(0); // the checkpoint
static LINES: AtomicU64 = AtomicU64::new(0);
static REPEATED: AtomicU64 = AtomicU64::new(0);
static PUT_ASIDE: AtomicU64 = AtomicU64::new(0);

type Workers = Vec<JoinHandle<Result<()>>>;
struct Line(u64, u64, Vec<u8>); // start, end, and text, with its `\n` or `\r\n` if it has one

/// The work, such as a call of a search index. A crash repeats it, so it must be idempotent: this writes
/// the line in upper case, at its place, into another file. Returns whether the line was there already.
fn handle(Line(start, end, text): &Line, output: &mut File) -> Result<bool> {
    let (text, mut last) = (str::from_utf8(text)?.to_ascii_uppercase(), [0]);
    output.seek(SeekFrom::Start(end - 1))?;
    let is_there = output.read(&mut last)? == 1 && last != [0];
    output.seek(SeekFrom::Start(*start))?;
    output.write_all(text.as_bytes())?;
    Ok(is_there)
}

struct Job {
    path: String,
    file: Mutex<BufReader<File>>,
    watermark: Watermark,
    bar: ProgressBar,
}

impl Job {
    /// Reads a line and begins it, under one lock: lines begin in their order.
    fn next(&self) -> Result<Option<Line>> {
        let (mut file, mut text) = (self.file.lock().expect("no panic"), Vec::new());
        while !STOP.load(SeqCst) {
            let has_room = file.stream_position()? <= SAVED.load(SeqCst) + WINDOW;
            if has_room && file.read_until(b'\n', &mut text)? == 0 && text.is_empty() {
                break;
            } else if !has_room || (!text.ends_with(b"\n") && is_growing(file.get_ref())?) {
                sleep(PAUSE); // the rest of an unfinished line is appended to `text`
                continue;
            }
            let (end, text) = (file.stream_position()?, mem::take(&mut text));
            if self.watermark.begin(end.try_into()?).is_ok() {
                return Ok(Some(Line(end - text.len() as u64, end, text)));
            } // otherwise it ends at the checkpoint, or before
        }
        Ok(None)
    }

    fn work(&self) -> Result<()> {
        let mut output = self.open("out")?;
        while let Some(line) = self.next()? {
            let mut attempt = |number| {
                sleep(PAUSE * number);
                let outcome = catch_unwind(AssertUnwindSafe(|| handle(&line, &mut output)));
                outcome.unwrap_or_else(|_| Err(anyhow!("panicked")))
            };
            match (1..ATTEMPTS).fold(attempt(0), |ended, next| ended.or_else(|_| attempt(next))) {
                Ok(is_repeated) => drop(REPEATED.fetch_add(is_repeated.into(), SeqCst)),
                Err(error) => {
                    let reason = format!("bytes {} to {}: {error:#}\n", line.0, line.1);
                    ensure!(PUT_ASIDE.fetch_add(1, SeqCst) < MAX_PUT_ASIDE, reason);
                    self.open("aside")?.write_all(reason.as_bytes())?;
                }
            }
            self.watermark.complete(line.1.try_into()?)?;
            LINES.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    fn save(&self, mut to: Checkpointer<impl CheckpointStore>, workers: Workers) -> Result<()> {
        let (output, mut is_last) = (self.open("out")?, false);
        while !is_last || to.saved() < to.offset() {
            sleep(SAVE_INTERVAL);
            is_last = workers.iter().all(JoinHandle::is_finished);
            let done = self.watermark.offset();
            output.sync_data()?; // what is saved as done survives a power failure
            to.processed(done).or_else(|it| if it.is_transient() { Ok(false) } else { Err(it) })?;
            SAVED.store(to.saved().unsigned_abs(), SeqCst);
        }
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    }

    fn open(&self, kind: &str) -> Result<File> {
        let (mut options, path) = (File::options(), format!("{}.{kind}", self.path));
        Ok(options.read(true).write(true).create(true).append(kind == "aside").open(path)?)
    }

    fn progress(&self) -> String {
        let [lines, again, aside] = [&LINES, &REPEATED, &PUT_ASIDE].map(|count| count.load(SeqCst));
        let (seconds, saved) = (self.bar.elapsed().as_secs().max(1), SAVED.load(SeqCst));
        let (rate, unsaved) = (lines / seconds, self.watermark.offset().unsigned_abs() - saved);
        format!(
            "{lines} lines in {seconds} s, {rate}/s, {again} repeated, {aside} put aside; \
             checkpoint at byte {saved}, a crash repeats {unsaved} bytes"
        )
    }
}

/// Whether somebody may be writing to the file, so that a last line without a newline is unfinished.
fn is_growing(file: &File) -> Result<bool> {
    Ok(file.metadata()?.modified()?.elapsed().is_ok_and(|age| age < Duration::from_secs(2)))
}

fn say_what_it_waits_for(retry: &Retry<'_>, bar: &ProgressBar) {
    if retry.attempt == 1 {
        bar.suspend(|| eprintln!("waits for the database: {}", retry.error.report()));
    }
}

fn store(bar: ProgressBar) -> Result<Box<dyn CheckpointStore>> {
    let url = env::var("DATABASE_URL");
    let Ok(url) = url else { return Ok(Box::new(MemoryCheckpointStore::new())) };
    let say = move |retry: &Retry<'_>| say_what_it_waits_for(retry, &bar);
    let store = PostgresCheckpointStore::builder().on_retry(say).connect(&url)?;
    store.migrate()?;
    Ok(Box::new(store))
}

fn sample() -> Result<String> {
    let path = format!("{}/threaded_batch.txt", env::temp_dir().display());
    println!("writes {path}");
    fs::write(&path, (1..=200_000).fold(String::new(), |text, n| text + &format!("order {n}\n")))?;
    Ok(path)
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().map_or_else(sample, Ok)?;
    let path = fs::canonicalize(&path).context(path)?.display().to_string();
    let workers = arguments.next().map_or(Ok(4), |it| it.parse()).context("number of workers")?;
    let mut file = BufReader::new(File::open(&path)?);
    let length = file.get_ref().metadata()?.len();
    let bar = ProgressBar::new(length);
    let checkpointer = Checkpointer::resume(store(bar.clone())?, &path, Cadence::every(1))?;
    let offset = checkpointer.offset().unsigned_abs();
    println!("{path}: resumes behind byte {offset} of {length}");
    ensure!(offset <= length, "the file is shorter than its checkpoint");
    SAVED.store(offset, SeqCst);
    // A line before the checkpoint that had no newline may have grown. It is found from the front.
    file.seek(SeekFrom::Start(offset.saturating_sub(1)))?;
    let start = if file.fill_buf()?.starts_with(b"\n") { offset } else { 0 };
    file.seek(SeekFrom::Start(start))?;
    let watermark = Watermark::starting_at(checkpointer.offset());
    bar.update(|state| state.set_pos(offset));
    bar.reset_eta();
    bar.set_style(ProgressStyle::with_template("{bar} {percent} %, {eta} left, {wide_msg}")?);
    let job: &Job = Box::leak(Box::new(Job { path, file: Mutex::new(file), watermark, bar }));
    ctrlc::set_handler(|| {
        STOP.store(true, SeqCst);
        sleep(Duration::from_millis(700)); // the lines in hand and the last save may take so long
        println!("ended without the last save: {}", job.progress());
        process::exit(0);
    })?;
    let worker = move |_| spawn(move || job.work().inspect_err(|_| STOP.store(true, SeqCst)));
    let saver = spawn(move || job.save(checkpointer, (0..workers.max(1)).map(worker).collect()));
    let mut told = 0;
    while !saver.is_finished() {
        sleep(PAUSE);
        job.bar.set_position(job.watermark.offset().unsigned_abs());
        job.bar.set_message(job.progress());
        if job.bar.is_hidden() && job.bar.elapsed().as_secs() >= told + 10 {
            told += 10;
            eprintln!("{}", job.progress());
        }
    }
    job.bar.finish_and_clear();
    saver.join().expect("no panic")?;
    println!("{}", job.progress());
    Ok(())
}
