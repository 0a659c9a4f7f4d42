//! Two projections of one stream of events, each event exactly once in each. Copy it, and put your own
//! events and read models in. `DATABASE_URL=postgres://.. cargo run --example exactly_once`; Ctrl-C ends it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, thread, time::Duration};

use checkpoint_store::postgres::Transaction;
use checkpoint_store::{PostgresCheckpointStore, Result};

/// Appends take turns, so that events are committed in the order of their ids.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS events (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, amount bigint NOT NULL);
    CREATE OR REPLACE FUNCTION append_in_turn() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(TG_RELID::bigint); RETURN NULL; END $$;
    CREATE OR REPLACE TRIGGER append_in_turn BEFORE INSERT ON events
        FOR EACH STATEMENT EXECUTE FUNCTION append_in_turn();
    CREATE TABLE IF NOT EXISTS balances (customer text PRIMARY KEY, balance numeric NOT NULL);
    CREATE TABLE IF NOT EXISTS revenue (total numeric NOT NULL, events bigint NOT NULL);
    INSERT INTO revenue SELECT 0, 0 WHERE NOT EXISTS (SELECT FROM revenue);";

/// What each projection does with the events after $1, at most 500 of them; the offset of the last.
const BALANCES: &str = "
    WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500),
         applied AS (INSERT INTO balances AS b SELECT customer, sum(amount) FROM batch GROUP BY customer
                     ON CONFLICT (customer) DO UPDATE SET balance = b.balance + EXCLUDED.balance)
    SELECT max(id) FROM batch";
const REVENUE: &str = "
    WITH batch AS (SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT 500),
         applied AS (UPDATE revenue SET total = total + (SELECT COALESCE(sum(amount), 0) FROM batch),
                                        events = events + (SELECT count(*) FROM batch))
    SELECT max(id) FROM batch";

static STOP: AtomicBool = AtomicBool::new(false);

fn run(store: &PostgresCheckpointStore, projection: &str, apply: &str) -> Result<()> {
    let apply_batch = |tx: &mut Transaction<'_>, offset: i64| -> Result<Option<i64>> {
        Ok(tx.query_one(apply, &[&offset])?.get(0))
    };
    while !STOP.load(Ordering::Relaxed) {
        match store.project(projection, apply_batch) {
            Ok(Some(offset)) => println!("{projection} is at {offset}"),
            Ok(None) => thread::sleep(Duration::from_millis(100)), // nothing new
            Err(error) if error.is_transient() => eprintln!("{projection}: {}", error.report()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let Ok(url) = env::var("DATABASE_URL") else {
        eprintln!("error: DATABASE_URL is not set");
        return ExitCode::FAILURE;
    };
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)).expect("no other handler");
    let worked = PostgresCheckpointStore::connect(&url).and_then(|store| {
        store.migrate()?;
        store.connection()?.batch_execute(TABLES)?;
        thread::scope(|scope| {
            let balances = scope.spawn(|| run(&store, "balances", BALANCES));
            let revenue = run(&store, "revenue", REVENUE);
            STOP.store(true, Ordering::Relaxed); // if the one has failed, the other ends too
            revenue.and(balances.join().expect("no panic"))
        })
    });
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.report());
            ExitCode::FAILURE
        }
    }
}
