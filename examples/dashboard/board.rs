use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use checkpoint_store::{Health, HealthCheck, HealthLevel, ProjectionStatus};

use crate::source::{Opened, Stream};

/// How long a request waits for the store: less than the second after which probes give up.
const LIMIT: Duration = Duration::from_millis(600);

/// What there is to show, read anew for each request. One thread reads: requests that come while it
/// does share the next reading, and none is held up by a database that does not answer.
pub(crate) struct Board {
    requests: Sender<Sender<Reading>>,
    latest: Arc<Mutex<Option<Reading>>>,
    is_away: AtomicBool,
}

/// The projections, or why they cannot be read.
pub(crate) type Reading = Arc<Result<Snapshot, String>>;

/// The projections at one point in time, by name.
pub(crate) struct Snapshot {
    pub(crate) taken_at: SystemTime,
    pub(crate) projections: Vec<Projection>,
}

pub(crate) struct Projection {
    pub(crate) status: ProjectionStatus,
    pub(crate) health: Health,
    /// Whether it is shown only, and does not count for the level of all.
    pub(crate) is_ignored: bool,
}

/// How projections are shown and judged.
pub(crate) struct View {
    /// These are shown even when they have no checkpoint.
    pub(crate) projections: Vec<String>,
    pub(crate) ignored: Vec<String>,
    pub(crate) health: HealthCheck,
}

impl Board {
    pub(crate) fn new(source: Opened, view: View) -> Self {
        let (requests, inbox) = channel();
        let latest = Arc::default();
        let board = Self { requests, latest: Arc::clone(&latest), is_away: AtomicBool::new(false) };
        thread::spawn(move || answer(&source, &view, &inbox, &latest));
        board
    }

    pub(crate) fn read(&self) -> Reading {
        let (request, answer) = channel();
        let _ = self.requests.send(request);
        let reading = answer.recv_timeout(LIMIT).unwrap_or_else(|_| self.late());
        match &*reading {
            Err(error) if !self.is_away.swap(true, Ordering::Relaxed) => {
                eprintln!("the checkpoints cannot be read: {error}");
            }
            Ok(_) if self.is_away.swap(false, Ordering::Relaxed) => {
                eprintln!("the checkpoints can be read again");
            }
            _ => {}
        }
        reading
    }

    /// Why there is no answer in time: for the same reason as last time, if that one failed.
    fn late(&self) -> Reading {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        latest.filter(|reading| reading.is_err()).unwrap_or_else(|| {
            Arc::new(Err(format!("the checkpoint store has not answered within {LIMIT:?}")))
        })
    }
}

fn answer(
    source: &Opened,
    view: &View,
    inbox: &Receiver<Sender<Reading>>,
    latest: &Mutex<Option<Reading>>,
) {
    while let Ok(first) = inbox.recv() {
        let requests: Vec<_> = iter::once(first).chain(inbox.try_iter()).collect();
        let reading = Arc::new(read(source, view).map_err(|error| error.report().to_string()));
        *latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&reading));
        for request in requests {
            let _ = request.send(Arc::clone(&reading)); // unless it has given up
        }
    }
}

fn read(source: &Opened, view: &View) -> checkpoint_store::Result<Snapshot> {
    // The head comes last: read first, it would be overtaken by a projection that moves on
    // meanwhile, and a busy one would look ahead of its stream.
    let checkpoints = source.store.all()?;
    let Stream { heads, now } = (source.stream)()?;

    let mut statuses: Vec<_> = checkpoints
        .iter()
        .map(|checkpoint| checkpoint.status(heads.of(&checkpoint.projection)))
        .collect();
    for name in view.projections.iter().map(String::as_str).chain(heads.projections()) {
        if statuses.iter().all(|status| status.projection != *name) {
            statuses.push(ProjectionStatus::not_started(name, heads.of(name)));
        }
    }
    statuses.sort_by(|a, b| a.projection.cmp(&b.projection));
    let judged = |status: ProjectionStatus| Projection {
        health: view.health.assess(&status, now),
        is_ignored: view.ignored.contains(&status.projection),
        status,
    };
    Ok(Snapshot { taken_at: now, projections: statuses.into_iter().map(judged).collect() })
}

impl Snapshot {
    /// The worst level counts.
    pub(crate) fn level(&self) -> HealthLevel {
        let counted = self.projections.iter().filter(|projection| !projection.is_ignored);
        let levels = counted.map(|projection| projection.health.level());
        levels.max().unwrap_or(HealthLevel::Healthy)
    }
}
