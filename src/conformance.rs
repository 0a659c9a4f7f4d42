//! The contract of [`CheckpointStore`] as code, for anybody's own store.

use std::collections::BTreeMap;
use std::panic;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Checkpoint, CheckpointStore, Error};

const THREADS: usize = 8;
/// For how long, and how often at least, rivals try to get in each other's way.
const LEAST_TIME: Duration = Duration::from_millis(300);
const LEAST_TRIES: usize = 50;

/// Tries every promise of [`CheckpointStore`] on an empty store, from one thread and from many.
///
/// It takes a few seconds on a database, leaves the store empty, and needs it for itself
/// meanwhile. `store` is what the users of the store would hold; give it a second time behind an
/// `Arc` or wrapped as your users wrap it, if they do.
///
/// What happens when the store's own backend fails is not tried: only its author can make it fail.
///
/// # Panics
///
/// When the store is not empty, when one of its methods fails, and when it breaks a promise; the
/// message names the promise.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{MemoryCheckpointStore, conformance};
///
/// conformance::verify(&MemoryCheckpointStore::new());
/// ```
pub fn verify(store: &dyn CheckpointStore) {
    let left = all(store);
    assert!(left.is_empty(), "conformance: the store to verify is not empty: {left:?}");

    an_unknown_projection_has_no_checkpoint(store);
    what_is_saved_is_found(store);
    names_are_kept_byte_for_byte(store);
    the_time_of_a_save_moves_on(store);
    all_is_in_byte_order(store);
    delete_says_whether_there_was_one(store);
    bad_input_changes_nothing(store);
    advance_moves_only_from_where_it_stands(store);
    save_many_saves_all(store);
    no_save_of_many_threads_is_lost(store);
    of_rivals_exactly_one_advances(store);
    no_step_of_rivals_is_lost(store);
    no_save_among_rivals_is_lost(store);
    of_rivals_exactly_one_deletes(store);
    wait_for_waits_until_the_offset_is_reached(store);

    let left = all(store);
    assert!(left.is_empty(), "conformance: a deleted checkpoint is still listed: {left:?}");
}

fn an_unknown_projection_has_no_checkpoint(store: &dyn CheckpointStore) {
    assert_eq!(ok(store.find("unknown")), None, "conformance: find of an unknown projection");
    assert_eq!(get(store, "unknown"), 0, "conformance: get of an unknown projection is 0");
    ok(store.save("known", 5));
    assert_eq!(get(store, "unknown"), 0, "conformance: projections are apart");
    assert_eq!(get(store, "know"), 0, "conformance: a name is compared as a whole");
    assert_eq!(get(store, "KNOWN"), 0, "conformance: names differ in case");
    delete(store, "known");
}

fn what_is_saved_is_found(store: &dyn CheckpointStore) {
    let projections = ["first", "second", "third"];
    // Forwards, back, the same again, the extremes: a plain set each time.
    let offsets = (1..=200).chain([7, 7, 0, i64::MAX, i64::MAX - 1, 1]);
    for (i, offset) in offsets.enumerate() {
        let projection = projections[i % projections.len()];
        ok(store.save(projection, offset));
        let found = find(store, projection);
        assert_eq!(found.projection, projection, "conformance: find names the projection");
        assert_eq!(found.offset, offset, "conformance: find returns what was saved, each time");
        assert_eq!(get(store, projection), offset, "conformance: get returns what was saved");
    }
    // A zero that was stored is a checkpoint, other than none at all.
    ok(store.save("first", 0));
    assert_eq!(find(store, "first").offset, 0, "conformance: a stored 0 is found");
    delete_each(store, projections);
}

fn odd_names() -> Vec<String> {
    let odd = [
        " ",
        " leading",
        "trailing ",
        "a'b",
        "a\"b",
        "a\\b",
        "a`b",
        "a;b",
        "a--b",
        "a/*b",
        "$1",
        "%s",
        "%",
        "_",
        "*",
        "?",
        "[a]",
        "{a}",
        "a:b",
        "a::b",
        "a.b",
        "a/b",
        "../a",
        "a\nb",
        "a\r\nb",
        "a\tb",
        "\u{1}",
        "null",
        "NULL",
        "0",
        "-1",
        "'; DROP TABLE projection_checkpoints; --",
        "ü",
        "u\u{308}",
        "ß",
        "日本語",
        "📦",
        "\u{202e}abc",
        "\u{feff}abc",
        "\u{10ffff}",
    ];
    let longest = ["x".repeat(1_024), "é".repeat(512), format!("{}y", "x".repeat(1_023))];
    odd.iter().map(ToString::to_string).chain(longest).collect()
}

fn names_are_kept_byte_for_byte(store: &dyn CheckpointStore) {
    let names = odd_names();
    for (offset, name) in (1..).zip(&names) {
        ok(store.save(name, offset));
    }
    for (offset, name) in (1..).zip(&names) {
        let found = find(store, name);
        assert_eq!(&found.projection, name, "conformance: a name comes back as it was given");
        assert_eq!(found.offset, offset, "conformance: {name:?} has an offset of its own");
    }
    assert_eq!(all(store).len(), names.len(), "conformance: all lists each name once");
    delete_each(store, names);
}

fn the_time_of_a_save_moves_on(store: &dyn CheckpointStore) {
    type Save = fn(&dyn CheckpointStore, i64, i64) -> crate::Result<()>;
    let saves: [(&str, Save); 3] = [
        ("save", |store, _, to| store.save("time", to)),
        ("advance", |store, from, to| store.advance("time", from, to)),
        ("save_many", |store, _, to| store.save_many(&[("time", to)])),
    ];
    ok(store.save("time", 0));
    let mut offset = 0;
    // A save of the offset that is there is a save.
    for ((operation, save), step) in saves.into_iter().flat_map(|save| [(save, 0), (save, 1)]) {
        let before = find(store, "time").updated_at;
        // The store's clock may tick slowly, but it ticks.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            ok(save(store, offset, offset + step));
            offset += step;
            let after = find(store, "time").updated_at;
            assert!(after >= before, "conformance: updated_at does not go back in {operation}");
            if after > before {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "conformance: updated_at is the moment of the last {operation}, of the same offset \
                 too, and stands still"
            );
        }
    }
    let before = find(store, "time");
    get(store, "time");
    all(store);
    assert_eq!(find(store, "time"), before, "conformance: reading changes nothing");
    let listed = all(store);
    assert_eq!(listed, [before], "conformance: all and find tell the same");
    delete(store, "time");
}

fn all_is_in_byte_order(store: &dyn CheckpointStore) {
    // In the order of most languages' dictionaries, which is not that of the bytes.
    let mut names =
        ["a", "A", "a-b", "aa", "ab", "a b", "a_b", "Ab", "b", "B", "é", "e", "z", "Z", "10", "9"];
    for name in names {
        ok(store.save(name, 1));
    }
    let listed: Vec<_> = all(store).into_iter().map(|checkpoint| checkpoint.projection).collect();
    names.sort_unstable();
    assert_eq!(listed, names, "conformance: all is ordered by the bytes of the names");
    delete_each(store, names);
}

fn delete_says_whether_there_was_one(store: &dyn CheckpointStore) {
    let never = ok(store.delete("never there"));
    assert!(!never, "conformance: delete says false when there was no checkpoint");
    ok(store.save("doomed", 9));
    ok(store.save("spared", 9));
    assert!(
        ok(store.delete("doomed")),
        "conformance: delete says true when there was a checkpoint"
    );
    assert_eq!(ok(store.find("doomed")), None, "conformance: delete forgets the checkpoint");
    assert_eq!(get(store, "spared"), 9, "conformance: delete forgets no other checkpoint");
    assert!(!ok(store.delete("doomed")), "conformance: the second delete says false");
    ok(store.advance("doomed", 0, 3));
    assert_eq!(get(store, "doomed"), 3, "conformance: a deleted projection starts anew");
    delete(store, "doomed");
    delete(store, "spared");
}

fn bad_input_changes_nothing(store: &dyn CheckpointStore) {
    ok(store.save("good", 5));
    let before = all(store);
    let too_long = "x".repeat(1_025);
    for name in ["", "nul \0 inside", "\0", &too_long, &"é".repeat(513)] {
        let refused = |what: &str, result: Result<(), Error>| match result {
            Err(Error::InvalidProjection { name: named, .. }) if named == name => {}
            other => panic!(
                "conformance: {what} refuses the name {:?} ({} bytes) with InvalidProjection, \
                 and not with {other:?}",
                name.chars().take(20).collect::<String>(),
                name.len()
            ),
        };
        refused("find", store.find(name).map(drop));
        refused("get", store.get(name).map(drop));
        refused("save", store.save(name, 1));
        refused("advance", store.advance(name, 0, 1));
        refused("delete", store.delete(name).map(drop));
        refused("save_many", store.save_many(&[("good", 6), (name, 1), ("other", 6)]));
    }
    for (offset, from, to) in [(-1, 5, -1), (i64::MIN, i64::MIN, 5), (-2, -2, -1), (4, 5, 4)] {
        let refused = |what: &str, result: Result<(), Error>| match result {
            Err(Error::InvalidOffset { .. }) => {}
            other => panic!(
                "conformance: {what} refuses bad offsets with InvalidOffset, not with {other:?}"
            ),
        };
        refused("advance", store.advance("good", from, to));
        if offset < 0 {
            refused("save", store.save("good", offset));
            refused("save", store.save("other", offset));
            let many = [("good", 6), ("other", offset), ("third", 6)];
            refused("save_many", store.save_many(&many));
        }
    }
    assert_eq!(all(store), before, "conformance: bad input changes nothing at all");
    delete(store, "good");
}

fn advance_moves_only_from_where_it_stands(store: &dyn CheckpointStore) {
    let conflict = |from: i64, to: i64, expected_found: i64, why: &str| {
        match store.advance("steps", from, to) {
            Err(Error::Conflict { projection, expected, found }) => assert_eq!(
                (projection.as_str(), expected, found),
                ("steps", from, expected_found),
                "conformance: a Conflict says what was expected and found"
            ),
            other => panic!("conformance: advance({from}, {to}) {why}: not {other:?}"),
        }
        assert_eq!(get(store, "steps"), expected_found, "conformance: a Conflict changes nothing");
    };
    conflict(1, 2, 0, "from an offset that is not there is a Conflict");
    conflict(7, 7, 0, "from an offset that is not there is a Conflict");
    assert_eq!(ok(store.find("steps")), None, "conformance: a Conflict creates nothing");
    ok(store.advance("steps", 0, 10));
    assert_eq!(get(store, "steps"), 10, "conformance: advance creates a checkpoint from 0");
    conflict(0, 20, 10, "from 0 is a Conflict when more is stored");
    conflict(0, 10, 10, "is a Conflict even when the checkpoint is where it was to go");
    conflict(9, 11, 10, "from behind is a Conflict");
    conflict(11, 12, 10, "from ahead is a Conflict");
    ok(store.advance("steps", 10, 10));
    ok(store.advance("steps", 10, i64::MAX));
    assert_eq!(get(store, "steps"), i64::MAX, "conformance: advance goes as far as offsets go");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 1));
    assert_eq!(get(store, "steps"), 1, "conformance: advance goes on from a stored 0");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 0));
    delete(store, "steps");
    ok(store.advance("steps", 0, 0));
    assert_eq!(find(store, "steps").offset, 0, "conformance: advance from 0 to 0 stores a 0");
    delete(store, "steps");
}

fn save_many_saves_all(store: &dyn CheckpointStore) {
    ok(store.save_many(&[]));
    assert!(all(store).is_empty(), "conformance: saving no checkpoints saves none");
    ok(store.save("there", 9));
    ok(store.save_many(&[("new", 1), ("there", 2), ("twice", 3), ("twice", 5), ("twice", 4)]));
    assert_eq!(get(store, "new"), 1, "conformance: save_many creates");
    assert_eq!(get(store, "there"), 2, "conformance: save_many sets, back too");
    assert_eq!(get(store, "twice"), 4, "conformance: of a name given twice the last one stays");
    delete_each(store, ["new", "there", "twice"]);

    // More than a page of any API.
    let many: Vec<_> = (0..1_100).map(|i| (format!("many {i}"), i)).collect();
    let borrowed: Vec<_> = many.iter().map(|(name, offset)| (name.as_str(), *offset)).collect();
    ok(store.save_many(&borrowed));
    in_threads(|thread| {
        for (name, offset) in many.iter().skip(thread).step_by(THREADS) {
            assert_eq!(get(store, name), *offset, "conformance: save_many saves every one of many");
        }
    });
    let expected: BTreeMap<_, _> = many.iter().cloned().collect();
    let stored: BTreeMap<_, _> =
        all(store).into_iter().map(|found| (found.projection, found.offset)).collect();
    assert_eq!(stored.len(), expected.len(), "conformance: all lists every one of many");
    assert_eq!(stored, expected, "conformance: all lists what was saved");
    in_threads(|thread| {
        delete_each(store, borrowed.iter().skip(thread).step_by(THREADS).map(|it| it.0));
    });
}

/// Runs the same work in many threads that start together, and panics as the first of them does.
fn in_threads(work: impl Fn(usize) + Sync) {
    let start = Barrier::new(THREADS);
    let panicked = thread::scope(|scope| {
        let spawn = |i| {
            let (work, start) = (&work, &start);
            scope.spawn(move || {
                start.wait();
                work(i);
            })
        };
        let threads: Vec<_> = (0..THREADS).map(spawn).collect();
        threads.into_iter().filter_map(|thread| thread.join().err()).last()
    });
    if let Some(message) = panicked {
        panic::resume_unwind(message);
    }
}

fn no_save_of_many_threads_is_lost(store: &dyn CheckpointStore) {
    let name = |i: usize| format!("thread {i}");
    in_threads(|i| {
        for offset in 1..=40 {
            ok(store.save(&name(i), offset));
            let found = get(store, &name(i));
            assert_eq!(found, offset, "conformance: a save is seen by the next get of its thread");
        }
    });
    for i in 0..THREADS {
        assert_eq!(get(store, &name(i)), 40, "conformance: no thread's save is lost");
    }
    // In opposite orders, which must neither deadlock nor mix.
    in_threads(|i| {
        let mut checkpoints: Vec<_> =
            (0..THREADS).map(|j| (name(j), i64::try_from(i).unwrap_or(0))).collect();
        if i % 2 == 0 {
            checkpoints.reverse();
        }
        let borrowed: Vec<_> =
            checkpoints.iter().map(|(name, offset)| (name.as_str(), *offset)).collect();
        for _ in 0..10 {
            ok(store.save_many(&borrowed));
        }
    });
    delete_each(store, (0..THREADS).map(name));
}

fn of_rivals_exactly_one_advances(store: &dyn CheckpointStore) {
    for round in 0..20 {
        let projection = format!("race {round}");
        let winners = AtomicUsize::new(0);
        in_threads(|_| match store.advance(&projection, 0, 7) {
            Ok(()) => {
                winners.fetch_add(1, Ordering::Relaxed);
            }
            Err(Error::Conflict { found: 7, .. }) => {}
            Err(other) => panic!("conformance: the loser of a race sees a Conflict, not {other:?}"),
        });
        assert_eq!(
            winners.into_inner(),
            1,
            "conformance: of rivals that advance from the same place exactly one succeeds"
        );
        delete(store, &projection);
    }
}

/// A step that looks first and writes later, without holding on, is overtaken sooner or later.
fn no_step_of_rivals_is_lost(store: &dyn CheckpointStore) {
    let steps = AtomicI64::new(0);
    in_threads(|_| {
        let started = Instant::now();
        let mut tries = 0;
        while tries < LEAST_TRIES || started.elapsed() < LEAST_TIME {
            tries += 1;
            let from = get(store, "stairs");
            match store.advance("stairs", from, from + 1) {
                Ok(()) => {
                    steps.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if error.is_conflict() => {}
                Err(error) => panic!("conformance: advance among rivals failed: {error:?}"),
            }
        }
    });
    assert_eq!(
        get(store, "stairs"),
        steps.into_inner(),
        "conformance: advance compares and sets in one step, so no rival's step is lost"
    );
    delete(store, "stairs");
}

/// One thread saves, ever further on; the others advance from wherever the checkpoint is. So it never
/// is behind what was saved last.
fn no_save_among_rivals_is_lost(store: &dyn CheckpointStore) {
    const FAR: i64 = 1_000_000;
    const LOOKS: usize = 20;
    let done = AtomicBool::new(false);
    in_threads(|thread| {
        let started = Instant::now();
        let mut tries = 0;
        while thread > 0 && !done.load(Ordering::Relaxed) {
            let from = get(store, "contested");
            match store.advance("contested", from, from + 1) {
                Err(error) if !error.is_conflict() => {
                    panic!("conformance: advance among rivals failed: {error:?}")
                }
                _ => {}
            }
        }
        while thread == 0 && (tries < 50 || started.elapsed() < LEAST_TIME) {
            tries += 1;
            let saved = tries * FAR;
            ok(match tries % 2 {
                0 => store.save("contested", saved),
                _ => store.save_many(&[("contested", saved)]),
            });
            // An advance that has looked before may write a while after.
            for _ in 0..LOOKS {
                let found = get(store, "contested");
                if found < saved {
                    done.store(true, Ordering::Relaxed);
                }
                assert!(
                    found >= saved,
                    "conformance: an advance does not overwrite what was saved meanwhile"
                );
                thread::yield_now();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    delete(store, "contested");
}

/// What is created by an advance from nothing, and deleted, is counted.
fn of_rivals_exactly_one_deletes(store: &dyn CheckpointStore) {
    let (created, deleted) = (AtomicUsize::new(0), AtomicUsize::new(0));
    in_threads(|_| {
        let started = Instant::now();
        let mut tries = 0;
        while tries < LEAST_TRIES || started.elapsed() < LEAST_TIME {
            tries += 1;
            match store.advance("fleeting", 0, 1) {
                Ok(()) => drop(created.fetch_add(1, Ordering::Relaxed)),
                Err(error) if error.is_conflict() => {}
                Err(error) => panic!("conformance: advance among rivals failed: {error:?}"),
            }
            if ok(store.delete("fleeting")) {
                deleted.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let left = usize::from(ok(store.find("fleeting")).is_some());
    assert_eq!(
        deleted.into_inner() + left,
        created.into_inner(),
        "conformance: of rivals that delete one checkpoint exactly one is told true"
    );
    ok(store.delete("fleeting"));
}

fn wait_for_waits_until_the_offset_is_reached(store: &dyn CheckpointStore) {
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(30);
    let wait_for = |offset, timeout| ok(store.wait_for("awaited", offset, timeout));
    assert!(wait_for(0, Duration::ZERO), "conformance: every checkpoint has reached 0");
    assert!(!wait_for(1, Duration::ZERO), "conformance: wait_for says false for what is not there");
    ok(store.save("awaited", 5));
    for offset in [4, 5] {
        assert!(
            wait_for(offset, Duration::ZERO),
            "conformance: wait_for asks once, even without time, and says true for what is there"
        );
    }
    let started = Instant::now();
    assert!(!wait_for(6, SHORT), "conformance: wait_for says false when the time is over");
    assert!(started.elapsed() >= SHORT, "conformance: wait_for waits until the time is over");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| wait_for(6, LONG));
        ok(store.advance("awaited", 5, 7));
        match waiting.join() {
            Ok(reached) => {
                assert!(reached, "conformance: wait_for says true once the offset is reached");
            }
            Err(message) => panic::resume_unwind(message),
        }
    });
    assert!(
        matches!(store.wait_for("", 1, SHORT), Err(Error::InvalidProjection { .. }))
            && matches!(store.wait_for("awaited", -1, SHORT), Err(Error::InvalidOffset { .. })),
        "conformance: wait_for refuses bad input"
    );
    delete(store, "awaited");
}

fn ok<T>(result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("conformance: an operation on good input failed: {error:?}"),
    }
}

fn find(store: &dyn CheckpointStore, projection: &str) -> Checkpoint {
    match ok(store.find(projection)) {
        Some(checkpoint) => checkpoint,
        None => panic!("conformance: {projection:?} was saved, and is not found"),
    }
}

fn get(store: &dyn CheckpointStore, projection: &str) -> i64 {
    ok(store.get(projection))
}

fn all(store: &dyn CheckpointStore) -> Vec<Checkpoint> {
    ok(store.all())
}

fn delete(store: &dyn CheckpointStore, projection: &str) {
    assert!(
        ok(store.delete(projection)),
        "conformance: delete says true when there was a checkpoint: {projection:?}"
    );
}

fn delete_each(store: &dyn CheckpointStore, projections: impl IntoIterator<Item: AsRef<str>>) {
    for projection in projections {
        delete(store, projection.as_ref());
    }
}
