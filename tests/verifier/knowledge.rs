//! What the verifier knows, and for how long it may rely on it: before the first list, while the watch is cut, when the
//! API server is away, and when it has been away for too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use kube::api::DeleteParams;
use serde_json::json;

use crate::support::proxy::Record;
use crate::support::verifier::{Options, Verifier};
use crate::support::{self, Fault, PATIENCE, Proxy, eventually};
use crate::{SOON, Team, ask, reader, start, until};

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

/// Two keys that the verifier knows, `stays` and `goes`, and their values.
async fn two_keys(verifier: &Verifier) -> (Team, String, String) {
    let team = Team::new().await;
    let (stays, goes) = (team.mint("stays", &reader()).await, team.mint("goes", &reader()).await);
    for value in [&stays, &goes] {
        until(verifier, "permission=none", value, 200, PATIENCE).await;
    }
    (team, stays, goes)
}

/// A verifier behind a proxy that lets a value pass, and nothing that it has not heard of for a minute.
async fn bounded(value: &str) -> (Proxy, Verifier) {
    let proxy = Proxy::start(support::shared().await.plane).unwrap();
    let verifier = start(options(&proxy, &["--max-staleness=1m"])).await.unwrap();
    until(&verifier, "permission=none", value, 200, PATIENCE).await;
    (proxy, verifier)
}

/// B2, "fail open": an empty index lets nobody pass, and neither does one without a catalogue.
#[tokio::test]
async fn nobody_passes_before_every_key_and_every_catalogue_is_known() {
    let plane = support::shared().await.plane;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    for withheld in ["/apikeys", "/permissioncatalogs"] {
        let proxy = Proxy::start(plane).unwrap();
        let blocked = proxy.inject_times(1, usize::MAX, move |record| is_list(record, withheld), Fault::Refuse(500));
        let verifier = Verifier::start(plane, options(&proxy, &[])).await.unwrap();
        eventually("it asked", PATIENCE, async || {
            ensure!(blocked.struck() >= 2, "not yet");
            Ok(())
        })
        .await;
        for requirement in ["permission=none", "permission=alerts:ReadConfig", ""] {
            let answer = ask(&verifier, requirement, &value).await;
            assert_eq!(answer.status, 503, "{withheld} {requirement}: {}", answer.head);
            assert!(answer.body.contains("temporarily_unavailable"), "{}", answer.body);
        }
        assert!(verifier.get("/readyz").await.unwrap_err().to_string().contains("waiting for the first list"));
        proxy.heal();
        until(&verifier, "permission=alerts:ReadConfig", &value, 200, PATIENCE).await;
        verifier.get("/readyz").await.unwrap();
    }
}

#[tokio::test]
async fn a_cut_watch_goes_on_where_it_was_and_misses_nothing() {
    let plane = support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &[])).await.unwrap();
    let (team, stays, goes) = two_keys(&verifier).await;
    let before = lists(&proxy);
    for round in 0..3 {
        // While nobody listens, a key goes and another changes.
        let blocked = proxy.inject_times(1, usize::MAX, Record::is_watch, Fault::Refuse(503));
        proxy.cut_watches();
        if round == 0 {
            team.delete("goes").await;
        }
        team.patch("stays", &json!({"active": round == 1})).await;
        eventually("it tries to listen again", PATIENCE, async || {
            ensure!(blocked.struck() >= 1, "not yet");
            Ok(())
        })
        .await;
        proxy.heal();
        until(&verifier, "permission=none", &stays, if round == 1 { 200 } else { 401 }, PATIENCE).await;
        until(&verifier, "permission=none", &goes, 401, PATIENCE).await;
    }
    assert_eq!(lists(&proxy), before, "the watch was resumed, and nothing was listed again");
}

#[tokio::test]
async fn what_went_while_the_watch_could_not_go_on_is_forgotten_by_a_new_list() {
    let plane = support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &[])).await.unwrap();
    let (team, stays, goes) = two_keys(&verifier).await;
    let before = lists(&proxy);
    // The apiserver no longer remembers where the watch was, and the first new list breaks off in between.
    proxy.inject(1, |record| record.is_watch() && record.path.ends_with("/apikeys"), Fault::Expire);
    proxy.inject(1, |record| is_list(record, "/apikeys"), Fault::Refuse(500));
    proxy.cut_watches();
    team.delete("goes").await;
    until(&verifier, "permission=none", &goes, 401, PATIENCE).await;
    assert_eq!(ask(&verifier, "permission=none", &stays).await.status, 200);
    assert!(lists(&proxy) > before);
}

/// Without the API server, what is known is served; after the configured time, nobody passes; with it, all is as it
/// should be. The same where connections are there and nothing comes: a watch that is dead and one that is quiet look
/// alike, and are not.
#[tokio::test]
async fn without_the_api_server_the_last_state_is_served_for_a_bounded_time() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let dead = async |fault: Fault| {
        let (proxy, verifier) = bounded(&value).await;
        let down = proxy.inject_times(1, usize::MAX, |_| true, fault);
        proxy.cut_watches();
        let since = Instant::now();
        tokio::time::sleep(Duration::from_secs(25)).await;
        assert!(down.struck() > 0);
        assert_eq!(ask(&verifier, "permission=none", &value).await.status, 200, "the last state is served");
        let answer = until(&verifier, "permission=none", &value, 503, PATIENCE).await;
        assert!(answer.body.contains("has not heard from the cluster"), "{}", answer.body);
        // The last beat may be as old as one watch when all ends.
        assert!(since.elapsed() > Duration::from_secs(28), "{:?}", since.elapsed());
        let age =
            support::keys::metric(&verifier.get("/metrics").await.unwrap(), "keywright_verifier_staleness_seconds");
        assert!(age.unwrap() >= 60.0);
        verifier.get("/readyz").await.expect("a restart would not help");
        proxy.heal();
        proxy.cut_watches();
        // A request that is under way and is never answered is given up after forty seconds.
        until(&verifier, "permission=none", &value, 200, 2 * PATIENCE).await;
    };
    tokio::join!(dead(Fault::Refuse(503)), dead(Fault::Delay(Duration::from_mins(10))));
}

/// A list that is begun again and again and never comes to its end is no news: what was revoked meanwhile would pass for
/// ever.
#[tokio::test]
async fn a_list_that_never_ends_makes_what_is_known_old() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let (proxy, verifier) = bounded(&value).await;
    let is_keys = |record: &Record| record.path.ends_with("/apikeys");
    proxy.inject(1, move |record| record.is_watch() && is_keys(record), Fault::Expire);
    let refused = proxy.inject_times(1, usize::MAX, |record| is_list(record, "/apikeys"), Fault::Refuse(500));
    proxy.cut_watches();
    until(&verifier, "permission=none", &value, 503, 2 * PATIENCE).await;
    assert!(refused.struck() > 10, "it tried");
    assert!(refused.struck() < 100, "{} times: not without a pause", refused.struck());
    proxy.heal();
    until(&verifier, "permission=none", &value, 200, PATIENCE).await;
}

/// An API server that grants each watch with 200 and then says that it can't serve it tells no news, however often it does.
#[tokio::test]
async fn watches_that_are_granted_and_hold_an_error_make_what_is_known_old() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let (proxy, verifier) = bounded(&value).await;
    let is_watch = |record: &Record| record.is_watch() && record.path.ends_with("/apikeys");
    let errors = proxy.inject_times(1, usize::MAX, is_watch, Fault::ErrorEvent(500));
    proxy.cut_watches();
    team.patch("k", &json!({"active": false})).await;
    until(&verifier, "permission=none", &value, 503, 2 * PATIENCE).await;
    assert!(errors.struck() > 10, "it tried");
    proxy.heal();
    until(&verifier, "permission=none", &value, 401, PATIENCE).await;
}

/// A quiet cluster is not a silent one: each watch that begins is heard.
#[tokio::test]
async fn a_quiet_hour_makes_nothing_stale() {
    let plane = support::shared().await.plane;
    let proxy = Proxy::start(plane).unwrap();
    let verifier = start(options(&proxy, &["--max-staleness=1m"])).await.unwrap();
    let mut oldest: f64 = 0.0;
    let until = Instant::now() + Duration::from_secs(70);
    while Instant::now() < until {
        let metrics = verifier.get("/metrics").await.unwrap();
        let age = support::keys::metric(&metrics, "keywright_verifier_staleness_seconds").unwrap();
        oldest = oldest.max(age);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(oldest < 40.0, "{oldest} s");
    assert_eq!(lists(&proxy), 1, "no list but the first");
}

/// Requests are answered while hundreds of keys change, and no answer waits for the API server.
#[tokio::test]
async fn revocations_are_seen_within_a_second_under_load() {
    const KEYS: usize = 40;
    let team = Arc::new(Team::new().await);
    let verifier = Arc::new(start(Options::default()).await.unwrap());
    let mut values = vec![];
    for number in 0..KEYS {
        values.push(team.mint(&format!("k{number}"), &reader()).await);
    }
    for value in &values {
        until(&verifier, "permission=none", value, 200, PATIENCE).await;
    }
    let busy = Arc::new(AtomicBool::new(true));
    let load: Vec<_> = (0..4)
        .map(|worker| {
            let (verifier, busy, value) = (Arc::clone(&verifier), Arc::clone(&busy), values[worker].clone());
            tokio::spawn(async move {
                let mut asked = 0_u32;
                while busy.load(Ordering::Relaxed) {
                    ask(&verifier, "permission=alerts:ReadConfig", &value).await;
                    asked += 1;
                }
                asked
            })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for (number, value) in values.iter().enumerate().skip(4) {
        team.patch(&format!("k{number}"), &json!({"active": false})).await;
        let acknowledged = Instant::now();
        until(&verifier, "permission=none", value, 401, SOON).await;
        slowest = slowest.max(acknowledged.elapsed());
    }
    busy.store(false, Ordering::Relaxed);
    for worker in load {
        assert!(worker.await.unwrap() > 0);
    }
    assert!(slowest < SOON, "{slowest:?}");
    team.keys.delete_collection(&DeleteParams::default(), &kube::api::ListParams::default()).await.unwrap();
}
