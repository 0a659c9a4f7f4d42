use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::Server;

/// The parameters of a server that is so far away: a proxy delays each request by the time of a round
/// trip.
pub(crate) fn at_a_distance(server: &Server, round_trip: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("a bound address").port();
    let server_port = server.port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.expect("a client");
            let server = TcpStream::connect(("127.0.0.1", server_port)).expect("the server");
            client.set_nodelay(true).expect("an open socket");
            server.set_nodelay(true).expect("an open socket");
            pass(&client, &server, round_trip);
            pass(&server, &client, Duration::ZERO);
        }
    });
    format!("host=127.0.0.1 port={port} user=postgres")
}

fn pass(from: &TcpStream, to: &TcpStream, delay: Duration) {
    let (mut from, mut to) = (from.try_clone().expect("open"), to.try_clone().expect("open"));
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            thread::sleep(delay);
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        drop(to.shutdown(Shutdown::Both));
    });
}
