//! Where a statement runs: with a cache of prepared statements, or without.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::hash::{BuildHasher, RandomState};

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

/// A statement whose parameters can stand in its text: `$1`, a name; `$2`, an offset; `$3`, a time.
#[derive(Debug)]
pub(crate) struct Template {
    /// With the parameters, for the server to bind.
    sql: String,
    /// What stands before the first parameter, and each parameter's number with what follows it.
    pieces: Vec<String>,
    /// How many of the parameters it has.
    count: usize,
}

impl Template {
    /// `render` completes the text between the parameters, and may bring in what looks like one.
    pub(crate) fn new(sql: &str, render: impl FnMut(&str) -> String) -> Self {
        let count = ["$1", "$2", "$3"].iter().filter(|parameter| sql.contains(**parameter)).count();
        let pieces: Vec<_> = sql.split('$').map(render).collect();
        Self { sql: pieces.join("$"), pieces, count }
    }

    /// The statement with these expressions as its parameters.
    pub(crate) fn with(&self, [name, offset, time]: &[String; 3]) -> String {
        let mut pieces = self.pieces.iter();
        let mut sql = pieces.next().cloned().unwrap_or_default();
        for piece in pieces {
            let (number, text) = piece.split_at(1);
            let parameter = match number {
                "1" => name,
                "2" => offset,
                _ => time,
            };
            sql.extend([parameter, text]);
        }
        sql
    }
}

pub(crate) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

pub(crate) trait Session {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>>;
}

fn typed<'a>(query: &Query, parameters: Parameters<'a>) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    parameters.iter().copied().zip(query.parameters.iter().cloned()).collect()
}

/// The prepared statements of a connection, by their text; kept with it.
#[derive(Default)]
pub(crate) struct StatementCache {
    statements: HashMap<String, Statement>,
    /// The names of those that are run by `EXECUTE`.
    names: HashMap<String, String>,
    /// Whether the server has lost one of the latter before it was to run: a pooler that assigns a server
    /// session to each transaction, and carries prepared statements of the protocol over, does not know them.
    keeps_no_names: bool,
}

impl StatementCache {
    /// Prepares a statement for `EXECUTE`.
    pub(crate) fn prepare_named(
        &mut self,
        client: &mut impl GenericClient,
        template: &Template,
    ) -> Result<(), postgres::Error> {
        let sql = &template.sql;
        if self.keeps_no_names || self.names.contains_key(sql) {
            return Ok(());
        }
        // At random, because clients that meet in a session must not meet in a name.
        let name = format!("checkpoint_store_{:016x}", RandomState::new().hash_one(sql));
        let types = ["pg_catalog.text", "pg_catalog.int8", "pg_catalog.timestamptz"];
        let types = types[..template.count].join(", ");
        client.batch_execute(&format!("PREPARE {name} ({types}) AS {sql}"))?;
        self.names.insert(sql.clone(), name);
        Ok(())
    }

    /// The text that runs the statement with these expressions as its parameters.
    pub(crate) fn text(
        cache: Option<&Self>,
        template: &Template,
        parameters: &[String; 3],
    ) -> String {
        match cache.and_then(|cache| cache.names.get(&template.sql)) {
            Some(name) => {
                format!("EXECUTE {name} ({});", parameters[..template.count].join(", "))
            }
            None => template.with(parameters),
        }
    }

    /// Forgets the statements, because the server has. `was_named` if it was to `EXECUTE` one of them.
    pub(crate) fn clear(&mut self, was_named: bool) {
        let keeps_no_names = self.keeps_no_names || was_named;
        *self = Self { keeps_no_names, ..Self::default() };
    }

    fn prepare(
        &mut self,
        client: &mut impl GenericClient,
        query: &Query,
    ) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.statements.get(&query.sql) {
            return Ok(statement.clone());
        }
        let statement = client.prepare_typed(&query.sql, query.parameters)?;
        self.statements.insert(query.sql.clone(), statement.clone());
        Ok(statement)
    }
}

/// Runs statements on a connection, or in a transaction on it: as prepared ones if it has a cache for them,
/// and otherwise as unnamed ones. These leave nothing on the server, so any pooler may stand in between.
pub(crate) struct DirectSession<'a, C> {
    pub(crate) client: &'a mut C,
    pub(crate) cache: Option<&'a mut StatementCache>,
}

impl<'a, C> DirectSession<'a, C> {
    pub(crate) fn unnamed(client: &'a mut C) -> Self {
        Self { client, cache: None }
    }
}

impl<C: GenericClient> Session for DirectSession<'_, C> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        let Self { client, cache } = self;
        let statement = match cache {
            Some(cache) => cache.prepare(*client, query)?,
            None => return Ok(client.query_typed(&query.sql, &typed(query, parameters))?),
        };
        Ok(client.query(&statement, parameters)?)
    }
}

/// Whether a prepared statement has to be prepared again, and was not executed.
pub(crate) fn is_stale(cause: &(dyn StdError + 'static)) -> bool {
    // The latter is "cached plan must not change result type": the table has changed since.
    [Some(&SqlState::INVALID_SQL_STATEMENT_NAME), Some(&SqlState::FEATURE_NOT_SUPPORTED)]
        .contains(&sql_state(cause))
}
