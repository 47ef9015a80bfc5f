//! What comes back from a backup, or under a new ApiKey, with its status, its owner or its place in time lost: a value
//! that is proven to be the key's own is kept, and nothing else is believed.

use keywright::api::KeyState;
use kube::api::PropagationPolicy;

use crate::support::keys::{RECORD, condition, sha256};
use crate::*;

/// A key with a history, so that there is something to lose.
async fn rotated(team: &Team, name: &str) -> (ApiKey, Secret, String) {
    team.minted(name, team_spec()).await;
    team.edit(name, json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let key = team.ready(name).await;
    let secret = team.secret(name).await;
    let value = value_of(&secret).unwrap();
    assert_eq!(tokens(&key).len(), 2);
    (key, secret, value)
}

/// The spec of a key, as Git has it.
fn spec_of(key: &ApiKey) -> Value {
    serde_json::to_value(&key.spec).unwrap()
}

/// Everything of a status but its conditions, which tell when they began.
fn facts(key: &ApiKey) -> ApiKeyStatus {
    ApiKeyStatus { conditions: vec![], observed_generation: None, ..status(key).clone() }
}

#[tokio::test]
async fn a_key_created_anew_over_the_secret_that_another_left_behind_takes_nothing_of_it() {
    let team = Team::new().await;
    let (before, _, value) = rotated(&team, "orphan").await;
    let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
    team.keys.delete("orphan", &orphan).await.unwrap();
    eventually("the ApiKey is gone", PATIENCE, async || {
        ensure!(team.keys.get_opt("orphan").await?.is_none(), "it is there");
        Ok(())
    })
    .await;
    // The owner of the first may be somebody else, who knows the value; and a deleted key is revoked.
    team.create("orphan", spec_of(&before)).await;
    let key = team.until("orphan", "refused", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    // A user with the right to restore ApiKeys can accept it.
    let accepted = json!({"keywright.dev/accept-secret": format!("sha256:{}", sha256(&value))});
    let patch = Patch::Merge(json!({"metadata": {"annotations": accepted}}));
    team.keys.patch("orphan", &PatchParams::default(), &patch).await.unwrap();
    let key = team.ready("orphan").await;
    assert_eq!(facts(&key), facts(&before));
    let secret = team.secret("orphan").await;
    assert_eq!(value_of(&secret).unwrap(), value);
    assert_eq!(secret.owner_references().len(), 1);
    assert_eq!(Some(&secret.owner_references()[0].uid), key.metadata.uid.as_ref());
    assert!(team.event("orphan", "Adopted").await.contains(status(&key).id.as_deref().unwrap()));
    team.delete("orphan").await; // the new owner takes the Secret along
}

#[tokio::test]
async fn a_lost_status_is_rebuilt_from_the_secret() {
    let team = Team::bypassing().await;
    let (before, secret, _) = rotated(&team, "amnesia").await;
    let mut blank = team.keys.get("amnesia").await.unwrap();
    blank.status = None;
    let blank = team.keys.replace_status("amnesia", &PostParams::default(), &blank).await.unwrap();
    assert!(blank.status.is_none());
    let key = team.after(&blank, "ready", |key| support::keys::settled(key).is_ok()).await;
    assert_eq!(facts(&key), facts(&before));
    assert_eq!(team.secret("amnesia").await, secret, "there was nothing to write");
}

/// As Velero restores: Secrets before custom resources, without owners, and no status.
#[tokio::test]
async fn a_secret_that_was_restored_before_its_key_is_adopted() {
    let team = Team::new().await;
    let (before, secret, value) = rotated(&team, "velero").await;
    team.delete("velero").await;
    let mut copy = backup(&secret);
    copy.metadata.owner_references = None;
    team.secrets.create(&PostParams::default(), &copy).await.unwrap();
    team.keys.create(&PostParams::default(), &backup_of(&before)).await.unwrap();
    let key = team.ready("velero").await;
    assert_eq!(facts(&key), facts(&before));
    assert_eq!(team.value("velero").await, value);
    assert_eq!(Some(&team.secret("velero").await.owner_references()[0].uid), key.metadata.uid.as_ref());
    team.event("velero", "Adopted").await;
}

/// As a restore that keeps owners: the uid is of an ApiKey that is no more. The version of the owner is one that the
/// garbage collector does not know, or it would race with this test for the Secret.
#[tokio::test]
async fn a_restored_secret_whose_owner_is_no_more_is_adopted() {
    let team = Team::new().await;
    let (before, secret, value) = rotated(&team, "dangling").await;
    team.delete("dangling").await;
    let mut copy = backup(&secret);
    copy.metadata.owner_references.as_mut().unwrap()[0].api_version = "keywright.dev/v0".to_owned();
    // A restored Secret is younger than the value in it by more than a minute.
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

/// The right to restore ApiKeys holds in one namespace. It makes no value of another one work there.
#[tokio::test]
async fn a_secret_of_another_namespace_is_not_accepted() {
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
    let key = team.until("copied", "refused", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(tokens(&key).is_empty());
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("another name or namespace"), "{message}");
}

/// S4: a Secret is adopted for what it proves, and not for what it looks like.
#[tokio::test]
async fn a_restored_secret_that_proves_nothing_is_left_alone() {
    let team = Team::new().await;
    let (_, other) = team.minted("other", team_spec()).await;
    for (name, why, spoil) in [
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
        ("nonsense", "SecretNotAuthentic", &|copy, _| {
            drop(copy.annotations_mut().insert(RECORD.to_owned(), "{}".to_owned()));
        }),
        ("type", "SecretConflict", &|copy, _| copy.type_ = Some("Opaque".to_owned())),
        ("place", "SecretNotAuthentic", &|copy, _| {
            let value = copy.data.as_mut().unwrap().remove("key-value").unwrap();
            copy.data.as_mut().unwrap().insert("elsewhere".to_owned(), value);
        }),
    ] {
        let (_, value) = team.minted(name, team_spec()).await;
        let secret = team.secret(name).await;
        team.delete(name).await;
        let mut copy = backup(&secret);
        copy.metadata.owner_references = None;
        spoil(&mut copy, record(&secret));
        let copy = team.secrets.create(&PostParams::default(), &copy).await.unwrap();
        team.create(name, team_spec()).await;
        let key = team.until(name, "in conflict", |key| reason(key) == why).await;
        assert_stalled(&key, why);
        assert!(condition(&key, "Ready").unwrap().message.contains("delete"), "{name}: it says what to do");
        assert!(tokens(&key).is_empty(), "{name}");
        assert_eq!(team.secret(name).await, copy, "{name}: it was written");
        team.secrets.delete(&format!("{name}-secret"), &DeleteParams::default()).await.unwrap();
        let key = team.ready(name).await;
        let new = team.value(name).await;
        assert!(new != value && tokens(&key)[0].sha256 == sha256(&new), "{name}");
    }
}

/// A Team key's value under a SendYourData ApiKey would have the wrong prefix, and perhaps rights that it had before.
#[tokio::test]
async fn a_value_of_another_type_is_not_adopted() {
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

/// An ApiKey as a backup has it: with its annotations, without its status.
fn backup_of(key: &ApiKey) -> ApiKey {
    let mut copy = ApiKey::new(&key.name_any(), key.spec.clone());
    copy.metadata.annotations.clone_from(&key.metadata.annotations);
    copy
}

/// A key of carol, its backup and that of its Secret, and neither of them in the cluster any more.
async fn lost_with_its_secret(team: &Team, name: &str) -> (ApiKey, ApiKey, Secret) {
    let mut key = crate::key(name, &team_spec());
    key.annotations_mut().insert(CREATOR.to_owned(), "carol".to_owned());
    team.keys.create(&PostParams::default(), &key).await.unwrap();
    // It is restored itself, so that carol is its creator, and its first value is asked for.
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
async fn a_key_that_was_restored_before_its_secret_waits_for_it_and_keeps_its_creator() {
    let team = Team::new().await;
    let (before, copy, secret) = lost_with_its_secret(&team, "keyfirst").await;
    let created = team.keys.create(&PostParams::default(), &copy).await.unwrap();
    assert!(created.annotations().contains_key("keywright.dev/restored-by"));
    let key = team.until("keyfirst", "waiting", |key| reason(key) == "WaitingForSecret").await;
    assert_stalled(&key, "WaitingForSecret");
    assert!(team.secrets.get_opt("keyfirst-secret").await.unwrap().is_none(), "nothing was minted in its place");
    team.secrets.create(&PostParams::default(), &secret).await.unwrap();
    let key = team.ready("keyfirst").await;
    assert_eq!(facts(&key), facts(&before), "digests, times and the creator are those of the backup");
}

#[tokio::test]
async fn a_restored_key_without_a_secret_gets_a_new_value_on_request() {
    let team = Team::new().await;
    let (before, copy, _) = lost_with_its_secret(&team, "nosecret").await;
    team.keys.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("nosecret", "waiting", |key| reason(key) == "WaitingForSecret").await;
    assert!(condition(&key, "Ready").unwrap().message.contains("spec.rotation.requestedAt"), "it says what to do");
    team.edit("nosecret", json!({"rotation": {"requestedAt": from_now(2)}})).await;
    let key = team.ready("nosecret").await;
    assert_ne!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
}

/// As in a new cluster without the sealing keys of the old one.
#[tokio::test]
async fn a_secret_that_this_operator_did_not_authenticate_is_accepted_by_its_digest_alone() {
    let team = Team::new().await;
    let (before, copy, mut secret) = lost_with_its_secret(&team, "foreign").await;
    secret.annotations_mut().remove(crate::support::keys::RECORD_MAC);
    team.secrets.create(&PostParams::default(), &secret).await.unwrap();
    team.keys.create(&PostParams::default(), &copy).await.unwrap();
    let key = team.until("foreign", "refused", |key| reason(key) == "SecretNotAuthentic").await;
    assert!(condition(&key, "Ready").unwrap().message.contains("kubectl keywright accept"), "it says what to do");
    let accept = async |digest: &str| {
        let annotations = json!({"keywright.dev/accept-secret": format!("sha256:{digest}")});
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        team.keys.patch("foreign", &PatchParams::default(), &patch).await.unwrap();
    };
    accept(&sha256("another value")).await;
    tokio::time::sleep(CHECK * 2).await;
    assert_eq!(reason(&team.keys.get("foreign").await.unwrap()), "SecretNotAuthentic");
    accept(&tokens(&before)[0].sha256).await;
    let key = team.ready("foreign").await;
    assert_eq!(tokens(&key)[0].sha256, tokens(&before)[0].sha256);
    // From now on the record is the operator's own.
    assert!(team.secret("foreign").await.annotations().contains_key(crate::support::keys::RECORD_MAC));
}
