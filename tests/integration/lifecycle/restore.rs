//! Secrets and ApiKeys that are restored from a backup or recreated: a value is kept only if its record proves that it
//! belongs to the key.

use keywright::api::KeyState;
use kube::api::PropagationPolicy;

use super::*;
use crate::support::keys::{RECORD, condition, sha256};

/// Creates a key with two tokens; returns the key, its Secret and its current value.
async fn rotated(team: &Team, name: &str) -> (ApiKey, Secret, String) {
    team.minted(name, team_spec()).await;
    team.edit(name, json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.ready(name).await;
    let secret = team.secret(name).await;
    let value = value_of(&secret).unwrap();
    assert_eq!(tokens(&key).len(), 2);
    (key, secret, value)
}

/// The spec of a key as JSON.
fn spec_of(key: &ApiKey) -> Value {
    serde_json::to_value(&key.spec).unwrap()
}

/// A status without its conditions, which contain times, and without its observed generation.
fn without_conditions(key: &ApiKey) -> ApiKeyStatus {
    ApiKeyStatus { conditions: vec![], observed_generation: None, ..status(key).clone() }
}

#[tokio::test]
async fn recreated_key_does_not_adopt_an_orphaned_secret_until_it_is_accepted() {
    let team = Team::new().await;
    let (before, _, value) = rotated(&team, "orphan").await;
    let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
    team.keys.delete("orphan", &orphan).await.unwrap();
    eventually("the ApiKey is gone", TIMEOUT, async || {
        ensure!(team.keys.get_opt("orphan").await?.is_none(), "the ApiKey still exists");
        Ok(())
    })
    .await;
    // The creator of the first key may be another user, who knows the value; and deletion revokes a key.
    team.create("orphan", spec_of(&before)).await;
    let key = team.until("orphan", "SecretNotAuthentic", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    // A user with the right to restore ApiKeys can accept the Secret.
    let accepted = json!({"keywright.dev/accept-secret": format!("sha256:{}", sha256(&value))});
    let patch = Patch::Merge(json!({"metadata": {"annotations": accepted}}));
    team.keys.patch("orphan", &PatchParams::default(), &patch).await.unwrap();
    let key = team.ready("orphan").await;
    assert_eq!(without_conditions(&key), without_conditions(&before));
    let secret = team.secret("orphan").await;
    assert_eq!(value_of(&secret).unwrap(), value);
    assert_eq!(secret.owner_references().len(), 1);
    assert_eq!(Some(&secret.owner_references()[0].uid), key.metadata.uid.as_ref());
    assert!(team.event("orphan", "Adopted").await.contains(status(&key).id.as_deref().unwrap()));
    team.delete("orphan").await; // deletes the Secret with its new owner
}

#[tokio::test]
async fn lost_status_is_rebuilt_from_the_secret() {
    let team = Team::bypassing().await;
    let (before, secret, _) = rotated(&team, "rebuilt").await;
    let mut blank = team.keys.get("rebuilt").await.unwrap();
    blank.status = None;
    let blank = team.keys.replace_status("rebuilt", &PostParams::default(), &blank).await.unwrap();
    assert!(blank.status.is_none());
    let key = team.after(&blank, "ready", |key| crate::support::keys::settled(key).is_ok()).await;
    assert_eq!(without_conditions(&key), without_conditions(&before));
    assert_eq!(team.secret("rebuilt").await, secret, "the Secret was written");
}

/// Velero restores Secrets before custom resources, without owners, and custom resources without status.
#[tokio::test]
async fn secret_restored_before_its_key_is_adopted() {
    let team = Team::new().await;
    let (before, secret, value) = rotated(&team, "velero").await;
    team.delete("velero").await;
    let mut copy = backup(&secret);
    copy.metadata.owner_references = None;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    team.keys.create(&PostParams::default(), &backup_of(&before)).await.unwrap();
    let key = team.ready("velero").await;
    assert_eq!(without_conditions(&key), without_conditions(&before));
    assert_eq!(team.value("velero").await, value);
    assert_eq!(Some(&team.secret("velero").await.owner_references()[0].uid), key.metadata.uid.as_ref());
    team.event("velero", "Adopted").await;
}

/// A restore that keeps owners: the uid is that of a deleted ApiKey. The test uses an API version that the garbage
/// collector does not know; otherwise it could delete the Secret before the operator adopts it.
#[tokio::test]
async fn restored_secret_of_a_deleted_owner_is_adopted() {
    let team = Team::new().await;
    let (before, secret, value) = rotated(&team, "dangling").await;
    team.delete("dangling").await;
    let mut copy = backup(&secret);
    copy.metadata.owner_references.as_mut().unwrap()[0].api_version = "keywright.dev/v0".to_owned();
    // A Secret counts as restored if it is more than a minute younger than its value.
    tokio::time::sleep(Duration::from_secs(62)).await;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    team.keys.create(&PostParams::default(), &backup_of(&before)).await.unwrap();
    let key = team.ready("dangling").await;
    assert_eq!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
    assert_eq!(team.value("dangling").await, value);
    let owners = team.secret("dangling").await.metadata.owner_references.unwrap();
    assert_eq!(owners.len(), 1);
    assert_eq!(Some(&owners[0].uid), key.metadata.uid.as_ref());
}

/// The right to restore ApiKeys is limited to a namespace. It must not make a value of another namespace work.
#[tokio::test]
async fn secret_of_another_namespace_is_not_accepted() {
    let (victim, team) = (Team::new().await, Team::new().await);
    let (before, secret, value) = rotated(&victim, "copied").await;
    victim.delete("copied").await;
    let mut copy = backup(&secret);
    copy.metadata.owner_references = None;
    copy.metadata.namespace = None;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    let mut key = backup_of(&before);
    key.metadata.namespace = None;
    let accept = ("keywright.dev/accept-secret".to_owned(), format!("sha256:{}", sha256(&value)));
    key.metadata.annotations.get_or_insert_default().extend([accept]);
    team.keys.create(&PostParams::default(), &key).await.unwrap();
    let key = team.until("copied", "SecretNotAuthentic", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("another name or namespace"), "{message}");
}

/// S4: a Secret is adopted only if its record proves that it belongs to the key.
#[tokio::test]
async fn restored_secret_without_proof_is_not_adopted() {
    let team = Team::new().await;
    let (_, other) = team.minted("other", team_spec()).await;
    for (name, expected, modify) in [
        (
            "value",
            "SecretNotAuthentic",
            &(|copy: &mut Secret, _| drop(copy.data.as_mut().unwrap().insert("key-value".to_owned(), data(&other))))
                as &dyn Fn(&mut Secret, Value),
        ),
        ("name", "SecretNotAuthentic", &|copy, mut record| {
            record["apiKey"] = json!("someone");
            copy.annotations_mut().insert(RECORD.to_owned(), record.to_string());
        }),
        ("record", "SecretNotAuthentic", &|copy, _| drop(copy.annotations_mut().remove(RECORD))),
        ("empty", "SecretNotAuthentic", &|copy, _| {
            drop(copy.annotations_mut().insert(RECORD.to_owned(), "{}".to_owned()));
        }),
        ("type", "SecretConflict", &|copy, _| copy.type_ = Some("Opaque".to_owned())),
        ("data-key", "SecretNotAuthentic", &|copy, _| {
            let value = copy.data.as_mut().unwrap().remove("key-value").unwrap();
            copy.data.as_mut().unwrap().insert("elsewhere".to_owned(), value);
        }),
    ] {
        let (_, value) = team.minted(name, team_spec()).await;
        let secret = team.secret(name).await;
        team.delete(name).await;
        let mut copy = backup(&secret);
        copy.metadata.owner_references = None;
        modify(&mut copy, record(&secret));
        let copy = team.secrets.create(&PostParams::default(), &copy).await.unwrap();
        team.create(name, team_spec()).await;
        let key = team.until(name, "in conflict", |key| reason(key) == expected).await;
        assert_stalled(&key, expected);
        assert!(
            condition(&key, "Ready").unwrap().message.contains("delete"),
            "{name}: the message does not say how to fix it"
        );
        assert!(tokens(&key).is_empty(), "{name}");
        assert_eq!(team.secret(name).await, copy, "{name}: the Secret was written");
        team.secrets.delete(&format!("{name}-secret"), &DeleteParams::default()).await.unwrap();
        let key = team.ready(name).await;
        let new = team.value(name).await;
        assert!(new != value && tokens(&key)[0].sha256 == sha256(&new), "{name}");
    }
}

/// The value of a Team key would have the wrong prefix in a SendYourData key.
#[tokio::test]
async fn value_of_another_type_is_not_adopted() {
    let team = Team::new().await;
    team.minted("typed", team_spec()).await;
    let mut copy = backup(&team.secret("typed").await);
    copy.metadata.owner_references = None;
    team.delete("typed").await;
    let copy = team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    team.create("typed", json!({"type": "SendYourData", "presets": ["SendData"]})).await;
    let key = team.until("typed", "in conflict", |key| reason(key) == "SecretNotAuthentic").await;
    assert_eq!(state(&key), Some(KeyState::Pending));
    assert_eq!(team.secret("typed").await, copy);
}

/// An ApiKey as a backup contains it: with annotations, without status.
fn backup_of(key: &ApiKey) -> ApiKey {
    let mut copy = ApiKey::new(&key.name_any(), key.spec.clone());
    copy.metadata.annotations.clone_from(&key.metadata.annotations);
    copy
}

/// Creates a key of user carol and deletes it with its Secret; returns the key, its backup and the backup of its
/// Secret.
async fn deleted_with_backup(team: &Team, name: &str) -> (ApiKey, ApiKey, Secret) {
    let mut key = super::key(name, &team_spec());
    key.annotations_mut().insert(CREATOR.to_owned(), "carol".to_owned());
    team.keys.create(&PostParams::default(), &key).await.unwrap();
    // The creator annotation makes it a restored key, whose first value must be requested by a rotation.
    team.edit(name, json!({"rotation": {"requestedAt": from_now(2), "overlap": "1h"}})).await;
    let before = team.ready(name).await;
    assert_eq!(status(&before).creator.as_ref().unwrap().name, "carol");
    let mut secret = backup(&team.secret(name).await);
    secret.metadata.owner_references = None;
    team.delete(name).await;
    let copy = backup_of(&before);
    (before, copy, secret)
}

const CREATOR: &str = "keywright.dev/creator";

#[tokio::test]
async fn key_restored_before_its_secret_waits_for_it_and_keeps_its_creator() {
    let team = Team::new().await;
    let (before, copy, secret) = deleted_with_backup(&team, "keyfirst").await;
    let created = team.keys.create(&PostParams::default(), &copy).await.unwrap();
    assert!(created.annotations().contains_key("keywright.dev/restored-by"));
    let key = team.until("keyfirst", "WaitingForSecret", |key| reason(key) == "WaitingForSecret").await;
    assert_stalled(&key, "WaitingForSecret");
    assert!(team.secrets.get_opt("keyfirst-secret").await.unwrap().is_none(), "a new Secret was minted");
    team.secrets.create(&PostParams::default(), &secret).await.unwrap();
    let key = team.ready("keyfirst").await;
    assert_eq!(without_conditions(&key), without_conditions(&before), "the status differs from the backup");
}

#[tokio::test]
async fn restored_key_without_a_secret_gets_a_new_value_on_request() {
    let team = Team::new().await;
    let (before, copy, _) = deleted_with_backup(&team, "nosecret").await;
    team.keys.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("nosecret", "WaitingForSecret", |key| reason(key) == "WaitingForSecret").await;
    assert!(
        condition(&key, "Ready").unwrap().message.contains("spec.rotation.requestedAt"),
        "the message does not say how to fix it"
    );
    team.edit("nosecret", json!({"rotation": {"requestedAt": from_now(2)}})).await;
    let key = team.ready("nosecret").await;
    assert_ne!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
}

/// The case of a new cluster without the sealing keys of the old one.
#[tokio::test]
async fn unauthenticated_secret_is_accepted_only_by_its_digest() {
    let team = Team::new().await;
    let (before, copy, mut secret) = deleted_with_backup(&team, "foreign").await;
    secret.annotations_mut().remove(crate::support::keys::RECORD_MAC);
    team.secrets.create(&PostParams::default(), &secret).await.unwrap();
    team.keys.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("foreign", "SecretNotAuthentic", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(
        condition(&key, "Ready").unwrap().message.contains("kubectl keywright accept"),
        "the message does not say how to fix it"
    );
    let accept = async |digest: &str| {
        let annotations = json!({"keywright.dev/accept-secret": format!("sha256:{digest}")});
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        team.keys.patch("foreign", &PatchParams::default(), &patch).await.unwrap();
    };
    accept(&sha256("another value")).await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    assert_eq!(reason(&team.keys.get("foreign").await.unwrap()), "SecretNotAuthentic");
    accept(&tokens(&before)[0].sha256).await;
    let key = team.ready("foreign").await;
    assert_eq!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
    // The operator has authenticated the record.
    assert!(team.secret("foreign").await.annotations().contains_key(crate::support::keys::RECORD_MAC));
}
