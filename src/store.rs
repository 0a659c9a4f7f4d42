use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::validate::{validate_all, validate_offset, validate_projection};
use crate::{Checkpoint, Result};

/// Stores the checkpoint of each projection: the offset of the last event that it has processed.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
///
/// /// Counts the words of new events, and saves how far it has read.
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
///
/// # Contract
///
/// Every store keeps this contract. `conformance::verify`, which requires the feature `conformance`,
/// tests it; the stores of this crate pass.
///
/// * **Offsets** are zero or more. A negative offset is
///   [`InvalidOffset`](crate::Error::InvalidOffset).
/// * **Names** are 1 to 1,024 bytes of UTF-8 without NUL, compared byte by byte. Any other name is
///   [`InvalidProjection`](crate::Error::InvalidProjection).
/// * **Invalid input** is refused before anything is read or written.
/// * **Writes** are durable when the method returns `Ok`, as far as the store is durable at all, and
///   visible to every later call on any handle on the same store.
/// * **Errors** mean that nothing was written, except
///   [`Unavailable`](crate::Error::Unavailable): the outcome of the write is then unknown, but it is
///   never partial.
/// * **Threads** may share a store. Each method is atomic, except the provided `save_many`.
///
/// The trait is dyn-compatible, and implemented for `&T`, `Box<T>` and `Arc<T>`.
pub trait CheckpointStore: Send + Sync {
    /// Returns the projection's checkpoint, or `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection), or an error of the store.
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

    /// Returns all checkpoints, ordered by the bytes of the projection's name.
    ///
    /// # Errors
    ///
    /// An error of the store.
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

    /// Sets the checkpoint unconditionally, forwards or back, and `updated_at` to the time of the save.
    ///
    /// If several saves run at once, the last one to be executed wins. If two workers may run the same
    /// projection, use [`advance`](CheckpointStore::advance), which detects the other one.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection),
    /// [`InvalidOffset`](crate::Error::InvalidOffset), or an error of the store.
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

    /// Moves the checkpoint from `from` to `to` if it is still at `from` (compare-and-set).
    ///
    /// `from` is what [`get`](CheckpointStore::get) returned, so 0 means that there is no checkpoint or
    /// that it is at 0. When several callers advance from the same offset to a higher one, exactly one
    /// succeeds. `to` may equal `from`: that only renews `updated_at`, and succeeds for every caller.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::Error::Conflict), with the offset found, if the checkpoint is not at `from`.
    /// This holds even if it is at `to`: another worker has done the same work, so roll yours back.
    /// [`InvalidOffset`](crate::Error::InvalidOffset) if `to < from` or either is negative;
    /// [`InvalidProjection`](crate::Error::InvalidProjection); or an error of the store.
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

    /// Deletes the projection's checkpoint. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection), or an error of the store.
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

    /// Returns the projection's offset, or 0 if there is no checkpoint. Read on from the event after it.
    ///
    /// If the first event of the stream has offset 0, a result of 0 does not show whether that event was
    /// processed. Save `offset + 1` then, or call [`find`](CheckpointStore::find) instead.
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

    /// Saves several checkpoints. If a name is given more than once, its last offset is saved. An empty
    /// slice does nothing.
    ///
    /// The stores of this crate save all of them or none. The provided implementation validates all of
    /// them, then saves one at a time: if the store fails, those before the failure are saved.
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

    /// Waits until the checkpoint has reached `offset`, and returns `true`. `false` means that the timeout
    /// expired and the read model may be stale.
    ///
    /// Use it to read your own writes: append an event, wait for the projection, query the read model.
    ///
    /// The provided implementation polls [`get`](CheckpointStore::get): at once, after 1 ms, then at
    /// intervals that double up to 50 ms. It polls at least once, even if the timeout is zero, and can
    /// exceed the timeout by the time that one `get` takes.
    ///
    /// # Errors
    ///
    /// [`InvalidProjection`](crate::Error::InvalidProjection),
    /// [`InvalidOffset`](crate::Error::InvalidOffset) if `offset` is negative, or the first error of
    /// `get`.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// use std::time::Duration;
    ///
    /// let store = MemoryCheckpointStore::new();
    /// let appended = 42; // the offset of an event that this program has just appended
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| store.save("orders", 42)); // the projection, in another thread
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

/// Polls until the answer is yes or the timeout has expired.
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
