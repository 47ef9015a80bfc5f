//! `status.lastUsedAt`: its interval, its content, and how to turn it off.

use std::time::Duration;

use anyhow::ensure;
use keywright::api::ApiKey;
use serde_json::json;

use super::{Team, check, reader, start, wait_for_status};
use crate::support::verifier::Options;
use crate::support::{Proxy, TIMEOUT, eventually};

fn last_used(key: &ApiKey) -> Option<i64> {
    key.status.as_ref()?.last_used_at.as_ref().map(|at| at.0.as_second())
}

#[tokio::test]
async fn the_last_use_is_written_once_per_interval_for_all_replicas() {
    let plane = crate::support::shared().await.plane;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let idle = team.mint("idle", &reader()).await;
    let proxy = Proxy::start(plane).unwrap();
    let options = || Options {
        server: Some(proxy.url().to_owned()),
        args: vec!["--last-used-interval=1h".to_owned()],
        ..Options::default()
    };
    let (one, two) = (start(options()).await.unwrap(), start(options()).await.unwrap());
    wait_for_status(&one, "permission=none", &value, 200, TIMEOUT).await;
    wait_for_status(&two, "permission=none", &value, 200, TIMEOUT).await;
    // A rejected check does not count as a use.
    assert_eq!(check(&one, "permission=alerts:UpdateConfig", &idle).await.status, 403);
    for _ in 0..200 {
        assert_eq!(check(&one, "permission=none", &value).await.status, 200);
        assert_eq!(check(&two, "permission=none", &value).await.status, 200);
    }
    let key = eventually("status.lastUsedAt is written", TIMEOUT, async || {
        let key = team.keys.get("k").await?;
        ensure!(last_used(&key).is_some(), "status.lastUsedAt is empty");
        Ok(key)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let patches = proxy.requests().iter().filter(|record| record.is_mutating()).count();
    assert!((1..=2).contains(&patches), "{patches} writes for 400 uses at two replicas");
    assert_eq!(last_used(&team.keys.get("idle").await.unwrap()), None);

    // The operator keeps lastUsedAt, and the verifier's write changes no other field.
    let before = key.status.clone().unwrap();
    team.patch("k", &json!({"displayName": "Another name"})).await;
    let after = team.ready("k").await.status.unwrap();
    assert_eq!((after.last_used_at, after.tokens), (before.last_used_at, before.tokens));
}

#[tokio::test]
async fn with_an_interval_of_zero_the_verifier_writes_nothing() {
    let plane = crate::support::shared().await.plane;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let proxy = Proxy::start(plane).unwrap();
    let args = vec!["--last-used-interval=0s".to_owned()];
    let verifier = start(Options { server: Some(proxy.url().to_owned()), args, ..Options::default() }).await.unwrap();
    wait_for_status(&verifier, "permission=none", &value, 200, TIMEOUT).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(proxy.requests().iter().filter(|record| record.is_mutating()).count(), 0);
    assert_eq!(last_used(&team.keys.get("k").await.unwrap()), None);
}
