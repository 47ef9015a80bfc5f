//! The metrics of the verifier. Labels come from enums only: no name of an object, user or key is ever a label. They
//! are computed at each scrape.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use crate::net::listener::{Bodies, ConnectionLimit};
use crate::{
    certs::Resolver,
    verify::{Verifier, last_used::Writes},
};

/// The sources of the metrics.
pub struct Sources {
    /// The decisions and their inputs.
    pub verifier: Arc<Verifier>,
    /// The counters of writes of `lastUsedAt`. `None` if it is not written.
    pub last_used: Option<Arc<Writes>>,
    /// The number of complete lists of ApiKeys.
    pub lists: Arc<AtomicU64>,
    /// The connections of the front ends.
    pub connections: Arc<ConnectionLimit>,
    /// The memory budget for request bodies.
    pub bodies: Arc<Bodies>,
    /// The certificate. `None` for plain HTTP.
    pub certificate: Option<Arc<Resolver>>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

/// Returns a registry with all metrics.
#[must_use]
pub fn registry(sources: Sources) -> Arc<Registry> {
    let mut registry = Registry::with_prefix("keywright_verifier");
    registry.register_collector(Box::new(sources));
    Arc::new(registry)
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let verifier = &self.verifier;
        let mut decisions = encoder.encode_descriptor("decisions", "Decisions", None, MetricType::Counter)?;
        for (front_end, refused, count) in verifier.decision_log.counts() {
            let verdict = if refused.is_none() { "Allowed" } else { "Refused" };
            let reason = refused.map_or("", |reason| reason.name());
            let labels = [("front_end", front_end.name()), ("verdict", verdict), ("reason", reason)];
            ConstCounter::new(count).encode(decisions.encode_family(&labels)?)?;
        }
        let (sum, buckets) = verifier.decision_log.durations.snapshot();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder
            .encode_descriptor(
                "check_duration",
                "Time from the parsed request to the decision",
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        let mut counter = |name: &str, help: &str, values: &[(&[(&str, &str)], u64)]| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, value) in values {
                ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
            }
            Ok::<(), fmt::Error>(())
        };
        counter(
            "refusals_unlogged",
            "Rejections beyond the rate of the log",
            &[(&[], verifier.decision_log.unlogged())],
        )?;
        counter("lists", "Complete lists of ApiKeys", &[(&[], self.lists.load(Ordering::Relaxed))])?;
        let rejected = [(&[] as &[_], self.connections.rejected())];
        counter("connections_turned_away", "Connections rejected because all others were in use", &rejected)?;
        let closed_idle = [(&[] as &[_], self.connections.closed_idle())];
        counter("connections_closed_idle", "Idle connections closed for new ones", &closed_idle)?;
        let reasons = self.bodies.refused().map(|(reason, count)| ([("reason", reason.name())], count));
        let reasons: Vec<_> = reasons.collect();
        let reasons: Vec<(&[_], _)> = reasons.iter().map(|(labels, count)| (labels.as_slice(), *count)).collect();
        counter("bodies_refused", "Requests whose body did not arrive", &reasons)?;
        if let Some(writes) = &self.last_used {
            let (written, failed) = (writes.written.load(Ordering::Relaxed), writes.failed.load(Ordering::Relaxed));
            let outcomes: [(&[_], _); 2] = [(&[("outcome", "Success")], written), (&[("outcome", "Error")], failed)];
            counter("last_used_writes", "Writes of lastUsedAt", &outcomes)?;
        }

        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)
        };
        let size = verifier.keys.size();
        gauge("keys", "ApiKeys that have a value", size.keys as f64)?;
        gauge("digests", "Values of keys; two in the overlap of a rotation", size.digests as f64)?;
        gauge(
            "duplicate_digests",
            "Values that another ApiKey owns, for which they were written first",
            size.duplicates as f64,
        )?;
        gauge("grant_sets", "Different sets of presets and permissions", size.grants as f64)?;
        gauge("index_bytes", "Memory of the index", size.bytes as f64)?;
        gauge(
            "names_left_out",
            "Names of permissions that no catalog defines and for which the index has no room",
            size.names_left_out as f64,
        )?;
        gauge("connections", "Open connections", self.connections.open() as f64)?;
        gauge("synced", "Whether all keys and catalogs were listed", f64::from(u8::from(verifier.is_synced())))?;
        if let Some(age) = verifier.freshness.age(verifier.clock.exact()) {
            gauge("staleness_seconds", "Time since the last response of the API server", age.as_secs_f64())?;
        }
        if let Some(max) = verifier.options.max_staleness {
            gauge("max_staleness_seconds", "Staleness at which all requests are rejected", max.as_secs_f64())?;
        }
        let status = self.certificate.as_ref().map(|resolver| resolver.status());
        if let Some(end) = status.and_then(|status| status.leaf_not_after) {
            gauge("certificate_expiry_timestamp_seconds", "Expiry of the certificate", end.as_second() as f64)?;
        }
        Ok(())
    }
}
