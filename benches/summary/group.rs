use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use crate::paired::{Candidate, Measured, side_by_side};
use crate::report::Target::AtLeast;
use crate::report::print_throughput;
use crate::support::{
    DURABLE, Server, SharedStores, beside_busy_threads, checkpointed_each, only_a_test, times_each,
};
use crate::{rounds, threads_word};

pub(crate) const PLAIN: &str = "Checkpointer";
pub(crate) const GROUPED: &str = "Checkpointer, group commit";

/// Threads with a `Checkpointer` each that saves after every event, without group commit and with it.
pub(crate) fn checkpointers(server: &Server, threads: usize) -> Measured {
    let times = match threads {
        _ if only_a_test() => 10,
        1 | 2 => 1_000,
        8 => 500,
        _ => 300,
    };
    let stores = SharedStores::new(server);
    let candidate = |name, store: &PostgresCheckpointStore| {
        let store = store.clone();
        Candidate::timed(name, times, move |times| checkpointed_each(threads, times, &store))
    };
    let candidates =
        vec![candidate(PLAIN, &stores.prepared), candidate(GROUPED, &stores.grouped_prepared)];
    side_by_side(rounds(15), candidates)
}

pub(crate) fn print_checkpointers(durability: &str, threads: usize, measured: &Measured) {
    let target = match (threads, durability) {
        (32, "durable") => AtLeast(3.0),
        (32, _) => AtLeast(1.0),
        (8, "not durable") => AtLeast(0.8),
        _ => AtLeast(0.9),
    };
    let threads_of = threads_word(threads);
    let what = format!("{threads_of}, a `Checkpointer` each, group commit / without, {durability}");
    print_throughput(&what, target, measured, (GROUPED, PLAIN), threads);
}

/// Four threads that save while others keep the processors busy.
pub(crate) fn print_beside_busy_threads(busy: usize) {
    const SAVERS: usize = 4;
    let times = if only_a_test() { 5 } else { 50 };
    let stores = SharedStores::new(&DURABLE);
    let candidate = |name, store: &PostgresCheckpointStore| {
        let store = store.clone();
        let save =
            move |name: &str, offset| CheckpointStore::save(&store, name, offset).expect("saved");
        Candidate::timed(name, times, move |times| {
            beside_busy_threads(busy, || times_each(SAVERS, times, &save))
        })
    };
    let candidates =
        vec![candidate(PLAIN, &stores.prepared), candidate(GROUPED, &stores.grouped_prepared)];
    let measured = side_by_side(rounds(15), candidates);
    let what = format!("4 threads that save beside {busy} busy ones, group commit / without");
    print_throughput(&what, AtLeast(0.9), &measured, (GROUPED, PLAIN), SAVERS);
}
