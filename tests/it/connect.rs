//! What is wrong with the parameters is said at once, with the cause, and without the password.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Config, NoTls};
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::faults::this_program;
use crate::harness::{
    Gate, Options, Server, chain, client, free_port, privileged, server, sql_state, wait_until,
};

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
    // No other connection is being made when the password changes.
    let store = PostgresCheckpointStore::builder()
        .max_connections(1)
        .connect(&format!("{params} password='correct horse'"))
        .unwrap();
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
fn the_connection_of_connect_is_the_pools_first_and_others_are_opened_as_they_are_needed() {
    let store = PostgresCheckpointStore::connect(&server().params()).unwrap();
    assert_eq!(store.pool_state().connections, 1);
    assert_eq!(store.pool_state().idle_connections, 1);
    let first = store.connection().unwrap();
    assert_eq!(store.pool_state().connections, 1);
    let second = store.connection().unwrap();
    assert_eq!(store.pool_state().connections, 2);
    drop((first, second));
    store.migrate().unwrap();
    assert_eq!(store.pool_state().connections, 2);
}

#[test]
fn of_two_hosts_the_one_that_refuses_decides_in_either_order_and_the_text_names_both() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let (refusing, down) = (server.port(), free_port());
    let connect = |ports: [u16; 2], password: &str| {
        let [one, other] = ports;
        let params = format!(
            "host=127.0.0.1,127.0.0.1 port={one},{other} user=postgres password={password}"
        );
        refusal(&params)
    };
    for ports in [[refusing, down], [down, refusing]] {
        let error = connect(ports, "hunter2");
        assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
        let told = chain(&error);
        assert!(told.contains(&format!("127.0.0.1:{refusing}: FATAL: password auth")), "{told}");
        assert!(told.contains(&format!("127.0.0.1:{down}: error connecting")), "{told}");
        assert!(told.contains("Connection refused"), "{told}");
    }
    let error = connect([down, free_port()], "hunter2");
    assert!(error.is_transient(), "{error:?}");

    // A server that starts says more than one that is down, and is waited for all the same.
    let starting = Gate::to(refusing);
    starting.refuse();
    for ports in [[starting.port(), down], [down, starting.port()]] {
        let error = connect(ports, "hunter2");
        assert!(error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("XX000"));
    }
    for ports in [[starting.port(), refusing], [refusing, starting.port()]] {
        let error = connect(ports, "hunter2");
        assert!(!error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
    }
}

#[test]
fn a_config_connects_as_its_text_does() {
    let password = r#"it's a "hunter2" \ = %"#;
    let server = Server::start(Options { password: Some(password.to_owned()), ..Options::fast() });
    let mut config = Config::new();
    config.host("127.0.0.1").port(server.port()).user("postgres").password(password);
    let builder = PostgresCheckpointStore::builder();
    let store = builder.clone().connect_config(config.clone(), NoTls).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    assert_eq!(store.get("orders").unwrap(), 1);

    config.password("hunter2");
    let error = builder.clone().connect_config(config, NoTls).unwrap_err();
    assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
    let error = builder.connect_config(Config::new(), NoTls).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && !error.is_transient(), "{error:?}");
    assert!(chain(&error).contains("no host"), "{}", chain(&error));
}

#[test]
fn connect_keeps_within_its_time_limit_and_leaves_time_for_the_second_host() {
    const LIMIT: Duration = Duration::from_secs(3);
    let mute = Gate::mute();
    let connect = |params: &str| {
        let started = Instant::now();
        let connected =
            PostgresCheckpointStore::builder().connection_timeout(LIMIT).connect(params);
        assert!(started.elapsed() < LIMIT + Duration::from_secs(2), "{:?}", started.elapsed());
        connected
    };
    let error = connect(&mute.params()).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert!(chain(&error).contains(&format!("no answer from 127.0.0.1:{}", mute.port())));

    let mute = Gate::mute();
    let port = server().port();
    let two = format!("host=127.0.0.1,127.0.0.1 port={},{port} user=postgres", mute.port());
    connect(&two).unwrap();
    let three = Gate::mute();
    let error = connect(&format!(
        "host=127.0.0.1,127.0.0.1,127.0.0.1 port={},{},{} user=postgres",
        mute.port(),
        three.port(),
        free_port()
    ))
    .unwrap_err();
    assert!(error.is_transient() && chain(&error).contains("Connection refused"), "{error:?}");
}

/// Runs a test once more, in a process of its own, with a variable set.
fn in_a_process_of_its_own(test: &str, variable: &str, value: &str) {
    let output = this_program(&format!("connect::{test}"))
        .env(variable, value)
        .output()
        .expect("this program starts");
    let (told, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}\n{complaint}");
    assert!(told.contains("1 passed"), "{told}");
}

fn entries(folder: &str) -> usize {
    fs::read_dir(folder).expect("Linux").count()
}

#[test]
fn fifty_calls_of_connect_at_a_mute_server_leave_a_few_threads_and_descriptors_behind() {
    const VARIABLE: &str = "CHECKPOINT_STORE_MUTE_PARAMS";
    const MOST_LOGINS: usize = 4;
    // A socket, and what a runtime needs.
    const DESCRIPTORS_A_LOGIN: usize = 6;
    if let Ok(params) = std::env::var(VARIABLE) {
        let count = || (entries("/proc/self/task"), entries("/proc/self/fd"));
        let (threads, descriptors) = count();
        let builder =
            PostgresCheckpointStore::builder().connection_timeout(Duration::from_millis(1_500));
        thread::scope(|scope| {
            for _ in 0..10 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let error = builder.clone().connect(&params).unwrap_err();
                        assert!(error.is_transient(), "{error:?}");
                    }
                });
            }
        });
        wait_until("only a few are left", || {
            let now = count();
            now.0 <= threads + MOST_LOGINS
                && now.1 <= descriptors + MOST_LOGINS * DESCRIPTORS_A_LOGIN
        });
        return;
    }
    let gate = Gate::mute();
    in_a_process_of_its_own(
        "fifty_calls_of_connect_at_a_mute_server_leave_a_few_threads_and_descriptors_behind",
        VARIABLE,
        &gate.params(),
    );
    assert!(gate.accepted() >= 50, "{}", gate.accepted());
}

/// The name server is another one for a process whose `/etc/resolv.conf` is another one.
#[test]
fn a_name_server_that_does_not_answer_costs_the_time_of_one_host() {
    const VARIABLE: &str = "CHECKPOINT_STORE_SILENT_NAME_SERVER_PORT";
    const TEST: &str = "connect::a_name_server_that_does_not_answer_costs_the_time_of_one_host";
    const ADDRESS: &str = "127.83.4.9";
    if let Ok(port) = std::env::var(VARIABLE) {
        let _silent = UdpSocket::bind((ADDRESS, 53)).expect("the port of name servers");
        let connect = |hosts: &str, connect_timeout: u64| {
            let params =
                format!("host={hosts} port={port} user=postgres connect_timeout={connect_timeout}");
            let started = Instant::now();
            let connected = PostgresCheckpointStore::connect(&params);
            (connected, started.elapsed())
        };
        let (error, waited) = connect("a.name.example", 1);
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        let told = chain(&error);
        assert!(told.contains("a.name.example") && told.contains("name server"), "{told}");
        assert!(waited < Duration::from_secs(4), "{waited:?}");

        let (connected, _) = connect("b.name.example,127.0.0.1", 1);
        connected.expect("the second host is tried");
        let (connected, waited) = connect("127.0.0.1,c.name.example", 30);
        connected.expect("the first host is there");
        assert!(waited < AT_ONCE, "{waited:?}: the name of the second is not looked up for that");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    fs::write(&file, format!("nameserver {ADDRESS}\n")).unwrap();
    let program = this_program(TEST);
    let through = privileged("unshare");
    let script = "mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"";
    let output = Command::new(&through[0])
        .args(&through[1..])
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&file)
        .arg("env")
        .arg(format!("{VARIABLE}={}", server().port()))
        .arg(program.get_program())
        .args(program.get_args())
        .output()
        .expect("this test needs root, or sudo without a password, to run `unshare`");
    let (told, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && told.contains("1 passed"), "{told}\n{complaint}");
}

/// Leaves the process so many of something, for as long as `work` runs.
fn with_limit<T>(resource: Resource, limit: u64, work: impl FnOnce() -> T) -> T {
    let before = getrlimit(resource);
    setrlimit(resource, Rlimit { current: Some(limit), ..before }).unwrap();
    let outcome = work();
    setrlimit(resource, before).unwrap();
    outcome
}

#[test]
fn a_login_without_file_descriptors_is_an_error_that_says_so() {
    const VARIABLE: &str = "CHECKPOINT_STORE_NO_DESCRIPTORS_PARAMS";
    if let Ok(params) = std::env::var(VARIABLE) {
        // It is closed at once, and what a runtime opens once for the process remains.
        drop(client(&params));
        let used = entries("/proc/self/fd");
        // Between none at all and enough for a login there are several places where it fails.
        for spare in 0..3 {
            wait_until("the connection is closed", || entries("/proc/self/fd") <= used);
            let error = with_limit(Resource::Nofile, 256, || {
                let open = || fs::File::open("/dev/null").ok();
                let mut used: Vec<_> = std::iter::from_fn(open).collect();
                used.truncate(used.len() - spare);
                refusal(&params)
            });
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.is_transient(), "{error:?}");
            assert!(chain(&error).contains("Too many open files"), "{}", chain(&error));
            PostgresCheckpointStore::connect(&params).expect("it works again");
        }
        return;
    }
    in_a_process_of_its_own(
        "a_login_without_file_descriptors_is_an_error_that_says_so",
        VARIABLE,
        &server().params(),
    );
}

#[test]
fn a_login_without_a_thread_is_an_error_that_says_so() {
    const VARIABLE: &str = "CHECKPOINT_STORE_NO_THREADS_PARAMS";
    const TEST: &str = "connect::a_login_without_a_thread_is_an_error_that_says_so";
    if let Ok(params) = std::env::var(VARIABLE) {
        let error = with_limit(Resource::Nproc, 1, || refusal(&params));
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        assert!(chain(&error).contains("no thread could be started"), "{}", chain(&error));
        PostgresCheckpointStore::connect(&params).expect("it works again");
        return;
    }
    let mut program = this_program(TEST);
    program.env(VARIABLE, server().params());
    if geteuid().is_root() {
        // The limit does not hold for root. It counts what the user has, so nobody else is that user.
        program.uid(61_234).gid(61_234);
    }
    let output = program.output().expect("this program starts");
    let (told, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && told.contains("1 passed"), "{told}\n{complaint}");
}
