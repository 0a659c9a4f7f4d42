//! `prepared_statements(true)`: the same promises, and statements that the server forgets.

use std::time::Duration;

use checkpoint_store::{CheckpointStore, PostgresCheckpointStore, conformance};

use crate::harness::{self, Proxy, Schema};

fn prepared(schema: &Schema, params: &str) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .max_connections(1)
        .connect(params)
        .unwrap()
}

#[test]
fn the_contract_holds_with_prepared_statements() {
    let schema = Schema::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .connect(&harness::server().params())
        .unwrap();
    conformance::verify(&store);
}

#[test]
fn a_warm_prepared_operation_is_one_round_trip() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let store = prepared(&schema, &proxy.params());
    store.save("warm", 1).unwrap();
    // After 25 ms, which pass on a busy machine, a connection is tested before a save.
    let saves = (0..20).map(|_| proxy.round_trips(|| store.save("warm", 2).unwrap()));
    assert_eq!(saves.min(), Some(1));
    store.get("warm").unwrap();
    assert_eq!(proxy.round_trips(|| store.get("warm").unwrap()), 1);
    store.advance("warm", 2, 3).unwrap();
    assert_eq!(proxy.round_trips(|| store.advance("warm", 3, 4).unwrap()), 1);
}

#[test]
fn every_operation_is_prepared_once() {
    let schema = Schema::new();
    let store = prepared(&schema, &harness::server().params());
    for offset in 0..5 {
        store.save("orders", offset).unwrap();
        store.advance("orders", offset, offset).unwrap();
        store.get("orders").unwrap();
        store.find("orders").unwrap();
        store.all().unwrap();
        store.save_many(&[("orders", offset)]).unwrap();
        store.delete("orders").unwrap();
    }
    let mut client = store.connection().unwrap();
    let kept = client.query_one("SELECT count(*) FROM pg_prepared_statements", &[]).unwrap();
    // This query prepares one itself.
    assert_eq!(kept.get::<_, i64>(0), 6 + 1);
}

#[test]
fn a_statement_that_the_server_has_forgotten_is_prepared_anew() {
    let schema = Schema::new();
    let store = prepared(&schema, &harness::server().params());
    let forget = || store.connection().unwrap().batch_execute("DEALLOCATE ALL").unwrap();
    store.save("orders", 1).unwrap();
    store.advance("orders", 1, 2).unwrap();
    store.get("orders").unwrap();
    forget();
    store.save("orders", 2).unwrap();
    forget();
    store.advance("orders", 2, 3).unwrap();
    forget();
    assert_eq!(store.get("orders").unwrap(), 3);
}

#[test]
fn a_table_that_was_altered_or_made_again_is_found() {
    let schema = Schema::new();
    let store = prepared(&schema, &harness::server().params());
    store.save("orders", 1).unwrap();
    store.find("orders").unwrap();
    schema
        .client()
        .batch_execute(
            "ALTER TABLE projection_checkpoints ALTER updated_at TYPE timestamptz(0);
             ALTER TABLE projection_checkpoints ADD note text;",
        )
        .unwrap();
    assert_eq!(store.find("orders").unwrap().unwrap().offset, 1);
    store.save("orders", 2).unwrap();
    schema.client().batch_execute("DROP TABLE projection_checkpoints").unwrap();
    store.migrate().unwrap();
    store.save("orders", 3).unwrap();
    assert_eq!(store.find("orders").unwrap().unwrap().offset, 3);
}

#[test]
fn two_stores_on_one_pool_keep_their_statements_apart() {
    let (one, other) = (Schema::new(), Schema::new());
    let pool = harness::pool(&harness::server().params(), 1, Duration::from_secs(30));
    let on_the_pool = |schema: &Schema| {
        let builder = PostgresCheckpointStore::builder().schema(&schema.name);
        builder.prepared_statements(true).build(pool.clone()).unwrap()
    };
    let (first, second) = (on_the_pool(&one), on_the_pool(&other));
    for offset in 1..4 {
        first.save("orders", offset).unwrap();
        second.save("orders", offset * 10).unwrap();
    }
    assert_eq!((one.store.get("orders").unwrap(), other.store.get("orders").unwrap()), (3, 30));
}
