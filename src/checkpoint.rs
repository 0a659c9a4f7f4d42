use std::time::SystemTime;

use crate::ProjectionStatus;

/// How far a projection has read its event stream.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
///
/// let store = MemoryCheckpointStore::new();
/// store.save("orders", 42)?;
/// let checkpoint = store.find("orders")?.expect("just saved");
/// assert_eq!((checkpoint.projection.as_str(), checkpoint.offset), ("orders", 42));
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The projection's name.
    pub projection: String,
    /// The offset of the last event that the projection has processed.
    pub offset: i64,
    /// The time of the last save, by the clock of the store.
    pub updated_at: SystemTime,
}

impl Checkpoint {
    /// Creates a checkpoint. For custom stores.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Checkpoint;
    /// use std::time::SystemTime;
    ///
    /// let checkpoint = Checkpoint::new("orders", 42, SystemTime::now());
    /// assert_eq!(checkpoint.offset, 42);
    /// ```
    pub fn new(projection: impl Into<String>, offset: i64, updated_at: SystemTime) -> Self {
        Self { projection: projection.into(), offset, updated_at }
    }

    /// Compares the checkpoint with the stream head, the offset of the last event in the stream.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    /// # let store = MemoryCheckpointStore::new();
    /// # store.save("orders", 30)?;
    /// for checkpoint in store.all()? {
    ///     let status = checkpoint.status(40);
    ///     println!("{} is {} events behind", status.projection, status.lag);
    /// }
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn status(&self, stream_head: i64) -> ProjectionStatus {
        ProjectionStatus::new(
            self.projection.clone(),
            self.offset,
            stream_head,
            Some(self.updated_at),
        )
    }
}
