use std::time::{Duration, Instant};

use crate::{CheckpointStore, Error, Result, validate_offset};

/// How often a [`Checkpointer`] saves: after a number of events, within a time, or whichever comes
/// first.
///
/// Saving less often saves round trips and flushes of the database's log; saving more often leaves
/// fewer events to read again after a crash.
///
/// # Examples
///
/// ```
/// use checkpoint_store::Cadence;
/// use std::time::Duration;
///
/// let after_each_event = Cadence::every(1);
/// let after_each_hundred = Cadence::every(100);
/// let within_five_seconds = Cadence::within(Duration::from_secs(5));
/// let whichever_comes_first = Cadence::every(500).or_within(Duration::from_secs(1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cadence {
    events: Option<u64>,
    interval: Option<Duration>,
}

impl Cadence {
    /// Saves when this many events have been processed since the last save; 1 is after each.
    ///
    /// Each call of [`processed`](Checkpointer::processed) that moves the offset counts as one event. A
    /// [`Watermark`](crate::Watermark) may move over several events at once, which then count as one:
    /// combine it with [`or_within`](Cadence::or_within).
    ///
    /// # Panics
    ///
    /// When `events` is 0.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Cadence;
    /// const CADENCE: Cadence = Cadence::every(100);
    /// ```
    #[must_use]
    pub const fn every(events: u64) -> Self {
        Self { events: None, interval: None }.or_every(events)
    }

    /// Saves when this much time has passed since the first unsaved event. No event waits longer, as long
    /// as the loop calls [`processed`](Checkpointer::processed) or
    /// [`save_if_due`](Checkpointer::save_if_due); a [`Checkpointer`] has no thread of its own.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Cadence;
    /// # use std::time::Duration;
    /// const CADENCE: Cadence = Cadence::within(Duration::from_secs(5));
    /// ```
    #[must_use]
    pub const fn within(interval: Duration) -> Self {
        Self { events: None, interval: None }.or_within(interval)
    }

    /// Also saves after this many events, if that comes first. Of two numbers, the smaller one applies.
    ///
    /// # Panics
    ///
    /// When `events` is 0.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Cadence;
    /// # use std::time::Duration;
    /// const CADENCE: Cadence = Cadence::within(Duration::from_secs(1)).or_every(500);
    /// ```
    #[must_use]
    pub const fn or_every(mut self, events: u64) -> Self {
        assert!(events > 0, "a cadence of every 0 events would never be reached");
        self.events = match self.events {
            Some(fewer) if fewer < events => Some(fewer),
            _ => Some(events),
        };
        self
    }

    /// Also saves within this time, if that comes first. Of two times, the shorter one applies.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::Cadence;
    /// # use std::time::Duration;
    /// const CADENCE: Cadence = Cadence::every(500).or_within(Duration::from_secs(1));
    /// ```
    #[must_use]
    pub const fn or_within(mut self, interval: Duration) -> Self {
        self.interval = match self.interval {
            Some(shorter) if shorter.as_nanos() < interval.as_nanos() => Some(shorter),
            _ => Some(interval),
        };
        self
    }
}

/// Saves a projection's checkpoint at a [`Cadence`], for a loop that processes events one by one.
///
/// It gives at-least-once processing: after a crash the events since the last save are processed again,
/// and none is left out. While the store works they are no more than the cadence allows (and what a
/// [`Watermark`](crate::Watermark) had out of order); while it is down the loop may continue, and
/// `offset() - saved()` is the range of offsets that a crash would repeat. For exactly-once processing,
/// save inside the transaction that applies the events.
///
/// It saves with [`advance`](CheckpointStore::advance), so a second runner of the same projection
/// is detected: one of the two, whichever saves later, gets a [`Conflict`](Error::Conflict) at its
/// next save, and stays out: from then on every save is that `Conflict`, without asking the store.
/// Stop that one. A runner whose projection is
/// [reset](crate::guide::exactly_once#resetting-a-projection) under it may not notice: stop it first.
///
/// A save that fails is due again at once, with the next [`processed`](Checkpointer::processed),
/// [`save_if_due`](Checkpointer::save_if_due) or [`flush`](Checkpointer::flush). When it failed as
/// [`Unavailable`](Error::Unavailable) it may have been stored all the same; the next save finds out, and
/// does not mistake this runner's own save for a rival's. If a rival has stored the same offset, it is
/// detected one save later.
///
/// **Dropping it saves nothing**, because a drop cannot report a failure. Call
/// [`flush`](Checkpointer::flush) at the end of the loop; without it the events since the last save are
/// processed again by the next run.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore};
///
/// let store = MemoryCheckpointStore::new();
/// let mut checkpointer = Checkpointer::resume(&store, "orders", Cadence::every(100))?;
/// for offset in checkpointer.offset() + 1..=250 {
///     // handle the event, then:
///     checkpointer.processed(offset)?;
/// }
/// assert_eq!(store.get("orders")?, 200);
/// checkpointer.flush()?;
/// assert_eq!(store.get("orders")?, 250);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpointer<S> {
    store: S,
    projection: String,
    progress: Progress,
    /// Where saves were to go whose outcome is unknown, in ascending order.
    in_doubt: Vec<i64>,
    /// The expected and the found offset of the conflict by which a rival was found out: what is stored
    /// from then on is the rival's.
    conflict: Option<(i64, i64)>,
}

impl<S: CheckpointStore> Checkpointer<S> {
    /// Resumes the projection where it stopped: reads its checkpoint.
    ///
    /// `store` may be owned, a reference, or an [`Arc`](std::sync::Arc).
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::get`]; [`InvalidOffset`](Error::InvalidOffset) when another program
    /// has stored a negative offset.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// store.save("orders", 42)?;
    /// let checkpointer = Checkpointer::resume(&store, "orders", Cadence::every(1))?;
    /// assert_eq!(checkpointer.offset() + 1, 43); // the next event to read
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn resume(store: S, projection: impl Into<String>, cadence: Cadence) -> Result<Self> {
        let projection = projection.into();
        let offset = store.get(&projection)?;
        validate_offset(offset)?;
        let progress = Progress::at(offset, cadence);
        Ok(Self { store, projection, progress, in_doubt: Vec::new(), conflict: None })
    }

    /// The projection that it was resumed for.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let checkpointer = Checkpointer::resume(store, "orders", Cadence::every(100))?;
    /// println!("{} goes on after {}", checkpointer.projection(), checkpointer.offset());
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn projection(&self) -> &str {
        &self.projection
    }

    /// The offset of the last processed event, saved or not. Continue reading after it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(10))?;
    /// checkpointer.processed(1)?;
    /// assert_eq!(checkpointer.offset(), 1);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.progress.offset
    }

    /// The last offset that is known to be saved.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(2))?;
    /// checkpointer.processed(1)?;
    /// assert_eq!(checkpointer.saved(), 0);
    /// checkpointer.processed(2)?;
    /// assert_eq!(checkpointer.saved(), 2);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn saved(&self) -> i64 {
        self.progress.saved
    }

    /// How many calls of [`processed`](Checkpointer::processed) have moved the offset since the last save:
    /// the number that [`Cadence::every`] compares with.
    ///
    /// It is the number of events that a crash repeats if there is a call for each event. It is not if one
    /// call stands for several events, as behind a [`Watermark`](crate::Watermark): then use
    /// `offset() - saved()`, which is in the unit of the offsets, such as events or bytes. Both grow
    /// without limit while the store is down.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(10))?;
    /// checkpointer.processed(4)?;
    /// checkpointer.processed(9)?;
    /// assert_eq!(checkpointer.pending(), 2); // two calls
    /// assert_eq!(checkpointer.offset() - checkpointer.saved(), 9); // offsets that a crash repeats
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn pending(&self) -> u64 {
        self.progress.pending
    }

    /// The store that it saves to.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(1))?;
    /// checkpointer.processed(42)?;
    /// assert_eq!(checkpointer.store().get("orders")?, 42);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Returns the store, and saves nothing: [`flush`](Checkpointer::flush) first.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(100))?;
    /// checkpointer.processed(42)?;
    /// checkpointer.flush()?;
    /// let store = checkpointer.into_store();
    /// assert_eq!(store.get("orders")?, 42);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn into_store(self) -> S {
        self.store
    }

    /// Records that the event at `offset` and all events before it have been processed, and saves if the
    /// cadence requires it. Returns whether this call saved.
    ///
    /// Offsets may have gaps. The same offset again does not count as another event.
    ///
    /// # Errors
    ///
    /// [`InvalidOffset`](Error::InvalidOffset) if `offset` is before the last one; nothing has changed
    /// then. Otherwise as [`CheckpointStore::advance`]: the event counts as processed, and the save is
    /// due. While the store is unavailable, this call takes as long as the store waits, and so do other
    /// threads that share the `Checkpointer` behind a lock.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(2))?;
    /// assert!(!checkpointer.processed(1)?);
    /// assert!(checkpointer.processed(2)?);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn processed(&mut self, offset: i64) -> Result<bool> {
        let now = Instant::now();
        self.progress.processed(offset, now)?;
        self.save_if_due_at(now)
    }

    /// Saves if the cadence requires it, without an event. For a loop that waits for the next event with
    /// a time-out. Returns whether this call saved.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::advance`]; the save stays due.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// use std::sync::mpsc::{RecvTimeoutError, channel};
    /// use std::time::Duration;
    ///
    /// let (events, inbox) = channel();
    /// # events.send(1).unwrap();
    /// # drop(events);
    /// let cadence = Cadence::within(Duration::from_secs(1));
    /// let mut checkpointer = Checkpointer::resume(MemoryCheckpointStore::new(), "orders", cadence)?;
    /// loop {
    ///     match inbox.recv_timeout(Duration::from_millis(100)) {
    ///         Ok(offset) => checkpointer.processed(offset)?,
    ///         Err(RecvTimeoutError::Timeout) => checkpointer.save_if_due()?,
    ///         Err(RecvTimeoutError::Disconnected) => break,
    ///     };
    /// }
    /// checkpointer.flush()?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn save_if_due(&mut self) -> Result<bool> {
        self.save_if_due_at(Instant::now())
    }

    /// Saves what is not saved yet, even if it is not due. Call it at the end of a loop. Returns whether
    /// this call saved.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::advance`]; the save stays due.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(100))?;
    /// checkpointer.processed(1)?;
    /// assert!(checkpointer.flush()?);
    /// assert!(!checkpointer.flush()?); // nothing is left to save
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn flush(&mut self) -> Result<bool> {
        if self.progress.pending == 0 {
            return Ok(false);
        }
        self.save()?;
        Ok(true)
    }

    /// Saves the checkpoint once more, even if nothing is pending: for a loop that has been idle for a
    /// while. It renews the time of the save, so that a stream that was quiet does not look
    /// [stalled](crate::HealthCheck::stalled_after) at its next event, and a projection that has never
    /// saved gets a checkpoint that can.
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::advance`]; what is pending stays due.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, MemoryCheckpointStore};
    ///
    /// let store = MemoryCheckpointStore::new();
    /// let mut checkpointer = Checkpointer::resume(&store, "orders", Cadence::every(100))?;
    /// assert_eq!(store.find("orders")?, None);
    /// checkpointer.renew()?; // after a minute without an event, say
    /// assert_eq!(store.find("orders")?.map(|checkpoint| checkpoint.offset), Some(0));
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn renew(&mut self) -> Result<()> {
        self.save()
    }

    fn save_if_due_at(&mut self, now: Instant) -> Result<bool> {
        if self.progress.is_due(now) { self.flush() } else { Ok(false) }
    }

    fn save(&mut self) -> Result<()> {
        if let Some((expected, found)) = self.conflict {
            return Err(Error::conflict(&self.projection, expected, found));
        }
        let to = self.progress.offset;
        while let Err(error) = self.store.advance(&self.projection, self.progress.saved, to) {
            match error {
                // What is there may be a save of our own that was not answered: go on from it.
                Error::Conflict { found, .. } if self.in_doubt.binary_search(&found).is_ok() => {
                    self.in_doubt.clear();
                    self.progress.saved = found;
                    if found == to {
                        break;
                    }
                    continue;
                }
                // Anybody else's: whatever is stored from now on, this runner is not to touch it.
                Error::Conflict { expected, found, .. } => self.conflict = Some((expected, found)),
                // It may have been stored all the same, and the next save has to know it.
                Error::Unavailable { .. } if self.in_doubt.last() != Some(&to) => {
                    self.in_doubt.push(to);
                }
                _ => {}
            }
            self.progress.failed = true;
            return Err(error);
        }
        self.in_doubt.clear();
        self.progress.all_saved();
        Ok(())
    }
}

/// How far a projection is ahead of its checkpoint, and whether that is far enough to save.
#[derive(Debug)]
struct Progress {
    cadence: Cadence,
    offset: i64,
    saved: i64,
    pending: u64,
    /// When the first of the pending events was processed.
    since: Option<Instant>,
    /// Whether the last save failed, and is due for that reason alone.
    failed: bool,
}

impl Progress {
    fn at(offset: i64, cadence: Cadence) -> Self {
        Self { cadence, offset, saved: offset, pending: 0, since: None, failed: false }
    }

    fn processed(&mut self, offset: i64, now: Instant) -> Result<()> {
        if offset < self.offset {
            let reason = "a later event has been processed already";
            return Err(Error::InvalidOffset { offset, reason });
        }
        if offset > self.offset {
            self.offset = offset;
            self.pending += 1;
            self.since.get_or_insert(now);
        }
        Ok(())
    }

    fn is_due(&self, now: Instant) -> bool {
        let Some(since) = self.since else { return false };
        let Cadence { events, interval } = self.cadence;
        self.failed
            || events.is_some_and(|events| self.pending >= events)
            || interval.is_some_and(|interval| now.saturating_duration_since(since) >= interval)
    }

    fn all_saved(&mut self) {
        *self = Self::at(self.offset, self.cadence);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// When a loop that processes one event a second saves, if it runs for `seconds`.
    fn saves(cadence: Cadence, seconds: u32) -> Vec<u32> {
        let start = Instant::now();
        let mut progress = Progress::at(0, cadence);
        let mut saves = Vec::new();
        for second in 1..=seconds {
            let now = start + second * SECOND;
            progress.processed(second.into(), now).expect("offsets go up");
            if progress.is_due(now) {
                saves.push(second);
                progress.all_saved();
            }
        }
        saves
    }

    #[test]
    fn every_event_and_every_nth() {
        assert_eq!(saves(Cadence::every(1), 4), [1, 2, 3, 4]);
        assert_eq!(saves(Cadence::every(3), 10), [3, 6, 9]);
    }

    #[test]
    fn the_time_counts_from_the_first_unsaved_event_so_steady_load_does_not_put_it_off() {
        assert_eq!(saves(Cadence::within(3 * SECOND), 12), [4, 8, 12]);
    }

    #[test]
    fn of_both_the_first_one_counts() {
        assert_eq!(saves(Cadence::every(2).or_within(9 * SECOND), 5), [2, 4]);
        assert_eq!(saves(Cadence::every(9).or_within(SECOND), 5), [2, 4]);
        assert_eq!(Cadence::every(9).or_every(4).or_every(7), Cadence::every(4));
        let within = Cadence::within(9 * SECOND).or_within(SECOND).or_within(3 * SECOND);
        assert_eq!(within, Cadence::within(SECOND));
    }

    #[test]
    fn nothing_is_due_without_an_event() {
        let start = Instant::now();
        let mut progress = Progress::at(5, Cadence::within(Duration::ZERO).or_every(1));
        assert!(!progress.is_due(start + 100 * SECOND));
        progress.processed(5, start).expect("the same offset again");
        assert!(!progress.is_due(start + 100 * SECOND));
        progress.processed(6, start).expect("the next offset");
        assert!(progress.is_due(start));
    }

    #[test]
    fn a_clock_that_stands_still_is_no_harm() {
        let start = Instant::now();
        let mut progress = Progress::at(0, Cadence::within(SECOND));
        progress.processed(1, start + SECOND).expect("the next offset");
        assert!(!progress.is_due(start));
    }

    #[test]
    fn an_offset_that_goes_back_changes_nothing() {
        let now = Instant::now();
        let mut progress = Progress::at(0, Cadence::every(10));
        progress.processed(7, now).expect("the next offset");
        for back in [6, 0, -1, i64::MIN] {
            let refused = progress.processed(back, now);
            assert!(matches!(refused, Err(Error::InvalidOffset { offset, .. }) if offset == back));
        }
        assert_eq!((progress.offset, progress.pending), (7, 1));
    }

    #[test]
    #[should_panic(expected = "every 0 events")]
    fn every_zero_events_panics() {
        let _ = Cadence::every(0);
    }

    fn cadence() -> impl Strategy<Value = Cadence> {
        let events = 1..6_u64;
        let interval = (0..50_u64).prop_map(Duration::from_millis);
        prop_oneof![
            events.clone().prop_map(Cadence::every),
            interval.clone().prop_map(Cadence::within),
            (events, interval)
                .prop_map(|(events, interval)| { Cadence::every(events).or_within(interval) }),
        ]
    }

    #[derive(Debug, Clone)]
    struct Step {
        time_passing: Duration,
        /// How much further on the next event is; 0 is an idle turn of the loop.
        gap: i64,
        save_succeeds: bool,
        crash: bool,
    }

    fn step() -> impl Strategy<Value = Step> {
        (0..30_u64, 0..4_i64, prop::bool::weighted(0.7), prop::bool::weighted(0.05)).prop_map(
            |(millis, gap, save_succeeds, crash)| {
                let time_passing = Duration::from_millis(millis);
                Step { time_passing, gap, save_succeeds, crash }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(2_000)
        })]

        #[test]
        fn nothing_waits_longer_than_the_cadence_allows_and_nothing_is_saved_before(
            cadence in cadence(),
            steps in prop::collection::vec(step(), 0..120),
        ) {
            let mut now = Instant::now();
            let mut checkpoint = 0;
            let mut progress = Progress::at(checkpoint, cadence);
            // When each event was processed that is not saved.
            let mut waiting = Vec::new();
            let mut save_failed = false;

            for Step { time_passing, gap, save_succeeds, crash } in steps {
                now += time_passing;
                if crash {
                    progress = Progress::at(checkpoint, cadence);
                    waiting.clear();
                    save_failed = false;
                }
                progress.processed(progress.offset + gap, now)?;
                if gap > 0 {
                    waiting.push(now);
                }
                let reached = waiting.first().is_some_and(|&first| {
                    cadence.events.is_some_and(|events| waiting.len() as u64 >= events)
                        || cadence.interval.is_some_and(|interval| now - first >= interval)
                });
                prop_assert_eq!(progress.is_due(now), reached || save_failed);
                if progress.is_due(now) {
                    save_failed = !save_succeeds;
                    if save_succeeds {
                        checkpoint = progress.offset;
                        progress.all_saved();
                        waiting.clear();
                    } else {
                        progress.failed = true;
                    }
                }
                prop_assert_eq!(progress.saved, checkpoint);
                prop_assert_eq!(progress.pending, waiting.len() as u64);
            }
        }
    }
}
