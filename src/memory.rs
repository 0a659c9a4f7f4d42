use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use crate::sync::lock;
use crate::validate::{validate_advance, validate_all, validate_projection};
use crate::{Checkpoint, CheckpointStore, Error, Result};

/// Checkpoints in the memory of this process, for tests and for read models that are in memory too.
///
/// It returns the same results and refuses the same input as the PostgreSQL store, so that a test with it
/// finds what PostgreSQL would refuse. It remains usable after a thread has panicked while using it.
///
/// A clone is another handle on the same checkpoints. They are gone when the last handle is dropped.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
///
/// let store = MemoryCheckpointStore::new();
/// let worker = store.clone();
/// std::thread::spawn(move || worker.save("orders", 42)).join().expect("no panic")?;
/// assert_eq!(store.get("orders")?, 42);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct MemoryCheckpointStore {
    rows: Arc<Mutex<HashMap<String, Row>>>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    offset: i64,
    updated_at: SystemTime,
}

impl MemoryCheckpointStore {
    /// Creates an empty store.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    ///
    /// assert!(MemoryCheckpointStore::new().all()?.is_empty());
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// Allocates only if the projection is new.
fn put(rows: &mut HashMap<String, Row>, projection: &str, offset: i64) {
    let row = Row { offset, updated_at: SystemTime::now() };
    match rows.get_mut(projection) {
        Some(stored) => *stored = row,
        None => {
            rows.insert(projection.to_owned(), row);
        }
    }
}

impl CheckpointStore for MemoryCheckpointStore {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        let row = lock(&self.rows).get(projection).copied();
        Ok(row.map(|row| Checkpoint::new(projection, row.offset, row.updated_at)))
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        let mut checkpoints: Vec<_> = lock(&self.rows)
            .iter()
            .map(|(name, row)| Checkpoint::new(name, row.offset, row.updated_at))
            .collect();
        checkpoints.sort_unstable_by(|a, b| a.projection.cmp(&b.projection));
        Ok(checkpoints)
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        self.save_many(&[(projection, offset)])
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let mut rows = lock(&self.rows);
        let found = rows.get(projection).map_or(0, |row| row.offset);
        if found != from {
            return Err(Error::conflict(projection, from, found));
        }
        put(&mut rows, projection, to);
        Ok(())
    }

    fn delete(&self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        Ok(lock(&self.rows).remove(projection).is_some())
    }

    fn get(&self, projection: &str) -> Result<i64> {
        validate_projection(projection)?;
        Ok(lock(&self.rows).get(projection).map_or(0, |row| row.offset))
    }

    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        validate_all(checkpoints)?;
        let mut rows = lock(&self.rows);
        for &(projection, offset) in checkpoints {
            put(&mut rows, projection, offset);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_remains_usable_after_a_thread_has_panicked_in_it() {
        let store = MemoryCheckpointStore::new();
        store.save("orders", 1).unwrap();
        std::thread::scope(|scope| {
            let panicking = scope.spawn(|| {
                let _rows = store.rows.lock();
                std::panic::resume_unwind(Box::new("on purpose"));
            });
            assert!(panicking.join().is_err());
        });
        assert!(store.rows.is_poisoned());
        store.save("orders", 2).unwrap();
        store.advance("orders", 2, 3).unwrap();
        assert_eq!(store.get("orders").unwrap(), 3);
        assert_eq!(store.all().unwrap().len(), 1);
    }
}
