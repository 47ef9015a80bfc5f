//! Leader election over one `coordination.k8s.io/v1` Lease: which replica may do the work that only one may do.
//!
//! The Lease object is the only thing shared, so no clock of another machine is ever trusted: `renewTime` is written
//! for people, and a lease runs out only when *we* have seen it unchanged for as long as it lasts ([`evaluate`]).
//! The leader in turn gives up earlier than anyone else may take over: others wait `duration` from the moment when
//! they saw the last renewal, the leader counts `renew_deadline`, which is shorter, from the moment before it sent it.
//!
//! A lease cannot fence writes that are already on their way. What must happen once is held by `create` and
//! resourceVersions where it is written; the lease only spares replicas from doing the same work.

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

use super::clock::Clock;
use crate::controller::FIELD_MANAGER;

/// The annotation of the Lease with the address at which the leader's webhook takes notices of other replicas, as
/// `IP:PORT`. Whoever can forge it can make replicas connect there, but reads nothing: they send notices only to a peer
/// that has a certificate of the operator's CA.
pub const ADDRESS: &str = "keywright.dev/address";

/// Which Lease to hold, as whom, and how patiently.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// Name of the Lease object.
    pub name: String,
    /// Namespace of the Lease object.
    pub namespace: String,
    /// Who we are. Unique to this process: two processes with one identity would both lead.
    pub identity: String,
    /// How long others wait after the last renewal that they saw. Whole seconds, at least one.
    pub duration: Duration,
    /// How long we go on leading without a renewal. Shorter than `duration`; renewed at a quarter.
    pub renew_deadline: Duration,
    /// At most this long between two attempts, while the lease is not ours or the last attempt failed.
    pub retry_period: Duration,
    /// Where others reach us while we lead, for [`ADDRESS`].
    pub address: Option<SocketAddr>,
    /// Receives the address of the leader, as often as the Lease is read: nothing while we lead, nobody does, or the
    /// leader does not say.
    pub leader: watch::Sender<Option<SocketAddr>>,
}

impl LeaseConfig {
    /// The usual timing: 15 s, given up after 10 s, tried every 2 s.
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

    /// Tells the address of the leader in a Lease, if another replica leads and says where it is.
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

/// Why [`run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// We were asked to stop. If we led, the lease is free for the next replica.
    Released,
    /// We led, and cannot be sure any more that nobody else does. The process must end.
    Lost,
}

/// What to do about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is nobody's, or ran out: take it.
    Acquire,
    /// It is ours: prolong it.
    Renew,
    /// It is another's until then, unless it changes.
    Wait(Instant),
}

/// What `me` should do about a lease that holds `spec` and was seen to change last at `changed`, by our own clock.
///
/// `fallback` is how long a lease lasts that does not say so.
#[must_use]
pub fn evaluate(spec: Option<&LeaseSpec>, changed: Instant, me: &str, now: Instant, fallback: Duration) -> Decision {
    let Some(spec) = spec else { return Decision::Acquire };
    match spec.holder_identity.as_deref() {
        None | Some("") => Decision::Acquire,
        Some(holder) if holder == me => Decision::Renew,
        Some(_) => {
            let lasts = spec
                .lease_duration_seconds
                .map_or(fallback, |s| Duration::from_secs(u64::try_from(s).unwrap_or_default()));
            let until = changed + lasts;
            if now < until { Decision::Wait(until) } else { Decision::Acquire }
        }
    }
}

/// The record that makes or keeps `me` the holder; `at` is for people to read.
fn claim(old: Option<&LeaseSpec>, me: &str, at: Timestamp, lasts: Duration) -> LeaseSpec {
    let at = Some(MicroTime(at));
    let mut new = old.cloned().unwrap_or_default();
    if new.holder_identity.as_deref() != Some(me) {
        new.lease_transitions = Some(old.map_or(0, |o| o.lease_transitions.unwrap_or(0).saturating_add(1)));
        new.acquire_time.clone_from(&at);
        new.holder_identity = Some(me.to_owned());
    }
    new.lease_duration_seconds = Some(i32::try_from(lasts.as_secs()).unwrap_or(i32::MAX).max(1));
    new.renew_time = at;
    new
}

/// The record that leaves the lease to whoever asks next.
fn vacate(old: &LeaseSpec, at: Timestamp) -> LeaseSpec {
    LeaseSpec { holder_identity: None, lease_duration_seconds: Some(1), renew_time: Some(MicroTime(at)), ..old.clone() }
}

/// Takes part in the election until `shutdown`, or until leadership is lost.
///
/// `leadership` is true while we lead. Stop the leader's work before cancelling `shutdown`, since the next replica
/// starts as soon as the lease is released; and end the process on [`Ended::Lost`], since another may lead already.
pub async fn run(
    client: Client,
    config: LeaseConfig,
    clock: Clock,
    leadership: watch::Sender<bool>,
    shutdown: CancellationToken,
) -> Ended {
    let api = Api::namespaced(client, &config.namespace);
    let mut candidate = Candidate { api, seen: None, held: None, leading_until: None, config, clock };
    let ended = tokio::select! {
        () = candidate.campaign(&leadership) => Ended::Lost,
        () = shutdown.cancelled() => Ended::Released,
    };
    leadership.send_replace(false);
    if ended == Ended::Released && candidate.leading_until.is_some() {
        candidate.release().await;
    }
    ended
}

/// Goes on telling who leads, for a replica that has left the election and still answers the API server. Never ends.
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
    /// For what is written for people. Nothing is decided by it.
    clock: Clock,
    /// The record as last read, and when we first read it so.
    seen: Option<(LeaseSpec, Instant)>,
    /// The lease as we last wrote it, unless something else may have become of it.
    held: Option<Lease>,
    /// When we lead: how long we may believe it without another renewal.
    leading_until: Option<Instant>,
}

/// What one attempt found.
enum Outcome {
    /// The lease is ours, by a write sent at this time.
    Held(Instant),
    /// The lease is another's until this time.
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
    /// Stands for election, leads, and returns when leadership is lost.
    async fn campaign(&mut self, leadership: &watch::Sender<bool>) {
        loop {
            if self.leading_until.is_some_and(|until| Instant::now() >= until) {
                warn!(lease = %self.config.name, "not renewed in time");
                return;
            }
            let attempt = timeout_at(self.deadline(), self.attempt()).await;
            let pause = match attempt.map_err(AttemptError::from).and_then(|outcome| Ok(outcome?)) {
                Ok(Outcome::Held(sent)) => {
                    self.leading_until = Some(sent + self.config.renew_deadline);
                    // Only a change is news to those who watch.
                    if leadership.send_if_modified(|leads| !std::mem::replace(leads, true)) {
                        info!(lease = %self.config.name, identity = %self.config.identity, "leading");
                    }
                    // A slow answer is no reason to renew later.
                    (sent + self.config.renew_deadline / 4).saturating_duration_since(Instant::now())
                }
                Ok(Outcome::Taken(_)) if self.leading_until.is_some() => {
                    warn!(lease = %self.config.name, "another replica holds the lease");
                    return;
                }
                Ok(Outcome::Taken(until)) => self.retry_pause().min(until.saturating_duration_since(Instant::now())),
                Err(error) => {
                    // A conflict is how a race is lost; the next attempt reads who won it.
                    if matches!(&error, AttemptError::Api(kube::Error::Api(status)) if status.code == 409) {
                        debug!(lease = %self.config.name, "another replica wrote the lease first");
                    } else {
                        warn!(lease = %self.config.name, %error, "cannot take or renew the lease");
                    }
                    // A leader has no time to lose.
                    if self.leading_until.is_some() { self.retry_pause() / 4 } else { self.retry_pause() }
                }
            };
            let wake = Instant::now() + pause;
            sleep_until(self.leading_until.map_or(wake, |until| until.min(wake))).await;
        }
    }

    /// When an attempt that begins now is given up. The client retries some failures for minutes, so that each needs an
    /// end of its own.
    ///
    /// An API server may be slow, and is waited for. But a leader leaves time for a second attempt, since what has no answer
    /// may also be a connection that leads nowhere.
    fn deadline(&self) -> Instant {
        let now = Instant::now();
        match self.leading_until {
            Some(until) => until.min(now + (self.config.renew_deadline / 2).max(self.config.retry_period)),
            None => now + self.config.renew_deadline,
        }
    }

    /// Takes or prolongs the lease if it is ours to take. A leader writes over what it wrote last, and reads only when
    /// that is not what is there any more: so a renewal takes one answer of the API server, and not two.
    async fn attempt(&mut self) -> kube::Result<Outcome> {
        if let Some(held) = self.held.take().filter(|_| self.leading_until.is_some()) {
            let sent = Instant::now();
            let new = claim(held.spec.as_ref(), &self.config.identity, self.clock.exact(), self.config.duration);
            match self.write(Some(held), new).await {
                Ok(written) => {
                    self.held = Some(written);
                    return Ok(Outcome::Held(sent));
                }
                // Somebody else wrote, or we did and never had the answer; or it is gone.
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
        // A leader whose record is gone or vacant cannot know who led in between.
        if self.leading_until.is_some() && decision != Decision::Renew {
            return Ok(Outcome::Taken(now));
        }
        if let Decision::Wait(until) = decision {
            return Ok(Outcome::Taken(until));
        }
        let new = claim(spec.as_ref(), &self.config.identity, self.clock.exact(), self.config.duration);
        let sent = Instant::now();
        self.held = Some(self.write(read, new).await?);
        Ok(Outcome::Held(sent))
    }

    /// Writes the record over the object that was read, or creates the object. A conflict if it changed since.
    async fn write(&self, read: Option<Lease>, spec: LeaseSpec) -> kube::Result<Lease> {
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let spec = Some(spec);
        if let Some(Lease { mut metadata, .. }) = read {
            // What was read carries its resourceVersion.
            self.advertise(&mut metadata);
            self.api.replace(&self.config.name, &params, &Lease { metadata, spec }).await
        } else {
            let mut metadata = ObjectMeta { name: Some(self.config.name.clone()), ..ObjectMeta::default() };
            self.advertise(&mut metadata);
            self.api.create(&params, &Lease { metadata, spec }).await
        }
    }

    /// Writes our address into the Lease, or takes out that of the leader before us.
    fn advertise(&self, metadata: &mut ObjectMeta) {
        let annotations = metadata.annotations.get_or_insert_default();
        match self.config.address {
            Some(address) => annotations.insert(ADDRESS.to_owned(), address.to_string()),
            None => annotations.remove(ADDRESS),
        };
    }

    /// Leaves the lease to the next replica. Best effort: without it they wait until it runs out.
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
            Err(error) => warn!(lease = %self.config.name, %error, "cannot release the lease; it runs out by itself"),
        }
    }

    /// Replicas that failed together must not try again together.
    fn retry_pause(&self) -> Duration {
        self.config.retry_period.mul_f64(rand::random_range(0.75..1.0))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::{
        Json, Router,
        extract::State,
        http::StatusCode,
        response::{IntoResponse, Response},
        routing::{get, post},
    };

    use super::*;

    fn spec(holder: Option<&str>, seconds: Option<i32>) -> LeaseSpec {
        LeaseSpec {
            holder_identity: holder.map(str::to_owned),
            lease_duration_seconds: seconds,
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_runs_out_by_our_own_clock_alone() {
        use Decision::{Acquire, Renew, Wait};
        let changed = Instant::now();
        let at = |seconds: u64| changed + Duration::from_secs(seconds);
        let table = [
            ("absent", None, 0, Acquire),
            ("vacant", Some(spec(None, Some(1))), 0, Acquire),
            ("vacant, the other spelling", Some(spec(Some(""), Some(15))), 0, Acquire),
            ("ours", Some(spec(Some("me"), Some(15))), 0, Renew),
            ("ours and run out, but nobody took it", Some(spec(Some("me"), Some(15))), 99, Renew),
            ("another's, just seen", Some(spec(Some("you"), Some(15))), 0, Wait(at(15))),
            ("another's, one second left", Some(spec(Some("you"), Some(15))), 14, Wait(at(15))),
            ("another's, unchanged for its whole duration", Some(spec(Some("you"), Some(15))), 15, Acquire),
            ("another's, no duration given", Some(spec(Some("you"), None)), 29, Wait(at(30))),
            ("another's, no duration given, run out", Some(spec(Some("you"), None)), 30, Acquire),
            ("another's, with a senseless duration", Some(spec(Some("you"), Some(-5))), 0, Acquire),
        ];
        for (name, spec, now, expected) in table {
            assert_eq!(evaluate(spec.as_ref(), changed, "me", at(now), Duration::from_secs(30)), expected, "{name}");
        }
        // A renewTime far in the past or the future changes nothing.
        for seconds in [0, 4_000_000_000] {
            let renew_time = Some(MicroTime(Timestamp::from_second(seconds).unwrap()));
            let spec = LeaseSpec { renew_time, ..spec(Some("you"), Some(15)) };
            assert_eq!(evaluate(Some(&spec), changed, "me", at(1), Duration::ZERO), Wait(at(15)));
        }
    }

    #[test]
    fn records_say_who_leads_since_when_and_how_often_that_changed() {
        let t = |s| Timestamp::from_second(s).unwrap();
        let lasts = Duration::from_secs(15);
        let first = claim(None, "a", t(1), lasts);
        assert_eq!(first.holder_identity.as_deref(), Some("a"));
        assert_eq!((first.lease_transitions, first.lease_duration_seconds), (Some(0), Some(15)));
        assert_eq!(
            (first.acquire_time.clone(), first.renew_time.clone()),
            (Some(MicroTime(t(1))), Some(MicroTime(t(1))))
        );

        let renewed = claim(Some(&first), "a", t(6), lasts);
        assert_eq!((renewed.lease_transitions, renewed.acquire_time.clone()), (Some(0), Some(MicroTime(t(1)))));
        assert_eq!(renewed.renew_time, Some(MicroTime(t(6))));

        let free = vacate(&renewed, t(7));
        assert_eq!((free.holder_identity.clone(), free.lease_duration_seconds), (None, Some(1)));

        let second = claim(Some(&free), "b", t(8), lasts);
        assert_eq!((second.lease_transitions, second.acquire_time), (Some(1), Some(MicroTime(t(8)))));
        assert_eq!(second.lease_duration_seconds, Some(15));
    }

    /// A Lease endpoint that checks resourceVersions, as the API server does.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<(Option<Lease>, Fault)>>);

    #[derive(Clone, Copy, Default, PartialEq)]
    enum Fault {
        #[default]
        None,
        Hang,
        /// The next request alone hangs.
        HangOnce,
        Refuse,
        /// Every answer takes so many milliseconds.
        Slow(u64),
    }

    impl Server {
        fn client(&self) -> Client {
            let one = get(Self::read).put(Self::replace);
            let app = Router::new()
                .route("/apis/coordination.k8s.io/v1/namespaces/ns/leases", post(Self::create))
                .route("/apis/coordination.k8s.io/v1/namespaces/ns/leases/l", one)
                .with_state(self.clone());
            Client::new(app, "ns")
        }

        fn status(code: StatusCode, reason: &str) -> Response {
            let body = kube::core::Status::failure(reason, reason).with_code(code.as_u16());
            (code, Json(body)).into_response()
        }

        async fn fault(&self) -> Option<Response> {
            let fault = {
                let mut state = self.0.lock().unwrap();
                let fault = state.1;
                if fault == Fault::HangOnce {
                    state.1 = Fault::None;
                }
                fault
            };
            match fault {
                Fault::None => None,
                Fault::Slow(millis) => {
                    tokio::time::sleep(Duration::from_millis(millis)).await;
                    None
                }
                Fault::Hang | Fault::HangOnce => std::future::pending().await,
                Fault::Refuse => Some(Self::status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError")),
            }
        }

        async fn read(State(server): State<Self>) -> Response {
            if let Some(fault) = server.fault().await {
                return fault;
            }
            match &server.0.lock().unwrap().0 {
                Some(lease) => Json(lease.clone()).into_response(),
                None => Self::status(StatusCode::NOT_FOUND, "NotFound"),
            }
        }

        async fn create(State(server): State<Self>, Json(lease): Json<Lease>) -> Response {
            if let Some(fault) = server.fault().await {
                return fault;
            }
            server.store(lease, None)
        }

        async fn replace(State(server): State<Self>, Json(lease): Json<Lease>) -> Response {
            if let Some(fault) = server.fault().await {
                return fault;
            }
            let version = lease.metadata.resource_version.clone();
            assert!(version.is_some(), "a write without resourceVersion");
            server.store(lease, version.as_deref())
        }

        fn store(&self, mut lease: Lease, version: Option<&str>) -> Response {
            let mut state = self.0.lock().unwrap();
            let current = state.0.as_ref().and_then(|l| l.metadata.resource_version.clone());
            if current.as_deref() != version {
                return Self::status(StatusCode::CONFLICT, "Conflict");
            }
            let next = current.map_or(1, |v| v.parse::<u64>().unwrap() + 1);
            lease.metadata.resource_version = Some(next.to_string());
            state.0 = Some(lease.clone());
            Json(lease).into_response()
        }

        fn fail(&self, fault: Fault) {
            self.0.lock().unwrap().1 = fault;
        }

        fn holder(&self) -> Option<String> {
            self.0.lock().unwrap().0.as_ref()?.spec.as_ref()?.holder_identity.clone()
        }
    }

    struct Replica {
        leads: watch::Receiver<bool>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<Ended>,
    }

    fn start(server: &Server, identity: &str) -> Replica {
        let config = LeaseConfig {
            duration: Duration::from_secs(1),
            renew_deadline: Duration::from_millis(700),
            retry_period: Duration::from_millis(150),
            ..LeaseConfig::new("ns", "l", identity)
        };
        let (sender, leads) = watch::channel(false);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(server.client(), config, Clock::system(), sender, shutdown.clone()));
        Replica { leads, shutdown, task }
    }

    async fn within(limit: u64, what: impl Future<Output = ()>) {
        timeout(Duration::from_millis(limit), what).await.expect("not in time");
    }

    async fn leads(replica: &mut Replica) {
        replica.leads.wait_for(|leads| *leads).await.unwrap();
    }

    #[tokio::test]
    async fn one_of_two_leads_and_a_release_hands_over_at_once() {
        let server = Server::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        let mut b = start(&server, "b");
        // Longer than the lease lasts: renewals hold it.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(*a.leads.borrow() && !*b.leads.borrow());

        a.shutdown.cancel();
        assert_eq!(a.task.await.unwrap(), Ended::Released);
        within(400, leads(&mut b)).await;
        assert_eq!(server.holder().as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn a_replica_that_follows_knows_where_the_leader_is() {
        let server = Server::default();
        let candidate = |identity: &str, port: u16| {
            let address = Some(SocketAddr::from(([10, 0, 0, 1], port)));
            let config = LeaseConfig {
                duration: Duration::from_secs(1),
                renew_deadline: Duration::from_millis(700),
                retry_period: Duration::from_millis(150),
                address,
                ..LeaseConfig::new("ns", "l", identity)
            };
            let (sender, shutdown) = (watch::Sender::new(false), CancellationToken::new());
            let knows = config.leader.subscribe();
            let run = run(server.client(), config.clone(), Clock::system(), sender, shutdown.clone());
            (config, knows, shutdown, tokio::spawn(run))
        };
        let known = async |knows: &mut watch::Receiver<Option<SocketAddr>>, port: Option<u16>| {
            let known = knows.wait_for(|known| known.map(|address| address.port()) == port);
            timeout(Duration::from_secs(2), known).await.expect("not in time").unwrap();
        };
        let (first, mut first_knows, stop_first, _running) = candidate("a", 1);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (_, mut second_knows, _stop_second, _running_too) = candidate("b", 2);
        known(&mut second_knows, Some(1)).await;
        known(&mut first_knows, None).await;
        // Somebody takes the annotation out: the leader puts it back.
        server.0.lock().unwrap().0.as_mut().unwrap().metadata.annotations = None;
        within(2000, async {
            while server.0.lock().unwrap().0.as_ref().unwrap().metadata.annotations.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        known(&mut second_knows, Some(1)).await;
        stop_first.cancel();
        let following = tokio::spawn(follow(server.client(), first));
        known(&mut first_knows, Some(2)).await;
        known(&mut second_knows, None).await;
        following.abort();
    }

    #[tokio::test]
    async fn a_crashed_leader_is_replaced_when_its_lease_runs_out() {
        let server = Server::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        let mut b = start(&server, "b");
        tokio::time::sleep(Duration::from_millis(200)).await;
        a.task.abort();
        within(2000, leads(&mut b)).await;
    }

    #[tokio::test]
    async fn a_leader_that_cannot_renew_stops_before_anyone_else_may_start() {
        for fault in [Fault::Hang, Fault::Refuse] {
            let server = Server::default();
            let mut a = start(&server, "a");
            within(500, leads(&mut a)).await;
            server.fail(fault);
            let failed = Instant::now();
            assert_eq!(a.task.await.unwrap(), Ended::Lost);
            assert!(failed.elapsed() < Duration::from_millis(900), "led for longer than others wait");
            assert!(!*a.leads.borrow());
        }
    }

    #[tokio::test]
    async fn a_leader_survives_a_short_outage() {
        let server = Server::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        server.fail(Fault::Refuse);
        tokio::time::sleep(Duration::from_millis(450)).await;
        server.fail(Fault::None);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(*a.leads.borrow() && !a.task.is_finished());
    }

    /// As 3 s are to the usual timing.
    const SLOW: Fault = Fault::Slow(210);

    #[tokio::test]
    async fn a_slow_api_server_keeps_its_leader() {
        let server = Server::default();
        server.fail(SLOW);
        let mut a = start(&server, "a");
        within(1500, leads(&mut a)).await;
        let b = start(&server, "b");
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(*a.leads.borrow() && !a.task.is_finished(), "it was lost");
        assert!(!*b.leads.borrow());
        a.shutdown.cancel();
        assert_eq!(a.task.await.unwrap(), Ended::Released);
        assert_eq!(server.holder(), None, "a release is as slow");
    }

    #[tokio::test]
    async fn a_request_that_is_never_answered_costs_no_lease() {
        let server = Server::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        for _ in 0..3 {
            server.fail(Fault::HangOnce);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(*a.leads.borrow() && !a.task.is_finished());
    }

    #[tokio::test]
    async fn a_leader_whose_lease_is_gone_or_taken_stops() {
        for taken in [true, false] {
            let server = Server::default();
            let mut a = start(&server, "a");
            within(500, leads(&mut a)).await;
            {
                let mut state = server.0.lock().unwrap();
                if taken {
                    let spec = state.0.as_mut().unwrap().spec.as_mut().unwrap();
                    spec.holder_identity = Some("b".to_owned());
                    state.0.as_mut().unwrap().metadata.resource_version = Some("1000".to_owned());
                } else {
                    state.0 = None;
                }
            }
            assert_eq!(a.task.await.unwrap(), Ended::Lost);
        }
    }
}
