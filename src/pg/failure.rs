use std::error::Error as StdError;
use std::fmt;
use std::io;

use postgres::error::{Severity, SqlState};

use crate::Error;

/// What went wrong underneath: a `postgres::Error` in most cases.
pub(crate) type Cause = Box<dyn StdError + Send + Sync>;
pub(crate) type Outcome<T> = Result<T, Cause>;

/// Carries what an operation was about from the place of the failure to the message of the
/// [`Error`]. In the chain of causes it stands for the other side.
#[derive(Debug, thiserror::Error)]
#[error("PostgreSQL")]
struct About {
    subject: String,
    source: Cause,
}

/// Turns what an operation ran into into the error that the caller sees.
pub(crate) fn failure(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let source = source.into();
    if is_connection_loss(source.as_ref()) {
        return no_connection(operation, subject, source);
    }
    let subject = match sql_state(source.as_ref()) {
        Some(&SqlState::UNDEFINED_TABLE) => {
            format!("{subject}, which is not there: `migrate` makes it")
        }
        _ => subject.to_string(),
    };
    Error::backend(operation, About { subject, source })
}

pub(crate) fn no_connection(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let subject = format!("{operation}: {subject}");
    Error::Unavailable { source: Box::new(About { subject, source: source.into() }) }
}

/// What an error of this module was about.
pub(crate) fn subject<'a>(source: &'a (dyn StdError + 'static)) -> Option<&'a str> {
    source.downcast_ref::<About>().map(|about| about.subject.as_str())
}

/// What the caller's own statements run into, so that `?` carries it out of a function that returns
/// this crate's [`Result`](crate::Result), and [`Error::is_transient`] judges it.
impl From<postgres::Error> for Error {
    fn from(source: postgres::Error) -> Self {
        if is_connection_loss(&source) {
            Self::Unavailable { source: source.into() }
        } else {
            Self::backend("statement", source)
        }
    }
}

pub(crate) fn sql_state<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a SqlState> {
    error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code)
}

/// Whether the connection is gone, and with it the knowledge of what the server did last.
pub(crate) fn is_connection_loss(error: &(dyn StdError + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<postgres::Error>() else { return false };
    match error.as_db_error() {
        // A function may raise such a code on a connection that lives on. Poolers do not all say
        // how severe an error is.
        Some(told) => ends_connection(told.code()) && told.parsed_severity().is_none_or(is_fatal),
        None => error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<io::Error>),
    }
}

fn is_fatal(severity: Severity) -> bool {
    matches!(severity, Severity::Fatal | Severity::Panic)
}

/// Whether the server has rolled a statement back for certain because of others at the same time.
pub(crate) fn is_rolled_back(error: &(dyn StdError + 'static)) -> bool {
    [Some(&SqlState::T_R_SERIALIZATION_FAILURE), Some(&SqlState::T_R_DEADLOCK_DETECTED)]
        .contains(&sql_state(error))
}

fn ends_connection(code: &SqlState) -> bool {
    const CONNECTION_EXCEPTION: &str = "08";
    code.code().starts_with(CONNECTION_EXCEPTION)
        || [
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::IDLE_SESSION_TIMEOUT,
            SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
            SqlState::from_code("25P04"), // `transaction_timeout`, from PostgreSQL 17 on
        ]
        .contains(code)
}

/// What the PostgreSQL error in a chain of causes, if there is one, says about trying again.
pub(crate) fn transience(error: &(dyn StdError + 'static)) -> Option<bool> {
    const TRANSACTION_ROLLBACK: &str = "40";
    let mut chain = std::iter::successors(Some(error), |&error| error.source());
    let error = chain.find_map(|cause| cause.downcast_ref::<postgres::Error>())?;
    Some(match error.code() {
        Some(code) => {
            ends_connection(code)
                || code.code().starts_with(TRANSACTION_ROLLBACK)
                || [SqlState::LOCK_NOT_AVAILABLE, SqlState::TOO_MANY_CONNECTIONS].contains(code)
        }
        None => is_connection_loss(error) && !is_refused_by_tls(error),
    })
}

/// Connectors that are made for I/O, as that of `rustls` is, wrap what they refuse, a certificate
/// say, into an I/O error. A network that fails has other kinds.
fn is_refused_by_tls(error: &postgres::Error) -> bool {
    let io = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    io.is_some_and(|io| {
        matches!(io.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_states_after_which_a_connection_is_gone_and_those_after_which_it_is_not() {
        // Named in PostgreSQL's appendix A, with the settings that bring them about.
        for gone in [
            "08000", "08003", "08006", "57P01", "57P02", "57P03", // restarts and crashes
            "57P05", // idle_session_timeout
            "25P03", // idle_in_transaction_session_timeout
            "25P04", // transaction_timeout
        ] {
            assert!(ends_connection(&SqlState::from_code(gone)), "{gone}");
        }
        for alive in ["25006", "25P02", "40001", "42P01", "42501", "53200", "55P03", "57014"] {
            assert!(!ends_connection(&SqlState::from_code(alive)), "{alive}");
        }
    }
}
