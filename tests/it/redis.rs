//! The store of `examples/redis_store.rs`, on a real Redis.

use std::error::Error as _;
use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use checkpoint_store::{CheckpointStore, Error, conformance};
use redis::{Client, Commands, Connection};
use rustix::process::Signal;

use crate::harness::{Guard, chain, example, failure, free_port, signal, success};
use redis_store::RedisCheckpointStore;

#[allow(dead_code, unreachable_pub, reason = "an example is a program of its own")]
#[path = "../../examples/redis_store.rs"]
mod redis_store;

const PASSWORD: &str = "hunter2";

/// A Redis in a folder of its own, on a free port, gone when this value is.
struct RedisServer {
    port: u16,
    settings: Vec<String>,
    process: Option<Child>,
    guard: Guard,
}

impl RedisServer {
    fn start() -> Self {
        Self::start_with(&[])
    }

    /// Started with more of redis.conf: `--requirepass`, `hunter2`.
    fn start_with(settings: &[&str]) -> Self {
        let mut server = Self {
            port: free_port(),
            settings: settings.iter().map(ToString::to_string).collect(),
            process: None,
            guard: Guard::new("checkpoint-store-redis-"),
        };
        server.restart();
        server
    }

    /// Starts the server again, with what it had written to its folder.
    fn restart(&mut self) {
        assert!(self.process.is_none(), "the server runs already");
        let log = self.guard.folder().join("log");
        let mut process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
            .args(["--save", "", "--appendonly", "yes", "--appendfsync", "no"])
            .arg("--dir")
            .arg(self.guard.folder())
            .arg("--logfile")
            .arg(&log)
            .args(&self.settings)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("redis-server does not start ({error}): tests/run installs it")
            });
        self.guard.watch(&process);
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(refused) = self.knock() {
            let ended = process.try_wait().expect("a child's state");
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(log).unwrap_or_default();
                panic!("redis-server does not answer: {refused}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.process = Some(process);
    }

    fn knock(&self) -> redis::RedisResult<()> {
        Client::open(self.url())?.get_connection()?.ping()
    }

    /// Ends the server without a chance to tidy up. What it had handed to the operating system stays.
    fn kill(&mut self) {
        let mut process = self.process.take().expect("a running server");
        process.kill().expect("own child");
        process.wait().expect("a killed server ends");
        self.guard.forget(&process);
    }

    fn signal(&self, number: Signal) {
        signal(self.process.as_ref().expect("a running server"), number);
    }

    fn url(&self) -> String {
        let has_password = self.settings.iter().any(|setting| setting == "--requirepass");
        let login = if has_password { format!(":{PASSWORD}@") } else { String::new() };
        format!("redis://{login}127.0.0.1:{}/", self.port)
    }

    fn client(&self) -> Connection {
        Client::open(self.url()).and_then(|client| client.get_connection()).expect("a connection")
    }

    fn store(&self) -> RedisCheckpointStore {
        self.store_at("test")
    }

    fn store_at(&self, prefix: &str) -> RedisCheckpointStore {
        RedisCheckpointStore::connect(&self.url(), prefix).expect("a store")
    }

    /// Takes away every connection but its own.
    fn drop_connections(&self) {
        let dropped: usize = redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", "normal"])
            .query(&mut self.client())
            .expect("the server drops its clients");
        assert!(dropped > 0, "there was no connection to drop");
    }

    /// Microseconds since 1970.
    fn time(&self) -> u128 {
        let (seconds, micros): (u128, u128) =
            redis::cmd("TIME").query(&mut self.client()).expect("the time");
        seconds * 1_000_000 + micros
    }

    /// How many times the server was asked for the time.
    fn time_calls(&self) -> u64 {
        let info: String =
            redis::cmd("INFO").arg("commandstats").query(&mut self.client()).expect("statistics");
        let calls = info.lines().find_map(|line| {
            line.strip_prefix("cmdstat_time:calls=")?.split(',').next()?.parse().ok()
        });
        calls.unwrap_or(0)
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.kill();
        }
    }
}

/// What the store lists: names and offsets, in its order.
fn listed(store: &dyn CheckpointStore) -> Vec<(String, i64)> {
    let all = store.all().expect("a list");
    all.into_iter().map(|checkpoint| (checkpoint.projection, checkpoint.offset)).collect()
}

#[track_caller]
fn assert_unavailable<T: std::fmt::Debug>(outcome: Result<T, Error>) {
    let error = outcome.expect_err("an error");
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert!(error.source().is_some(), "{error:?}");
    assert_no_password(&error);
}

#[track_caller]
fn assert_backend<T: std::fmt::Debug>(outcome: Result<T, Error>, named: &str, cause: &str) {
    let error = outcome.expect_err("an error");
    assert!(matches!(error, Error::Backend { operation, .. } if operation == named), "{error:?}");
    assert!(chain(&error).contains(cause), "{}", chain(&error));
    assert!(!error.is_transient(), "{error:?}");
    assert_no_password(&error);
}

#[track_caller]
fn assert_no_password(error: &Error) {
    assert!(!chain(error).contains(PASSWORD) && !format!("{error:?}").contains(PASSWORD));
}

#[test]
fn the_redis_store_keeps_the_contract() {
    fn is_shared<T: Send + Sync + 'static>() {}
    is_shared::<RedisCheckpointStore>();
    let server = RedisServer::start();
    conformance::verify(&server.store());
    conformance::verify(&server.store_at("a*[b]?\\:\n 日本語"));
    let left: Vec<String> = server.client().keys("*").expect("keys");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn prefixes_are_apart_whatever_they_and_the_names_are_made_of() {
    let server = RedisServer::start();
    let prefixes =
        ["a", "a:b", "a:", "*", "a*", "?", "[a]", "[^b]", "\\", "\\*", "a\nb", "ü", "日本語", "-"];
    let names = [
        "*", "?", "[a-z]", "[^a]", "\\", "\\*", "a:b", "b:a", ":", "{a}", "}", "}:a", "{a}:a",
        "a\nb", "a\r\n", "ü", "u\u{308}", "📦", " ", "\u{1}",
    ];
    let stores: Vec<_> = prefixes.iter().map(|prefix| server.store_at(prefix)).collect();
    let offset = |i: usize, j: usize| i64::try_from(100 * i + j).expect("a small number");
    for (i, store) in stores.iter().enumerate() {
        for (j, name) in names.iter().enumerate() {
            store.save(name, offset(i, j)).expect("a save");
        }
    }
    for (i, store) in stores.iter().enumerate() {
        let mut expected: Vec<_> =
            names.iter().enumerate().map(|(j, name)| (name.to_string(), offset(i, j))).collect();
        expected.sort();
        assert_eq!(listed(store), expected, "prefix {:?}", prefixes[i]);
    }
    for name in names {
        assert!(stores[0].delete(name).expect("a delete"));
    }
    assert!(listed(&stores[0]).is_empty());
    for store in &stores[1..] {
        assert_eq!(listed(store).len(), names.len());
    }
}

#[test]
fn a_prefix_that_would_not_keep_keys_apart_is_refused() {
    let server = RedisServer::start();
    for prefix in ["", "{", "}", "a}:b"] {
        let refused = RedisCheckpointStore::connect(&server.url(), prefix).err();
        assert!(matches!(refused, Some(Error::Backend { .. })), "{prefix:?}: {refused:?}");
    }
}

#[test]
fn offsets_that_differ_beyond_the_53_bits_of_a_double_differ() {
    let server = RedisServer::start();
    let store = server.store();
    for top in [i64::MAX, (1 << 53) + 1] {
        store.save("far", top).expect("a save");
        assert_eq!(store.get("far").expect("an offset"), top);
        assert_eq!(listed(&store), [("far".to_owned(), top)]);
        match store.advance("far", top - 1, top) {
            Err(Error::Conflict { expected, found, .. }) => {
                assert_eq!((expected, found), (top - 1, top));
            }
            other => panic!("{other:?}"),
        }
        store.save_many(&[("far", top - 1)]).expect("a save");
        store.advance("far", top - 1, top).expect("an advance");
        assert_eq!(store.get("far").expect("an offset"), top);
    }
}

#[test]
fn of_eight_threads_with_a_connection_each_or_one_for_all_exactly_one_advances() {
    const THREADS: usize = 8;
    const ROUNDS: i64 = 100;
    let server = RedisServer::start();
    let shared = server.store();
    let own: Vec<_> = (0..THREADS).map(|_| server.store()).collect();
    let alternatives: [Vec<&RedisCheckpointStore>; 2] =
        [vec![&shared; THREADS], own.iter().collect()];
    for stores in alternatives {
        shared.save("race", 0).expect("a save");
        for round in 0..ROUNDS {
            let winners = AtomicUsize::new(0);
            let start = Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for store in &stores {
                    scope.spawn(|| {
                        start.wait();
                        match store.advance("race", round, round + 1) {
                            Ok(()) => drop(winners.fetch_add(1, Ordering::Relaxed)),
                            Err(Error::Conflict { found, .. }) => assert_eq!(found, round + 1),
                            Err(error) => panic!("{error:?}"),
                        }
                    });
                }
            });
            assert_eq!(winners.into_inner(), 1);
        }
        assert_eq!(shared.get("race").expect("an offset"), ROUNDS);
    }
}

#[test]
fn the_time_of_a_save_is_that_of_the_clock_of_redis() {
    type Save = fn(&RedisCheckpointStore) -> Result<(), Error>;
    let saves: [Save; 3] = [
        |store| store.save("time", 1),
        |store| store.advance("time", 1, 2),
        |store| store.save_many(&[("time", 3), ("other", 3)]),
    ];
    let server = RedisServer::start();
    let store = server.store();
    for save in saves {
        let (before, calls) = (server.time(), server.time_calls());
        save(&store).expect("a save");
        assert_eq!(server.time_calls(), calls + 1, "Redis is asked for the time, once");
        let found = store.find("time").expect("an answer").expect("a checkpoint");
        let at = found.updated_at.duration_since(UNIX_EPOCH).expect("after 1970").as_micros();
        assert!((before..=server.time()).contains(&at), "{at} is not after {before}, or not yet");
    }
    let all = store.all().expect("a list");
    assert_eq!(all[0].updated_at, all[1].updated_at, "what is saved together has one time");
}

#[test]
fn checkpoints_deleted_while_they_are_listed_are_left_out() {
    let server = RedisServer::start();
    let (lister, writer) = (server.store(), server.store());
    let names: Vec<_> = (0..500).map(|i| format!("steady {i:03}")).collect();
    let steady: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    writer.save_many(&steady).expect("a save");
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            for _ in 0..1_000 {
                writer.save("volatile", 1).expect("a save");
                writer.delete("volatile").expect("a delete");
            }
        });
        while !writing.is_finished() {
            let mut found = listed(&lister);
            found.retain(|(name, _)| name != "volatile");
            assert!(found.iter().map(|(name, _)| name).eq(&names), "each other one once, in order");
        }
    });
}

#[test]
fn what_others_put_under_the_prefix_is_an_error_or_no_checkpoint_and_stays() {
    let server = RedisServer::start();
    let store = server.store();
    let mut client = server.client();
    store.save("good", 1).expect("a save");

    client.set::<_, _, ()>("{test}:text", "foreign").expect("a foreign key");
    let wrong = "wrong kind of value";
    assert_backend(store.find("text"), "find", wrong);
    assert_backend(store.get("text"), "find", wrong);
    assert_backend(store.all(), "all", wrong);
    assert_backend(store.save("text", 1), "save", wrong);
    assert_backend(store.advance("text", 0, 1), "advance", wrong);
    assert_backend(store.delete("text"), "delete", wrong);
    let many = [("good", 2), ("text", 2), ("new", 2)];
    assert_backend(store.save_many(&many), "save_many", wrong);
    assert_eq!(store.get("good").expect("an offset"), 1, "save_many is all or nothing");
    assert_eq!(store.find("new").expect("an answer"), None, "save_many is all or nothing");
    assert_eq!(client.get("{test}:text"), Ok("foreign".to_owned()));
    client.del::<_, ()>("{test}:text").expect("deleted");

    client.hset::<_, _, _, ()>("{test}:hash", "colour", "red").expect("a foreign hash");
    assert_eq!(store.find("hash").expect("an answer"), None);
    assert!(!store.delete("hash").expect("an answer"));
    assert_eq!(listed(&store), [("good".to_owned(), 1)]);
    store.advance("hash", 0, 3).expect("an advance");
    assert!(store.delete("hash").expect("an answer"));
    assert_eq!(client.hget("{test}:hash", "colour"), Ok("red".to_owned()));

    client.hset::<_, _, _, ()>("{test}:set by hand", "offset", 7).expect("set");
    let by_hand = store.find("set by hand").expect("an answer").expect("a checkpoint");
    assert_eq!((by_hand.offset, by_hand.updated_at), (7, UNIX_EPOCH));
    store.advance("set by hand", 7, 8).expect("an advance");

    for garbage in ["", "seven", "7.5", "9223372036854775808"] {
        client.hset::<_, _, _, ()>("{test}:garbage", "offset", garbage).expect("set");
        assert_backend(store.find("garbage"), "find", "");
        assert_backend(store.all(), "all", "");
        assert_backend(store.advance("garbage", 0, 1), "advance", "");
    }
    store.save("garbage", 7).expect("a save fixes it");

    client.set::<_, _, ()>(b"{test}:\xff", "not UTF-8").expect("a foreign key");
    assert_backend(store.all(), "all", "");
}

#[test]
fn a_lost_connection_is_replaced_but_an_advance_is_not_repeated() {
    let server = RedisServer::start();
    let store = server.store();
    let after_a_loss = || server.drop_connections();
    store.save("p", 1).expect("a save");

    after_a_loss();
    assert_eq!(store.get("p").expect("an offset"), 1);
    after_a_loss();
    assert_eq!(store.all().expect("a list").len(), 1);
    after_a_loss();
    store.save("p", 2).expect("a save");
    after_a_loss();
    store.save_many(&[("p", 3)]).expect("a save");
    after_a_loss();
    assert_unavailable(store.advance("p", 3, 4));
    assert_eq!(server.store().get("p").expect("an offset"), 3);
    store.advance("p", 3, 4).expect("an advance on a fresh connection");
    after_a_loss();
    assert!(store.delete("p").expect("a delete"));
}

#[test]
fn a_server_that_is_killed_is_unavailable_and_goes_on_where_it_was() {
    let mut server = RedisServer::start_with(&["--requirepass", PASSWORD]);
    let store = server.store();
    store.save("orders", 41).expect("a save");
    store.advance("orders", 41, 42).expect("an advance");
    let saved = store.all().expect("a list");

    server.kill();
    for _ in 0..2 {
        assert_unavailable(store.find("orders"));
        assert_unavailable(store.all());
        assert_unavailable(store.save("orders", 43));
        assert_unavailable(store.save_many(&[("orders", 43)]));
        assert_unavailable(store.advance("orders", 42, 43));
        assert_unavailable(store.delete("orders"));
    }
    assert_unavailable(RedisCheckpointStore::connect(&server.url(), "test").map(drop));

    server.restart();
    assert_eq!(store.all().expect("a list"), saved, "nothing acknowledged is lost");
    store.advance("orders", 42, 43).expect("the scripts are loaded anew");
    server.kill();
    server.restart();
    store.save("orders", 44).expect("a save");
    assert_eq!(listed(&store), [("orders".to_owned(), 44)]);
}

#[test]
fn a_server_that_hangs_is_unavailable_and_its_late_answer_goes_to_nobody() {
    let server = RedisServer::start();
    let store = server.store();
    store.save_many(&[("one", 1), ("two", 2)]).expect("a save");
    server.signal(Signal::STOP);
    let asked = Instant::now();
    assert_unavailable(store.get("one"));
    let waited = asked.elapsed();
    server.signal(Signal::CONT);
    assert!((4..9).contains(&waited.as_secs()), "waited {waited:?}");
    assert_eq!(store.get("two").expect("an offset"), 2);
    assert_eq!(store.get("one").expect("an offset"), 1);
}

#[test]
fn a_server_that_says_to_come_back_later_is_unavailable() {
    let server = RedisServer::start_with(&["--replica-serve-stale-data", "no"]);
    let store = server.store();
    store.save("p", 1).expect("a save");
    let nobody = free_port().to_string();
    let replicate = |of: [&str; 2]| {
        redis::cmd("REPLICAOF").arg(&of).exec(&mut server.client()).expect("it is configured");
    };
    replicate(["127.0.0.1", &nobody]);
    assert_unavailable(store.get("p"));
    replicate(["NO", "ONE"]);
    assert_eq!(store.get("p").expect("an offset"), 1);
}

#[test]
fn a_refused_login_and_a_url_that_cannot_be_read_show_no_password() {
    let server = RedisServer::start_with(&["--requirepass", PASSWORD]);
    let connect = |url: &str| RedisCheckpointStore::connect(url, "test").map(drop);
    let address = format!("127.0.0.1:{}", server.port);
    assert_backend(connect(&format!("redis://:wrong-{PASSWORD}@{address}/")), "connect", "");
    assert_backend(connect(&format!("redis://{address}/")), "connect", "NOAUTH");
    assert_backend(connect(&format!("redis://:{PASSWORD}@{address}/no-number")), "connect", "");
    assert_backend(connect(&format!("http://:{PASSWORD}@{address}/")), "connect", "");
}

#[test]
fn the_example_resumes_where_its_last_run_ended() {
    let server = RedisServer::start_with(&["--requirepass", PASSWORD]);
    let runs = [
        "order-log resumes after event 0
event 1: the order was placed
event 2: the order was paid
event 3: the order was packed
order-log stands at event 3 of 7
",
        "order-log resumes after event 3
event 4: the order was shipped
event 5: the order was delivered
event 6: the order was returned
order-log stands at event 6 of 7
",
        "order-log resumes after event 6
event 7: the order was refunded
order-log stands at event 7 of 7
",
        "order-log resumes after event 7
order-log stands at event 7 of 7
",
    ];
    for expected in runs {
        assert_eq!(success(&run_example(&[], Some(&server.url()))), expected);
    }
}

#[test]
fn the_example_verifies_its_store_and_leaves_nothing_behind() {
    let server = RedisServer::start();
    for _ in 0..2 {
        let told = success(&run_example(&["--verify"], Some(&server.url())));
        assert_eq!(told, "the store keeps every promise\n");
    }
    assert_eq!(redis::cmd("DBSIZE").query(&mut server.client()), Ok(0));
}

#[test]
fn the_example_says_what_it_lacks() {
    let output = run_example(&[], None);
    assert!(failure(&output).starts_with("error: REDIS_URL"));
    let output = run_example(&["--unknown"], None);
    assert!(failure(&output).starts_with("error: "));

    let nobody = format!("redis://:{PASSWORD}@127.0.0.1:{}/", free_port());
    for arguments in [&[][..], &["--verify"]] {
        let told = failure(&run_example(arguments, Some(&nobody)));
        assert!(told.starts_with("error: ") && told.contains("refused"), "{told}");
        assert!(!told.contains(PASSWORD), "{told}");
    }
}

fn run_example(arguments: &[&str], redis_url: Option<&str>) -> Output {
    let mut command = example("redis_store", "redis_store.rs");
    command.args(arguments).envs(redis_url.map(|url| ("REDIS_URL", url)));
    command.output().expect("the example runs")
}
