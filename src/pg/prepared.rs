//! Prepared statements, and the poolers that they do not go with.
//!
//! The `postgres` crate names its statements `s0`, `s1` and so on, in every program alike. A pooler
//! that hands out server sessions by the transaction lets several programs meet in one of them, and
//! there `s0` may be another program's. One that keeps its clients' statements apart gives them
//! other names.

use std::collections::HashMap;
use std::error::Error as StdError;

use postgres::error::SqlState;
use postgres::{Client, GenericClient, Row, Statement};

use super::failure::{Cause, Outcome, sql_state};
use super::session::{Parameters, Query, Session};

/// Kept with a connection: its statements, by their text.
#[derive(Default)]
pub(crate) struct Prepared(HashMap<String, Statement>);

impl Prepared {
    fn prepare(
        &mut self,
        client: &mut impl GenericClient,
        query: &Query,
    ) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.0.get(&query.sql) {
            return Ok(statement.clone());
        }
        let statement = client.prepare_typed(&query.sql, query.parameters)?;
        self.0.insert(query.sql.clone(), statement.clone());
        Ok(statement)
    }
}

/// Runs queries on a connection, or in a transaction on it, as statements that it keeps.
pub(crate) struct Keeping<'a, C> {
    pub(crate) client: &'a mut C,
    pub(crate) statements: &'a mut Prepared,
}

impl<C: GenericClient> Session for Keeping<'_, C> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        let statement = self.statements.prepare(self.client, query)?;
        Ok(self.client.query(&statement, parameters)?)
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        let statement = self.statements.prepare(self.client, query)?;
        Ok(self.client.execute(&statement, parameters)?)
    }
}

/// Whether a statement has to be prepared anew, and has not been run.
pub(crate) fn is_stale(cause: &(dyn StdError + 'static)) -> bool {
    // The latter is "cached plan must not change result type": the table has changed since.
    [Some(&SqlState::INVALID_SQL_STATEMENT_NAME), Some(&SqlState::FEATURE_NOT_SUPPORTED)]
        .contains(&sql_state(cause))
}

/// A statement that is gone again at once, or whose name was taken, tells of a pooler.
pub(crate) fn name_the_pooler(cause: Cause) -> Cause {
    match sql_state(cause.as_ref()) {
        Some(&SqlState::INVALID_SQL_STATEMENT_NAME | &SqlState::DUPLICATE_PSTATEMENT) => {
            SharedSession { cause: Some(cause) }.into()
        }
        _ => cause,
    }
}

/// Whether a new connection comes upon statements that it has not prepared.
pub(crate) fn is_shared(client: &mut Client) -> Result<bool, postgres::Error> {
    let sql = "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE name ~ '^s[0-9]+$')";
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
        if !is_shared(&mut another)? {
            return Ok(());
        }
    }
    Err(SharedSession { cause: None }.into())
}

/// Prepared statements cannot be kept here.
#[derive(Debug, thiserror::Error)]
#[error(
    "prepared statements of several clients meet in one server session: a pooler hands out \
     connections by the transaction, and prepared_statements(true) does not go with that"
)]
pub(crate) struct SharedSession {
    #[source]
    pub(crate) cause: Option<Cause>,
}
