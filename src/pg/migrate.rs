use std::collections::BTreeSet;

use postgres::error::SqlState;
use postgres::types::Type;
use postgres::{Client, GenericClient, IsolationLevel, Transaction};

use super::errors::{Cause, Outcome};
use super::identifier::Table;

/// Any number will do, as long as every process that migrates takes the same one.
const MIGRATION_LOCK: i64 = 0x6368_6563_6b70_6f69;

/// What became of the table.
pub(crate) enum Migration {
    Ready,
    Incompatible(String),
}

/// Creates the table, unless it is there: then no right to create anything is needed.
///
/// `CREATE ... IF NOT EXISTS` fails with a unique violation if two sessions run it at once, so what is
/// missing is created under an advisory lock, after another look.
pub(crate) fn migrate(
    client: &mut Client,
    table: &Table,
    updated_at_index: bool,
) -> Outcome<Migration> {
    if let Some(found) = inspect(client, table)? {
        match found.verdict()? {
            Migration::Ready if updated_at_index && !found.is_indexed => {}
            migration => return Ok(migration),
        }
    }
    // Whatever the default is here: what is seen under the lock must be newer than the wait for it.
    let read_committed = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted);
    let mut tx = read_committed.start()?;
    tx.execute_typed(
        "SELECT pg_catalog.pg_advisory_xact_lock($1)",
        &[(&MIGRATION_LOCK, Type::INT8)],
    )?;
    let mut found = inspect(&mut tx, table)?;
    if found.is_none() {
        if let Some(namesake) = find_namesake(&mut tx, table)? {
            return Ok(Migration::Incompatible(format!(
                "{namesake} is there, whose name differs in case only: use that one"
            )));
        }
        create(&mut tx, table)?;
        found = inspect(&mut tx, table)?;
    }
    let Some(found) = found else {
        return Ok(Migration::Incompatible("it is gone as soon as it is created".to_owned()));
    };
    let migration = found.verdict()?;
    if let Migration::Incompatible(_) = migration {
        return Ok(migration);
    }
    if updated_at_index && !found.is_indexed {
        let sql = table.render(include_str!("../../sql/create_updated_at_index.sql"));
        tx.batch_execute(&sql).map_err(missing(format!("ownership of the table {table}")))?;
    }
    tx.commit()?;
    Ok(migration)
}

/// Another table whose name the server would have folded from this one, or the other way round.
fn find_namesake(tx: &mut Transaction<'_>, table: &Table) -> Outcome<Option<String>> {
    let [schema, name] = table.names();
    let row = tx.query_typed_opt(
        include_str!("../../sql/find_namesake.sql"),
        &[(&schema, Type::TEXT), (&name, Type::TEXT)],
    )?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Creates the table, and its schema if that is missing too.
fn create(tx: &mut Transaction<'_>, table: &Table) -> Outcome<()> {
    let schema = table.schema();
    let is_there = "SELECT pg_catalog.to_regnamespace($1) IS NOT NULL";
    let row = tx.query_typed_one(is_there, &[(&schema.to_string(), Type::TEXT)])?;
    if !row.try_get::<_, bool>(0)? {
        let sql = table.render_schema(include_str!("../../sql/create_schema.sql"));
        tx.batch_execute(&sql).map_err(missing("CREATE on the database".to_owned()))?;
    }
    let sql = table.render(include_str!("../../sql/create_table.sql"));
    tx.batch_execute(&sql).map_err(missing(format!("CREATE on the schema {schema}")))
}

/// What has the name of the table.
#[derive(Default)]
struct Found {
    /// Why it cannot hold checkpoints.
    misfit: Option<String>,
    missing_rights: BTreeSet<String>,
    is_indexed: bool,
}

fn inspect(client: &mut impl GenericClient, table: &Table) -> Outcome<Option<Found>> {
    let name = table.to_string();
    let columns = client
        .query_typed(include_str!("../../sql/inspect_table.sql"), &[(&name, Type::TEXT)])
        .map_err(missing(format!("USAGE on the schema {}", table.schema())))?;
    if columns.is_empty() {
        return Ok(None);
    }
    let mut found = Found::default();
    for column in columns {
        let misfit = column.try_get("misfit")?;
        found.misfit = found.misfit.or(misfit);
        found.missing_rights.extend(column.try_get::<_, Vec<_>>("missing_rights")?);
        found.is_indexed = column.try_get("is_indexed")?; // of the last one, `updated_at`
    }
    Ok(Some(found))
}

impl Found {
    /// Whether the store can work with it, its index aside. It is an error if the role may not.
    fn verdict(&self) -> Outcome<Migration> {
        if let Some(reason) = &self.misfit {
            return Ok(Migration::Incompatible(reason.clone()));
        }
        if self.missing_rights.is_empty() {
            return Ok(Migration::Ready);
        }
        let missing = self.missing_rights.iter().cloned().collect::<Vec<_>>().join(", ");
        Err(format!("the role that is logged in lacks the right to {missing}: grant it").into())
    }
}

/// Names the right for whose lack the server refuses a statement.
fn missing(right: String) -> impl FnOnce(postgres::Error) -> Cause {
    |source| match source.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => MissingRight { right, source }.into(),
        _ => source.into(),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the role that is logged in lacks {right}: grant it, or have another role migrate")]
struct MissingRight {
    right: String,
    source: postgres::Error,
}
