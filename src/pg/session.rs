//! Where a statement runs: with a cache of prepared statements, or without.

use std::collections::HashMap;
use std::error::Error as StdError;

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{GenericClient, Row, Statement};

use super::errors::{Outcome, sql_state};

/// A statement's text with the table's name in it, and the types of its parameters.
#[derive(Debug)]
pub(crate) struct Query {
    pub(crate) sql: String,
    pub(crate) parameters: &'static [Type],
}

pub(crate) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

pub(crate) trait Session {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>>;

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64>;
}

/// Sends unnamed statements. Nothing is left on the server, so any pooler may stand in between.
pub(crate) struct Uncached<'a, C>(pub(crate) &'a mut C);

impl<C: GenericClient> Session for Uncached<'_, C> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        Ok(self.0.query_typed(&query.sql, &typed(query, parameters))?)
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        Ok(self.0.execute_typed(&query.sql, &typed(query, parameters))?)
    }
}

fn typed<'a>(query: &Query, parameters: Parameters<'a>) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    parameters.iter().copied().zip(query.parameters.iter().cloned()).collect()
}

/// The prepared statements of a connection, by their text; kept with it.
#[derive(Default)]
pub(crate) struct StatementCache(HashMap<String, Statement>);

impl StatementCache {
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

/// Runs statements on a connection, or in a transaction on it, as prepared ones if it has a cache for them.
pub(crate) struct Cached<'a, C> {
    pub(crate) client: &'a mut C,
    pub(crate) cache: Option<&'a mut StatementCache>,
}

impl<C: GenericClient> Session for Cached<'_, C> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        let Some(cache) = &mut self.cache else {
            return Uncached(self.client).query(query, parameters);
        };
        let statement = cache.prepare(self.client, query)?;
        Ok(self.client.query(&statement, parameters)?)
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        let Some(cache) = &mut self.cache else {
            return Uncached(self.client).execute(query, parameters);
        };
        let statement = cache.prepare(self.client, query)?;
        Ok(self.client.execute(&statement, parameters)?)
    }
}

/// Whether a prepared statement has to be prepared again, and was not executed.
pub(crate) fn is_stale(cause: &(dyn StdError + 'static)) -> bool {
    // The latter is "cached plan must not change result type": the table has changed since.
    [Some(&SqlState::INVALID_SQL_STATEMENT_NAME), Some(&SqlState::FEATURE_NOT_SUPPORTED)]
        .contains(&sql_state(cause))
}
