//! Group commit: calls that wait at the same time share one statement and one flush of the log.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::inside::{Inside, is_inside};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{Error, Result};

/// Up to this many calls at once send their own statements. In a group they would wait for each
/// other and gain nothing.
const MAX_ALONE: usize = 8;

/// How often a call that waits tells so.
const ROUND: Duration = Duration::from_secs(1);

/// What one call asks for: to set the offset, or to move it from where it is expected.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) projection: String,
    pub(crate) from: Option<i64>,
    pub(crate) to: i64,
}

/// The projections whose writes the statement of a group has stored. The other writes have not
/// happened.
pub(crate) type Stored = HashSet<String>;

/// Why the statement of a group has stored nothing, as far as the client knows.
#[derive(Debug)]
pub(crate) enum GroupError {
    /// There was no connection.
    NotSent(Error),
    /// The connection was lost: the outcome is unknown.
    Lost(Error),
    /// The server executed nothing. Each call gets the error of its own statement.
    Refused,
}

/// Whether the write of a call has been executed by its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Executed {
    No,
    Unknown,
}

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Unanswered {
    #[error("timed out before its group began; nothing was sent")]
    Waiting,
    #[error("timed out while its group was under way; the outcome is unknown")]
    UnderWay,
    #[error("in a group of calls")]
    Failed(#[source] Arc<Error>),
    #[error("the thread that sent the statement of its group panicked")]
    Panicked,
}

/// The calls of one store.
///
/// A call sends its own statement or is part of a group. The calls that come while a group is under
/// way are the next group; the thread of the first one, the leader, sends the statement for all, and
/// the followers wait for the outcome. It has no thread and no timer of its own.
#[derive(Debug)]
pub(crate) struct Group {
    queue: Mutex<Queue>,
}

/// Each projection has one call at a time, so that its calls keep their order.
#[derive(Debug, Default)]
struct Queue {
    max_alone: usize,
    /// How many calls have begun and not returned.
    calls: usize,
    /// The projections that have a call which is ready or runs, with the calls that wait for its
    /// end.
    projections: HashMap<String, VecDeque<Arc<Request>>>,
    /// The calls that wait for nothing but the end of the group that is under way.
    ready: Vec<Arc<Request>>,
    /// The calls of the group that is under way, the leader first. Empty if there is none.
    under_way: Vec<Arc<Request>>,
}

/// A call in the queue.
#[derive(Debug)]
struct Request {
    write: Write,
    /// While the call waits, it is changed only under the lock of the queue.
    state: Mutex<State>,
    changed: Condvar,
}

/// A call goes from `Waiting` to `Alone`, or to `Follower` or `Leader` and then to the outcome of its
/// group: `Stored`, `Alone` or `Failed`.
#[derive(Debug, Clone)]
enum State {
    Waiting,
    /// Its group is under way.
    Follower,
    /// It sends the statement of its group; whether the server has executed that.
    Leader(Executed),
    /// It sends its own statement.
    Alone,
    /// The group has stored its write. It has left the queue, and returns.
    Stored,
    /// The group has failed.
    Failed(Executed, Unanswered),
    /// It timed out. It has left the queue, and returns.
    Abandoned,
}

impl State {
    fn is_waiting(&self) -> bool {
        matches!(self, Self::Waiting | Self::Follower)
    }
}

impl Group {
    pub(crate) fn new() -> Self {
        Self::with_max_alone(MAX_ALONE)
    }

    fn with_max_alone(max_alone: usize) -> Self {
        let queue = Queue { max_alone, ..Queue::default() };
        Self { queue: Mutex::new(queue) }
    }

    /// Sends the write alone while few calls are under way, and otherwise in a group.
    ///
    /// `together` sends the statement of a group. It stores the writes whose rows are free and where
    /// they are expected; a group of one uses it too, because a plain write would wait for a row that
    /// another transaction holds, and all waiting calls with it. The other writes are sent by `alone`
    /// afterwards, and so are all of them if the statement was refused, so that each caller gets the
    /// answer to its own write. After a lost connection a save is repeated by `alone`; an advance
    /// must not be.
    ///
    /// The call waits for others no longer than until `deadline`, which is that of `together` and
    /// `alone` too. Both are called after it as well, if the turn of this call comes that late, and
    /// then have no time to wait. While the call waits, `waiting` is called about once a second. If the
    /// call has no answer, `unanswered` makes its error. No lock is held while they run, and what they
    /// call may write through the same store.
    pub(crate) fn write(
        &self,
        write: Write,
        deadline: Instant,
        together: impl FnOnce(&[&Write]) -> Result<Stored, GroupError>,
        alone: impl FnOnce(Executed) -> Result<()>,
        waiting: impl FnMut(),
        unanswered: impl FnOnce(Unanswered) -> Error,
    ) -> Result<()> {
        // What a call runs, such as an observer of retries, must not wait for the call which it is part of.
        if is_inside(self) {
            return alone(Executed::No);
        }
        let _inside = Inside::enter(self);
        let is_save = write.from.is_none();
        let call = RequestGuard::begin(self, write);
        let mut state = call.wait(deadline, waiting);
        if let State::Leader(_) = state {
            state = call.lead(together);
        }
        match state {
            State::Stored => Ok(()),
            State::Failed(executed, cause) => {
                let is_repeatable = executed == Executed::No || is_save;
                if is_repeatable && Instant::now() < deadline {
                    alone(executed)
                } else {
                    Err(unanswered(cause))
                }
            }
            _ => alone(Executed::No),
        }
    }
}

impl Queue {
    fn enter(&mut self, request: &Arc<Request>) {
        self.calls += 1;
        match self.projections.entry(request.write.projection.clone()) {
            Entry::Occupied(waiting) => waiting.into_mut().push_back(Arc::clone(request)),
            Entry::Vacant(free) => {
                free.insert(VecDeque::new());
                self.ready.push(Arc::clone(request));
            }
        }
        self.start();
    }

    /// Starts the calls that are ready: alone if few calls are left, or else as the next group.
    fn start(&mut self) {
        if self.calls <= self.max_alone {
            for request in self.ready.drain(..) {
                request.set(State::Alone);
                request.changed.notify_one();
            }
        } else if self.under_way.is_empty() && !self.ready.is_empty() {
            self.under_way = mem::take(&mut self.ready);
            for follower in &self.under_way[1..] {
                follower.set(State::Follower);
            }
            let leader = &self.under_way[0];
            leader.set(State::Leader(Executed::No));
            leader.changed.notify_one();
        }
    }

    /// Makes the next call on a projection ready.
    fn release(&mut self, projection: &str) {
        match self.projections.get_mut(projection).and_then(VecDeque::pop_front) {
            Some(next) => self.ready.push(next),
            None => drop(self.projections.remove(projection)),
        }
    }

    /// Takes out a call that has not begun.
    fn remove(&mut self, request: &Arc<Request>) {
        let projection = &request.write.projection;
        if let Some(place) = self.ready.iter().position(|ready| Arc::ptr_eq(ready, request)) {
            self.ready.remove(place);
            self.release(projection);
        } else if let Some(waiting) = self.projections.get_mut(projection) {
            waiting.retain(|waiting| !Arc::ptr_eq(waiting, request));
        }
    }
}

impl Request {
    fn set(&self, state: State) {
        *lock(&self.state) = state;
    }
}

/// A call on its own thread. Its drop, by a panic too, lets it return: whatever its state is, no other
/// call is left waiting for it.
struct RequestGuard<'a> {
    group: &'a Group,
    request: Arc<Request>,
}

impl<'a> RequestGuard<'a> {
    fn begin(group: &'a Group, write: Write) -> Self {
        let state = Mutex::new(State::Waiting);
        let request = Arc::new(Request { write, state, changed: Condvar::new() });
        lock(&group.queue).enter(&request);
        Self { group, request }
    }

    fn state(&self) -> State {
        lock(&self.request.state).clone()
    }

    /// Waits until the call is to send a statement or has an outcome. `waiting` is called once a second,
    /// without a lock.
    fn wait(&self, deadline: Instant, mut waiting: impl FnMut()) -> State {
        loop {
            let round = deadline.min(Instant::now() + ROUND);
            let mut state = lock(&self.request.state);
            loop {
                if !state.is_waiting() {
                    return state.clone();
                }
                let left = round.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let woken = self.request.changed.wait_timeout(state, left);
                (state, _) = woken.unwrap_or_else(PoisonError::into_inner);
            }
            drop(state);
            if round == deadline {
                return self.give_up();
            }
            waiting();
        }
    }

    /// Takes the call from the queue, unless it need not wait any longer. If its group is under way, its
    /// projection is released at the end of that: a later call would be overtaken.
    fn give_up(&self) -> State {
        let mut queue = lock(&self.group.queue);
        let outcome = match self.state() {
            State::Waiting => {
                queue.remove(&self.request);
                State::Failed(Executed::No, Unanswered::Waiting)
            }
            State::Follower => State::Failed(Executed::Unknown, Unanswered::UnderWay),
            state => return state,
        };
        self.request.set(State::Abandoned);
        queue.calls -= 1;
        queue.start();
        outcome
    }

    /// Sends the statement of the group. Returns the outcome for the leader's own write.
    fn lead(&self, together: impl FnOnce(&[&Write]) -> Result<Stored, GroupError>) -> State {
        self.request.set(State::Leader(Executed::Unknown));
        let requests = lock(&self.group.queue).under_way.clone();
        let writes: Vec<_> = requests.iter().map(|request| &request.write).collect();
        let failed = |executed, error| State::Failed(executed, Unanswered::Failed(Arc::new(error)));
        let (stored, not_stored) = match together(&writes) {
            Ok(stored) => (stored, State::Alone),
            Err(GroupError::Refused) => (Stored::new(), State::Alone),
            Err(GroupError::NotSent(error)) => (Stored::new(), failed(Executed::No, error)),
            Err(GroupError::Lost(error)) => (Stored::new(), failed(Executed::Unknown, error)),
        };
        self.end_group(&stored, &not_stored);
        self.state()
    }

    /// Starts the next group and gives each call of this one its outcome.
    fn end_group(&self, stored: &Stored, not_stored: &State) {
        let mut queue = lock(&self.group.queue);
        let requests = mem::take(&mut queue.under_way);
        let mut returning = 0;
        for request in &requests {
            let projection = &request.write.projection;
            let is_stored = stored.contains(projection);
            let is_abandoned = matches!(*lock(&request.state), State::Abandoned);
            if is_stored || is_abandoned {
                queue.release(projection);
            }
            if !is_abandoned {
                returning += usize::from(is_stored);
                request.set(if is_stored { State::Stored } else { not_stored.clone() });
            }
        }
        // The calls that return now still count, because their threads tend to come back at once:
        // otherwise two groups of 8 threads that alternate would never become groups.
        queue.start();
        queue.calls -= returning;
        drop(queue);
        for request in requests {
            request.changed.notify_one();
        }
    }
}

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        if self.state().is_waiting() {
            self.give_up(); // what it called meanwhile has panicked
        }
        if let State::Leader(executed) = self.state() {
            self.end_group(&Stored::new(), &State::Failed(executed, Unanswered::Panicked));
        }
        // In the other states it has left the queue already.
        if let State::Alone | State::Failed(..) = self.state() {
            let mut queue = lock(&self.group.queue);
            queue.calls -= 1;
            queue.release(&self.request.write.projection);
            queue.start();
        }
    }
}

/// No code panics halfway through a change under these locks, so the data is consistent even if a
/// lock is poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every interleaving of a few threads, by an exhaustive scheduler.
///
/// It knows no time. A deadline that has passed from the beginning covers every moment at which a call
/// may time out, because the scheduler delays the thread that looks at it as long as it likes.
#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use loom::thread;

    use super::*;
    use crate::{CheckpointStore, MemoryCheckpointStore};

    /// What is written to, alone and together. Some names fail or panic where they are shared.
    struct Store {
        group: Group,
        memory: MemoryCheckpointStore,
    }

    fn far_away() -> Instant {
        Instant::now() + Duration::from_secs(86_400)
    }

    fn passed() -> Instant {
        Instant::now()
    }

    impl Store {
        fn write(&self, projection: &str, from: Option<i64>, to: i64) -> Result<()> {
            self.write_by(far_away(), projection, from, to)
        }

        fn write_by(
            &self,
            deadline: Instant,
            projection: &str,
            from: Option<i64>,
            to: i64,
        ) -> Result<()> {
            let together = |writes: &[&Write]| {
                let named = |name| writes.iter().any(|write| write.projection == name);
                if named("panics") {
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
                if named("is refused") {
                    return Err(GroupError::Refused);
                }
                if named("is lost") {
                    return Err(GroupError::Lost(Error::unavailable("group commit", "on purpose")));
                }
                if named("is not sent") {
                    let error = Error::unavailable("group commit", "on purpose");
                    return Err(GroupError::NotSent(error));
                }
                Ok(self.store(writes))
            };
            self.group.write(
                Write { projection: projection.to_owned(), from, to },
                deadline,
                together,
                |executed| {
                    assert!(executed == Executed::No || from.is_none(), "an advance is repeated");
                    self.apply(projection, from, to)
                },
                || {},
                |cause| Error::unavailable("write", cause),
            )
        }

        fn apply(&self, projection: &str, from: Option<i64>, to: i64) -> Result<()> {
            match from {
                None => self.memory.save(projection, to),
                Some(from) => self.memory.advance(projection, from, to),
            }
        }

        fn store(&self, writes: &[&Write]) -> Stored {
            let is_stored =
                |write: &&&Write| self.apply(&write.projection, write.from, write.to).is_ok();
            writes.iter().filter(is_stored).map(|write| write.projection.clone()).collect()
        }

        /// Begins a call without a thread of its own.
        fn begin(&self, projection: &str) -> RequestGuard<'_> {
            let write = Write { projection: projection.to_owned(), from: None, to: 1 };
            RequestGuard::begin(&self.group, write)
        }

        /// A call that goes alone, and returns when it is dropped.
        fn occupy(&self, projection: &str) -> RequestGuard<'_> {
            let call = self.begin(projection);
            assert!(matches!(call.wait(far_away(), || {}), State::Alone));
            call
        }

        /// Lets the leader of a group send its statement and return.
        fn lead(&self, leader: RequestGuard<'_>) {
            let state = leader.wait(far_away(), || {});
            assert!(matches!(state, State::Leader(_)), "{state:?}");
            let outcome = leader.lead(|writes| Ok(self.store(writes)));
            assert!(matches!(outcome, State::Stored), "{outcome:?}");
            drop(leader);
        }

        fn is_occupied(&self, projection: &str) -> bool {
            lock(&self.group.queue).projections.contains_key(projection)
        }
    }

    fn model(max_alone: usize, test: impl Fn(&Arc<Store>) + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let memory = MemoryCheckpointStore::new();
            let store = Arc::new(Store { group: Group::with_max_alone(max_alone), memory });
            test(&store);
            let queue = lock(&store.group.queue);
            assert!(queue.calls == 0 && queue.under_way.is_empty(), "{queue:?}");
            assert!(queue.projections.is_empty() && queue.ready.is_empty(), "{queue:?}");
        });
    }

    fn spawn<T: 'static>(
        store: &Arc<Store>,
        work: impl FnOnce(&Store) -> T + 'static,
    ) -> thread::JoinHandle<T> {
        let store = Arc::clone(store);
        thread::spawn(move || work(&store))
    }

    /// Counts what calls come to, over all interleavings.
    #[derive(Debug, Default)]
    struct Seen {
        stored: AtomicUsize,
        timed_out_while_waiting: AtomicUsize,
        timed_out_in_a_group: AtomicUsize,
        panicked: AtomicUsize,
    }

    impl Seen {
        fn note(&self, outcome: &Result<()>) {
            let counter = match outcome {
                Ok(()) => &self.stored,
                Err(Error::Unavailable { source, .. }) => match source.downcast_ref() {
                    Some(Unanswered::Waiting) => &self.timed_out_while_waiting,
                    Some(Unanswered::UnderWay) => &self.timed_out_in_a_group,
                    Some(Unanswered::Panicked) => &self.panicked,
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }

        fn all(&self) -> [usize; 4] {
            [
                &self.stored,
                &self.timed_out_while_waiting,
                &self.timed_out_in_a_group,
                &self.panicked,
            ]
            .map(|counter| counter.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn every_caller_returns_and_finds_its_offset_stored() {
        model(1, |store| {
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
        model(1, |store| {
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
        model(1, |store| {
            let other = spawn(store, |store| store.write("other", None, 1).expect("saved"));
            store.write("ours", None, 1).expect("saved");
            store.write("ours", Some(1), 2).expect("advanced");
            store.write("ours", None, 3).expect("saved");
            assert_eq!(store.memory.get("ours").expect("read"), 3);
            other.join().expect("no panic");
        });
    }

    /// A group is under way, and a call on "p" waits for its end, when the calls that went alone
    /// return.
    fn with_a_waiting_call(
        store: &Arc<Store>,
        then: impl FnOnce(thread::JoinHandle<()>) -> Option<thread::JoinHandle<()>>,
    ) {
        let alone = ["a", "b", "c"].map(|name| store.occupy(name));
        let mut waiting = None;
        store
            .group
            .write(
                Write { projection: "slow".to_owned(), from: None, to: 1 },
                far_away(),
                |writes| {
                    let first = spawn(store, |store| store.write("p", None, 1).expect("saved"));
                    while !store.is_occupied("p") {
                        thread::yield_now();
                    }
                    drop(alone);
                    waiting = then(first);
                    Ok(store.store(writes))
                },
                |_| panic!("it is the leader of a group"),
                || {},
                |cause| panic!("{cause}"),
            )
            .expect("saved");
        if let Some(first) = waiting {
            first.join().expect("no panic");
        }
    }

    #[test]
    fn a_waiting_call_goes_alone_when_few_calls_are_left() {
        model(3, |store| {
            with_a_waiting_call(store, |first| {
                first.join().expect("returned while the group is under way");
                None
            });
            assert_eq!(store.memory.get("p").expect("read"), 1);
        });
    }

    #[test]
    fn a_call_does_not_overtake_an_earlier_one_on_its_projection() {
        model(3, |store| {
            with_a_waiting_call(store, |first| {
                let second = spawn(store, |store| store.write("p", None, 2).expect("saved"));
                second.join().expect("no panic");
                Some(first)
            });
            assert_eq!(store.memory.get("p").expect("read"), 2);
        });
    }

    #[test]
    fn a_call_that_timed_out_does_not_overwrite_a_later_one() {
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        model(0, move |store| {
            let others = ["a", "b"]
                .map(|name| spawn(store, move |store| store.write(name, None, 1).expect("saved")));
            noted.note(&store.write_by(passed(), "p", None, 1));
            store.write("p", None, 2).expect("saved");
            assert_eq!(store.memory.get("p").expect("read"), 2);
            for other in others {
                other.join().expect("no panic");
            }
            assert_eq!(store.memory.get("p").expect("read"), 2);
        });
        assert!(seen.all()[..3].iter().all(|&count| count > 0), "{seen:?}");
    }

    #[test]
    fn the_projection_of_a_call_that_timed_out_is_occupied_until_the_end_of_its_group() {
        model(2, |store| {
            let alone = ["a", "b"].map(|name| store.occupy(name));
            let first = store.begin("first");
            let [leader, follower] = ["leader", "p"].map(|name| store.begin(name));
            store.lead(first);
            drop(alone);
            let timed_out = follower.wait(passed(), || {});
            assert!(matches!(timed_out, State::Failed(_, Unanswered::UnderWay)), "{timed_out:?}");
            assert!(store.is_occupied("p"), "a later call would be overtaken by the group");
            store.lead(leader);
            assert!(!store.is_occupied("p"));
            store.write("p", None, 2).expect("saved");
            assert_eq!(store.memory.get("p").expect("read"), 2);
        });
    }

    #[test]
    fn no_call_is_left_waiting_behind_one_that_timed_out() {
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        model(1, move |store| {
            let noted = Arc::clone(&noted);
            let timed = spawn(store, move |store| {
                noted.note(&store.write_by(passed(), "p", None, 1));
            });
            let behind = spawn(store, |store| store.write("p", None, 2).expect("saved"));
            store.write("q", None, 1).expect("saved");
            store.write("p", None, 3).expect("saved");
            timed.join().expect("no panic");
            behind.join().expect("no panic");
            assert!(store.memory.get("p").expect("read") > 0);
        });
        assert!(seen.all()[..2].iter().all(|&count| count > 0), "{seen:?}");
    }

    #[test]
    fn no_caller_is_left_waiting_when_the_leader_panics() {
        model(1, |store| {
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
    fn a_follower_that_timed_out_under_a_leader_that_panics_holds_up_nobody() {
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        model(0, move |store| {
            let panics = spawn(store, |store| {
                catch_unwind(AssertUnwindSafe(|| store.write("panics", None, 1))).is_err()
            });
            let other = spawn(store, |store| {
                catch_unwind(AssertUnwindSafe(|| store.write("other", None, 1))).is_err()
            });
            let timed =
                catch_unwind(AssertUnwindSafe(|| store.write_by(passed(), "p", Some(0), 1)));
            if let Ok(outcome) = timed {
                noted.note(&outcome);
            }
            store.memory.delete("p").expect("deleted");
            let next = catch_unwind(AssertUnwindSafe(|| store.write("p", None, 2)));
            panics.join().expect("returned");
            other.join().expect("returned");
            if let Ok(Ok(())) = next {
                assert_eq!(store.memory.get("p").expect("read"), 2);
            }
        });
        assert!(seen.all()[..3].iter().all(|&count| count > 0), "{seen:?}");
    }

    #[test]
    fn what_a_call_runs_may_write_through_the_same_store() {
        for max_alone in [0, 1] {
            model(max_alone, |store| {
                let other = spawn(store, |store| store.write("other", None, 1).expect("saved"));
                let nested = |offset| {
                    store.write("p", None, offset).expect("saved");
                    store.write("q", None, offset).expect("saved");
                };
                let write = Write { projection: "p".to_owned(), from: None, to: 3 };
                let together = |_: &[&Write]| {
                    nested(1);
                    Err(GroupError::Refused)
                };
                let alone = |_| {
                    nested(2);
                    store.apply("p", None, 3)
                };
                let unanswered = |cause| panic!("{cause}");
                store
                    .group
                    .write(write, far_away(), together, alone, || {}, unanswered)
                    .expect("saved");
                assert_eq!(store.memory.get("p").expect("read"), 3);
                assert_eq!(store.memory.get("q").expect("read"), 2);
                store.write("p", None, 4).expect("saved");
                other.join().expect("no panic");
            });
        }
    }

    #[test]
    fn a_failed_group_is_repeated_alone_where_that_cannot_undo_anything() {
        for fault in ["is refused", "is not sent", "is lost"] {
            model(1, move |store| {
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

    #[test]
    fn a_call_knows_whether_its_group_may_have_executed_its_write() {
        type Fault = fn(Error) -> GroupError;
        let error = || Error::unavailable("group commit", "on purpose");
        let cases: [(Fault, _, _); 3] = [
            (|_| GroupError::Refused, Some(Executed::No), Some(Executed::No)),
            (GroupError::NotSent, Some(Executed::No), Some(Executed::No)),
            (GroupError::Lost, Some(Executed::Unknown), None),
        ];
        for (fault, of_a_save, of_an_advance) in cases {
            for (from, expected) in [(None, of_a_save), (Some(0), of_an_advance)] {
                model(0, move |store| {
                    for (deadline, in_time) in [(far_away(), true), (passed(), false)] {
                        let mut repeated = None;
                        let returned = store.group.write(
                            Write { projection: "p".to_owned(), from, to: 1 },
                            deadline,
                            |_| Err(fault(error())),
                            |executed| {
                                repeated = Some(executed);
                                Ok(())
                            },
                            || {},
                            |cause| Error::unavailable("write", cause),
                        );
                        let refused = matches!(fault(error()), GroupError::Refused);
                        let expected = expected.filter(|_| in_time || refused);
                        assert_eq!(repeated, expected);
                        assert_eq!(returned.is_ok(), expected.is_some());
                    }
                });
            }
        }
    }
}
