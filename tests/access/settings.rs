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
