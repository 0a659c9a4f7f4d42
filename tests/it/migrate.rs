//! Making the table: at once, with few rights, and never over somebody else's.

use std::thread;

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use crate::harness::{self, Schema};

fn store(database: &str, schema: &str) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder().schema(schema).max_connections(1).connect(database).unwrap()
}

#[test]
fn twenty_four_at_once_make_one_schema_and_one_table_at_every_isolation_level() {
    let database = harness::fresh_database();
    let name = database.rsplit('/').next().unwrap();
    let levels = ["read committed", "repeatable read", "serializable"];
    for (round, level) in levels.iter().chain(&levels).enumerate() {
        let schema = format!("round {round}");
        harness::client(&database)
            .batch_execute(&format!(
                "ALTER DATABASE {name} SET default_transaction_isolation = '{level}'"
            ))
            .unwrap();
        thread::scope(|scope| {
            let all: Vec<_> = (0..24)
                .map(|_| {
                    scope.spawn(|| {
                        PostgresCheckpointStore::builder()
                            .schema(&schema)
                            .updated_at_index(true)
                            .max_connections(1)
                            .connect(&database)?
                            .migrate()
                    })
                })
                .collect();
            for migrated in all {
                migrated.join().unwrap().unwrap();
            }
        });
        let indexes = indexes(&database, &schema);
        assert_eq!(indexes.len(), 2, "{indexes:?}");
    }
}

fn indexes(database: &str, schema: &str) -> Vec<String> {
    let query = "SELECT indexname::text FROM pg_indexes WHERE schemaname = $1 ORDER BY 1";
    let rows = harness::client(database).query(query, &[&schema]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn the_index_on_updated_at_is_made_only_when_asked_for_and_once() {
    let database = harness::fresh_database();
    store(&database, "public").migrate().unwrap();
    assert_eq!(indexes(&database, "public"), ["projection_checkpoints_pkey"]);
    let indexed = PostgresCheckpointStore::builder().updated_at_index(true);
    for _ in 0..2 {
        indexed.clone().connect(&database).unwrap().migrate().unwrap();
        assert_eq!(
            indexes(&database, "public"),
            ["projection_checkpoints_pkey", "projection_checkpoints_updated_at_idx"]
        );
    }
}

#[test]
fn two_long_named_tables_in_a_schema_get_an_index_each() {
    let database = harness::fresh_database();
    for last in ["1", "2"] {
        let table = format!("{}{last}", "t".repeat(62));
        let store = PostgresCheckpointStore::builder()
            .table(&table)
            .updated_at_index(true)
            .connect(&database)
            .unwrap();
        store.migrate().unwrap();
        store.save("orders", 1).unwrap();
    }
    assert_eq!(indexes(&database, "public").len(), 4);
}

#[test]
fn a_table_of_another_shape_is_refused_and_left_alone() {
    let shapes = [
        (
            "it has no column \"offset\"",
            "projection_name text PRIMARY KEY, position bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "\"projection_name\" is of type character varying(100)",
            "projection_name varchar(100) PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "\"offset\" is of type integer",
            "projection_name text PRIMARY KEY, \"offset\" integer NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "\"updated_at\" is of type timestamp without time zone",
            "projection_name text PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamp NOT NULL",
        ),
        (
            "\"offset\" can be null",
            "projection_name text PRIMARY KEY, \"offset\" bigint, updated_at timestamptz NOT NULL",
        ),
        (
            "\"updated_at\" can be null",
            "projection_name text PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamptz",
        ),
        (
            "primary key is not \"projection_name\" alone",
            "projection_name text NOT NULL, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "primary key is not \"projection_name\" alone",
            "projection_name text NOT NULL UNIQUE, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "primary key is not \"projection_name\" alone",
            "projection_name text, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL, PRIMARY KEY (projection_name, \"offset\")",
        ),
        (
            "primary key is not \"projection_name\" alone",
            "projection_name text PRIMARY KEY DEFERRABLE, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "\"offset\" is generated",
            "projection_name text PRIMARY KEY, \"offset\" bigint NOT NULL GENERATED ALWAYS AS (1) STORED, updated_at timestamptz NOT NULL",
        ),
        (
            "\"offset\" is generated",
            "projection_name text PRIMARY KEY, \"offset\" bigint GENERATED ALWAYS AS IDENTITY, updated_at timestamptz NOT NULL",
        ),
        (
            "the collation of \"projection_name\"",
            "projection_name text COLLATE any_case PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL",
        ),
        (
            "\"tenant\" wants a value",
            "projection_name text PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL, tenant text NOT NULL",
        ),
    ];
    let database = harness::fresh_database();
    let mut client = harness::client(&database);
    client
        .batch_execute(
            "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        )
        .unwrap();
    for (reason_given, columns) in shapes {
        let sql = format!(
            "DROP TABLE IF EXISTS projection_checkpoints;
             CREATE TABLE projection_checkpoints ({columns})"
        );
        client.batch_execute(&sql).unwrap();
        match store(&database, "public").migrate() {
            Err(Error::IncompatibleTable { table, reason, .. }) => {
                assert_eq!(table, "\"public\".\"projection_checkpoints\"");
                assert!(reason.contains(reason_given), "{reason}");
            }
            other => panic!("{columns}: {other:?}"),
        }
    }
    client
        .batch_execute(
            "DROP TABLE projection_checkpoints;
             CREATE VIEW projection_checkpoints AS
                 SELECT 'a'::text AS projection_name, 1::bigint AS \"offset\", now() AS updated_at",
        )
        .unwrap();
    let refused = store(&database, "public").migrate();
    assert!(
        matches!(&refused, Err(Error::IncompatibleTable { reason, .. }) if reason == "it is not a table"),
        "{refused:?}"
    );
}

#[test]
fn a_table_whose_heirs_have_rows_of_their_own_is_refused_and_a_partitioned_one_is_not() {
    let database = harness::fresh_database();
    let store = store(&database, "public");
    store.migrate().unwrap();
    let mut client = harness::client(&database);
    client.batch_execute("CREATE TABLE heir () INHERITS (projection_checkpoints)").unwrap();
    let refused = store.migrate().unwrap_err();
    assert!(
        matches!(&refused, Error::IncompatibleTable { reason, .. } if reason.contains("inherit")),
        "{refused:?}"
    );
    client
        .batch_execute(
            "DROP TABLE projection_checkpoints CASCADE;
             CREATE TABLE projection_checkpoints (
                 projection_name text PRIMARY KEY, \"offset\" bigint NOT NULL, updated_at timestamptz NOT NULL
             ) PARTITION BY HASH (projection_name);
             CREATE TABLE part_0 PARTITION OF projection_checkpoints FOR VALUES WITH (MODULUS 2, REMAINDER 0);
             CREATE TABLE part_1 PARTITION OF projection_checkpoints FOR VALUES WITH (MODULUS 2, REMAINDER 1);",
        )
        .unwrap();
    store.migrate().unwrap();
    checkpoint_store::conformance::verify(&store);
}

#[test]
fn the_source_systems_table_and_harmless_columns_are_taken_as_they_are() {
    let database = harness::fresh_database();
    harness::client(&database)
        .batch_execute(
            "CREATE TABLE projection_checkpoints (
                 projection_name TEXT PRIMARY KEY,
                 \"offset\" BIGINT NOT NULL,
                 updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
                 note text,
                 host text NOT NULL DEFAULT 'unknown',
                 id bigint GENERATED ALWAYS AS IDENTITY
             );
             CREATE INDEX idx_checkpoints_updated ON projection_checkpoints (updated_at);",
        )
        .unwrap();
    let store =
        PostgresCheckpointStore::builder().updated_at_index(true).connect(&database).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    store.save("orders", 2).unwrap();
    assert_eq!(store.get("orders").unwrap(), 2);
    assert_eq!(indexes(&database, "public").len(), 2, "the index that is there serves");
}

#[test]
fn migrating_again_keeps_every_checkpoint() {
    let schema = Schema::new();
    schema.store.save("orders", 42).unwrap();
    schema.store.migrate().unwrap();
    assert_eq!(schema.store.get("orders").unwrap(), 42);
}
