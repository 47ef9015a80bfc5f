//! Attacks that worked once: writes of Secrets by users with ordinary rights. The policy of the chart refuses them to such
//! users (see the tests of the chart); here they are carried out by an administrator, whom no policy stops, and the
//! operator believes none of them.

use keywright::api::{KeyState, SecuritySettings};
use keywright::domain::key::Key;

use crate::support::keys::{RECORD, RECORD_MAC, sha256};
use crate::*;

/// A Personal key of a user, whom the administrator may impersonate.
fn personal(user: &str) -> Value {
    json!({"type": "Personal", "user": user, "presets": ["Alerts"]})
}

/// A value that nobody minted.
fn made_up() -> String {
    Key::mint(keywright::api::KeyType::Team, &mut rand::rngs::SysRng).unwrap().expose().to_owned()
}

/// Puts a Secret back as it was, as `kubectl replace` does.
async fn put_back(team: &Team, secret: &Secret) {
    let name = secret.name_any();
    let copy = backup(secret);
    team.secrets.replace(&name, &PostParams::default(), &copy).await.expect("the Secret is replaced");
}

#[tokio::test]
async fn a_sealed_value_and_its_digest_copied_into_the_secret_of_another_key_are_not_believed() {
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
    let key = team.until("bob", "changed", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!(tokens(&key), tokens(&before));
    // And with all of the other record, and its code.
    let annotations = [RECORD, RECORD_MAC].map(|name| (name, own.annotations()[name].clone()));
    team.tamper("bob", json!({"metadata": {"annotations": Value::from_iter(annotations)}})).await;
    tokio::time::sleep(CHECK * 2).await;
    assert_eq!(tokens(&team.keys.get("bob").await.unwrap()), tokens(&before));
}

#[tokio::test]
async fn a_secret_from_before_a_rotation_is_not_believed_when_it_is_put_back() {
    let team = Team::new().await;
    let (_, revoked) = team.minted("rotated", team_spec()).await;
    let old = team.secret("rotated").await;
    team.edit("rotated", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let before = team.ready("rotated").await;
    let current = team.secret("rotated").await;
    put_back(&team, &old).await;
    let key = team.until("rotated", "changed", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!((state(&key), tokens(&key)), (Some(KeyState::Lost), tokens(&before)));
    assert!(tokens(&key).iter().all(|token| token.sha256 != sha256(&revoked)), "the revoked value works again");
    put_back(&team, &current).await;
    let key = team.ready("rotated").await;
    assert_eq!((state(&key), tokens(&key)), (Some(KeyState::Active), tokens(&before)));
    // Deleted and created anew, it is as little believed.
    team.secrets.delete("rotated-secret", &DeleteParams::default()).await.unwrap();
    let mut copy = backup(&old);
    copy.metadata.owner_references = None;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("rotated", "in conflict", |key| reason(key) == "SecretConflict").await;
    assert_eq!(tokens(&key), tokens(&before));
}

#[tokio::test]
async fn a_made_up_value_in_the_secret_of_a_one_time_key_is_not_believed() {
    let team = Team::new().await;
    let settings: Api<SecuritySettings> = Api::namespaced(team.client.clone(), &team.namespace);
    let once = json!({"metadata": {"name": "default"}, "spec": {"oneTimeReveal": true}});
    settings.create(&PostParams::default(), &serde_json::from_value(once).unwrap()).await.unwrap();
    team.create("once", team_spec()).await;
    let before = team.ready("once").await;
    let value = made_up();
    team.tamper("once", json!({"data": {"sealed-value": null, "key-value": data(&value)}})).await;
    team.forge("once", |record| {
        record["current"]["sha256"] = json!(sha256(&value));
        record.as_object_mut().unwrap().remove("sealed");
    })
    .await;
    let key = team.until("once", "changed", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!(tokens(&key), tokens(&before));
}

#[tokio::test]
async fn a_secret_with_a_made_up_value_from_before_the_key_is_not_adopted() {
    let team = Team::new().await;
    team.minted("sample", team_spec()).await;
    let value = made_up();
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
    let key = team.until("k", "refused", |key| reason(key) == "SecretNotAuthentic").await;
    assert_stalled(&key, "SecretNotAuthentic");
    assert!(tokens(&key).is_empty());
    // Also with the ApiKey as its owner.
    let owner = json!([{"apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "name": "k", "uid": key.uid(),
        "controller": true}]);
    team.tamper("k", json!({"metadata": {"ownerReferences": owner}})).await;
    tokio::time::sleep(CHECK * 2).await;
    let key = team.keys.get("k").await.unwrap();
    assert_eq!((reason(&key), tokens(&key).len()), ("SecretNotAuthentic", 0));
    assert_eq!(team.secret("k").await.data, secret.data, "nobody wrote to it");
}

#[tokio::test]
async fn a_key_and_its_secret_copied_to_another_namespace_are_not_believed() {
    let (original, copy) = (Team::new().await, Team::new().await);
    let (_, value) = original.minted("k", team_spec()).await;
    let mut secret = backup(&original.secret("k").await);
    secret.metadata.namespace = None;
    secret.metadata.owner_references = None;
    copy.secrets.create(&PostParams::default(), &secret).await.unwrap();
    copy.create("k", team_spec()).await;
    let key = copy.until("k", "refused", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    original.delete("k").await;
    tokio::time::sleep(CHECK * 2).await;
    let key = copy.keys.get("k").await.unwrap();
    assert!(tokens(&key).iter().all(|token| token.sha256 != sha256(&value)), "it outlives the original");
}
