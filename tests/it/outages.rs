//! What becomes of connections, and what callers see of it: no outage twice, and no error that the
//! store can mend by itself.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, Config, NoTls, Socket, tls::MakeTlsConnect};
use checkpoint_store::r2d2::{ManageConnection, Pool};
use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, PooledClient, PostgresCheckpointStore, Result,
    validate_advance,
};
use rustix::process::Signal;

use crate::faults::Row;
use crate::harness::{
    self, Gate, Options, Proxy, Schema, Server, chain, signal_pid, sql_state, unique,
    wait_for_a_waiter, wait_until,
};

/// Far more than any of these waits takes, for a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(20);

/// Lock, save, commit, on a connection of the pool.
fn lock_and_save(store: &PostgresCheckpointStore, name: &str) -> Result<i64> {
    let mut client = store.connection()?;
    let mut tx = client.transaction()?;
    let next = store.in_transaction(&mut tx).lock(name)? + 1;
    store.in_transaction(&mut tx).save(name, next)?;
    tx.commit()?;
    Ok(next)
}

/// Has the pool open so many connections, and leaves them idle.
fn open_connections(store: &PostgresCheckpointStore, count: u32) {
    let held: Vec<_> = (0..count).map(|_| store.connection().unwrap()).collect();
    drop(held);
    assert_eq!(store.pool_state().idle_connections, count);
}

/// Ends every session but that of who asks, and waits until they are gone.
fn end_sessions(admin: &mut Client) {
    harness::end_sessions(admin);
    wait_until("the sessions are gone", || {
        let others = "SELECT count(*) FROM pg_stat_activity
                      WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        admin.query_one(others, &[]).unwrap().get::<_, i64>(0) == 0
    });
}

/// One store of the builder's, and one on a pool of the caller's own.
fn both_kinds(params: &str, connections: u32) -> [PostgresCheckpointStore; 2] {
    let builder = PostgresCheckpointStore::builder().max_connections(connections);
    let pool = harness::pool(params, connections, Duration::from_secs(30));
    [builder.connect(params).unwrap(), PostgresCheckpointStore::new(pool)]
}

#[test]
fn ten_connections_that_died_idle_are_at_most_one_error() {
    const CONNECTIONS: u32 = 10;
    let server = Server::start(Options::fast());
    for (kind, store) in both_kinds(&server.params(), CONNECTIONS).into_iter().enumerate() {
        store.migrate().unwrap();
        for restart in [true, false] {
            open_connections(&store, CONNECTIONS);
            if restart {
                server.stop();
                server.restart();
            } else {
                end_sessions(&mut server.client());
            }
            let name = format!("{kind} {restart}");
            let started = Instant::now();
            let outcomes: Vec<_> = (0..CONNECTIONS).map(|_| lock_and_save(&store, &name)).collect();
            let errors: Vec<_> =
                outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
            assert!(errors.len() <= 1, "{errors:?}");
            assert!(errors.iter().all(|error| error.is_transient()), "{errors:?}");
            let succeeded = outcomes.len() - errors.len();
            assert_eq!(store.get(&name).unwrap(), i64::try_from(succeeded).unwrap());
            // Other operations find nothing left to stumble over.
            open_connections(&store, CONNECTIONS);
            store.advance("another", 0, 1).unwrap();
            store.delete("another").unwrap();
            if kind == 0 && restart {
                let fault =
                    "10 idle connections, server restarted, 10 transactions through `connection()`";
                Row::asserted(fault, 1, errors.len(), started.elapsed()).print();
            }
        }
    }
}

#[test]
fn a_server_that_ends_idle_sessions_is_no_error_to_anybody() {
    let schema = Schema::new();
    let application = unique("idle");
    let params = format!(
        "{} application_name={application} options='-c idle_session_timeout=1200ms'",
        harness::server().params()
    );
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .connect(&params)
        .unwrap();
    let mut observer = harness::server().client();
    let mut wait_until_it_has_ended = || {
        wait_until("the session has been ended", || {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
            observer.query_one(query, &[&application]).unwrap().get::<_, i64>(0) == 0
        });
    };
    let mut checkpointer = Checkpointer::resume(&store, "loop", Cadence::every(1)).unwrap();
    for event in 1..=3 {
        wait_until_it_has_ended();
        store.advance("orders", event - 1, event).unwrap();
        wait_until_it_has_ended();
        assert!(checkpointer.processed(event).unwrap());
        wait_until_it_has_ended();
        assert_eq!(lock_and_save(&store, "by hand").unwrap(), event);
        wait_until_it_has_ended();
        assert_eq!(store.project("whole", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(event));
    }
}

fn set_read_only(server: &Server, read_only: bool) {
    let mut admin = server.client();
    let value = if read_only { "on" } else { "off" };
    admin.batch_execute("SET default_transaction_read_only = off").unwrap();
    admin
        .batch_execute(&format!("ALTER SYSTEM SET default_transaction_read_only = {value}"))
        .unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("every session knows it", || {
        let row = server.client().query_one("SHOW default_transaction_read_only", &[]).unwrap();
        row.get::<_, &str>(0) == value
    });
}

#[test]
fn where_one_of_two_hosts_turns_read_only_the_store_goes_on_at_the_other_and_says_nothing() {
    let (one, other) = (Server::start(Options::fast()), Server::start(Options::fast()));
    let params = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres target_session_attrs=read-write",
        one.port(),
        other.port()
    );
    for server in [&one, &other] {
        PostgresCheckpointStore::connect(&server.params()).unwrap().migrate().unwrap();
    }
    let mut longest = Duration::ZERO;
    for store in both_kinds(&params, 3) {
        open_connections(&store, 3);
        store.save("orders", 1).unwrap();
        set_read_only(&one, true);
        let started = Instant::now();
        store.advance("advanced", 0, 1).unwrap();
        store.save("orders", 2).unwrap();
        store.save_many(&[("orders", 3)]).unwrap();
        assert_eq!(store.project("projected", |_, _| Ok(Some(7))).unwrap(), Some(7));
        assert_eq!(store.get("orders").unwrap(), 3);
        assert!(store.delete("projected").unwrap() && store.delete("advanced").unwrap());
        longest = longest.max(started.elapsed());
        let there = PostgresCheckpointStore::connect(&other.params()).unwrap();
        assert_eq!(there.get("orders").unwrap(), 3);
        set_read_only(&one, false);
    }
    let fault = "one of two hosts turns read-only and keeps its connections";
    Row::asserted(fault, 2, 0, longest).print();
}

#[test]
fn a_proxy_that_leads_to_another_server_while_the_old_one_keeps_its_connections_is_followed() {
    let (old, new) = (Server::start(Options::fast()), Server::start(Options::fast()));
    let gate = Gate::to(old.port());
    for server in [&old, &new] {
        PostgresCheckpointStore::connect(&server.params()).unwrap().migrate().unwrap();
    }
    for store in both_kinds(&gate.params(), 4) {
        gate.lead_to(old.port());
        open_connections(&store, 4);
        store.save("orders", 1).unwrap();
        set_read_only(&old, true);
        gate.lead_to(new.port());
        store.advance("advanced", 0, 1).unwrap();
        store.save("orders", 2).unwrap();
        assert_eq!(store.project("projected", |_, _| Ok(Some(7))).unwrap(), Some(7));
        let there = PostgresCheckpointStore::connect(&new.params()).unwrap();
        assert_eq!(there.all().unwrap().len(), 3);
        for checkpoint in there.all().unwrap() {
            there.delete(&checkpoint.projection).unwrap();
        }
        set_read_only(&old, false);
    }
}

#[test]
fn of_transactions_that_are_nothing_but_the_callers_one_finds_out_that_the_server_is_read_only() {
    let (old, new) = (Server::start(Options::fast()), Server::start(Options::fast()));
    let gate = Gate::to(old.port());
    for server in [&old, &new] {
        PostgresCheckpointStore::connect(&server.params()).unwrap().migrate().unwrap();
    }
    let (mut errors, mut longest) = (0, Duration::ZERO);
    for (name, store) in ["ours", "theirs"].into_iter().zip(both_kinds(&gate.params(), 4)) {
        gate.lead_to(old.port());
        open_connections(&store, 4);
        lock_and_save(&store, name).unwrap();
        set_read_only(&old, true);
        gate.lead_to(new.port());
        let started = Instant::now();
        let refused: Vec<_> = (0..10).filter_map(|_| lock_and_save(&store, name).err()).collect();
        longest = longest.max(started.elapsed());
        assert!(refused.len() <= 1, "{refused:?}");
        for error in &refused {
            assert!(error.is_transient(), "{error:?}");
            assert_eq!(sql_state(error).as_deref(), Some("25006"));
        }
        errors += refused.len();
        let there = PostgresCheckpointStore::connect(&new.params()).unwrap();
        assert_eq!(there.get(name).unwrap(), 10 - i64::try_from(refused.len()).unwrap());
        // Where the fresh connection leads to a read-only server too, it is given out all the same.
        set_read_only(&new, true);
        for _ in 0..3 {
            let error = lock_and_save(&store, name).unwrap_err();
            assert_eq!(sql_state(&error).as_deref(), Some("25006"));
        }
        assert_eq!(store.get(name).unwrap(), there.get(name).unwrap());
        set_read_only(&new, false);
        set_read_only(&old, false);
    }
    let fault = "the server turns read-only and keeps its connections: lock, save, commit";
    Row::asserted(fault, 2, errors, longest).print();
}

#[test]
fn once_a_server_is_found_to_be_read_only_nobody_reads_there_any_more() {
    let (old, new) = (Server::start(Options::fast()), Server::start(Options::fast()));
    let gate = Gate::to(old.port());
    for (server, offset) in [(&old, 1), (&new, 2)] {
        let there = PostgresCheckpointStore::connect(&server.params()).unwrap();
        there.migrate().unwrap();
        there.save("orders", offset).unwrap();
    }
    for store in both_kinds(&gate.params(), 4) {
        gate.lead_to(old.port());
        open_connections(&store, 4);
        for _ in 0..4 {
            assert_eq!(store.get("orders").unwrap(), 1);
        }
        set_read_only(&old, true);
        gate.lead_to(new.port());
        let error = lock_and_save(&store, "orders").unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("25006"));
        for _ in 0..10 {
            assert_eq!(store.get("orders").unwrap(), 2);
        }
        set_read_only(&old, false);
    }
}

#[test]
fn one_server_that_stays_read_only_is_a_clear_error_in_the_end_and_one_that_recovers_is_none() {
    let server = Server::start(Options::fast());
    let patient = PostgresCheckpointStore::connect(&server.params()).unwrap();
    patient.migrate().unwrap();
    patient.save("orders", 1).unwrap();
    let impatient = PostgresCheckpointStore::builder()
        .connection_timeout(Duration::from_secs(2))
        .connect(&server.params())
        .unwrap();
    impatient.save("orders", 1).unwrap();
    set_read_only(&server, true);
    for refused in [
        impatient.save("orders", 2),
        impatient.advance("orders", 1, 2),
        impatient.project("orders", |_, _| Ok(Some(2))).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Backend { .. }) && error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("25006"));
    }
    assert_eq!(impatient.get("orders").unwrap(), 1);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| patient.advance("orders", 1, 2));
        wait_until("it has been refused", || {
            let log = std::fs::read_to_string(server.folder().join("log")).unwrap();
            log.matches("read-only transaction").count() > 6
        });
        set_read_only(&server, false);
        waiting.join().unwrap().unwrap();
    });
    // What the caller's own statement runs into is for the caller to judge.
    set_read_only(&server, true);
    let mut client = impatient.connection().unwrap();
    let own = client.batch_execute("CREATE TABLE another ()").map_err(Error::from).unwrap_err();
    assert!(!own.is_transient(), "{own:?}");
}

#[test]
fn a_failed_transaction_that_was_left_open_is_thrown_away_with_its_connection() {
    let schema = Schema::new();
    let pool = harness::pool(&harness::server().params(), 1, Duration::from_secs(30));
    let builder = PostgresCheckpointStore::builder().schema(&schema.name);
    let stores = [
        builder.clone().max_connections(1).connect(&harness::server().params()).unwrap(),
        builder.build(pool).unwrap(),
    ];
    for store in stores {
        let leave_one_open = || {
            let mut client = store.connection().unwrap();
            client.batch_execute("BEGIN").unwrap();
            client.batch_execute("SELECT 1 / 0").unwrap_err();
        };
        let operations: [&dyn Fn() -> Result<()>; 7] = [
            &|| store.save("orders", 1),
            &|| store.advance("orders", 1, 2),
            &|| store.get("orders").map(|offset| assert_eq!(offset, 2)),
            &|| store.all().map(drop),
            &|| store.save_many(&[("orders", 3)]),
            &|| store.project("orders", |_, _| Ok(Some(4))).map(drop),
            &|| store.delete("orders").map(|there| assert!(there)),
        ];
        for operation in operations {
            leave_one_open();
            operation().unwrap();
        }
    }
}

/// After the commit: the row is written, and the session ends with an error of any code.
#[test]
fn an_error_that_ends_the_session_is_a_lost_connection_whatever_its_code() {
    let schema = Schema::new();
    let gate = Gate::to(harness::server().port());
    let store =
        PostgresCheckpointStore::builder().schema(&schema.name).connect(&gate.params()).unwrap();
    for (severity, code) in
        [("PANIC", "53100"), ("FATAL", "XX000"), ("FATAL", "57P01"), ("FATAL", "42501")]
    {
        schema.store.save("orders", 1).unwrap();
        store.get("orders").unwrap();
        gate.forge("SET \"offset\" = $3", severity, code);
        let error = store.advance("orders", 1, 2).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some(code));
        assert_eq!(store.get("orders").unwrap(), 2);

        let mut checkpointer = Checkpointer::resume(&store, "loop", Cadence::every(1)).unwrap();
        let next = checkpointer.offset() + 1;
        checkpointer.processed(next).unwrap();
        gate.forge("SET \"offset\" = $3", severity, code);
        checkpointer.processed(next + 1).unwrap_err();
        assert!(checkpointer.processed(next + 2).unwrap(), "it recognises its own save");
        assert_eq!(store.get("loop").unwrap(), next + 2);
        // What may run twice does.
        gate.forge("VALUES ($1, $2", severity, code);
        store.save("orders", 3).unwrap();
    }
}

/// A function on the table raises what it is named after.
fn raising(schema: &Schema) {
    schema
        .client()
        .batch_execute(
            "CREATE SEQUENCE raised;
             CREATE FUNCTION raise_it() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.projection_name LIKE 'raise %' THEN
                     PERFORM nextval('raised');
                     RAISE SQLSTATE USING ERRCODE = right(NEW.projection_name, 5);
                 END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER raise_it BEFORE INSERT OR UPDATE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION raise_it();"
                .replace("RAISE SQLSTATE USING", "RAISE 'on purpose' USING")
                .as_str(),
        )
        .unwrap();
}

#[test]
fn an_error_on_a_connection_that_lives_is_judged_by_its_code_and_is_no_loss() {
    let schema = Schema::new();
    raising(&schema);
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .connect(&format!(
            "{} options='-c search_path={}'",
            harness::server().params(),
            schema.name
        ))
        .unwrap();
    let mut client = schema.client();
    for (codes, transient) in [
        (["53100", "53200", "53300", "55006", "55P03", "58000", "58030"].as_slice(), true),
        (&["08000", "08006", "08P01", "22023", "23514", "42501", "57P01", "57P03", "XX000"], false),
    ] {
        for code in codes {
            client.batch_execute("SELECT setval('raised', 1)").unwrap();
            let error = store.save(&format!("raise {code}"), 1).unwrap_err();
            assert!(matches!(error, Error::Backend { .. }), "{code}: {error:?}");
            assert_eq!(error.is_transient(), transient, "{code}");
            assert_eq!(sql_state(&error).as_deref(), Some(*code));
            let row = client.query_one("SELECT last_value FROM raised", &[]).unwrap();
            assert_eq!(row.get::<_, i64>(0), 2, "{code}: it is not tried again");
            // The caller's own statement is judged likewise.
            let own = store
                .connection()
                .unwrap()
                .batch_execute(&format!("DO $$ BEGIN RAISE SQLSTATE '{code}'; END $$"))
                .map_err(Error::from)
                .unwrap_err();
            assert!(matches!(own, Error::Backend { .. }), "{code}: {own:?}");
            assert_eq!(own.is_transient(), transient, "{code}");
        }
    }
    assert_eq!(store.pool_state().connections, 1);
}

#[test]
fn a_time_out_of_the_stores_own_statement_is_transient_and_one_of_the_callers_is_not() {
    let schema = Schema::new();
    schema.store.save("held", 1).unwrap();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .connect(&format!("{} options='-c statement_timeout=50ms'", harness::server().params()))
        .unwrap();
    let mut holder = schema.client();
    let mut held = holder.transaction().unwrap();
    schema.store.in_transaction(&mut held).lock("held").unwrap();
    let in_transaction = || {
        let mut client = store.connection().unwrap();
        let mut tx = client.transaction().unwrap();
        store.in_transaction(&mut tx).lock("held").map(drop)
    };
    for timed_out in [
        store.save("held", 2),
        store.advance("held", 1, 2),
        store.project("held", |_, _| Ok(None)).map(drop),
        in_transaction(),
    ] {
        let error = timed_out.unwrap_err();
        assert_eq!(sql_state(&error).as_deref(), Some("57014"), "{error:?}");
        assert!(error.is_transient(), "{error:?}");
    }
    let mut client = store.connection().unwrap();
    let own = client.batch_execute("SELECT pg_sleep(60)").map_err(Error::from).unwrap_err();
    assert_eq!(sql_state(&own).as_deref(), Some("57014"));
    assert!(!own.is_transient(), "{own:?}");
    assert_eq!(own.to_string(), "a statement of the caller failed");
}

#[test]
fn a_host_that_accepts_and_never_answers_is_passed_over_and_asked_last_from_then_on() {
    let server = Server::start(Options::fast());
    let frozen = Server::start(Options::fast());
    let mute = Gate::mute();
    let mut longest = Duration::ZERO;
    for silent_port in [mute.port(), frozen.port()] {
        let params = format!(
            "host=127.0.0.1,127.0.0.1 port={silent_port},{} user=postgres connect_timeout=1",
            server.port()
        );
        signal_pid(frozen.pid(), Signal::STOP);
        let started = Instant::now();
        let store = PostgresCheckpointStore::connect(&params).unwrap();
        longest = longest.max(started.elapsed());
        store.migrate().unwrap();
        for round in 1..=3 {
            store.save("orders", round).unwrap();
            end_sessions(&mut server.client());
        }
        signal_pid(frozen.pid(), Signal::CONT);
    }
    assert!(longest < BOUND, "{longest:?}");
    assert_eq!(mute.accepted(), 1, "who owes an answer is not asked again before the others");
    let fault = "a host that accepts and never answers, named first (`connect_timeout` 1 s here)";
    Row::asserted(fault, 2, 0, longest).print();
}

/// So many logins may be under way at one address, in the whole process.
const MOST_LOGINS: usize = 4;

#[test]
fn a_proxy_that_was_mute_for_a_while_is_found_again_and_few_are_left_waiting_for_an_answer() {
    const WORKERS: usize = 6;
    let server = Server::start(Options::fast());
    let gate = Gate::to(server.port());
    let params = format!("{} connect_timeout=1", gate.params());
    let store = PostgresCheckpointStore::connect(&params).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    // What is not there could have been deleted by others when a save is repeated.
    (0..6).for_each(|worker| store.save(&format!("worker {worker}"), 0).unwrap());
    let mut longest = Duration::ZERO;
    for round in 1..=2 {
        let most_logins = MOST_LOGINS * round;
        let round = i64::try_from(round).unwrap();
        gate.fall_silent();
        end_sessions(&mut server.client());
        let accepted = gate.accepted();
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..WORKERS)
                .map(|worker| {
                    let store = &store;
                    scope.spawn(move || store.save(&format!("worker {worker}"), round))
                })
                .collect();
            wait_until("they have tried again and again", || gate.accepted() > accepted + 12);
            // The gate may be late to see that a probe has hung up.
            wait_until("those are all", || gate.unanswered() <= most_logins + WORKERS);
            gate.lead_to(server.port());
            let back = Instant::now();
            for waiter in waiting {
                waiter.join().unwrap().unwrap();
            }
            longest = longest.max(back.elapsed());
        });
        // The probes have hung up; what remains are the logins, which cannot be called off.
        wait_until("only those are left", || gate.unanswered() <= most_logins);
    }
    assert!(longest < BOUND, "{longest:?}");
    let fault = "a proxy accepts and says nothing, 6 calls waiting (wait: after it was back)";
    Row::asserted(fault, 2, 0, longest).print();
}

/// Tries to connect until it works, as a program does that starts before its database.
fn connect_in_a_loop(params: &str) {
    wait_until("a connection is made", || {
        let builder = PostgresCheckpointStore::builder().connection_timeout(BOUND);
        builder.connect(params).is_ok()
    });
}

/// Lets a proxy be unresponsive for so long, and measures how late it is found again.
fn recovery_of(
    gate: &Gate,
    server: &Server,
    become_unresponsive: impl FnOnce(&Gate),
    unresponsive_for: Duration,
) -> Duration {
    let params = format!("{} connect_timeout=1", gate.params());
    assert!(PostgresCheckpointStore::connect(&params).is_ok());
    become_unresponsive(gate);
    let since = Instant::now();
    thread::scope(|scope| {
        // More than may log in at once.
        let connecting: Vec<_> =
            (0..MOST_LOGINS + 2).map(|_| scope.spawn(|| connect_in_a_loop(&params))).collect();
        wait_until("the outage has lasted", || since.elapsed() > unresponsive_for);
        assert!(connecting.iter().all(|connecting| !connecting.is_finished()));
        let back = Instant::now();
        gate.lead_to(server.port());
        for connecting in connecting {
            connecting.join().unwrap();
        }
        back.elapsed()
    })
}

#[test]
fn a_proxy_that_has_recovered_is_used_again_within_seconds_however_long_it_was_unresponsive() {
    const OUTAGE: Duration = Duration::from_secs(14);
    // About two seconds, and as much for a machine that has other things to do.
    const SOON: Duration = Duration::from_secs(4);
    let server = Server::start(Options::fast());
    let gates = [Gate::to(server.port()), Gate::to(server.port())];
    thread::scope(|scope| {
        let outages = [Gate::fall_silent, Gate::answer_knocks_only];
        for (gate, become_unresponsive) in gates.iter().zip(outages) {
            let server = &server;
            scope.spawn(move || {
                let late = recovery_of(gate, server, become_unresponsive, OUTAGE);
                assert!(late < SOON, "{late:?}");
                assert!(gate.unanswered() <= MOST_LOGINS, "{}", gate.unanswered());
            });
        }
    });
}

#[test]
fn a_peer_that_answers_the_ssl_request_and_no_login_is_given_few_logins() {
    let server = Server::start(Options::fast());
    let gate = Gate::to(server.port());
    let params = format!("{} connect_timeout=1 application_name=late", gate.params());
    let store = PostgresCheckpointStore::connect(&params).unwrap();
    store.migrate().unwrap();
    store.save("orders", 0).unwrap();
    gate.answer_knocks_only();
    end_sessions(&mut server.client());
    let accepted = gate.accepted();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.save("orders", 1));
        wait_until("it has been tried again and again", || gate.accepted() > accepted + 12);
        assert!(gate.unanswered() <= MOST_LOGINS, "{}", gate.unanswered());
        gate.lead_to(server.port());
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(store.get("orders").unwrap(), 1);
    // A login that was answered after its caller had given up is used or closed.
    let mut observer = server.client();
    wait_until("no connection is left over", || {
        harness::sessions(&mut observer, "late") <= i64::from(store.pool_state().connections)
    });
}

#[test]
fn a_proxy_that_refuses_while_its_server_is_away_is_waited_for() {
    let server = Server::start(Options::fast());
    let gate = Gate::to(server.port());
    let store = PostgresCheckpointStore::connect(&gate.params()).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    gate.refuse();
    let error = PostgresCheckpointStore::connect(&gate.params()).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
    assert_eq!(sql_state(&error).as_deref(), Some("XX000"));

    end_sessions(&mut server.client());
    thread::scope(|scope| {
        let started = Instant::now();
        let waiting = scope.spawn(|| {
            store.save("orders", 2)?;
            store.get("orders")
        });
        // A password that was refused would have been given up by now.
        thread::sleep(Duration::from_secs(4));
        gate.lead_to(server.port());
        assert_eq!(waiting.join().unwrap().unwrap(), 2);
        assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
    });
}

#[test]
fn two_stores_on_one_pool_pay_for_a_loss_once() {
    let (one, other) = (Schema::new(), Schema::new());
    let proxy = Proxy::to(harness::server().port());
    let pool = harness::pool(
        &format!("{} application_name=shared_pool", proxy.params()),
        1,
        Duration::from_secs(30),
    );
    let on_the_pool = |schema: &Schema| {
        PostgresCheckpointStore::builder().schema(&schema.name).build(pool.clone()).unwrap()
    };
    let stores = [on_the_pool(&one), on_the_pool(&other)];
    for store in &stores {
        store.save("orders", 0).unwrap();
    }
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE application_name = 'shared_pool'";
    harness::server().client().batch_execute(end).unwrap();
    stores[0].get("orders").unwrap();
    // A connection is trusted for a second, and this machine may be slow: the fewest count.
    let mut offset = 0;
    let fewest = |offset: &mut i64| {
        let mut turn = || {
            let from = *offset;
            *offset += 1;
            let advance = |store: &PostgresCheckpointStore| {
                proxy.round_trips(|| store.advance("orders", from, from + 1).unwrap())
            };
            advance(&stores[0]) + advance(&stores[1])
        };
        (0..10).map(|_| turn()).min()
    };
    assert_eq!(fewest(&mut offset), Some(2));
    // And one that is taken out by the caller costs none.
    let taken_out = (0..10).map(|_| proxy.round_trips(|| stores[0].connection().unwrap())).min();
    assert_eq!(taken_out, Some(0));
}

#[test]
fn a_size_that_no_server_has_is_refused() {
    let params = harness::server().params();
    let of = |size| PostgresCheckpointStore::builder().max_connections(size).connect(&params);
    for size in [0, 262_144, u32::MAX] {
        let error = of(size).unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "connect", .. }), "{error:?}");
        assert!(chain(&error).contains("max_connections"), "{}", chain(&error));
    }
    assert_eq!(of(262_143).unwrap().pool_state().connections, 1);
}

#[test]
fn an_operation_gives_up_when_it_has_tried_for_as_long_as_it_was_told() {
    const PATIENCE: Duration = Duration::from_millis(1_300);
    let server = Server::start(Options::fast());
    let store = PostgresCheckpointStore::builder()
        .connection_timeout(PATIENCE)
        .connect(&server.params())
        .unwrap();
    store.migrate().unwrap();
    server.stop();
    let operations: [&dyn Fn() -> Result<()>; 5] = [
        &|| store.find("orders").map(drop),
        &|| store.save("orders", 1),
        &|| store.advance("orders", 0, 1),
        &|| store.connection().map(drop),
        &|| store.project("orders", |_, _| Ok(None)).map(drop),
    ];
    for operation in operations {
        let started = Instant::now();
        let error = operation().unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        let waited = started.elapsed();
        assert!(waited >= PATIENCE * 4 / 5 && waited < BOUND, "{waited:?}");
    }
    server.restart();

    let builder = PostgresCheckpointStore::builder();
    let refused = builder.clone().connection_timeout(Duration::ZERO).connect(&server.params());
    assert!(chain(&refused.unwrap_err()).contains("connection_timeout"));
    let endless = builder.connection_timeout(Duration::MAX).connect(&server.params()).unwrap();
    endless.save("orders", 1).unwrap();
    endless.advance("orders", 1, 2).unwrap();
}

#[test]
fn migrate_names_the_right_that_is_missing() {
    let database = harness::fresh_database();
    PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
    let mut admin = harness::client(&database);
    let all = ["SELECT", "INSERT", "UPDATE", "DELETE"];
    let role_with = |admin: &mut Client, grants: &str| {
        let role = unique("rights");
        admin.batch_execute(&format!("CREATE ROLE {role} LOGIN")).unwrap();
        if !grants.is_empty() {
            admin
                .batch_execute(&format!("GRANT {grants} ON projection_checkpoints TO {role}"))
                .unwrap();
        }
        PostgresCheckpointStore::connect(&database.replace("postgres@", &format!("{role}@")))
            .unwrap()
    };
    for missing in all {
        let granted: Vec<_> = all.into_iter().filter(|right| *right != missing).collect();
        let error = role_with(&mut admin, &granted.join(", ")).migrate().unwrap_err();
        let told = chain(&error);
        assert!(matches!(error, Error::Backend { operation: "migrate", .. }), "{error:?}");
        assert!(told.contains(missing), "{told}");
        assert!(granted.iter().all(|right| !told.contains(right)), "{told}");
    }
    let told = chain(&role_with(&mut admin, "SELECT").migrate().unwrap_err());
    assert!(["INSERT", "UPDATE", "DELETE"].iter().all(|right| told.contains(right)), "{told}");

    let columns = "(projection_name, \"offset\", updated_at)";
    let by_column = format!(
        "SELECT {columns}, INSERT {columns}, UPDATE (\"offset\", updated_at, projection_name), DELETE"
    );
    role_with(&mut admin, &by_column).migrate().unwrap();
    role_with(&mut admin, "SELECT, INSERT, UPDATE, DELETE").migrate().unwrap();
}

/// What users write into their structs, whatever the connector or the pool.
struct Service {
    store: PostgresCheckpointStore,
}

/// A manager of the caller's own making.
struct Direct(Config);

impl ManageConnection for Direct {
    type Connection = Client;
    type Error = checkpoint_store::postgres::Error;

    fn connect(&self) -> std::result::Result<Client, Self::Error> {
        self.0.connect(NoTls)
    }
    fn is_valid(&self, client: &mut Client) -> std::result::Result<(), Self::Error> {
        client.is_valid(BOUND)
    }
    fn has_broken(&self, client: &mut Client) -> bool {
        client.is_closed()
    }
}

fn with_tls<T>(tls: T) -> Result<Service>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as checkpoint_store::postgres::tls::TlsConnect<Socket>>::Future: Send,
{
    let params = harness::server().params();
    Ok(Service { store: PostgresCheckpointStore::builder().connect_tls(&params, tls)? })
}

#[test]
fn one_type_names_the_store_whatever_it_was_built_from() {
    fn is_shared<T: Send + Sync + Clone + Debug + 'static>() {}
    fn is_sent<T: Send + Debug + 'static>() {}
    is_shared::<PostgresCheckpointStore>();
    is_sent::<PooledClient>();

    let params = harness::server().params();
    let roots = rustls::RootCertStore::empty();
    let tls = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::ring::default_provider().into(),
    )
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_root_certificates(roots)
    .with_no_client_auth();
    let direct = Pool::builder().max_size(1).build(Direct(params.parse().unwrap())).unwrap();
    let services: Vec<Service> = vec![
        Service { store: PostgresCheckpointStore::connect(&params).unwrap() },
        with_tls(NoTls).unwrap(),
        with_tls(tokio_postgres_rustls::MakeRustlsConnect::new(tls)).unwrap(),
        Service { store: PostgresCheckpointStore::new(harness::pool(&params, 1, BOUND)) },
        Service { store: PostgresCheckpointStore::builder().build(direct).unwrap() },
    ];
    for Service { store } in &services {
        let mut client: PooledClient = store.connection().unwrap();
        assert_eq!(client.query_one("SELECT 1", &[]).unwrap().get::<_, i32>(0), 1);
        drop(client);
        assert_eq!(store.pool_state().connections, 1);
    }
}

#[test]
fn an_error_has_its_operation_its_subject_and_its_cause_in_fields() {
    let schema = Schema::new();
    schema
        .client()
        .batch_execute("ALTER TABLE projection_checkpoints ADD CHECK (\"offset\" < 9)")
        .unwrap();
    match schema.store.save("orders", 9).unwrap_err() {
        Error::Backend { operation: "save", subject: Some(subject), source, .. } => {
            assert!(subject.contains("\"orders\"") && subject.contains(&schema.name), "{subject}");
            assert!(source.is::<checkpoint_store::postgres::Error>(), "{source:?}");
        }
        other => panic!("{other:?}"),
    }
    let port = harness::free_port();
    match PostgresCheckpointStore::connect(&format!("host=127.0.0.1 port={port} user=app"))
        .unwrap_err()
    {
        Error::Unavailable { operation: "connect", subject: Some(subject), source, .. } => {
            assert!(subject.contains(&port.to_string()), "{subject}");
            assert!(source.is::<checkpoint_store::postgres::Error>(), "{source:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        Error::unavailable("save", "gone"),
        Error::Unavailable { operation: "save", subject: None, .. }
    ));
    assert!(validate_advance("", 0, 1).is_err() && validate_advance("a", 2, 1).is_err());
}

/// The demoted server keeps running, and its connections with it.
#[test]
fn a_fail_over_that_leaves_the_old_connections_open_is_no_error_to_anybody() {
    let primary = Server::start(Options::fast());
    let standby = Server::prepare(Options::fast());
    standby.follow(&primary);
    standby.restart();
    let params = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres target_session_attrs=read-write",
        primary.port(),
        standby.port()
    );
    let store = PostgresCheckpointStore::connect(&params).unwrap();
    store.migrate().unwrap();
    for name in ["saved", "advanced", "projected"] {
        store.save(name, 1).unwrap();
    }
    open_connections(&store, 5);
    set_read_only(&primary, true);
    wait_until("the standby has it all", || {
        let sql = "SELECT sum(\"offset\")::bigint FROM projection_checkpoints";
        standby
            .client()
            .query_one(sql, &[])
            .is_ok_and(|row| row.get::<_, Option<i64>>(0) == Some(3))
    });
    standby.client().query_one("SELECT pg_promote()", &[]).unwrap();
    set_read_only(&standby, false);
    let started = Instant::now();
    store.advance("advanced", 1, 2).unwrap();
    store.save("saved", 2).unwrap();
    assert_eq!(store.project("projected", |_, _| Ok(Some(2))).unwrap(), Some(2));
    let there = PostgresCheckpointStore::connect(&standby.params()).unwrap();
    assert!(there.all().unwrap().iter().all(|checkpoint| checkpoint.offset == 2));
    let fault = "fail-over while the demoted server keeps its connections";
    Row::asserted(fault, 1, 0, started.elapsed()).print();
}

/// Its connections are there, and idle, and nobody answers on them.
#[test]
fn a_server_that_stands_still_is_left_with_its_connections_for_the_other_host() {
    let (frozen, other) = (Server::start(Options::fast()), Server::start(Options::fast()));
    let params = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres connect_timeout=1",
        frozen.port(),
        other.port()
    );
    for server in [&frozen, &other] {
        PostgresCheckpointStore::connect(&server.params()).unwrap().migrate().unwrap();
    }
    let store = PostgresCheckpointStore::builder().max_connections(2).connect(&params).unwrap();
    open_connections(&store, 2);
    let (mut one, mut two) = (store.connection().unwrap(), store.connection().unwrap());
    let pid = |client: &mut PooledClient| -> i32 {
        client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
    };
    let processes = [pid(&mut one), pid(&mut two), frozen.pid()];
    drop((one, two));
    for process in processes {
        signal_pid(process, Signal::STOP);
    }
    let idle = Instant::now();
    wait_until("they are not trusted any more", || idle.elapsed() > Duration::from_secs(2));
    let started = Instant::now();
    store.advance("orders", 0, 1).unwrap();
    assert_eq!(lock_and_save(&store, "orders").unwrap(), 2);
    let waited = started.elapsed();
    for process in processes {
        signal_pid(process, Signal::CONT);
    }
    assert!(waited < BOUND, "{waited:?}");
    let there = PostgresCheckpointStore::connect(&other.params()).unwrap();
    assert_eq!(there.get("orders").unwrap(), 2);
    let fault = "the server stands still while its connections are idle, another host";
    Row::asserted(fault, 1, 0, waited).print();
}

#[test]
fn a_waiter_is_not_disturbed_by_the_loss_of_others() {
    let schema = Schema::new();
    schema.store.save("held", 1).unwrap();
    let mut holder = schema.client();
    let mut held = holder.transaction().unwrap();
    schema.store.in_transaction(&mut held).lock("held").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| schema.store.advance("held", 1, 2));
        wait_for_a_waiter(&mut schema.client(), "UPDATE");
        let mut client = schema.store.connection().unwrap();
        client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
        drop(client);
        held.rollback().unwrap();
        waiting.join().unwrap().unwrap();
    });
}

type Call = fn(&PostgresCheckpointStore) -> Result<()>;

/// What the server has said to any attempt of a call comes out in the end, unless the last attempt says more.
#[test]
fn the_cause_that_one_attempt_has_learned_is_not_lost() {
    const TIMEOUT: Duration = Duration::from_secs(2);
    let schema = Schema::new();
    schema
        .client()
        .batch_execute(
            "INSERT INTO projection_checkpoints VALUES ('orders', 0, '2000-01-01');
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
             CREATE TRIGGER fail BEFORE INSERT OR UPDATE OR DELETE ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION fail();",
        )
        .unwrap();
    let calls: [(&str, Call); 5] = [
        ("save", |store| store.save("orders", 1)),
        ("save_many", |store| store.save_many(&[("orders", 1)])),
        ("delete", |store| store.delete("orders").map(drop)),
        ("project", |store| store.project("orders", |_, _| Ok(Some(1))).map(drop)),
        ("project, in its closure", |store| {
            let project = |tx: &mut checkpoint_store::postgres::Transaction<'_>, _| {
                tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")?;
                Ok(Some(1))
            };
            store.project("orders", project).map(drop)
        }),
    ];
    for is_callers_pool in [false, true] {
        for (operation, call) in calls {
            let explained = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let told = std::sync::Arc::clone(&explained);
            let builder = PostgresCheckpointStore::builder()
                .schema(&schema.name)
                .max_connections(2)
                .connection_timeout(TIMEOUT)
                .on_retry(move |retry| {
                    if retry.error.sql_state().is_some() {
                        told.store(true, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            let params = harness::server().params();
            let store = if is_callers_pool {
                builder.build(harness::pool(&params, 2, TIMEOUT)).unwrap()
            } else {
                builder.connect(&params).unwrap()
            };
            for _ in 0..if operation.starts_with("project") { 8 } else { 1 } {
                explained.store(false, std::sync::atomic::Ordering::SeqCst);
                let error = call(&store).unwrap_err();
                assert!(matches!(error, Error::Unavailable { .. }), "{operation}: {error:?}");
                assert!(error.is_transient(), "{operation}: {error:?}");
                if explained.load(std::sync::atomic::Ordering::SeqCst) {
                    let state = error.sql_state().map(|it| it.code().to_owned());
                    assert_eq!(state.as_deref(), Some("57P01"), "{operation}: {}", chain(&error));
                }
            }
        }
    }
}

/// A host that then says nothing at all does not make the first answer unsaid.
#[test]
fn the_cause_of_a_loss_outlives_an_outage_that_follows() {
    let server = Server::start(Options::fast());
    PostgresCheckpointStore::connect(&server.params()).unwrap().migrate().unwrap();
    let store = PostgresCheckpointStore::builder()
        .max_connections(1)
        .connection_timeout(Duration::from_secs(2))
        .connect(&server.params())
        .unwrap();
    store.save("orders", 1).unwrap();
    for _ in 0..5 {
        server.crash();
        let error = store.get("orders").unwrap_err();
        assert!(matches!(error, Error::Unavailable { operation: "get", .. }), "{error:?}");
        server.restart();
        wait_until("it works again", || store.get("orders").is_ok());
    }
    let gate = Gate::to(server.port());
    let store = PostgresCheckpointStore::builder()
        .max_connections(1)
        .connection_timeout(Duration::from_secs(2))
        .connect(&gate.params())
        .unwrap();
    store.get("orders").unwrap();
    gate.forge("SELECT", "FATAL", "57P01");
    gate.fall_silent();
    let error = store.get("orders").unwrap_err();
    assert!(matches!(error, Error::Unavailable { operation: "get", .. }), "{error:?}");
    assert!(chain(&error).contains("forged by a test"), "{}", chain(&error));
    assert!(error.is_transient());
}

/// A write that is not repeated because another client has intervened says that, and not how its connection ended.
#[test]
fn an_unknown_outcome_is_not_hidden_behind_its_cause() {
    let schema = Schema::new();
    let gate = Gate::to(harness::server().port());
    let rival = schema.store.clone();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .max_connections(1)
        .on_retry(move |_| rival.save("orders", 7).unwrap())
        .connect(&gate.params())
        .unwrap();
    store.save("orders", 1).unwrap();
    gate.forge("INSERT", "FATAL", "57P01");
    let error = store.save("orders", 2).unwrap_err();
    assert!(matches!(error, Error::Unavailable { operation: "save", .. }), "{error:?}");
    assert!(chain(&error).contains("unknown whether the write was executed"), "{}", chain(&error));
    assert_eq!(store.get("orders").unwrap(), 7);
}

#[test]
fn an_error_of_the_callers_own_does_not_blame_the_store() {
    let schema = Schema::new();
    let mut client = schema.store.connection().unwrap();
    let lost = client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
    let lost = Error::from(lost);
    assert!(matches!(lost, Error::Unavailable { operation: "statement", .. }), "{lost:?}");
    let failed = Error::from(schema.client().batch_execute("SELECT 1 / 0").unwrap_err());
    assert!(matches!(failed, Error::Backend { operation: "statement", .. }), "{failed:?}");
    let port = harness::free_port();
    let params = format!("host=127.0.0.1 port={port} user=postgres");
    let own = harness::pool(&params, 1, Duration::from_millis(100));
    let refused = Error::from(own.get().err().expect("nobody listens"));
    assert!(matches!(refused, Error::Unavailable { operation: "pool", .. }), "{refused:?}");
    assert!(lost.is_transient() && refused.is_transient() && !failed.is_transient());
    for error in [&lost, &failed, &refused] {
        assert!(!error.to_string().contains("store"), "{error}");
        assert!(std::error::Error::source(error).is_some());
    }
}

#[derive(Debug, thiserror::Error)]
#[error("of the caller's own")]
struct Own(#[source] checkpoint_store::postgres::Error);

#[test]
fn a_boxed_error_keeps_what_it_was() {
    type Boxed = Box<dyn std::error::Error + Send + Sync>;
    let boxed = |error: Boxed| Error::from(error);
    let conflict = boxed(Error::conflict("orders", 1, 2).into());
    assert!(matches!(conflict, Error::Conflict { expected: 1, found: 2, .. }), "{conflict:?}");
    let unavailable = boxed(Error::unavailable("save", "closed").into());
    assert!(matches!(unavailable, Error::Unavailable { operation: "save", .. }), "{unavailable:?}");
    let statement = |sql: &str| harness::server().client().batch_execute(sql).unwrap_err();
    let failed = boxed(statement("SELECT 1 / 0").into());
    assert!(matches!(failed, Error::Backend { operation: "statement", .. }), "{failed:?}");
    assert_eq!(sql_state(&failed).as_deref(), Some("22012"));
    let undone = boxed(statement("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").into());
    assert!(undone.is_transient(), "{undone:?}");
    let lost = boxed(statement("SELECT pg_terminate_backend(pg_backend_pid())").into());
    assert!(matches!(lost, Error::Unavailable { operation: "statement", .. }), "{lost:?}");
    let port = harness::free_port();
    let params = format!("host=127.0.0.1 port={port} user=postgres");
    let pool = harness::pool(&params, 1, Duration::from_millis(100));
    let refused = boxed(pool.get().err().expect("nobody listens").into());
    assert!(matches!(refused, Error::Unavailable { operation: "pool", .. }), "{refused:?}");
    let own = boxed(Own(statement("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")).into());
    assert!(matches!(own, Error::Backend { operation: "apply", .. }), "{own:?}");
    assert!(own.is_transient(), "the chain tells");
    let own = boxed("a text".into());
    assert!(matches!(own, Error::Backend { operation: "apply", .. }) && !own.is_transient());
    // In a closure `?` makes the same of it, and a deadlock in it is retried.
    let schema = Schema::new();
    let mut runs = 0;
    let committed = schema.store.project("orders", |tx, at| {
        runs += 1;
        let apply = |tx: &mut checkpoint_store::postgres::Transaction<'_>| -> std::result::Result<(), Boxed> {
            if runs == 1 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")?;
            }
            Ok(())
        };
        apply(tx)?;
        Ok(Some(at + 1))
    });
    assert_eq!((committed.unwrap(), runs), (Some(1), 2));
}
