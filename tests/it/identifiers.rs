//! Schemas, tables and projections with names that somebody will use one day.

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, conformance};

use crate::harness;

#[test]
fn odd_schemas_and_tables_are_names_and_nothing_else() {
    let database = harness::fresh_database();
    let odd = [
        "Orders",
        "two words",
        "a\"b",
        "a'b",
        "a.b",
        "semi;colon",
        "$1",
        "--",
        "select",
        "public.projection_checkpoints",
        "x\"; DROP SCHEMA public CASCADE; --",
        "日本語の表",
        "back\\slash",
        "new\nline",
        " ",
    ];
    for (i, name) in odd.iter().enumerate() {
        let table = odd[(i + 1) % odd.len()];
        let store = PostgresCheckpointStore::builder()
            .schema(*name)
            .table(table)
            .updated_at_index(true)
            .connect(&database)
            .unwrap();
        store.migrate().unwrap();
        store.migrate().unwrap();
        let offset = i64::try_from(i).unwrap();
        store.save("orders", offset).unwrap();
        let mut client = harness::client(&database);
        let mut tx = client.transaction().unwrap();
        assert_eq!(store.in_transaction(&mut tx).lock("orders").unwrap(), offset);
        drop(tx);
        let found = client
            .query_one(
                "SELECT count(*) FROM pg_tables WHERE schemaname = $1 AND tablename = $2",
                &[name, &table],
            )
            .unwrap();
        assert_eq!(found.get::<_, i64>(0), 1, "{name:?}.{table:?}");
    }
}

#[test]
fn the_contract_holds_in_an_oddly_named_table() {
    let database = harness::fresh_database();
    let store = PostgresCheckpointStore::builder()
        .schema("Public \"one\"")
        .table("it's; --")
        .connect(&database)
        .unwrap();
    store.migrate().unwrap();
    conformance::verify(&store);
}

#[test]
fn two_stores_in_one_database_are_apart() {
    let database = harness::fresh_database();
    let store = |schema: &str| {
        let store = PostgresCheckpointStore::builder().schema(schema).connect(&database).unwrap();
        store.migrate().unwrap();
        store
    };
    let (staging, production) = (store("staging"), store("production"));
    staging.save("orders", 1).unwrap();
    production.save("orders", 2).unwrap();
    assert_eq!((staging.get("orders").unwrap(), production.get("orders").unwrap()), (1, 2));
}

#[test]
fn an_identifier_that_postgres_would_cut_or_refuse_is_refused_before_it_connects() {
    for bad in ["", "nul\0", &"x".repeat(64), &"ü".repeat(32)] {
        let unreachable = "host=127.0.0.1 port=1";
        for refused in [
            PostgresCheckpointStore::builder().schema(bad).connect(unreachable),
            PostgresCheckpointStore::builder().table(bad).connect(unreachable),
        ] {
            match refused {
                Err(Error::InvalidIdentifier { identifier, .. }) => assert_eq!(identifier, bad),
                other => panic!("{other:?}"),
            }
        }
    }
}
