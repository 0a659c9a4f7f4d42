//! Tests the contract of [`CheckpointStore`] on any store.

use std::fmt::{Debug, Display};
use std::hint;
use std::panic::resume_unwind;
use std::sync::Barrier;
use std::sync::mpsc::{RecvTimeoutError::Timeout, channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::store::poll;
use crate::{Checkpoint, CheckpointStore, Error, Result};

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
    check(all(store), vec![], "the store must be empty before the test");
    for rule in [
        an_unknown_projection_has_no_checkpoint,
        a_saved_checkpoint_is_found,
        names_are_stored_byte_for_byte_and_listed_in_that_order,
        each_save_renews_updated_at,
        delete_returns_whether_there_was_a_checkpoint,
        invalid_input_changes_nothing,
        advance_moves_only_from_the_expected_offset,
        save_many_keeps_the_last_of_a_repeated_name,
        many_checkpoints_are_saved_and_listed_completely,
        wait_for_waits_until_the_offset_is_reached,
        no_save_of_concurrent_threads_is_lost,
        no_concurrent_advance_is_lost,
        exactly_one_concurrent_delete_returns_true,
        no_advance_undoes_an_earlier_write,
        no_advance_from_no_checkpoint_undoes_a_save,
    ] {
        rule(store);
        delete_all(store);
    }
}

/// Several threads share the work, because a commit on a database takes its time.
fn delete_all(store: &dyn CheckpointStore) {
    let checkpoints = all(store);
    in_threads(THREADS, |thread| {
        for checkpoint in checkpoints.iter().skip(thread).step_by(THREADS) {
            delete(store, &checkpoint.projection);
        }
    });
    check(all(store), vec![], "all must not return deleted checkpoints");
}

fn an_unknown_projection_has_no_checkpoint(store: &dyn CheckpointStore) {
    check(ok(store.find("unknown")), None, "find must return None for an unknown projection");
    check(get(store, "unknown"), 0, "get must return 0 for an unknown projection");
    ok(store.save("known", 5));
    check(stored(store, "unknown"), 0, "a save must not change another projection");
    check(stored(store, "know"), 0, "names must be compared as a whole");
    check(stored(store, "KNOWN"), 0, "names must be case-sensitive");
}

fn a_saved_checkpoint_is_found(store: &dyn CheckpointStore) {
    // Forwards, back, the same again, and the extremes. A stored 0 is a checkpoint.
    let offsets = (1..=200).chain([7, 7, 0, i64::MAX, i64::MAX - 1, 1]);
    for (offset, projection) in offsets.zip(["first", "second", "third"].into_iter().cycle()) {
        ok(store.save(projection, offset));
        let found = find(store, projection).offset;
        check(found, offset, "find must return the offset that was saved last");
        check(get(store, projection), offset, "get must return the offset that was saved last");
    }
}

fn names_are_stored_byte_for_byte_and_listed_in_that_order(store: &dyn CheckpointStore) {
    let words = "a A aa ab Ab a-b a_b b B é e z Z 10 9 \
                 a'b a\"b a\\b a`b a;b a--b a/*b $1 %s % _ * ? [a] {a} a:b a::b a.b a/b ../a null NULL 0 -1 \
                 ü u\u{308} ß 日本語 📦 \u{202e}abc \u{feff}abc \u{10ffff} \u{1} a\nb a\r\nb a\tb";
    let spaces = [" ", "a b", " leading", "trailing ", "'; DROP TABLE projection_checkpoints; --"];
    let longest = ["x".repeat(1_024), "é".repeat(512), format!("{}y", "x".repeat(1_023))];
    let mut names: Vec<_> =
        words.split(' ').chain(spaces).chain(longest.iter().map(String::as_str)).collect();
    for (offset, name) in (1..).zip(&names) {
        ok(store.save(name, offset));
    }
    for (offset, name) in (1..).zip(&names) {
        let found = find(store, name);
        check(found.projection.as_str(), name, "find must return the name as it was saved");
        check(found.offset, offset, format_args!("{name:?} must have its own offset"));
    }
    let listed = all(store);
    check(listed.len(), names.len(), "all must return each name once");
    names.sort_unstable();
    for (listed, name) in listed.iter().zip(names) {
        check(listed.projection.as_str(), name, "all must be ordered by the bytes of the names");
    }
}

fn each_save_renews_updated_at(store: &dyn CheckpointStore) {
    type Save = fn(&dyn CheckpointStore, i64, i64) -> Result<()>;
    let saves: [(&str, Save); 3] = [
        ("save", |store, _, to| store.save("time", to)),
        ("advance", |store, from, to| store.advance("time", from, to)),
        ("save_many", |store, _, to| store.save_many(&[("time", to)])),
    ];
    ok(store.save("time", 0));
    // Saving the stored offset again is a save, too.
    for ((operation, save), step) in saves.into_iter().flat_map(|save| [(save, 0), (save, 1)]) {
        let before = find(store, "time").updated_at;
        // The clock of the store may be coarse.
        let renewed = poll(Duration::from_secs(5), || {
            let offset = get(store, "time");
            save(store, offset, offset + step)?;
            Ok(find(store, "time").updated_at > before)
        });
        let rule = format!(
            "{operation} must renew updated_at, even if the offset stays the same (it moved by {step})"
        );
        check(ok(renewed), true, rule);
    }
    let before = find(store, "time");
    get(store, "time");
    check(all(store), vec![before.clone()], "all and find must return the same");
    check(find(store, "time"), before, "reading must change nothing");
}

fn delete_returns_whether_there_was_a_checkpoint(store: &dyn CheckpointStore) {
    let never = ok(store.delete("never there"));
    check(never, false, "delete must return false if there was no checkpoint");
    ok(store.save_many(&[("doomed", 9), ("spared", 9)]));
    delete(store, "doomed");
    check(ok(store.find("doomed")), None, "delete must delete the checkpoint");
    check(stored(store, "spared"), 9, "delete must not delete another checkpoint");
    check(ok(store.delete("doomed")), false, "a second delete must return false");
    ok(store.advance("doomed", 0, 3));
    check(stored(store, "doomed"), 3, "advance from 0 must create a deleted checkpoint again");
}

fn invalid_input_changes_nothing(store: &dyn CheckpointStore) {
    let with_offset = |name: &str, offset| {
        let many = [("good", 6), (name, offset), ("third", 6)];
        [
            ("save", store.save(name, offset)),
            ("advance", store.advance(name, 0, offset)),
            ("wait_for", store.wait_for(name, offset, Duration::ZERO).map(drop)),
            ("save_many", store.save_many(&many)),
        ]
    };
    ok(store.save("good", 5));
    let before = all(store);
    let too_long = "x".repeat(1_025);
    for name in ["", "nul \0 inside", "\0", &too_long, &"é".repeat(513)] {
        let by_name = [
            ("find", store.find(name).map(drop)),
            ("get", store.get(name).map(drop)),
            ("delete", store.delete(name).map(drop)),
        ];
        let (start, len) = (name.chars().take(20).collect::<String>(), name.len());
        for (what, result) in by_name.into_iter().chain(with_offset(name, 1)) {
            assert!(
                matches!(&result, Err(Error::InvalidProjection { name: it, .. }) if it == name),
                "conformance: {what} must refuse the name {start:?} ({len} bytes) with InvalidProjection, \
                 but returned {result:?}"
            );
        }
    }
    let negative = [("good", -1), ("other", -1), ("other", i64::MIN)]
        .map(|(name, offset)| with_offset(name, offset));
    let advances = [(5, -1), (i64::MIN, 5), (-2, -1), (5, 4)]
        .map(|(from, to)| ("advance", store.advance("good", from, to)));
    for (what, result) in negative.into_iter().flatten().chain(advances) {
        assert!(
            matches!(result, Err(Error::InvalidOffset { .. })),
            "conformance: {what} must refuse invalid offsets with InvalidOffset, but returned {result:?}"
        );
    }
    check(all(store), before, "invalid input must change nothing");
}

fn advance_moves_only_from_the_expected_offset(store: &dyn CheckpointStore) {
    let conflict = |from: i64, to: i64, stored_offset: i64, why: &str| {
        let outcome = store.advance("steps", from, to);
        let Err(Error::Conflict { projection, expected, found }) = &outcome else {
            panic!(
                "conformance: advance from {from} to {to} must be a Conflict {why}, but returned {outcome:?}"
            );
        };
        check(
            (projection.as_str(), *expected, *found),
            ("steps", from, stored_offset),
            "a Conflict must name the projection, the expected offset and the one found",
        );
        check(stored(store, "steps"), stored_offset, "a Conflict must change nothing");
    };
    conflict(1, 2, 0, "if there is no checkpoint");
    conflict(7, 7, 0, "if there is no checkpoint");
    check(ok(store.find("steps")), None, "a Conflict must not create a checkpoint");
    ok(store.advance("steps", 0, 10));
    check(stored(store, "steps"), 10, "advance from 0 must create the checkpoint");
    conflict(0, 20, 10, "if the checkpoint is not at 0");
    conflict(0, 10, 10, "even if the checkpoint is already at the new offset");
    conflict(9, 11, 10, "if the expected offset is too low");
    conflict(11, 12, 10, "if the expected offset is too high");
    ok(store.advance("steps", 10, 10));
    ok(store.advance("steps", 10, i64::MAX));
    check(stored(store, "steps"), i64::MAX, "advance must accept every offset");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 0));
    ok(store.advance("steps", 0, 1));
    check(stored(store, "steps"), 1, "advance must continue from a stored 0");
    delete(store, "steps");
    ok(store.advance("steps", 0, 0));
    check(find(store, "steps").offset, 0, "advance from 0 to 0 must create a checkpoint");
}

fn save_many_keeps_the_last_of_a_repeated_name(store: &dyn CheckpointStore) {
    ok(store.save_many(&[]));
    check(all(store), vec![], "save_many of an empty slice must do nothing");
    ok(store.save_many(&[("twice", 3), ("once", 7), ("twice", 5), ("twice", 4)]));
    check(stored(store, "twice"), 4, "save_many must keep the last offset of a repeated name");
}

fn many_checkpoints_are_saved_and_listed_completely(store: &dyn CheckpointStore) {
    /// More than a page of most APIs, and a prime, so that the last page is not full.
    const MANY: i64 = 1_103;
    let mut names: Vec<_> = (0..MANY).map(|i| format!("many {i}")).collect();
    names.sort_unstable();
    // All of them are new in the first round, move forwards in the second, and back in the third.
    for offsets in [0..MANY, MANY..2 * MANY, 0..MANY] {
        let many: Vec<_> = names.iter().map(String::as_str).zip(offsets).collect();
        ok(store.save_many(&many));
        let listed = all(store);
        let listed: Vec<_> = listed.iter().map(|it| (it.projection.as_str(), it.offset)).collect();
        let mut sorted = listed.clone();
        sorted.sort_unstable();
        if sorted != many {
            for &(name, offset) in &many {
                check(get(store, name), offset, "save_many must save each of many checkpoints");
            }
            panic!("conformance: all must return each of many checkpoints, and each once");
        }
        check(listed == many, true, "all must order many checkpoints by the bytes of their names");
    }
}

fn wait_for_waits_until_the_offset_is_reached(store: &dyn CheckpointStore) {
    /// Also ends the wait of a store that ignores the timeout.
    const NEVER: (Duration, i64) = (LIMIT, i64::MAX);
    // Another thread saves an offset after a delay, unless the wait is over by then.
    let wait = |offset, timeout, (delay, saved)| {
        let (returned, late) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if late.recv_timeout(delay) == Err(Timeout) {
                    ok(store.save("awaited", saved));
                }
            });
            let started = Instant::now();
            let reached = ok(store.wait_for("awaited", offset, timeout));
            drop(returned);
            (reached, started.elapsed())
        })
    };
    let expires = "wait_for must return false when the timeout expires";
    let is_at_0 = wait(0, Duration::ZERO, NEVER).0;
    check(is_at_0, true, "wait_for must return true for offset 0");
    check(wait(1, Duration::ZERO, NEVER).0, false, expires);
    ok(store.save("awaited", 5));
    for offset in [0, 4, 5] {
        for timeout in [Duration::ZERO, 2 * LIMIT, Duration::MAX] {
            let (reached, took) = wait(offset, timeout, NEVER);
            check(reached, true, "wait_for must return true for an offset that is reached already");
            check(took < LIMIT, true, "wait_for must not wait for an offset that is reached");
        }
    }
    let timeout = Duration::from_millis(30);
    let (reached, took) = wait(6, timeout, NEVER);
    check(reached, false, expires);
    // Half of it, because a store may use its own clock.
    check(took >= timeout / 2, true, "wait_for must wait until the timeout expires");
    for (offset, saved) in [(6, 6), (8, 9)] {
        let (reached, took) = wait(offset, 2 * LIMIT, (Duration::from_millis(20), saved));
        check(reached, true, "wait_for must return true once the offset is reached");
        check(took < LIMIT, true, "wait_for must return soon after the offset is reached");
    }
}

/// Runs the same work in several threads that start together. Panics if one of them does.
fn in_threads<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let start = Barrier::new(count);
    let in_thread = |i| {
        start.wait();
        work(i)
    };
    thread::scope(|scope| {
        let in_thread = &in_thread;
        let threads: Vec<_> = (0..count).map(|i| scope.spawn(move || in_thread(i))).collect();
        threads.into_iter().map(join).collect()
    })
}

/// Passes on the message of a panic, which the end of the scope would replace.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Enough rounds to hit a short window: few for a slow store, many for a fast one.
fn rounds() -> impl Iterator<Item = i64> {
    const LEAST: i64 = 40;
    const LEAST_TIME: Duration = Duration::from_millis(300);
    let started = Instant::now();
    (1..).take_while(move |&round| round <= LEAST || started.elapsed() < LEAST_TIME)
}

/// Runs `work` in rounds, and `rival` repeatedly in several other threads meanwhile.
fn with_rivals(rival: impl Fn() + Sync, work: impl Fn(i64) + Send) {
    const RIVALS: usize = 3;
    thread::scope(|scope| {
        let working = scope.spawn(|| rounds().for_each(work));
        in_threads(RIVALS, |_| {
            while !working.is_finished() {
                rival();
            }
        });
        join(working);
    });
}

fn no_save_of_concurrent_threads_is_lost(store: &dyn CheckpointStore) {
    let names: Vec<_> = (0..THREADS).map(|i| format!("thread {i}")).collect();
    let rule = "no save may be lost to the save of another thread";
    let saved = in_threads(THREADS, |i| {
        let name = &names[i];
        rounds().fold(0, |last, offset| {
            check(get(store, name), last, rule);
            ok(store.save(name, offset));
            check(get(store, name), offset, "a save must be visible to the next get of its thread");
            offset
        })
    });
    for (name, last) in names.iter().zip(saved) {
        check(get(store, name), last, rule);
    }
    // In opposite orders, which must not deadlock.
    in_threads(THREADS, |i| {
        let mut checkpoints: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
        if i % 2 == 0 {
            checkpoints.reverse();
        }
        (0..10).for_each(|_| ok(store.save_many(&checkpoints)));
    });
}

/// Whether a concurrent advance has succeeded.
fn advance(store: &dyn CheckpointStore, projection: &str, from: i64, to: i64) -> bool {
    match store.advance(projection, from, to) {
        Ok(()) => true,
        Err(error) if error.is_conflict() => false,
        Err(error) => panic!(
            "conformance: a concurrent advance must succeed or be a Conflict, but returned {error:?}"
        ),
    }
}

/// Advances by one from the current offset. Returns whether no other thread was faster.
fn step(store: &dyn CheckpointStore, projection: &str) -> bool {
    let from = get(store, projection);
    advance(store, projection, from, from + 1)
}

/// The sum of what `round` returns, over several threads and many rounds.
fn sum_of_rounds(round: impl Fn() -> i64 + Sync) -> i64 {
    in_threads(THREADS, |_| rounds().map(|_| round()).sum::<i64>()).into_iter().sum()
}

/// An `advance` that reads and then writes without a lock loses a step sooner or later.
fn no_concurrent_advance_is_lost(store: &dyn CheckpointStore) {
    let steps = sum_of_rounds(|| step(store, "stairs").into());
    check(
        get(store, "stairs"),
        steps,
        "of several callers that advance from one offset, exactly one must succeed, so that no step is lost",
    );
}

/// What is created by `advance`, at 1, is deleted once, or left.
fn exactly_one_concurrent_delete_returns_true(store: &dyn CheckpointStore) {
    let surplus = sum_of_rounds(|| {
        let created = advance(store, "fleeting", 0, 1);
        let deleted = ok(store.delete("fleeting"));
        i64::from(created) - i64::from(deleted)
    });
    check(
        surplus,
        get(store, "fleeting"),
        "of several callers that create one checkpoint by advance, exactly one must succeed, and of several \
         that delete it, exactly one must get true",
    );
}

/// Several threads advance the checkpoint by one, while another thread sets it, each time higher than they
/// can reach, and deletes it. An advance that is written after a set or a delete, but was compared before
/// it, is visible: the offset is lower than the one that was set, or much higher than 0.
fn no_advance_undoes_an_earlier_write(store: &dyn CheckpointStore) {
    const HIGHER: i64 = 1 << 32;
    let look_twice = |start: i64, operation: &str| {
        // A thread that wakes from a pause may interrupt another one in the middle of an advance.
        for pause in [Duration::ZERO, Duration::from_micros(50)] {
            thread::sleep(pause);
            let found = get(store, "stairs");
            assert!(
                (start..start + HIGHER).contains(&found),
                "conformance: an advance must not undo an earlier {operation}: {found} is stored, but \
                 {start} or a little more is expected"
            );
        }
    };
    let work = |round| {
        let start = 2 * round * HIGHER;
        ok(store.save("stairs", start));
        look_twice(start, "save");
        ok(store.save_many(&[("stairs", start + HIGHER)]));
        look_twice(start + HIGHER, "save_many");
        delete(store, "stairs");
        look_twice(0, "delete");
    };
    with_rivals(|| _ = step(store, "stairs"), work);
}

/// Several threads create the checkpoint if there is none, while another thread deletes and saves it.
fn no_advance_from_no_checkpoint_undoes_a_save(store: &dyn CheckpointStore) {
    let work = |round| {
        ok(store.save("stairs", 9));
        for _ in 0..3 {
            check(get(store, "stairs"), 9, "an advance from 0 must not undo an earlier save");
        }
        delete(store, "stairs");
        // A different pause each time, because the moment at which another thread reads is unknown.
        (0..round % 32).for_each(|_| hint::spin_loop());
    };
    with_rivals(|| _ = advance(store, "stairs", 0, 1), work);
}

#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "the callers have values")]
fn check<T: PartialEq + Debug>(found: T, expected: T, rule: impl Display) {
    assert!(found == expected, "conformance: {rule}: {found:?} instead of {expected:?}");
}

fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| {
        panic!("conformance: an operation with valid input must not fail, but returned {error:?}")
    })
}

fn find(store: &dyn CheckpointStore, projection: &str) -> Checkpoint {
    ok(store.find(projection)).unwrap_or_else(|| {
        panic!("conformance: find must return a saved checkpoint, but {projection:?} is not found")
    })
}

fn get(store: &dyn CheckpointStore, projection: &str) -> i64 {
    ok(store.get(projection))
}

/// What `get` returns while no other thread writes.
fn stored(store: &dyn CheckpointStore, projection: &str) -> i64 {
    let got = get(store, projection);
    let found = ok(store.find(projection)).map_or(0, |checkpoint| checkpoint.offset);
    check(got, found, "get and find must return the same offset");
    got
}

fn all(store: &dyn CheckpointStore) -> Vec<Checkpoint> {
    ok(store.all())
}

fn delete(store: &dyn CheckpointStore, projection: &str) {
    let was_there = ok(store.delete(projection));
    check(was_there, true, "delete must return true if there was a checkpoint");
}
