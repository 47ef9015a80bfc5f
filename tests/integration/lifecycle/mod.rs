//! The lifecycle of keys in a real cluster: minting, rotation, expiry, loss and deletion, admission, and secrecy of
//! values. Each test has its own namespace. All tests share one operator that logs at level trace, so that [`security`]
//! can search the logs of all tests for values.

mod admission;
mod attacks;
mod bypass;
mod gitops;
mod keys;
mod legacy;
mod policies;
mod restore;
mod rotation;
mod secret_writes;
mod security;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::support::control_plane::output;
use crate::support::keys::{condition, value_of};
use crate::support::wait_for_catalog;
use crate::support::{ControlPlane, Operator, Options, Proxy, Release, TIMEOUT, eventually, from_now, retry};
use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicyBinding, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use keywright::api::{ApiKey, ApiKeyStatus, KeyState, Token};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::{OnceCell, RwLock};

/// The operator's `secretCheckInterval` in these tests.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The label of namespaces in which the validating webhook and the status guard do not apply. Tests create there
/// objects that otherwise exist only after a catalog changed or while admission was disabled.
const BYPASS: &str = "test.example.com/bypass";

/// The cluster of this test target.
pub(crate) struct Cluster {
    pub(crate) plane: &'static ControlPlane,
    release: Release,
    /// All operators use this proxy, so that tests see their requests.
    pub(crate) proxy: Proxy,
    /// [`Cluster::restart`] writes it. A test holds a read guard while it needs one process.
    pub(crate) operator: RwLock<Operator>,
}

pub(crate) async fn cluster() -> &'static Cluster {
    static CLUSTER: OnceCell<Result<Cluster>> = OnceCell::const_new();
    let cluster = CLUSTER.get_or_init(Cluster::start).await;
    cluster.as_ref().unwrap_or_else(|error| panic!("no cluster: {error:#}"))
}

impl Cluster {
    async fn start() -> Result<Self> {
        let plane = crate::support::plane().await;
        let check = format!("secretCheckInterval={}s", CHECK_INTERVAL.as_secs());
        // The control plane runs this admission plugin, and restored Secrets are adopted here.
        let adopt = "rbac.ownerReferencesPermissionEnforcement=true";
        let release = Release::install(plane, &[&check, "log.level=trace", adopt]).await?;
        let proxy = Proxy::start(plane)?;
        let options = Options { server: Some(proxy.url().to_owned()), ..Options::default() };
        let operator = Operator::start(plane, &release, options).await?;
        operator.wait_ready().await?;
        let accepted = wait_for_catalog(plane, TIMEOUT).await;
        accepted.with_context(|| format!("the operator's log:\n{}", operator.log()))?;
        let cluster = Self { plane, release, proxy, operator: RwLock::new(operator) };
        cluster.configure_bypass().await?;
        Ok(cluster)
    }

    async fn configure_bypass(&self) -> Result<()> {
        let client = self.plane.client().await?;
        let outside = json!({"matchExpressions": [{"key": BYPASS, "operator": "DoesNotExist"}]});
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
        let patch = json!({"webhooks": [{"name": "apikeys.keywright.dev", "namespaceSelector": outside}]});
        webhooks.patch("keywright", &PatchParams::default(), &Patch::Strategic(patch)).await?;
        let guards: Api<ValidatingAdmissionPolicyBinding> = Api::all(client.clone());
        let patch = json!({"spec": {"matchResources": {"namespaceSelector": outside}}});
        guards.patch("keywright-status-guard", &PatchParams::default(), &Patch::Merge(patch)).await?;

        // The apiserver applies both changes with a delay.
        let namespace = bypassed(&client).await;
        let keys: Api<ApiKey> = Api::namespaced(client, &namespace);
        let invalid = key("invalid", &json!({"type": "Team", "presets": ["NoSuchPreset"]}));
        retry("admission is bypassed", TIMEOUT, async || {
            if keys.get_opt("invalid").await?.is_none() {
                keys.create(&PostParams::default(), &invalid).await?;
            }
            let mut invalid = keys.get("invalid").await?;
            invalid.status.get_or_insert_default().observed_generation = None;
            keys.replace_status("invalid", &PostParams::default(), &invalid).await.context("status")
        })
        .await?;
        keys.delete("invalid", &DeleteParams::default()).await?;
        Ok(())
    }

    /// Replaces the operator as a Deployment does: the new process is ready before the old one is stopped. In-memory
    /// state of the old process is lost.
    pub(crate) async fn restart(&self) {
        let mut operator = self.operator.write().await;
        let address = self.release.webhook_address(&operator);
        let replica = if address.starts_with("127.0.0.2:") { 3 } else { 2 };
        let server = Some(self.proxy.url().to_owned());
        let options = Options { replica, server, ..Options::default() };
        let new = Operator::start(self.plane, &self.release, options).await.expect("another operator");
        new.wait_ready().await.expect("another operator");
        self.release.route_webhook(self.plane, replica).await.expect("a route");
        let old = std::mem::replace(&mut *operator, new);
        let status = old.terminate().await.expect("the old operator ends");
        assert!(status.success(), "the old operator ended with {status}");
        retry("the new operator leads", TIMEOUT, async || {
            let leads = operator.metrics().await?.contains("keywright_leader 1");
            ensure!(leads, "the new operator does not lead");
            Ok(())
        })
        .await
        .expect("a leader");
    }

    /// The log files of all operators of this cluster.
    pub(crate) fn logs(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.plane.folder()).expect("the folder of the control plane");
        let is_log =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("operator-"));
        files.flatten().map(|file| file.path()).filter(is_log).filter(|path| path.is_file()).collect()
    }
}

/// Creates a namespace in which admission is bypassed.
async fn bypassed(client: &Client) -> String {
    let name = crate::support::namespace(client).await;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let label = json!({"metadata": {"labels": {BYPASS: "true"}}});
    namespaces.patch(&name, &PatchParams::default(), &Patch::Merge(label)).await.expect("a label");
    name
}

pub(crate) fn key(name: &str, spec: &Value) -> ApiKey {
    serde_json::from_value(manifest(name, spec)).expect("an ApiKey")
}

pub(crate) fn manifest(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec})
}

/// A minimal spec of a Team key.
pub(crate) fn team_spec() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

/// [`team_spec`] with additional fields.
pub(crate) fn spec_with(additional: Value) -> Value {
    let mut spec = team_spec();
    let (Value::Object(fields), Value::Object(additional)) = (&mut spec, additional) else { panic!("not an object") };
    fields.extend(additional);
    spec
}

/// A namespace and its administrator.
pub(crate) struct Team {
    pub(crate) cluster: &'static Cluster,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) keys: Api<ApiKey>,
    pub(crate) secrets: Api<Secret>,
}

impl Team {
    pub(crate) async fn new() -> Self {
        let cluster = cluster().await;
        let client = cluster.plane.client().await.expect("a client");
        let namespace = crate::support::namespace(&client).await;
        Self::of(cluster, client, namespace)
    }

    /// A team in a namespace in which admission is bypassed.
    pub(crate) async fn bypassing() -> Self {
        let cluster = cluster().await;
        let client = cluster.plane.client().await.expect("a client");
        let namespace = bypassed(&client).await;
        let team = Self::of(cluster, client, namespace);
        // The apiserver applies the label of the namespace with a delay.
        let probe = key("probe", &spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"})));
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        let passes = async || team.keys.create(&dry_run, &probe).await.map_err(Into::into);
        crate::support::eventually("the webhook is bypassed", TIMEOUT, passes).await;
        team
    }

    fn of(cluster: &'static Cluster, client: Client, namespace: String) -> Self {
        let keys = Api::namespaced(client.clone(), &namespace);
        let secrets = Api::namespaced(client.clone(), &namespace);
        Self { cluster, client, namespace, keys, secrets }
    }

    pub(crate) async fn create(&self, name: &str, spec: Value) -> ApiKey {
        self.keys.create(&PostParams::default(), &key(name, &spec)).await.expect("the ApiKey is created")
    }

    /// Changes a spec by a merge patch.
    pub(crate) async fn edit(&self, name: &str, spec: Value) -> ApiKey {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.keys.patch(name, &PatchParams::default(), &patch).await.expect("the ApiKey is changed")
    }

    /// The first version of a key, starting with `from`, for which `is` returns true. It uses a watch, so that no
    /// version is missed.
    pub(crate) async fn after(&self, from: &ApiKey, goal: &str, is: impl Fn(&ApiKey) -> bool) -> ApiKey {
        let name = from.name_any();
        let (mut version, mut last) = (from.resource_version().expect("a version"), from.clone());
        if is(&last) {
            return last;
        }
        let params = WatchParams::default().fields(&format!("metadata.name={name}"));
        let found = async {
            loop {
                let Ok(stream) = self.keys.watch(&params, &version).await else { continue };
                let mut stream = std::pin::pin!(stream);
                while let Some(Ok(event)) = stream.next().await {
                    if let WatchEvent::Added(seen) | WatchEvent::Modified(seen) = event {
                        version = seen.resource_version().expect("a version");
                        last = seen;
                        if is(&last) {
                            return;
                        }
                    }
                }
            }
        };
        let found = tokio::time::timeout(TIMEOUT, found).await;
        assert!(found.is_ok(), "{name}: {goal}: not reached within {TIMEOUT:?}; last status: {:#?}", last.status);
        last
    }

    /// The first version of a key, starting with the current one, for which `is` returns true.
    pub(crate) async fn until(&self, name: &str, goal: &str, is: impl Fn(&ApiKey) -> bool) -> ApiKey {
        let now = self.keys.get(name).await.expect("the ApiKey");
        self.after(&now, goal, is).await
    }

    /// Waits until the operator has processed the current spec, successfully or not.
    pub(crate) async fn settled(&self, name: &str) -> ApiKey {
        self.until(name, "the operator has processed the spec", is_up_to_date).await
    }

    /// Waits until the key is Ready in its current generation.
    pub(crate) async fn ready(&self, name: &str) -> ApiKey {
        self.until(name, "ready", |key| crate::support::keys::settled(key).is_ok()).await
    }

    /// Creates a key and waits until it is Ready; returns the key and its value.
    pub(crate) async fn minted(&self, name: &str, spec: Value) -> (ApiKey, String) {
        self.create(name, spec).await;
        let key = self.ready(name).await;
        let secret_ref = status(&key).secret_ref.as_ref().expect("secretRef");
        let value =
            value_of(&self.secrets.get(&secret_ref.name).await.expect("the Secret")).expect("a value in the Secret");
        (key, value)
    }

    /// The Secret `{name}-secret`.
    pub(crate) async fn secret(&self, name: &str) -> Secret {
        self.secrets.get(&format!("{name}-secret")).await.expect("the Secret")
    }

    /// The value in the Secret `{name}-secret`.
    pub(crate) async fn value(&self, name: &str) -> String {
        value_of(&self.secret(name).await).expect("a value in the Secret")
    }

    /// Changes the Secret `{name}-secret` by a merge patch of the administrator.
    pub(crate) async fn tamper(&self, name: &str, patch: Value) -> Secret {
        let name = format!("{name}-secret");
        self.secrets.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("the Secret is changed")
    }

    /// Changes the record in the Secret `{name}-secret` without updating its MAC.
    pub(crate) async fn forge(&self, name: &str, change: impl FnOnce(&mut Value)) -> Secret {
        let mut record = record(&self.secret(name).await);
        change(&mut record);
        self.tamper(name, json!({"metadata": {"annotations": {crate::support::keys::RECORD: record.to_string()}}}))
            .await
    }

    /// Creates a Secret that does not belong to the operator.
    pub(crate) async fn foreign(&self, name: &str, metadata: Value) -> Secret {
        let mut secret = json!({"metadata": metadata, "stringData": {"password": "foreign"}});
        secret["metadata"]["name"] = json!(name);
        let secret: Secret = serde_json::from_value(secret).expect("a Secret");
        self.secrets.create(&PostParams::default(), &secret).await.expect("the Secret is created")
    }

    /// Deletes a key, and waits until it and its Secret are gone.
    pub(crate) async fn delete(&self, name: &str) {
        self.keys.delete(name, &DeleteParams::background()).await.expect("the ApiKey is deleted");
        let secret = format!("{name}-secret");
        eventually("key and Secret are gone", TIMEOUT, async || {
            ensure!(self.keys.get_opt(name).await?.is_none(), "the ApiKey still exists");
            ensure!(self.secrets.get_opt(&secret).await?.is_none(), "the Secret still exists");
            Ok(())
        })
        .await;
    }

    /// Runs kubectl in the team's namespace and returns its standard output.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Result<String> {
        output(self.cluster.plane.kubectl().args(["-n", &self.namespace]).args(args))
    }

    /// Writes a manifest to a file and returns its path.
    pub(crate) fn file(&self, manifest: &Value) -> String {
        let name = format!("{}-{}.json", self.namespace, manifest["metadata"]["name"].as_str().expect("a name"));
        let path = self.cluster.plane.folder().join(name);
        std::fs::write(&path, manifest.to_string()).expect("a file");
        path.to_string_lossy().into_owned()
    }

    /// Waits for an Event about a key, and returns its note.
    pub(crate) async fn event(&self, name: &str, reason: &str) -> String {
        use k8s_openapi::api::events::v1::Event;
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        eventually(&format!("Event {reason} of {name}"), TIMEOUT, async || {
            let all = events.list(&kube::api::ListParams::default()).await?;
            let regards_key = |event: &&Event| event.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(name);
            let events: Vec<_> = all.iter().filter(regards_key).collect();
            let found = events.iter().find(|event| event.reason.as_deref() == Some(reason));
            let reasons: Vec<_> = events.iter().map(|event| event.reason.as_deref().unwrap_or_default()).collect();
            Ok(found.with_context(|| format!("found only Events {reasons:?}"))?.note.clone().unwrap_or_default())
        })
        .await
    }
}

/// The record in a Secret.
pub(crate) fn record(secret: &Secret) -> Value {
    serde_json::from_str(&secret.annotations()[crate::support::keys::RECORD]).expect("the record is JSON")
}

/// The Secret as a backup contains it, without the fields that the apiserver sets.
pub(crate) fn backup(secret: &Secret) -> Secret {
    let mut copy = secret.clone();
    copy.metadata.uid = None;
    copy.metadata.resource_version = None;
    copy.metadata.creation_timestamp = None;
    copy.metadata.managed_fields = None;
    copy
}

/// A value as Secret data.
pub(crate) fn data(value: &str) -> ByteString {
    ByteString(value.as_bytes().to_vec())
}

pub(crate) fn status(key: &ApiKey) -> &ApiKeyStatus {
    key.status.as_ref().expect("a status")
}

pub(crate) fn tokens(key: &ApiKey) -> &[Token] {
    key.status.as_ref().map_or(&[], |status| &status.tokens)
}

pub(crate) fn state(key: &ApiKey) -> Option<KeyState> {
    key.status.as_ref().and_then(|status| status.state)
}

/// The reason of condition Ready; empty without one.
pub(crate) fn reason(key: &ApiKey) -> &str {
    condition(key, "Ready").map_or("", |ready| ready.reason.as_str())
}

pub(crate) fn is_up_to_date(key: &ApiKey) -> bool {
    key.status.as_ref().is_some_and(|status| status.observed_generation == key.metadata.generation)
}

/// Asserts that the key is not Ready and Stalled with this reason: only a user can fix it.
#[track_caller]
pub(crate) fn assert_stalled(key: &ApiKey, expected: &str) {
    let ready = condition(key, "Ready").expect("condition Ready");
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", expected), "{}", ready.message);
    assert_eq!(condition(key, "Stalled").map(|c| (c.status.as_str(), c.reason.as_str())), Some(("True", expected)));
    assert!(condition(key, "Reconciling").is_none(), "a stalled key is not Reconciling");
}
