use std::fmt::Write;

use crate::group::{self, PLAIN};
use crate::paired::Measured;
use crate::report::{duration, thousands};
use crate::support::{BARE_PREPARED, BARE_TYPED, BY_HAND, GROUPED, OURS, PREPARED};
use crate::{GROUPED_PREPARED, PGBENCH, threads_word};

/// A name and its value.
type Bar = (String, f64);

const WIDTH: f64 = 760.0;
const BAR: f64 = 20.0;
const STEP: f64 = 28.0;
/// Where the bars begin, and the length of the longest.
const LEFT: f64 = 210.0;
const LONGEST: f64 = 450.0;

const THIS_CRATE: &str = "this crate";

/// How long one durable save takes. For the front page, so its names need no explanation.
pub(crate) fn saves(saves: &Measured) -> String {
    let mut chart = Chart { svg: String::new(), y: 0.0 };
    chart.title("One durable save, median time; shorter is better");
    let prepared = format!("{THIS_CRATE}, prepared");
    let bars: Vec<Bar> = [
        (BY_HAND, "by hand"),
        (OURS, THIS_CRATE),
        (BARE_TYPED, "statement alone"),
        (PREPARED, &prepared),
        (BARE_PREPARED, "statement alone, prepared"),
    ]
    .map(|(measured, name)| (name.to_owned(), saves.seconds(measured)))
    .to_vec();
    chart.bars(&bars, largest(&bars), duration);
    chart.finish("How long one durable save takes")
}

/// How many durable saves several threads complete in a second.
pub(crate) fn threads(
    threads: &[(usize, Measured)],
    checkpointers: &[(usize, Measured)],
) -> String {
    let mut chart = Chart { svg: String::new(), y: 0.0 };
    chart.title("Durable saves per second by threads on 8 connections; longer is better");
    let groups: Vec<(usize, Vec<Bar>)> = threads
        .iter()
        .map(|(count, measured)| {
            let bars = [OURS, PREPARED, GROUPED, GROUPED_PREPARED, PGBENCH]
                .into_iter()
                .filter(|name| measured.has(name))
                .map(|name| {
                    let rate = *count as f64 / measured.seconds(name);
                    match name {
                        PGBENCH if *count == 1 => (format!("{name}, 1 connection"), rate),
                        PGBENCH => (format!("{name}, {count} connections"), rate),
                        ours => (ours.to_owned(), rate),
                    }
                })
                .collect();
            (*count, bars)
        })
        .collect();
    let checkpointers: Vec<(usize, Vec<Bar>)> = checkpointers
        .iter()
        .filter(|(count, _)| threads.iter().any(|(other, _)| other == count))
        .map(|(count, measured)| {
            let rate = |name| (String::from(name), *count as f64 / measured.seconds(name));
            (*count, [PLAIN, group::GROUPED].map(rate).to_vec())
        })
        .collect();
    let most =
        groups.iter().chain(&checkpointers).map(|(_, bars)| largest(bars)).fold(0.0, f64::max);
    for (count, bars) in &groups {
        chart.subtitle(&threads_word(*count));
        chart.bars(bars, most, |rate| format!("{}/s", thousands(rate)));
    }
    chart.title("A Checkpointer in each thread that saves after every event, events per second");
    for (count, bars) in &checkpointers {
        chart.subtitle(&threads_word(*count));
        chart.bars(bars, most, |rate| format!("{}/s", thousands(rate)));
    }
    chart.finish("How many durable saves several threads complete in a second")
}

fn largest(bars: &[Bar]) -> f64 {
    bars.iter().map(|bar| bar.1).fold(0.0, f64::max)
}

struct Chart {
    svg: String,
    y: f64,
}

impl Chart {
    fn title(&mut self, text: &str) {
        self.y += 34.0;
        self.text("title", 16.0, self.y, text);
        self.y += 14.0;
    }

    fn subtitle(&mut self, text: &str) {
        self.y += 18.0;
        self.text("subtitle", 16.0, self.y, text);
        self.y += 8.0;
    }

    fn bars(&mut self, bars: &[Bar], full: f64, label: impl Fn(f64) -> String) {
        for (name, value) in bars {
            let is_ours = [THIS_CRATE, OURS, PLAIN].iter().any(|ours| name.starts_with(ours));
            let class = if is_ours { "ours" } else { "other" };
            let length = LONGEST * value / full;
            let middle = self.y + BAR * 0.75;
            self.text("name", LEFT - 10.0, middle, name);
            let bar = format!(
                r#"x="{LEFT}" y="{:.1}" width="{length:.1}" height="{BAR}" rx="2""#,
                self.y
            );
            self.line(&format!(r#"<rect class="{class}" {bar}/>"#));
            self.text("value", LEFT + length + 8.0, middle, &label(*value));
            self.y += STEP;
        }
    }

    fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        self.line(&format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{text}</text>"#));
    }

    fn line(&mut self, line: &str) {
        writeln!(self.svg, "  {line}").expect("writing to a string succeeds");
    }

    fn finish(self, label: &str) -> String {
        let height = self.y + 12.0;
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{label}">
  <style>
    text {{ font: 13px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1f2328; }}
    .title {{ font-weight: 600; font-size: 15px; }}
    .subtitle {{ font-weight: 600; }}
    .name {{ text-anchor: end; }}
    .value {{ font-variant-numeric: tabular-nums; }}
    .ours {{ fill: #2f6fd0; }}
    .other {{ fill: #9aa4b0; }}
    @media (prefers-color-scheme: dark) {{
      text {{ fill: #e6edf3; }}
      .ours {{ fill: #5b9bf5; }}
      .other {{ fill: #6b7683; }}
    }}
  </style>
{}</svg>
"#,
            self.svg
        )
    }
}
