//! Restores: whoever holds the right to restore keeps the creators of what a backup holds; nobody else chooses one.

use keywright::api::ApiKey;
use kube::ResourceExt;
use kube::api::PostParams;
use serde_json::{Value, json};

use crate::{Person, TEAM, Team, assert_refused, creator, manifest, refusal, seen, team};

const RESTORED_BY: &str = "keywright.dev/restored-by";
const ACCEPTS: &str = "keywright.dev/accept-secret";

fn digest(letter: &str) -> String {
    format!("sha256:{}", letter.repeat(64))
}

impl Person {
    /// Creates a key as a backup tool does, with annotations.
    async fn create_with(&self, name: &str, annotations: &Value) -> Result<ApiKey, String> {
        let mut key = manifest("ApiKey", name, &team());
        key["metadata"]["annotations"] = annotations.clone();
        refusal(self.keys.create(&PostParams::default(), &serde_json::from_value(key).unwrap()).await)
    }
}

fn restored_by(key: &ApiKey) -> Option<&str> {
    key.annotations().get(RESTORED_BY).map(String::as_str)
}

/// Somebody with the right of ClusterRole keywright-restore, and with what creating the keys takes.
async fn restorer(here: &Team, name: &str) -> Person {
    here.with_role(name, "keywright-restore").await;
    let person = here.person(name, &[], &[TEAM, crate::TEAM_POLICY], &["Alerts"]).await;
    here.until_allowed(name, "restore", ("keywright.dev", "apikeys"), None).await;
    person
}

#[tokio::test]
async fn a_restore_keeps_the_creator_and_says_who_restored() {
    let here = Team::new().await;
    let backup = restorer(&here, "velero").await;
    let key =
        backup.create_with("key", &json!({"keywright.dev/creator": "alice", RESTORED_BY: "somebody"})).await.unwrap();
    assert_eq!((creator(&key), restored_by(&key)), (Some("alice"), Some("velero")));
    // What the backup tool made is restored too: the mark makes a key wait for its Secret.
    let own =
        backup.create_with("own", &json!({"keywright.dev/creator": "velero", RESTORED_BY: "root"})).await.unwrap();
    assert_eq!((creator(&own), restored_by(&own)), (Some("velero"), Some("velero")));
    // Nobody changes it afterwards, and the next user of the key sees no difference.
    for annotation in [json!("mallory"), Value::Null] {
        for who in [&backup, &here.admin()] {
            let marks = json!({"annotations": {RESTORED_BY: annotation, "keywright.dev/creator": annotation}});
            let key = who.mark("key", &marks).await.unwrap();
            assert_eq!((creator(&key), restored_by(&key)), (Some("alice"), Some("velero")));
        }
    }
    // A policy keeps its creator too, who is the one that may change it.
    let mut policy = manifest("AccessPolicy", "private", &json!({"mode": "Private"}));
    policy["metadata"]["annotations"] = json!({"keywright.dev/creator": "alice"});
    let policy =
        backup.policies.create(&PostParams::default(), &serde_json::from_value(policy).unwrap()).await.unwrap();
    assert_eq!(creator(&policy), Some("alice"));
    assert!(!policy.annotations().contains_key(RESTORED_BY));
    // The status says the same as the stamp.
    seen("the creator is in the status", async || {
        let status = backup.keys.get("key").await?.status;
        let name = status.and_then(|status| status.creator).map(|creator| creator.name);
        anyhow::ensure!(name.as_deref() == Some("alice"), "{name:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn edit_and_admin_can_not_choose_a_creator() {
    let here = Team::new().await;
    for role in ["edit", "admin"] {
        here.with_role(role, role).await;
        let person = here.person(role, &[], &[TEAM], &["Alerts"]).await;
        let annotations = json!({"keywright.dev/creator": "alice", RESTORED_BY: role});
        let key = person.create_with(role, &annotations).await.expect("it is created, as their own");
        assert_eq!((creator(&key), restored_by(&key)), (Some(role), None));
        let key = person.mark(role, &json!({"annotations": annotations})).await.unwrap();
        assert_eq!((creator(&key), restored_by(&key)), (Some(role), None));
    }
}

#[tokio::test]
async fn only_the_right_to_restore_has_the_value_of_a_secret_accepted() {
    let here = Team::new().await;
    let backup = restorer(&here, "velero").await;
    here.with_role("edit", "edit").await;
    here.with_role("admin", "admin").await;
    for name in ["edit", "admin"] {
        let person = here.person(name, &[], &[TEAM], &["Alerts"]).await;
        let words = ["accept-secret", "lacks the right to restore apikeys.keywright.dev", "keywright-restore"];
        assert_refused(person.create_with(name, &json!({ACCEPTS: digest("a")})).await, &words);
        person.create_with(name, &json!({})).await.unwrap();
        assert_refused(person.mark(name, &json!({"annotations": {ACCEPTS: digest("a")}})).await, &words);
        backup.mark(name, &json!({"annotations": {ACCEPTS: digest("a")}})).await.expect("the right to restore");
        assert_refused(person.mark(name, &json!({"annotations": {ACCEPTS: digest("b")}})).await, &words);
        person.mark(name, &json!({"labels": {"a": "b"}})).await.expect("what is as it was needs no right");
        person.mark(name, &json!({"annotations": {ACCEPTS: null}})).await.expect("taking it out is free");
        assert_refused(person.mark(name, &json!({"annotations": {ACCEPTS: digest("a")}})).await, &words);
    }
    backup.create_with("restored", &json!({ACCEPTS: digest("c")})).await.expect("the right to restore");
}

/// Somebody may paste the value where its digest belongs.
#[tokio::test]
async fn what_is_no_digest_is_refused_and_not_repeated() {
    let here = Team::new().await;
    let value = "kwt_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi012345";
    let mut key = manifest("ApiKey", "key", &team());
    for text in [value.to_owned(), digest("A"), format!("sha256:{value}"), String::new()] {
        key["metadata"]["annotations"] = json!({ACCEPTS: text});
        let answer =
            here.admin().keys.create(&PostParams::default(), &serde_json::from_value(key.clone()).unwrap()).await;
        let Err(kube::Error::Api(status)) = answer else { panic!("accepted: {text}") };
        assert!(status.message.contains("must be sha256:") && !status.message.contains("0123456789"), "{status:?}");
    }
}

/// Another mutating webhook, or whoever controls one, forges no stamp: the API server's own policy looks last. Here the
/// one that stamps is switched off for a namespace, so that what the client says arrives as it is.
#[tokio::test]
async fn where_no_webhook_stamps_a_forged_creator_is_refused() {
    use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
    use kube::api::{Api, Patch, PatchParams};
    let plane: &'static _ = Box::leak(Box::new(
        crate::support::ControlPlane::start(&crate::support::kubernetes_version()).await.expect("a control plane"),
    ));
    let (_release, _operator) = crate::support::install(plane).await.expect("the chart");
    let admin = plane.client().await.unwrap();
    let here = Team { plane, namespace: crate::support::namespace(&admin).await, admin };
    here.open().await;
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(here.admin.clone());
    let elsewhere = json!({"matchExpressions": [
        {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": [here.namespace]}]});
    let patch = json!({"webhooks": [{"name": "creators.keywright.dev", "namespaceSelector": elsewhere}]});
    webhooks.patch("keywright", &PatchParams::default(), &Patch::Strategic(patch)).await.unwrap();
    let mallory = here.person("mallory", &[], &[TEAM], &["Alerts"]).await;
    let words = ["keywright.dev/creator", "can't be chosen or changed"];
    let mut tries = 0;
    seen("nobody stamps", async || {
        tries += 1;
        let answer = mallory.create_with(&format!("probe-{tries}"), &json!({})).await;
        anyhow::ensure!(answer.is_err(), "it was stamped");
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
    mallory.create_with("own", &json!({"keywright.dev/creator": "mallory"})).await.expect("the truth");
    assert_refused(mallory.mark("own", &json!({"annotations": {"keywright.dev/creator": "alice"}})).await, &words);
    assert_refused(mallory.mark("own", &json!({"annotations": {RESTORED_BY: "alice"}})).await, &words);
    // A restore says who restores, or it is none.
    let backup = restorer(&here, "velero").await;
    assert_refused(backup.create_with("bare", &json!({"keywright.dev/creator": "alice"})).await, &words);
    assert_refused(
        backup.create_with("lie", &json!({"keywright.dev/creator": "alice", RESTORED_BY: "root"})).await,
        &words,
    );
    let whole = json!({"keywright.dev/creator": "alice", RESTORED_BY: "velero"});
    backup.create_with("whole", &whole).await.expect("a restore");
}
