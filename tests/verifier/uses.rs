//! When keys were used: what the cluster is told, how often, and what it lets a verifier tell.

use std::time::Duration;

use anyhow::ensure;
use keywright::api::ApiKey;
use serde_json::json;

use crate::support::verifier::Options;
use crate::support::{self, PATIENCE, Proxy, eventually};
use crate::{Team, ask, reader, start, until};

fn last_used(key: &ApiKey) -> Option<i64> {
    key.status.as_ref()?.last_used_at.as_ref().map(|at| at.0.as_second())
}

#[tokio::test]
async fn the_last_use_is_told_once_an_interval_however_many_replicas_see_it() {
    let plane = support::shared().await.plane;
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
    until(&one, "permission=none", &value, 200, PATIENCE).await;
    until(&two, "permission=none", &value, 200, PATIENCE).await;
    // A refusal is no use of the key.
    assert_eq!(ask(&one, "permission=alerts:UpdateConfig", &idle).await.status, 403);
    for _ in 0..200 {
        assert_eq!(ask(&one, "permission=none", &value).await.status, 200);
        assert_eq!(ask(&two, "permission=none", &value).await.status, 200);
    }
    let key = eventually("the use is told", PATIENCE, async || {
        let key = team.keys.get("k").await?;
        ensure!(last_used(&key).is_some(), "not yet");
        Ok(key)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let patches = proxy.requests().iter().filter(|record| record.is_mutating()).count();
    assert!((1..=2).contains(&patches), "{patches} writes for 400 uses that two replicas saw");
    assert_eq!(last_used(&team.keys.get("idle").await.unwrap()), None);

    // The operator keeps what it did not write, and a verifier's write says nothing else.
    let before = key.status.clone().unwrap();
    team.patch("k", &json!({"displayName": "Another name"})).await;
    let after = team.ready("k").await.status.unwrap();
    assert_eq!((after.last_used_at, after.tokens), (before.last_used_at, before.tokens));
}

#[tokio::test]
async fn off_means_that_nothing_is_written() {
    let plane = support::shared().await.plane;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let proxy = Proxy::start(plane).unwrap();
    let args = vec!["--last-used-interval=0s".to_owned()];
    let verifier = start(Options { server: Some(proxy.url().to_owned()), args, ..Options::default() }).await.unwrap();
    until(&verifier, "permission=none", &value, 200, PATIENCE).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(proxy.requests().iter().filter(|record| record.is_mutating()).count(), 0);
    assert_eq!(last_used(&team.keys.get("k").await.unwrap()), None);
}
