//! Leader election over one `coordination.k8s.io/v1` Lease.
//!
//! No replica trusts the clock of another machine. `renewTime` is only informative: a lease expires for a replica that
//! has observed it unchanged for its duration by its own monotonic clock ([`evaluate`]). The leader stops before
//! another replica may take over: other replicas wait `duration` from the moment at which they observed the last
//! renewal, and the leader counts the shorter `renew_deadline` from the moment before it sent that renewal.
//!
//! A lease cannot stop a write that is already sent. `create` and resourceVersions make writes safe; the lease only
//! avoids duplicate work.

use std::{net::SocketAddr, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, error::Elapsed, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::clock::Clock;
use crate::controller::FIELD_MANAGER;

/// The annotation of the Lease with the address (`IP:PORT`) at which the leader's webhook accepts notices of other
/// replicas. A forged address makes replicas connect to it, but discloses nothing: they send notices only to a server
/// with a certificate of the operator's CA.
pub const ADDRESS: &str = "keywright.dev/address";

/// The Lease, the identity of this replica, and the timing.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// The name of the Lease.
    pub name: String,
    /// The namespace of the Lease.
    pub namespace: String,
    /// The identity of this process. It must be unique: two processes with one identity would both lead.
    pub identity: String,
    /// The time for which other replicas wait after the last observed renewal. Whole seconds, at least one.
    pub duration: Duration,
    /// The time for which the leader leads without a renewal. Shorter than `duration`. The leader renews after a
    /// quarter.
    pub renew_deadline: Duration,
    /// The maximum time between two attempts while another replica leads or the last attempt failed.
    pub retry_period: Duration,
    /// The address at which other replicas reach this one, for [`ADDRESS`].
    pub address: Option<SocketAddr>,
    /// Receives the address of the leader at each read of the Lease. `None` if this replica leads, there is no leader,
    /// or the leader has no address.
    pub leader: watch::Sender<Option<SocketAddr>>,
}

impl LeaseConfig {
    /// The usual timing: duration 15 s, renew deadline 10 s, retry period 2 s.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            identity: identity.into(),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
            address: None,
            leader: watch::Sender::new(None),
        }
    }

    /// Publishes the address of the leader, if another replica leads.
    fn note_leader(&self, lease: Option<&Lease>) {
        let other = |lease: &Lease| {
            let holder = lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())?;
            let address = lease.metadata.annotations.as_ref()?.get(ADDRESS)?;
            (holder != self.identity).then(|| address.parse().ok()).flatten()
        };
        let leader = lease.and_then(other);
        self.leader.send_if_modified(|known| std::mem::replace(known, leader) != leader);
    }
}

/// The reason for the end of [`run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElectionEnded {
    /// The caller stopped the election. If this replica led, the lease is free for the next one.
    Released,
    /// This replica led, and another replica may lead now. The process must end.
    Lost,
}

/// The next action for a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElectionDecision {
    /// The lease is free or expired: take it.
    Acquire,
    /// This replica holds the lease: renew it.
    Renew,
    /// Another replica holds the lease until this time, unless the lease changes.
    Wait(Instant),
}

/// Decides for replica `me` about a lease with `spec` whose last change was observed at `changed`.
///
/// `fallback` is the duration of a lease that has none.
#[must_use]
pub fn evaluate(
    spec: Option<&LeaseSpec>,
    changed: Instant,
    me: &str,
    now: Instant,
    fallback: Duration,
) -> ElectionDecision {
    let Some(spec) = spec else { return ElectionDecision::Acquire };
    match spec.holder_identity.as_deref() {
        None | Some("") => ElectionDecision::Acquire,
        Some(holder) if holder == me => ElectionDecision::Renew,
        Some(_) => {
            let duration = spec
                .lease_duration_seconds
                .map_or(fallback, |s| Duration::from_secs(u64::try_from(s).unwrap_or_default()));
            let until = changed + duration;
            if now < until { ElectionDecision::Wait(until) } else { ElectionDecision::Acquire }
        }
    }
}

/// The spec that makes `me` the holder, or renews its lease. The time `at` is only informative.
fn claim(old: Option<&LeaseSpec>, me: &str, at: Timestamp, duration: Duration) -> LeaseSpec {
    let at = Some(MicroTime(at));
    let mut new = old.cloned().unwrap_or_default();
    if new.holder_identity.as_deref() != Some(me) {
        new.lease_transitions = Some(old.map_or(0, |o| o.lease_transitions.unwrap_or(0).saturating_add(1)));
        new.acquire_time.clone_from(&at);
        new.holder_identity = Some(me.to_owned());
    }
    new.lease_duration_seconds = Some(i32::try_from(duration.as_secs()).unwrap_or(i32::MAX).max(1));
    new.renew_time = at;
    new
}

/// The spec that frees the lease.
fn vacate(old: &LeaseSpec, at: Timestamp) -> LeaseSpec {
    LeaseSpec { holder_identity: None, lease_duration_seconds: Some(1), renew_time: Some(MicroTime(at)), ..old.clone() }
}

/// Takes part in the election until `shutdown`, or until leadership is lost.
///
/// `leadership` is true while this replica leads. The caller stops the work of the leader before it cancels `shutdown`,
/// since the next replica starts as soon as the lease is released. It ends the process on [`ElectionEnded::Lost`],
/// since another replica may already lead.
pub async fn run(
    client: Client,
    config: LeaseConfig,
    clock: Clock,
    leadership: watch::Sender<bool>,
    shutdown: CancellationToken,
) -> ElectionEnded {
    let api = Api::namespaced(client, &config.namespace);
    let mut candidate = Candidate { api, seen: None, held: None, leading_until: None, config, clock };
    let ended = tokio::select! {
        () = candidate.campaign(&leadership) => ElectionEnded::Lost,
        () = shutdown.cancelled() => ElectionEnded::Released,
    };
    leadership.send_replace(false);
    if ended == ElectionEnded::Released && candidate.leading_until.is_some() {
        candidate.release().await;
    }
    ended
}

/// Publishes the address of the leader for a replica that has left the election and still serves the API server. Never
/// ends.
pub async fn follow(client: Client, config: LeaseConfig) {
    let api = Api::<Lease>::namespaced(client, &config.namespace);
    loop {
        if let Ok(Ok(lease)) = timeout(config.retry_period, api.get_opt(&config.name)).await {
            config.note_leader(lease.as_ref());
        }
        sleep(config.retry_period / 2).await;
    }
}

struct Candidate {
    api: Api<Lease>,
    config: LeaseConfig,
    /// The source of the informative times.
    clock: Clock,
    /// The last spec that was read, and the time of the first read with this spec.
    seen: Option<(LeaseSpec, Instant)>,
    /// The Lease of the last write, unless another write may have changed it.
    held: Option<Lease>,
    /// The time until which this replica leads without another renewal. `None` if it does not lead.
    leading_until: Option<Instant>,
}

/// The result of an attempt.
enum AttemptOutcome {
    /// This replica holds the lease, by a write that was sent at this time.
    Held(Instant),
    /// Another replica holds the lease until this time.
    Taken(Instant),
}

#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("the API server did not answer in time")]
    Timeout(#[from] Elapsed),
    #[error(transparent)]
    Api(#[from] kube::Error),
}

impl Candidate {
    /// Tries to acquire the lease, renews it, and returns when leadership is lost.
    async fn campaign(&mut self, leadership: &watch::Sender<bool>) {
        loop {
            if self.leading_until.is_some_and(|until| Instant::now() >= until) {
                warn!(lease = %self.config.name, "the lease was not renewed in time");
                return;
            }
            let attempt = timeout_at(self.deadline(), self.attempt()).await;
            let pause = match attempt.map_err(AttemptError::from).and_then(|outcome| Ok(outcome?)) {
                Ok(AttemptOutcome::Held(sent)) => {
                    self.leading_until = Some(sent + self.config.renew_deadline);
                    if leadership.send_if_modified(|leads| !std::mem::replace(leads, true)) {
                        info!(lease = %self.config.name, identity = %self.config.identity, "leading");
                    }
                    // Counted from the request, so that a slow response does not delay the next renewal.
                    (sent + self.config.renew_deadline / 4).saturating_duration_since(Instant::now())
                }
                Ok(AttemptOutcome::Taken(_)) if self.leading_until.is_some() => {
                    warn!(lease = %self.config.name, "another replica holds the lease");
                    return;
                }
                Ok(AttemptOutcome::Taken(until)) => {
                    self.retry_pause().min(until.saturating_duration_since(Instant::now()))
                }
                Err(error) => {
                    // After a conflict, the next attempt reads the new holder.
                    if matches!(&error, AttemptError::Api(kube::Error::Api(status)) if status.code == 409) {
                        debug!(lease = %self.config.name, "another replica wrote the lease first");
                    } else {
                        warn!(lease = %self.config.name, %error, "cannot take or renew the lease");
                    }
                    // A leader retries sooner, before its deadline.
                    if self.leading_until.is_some() { self.retry_pause() / 4 } else { self.retry_pause() }
                }
            };
            let wake = Instant::now() + pause;
            sleep_until(self.leading_until.map_or(wake, |until| until.min(wake))).await;
        }
    }

    /// The deadline of an attempt that starts now. The client itself retries some failures for minutes.
    ///
    /// The deadline allows for a slow API server. A leader keeps time for a second attempt, since the connection of the
    /// first may be dead.
    fn deadline(&self) -> Instant {
        let now = Instant::now();
        match self.leading_until {
            Some(until) => until.min(now + (self.config.renew_deadline / 2).max(self.config.retry_period)),
            None => now + self.config.renew_deadline,
        }
    }

    /// Takes or renews the lease, if this replica may. A leader replaces its last write, and reads the Lease only if
    /// that fails, so that a renewal takes one request instead of two.
    async fn attempt(&mut self) -> kube::Result<AttemptOutcome> {
        if let Some(held) = self.held.take().filter(|_| self.leading_until.is_some()) {
            let sent = Instant::now();
            let new = claim(held.spec.as_ref(), &self.config.identity, self.clock.exact(), self.config.duration);
            match self.write(Some(held), new).await {
                Ok(written) => {
                    self.held = Some(written);
                    return Ok(AttemptOutcome::Held(sent));
                }
                // Another writer changed or deleted the Lease, or the response to the last write was lost.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(error),
            }
        }
        let read = self.api.get_opt(&self.config.name).await?;
        let now = Instant::now();
        self.config.note_leader(read.as_ref());
        let spec = read.as_ref().map(|lease| lease.spec.clone().unwrap_or_default());
        self.seen = match (self.seen.take(), &spec) {
            (Some(seen), Some(spec)) if seen.0 == *spec => Some(seen),
            (_, spec) => spec.clone().map(|spec| (spec, now)),
        };
        let changed = self.seen.as_ref().map_or(now, |seen| seen.1);
        let decision = evaluate(spec.as_ref(), changed, &self.config.identity, now, self.config.duration);
        // If the Lease of a leader is missing or free, another replica may have led in between.
        if self.leading_until.is_some() && decision != ElectionDecision::Renew {
            return Ok(AttemptOutcome::Taken(now));
        }
        if let ElectionDecision::Wait(until) = decision {
            return Ok(AttemptOutcome::Taken(until));
        }
        let new = claim(spec.as_ref(), &self.config.identity, self.clock.exact(), self.config.duration);
        let sent = Instant::now();
        self.held = Some(self.write(read, new).await?);
        Ok(AttemptOutcome::Held(sent))
    }

    /// Replaces the Lease that was read, or creates it. Fails with a conflict if it changed since the read.
    async fn write(&self, read: Option<Lease>, spec: LeaseSpec) -> kube::Result<Lease> {
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let spec = Some(spec);
        if let Some(Lease { mut metadata, .. }) = read {
            // The metadata includes the resourceVersion.
            self.advertise(&mut metadata);
            self.api.replace(&self.config.name, &params, &Lease { metadata, spec }).await
        } else {
            let mut metadata = ObjectMeta { name: Some(self.config.name.clone()), ..ObjectMeta::default() };
            self.advertise(&mut metadata);
            self.api.create(&params, &Lease { metadata, spec }).await
        }
    }

    /// Sets the address of this replica in the Lease, or removes that of the previous leader.
    fn advertise(&self, metadata: &mut ObjectMeta) {
        let annotations = metadata.annotations.get_or_insert_default();
        match self.config.address {
            Some(address) => annotations.insert(ADDRESS.to_owned(), address.to_string()),
            None => annotations.remove(ADDRESS),
        };
    }

    /// Frees the lease for the next replica. If that fails, other replicas wait until it expires.
    async fn release(&self) {
        let release = async {
            let Some(lease) = self.api.get_opt(&self.config.name).await? else { return Ok(()) };
            match lease.spec.clone() {
                Some(spec) if spec.holder_identity.as_deref() == Some(&self.config.identity) => {
                    self.write(Some(lease), vacate(&spec, self.clock.exact())).await.map(drop)
                }
                _ => Ok(()),
            }
        };
        match timeout(self.config.renew_deadline, release).await.map_err(AttemptError::from).and_then(|r| Ok(r?)) {
            Ok(()) => info!(lease = %self.config.name, "lease released"),
            Err(error) => warn!(lease = %self.config.name, %error, "cannot release the lease; it will expire"),
        }
    }

    /// The delay before the next attempt, with jitter, so that replicas do not retry at the same time.
    fn retry_pause(&self) -> Duration {
        self.config.retry_period.mul_f64(rand::random_range(0.75..1.0))
    }
}

mod tests;
