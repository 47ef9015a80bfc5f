//! Legacy keys (docs/specification.md, "Legacy keys"): their types, their permissions, and that the operator does not
//! write the Secret with their value.

use keywright::api::{KeyState, KeyType};
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::{Team, assert_stalled, manifest, reason, state, status, tokens};
use crate::support::keys::sha256;

/// A value that is unique to the team, because a digest belongs to one ApiKey.
fn value(team: &Team) -> String {
    format!("3c9d2b8e-7a41-4f0e-{}", team.namespace)
}

/// The spec of a legacy key whose value is in Secret `old`, key `token`.
fn legacy(kind: &str, key_type: &str) -> Value {
    let mut spec = json!({"type": key_type, "legacy": kind, "secret": {"name": "old", "key": "token"}});
    if key_type == "Personal" {
        spec["user"] = json!("alice@example.com");
    }
    spec
}

/// Creates the Secret `old`, of type Opaque.
async fn create_old_secret(team: &Team, value: &str) {
    let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value, "other": "untouched"}});
    let secret = serde_json::from_value(secret).expect("a Secret");
    team.secrets.create(&PostParams::default(), &secret).await.expect("the Secret is created");
}

async fn change(team: &Team, value: &str) {
    let patch = Patch::Merge(json!({"stringData": {"token": value}}));
    team.secrets.patch("old", &PatchParams::default(), &patch).await.expect("the Secret is changed");
}

/// Imports a legacy key and asserts that it is listed under `key_type` only, and rejected with another type.
async fn assert_listed_under(kind: &str, key_type: &str) {
    let team = Team::new().await;
    create_old_secret(&team, &value(&team)).await;
    let file = team.file(&manifest("k", &legacy(kind, key_type)));
    team.kubectl(&["apply", "-f", &file]).unwrap();
    let key = team.ready("k").await;
    assert_eq!(state(&key), Some(KeyState::Active));
    assert_eq!(tokens(&key)[0].sha256, sha256(&value(&team)));
    for listed in ["Personal", "SendYourData", "Team"] {
        let query = format!("jsonpath={{.items[?(@.spec.type==\"{listed}\")].metadata.name}}");
        let found = team.kubectl(&["get", "apikeys", "-o", &query]).unwrap();
        assert_eq!(found.trim(), if listed == key_type { "k" } else { "" }, "{kind} under {listed}");
    }
    for other in ["Personal", "SendYourData", "Team"].into_iter().filter(|other| *other != key_type) {
        let file = team.file(&manifest("wrong", &legacy(kind, other)));
        let error = team.kubectl(&["apply", "-f", &file]).unwrap_err().to_string();
        assert!(error.contains("legacy AlertsRulesTags, LogsQuery and Team keys are of type Personal"), "{error}");
    }
}

#[tokio::test]
async fn legacy_alerts_rules_tags_logs_query_and_team_keys_are_personal_keys() {
    for kind in ["AlertsRulesTags", "LogsQuery", "Team"] {
        assert_listed_under(kind, "Personal").await;
    }
}

#[tokio::test]
async fn legacy_send_your_data_keys_are_send_your_data_keys() {
    assert_listed_under("SendYourData", "SendYourData").await;
}

#[tokio::test]
async fn legacy_scim_keys_are_team_keys() {
    assert_listed_under("Scim", "Team").await;
}

#[tokio::test]
async fn legacy_key_has_the_permissions_of_its_kind_in_its_status() {
    let team = Team::new().await;
    create_old_secret(&team, &value(&team)).await;
    let key = team.create("scim", legacy("Scim", "Team")).await;
    assert_eq!(key.spec.key_type, KeyType::Team);
    let key = team.ready("scim").await;
    assert_eq!(
        status(&key).permissions,
        [
            "team-groups:Manage",
            "team-groups:ReadConfig",
            "team-members:Manage",
            "team-members:ReadConfig",
            "team-roles:ReadConfig"
        ]
    );
    let shown = team.kubectl(&["describe", "apikey", "scim"]).unwrap();
    assert!(shown.contains("team-groups:ReadConfig") && !shown.contains(&value(&team)), "{shown}");
}

#[tokio::test]
async fn legacy_secret_is_never_written() {
    let team = Team::new().await;
    team.create("k", legacy("LogsQuery", "Personal")).await;
    let waiting = team.until("k", "waiting", |key| reason(key) == "LegacySecretMissing").await;
    assert_eq!(state(&waiting), Some(KeyState::Pending));
    assert!(team.secrets.get_opt("old").await.unwrap().is_none(), "the operator created the Secret");

    create_old_secret(&team, "too short").await;
    let rejected = team.until("k", "rejected", |key| reason(key) == "LegacyValueTooShort").await;
    assert_eq!(state(&rejected), Some(KeyState::Rejected));
    assert_stalled(&rejected, "LegacyValueTooShort");
    // With a newline at the end, as in a file.
    change(&team, &format!("{}\n", value(&team))).await;
    let version = team.secrets.get("old").await.unwrap().resource_version();
    let imported = team.ready("k").await;
    assert_eq!(tokens(&imported)[0].sha256, sha256(&value(&team)));

    team.edit("k", json!({"active": false, "displayName": "inactive legacy key"})).await;
    let inactive = team.until("k", "inactive", |key| state(key) == Some(KeyState::Inactive)).await;
    assert_eq!(tokens(&inactive), tokens(&imported));
    team.edit("k", json!({"active": true})).await;
    team.ready("k").await;
    let secret = team.secrets.get("old").await.unwrap();
    assert_eq!(secret.resource_version(), version, "the operator wrote to the Secret");

    // Another value makes the key Lost, and the operator does not restore the imported value.
    change(&team, "another value that is long enough").await;
    let lost = team.until("k", "changed", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!((state(&lost), tokens(&lost)), (Some(KeyState::Lost), tokens(&imported)));
    let version = team.secrets.get("old").await.unwrap().resource_version();
    change(&team, &value(&team)).await;
    team.until("k", "active", |key| state(key) == Some(KeyState::Active)).await;
    assert_ne!(team.secrets.get("old").await.unwrap().resource_version(), version, "the user's change is a write");

    // The Secret is kept when the key is deleted.
    team.keys.delete("k", &kube::api::DeleteParams::background()).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let secret = team.secrets.get("old").await.expect("the Secret is kept");
    assert!(secret.owner_references().is_empty() && secret.annotations().is_empty() && secret.labels().is_empty());
}

/// A user who knows a minted value, such as a public RUM value, can write it to a Secret.
#[tokio::test]
async fn minted_value_is_not_imported_as_a_legacy_value() {
    let (victim, attacker) = (Team::new().await, Team::new().await);
    let (before, minted) = victim.minted("rum", json!({"type": "SendYourData", "presets": ["RUM"]})).await;
    create_old_secret(&attacker, &minted).await;
    attacker.create("k", legacy("SendYourData", "SendYourData")).await;
    let rejected = attacker.until("k", "rejected", |key| reason(key) == "LegacyValueMinted").await;
    assert_stalled(&rejected, "LegacyValueMinted");
    assert!(tokens(&rejected).is_empty());
    assert_eq!(victim.keys.get("rum").await.unwrap().status, before.status);
}

/// This holds also if the importing ApiKey is older than the one that has the value.
#[tokio::test]
async fn legacy_value_of_another_apikey_is_not_imported_and_both_keys_get_an_event() {
    let (victim, attacker) = (Team::new().await, Team::new().await);
    attacker.create("older", legacy("SendYourData", "SendYourData")).await;
    attacker.until("older", "waiting", |key| reason(key) == "LegacySecretMissing").await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await; // creation timestamps have whole seconds
    let stolen = value(&victim);
    create_old_secret(&victim, &stolen).await;
    victim.create("k", legacy("SendYourData", "SendYourData")).await;
    let before = victim.ready("k").await;
    create_old_secret(&attacker, &stolen).await;
    let rejected = attacker.until("older", "rejected", |key| reason(key) == "DigestInUse").await;
    assert_stalled(&rejected, "DigestInUse");
    let message = attacker.event("older", "DigestInUse").await;
    assert!(!message.contains(&victim.namespace), "the message names another team: {message}");
    victim.event("k", "DigestInUse").await;
    attacker.edit("older", json!({"active": false})).await;
    attacker.settled("older").await;
    assert!(tokens(&attacker.keys.get("older").await.unwrap()).is_empty());
    assert_eq!(
        victim.keys.get("k").await.unwrap().status,
        before.status,
        "the status of the owner of the value changed"
    );
    // The value can be imported after its key was deleted.
    victim.keys.delete("k", &kube::api::DeleteParams::background()).await.unwrap();
    attacker.edit("older", json!({"active": true})).await;
    let imported = attacker.ready("older").await;
    assert_eq!(tokens(&imported)[0].sha256, sha256(&stolen));
}
