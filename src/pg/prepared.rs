//! Prepared statements, and the poolers that they do not go with.
//!
//! The `postgres` crate names its statements `s0`, `s1` and so on, in every program alike. A pooler
//! that hands out server sessions by the transaction lets several programs meet in one of them, and
//! there `s0` may be another program's. One that keeps its clients' statements apart gives them
//! other names.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::error::SqlState;
use postgres::{Client, Row, Statement};
use r2d2::{CustomizeConnection, ManageConnection, PooledConnection};

use super::failure::Outcome;
use super::session::{Parameters, Query, Session, Unnamed};

/// A pooled connection, with prepared statements if the store wants them.
pub(crate) struct Pooled<'a, M: ManageConnection> {
    pub(crate) connection: &'a mut PooledConnection<M>,
    pub(crate) prepared_statements: bool,
}

impl<M: ManageConnection<Connection = Client>> Session for Pooled<'_, M> {
    fn query(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<Vec<Row>> {
        if self.prepared_statements {
            run(self.connection, query, |client, it| client.query(it, parameters))
        } else {
            Unnamed(&mut **self.connection).query(query, parameters)
        }
    }

    fn execute(&mut self, query: &Query, parameters: Parameters<'_>) -> Outcome<u64> {
        if self.prepared_statements {
            run(self.connection, query, |client, it| client.execute(it, parameters))
        } else {
            Unnamed(&mut **self.connection).execute(query, parameters)
        }
    }
}

/// Kept with a pooled connection: its statements, by their text.
#[derive(Default)]
struct Prepared(HashMap<String, Statement>);

fn prepare<M: ManageConnection<Connection = Client>>(
    connection: &mut PooledConnection<M>,
    query: &Query,
) -> Result<Statement, postgres::Error> {
    let kept = PooledConnection::extensions(connection).get::<Prepared>();
    if let Some(statement) = kept.and_then(|Prepared(kept)| kept.get(&query.sql)) {
        return Ok(statement.clone());
    }
    let statement = connection.prepare_typed(&query.sql, query.parameters)?;
    let extensions = PooledConnection::extensions_mut(connection);
    if extensions.get::<Prepared>().is_none() {
        extensions.insert(Prepared::default());
    }
    if let Some(Prepared(kept)) = extensions.get_mut() {
        kept.insert(query.sql.clone(), statement.clone());
    }
    Ok(statement)
}

/// Runs a query as a prepared statement. One that the server does not know any more, or would not
/// run again, has done nothing: so it is prepared anew and run once more.
///
/// One that is gone again at once, or whose name was taken, tells of a pooler.
fn run<M: ManageConnection<Connection = Client>, T>(
    connection: &mut PooledConnection<M>,
    query: &Query,
    run: impl Fn(&mut Client, &Statement) -> Result<T, postgres::Error>,
) -> Outcome<T> {
    let first = prepare(connection, query).and_then(|statement| run(connection, &statement));
    let outcome = match first {
        Err(error) if is_forgotten(&error) || must_be_replanned(&error) => {
            PooledConnection::extensions_mut(connection).remove::<Prepared>();
            prepare(connection, query).and_then(|statement| run(connection, &statement))
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

/// Looks at each new connection of a store that keeps prepared statements: a session of its own
/// begins without any.
#[derive(Debug, Clone, Default)]
pub(crate) struct SessionCheck {
    found_shared: Arc<AtomicBool>,
}

impl SessionCheck {
    /// Fails once a new connection has been found to be another one's server session.
    pub(crate) fn outcome(&self) -> Result<(), SharedSession> {
        if self.found_shared.load(Ordering::Relaxed) {
            return Err(SharedSession { cause: None });
        }
        Ok(())
    }
}

impl CustomizeConnection<Client, postgres::Error> for SessionCheck {
    fn on_acquire(&self, client: &mut Client) -> Result<(), postgres::Error> {
        if is_shared(client)? {
            self.found_shared.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Whether a new connection comes upon statements that it has not prepared.
fn is_shared(client: &mut Client) -> Result<bool, postgres::Error> {
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
    cause: Option<postgres::Error>,
}
