//! Rows that somebody else wrote: a value or an error, never a panic.

use std::time::{Duration, SystemTime};

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Error, Health, HealthCheck, ProjectionStatus,
};

use crate::harness::{Schema, chain};

fn insert(schema: &Schema, name: &str, offset: &str, updated_at: &str) {
    let sql = format!(
        "INSERT INTO projection_checkpoints VALUES ($1, ({offset})::bigint, '{updated_at}')"
    );
    schema.client().execute(&sql, &[&name]).unwrap();
}

#[test]
fn times_that_nobody_lives_in_are_values() {
    let schema = Schema::new();
    let store = &schema.store;
    let times = [
        "infinity",
        "-infinity",
        "4713-01-01 00:00:00+00 BC",
        "0001-01-01 00:00:00+00",
        "1969-12-31 23:59:59.999999+00",
        "1970-01-01 00:00:00+00",
        "1999-12-31 23:59:59.999999+00",
        "294276-12-31 23:59:59.999999+00",
    ];
    for time in times {
        insert(&schema, time, "42", time);
    }
    let listed = store.all().unwrap();
    assert_eq!(listed.len(), times.len());
    assert!(listed.iter().all(|found| found.status(50).lag == 8));
    let now = SystemTime::now();
    let mut found = times.map(|time| store.find(time).unwrap().unwrap().updated_at);
    assert!(found[0] > now && found[7] > now, "{found:?}");
    let last_of_1969 = SystemTime::UNIX_EPOCH - Duration::from_micros(1);
    assert_eq!((found[4], found[5]), (last_of_1969, SystemTime::UNIX_EPOCH));
    found.rotate_left(1);
    assert!(found.is_sorted(), "infinity goes to the end: {found:?}");

    for time in times {
        assert_eq!(store.get(time).unwrap(), 42);
        let status = ProjectionStatus::read(store, time, 50).unwrap();
        assert_eq!((status.lag, status.checkpoint), (8, 42));
        let health =
            HealthCheck::new().stalled_after(Duration::from_secs(3600)).assess(&status, now);
        let is_future = matches!(time, "infinity" | "294276-12-31 23:59:59.999999+00");
        match health {
            Health::Lagging { lag: 8 } => assert!(is_future, "{time}"),
            Health::Stalled { lag: 8, idle } => {
                assert!(!is_future && idle > Duration::from_secs(3600), "{time}: {idle:?}");
            }
            other => panic!("{time}: {other:?}"),
        }
        // A save puts it right.
        let mut checkpointer = Checkpointer::resume(store, time, Cadence::every(1)).unwrap();
        assert_eq!(checkpointer.offset(), 42);
        assert!(checkpointer.processed(43).unwrap());
        let saved = store.find(time).unwrap().unwrap();
        assert_eq!(saved.offset, 43);
        assert!(saved.updated_at.duration_since(now).unwrap_or_default().as_secs() < 3_600);
    }
}

#[test]
fn a_negative_offset_is_told_as_it_is_and_can_be_replaced() {
    for offset in [-1, -2, i64::MIN] {
        let schema = Schema::new();
        let store = &schema.store;
        insert(&schema, "orders", &offset.to_string(), "2024-01-01 00:00:00+00");

        assert_eq!(store.get("orders").unwrap(), offset);
        assert_eq!(store.find("orders").unwrap().unwrap().offset, offset);
        assert_eq!(store.all().unwrap()[0].offset, offset);
        for head in [0, 10, i64::MAX] {
            let status = ProjectionStatus::read(store, "orders", head).unwrap();
            assert_eq!(status.checkpoint, offset);
            assert_eq!(status.lag, head.saturating_sub(offset));
            assert!(status.percent_complete.is_finite(), "{status:?}");
            let health = HealthCheck::new()
                .stalled_after(Duration::from_secs(1))
                .assess(&status, SystemTime::now());
            assert!(matches!(health, Health::Stalled { .. }), "{health:?}");
        }
        // A compare-and-set neither takes it for none nor compares with it.
        let refused = store.advance("orders", offset, 5);
        assert!(
            matches!(refused, Err(Error::InvalidOffset { offset: named, .. }) if named == offset)
        );
        let conflict = store.advance("orders", 0, 5);
        assert!(
            matches!(conflict, Err(Error::Conflict { expected: 0, found, .. }) if found == offset)
        );
        let mut client = schema.client();
        let mut tx = client.transaction().unwrap();
        assert_eq!(store.in_transaction(&mut tx).lock("orders").unwrap(), offset);
        assert_eq!(store.in_transaction(&mut tx).try_lock("orders").unwrap(), Some(offset));
        drop(tx);

        // Every save of it would be refused, so it does not begin.
        match Checkpointer::resume(store, "orders", Cadence::every(1)) {
            Err(Error::InvalidOffset { offset: named, .. }) => assert_eq!(named, offset),
            other => panic!("{other:?}"),
        }
        store.save("orders", 3).unwrap();
        assert_eq!(store.get("orders").unwrap(), 3);
    }
}

#[test]
fn names_that_no_store_takes_are_listed_and_cannot_be_asked_for() {
    let schema = Schema::new();
    let store = &schema.store;
    let too_long = "x".repeat(2_000);
    for name in ["", &too_long] {
        insert(&schema, name, "7", "2024-01-01 00:00:00+00");
        assert!(matches!(store.find(name), Err(Error::InvalidProjection { .. })));
        assert!(matches!(store.delete(name), Err(Error::InvalidProjection { .. })));
        let resumed = Checkpointer::resume(store, name, Cadence::every(1));
        assert!(matches!(resumed, Err(Error::InvalidProjection { .. })));
    }
    let listed: Vec<_> = store.all().unwrap();
    assert_eq!(listed.iter().map(|found| found.projection.len()).collect::<Vec<_>>(), [0, 2_000]);
    for found in listed {
        assert_eq!(found.status(10).lag, 3);
    }
    store.save("orders", 1).unwrap();
    assert_eq!(store.all().unwrap().len(), 3);
}

#[test]
fn a_null_where_none_may_be_is_an_error_that_names_the_table() {
    let schema = Schema::new();
    for column in ["offset", "updated_at"] {
        schema
            .client()
            .batch_execute(&format!(
                "TRUNCATE projection_checkpoints;
                 INSERT INTO projection_checkpoints VALUES ('orders', 1, now());
                 ALTER TABLE projection_checkpoints ALTER \"{column}\" DROP NOT NULL;
                 UPDATE projection_checkpoints SET \"{column}\" = NULL;"
            ))
            .unwrap();
        for error in [
            schema.store.find("orders").map(drop).unwrap_err(),
            schema.store.get("orders").map(drop).unwrap_err(),
            schema.store.all().map(drop).unwrap_err(),
        ] {
            let told = chain(&error);
            assert!(matches!(error, Error::Backend { .. }), "{error:?}");
            assert!(told.contains(&format!("table \"{}\"", schema.name)), "{told}");
            assert!(!error.is_transient());
        }
        let refused = schema.store.migrate().unwrap_err();
        assert!(chain(&refused).contains(&format!("\"{column}\" can be null")), "{refused:?}");
        schema
            .client()
            .batch_execute(&format!(
                "TRUNCATE projection_checkpoints;
                 ALTER TABLE projection_checkpoints ALTER \"{column}\" SET NOT NULL;"
            ))
            .unwrap();
    }
}
