//! Minting, its Secret, deactivation, expiry, loss, conflicts, deletion.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use keywright::api::KeyState;
use keywright::domain::key::is_well_formed;
use kube::api::{Patch, PatchParams};

use crate::support::keys::{RECORD, RECORD_MAC, SECRET_TYPE, condition, sha256};
use crate::*;

#[tokio::test]
async fn minting_writes_one_secret_under_the_default_names() {
    let team = Team::new().await;
    let (key, value) = team.minted("plain", team_spec()).await;
    let secret = team.secret("plain").await;

    assert!(is_well_formed(&value) && value.starts_with("kwt_"), "not the documented form");
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
    support::keys::agree(&key, &secret, std::slice::from_ref(&value)).unwrap();

    let status = status(&key);
    assert_eq!(status.tokens.len(), 1);
    assert_eq!(status.tokens[0].sha256, sha256(&value));
    assert_eq!(status.id.as_deref(), Some(format!("key_{}", &sha256(&value)[..16]).as_str()));
    assert_eq!(status.state, Some(KeyState::Active));
    let place = status.secret_ref.as_ref().unwrap();
    assert_eq!((place.name.as_str(), place.key.as_str()), ("plain-secret", "key-value"));
    assert_eq!(status.presets, ["Alerts"]);
    let kinds: Vec<_> = status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
    assert_eq!(kinds, [("Ready", "True"), ("Accepted", "True")], "and neither Reconciling nor Stalled");
    assert!(status.conditions.iter().all(|c| c.observed_generation == key.metadata.generation));
    assert_eq!(status.created_at, Some(status.tokens[0].minted_at.clone()));
    assert_eq!((&status.last_rotated_at, &status.next_rotation_at), (&None, &None));
}

#[tokio::test]
async fn minting_honours_the_names_labels_and_annotations_of_the_template_and_copies_nothing_else() {
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
async fn the_prefix_tells_the_type() {
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
async fn minting_is_told_once_in_an_event_that_kubectl_describe_shows() {
    let team = Team::new().await;
    let (key, _) = team.minted("told", team_spec()).await;
    let note = team.event("told", "Minted").await;
    let id = status(&key).id.clone().unwrap();
    assert!(note.contains(&id) && note.contains("told-secret"), "{note}");
    let text = team.kubectl(&["describe", "apikey", "told"]).unwrap();
    assert!(text.contains("Minted") && text.contains(&note), "{text}");
    let events = team.kubectl(&["get", "events.events.k8s.io", "-o", "name"]).unwrap();
    assert_eq!(events.lines().count(), 1, "{events}");
}

#[tokio::test]
async fn labels_and_annotations_of_the_template_are_mirrored_and_foreign_ones_kept() {
    let team = Team::new().await;
    let template = json!({"labels": {"a": "1", "b": "1"}, "annotations": {"x": "1", "y": "1"}});
    let (_, value) = team.minted("mirror", spec_with(json!({"secret": template}))).await;
    team.tamper("mirror", json!({"metadata": {"labels": {"foreign": "f"}, "annotations": {"foreign": "f"}}})).await;

    // One is changed, one is taken out, one is new.
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
    assert_eq!(value_of(&secret).unwrap(), value, "metadata is no reason for a new value");

    team.edit("mirror", json!({"secret": null})).await;
    team.ready("mirror").await;
    let secret = team.secret("mirror").await;
    assert_eq!(secret.labels().keys().collect::<Vec<_>>(), ["app.kubernetes.io/managed-by", "foreign"]);
    assert_eq!(secret.annotations().keys().collect::<Vec<_>>(), ["foreign", RECORD, RECORD_MAC]);

    // What somebody else takes away is put back at the next look.
    team.edit("mirror", json!({"secret": {"labels": {"a": "3"}}})).await;
    team.ready("mirror").await;
    team.tamper("mirror", json!({"metadata": {"labels": {"a": null}}})).await;
    eventually("the label is back", PATIENCE, async || {
        ensure!(team.secret("mirror").await.labels().get("a").is_some_and(|a| a == "3"), "it is not");
        Ok(())
    })
    .await;
    assert_eq!(team.value("mirror").await, value);
}

/// A template that contradicts what Keywright itself sets can never be fulfilled: then it must be refused, or one of
/// the two must yield. Else every look at the Secret writes it anew.
#[tokio::test]
async fn a_template_that_contradicts_the_label_of_keywright_does_not_write_for_ever() {
    let team = Team::new().await;
    let spec = spec_with(json!({"secret": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}}));
    let Ok(_) = team.keys.create(&PostParams::default(), &key("helm", &spec)).await else { return };
    team.ready("helm").await;
    let path = format!("/api/v1/namespaces/{}/secrets/helm-secret", team.namespace);
    let writes = || team.cluster.proxy.writes().iter().filter(|write| write.path == path).count();
    let before = writes();
    tokio::time::sleep(CHECK * 4).await;
    assert_eq!(writes(), before, "the Secret is patched at every look, though nothing changes");
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
    assert_eq!(team.secret("pause").await.resource_version(), version, "the Secret was not written");
}

#[tokio::test]
async fn a_key_that_is_born_inactive_is_minted_and_waits() {
    let team = Team::new().await;
    let (key, value) = team.minted("asleep", spec_with(json!({"active": false}))).await;
    assert_eq!(state(&key), Some(KeyState::Inactive));
    team.edit("asleep", json!({"active": null})).await;
    let key = team.ready("asleep").await;
    assert_eq!((state(&key), team.value("asleep").await), (Some(KeyState::Active), value));
}

#[tokio::test]
async fn a_key_expires_by_itself_and_revives_with_the_same_value() {
    let team = Team::new().await;
    let expiry = from_now(6);
    team.create("mortal", spec_with(json!({"expiresAt": expiry}))).await;
    let key = team.until("mortal", "minted", |key| !tokens(key).is_empty()).await;
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0.to_string(), expiry);
    let value = team.value("mortal").await;
    let key = team.after(&key, "expired", |key| state(key) == Some(KeyState::Expired)).await;
    assert!(from_now(0) >= expiry, "too early");
    assert_stalled(&key, "Expired");
    assert!(condition(&key, "Ready").unwrap().message.contains("expiresAt"), "it says what to do");
    assert!(team.event("mortal", "Expired").await.contains(status(&key).id.as_deref().unwrap()));

    let expiry = from_now(3600);
    team.edit("mortal", json!({"expiresAt": expiry})).await;
    let key = team.ready("mortal").await;
    assert_eq!((state(&key), team.value("mortal").await), (Some(KeyState::Active), value));
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0.to_string(), expiry);
    team.event("mortal", "Reactivated").await;
}

#[tokio::test]
async fn a_deleted_secret_is_told_and_never_replaced_unasked() {
    let team = Team::new().await;
    let (before, value) = team.minted("lost", team_spec()).await;
    team.secrets.delete("lost-secret", &DeleteParams::default()).await.unwrap();
    let key = team.until("lost", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    assert_stalled(&key, "SecretLost");
    assert!(condition(&key, "Ready").unwrap().message.contains("spec.rotation.requestedAt"), "it says what to do");
    assert!(team.event("lost", "SecretLost").await.contains("lost-secret"));
    assert_eq!(tokens(&key), tokens(&before), "who still has the value can go on");

    team.edit("lost", json!({"displayName": "another generation"})).await;
    team.settled("lost").await;
    tokio::time::sleep(CHECK * 2).await;
    assert!(team.secrets.get_opt("lost-secret").await.unwrap().is_none(), "a new key that nobody asked for");

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
async fn putting_the_same_secret_back_recovers_a_lost_key() {
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
async fn a_value_that_was_changed_by_hand_is_noticed_and_not_believed() {
    let team = Team::new().await;
    let (before, value) = team.minted("changed", team_spec()).await;
    let (_, other) = team.minted("other", team_spec()).await;
    team.tamper("changed", json!({"data": {"key-value": data(&other)}})).await;
    let key = team.until("changed", "noticed", |key| reason(key) == "SecretValueChanged").await;
    assert_stalled(&key, "SecretValueChanged");
    assert_eq!(state(&key), Some(KeyState::Lost));
    assert_eq!(tokens(&key), tokens(&before), "the digest of what was minted stays");
    team.event("changed", "SecretValueChanged").await;
    team.tamper("changed", json!({"data": {"key-value": data(&value)}})).await;
    team.ready("changed").await;

    team.tamper("changed", json!({"data": null})).await;
    team.until("changed", "noticed again", |key| reason(key) == "SecretValueChanged").await;
    team.edit("changed", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let key = team.ready("changed").await;
    let new = team.value("changed").await;
    assert!(new != value && new != other);
    assert_eq!(tokens(&key).iter().map(|t| t.sha256.clone()).collect::<Vec<_>>(), [sha256(&new)]);
}

/// S4.
#[tokio::test]
async fn a_foreign_secret_is_never_touched_and_the_key_is_minted_once_it_is_gone() {
    let team = Team::new().await;
    let foreign = team.foreign("taken-secret", json!({"labels": {"app": "other"}})).await;
    team.create("taken", team_spec()).await;
    let key = team.until("taken", "in conflict", |key| reason(key) == "SecretConflict").await;
    assert_stalled(&key, "SecretConflict");
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("taken-secret") && message.contains("spec.secret.name"), "{message}");
    assert!(tokens(&key).is_empty());
    team.event("taken", "SecretConflict").await;
    // Neither a rotation nor a changed template is an excuse.
    let template = json!({"labels": {"a": "b"}});
    team.edit("taken", json!({"rotation": {"requestedAt": from_now(0)}, "secret": template})).await;
    team.settled("taken").await;
    tokio::time::sleep(CHECK).await;
    assert_eq!(team.secret("taken").await, foreign, "not one field, not even the version");
    team.secrets.delete("taken-secret", &DeleteParams::default()).await.unwrap();
    let key = team.ready("taken").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("taken").await));
}

/// S4.
#[tokio::test]
async fn a_secret_that_another_kind_owns_is_never_touched() {
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
    assert!(condition(&key, "Ready").unwrap().message.contains("ConfigMap owned"), "it says whose it is");
    tokio::time::sleep(CHECK).await;
    assert_eq!(team.secret("owned").await, foreign);
}

/// S4: also when a Secret of somebody else takes the place of a lost one.
#[tokio::test]
async fn a_foreign_secret_in_the_place_of_a_lost_one_is_never_touched() {
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
async fn deletion_takes_the_secret_along_and_nothing_has_a_finalizer() {
    let team = Team::new().await;
    let (key, value) = team.minted("gone", team_spec()).await;
    assert!(key.finalizers().is_empty() && team.secret("gone").await.finalizers().is_empty());
    team.delete("gone").await;
    let (_, new) = team.minted("gone", team_spec()).await;
    assert_ne!(new, value, "a new life has a new value");
    // Foreground deletion: the Secret goes first, and must not keep its owner.
    team.keys.delete("gone", &DeleteParams::foreground()).await.unwrap();
    eventually("both are gone", PATIENCE, async || {
        ensure!(team.keys.get_opt("gone").await?.is_none(), "the ApiKey is there");
        ensure!(team.secrets.get_opt("gone-secret").await?.is_none(), "the Secret is there");
        Ok(())
    })
    .await;
}

/// Holds the Secret of a deleted ApiKey, as a slow garbage collector would.
async fn recreate_while_the_secret_lingers(team: &Team, name: &str) {
    team.tamper(name, json!({"metadata": {"finalizers": ["test.example.com/hold"]}})).await;
    team.keys.delete(name, &DeleteParams::background()).await.unwrap();
    eventually("the Secret waits for its finalizer", PATIENCE, async || {
        ensure!(team.keys.get_opt(name).await?.is_none(), "the ApiKey is there");
        ensure!(team.secret(name).await.metadata.deletion_timestamp.is_some(), "not collected yet");
        Ok(())
    })
    .await;
    team.create(name, team_spec()).await;
}

#[tokio::test]
async fn a_key_created_anew_waits_for_the_old_secret_and_gets_a_new_value() {
    let team = Team::new().await;
    let (_, value) = team.minted("again", team_spec()).await;
    recreate_while_the_secret_lingers(&team, "again").await;
    let key = team.until("again", "waits", |key| reason(key) == "SecretConflict").await;
    assert_stalled(&key, "SecretConflict");
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("metadata.finalizers"), "it says what holds the Secret: {message}");
    assert!(tokens(&key).is_empty());
    team.tamper("again", json!({"metadata": {"finalizers": null}})).await;
    let key = team.ready("again").await;
    assert_ne!(team.value("again").await, value);
    assert_eq!(tokens(&key).len(), 1);
}

/// Deleting an ApiKey revokes it. A Secret that was minted anew after a loss is younger than its record, as a restored
/// one is; its value must not come back all the same.
#[tokio::test]
async fn a_key_created_anew_gets_a_new_value_also_if_the_old_secret_was_once_lost() {
    let team = Team::new().await;
    team.minted("revoked", team_spec()).await;
    team.secrets.delete("revoked-secret", &DeleteParams::default()).await.unwrap();
    team.until("revoked", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    team.edit("revoked", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    team.ready("revoked").await;
    let value = team.value("revoked").await;
    // As if the loss had come a day after the first minting, and not within this test's seconds.
    team.forge("revoked", |record| record["createdAt"] = json!(from_now(-24 * 3600))).await;
    recreate_while_the_secret_lingers(&team, "revoked").await;
    let key = team.settled("revoked").await;
    let digests: Vec<_> = tokens(&key).iter().map(|token| token.sha256.clone()).collect();
    assert!(!digests.contains(&sha256(&value)), "the value of the deleted key works again: {}", reason(&key));
}

#[tokio::test]
async fn a_namespace_with_keys_in_every_state_can_be_deleted() {
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
    eventually("the namespace is gone", PATIENCE * 2, async || {
        let left = namespaces.get_opt(&team.namespace).await?;
        ensure!(left.is_none(), "{:#?}", left.and_then(|namespace| namespace.status));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_write_that_is_refused_is_told_and_tried_again() {
    let team = Team::new().await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/secrets": "0"}}});
    team.kubectl(&["apply", "-f", &team.file(&quota)]).unwrap();
    team.kubectl(&["wait", "--for=jsonpath={.status.hard.count/secrets}=0", "quota/none", "--timeout=60s"]).unwrap();
    team.create("quota", team_spec()).await;
    let key = team.until("quota", "refused", |key| reason(key) == "SecretWriteFailed").await;
    let ready = condition(&key, "Ready").unwrap();
    assert!(ready.message.contains("exceeded quota"), "{}", ready.message);
    // A quota is for a person to change.
    assert!(condition(&key, "Stalled").is_some() && condition(&key, "Reconciling").is_none());
    assert!(!is_up_to_date(&key), "it must not claim to be up to date");
    team.event("quota", "SecretWriteFailed").await;
    team.kubectl(&["delete", "quota", "none"]).unwrap();
    let key = team.ready("quota").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("quota").await));
}

#[tokio::test]
async fn an_immutable_secret_is_told_and_a_request_kept_until_it_can_be_carried_out() {
    let team = Team::new().await;
    let (before, value) = team.minted("fixed", team_spec()).await;
    let secret = backup(&team.secret("fixed").await);
    team.secrets
        .patch("fixed-secret", &PatchParams::default(), &Patch::Merge(json!({"immutable": true})))
        .await
        .unwrap();
    team.edit("fixed", json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.until("fixed", "refused", |key| reason(key) == "SecretWriteFailed").await;
    assert_eq!((team.value("fixed").await, tokens(&key)), (value.clone(), tokens(&before)));
    assert_eq!(status(&key).last_handled_requested_at, None);
    // What is immutable can only be replaced.
    team.secrets.delete("fixed-secret", &DeleteParams::default()).await.unwrap();
    team.secrets.create(&PostParams::default(), &secret).await.ok();
    let key = team.ready("fixed").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&team.value("fixed").await));
    assert_eq!(tokens(&key)[1].sha256, sha256(&value));
}

#[tokio::test]
async fn a_key_whose_policy_is_missing_works_and_says_that_nobody_may_manage_it() {
    let team = Team::new().await;
    let (key, _) = team.minted("guarded", spec_with(json!({"accessPolicyRef": {"name": "nowhere"}}))).await;
    let policy = condition(&key, "PolicyAccepted").expect("condition PolicyAccepted");
    assert_eq!((policy.status.as_str(), policy.reason.as_str()), ("False", "PolicyNotFound"));
    assert!(policy.message.contains("nobody may view or manage the key"), "{}", policy.message);
    assert_eq!(team.event("guarded", "PolicyNotFound").await, policy.message);
    team.edit("guarded", json!({"accessPolicyRef": null})).await;
    assert!(condition(&team.ready("guarded").await, "PolicyAccepted").is_none());
}
