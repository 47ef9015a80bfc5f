//! Secrets of keys: the API server allows only the operator, and users with the right to restore, to set their value.

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use keywright::api::ApiKey;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::{Team, api_key, condition};
use crate::support::keys::{SECRET_TYPE, find_value, value_of};
use crate::support::operator::NAMESPACE;
use crate::support::{TIMEOUT, eventually, output};

/// Binds ClusterRoles to a user in the namespace and returns the user's client.
async fn client_with_roles(team: &Team, name: &str, roles: &[&str]) -> Client {
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

/// Returns the client of a user who may only write Secrets.
async fn secret_writer(team: &Team, name: &str) -> Client {
    let role = json!({
        "metadata": {"name": "secret-writer"},
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "update", "patch", "delete"]}],
    });
    let roles: Api<ClusterRole> = Api::all(team.client.clone());
    let created = roles.create(&PostParams::default(), &serde_json::from_value(role).unwrap()).await;
    assert!(created.is_ok() || matches!(&created, Err(kube::Error::Api(status)) if status.is_already_exists()));
    client_with_roles(team, name, &["secret-writer"]).await
}

fn secrets(team: &Team, client: &Client) -> Api<Secret> {
    Api::namespaced(client.clone(), &team.namespace)
}

/// Creates a key, waits until it is Active and returns its Secret.
async fn minted_secret(team: &Team, name: &str) -> Secret {
    team.apply(&api_key(name, &json!({"type": "Team", "presets": ["Alerts"]})));
    team.wait_until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
    secrets(team, &team.client).get(&format!("{name}-secret")).await.unwrap()
}

/// Returns titles and merge patches of changes that affect the value or the owner of a Secret.
fn protected_changes(secret: &Secret) -> Vec<(&'static str, Value)> {
    let record = secret.annotations()["keywright.dev/record"].replace("\"apiKey\"", " \"apiKey\"");
    let foreign_owner = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "u"}]);
    let mut second = serde_json::to_value(secret.owner_references()).unwrap();
    second.as_array_mut().unwrap().extend(foreign_owner.as_array().unwrap().clone());
    vec![
        ("another value", json!({"data": {"key-value": "b3RoZXI="}})),
        ("another value as text", json!({"stringData": {"key-value": "other"}})),
        ("no value", json!({"data": {"key-value": null}})),
        ("no data", json!({"data": null})),
        ("an additional value", json!({"data": {"sealed-value": "b3RoZXI="}})),
        ("an additional value as text", json!({"stringData": {"claimed": "other"}})),
        ("immutable", json!({"immutable": true})),
        ("another record", json!({"metadata": {"annotations": {"keywright.dev/record": record}}})),
        ("no record", json!({"metadata": {"annotations": {"keywright.dev/record": null}}})),
        ("no annotations", json!({"metadata": {"annotations": null}})),
        ("another authentication", json!({"metadata": {"annotations": {"keywright.dev/record-mac": "00"}}})),
        ("no owner", json!({"metadata": {"ownerReferences": null}})),
        ("another owner", json!({"metadata": {"ownerReferences": foreign_owner}})),
        ("a second owner", json!({"metadata": {"ownerReferences": second}})),
        (
            "a value together with a label",
            json!({"metadata": {"labels": {"a": "b"}}, "data": {"key-value": "b3RoZXI="}}),
        ),
    ]
}

/// Returns titles and new Secrets of the type of key Secrets.
fn creations() -> Vec<(&'static str, Value)> {
    let secret = |more: Value| {
        let mut object =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "created"}, "type": SECRET_TYPE});
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        object
    };
    vec![
        ("empty", secret(json!({}))),
        ("data", secret(json!({"data": {"key-value": "b3RoZXI="}}))),
        ("text", secret(json!({"stringData": {"key-value": "other"}}))),
        ("immutable", secret(json!({"immutable": true, "data": {"key-value": "b3RoZXI="}}))),
        (
            "record and label",
            secret(json!({"metadata": {
                "name": "created", "annotations": {"keywright.dev/record": "{}"},
                "labels": {"app.kubernetes.io/managed-by": "keywright"},
            }})),
        ),
        ("generated name", secret(json!({"metadata": {"generateName": "created-"}}))),
    ]
}

const RIGHT: &str = "lacks the right to restore apikeys.keywright.dev in namespace";

#[track_caller]
fn assert_denied<T: std::fmt::Debug>(title: &str, answer: kube::Result<T>) -> String {
    match answer {
        Err(kube::Error::Api(status)) if status.is_forbidden() && status.message.contains(RIGHT) => status.message,
        other => panic!("{title}: {other:?}"),
    }
}

fn dry_run(params: PatchParams) -> PatchParams {
    PatchParams { dry_run: true, ..params }
}

#[tokio::test]
async fn users_with_rights_on_secrets_can_not_change_or_create_secrets_of_keys() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "guarded").await;
    let name = secret.name_any();
    let before = serde_json::to_value(&secret).unwrap();
    let value = value_of(&secret).unwrap();
    for (subject, client) in [
        ("edit", client_with_roles(&team, "eve", &["edit"]).await),
        ("admin", client_with_roles(&team, "ada", &["admin"]).await),
        ("rights on Secrets alone", secret_writer(&team, "mallory").await),
    ] {
        let api = secrets(&team, &client);
        eventually("the user may write Secrets", TIMEOUT, async || {
            let allowed = json!({"metadata": {"labels": {"b": null}}});
            Ok(api.patch(&name, &dry_run(PatchParams::default()), &Patch::Merge(allowed)).await?)
        })
        .await;
        for (title, patch) in protected_changes(&secret) {
            for params in [PatchParams::default(), dry_run(PatchParams::default())] {
                let message = assert_denied(
                    &format!("{subject}: {title}"),
                    api.patch(&name, &params, &Patch::Merge(&patch)).await,
                );
                assert!(message.contains("set spec.rotation.requestedAt of the ApiKey"), "{message}");
                assert!(!message.contains(&value) && find_value(&message).is_none(), "{title}");
            }
        }
        // The same by server-side apply and by update.
        let applied = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {"key-value": "b3RoZXI="},
        });
        assert_denied(subject, api.patch(&name, &PatchParams::apply("x").force(), &Patch::Apply(&applied)).await);
        let mut copy = secret.clone();
        copy.data.as_mut().unwrap().clear();
        assert_denied(subject, api.replace(&name, &PostParams::default(), &copy).await);
        // A missing type means Opaque, and the type is immutable.
        copy.type_ = None;
        let Err(kube::Error::Api(status)) = api.replace(&name, &PostParams::default(), &copy).await else { panic!() };
        assert!(status.message.contains("field is immutable"), "{}", status.message);
        for (title, object) in creations() {
            let object: Secret = serde_json::from_value(object).unwrap();
            assert_denied(&format!("{subject}: {title}"), api.create(&PostParams::default(), &object).await);
            let message =
                assert_denied(title, api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await);
            assert!(message.contains("create an ApiKey") && message.contains("keywright-restore"), "{message}");
        }
        let new = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "applied"}, "type": SECRET_TYPE});
        assert_denied(subject, api.patch("applied", &PatchParams::apply("x"), &Patch::Apply(&new)).await);
    }
    let after = serde_json::to_value(secrets(&team, &team.client).get(&name).await.unwrap()).unwrap();
    assert_eq!(after["data"], before["data"]);
    assert_eq!(after["metadata"]["annotations"], before["metadata"]["annotations"]);
    assert_eq!(after["metadata"]["ownerReferences"], before["metadata"]["ownerReferences"]);
}

#[tokio::test]
async fn labels_annotations_finalizers_and_deletion_of_a_secret_of_a_key_are_allowed() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "unrestricted").await;
    let name = secret.name_any();
    let eve = client_with_roles(&team, "eve", &["edit"]).await;
    let api = secrets(&team, &eve);
    let patch = async |patch: Value| api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    eventually("the user may write Secrets", TIMEOUT, async || Ok(api.get(&name).await?)).await;
    for change in [
        json!({"metadata": {"labels": {"a": "b"}, "annotations": {"example.com/a": "b"}}}),
        json!({"metadata": {"labels": {"a": null}, "annotations": {"example.com/a": null}}}),
        json!({"metadata": {"finalizers": ["example.com/mine"]}}),
        json!({"metadata": {"finalizers": null}}),
        json!({"immutable": false}),
        json!({"metadata": {"labels": null}}),
    ] {
        patch(change.clone()).await.unwrap_or_else(|error| panic!("{change}: {error}"));
    }
    // The policy does not depend on the operator's label, which is removed now.
    let without = api.get(&name).await.unwrap();
    assert!(without.labels().is_empty(), "{:?}", without.labels());
    assert_denied("without label", patch(json!({"stringData": {"key-value": "other"}})).await);
    // The operator may write the label again between the two requests.
    eventually("an update without changes is allowed", TIMEOUT, async || {
        let current = api.get(&name).await?;
        Ok(api.replace(&name, &PostParams::default(), &current).await?)
    })
    .await;
    let mut copy = without;
    copy.metadata.resource_version = None;
    api.replace(&name, &PostParams::default(), &copy).await.expect("an update without changes is allowed");
    // The finalizers of a Secret that is being deleted can be removed.
    patch(json!({"metadata": {"finalizers": ["example.com/mine"]}})).await.unwrap();
    api.delete(&name, &DeleteParams::default()).await.expect("deletion is allowed");
    assert_denied("being deleted", patch(json!({"stringData": {"key-value": "other"}})).await);
    patch(json!({"metadata": {"finalizers": null}})).await.unwrap();
    eventually("the Secret is deleted", TIMEOUT, async || {
        anyhow::ensure!(api.get_opt(&name).await?.is_none_or(|found| found.uid() != secret.uid()));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn users_with_the_right_to_restore_and_cluster_administrators_can_write_secrets_of_keys() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "restored").await;
    let name = secret.name_any();
    for (subject, client) in [
        ("keywright-restore", client_with_roles(&team, "rita", &["edit", "keywright-restore"]).await),
        ("cluster-admin", client_with_roles(&team, "carl", &["cluster-admin"]).await),
        ("system:masters", team.client.clone()),
    ] {
        let api = secrets(&team, &client);
        let params = dry_run(PatchParams::default());
        for (title, patch) in protected_changes(&secret) {
            eventually(&format!("{subject}: {title}"), TIMEOUT, async || {
                Ok(api.patch(&name, &params, &Patch::Merge(&patch)).await?)
            })
            .await;
        }
        for (title, object) in creations() {
            let object: Secret = serde_json::from_value(object).unwrap();
            let created = api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await;
            created.unwrap_or_else(|error| panic!("{subject}: {title}: {error}"));
        }
    }
    // The right applies to one namespace.
    let other_team = Team::new().await;
    let rita = team.shared.plane.client_as("rita", &[]).await.unwrap();
    client_with_roles(&other_team, "rita", &["edit"]).await;
    let other: Secret = serde_json::from_value(creations().remove(0).1).unwrap();
    let api = secrets(&other_team, &rita);
    eventually("the user may read Secrets", TIMEOUT, async || Ok(api.get_opt("nothing").await?)).await;
    assert_denied("another namespace", api.create(&PostParams::default(), &other).await);
}

#[tokio::test]
async fn kubectl_auth_can_i_shows_the_right_to_restore_of_each_role() {
    let team = Team::new().await;
    let can_restore = |name: &str| {
        let mut kubectl = team.shared.plane.kubectl();
        kubectl.args(["auth", "can-i", "restore", "apikeys.keywright.dev", "-n", &team.namespace, "--as", name]);
        String::from_utf8_lossy(&kubectl.output().unwrap().stdout).trim().to_owned()
    };
    for (role, expected) in
        [("view", "no"), ("edit", "no"), ("admin", "no"), ("keywright-restore", "yes"), ("cluster-admin", "yes")]
    {
        let name = format!("user-{role}");
        client_with_roles(&team, &name, &[role]).await;
        eventually(&format!("{role}: {expected}"), TIMEOUT, async || {
            // All other roles grant read access, which shows that the binding applies.
            let bound = role == "keywright-restore" || can_view(&team, &name);
            anyhow::ensure!(bound && can_restore(&name) == expected, "{}", can_restore(&name));
            Ok(())
        })
        .await;
    }
    let role: ClusterRole = Api::all(team.client.clone()).get("keywright-restore").await.unwrap();
    assert_eq!(role.rules.unwrap().len(), 1, "keywright-restore has one rule");
}

fn can_view(team: &Team, name: &str) -> bool {
    let mut kubectl = team.shared.plane.kubectl();
    kubectl.args(["auth", "can-i", "get", "apikeys.keywright.dev", "-n", &team.namespace, "--as", name]);
    output(&mut kubectl).is_ok_and(|answer| answer.trim() == "yes")
}

#[tokio::test]
async fn secrets_of_other_types_and_of_legacy_keys_can_be_changed() {
    let team = Team::new().await;
    let eve = client_with_roles(&team, "eve", &["edit"]).await;
    let api = secrets(&team, &eve);
    for (name, type_) in [("plain", "Opaque"), ("digests", "keywright.dev/digests"), ("near", "keywright.dev/api-key2")]
    {
        let secret = json!({
            "metadata": {"name": name, "annotations": {"keywright.dev/record": "{}"},
                "labels": {"app.kubernetes.io/managed-by": "keywright"}},
            "type": type_, "stringData": {"token": "a value of twenty characters or more"},
        });
        let secret: Secret = serde_json::from_value(secret).unwrap();
        eventually(name, TIMEOUT, async || Ok(api.create(&PostParams::default(), &secret).await?)).await;
        let change = json!({"stringData": {"token": "another value of twenty characters"}, "immutable": true,
            "metadata": {"annotations": {"keywright.dev/record": "{\"a\": 1}"}}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(change)).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        // The type is immutable, so no other Secret can become one of a key.
        let change_type = Patch::Merge(json!({"type": SECRET_TYPE}));
        let Err(kube::Error::Api(status)) = api.patch(name, &PatchParams::default(), &change_type).await else {
            panic!()
        };
        assert!(status.message.contains("field is immutable") || status.message.contains(RIGHT), "{}", status.message);
    }
    let legacy =
        json!({"metadata": {"name": "old"}, "stringData": {"token": "a value of this test alone, long enough"}});
    api.create(&PostParams::default(), &serde_json::from_value(legacy).unwrap()).await.unwrap();
    team.apply(&api_key(
        "legacy",
        &json!({"type": "Team", "legacy": "Scim", "secret": {"name": "old", "key": "token"}}),
    ));
    team.wait_until_condition("apikey/legacy", "Ready", "True", "Active").await;
    let change = Patch::Merge(json!({"stringData": {"token": "another value of twenty characters"}}));
    api.patch("old", &PatchParams::default(), &change).await.expect("the Secret of a legacy key can be changed");
}

#[tokio::test]
async fn only_the_operators_service_account_can_write_secrets_of_keys() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "rotated").await;
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
        let client = client_with_roles(&team, &user, &[]).await;
        let bindings: Api<RoleBinding> = Api::namespaced(team.client.clone(), &team.namespace);
        let binding = json!({
            "metadata": {"name": format!("edit-{account}")},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
        });
        bindings.create(&PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
        let api = secrets(&team, &client);
        eventually("the user may read Secrets", TIMEOUT, async || Ok(api.get("rotated-secret").await?)).await;
        let change = Patch::Merge(json!({"stringData": {"key-value": "other"}}));
        assert_denied(account, api.patch("rotated-secret", &PatchParams::default(), &change).await);
    }
}

#[tokio::test]
async fn garbage_collection_can_orphan_and_delete_secrets_of_keys() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "orphaned").await;
    minted_secret(&team, "collected").await;
    team.kubectl(&["delete", "apikey/orphaned", "--cascade=orphan"]);
    team.kubectl(&["delete", "apikey/collected", "--cascade=foreground"]);
    let api = secrets(&team, &team.client);
    team.wait_for("one Secret has no owner, and one is deleted", async || {
        let orphan = api.get("orphaned-secret").await?;
        anyhow::ensure!(orphan.owner_references().is_empty(), "{:?}", orphan.owner_references());
        anyhow::ensure!(value_of(&orphan) == value_of(&secret));
        anyhow::ensure!(api.get_opt("collected-secret").await?.is_none(), "the Secret still exists");
        Ok(())
    })
    .await;
}

/// A time that a client can't parse would make its whole list fail.
#[tokio::test]
async fn times_in_managed_fields_that_clients_can_not_parse_are_rejected() {
    let team = Team::new().await;
    let secret = minted_secret(&team, "dated").await;
    let eve = client_with_roles(&team, "eve", &["edit"]).await;
    let (api, keys) = (secrets(&team, &eve), Api::<ApiKey>::namespaced(team.client.clone(), &team.namespace));
    eventually("the user may write Secrets", TIMEOUT, async || Ok(api.get("dated-secret").await?)).await;
    for (time, accepted) in [
        ("9999-12-31T23:59:59Z", false),
        ("9000-01-01T00:00:00Z", false),
        ("1969-12-31T23:59:59Z", false),
        ("2020-01-01T00:00:00Z", true),
    ] {
        let replace_with_time = async |path: &str, user: Option<&str>| {
            let mut get = team.shared.plane.kubectl();
            get.args(["get", "--raw", path]);
            let mut object: Value = serde_json::from_str(&output(&mut get).unwrap()).unwrap();
            for entry in object["metadata"]["managedFields"].as_array_mut().unwrap() {
                entry["time"] = json!(time);
            }
            // The API server ignores changes of times alone.
            object["metadata"]["labels"]["time"] = json!(time.replace(':', "."));
            let file = team.file(&object);
            let mut replace = team.shared.plane.kubectl();
            replace.args(["replace", "-f", &file]).args(user.map(|user| format!("--as={user}")));
            output(&mut replace).map_err(|error| format!("{error:#}"))
        };
        let secret = format!("/api/v1/namespaces/{0}/secrets/dated-secret", team.namespace);
        let key = format!("/apis/keywright.dev/v1alpha1/namespaces/{0}/apikeys/dated", team.namespace);
        for (path, user) in [(secret, Some("eve")), (key, None)] {
            match replace_with_time(&path, user).await {
                Ok(_) => assert!(accepted, "{path}: {time} must be rejected"),
                Err(error) => {
                    let expected =
                        error.contains("metadata.managedFields: Invalid value: the time of each entry must be between");
                    assert!(!accepted && expected, "{time}: {error}");
                }
            }
        }
    }
    // Clients can read both, with the accepted time.
    let is_in_2020 = |time: &Option<Time>| time.as_ref().is_some_and(|time| time.0.to_string().starts_with("2020"));
    let found = keys.get("dated").await.unwrap();
    assert!(found.metadata.managed_fields.iter().flatten().any(|entry| is_in_2020(&entry.time)));
    let found = api.get("dated-secret").await.unwrap();
    assert!(found.metadata.managed_fields.iter().flatten().any(|entry| is_in_2020(&entry.time)));
    assert_eq!(value_of(&found), value_of(&secret));
    assert!(condition(&team.get("apikey/dated"), "Ready").is_some());
}
