use std::time::Instant;

use checkpoint_store::Checkpointer;
use criterion::{Criterion, Throughput};

use crate::support::{CADENCES, DURABLE, handle_event, store};

/// What an event costs in a loop that handles it and saves as its cadence says.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cadence/durable");
    group.throughput(Throughput::Elements(1));
    for (name, cadence, _) in CADENCES {
        let mut checkpointer = None;
        group.bench_function(name, |bencher| {
            let checkpointer = checkpointer.get_or_insert_with(|| {
                Checkpointer::resume(store(&DURABLE), name, cadence).expect("resumed")
            });
            bencher.iter_custom(|events| {
                let begun = Instant::now();
                for _ in 0..events {
                    let offset = checkpointer.offset() + 1;
                    handle_event();
                    checkpointer.processed(offset).expect("saved");
                }
                begun.elapsed()
            });
        });
    }
    group.finish();
}
