//! The main job, `examples/order_summary/`, run as its users run it: as a process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{IsolationLevel, Transaction};
use tempfile::NamedTempFile;

use crate::harness::{self, stderr, stdout};

#[test]
fn by_default_it_projects_100_000_generated_events_in_memory() {
    let output = job(None).output().unwrap();
    assert_success(&output);
    let stdout = stdout(&output);
    assert!(stdout.contains("order-summary: checkpoint 100000, stream head 100000"), "{stdout}");
    assert!(stdout.contains("sales-funnel: checkpoint 100000, stream head 100000"), "{stdout}");
    assert!(stdout.contains("; 100000 events, "), "{stdout}");
    assert!(stderr(&output).contains("100000 events read"), "plain lines off a terminal");
}

#[test]
fn with_a_database_the_read_models_and_checkpoints_are_tables() {
    let database = Database::fresh();
    assert_success(&job(Some(&database.url)).output().unwrap());
    let found = database.state();
    assert_eq!((found.orders_checkpoint, found.funnel_checkpoint), (100_000, 100_000));
    assert_eq!(found.funnel.values().map(|(events, _)| events).sum::<i64>(), 100_000);
    let orders = i64::try_from(found.orders.len()).unwrap();
    assert_eq!(found.funnel["placed"].0, orders, "each order is placed once");
}

#[test]
fn the_generated_events_are_the_same_each_time() {
    let [first, second] = [(); 2].map(|()| stdout(&job(None).output().unwrap()));
    assert_eq!(first, second);
}

#[test]
fn a_second_run_finds_nothing_to_do() {
    let database = Database::fresh();
    let (events, file) = (events(3_000), file_of(&events(3_000)));
    assert_success(&job(Some(&database.url)).arg(file.path()).output().unwrap());
    let before = database.state();
    let output = job(Some(&database.url)).arg(file.path()).output().unwrap();
    assert_success(&output);
    assert!(stdout(&output).contains("order-summary: starts after offset 3000"));
    let after = database.state();
    assert_eq!(before, after);
    after.assert_is_fold_of(&events);
}

#[test]
fn a_stream_that_has_grown_is_projected_from_where_it_was() {
    let database = Database::fresh();
    for length in [2_000, 5_000] {
        let events = events(length);
        let file = file_of(&events);
        assert_success(&job(Some(&database.url)).arg(file.path()).output().unwrap());
        database.state().assert_is_fold_of(&events);
    }
}

#[test]
fn after_each_of_many_crashes_the_read_models_match_their_checkpoints_and_the_end_is_right() {
    let database = Database::fresh();
    let events = events(20_000);
    let file = file_of(&events);
    let mut reached = 0;
    for crash_after in [1, 1, 499, 500, 501, 1_500, 2_750, 4_000, 9_999] {
        let output = job(Some(&database.url))
            .arg("--crash-after")
            .arg(crash_after.to_string())
            .arg(file.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), None, "aborted: {output:?}");
        let state = database.state();
        state.assert_is_fold_of(&events);
        let sum = state.orders_checkpoint + state.funnel_checkpoint;
        assert!(sum >= reached, "a crash lost what was committed: {sum} < {reached}");
        // Of what one run applies at most a batch of each projection, 500 events, is not committed.
        assert!(sum >= reached + crash_after - 1_000, "{sum} after {reached} and {crash_after}");
        reached = sum;
    }
    assert!(reached < 40_000, "the last run has something left to do");
    assert_success(&job(Some(&database.url)).arg(file.path()).output().unwrap());
    let state = database.state();
    assert_eq!((state.orders_checkpoint, state.funnel_checkpoint), (20_000, 20_000));
    state.assert_is_fold_of(&events);
}

#[test]
fn a_crash_comes_before_the_commit_and_undoes_the_batch_that_was_applied() {
    let database = Database::fresh();
    let events = events(100);
    let first = file_of(&events[..50]);
    assert_success(&job(Some(&database.url)).arg(first.path()).output().unwrap());
    let before = database.state();

    let whole = file_of(&events);
    let mut crashing = job(Some(&database.url));
    let output = crashing.args(["--crash-after", "1"]).arg(whole.path()).output().unwrap();
    assert_eq!(output.status.code(), None, "aborted: {output:?}");
    assert!(stderr(&output).contains("events were applied"), "{output:?}");
    assert_eq!(database.state(), before);
}

#[test]
fn a_crash_that_is_due_after_the_last_event_does_not_happen() {
    let file = file_of(&events(50));
    let output = job(None).args(["--crash-after", "101"]).arg(file.path()).output().unwrap();
    assert_success(&output);
}

#[test]
fn two_processes_at_once_on_one_database_apply_each_event_once() {
    let database = Database::fresh();
    let events = events(20_000);
    let file = file_of(&events);
    let rivals = [(); 2].map(|()| spawn(job(Some(&database.url)).arg(file.path())));
    for rival in rivals {
        assert_success(&rival.wait_with_output().unwrap());
    }
    let state = database.state();
    assert_eq!((state.orders_checkpoint, state.funnel_checkpoint), (20_000, 20_000));
    state.assert_is_fold_of(&events);
}

#[test]
fn the_survivor_of_two_processes_finishes_what_the_other_left() {
    let database = Database::fresh();
    let events = events(20_000);
    let file = file_of(&events);
    let mut mortal = job(Some(&database.url));
    let mortal = spawn(mortal.args(["--crash-after", "3000"]).arg(file.path()));
    let survivor = spawn(job(Some(&database.url)).arg(file.path()));
    mortal.wait_with_output().unwrap();
    assert_success(&survivor.wait_with_output().unwrap());
    let state = database.state();
    assert_eq!((state.orders_checkpoint, state.funnel_checkpoint), (20_000, 20_000));
    state.assert_is_fold_of(&events);
}

#[test]
fn events_may_come_from_a_file_with_gaps_blank_lines_and_fields_of_the_future() {
    let file = file_with(
        "{\"offset\":3,\"order\":\"o-1\",\"event\":\"placed\",\"amount_cents\":1299}\r\n\
         \n\
         {\"amount_cents\":500,\"event\":\"placed\",\"order\":\"ö \\\"2\\\"\",\"offset\":10,\"by\":{\"user\":7}}\n\
         \x20 \t\n\
         {\"offset\":11,\"order\":\"o-1\",\"event\":\"paid\",\"amount_cents\":1299}",
    );
    let database = Database::fresh();
    for url in [None, Some(&*database.url)] {
        let output = job(url).arg(file.path()).output().unwrap();
        assert_success(&output);
        let stdout = stdout(&output);
        assert!(
            stdout.contains(
                "order-summary: checkpoint 11, stream head 11; 2 orders of 1799 cents\n\
                 sales-funnel: checkpoint 11, stream head 11; 3 events, 2 placed of 1799 cents, \
                 1 paid of 1299 cents, 0 shipped of 0 cents, 0 cancelled of 0 cents\n"
            ),
            "{stdout}"
        );
    }
    let orders = database.state().orders;
    assert_eq!(orders["o-1"], ("paid".to_owned(), 1299));
    assert_eq!(orders["ö \"2\""], ("placed".to_owned(), 500));
}

#[test]
fn the_largest_amounts_add_up() {
    let events: Vec<_> = (1..=3_000)
        .map(|offset| OrderEvent { offset, amount_cents: u32::MAX, ..event(offset) })
        .collect();
    let file = file_of(&events);
    let database = Database::fresh();
    for url in [None, Some(&*database.url)] {
        assert_success(&job(url).arg(file.path()).output().unwrap());
    }
    database.state().assert_is_fold_of(&events);
}

#[test]
fn an_empty_stream_is_fine() {
    let database = Database::fresh();
    for url in [None, Some(&*database.url)] {
        let output = job(url).arg(file_with("").path()).output().unwrap();
        assert_success(&output);
        assert!(stdout(&output).contains("order-summary: checkpoint 0, stream head 0; 0 orders"));
    }
}

#[test]
fn events_may_come_from_standard_input() {
    let database = Database::fresh();
    let events = events(5_000);
    let mut process = spawn(job(Some(&database.url)).arg("-").stdin(Stdio::piped()));
    process.stdin.take().unwrap().write_all(json_lines(&events).as_bytes()).unwrap();
    assert_success(&process.wait_with_output().unwrap());
    database.state().assert_is_fold_of(&events);
}

#[test]
fn events_are_projected_while_standard_input_is_still_open() {
    let database = Database::fresh();
    let events = events(4);
    let mut process = spawn(job(Some(&database.url)).arg("-").stdin(Stdio::piped()));
    let stdin = process.stdin.as_mut().unwrap();
    for (new, head) in [(&events[..3], 3), (&events[3..], 4)] {
        stdin.write_all(json_lines(new).as_bytes()).unwrap();
        database.wait_until_both_are_at(head);
        database.state().assert_is_fold_of(&events);
    }
    assert_success(&process.wait_with_output().unwrap());
}

#[test]
fn a_checkpoint_that_is_set_back_meanwhile_is_detected_rather_than_skipped_over() {
    let database = Database::fresh();
    let events = events(4);
    let mut process = spawn(job(Some(&database.url)).arg("-").stdin(Stdio::piped()));
    let stdin = process.stdin.as_mut().unwrap();
    stdin.write_all(json_lines(&events[..3]).as_bytes()).unwrap();
    database.wait_until_both_are_at(3);
    harness::client(&database.url)
        .batch_execute(r#"UPDATE projection_checkpoints SET "offset" = 1"#)
        .unwrap();
    stdin.write_all(json_lines(&events[3..]).as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("set back from 3 to 1"), "{output:?}");
    assert_eq!(database.checkpoint("sales-funnel"), 1);
}

#[test]
fn a_malformed_line_is_named_and_the_events_before_it_are_projected() {
    let good = |offset: i64| json_lines(&[event(offset)]);
    let long =
        format!(r#"{{"offset":4,"order":"{}","event":"paid","amount_cents":1}}"#, "o".repeat(201));
    for (bad, reason) in [
        ("{\"offset\":4,", "EOF while parsing"),
        ("4", "invalid type"),
        (r#"{"order":"o-1","event":"paid","amount_cents":1}"#, "missing field `offset`"),
        (r#"{"offset":4,"order":"o-1","event":"paid"}"#, "missing field `amount_cents`"),
        (r#"{"offset":4,"order":"o-1","event":"lost","amount_cents":1}"#, "unknown variant `lost`"),
        (r#"{"offset":4,"order":"o-1","event":"paid","amount_cents":-1}"#, "invalid value"),
        (r#"{"offset":4,"order":"o-1","event":"paid","amount_cents":1.5}"#, "invalid type"),
        (r#"{"offset":4,"order":"o-1","event":"paid","amount_cents":4294967296}"#, "invalid value"),
        (
            r#"{"offset":9223372036854775808,"order":"o-1","event":"paid","amount_cents":1}"#,
            "invalid",
        ),
        (r#"{"offset":3,"order":"o-1","event":"paid","amount_cents":1}"#, "does not come after 3"),
        (r#"{"offset":-4,"order":"o-1","event":"paid","amount_cents":1}"#, "does not come after 3"),
        (r#"{"offset":4,"order":"","event":"paid","amount_cents":1}"#, "1 to 200 bytes"),
        (r#"{"offset":4,"order":"a\u0000","event":"paid","amount_cents":1}"#, "NUL"),
        (&*long, "1 to 200 bytes"),
        (r#"{"offset":4,"order":"o-1","event":"paid","amount_cents":1} 5"#, "trailing characters"),
    ] {
        let text = format!("{}{}\n{}{bad}\n{}", good(1), good(2), good(3), good(5));
        let file = file_with(&text);
        let output = job(None).arg(file.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{bad}: {output:?}");
        let (stderr, place) = (stderr(&output), format!("{}, line 5: ", file.path().display()));
        assert!(stderr.contains(&place) && stderr.contains(reason), "{bad}: {stderr}");
        for projection in ["order-summary", "sales-funnel"] {
            let checkpoint = format!("{projection}: checkpoint 3, ");
            assert!(stdout(&output).contains(&checkpoint), "{bad}: {output:?}");
        }
    }
}

#[test]
fn a_line_that_is_not_utf_8_is_named() {
    let mut file = file_of(&events(2));
    file.write_all(b"\xff\n").unwrap();
    let output = job(None).arg(file.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("line 3: "), "{output:?}");
}

#[test]
fn a_stream_starts_at_offset_1() {
    let file = file_of(&[event(0)]);
    let output = job(None).arg(file.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("line 1: offset 0"), "{output:?}");
}

#[test]
fn once_a_malformed_line_is_fixed_the_next_run_goes_on_from_it() {
    let database = Database::fresh();
    let events = events(3_000);
    let whole = json_lines(&events);
    let malformed = whole.replace("\"offset\":1235,", "\"offset\":oops,");
    let output = job(Some(&database.url)).arg(file_with(&malformed).path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("line 1235: "), "{output:?}");
    let state = database.state();
    assert_eq!((state.orders_checkpoint, state.funnel_checkpoint), (1_234, 1_234));
    state.assert_is_fold_of(&events);

    let output = job(Some(&database.url)).arg(file_with(&whole).path()).output().unwrap();
    assert_success(&output);
    assert!(stdout(&output).contains("order-summary: starts after offset 1234"), "{output:?}");
    database.state().assert_is_fold_of(&events);
}

#[test]
fn a_read_model_that_was_tampered_with_is_detected() {
    for (tamper, named) in [
        ("UPDATE sales_funnel SET amount_cents = amount_cents + 1 WHERE event = 'paid'", "paid is"),
        ("UPDATE order_summary SET state = 'lost' WHERE order_id = 'o-7'", "o-7 is"),
        ("DELETE FROM order_summary WHERE order_id = 'o-8'", "o-8 is None"),
        ("INSERT INTO order_summary VALUES ('o-none', 'paid', 1)", "o-none is"),
    ] {
        let database = Database::fresh();
        let file = file_of(&events(300));
        assert_success(&job(Some(&database.url)).arg(file.path()).output().unwrap());
        harness::client(&database.url).execute(tamper, &[]).unwrap();
        let output = job(Some(&database.url)).arg(file.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{tamper}: {output:?}");
        let stderr = stderr(&output);
        assert!(stderr.contains("the read model is wrong"), "{tamper}: {stderr}");
        assert!(stderr.contains(named), "{tamper}: {stderr}");
    }
}

#[test]
fn a_stream_shorter_than_the_checkpoint_is_not_taken_for_the_same() {
    let database = Database::fresh();
    for (length, code) in [(300, 0), (200, 1)] {
        let file = file_of(&events(length));
        let output = job(Some(&database.url)).arg(file.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        if code == 1 {
            let message = "order-summary: checkpoint 300 is not the stream head 200";
            assert!(stderr(&output).contains(message), "{output:?}");
        }
    }
}

#[test]
fn a_batch_that_the_database_refuses_leaves_no_trace() {
    let database = Database::fresh();
    let events = events(2_000);
    let first = file_of(&events[..700]);
    assert_success(&job(Some(&database.url)).arg(first.path()).output().unwrap());
    harness::client(&database.url)
        .batch_execute("ALTER TABLE sales_funnel ADD CHECK (event <> 'paid' OR events < 400)")
        .unwrap();
    let output = job(Some(&database.url)).arg(file_of(&events).path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("sales_funnel_check"), "{output:?}");
    let state = database.state();
    assert!((700..2_000).contains(&state.funnel_checkpoint), "{state:?}");
    state.assert_is_fold_of(&events);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let output = job(None).arg("no-such-file.jsonl").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("no-such-file.jsonl: "), "{output:?}");
}

#[test]
fn a_database_that_cannot_be_reached_is_named_without_the_password() {
    let port = {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
        nobody.local_addr().unwrap().port()
    };
    let url = format!("postgres://app:hunter2@127.0.0.1:{port}/app");
    let output = job(Some(&url)).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stderr = stderr(&output);
    assert!(stderr.contains(&format!("127.0.0.1:{port}")), "{stderr}");
    assert!(!stderr.contains("hunter2") && !stdout(&output).contains("hunter2"), "{output:?}");
}

#[test]
fn a_database_url_that_cannot_be_read_is_not_repeated() {
    let output = job(Some("postgres://app:hunter2@127.0.0.1:port/app")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!stderr(&output).contains("hunter2"), "{output:?}");
}

fn job(database_url: Option<&str>) -> Command {
    let mut job = harness::example("order_summary", "order_summary");
    job.envs(database_url.map(|url| ("DATABASE_URL", url)));
    job
}

fn spawn(job: &mut Command) -> Child {
    job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}\n{}{}", output.status, stdout(output), stderr(output));
}

#[derive(Clone)]
struct OrderEvent {
    offset: i64,
    order: String,
    event: &'static str,
    amount_cents: u32,
}

/// Ten orders at a time are placed, then paid, then shipped or cancelled.
fn event(offset: i64) -> OrderEvent {
    let index = u32::try_from(offset.max(1) - 1).unwrap();
    let order = index / 30 * 10 + index % 10;
    let event = match (index / 10 % 3, order % 10) {
        (0, _) => "placed",
        (1, _) => "paid",
        (_, 3) => "cancelled",
        _ => "shipped",
    };
    OrderEvent { offset, order: format!("o-{order}"), event, amount_cents: 100 + order * 7 % 5_000 }
}

fn events(count: i64) -> Vec<OrderEvent> {
    (1..=count).map(event).collect()
}

fn json_lines(events: &[OrderEvent]) -> String {
    let mut lines = String::new();
    for OrderEvent { offset, order, event, amount_cents } in events {
        writeln!(
            lines,
            r#"{{"offset":{offset},"order":"{order}","event":"{event}","amount_cents":{amount_cents}}}"#
        )
        .unwrap();
    }
    lines
}

fn file_of(events: &[OrderEvent]) -> NamedTempFile {
    file_with(&json_lines(events))
}

fn file_with(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

struct Database {
    url: String,
}

impl Database {
    fn fresh() -> Self {
        Self { url: harness::fresh_database() }
    }

    /// 0 as well while there is no table yet.
    fn checkpoint(&self, projection: &str) -> i64 {
        checkpoint(&mut harness::client(&self.url).transaction().unwrap(), projection)
    }

    fn wait_until_both_are_at(&self, checkpoint: i64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while ["order-summary", "sales-funnel"].map(|name| self.checkpoint(name)) != [checkpoint; 2]
        {
            assert!(Instant::now() < deadline, "the projections do not get to {checkpoint}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Checkpoints and read models in one snapshot.
    fn state(&self) -> State {
        let mut client = harness::client(&self.url);
        let snapshot = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
        let mut tx = snapshot.read_only(true).start().unwrap();
        let mut state = State {
            orders_checkpoint: checkpoint(&mut tx, "order-summary"),
            funnel_checkpoint: checkpoint(&mut tx, "sales-funnel"),
            ..State::default()
        };
        for row in tx.query("SELECT order_id, state, amount_cents FROM order_summary", &[]).unwrap()
        {
            state.orders.insert(row.get(0), (row.get(1), row.get(2)));
        }
        for row in tx.query("SELECT event, events, amount_cents FROM sales_funnel", &[]).unwrap() {
            state.funnel.insert(row.get(0), (row.get(1), row.get(2)));
        }
        state
    }
}

fn checkpoint(tx: &mut Transaction<'_>, projection: &str) -> i64 {
    let table = "SELECT to_regclass('projection_checkpoints') IS NOT NULL";
    if !tx.query_one(table, &[]).unwrap().get::<_, bool>(0) {
        return 0;
    }
    let checkpoint = r#"SELECT "offset" FROM projection_checkpoints WHERE projection_name = $1"#;
    tx.query_opt(checkpoint, &[&projection]).unwrap().map_or(0, |row| row.get(0))
}

#[derive(Debug, Default, PartialEq)]
struct State {
    orders_checkpoint: i64,
    funnel_checkpoint: i64,
    orders: BTreeMap<String, (String, i64)>,
    funnel: BTreeMap<String, (i64, i64)>,
}

impl State {
    /// Whether each read model holds the events up to its own checkpoint, each once, and no other.
    #[track_caller]
    fn assert_is_fold_of(&self, events: &[OrderEvent]) {
        let upto = |checkpoint: i64| events.iter().take_while(move |e| e.offset <= checkpoint);
        let mut orders = BTreeMap::new();
        for event in upto(self.orders_checkpoint) {
            orders.insert(
                event.order.clone(),
                (event.event.to_owned(), i64::from(event.amount_cents)),
            );
        }
        let mut funnel = BTreeMap::<_, (i64, i64)>::new();
        for event in upto(self.funnel_checkpoint) {
            let stage = funnel.entry(event.event.to_owned()).or_default();
            *stage = (stage.0 + 1, stage.1 + i64::from(event.amount_cents));
        }
        assert!(self.orders == orders, "order_summary is not at {}", self.orders_checkpoint);
        assert_eq!(self.funnel, funnel, "sales_funnel is not at {}", self.funnel_checkpoint);
    }
}
