//! What the C# store does, row by row of the table at the end of `src/guide/from_csharp.md`.

use std::time::{Duration, SystemTime};

use checkpoint_store::{
    Cadence, CheckpointStore, Checkpointer, Health, HealthCheck, HealthLevel,
    MemoryCheckpointStore, PostgresCheckpointStore, ProjectionStatus,
};

use crate::harness::{self, Schema, wait_until};

#[test]
fn get_save_delete_and_get_all() {
    let schema = Schema::new();
    for store in [&schema.store as &dyn CheckpointStore, &MemoryCheckpointStore::new()] {
        assert_eq!(store.get("orders").unwrap(), 0, "get returns 0 when there is none");
        store.save("orders", 42).unwrap();
        store.save("revenue", 7).unwrap();
        store.save("orders", 43).unwrap();
        assert_eq!(store.get("orders").unwrap(), 43);
        let all: Vec<_> =
            store.all().unwrap().into_iter().map(|c| (c.projection, c.offset)).collect();
        assert_eq!(all, [("orders".to_owned(), 43), ("revenue".to_owned(), 7)]);
        assert!(store.delete("orders").unwrap());
        assert_eq!(store.get("orders").unwrap(), 0);
        assert_eq!(store.all().unwrap().len(), 1);
    }
}

#[test]
fn options_connection_string_table_name_and_schema_name() {
    let connection_string = harness::fresh_database();
    let store = PostgresCheckpointStore::builder()
        .schema("reporting")
        .table("progress")
        .connect(&connection_string)
        .unwrap();
    store.migrate().unwrap();
    store.save("orders", 42).unwrap();
    let query = "SELECT \"offset\" FROM reporting.progress WHERE projection_name = 'orders'";
    let row = harness::client(&connection_string).query_one(query, &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 42);
}

#[test]
fn table_projection_checkpoints_and_index_on_updated_at() {
    let connection_string = harness::fresh_database();
    let store = PostgresCheckpointStore::builder()
        .updated_at_index(true)
        .connect(&connection_string)
        .unwrap();
    store.migrate().unwrap();
    let mut client = harness::client(&connection_string);
    let columns = "SELECT concat_ws(' ', column_name, data_type, is_nullable, column_default)
                   FROM information_schema.columns
                   WHERE table_schema = 'public' AND table_name = 'projection_checkpoints'
                   ORDER BY ordinal_position";
    let columns = client.query(columns, &[]).unwrap();
    assert_eq!(
        columns.iter().map(|row| row.get(0)).collect::<Vec<String>>(),
        [
            "projection_name text NO",
            "offset bigint NO",
            "updated_at timestamp with time zone NO now()"
        ]
    );
    let indexes = "SELECT indexdef FROM pg_indexes WHERE tablename = 'projection_checkpoints'
                   ORDER BY indexname";
    let indexes: Vec<String> =
        client.query(indexes, &[]).unwrap().iter().map(|row| row.get(0)).collect();
    assert!(indexes[0].contains("UNIQUE") && indexes[0].ends_with("(projection_name)"));
    assert!(indexes[1].ends_with("(updated_at)"), "{indexes:?}");
    assert_eq!(indexes.len(), 2);
}

#[test]
fn a_save_in_the_same_transaction_as_the_read_model() {
    let schema = Schema::new();
    let mut client = schema.client();
    client.batch_execute("CREATE TABLE orders (id bigint)").unwrap();
    for (commit, rows, offset) in [(false, 0, 0), (true, 1, 42)] {
        let mut tx = client.transaction().unwrap();
        tx.execute("INSERT INTO orders VALUES (1)", &[]).unwrap();
        schema.store.in_transaction(&mut tx).save("orders", 42).unwrap();
        if commit {
            tx.commit().unwrap();
        } else {
            tx.rollback().unwrap();
        }
        let count = client.query_one("SELECT count(*) FROM orders", &[]).unwrap();
        assert_eq!((count.get::<_, i64>(0), schema.store.get("orders").unwrap()), (rows, offset));
    }
}

/// Processes 10 events, and tells the checkpoint in the store after each.
fn checkpoints(cadence: Cadence) -> Vec<i64> {
    let store = Schema::new().store;
    let mut checkpointer = Checkpointer::resume(&store, "orders", cadence).unwrap();
    (1..=10)
        .map(|event| {
            checkpointer.processed(event).unwrap();
            store.get("orders").unwrap()
        })
        .collect()
}

#[test]
fn a_checkpoint_after_every_event() {
    assert_eq!(checkpoints(Cadence::every(1)), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn after_every_n_events() {
    assert_eq!(checkpoints(Cadence::every(4)), [0, 0, 0, 4, 4, 4, 4, 8, 8, 8]);
}

#[test]
fn every_t_seconds_and_a_last_one_at_the_end() {
    let store = Schema::new().store;
    let cadence = Cadence::within(Duration::from_millis(5));
    let mut checkpointer = Checkpointer::resume(&store, "orders", cadence).unwrap();
    assert!(!checkpointer.processed(1).unwrap(), "no time has passed yet");
    assert_eq!(store.get("orders").unwrap(), 0);
    wait_until("the time has passed", || checkpointer.save_if_due().unwrap());
    assert_eq!(store.get("orders").unwrap(), 1);

    let an_hour = Cadence::within(Duration::from_secs(3600));
    let mut checkpointer = Checkpointer::resume(&store, "orders", an_hour).unwrap();
    for event in 2..=10 {
        assert!(!checkpointer.processed(event).unwrap());
    }
    assert_eq!(store.get("orders").unwrap(), 1);
    checkpointer.flush().unwrap();
    assert_eq!(store.get("orders").unwrap(), 10);
}

#[test]
fn projection_lag_with_a_warning_past_1000() {
    let store = Schema::new().store;
    store.save("orders", 4_000).unwrap();
    for (stream_head, lag, warning) in
        [(4_000, 0, false), (4_999, 999, false), (5_001, 1_001, true), (9_000, 5_000, true)]
    {
        let status = ProjectionStatus::read(&store, "orders", stream_head).unwrap();
        assert_eq!(status.lag, lag);
        let health = HealthCheck::new().assess(&status, SystemTime::now());
        assert_eq!(matches!(health, Health::CriticallyLagging { .. }), warning, "{health}");
    }
}

#[test]
fn dashboard_rows_and_health_check() {
    let store = Schema::new().store;
    store.save_many(&[("behind", 958), ("done", 1_000), ("far behind", 0)]).unwrap();
    let rows: Vec<_> = store.all().unwrap().iter().map(|row| row.status(1_000)).collect();
    let shown: Vec<_> = rows
        .iter()
        .map(|row| {
            let percent = format!("{:.1}", row.percent_complete);
            (row.projection.as_str(), row.checkpoint, row.stream_head, row.lag, percent)
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("behind", 958, 1_000, 42, "95.8".to_owned()),
            ("done", 1_000, 1_000, 0, "100.0".to_owned()),
            ("far behind", 0, 1_000, 1_000, "0.0".to_owned()),
        ]
    );
    assert!(rows.iter().all(|row| row.updated_at.is_some()));

    let check = HealthCheck::new();
    let health: Vec<_> = rows.iter().map(|row| check.assess(row, SystemTime::now())).collect();
    let levels: Vec<_> = health.iter().map(Health::level).collect();
    assert_eq!(levels, [HealthLevel::Degraded, HealthLevel::Healthy, HealthLevel::Unhealthy]);
    let told: Vec<_> = health.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "projection lagging: 42 events",
            "projection up to date",
            "projection critically lagging: 1000 events"
        ]
    );
}

/// Processes the events up to 10 that are new, and returns them.
fn run(store: &dyn CheckpointStore) -> Vec<i64> {
    let mut checkpointer = Checkpointer::resume(store, "orders", Cadence::every(3)).unwrap();
    let events: Vec<_> = (checkpointer.offset() + 1..=10).collect();
    for &event in &events {
        checkpointer.processed(event).unwrap();
    }
    checkpointer.flush().unwrap();
    events
}

#[test]
fn resume_from_a_checkpoint() {
    let schema = Schema::new();
    for store in [&schema.store as &dyn CheckpointStore, &MemoryCheckpointStore::new()] {
        store.save("orders", 7).unwrap();
        assert_eq!(run(store), [8, 9, 10]);
        assert_eq!(run(store), [0_i64; 0], "nothing is new");
        assert_eq!(store.get("orders").unwrap(), 10);
    }
}

#[test]
fn start_from_zero() {
    let schema = Schema::new();
    for store in [&schema.store as &dyn CheckpointStore, &MemoryCheckpointStore::new()] {
        assert_eq!(run(store), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(store.get("orders").unwrap(), 10);
    }
}
