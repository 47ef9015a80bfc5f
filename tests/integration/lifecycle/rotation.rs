//! Rotation on request and by schedule, with and without overlap.

use keywright::api::KeyState;

use super::*;
use crate::support::keys::sha256;

fn digests(key: &ApiKey) -> Vec<String> {
    tokens(key).iter().map(|token| token.sha256.clone()).collect()
}

#[tokio::test]
async fn requested_rotation_has_the_requested_overlap() {
    let team = Team::new().await;
    let (before, old) = team.minted("turn", team_spec()).await;
    let request = from_now(-1000);
    let edited = team.edit("turn", json!({"rotation": {"requestedAt": request, "overlap": "3s"}})).await;
    let rotated = team.after(&edited, "two tokens", |key| tokens(key).len() == 2).await;
    let new = team.value("turn").await;
    assert_ne!(new, old);
    assert_eq!(digests(&rotated), [sha256(&new), sha256(&old)]);
    let now = status(&rotated);
    assert_eq!(now.last_handled_requested_at.as_deref(), Some(request.as_str()));
    let at = now.last_rotated_at.as_ref().expect("lastRotatedAt").0;
    assert_eq!(tokens(&rotated)[0].minted_at.0, at);
    assert_eq!(tokens(&rotated)[1].minted_at, tokens(&before)[0].minted_at);
    assert_eq!(tokens(&rotated)[1].expires_at.as_ref().unwrap().0, at + SignedDuration::from_secs(3));
    assert_eq!(now.created_at, status(&before).created_at);
    assert_eq!(now.id.as_deref(), Some(tokens(&rotated)[0].id.as_str()));
    crate::support::keys::consistent(&rotated, &team.secret("turn").await, std::slice::from_ref(&new)).unwrap();

    let ended = team.after(&rotated, "the overlap is over", |key| tokens(key).len() == 1).await;
    assert_eq!(digests(&ended), [sha256(&new)]);
    assert!(from_now(0).parse::<Timestamp>().unwrap() >= at + SignedDuration::from_secs(3), "too early");
    assert_eq!(team.value("turn").await, new);
    let old_id = &tokens(&before)[0].id;
    assert!(team.event("turn", "Rotated").await.contains(&format!("{old_id} works until")));
    assert!(team.event("turn", "OverlapEnded").await.contains(old_id));
}

#[tokio::test]
async fn rotation_request_is_carried_out_exactly_once() {
    let team = Team::new().await;
    let first = from_now(-10);
    team.minted("once", team_spec()).await;
    team.edit("once", json!({"rotation": {"requestedAt": first, "overlap": "1h"}})).await;
    team.ready("once").await;
    let value = team.value("once").await;
    let version = team.secret("once").await.resource_version();

    // Another change, removal and re-addition of the request, and a restart of the operator.
    team.edit("once", json!({"displayName": "another generation"})).await;
    team.ready("once").await;
    team.edit("once", json!({"rotation": {"requestedAt": null}})).await;
    team.ready("once").await;
    team.edit("once", json!({"rotation": {"requestedAt": first}})).await;
    team.ready("once").await;
    team.cluster.restart().await;
    team.edit("once", json!({"displayName": "yet another"})).await;
    let key = team.ready("once").await;
    assert_eq!((team.value("once").await, tokens(&key).len()), (value.clone(), 2));
    assert_eq!(team.secret("once").await.resource_version(), version, "the Secret was written");

    team.edit("once", json!({"rotation": {"requestedAt": from_now(0)}})).await;
    let key = team.ready("once").await;
    let new = team.value("once").await;
    assert_ne!(new, value, "another request did not rotate the key");
    assert_eq!(digests(&key), [sha256(&new), sha256(&value)], "S2: not exactly the last two values work");
}

#[tokio::test]
async fn rotation_request_in_a_new_key_does_not_rotate_it() {
    let team = Team::new().await;
    let request = from_now(-60);
    let (key, value) = team.minted("new", spec_with(json!({"rotation": {"requestedAt": request}}))).await;
    assert_eq!((status(&key).last_handled_requested_at.as_ref(), tokens(&key).len()), (Some(&request), 1));
    team.edit("new", json!({"displayName": "another generation"})).await;
    team.ready("new").await;
    assert_eq!(team.value("new").await, value);
}

#[tokio::test]
async fn rotation_with_zero_overlap_revokes_the_previous_value() {
    let team = Team::new().await;
    let (before, old) = team.minted("cut", team_spec()).await;
    let edited = team.edit("cut", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let rotated = team.after(&edited, "rotated", |key| digests(key) != digests(&before)).await;
    let new = team.value("cut").await;
    assert_eq!(digests(&rotated), [sha256(&new)], "both values worked");
    assert!(team.event("cut", "Rotated").await.contains(&format!("{} is revoked", tokens(&before)[0].id)));
    assert!(!team.secret("cut").await.annotations()[crate::support::keys::RECORD].contains(&sha256(&old)));
}

/// S3: revoked values stay revoked, also when the status is lost and rebuilt.
#[tokio::test]
async fn shortened_overlap_is_never_extended_and_revokes_the_previous_value() {
    let team = Team::new().await;
    let (_, old) = team.minted("short", team_spec()).await;
    team.edit("short", json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.ready("short").await;
    let new = team.value("short").await;
    assert_eq!(digests(&key), [sha256(&new), sha256(&old)]);

    team.edit("short", json!({"rotation": {"overlap": "30m"}})).await;
    let key = team.ready("short").await;
    let end = tokens(&key)[0].minted_at.0 + SignedDuration::from_mins(30);
    assert_eq!(tokens(&key)[1].expires_at.as_ref().unwrap().0, end, "the overlap was not shortened");
    team.edit("short", json!({"rotation": {"overlap": "2h"}})).await;
    let key = team.ready("short").await;
    assert_eq!(tokens(&key)[1].expires_at.as_ref().unwrap().0, end, "a shortened overlap was extended");

    team.edit("short", json!({"rotation": {"overlap": "0s"}})).await;
    assert_eq!(digests(&team.ready("short").await), [sha256(&new)]);
    assert!(team.event("short", "OverlapEnded").await.contains(&sha256(&old)[..16]));
    team.edit("short", json!({"rotation": {"overlap": "1h"}})).await;
    assert_eq!(digests(&team.ready("short").await), [sha256(&new)]);

    let spec = team.keys.get("short").await.unwrap().spec;
    team.keys
        .delete(
            "short",
            &DeleteParams { propagation_policy: Some(kube::api::PropagationPolicy::Orphan), ..DeleteParams::default() },
        )
        .await
        .unwrap();
    eventually("the ApiKey is gone", TIMEOUT, async || {
        ensure!(team.keys.get_opt("short").await?.is_none(), "the ApiKey still exists");
        Ok(())
    })
    .await;
    // The creator annotation makes it a restored key: only then is the Secret adopted.
    let mut copy = super::key("short", &serde_json::to_value(&spec).unwrap());
    copy.annotations_mut().insert("keywright.dev/creator".to_owned(), "admin".to_owned());
    team.keys.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.ready("short").await;
    assert_eq!(digests(&key), [sha256(&new)], "the revoked value is in the rebuilt status");
    assert_eq!(team.value("short").await, new);
}

#[tokio::test]
async fn schedule_rotates_the_key_and_reports_the_next_rotation() {
    let team = Team::new().await;
    let rotation = json!({"every": "1m", "overlap": "10s"});
    let (key, old) = team.minted("clock", spec_with(json!({"rotation": rotation}))).await;
    let minted = tokens(&key)[0].minted_at.0;
    let minute = SignedDuration::from_mins(1);
    assert_eq!(status(&key).next_rotation_at.as_ref().unwrap().0, minted + minute);
    tokio::time::sleep(Duration::from_secs(45)).await;
    assert_eq!(team.value("clock").await, old, "too early");
    let rotated = team.after(&key, "two tokens", |key| tokens(key).len() == 2).await;
    let at = tokens(&rotated)[0].minted_at.0;
    assert!(at >= minted + minute, "too early");
    assert_eq!(digests(&rotated), [sha256(&team.value("clock").await), sha256(&old)]);
    assert_eq!(tokens(&rotated)[1].expires_at.as_ref().unwrap().0, at + SignedDuration::from_secs(10));
    assert_eq!(status(&rotated).next_rotation_at.as_ref().unwrap().0, at + minute);
    assert_eq!(status(&rotated).last_rotated_at.as_ref().unwrap().0, at);
    let ended = team.after(&rotated, "the overlap is over", |key| tokens(key).len() == 1).await;
    assert_eq!(digests(&ended), digests(&rotated)[..1]);

    team.edit("clock", json!({"active": false})).await;
    assert_eq!(status(&team.ready("clock").await).next_rotation_at, None, "an inactive key has a next rotation");
}

#[tokio::test]
async fn expired_key_is_rotated_only_after_its_expiry_is_moved() {
    let team = Team::new().await;
    let (_, value) = team.minted("late", spec_with(json!({"expiresAt": from_now(5)}))).await;
    team.until("late", "expired", |key| state(key) == Some(KeyState::Expired)).await;
    team.edit("late", json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.settled("late").await;
    assert_eq!((state(&key), team.value("late").await), (Some(KeyState::Expired), value.clone()));
    assert_eq!(status(&key).last_handled_requested_at, None, "the request was marked as handled");
    team.edit("late", json!({"expiresAt": null})).await;
    let key = team.ready("late").await;
    let new = team.value("late").await;
    assert_eq!(digests(&key), [sha256(&new), sha256(&value)]);
    assert_ne!(new, value);
}

#[tokio::test]
async fn overlap_never_ends_after_the_expiry() {
    let team = Team::new().await;
    let expiry = from_now(3600);
    team.minted("end", spec_with(json!({"expiresAt": expiry}))).await;
    team.edit("end", json!({"rotation": {"requestedAt": from_now(0), "overlap": "24h"}})).await;
    let key = team.ready("end").await;
    let ends =
        |key: &ApiKey| tokens(key).iter().map(|t| t.expires_at.as_ref().unwrap().0.to_string()).collect::<Vec<_>>();
    assert_eq!(ends(&key), [expiry.clone(), expiry.clone()]);
    let later = from_now(7200);
    team.edit("end", json!({"expiresAt": later})).await;
    assert_eq!(ends(&team.ready("end").await), [later, expiry], "the overlap was extended");
    let sooner = from_now(1800);
    team.edit("end", json!({"expiresAt": sooner})).await;
    assert_eq!(ends(&team.ready("end").await), [sooner.clone(), sooner]);
}

#[tokio::test]
async fn rotation_after_the_expiry_is_not_reported_as_next_rotation() {
    let team = Team::new().await;
    let spec = spec_with(json!({"rotation": {"every": "2h"}, "expiresAt": from_now(3600)}));
    let (key, _) = team.minted("never", spec).await;
    assert_eq!(status(&key).next_rotation_at, None);
}
