//! Reconciliation enforces the rules of admission for objects that bypassed admission.

use keywright::api::KeyState;

use super::*;
use crate::support::keys::{condition, sha256};

#[tokio::test]
async fn younger_of_two_keys_with_one_secret_waits_until_the_older_is_deleted() {
    let team = Team::bypassing().await;
    let shared = spec_with(json!({"secret": {"name": "one-secret"}}));
    team.create("b-older", shared.clone()).await;
    tokio::time::sleep(Duration::from_millis(1100)).await; // creation timestamps have whole seconds
    team.create("a-younger", shared).await;
    let older = team.ready("b-older").await;
    let secret = async || team.secrets.get("one-secret").await.unwrap();
    let value = value_of(&secret().await).unwrap();
    let in_conflict = |key: &ApiKey| is_up_to_date(key) && reason(key) == "SecretConflict";
    let younger = team.until("a-younger", "in conflict", in_conflict).await;
    assert_stalled(&younger, "SecretConflict");
    let message = &condition(&younger, "Ready").unwrap().message;
    assert!(message.contains("b-older") && message.contains("spec.secret.name"), "{message}");
    team.event("a-younger", "SecretConflict").await;

    // The younger key stays in conflict after a rotation request, a restart of the operator and another change.
    team.edit("a-younger", json!({"rotation": {"requestedAt": from_now(0)}})).await;
    team.settled("a-younger").await;
    team.cluster.restart().await;
    team.edit("a-younger", json!({"displayName": "x"})).await;
    let younger = team.settled("a-younger").await;
    assert_stalled(&younger, "SecretConflict");
    assert!(tokens(&younger).is_empty());
    let current = secret().await;
    assert_eq!(value_of(&current).unwrap(), value);
    assert_eq!(Some(&current.owner_references()[0].uid), older.metadata.uid.as_ref());

    team.keys.delete("b-older", &DeleteParams::background()).await.unwrap();
    let younger = team.ready("a-younger").await;
    let new = value_of(&secret().await).unwrap();
    assert_ne!(new, value, "the younger key got the value of the older one");
    assert_eq!(tokens(&younger)[0].sha256, sha256(&new));
    assert_eq!(secret().await.owner_references()[0].name, "a-younger");
}

#[tokio::test]
async fn invalid_spec_is_rejected_without_a_secret_until_it_is_fixed() {
    let team = Team::bypassing().await;
    let ingest = |presets: Value| json!({"type": "SendYourData", "presets": presets});
    let cases = [
        ("preset", spec_with(json!({"presets": ["Alertz"]})), "PresetNotFound", "did you mean Alerts"),
        ("permission", spec_with(json!({"permissions": ["alerts:Nope"]})), "PermissionNotFound", "spec.permissions[0]"),
        ("rum", ingest(json!(["RUM", "SendData"])), "StandalonePreset", "is standalone"),
        ("ingest", ingest(json!(["Alerts"])), "NotIngestion", "may only send data"),
        ("day", spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"})), "InvalidTime", "time that exists"),
        (
            "label",
            spec_with(json!({"secret": {"labels": {"a b": "c"}}})),
            "InvalidSecretMetadata",
            "spec.secret.labels",
        ),
    ];
    for (name, spec, expected, text) in &cases {
        let valid = if spec["type"] == "Team" { team_spec() } else { ingest(json!(["SendData"])) };
        team.create(name, spec.clone()).await;
        let key = team.settled(name).await;
        assert_eq!(state(&key), Some(KeyState::Rejected), "{name}");
        assert_stalled(&key, expected);
        let accepted = condition(&key, "Accepted").unwrap();
        assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", *expected));
        assert!(accepted.message.contains(text), "{name}: {}", accepted.message);
        assert!(tokens(&key).is_empty() && status(&key).presets.is_empty() && status(&key).permissions.is_empty());
        assert!(team.secrets.get_opt(&format!("{name}-secret")).await.unwrap().is_none(), "{name} has a Secret");
        assert!(team.event(name, expected).await.contains(text));
        team.keys
            .replace(name, &PostParams::default(), &{
                let mut fixed = super::key(name, &valid);
                fixed.metadata.resource_version = team.keys.get(name).await.unwrap().resource_version();
                fixed
            })
            .await
            .unwrap();
        let key = team.ready(name).await;
        assert_eq!(condition(&key, "Accepted").unwrap().status, "True");
    }
}

#[tokio::test]
async fn invalid_spec_neither_stops_a_working_key_nor_grants_it_permissions() {
    let team = Team::bypassing().await;
    let granted = json!({"permissions": ["logs.alerts:ReadConfig", "metrics.alerts:ReadConfig"]});
    let (before, value) = team.minted("works", spec_with(granted)).await;
    let wider = json!(["logs.alerts:ReadConfig", "spans.alerts:UpdateConfig", "nope:Read"]);
    team.edit("works", json!({"presets": ["Alerts", "APIKeys"], "permissions": wider})).await;
    let key = team.settled("works").await;
    assert_stalled(&key, "PermissionNotFound");
    assert_eq!(state(&key), Some(KeyState::Active), "the key still works");
    assert_eq!(tokens(&key), tokens(&before));
    assert_eq!(status(&key).presets, ["Alerts"], "the key gained a preset");
    assert_eq!(
        status(&key).permissions,
        ["logs.alerts:ReadConfig"],
        "the key kept a permission that its spec no longer lists"
    );

    // CVE-2026-22728 of another operator: a rotation must not bypass validation.
    team.edit("works", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let key = team.settled("works").await;
    assert_ne!(team.value("works").await, value, "a leaked value can still be rotated");
    assert_eq!((status(&key).presets.as_slice(), status(&key).permissions.len()), (&["Alerts".to_owned()][..], 1));

    team.edit("works", json!({"permissions": ["logs.alerts:ReadConfig", "spans.alerts:UpdateConfig"]})).await;
    let key = team.ready("works").await;
    assert_eq!(status(&key).presets, ["Alerts", "APIKeys"]);
    assert_eq!(status(&key).permissions, ["logs.alerts:ReadConfig", "spans.alerts:UpdateConfig"]);
}

/// An invalid `expiresAt` counts as expired, so that it cannot keep a key working.
#[tokio::test]
async fn invalid_expiry_stops_a_working_key() {
    let team = Team::bypassing().await;
    let (_, value) = team.minted("never", team_spec()).await;
    team.edit("never", json!({"expiresAt": "2099-02-30T00:00:00Z"})).await;
    let key = team.settled("never").await;
    assert_eq!((state(&key), reason(&key)), (Some(KeyState::Expired), "InvalidTime"));
    team.edit("never", json!({"expiresAt": null})).await;
    let key = team.ready("never").await;
    assert_eq!((state(&key), team.value("never").await), (Some(KeyState::Active), value));
}
