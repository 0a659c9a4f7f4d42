use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::{client as client_of, end_backend};

/// Passes bytes between clients and a server, counts round trips, and cuts a connection off where
/// it is told to.
///
/// A round trip begins whenever a client speaks for the first time, or after the server did.
pub(crate) struct Proxy {
    port: u16,
    requests: Arc<AtomicUsize>,
    cut: Arc<Mutex<Option<(Request, Cut)>>>,
}

/// Which request a connection is cut off at.
#[derive(Debug, Clone, Copy)]
enum Request {
    With(&'static str),
    /// So many requests after the one that begins a transaction.
    SinceBegin(usize),
}

/// Where a connection is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The server does not get the request.
    BeforeTheRequest,
    /// The server gets the request, and may still be at it when the client is cut off.
    AfterTheRequest,
    /// The server has done what it was asked, and the client does not hear of it.
    BeforeTheAnswer,
    /// The client hears of it, and nothing after that.
    AfterTheAnswer,
    /// Not cut off: the request comes to a server that has just ended the backend.
    BackendEnded,
}

impl Proxy {
    pub(crate) fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        let requests = Arc::new(AtomicUsize::new(0));
        let cut = Arc::new(Mutex::new(None));
        let (counter, armed) = (Arc::clone(&requests), Arc::clone(&cut));
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)) else { continue };
                client.set_nodelay(true).expect("an open socket");
                server.set_nodelay(true).expect("an open socket");
                let server_spoke_last = Arc::new(AtomicBool::new(true));
                let at_the_answer = Arc::new(Mutex::new(Pass::On));
                let backend = Arc::new(AtomicI32::new(0));

                let (spoke, counter) = (Arc::clone(&server_spoke_last), Arc::clone(&counter));
                let (pass_answer, armed) = (Arc::clone(&at_the_answer), Arc::clone(&armed));
                let pid = Arc::clone(&backend);
                let since_begin = AtomicUsize::new(usize::MAX / 2);
                pump(&client, &server, move |request| {
                    if spoke.swap(false, Ordering::SeqCst) {
                        counter.fetch_add(1, Ordering::SeqCst);
                        since_begin.fetch_add(1, Ordering::SeqCst);
                    }
                    if has(request, "START TRANSACTION") {
                        since_begin.store(0, Ordering::SeqCst);
                    }
                    let step = since_begin.load(Ordering::SeqCst);
                    match take_if_matched(&armed, request, step) {
                        Some(Cut::BeforeTheRequest) => return Pass::Cut,
                        Some(Cut::AfterTheRequest) => return Pass::OnAndCut,
                        Some(Cut::BeforeTheAnswer) => *lock(&pass_answer) = Pass::Cut,
                        Some(Cut::AfterTheAnswer) => *lock(&pass_answer) = Pass::OnAndCut,
                        Some(Cut::BackendEnded) => {
                            let params = format!("host=127.0.0.1 port={server_port} user=postgres");
                            end_backend(&mut client_of(&params), pid.load(Ordering::SeqCst));
                        }
                        None => {}
                    }
                    Pass::On
                });
                pump(&server, &client, move |answer| {
                    if let Some(pid) = backend_process_id(answer) {
                        backend.store(pid, Ordering::SeqCst);
                    }
                    server_spoke_last.store(true, Ordering::SeqCst);
                    *lock(&at_the_answer)
                });
            }
        });
        Self { port, requests, cut }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn params(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres", self.port)
    }

    /// How many round trips `work` takes.
    pub(crate) fn round_trips<T>(&self, work: impl FnOnce() -> T) -> usize {
        let before = self.requests.load(Ordering::SeqCst);
        work();
        self.requests.load(Ordering::SeqCst) - before
    }

    /// Cuts off the connection on which the next request with this text in it comes; once.
    pub(crate) fn cut(&self, text: &'static str, place: Cut) {
        self.arm(Some((Request::With(text), place)));
    }

    /// Cuts off the next connection that gets to this step of a transaction, its begin being step 0; once.
    pub(crate) fn cut_at_step(&self, step: usize, place: Cut) {
        self.arm(Some((Request::SinceBegin(step), place)));
    }

    /// Whether nothing has been cut off yet; then nothing will be.
    pub(crate) fn disarm(&self) -> bool {
        self.arm(None)
    }

    fn arm(&self, cut: Option<(Request, Cut)>) -> bool {
        std::mem::replace(&mut *lock(&self.cut), cut).is_some()
    }
}

fn take_if_matched(
    armed: &Mutex<Option<(Request, Cut)>>,
    request: &[u8],
    step: usize,
) -> Option<Cut> {
    let (_, place) = lock(armed).take_if(|(wanted, _)| match wanted {
        Request::With(text) => has(request, text),
        Request::SinceBegin(wanted) => step == *wanted,
    })?;
    Some(place)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the server says when it lets a client in: `K`, a length of 12, the id, a secret.
fn backend_process_id(answer: &[u8]) -> Option<i32> {
    const BACKEND_KEY_DATA: &[u8] = b"K\0\0\0\x0c";
    let message = answer.windows(13).find(|piece| piece.starts_with(BACKEND_KEY_DATA))?;
    Some(i32::from_be_bytes(message[5..9].try_into().expect("four bytes")))
}

fn has(request: &[u8], text: &str) -> bool {
    request.windows(text.len()).any(|piece| piece == text.as_bytes())
}

#[derive(Clone, Copy)]
enum Pass {
    On,
    OnAndCut,
    Cut,
}

fn pump(from: &TcpStream, to: &TcpStream, inspect: impl Fn(&[u8]) -> Pass + Send + 'static) {
    let mut from = from.try_clone().expect("an open socket");
    let mut to = to.try_clone().expect("an open socket");
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let pass = inspect(&buffer[..read]);
            if !matches!(pass, Pass::On) {
                // First of all, so that nothing slips through on the way back.
                let _ = from.shutdown(Shutdown::Both);
            }
            if !matches!(pass, Pass::Cut) && to.write_all(&buffer[..read]).is_err() {
                break;
            }
            if !matches!(pass, Pass::On) {
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
