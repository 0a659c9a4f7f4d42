//! Schemas, tables and projections with names that somebody will use one day.

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, conformance};

use crate::harness;

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
