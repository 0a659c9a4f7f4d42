use std::sync::LazyLock;

use checkpoint_store::CheckpointStore;
use criterion::{BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput};

use crate::support::{DURABLE, Table};

/// Many checkpoints at once: new ones, known ones, and known ones one by one.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("save_many/durable");
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    for count in [1, 10, 100, 1_000, 10_000] {
        let names: Vec<_> = (0..count).map(|number| format!("projection {number}")).collect();
        let mut offset = 0;
        let mut given = || -> Vec<(&str, i64)> {
            offset += 1;
            names.iter().map(|name| (name.as_str(), offset)).collect()
        };
        let table = LazyLock::new(|| Table::new(&DURABLE));
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::new("new", count), |bencher| {
            let mut client = table.store.connection().expect("a connection");
            let empty = format!("TRUNCATE {}.projection_checkpoints", table.schema);
            let emptied = || {
                client.batch_execute(&empty).expect("an empty table");
                given()
            };
            let save = |given: Vec<_>| table.store.save_many(&given).expect("saved");
            bencher.iter_batched(emptied, save, BatchSize::PerIteration);
        });
        group.bench_function(BenchmarkId::new("known", count), |bencher| {
            bencher.iter(|| table.store.save_many(&given()).expect("saved"));
        });
        if count > 1_000 {
            continue; // minutes, to show that the line is straight
        }
        group.bench_function(BenchmarkId::new("known, one by one", count), |bencher| {
            bencher.iter(|| {
                for (projection, offset) in given() {
                    table.store.save(projection, offset).expect("saved");
                }
            });
        });
    }
    group.finish();
}
