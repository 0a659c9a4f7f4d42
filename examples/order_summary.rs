//! Projects order events into two read models, and goes on after a crash where it was.
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
//! * `order-summary` has a row an order: its state and amount, as of its latest event;
//! * `sales-funnel` has a row a kind of event: how many there were, and their amounts added up.
//!
//! With `DATABASE_URL` the read models are the tables `order_summary` and `sales_funnel`, created
//! when they are missing. A batch of events is applied and its checkpoint saved in one
//! transaction, see [`InPostgres::apply`]: each event counts exactly once, whenever the process
//! dies, and however many processes project the same stream at once. Without `DATABASE_URL`
//! everything is in memory, and gone at the end.
//!
//! At the end both read models are compared, row by row, with a plain fold over the input. So the
//! input is always the whole stream, from its first event; what was projected before is skipped.
//!
//! # Input
//!
//! JSON Lines, an event a line:
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
//! the line is mended, the next run goes on with it.
//!
//! # Exit code
//!
//! 0 when all is well, 1 after a failure or when a read model is not what it should be, 2 when the
//! command line makes no sense.

use std::collections::BTreeMap;
use std::env::{self, VarError};
use std::error::Error;
use std::ffi::OsString;
use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write as _};
use std::marker::PhantomData;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};
use std::{iter, panic};

use checkpoint_store::postgres::types::Type;
use checkpoint_store::postgres::{self, IsolationLevel};
use checkpoint_store::{CheckpointStore, MemoryCheckpointStore, PostgresCheckpointStore};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

const USAGE: &str = "\
Projects order events into two read models, and resumes where it was.

Usage: order_summary [--crash-after N] [FILE]

  FILE             order events as JSON Lines; `-` is standard input;
                   without it 100,000 events are generated
  --crash-after N  abort the process once this run has applied N events, both
                   projections counted together; the last batch is then written
                   to its read model, but neither checkpointed nor committed
  -h, --help       print this

DATABASE_URL in the environment names the PostgreSQL database to keep read
models and checkpoints in; without it they are in memory.
";

/// How many events a transaction takes at most.
const BATCH: usize = 500;
/// How many events wait for a projection before the reader does.
const QUEUE: usize = 2 * BATCH;
const GENERATED: usize = 100_000;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(reason) => {
            eprintln!("error: {reason}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if arguments.help {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let chain = iter::successors(Some(&*error as &dyn Error), |&cause| cause.source());
            let causes: Vec<_> = chain.map(ToString::to_string).collect();
            eprintln!("error: {}", causes.join(": "));
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Arguments {
    help: bool,
    file: Option<PathBuf>,
    crash_after: Option<NonZeroU64>,
}

impl Arguments {
    fn parse(mut given: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut parsed = Self::default();
        while let Some(argument) = given.next() {
            match argument.to_str() {
                Some("-h" | "--help") => parsed.help = true,
                Some("--crash-after") => {
                    let number = given.next();
                    let number = number.as_deref().and_then(|number| number.to_str()?.parse().ok());
                    parsed.crash_after =
                        Some(number.ok_or("--crash-after takes a number, 1 or more")?);
                }
                Some(option) if option.starts_with('-') && option != "-" => {
                    return Err(format!("unknown option {option}"));
                }
                _ if parsed.file.is_some() => return Err("more than one FILE".to_owned()),
                _ => parsed.file = Some(argument.into()),
            }
        }
        Ok(parsed)
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let input = Input::open(arguments)?;
    let crash = &Crash { after: arguments.crash_after, applied: AtomicU64::new(0) };
    match env::var("DATABASE_URL") {
        Ok(url) => {
            let store = &PostgresCheckpointStore::connect(&url)?;
            store.migrate()?;
            let orders = InPostgres::<OrderSummary> { store, crash, projection: PhantomData };
            let funnel = InPostgres::<SalesFunnel> { store, crash, projection: PhantomData };
            project_both(input, orders, funnel)
        }
        Err(VarError::NotPresent) => {
            let store = &MemoryCheckpointStore::new();
            let orders = InMemory::<OrderSummary> { store, crash, rows: BTreeMap::new() };
            let funnel = InMemory::<SalesFunnel> { store, crash, rows: BTreeMap::new() };
            project_both(input, orders, funnel)
        }
        // Its own message would show the value, password and all.
        Err(VarError::NotUnicode(_)) => Err("DATABASE_URL is not valid Unicode".into()),
    }
}

/// Feeds both projections, then says how far each has got and whether it is right.
fn project_both(
    input: Input,
    mut orders: impl Home<Projection = OrderSummary>,
    mut funnel: impl Home<Projection = SalesFunnel>,
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
        let orders = scope.spawn(move || project(orders, orders_from, &order_events));
        let funnel = scope.spawn(move || project(funnel, funnel_from, &funnel_events));
        let all_read = feed(input, &mut fold, &senders);
        drop(senders);
        (outcome(orders), outcome(funnel), all_read)
    });

    let orders = Report::new::<OrderSummary>(&orders?, fold.head, &fold.orders);
    let funnel = Report::new::<SalesFunnel>(&funnel?, fold.head, &fold.funnel);
    writeln!(io::stdout(), "{}\n{}", orders.summary, funnel.summary)?;
    all_read?;
    let mismatches: Vec<_> = [orders.mismatch, funnel.mismatch].into_iter().flatten().collect();
    if mismatches.is_empty() { Ok(()) } else { Err(mismatches.join("\n").into()) }
}

/// Sends each event to every projection and to the fold. What was sent before an error counts.
fn feed(input: Input, fold: &mut Fold, projections: &[SyncSender<Arc<OrderEvent>>]) -> Result<()> {
    let mut progress = Progress::new(input.expected);
    for event in input.events {
        let event = Arc::new(event?);
        fold.add(&event);
        for projection in projections {
            if projection.send(Arc::clone(&event)).is_err() {
                // It has failed, and says why when it is joined.
                return Ok(());
            }
        }
        progress.add_one();
    }
    Ok(())
}

/// Runs one projection until its events end: a batch is what waits, but never more than `BATCH`.
fn project<H: Home>(
    mut home: H,
    mut checkpoint: i64,
    events: &Receiver<Arc<OrderEvent>>,
) -> Result<Projected<H::Projection>> {
    while let Ok(event) = events.recv() {
        let mut batch: Vec<_> = iter::once(event).chain(events.try_iter()).take(BATCH).collect();
        batch.retain(|event| event.offset > checkpoint);
        if !batch.is_empty() {
            checkpoint = home.apply(checkpoint, &batch)?;
        }
    }
    home.read()
}

fn outcome<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Where a projection's read model and its checkpoint are kept, together.
trait Home: Send {
    type Projection: Projection;

    /// Makes what is missing, and returns the checkpoint.
    fn open(&mut self) -> Result<i64>;

    /// Applies the events beyond the checkpoint, moves the checkpoint to the last of them, and
    /// returns it. The batch follows `from`, the checkpoint as it was returned last.
    fn apply(&mut self, from: i64, batch: &[Arc<OrderEvent>]) -> Result<i64>;

    /// How far it is and what it holds, as of the same moment.
    fn read(self) -> Result<Projected<Self::Projection>>;
}

struct InPostgres<'a, P> {
    store: &'a PostgresCheckpointStore,
    crash: &'a Crash,
    projection: PhantomData<P>,
}

impl<P: Projection> Home for InPostgres<'_, P> {
    type Projection = P;

    fn open(&mut self) -> Result<i64> {
        let mut client = self.store.pool().get()?;
        let mut tx = client.transaction()?;
        // `CREATE TABLE IF NOT EXISTS` fails when two run at once; under the lock they take turns.
        let checkpoint = self.store.in_transaction(&mut tx).lock(P::NAME)?;
        tx.batch_execute(P::CREATE)?;
        tx.commit()?;
        Ok(checkpoint)
    }

    /// This is how each event counts exactly once. Any `?` on the way rolls all of it back.
    fn apply(&mut self, from: i64, batch: &[Arc<OrderEvent>]) -> Result<i64> {
        let mut client = self.store.pool().get()?;
        let mut tx = client.transaction()?;

        let checkpoint = self.store.in_transaction(&mut tx).lock(P::NAME)?;
        if checkpoint < from {
            let name = P::NAME;
            return Err(
                format!("{name}: set back from {from} to {checkpoint}; run it again").into()
            );
        }
        let new: Vec<_> = batch.iter().filter(|event| event.offset > checkpoint).collect();
        let Some(last) = new.last() else {
            return Ok(checkpoint); // another process has applied them all
        };

        let offsets: Vec<_> = new.iter().map(|event| event.offset).collect();
        let orders: Vec<_> = new.iter().map(|event| event.order.as_str()).collect();
        let kinds: Vec<_> = new.iter().map(|event| event.event.as_str()).collect();
        let amounts: Vec<_> = new.iter().map(|event| i64::from(event.amount_cents)).collect();
        tx.execute_typed(
            P::APPLY,
            &[
                (&offsets, Type::INT8_ARRAY),
                (&orders, Type::TEXT_ARRAY),
                (&kinds, Type::TEXT_ARRAY),
                (&amounts, Type::INT8_ARRAY),
            ],
        )?;
        self.crash.count(new.len());

        self.store.in_transaction(&mut tx).save(P::NAME, last.offset)?;
        tx.commit()?;
        Ok(last.offset)
    }

    fn read(self) -> Result<Projected<P>> {
        let mut client = self.store.pool().get()?;
        let snapshot = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
        let mut tx = snapshot.read_only(true).start()?;
        let checkpoint = self.store.in_transaction(&mut tx).get(P::NAME)?;
        let rows = tx.query_typed(P::READ, &[])?;
        let rows = rows.iter().map(P::row).collect::<Result<_, _>>()?;
        Ok(Projected { checkpoint, rows })
    }
}

struct InMemory<'a, P: Projection> {
    store: &'a MemoryCheckpointStore,
    crash: &'a Crash,
    rows: Rows<P>,
}

impl<P: Projection> Home for InMemory<'_, P> {
    type Projection = P;

    fn open(&mut self) -> Result<i64> {
        Ok(self.store.get(P::NAME)?)
    }

    fn apply(&mut self, from: i64, batch: &[Arc<OrderEvent>]) -> Result<i64> {
        for event in batch {
            P::apply(&mut self.rows, event);
        }
        self.crash.count(batch.len());
        let to = batch.last().map_or(from, |event| event.offset);
        self.store.advance(P::NAME, from, to)?;
        Ok(to)
    }

    fn read(self) -> Result<Projected<P>> {
        Ok(Projected { checkpoint: self.store.get(P::NAME)?, rows: self.rows })
    }
}

/// A read model, by its key.
type Rows<P> = BTreeMap<String, <P as Projection>::Row>;

struct Projected<P: Projection> {
    checkpoint: i64,
    rows: Rows<P>,
}

/// What becomes of the events: once in SQL, for a batch, and once in Rust, for a single event.
trait Projection: Send {
    const NAME: &'static str;
    const CREATE: &'static str;
    const APPLY: &'static str;
    const READ: &'static str;
    type Row: Debug + PartialEq + Send;

    fn apply(rows: &mut Rows<Self>, event: &OrderEvent);
    fn row(row: &postgres::Row) -> Result<(String, Self::Row), postgres::Error>;
    fn totals(rows: &Rows<Self>) -> String;
}

struct OrderSummary;

#[derive(Debug, PartialEq)]
struct Order {
    state: String,
    amount_cents: i64,
}

impl Projection for OrderSummary {
    const NAME: &'static str = "order-summary";
    const CREATE: &'static str = "
        CREATE TABLE IF NOT EXISTS order_summary (
            order_id TEXT PRIMARY KEY,
            state TEXT NOT NULL,
            amount_cents BIGINT NOT NULL
        )";
    const APPLY: &'static str = r#"
        INSERT INTO order_summary (order_id, state, amount_cents)
        SELECT DISTINCT ON (order_id) order_id, event, amount_cents
        FROM unnest($1, $2, $3, $4) AS batch ("offset", order_id, event, amount_cents)
        ORDER BY order_id, "offset" DESC
        ON CONFLICT (order_id)
        DO UPDATE SET state = EXCLUDED.state, amount_cents = EXCLUDED.amount_cents"#;
    const READ: &'static str = "SELECT order_id, state, amount_cents FROM order_summary";
    type Row = Order;

    fn apply(rows: &mut Rows<Self>, event: &OrderEvent) {
        let state = event.event.as_str().to_owned();
        rows.insert(event.order.clone(), Order { state, amount_cents: event.amount_cents.into() });
    }

    fn row(row: &postgres::Row) -> Result<(String, Order), postgres::Error> {
        Ok((row.try_get(0)?, Order { state: row.try_get(1)?, amount_cents: row.try_get(2)? }))
    }

    fn totals(rows: &Rows<Self>) -> String {
        let amount: i64 = rows.values().map(|order| order.amount_cents).sum();
        format!("{} orders of {amount} cents", rows.len())
    }
}

struct SalesFunnel;

#[derive(Clone, Debug, Default, PartialEq)]
struct Stage {
    events: i64,
    amount_cents: i64,
}

impl Projection for SalesFunnel {
    const NAME: &'static str = "sales-funnel";
    const CREATE: &'static str = "
        CREATE TABLE IF NOT EXISTS sales_funnel (
            event TEXT PRIMARY KEY,
            events BIGINT NOT NULL,
            amount_cents BIGINT NOT NULL
        )";
    const APPLY: &'static str = r#"
        INSERT INTO sales_funnel AS stored (event, events, amount_cents)
        SELECT event, count(*), sum(amount_cents)::BIGINT
        FROM unnest($1, $2, $3, $4) AS batch ("offset", order_id, event, amount_cents)
        GROUP BY event
        ON CONFLICT (event)
        DO UPDATE SET events = stored.events + EXCLUDED.events,
                      amount_cents = stored.amount_cents + EXCLUDED.amount_cents"#;
    const READ: &'static str = "SELECT event, events, amount_cents FROM sales_funnel";
    type Row = Stage;

    fn apply(rows: &mut Rows<Self>, event: &OrderEvent) {
        let stage = rows.entry(event.event.as_str().to_owned()).or_default();
        stage.events += 1;
        stage.amount_cents += i64::from(event.amount_cents);
    }

    fn row(row: &postgres::Row) -> Result<(String, Stage), postgres::Error> {
        Ok((row.try_get(0)?, Stage { events: row.try_get(1)?, amount_cents: row.try_get(2)? }))
    }

    fn totals(rows: &Rows<Self>) -> String {
        let events: i64 = rows.values().map(|stage| stage.events).sum();
        let mut totals = format!("{events} events");
        for kind in [Kind::Placed, Kind::Paid, Kind::Shipped, Kind::Cancelled].map(Kind::as_str) {
            let Stage { events, amount_cents } = rows.get(kind).cloned().unwrap_or_default();
            let _ = write!(totals, ", {events} {kind} of {amount_cents} cents");
        }
        totals
    }
}

/// What the read models must be: each event applied once, in order, and nothing else.
#[derive(Default)]
struct Fold {
    head: i64,
    orders: Rows<OrderSummary>,
    funnel: Rows<SalesFunnel>,
}

impl Fold {
    fn add(&mut self, event: &OrderEvent) {
        self.head = event.offset;
        OrderSummary::apply(&mut self.orders, event);
        SalesFunnel::apply(&mut self.funnel, event);
    }
}

struct Report {
    summary: String,
    mismatch: Option<String>,
}

impl Report {
    fn new<P: Projection>(projected: &Projected<P>, head: i64, fold: &Rows<P>) -> Self {
        let Projected { checkpoint, rows } = projected;
        let (name, totals) = (P::NAME, P::totals(rows));
        let summary = format!("{name}: checkpoint {checkpoint}, stream head {head}; {totals}");
        let mismatch = if *checkpoint == head {
            let differs = |key: &&String| rows.get(*key) != fold.get(*key);
            fold.keys().chain(rows.keys()).find(differs).map(|key| {
                let right = P::totals(fold);
                let (found, expected) = (rows.get(key), fold.get(key));
                format!(
                    "{name}: the read model is wrong: {totals}; a fold over the events gives \
                     {right}; {key} is {found:?} and should be {expected:?}"
                )
            })
        } else {
            Some(format!(
                "{name}: checkpoint {checkpoint} is not the stream head {head}: is this the \
                 stream that was projected before?"
            ))
        };
        Self { summary, mismatch }
    }
}

#[derive(Deserialize)]
struct OrderEvent {
    offset: i64,
    order: String,
    event: Kind,
    amount_cents: u32, // so that no sum of them exceeds a BIGINT
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Placed,
    Paid,
    Shipped,
    Cancelled,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Paid => "paid",
            Self::Shipped => "shipped",
            Self::Cancelled => "cancelled",
        }
    }
}

struct Input {
    events: Box<dyn Iterator<Item = Result<OrderEvent>>>,
    /// How many there will be, if that is known.
    expected: Option<usize>,
}

impl Input {
    fn open(arguments: &Arguments) -> Result<Self> {
        let Some(path) = &arguments.file else {
            let events = Box::new(generated_events().take(GENERATED).map(Ok));
            return Ok(Self { events, expected: Some(GENERATED) });
        };
        if path.as_os_str() == "-" {
            let events = parsed_events("standard input".to_owned(), io::stdin().lock());
            return Ok(Self { events: Box::new(events), expected: None });
        }
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| format!("{name}: {error}"))?;
        let events = parsed_events(name, BufReader::new(file));
        Ok(Self { events: Box::new(events), expected: None })
    }
}

fn parsed_events(name: String, input: impl BufRead) -> impl Iterator<Item = Result<OrderEvent>> {
    let mut last = 0;
    (1..).zip(input.lines()).filter_map(move |(number, line): (u64, _)| {
        let event = match line {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => parsed_event(&line, last),
            Err(error) => Err(error.to_string()),
        };
        if let Ok(event) = &event {
            last = event.offset;
        }
        Some(event.map_err(|reason| format!("{name}, line {number}: {reason}").into()))
    })
}

fn parsed_event(line: &str, last: i64) -> Result<OrderEvent, String> {
    // It counts lines too, and sees but this one.
    let event: OrderEvent = serde_json::from_str(line)
        .map_err(|error| error.to_string().replace(" at line 1 column ", " at column "))?;
    if event.offset <= last {
        return Err(format!("offset {} does not come after {last}", event.offset));
    }
    if event.order.is_empty() || event.order.len() > 200 || event.order.contains('\0') {
        return Err("an order has 1 to 200 bytes, none of them NUL".to_owned());
    }
    Ok(event)
}

/// The same events each time: up to 100 orders are under way at once, and each is placed, then
/// paid, then shipped or cancelled.
fn generated_events() -> impl Iterator<Item = OrderEvent> {
    let mut seed = 0;
    let mut placed = 0;
    let mut under_way: Vec<(u32, u32, Kind)> = Vec::new();
    (1..).map(move |offset| {
        let random = splitmix64(&mut seed);
        let slot = (random % 100) as usize;
        let (order, amount_cents, event) = match under_way.get_mut(slot) {
            None => {
                placed += 1;
                let order = (placed, 100 + (random >> 32) as u32 % 20_000, Kind::Placed);
                under_way.push(order);
                order
            }
            Some(order @ &mut (_, _, Kind::Placed)) => {
                order.2 = Kind::Paid;
                *order
            }
            Some(_) => {
                let (order, amount_cents, _) = under_way.swap_remove(slot);
                let cancelled = (random >> 32).is_multiple_of(10);
                (order, amount_cents, if cancelled { Kind::Cancelled } else { Kind::Shipped })
            }
        };
        OrderEvent { offset, order: format!("o-{order}"), event, amount_cents }
    })
}

fn splitmix64(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
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

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    read: u64,
}

impl Progress {
    fn new(expected: Option<usize>) -> Self {
        let bar = io::stderr().is_terminal().then(|| match expected {
            Some(events) => ProgressBar::new(events as u64).with_style(
                ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} events, {eta}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            ),
            None => ProgressBar::new_spinner(),
        });
        Self { bar, read: 0 }
    }

    fn add_one(&mut self) {
        self.read += 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if self.read.is_multiple_of(10_000) => eprintln!("{} events read", self.read),
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
