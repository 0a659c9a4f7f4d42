//! In unit tests these are loom's, which tries every interleaving of the threads, and work only
//! inside `loom::model`.

#[cfg(all(test, feature = "postgres"))]
pub(crate) use loom::sync::Condvar;
#[cfg(test)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(all(test, feature = "postgres"))]
pub(crate) use loom::thread_local;
#[cfg(all(not(test), feature = "postgres"))]
pub(crate) use std::sync::Condvar;
#[cfg(not(test))]
pub(crate) use std::sync::{Mutex, MutexGuard};
#[cfg(all(not(test), feature = "postgres"))]
pub(crate) use std::thread_local;
