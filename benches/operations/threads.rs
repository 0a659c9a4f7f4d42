use std::sync::LazyLock;

use checkpoint_store::CheckpointStore;
use criterion::{Criterion, SamplingMode, Throughput};

use crate::support::{DURABLE, SharedStores, has_pgbench, pgbench, times_each};

type Chosen = fn(&SharedStores) -> &dyn CheckpointStore;

const WAYS: [(&str, Chosen); 4] = [
    ("ours", |stores| &stores.ours),
    ("ours, prepared", |stores| &stores.prepared),
    ("ours, group commit", |stores| &stores.grouped),
    ("ours, prepared, group commit", |stores| &stores.grouped_prepared),
];

/// Threads that save at once, on 8 connections; pgbench has one for each.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    let stores = LazyLock::new(|| SharedStores::new(&DURABLE));
    for threads in [1, 8, 32] {
        let mut group = criterion.benchmark_group(format!("threads/durable/{threads}"));
        group.sampling_mode(SamplingMode::Flat).sample_size(20);
        // One iteration is one save by every thread.
        group.throughput(Throughput::Elements(threads as u64));
        for (name, store) in WAYS {
            group.bench_function(name, |bencher| {
                let store = store(&stores);
                let save =
                    |projection: &str, offset| store.save(projection, offset).expect("saved");
                bencher.iter_custom(|times| times_each(threads, times, save));
            });
        }
        if has_pgbench() {
            group.bench_function("pgbench", |bencher| {
                bencher.iter_custom(|times| pgbench(&DURABLE, threads, times));
            });
        }
        group.finish();
    }
}
