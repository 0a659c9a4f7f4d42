//! A loop's checkpoints on stores that fail, and with rivals.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use checkpoint_store::{
    Cadence, Checkpoint, CheckpointStore, Checkpointer, Error, MemoryCheckpointStore, Result,
    Watermark,
};
use proptest::prelude::*;

use crate::harness::{Schema, chain};

/// What becomes of an `advance`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// The store says no: nothing is stored.
    Refused,
    /// The connection is lost before the store hears of it: nothing is stored.
    LostBefore,
    /// The connection is lost before the answer comes back: it is stored.
    LostAfter,
}
use Fault::{LostAfter, LostBefore, Refused};

/// A memory store whose next calls of `advance` fail as they were told to.
#[derive(Default)]
struct Unreliable {
    memory: MemoryCheckpointStore,
    faults: Mutex<VecDeque<Fault>>,
}

impl Unreliable {
    fn next_fails(&self, faults: &[Fault]) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).extend(faults);
    }

    fn recovers(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn stored(&self) -> i64 {
        self.memory.get("orders").unwrap()
    }
}

impl CheckpointStore for Unreliable {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.memory.find(projection)
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.memory.all()
    }
    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        self.memory.save(projection, offset)
    }
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        match self.faults.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
            None => self.memory.advance(projection, from, to),
            Some(Refused) => Err(Error::backend("advance", "disk full")),
            Some(LostBefore) => Err(lost()),
            Some(LostAfter) => self.memory.advance(projection, from, to).and(Err(lost())),
        }
    }
    fn delete(&self, projection: &str) -> Result<bool> {
        self.memory.delete(projection)
    }
}

fn lost() -> Error {
    Error::unavailable("advance", "connection reset")
}

fn resume<S: CheckpointStore>(store: S, cadence: Cadence) -> Checkpointer<S> {
    Checkpointer::resume(store, "orders", cadence).unwrap()
}

/// Last processed, known to be saved, processed since.
fn state<S: CheckpointStore>(checkpointer: &Checkpointer<S>) -> (i64, i64, u64) {
    (checkpointer.offset(), checkpointer.saved(), checkpointer.pending())
}

#[test]
fn it_resumes_from_its_checkpoint_and_from_zero_without_one() {
    let store = MemoryCheckpointStore::new();
    assert_eq!(state(&resume(&store, Cadence::every(1))), (0, 0, 0));
    store.save("orders", 42).unwrap();
    store.save("others", 99).unwrap();
    assert_eq!(state(&resume(&store, Cadence::every(1))), (42, 42, 0));
    assert_eq!(store.get("orders").unwrap(), 42, "to resume saves nothing");
}

#[test]
fn the_first_event_after_a_resume_is_the_first_to_count() {
    let store = MemoryCheckpointStore::new();
    store.save("orders", 42).unwrap();
    let mut checkpointer = resume(&store, Cadence::every(2));
    assert!(!checkpointer.processed(43).unwrap());
    assert!(checkpointer.processed(44).unwrap());
    assert_eq!(store.get("orders").unwrap(), 44);
}

#[test]
fn flush_saves_what_is_pending_once_and_nothing_when_nothing_is() {
    let store = MemoryCheckpointStore::new();
    let mut checkpointer = resume(&store, Cadence::every(100));
    assert!(!checkpointer.flush().unwrap());
    assert_eq!(store.find("orders").unwrap(), None);
    checkpointer.processed(7).unwrap();
    assert!(checkpointer.flush().unwrap());
    assert_eq!((state(&checkpointer), store.get("orders").unwrap()), ((7, 7, 0), 7));
    assert!(!checkpointer.flush().unwrap());
}

#[test]
fn the_same_offset_again_processes_nothing_more() {
    let store = MemoryCheckpointStore::new();
    let mut checkpointer = resume(&store, Cadence::every(2));
    for _ in 0..5 {
        assert!(!checkpointer.processed(1).unwrap());
    }
    assert_eq!(state(&checkpointer), (1, 0, 1));
    assert!(checkpointer.processed(2).unwrap());
    assert!(!checkpointer.processed(2).unwrap());
    assert_eq!(state(&checkpointer), (2, 2, 0));
}

#[test]
fn an_offset_that_goes_back_is_refused_and_changes_nothing() {
    let store = MemoryCheckpointStore::new();
    store.save("orders", 40).unwrap();
    let mut checkpointer = resume(&store, Cadence::every(2));
    for back in [39, 0, -1, i64::MIN] {
        let refused = checkpointer.processed(back).unwrap_err();
        assert!(matches!(refused, Error::InvalidOffset { offset, .. } if offset == back));
        assert_eq!(state(&checkpointer), (40, 40, 0));
    }
    checkpointer.processed(42).unwrap();
    let refused = checkpointer.processed(41).unwrap_err();
    assert!(matches!(refused, Error::InvalidOffset { offset: 41, .. }));
    assert_eq!(state(&checkpointer), (42, 40, 1));
    assert_eq!(store.get("orders").unwrap(), 40);
    assert!(checkpointer.processed(i64::MAX).unwrap());
    assert_eq!(store.get("orders").unwrap(), i64::MAX);
}

#[test]
fn dropping_it_saves_nothing() {
    let store = MemoryCheckpointStore::new();
    let mut checkpointer = resume(&store, Cadence::every(100));
    checkpointer.processed(1).unwrap();
    drop(checkpointer);
    assert_eq!(store.find("orders").unwrap(), None);
}

#[test]
fn a_bad_name_is_refused_at_once() {
    let store = MemoryCheckpointStore::new();
    for name in ["", "nul\0", &"x".repeat(1_025)] {
        let refused = Checkpointer::resume(&store, name, Cadence::every(1)).unwrap_err();
        assert!(matches!(refused, Error::InvalidProjection { .. }), "{refused:?}");
    }
}

#[test]
fn a_negative_offset_in_the_store_is_refused_when_it_resumes() {
    let schema = Schema::new();
    let insert = "INSERT INTO projection_checkpoints (projection_name, \"offset\")
                  VALUES ('orders', -1)";
    schema.client().execute(insert, &[]).unwrap();
    let refused = Checkpointer::resume(&schema.store, "orders", Cadence::every(1)).unwrap_err();
    assert!(matches!(refused, Error::InvalidOffset { offset: -1, .. }), "{refused:?}");

    let refused = Checkpointer::resume(Negative, "orders", Cadence::every(1)).unwrap_err();
    assert!(matches!(refused, Error::InvalidOffset { offset: -2, .. }), "{refused:?}");
}

/// A custom store that takes -2 for "none".
#[derive(Debug)]
struct Negative;

impl CheckpointStore for Negative {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        Ok(Some(Checkpoint::new(projection, -2, SystemTime::UNIX_EPOCH)))
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        Ok(Vec::new())
    }
    fn save(&self, _: &str, _: i64) -> Result<()> {
        Ok(())
    }
    fn advance(&self, _: &str, _: i64, _: i64) -> Result<()> {
        Ok(())
    }
    fn delete(&self, _: &str) -> Result<bool> {
        Ok(false)
    }
}

#[test]
fn a_failed_save_stays_pending_and_is_due_at_once() {
    type Call = fn(&mut Checkpointer<&Unreliable>) -> Result<bool>;
    let next_calls: [Call; 4] = [
        |checkpointer| checkpointer.save_if_due(),
        |checkpointer| checkpointer.flush(),
        |checkpointer| checkpointer.processed(3),
        |checkpointer| checkpointer.processed(4),
    ];
    for next_call in next_calls {
        for fault in [Refused, LostBefore] {
            let store = Unreliable::default();
            let mut checkpointer = resume(&store, Cadence::every(3));
            checkpointer.processed(1).unwrap();
            checkpointer.processed(2).unwrap();
            store.next_fails(&[fault, fault]);
            let error = checkpointer.processed(3).unwrap_err();
            assert_eq!(error.is_transient(), fault == LostBefore, "{}", chain(&error));
            assert_eq!((state(&checkpointer), store.stored()), ((3, 0, 3), 0));
            next_call(&mut checkpointer).unwrap_err();
            assert_eq!((checkpointer.saved(), store.stored()), (0, 0));

            assert!(next_call(&mut checkpointer).unwrap());
            let offset = checkpointer.offset();
            assert_eq!((state(&checkpointer), store.stored()), ((offset, offset, 0), offset));
            assert!(!checkpointer.processed(offset + 1).unwrap(), "nothing is due any more");
        }
    }
}

#[test]
fn a_flush_that_failed_before_the_cadence_was_reached_is_due_at_once() {
    let store = Unreliable::default();
    let mut checkpointer = resume(&store, Cadence::every(100));
    checkpointer.processed(1).unwrap();
    store.next_fails(&[Refused]);
    checkpointer.flush().unwrap_err();
    assert_eq!(state(&checkpointer), (1, 0, 1));
    assert!(checkpointer.processed(2).unwrap());
    assert_eq!(store.stored(), 2);
}

#[test]
fn its_own_save_is_not_mistaken_for_a_rivals_when_the_answer_was_lost() {
    for fault in [LostBefore, LostAfter] {
        let store = Unreliable::default();
        let mut checkpointer = resume(&store, Cadence::every(3));
        for offset in 1..=2 {
            checkpointer.processed(offset).unwrap();
        }
        store.next_fails(&[fault]);
        let error = checkpointer.processed(3).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert_eq!(store.stored(), if fault == LostAfter { 3 } else { 0 });
        assert_eq!(state(&checkpointer), (3, 0, 3), "not known to be saved");

        assert!(checkpointer.processed(4).unwrap());
        assert_eq!((state(&checkpointer), store.stored()), ((4, 4, 0), 4));
    }
}

#[test]
fn a_save_whose_answer_was_lost_is_found_even_when_nothing_came_after_it() {
    let store = Unreliable::default();
    let mut checkpointer = resume(&store, Cadence::every(100));
    checkpointer.processed(7).unwrap();
    store.next_fails(&[LostAfter]);
    checkpointer.flush().unwrap_err();
    assert!(checkpointer.flush().unwrap());
    assert_eq!((state(&checkpointer), store.stored()), ((7, 7, 0), 7));
    assert!(!checkpointer.flush().unwrap());
}

#[test]
fn any_one_of_several_lost_saves_is_recognised() {
    for stored in 0..4 {
        let store = Unreliable::default();
        let mut checkpointer = resume(&store, Cadence::every(1));
        for attempt in 0..4 {
            store.next_fails(&[if attempt == stored { LostAfter } else { LostBefore }]);
            checkpointer.processed(10 + attempt).unwrap_err();
        }
        assert_eq!(store.stored(), 10 + stored);
        assert!(checkpointer.processed(20).unwrap());
        assert_eq!((state(&checkpointer), store.stored()), ((20, 20, 0), 20));
    }
}

#[test]
fn a_rival_is_found_out_even_while_a_save_is_in_doubt() {
    let store = Unreliable::default();
    let mut checkpointer = resume(&store, Cadence::every(1));
    store.next_fails(&[LostBefore]);
    checkpointer.processed(3).unwrap_err();
    store.save("orders", 2).unwrap();
    for offset in 4..7 {
        let conflict = checkpointer.processed(offset).unwrap_err();
        assert!(matches!(conflict, Error::Conflict { expected: 0, found: 2, .. }), "{conflict:?}");
    }
    assert_eq!((checkpointer.saved(), store.stored()), (0, 2));
}

#[test]
fn once_a_doubt_is_settled_that_offset_is_a_rivals_again() {
    for fault in [LostBefore, LostAfter] {
        let store = Unreliable::default();
        let mut checkpointer = resume(&store, Cadence::every(1));
        store.next_fails(&[fault]);
        checkpointer.processed(3).unwrap_err();
        assert!(checkpointer.processed(5).unwrap(), "the doubt is settled");
        store.save("orders", 3).unwrap();
        let conflict = checkpointer.processed(6).unwrap_err();
        assert!(matches!(conflict, Error::Conflict { expected: 5, found: 3, .. }), "{conflict:?}");
    }
}

#[test]
fn so_is_an_offset_that_was_in_doubt_before_the_one_that_settled_it() {
    let store = Unreliable::default();
    let mut checkpointer = resume(&store, Cadence::every(1));
    store.next_fails(&[LostBefore, LostAfter]);
    checkpointer.processed(2).unwrap_err();
    checkpointer.processed(3).unwrap_err();
    assert!(checkpointer.flush().unwrap(), "it is at 3");
    store.save("orders", 2).unwrap();
    let conflict = checkpointer.processed(6).unwrap_err();
    assert!(matches!(conflict, Error::Conflict { expected: 3, found: 2, .. }), "{conflict:?}");
}

fn a_second_runner_is_found_out(store: &dyn CheckpointStore) {
    store.save("orders", 10).unwrap();
    let mut first = resume(store, Cadence::every(2));
    let mut second = resume(store, Cadence::every(2));

    assert!(!second.processed(11).unwrap());
    assert!(!first.processed(11).unwrap());
    assert!(first.processed(12).unwrap());
    // Even though both have got to the same place.
    let conflict = second.processed(12).unwrap_err();
    assert!(matches!(conflict, Error::Conflict { expected: 10, found: 12, .. }), "{conflict:?}");
    assert!(first.processed(13).is_ok() && first.flush().unwrap());
    for conflict in [second.processed(13), second.save_if_due(), second.flush(), second.flush()] {
        assert!(conflict.unwrap_err().is_conflict());
    }
    assert_eq!((state(&second), store.get("orders").unwrap()), ((13, 10, 3), 13));
    assert!(first.processed(14).is_ok() && first.flush().unwrap());
}

#[test]
fn a_second_runner_on_the_memory_store_is_found_out_at_its_first_save_and_from_then_on() {
    a_second_runner_is_found_out(&MemoryCheckpointStore::new());
}

#[test]
fn a_second_runner_on_postgres_is_found_out_at_its_first_save_and_from_then_on() {
    a_second_runner_is_found_out(&Schema::new().store);
}

#[derive(Debug, Clone)]
enum Step {
    /// An event is processed, so much further on.
    Processed {
        gap: i64,
    },
    SaveIfDue,
    Flush,
    /// The next saves fail like this.
    Faults(Vec<Fault>),
    Recovery,
    /// The process dies, and another one goes on.
    Crash,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![Just(Refused), Just(LostBefore), Just(LostAfter)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..4_i64).prop_map(|gap| Step::Processed { gap }),
        2 => Just(Step::SaveIfDue),
        1 => Just(Step::Flush),
        3 => prop::collection::vec(fault(), 1..4).prop_map(Step::Faults),
        1 => Just(Step::Recovery),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    /// The part that depends on time is tested beside the code, where time is an argument.
    #[test]
    fn whatever_happens_the_checkpoint_is_where_the_cadence_and_the_events_allow(
        events in 1..6_u64,
        start in prop_oneof![Just(0), 1..1_000_i64],
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let store = Unreliable::default();
        store.save("orders", start).unwrap();
        let mut checkpointer = resume(&store, Cadence::every(events));
        // Each event that this process has processed.
        let mut processed: Vec<i64> = Vec::new();
        let mut stored_before = start;

        for step in steps {
            let saving = matches!(step, Step::Processed { .. } | Step::SaveIfDue | Step::Flush);
            let outcome = match step {
                Step::Processed { gap } => {
                    let offset = checkpointer.offset() + gap;
                    if gap > 0 {
                        processed.push(offset);
                    }
                    checkpointer.processed(offset)
                }
                Step::SaveIfDue => checkpointer.save_if_due(),
                Step::Flush => checkpointer.flush(),
                Step::Faults(faults) => {
                    store.next_fails(&faults);
                    Ok(false)
                }
                Step::Recovery => {
                    store.recovers();
                    Ok(false)
                }
                Step::Crash => {
                    checkpointer = resume(&store, Cadence::every(events));
                    processed.clear();
                    prop_assert_eq!(checkpointer.offset(), store.stored());
                    Ok(false)
                }
            };

            let stored = store.stored();
            prop_assert!(stored <= checkpointer.offset(), "beyond the last event processed");
            prop_assert!(stored >= stored_before, "it went back");
            prop_assert!(checkpointer.saved() <= stored, "said to be saved, and is not");
            let unsaved = processed.iter().filter(|&&offset| offset > stored).count() as u64;
            prop_assert!(unsaved <= checkpointer.pending());
            match outcome {
                Ok(true) => prop_assert_eq!(state(&checkpointer), (stored, stored, 0)),
                Ok(false) if saving => prop_assert!(checkpointer.pending() < events),
                Ok(false) => {}
                Err(error) => {
                    prop_assert!(!error.is_conflict(), "there is no rival: {}", error);
                    prop_assert!(checkpointer.pending() > 0);
                }
            }
            stored_before = stored;
        }

        store.recovers();
        checkpointer.flush().unwrap();
        prop_assert_eq!(store.stored(), checkpointer.offset());
    }
}

/// An operator who sets the checkpoint back to where the loser began must not let it in again.
#[test]
fn who_has_met_a_rival_stays_out_without_asking_even_when_the_checkpoint_is_set_back() {
    let store = MemoryCheckpointStore::new();
    let mut loser = resume(&store, Cadence::every(1));
    assert_eq!(loser.projection(), "orders");
    store.save("orders", 7).unwrap();
    let is_the_conflict = |error: Error| {
        assert!(matches!(error, Error::Conflict { expected: 0, found: 7, .. }), "{error:?}");
    };
    is_the_conflict(loser.processed(1).unwrap_err());
    for set_back in [0, 1, 7] {
        store.save("orders", set_back).unwrap();
        let before = store.find("orders").unwrap();
        is_the_conflict(loser.processed(loser.offset() + 1).unwrap_err());
        is_the_conflict(loser.save_if_due().unwrap_err());
        is_the_conflict(loser.flush().unwrap_err());
        is_the_conflict(loser.renew().unwrap_err());
        assert_eq!(store.find("orders").unwrap(), before);
    }
    store.delete("orders").unwrap();
    is_the_conflict(loser.flush().unwrap_err());
    assert_eq!(store.find("orders").unwrap(), None);
}

#[test]
fn an_idle_loop_renews_its_checkpoint() {
    let store = MemoryCheckpointStore::new();
    let mut checkpointer = resume(&store, Cadence::every(100));
    checkpointer.renew().unwrap();
    let first = store.find("orders").unwrap().unwrap();
    assert_eq!(first.offset, 0, "one that has never saved has a checkpoint now");
    crate::harness::wait_until("the clock ticks", || {
        checkpointer.renew().unwrap();
        store.find("orders").unwrap().unwrap().updated_at > first.updated_at
    });
    checkpointer.processed(5).unwrap();
    checkpointer.renew().unwrap();
    assert_eq!((state(&checkpointer), store.get("orders").unwrap()), ((5, 5, 0), 5));
}

/// A store that is down for as long as it is told to be, and has stored what it was told last.
struct Down {
    memory: MemoryCheckpointStore,
    is_down: std::sync::atomic::AtomicBool,
}

impl CheckpointStore for Down {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.memory.find(projection)
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.memory.all()
    }
    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        self.memory.save(projection, offset)
    }
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        if self.is_down.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(lost());
        }
        self.memory.advance(projection, from, to)
    }
    fn delete(&self, projection: &str) -> Result<bool> {
        self.memory.delete(projection)
    }
}

#[test]
fn any_of_many_saves_in_doubt_is_recognised_and_none_costs_the_sum_of_all() {
    const EVENTS: i64 = 200_000;
    let store = Down {
        memory: MemoryCheckpointStore::new(),
        is_down: std::sync::atomic::AtomicBool::new(true),
    };
    for stored in [1, EVENTS / 2, EVENTS] {
        store.memory.delete("orders").unwrap();
        store.is_down.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut checkpointer = resume(&store, Cadence::every(1));
        for offset in 1..=EVENTS {
            checkpointer.processed(offset).unwrap_err();
        }
        assert_eq!(checkpointer.pending(), u64::try_from(EVENTS).unwrap());
        // One of them was stored after all.
        store.memory.save("orders", stored).unwrap();
        store.is_down.store(false, std::sync::atomic::Ordering::Relaxed);
        assert!(checkpointer.processed(EVENTS + 1).unwrap());
        assert_eq!(store.get("orders").unwrap(), EVENTS + 1);
    }
}

#[test]
fn pending_counts_calls_and_the_offsets_say_what_a_crash_repeats() {
    let store = MemoryCheckpointStore::new();
    let mut checkpointer = resume(&store, Cadence::every(4));
    let watermark = Watermark::starting_at(checkpointer.offset());
    for offset in 1..=150 {
        watermark.begin(offset).unwrap();
    }
    for offset in (1..=150).rev() {
        watermark.complete(offset).unwrap();
        assert!(!checkpointer.processed(watermark.offset()).unwrap());
    }
    assert_eq!(checkpointer.pending(), 1, "the watermark has moved once");
    assert_eq!(checkpointer.offset() - checkpointer.saved(), 150);
}

#[test]
fn the_store_can_be_used_and_taken_back_and_neither_saves() {
    let mut checkpointer =
        Checkpointer::resume(MemoryCheckpointStore::new(), "orders", Cadence::every(100)).unwrap();
    checkpointer.processed(7).unwrap();
    assert_eq!(checkpointer.store().get("orders").unwrap(), 0);
    checkpointer.flush().unwrap();
    checkpointer.processed(9).unwrap();
    assert_eq!(checkpointer.store().get("orders").unwrap(), 7);
    let store = checkpointer.into_store();
    assert_eq!(store.get("orders").unwrap(), 7);
    assert_eq!(resume(&store, Cadence::every(1)).offset(), 7);
}
