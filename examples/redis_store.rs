//! How to write a store of your own: [`CheckpointStore`] over Redis.
//!
//! ```text
//! export REDIS_URL=redis://127.0.0.1/
//! cargo run --features conformance --example redis_store              # the next few events
//! cargo run --features conformance --example redis_store -- --verify  # tries the store's promises
//! ```
//!
//! A store owes its users what the trait's documentation says. Most of it is in five habits:
//!
//! 1. [`validate_projection`] and [`validate_offset`] come first, so that bad input changes nothing
//!    and every store refuses the same.
//! 2. What has to be atomic is done by the backend, here in a Lua script. A `get` followed by a
//!    `set` is not a compare-and-set.
//! 3. Offsets and names come back as they were given. Lua and JSON keep numbers as doubles, which
//!    are exact up to 2⁵³ only: offsets travel, and are compared, as text.
//! 4. A lost connection is [`Error::Unavailable`], since the outcome of a write is then unknown;
//!    every other failure is [`Error::backend`] with its cause.
//! 5. A test hands an empty store to [`conformance::verify`].
//!
//! # In Redis
//!
//! A projection is a hash, `{prefix}:name`, with the fields `offset` and `updated_at`, in
//! microseconds since 1970 by the clock of Redis, 5.0 or later:
//!
//! ```text
//! 127.0.0.1:6379> HGETALL {checkpoints}:orders
//! 1) "offset"
//! 2) "42"
//! 3) "updated_at"
//! 4) "1767225600000000"
//! ```
//!
//! The braces end the prefix, so whatever the name is made of, a key belongs to one prefix and one
//! projection. They are also a hash tag: a Redis Cluster keeps all keys of a prefix in one slot, and
//! the scripts, which touch no key but those they are given, run there unchanged. The connection is
//! the part to replace: this one speaks to a single server and follows no redirection.
//!
//! # What Redis promises
//!
//! * **Durability** is a setting of the server. A save that was acknowledged survives a crash with
//!   `appendonly yes` and `appendfsync always`; with `everysec`, the default of `appendfsync`, the
//!   last second or two may be lost; without `appendonly`, all since the last snapshot. Replication
//!   is asynchronous: a fail-over may lose the latest saves. Where a save is lost its events are
//!   read again, so the projection has to bear that.
//! * **Memory**: with `maxmemory-policy allkeys-*` Redis evicts checkpoints when memory is short,
//!   and their projections start from zero. Use `noeviction`, the default, or a `volatile-*` policy.
//! * **Transactions** end at Redis. A read model in another database cannot be committed together
//!   with its checkpoint here.
//! * **`all`** walks over every key of the database without blocking it, and then reads the
//!   checkpoints it came across at one moment. One that is created or deleted meanwhile may be in
//!   the list or not.

use std::collections::BTreeSet;
use std::env;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use checkpoint_store::{
    Checkpoint, CheckpointStore, Error, Result, conformance, validate_advance, validate_offset,
    validate_projection,
};
use redis::{
    Client, Commands, Connection, RedisError, RedisResult, RetryMethod, ScanOptions, Script,
};

/// How long Redis may take to accept a connection, and then to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many keys SCAN looks at in one go.
const SCAN_COUNT: usize = 1_000;

/// The fields of a hash, and what they hold. A hash without an offset is no checkpoint; one
/// without a time was set by hand.
const FIELDS: [&str; 2] = ["offset", "updated_at"];
type Fields = (Option<i64>, Option<u64>);

/// Begins both scripts. A script reads one clock, however many keys it writes.
const NOW: &str = "
local time = redis.call('TIME')
local now = time[1] .. string.format('%06d', time[2])
";

/// Sets each of KEYS to the offset in ARGV.
///
/// Nothing comes between the commands of a script, but nothing is undone either when one of them
/// fails. So it first reads each key, which fails where a key is not a hash.
const SAVE: &str = "
for _, key in ipairs(KEYS) do
    redis.call('HLEN', key)
end
for i, key in ipairs(KEYS) do
    redis.call('HSET', key, 'offset', ARGV[i], 'updated_at', now)
end
";

/// Moves KEYS[1] from the offset ARGV[1] to ARGV[2], or answers with the offset it found instead.
const ADVANCE: &str = "
local found = redis.call('HGET', KEYS[1], 'offset') or '0'
if found ~= ARGV[1] then
    return found
end
redis.call('HSET', KEYS[1], 'offset', ARGV[2], 'updated_at', now)
";

/// Keeps checkpoints in Redis.
///
/// Threads share one connection and take turns. Redis runs one command at a time anyway, so a pool
/// would only hide the time on the network, and a projection saves rarely. Should they queue up,
/// give each thread a store of its own: what has to be atomic is so among processes.
pub struct RedisCheckpointStore {
    client: Client,
    /// Absent at first, while it is in use, and after any error: whatever is wrong with a
    /// connection, the next call does not inherit it.
    connection: Mutex<Option<Connection>>,
    /// What every key begins with; the name follows.
    key_prefix: String,
    save: Script,
    advance: Script,
}

/// What to do when a connection that worked before turns out to be lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfLost {
    /// Go on with a fresh one: doing it twice leaves the same behind as once.
    Repeat,
    /// Say so: it may have been done.
    GiveUp,
}

impl RedisCheckpointStore {
    /// Connects to `redis://[user:password@]host[:port][/db]` or `redis+unix:///path`; several sets
    /// of checkpoints live side by side under different prefixes.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] if nothing answers at the URL; [`Error::Backend`] if the prefix is empty or
    /// contains a brace, the URL cannot be read, or the login is refused.
    pub fn connect(url: &str, prefix: &str) -> Result<Self> {
        if prefix.is_empty() || prefix.contains(['{', '}']) {
            return Err(Error::backend("connect", "a key prefix is not empty and has no braces"));
        }
        let store = Self {
            client: Client::open(url).map_err(|cause| failure("connect", cause))?,
            connection: Mutex::new(None),
            key_prefix: format!("{{{prefix}}}:"),
            save: Script::new(&format!("{NOW}{SAVE}")),
            advance: Script::new(&format!("{NOW}{ADVANCE}")),
        };
        store.run("connect", IfLost::Repeat, Connection::ping::<()>)?;
        Ok(store)
    }

    /// Does one operation on the connection, or on a fresh one where there is none.
    fn run<T>(
        &self,
        operation: &'static str,
        if_lost: IfLost,
        work: impl Fn(&mut Connection) -> RedisResult<T>,
    ) -> Result<T> {
        // A thread that panicked has left no connection behind, so poison does no harm.
        let mut slot = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = slot.take();
        let may_repeat = kept.is_some() && if_lost == IfLost::Repeat;
        let mut attempt = |kept: Option<Connection>| -> RedisResult<T> {
            let mut connection = kept.map_or_else(|| self.open(), Ok)?;
            let answer = work(&mut connection)?;
            *slot = Some(connection);
            Ok(answer)
        };
        let outcome = match attempt(kept) {
            // Not after a time-out: Redis may still be about to do it, after a later save.
            Err(cause) if may_repeat && cause.is_connection_dropped() => attempt(None),
            outcome => outcome,
        };
        outcome.map_err(|cause| failure(operation, cause))
    }

    fn open(&self) -> RedisResult<Connection> {
        let connection = self.client.get_connection_with_timeout(PATIENCE)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.set_write_timeout(Some(PATIENCE))?;
        Ok(connection)
    }

    fn key(&self, projection: &str) -> String {
        format!("{}{projection}", self.key_prefix)
    }

    /// SCAN may return a key more than once. A set of strings is ordered by their bytes.
    fn projections(&self, connection: &mut Connection) -> RedisResult<BTreeSet<String>> {
        let of_this_prefix = ScanOptions::default()
            .with_pattern(format!("{}*", escape_glob(&self.key_prefix)))
            .with_count(SCAN_COUNT);
        connection
            .scan_options::<String>(of_this_prefix)?
            .map(|key| Ok(key?.split_off(self.key_prefix.len())))
            .collect()
    }
}

impl CheckpointStore for RedisCheckpointStore {
    fn find(&self, projection: &str) -> Result<Option<Checkpoint>> {
        validate_projection(projection)?;
        let key = self.key(projection);
        let fields =
            self.run("find", IfLost::Repeat, |connection| connection.hmget(&key, &FIELDS))?;
        Ok(checkpoint(projection, fields))
    }

    fn all(&self) -> Result<Vec<Checkpoint>> {
        self.run("all", IfLost::Repeat, |connection| {
            let projections = self.projections(connection)?;
            let mut read = redis::pipe();
            read.atomic();
            for projection in &projections {
                read.hmget(self.key(projection), &FIELDS);
            }
            let fields: Vec<Fields> = read.query(connection)?;
            let found = projections.iter().zip(fields);
            // What was deleted since SCAN has no fields, and is left out.
            Ok(found.filter_map(|(projection, fields)| checkpoint(projection, fields)).collect())
        })
    }

    fn save(&self, projection: &str, offset: i64) -> Result<()> {
        validate_projection(projection)?;
        validate_offset(offset)?;
        let mut save = self.save.key(self.key(projection));
        save.arg(offset);
        self.run("save", IfLost::Repeat, |connection| save.invoke(connection))
    }

    fn advance(&self, projection: &str, from: i64, to: i64) -> Result<()> {
        validate_advance(projection, from, to)?;
        let mut advance = self.advance.key(self.key(projection));
        advance.arg(from).arg(to);
        // The second time it would run into what it did the first time: a Conflict with itself.
        match self.run("advance", IfLost::GiveUp, |connection| advance.invoke(connection))? {
            None => Ok(()),
            Some(found) => Err(Error::conflict(projection, from, found)),
        }
    }

    /// Leaves alone what others have put under the key, as DEL would not. When the connection was
    /// lost on the way, the answer may be `false` though this very call has deleted it.
    fn delete(&self, projection: &str) -> Result<bool> {
        validate_projection(projection)?;
        let key = self.key(projection);
        let deleted: usize =
            self.run("delete", IfLost::Repeat, |connection| connection.hdel(&key, &FIELDS))?;
        Ok(deleted > 0)
    }

    /// All or nothing, unlike the provided one.
    fn save_many(&self, checkpoints: &[(&str, i64)]) -> Result<()> {
        let mut save = self.save.prepare_invoke();
        for &(projection, offset) in checkpoints {
            validate_projection(projection)?;
            validate_offset(offset)?;
            save.key(self.key(projection)).arg(offset);
        }
        self.run("save_many", IfLost::Repeat, |connection| save.invoke(connection))
    }
}

fn checkpoint(projection: &str, (offset, updated_at): Fields) -> Option<Checkpoint> {
    let updated_at = UNIX_EPOCH + Duration::from_micros(updated_at.unwrap_or(0));
    Some(Checkpoint::new(projection, offset?, updated_at))
}

/// The pattern that matches this text and nothing else.
fn escape_glob(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// What the caller sees: unavailable where the connection failed, or where Redis itself says to
/// come back later, while it loads its data, say.
fn failure(operation: &'static str, cause: RedisError) -> Error {
    if cause.is_io_error() || matches!(cause.retry_method(), RetryMethod::WaitAndRetry) {
        Error::unavailable(operation, cause)
    } else {
        Error::backend(operation, cause)
    }
}

fn main() -> ExitCode {
    let Ok(url) = env::var("REDIS_URL") else {
        eprintln!("error: REDIS_URL does not say which Redis to use");
        return ExitCode::FAILURE;
    };
    let outcome = match env::args().nth(1).as_deref() {
        None => project(&url),
        Some("--verify") => verify_store(&url),
        Some(other) => {
            eprintln!("error: {other:?} is not --verify");
            return ExitCode::FAILURE;
        }
    };
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    eprintln!("error: {}", error.report());
    ExitCode::FAILURE
}

/// Tries every promise of a store, under a prefix that nobody has used.
fn verify_store(url: &str) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let prefix = format!("redis_store verify {}", now.as_nanos());
    conformance::verify(&RedisCheckpointStore::connect(url, &prefix)?);
    println!("the store keeps every promise");
    Ok(())
}

/// Handles the next events of a stream, and remembers how far it came.
fn project(url: &str) -> Result<()> {
    const PROJECTION: &str = "order-log";
    const EVENTS: [&str; 7] =
        ["placed", "paid", "packed", "shipped", "delivered", "returned", "refunded"];
    const EVENTS_PER_RUN: usize = 3;

    let store = RedisCheckpointStore::connect(url, "redis_store example")?;
    let mut checkpoint = store.get(PROJECTION)?;
    println!("{PROJECTION} resumes after event {checkpoint}");
    let resumed_at = checkpoint;
    let new = (1..).zip(EVENTS).filter(|&(offset, _)| offset > resumed_at);
    for (offset, event) in new.take(EVENTS_PER_RUN) {
        println!("event {offset}: the order was {event}");
        store.advance(PROJECTION, checkpoint, offset)?;
        checkpoint = offset;
    }
    println!("{PROJECTION} stands at event {checkpoint} of {}", EVENTS.len());
    Ok(())
}
