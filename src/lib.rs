//! # Checkpoints for projections
//!
//! A *projection* builds a read model from a stream of events. Its *checkpoint* is the *offset* of the last event that
//! it has processed. This crate stores checkpoints, so that after a restart a projection resumes where it stopped: in
//! PostgreSQL ([`PostgresCheckpointStore`]), in memory ([`MemoryCheckpointStore`]), or in a store of your own
//! ([`CheckpointStore`]).
//!
//! This page is an overview. The [`guide`] covers each subject in depth.
//!
//! # A checkpoint
//!
//! ```
//! use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
//!
//! let store = MemoryCheckpointStore::new(); // or PostgresCheckpointStore::connect(..)?
//! assert_eq!(store.get("orders")?, 0); // nothing processed yet
//! store.save("orders", 42)?;
//! assert_eq!(store.get("orders")?, 42); // read on from event 43
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! A store holds no events, and does not know the end of the stream: you pass that for [monitoring](#monitoring). It
//! does not know whether the read model is right either: a checkpoint can be trusted as far as it is saved together with
//! the read model that it describes. What you use therefore depends on where the read model is.
//!
//! # The read model is in the same PostgreSQL database
//!
//! [`project`](PostgresCheckpointStore::project) applies one batch of events **exactly once**: it begins a transaction,
//! locks the projection, calls your closure, saves the offset that it returns, and commits. A competing worker waits.
//! [`try_project`](PostgresCheckpointStore::try_project) does not wait, so that a thread can turn to another projection.
//! Lost connections are handled for you, even during the commit.
//!
//! If a transaction exists already, [`in_transaction`](PostgresCheckpointStore::in_transaction) offers the same steps:
//! [`lock`](InTransaction::lock) and [`save`](InTransaction::save), or [`get`](InTransaction::get) and
//! [`advance`](InTransaction::advance), which hold no lock while you apply events.
//!
//! You must ensure two things: the closure has no effect outside its transaction, because it may run more than once, and
//! events commit in the order of their ids. See [exactly once](guide::exactly_once), also for how to reset a projection.
//!
//! # The read model is elsewhere
//!
//! Processing is then **at least once**: after a crash, the events since the last save are processed again, so
//! handling an event must be idempotent. A [`Checkpointer`] saves at the [`Cadence`] that you choose, and detects a
//! second worker:
//!
//! ```
//! use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
//! use std::sync::mpsc::{RecvTimeoutError, channel};
//! use std::time::Duration;
//!
//! let (reader, events) = channel();
//! # for offset in 1..=3 { reader.send(offset).unwrap(); }
//! # drop(reader);
//! let store = MemoryCheckpointStore::new();
//! let cadence = Cadence::every(500).or_within(Duration::from_secs(1));
//! let mut checkpointer = Checkpointer::resume(store, "search-index", cadence)?;
//! loop {
//!     match events.recv_timeout(Duration::from_millis(100)) {
//!         Ok(offset) => {
//!             // handle the event, then:
//!             checkpointer.processed(offset)?;
//!         }
//!         Err(RecvTimeoutError::Timeout) => {
//!             checkpointer.save_if_due()?;
//!         }
//!         Err(RecvTimeoutError::Disconnected) => break,
//!     }
//! }
//! checkpointer.flush()?; // the last save
//! # assert_eq!(checkpointer.saved(), 3);
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! If several threads process the events, they finish them out of order: use a [`Watermark`], and see
//! [threads](guide::threads).
//!
//! # Monitoring
//!
//! ```
//! use checkpoint_store::{CheckpointStore, HealthCheck, MemoryCheckpointStore};
//! use std::time::{Duration, SystemTime};
//!
//! # let store = MemoryCheckpointStore::new();
//! # store.save("orders", 9_958)?;
//! let check = HealthCheck::new().critical_lag(5_000).stalled_after(Duration::from_secs(300));
//! let checkpoints = store.all()?;
//! let stream_head = 10_000; // read it after the checkpoints, so that none appears to be ahead of it
//! for checkpoint in checkpoints {
//!     let status = checkpoint.status(stream_head);
//!     let health = check.assess(&status, SystemTime::now());
//!     println!("{}: {health} ({:.1} %)", status.projection, status.percent_complete);
//!     # assert_eq!(health.to_string(), "projection lagging: 42 events");
//! }
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! # Errors
//!
//! An [`Error`] of the store names the operation, the projection and the table, and keeps its cause.
//! [`report`](Error::report) shows an error and its causes in one line. `?` converts the errors of your own statements,
//! of `r2d2`, and `Box<dyn Error + Send + Sync>`. A worker handles three cases:
//!
//! ```
//! use checkpoint_store::Error;
//!
//! fn what_next(error: &Error) -> &'static str {
//!     match error {
//!         Error::Conflict { .. } => "roll back; another worker runs this projection: stop, or read the offset again",
//!         error if error.is_transient() => "roll back, pause, and retry on a new connection from the stored offset",
//!         _ => "stop and alert an operator: a retry does not help",
//!     }
//! }
//! # assert!(what_next(&Error::backend("save", "disk full")).starts_with("stop"));
//! ```
//!
//! # A store of your own
//!
//! Implement the five required methods of [`CheckpointStore`]. Call [`validate_projection`], [`validate_offset`] and
//! [`validate_advance`] first, so that your store refuses the same input as every other store. Report failures with
//! [`Error::backend`], [`Error::unavailable`] and [`Error::conflict`]. Then run `conformance::verify`, which requires the
//! feature `conformance`. For an example see `examples/redis_store.rs`.
//!
//! # From async code
//!
//! The `postgres` crate blocks the calling thread and runs an async runtime of its own, so on a thread that drives an
//! async runtime every operation of a [`PostgresCheckpointStore`] panics. Call it on a thread that may block:
//!
//! ```
//! # use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
//! # use std::sync::Arc;
//! # let store = Arc::new(MemoryCheckpointStore::new());
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let saved = tokio::task::spawn_blocking({
//!     let store = Arc::clone(&store);
//!     move || store.save("orders", 42)
//! });
//! saved.await.expect("the task has not panicked")?;
//! # Ok::<(), checkpoint_store::Error>(())
//! # })?;
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! A store may be dropped on any thread. If the whole program is async, use another crate.
//!
//! # Features
//!
//! | Feature | Default | What it adds |
//! |---|---|---|
//! | `postgres` | yes | [`PostgresCheckpointStore`]; the crates `postgres`, `r2d2` and `r2d2_postgres` |
//! | `conformance` | no | `conformance::verify`, which tests a store of your own against the contract |
//!
//! Without any feature, the crate depends on `thiserror` alone.

#![cfg_attr(not(feature = "postgres"), allow(rustdoc::broken_intra_doc_links))]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod checkpointer;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod guide;
mod memory;
mod monitor;
#[cfg(feature = "postgres")]
mod pg;
mod store;
mod sync;
mod validate;
mod watermark;

pub use checkpoint::Checkpoint;
pub use checkpointer::{Cadence, Checkpointer};
pub use error::{Error, Result};
pub use memory::MemoryCheckpointStore;
pub use monitor::{Health, HealthCheck, HealthLevel, ProjectionStatus};
#[cfg(feature = "postgres")]
pub use pg::{
    Batch, InTransaction, PooledClient, PostgresCheckpointStore, PostgresCheckpointStoreBuilder,
    Retry,
};
pub use store::CheckpointStore;
pub use validate::{validate_advance, validate_offset, validate_projection};
pub use watermark::Watermark;

#[cfg(feature = "postgres")]
pub use {postgres, r2d2, r2d2_postgres};

/// The code of the README compiles.
#[cfg(all(doctest, feature = "postgres", feature = "conformance"))]
#[doc = include_str!("../README.md")]
struct Readme;
