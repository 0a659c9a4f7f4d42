use std::time::{Duration, Instant};

use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, PostgresCheckpointStore};

use crate::paired::Spread;
use crate::report::thousands;
use crate::support::{CADENCES, DURABLE, handle_event, only_a_test, store};

/// What each cadence costs while all is well, and what it costs after a crash.
pub(crate) fn print_table() {
    println!("| Cadence | Events per second | Read again after a crash, median | Most seen |");
    println!("|---|---:|---:|---:|");
    let store = store(&DURABLE);
    for (name, cadence, every) in CADENCES {
        let Runs { rate, replayed } = run_and_crash(&store, name, cadence, every);
        let most = replayed.iter().copied().fold(0.0, f64::max);
        println!(
            "| {name} | {} | {} | {} |",
            thousands(rate),
            thousands(Spread::of(replayed).median),
            thousands(most)
        );
    }
}

struct Runs {
    rate: f64,
    replayed: Vec<f64>,
}

/// A loop that crashes again and again, each time while it handles another event, and goes on where
/// its checkpoint says.
fn run_and_crash(
    store: &PostgresCheckpointStore,
    name: &str,
    cadence: Cadence,
    every: Option<u64>,
) -> Runs {
    let crashes = match every {
        _ if only_a_test() => 2,
        Some(_) => 100,
        None => 4,
    };
    let (mut total, mut busy, mut replayed) = (0, Duration::ZERO, Vec::new());
    for crash in 0..crashes {
        let mut checkpointer = Checkpointer::resume(store, name, cadence).expect("resumed");
        let begun = Instant::now();
        let mut events = 0;
        while goes_on(every, crash, events, begun) {
            let offset = checkpointer.offset() + 1;
            handle_event();
            checkpointer.processed(offset).expect("saved");
            events += 1;
        }
        busy += begun.elapsed();
        total += events;
        let processed = checkpointer.offset();
        drop(checkpointer); // as a crash does: it saves nothing
        replayed.push((processed - store.get(name).expect("read")) as f64);
    }
    Runs { rate: total as f64 / busy.as_secs_f64(), replayed }
}

/// Not forever: to another place between two saves each time.
fn goes_on(every: Option<u64>, crash: u32, events: u64, begun: Instant) -> bool {
    const A_PRIME: u64 = 7_919;
    match every {
        Some(every) => events < 20 + every + u64::from(crash) * A_PRIME % every,
        None if only_a_test() => begun.elapsed() < Duration::from_millis(4),
        None => begun.elapsed() < Duration::from_millis(5_500 + u64::from(crash) * 1_300),
    }
}
