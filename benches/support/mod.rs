//! What the benchmarks share: servers, tables, threads, and what is compared.

#![allow(dead_code, unused_imports, reason = "each benchmark uses its part of it")]
#![allow(clippy::cast_precision_loss, reason = "no number here is that large")]

#[path = "../../tests/it/harness/mod.rs"]
mod harness;

mod distance;
mod saves;
mod threads;
mod transaction;

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use checkpoint_store::{Cadence, PostgresCheckpointStore};

pub(crate) use distance::at_a_distance;
pub(crate) use harness::{Options, Server, client, wait_until};
pub(crate) use saves::{
    BARE_PREPARED, BARE_TYPED, BY_HAND, GROUPED, OURS, PREPARED, ROUND_TRIP, Save, Turns, WAYS, Way,
};
pub(crate) use threads::{
    BareMap, SharedStores, beside_busy_threads, checkpointed_each, has_pgbench, in_threads,
    pgbench, times_each,
};
pub(crate) use transaction::{Batches, Projected, SavedBy};

/// As the distribution configures it: a save returns when it is on the disk.
pub(crate) static DURABLE: LazyLock<Server> = LazyLock::new(|| start(Options::durable()));

/// A save returns before it is on the disk. `synchronous_commit = off` rather than `fsync = off`,
/// because it is the one that can be had in production: a crash loses the last moment, and nothing
/// else.
pub(crate) static NOT_DURABLE: LazyLock<Server> =
    LazyLock::new(|| start(Options::durable().set("synchronous_commit", "off")));

pub(crate) static SERVERS: [(&str, &LazyLock<Server>); 2] =
    [("durable", &DURABLE), ("not durable", &NOT_DURABLE)];

fn start(options: Options) -> Server {
    let server = Server::start(options);
    store(&server).migrate().expect("a table");
    server
}

/// Whether this run only shows that the benchmarks work: with `--test`, and without cargo's
/// `--bench`.
pub(crate) fn only_a_test() -> bool {
    has_argument("--test") || !has_argument("--bench")
}

pub(crate) fn has_argument(wanted: &str) -> bool {
    std::env::args().any(|argument| argument == wanted)
}

pub(crate) fn store(server: &Server) -> PostgresCheckpointStore {
    PostgresCheckpointStore::connect(&server.params()).expect("a store")
}

/// A table of its own, in a schema of its own.
pub(crate) struct Table {
    pub(crate) store: PostgresCheckpointStore,
    pub(crate) schema: String,
}

impl Table {
    pub(crate) fn new(server: &Server) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let schema = format!("bench_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let store = PostgresCheckpointStore::builder()
            .schema(&schema)
            .prepared_statements(true)
            .connect(&server.params())
            .expect("a store");
        store.migrate().expect("a table");
        Self { store, schema }
    }

    /// Many projections, as they are after some time: the table is vacuumed.
    pub(crate) fn with(server: &Server, projections: u64) -> Self {
        let table = Self::new(server);
        let fill = format!(
            "INSERT INTO {}.projection_checkpoints (projection_name, \"offset\")
             SELECT 'projection ' || number, 1 FROM generate_series(0, {projections} - 1) AS number",
            table.schema
        );
        let mut client = client(&server.params());
        client.batch_execute(&fill).expect("rows");
        let vacuum = format!("VACUUM ANALYZE {}.projection_checkpoints", table.schema);
        client.batch_execute(&vacuum).expect("a vacuumed table");
        table
    }
}

/// The name of the projection whose turn it is among so many: all over the table, not in its order.
pub(crate) fn scattered(turn: u64, projections: u64) -> String {
    const A_LARGE_PRIME: u64 = 982_451_653;
    format!("projection {}", turn * A_LARGE_PRIME % projections)
}

/// From every event, and every so many, to every five seconds.
pub(crate) const CADENCES: [(&str, Cadence, Option<u64>); 5] = [
    ("every event", Cadence::every(1), Some(1)),
    ("every 10", Cadence::every(10), Some(10)),
    ("every 100", Cadence::every(100), Some(100)),
    ("every 1,000", Cadence::every(1_000), Some(1_000)),
    ("within 5 s", Cadence::within(Duration::from_secs(5)), None),
];

/// Stands for the work that an event is, in memory: ten microseconds of it.
pub(crate) fn handle_event() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_micros(10) {
        std::hint::spin_loop();
    }
}
