//! Poolers that prepared statements do not go with.
//!
//! The `postgres` crate names its statements `s0`, `s1` and so on, in every program alike. A pooler that
//! assigns a server session to each transaction lets several programs meet in one session, and there `s0`
//! may be another program's. One that keeps its clients' statements apart gives them other names.

use postgres::Client;
use postgres::error::SqlState;

use super::close::close;
use super::errors::{Cause, Outcome, sql_state};

/// A statement that is gone again at once, or whose name was taken, is the sign of a pooler.
pub(crate) fn name_the_pooler(cause: Cause) -> Cause {
    match sql_state(cause.as_ref()) {
        Some(&SqlState::INVALID_SQL_STATEMENT_NAME | &SqlState::DUPLICATE_PSTATEMENT) => {
            SharedSession { cause: Some(cause) }.into()
        }
        _ => cause,
    }
}

/// Whether a new connection finds statements that it has not prepared.
pub(crate) fn is_shared(client: &mut Client) -> Result<bool, postgres::Error> {
    let sql = "SELECT EXISTS (
        SELECT FROM pg_catalog.pg_prepared_statements
        WHERE name OPERATOR(pg_catalog.~) '^s[0-9]+$')";
    client.query_typed_one(sql, &[])?.try_get(0)
}

/// Prepares a statement on one connection, and fails when another one sees it.
pub(crate) fn refuse_shared_sessions(
    first: &mut Client,
    open_another: impl FnOnce() -> Option<Client>,
) -> Outcome<()> {
    if !is_shared(first)? {
        let _lives_on = first.prepare("SELECT")?;
        let Some(mut another) = open_another() else { return Ok(()) };
        let is_shared = is_shared(&mut another);
        close(another);
        if !is_shared? {
            return Ok(());
        }
    }
    Err(SharedSession { cause: None }.into())
}

/// Prepared statements cannot be kept here.
#[derive(Debug, thiserror::Error)]
#[error(
    "prepared statements of several clients meet in one server session: a pooler assigns a session to each \
     transaction, which does not go with prepared_statements(true)"
)]
pub(crate) struct SharedSession {
    #[source]
    pub(crate) cause: Option<Cause>,
}
