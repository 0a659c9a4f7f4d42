use std::fmt;
use std::time::{Duration, SystemTime};

use crate::{CheckpointStore, Result};

/// A projection's progress compared with its stream: a row of a dashboard.
///
/// Nothing is clamped. If the checkpoint is beyond the stream head, for example after a restore from
/// backup, the lag is negative and `percent_complete` is more than 100.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore, ProjectionStatus};
///
/// let store = MemoryCheckpointStore::new();
/// store.save("orders", 750)?;
/// let status = ProjectionStatus::read(&store, "orders", 1_000)?;
/// assert_eq!(status.lag, 250);
/// assert_eq!(status.percent_complete, 75.0);
/// # Ok::<(), checkpoint_store::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// The projection's name.
    pub projection: String,
    /// The offset of the last event processed; 0 if there is no checkpoint.
    pub checkpoint: i64,
    /// The offset of the last event in the stream.
    pub stream_head: i64,
    /// `stream_head - checkpoint`: the number of events still to process, if the stream has no gaps.
    pub lag: i64,
    /// `checkpoint` in percent of `stream_head`; 100 if the stream is empty (its head is 0).
    pub percent_complete: f64,
    /// When the checkpoint was last saved; `None` if there is no checkpoint.
    pub updated_at: Option<SystemTime>,
}

impl ProjectionStatus {
    /// Creates the status of a projection that has no checkpoint.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::ProjectionStatus;
    /// let status = ProjectionStatus::not_started("orders", 40);
    /// assert_eq!((status.checkpoint, status.lag, status.updated_at), (0, 40, None));
    /// ```
    pub fn not_started(projection: impl Into<String>, stream_head: i64) -> Self {
        Self::new(projection.into(), 0, stream_head, None)
    }

    /// Reads the projection's checkpoint and compares it with the stream head.
    ///
    /// The stream head was read before the checkpoint, so on a busy stream a projection may appear to be
    /// ahead of it. To avoid that, read the checkpoints first and the stream head afterwards, and compare
    /// them with [`Checkpoint::status`](crate::Checkpoint::status).
    ///
    /// # Errors
    ///
    /// As [`CheckpointStore::find`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{MemoryCheckpointStore, ProjectionStatus};
    /// let store = MemoryCheckpointStore::new();
    /// assert_eq!(ProjectionStatus::read(&store, "orders", 40)?.lag, 40);
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    pub fn read(store: &dyn CheckpointStore, projection: &str, stream_head: i64) -> Result<Self> {
        Ok(match store.find(projection)? {
            Some(checkpoint) => checkpoint.status(stream_head),
            None => Self::not_started(projection, stream_head),
        })
    }

    pub(crate) fn new(
        projection: String,
        checkpoint: i64,
        stream_head: i64,
        updated_at: Option<SystemTime>,
    ) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a percentage needs no 19 digits")]
        let percent_complete = match stream_head {
            ..=0 => 100.0,
            _ => checkpoint as f64 / stream_head as f64 * 100.0,
        };
        let lag = stream_head.saturating_sub(checkpoint);
        Self { projection, checkpoint, stream_head, lag, percent_complete, updated_at }
    }
}

/// The result of a [`HealthCheck`]. `Display` writes it as a phrase.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{Health, HealthLevel};
///
/// let health = Health::Lagging { lag: 42 };
/// assert_eq!(health.to_string(), "projection lagging: 42 events");
/// assert_eq!(health.level(), HealthLevel::Degraded);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// All events are processed.
    CaughtUp,
    /// Some events are not processed yet.
    Lagging {
        /// The number of events.
        lag: i64,
    },
    /// The lag has reached the [critical lag](HealthCheck::critical_lag).
    CriticallyLagging {
        /// The number of events.
        lag: i64,
    },
    /// The projection lags, and was not saved for longer than
    /// [`stalled_after`](HealthCheck::stalled_after).
    Stalled {
        /// The number of events.
        lag: i64,
        /// The time since the last save.
        idle: Duration,
    },
    /// The checkpoint is beyond the stream head: this is the wrong database, or a restored one.
    AheadOfHead {
        /// The number of events.
        by: i64,
    },
}

impl Health {
    /// Returns the severity: `CaughtUp` is healthy, `Lagging` is degraded, all others are unhealthy.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Health, HealthLevel};
    /// assert_eq!(Health::CaughtUp.level(), HealthLevel::Healthy);
    /// assert_eq!(Health::AheadOfHead { by: 5 }.level(), HealthLevel::Unhealthy);
    /// ```
    #[must_use]
    pub fn level(&self) -> HealthLevel {
        match self {
            Self::CaughtUp => HealthLevel::Healthy,
            Self::Lagging { .. } => HealthLevel::Degraded,
            Self::CriticallyLagging { .. } | Self::Stalled { .. } | Self::AheadOfHead { .. } => {
                HealthLevel::Unhealthy
            }
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::CaughtUp => f.write_str("projection up to date"),
            Self::Lagging { lag } => write!(f, "projection lagging: {}", events(lag)),
            Self::CriticallyLagging { lag } => {
                write!(f, "projection critically lagging: {}", events(lag))
            }
            Self::Stalled { lag, idle } => write!(
                f,
                "projection stalled: {} behind, not saved for {} s",
                events(lag),
                idle.as_secs()
            ),
            Self::AheadOfHead { by } => {
                write!(f, "projection ahead of the stream head: {}", events(by))
            }
        }
    }
}

fn events(count: i64) -> String {
    format!("{count} event{}", if count == 1 { "" } else { "s" })
}

/// The severity of a [`Health`], for probes and alerts. The levels are ordered from good to bad, so the
/// maximum of several is the worst.
///
/// # Examples
///
/// ```
/// use checkpoint_store::HealthLevel;
///
/// let worst = [HealthLevel::Healthy, HealthLevel::Degraded].into_iter().max();
/// assert_eq!(worst, Some(HealthLevel::Degraded));
/// assert_eq!(HealthLevel::Degraded.to_string(), "degraded");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthLevel {
    /// No action is needed.
    Healthy,
    /// It works, but watch it.
    Degraded,
    /// An operator has to act.
    Unhealthy,
}

impl fmt::Display for HealthLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
        })
    }
}

/// Decides whether a projection is healthy, lags, is stalled, or is ahead of its stream.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{Health, HealthCheck, ProjectionStatus};
/// use std::time::{Duration, SystemTime};
///
/// let check = HealthCheck::new().critical_lag(500).stalled_after(Duration::from_secs(60));
/// let status = ProjectionStatus::not_started("orders", 700);
/// let health = check.assess(&status, SystemTime::now());
/// assert_eq!(health, Health::CriticallyLagging { lag: 700 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a check does nothing until `assess` is called"]
pub struct HealthCheck {
    critical_lag: i64,
    stalled_after: Option<Duration>,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self { critical_lag: 1_000, stalled_after: None }
    }
}

impl HealthCheck {
    /// Creates a check with the defaults: a lag of 1,000 events is critical, and stalls are not detected.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::HealthCheck;
    /// assert_eq!(HealthCheck::new(), HealthCheck::default());
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the lag from which a projection is critically lagging. The default is 1,000 events.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::HealthCheck;
    /// let check = HealthCheck::new().critical_lag(10_000);
    /// ```
    pub fn critical_lag(mut self, events: i64) -> Self {
        self.critical_lag = events;
        self
    }

    /// Sets how long a lagging projection may go without a save before it is stalled. Off by default.
    /// Choose a time longer than the cadence of its saves.
    ///
    /// If a stream has no events for longer than this time, its next event makes the projection appear
    /// stalled until it is saved. Act on the second such report only, or let an idle worker renew
    /// `updated_at` regularly with [`Checkpointer::renew`](crate::Checkpointer::renew), or with `advance`
    /// from its offset to the same offset.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::HealthCheck;
    /// # use std::time::Duration;
    /// let check = HealthCheck::new().stalled_after(Duration::from_secs(300));
    /// ```
    pub fn stalled_after(mut self, idle: Duration) -> Self {
        self.stalled_after = Some(idle);
        self
    }

    /// Assesses a status at the time `now`, in general `SystemTime::now()`. If the clocks of this machine and
    /// of the store differ, `idle` is wrong by the difference.
    ///
    /// A projection that is both stalled and critically lagging is `Stalled`. One that was never saved is
    /// never `Stalled`. An `updated_at` later than `now` counts as just saved.
    ///
    /// # Examples
    ///
    /// ```
    /// # use checkpoint_store::{Health, HealthCheck, ProjectionStatus};
    /// # use std::time::SystemTime;
    /// let status = ProjectionStatus::not_started("orders", 0);
    /// assert_eq!(HealthCheck::new().assess(&status, SystemTime::now()), Health::CaughtUp);
    /// ```
    #[must_use]
    pub fn assess(&self, status: &ProjectionStatus, now: SystemTime) -> Health {
        let lag = status.lag;
        let idle = status.updated_at.map(|saved| now.duration_since(saved).unwrap_or_default());
        match (idle, self.stalled_after) {
            _ if lag < 0 => Health::AheadOfHead { by: lag.saturating_neg() },
            _ if lag == 0 => Health::CaughtUp,
            (Some(idle), Some(limit)) if idle > limit => Health::Stalled { lag, idle },
            _ if lag >= self.critical_lag => Health::CriticallyLagging { lag },
            _ => Health::Lagging { lag },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoint;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn status(checkpoint: i64, stream_head: i64) -> ProjectionStatus {
        Checkpoint::new("orders", checkpoint, NOW).status(stream_head)
    }

    #[test]
    fn the_lag_decides() {
        let check = HealthCheck::new();
        for (checkpoint, expected) in [
            (5_000, "projection up to date"),
            (4_999, "projection lagging: 1 event"),
            (4_958, "projection lagging: 42 events"),
            (4_001, "projection lagging: 999 events"),
            (4_000, "projection critically lagging: 1000 events"),
            (3_500, "projection critically lagging: 1500 events"),
            (5_003, "projection ahead of the stream head: 3 events"),
        ] {
            let health = check.assess(&status(checkpoint, 5_000), NOW);
            assert_eq!(health.to_string(), expected);
        }
    }

    #[test]
    fn only_a_projection_that_lags_can_be_stalled() {
        let check = HealthCheck::new().stalled_after(Duration::from_secs(60));
        let later = NOW + Duration::from_secs(90);
        let stalled = check.assess(&status(8, 50), later);
        assert_eq!(stalled, Health::Stalled { lag: 42, idle: Duration::from_secs(90) });
        assert_eq!(stalled.to_string(), "projection stalled: 42 events behind, not saved for 90 s");
        assert_eq!(check.assess(&status(50, 50), later), Health::CaughtUp);
        assert_eq!(check.assess(&status(51, 50), later), Health::AheadOfHead { by: 1 });
        let at_the_limit = NOW + Duration::from_secs(60);
        assert_eq!(check.assess(&status(8, 50), at_the_limit), Health::Lagging { lag: 42 });
        let never_saved = ProjectionStatus::not_started("orders", 42);
        assert_eq!(check.assess(&never_saved, later), Health::Lagging { lag: 42 });
        assert!(matches!(check.assess(&status(8, 5_000), later), Health::Stalled { .. }));
    }

    #[test]
    fn a_clock_that_runs_backwards_counts_as_just_saved() {
        let check = HealthCheck::new().stalled_after(Duration::ZERO);
        let earlier = NOW - Duration::from_secs(90);
        assert_eq!(check.assess(&status(8, 50), earlier), Health::Lagging { lag: 42 });
    }

    #[test]
    fn nothing_is_clamped_and_nothing_overflows() {
        let percent = |checkpoint, head| status(checkpoint, head).percent_complete;
        let rounded = |percent: f64| format!("{percent:.1}");
        assert_eq!(rounded(percent(0, 0)), "100.0");
        assert_eq!(rounded(percent(5, 0)), "100.0");
        assert_eq!(rounded(percent(0, 10)), "0.0");
        assert_eq!(rounded(percent(1, 3)), "33.3");
        assert_eq!(rounded(percent(20, 10)), "200.0");
        assert_eq!(status(20, 10).lag, -10);
        assert_eq!(status(-5, i64::MAX).lag, i64::MAX);
        let foreign = ProjectionStatus { lag: i64::MIN, ..status(0, 0) };
        let health = HealthCheck::new().assess(&foreign, NOW);
        assert_eq!(health, Health::AheadOfHead { by: i64::MAX });
    }
}
