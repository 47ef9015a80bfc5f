//! Who may do what, with real users, groups and ServiceAccounts on the real apiserver: each row of the seed's text about
//! types, permissions, policies and security settings has a test of its name. Gate 1 is the apiserver's own, gate 2 and
//! what a key carries are the webhook's; to a user there is one answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod controllers;
mod creators;
mod keys;
mod policies;
mod provenance;
mod restores;
mod reveals;
mod settings;

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::ensure;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use keywright::api::{AccessPolicy, ApiKey, SecuritySettings};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use support::{ControlPlane, PATIENCE, eventually};

/// A namespace in which everybody may read and write Keywright's kinds as far as Kubernetes is concerned, so that what is refused
/// is refused by Keywright.
pub(crate) struct Team {
    pub(crate) plane: &'static ControlPlane,
    pub(crate) admin: Client,
    pub(crate) namespace: String,
}

/// Somebody who works there.
pub(crate) struct Person {
    pub(crate) name: String,
    pub(crate) keys: Api<ApiKey>,
    pub(crate) policies: Api<AccessPolicy>,
    pub(crate) settings: Api<SecuritySettings>,
}

impl Team {
    pub(crate) async fn new() -> Self {
        let shared = support::shared().await;
        let admin = shared.client().await;
        let namespace = support::namespace(&admin).await;
        let team = Self { plane: shared.plane, admin, namespace };
        team.open().await;
        team
    }

    pub(crate) async fn open(&self) {
        let all = json!([{"apiGroups": ["keywright.dev"], "resources": ["apikeys", "accesspolicies", "securitysettings", "keyreveals"],
            "verbs": ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]}]);
        let everybody =
            json!({"kind": "Group", "name": "system:authenticated", "apiGroup": "rbac.authorization.k8s.io"});
        self.bind("everybody", &all, &everybody).await;
    }

    /// Lets somebody use a verb on a resource here, or on names of it everywhere.
    pub(crate) async fn allow(&self, name: &str, verb: &str, (group, resource): (&str, &str), only: Option<&str>) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let called = format!("allow-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let rules = json!([{"apiGroups": [group], "resources": [resource], "resourceNames": Vec::from_iter(only), "verbs": [verb]}]);
        if only.is_none() {
            self.bind(&called, &rules, &user(name)).await;
        } else {
            let called = format!("{called}-{}", self.namespace);
            let made: Api<ClusterRole> = Api::all(self.admin.clone());
            let bindings: Api<ClusterRoleBinding> = Api::all(self.admin.clone());
            let role = json!({"metadata": {"name": called}, "rules": rules});
            made.create(&PostParams::default(), &serde_json::from_value(role).unwrap()).await.expect("a ClusterRole");
            let binding = json!({"metadata": {"name": called}, "subjects": [user(name)], "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": called}});
            let binding = serde_json::from_value(binding).unwrap();
            bindings.create(&PostParams::default(), &binding).await.expect("a ClusterRoleBinding");
        }
        self.until_allowed(name, verb, (group, resource), only).await;
    }

    /// Waits until the authorizer knows that somebody may use a verb, here or on a name everywhere.
    pub(crate) async fn until_allowed(
        &self,
        name: &str,
        verb: &str,
        (group, resource): (&str, &str),
        only: Option<&str>,
    ) {
        let namespace = if only.is_none() { self.namespace.as_str() } else { "" };
        let review = serde_json::from_value(json!({"metadata": {}, "spec": {"user": name, "resourceAttributes": {
            "group": group, "resource": resource, "verb": verb, "name": only, "namespace": namespace}}}))
        .unwrap();
        let reviews: Api<SubjectAccessReview> = Api::all(self.admin.clone());
        eventually(&format!("{name} may {verb} {resource}"), PATIENCE, async || {
            let answer = reviews.create(&PostParams::default(), &review).await?;
            ensure!(answer.status.is_some_and(|status| status.allowed), "not yet");
            Ok(())
        })
        .await;
    }

    /// Binds one of Kubernetes' own roles, or of the chart's, and nothing else.
    pub(crate) async fn with_role(&self, name: &str, cluster_role: &str) -> Person {
        let bindings: Api<RoleBinding> = Api::namespaced(self.admin.clone(), &self.namespace);
        let binding = json!({"metadata": {"name": format!("{name}-{cluster_role}")}, "subjects": [user(name)], "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": cluster_role}});
        let binding = serde_json::from_value(binding).unwrap();
        bindings.create(&PostParams::default(), &binding).await.expect("a RoleBinding");
        let client = self.plane.client_as(name, &[]).await.expect("a client");
        self.of(name, &client)
    }

    async fn bind(&self, name: &str, rules: &Value, subject: &Value) {
        let made: Api<Role> = Api::namespaced(self.admin.clone(), &self.namespace);
        let bindings: Api<RoleBinding> = Api::namespaced(self.admin.clone(), &self.namespace);
        let role = serde_json::from_value(json!({"metadata": {"name": name}, "rules": rules})).unwrap();
        made.create(&PostParams::default(), &role).await.expect("a Role");
        let binding = serde_json::from_value(json!({
            "metadata": {"name": name}, "subjects": [subject],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        }));
        bindings.create(&PostParams::default(), &binding.unwrap()).await.expect("a RoleBinding");
    }

    /// Grants rights to use permissions and presets, and waits until the authorizer knows.
    pub(crate) async fn grant(&self, subject: &Value, permissions: &[&str], presets: &[&str]) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("grant-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let kinds = [("permissions", permissions), ("presets", presets)];
        let rules: Vec<_> = kinds
            .iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(kind, names)| {
                json!({"apiGroups": ["keywright.dev"], "resources": [kind], "resourceNames": names, "verbs": ["use"]})
            })
            .collect();
        if rules.is_empty() {
            return;
        }
        self.bind(&name, &json!(rules), subject).await;
        let (user, groups) = match subject["kind"].as_str() {
            Some("Group") => ("somebody".to_owned(), vec![subject["name"].clone()]),
            Some("ServiceAccount") => {
                (format!("system:serviceaccount:{}:{}", self.namespace, subject["name"].as_str().unwrap()), vec![])
            }
            _ => (subject["name"].as_str().unwrap().to_owned(), vec![]),
        };
        let reviews: Api<SubjectAccessReview> = Api::all(self.admin.clone());
        for (kind, names) in kinds {
            for right in names {
                let review = serde_json::from_value(json!({"metadata": {}, "spec": {"user": user, "groups": groups,
                    "resourceAttributes": {"group": "keywright.dev", "version": "*", "resource": kind, "verb": "use",
                        "name": right, "namespace": self.namespace}}}))
                .unwrap();
                eventually(&format!("{user} may use {right}"), PATIENCE, async || {
                    let answer = reviews.create(&PostParams::default(), &review).await?;
                    ensure!(answer.status.is_some_and(|status| status.allowed), "not yet");
                    Ok(())
                })
                .await;
            }
        }
    }

    /// A user with these permissions and presets, in these groups.
    pub(crate) async fn person(&self, name: &str, groups: &[&str], permissions: &[&str], presets: &[&str]) -> Person {
        self.grant(&user(name), permissions, presets).await;
        let client = self.plane.client_as(name, groups).await.expect("a client");
        self.of(name, &client)
    }

    pub(crate) fn of(&self, name: &str, client: &Client) -> Person {
        Person {
            name: name.to_owned(),
            keys: Api::namespaced(client.clone(), &self.namespace),
            policies: Api::namespaced(client.clone(), &self.namespace),
            settings: Api::namespaced(client.clone(), &self.namespace),
        }
    }

    /// The administrator, who holds every right.
    pub(crate) fn admin(&self) -> Person {
        self.of("admin", &self.admin)
    }
}

pub(crate) fn user(name: &str) -> Value {
    json!({"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"})
}

impl Person {
    pub(crate) async fn create(&self, name: &str, spec: &Value) -> Result<ApiKey, String> {
        let key = manifest("ApiKey", name, spec);
        let params = PostParams::default();
        refusal(self.keys.create(&params, &serde_json::from_value(key).unwrap()).await)
    }

    pub(crate) async fn edit(&self, name: &str, spec: &Value) -> Result<ApiKey, String> {
        refusal(self.keys.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await)
    }

    /// Changes metadata by a merge patch.
    pub(crate) async fn mark(&self, name: &str, metadata: &Value) -> Result<ApiKey, String> {
        let patch = Patch::Merge(json!({"metadata": metadata}));
        refusal(self.keys.patch(name, &PatchParams::default(), &patch).await)
    }

    pub(crate) async fn delete(&self, name: &str) -> Result<(), String> {
        refusal(self.keys.delete(name, &DeleteParams::default()).await.map(drop))
    }

    pub(crate) async fn write_policy(&self, name: &str, spec: &Value) -> Result<AccessPolicy, String> {
        let policy = serde_json::from_value(manifest("AccessPolicy", name, spec)).unwrap();
        refusal(self.policies.create(&PostParams::default(), &policy).await)
    }

    pub(crate) async fn edit_policy(&self, name: &str, spec: &Value) -> Result<AccessPolicy, String> {
        refusal(self.policies.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await)
    }

    pub(crate) async fn write_settings(&self, spec: &Value) -> Result<SecuritySettings, String> {
        let settings = manifest("SecuritySettings", "default", spec);
        let params = PatchParams::apply(&self.name).force();
        refusal(self.settings.patch("default", &params, &Patch::Apply(settings)).await)
    }
}

pub(crate) fn manifest(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// The text of a refusal that is about who asks; any other failure is one of the test.
fn refusal<T>(answer: kube::Result<T>) -> Result<T, String> {
    answer.map_err(|error| match error {
        kube::Error::Api(status) if status.is_forbidden() => status.message,
        error => panic!("{error}"),
    })
}

/// Holds that something was refused, for a reason that is named.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(answer: Result<T, String>, words: &[&str]) {
    let message = answer.expect_err("this must be refused");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

pub(crate) const TEAM: &str = "team-custom-api-keys:Manage";
pub(crate) const DATA: &str = "data-ingest-api-keys:Manage";
pub(crate) const PERSONAL: &str = "personal-custom-api-keys:Manage";
pub(crate) const DATA_POLICY: &str = "data-ingest-api-keys:UpdateAccessPolicy";
pub(crate) const TEAM_POLICY: &str = "team-custom-api-keys:UpdateAccessPolicy";

pub(crate) fn team() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

pub(crate) fn data() -> Value {
    json!({"type": "SendYourData", "presets": ["SendData"]})
}

pub(crate) fn personal(user: &str) -> Value {
    json!({"type": "Personal", "user": user, "presets": ["Alerts"]})
}

/// `spec` with an access policy.
pub(crate) fn under(policy: &str, mut spec: Value) -> Value {
    spec["accessPolicyRef"] = json!({"name": policy});
    spec
}

/// Waits until the operator has seen what the apiserver has: answers about policies and settings come from its memory.
pub(crate) async fn seen<T>(what: &str, probe: impl AsyncFnMut() -> anyhow::Result<T>) -> T {
    eventually(what, PATIENCE, probe).await
}

pub(crate) fn creator(object: &impl ResourceExt) -> Option<&str> {
    object.annotations().get("keywright.dev/creator").map(String::as_str)
}
