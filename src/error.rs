use std::error::Error as StdError;
use std::fmt;

#[cfg(feature = "postgres")]
use crate::pg::{CALLERS_POOL, CALLERS_STATEMENT, postgres_error, transience};

type Source = Box<dyn StdError + Send + Sync>;

/// What every fallible operation of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and on what.
///
/// The message of an error never repeats its cause: print the whole chain of
/// [`source`](std::error::Error::source)s to see both. No message in the chain holds a password or
/// a connection string.
///
/// | Variant | What to do |
/// |---|---|
/// | [`InvalidProjection`](Error::InvalidProjection), [`InvalidOffset`](Error::InvalidOffset), [`InvalidIdentifier`](Error::InvalidIdentifier) | fix the caller; nothing was sent and nothing has changed |
/// | [`Conflict`](Error::Conflict) | roll back; another worker has moved the checkpoint: stop, or read the offset again |
/// | [`Unavailable`](Error::Unavailable) | retry from the offset that is stored if [`is_transient`](Error::is_transient); otherwise fix the parameters, a wrong password say |
/// | [`Backend`](Error::Backend) | retry in a new transaction if [`is_transient`](Error::is_transient), otherwise fix what the cause names |
/// | [`IncompatibleTable`](Error::IncompatibleTable) | fix the table, or configure another name |
///
/// With the feature `postgres` a `postgres::Error`, of a statement or a commit of your own, becomes
/// one of these through `?`.
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
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The projection's name is one that no store takes; see
    /// [`validate_projection`](crate::validate_projection).
    #[error("invalid projection name {}: {reason}", abridged(name))]
    #[non_exhaustive]
    InvalidProjection {
        /// The name as it was given.
        name: String,
        /// Why it is refused.
        reason: &'static str,
    },

    /// The offset cannot be stored, or not at this point.
    #[error("invalid offset {offset}: {reason}")]
    #[non_exhaustive]
    InvalidOffset {
        /// The offset as it was given.
        offset: i64,
        /// Why it is refused.
        reason: &'static str,
    },

    /// A schema or table name that PostgreSQL would refuse or cut short.
    #[error("invalid identifier {}: {reason}", abridged(identifier))]
    #[non_exhaustive]
    InvalidIdentifier {
        /// The identifier as it was given.
        identifier: String,
        /// Why it is refused.
        reason: &'static str,
    },

    /// A compare-and-set found another offset than the expected one, and changed nothing.
    #[error("projection {projection:?} is at offset {found}, not at {expected} as expected")]
    #[non_exhaustive]
    Conflict {
        /// The projection.
        projection: String,
        /// The offset that the caller expected.
        expected: i64,
        /// The offset that is stored; 0 when there is none.
        found: i64,
    },

    /// The table is there, but is not one that this crate can use.
    #[error("table {table} cannot hold checkpoints: {reason}")]
    #[non_exhaustive]
    IncompatibleTable {
        /// The table's quoted name.
        table: String,
        /// What does not fit.
        reason: String,
    },

    /// There is no connection, or it was lost. If a write was under way its outcome is unknown:
    /// it happened as a whole or not at all.
    #[error("{}{}", unavailable(operation), about(subject.as_deref()))]
    #[non_exhaustive]
    Unavailable {
        /// What was tried, as a method's name: `save`, say.
        operation: &'static str,
        /// On what: the projection and its table, say.
        subject: Option<String>,
        /// The cause: the `postgres::Error` itself, where there was one connection to lose.
        source: Source,
        /// What [`is_transient`](Error::is_transient) returns.
        transient: bool,
    },

    /// The store refused or failed, and has written nothing.
    #[error("{}{}", failed(operation), about(subject.as_deref()))]
    #[non_exhaustive]
    Backend {
        /// What was tried, as a method's name: `save`, say.
        operation: &'static str,
        /// On what: the projection and its table, say.
        subject: Option<String>,
        /// The cause: the `postgres::Error` itself, where it is one.
        source: Source,
        /// What [`is_transient`](Error::is_transient) returns.
        transient: bool,
    },
}

impl Error {
    /// Wraps the failure of a store's own backend. For custom stores.
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

    /// Says that a store cannot be reached, or was lost while it was at work, so that the outcome of
    /// a write is unknown. For custom stores.
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

    /// A compare-and-set that found `found` instead of `expected`, 0 if there is no checkpoint. For
    /// custom stores.
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

    /// The SQLSTATE of the PostgreSQL error in the chain of causes, if there is one.
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

    /// For a call of which an earlier attempt may have been executed: this error does not tell.
    #[cfg(feature = "postgres")]
    pub(crate) fn with_unknown_outcome(self) -> Self {
        match self {
            Self::Backend { operation, subject, source, transient } => {
                Self::Unavailable { operation, subject, source, transient }
            }
            other => other,
        }
    }

    /// The error and its causes in one line, for a log: `save failed: projection .. in table ..: db
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
        Report(self)
    }

    /// Whether this is a [`Conflict`](Error::Conflict): another worker has moved the checkpoint.
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

    /// Whether the same work is worth another try in a new transaction, without fixing anything
    /// first. It is decided on severity, SQLSTATE and whose statement it was, never on a message.
    ///
    /// `true`:
    ///
    /// * a lost connection, which is what FATAL and PANIC are whatever their code, and a server that
    ///   cannot be reached;
    /// * class 40 (deadlocks, serialization failures) and class 53 (disk, memory, connections);
    /// * 55P03 and 55006 (a lock that was not to be had, an object in use), 58000 and 58030 (an error
    ///   of the system or its disk);
    /// * of the store's own statements 57014, because they only ever wait for a row, and 25006, for
    ///   the next connection may lead to a server that takes writes.
    ///
    /// `false`: everything else. That includes a refused password, certificate or database; an
    /// ERROR of class 08 or 57 on a connection that lives; and 57014 and 25006 of the caller's own
    /// statements. A [`Conflict`](Error::Conflict) is not transient either: the same work has been
    /// done by somebody else.
    ///
    /// Take a new connection for the next try: one that was lost stays lost.
    ///
    /// Some refusals cannot be told from an outage, and so look transient: all that `PgBouncer`
    /// refuses, for it gives everything, a wrong password too, the code 08P01; those of class XX, for
    /// pgpool says XX000 while its server is away; and what a pool of the caller's own cannot connect
    /// to, because `r2d2` keeps of the cause no more than a text.
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

struct Report<'a>(&'a Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut links = std::iter::successors(Some(self.0 as &dyn StdError), |&link| link.source());
        let mut last = String::new();
        links.try_for_each(|link| {
            let message = one_line(&link.to_string());
            // Some libraries repeat their cause in their own message.
            if last.ends_with(&message) {
                return Ok(());
            }
            let separator = if last.is_empty() { "" } else { ": " };
            write!(f, "{separator}{message}")?;
            last = message;
            Ok(())
        })
    }
}

/// What the cause itself says about trying again, if it says anything.
#[cfg(not(feature = "postgres"))]
fn transience(_source: &(dyn StdError + 'static)) -> Option<bool> {
    None
}

/// What the caller's own code runs into, so that `?` carries it out of a function that returns this
/// crate's [`Result`]. It is a [`Backend`](Error::Backend), as [`Error::backend`] makes it, unless it is
/// an [`Error`] already, or becomes another one through `?`.
impl From<Source> for Error {
    fn from(source: Source) -> Self {
        let source = match source.downcast::<Self>() {
            Ok(error) => return *error,
            Err(source) => source,
        };
        #[cfg(feature = "postgres")]
        let source = match source.downcast::<postgres::Error>() {
            Ok(error) => return (*error).into(),
            Err(source) => source,
        };
        #[cfg(feature = "postgres")]
        let source = match source.downcast::<r2d2::Error>() {
            Ok(error) => return (*error).into(),
            Err(source) => source,
        };
        Self::backend("apply", source)
    }
}

#[cfg(not(feature = "postgres"))]
const CALLERS_STATEMENT: &str = "statement";
#[cfg(not(feature = "postgres"))]
const CALLERS_POOL: &str = "pool";

fn unavailable(operation: &str) -> String {
    match operation {
        CALLERS_STATEMENT => "the connection was lost during a statement of the caller".to_owned(),
        CALLERS_POOL => "the caller's pool gave no connection".to_owned(),
        _ => format!("the checkpoint store is not available: {operation}"),
    }
}

fn failed(operation: &str) -> String {
    match operation {
        CALLERS_STATEMENT => "a statement of the caller failed".to_owned(),
        _ => format!("{operation} failed"),
    }
}

/// The text without line breaks and other control characters.
fn one_line(text: &str) -> String {
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    text.split(breaks).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The end of a message: what the operation was about.
fn about(subject: Option<&str>) -> String {
    subject.map_or_else(String::new, |subject| format!(": {subject}"))
}

/// The quoted text, cut where it would drown the message.
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
    fn a_long_name_is_cut_in_the_message_and_whole_in_the_field() {
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
