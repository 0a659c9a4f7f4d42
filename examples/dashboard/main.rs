//! Shows how far each projection is behind its stream: a page for people, and JSON for machines.
//!
//! ```text
//! cargo run --example dashboard                                # a demo, in memory
//!
//! export DATABASE_URL=postgres://monitor:secret@localhost/app  # the checkpoints in PostgreSQL
//! cargo run --example dashboard -- --head-query 'SELECT max(id) FROM events'
//! ```
//!
//! | Route | Answer |
//! |---|---|
//! | `GET /` | a page that refreshes itself |
//! | `GET /api/projections/checkpoints` | an array: `projectionName`, `checkpoint`, `streamHead`, `lag`, `percentComplete`, `updatedAt` |
//! | `GET /health` | 200 when every projection is healthy or degraded, 503 when one is unhealthy; the level and the reason for each, and offsets as strings |
//! | `GET /live` | 200: the process answers |
//! | `GET /metrics` | 200, for Prometheus: checkpoint, stream head, lag and time since the save of each projection, and whether the store answers |
//!
//! A degraded projection works on its backlog, and an orchestrator that restarted it would only add
//! to that; so it counts as 200. `--ignore` leaves a projection out of this. If the checkpoints cannot
//! be read, the JSON routes answer 503 with an `error` that says why, within 0.8 s.
//!
//! The dashboard only reads: `SELECT` on the checkpoints, and what the head query needs, are
//! enough for its role. It creates no table, starts while the database is down, and recovers by
//! itself. It has no TLS and no users: if others can reach it, put a proxy with both before it.
//! Ctrl-C and SIGTERM end it.

mod board;
mod metrics;
mod options;
mod source;
mod web;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use tiny_http::Server;

use crate::board::Board;
use crate::options::Options;

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    let options = Options::parse()?;
    let server = Server::http(options.listen)
        .map_err(|error| anyhow!("cannot listen on {}: {error}", options.listen))?;
    let address = server.server_addr().to_ip().context("the server has no address")?;
    let board = Board::new(options.source.open()?, options.view);

    let (end, ended) = mpsc::channel();
    let interrupted = end.clone();
    ctrlc::set_handler(move || drop(interrupted.send(Ok(()))))?;
    thread::spawn(move || end.send(Err(web::serve(&server, &Arc::new(board)))));

    writeln!(io::stdout(), "listening on http://{address}/")?;
    if options.check { check(address) } else { Ok(ended.recv()??) }
}

/// Asks for each route once, as a client would.
fn check(address: SocketAddr) -> Result<()> {
    let routes = [
        (web::PAGE, &[200][..]),
        (web::CHECKPOINTS, &[200]),
        (web::HEALTH, &[200, 503]),
        (web::LIVE, &[200]),
        (web::METRICS, &[200]),
    ];
    let mut out = io::stdout();
    for (path, expected) in routes {
        let (status, body) = get(address, path)?;
        match path {
            web::PAGE => writeln!(out, "GET {path} {status}, {} bytes", body.len())?,
            _ => writeln!(out, "GET {path} {status}\n{body}")?,
        }
        ensure!(expected.contains(&status), "GET {path} answered {status}");
    }
    Ok(())
}

fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is cut short")?;
    let status = head.split(' ').nth(1).context("the answer has no status")?;
    Ok((status.parse()?, body.to_owned()))
}
