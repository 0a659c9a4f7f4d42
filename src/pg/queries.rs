use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use postgres::Row;
use postgres::types::{FromSql, Type};

use super::failure::{Cause, Outcome};
use super::group::{Stored, Write};
use super::identifier::Table;
use super::session::{Query, Session};
use crate::{Checkpoint, Error};

/// One function per operation, for the pool and for the caller's transaction alike.
#[derive(Debug)]
pub(crate) struct Queries {
    pub(crate) table: Table,
    find: Query,
    all: Query,
    save: Query,
    save_many: Query,
    advance: Query,
    advance_or_find: Query,
    delete: Query,
    lock: Query,
    lock_new: Query,
    try_lock: Query,
    write_together: Query,
    may_hide: Query,
}

impl Queries {
    pub(crate) fn new(table: Table) -> Self {
        let query = |sql, parameters| Query { sql: table.render(sql), parameters };
        Self {
            find: query(include_str!("../../sql/find.sql"), &[Type::TEXT]),
            all: query(include_str!("../../sql/all.sql"), &[]),
            save: query(include_str!("../../sql/save.sql"), &[Type::TEXT, Type::INT8]),
            save_many: query(
                include_str!("../../sql/save_many.sql"),
                &[Type::TEXT_ARRAY, Type::INT8_ARRAY],
            ),
            advance: query(
                include_str!("../../sql/advance.sql"),
                &[Type::TEXT, Type::INT8, Type::INT8],
            ),
            advance_or_find: query(
                include_str!("../../sql/advance_or_find.sql"),
                &[Type::TEXT, Type::INT8, Type::INT8],
            ),
            delete: query(include_str!("../../sql/delete.sql"), &[Type::TEXT]),
            lock: query(include_str!("../../sql/lock.sql"), &[Type::TEXT]),
            lock_new: query(include_str!("../../sql/lock_new.sql"), &[Type::TEXT]),
            try_lock: query(include_str!("../../sql/try_lock.sql"), &[Type::TEXT]),
            write_together: query(
                include_str!("../../sql/write_together.sql"),
                &[Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY],
            ),
            may_hide: query(include_str!("../../sql/may_hide.sql"), &[Type::TEXT]),
            table,
        }
    }

    /// What an operation on one projection was about, for its error.
    pub(crate) fn about<'a>(&'a self, projection: &'a str) -> Subject<'a> {
        Subject::Projection(projection, &self.table)
    }

    /// The same for an operation on several.
    pub(crate) fn about_many(&self, checkpoints: &[(&str, i64)]) -> Subject<'_> {
        self.about_so_many(checkpoints.len())
    }

    pub(crate) fn about_so_many(&self, count: usize) -> Subject<'_> {
        Subject::Projections(count, &self.table)
    }

    pub(crate) fn find(
        &self,
        session: &mut impl Session,
        projection: &str,
    ) -> Outcome<Option<Checkpoint>> {
        match session.query(&self.find, &[&projection])?.first() {
            Some(row) => checkpoint(row).map(Some),
            None => self.require_that_nothing_is_hidden(session).map(|()| None),
        }
    }

    /// Ordered by the bytes of the names, which is not for the server to do: in another encoding it
    /// has other bytes.
    pub(crate) fn all(&self, session: &mut impl Session) -> Outcome<Vec<Checkpoint>> {
        let rows = session.query(&self.all, &[])?;
        match rows.first() {
            Some(row) if row.try_get("may_hide")? => return Err(MAY_HIDE.into()),
            Some(_) => {}
            None => self.require_that_nothing_is_hidden(session)?,
        }
        let mut checkpoints: Vec<_> = rows.iter().map(checkpoint).collect::<Outcome<_>>()?;
        checkpoints.sort_unstable_by(|one, other| one.projection.cmp(&other.projection));
        Ok(checkpoints)
    }

    /// What row-level security hides must not look like what is not there.
    fn require_that_nothing_is_hidden(&self, session: &mut impl Session) -> Outcome<()> {
        let rows = session.query(&self.may_hide, &[&self.table.to_string()])?;
        match rows.first().map(|row| row.try_get(0)).transpose()? {
            Some(false) => Ok(()),
            _ => Err(MAY_HIDE.into()),
        }
    }

    pub(crate) fn save(
        &self,
        session: &mut impl Session,
        projection: &str,
        offset: i64,
    ) -> Outcome<()> {
        written(session.execute(&self.save, &[&projection, &offset])?, 1)
    }

    pub(crate) fn save_many(
        &self,
        session: &mut impl Session,
        checkpoints: &[(&str, i64)],
    ) -> Outcome<()> {
        let last: BTreeMap<&str, i64> = checkpoints.iter().copied().collect();
        let (names, offsets): (Vec<&str>, Vec<i64>) = last.into_iter().unzip();
        written(session.execute(&self.save_many, &[&names, &offsets])?, names.len())
    }

    pub(crate) fn advance(
        &self,
        session: &mut impl Session,
        projection: &str,
        from: i64,
        to: i64,
    ) -> Outcome<Advance> {
        // Nothing found and nothing moved, though `from` is 0: another transaction has created the
        // row since the statement began. The next one sees it.
        const ATTEMPTS: usize = 8;
        // The cheap statement first: it is all there is to do, unless the row is absent or elsewhere.
        if session.execute(&self.advance, &[&projection, &from, &to])? > 0 {
            return Ok(Advance::Moved);
        }
        for attempt in 0..ATTEMPTS {
            let rows = session.query(&self.advance_or_find, &[&projection, &from, &to])?;
            let row = rows.first().ok_or("the server returned no row")?;
            if row.try_get("moved")? {
                return Ok(Advance::Moved);
            }
            match row.try_get("found")? {
                // It was where it was to be, and was not moved.
                Some(found) if found == from => break,
                Some(found) => return Ok(Advance::Found(found)),
                // Asked again, for it may have been deleted and created under this statement.
                None if from != 0 && attempt > 0 => {
                    self.require_that_nothing_is_hidden(session)?;
                    return Ok(Advance::Found(0));
                }
                None => {}
            }
        }
        Err(NOTHING_WRITTEN.into())
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
        let rows = session.query(&self.write_together, &[&names, &from, &to])?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    pub(crate) fn delete(&self, session: &mut impl Session, projection: &str) -> Outcome<bool> {
        if session.execute(&self.delete, &[&projection])? > 0 {
            return Ok(true);
        }
        self.require_that_nothing_is_hidden(session)?;
        Ok(false)
    }

    pub(crate) fn lock(&self, session: &mut impl Session, projection: &str) -> Outcome<i64> {
        match session.query(&self.lock, &[&projection])?.first() {
            Some(row) => Ok(row.try_get(0)?),
            None => self.lock_new(session, projection),
        }
    }

    /// Creates the row at 0, or waits for whoever is creating it, and takes it.
    pub(crate) fn lock_new(&self, session: &mut impl Session, projection: &str) -> Outcome<i64> {
        let rows = session.query(&self.lock_new, &[&projection])?;
        Ok(rows.first().ok_or(NOTHING_WRITTEN)?.try_get(0)?)
    }

    /// Takes the row if it is there and free.
    pub(crate) fn lock_if_free(
        &self,
        session: &mut impl Session,
        projection: &str,
    ) -> Outcome<Option<i64>> {
        let rows = session.query(&self.try_lock, &[&projection])?;
        Ok(rows.first().map(|row| row.try_get(0)).transpose()?)
    }
}

/// What an operation is about, written down only when it fails.
#[derive(Clone, Copy)]
pub(crate) enum Subject<'a> {
    Projection(&'a str, &'a Table),
    Projections(usize, &'a Table),
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Projection(name, table) => write!(f, "projection {name:?} in table {table}"),
            Self::Projections(count, table) => write!(f, "{count} checkpoints in table {table}"),
        }
    }
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

const NOTHING_WRITTEN: &str =
    "the server wrote no row; a trigger, rule or policy may have discarded it";

const MAY_HIDE: &str = "row-level security may hide checkpoints from the role that is logged in: \
                        use the table's owner, or a role with BYPASSRLS";

/// A write that the server swallowed must not look like one that it kept.
fn written(rows: u64, expected: usize) -> Outcome<()> {
    if rows == expected as u64 { Ok(()) } else { Err(NOTHING_WRITTEN.into()) }
}

fn checkpoint(row: &Row) -> Outcome<Checkpoint> {
    let Timestamp(updated_at) = row.try_get(2)?;
    Ok(Checkpoint { projection: row.try_get(0)?, offset: row.try_get(1)?, updated_at })
}

/// A `timestamptz` that may hold anything, infinity included, and never panics.
struct Timestamp(SystemTime);

impl<'a> FromSql<'a> for Timestamp {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Cause> {
        const SECONDS_FROM_1970_TO_2000: u64 = 946_684_800;
        let since_2000 = i64::from_be_bytes(raw.try_into()?);
        let distance = Duration::from_micros(since_2000.unsigned_abs());
        SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(SECONDS_FROM_1970_TO_2000))
            .and_then(|year_2000| match since_2000 {
                0.. => year_2000.checked_add(distance),
                _ => year_2000.checked_sub(distance),
            })
            .map(Self)
            .ok_or_else(|| "the time is out of this platform's range".into())
    }

    postgres::types::accepts!(TIMESTAMPTZ);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(queries: &Queries) -> [(&Query, &'static str); 12] {
        [
            (&queries.find, include_str!("../../sql/find.sql")),
            (&queries.all, include_str!("../../sql/all.sql")),
            (&queries.save, include_str!("../../sql/save.sql")),
            (&queries.save_many, include_str!("../../sql/save_many.sql")),
            (&queries.advance, include_str!("../../sql/advance.sql")),
            (&queries.advance_or_find, include_str!("../../sql/advance_or_find.sql")),
            (&queries.delete, include_str!("../../sql/delete.sql")),
            (&queries.lock, include_str!("../../sql/lock.sql")),
            (&queries.lock_new, include_str!("../../sql/lock_new.sql")),
            (&queries.try_lock, include_str!("../../sql/try_lock.sql")),
            (&queries.may_hide, include_str!("../../sql/may_hide.sql")),
            (&queries.write_together, include_str!("../../sql/write_together.sql")),
        ]
    }

    #[test]
    fn a_rendered_statement_differs_from_its_file_in_nothing_but_the_tables_name()
    -> crate::Result<()> {
        let queries = Queries::new(Table::new("app \"one\"", "Check;points")?);
        for (query, file) in rendered(&queries) {
            let back = query
                .sql
                .replace("\"app \"\"one\"\"\".\"Check;points\"", "public.projection_checkpoints");
            assert_eq!(back, file);
        }
        Ok(())
    }

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
