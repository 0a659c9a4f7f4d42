use criterion::Criterion;

use crate::support::{SERVERS, Turns, WAYS};

/// One save, with every way to do it, from the empty round trip up.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    for (durability, server) in SERVERS {
        let mut group = criterion.benchmark_group(format!("save/{durability}"));
        for (name, way) in WAYS {
            let mut turns = Turns::new();
            let mut save = None;
            group.bench_function(name, |bencher| {
                let save = save.get_or_insert_with(|| way(server));
                bencher.iter(|| {
                    let (projection, offset) = turns.next();
                    save(projection, offset);
                });
            });
        }
        group.finish();
    }
}
