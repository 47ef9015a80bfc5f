//! The seed's "Actions": a key appears with its creator's name and type, which nobody can choose or change.

use keywright::api::{ApiKey, CreatorKind};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::{TEAM, Team, creator, manifest, team};

#[tokio::test]
async fn a_key_appears_with_its_creators_name_and_type() {
    let team = Team::new().await;
    let alice = team.person("alice@example.com", &[], &[TEAM], &["Alerts"]).await;
    let key = alice.create("key", &crate::team()).await.unwrap();
    assert_eq!(creator(&key), Some("alice@example.com"));
    assert_eq!(keywright::api::creator(&key).unwrap().kind, CreatorKind::User);
}

#[tokio::test]
async fn a_creator_can_be_neither_chosen_nor_changed() {
    let team = Team::new().await;
    let mallory = team.person("mallory", &[], &[TEAM], &["Alerts"]).await;
    let mut forged = manifest("ApiKey", "forged", &crate::team());
    forged["metadata"]["annotations"] = json!({"keywright.dev/creator": "admin"});
    let params = PostParams::default();
    let key: ApiKey = mallory.keys.create(&params, &serde_json::from_value(forged).unwrap()).await.unwrap();
    assert_eq!(creator(&key), Some("mallory"), "what a manifest says of it is written over");
    for annotation in [json!("admin"), Value::Null] {
        let patch = Patch::Merge(json!({"metadata": {"annotations": {"keywright.dev/creator": annotation}}}));
        for who in [&mallory, &team.admin()] {
            let key = who.keys.patch("forged", &PatchParams::default(), &patch).await.unwrap();
            assert_eq!(creator(&key), Some("mallory"));
        }
    }
    // Replacing the whole object, as a backup tool does, keeps it too.
    let mut replaced = team.admin().keys.get("forged").await.unwrap();
    replaced.metadata.annotations = None;
    let replaced = team.admin().keys.replace("forged", &params, &replaced).await.unwrap();
    assert_eq!(creator(&replaced), Some("mallory"));
}

#[tokio::test]
async fn a_policy_has_a_creator_too() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[crate::TEAM_POLICY], &[]).await;
    let policy = alice.write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    assert_eq!(creator(&policy), Some("alice"));
    let _ = team;
}

#[tokio::test]
async fn what_kubectl_applies_again_is_no_difference() {
    let admin = Team::new().await;
    let file = admin.plane.folder().join(format!("{}.json", admin.namespace));
    std::fs::write(&file, manifest("ApiKey", "key", &team()).to_string()).unwrap();
    let apply = |expected: &str| {
        let mut kubectl = admin.plane.kubectl();
        let done = crate::support::output(kubectl.args(["-n", &admin.namespace, "apply", "-f"]).arg(&file)).unwrap();
        assert!(done.contains(expected), "{done}");
    };
    apply("created");
    apply("unchanged");
}
