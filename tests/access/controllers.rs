//! Nothing hangs: the namespace controller, garbage collection and users while the operator is down.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};
use serde_json::json;

use crate::support::{self, PATIENCE, eventually};
use crate::{DATA, PERSONAL, Team, assert_refused, data, manifest, personal, team, under};

/// One control plane of its own, since its operator is killed.
#[tokio::test]
async fn while_the_operator_is_down_gate_1_holds_and_a_namespace_can_go() {
    let plane: &'static _ = Box::leak(Box::new(
        support::ControlPlane::start(&support::kubernetes_version()).await.expect("a control plane"),
    ));
    let (_release, operator) = support::install(plane).await.expect("the chart");
    let admin = plane.client().await.unwrap();
    let here = Team { plane, namespace: support::namespace(&admin).await, admin };
    here.open().await;
    here.admin().write_policy("policy", &json!({"mode": "Private"})).await.unwrap();
    for (name, spec) in [("plain", data()), ("second", data()), ("under-a-policy", under("policy", team()))] {
        here.admin().create(name, &spec).await.unwrap();
    }
    here.admin().create("of-alice", &personal("alice")).await.unwrap();
    let bob = here.person("bob", &[], &[PERSONAL], &["Alerts"]).await;
    let alice = here.person("alice", &[], &[PERSONAL], &[]).await;
    here.admin().write_settings(&json!({"oneTimeReveal": false})).await.unwrap();
    let without = here.person("without", &[], &[], &[]).await;
    let with = here.person("with", &[], &[DATA], &[]).await;
    operator.kill();

    // The apiserver itself asks for the role; so revoking works, for those who may.
    assert_refused(without.delete("plain").await, &["without lacks permission", DATA]);
    with.delete("plain").await.expect("a leaked key can be revoked without the operator");
    // And for whom a Personal key is.
    assert_refused(bob.delete("of-alice").await, &["spec.user", "bob may not impersonate alice"]);
    alice.delete("of-alice").await.expect("she revokes her own");
    // What only the operator can decide is refused, not let through.
    let patch = Patch::Merge(json!({"spec": {"active": false}}));
    let edit = with.keys.patch("second", &PatchParams::default(), &patch).await;
    let Err(kube::Error::Api(status)) = edit else { panic!("nobody checked this") };
    assert!(status.message.contains("failed calling webhook"), "{}", status.message);

    let namespaces: Api<Namespace> = Api::all(here.admin.clone());
    namespaces.delete(&here.namespace, &DeleteParams::default()).await.unwrap();
    eventually("the namespace is gone", PATIENCE, async || {
        let left = namespaces.get_opt(&here.namespace).await?;
        ensure!(left.is_none(), "{:?}", left.and_then(|namespace| namespace.status));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn garbage_collection_deletes_keys_under_a_policy_in_the_foreground() {
    let here = Team::new().await;
    let configs: Api<ConfigMap> = Api::namespaced(here.admin.clone(), &here.namespace);
    let owner = ConfigMap {
        metadata: ObjectMeta { name: Some("owner".to_owned()), ..ObjectMeta::default() },
        ..ConfigMap::default()
    };
    let owner = configs.create(&PostParams::default(), &owner).await.unwrap();
    here.admin().write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    let mut key = manifest("ApiKey", "key", &under("private", team()));
    key["metadata"]["ownerReferences"] = json!([owner.owner_ref(&()).map(|mut reference| {
        reference.block_owner_deletion = Some(true);
        reference
    })]);
    here.admin().keys.create(&PostParams::default(), &serde_json::from_value(key).unwrap()).await.unwrap();
    configs.delete(&owner.name_any(), &DeleteParams::foreground()).await.unwrap();
    eventually("owner and key are gone", PATIENCE, async || {
        ensure!(here.admin().keys.get_opt("key").await?.is_none(), "the key is there");
        ensure!(configs.get_opt("owner").await?.is_none(), "the owner is there");
        Ok(())
    })
    .await;
}
