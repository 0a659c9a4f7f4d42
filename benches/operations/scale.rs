use std::sync::LazyLock;

use checkpoint_store::CheckpointStore;
use criterion::{BenchmarkId, Criterion, SamplingMode};

use crate::support::{NOT_DURABLE, Table, only_a_test, scattered};

/// Among more and more projections. Not durable, because waiting for the disk would hide most of
/// what there is to see.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    let sizes = if only_a_test() { &[10, 1_000][..] } else { &[10, 1_000, 100_000, 1_000_000] };
    let mut group = criterion.benchmark_group("scale/not durable");
    for &projections in sizes {
        let table = LazyLock::new(|| Table::with(&NOT_DURABLE, projections));
        let store = || &table.store;
        let mut turns = 0..;
        let mut name = || scattered(turns.next().expect("no end"), projections);
        group.bench_function(BenchmarkId::new("save", projections), |bencher| {
            let store = store();
            bencher.iter(|| store.save(&name(), 42).expect("saved"));
        });
        group.bench_function(BenchmarkId::new("get", projections), |bencher| {
            let store = store();
            bencher.iter(|| store.get(&name()).expect("read"));
        });
    }
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    for &projections in sizes {
        let table = LazyLock::new(|| Table::with(&NOT_DURABLE, projections));
        group.bench_function(BenchmarkId::new("all", projections), |bencher| {
            let store = &table.store;
            bencher.iter(|| store.all().expect("read"));
        });
    }
    group.finish();
}
