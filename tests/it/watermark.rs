//! The watermark against a simple model, and among real threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use checkpoint_store::{Error, Watermark};
use proptest::prelude::*;

fn state(watermark: &Watermark) -> (i64, usize) {
    (watermark.offset(), watermark.in_flight())
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(outcome: &checkpoint_store::Result<T>, offset: i64) {
    let refused =
        matches!(outcome, Err(Error::InvalidOffset { offset: told, .. }) if *told == offset);
    assert!(refused, "{offset} gives {outcome:?}");
}

#[test]
fn it_starts_where_the_checkpoint_is() {
    assert_eq!(state(&Watermark::starting_at(42)), (42, 0));
    let watermark = Watermark::starting_at(42);
    assert_refused(&watermark.begin(42), 42);
    assert_refused(&watermark.complete(42), 42);
    watermark.begin(43).unwrap();
    assert_eq!(state(&watermark), (42, 1));
    assert_eq!(watermark.complete(43).unwrap(), 43);
    assert_eq!(state(&watermark), (43, 0));
}

#[test]
fn it_waits_for_the_first_open_event_then_jumps_to_the_next() {
    let watermark = Watermark::starting_at(0);
    for offset in 1..=5 {
        watermark.begin(offset).unwrap();
    }
    assert_eq!(watermark.complete(5).unwrap(), 0);
    assert_eq!(watermark.complete(2).unwrap(), 0);
    assert_eq!(watermark.complete(3).unwrap(), 0);
    assert_eq!(state(&watermark), (0, 2));
    assert_eq!(watermark.complete(1).unwrap(), 3);
    assert_eq!(watermark.complete(4).unwrap(), 5);
    assert_eq!(state(&watermark), (5, 0));
}

#[test]
fn gaps_in_the_stream_are_not_waited_for_and_not_entered() {
    let watermark = Watermark::starting_at(7);
    for offset in [10, 20, 1_000_000, i64::MAX] {
        watermark.begin(offset).unwrap();
    }
    assert_eq!(watermark.complete(20).unwrap(), 7);
    assert_refused(&watermark.complete(15), 15);
    assert_refused(&watermark.begin(30), 30);
    assert_eq!(watermark.complete(10).unwrap(), 20, "an event, not the end of the gap");
    assert_eq!(watermark.complete(i64::MAX).unwrap(), 20);
    assert_eq!(watermark.complete(1_000_000).unwrap(), i64::MAX);
    assert_refused(&watermark.begin(i64::MAX), i64::MAX);
}

#[test]
fn in_flight_counts_what_is_begun_and_not_complete() {
    let watermark = Watermark::starting_at(0);
    for offset in 1..=100 {
        watermark.begin(offset).unwrap();
    }
    assert_eq!(watermark.in_flight(), 100);
    for offset in 2..=100 {
        watermark.complete(offset).unwrap();
    }
    assert_eq!(state(&watermark), (0, 1), "those beyond an open event are done all the same");
    watermark.complete(1).unwrap();
    assert_eq!(state(&watermark), (100, 0));
}

#[test]
fn an_event_is_begun_once_and_completed_once() {
    let watermark = Watermark::starting_at(0);
    watermark.begin(5).unwrap();
    watermark.begin(6).unwrap();
    for offset in [6, 5, 4, 0, -1, i64::MIN] {
        assert_refused(&watermark.begin(offset), offset);
    }
    for offset in [4, 7, 0, -1, i64::MIN, i64::MAX] {
        assert_refused(&watermark.complete(offset), offset);
    }
    assert_eq!(state(&watermark), (0, 2));
    watermark.complete(6).unwrap();
    assert_refused(&watermark.complete(6), 6);
    assert_eq!(state(&watermark), (0, 1));
    assert_eq!(watermark.complete(5).unwrap(), 6);
    for offset in [5, 6] {
        assert_refused(&watermark.complete(offset), offset);
    }
    assert_eq!(state(&watermark), (6, 0));
}

/// Every event that was ever begun, and whether it is complete.
struct Model {
    start: i64,
    events: BTreeMap<i64, bool>,
}

impl Model {
    fn last_begun(&self) -> i64 {
        self.events.last_key_value().map_or(self.start, |(&offset, _)| offset)
    }

    fn begin(&mut self, offset: i64) -> Option<()> {
        let in_order = offset > self.last_begun();
        in_order.then(|| _ = self.events.insert(offset, false))
    }

    fn complete(&mut self, offset: i64) -> Option<i64> {
        let complete = self.events.get_mut(&offset)?;
        (!std::mem::replace(complete, true)).then(|| self.state().0)
    }

    fn state(&self) -> (i64, usize) {
        let done = self.events.iter().take_while(|&(_, &complete)| complete).last();
        let open = self.events.values().filter(|&&complete| !complete).count();
        (done.map_or(self.start, |(&offset, _)| offset), open)
    }
}

#[derive(Debug, Clone)]
enum Call {
    /// So far from the last event begun: forward as it should be, or back.
    Begin(i64),
    /// Any event ever begun, open or not.
    Complete(prop::sample::Index),
    /// So far from the start, whether there is such an event or not.
    CompleteAt(i64),
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        4 => (1..4_i64).prop_map(Call::Begin),
        1 => (-5..=0_i64).prop_map(Call::Begin),
        6 => any::<prop::sample::Index>().prop_map(Call::Complete),
        1 => (-5..200_i64).prop_map(Call::CompleteAt),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn it_does_as_the_model_does_whatever_the_calls(
        start in prop_oneof![Just(0), 1..1_000_i64],
        calls in prop::collection::vec(call(), 0..150),
    ) {
        let watermark = Watermark::starting_at(start);
        let mut model = Model { start, events: BTreeMap::new() };
        for call in calls {
            let offset = match &call {
                Call::Begin(gap) => model.last_begun() + gap,
                Call::CompleteAt(distance) => start + distance,
                Call::Complete(_) if model.events.is_empty() => start,
                Call::Complete(index) => *model.events.keys().nth(index.index(model.events.len())).unwrap(),
            };
            let before = state(&watermark);
            // A begin says nothing, so the watermark stands in for what a complete returns.
            let (expected, outcome) = match call {
                Call::Begin(_) => (
                    model.begin(offset).map(|()| before.0),
                    watermark.begin(offset).map(|()| before.0),
                ),
                _ => (model.complete(offset), watermark.complete(offset)),
            };
            match (expected, outcome) {
                (Some(expected), Ok(reached)) => prop_assert_eq!(expected, reached),
                (None, Err(Error::InvalidOffset { offset: told, .. })) => {
                    prop_assert_eq!(told, offset);
                    prop_assert_eq!(state(&watermark), before);
                }
                (expected, outcome) => prop_assert!(false, "{:?}, not {:?}", outcome, expected),
            }
            prop_assert_eq!(state(&watermark), model.state());
        }
    }
}

/// The numbers from 0 to `count - 1` in an order that is random, and the same each time.
fn shuffled(count: usize) -> Vec<usize> {
    let mut numbers: Vec<_> = (0..count).collect();
    fastrand::Rng::with_seed(42).shuffle(&mut numbers);
    numbers
}

/// What eight threads know of the events that are done, without asking the watermark.
struct Witness {
    done: Vec<AtomicBool>,
    /// As many events from the first one on were seen to be done.
    seen: AtomicUsize,
}

impl Witness {
    fn of(events: usize) -> Self {
        let done = (0..events).map(|_| AtomicBool::new(false)).collect();
        Self { done, seen: AtomicUsize::new(0) }
    }

    fn note(&self, event: usize) {
        self.done[event].store(true, Ordering::SeqCst);
    }

    /// Fails unless the first `events` are done.
    fn assert_done(&self, events: usize) {
        let seen = self.seen.load(Ordering::SeqCst);
        for event in seen..events {
            assert!(self.done[event].load(Ordering::SeqCst), "it has passed event {event}");
        }
        self.seen.fetch_max(events, Ordering::SeqCst);
    }
}

const EVENTS: usize = 50_000;
const THREADS: usize = 8;
/// The distance between two events.
const GAP: usize = 3;

fn offset(event: usize) -> i64 {
    i64::try_from((event + 1) * GAP).unwrap()
}

/// How many events the watermark has passed.
fn passed(watermark: i64) -> usize {
    let watermark = usize::try_from(watermark).unwrap();
    assert_eq!(watermark % GAP, 0, "{watermark} is not the offset of an event");
    watermark / GAP
}

#[test]
fn eight_threads_complete_50_000_events_in_random_order_and_it_passes_no_open_one() {
    let watermark = Watermark::starting_at(0);
    let witness = Witness::of(EVENTS);
    for event in 0..EVENTS {
        watermark.begin(offset(event)).unwrap();
    }
    let order = shuffled(EVENTS);
    thread::scope(|scope| {
        for share in order.chunks(EVENTS / THREADS) {
            let (watermark, witness) = (&watermark, &witness);
            scope.spawn(move || {
                let mut last = 0;
                for &event in share {
                    witness.note(event);
                    let reached = watermark.complete(offset(event)).unwrap();
                    assert!(reached >= last, "it went back");
                    last = reached;
                    witness.assert_done(passed(reached));
                    witness.assert_done(passed(watermark.offset()));
                }
            });
        }
    });
    assert_eq!(state(&watermark), (offset(EVENTS - 1), 0));
    for event in 0..EVENTS {
        assert_refused(&watermark.complete(offset(event)), offset(event));
    }
}

#[test]
fn a_reader_begins_events_while_eight_threads_complete_them_in_any_order() {
    let watermark = Watermark::starting_at(0);
    let witness = Witness::of(EVENTS);
    thread::scope(|scope| {
        let (watermark, witness) = (&watermark, &witness);
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                let (events, inbox) = std::sync::mpsc::sync_channel::<usize>(64);
                scope.spawn(move || {
                    // Holds some events back, so that later ones are done before them.
                    let mut held = Vec::new();
                    let complete = |event| {
                        witness.note(event);
                        witness.assert_done(passed(watermark.complete(offset(event)).unwrap()));
                    };
                    for event in inbox {
                        held.push(event);
                        if held.len() == 50 {
                            for index in shuffled(50) {
                                complete(held[index]);
                            }
                            held.clear();
                        }
                    }
                    held.into_iter().rev().for_each(complete);
                });
                events
            })
            .collect();
        for event in 0..EVENTS {
            watermark.begin(offset(event)).unwrap();
            workers[event % THREADS].send(event).unwrap();
            witness.assert_done(passed(watermark.offset()));
        }
    });
    assert_eq!(state(&watermark), (offset(EVENTS - 1), 0));
}

#[test]
fn one_event_that_is_never_completed_holds_it_whatever_the_others_do() {
    let watermark = Watermark::starting_at(0);
    for event in 0..EVENTS {
        watermark.begin(offset(event)).unwrap();
    }
    let stuck = EVENTS / 2;
    thread::scope(|scope| {
        for share in shuffled(EVENTS).chunks(EVENTS / THREADS) {
            let (watermark, share) = (&watermark, share.to_vec());
            scope.spawn(move || {
                for event in share.into_iter().filter(|&event| event != stuck) {
                    assert!(watermark.complete(offset(event)).unwrap() < offset(stuck));
                }
            });
        }
    });
    assert_eq!(state(&watermark), (offset(stuck - 1), 1));
    assert_eq!(watermark.complete(offset(stuck)).unwrap(), offset(EVENTS - 1));
}

#[test]
fn the_memory_of_a_large_window_is_given_back() {
    const LARGE: i64 = 1_000_000;
    let watermark = Watermark::starting_at(0);
    let kept = allocation_counter::measure(|| {
        for offset in 1..=LARGE {
            watermark.begin(offset).unwrap();
        }
        for offset in (1..=LARGE).rev() {
            watermark.complete(offset).unwrap();
        }
    });
    assert_eq!(watermark.offset(), LARGE);
    assert!(kept.bytes_max > 8 * LARGE.unsigned_abs(), "{kept:?}");
    assert!(kept.bytes_current < 64 * 1_024, "{kept:?}");
}
