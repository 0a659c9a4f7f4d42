use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;

const GENERATED: usize = 100_000;

#[derive(Deserialize)]
pub(crate) struct OrderEvent {
    pub(crate) offset: i64,
    pub(crate) order: String,
    pub(crate) event: Kind,
    pub(crate) amount_cents: u32, // so that no sum of them exceeds a BIGINT
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Placed,
    Paid,
    Shipped,
    Cancelled,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Placed, Self::Paid, Self::Shipped, Self::Cancelled];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Paid => "paid",
            Self::Shipped => "shipped",
            Self::Cancelled => "cancelled",
        }
    }
}

pub(crate) struct Input {
    pub(crate) events: Box<dyn Iterator<Item = Result<OrderEvent>>>,
    /// How many there will be, if that is known.
    pub(crate) expected: Option<usize>,
}

impl Input {
    pub(crate) fn open(file: Option<&Path>) -> Result<Self> {
        let Some(path) = file else {
            let events = Box::new(generated().take(GENERATED).map(Ok));
            return Ok(Self { events, expected: Some(GENERATED) });
        };
        if path.as_os_str() == "-" {
            let events = parsed("standard input".to_owned(), io::stdin().lock());
            return Ok(Self { events: Box::new(events), expected: None });
        }
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| name.clone())?;
        let events = parsed(name, BufReader::new(file));
        Ok(Self { events: Box::new(events), expected: None })
    }
}

fn parsed(name: String, input: impl BufRead) -> impl Iterator<Item = Result<OrderEvent>> {
    let mut last = 0;
    (1..).zip(input.lines()).filter_map(move |(number, line): (u64, _)| {
        let event = match line {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => parsed_line(&line, last),
            Err(error) => Err(error.into()),
        };
        if let Ok(event) = &event {
            last = event.offset;
        }
        Some(event.with_context(|| format!("{name}, line {number}")))
    })
}

fn parsed_line(line: &str, last: i64) -> Result<OrderEvent> {
    // serde_json counts lines too, and sees but this one.
    let event: OrderEvent = serde_json::from_str(line)
        .map_err(|error| anyhow!(error.to_string().replace(" at line 1 column ", " at column ")))?;
    ensure!(event.offset > last, "offset {} does not come after {last}", event.offset);
    ensure!(
        (1..=200).contains(&event.order.len()) && !event.order.contains('\0'),
        "an order has 1 to 200 bytes, none of them NUL"
    );
    Ok(event)
}

/// The same events in every run: up to 100 orders are under way at once, and each is placed, then
/// paid, then shipped or cancelled.
fn generated() -> impl Iterator<Item = OrderEvent> {
    let mut random = fastrand::Rng::with_seed(17);
    let mut placed = 0;
    let mut under_way: Vec<(u32, u32, Kind)> = Vec::new();
    (1..).map(move |offset| {
        let slot = random.usize(..100);
        let (order, amount_cents, event) = match under_way.get_mut(slot) {
            None => {
                placed += 1;
                let order = (placed, random.u32(100..20_100), Kind::Placed);
                under_way.push(order);
                order
            }
            Some(order @ &mut (_, _, Kind::Placed)) => {
                order.2 = Kind::Paid;
                *order
            }
            Some(_) => {
                let (order, amount_cents, _) = under_way.swap_remove(slot);
                let cancelled = random.u8(..10) == 0;
                (order, amount_cents, if cancelled { Kind::Cancelled } else { Kind::Shipped })
            }
        };
        OrderEvent { offset, order: format!("o-{order}"), event, amount_cents }
    })
}
