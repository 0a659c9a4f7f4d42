//! The addresses that do not answer logins, and how many logins are under way: one record for the
//! process.
//!
//! `postgres` bounds the connection attempt of the network and nothing after it. A login that nobody
//! answers cannot be called off: it keeps a thread and a socket until the peer hangs up. So there are
//! never more than a few of them, and an address that owes an answer gets no other login before it has
//! answered a probe, which has time-outs.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use postgres::Config;

use super::targets::Address;
use crate::sync::lock;

/// How many logins may be under way at one address.
const MOST_LOGINS: usize = 4;
/// A login of this age is not counted any more.
const LOGIN_COUNTS_FOR: Duration = Duration::from_secs(60);
/// How long an address has to answer a login before it is held to be unresponsive.
const FAIR_TIME: Duration = Duration::from_secs(1);
/// For how long an address is held to be unresponsive. After that a login is tried without a probe.
const UNRESPONSIVE_FOR: Duration = Duration::from_secs(10 * 60);
/// How long each step of the first probe, and of the later ones, may take. They are short because
/// a proxy may never answer a probe that it took before it recovered.
const FIRST_PROBE_STEP: Duration = Duration::from_secs(1);
const LONGEST_PROBE_STEP: Duration = Duration::from_secs(2);

static RECORDS: Mutex<Records> = Mutex::new(Records::new());
static CHANGED: Condvar = Condvar::new();

type Records = BTreeMap<Address, Record>;

#[derive(Default)]
struct Record {
    /// When those began that are under way, by their numbers.
    logins: BTreeMap<u64, Instant>,
    unresponsive_since: Option<Instant>,
}

/// Whether the last login at the address was not answered.
pub(crate) fn contains(address: &Address) -> bool {
    let mut records = lock(&RECORDS);
    forget_expired(&mut records, Instant::now());
    records.get(address).is_some_and(|record| record.unresponsive_since.is_some())
}

/// A login that is under way, and counted until this is dropped.
pub(crate) struct Login {
    address: Address,
    id: u64,
}

impl Login {
    /// Waits until another login may begin at the address. `None`: it may not before the limit, or
    /// the address does not answer a probe.
    pub(crate) fn begin(address: &Address, config: &Config, until: Instant) -> Option<Self> {
        let mut has_answered = false;
        let mut records = lock(&RECORDS);
        loop {
            let now = Instant::now();
            forget_expired(&mut records, now);
            let record = records.entry(address.clone()).or_default();
            let needs_probe = !has_answered && record.needs_probe(now);
            if let (Some(peer), true) = (address.tcp, needs_probe) {
                drop(records);
                has_answered = answers_in_time(peer, &startup_message(config), until);
                records = lock(&RECORDS);
                if !has_answered {
                    // The logins under way may never be answered, not even when the peer has recovered. They
                    // need not be counted either: there is none before a probe is answered.
                    let record = records.entry(address.clone()).or_default();
                    record.logins.clear();
                    record.unresponsive_since.get_or_insert_with(Instant::now);
                    CHANGED.notify_all();
                    return None;
                }
                continue;
            }
            let place_is_free_at = record.place_is_free_at(address, has_answered, now);
            if place_is_free_at.is_some_and(|at| at <= now) {
                let id = record.add_login(now);
                return Some(Self { address: address.clone(), id });
            }
            if now >= until {
                return None;
            }
            let pause = place_is_free_at.map_or(until, |at| at.min(until)) - now;
            records =
                CHANGED.wait_timeout(records, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The peer has answered, whatever it was. Those that began earlier are not counted any more: if
    /// they were going to be answered, they would have been.
    pub(crate) fn answered(&self) {
        self.update(|record, id| {
            record.logins = record.logins.split_off(&(id + 1));
            record.unresponsive_since = None;
        });
    }

    /// The peer has not answered since `start`. The login remains counted.
    pub(crate) fn not_answered_since(&self, start: Instant) {
        let now = Instant::now();
        if now.duration_since(start) >= FAIR_TIME {
            self.update(|record, _| *record.unresponsive_since.get_or_insert(now));
        }
    }

    fn update<T>(&self, change: impl FnOnce(&mut Record, u64) -> T) {
        let mut records = lock(&RECORDS);
        change(records.entry(self.address.clone()).or_default(), self.id);
        forget_expired(&mut records, Instant::now());
        CHANGED.notify_all();
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.update(|record, id| record.logins.remove(&id));
    }
}

impl Record {
    fn add_login(&mut self, start: Instant) -> u64 {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        self.logins.insert(id, start);
        id
    }

    /// Whether there is a reason to doubt that another login would be answered.
    fn needs_probe(&self, now: Instant) -> bool {
        let oldest = self.logins.values().next();
        let is_owed_answers = self.logins.len() >= MOST_LOGINS
            && oldest.is_some_and(|start| now.duration_since(*start) >= FAIR_TIME);
        self.unresponsive_since.is_some() || is_owed_answers
    }

    /// When another login may begin, if one may before another has ended.
    fn place_is_free_at(
        &self,
        address: &Address,
        has_answered: bool,
        now: Instant,
    ) -> Option<Instant> {
        // No network loses an answer of a Unix socket, so a server that goes on answers the login that it
        // owes. A probe could do no more, and its connect has no time-out.
        let is_stuck_socket = address.tcp.is_none() && self.unresponsive_since.is_some();
        let most = if is_stuck_socket { 1 } else { MOST_LOGINS };
        if self.logins.len() < most {
            return Some(now);
        }
        // Those under way may be lost although the peer has recovered. Or it is a pooler whose
        // server is away, and they wait there: the more there are, the later the next one.
        let last = self.logins.values().next_back().filter(|_| has_answered)?;
        Some(*last + FAIR_TIME * u32::try_from(self.logins.len()).unwrap_or(u32::MAX))
    }
}

fn forget_expired(records: &mut Records, now: Instant) {
    records.retain(|_, record| {
        record.logins.retain(|_, start| now.duration_since(*start) < LOGIN_COUNTS_FOR);
        record.unresponsive_since =
            record.unresponsive_since.filter(|since| now.duration_since(*since) < UNRESPONSIVE_FOR);
        !record.logins.is_empty() || record.unresponsive_since.is_some()
    });
}

/// Probes the address until it answers or the limit is reached, with more time for each step the
/// second time: a network may be slow.
fn answers_in_time(peer: SocketAddr, startup: &[u8], until: Instant) -> bool {
    let mut longest_step = FIRST_PROBE_STEP;
    while Instant::now() < until {
        if answers_probe(peer, startup, longest_step, until) {
            return true;
        }
        longest_step = LONGEST_PROBE_STEP;
    }
    false
}

/// Whether the peer answers the first messages of a login. A refusal is an answer, and so is hanging
/// up. The answer `S` is one, too: what follows it is up to the TLS connector.
fn answers_probe(peer: SocketAddr, startup: &[u8], longest_step: Duration, until: Instant) -> bool {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    const NO_TLS: u8 = b'N';
    let limit = || {
        let left = until.saturating_duration_since(Instant::now());
        left.clamp(Duration::from_millis(1), longest_step)
    };
    let probe = || -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&peer, limit())?;
        let mut answer = [0];
        for message in [&SSL_REQUEST, startup] {
            stream.set_write_timeout(Some(limit()))?;
            stream.write_all(message)?;
            stream.set_read_timeout(Some(limit()))?;
            if stream.read(&mut answer)? == 0 || answer != [NO_TLS] {
                break;
            }
        }
        Ok(())
    };
    !probe().is_err_and(|error| {
        matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
    })
}

/// PostgreSQL's message of that name, in protocol 3.0.
fn startup_message(config: &Config) -> Vec<u8> {
    const PROTOCOL: &[u8] = &[0, 3, 0, 0];
    let parameters = [
        ("user", config.get_user()),
        ("database", config.get_dbname()),
        ("application_name", config.get_application_name()),
        // A proxy of a hosted server may find the database by these.
        ("options", config.get_options()),
    ];
    let text =
        |(name, value): (_, Option<&str>)| Some(format!("{name}\0{}\0", value?.replace('\0', "")));
    let parameters: String = parameters.into_iter().filter_map(text).collect();
    let message = [PROTOCOL, parameters.as_bytes(), b"\0"].concat();
    let length = u32::try_from(message.len() + 4).unwrap_or(u32::MAX);
    [length.to_be_bytes().as_slice(), &message].concat()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn config() -> Config {
        "user=u dbname=d".parse().expect("valid parameters")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A listener, and its address. The tests share one record, so each has an address of its own.
    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        (listener, address)
    }

    fn long_ago() -> Instant {
        Instant::now().checked_sub(FAIR_TIME).expect("the machine has run for a second")
    }

    #[test]
    fn at_most_a_few_logins_are_under_way_and_a_further_one_waits_for_a_place() {
        let (_listener, peer) = listener();
        let address = Address::from(peer);
        let begin = |until| Login::begin(&address, &config(), until);
        let mut logins: Vec<_> =
            (0..MOST_LOGINS).map(|_| begin(soon()).expect("a place")).collect();
        assert!(begin(soon()).is_none());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| begin(far()).is_some());
            drop(logins.pop());
            assert!(waiting.join().expect("no panic"));
        });
        drop(logins);
        assert!(!lock(&RECORDS).contains_key(&address), "nothing is left over");
    }

    #[test]
    fn an_address_is_unresponsive_until_a_login_is_answered() {
        let (_listener, peer) = listener();
        let address = Address::from(peer);
        let login = Login::begin(&address, &config(), soon()).expect("a place");
        login.not_answered_since(Instant::now());
        assert!(!contains(&address), "it had no time to answer");
        login.not_answered_since(long_ago());
        assert!(contains(&address));
        // It is still counted, until a probe shows that it may never be answered.
        assert_eq!(lock(&RECORDS)[&address].logins.len(), 1);
        assert!(Login::begin(&address, &config(), soon()).is_none(), "nobody accepts");
        assert_eq!(lock(&RECORDS)[&address].logins.len(), 0);
        assert!(contains(&address));
        login.answered();
        assert!(!contains(&address));
        assert!(!lock(&RECORDS).contains_key(&address), "nothing is left over");
    }

    #[test]
    fn a_login_begins_at_an_unresponsive_address_that_answers_a_probe() {
        let (listener, peer) = listener();
        let address = Address::from(peer);
        let login = Login::begin(&address, &config(), soon()).expect("a place");
        login.not_answered_since(long_ago());
        drop(listener);
        assert!(Login::begin(&address, &config(), far()).is_some(), "a refusal is an answer");
        login.answered();
    }

    /// Answers every probe by hanging up.
    fn hang_up_on_everybody(listener: TcpListener) {
        thread::spawn(move || listener.incoming().for_each(drop));
    }

    /// Has as many logins under way as there may be, each of that age.
    fn begin_logins(address: &Address, age: Duration) {
        let start = Instant::now().checked_sub(age).expect("the machine has run for so long");
        for _ in 0..MOST_LOGINS {
            lock(&RECORDS).entry(address.clone()).or_default().add_login(start);
        }
    }

    #[test]
    fn logins_that_were_lost_in_an_outage_do_not_keep_an_address_that_has_recovered_from_being_used()
     {
        let (listener, peer) = listener();
        let address = Address::from(peer);
        hang_up_on_everybody(listener);
        begin_logins(&address, FAIR_TIME * 5);
        let login = Login::begin(&address, &config(), far()).expect("it answers probes");
        // It may be a pooler that answers probes and no login.
        let limit = Instant::now() + Duration::from_millis(200);
        assert!(Login::begin(&address, &config(), limit).is_none());
        login.answered();
        assert!(!lock(&RECORDS).contains_key(&address), "nothing is left over");
    }

    #[test]
    fn an_address_where_all_logins_are_unanswered_has_to_answer_a_probe() {
        let (_listener, peer) = listener();
        let address = Address::from(peer);
        begin_logins(&address, FAIR_TIME);
        assert!(!contains(&address), "no call has waited for its fair time");
        assert!(Login::begin(&address, &config(), soon()).is_none(), "nobody accepts");
        assert!(contains(&address));
    }

    #[test]
    fn an_unresponsive_unix_socket_gets_no_login_before_the_last_one_has_ended() {
        let address = Address { name: "/no such folder/.s.PGSQL.1".to_owned(), tcp: None };
        let login = Login::begin(&address, &config(), soon()).expect("a place");
        login.not_answered_since(long_ago());
        assert!(Login::begin(&address, &config(), soon()).is_none());
        drop(login);
        let another = Login::begin(&address, &config(), soon());
        assert!(contains(&address));
        another.expect("a place").answered();
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let address = Address::from(SocketAddr::from(([10, 0, 0, 1], 1)));
        let start = Instant::now();
        let mut records = Records::new();
        let record = Record { logins: [(1, start)].into(), unresponsive_since: Some(start) };
        records.insert(address.clone(), record);
        forget_expired(&mut records, start + LOGIN_COUNTS_FOR);
        assert!(records[&address].logins.is_empty());
        forget_expired(&mut records, start + UNRESPONSIVE_FOR);
        assert!(records.is_empty());
    }

    #[test]
    fn an_answer_of_any_kind_is_one_and_silence_is_none() {
        let (listener, peer) = listener();
        let short = Duration::from_millis(200);
        let probe =
            |longest_step| answers_probe(peer, &startup_message(&config()), longest_step, far());
        assert!(!probe(short), "nobody accepts");
        listener.accept().expect("the probe of before");
        for (to_ssl_request, to_startup, is_answer) in [
            (b"S".as_slice(), None, true),
            (b"E", None, true),
            (b"", None, true),
            (b"N", Some(b"R".as_slice()), true),
            (b"N", Some(b""), true),
            (b"N", None, false),
        ] {
            let answered = thread::scope(|scope| {
                let longest_step = if is_answer { Duration::from_secs(60) } else { short };
                let probing = scope.spawn(move || probe(longest_step));
                let (mut client, _) = listener.accept().expect("the probe");
                let mut request = [0; 8];
                client.read_exact(&mut request).expect("an SSLRequest");
                client.write_all(to_ssl_request).expect("it listens");
                if to_ssl_request == b"N" {
                    let expected = startup_message(&config());
                    let mut request = vec![0; expected.len()];
                    client.read_exact(&mut request).expect("a StartupMessage");
                    assert_eq!(request, expected);
                }
                client.write_all(to_startup.unwrap_or_default()).expect("it listens");
                let _silent = (!is_answer).then_some(client);
                probing.join().expect("no panic")
            });
            assert_eq!(answered, is_answer, "{to_ssl_request:?} {to_startup:?}");
        }
        drop(listener);
        assert!(probe(Duration::from_secs(60)), "refused");
    }

    #[test]
    fn the_startup_message_is_that_of_the_protocol() {
        let expected = b"\0\0\0\x1b\0\x03\0\0user\0u\0database\0d\0\0";
        assert_eq!(startup_message(&config()), expected);
    }
}
