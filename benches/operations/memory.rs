use std::hint::black_box;

use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::support::{BareMap, times_each};

/// The memory store, and a bare map behind a lock.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    let ours = MemoryCheckpointStore::new();
    let bare = BareMap::default();
    let mut group = criterion.benchmark_group("memory");
    for threads in [1, 2, 4, 8, 16] {
        // One iteration is one operation by every thread.
        group.throughput(Throughput::Elements(threads as u64));
        group.bench_function(BenchmarkId::new("save, ours", threads), |bencher| {
            bencher.iter_custom(|times| {
                times_each(threads, times, |projection, offset| {
                    ours.save(projection, offset).expect("saved");
                })
            });
        });
        group.bench_function(BenchmarkId::new("save, bare map", threads), |bencher| {
            bencher.iter_custom(|times| {
                times_each(threads, times, |projection, offset| bare.save(projection, offset))
            });
        });
        group.bench_function(BenchmarkId::new("get, ours", threads), |bencher| {
            bencher.iter_custom(|times| {
                times_each(threads, times, |projection, _| {
                    black_box(ours.get(projection).expect("read"));
                })
            });
        });
        group.bench_function(BenchmarkId::new("get, bare map", threads), |bencher| {
            bencher.iter_custom(|times| {
                times_each(threads, times, |projection, _| {
                    black_box(bare.get(projection));
                })
            });
        });
    }
    group.finish();
}
