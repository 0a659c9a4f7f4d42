//! Waiting, for so long, for what has no time limit of its own.

use std::sync::mpsc::{Receiver, SendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::connect_error::{ConnectError, Failure};
use super::retry::NOTICE_AFTER;

/// How a call waits for its connection. It is told once what it waits for.
pub(crate) struct Wait<'a> {
    /// When the time of the address, or of the lookup, that is being tried is over: to be set before it.
    pub(crate) until: Instant,
    notice_at: Option<Instant>,
    tell: &'a mut dyn FnMut(ConnectError),
}

impl<'a> Wait<'a> {
    pub(crate) fn telling(tell: &'a mut dyn FnMut(ConnectError)) -> Self {
        let now = Instant::now();
        Self { until: now, notice_at: Some(now + NOTICE_AFTER), tell }
    }

    /// Waits for an outcome, and on the way tells of the failure that it would be by then.
    pub(crate) fn bounded<T>(
        &mut self,
        failure: impl Fn() -> Failure,
        outcome_by: impl Fn(Instant) -> Option<T>,
    ) -> Result<T, Failure> {
        /// A wait that is no longer says nothing of its peer.
        const SHORTEST: Duration = Duration::from_millis(100);
        let notice_at = self.notice_at.map(|at| at.max(Instant::now() + SHORTEST));
        if let Some(notice_at) = notice_at.filter(|at| *at < self.until) {
            if let Some(outcome) = outcome_by(notice_at) {
                return Ok(outcome);
            }
            self.notice_at = None;
            (self.tell)(failure().into());
        }
        outcome_by(self.until).ok_or_else(failure)
    }

    /// Waits for the outcome of what runs on another thread.
    pub(crate) fn receive<T>(
        &mut self,
        failure: impl Fn() -> Failure,
        outcome: &Receiver<T>,
    ) -> Result<T, Failure> {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        self.bounded(failure, |until| outcome.recv_timeout(left(until)).ok())
    }
}

/// Runs something that has no limit of its own on another thread. If the receiver of its outcome is dropped
/// it goes on, and `late` gets what comes of it.
pub(crate) fn spawn<T: Send + 'static>(
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
