//! Remembers how far each projection of an event stream has got.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod memory;
#[cfg(feature = "postgres")]
mod pg;
mod store;

pub use checkpoint::{Checkpoint, validate_offset, validate_projection};
pub use error::{Error, Result};
pub use memory::MemoryCheckpointStore;
#[cfg(feature = "postgres")]
pub use pg::{InTransaction, PostgresCheckpointStore, PostgresCheckpointStoreBuilder};
pub use store::CheckpointStore;

#[cfg(feature = "postgres")]
pub use {postgres, r2d2, r2d2_postgres};
