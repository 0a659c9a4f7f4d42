//! A call: when a failed attempt is followed by another one, when it gives up, and what an observer learns.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use super::connect_error::no_connection;
use super::errors::{Cause, Subject, failure, is_explained};
use crate::Error;

/// A call that is about to be attempted again; see
/// [`on_retry`](super::PostgresCheckpointStoreBuilder::on_retry).
///
/// # Examples
///
/// ```
/// use checkpoint_store::Retry;
///
/// fn log(retry: &Retry<'_>) {
///     eprintln!("retry {} after {:.1?}: {}", retry.attempt, retry.elapsed, retry.error.report());
/// }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Retry<'a> {
    /// Why another attempt is necessary. It names the operation and its subject.
    pub error: &'a Error,
    /// The number of the attempt that follows: 1 for the first retry of the call.
    pub attempt: u32,
    /// The time since the first failure of the call.
    pub elapsed: Duration,
}

/// How long a call waits for an answer before the observer learns of it.
pub(crate) const NOTICE_AFTER: Duration = Duration::from_millis(900);

pub(crate) type Observer = dyn Fn(&Retry<'_>) + Send + Sync;

/// The moment at which something that may take so long from now has to be over.
pub(crate) fn deadline_after(time: Duration) -> Instant {
    /// For an `Instant` that cannot be so far away.
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);
    Instant::now() + time.min(LONGEST)
}

/// What a failed attempt asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another attempt would end the same way, or must not be made.
    Fail,
    /// Another attempt on another connection.
    Reconnect,
    /// Another attempt once concurrent transactions are out of the way.
    Repeat,
}

/// A call of the store: what it is about, and what its attempts have come to.
pub(crate) struct Call<'a> {
    pub(crate) operation: &'static str,
    pub(crate) subject: Subject<'a>,
    pub(crate) deadline: Instant,
    /// When an attempt at a write began that was lost, and may have been executed.
    pub(crate) lost: Option<Instant>,
    observer: Option<&'a Observer>,
    attempt: u32,
    first_failure: Option<Instant>,
    reconnect: Backoff,
    repeat: Backoff,
    /// The last error that came with an explanation of the server's.
    explained: Option<Error>,
    /// The error of a COMMIT whose outcome is unknown.
    in_doubt: Option<Error>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        operation: &'static str,
        subject: Subject<'a>,
        deadline: Instant,
        observer: Option<&'a Observer>,
    ) -> Self {
        Self {
            operation,
            subject,
            deadline,
            lost: None,
            observer,
            attempt: 0,
            first_failure: None,
            reconnect: Backoff::RECONNECT,
            repeat: Backoff::REPEAT,
            explained: None,
            in_doubt: None,
        }
    }

    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The error of a statement of the call. It does not say that nothing was written if an earlier attempt
    /// may have been executed.
    pub(crate) fn failure(&self, cause: impl Into<Cause>) -> Error {
        let error = failure(self.operation, self.subject, cause);
        if self.lost.is_some() { error.with_unknown_outcome() } else { error }
    }

    /// The error of the call if there is no connection for it.
    pub(crate) fn no_connection(&self, cause: impl Into<Cause>) -> Error {
        no_connection(self.operation, self.subject, cause)
    }

    /// The pause before the next attempt, or the error that ends the call.
    pub(crate) fn after(&mut self, error: Error, next: Next) -> Result<Duration, Error> {
        let Some(pause) = self.pause(next) else { return Err(self.last(error)) };
        self.observe(error);
        Ok(pause)
    }

    /// The same after an attempt for which there was no connection, so that nothing was sent.
    pub(crate) fn after_no_connection(
        &mut self,
        error: Error,
        next: Next,
    ) -> Result<Duration, Error> {
        let Some(pause) = self.pause(next) else {
            return Err(self.last_without_a_connection(error));
        };
        self.observe(error);
        Ok(pause.max(self.reconnect.first))
    }

    /// The same after a COMMIT that was not answered. Until its outcome is known the call ends with this
    /// error, whatever follows.
    pub(crate) fn after_a_doubt(&mut self, error: Error) -> Result<Duration, Error> {
        let Some(pause) = self.pause(Next::Reconnect) else { return Err(error) };
        self.tell(&error);
        self.in_doubt = Some(error);
        Ok(pause)
    }

    /// Ends the call with the error of a wait for a connection, if its time is over.
    pub(crate) fn end_if_time_is_over(&mut self, error: Error) -> Result<Error, Error> {
        if self.left().is_zero() { Err(self.last_without_a_connection(error)) } else { Ok(error) }
    }

    /// A pause that leaves half of the time to the attempt that follows; `None` if none is to follow, or the
    /// time is as good as over.
    fn pause(&mut self, next: Next) -> Option<Duration> {
        /// No attempt begins with less time. It is twice the first pause before another login.
        const SHORTEST_ATTEMPT: Duration = Duration::from_millis(100);
        let pause = match next {
            Next::Fail => return None,
            Next::Reconnect => self.reconnect.next(),
            Next::Repeat => self.repeat.next(),
        };
        let left = self.left();
        (left > SHORTEST_ATTEMPT).then(|| pause.min(left / 2))
    }

    /// The COMMIT in doubt is known not to have been executed, so its error says no more than why the
    /// connection was lost.
    pub(crate) fn end_of_doubt(&mut self) {
        let Some(Error::Unavailable { source, transient, .. }) = self.in_doubt.take() else {
            return;
        };
        let subject = Some(self.subject.to_string());
        let error = Error::Unavailable { operation: "save", subject, source, transient };
        if is_explained(&error) {
            self.explained = Some(error);
        }
    }

    /// The error of a call that ends because there is no connection. What the server has said before, or why
    /// a connection was discarded, says more.
    fn last_without_a_connection(&mut self, error: Error) -> Error {
        let earlier = self.explained.take().filter(|_| !is_explained(&error));
        self.in_doubt.take().or(earlier).unwrap_or(error)
    }

    /// The error of a call that ends with this one. It says whether something was written, so that no
    /// error of another kind can take its place.
    pub(crate) fn last(&mut self, error: Error) -> Error {
        let is_unavailable = |error: &Error| matches!(error, Error::Unavailable { .. });
        let earlier = self.explained.take().filter(is_unavailable);
        self.explained = earlier.filter(|_| is_unavailable(&error));
        self.last_without_a_connection(error)
    }

    /// Tells the observer that another attempt follows.
    pub(crate) fn observe(&mut self, error: Error) {
        self.tell(&error);
        if is_explained(&error) {
            self.explained = Some(error);
        }
    }

    fn tell(&mut self, error: &Error) {
        let now = Instant::now();
        let first_failure = *self.first_failure.get_or_insert(now);
        self.attempt = self.attempt.saturating_add(1);
        if let Some(observer) = self.observer {
            let elapsed = now.saturating_duration_since(first_failure);
            observer(&Retry { error, attempt: self.attempt, elapsed });
        }
    }
}

/// Pauses that double up to the longest one. Each is shortened by up to a half at random, so that clients
/// that have failed together do not come back together.
struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// At first without a pause: one connection of the pool was broken, and the next may not be.
    const RECONNECT: Self = Self {
        next: Duration::ZERO,
        first: Duration::from_millis(50),
        longest: Duration::from_secs(1),
    };
    const REPEAT: Self = Self {
        next: Duration::from_millis(5),
        first: Duration::from_millis(5),
        longest: Duration::from_millis(200),
    };

    fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).clamp(self.first, self.longest);
        let [random, ..] = RandomState::new().hash_one(0).to_ne_bytes();
        pause * (512 - u32::from(random)) / 512
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn call_for(time: Duration, observer: Option<&Observer>) -> Call<'_> {
        Call::new("save", Subject::Pool, deadline_after(time), observer)
    }

    #[test]
    fn pauses_grow_up_to_the_longest_and_differ_between_callers() {
        let pauses = |mut backoff: Backoff| (0..20).map(|_| backoff.next()).collect::<Vec<_>>();
        for _ in 0..100 {
            let reconnect = pauses(Backoff::RECONNECT);
            assert_eq!(reconnect[0], Duration::ZERO);
            for (i, pause) in reconnect[1..].iter().enumerate() {
                let whole = Duration::from_millis((50 << i.min(10)).min(1_000));
                assert!(*pause <= whole && *pause >= whole / 2, "{i}: {pause:?}");
            }
            assert!(pauses(Backoff::REPEAT).iter().all(|it| *it <= Duration::from_millis(200)));
        }
        assert_ne!(pauses(Backoff::RECONNECT), pauses(Backoff::RECONNECT));
    }

    #[test]
    fn the_observer_is_told_before_each_retry_and_not_of_the_error_that_ends_the_call() {
        static TOLD: Mutex<Vec<(u32, String)>> = Mutex::new(Vec::new());
        let observer = |retry: &Retry<'_>| {
            TOLD.lock().expect("no panic").push((retry.attempt, retry.error.to_string()));
        };
        let mut call = call_for(Duration::from_secs(60), Some(&observer));
        let error = |operation| Error::unavailable(operation, "closed");
        assert!(call.after(error("one"), Next::Reconnect).is_ok());
        assert!(call.after(error("two"), Next::Repeat).is_ok());
        assert!(call.after(error("three"), Next::Fail).is_err());
        let expected = [(1, error("one").to_string()), (2, error("two").to_string())];
        assert_eq!(*TOLD.lock().expect("no panic"), expected);
    }

    #[test]
    fn no_pause_goes_beyond_the_deadline() {
        let error = || Error::unavailable("save", "closed");
        let mut call = call_for(Duration::ZERO, None);
        assert!(call.after(error(), Next::Repeat).is_err());
        let mut call = call_for(Duration::from_millis(300), None);
        while let Ok(pause) = call.after_no_connection(error(), Next::Reconnect) {
            assert!(pause <= Duration::from_millis(300));
            std::thread::sleep(pause);
        }
    }
}
