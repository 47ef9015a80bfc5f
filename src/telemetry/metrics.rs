//! The metrics of the operator. Labels come from enums only: no name of an object, user or key is ever a label.

use std::{fmt, sync::Arc, time::Duration};

use kube::runtime::reflector::Store;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::api::{ApiKey, KeyState, KeyType};
use crate::clock::Clock;

/// The result of a reconciliation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum ReconcileResult {
    /// No request failed.
    Success,
    /// A request failed, and the controller retries.
    Error,
}

/// The result of an admission request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum AdmissionResult {
    /// The request was allowed.
    Allowed,
    /// The request was denied.
    Denied,
}

/// The kind of the object of an admission request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum AdmissionKind {
    /// ApiKey.
    ApiKey,
    /// AccessPolicy.
    AccessPolicy,
    /// SecuritySettings.
    SecuritySettings,
    /// KeyReveal.
    KeyReveal,
    /// The Secret of an ApiKey.
    Secret,
    /// Another kind, which only a wrong webhook configuration sends.
    Other,
}

/// The result of a notice of a write to the Secret of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum NoticeResult {
    /// This replica leads and checks the Secret.
    Taken,
    /// The notice was sent to the leader.
    Forwarded,
    /// The notice was dropped: there were too many notices, or too long no leader. The periodic check finds the write.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoticeLabels {
    outcome: NoticeResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: ReconcileResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdmissionLabels {
    kind: AdmissionKind,
    verdict: AdmissionResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    rule: RuleLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: RuleLabel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RuleLabel(&'static str);

impl EncodeLabelValue for RuleLabel {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }
}

/// The metrics of the process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    reconciled: Family<OutcomeLabels, Counter>,
    reconcile_duration: Histogram,
    admitted: Family<AdmissionLabels, Counter>,
    rejections: Family<RuleLabels, Counter>,
    turned_away: Family<ReasonLabels, Counter>,
    admission_duration: Histogram,
    events: Family<OutcomeLabels, Counter>,
    notices: Family<NoticeLabels, Counter>,
    leader: Gauge,
}

impl Metrics {
    /// Registers all metrics. The gauges about keys are computed from `keys` at each scrape. `backoff` returns the
    /// number of objects in backoff, and `certificates` the expiries of the serving certificate and of its CA, in
    /// seconds since 1970.
    #[must_use]
    pub fn new(
        keys: Store<ApiKey>,
        clock: Clock,
        backoff: impl Fn() -> usize + Send + Sync + 'static,
        certificates: impl Fn() -> (Option<f64>, Option<f64>) + Send + Sync + 'static,
    ) -> Self {
        let latency =
            || Histogram::new([0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0]);
        let mut metrics = Self {
            registry: Arc::default(),
            reconciled: Family::default(),
            reconcile_duration: latency(),
            admitted: Family::default(),
            rejections: Family::default(),
            turned_away: Family::default(),
            admission_duration: latency(),
            events: Family::default(),
            notices: Family::default(),
            leader: Gauge::default(),
        };
        let mut registry = Registry::with_prefix("keywright");
        registry.register("reconcile", "Reconciliations of ApiKeys", metrics.reconciled.clone());
        registry.register_with_unit(
            "reconcile_duration",
            "Time of one reconciliation of an ApiKey",
            Unit::Seconds,
            metrics.reconcile_duration.clone(),
        );
        registry.register("admission", "Admission requests answered", metrics.admitted.clone());
        registry.register(
            "admission_rejections",
            "Broken rules and gates of rejected objects",
            metrics.rejections.clone(),
        );
        registry.register(
            "admission_turned_away",
            "Requests to the webhook that were rejected unread, by reason",
            metrics.turned_away.clone(),
        );
        registry.register_with_unit(
            "admission_duration",
            "Time of one admission request inside the process",
            Unit::Seconds,
            metrics.admission_duration.clone(),
        );
        registry.register(
            "events",
            "Events written, or lost because the API server was too slow",
            metrics.events.clone(),
        );
        registry.register(
            "secret_notices",
            "Notices of writes to the Secrets of keys, by result",
            metrics.notices.clone(),
        );
        registry.register("leader", "Whether this replica leads", metrics.leader.clone());
        registry.register_collector(Box::new(Scrape {
            keys,
            clock,
            backoff: Box::new(backoff),
            certificates: Box::new(certificates),
        }));
        metrics.registry = Arc::new(registry);
        metrics
    }

    /// Counts a reconciliation.
    pub fn reconciled(&self, outcome: ReconcileResult, took: Duration) {
        self.reconciled.get_or_create(&OutcomeLabels { outcome }).inc();
        self.reconcile_duration.observe(took.as_secs_f64());
    }

    /// Counts an admission request.
    pub fn admitted(&self, kind: AdmissionKind, verdict: AdmissionResult, took: Duration) {
        self.admitted.get_or_create(&AdmissionLabels { kind, verdict }).inc();
        self.admission_duration.observe(took.as_secs_f64());
    }

    /// Counts a broken rule or a gate of a rejected object. The set of names is fixed.
    pub fn broke(&self, rule: &'static str) {
        self.rejections.get_or_create(&RuleLabels { rule: RuleLabel(rule) }).inc();
    }

    /// Counts a request to the webhook that was rejected unread. The set of reasons is fixed.
    pub fn turned_away(&self, reason: &'static str) {
        self.turned_away.get_or_create(&ReasonLabels { reason: RuleLabel(reason) }).inc();
    }

    /// Counts an Event that was written or lost.
    pub fn event(&self, written: bool) {
        let outcome = if written { ReconcileResult::Success } else { ReconcileResult::Error };
        self.events.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts notices of writes to Secrets.
    pub fn noticed(&self, outcome: NoticeResult, count: usize) {
        self.notices.get_or_create(&NoticeLabels { outcome }).inc_by(count as u64);
    }

    /// Sets whether this replica leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// The registry, for the metrics endpoint.
    #[must_use]
    pub fn registry(&self) -> Arc<Registry> {
        Arc::clone(&self.registry)
    }
}

type Expiries = (Option<f64>, Option<f64>);

/// The gauges that are computed at each scrape.
struct Scrape {
    keys: Store<ApiKey>,
    clock: Clock,
    backoff: Box<dyn Fn() -> usize + Send + Sync>,
    certificates: Box<dyn Fn() -> Expiries + Send + Sync>,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

const TYPES: [(KeyType, &str); 3] =
    [(KeyType::Personal, "Personal"), (KeyType::SendYourData, "SendYourData"), (KeyType::Team, "Team")];
const STATES: [(KeyState, &str); 6] = [
    (KeyState::Active, "Active"),
    (KeyState::Inactive, "Inactive"),
    (KeyState::Expired, "Expired"),
    (KeyState::Pending, "Pending"),
    (KeyState::Rejected, "Rejected"),
    (KeyState::Lost, "Lost"),
];
const WINDOWS: [(i64, &str); 3] = [(24 * 3600, "24h"), (7 * 24 * 3600, "7d"), (30 * 24 * 3600, "30d")];

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let now = self.clock.now().as_second();
        let mut by_state = [[0_i64; STATES.len()]; TYPES.len()];
        let mut expiring = [0_i64; WINDOWS.len()];
        let (mut overdue, mut next_expiry, mut next_rotation) = (0_i64, None::<i64>, None::<i64>);
        let earlier = |known: Option<i64>, at: i64| Some(known.map_or(at, |known| known.min(at)));
        for key in self.keys.state() {
            let status = key.status.as_ref();
            let state = status.and_then(|s| s.state).unwrap_or(KeyState::Pending);
            let row = TYPES.iter().position(|(t, _)| *t == key.spec.key_type);
            let column = STATES.iter().position(|(s, _)| *s == state);
            if let (Some(row), Some(column)) = (row, column) {
                by_state[row][column] += 1;
            }
            let expiry = status.and_then(|s| s.tokens.first()).and_then(|t| t.expires_at.as_ref());
            if let Some(at) = expiry.map(|t| t.0.as_second()).filter(|at| *at > now) {
                next_expiry = earlier(next_expiry, at);
                WINDOWS.iter().zip(&mut expiring).for_each(|((window, _), n)| *n += i64::from(at - now <= *window));
            }
            if let Some(at) = status.and_then(|s| s.next_rotation_at.as_ref()).map(|t| t.0.as_second()) {
                next_rotation = earlier(next_rotation, at);
                // A busy controller may need a minute.
                overdue += i64::from(at + 60 < now);
            }
        }

        let mut gauge = |name: &str, help: &str, values: &[(&[(&str, &str)], f64)]| {
            let mut metric =
                encoder.encode_descriptor(name, help, None, prometheus_client::metrics::MetricType::Gauge)?;
            for (labels, value) in values {
                ConstGauge::new(*value).encode(metric.encode_family(labels)?)?;
            }
            Ok::<(), fmt::Error>(())
        };
        let cells: Vec<_> = TYPES
            .iter()
            .zip(by_state)
            .flat_map(|((_, key_type), row)| {
                STATES.iter().zip(row).map(move |((_, state), n)| ([("type", *key_type), ("state", *state)], n as f64))
            })
            .collect();
        let cells: Vec<(&[(&str, &str)], f64)> = cells.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        gauge("api_keys", "ApiKeys by type and state", &cells)?;
        let windows: Vec<_> = WINDOWS.iter().zip(expiring).map(|((_, w), n)| ([("within", *w)], n as f64)).collect();
        let windows: Vec<(&[(&str, &str)], f64)> = windows.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        gauge("api_keys_expiring", "ApiKeys that expire within a window", &windows)?;
        gauge("rotations_overdue", "ApiKeys whose rotation is more than a minute late", &[(&[], overdue as f64)])?;
        gauge(
            "objects_in_backoff",
            "Objects with a failed request that wait for a retry; not those that wait for a user",
            &[(&[], (self.backoff)() as f64)],
        )?;
        let (leaf, ca) = (self.certificates)();
        let times = [
            ("next_expiry_timestamp_seconds", "Expiry of the next ApiKey to expire", next_expiry.map(|t| t as f64)),
            ("next_rotation_timestamp_seconds", "Time of the next scheduled rotation", next_rotation.map(|t| t as f64)),
            ("webhook_certificate_expiry_timestamp_seconds", "Expiry of the webhook's certificate", leaf),
            ("webhook_ca_expiry_timestamp_seconds", "Expiry of the CA of the webhook's certificate", ca),
        ];
        for (name, help, at) in times {
            if let Some(at) = at {
                gauge(name, help, &[(&[], at)])?;
            }
        }
        Ok(())
    }
}
