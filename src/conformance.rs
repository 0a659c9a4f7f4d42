//! Tests the contract of [`CheckpointStore`] on any store.

use std::collections::BTreeMap;
use std::hint;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError::Timeout, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Checkpoint, CheckpointStore, Error};

const THREADS: usize = 8;
/// The limit for a call that must not wait: a store may be slow, but must not hang.
const LIMIT: Duration = Duration::from_secs(10);

/// Tests the [contract](CheckpointStore#contract) on an empty store, from one thread and from several.
///
/// It takes a few seconds on a database, and leaves the store empty. No other client may use the store
/// meanwhile. If your users wrap the store, for example in an `Arc`, test it wrapped as well.
///
/// Failures of the backend are not tested, because only the author of a store can cause them.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{MemoryCheckpointStore, conformance};
///
/// conformance::verify(&MemoryCheckpointStore::new());
/// ```
///
/// # Panics
///
/// If the store is not empty, if one of its methods fails, or if it breaks the contract. The message says
/// which rule is broken.
pub fn verify(store: &dyn CheckpointStore) {
    let left = all(store);
    assert!(
        left.is_empty(),
        "conformance: the store must be empty before the test, but has {left:?}"
    );

    an_unknown_projection_has_no_checkpoint(store);
    a_saved_checkpoint_is_found(store);
    names_are_stored_byte_for_byte(store);
    each_save_renews_updated_at(store);
    all_is_in_byte_order(store);
    delete_returns_whether_there_was_a_checkpoint(store);
    invalid_input_changes_nothing(store);
    advance_moves_only_from_the_expected_offset(store);
    save_many_saves_all(store);
    many_checkpoints_are_saved_and_listed_completely(store);
    wait_for_waits_until_the_offset_is_reached(store);
    no_save_of_concurrent_threads_is_lost(store);
    exactly_one_concurrent_advance_succeeds(store);
    no_concurrent_advance_is_lost(store);
    exactly_one_concurrent_delete_returns_true(store);
    no_advance_undoes_an_earlier_write(store);
    no_advance_from_no_checkpoint_undoes_a_save(store);

    let left = all(store);
    assert!(
        left.is_empty(),
        "conformance: all must not return deleted checkpoints, but returned {left:?}"
    );
}

fn an_unknown_projection_has_no_checkpoint(store: &dyn CheckpointStore) {
    assert_eq!(
        ok(store.find("unknown")),
        None,
        "conformance: find must return None for an unknown projection"
    );
    assert_eq!(
        stored(store, "unknown"),
        0,
        "conformance: get must return 0 for an unknown projection"
    );
    ok(store.save("known", 5));
    assert_eq!(
        stored(store, "unknown"),
        0,
        "conformance: a save must not change another projection"
    );
    assert_eq!(stored(store, "know"), 0, "conformance: names must be compared as a whole");
    assert_eq!(stored(store, "KNOWN"), 0, "conformance: names must be case-sensitive");
    delete(store, "known");
}

fn a_saved_checkpoint_is_found(store: &dyn CheckpointStore) {
    let projections = ["first", "second", "third"];
    // Forwards, back, the same again, and the extremes.
    let offsets = (1..=200).chain([7, 7, 0, i64::MAX, i64::MAX - 1, 1]);
    for (i, offset) in offsets.enumerate() {
        let projection = projections[i % projections.len()];
        ok(store.save(projection, offset));
        let found = find(store, projection);
        assert_eq!(
            found.projection, projection,
            "conformance: find must return the name of the projection"
        );
        assert_eq!(
            found.offset, offset,
            "conformance: find must return the offset that was saved last"
        );
        assert_eq!(
            get(store, projection),
            offset,
            "conformance: get must return the offset that was saved last"
        );
    }
    // A stored 0 is a checkpoint.
    ok(store.save("first", 0));
    assert_eq!(
        find(store, "first").offset,
        0,
        "conformance: find must return a checkpoint that is at 0"
    );
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

fn names_are_stored_byte_for_byte(store: &dyn CheckpointStore) {
    let names = odd_names();
    for (offset, name) in (1..).zip(&names) {
        ok(store.save(name, offset));
    }
    for (offset, name) in (1..).zip(&names) {
        let found = find(store, name);
        assert_eq!(
            &found.projection, name,
            "conformance: find must return the name as it was saved"
        );
        assert_eq!(found.offset, offset, "conformance: {name:?} must have its own offset");
    }
    assert_eq!(all(store).len(), names.len(), "conformance: all must return each name once");
    delete_each(store, names);
}

fn each_save_renews_updated_at(store: &dyn CheckpointStore) {
    type Save = fn(&dyn CheckpointStore, i64, i64) -> crate::Result<()>;
    let saves: [(&str, Save); 3] = [
        ("save", |store, _, to| store.save("time", to)),
        ("advance", |store, from, to| store.advance("time", from, to)),
        ("save_many", |store, _, to| store.save_many(&[("time", to)])),
    ];
    ok(store.save("time", 0));
    let mut offset = 0;
    // Saving the stored offset again is a save, too.
    for ((operation, save), step) in saves.into_iter().flat_map(|save| [(save, 0), (save, 1)]) {
        let before = find(store, "time").updated_at;
        // The clock of the store may be coarse.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            ok(save(store, offset, offset + step));
            offset += step;
            let after = find(store, "time").updated_at;
            assert!(after >= before, "conformance: {operation} must not set updated_at back");
            if after > before {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "conformance: {operation} must renew updated_at, even if the offset stays the same (it \
                 moved by {step})"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
    let before = find(store, "time");
    get(store, "time");
    all(store);
    assert_eq!(find(store, "time"), before, "conformance: reading must change nothing");
    let listed = all(store);
    assert_eq!(listed, [before], "conformance: all and find must return the same");
    delete(store, "time");
}

fn all_is_in_byte_order(store: &dyn CheckpointStore) {
    // In an order of words, which is not that of the bytes.
    let mut names =
        ["a", "A", "a-b", "aa", "ab", "a b", "a_b", "Ab", "b", "B", "é", "e", "z", "Z", "10", "9"];
    for name in names {
        ok(store.save(name, 1));
    }
    let listed: Vec<_> = all(store).into_iter().map(|checkpoint| checkpoint.projection).collect();
    names.sort_unstable();
    assert_eq!(listed, names, "conformance: all must be ordered by the bytes of the names");
    delete_each(store, names);
}

fn delete_returns_whether_there_was_a_checkpoint(store: &dyn CheckpointStore) {
    let never = ok(store.delete("never there"));
    assert!(!never, "conformance: delete must return false if there was no checkpoint");
    ok(store.save("doomed", 9));
    ok(store.save("spared", 9));
    assert!(
        ok(store.delete("doomed")),
        "conformance: delete must return true if there was a checkpoint"
    );
    assert_eq!(ok(store.find("doomed")), None, "conformance: delete must delete the checkpoint");
    assert_eq!(
        stored(store, "spared"),
        9,
        "conformance: delete must not delete another checkpoint"
    );
    assert!(!ok(store.delete("doomed")), "conformance: a second delete must return false");
    ok(store.advance("doomed", 0, 3));
    assert_eq!(
        stored(store, "doomed"),
        3,
        "conformance: advance from 0 must create a deleted checkpoint again"
    );
    delete(store, "doomed");
    delete(store, "spared");
}

fn invalid_input_changes_nothing(store: &dyn CheckpointStore) {
    ok(store.save("good", 5));
    let before = all(store);
    let too_long = "x".repeat(1_025);
    for name in ["", "nul \0 inside", "\0", &too_long, &"é".repeat(513)] {
        let refused = |what: &str, result: Result<(), Error>| match result {
            Err(Error::InvalidProjection { name: named, .. }) if named == name => {}
            other => panic!(
                "conformance: {what} must refuse the name {:?} ({} bytes) with InvalidProjection, \
                 but returned {other:?}",
                name.chars().take(20).collect::<String>(),
                name.len()
            ),
        };
        refused("find", store.find(name).map(drop));
        refused("get", store.get(name).map(drop));
        refused("save", store.save(name, 1));
        refused("advance", store.advance(name, 0, 1));
        refused("delete", store.delete(name).map(drop));
        refused("wait_for", store.wait_for(name, 0, Duration::ZERO).map(drop));
        refused("save_many", store.save_many(&[("good", 6), (name, 1), ("other", 6)]));
    }
    for (offset, from, to) in [(-1, 5, -1), (i64::MIN, i64::MIN, 5), (-2, -2, -1), (4, 5, 4)] {
        let refused = |what: &str, result: Result<(), Error>| match result {
            Err(Error::InvalidOffset { .. }) => {}
            other => panic!(
                "conformance: {what} must refuse invalid offsets with InvalidOffset, but returned {other:?}"
            ),
        };
        refused("advance", store.advance("good", from, to));
        if offset < 0 {
            refused("save", store.save("good", offset));
            refused("save", store.save("other", offset));
            refused("wait_for", store.wait_for("good", offset, Duration::ZERO).map(drop));
            let many = [("good", 6), ("other", offset), ("third", 6)];
            refused("save_many", store.save_many(&many));
        }
    }
    assert_eq!(all(store), before, "conformance: invalid input must change nothing");
    delete(store, "good");
}

fn advance_moves_only_from_the_expected_offset(store: &dyn CheckpointStore) {
    let conflict = |from: i64, to: i64, expected_found: i64, why: &str| {
        match store.advance("steps", from, to) {
            Err(Error::Conflict { projection, expected, found }) => assert_eq!(
                (projection.as_str(), expected, found),
                ("steps", from, expected_found),
                "conformance: a Conflict must name the projection, the expected offset and the one found"
            ),
            other => panic!(
                "conformance: advance from {from} to {to} must be a Conflict {why}, but returned {other:?}"
            ),
        }
        assert_eq!(
            stored(store, "steps"),
            expected_found,
            "conformance: a Conflict must change nothing"
        );
    };
    conflict(1, 2, 0, "if there is no checkpoint");
    conflict(7, 7, 0, "if there is no checkpoint");
    assert_eq!(
        ok(store.find("steps")),
        None,
        "conformance: a Conflict must not create a checkpoint"
    );
    ok(store.advance("steps", 0, 10));
    assert_eq!(
        stored(store, "steps"),
        10,
        "conformance: advance from 0 must create the checkpoint"
    );
    conflict(0, 20, 10, "if the checkpoint is not at 0");
    conflict(0, 10, 10, "even if the checkpoint is already at the new offset");
    conflict(9, 11, 10, "if the expected offset is too low");
    conflict(11, 12, 10, "if the expected offset is too high");
    ok(store.advance("steps", 10, 10));
    ok(store.advance("steps", 10, i64::MAX));
    assert_eq!(stored(store, "steps"), i64::MAX, "conformance: advance must accept every offset");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 1));
    assert_eq!(stored(store, "steps"), 1, "conformance: advance must continue from a stored 0");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 0));
    delete(store, "steps");
    ok(store.advance("steps", 0, 0));
    assert_eq!(
        find(store, "steps").offset,
        0,
        "conformance: advance from 0 to 0 must create a checkpoint"
    );
    delete(store, "steps");
}

fn save_many_saves_all(store: &dyn CheckpointStore) {
    ok(store.save_many(&[]));
    assert!(all(store).is_empty(), "conformance: save_many of an empty slice must do nothing");
    ok(store.save("there", 9));
    ok(store.save_many(&[("new", 1), ("there", 2), ("twice", 3), ("twice", 5), ("twice", 4)]));
    assert_eq!(stored(store, "new"), 1, "conformance: save_many must create checkpoints");
    assert_eq!(
        stored(store, "there"),
        2,
        "conformance: save_many must set existing checkpoints, also back"
    );
    assert_eq!(
        stored(store, "twice"),
        4,
        "conformance: save_many must keep the last offset of a repeated name"
    );
    delete_each(store, ["new", "there", "twice"]);
}

fn many_checkpoints_are_saved_and_listed_completely(store: &dyn CheckpointStore) {
    /// More than a page of most APIs, and a prime, so that the last page is not full.
    const MANY: i64 = 1_103;
    let names: Vec<_> = (0..MANY).map(|i| format!("many {i}")).collect();
    // All of them are new in the first round, and exist in the second.
    for offsets in [0..MANY, MANY..2 * MANY] {
        let many: Vec<_> = names.iter().map(String::as_str).zip(offsets).collect();
        ok(store.save_many(&many));
        let listed: Vec<_> =
            all(store).into_iter().map(|found| (found.projection, found.offset)).collect();
        let by_name: BTreeMap<_, _> = listed.iter().cloned().collect();
        if let Some(&(name, offset)) = many.iter().find(|it| by_name.get(it.0) != Some(&it.1)) {
            let found = get(store, name);
            assert_eq!(
                found, offset,
                "conformance: save_many must save each of many checkpoints, also {name:?}"
            );
            panic!("conformance: all must return each of many checkpoints, also {name:?}");
        }
        assert_eq!(listed.len(), many.len(), "conformance: all must return each name once");
        assert!(
            listed.into_iter().eq(by_name),
            "conformance: all must order many checkpoints by the bytes of their names"
        );
    }
    in_threads(|thread| delete_each(store, names.iter().skip(thread).step_by(THREADS)));
}

/// Runs the same work in several threads that start together. Panics if one of them does.
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

/// Enough rounds to hit a short window: few for a slow store, many for a fast one.
fn rounds() -> impl Iterator<Item = i64> {
    const LEAST: i64 = 40;
    const LEAST_TIME: Duration = Duration::from_millis(300);
    let started = Instant::now();
    (1..).take_while(move |&round| round <= LEAST || started.elapsed() < LEAST_TIME)
}

/// Runs `rival` repeatedly in several threads while `work` runs.
fn with_rivals(rival: impl Fn() + Sync, work: impl FnOnce()) {
    const RIVALS: usize = 3;
    let over = AtomicBool::new(false);
    let panicked = thread::scope(|scope| {
        let spawn = |_| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    rival();
                }
            })
        };
        let rivals: Vec<_> = (0..RIVALS).map(spawn).collect();
        let outcome = panic::catch_unwind(AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        let panicked = rivals.into_iter().filter_map(|rival| rival.join().err()).last();
        outcome.err().or(panicked)
    });
    if let Some(message) = panicked {
        panic::resume_unwind(message);
    }
}

fn no_save_of_concurrent_threads_is_lost(store: &dyn CheckpointStore) {
    let name = |i: usize| format!("thread {i}");
    let saved = [const { AtomicI64::new(0) }; THREADS];
    let assert_kept = |i: usize| {
        let (found, last) = (get(store, &name(i)), saved[i].load(Ordering::Relaxed));
        assert_eq!(found, last, "conformance: no save may be lost to the save of another thread");
    };
    in_threads(|i| {
        for offset in rounds() {
            assert_kept(i);
            ok(store.save(&name(i), offset));
            let found = get(store, &name(i));
            assert_eq!(
                found, offset,
                "conformance: a save must be visible to the next get of its thread"
            );
            saved[i].store(offset, Ordering::Relaxed);
        }
    });
    (0..THREADS).for_each(assert_kept);
    // In opposite orders, which must neither deadlock nor be mixed.
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

fn exactly_one_concurrent_advance_succeeds(store: &dyn CheckpointStore) {
    for round in 0..20 {
        let projection = format!("race {round}");
        let winners = AtomicUsize::new(0);
        in_threads(|_| match store.advance(&projection, 0, 7) {
            Ok(()) => {
                winners.fetch_add(1, Ordering::Relaxed);
            }
            Err(Error::Conflict { found: 7, .. }) => {}
            Err(other) => {
                panic!("conformance: the loser of a race must get a Conflict, but got {other:?}")
            }
        });
        assert_eq!(
            winners.into_inner(),
            1,
            "conformance: of several callers that advance from one offset, exactly one must succeed"
        );
        delete(store, &projection);
    }
}

/// Advances by one from the current offset. Returns whether no other thread was faster.
fn step(store: &dyn CheckpointStore, projection: &str) -> bool {
    let from = get(store, projection);
    match store.advance(projection, from, from + 1) {
        Ok(()) => true,
        Err(error) if error.is_conflict() => false,
        Err(error) => panic!(
            "conformance: a concurrent advance must succeed or be a Conflict, but returned {error:?}"
        ),
    }
}

/// An `advance` that reads and then writes without a lock loses a step sooner or later.
fn no_concurrent_advance_is_lost(store: &dyn CheckpointStore) {
    let steps = AtomicI64::new(0);
    in_threads(|_| {
        for _ in rounds() {
            steps.fetch_add(step(store, "stairs").into(), Ordering::Relaxed);
        }
    });
    assert_eq!(
        get(store, "stairs"),
        steps.into_inner(),
        "conformance: advance must compare and set atomically, so that no step is lost"
    );
    delete(store, "stairs");
}

/// Counts what is created by `advance`, and what is deleted.
fn exactly_one_concurrent_delete_returns_true(store: &dyn CheckpointStore) {
    let (created, deleted) = (AtomicUsize::new(0), AtomicUsize::new(0));
    in_threads(|_| {
        for _ in rounds() {
            match store.advance("fleeting", 0, 1) {
                Ok(()) => drop(created.fetch_add(1, Ordering::Relaxed)),
                Err(error) if error.is_conflict() => {}
                Err(error) => panic!(
                    "conformance: a concurrent advance must succeed or be a Conflict, but returned {error:?}"
                ),
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
        "conformance: of several callers that delete one checkpoint, exactly one must get true"
    );
    ok(store.delete("fleeting"));
}

/// Several threads advance the checkpoint by one, while another thread sets it, each time higher than they
/// can reach, and deletes it. An advance that is written after a set or a delete, but was compared before
/// it, is visible: the offset is lower than the one that was set, or much higher than 0.
fn no_advance_undoes_an_earlier_write(store: &dyn CheckpointStore) {
    const HIGHER: i64 = 1 << 32;
    let look = |start: i64, operation: &str| {
        let found = get(store, "stairs");
        assert!(
            (start..start + HIGHER).contains(&found),
            "conformance: an advance must not undo an earlier {operation}: {found} is stored, but \
             {start} or a little more is expected"
        );
    };
    // A thread that wakes from a pause may interrupt another one in the middle of an advance.
    let look_twice = |start, operation| {
        look(start, operation);
        thread::sleep(Duration::from_micros(50));
        look(start, operation);
    };
    with_rivals(
        || _ = step(store, "stairs"),
        || {
            for round in rounds() {
                let start = 2 * round * HIGHER;
                ok(store.save("stairs", start));
                look_twice(start, "save");
                ok(store.save_many(&[("stairs", start + HIGHER)]));
                look_twice(start + HIGHER, "save_many");
                delete(store, "stairs");
                look_twice(0, "delete");
            }
        },
    );
    // The other threads may or may not have created it again.
    ok(store.delete("stairs"));
}

/// Several threads create the checkpoint if there is none, while another thread deletes and saves it.
fn no_advance_from_no_checkpoint_undoes_a_save(store: &dyn CheckpointStore) {
    const SAVED: i64 = 9;
    let create = || match store.advance("stairs", 0, 1) {
        Err(error) if !error.is_conflict() => {
            panic!(
                "conformance: a concurrent advance must succeed or be a Conflict, but returned {error:?}"
            )
        }
        _ => {}
    };
    with_rivals(create, || {
        for round in rounds() {
            ok(store.save("stairs", SAVED));
            for _ in 0..3 {
                let found = get(store, "stairs");
                assert_eq!(
                    found, SAVED,
                    "conformance: an advance from 0 must not undo an earlier save"
                );
            }
            delete(store, "stairs");
            // A different pause each time, because the moment at which another thread reads is unknown.
            (0..round % 32).for_each(|_| hint::spin_loop());
        }
    });
    ok(store.delete("stairs"));
}

fn wait_for_waits_until_the_offset_is_reached(store: &dyn CheckpointStore) {
    let timed = |offset, timeout| {
        let started = Instant::now();
        (ok(store.wait_for("awaited", offset, timeout)), started.elapsed())
    };
    // Ends even if the store ignores the timeout, because the offset is reached in the end.
    let timed_out = |offset, timeout| {
        let (in_time, overdue) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if overdue.recv_timeout(LIMIT) == Err(Timeout) {
                    ok(store.save("awaited", i64::MAX));
                }
            });
            let (reached, took) = timed(offset, timeout);
            assert!(!reached, "conformance: wait_for must return false when the timeout expires");
            drop(in_time);
            took
        })
    };
    assert!(timed(0, Duration::ZERO).0, "conformance: wait_for must return true for offset 0");
    timed_out(1, Duration::ZERO);
    ok(store.save("awaited", 5));
    for offset in [0, 4, 5] {
        for timeout in [Duration::ZERO, 2 * LIMIT, Duration::MAX] {
            let (reached, took) = timed(offset, timeout);
            assert!(
                reached,
                "conformance: wait_for must return true for an offset that is reached, even if the timeout is 0"
            );
            assert!(
                took < LIMIT,
                "conformance: wait_for must not wait for an offset that is reached"
            );
        }
    }
    let timeout = Duration::from_millis(30);
    // Half of it, because a store may use its own clock.
    assert!(
        timed_out(6, timeout) >= timeout / 2,
        "conformance: wait_for must wait until the timeout expires"
    );

    for (offset, reached_by) in [(6, 6), (8, 9)] {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                ok(store.advance("awaited", get(store, "awaited"), reached_by));
            });
            let (reached, took) = timed(offset, 2 * LIMIT);
            assert!(reached, "conformance: wait_for must return true once the offset is reached");
            assert!(
                took < LIMIT,
                "conformance: wait_for must return soon after the offset is reached"
            );
        });
    }
    delete(store, "awaited");
}

fn ok<T>(result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!(
            "conformance: an operation with valid input must not fail, but returned {error:?}"
        ),
    }
}

fn find(store: &dyn CheckpointStore, projection: &str) -> Checkpoint {
    match ok(store.find(projection)) {
        Some(checkpoint) => checkpoint,
        None => panic!(
            "conformance: find must return a saved checkpoint, but {projection:?} is not found"
        ),
    }
}

fn get(store: &dyn CheckpointStore, projection: &str) -> i64 {
    ok(store.get(projection))
}

/// What `get` returns while no other thread writes.
fn stored(store: &dyn CheckpointStore, projection: &str) -> i64 {
    let found = ok(store.find(projection)).map_or(0, |checkpoint| checkpoint.offset);
    let got = get(store, projection);
    assert_eq!(
        got, found,
        "conformance: get and find must return the same offset for {projection:?}"
    );
    got
}

fn all(store: &dyn CheckpointStore) -> Vec<Checkpoint> {
    ok(store.all())
}

fn delete(store: &dyn CheckpointStore, projection: &str) {
    assert!(
        ok(store.delete(projection)),
        "conformance: delete must return true if there was a checkpoint: {projection:?}"
    );
}

fn delete_each(store: &dyn CheckpointStore, projections: impl IntoIterator<Item: AsRef<str>>) {
    for projection in projections {
        delete(store, projection.as_ref());
    }
}
