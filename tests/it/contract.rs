//! `conformance::verify` passes for every store of the crate, and finds each kind of broken one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use checkpoint_store::{
    Checkpoint, CheckpointStore, Error, MemoryCheckpointStore, PostgresCheckpointStore, Result,
    Watermark, conformance, validate_advance, validate_offset, validate_projection,
};

use crate::harness::{Schema, rounds};

#[test]
fn the_memory_store_keeps_the_contract() {
    conformance::verify(&MemoryCheckpointStore::new());
}

#[test]
fn the_postgres_store_keeps_the_contract() {
    conformance::verify(&Schema::new().store);
}

#[test]
fn the_contract_holds_behind_every_pointer() {
    let memory = MemoryCheckpointStore::new();
    conformance::verify(&&memory);
    let boxed: Box<dyn CheckpointStore> = Box::new(MemoryCheckpointStore::new());
    conformance::verify(&boxed);
    let shared: Arc<dyn CheckpointStore> = Arc::new(MemoryCheckpointStore::new());
    conformance::verify(&shared);
}

#[test]
fn stores_are_shared_among_threads_and_errors_are_passed_on() {
    fn is_shared<T: Send + Sync + 'static>() {}
    is_shared::<MemoryCheckpointStore>();
    is_shared::<PostgresCheckpointStore>();
    is_shared::<Box<dyn CheckpointStore>>();
    is_shared::<Watermark>();
    is_shared::<Error>();
    is_shared::<Checkpoint>();
}

#[test]
fn a_custom_store_with_the_provided_methods_alone_keeps_the_contract() {
    conformance::verify(&Minimal(MemoryCheckpointStore::new()));
    conformance::verify(&Broken::default());
}

/// A correct store over the memory store that leaves `get`, `save_many` and `wait_for` to the trait.
struct Minimal(MemoryCheckpointStore);

impl CheckpointStore for Minimal {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.0.find(projection)
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.0.all()
    }
    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        self.0.save(projection, offset)
    }
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        self.0.advance(projection, from, to)
    }
    fn delete(&self, projection: &str) -> Result<bool> {
        self.0.delete(projection)
    }
}

type SaveMany = fn(&Broken, &[(&str, i64)]) -> Result<()>;

/// A correct store over the memory store, until one of its methods is replaced.
struct Broken {
    memory: MemoryCheckpointStore,
    save: fn(&Broken, &str, i64) -> Result<()>,
    advance: fn(&Broken, &str, i64, i64) -> Result<()>,
    all: fn(&Broken) -> Result<Vec<Checkpoint>>,
    delete: fn(&Broken, &str) -> Result<bool>,
    find: fn(&Broken, &str) -> Result<Option<Checkpoint>>,
    save_many: SaveMany,
    wait_for: fn(&Broken, &str, i64, Duration) -> Result<bool>,
    calls: AtomicU64,
    /// For those whose operations take turns, but not all of them.
    turn: Mutex<()>,
}

impl Default for Broken {
    fn default() -> Self {
        Self {
            memory: MemoryCheckpointStore::new(),
            save: |this, projection, offset| this.memory.save(projection, offset),
            advance: |this, projection, from, to| this.memory.advance(projection, from, to),
            all: |this| this.memory.all(),
            delete: |this, projection| this.memory.delete(projection),
            find: |this, projection| this.memory.find(projection),
            save_many: |this, checkpoints| this.memory.save_many(checkpoints),
            wait_for: |this, projection, offset, timeout| {
                this.memory.wait_for(projection, offset, timeout)
            },
            calls: AtomicU64::new(1),
            turn: Mutex::default(),
        }
    }
}

impl Broken {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CheckpointStore for Broken {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        (self.find)(self, projection)
    }
    fn all(&self) -> Result<Vec<Checkpoint>> {
        (self.all)(self)
    }
    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        (self.save)(self, projection, offset)
    }
    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        (self.advance)(self, projection, from, to)
    }
    fn delete(&self, projection: &str) -> Result<bool> {
        (self.delete)(self, projection)
    }
    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        (self.save_many)(self, checkpoints)
    }
    fn wait_for(&self, projection: &str, offset: i64, timeout: Duration) -> Result<bool> {
        (self.wait_for)(self, projection, offset, timeout)
    }
}

/// The message with which `verify` turns the store down.
fn verdict(store: &dyn CheckpointStore) -> String {
    let verdict = catch_unwind(AssertUnwindSafe(|| conformance::verify(store)));
    let message = verdict.expect_err("verify finds the broken promise");
    message
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| message.downcast_ref::<&str>().map(ToString::to_string))
        .expect("a panic with a message")
}

#[track_caller]
fn assert_found(store: &dyn CheckpointStore, promise: &str) {
    let verdict = verdict(store);
    assert!(verdict.contains("conformance: ") && verdict.contains(promise), "{verdict}");
}

/// Side by side, for those that take their time.
fn assert_each_found(stores: impl IntoIterator<Item = (Broken, &'static str)>) {
    thread::scope(|scope| {
        for (store, promise) in stores {
            scope.spawn(move || assert_found(&store, promise));
        }
    });
}

#[test]
fn a_store_that_drops_some_saves_is_found() {
    type Save = fn(&Broken, &str, i64) -> Result<()>;
    let saves: [(Save, &str); 3] = [
        (|this, name, offset| drop_one_in(2, this, name, offset), "must return a saved checkpoint"),
        (
            |this, name, offset| drop_one_in(10, this, name, offset),
            "the offset that was saved last",
        ),
        (
            |this, name, offset| drop_one_in(97, this, name, offset),
            "the offset that was saved last",
        ),
    ];
    for (save, promise) in saves {
        assert_found(&Broken { save, ..Broken::default() }, promise);
    }
}

fn drop_one_in(n: u64, store: &Broken, projection: &str, offset: i64) -> Result<()> {
    validate_projection(projection)?;
    validate_offset(offset)?;
    if store.calls.fetch_add(1, Ordering::Relaxed) % n == 0 {
        return Ok(());
    }
    store.memory.save(projection, offset)
}

#[test]
fn an_advance_that_looks_and_writes_without_holding_on_is_found() {
    let store = Broken {
        advance: |this, projection, from, to| {
            validate_projection(projection)?;
            validate_offset(from)?;
            validate_offset(to)?;
            if to < from {
                return this.memory.advance(projection, from, to);
            }
            let found = this.memory.get(projection)?;
            if found != from {
                return Err(Error::conflict(projection, from, found));
            }
            this.memory.save(projection, to)
        },
        ..Broken::default()
    };
    let verdict = verdict(&store);
    assert!(
        verdict.contains("exactly one must succeed") || verdict.contains("no step is lost"),
        "{verdict}"
    );
}

#[test]
fn a_list_in_another_order_is_found() {
    type All = fn(&Broken) -> Result<Vec<Checkpoint>>;
    let orders: [All; 3] = [
        |this| {
            let mut all = this.memory.all()?;
            all.reverse();
            Ok(all)
        },
        |this| {
            let mut all = this.memory.all()?;
            all.sort_by_key(|checkpoint| checkpoint.projection.to_lowercase());
            Ok(all)
        },
        |this| {
            let mut all = this.memory.all()?;
            all.sort_by_key(|checkpoint| checkpoint.updated_at);
            Ok(all)
        },
    ];
    for all in orders {
        assert_found(&Broken { all, ..Broken::default() }, "ordered by the bytes");
    }
}

#[test]
fn invalid_names_that_are_taken_are_found() {
    let store = Broken {
        find: |this, projection| match validate_projection(projection) {
            Ok(()) => this.memory.find(projection),
            Err(_) => Ok(None),
        },
        ..Broken::default()
    };
    assert_found(&store, "find must refuse the name");
    let store = Broken {
        save: |this, projection, offset| match validate_projection(projection) {
            Ok(()) => this.memory.save(projection, offset),
            Err(_) => Ok(()),
        },
        ..Broken::default()
    };
    assert_found(&store, "save must refuse the name");
    let store = Broken {
        delete: |this, projection| match validate_projection(projection) {
            Ok(()) => this.memory.delete(projection),
            Err(_) => Ok(false),
        },
        ..Broken::default()
    };
    assert_found(&store, "delete must refuse the name");
}

#[test]
fn invalid_offsets_that_are_taken_are_found() {
    let store = Broken {
        save: |this, projection, offset| this.memory.save(projection, offset.max(0)),
        ..Broken::default()
    };
    assert_found(&store, "save must refuse invalid offsets");
    let store = Broken {
        advance: |this, projection, from, to| {
            if to < from {
                return Err(Error::conflict(projection, from, this.memory.get(projection)?));
            }
            this.memory.advance(projection, from, to)
        },
        ..Broken::default()
    };
    assert_found(&store, "advance must refuse invalid offsets");
}

#[test]
fn a_delete_that_always_says_true_is_found() {
    let store = Broken {
        delete: |this, projection| this.memory.delete(projection).map(|_| true),
        ..Broken::default()
    };
    assert_found(&store, "delete must return false if there was no checkpoint");
}

#[test]
fn a_time_that_stands_still_is_found() {
    fn still(checkpoint: Checkpoint) -> Checkpoint {
        Checkpoint::new(checkpoint.projection, checkpoint.offset, SystemTime::UNIX_EPOCH)
    }
    let store = Broken {
        find: |this, projection| Ok(this.memory.find(projection)?.map(still)),
        all: |this| Ok(this.memory.all()?.into_iter().map(still).collect()),
        ..Broken::default()
    };
    assert_found(&store, "save must renew updated_at");
}

#[test]
fn a_save_of_the_same_offset_that_does_not_renew_its_time_is_found() {
    let lazy_save: fn(&Broken, &str, i64) -> Result<()> = |this, name, offset| {
        validate_projection(name)?;
        match this.memory.find(name)? {
            Some(found) if found.offset == offset => Ok(()),
            _ => this.memory.save(name, offset),
        }
    };
    let lazy_advance = Broken {
        advance: |this, name, from, to| match this.memory.get(name) {
            Ok(found) if found == from && from == to && from > 0 => Ok(()),
            _ => this.memory.advance(name, from, to),
        },
        ..Broken::default()
    };
    let lazy_save_many = Broken {
        save_many: |this, checkpoints| match checkpoints {
            [(name, offset)] if this.memory.get(name).is_ok_and(|found| found == *offset) => Ok(()),
            _ => this.memory.save_many(checkpoints),
        },
        ..Broken::default()
    };
    assert_each_found([
        (Broken { save: lazy_save, ..Broken::default() }, "save must renew updated_at"),
        (lazy_advance, "advance must renew updated_at"),
        (lazy_save_many, "save_many must renew updated_at"),
    ]);
}

#[test]
fn what_is_cut_short_is_found() {
    for limit in [100, 500, 1_000] {
        LIMIT.set(limit);
        let store = Broken {
            all: |this| {
                let mut all = this.memory.all()?;
                all.truncate(LIMIT.get());
                Ok(all)
            },
            ..Broken::default()
        };
        assert_found(&store, "all must return each of many");
        let store = Broken {
            save_many: |this, checkpoints| {
                this.memory.save_many(&checkpoints[..checkpoints.len().min(LIMIT.get())])
            },
            ..Broken::default()
        };
        assert_found(&store, "save_many must save each of many");
    }
}

thread_local! {
    static LIMIT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[test]
fn a_save_many_of_many_that_is_not_all_of_them_is_found() {
    let of_pages: SaveMany = |this, checkpoints| {
        let whole_pages = match checkpoints.len() {
            few @ ..25 => few,
            many => many / 25 * 25,
        };
        this.memory.save_many(&checkpoints[..whole_pages])
    };
    let only_creates: SaveMany = |this, checkpoints| {
        if checkpoints.len() < 100 {
            return this.memory.save_many(checkpoints);
        }
        let there = this.memory.all()?;
        let is_new = |name: &str| there.iter().all(|checkpoint| checkpoint.projection != name);
        let new: Vec<_> = checkpoints.iter().copied().filter(|(name, _)| is_new(name)).collect();
        this.memory.save_many(&new)
    };
    for save_many in [of_pages, only_creates] {
        let store = Broken { save_many, ..Broken::default() };
        assert_found(&store, "save_many must save each of many");
    }
}

#[test]
fn a_list_whose_pages_are_in_no_order_is_found() {
    let store = Broken {
        all: |this| {
            let mut all = this.memory.all()?;
            if all.len() > 1_000 {
                all.rotate_left(1_000);
            }
            Ok(all)
        },
        ..Broken::default()
    };
    assert_found(&store, "all must order many checkpoints");
}

/// Between the look and the write of a store that is not in this process.
fn over_the_network() {
    thread::sleep(Duration::from_micros(50));
}

/// What depends on who comes first is found every time.
fn assert_found_each_time(broken: impl Fn() -> Broken, promises: &[&str]) {
    for _ in 0..rounds(2, 5) {
        let verdict = verdict(&broken());
        assert!(promises.iter().any(|promise| verdict.contains(promise)), "{verdict}");
    }
}

#[test]
fn deletes_that_are_both_told_true_are_found() {
    let broken = || Broken {
        delete: |this, name| {
            let was_there = this.memory.find(name)?.is_some();
            over_the_network();
            this.memory.delete(name)?;
            Ok(was_there)
        },
        ..Broken::default()
    };
    assert_found_each_time(broken, &["exactly one must get true"]);
}

#[test]
fn a_save_that_writes_all_rows_as_it_has_read_them_is_found() {
    let broken = || Broken {
        save: |this, name, offset| {
            validate_projection(name)?;
            validate_offset(offset)?;
            let all = this.memory.all()?;
            over_the_network();
            let others = all.iter().filter(|other| other.projection != name);
            let mut rows: Vec<_> =
                others.map(|other| (other.projection.as_str(), other.offset)).collect();
            rows.push((name, offset));
            this.memory.save_many(&rows)
        },
        ..Broken::default()
    };
    assert_found_each_time(broken, &["no save may be lost", "must be visible to the next get"]);
}

/// An `advance` that is atomic among its like, and looks before it writes.
fn advance_in_turn(this: &Broken, name: &str, from: i64, to: i64) -> Result<()> {
    validate_advance(name, from, to)?;
    let _turn = this.turn();
    let found = this.memory.get(name)?;
    if found != from {
        return Err(Error::conflict(name, from, found));
    }
    over_the_network();
    this.memory.save(name, to)
}

type Store = fn() -> Broken;

#[test]
fn an_advance_that_takes_no_turns_with_some_other_operation_is_found() {
    let kinds: [(Store, &str); 3] = [
        (
            || Broken {
                delete: |this, name| {
                    let _turn = this.turn();
                    this.memory.delete(name)
                },
                save_many: |this, checkpoints| {
                    let _turn = this.turn();
                    this.memory.save_many(checkpoints)
                },
                ..Broken::default()
            },
            "an advance must not undo an earlier save:",
        ),
        (
            || Broken {
                delete: |this, name| {
                    let _turn = this.turn();
                    this.memory.delete(name)
                },
                save: |this, name, offset| {
                    let _turn = this.turn();
                    this.memory.save(name, offset)
                },
                ..Broken::default()
            },
            "an advance must not undo an earlier save_many:",
        ),
        (
            || Broken {
                save: |this, name, offset| {
                    let _turn = this.turn();
                    this.memory.save(name, offset)
                },
                save_many: |this, checkpoints| {
                    let _turn = this.turn();
                    this.memory.save_many(checkpoints)
                },
                ..Broken::default()
            },
            "an advance must not undo an earlier delete:",
        ),
    ];
    for (broken, promise) in kinds {
        let in_turn = || Broken { advance: advance_in_turn, ..broken() };
        assert_found_each_time(in_turn, &[promise, "exactly one must get true"]);
    }
}

#[test]
fn an_advance_from_nothing_that_overwrites_a_save_is_found() {
    let broken = || Broken {
        advance: |this, name, from, to| {
            validate_advance(name, from, to)?;
            let turn = this.turn();
            if from == 0 && this.memory.find(name)?.is_none() {
                over_the_network();
                return this.memory.save(name, to);
            }
            drop(turn);
            this.memory.advance(name, from, to)
        },
        delete: |this, name| {
            let _turn = this.turn();
            this.memory.delete(name)
        },
        ..Broken::default()
    };
    assert_found_each_time(broken, &["must not undo an earlier save", "exactly one must get true"]);
}

#[test]
fn a_wait_that_is_none_or_too_long_is_found() {
    type WaitFor = fn(&Broken, &str, i64, Duration) -> Result<bool>;
    let waits: [(WaitFor, &str); 6] = [
        (
            |this, name, offset, _| this.memory.wait_for(name, offset, Duration::ZERO),
            "must wait until the timeout expires",
        ),
        (
            |this, name, offset, timeout| {
                Ok(this.memory.wait_for(name, offset, timeout)? && !timeout.is_zero())
            },
            "must return true for offset 0",
        ),
        (
            |this, name, offset, timeout| this.memory.wait_for(name, offset, timeout).map(|_| true),
            "must return false",
        ),
        (
            |this, name, offset, timeout| {
                let there = this.memory.get(name)? == offset;
                Ok(this.memory.wait_for(name, offset, timeout)? && there)
            },
            "must return true for an offset that is reached",
        ),
        (
            |this, name, offset, timeout| {
                let at_most = Duration::from_secs(11); // of 20 and more
                thread::sleep(timeout.min(at_most));
                this.memory.wait_for(name, offset, Duration::ZERO)
            },
            "must not wait for an offset that is reached",
        ),
        (
            |this, name, offset, _| this.memory.wait_for(name, offset, Duration::MAX),
            "must return false when the timeout expires",
        ),
    ];
    assert_each_found(
        waits.map(|(wait_for, promise)| (Broken { wait_for, ..Broken::default() }, promise)),
    );
}

#[test]
fn a_save_many_that_saves_what_comes_before_invalid_input_is_found() {
    let store = Broken {
        save_many: |this, checkpoints| {
            checkpoints.iter().try_for_each(|(name, offset)| this.memory.save(name, *offset))
        },
        ..Broken::default()
    };
    assert_found(&store, "invalid input must change nothing");
}

#[test]
fn a_save_many_that_keeps_the_first_of_a_name_given_twice_is_found() {
    let store = Broken {
        save_many: |this, checkpoints| {
            let mut reversed = checkpoints.to_vec();
            reversed.reverse();
            this.memory.save_many(&reversed)
        },
        ..Broken::default()
    };
    assert_found(&store, "must keep the last offset of a repeated name");
}

#[test]
fn an_advance_from_an_offset_that_is_not_there_is_found() {
    let store = Broken {
        advance: |this, projection, from, to| match this.memory.find(projection) {
            Ok(None) if from <= to => this.memory.save(projection, to),
            _ => this.memory.advance(projection, from, to),
        },
        ..Broken::default()
    };
    assert_found(&store, "must be a Conflict if there is no checkpoint");
}

#[test]
fn an_advance_that_is_content_with_the_result_is_found() {
    let store = Broken {
        advance: |this, projection, from, to| match this.memory.advance(projection, from, to) {
            Err(Error::Conflict { found, .. }) if found == to => Ok(()),
            outcome => outcome,
        },
        ..Broken::default()
    };
    assert_found(&store, "even if the checkpoint is already at the new offset");
}

#[test]
fn a_store_that_is_not_empty_is_refused() {
    let store = Broken::default();
    store.memory.save("left over", 1).expect("a save");
    assert_found(&store, "must be empty before the test");
}
