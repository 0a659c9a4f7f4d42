//! A worker that is woken when something was appended, and is right without it.

use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use checkpoint_store::postgres::fallible_iterator::FallibleIterator;
use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{CheckpointStore, PooledClient, PostgresCheckpointStore, Result};

use super::{GUIDE, append, apply_ten, each_event_counts_once, sql_with, store_and_stream};
use crate::harness::{self, sql_state, wait_until};

fn work(
    store: &PostgresCheckpointStore,
    listeners: &PostgresCheckpointStore,
    apply: impl Fn(&mut Transaction<'_>, i64) -> Result<Option<i64>>,
) -> Result<()> {
    let mut listener = None;
    loop {
        match store.project("orders", &apply) {
            Ok(Some(_)) => {}
            Ok(None) => wait(listeners, &mut listener),
            Err(error) if error.is_transient() => {
                eprintln!("{}", error.report());
                sleep(Duration::from_secs(1));
            }
            Err(error) => return Err(error),
        }
    }
}

const POLL: Duration = Duration::from_secs(5);

fn wait(listeners: &PostgresCheckpointStore, listener: &mut Option<PooledClient>) {
    let Some(client) = listener else {
        match listen(listeners) {
            Ok(client) => *listener = Some(client), // drain once more: what came before told nobody
            Err(error) => {
                eprintln!("polling: {}", error.report());
                sleep(POLL);
            }
        }
        return;
    };
    let notified = client.notifications().timeout_iter(POLL).next();
    if notified.is_err() || client.is_closed() {
        *listener = None; // the next call makes another one
        sleep(Duration::from_millis(200));
    } else {
        while let Ok(Some(_)) = client.notifications().iter().next() {} // one drain serves them all
    }
}

fn listen(listeners: &PostgresCheckpointStore) -> Result<PooledClient> {
    let mut client = listeners.connection()?;
    client.batch_execute("LISTEN events")?;
    Ok(client)
}

/// A worker, and its stream that notifies.
struct Awake {
    store: PostgresCheckpointStore,
    client: Client,
    worker: thread::JoinHandle<Result<()>>,
    database: String,
}

impl Awake {
    fn new() -> Self {
        let (store, mut client) = store_and_stream();
        client.batch_execute(&sql_with(GUIDE, "NOTIFY")).unwrap();
        let database: String =
            client.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
        let listeners = PostgresCheckpointStore::builder()
            .max_connections(1)
            .connection_timeout(Duration::from_secs(2))
            .connect(&harness::server().url(&database))
            .unwrap();
        let worker = thread::spawn({
            let store = store.clone();
            move || work(&store, &listeners, apply_ten)
        });
        Self { store, client, worker, database }
    }

    /// The process of the worker's listener, once there is one other than this.
    fn listener(&mut self, other_than: i32) -> i32 {
        let sql = "SELECT COALESCE(max(pid), 0) FROM pg_stat_activity WHERE state = 'idle'
                   AND datname = current_database() AND query = 'LISTEN events' AND pid <> $1";
        let mut pid = 0;
        wait_until("the worker listens", || {
            pid = self.client.query_one(sql, &[&other_than]).unwrap().get(0);
            pid != 0
        });
        pid
    }

    fn append_and_wait(&mut self) {
        let appended = append(&mut self.client, 1, "1", "1");
        assert!(self.store.wait_for("orders", appended, Duration::from_secs(60)).unwrap());
    }

    fn end(mut self) {
        each_event_counts_once(&mut self.client);
        self.client.batch_execute("DROP TABLE order_totals").unwrap();
        append(&mut self.client, 1, "1", "1");
        let error = self.worker.join().unwrap().unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("42P01"), "{error:?}");
    }
}

#[test]
fn a_worker_that_listens_does_not_wait_for_its_next_poll() {
    let mut awake = Awake::new();
    awake.listener(0);
    let begun = Instant::now();
    for _ in 0..20 {
        awake.append_and_wait();
    }
    assert!(begun.elapsed() < 10 * POLL, "{:?}, and 20 polls take 100 s", begun.elapsed());
    awake.end();
}

#[test]
fn a_listener_that_is_lost_again_and_again_is_replaced_and_nothing_is_lost_or_doubled() {
    let mut awake = Awake::new();
    let mut pid = 0;
    for _ in 0..15 {
        pid = awake.listener(pid);
        append(&mut awake.client, 37, "i % 30", "i");
        harness::end_backend(&mut awake.client, pid);
        awake.append_and_wait();
    }
    awake.end();
}

#[test]
fn an_event_whose_notification_is_lost_is_found_by_the_next_poll_and_so_it_is_without_a_listener() {
    let mut awake = Awake::new();
    let pid = awake.listener(0);
    awake.append_and_wait();
    awake.client.batch_execute("ALTER TABLE events DISABLE TRIGGER append_in_turn").unwrap();
    awake.append_and_wait();
    awake.client.batch_execute("ALTER TABLE events ENABLE TRIGGER append_in_turn").unwrap();
    let mut admin = harness::server().client();
    let mut allow_connections = |allowed: bool| {
        let sql = format!("ALTER DATABASE {} ALLOW_CONNECTIONS {allowed}", awake.database);
        admin.batch_execute(&sql).unwrap();
    };
    allow_connections(false); // the worker keeps the connection that it has, and gets no listener
    harness::end_backend(&mut awake.client, pid);
    let appended = append(&mut awake.client, 1, "1", "1");
    assert!(awake.store.wait_for("orders", appended, Duration::from_secs(60)).unwrap());
    allow_connections(true);
    awake.listener(pid);
    awake.append_and_wait();
    awake.end();
}
