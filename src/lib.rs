//! Remembers how far each projection of an event stream has got.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod checkpointer;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod grouped;
mod memory;
mod monitor;
#[cfg(feature = "postgres")]
mod pg;
mod store;
mod watermark;

pub use checkpoint::{Checkpoint, validate_offset, validate_projection};
pub use checkpointer::{Cadence, Checkpointer};
pub use error::{Error, Result};
pub use grouped::GroupedCheckpointStore;
pub use memory::MemoryCheckpointStore;
pub use monitor::{Health, HealthCheck, HealthLevel, ProjectionStatus};
#[cfg(feature = "postgres")]
pub use pg::{InTransaction, PostgresCheckpointStore, PostgresCheckpointStoreBuilder};
pub use store::CheckpointStore;
pub use watermark::Watermark;

#[cfg(feature = "postgres")]
pub use {postgres, r2d2, r2d2_postgres};
