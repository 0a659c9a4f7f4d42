//! The example that a reader copies: run, cut off, killed, run again, and stopped.

use std::process::Command;

use checkpoint_store::postgres::Client;

use crate::harness::{self, Options, Running, Server, failure, success};

fn exactly_once(database_url: &str) -> Command {
    let mut command = harness::example("exactly_once", "exactly_once.rs");
    command.env("DATABASE_URL", database_url);
    command
}

/// Appends so many events in one statement, and returns the offset of the last one.
fn append(client: &mut Client, events: i64) -> i64 {
    let sql = "WITH appended AS (
                   INSERT INTO events (customer, amount)
                   SELECT 'customer ' || i % 7, i FROM generate_series(1, $1::bigint) i RETURNING id)
               SELECT max(id) FROM appended";
    client.query_one(sql, &[&events]).unwrap().get(0)
}

/// How far both projections are.
fn checkpoint(client: &mut Client) -> i64 {
    let sql =
        r#"SELECT COALESCE(min("offset"), 0) FROM projection_checkpoints HAVING count(*) = 2"#;
    client.query_opt(sql, &[]).ok().flatten().map_or(0, |row| row.get(0))
}

/// Each read model is what the events up to its checkpoint add up to, each event once.
#[track_caller]
fn check(client: &mut Client) {
    let wrong = r#"
        WITH read AS (SELECT projection_name, e.* FROM events e JOIN projection_checkpoints ON id <= "offset")
        SELECT 'totals' FROM (SELECT customer, sum(amount) AS total FROM read
                              WHERE projection_name = 'totals' GROUP BY customer) AS fold
            FULL JOIN totals USING (customer) WHERE fold.total IS DISTINCT FROM totals.total
        UNION ALL
        SELECT 'sizes' FROM (SELECT amount / 100 AS hundreds, count(*) AS events FROM read
                             WHERE projection_name = 'sizes' GROUP BY 1) AS fold
            FULL JOIN sizes USING (hundreds) WHERE fold.events IS DISTINCT FROM sizes.events"#;
    let wrong = client.query(wrong, &[]).unwrap();
    let wrong: Vec<String> = wrong.iter().map(|row| row.get(0)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn each_event_counts_once_whatever_happens_to_the_program_and_its_connections() {
    let server = Server::start(Options::fast());
    let url = server.url("postgres");
    let start =
        |name: &str| Running::start(&mut exactly_once(&format!("{url}?application_name={name}")));
    let mut client = server.client();
    // Two at once: they make the tables, and then they are rivals.
    let (mut survivor, mut mortal) = (start("survivor"), start("mortal"));
    survivor.wait_until("the first events are there", || checkpoint(&mut client) == 99);
    for round in 0..8 {
        let last = append(&mut client, 5_000);
        if round % 2 == 0 {
            mortal.wait_until("it gets on", || checkpoint(&mut client) > last - 4_000);
            drop(mortal);
            check(&mut client);
            let name = format!("mortal_{round}");
            mortal = start(&name);
            mortal.wait_until("it is at work", || harness::sessions(&mut client, &name) >= 2);
        } else {
            harness::end_sessions(&mut client);
        }
        survivor.wait_until("both projections are there", || checkpoint(&mut client) == last);
        check(&mut client);
    }
    let totals = "SELECT count(*), (SELECT sum(events)::bigint FROM sizes) FROM events";
    let totals = client.query_one(totals, &[]).unwrap();
    assert_eq!((totals.get(0), totals.get(1)), (99 + 8 * 5_000_i64, 99 + 8 * 5_000_i64));
    for (running, end) in [(survivor, Running::interrupt as fn(&_)), (mortal, Running::terminate)] {
        end(&running);
        let output = running.output();
        success(&output);
        let told = harness::stderr(&output);
        assert!(
            told.lines().all(|line| line.starts_with("retry after ")),
            "no projection has noticed anything but retries: {told}"
        );
    }
}

#[test]
fn one_projection_that_cannot_go_on_ends_the_program_and_is_named() {
    for table in ["totals", "sizes"] {
        let url = harness::fresh_database();
        let mut client = harness::client(&url);
        let mut running = Running::start(&mut exactly_once(&url));
        running.wait_until("the first events are there", || checkpoint(&mut client) == 99);
        client.batch_execute(&format!("DROP TABLE {table}")).unwrap();
        append(&mut client, 1);
        let told = failure(&running.output());
        let missing = format!("relation \"{table}\" does not exist");
        assert!(told.starts_with("error: ") && told.contains(&missing), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn an_error_that_may_pass_is_reported_and_tried_again() {
    let url = harness::fresh_database();
    let mut client = harness::client(&url);
    let mut running = Running::start(&mut exactly_once(&url));
    running.wait_until_it_says("sizes is at 99");
    client
        .batch_execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql
                 AS 'BEGIN RAISE ''no space left'' USING ERRCODE = ''53100''; END';
             CREATE TRIGGER full_disk BEFORE UPDATE OR INSERT ON sizes
                 FOR EACH ROW EXECUTE FUNCTION full_disk();",
        )
        .unwrap();
    let last = append(&mut client, 10);
    running.wait_until_it_complains("sizes tries again: ");
    client.batch_execute("DROP TRIGGER full_disk ON sizes").unwrap();
    running.wait_until("both projections are there", || checkpoint(&mut client) == last);
    check(&mut client);
    running.interrupt();
    success(&running.output());
}

#[test]
fn without_a_database_it_says_so() {
    let output = harness::example("exactly_once", "exactly_once.rs").output().unwrap();
    assert!(failure(&output).contains("DATABASE_URL does not say which database to use"));
    let nowhere = format!("postgres://app:hunter2@127.0.0.1:{}/app", harness::free_port());
    let told = failure(&exactly_once(&nowhere).output().unwrap());
    assert!(told.contains("not available") && !told.contains("hunter2"), "{told}");
}

#[test]
fn it_can_be_read_at_one_sitting() {
    let lines = include_str!("../../examples/exactly_once.rs").lines().count();
    assert!(lines <= 78, "{lines}");
}
