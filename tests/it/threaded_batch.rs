//! The threaded job, `examples/threaded_batch.rs`, run as its users run it: as a process.

use std::io::{BufRead, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};
use rustix::process::Signal;

use crate::harness::{self, stderr, stdout};

const PROJECTION: &str = "threaded-batch";

/// What the example says of itself.
const CADENCE: i64 = 500;
const WINDOW: i64 = 1_000;

/// More events than any test waits for.
const ENDLESS: &str = "1000000000";

#[test]
fn by_default_it_handles_20_000_events_in_memory() {
    let told = success(&batch(None, &[]).output().unwrap());
    assert!(told.contains("in memory: a crash loses the record and the checkpoint"), "{told}");
    assert!(told.contains("starts after checkpoint 0,"), "{told}");
    assert!(
        told.contains("proved: each event from 1 to 20000 was handled at least once"),
        "{told}"
    );
    assert_eq!(number(&told, "checkpoint: "), 20_000);
    assert_eq!(number(&told, "handled in this run: "), 20_000);
    assert_eq!(number(&told, "handled more than once: "), 0);
    assert!(number(&told, "tried again in this run: ") > 100, "some events fail at first: {told}");
}

#[test]
fn one_worker_and_sixteen_do_the_same() {
    let saved = |workers| {
        let told =
            success(&batch(None, &["--workers", workers, "--events", "3210"]).output().unwrap());
        assert_eq!(number(&told, "handled in this run: "), 3_210);
        (number(&told, "tried again in this run: "), saves(&told))
    };
    let (repeated_by_one, saved_by_one) = saved("1");
    let (repeated_by_sixteen, saved_by_sixteen) = saved("16");
    assert_eq!(repeated_by_one, repeated_by_sixteen);
    for saves in [saved_by_one, saved_by_sixteen] {
        assert_eq!(saves.last(), Some(&3_210));
        assert!(saves.windows(2).all(|pair| (1..=CADENCE).contains(&(pair[1] - pair[0]))));
    }
}

#[test]
fn a_crash_in_memory_loses_everything_and_the_next_run_starts_from_zero() {
    let crashed = batch(None, &["--crash-after", "700"]).output().unwrap();
    assert_crashed(&crashed);
    let told = success(&batch(None, &["--events", "100"]).output().unwrap());
    assert!(told.contains("starts after checkpoint 0,"), "{told}");
}

#[test]
fn after_any_number_of_crashes_each_event_was_handled_and_no_checkpoint_stood_beyond_one() {
    for (workers, crashes) in [
        ("4", ["1", "499", "501", "1234", "1"]),
        ("1", ["500", "17", "1", "900", "2"]),
        ("16", ["16", "1000", "1", "750", "333"]),
    ] {
        let (url, mut client, store) = database();
        let mut handled_before = 0;
        let mut checkpoint_before = 0;
        for crash_after in crashes {
            let arguments =
                ["--workers", workers, "--events", "3000", "--crash-after", crash_after];
            assert_crashed(&batch(Some(&url), &arguments).output().unwrap());

            let checkpoint = store.get(PROJECTION).unwrap();
            assert!(checkpoint >= checkpoint_before, "{checkpoint} after {checkpoint_before}");
            assert_eq!(first_not_handled(&mut client, checkpoint), None);
            let handled = times_handled(&mut client);
            assert!(handled >= handled_before + crash_after.parse::<i64>().unwrap());
            let last: i64 = client.query_one("SELECT max(event) FROM handled", &[]).unwrap().get(0);
            // Beyond the last event saved: what the cadence allows, what waits in the window, and
            // one event each in the hands of the reader and of the main thread.
            let lag = last - checkpoint;
            assert!(lag <= CADENCE + WINDOW + 2, "{last} is {lag} beyond {checkpoint}");
            (handled_before, checkpoint_before) = (handled, checkpoint);
        }

        let told = success(
            &batch(Some(&url), &["--workers", workers, "--events", "3000"]).output().unwrap(),
        );
        assert!(told.contains(&format!("starts after checkpoint {checkpoint_before},")), "{told}");
        assert!(
            told.contains("proved: each event from 1 to 3000 was handled at least once"),
            "{told}"
        );
        assert_eq!(number(&told, "handled in this run: "), 3_000 - checkpoint_before);
        assert_eq!(number(&told, "handled in all runs: "), times_handled(&mut client));
        assert_eq!(first_not_handled(&mut client, 3_000), None);
        assert_eq!(store.get(PROJECTION).unwrap(), 3_000);
        let more_than_once = "SELECT count(*) FROM handled WHERE times > 1";
        let more_than_once: i64 = client.query_one(more_than_once, &[]).unwrap().get(0);
        assert!(more_than_once > 0);
        assert_eq!(number(&told, "handled more than once: "), more_than_once);

        let told = success(&batch(Some(&url), &["--events", "3000"]).output().unwrap());
        assert_eq!(number(&told, "handled in this run: "), 0);
    }
}

#[test]
fn ctrl_c_handles_what_was_begun_and_saves_it() {
    for workers in ["1", "16"] {
        let (url, mut client, store) = database();
        let mut job = Running::start(&url, &["--workers", workers, "--events", ENDLESS]);
        job.wait_for("saved checkpoint ");
        job.signal(Signal::INT);
        let told = job.success();

        assert!(told.contains("\nstopped\n"), "{told}");
        let checkpoint = number(&told, "checkpoint: ");
        assert!(told.contains(&format!("checkpoint: {checkpoint}, not saved: 0\n")), "{told}");
        assert_eq!(store.get(PROJECTION).unwrap(), checkpoint);
        let handled = "SELECT count(*), max(event) FROM handled";
        let handled = client.query_one(handled, &[]).unwrap();
        assert_eq!((handled.get::<_, i64>(0), handled.get::<_, i64>(1)), (checkpoint, checkpoint));

        let events = (checkpoint + 10).to_string();
        let told = success(&batch(Some(&url), &["--events", &events]).output().unwrap());
        assert_eq!(number(&told, "handled in this run: "), 10);
        assert_eq!(number(&told, "handled more than once: "), 0);
    }
}

#[test]
fn ctrl_c_in_memory_ends_well_too() {
    let mut job = Running::spawn(&mut batch(None, &["--events", ENDLESS]));
    job.wait_for("saved checkpoint ");
    job.signal(Signal::INT);
    let told = job.success();
    let checkpoint = number(&told, "checkpoint: ");
    assert_eq!(number(&told, "handled in all runs: "), checkpoint);
    assert!(told.contains(&format!("proved: each event from 1 to {checkpoint} was")), "{told}");
}

#[test]
fn a_worker_that_cannot_handle_its_event_ends_the_run_before_that_event() {
    for workers in ["1", "4"] {
        let (url, mut client, store) = database();
        success(&batch(Some(&url), &["--events", "100"]).output().unwrap());
        client
            .batch_execute(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
                     AS 'BEGIN RAISE ''no, not this one''; END';
                 CREATE TRIGGER refuse BEFORE INSERT ON handled
                     FOR EACH ROW WHEN (NEW.event = 1234) EXECUTE FUNCTION refuse();",
            )
            .unwrap();
        let output =
            batch(Some(&url), &["--workers", workers, "--events", ENDLESS]).output().unwrap();
        let told = failure(&output);
        assert!(told.starts_with("error: event 1234 failed 5 times: "), "{told}");
        assert!(told.contains("no, not this one"), "{told}");
        assert_eq!(store.get(PROJECTION).unwrap(), 1_233, "flushed, and not beyond");

        client.batch_execute("DROP TRIGGER refuse ON handled").unwrap();
        success(&batch(Some(&url), &["--events", "2000"]).output().unwrap());
        assert_eq!(first_not_handled(&mut client, 2_000), None);
    }
}

#[test]
fn an_event_missing_before_the_checkpoint_is_found() {
    let (url, mut client, _store) = database();
    success(&batch(Some(&url), &["--events", "1500"]).output().unwrap());
    client.execute("DELETE FROM handled WHERE event IN (700, 701)", &[]).unwrap();
    let told = failure(&batch(Some(&url), &["--events", "1500"]).output().unwrap());
    assert!(told.contains("the checkpoint is at 1500, and event 700 was never handled"), "{told}");
}

#[test]
fn another_runner_of_the_same_projection_is_detected() {
    let (url, _client, store) = database();
    let mut job = Running::start(&url, &["--events", ENDLESS]);
    job.wait_for("saved checkpoint ");
    store.save(PROJECTION, 7).unwrap();
    let told = job.failure();
    assert!(told.contains("projection \"threaded-batch\" is at offset 7, not at "), "{told}");
    assert_eq!(store.get(PROJECTION).unwrap(), 7);
}

#[test]
fn a_command_line_that_makes_no_sense_is_exit_code_2() {
    for (arguments, named) in [
        (&["--workers", "0"][..], "--workers"),
        (&["--workers", "1001"], "--workers"),
        (&["--workers"], "--workers"),
        (&["--events", "0"], "--events"),
        (&["--events", "-1"], "--events"),
        (&["--crash-after", "0"], "--crash-after"),
        (&["--crash-after", "soon"], "--crash-after"),
        (&["--faster"], "--faster"),
        (&["20000"], "20000"),
    ] {
        let output = batch(None, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let told = stderr(&output);
        let reason = told.lines().next().unwrap();
        assert!(reason.starts_with("error: ") && reason.contains(named), "{told}");
        assert!(told.contains("\nUsage: threaded_batch"), "{told}");
        assert_eq!(stdout(&output), "", "{arguments:?}");
    }
}

#[test]
fn help_is_printed_on_demand_and_shows_no_secret() {
    for option in ["--help", "-h"] {
        let output = batch(Some("postgres://app:hunter2@localhost/app"), &[option]).output();
        let told = success(&output.unwrap());
        for part in [
            "Usage: threaded_batch [OPTIONS]\n",
            "--workers <N>",
            "[default: 4]",
            "--events <N>",
            "[default: 20000]",
            "--crash-after <N>",
            "DATABASE_URL",
            "Exit code:",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert!(!told.contains("hunter2"), "{told}");
    }
}

#[test]
fn a_database_that_is_not_there_is_exit_code_1() {
    let port = harness::server().port();
    let url = format!("postgres://postgres:hunter2@127.0.0.1:{port}/nowhere");
    let told = failure(&batch(Some(&url), &[]).output().unwrap());
    assert!(told.contains("database \"nowhere\" does not exist"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");
}

/// A database of its own, and the checkpoints that the example keeps there.
fn database() -> (String, Client, PostgresCheckpointStore) {
    let url = harness::fresh_database();
    let client = harness::client(&url);
    let store = PostgresCheckpointStore::builder().max_connections(1).connect(&url).unwrap();
    store.migrate().unwrap();
    (url, client, store)
}

fn first_not_handled(client: &mut Client, up_to: i64) -> Option<i64> {
    let query = "SELECT min(n) FROM generate_series(1, $1::bigint) AS n
                 WHERE n NOT IN (SELECT event FROM handled)";
    client.query_one(query, &[&up_to]).unwrap().get(0)
}

fn times_handled(client: &mut Client) -> i64 {
    client.query_one("SELECT sum(times)::bigint FROM handled", &[]).unwrap().get(0)
}

fn batch(database_url: Option<&str>, arguments: &[&str]) -> Command {
    let mut batch = harness::example("threaded_batch", "threaded_batch.rs");
    batch.args(arguments).envs(database_url.map(|url| ("DATABASE_URL", url)));
    batch
}

/// A run that goes on while the test does, and no longer.
struct Running {
    process: Child,
    stdout: BufReader<std::process::ChildStdout>,
    told: String,
}

impl Running {
    fn start(url: &str, arguments: &[&str]) -> Self {
        Self::spawn(&mut batch(Some(url), arguments))
    }

    fn spawn(batch: &mut Command) -> Self {
        let mut process = batch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        Self { process, stdout, told: String::new() }
    }

    /// Reads on until a line begins like this.
    fn wait_for(&mut self, beginning: &str) {
        loop {
            let start = self.told.len();
            let read = self.stdout.read_line(&mut self.told).unwrap();
            assert!(read > 0, "it ended before it said {beginning:?}:\n{}", self.told);
            if self.told[start..].starts_with(beginning) {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        harness::signal(&self.process, signal);
    }

    fn success(self) -> String {
        success(&self.output())
    }

    fn failure(self) -> String {
        failure(&self.output())
    }

    fn output(mut self) -> Output {
        self.stdout.read_to_string(&mut self.told).unwrap();
        let mut stderr = Vec::new();
        self.process.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        let status = self.process.wait().unwrap();
        Output { status, stdout: std::mem::take(&mut self.told).into_bytes(), stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What it said, after it ended well.
#[track_caller]
fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}\n{}{}", output.status, stdout(output), stderr(output));
    stdout(output)
}

/// What it complained about, after it failed.
#[track_caller]
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}{}", stdout(output), stderr(output));
    stderr(output)
}

#[track_caller]
fn assert_crashed(output: &Output) {
    use std::os::unix::process::ExitStatusExt as _;
    let aborted = Signal::ABORT.as_raw();
    assert_eq!(output.status.signal(), Some(aborted), "{}{}", stdout(output), stderr(output));
}

/// The number after `label` at the beginning of a line.
#[track_caller]
fn number(told: &str, label: &str) -> i64 {
    let rest = told.lines().find_map(|line| line.strip_prefix(label)).expect(label);
    rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect(label)
}

/// The checkpoints saved, in order.
fn saves(told: &str) -> Vec<i64> {
    let saves = told.lines().filter(|line| line.starts_with("saved checkpoint "));
    saves.map(|line| number(line, "saved checkpoint ")).collect()
}
