use std::collections::BTreeMap;
use std::fmt::{Debug, Write as _};
use std::sync::Arc;

use checkpoint_store::postgres::types::Type;
use checkpoint_store::postgres::{self, Transaction};

use crate::events::{Kind, OrderEvent};

/// A read model, by its key.
pub(crate) type Rows<P> = BTreeMap<String, <P as Projection>::Row>;

/// What becomes of the events: once in SQL, for a batch, and once in Rust, for a single event.
pub(crate) trait Projection {
    const NAME: &'static str;
    const CREATE: &'static str;
    const APPLY: &'static str;
    const READ: &'static str;
    type Row: Debug + PartialEq + Send;

    fn fold(rows: &mut Rows<Self>, event: &OrderEvent);
    fn row(row: &postgres::Row) -> Result<(String, Self::Row), postgres::Error>;
    fn totals(rows: &Rows<Self>) -> String;

    /// The batch as four arrays, in one round trip.
    fn apply(tx: &mut Transaction<'_>, batch: &[Arc<OrderEvent>]) -> Result<(), postgres::Error> {
        let offsets: Vec<_> = batch.iter().map(|event| event.offset).collect();
        let orders: Vec<_> = batch.iter().map(|event| event.order.as_str()).collect();
        let kinds: Vec<_> = batch.iter().map(|event| event.event.as_str()).collect();
        let amounts: Vec<_> = batch.iter().map(|event| i64::from(event.amount_cents)).collect();
        tx.execute_typed(
            Self::APPLY,
            &[
                (&offsets, Type::INT8_ARRAY),
                (&orders, Type::TEXT_ARRAY),
                (&kinds, Type::TEXT_ARRAY),
                (&amounts, Type::INT8_ARRAY),
            ],
        )?;
        Ok(())
    }

    fn read(tx: &mut Transaction<'_>) -> Result<Rows<Self>, postgres::Error> {
        tx.query_typed(Self::READ, &[])?.iter().map(Self::row).collect()
    }
}

pub(crate) struct OrderSummary;

#[derive(Debug, PartialEq)]
pub(crate) struct Order {
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

    fn fold(rows: &mut Rows<Self>, event: &OrderEvent) {
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

pub(crate) struct SalesFunnel;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stage {
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

    fn fold(rows: &mut Rows<Self>, event: &OrderEvent) {
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
        for kind in Kind::ALL.map(Kind::as_str) {
            let Stage { events, amount_cents } = rows.get(kind).cloned().unwrap_or_default();
            let _ = write!(totals, ", {events} {kind} of {amount_cents} cents");
        }
        totals
    }
}
