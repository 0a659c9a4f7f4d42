use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::validate::{validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, Result};

/// Remembers how far each projection has got.
///
/// This is a contract between those who call it and those who implement it;
/// `conformance::verify`, behind the feature `conformance`, is the same contract as code, and every
/// store of this crate passes it.
///
/// * **Offsets** are zero or more: the offset of the last event processed. A negative one is
///   [`InvalidOffset`](crate::Error::InvalidOffset).
/// * **Names** are 1 to 1,024 bytes of UTF-8 without NUL, compared byte by byte. Anything else is
///   [`InvalidProjection`](crate::Error::InvalidProjection).
/// * **Bad input changes nothing**: it is refused before the store is touched.
/// * **Writes are durable** when the method returns `Ok`, as far as the store is durable at all,
///   and visible to every later call on any handle of the same store.
/// * **An error** means that nothing was written, except
///   [`Unavailable`](crate::Error::Unavailable): there the outcome of a write is unknown, though
///   never half of it.
/// * **Threads** may share a store; each method is atomic on its own, except the provided
///   `save_many`.
///
/// The trait is dyn-compatible, and implemented for `&T`, `Box<T>` and `Arc<T>`.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
///
/// /// Handles what is new and remembers how far it came.
/// fn catch_up(store: &dyn CheckpointStore, events: &[(i64, &str)]) -> checkpoint_store::Result<usize> {
///     let mut checkpoint = store.get("word-count")?;
///     let mut words = 0;
///     for &(offset, text) in events {
///         if offset > checkpoint {
///             words += text.split_whitespace().count();
///             store.advance("word-count", checkpoint, offset)?;
///             checkpoint = offset;
///         }
///     }
///     Ok(words)
/// }
///
/// let store = MemoryCheckpointStore::new();
/// assert_eq!(catch_up(&store, &[(1, "to be"), (2, "or not")])?, 4);
/// assert_eq!(catch_up(&store, &[(1, "to be"), (2, "or not"), (3, "to be")])?, 2);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
pub trait CheckpointStore: Send + Sync {
    /// The projection's checkpoint, or `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection), or what the store runs into.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// assert_eq!(store.find("orders")?, None);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>>;

    /// Every checkpoint, ordered by the bytes of the projection's name.
    ///
    /// # Errors
    ///
    /// What the store runs into.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// store.save_many(&[("b", 2), ("a", 1), ("B", 3)])?;
    /// let names: Vec<_> = store.all()?.into_iter().map(|c| c.projection).collect();
    /// assert_eq!(names, ["B", "a", "b"]);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn all(&self) -> Result<Vec<Checkpoint>>;

    /// Sets the checkpoint, forwards or back, whatever it was, and the time of the save with it.
    ///
    /// Of saves that run at once one is last, and that one stays. Where two workers might run the
    /// same projection, use [`advance`](CheckpointStore::advance): it notices.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection),
    /// [`InvalidOffset`](crate::Error::InvalidOffset), or what the store runs into.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// store.save("orders", 42)?;
    /// store.save("orders", 7)?; // replay from here
    /// assert_eq!(store.get("orders")?, 7);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn save(&self, projection: &str, offset: i64) -> Result<()>;

    /// Moves the checkpoint to `to`, only if it still is at `from`: compare-and-set.
    ///
    /// `from` is what [`get`](CheckpointStore::get) returned, so 0 stands for "none, or stored 0".
    /// Of any number of callers that advance from the same place exactly one succeeds. `to` may
    /// equal `from`; that renews the time of the save.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::Error::Conflict) with the offset found when it is not `from`, even when
    /// it equals `to`: another worker has then done the same work, and yours must be rolled back.
    /// [`InvalidOffset`](crate::Error::InvalidOffset) when `to < from` or either is negative;
    /// [`InvalidProjection`](crate::Error::InvalidProjection); or what the store runs into.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// store.advance("orders", 0, 10)?;
    /// assert!(store.advance("orders", 0, 10).unwrap_err().is_conflict());
    /// assert_eq!(store.get("orders")?, 10);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()>;

    /// Forgets the projection, and says whether there was a checkpoint.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection), or what the store runs into.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// store.save("orders", 42)?;
    /// assert!(store.delete("orders")?);
    /// assert!(!store.delete("orders")?);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn delete(&self, projection: &str) -> Result<bool>;

    /// The projection's offset, 0 when there is none: read on from the event after it.
    ///
    /// In a stream whose first event has offset 0 that event looks processed before it is. Save
    /// `offset + 1` there, or tell the two apart with [`find`](CheckpointStore::find).
    ///
    /// # Errors
    ///
    /// As [`find`](CheckpointStore::find), which the provided implementation calls.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// assert_eq!(store.get("orders")?, 0);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn get(&self, projection: &str) -> Result<i64> {
        Ok(self.find(projection)?.map_or(0, |checkpoint| checkpoint.offset))
    }

    /// Saves several checkpoints; of a name given twice the last one stays. An empty slice does
    /// nothing.
    ///
    /// The provided implementation checks all of them, then saves one by one: bad input changes
    /// nothing, but when the store fails on the way the first ones are saved. The stores of this
    /// crate save all or nothing.
    ///
    /// # Errors
    ///
    /// As [`save`](CheckpointStore::save).
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// let store = MemoryCheckpointStore::new();
    /// assert!(store.save_many(&[("orders", 42), ("revenue", -1)]).is_err());
    /// assert_eq!(store.get("orders")?, 0);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        checkpoints.iter().try_for_each(|&(projection, offset)| self.save(projection, offset))
    }

    /// Waits until the checkpoint has reached `offset`, and says whether it has: `false` when
    /// `timeout` is over.
    ///
    /// For reading one's own writes: append an event, wait for the projection, read the read model.
    ///
    /// The provided implementation asks [`get`](CheckpointStore::get) at once, and then again and
    /// again: after 1 ms at first, then less often, up to every 50 ms. It asks at least once, also
    /// with a time-out of zero. It can return later than the time-out by as long as one `get` takes.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection),
    /// [`InvalidOffset`](crate::Error::InvalidOffset) when `offset` is negative, or the first error
    /// of `get`.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// use std::time::Duration;
    ///
    /// let store = MemoryCheckpointStore::new();
    /// let appended = 42; // the offset of the event that this program has just appended
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| store.save("orders", 42)); // the projection, elsewhere
    ///     assert!(store.wait_for("orders", appended, Duration::from_secs(5))?);
    ///     assert!(!store.wait_for("orders", appended + 1, Duration::ZERO)?);
    ///     Ok::<(), checkpoint_store::Error>(())
    /// })?;
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    fn wait_for(&self, projection: &str, offset: i64, timeout: Duration) -> Result<bool> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        poll(timeout, || Ok(self.get(projection)? >= offset))
    }
}

/// Asks at once, and then again and again until the answer is yes or the time is over.
pub(crate) fn poll(timeout: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<bool> {
    const FIRST_PAUSE: Duration = Duration::from_millis(1);
    const LONGEST_PAUSE: Duration = Duration::from_millis(50);
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        if ask()? {
            return Ok(true);
        }
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

macro_rules! forward_to_pointee {
    ($($pointer:ty),+) => {$(
        impl<T: CheckpointStore + ?Sized> CheckpointStore for $pointer {
            fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
                (**self).find(projection)
            }
            fn all(&self) -> Result<Vec<Checkpoint>> {
                (**self).all()
            }
            fn save(&self, projection: &str, offset: i64) -> Result<()> {
                (**self).save(projection, offset)
            }
            fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
                (**self).advance(projection, from, to)
            }
            fn delete(&self, projection: &str) -> Result<bool> {
                (**self).delete(projection)
            }
            fn get(&self, projection: &str) -> Result<i64> {
                (**self).get(projection)
            }
            fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
                (**self).save_many(checkpoints)
            }
            fn wait_for(&self, projection: &str, offset: i64, timeout: Duration) -> Result<bool> {
                (**self).wait_for(projection, offset, timeout)
            }
        }
    )+};
}

forward_to_pointee!(&T, Box<T>, Arc<T>);
