//! A write that is repeated after its answer was lost: it happens once, and never undoes what a rival was
//! told in the meantime.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use checkpoint_store::postgres::error::SqlState;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result, Retry};

use crate::harness::{self, Cut, Gate, Proxy, Schema, chain, wait_until};

/// What is done in the name of others between the loss and the repeat.
type Rival = fn(&PostgresCheckpointStore);

/// The rival's turn; it comes once.
#[derive(Clone, Default)]
struct Turn(Arc<Mutex<Option<(Rival, PostgresCheckpointStore)>>>);

impl Turn {
    fn prepare(&self, rival: Rival, store: &PostgresCheckpointStore) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((rival, store.clone()));
    }

    fn take(&self) {
        let rival = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((act, store)) = rival {
            act(&store);
        }
    }

    fn is_over(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// A store of the builder's and one on a pool of the caller's, through a proxy. A rival acts before the first
/// retry of a call.
fn both_kinds(schema: &Schema, proxy: &Proxy) -> [(PostgresCheckpointStore, Turn); 2] {
    let pool = harness::pool(&proxy.params(), 2, Duration::from_secs(30));
    let (ours, theirs) = (Turn::default(), Turn::default());
    let observed = |turn: &Turn| {
        let turn = turn.clone();
        PostgresCheckpointStore::builder().schema(&schema.name).on_retry(move |_| turn.take())
    };
    [
        (observed(&ours).connect(&proxy.params()).unwrap(), ours.clone()),
        (observed(&theirs).build(pool).unwrap(), theirs.clone()),
    ]
}

/// Has the checkpoints `p` at 40 and `q` at 7, written long ago.
fn set_the_scene(schema: &Schema) {
    schema.store.save_many(&[("p", 40), ("q", 7)]).unwrap();
    age(schema);
}

/// Dates every checkpoint back, so that no test depends on how soon a call follows the write before it.
fn age(schema: &Schema) {
    let sql = "UPDATE projection_checkpoints SET updated_at = updated_at - interval '1 hour'";
    schema.client().batch_execute(sql).unwrap();
}

fn offsets(schema: &Schema) -> (Option<i64>, Option<i64>) {
    let offset = |name| schema.store.find(name).unwrap().map(|checkpoint| checkpoint.offset);
    (offset("p"), offset("q"))
}

type Write = (&'static str, fn(&PostgresCheckpointStore) -> Result<()>);

/// Each with a piece of its statement that the repeat does not have.
const WRITES: [Write; 3] = [
    ("VALUES ($1, $2", |store| store.save("p", 41)),
    ("INSERT INTO", |store| store.save_many(&[("p", 41), ("q", 8)])),
    ("DELETE FROM", |store| store.delete("p").map(drop)),
];

const CUTS: [Cut; 2] = [Cut::BeforeTheRequest, Cut::BeforeTheAnswer];

fn is_unknown(outcome: Result<()>, what: &str) {
    let error = outcome.expect_err(what);
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.is_transient(),
        "{what}: {error:?}"
    );
    assert!(chain(&error).contains("unknown whether the write was executed"), "{}", chain(&error));
}

#[test]
fn without_a_rival_a_lost_write_is_done_once_and_its_caller_sees_no_error() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, turn) in both_kinds(&schema, &proxy) {
        for place in CUTS {
            for (text, write) in WRITES {
                set_the_scene(&schema);
                store.get("p").unwrap();
                turn.prepare(|_| {}, &schema.store);
                proxy.cut(text, place);
                write(&store).unwrap();
                assert!(turn.is_over() && !proxy.disarm(), "{text}: nothing was lost");
                let expected = match text {
                    "VALUES ($1, $2" => (Some(41), Some(7)),
                    "INSERT INTO" => (Some(41), Some(8)),
                    _ => (None, Some(7)),
                };
                assert_eq!(offsets(&schema), expected, "{text}, {place:?}");
            }
        }
    }
}

/// Of a write it is unknown whether the lost attempt was executed, and a read has nothing to be unknown.
#[test]
fn what_is_refused_after_a_loss_is_unavailable_only_if_it_may_have_written() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let rename = |from, to| format!("ALTER TABLE {}.{from} RENAME TO {to}", schema.name);
    let hide = rename("projection_checkpoints", "hidden");
    let hides = move |_: &Retry<'_>| harness::server().client().batch_execute(&hide).unwrap();
    let store = PostgresCheckpointStore::builder().schema(&schema.name).on_retry(hides);
    let store = store.connect(&proxy.params()).unwrap();
    let find: Write = ("SELECT projection_name", |store| store.find("p").map(drop));
    for (text, call) in WRITES.into_iter().chain([find]) {
        set_the_scene(&schema);
        store.get("p").unwrap();
        proxy.cut(text, Cut::BeforeTheRequest);
        let error = call(&store).expect_err(text);
        assert_eq!(error.sql_state(), Some(&SqlState::UNDEFINED_TABLE), "{text}: {error:?}");
        let is_a_read = text == find.0;
        assert_eq!(matches!(error, Error::Backend { .. }), is_a_read, "{text}: {error:?}");
        let show = rename("hidden", "projection_checkpoints");
        schema.client().batch_execute(&show).unwrap();
    }
}

/// Rivals that write `p` or delete it, and leave it at another offset than any of the writes.
const RIVALS: [Rival; 6] = [
    |rival| {
        assert_eq!(rival.project("p", |_, _| Ok(Some(60))).unwrap(), Some(60));
    },
    |rival| {
        let offset = rival.get("p").unwrap();
        rival.advance("p", offset, 60).unwrap();
    },
    |rival| rival.save("p", 60).unwrap(),
    |rival| rival.save_many(&[("p", 60), ("another", 1)]).unwrap(),
    |rival| {
        rival.delete("p").unwrap();
        rival.save("p", 60).unwrap();
    },
    |rival| {
        let mut client = rival.connection().unwrap();
        let mut tx = client.transaction().unwrap();
        rival.in_transaction(&mut tx).lock("p").unwrap();
        rival.in_transaction(&mut tx).save("p", 60).unwrap();
        tx.commit().unwrap();
    },
];

#[test]
fn what_a_rival_has_written_since_the_loss_is_not_undone() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, turn) in both_kinds(&schema, &proxy) {
        for place in CUTS {
            for (text, write) in WRITES {
                for (number, rival) in RIVALS.into_iter().enumerate() {
                    set_the_scene(&schema);
                    store.get("p").unwrap();
                    turn.prepare(rival, &schema.store);
                    proxy.cut(text, place);
                    let what = format!("{text}, {place:?}, rival {number}");
                    is_unknown(write(&store), &what);
                    assert!(turn.is_over(), "{what}");
                    assert_eq!(offsets(&schema).0, Some(60), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_checkpoint_that_a_rival_has_deleted_since_the_loss_is_not_created_again() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, turn) in both_kinds(&schema, &proxy) {
        for place in CUTS {
            for (text, write) in &WRITES[..2] {
                set_the_scene(&schema);
                store.get("p").unwrap();
                turn.prepare(|rival| assert!(rival.delete("p").unwrap()), &schema.store);
                proxy.cut(text, place);
                is_unknown(write(&store), text);
                assert_eq!(offsets(&schema).0, None, "{text}, {place:?}");
            }
        }
    }
}

#[test]
fn one_checkpoint_that_a_rival_has_written_keeps_all_of_a_lost_save_many_from_being_repeated() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, turn) in both_kinds(&schema, &proxy) {
        for (place, before) in CUTS.into_iter().zip([40, 41]) {
            set_the_scene(&schema);
            store.get("p").unwrap();
            turn.prepare(|rival| rival.save("q", 60).unwrap(), &schema.store);
            proxy.cut("INSERT INTO", place);
            is_unknown(store.save_many(&[("q", 8), ("p", 41)]), "save_many");
            assert_eq!(offsets(&schema), (Some(before), Some(60)));
        }
    }
}

#[test]
fn a_checkpoint_that_stands_at_what_was_asked_is_done() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let as_asked: [(&str, Rival); 4] = [
        ("VALUES ($1, $2", |rival| rival.save("p", 41).unwrap()),
        ("VALUES ($1, $2", |rival| {
            rival.save("p", 40).unwrap();
            assert_eq!(rival.project("p", |_, offset| Ok(Some(offset + 1))).unwrap(), Some(41));
        }),
        ("INSERT INTO", |rival| rival.save_many(&[("q", 8), ("p", 41)]).unwrap()),
        ("DELETE FROM", |rival| {
            rival.delete("p").unwrap();
        }),
    ];
    for (store, turn) in both_kinds(&schema, &proxy) {
        for place in CUTS {
            for (text, rival) in as_asked {
                set_the_scene(&schema);
                store.get("p").unwrap();
                turn.prepare(rival, &schema.store);
                proxy.cut(text, place);
                let (_, write) = WRITES.into_iter().find(|(wanted, _)| *wanted == text).unwrap();
                write(&store).unwrap();
                assert!(turn.is_over(), "{text}, {place:?}");
            }
        }
    }
}

/// Nothing tells whether a rival has created and deleted it in the meantime.
#[test]
fn the_first_save_of_a_projection_is_not_repeated() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, _) in both_kinds(&schema, &proxy) {
        store.get("p").unwrap();
        proxy.cut("VALUES ($1, $2", Cut::BeforeTheRequest);
        is_unknown(store.save("p", 1), "save");
        assert_eq!(offsets(&schema).0, None);
        // If it was executed, it stands at what was asked.
        proxy.cut("VALUES ($1, $2", Cut::BeforeTheAnswer);
        store.save("p", 1).unwrap();
        assert!(!proxy.disarm());
        assert!(schema.store.delete("p").unwrap());
    }
}

#[test]
fn a_delete_that_is_repeated_says_false_for_what_its_first_attempt_has_deleted() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, _) in both_kinds(&schema, &proxy) {
        for (place, was_there) in CUTS.into_iter().zip([true, false]) {
            set_the_scene(&schema);
            store.get("p").unwrap();
            proxy.cut("DELETE FROM", place);
            assert_eq!(store.delete("p").unwrap(), was_there, "{place:?}");
            assert_eq!(offsets(&schema).0, None);
        }
    }
}

/// The answer to the repeat may be lost, too.
#[test]
fn a_second_loss_leaves_the_guard_where_it_was() {
    let schema = Schema::new();
    let proxy = Arc::new(Proxy::to(harness::server().port()));
    for second in CUTS {
        for (rival, outcome) in [(None, Some(41)), (Some(RIVALS[0]), Some(60))] {
            set_the_scene(&schema);
            let (turn, armed) = (Turn::default(), Arc::clone(&proxy));
            let (acting, direct) = (turn.clone(), schema.store.clone());
            let store = PostgresCheckpointStore::builder()
                .schema(&schema.name)
                .on_retry(move |retry| match (retry.attempt, rival) {
                    (1, _) => armed.cut("held.wanted", second),
                    (2, Some(rival)) => {
                        acting.prepare(rival, &direct);
                        acting.take();
                    }
                    _ => {}
                })
                .connect(&proxy.params())
                .unwrap();
            store.get("p").unwrap();
            proxy.cut("VALUES ($1, $2", Cut::BeforeTheRequest);
            let saved = store.save("p", 41);
            match rival {
                None => saved.unwrap(),
                Some(_) => is_unknown(saved, "save"),
            }
            assert!(!proxy.disarm(), "the second one was lost, too");
            assert_eq!(offsets(&schema).0, outcome, "{second:?}");
        }
    }
}

/// As many as no longer send their own statements.
const OTHERS: usize = 9;

/// The calls of a lost group repeat their own saves.
#[test]
fn a_save_whose_group_was_lost_undoes_nothing_either() {
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    let gate = Gate::to(proxy.port());
    let store = PostgresCheckpointStore::builder()
        .schema(&schema.name)
        .group_commit(true)
        .max_connections(u32::try_from(OTHERS).unwrap() + 1)
        .connect(&gate.params())
        .unwrap();
    let held: Vec<_> = (0..OTHERS).map(|number| format!("held {number}")).collect();
    for name in &held {
        schema.store.save(name, 1).unwrap();
    }
    for place in CUTS {
        for (rival, outcome) in [(None, 41), (Some(RIVALS[0]), 60)] {
            set_the_scene(&schema);
            let mut holder = schema.client();
            let mut transaction = holder.transaction().unwrap();
            for name in &held {
                schema.store.in_transaction(&mut transaction).lock(name).unwrap();
            }
            thread::scope(|scope| {
                for name in &held {
                    scope.spawn(|| store.save(name, 2).unwrap());
                }
                let mut observer = schema.client();
                wait_until("all others wait for their rows", || {
                    let waiting = "SELECT count(*) FROM pg_locks, pg_stat_activity
                                   WHERE NOT granted AND pg_locks.pid = pg_stat_activity.pid
                                     AND query LIKE '%\"' || current_schema() || '\".%'";
                    let count: i64 = observer.query_one(waiting, &[]).unwrap().get(0);
                    usize::try_from(count).unwrap() >= OTHERS
                });
                // The others have all connections but one. When that is lost the repeat logs in, and does
                // not get through until the rival is done.
                drop(store.connection().unwrap());
                gate.answer_knocks_only();
                proxy.cut("OF stored SKIP LOCKED", place);
                let saved = scope.spawn(|| store.save("p", 41));
                wait_until("it is to be repeated", || gate.unanswered() > 0);
                assert!(!proxy.disarm(), "{place:?}: no group was lost");
                if let Some(rival) = rival {
                    rival(&schema.store);
                }
                gate.lead_to(proxy.port());
                let saved = saved.join().unwrap();
                match rival {
                    None => saved.unwrap(),
                    Some(_) => is_unknown(saved, "save"),
                }
                assert_eq!(offsets(&schema).0, Some(outcome), "{place:?}");
                transaction.rollback().unwrap();
            });
        }
    }
}

/// The clocks of both sides are compared, by the time that an answer takes.
#[test]
fn a_save_that_follows_its_predecessor_at_once_is_seldom_in_doubt() {
    const TIMES: i64 = 60;
    let schema = Schema::new();
    let proxy = Proxy::to(harness::server().port());
    for (store, _) in both_kinds(&schema, &proxy) {
        store.save("p", 1).unwrap();
        let mut errors = Vec::new();
        for round in 1..=TIMES {
            store.save("p", round).unwrap();
            proxy.cut("VALUES ($1, $2", Cut::BeforeTheRequest);
            errors.extend(store.save("p", -round + 1_000).err());
            assert!(!proxy.disarm());
        }
        println!("{} of {TIMES} in doubt", errors.len());
        assert!(errors.len() * 2 <= usize::try_from(TIMES).unwrap(), "{errors:?}");
    }
}

/// Messages of the protocol: one that answers no simple query and no row, and one that does not exist.
const GARBLED: [&[u8]; 2] = [b"G\0\0\0\x04", b"?\0\0\0\x04"];

#[test]
fn an_answer_that_makes_no_sense_leaves_a_write_in_doubt() {
    let schema = Schema::new();
    let gate = Gate::to(harness::server().port());
    let pool = harness::pool(&gate.params(), 2, Duration::from_secs(30));
    let builder = PostgresCheckpointStore::builder().schema(&schema.name);
    let stores = [builder.clone().connect(&gate.params()), builder.build(pool)];
    for store in stores.map(Result::unwrap) {
        for message in GARBLED {
            for (text, write) in WRITES {
                set_the_scene(&schema);
                store.get("p").unwrap();
                gate.garble(text, message);
                write(&store).unwrap_or_else(|error| panic!("{text}: {error:?}"));
                assert!(!gate.is_armed(), "{text}");
                assert_eq!(offsets(&schema).0, (text != "DELETE FROM").then_some(41), "{text}");
            }
            set_the_scene(&schema);
            store.get("p").unwrap();
            gate.garble("COMMIT", message);
            let mut runs = 0;
            let outcome = store.project("p", |_, offset| {
                runs += 1;
                Ok(Some(offset + 1))
            });
            assert_eq!(outcome.unwrap(), Some(41));
            assert!(!gate.is_armed());
            assert_eq!((runs, offsets(&schema).0), (1, Some(41)), "it was committed, and once");

            set_the_scene(&schema);
            store.get("p").unwrap();
            gate.garble("SET \"offset\" = $3", message);
            let error = store.advance("p", 40, 41).unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.is_transient(), "{error:?}");
            assert_eq!(offsets(&schema).0, Some(41));
        }
    }
}
