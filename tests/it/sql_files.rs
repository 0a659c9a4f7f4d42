//! Every file in `sql/` runs as it stands, in psql, on `public.projection_checkpoints`.

use std::fs;

use checkpoint_store::PostgresCheckpointStore;

use crate::harness::{self, server_program};

/// The types and values to bind, for a file with parameters.
fn parameters(file: &str) -> (&'static str, &'static str) {
    match file {
        "find.sql"
        | "delete.sql"
        | "lock.sql"
        | "try_lock.sql"
        | "project_lock.sql"
        | "project_try_lock.sql" => ("(text)", "('it''s')"),
        "lock_new.sql" | "lock_absent.sql" | "try_lock_absent.sql" => {
            ("(text, text)", "('it''s', 'public.projection_checkpoints')")
        }
        "save.sql" => ("(text, bigint)", "('it''s', 42)"),
        "advance.sql" | "advance_or_find.sql" => ("(text, bigint, bigint)", "('it''s', 0, 42)"),
        "save_many.sql" => ("(text[], bigint[])", "('{a, b}', '{1, 2}')"),
        "save_again.sql" => {
            ("(text[], bigint[], timestamptz)", "('{a, b}', '{1, 2}', '2000-01-01')")
        }
        "delete_again.sql" => ("(text, timestamptz)", "('it''s', '2000-01-01')"),
        "write_together.sql" => {
            ("(text[], bigint[], bigint[])", "('{a, b}', '{1, null}', '{2, 2}')")
        }
        "find_namesake.sql" => ("(text, text)", "('public', 'Projection_Checkpoints')"),
        "absent.sql" => ("(text, text)", "('public.projection_checkpoints', 'it''s')"),
        "inspect_table.sql" | "may_discard.sql" => ("(text)", "('public.projection_checkpoints')"),
        _ => ("", ""),
    }
}

const TABLE: &str = "public.projection_checkpoints";
const PROJECT: &str = "SET LOCAL checkpoint_store.projection = 'p';";

#[test]
fn every_file_runs_as_it_stands_in_psql() {
    let database = harness::fresh_database();
    PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
    let mut tried = 0;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        let (types, values) = parameters(&name);
        let script = if types.is_empty() {
            text
        } else {
            format!("PREPARE statement{types} AS {text} EXECUTE statement{values};")
        };
        // These two save what `project` has locked.
        let script = match name.as_str() {
            "project_save.sql" => {
                format!("{PROJECT} INSERT INTO {TABLE} VALUES ('p', 1); {script}")
            }
            "project_create.sql" => format!("{PROJECT} {script}"),
            _ => script,
        };
        let output = server_program("psql")
            .args([
                "-X",
                "-v",
                "ON_ERROR_STOP=1",
                "-c",
                &format!("BEGIN; {script} ROLLBACK"),
                &database,
            ])
            .output()
            .expect("psql runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        tried += 1;
    }
    assert_eq!(tried, 27);
}
