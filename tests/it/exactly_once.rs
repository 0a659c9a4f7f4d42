//! The example that a reader copies: run, cut off, killed, run again, and stopped.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;

use checkpoint_store::postgres::Client;
use rustix::process::Signal;

use crate::harness::{self, Options, Server, example, signal, wait_until};

/// The example at work, and where it says its projections are.
struct Running {
    process: Child,
    balances: Arc<AtomicI64>,
    revenue: Arc<AtomicI64>,
}

impl Running {
    fn on(server: &Server) -> Self {
        let mut process = example("exactly_once", "exactly_once.rs")
            .env("DATABASE_URL", server.url("postgres"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example starts");
        let stdout = process.stdout.take().expect("piped");
        let (balances, revenue) = (Arc::<AtomicI64>::default(), Arc::<AtomicI64>::default());
        let (at_balances, at_revenue) = (Arc::clone(&balances), Arc::clone(&revenue));
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let (projection, offset) = line.split_once(" is at ").expect("what it says");
                let at = if projection == "balances" { &at_balances } else { &at_revenue };
                at.store(offset.parse().expect("an offset"), Ordering::SeqCst);
            }
        });
        Self { process, balances, revenue }
    }

    fn wait_until_both_are_at(&self, offset: i64) {
        wait_until("both projections are there", || {
            [&self.balances, &self.revenue].iter().all(|at| at.load(Ordering::SeqCst) >= offset)
        });
    }
}

fn append(client: &mut Client, events: i64) -> i64 {
    let sql = "WITH appended AS (
                   INSERT INTO events (customer, amount)
                   SELECT 'customer ' || i % 7, i FROM generate_series(1, $1::bigint) i RETURNING id)
               SELECT max(id) FROM appended";
    client.query_one(sql, &[&events]).unwrap().get(0)
}

/// Both read models are what the events add up to.
fn check(client: &mut Client) {
    let row = client
        .query_one(
            "SELECT (SELECT sum(amount)::bigint FROM events),
                    (SELECT sum(balance)::bigint FROM balances),
                    (SELECT total::bigint FROM revenue),
                    (SELECT count(*) FROM events), (SELECT events FROM revenue)",
            &[],
        )
        .unwrap();
    let [amounts, balances, total, events, counted] = [0, 1, 2, 3, 4].map(|i| row.get::<_, i64>(i));
    assert_eq!((balances, total, counted), (amounts, amounts, events));
}

#[test]
fn each_event_counts_once_whatever_happens_to_the_program_and_its_connections() {
    let server = Server::start(Options::fast());
    let mut running = Running::on(&server);
    let mut client = server.client();
    wait_until("it has made its tables", || client.query("SELECT FROM revenue", &[]).is_ok());
    for round in 0..6 {
        let last = append(&mut client, 700);
        if round % 2 == 0 {
            running.wait_until_both_are_at(last - 600);
            running.process.kill().expect("a child can be killed");
            running.process.wait().expect("a killed child ends");
            running = Running::on(&server);
        } else {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
            client.execute(end, &[]).unwrap();
        }
        let last = append(&mut client, 50);
        running.wait_until_both_are_at(last);
        check(&mut client);
    }
    signal(&running.process, Signal::INT);
    let status = running.process.wait().expect("it ends");
    assert!(status.success(), "{status}");
    check(&mut client);
}

#[test]
fn without_a_database_it_says_so() {
    let output = example("exactly_once", "exactly_once.rs").output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(harness::stderr(&output).contains("DATABASE_URL is not set"));
    let nowhere = format!("postgres://app:hunter2@127.0.0.1:{}/app", harness::free_port());
    let output = example("exactly_once", "exactly_once.rs").env("DATABASE_URL", nowhere).output();
    let output = output.expect("it runs");
    let told = harness::stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("not available") && !told.contains("hunter2"), "{told}");
}

#[test]
fn it_can_be_read_at_one_sitting() {
    let lines = include_str!("../../examples/exactly_once.rs").lines().count();
    assert!(lines <= 75, "{lines}");
}
