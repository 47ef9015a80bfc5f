//! `keywright verifier` decides whether a request is allowed: one decision function, and one file for each front end.
//!
//! | file | content |
//! | --- | --- |
//! | [`decision`] | the decision, from a credential, the requirement of the route, the key index and the time only |
//! | [`answer`] | the responses to a proxy and its client: HTTP headers and bodies |
//! | [`server`] | the service on the port, which selects the front end of a request |
//! | [`forward_auth`] | Envoy ext_authz over HTTP, nginx, Caddy, Traefik |
//! | [`envoy_grpc`] | Envoy ext_authz v3 over gRPC |
//! | [`introspection`] | token introspection (RFC 7662), for other clients |
//! | [`freshness`] | the age of the data from the API server |
//! | [`decision_log`] | logs and metrics of decisions |
//! | [`last_used`] | writes of `status.lastUsedAt` |
//!
//! A decision makes no call to another server, and waits for a lock only while an update of the index takes effect. It
//! trusts nothing that a client can set: each front end reads the requirement of a route from the one part of the
//! request that only the configuration of the proxy sets.

pub mod answer;
pub mod decision;
pub mod decision_log;
pub mod envoy_grpc;
pub mod forward_auth;
pub mod freshness;
pub mod introspection;
pub mod last_used;
pub mod server;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use decision::{KeyIdentity, Refusal};
use decision_log::{DecisionLog, FrontEnd};
use freshness::Freshness;

use crate::{
    clock::Clock,
    domain::{
        credential::{Credential, Source},
        requirement::{Misconfigured, Requirement},
        verification::Reason,
    },
    index::key_index::KeyIndex,
    telemetry::traces,
};

/// The options of decisions.
#[derive(Clone, Debug)]
pub struct VerifierOptions {
    /// The parts of a request that may hold the key.
    pub sources: Vec<Source>,
    /// The permission that a route without one requires. `None` refuses such a route.
    pub default_permission: Option<String>,
    /// The permission that a key needs to introspect others. `None` disables introspection.
    pub introspection_permission: Option<String>,
    /// The permission that a key needs to also introspect keys of other teams.
    pub introspection_cluster_permission: Option<String>,
    /// Whether a refusal contains the name and namespace of the ApiKey.
    pub tell_key_names: bool,
    /// The maximum age of the data from the API server. `None` for no limit.
    pub max_staleness: Option<Duration>,
}

/// Writes a decision to its span.
fn describe(span: &tracing::Span, decision: &Result<KeyIdentity, Refusal>) {
    let key = match decision {
        Ok(key) => {
            span.record("keywright.verdict", "Allowed");
            Some(key)
        }
        Err(refusal) => {
            span.record("keywright.verdict", "Refused").record("keywright.reason", refusal.reason.name());
            refusal.key.as_deref()
        }
    };
    if let Some(key) = key {
        span.record("keywright.key.id", &*key.id)
            .record("k8s.namespace.name", &*key.team)
            .record("k8s.object.name", &*key.name);
    }
}

/// The state that all front ends share.
pub struct Verifier {
    /// The index of all keys.
    pub keys: Arc<KeyIndex>,
    /// The age of the index.
    pub freshness: Freshness,
    /// The source of the current time.
    pub clock: Clock,
    /// The options of decisions.
    pub options: VerifierOptions,
    /// Logs and metrics of decisions.
    pub decision_log: DecisionLog,
}

impl Verifier {
    /// Decides on a request, and counts and logs the decision. `traceparent` is called only for a logged decision.
    ///
    /// # Errors
    /// A [`Refusal`], if the request is not allowed.
    pub fn decide<'t>(
        &self,
        front_end: FrontEnd,
        credential: &Credential<'_>,
        requirement: Result<Requirement<'_>, Misconfigured>,
        traceparent: impl FnOnce() -> Option<&'t [u8]>,
    ) -> Result<KeyIdentity, Refusal> {
        let started = Instant::now();
        let now = self.clock.exact();
        let span = tracing::info_span!(
            target: traces::TARGET,
            "check",
            keywright.front_end = front_end.name(),
            keywright.verdict = tracing::field::Empty,
            keywright.reason = tracing::field::Empty,
            keywright.key.id = tracing::field::Empty,
            k8s.namespace.name = tracing::field::Empty,
            k8s.object.name = tracing::field::Empty,
        );
        let decision = match self.freshness.check(now, self.options.max_staleness) {
            Ok(()) => decision::decide(&self.keys, credential, requirement, now)
                .map_err(|refusal| if self.options.tell_key_names { refusal.naming_the_key() } else { refusal }),
            Err(reason) => Err(Refusal::of(reason)),
        };
        if span.is_disabled() {
            self.decision_log.note(front_end, &decision, now, traceparent);
        } else {
            let traceparent = traceparent();
            traces::continue_trace(&span, traceparent);
            describe(&span, &decision);
            self.decision_log.note(front_end, &decision, now, || traceparent);
        }
        self.decision_log.durations.observe(started.elapsed());
        decision
    }

    /// Whether all ApiKeys and PermissionCatalogs were listed at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.freshness.check(self.clock.exact(), None) != Err(Reason::NotSynced)
    }

    fn reads_queries(&self) -> bool {
        self.options.sources.iter().any(|source| matches!(source, Source::Query(_)))
    }
}
