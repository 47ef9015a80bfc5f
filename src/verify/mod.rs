//! `keywright verifier`: whether a request may pass. One decision, and one file a front end.
//!
//! | file | what it is |
//! | --- | --- |
//! | [`decision`] | the decision: a credential, what the route asks for, the keyring and the time, and nothing else |
//! | [`answer`] | what a proxy and its client are told, as HTTP headers and bodies |
//! | [`server`] | the service on the port: which front end a request is for |
//! | [`forward_auth`] | Envoy ext_authz over HTTP, nginx, Caddy, Traefik |
//! | [`envoy_grpc`] | Envoy ext_authz v3 over gRPC |
//! | [`introspection`] | RFC 7662, for anything else |
//! | [`freshness`] | how old the knowledge is |
//! | [`journal`] | logs and metrics of decisions |
//! | [`last_used`] | when keys were used, told to the cluster now and then |
//!
//! Nothing on the way of a request waits: no call, no lock for longer than it takes to write one key down. Nothing here
//! trusts what a client can set: what a route asks for comes from the proxy's configuration, which each front end reads
//! from the one place that only the configuration decides.

pub mod answer;
pub mod decision;
pub mod envoy_grpc;
pub mod forward_auth;
pub mod freshness;
pub mod introspection;
pub mod journal;
pub mod last_used;
pub mod server;

use std::{sync::Arc, time::Duration};

pub use decision::{Identity, Refusal};
use freshness::Freshness;
use journal::{FrontEnd, Journal};

use crate::{
    domain::{
        credential::{Credential, Source},
        requirement::{Misconfigured, Requirement},
        verification::Reason,
    },
    index::keyring::Keyring,
    runtime::clock::Clock,
};

/// How requests are judged.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where keys are read from.
    pub sources: Vec<Source>,
    /// What a route asks for that names no permission; none refuses it.
    pub default_permission: Option<String>,
    /// The permission that a key needs to introspect others; none turns introspection off.
    pub introspection_permission: Option<String>,
    /// The permission with which a key may introspect those of other teams as well.
    pub introspection_cluster_permission: Option<String>,
    /// Whether clients are told the name and namespace of a key that may not pass.
    pub tell_key_names: bool,
    /// How old the knowledge may be; none for any age.
    pub max_staleness: Option<Duration>,
}

/// What all front ends share.
pub struct Verifier {
    /// Every key.
    pub keys: Arc<Keyring>,
    /// How old that is.
    pub freshness: Freshness,
    /// The time.
    pub clock: Clock,
    /// How requests are judged.
    pub options: Options,
    /// Who is told.
    pub journal: Journal,
}

impl Verifier {
    /// Decides, and notes what was decided. `traceparent` is asked for only when it is written down.
    ///
    /// # Errors
    /// Why the request may not pass.
    pub fn decide<'t>(
        &self,
        front_end: FrontEnd,
        credential: &Credential<'_>,
        requirement: Result<Requirement<'_>, Misconfigured>,
        traceparent: impl FnOnce() -> Option<&'t [u8]>,
    ) -> Result<Identity, Refusal> {
        let now = self.clock.exact();
        let verdict = match self.freshness.check(now, self.options.max_staleness) {
            Ok(()) => decision::decide(&self.keys, credential, requirement, now)
                .map_err(|refusal| if self.options.tell_key_names { refusal.naming_the_key() } else { refusal }),
            Err(reason) => Err(Refusal::of(reason)),
        };
        self.journal.note(front_end, &verdict, now, traceparent);
        verdict
    }

    /// Whether every key and every catalogue was listed, at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.freshness.check(self.clock.exact(), None) != Err(Reason::NotSynced)
    }

    fn reads_queries(&self) -> bool {
        self.options.sources.iter().any(|source| matches!(source, Source::Query(_)))
    }
}
