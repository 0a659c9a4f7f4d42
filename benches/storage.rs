//! What a million saves leave in the table, and which storage parameters help.
//!
//! Every save goes through the store, in a transaction of its own, from eight threads at once: what
//! hinders the server's clean-up is other transactions, and a loop in one session would have none.
//! The server runs with `fsync = off`: the same work in less time. Autovacuum runs as it is
//! configured by default.

#![allow(clippy::cast_precision_loss, reason = "no number here is that large")]

mod support;

use checkpoint_store::CheckpointStore;
use checkpoint_store::postgres::Client;

use support::{Options, Server, Table, client, in_threads, only_a_test, wait_until};

const THREADS: usize = 8;

/// Storage parameters to compare; none is what `migrate` makes.
const VARIANTS: [&str; 6] = [
    "",
    "fillfactor = 90",
    "fillfactor = 50",
    "fillfactor = 10",
    "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000",
    "fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000",
];

fn main() {
    let saves = |full| if only_a_test() { 2_000 } else { full };
    let server = Server::start(Options::fast());
    println!("| projections | saves | storage parameters | HOT | heap | index | WAL a save |");
    println!("|---:|---:|---|---:|---:|---:|---:|");
    for (projections, saves) in
        [(10, saves(300_000)), (100, saves(1_000_000)), (1_000, saves(300_000))]
    {
        for variant in VARIANTS {
            let table = Table::configured(&server, variant);
            let written = table.wal(|| table.save(projections, saves));
            let Table { store, schema } = table;
            drop(store); // its sessions report what they did when they end
            let mut observer = client(&server.params());
            let hot = hot_share(&mut observer, &schema, saves - projections);
            print_row(&mut observer, &schema, projections, saves, variant, Some(hot), written);
        }
    }
    while_a_transaction_lasts(&server, saves(200_000));
}

/// A transaction anywhere in the database that keeps its snapshot keeps the server from removing
/// what has changed since.
fn while_a_transaction_lasts(server: &Server, saves: u64) {
    let table = Table::new(server);
    let mut other = client(&server.params());
    let mut snapshot = other.build_transaction().read_only(true);
    snapshot = snapshot.isolation_level(checkpoint_store::postgres::IsolationLevel::RepeatableRead);
    let mut lasting = snapshot.start().expect("a transaction");
    lasting.query("SELECT FROM pg_class", &[]).expect("a snapshot");

    let written = table.wal(|| table.save(100, saves));
    let mut observer = client(&server.params());
    let mut report = |what, written| {
        print_row(&mut observer, &table.schema, 100, saves, what, None, written);
    };
    report("while another transaction keeps a snapshot", written);
    lasting.rollback().expect("the end of it");
    let written = table.wal(|| table.save(100, saves));
    report("after it has ended, as many saves later", written);
    let vacuum = format!("VACUUM {}.projection_checkpoints", table.schema);
    client(&server.params()).batch_execute(&vacuum).expect("vacuumed");
    report("after VACUUM", 0);
}

impl Table {
    fn configured(server: &Server, parameters: &str) -> Self {
        let table = Self::new(server);
        if !parameters.is_empty() {
            let schema = &table.schema;
            let alter = format!("ALTER TABLE {schema}.projection_checkpoints SET ({parameters})");
            client(&server.params()).batch_execute(&alter).expect("storage parameters");
        }
        table
    }

    fn save(&self, projections: u64, saves: u64) {
        in_threads(THREADS, |thread| {
            for save in (thread as u64..saves).step_by(THREADS) {
                let projection = format!("projection {}", save % projections);
                self.store.save(&projection, save.cast_signed()).expect("saved");
            }
        });
    }

    /// How many bytes `work` adds to the server's log.
    fn wal(&self, work: impl FnOnce()) -> u64 {
        let mut observer = self.store.pool().get().expect("a connection");
        let mut position = || -> i64 {
            let query = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
            observer.query_one(query, &[]).expect("a position").get(0)
        };
        let before = position();
        work();
        (position() - before).unsigned_abs()
    }
}

/// The share of updates that touched no index, once the server knows of all of them.
fn hot_share(observer: &mut Client, schema: &str, at_least: u64) -> f64 {
    let query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE schemaname = $1";
    let (mut updates, mut hot) = (0_i64, 0_i64);
    wait_until("all updates are counted", || {
        let row = observer.query_one(query, &[&schema]).expect("the table's statistics");
        (updates, hot) = (row.get(0), row.get(1));
        updates.unsigned_abs() >= at_least
    });
    hot as f64 / updates as f64
}

fn print_row(
    observer: &mut Client,
    schema: &str,
    projections: u64,
    saves: u64,
    what: &str,
    hot: Option<f64>,
    written: u64,
) {
    let query = "SELECT pg_relation_size(oid), pg_indexes_size(oid) FROM pg_class
                 WHERE oid = ($1 || '.projection_checkpoints')::regclass";
    let row = observer.query_one(query, &[&schema]).expect("the table's size");
    let kib = |column| row.get::<_, i64>(column) / 1_024;
    let hot = hot.map_or_else(String::new, |share| format!("{:.2} %", share * 100.0));
    let what = if what.is_empty() { "(none)" } else { what };
    println!(
        "| {projections} | {saves} | {what} | {hot} | {} KiB | {} KiB | {} B |",
        kib(0),
        kib(1),
        written / saves
    );
}
