//! The store's statements: one function an operation, for the pool and for the caller's transaction alike.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use postgres::error::SqlState;
use postgres::types::{FromSql, Type};
use postgres::{GenericClient, Row};

use super::errors::{Cause, Outcome, Rivals, Subject};
use super::group::{Stored, Write};
use super::identifier::{Table, literal, time_literal};
use super::session::{Session, StatementCache};
use super::statements::Statements;
use crate::{Checkpoint, Error};

/// The operations on one table.
#[derive(Debug)]
pub(crate) struct Queries {
    pub(crate) table: Table,
    pub(crate) sql: Statements,
}

impl Queries {
    pub(crate) fn new(table: Table) -> Self {
        Self { sql: Statements::new(&table), table }
    }

    /// What an operation on one projection was about, for its error.
    pub(crate) fn about<'a>(&'a self, projection: &'a str) -> Subject<'a> {
        Subject::Projection(projection, &self.table)
    }

    /// The same for an operation on several.
    pub(crate) fn about_many(&self, count: usize) -> Subject<'_> {
        Subject::Projections(count, &self.table)
    }

    /// The same for an operation on all of them.
    pub(crate) fn about_all(&self) -> Subject<'_> {
        Subject::All(&self.table)
    }

    pub(crate) fn find(
        &self,
        session: &mut impl Session,
        projection: &str,
    ) -> Outcome<Option<Checkpoint>> {
        match session.query(&self.sql.find, &[&projection])?.first() {
            Some(row) => checkpoint(row).map(Some),
            None => self.is_there(session, projection).map(|_| None),
        }
    }

    /// Ordered by the bytes of the names, which is not for the server to do: in another encoding it
    /// has other bytes.
    pub(crate) fn all(&self, session: &mut impl Session) -> Outcome<Vec<Checkpoint>> {
        let rows = session.query(&self.sql.all, &[])?;
        match rows.first() {
            Some(row) if row.try_get("may_hide")? => return Err(MAY_HIDE.into()),
            Some(_) => {}
            None => drop(self.is_there(session, "")?),
        }
        let mut checkpoints: Vec<_> = rows.iter().map(checkpoint).collect::<Outcome<_>>()?;
        checkpoints.sort_unstable_by(|one, other| one.projection.cmp(&other.projection));
        Ok(checkpoints)
    }

    /// Whether the checkpoint is there, asked after a statement has found none. What row-level security
    /// hides must not look like what is not there.
    pub(crate) fn is_there(&self, session: &mut impl Session, projection: &str) -> Outcome<bool> {
        let rows = session.query(&self.sql.absent, &[&self.table.to_string(), &projection])?;
        Ok(unless_hidden(&rows)?.try_get("is_there")?)
    }

    pub(crate) fn save(
        &self,
        session: &mut impl Session,
        projection: &str,
        offset: i64,
    ) -> Outcome<()> {
        match written(session.query(&self.sql.save, &[&projection, &offset]))?.len() {
            1 => Ok(()),
            _ => Err(NOTHING_WRITTEN.into()),
        }
    }

    pub(crate) fn save_many(
        &self,
        session: &mut impl Session,
        checkpoints: &[(&str, i64)],
    ) -> Outcome<()> {
        let (names, offsets) = last_of_each(checkpoints);
        written(session.query(&self.sql.save_many, &[&names, &offsets])).map(drop)
    }

    pub(crate) fn advance(
        &self,
        session: &mut impl Session,
        projection: &str,
        from: i64,
        to: i64,
    ) -> Outcome<Advance> {
        for _ in 0..ATTEMPTS {
            // The cheap statement first: it is all there is to do, unless the row is absent or elsewhere.
            let moved = written(session.query(&self.sql.advance, &[&projection, &from, &to]))?;
            if !moved.is_empty() {
                return Ok(Advance::Moved);
            }
            let rows =
                written(session.query(&self.sql.advance_or_find, &[&projection, &from, &to]))?;
            let row = rows.first().ok_or(NO_ROW)?;
            if row.try_get("moved")? {
                return Ok(Advance::Moved);
            }
            match row.try_get("found")? {
                // It was locked where it was expected to be, and was not moved.
                Some(found) if found == from => return Err(NOTHING_WRITTEN.into()),
                Some(found) => return Ok(Advance::Found(found)),
                // It may have been deleted and created while the statement ran.
                None if from != 0 && !self.is_there(session, projection)? => {
                    return Ok(Advance::Found(0));
                }
                // A rival has created it while the statement ran, or the server discards what is inserted.
                None => {}
            }
        }
        Err(self.why_nothing_happens(session)?)
    }

    /// Why one statement after another touches no row.
    fn why_nothing_happens(&self, session: &mut impl Session) -> Outcome<Cause> {
        let rows = session.query(&self.sql.may_discard, &[&self.table.to_string()])?;
        Ok(match rows.first().map(|row| row.try_get(0)).transpose()? {
            Some(true) => NOTHING_HAPPENS.into(),
            _ => Rivals.into(),
        })
    }

    /// Stores what is free and where it is expected to be, and says whose that was.
    pub(crate) fn write_together(
        &self,
        session: &mut impl Session,
        writes: &[&Write],
    ) -> Outcome<Stored> {
        let names: Vec<&str> = writes.iter().map(|write| &*write.projection).collect();
        let from: Vec<Option<i64>> = writes.iter().map(|write| write.from).collect();
        let to: Vec<i64> = writes.iter().map(|write| write.to).collect();
        let rows = written(session.query(&self.sql.write_together, &[&names, &from, &to]))?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    pub(crate) fn delete(&self, session: &mut impl Session, projection: &str) -> Outcome<bool> {
        for _ in 0..ATTEMPTS {
            if !session.query(&self.sql.delete, &[&projection])?.is_empty() {
                return Ok(true);
            }
            if !self.is_there(session, projection)? {
                return Ok(false);
            }
        }
        Err(self.why_nothing_happens(session)?)
    }

    pub(crate) fn lock(&self, session: &mut impl Session, projection: &str) -> Outcome<i64> {
        match self.lock_if_there(session, projection, WhileTaken::Wait)? {
            Some(lock) => Ok(lock.offset),
            None => self.lock_new(session, projection),
        }
    }

    /// Creates the row at 0, or waits for the transaction that is creating it, and locks it.
    pub(crate) fn lock_new(&self, session: &mut impl Session, projection: &str) -> Outcome<i64> {
        let table = self.table.to_string();
        let rows = written(session.query(&self.sql.lock_new, &[&projection, &table]))?;
        Ok(rows.first().ok_or(NOTHING_WRITTEN)?.try_get(0)?)
    }

    /// Locks the row if it is there and, unless the call waits, free.
    pub(crate) fn lock_if_there(
        &self,
        session: &mut impl Session,
        projection: &str,
        while_taken: WhileTaken,
    ) -> Outcome<Option<Lock>> {
        let query = match while_taken {
            WhileTaken::Wait => &self.sql.lock,
            WhileTaken::GiveUp => &self.sql.try_lock,
        };
        let rows = session.query(query, &[&projection])?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (offset, Timestamp(began)) = (row.try_get("offset")?, row.try_get("began")?);
        Ok(Some(Lock { row: LockedRow::There, offset, began }))
    }

    /// Locks a projection whose row is not there, and writes nothing: a call of `project` that finds
    /// nothing new leaves nothing behind. `None` if the call does not wait, and another transaction holds the
    /// row or is creating it.
    pub(crate) fn lock_absent(
        &self,
        session: &mut impl Session,
        projection: &str,
        while_taken: WhileTaken,
    ) -> Outcome<Option<Lock>> {
        let query = match while_taken {
            WhileTaken::Wait => &self.sql.lock_absent,
            WhileTaken::GiveUp => &self.sql.try_lock_absent,
        };
        let rows = session.query(query, &[&projection, &self.table.to_string()])?;
        let row = unless_hidden(&rows)?;
        let Timestamp(began) = row.try_get("began")?;
        let lock = Lock { row: LockedRow::Absent, offset: 0, began };
        Ok(row.try_get::<_, bool>("is_locked")?.then_some(lock))
    }

    /// What the message that saves what `project` has locked is made of, prepared for `EXECUTE`.
    pub(crate) fn prepare_to_save(
        &self,
        cache: &mut StatementCache,
        client: &mut impl GenericClient,
    ) -> Outcome<()> {
        cache.prepare_named(client, &self.sql.project_save)?;
        Ok(cache.prepare_named(client, &self.sql.project_check)?)
    }

    /// Saves what `project` has locked and commits, in one message. It fails before the COMMIT unless the row
    /// is there as it was given. If the closure has ended the transaction no row is written, because another
    /// transaction began at another time. So nothing is saved without the lock, and a save never waits for a
    /// transaction that the closure has prepared. The check costs too much to compare that time, too, and so
    /// passes if somebody else has brought the row to the same offset since the closure ended the transaction.
    ///
    /// The name is written in ASCII, which is the same in any encoding. After a name beyond ASCII an encoding
    /// that the closure has set is set back, or the next call would be about another name.
    pub(crate) fn save_and_commit(
        &self,
        cache: Option<&StatementCache>,
        lock: &Lock,
        projection: &str,
        offset: i64,
    ) -> String {
        let save = match lock.row {
            LockedRow::There => &self.sql.project_save,
            LockedRow::Absent => &self.sql.project_create,
        };
        let parameters = [literal(projection), offset.to_string(), time_literal(lock.began)];
        let text = |template| StatementCache::text(cache, template, &parameters);
        let (save, check) = (text(save), text(&self.sql.project_check));
        let encoding = if projection.is_ascii() { "" } else { "SET client_encoding = 'UTF8';" };
        format!("{save} {check} {encoding} COMMIT")
    }
}

/// What a call does while another transaction has locked the projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhileTaken {
    Wait,
    GiveUp,
}

/// A projection that is locked until the transaction ends.
pub(crate) struct Lock {
    pub(crate) row: LockedRow,
    pub(crate) offset: i64,
    /// When the transaction began, which tells it from the next one.
    began: SystemTime,
}

/// Whether the row of a locked projection is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockedRow {
    There,
    Absent,
}

/// What a compare-and-set came to.
pub(crate) enum Advance {
    Moved,
    /// It is here instead of where it was expected, and stays.
    Found(i64),
}

impl Advance {
    pub(crate) fn or_conflict(self, projection: &str, expected: i64) -> crate::Result<()> {
        match self {
            Self::Moved => Ok(()),
            Self::Found(found) => Err(Error::conflict(projection, expected, found)),
        }
    }
}

const NOTHING_WRITTEN: &str = "the server wrote no row, or another checkpoint than it was given: a trigger, \
                               rule or policy discards or alters it";

const NOTHING_HAPPENS: &str = "the server wrote no row: a trigger, rule or policy discards it, or other clients have created and \
     deleted it at each of several attempts";

/// How often a statement that touches no row is tried before it is asked why.
const ATTEMPTS: usize = 8;

pub(crate) const NO_ROW: &str = "the server returned no row";

const MAY_HIDE: &str = "row-level security may hide checkpoints from the role that is logged in: \
                        use the table's owner, or a role with BYPASSRLS";

/// A statement whose `RETURNING` divides by zero when the row is not as it was given. So the server
/// undoes what it has altered, in the same round trip.
pub(crate) fn written<T>(outcome: Outcome<T>) -> Outcome<T> {
    outcome.map_err(|cause| if is_not_as_given(&cause) { NOTHING_WRITTEN.into() } else { cause })
}

/// Whether it is that division by zero, and not one of a trigger's own: the error of a function has a context.
pub(crate) fn is_not_as_given(cause: &Cause) -> bool {
    let error = cause.downcast_ref::<postgres::Error>().and_then(postgres::Error::as_db_error);
    error.is_some_and(|error| {
        *error.code() == SqlState::DIVISION_BY_ZERO && error.where_().is_none()
    })
}

/// The answer about a row that is not there, if row-level security does not hide what is.
fn unless_hidden(rows: &[Row]) -> Outcome<&Row> {
    let row = rows.first().ok_or(NO_ROW)?;
    if row.try_get("may_hide")? { Err(MAY_HIDE.into()) } else { Ok(row) }
}

/// In the order of the names; of a name given twice the last one counts.
pub(crate) fn last_of_each<'a>(checkpoints: &[(&'a str, i64)]) -> (Vec<&'a str>, Vec<i64>) {
    checkpoints.iter().copied().collect::<BTreeMap<_, _>>().into_iter().unzip()
}

fn checkpoint(row: &Row) -> Outcome<Checkpoint> {
    let Timestamp(updated_at) = row.try_get(2)?;
    Ok(Checkpoint { projection: row.try_get(0)?, offset: row.try_get(1)?, updated_at })
}

/// A `timestamptz` that may hold anything, infinity included, and never panics.
pub(crate) struct Timestamp(pub(crate) SystemTime);

impl<'a> FromSql<'a> for Timestamp {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Cause> {
        const SECONDS_FROM_1970_TO_2000: u64 = 946_684_800;
        let since_2000 = i64::from_be_bytes(raw.try_into()?);
        let distance = Duration::from_micros(since_2000.unsigned_abs());
        let year_2000 = SystemTime::UNIX_EPOCH + Duration::from_secs(SECONDS_FROM_1970_TO_2000);
        let time = match since_2000 {
            0.. => year_2000.checked_add(distance),
            _ => year_2000.checked_sub(distance),
        };
        time.map(Self).ok_or_else(|| "the time is out of this platform's range".into())
    }

    postgres::types::accepts!(TIMESTAMPTZ);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_timestamp_that_the_server_can_send_is_read() {
        for micros in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX] {
            let read = Timestamp::from_sql(&Type::TIMESTAMPTZ, &micros.to_be_bytes());
            assert!(read.is_ok() || cfg!(windows), "{micros}");
        }
        let short = Timestamp::from_sql(&Type::TIMESTAMPTZ, &[0; 7]);
        assert!(short.is_err());
    }

    #[test]
    fn a_timestamp_counts_from_2000() -> Outcome<()> {
        let Timestamp(time) = Timestamp::from_sql(&Type::TIMESTAMPTZ, &0_i64.to_be_bytes())?;
        let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH)?;
        assert_eq!(since_1970.as_secs(), 30 * 365 * 86_400 + 7 * 86_400);
        Ok(())
    }
}
