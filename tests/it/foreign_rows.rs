//! Rows that somebody else wrote into the table: values or errors, never a panic.

use std::time::{Duration, SystemTime};

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, Health, HealthCheck, ProjectionStatus,
};

use crate::harness::Schema;

fn with_row(name: &str, offset: i64, updated_at: &str) -> Schema {
    let schema = Schema::new();
    let sql = format!("INSERT INTO projection_checkpoints VALUES ($1, $2, '{updated_at}')");
    schema.client().execute(&sql, &[&name, &offset]).unwrap();
    schema
}

#[test]
fn a_negative_offset_is_read_as_it_is_and_not_resumed_from() {
    let schema = with_row("orders", -5, "2026-01-01");
    let store = &schema.store;
    assert_eq!(store.find("orders").unwrap().unwrap().offset, -5);
    assert_eq!(store.get("orders").unwrap(), -5);
    assert_eq!(store.all().unwrap()[0].offset, -5);
    let refused = Checkpointer::resume(store, "orders", Cadence::every(1)).map(drop);
    assert!(matches!(refused, Err(Error::InvalidOffset { offset: -5, .. })), "{refused:?}");
    let status = ProjectionStatus::read(store, "orders", i64::MAX).unwrap();
    assert_eq!(status.lag, i64::MAX);
    let conflict = store.advance("orders", 0, 1);
    assert!(matches!(conflict, Err(Error::Conflict { found: -5, .. })), "{conflict:?}");
    store.save("orders", 1).unwrap();
    assert_eq!(store.get("orders").unwrap(), 1);
}

#[test]
fn any_time_that_postgres_can_store_is_read() {
    let check = HealthCheck::new().stalled_after(Duration::from_mins(1));
    let now = SystemTime::now();
    for (updated_at, stalled) in [
        ("infinity", false),
        ("-infinity", true),
        ("4713-01-01 00:00:00+00 BC", true),
        ("1969-12-31 23:59:59.999999+00", true),
        ("1970-01-01 00:00:00+00", true),
        ("2000-01-01 00:00:00+00", true),
        ("294276-12-31 23:59:59.999999+00", false),
    ] {
        let schema = with_row("orders", 1, updated_at);
        let store = &schema.store;
        let found = store.find("orders").unwrap().unwrap();
        assert_eq!(store.all().unwrap(), std::slice::from_ref(&found));
        let health = check.assess(&found.status(2), now);
        assert_eq!(matches!(health, Health::Stalled { .. }), stalled, "{updated_at}: {health:?}");
        let _ = (health.to_string(), format!("{found:?}"));
        store.save("orders", 2).unwrap();
        assert!(store.find("orders").unwrap().unwrap().updated_at >= now - Duration::from_mins(1));
    }
}

#[test]
fn a_time_before_1970_keeps_its_distance() {
    let schema = with_row("orders", 1, "1969-12-31 23:59:59.5+00");
    let found = schema.store.find("orders").unwrap().unwrap();
    let before = SystemTime::UNIX_EPOCH.duration_since(found.updated_at).unwrap();
    assert_eq!(before, Duration::from_millis(500));
}

#[test]
fn names_that_no_store_takes_are_listed_and_cannot_be_asked_for() {
    for name in ["", &"x".repeat(1_025), &"é".repeat(1_000)] {
        let schema = with_row(name, 7, "2026-01-01");
        let store = &schema.store;
        let all = store.all().unwrap();
        assert_eq!((all[0].projection.as_str(), all[0].offset), (name, 7));
        assert!(matches!(store.find(name), Err(Error::InvalidProjection { .. })));
        assert!(matches!(store.delete(name), Err(Error::InvalidProjection { .. })));
        assert_eq!(all[0].status(10).lag, 3);
    }
}

#[test]
fn other_columns_of_the_table_are_left_alone() {
    let schema = Schema::new();
    let mut client = schema.client();
    client
        .batch_execute("ALTER TABLE projection_checkpoints ADD note text NOT NULL DEFAULT 'new'")
        .unwrap();
    schema.store.save("orders", 1).unwrap();
    client.batch_execute("UPDATE projection_checkpoints SET note = 'kept'").unwrap();
    schema.store.save("orders", 2).unwrap();
    schema.store.advance("orders", 2, 3).unwrap();
    schema.store.save_many(&[("orders", 4)]).unwrap();
    let row = client.query_one("SELECT note, \"offset\" FROM projection_checkpoints", &[]).unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("kept", 4));
}
