//! Group commit: calls that wait at the same time share one statement and one flush of the log.

use std::collections::HashSet;
use std::mem;
use std::sync::{Arc, PoisonError};

use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{Error, Result};

/// So many calls at once go alone: to share would make them wait for each other, and save nothing.
const GO_ALONE: usize = if cfg!(test) { 1 } else { 8 };

/// What one call asks for: to set the offset, or to move it from where it is expected.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) projection: String,
    pub(crate) from: Option<i64>,
    pub(crate) to: i64,
}

/// Whose writes a shared statement has stored; all others have not happened.
pub(crate) type Stored = HashSet<String>;

/// What became of one write in a shared statement.
#[derive(Debug)]
enum Share {
    Stored,
    NotStored,
    /// The connection was lost.
    Unknown(Arc<Error>),
}

/// The calls of one store: who writes, and who waits.
///
/// There is no thread and no timer in it. What has come while a group was under way is the next
/// group, and the first of it writes for all.
#[derive(Debug)]
pub(crate) struct Group {
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// How many calls have begun and not returned.
    calls: usize,
    /// Whether a group is under way.
    is_writing: bool,
    /// What is being written. The next call on one of these waits, so that they keep their order.
    projections: HashSet<String>,
    waiting: Vec<Arc<Call>>,
}

#[derive(Debug)]
struct Call {
    write: Write,
    turn: Mutex<Turn>,
    changed: Condvar,
}

#[derive(Debug)]
enum Turn {
    Waits,
    /// It writes for all of these, of which it is the first.
    Leads(Vec<Arc<Call>>),
    Has(Share),
}

impl Group {
    pub(crate) fn new() -> Self {
        Self { queue: Mutex::default() }
    }

    /// Writes alone while few calls are under way, and otherwise together with those that wait. (One
    /// call is a group too: a plain write would wait for a row that is held, and everybody for it.)
    ///
    /// `together` stores what is free and where it is expected to be. The rest goes alone, and so
    /// does everybody when `together` is refused, so that each has the answer of its own write. Only
    /// after a lost connection there is none: a save is repeated, and for an advance `unknown` says
    /// so.
    pub(crate) fn write(
        &self,
        write: Write,
        together: impl FnOnce(&[&Write]) -> Result<Stored>,
        alone: impl FnOnce() -> Result<()>,
        unknown: impl FnOnce(Arc<Error>) -> Error,
    ) -> Result<()> {
        let mut queue = lock(&self.queue);
        queue.calls += 1;
        let goes_alone = queue.calls <= GO_ALONE;
        if goes_alone && queue.projections.insert(write.projection.clone()) {
            drop(queue);
            let _leaves = Leaves { group: self, projection: &write.projection };
            return alone();
        }
        let call = Arc::new(Call { write, turn: Mutex::new(Turn::Waits), changed: Condvar::new() });
        queue.waiting.push(Arc::clone(&call));
        queue.start_next();
        drop(queue);
        let share = match call.wait() {
            Turn::Leads(calls) => self.lead(&calls, together),
            Turn::Has(share) => share,
            Turn::Waits => unreachable!("it waits no longer"),
        };
        if matches!(share, Share::Stored) {
            return Ok(()); // it has left the queue with its group
        }
        let _leaves = Leaves { group: self, projection: &call.write.projection };
        match share {
            Share::Unknown(error) if call.write.from.is_some() => Err(unknown(error)),
            _ => alone(),
        }
    }

    fn lead(
        &self,
        calls: &[Arc<Call>],
        together: impl FnOnce(&[&Write]) -> Result<Stored>,
    ) -> Share {
        let mut ending = Ending { group: self, calls, outcome: Outcome::Panicked };
        let writes: Vec<_> = calls.iter().map(|call| &call.write).collect();
        ending.outcome = match together(&writes) {
            Ok(stored) => Outcome::Stored(stored),
            Err(error @ Error::Unavailable { .. }) => Outcome::Lost(Arc::new(error)),
            Err(_) => Outcome::Stored(Stored::new()),
        };
        ending.outcome.share(&calls[0].write)
    }
}

impl Queue {
    /// Makes all that wait, each projection once, the next group.
    fn start_next(&mut self) {
        if self.is_writing {
            return;
        }
        let projections = &mut self.projections;
        let (next, waiting) = mem::take(&mut self.waiting)
            .into_iter()
            .partition(|call| projections.insert(call.write.projection.clone()));
        self.waiting = waiting;
        let next: Vec<Arc<Call>> = next;
        if let Some(leader) = next.first().cloned() {
            self.is_writing = true;
            leader.is_given(Turn::Leads(next));
        }
    }

    fn leave(&mut self, projection: &str) {
        self.calls -= 1;
        self.projections.remove(projection);
    }
}

impl Call {
    fn wait(&self) -> Turn {
        let mut turn = lock(&self.turn);
        while matches!(*turn, Turn::Waits) {
            turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        mem::replace(&mut turn, Turn::Waits)
    }

    fn is_given(&self, turn: Turn) {
        *lock(&self.turn) = turn;
        self.changed.notify_one();
    }
}

/// A call that goes alone. It leaves the queue when this is dropped, by a panic too.
struct Leaves<'a> {
    group: &'a Group,
    projection: &'a str,
}

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.group.queue);
        queue.leave(self.projection);
        queue.start_next();
    }
}

/// A group that is under way. Its end, which a panic brings too, starts the next one and then tells
/// everybody, so that nobody is left waiting.
struct Ending<'a> {
    group: &'a Group,
    calls: &'a [Arc<Call>],
    outcome: Outcome,
}

enum Outcome {
    Stored(Stored),
    /// The connection was lost.
    Lost(Arc<Error>),
    Panicked,
}

impl Outcome {
    fn share(&self, write: &Write) -> Share {
        match self {
            Self::Stored(stored) if stored.contains(&write.projection) => Share::Stored,
            Self::Stored(_) => Share::NotStored,
            Self::Lost(error) => Share::Unknown(Arc::clone(error)),
            Self::Panicked => {
                let reason = "the thread that wrote for the group panicked";
                Share::Unknown(Arc::new(Error::unavailable("group commit", reason)))
            }
        }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.group.queue);
        queue.is_writing = false;
        for (place, Call { write, .. }) in self.calls.iter().map(AsRef::as_ref).enumerate() {
            let is_over = match &self.outcome {
                Outcome::Stored(stored) => stored.contains(&write.projection),
                Outcome::Lost(_) => false,
                Outcome::Panicked => place == 0,
            };
            if is_over {
                queue.leave(&write.projection);
            }
        }
        queue.start_next();
        drop(queue);
        for call in &self.calls[1..] {
            call.is_given(Turn::Has(self.outcome.share(&call.write)));
        }
    }
}

/// Nothing panics between two changes of what is locked here, so a poisoned lock is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every interleaving of a few threads, by an exhaustive scheduler.
#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use loom::thread;

    use super::*;
    use crate::{CheckpointStore, MemoryCheckpointStore};

    /// What is written to, alone and together. Some names fail or panic where they are shared.
    struct Store {
        group: Group,
        memory: MemoryCheckpointStore,
    }

    impl Store {
        fn write(&self, projection: &str, from: Option<i64>, to: i64) -> Result<()> {
            let alone = |projection: &str, from, to| match from {
                None => self.memory.save(projection, to),
                Some(from) => self.memory.advance(projection, from, to),
            };
            let together = |writes: &[&Write]| {
                let named = |name| writes.iter().any(|write| write.projection == name);
                if named("panics") {
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
                if named("is refused") {
                    return Err(Error::backend("group commit", "on purpose"));
                }
                if named("is lost") {
                    return Err(Error::unavailable("group commit", "on purpose"));
                }
                let stored =
                    |write: &&&Write| alone(&write.projection, write.from, write.to).is_ok();
                Ok(writes.iter().filter(stored).map(|write| write.projection.clone()).collect())
            };
            self.group.write(
                Write { projection: projection.to_owned(), from, to },
                together,
                || alone(projection, from, to),
                |_| Error::unavailable("advance", "lost"),
            )
        }
    }

    fn model(test: impl Fn(&Arc<Store>) + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let memory = MemoryCheckpointStore::new();
            let store = Arc::new(Store { group: Group::new(), memory });
            test(&store);
            let queue = lock(&store.group.queue);
            assert!(queue.calls == 0 && !queue.is_writing, "{queue:?}");
            assert!(queue.projections.is_empty() && queue.waiting.is_empty(), "{queue:?}");
        });
    }

    fn spawn<T: 'static>(
        store: &Arc<Store>,
        work: impl FnOnce(&Store) -> T + 'static,
    ) -> thread::JoinHandle<T> {
        let store = Arc::clone(store);
        thread::spawn(move || work(&store))
    }

    #[test]
    fn every_caller_returns_and_finds_its_offset_stored() {
        model(|store| {
            let others = ["a", "b"].map(|name| {
                spawn(store, move |store| {
                    store.write(name, Some(0), 1).expect("advanced");
                    assert_eq!(store.memory.get(name).expect("read"), 1);
                })
            });
            store.write("c", None, 1).expect("saved");
            assert_eq!(store.memory.get("c").expect("read"), 1);
            for other in others {
                other.join().expect("no panic");
            }
        });
    }

    #[test]
    fn of_rivals_exactly_one_advances() {
        model(|store| {
            let others = [7, 8].map(|to| spawn(store, move |store| store.write("p", Some(0), to)));
            let ours = store.write("p", Some(0), 9);
            let outcomes = others.map(|other| other.join().expect("no panic"));
            let won = outcomes.iter().chain([&ours]).filter(|outcome| outcome.is_ok()).count();
            assert_eq!(won, 1);
            assert!(
                outcomes
                    .into_iter()
                    .chain([ours])
                    .filter_map(Result::err)
                    .all(|lost| lost.is_conflict())
            );
        });
    }

    #[test]
    fn a_thread_that_writes_again_is_not_overtaken_by_its_own_past() {
        model(|store| {
            let other = spawn(store, |store| store.write("other", None, 1).expect("saved"));
            store.write("ours", None, 1).expect("saved");
            store.write("ours", Some(1), 2).expect("advanced");
            store.write("ours", None, 3).expect("saved");
            assert_eq!(store.memory.get("ours").expect("read"), 3);
            other.join().expect("no panic");
        });
    }

    #[test]
    fn no_caller_is_left_waiting_when_the_one_that_writes_panics() {
        model(|store| {
            let write = |name: &'static str, from| {
                move |store: &Store| {
                    catch_unwind(AssertUnwindSafe(|| store.write(name, from, 1))).ok()
                }
            };
            let others =
                [spawn(store, write("panics", None)), spawn(store, write("advances", Some(0)))];
            let _returned = write("saves", None)(store);
            for other in others {
                other.join().expect("returned");
            }
            store.write("next", None, 2).expect("the store works on");
            assert_eq!(store.memory.get("next").expect("read"), 2);
        });
    }

    #[test]
    fn a_refusal_of_the_group_is_nobodys_error_and_a_lost_one_is_that_of_who_advances() {
        for fault in ["is refused", "is lost"] {
            model(move |store| {
                let others = [
                    spawn(store, move |store| store.write(fault, None, 1)),
                    spawn(store, |store| store.write("advances", Some(0), 1)),
                ];
                store.write("saves", None, 1).expect("repeated alone");
                let [faulty, advances] = others.map(|other| other.join().expect("no panic"));
                faulty.expect("repeated alone");
                match advances {
                    Ok(()) => assert_eq!(store.memory.get("advances").expect("read"), 1),
                    Err(error) => {
                        assert!(fault == "is lost" && matches!(error, Error::Unavailable { .. }));
                    }
                }
            });
        }
    }
}
