//! Projects order events into two read models, and resumes after a crash where it was.
//!
//! ```text
//! cargo run --release --example order_summary                  # 100,000 generated events
//! cargo run --release --example order_summary -- orders.jsonl  # a file; `-` is standard input
//!
//! export DATABASE_URL=postgres://app:secret@localhost/app      # keep it all in PostgreSQL
//! cargo run --release --example order_summary -- --crash-after 30000
//! cargo run --release --example order_summary                  # resumes
//! ```
//!
//! Two projections run over the same events, each in a thread of its own:
//!
//! * `order-summary` has one row per order: its state and amount, as of its latest event;
//! * `sales-funnel` has one row per kind of event: how many there were, and their amounts added up.
//!
//! With `DATABASE_URL` the read models are the tables `order_summary` and `sales_funnel`, created
//! when they are missing. A batch of events is applied and its checkpoint saved in one
//! transaction, see [`apply_exactly_once`]: each event counts once, whenever the process dies, and
//! however many processes project the same stream at once. Without `DATABASE_URL` everything is in
//! memory, and gone at the end.
//!
//! At the end both read models are compared, row by row, with a plain fold over the input. So the
//! input is always the whole stream, from its first event; what was projected before is skipped.
//!
//! # Input
//!
//! JSON Lines, one event per line:
//!
//! ```json
//! {"offset":1,"order":"o-17","event":"placed","amount_cents":1299}
//! ```
//!
//! * `offset` is 1 or more and greater than that of the line before; gaps are fine.
//! * `order` has 1 to 200 bytes, none of them NUL.
//! * `event` is `placed`, `paid`, `shipped` or `cancelled`.
//! * `amount_cents` is from 0 to 4,294,967,295.
//!
//! Other fields are ignored, so that the producer may add some; blank lines are skipped. Anything
//! else is an error that names the line. The events before it are applied and checkpointed; once
//! the line is fixed, the next run goes on with it.

mod events;
mod progress;
mod projections;
mod read_model;
mod report;

use std::env;
use std::io::{self, Write as _};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};
use std::{iter, panic};

use anyhow::{Context as _, Result, ensure};
use checkpoint_store::{MemoryCheckpointStore, PostgresCheckpointStore};
use clap::Parser;

use crate::events::{Input, OrderEvent};
use crate::projections::{OrderSummary, Projection, Rows, SalesFunnel};
use crate::read_model::ReadModel;
use crate::report::{Fold, Projected};

/// How many events a transaction takes at most.
const BATCH: usize = 500;
/// How many events wait for a projection before the reader does.
const QUEUE: usize = 2 * BATCH;

/// Applies a batch of events to a read model in PostgreSQL, and returns the new checkpoint; `from`
/// is the one returned last.
///
/// `project` gives the transaction and the checkpoint, saves what is returned and commits. Nothing
/// else may be done in there: it starts over when the connection is lost.
fn apply_exactly_once<P: Projection>(
    store: &PostgresCheckpointStore,
    from: i64,
    batch: &[Arc<OrderEvent>],
    crash: &Crash,
) -> Result<i64> {
    let mut checkpoint = from;
    let applied = store.project(P::NAME, |tx, offset| {
        checkpoint = offset;
        let new = &batch[batch.partition_point(|event| event.offset <= offset)..];
        let Some(last) = new.last().filter(|_| offset >= from) else {
            return Ok(None); // another process has applied them all, or has set the checkpoint back
        };
        P::apply(tx, new)?;
        crash.count(new.len());
        Ok(Some(last.offset))
    })?;
    ensure!(checkpoint >= from, "{}: set back from {from} to {checkpoint}; run it again", P::NAME);
    Ok(applied.unwrap_or(checkpoint))
}

/// Stands in for a power cut, at the worst moment: a batch is applied, its checkpoint is not saved.
struct Crash {
    after: Option<NonZeroU64>,
    applied: AtomicU64,
}

impl Crash {
    fn count(&self, events: usize) {
        let applied = self.applied.fetch_add(events as u64, Ordering::Relaxed) + events as u64;
        if self.after.is_some_and(|after| applied >= after.get()) {
            eprintln!("crash: {applied} events were applied");
            process::abort();
        }
    }
}

/// Projects order events into two read models, and resumes where it was
#[derive(Parser)]
#[command(name = "order_summary")]
struct Arguments {
    /// Abort the process once this run has applied N events, both projections counted together;
    /// the last batch is then written to its read model, but neither checkpointed nor committed
    #[arg(long, value_name = "N")]
    crash_after: Option<NonZeroU64>,

    /// Order events as JSON Lines; `-` is standard input; without it 100,000 events are generated
    file: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Err(error) = run(&Arguments::parse()) else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn run(arguments: &Arguments) -> Result<()> {
    let input = Input::open(arguments.file.as_deref())?;
    let crash = &Crash { after: arguments.crash_after, applied: AtomicU64::new(0) };
    let Some(url) = env::var_os("DATABASE_URL") else {
        let store = &MemoryCheckpointStore::new();
        let orders = ReadModel::InMemory(store, Rows::<OrderSummary>::new());
        let funnel = ReadModel::InMemory(store, Rows::<SalesFunnel>::new());
        return project_both(input, orders, funnel, crash);
    };
    let url = url.to_str().context("DATABASE_URL is not UTF-8")?; // its value may hold a password
    let store = &PostgresCheckpointStore::connect(url)?;
    store.migrate()?;
    let (orders, funnel) = (ReadModel::InPostgres(store), ReadModel::InPostgres(store));
    project_both(input, orders, funnel, crash)
}

/// Feeds both projections, then says how far each has got and whether it is right.
fn project_both(
    input: Input,
    orders: ReadModel<'_, OrderSummary>,
    funnel: ReadModel<'_, SalesFunnel>,
    crash: &Crash,
) -> Result<()> {
    let (orders_from, funnel_from) = (orders.open()?, funnel.open()?);
    for (name, from) in [(OrderSummary::NAME, orders_from), (SalesFunnel::NAME, funnel_from)] {
        writeln!(io::stdout(), "{name}: starts after offset {from}")?;
    }

    let (to_orders, order_events) = sync_channel(QUEUE);
    let (to_funnel, funnel_events) = sync_channel(QUEUE);
    let senders = [to_orders, to_funnel];
    let mut fold = Fold::default();
    let (orders, funnel, all_read) = thread::scope(|scope| {
        // Each thread owns its receiver, so that one which fails stops the reader.
        let orders = scope.spawn(move || project(orders, orders_from, &order_events, crash));
        let funnel = scope.spawn(move || project(funnel, funnel_from, &funnel_events, crash));
        let all_read = feed(input, &mut fold, &senders);
        drop(senders);
        (outcome(orders), outcome(funnel), all_read)
    });
    let (orders, funnel) = (orders?, funnel?);

    let head = fold.head;
    writeln!(io::stdout(), "{}\n{}", orders.summary(head), funnel.summary(head))?;
    all_read?;
    let mismatches = [orders.mismatch(head, &fold.orders), funnel.mismatch(head, &fold.funnel)];
    let mismatches: Vec<_> = mismatches.into_iter().flatten().collect();
    ensure!(mismatches.is_empty(), "{}", mismatches.join("\n"));
    Ok(())
}

/// Sends each event to every projection and to the fold. What was sent before an error counts.
fn feed(input: Input, fold: &mut Fold, projections: &[SyncSender<Arc<OrderEvent>>]) -> Result<()> {
    let bar = progress::bar(input.expected);
    for event in input.events {
        let event = Arc::new(event?);
        fold.add(&event);
        for projection in projections {
            if projection.send(Arc::clone(&event)).is_err() {
                // It has failed, and says why when it is joined.
                return Ok(());
            }
        }
        progress::advance(&bar);
    }
    Ok(())
}

/// Runs one projection until its events end: a batch is what waits, but never more than `BATCH`.
fn project<P: Projection>(
    mut model: ReadModel<'_, P>,
    mut checkpoint: i64,
    events: &Receiver<Arc<OrderEvent>>,
    crash: &Crash,
) -> Result<Projected<P>> {
    while let Ok(event) = events.recv() {
        let mut batch: Vec<_> = iter::once(event).chain(events.try_iter()).take(BATCH).collect();
        batch.retain(|event| event.offset > checkpoint);
        if !batch.is_empty() {
            checkpoint = model.apply(checkpoint, &batch, crash)?;
        }
    }
    model.read()
}

fn outcome<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
}
