//! The memory store among threads.

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
