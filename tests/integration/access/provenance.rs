//! `managedFields` and the last-applied annotation decide which fields the next apply removes. A user with ClusterRole
//! `edit` and no permission of Keywright must not change them; otherwise the unchanged manifest of a pipeline
//! reactivates a revoked key or drops its policy.

use keywright::api::ApiKey;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::{
    MANAGE_TEAM_KEYS, Person, Team, UPDATE_TEAM_POLICY, assert_refused, manifest, map_forbidden, team_key, with_policy,
};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const PIPELINE: &str = "argocd-controller";

impl Person {
    /// Applies a manifest with server-side apply.
    async fn apply(&self, manager: &str, name: &str, spec: &Value) -> Result<ApiKey, String> {
        let params = PatchParams::apply(manager).force();
        map_forbidden(self.keys.patch(name, &params, &Patch::Apply(manifest("ApiKey", name, spec))).await)
    }

    /// Changes `managedFields` and replaces the whole object; retries on conflict.
    async fn rewrite(&self, name: &str, change: impl Fn(&mut Vec<Value>)) -> Result<ApiKey, String> {
        loop {
            let mut key = serde_json::to_value(self.keys.get(name).await.unwrap()).unwrap();
            let mut entries = key["metadata"]["managedFields"].as_array().unwrap().clone();
            change(&mut entries);
            key["metadata"]["managedFields"] = json!(entries);
            key.as_object_mut().unwrap().remove("status");
            let params = PostParams { field_manager: Some("mallory".to_owned()), ..PostParams::default() };
            match self.keys.replace(name, &params, &serde_json::from_value(key).unwrap()).await {
                // The operator wrote the status meanwhile.
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                answer => return map_forbidden(answer),
            }
        }
    }
}

/// Returns the pipeline's `f:spec` in `managedFields`.
fn pipeline_fields(entries: &mut [Value]) -> &mut Value {
    let entry = entries.iter_mut().find(|entry| entry["manager"] == PIPELINE && entry["operation"] == "Apply");
    &mut entry.unwrap()["fieldsV1"]["f:spec"]
}

/// Returns a user with ClusterRole `edit` of Kubernetes and no permission of Keywright.
async fn editor(team: &Team) -> Person {
    team.with_role("mallory", "edit").await
}

#[tokio::test]
async fn changing_managed_fields_so_that_an_apply_reactivates_a_key_needs_manage() {
    let team = Team::new().await;
    let (mallory, admin) = (editor(&team).await, team.admin());
    admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    admin.edit("key", &json!({"active": false})).await.unwrap();

    // Makes the pipeline the only owner of spec.active.
    let take_over_active = |entries: &mut Vec<Value>| {
        for entry in entries.iter_mut().filter(|entry| entry["manager"] != PIPELINE) {
            if let Some(owned) = entry.pointer_mut("/fieldsV1/f:spec").and_then(Value::as_object_mut) {
                owned.remove("f:active");
            }
        }
        pipeline_fields(entries)["f:active"] = json!({});
    };
    assert_refused(mallory.rewrite("key", take_over_active).await, &["mallory", MANAGE_TEAM_KEYS]);
    let mut inactive = team_key();
    inactive["active"] = json!(false);
    assert_refused(mallory.apply(PIPELINE, "key", &inactive).await, &["mallory", MANAGE_TEAM_KEYS]);
    assert_refused(mallory.apply("another", "key", &inactive).await, &["mallory", MANAGE_TEAM_KEYS]);
    let change_versions = |entries: &mut Vec<Value>| {
        for entry in entries.iter_mut() {
            entry["apiVersion"] = json!("keywright.dev/v0");
        }
    };
    if let Ok(key) = mallory.rewrite("key", change_versions).await {
        let owners = key.managed_fields().iter().filter(|entry| entry.manager.as_deref() == Some(PIPELINE));
        assert_eq!(owners.count(), 1, "the API server rejects managedFields entries with an unknown version");
    }
    let reset = |entries: &mut Vec<Value>| *entries = vec![json!({})];
    assert_refused(mallory.rewrite("key", reset).await, &[MANAGE_TEAM_KEYS]);

    let key = admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    assert_eq!(key.spec.active, Some(false), "an unchanged manifest of the pipeline leaves the key revoked");
    // With the right to activate the key the same change takes effect: this test's attack is a real one.
    admin.rewrite("key", take_over_active).await.unwrap();
    let key = admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    assert_eq!(key.spec.active, None);
}

#[tokio::test]
async fn changing_managed_fields_so_that_an_apply_activates_or_extends_a_key_needs_its_permissions() {
    let team = Team::new().await;
    let (bob, admin) = (team.person("bob", &[], &[MANAGE_TEAM_KEYS], &[]).await, team.admin());
    admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    admin.edit("key", &json!({"active": false, "expiresAt": "2099-01-01T00:00:00Z"})).await.unwrap();
    for field in ["f:active", "f:expiresAt"] {
        let take_over = |entries: &mut Vec<Value>| pipeline_fields(entries)[field] = json!({});
        assert_refused(bob.rewrite("key", take_over).await, &["bob lacks preset Alerts", "let the next apply"]);
    }
    // If the pipeline owned the shortened expiresAt, its next apply would remove it.
    let mut shorter = team_key();
    shorter["expiresAt"] = json!("2098-01-01T00:00:00Z");
    assert_refused(bob.apply(PIPELINE, "key", &shorter).await, &["bob lacks preset Alerts"]);
    bob.edit("key", &json!({"expiresAt": "2098-01-01T00:00:00Z"}))
        .await
        .expect("bob shortens the lifetime as another field manager");
    admin.edit("key", &json!({"active": true})).await.unwrap();
    let mut inactive = team_key();
    inactive["active"] = json!(false);
    bob.apply("bob", "key", &inactive).await.expect("deactivating by server-side apply needs only Manage");
}

#[tokio::test]
async fn changing_the_last_applied_annotation_needs_the_rights_for_its_fields() {
    let team = Team::new().await;
    let (mallory, admin) = (editor(&team).await, team.admin());
    let file = team.plane.folder().join(format!("{}-last-applied.json", team.namespace));
    std::fs::write(&file, manifest("ApiKey", "key", &team_key()).to_string()).unwrap();
    let apply = || {
        let mut kubectl = team.plane.kubectl();
        crate::support::output(kubectl.args(["-n", &team.namespace, "apply", "-f"]).arg(&file)).unwrap()
    };
    apply();
    admin.write_policy("open", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await.unwrap();
    admin.edit("key", &json!({"active": false, "accessPolicyRef": {"name": "open"}})).await.unwrap();
    let last_applied = admin.keys.get("key").await.unwrap().annotations()[LAST_APPLIED].clone();
    let annotation = |spec: Value| {
        let mut manifest: Value = serde_json::from_str(&last_applied).unwrap();
        manifest["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        json!({"annotations": {LAST_APPLIED: manifest.to_string()}})
    };
    let active = annotation(json!({"active": false}));
    let policy = annotation(json!({"accessPolicyRef": {"name": "open"}}));
    for metadata in
        [&active, &policy, &json!({"annotations": {LAST_APPLIED: null}}), &json!({"annotations": {LAST_APPLIED: "{"}})]
    {
        assert_refused(mallory.patch_metadata("key", metadata).await, &["mallory", MANAGE_TEAM_KEYS]);
    }
    // Each right covers its own fields only.
    let policy_editor = team.person("policy-editor", &[], &[UPDATE_TEAM_POLICY], &[]).await;
    let manager = team.person("manager", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    assert_refused(policy_editor.patch_metadata("key", &active).await, &[MANAGE_TEAM_KEYS]);
    super::wait_until("the operator observes the policy", async || {
        manager.patch_metadata("key", &json!({"labels": {"a": "b"}})).await.map_err(anyhow::Error::msg)
    })
    .await;
    assert_refused(manager.patch_metadata("key", &policy).await, &["UpdateAccessPolicy", "the next apply"]);
    // Also together with a change of the policy reference that policy-editor may make.
    let both = json!({"metadata": active, "spec": {"accessPolicyRef": null}});
    let answer = map_forbidden(policy_editor.keys.patch("key", &PatchParams::default(), &Patch::Merge(&both)).await);
    assert_refused(answer, &["policy-editor", MANAGE_TEAM_KEYS, "the next apply"]);
    let other = json!({"accessPolicyRef": {"name": "other"}});
    let policy_alone = json!({"metadata": annotation(other.clone()), "spec": other});
    let kubectl = PatchParams { field_manager: Some("kubectl-client-side-apply".to_owned()), ..PatchParams::default() };
    let answer = map_forbidden(policy_editor.keys.patch("key", &kubectl, &Patch::Merge(&policy_alone)).await);
    answer.expect("kubectl apply of another policy needs only UpdateAccessPolicy");

    let key = admin.keys.get("key").await.unwrap();
    assert_eq!(key.spec.active, Some(false));
    admin.edit("key", &json!({"accessPolicyRef": null})).await.unwrap();
    admin.patch_metadata("key", &json!({"annotations": {LAST_APPLIED: last_applied}})).await.unwrap();
    // With the right to activate the key the same change takes effect.
    manager.patch_metadata("key", &active).await.unwrap();
    apply();
    assert_eq!(admin.keys.get("key").await.unwrap().spec.active, None);
}

#[tokio::test]
async fn changing_managed_fields_so_that_an_apply_drops_the_policy_needs_update_access_policy() {
    let team = Team::new().await;
    let (mallory, admin) = (editor(&team).await, team.admin());
    admin.write_policy("open", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await.unwrap();
    admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    let policy_editor = team.person("policy-editor", &[], &[UPDATE_TEAM_POLICY], &[]).await;
    policy_editor
        .edit("key", &json!({"accessPolicyRef": {"name": "open"}}))
        .await
        .expect("UpdateAccessPolicy suffices");
    let manager = team.person("manager", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let take_over =
        |entries: &mut Vec<Value>| pipeline_fields(entries)["f:accessPolicyRef"] = json!({".": {}, "f:name": {}});
    for user in [&mallory, &manager] {
        assert_refused(user.rewrite("key", take_over).await, &[&user.name, "UpdateAccessPolicy", "the next apply"]);
        let same = with_policy("open", team_key());
        assert_refused(user.apply(PIPELINE, "key", &same).await, &[&user.name]);
    }
    let key = admin.apply(PIPELINE, "key", &team_key()).await.unwrap();
    assert_eq!(key.spec.access_policy_ref.unwrap().name, "open");
    policy_editor.edit("key", &json!({"accessPolicyRef": null})).await.expect("Reset");
    let alone = json!({"type": "Team", "accessPolicyRef": {"name": "open"}});
    policy_editor.apply("policy-editor", "key", &alone).await.expect("server-side apply needs no more rights");
    policy_editor.rewrite("key", take_over).await.expect("UpdateAccessPolicy suffices");
}

/// Policies, keys and settings stay in force while a finalizer delays their deletion.
#[tokio::test]
async fn objects_whose_deletion_a_finalizer_delays_can_not_be_changed() {
    let team = Team::new().await;
    let admin = team.admin();
    let add_finalizer = json!({"metadata": {"finalizers": ["test.example.com/hold"]}});
    let merge = PatchParams::default();
    admin.write_policy("guarded", &json!({"mode": "Private"})).await.unwrap();
    admin.policies.patch("guarded", &merge, &Patch::Merge(&add_finalizer)).await.unwrap();
    admin.create("key", &team_key()).await.unwrap();
    admin.keys.patch("key", &merge, &Patch::Merge(&add_finalizer)).await.unwrap();
    admin.write_settings(&json!({"oneTimeReveal": true})).await.unwrap();
    admin.settings.patch("default", &merge, &Patch::Merge(&add_finalizer)).await.unwrap();
    let delete = kube::api::DeleteParams::default();
    admin.policies.delete("guarded", &delete).await.unwrap();
    admin.keys.delete("key", &delete).await.unwrap();
    admin.settings.delete("default", &delete).await.unwrap();

    let bob = team
        .person(
            "bob",
            &[],
            &[MANAGE_TEAM_KEYS, UPDATE_TEAM_POLICY, "team-api-keys-security-settings:Manage"],
            &["Alerts"],
        )
        .await;
    let words = ["is being deleted", "remove metadata.finalizers"];
    for user in [&bob, &admin] {
        let open = json!({"mode": "Advanced", "generalAccess": "Manage"});
        assert_refused(user.edit_policy("guarded", &open).await, &words);
        assert_refused(user.edit("key", &json!({"permissions": ["alerts:ReadConfig"]})).await, &words);
        assert_refused(user.edit("key", &json!({"rotation": {"requestedAt": "2026-11-25T10:00:00Z"}})).await, &words);
        assert_refused(user.write_settings(&json!({"oneTimeReveal": false})).await, &words);
    }
    let remove_finalizer = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    bob.policies.patch("guarded", &merge, &remove_finalizer).await.expect("removing a finalizer is allowed");
    bob.keys.patch("key", &merge, &remove_finalizer).await.expect("removing a finalizer is allowed");
    bob.settings.patch("default", &merge, &remove_finalizer).await.expect("removing a finalizer is allowed");
}
