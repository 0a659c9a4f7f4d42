//! Repeats of a write that may have been executed: only where the rows show that nobody has written since.

use std::time::{Duration, Instant, SystemTime};

use super::errors::{Outcome, OutcomeUnknown};
use super::queries::{NO_ROW, Queries, Timestamp, last_of_each, written};
use super::session::Session;

impl Queries {
    /// Saves after a first attempt, begun at `lost`, that may have been executed, and not if anybody has
    /// written one of the checkpoints since: that must not be undone. A checkpoint that is not there
    /// does not tell whether it was deleted since.
    pub(crate) fn save_again(
        &self,
        session: &mut impl Session,
        checkpoints: &[(&str, i64)],
        lost: Instant,
    ) -> Outcome<()> {
        let (names, offsets) = last_of_each(checkpoints);
        let since = self.server_time_at(session, lost)?;
        let rows = written(session.query(&self.sql.save_again, &[&names, &offsets, &since]))?;
        let row = rows.first().ok_or(NO_ROW)?;
        match (row.try_get("is_written")?, row.try_get("is_as_given")?) {
            (false, false) => Err(OutcomeUnknown.into()),
            _ => Ok(()),
        }
    }

    /// The same for a delete. Where nothing is there it may have been the first attempt that deleted it.
    pub(crate) fn delete_again(
        &self,
        session: &mut impl Session,
        projection: &str,
        lost: Instant,
    ) -> Outcome<bool> {
        let since = self.server_time_at(session, lost)?;
        let rows = session.query(&self.sql.delete_again, &[&projection, &since])?;
        let row = rows.first().ok_or(NO_ROW)?;
        match (row.try_get("is_deleted")?, row.try_get("was_there")?) {
            (true, _) => Ok(true),
            (false, true) => Err(OutcomeUnknown.into()),
            (false, false) => self.is_there(session, projection).map(|_| false),
        }
    }

    /// What the server's clock showed at that moment, or a little earlier: by the time that the fastest of a
    /// few answers took. The first one on a new connection is slow, and the row may have been written just
    /// before that moment.
    fn server_time_at(&self, session: &mut impl Session, moment: Instant) -> Outcome<SystemTime> {
        const QUESTIONS: usize = 4;
        let mut latest = self.server_time_before(session, moment)?;
        for _ in 1..QUESTIONS {
            latest = latest.max(self.server_time_before(session, moment)?);
        }
        Ok(latest)
    }

    /// What the server's clock showed before that moment, by the time that the answer took. Rows that another
    /// server wrote before a failover have the time of another clock, so nothing can be said soon after one.
    /// A server that was promoted is on another timeline than the first, which tells it from one that has
    /// recovered from a crash of its own.
    fn server_time_before(
        &self,
        session: &mut impl Session,
        moment: Instant,
    ) -> Outcome<SystemTime> {
        /// By how much the clocks of a primary and its standby may differ.
        const CLOCK_SKEW: Duration = Duration::from_secs(60);
        let rows = session.query(&self.sql.server_time, &[])?;
        let row = rows.first().ok_or(NO_ROW)?;
        let Timestamp(now) = row.try_get("now")?;
        let then = now.checked_sub(moment.elapsed()).ok_or(OutcomeUnknown)?;
        let was_standby_until: Option<Timestamp> = row.try_get("was_standby_until")?;
        match was_standby_until {
            Some(Timestamp(until)) if until + CLOCK_SKEW > then => Err(OutcomeUnknown.into()),
            _ => Ok(then),
        }
    }
}
