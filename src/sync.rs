//! In unit tests these are loom's, which tries every interleaving of the threads, and work only
//! inside `loom::model`.

#![cfg_attr(not(feature = "postgres"), expect(unused_imports, reason = "for group commit"))]

#[cfg(test)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(test)]
pub(crate) use loom::thread_local;
#[cfg(not(test))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(test))]
pub(crate) use std::thread_local;
