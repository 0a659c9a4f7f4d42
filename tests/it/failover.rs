//! A primary and its synchronous standby: one dies, the other takes over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use crate::harness::{Options, Server, chain, sql_state, wait_until};

/// A primary that acknowledges nothing before its standby has it, too.
fn pair() -> (Server, Server) {
    let primary = Server::start(Options::durable().set("synchronous_standby_names", "*"));
    let standby = Server::prepare(Options::durable());
    standby.follow(&primary);
    standby.restart();
    wait_until("the standby is synchronous", || {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
        primary.client().query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
    });
    (primary, standby)
}

fn params(servers: &[&Server]) -> String {
    let each = |what: fn(&Server) -> String| {
        servers.iter().map(|server| what(server)).collect::<Vec<_>>().join(",")
    };
    format!(
        "host={} port={} user=postgres",
        each(|_| "127.0.0.1".to_owned()),
        each(|server| server.port().to_string())
    )
}

/// What one worker was told, so far.
#[derive(Default)]
struct Worker {
    acknowledged: AtomicI64,
    errors: AtomicI64,
    longest: Mutex<Duration>,
}

impl Worker {
    fn step(&self, step: impl FnOnce(i64) -> Result<(), Error>, from: i64) -> Result<(), Error> {
        let started = Instant::now();
        let outcome = step(from);
        let mut longest = self.longest.lock().unwrap();
        *longest = started.elapsed().max(*longest);
        match &outcome {
            Ok(()) => self.acknowledged.store(from + 1, Ordering::SeqCst),
            Err(_) => {
                self.errors.fetch_add(1, Ordering::SeqCst);
            }
        }
        outcome
    }

    fn acknowledged(&self) -> i64 {
        self.acknowledged.load(Ordering::SeqCst)
    }
}

#[test]
fn a_fail_over_loses_nothing_that_was_acknowledged_and_the_same_store_goes_on() {
    let (primary, standby) = pair();
    let both = format!("{} target_session_attrs=read-write", params(&[&primary, &standby]));
    let store = PostgresCheckpointStore::connect(&both).unwrap();
    store.migrate().unwrap();
    store
        .connection()
        .unwrap()
        .batch_execute("CREATE TABLE counted (projection text PRIMARY KEY, events bigint)")
        .unwrap();

    let done = AtomicBool::new(false);
    let workers: Vec<_> = (0..6).map(|_| Worker::default()).collect();
    let all_beyond = |what: &str, marks: &[i64]| {
        wait_until(what, || {
            workers.iter().zip(marks).all(|(worker, mark)| worker.acknowledged() > mark + 20)
        });
    };
    thread::scope(|scope| {
        for (i, worker) in workers.iter().enumerate() {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let name = format!("worker {i}");
                while !done.load(Ordering::Relaxed) {
                    let from = worker.acknowledged();
                    match i % 3 {
                        // Soon after a failover the server's clock does not tell who has written since.
                        0 => match worker.step(|from| store.save(&name, from + 1), from) {
                            Ok(()) => {}
                            Err(error) => {
                                assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
                                assert!(error.is_transient(), "{error:?}");
                            }
                        },
                        1 => match worker.step(|from| store.advance(&name, from, from + 1), from) {
                            Ok(()) => {}
                            Err(error) => {
                                assert!(error.is_transient(), "{error:?}");
                                let is_at = store.get(&name).unwrap();
                                assert!(is_at == from || is_at == from + 1);
                                worker.acknowledged.store(is_at, Ordering::SeqCst);
                            }
                        },
                        _ => {
                            if let Err(error) = worker.step(|_| count(store, &name), from) {
                                assert!(error.is_transient(), "{error:?}");
                                let is_at = store.get(&name).unwrap();
                                assert!(is_at == from || is_at == from + 1);
                                worker.acknowledged.store(is_at, Ordering::SeqCst);
                            }
                        }
                    }
                }
            });
        }
        all_beyond("every worker is at work", &[0; 6]);
        primary.crash();
        standby.client().query_one("SELECT pg_promote()", &[]).unwrap();
        let marks: Vec<_> = workers.iter().map(Worker::acknowledged).collect();
        all_beyond("every worker goes on", &marks);
        done.store(true, Ordering::Relaxed);
    });

    let mut client = standby.client();
    for (i, worker) in workers.iter().enumerate() {
        let name = format!("worker {i}");
        assert_eq!(store.get(&name).unwrap(), worker.acknowledged(), "{name}");
        let errors = worker.errors.load(Ordering::SeqCst);
        let longest = *worker.longest.lock().unwrap();
        println!("{name}: {errors} errors, longest wait {longest:?}");
        match i % 3 {
            0 | 1 => assert!(errors <= 2, "{name}: {errors} errors"),
            _ => {
                let sql = "SELECT events FROM counted WHERE projection = $1";
                let counted: i64 = client.query_one(sql, &[&name]).unwrap().get(0);
                assert_eq!(counted, worker.acknowledged(), "{name}: each event once");
            }
        }
    }
}

/// Counts one event and saves the checkpoint with it, in a transaction.
fn count(store: &PostgresCheckpointStore, name: &str) -> Result<(), Error> {
    let mut client = store.connection()?;
    let mut tx = client.transaction()?;
    let offset = store.in_transaction(&mut tx).lock(name)?;
    let sql = "INSERT INTO counted VALUES ($1, 1)
               ON CONFLICT (projection) DO UPDATE SET events = counted.events + 1";
    tx.execute(sql, &[&name])?;
    store.in_transaction(&mut tx).save(name, offset + 1)?;
    Ok(tx.commit()?)
}

#[test]
fn a_standby_reached_by_mistake_is_a_clear_error() {
    let (primary, standby) = pair();
    let writer = PostgresCheckpointStore::connect(&params(&[&primary])).unwrap();
    writer.migrate().unwrap();
    writer.save("orders", 42).unwrap();

    let store = PostgresCheckpointStore::builder()
        .connection_timeout(Duration::from_secs(6))
        .connect(&params(&[&standby]))
        .unwrap();
    wait_until("the standby has it", || store.get("orders").is_ok_and(|offset| offset == 42));
    store.migrate().unwrap();
    assert_eq!(store.all().unwrap().len(), 1);
    let mut client = store.connection().unwrap();
    let mut lock = || {
        let mut tx = client.transaction().unwrap();
        store.in_transaction(&mut tx).lock("orders").map(drop)
    };
    for (operation, refused) in [
        ("save", store.save("orders", 43)),
        ("save_many", store.save_many(&[("orders", 43)])),
        ("advance", store.advance("orders", 42, 43)),
        ("delete", store.delete("orders").map(drop)),
        ("lock", lock()),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("25006"), "{error:?}");
        let told = chain(&error);
        assert!(told.starts_with(&format!("{operation} failed: ")), "{told}");
        assert!(told.contains("table \"public\".\"projection_checkpoints\""), "{told}");
        assert!(told.contains("read-only transaction"), "{told}");
    }

    // With the right parameter the order of the hosts does not matter.
    let both = format!("{} target_session_attrs=read-write", params(&[&standby, &primary]));
    PostgresCheckpointStore::connect(&both).unwrap().save("orders", 44).unwrap();
    assert_eq!(writer.get("orders").unwrap(), 44);
    // Where nobody takes writes it is said so at once, and may change.
    primary.stop();
    let error = PostgresCheckpointStore::connect(&format!(
        "{} target_session_attrs=read-write",
        params(&[&primary, &standby])
    ))
    .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert!(chain(&error).contains("does not allow writes"), "{}", chain(&error));
}
