//! The state of the verifier and its age: before the first list, while the watch is interrupted, and while the API
//! server is unavailable, for a short time and for too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use kube::api::DeleteParams;
use serde_json::json;

use super::{PROPAGATION_LIMIT, Team, check, reader, start, wait_for_status};
use crate::support::proxy::Record;
use crate::support::verifier::{Options, Verifier};
use crate::support::{Fault, Proxy, TIMEOUT, eventually};

fn options(proxy: &Proxy, args: &[&str]) -> Options {
    let args = args.iter().map(ToString::to_string).collect();
    Options { server: Some(proxy.url().to_owned()), args, ..Options::default() }
}

fn is_list(record: &Record, plural: &str) -> bool {
    record.path.ends_with(plural) && !record.is_watch()
}

fn lists(proxy: &Proxy) -> usize {
    proxy.requests().iter().filter(|record| is_list(record, "/apikeys")).count()
}

/// Mints two keys, `stays` and `goes`, waits until the verifier accepts them, and returns their values.
async fn two_keys(verifier: &Verifier) -> (Team, String, String) {
    let team = Team::new().await;
    let (stays, goes) = (team.mint("stays", &reader()).await, team.mint("goes", &reader()).await);
    for value in [&stays, &goes] {
        wait_for_status(verifier, "permission=none", value, 200, TIMEOUT).await;
    }
    (team, stays, goes)
}

/// A verifier with `--max-staleness=1m` that accepts `value`, and the proxy between the verifier and the API server.
async fn start_with_max_staleness(value: &str) -> (Proxy, Verifier) {
    let proxy = Proxy::start(crate::support::shared().await.plane).unwrap();
    let verifier = start(options(&proxy, &["--max-staleness=1m"])).await.unwrap();
    wait_for_status(&verifier, "permission=none", value, 200, TIMEOUT).await;
    (proxy, verifier)
}

/// A verifier with an empty or incomplete index must fail closed.
#[tokio::test]
async fn every_check_is_answered_with_503_until_all_keys_and_catalogs_are_listed() {
    let plane = crate::support::shared().await.plane;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    for withheld in ["/apikeys", "/permissioncatalogs"] {
        let proxy = Proxy::start(plane).unwrap();
        let blocked = proxy.inject_times(1, usize::MAX, move |record| is_list(record, withheld), Fault::Reject(500));
        let verifier = Verifier::start(plane, options(&proxy, &[])).await.unwrap();
        eventually("the verifier tried to list", TIMEOUT, async || {
            ensure!(blocked.injected() >= 2, "{} requests", blocked.injected());
            Ok(())
        })
        .await;
        for requirement in ["permission=none", "permission=alerts:ReadConfig", ""] {
            let answer = check(&verifier, requirement, &value).await;
            assert_eq!(answer.status, 503, "{withheld} {requirement}: {}", answer.head);
            assert!(answer.body.contains("temporarily_unavailable"), "{}", answer.body);
        }
        assert!(verifier.get("/readyz").await.unwrap_err().to_string().contains("waiting for the first list"));
        proxy.clear_faults();
        wait_for_status(&verifier, "permission=alerts:ReadConfig", &value, 200, TIMEOUT).await;
        verifier.get("/readyz").await.unwrap();
    }
}

#[tokio::test]
async fn an_interrupted_watch_resumes_without_a_new_list_and_misses_no_change() {
    let plane = crate::support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &[])).await.unwrap();
    let (team, stays, goes) = two_keys(&verifier).await;
    let before = lists(&proxy);
    for round in 0..3 {
        // While there is no watch, one key is deleted and another changes.
        let blocked = proxy.inject_times(1, usize::MAX, Record::is_watch, Fault::Reject(503));
        proxy.cut_watches();
        if round == 0 {
            team.delete("goes").await;
        }
        team.patch("stays", &json!({"active": round == 1})).await;
        eventually("the verifier tried to watch again", TIMEOUT, async || {
            ensure!(blocked.injected() >= 1, "no request");
            Ok(())
        })
        .await;
        proxy.clear_faults();
        wait_for_status(&verifier, "permission=none", &stays, if round == 1 { 200 } else { 401 }, TIMEOUT).await;
        wait_for_status(&verifier, "permission=none", &goes, 401, TIMEOUT).await;
    }
    assert_eq!(lists(&proxy), before, "the verifier listed again instead of resuming the watch");
}

#[tokio::test]
async fn a_key_deleted_while_the_watch_is_expired_is_removed_by_a_new_list() {
    let plane = crate::support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &[])).await.unwrap();
    let (team, stays, goes) = two_keys(&verifier).await;
    let before = lists(&proxy);
    // The resourceVersion of the watch is too old (410), and the first new list fails.
    proxy.inject(1, |record| record.is_watch() && record.path.ends_with("/apikeys"), Fault::Expire);
    proxy.inject(1, |record| is_list(record, "/apikeys"), Fault::Reject(500));
    proxy.cut_watches();
    team.delete("goes").await;
    wait_for_status(&verifier, "permission=none", &goes, 401, TIMEOUT).await;
    assert_eq!(check(&verifier, "permission=none", &stays).await.status, 200);
    assert!(lists(&proxy) > before);
}

/// The API server either rejects requests or accepts connections without answering. An unanswered watch must not count
/// as a watch without events.
#[tokio::test]
async fn without_the_api_server_the_last_state_is_served_until_the_maximum_staleness() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let unavailable = async |fault: Fault| {
        let (proxy, verifier) = start_with_max_staleness(&value).await;
        let down = proxy.inject_times(1, usize::MAX, |_| true, fault);
        proxy.cut_watches();
        let since = Instant::now();
        tokio::time::sleep(Duration::from_secs(25)).await;
        assert!(down.injected() > 0);
        assert_eq!(check(&verifier, "permission=none", &value).await.status, 200, "the last state is not served");
        let answer = wait_for_status(&verifier, "permission=none", &value, 503, TIMEOUT).await;
        assert!(answer.body.contains("received no data from the API server"), "{}", answer.body);
        // The last answer of the API server may be as old as one watch, 30 seconds, when the requests begin to fail.
        assert!(since.elapsed() > Duration::from_secs(28), "{:?}", since.elapsed());
        let age = crate::support::keys::metric(
            &verifier.get("/metrics").await.unwrap(),
            "keywright_verifier_staleness_seconds",
        );
        assert!(age.unwrap() >= 60.0);
        // A restart would lose the last state, so the verifier stays ready.
        verifier.get("/readyz").await.expect("the verifier is ready");
        proxy.clear_faults();
        proxy.cut_watches();
        // An unanswered request times out after 40 seconds.
        wait_for_status(&verifier, "permission=none", &value, 200, 2 * TIMEOUT).await;
    };
    tokio::join!(unavailable(Fault::Reject(503)), unavailable(Fault::Delay(Duration::from_mins(10))));
}

/// If failed lists counted as answers of the API server, revoked keys would pass forever.
#[tokio::test]
async fn failing_lists_make_the_state_stale() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let (proxy, verifier) = start_with_max_staleness(&value).await;
    let is_keys = |record: &Record| record.path.ends_with("/apikeys");
    proxy.inject(1, move |record| record.is_watch() && is_keys(record), Fault::Expire);
    let refused = proxy.inject_times(1, usize::MAX, |record| is_list(record, "/apikeys"), Fault::Reject(500));
    proxy.cut_watches();
    wait_for_status(&verifier, "permission=none", &value, 503, 2 * TIMEOUT).await;
    assert!(refused.injected() > 10, "only {} lists", refused.injected());
    assert!(refused.injected() < 100, "{} lists without a backoff", refused.injected());
    proxy.clear_faults();
    wait_for_status(&verifier, "permission=none", &value, 200, TIMEOUT).await;
}

/// The API server answers each watch with 200 and then sends an error event.
#[tokio::test]
async fn watches_that_end_with_an_error_event_make_the_state_stale() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let (proxy, verifier) = start_with_max_staleness(&value).await;
    let is_watch = |record: &Record| record.is_watch() && record.path.ends_with("/apikeys");
    let errors = proxy.inject_times(1, usize::MAX, is_watch, Fault::ErrorEvent(500));
    proxy.cut_watches();
    team.patch("k", &json!({"active": false})).await;
    wait_for_status(&verifier, "permission=none", &value, 503, 2 * TIMEOUT).await;
    assert!(errors.injected() > 10, "only {} watches", errors.injected());
    proxy.clear_faults();
    wait_for_status(&verifier, "permission=none", &value, 401, TIMEOUT).await;
}

/// Each watch that begins counts as an answer of the API server, also without events.
#[tokio::test]
async fn a_cluster_without_changes_does_not_make_the_state_stale() {
    let plane = crate::support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &["--max-staleness=1m"])).await.unwrap();
    let mut oldest: f64 = 0.0;
    let end = Instant::now() + Duration::from_secs(70);
    while Instant::now() < end {
        let metrics = verifier.get("/metrics").await.unwrap();
        let age = crate::support::keys::metric(&metrics, "keywright_verifier_staleness_seconds").unwrap();
        oldest = oldest.max(age);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(oldest < 40.0, "{oldest} s");
    assert_eq!(lists(&proxy), 1, "there was a list after the first one");
}

#[tokio::test]
async fn revocations_take_effect_within_a_second_under_load() {
    const KEYS: usize = 40;
    let team = Arc::new(Team::new().await);
    let verifier = Arc::new(start(Options::default()).await.unwrap());
    let mut values = vec![];
    for number in 0..KEYS {
        values.push(team.mint(&format!("k{number}"), &reader()).await);
    }
    for value in &values {
        wait_for_status(&verifier, "permission=none", value, 200, TIMEOUT).await;
    }
    let busy = Arc::new(AtomicBool::new(true));
    let load: Vec<_> = (0..4)
        .map(|worker| {
            let (verifier, busy, value) = (Arc::clone(&verifier), Arc::clone(&busy), values[worker].clone());
            tokio::spawn(async move {
                let mut checks = 0_u32;
                while busy.load(Ordering::Relaxed) {
                    check(&verifier, "permission=alerts:ReadConfig", &value).await;
                    checks += 1;
                }
                checks
            })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for (number, value) in values.iter().enumerate().skip(4) {
        team.patch(&format!("k{number}"), &json!({"active": false})).await;
        let acknowledged = Instant::now();
        wait_for_status(&verifier, "permission=none", value, 401, PROPAGATION_LIMIT).await;
        slowest = slowest.max(acknowledged.elapsed());
    }
    busy.store(false, Ordering::Relaxed);
    for worker in load {
        assert!(worker.await.unwrap() > 0);
    }
    assert!(slowest < PROPAGATION_LIMIT, "{slowest:?}");
    team.keys.delete_collection(&DeleteParams::default(), &kube::api::ListParams::default()).await.unwrap();
}
