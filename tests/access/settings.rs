//! The seed's "Security": who controls the security settings.

use serde_json::json;

use crate::{TEAM, Team, assert_refused};

#[tokio::test]
async fn only_users_with_team_api_keys_security_settings_manage_control_them() {
    let here = Team::new().await;
    let right = "team-api-keys-security-settings:Manage";
    let without = here.person("without", &[], &[TEAM], &[]).await;
    let with = here.person("with", &[], &[right], &[]).await;
    let on = json!({"oneTimeReveal": true});
    assert_refused(without.write_settings(&on).await, &["without lacks permission", right]);
    with.write_settings(&on).await.expect("it is allowed");
    assert_refused(without.write_settings(&json!({"oneTimeReveal": false})).await, &[right]);
    let gone = without.settings.delete("default", &kube::api::DeleteParams::default()).await;
    assert!(matches!(gone, Err(kube::Error::Api(status)) if status.message.contains(right)));
    with.settings.delete("default", &kube::api::DeleteParams::default()).await.expect("it is allowed");
}

/// What organisations ask for beyond the seed. A key that is there already keeps what it has; a new one is held to it.
#[tokio::test]
async fn limits_hold_for_what_is_created_or_changed_afterwards() {
    let here = Team::new().await;
    let admin = here.admin();
    admin.create("before", &crate::team()).await.unwrap();
    let limits = json!({"maxLifetime": "720h", "maxRotationInterval": "240h"});
    admin.write_settings(&json!({ "limits": limits })).await.unwrap();
    let invalid = async |name: &str, more: serde_json::Value| {
        let mut spec = crate::team();
        let (Some(fields), serde_json::Value::Object(more)) = (spec.as_object_mut(), more) else { unreachable!() };
        fields.extend(more);
        let key = serde_json::from_value(crate::manifest("ApiKey", name, &spec)).unwrap();
        match admin.keys.create(&kube::api::PostParams { dry_run: true, ..Default::default() }, &key).await {
            Ok(_) => String::new(),
            Err(kube::Error::Api(status)) => status.message,
            Err(error) => panic!("{error}"),
        }
    };
    crate::seen("the limits are known", async || {
        let said = invalid("bare", json!({})).await;
        anyhow::ensure!(said.contains("spec.expiresAt") && said.contains("spec.rotation"), "{said}");
        Ok(())
    })
    .await;
    let far = json!({"expiresAt": "2099-01-01T00:00:00Z", "rotation": {"every": "240h"}});
    assert!(invalid("far", far).await.contains("720h"), "longer than the longest lifetime");
    admin.edit("before", &json!({"displayName": "as it was"})).await.expect("what was so before may stay");
}

#[tokio::test]
async fn a_limit_of_keys_a_namespace_is_told_with_the_way_out() {
    let here = Team::new().await;
    let admin = here.admin();
    admin.create("first", &crate::team()).await.unwrap();
    admin.create("second", &crate::team()).await.unwrap();
    admin.write_settings(&json!({"limits": {"maxKeys": 2}})).await.unwrap();
    let words = ["has 2 ApiKeys", "limits.maxKeys", "is 2", "delete ApiKeys that are not needed", &here.namespace];
    let dry = kube::api::PostParams { dry_run: true, ..Default::default() };
    let third = serde_json::from_value(crate::manifest("ApiKey", "third", &crate::team())).unwrap();
    crate::seen("the limit is known", async || {
        let answer = crate::refusal(admin.keys.create(&dry, &third).await);
        anyhow::ensure!(answer.is_err(), "not yet");
        Ok(())
    })
    .await;
    assert_refused(admin.create("third", &crate::team()).await, &words);
    admin.edit("first", &json!({"displayName": "x"})).await.expect("keys that are there can be changed");
    Team::new().await.admin().create("elsewhere", &crate::team()).await.expect("another namespace has its own");
    admin.delete("first").await.unwrap();
    crate::seen("one is gone", async || admin.create("third", &crate::team()).await.map_err(anyhow::Error::msg)).await;
    assert_refused(admin.create("fourth", &crate::team()).await, &["has 2 ApiKeys"]);
}

#[tokio::test]
async fn a_rotation_can_be_demanded_with_what_raises_a_key() {
    let here = Team::new().await;
    let admin = here.admin();
    admin.create("key", &crate::team()).await.unwrap();
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
    crate::seen("the settings are known", async || {
        let said = patch(json!({"permissions": more, "displayName": null})).await;
        if said.is_empty() {
            patch(json!({"permissions": null})).await;
        }
        anyhow::ensure!(said.contains("spec.rotation.requestedAt: Required value"), "{said}");
        anyhow::ensure!(said.contains("permission livetail:Read") && said.contains("overlap to 0s"), "{said}");
        Ok(())
    })
    .await;
    let now = crate::support::from_now(0);
    assert_eq!(patch(json!({"permissions": more, "rotation": {"requestedAt": now, "overlap": "0s"}})).await, "");
    assert_eq!(patch(json!({"permissions": null})).await, "", "lowering needs none");
    assert!(patch(json!({"permissions": more})).await.contains("Invalid value"), "one that was asked for before");
    assert_eq!(patch(json!({"rotation": null})).await, "");
    crate::seen("the rotation was carried out", async || {
        let status = admin.keys.get("key").await?.status.unwrap_or_default();
        anyhow::ensure!(status.last_handled_requested_at.as_deref() == Some(now.as_str()), "{status:?}");
        Ok(())
    })
    .await;
    let again = patch(json!({"permissions": more, "rotation": {"requestedAt": now, "overlap": "0s"}})).await;
    assert!(again.contains("Invalid value"), "one that was carried out rotates nothing: {again}");
}
