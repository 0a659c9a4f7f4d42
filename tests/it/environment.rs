//! What surrounds the table: collations, row-level security, namesakes, settings, encodings.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, Transaction};
use checkpoint_store::{
    Batch, CheckpointStore, Error, PostgresCheckpointStore, Result, conformance,
};

use crate::harness::{self, Cut, Proxy, Schema, chain, pool, sql_state, unique, wait_for_a_waiter};

fn store(params: &str) -> PostgresCheckpointStore {
    PostgresCheckpointStore::builder().max_connections(1).connect(params).unwrap()
}

/// The server's major version: 18, for example.
fn version() -> i32 {
    let query = "SELECT current_setting('server_version_num')::int4 / 10000";
    harness::server().client().query_one(query, &[]).unwrap().get(0)
}

/// Why the table is not taken.
fn misfit(store: &PostgresCheckpointStore) -> String {
    match store.migrate().unwrap_err() {
        Error::IncompatibleTable { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

/// In another order by their bytes than by most languages.
const NAMES: [&str; 10] =
    ["OrderSummary", "order_summary", "a-b", "ab", "Zebra", "apple", "Ärger", "zoo", "10", "9"];

/// The order of the names changes under the table, as it does when the C library or ICU does: what
/// its index compared with one collation it now compares with another.
fn change_the_order(admin: &mut Client) {
    admin
        .batch_execute(
            "UPDATE pg_attribute SET attcollation = '\"POSIX\"'::regcollation
             WHERE attrelid = 'projection_checkpoints'::regclass
               AND attcollation = '\"en-x-icu\"'::regcollation;
             UPDATE pg_index SET indcollation = '\"POSIX\"'::regcollation::oid::text::oidvector
             WHERE indrelid = 'projection_checkpoints'::regclass
               AND indcollation[0] = '\"en-x-icu\"'::regcollation;
             DELETE FROM pg_depend WHERE refclassid = 'pg_collation'::regclass
               AND refobjid = '\"en-x-icu\"'::regcollation;",
        )
        .unwrap();
}

fn found_again(params: &str) -> usize {
    let store = store(params);
    let is_found = |name: &&&str| store.get(name).unwrap() != 0;
    NAMES.iter().filter(is_found).count()
}

fn save_names(params: &str) {
    let store = store(params);
    for (offset, name) in (1..).zip(NAMES) {
        store.save(name, offset).unwrap();
    }
    // Enough others that the index has more than one page, and is asked.
    let others: Vec<_> = (0..2_000).map(|number| format!("{number} other")).collect();
    let others: Vec<_> = others.iter().map(|name| (name.as_str(), 1)).collect();
    store.save_many(&others).unwrap();
}

#[test]
fn an_order_that_changes_under_the_database_loses_no_name_of_a_new_table() {
    // The database itself sorts by a locale, which the table that is made here does not heed.
    let database = harness::fresh_database();
    let mut admin = harness::client(&database);
    store(&database).migrate().unwrap();
    save_names(&database);
    change_the_order(&mut admin);
    assert_eq!(found_again(&database), NAMES.len());
    let collation: String = admin
        .query_one(
            "SELECT collname::text FROM pg_attribute
             JOIN pg_collation ON pg_collation.oid = attcollation
             WHERE attrelid = 'projection_checkpoints'::regclass AND attname = 'projection_name'",
            &[],
        )
        .unwrap()
        .get(0);
    assert_eq!(collation, "C");
}

#[test]
fn an_old_table_that_has_lost_names_is_mended_by_one_line() {
    let database = harness::fresh_database();
    let mut admin = harness::client(&database);
    admin
        .batch_execute(
            "CREATE TABLE projection_checkpoints (
                 projection_name text COLLATE \"en-x-icu\" PRIMARY KEY,
                 \"offset\" bigint NOT NULL,
                 updated_at timestamptz NOT NULL DEFAULT now()
             )",
        )
        .unwrap();
    store(&database).migrate().unwrap();
    save_names(&database);
    assert_eq!(found_again(&database), NAMES.len());
    change_the_order(&mut admin);
    assert!(found_again(&database) < NAMES.len(), "the harm is there to be mended");
    admin
        .batch_execute(
            "ALTER TABLE projection_checkpoints
             ALTER COLUMN projection_name TYPE text COLLATE \"C\"",
        )
        .unwrap();
    assert_eq!(found_again(&database), NAMES.len());
    store(&database).migrate().unwrap();
}

/// A database with some checkpoints in it, and a role from which row-level security hides some.
fn hidden(policy: &str) -> (Client, PostgresCheckpointStore) {
    let database = harness::fresh_database();
    let owner = store(&database);
    owner.migrate().unwrap();
    owner.save_many(&[("hidden", 42), ("seen", 7)]).unwrap();
    let role = unique("restricted");
    let mut admin = harness::client(&database);
    admin
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN;
             GRANT SELECT, INSERT, UPDATE, DELETE ON projection_checkpoints TO {role};
             ALTER TABLE projection_checkpoints ENABLE ROW LEVEL SECURITY;
             {policy}"
        ))
        .unwrap();
    (admin, store(&database.replace("postgres@", &format!("{role}@"))))
}

#[test]
fn what_row_level_security_hides_is_an_error_and_not_nothing() {
    for policy in [
        "",
        "CREATE POLICY a ON projection_checkpoints USING (projection_name = 'seen');",
        "CREATE POLICY a ON projection_checkpoints USING (projection_name = 'seen')
             WITH CHECK (true);",
    ] {
        let (mut admin, store) = hidden(policy);
        assert!(misfit(&store).contains("row-level security"));
        let in_transaction = |work: &dyn Fn(
            &mut checkpoint_store::InTransaction<'_, '_>,
        ) -> checkpoint_store::Result<()>| {
            let mut client = store.connection().unwrap();
            let mut tx = client.transaction().unwrap();
            work(&mut store.in_transaction(&mut tx))
        };
        for (what, refused) in [
            ("get", store.get("hidden").map(drop)),
            ("get", store.get("never there").map(drop)),
            ("find", store.find("hidden").map(drop)),
            ("all", store.all().map(drop)),
            ("advance", store.advance("hidden", 42, 43)),
            ("advance", store.advance("hidden", 0, 43)),
            ("delete", store.delete("hidden").map(drop)),
            ("save", store.save("hidden", 1)),
            ("save_many", store.save_many(&[("hidden", 1)])),
            ("get", in_transaction(&|here| here.get("hidden").map(drop))),
            ("lock", in_transaction(&|here| here.lock("hidden").map(drop))),
            ("try_lock", in_transaction(&|here| here.try_lock("hidden").map(drop))),
            ("project", store.project("hidden", |_, _| Ok(None)).map(drop)),
        ] {
            let error = refused.expect_err(what);
            assert!(matches!(error, Error::Backend { .. }), "{what}: {error:?}");
            assert!(!error.is_transient(), "{what}: {error:?}");
            assert!(chain(&error).contains("row-level security"), "{what}: {}", chain(&error));
        }
        let row = admin
            .query_one(
                "SELECT \"offset\" FROM projection_checkpoints WHERE projection_name = 'hidden'",
                &[],
            )
            .unwrap();
        assert_eq!(row.get::<_, i64>(0), 42, "{policy}");
    }
}

#[test]
fn what_row_level_security_shows_is_found_in_one_round_trip_and_its_owner_sees_all() {
    let (mut admin, store) =
        hidden("CREATE POLICY a ON projection_checkpoints USING (projection_name = 'seen');");
    assert_eq!(store.get("seen").unwrap(), 7);
    store.advance("seen", 7, 8).unwrap();
    store.save("seen", 9).unwrap();
    assert_eq!(store.find("seen").unwrap().unwrap().offset, 9);
    let name: String = admin.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
    let owner = self::store(&harness::server().url(&name));
    owner.migrate().unwrap();
    assert_eq!(owner.all().unwrap().len(), 2);
    assert_eq!(owner.get("never there").unwrap(), 0);
    // With BYPASSRLS it is another role's table as well.
    let role: String = admin
        .query_one(
            "SELECT grantee::text FROM information_schema.role_table_grants
             WHERE table_name = 'projection_checkpoints' AND grantee <> 'postgres' LIMIT 1",
            &[],
        )
        .unwrap()
        .get(0);
    admin.batch_execute(&format!("ALTER ROLE {role} BYPASSRLS")).unwrap();
    store.migrate().unwrap();
    assert_eq!(store.get("hidden").unwrap(), 42);
}

#[test]
fn a_table_that_forgets_is_refused() {
    let database = harness::fresh_database();
    store(&database).migrate().unwrap();
    let mut admin = harness::client(&database);
    admin.batch_execute("ALTER TABLE projection_checkpoints SET UNLOGGED").unwrap();
    assert!(misfit(&store(&database)).contains("unlogged"));
    admin.batch_execute("ALTER TABLE projection_checkpoints SET LOGGED").unwrap();
    store(&database).migrate().unwrap();

    let temporary =
        PostgresCheckpointStore::builder().schema("pg_temp").max_connections(1).connect(&database);
    let temporary = temporary.unwrap();
    temporary
        .connection()
        .unwrap()
        .batch_execute(
            "CREATE TEMPORARY TABLE projection_checkpoints (LIKE public.projection_checkpoints
             INCLUDING ALL)",
        )
        .unwrap();
    assert!(misfit(&temporary).contains("temporary"));
}

#[test]
fn no_table_is_made_beside_one_whose_name_differs_in_case_only() {
    let database = harness::fresh_database();
    let named = |schema: &str, table: &str| {
        PostgresCheckpointStore::builder().schema(schema).table(table).connect(&database).unwrap()
    };
    let original = named("projections", "checkpoints");
    original.migrate().unwrap();
    original.save("orders", 42).unwrap();
    for (schema, table) in [
        ("Projections", "Checkpoints"),
        ("projections", "CHECKPOINTS"),
        ("PROJECTIONS", "checkpoints"),
    ] {
        let reason = misfit(&named(schema, table));
        assert!(reason.contains("projections.checkpoints"), "{reason}");
    }
    let mut admin = harness::client(&database);
    let count = "SELECT count(*) FROM pg_class WHERE lower(relname) = 'checkpoints'";
    assert_eq!(admin.query_one(count, &[]).unwrap().get::<_, i64>(0), 1);
    let schemas = "SELECT count(*) FROM pg_namespace WHERE lower(nspname) = 'projections'";
    assert_eq!(admin.query_one(schemas, &[]).unwrap().get::<_, i64>(0), 1);
    // The other way round, and names that are others.
    named("Billing", "Checkpoints").migrate().unwrap();
    assert!(misfit(&named("billing", "checkpoints")).contains("\"Billing\".\"Checkpoints\""));
    for (schema, table) in [("projections", "checkpoint"), ("staging", "checkpoints")] {
        named(schema, table).migrate().unwrap();
    }
    // One that stands is taken, whatever stands beside it.
    admin
        .batch_execute(
            "CREATE TABLE projections.\"Checkpoints\" (LIKE projections.checkpoints INCLUDING ALL)",
        )
        .unwrap();
    original.migrate().unwrap();
    named("projections", "Checkpoints").migrate().unwrap();
    assert_eq!(original.get("orders").unwrap(), 42);
}

/// Whatever an administrator has set for a role, a database or a server.
fn settings() -> Vec<&'static str> {
    let mut settings = SETTINGS.to_vec();
    settings.push(match version() {
        ..16 => "force_parallel_mode=on",
        _ => "debug_parallel_query=on",
    });
    if version() >= 17 {
        settings.push("transaction_timeout=10min");
    }
    settings
}

const SETTINGS: [&str; 27] = [
    "quote_all_identifiers=on",
    "standard_conforming_strings=off",
    "backslash_quote=off",
    "transform_null_equals=on",
    "array_nulls=off",
    "default_transaction_isolation=serializable",
    "default_transaction_isolation=repeatable\\ read",
    "default_transaction_deferrable=on",
    "row_security=off",
    "search_path=",
    "search_path=odd,pg_catalog",
    "search_path=pg_temp,odd,public,pg_catalog",
    "DateStyle=SQL,\\ DMY",
    "IntervalStyle=sql_standard",
    "TimeZone=Asia/Kathmandu",
    "extra_float_digits=-15",
    "bytea_output=escape",
    "client_min_messages=debug5",
    "plan_cache_mode=force_generic_plan",
    "enable_indexscan=off",
    "enable_seqscan=off",
    "jit_above_cost=0",
    "synchronous_commit=off",
    "work_mem=64kB",
    "default_table_access_method=heap",
    "xmloption=document",
    "log_statement=all",
];

#[test]
fn its_own_table_is_made_and_taken_under_every_setting() {
    let database = harness::fresh_database();
    harness::client(&database)
        .batch_execute(
            "CREATE SCHEMA odd;
             CREATE DOMAIN odd.text AS varchar(3);
             CREATE DOMAIN odd.int8 AS numeric;
             CREATE DOMAIN odd.timestamptz AS date;
             CREATE FUNCTION odd.clock_timestamp() RETURNS date LANGUAGE sql AS 'SELECT NULL::date';
             CREATE FUNCTION odd.now() RETURNS date LANGUAGE sql AS 'SELECT NULL::date';
             CREATE VIEW odd.pg_class AS SELECT 1 AS oid;
             CREATE VIEW odd.pg_attribute AS SELECT 1 AS attrelid;",
        )
        .unwrap();
    for (number, setting) in settings().into_iter().enumerate() {
        for prepared in [false, true] {
            let store = PostgresCheckpointStore::builder()
                .schema(format!("made under {number}"))
                .updated_at_index(true)
                .prepared_statements(prepared)
                .max_connections(2)
                .connect(&format!(
                    "{database}?options=-c%20{}",
                    setting.replace('=', "%3D").replace(' ', "%20").replace('\\', "%5C")
                ))
                .unwrap_or_else(|error| panic!("{setting}: {}", chain(&error)));
            // Made by the first, taken by the second.
            store.migrate().unwrap_or_else(|error| panic!("{setting}: {}", chain(&error)));
            store.save("orders", 1).unwrap();
            store.advance("orders", 1, 2).unwrap();
            store.advance("new", 0, 2).unwrap();
            store.save_many(&[("orders", 3), ("a", 4), ("B", 5)]).unwrap();
            let names: Vec<_> = store.all().unwrap().into_iter().map(|it| it.projection).collect();
            assert_eq!(names, ["B", "a", "new", "orders"], "{setting}");
            assert_eq!(store.project("orders", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(4));
            for name in names {
                assert!(store.delete(&name).unwrap());
            }
        }
    }
    let plain = PostgresCheckpointStore::builder().schema("made under 10").connect(&database);
    plain.unwrap().migrate().unwrap();
}

#[test]
fn in_another_encoding_the_order_is_that_of_utf_8_and_what_cannot_be_held_is_refused() {
    for encoding in ["LATIN1", "WIN1252", "LATIN9"] {
        let name = unique("encoded");
        harness::server()
            .client()
            .batch_execute(&format!(
                "CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
            ))
            .unwrap();
        let store = store(&harness::server().url(&name));
        store.migrate().unwrap();
        let mut names = vec!["zoo", "é", "A", "ü", "ß", "¥"];
        if encoding != "LATIN1" {
            names.extend(["€", "Œ", "Ž"]); // whose single bytes are not in the order of UTF-8
        }
        for name in &names {
            store.save(name, 1).unwrap();
        }
        names.sort_unstable();
        let listed: Vec<_> = store.all().unwrap().into_iter().map(|it| it.projection).collect();
        assert_eq!(listed, names, "{encoding}");
        let refused = store.save("日本語", 1).unwrap_err();
        assert!(matches!(refused, Error::Backend { .. }) && !refused.is_transient(), "{refused:?}");
        assert_eq!(store.all().unwrap().len(), names.len());
    }
}

#[test]
fn the_contract_holds_whatever_provides_the_locale_of_the_database() {
    for (since, provider) in [
        (15, "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'"),
        (17, "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"),
        (18, "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'PG_UNICODE_FAST'"),
    ] {
        let name = unique("sorted");
        let created = harness::server()
            .client()
            .batch_execute(&format!("CREATE DATABASE {name} {provider} TEMPLATE template0"));
        if version() < since {
            println!("PostgreSQL {} has no database with {provider}", version());
            created.unwrap_err();
            continue;
        }
        created.unwrap();
        let store = store(&harness::server().url(&name));
        store.migrate().unwrap();
        conformance::verify(&store);
    }
}

#[test]
fn a_batch_longer_than_the_server_allows_is_undone_and_the_next_one_is_not() {
    let store = store(&harness::fresh_database());
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    let mut runs = 0;
    let error = store
        .project("orders", |tx, offset| {
            runs += 1;
            tx.batch_execute("SET LOCAL transaction_timeout = '1ms'; SELECT pg_sleep(60)")?;
            Ok(Some(offset + 1))
        })
        .unwrap_err();
    if version() < 17 {
        println!("PostgreSQL {} has no transaction_timeout", version());
        assert_eq!((sql_state(&error).as_deref(), runs), (Some("42704"), 1));
        assert!(!error.is_transient(), "{error:?}");
    } else {
        // The session ends with it, and whether another one has more time is not known.
        assert_eq!(runs, 3);
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_transient(), "{error:?}");
        // The driver may see the end of the session before it reads the server's reason.
        let state = sql_state(&error);
        assert!(matches!(state.as_deref(), None | Some("25P04")), "{}", chain(&error));
    }
    assert_eq!(store.project("orders", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(2));
}

#[test]
fn a_column_is_not_taken_while_it_may_hold_a_null_from_before_its_constraint() {
    let database = harness::fresh_database();
    let store = store(&database);
    store.migrate().unwrap();
    let mut admin = harness::client(&database);
    admin
        .batch_execute(
            "ALTER TABLE projection_checkpoints ALTER \"offset\" DROP NOT NULL;
             INSERT INTO projection_checkpoints VALUES ('orders', NULL);",
        )
        .unwrap();
    assert!(misfit(&store).contains("\"offset\" can be null"));
    let constraint = "ALTER TABLE projection_checkpoints
                      ADD CONSTRAINT filled NOT NULL \"offset\" NOT VALID";
    let added = admin.batch_execute(constraint);
    if version() < 18 {
        println!("PostgreSQL {} has no NOT NULL that is not validated", version());
        added.unwrap_err();
        admin.batch_execute("DELETE FROM projection_checkpoints").unwrap();
        admin
            .batch_execute("ALTER TABLE projection_checkpoints ALTER \"offset\" SET NOT NULL")
            .unwrap();
    } else {
        added.unwrap();
        assert!(misfit(&store).contains("\"offset\" can be null"));
        admin.batch_execute("DELETE FROM projection_checkpoints").unwrap();
        admin
            .batch_execute("ALTER TABLE projection_checkpoints VALIDATE CONSTRAINT filled")
            .unwrap();
    }
    store.migrate().unwrap();
}

#[test]
fn the_contract_holds_beside_a_column_that_is_generated() {
    let database = harness::fresh_database();
    let store = store(&database);
    store.migrate().unwrap();
    let kind = if version() < 18 { "STORED" } else { "VIRTUAL" };
    harness::client(&database)
        .batch_execute(&format!(
            "ALTER TABLE projection_checkpoints
             ADD is_new boolean GENERATED ALWAYS AS (\"offset\" = 0) {kind}"
        ))
        .unwrap();
    store.migrate().unwrap();
    conformance::verify(&store);
}

/// What the driver relies on: it sends and reads UTF-8, whatever the session says.
#[test]
fn a_closure_that_changes_the_clients_encoding_moves_no_other_checkpoint() {
    const NAME: &str = "Größe – é";
    let schema = Schema::new();
    for setting in [
        "SET LOCAL client_encoding = 'LATIN1'",
        "SET client_encoding = 'LATIN1'",
        "SET NAMES 'LATIN1'",
    ] {
        for is_there in [false, true] {
            for (tries, prepared) in [(false, false), (true, false), (false, true)] {
                let what = format!("{setting}, {is_there}, {tries}, {prepared}");
                let store = PostgresCheckpointStore::builder()
                    .schema(&schema.name)
                    .prepared_statements(prepared)
                    .max_connections(1)
                    .connect(&harness::server().params())
                    .unwrap();
                if is_there {
                    store.save(NAME, 1).unwrap();
                }
                let before = schema.store.get(NAME).unwrap();
                let apply = |tx: &mut Transaction<'_>, offset: i64| {
                    tx.batch_execute(setting)?;
                    Ok(Some(offset + 1))
                };
                let outcome = if tries {
                    store.try_project(NAME, apply).map(drop)
                } else {
                    store.project(NAME, apply).map(drop)
                };
                let expected = match &outcome {
                    Ok(()) => before + 1,
                    Err(error) => {
                        assert!(matches!(error, Error::Backend { .. }), "{what}: {error:?}");
                        before
                    }
                };
                let listed = schema.store.all().unwrap();
                assert!(listed.iter().all(|it| it.projection == NAME), "{what}: {listed:?}");
                assert_eq!(schema.store.get(NAME).unwrap(), expected, "{what}");
                // Nor does what the next call sends on that connection.
                let next = store.save(NAME, 5).map(drop);
                let listed = schema.store.all().unwrap();
                assert!(
                    listed.iter().all(|it| it.projection == NAME),
                    "{what}: {next:?} {listed:?}"
                );
                schema.store.delete(NAME).unwrap();
            }
        }
    }
}

/// The server compiles each statement, so that rivals come between a statement and the next one.
#[test]
fn an_advance_against_rivals_that_delete_never_names_a_wrong_cause() {
    const TIME: Duration = Duration::from_secs(3);
    let schema = Schema::new();
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .connect(&format!(
            "{} options='-c jit=on -c jit_above_cost=0 -c jit_inline_above_cost=0 -c jit_optimize_above_cost=0'",
            harness::server().params()
        ))
        .unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        for i in 0..6 {
            let store = &store;
            scope.spawn(move || {
                while began.elapsed() < TIME {
                    if i % 2 == 0 {
                        store.delete("orders").unwrap();
                        continue;
                    }
                    match store.advance("orders", 0, 1) {
                        Ok(()) | Err(Error::Conflict { expected: 0, found: 1, .. }) => {}
                        Err(error) => {
                            let told = chain(&error);
                            assert!(error.is_transient(), "{told}");
                            assert!(told.contains("other clients"), "{told}");
                        }
                    }
                }
            });
        }
    });
}

fn size(client: &mut Client) -> (i64, i64, i64) {
    let sql = "SELECT pg_relation_size('projection_checkpoints'),
                      pg_relation_size('projection_checkpoints_pkey'),
                      (SELECT count(*) FROM projection_checkpoints)";
    let row = client.query_one(sql, &[]).unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[test]
fn idle_polls_of_a_projection_without_a_checkpoint_write_nothing() {
    let schema = Schema::new();
    let mut client = schema.client();
    let before = size(&mut client);
    for prepared in [false, true] {
        let store = PostgresCheckpointStore::builder()
            .schema(&schema.name)
            .prepared_statements(prepared)
            .connect(&harness::server().params())
            .unwrap();
        for _ in 0..500 {
            assert_eq!(store.project("orders", |_, _| Ok(None)).unwrap(), None);
            assert_eq!(store.try_project("orders", |_, _| Ok(None)).unwrap(), Batch::NothingNew);
        }
    }
    assert_eq!(size(&mut client), before);
}

/// Applies the event after the offset.
fn apply_one(tx: &mut Transaction<'_>, offset: i64) -> Result<Option<i64>> {
    tx.execute("INSERT INTO applied VALUES ($1)", &[&(offset + 1)])?;
    Ok(Some(offset + 1))
}

fn with_read_model() -> (Schema, impl Fn(&str) -> PostgresCheckpointStore) {
    let schema = Schema::new();
    schema.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let name = schema.name.clone();
    let store = move |settings: &str| {
        PostgresCheckpointStore::builder()
            .schema(&name)
            .connect(&format!(
                "{} options='-c search_path={name} {settings}'",
                harness::server().params()
            ))
            .unwrap()
    };
    (schema, store)
}

fn applied(schema: &Schema) -> Vec<i64> {
    let rows = schema.client().query("SELECT event FROM applied ORDER BY event", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn a_checkpoint_that_a_rival_creates_while_the_closure_runs_is_not_overwritten() {
    for isolation in ["", "-c default_transaction_isolation=serializable"] {
        for tries in [false, true] {
            let (schema, store) = with_read_model();
            let store = store(isolation);
            let mut seen = Vec::new();
            let mut apply = |tx: &mut Transaction<'_>, offset| {
                if seen.is_empty() {
                    schema.store.save("orders", 5)?;
                }
                seen.push(offset);
                apply_one(tx, offset)
            };
            if tries {
                assert_eq!(store.try_project("orders", &mut apply).unwrap(), Batch::Committed(6));
            } else {
                assert_eq!(store.project("orders", &mut apply).unwrap(), Some(6));
            }
            assert_eq!(seen, [0, 5], "{isolation}");
            assert_eq!((applied(&schema), store.get("orders").unwrap()), (vec![6], 6));
        }
    }
}

/// The save has found a rival, and nothing was committed.
#[test]
fn a_connection_that_is_lost_after_the_save_has_found_a_rival_is_no_error() {
    for tries in [false, true] {
        let schema = Schema::new();
        let proxy = Proxy::to(harness::server().port());
        let store = PostgresCheckpointStore::builder()
            .schema(&schema.name)
            .connect(&proxy.params())
            .unwrap();
        let mut seen = Vec::new();
        let mut apply = |_: &mut Transaction<'_>, offset| {
            if seen.is_empty() {
                schema.store.save("orders", 5)?;
                // The next request after the save: where in the message it has failed.
                proxy.cut("SELECT\0", Cut::BeforeTheRequest);
            }
            seen.push(offset);
            Ok(Some(offset + 1))
        };
        if tries {
            assert_eq!(store.try_project("orders", &mut apply).unwrap(), Batch::Committed(6));
        } else {
            assert_eq!(store.project("orders", &mut apply).unwrap(), Some(6));
        }
        assert!(!proxy.disarm());
        assert_eq!(seen, [0, 5]);
    }
}

/// Its transaction is open when the closure ends, so the save waits for it.
#[test]
fn a_checkpoint_that_a_rival_is_creating_is_waited_for() {
    for commits in [true, false] {
        let (schema, store) = with_read_model();
        let store = store("");
        let mut rival = schema.client();
        let mut creating = rival.transaction().unwrap();
        schema.store.in_transaction(&mut creating).save("orders", 5).unwrap();
        let outcome = thread::scope(|scope| {
            let waiting = scope.spawn(|| store.project("orders", apply_one));
            wait_for_a_waiter(&mut schema.client(), &schema.name);
            if commits {
                creating.commit().unwrap();
            } else {
                creating.rollback().unwrap();
            }
            waiting.join().unwrap()
        });
        let expected = if commits { 6 } else { 1 };
        assert_eq!(outcome.unwrap(), Some(expected));
        assert_eq!((applied(&schema), store.get("orders").unwrap()), (vec![expected], expected));
    }
}

/// As with a checkpoint that is there.
#[test]
fn of_rivals_on_a_projection_without_a_checkpoint_one_runs_its_closure_at_a_time() {
    const THREADS: usize = 6;
    let (schema, store) = with_read_model();
    let store = &store("");
    let (inside, runs) = (&AtomicUsize::new(0), &AtomicUsize::new(0));
    let schema = &schema;
    thread::scope(|scope| {
        for i in 0..THREADS {
            scope.spawn(move || {
                for round in 0..30 {
                    let apply = |tx: &mut Transaction<'_>, offset: i64| {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "it is alone");
                        runs.fetch_add(1, Ordering::SeqCst);
                        tx.batch_execute("SELECT pg_sleep(0.001)")?;
                        let applied = if round == 29 { apply_one(tx, offset) } else { Ok(None) };
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1, "it is alone");
                        applied
                    };
                    match i % 3 {
                        0 => drop(store.try_project("orders", apply).unwrap()),
                        1 => drop(store.project("orders", apply).unwrap()),
                        _ => {
                            // The same by hand: `lock` creates the row, and this takes it back.
                            let mut client = schema.client();
                            let mut tx = client.transaction().unwrap();
                            let at = store.in_transaction(&mut tx).lock("orders").unwrap();
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "it is alone");
                            assert!(at <= i64::try_from(THREADS).unwrap());
                            assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1, "it is alone");
                            tx.rollback().unwrap();
                        }
                    }
                }
            });
        }
    });
    let applied = applied(schema);
    assert_eq!(applied, (1..=store.get("orders").unwrap()).collect::<Vec<_>>());
    assert!(!applied.is_empty() && runs.load(Ordering::SeqCst) > 29);
}

/// What the store calls, and what it compares with, in a schema that comes before `pg_catalog`.
const NAMESAKES: [(&str, &str); 30] = [
    ("cardinality(anyarray)", "int4"),
    ("clock_timestamp()", "timestamptz"),
    ("count(text)", "int8"),
    ("current_setting(text)", "text"),
    ("current_setting(text, bool)", "text"),
    ("format(text, name, name)", "text"),
    ("format_type(oid, int4)", "text"),
    ("has_column_privilege(oid, int2, text)", "bool"),
    ("has_table_privilege(oid, text)", "bool"),
    ("hashtext(text)", "int4"),
    ("hashtextextended(text, int8)", "int8"),
    ("left(text, int4)", "text"),
    ("lower(text)", "text"),
    ("now()", "timestamptz"),
    ("pg_advisory_xact_lock(int8)", "void"),
    ("pg_backend_pid()", "int4"),
    ("pg_current_wal_lsn()", "pg_lsn"),
    ("pg_is_in_recovery()", "bool"),
    ("pg_last_xact_replay_timestamp()", "timestamptz"),
    ("pg_terminate_backend(int4)", "bool"),
    ("pg_terminate_backend(int4, int8)", "bool"),
    ("pg_try_advisory_xact_lock(int8)", "bool"),
    ("pg_walfile_name(pg_lsn)", "text"),
    ("row_security_active(oid)", "bool"),
    ("row_security_active(text)", "bool"),
    ("set_config(text, text, bool)", "text"),
    ("to_regclass(text)", "regclass"),
    ("to_regnamespace(text)", "regnamespace"),
    ("unnest(anyarray)", "setof anyelement"),
    ("version()", "text"),
];
const OPERATORS: [&str; 8] = ["=", "<>", "<", ">", "<=", ">=", "~", "/"];
const OPERANDS: [(&str, &str); 14] = [
    ("text", "text"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("int2", "int2"),
    ("int4", "int8"),
    ("int8", "int4"),
    ("int2", "int4"),
    ("timestamptz", "timestamptz"),
    ("oid", "oid"),
    ("name", "name"),
    ("name", "text"),
    ("text", "name"),
    ("\"char\"", "\"char\""),
    ("bool", "bool"),
];

/// A schema whose functions and operators fail when they are called.
fn create_namesakes(database: &str) {
    let mut admin = harness::client(database);
    let raises = "LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''a namesake was called''; END'";
    admin.batch_execute("CREATE SCHEMA evil").unwrap();
    for (signature, returns) in NAMESAKES {
        // `count` of rows is an aggregate, and an aggregate cannot be made of a function that raises by its call.
        let sql = format!("CREATE FUNCTION evil.{signature} RETURNS {returns} {raises}");
        admin.batch_execute(&sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    admin
        .batch_execute(&format!(
            "CREATE FUNCTION evil.state(int8) RETURNS int8 {raises};
             CREATE AGGREGATE evil.count(*) (SFUNC = evil.state, STYPE = int8, INITCOND = '0');"
        ))
        .unwrap();
    for (left, right) in OPERANDS {
        let function = format!("evil.compare({left}, {right})");
        for (name, returns) in [("compare", "bool"), ("divide", left)] {
            let sql =
                format!("CREATE FUNCTION evil.{name}({left}, {right}) RETURNS {returns} {raises}");
            admin.batch_execute(&sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
        for operator in OPERATORS {
            let called = if operator == "/" { "divide" } else { "compare" };
            let sql = format!(
                "CREATE OPERATOR evil.{operator}
                     (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = evil.{called})"
            );
            admin
                .batch_execute(&sql)
                .unwrap_or_else(|error| panic!("{function} {operator}: {error:?}"));
        }
    }
    for relation in [
        "pg_class",
        "pg_attribute",
        "pg_namespace",
        "pg_index",
        "pg_inherits",
        "pg_collation",
        "pg_settings",
        "pg_prepared_statements",
    ] {
        admin.batch_execute(&format!("CREATE VIEW evil.{relation} AS SELECT 1 AS evil")).unwrap();
    }
    for name in ["text", "int8", "int4", "oid", "regtype", "timestamptz"] {
        admin.batch_execute(&format!("CREATE DOMAIN evil.{name} AS pg_catalog.bytea")).unwrap();
    }
    // They are what comes first.
    let mut victim =
        harness::client(&format!("{database}?options=-c%20search_path%3Devil,pg_catalog"));
    for sql in [
        "SELECT clock_timestamp()",
        "SELECT 1::pg_catalog.int8 = 2::pg_catalog.int8",
        "SELECT count(*) FROM pg_catalog.pg_class",
    ] {
        let error = victim.batch_execute(sql).unwrap_err();
        assert!(chain(&error).contains("a namesake was called"), "{sql}: {}", chain(&error));
    }
}

/// Everything that the store does, on a connection whose answers may be lost.
fn everything(store: &PostgresCheckpointStore, proxy: Option<&Proxy>) {
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    store.save("orders", 2).unwrap();
    store.advance("orders", 2, 3).unwrap();
    store.advance("fresh", 0, 1).unwrap();
    assert!(store.advance("fresh", 0, 1).unwrap_err().is_conflict());
    assert!(store.advance("none", 5, 6).unwrap_err().is_conflict());
    store.save_many(&[("orders", 4), ("b", 1), ("a", 1)]).unwrap();
    assert_eq!(store.get("orders").unwrap(), 4);
    assert_eq!(store.get("none").unwrap(), 0);
    assert_eq!(store.find("none").unwrap(), None);
    assert_eq!(store.all().unwrap().len(), 4);
    assert!(store.wait_for("orders", 4, Duration::ZERO).unwrap());
    assert_eq!(store.project("orders", |_, at| Ok(Some(at + 1))).unwrap(), Some(5));
    assert_eq!(store.project("projected", |_, at| Ok(Some(at + 1))).unwrap(), Some(1));
    assert_eq!(store.project("never", |_, _| Ok(None)).unwrap(), None);
    let tried = |name| store.try_project(name, |_, at| Ok(Some(at + 1))).unwrap();
    assert_eq!(tried("orders"), Batch::Committed(6));
    assert_eq!(tried("tried"), Batch::Committed(1));
    let mut client = store.connection().unwrap();
    let mut tx = client.transaction().unwrap();
    let mut here = store.in_transaction(&mut tx);
    assert_eq!(here.lock("orders").unwrap(), 6);
    assert_eq!(here.lock("locked").unwrap(), 0);
    assert_eq!(here.try_lock("orders").unwrap(), Some(6));
    assert_eq!(here.try_lock("absent").unwrap(), Some(0));
    here.save("orders", 7).unwrap();
    here.save_many(&[("orders", 8)]).unwrap();
    here.advance("orders", 8, 9).unwrap();
    assert_eq!(here.get("orders").unwrap(), 9);
    assert!(here.all().unwrap().len() > 4);
    assert!(here.delete("locked").unwrap());
    tx.commit().unwrap();
    drop(client);
    if let Some(proxy) = proxy {
        proxy.cut("save", Cut::BeforeTheAnswer);
        assert!(proxy.disarm());
        proxy.cut("INSERT", Cut::BeforeTheAnswer);
        store.save("orders", 10).unwrap();
        proxy.cut("INSERT", Cut::BeforeTheAnswer);
        store.save_many(&[("orders", 11), ("a", 2)]).unwrap();
        proxy.cut("DELETE", Cut::BeforeTheAnswer);
        store.delete("tried").unwrap();
        proxy.cut("COMMIT", Cut::BeforeTheAnswer);
        assert_eq!(store.project("orders", |_, at| Ok(Some(at + 1))).unwrap(), Some(12));
        let mut runs = 0;
        let committed = store.project("orders", |tx, at| {
            runs += 1;
            if runs == 1 {
                tx.batch_execute(
                    "SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())",
                )?;
            }
            Ok(Some(at + 1))
        });
        assert_eq!(committed.unwrap(), Some(13));
        // A connection that was left in a failed transaction is discarded.
        let mut client = store.connection().unwrap();
        client.batch_execute("BEGIN").unwrap();
        client.batch_execute("SELECT 1 / nothing").unwrap_err();
        drop(client);
        store.save("orders", 14).unwrap();
        // The server turns read-only and back, and the closure finds out.
        let mut runs = 0;
        let error = store
            .project("orders", |tx, at| {
                runs += 1;
                tx.batch_execute("SET TRANSACTION READ ONLY")?;
                store.in_transaction(tx).save("orders", at + 1)?;
                Ok(Some(at + 1))
            })
            .unwrap_err();
        assert_eq!((runs, harness::sql_state(&error).as_deref()), (1, Some("25006")));
    }
    thread::scope(|scope| {
        for i in 0..20 {
            scope.spawn(move || {
                for offset in 1..5 {
                    store.save(&format!("projection {i}"), offset).unwrap();
                    store.advance(&format!("advanced {i}"), offset - 1, offset).unwrap();
                }
            });
        }
    });
    for checkpoint in store.all().unwrap() {
        assert!(store.delete(&checkpoint.projection).unwrap());
    }
    assert!(!store.delete("orders").unwrap());
}

#[test]
fn namesakes_of_functions_and_operators_are_never_called() {
    let database = harness::fresh_database();
    create_namesakes(&database);
    let name = database.rsplit('/').next().unwrap();
    let proxy = Proxy::to(harness::server().port());
    let params =
        format!("{} dbname={name} options='-c search_path=evil,public,pg_catalog'", proxy.params());
    let mut schemas = 0;
    for is_callers_pool in [false, true] {
        for (prepared, group_commit) in [(false, false), (true, false), (false, true)] {
            schemas += 1;
            let builder = PostgresCheckpointStore::builder()
                .schema(format!("made {schemas}"))
                .updated_at_index(true)
                .prepared_statements(prepared)
                .group_commit(group_commit);
            let store = if is_callers_pool {
                builder.build(pool(&params, 4, Duration::from_secs(30))).unwrap()
            } else {
                builder.connect(&params).unwrap()
            };
            everything(&store, Some(&proxy));
            // And what is there already is taken.
            store.migrate().unwrap();
        }
    }
}

/// The same under plain settings, so that it is not the namesakes that something fails for.
#[test]
fn everything_works_without_namesakes() {
    let database = harness::fresh_database();
    let store =
        PostgresCheckpointStore::builder().updated_at_index(true).connect(&database).unwrap();
    everything(&store, None);
}
