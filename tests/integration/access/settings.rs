//! The right to change SecuritySettings, and their limits (docs/specification.md, "Security settings").

use serde_json::json;

use super::{MANAGE_TEAM_KEYS, Team, assert_refused};

#[tokio::test]
async fn changing_security_settings_needs_team_api_keys_security_settings_manage() {
    let team = Team::new().await;
    let right = "team-api-keys-security-settings:Manage";
    let without = team.person("without", &[], &[MANAGE_TEAM_KEYS], &[]).await;
    let with = team.person("with", &[], &[right], &[]).await;
    let on = json!({"oneTimeReveal": true});
    assert_refused(without.write_settings(&on).await, &["without lacks permission", right]);
    with.write_settings(&on).await.expect("a holder of the right is allowed");
    assert_refused(without.write_settings(&json!({"oneTimeReveal": false})).await, &[right]);
    let answer = without.settings.delete("default", &kube::api::DeleteParams::default()).await;
    assert!(matches!(answer, Err(kube::Error::Api(status)) if status.message.contains(right)));
    with.settings
        .delete("default", &kube::api::DeleteParams::default())
        .await
        .expect("a holder of the right is allowed");
}

/// These limits go beyond the modeled system.
#[tokio::test]
async fn limits_apply_to_new_and_changed_values_but_not_to_existing_ones() {
    let team = Team::new().await;
    let admin = team.admin();
    admin.create("before", &super::team_key()).await.unwrap();
    let limits = json!({"maxLifetime": "720h", "maxRotationInterval": "240h"});
    admin.write_settings(&json!({ "limits": limits })).await.unwrap();
    let invalid = async |name: &str, more: serde_json::Value| {
        let mut spec = super::team_key();
        let (Some(fields), serde_json::Value::Object(more)) = (spec.as_object_mut(), more) else { unreachable!() };
        fields.extend(more);
        let key = serde_json::from_value(super::manifest("ApiKey", name, &spec)).unwrap();
        match admin.keys.create(&kube::api::PostParams { dry_run: true, ..Default::default() }, &key).await {
            Ok(_) => String::new(),
            Err(kube::Error::Api(status)) => status.message,
            Err(error) => panic!("{error}"),
        }
    };
    super::wait_until("the operator observes the limits", async || {
        let message = invalid("bare", json!({})).await;
        anyhow::ensure!(message.contains("spec.expiresAt") && message.contains("spec.rotation"), "{message}");
        Ok(())
    })
    .await;
    let far = json!({"expiresAt": "2099-01-01T00:00:00Z", "rotation": {"every": "240h"}});
    assert!(invalid("far", far).await.contains("720h"), "an expiry beyond maxLifetime is rejected");
    admin.edit("before", &json!({"displayName": "unchanged"})).await.expect("existing values are kept");
}

#[tokio::test]
async fn max_keys_denies_creation_with_a_message_that_names_the_fix() {
    let team = Team::new().await;
    let admin = team.admin();
    admin.create("first", &super::team_key()).await.unwrap();
    admin.create("second", &super::team_key()).await.unwrap();
    admin.write_settings(&json!({"limits": {"maxKeys": 2}})).await.unwrap();
    let words = ["has 2 ApiKeys", "limits.maxKeys", "is 2", "delete ApiKeys that are not needed", &team.namespace];
    let dry_run = kube::api::PostParams { dry_run: true, ..Default::default() };
    let third = serde_json::from_value(super::manifest("ApiKey", "third", &super::team_key())).unwrap();
    super::wait_until("the operator observes the limit", async || {
        let answer = super::map_forbidden(admin.keys.create(&dry_run, &third).await);
        anyhow::ensure!(answer.is_err(), "the operator has not observed the limit");
        Ok(())
    })
    .await;
    assert_refused(admin.create("third", &super::team_key()).await, &words);
    admin.edit("first", &json!({"displayName": "x"})).await.expect("existing keys can be changed");
    Team::new()
        .await
        .admin()
        .create("elsewhere", &super::team_key())
        .await
        .expect("the limit applies to one namespace");
    admin.delete("first").await.unwrap();
    super::wait_until("the operator observes the deletion", async || {
        admin.create("third", &super::team_key()).await.map_err(anyhow::Error::msg)
    })
    .await;
    assert_refused(admin.create("fourth", &super::team_key()).await, &["has 2 ApiKeys"]);
}

#[tokio::test]
async fn require_rotation_on_raise_rejects_a_raise_without_a_new_rotation_request() {
    let team = Team::new().await;
    let admin = team.admin();
    admin.create("key", &super::team_key()).await.unwrap();
    admin.write_settings(&json!({"limits": {"requireRotationOnRaise": true}})).await.unwrap();
    let patch = async |spec: serde_json::Value| {
        let patch = kube::api::Patch::Merge(json!({ "spec": spec }));
        match admin.keys.patch("key", &kube::api::PatchParams::default(), &patch).await {
            Ok(_) => String::new(),
            Err(kube::Error::Api(status)) => status.message,
            Err(error) => panic!("{error}"),
        }
    };
    let more = json!(["livetail:Read"]);
    super::wait_until("the operator observes the settings", async || {
        let message = patch(json!({"permissions": more, "displayName": null})).await;
        if message.is_empty() {
            patch(json!({"permissions": null})).await;
        }
        anyhow::ensure!(message.contains("spec.rotation.requestedAt: Required value"), "{message}");
        anyhow::ensure!(message.contains("permission livetail:Read") && message.contains("overlap to 0s"), "{message}");
        Ok(())
    })
    .await;
    let now = crate::support::from_now(0);
    assert_eq!(patch(json!({"permissions": more, "rotation": {"requestedAt": now, "overlap": "0s"}})).await, "");
    assert_eq!(patch(json!({"permissions": null})).await, "", "removing permissions needs no rotation");
    assert!(
        patch(json!({"permissions": more})).await.contains("Invalid value"),
        "the request of an earlier change does not count"
    );
    assert_eq!(patch(json!({"rotation": null})).await, "");
    super::wait_until("the operator has rotated the key", async || {
        let status = admin.keys.get("key").await?.status.unwrap_or_default();
        anyhow::ensure!(status.last_handled_requested_at.as_deref() == Some(now.as_str()), "{status:?}");
        Ok(())
    })
    .await;
    let again = patch(json!({"permissions": more, "rotation": {"requestedAt": now, "overlap": "0s"}})).await;
    assert!(again.contains("Invalid value"), "a handled request does not count: {again}");
}
