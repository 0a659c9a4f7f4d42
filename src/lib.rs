//! # Checkpoints for projections
//!
//! A *projection* builds a read model from a stream of events. It must remember the *offset* of the last event it
//! has processed, its *checkpoint*, so that after a restart it resumes there. This crate keeps checkpoints in
//! PostgreSQL ([`PostgresCheckpointStore`]), in memory ([`MemoryCheckpointStore`]), or in a store of your own
//! ([`CheckpointStore`]).
//!
//! This page is the first hour. The [`guide`] goes on from here.
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
//! A checkpoint says how far a projection has got. It does not hold events, it does not know the end of the stream
//! until you [tell it](ProjectionStatus), and it does not know whether the read model is right. You can trust it
//! only as far as it was saved together with the read model it describes. So the question is where the read model is.
//!
//! # The read model is in the same PostgreSQL database
//!
//! [`project`](PostgresCheckpointStore::project) applies one batch of events **exactly once**: it begins a
//! transaction, takes the projection, calls your closure, saves the offset that it returns, and commits. A competing
//! worker waits, or with [`try_project`](PostgresCheckpointStore::try_project) goes on to another projection. A lost
//! connection, also during the commit, is nothing to you.
//!
//! Where there is a transaction already, [`in_transaction`](PostgresCheckpointStore::in_transaction) has the parts:
//! [`lock`](InTransaction::lock) and [`save`](InTransaction::save), or [`get`](InTransaction::get) and
//! [`advance`](InTransaction::advance), which do not wait.
//!
//! Two things are yours: the closure, which may run more than once, and a stream whose events are committed in the
//! order of their ids. [Exactly once](guide::exactly_once) says how, and how to reset a projection.
//!
//! # The read model is elsewhere
//!
//! Then processing is **at least once**: a crash repeats the events since the last save, so make handling one
//! idempotent. A [`Checkpointer`] saves at a [`Cadence`] of yours, and notices a second worker:
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
//! Threads finish events out of order: see [`Watermark`], and [threads](guide::threads).
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
//! let stream_head = 10_000; // asked for after the checkpoints, so that none seems to be ahead of it
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
//! Each [`Error`] says what failed and on what, and keeps its cause: an error of the store's own operations in the
//! database names the operation, the projection and the table. With `?` the errors of your own statements become
//! [`Error`]s too. [`report`](Error::report) shows an error and its causes in one line. What to do:
//!
//! ```
//! use checkpoint_store::Error;
//!
//! fn what_next(error: &Error) -> &'static str {
//!     match error {
//!         Error::Conflict { .. } => "roll back; another worker runs this projection: stop, or read the offset again",
//!         error if error.is_transient() => "roll back, wait a little, retry on a new connection from the offset that is stored",
//!         _ => "stop and tell somebody: a retry does not help",
//!     }
//! }
//! # assert!(what_next(&Error::backend("save", "disk full")).starts_with("stop"));
//! ```
//!
//! # A store of your own
//!
//! Implement the five required methods of [`CheckpointStore`]. Call [`validate_projection`], [`validate_offset`] and
//! [`validate_advance`] first, so that it refuses what every store refuses. Then let `conformance::verify` try it,
//! behind the feature `conformance`. `examples/redis_store.rs` is one over Redis.
//!
//! # From async code
//!
//! The `postgres` crate blocks, on a runtime of its own: called on a thread that drives an async runtime it panics.
//! Hand the call to a thread that may block:
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
//! The last handle of a store, too, must be dropped on a thread that may block: at the end of `main`, outside of the
//! runtime, say. In a program that is async throughout, another crate serves better.
//!
//! # Features
//!
//! | Feature | Default | What it adds |
//! |---|---|---|
//! | `postgres` | yes | [`PostgresCheckpointStore`]; the crates `postgres`, `r2d2` and `r2d2_postgres` |
//! | `conformance` | no | `conformance::verify`: the contract as code, for stores of your own |
//!
//! Without any, the crate depends on `thiserror` alone.

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

/// The front page's code compiles.
#[cfg(all(doctest, feature = "postgres", feature = "conformance"))]
#[doc = include_str!("../README.md")]
struct Readme;
