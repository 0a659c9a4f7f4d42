//! One connection: which host is asked, for how long, and what its refusal says.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::{Host, LoadBalanceHosts};
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Config, Socket};

/// How long one address may take to answer a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a login may take beyond the time that the network has.
const LOGIN_MARGIN: Duration = Duration::from_secs(1);
/// The longest pause between two logins at a peer that answers a knock, and no login.
const LONGEST_LOGIN_PAUSE: Duration = Duration::from_secs(60);
/// How long data that was sent may stay unacknowledged.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// When, how often and how many times a silent peer is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_RETRIES: u32 = 3;
/// What `postgres` says when the parameters do not name it.
const POSTGRES_KEEPALIVE_IDLE: Duration = Duration::from_secs(2 * 60 * 60);
const POSTGRES_PORT: u16 = 5432;

/// Bounds the time that a dead network can take, where the caller has not.
fn bound_network_waits(config: &mut Config) {
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_USER_TIMEOUT);
    }
    if config.get_keepalives_idle() == POSTGRES_KEEPALIVE_IDLE {
        config.keepalives_idle(KEEPALIVE_IDLE);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(KEEPALIVE_INTERVAL);
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(KEEPALIVE_RETRIES);
    }
}

/// Makes connections. Each address has a bounded time to answer, and then the next one is asked.
#[derive(Clone)]
pub(crate) struct Connector {
    targets: Arc<[Target]>,
    in_random_order: bool,
    patience: Duration,
    login: Arc<Login>,
    /// Who has not answered the last attempt.
    silent: Arc<Mutex<HashMap<Address, Silence>>>,
}

type Login = dyn Fn(&Config) -> Result<Client, postgres::Error> + Send + Sync;

/// One of the hosts that the parameters name.
struct Target {
    /// The parameters with no other host in them.
    config: Config,
    place: Option<(Place, u16)>,
}

enum Place {
    Name(String),
    Ip(IpAddr),
    #[cfg(unix)]
    Socket(std::path::PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Address {
    Tcp(SocketAddr),
    #[cfg(unix)]
    Unix(std::path::PathBuf),
}

/// When the next login is tried at a peer that owes an answer to one, and how long after it another.
struct Silence {
    next_login: Instant,
    pause: Duration,
}

/// Why no connection was made.
#[derive(Debug)]
pub(crate) enum ConnectError {
    Failed(postgres::Error),
    NoAnswer { whom: String, within: Duration },
}

impl Connector {
    pub(crate) fn new<T>(mut config: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        bound_network_waits(&mut config);
        let time = config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
        Self {
            targets: targets(&config).into(),
            in_random_order: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            patience: time.saturating_add(LOGIN_MARGIN),
            login: Arc::new(move |config| config.connect(tls.clone())),
            silent: Arc::default(),
        }
    }

    /// A connection to the first address that gives one. Who has not answered the last time is
    /// asked last.
    pub(crate) fn connect(&self, _deadline: Instant) -> Result<Client, ConnectError> {
        let mut failure = None;
        // An answer says more than silence does.
        let mut note = |error: ConnectError| match (&failure, &error) {
            (Some(ConnectError::Failed(_)), ConnectError::NoAnswer { .. }) => {}
            _ => failure = Some(error),
        };
        let mut attempts = Vec::new();
        for target in self.targets.iter() {
            match self.attempts(target) {
                Ok(of_target) => attempts.extend(of_target),
                Err(error) => note(error),
            }
        }
        if self.in_random_order {
            let random = RandomState::new();
            attempts.sort_by_cached_key(|(_, address)| random.hash_one(address));
        }
        attempts.sort_by_cached_key(|(_, address)| self.is_silent(address.as_ref()));
        for (config, address) in attempts {
            match self.attempt(config, address) {
                Ok(client) => return Ok(client),
                Err(error) => note(error),
            }
        }
        Err(failure.unwrap_or_else(|| ConnectError::NoAnswer {
            whom: "any server".to_owned(),
            within: self.patience,
        }))
    }

    /// The addresses of one host, each with the parameters that lead to it and nowhere else.
    fn attempts(&self, target: &Target) -> Result<Vec<(Config, Option<Address>)>, ConnectError> {
        let config = || target.config.clone();
        let (name, port) = match &target.place {
            None => return Ok(vec![(config(), None)]),
            #[cfg(unix)]
            Some((Place::Socket(folder), port)) => {
                let socket = folder.join(format!(".s.PGSQL.{port}"));
                return Ok(vec![(config(), Some(Address::Unix(socket)))]);
            }
            Some((Place::Ip(ip), port)) => {
                return Ok(vec![(config(), Some(Address::Tcp((*ip, *port).into())))]);
            }
            Some((Place::Name(name), port)) => (name.clone(), *port),
        };
        let resolve = {
            let name = name.clone();
            move || (name.as_str(), port).to_socket_addrs().map(Vec::from_iter)
        };
        Ok(match within(self.patience, resolve) {
            None => return Err(self.no_answer(format!("the name server, about {name}"))),
            // `postgres` looks it up as well, and says what is wrong.
            Some(Err(_)) => vec![(config(), None)],
            Some(Ok(addresses)) => addresses
                .into_iter()
                .map(|address| {
                    let mut config = config();
                    config.hostaddr(address.ip());
                    (config, Some(Address::Tcp(address)))
                })
                .collect(),
        })
    }

    fn attempt(&self, config: Config, address: Option<Address>) -> Result<Client, ConnectError> {
        // A login that nobody answers cannot be called off, and keeps a thread. So whoever has been
        // silent has to answer a knock first: of an outage no more threads are left than began to
        // log in before it was noticed. One that answers that and no more, as PgBouncer does while
        // its server is away, is asked ever more rarely.
        if let Some(silent) = address.as_ref().filter(|address| self.is_silent(Some(address))) {
            if !self.expects_a_login(silent, answers(silent, self.patience)) {
                return Err(self.no_answer(silent.to_string()));
            }
        }
        let (connector, at) = (self.clone(), address.clone());
        let login = move || {
            let outcome = (connector.login)(&config);
            if let Some(at) = &at {
                connector.silent().remove(at);
            }
            outcome
        };
        if let Some(outcome) = within(self.patience, login) {
            return outcome.map_err(ConnectError::Failed);
        }
        let whom = address.as_ref().map_or_else(|| "the server".to_owned(), Address::to_string);
        if let Some(address) = address {
            self.silent().entry(address).or_insert_with(|| Silence::new(self.patience));
        }
        Err(self.no_answer(whom))
    }

    /// Whether a login is to be tried at a peer that has answered the knock, or has not.
    fn expects_a_login(&self, address: &Address, has_answered: bool) -> bool {
        let mut silent = self.silent();
        let Some(silence) = silent.get_mut(address) else { return true };
        if !has_answered {
            *silence = Silence::new(self.patience);
        }
        has_answered && silence.is_time_for_a_login()
    }

    fn no_answer(&self, whom: String) -> ConnectError {
        ConnectError::NoAnswer { whom, within: self.patience }
    }

    fn silent(&self) -> MutexGuard<'_, HashMap<Address, Silence>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_silent(&self, address: Option<&Address>) -> bool {
        address.is_some_and(|address| self.silent().contains_key(address))
    }
}

impl Silence {
    fn new(pause: Duration) -> Self {
        Self { next_login: Instant::now(), pause }
    }

    fn is_time_for_a_login(&mut self) -> bool {
        let now = Instant::now();
        let is_time = now >= self.next_login;
        if is_time {
            self.next_login = now + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_LOGIN_PAUSE);
        }
        is_time
    }
}

/// The hosts in the parameters, one by one. Where they do not fit together `postgres` is to say so.
fn targets(config: &Config) -> Vec<Target> {
    let (hosts, addresses, ports) =
        (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    let fits = (hosts.is_empty() || addresses.is_empty() || hosts.len() == addresses.len())
        && (ports.len() <= 1 || ports.len() == count);
    if count == 0 || !fits {
        return vec![Target { config: config.clone(), place: None }];
    }
    let target = |i| {
        let (host, ip) = (hosts.get(i), addresses.get(i).copied());
        let port = ports.get(i).or(ports.first()).copied().unwrap_or(POSTGRES_PORT);
        let place = match (ip, host) {
            (Some(ip), _) => Place::Ip(ip),
            (None, Some(Host::Tcp(name))) => match name.parse() {
                Ok(ip) => Place::Ip(ip),
                Err(_) => Place::Name(name.clone()),
            },
            #[cfg(unix)]
            (None, Some(Host::Unix(folder))) => Place::Socket(folder.clone()),
            (None, None) => unreachable!("there are no more targets than hosts or addresses"),
        };
        let mut config = without_hosts(config);
        match host {
            Some(Host::Tcp(name)) => drop(config.host(name)),
            #[cfg(unix)]
            Some(Host::Unix(folder)) => drop(config.host_path(folder)),
            None => {}
        }
        if let Some(ip) = ip {
            config.hostaddr(ip);
        }
        config.port(port);
        Target { config, place: Some((place, port)) }
    };
    (0..count).map(target).collect()
}

/// All that the parameters say, except where the server is: a `Config` cannot forget a host.
fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(dbname) = config.get_dbname() {
        copy.dbname(dbname);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

/// Does something that nothing else bounds, in a thread of its own, and waits so long for it.
fn within<T: Send + 'static>(
    time: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        // Nobody listens any more when the time is over.
        let _ = sender.send(work());
    });
    receiver.recv_timeout(time).ok()
}

/// Whether there is any answer at all to the first question of PostgreSQL's protocol: whether it
/// speaks TLS. A refusal is one, and so is hanging up.
fn answers(address: &Address, time: Duration) -> bool {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    fn ask(mut stream: impl Read + Write) -> io::Result<usize> {
        stream.write_all(&SSL_REQUEST)?;
        stream.read(&mut [0])
    }
    let deadline = Instant::now() + time;
    let left = || deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let answer = match address {
        Address::Tcp(address) => TcpStream::connect_timeout(address, time).and_then(|stream| {
            stream.set_read_timeout(Some(left()))?;
            ask(stream)
        }),
        #[cfg(unix)]
        Address::Unix(path) => std::os::unix::net::UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(left()))?;
            ask(stream)
        }),
    };
    let is_silence = |error: io::Error| {
        matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
    };
    !answer.is_err_and(is_silence)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl ConnectError {
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Failed(error) => super::errors::is_refusal(error),
            Self::NoAnswer { .. } => false,
        }
    }
}

impl From<postgres::Error> for ConnectError {
    fn from(error: postgres::Error) -> Self {
        Self::Failed(error)
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(_) => f.write_str("connection attempt failed"),
            Self::NoAnswer { whom, within } => {
                write!(f, "no answer from {whom} within {} s", within.as_secs_f32())
            }
        }
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(error) => Some(error),
            Self::NoAnswer { .. } => None,
        }
    }
}

/// Where a connection was to go, without saying as whom.
pub(crate) struct ServerName(String);

impl ServerName {
    pub(crate) fn of(config: &Config) -> Self {
        let ports = config.get_ports();
        let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(POSTGRES_PORT);
        let named: Vec<_> = match config.get_hosts() {
            [] => config.get_hostaddrs().iter().map(ToString::to_string).collect(),
            hosts => hosts
                .iter()
                .map(|host| match host {
                    Host::Tcp(name) => name.clone(),
                    #[cfg(unix)]
                    Host::Unix(path) => path.display().to_string(),
                })
                .collect(),
        };
        let addresses =
            named.into_iter().enumerate().map(|(i, host)| format!("{host}:{}", port(i)));
        Self(addresses.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_str() {
            "" => f.write_str("no host is given"),
            server => write!(f, "server {server}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_network_is_bounded_where_the_caller_has_not_bounded_it() {
        let bounds = |params: &str| -> Result<_, postgres::Error> {
            let mut config = params.parse()?;
            bound_network_waits(&mut config);
            Ok((
                config.get_connect_timeout().copied(),
                config.get_tcp_user_timeout().copied(),
                config.get_keepalives_idle(),
                config.get_keepalives_interval(),
                config.get_keepalives_retries(),
            ))
        };
        let seconds = Duration::from_secs;
        assert_eq!(
            bounds("host=localhost").expect("valid parameters"),
            (Some(seconds(4)), Some(seconds(10)), seconds(10), Some(seconds(3)), Some(3))
        );
        let of_the_callers = "host=localhost connect_timeout=61 tcp_user_timeout=62 \
                              keepalives_idle=63 keepalives_interval=64 keepalives_retries=65";
        assert_eq!(
            bounds(of_the_callers).expect("valid parameters"),
            (Some(seconds(61)), Some(seconds(62)), seconds(63), Some(seconds(64)), Some(65))
        );
    }

    /// Every parameter that `postgres` knows, each other than its default.
    const ALL: &str = "user=u password=p dbname=d options=-cx=1 application_name=a \
         sslmode=require sslnegotiation=direct connect_timeout=1 tcp_user_timeout=2 keepalives=0 \
         keepalives_idle=3 keepalives_interval=4 keepalives_retries=5 \
         target_session_attrs=read-write channel_binding=require load_balance_hosts=random";

    #[test]
    fn each_host_is_asked_with_all_the_other_parameters() {
        let all: Config =
            format!("{ALL} host=one,two hostaddr=10.0.0.1,10.0.0.2 port=1,2").parse().expect("ok");
        let targets = targets(&all);
        assert_eq!(targets.len(), 2);
        for (target, place) in targets
            .iter()
            .zip(["host=one hostaddr=10.0.0.1 port=1", "host=two hostaddr=10.0.0.2 port=2"])
        {
            let expected: Config = format!("{ALL} {place}").parse().expect("valid parameters");
            assert_eq!(format!("{:?}", target.config), format!("{expected:?}"));
            assert_eq!(target.config.get_password(), expected.get_password());
        }
    }

    #[test]
    fn parameters_that_do_not_fit_together_are_left_to_postgres() {
        for params in ["user=u", "host=a,b hostaddr=10.0.0.1", "host=a,b port=1,2,3"] {
            let config: Config = params.parse().expect("readable");
            let targets = targets(&config);
            assert_eq!(targets.len(), 1, "{params}");
            assert_eq!(format!("{:?}", targets[0].config), format!("{config:?}"));
        }
    }

    #[test]
    fn who_hangs_up_answers_and_who_says_nothing_does_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = Address::Tcp(listener.local_addr().expect("bound"));
        assert!(!answers(&address, Duration::from_millis(50)), "nobody accepts");
        drop(listener);
        assert!(answers(&address, Duration::from_secs(60)), "refused");
    }
}
