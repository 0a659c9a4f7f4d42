//! Two projections of one stream, each of which applies each event exactly once. Copy it and replace the tables.
//! Run `DATABASE_URL=postgres://.. cargo run --example exactly_once`. Stop it with Ctrl-C, SIGTERM or `kill -9`.

use checkpoint_store::{PostgresCheckpointStore, Result, Retry};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, process::ExitCode, thread, time::Duration};

/// The lock serializes programs that start at once. The trigger serializes appends: ids must commit in order.
const TABLES: &str = "
    SELECT pg_advisory_xact_lock(hashtext('exactly_once'), 0);
    CREATE TABLE IF NOT EXISTS events (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, amount bigint NOT NULL);
    CREATE OR REPLACE FUNCTION append_in_turn() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(TG_RELID::bigint); RETURN NULL; END $$;
    CREATE OR REPLACE TRIGGER append_in_turn BEFORE INSERT ON events
        FOR EACH STATEMENT EXECUTE FUNCTION append_in_turn();
    CREATE TABLE IF NOT EXISTS totals (customer text PRIMARY KEY, total numeric NOT NULL);
    CREATE TABLE IF NOT EXISTS sizes (hundreds bigint PRIMARY KEY, events bigint NOT NULL);
    INSERT INTO events (customer, amount) SELECT 'customer ' || n % 3, n FROM generate_series(1, 99) n
        WHERE NOT EXISTS (SELECT FROM events);";

/// What each projection does with a batch of events.
const TOTALS: &str = "INSERT INTO totals AS t SELECT customer, sum(amount) FROM batch GROUP BY 1
    ON CONFLICT (customer) DO UPDATE SET total = t.total + EXCLUDED.total";
const SIZES: &str = "INSERT INTO sizes AS s SELECT amount / 100, count(*) FROM batch GROUP BY 1
    ON CONFLICT (hundreds) DO UPDATE SET events = s.events + EXCLUDED.events";

static STOP: AtomicBool = AtomicBool::new(false);

fn project(store: &PostgresCheckpointStore, name: &str, apply: &str) -> Result<()> {
    let batch = "SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500";
    let sql = format!("WITH batch AS ({batch}), applied AS ({apply}) SELECT max(id) FROM batch");
    while !STOP.load(Ordering::Relaxed) {
        match store.project(name, |tx, offset| Ok(tx.query_one(&sql, &[&offset])?.get(0))) {
            Ok(Some(offset)) => println!("{name} is at {offset}"),
            Ok(None) => thread::sleep(Duration::from_millis(200)), // nothing new
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => {
                eprintln!("{name} tries again: {}", error.report());
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
    Ok(())
}

/// At the first retry of a call, and then at every tenth.
fn say_what_it_waits_for(retry: &Retry<'_>) {
    if retry.attempt % 10 == 1 {
        eprintln!("retry after {:.1} s: {}", retry.elapsed.as_secs_f32(), retry.error.report());
    }
}

fn run(url: &str) -> Result<()> {
    let store = &PostgresCheckpointStore::builder().on_retry(say_what_it_waits_for).connect(url)?;
    store.migrate()?;
    store.connection()?.batch_execute(TABLES)?;
    thread::scope(|scope| {
        let threads = [("totals", TOTALS), ("sizes", SIZES)]
            .map(|(name, apply)| scope.spawn(move || project(store, name, apply)));
        while !threads.iter().any(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(50));
        }
        STOP.store(true, Ordering::Relaxed); // if one fails, the other stops too
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
