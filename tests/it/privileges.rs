//! The least that a role has to be granted, and what is said when it is less.

use checkpoint_store::postgres::Transaction;
use checkpoint_store::postgres::error::SqlState;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result, conformance};

use crate::harness::{self, chain, sql_state};

/// All that the documentation asks for.
const GRANTS: [(&str, &str); 5] = [
    ("USAGE", "SCHEMA app"),
    ("SELECT", "TABLE app.projection_checkpoints"),
    ("INSERT", "TABLE app.projection_checkpoints"),
    ("UPDATE", "TABLE app.projection_checkpoints"),
    ("DELETE", "TABLE app.projection_checkpoints"),
];

const TABLE: &str = "table \"app\".\"projection_checkpoints\"";

/// A database with a table in schema `app`, and a role that may do nothing there at all.
struct Granted {
    admin: checkpoint_store::postgres::Client,
    owner: PostgresCheckpointStore,
    role: String,
    params: String,
}

impl Granted {
    fn nothing() -> Self {
        let database = harness::fresh_database();
        let owner = PostgresCheckpointStore::builder().schema("app").connect(&database).unwrap();
        owner.migrate().unwrap();
        let mut admin = harness::client(&database);
        let name: String = admin.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
        let role = format!("role_of_{name}");
        admin
            .batch_execute(&format!(
                "CREATE ROLE {role} LOGIN;
                 REVOKE ALL ON DATABASE {name} FROM PUBLIC;
                 REVOKE ALL ON SCHEMA public FROM PUBLIC;
                 GRANT CONNECT ON DATABASE {name} TO {role};"
            ))
            .unwrap();
        let params = database.replace("postgres@", &format!("{role}@"));
        Self { admin, owner, role, params }
    }

    fn grant(&mut self, (privilege, on): (&str, &str)) {
        let sql = format!("GRANT {privilege} ON {on} TO {}", self.role);
        self.admin.batch_execute(&sql).unwrap();
    }

    fn store(&self) -> PostgresCheckpointStore {
        PostgresCheckpointStore::builder().schema("app").connect(&self.params).unwrap()
    }
}

type Operation = fn(&PostgresCheckpointStore) -> Result<()>;

fn in_transaction(
    store: &PostgresCheckpointStore,
    work: impl FnOnce(&mut Transaction<'_>) -> Result<()>,
) -> Result<()> {
    let mut client = store.connection().unwrap();
    let mut tx = client.transaction().unwrap();
    work(&mut tx)?;
    tx.commit().unwrap();
    Ok(())
}

/// Every operation, and the privileges on the table that it cannot do without.
const OPERATIONS: [(&str, &[&str], Operation); 13] = [
    ("find", &["SELECT"], |store| store.find("there").map(drop)),
    ("all", &["SELECT"], |store| store.all().map(drop)),
    ("save", &["SELECT", "INSERT", "UPDATE"], |store| store.save("there", 1)),
    ("save", &["SELECT", "INSERT", "UPDATE"], |store| store.save("new", 1)),
    ("save_many", &["SELECT", "INSERT", "UPDATE"], |store| store.save_many(&[("new", 1)])),
    ("advance", &["SELECT", "UPDATE"], |store| store.advance("there", 1, 1)),
    ("advance", &["SELECT", "INSERT", "UPDATE"], |store| store.advance("absent", 0, 1)),
    ("lock", &["SELECT", "UPDATE"], |store| {
        in_transaction(store, |tx| store.in_transaction(tx).lock("there").map(drop))
    }),
    ("lock", &["SELECT", "INSERT", "UPDATE"], |store| {
        in_transaction(store, |tx| store.in_transaction(tx).lock("not there").map(drop))
    }),
    ("try_lock", &["SELECT", "UPDATE"], |store| {
        in_transaction(store, |tx| store.in_transaction(tx).try_lock("there").map(drop))
    }),
    ("try_lock", &["SELECT", "INSERT", "UPDATE"], |store| {
        in_transaction(store, |tx| store.in_transaction(tx).try_lock("free").map(drop))
    }),
    ("delete", &["SELECT", "DELETE"], |store| store.delete("new").map(drop)),
    ("delete", &["SELECT", "DELETE"], |store| store.delete("never").map(drop)),
];

#[test]
fn the_grants_of_the_documentation_are_enough_for_everything() {
    let mut granted = Granted::nothing();
    for grant in GRANTS {
        granted.grant(grant);
    }
    let store = granted.store();
    store.migrate().unwrap();
    conformance::verify(&store);
    store.save("there", 1).unwrap();
    for (operation, _, run) in OPERATIONS {
        run(&store).expect(operation);
    }
    let prepared = PostgresCheckpointStore::builder()
        .schema("app")
        .prepared_statements(true)
        .connect(&granted.params)
        .unwrap();
    prepared.save("there", 2).unwrap();
    assert_eq!(granted.owner.get("there").unwrap(), 2);

    // They are the least that there is: none of them is there already, and none gives more.
    let mut client = harness::client(&granted.params);
    for refused in [
        "CREATE TABLE app.another ()",
        "CREATE SCHEMA another",
        "CREATE TEMPORARY TABLE another ()",
        "TRUNCATE app.projection_checkpoints",
        "ALTER TABLE app.projection_checkpoints ADD another text",
        "DROP TABLE app.projection_checkpoints",
    ] {
        let error = client.batch_execute(refused).unwrap_err();
        assert_eq!(error.code().map(SqlState::code), Some("42501"), "{refused}");
    }
}

#[test]
fn each_missing_privilege_is_an_error_that_names_the_operation_and_the_table() {
    for missing in GRANTS {
        let mut granted = Granted::nothing();
        for grant in GRANTS.into_iter().filter(|grant| *grant != missing) {
            granted.grant(grant);
        }
        granted.owner.save("there", 1).unwrap();
        let store = granted.store();
        for (operation, needs, run) in OPERATIONS {
            for name in ["absent", "free", "not there"] {
                granted.owner.delete(name).unwrap();
            }
            let context = format!("{operation} without {missing:?}");
            let outcome = run(&store);
            if missing.0 != "USAGE" && !needs.contains(&missing.0) {
                outcome.expect(&context);
                continue;
            }
            let error = outcome.expect_err(&context);
            match &error {
                Error::Backend { operation: named, .. } => assert_eq!(*named, operation),
                other => panic!("{context}: {other:?}"),
            }
            assert!(!error.is_transient(), "{context}");
            assert_eq!(sql_state(&error).as_deref(), Some("42501"), "{context}: {error:?}");
            let told = chain(&error);
            assert!(told.starts_with(&format!("{operation} failed: ")), "{told}");
            assert!(told.contains(TABLE) && told.contains("permission denied"), "{told}");
        }
        assert_eq!(granted.owner.get("there").unwrap(), 1, "without {missing:?}");
        granted.grant(missing);
        for name in ["absent", "free", "not there"] {
            granted.owner.delete(name).unwrap();
        }
        for (operation, _, run) in OPERATIONS {
            run(&store).expect(operation);
        }
    }
}

#[test]
fn a_table_that_may_not_be_made_is_an_error_that_names_it() {
    let mut granted = Granted::nothing();
    granted.grant(GRANTS[0]);
    for (schema, table) in [("not there", "projection_checkpoints"), ("app", "not there")] {
        let error = PostgresCheckpointStore::builder()
            .schema(schema)
            .table(table)
            .connect(&granted.params)
            .unwrap()
            .migrate()
            .unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "migrate", .. }), "{error:?}");
        assert_eq!(sql_state(&error).as_deref(), Some("42501"));
        let told = chain(&error);
        assert!(told.contains(&format!("table \"{schema}\".\"{table}\"")), "{told}");
    }
}

#[test]
fn migrate_names_the_right_to_create_that_is_missing() {
    let mut granted = Granted::nothing();
    let migrate = |granted: &Granted, schema: &str, table: &str, index: bool| {
        let store = PostgresCheckpointStore::builder()
            .schema(schema)
            .table(table)
            .updated_at_index(index)
            .connect(&granted.params)
            .unwrap();
        let error = store.migrate().unwrap_err();
        assert!(matches!(error, Error::Backend { operation: "migrate", .. }), "{error:?}");
        assert_eq!(error.sql_state(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
        assert!(!error.is_transient());
        chain(&error)
    };
    let told = migrate(&granted, "app", "not there", false);
    assert!(told.contains("lacks USAGE on the schema \"app\""), "{told}");
    granted.grant(GRANTS[0]);
    let told = migrate(&granted, "app", "not there", false);
    assert!(told.contains("lacks CREATE on the schema \"app\""), "{told}");
    assert!(told.contains("permission denied for schema app"), "{told}");
    let told = migrate(&granted, "not there", "not there", false);
    assert!(told.contains("lacks CREATE on the database"), "{told}");
    for grant in &GRANTS[1..] {
        granted.grant(*grant);
    }
    let told = migrate(&granted, "app", "projection_checkpoints", true);
    assert!(told.contains("lacks ownership of the table \"app\""), "{told}");
}

#[test]
fn a_role_that_may_create_in_the_schema_and_no_schema_migrates() {
    let mut granted = Granted::nothing();
    granted.grant(GRANTS[0]);
    granted.grant(("CREATE", "SCHEMA app"));
    let store = PostgresCheckpointStore::builder()
        .schema("app")
        .table("its own")
        .connect(&granted.params)
        .unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
}
