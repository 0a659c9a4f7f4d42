//! No password, and nothing else of the parameters, in anything that is printed.

use std::fmt::Debug;
use std::time::Duration;

use checkpoint_store::{Cadence, CheckpointStore, Checkpointer, Error, PostgresCheckpointStore};

use crate::harness::{self, Options, Server, chain, sql_state};

const PASSWORD: &str = "correct horse hunter2";
const SECRETS: [&str; 3] = ["hunter2", "horse", "an-application"];

fn scram() -> Server {
    let server = Server::start(Options {
        password: Some(PASSWORD.to_owned()),
        ..Options::fast().set("password_encryption", "scram-sha-256")
    });
    let stored: String = harness_client(&server)
        .query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'", &[])
        .unwrap()
        .get(0);
    assert!(stored.starts_with("SCRAM-SHA-256$"), "{stored}");
    server
}

fn harness_client(server: &Server) -> checkpoint_store::postgres::Client {
    harness::client(&params(server, PASSWORD))
}

fn params(server: &Server, password: &str) -> String {
    format!(
        "host=127.0.0.1 port={} user=postgres password='{password}' \
         application_name=an-application connect_timeout=1",
        server.port()
    )
}

fn tells_nothing(what: &str, shown: &str) {
    for secret in SECRETS {
        assert!(!shown.contains(secret), "{what}: {shown}");
    }
}

fn debugged(what: &str, value: &impl Debug) {
    tells_nothing(what, &format!("{value:?} {value:#?}"));
}

fn assert_tells_no_secret(error: &Error) {
    tells_nothing("an error", &format!("{error:?} {error:#?} {error}"));
    tells_nothing("a chain of causes", &chain(error));
}

#[test]
fn a_wrong_password_is_named_at_once_and_not_shown() {
    let server = scram();
    for (password, state, says) in [
        ("wrong hunter2", Some("28P01"), "password authentication failed"),
        ("", None, "password missing"),
    ] {
        let params = match password {
            "" => format!("host=127.0.0.1 port={} user=postgres", server.port()),
            _ => params(&server, password),
        };
        let error = PostgresCheckpointStore::connect(&params).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), state);
        assert!(chain(&error).contains(says), "{}", chain(&error));
        assert_tells_no_secret(&error);
    }
}

#[test]
fn nothing_that_can_be_printed_tells_a_secret() {
    let server = scram();
    let params = params(&server, PASSWORD);
    let url = format!(
        "postgres://postgres:{}@127.0.0.1:{}/postgres?application_name=an-application",
        PASSWORD.replace(' ', "%20"),
        server.port()
    );
    let builder = PostgresCheckpointStore::builder();
    debugged("the builder", &builder);
    let store = builder.clone().connect(&url).unwrap();
    debugged("a store", &store);
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    debugged("a store that was used", &store);
    debugged("a checkpoint", &store.find("orders").unwrap());
    debugged("one of its connections", &store.connection().unwrap());
    debugged(
        "a checkpointer",
        &Checkpointer::resume(store.clone(), "orders", Cadence::every(1)).unwrap(),
    );

    // An error of each kind that is to be had.
    let small = |params: &str| {
        PostgresCheckpointStore::new(harness::pool(params, 1, Duration::from_millis(500)))
    };
    let exhausted = small(&params);
    let held = exhausted.connection().unwrap();
    let no_table = builder.clone().table("not there").connect(&params).unwrap();
    let errors = [
        store.save("", 1).unwrap_err(),
        store.save("orders", -1).unwrap_err(),
        store.advance("orders", 7, 8).unwrap_err(),
        builder.clone().table("").connect(&params).unwrap_err(),
        builder.clone().max_connections(0).connect(&params).unwrap_err(),
        no_table.save("orders", 1).unwrap_err(),
        exhausted.get("orders").unwrap_err(),
        small(&self::params(&server, "wrong hunter2")).get("orders").unwrap_err(),
        PostgresCheckpointStore::connect(&format!("{params} sslmode=require")).unwrap_err(),
        PostgresCheckpointStore::connect(&params.replace("host=127.0.0.1", "")).unwrap_err(),
        PostgresCheckpointStore::connect(&params.replace("127.0.0.1", "no.such.host.invalid"))
            .unwrap_err(),
        PostgresCheckpointStore::connect(&format!("{params} dbname=not-there")).unwrap_err(),
        PostgresCheckpointStore::connect(&format!("{params} nonsense=hunter2")).unwrap_err(),
        PostgresCheckpointStore::connect(&format!("{params} port=hunter2")).unwrap_err(),
        PostgresCheckpointStore::connect(&params.replace('\'', "")).unwrap_err(),
        PostgresCheckpointStore::connect(&url.replace("127.0.0.1", "[::1")).unwrap_err(),
    ];
    errors.iter().for_each(assert_tells_no_secret);
    drop(held);

    let refused = builder.clone().connect(&params).unwrap();
    refused
        .connection()
        .unwrap()
        .batch_execute("ALTER TABLE projection_checkpoints ALTER \"offset\" DROP NOT NULL")
        .unwrap();
    let error = refused.migrate().unwrap_err();
    assert!(matches!(error, Error::IncompatibleTable { .. }), "{error:?}");
    assert_tells_no_secret(&error);

    // A server that is gone, for a connection that is there and for one that is not.
    let mut client = store.connection().unwrap();
    let mut tx = client.transaction().unwrap();
    server.crash();
    let lost = store.in_transaction(&mut tx).save("orders", 2).unwrap_err();
    assert!(matches!(lost, Error::Unavailable { .. }), "{lost:?}");
    assert_tells_no_secret(&lost);
    assert_tells_no_secret(&exhausted.advance("orders", 1, 2).unwrap_err());
    assert_tells_no_secret(&exhausted.get("orders").unwrap_err());
    assert_tells_no_secret(&PostgresCheckpointStore::connect(&params).unwrap_err());
    debugged("a store without a server", &exhausted);
}

/// Parameters of other drivers, and of people in a hurry: neither the store nor the server repeats
/// what may be the password.
#[test]
fn parameters_that_are_misread_show_no_password() {
    let port = crate::harness::server().port();
    for params in [
        format!("host=127.0.0.1;port={port};username=app;password=hunter2;database=app"),
        format!("Host=127.0.0.1;Port={port};Username=app;Password=hunter2;Database=app"),
        format!("Server=127.0.0.1;Port={port};User Id=postgres;Password=hunter2;"),
        format!("host=127.0.0.1,port={port},user=postgres,password=hunter2"),
        format!("host=127.0.0.1 port={port} user=postgres dbname=x;password=hunter2"),
        format!("host=127.0.0.1 port={port} user=postgres;password=hunter2"),
        format!("host=127.0.0.1 port={port} user=postgres,password=hunter2"),
        format!("host=127.0.0.1 port={port} user=postgres options='-c jit=off password=hunter2'"),
        format!("host=127.0.0.1 port={port} user=postgres options='-c x=1 hunter2'"),
        format!("postgres://postgres:hunter@2@127.0.0.1:{port}/postgres"),
        format!("postgres://postgres:hunter2@127.0.0.1:{port}/postgres;password=hunter2"),
        format!("postgres://postgres:x@127.0.0.1:{port}/postgres&password=hunter2"),
        format!("postgres://postgres:hunter2@127.0.0.1:{port}/postgres?schema=hunter2"),
        format!("jdbc:postgresql://127.0.0.1:{port}/postgres?user=postgres&password=hunter2"),
        format!("postgres://postgres:hunter2#@127.0.0.1:{port}/a\nb"),
        format!("postgres://postgres:correct@horse:hunter2@127.0.0.1:{port}/postgres"),
        format!("postgres://postgres:hunter?horse=2@127.0.0.1:{port}/postgres?a=b@horse"),
        format!("postgres://postgres@127.0.0.1:{port}/postgres?password=a&horse=b"),
        format!("postgres://127.0.0.1:{port}/postgres user=postgres password=hunter2"),
        format!("host=127.0.0.1 port={port} user=postgres password=correct horse=hunter2"),
        format!("host=127.0.0.1 port={port} dbname=postgres://postgres:hunter2@127.0.0.1/app"),
        format!("host=127.0.0.1 port={port} user='postgres password = hunter2'"),
        format!("host=127.0.0.1 port={port} user=postgres,pwd=hunter2 sslmode=disable"),
        format!("host=127.0.0.1 port={port} options='-c x=1 --access_token=hunter2'"),
        format!("host=/tmp;port={port};user=postgres;password=hunter2"),
    ] {
        let error = PostgresCheckpointStore::connect(&params).map(drop).unwrap_err();
        assert!(
            matches!(error, Error::Backend { operation: "connect", .. }),
            "{params}: {error:?}"
        );
        assert!(!error.is_transient());
        assert_tells_no_secret(&error);
    }
    // A line's end behind a URL is not a part of it.
    let url = format!("  {}\n", crate::harness::server().url("postgres"));
    PostgresCheckpointStore::connect(&url).unwrap().connection().unwrap();
}
