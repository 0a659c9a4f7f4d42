use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{Client, Config, NoTls};
use rustix::process::Signal;

use super::guard::{Guard, signal_pid};

/// Names the folder of the server's programs: `initdb` and `postgres`.
const BIN_VARIABLE: &str = "CHECKPOINT_STORE_PG_BIN";

/// What a server is started with.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) settings: Vec<(String, String)>,
    pub(crate) hba: Option<String>,
    pub(crate) listen: String,
    pub(crate) password: Option<String>,
    /// What to start the server's process through, `ip netns exec ...` say.
    pub(crate) through: Vec<String>,
}

impl Options {
    /// As the distribution configures it: what is acknowledged survives a crash.
    pub(crate) fn durable() -> Self {
        Self {
            settings: Vec::new(),
            hba: None,
            listen: "127.0.0.1".to_owned(),
            password: None,
            through: Vec::new(),
        }
        .set("max_connections", "200")
    }

    /// Does not wait for the disk.
    pub(crate) fn fast() -> Self {
        Self::durable().set("fsync", "off")
    }

    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A server in a folder of its own, on a free port, gone when this value is.
pub(crate) struct Server {
    port: u16,
    options: Options,
    running: Mutex<Running>,
}

struct Running {
    process: Option<Process>,
    guard: Guard,
}

struct Process {
    child: Child,
    /// The server's own, which is not the child's where that one is `sudo`.
    pid: i32,
}

impl Server {
    pub(crate) fn start(options: Options) -> Self {
        let server = Self::prepare(options);
        server.init();
        server.restart();
        server
    }

    /// A server without a data folder: for [`init`](Server::init), or to copy another into.
    pub(crate) fn prepare(options: Options) -> Self {
        let guard = Guard::new("checkpoint-store-pg-");
        give_away(guard.folder());
        Self { port: free_port(), options, running: Mutex::new(Running { process: None, guard }) }
    }

    pub(crate) fn init(&self) {
        if let Some(password) = &self.options.password {
            let file = self.folder().join("password");
            fs::write(&file, password).expect("a password file");
            give_away(&file);
            initdb(&self.data(), "scram-sha-256", Some(&file));
        } else {
            copy(template(), &self.data());
        }
        if let Some(hba) = &self.options.hba {
            fs::write(self.data().join("pg_hba.conf"), hba).expect("pg_hba.conf is written");
        }
    }

    /// Copies another server, which stands still meanwhile, into this one, which then follows it
    /// as its standby. It takes no more than the server's own programs, and so no `pg_basebackup`
    /// of the same version.
    pub(crate) fn follow(&self, primary: &Self) {
        primary.stop();
        copy(&primary.data(), &self.data());
        primary.restart();
        let signal = self.data().join("standby.signal");
        fs::write(&signal, "").expect("the standby's folder");
        give_away(&signal);
        let mut settings = fs::File::options()
            .append(true)
            .open(self.data().join("postgresql.auto.conf"))
            .expect("initdb has made it");
        writeln!(settings, "primary_conninfo = '{}'", primary.params()).expect("it is written");
    }

    /// Starts the server again and waits until it takes connections.
    pub(crate) fn restart(&self) {
        let mut running = self.running();
        assert!(running.process.is_none(), "the server runs already");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(running.guard.folder().join("log"))
            .expect("a log file");
        let mut postgres = match &self.options.through[..] {
            [] => server_program("postgres"),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(bin_folder().join("postgres"));
                command
            }
        };
        postgres
            .arg("-D")
            .arg(running.guard.folder().join("data"))
            .args(["-p", &self.port.to_string(), "-h", &self.options.listen])
            .args(["-c", "unix_socket_directories="])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        for (name, value) in &self.options.settings {
            postgres.arg("-c").arg(format!("{name}={value}"));
        }
        let mut child = postgres.spawn().expect("postgres starts");
        running.guard.watch(&child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(refused) = self.knock() {
            let ended = child.try_wait().expect("a child's state");
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(running.guard.folder().join("log"));
                panic!("postgres does not start: {refused}\n{}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let file = fs::read_to_string(running.guard.folder().join("data/postmaster.pid"));
        let pid = file.ok().and_then(|text| text.lines().next()?.parse().ok());
        let pid = pid.expect("a running server has a pid file");
        running.guard.watch_pid(pid);
        running.process = Some(Process { child, pid });
    }

    /// Whether the server takes connections; a refused login is an answer too.
    fn knock(&self) -> Result<(), checkpoint_store::postgres::Error> {
        let mut config: Config = self.params().parse().expect("valid parameters");
        config.connect_timeout(Duration::from_secs(1));
        if let Some(password) = &self.options.password {
            config.password(password);
        }
        match config.connect(NoTls) {
            Ok(_) => Ok(()),
            Err(error) => match error.code() {
                Some(code) if code.code().starts_with("28") => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Stops it in order: transactions are ended, everything is written.
    pub(crate) fn stop(&self) {
        self.end(Signal::INT);
    }

    /// Stops it as a crash does: nothing is written, the next start recovers from the log.
    pub(crate) fn crash(&self) {
        self.end(Signal::QUIT);
    }

    fn end(&self, how: Signal) {
        let mut running = self.running();
        let mut process = running.process.take().expect("the server runs");
        signal_pid(process.pid, how);
        process.child.wait().expect("postgres ends");
        running.guard.forget_pid(process.pid);
        running.guard.forget(&process.child);
    }

    /// The process id of the server itself, to freeze it, say.
    pub(crate) fn pid(&self) -> i32 {
        let running = self.running();
        running.process.as_ref().expect("the server runs").pid
    }

    /// Kills one backend with `kill -9`; the server then restarts all of them by itself.
    pub(crate) fn kill_backend(&self, pid: i32) {
        let _server_stays = self.running();
        signal_pid(pid, Signal::KILL);
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.running().guard.folder().to_owned()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder().join("data")
    }

    pub(crate) fn params(&self) -> String {
        format!("host={} port={} user=postgres", self.options.listen, self.port)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}:{}/{database}", self.options.listen, self.port)
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.params(), NoTls).expect("a connection to the server")
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut running = self.running();
        if let Some(mut process) = running.process.take() {
            signal_pid(process.pid, Signal::CONT);
            signal_pid(process.pid, Signal::QUIT);
            process.child.wait().expect("postgres ends");
            running.guard.forget_pid(process.pid);
            running.guard.forget(&process.child);
        }
    }
}

/// A data folder that no server runs on. `initdb` takes longer than a copy of it.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<(PathBuf, Guard)> = OnceLock::new();
    let (data, _) = TEMPLATE.get_or_init(|| {
        let guard = Guard::new("checkpoint-store-pg-");
        give_away(guard.folder());
        let data = guard.folder().join("data");
        initdb(&data, "trust", None);
        (data, guard)
    });
    data
}

fn initdb(data: &Path, auth: &str, password_file: Option<&Path>) {
    let mut initdb = server_program("initdb");
    initdb.args(["--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    initdb.arg("--auth").arg(auth);
    if let Some(file) = password_file {
        initdb.arg("--pwfile").arg(file);
    }
    let output = initdb.arg(data).output().expect("initdb runs");
    assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    let copied = as_server_user("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp runs").success());
}

/// One of the server's programs, to be run as a user that PostgreSQL accepts: it refuses root.
pub(crate) fn server_program(name: &str) -> Command {
    // The client's programs may be elsewhere than the server's.
    let beside = bin_folder().join(name);
    as_server_user(if beside.is_file() { beside } else { name.into() })
}

/// Any program, run as the user that the server runs as.
pub(crate) fn as_server_user(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/");
    if let Some(user) = server_user() {
        command.uid(user.uid).gid(user.gid);
    }
    command
}

fn bin_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os(BIN_VARIABLE) {
            let folder = PathBuf::from(folder);
            assert!(has_server(&folder), "no server is where {BIN_VARIABLE} says");
            return folder;
        }
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let mut installed: Vec<_> = ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt"]
            .iter()
            .filter_map(|parent| fs::read_dir(parent).ok())
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .collect();
        installed.sort_by_key(|folder| std::cmp::Reverse(major_version(folder)));
        std::env::split_paths(&on_path)
            .chain(installed)
            .find(|folder| has_server(folder))
            .and_then(|folder| {
                // A link to the server may stand alone where it is found; its other programs,
                // psql say, are where it points to.
                Some(fs::canonicalize(folder.join("postgres")).ok()?.parent()?.to_owned())
            })
            .unwrap_or_else(|| {
                panic!(
                    "no PostgreSQL server is installed: tests/run installs one, or name the \
                     folder of initdb and postgres in {BIN_VARIABLE}"
                )
            })
    })
}

fn has_server(folder: &Path) -> bool {
    folder.join("initdb").is_file() && folder.join("postgres").is_file()
}

/// `15` of `/usr/lib/postgresql/15/bin` and of `/opt/homebrew/opt/postgresql@15/bin`.
fn major_version(bin: &Path) -> Option<u32> {
    let name = bin.parent()?.file_name()?.to_str()?;
    name.rsplit('@').next()?.parse().ok()
}

pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Whom the server runs as when the tests run as root.
pub(crate) fn server_user() -> Option<&'static User> {
    static USER: OnceLock<Option<User>> = OnceLock::new();
    USER.get_or_init(|| {
        rustix::process::geteuid().is_root().then(|| User { uid: id("-u"), gid: id("-g") })
    })
    .as_ref()
}

fn id(which: &str) -> u32 {
    let output = Command::new("id").args([which, "postgres"]).output().expect("id runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    printed.trim().parse().expect("the packages of PostgreSQL make a user postgres")
}

/// Makes a file or folder readable by the server, and by nobody else.
pub(crate) fn give_away(path: &Path) {
    if let Some(user) = server_user() {
        chown(path, Some(user.uid), Some(user.gid)).expect("root can give a file away");
    }
    let mode = if path.is_dir() { 0o700 } else { 0o600 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("own file");
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound address").port()
}
