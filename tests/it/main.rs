//! What the crate promises, tried on a real PostgreSQL.

#![allow(clippy::too_many_lines, reason = "a test tells one story")]

mod connect;
mod contract;
mod failover;
mod foreign_rows;
mod grouped;
mod harness;
mod hostile;
mod identifiers;
mod locks;
mod memory;
mod migrate;
mod network;
mod pgbouncer;
mod postgres;
mod prepared;
mod privileges;
mod secrets;
mod sql_files;
mod tls;
mod transactions;
