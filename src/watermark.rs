use std::collections::{HashSet, VecDeque};
use std::sync::PoisonError;

use crate::sync::{Mutex, MutexGuard};
use crate::{Error, Result};

/// How far a stream is processed without a gap, if several threads process its events.
///
/// One reader [begins](Watermark::begin) events in stream order and hands them out; workers
/// [complete](Watermark::complete) them in any order. The watermark is the offset up to which everything
/// is complete. It never passes an event that was begun and is not complete, so it is safe to checkpoint:
/// after a crash nothing is lost, and what was completed beyond it is processed again.
///
/// Each event costs a constant time on average, however many are in flight. Every event since the
/// watermark is remembered: one that is never completed holds the watermark for ever, and memory grows by
/// 8 to 16 bytes with each event that is begun and completed beyond it; it is given back when the
/// watermark moves on. Therefore complete an event even if you give it up, and stop reading while the
/// watermark is too far behind.
///
/// What [`complete`](Watermark::complete) returned in one thread may reach another after a later one:
/// checkpoint [`offset`](Watermark::offset). The watermark may move over several events at once, and
/// [`Checkpointer::processed`](crate::Checkpointer::processed) counts that as one event: give the
/// cadence a time limit too. For the same reason [`pending`](crate::Checkpointer::pending) is not the
/// number of events that a crash repeats; the difference of `offset()` and `saved()` is their range.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{
///     Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore, Result, Watermark,
/// };
/// use std::{sync::Mutex, thread, time::Duration};
///
/// let store = MemoryCheckpointStore::new();
/// let checkpointer = Checkpointer::resume(&store, "orders", Cadence::every(10))?;
/// let watermark = Watermark::starting_at(checkpointer.offset());
/// let stream = Mutex::new(checkpointer.offset() + 1..=100);
/// let checkpointer = Mutex::new(checkpointer);
///
/// // Taking an event and beginning it are one step, so events begin in order.
/// let next = || -> Result<Option<i64>> {
///     let mut stream = stream.lock().expect("no panic");
///     stream.next().map(|offset| watermark.begin(offset).map(|()| offset)).transpose()
/// };
/// let work = || -> Result<()> {
///     while let Some(offset) = next()? {
///         // handle the event, then:
///         watermark.complete(offset)?;
///         let saved = checkpointer.lock().expect("no panic").processed(watermark.offset());
///         match saved {
///             Err(error) if error.is_transient() => thread::sleep(Duration::from_secs(1)), // stays due
///             saved => drop(saved?),
///         }
///     }
///     Ok(())
/// };
/// thread::scope(|scope| {
///     let workers: Vec<_> = (0..4).map(|_| scope.spawn(&work)).collect();
///     workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
/// })?;
/// checkpointer.into_inner().expect("no panic").flush()?;
/// assert_eq!(store.get("orders")?, 100);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug)]
pub struct Watermark {
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    watermark: i64,
    last_begun: i64,
    /// The events begun beyond the watermark, in order.
    begun: VecDeque<i64>,
    /// Those of them that are not complete.
    open: HashSet<i64>,
}

impl Window {
    /// Keeps at most four times of what is needed. What is left then is twice that, so the next time
    /// is as many events away as are moved now, and an event costs the same on average.
    fn give_memory_back(&mut self) {
        const SPARE: usize = 1_024;
        let is_too_much = |capacity, len| capacity > 4 * len + SPARE;
        if is_too_much(self.begun.capacity(), self.begun.len()) {
            self.begun.shrink_to(2 * self.begun.len());
        }
        if is_too_much(self.open.capacity(), self.open.len()) {
            self.open.shrink_to(2 * self.open.len());
        }
    }
}

impl Watermark {
    /// Creates a watermark at `offset`, the last processed event: what
    /// [`get`](crate::CheckpointStore::get) or [`Checkpointer::offset`](crate::Checkpointer::offset)
    /// returned.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Watermark;
    /// assert_eq!(Watermark::starting_at(42).offset(), 42);
    /// ```
    #[must_use]
    pub fn starting_at(offset: i64) -> Self {
        let window = Window { watermark: offset, last_begun: offset, ..Window::default() };
        Self { window: Mutex::new(window) }
    }

    /// Records that the event at `offset` is in flight. The reader calls it in stream order, before a
    /// worker gets the event. Offsets may have gaps.
    ///
    /// # Errors
    ///
    /// [`InvalidOffset`](Error::InvalidOffset) unless `offset` is greater than the starting offset and
    /// all that were begun; nothing has changed then.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Watermark;
    /// let watermark = Watermark::starting_at(0);
    /// watermark.begin(1)?;
    /// watermark.begin(5)?;
    /// assert!(watermark.begin(4).is_err());
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn begin(&self, offset: i64) -> Result<()> {
        let mut window = self.window();
        if offset <= window.last_begun {
            let reason = "events are begun in stream order, each once";
            return Err(Error::InvalidOffset { offset, reason });
        }
        window.last_begun = offset;
        window.begun.push_back(offset);
        window.open.insert(offset);
        Ok(())
    }

    /// Records that the event at `offset` is processed, and returns the new watermark. Workers call it in
    /// any order.
    ///
    /// # Errors
    ///
    /// [`InvalidOffset`](Error::InvalidOffset) if the event was not begun or is already complete; nothing
    /// has changed then.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Watermark;
    /// let watermark = Watermark::starting_at(0);
    /// for offset in 1..=3 {
    ///     watermark.begin(offset)?;
    /// }
    /// assert_eq!(watermark.complete(2)?, 0); // 1 is still open
    /// assert_eq!(watermark.complete(1)?, 2);
    /// assert_eq!(watermark.complete(3)?, 3);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn complete(&self, offset: i64) -> Result<i64> {
        let window = &mut *self.window();
        if !window.open.remove(&offset) {
            return Err(Error::InvalidOffset { offset, reason: "this event is not in flight" });
        }
        while let Some(&first) = window.begun.front().filter(|first| !window.open.contains(first)) {
            window.begun.pop_front();
            window.watermark = first;
        }
        window.give_memory_back();
        Ok(window.watermark)
    }

    /// The watermark. Every event up to it is processed, so it is safe to checkpoint.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Watermark;
    /// let watermark = Watermark::starting_at(7);
    /// watermark.begin(8)?;
    /// assert_eq!(watermark.offset(), 7);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.window().watermark
    }

    /// The number of events that were begun and are not complete.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Watermark;
    /// let watermark = Watermark::starting_at(7);
    /// watermark.begin(8)?;
    /// assert_eq!(watermark.in_flight(), 1);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.window().open.len()
    }

    /// Nothing panics between two changes of the window, so a poisoned one is still whole.
    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every interleaving of a few threads, by an exhaustive scheduler.
#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    #[test]
    fn the_watermark_never_passes_an_open_event() {
        loom::model(|| {
            let watermark = Arc::new(Watermark::starting_at(0));
            // Not the scheduler's: they witness, and do not take part.
            let done = std::sync::Arc::new([const { AtomicBool::new(false) }; 3]);
            for offset in 1..=3 {
                watermark.begin(offset).expect("in order");
            }
            let workers: Vec<_> = [3, 1]
                .into_iter()
                .map(|offset| {
                    let (watermark, done) = (Arc::clone(&watermark), std::sync::Arc::clone(&done));
                    thread::spawn(move || {
                        done[offset - 1].store(true, Ordering::SeqCst);
                        let reached = complete(&watermark, offset);
                        assert!(done[..reached].iter().all(|done| done.load(Ordering::SeqCst)));
                    })
                })
                .collect();
            let reached = usize::try_from(watermark.offset()).expect("not negative");
            assert!(done[..reached].iter().all(|done| done.load(Ordering::SeqCst)));
            done[1].store(true, Ordering::SeqCst);
            let reached = complete(&watermark, 2);
            assert!(done[..reached].iter().all(|done| done.load(Ordering::SeqCst)));
            for worker in workers {
                worker.join().expect("no panic");
            }
            assert_eq!((watermark.offset(), watermark.in_flight()), (3, 0));
        });
    }

    #[test]
    fn a_reader_that_begins_while_workers_complete_loses_nothing() {
        loom::model(|| {
            let watermark = Arc::new(Watermark::starting_at(10));
            watermark.begin(11).expect("in order");
            let worker = {
                let watermark = Arc::clone(&watermark);
                thread::spawn(move || watermark.complete(11).expect("in flight"))
            };
            watermark.begin(15).expect("in order");
            let after_first = worker.join().expect("no panic");
            assert_eq!(after_first, 11);
            assert_eq!(watermark.complete(15).expect("in flight"), 15);
        });
    }

    #[test]
    fn of_two_that_complete_the_same_event_one_is_refused() {
        loom::model(|| {
            let watermark = Arc::new(Watermark::starting_at(0));
            watermark.begin(1).expect("in order");
            let rival = {
                let watermark = Arc::clone(&watermark);
                thread::spawn(move || watermark.complete(1).is_ok())
            };
            let ours = watermark.complete(1).is_ok();
            assert!(ours != rival.join().expect("no panic"));
            assert_eq!(watermark.offset(), 1);
        });
    }

    fn complete(watermark: &Watermark, offset: usize) -> usize {
        let offset = i64::try_from(offset).expect("small");
        let reached = watermark.complete(offset).expect("in flight");
        usize::try_from(reached).expect("not negative")
    }
}
