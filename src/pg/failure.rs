use std::error::Error as StdError;
use std::fmt;
use std::io;

use postgres::error::SqlState;

use crate::Error;

type Source = Box<dyn StdError + Send + Sync>;

/// Names what an operation was about, between the operation and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{subject}")]
struct About {
    subject: String,
    source: Source,
}

/// Turns what an operation ran into into the error that the caller sees.
pub(crate) fn failure(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Source>,
) -> Error {
    let source = source.into();
    if is_connection_loss(source.as_ref()) {
        let subject = format!("{operation}: {subject}");
        Error::Unavailable { source: Box::new(About { subject, source }) }
    } else {
        Error::backend(operation, About { subject: subject.to_string(), source })
    }
}

pub(crate) fn no_connection(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Source>,
) -> Error {
    let subject = format!("{operation}: {subject}");
    Error::Unavailable { source: Box::new(About { subject, source: source.into() }) }
}

/// Whether the connection is gone, and with it the knowledge of what the server did last.
pub(crate) fn is_connection_loss(error: &(dyn StdError + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<postgres::Error>() else { return false };
    match error.code() {
        Some(code) => ends_connection(code),
        None => error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<io::Error>),
    }
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
