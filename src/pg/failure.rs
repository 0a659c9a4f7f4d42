//! What an error of PostgreSQL means: for the connection, for another try, for the caller.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use postgres::error::{Severity, SqlState};

use super::connect::ConnectError;
use crate::Error;

/// What went wrong underneath: a `postgres::Error` in most cases.
pub(crate) type Cause = Box<dyn StdError + Send + Sync>;
pub(crate) type Outcome<T> = Result<T, Cause>;

/// What a failed statement has done, and what it leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aftermath {
    /// The connection is gone, and with it the knowledge of what the server did last.
    Lost,
    /// Nothing, and it never will on this connection: a failed transaction was left open.
    Unfit,
    /// Nothing, and it never will on this connection: the server has become read-only.
    ReadOnly,
    /// Nothing: the server has rolled it back because of others at the same time.
    RolledBack,
    /// Nothing: it was refused.
    Refused,
}

impl Aftermath {
    pub(crate) fn of(cause: &(dyn StdError + 'static)) -> Self {
        let Some(error) = cause.downcast_ref::<postgres::Error>() else { return Self::Refused };
        if is_connection_loss(error) {
            return Self::Lost;
        }
        match error.code() {
            Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => Self::Unfit,
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Self::ReadOnly,
            Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED) => {
                Self::RolledBack
            }
            _ => Self::Refused,
        }
    }

    /// Whether another try would end the same way.
    pub(crate) fn is_final(self) -> bool {
        self == Self::Refused
    }

    /// Whether another connection may be a better one.
    pub(crate) fn is_of_the_connection(self) -> bool {
        matches!(self, Self::Unfit | Self::ReadOnly)
    }
}

/// Whose statement has failed. The store's own only ever wait for a row, and only ever write where
/// the caller may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Statement {
    OfTheStore,
    OfTheCaller,
}

/// Turns what a statement of the store ran into into the error that the caller sees.
pub(crate) fn failure(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let source = source.into();
    let error = source.downcast_ref::<postgres::Error>();
    if error.is_some_and(is_connection_loss) {
        let subject = Some(subject.to_string());
        return Error::Unavailable { operation, subject, source, transient: true };
    }
    let transient = error.is_some_and(|error| is_passing(error, Statement::OfTheStore));
    let subject = Some(match error.and_then(postgres::Error::code) {
        Some(&SqlState::UNDEFINED_TABLE) => {
            format!("{subject}, which is not there: `migrate` makes it")
        }
        _ => subject.to_string(),
    });
    Error::Backend { operation, subject, source, transient }
}

/// The error of an operation for which there was no connection.
pub(crate) fn no_connection(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let source = source.into();
    let transient = !is_refusal(source.as_ref());
    Error::Unavailable { operation, subject: Some(subject.to_string()), source, transient }
}

/// What the caller's own statements run into, so that `?` carries it out of a function that returns
/// this crate's [`Result`](crate::Result), and [`Error::is_transient`] judges it.
impl From<postgres::Error> for Error {
    fn from(source: postgres::Error) -> Self {
        let lost = is_connection_loss(&source);
        let transient = lost || is_passing(&source, Statement::OfTheCaller);
        let (operation, subject) = ("statement", Some("the caller's own".to_owned()));
        let source = source.into();
        if lost {
            Self::Unavailable { operation, subject, source, transient }
        } else {
            Self::Backend { operation, subject, source, transient }
        }
    }
}

/// What a PostgreSQL error in the chain of a custom store's cause says about trying again, if there
/// is one.
pub(crate) fn transience(cause: &(dyn StdError + 'static)) -> Option<bool> {
    let error = postgres_error(cause)?;
    Some(is_connection_loss(error) || is_passing(error, Statement::OfTheCaller))
}

pub(crate) fn sql_state<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a SqlState> {
    error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code)
}

pub(crate) fn postgres_error<'a>(
    cause: &'a (dyn StdError + 'static),
) -> Option<&'a postgres::Error> {
    std::iter::successors(Some(cause), |&cause| cause.source())
        .find_map(|cause| cause.downcast_ref::<postgres::Error>())
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

/// Whether a statement that failed on a living connection may succeed later as it is.
fn is_passing(error: &postgres::Error, statement: Statement) -> bool {
    let of_the_store = statement == Statement::OfTheStore;
    error.code().is_some_and(|code| {
        is_shortage_or_rivalry(code)
            || of_the_store
                && [SqlState::QUERY_CANCELED, SqlState::READ_ONLY_SQL_TRANSACTION].contains(code)
    })
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

/// Whether a connection was refused for a reason that waiting does not change.
pub(crate) fn is_refusal(cause: &(dyn StdError + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(cause), |&cause| cause.source());
    match causes.find_map(|cause| cause.downcast_ref::<ConnectError>()) {
        Some(error) => error.is_refusal(),
        None => postgres_error(cause).is_some_and(is_refused),
    }
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
    let io = std::iter::successors(Some(cause), |&cause| cause.source())
        .find_map(|cause| cause.downcast_ref::<io::Error>());
    // Connectors that are made for I/O, as that of `rustls` is, wrap what they refuse, such as a
    // certificate, into an I/O error. A network that fails has other kinds.
    io.is_none_or(|io| {
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
