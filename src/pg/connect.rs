//! How one connection is made: one host after the other, each within its limit.

use std::any::Any;
use std::error::Error as StdError;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::LoadBalanceHosts;
use postgres::{Client, Config};

use super::close::close;
use super::connect_error::{ConnectError, Failure};
use super::targets::{Address, Target};
use super::unresponsive::{self, Login};
use super::waiting::{Wait, spawn};
use crate::sync::lock;

/// How long one address may take to answer a connection attempt, unless the parameters say so.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a login may take beyond the time that the network has.
const LOGIN_MARGIN: Duration = Duration::from_secs(1);
/// How many calls of a password provider may hang before no other is made.
const MOST_HUNG_PROVIDERS: usize = 4;
/// How long a connection is kept whose caller has given up.
const SPARE_LIVES_FOR: Duration = Duration::from_secs(1);

/// Gives the password for one connection attempt.
pub(crate) type PasswordProvider =
    dyn Fn() -> Result<String, Box<dyn StdError + Send + Sync>> + Send + Sync;

type LogIn = dyn Fn(&Config) -> Result<Client, postgres::Error> + Send + Sync;

/// Makes connections.
pub(crate) struct Connector {
    targets: Result<Vec<Arc<Target>>, &'static str>,
    in_random_order: bool,
    /// How long one address may take to give a connection.
    limit: Duration,
    log_in: Box<LogIn>,
    password_provider: Option<Arc<PasswordProvider>>,
    hung_providers: AtomicUsize,
    /// A connection that was made after its caller had given up.
    spare: Mutex<Option<Client>>,
}

impl Connector {
    pub(crate) fn new(
        mut config: Config,
        password_provider: Option<Arc<PasswordProvider>>,
        log_in: impl Fn(&Config) -> Result<Client, postgres::Error> + Send + Sync + 'static,
    ) -> Arc<Self> {
        bound_network_waits(&mut config);
        let time = config.get_connect_timeout().unwrap_or(&CONNECT_TIMEOUT);
        Arc::new(Self {
            targets: Target::list(&config),
            in_random_order: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            limit: time.saturating_add(LOGIN_MARGIN),
            log_in: Box::new(log_in),
            password_provider,
            hung_providers: AtomicUsize::new(0),
            spare: Mutex::default(),
        })
    }

    /// A connection to the first address that gives one. It is tried for no longer than until the
    /// deadline. An address that has not answered the last time is tried after the others. `tell` is called
    /// once, with what is being waited for, if that takes almost a second.
    pub(crate) fn connect(
        self: &Arc<Self>,
        deadline: Instant,
        tell: &mut dyn FnMut(ConnectError),
    ) -> Result<Client, ConnectError> {
        let spare = lock(&self.spare).take();
        match spare {
            Some(client) if client.is_closed() => close(client),
            Some(client) => return Ok(client),
            None => {}
        }
        let targets = self.targets.as_ref().map_err(|reason| Failure::Parameters(reason))?;
        let mut wait = Wait::telling(tell);
        let mut untried: Vec<_> =
            targets.iter().map(|target| (target, target.address.clone())).collect();
        untried.sort_by_cached_key(|_| self.random());
        let mut failures = Vec::new();
        while !untried.is_empty() {
            // Those that have not answered the last time go last, and the others keep their order.
            untried.sort_by_cached_key(|(target, address)| {
                let known = target.known_addresses();
                let known = address.as_ref().map_or(&*known, slice::from_ref);
                !known.is_empty() && known.iter().all(unresponsive::contains)
            });
            let (target, address) = untried.remove(0);
            // Each that is still untried keeps an equal share of the time.
            let parts = u32::try_from(untried.len()).unwrap_or(u32::MAX).saturating_add(1);
            let now = Instant::now();
            wait.until = now + (deadline.saturating_duration_since(now) / parts).min(self.limit);
            let failure = match &address {
                Some(address) => match self.log_in(target, address, &mut wait) {
                    Ok(client) => return Ok(client),
                    Err(failure) => failure,
                },
                None => match self.look_up(target, &mut wait) {
                    Ok(addresses) => {
                        let found = addresses.into_iter().map(|address| (target, Some(address)));
                        untried.splice(0..0, found);
                        continue;
                    }
                    Err(failure) => failure,
                },
            };
            failures.push((target.name_with(address.as_ref()), failure));
        }
        Err(ConnectError::new(failures))
    }

    /// What hosts and addresses are sorted by. If it is the same for all they keep their order.
    fn random(&self) -> u64 {
        if self.in_random_order { RandomState::new().hash_one(0) } else { 0 }
    }

    fn look_up(&self, target: &Arc<Target>, wait: &mut Wait<'_>) -> Result<Vec<Address>, Failure> {
        let target = Arc::clone(target);
        let addresses = spawn("pg-lookup", move || target.look_up(), drop)?;
        let addresses = wait.receive(|| Failure::NameServer, &addresses)?;
        let mut addresses = addresses.map_err(Failure::LookUp)?;
        addresses.sort_by_cached_key(|_| self.random());
        Ok(addresses)
    }

    fn log_in(
        self: &Arc<Self>,
        target: &Target,
        address: &Address,
        wait: &mut Wait<'_>,
    ) -> Result<Client, Failure> {
        if self.hung_providers.load(Ordering::Relaxed) >= MOST_HUNG_PROVIDERS {
            return Err(Failure::HungProviders);
        }
        let began = Instant::now();
        let no_answer =
            || Failure::NoAnswer { address: address.name.clone(), within: began.elapsed() };
        let mut config = target.config(address);
        let login = wait.bounded(no_answer, |until| Login::begin(address, &config, until))?;
        let login = Arc::new(login);
        if let Some(provider) = &self.password_provider {
            config.password(self.password(Arc::clone(provider), wait)?);
        }
        let start = Instant::now();
        let (connector, counted) = (Arc::clone(self), Arc::clone(&login));
        let work = move || connector.run_login(&config, &counted);
        let connector = Arc::clone(self);
        let client = spawn("pg-login", work, move |late| connector.keep_for_a_while(late))?;
        let outcome = wait.receive(no_answer, &client);
        if outcome.is_err() {
            login.not_answered_since(start);
        }
        outcome?
    }

    /// The password that the provider gives. While it is asked the login is counted, but not begun.
    fn password(
        self: &Arc<Self>,
        provider: Arc<PasswordProvider>,
        wait: &mut Wait<'_>,
    ) -> Result<String, Failure> {
        let began = Instant::now();
        let no_answer = || Failure::NoPassword { within: began.elapsed() };
        let connector = Arc::clone(self);
        let late = move |_| {
            connector.hung_providers.fetch_sub(1, Ordering::Relaxed);
        };
        let ask = move || catch_unwind(AssertUnwindSafe(|| provider()));
        let password = spawn("pg-password", ask, late)?;
        let hung = Hung(&self.hung_providers);
        let answer = wait.receive(no_answer, &password)?;
        mem::forget(hung);
        // What a panic says may hold the password.
        answer.map_err(|_| Failure::ProviderPanicked)?.map_err(Failure::Provider)
    }

    /// On a thread of its own.
    fn run_login(&self, config: &Config, login: &Login) -> Result<Client, Failure> {
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.log_in)(config)))
            .map_err(|panic| Failure::LoginPanicked(message(panic.as_ref())))?;
        if outcome.as_ref().is_err_and(is_timeout) {
            login.not_answered_since(began);
        } else {
            login.answered();
        }
        outcome.map_err(Failure::Login)
    }

    /// On the thread of the login, which may wait until a connection is closed.
    fn keep_for_a_while(&self, late: Result<Client, Failure>) {
        let Ok(client) = late else { return };
        let mut spare = lock(&self.spare);
        if spare.is_some() {
            drop(spare);
            return drop(client);
        }
        *spare = Some(client);
        drop(spare);
        thread::sleep(SPARE_LIVES_FOR);
        let unused = lock(&self.spare).take();
        drop(unused);
    }
}

/// Counts a call of the provider as hung when its caller gives up, by a panic too.
struct Hung<'a>(&'a AtomicUsize);

impl Drop for Hung<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Bounds the time that a dead network can take, where the caller has not.
fn bound_network_waits(config: &mut Config) {
    let seconds = Duration::from_secs;
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(seconds(10));
    }
    if config.get_keepalives_idle() == Config::new().get_keepalives_idle() {
        config.keepalives_idle(seconds(10));
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(seconds(3));
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(3);
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a message").to_owned()
}

fn is_timeout(error: &postgres::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Sender, channel};

    use postgres::NoTls;

    use super::*;

    fn connector(listener: &TcpListener) -> Arc<Connector> {
        let port = listener.local_addr().expect("bound").port();
        let params = format!("host=127.0.0.1 port={port} user=u sslmode=disable");
        let log_in = |config: &Config| config.connect(NoTls);
        Connector::new(params.parse().expect("valid parameters"), None, log_in)
    }

    /// Reads the `StartupMessage`, as a server does.
    fn accept(listener: &TcpListener) -> TcpStream {
        let (mut client, _) = listener.accept().expect("a login");
        let mut length = [0; 4];
        client.read_exact(&mut length).expect("a message");
        let length = usize::try_from(u32::from_be_bytes(length)).expect("32 bits");
        client.read_exact(&mut vec![0; length - 4]).expect("the whole message");
        client
    }

    /// `AuthenticationOk` and `ReadyForQuery`.
    fn let_in(client: &mut TcpStream) {
        client.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").expect("it listens");
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    /// It returns when it is sent its answer.
    fn give_a_provider_that_hangs(connector: &mut Arc<Connector>) -> Sender<String> {
        let (answer, answers) = channel();
        let answers = Mutex::new(answers);
        let connector = Arc::get_mut(connector).expect("the only handle");
        connector.password_provider = Some(Arc::new(move || {
            let answers = lock(&answers);
            Ok(answers.recv()?)
        }));
        answer
    }

    fn wait_until_there_is_a_spare(connector: &Connector) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while lock(&connector.spare).is_none() {
            assert!(Instant::now() < deadline, "it takes too long");
            thread::yield_now();
        }
    }

    #[test]
    fn a_connection_that_comes_too_late_is_given_to_the_next_caller() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let connector = connector(&listener);
        let error = connector.connect(soon(), &mut drop).map(drop).expect_err("no answer");
        assert!(error.to_string().starts_with("no answer from 127.0.0.1:"), "{error}");
        let mut server = accept(&listener);
        let_in(&mut server);
        wait_until_there_is_a_spare(&connector);
        close(connector.connect(soon(), &mut drop).expect("the one that came late"));
        listener.set_nonblocking(true).expect("a socket");
        assert!(listener.accept().is_err(), "there was no other login");
    }

    #[test]
    fn of_the_connections_that_come_too_late_all_are_closed_that_nobody_takes() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let connector = connector(&listener);
        let mut servers = Vec::new();
        for _ in 0..3 {
            connector.connect(soon(), &mut drop).map(drop).expect_err("no answer");
            servers.push(accept(&listener));
        }
        servers.iter_mut().for_each(let_in);
        for mut server in servers {
            server.read_to_end(&mut Vec::new()).expect("it is closed");
        }
    }

    #[test]
    fn a_provider_that_hangs_is_not_held_against_the_host() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = Address::from(listener.local_addr().expect("bound"));
        let mut connector = connector(&listener);
        let answer = give_a_provider_that_hangs(&mut connector);
        // So long that an address would be held to be unresponsive.
        let deadline = Instant::now() + Duration::from_millis(1_500);
        let error = connector.connect(deadline, &mut drop).map(drop).expect_err("it hangs");
        assert!(error.to_string().starts_with("the password provider did not answer"), "{error}");
        assert!(!unresponsive::contains(&address));
        assert_eq!(connector.hung_providers.load(Ordering::Relaxed), 1);

        // It comes back, and does not log in for a caller that has given up.
        answer.send("p".to_owned()).expect("it waits");
        while connector.hung_providers.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        listener.set_nonblocking(true).expect("a socket");
        assert!(listener.accept().is_err(), "there was no login");
        listener.set_nonblocking(false).expect("a socket");

        answer.send("p".to_owned()).expect("it is asked again");
        thread::scope(|scope| {
            scope.spawn(|| let_in(&mut accept(&listener)));
            let deadline = Instant::now() + Duration::from_secs(60);
            close(connector.connect(deadline, &mut drop).expect("a connection"));
        });
    }

    #[test]
    fn a_provider_that_hangs_is_counted_until_it_returns_even_if_the_observer_panics() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let mut connector = connector(&listener);
        let answer = give_a_provider_that_hangs(&mut connector);
        let deadline = Instant::now() + Duration::from_secs(60);
        let connect = || connector.connect(deadline, &mut |_| panic!("on purpose")).map(drop);
        assert!(catch_unwind(AssertUnwindSafe(connect)).is_err());
        assert_eq!(connector.hung_providers.load(Ordering::Relaxed), 1);
        answer.send("p".to_owned()).expect("it waits");
        // The thread of the provider has its handle until it has counted itself out.
        while Arc::strong_count(&connector) > 1 {
            thread::yield_now();
        }
        assert_eq!(connector.hung_providers.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_login_that_panics_is_an_error_at_once_and_says_why() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let mut connector = connector(&listener);
        let shared = Arc::get_mut(&mut connector).expect("the only handle");
        shared.log_in = Box::new(|_| panic!("no {} left", "descriptor"));
        let error = connector.connect(Instant::now() + Duration::from_secs(60), &mut drop);
        let error = error.map(drop).expect_err("it panics");
        assert_eq!(error.to_string(), "the login panicked: no descriptor left");
        assert!(!error.is_refusal());
    }

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
}
