use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, Cursor};
use std::sync::Arc;
use std::thread;
use std::time::SystemTime;

use checkpoint_store::{HealthLevel, ProjectionStatus};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tiny_http::{Header, Method, Response, Server};

use crate::board::{Board, Projection, Snapshot};
use crate::metrics;

pub(crate) const PAGE: &str = "/";
pub(crate) const CHECKPOINTS: &str = "/api/projections/checkpoints";
pub(crate) const HEALTH: &str = "/health";
pub(crate) const LIVE: &str = "/live";
pub(crate) const METRICS: &str = "/metrics";

type Answer = Response<Cursor<Vec<u8>>>;

/// Answers requests, each in a thread of its own: one that waits for the database does not delay the
/// others. Returns only when it has to give up.
pub(crate) fn serve(server: &Server, board: &Arc<Board>) -> io::Error {
    loop {
        let request = match server.recv() {
            Ok(request) => request,
            Err(error) => return error,
        };
        let board = Arc::clone(board);
        thread::spawn(move || {
            let answer = answer(&board, request.method(), request.url());
            // A client that is gone misses nothing.
            let _ = request.respond(answer);
        });
    }
}

fn answer(board: &Board, method: &Method, url: &str) -> Answer {
    let path = url.split('?').next().unwrap_or_default();
    let route = match path {
        PAGE => |_: &Board| page(),
        CHECKPOINTS => checkpoints,
        HEALTH => health,
        LIVE => |_: &Board| json(200, &json!({ "live": true })),
        METRICS => {
            |board: &Board| respond(200, metrics::CONTENT_TYPE, metrics::text(&board.read()))
        }
        _ => return json(404, &json!({ "error": "there is no such page" })),
    };
    match method {
        Method::Get | Method::Head => route(board),
        _ => json(405, &json!({ "error": "this page can only be read" }))
            .with_header(header("Allow", "GET, HEAD")),
    }
}

fn page() -> Answer {
    let nonce = nonce();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    let html = include_str!("page.html").replace("{nonce}", &nonce);
    respond(200, "text/html; charset=utf-8", html)
        .with_header(header("Content-Security-Policy", &policy))
}

/// Another one each time, that nobody can foresee.
fn nonce() -> String {
    let random = || RandomState::new().hash_one(SystemTime::now());
    format!("{:016x}{:016x}", random(), random())
}

fn checkpoints(board: &Board) -> Answer {
    match &*board.read() {
        Ok(snapshot) => {
            let rows = snapshot.projections.iter().map(|projection| Row::from(&projection.status));
            json(200, &rows.collect::<Vec<_>>())
        }
        Err(error) => json(503, &json!({ "error": error })),
    }
}

fn health(board: &Board) -> Answer {
    match &*board.read() {
        Ok(snapshot) => {
            let status = if snapshot.level() == HealthLevel::Unhealthy { 503 } else { 200 };
            json(status, &Report::from(snapshot))
        }
        Err(error) => {
            let level = HealthLevel::Unhealthy.to_string();
            json(503, &json!({ "level": level, "error": error, "projections": [] }))
        }
    }
}

/// What the source system's dashboard shows, under the names that it gave them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    projection_name: &'a str,
    checkpoint: i64,
    stream_head: i64,
    lag: i64,
    percent_complete: f64,
    updated_at: Option<String>,
}

impl<'a> From<&'a ProjectionStatus> for Row<'a> {
    fn from(status: &'a ProjectionStatus) -> Self {
        Self {
            projection_name: &status.projection,
            checkpoint: status.checkpoint,
            stream_head: status.stream_head,
            lag: status.lag,
            percent_complete: status.percent_complete,
            updated_at: status.updated_at.and_then(rfc3339),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    level: String,
    checked_at: Option<String>,
    projections: Vec<Judged<'a>>,
}

/// Offsets are strings here: a browser keeps no more than 53 bits of a number.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Judged<'a> {
    projection_name: &'a str,
    checkpoint: String,
    stream_head: String,
    lag: String,
    percent_complete: f64,
    updated_at: Option<String>,
    level: String,
    reason: String,
    ignored: bool,
}

impl<'a> From<&'a Projection> for Judged<'a> {
    fn from(Projection { status, health, is_ignored }: &'a Projection) -> Self {
        Self {
            projection_name: &status.projection,
            checkpoint: status.checkpoint.to_string(),
            stream_head: status.stream_head.to_string(),
            lag: status.lag.to_string(),
            percent_complete: status.percent_complete,
            updated_at: status.updated_at.and_then(rfc3339),
            level: health.level().to_string(),
            reason: health.to_string(),
            ignored: *is_ignored,
        }
    }
}

impl<'a> From<&'a Snapshot> for Report<'a> {
    fn from(snapshot: &'a Snapshot) -> Self {
        Self {
            level: snapshot.level().to_string(),
            checked_at: rfc3339(snapshot.taken_at),
            projections: snapshot.projections.iter().map(Judged::from).collect(),
        }
    }
}

/// `None` for a time that the format has no room for: after the year 9999.
fn rfc3339(time: SystemTime) -> Option<String> {
    Timestamp::try_from(time).ok().map(|timestamp| timestamp.to_string())
}

fn json(status: u16, body: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(body).expect("plain data is JSON");
    respond(status, "application/json", body)
}

fn respond(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Answer {
    Response::from_data(body)
        .with_status_code(status)
        .with_header(header("Content-Type", content_type))
        .with_header(header("Cache-Control", "no-store"))
        .with_header(header("X-Content-Type-Options", "nosniff"))
        .with_header(header("Referrer-Policy", "no-referrer"))
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).expect("ASCII")
}
