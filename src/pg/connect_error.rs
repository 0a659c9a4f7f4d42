//! Why no connection was made.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

use super::errors::{Cause, find_cause, is_refused, postgres_error};
use crate::Error;

/// Why no connection was made. With several hosts the text says what became of each, and the source
/// is that of the one which decides.
#[derive(Debug)]
pub(crate) struct ConnectError {
    decisive: Failure,
    each: Option<String>,
}

/// Why one attempt has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    Parameters(&'static str),
    #[error("the host name could not be looked up")]
    LookUp(#[source] io::Error),
    #[error("the host name could not be looked up: no answer from the name server")]
    NameServer,
    #[error("no thread could be started to connect")]
    NoThread(#[source] io::Error),
    #[error("the password provider failed")]
    Provider(#[source] Cause),
    #[error("the password provider panicked")]
    ProviderPanicked,
    #[error("the password provider did not answer within {:.1} s", within.as_secs_f32())]
    NoPassword { within: Duration },
    #[error("the password provider has not returned from several earlier calls")]
    HungProviders,
    #[error("no answer from {address} within {:.1} s", within.as_secs_f32())]
    NoAnswer { address: String, within: Duration },
    #[error("the login panicked: {0}")]
    LoginPanicked(String),
    #[error("no connection could be made")]
    Login(#[source] postgres::Error),
}

impl ConnectError {
    pub(crate) fn new(failures: Vec<(String, Failure)>) -> Self {
        let each = (failures.len() > 1).then(|| {
            let reasons =
                failures.iter().map(|(name, failure)| format!("{name}: {}", failure.reason()));
            reasons.collect::<Vec<_>>().join("; ")
        });
        let decisive = failures.into_iter().map(|(_, failure)| failure).rev();
        let decisive = decisive.max_by_key(Failure::weight);
        Self { decisive: decisive.unwrap_or(Failure::Parameters("no address is known")), each }
    }

    /// Whether a server or its TLS refused for a reason that waiting does not change.
    pub(crate) fn is_refusal(&self) -> bool {
        self.decisive.is_refusal()
    }

    /// The cause for an error of this crate: the `postgres::Error` itself if that is all there is.
    pub(crate) fn into_cause(self) -> Cause {
        match self {
            Self { decisive: Failure::Login(error), each: None } => error.into(),
            other => other.into(),
        }
    }
}

impl From<Failure> for ConnectError {
    fn from(decisive: Failure) -> Self {
        Self { decisive, each: None }
    }
}

impl From<postgres::Error> for ConnectError {
    fn from(error: postgres::Error) -> Self {
        Failure::Login(error).into()
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.each {
            Some(each) => f.write_str(each),
            None => self.decisive.fmt(f),
        }
    }
}

impl StdError for ConnectError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.decisive.source()
    }
}

impl Failure {
    fn is_refusal(&self) -> bool {
        match self {
            Self::Login(error) => is_refused(error),
            other => matches!(other, Self::Parameters(_)),
        }
    }

    /// Which of several failures decides: a refusal before what may pass, what a PostgreSQL server
    /// said before other causes, and no answer last.
    fn weight(&self) -> (bool, bool, bool) {
        let is_of_a_server = matches!(self, Self::Login(error) if error.as_db_error().is_some());
        (self.is_refusal(), is_of_a_server, !matches!(self, Self::NoAnswer { .. }))
    }

    /// All that is known, in one line.
    fn reason(&self) -> String {
        let first: &dyn StdError = match self {
            Self::Login(error) => error.as_db_error().map_or(error, |told| told),
            other => other,
        };
        let causes = iter::successors(Some(first), |&cause| cause.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}

/// No connection could be made. Calls that wait for one share the cause.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no connection could be made")]
pub(crate) struct NoConnection(#[source] pub(crate) Arc<dyn StdError + Send + Sync>);

/// None of the pool's connections was given back in time.
#[derive(Debug, thiserror::Error)]
#[error("all connections of the pool are in use ({0}), perhaps by the calling thread itself")]
pub(crate) struct AllInUse(pub(crate) u32);

/// The error of an operation for which there was no connection.
pub(crate) fn no_connection(
    operation: &'static str,
    subject: impl fmt::Display,
    source: impl Into<Cause>,
) -> Error {
    let source = source.into();
    let is_refusal = match find_cause::<ConnectError>(source.as_ref()) {
        Some(error) => error.is_refusal(),
        None => postgres_error(source.as_ref()).is_some_and(is_refused),
    };
    let transient = !is_refusal;
    Error::Unavailable { operation, subject: Some(subject.to_string()), source, transient }
}

#[cfg(test)]
mod tests {
    use postgres::{Client, NoTls};

    use super::*;

    fn error(failures: Vec<Failure>) -> ConnectError {
        let name = |(i, failure)| (format!("host{i}:5432"), failure);
        ConnectError::new(failures.into_iter().enumerate().map(name).collect())
    }

    fn no_answer() -> Failure {
        Failure::NoAnswer { address: "10.0.0.1:5432".to_owned(), within: Duration::from_secs(5) }
    }

    /// What `postgres` says of parameters that name no host, without a network.
    fn refused() -> Failure {
        let error = Client::connect("user=u", NoTls).map(drop).expect_err("no host");
        Failure::Login(error)
    }

    #[test]
    fn nothing_but_an_answer_is_a_refusal() {
        let timeout = postgres::Error::__private_api_timeout;
        for loss in [
            no_answer(),
            Failure::Login(timeout()),
            Failure::NameServer,
            Failure::LookUp(io::Error::other("unknown")),
            Failure::NoThread(io::ErrorKind::WouldBlock.into()),
            Failure::LoginPanicked(String::new()),
            Failure::ProviderPanicked,
            Failure::HungProviders,
            Failure::NoPassword { within: Duration::ZERO },
            // What another database refused the provider is nothing that this one said.
            Failure::Provider(match refused() {
                Failure::Login(error) => error.into(),
                _ => unreachable!("see above"),
            }),
        ] {
            let told = format!("{loss:?}");
            assert!(!ConnectError::from(loss).is_refusal(), "{told}");
        }
        assert!(ConnectError::from(refused()).is_refusal());
        assert!(ConnectError::from(Failure::Parameters("no host")).is_refusal());
    }

    #[test]
    fn a_refusal_decides_wherever_it_stands_and_every_host_is_named() {
        for (failures, refusal) in
            [(vec![refused(), no_answer()], 0), (vec![no_answer(), refused(), no_answer()], 1)]
        {
            let error = error(failures);
            assert!(error.is_refusal());
            assert!(error.source().is_some_and(<dyn StdError>::is::<postgres::Error>));
            let told = error.to_string();
            assert!(told.contains(&format!("host{refusal}:5432: invalid configuration")), "{told}");
            assert!(told.contains(": no answer from 10.0.0.1:5432 within 5.0 s"), "{told}");
        }
        let closed = error(vec![no_answer(), Failure::LookUp(io::Error::other("unknown"))]);
        assert!(closed.source().is_some_and(<dyn StdError>::is::<io::Error>), "it says more");
    }

    #[test]
    fn the_cause_of_one_host_is_the_error_itself() {
        assert!(error(vec![refused()]).into_cause().is::<postgres::Error>());
        assert!(error(vec![no_answer()]).into_cause().is::<ConnectError>());
        assert!(error(vec![refused(), refused()]).into_cause().is::<ConnectError>());
    }
}
