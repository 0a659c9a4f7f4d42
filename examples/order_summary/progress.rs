use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on a terminal, a line now and then elsewhere.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    read: u64,
}

impl Progress {
    pub(crate) fn new(expected: Option<usize>) -> Self {
        let bar = io::stderr().is_terminal().then(|| match expected {
            Some(events) => ProgressBar::new(events as u64).with_style(
                ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} events, {eta}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            ),
            None => ProgressBar::new_spinner(),
        });
        Self { bar, read: 0 }
    }

    pub(crate) fn add_one(&mut self) {
        self.read += 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if self.read % 10_000 == 0 => eprintln!("{} events read", self.read),
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
