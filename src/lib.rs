//! # Checkpoints for projections
//!
//! In an event-sourced system a *projection* builds a read model from a stream of events. It must
//! remember the *offset* of the last event it has processed, its *checkpoint*, so that after a restart
//! it resumes there: no event lost, none applied twice. This crate keeps checkpoints, for programs that
//! do not use async: in PostgreSQL ([`PostgresCheckpointStore`]), in memory
//! ([`MemoryCheckpointStore`]), or in a store of your own ([`CheckpointStore`]).
//!
//! ```
//! use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
//!
//! let store = MemoryCheckpointStore::new();
//! store.save("orders", 42)?;
//! assert_eq!(store.get("orders")?, 42); // read on from event 43
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! A checkpoint says how far a projection has got. It does not hold events, it does not know the end
//! of the stream until you [tell it](ProjectionStatus), and it does not know whether the read model is
//! right. You can trust it only as far as it was saved together with the read model it describes.
//!
//! # Which operation?
//!
//! | Your read model is | Use | What you get |
//! |---|---|---|
//! | in the same database | [`project`](PostgresCheckpointStore::project) | exactly once, with any number of competing workers |
//! | there, in a transaction that you have already | [`in_transaction`](PostgresCheckpointStore::in_transaction): [`lock`](InTransaction::lock), apply, [`save`](InTransaction::save), commit | exactly once, if you keep the rules |
//! | elsewhere | a [`Checkpointer`] | at least once; a second worker is detected |
//! | to be moved by hand | [`save`](CheckpointStore::save) | it sets the offset unconditionally |
//!
//! # Exactly once
//!
//! The read model and the checkpoint commit together, or neither does. `?` turns the errors of your
//! own statements into [`Error`]s:
//!
//! ```no_run
//! # #[cfg(feature = "postgres")] mod example {
//! use checkpoint_store::{PostgresCheckpointStore, Result, postgres::Transaction};
//! use std::{thread::sleep, time::Duration};
//!
//! /// Applies the next event, and returns its offset.
//! fn apply_next(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
//!     let sql = "SELECT id, amount FROM events WHERE id > $1 ORDER BY id LIMIT 1";
//!     let Some(event) = tx.query_opt(sql, &[&offset])? else { return Ok(None) };
//!     tx.execute("UPDATE revenue SET total = total + $1", &[&event.get::<_, i64>("amount")])?;
//!     Ok(Some(event.get("id")))
//! }
//!
//! fn work(store: &PostgresCheckpointStore) -> Result<()> {
//!     loop {
//!         if store.project("revenue", apply_next)?.is_none() {
//!             sleep(Duration::from_millis(200)); // nothing new
//!         }
//!     }
//! }
//! # }
//! ```
//!
//! Lost connections, also during the commit, are nothing to the caller: see
//! [`project`](PostgresCheckpointStore::project), which may run the closure more than once. The events must
//! commit in the order of their ids, see [below](#gaps-in-the-stream).
//!
//! # At least once, at a cadence
//!
//! Where the read model is elsewhere, in files or in a search index, make handling an event idempotent,
//! and choose how many events a crash may repeat:
//!
//! ```
//! use checkpoint_store::{Cadence, Checkpointer, MemoryCheckpointStore};
//! use std::time::Duration;
//!
//! let store = MemoryCheckpointStore::new();
//! let cadence = Cadence::every(500).or_within(Duration::from_secs(1));
//! let mut checkpointer = Checkpointer::resume(&store, "search-index", cadence)?;
//! for offset in checkpointer.offset() + 1..=1_200 {
//!     // handle the event, then:
//!     checkpointer.processed(offset)?;
//! }
//! checkpointer.flush()?;
//! # Ok::<(), checkpoint_store::Error>(())
//! ```
//!
//! # Threads
//!
//! Events that are handled by several threads are done out of order. A [`Watermark`] knows up to where
//! all are done; that is what to checkpoint. Many threads with a projection each share one store, and
//! save faster with [`group_commit`](PostgresCheckpointStoreBuilder::group_commit).
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
//! Each [`Error`] says what failed and on what, keeps its cause, and shows no password. What to do:
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
//! # Resetting a projection
//!
//! To rebuild a read model, empty it and set its checkpoint back in one transaction. Workers may keep
//! running if they use [`project`](PostgresCheckpointStore::project), or `lock` in their own transactions:
//! they wait, and then resume at 0. **Stop any other worker first**, one with a [`Checkpointer`], with a
//! plain `save`, or with `get` and `advance`: it counts events as processed that the emptied read model
//! does not have any more, and once the rebuilt projection has come to the offset that it expects, its
//! next save succeeds and puts the checkpoint beyond them.
//!
//! ```no_run
//! # #[cfg(feature = "postgres")] mod example {
//! # use checkpoint_store::{PostgresCheckpointStore, postgres::Client};
//! fn reset(store: &PostgresCheckpointStore, client: &mut Client) -> checkpoint_store::Result<()> {
//!     let mut tx = client.transaction()?;
//!     store.in_transaction(&mut tx).lock("revenue")?;
//!     tx.execute("UPDATE revenue SET total = 0", &[])?;
//!     store.in_transaction(&mut tx).save("revenue", 0)?;
//!     tx.commit()?;
//!     Ok(())
//! }
//! # }
//! ```
//!
//! # Several environments in one database
//!
//! Give each a schema: `PostgresCheckpointStore::builder().schema("staging")`. Names of projections are
//! apart then, and so are rights.
//!
//! # From async code
//!
//! The `postgres` crate blocks, on a runtime of its own: called on a thread that drives an async
//! runtime it panics. Hand the call to a thread that may block:
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
//! The last handle of a store, too, must be dropped on a thread that may block: at the end of `main`,
//! outside of the runtime, say. In a program that is async throughout, another crate serves better.
//!
//! # Streams that begin at 0
//!
//! [`get`](CheckpointStore::get) says 0 when there is no checkpoint, which fits a stream that begins at
//! 1, as a `bigserial` does. Where the first event has offset 0, save `offset + 1` and read from
//! `get()` on; or tell none from 0 with [`find`](CheckpointStore::find).
//!
//! # Gaps in the stream
//!
//! A checkpoint store cannot see that event 41 will be committed after event 42. With events numbered
//! by a sequence that happens whenever two transactions append at once, and a projection that has
//! checkpointed 42 never reads 41. So make ids commit in their order: let appending transactions take
//! turns, from their first event to their commit.
//!
//! ```sql
//! CREATE TABLE events (
//!     id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
//!     payload jsonb NOT NULL
//! );
//! CREATE FUNCTION append_in_turn() RETURNS trigger LANGUAGE plpgsql AS $$
//! BEGIN
//!     PERFORM pg_advisory_xact_lock(TG_RELID::bigint); -- before the first id is drawn, until the commit
//!     RETURN NULL;
//! END $$;
//! CREATE TRIGGER append_in_turn BEFORE INSERT ON events
//!     FOR EACH STATEMENT EXECUTE FUNCTION append_in_turn();
//! ```
//!
//! The ids have to be drawn one by one, when they are used. **Where they are drawn ahead neither this nor
//! what follows helps**: a sequence with `CACHE` above 1 gives each session ids of its own, and so does a
//! HiLo allocator in a program. Set `CACHE 1`, which is the default.
//!
//! Where the writers must not wait for each other, let the reader wait for them: ask now and then how
//! far the stream is complete, and read no further. This waits for every open append, and new ones
//! wait meanwhile.
//!
//! ```sql
//! BEGIN;
//! LOCK TABLE events IN SHARE MODE;
//! SELECT max(id) FROM events;
//! COMMIT;
//! ```
//!
//! Comparing a column of transaction ids with `pg_snapshot_xmin`, as is often advised, is not enough
//! for one offset: a transaction that began early may append late, behind an event that is still open.
//!
//! # Features
//!
//! | Feature | Default | What it adds |
//! |---|---|---|
//! | `postgres` | yes | [`PostgresCheckpointStore`]; the crates `postgres`, `r2d2` and `r2d2_postgres` |
//! | `conformance` | no | `conformance::verify`: the contract as code, for stores of your own |
//!
//! Without any, the crate depends on `thiserror` alone.
//!
//! The [`guide`] goes on from here: operations, reliability, coming from C#, questions.

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
