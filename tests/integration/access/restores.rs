//! Restores: requests of users with the right to restore keep the creator of each object; all other requests set it.

use keywright::api::ApiKey;
use kube::ResourceExt;
use kube::api::PostParams;
use serde_json::{Value, json};

use super::{MANAGE_TEAM_KEYS, Person, Team, assert_refused, creator, manifest, map_forbidden, team_key, wait_until};

const RESTORED_BY: &str = "keywright.dev/restored-by";
const ACCEPTS: &str = "keywright.dev/accept-secret";

fn digest(letter: &str) -> String {
    format!("sha256:{}", letter.repeat(64))
}

impl Person {
    /// Creates a key with annotations, as backup tools do.
    async fn create_with(&self, name: &str, annotations: &Value) -> Result<ApiKey, String> {
        let mut key = manifest("ApiKey", name, &team_key());
        key["metadata"]["annotations"] = annotations.clone();
        map_forbidden(self.keys.create(&PostParams::default(), &serde_json::from_value(key).unwrap()).await)
    }
}

fn restored_by(key: &ApiKey) -> Option<&str> {
    key.annotations().get(RESTORED_BY).map(String::as_str)
}

/// Returns a user with ClusterRole keywright-restore and the rights to create keys and policies.
async fn restorer(team: &Team, name: &str) -> Person {
    team.with_role(name, "keywright-restore").await;
    let person = team.person(name, &[], &[MANAGE_TEAM_KEYS, super::UPDATE_TEAM_POLICY], &["Alerts"]).await;
    team.wait_until_allowed(name, "restore", ("keywright.dev", "apikeys"), None).await;
    person
}

#[tokio::test]
async fn a_restore_keeps_the_creator_and_records_the_restoring_user() {
    let team = Team::new().await;
    let backup = restorer(&team, "velero").await;
    let key =
        backup.create_with("key", &json!({"keywright.dev/creator": "alice", RESTORED_BY: "another"})).await.unwrap();
    assert_eq!((creator(&key), restored_by(&key)), (Some("alice"), Some("velero")));
    // Keys created by the backup tool itself get the annotation too: it makes a key wait for its Secret.
    let own =
        backup.create_with("own", &json!({"keywright.dev/creator": "velero", RESTORED_BY: "root"})).await.unwrap();
    assert_eq!((creator(&own), restored_by(&own)), (Some("velero"), Some("velero")));
    // Later changes of the annotations have no effect.
    for annotation in [json!("mallory"), Value::Null] {
        for user in [&backup, &team.admin()] {
            let metadata = json!({"annotations": {RESTORED_BY: annotation, "keywright.dev/creator": annotation}});
            let key = user.patch_metadata("key", &metadata).await.unwrap();
            assert_eq!((creator(&key), restored_by(&key)), (Some("alice"), Some("velero")));
        }
    }
    // A Private policy keeps its creator, the only user who may change it.
    let mut policy = manifest("AccessPolicy", "private", &json!({"mode": "Private"}));
    policy["metadata"]["annotations"] = json!({"keywright.dev/creator": "alice"});
    let policy =
        backup.policies.create(&PostParams::default(), &serde_json::from_value(policy).unwrap()).await.unwrap();
    assert_eq!(creator(&policy), Some("alice"));
    assert!(!policy.annotations().contains_key(RESTORED_BY));
    wait_until("the status has the creator of the annotation", async || {
        let status = backup.keys.get("key").await?.status;
        let name = status.and_then(|status| status.creator).map(|creator| creator.name);
        anyhow::ensure!(name.as_deref() == Some("alice"), "{name:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn cluster_roles_edit_and_admin_do_not_allow_choosing_a_creator() {
    let team = Team::new().await;
    for role in ["edit", "admin"] {
        team.with_role(role, role).await;
        let person = team.person(role, &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
        let annotations = json!({"keywright.dev/creator": "alice", RESTORED_BY: role});
        let key =
            person.create_with(role, &annotations).await.expect("the key is created with the requester as creator");
        assert_eq!((creator(&key), restored_by(&key)), (Some(role), None));
        let key = person.patch_metadata(role, &json!({"annotations": annotations})).await.unwrap();
        assert_eq!((creator(&key), restored_by(&key)), (Some(role), None));
    }
}

#[tokio::test]
async fn accepting_the_value_of_a_secret_needs_the_right_to_restore() {
    let team = Team::new().await;
    let backup = restorer(&team, "velero").await;
    team.with_role("edit", "edit").await;
    team.with_role("admin", "admin").await;
    for name in ["edit", "admin"] {
        let person = team.person(name, &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
        let words = ["accept-secret", "lacks the right to restore apikeys.keywright.dev", "keywright-restore"];
        assert_refused(person.create_with(name, &json!({ACCEPTS: digest("a")})).await, &words);
        person.create_with(name, &json!({})).await.unwrap();
        assert_refused(person.patch_metadata(name, &json!({"annotations": {ACCEPTS: digest("a")}})).await, &words);
        backup
            .patch_metadata(name, &json!({"annotations": {ACCEPTS: digest("a")}}))
            .await
            .expect("velero holds the right to restore");
        assert_refused(person.patch_metadata(name, &json!({"annotations": {ACCEPTS: digest("b")}})).await, &words);
        person
            .patch_metadata(name, &json!({"labels": {"a": "b"}}))
            .await
            .expect("other metadata needs no right to restore");
        person
            .patch_metadata(name, &json!({"annotations": {ACCEPTS: null}}))
            .await
            .expect("removing the annotation needs no right to restore");
        assert_refused(person.patch_metadata(name, &json!({"annotations": {ACCEPTS: digest("a")}})).await, &words);
    }
    backup.create_with("restored", &json!({ACCEPTS: digest("c")})).await.expect("velero holds the right to restore");
}

/// A user may paste the value instead of its digest.
#[tokio::test]
async fn an_invalid_digest_is_rejected_without_repeating_it() {
    let team = Team::new().await;
    let value = "kwt_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi012345";
    let mut key = manifest("ApiKey", "key", &team_key());
    for text in [value.to_owned(), digest("A"), format!("sha256:{value}"), String::new()] {
        key["metadata"]["annotations"] = json!({ACCEPTS: text});
        let answer =
            team.admin().keys.create(&PostParams::default(), &serde_json::from_value(key.clone()).unwrap()).await;
        let Err(kube::Error::Api(status)) = answer else { panic!("accepted: {text}") };
        assert!(status.message.contains("must be sha256:") && !status.message.contains("0123456789"), "{status:?}");
    }
}

/// A ValidatingAdmissionPolicy runs after all mutating webhooks, so another one can't forge the annotations. The test
/// excludes a namespace from Keywright's mutating webhook so that the client's annotations arrive unchanged.
#[tokio::test]
async fn without_the_mutating_webhook_a_forged_creator_is_denied() {
    use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
    use kube::api::{Api, Patch, PatchParams};
    let plane: &'static _ = Box::leak(Box::new(
        crate::support::ControlPlane::start(&crate::support::kubernetes_version()).await.expect("a control plane"),
    ));
    let (_release, _operator) = crate::support::install(plane).await.expect("the chart");
    let admin = plane.client().await.unwrap();
    let team = Team { plane, namespace: crate::support::namespace(&admin).await, admin };
    team.allow_all_verbs().await;
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(team.admin.clone());
    let elsewhere = json!({"matchExpressions": [
        {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": [team.namespace]}]});
    let patch = json!({"webhooks": [{"name": "creators.keywright.dev", "namespaceSelector": elsewhere}]});
    webhooks.patch("keywright", &PatchParams::default(), &Patch::Strategic(patch)).await.unwrap();
    let mallory = team.person("mallory", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let words = ["keywright.dev/creator", "can't be chosen or changed"];
    let mut tries = 0;
    wait_until("the mutating webhook is not called", async || {
        tries += 1;
        let answer = mallory.create_with(&format!("probe-{tries}"), &json!({})).await;
        anyhow::ensure!(answer.is_err(), "the webhook set the creator");
        Ok(())
    })
    .await;
    for forged in [
        json!({"keywright.dev/creator": "alice"}),
        json!({"keywright.dev/creator": "alice", RESTORED_BY: "mallory"}),
        json!({"keywright.dev/creator": "mallory", RESTORED_BY: "mallory"}),
        json!({RESTORED_BY: "mallory"}),
    ] {
        assert_refused(mallory.create_with("forged", &forged).await, &words);
    }
    mallory
        .create_with("own", &json!({"keywright.dev/creator": "mallory"}))
        .await
        .expect("the annotation names the requester");
    assert_refused(
        mallory.patch_metadata("own", &json!({"annotations": {"keywright.dev/creator": "alice"}})).await,
        &words,
    );
    assert_refused(mallory.patch_metadata("own", &json!({"annotations": {RESTORED_BY: "alice"}})).await, &words);
    // A restore must name the restoring user in restored-by.
    let backup = restorer(&team, "velero").await;
    assert_refused(backup.create_with("without-restored-by", &json!({"keywright.dev/creator": "alice"})).await, &words);
    assert_refused(
        backup.create_with("wrong-restored-by", &json!({"keywright.dev/creator": "alice", RESTORED_BY: "root"})).await,
        &words,
    );
    let annotations = json!({"keywright.dev/creator": "alice", RESTORED_BY: "velero"});
    backup.create_with("restored", &annotations).await.expect("velero holds the right to restore");
}
