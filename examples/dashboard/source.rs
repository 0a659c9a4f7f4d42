use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use checkpoint_store::postgres::{Client, Config, NoTls};
use checkpoint_store::r2d2::{ManageConnection, Pool};
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, Error, MemoryCheckpointStore, PostgresCheckpointStore};

/// How many connections the dashboard uses at most, however many people look at it.
const CONNECTIONS: u32 = 4;
/// How long a request waits for one of them.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a server that fell silent goes unnoticed.
const SILENCE: Duration = Duration::from_secs(6);

/// Where checkpoints and stream head come from.
pub(crate) enum Source {
    Demo,
    Postgres { config: Box<Config>, head_query: String },
}

/// A store, and the stream whose projections it holds.
pub(crate) struct Opened {
    pub(crate) store: Box<dyn CheckpointStore>,
    pub(crate) head: Box<dyn Fn() -> checkpoint_store::Result<Head> + Send + Sync>,
}

/// The end of the stream, and the time on the store's clock.
pub(crate) struct Head {
    pub(crate) offset: i64,
    pub(crate) now: SystemTime,
}

impl Source {
    pub(crate) fn postgres(url: &str, head_query: &str) -> anyhow::Result<Self> {
        // Only the kind of error is told: the details may quote a piece of the password.
        let mut config: Config =
            url.parse().map_err(|error| anyhow!("DATABASE_URL cannot be read: {error}"))?;
        config
            .connect_timeout(PATIENCE)
            .tcp_user_timeout(SILENCE)
            .keepalives_idle(SILENCE / 2)
            .keepalives_interval(SILENCE / 6)
            .keepalives_retries(3);
        // As a subquery it can be any expression of one value, and PostgreSQL says what is wrong
        // with any other. The line break ends a comment.
        let head_query = head_query.trim().trim_end_matches(';');
        let head_query = format!("SELECT (\n{head_query}\n)::bigint, clock_timestamp()");
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
        .max_size(CONNECTIONS)
        .min_idle(Some(0))
        .connection_timeout(PATIENCE)
        .test_on_check_out(true)
        .build_unchecked(Connector(PostgresConnectionManager::new(config, NoTls)));
    let store = PostgresCheckpointStore::new(pool.clone());
    let head = move || {
        let mut client = pool.get().map_err(|timeout| Error::unavailable("connection", timeout))?;
        client
            .query_typed(&head_query, &[])
            .and_then(|rows| {
                let offset: Option<i64> = rows[0].try_get(0)?;
                Ok(Head { offset: offset.unwrap_or(0), now: rows[0].try_get(1)? })
            })
            .map_err(|error| Error::backend("head query", error))
    };
    Opened { store: Box::new(store), head: Box::new(head) }
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

    let store = Arc::new(MemoryCheckpointStore::new());
    let head = Arc::new(AtomicI64::new(0));
    let beat = {
        let (store, head) = (Arc::clone(&store), Arc::clone(&head));
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
    let head = move || Ok(Head { offset: head.load(Ordering::SeqCst), now: SystemTime::now() });
    Ok(Opened { store: Box::new(store), head: Box::new(head) })
}
