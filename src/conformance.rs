//! The contract of [`CheckpointStore`] as code, for anybody's own store.

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
/// How long what takes no time may take: a store may be slow, and must not hang.
const PATIENCE: Duration = Duration::from_secs(10);

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
    nothing_is_cut_however_much_there_is(store);
    wait_for_waits_until_the_offset_is_reached(store);
    no_save_of_many_threads_is_lost(store);
    of_rivals_exactly_one_advances(store);
    no_step_of_rivals_is_lost(store);
    of_rivals_exactly_one_deletes(store);
    no_advance_undoes_what_came_before_it(store);
    no_advance_from_nothing_undoes_a_save(store);

    let left = all(store);
    assert!(left.is_empty(), "conformance: a deleted checkpoint is still listed: {left:?}");
}

fn an_unknown_projection_has_no_checkpoint(store: &dyn CheckpointStore) {
    assert_eq!(ok(store.find("unknown")), None, "conformance: find of an unknown projection");
    assert_eq!(stored(store, "unknown"), 0, "conformance: get of an unknown projection is 0");
    ok(store.save("known", 5));
    assert_eq!(stored(store, "unknown"), 0, "conformance: projections are apart");
    assert_eq!(stored(store, "know"), 0, "conformance: a name is compared as a whole");
    assert_eq!(stored(store, "KNOWN"), 0, "conformance: names differ in case");
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
            thread::sleep(Duration::from_millis(1));
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
    assert_eq!(stored(store, "spared"), 9, "conformance: delete forgets no other checkpoint");
    assert!(!ok(store.delete("doomed")), "conformance: the second delete says false");
    ok(store.advance("doomed", 0, 3));
    assert_eq!(stored(store, "doomed"), 3, "conformance: a deleted projection starts anew");
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
        refused("wait_for", store.wait_for(name, 0, Duration::ZERO).map(drop));
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
            refused("wait_for", store.wait_for("good", offset, Duration::ZERO).map(drop));
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
        assert_eq!(
            stored(store, "steps"),
            expected_found,
            "conformance: a Conflict changes nothing"
        );
    };
    conflict(1, 2, 0, "from an offset that is not there is a Conflict");
    conflict(7, 7, 0, "from an offset that is not there is a Conflict");
    assert_eq!(ok(store.find("steps")), None, "conformance: a Conflict creates nothing");
    ok(store.advance("steps", 0, 10));
    assert_eq!(stored(store, "steps"), 10, "conformance: advance creates a checkpoint from 0");
    conflict(0, 20, 10, "from 0 is a Conflict when more is stored");
    conflict(0, 10, 10, "is a Conflict even when the checkpoint is where it was to go");
    conflict(9, 11, 10, "from behind is a Conflict");
    conflict(11, 12, 10, "from ahead is a Conflict");
    ok(store.advance("steps", 10, 10));
    ok(store.advance("steps", 10, i64::MAX));
    assert_eq!(stored(store, "steps"), i64::MAX, "conformance: advance goes as far as offsets go");
    ok(store.save("steps", 0));
    ok(store.advance("steps", 0, 1));
    assert_eq!(stored(store, "steps"), 1, "conformance: advance goes on from a stored 0");
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
    assert_eq!(stored(store, "new"), 1, "conformance: save_many creates");
    assert_eq!(stored(store, "there"), 2, "conformance: save_many sets, back too");
    assert_eq!(stored(store, "twice"), 4, "conformance: of a name given twice the last one stays");
    delete_each(store, ["new", "there", "twice"]);
}

fn nothing_is_cut_however_much_there_is(store: &dyn CheckpointStore) {
    /// More than a page of any API, and a prime: whatever the size of a page, the last is not full.
    const MANY: i64 = 1_103;
    let names: Vec<_> = (0..MANY).map(|i| format!("many {i}")).collect();
    // At first all of them are new, then all of them are there.
    for offsets in [0..MANY, MANY..2 * MANY] {
        let many: Vec<_> = names.iter().map(String::as_str).zip(offsets).collect();
        ok(store.save_many(&many));
        let listed: Vec<_> =
            all(store).into_iter().map(|found| (found.projection, found.offset)).collect();
        let by_name: BTreeMap<_, _> = listed.iter().cloned().collect();
        if let Some(&(name, offset)) = many.iter().find(|it| by_name.get(it.0) != Some(&it.1)) {
            let found = get(store, name);
            assert_eq!(found, offset, "conformance: save_many saves every one of many: {name:?}");
            panic!("conformance: all lists every one of many, as it is: not {name:?}");
        }
        assert_eq!(listed.len(), many.len(), "conformance: all lists each name once");
        assert!(
            listed.into_iter().eq(by_name),
            "conformance: all is ordered by the bytes of the names, however many there are"
        );
    }
    in_threads(|thread| delete_each(store, names.iter().skip(thread).step_by(THREADS)));
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

/// As many rounds as it takes to hit a narrow gap: some in a slow store, many in a fast one.
fn rounds() -> impl Iterator<Item = i64> {
    const LEAST: i64 = 40;
    const LEAST_TIME: Duration = Duration::from_millis(300);
    let started = Instant::now();
    (1..).take_while(move |&round| round <= LEAST || started.elapsed() < LEAST_TIME)
}

/// Lets rivals repeat their work for as long as another thread is at its own.
fn beside_rivals(rival: impl Fn() + Sync, work: impl FnOnce()) {
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

fn no_save_of_many_threads_is_lost(store: &dyn CheckpointStore) {
    let name = |i: usize| format!("thread {i}");
    let saved = [const { AtomicI64::new(0) }; THREADS];
    let assert_kept = |i: usize| {
        let (found, last) = (get(store, &name(i)), saved[i].load(Ordering::Relaxed));
        assert_eq!(found, last, "conformance: no save is lost to another thread's");
    };
    in_threads(|i| {
        for offset in rounds() {
            assert_kept(i);
            ok(store.save(&name(i), offset));
            let found = get(store, &name(i));
            assert_eq!(found, offset, "conformance: a save is seen by the next get of its thread");
            saved[i].store(offset, Ordering::Relaxed);
        }
    });
    (0..THREADS).for_each(assert_kept);
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

/// One step further from wherever it is. Returns whether no rival was faster.
fn step(store: &dyn CheckpointStore, projection: &str) -> bool {
    let from = get(store, projection);
    match store.advance(projection, from, from + 1) {
        Ok(()) => true,
        Err(error) if error.is_conflict() => false,
        Err(error) => panic!("conformance: advance among rivals failed: {error:?}"),
    }
}

/// A step that looks first and writes later, without holding on, is overtaken sooner or later.
fn no_step_of_rivals_is_lost(store: &dyn CheckpointStore) {
    let steps = AtomicI64::new(0);
    in_threads(|_| {
        for _ in rounds() {
            steps.fetch_add(step(store, "stairs").into(), Ordering::Relaxed);
        }
    });
    assert_eq!(
        get(store, "stairs"),
        steps.into_inner(),
        "conformance: advance compares and sets in one step, so no rival's step is lost"
    );
    delete(store, "stairs");
}

/// What is created by an advance from nothing, and deleted, is counted.
fn of_rivals_exactly_one_deletes(store: &dyn CheckpointStore) {
    let (created, deleted) = (AtomicUsize::new(0), AtomicUsize::new(0));
    in_threads(|_| {
        for _ in rounds() {
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

/// Rivals step on from wherever the checkpoint is, while one thread sets it, each time higher than
/// they can step, and deletes it. A step from where it was before, if written later, shows: it is
/// lower than what was set, or much higher than what begins anew.
fn no_advance_undoes_what_came_before_it(store: &dyn CheckpointStore) {
    const HIGHER: i64 = 1 << 32;
    let look = |start: i64, operation: &str| {
        let found = get(store, "stairs");
        assert!(
            (start..start + HIGHER).contains(&found),
            "conformance: an advance does not undo a {operation} that came before it: \
             {found} is stored, after {start}"
        );
    };
    // Who wakes from a pause interrupts a rival in the midst of a step.
    let look_twice = |start, operation| {
        look(start, operation);
        thread::sleep(Duration::from_micros(50));
        look(start, operation);
    };
    beside_rivals(
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
    // Whether the rivals have made a new one is their luck.
    ok(store.delete("stairs"));
}

/// Rivals create a checkpoint whenever there is none, while one thread deletes it and sets it anew.
fn no_advance_from_nothing_undoes_a_save(store: &dyn CheckpointStore) {
    const SAVED: i64 = 9;
    let create = || match store.advance("stairs", 0, 1) {
        Err(error) if !error.is_conflict() => {
            panic!("conformance: advance among rivals failed: {error:?}")
        }
        _ => {}
    };
    beside_rivals(create, || {
        for round in rounds() {
            ok(store.save("stairs", SAVED));
            for _ in 0..3 {
                let found = get(store, "stairs");
                let promise = "conformance: an advance from nothing does not undo a save";
                assert_eq!(found, SAVED, "{promise} that came before it");
            }
            delete(store, "stairs");
            // Each time a little longer, for it is not known when a rival has looked.
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
    // One that heeds no time-out ends all the same: in the end the offset is reached.
    let timed_out = |offset, timeout| {
        let (in_time, overdue) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if overdue.recv_timeout(PATIENCE) == Err(Timeout) {
                    ok(store.save("awaited", i64::MAX));
                }
            });
            let (reached, took) = timed(offset, timeout);
            assert!(!reached, "conformance: wait_for says false when the time is over");
            drop(in_time);
            took
        })
    };
    assert!(timed(0, Duration::ZERO).0, "conformance: every checkpoint has reached 0");
    timed_out(1, Duration::ZERO);
    ok(store.save("awaited", 5));
    for offset in [0, 4, 5] {
        for timeout in [Duration::ZERO, 2 * PATIENCE, Duration::MAX] {
            let (reached, took) = timed(offset, timeout);
            assert!(
                reached,
                "conformance: wait_for asks once, even without time, and says true for what is there"
            );
            assert!(took < PATIENCE, "conformance: wait_for does not wait for what is there");
        }
    }
    let timeout = Duration::from_millis(30);
    // Half of it: a store may count by a clock of its own.
    assert!(
        timed_out(6, timeout) >= timeout / 2,
        "conformance: wait_for waits until the time is over"
    );

    for (offset, reached_by) in [(6, 6), (8, 9)] {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                ok(store.advance("awaited", get(store, "awaited"), reached_by));
            });
            let (reached, took) = timed(offset, 2 * PATIENCE);
            assert!(reached, "conformance: wait_for says true once the offset is reached");
            assert!(took < PATIENCE, "conformance: wait_for returns soon after it is reached");
        });
    }
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

/// What `get` says, while no other thread writes.
fn stored(store: &dyn CheckpointStore, projection: &str) -> i64 {
    let found = ok(store.find(projection)).map_or(0, |checkpoint| checkpoint.offset);
    let got = get(store, projection);
    assert_eq!(got, found, "conformance: get and find tell the same of {projection:?}");
    got
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
