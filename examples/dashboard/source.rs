use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use checkpoint_store::postgres::{self, Client, Config, NoTls, Row};
use checkpoint_store::r2d2::{ManageConnection, Pool};
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, Error, MemoryCheckpointStore, PostgresCheckpointStore};

/// How long a reading waits for a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an unresponsive server goes unnoticed.
const UNRESPONSIVE: Duration = Duration::from_secs(6);

/// Where checkpoints and stream head come from.
pub(crate) enum Source {
    Demo,
    Postgres { config: Box<Config>, head_query: String },
}

/// A store, and the stream whose projections it holds.
pub(crate) struct Opened {
    pub(crate) store: Box<dyn CheckpointStore>,
    pub(crate) stream: Box<dyn Fn() -> checkpoint_store::Result<Stream> + Send + Sync>,
}

/// The end of the stream, and the time on the store's clock.
pub(crate) struct Stream {
    pub(crate) heads: Heads,
    pub(crate) now: SystemTime,
}

/// The offset of the last event, of all projections or of each.
pub(crate) enum Heads {
    All(i64),
    Each(HashMap<String, i64>),
}

impl Heads {
    /// 0, as for an empty stream, when the projection has none.
    pub(crate) fn of(&self, projection: &str) -> i64 {
        match self {
            Self::All(head) => *head,
            Self::Each(heads) => heads.get(projection).copied().unwrap_or(0),
        }
    }

    /// The projections that have a head of their own.
    pub(crate) fn projections(&self) -> impl Iterator<Item = &str> {
        let each = if let Self::Each(heads) = self { Some(heads.keys()) } else { None };
        each.into_iter().flatten().map(String::as_str)
    }
}

impl Source {
    pub(crate) fn postgres(url: &str, head_query: &str) -> anyhow::Result<Self> {
        // Only the kind of error is told: the details may quote a piece of the password.
        let mut config: Config =
            url.parse().map_err(|error| anyhow!("DATABASE_URL cannot be read: {error}"))?;
        config
            .connect_timeout(CONNECTION_TIMEOUT)
            .tcp_user_timeout(UNRESPONSIVE)
            .keepalives_idle(UNRESPONSIVE / 2)
            .keepalives_interval(UNRESPONSIVE / 6)
            .keepalives_retries(3);
        let head_query = head_query.trim().trim_end_matches(';').to_owned();
        Ok(Self::Postgres { config: Box::new(config), head_query })
    }

    /// Connects to nothing yet, so that a dashboard can start before its database.
    pub(crate) fn open(self) -> checkpoint_store::Result<Opened> {
        match self {
            Self::Demo => demo(),
            Self::Postgres { config, head_query } => Ok(in_postgres(*config, head_query)),
        }
    }
}

fn in_postgres(config: Config, head_query: String) -> Opened {
    // The store replaces a dead connection by itself. The head query leaves that to the pool.
    let pool = Pool::builder()
        .max_size(1)
        .min_idle(Some(0))
        .connection_timeout(CONNECTION_TIMEOUT)
        .test_on_check_out(true)
        .build_unchecked(Connector(PostgresConnectionManager::new(config, NoTls)));
    let store = PostgresCheckpointStore::new(pool.clone());
    let sql = OnceLock::new();
    let stream = move || {
        let mut client = pool.get().map_err(|timeout| Error::unavailable("connection", timeout))?;
        let read = |client: &mut Client| {
            if sql.get().is_none() {
                let _ = sql.set(stream_query(client, &head_query)?);
            }
            let sql = sql.get().map_or("", String::as_str);
            read_stream(&client.query_typed(sql, &[])?)
        };
        read(&mut client).map_err(|error| Error::backend("head query", error))
    };
    Opened { store: Box::new(store), stream: Box::new(stream) }
}

/// Asks how many columns the head query has, and returns a query for clock and heads.
///
/// The query becomes a subquery, so it can be any expression, and PostgreSQL says what is wrong with
/// any other. The line break ends a comment.
fn stream_query(client: &mut Client, head_query: &str) -> Result<String, postgres::Error> {
    let columns = format!(
        "SELECT heads.* FROM (VALUES (1)) AS one LEFT JOIN (\n{head_query}\n) AS heads ON false"
    );
    let columns = client.query_typed(&columns, &[])?;
    Ok(match columns.first().map(Row::len) {
        Some(2) => format!(
            "SELECT clock_timestamp(), heads.head::bigint, heads.projection::text
             FROM (VALUES (1)) AS one LEFT JOIN (\n{head_query}\n) AS heads (projection, head) ON true"
        ),
        _ => format!("SELECT clock_timestamp(), (\n{head_query}\n)::bigint"),
    })
}

fn read_stream(rows: &[Row]) -> Result<Stream, postgres::Error> {
    let now = rows[0].try_get(0)?;
    let head = |row: &Row| row.try_get::<_, Option<i64>>(1).map(Option::unwrap_or_default);
    if rows[0].len() == 2 {
        return Ok(Stream { heads: Heads::All(head(&rows[0])?), now });
    }
    let mut heads = HashMap::new();
    for row in rows {
        if let Some(projection) = row.try_get(2)? {
            heads.insert(projection, head(row)?);
        }
    }
    Ok(Stream { heads: Heads::Each(heads), now })
}

/// Connects, and says in full why it cannot: r2d2 keeps an error's message, not its causes.
struct Connector(PostgresConnectionManager<NoTls>);

impl ManageConnection for Connector {
    type Connection = Client;
    type Error = InFull;

    fn connect(&self) -> Result<Client, InFull> {
        self.0.connect().map_err(|error| InFull(error.into()))
    }

    fn is_valid(&self, client: &mut Client) -> Result<(), InFull> {
        self.0.is_valid(client).map_err(|error| InFull(error.into()))
    }

    fn has_broken(&self, client: &mut Client) -> bool {
        self.0.has_broken(client)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
struct InFull(anyhow::Error);

/// A stream that grows, and projections in every state of health.
fn demo() -> checkpoint_store::Result<Opened> {
    const BEAT: Duration = Duration::from_millis(500);

    let store = MemoryCheckpointStore::new();
    let head = Arc::new(AtomicI64::new(0));
    let beat = {
        let (store, head) = (store.clone(), Arc::clone(&head));
        move |beat: i64| {
            let last_event = 12_000 + 7 * beat;
            head.store(last_event, Ordering::SeqCst);
            let mut saves = vec![
                ("order_summary", last_event),
                ("search_index", last_event - 40 - 3 * (beat % 20)),
                ("customer_balances", last_event + 250),
            ];
            if beat % 20 == 0 {
                saves.push(("sales_report", last_event - 1_500));
            }
            store.save_many(&saves)
        }
    };
    beat(0)?;
    thread::spawn(move || {
        for next in 1.. {
            thread::sleep(BEAT);
            if beat(next).is_err() {
                break;
            }
        }
    });
    let stream = move || {
        let heads = Heads::All(head.load(Ordering::SeqCst));
        Ok(Stream { heads, now: SystemTime::now() })
    };
    Ok(Opened { store: Box::new(store), stream: Box::new(stream) })
}
