//! Each operation in detail, by criterion: a module a concern. To run one of them:
//! `cargo bench --bench operations -- '^save/'`.
//!
//! Criterion measures one candidate after the other, so what the machine does meanwhile is in the
//! difference. To compare them use the benchmark `summary`, which lets them take turns.

#[path = "../support/mod.rs"]
mod support;

mod cadence;
mod memory;
mod save;
mod save_many;
mod scale;
mod threads;
mod transaction;
mod watermark;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    save::benchmark(&mut criterion);
    transaction::benchmark(&mut criterion);
    threads::benchmark(&mut criterion);
    save_many::benchmark(&mut criterion);
    scale::benchmark(&mut criterion);
    memory::benchmark(&mut criterion);
    watermark::benchmark(&mut criterion);
    cadence::benchmark(&mut criterion);
    criterion.final_summary();
}
