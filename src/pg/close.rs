//! How a connection is closed.

use std::mem::ManuallyDrop;
use std::thread;

use postgres::Client;

/// Closes a connection without waiting for the server.
///
/// Dropping a [`Client`] waits for the answer to its last request, which a frozen server never sends.
/// It also panics on a thread that drives an async runtime, and on one whose thread-locals are gone.
/// The drop runs on a thread of its own for that reason. If no thread can be started, the connection
/// is leaked.
pub(crate) fn close(client: Client) {
    let client = ManuallyDrop::new(client);
    // If this fails the closure is dropped here, and the client in it is not.
    let _ = thread::Builder::new()
        .name("pg-close".to_owned())
        .spawn(move || drop(ManuallyDrop::into_inner(client)));
}
