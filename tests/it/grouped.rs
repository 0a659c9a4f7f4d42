//! Saves that wait at the same time, merged. The interleavings are tried by an exhaustive
//! scheduler beside the code; here are the contract and the promises to callers.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use checkpoint_store::{
    Checkpoint, CheckpointStore, Error, GroupedCheckpointStore, MemoryCheckpointStore, Result,
    conformance,
};

use crate::harness::{Schema, chain, sql_state, wait_until};

#[test]
fn the_contract_holds_over_memory() {
    conformance::verify(&GroupedCheckpointStore::new(MemoryCheckpointStore::new()));
}

#[test]
fn the_contract_holds_over_postgres() {
    conformance::verify(&GroupedCheckpointStore::new(Schema::new().store));
}

/// A memory store that holds every save until it is told to go on, and writes down what came.
struct Gated {
    memory: MemoryCheckpointStore,
    arrivals: Sender<()>,
    gate: Mutex<Receiver<Option<Error>>>,
    calls: Mutex<Vec<Vec<(String, i64)>>>,
}

impl Gated {
    fn new() -> (Self, Receiver<()>, Sender<Option<Error>>) {
        let (arrivals, arrived) = channel();
        let (open, gate) = channel();
        let memory = MemoryCheckpointStore::new();
        let gated = Self { memory, arrivals, gate: Mutex::new(gate), calls: Mutex::default() };
        (gated, arrived, open)
    }
}

impl CheckpointStore for Gated {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.memory.find(projection)
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.memory.all()
    }
    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        self.save_many(&[(projection, offset)])
    }
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        self.memory.advance(projection, from, to)
    }
    fn delete(&self, projection: &str) -> Result<bool> {
        self.memory.delete(projection)
    }
    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        let owned = checkpoints.iter().map(|(name, offset)| ((*name).to_owned(), *offset));
        self.calls.lock().unwrap().push(owned.collect());
        self.arrivals.send(()).unwrap();
        if let Some(error) = self.gate.lock().unwrap().recv().unwrap() {
            return Err(error);
        }
        self.memory.save_many(checkpoints)
    }
}

impl std::fmt::Debug for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gated")
    }
}

/// What became of saves that waited together.
struct Outcome {
    results: Vec<Result<()>>,
    calls: Vec<Vec<(String, i64)>>,
    memory: MemoryCheckpointStore,
}

/// Lets one save begin, has the given ones wait for it one after another, and then ends the first
/// one well and the group of the others with `failure`, if there is one.
fn saved_together(waiting: &[(&'static str, i64)], failure: Option<Error>) -> Outcome {
    let (gated, arrived, open) = Gated::new();
    let gated = Arc::new(gated);
    let store = GroupedCheckpointStore::new(Arc::clone(&gated));
    let results = thread::scope(|scope| {
        let store = &store;
        let first = scope.spawn(|| store.save("first", 1));
        arrived.recv().unwrap();
        let mut waiters = Vec::new();
        for &(projection, offset) in waiting {
            waiters.push(scope.spawn(move || store.save(projection, offset)));
            let queued = waiters.len();
            // What waits is shown by `Debug`, as pairs of a name and an offset.
            wait_until("the save waits", || format!("{store:?}").matches("(\"").count() == queued);
        }
        open.send(None).unwrap();
        first.join().unwrap().unwrap();
        arrived.recv().unwrap();
        open.send(failure).unwrap();
        waiters.into_iter().map(|waiter| waiter.join().unwrap()).collect()
    });
    drop(store);
    let Gated { calls, memory, .. } = Arc::into_inner(gated).unwrap();
    Outcome { results, calls: calls.into_inner().unwrap(), memory }
}

#[test]
fn saves_that_wait_at_the_same_time_are_one_save_many() {
    let outcome = saved_together(&[("a", 1), ("b", 2), ("c", 3)], None);
    assert!(outcome.results.iter().all(Result::is_ok));
    let group: Vec<_> = [("a", 1), ("b", 2), ("c", 3)].map(|(p, o)| (p.to_owned(), o)).into();
    assert_eq!(outcome.calls, [vec![("first".to_owned(), 1)], group]);
    assert_eq!(outcome.memory.all().unwrap().len(), 4);
}

#[test]
fn of_two_offsets_that_wait_for_one_projection_the_later_one_wins_and_both_return() {
    let outcome = saved_together(&[("a", 7), ("a", 3)], None);
    assert!(outcome.results.iter().all(Result::is_ok));
    assert_eq!(outcome.memory.get("a").unwrap(), 3);
}

#[test]
fn a_failure_reaches_every_caller_of_its_group_with_its_cause() {
    let failure = Error::backend("save_many", "disk full");
    let outcome = saved_together(&[("a", 1), ("b", 2)], Some(failure));
    for result in outcome.results {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "save_many", .. }), "{error:?}");
        assert!(chain(&error).contains("disk full"), "{}", chain(&error));
    }
    assert_eq!(outcome.memory.get("first").unwrap(), 1, "the one before is not touched");
    assert_eq!(outcome.memory.get("a").unwrap(), 0);
}

#[test]
fn a_group_whose_store_was_lost_is_told_so() {
    let failure = Error::unavailable("save_many", "connection reset");
    let outcome = saved_together(&[("a", 1), ("b", 2)], Some(failure));
    for result in outcome.results {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        assert!(chain(&error).contains("connection reset"), "{}", chain(&error));
    }
}

#[test]
fn a_refusal_by_the_database_keeps_its_sqlstate() {
    let schema = Schema::new();
    schema.client().batch_execute("DROP TABLE projection_checkpoints").unwrap();
    let store = GroupedCheckpointStore::new(schema.store.clone());
    thread::scope(|scope| {
        for i in 0..8 {
            let store = &store;
            scope.spawn(move || {
                let error = store.save(&format!("worker {i}"), 1).unwrap_err();
                assert_eq!(sql_state(&error).as_deref(), Some("42P01"), "{error:?}");
                assert!(!error.is_transient());
            });
        }
    });
}

#[test]
fn many_threads_find_their_own_saves_durable() {
    let schema = Schema::new();
    let store = GroupedCheckpointStore::new(schema.store.clone());
    thread::scope(|scope| {
        for i in 0..32 {
            let (store, schema) = (&store, &schema);
            scope.spawn(move || {
                let projection = format!("worker {i}");
                for offset in 1..=20 {
                    store.save(&projection, offset).unwrap();
                    assert_eq!(schema.store.get(&projection).unwrap(), offset);
                }
                assert!(store.delete(&projection).unwrap());
                assert_eq!(store.get(&projection).unwrap(), 0);
            });
        }
    });
}
