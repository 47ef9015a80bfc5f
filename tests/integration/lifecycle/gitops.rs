//! S8: the operator does not change the user's fields, so that Argo CD and `kubectl diff` find no difference.

use crate::support::keys::sha256;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};

use super::*;

/// The user's part of an object: spec, labels, annotations, finalizers, owners, and the field managers of these fields.
/// Asserts that the operator manages only the status.
async fn owned(team: &Team, name: &str) -> Value {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("keywright.dev", "v1alpha1", "ApiKey"));
    let keys: Api<DynamicObject> = Api::namespaced_with(team.client.clone(), &team.namespace, &kind);
    let object = serde_json::to_value(keys.get(name).await.unwrap()).unwrap();
    let metadata = &object["metadata"];
    let managers = metadata["managedFields"].as_array().unwrap();
    let (users, operators): (Vec<&Value>, Vec<&Value>) = managers.iter().partition(|m| m["subresource"] != "status");
    for manager in operators {
        let fields = manager["fieldsV1"].as_object().unwrap().keys().collect::<Vec<_>>();
        assert_eq!(fields, ["f:status"], "the operator manages fields besides the status");
    }
    json!({
        "spec": object["spec"], "generation": metadata["generation"], "labels": metadata["labels"],
        "annotations": metadata["annotations"], "finalizers": metadata["finalizers"],
        "ownerReferences": metadata["ownerReferences"], "managers": users,
    })
}

/// A manifest with omitted optional fields and unusual spellings, neither of which the operator may change.
fn from_git() -> Value {
    let spec = json!({
        "type": "Team", "presets": ["alerts"], "permissions": ["LOGS.data-ingress:SendData"],
        "rotation": {"every": "90m", "overlap": "60s"}, "expiresAt": "2099-01-01T00:00:00.000+02:00",
        "secret": {"labels": {"a": "b"}},
    });
    let mut object = manifest("git", &spec);
    object["metadata"]["labels"] = json!({"team": "shop"});
    object["metadata"]["annotations"] = json!({"argocd.argoproj.io/sync-wave": "1"});
    object
}

async fn apply_twice(apply: &[&str], diff: &[&str]) {
    let team = Team::new().await;
    let file = team.file(&from_git());
    let kubectl = |args: &[&str]| team.kubectl(&[args, &["-f", &file]].concat()).unwrap();
    kubectl(apply);
    let before = owned(&team, "git").await;
    let key = team.ready("git").await;
    assert_eq!(owned(&team, "git").await, before, "minting changed a field of the user");
    assert_eq!(kubectl(diff), "");
    assert!(kubectl(apply).contains("unchanged") || apply.contains(&"--server-side"));

    // Loss and rotation change only the status, too.
    team.secrets.delete("git-secret", &DeleteParams::default()).await.unwrap();
    team.until("git", "lost", |key| reason(key) == "SecretLost").await;
    let mut request = from_git();
    request["spec"]["rotation"]["requestedAt"] = json!("2020-01-01T00:00:00Z");
    team.file(&request);
    kubectl(apply);
    let before = owned(&team, "git").await;
    let rotated = team.ready("git").await;
    assert_ne!(tokens(&rotated)[0], tokens(&key)[0]);
    assert_eq!(tokens(&rotated)[0].sha256, sha256(&team.value("git").await));
    kubectl(apply);
    assert_eq!(kubectl(diff), "");
    let mut after = owned(&team, "git").await;
    // kubectl may update the time of its field manager in an apply without changes.
    let mut before = before;
    for owned in [&mut before, &mut after] {
        owned["managers"].as_array_mut().unwrap().iter_mut().for_each(|m| m["time"] = Value::Null);
    }
    assert_eq!(after, before);
}

#[tokio::test]
async fn server_side_apply_finds_no_difference() {
    apply_twice(&["apply", "--server-side"], &["diff", "--server-side"]).await;
}

#[tokio::test]
async fn client_side_apply_finds_no_difference() {
    apply_twice(&["apply"], &["diff"]).await;
}

/// A status that changes without a cause would reconcile in a loop and show as activity in GitOps tools.
#[tokio::test]
async fn idle_operator_writes_neither_keys_nor_secrets() {
    let team = Team::new().await;
    let spec =
        spec_with(json!({"rotation": {"every": "1h"}, "expiresAt": from_now(7200), "secret": {"labels": {"a": "b"}}}));
    team.minted("rest", spec).await;
    team.create("lost", spec_with(json!({"secret": {"name": "foreign"}}))).await;
    team.ready("lost").await;
    team.secrets.delete("foreign", &DeleteParams::default()).await.unwrap();
    team.until("lost", "lost", |key| reason(key) == "SecretLost").await;
    let versions = async || {
        let version = async |name: &str| team.keys.get(name).await.unwrap().resource_version();
        (version("rest").await, version("lost").await, team.secret("rest").await.resource_version())
    };
    let before = versions().await;
    tokio::time::sleep(CHECK_INTERVAL * 3).await;
    assert_eq!(versions().await, before);
    team.cluster.restart().await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    assert_eq!(versions().await, before, "a restarted operator wrote without a change");
}

/// A user can remove by apply only fields that the user's field manager owns. On some versions of Kubernetes, a status
/// update whose body lacks labels and annotations takes their ownership from the user.
#[tokio::test]
async fn labels_and_annotations_removed_from_git_are_removed_from_the_object() {
    let team = Team::new().await;
    let mut object = from_git();
    let apply = |object: &Value| team.kubectl(&["apply", "--server-side", "-f", &team.file(object)]).unwrap();
    apply(&object);
    team.ready("git").await;
    object["metadata"]["labels"] = json!({});
    object["metadata"]["annotations"] = json!({});
    apply(&object);
    let key = team.keys.get("git").await.unwrap();
    assert!(key.labels().is_empty(), "{:?}", key.labels());
    let annotations: Vec<_> = key.annotations().keys().collect();
    assert_eq!(annotations, ["keywright.dev/creator"], "only the annotation of the mutating webhook is left");
}
