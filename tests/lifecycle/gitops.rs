//! S8: what users wrote stays as they wrote it, so that Argo CD and `kubectl diff` find nothing.

use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use support::keys::sha256;

use crate::*;

/// What a user owns of an object: spec, labels, annotations, finalizers, and who wrote which field of them.
async fn owned(team: &Team, name: &str) -> Value {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("keywright.dev", "v1alpha1", "ApiKey"));
    let keys: Api<DynamicObject> = Api::namespaced_with(team.client.clone(), &team.namespace, &kind);
    let object = serde_json::to_value(keys.get(name).await.unwrap()).unwrap();
    let metadata = &object["metadata"];
    let managers = metadata["managedFields"].as_array().unwrap();
    let (theirs, ours): (Vec<&Value>, Vec<&Value>) = managers.iter().partition(|m| m["subresource"] != "status");
    for manager in ours {
        let fields = manager["fieldsV1"].as_object().unwrap().keys().collect::<Vec<_>>();
        assert_eq!(fields, ["f:status"], "the operator manages the status and nothing else");
    }
    json!({
        "spec": object["spec"], "generation": metadata["generation"], "labels": metadata["labels"],
        "annotations": metadata["annotations"], "finalizers": metadata["finalizers"],
        "ownerReferences": metadata["ownerReferences"], "managers": theirs,
    })
}

/// Every optional field that is left out must stay out, and spellings must stay as they are.
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
    assert_eq!(owned(&team, "git").await, before, "minting changed what is the user's");
    assert_eq!(kubectl(diff), "");
    assert!(kubectl(apply).contains("unchanged") || apply.contains(&"--server-side"));

    // Loss and rotation: the operator has more to say, and still only in the status.
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
    // An apply that changes nothing leaves its time, or may move it: that is kubectl's and not ours.
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

/// A status that moves by itself would reconcile itself for ever, and show as activity in every GitOps tool.
#[tokio::test]
async fn at_rest_neither_key_nor_secret_is_written() {
    let team = Team::new().await;
    let spec =
        spec_with(json!({"rotation": {"every": "1h"}, "expiresAt": from_now(7200), "secret": {"labels": {"a": "b"}}}));
    team.minted("rest", spec).await;
    team.create("broken", spec_with(json!({"secret": {"name": "foreign"}}))).await;
    team.ready("broken").await;
    team.secrets.delete("foreign", &DeleteParams::default()).await.unwrap();
    team.until("broken", "lost", |key| reason(key) == "SecretLost").await;
    let versions = async || {
        let version = async |name: &str| team.keys.get(name).await.unwrap().resource_version();
        (version("rest").await, version("broken").await, team.secret("rest").await.resource_version())
    };
    let before = versions().await;
    tokio::time::sleep(CHECK * 3).await;
    assert_eq!(versions().await, before);
    team.cluster.restart().await;
    tokio::time::sleep(CHECK * 2).await;
    assert_eq!(versions().await, before, "a new operator found something to write");
}

/// What the user's field manager owns decides what the user can take away again. An operator that writes a status with
/// a body that lacks labels and annotations takes this from users on some versions of Kubernetes.
#[tokio::test]
async fn a_label_that_leaves_git_leaves_the_object() {
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
    let left: Vec<_> = key.annotations().keys().collect();
    assert_eq!(left, ["keywright.dev/creator"], "what the cluster stamped stays");
}
