//! Prepared statements, and the poolers that they do not go with.
//!
//! The `postgres` crate names its statements `s0`, `s1` and so on, in every program alike. A pooler
//! that hands out server sessions by the transaction lets several programs meet in one of them, and
//! there `s0` may be another program's. One that keeps its clients' statements apart gives them
//! other names.

use std::collections::HashMap;

use postgres::error::SqlState;
use postgres::{Client, Row, Statement};

use super::connections::PooledClient;
use super::failure::Outcome;
use super::session::{Parameters, Query, Session, Unnamed};

/// A pooled connection, with prepared statements if the store wants them.
impl Session for PooledClient {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        if self.prepares {
            execute_prepared(self, query, |client, it| client.query(it, parameters))
        } else {
            Unnamed(&mut **self).query(query, parameters)
        }
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        if self.prepares {
            execute_prepared(self, query, |client, it| client.execute(it, parameters))
        } else {
            Unnamed(&mut **self).execute(query, parameters)
        }
    }
}

/// Kept with a connection: its statements, by their text.
#[derive(Default)]
struct Prepared(HashMap<String, Statement>);

fn prepare(connection: &mut PooledClient, query: &Query) -> Result<Statement, postgres::Error> {
    let Prepared(kept) = connection.kept();
    if let Some(statement) = kept.get(&query.sql) {
        return Ok(statement.clone());
    }
    let statement = connection.prepare_typed(&query.sql, query.parameters)?;
    let Prepared(kept) = connection.kept();
    kept.insert(query.sql.clone(), statement.clone());
    Ok(statement)
}

/// Runs a query as a prepared statement. One that the server does not know any more, or would not
/// run again, has done nothing: so it is prepared anew and run once more.
///
/// One that is gone again at once, or whose name was taken, tells of a pooler.
fn execute_prepared<T>(
    connection: &mut PooledClient,
    query: &Query,
    execute: impl Fn(&mut Client, &Statement) -> Result<T, postgres::Error>,
) -> Outcome<T> {
    let first = prepare(connection, query).and_then(|statement| execute(connection, &statement));
    let outcome = match first {
        Err(error) if is_forgotten(&error) || must_be_replanned(&error) => {
            connection.forget::<Prepared>();
            prepare(connection, query).and_then(|statement| execute(connection, &statement))
        }
        outcome => outcome,
    };
    outcome.map_err(|error| match error.code() {
        Some(&SqlState::DUPLICATE_PSTATEMENT) => SharedSession { cause: Some(error) }.into(),
        _ if is_forgotten(&error) => SharedSession { cause: Some(error) }.into(),
        _ => error.into(),
    })
}

fn is_forgotten(error: &postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
}

/// "cached plan must not change result type": the table has changed since, and nothing was run.
fn must_be_replanned(error: &postgres::Error) -> bool {
    error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED)
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
    pub(crate) cause: Option<postgres::Error>,
}
