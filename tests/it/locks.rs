//! Rival workers of one projection, with `lock`, `try_lock`, and `get` and `advance`.

use std::sync::mpsc;
use std::thread;

use checkpoint_store::postgres::Client;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore};

use crate::harness::{Schema, wait_for_a_waiter};

fn the_second_waits_and_sees_the_firsts_offset(schema: &Schema) {
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let start = schema.store.in_transaction(&mut tx).lock("orders").unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(|| {
            let mut client = schema.client();
            let mut tx = client.transaction().unwrap();
            schema.store.in_transaction(&mut tx).lock("orders").unwrap()
        });
        wait_for_a_waiter(&mut schema.client(), &schema.name);
        schema.store.in_transaction(&mut tx).save("orders", start + 5).unwrap();
        tx.commit().unwrap();
        assert_eq!(second.join().unwrap(), start + 5);
    });
}

#[test]
fn the_second_of_two_that_lock_waits_and_sees_the_firsts_offset() {
    let schema = Schema::new();
    schema.store.save("orders", 10).unwrap();
    the_second_waits_and_sees_the_firsts_offset(&schema);
}

#[test]
fn the_second_waits_for_the_first_that_is_still_creating_the_checkpoint() {
    the_second_waits_and_sees_the_firsts_offset(&Schema::new());
}

#[test]
fn a_lock_creates_the_checkpoint_at_zero_and_a_rollback_takes_it_back() {
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    assert_eq!(schema.store.in_transaction(&mut tx).lock("orders").unwrap(), 0);
    assert_eq!(schema.store.in_transaction(&mut tx).find("orders").unwrap().unwrap().offset, 0);
    tx.rollback().unwrap();
    assert_eq!(schema.store.find("orders").unwrap(), None);
}

#[test]
fn a_lock_leaves_the_time_of_the_last_save() {
    let schema = Schema::new();
    schema.store.save("orders", 10).unwrap();
    let before = schema.store.find("orders").unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    schema.store.in_transaction(&mut tx).lock("orders").unwrap();
    tx.commit().unwrap();
    assert_eq!(schema.store.find("orders").unwrap(), before);
}

#[test]
fn try_lock_never_waits_for_who_holds_the_projection() {
    let schema = Schema::new();
    schema.store.save("orders", 10).unwrap();
    never_waits(&schema, |store, tx| store.in_transaction(tx).lock("orders").map(drop));
    never_waits(&schema, |store, tx| store.in_transaction(tx).save("orders", 11));
    never_waits(&schema, |store, tx| store.in_transaction(tx).delete("orders").map(drop));
}

#[test]
fn try_lock_never_waits_for_who_is_creating_the_projection() {
    let schema = Schema::new();
    never_waits(&schema, |store, tx| store.in_transaction(tx).lock("orders").map(drop));
    never_waits(&schema, |store, tx| store.in_transaction(tx).try_lock("orders").map(drop));
    never_waits(&schema, |store, tx| store.in_transaction(tx).save("orders", 11));
    never_waits(&schema, |store, tx| store.in_transaction(tx).advance("orders", 0, 11));
}

/// While one transaction holds what `hold` took, another's `try_lock` returns `None`, and can go
/// on and commit; its settings are what they were. The holder then rolls back.
fn never_waits(
    schema: &Schema,
    hold: fn(
        &PostgresCheckpointStore,
        &mut checkpoint_store::postgres::Transaction<'_>,
    ) -> checkpoint_store::Result<()>,
) {
    let mut holder = schema.client();
    let mut rivals = holder.transaction().unwrap();
    hold(&schema.store, &mut rivals).unwrap();

    let mut rival = schema.client();
    let mut tx = rival.transaction().unwrap();
    tx.batch_execute("SET LOCAL lock_timeout = '77s'").unwrap();
    // Were it to wait for the holder, which is this very thread, it would wait for ever; the
    // server's time-out turns that into a failure.
    tx.batch_execute("SET LOCAL statement_timeout = '20s'").unwrap();
    assert_eq!(schema.store.in_transaction(&mut tx).try_lock("orders").unwrap(), None);
    let setting: String = tx.query_one("SHOW lock_timeout", &[]).unwrap().get(0);
    assert_eq!(setting, "77s");
    schema.store.in_transaction(&mut tx).save("another", 1).unwrap();
    tx.commit().unwrap();
    assert_eq!(schema.store.get("another").unwrap(), 1);
    rivals.rollback().unwrap();
}

#[test]
fn try_lock_takes_what_nobody_holds_and_creates_what_is_not_there() {
    let schema = Schema::new();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let setting = |tx: &mut checkpoint_store::postgres::Transaction<'_>| -> String {
        tx.query_one("SHOW lock_timeout", &[]).unwrap().get(0)
    };
    let before = setting(&mut tx);
    assert_eq!(schema.store.in_transaction(&mut tx).try_lock("orders").unwrap(), Some(0));
    assert_eq!(setting(&mut tx), before);
    schema.store.in_transaction(&mut tx).save("orders", 4).unwrap();
    assert_eq!(schema.store.in_transaction(&mut tx).try_lock("orders").unwrap(), Some(4));
    thread::scope(|scope| {
        let waiter = scope.spawn(|| schema.store.save("orders", 9));
        wait_for_a_waiter(&mut schema.client(), &schema.name);
        tx.commit().unwrap();
        waiter.join().unwrap().unwrap();
    });
    assert_eq!(schema.store.get("orders").unwrap(), 9);
}

#[test]
fn try_lock_waits_no_longer_than_the_server_can_say_for_who_is_creating_the_projection() {
    let schema = Schema::new();
    let mut client = schema.client();
    client
        .batch_execute(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM set_config('noted.lock_timeout', current_setting('lock_timeout'), true);
                 RETURN NEW;
             END $$;
             CREATE TRIGGER note BEFORE INSERT ON projection_checkpoints
                 FOR EACH ROW EXECUTE FUNCTION note();",
        )
        .unwrap();
    let mut tx = client.transaction().unwrap();
    assert_eq!(schema.store.in_transaction(&mut tx).try_lock("orders").unwrap(), Some(0));
    let noted: String =
        tx.query_one("SELECT current_setting('noted.lock_timeout')", &[]).unwrap().get(0);
    assert_eq!(noted, "1ms");
}

/// What was deleted and created while the `advance` waited is one checkpoint to it, and not none.
#[test]
fn an_advance_that_waited_for_a_delete_and_a_save_goes_by_what_was_saved() {
    let schema = Schema::new();
    for (saved, outcome) in [(5, Ok(())), (7, Err(7))] {
        schema.store.save("orders", 5).unwrap();
        let mut client = schema.client();
        let mut tx = client.transaction().unwrap();
        schema.store.in_transaction(&mut tx).delete("orders").unwrap();
        schema.store.in_transaction(&mut tx).save("orders", saved).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| schema.store.advance("orders", 5, 6));
            wait_for_a_waiter(&mut schema.client(), &schema.name);
            tx.commit().unwrap();
            let advanced = waiter.join().unwrap().map_err(|error| match error {
                Error::Conflict { found, .. } => found,
                other => panic!("{other:?}"),
            });
            assert_eq!(advanced, outcome);
        });
    }
}

#[test]
fn a_worker_that_locks_may_keep_running_while_its_projection_is_reset() {
    let schema = Schema::new();
    schema.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let mut client = schema.client();
    for _ in 0..3 {
        step_with_lock(&schema.store, &mut client);
        step_with_advance(&schema.store, &mut client);
    }
    let mut admin = schema.client();
    let mut reset = admin.transaction().unwrap();
    assert_eq!(schema.store.in_transaction(&mut reset).lock("applied").unwrap(), 18);
    thread::scope(|scope| {
        let worker = scope.spawn(|| step_with_lock(&schema.store, &mut client));
        wait_for_a_waiter(&mut schema.client(), &schema.name);
        reset.execute("DELETE FROM applied", &[]).unwrap();
        schema.store.in_transaction(&mut reset).save("applied", 0).unwrap();
        reset.commit().unwrap();
        worker.join().unwrap();
    });
    let applied = admin.query_one("SELECT count(*), max(event) FROM applied", &[]).unwrap();
    assert_eq!((applied.get::<_, i64>(0), applied.get::<_, i64>(1)), (3, 3));
    assert_eq!(schema.store.get("applied").unwrap(), 3);
}

#[test]
fn a_lock_that_is_not_had_in_time_is_transient() {
    let schema = Schema::new();
    let mut holder = schema.client();
    let mut held = holder.transaction().unwrap();
    schema.store.in_transaction(&mut held).lock("orders").unwrap();
    let mut rival = schema.client();
    let mut tx = rival.transaction().unwrap();
    tx.batch_execute("SET LOCAL lock_timeout = '5ms'").unwrap();
    let error = schema.store.in_transaction(&mut tx).lock("orders").unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}

const EVENTS: i64 = 600;

/// Applies the next few events, the way a worker with `lock` does it.
fn step_with_lock(store: &PostgresCheckpointStore, client: &mut Client) -> bool {
    let mut tx = client.transaction().unwrap();
    let offset = store.in_transaction(&mut tx).lock("applied").unwrap();
    let to = EVENTS.min(offset + 3);
    apply(&mut tx, offset, to);
    store.in_transaction(&mut tx).save("applied", to).unwrap();
    tx.commit().unwrap();
    to == EVENTS
}

/// The same with `get` and `advance`; whoever comes too late rolls back.
fn step_with_advance(store: &PostgresCheckpointStore, client: &mut Client) -> bool {
    let mut tx = client.transaction().unwrap();
    let offset = store.in_transaction(&mut tx).get("applied").unwrap();
    let to = EVENTS.min(offset + 3);
    apply(&mut tx, offset, to);
    match store.in_transaction(&mut tx).advance("applied", offset, to) {
        Ok(()) => tx.commit().unwrap(),
        Err(Error::Conflict { .. }) => tx.rollback().unwrap(),
        Err(other) => panic!("{other:?}"),
    }
    to == EVENTS
}

fn apply(tx: &mut checkpoint_store::postgres::Transaction<'_>, after: i64, to: i64) {
    let query = "INSERT INTO applied SELECT generate_series($1::bigint + 1, $2)";
    tx.execute(query, &[&after, &to]).unwrap();
}

#[test]
fn six_rivals_apply_each_event_exactly_once() {
    let schema = Schema::new();
    // No unique index: it would hide an event that is applied twice behind an error.
    schema.client().batch_execute("CREATE TABLE applied (event bigint)").unwrap();
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        for i in 0..6 {
            let (schema, send) = (&schema, send.clone());
            scope.spawn(move || {
                let mut client = schema.client();
                let step = if i % 2 == 0 { step_with_lock } else { step_with_advance };
                while !step(&schema.store, &mut client) {}
                send.send(i).unwrap();
            });
        }
    });
    assert_eq!(receive.try_iter().count(), 6);
    let row = schema
        .client()
        .query_one("SELECT count(*), count(DISTINCT event), max(event) FROM applied", &[])
        .unwrap();
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)),
        (EVENTS, EVENTS, EVENTS)
    );
    assert_eq!(schema.store.get("applied").unwrap(), EVENTS);
}

#[test]
fn rivals_that_create_the_same_projection_share_out_the_steps() {
    let schema = Schema::new();
    for round in 0..20 {
        let projection = format!("round {round}");
        let results: Vec<_> = thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|i| {
                    let (schema, projection) = (&schema, &projection);
                    scope.spawn(move || {
                        if i % 2 == 0 {
                            return schema.store.advance(projection, 0, 1).is_ok();
                        }
                        let mut client = schema.client();
                        let mut tx = client.transaction().unwrap();
                        let offset = schema.store.in_transaction(&mut tx).lock(projection).unwrap();
                        if offset == 0 {
                            schema.store.in_transaction(&mut tx).save(projection, 1).unwrap();
                        }
                        tx.commit().unwrap();
                        offset == 0
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|won| **won).count(), 1, "{results:?}");
    }
}
