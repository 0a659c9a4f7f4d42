use std::env;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use checkpoint_store::{HealthCheck, validate_projection};
use clap::{Parser, value_parser};

use crate::board::View;
use crate::source::Source;

/// Shows how far each projection is behind its stream
#[derive(Parser)]
#[command(name = "dashboard")]
struct Arguments {
    /// A query for the offset of the last event, such as 'SELECT max(id) FROM events', or for one of
    /// each projection: two columns, projection and offset; none or NULL is an empty stream; needed
    /// with `DATABASE_URL`
    #[arg(long, value_name = "SQL")]
    head_query: Option<String>,

    /// Show this projection even before its first save; repeatable
    #[arg(long = "projection", value_name = "NAME")]
    projections: Vec<String>,

    /// Show this projection, and leave it out of /health: one that is abandoned or being rebuilt;
    /// repeatable
    #[arg(long = "ignore", value_name = "NAME")]
    ignored: Vec<String>,

    /// The lag from which on a projection is unhealthy
    #[arg(long, value_name = "EVENTS", default_value_t = 1_000, value_parser = value_parser!(i64).range(1..))]
    critical_lag: i64,

    /// A projection that lags and has not saved for longer than this is unhealthy too
    /// [default: off]
    #[arg(long, value_name = "SECONDS")]
    stalled_after: Option<NonZeroU64>,

    /// Where to serve; port 0 takes a free one, and the first line of output names it
    /// [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,

    /// Ask for each page once, print the answers and exit; on a free port unless --listen names one
    #[arg(long)]
    check: bool,
}

pub(crate) struct Options {
    pub(crate) listen: SocketAddr,
    pub(crate) check: bool,
    pub(crate) source: Source,
    pub(crate) view: View,
}

impl Options {
    pub(crate) fn parse() -> Result<Self> {
        let arguments = Arguments::parse();
        let source = source(arguments.head_query)?;
        let mut names = arguments.projections.iter().chain(&arguments.ignored);
        names.try_for_each(|name| validate_projection(name))?;
        let mut health = HealthCheck::new().critical_lag(arguments.critical_lag);
        if let Some(seconds) = arguments.stalled_after {
            health = health.stalled_after(Duration::from_secs(seconds.get()));
        }
        let usual_port = if arguments.check { 0 } else { 8080 };
        Ok(Self {
            listen: arguments.listen.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, usual_port).into()),
            check: arguments.check,
            source,
            view: View { projections: arguments.projections, ignored: arguments.ignored, health },
        })
    }
}

fn source(head_query: Option<String>) -> Result<Source> {
    let database_url = env::var_os("DATABASE_URL").filter(|url| !url.is_empty());
    match (database_url, head_query) {
        (Some(url), Some(query)) => {
            // The message shows no value: there may be a password in it.
            let url = url.to_str().context("DATABASE_URL is not UTF-8")?;
            Source::postgres(url, &query)
        }
        (None, None) => Ok(Source::Demo),
        (Some(_), None) => bail!("DATABASE_URL needs --head-query"),
        (None, Some(_)) => bail!("--head-query needs DATABASE_URL"),
    }
}
