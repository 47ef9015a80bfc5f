//! Minting, the Secret of a key, deactivation, expiry, loss, conflicts and deletion.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use keywright::api::KeyState;
use keywright::domain::key::is_well_formed;
use kube::api::{Patch, PatchParams};

use super::*;
use crate::support::keys::{RECORD, RECORD_MAC, SECRET_TYPE, condition, sha256};

#[tokio::test]
async fn minting_writes_one_secret_under_the_default_names() {
    let team = Team::new().await;
    let (key, value) = team.minted("plain", team_spec()).await;
    let secret = team.secret("plain").await;

    assert!(is_well_formed(&value) && value.starts_with("kwt_"), "the value does not have the documented format");
    assert_eq!(secret.type_.as_deref(), Some(SECRET_TYPE));
    assert_eq!(secret.data.as_ref().unwrap().keys().collect::<Vec<_>>(), ["key-value"]);
    let owners = secret.owner_references();
    assert_eq!(owners.len(), 1);
    assert_eq!((owners[0].kind.as_str(), owners[0].name.as_str()), ("ApiKey", "plain"));
    assert_eq!(owners[0].api_version, "keywright.dev/v1alpha1");
    assert_eq!(Some(&owners[0].uid), key.metadata.uid.as_ref());
    assert_eq!((owners[0].controller, owners[0].block_owner_deletion), (Some(true), Some(true)));
    assert_eq!(secret.labels(), &BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "keywright".to_owned())]));
    assert_eq!(secret.annotations().keys().collect::<Vec<_>>(), [RECORD, RECORD_MAC]);
    assert_eq!(record(&secret)["apiKey"], "plain");
    crate::support::keys::consistent(&key, &secret, std::slice::from_ref(&value)).unwrap();

    let status = status(&key);
    assert_eq!(status.tokens.len(), 1);
    assert_eq!(status.tokens[0].sha256, sha256(&value));
    assert_eq!(status.id.as_deref(), Some(format!("key_{}", &sha256(&value)[..16]).as_str()));
    assert_eq!(status.state, Some(KeyState::Active));
    let secret_ref = status.secret_ref.as_ref().unwrap();
    assert_eq!((secret_ref.name.as_str(), secret_ref.key.as_str()), ("plain-secret", "key-value"));
    assert_eq!(status.presets, ["Alerts"]);
    let kinds: Vec<_> = status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
    assert_eq!(kinds, [("Ready", "True"), ("Accepted", "True")], "unexpected conditions");
    assert!(status.conditions.iter().all(|c| c.observed_generation == key.metadata.generation));
    assert_eq!(status.created_at, Some(status.tokens[0].minted_at.clone()));
    assert_eq!((&status.last_rotated_at, &status.next_rotation_at), (&None, &None));
}

#[tokio::test]
async fn minting_uses_the_secret_template_and_copies_no_metadata_of_the_apikey() {
    let team = Team::new().await;
    let spec = spec_with(json!({"secret": {
        "name": "elsewhere", "key": "token.txt", "labels": {"tier": "edge"}, "annotations": {"example.com/note": "é"},
    }}));
    let mut object = manifest("custom", &spec);
    object["metadata"]["labels"] = json!({"argocd.argoproj.io/instance": "shop"});
    object["metadata"]["annotations"] = json!({"argocd.argoproj.io/tracking-id": "shop:keywright.dev/ApiKey:x"});
    team.kubectl(&["apply", "-f", &team.file(&object)]).unwrap();
    let key = team.ready("custom").await;
    let secret = team.secrets.get("elsewhere").await.unwrap();
    assert_eq!(secret.data.as_ref().unwrap().keys().collect::<Vec<_>>(), ["token.txt"]);
    assert_eq!(tokens(&key)[0].sha256, sha256(&value_of(&secret).unwrap()));
    assert_eq!(secret.labels().keys().collect::<Vec<_>>(), ["app.kubernetes.io/managed-by", "tier"]);
    assert_eq!(secret.annotations().keys().collect::<Vec<_>>(), ["example.com/note", RECORD, RECORD_MAC]);
    assert_eq!(secret.annotations()["example.com/note"], "é");
    assert!(team.secrets.get_opt("custom-secret").await.unwrap().is_none());
}

#[tokio::test]
async fn prefix_of_a_value_depends_on_the_type() {
    let team = Team::new().await;
    for (name, spec, prefix) in [
        ("a", json!({"type": "SendYourData", "presets": ["SendData"]}), "kws_"),
        ("b", json!({"type": "Team", "permissions": ["logs.data-ingress:SendData"]}), "kwt_"),
    ] {
        let (_, value) = team.minted(name, spec).await;
        assert!(is_well_formed(&value) && value.starts_with(prefix), "{name}");
    }
}

#[tokio::test]
async fn minting_creates_one_event_that_kubectl_describe_shows() {
    let team = Team::new().await;
    let (key, _) = team.minted("minted", team_spec()).await;
    let note = team.event("minted", "Minted").await;
    let id = status(&key).id.clone().unwrap();
    assert!(note.contains(&id) && note.contains("minted-secret"), "{note}");
    let text = team.kubectl(&["describe", "apikey", "minted"]).unwrap();
    assert!(text.contains("Minted") && text.contains(&note), "{text}");
    let events = team.kubectl(&["get", "events.events.k8s.io", "-o", "name"]).unwrap();
    assert_eq!(events.lines().count(), 1, "{events}");
}

#[tokio::test]
async fn changes_of_the_template_are_applied_to_the_secret_and_foreign_metadata_is_kept() {
    let team = Team::new().await;
    let template = json!({"labels": {"a": "1", "b": "1"}, "annotations": {"x": "1", "y": "1"}});
    let (_, value) = team.minted("mirror", spec_with(json!({"secret": template}))).await;
    team.tamper("mirror", json!({"metadata": {"labels": {"foreign": "f"}, "annotations": {"foreign": "f"}}})).await;

    // One label and one annotation each is changed, removed and added.
    let change = json!({"labels": {"a": "2", "b": null, "c": "1"}, "annotations": {"x": "2", "y": null, "z": "1"}});
    team.edit("mirror", json!({"secret": change})).await;
    team.ready("mirror").await;
    let secret = team.secret("mirror").await;
    let labels = [("a", "2"), ("app.kubernetes.io/managed-by", "keywright"), ("c", "1"), ("foreign", "f")];
    assert_eq!(secret.labels(), &labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let mut annotations = secret.annotations().clone();
    annotations.remove(RECORD);
    annotations.remove(RECORD_MAC);
    assert_eq!(
        annotations,
        [("foreign", "f"), ("x", "2"), ("z", "1")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    );
    assert_eq!(value_of(&secret).unwrap(), value, "a change of metadata rotated the value");

    team.edit("mirror", json!({"secret": null})).await;
    team.ready("mirror").await;
    let secret = team.secret("mirror").await;
    assert_eq!(secret.labels().keys().collect::<Vec<_>>(), ["app.kubernetes.io/managed-by", "foreign"]);
    assert_eq!(secret.annotations().keys().collect::<Vec<_>>(), ["foreign", RECORD, RECORD_MAC]);

    // A label that another writer removes is restored at the next check.
    team.edit("mirror", json!({"secret": {"labels": {"a": "3"}}})).await;
    team.ready("mirror").await;
    team.tamper("mirror", json!({"metadata": {"labels": {"a": null}}})).await;
    eventually("the label is restored", TIMEOUT, async || {
        ensure!(team.secret("mirror").await.labels().get("a").is_some_and(|a| a == "3"), "the label is missing");
        Ok(())
    })
    .await;
    assert_eq!(team.value("mirror").await, value);
}

/// A template that sets a label of Keywright to another value cannot be fulfilled. It must be rejected, or one of the
/// two values must win; otherwise every check would write the Secret.
#[tokio::test]
async fn template_with_a_label_of_keywright_does_not_cause_repeated_writes() {
    let team = Team::new().await;
    let spec = spec_with(json!({"secret": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}}));
    let Ok(_) = team.keys.create(&PostParams::default(), &key("helm", &spec)).await else { return };
    team.ready("helm").await;
    let path = format!("/api/v1/namespaces/{}/secrets/helm-secret", team.namespace);
    let writes = || team.cluster.proxy.writes().iter().filter(|write| write.path == path).count();
    let before = writes();
    tokio::time::sleep(CHECK_INTERVAL * 4).await;
    assert_eq!(writes(), before, "the Secret is patched at every check");
}

#[tokio::test]
async fn deactivation_keeps_the_value() {
    let team = Team::new().await;
    let (_, value) = team.minted("pause", team_spec()).await;
    let version = team.secret("pause").await.resource_version();
    team.edit("pause", json!({"active": false})).await;
    let key = team.ready("pause").await;
    assert_eq!((state(&key), reason(&key)), (Some(KeyState::Inactive), "Inactive"));
    assert_eq!(tokens(&key)[0].sha256, sha256(&value));
    team.event("pause", "Deactivated").await;
    team.edit("pause", json!({"active": true})).await;
    let key = team.ready("pause").await;
    assert_eq!((state(&key), reason(&key)), (Some(KeyState::Active), "Active"));
    team.event("pause", "Reactivated").await;
    assert_eq!(team.value("pause").await, value);
    assert_eq!(team.secret("pause").await.resource_version(), version, "the Secret was written");
}

#[tokio::test]
async fn key_created_inactive_is_minted_and_works_after_activation() {
    let team = Team::new().await;
    let (key, value) = team.minted("asleep", spec_with(json!({"active": false}))).await;
    assert_eq!(state(&key), Some(KeyState::Inactive));
    team.edit("asleep", json!({"active": null})).await;
    let key = team.ready("asleep").await;
    assert_eq!((state(&key), team.value("asleep").await), (Some(KeyState::Active), value));
}

#[tokio::test]
async fn key_expires_at_its_expiry_and_works_again_after_the_expiry_is_moved() {
    let team = Team::new().await;
    let expiry = from_now(6);
    team.create("mortal", spec_with(json!({"expiresAt": expiry}))).await;
    let key = team.until("mortal", "minted", |key| !tokens(key).is_empty()).await;
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0.to_string(), expiry);
    let value = team.value("mortal").await;
    let key = team.after(&key, "expired", |key| state(key) == Some(KeyState::Expired)).await;
    assert!(from_now(0) >= expiry, "too early");
    assert_stalled(&key, "Expired");
    assert!(condition(&key, "Ready").unwrap().message.contains("expiresAt"), "the message does not say how to fix it");
    assert!(team.event("mortal", "Expired").await.contains(status(&key).id.as_deref().unwrap()));

    let expiry = from_now(3600);
    team.edit("mortal", json!({"expiresAt": expiry})).await;
    let key = team.ready("mortal").await;
    assert_eq!((state(&key), team.value("mortal").await), (Some(KeyState::Active), value));
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0.to_string(), expiry);
    team.event("mortal", "Reactivated").await;
}

#[tokio::test]
async fn deleted_secret_makes_the_key_lost_until_a_rotation_is_requested() {
    let team = Team::new().await;
    let (before, value) = team.minted("lost", team_spec()).await;
    team.secrets.delete("lost-secret", &DeleteParams::default()).await.unwrap();
    let key = team.until("lost", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    assert_stalled(&key, "SecretLost");
    assert!(
        condition(&key, "Ready").unwrap().message.contains("spec.rotation.requestedAt"),
        "the message does not say how to fix it"
    );
    assert!(team.event("lost", "SecretLost").await.contains("lost-secret"));
    assert_eq!(tokens(&key), tokens(&before), "the value no longer works");

    team.edit("lost", json!({"displayName": "another generation"})).await;
    team.settled("lost").await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    assert!(team.secrets.get_opt("lost-secret").await.unwrap().is_none(), "a value was minted without a request");

    let request = from_now(0);
    team.edit("lost", json!({"rotation": {"requestedAt": request, "overlap": "1h"}})).await;
    let key = team.ready("lost").await;
    let new = team.value("lost").await;
    assert_ne!(new, value);
    assert_eq!(tokens(&key).iter().map(|t| t.sha256.clone()).collect::<Vec<_>>(), [sha256(&new), sha256(&value)]);
    assert_eq!(status(&key).last_handled_requested_at, Some(request));
    assert_eq!(status(&key).created_at, status(&before).created_at);
}

#[tokio::test]
async fn restoring_the_same_secret_recovers_a_lost_key() {
    let team = Team::new().await;
    let (before, value) = team.minted("back", team_spec()).await;
    let secret = team.secret("back").await;
    team.secrets.delete("back-secret", &DeleteParams::default()).await.unwrap();
    team.until("back", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    team.secrets.create(&PostParams::default(), &backup(&secret)).await.unwrap();
    let key = team.ready("back").await;
    assert_eq!(tokens(&key), tokens(&before));
    assert_eq!(team.value("back").await, value);
    team.event("back", "Reactivated").await;
}

#[tokio::test]
async fn value_changed_by_another_writer_is_detected_and_not_accepted() {
    let team = Team::new().await;
    let (before, value) = team.minted("changed", team_spec()).await;
    let (_, other) = team.minted("other", team_spec()).await;
    team.tamper("changed", json!({"data": {"key-value": data(&other)}})).await;
    let key = team.until("changed", "SecretValueChanged", |key| reason(key) == "SecretValueChanged").await;
    assert_stalled(&key, "SecretValueChanged");
    assert_eq!(state(&key), Some(KeyState::Lost));
    assert_eq!(tokens(&key), tokens(&before), "the digest of the minted value changed");
    team.event("changed", "SecretValueChanged").await;
    team.tamper("changed", json!({"data": {"key-value": data(&value)}})).await;
    team.ready("changed").await;

    team.tamper("changed", json!({"data": null})).await;
    team.until("changed", "SecretValueChanged again", |key| reason(key) == "SecretValueChanged").await;
    team.edit("changed", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let key = team.ready("changed").await;
    let new = team.value("changed").await;
    assert!(new != value && new != other);
    assert_eq!(tokens(&key).iter().map(|t| t.sha256.clone()).collect::<Vec<_>>(), [sha256(&new)]);
}

/// S4.
#[tokio::test]
async fn foreign_secret_is_never_written_and_the_key_is_minted_after_its_deletion() {
    let team = Team::new().await;
    let foreign = team.foreign("taken-secret", json!({"labels": {"app": "other"}})).await;
    team.create("taken", team_spec()).await;
    let key = team.until("taken", "in conflict", |key| reason(key) == "SecretConflict").await;
    assert_stalled(&key, "SecretConflict");
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("taken-secret") && message.contains("spec.secret.name"), "{message}");
    assert!(tokens(&key).is_empty());
    team.event("taken", "SecretConflict").await;
    // A rotation request and a changed template do not write the foreign Secret either.
    let template = json!({"labels": {"a": "b"}});
    team.edit("taken", json!({"rotation": {"requestedAt": from_now(0)}, "secret": template})).await;
    team.settled("taken").await;
    tokio::time::sleep(CHECK_INTERVAL).await;
    assert_eq!(team.secret("taken").await, foreign, "the foreign Secret was changed");
    team.secrets.delete("taken-secret", &DeleteParams::default()).await.unwrap();
    let key = team.ready("taken").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("taken").await));
}

/// S4.
#[tokio::test]
async fn secret_owned_by_another_kind_is_never_written() {
    let team = Team::new().await;
    let configs: Api<ConfigMap> = Api::namespaced(team.client.clone(), &team.namespace);
    let config = serde_json::from_value(json!({"metadata": {"name": "owned"}})).unwrap();
    let owner = configs.create(&PostParams::default(), &config).await.unwrap();
    let reference = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "name": "owned", "uid": owner.metadata.uid, "controller": true,
    });
    let foreign = team.foreign("owned-secret", json!({"ownerReferences": [reference]})).await;
    team.create("owned", team_spec()).await;
    let key = team.until("owned", "in conflict", |key| reason(key) == "SecretConflict").await;
    assert_stalled(&key, "SecretConflict");
    assert!(
        condition(&key, "Ready").unwrap().message.contains("ConfigMap owned"),
        "the message does not name the owner"
    );
    tokio::time::sleep(CHECK_INTERVAL).await;
    assert_eq!(team.secret("owned").await, foreign);
}

/// S4.
#[tokio::test]
async fn foreign_secret_with_the_name_of_a_lost_one_is_never_written() {
    let team = Team::new().await;
    let (before, _) = team.minted("squat", team_spec()).await;
    team.secrets.delete("squat-secret", &DeleteParams::default()).await.unwrap();
    let foreign = team.foreign("squat-secret", json!({})).await;
    team.until("squat", "in conflict", |key| reason(key) == "SecretConflict").await;
    team.edit("squat", json!({"rotation": {"requestedAt": from_now(0)}})).await;
    let key = team.settled("squat").await;
    assert_eq!((state(&key), reason(&key)), (Some(KeyState::Lost), "SecretConflict"));
    assert_eq!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
    assert_eq!(team.secret("squat").await, foreign);
}

#[tokio::test]
async fn deletion_deletes_the_secret_without_finalizers() {
    let team = Team::new().await;
    let (key, value) = team.minted("gone", team_spec()).await;
    assert!(key.finalizers().is_empty() && team.secret("gone").await.finalizers().is_empty());
    team.delete("gone").await;
    let (_, new) = team.minted("gone", team_spec()).await;
    assert_ne!(new, value, "the recreated key has the old value");
    // In foreground deletion the Secret is deleted first and must not block the deletion of its owner.
    team.keys.delete("gone", &DeleteParams::foreground()).await.unwrap();
    eventually("both are deleted", TIMEOUT, async || {
        ensure!(team.keys.get_opt("gone").await?.is_none(), "the ApiKey still exists");
        ensure!(team.secrets.get_opt("gone-secret").await?.is_none(), "the Secret still exists");
        Ok(())
    })
    .await;
}

/// Deletes an ApiKey and creates it again while its Secret still exists, held by a finalizer as with a slow garbage
/// collector.
async fn recreate_before_secret_is_deleted(team: &Team, name: &str) {
    team.tamper(name, json!({"metadata": {"finalizers": ["test.example.com/hold"]}})).await;
    team.keys.delete(name, &DeleteParams::background()).await.unwrap();
    eventually("the Secret waits for its finalizer", TIMEOUT, async || {
        ensure!(team.keys.get_opt(name).await?.is_none(), "the ApiKey still exists");
        ensure!(team.secret(name).await.metadata.deletion_timestamp.is_some(), "the Secret is not being deleted");
        Ok(())
    })
    .await;
    team.create(name, team_spec()).await;
}

#[tokio::test]
async fn recreated_key_waits_for_the_deletion_of_the_old_secret_and_gets_a_new_value() {
    let team = Team::new().await;
    let (_, value) = team.minted("again", team_spec()).await;
    recreate_before_secret_is_deleted(&team, "again").await;
    let key = team.until("again", "in conflict", |key| reason(key) == "SecretConflict").await;
    assert_stalled(&key, "SecretConflict");
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("metadata.finalizers"), "the message does not name the finalizer: {message}");
    assert!(tokens(&key).is_empty());
    team.tamper("again", json!({"metadata": {"finalizers": null}})).await;
    let key = team.ready("again").await;
    assert_ne!(team.value("again").await, value);
    assert_eq!(tokens(&key).len(), 1);
}

/// Deletion of an ApiKey revokes its value. A Secret that was minted again after a loss is younger than the key's
/// creation time in its record, like a restored Secret; its value must not be accepted for that reason.
#[tokio::test]
async fn recreated_key_gets_a_new_value_if_the_old_secret_was_once_lost() {
    let team = Team::new().await;
    team.minted("revoked", team_spec()).await;
    team.secrets.delete("revoked-secret", &DeleteParams::default()).await.unwrap();
    team.until("revoked", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    team.edit("revoked", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    team.ready("revoked").await;
    let value = team.value("revoked").await;
    // Simulates a loss one day after the first minting.
    team.forge("revoked", |record| record["createdAt"] = json!(from_now(-24 * 3600))).await;
    recreate_before_secret_is_deleted(&team, "revoked").await;
    let key = team.settled("revoked").await;
    let digests: Vec<_> = tokens(&key).iter().map(|token| token.sha256.clone()).collect();
    assert!(!digests.contains(&sha256(&value)), "the value of the deleted key works again: {}", reason(&key));
}

#[tokio::test]
async fn namespace_with_keys_in_every_state_can_be_deleted() {
    let team = Team::new().await;
    team.minted("fine", spec_with(json!({"rotation": {"every": "1h"}}))).await;
    team.minted("lost", team_spec()).await;
    team.secrets.delete("lost-secret", &DeleteParams::default()).await.unwrap();
    team.until("lost", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    team.foreign("conflict-secret", json!({})).await;
    team.create("conflict", team_spec()).await;
    team.until("conflict", "in conflict", |key| reason(key) == "SecretConflict").await;
    let namespaces: Api<Namespace> = Api::all(team.client.clone());
    namespaces.delete(&team.namespace, &DeleteParams::default()).await.unwrap();
    eventually("the namespace is gone", TIMEOUT * 2, async || {
        let left = namespaces.get_opt(&team.namespace).await?;
        ensure!(left.is_none(), "{:#?}", left.and_then(|namespace| namespace.status));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn rejected_write_of_a_secret_is_reported_and_retried() {
    let team = Team::new().await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/secrets": "0"}}});
    team.kubectl(&["apply", "-f", &team.file(&quota)]).unwrap();
    team.kubectl(&["wait", "--for=jsonpath={.status.hard.count/secrets}=0", "quota/none", "--timeout=60s"]).unwrap();
    team.create("quota", team_spec()).await;
    let key = team.until("quota", "SecretWriteFailed", |key| reason(key) == "SecretWriteFailed").await;
    let ready = condition(&key, "Ready").unwrap();
    assert!(ready.message.contains("exceeded quota"), "{}", ready.message);
    // Only a user can change a quota, so the key is Stalled.
    assert!(condition(&key, "Stalled").is_some() && condition(&key, "Reconciling").is_none());
    assert!(!is_up_to_date(&key), "the status has the generation of the failed spec");
    team.event("quota", "SecretWriteFailed").await;
    team.kubectl(&["delete", "quota", "none"]).unwrap();
    let key = team.ready("quota").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("quota").await));
}

#[tokio::test]
async fn rotation_of_an_immutable_secret_is_reported_and_retried() {
    let team = Team::new().await;
    let (before, value) = team.minted("fixed", team_spec()).await;
    let secret = backup(&team.secret("fixed").await);
    team.secrets
        .patch("fixed-secret", &PatchParams::default(), &Patch::Merge(json!({"immutable": true})))
        .await
        .unwrap();
    team.edit("fixed", json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.until("fixed", "SecretWriteFailed", |key| reason(key) == "SecretWriteFailed").await;
    assert_eq!((team.value("fixed").await, tokens(&key)), (value.clone(), tokens(&before)));
    assert_eq!(status(&key).last_handled_requested_at, None);
    // An immutable Secret can only be replaced.
    team.secrets.delete("fixed-secret", &DeleteParams::default()).await.unwrap();
    team.secrets.create(&PostParams::default(), &secret).await.ok();
    let key = team.ready("fixed").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("fixed").await));
    assert_eq!(tokens(&key)[1].sha256, sha256(&value));
}

#[tokio::test]
async fn key_with_a_missing_policy_works_and_reports_the_missing_policy() {
    let team = Team::new().await;
    let (key, _) = team.minted("guarded", spec_with(json!({"accessPolicyRef": {"name": "nowhere"}}))).await;
    let policy = condition(&key, "PolicyAccepted").expect("condition PolicyAccepted");
    assert_eq!((policy.status.as_str(), policy.reason.as_str()), ("False", "PolicyNotFound"));
    assert!(policy.message.contains("no user may view or manage the key"), "{}", policy.message);
    assert_eq!(team.event("guarded", "PolicyNotFound").await, policy.message);
    team.edit("guarded", json!({"accessPolicyRef": null})).await;
    assert!(condition(&team.ready("guarded").await, "PolicyAccepted").is_none());
}
