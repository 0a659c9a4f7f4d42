use std::fmt;
use std::mem;
use std::sync::{Arc, OnceLock, PoisonError};

use crate::sync::{Condvar, Mutex, MutexGuard, yield_now};
use crate::validate::{validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, CheckpointStore, Error, Result};

/// Merges saves that wait at the same time into one
/// [`save_many`](CheckpointStore::save_many), so that many threads share a round trip and a flush
/// of the database's log.
///
/// There is no thread and no timer in it. A save that finds nobody at work is done at once, as
/// without it. Those that come meanwhile wait as a group, and when it is done one of them does the
/// work for all; right after a group it first gives way to whoever can run and wants to join.
///
/// * A call returns only when its own offset is durable, or a later one of the same projection
///   that waited with it: of two that wait, the one that came later is stored.
/// * A failure reaches every caller of the group, and no other. A group is stored as a whole or
///   not at all, if the store's `save_many` is; the stores of this crate are.
/// * When the thread that saves for a group panics, the others of the group get
///   [`Unavailable`](Error::Unavailable), for the outcome is unknown, and the next group goes on.
///
/// [`advance`](CheckpointStore::advance) and [`delete`](CheckpointStore::delete) are not merged.
/// They come after every save that has returned, and so after those of the same thread.
///
/// It pays off with many threads, many projections and a store that waits for a disk. It gives
/// nothing to one thread.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, GroupedCheckpointStore, MemoryCheckpointStore};
///
/// let store = GroupedCheckpointStore::new(MemoryCheckpointStore::new());
/// std::thread::scope(|scope| {
///     for worker in 0..8 {
///         let store = &store;
///         scope.spawn(move || store.save(&format!("worker {worker}"), 42));
///     }
/// });
/// assert_eq!(store.all()?.len(), 8);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug)]
pub struct GroupedCheckpointStore<S> {
    store: S,
    queue: Mutex<Queue>,
}

#[derive(Debug)]
struct Queue {
    /// Whether some thread is saving.
    busy: bool,
    /// Whether the last save was for a group. Those whom it has just woken come again at once, so
    /// the next one lets them run first: otherwise every other group would be of one.
    crowded: bool,
    /// What the waiting group is to save, in the order in which it came.
    waiting: Vec<(String, i64)>,
    group: Arc<Group>,
}

/// Saves that wait together.
#[derive(Debug)]
struct Group {
    outcome: OnceLock<Result<(), Arc<Error>>>,
    /// Notified when the outcome is there, or when it is this group's turn.
    changed: Condvar,
}

impl Group {
    fn new() -> Arc<Self> {
        Arc::new(Self { outcome: OnceLock::new(), changed: Condvar::new() })
    }
}

impl<S: CheckpointStore> GroupedCheckpointStore<S> {
    /// Merges what is saved through it. The store may be owned, a reference or an [`Arc`]; what
    /// others do to it is not merged.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{GroupedCheckpointStore, MemoryCheckpointStore};
    /// let store = GroupedCheckpointStore::new(MemoryCheckpointStore::new());
    /// ```
    pub fn new(store: S) -> Self {
        let queue = Queue { busy: false, crowded: false, waiting: Vec::new(), group: Group::new() };
        Self { store, queue: Mutex::new(queue) }
    }

    /// Nothing panics between two changes of the queue, so a poisoned one is still whole.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives way until nobody joins any more: no longer than it takes those who can run to do so.
    fn let_others_join<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        loop {
            let joined = queue.waiting.len();
            drop(queue);
            yield_now();
            queue = self.queue();
            if queue.waiting.len() == joined {
                return queue;
            }
        }
    }

    /// Saves through `alone` when nobody is at work, and with the waiting group otherwise.
    fn save_in_turn(
        &self,
        checkpoints: &[(&str, i64)],
        alone: impl FnOnce(&S) -> Result<()>,
    ) -> Result<()> {
        let mut queue = self.queue();
        if !queue.busy && !queue.crowded && queue.waiting.is_empty() {
            queue.busy = true;
            drop(queue);
            let _turn = Turn { queue: &self.queue, group: None };
            return alone(&self.store);
        }
        let owned = checkpoints.iter().map(|&(projection, offset)| (projection.to_owned(), offset));
        queue.waiting.extend(owned);
        let group = Arc::clone(&queue.group);
        loop {
            if let Some(outcome) = group.outcome.get() {
                return share(outcome);
            }
            if !queue.busy {
                break;
            }
            queue = group.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.busy = true;
        if queue.crowded {
            queue = self.let_others_join(queue);
        }
        let checkpoints = mem::take(&mut queue.waiting);
        queue.crowded = checkpoints.len() > 1;
        queue.group = Group::new();
        drop(queue);

        let turn = Turn { queue: &self.queue, group: Some(&group) };
        let borrowed: Vec<_> = checkpoints.iter().map(|(name, to)| (name.as_str(), *to)).collect();
        let outcome = self.store.save_many(&borrowed).map_err(Arc::new);
        let own = share(&outcome);
        turn.end_with(outcome);
        own
    }
}

/// The right to save. Passed on when it is dropped, by a panic too.
struct Turn<'a> {
    queue: &'a Mutex<Queue>,
    group: Option<&'a Group>,
}

impl Turn<'_> {
    fn end_with(self, outcome: Result<(), Arc<Error>>) {
        if let Some(group) = self.group {
            // It is empty: nobody else has this group's turn.
            let _ = group.outcome.set(outcome);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            group.outcome.get_or_init(|| {
                let source = "the thread that saved for the group panicked";
                Err(Arc::new(Error::unavailable("save", source)))
            });
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.busy = false;
        let next = (!queue.waiting.is_empty()).then(|| Arc::clone(&queue.group));
        drop(queue);
        // Whoever saves next goes first, and finds the queue open.
        if let Some(next) = next {
            next.changed.notify_one();
        }
        if let Some(group) = self.group {
            group.changed.notify_all();
        }
    }
}

/// One caller's share of what came of its group.
fn share(outcome: &Result<(), Arc<Error>>) -> Result<()> {
    let Err(failure) = outcome else { return Ok(()) };
    let source = GroupFailure(Arc::clone(failure));
    Err(match &**failure {
        Error::Unavailable { operation, .. } => Error::unavailable(operation, source),
        Error::Backend { operation, .. } => Error::backend(operation, source),
        Error::IncompatibleTable { table, reason } => {
            Error::IncompatibleTable { table: table.clone(), reason: reason.clone() }
        }
        _ => Error::backend("save_many", source),
    })
}

#[derive(Debug)]
struct GroupFailure(Arc<Error>);

impl fmt::Display for GroupFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("in a group of saves")
    }
}

impl std::error::Error for GroupFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl<S: CheckpointStore> CheckpointStore for GroupedCheckpointStore<S> {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.store.find(projection)
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.store.all()
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        self.save_in_turn(&[(projection, offset)], |store| store.save(projection, offset))
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        self.store.advance(projection, from, to)
    }

    fn delete(&self, projection: &str) -> Result<bool> {
        self.store.delete(projection)
    }

    fn get(&self, projection: &str) -> Result<i64> {
        self.store.get(projection)
    }

    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        if checkpoints.is_empty() {
            return Ok(());
        }
        self.save_in_turn(checkpoints, |store| store.save_many(checkpoints))
    }
}

/// Every interleaving of a few threads, by an exhaustive scheduler.
#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use loom::thread;

    use super::*;
    use crate::MemoryCheckpointStore;

    fn model(test: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(test);
    }

    #[test]
    fn every_caller_returns_and_finds_its_offset_durable() {
        model(|| {
            let store = Arc::new(GroupedCheckpointStore::new(MemoryCheckpointStore::new()));
            let workers: Vec<_> = ["a", "b"]
                .into_iter()
                .map(|projection| {
                    let store = Arc::clone(&store);
                    thread::spawn(move || {
                        store.save(projection, 1).expect("saved");
                        assert_eq!(store.get(projection).expect("read"), 1);
                    })
                })
                .collect();
            store.save("c", 1).expect("saved");
            assert_eq!(store.get("c").expect("read"), 1);
            for worker in workers {
                worker.join().expect("no panic");
            }
            assert!(!store.queue().busy && store.queue().waiting.is_empty());
        });
    }

    #[test]
    fn a_thread_that_saves_again_is_not_overtaken_by_its_own_past() {
        model(|| {
            let store = Arc::new(GroupedCheckpointStore::new(MemoryCheckpointStore::new()));
            let other = {
                let store = Arc::clone(&store);
                thread::spawn(move || store.save("other", 1).expect("saved"))
            };
            store.save("ours", 1).expect("saved");
            store.save("ours", 2).expect("saved");
            assert!(store.delete("ours").expect("deleted"));
            other.join().expect("no panic");
            assert_eq!(store.find("ours").expect("read"), None);
        });
    }

    /// Fails or panics on what its name says, by `save` and by `save_many`.
    struct Faulty(MemoryCheckpointStore);

    impl CheckpointStore for Faulty {
        fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
            self.0.find(projection)
        }
        fn all(&self) -> Result<Vec<Checkpoint>> {
            self.0.all()
        }
        fn save(&self, projection: &str, offset: i64) -> Result<()> {
            self.save_many(&[(projection, offset)])
        }
        fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
            self.0.advance(projection, from, to)
        }
        fn delete(&self, projection: &str) -> Result<bool> {
            self.0.delete(projection)
        }
        fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
            for (projection, _) in checkpoints {
                match *projection {
                    "panics" => std::panic::resume_unwind(Box::new("on purpose")),
                    "fails" => return Err(Error::backend("save_many", "on purpose")),
                    _ => {}
                }
            }
            self.0.save_many(checkpoints)
        }
    }

    #[test]
    fn no_caller_is_left_waiting_when_the_one_that_saves_panics() {
        model(|| {
            let store = Arc::new(GroupedCheckpointStore::new(Faulty(MemoryCheckpointStore::new())));
            let panics = {
                let store = Arc::clone(&store);
                thread::spawn(move || {
                    let _ = catch_unwind(AssertUnwindSafe(|| store.save("panics", 1)));
                })
            };
            let saved = {
                let store = Arc::clone(&store);
                thread::spawn(move || {
                    let saved = catch_unwind(AssertUnwindSafe(|| store.save("a", 1)));
                    match saved {
                        Ok(Ok(())) => assert_eq!(store.get("a").expect("read"), 1),
                        Ok(Err(error)) => assert!(matches!(error, Error::Unavailable { .. })),
                        Err(_) => {} // it did the work for the group
                    }
                })
            };
            panics.join().expect("returned");
            saved.join().expect("returned");
            store.save("b", 2).expect("the store works on");
            assert_eq!(store.get("b").expect("read"), 2);
        });
    }

    #[test]
    fn a_failure_reaches_its_group_and_nobody_else() {
        model(|| {
            let store = Arc::new(GroupedCheckpointStore::new(Faulty(MemoryCheckpointStore::new())));
            let fails = {
                let store = Arc::clone(&store);
                thread::spawn(move || store.save("fails", 1).is_err())
            };
            match store.save("a", 1) {
                Ok(()) => assert_eq!(store.get("a").expect("read"), 1),
                Err(error) => {
                    assert!(matches!(error, Error::Backend { .. }));
                    assert_eq!(store.get("a").expect("read"), 0);
                }
            }
            assert!(fails.join().expect("returned"));
            store.save("b", 2).expect("the store works on");
        });
    }
}
