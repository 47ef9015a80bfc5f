//! Authorization of real users, groups and ServiceAccounts on a real API server: each rule of docs/specification.md,
//! sections "Key types", "Permissions", "Access policies" and "Security settings", has a test. The API server checks
//! the role (gate 1); the webhook checks access policies (gate 2) and the permissions that a key carries.

mod controllers;
mod creators;
mod keys;
mod policies;
mod provenance;
mod restores;
mod reveals;
mod settings;

use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::{ControlPlane, TIMEOUT, eventually};
use anyhow::ensure;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use keywright::api::{AccessPolicy, ApiKey, SecuritySettings};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

/// A namespace in which RBAC lets every user read and write Keywright's kinds, so that every denial is Keywright's.
pub(crate) struct Team {
    pub(crate) plane: &'static ControlPlane,
    pub(crate) admin: Client,
    pub(crate) namespace: String,
}

/// A user or ServiceAccount, with clients for the team's namespace.
pub(crate) struct Person {
    pub(crate) name: String,
    pub(crate) keys: Api<ApiKey>,
    pub(crate) policies: Api<AccessPolicy>,
    pub(crate) settings: Api<SecuritySettings>,
}

impl Team {
    pub(crate) async fn new() -> Self {
        let shared = crate::support::shared().await;
        let admin = shared.client().await;
        let namespace = crate::support::namespace(&admin).await;
        let team = Self { plane: shared.plane, admin, namespace };
        team.allow_all_verbs().await;
        team
    }

    pub(crate) async fn allow_all_verbs(&self) {
        let all = json!([{"apiGroups": ["keywright.dev"],
            "resources": ["apikeys", "accesspolicies", "securitysettings", "keyreveals"],
            "verbs": ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]}]);
        let authenticated =
            json!({"kind": "Group", "name": "system:authenticated", "apiGroup": "rbac.authorization.k8s.io"});
        self.bind("authenticated", &all, &authenticated).await;
    }

    /// Grants a user a verb on a resource in this namespace or, with `only`, on one resource name in the whole cluster.
    pub(crate) async fn allow(&self, name: &str, verb: &str, (group, resource): (&str, &str), only: Option<&str>) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let role_name = format!("allow-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let rules = json!([{"apiGroups": [group], "resources": [resource], "resourceNames": Vec::from_iter(only),
            "verbs": [verb]}]);
        if only.is_none() {
            self.bind(&role_name, &rules, &user_subject(name)).await;
        } else {
            let role_name = format!("{role_name}-{}", self.namespace);
            let cluster_roles: Api<ClusterRole> = Api::all(self.admin.clone());
            let bindings: Api<ClusterRoleBinding> = Api::all(self.admin.clone());
            let role = json!({"metadata": {"name": role_name}, "rules": rules});
            cluster_roles
                .create(&PostParams::default(), &serde_json::from_value(role).unwrap())
                .await
                .expect("a ClusterRole");
            let binding = json!({"metadata": {"name": role_name}, "subjects": [user_subject(name)], "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role_name}});
            let binding = serde_json::from_value(binding).unwrap();
            bindings.create(&PostParams::default(), &binding).await.expect("a ClusterRoleBinding");
        }
        self.wait_until_allowed(name, verb, (group, resource), only).await;
    }

    /// Waits until the API server's authorizer applies a grant of [`Self::allow`].
    pub(crate) async fn wait_until_allowed(
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
        eventually(&format!("{name} may {verb} {resource}"), TIMEOUT, async || {
            let answer = reviews.create(&PostParams::default(), &review).await?;
            ensure!(answer.status.is_some_and(|status| status.allowed), "the authorizer denies it");
            Ok(())
        })
        .await;
    }

    /// Binds only `cluster_role`, a ClusterRole of Kubernetes or of the chart.
    pub(crate) async fn with_role(&self, name: &str, cluster_role: &str) -> Person {
        let bindings: Api<RoleBinding> = Api::namespaced(self.admin.clone(), &self.namespace);
        let binding = json!({
            "metadata": {"name": format!("{name}-{cluster_role}")}, "subjects": [user_subject(name)],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": cluster_role},
        });
        let binding = serde_json::from_value(binding).unwrap();
        bindings.create(&PostParams::default(), &binding).await.expect("a RoleBinding");
        let client = self.plane.client_as(name, &[]).await.expect("a client");
        self.as_user(name, &client)
    }

    async fn bind(&self, name: &str, rules: &Value, subject: &Value) {
        let namespace_roles: Api<Role> = Api::namespaced(self.admin.clone(), &self.namespace);
        let bindings: Api<RoleBinding> = Api::namespaced(self.admin.clone(), &self.namespace);
        let role = serde_json::from_value(json!({"metadata": {"name": name}, "rules": rules})).unwrap();
        namespace_roles.create(&PostParams::default(), &role).await.expect("a Role");
        let binding = serde_json::from_value(json!({
            "metadata": {"name": name}, "subjects": [subject],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        }));
        bindings.create(&PostParams::default(), &binding.unwrap()).await.expect("a RoleBinding");
    }

    /// Grants rights to use permissions and presets, and waits until the API server's authorizer applies them.
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
            Some("Group") => ("any-user".to_owned(), vec![subject["name"].clone()]),
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
                eventually(&format!("{user} may use {right}"), TIMEOUT, async || {
                    let answer = reviews.create(&PostParams::default(), &review).await?;
                    ensure!(answer.status.is_some_and(|status| status.allowed), "the authorizer denies it");
                    Ok(())
                })
                .await;
            }
        }
    }

    /// Returns a user in `groups` who holds these permissions and presets.
    pub(crate) async fn person(&self, name: &str, groups: &[&str], permissions: &[&str], presets: &[&str]) -> Person {
        self.grant(&user_subject(name), permissions, presets).await;
        let client = self.plane.client_as(name, groups).await.expect("a client");
        self.as_user(name, &client)
    }

    pub(crate) fn as_user(&self, name: &str, client: &Client) -> Person {
        Person {
            name: name.to_owned(),
            keys: Api::namespaced(client.clone(), &self.namespace),
            policies: Api::namespaced(client.clone(), &self.namespace),
            settings: Api::namespaced(client.clone(), &self.namespace),
        }
    }

    /// Returns the administrator of the cluster, who is in `system:masters`.
    pub(crate) fn admin(&self) -> Person {
        self.as_user("admin", &self.admin)
    }
}

pub(crate) fn user_subject(name: &str) -> Value {
    json!({"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"})
}

impl Person {
    pub(crate) async fn create(&self, name: &str, spec: &Value) -> Result<ApiKey, String> {
        let key = manifest("ApiKey", name, spec);
        let params = PostParams::default();
        map_forbidden(self.keys.create(&params, &serde_json::from_value(key).unwrap()).await)
    }

    pub(crate) async fn edit(&self, name: &str, spec: &Value) -> Result<ApiKey, String> {
        map_forbidden(self.keys.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await)
    }

    /// Changes metadata with a JSON merge patch.
    pub(crate) async fn patch_metadata(&self, name: &str, metadata: &Value) -> Result<ApiKey, String> {
        let patch = Patch::Merge(json!({"metadata": metadata}));
        map_forbidden(self.keys.patch(name, &PatchParams::default(), &patch).await)
    }

    pub(crate) async fn delete(&self, name: &str) -> Result<(), String> {
        map_forbidden(self.keys.delete(name, &DeleteParams::default()).await.map(drop))
    }

    pub(crate) async fn write_policy(&self, name: &str, spec: &Value) -> Result<AccessPolicy, String> {
        let policy = serde_json::from_value(manifest("AccessPolicy", name, spec)).unwrap();
        map_forbidden(self.policies.create(&PostParams::default(), &policy).await)
    }

    pub(crate) async fn edit_policy(&self, name: &str, spec: &Value) -> Result<AccessPolicy, String> {
        map_forbidden(self.policies.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await)
    }

    pub(crate) async fn write_settings(&self, spec: &Value) -> Result<SecuritySettings, String> {
        let settings = manifest("SecuritySettings", "default", spec);
        let params = PatchParams::apply(&self.name).force();
        map_forbidden(self.settings.patch("default", &params, &Patch::Apply(settings)).await)
    }
}

pub(crate) fn manifest(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// Maps a 403 to its message; panics on any other error.
fn map_forbidden<T>(answer: kube::Result<T>) -> Result<T, String> {
    answer.map_err(|error| match error {
        kube::Error::Api(status) if status.is_forbidden() => status.message,
        error => panic!("{error}"),
    })
}

/// Asserts that a request was denied and that the message contains `words`.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(answer: Result<T, String>, words: &[&str]) {
    let message = answer.expect_err("the request must be denied");
    for word in words {
        assert!(message.contains(word), "the message must contain {word:?}: {message:?}");
    }
}

pub(crate) const MANAGE_TEAM_KEYS: &str = "team-custom-api-keys:Manage";
pub(crate) const MANAGE_DATA_KEYS: &str = "data-ingest-api-keys:Manage";
pub(crate) const MANAGE_PERSONAL_KEYS: &str = "personal-custom-api-keys:Manage";
pub(crate) const UPDATE_DATA_POLICY: &str = "data-ingest-api-keys:UpdateAccessPolicy";
pub(crate) const UPDATE_TEAM_POLICY: &str = "team-custom-api-keys:UpdateAccessPolicy";

pub(crate) fn team_key() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

pub(crate) fn data_key() -> Value {
    json!({"type": "SendYourData", "presets": ["SendData"]})
}

pub(crate) fn personal_key(user: &str) -> Value {
    json!({"type": "Personal", "user": user, "presets": ["Alerts"]})
}

/// Returns `spec` with a reference to an access policy.
pub(crate) fn with_policy(policy: &str, mut spec: Value) -> Value {
    spec["accessPolicyRef"] = json!({"name": policy});
    spec
}

/// Retries `probe` until the operator's watch cache, from which the webhook answers, has caught up with the API server.
pub(crate) async fn wait_until<T>(condition: &str, probe: impl AsyncFnMut() -> anyhow::Result<T>) -> T {
    eventually(condition, TIMEOUT, probe).await
}

pub(crate) fn creator(object: &impl ResourceExt) -> Option<&str> {
    object.annotations().get("keywright.dev/creator").map(String::as_str)
}
