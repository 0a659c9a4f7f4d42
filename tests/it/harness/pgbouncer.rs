use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use rustix::process::Signal;

use super::guard::{Guard, signal};
use super::server::{as_server_user, free_port, give_away};
use super::{Server, wait_until};

/// `PgBouncer` before a server, with settings of its own.
pub(crate) struct PgBouncer {
    port: u16,
    server_port: u16,
    process: Child,
    guard: Guard,
}

impl PgBouncer {
    pub(crate) fn before(server: &Server, settings: &[(&str, &str)]) -> Self {
        let mut guard = Guard::new("checkpoint-store-pgbouncer-");
        give_away(guard.folder());
        let (port, server_port) = (free_port(), server.port());
        configure(guard.folder(), port, server_port, settings);
        let log = fs::File::create(guard.folder().join("log")).expect("a log file");
        let process = as_server_user(program())
            .arg(guard.folder().join("pgbouncer.ini"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("pgbouncer starts");
        guard.watch(&process);
        wait_until("pgbouncer listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, server_port, process, guard }
    }

    /// Gives it other settings while it runs.
    pub(crate) fn reload(&self, settings: &[(&str, &str)]) {
        configure(self.guard.folder(), self.port, self.server_port, settings);
        signal(&self.process, Signal::HUP);
    }

    pub(crate) fn params(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port)
    }

    /// The parameters of its console.
    pub(crate) fn console(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=pgbouncer", self.port)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // It has nothing to save, and ignores SIGQUIT where a script has started it all with `&`.
        signal(&self.process, Signal::KILL);
        self.process.wait().expect("pgbouncer ends");
        self.guard.forget(&self.process);
    }
}

fn configure(folder: &Path, port: u16, server_port: u16, settings: &[(&str, &str)]) {
    let users = folder.join("users.txt");
    let settings: String =
        settings.iter().map(|(name, value)| [name, " = ", value, "\n"].concat()).collect();
    let ini = format!(
        "[databases]\n\
         * = host=127.0.0.1 port={server_port}\n\
         [pgbouncer]\n\
         listen_addr = 127.0.0.1\n\
         listen_port = {port}\n\
         unix_socket_dir =\n\
         auth_type = trust\n\
         auth_file = {}\n\
         admin_users = postgres\n\
         {settings}",
        users.display()
    );
    for (file, text) in [(&users, "\"postgres\" \"\"\n"), (&folder.join("pgbouncer.ini"), &ini)] {
        fs::write(file, text).expect("a file of its own");
        give_away(file);
    }
}

/// It may be where an ordinary user's `PATH` does not look.
fn program() -> PathBuf {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&on_path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join("pgbouncer"))
        .find(|file| file.is_file())
        .expect("pgbouncer is not installed: tests/run installs it")
}
