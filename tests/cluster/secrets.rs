//! Secrets of keys: the API server lets only the operator, or a holder of the restore right, decide which value one holds.
//! Each write is tried as users with the ordinary rights that it takes.

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use keywright::api::ApiKey;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use crate::support::keys::{SECRET_TYPE, looks_like_a_value, value_of};
use crate::support::operator::NAMESPACE;
use crate::support::{PATIENCE, eventually, output};
use crate::{Team, api_key, condition};

/// A person with these ClusterRoles in the namespace, as the API server knows them.
async fn person(team: &Team, name: &str, roles: &[&str]) -> Client {
    let bindings: Api<RoleBinding> = Api::namespaced(team.client.clone(), &team.namespace);
    for role in roles {
        let binding = json!({
            "metadata": {"name": format!("{name}-{role}")},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"}],
        });
        bindings.create(&PostParams::default(), &serde_json::from_value(binding).unwrap()).await.expect("a binding");
    }
    team.shared.plane.client_as(name, &[]).await.expect("a client")
}

/// A person who may write Secrets and nothing else.
async fn writer(team: &Team, name: &str) -> Client {
    let role = json!({
        "metadata": {"name": "secret-writer"},
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "update", "patch", "delete"]}],
    });
    let roles: Api<ClusterRole> = Api::all(team.client.clone());
    let created = roles.create(&PostParams::default(), &serde_json::from_value(role).unwrap()).await;
    assert!(created.is_ok() || matches!(&created, Err(kube::Error::Api(status)) if status.is_already_exists()));
    person(team, name, &["secret-writer"]).await
}

fn secrets(team: &Team, client: &Client) -> Api<Secret> {
    Api::namespaced(client.clone(), &team.namespace)
}

/// The Secret of a key that the operator has just minted.
async fn minted(team: &Team, name: &str) -> Secret {
    team.apply(&api_key(name, &json!({"type": "Team", "presets": ["Alerts"]})));
    team.until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
    secrets(team, &team.client).get(&format!("{name}-secret")).await.unwrap()
}

/// Writes that decide which value a Secret holds or whose it is: title, merge patch.
fn protected(secret: &Secret) -> Vec<(&'static str, Value)> {
    let record = secret.annotations()["keywright.dev/record"].replace("\"apiKey\"", " \"apiKey\"");
    let stranger = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "u"}]);
    let mut second = serde_json::to_value(secret.owner_references()).unwrap();
    second.as_array_mut().unwrap().extend(stranger.as_array().unwrap().clone());
    vec![
        ("another value", json!({"data": {"key-value": "b3RoZXI="}})),
        ("another value as text", json!({"stringData": {"key-value": "other"}})),
        ("no value", json!({"data": {"key-value": null}})),
        ("no data", json!({"data": null})),
        ("a value beside it", json!({"data": {"sealed-value": "b3RoZXI="}})),
        ("a text beside it", json!({"stringData": {"claimed": "other"}})),
        ("immutable", json!({"immutable": true})),
        ("another record", json!({"metadata": {"annotations": {"keywright.dev/record": record}}})),
        ("no record", json!({"metadata": {"annotations": {"keywright.dev/record": null}}})),
        ("no annotations", json!({"metadata": {"annotations": null}})),
        ("another authentication", json!({"metadata": {"annotations": {"keywright.dev/record-mac": "00"}}})),
        ("no owner", json!({"metadata": {"ownerReferences": null}})),
        ("another owner", json!({"metadata": {"ownerReferences": stranger}})),
        ("a second owner", json!({"metadata": {"ownerReferences": second}})),
        ("a value under a label", json!({"metadata": {"labels": {"a": "b"}}, "data": {"key-value": "b3RoZXI="}})),
    ]
}

/// Secrets of the type, as a user would create them.
fn creations() -> Vec<(&'static str, Value)> {
    let of = |more: Value| {
        let mut secret =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "made"}, "type": SECRET_TYPE});
        secret.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        secret
    };
    vec![
        ("empty", of(json!({}))),
        ("data", of(json!({"data": {"key-value": "b3RoZXI="}}))),
        ("text", of(json!({"stringData": {"key-value": "other"}}))),
        ("immutable", of(json!({"immutable": true, "data": {"key-value": "b3RoZXI="}}))),
        (
            "record and label",
            of(json!({"metadata": {
                "name": "made", "annotations": {"keywright.dev/record": "{}"},
                "labels": {"app.kubernetes.io/managed-by": "keywright"},
            }})),
        ),
        ("a name to be made", of(json!({"metadata": {"generateName": "made-"}}))),
    ]
}

const RIGHT: &str = "lacks the right to restore apikeys.keywright.dev in namespace";

#[track_caller]
fn refused<T: std::fmt::Debug>(title: &str, answer: kube::Result<T>) -> String {
    match answer {
        Err(kube::Error::Api(status)) if status.is_forbidden() && status.message.contains(RIGHT) => status.message,
        other => panic!("{title}: {other:?}"),
    }
}

fn dry(params: PatchParams) -> PatchParams {
    PatchParams { dry_run: true, ..params }
}

#[tokio::test]
async fn whoever_may_write_secrets_puts_no_value_into_the_secret_of_a_key() {
    let team = Team::new().await;
    let secret = minted(&team, "guarded").await;
    let name = secret.name_any();
    let before = serde_json::to_value(&secret).unwrap();
    let value = value_of(&secret).unwrap();
    for (who, client) in [
        ("edit", person(&team, "eve", &["edit"]).await),
        ("admin", person(&team, "ada", &["admin"]).await),
        ("rights on Secrets alone", writer(&team, "mallory").await),
    ] {
        let api = secrets(&team, &client);
        eventually("the right to write Secrets is there", PATIENCE, async || {
            let free = json!({"metadata": {"labels": {"b": null}}});
            Ok(api.patch(&name, &dry(PatchParams::default()), &Patch::Merge(free)).await?)
        })
        .await;
        for (what, patch) in protected(&secret) {
            for params in [PatchParams::default(), dry(PatchParams::default())] {
                let message =
                    refused(&format!("{who}: {what}"), api.patch(&name, &params, &Patch::Merge(&patch)).await);
                assert!(message.contains("set spec.rotation.requestedAt of the ApiKey"), "{message}");
                assert!(!message.contains(&value) && looks_like_a_value(&message).is_none(), "{what}");
            }
        }
        // The same by a server-side apply, and by an update from a copy.
        let applied = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {"key-value": "b3RoZXI="},
        });
        refused(who, api.patch(&name, &PatchParams::apply("x").force(), &Patch::Apply(&applied)).await);
        let mut copy = secret.clone();
        copy.data.as_mut().unwrap().clear();
        refused(who, api.replace(&name, &PostParams::default(), &copy).await);
        // A missing type counts as Opaque, and the type never changes.
        copy.type_ = None;
        let Err(kube::Error::Api(status)) = api.replace(&name, &PostParams::default(), &copy).await else { panic!() };
        assert!(status.message.contains("field is immutable"), "{}", status.message);
        for (what, object) in creations() {
            let object: Secret = serde_json::from_value(object).unwrap();
            refused(&format!("{who}: {what}"), api.create(&PostParams::default(), &object).await);
            let message =
                refused(what, api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await);
            assert!(message.contains("create an ApiKey") && message.contains("keywright-restore"), "{message}");
        }
        let new = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "applied"}, "type": SECRET_TYPE});
        refused(who, api.patch("applied", &PatchParams::apply("x"), &Patch::Apply(&new)).await);
    }
    // Nothing of it came through.
    let after = serde_json::to_value(secrets(&team, &team.client).get(&name).await.unwrap()).unwrap();
    assert_eq!(after["data"], before["data"]);
    assert_eq!(after["metadata"]["annotations"], before["metadata"]["annotations"]);
    assert_eq!(after["metadata"]["ownerReferences"], before["metadata"]["ownerReferences"]);
}

#[tokio::test]
async fn labels_annotations_finalizers_and_deletion_of_a_keys_secret_stay_free() {
    let team = Team::new().await;
    let secret = minted(&team, "free").await;
    let name = secret.name_any();
    let eve = person(&team, "eve", &["edit"]).await;
    let api = secrets(&team, &eve);
    let patch = async |patch: Value| api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    eventually("the right to write Secrets is there", PATIENCE, async || Ok(api.get(&name).await?)).await;
    for free in [
        json!({"metadata": {"labels": {"a": "b"}, "annotations": {"example.com/a": "b"}}}),
        json!({"metadata": {"labels": {"a": null}, "annotations": {"example.com/a": null}}}),
        json!({"metadata": {"finalizers": ["example.com/mine"]}}),
        json!({"metadata": {"finalizers": null}}),
        json!({"immutable": false}),
        json!({"metadata": {"labels": null}}),
    ] {
        patch(free.clone()).await.unwrap_or_else(|error| panic!("{free}: {error}"));
    }
    // The label of the operator is gone now. The policy does not depend on it.
    let without = api.get(&name).await.unwrap();
    assert!(without.labels().is_empty(), "{:?}", without.labels());
    refused("without label", patch(json!({"stringData": {"key-value": "other"}})).await);
    // An update that changes nothing of it.
    let mut copy = without;
    api.replace(&name, &PostParams::default(), &copy).await.expect("nothing changes");
    copy.metadata.resource_version = None;
    api.replace(&name, &PostParams::default(), &copy).await.expect("nothing changes");
    // A Secret on its way out still loses its finalizers.
    patch(json!({"metadata": {"finalizers": ["example.com/mine"]}})).await.unwrap();
    api.delete(&name, &DeleteParams::default()).await.expect("deletion is free");
    refused("on its way out", patch(json!({"stringData": {"key-value": "other"}})).await);
    patch(json!({"metadata": {"finalizers": null}})).await.unwrap();
    eventually("the Secret is gone", PATIENCE, async || {
        anyhow::ensure!(api.get_opt(&name).await?.is_none_or(|found| found.uid() != secret.uid()));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_holder_of_the_restore_right_and_a_cluster_administrator_restore_secrets() {
    let team = Team::new().await;
    let secret = minted(&team, "restored").await;
    let name = secret.name_any();
    for (who, client) in [
        ("the role", person(&team, "rita", &["edit", "keywright-restore"]).await),
        ("cluster-admin", person(&team, "carl", &["cluster-admin"]).await),
        ("system:masters", team.client.clone()),
    ] {
        let api = secrets(&team, &client);
        let params = dry(PatchParams::default());
        for (what, patch) in protected(&secret) {
            eventually(&format!("{who}: {what}"), PATIENCE, async || {
                Ok(api.patch(&name, &params, &Patch::Merge(&patch)).await?)
            })
            .await;
        }
        for (what, object) in creations() {
            let object: Secret = serde_json::from_value(object).unwrap();
            let created = api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await;
            created.unwrap_or_else(|error| panic!("{who}: {what}: {error}"));
        }
    }
    // In that namespace alone.
    let elsewhere = Team::new().await;
    let rita = team.shared.plane.client_as("rita", &[]).await.unwrap();
    person(&elsewhere, "rita", &["edit"]).await;
    let other: Secret = serde_json::from_value(creations().remove(0).1).unwrap();
    let api = secrets(&elsewhere, &rita);
    eventually("the right to read Secrets is there", PATIENCE, async || Ok(api.get_opt("nothing").await?)).await;
    refused("another namespace", api.create(&PostParams::default(), &other).await);
}

/// `kubectl auth can-i` tells who holds the right.
#[tokio::test]
async fn the_restore_right_is_that_of_the_role_and_of_cluster_administrators() {
    let team = Team::new().await;
    let asked = |name: &str| {
        let mut kubectl = team.shared.plane.kubectl();
        kubectl.args(["auth", "can-i", "restore", "apikeys.keywright.dev", "-n", &team.namespace, "--as", name]);
        String::from_utf8_lossy(&kubectl.output().unwrap().stdout).trim().to_owned()
    };
    for (role, expected) in
        [("view", "no"), ("edit", "no"), ("admin", "no"), ("keywright-restore", "yes"), ("cluster-admin", "yes")]
    {
        let name = format!("who-{role}");
        person(&team, &name, &[role]).await;
        eventually(&format!("{role}: {expected}"), PATIENCE, async || {
            // Bound by now: each of these may read something.
            let reads = role == "keywright-restore" || asked_to_view(&team, &name);
            anyhow::ensure!(reads && asked(&name) == expected, "{}", asked(&name));
            Ok(())
        })
        .await;
    }
    let role: ClusterRole = Api::all(team.client.clone()).get("keywright-restore").await.unwrap();
    assert_eq!(role.rules.unwrap().len(), 1, "it grants nothing else");
}

fn asked_to_view(team: &Team, name: &str) -> bool {
    let mut kubectl = team.shared.plane.kubectl();
    kubectl.args(["auth", "can-i", "get", "apikeys.keywright.dev", "-n", &team.namespace, "--as", name]);
    output(&mut kubectl).is_ok_and(|answer| answer.trim() == "yes")
}

#[tokio::test]
async fn secrets_of_other_types_are_free_those_of_legacy_keys_too() {
    let team = Team::new().await;
    let eve = person(&team, "eve", &["edit"]).await;
    let api = secrets(&team, &eve);
    for (name, type_) in [("plain", "Opaque"), ("digests", "keywright.dev/digests"), ("near", "keywright.dev/api-key2")]
    {
        let secret = json!({
            "metadata": {"name": name, "annotations": {"keywright.dev/record": "{}"},
                "labels": {"app.kubernetes.io/managed-by": "keywright"}},
            "type": type_, "stringData": {"token": "a value of twenty characters or more"},
        });
        let secret: Secret = serde_json::from_value(secret).unwrap();
        eventually(name, PATIENCE, async || Ok(api.create(&PostParams::default(), &secret).await?)).await;
        let change = json!({"stringData": {"token": "another value of twenty characters"}, "immutable": true,
            "metadata": {"annotations": {"keywright.dev/record": "{\"a\": 1}"}}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(change)).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        // The type of a Secret never changes, so that none becomes a key's.
        let becomes = Patch::Merge(json!({"type": SECRET_TYPE}));
        let Err(kube::Error::Api(status)) = api.patch(name, &PatchParams::default(), &becomes).await else { panic!() };
        assert!(status.message.contains("field is immutable") || status.message.contains(RIGHT), "{}", status.message);
    }
    let legacy =
        json!({"metadata": {"name": "old"}, "stringData": {"token": "a value of this test alone, long enough"}});
    api.create(&PostParams::default(), &serde_json::from_value(legacy).unwrap()).await.unwrap();
    team.apply(&api_key(
        "legacy",
        &json!({"type": "Team", "legacy": "Scim", "secret": {"name": "old", "key": "token"}}),
    ));
    team.until_condition("apikey/legacy", "Ready", "True", "Active").await;
    let change = Patch::Merge(json!({"stringData": {"token": "another value of twenty characters"}}));
    api.patch("old", &PatchParams::default(), &change).await.expect("it is not Keywright's");
}

/// The operator mints, rotates and amends under the policy; a ServiceAccount beside it does not.
#[tokio::test]
async fn the_operator_writes_the_secrets_of_keys_and_no_other_account_of_its_namespace() {
    let team = Team::new().await;
    let secret = minted(&team, "rotated").await;
    let spec = json!({
        "type": "Team", "presets": ["Alerts"], "secret": {"labels": {"team": "shop"}},
        "rotation": {"requestedAt": "2026-01-01T00:00:00Z"},
    });
    team.apply(&api_key("rotated", &spec));
    let api = secrets(&team, &team.client);
    let rotated = team
        .wait_for("the Secret has another value and the label", async || {
            let now = api.get("rotated-secret").await?;
            anyhow::ensure!(value_of(&now) != value_of(&secret) && now.labels().contains_key("team"));
            Ok(now)
        })
        .await;
    assert_eq!(rotated.owner_references(), secret.owner_references());
    for account in ["keywright-verifier", "default"] {
        let user = format!("system:serviceaccount:{NAMESPACE}:{account}");
        let client = person(&team, &user, &[]).await;
        let bindings: Api<RoleBinding> = Api::namespaced(team.client.clone(), &team.namespace);
        let binding = json!({
            "metadata": {"name": format!("edit-{account}")},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
        });
        bindings.create(&PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
        let own = secrets(&team, &client);
        eventually("the right to read Secrets is there", PATIENCE, async || Ok(own.get("rotated-secret").await?)).await;
        let change = Patch::Merge(json!({"stringData": {"key-value": "other"}}));
        refused(account, own.patch("rotated-secret", &PatchParams::default(), &change).await);
    }
}

/// Garbage collection takes owner references out, and deletes what is left without an owner.
#[tokio::test]
async fn garbage_collection_orphans_and_deletes_the_secrets_of_keys() {
    let team = Team::new().await;
    let secret = minted(&team, "orphaned").await;
    minted(&team, "collected").await;
    team.kubectl(&["delete", "apikey/orphaned", "--cascade=orphan"]);
    team.kubectl(&["delete", "apikey/collected", "--cascade=foreground"]);
    let api = secrets(&team, &team.client);
    team.wait_for("one Secret has no owner, and one is gone", async || {
        let orphan = api.get("orphaned-secret").await?;
        anyhow::ensure!(orphan.owner_references().is_empty(), "{:?}", orphan.owner_references());
        anyhow::ensure!(value_of(&orphan) == value_of(&secret));
        anyhow::ensure!(api.get_opt("collected-secret").await?.is_none(), "it is still there");
        Ok(())
    })
    .await;
}

/// A time that a client can't read would make a whole list fail.
#[tokio::test]
async fn times_in_managed_fields_that_clients_cannot_read_are_refused() {
    let team = Team::new().await;
    let secret = minted(&team, "dated").await;
    let eve = person(&team, "eve", &["edit"]).await;
    let (api, keys) = (secrets(&team, &eve), Api::<ApiKey>::namespaced(team.client.clone(), &team.namespace));
    eventually("the right to write Secrets is there", PATIENCE, async || Ok(api.get("dated-secret").await?)).await;
    for (time, is_taken) in [
        ("9999-12-31T23:59:59Z", false),
        ("9000-01-01T00:00:00Z", false),
        ("1969-12-31T23:59:59Z", false),
        ("2020-01-01T00:00:00Z", true),
    ] {
        let raw = async |path: &str, user: Option<&str>| {
            let mut get = team.shared.plane.kubectl();
            get.args(["get", "--raw", path]);
            let mut object: Value = serde_json::from_str(&output(&mut get).unwrap()).unwrap();
            for entry in object["metadata"]["managedFields"].as_array_mut().unwrap() {
                entry["time"] = json!(time);
            }
            // A change of times alone is none, for the API server.
            object["metadata"]["labels"]["time"] = json!(time.replace(':', "."));
            let file = team.file(&object);
            let mut replace = team.shared.plane.kubectl();
            replace.args(["replace", "-f", &file]).args(user.map(|user| format!("--as={user}")));
            output(&mut replace).map_err(|error| format!("{error:#}"))
        };
        let secret = format!("/api/v1/namespaces/{0}/secrets/dated-secret", team.namespace);
        let key = format!("/apis/keywright.dev/v1alpha1/namespaces/{0}/apikeys/dated", team.namespace);
        for (path, user) in [(secret, Some("eve")), (key, None)] {
            match raw(&path, user).await {
                Ok(_) => assert!(is_taken, "{path}: {time} is taken"),
                Err(error) => {
                    let told =
                        error.contains("metadata.managedFields: Invalid value: the time of each entry must be between");
                    assert!(!is_taken && told, "{time}: {error}");
                }
            }
        }
    }
    // Both can still be read, and have the time that was taken.
    let long_ago = |time: &Option<Time>| time.as_ref().is_some_and(|time| time.0.to_string().starts_with("2020"));
    let found = keys.get("dated").await.unwrap();
    assert!(found.metadata.managed_fields.iter().flatten().any(|entry| long_ago(&entry.time)));
    let found = api.get("dated-secret").await.unwrap();
    assert!(found.metadata.managed_fields.iter().flatten().any(|entry| long_ago(&entry.time)));
    assert_eq!(value_of(&found), value_of(&secret));
    assert!(condition(&team.get("apikey/dated"), "Ready").is_some());
}
