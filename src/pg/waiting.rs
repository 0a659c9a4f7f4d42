//! Waiting, for so long, for what has no time limit of its own.

use std::sync::mpsc::{Receiver, SendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::connect_error::{ConnectError, Failure};
use super::retry::NOTICE_AFTER;

/// What a caller that waits is told, once.
pub(crate) struct Notice<'a> {
    at: Instant,
    waiting: Option<&'a mut dyn FnMut(ConnectError)>,
}

impl<'a> Notice<'a> {
    pub(crate) fn to(waiting: &'a mut dyn FnMut(ConnectError)) -> Self {
        Self { at: Instant::now() + NOTICE_AFTER, waiting: Some(waiting) }
    }

    /// Waits until the limit, and on the way gives notice of the failure that it would be by then.
    pub(crate) fn wait<T>(
        &mut self,
        until: Instant,
        failure: impl FnOnce() -> Failure,
        wait: impl Fn(Instant) -> Option<T>,
    ) -> Option<T> {
        /// A wait that is no longer says nothing of its peer.
        const SHORTEST: Duration = Duration::from_millis(100);
        let at = self.at.max(Instant::now() + SHORTEST);
        if self.waiting.is_some() && at < until {
            if let Some(answer) = wait(at) {
                return Some(answer);
            }
            if let Some(waiting) = self.waiting.take() {
                waiting(failure().into());
            }
        }
        wait(until)
    }
}

pub(crate) fn receive<T>(receiver: &Receiver<T>, until: Instant) -> Option<T> {
    receiver.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
}

/// Runs something that has no limit of its own on another thread. If the receiver of its outcome is dropped
/// it goes on, and `late` gets what comes of it.
pub(crate) fn bounded<T: Send + 'static>(
    thread: &str,
    work: impl FnOnce() -> T + Send + 'static,
    late: impl FnOnce(T) + Send + 'static,
) -> Result<Receiver<T>, Failure> {
    // Without a buffer, so an outcome that was sent has been received.
    let (sender, receiver) = sync_channel(0);
    let run = move || {
        if let Err(SendError(outcome)) = sender.send(work()) {
            late(outcome);
        }
    };
    thread::Builder::new().name(thread.to_owned()).spawn(run).map_err(Failure::NoThread)?;
    Ok(receiver)
}
