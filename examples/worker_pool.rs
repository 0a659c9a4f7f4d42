//! A few threads share many projections: each processes those that are behind and not locked by another worker.
//! Each event is applied exactly once in each projection, with any number of threads and programs.
//! Run `DATABASE_URL=postgres://.. cargo run --example worker_pool`. Stop it with Ctrl-C, SIGTERM or `kill -9`.

use checkpoint_store::{Batch, CheckpointStore, PostgresCheckpointStore, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{collections::HashMap, env, process::ExitCode, thread};

const TENANTS: i64 = 30;
const THREADS: [i64; 3] = [0, 10, 20]; // each begins with another tenant, so that they rarely compete

/// The lock serializes programs that start at once. The trigger serializes appends: ids must commit in order.
const TABLES: &str = "
    SELECT pg_advisory_xact_lock(hashtext('worker_pool'), 0);
    CREATE TABLE IF NOT EXISTS sales (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant bigint NOT NULL, amount bigint NOT NULL);
    CREATE OR REPLACE FUNCTION append_in_turn() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(TG_RELID::bigint); RETURN NULL; END $$;
    CREATE OR REPLACE TRIGGER append_in_turn BEFORE INSERT ON sales
        FOR EACH STATEMENT EXECUTE FUNCTION append_in_turn();
    CREATE TABLE IF NOT EXISTS revenue (tenant bigint PRIMARY KEY, total numeric NOT NULL);
    INSERT INTO sales (tenant, amount) SELECT n % 30, n FROM generate_series(1, 900) n
        WHERE NOT EXISTS (SELECT FROM sales);";

/// Applies the tenant's events, and returns the last event that was read, of any tenant: otherwise a tenant
/// without new events would read the same ones again and again.
const APPLY: &str = "
    WITH batch AS (SELECT * FROM sales WHERE id > $1 ORDER BY id LIMIT 500),
         applied AS (INSERT INTO revenue AS r
                     SELECT tenant, sum(amount) FROM batch WHERE tenant = $2 GROUP BY tenant
                     ON CONFLICT (tenant) DO UPDATE SET total = r.total + EXCLUDED.total)
    SELECT max(id) FROM batch";

static STOP: AtomicBool = AtomicBool::new(false);

type Failures = HashMap<i64, Instant>; // a projection that failed pauses for a second

/// Visits each projection once, and returns how many have advanced.
fn round(store: &PostgresCheckpointStore, first: i64, failures: &mut Failures) -> Result<usize> {
    // Two reads show which projections are behind. To lock each one would cost far more.
    let head = store.connection()?.query_one("SELECT COALESCE(max(id), 0) FROM sales", &[])?;
    let (head, all): (i64, _) = (head.get(0), store.all()?.into_iter());
    let checkpoints: HashMap<_, _> = all.map(|found| (found.projection, found.offset)).collect();
    let mut moved = 0;
    for tenant in (0..TENANTS).map(|number| (first + number) % TENANTS) {
        let name = format!("revenue/{tenant}");
        let is_behind = checkpoints.get(&name).copied().unwrap_or(0) < head;
        let pauses = failures.get(&tenant).is_some_and(|at| at.elapsed() < Duration::from_secs(1));
        if !is_behind || pauses || STOP.load(Ordering::Relaxed) {
            continue;
        }
        let batch = store.try_project(&name, |tx, offset| {
            let last = tx.query_one(APPLY, &[&offset, &tenant])?;
            Ok(last.get(0))
        });
        match batch {
            Ok(Batch::Committed(offset)) => {
                println!("{name} is at {offset}");
                moved += 1;
            }
            Ok(_) => {} // another worker holds it, or has applied the events
            Err(error) => {
                eprintln!("{name} is left for a later round: {}", error.report());
                failures.insert(tenant, Instant::now());
            }
        }
    }
    Ok(moved)
}

fn work(store: &PostgresCheckpointStore, first: i64) -> Result<()> {
    let mut failures = Failures::new();
    while !STOP.load(Ordering::Relaxed) {
        match round(store, first, &mut failures) {
            Ok(0) => thread::sleep(Duration::from_millis(200)), // nothing new
            Ok(_) => {}
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => {
                eprintln!("trying again: {}", error.report());
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
    Ok(())
}

fn run(url: &str) -> Result<()> {
    let store = &PostgresCheckpointStore::connect(url)?;
    store.migrate()?;
    store.connection()?.batch_execute(TABLES)?;
    thread::scope(|scope| {
        let threads = THREADS.map(|first| scope.spawn(move || work(store, first)));
        while !threads.iter().any(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(50));
        }
        STOP.store(true, Ordering::Relaxed); // if one fails, the others stop too
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn main() -> ExitCode {
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)).expect("no other handler");
    match env::var("DATABASE_URL").map(|url| run(&url)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => eprintln!("error: {}", error.report()),
        Err(_) => eprintln!("error: DATABASE_URL does not say which database to use"),
    }
    ExitCode::FAILURE
}
