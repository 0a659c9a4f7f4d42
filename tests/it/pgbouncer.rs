//! A pooler that hands out server connections by the transaction, between the store and the server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, conformance};

use crate::harness::{self, PgBouncer, Schema, chain, sql_state, wait_until};

const BY_TRANSACTION: (&str, &str) = ("pool_mode", "transaction");

fn by_transaction(server_connections: &str) -> PgBouncer {
    PgBouncer::before(
        harness::server(),
        &[BY_TRANSACTION, ("default_pool_size", server_connections)],
    )
}

fn store(schema: &str, pooler: &PgBouncer) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder().schema(schema).connect(&pooler.params()).unwrap()
}

/// Works for as long as another thread is at something else.
fn meanwhile<T>(others: &[&(dyn Fn() + Sync)], work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let others: Vec<_> = others
            .iter()
            .map(|other| {
                let done = &done;
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !done.load(Ordering::Relaxed) {
                        other();
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        for other in others {
            assert!(other.join().unwrap() > 0, "it was not alone");
        }
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn the_contract_holds_among_rivals_on_three_server_connections() {
    let pooler = by_transaction("3");
    let (ours, theirs) = (Schema::new(), Schema::new());
    let rival = store(&theirs.name, &pooler);
    let saves = || {
        rival.save("rival", 1).unwrap();
        rival.save_many(&[("rival", 2), ("other", 2)]).unwrap();
        assert!(rival.find("rival").unwrap().is_some());
    };
    let advances = || {
        let from = rival.get("shared").unwrap();
        match rival.advance("shared", from, from + 1) {
            Ok(()) => {}
            Err(error) => assert!(error.is_conflict(), "{error:?}"),
        }
    };
    let transactions = || {
        let mut client = rival.connection().unwrap();
        let mut tx = client.transaction().unwrap();
        let offset = rival.in_transaction(&mut tx).lock("counted").unwrap();
        rival.in_transaction(&mut tx).save("counted", offset + 1).unwrap();
        if rival.in_transaction(&mut tx).try_lock("tried").unwrap().is_some() {
            rival.in_transaction(&mut tx).delete("tried").unwrap();
        }
        tx.commit().unwrap();
    };
    meanwhile(&[&saves, &advances, &advances, &transactions, &transactions], || {
        let store = store(&ours.name, &pooler);
        store.migrate().unwrap();
        conformance::verify(&store);
    });
    let mut console = harness::client(&pooler.console());
    let rows = console.simple_query("SHOW SERVERS").unwrap();
    let servers = rows
        .iter()
        .filter(|row| matches!(row, checkpoint_store::postgres::SimpleQueryMessage::Row(_)))
        .count();
    assert!(servers <= 3, "{servers} server connections");
}

#[test]
fn prepared_statements_behind_it_are_refused_at_once() {
    let schema = Schema::new();
    let pooler = by_transaction("1");
    for connections in [1, 10] {
        let error = PostgresCheckpointStore::builder()
            .schema(&schema.name)
            .prepared_statements(true)
            .max_connections(connections)
            .connect(&pooler.params())
            .unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "connect", .. }), "{error:?}");
        assert!(!error.is_transient());
        assert!(
            chain(&error).contains("a pooler assigns a session to each transaction"),
            "{}",
            chain(&error)
        );
    }
}

#[test]
fn prepared_statements_among_rivals_are_refused_before_they_meet() {
    let schema = Schema::new();
    let pooler = PgBouncer::before(
        harness::server(),
        &[BY_TRANSACTION, ("default_pool_size", "4"), ("server_round_robin", "1")],
    );
    let rival = store(&schema.name, &pooler);
    let saves = || rival.save("rival", 1).unwrap();
    meanwhile(&[&saves, &saves, &saves], || {
        for _ in 0..10 {
            // Each attempt leaves more names behind for the next one to see.
            let connected = PostgresCheckpointStore::builder()
                .schema(&schema.name)
                .prepared_statements(true)
                .connect(&pooler.params());
            if let Ok(store) = connected {
                let _ = store.save("ours", 1);
            } else {
                return;
            }
        }
        panic!("ten programs with prepared statements share four sessions unseen");
    });
}

#[test]
fn prepared_statements_go_with_a_pooler_that_hands_out_sessions() {
    let schema = Schema::new();
    let pooler = PgBouncer::before(
        harness::server(),
        &[("pool_mode", "session"), ("default_pool_size", "30")],
    );
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .connect(&pooler.params())
        .unwrap();
    conformance::verify(&store);
}

#[test]
fn a_pooler_that_changes_its_mind_is_found_out_by_a_new_connection() {
    let schema = Schema::new();
    let size = ("default_pool_size", "4");
    let pooler = PgBouncer::before(harness::server(), &[("pool_mode", "session"), size]);
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .connect(&pooler.params())
        .expect("a session of its own for each connection");
    store.save("orders", 1).unwrap();
    let _held = store.connection().unwrap();
    pooler.reload(&[BY_TRANSACTION, size]);
    wait_until("it hands out connections by the transaction", || {
        let mut console = harness::client(&pooler.console());
        format!("{:?}", console.simple_query("SHOW CONFIG").unwrap()).contains("transaction")
    });
    store.save("orders", 2).unwrap();
    let _held_too = store.connection().unwrap();
    let error = store.save("orders", 3).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert!(
        chain(&error).contains("a pooler assigns a session to each transaction"),
        "{}",
        chain(&error)
    );
    assert!(store.get("orders").is_err(), "it stays refused");
}

#[test]
fn a_statement_that_vanishes_twice_is_a_clear_error() {
    let schema = Schema::new();
    let pooler = PgBouncer::before(
        harness::server(),
        &[BY_TRANSACTION, ("default_pool_size", "2"), ("server_round_robin", "1")],
    );
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .prepared_statements(true)
        .build(harness::pool(&pooler.params(), 1, Duration::from_secs(30)))
        .unwrap();
    // Two transactions at once make it open two server connections.
    let (mut one, mut other) =
        (harness::client(&pooler.params()), harness::client(&pooler.params()));
    let mut both = [one.transaction().unwrap(), other.transaction().unwrap()];
    for tx in &mut both {
        tx.batch_execute("SELECT 1").unwrap();
    }
    drop(both);
    let error = store.save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert!(!error.is_transient());
    assert_eq!(sql_state(&error).as_deref(), Some("26000"));
    assert!(chain(&error).contains("prepared_statements(true)"), "{}", chain(&error));
}

#[test]
fn a_name_that_another_program_has_taken_is_a_clear_error() {
    let schema = Schema::new();
    let pooler = by_transaction("1");
    let direct = harness::server().params();
    for _ in 0..50 {
        // What another program with the same client library leaves behind: the names that this
        // one would use next, unless other tests come first.
        let mut client = harness::client(&direct);
        let _next = client.prepare("SELECT").unwrap();
        let sql = "SELECT substr(name, 2)::int FROM pg_prepared_statements";
        let next: i32 = client.query_typed_one(sql, &[]).unwrap().get(0);
        let theirs: String = (next..next + 200)
            .map(|i| format!("PREPARE s{i} (text, bigint) AS SELECT 1"))
            .collect::<Vec<_>>()
            .join(";");
        harness::client(&pooler.params())
            .batch_execute(&format!("DEALLOCATE ALL; {theirs}"))
            .unwrap();

        let store = PostgresCheckpointStore::builder()
            .schema(&schema.name)
            .prepared_statements(true)
            .build(harness::pool(&pooler.params(), 1, Duration::from_secs(30)))
            .unwrap();
        if let Err(error) = store.save("orders", 1) {
            assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
            assert_eq!(sql_state(&error).as_deref(), Some("42P05"));
            assert!(chain(&error).contains("prepared_statements(true)"), "{}", chain(&error));
            return;
        }
    }
    panic!("fifty times another test took two hundred names in between");
}
