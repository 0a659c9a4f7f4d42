use postgres::types::{ToSql, Type};
use postgres::{GenericClient, Row};

use super::failure::Outcome;

/// A statement's text with the table's name in it, and the types of its parameters.
#[derive(Debug)]
pub(crate) struct Query {
    pub(crate) sql: String,
    pub(crate) parameters: &'static [Type],
}

pub(crate) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// Where a query runs.
pub(crate) trait Session {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>>;

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64>;
}

/// Sends unnamed statements: nothing is left on the server, so any pooler may stand in between.
pub(crate) struct Unnamed<'a, C>(pub(crate) &'a mut C);

impl<C: GenericClient> Session for Unnamed<'_, C> {
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
