//! Seed, "Migrate legacy keys to custom API keys": where legacy keys are listed, what they show, and that the Secret with
//! their value stays somebody else's.

use keywright::api::{KeyState, KeyType};
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::keys::sha256;
use crate::{Team, assert_stalled, manifest, reason, state, status, tokens};

/// A value that no other team has: a digest belongs to one ApiKey.
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

/// Makes the Secret, of another type than ours.
async fn old_secret(team: &Team, value: &str) {
    let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value, "other": "untouched"}});
    let secret = serde_json::from_value(secret).expect("a Secret");
    team.secrets.create(&PostParams::default(), &secret).await.expect("the Secret is created");
}

async fn change(team: &Team, value: &str) {
    let patch = Patch::Merge(json!({"stringData": {"token": value}}));
    team.secrets.patch("old", &PatchParams::default(), &patch).await.expect("the Secret is changed");
}

/// Imports one key, and sees it in the list under its type and under no other.
async fn is_listed_under(kind: &str, key_type: &str) {
    let team = Team::new().await;
    old_secret(&team, &value(&team)).await;
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
async fn legacy_alerts_rules_tags_logs_query_and_team_keys_are_personal() {
    for kind in ["AlertsRulesTags", "LogsQuery", "Team"] {
        is_listed_under(kind, "Personal").await;
    }
}

#[tokio::test]
async fn legacy_send_your_data_keys_are_send_your_data_keys() {
    is_listed_under("SendYourData", "SendYourData").await;
}

#[tokio::test]
async fn legacy_scim_keys_are_team_keys() {
    is_listed_under("Scim", "Team").await;
}

#[tokio::test]
async fn a_legacy_key_shows_its_permissions() {
    let team = Team::new().await;
    old_secret(&team, &value(&team)).await;
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
async fn a_legacy_secret_is_never_written() {
    let team = Team::new().await;
    team.create("k", legacy("LogsQuery", "Personal")).await;
    let waiting = team.until("k", "waits", |key| reason(key) == "LegacySecretMissing").await;
    assert_eq!(state(&waiting), Some(KeyState::Pending));
    assert!(team.secrets.get_opt("old").await.unwrap().is_none(), "none is made");

    old_secret(&team, "too short").await;
    let refused = team.until("k", "is refused", |key| reason(key) == "LegacyValueTooShort").await;
    assert_eq!(state(&refused), Some(KeyState::Rejected));
    assert_stalled(&refused, "LegacyValueTooShort");
    // As a file has it.
    change(&team, &format!("{}\n", value(&team))).await;
    let version = team.secrets.get("old").await.unwrap().resource_version();
    let imported = team.ready("k").await;
    assert_eq!(tokens(&imported)[0].sha256, sha256(&value(&team)));

    team.edit("k", json!({"active": false, "displayName": "old and resting"})).await;
    let inactive = team.until("k", "inactive", |key| state(key) == Some(KeyState::Inactive)).await;
    assert_eq!(tokens(&inactive), tokens(&imported));
    team.edit("k", json!({"active": true})).await;
    team.ready("k").await;
    let secret = team.secrets.get("old").await.unwrap();
    assert_eq!(secret.resource_version(), version, "nobody wrote to it");

    // Another value is not this key's, and nobody puts the old one back.
    change(&team, "another value that is long enough").await;
    let lost = team.until("k", "changed", |key| reason(key) == "SecretValueChanged").await;
    assert_eq!((state(&lost), tokens(&lost)), (Some(KeyState::Lost), tokens(&imported)));
    let version = team.secrets.get("old").await.unwrap().resource_version();
    change(&team, &value(&team)).await;
    team.until("k", "as before", |key| state(key) == Some(KeyState::Active)).await;
    assert_ne!(team.secrets.get("old").await.unwrap().resource_version(), version, "that was the test");

    // What was there before the key stays when the key goes.
    team.keys.delete("k", &kube::api::DeleteParams::background()).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let secret = team.secrets.get("old").await.expect("the Secret is still there");
    assert!(secret.owner_references().is_empty() && secret.annotations().is_empty() && secret.labels().is_empty());
}

/// A RUM value is public, and a Secret can hold every value that somebody saw.
#[tokio::test]
async fn a_value_that_keywright_minted_is_not_imported() {
    let (victim, thief) = (Team::new().await, Team::new().await);
    let (before, minted) = victim.minted("rum", json!({"type": "SendYourData", "presets": ["RUM"]})).await;
    old_secret(&thief, &minted).await;
    thief.create("k", legacy("SendYourData", "SendYourData")).await;
    let refused = thief.until("k", "is refused", |key| reason(key) == "LegacyValueMinted").await;
    assert_stalled(&refused, "LegacyValueMinted");
    assert!(tokens(&refused).is_empty());
    assert_eq!(victim.keys.get("rum").await.unwrap().status, before.status);
}

/// Also not if the ApiKey that imports is older than the one that has the value.
#[tokio::test]
async fn a_legacy_value_that_another_apikey_has_is_not_imported_and_both_are_told() {
    let (victim, thief) = (Team::new().await, Team::new().await);
    thief.create("older", legacy("SendYourData", "SendYourData")).await;
    thief.until("older", "waits", |key| reason(key) == "LegacySecretMissing").await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await; // ages have whole seconds
    let stolen = value(&victim);
    old_secret(&victim, &stolen).await;
    victim.create("k", legacy("SendYourData", "SendYourData")).await;
    let before = victim.ready("k").await;
    old_secret(&thief, &stolen).await;
    let refused = thief.until("older", "is refused", |key| reason(key) == "DigestInUse").await;
    assert_stalled(&refused, "DigestInUse");
    let message = thief.event("older", "DigestInUse").await;
    assert!(!message.contains(&victim.namespace), "another team is not named: {message}");
    victim.event("k", "DigestInUse").await;
    thief.edit("older", json!({"active": false})).await;
    thief.settled("older").await;
    assert!(tokens(&thief.keys.get("older").await.unwrap()).is_empty());
    assert_eq!(victim.keys.get("k").await.unwrap().status, before.status, "the owner's status does not change");
    // The value is free when its key is gone.
    victim.keys.delete("k", &kube::api::DeleteParams::background()).await.unwrap();
    thief.edit("older", json!({"active": true})).await;
    let imported = thief.ready("older").await;
    assert_eq!(tokens(&imported)[0].sha256, sha256(&stolen));
}
