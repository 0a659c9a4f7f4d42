//! How one connection is made: one host after the other, each within its limit.

use std::any::Any;
use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::LoadBalanceHosts;
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Config, Socket};

use super::close::close;
use super::connect_error::{ConnectError, Failure};
use super::targets::{Address, Target};
use super::unresponsive::{self, Login};
use super::waiting::{Notice, bounded, receive};

/// How long one address may take to answer a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a login may take beyond the time that the network has.
const LOGIN_MARGIN: Duration = Duration::from_secs(1);
/// How long data that was sent may stay unacknowledged.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// When, how often and how many times a silent peer is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_RETRIES: u32 = 3;
/// What `postgres` says when the parameters do not name it.
const POSTGRES_KEEPALIVE_IDLE: Duration = Duration::from_secs(2 * 60 * 60);
/// How many calls of a password provider may hang before no other is made.
const MOST_HUNG_PROVIDERS: isize = 4;
/// How long a connection is kept whose caller has given up.
const SPARE_LIVES_FOR: Duration = Duration::from_secs(1);

/// Gives the password for one connection attempt.
pub(crate) type PasswordProvider =
    dyn Fn() -> Result<String, Box<dyn StdError + Send + Sync>> + Send + Sync;

type LogIn = dyn Fn(&Config) -> Result<Client, postgres::Error> + Send + Sync;

/// Makes connections. A clone is another handle on the same connector.
#[derive(Clone)]
pub(crate) struct Connector(Arc<Shared>);

struct Shared {
    targets: Result<Vec<Arc<Target>>, &'static str>,
    in_random_order: bool,
    /// How long one address may take to give a connection.
    limit: Duration,
    log_in: Box<LogIn>,
    password: Option<Arc<PasswordProvider>>,
    hung_providers: AtomicIsize,
    /// A connection that was made after its caller had given up.
    spare: Mutex<Option<Client>>,
}

impl Connector {
    pub(crate) fn new<T>(
        mut config: Config,
        tls: T,
        password: Option<Arc<PasswordProvider>>,
    ) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        bound_network_waits(&mut config);
        let time = config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
        Self(Arc::new(Shared {
            targets: Target::list(&config)
                .map(|targets| targets.into_iter().map(Arc::new).collect()),
            in_random_order: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            limit: time.saturating_add(LOGIN_MARGIN),
            log_in: Box::new(move |config| config.connect(tls.clone())),
            password,
            hung_providers: AtomicIsize::new(0),
            spare: Mutex::default(),
        }))
    }

    /// A connection to the first address that gives one. It is tried for no longer than until the
    /// deadline. An address that has not answered the last time is tried after the others. `waiting` is called
    /// once, with what is being waited for, if that takes almost a second.
    pub(crate) fn connect(
        &self,
        deadline: Instant,
        waiting: &mut dyn FnMut(ConnectError),
    ) -> Result<Client, ConnectError> {
        let spare = self.0.spare().take();
        match spare {
            Some(client) if client.is_closed() => close(client),
            Some(client) => return Ok(client),
            None => {}
        }
        let targets = self.0.targets.as_ref().map_err(|reason| Failure::Parameters(reason))?;
        let mut untried: Vec<_> = targets.iter().map(|target| (target, None)).collect();
        self.shuffle(&mut untried);
        untried.sort_by_cached_key(|(target, _)| {
            let known = target.known_addresses();
            !known.is_empty() && known.iter().all(unresponsive::contains)
        });
        let mut untried = VecDeque::from(untried);
        let mut failures = Vec::new();
        let mut notice = Notice::to(waiting);
        while let Some((target, address)) = untried.pop_front() {
            let until = self.limit(deadline, untried.len());
            let Some(address) = address else {
                match self.addresses(target, until, &mut notice) {
                    Ok(addresses) => {
                        let addresses =
                            addresses.into_iter().map(|address| (target, Some(address)));
                        let (last, first): (Vec<_>, Vec<_>) =
                            addresses.partition(|(_, address)| {
                                address.as_ref().is_some_and(unresponsive::contains)
                            });
                        first.into_iter().rev().for_each(|next| untried.push_front(next));
                        untried.extend(last);
                    }
                    Err(failure) => failures.push((target.name().to_owned(), failure)),
                }
                continue;
            };
            match self.log_in(target, &address, until, &mut notice) {
                Ok(client) => return Ok(client),
                Err(failure) => failures.push((target.name_with(&address), failure)),
            }
        }
        Err(ConnectError::new(failures))
    }

    /// When the time of one attempt is over. Each that is still untried keeps an equal share.
    fn limit(&self, deadline: Instant, others: usize) -> Instant {
        let now = Instant::now();
        let attempts = u32::try_from(others).unwrap_or(u32::MAX).saturating_add(1);
        now + (deadline.saturating_duration_since(now) / attempts).min(self.0.limit)
    }

    fn shuffle<T>(&self, items: &mut [T]) {
        if self.0.in_random_order {
            let random = RandomState::new();
            let mut numbers = 0..;
            items.sort_by_cached_key(|_| random.hash_one(numbers.next()));
        }
    }

    fn addresses(
        &self,
        target: &Arc<Target>,
        until: Instant,
        notice: &mut Notice<'_>,
    ) -> Result<Vec<Address>, Failure> {
        let mut addresses = if let Some(address) = target.address() {
            vec![address.clone()]
        } else {
            let target = Arc::clone(target);
            let outcome = bounded("pg-lookup", move || target.look_up(), drop)?;
            notice
                .wait(until, || Failure::NameServer, |until| receive(&outcome, until))
                .ok_or(Failure::NameServer)?
                .map_err(Failure::LookUp)?
        };
        self.shuffle(&mut addresses);
        Ok(addresses)
    }

    fn log_in(
        &self,
        target: &Target,
        address: &Address,
        until: Instant,
        notice: &mut Notice<'_>,
    ) -> Result<Client, Failure> {
        let began = Instant::now();
        let no_answer = |within| Failure::NoAnswer { address: address.to_string(), within };
        if self.0.hung_providers.load(Ordering::Relaxed) >= MOST_HUNG_PROVIDERS {
            return Err(Failure::HungProviders);
        }
        let config = target.config(address);
        let login = notice.wait(
            until,
            || no_answer(began.elapsed()),
            |until| Login::begin(address, &config, until),
        );
        let within = until.saturating_duration_since(began);
        let login = Arc::new(login.ok_or_else(|| no_answer(within))?);
        // When the login itself began; `None` if its caller gave up before that.
        let start = Arc::new(OnceLock::new());
        if self.0.password.is_none() {
            start.get_or_init(|| Some(Instant::now()));
        }
        let work = {
            let (shared, login, start) =
                (Arc::clone(&self.0), Arc::clone(&login), Arc::clone(&start));
            move || shared.log_in(config, &login, &start)
        };
        let shared = Arc::clone(&self.0);
        let keep = move |late: Result<Client, Failure>| {
            if let Ok(client) = late {
                shared.keep_for_a_while(client);
            }
        };
        let outcome = bounded("pg-login", work, keep)?;
        let waits_for = || match start.get() {
            Some(_) => no_answer(began.elapsed()),
            None => Failure::NoPassword { within: began.elapsed() },
        };
        if let Some(outcome) = notice.wait(until, waits_for, |until| receive(&outcome, until)) {
            return outcome;
        }
        drop(outcome);
        let Some(start) = start.get_or_init(|| None) else {
            self.0.hung_providers.fetch_add(1, Ordering::Relaxed);
            login.forget();
            return Err(Failure::NoPassword { within });
        };
        login.not_answered_since(*start);
        Err(no_answer(within))
    }
}

impl Shared {
    /// On a thread of its own: nothing bounds a login, nor a password provider.
    fn log_in(
        &self,
        mut config: Config,
        login: &Login,
        start: &OnceLock<Option<Instant>>,
    ) -> Result<Client, Failure> {
        if let Some(provider) = &self.password {
            let password = catch_unwind(AssertUnwindSafe(|| provider()));
            if start.set(Some(Instant::now())).is_err() {
                self.hung_providers.fetch_sub(1, Ordering::Relaxed);
                // Its caller has said so, and does not read this.
                return Err(Failure::NoPassword { within: self.limit });
            }
            // What a panic says may hold the password.
            config.password(
                password.map_err(|_| Failure::ProviderPanicked)?.map_err(Failure::Provider)?,
            );
        }
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.log_in)(&config)))
            .map_err(|panic| Failure::LoginPanicked(message(panic.as_ref())))?;
        if outcome.as_ref().is_err_and(is_timeout) {
            login.not_answered_since(began);
        } else {
            login.answered();
        }
        outcome.map_err(Failure::Login)
    }

    fn spare(&self) -> MutexGuard<'_, Option<Client>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On the thread of the login, which may wait until the connection is closed.
    fn keep_for_a_while(&self, client: Client) {
        let mut spare = self.spare();
        if spare.is_some() {
            drop(spare);
            return drop(client);
        }
        *spare = Some(client);
        drop(spare);
        thread::sleep(SPARE_LIVES_FOR);
        let unused = self.spare().take();
        drop(unused);
    }
}

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

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a message").to_owned()
}

fn is_timeout(error: &postgres::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use postgres::NoTls;

    use super::*;

    fn connector(listener: &TcpListener) -> Connector {
        let port = listener.local_addr().expect("bound").port();
        let params = format!("host=127.0.0.1 port={port} user=u sslmode=disable");
        Connector::new(params.parse().expect("valid parameters"), NoTls, None)
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

    fn wait_until_there_is_a_spare(connector: &Connector) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while connector.0.spare().is_none() {
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
        let address = Address::Tcp(listener.local_addr().expect("bound"));
        let mut connector = connector(&listener);
        let (answer, answers) = std::sync::mpsc::channel();
        let answers = Mutex::new(answers);
        let shared = Arc::get_mut(&mut connector.0).expect("the only handle");
        shared.password = Some(Arc::new(move || {
            let answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(answers.recv()?)
        }));
        // So long that an address would be held to be unresponsive.
        let deadline = Instant::now() + Duration::from_millis(1_500);
        let error = connector.connect(deadline, &mut drop).map(drop).expect_err("it hangs");
        assert!(error.to_string().starts_with("the password provider did not answer"), "{error}");
        assert!(!unresponsive::contains(&address));
        assert_eq!(connector.0.hung_providers.load(Ordering::Relaxed), 1);

        // It comes back, and does not log in for a caller that has given up.
        answer.send("p".to_owned()).expect("it waits");
        while connector.0.hung_providers.load(Ordering::Relaxed) > 0 {
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
    fn a_login_that_panics_is_an_error_at_once_and_says_why() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let mut connector = connector(&listener);
        let shared = Arc::get_mut(&mut connector.0).expect("the only handle");
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
