//! What the crate promises, tried on a real PostgreSQL.

#![allow(clippy::too_many_lines, reason = "a test tells one story")]

mod connect;
mod contract;
mod documentation;
mod faults;
mod grouped;
mod harness;
mod identifiers;
mod locks;
mod memory;
mod migrate;
mod order_summary;
mod postgres;
mod prepared;
mod redis;
mod sql_files;
mod transactions;
