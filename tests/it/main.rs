//! What the crate promises, tried on a real PostgreSQL.

#![allow(clippy::too_many_lines, reason = "a test tells one story")]

mod checkpointer;
mod connect;
mod contract;
mod dashboard;
mod deadlines;
mod documentation;
mod endings;
mod environment;
mod exactly_once;
mod failover;
mod faults;
mod foreign_rows;
mod from_csharp;
mod front_page;
mod group_commit;
mod harness;
mod hostile;
mod identifiers;
mod inside_the_closure;
mod locks;
mod memory;
mod migrate;
mod network;
mod order_summary;
mod outages;
mod passwords;
mod pgbouncer;
mod postgres;
mod prepared;
mod privileges;
mod project;
mod public_face;
mod recipes;
mod redis;
mod repeats;
mod retries;
mod secrets;
mod silence;
mod sql_files;
mod threaded_batch;
mod tls;
mod transactions;
mod watermark;
mod worker_pool;
