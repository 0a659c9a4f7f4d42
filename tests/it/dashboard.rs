//! The dashboard example, over HTTP and in a browser.

mod browser;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};
use rustix::process::Signal;
use serde_json::{Value, json};

use self::browser::Page;
use crate::harness::{
    Guard, Options, Server, client, example, failure, fresh_database, signal, wait_until,
};

const CHECKPOINTS: &str = "/api/projections/checkpoints";
const HEAD_QUERY: &str = "SELECT max(id) FROM events";
/// How soon it answers whatever the database does, and two seconds for a slow machine.
const SOON: Duration = Duration::from_millis(2_800);
const SCRIPT: &str = "<script>document.title = 'pwned'</script>";

/// The example as a process, killed when this value is dropped.
struct Dashboard {
    address: SocketAddr,
    process: Child,
    guard: Guard,
}

impl Dashboard {
    fn start(command: &mut Command) -> Self {
        let mut guard = Guard::new("checkpoint-store-dashboard-");
        let stderr = File::create(guard.folder().join("stderr")).expect("a file");
        let process = command.stdout(Stdio::piped()).stderr(stderr).spawn();
        let mut process = process.expect("the example starts");
        guard.watch(&process);
        let mut first_line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe"))
            .read_line(&mut first_line)
            .expect("UTF-8");
        let address = first_line
            .strip_prefix("listening on http://")
            .and_then(|rest| rest.strip_suffix("/\n"))
            .and_then(|address| address.parse().ok())
            .unwrap_or_else(|| panic!("no address in {first_line:?}"));
        Self { address, process, guard }
    }

    fn demo(arguments: &[&str]) -> Self {
        Self::start(
            example("dashboard", "dashboard").args(["--listen", "127.0.0.1:0"]).args(arguments),
        )
    }

    fn on(database_url: &str, arguments: &[&str]) -> Self {
        Self::start(
            example("dashboard", "dashboard")
                .env("DATABASE_URL", database_url)
                .args(["--listen", "127.0.0.1:0"])
                .args(arguments),
        )
    }

    /// What it has written to its standard error: a line at the begin of an outage, and one at its end.
    fn complaints(&self) -> String {
        let told = fs::read_to_string(self.guard.folder().join("stderr")).expect("UTF-8");
        for (line, expected) in
            told.lines().zip(["cannot be read: ", "can be read again"].iter().cycle())
        {
            assert!(line.starts_with("the checkpoints ") && line.contains(expected), "{told}");
        }
        told
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// What it answers within its limit or, on a machine that is too slow for that, later.
    fn get(&self, path: &str) -> Answer {
        let mut answer = self.ask(path);
        wait_until("it answers", || {
            let is_late = answer.body.contains("the checkpoint store has not answered");
            if is_late {
                answer = self.ask(path);
            }
            !is_late
        });
        answer
    }

    fn ask(&self, path: &str) -> Answer {
        request(self.address, "GET", path)
    }

    fn health(&self) -> Health {
        let answer = self.get("/health");
        let report = answer.json();
        let projections = report["projections"].as_array().expect("an array").iter();
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        Health {
            status: answer.status,
            level: text(&report["level"]),
            projections: projections
                .map(|row| {
                    let told = (text(&row["level"]), text(&row["reason"]));
                    (text(&row["projectionName"]), told)
                })
                .collect(),
        }
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.process.kill();
        self.process.wait().expect("the example ends");
        self.guard.forget(&self.process);
    }
}

struct Health {
    status: u16,
    level: String,
    projections: BTreeMap<String, (String, String)>,
}

impl Health {
    fn overall(&self) -> (u16, &str) {
        (self.status, &self.level)
    }

    fn of(&self, projection: &str) -> (&str, &str) {
        let (level, reason) = &self.projections[projection];
        (level, reason)
    }
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json");
        serde_json::from_str(&self.body).expect("JSON")
    }

    /// The error of a JSON route that cannot answer.
    fn error(&self) -> String {
        assert_eq!(self.status, 503, "{}", self.body);
        self.json()["error"].as_str().expect("a text").to_owned()
    }
}

fn request(address: SocketAddr, method: &str, path: &str) -> Answer {
    let mut stream = TcpStream::connect(address).expect("the dashboard listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("an open socket");
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        .expect("the dashboard reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the dashboard answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
    let headers = lines.filter_map(|line| line.split_once(": "));
    Answer {
        status: status.parse().expect("a number"),
        headers: headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect(),
        body: body.to_owned(),
    }
}

/// A database with a stream of that length, and the table of checkpoints.
fn database(events: i64) -> (String, PostgresCheckpointStore) {
    let url = fresh_database();
    let store = prepare(&url, events);
    (url, store)
}

fn prepare(url: &str, events: i64) -> PostgresCheckpointStore {
    let store = PostgresCheckpointStore::connect(url).expect("a store");
    store.migrate().expect("a table");
    let table = "CREATE TABLE events (id bigserial PRIMARY KEY)";
    let mut client = client(url);
    client.batch_execute(table).expect("a table of events");
    let insert = "INSERT INTO events SELECT generate_series(1, $1::bigint)";
    client.execute(insert, &[&events]).expect("events");
    store
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the example runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn checkpoints_have_the_keys_of_the_source_system() {
    let (url, store) = database(1_000);
    store.save_many(&[("orders", 750), ("customers", 1_000), (SCRIPT, 1_010)]).unwrap();
    let dashboard =
        Dashboard::on(&url, &["--head-query", HEAD_QUERY, "--projection", "never saved"]);
    let answer = dashboard.get(CHECKPOINTS);
    assert_eq!(answer.status, 200);
    let mut rows = answer.json();
    let mut saved_at = Vec::new();
    for row in rows.as_array_mut().expect("an array") {
        if let Value::String(time) = row["updatedAt"].take() {
            saved_at.push(time.parse::<jiff::Timestamp>().expect("RFC 3339"));
        }
        let keys: Vec<_> = row.as_object().expect("an object").keys().collect();
        assert_eq!(
            keys,
            ["checkpoint", "lag", "percentComplete", "projectionName", "streamHead", "updatedAt"]
        );
    }
    let row = |name: &str, checkpoint: i64, lag: i64, percent: f64| {
        json!({ "projectionName": name, "checkpoint": checkpoint, "streamHead": 1_000, "lag": lag,
                "percentComplete": percent, "updatedAt": null })
    };
    let expected = [
        row(SCRIPT, 1_010, -10, 101.0),
        row("customers", 1_000, 0, 100.0),
        row("never saved", 0, 1_000, 0.0),
        row("orders", 750, 250, 75.0),
    ];
    assert_eq!(rows, json!(expected));
    assert_eq!(saved_at.len(), 3, "null means never saved");
    let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap();
    assert!(saved_at.iter().all(|&time| (now - time).as_mins() == 0), "{saved_at:?}");
}

#[test]
fn health_is_that_of_the_worst_projection() {
    let (url, store) = database(1_000);
    let head_query = ["--head-query", HEAD_QUERY];
    let usual = Dashboard::on(&url, &head_query);
    assert_eq!(usual.health().overall(), (200, "healthy"), "there is no projection");

    store.save("orders", 1_000).unwrap();
    let health = usual.health();
    assert_eq!(health.overall(), (200, "healthy"));
    assert_eq!(health.of("orders"), ("healthy", "projection up to date"));

    store.save("customers", 958).unwrap();
    let health = usual.health();
    assert_eq!(health.overall(), (200, "degraded"));
    assert_eq!(health.of("customers"), ("degraded", "projection lagging: 42 events"));
    assert_eq!(health.of("orders"), ("healthy", "projection up to date"));

    store.save("invoices", 0).unwrap();
    let health = usual.health();
    assert_eq!(health.overall(), (503, "unhealthy"));
    let critical = ("unhealthy", "projection critically lagging: 1000 events");
    assert_eq!(health.of("invoices"), critical);

    store.delete("invoices").unwrap();
    store.save("orders", 1_003).unwrap();
    let health = usual.health();
    assert_eq!(health.overall(), (503, "unhealthy"));
    assert_eq!(health.of("orders"), ("unhealthy", "projection ahead of the stream head: 3 events"));
    store.save("orders", 1_000).unwrap();
    assert_eq!(usual.health().overall(), (200, "degraded"));

    let strict = Dashboard::on(&url, &[&head_query[..], &["--critical-lag", "42"]].concat());
    let health = strict.health();
    assert_eq!(health.overall(), (503, "unhealthy"));
    assert_eq!(health.of("customers"), ("unhealthy", "projection critically lagging: 42 events"));

    let patient = Dashboard::on(&url, &[&head_query[..], &["--stalled-after", "3600"]].concat());
    assert_eq!(patient.health().overall(), (200, "degraded"));
    let two_hours_ago = "UPDATE projection_checkpoints SET updated_at = now() - interval '2 hours'";
    client(&url).batch_execute(two_hours_ago).unwrap();
    let health = patient.health();
    assert_eq!(health.overall(), (503, "unhealthy"));
    let (level, reason) = health.of("customers");
    assert_eq!(level, "unhealthy");
    assert!(reason.starts_with("projection stalled: 42 events behind, not saved for 72"));
    assert_eq!(health.of("orders").0, "healthy", "one that is caught up has nothing to save");
}

#[test]
fn a_projection_that_moves_meanwhile_does_not_look_ahead_of_its_stream() {
    let (url, store) = database(1_000);
    store.save("orders", 1_000).unwrap();
    let read_and_move_on = "
        CREATE FUNCTION head_before_the_next_event() RETURNS bigint LANGUAGE plpgsql AS $$
        DECLARE head bigint := (SELECT max(id) FROM events);
        BEGIN
            INSERT INTO events VALUES (head + 1);
            UPDATE projection_checkpoints SET \"offset\" = head + 1;
            RETURN head;
        END $$";
    client(&url).batch_execute(read_and_move_on).unwrap();
    let dashboard = Dashboard::on(&url, &["--head-query", "SELECT head_before_the_next_event()"]);
    for _ in 0..3 {
        let health = dashboard.health();
        assert_eq!(health.of("orders"), ("healthy", "projection up to date"));
    }
    assert_eq!(store.get("orders").unwrap(), 1_003);
}

#[test]
fn each_route_can_only_be_read_and_is_never_cached_and_there_is_no_other() {
    let dashboard = Dashboard::demo(&[]);
    for path in ["/nothing", "/health/", "/api", "//", "/index.html", "/../etc/passwd"] {
        assert_eq!(dashboard.get(path).status, 404, "{path}");
    }
    assert_eq!(request(dashboard.address, "POST", "/nothing").status, 404);
    for path in ["/", CHECKPOINTS, "/health", "/live", "/metrics"] {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let answer = request(dashboard.address, method, path);
            let allow = answer.headers.get("allow").map(String::as_str);
            assert_eq!((answer.status, allow), (405, Some("GET, HEAD")), "{method} {path}");
        }
        let get = dashboard.get(&format!("{path}?refresh=1"));
        let head = request(dashboard.address, "HEAD", path);
        assert_eq!((head.status, head.body.as_str()), (get.status, ""), "{path}");
        assert_eq!(head.headers["content-type"], get.headers["content-type"]);
        assert!(!get.body.is_empty() && head.headers["content-length"] != "0");
        assert_eq!(get.headers["cache-control"], "no-store");
        assert_eq!(get.headers["x-content-type-options"], "nosniff");
    }
}

#[test]
fn the_page_runs_no_script_but_its_own() {
    let dashboard = Dashboard::demo(&[]);
    let [first, second] = [dashboard.get("/"), dashboard.get("/")];
    assert_eq!(first.status, 200);
    assert_eq!(first.headers["content-type"], "text/html; charset=utf-8");
    let policy = &first.headers["content-security-policy"];
    assert!(policy.starts_with("default-src 'none'; script-src 'nonce-"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_ne!(policy, &second.headers["content-security-policy"], "a nonce is used once");
}

#[test]
fn the_demo_has_a_projection_in_every_state_of_health() {
    let demo = Dashboard::demo(&[]);
    let health = demo.health();
    assert_eq!(health.overall(), (503, "unhealthy"));
    let levels: Vec<_> = health.projections.values().map(|(level, _)| level.as_str()).collect();
    for level in ["healthy", "degraded", "unhealthy"] {
        assert!(levels.contains(&level), "{levels:?}");
    }
    let head = || demo.get(CHECKPOINTS).json()[0]["streamHead"].as_i64();
    let before = head();
    wait_until("the stream grows", || head() > before);
}

#[test]
fn the_head_may_be_any_query_of_one_value() {
    let (url, store) = database(7);
    store.save("orders", 0).unwrap();
    for (query, head) in [
        ("SELECT max(id) FROM events;", 7),
        ("SELECT max(id) FROM events -- the last one", 7),
        ("SELECT 7::smallint", 7),
        ("SELECT sum(id) FROM events", 28),
        ("WITH last AS (SELECT max(id) AS id FROM events) TABLE last", 7),
        ("SELECT max(id) FROM events WHERE id > 100", 0),
        ("SELECT id FROM events WHERE id > 100", 0),
    ] {
        let dashboard = Dashboard::on(&url, &["--head-query", query]);
        assert_eq!(dashboard.get(CHECKPOINTS).json()[0]["streamHead"], head, "{query}");
    }
}

#[test]
fn each_projection_may_have_a_head_of_its_own() {
    let (url, store) = database(7);
    store.save_many(&[("orders", 5), ("invoices", 12), ("no stream", 3)]).unwrap();
    for query in [
        "VALUES ('orders', 7), ('invoices', 12), ('never saved', 40), ('empty', NULL), (NULL, 9)",
        "SELECT 'orders' AS head, max(id) AS projection FROM events UNION ALL
         SELECT * FROM (VALUES ('invoices'::varchar, 12), ('never saved', 40), ('empty', NULL)) AS v;",
    ] {
        let dashboard = Dashboard::on(&url, &["--head-query", query]);
        let rows = dashboard.get(CHECKPOINTS).json();
        let heads: Vec<_> = rows.as_array().unwrap().iter().map(|row| {
            (row["projectionName"].as_str().unwrap(), row["streamHead"].as_i64().unwrap())
        }).collect();
        let expected =
            [("empty", 0), ("invoices", 12), ("never saved", 40), ("no stream", 0), ("orders", 7)];
        assert_eq!(heads, expected, "{query}");
        let health = dashboard.health();
        assert_eq!(health.of("orders").1, "projection lagging: 2 events");
        assert_eq!(health.of("empty"), ("healthy", "projection up to date"));
        assert_eq!(health.of("no stream").1, "projection ahead of the stream head: 3 events");
    }
    let none = Dashboard::on(&url, &["--head-query", "SELECT 'orders', 1 WHERE false"]);
    assert_eq!(none.get(CHECKPOINTS).json()[2]["streamHead"], 0);
}

#[test]
fn what_is_ignored_is_shown_and_does_not_count() {
    let (url, store) = database(2_000);
    store.save_many(&[("orders", 2_000), ("rebuilt", 1), ("abandoned", 3_000)]).unwrap();
    let head_query = ["--head-query", HEAD_QUERY];
    assert_eq!(Dashboard::on(&url, &head_query).health().overall(), (503, "unhealthy"));
    let ignore = ["--ignore", "rebuilt", "--ignore", "abandoned", "--ignore", "nothing"];
    let dashboard = Dashboard::on(&url, &[head_query, ["--critical-lag", "2001"]].concat());
    assert_eq!(dashboard.health().of("rebuilt").0, "degraded");
    let dashboard = Dashboard::on(&url, &[&head_query[..], &ignore].concat());
    let health = dashboard.health();
    assert_eq!(health.overall(), (200, "healthy"));
    let critical = ("unhealthy", "projection critically lagging: 1999 events");
    assert_eq!((health.of("rebuilt"), health.projections.len()), (critical, 3));
    let rows = dashboard.get("/health").json();
    let ignored: Vec<_> = (0..3).map(|row| rows["projections"][row]["ignored"].clone()).collect();
    assert_eq!(ignored, [json!(true), json!(false), json!(true)]);
    store.save("orders", 1_000).unwrap();
    assert_eq!(dashboard.health().overall(), (503, "unhealthy"));
}

#[test]
fn metrics_are_in_the_text_format_of_prometheus() {
    let (url, store) = database(1_000);
    store.save_many(&[("orders", 750), ("a \"b\" \\ c\nd", 1_003)]).unwrap();
    let aged = "UPDATE projection_checkpoints SET updated_at = clock_timestamp() - interval '90 s'";
    client(&url).batch_execute(aged).unwrap();
    let arguments =
        ["--head-query", HEAD_QUERY, "--projection", "never saved", "--ignore", "orders"];
    let dashboard = Dashboard::on(&url, &arguments);
    let mut answer = dashboard.get("/metrics");
    wait_until("the store answers", || {
        answer = dashboard.get("/metrics");
        answer.body.contains("\ncheckpoint_store_up 1\n")
    });
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let samples: Vec<_> = answer.body.lines().filter(|line| !line.starts_with('#')).collect();
    let (times, samples): (Vec<&str>, Vec<&str>) = samples
        .into_iter()
        .partition(|sample| sample.starts_with("projection_last_save_age_seconds"));
    let labels = [
        r#"{projection="a \"b\" \\ c\nd",ignored="false"}"#,
        r#"{projection="never saved",ignored="false"}"#,
        r#"{projection="orders",ignored="true"}"#,
    ];
    let mut expected = vec!["checkpoint_store_up 1".to_owned()];
    for (name, values) in [
        ("projection_checkpoint_offset", [1_003, 0, 750]),
        ("projection_stream_head_offset", [1_000; 3]),
        ("projection_lag_events", [-3, 1_000, 250]),
    ] {
        let lines =
            labels.iter().zip(values).map(|(label, value)| format!("{name}{label} {value}"));
        expected.extend(lines);
    }
    assert_eq!(samples, expected);
    for (age, label) in times.iter().zip([labels[0], labels[2]]) {
        let name = format!("projection_last_save_age_seconds{label} ");
        let age: f64 = age.strip_prefix(&name).expect("its name").parse().expect("a number");
        assert!((90.0..150.0).contains(&age), "{age}");
    }
    assert_eq!(times.len(), 2, "one that has never saved has no age");
    for line in answer.body.lines().filter(|line| line.starts_with('#')) {
        assert!(line.starts_with("# HELP ") || line.ends_with(" gauge"), "{line}");
    }
}

#[test]
fn a_head_query_that_fails_is_a_503_that_says_why() {
    let (url, store) = database(7);
    store.save("orders", 7).unwrap();
    for (query, why) in [
        ("SELECT max(id) FROM no_such_table", r#"relation "no_such_table" does not exist"#),
        ("SELECT id FROM events", "more than one row"),
        ("SELECT 1, 2, 3", "subquery must return only one column"),
        ("SELECT 'many'", "bigint"),
        ("SELECT 'orders', 'many'", "bigint"),
        ("DELETE FROM events", "syntax error"),
        ("", "syntax error"),
    ] {
        let dashboard = Dashboard::on(&url, &["--head-query", query]);
        for path in [CHECKPOINTS, "/health"] {
            let error = dashboard.get(path).error();
            assert!(error.starts_with("head query failed: ") && error.contains(why), "{error}");
        }
        assert_eq!(dashboard.get("/").status, 200);
    }
}

#[test]
fn a_store_that_is_down_is_a_503_without_secrets_until_it_is_back() {
    let server = Server::start(Options { password: Some("hunter2".to_owned()), ..Options::fast() });
    let url = server.url("postgres").replace("postgres@", "postgres:hunter2@");
    let store = prepare(&url, 42);
    store.save("orders", 40).unwrap();
    let dashboard = Dashboard::on(&url, &["--head-query", HEAD_QUERY]);
    assert_eq!(dashboard.health().overall(), (200, "degraded"));

    server.stop();
    let early = Dashboard::on(&url, &["--head-query", HEAD_QUERY]);
    for dashboard in [&dashboard, &early] {
        for path in [CHECKPOINTS, "/health"] {
            wait_until("it says why", || {
                let asked = Instant::now();
                let answer = dashboard.ask(path);
                assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
                let error = answer.error();
                assert!(error.contains("the checkpoint store "), "{error}");
                for secret in ["hunter2", "postgres://", "password", url.as_str()] {
                    assert!(!answer.body.contains(secret), "{error}");
                }
                error.contains("Connection refused")
            });
        }
        let metrics = dashboard.get("/metrics");
        assert_eq!(metrics.status, 200);
        assert!(metrics.body.ends_with("\ncheckpoint_store_up 0\n"), "{}", metrics.body);
        for path in ["/", "/live"] {
            assert_eq!(dashboard.get(path).status, 200, "the process is there to say so");
        }
        let complaints = dashboard.complaints();
        assert!(complaints.lines().count() % 2 == 1, "it is told that it is away: {complaints}");
    }

    server.restart();
    for dashboard in [&dashboard, &early] {
        wait_until("the store is back", || dashboard.get("/health").status == 200);
        assert_eq!(dashboard.health().overall(), (200, "degraded"));
        let complaints = dashboard.complaints();
        assert!(complaints.ends_with("\nthe checkpoints can be read again\n"), "{complaints}");
    }

    let wrong = url.replace("hunter2", "hunter3");
    let wrong = Dashboard::on(&wrong, &["--head-query", HEAD_QUERY]);
    wait_until("it says why", || {
        let error = wrong.get("/health").error();
        assert!(!error.contains("hunter"), "{error}");
        error.contains("authentication failed")
    });
}

#[test]
fn a_database_that_does_not_answer_delays_no_answer() {
    let (url, _store) = database(7);
    let dashboard = Dashboard::on(&url, &["--head-query", HEAD_QUERY]);
    let mut blocker = client(&url);
    let mut lock = blocker.transaction().unwrap();
    lock.batch_execute("LOCK TABLE projection_checkpoints").unwrap();
    thread::scope(|scope| {
        let paths = ["/health", CHECKPOINTS, "/metrics", "/", "/live"];
        let requests: Vec<_> = (0..20)
            .map(|number| {
                let path = paths[number % paths.len()];
                let dashboard = &dashboard;
                scope.spawn(move || {
                    let asked = Instant::now();
                    (path, dashboard.ask(path), asked.elapsed())
                })
            })
            .collect();
        for request in requests {
            let (path, answer, took) = request.join().unwrap();
            assert!(took < SOON, "{path}: {took:?}");
            match path {
                "/health" | CHECKPOINTS => {
                    let error = answer.error();
                    assert_eq!(error, "the checkpoint store has not answered within 600ms");
                }
                "/metrics" => assert!(answer.body.ends_with("\ncheckpoint_store_up 0\n")),
                _ => assert_eq!(answer.status, 200),
            }
        }
    });
    let sessions = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let waiting: i64 = client(&url).query_one(sessions, &[]).unwrap().get(0);
    assert_eq!(waiting, 1, "requests share one reading");
    lock.rollback().unwrap();
    wait_until("it answers again", || dashboard.get("/health").status == 200);
    let complaints = dashboard.complaints();
    assert!(complaints.ends_with("\nthe checkpoints can be read again\n"), "{complaints}");
}

#[test]
fn check_answers_each_route_once_and_ends() {
    let (code, stdout, stderr) = run(example("dashboard", "dashboard").arg("--check"));
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    for expected in [
        "GET / 200, ",
        "GET /api/projections/checkpoints 200\n[{",
        "GET /health 503",
        "GET /live 200\n",
        "GET /metrics 200\n",
    ] {
        assert!(stdout.contains(expected), "{stdout}");
    }

    let (url, _store) = database(7);
    let on_database = |url: &str| {
        run(example("dashboard", "dashboard").env("DATABASE_URL", url).args([
            "--check",
            "--head-query",
            HEAD_QUERY,
        ]))
    };
    let (code, stdout, _) = on_database(&url);
    assert_eq!(code, Some(0), "{stdout}");
    assert!(stdout.contains(r#""level":"healthy""#), "{stdout}");

    let (code, stdout, stderr) = on_database(&fresh_database());
    assert_eq!(code, Some(1), "a database without the table is no success: {stdout}");
    assert!(stdout.contains(r#"\"public.projection_checkpoints\" does not exist"#), "{stdout}");
    assert!(stderr.contains("GET /api/projections/checkpoints answered 503"), "{stderr}");
}

#[test]
fn ctrl_c_and_sigterm_end_it_with_exit_code_0() {
    for how in [Signal::INT, Signal::TERM] {
        let mut dashboard = Dashboard::demo(&[]);
        assert_eq!(dashboard.get("/").status, 200);
        signal(&dashboard.process, how);
        let mut ended = None;
        wait_until("it ends", || {
            ended = dashboard.process.try_wait().unwrap();
            ended.is_some()
        });
        assert_eq!(ended.and_then(|status| status.code()), Some(0));
    }
}

#[test]
fn a_database_and_a_query_for_the_head_go_together_and_a_bad_name_is_refused() {
    let dashboard = |arguments: &[&str], url: Option<&str>| {
        let mut command = example("dashboard", "dashboard");
        command.args(arguments).envs(url.map(|url| ("DATABASE_URL", url)));
        failure(&command.output().unwrap())
    };
    let url = "host=localhost user=app";
    assert_eq!(dashboard(&[], Some(url)), "error: DATABASE_URL needs --head-query\n");
    let query = ["--head-query", HEAD_QUERY];
    assert_eq!(dashboard(&query, None), "error: --head-query needs DATABASE_URL\n");
    for option in ["--projection", "--ignore"] {
        let nameless = dashboard(&[option, ""], None);
        assert!(nameless.contains("invalid projection name"), "{nameless}");
    }

    let broken = "host=localhost port=many password='hunter2 and more'";
    let told = dashboard(&query, Some(broken));
    assert!(told.contains("DATABASE_URL cannot be read") && !told.contains("hunter"), "{told}");
}

#[test]
fn a_port_that_is_taken_is_exit_code_1() {
    let taken = Dashboard::demo(&[]);
    let address = taken.address.to_string();
    let (code, _, stderr) = run(example("dashboard", "dashboard").args(["--listen", &address]));
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("cannot listen on {address}")), "{stderr}");
}

/// The rendered table, one array per row: name, reason, health, percent, lag, last save.
const TABLE: &str = "[...document.querySelectorAll('tbody tr')].map(row =>
    ['.name', '.reason', '.mark', '.percent', '.lag', 'time'].map(cell =>
        row.querySelector(cell).innerText.replaceAll('\\u00a0', ' ')))";
const OVERALL: &str = "document.querySelector('#overall')?.innerText";
/// How many elements have to be scrolled sideways.
const TOO_WIDE: &str = "[...document.querySelectorAll('html, #board')]
    .filter(element => element.scrollWidth > element.clientWidth).length";
/// The message of trouble that the page shows, if it shows one.
const TROUBLE: &str = "[...document.querySelectorAll('#trouble:not([hidden])')]
    .map(trouble => trouble.innerText)[0] ?? null";

#[test]
fn the_page_shows_each_projection_and_recovers_from_every_trouble() {
    let server = Server::start(Options::fast());
    let url = server.url("postgres");
    let store = prepare(&url, 12_000);
    let mut dashboard =
        Dashboard::on(&url, &["--head-query", HEAD_QUERY, "--projection", "never saved"]);
    let mut page = Page::open(&dashboard.url());
    let told = |page: &mut Page, what: &str| {
        wait_until(what, || page.evaluate(TROUBLE).as_str().is_some_and(|it| it.contains(what)));
    };
    let level = |page: &mut Page, what: &str| {
        wait_until(what, || page.evaluate(OVERALL) == what);
        assert_eq!(page.evaluate(TROUBLE), Value::Null);
    };

    level(&mut page, "Unhealthy");
    store.save_many(&[("orders", 12_000), (SCRIPT, 11_958), ("restored", 12_250)]).unwrap();
    let aged = "UPDATE projection_checkpoints SET updated_at = now() - interval '3 days 5 hours'";
    client(&url).batch_execute(aged).unwrap();
    wait_until("all rows are there", || page.evaluate(TABLE).as_array().unwrap().len() == 4);
    assert_eq!(
        page.evaluate(TABLE),
        json!([
            [
                "never saved",
                "Critically lagging: 12,000 events",
                "Unhealthy",
                "0.0 %",
                "12,000",
                "never"
            ],
            [
                "restored",
                "Ahead of the stream head: 250 events",
                "Unhealthy",
                "102.1 %",
                "-250",
                "3 d ago"
            ],
            [SCRIPT, "Lagging: 42 events", "Degraded", "99.6 %", "42", "3 d ago"],
            ["orders", "Up to date", "Healthy", "100.0 %", "0", "3 d ago"],
        ])
    );
    assert_eq!(page.evaluate("document.title"), "Unhealthy · Projections", "no name was run");
    assert_eq!(page.evaluate("document.querySelectorAll('main script').length"), 0);
    let colours = "new Set([...document.querySelectorAll('tbody .mark')].map(mark =>
        getComputedStyle(mark).color)).size";
    assert_eq!(page.evaluate(colours), 3, "one colour per level");
    let width = "document.querySelector('tbody tr:last-child .fill').style.width";
    assert_eq!(page.evaluate(width), "100%");

    page.resize(320);
    assert_eq!(page.evaluate(TOO_WIDE), 0, "a phone need not scroll sideways");

    server.stop();
    told(&mut page, "The checkpoint store cannot be read");
    assert_eq!(page.evaluate(OVERALL), "Unknown");
    assert_eq!(page.evaluate(TABLE).as_array().unwrap().len(), 4, "what was known stays");
    server.restart();
    level(&mut page, "Unhealthy");

    let address = dashboard.address.to_string();
    drop(dashboard);
    told(&mut page, "The dashboard cannot be reached");
    store.delete("restored").unwrap();
    dashboard =
        Dashboard::start(example("dashboard", "dashboard").env("DATABASE_URL", &url).args([
            "--listen",
            &address,
            "--head-query",
            HEAD_QUERY,
        ]));
    level(&mut page, "Degraded");
    let names = "[...document.querySelectorAll('tbody .name')].map(name => name.textContent)";
    assert_eq!(page.evaluate(names), json!([SCRIPT, "orders"]));

    store.delete("orders").unwrap();
    store.delete(SCRIPT).unwrap();
    level(&mut page, "Healthy");
    let text = page.evaluate("document.querySelector('#board').innerText");
    assert_eq!(text, "No projection has saved a checkpoint yet.");
    assert_eq!(dashboard.health().overall(), (200, "healthy"));
}

#[test]
fn the_page_keeps_every_digit_and_shows_what_is_beyond_its_stream_and_what_is_ignored() {
    let (url, store) = database(0);
    let (even, odd) = ((1 << 53) + 2, (1 << 53) + 1);
    store
        .save_many(&[("ahead", even), ("behind", i64::MAX - 1), ("old", 1), ("orders", odd)])
        .unwrap();
    let aged = "UPDATE projection_checkpoints SET updated_at = now() - interval '30 hours'
                WHERE projection_name <> 'orders'";
    client(&url).batch_execute(aged).unwrap();
    let heads = format!(
        "VALUES ('ahead', {odd}), ('behind', {}), ('old', 1000), ('orders', {odd})",
        i64::MAX
    );
    let arguments = ["--head-query", &heads, "--ignore", "old", "--stalled-after", "60"];
    let dashboard = Dashboard::on(&url, &arguments);
    let mut page = Page::open(&dashboard.url());
    wait_until("it is read", || page.evaluate(OVERALL) == "Unhealthy");
    let expected = [
        ["ahead", "Ahead of the stream head: 1 event", "Unhealthy", "100.1 %", "-1", "1 d ago"],
        [
            "behind",
            "Stalled: 1 event behind, not saved for 1 d",
            "Unhealthy",
            "99.9 %",
            "1",
            "1 d ago",
        ],
        ["orders", "Up to date", "Healthy", "100.0 %", "0", "just now"],
        [
            "old",
            "Stalled: 999 events behind, not saved for 1 d",
            "Ignored",
            "0.1 %",
            "999",
            "1 d ago",
        ],
    ];
    let mut table = page.evaluate(TABLE);
    table[2][5] = json!("just now"); // it may have taken a second
    assert_eq!(table, json!(expected));
    let offsets = "[...document.querySelectorAll('.offsets')].map(offsets => offsets.innerText)";
    assert_eq!(
        page.evaluate(offsets),
        json!([
            "9,007,199,254,740,994 of 9,007,199,254,740,993",
            "9,223,372,036,854,775,806 of 9,223,372,036,854,775,807",
            "9,007,199,254,740,993 of 9,007,199,254,740,993",
            "1 of 1,000",
        ])
    );
    let looks = "[...document.querySelectorAll('.fill')].map(fill =>
        getComputedStyle(fill).backgroundImage !== 'none')";
    assert_eq!(page.evaluate(looks), json!([true, false, false, false]), "only one is beyond");
    let summary =
        page.evaluate("document.querySelector('#summary').innerText.replaceAll('\\u00a0', ' ')");
    assert_eq!(summary, "4 projections: 2 unhealthy, 1 healthy, 1 ignored");

    let apart = "[...document.querySelectorAll('.reason, .percent, time')]
        .some(element => / (s|min|h|d|%|events?)(?![a-z])/.test(element.textContent))";
    assert_eq!(page.evaluate(apart), false, "a unit stays with its number");
    let below = "document.documentElement.scrollHeight
        - document.querySelector('footer').getBoundingClientRect().bottom - scrollY >= 16";
    for width in [1_200, 320] {
        page.resize(width);
        assert_eq!(page.evaluate(below), true, "nothing touches the lower edge");
        assert_eq!(page.evaluate(TOO_WIDE), 0, "nor does it scroll sideways");
    }
}
