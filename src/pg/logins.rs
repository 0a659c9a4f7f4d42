//! How a slot of the builder's pool gets its connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use postgres::Client;

use super::close::close;
use super::connect::Connector;
use super::connect_error::ConnectError;
use super::prepared::is_shared;

/// How the connections of the builder's pool are made.
pub(crate) struct Logins {
    connector: Connector,
    looks_for_shared_sessions: bool,
    /// Whether a new connection came upon the prepared statements of another.
    found_shared_session: AtomicBool,
}

impl Logins {
    pub(crate) fn new(connector: Connector, looks_for_shared_sessions: bool) -> Self {
        Self { connector, looks_for_shared_sessions, found_shared_session: AtomicBool::new(false) }
    }

    pub(crate) fn found_shared_session(&self) -> bool {
        self.found_shared_session.load(Ordering::Relaxed)
    }

    pub(crate) fn login(
        &self,
        deadline: Instant,
        waiting: &mut dyn FnMut(ConnectError),
    ) -> Result<Client, ConnectError> {
        self.connector.connect(deadline, waiting).and_then(|client| self.inspect(client))
    }

    fn inspect(&self, mut client: Client) -> Result<Client, ConnectError> {
        if !self.looks_for_shared_sessions {
            return Ok(client);
        }
        match is_shared(&mut client) {
            Ok(is_shared) => {
                self.found_shared_session.fetch_or(is_shared, Ordering::Relaxed);
                Ok(client)
            }
            Err(error) => {
                close(client);
                Err(error.into())
            }
        }
    }
}
