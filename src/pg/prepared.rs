//! Prepared statements, and the poolers that they do not go with.
//!
//! The `postgres` crate names its statements `s0`, `s1` and so on, in every program alike. A pooler
//! that hands out server sessions by the transaction lets several programs meet in one of them, and
//! there `s0` may be another program's. One that keeps its clients' statements apart gives them
//! other names.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::mem;

use postgres::error::SqlState;
use postgres::{Client, GenericClient, Row, Statement};

use super::connections::PooledClient;
use super::failure::{Cause, Outcome, sql_state};
use super::session::{Parameters, Query, Session, Unnamed};

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

/// A pooled connection, with prepared statements if the store wants them.
impl Session for PooledClient {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        if !self.prepares {
            return Unnamed(&mut **self).query(query, parameters);
        }
        with_statements(self, |mut keeping| keeping.query(query, parameters))
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        if !self.prepares {
            return Unnamed(&mut **self).execute(query, parameters);
        }
        with_statements(self, |mut keeping| keeping.execute(query, parameters))
    }
}

/// Runs a query with the statements of the connection. One that the server does not know any more,
/// or would not run again, has done nothing: so it is prepared anew and run once more.
fn with_statements<T>(
    connection: &mut PooledClient,
    run_query: impl Fn(Keeping<'_, Client>) -> Outcome<T>,
) -> Outcome<T> {
    let mut statements = mem::take(connection.kept::<Prepared>());
    let mut outcome = run_query(Keeping { client: connection, statements: &mut statements });
    if outcome.as_ref().is_err_and(|cause| is_stale(cause.as_ref())) {
        statements = Prepared::default();
        outcome = run_query(Keeping { client: connection, statements: &mut statements });
    }
    *connection.kept() = statements;
    outcome.map_err(name_the_pooler)
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
