//! Closing a connection without waiting for it.

use std::mem::ManuallyDrop;
use std::thread;

/// Drops a client, a pool or whatever else holds connections, on a thread of its own.
///
/// To drop a `postgres::Client` is to wait for the answer to its last request, which a frozen server never
/// sends; and it panics on a thread that drives an async runtime, or whose thread-local storage is gone.
/// If no thread can be had the connections are leaked, which does less harm than any of that.
pub(crate) fn close<T: Send + 'static>(connections: T) {
    let connections = ManuallyDrop::new(connections);
    let closing = thread::Builder::new().name("checkpoint-close".to_owned());
    drop(closing.spawn(move || drop(ManuallyDrop::into_inner(connections))));
}
