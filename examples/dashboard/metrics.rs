use std::fmt::{self, Write};

use crate::board::{Projection, Reading, Snapshot};

/// That of Prometheus' text format.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a scrape gets. While the store does not answer that is the only news: what was known before
/// would look current.
pub(crate) fn text(reading: &Reading) -> String {
    let mut text = String::new();
    write(&mut text, reading.as_ref().as_ref().ok()).expect("a text takes what is written to it");
    text
}

fn write(text: &mut String, snapshot: Option<&Snapshot>) -> fmt::Result {
    let name = "checkpoint_store_up";
    family(text, name, "Whether the checkpoint store and the head query answer.")?;
    writeln!(text, "{name} {}", u8::from(snapshot.is_some()))?;

    let Some(Snapshot { taken_at, projections }) = snapshot else { return Ok(()) };
    let mut gauge = |name, help, value: &dyn Fn(&Projection) -> Option<String>| {
        family(text, name, help)?;
        projections.iter().try_for_each(|projection| {
            let Some(value) = value(projection) else { return Ok(()) };
            let (label, ignored) = (Label(&projection.status.projection), projection.is_ignored);
            writeln!(text, "{name}{{projection=\"{label}\",ignored=\"{ignored}\"}} {value}")
        })
    };
    gauge("projection_checkpoint_offset", "Offset of the last event processed.", &|projection| {
        Some(projection.status.checkpoint.to_string())
    })?;
    gauge("projection_stream_head_offset", "Offset of the stream's last event.", &|projection| {
        Some(projection.status.stream_head.to_string())
    })?;
    gauge("projection_lag_events", "Stream head less checkpoint.", &|projection| {
        Some(projection.status.lag.to_string())
    })?;
    gauge("projection_last_save_age_seconds", "Time since the last save.", &|projection| {
        let age = taken_at.duration_since(projection.status.updated_at?);
        Some(age.unwrap_or_default().as_secs_f64().to_string())
    })
}

fn family(text: &mut String, name: &str, help: &str) -> fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge")
}

/// A label's value, escaped.
struct Label<'a>(&'a str);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            character => f.write_char(character),
        })
    }
}
