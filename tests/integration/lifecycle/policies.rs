//! Status of access policies and effects of security settings on keys. Admission is bypassed; `tests/access` tests it.

use anyhow::ensure;
use keywright::api::{AccessPolicy, AccessPolicyStatus, KeyState};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};

use super::{Team, assert_stalled, from_now, spec_with, state, status, team_spec, tokens};
use crate::support::keys::condition;
use crate::support::{TIMEOUT, eventually};

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// Waits until the status of policy `p` lists exactly the keys `names`, and returns the status.
async fn status_with_keys(team: &Team, names: &[&str]) -> AccessPolicyStatus {
    let policies: Api<AccessPolicy> = Api::namespaced(team.client.clone(), &team.namespace);
    eventually("the policy lists its keys", TIMEOUT, async || {
        let policy = policies.get("p").await?;
        let status = policy.status.unwrap_or_default();
        ensure!(status.observed_generation == policy.metadata.generation, "the status is of an older generation");
        ensure!(status.keys == names && status.key_count == i64::try_from(names.len()).ok(), "{:?}", status.keys);
        Ok(status)
    })
    .await
}

#[tokio::test]
async fn policy_lists_its_keys_and_keys_report_whether_their_policy_exists() {
    let team = Team::bypassing().await;
    let guarded = spec_with(json!({"accessPolicyRef": {"name": "p"}}));
    team.create("a", guarded.clone()).await;
    let accepted = |key: &keywright::api::ApiKey| condition(key, "PolicyAccepted").map(|c| c.status.clone());
    team.until("a", "the policy is missing", |key| accepted(key).as_deref() == Some("False")).await;

    let spec = json!({"mode": "Advanced", "generalAccess": "Read", "rules": [{"groups": ["x"], "access": "NoAccess"}]});
    team.kubectl(&["apply", "-f", &team.file(&object("AccessPolicy", "p", &spec))]).unwrap();
    team.until("a", "the policy is there", |key| accepted(key).as_deref() == Some("True")).await;
    let status = status_with_keys(&team, &["a"]).await;
    assert_eq!(status.locked_out, ["x"]);
    let kinds: Vec<_> = status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
    assert_eq!(kinds, [("Accepted", "True"), ("Ready", "True"), ("Unmanageable", "True")]);

    team.create("b", guarded).await;
    status_with_keys(&team, &["a", "b"]).await;
    team.edit("a", json!({"accessPolicyRef": null})).await;
    status_with_keys(&team, &["b"]).await;
    team.keys.delete("b", &DeleteParams::background()).await.unwrap();
    status_with_keys(&team, &[]).await;
}

#[tokio::test]
async fn unused_key_is_deactivated_until_it_is_rotated() {
    let team = Team::bypassing().await;
    let settings = json!({"limits": {"deactivateUnusedAfter": "3s"}});
    team.kubectl(&["apply", "-f", &team.file(&object("SecuritySettings", "default", &settings))]).unwrap();
    let (unreported, _) = team.minted("unreported", team_spec()).await;
    team.minted("idle", team_spec()).await;
    // The test reports a use, as the verifier does.
    eventually("the use is reported", TIMEOUT, async || {
        let mut idle = team.keys.get("idle").await?;
        let used = serde_json::from_value(json!(from_now(0)))?;
        idle.status.as_mut().expect("a status").last_used_at = Some(used);
        Ok(team.keys.replace_status("idle", &PostParams::default(), &idle).await?)
    })
    .await;
    let unused = team.until("idle", "unused", |key| state(key) == Some(KeyState::Inactive)).await;
    assert_stalled(&unused, "Unused");
    assert!(status(&unused).last_used_at.is_some(), "the operator removed lastUsedAt");
    assert!(team.event("idle", "Unused").await.contains("spec.rotation.requestedAt"));

    team.edit("idle", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let rotated = team.until("idle", "active again", |key| state(key) == Some(KeyState::Active)).await;
    assert_ne!(tokens(&rotated), tokens(&unused));
    let key = team.keys.get("unreported").await.unwrap();
    assert_eq!(
        (state(&key), tokens(&key)),
        (Some(KeyState::Active), tokens(&unreported)),
        "a key without reported use was deactivated"
    );
}
