//! The creator of a key, its name and type (docs/specification.md, "Actions"), can't be chosen or changed by a client.

use keywright::api::{ApiKey, CreatorKind};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::{MANAGE_TEAM_KEYS, Team, creator, manifest, team_key};

#[tokio::test]
async fn a_new_key_has_the_name_and_type_of_its_creator() {
    let team = Team::new().await;
    let alice = team.person("alice@example.com", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let key = alice.create("key", &super::team_key()).await.unwrap();
    assert_eq!(creator(&key), Some("alice@example.com"));
    assert_eq!(keywright::api::creator(&key).unwrap().kind, CreatorKind::User);
}

#[tokio::test]
async fn the_creator_annotation_ignores_values_from_clients() {
    let team = Team::new().await;
    let mallory = team.person("mallory", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let mut forged = manifest("ApiKey", "forged", &super::team_key());
    forged["metadata"]["annotations"] = json!({"keywright.dev/creator": "admin"});
    let params = PostParams::default();
    let key: ApiKey = mallory.keys.create(&params, &serde_json::from_value(forged).unwrap()).await.unwrap();
    assert_eq!(creator(&key), Some("mallory"), "the webhook overwrites the value of the manifest");
    for annotation in [json!("admin"), Value::Null] {
        let patch = Patch::Merge(json!({"metadata": {"annotations": {"keywright.dev/creator": annotation}}}));
        for user in [&mallory, &team.admin()] {
            let key = user.keys.patch("forged", &PatchParams::default(), &patch).await.unwrap();
            assert_eq!(creator(&key), Some("mallory"));
        }
    }
    // Replacing the whole object, as backup tools do, keeps it.
    let mut replaced = team.admin().keys.get("forged").await.unwrap();
    replaced.metadata.annotations = None;
    let replaced = team.admin().keys.replace("forged", &params, &replaced).await.unwrap();
    assert_eq!(creator(&replaced), Some("mallory"));
}

#[tokio::test]
async fn a_new_policy_has_the_name_of_its_creator() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[super::UPDATE_TEAM_POLICY], &[]).await;
    let policy = alice.write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    assert_eq!(creator(&policy), Some("alice"));
}

#[tokio::test]
async fn a_second_kubectl_apply_leaves_a_key_unchanged() {
    let team = Team::new().await;
    let file = team.plane.folder().join(format!("{}.json", team.namespace));
    std::fs::write(&file, manifest("ApiKey", "key", &team_key()).to_string()).unwrap();
    let apply = |expected: &str| {
        let mut kubectl = team.plane.kubectl();
        let output = crate::support::output(kubectl.args(["-n", &team.namespace, "apply", "-f"]).arg(&file)).unwrap();
        assert!(output.contains(expected), "{output}");
    };
    apply("created");
    apply("unchanged");
}
