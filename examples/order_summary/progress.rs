use indicatif::{ProgressBar, ProgressFinish};

/// A bar on a terminal, and hidden elsewhere.
pub(crate) fn bar(expected: Option<usize>) -> ProgressBar {
    let bar = match expected {
        Some(events) => ProgressBar::new(events as u64),
        None => ProgressBar::new_spinner(),
    };
    bar.with_finish(ProgressFinish::AndClear)
}

/// Where there is no bar a line now and then tells of the progress.
pub(crate) fn advance(bar: &ProgressBar) {
    bar.inc(1);
    let read = bar.position();
    if bar.is_hidden() && read % 10_000 == 0 {
        eprintln!("{read} events read");
    }
}
