use std::time::{Duration, Instant};

use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, PostgresCheckpointStore};

use crate::paired::Spread;
use crate::report::thousands;
use crate::support::{CADENCES, DURABLE, handle_event, only_a_test, store};

/// What each cadence costs while all is well, and what it costs after a crash.
pub(crate) fn print_table() {
    println!("| Cadence, durable | Events a second | Replayed after a crash, median | At most |");
    println!("|---|---:|---:|---:|");
    let store = store(&DURABLE);
    for (name, cadence) in CADENCES {
        let Runs { rate, replayed } = run_and_crash(&store, name, cadence);
        let most = replayed.iter().copied().fold(0.0, f64::max);
        println!(
            "| {name} | {} | {} | {} |",
            thousands(rate),
            thousands(Spread::of(replayed).median),
            thousands(most)
        );
    }
    println!();
    println!("An event takes 10 µs besides.");
}

struct Runs {
    rate: f64,
    replayed: Vec<f64>,
}

/// A loop that crashes again and again, each time at another moment, and goes on where its
/// checkpoint says.
fn run_and_crash(store: &PostgresCheckpointStore, name: &str, cadence: Cadence) -> Runs {
    let timed = cadence == Cadence::within(Duration::from_secs(5));
    let (crashes, longest) = match (only_a_test(), timed) {
        (true, _) => (2, Duration::from_millis(4)),
        (false, true) => (4, Duration::from_secs(10)),
        (false, false) => (100, Duration::from_millis(100)),
    };
    let (mut events, mut busy, mut replayed) = (0, Duration::ZERO, Vec::new());
    for crash in 0..crashes {
        let lasts = longest / 2 + longest / 2 * crash / crashes;
        let mut checkpointer = Checkpointer::resume(store, name, cadence).expect("resumed");
        let begun = Instant::now();
        while begun.elapsed() < lasts {
            let offset = checkpointer.offset() + 1;
            handle_event();
            checkpointer.processed(offset).expect("saved");
            events += 1;
        }
        busy += begun.elapsed();
        let processed = checkpointer.offset();
        drop(checkpointer); // as a crash does: it saves nothing
        replayed.push((processed - store.get(name).expect("read")) as f64);
    }
    Runs { rate: f64::from(events) / busy.as_secs_f64(), replayed }
}
