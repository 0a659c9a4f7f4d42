//! What a notification saves the reader, and what it costs the writers.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use checkpoint_store::postgres::Client;
use checkpoint_store::postgres::fallible_iterator::FallibleIterator;

use crate::paired::{Candidate, side_by_side};
use crate::report::{Target, duration, print_throughput};
use crate::support::{DURABLE, client, in_threads, store};
use crate::{rounds, threads_word};

/// A stream, and what its trigger does before each append.
fn make_stream(client: &mut Client, name: &str, before_append: &str) {
    let sql = format!(
        "CREATE TABLE {name} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, amount bigint);
         CREATE FUNCTION before_{name}() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN {before_append} RETURN NULL; END $$;
         CREATE TRIGGER before_append BEFORE INSERT ON {name}
             FOR EACH STATEMENT EXECUTE FUNCTION before_{name}();"
    );
    client.batch_execute(&sql).expect("a stream");
}

const IN_TURN: &str = "PERFORM pg_advisory_xact_lock(TG_RELID::bigint);";
const NOTIFY: &str = "NOTIFY events;";

/// From the start of an append to the end of the batch that applies it.
pub(crate) fn print_latency() {
    println!("| An idle worker | From append to applied, median | 95 of 100 |");
    println!("|---|---:|---:|");
    for (what, name, poll) in [
        ("polls every 200 ms", "polled", Some(Duration::from_millis(200))),
        ("waits for a notification", "notified", None),
    ] {
        let mut appender = client(&DURABLE.params());
        make_stream(&mut appender, name, &format!("{IN_TURN} {NOTIFY}"));
        let mut times = latencies(&mut appender, name, poll);
        times.sort();
        let [median, most] =
            [50, 95].map(|percent| duration(times[times.len() * percent / 100].as_secs_f64()));
        println!("| {what} | {median} | {most} |");
    }
    println!();
}

fn latencies(appender: &mut Client, stream: &str, poll: Option<Duration>) -> Vec<Duration> {
    let last = i64::try_from(rounds(200)).expect("not so many");
    let (applied, when_applied) = channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let (store, mut listener) = (store(&DURABLE), client(&DURABLE.params()));
            listener.batch_execute("LISTEN events").expect("it listens");
            let sql = format!("SELECT max(id) FROM {stream} WHERE id > $1");
            loop {
                let batch =
                    store.project(stream, |tx, offset| Ok(tx.query_one(&sql, &[&offset])?.get(0)));
                match (batch.expect("applied"), poll) {
                    (Some(offset), _) => {
                        applied.send(Instant::now()).expect("the appender waits");
                        if offset == last {
                            break;
                        }
                    }
                    (None, Some(pause)) => sleep(pause),
                    (None, None) => {
                        let wait = Duration::from_secs(5);
                        listener.notifications().timeout_iter(wait).next().expect("it listens");
                    }
                }
            }
        });
        let sql = format!("INSERT INTO {stream} (amount) VALUES (1)");
        let append = |_| {
            sleep(Duration::from_millis(fastrand::u64(0..300)));
            let begun = Instant::now();
            appender.execute_typed(&sql, &[]).expect("appended");
            when_applied.recv().expect("applied").saturating_duration_since(begun)
        };
        (0..last).map(append).collect()
    })
}

/// Transactions of one event, with somebody who listens.
pub(crate) fn print_appends(threads: usize) {
    const KINDS: [(&str, &str, &str); 4] = [
        ("plain", "", ""),
        ("notify", "", NOTIFY),
        ("in turn", IN_TURN, ""),
        ("in turn, notify", IN_TURN, NOTIFY),
    ];
    let mut listener = client(&DURABLE.params());
    listener.batch_execute("LISTEN events").expect("it listens");
    let candidates = KINDS.iter().enumerate().map(|(index, (name, lock, notify))| {
        let stream = format!("appended_{threads}_{index}");
        make_stream(&mut listener, &stream, &format!("{lock} {notify}"));
        let clients: Vec<_> = (0..threads).map(|_| Mutex::new(client(&DURABLE.params()))).collect();
        let sql = format!("INSERT INTO {stream} (amount) VALUES (1)");
        let times = if rounds(1_000) == 1_000 { 200 } else { 5 };
        Candidate::timed(name, times, move |times| {
            in_threads(threads, |thread| {
                let mut client = clients[thread].lock().expect("no panic");
                for _ in 0..times {
                    client.execute_typed(&sql, &[]).expect("appended");
                }
            })
        })
    });
    let measured = side_by_side(rounds(30), candidates.collect());
    let threads_word = threads_word(threads);
    for (what, pair) in [
        ("an append that notifies / one that does not", ("notify", "plain")),
        ("the same, appends take turns", ("in turn, notify", "in turn")),
    ] {
        let what = format!("{threads_word}, {what}, durable");
        print_throughput(&what, Target::None, &measured, pair, threads);
    }
}
