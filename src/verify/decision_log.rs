//! Metrics and logs of decisions: every decision is counted, and some are logged. Neither contains a value, a path or a
//! query.

use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;

use super::decision::{KeyIdentity, Refusal};
use crate::{
    domain::verification::Reason,
    telemetry::{histogram::DurationHistogram, rate_limit::RateLimit, traces::TraceParent},
};

/// The interface that a request came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrontEnd {
    /// Envoy ext_authz v3 over gRPC.
    EnvoyGrpc,
    /// Envoy ext_authz over HTTP.
    EnvoyHttp,
    /// nginx auth_request.
    Nginx,
    /// Caddy forward_auth.
    Caddy,
    /// Traefik ForwardAuth.
    Traefik,
    /// RFC 7662.
    Introspection,
}

impl FrontEnd {
    /// Every front end, in a fixed order.
    pub const ALL: [Self; 6] =
        [Self::EnvoyGrpc, Self::EnvoyHttp, Self::Nginx, Self::Caddy, Self::Traefik, Self::Introspection];

    /// The name in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EnvoyGrpc => "EnvoyGrpc",
            Self::EnvoyHttp => "EnvoyHttp",
            Self::Nginx => "Nginx",
            Self::Caddy => "Caddy",
            Self::Traefik => "Traefik",
            Self::Introspection => "Introspection",
        }
    }
}

/// The rates of logged decisions.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// One in this many allowed requests is logged; 0 for none.
    pub allowed_one_in: u64,
    /// The maximum number of logged refusals per second; 0 for none.
    pub refused_per_second: u64,
}

const OUTCOMES: usize = Reason::ALL.len() + 1;

/// Counts and logs decisions.
#[derive(Debug)]
pub struct DecisionLog {
    sampling: Sampling,
    /// By front end; each has one counter for allowed requests and one for each reason.
    counts: [[AtomicU64; OUTCOMES]; FrontEnd::ALL.len()],
    allowed: AtomicU64,
    refused: RateLimit,
    /// The time from the parsed request to the decision.
    pub durations: DurationHistogram,
}

impl DecisionLog {
    /// Creates a log without decisions.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        Self {
            sampling,
            counts: Default::default(),
            allowed: AtomicU64::new(0),
            refused: RateLimit::new(u32::try_from(sampling.refused_per_second).unwrap_or(u32::MAX)),
            durations: DurationHistogram::default(),
        }
    }

    /// Counts a decision, and logs it if its rate allows. `traceparent` is called only for a logged decision.
    pub fn note<'t>(
        &self,
        front_end: FrontEnd,
        verdict: &Result<KeyIdentity, Refusal>,
        now: Timestamp,
        traceparent: impl FnOnce() -> Option<&'t [u8]>,
    ) {
        let outcome = match verdict {
            Ok(_) => 0,
            Err(refusal) => refusal.reason as usize + 1,
        };
        self.counts[front_end as usize][outcome].fetch_add(1, Ordering::Relaxed);
        let logged = match verdict {
            Ok(_) => self.samples_allowed(),
            Err(_) => self.refused.allows(now),
        };
        if logged {
            log(front_end, verdict, TraceParent::parse(traceparent().unwrap_or_default()));
        }
    }

    fn samples_allowed(&self) -> bool {
        let one_in = self.sampling.allowed_one_in;
        one_in > 0 && self.allowed.fetch_add(1, Ordering::Relaxed).is_multiple_of(one_in)
    }

    /// The number of decisions by front end and reason; the reason is `None` for allowed requests.
    pub fn counts(&self) -> impl Iterator<Item = (FrontEnd, Option<Reason>, u64)> {
        FrontEnd::ALL.into_iter().flat_map(move |front_end| {
            let outcomes = std::iter::once(None).chain(Reason::ALL.into_iter().map(Some));
            outcomes
                .zip(&self.counts[front_end as usize])
                .map(move |(outcome, count)| (front_end, outcome, count.load(Ordering::Relaxed)))
        })
    }

    /// The number of refusals that were not logged because of the rate limit.
    #[must_use]
    pub fn unlogged(&self) -> u64 {
        self.refused.exceeded()
    }
}

fn log(front_end: FrontEnd, verdict: &Result<KeyIdentity, Refusal>, trace: Option<TraceParent<'_>>) {
    let (trace_id, span_id) = trace.map(|trace| (trace.trace_id, trace.span_id)).unzip();
    let front_end = front_end.name();
    match verdict {
        Ok(key) => tracing::info!(
            front_end,
            verdict = "Allowed",
            key_id = key.id,
            key_name = key.name,
            team = key.team,
            trace_id,
            span_id,
            "decision"
        ),
        Err(refusal) => {
            let key = refusal.key.as_deref();
            tracing::info!(
                front_end,
                verdict = "Refused",
                reason = refusal.reason.name(),
                description = %refusal.description,
                key_id = key.map(|key| key.id.as_str()),
                key_name = key.map(|key| key.name.as_str()),
                team = key.map(|key| key.team.as_str()),
                trace_id,
                span_id,
                "decision"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_trace_context_is_logged() {
        let trace = |text: &str| TraceParent::parse(text.as_bytes()).map(|trace| format!("{trace:?}"));
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(trace(good).unwrap(), "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331");
        for bad in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-kwt_651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333-01",
        ] {
            assert_eq!(trace(bad), None, "{bad}");
        }
    }

    #[test]
    fn logs_are_rate_limited_and_counters_are_complete() {
        let decision_log = DecisionLog::new(Sampling { allowed_one_in: 10, refused_per_second: 3 });
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!((0..100).filter(|_| decision_log.samples_allowed()).count(), 10);
        assert_eq!((0..100).filter(|_| decision_log.refused.allows(at(5))).count(), 3);
        assert_eq!((0..100).filter(|_| decision_log.refused.allows(at(6))).count(), 3);
        assert_eq!(decision_log.unlogged(), 194);
        let silent = DecisionLog::new(Sampling { allowed_one_in: 0, refused_per_second: 0 });
        assert!(!silent.samples_allowed() && !silent.refused.allows(at(5)));
        for _ in 0..7 {
            silent.note(FrontEnd::Caddy, &Err(Refusal::of(Reason::Expired)), at(5), || None);
        }
        let seen: Vec<_> = silent.counts().filter(|(_, _, count)| *count > 0).collect();
        assert_eq!(seen, [(FrontEnd::Caddy, Some(Reason::Expired), 7)]);
        assert_eq!(silent.counts().count(), 6 * 12);
    }
}
