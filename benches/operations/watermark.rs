use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use checkpoint_store::Watermark;
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::support::in_threads;

/// What an event costs, begun and completed, with so many in flight all the time.
pub(crate) fn benchmark(criterion: &mut Criterion) {
    for threads in [1, 4, 16] {
        let mut group = criterion.benchmark_group(format!("watermark/{threads} threads"));
        // One iteration is one event by every thread.
        group.throughput(Throughput::Elements(threads as u64));
        for window in [10, 1_000, 100_000] {
            let mut stream = None;
            group.bench_function(BenchmarkId::new("in flight", window), |bencher| {
                let stream = stream.get_or_insert_with(|| Stream::new(threads, window));
                bencher.iter_custom(|each| stream.process(threads, each));
            });
        }
        group.finish();
    }
}

/// Events that are begun in order, and completed by each thread in an order without a pattern.
struct Stream {
    watermark: Watermark,
    next: Mutex<i64>,
    in_flight: Vec<Mutex<InFlight>>,
}

/// What one thread has begun and not completed.
struct InFlight {
    offsets: VecDeque<i64>,
    random: fastrand::Rng,
}

impl Stream {
    fn new(threads: usize, window: usize) -> Self {
        let stream = Self {
            watermark: Watermark::starting_at(0),
            next: Mutex::new(1),
            in_flight: (1..=threads as u64)
                .map(|seed| {
                    let random = fastrand::Rng::with_seed(seed);
                    Mutex::new(InFlight { offsets: VecDeque::new(), random })
                })
                .collect(),
        };
        for slot in 0..window.max(threads) {
            let offset = stream.begin();
            let mut in_flight = stream.in_flight[slot % threads].lock().expect("no panic");
            in_flight.offsets.push_back(offset);
        }
        stream
    }

    fn begin(&self) -> i64 {
        let mut next = self.next.lock().expect("no panic");
        let offset = *next;
        self.watermark.begin(offset).expect("in order");
        *next += 1;
        offset
    }

    fn process(&self, threads: usize, each: u64) -> Duration {
        in_threads(threads, |thread| {
            let InFlight { offsets, random } =
                &mut *self.in_flight[thread].lock().expect("no panic");
            for _ in 0..each {
                offsets.push_back(self.begin());
                let chosen = random.usize(..offsets.len());
                let done = offsets.swap_remove_back(chosen).expect("in flight");
                self.watermark.complete(done).expect("in flight");
            }
        })
    }
}
