use std::collections::HashMap;
use std::error::Error as StdError;

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{Client, GenericClient, Row};
use r2d2::{ManageConnection, PooledConnection};

use super::pool::SharedSession;

/// A statement's text with the table's name in it, and the types of its parameters.
#[derive(Debug)]
pub(crate) struct Statement {
    pub(crate) sql: String,
    pub(crate) parameters: &'static [Type],
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A `postgres::Error`, or what one means.
type Outcome<T> = Result<T, Box<dyn StdError + Send + Sync>>;

/// Where a statement runs.
pub(crate) trait Session {
    fn query(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<Vec<Row>>;

    fn execute(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<u64>;
}

/// Sends unnamed statements: nothing is left on the server, so any pooler may stand in between.
pub(crate) struct Unnamed<'a, C>(pub(crate) &'a mut C);

impl<C: GenericClient> Session for Unnamed<'_, C> {
    fn query(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        Ok(self.0.query_typed(&statement.sql, &typed(statement, parameters))?)
    }

    fn execute(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<u64> {
        Ok(self.0.execute_typed(&statement.sql, &typed(statement, parameters))?)
    }
}

fn typed<'a>(
    statement: &Statement,
    parameters: Parameters<'a>,
) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    parameters.iter().copied().zip(statement.parameters.iter().cloned()).collect()
}

/// A pooled connection, with prepared statements if the store wants them.
pub(crate) struct Pooled<'a, M: ManageConnection> {
    pub(crate) connection: &'a mut PooledConnection<M>,
    pub(crate) prepared: bool,
}

/// Kept with a pooled connection: its prepared statements, by their text.
#[derive(Default)]
struct Prepared(HashMap<String, postgres::Statement>);

impl<M: ManageConnection<Connection = Client>> Pooled<'_, M> {
    fn prepare(&mut self, statement: &Statement) -> Result<postgres::Statement, postgres::Error> {
        let kept = PooledConnection::extensions(self.connection).get::<Prepared>();
        if let Some(prepared) = kept.and_then(|Prepared(kept)| kept.get(&statement.sql)) {
            return Ok(prepared.clone());
        }
        let prepared = self.connection.prepare_typed(&statement.sql, statement.parameters)?;
        let extensions = PooledConnection::extensions_mut(self.connection);
        if extensions.get::<Prepared>().is_none() {
            extensions.insert(Prepared::default());
        }
        if let Some(Prepared(kept)) = extensions.get_mut() {
            kept.insert(statement.sql.clone(), prepared.clone());
        }
        Ok(prepared)
    }

    /// Runs a prepared statement. One that the server does not know any more, or would not run
    /// again, has done nothing: so it is prepared anew and run once more.
    ///
    /// One that is gone again at once, or whose name was taken, tells of a pooler.
    fn run<T>(
        &mut self,
        statement: &Statement,
        run: impl Fn(&mut Client, &postgres::Statement) -> Result<T, postgres::Error>,
    ) -> Outcome<T> {
        let first = self.prepare(statement);
        let outcome = match first.and_then(|prepared| run(self.connection, &prepared)) {
            Err(error) if is_forgotten(&error) || must_be_replanned(&error) => {
                PooledConnection::extensions_mut(self.connection).remove::<Prepared>();
                let anew = self.prepare(statement);
                anew.and_then(|prepared| run(self.connection, &prepared))
            }
            outcome => outcome,
        };
        outcome.map_err(|error| match error.code() {
            Some(&SqlState::DUPLICATE_PSTATEMENT) => SharedSession { cause: Some(error) }.into(),
            _ if is_forgotten(&error) => SharedSession { cause: Some(error) }.into(),
            _ => error.into(),
        })
    }
}

fn is_forgotten(error: &postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
}

/// "cached plan must not change result type"
fn must_be_replanned(error: &postgres::Error) -> bool {
    error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED)
}

impl<M: ManageConnection<Connection = Client>> Session for Pooled<'_, M> {
    fn query(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        if self.prepared {
            self.run(statement, |client, prepared| client.query(prepared, parameters))
        } else {
            Unnamed(&mut **self.connection).query(statement, parameters)
        }
    }

    fn execute(&mut self, statement: &Statement, parameters: Parameters<'_>) -> Outcome<u64> {
        if self.prepared {
            self.run(statement, |client, prepared| client.execute(prepared, parameters))
        } else {
            Unnamed(&mut **self.connection).execute(statement, parameters)
        }
    }
}
