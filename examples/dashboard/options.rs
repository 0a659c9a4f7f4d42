use std::ffi::OsString;
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use checkpoint_store::{HealthCheck, validate_projection};

use crate::Result;
use crate::source::Source;

pub(crate) const USAGE: &str = "\
Shows how far each projection is behind its stream.

Usage: dashboard [OPTIONS]

  --head-query SQL         a query for the offset of the last event, one value;
                           none or NULL is an empty stream. Needed with
                           DATABASE_URL: 'SELECT max(id) FROM events'
  --projection NAME        show this one even before its first save; repeatable
  --critical-lag EVENTS    from this lag on a projection is unhealthy [1000]
  --stalled-after SECONDS  unhealthy is also one that lags and has not saved for
                           longer than this [off]
  --listen ADDRESS         where to serve; port 0 takes a free one, and the first
                           line of output names it [127.0.0.1:8080]
  --check                  ask for each page once, print the answers and exit; on
                           a free port unless --listen names one
  -h, --help               print this

DATABASE_URL in the environment names the PostgreSQL database of the checkpoints,
in table public.projection_checkpoints. Without it a demo runs in memory.
";

pub(crate) struct Options {
    pub(crate) listen: SocketAddr,
    pub(crate) check: bool,
    pub(crate) source: Source,
    pub(crate) projections: Vec<String>,
    pub(crate) health: HealthCheck,
}

impl Options {
    /// `None` stands for a cry for help.
    pub(crate) fn parse(
        arguments: impl IntoIterator<Item = OsString>,
        database_url: Option<OsString>,
    ) -> Result<Option<Self>> {
        let mut arguments = arguments.into_iter();
        let (mut listen, mut check, mut head_query) = (None, false, None);
        let (mut projections, mut health) = (Vec::new(), HealthCheck::new());
        while let Some(argument) = arguments.next() {
            let option = text("an argument", argument)?;
            let mut value = || {
                let value = arguments.next().ok_or_else(|| format!("{option} needs a value"))?;
                text(&option, value)
            };
            match option.as_str() {
                "-h" | "--help" => return Ok(None),
                "--check" => check = true,
                "--listen" => listen = Some(parsed(&option, &value()?)?),
                "--head-query" => head_query = Some(value()?),
                "--critical-lag" => health = health.critical_lag(positive(&option, &value()?)?),
                "--stalled-after" => {
                    let seconds = positive(&option, &value()?)?;
                    health = health.stalled_after(Duration::from_secs(seconds.unsigned_abs()));
                }
                "--projection" => {
                    let name = value()?;
                    validate_projection(&name)?;
                    projections.push(name);
                }
                _ => return Err(format!("unknown argument {option:?}").into()),
            }
        }

        let database_url = database_url.filter(|url| !url.is_empty());
        let source = match (database_url, head_query) {
            (Some(url), Some(query)) => Source::postgres(&text("DATABASE_URL", url)?, &query)?,
            (None, None) => Source::Demo,
            (Some(_), None) => return Err("DATABASE_URL needs --head-query".into()),
            (None, Some(_)) => return Err("--head-query needs DATABASE_URL".into()),
        };
        let usual_port = if check { 0 } else { 8080 };
        let listen = listen.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, usual_port).into());
        Ok(Some(Self { listen, check, source, projections, health }))
    }
}

fn text(what: &str, value: OsString) -> Result<String> {
    value.into_string().map_err(|_| format!("{what} is not UTF-8").into())
}

fn parsed<T: FromStr<Err: Display>>(option: &str, value: &str) -> Result<T> {
    value.parse().map_err(|error| format!("{option} {value:?}: {error}").into())
}

fn positive(option: &str, value: &str) -> Result<i64> {
    match parsed(option, value)? {
        number @ 1.. => Ok(number),
        _ => Err(format!("{option} {value:?}: not above 0").into()),
    }
}
