use std::collections::BTreeSet;

use postgres::error::SqlState;
use postgres::types::Type;
use postgres::{Client, GenericClient, IsolationLevel};

use super::errors::{Cause, Outcome};
use super::identifier::Table;

/// Any number will do, as long as every process that migrates takes the same one.
const MIGRATION_LOCK: i64 = 0x6368_6563_6b70_6f69;

/// What became of the table.
pub(crate) enum Migration {
    Ready,
    Incompatible(String),
}

/// Brings the table into being, unless it is there: then it needs no right to create anything.
///
/// `CREATE ... IF NOT EXISTS` fails with a unique violation when two run it at once, so whoever
/// has something to create does it under an advisory lock, and looks again once it has it.
pub(crate) fn migrate(
    client: &mut Client,
    table: &Table,
    updated_at_index: bool,
) -> Outcome<Migration> {
    if let Some(columns) = inspect(client, table)? {
        if let Some(reason) = misfit(&columns) {
            return Ok(Migration::Incompatible(reason));
        }
        require_rights(&columns)?;
        if !updated_at_index || is_indexed(&columns) {
            return Ok(Migration::Ready);
        }
    }
    // Whatever the default is here: what is seen under the lock must be newer than the wait for it.
    let read_committed = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted);
    let mut tx = read_committed.start()?;
    tx.execute_typed(
        "SELECT pg_catalog.pg_advisory_xact_lock($1)",
        &[(&MIGRATION_LOCK, Type::INT8)],
    )?;
    if inspect(&mut tx, table)?.is_none() {
        if let Some(namesake) = find_namesake(&mut tx, table)? {
            return Ok(Migration::Incompatible(format!(
                "{namesake} is there, whose name differs in case only: use that one"
            )));
        }
        let schema: Option<String> = tx
            .query_typed_one(
                "SELECT pg_catalog.to_regnamespace($1)::pg_catalog.text",
                &[(&table.schema().to_string(), Type::TEXT)],
            )?
            .try_get(0)?;
        if schema.is_none() {
            let sql = table.render_schema(include_str!("../../sql/create_schema.sql"));
            tx.batch_execute(&sql).map_err(missing("CREATE on the database".to_owned()))?;
        }
        let sql = table.render(include_str!("../../sql/create_table.sql"));
        tx.batch_execute(&sql)
            .map_err(missing(format!("CREATE on the schema {}", table.schema())))?;
    }
    let columns = inspect(&mut tx, table)?.unwrap_or_default();
    if let Some(reason) = misfit(&columns) {
        return Ok(Migration::Incompatible(reason));
    }
    require_rights(&columns)?;
    if updated_at_index && !is_indexed(&columns) {
        let sql = table.render(include_str!("../../sql/create_updated_at_index.sql"));
        tx.batch_execute(&sql).map_err(missing(format!("ownership of the table {table}")))?;
    }
    tx.commit()?;
    Ok(Migration::Ready)
}

/// Another table whose name the server would have folded from this one, or the other way round.
fn find_namesake(client: &mut impl GenericClient, table: &Table) -> Outcome<Option<String>> {
    let [schema, name] = table.names();
    let rows = client.query_typed(
        include_str!("../../sql/find_namesake.sql"),
        &[(&schema, Type::TEXT), (&name, Type::TEXT)],
    )?;
    Ok(rows.first().map(|row| row.try_get(0)).transpose()?)
}

#[expect(clippy::struct_excessive_bools, reason = "each is a fact about the column")]
struct Column {
    kind: String,
    persistence: String,
    may_hide: bool,
    has_heirs: bool,
    name: String,
    has_expected_type: Option<bool>,
    type_name: String,
    /// What is written is not null. What was there before may be, where the constraint is not validated.
    not_null: bool,
    never_null: bool,
    missing_rights: Vec<String>,
    is_generated: bool,
    is_compared_by_bytes: bool,
    filled_by_default: bool,
    is_primary_key: bool,
    is_indexed: bool,
}

/// The table's columns, or `None` when there is no such table.
fn inspect(client: &mut impl GenericClient, table: &Table) -> Outcome<Option<Vec<Column>>> {
    let rows = client
        .query_typed(
            include_str!("../../sql/inspect_table.sql"),
            &[(&table.to_string(), Type::TEXT)],
        )
        .map_err(missing(format!("USAGE on the schema {}", table.schema())))?;
    let columns = rows
        .iter()
        .map(|row| {
            Ok(Column {
                kind: row.try_get("kind")?,
                persistence: row.try_get("persistence")?,
                may_hide: row.try_get("may_hide")?,
                has_heirs: row.try_get("has_heirs")?,
                name: row.try_get("column_name")?,
                has_expected_type: row.try_get("has_expected_type")?,
                type_name: row.try_get("type_name")?,
                not_null: row.try_get("not_null")?,
                never_null: row.try_get("never_null")?,
                missing_rights: row.try_get("missing_rights")?,
                is_generated: row.try_get("is_generated")?,
                is_compared_by_bytes: row.try_get("is_compared_by_bytes")?,
                filled_by_default: row.try_get("filled_by_default")?,
                is_primary_key: row.try_get("is_primary_key")?,
                is_indexed: row.try_get("is_indexed")?,
            })
        })
        .collect::<Result<Vec<_>, postgres::Error>>()?;
    Ok(Some(columns).filter(|columns| !columns.is_empty()))
}

const UPDATED_AT: &str = "updated_at";
const COLUMNS: [(&str, &str); 3] =
    [("projection_name", "text"), ("offset", "bigint"), (UPDATED_AT, "timestamp with time zone")];

/// Why a table with these columns cannot hold checkpoints, if it cannot.
fn misfit(columns: &[Column]) -> Option<String> {
    if columns.iter().any(|column| !matches!(column.kind.as_str(), "r" | "p")) {
        return Some("it is not a table".to_owned());
    }
    if columns.iter().any(|column| column.kind == "r" && column.has_heirs) {
        return Some("other tables inherit from it, and their rows would count".to_owned());
    }
    if columns.iter().any(|column| column.persistence != "p") {
        return Some("it is unlogged or temporary, and forgets what was saved".to_owned());
    }
    if columns.iter().any(|column| column.may_hide) {
        return Some(
            "row-level security may hide its rows from the role that is logged in: use its owner, \
             or a role with BYPASSRLS"
                .to_owned(),
        );
    }
    for (name, type_name) in COLUMNS {
        let Some(column) = columns.iter().find(|column| column.name == name) else {
            return Some(format!("it has no column {name:?}"));
        };
        if column.has_expected_type != Some(true) {
            return Some(format!(
                "its column {name:?} is of type {}, not {type_name}",
                column.type_name
            ));
        }
        if !column.never_null {
            return Some(format!("its column {name:?} can be null"));
        }
        if column.is_generated {
            return Some(format!("its column {name:?} is generated"));
        }
        if !column.is_compared_by_bytes {
            return Some(format!("the collation of {name:?} takes different names for the same"));
        }
        if name == "projection_name" && !column.is_primary_key {
            return Some(format!("its primary key is not {name:?} alone"));
        }
    }
    columns
        .iter()
        .find(|column| !is_ours(column) && column.not_null && !column.filled_by_default)
        .map(|column| format!("its column {:?} wants a value in every row", column.name))
}

/// What the store is going to do, the role has to be allowed to.
fn require_rights(columns: &[Column]) -> Outcome<()> {
    let ours = columns.iter().filter(|column| is_ours(column));
    let missing: BTreeSet<&str> =
        ours.flat_map(|column| &column.missing_rights).map(String::as_str).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.into_iter().collect::<Vec<_>>().join(", ");
    Err(format!("the role that is logged in lacks the right to {missing}: grant it").into())
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

fn is_ours(column: &Column) -> bool {
    COLUMNS.iter().any(|(name, _)| *name == column.name)
}

fn is_indexed(columns: &[Column]) -> bool {
    columns.iter().any(|column| column.name == UPDATED_AT && column.is_indexed)
}
