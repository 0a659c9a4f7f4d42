//! The threaded job, `examples/threaded_batch.rs`, run as its users run it: as a process.
//!
//! It counts in a table how often it has handled each event. That is the record against which its
//! checkpoint is held here: each event up to the checkpoint must be on it, at every moment.

use std::process::Command;

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use crate::harness::{self, Running, failure, success};

const PROJECTION: &str = "threaded-batch";

/// What the example says of itself.
const CADENCE: i64 = 500;
const WINDOW: i64 = 1_000;

/// More events than any test waits for.
const ENDLESS: i64 = 1_000_000_000;

fn batch(database_url: Option<&str>, events: i64, workers: u16) -> Command {
    let mut batch = harness::example("threaded_batch", "threaded_batch.rs");
    batch.args([events.to_string(), workers.to_string()]);
    batch.envs(database_url.map(|url| ("DATABASE_URL", url)));
    batch
}

/// A database of its own, and what the example keeps there.
struct Database {
    url: String,
    client: Client,
    store: PostgresCheckpointStore,
}

impl Database {
    fn fresh() -> Self {
        let url = harness::fresh_database();
        let client = harness::client(&url);
        let store = PostgresCheckpointStore::builder().max_connections(1).connect(&url).unwrap();
        store.migrate().unwrap();
        Self { url, client, store }
    }

    fn run_to(&self, events: i64, workers: u16) -> String {
        success(&batch(Some(&self.url), events, workers).output().unwrap())
    }

    fn start(&self, workers: u16) -> Running {
        Running::start(&mut batch(Some(&self.url), ENDLESS, workers))
    }

    fn number(&mut self, sql: &str) -> i64 {
        // The example makes the table.
        self.client.query_one(sql, &[]).map_or(0, |row| row.get::<_, Option<i64>>(0).unwrap_or(0))
    }

    /// The last event on record, how many there are, and how often they were handled in all.
    fn record(&mut self) -> (i64, i64, i64) {
        (
            self.number("SELECT max(event) FROM handled"),
            self.number("SELECT count(*) FROM handled"),
            self.number("SELECT sum(times)::bigint FROM handled"),
        )
    }

    /// The proof: reads the checkpoint, then the record, and returns the checkpoint.
    #[track_caller]
    fn prove(&mut self) -> i64 {
        let checkpoint = self.store.get(PROJECTION).unwrap();
        let missing = format!(
            "SELECT min(n) FROM generate_series(1, {checkpoint}::bigint) AS n
             WHERE n NOT IN (SELECT event FROM handled)"
        );
        let missing = self.number(&missing);
        assert_eq!(missing, 0, "the checkpoint is {checkpoint}, and this event was never handled");
        checkpoint
    }
}

/// The numbers after `label` at the beginning of a line.
fn numbers(told: &str, label: &str) -> Vec<i64> {
    let numbers = told.lines().filter_map(|line| line.strip_prefix(label));
    numbers.map(|number| number.parse().expect("a number")).collect()
}

#[test]
fn by_default_it_handles_20_000_events_in_memory() {
    let told = success(&harness::example("threaded_batch", "threaded_batch.rs").output().unwrap());
    assert!(told.starts_with("resumes after event 0\n"), "{told}");
    assert!(told.ends_with("ends after event 20000\n"), "{told}");
}

#[test]
fn it_saves_every_500_events_however_many_workers_there_are() {
    for workers in [1, 4, 16] {
        let told = success(&batch(None, 3_210, workers).output().unwrap());
        let mut saves = numbers(&told, "saved checkpoint ");
        saves.extend(numbers(&told, "ends after event "));
        assert_eq!(saves.last(), Some(&3_210));
        assert!(
            saves.windows(2).all(|pair| (1..=CADENCE).contains(&(pair[1] - pair[0]))),
            "{told}"
        );
    }
}

#[test]
fn however_often_it_is_killed_each_event_is_handled_and_no_checkpoint_stands_beyond_one() {
    for workers in [1, 4, 16] {
        let mut database = Database::fresh();
        let mut random = fastrand::Rng::with_seed(workers.into());
        let (mut last, mut checkpoint) = (0, 0);
        for _ in 0..8 {
            let target = last + random.i64(1..1_200);
            let mut running = database.start(workers);
            running.wait_until("it gets on", || {
                database.prove();
                database.record().0 >= target
            });
            drop(running);
            let before = checkpoint;
            checkpoint = database.prove();
            assert!(checkpoint >= before, "{checkpoint} after {before}");
            last = database.record().0;
            let lag = last - checkpoint;
            assert!(lag <= CADENCE + WINDOW, "{last} is {lag} beyond {checkpoint}");
        }
        let handled_before = database.record().2;
        let told = database.run_to(last + 10, workers);
        assert_eq!(numbers(&told, "resumes after event "), [checkpoint]);
        assert_eq!(database.prove(), last + 10);
        let (_, events, handled) = database.record();
        assert_eq!(events, last + 10, "no event beyond the end, and none left out");
        assert_eq!(handled - handled_before, last + 10 - checkpoint);
        assert!(handled > events, "some were handled twice: that is what at least once means");

        database.run_to(last + 10, workers);
        assert_eq!(database.record().2, handled, "nothing is left to do");
    }
}

#[test]
fn ctrl_c_handles_what_was_begun_and_saves_it() {
    for workers in [1, 16] {
        let mut database = Database::fresh();
        let mut running = database.start(workers);
        running.wait_until_it_says("saved checkpoint ");
        running.interrupt();
        let told = success(&running.output());
        let checkpoint = database.prove();
        assert_eq!(numbers(&told, "ends after event "), [checkpoint]);
        assert_eq!(database.record(), (checkpoint, checkpoint, checkpoint));

        database.run_to(checkpoint + 10, workers);
        let last = checkpoint + 10;
        assert_eq!(database.record(), (last, last, last), "none was handled twice");
    }
}

#[test]
fn ctrl_c_in_memory_ends_well_too() {
    let mut running = Running::start(&mut batch(None, ENDLESS, 4));
    running.wait_until_it_says("saved checkpoint ");
    running.interrupt();
    let told = success(&running.output());
    let saved = numbers(&told, "saved checkpoint ").last().copied();
    assert!(numbers(&told, "ends after event ").last().copied() >= saved, "{told}");
}

#[test]
fn connections_that_are_ended_under_it_do_not_end_it() {
    let mut database = Database::fresh();
    let mut running = database.start(4);
    for _ in 0..5 {
        let target = database.record().0 + 300;
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        running.wait_until("it gets on", || database.record().0 >= target);
        assert!(database.number(end) > 0);
        database.prove();
    }
    let target = database.record().0 + 300;
    running.wait_until("it gets on", || database.record().0 >= target);
    running.interrupt();
    success(&running.output());
    assert_eq!(database.prove(), database.record().0);
}

#[test]
fn a_worker_that_cannot_handle_its_event_ends_the_run_before_that_event() {
    for workers in [1, 4] {
        let mut database = Database::fresh();
        database.run_to(100, workers);
        database
            .client
            .batch_execute(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
                     AS 'BEGIN RAISE ''no, not this one''; END';
                 CREATE TRIGGER refuse BEFORE INSERT ON handled
                     FOR EACH ROW WHEN (NEW.event = 1234) EXECUTE FUNCTION refuse();",
            )
            .unwrap();
        let told = failure(&batch(Some(&database.url), ENDLESS, workers).output().unwrap());
        assert!(told.starts_with("error: event 1234 failed 5 times: "), "{told}");
        assert!(told.contains("no, not this one") && told.lines().count() == 1, "{told}");
        assert_eq!(database.prove(), 1_233, "saved, and not beyond");

        database.client.batch_execute("DROP TRIGGER refuse ON handled").unwrap();
        database.run_to(2_000, workers);
        assert_eq!(database.prove(), 2_000);
    }
}

#[test]
fn another_runner_of_the_same_projection_is_detected() {
    let database = Database::fresh();
    let mut running = database.start(4);
    running.wait_until_it_says("saved checkpoint ");
    database.store.save(PROJECTION, 7).unwrap();
    let told = failure(&running.output());
    assert!(told.contains("projection \"threaded-batch\" is at offset 7, not at "), "{told}");
    assert_eq!(database.store.get(PROJECTION).unwrap(), 7);
}

#[test]
fn what_it_cannot_work_with_is_named() {
    let port = harness::server().port();
    let url = format!("postgres://postgres:hunter2@127.0.0.1:{port}/nowhere");
    let told = failure(&batch(Some(&url), 1, 1).output().unwrap());
    assert!(told.contains("database \"nowhere\" does not exist"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");

    let mut many = harness::example("threaded_batch", "threaded_batch.rs");
    assert!(failure(&many.arg("many").output().unwrap()).starts_with("error: many: "));
}

#[test]
fn it_can_be_read_at_one_sitting() {
    let lines = include_str!("../../examples/threaded_batch.rs").lines().count();
    assert!(lines <= 185, "{lines}");
}
