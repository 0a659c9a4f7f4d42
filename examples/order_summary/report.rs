use crate::events::OrderEvent;
use crate::projections::{OrderSummary, Projection, Rows, SalesFunnel};

/// What the read models must be: each event applied once, in order, and nothing else.
#[derive(Default)]
pub(crate) struct Fold {
    pub(crate) head: i64,
    pub(crate) orders: Rows<OrderSummary>,
    pub(crate) funnel: Rows<SalesFunnel>,
}

impl Fold {
    pub(crate) fn add(&mut self, event: &OrderEvent) {
        self.head = event.offset;
        OrderSummary::fold(&mut self.orders, event);
        SalesFunnel::fold(&mut self.funnel, event);
    }
}

/// What has become of a projection.
pub(crate) struct Projected<P: Projection> {
    pub(crate) checkpoint: i64,
    pub(crate) rows: Rows<P>,
}

impl<P: Projection> Projected<P> {
    pub(crate) fn summary(&self, head: i64) -> String {
        let (name, totals) = (P::NAME, P::totals(&self.rows));
        format!("{name}: checkpoint {}, stream head {head}; {totals}", self.checkpoint)
    }

    /// What is wrong with it, if anything is.
    pub(crate) fn mismatch(&self, head: i64, fold: &Rows<P>) -> Option<String> {
        let Self { checkpoint, rows } = self;
        let name = P::NAME;
        if *checkpoint != head {
            return Some(format!(
                "{name}: checkpoint {checkpoint} is not the stream head {head}: is this the \
                 stream that was projected before?"
            ));
        }
        let key = fold.keys().chain(rows.keys()).find(|&key| rows.get(key) != fold.get(key))?;
        let (totals, right) = (P::totals(rows), P::totals(fold));
        let (found, expected) = (rows.get(key), fold.get(key));
        Some(format!(
            "{name}: the read model is wrong: {totals}; a fold over the events gives {right}; \
             {key} is {found:?} and should be {expected:?}"
        ))
    }
}
