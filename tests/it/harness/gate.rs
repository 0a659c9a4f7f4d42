use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Takes connections like a proxy, and does with each new one what it is told at the moment: leads it
/// to a server, accepts it and never says a word, refuses it as pgpool does, or lets it wait as PgBouncer
/// does.
pub(crate) struct Gate {
    port: u16,
    server: Arc<AtomicU16>,
    accepted: Arc<AtomicUsize>,
    unanswered: Arc<AtomicUsize>,
    forged: Arc<Mutex<Option<Forgery>>>,
    led: Arc<Mutex<HashMap<u16, Led>>>,
}

/// A connection that was led to a server, which knows it by its port.
struct Led {
    client: TcpStream,
    is_silent: Arc<AtomicBool>,
}

/// What the client gets as the answer to the next request with this text in it.
struct Forgery {
    text: &'static str,
    answer: Vec<u8>,
    /// Whether the server's own answer follows.
    is_prefix: bool,
}

const MUTE: u16 = 0;
const REFUSING: u16 = 1;
const ANSWERING_KNOCKS: u16 = 2;

impl Gate {
    pub(crate) fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let gate = Self {
            port: listener.local_addr().expect("a bound address").port(),
            server: Arc::new(AtomicU16::new(server_port)),
            accepted: Arc::default(),
            unanswered: Arc::default(),
            forged: Arc::default(),
            led: Arc::default(),
        };
        let led = Arc::clone(&gate.led);
        let (server, accepted) = (Arc::clone(&gate.server), Arc::clone(&gate.accepted));
        let (unanswered, forged) = (Arc::clone(&gate.unanswered), Arc::clone(&gate.forged));
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                accepted.fetch_add(1, Ordering::SeqCst);
                match server.load(Ordering::SeqCst) {
                    MUTE => {
                        let unanswered = Arc::clone(&unanswered);
                        unanswered.fetch_add(1, Ordering::SeqCst);
                        thread::spawn(move || {
                            swallow(client);
                            unanswered.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                    ANSWERING_KNOCKS => {
                        let (server, unanswered) = (Arc::clone(&server), Arc::clone(&unanswered));
                        let (forged, led) = (Arc::clone(&forged), Arc::clone(&led));
                        thread::spawn(move || let_wait(client, &server, &unanswered, forged, &led));
                    }
                    REFUSING => drop(thread::spawn(move || refuse(client))),
                    port => {
                        let server = TcpStream::connect(("127.0.0.1", port)).expect("the server");
                        lead(&client, &server, Arc::clone(&forged), &led);
                    }
                }
            }
        });
        gate
    }

    pub(crate) fn mute() -> Self {
        Self::to(MUTE)
    }

    /// New connections are led there from now on; those that are there stay where they are.
    pub(crate) fn lead_to(&self, server_port: u16) {
        self.server.store(server_port, Ordering::SeqCst);
    }

    pub(crate) fn fall_silent(&self) {
        self.lead_to(MUTE);
    }

    /// New connections are refused from now on.
    pub(crate) fn refuse(&self) {
        self.lead_to(REFUSING);
    }

    /// New connections are told that there is no TLS, and a login waits until they are led somewhere.
    pub(crate) fn answer_knocks_only(&self) {
        self.lead_to(ANSWERING_KNOCKS);
    }

    /// No byte passes any longer on the connections that are there, which stay open; new ones are led on.
    pub(crate) fn silence_established(&self) {
        self.led().values().for_each(|led| led.is_silent.store(true, Ordering::SeqCst));
    }

    /// The same for the connection that the server knows by this port.
    pub(crate) fn silence(&self, port: u16) {
        self.led()[&port].is_silent.store(true, Ordering::SeqCst);
    }

    /// Hangs up on the clients whose connections are silent.
    pub(crate) fn hang_up(&self) {
        for led in self.led().values().filter(|led| led.is_silent.load(Ordering::SeqCst)) {
            let _ = led.client.shutdown(Shutdown::Both);
        }
    }

    fn led(&self) -> MutexGuard<'_, HashMap<u16, Led>> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the client told instead of the next answer that it has lost its session; once. The server
    /// does what it was asked.
    pub(crate) fn forge(&self, text: &'static str, severity: &'static str, code: &'static str) {
        let answer = error_response(severity, code);
        self.answer(Forgery { text, answer, is_prefix: false });
    }

    /// Has the client told a message before the next answer that does not belong there; once. The server does
    /// what it was asked.
    pub(crate) fn garble(&self, text: &'static str, message: &[u8]) {
        self.answer(Forgery { text, answer: message.to_owned(), is_prefix: true });
    }

    /// Whether nothing has been forged or garbled yet.
    pub(crate) fn is_armed(&self) -> bool {
        self.forged.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn answer(&self, forgery: Forgery) {
        *self.forged.lock().unwrap_or_else(PoisonError::into_inner) = Some(forgery);
    }

    pub(crate) fn params(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// How many clients have got no answer and have not hung up.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::SeqCst)
    }
}

/// What pgpool 4.3 says while the server behind it is away. It leaves out the severity that is not
/// translated.
fn refuse(mut client: TcpStream) {
    let fields = "SFATAL\0CXX000\0Mfailed to create a backend connection\0\0";
    let length = u32::try_from(4 + fields.len()).expect("a short message");
    let _ = client.read(&mut [0; 1_024]);
    let _ = client.write_all(&[b"E", &length.to_be_bytes()[..], fields.as_bytes()].concat());
}

fn let_wait(
    mut client: TcpStream,
    leads_to: &AtomicU16,
    unanswered: &AtomicUsize,
    forged: Arc<Mutex<Option<Forgery>>>,
    led: &Mutex<HashMap<u16, Led>>,
) {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    let mut first = [0; 1_024];
    let Ok(length @ 1..) = client.read(&mut first) else { return };
    if first[..length] == SSL_REQUEST {
        let _ = client.write_all(b"N");
        return swallow(client);
    }
    unanswered.fetch_add(1, Ordering::SeqCst);
    let port = loop {
        match leads_to.load(Ordering::SeqCst) {
            MUTE | REFUSING | ANSWERING_KNOCKS => thread::sleep(Duration::from_millis(5)),
            port => break port,
        }
    };
    unanswered.fetch_sub(1, Ordering::SeqCst);
    let mut server = TcpStream::connect(("127.0.0.1", port)).expect("the server");
    server.write_all(&first[..length]).expect("an open connection");
    lead(&client, &server, forged, led);
}

fn swallow(mut client: TcpStream) {
    let mut buffer = [0; 1_024];
    while let Ok(1..) = client.read(&mut buffer) {}
}

fn lead(
    client: &TcpStream,
    server: &TcpStream,
    forged: Arc<Mutex<Option<Forgery>>>,
    led: &Mutex<HashMap<u16, Led>>,
) {
    let is_silent = Arc::new(AtomicBool::new(false));
    let port = server.local_addr().expect("a bound address").port();
    let known = Led { client: copy_of(client), is_silent: Arc::clone(&is_silent) };
    led.lock().unwrap_or_else(PoisonError::into_inner).insert(port, known);
    let silent_too = Arc::clone(&is_silent);
    let (from_client, to_server) = (copy_of(client), copy_of(server));
    let (from_server, to_client) = (copy_of(server), copy_of(client));
    let due: Arc<Mutex<Option<Forgery>>> = Arc::default();
    let armed = Arc::clone(&due);
    thread::spawn(move || {
        pump(from_client, to_server, &is_silent, |request| {
            let mut forged = forged.lock().unwrap_or_else(PoisonError::into_inner);
            let is_meant = |forgery: &mut Forgery| {
                request.windows(forgery.text.len()).any(|piece| piece == forgery.text.as_bytes())
            };
            if let Some(forgery) = forged.take_if(is_meant) {
                *armed.lock().unwrap_or_else(PoisonError::into_inner) = Some(forgery);
            }
            Pass::On
        });
    });
    thread::spawn(move || {
        pump(from_server, to_client, &silent_too, |_answer| {
            match due.lock().unwrap_or_else(PoisonError::into_inner).take() {
                None => Pass::On,
                Some(Forgery { answer, is_prefix: true, .. }) => Pass::After(answer),
                Some(Forgery { answer, .. }) => Pass::Instead(answer),
            }
        });
    });
}

fn copy_of(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("an open socket");
    stream.try_clone().expect("an open socket")
}

enum Pass {
    On,
    After(Vec<u8>),
    /// And nothing after it.
    Instead(Vec<u8>),
}

/// Passes on what comes, until something else is to be said in its place.
fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    is_silent: &AtomicBool,
    inspect: impl Fn(&[u8]) -> Pass,
) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if is_silent.load(Ordering::SeqCst) {
            continue;
        }
        let passed = match inspect(&buffer[..read]) {
            Pass::On => to.write_all(&buffer[..read]),
            Pass::After(prefix) => to.write_all(&[&prefix, &buffer[..read]].concat()),
            Pass::Instead(answer) => {
                let _ = to.write_all(&answer);
                return; // and leaves it to the client to hang up
            }
        };
        if passed.is_err() {
            break;
        }
    }
    if is_silent.load(Ordering::SeqCst) {
        return; // the other side does not hear of the end
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// PostgreSQL's message of that name.
fn error_response(severity: &str, code: &str) -> Vec<u8> {
    let fields = [('S', severity), ('V', severity), ('C', code), ('M', "forged by a test")];
    let mut body: Vec<u8> =
        fields.iter().flat_map(|(field, text)| format!("{field}{text}\0").into_bytes()).collect();
    body.push(0);
    let length = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
    [b"E".as_slice(), &length, &body].concat()
}
