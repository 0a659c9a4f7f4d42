//! What a million saves leave in the table, and which storage parameters help.
//!
//! Every save goes through the store, in a transaction of its own. What hinders the server's clean-up
//! is other transactions at the same time, so eight threads save; one thread alone is the first row.
//! The server runs with `fsync = off`: the same work in less time. Autovacuum runs as it is
//! configured by default.

#![allow(clippy::cast_precision_loss, reason = "no number here is that large")]

mod support;

use checkpoint_store::CheckpointStore;
use checkpoint_store::postgres::{Client, IsolationLevel};

use support::{Options, Server, Table, client, in_threads, only_a_test, wait_until};

/// Storage parameters to compare; none is what `migrate` makes.
const VARIANTS: [&str; 4] = ["", "fillfactor = 50", "fillfactor = 25", "fillfactor = 10"];

fn main() {
    let server = Server::start(Options::fast());
    println!(
        "| Threads | Projections | Saves | Storage parameters | HOT | Heap | Index | WAL a save |"
    );
    println!("|---:|---:|---:|---|---:|---:|---:|---:|");
    measure(&server, &Load { threads: 1, projections: 100, saves: 1_000_000 }, "");
    for (projections, saves) in [(10, 200_000), (100, 1_000_000), (1_000, 200_000)] {
        for variant in VARIANTS {
            measure(&server, &Load { threads: 8, projections, saves }, variant);
        }
    }
    while_a_transaction_lasts(&server);
}

/// Who saves, and how much.
struct Load {
    threads: usize,
    projections: u64,
    saves: u64,
}

impl Load {
    fn saves(&self) -> u64 {
        if only_a_test() { self.saves.min(2_000) } else { self.saves }
    }

    fn run(&self, table: &Table) {
        in_threads(self.threads, |thread| {
            for save in (thread as u64..self.saves()).step_by(self.threads) {
                let projection = format!("projection {}", save % self.projections);
                table
                    .store
                    .save(&projection, i64::try_from(save).expect("not so many"))
                    .expect("saved");
            }
        });
    }
}

fn measure(server: &Server, load: &Load, parameters: &str) {
    let table = configured(server, parameters);
    let mut observer = client(&server.params());
    let written = wal(&mut observer, || load.run(&table));
    let Table { store, schema } = table;
    drop(store); // its sessions report what they did when they end
    let hot = hot_share(&mut observer, &schema, load.saves() - load.projections);
    let hot = format!("{:.2} %", hot * 100.0);
    let what = if parameters.is_empty() { "(none)" } else { parameters };
    print_row(&mut observer, &schema, load, what, &hot, written);
}

/// A transaction anywhere in the database that keeps its snapshot keeps the server from removing
/// what has changed since.
fn while_a_transaction_lasts(server: &Server) {
    let load = Load { threads: 8, projections: 100, saves: 200_000 };
    let table = Table::new(server);
    let mut observer = client(&server.params());
    let mut report = |what, work: &dyn Fn()| {
        let written = wal(&mut observer, work);
        print_row(&mut observer, &table.schema, &load, what, "", written);
    };
    let mut other = client(&server.params());
    let mut lasting = other
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .start()
        .expect("a transaction");
    lasting.query("SELECT FROM pg_class", &[]).expect("a snapshot");
    report("(none), another transaction keeps a snapshot", &|| load.run(&table));
    lasting.rollback().expect("the end of it");
    report("(none), as many saves after its end", &|| load.run(&table));
    report("(none), after VACUUM", &|| {
        let vacuum = format!("VACUUM {}.projection_checkpoints", table.schema);
        client(&server.params()).batch_execute(&vacuum).expect("vacuumed");
    });
}

fn configured(server: &Server, parameters: &str) -> Table {
    let table = Table::new(server);
    if !parameters.is_empty() {
        let schema = &table.schema;
        let alter = format!("ALTER TABLE {schema}.projection_checkpoints SET ({parameters})");
        client(&server.params()).batch_execute(&alter).expect("storage parameters");
    }
    table
}

/// How many bytes `work` adds to the server's log.
fn wal(observer: &mut Client, work: impl FnOnce()) -> u64 {
    let mut position = || -> i64 {
        let query = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
        observer.query_one(query, &[]).expect("a position").get(0)
    };
    let before = position();
    work();
    (position() - before).unsigned_abs()
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
    load: &Load,
    what: &str,
    hot: &str,
    written: u64,
) {
    let query = "SELECT pg_relation_size(oid), pg_indexes_size(oid) FROM pg_class
                 WHERE oid = ($1 || '.projection_checkpoints')::regclass";
    let row = observer.query_one(query, &[&schema]).expect("the table's size");
    let [heap, index] = [0, 1].map(|column| row.get::<_, i64>(column) / 1_024);
    let (Load { threads, projections, .. }, saves) = (load, load.saves());
    let written = written / saves;
    println!(
        "| {threads} | {projections} | {saves} | {what} | {hot} | {heap} KiB | {index} KiB | {written} B |"
    );
}
