//! What surrounds the table: collations, row-level security, namesakes, settings, encodings.

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, conformance};

use crate::harness::{self, chain, sql_state, unique};

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
