//! The threaded job, `examples/threaded_batch.rs`, run as its users run it: as a process.
//!
//! It writes each line that it has handled, in upper case, to its place in another file. That is the
//! record against which its checkpoint is held: every line before the checkpoint must be there.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};
use tempfile::TempDir;

use crate::harness::{self, Options, Running, Server, failure, stderr, success};

/// What the example says of itself.
const WINDOW: usize = 32 << 20;
const MAX_PUT_ASIDE: u64 = 100;

fn batch(arguments: &[&str]) -> Command {
    let mut batch = harness::example("threaded_batch", "threaded_batch.rs");
    batch.args(arguments);
    batch
}

/// A file to handle, in a folder of its own, and what the example makes of it.
struct Input {
    folder: TempDir,
    bytes: Vec<u8>,
}

impl Input {
    fn new(bytes: impl Into<Vec<u8>>) -> Self {
        let input = Self { folder: tempfile::tempdir().unwrap(), bytes: bytes.into() };
        fs::write(input.path(), &input.bytes).unwrap();
        input
    }

    fn lines(number: usize) -> Self {
        let lines: Vec<_> = (0..number).map(|line| format!("line {line}\n")).collect();
        Self::new(lines.concat())
    }

    fn path(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("input.txt")
    }

    /// The file's path, which is the projection's name too.
    fn name(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    /// What the example has written so far, to the file with this ending.
    fn written(&self, ending: &str) -> Vec<u8> {
        fs::read(format!("{}.{ending}", self.name())).unwrap_or_default()
    }

    fn append(&mut self, bytes: &[u8]) {
        let mut file = File::options().append(true).open(self.path()).unwrap();
        file.write_all(bytes).unwrap();
        self.bytes.extend(bytes);
    }

    /// How far into the file something is written.
    fn reach(&self) -> usize {
        let file = fs::metadata(format!("{}.out", self.name()));
        file.map_or(0, |file| file.len().try_into().unwrap())
    }

    /// Makes the file one that is being written to until the value is dropped, however slow the test is.
    fn keep_open(&self) -> KeptOpen {
        let (end, ended) = channel();
        let file = File::options().append(true).open(self.path()).unwrap();
        let thread = thread::spawn(move || {
            while ended.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
                file.set_modified(SystemTime::now()).unwrap();
            }
        });
        KeptOpen(Some((end, thread)))
    }

    #[track_caller]
    fn check_handled(&self, checkpoint: usize) {
        let (output, expected) = (self.written("out"), self.bytes.to_ascii_uppercase());
        let is_there = output.get(..checkpoint).is_some_and(|it| it == &expected[..checkpoint]);
        assert!(is_there, "not every line before the checkpoint, {checkpoint}, was handled");
    }

    /// How many lines behind the checkpoint were handled: those whose last byte is written.
    fn handled_behind(&self, checkpoint: usize) -> u64 {
        let output = self.written("out");
        let ends = self.bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        let behind = ends.filter(|&(end, _)| end >= checkpoint);
        behind.filter(|&(end, _)| output.get(end) == Some(&b'\n')).count() as u64
    }

    fn run(&self, workers: u16) -> Told {
        let output = batch(&[&self.name(), &workers.to_string()]).output().unwrap();
        Told::from(&success(&output))
    }
}

struct KeptOpen(Option<(Sender<()>, JoinHandle<()>)>);

impl Drop for KeptOpen {
    fn drop(&mut self) {
        let (end, thread) = self.0.take().expect("taken only here");
        drop(end);
        thread.join().expect("no panic");
    }
}

/// The last line of what it says.
#[derive(Debug, PartialEq)]
struct Told {
    lines: u64,
    repeated: u64,
    put_aside: u64,
    checkpoint: usize,
    unsaved: u64,
}

impl Told {
    #[track_caller]
    fn from(told: &str) -> Self {
        let last = told.lines().last().unwrap_or_default();
        let numbers: Vec<u64> = last
            .split(|character: char| !character.is_ascii_digit())
            .filter_map(|number| number.parse().ok())
            .collect();
        let [lines, _seconds, _rate, repeated, put_aside, checkpoint, unsaved] = numbers[..] else {
            panic!("{told}");
        };
        let checkpoint = usize::try_from(checkpoint).unwrap();
        Self { lines, repeated, put_aside, checkpoint, unsaved }
    }

    fn all(lines: u64, input: &Input) -> Self {
        Self { lines, repeated: 0, put_aside: 0, checkpoint: input.bytes.len(), unsaved: 0 }
    }
}

/// A database of its own.
struct Database {
    url: String,
    client: Client,
    store: PostgresCheckpointStore,
}

impl Database {
    fn fresh() -> Self {
        Self::at(harness::fresh_database())
    }

    fn at(url: String) -> Self {
        let client = harness::client(&url);
        let store = PostgresCheckpointStore::builder().max_connections(1).connect(&url).unwrap();
        store.migrate().unwrap();
        Self { url, client, store }
    }

    fn batch(&self, input: &Input, workers: u16) -> Command {
        let mut batch = batch(&[&input.name(), &workers.to_string()]);
        batch.env("DATABASE_URL", &self.url);
        batch
    }

    fn run(&self, input: &Input, workers: u16) -> Told {
        Told::from(&success(&self.batch(input, workers).output().unwrap()))
    }

    fn start(&self, input: &Input, workers: u16) -> Running {
        Running::start(&mut self.batch(input, workers))
    }

    fn checkpoint(&self, input: &Input) -> usize {
        self.store.get(&input.name()).unwrap().try_into().unwrap()
    }

    /// The proof: reads the checkpoint, then what was handled, and returns the checkpoint.
    #[track_caller]
    fn prove(&self, input: &Input) -> usize {
        let checkpoint = self.checkpoint(input);
        input.check_handled(checkpoint);
        checkpoint
    }
}

#[test]
fn by_default_it_handles_a_file_of_200_000_lines_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let told = success(&batch(&[]).env("TMPDIR", folder.path()).output().unwrap());
    let path = folder.path().join("threaded_batch.txt");
    assert!(told.starts_with(&format!("writes {}\n", path.display())), "{told}");
    let lines = fs::read_to_string(&path).unwrap();
    assert_eq!(lines.lines().count(), 200_000);
    assert_eq!(fs::read_to_string(path.with_extension("txt.out")).unwrap(), lines.to_uppercase());
    let told = Told::from(&told);
    assert_eq!((told.lines, told.repeated, told.checkpoint), (200_000, 0, lines.len()));
}

#[test]
fn every_line_is_handled_once_however_many_workers_there_are_and_however_the_lines_end() {
    for (bytes, lines) in [
        ("", 0),
        ("\n", 1),
        ("\n\n\nfour\n", 4),
        ("one\ntwo\n", 2),
        ("one\ntwo", 2),
        ("one\r\ntwo\r\n\r\n", 3),
        ("one\r\ntwo", 2),
        ("größer\nsmaller\n", 2),
    ] {
        for workers in [1, 4] {
            let input = Input::new(bytes);
            assert_eq!(input.run(workers), Told::all(lines, &input), "{bytes:?}");
            let expected = bytes.to_ascii_uppercase();
            assert_eq!(String::from_utf8(input.written("out")).unwrap(), expected);
        }
    }
}

#[test]
fn a_line_of_10_megabytes_is_handled() {
    let long = "x".repeat(10_000_000);
    let input = Input::new(format!("short\n{long}\nshort\n{long}\n{long}\n{long}\n{long}"));
    assert_eq!(input.run(4), Told::all(7, &input));
    input.check_handled(input.bytes.len());
}

#[test]
fn however_often_it_is_killed_each_line_is_handled_and_no_checkpoint_stands_behind_one_that_is_not()
{
    const LINES: usize = 400_000;
    for workers in [1, 4, 16] {
        let database = Database::fresh();
        let input = Input::lines(LINES);
        let mut random = fastrand::Rng::with_seed(workers.into());
        let mut checkpoint = 0;
        let mut repeated = 0;
        for round in 1..=10 {
            let target = (input.bytes.len() * round / 12) + random.usize(..input.bytes.len() / 12);
            let mut running = database.start(&input, workers);
            running.wait_until("it gets on", || input.reach() >= target);
            drop(running);
            let before = checkpoint;
            checkpoint = database.prove(&input);
            assert!(checkpoint >= before, "{checkpoint} after {before}");
            repeated += input.handled_behind(checkpoint);
        }
        assert!(repeated > 0, "some have to be handled again: that is what at least once means");
        let expected = input.handled_behind(checkpoint);
        let told = database.run(&input, workers);
        let rest = input.bytes[checkpoint..].split(|byte| *byte == b'\n').count() as u64 - 1;
        assert_eq!(told, Told { repeated: expected, ..Told::all(rest, &input) });
        assert_eq!(database.prove(&input), input.bytes.len());

        assert_eq!(database.run(&input, workers), Told::all(0, &input), "nothing is left to do");
    }
}

#[test]
fn ctrl_c_and_sigterm_save_what_was_handled_and_nothing_is_repeated() {
    for (workers, end) in [(1, Running::interrupt as fn(&Running)), (16, Running::terminate)] {
        let database = Database::fresh();
        let input = Input::lines(600_000);
        let mut running = database.start(&input, workers);
        running.wait_until("it gets on", || input.reach() > 100_000);
        end(&running);
        let told = Told::from(&success(&running.output()));
        let checkpoint = database.prove(&input);
        assert_eq!((told.checkpoint, told.unsaved), (checkpoint, 0));
        assert_eq!(input.handled_behind(checkpoint), 0);

        let rest = database.run(&input, workers);
        assert_eq!((told.lines + rest.lines, rest.repeated), (600_000, 0));
        assert_eq!(database.prove(&input), input.bytes.len());
    }
}

#[test]
fn sigterm_in_memory_ends_well_too() {
    let input = Input::lines(600_000);
    let mut running = Running::start(&mut batch(&[&input.name()]));
    running.wait_until("it gets on", || input.reach() > 100_000);
    running.terminate();
    let told = Told::from(&success(&running.output()));
    assert_eq!(told.unsaved, 0);
    input.check_handled(told.checkpoint);
}

#[test]
fn connections_that_are_ended_under_it_do_not_end_it() {
    let mut database = Database::fresh();
    let input = Input::lines(600_000);
    let mut running = database.start(&input, 4);
    for round in 1..=5 {
        let target = input.bytes.len() * round / 8;
        running.wait_until("it gets on", || input.reach() >= target);
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = ''
                     AND pid <> pg_backend_pid()";
        database.client.query_one(end, &[]).unwrap();
    }
    let told = Told::from(&success(&running.output()));
    assert_eq!(told, Told::all(600_000, &input));
    assert_eq!(database.prove(&input), input.bytes.len());
}

#[test]
fn a_line_that_cannot_be_handled_is_put_aside_and_the_run_goes_on() {
    let database = Database::fresh();
    let input = Input::new(b"one\nt\xffo\nthree\n\xc3\r\nfive\n".to_vec());
    let told = database.run(&input, 4);
    assert_eq!(told, Told { put_aside: 2, ..Told::all(5, &input) });
    let aside = String::from_utf8(input.written("aside")).unwrap();
    let mut reasons: Vec<_> = aside.lines().collect();
    reasons.sort_unstable();
    assert!(reasons[0].starts_with("bytes 14 to 17: invalid utf-8 sequence"), "{aside}");
    assert!(reasons[1].starts_with("bytes 4 to 8: invalid utf-8 sequence"), "{aside}");
    assert_eq!(reasons.len(), 2, "{aside}");
    let output = input.written("out");
    assert_eq!(
        (&output[..4], &output[8..14], &output[17..]),
        (&b"ONE\n"[..], &b"THREE\n"[..], &b"FIVE\n"[..])
    );
    assert_eq!(database.run(&input, 4), Told::all(0, &input));
}

#[test]
fn a_run_in_which_too_many_lines_fail_ends_before_the_first_one_that_is_not_put_aside() {
    for workers in [1, 4] {
        let database = Database::fresh();
        let input = Input::new(b"good\n\xff\n".repeat(500));
        let told = failure(&database.batch(&input, workers).output().unwrap());
        assert!(told.starts_with("Error: bytes ") && told.contains("invalid utf-8"), "{told}");
        let aside = String::from_utf8(input.written("aside")).unwrap();
        assert_eq!(aside.lines().count() as u64, MAX_PUT_ASIDE);
        let checkpoint = database.checkpoint(&input);
        let limit = 7 * (usize::try_from(MAX_PUT_ASIDE).unwrap() + usize::from(workers));
        assert!((1..=limit).contains(&checkpoint), "{checkpoint}");
    }
}

#[test]
fn a_file_that_is_shorter_than_its_checkpoint_is_refused() {
    let database = Database::fresh();
    let input = Input::lines(10);
    database.run(&input, 1);
    fs::write(input.path(), "line 0\n").unwrap();
    let told = failure(&database.batch(&input, 1).output().unwrap());
    assert!(told.contains("the file is shorter than its checkpoint"), "{told}");
    assert_eq!(database.checkpoint(&input), input.bytes.len());
}

#[test]
fn a_last_line_without_a_newline_is_handled_whole_again_when_it_has_grown() {
    let database = Database::fresh();
    // It ends within a character: neither half of the line could be handled by itself.
    let mut input = Input::new(b"one\ntwo\nthr\xc3".to_vec());
    assert_eq!(database.run(&input, 4), Told { put_aside: 1, ..Told::all(3, &input) });
    assert_eq!(database.run(&input, 4), Told::all(0, &input), "it has not grown");
    input.append(b"\xa4\nfour\nfi");
    assert_eq!(database.run(&input, 4), Told::all(3, &input));
    input.append(b"ve");
    assert_eq!(database.run(&input, 4), Told::all(1, &input));
    assert_eq!(database.prove(&input), input.bytes.len());
}

#[test]
fn a_file_that_grows_while_it_is_read_is_handled_line_by_line() {
    const LINES: usize = 30;
    let database = Database::fresh();
    let mut input = Input::new("a line that is");
    let kept_open = input.keep_open();
    let mut running = database.start(&input, 4);
    running.wait_until_it_says("resumes behind byte 0 of 14\n");
    for line in 1..LINES {
        // So much of it is always unfinished.
        input.append(format!(" now whole\n{line} is not yet").as_bytes());
        let whole = input.bytes.iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        running.wait_until("the whole lines are handled", || input.reach() >= whole);
        assert_eq!(input.reach(), whole, "half a line is not handled");
    }
    drop(kept_open);
    let told = Told::from(&success(&running.output()));
    assert_eq!(told, Told::all(LINES as u64, &input), "the last one is complete in the end");
    assert_eq!(database.prove(&input), input.bytes.len());
}

#[test]
fn ctrl_c_while_a_line_is_being_written_leaves_that_line() {
    let database = Database::fresh();
    let input = Input::new("one\ntwo\nthr");
    let _kept_open = input.keep_open();
    let mut running = database.start(&input, 4);
    running.wait_until("the others are saved", || database.checkpoint(&input) == 8);
    running.interrupt();
    success(&running.output());
    assert_eq!((database.prove(&input), input.reach()), (8, 8));
}

/// A database that is away: first a lock keeps the job from saving, so that it is still at work
/// however fast it is, then the server is gone.
struct Outage {
    server: Server,
    input: Input,
    running: Running,
}

impl Outage {
    const LINE: usize = 64 << 10;

    fn begin() -> Self {
        let server = Server::start(Options::fast());
        let database = Database::at(server.url("postgres"));
        let line = format!("{}\n", "x".repeat(Self::LINE - 1));
        let input = Input::new(line.repeat(2 * WINDOW / Self::LINE));
        database.store.save(&input.name(), 0).unwrap();
        let mut holder = server.client();
        let mut lock = holder.transaction().unwrap();
        lock.batch_execute("SELECT FROM projection_checkpoints FOR UPDATE").unwrap();
        let mut running = database.start(&input, 4);
        running.wait_until("the window is full", || input.reach() > WINDOW);
        server.crash();
        running.wait_until_it_complains("waits for the database: ");
        let ahead = input.written("out").len();
        assert!(ahead <= WINDOW + Self::LINE, "{ahead}, and nothing is saved");
        Self { server, input, running }
    }
}

#[test]
fn an_outage_does_not_stop_the_work_until_the_window_is_full_and_then_it_goes_on() {
    let Outage { server, input, running } = Outage::begin();
    server.restart();
    let output = running.output();
    let told = Told::from(&success(&output));
    let lines = input.bytes.len() / Outage::LINE;
    assert_eq!(told, Told::all(lines as u64, &input));
    assert_eq!(Database::at(server.url("postgres")).prove(&input), input.bytes.len());
}

#[test]
fn ctrl_c_and_sigterm_during_an_outage_end_it_within_a_second_and_nothing_is_lost() {
    for end in [Running::interrupt, Running::terminate] {
        let Outage { server, input, running } = Outage::begin();
        let asked = Instant::now();
        end(&running);
        let output = running.output();
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
        let told = success(&output);
        assert!(told.contains("\nended without the last save: "), "{told}");
        let Told { lines, checkpoint, unsaved, .. } = Told::from(&told);
        assert_eq!((checkpoint, unsaved), (0, lines * Outage::LINE as u64));

        server.restart();
        let database = Database::at(server.url("postgres"));
        let told = database.run(&input, 4);
        let all = input.bytes.len() / Outage::LINE;
        assert_eq!(told, Told { repeated: lines, ..Told::all(all as u64, &input) });
        assert_eq!(database.prove(&input), input.bytes.len());
    }
}

#[test]
fn without_a_terminal_it_says_every_ten_seconds_how_far_it_is() {
    let Outage { server: _away, mut running, .. } = Outage::begin();
    running.wait_until_it_complains(" lines in 1");
    running.terminate();
    success(&running.output());
}

#[test]
fn another_runner_of_the_same_projection_is_detected() {
    let database = Database::fresh();
    let mut input = Input::new("one\ntw");
    let _kept_open = input.keep_open();
    let mut running = database.start(&input, 4);
    running.wait_until("it has saved", || database.checkpoint(&input) == 4);
    database.store.save(&input.name(), 7).unwrap();
    input.append(b"o\n");
    let told = failure(&running.output());
    assert!(told.contains("is at offset 7, not at 4"), "{told}");
    assert_eq!(database.checkpoint(&input), 7);
}

#[test]
fn what_it_cannot_work_with_is_named() {
    let input = Input::lines(1);
    let port = harness::server().port();
    let url = format!("postgres://postgres:hunter2@127.0.0.1:{port}/nowhere");
    let output = batch(&[&input.name()]).env("DATABASE_URL", url).output().unwrap();
    let told = failure(&output);
    assert!(told.contains("database \"nowhere\" does not exist"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");

    let told = failure(&batch(&["/no/such/file"]).output().unwrap());
    assert!(told.contains("/no/such/file") && told.contains("No such file"), "{told}");
    let told = failure(&batch(&[&input.name(), "many"]).output().unwrap());
    assert!(told.contains("number of workers"), "{told}");
    assert!(stderr(&batch(&[&input.name()]).output().unwrap()).is_empty());
}

#[test]
fn it_can_be_read_at_one_sitting() {
    let lines = include_str!("../../examples/threaded_batch.rs").lines().count();
    assert!(lines <= 200, "{lines}");
}
