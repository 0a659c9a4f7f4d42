//! What an error of PostgreSQL means: for the connection, for another attempt, for the caller.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use postgres::error::{Severity, SqlState};

use super::identifier::Table;
use crate::Error;
use crate::error::{CALLERS_POOL, CALLERS_STATEMENT, causes};

/// What went wrong underneath: a `postgres::Error` in most cases.
pub(crate) type Cause = Box<dyn StdError + Send + Sync>;
pub(crate) type Outcome<T> = Result<T, Cause>;

/// What a failed statement has done, and what it says about its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorClass {
    /// The connection is gone, and whether the statement was executed is unknown.
    ConnectionLost,
    /// The connection is gone: the server had ended the idle session before it read the statement.
    IdleSessionEnded,
    /// Nothing was executed: a failed transaction was left open on this connection.
    AbortedTransaction,
    /// Nothing was executed: this connection leads to a server that is read-only.
    ReadOnly,
    /// Nothing has happened: the server rolled it back because of concurrent transactions.
    RolledBack,
    /// Nothing has happened, and another attempt would end the same way.
    Permanent,
}

impl ErrorClass {
    pub(crate) fn of(cause: &(dyn StdError + 'static)) -> Self {
        if cause.is::<Rivals>() {
            return Self::RolledBack;
        }
        let Some(error) = cause.downcast_ref::<postgres::Error>() else { return Self::Permanent };
        match error.code() {
            Some(&SqlState::IDLE_SESSION_TIMEOUT) if is_connection_loss(error) => {
                Self::IdleSessionEnded
            }
            _ if is_connection_loss(error) || is_without_an_answer(error) => Self::ConnectionLost,
            Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => Self::AbortedTransaction,
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Self::ReadOnly,
            Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED) => {
                Self::RolledBack
            }
            _ => Self::Permanent,
        }
    }
}

/// What an operation is about, written down only when it fails.
#[derive(Clone, Copy)]
pub(crate) enum Subject<'a> {
    Projection(&'a str, &'a Table),
    Projections(usize, &'a Table),
    All(&'a Table),
    Pool,
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Projection(name, table) => write!(f, "projection {name:?} in table {table}"),
            Self::Projections(count, table) => write!(f, "{count} checkpoints in table {table}"),
            Self::All(table) => write!(f, "table {table}"),
            Self::Pool => f.write_str("the store's pool"),
        }
    }
}

/// The error of a statement of the store's own.
pub(crate) fn failure(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let source = source.into();
    let class = ErrorClass::of(source.as_ref());
    let code = sql_state(source.as_ref());
    let mut subject = subject.to_string();
    if matches!(class, ErrorClass::ConnectionLost | ErrorClass::IdleSessionEnded)
        || source.is::<OutcomeUnknown>()
    {
        return Error::Unavailable { operation, subject: Some(subject), source, transient: true };
    }
    if code == Some(&SqlState::UNDEFINED_TABLE) {
        subject += ", which does not exist: call `migrate` to create it";
    }
    // A write that was canceled may have waited for a row lock, and can succeed later; a read cannot.
    let may_wait = !["find", "get", "all", "wait_for"].contains(&operation);
    let transient = matches!(class, ErrorClass::RolledBack | ErrorClass::ReadOnly)
        || code.is_some_and(is_shortage_or_rivalry)
        || may_wait && code == Some(&SqlState::QUERY_CANCELED);
    Error::Backend { operation, subject: Some(subject), source, transient }
}

/// The connection was lost while a write was sent, and the row does not tell whether it was executed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the connection was lost during the write, and another client may have written or deleted the \
     checkpoint since, so it is unknown whether the write was executed"
)]
pub(crate) struct OutcomeUnknown;

/// Concurrent transactions have created or deleted the row while a statement looked for it.
#[derive(Debug, thiserror::Error)]
#[error("other clients have created or deleted the checkpoint in the meantime")]
pub(crate) struct Rivals;

/// What the caller's own statements run into, so that `?` carries it out of a function that returns
/// this crate's [`Result`](crate::Result), and [`Error::is_transient`] judges it.
impl From<postgres::Error> for Error {
    fn from(source: postgres::Error) -> Self {
        let lost = is_connection_loss(&source);
        let transient = may_pass(&source);
        let (operation, subject) = (CALLERS_STATEMENT, None);
        let source = source.into();
        if lost {
            Self::Unavailable { operation, subject, source, transient }
        } else {
            Self::Backend { operation, subject, source, transient }
        }
    }
}

/// A pool of the caller's that gave no connection: [`Unavailable`](Error::Unavailable) and transient,
/// because `r2d2` does not say why.
impl From<r2d2::Error> for Error {
    fn from(source: r2d2::Error) -> Self {
        let (operation, subject) = (CALLERS_POOL, None);
        Self::Unavailable { operation, subject, source: source.into(), transient: true }
    }
}

/// What a PostgreSQL error in the chain of a custom store's cause says about trying again, if there
/// is one.
pub(crate) fn transience(cause: &(dyn StdError + 'static)) -> Option<bool> {
    postgres_error(cause).map(may_pass)
}

pub(crate) fn sql_state<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a SqlState> {
    error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code)
}

pub(crate) fn postgres_error<'a>(
    cause: &'a (dyn StdError + 'static),
) -> Option<&'a postgres::Error> {
    find_cause(cause)
}

/// The first error of this type in the chain of causes.
pub(crate) fn find_cause<'a, T: StdError + 'static>(
    cause: &'a (dyn StdError + 'static),
) -> Option<&'a T> {
    causes(cause).find_map(|cause| cause.downcast_ref())
}

/// Whether the error says why: with a message of the server's, or with a finding of the store's own.
/// `postgres` often reports no more than "connection closed" where the server has explained the end.
pub(crate) fn is_explained(error: &Error) -> bool {
    let cause = error.source();
    cause.is_some_and(<dyn StdError>::is::<OutcomeUnknown>)
        || find_cause(error).is_some_and(names_its_cause)
        || postgres_error(error).is_some_and(|error| error.as_db_error().is_some())
}

/// r2d2 appends the cause to the first error after a failed attempt to connect, and to no other.
pub(crate) fn names_its_cause(error: &r2d2::Error) -> bool {
    error.to_string().contains(": ")
}

/// Whether the connection is gone: after FATAL and PANIC whatever their code, and after nothing else
/// that a server says. A function may raise any code on a connection that lives on.
fn is_connection_loss(error: &postgres::Error) -> bool {
    match error.as_db_error() {
        Some(told) => match told.parsed_severity() {
            Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
            // A pooler may leave out the severity that is not translated; its own is English.
            None => matches!(told.severity(), "FATAL" | "PANIC"),
        },
        None => error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<io::Error>),
    }
}

/// An answer that did not come in time, or that is not the one to the request. It is asked only of the
/// store's own statements: the same form has an error in how a caller reads a row.
fn is_without_an_answer(error: &postgres::Error) -> bool {
    error.as_db_error().is_none() && error.source().is_none()
}

/// Whether a statement of the caller's may succeed later as it is.
fn may_pass(error: &postgres::Error) -> bool {
    is_connection_loss(error) || error.code().is_some_and(is_shortage_or_rivalry)
}

/// What others, or the lack of something, have brought about.
fn is_shortage_or_rivalry(code: &SqlState) -> bool {
    const TRANSACTION_ROLLBACK: &str = "40";
    const INSUFFICIENT_RESOURCES: &str = "53";
    let class = |class| code.code().starts_with(class);
    class(TRANSACTION_ROLLBACK)
        || class(INSUFFICIENT_RESOURCES)
        || [
            SqlState::LOCK_NOT_AVAILABLE,
            SqlState::OBJECT_IN_USE,
            SqlState::SYSTEM_ERROR,
            SqlState::IO_ERROR,
        ]
        .contains(code)
}

/// Whether the server or the TLS connector has said no, for a reason that waiting does not change: a
/// password, a database that is not there, a certificate. A time-out, a closed connection and an I/O
/// error are no such answer.
pub(crate) fn is_refused(error: &postgres::Error) -> bool {
    const CONNECTION_EXCEPTION: &str = "08";
    const OPERATOR_INTERVENTION: &str = "57P";
    const INTERNAL_ERROR: &str = "XX";
    if let Some(code) = error.code() {
        // PgBouncer gives all its refusals the code 08P01, a wrong password's too; pgpool says
        // XX000 while the server behind it is away.
        let class = |class| code.code().starts_with(class);
        return !(is_shortage_or_rivalry(code)
            || class(CONNECTION_EXCEPTION)
            || class(OPERATOR_INTERVENTION)
            || class(INTERNAL_ERROR));
    }
    // `postgres` gives a time-out, an unexpected message and a closed connection no cause.
    let Some(cause) = error.source() else { return false };
    // Connectors that are made for I/O, as that of `rustls` is, wrap what they refuse, such as a
    // certificate, into an I/O error. A network that fails has other kinds.
    find_cause::<io::Error>(cause).is_none_or(|io| {
        matches!(io.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_and_what_does_not() {
        for passing in
            ["40001", "40P01", "53100", "53200", "53300", "55P03", "55006", "58000", "58030"]
        {
            assert!(is_shortage_or_rivalry(&SqlState::from_code(passing)), "{passing}");
        }
        for lasting in ["08P01", "22023", "23505", "25006", "42P01", "42501", "57014", "57P01"] {
            assert!(!is_shortage_or_rivalry(&SqlState::from_code(lasting)), "{lasting}");
        }
    }
}
