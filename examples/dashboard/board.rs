use std::time::SystemTime;

use anyhow::Result;
use checkpoint_store::{Health, HealthCheck, HealthLevel, ProjectionStatus};

use crate::source::{Head, Opened};

/// What there is to show, read anew each time.
pub(crate) struct Board {
    source: Opened,
    projections: Vec<String>,
    health: HealthCheck,
}

/// The projections at one point in time, by name.
pub(crate) struct Snapshot {
    pub(crate) taken_at: SystemTime,
    pub(crate) projections: Vec<(ProjectionStatus, Health)>,
}

impl Board {
    /// `projections` are shown even when they have no checkpoint.
    pub(crate) fn new(source: Opened, projections: Vec<String>, health: HealthCheck) -> Self {
        Self { source, projections, health }
    }

    pub(crate) fn read(&self) -> Result<Snapshot> {
        // The head comes last: read first, it would be overtaken by a projection that goes on
        // meanwhile, and a busy one would look ahead of its stream.
        let checkpoints = self.source.store.all()?;
        let Head { offset: head, now } = (self.source.head)()?;

        let mut statuses: Vec<_> =
            checkpoints.iter().map(|checkpoint| checkpoint.status(head)).collect();
        for name in &self.projections {
            if statuses.iter().all(|status| status.projection != *name) {
                statuses.push(ProjectionStatus::not_started(name, head));
            }
        }
        statuses.sort_by(|a, b| a.projection.cmp(&b.projection));
        let judged = |status| {
            let health = self.health.assess(&status, now);
            (status, health)
        };
        Ok(Snapshot { taken_at: now, projections: statuses.into_iter().map(judged).collect() })
    }
}

impl Snapshot {
    /// The worst level counts.
    pub(crate) fn level(&self) -> HealthLevel {
        let levels = self.projections.iter().map(|(_, health)| health.level());
        levels.max().unwrap_or(HealthLevel::Healthy)
    }
}
