//! Every file in `sql/` runs as it stands, in psql, on `public.projection_checkpoints`.

use std::fs;

use checkpoint_store::PostgresCheckpointStore;

use crate::harness::{self, server_program};

/// The types and values to bind, for a file with parameters.
fn parameters(file: &str) -> (&'static str, &'static str) {
    match file {
        "find.sql" | "delete.sql" | "lock.sql" | "lock_new.sql" | "try_lock.sql" => {
            ("(text)", "('it''s')")
        }
        "save.sql" => ("(text, bigint)", "('it''s', 42)"),
        "advance.sql" | "advance_or_find.sql" => ("(text, bigint, bigint)", "('it''s', 0, 42)"),
        "save_many.sql" => ("(text[], bigint[])", "('{a, b}', '{1, 2}')"),
        "write_together.sql" => {
            ("(text[], bigint[], bigint[])", "('{a, b}', '{1, null}', '{2, 2}')")
        }
        "find_namesake.sql" => ("(text, text)", "('public', 'Projection_Checkpoints')"),
        "inspect_table.sql" | "may_hide.sql" => ("(text)", "('public.projection_checkpoints')"),
        _ => ("", ""),
    }
}

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
        let output = server_program("psql")
            .args(["-X", "-v", "ON_ERROR_STOP=1", "-c", &script, &database])
            .output()
            .expect("psql runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        tried += 1;
    }
    assert_eq!(tried, 17);
}
