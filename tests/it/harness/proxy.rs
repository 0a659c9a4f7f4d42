use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Passes bytes between clients and a server, and counts round trips.
///
/// One begins whenever a client speaks for the first time, or after the server did.
pub(crate) struct Proxy {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                let server = TcpStream::connect(("127.0.0.1", server_port)).expect("the server");
                client.set_nodelay(true).expect("an open socket");
                server.set_nodelay(true).expect("an open socket");
                let server_spoke_last = Arc::new(AtomicBool::new(true));
                let (spoke, counter) = (Arc::clone(&server_spoke_last), Arc::clone(&counter));
                pump(&client, &server, move || {
                    if spoke.swap(false, Ordering::SeqCst) {
                        counter.fetch_add(1, Ordering::SeqCst);
                    }
                });
                pump(&server, &client, move || server_spoke_last.store(true, Ordering::SeqCst));
            }
        });
        Self { port, requests }
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
}

fn pump(from: &TcpStream, to: &TcpStream, before_passing_on: impl Fn() + Send + 'static) {
    let mut from = from.try_clone().expect("an open socket");
    let mut to = to.try_clone().expect("an open socket");
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            before_passing_on();
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
