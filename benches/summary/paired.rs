use std::time::{Duration, Instant};

/// Something that is measured: does its work so many times, and says how long that took.
pub(crate) struct Candidate<'a> {
    name: &'static str,
    times: u64,
    run: Box<dyn FnMut(u64) -> Duration + 'a>,
}

impl<'a> Candidate<'a> {
    /// What times itself, because it runs in threads or in another process.
    pub(crate) fn timed(
        name: &'static str,
        times: u64,
        run: impl FnMut(u64) -> Duration + 'a,
    ) -> Self {
        Self { name, times, run: Box::new(run) }
    }

    pub(crate) fn new(name: &'static str, times: u64, mut run: impl FnMut() + 'a) -> Self {
        Self::timed(name, times, move |times| {
            let begun = Instant::now();
            for _ in 0..times {
                run();
            }
            begun.elapsed()
        })
    }
}

/// What was measured side by side: a figure a candidate and round, in seconds.
pub(crate) struct Measured {
    rounds: Vec<(&'static str, Vec<f64>)>,
}

/// Lets the candidates take turns, a short while each, so that what the machine does meanwhile hits
/// all of them alike.
pub(crate) fn side_by_side(rounds: usize, mut candidates: Vec<Candidate<'_>>) -> Measured {
    for Candidate { times, run, .. } in &mut candidates {
        run(*times); // to warm up
    }
    let mut measured: Vec<_> =
        candidates.iter().map(|candidate| (candidate.name, Vec::with_capacity(rounds))).collect();
    let count = candidates.len();
    for round in 0..rounds {
        for turn in 0..count {
            // Who follows whom changes too.
            let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
            let index = (round / 2 + turn) % count;
            let Candidate { times, run, .. } = &mut candidates[index];
            measured[index].1.push(run(*times).as_secs_f64() / *times as f64);
        }
    }
    Measured { rounds: measured }
}

/// The same, with the candidates made anew several times: as long as a connection lives, its process
/// may be unlucky with its place among the others.
pub(crate) fn side_by_side_anew<'a>(
    rounds: usize,
    candidates: impl Fn() -> Vec<Candidate<'a>>,
) -> Measured {
    const TIMES: usize = 50;
    let mut measured = side_by_side(rounds.div_ceil(TIMES), candidates());
    for _ in 1..TIMES.min(rounds) {
        let more = side_by_side(rounds.div_ceil(TIMES), candidates()).rounds;
        for ((_, figures), (_, more)) in measured.rounds.iter_mut().zip(more) {
            figures.extend(more);
        }
    }
    measured
}

impl Measured {
    fn of(&self, name: &str) -> &[f64] {
        let found = self.rounds.iter().find(|(candidate, _)| *candidate == name);
        &found.unwrap_or_else(|| panic!("{name:?} was not measured")).1
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.rounds.iter().any(|(candidate, _)| *candidate == name)
    }

    /// The median, in seconds.
    pub(crate) fn seconds(&self, name: &str) -> f64 {
        Spread::of(self.of(name).to_vec()).median
    }

    /// How many times as long the one takes as the other, by the rounds.
    pub(crate) fn ratio(&self, one: &str, other: &str) -> Spread {
        let rounds = self.of(one).iter().zip(self.of(other));
        Spread::of(rounds.map(|(one, other)| one / other).collect())
    }
}

/// The median, and the range that half of all rounds are in.
#[derive(Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |percent: usize| values[(values.len() - 1) * percent / 100];
        Self { median: at(50), low: at(25), high: at(75) }
    }
}
