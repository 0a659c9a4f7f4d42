use std::error::Error as StdError;
use std::fmt;

#[cfg(feature = "postgres")]
use crate::pg::{postgres_error, transience};

type Source = Box<dyn StdError + Send + Sync>;

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. It says what failed, and on what.
///
/// # Examples
///
/// ```
/// use checkpoint_store::{CheckpointStore, Error, MemoryCheckpointStore};
///
/// let store = MemoryCheckpointStore::new();
/// match store.advance("orders", 7, 8) {
///     Err(Error::Conflict { expected, found, .. }) => assert_eq!((expected, found), (7, 0)),
///     other => panic!("{other:?}"),
/// }
/// ```
///
/// # What to do
///
/// | Variant | What to do |
/// |---|---|
/// | [`InvalidProjection`](Error::InvalidProjection), [`InvalidOffset`](Error::InvalidOffset), [`InvalidIdentifier`](Error::InvalidIdentifier) | Fix the caller. Nothing was sent and nothing has changed. |
/// | [`Conflict`](Error::Conflict) | Roll back: another worker has moved the checkpoint. Stop, or read the offset again. |
/// | [`Unavailable`](Error::Unavailable) | If it [is transient](Error::is_transient), retry from the stored offset. Otherwise fix the parameters, such as a wrong password. |
/// | [`Backend`](Error::Backend) | If it [is transient](Error::is_transient), retry in a new transaction. Otherwise fix what the cause names. |
/// | [`IncompatibleTable`](Error::IncompatibleTable) | Fix the table, or configure another name. |
///
/// # Messages and causes
///
/// The message of an error does not repeat its cause. [`report`](Error::report) shows both in one line; the
/// causes are also in the chain of [`source`](std::error::Error::source)s. No message in the chain contains a
/// password or a connection string.
///
/// # Conversions
///
/// With the feature `postgres`, `?` converts a `postgres::Error` of your own statements and an `r2d2::Error` of
/// your own pool. It always converts `Box<dyn Error + Send + Sync>`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No store accepts this projection name; see [`validate_projection`](crate::validate_projection).
    #[error("invalid projection name {}: {reason}", abridged(name))]
    #[non_exhaustive]
    InvalidProjection {
        /// The name as it was given.
        name: String,
        /// Why it was refused.
        reason: &'static str,
    },

    /// The offset is negative, or lower than this operation allows.
    #[error("invalid offset {offset}: {reason}")]
    #[non_exhaustive]
    InvalidOffset {
        /// The offset as it was given.
        offset: i64,
        /// Why it was refused.
        reason: &'static str,
    },

    /// PostgreSQL would refuse or truncate this schema or table name.
    #[error("invalid identifier {}: {reason}", abridged(identifier))]
    #[non_exhaustive]
    InvalidIdentifier {
        /// The identifier as it was given.
        identifier: String,
        /// Why it was refused.
        reason: &'static str,
    },

    /// A compare-and-set did not find the expected offset, and changed nothing.
    #[error(
        "projection {projection:?} is at offset {found}, not at {expected}: another client has moved it"
    )]
    #[non_exhaustive]
    Conflict {
        /// The projection.
        projection: String,
        /// The offset that the caller expected.
        expected: i64,
        /// The stored offset; 0 if there is no checkpoint.
        found: i64,
    },

    /// The table exists, but this crate cannot use it.
    #[error("table {table} cannot hold checkpoints: {reason}")]
    #[non_exhaustive]
    IncompatibleTable {
        /// The table's quoted name.
        table: String,
        /// What is incompatible.
        reason: String,
    },

    /// No connection could be made, or it was lost. If it was lost during a write, the outcome is unknown:
    /// the write was executed completely or not at all.
    #[error("{}{}", unavailable(operation), about(subject.as_deref()))]
    #[non_exhaustive]
    Unavailable {
        /// The operation, as the name of a method such as `save`.
        operation: &'static str,
        /// What it was for, such as the projection and its table.
        subject: Option<String>,
        /// The cause; the `postgres::Error` itself if a connection was lost.
        source: Source,
        /// What [`is_transient`](Error::is_transient) returns.
        transient: bool,
    },

    /// The store refused the operation or failed. Nothing was written.
    #[error("{}{}", failed(operation), about(subject.as_deref()))]
    #[non_exhaustive]
    Backend {
        /// The operation, as the name of a method such as `save`.
        operation: &'static str,
        /// What it was for, such as the projection and its table.
        subject: Option<String>,
        /// The cause; the `postgres::Error` itself if the server reported one.
        source: Source,
        /// What [`is_transient`](Error::is_transient) returns.
        transient: bool,
    },
}

impl Error {
    /// Creates a [`Backend`](Error::Backend) error. For custom stores.
    ///
    /// It is transient if a PostgreSQL error in the chain of causes is.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Error;
    ///
    /// let error = Error::backend("save", std::io::Error::other("disk full"));
    /// assert_eq!(error.to_string(), "save failed");
    /// ```
    pub fn backend(operation: &'static str, source: impl Into<Source>) -> Self {
        let source = source.into();
        let transient = transience(source.as_ref()).unwrap_or(false);
        Self::Backend { operation, subject: None, source, transient }
    }

    /// Creates an [`Unavailable`](Error::Unavailable) error: the store cannot be reached, or the connection
    /// was lost and the outcome of a write is unknown. For custom stores.
    ///
    /// It is transient unless a PostgreSQL error in the chain of causes is not.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Error;
    ///
    /// let error = Error::unavailable("save", std::io::Error::other("connection reset"));
    /// assert_eq!(error.to_string(), "the checkpoint store is not available: save");
    /// assert!(error.is_transient());
    /// ```
    pub fn unavailable(operation: &'static str, source: impl Into<Source>) -> Self {
        let source = source.into();
        let transient = transience(source.as_ref()).unwrap_or(true);
        Self::Unavailable { operation, subject: None, source, transient }
    }

    /// Creates a [`Conflict`](Error::Conflict): a compare-and-set found `found` instead of `expected`. `found`
    /// is 0 if there is no checkpoint. For custom stores.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Error;
    ///
    /// let error = Error::conflict("orders", 7, 9);
    /// assert!(error.is_conflict());
    /// ```
    pub fn conflict(projection: impl Into<String>, expected: i64, found: i64) -> Self {
        Self::Conflict { projection: projection.into(), expected, found }
    }

    /// Returns the SQLSTATE of the first PostgreSQL error in the chain of causes, or `None` if there is none.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use checkpoint_store::postgres::error::SqlState;
    /// # fn f(store: checkpoint_store::PostgresCheckpointStore) -> checkpoint_store::Result<()> {
    /// use checkpoint_store::CheckpointStore;
    ///
    /// if let Err(error) = store.save("orders", 42) {
    ///     if error.sql_state() == Some(&SqlState::DISK_FULL) {
    ///         eprintln!("free some space on the database server");
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "postgres")]
    #[must_use]
    pub fn sql_state(&self) -> Option<&postgres::error::SqlState> {
        postgres_error(self).and_then(postgres::Error::code)
    }

    /// For a call whose earlier attempt may have been executed.
    #[cfg(feature = "postgres")]
    pub(crate) fn with_unknown_outcome(self) -> Self {
        match self {
            Self::Backend { operation, subject, source, transient } => {
                Self::Unavailable { operation, subject, source, transient }
            }
            other => other,
        }
    }

    /// Formats the error and its causes in one line, for a log: `save failed: projection .. in table ..: db
    /// error: ERROR: ..`.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Error;
    ///
    /// let error = Error::backend("save", std::io::Error::other("disk\nfull"));
    /// assert_eq!(error.report().to_string(), "save failed: disk full");
    /// ```
    #[must_use]
    pub fn report(&self) -> impl fmt::Display + use<'_> {
        let mut messages: Vec<_> = causes(self).map(|cause| one_line(&cause.to_string())).collect();
        // Some libraries repeat their cause in their own message.
        messages.dedup_by(|cause, message| message.ends_with(cause.as_str()));
        messages.join(": ")
    }

    /// Returns whether this is a [`Conflict`](Error::Conflict): another worker has moved the checkpoint.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::{CheckpointStore, MemoryCheckpointStore};
    ///
    /// let store = MemoryCheckpointStore::new();
    /// store.save("orders", 5)?;
    /// assert!(store.advance("orders", 4, 6).unwrap_err().is_conflict());
    /// # Ok::<(), checkpoint_store::Error>(())
    /// ```
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict { .. })
    }

    /// Returns whether a retry of the same work in a new transaction may succeed without any other change.
    ///
    /// Retry on a new connection, after a pause. The decision is based on the severity, the SQLSTATE and the
    /// owner of the statement, never on the text of a message.
    ///
    /// | Error | Transient |
    /// |---|---|
    /// | A lost connection, including each FATAL and PANIC whatever its code; a server that cannot be reached. | yes |
    /// | Class 40 (deadlock, serialization failure), class 53 (disk, memory, connections), 55P03 (lock not available), 55006 (object in use), 58000 and 58030 (system error, I/O error). | yes |
    /// | 57014 (canceled) of a write of the store, because it may have waited for a row lock. | yes |
    /// | 25006 (read-only) of a statement of the store, because the next connection may lead to a server that accepts writes. | yes |
    /// | 57014 of a read, 57014 and 25006 of your own statements. | no |
    /// | A refused password, certificate or database. | no |
    /// | Any other ERROR of class 08 or 57, if the connection remains open. | no |
    /// | A [`Conflict`](Error::Conflict), because another worker has done the same work. | no |
    /// | Everything else. | no |
    ///
    /// Some refusals cannot be distinguished from an outage, and are transient:
    ///
    /// * `PgBouncer` reports each refusal, including a wrong password, with the code 08P01.
    /// * pgpool reports XX000 while its server is unavailable, so class XX is transient when connecting.
    /// * With a pool of your own, `r2d2` keeps only the text of the error, so any failure to connect is
    ///   transient.
    ///
    /// # Examples
    ///
    /// ```
    /// use checkpoint_store::Error;
    ///
    /// assert!(Error::unavailable("save", "connection reset").is_transient());
    /// assert!(!Error::backend("save", "disk full").is_transient());
    /// ```
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { transient, .. } | Self::Backend { transient, .. } => *transient,
            _ => false,
        }
    }
}

/// The error and its chain of causes.
pub(crate) fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Whether the cause is transient, if that is known.
#[cfg(not(feature = "postgres"))]
fn transience(_source: &(dyn StdError + 'static)) -> Option<bool> {
    None
}

/// Converts an error of the caller's own code, so that `?` works in a function that returns this crate's
/// [`Result`]. If the box contains an [`Error`], a `postgres::Error` or an `r2d2::Error`, the result is the
/// same as without the box. Otherwise it is a [`Backend`](Error::Backend) error, as from [`Error::backend`].
impl From<Source> for Error {
    fn from(source: Source) -> Self {
        let converted = unboxed::<Self>(source);
        #[cfg(feature = "postgres")]
        let converted =
            converted.or_else(unboxed::<postgres::Error>).or_else(unboxed::<r2d2::Error>);
        converted.unwrap_or_else(|source| Self::backend("apply", source))
    }
}

/// Converts what the box contains, or returns the box.
fn unboxed<E: StdError + Into<Error> + 'static>(source: Source) -> Result<Error, Source> {
    source.downcast::<E>().map(|error| (*error).into())
}

/// The name of the operation in the error of a statement that is the caller's own.
pub(crate) const CALLERS_STATEMENT: &str = "statement";
/// The name of the operation in the error of a pool that is the caller's own.
pub(crate) const CALLERS_POOL: &str = "pool";

fn unavailable(operation: &str) -> String {
    match operation {
        CALLERS_STATEMENT => "the connection was lost during a statement of the caller".to_owned(),
        CALLERS_POOL => "the caller's pool returned no connection".to_owned(),
        _ => format!("the checkpoint store is not available: {operation}"),
    }
}

fn failed(operation: &str) -> String {
    match operation {
        CALLERS_STATEMENT => "a statement of the caller failed".to_owned(),
        _ => format!("{operation} failed"),
    }
}

/// Replaces line breaks and other control characters.
fn one_line(text: &str) -> String {
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    text.split(breaks).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The end of a message: what the operation was for.
fn about(subject: Option<&str>) -> String {
    subject.map_or_else(String::new, |subject| format!(": {subject}"))
}

/// The quoted text, truncated if it is long.
fn abridged(text: &str) -> String {
    const SHOWN: usize = 64;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_truncated_in_the_message_and_complete_in_the_field() {
        let name = "ü".repeat(2_000);
        let error = Error::InvalidProjection { name: name.clone(), reason: "too long" };
        let shown = error.to_string();
        assert!(shown.len() < 250 && shown.contains("4000 bytes"), "{shown}");
        assert!(matches!(error, Error::InvalidProjection { name: kept, .. } if kept == name));
    }

    #[test]
    fn a_report_is_one_line_and_repeats_nothing() {
        #[derive(Debug, thiserror::Error)]
        #[error("db error: {0}")]
        struct Repeats(#[source] std::io::Error);
        let cause = Repeats(std::io::Error::other("ERROR: full\r\n\nHINT:\rempty it"));
        let told = Error::backend("save", cause).report().to_string();
        assert_eq!(told, "save failed: db error: ERROR: full HINT: empty it");
    }

    #[test]
    fn a_cause_is_in_the_source_and_not_in_the_message() {
        let error = Error::backend("save", "disk full");
        assert_eq!(error.to_string(), "save failed");
        assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("disk full"));
    }
}
