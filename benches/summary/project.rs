use std::time::Duration;

use checkpoint_store::CheckpointStore;
use checkpoint_store::postgres::types::Type;

use crate::paired::{Candidate, side_by_side, side_by_side_anew};
use crate::report::Target::{self, AtMost};
use crate::report::print_time;
use crate::rounds;
use crate::support::{Projected, Server, at_a_distance, client, store};

const PROJECT: &str = "project";
const PREPARED: &str = "project, prepared";
const IN_TRANSACTION: &str = "in_transaction";
const BY_HAND: &str = "by hand";
const AT_FIRST: &str = "by hand, at first";
const BY_HAND_PREPARED: &str = "by hand, prepared";
const WITHOUT: &str = "without";

/// One batch exactly once, in all the ways that there are.
pub(crate) fn print(durability: &str, server: &Server, events: i64) {
    let params = server.params();
    let candidate = |name: &'static str, process: fn(&mut Projected)| {
        let mut projected = Projected::new(&params, events, name);
        Candidate::new(name, 10, move || process(&mut projected))
    };
    let measured = side_by_side_anew(rounds(300), || {
        vec![
            candidate(PROJECT, |projected| projected.project()),
            candidate(PREPARED, |projected| projected.project_prepared()),
            candidate(IN_TRANSACTION, Projected::in_transaction),
            candidate(BY_HAND, Projected::by_hand),
            candidate(AT_FIRST, Projected::by_hand_at_first),
            candidate(BY_HAND_PREPARED, Projected::by_hand_prepared),
            candidate(WITHOUT, Projected::without),
        ]
    });
    let row = |what: &str, target, pair| {
        let events = if events == 1 { "1 event".to_owned() } else { format!("{events} events") };
        print_time(&format!("{what}, {events}, {durability}"), target, &measured, pair);
    };
    let durable = durability == "durable";
    if events == 1 {
        let gain = AtMost(if durable { 0.95 } else { 0.9 });
        row("`project` / by hand", gain, (PROJECT, BY_HAND));
        row("`project` / by hand with `query` and `execute`", Target::None, (PROJECT, AT_FIRST));
        let gain = AtMost(if durable { 0.75 } else { 0.6 });
        row("`project` prepared / by hand", gain, (PREPARED, BY_HAND));
        row("`project` prepared / by hand prepared", AtMost(1.03), (PREPARED, BY_HAND_PREPARED));
        row("`in_transaction` lock, save / by hand", AtMost(1.05), (IN_TRANSACTION, BY_HAND));
    } else {
        let cost = if durable { AtMost(1.12) } else { Target::None };
        row("`project` prepared / no checkpoint", cost, (PREPARED, WITHOUT));
        row("`project` / no checkpoint", Target::None, (PROJECT, WITHOUT));
    }
}

/// One event at a time, with a round trip of a millisecond.
pub(crate) fn print_at_a_distance(durability: &str, server: &Server) {
    let params = at_a_distance(server, Duration::from_millis(1));
    let candidate = |name: &'static str, process: fn(&mut Projected)| {
        let mut projected = Projected::new(&params, 1, name);
        Candidate::new(name, 5, move || process(&mut projected))
    };
    let measured = side_by_side(rounds(100), {
        vec![
            candidate(PROJECT, |projected| projected.project()),
            candidate(PREPARED, |projected| projected.project_prepared()),
            candidate(BY_HAND, Projected::by_hand),
            candidate(BY_HAND_PREPARED, Projected::by_hand_prepared),
        ]
    });
    let row = |what: &str, pair| {
        print_time(
            &format!("{what}, 1 event, at 1 ms, {durability}"),
            AtMost(0.86),
            &measured,
            pair,
        );
    };
    row("`project` / by hand", (PROJECT, BY_HAND));
    row("`project` prepared / by hand prepared", (PREPARED, BY_HAND_PREPARED));
}

/// The plain statements, against the same without this crate.
pub(crate) fn print_statements(durability: &str, server: &Server) {
    let measured = side_by_side_anew(rounds(300), || {
        let (advancing, reading) = (store(server), store(server));
        for name in ["advanced", "moved", "read"] {
            advancing.save(name, 0).expect("a checkpoint");
        }
        let (mut mover, mut reader) = (client(&server.params()), client(&server.params()));
        let (mut advanced_to, mut moved_to) = (0_i64, 0_i64);
        let advance = move || {
            advancing.advance("advanced", advanced_to, advanced_to + 1).expect("advanced");
            advanced_to += 1;
        };
        let compare_and_set = move || {
            let next = moved_to + 1;
            let rows = mover
                .execute_typed(
                    "UPDATE projection_checkpoints
                     SET \"offset\" = $3, updated_at = clock_timestamp()
                     WHERE projection_name = $1 AND \"offset\" = $2",
                    &[(&"moved", Type::TEXT), (&moved_to, Type::INT8), (&next, Type::INT8)],
                )
                .expect("moved");
            assert_eq!(rows, 1);
            moved_to = next;
        };
        let get = move || assert!(reading.get("read").expect("read") >= 0);
        let select = move || {
            let row = reader
                .query_typed_one(
                    "SELECT projection_name, \"offset\", updated_at
                     FROM projection_checkpoints WHERE projection_name = $1",
                    &[(&"read", Type::TEXT)],
                )
                .expect("read");
            assert!(row.get::<_, i64>(1) >= 0);
        };
        vec![
            Candidate::new("advance", 20, advance),
            Candidate::new("compare and set", 20, compare_and_set),
            Candidate::new("get", 20, get),
            Candidate::new("select", 20, select),
        ]
    });
    let row = |what: &str, pair| {
        print_time(&format!("{what}, {durability}"), AtMost(1.05), &measured, pair);
    };
    row("`advance` / a bare compare-and-set UPDATE", ("advance", "compare and set"));
    row("`get` / a bare SELECT", ("get", "select"));
}
