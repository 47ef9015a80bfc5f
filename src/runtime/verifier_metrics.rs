//! What Prometheus sees of a verifier. Labels come from enums only: no name of an object, user or key is ever a label.
//! Everything is computed when somebody looks, so that a decision costs one counter.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::listener::{Bodies, Places};
use crate::{
    certs::Resolver,
    verify::{Verifier, last_used::Writes},
};

/// Where the figures come from.
pub struct Sources {
    /// Decisions, and what they rest on.
    pub verifier: Arc<Verifier>,
    /// What became of `lastUsedAt`; none if it is not written.
    pub last_used: Option<Arc<Writes>>,
    /// How often everything was listed anew.
    pub lists: Arc<AtomicU64>,
    /// The connections of the proxies.
    pub places: Arc<Places>,
    /// The memory of bodies.
    pub bodies: Arc<Bodies>,
    /// The certificate; none for plain HTTP.
    pub certificate: Option<Arc<Resolver>>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

/// A registry of all of it.
#[must_use]
pub fn registry(sources: Sources) -> Arc<Registry> {
    let mut registry = Registry::with_prefix("keywright_verifier");
    registry.register_collector(Box::new(sources));
    Arc::new(registry)
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let verifier = &self.verifier;
        let mut decisions = encoder.encode_descriptor("decisions", "Requests judged", None, MetricType::Counter)?;
        for (front_end, refused, count) in verifier.journal.counts() {
            let verdict = if refused.is_none() { "Allowed" } else { "Refused" };
            let reason = refused.map_or("", |reason| reason.name());
            let labels = [("front_end", front_end.name()), ("verdict", verdict), ("reason", reason)];
            ConstCounter::new(count).encode(decisions.encode_family(&labels)?)?;
        }
        let mut counter = |name: &str, help: &str, values: &[(&[(&str, &str)], u64)]| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, value) in values {
                ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
            }
            Ok::<(), fmt::Error>(())
        };
        counter("refusals_unlogged", "Refusals that the log had no room for", &[(&[], verifier.journal.unlogged())])?;
        counter("lists", "How often all ApiKeys were listed", &[(&[], self.lists.load(Ordering::Relaxed))])?;
        let turned_away = [(&[] as &[_], self.places.turned_away())];
        counter("connections_turned_away", "Connections for which there was no place", &turned_away)?;
        let closed_idle = [(&[] as &[_], self.places.closed_idle())];
        counter("connections_closed_idle", "Idle connections that were closed to make room for others", &closed_idle)?;
        let reasons: Vec<_> = self.bodies.refused().map(|(why, count)| ([("reason", why.name())], count)).collect();
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
        gauge("digests", "Values of keys, known by digest; two in the overlap of a rotation", size.digests as f64)?;
        gauge(
            "duplicate_digests",
            "Values that another ApiKey has too, for which they were written first",
            size.duplicates as f64,
        )?;
        gauge("grant_sets", "Different sets of presets and permissions", size.grants as f64)?;
        gauge("index_bytes", "Memory of the index", size.bytes as f64)?;
        gauge(
            "names_left_out",
            "Names of permissions that no catalogue has and for which the index has no room",
            size.names_left_out as f64,
        )?;
        gauge("connections", "Connections that are open", self.places.taken() as f64)?;
        gauge("synced", "Whether every key and catalogue was listed", f64::from(u8::from(verifier.is_synced())))?;
        if let Some(age) = verifier.freshness.age(verifier.clock.exact()) {
            gauge("staleness_seconds", "Since when the API server was not heard", age.as_secs_f64())?;
        }
        if let Some(most) = verifier.options.max_staleness {
            gauge("max_staleness_seconds", "Staleness from which on nobody passes", most.as_secs_f64())?;
        }
        let status = self.certificate.as_ref().map(|resolver| resolver.status());
        if let Some(end) = status.and_then(|status| status.leaf_not_after) {
            gauge("certificate_expiry_timestamp_seconds", "When the certificate expires", end.as_second() as f64)?;
        }
        Ok(())
    }
}
