//! A network that goes dead without a word, and a server that does.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::NoTls;
use checkpoint_store::r2d2::Pool;
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};
use rustix::process::Signal;

use crate::harness::{self, Network, Options, Schema, Server, free_port, signal_pid, wait_until};

/// The time-outs of these tests, shorter than the defaults.
const TCP_USER_TIMEOUT: u64 = 2;
const POOL_TIMEOUT: Duration = Duration::from_secs(3);
/// Both together, and ample time for a slow machine. Without any time-out it would be 15 minutes
/// or more, Linux's own limit of retransmission.
const BOUND: Duration = Duration::from_mins(1);

/// A store with one warm connection over the link.
fn warm_store(params: &str) -> PostgresCheckpointStore {
    let pool = Pool::builder()
        .max_size(1)
        .min_idle(Some(0))
        .test_on_check_out(false)
        .connection_timeout(POOL_TIMEOUT)
        .build(PostgresConnectionManager::new(params.parse().unwrap(), NoTls))
        .unwrap();
    let store = PostgresCheckpointStore::new(pool);
    store.get("orders").unwrap();
    store
}

type Operation = (&'static str, fn(&PostgresCheckpointStore) -> Result<()>);

const OPERATIONS: [Operation; 7] = [
    ("find", |store| store.find("orders").map(drop)),
    ("get", |store| store.get("orders").map(drop)),
    ("all", |store| store.all().map(drop)),
    ("save", |store| store.save("orders", 2)),
    ("save_many", |store| store.save_many(&[("orders", 2)])),
    ("advance", |store| store.advance("orders", 1, 2)),
    ("delete", |store| store.delete("nothing").map(drop)),
];

#[test]
fn on_a_dead_network_every_operation_ends_in_bounded_time_and_works_again_later() {
    let port = free_port();
    let network = Network::new(port);
    let options = Options {
        listen: network.here().to_owned(),
        port: Some(port),
        hba: Some("host all all all trust".to_owned()),
        ..Options::fast()
    };
    let server = Server::start(options);
    let params = format!(
        "{} connect_timeout=1 tcp_user_timeout={TCP_USER_TIMEOUT} keepalives_idle=1 \
         keepalives_interval=1 keepalives_retries=2",
        network.params()
    );
    let table = PostgresCheckpointStore::connect(&server.params()).unwrap();
    table.migrate().unwrap();
    table.save("orders", 1).unwrap();

    let stores: Vec<_> = OPERATIONS.iter().map(|_| warm_store(&params)).collect();
    let in_transaction = warm_store(&params);
    let mut client = harness::client(&params);
    let mut tx = client.transaction().unwrap();
    in_transaction.in_transaction(&mut tx).lock("mine").unwrap();

    network.cut();
    let longest = thread::scope(|scope| {
        let pooled: Vec<_> = OPERATIONS
            .iter()
            .zip(&stores)
            .map(|((name, run), store)| {
                scope.spawn(move || {
                    let started = Instant::now();
                    let error = run(store).expect_err(name);
                    assert!(matches!(error, Error::Unavailable { .. }), "{name}: {error:?}");
                    assert!(error.is_transient(), "{name}: {error:?}");
                    started.elapsed()
                })
            })
            .collect();
        let started = Instant::now();
        let error = in_transaction.in_transaction(&mut tx).save("mine", 1).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        let in_transaction = started.elapsed();
        pooled.into_iter().map(|pooled| pooled.join().unwrap()).max().max(Some(in_transaction))
    });
    let longest = longest.unwrap();
    println!("dead network: the longest operation took {longest:?}");
    assert!(longest < BOUND, "{longest:?}");

    network.mend();
    for ((name, run), store) in OPERATIONS.iter().zip(&stores) {
        table.save("orders", 1).unwrap();
        wait_until("the store works again", || store.get("orders").is_ok());
        run(store).unwrap_or_else(|error| panic!("{name} after the network is back: {error:?}"));
    }
    assert_eq!(table.find("mine").unwrap(), None, "the transaction that was cut off left nothing");
}

#[test]
fn a_frozen_server_is_waited_for_and_nothing_is_lost_when_it_goes_on() {
    let server = Server::start(Options::fast());
    let store =
        PostgresCheckpointStore::builder().max_connections(1).connect(&server.params()).unwrap();
    store.migrate().unwrap();
    let backend = {
        let mut client = store.pool().get().unwrap();
        client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get::<_, i32>(0)
    };
    signal_pid(backend, Signal::STOP);
    let (done, outcome) = channel();
    thread::scope(|scope| {
        scope.spawn(|| done.send(store.save("orders", 1)).unwrap());
        // Longer than any save takes: this is what the documentation says cannot be bounded.
        let waited = outcome.recv_timeout(Duration::from_millis(500));
        assert!(matches!(waited, Err(RecvTimeoutError::Timeout)), "{waited:?}");
        signal_pid(backend, Signal::CONT);
        outcome.recv().unwrap().unwrap();
    });
    assert_eq!(store.get("orders").unwrap(), 1);
}

#[test]
fn a_statement_time_out_bounds_a_wait_for_a_rival() {
    let schema = Schema::new();
    let params = format!("{} options='-c statement_timeout=50'", harness::server().params());
    let store = PostgresCheckpointStore::builder().schema(&schema.name).connect(&params).unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    schema.store.in_transaction(&mut tx).lock("orders").unwrap();
    let error = store.save("orders", 1).unwrap_err();
    assert!(matches!(error, Error::Backend { operation: "save", .. }), "{error:?}");
    assert_eq!(harness::sql_state(&error).as_deref(), Some("57014"));
}
