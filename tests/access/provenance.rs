//! What tools that apply know of earlier applies decides what their next apply removes. Whoever may `edit` and holds no
//! permission must not change it; otherwise the unchanged manifest of a pipeline turns a revoked key on again, or drops
//! its policy.

use keywright::api::ApiKey;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::{Person, TEAM, TEAM_POLICY, Team, assert_refused, manifest, refusal, team, under};

const NOTE: &str = "kubectl.kubernetes.io/last-applied-configuration";
const PIPELINE: &str = "argocd-controller";

impl Person {
    /// Applies a manifest on the server's side.
    async fn apply(&self, manager: &str, name: &str, spec: &Value) -> Result<ApiKey, String> {
        let params = PatchParams::apply(manager).force();
        refusal(self.keys.patch(name, &params, &Patch::Apply(manifest("ApiKey", name, spec))).await)
    }

    /// Writes the whole object back after a change of its `managedFields`.
    async fn rewrite(&self, name: &str, change: impl Fn(&mut Vec<Value>)) -> Result<ApiKey, String> {
        loop {
            let mut key = serde_json::to_value(self.keys.get(name).await.unwrap()).unwrap();
            let mut entries = key["metadata"]["managedFields"].as_array().unwrap().clone();
            change(&mut entries);
            key["metadata"]["managedFields"] = json!(entries);
            key.as_object_mut().unwrap().remove("status");
            let params = PostParams { field_manager: Some("mallory".to_owned()), ..PostParams::default() };
            match self.keys.replace(name, &params, &serde_json::from_value(key).unwrap()).await {
                // The operator wrote its status meanwhile.
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                answer => return refusal(answer),
            }
        }
    }
}

/// The entry of the pipeline.
fn of_pipeline(entries: &mut [Value]) -> &mut Value {
    let found = entries.iter_mut().find(|entry| entry["manager"] == PIPELINE && entry["operation"] == "Apply");
    &mut found.unwrap()["fieldsV1"]["f:spec"]
}

/// `edit`, of Kubernetes' own, without any permission of Keywright's.
async fn editor(here: &Team) -> Person {
    here.with_role("mallory", "edit").await
}

#[tokio::test]
async fn edit_can_not_make_the_next_apply_of_a_pipeline_turn_a_revoked_key_on() {
    let here = Team::new().await;
    let (mallory, admin) = (editor(&here).await, here.admin());
    admin.apply(PIPELINE, "key", &team()).await.unwrap();
    admin.edit("key", &json!({"active": false})).await.unwrap();

    // The pipeline alone owns the field.
    let gains = |entries: &mut Vec<Value>| {
        for entry in entries.iter_mut().filter(|entry| entry["manager"] != PIPELINE) {
            if let Some(owned) = entry.pointer_mut("/fieldsV1/f:spec").and_then(Value::as_object_mut) {
                owned.remove("f:active");
            }
        }
        of_pipeline(entries)["f:active"] = json!({});
    };
    assert_refused(mallory.rewrite("key", gains).await, &["mallory", TEAM]);
    let mut off = team();
    off["active"] = json!(false);
    assert_refused(mallory.apply(PIPELINE, "key", &off).await, &["mallory", TEAM]);
    assert_refused(mallory.apply("another", "key", &off).await, &["mallory", TEAM]);
    let versions = |entries: &mut Vec<Value>| {
        for entry in entries.iter_mut() {
            entry["apiVersion"] = json!("keywright.dev/v0");
        }
    };
    if let Ok(key) = mallory.rewrite("key", versions).await {
        let owners = key.managed_fields().iter().filter(|entry| entry.manager.as_deref() == Some(PIPELINE));
        assert_eq!(owners.count(), 1, "the API server takes no entry of a version that does not exist");
    }
    let reset = |entries: &mut Vec<Value>| *entries = vec![json!({})];
    assert_refused(mallory.rewrite("key", reset).await, &[TEAM]);

    // So a pipeline that applies what it applied before changes nothing.
    let key = admin.apply(PIPELINE, "key", &team()).await.unwrap();
    assert_eq!(key.spec.active, Some(false), "it stays revoked");
    // The attack itself works for those who may turn the key on anyway, so this test tries the right thing.
    admin.rewrite("key", gains).await.unwrap();
    let key = admin.apply(PIPELINE, "key", &team()).await.unwrap();
    assert_eq!(key.spec.active, None);
}

/// Who may manage keys and lacks what this one carries could not turn it on; so not by way of the pipeline either.
#[tokio::test]
async fn manage_without_the_contents_can_not_make_the_next_apply_turn_on_or_extend_a_key() {
    let here = Team::new().await;
    let (bob, admin) = (here.person("bob", &[], &[TEAM], &[]).await, here.admin());
    admin.apply(PIPELINE, "key", &team()).await.unwrap();
    admin.edit("key", &json!({"active": false, "expiresAt": "2099-01-01T00:00:00Z"})).await.unwrap();
    for field in ["f:active", "f:expiresAt"] {
        let gains = |entries: &mut Vec<Value>| of_pipeline(entries)[field] = json!({});
        assert_refused(bob.rewrite("key", gains).await, &["bob lacks preset Alerts", "let the next apply"]);
    }
    // Shortened in the pipeline's name, it would come back extended.
    let mut shorter = team();
    shorter["expiresAt"] = json!("2098-01-01T00:00:00Z");
    assert_refused(bob.apply(PIPELINE, "key", &shorter).await, &["bob lacks preset Alerts"]);
    bob.edit("key", &json!({"expiresAt": "2098-01-01T00:00:00Z"})).await.expect("shortened in his own name");
    admin.edit("key", &json!({"active": true})).await.unwrap();
    let mut off = team();
    off["active"] = json!(false);
    bob.apply("bob", "key", &off).await.expect("turning off stays possible, by an apply too");
}

#[tokio::test]
async fn edit_can_not_rewrite_what_kubectl_applied() {
    let here = Team::new().await;
    let (mallory, admin) = (editor(&here).await, here.admin());
    let file = here.plane.folder().join(format!("{}-note.json", here.namespace));
    std::fs::write(&file, manifest("ApiKey", "key", &team()).to_string()).unwrap();
    let apply = || {
        let mut kubectl = here.plane.kubectl();
        crate::support::output(kubectl.args(["-n", &here.namespace, "apply", "-f"]).arg(&file)).unwrap()
    };
    apply();
    admin.write_policy("open", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await.unwrap();
    admin.edit("key", &json!({"active": false, "accessPolicyRef": {"name": "open"}})).await.unwrap();
    let note = admin.keys.get("key").await.unwrap().annotations()[NOTE].clone();
    let noted = |spec: Value| {
        let mut manifest: Value = serde_json::from_str(&note).unwrap();
        manifest["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        json!({"annotations": {NOTE: manifest.to_string()}})
    };
    let (active, policy) = (noted(json!({"active": false})), noted(json!({"accessPolicyRef": {"name": "open"}})));
    for metadata in [&active, &policy, &json!({"annotations": {NOTE: null}}), &json!({"annotations": {NOTE: "{"}})] {
        assert_refused(mallory.mark("key", metadata).await, &["mallory", TEAM]);
    }
    // Each right decides about its own field, and no more.
    let keeper = here.person("keeper", &[], &[TEAM_POLICY], &[]).await;
    let manager = here.person("manager", &[], &[TEAM], &["Alerts"]).await;
    assert_refused(keeper.mark("key", &active).await, &[TEAM]);
    crate::seen("the policy is known", async || {
        manager.mark("key", &json!({"labels": {"a": "b"}})).await.map_err(anyhow::Error::msg)
    })
    .await;
    assert_refused(manager.mark("key", &policy).await, &["UpdateAccessPolicy", "the next apply"]);
    // Nor along with a change of the policy that the keeper may make.
    let both = json!({"metadata": active, "spec": {"accessPolicyRef": null}});
    let answer = refusal(keeper.keys.patch("key", &PatchParams::default(), &Patch::Merge(&both)).await);
    assert_refused(answer, &["keeper", TEAM, "the next apply"]);
    let policy_alone = json!({"metadata": noted(json!({"accessPolicyRef": {"name": "other"}})), "spec": {"accessPolicyRef": {"name": "other"}}});
    let kubectl = PatchParams { field_manager: Some("kubectl-client-side-apply".to_owned()), ..PatchParams::default() };
    let answer = refusal(keeper.keys.patch("key", &kubectl, &Patch::Merge(&policy_alone)).await);
    answer.expect("an apply of another policy, by one who may set it");

    let key = admin.keys.get("key").await.unwrap();
    assert_eq!(key.spec.active, Some(false));
    admin.edit("key", &json!({"accessPolicyRef": null})).await.unwrap();
    admin.mark("key", &json!({"annotations": {NOTE: note}})).await.unwrap();
    // The attack itself works for those who may turn the key on anyway.
    manager.mark("key", &active).await.unwrap();
    apply();
    assert_eq!(admin.keys.get("key").await.unwrap().spec.active, None);
}

#[tokio::test]
async fn edit_can_not_make_the_next_apply_of_a_pipeline_drop_the_policy() {
    let here = Team::new().await;
    let (mallory, admin) = (editor(&here).await, here.admin());
    admin.write_policy("open", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await.unwrap();
    admin.apply(PIPELINE, "key", &team()).await.unwrap();
    let keeper = here.person("keeper", &[], &[TEAM_POLICY], &[]).await;
    keeper.edit("key", &json!({"accessPolicyRef": {"name": "open"}})).await.expect("the policy is theirs to set");
    let manager = here.person("manager", &[], &[TEAM], &["Alerts"]).await;
    let gains = |entries: &mut Vec<Value>| of_pipeline(entries)["f:accessPolicyRef"] = json!({".": {}, "f:name": {}});
    for who in [&mallory, &manager] {
        assert_refused(who.rewrite("key", gains).await, &[&who.name, "UpdateAccessPolicy", "the next apply"]);
        let same = under("open", team());
        assert_refused(who.apply(PIPELINE, "key", &same).await, &[&who.name]);
    }
    let key = admin.apply(PIPELINE, "key", &team()).await.unwrap();
    assert_eq!(key.spec.access_policy_ref.unwrap().name, "open");
    keeper.edit("key", &json!({"accessPolicyRef": null})).await.expect("Reset");
    let alone = json!({"type": "Team", "accessPolicyRef": {"name": "open"}});
    keeper.apply("keeper", "key", &alone).await.expect("by a server-side apply too, of what is theirs");
    keeper.rewrite("key", gains).await.expect("whoever may set the policy may have it dropped");
}

/// What a policy says still counts while a finalizer holds it, and so does what a key and the settings say.
#[tokio::test]
async fn what_is_being_deleted_and_held_by_a_finalizer_can_not_be_rewritten() {
    let here = Team::new().await;
    let admin = here.admin();
    let held = json!({"metadata": {"finalizers": ["test.example.com/hold"]}});
    let merge = PatchParams::default();
    admin.write_policy("kept", &json!({"mode": "Private"})).await.unwrap();
    admin.policies.patch("kept", &merge, &Patch::Merge(&held)).await.unwrap();
    admin.create("key", &team()).await.unwrap();
    admin.keys.patch("key", &merge, &Patch::Merge(&held)).await.unwrap();
    admin.write_settings(&json!({"oneTimeReveal": true})).await.unwrap();
    admin.settings.patch("default", &merge, &Patch::Merge(&held)).await.unwrap();
    let delete = kube::api::DeleteParams::default();
    admin.policies.delete("kept", &delete).await.unwrap();
    admin.keys.delete("key", &delete).await.unwrap();
    admin.settings.delete("default", &delete).await.unwrap();

    let bob =
        here.person("bob", &[], &[TEAM, TEAM_POLICY, "team-api-keys-security-settings:Manage"], &["Alerts"]).await;
    let words = ["is being deleted", "remove metadata.finalizers"];
    for who in [&bob, &admin] {
        let open = json!({"mode": "Advanced", "generalAccess": "Manage"});
        assert_refused(who.edit_policy("kept", &open).await, &words);
        assert_refused(who.edit("key", &json!({"permissions": ["alerts:ReadConfig"]})).await, &words);
        assert_refused(who.edit("key", &json!({"rotation": {"requestedAt": "2026-11-25T10:00:00Z"}})).await, &words);
        assert_refused(who.write_settings(&json!({"oneTimeReveal": false})).await, &words);
    }
    let released = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    bob.policies.patch("kept", &merge, &released).await.expect("nothing hangs");
    bob.keys.patch("key", &merge, &released).await.expect("nothing hangs");
    bob.settings.patch("default", &merge, &released).await.expect("nothing hangs");
}
