//! A network that goes away, and a server that stands still.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};
use rustix::process::Signal;

use crate::harness::{self, Network, Options, Server, chain, client, signal_pid, wait_until};

/// Everything that bounds a wait, as short as it can be said.
const SHORT: &str = "connect_timeout=1 tcp_user_timeout=2 keepalives_idle=1 keepalives_interval=1 \
                     keepalives_retries=2";
const POOL_TIMEOUT: Duration = Duration::from_secs(3);
/// Far more than the sum of all of them, for a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(20);

fn store(params: &str, connections: u32) -> PostgresCheckpointStore {
    PostgresCheckpointStore::new(harness::pool(params, connections, POOL_TIMEOUT))
}

/// Opens so many connections, and leaves them idle.
fn fill(store: &PostgresCheckpointStore, connections: u32) {
    let held: Vec<_> = (0..connections).map(|_| store.connection().unwrap()).collect();
    drop(held);
    assert_eq!(store.pool_state().idle_connections, connections);
}

type Operation = (&'static str, fn(&PostgresCheckpointStore) -> Result<()>);

const POOLED: [Operation; 7] = [
    ("find", |store| store.find("find").map(drop)),
    ("get", |store| store.get("get").map(drop)),
    ("all", |store| store.all().map(drop)),
    ("save", |store| store.save("save", 2)),
    ("save_many", |store| store.save_many(&[("save_many", 2), ("others", 2)])),
    ("advance", |store| store.advance("advance", 1, 2)),
    ("delete", |store| store.delete("delete").map(drop)),
];

type Step = (&'static str, fn(&PostgresCheckpointStore, &mut Transaction<'_>) -> Result<()>);

const IN_TRANSACTION: [Step; 8] = [
    ("find", |store, tx| store.in_transaction(tx).find("tx find").map(drop)),
    ("get", |store, tx| store.in_transaction(tx).get("tx get").map(drop)),
    ("save", |store, tx| store.in_transaction(tx).save("tx save", 2)),
    ("save_many", |store, tx| store.in_transaction(tx).save_many(&[("tx save_many", 2)])),
    ("advance", |store, tx| store.in_transaction(tx).advance("tx advance", 0, 2)),
    ("delete", |store, tx| store.in_transaction(tx).delete("tx delete").map(drop)),
    ("lock", |store, tx| store.in_transaction(tx).lock("tx lock").map(drop)),
    ("try_lock", |store, tx| store.in_transaction(tx).try_lock("tx try_lock").map(drop)),
];

fn is_unavailable(what: &str, started: Instant, outcome: Result<()>) {
    let took = started.elapsed();
    let error = outcome.expect_err(what);
    assert!(matches!(error, Error::Unavailable { .. }), "{what}: {error:?}");
    assert!(error.is_transient(), "{what}: {error:?}");
    let told = chain(&error);
    let operation = what.trim_start_matches("tx ");
    assert!(told.contains(&format!(": {operation}: ")), "{what}: {told}");
    assert!(took < BOUND, "{what}: {took:?}");
    println!("link down, {what}: {took:?}: {told}");
}

#[test]
fn a_link_that_goes_down_is_an_error_in_bounded_time_and_works_again_when_it_is_up() {
    let network = Network::new();
    let server = network.server();
    let params = format!("{} {SHORT}", server.params());
    let pools: Vec<_> = POOLED.iter().map(|_| store(&params, 2)).collect();
    let (waiting, unconnected) = (store(&params, 1), store(&params, 1));
    waiting.migrate().unwrap();
    for (name, _) in POOLED {
        waiting.save(name, 1).unwrap();
    }
    for store in &pools {
        fill(store, 2);
    }

    // One round more than the link lasts: each takes what the last one has left behind.
    for round in ["first", "second"] {
        let mut clients: Vec<Client> = IN_TRANSACTION.iter().map(|_| client(&params)).collect();
        let mut holder = client(&params);
        thread::scope(|scope| {
            let mut transactions: Vec<_> =
                clients.iter_mut().map(|client| client.transaction().unwrap()).collect();
            for tx in &mut transactions {
                tx.batch_execute("SELECT 1").unwrap();
            }
            // One that has been sent, and whose answer is to come.
            let mut held = holder.transaction().unwrap();
            waiting.in_transaction(&mut held).lock("held").unwrap();
            let waiter = scope.spawn(|| waiting.save("held", 2));
            wait_until("it waits for the row", || {
                let sql = "SELECT count(*) FROM pg_locks WHERE NOT granted";
                held.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
            });

            network.cut();
            let started = Instant::now();
            for ((what, operation), store) in POOLED.iter().zip(&pools) {
                scope.spawn(move || is_unavailable(what, started, operation(store)));
            }
            for ((what, step), tx) in IN_TRANSACTION.iter().zip(transactions) {
                let (what, store) = (format!("tx {what}"), &waiting);
                scope.spawn(move || {
                    let mut tx = tx;
                    let outcome = step(store, &mut tx);
                    is_unavailable(&what, started, outcome);
                });
            }
            let (unconnected, params) = (&unconnected, &params);
            scope.spawn(move || {
                is_unavailable("get", started, unconnected.get("orders").map(drop));
            });
            scope.spawn(move || {
                let refused = PostgresCheckpointStore::connect(params);
                is_unavailable("connect", started, refused.map(drop));
            });
            is_unavailable("save", started, waiter.join().unwrap());
        });

        network.mend();
        for ((what, operation), store) in POOLED.iter().zip(&pools) {
            // What was sent may have been carried out, so put it where it was.
            wait_until(&format!("{round} time: {what} works again"), || {
                let again = store.save(what, 1).and_then(|()| operation(store));
                again.and_then(|()| store.save(what, 1)).is_ok()
            });
            fill(store, 2);
        }
        wait_until("the server has let go of what the lost ones held", || {
            waiting.save("held", 1).is_ok()
        });
        unconnected.save("orders", 1).unwrap();
        PostgresCheckpointStore::connect(&params).unwrap();
    }
}

/// All processes of a server that may answer a client, the one that takes new ones included.
fn stand_still(server: &Server, how: Signal, backends: &[i32]) {
    for pid in backends.iter().chain(&[server.pid()]) {
        signal_pid(*pid, how);
    }
}

#[test]
fn a_server_that_stands_still_makes_operations_wait_and_loses_nothing() {
    let server = Server::start(Options::fast());
    let params = format!("{} {SHORT}", server.params());
    let (save, advance, full) = (store(&params, 1), store(&params, 1), store(&params, 1));
    full.migrate().unwrap();
    save.save("save", 1).unwrap();
    advance.save("advance", 1).unwrap();
    let (mut client, mut holder) = (client(&params), client(&params));
    let mut backends: Vec<i32> = Vec::new();
    wait_until("the five that are ours are left", || {
        let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'";
        backends = client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        backends.len() == 5
    });

    thread::scope(|scope| {
        let (ended, ends) = mpsc::channel();
        // So that the statements are under way when the server stands still.
        let mut held = holder.transaction().unwrap();
        held.batch_execute("SELECT FROM projection_checkpoints FOR UPDATE").unwrap();
        let (done, (save, advance)) = (ended.clone(), (&save, &advance));
        scope.spawn(move || done.send(("save", save.save("save", 2))));
        let done = ended.clone();
        scope.spawn(move || done.send(("advance", advance.advance("advance", 1, 2))));
        wait_until("both wait for the rows", || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
            client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 2
        });
        let mut tx = client.transaction().unwrap();
        save.in_transaction(&mut tx).lock("tx").unwrap();
        stand_still(&server, Signal::STOP, &backends);
        let thaw = Thaw(&server, &backends);

        let done = ended;
        scope.spawn(move || {
            let saved = save.in_transaction(&mut tx).save("tx", 2);
            let lost = |error: checkpoint_store::postgres::Error| Error::backend("commit", error);
            done.send(("tx", saved.and_then(|()| tx.commit().map_err(lost))))
        });
        // Whoever needs a new connection is not kept longer than the pool says.
        let started = Instant::now();
        let error = store(&params, 1).get("orders").unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!((POOL_TIMEOUT..BOUND).contains(&started.elapsed()), "{:?}", started.elapsed());
        // Its kernel acknowledges what is sent, so no setting of TCP ends the wait: all of them
        // have passed by now.
        assert!(ends.try_recv().is_err(), "what waits for an answer goes on waiting");

        drop(thaw);
        held.commit().unwrap();
        for _ in 0..3 {
            let (what, outcome) = ends.recv_timeout(Duration::from_secs(60)).unwrap();
            outcome.expect(what);
        }
    });
    for name in ["save", "advance", "tx"] {
        assert_eq!(full.get(name).unwrap(), 2, "{name}");
    }
}

/// Lets a server go on, whatever became of the test.
struct Thaw<'a>(&'a Server, &'a [i32]);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        stand_still(self.0, Signal::CONT, self.1);
    }
}
