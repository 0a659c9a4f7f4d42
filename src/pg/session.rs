use std::collections::HashMap;

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{Client, GenericClient, Row};
use r2d2::{ManageConnection, PooledConnection};

/// A statement's text with the table's name in it, and the types of its parameters.
#[derive(Debug)]
pub(crate) struct Statement {
    pub(crate) sql: String,
    pub(crate) parameters: &'static [Type],
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// Where a statement runs.
pub(crate) trait Session {
    fn query(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, postgres::Error>;

    fn execute(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<u64, postgres::Error>;
}

/// Sends unnamed statements: nothing is left on the server, so any pooler may stand in between.
pub(crate) struct Unnamed<'a, C>(pub(crate) &'a mut C);

impl<C: GenericClient> Session for Unnamed<'_, C> {
    fn query(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, postgres::Error> {
        self.0.query_typed(&statement.sql, &typed(statement, parameters))
    }

    fn execute(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<u64, postgres::Error> {
        self.0.execute_typed(&statement.sql, &typed(statement, parameters))
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
    fn run<T>(
        &mut self,
        statement: &Statement,
        run: impl Fn(&mut Client, &postgres::Statement) -> Result<T, postgres::Error>,
    ) -> Result<T, postgres::Error> {
        let first = self.prepare(statement);
        match first.and_then(|prepared| run(self.connection, &prepared)) {
            Err(error) if is_stale(&error) => {
                PooledConnection::extensions_mut(self.connection).remove::<Prepared>();
                let prepared = self.prepare(statement)?;
                run(self.connection, &prepared)
            }
            outcome => outcome,
        }
    }
}

fn is_stale(error: &postgres::Error) -> bool {
    error.code().is_some_and(|code| {
        [
            SqlState::INVALID_SQL_STATEMENT_NAME,
            SqlState::DUPLICATE_PSTATEMENT,
            // "cached plan must not change result type"
            SqlState::FEATURE_NOT_SUPPORTED,
        ]
        .contains(code)
    })
}

impl<M: ManageConnection<Connection = Client>> Session for Pooled<'_, M> {
    fn query(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, postgres::Error> {
        if self.prepared {
            self.run(statement, |client, prepared| client.query(prepared, parameters))
        } else {
            Unnamed(&mut **self.connection).query(statement, parameters)
        }
    }

    fn execute(
        &mut self,
        statement: &Statement,
        parameters: Parameters<'_>,
    ) -> Result<u64, postgres::Error> {
        if self.prepared {
            self.run(statement, |client, prepared| client.execute(prepared, parameters))
        } else {
            Unnamed(&mut **self.connection).execute(statement, parameters)
        }
    }
}
