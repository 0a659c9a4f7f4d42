//! The example of few threads that share many projections, run as its users run it: as a process.

use std::process::Command;

use checkpoint_store::postgres::Client;

use crate::harness::{self, Options, Running, Server, failure, success};

const TENANTS: i64 = 30;

fn worker_pool(database_url: &str) -> Command {
    let mut command = harness::example("worker_pool", "worker_pool.rs");
    command.env("DATABASE_URL", database_url);
    command
}

/// Appends so many events of all tenants but one, and returns the offset of the last one.
fn append(client: &mut Client, events: i64) -> i64 {
    let sql = "WITH appended AS (
                   INSERT INTO sales (tenant, amount)
                   SELECT i % 29, i FROM generate_series(1, $1::bigint) i RETURNING id)
               SELECT max(id) FROM appended";
    client.query_one(sql, &[&events]).unwrap().get(0)
}

/// How many projections have got there.
fn arrived(client: &mut Client, offset: i64) -> i64 {
    let sql = r#"SELECT count(*) FROM projection_checkpoints WHERE "offset" >= $1"#;
    client.query_one(sql, &[&offset]).map_or(0, |row| row.get(0))
}

/// Each tenant's total is what its events up to its checkpoint add up to, each once.
#[track_caller]
fn check(client: &mut Client) {
    let wrong = r#"
        SELECT tenant FROM (
            SELECT tenant, sum(amount) AS total FROM sales JOIN projection_checkpoints
            ON projection_name = 'revenue/' || tenant AND id <= "offset" GROUP BY tenant) AS fold
        FULL JOIN revenue USING (tenant) WHERE fold.total IS DISTINCT FROM revenue.total"#;
    let wrong = client.query(wrong, &[]).unwrap();
    let wrong: Vec<i64> = wrong.iter().map(|row| row.get(0)).collect();
    assert!(wrong.is_empty(), "tenants {wrong:?}");
}

#[test]
fn each_event_counts_once_whatever_happens_to_the_workers_and_their_connections() {
    let server = Server::start(Options::fast());
    let url = server.url("postgres");
    let start =
        |name: &str| Running::start(&mut worker_pool(&format!("{url}?application_name={name}")));
    let mut client = server.client();
    let (mut survivor, mut mortal) = (start("survivor"), start("mortal"));
    survivor.wait_until("the first events are there", || arrived(&mut client, 900) == TENANTS);
    for round in 0..6 {
        let last = append(&mut client, 2_000);
        if round % 2 == 0 {
            mortal.wait_until("some get on", || arrived(&mut client, last - 1_000) >= 5);
            drop(mortal);
            check(&mut client);
            let name = format!("mortal_{round}");
            mortal = start(&name);
            mortal.wait_until("it is at work", || harness::sessions(&mut client, &name) >= 2);
        } else {
            harness::end_sessions(&mut client);
        }
        survivor.wait_until("all projections are there", || arrived(&mut client, last) == TENANTS);
        check(&mut client);
    }
    for (running, end) in [(survivor, Running::interrupt as fn(&_)), (mortal, Running::terminate)] {
        end(&running);
        success(&running.output());
    }
}

#[test]
fn a_projection_that_another_worker_has_or_that_fails_holds_up_no_other() {
    let url = harness::fresh_database();
    let mut client = harness::client(&url);
    let mut running = Running::start(&mut worker_pool(&url));
    running.wait_until("the first events are there", || arrived(&mut client, 900) == TENANTS);
    client
        .batch_execute(
            "ALTER TABLE revenue ADD CONSTRAINT low CHECK (tenant <> 7 OR total < 15000)",
        )
        .unwrap();
    let mut rival = harness::client(&url);
    let mut tx = rival.transaction().unwrap();
    let take = "SELECT FROM projection_checkpoints WHERE projection_name = 'revenue/3' FOR UPDATE";
    tx.execute(take, &[]).unwrap();

    let last = append(&mut client, 2_000);
    running.wait_until("all others are there", || arrived(&mut client, last) == TENANTS - 2);
    running.wait_until_it_complains("revenue/7 is left for a later round: ");
    check(&mut client);

    tx.rollback().unwrap();
    client.batch_execute("ALTER TABLE revenue DROP CONSTRAINT low").unwrap();
    running.wait_until("all are there", || arrived(&mut client, last) == TENANTS);
    check(&mut client);
    running.interrupt();
    success(&running.output());
}

#[test]
fn while_every_projection_fails_each_is_tried_about_once_a_second() {
    let url = harness::fresh_database();
    let mut client = harness::client(&url);
    let mut running = Running::start(&mut worker_pool(&url));
    running.wait_until("the first events are there", || arrived(&mut client, 900) == TENANTS);
    client
        .batch_execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql
                 AS 'BEGIN RAISE ''no space left'' USING ERRCODE = ''53100''; END';
             CREATE TRIGGER full_disk BEFORE UPDATE OR INSERT ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION full_disk();",
        )
        .unwrap();
    append(&mut client, 100);
    running.wait_until_it_complains("revenue/7 is left for a later round: ");
    let begun = std::time::Instant::now();
    std::thread::sleep(std::time::Duration::from_secs(3));
    running.interrupt();
    let told = harness::stderr(&running.output());
    let seconds = begun.elapsed().as_secs() + 2; // one begun before, one not over
    let most = usize::try_from(seconds).unwrap() * 3 * usize::try_from(TENANTS).unwrap();
    assert!(told.lines().count() <= most, "{} lines", told.lines().count());
}

#[test]
fn while_there_is_nothing_new_the_server_writes_nothing() {
    let server = Server::start(Options::fast().set("autovacuum", "off"));
    let mut client = server.client();
    let mut running = Running::start(&mut worker_pool(&server.url("postgres")));
    running.wait_until("the first events are there", || arrived(&mut client, 900) == TENANTS);
    let ids = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
    let mut next_id = || client.query_one(ids, &[]).unwrap().get::<_, String>(0);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = next_id();
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(next_id(), before, "idle rounds use up transaction ids");
    running.interrupt();
    success(&running.output());
}

#[test]
fn without_a_database_it_says_so() {
    let output = harness::example("worker_pool", "worker_pool.rs").output().unwrap();
    assert!(failure(&output).contains("DATABASE_URL does not say which database to use"));
}

#[test]
fn it_can_be_read_at_one_sitting() {
    let lines = include_str!("../../examples/worker_pool.rs").lines().count();
    assert!(lines <= 110, "{lines}");
}
