//! What is written down of decisions: a counter each, and a line in the log of some. Never a value, a path or a query.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use jiff::Timestamp;

use super::decision::{Identity, Refusal};
use crate::domain::verification::Reason;

/// Who asks.
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
    /// Every one, in a fixed order.
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

/// How much of it is logged.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// One in so many requests that pass; 0 for none.
    pub allowed_one_in: u64,
    /// At most so many refusals a second; 0 for none.
    pub refused_per_second: u64,
}

const OUTCOMES: usize = Reason::ALL.len() + 1;

/// Counts and logs.
#[derive(Debug)]
pub struct Journal {
    sampling: Sampling,
    /// By front end, then allowed and each reason.
    counts: [[AtomicU64; OUTCOMES]; FrontEnd::ALL.len()],
    allowed: AtomicU64,
    /// The second in the upper half, how many refusals were logged in it in the lower.
    refused: AtomicU64,
    /// Refusals that the log has no room for.
    unlogged: AtomicU64,
}

impl Journal {
    /// Nothing was decided yet.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        Self {
            sampling,
            counts: Default::default(),
            allowed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            unlogged: AtomicU64::new(0),
        }
    }

    /// Writes down a decision.
    pub fn note<'t>(
        &self,
        front_end: FrontEnd,
        verdict: &Result<Identity, Refusal>,
        now: Timestamp,
        traceparent: impl FnOnce() -> Option<&'t [u8]>,
    ) {
        let outcome = match verdict {
            Ok(_) => 0,
            Err(refusal) => refusal.reason as usize + 1,
        };
        self.counts[front_end as usize][outcome].fetch_add(1, Ordering::Relaxed);
        let logged = match verdict {
            Ok(_) => self.takes_allowed(),
            Err(_) => self.takes_refused(now),
        };
        if logged {
            log(front_end, verdict, Trace::parse(traceparent().unwrap_or_default()));
        }
    }

    fn takes_allowed(&self) -> bool {
        let one_in = self.sampling.allowed_one_in;
        one_in > 0 && self.allowed.fetch_add(1, Ordering::Relaxed).is_multiple_of(one_in)
    }

    fn takes_refused(&self, now: Timestamp) -> bool {
        let second = u64::try_from(now.as_second()).unwrap_or_default() << 32;
        let most = self.sampling.refused_per_second.min(u64::from(u32::MAX));
        let next = |seen: u64| match seen {
            seen if seen < second => (most > 0).then_some(second | 1),
            seen if seen & 0xffff_ffff < most => Some(seen + 1),
            _ => None,
        };
        let taken = self.refused.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok();
        if !taken {
            self.unlogged.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// How often each front end came to each outcome; none for a request that passed.
    pub fn counts(&self) -> impl Iterator<Item = (FrontEnd, Option<Reason>, u64)> {
        FrontEnd::ALL.into_iter().flat_map(move |front_end| {
            let outcomes = std::iter::once(None).chain(Reason::ALL.into_iter().map(Some));
            outcomes
                .zip(&self.counts[front_end as usize])
                .map(move |(outcome, count)| (front_end, outcome, count.load(Ordering::Relaxed)))
        })
    }

    /// How many refusals the log had no room for.
    #[must_use]
    pub fn unlogged(&self) -> u64 {
        self.unlogged.load(Ordering::Relaxed)
    }
}

fn log(front_end: FrontEnd, verdict: &Result<Identity, Refusal>, trace: Option<Trace<'_>>) {
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

/// The trace that a request belongs to (W3C Trace Context, section 3.2), so that a line of the log is found from it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Trace<'a> {
    trace_id: &'a str,
    span_id: &'a str,
}

impl fmt::Debug for Trace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.trace_id, self.span_id)
    }
}

impl<'a> Trace<'a> {
    /// A client can send anything under this name: only what has the form is written down.
    fn parse(header: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(header).ok()?;
        let mut parts = text.split('-');
        let mut hex = |len: usize| {
            let part = parts.next()?;
            let form = part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
            form.then_some(part)
        };
        let (version, trace_id, span_id, _) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let zero = |id: &str| id.bytes().all(|b| b == b'0');
        (version != "ff" && !zero(trace_id) && !zero(span_id)).then_some(Self { trace_id, span_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_context_is_taken_over_if_it_is_one() {
        let trace = |text: &str| Trace::parse(text.as_bytes()).map(|trace| format!("{trace:?}"));
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
    fn what_is_logged_is_bounded_and_what_is_counted_is_not() {
        let journal = Journal::new(Sampling { allowed_one_in: 10, refused_per_second: 3 });
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!((0..100).filter(|_| journal.takes_allowed()).count(), 10);
        assert_eq!((0..100).filter(|_| journal.takes_refused(at(5))).count(), 3);
        assert_eq!((0..100).filter(|_| journal.takes_refused(at(6))).count(), 3);
        assert_eq!(journal.unlogged(), 194);
        let silent = Journal::new(Sampling { allowed_one_in: 0, refused_per_second: 0 });
        assert!(!silent.takes_allowed() && !silent.takes_refused(at(5)));
        for _ in 0..7 {
            silent.note(FrontEnd::Caddy, &Err(Refusal::of(Reason::Expired)), at(5), || None);
        }
        let seen: Vec<_> = silent.counts().filter(|(_, _, count)| *count > 0).collect();
        assert_eq!(seen, [(FrontEnd::Caddy, Some(Reason::Expired), 7)]);
        assert_eq!(silent.counts().count(), 6 * 12);
    }
}
