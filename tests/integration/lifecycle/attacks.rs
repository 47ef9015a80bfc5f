//! Regression tests for attacks by writes to Secrets. A policy of the chart denies these writes to users with ordinary
//! rights (`tests/cluster/secrets.rs` tests that); here an administrator makes them, and the operator must not accept
//! the written values.

use keywright::api::{KeyState, SecuritySettings};
use keywright::domain::key::Key;

use super::*;
use crate::support::keys::{RECORD, RECORD_MAC, sha256};

/// The spec of a Personal key. The administrator may impersonate every user.
fn personal(user: &str) -> Value {
    json!({"type": "Personal", "user": user, "presets": ["Alerts"]})
}

/// A well-formed value that the operator did not mint.
fn unminted() -> String {
    Key::mint(keywright::api::KeyType::Team, &mut rand::rngs::SysRng).unwrap().expose().to_owned()
}

/// Replaces a Secret by an earlier version, as `kubectl replace` does.
async fn restore(team: &Team, secret: &Secret) {
    let name = secret.name_any();
    let copy = backup(secret);
    team.secrets.replace(&name, &PostParams::default(), &copy).await.expect("the Secret is replaced");
}

#[tokio::test]
async fn sealed_value_and_record_of_another_key_are_not_accepted() {
    let team = Team::new().await;
    for (name, user) in [("alice", "alice@example.com"), ("bob", "bob@example.com")] {
        team.create(name, personal(user)).await;
        team.ready(name).await;
    }
    let before = team.keys.get("bob").await.unwrap();
    let own = team.secret("alice").await;
    let digest = tokens(&team.keys.get("alice").await.unwrap())[0].sha256.clone();
    team.tamper("bob", json!({"data": {"sealed-value": own.data.as_ref().unwrap()["sealed-value"]}})).await;
    team.forge("bob", |record| record["current"]["sha256"] = json!(digest)).await;
    let key = team.until("bob", "SecretValueChanged", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!(tokens(&key), tokens(&before));
    // The same with the complete record of the other key and its MAC.
    let annotations = [RECORD, RECORD_MAC].map(|name| (name, own.annotations()[name].clone()));
    team.tamper("bob", json!({"metadata": {"annotations": Value::from_iter(annotations)}})).await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    assert_eq!(tokens(&team.keys.get("bob").await.unwrap()), tokens(&before));
}

#[tokio::test]
async fn secret_from_before_a_rotation_is_not_accepted_when_restored() {
    let team = Team::new().await;
    let (_, revoked) = team.minted("rotated", team_spec()).await;
    let old = team.secret("rotated").await;
    team.edit("rotated", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let before = team.ready("rotated").await;
    let current = team.secret("rotated").await;
    restore(&team, &old).await;
    let key = team.until("rotated", "SecretValueChanged", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!((state(&key), tokens(&key)), (Some(KeyState::Lost), tokens(&before)));
    assert!(tokens(&key).iter().all(|token| token.sha256 != sha256(&revoked)), "the revoked value works again");
    restore(&team, &current).await;
    let key = team.ready("rotated").await;
    assert_eq!((state(&key), tokens(&key)), (Some(KeyState::Active), tokens(&before)));
    // The old Secret is not accepted either when it is deleted and created again.
    team.secrets.delete("rotated-secret", &DeleteParams::default()).await.unwrap();
    let mut copy = backup(&old);
    copy.metadata.owner_references = None;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("rotated", "SecretConflict", |key| reason(key) == "SecretConflict").await;
    assert_eq!(tokens(&key), tokens(&before));
}

#[tokio::test]
async fn unminted_value_in_the_secret_of_a_one_time_key_is_not_accepted() {
    let team = Team::new().await;
    let settings: Api<SecuritySettings> = Api::namespaced(team.client.clone(), &team.namespace);
    let once = json!({"metadata": {"name": "default"}, "spec": {"oneTimeReveal": true}});
    settings.create(&PostParams::default(), &serde_json::from_value(once).unwrap()).await.unwrap();
    team.create("once", team_spec()).await;
    let before = team.ready("once").await;
    let value = unminted();
    team.tamper("once", json!({"data": {"sealed-value": null, "key-value": data(&value)}})).await;
    team.forge("once", |record| {
        record["current"]["sha256"] = json!(sha256(&value));
        record.as_object_mut().unwrap().remove("sealed");
    })
    .await;
    let key = team.until("once", "SecretValueChanged", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!(tokens(&key), tokens(&before));
}

#[tokio::test]
async fn secret_with_an_unminted_value_created_before_the_key_is_not_adopted() {
    let team = Team::new().await;
    team.minted("sample", team_spec()).await;
    let value = unminted();
    let mut secret = backup(&team.secret("sample").await);
    secret.metadata.name = Some("k-secret".to_owned());
    secret.metadata.owner_references = None;
    secret.data = Some([("key-value".to_owned(), data(&value))].into());
    let mut forged = record(&secret);
    forged["apiKey"] = json!("k");
    forged["secret"] = json!("k-secret");
    forged["current"]["sha256"] = json!(sha256(&value));
    secret.annotations_mut().insert(RECORD.to_owned(), forged.to_string());
    let secret = team.secrets.create(&PostParams::default(), &secret).await.unwrap();
    team.create("k", team_spec()).await;
    let key = team.until("k", "SecretNotAuthentic", |key| reason(key) == "SecretNotAuthentic").await;
    assert_stalled(&key, "SecretNotAuthentic");
    assert!(tokens(&key).is_empty());
    // The same with the ApiKey as owner.
    let owner = json!([{"apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "name": "k", "uid": key.uid(),
        "controller": true}]);
    team.tamper("k", json!({"metadata": {"ownerReferences": owner}})).await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    let key = team.keys.get("k").await.unwrap();
    assert_eq!((reason(&key), tokens(&key).len()), ("SecretNotAuthentic", 0));
    assert_eq!(team.secret("k").await.data, secret.data, "the operator wrote to the Secret");
}

#[tokio::test]
async fn key_and_secret_copied_to_another_namespace_are_not_accepted() {
    let (original, copy) = (Team::new().await, Team::new().await);
    let (_, value) = original.minted("k", team_spec()).await;
    let mut secret = backup(&original.secret("k").await);
    secret.metadata.namespace = None;
    secret.metadata.owner_references = None;
    copy.secrets.create(&PostParams::default(), &secret).await.unwrap();
    copy.create("k", team_spec()).await;
    let key = copy.until("k", "SecretNotAuthentic", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    original.delete("k").await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    let key = copy.keys.get("k").await.unwrap();
    assert!(
        tokens(&key).iter().all(|token| token.sha256 != sha256(&value)),
        "the value works after the original key was deleted"
    );
}
