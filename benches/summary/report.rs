use std::fs;
use std::process::Command;

use crate::paired::{Measured, Spread};
use crate::support::{DURABLE, only_a_test};

/// What the machine is, for those who compare with another.
pub(crate) fn print_machine() {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let kernel = said(Command::new("uname").arg("-sr"));
    let rustc = said(Command::new("rustc").arg("--version"));
    let version = DURABLE.client().query_one("SHOW server_version", &[]).expect("its version");
    println!(
        "{cores} cores, {}; {kernel}; PostgreSQL {} on loopback; {rustc}",
        model.unwrap_or("of an unknown model"),
        version.get::<_, &str>(0)
    );
    println!();
}

fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).trim().to_owned()
}

/// What a ratio has to be. It is no column of the table: a miss is told beside it, to whoever works on
/// the crate.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
    None,
}

/// The head of the table of ratios, which is printed a line at a time, because a run takes minutes.
pub(crate) fn print_head() {
    println!("| What | Measured | Half of all rounds | Medians |");
    println!("|---|---:|---:|---|");
}

/// How many times as long `one` takes as `other`.
pub(crate) fn print_time(
    what: &str,
    target: Target,
    measured: &Measured,
    (one, other): (&str, &str),
) {
    let medians = [one, other].map(|name| duration(measured.seconds(name))).join(" / ");
    print_line(what, target, measured.ratio(one, other), &medians);
}

/// How many times as much `one` gets done as `other`; `count` is what one turn did.
pub(crate) fn print_throughput(
    what: &str,
    target: Target,
    measured: &Measured,
    (one, other): (&str, &str),
    count: usize,
) {
    let rate = |name| format!("{}/s", thousands(count as f64 / measured.seconds(name)));
    let medians = [one, other].map(rate).join(" / ");
    print_line(what, target, measured.ratio(other, one), &medians);
}

fn print_line(what: &str, target: Target, ratio: Spread, medians: &str) {
    let Spread { median, low, high } = ratio;
    let printed = (median * 100.0).round() / 100.0;
    println!("| {what} | {median:.2} | {low:.2} – {high:.2} | {medians} |");
    let wanted = match target {
        Target::AtLeast(least) if printed < least => format!("at least {least}"),
        Target::AtMost(most) if printed > most => format!("at most {most}"),
        _ => return,
    };
    if !only_a_test() {
        eprintln!("missed: {what} is {printed}, and was to be {wanted}");
    }
}

pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        ..1e-5 => format!("{:.0} ns", seconds * 1e9),
        ..1e-2 => format!("{:.0} µs", seconds * 1e6),
        _ => format!("{:.0} ms", seconds * 1e3),
    }
}

/// Three significant digits, in groups: `16,700`.
pub(crate) fn thousands(number: f64) -> String {
    let magnitude = 10_f64.powf((number.max(1.0).log10().floor() - 2.0).max(0.0));
    let digits = format!("{:.0}", (number / magnitude).round() * magnitude);
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
