use criterion::{BenchmarkId, Criterion, Throughput};

use crate::support::{Batches, SERVERS, SavedBy};

/// Begin, apply a batch of events in one statement, save or not, commit.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    for (durability, server) in SERVERS {
        let mut group = criterion.benchmark_group(format!("transaction/{durability}"));
        for events in [1, 10, 100, 1_000] {
            group.throughput(Throughput::Elements(events));
            for (name, saved_by) in [
                ("without a save", SavedBy::Nobody),
                ("with ours", SavedBy::Us),
                ("with one by hand", SavedBy::Hand),
            ] {
                let mut batches = None;
                group.bench_function(BenchmarkId::new(name, events), |bencher| {
                    let batches = batches.get_or_insert_with(|| {
                        Batches::new(&server.params(), i64::try_from(events).expect("not so many"))
                    });
                    bencher.iter(|| batches.process(saved_by));
                });
            }
        }
        group.finish();
    }
}
