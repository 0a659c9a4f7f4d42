//! Locks. In unit tests the types are loom's, which tries every interleaving of the threads, and work only
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

/// Locks a mutex of the standard library, poisoned or not: no code here panics halfway through a change under
/// a lock, so the data is consistent.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
