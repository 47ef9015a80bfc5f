#![cfg(test)]

use serde_json::json;

use super::*;
use crate::test_support::api_server::{FakeApiServer, Fault};

fn spec(holder: Option<&str>, seconds: Option<i32>) -> LeaseSpec {
    LeaseSpec { holder_identity: holder.map(str::to_owned), lease_duration_seconds: seconds, ..LeaseSpec::default() }
}

#[test]
fn a_lease_expires_by_the_local_clock_only() {
    use ElectionDecision::{Acquire, Renew, Wait};
    let changed = Instant::now();
    let at = |seconds: u64| changed + Duration::from_secs(seconds);
    let table = [
        ("absent", None, 0, Acquire),
        ("free", Some(spec(None, Some(1))), 0, Acquire),
        ("free, with an empty holder", Some(spec(Some(""), Some(15))), 0, Acquire),
        ("own", Some(spec(Some("me"), Some(15))), 0, Renew),
        ("own and expired, without another holder", Some(spec(Some("me"), Some(15))), 99, Renew),
        ("another's, just observed", Some(spec(Some("you"), Some(15))), 0, Wait(at(15))),
        ("another's, one second left", Some(spec(Some("you"), Some(15))), 14, Wait(at(15))),
        ("another's, unchanged for its whole duration", Some(spec(Some("you"), Some(15))), 15, Acquire),
        ("another's, without duration", Some(spec(Some("you"), None)), 29, Wait(at(30))),
        ("another's, without duration, expired", Some(spec(Some("you"), None)), 30, Acquire),
        ("another's, with a negative duration", Some(spec(Some("you"), Some(-5))), 0, Acquire),
    ];
    for (name, spec, now, expected) in table {
        assert_eq!(evaluate(spec.as_ref(), changed, "me", at(now), Duration::from_secs(30)), expected, "{name}");
    }
    // A renewTime far in the past or the future has no effect.
    for seconds in [0, 4_000_000_000] {
        let renew_time = Some(MicroTime(Timestamp::from_second(seconds).unwrap()));
        let spec = LeaseSpec { renew_time, ..spec(Some("you"), Some(15)) };
        assert_eq!(evaluate(Some(&spec), changed, "me", at(1), Duration::ZERO), Wait(at(15)));
    }
}

#[test]
fn a_claim_sets_holder_times_and_transitions_and_a_release_clears_the_holder() {
    let t = |s| Timestamp::from_second(s).unwrap();
    let duration = Duration::from_secs(15);
    let first = claim(None, "a", t(1), duration);
    assert_eq!(first.holder_identity.as_deref(), Some("a"));
    assert_eq!((first.lease_transitions, first.lease_duration_seconds), (Some(0), Some(15)));
    assert_eq!((first.acquire_time.clone(), first.renew_time.clone()), (Some(MicroTime(t(1))), Some(MicroTime(t(1)))));

    let renewed = claim(Some(&first), "a", t(6), duration);
    assert_eq!((renewed.lease_transitions, renewed.acquire_time.clone()), (Some(0), Some(MicroTime(t(1)))));
    assert_eq!(renewed.renew_time, Some(MicroTime(t(6))));

    let free = vacate(&renewed, t(7));
    assert_eq!((free.holder_identity.clone(), free.lease_duration_seconds), (None, Some(1)));

    let second = claim(Some(&free), "b", t(8), duration);
    assert_eq!((second.lease_transitions, second.acquire_time), (Some(1), Some(MicroTime(t(8)))));
    assert_eq!(second.lease_duration_seconds, Some(15));
}

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases/l";

impl FakeApiServer {
    fn lease(&self) -> Option<Lease> {
        serde_json::from_value(self.object(LEASE)?).ok()
    }

    fn holder(&self) -> Option<String> {
        self.lease()?.spec?.holder_identity
    }
}

struct Replica {
    leads: watch::Receiver<bool>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<ElectionEnded>,
}

fn start(server: &FakeApiServer, identity: &str) -> Replica {
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

async fn within(limit: u64, future: impl Future<Output = ()>) {
    timeout(Duration::from_millis(limit), future).await.expect("not in time");
}

async fn leads(replica: &mut Replica) {
    replica.leads.wait_for(|leads| *leads).await.unwrap();
}

#[tokio::test]
async fn one_of_two_replicas_leads_and_a_release_hands_over_at_once() {
    let server = FakeApiServer::default();
    let mut a = start(&server, "a");
    within(500, leads(&mut a)).await;
    let mut b = start(&server, "b");
    // Longer than the duration of the lease, so that renewals are necessary.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(*a.leads.borrow() && !*b.leads.borrow());

    a.shutdown.cancel();
    assert_eq!(a.task.await.unwrap(), ElectionEnded::Released);
    within(400, leads(&mut b)).await;
    assert_eq!(server.holder().as_deref(), Some("b"));
}

#[tokio::test]
async fn a_follower_learns_the_address_of_the_leader() {
    let server = FakeApiServer::default();
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
        let leader = config.leader.subscribe();
        let run = run(server.client(), config.clone(), Clock::system(), sender, shutdown.clone());
        (config, leader, shutdown, tokio::spawn(run))
    };
    let observes = async |leader: &mut watch::Receiver<Option<SocketAddr>>, port: Option<u16>| {
        let observed = leader.wait_for(|leader| leader.map(|address| address.port()) == port);
        timeout(Duration::from_secs(2), observed).await.expect("not in time").unwrap();
    };
    let (first, mut first_leader, stop_first, _running) = candidate("a", 1);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (_, mut second_leader, _stop_second, _running_too) = candidate("b", 2);
    observes(&mut second_leader, Some(1)).await;
    observes(&mut first_leader, None).await;
    // Another writer removes the annotation, and the leader restores it.
    let mut lease = server.lease().unwrap();
    lease.metadata.annotations = None;
    server.put(LEASE, json!(lease));
    within(2000, async {
        while server.lease().unwrap().metadata.annotations.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    observes(&mut second_leader, Some(1)).await;
    stop_first.cancel();
    let following = tokio::spawn(follow(server.client(), first));
    observes(&mut first_leader, Some(2)).await;
    observes(&mut second_leader, None).await;
    following.abort();
}

#[tokio::test]
async fn a_crashed_leader_is_replaced_when_its_lease_expires() {
    let server = FakeApiServer::default();
    let mut a = start(&server, "a");
    within(500, leads(&mut a)).await;
    let mut b = start(&server, "b");
    tokio::time::sleep(Duration::from_millis(200)).await;
    a.task.abort();
    within(2000, leads(&mut b)).await;
}

#[tokio::test]
async fn a_leader_that_cannot_renew_stops_before_another_replica_may_lead() {
    for fault in [Fault::Hang, Fault::Refuse] {
        let server = FakeApiServer::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        server.fail(fault);
        let failed = Instant::now();
        assert_eq!(a.task.await.unwrap(), ElectionEnded::Lost);
        assert!(failed.elapsed() < Duration::from_millis(900), "led longer than other replicas wait");
        assert!(!*a.leads.borrow());
    }
}

#[tokio::test]
async fn a_leader_survives_a_short_outage() {
    let server = FakeApiServer::default();
    let mut a = start(&server, "a");
    within(500, leads(&mut a)).await;
    server.fail(Fault::Refuse);
    tokio::time::sleep(Duration::from_millis(450)).await;
    server.fail(Fault::None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(*a.leads.borrow() && !a.task.is_finished());
}

/// Corresponds to 3 s with the usual timing.
const SLOW: Fault = Fault::Slow(210);

#[tokio::test]
async fn a_slow_api_server_keeps_its_leader() {
    let server = FakeApiServer::default();
    server.fail(SLOW);
    let mut a = start(&server, "a");
    within(1500, leads(&mut a)).await;
    let b = start(&server, "b");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(*a.leads.borrow() && !a.task.is_finished(), "leadership was lost");
    assert!(!*b.leads.borrow());
    a.shutdown.cancel();
    assert_eq!(a.task.await.unwrap(), ElectionEnded::Released);
    assert_eq!(server.holder(), None, "a slow release succeeds");
}

#[tokio::test]
async fn one_request_without_response_does_not_lose_the_lease() {
    let server = FakeApiServer::default();
    let mut a = start(&server, "a");
    within(500, leads(&mut a)).await;
    for _ in 0..3 {
        server.fail(Fault::HangOnce);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(*a.leads.borrow() && !a.task.is_finished());
}

#[tokio::test]
async fn a_leader_whose_lease_is_deleted_or_taken_stops() {
    for taken in [true, false] {
        let server = FakeApiServer::default();
        let mut a = start(&server, "a");
        within(500, leads(&mut a)).await;
        if taken {
            let mut lease = server.lease().unwrap();
            lease.spec.as_mut().unwrap().holder_identity = Some("b".to_owned());
            server.put(LEASE, json!(lease));
        } else {
            server.stored().objects.clear();
        }
        assert_eq!(a.task.await.unwrap(), ElectionEnded::Lost);
    }
}
