use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::time::{Duration, SystemTime};

use postgres::Row;
use postgres::types::{FromSql, Type};

use super::identifier::Table;
use super::session::{Session, Statement};
use crate::{Checkpoint, Error};

/// A `postgres::Error` in most cases; a plain message where the server did not do as it was told.
type Outcome<T> = Result<T, Box<dyn StdError + Send + Sync>>;

/// One function an operation, for the pool and for the caller's transaction alike.
#[derive(Debug)]
pub(crate) struct Queries {
    pub(crate) table: Table,
    find: Statement,
    all: Statement,
    save: Statement,
    save_many: Statement,
    advance: Statement,
    delete: Statement,
    lock: Statement,
    try_lock: Statement,
}

impl Queries {
    pub(crate) fn new(table: Table) -> Self {
        let statement = |sql, parameters| Statement { sql: table.render(sql), parameters };
        Self {
            find: statement(include_str!("../../sql/find.sql"), &[Type::TEXT]),
            all: statement(include_str!("../../sql/all.sql"), &[]),
            save: statement(include_str!("../../sql/save.sql"), &[Type::TEXT, Type::INT8]),
            save_many: statement(
                include_str!("../../sql/save_many.sql"),
                &[Type::TEXT_ARRAY, Type::INT8_ARRAY],
            ),
            advance: statement(
                include_str!("../../sql/advance.sql"),
                &[Type::TEXT, Type::INT8, Type::INT8],
            ),
            delete: statement(include_str!("../../sql/delete.sql"), &[Type::TEXT]),
            lock: statement(include_str!("../../sql/lock.sql"), &[Type::TEXT]),
            try_lock: statement(include_str!("../../sql/try_lock.sql"), &[Type::TEXT]),
            table,
        }
    }

    /// What an operation on one projection was about, for its error.
    pub(crate) fn about(&self, projection: &str) -> impl fmt::Display {
        fmt::from_fn(move |f| write!(f, "projection {projection:?} in table {}", self.table))
    }

    /// The same for an operation on several.
    pub(crate) fn about_many(&self, checkpoints: &[(&str, i64)]) -> impl fmt::Display {
        let count = checkpoints.len();
        fmt::from_fn(move |f| write!(f, "{count} checkpoints in table {}", self.table))
    }

    pub(crate) fn find(
        &self,
        session: &mut impl Session,
        projection: &str,
    ) -> Outcome<Option<Checkpoint>> {
        session.query(&self.find, &[&projection])?.first().map(checkpoint).transpose()
    }

    pub(crate) fn all(&self, session: &mut impl Session) -> Outcome<Vec<Checkpoint>> {
        session.query(&self.all, &[])?.iter().map(checkpoint).collect()
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
        if checkpoints.is_empty() {
            return Ok(());
        }
        let last: BTreeMap<&str, i64> = checkpoints.iter().copied().collect();
        let (names, offsets): (Vec<&str>, Vec<i64>) = last.into_iter().unzip();
        written(session.execute(&self.save_many, &[&names, &offsets])?, names.len())
    }

    /// The offset that was found instead of `from`, or `None` when the checkpoint has moved.
    pub(crate) fn advance(
        &self,
        session: &mut impl Session,
        projection: &str,
        from: i64,
        to: i64,
    ) -> Outcome<Option<i64>> {
        // Nothing found and nothing moved, though `from` is 0: another transaction has created the
        // row since this statement began. The next statement sees it.
        const ATTEMPTS: usize = 8;
        for _ in 0..ATTEMPTS {
            let rows = session.query(&self.advance, &[&projection, &from, &to])?;
            let row = rows.first().ok_or("the server returned no row")?;
            if row.try_get("moved")? {
                return Ok(None);
            }
            match row.try_get("found")? {
                Some(found) => return Ok(Some(found)),
                None if from != 0 => return Ok(Some(0)),
                None => {}
            }
        }
        Err(NOTHING_WRITTEN.into())
    }

    pub(crate) fn moved_or_conflict(
        projection: &str,
        expected: i64,
        found: Option<i64>,
    ) -> crate::Result<()> {
        match found {
            None => Ok(()),
            Some(found) => {
                Err(Error::Conflict { projection: projection.to_owned(), expected, found })
            }
        }
    }

    pub(crate) fn delete(&self, session: &mut impl Session, projection: &str) -> Outcome<bool> {
        Ok(session.execute(&self.delete, &[&projection])? > 0)
    }

    pub(crate) fn lock(&self, session: &mut impl Session, projection: &str) -> Outcome<i64> {
        let rows = session.query(&self.lock, &[&projection])?;
        Ok(rows.first().ok_or(NOTHING_WRITTEN)?.try_get(0)?)
    }

    pub(crate) fn try_lock(
        &self,
        session: &mut impl Session,
        projection: &str,
    ) -> Outcome<Attempt> {
        let rows = session.query(&self.try_lock, &[&projection])?;
        let row = rows.first().ok_or("the server returned no row")?;
        Ok(match row.try_get("held")? {
            Some(offset) => Attempt::Held(offset),
            None if row.try_get("present")? => Attempt::Taken,
            None => Attempt::Absent,
        })
    }
}

/// What one look at a projection's row, without waiting, came to.
pub(crate) enum Attempt {
    Held(i64),
    Taken,
    Absent,
}

const NOTHING_WRITTEN: &str =
    "the server wrote no row; a trigger, rule or policy may have discarded it";

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
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Send + Sync>> {
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

    fn rendered(queries: &Queries) -> [(&Statement, &'static str); 8] {
        [
            (&queries.find, include_str!("../../sql/find.sql")),
            (&queries.all, include_str!("../../sql/all.sql")),
            (&queries.save, include_str!("../../sql/save.sql")),
            (&queries.save_many, include_str!("../../sql/save_many.sql")),
            (&queries.advance, include_str!("../../sql/advance.sql")),
            (&queries.delete, include_str!("../../sql/delete.sql")),
            (&queries.lock, include_str!("../../sql/lock.sql")),
            (&queries.try_lock, include_str!("../../sql/try_lock.sql")),
        ]
    }

    #[test]
    fn a_rendered_statement_differs_from_its_file_in_nothing_but_the_tables_name()
    -> crate::Result<()> {
        let queries = Queries::new(Table::new("app \"one\"", "Check;points")?);
        for (statement, file) in rendered(&queries) {
            assert_ne!(statement.sql, file);
            let back = statement
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
