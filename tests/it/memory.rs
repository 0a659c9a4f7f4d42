//! The memory store among threads.

use std::panic::{RefUnwindSafe, UnwindSafe, catch_unwind};
use std::thread;

use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};

#[test]
fn threads_that_advance_one_projection_share_out_the_steps() {
    let store = MemoryCheckpointStore::new();
    let steps: i64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut steps = 0;
                    for _ in 0..5_000 {
                        let from = store.get("orders").unwrap();
                        steps += i64::from(store.advance("orders", from, from + 1).is_ok());
                    }
                    steps
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert_eq!(store.get("orders").unwrap(), steps);
}

#[test]
fn saving_an_existing_projection_allocates_nothing() {
    let store = MemoryCheckpointStore::new();
    store.save("orders", 1).unwrap();
    let counted = allocation_counter::measure(|| {
        store.save("orders", 2).unwrap();
        store.advance("orders", 2, 3).unwrap();
        store.save_many(&[("orders", 4)]).unwrap();
        assert_eq!(store.get("orders").unwrap(), 4);
    });
    assert_eq!(counted.count_total, 0);
    let counted = allocation_counter::measure(|| store.save("new", 1).unwrap());
    assert!(counted.count_total > 0, "the counter counts");
}

#[test]
fn a_clone_is_another_handle_on_the_same_checkpoints() {
    let store = MemoryCheckpointStore::new();
    let clone = store.clone();
    clone.save("orders", 1).unwrap();
    assert_eq!(store.get("orders").unwrap(), 1);
    thread::spawn(move || clone.advance("orders", 1, 2)).join().unwrap().unwrap();
    assert_eq!(store.get("orders").unwrap(), 2, "it outlives its clone");
    assert_eq!(MemoryCheckpointStore::new().get("orders").unwrap(), 0, "another store is another");
}

#[test]
fn a_panic_of_a_caller_does_not_harm_it() {
    fn is_unwind_safe<T: UnwindSafe + RefUnwindSafe>(_: &T) {}
    let store = MemoryCheckpointStore::new();
    is_unwind_safe(&store);
    let panicked = catch_unwind(|| {
        store.save("orders", 1).unwrap();
        panic!("on purpose");
    });
    assert!(panicked.is_err());
    assert_eq!(store.get("orders").unwrap(), 1);
}
