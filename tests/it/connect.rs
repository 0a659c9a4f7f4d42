//! What is wrong with the parameters is said at once, with the cause, and without the password.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use crate::harness::{Options, Server, chain, server, sql_state, wait_until};

const AT_ONCE: Duration = Duration::from_secs(5);

fn refusal(params: &str) -> Error {
    let started = Instant::now();
    let refused = PostgresCheckpointStore::connect(params);
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    let error = refused.expect_err("a refusal");
    let shown = format!("{error:?} {}", chain(&error));
    assert!(!shown.contains("hunter2"), "{shown}");
    error
}

#[test]
fn a_wrong_host_is_named_at_once() {
    let error = refusal("host=no.such.host.invalid user=postgres password=hunter2");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(chain(&error).contains("server no.such.host.invalid:5432"), "{}", chain(&error));
}

#[test]
fn a_server_that_is_not_there_is_named_at_once() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let error = refusal(&format!("postgres://app:hunter2@127.0.0.1:{port}/app"));
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    let told = chain(&error);
    assert!(told.contains(&format!("127.0.0.1:{port}")) && told.contains("refused"), "{told}");
}

#[test]
fn a_wrong_database_is_named_at_once() {
    let error = refusal(&server().url("no_such_database"));
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(!error.is_transient(), "waiting does not make a database");
    assert_eq!(sql_state(&error).as_deref(), Some("3D000"));
    assert!(chain(&error).contains("no_such_database"), "{}", chain(&error));
}

#[test]
fn a_wrong_password_and_a_wrong_user_are_named_at_once() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let with = |login: &str| format!("host=127.0.0.1 port={} {login}", server.port());
    let correct = with("user=postgres password='correct horse'");
    PostgresCheckpointStore::connect(&correct).expect("the right password");

    let error = refusal(&with("user=postgres password=hunter2"));
    assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
    assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
    let error = refusal(&with("user=nobody password=hunter2"));
    assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
    let error = refusal(&with("user=postgres"));
    assert!(chain(&error).contains("password missing"), "{}", chain(&error));
    assert!(!error.is_transient());
}

#[test]
fn parameters_that_cannot_be_read_are_refused_without_quoting_them() {
    for params in [
        "host=localhost hunter2",
        "host=localhost password=not quoted hunter2=1",
        "host=localhost port=hunter2",
        "postgres://app:hunter2@[::1",
        "postgres://app@localhost/app?hunter2=1",
        "host=localhost password='hunter2",
    ] {
        let error = refusal(params);
        assert!(matches!(error, Error::Backend { operation: "connect", .. }), "{error:?}");
        assert!(!error.is_transient());
        assert!(chain(&error).contains("invalid connection string"), "{}", chain(&error));
    }
}

#[test]
fn an_unknown_option_is_named_with_what_to_do_and_nothing_else() {
    for (query, told) in [
        ("pgbouncer=true", "unknown option \"pgbouncer\"; remove it"),
        ("connect_timeout=2&schema=app", "unknown option \"schema\"; use builder().schema(..)"),
    ] {
        let error = refusal(&format!("{}?{query}", server().url("postgres")));
        assert_eq!(chain(&error), format!("connect failed: {told}"));
        assert!(!error.is_transient());
    }
    let error = refusal(&format!("{}?sslmode=verify-full", server().url("postgres")));
    let told = chain(&error);
    assert!(told.starts_with("connect failed: invalid value for option \"sslmode\"; "), "{told}");
    assert!(told.contains("require") && !told.contains("percent"), "{told}");
}

/// As managed services have their users write them, and as PostgreSQL allows them.
#[test]
fn names_with_any_character_lead_to_the_database() {
    let mut admin = server().client();
    for (number, user) in ["app@server", "service@project.iam", "DOM\\some;one", "pass through"]
        .into_iter()
        .enumerate()
    {
        let database = format!("R&D/{number}, a=b?@é");
        admin.batch_execute(&format!("CREATE ROLE \"{user}\" LOGIN")).unwrap();
        admin.batch_execute(&format!("CREATE DATABASE \"{database}\"")).unwrap();
        let encoded = |name: &str| {
            let bytes: Vec<_> = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
            bytes.concat()
        };
        let (port, quoted_user) = (server().port(), user.replace('\\', "\\\\"));
        for params in [
            format!("host=127.0.0.1 port={port} user='{quoted_user}' dbname='{database}'"),
            format!("postgres://{}@127.0.0.1:{port}/{}", encoded(user), encoded(&database)),
            format!(
                "postgres://127.0.0.1:{port}/?user={}&dbname={}",
                encoded(user),
                encoded(&database)
            ),
        ] {
            let store = PostgresCheckpointStore::connect(&params)
                .unwrap_or_else(|error| panic!("{params}: {}", chain(&error)));
            let row = store
                .connection()
                .unwrap()
                .query_one("SELECT current_user::text, current_database()::text", &[])
                .unwrap();
            assert_eq!((row.get(0), row.get(1)), (user, database.as_str()), "{params}");
        }
    }
}

#[test]
fn options_that_only_a_proxy_understands_reach_the_server() {
    for options in ["endpoint%3Dep-cool-name-123456", "project=ep-cool-name", "reference%3Dabcdef"]
    {
        let error = refusal(&format!("{}?options={options}", server().url("postgres")));
        assert!(matches!(error, Error::Unavailable { .. }), "{options}: {error:?}");
        let word = options.replace("%3D", "=");
        assert!(chain(&error).contains(&word), "{}", chain(&error));
    }
    for options in ["-c password_encryption=md5", "--work_mem=64kB -cjit=off -S 64 -fs"] {
        let params = format!("{} options='{options}'", server().params());
        PostgresCheckpointStore::connect(&params).expect("settings");
    }
}

#[test]
fn without_a_user_it_is_that_of_the_operating_system() {
    let id = std::process::Command::new("id").arg("-un").output().unwrap();
    let user = String::from_utf8(id.stdout).unwrap().trim().to_owned();
    let mut admin = server().client();
    let role = format!(
        "DO $$ BEGIN CREATE ROLE \"{user}\" LOGIN; EXCEPTION WHEN duplicate_object THEN END $$"
    );
    admin.batch_execute(&role).unwrap();
    let port = server().port();
    for params in [
        format!("postgres://127.0.0.1:{port}/postgres"),
        format!("host='' hostaddr=127.0.0.1 port={port} dbname=postgres"),
        format!("hostaddr=127.0.0.1 port={port} dbname=postgres"),
    ] {
        let store = PostgresCheckpointStore::connect(&params)
            .unwrap_or_else(|error| panic!("{params}: {}", chain(&error)));
        let row = store.connection().unwrap().query_one("SELECT current_user::text", &[]);
        assert_eq!(row.unwrap().get::<_, &str>(0), user);
    }
}

#[test]
fn parameters_without_a_host_are_refused() {
    for params in ["", "user=postgres password=hunter2"] {
        let error = refusal(params);
        assert!(chain(&error).contains("no host is given"), "{}", chain(&error));
        assert!(!error.is_transient(), "{error:?}");
    }
}

#[test]
fn tls_that_is_required_but_not_to_be_had_is_refused() {
    let error = refusal(&format!("{} sslmode=require", server().params()));
    assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
    assert!(chain(&error).to_lowercase().contains("tls"), "{}", chain(&error));
}

#[test]
fn a_pool_of_no_connections_is_refused() {
    let refused = PostgresCheckpointStore::builder().max_connections(0).connect(&server().params());
    assert!(matches!(refused, Err(Error::Backend { operation: "connect", .. })), "{refused:?}");
}

/// Once it has none left: a password that was changed does not come right by waiting.
#[test]
fn a_running_store_that_is_refused_says_so_without_waiting_for_its_time_out() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let params = format!("host=127.0.0.1 port={} user=postgres", server.port());
    let store =
        PostgresCheckpointStore::connect(&format!("{params} password='correct horse'")).unwrap();
    store.migrate().unwrap();
    let mut admin = store.connection().unwrap();
    admin.batch_execute("ALTER ROLE postgres PASSWORD 'another'").unwrap();
    admin
        .batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
        )
        .unwrap_err();
    wait_until("its end is noticed", || {
        admin.batch_execute("SELECT").is_err() && admin.is_closed()
    });
    drop(admin);
    let started = Instant::now();
    for refused in [store.connection().map(drop), store.get("orders").map(drop)] {
        // Far less than the time-out of one of them.
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("28P01"), "{}", chain(&error));
    }
}

#[test]
fn connections_are_opened_as_they_are_needed() {
    let store = PostgresCheckpointStore::connect(&server().params()).unwrap();
    assert_eq!(store.pool_state().connections, 0);
    store.migrate().unwrap();
    assert_eq!(store.pool_state().connections, 1);
}
