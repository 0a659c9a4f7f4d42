//! Prints the ratios that this crate is to keep in one table, and a table for the choice of a cadence.
//!
//! The variants are interleaved, so that other load on the machine affects all of them alike. With
//! `-- --svg benches/saves.svg` it also draws two pictures: this one, and `threads.svg` beside it. With
//! names of parts, such as `-- threads memory`, it measures only those.

#![allow(clippy::cast_precision_loss, reason = "no number here is that large")]

#[path = "../support/mod.rs"]
mod support;

mod cadence;
mod group;
mod paired;
mod picture;
mod project;
mod report;
mod wake;

use std::fs;
use std::hint::black_box;
use std::path::Path;

use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};

use paired::{Candidate, Measured, side_by_side, side_by_side_anew};
use report::Target::{self, AtLeast, AtMost};
use report::{print_head, print_machine, print_throughput, print_time};
use support::{
    BARE_PREPARED, BARE_TYPED, BY_HAND, BareMap, Batches, DURABLE, GROUPED, OURS, PREPARED,
    ROUND_TRIP, SERVERS, SavedBy, Server, SharedStores, Turns, WAYS, Way, has_argument,
    has_pgbench, only_a_test, pgbench, scattered, times_each,
};

fn main() {
    if only_a_test() {
        println!("This is a test run: its figures mean nothing.\n");
    }
    print_machine();
    print_head();
    let saves = wanted("save").then(|| {
        SERVERS.map(|(durability, server)| {
            let saves = saves(server);
            print_saves(durability, &saves);
            saves
        })
    });
    if wanted("project") {
        for (durability, server) in SERVERS {
            project::print(durability, server, 1);
            project::print(durability, server, 100);
            project::print_at_a_distance(durability, server);
            project::print_statements(durability, server);
        }
    }
    if wanted("transaction") {
        for (durability, server) in SERVERS {
            transactions(durability, server);
        }
    }
    let threads = wanted("threads").then(|| {
        [1, 8, 32].map(|count| {
            let measured = threads(count);
            print_threads(count, &measured);
            (count, measured)
        })
    });
    let checkpointers = wanted("group").then(|| {
        let of = |durability, server| {
            [1, 2, 8, 32].map(|count| {
                let measured = group::checkpointers(server, count);
                group::print_checkpointers(durability, count, &measured);
                (count, measured)
            })
        };
        let [durable, _] = SERVERS.map(|(durability, server)| of(durability, server));
        for busy in [8, 32] {
            group::print_beside_busy_threads(busy);
        }
        durable
    });
    if wanted("save_many") {
        many();
    }
    if wanted("scale") {
        for (durability, server) in SERVERS {
            scale(durability, server);
        }
    }
    if wanted("memory") {
        for threads in [1, 16] {
            memory(threads);
        }
    }
    if wanted("wake") {
        for count in [1, 8] {
            wake::print_appends(count);
        }
        println!();
        wake::print_latency();
    }
    if wanted("cadence") {
        println!();
        cadence::print_table();
    }
    let drawn = (argument_after("--svg"), saves, threads, checkpointers);
    if let (Some(path), Some([durable, _]), Some(threads), Some(checkpointers)) = drawn {
        let path = Path::new(&path);
        let pictures = [
            (path.to_owned(), picture::saves(&durable)),
            (path.with_file_name("threads.svg"), picture::threads(&threads, &checkpointers)),
        ];
        for (path, picture) in pictures {
            fs::write(&path, picture).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// Whether a part of the table is asked for; none named is all of them.
fn wanted(part: &str) -> bool {
    const PARTS: [&str; 10] = [
        "save",
        "project",
        "transaction",
        "threads",
        "group",
        "save_many",
        "scale",
        "memory",
        "wake",
        "cadence",
    ];
    has_argument(part) || !PARTS.into_iter().any(has_argument)
}

fn argument_after(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next()?;
    Some(arguments.next().unwrap_or_else(|| panic!("{name} needs a path")))
}

/// `full`, or as few as show that it works.
fn rounds(full: usize) -> usize {
    if only_a_test() { 2 } else { full }
}

fn saves(server: &Server) -> Measured {
    let candidate = |&(name, way): &Way| {
        let mut save = way(server);
        let mut turns = Turns::new();
        Candidate::new(name, 20, move || {
            let (projection, offset) = turns.next();
            save(projection, offset);
        })
    };
    side_by_side_anew(rounds(300), || WAYS.iter().map(candidate).collect())
}

fn print_saves(durability: &str, saves: &Measured) {
    let durable = durability == "durable";
    let (ours, prepared) = if durable { (1.4, 1.6) } else { (2.0, 2.5) };
    let row = |what: &str, target, pair| {
        print_time(&format!("{what}, {durability}"), target, saves, pair);
    };
    row("by hand / ours", AtLeast(ours), (BY_HAND, OURS));
    row("by hand / ours prepared", AtLeast(prepared), (BY_HAND, PREPARED));
    row("ours / bare `execute_typed`", AtMost(1.05), (OURS, BARE_TYPED));
    row("ours prepared / bare prepared", AtMost(1.05), (PREPARED, BARE_PREPARED));
    row("1 thread, group commit / without it", AtMost(1.05), (GROUPED, OURS));
    row("ours prepared / empty round trip", Target::None, (PREPARED, ROUND_TRIP));
}

fn transactions(durability: &str, server: &Server) {
    let (ours, by_hand, without) = ("with ours", "with one by hand", "without");
    let candidate = |name, saved_by| {
        let mut batches = Batches::new(&server.params(), 100);
        Candidate::new(name, 10, move || batches.process(saved_by))
    };
    let measured = side_by_side_anew(rounds(300), || {
        vec![
            candidate(ours, SavedBy::Us),
            candidate(by_hand, SavedBy::Hand),
            candidate(without, SavedBy::Nobody),
        ]
    });
    let what = format!("transaction of 100 events, our save / the same by hand, {durability}");
    print_time(&what, AtMost(1.05), &measured, (ours, by_hand));
    let what = format!("transaction of 100 events, our save / no save, {durability}");
    print_time(&what, Target::None, &measured, (ours, without));
}

const GROUPED_PREPARED: &str = "ours, prepared, group commit";
const PGBENCH: &str = "pgbench";

/// A turn takes about a second, a save by each thread counts as one time.
fn threads(threads: usize) -> Measured {
    let times = match threads {
        _ if only_a_test() => 10,
        1 => 2_000,
        8 => 1_000,
        _ => 500,
    };
    let stores = SharedStores::new(&DURABLE);
    let through = |name, store| {
        let save = move |projection: &str, offset| {
            CheckpointStore::save(store, projection, offset).expect("saved");
        };
        Candidate::timed(name, times, move |times| times_each(threads, times, save))
    };
    let mut candidates = vec![
        through(OURS, &stores.ours as &dyn CheckpointStore),
        through(PREPARED, &stores.prepared),
        through(GROUPED, &stores.grouped),
        through(GROUPED_PREPARED, &stores.grouped_prepared),
    ];
    if has_pgbench() {
        let run = move |times| pgbench(&DURABLE, threads, times);
        candidates.push(Candidate::timed(PGBENCH, times, run));
    }
    side_by_side(rounds(15), candidates)
}

fn print_threads(threads: usize, measured: &Measured) {
    if !measured.has(PGBENCH) {
        eprintln!("pgbench is not installed: nothing to compare threads with");
        return;
    }
    let row = |what: &str, target, ours| {
        let what = format!("{}, {what} / pgbench with as many connections", threads_word(threads));
        print_throughput(&what, target, measured, (ours, PGBENCH), threads);
    };
    row("ours", Target::None, OURS);
    row("ours prepared", if threads < 32 { AtLeast(0.95) } else { Target::None }, PREPARED);
    if threads > 1 {
        row("ours, group commit", Target::None, GROUPED);
        let target = if threads < 32 { Target::None } else { AtLeast(2.0) };
        row("ours, group commit, prepared", target, GROUPED_PREPARED);
    }
}

fn threads_word(count: usize) -> String {
    if count == 1 { "1 thread".to_owned() } else { format!("{count} threads") }
}

fn many() {
    let count = if only_a_test() { 10 } else { 1_000 };
    let names: Vec<_> = (0..count).map(|number| format!("projection {number}")).collect();
    let store = &support::store(&DURABLE);
    let (mut offset, names) = (0, &names);
    let mut together = || {
        offset += 1;
        let given: Vec<_> = names.iter().map(|name| (name.as_str(), offset)).collect();
        store.save_many(&given).expect("saved");
    };
    together();
    let one_by_one = || names.iter().for_each(|name| store.save(name, 42).expect("saved"));
    let candidates =
        vec![Candidate::new("save_many", 5, together), Candidate::new("one by one", 1, one_by_one)];
    let measured = side_by_side(rounds(20), candidates);
    print_throughput(
        "`save_many` of 1,000 / one by one, durable",
        AtLeast(40.0),
        &measured,
        ("save_many", "one by one"),
        count,
    );
}

fn scale(durability: &str, server: &Server) {
    let sizes = [("among few", 10), ("among many", if only_a_test() { 1_000 } else { 1_000_000 })];
    let tables = sizes.map(|(name, size)| (name, size, support::Table::with(server, size)));
    let candidates = tables.iter().map(|(name, projections, table)| {
        let mut turns = 0..;
        Candidate::new(name, 20, move || {
            let turn = turns.next().expect("no end");
            table.store.save(&scattered(turn, *projections), 42).expect("saved");
        })
    });
    let measured = side_by_side(rounds(500), candidates.collect());
    let what = format!("save among 1,000,000 projections / among 10, {durability}");
    print_time(&what, AtMost(1.2), &measured, ("among many", "among few"));
}

fn memory(threads: usize) {
    let (ours, bare) = (MemoryCheckpointStore::new(), BareMap::default());
    let (ours, bare) = (&ours, &bare);
    let times = if only_a_test() { 10 } else { 200_000 / threads as u64 };
    let ours_saves = move |projection: &str, offset| ours.save(projection, offset).expect("saved");
    let bare_saves = move |projection: &str, offset| bare.save(projection, offset);
    let ours_gets = move |projection: &str, _| drop(black_box(ours.get(projection)));
    let bare_gets = move |projection: &str, _| {
        black_box(bare.get(projection));
    };
    let candidates = vec![
        Candidate::timed("save", times, move |times| times_each(threads, times, ours_saves)),
        Candidate::timed("bare save", times, move |times| times_each(threads, times, bare_saves)),
        Candidate::timed("get", times, move |times| times_each(threads, times, ours_gets)),
        Candidate::timed("bare get", times, move |times| times_each(threads, times, bare_gets)),
    ];
    let measured = side_by_side(rounds(100), candidates);
    let threads = threads_word(threads);
    for (operation, other) in [("save", "bare save"), ("get", "bare get")] {
        let what = format!("memory {operation} / bare `Mutex<HashMap>`, {threads}");
        print_time(&what, AtMost(1.05), &measured, (operation, other));
    }
}
