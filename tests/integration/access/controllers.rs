//! The namespace controller, garbage collection and users are not blocked while the operator is down.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};
use serde_json::json;

use super::{
    MANAGE_DATA_KEYS, MANAGE_PERSONAL_KEYS, Team, assert_refused, data_key, manifest, personal_key, team_key,
    with_policy,
};
use crate::support::{TIMEOUT, eventually};

/// Uses its own control plane because it kills the operator.
#[tokio::test]
async fn without_an_operator_role_checks_apply_and_a_namespace_can_be_deleted() {
    let plane: &'static _ = Box::leak(Box::new(
        crate::support::ControlPlane::start(&crate::support::kubernetes_version()).await.expect("a control plane"),
    ));
    let (_release, operator) = crate::support::install(plane).await.expect("the chart");
    let admin = plane.client().await.unwrap();
    let team = Team { plane, namespace: crate::support::namespace(&admin).await, admin };
    team.allow_all_verbs().await;
    team.admin().write_policy("policy", &json!({"mode": "Private"})).await.unwrap();
    for (name, spec) in
        [("plain", data_key()), ("second", data_key()), ("under-a-policy", with_policy("policy", team_key()))]
    {
        team.admin().create(name, &spec).await.unwrap();
    }
    team.admin().create("of-alice", &personal_key("alice")).await.unwrap();
    let bob = team.person("bob", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    let alice = team.person("alice", &[], &[MANAGE_PERSONAL_KEYS], &[]).await;
    team.admin().write_settings(&json!({"oneTimeReveal": false})).await.unwrap();
    let without = team.person("without", &[], &[], &[]).await;
    let with = team.person("with", &[], &[MANAGE_DATA_KEYS], &[]).await;
    operator.kill();

    // The API server itself checks the role, so users with the role can still delete keys.
    assert_refused(without.delete("plain").await, &["without lacks permission", MANAGE_DATA_KEYS]);
    with.delete("plain").await.expect("a leaked key can be deleted without the operator");
    // The API server also checks the user of a Personal key.
    assert_refused(bob.delete("of-alice").await, &["spec.user", "bob may not impersonate alice"]);
    alice.delete("of-alice").await.expect("alice can delete her own key");
    // Requests that only the operator can authorize fail closed.
    let patch = Patch::Merge(json!({"spec": {"active": false}}));
    let edit = with.keys.patch("second", &PatchParams::default(), &patch).await;
    let Err(kube::Error::Api(status)) = edit else { panic!("the API server accepted the change without the webhook") };
    assert!(status.message.contains("failed calling webhook"), "{}", status.message);

    let namespaces: Api<Namespace> = Api::all(team.admin.clone());
    namespaces.delete(&team.namespace, &DeleteParams::default()).await.unwrap();
    eventually("the namespace is deleted", TIMEOUT, async || {
        let found = namespaces.get_opt(&team.namespace).await?;
        ensure!(found.is_none(), "{:?}", found.and_then(|namespace| namespace.status));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn foreground_deletion_of_an_owner_deletes_a_key_with_a_private_policy() {
    let team = Team::new().await;
    let configs: Api<ConfigMap> = Api::namespaced(team.admin.clone(), &team.namespace);
    let owner = ConfigMap {
        metadata: ObjectMeta { name: Some("owner".to_owned()), ..ObjectMeta::default() },
        ..ConfigMap::default()
    };
    let owner = configs.create(&PostParams::default(), &owner).await.unwrap();
    team.admin().write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    let mut key = manifest("ApiKey", "key", &with_policy("private", team_key()));
    key["metadata"]["ownerReferences"] = json!([owner.owner_ref(&()).map(|mut reference| {
        reference.block_owner_deletion = Some(true);
        reference
    })]);
    team.admin().keys.create(&PostParams::default(), &serde_json::from_value(key).unwrap()).await.unwrap();
    configs.delete(&owner.name_any(), &DeleteParams::foreground()).await.unwrap();
    eventually("the owner and the key are deleted", TIMEOUT, async || {
        ensure!(team.admin().keys.get_opt("key").await?.is_none(), "the key still exists");
        ensure!(configs.get_opt("owner").await?.is_none(), "the owner still exists");
        Ok(())
    })
    .await;
}
