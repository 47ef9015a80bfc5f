//! Reveals of sealed values in a real cluster: authorization, one-time reveal, and leaks. A proxy in front of the API
//! server injects faults into the operator's requests, and kills the operator between its writes.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::exclusive::SoleOperator;
use crate::support::keys::{RECORD, apply, base64, condition, find_value, metric, settled, sha256};
use crate::support::proxy::Record;
use crate::support::{Fault, eventually, output};
use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use hyper::Method;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{ResourceQuota, Secret};
use k8s_openapi::api::events::v1::Event;
use keywright::api::{ApiKey, ApiKeyStatus, Condition, KeyReveal, KeyState, RevealMode, RevealState, SecuritySettings};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// Long enough for backoffs after a fault on a slow machine.
const TIMEOUT: Duration = Duration::from_mins(2);

const ALICE: &str = "alice@example.com";
const MALLORY: &str = "mallory@example.com";

/// The only operator and a namespace, for one test.
struct Fixture {
    operator: SoleOperator,
    namespace: String,
}

impl Deref for Fixture {
    type Target = SoleOperator;

    fn deref(&self) -> &SoleOperator {
        &self.operator
    }
}

impl Fixture {
    async fn new(args: &[&str]) -> Self {
        let args = ["--secret-check-interval=2s", "--log=trace"].iter().chain(args).copied();
        let operator = SoleOperator::lock(args).await;
        let namespace = crate::support::namespace(&operator.client).await;
        let fixture = Self { operator, namespace };
        fixture.ensure_leader().await;
        fixture.exclude_reveals_from_webhook().await;
        fixture.wait_for_catalog().await;
        fixture
    }

    fn keys(&self) -> Api<ApiKey> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn settings(&self, spec: Value) {
        let settings: Api<SecuritySettings> = Api::namespaced(self.client.clone(), &self.namespace);
        let manifest = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "SecuritySettings", "metadata": {"name": "default"},
            "spec": spec,
        });
        let params = PatchParams::apply("test").force();
        settings.patch("default", &params, &Patch::Apply(&manifest)).await.expect("the settings are applied");
    }

    /// Excludes KeyReveals from the webhook, which makes the same decision as the controller earlier, so that the tests
    /// observe the controller's decision.
    async fn exclude_reveals_from_webhook(&self) {
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let condition = json!({"name": "no-requests", "expression": "request.resource.resource != 'keyreveals'"});
        let patch = json!({"webhooks": [{"name": "apikeys.keywright.dev", "matchConditions": [condition]}]});
        let params = PatchParams::default();
        webhooks.patch("keywright", &params, &Patch::Strategic(patch)).await.expect("the webhook is changed");
    }

    async fn apply(&self, name: &str, spec: &Value) {
        apply(&self.client, &self.namespace, name, spec).await.expect("the ApiKey");
    }

    async fn wait_for_key(
        &self,
        name: &str,
        title: &str,
        condition: impl Fn(&ApiKey, &ApiKeyStatus) -> bool,
    ) -> ApiKey {
        eventually(&format!("{name}: {title}"), TIMEOUT, async || {
            let key = self.keys().get(name).await?;
            let status = key.status.clone().context("no status")?;
            ensure!(condition(&key, &status), "{status:#?}");
            Ok(key)
        })
        .await
    }

    async fn create_minted(&self, name: &str, spec: &Value) -> ApiKey {
        self.apply(name, spec).await;
        self.wait_for_key(name, "ready", |key, _| settled(key).is_ok()).await
    }

    async fn secret(&self, name: &str) -> Secret {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        secrets.get(&format!("{name}-secret")).await.expect("the Secret")
    }

    /// Returns the names in the data of a key's Secret.
    async fn data_keys(&self, name: &str) -> BTreeSet<String> {
        self.secret(name).await.data.unwrap_or_default().into_keys().collect()
    }

    /// Grants a user the rights to create KeyReveals and to use all permissions and presets.
    fn grant_reveal(&self, user: &str) {
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "reveal"},
            "rules": [
                {"apiGroups": ["keywright.dev"], "resources": ["keyreveals"], "verbs": ["create", "get"]},
                {"apiGroups": ["keywright.dev"], "resources": ["permissions", "presets"], "verbs": ["use"]},
            ],
        });
        let name = user.split('@').next().unwrap();
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reveal"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        for (file, object) in [("role", role), ("binding", binding)] {
            let path = self.plane.folder().join(format!("{}-{name}-{file}.json", self.namespace));
            std::fs::write(&path, object.to_string()).unwrap();
            output(self.plane.kubectl().args(["-n", &self.namespace, "apply", "-f"]).arg(path)).unwrap();
        }
    }

    /// Creates a KeyReveal as `user`, or as the administrator.
    async fn request(&self, key: &str, user: Option<&str>, recipient: &str) -> KeyReveal {
        let (client, requester) = match user {
            None => (self.client.clone(), json!({"username": "admin", "groups": ["system:masters"]})),
            Some(user) => {
                let client = self.plane.client_as(user, &[]).await.expect("a client");
                (client, json!({"username": user, "groups": ["system:authenticated"]}))
            }
        };
        let reveals: Api<KeyReveal> = Api::namespaced(client, &self.namespace);
        let reveal: KeyReveal = serde_json::from_value(json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"generateName": format!("{key}-")},
            "spec": {"apiKeyRef": {"name": key}, "recipient": recipient, "requester": requester},
        }))
        .unwrap();
        // A new RoleBinding takes effect after a delay.
        eventually("the request is created", TIMEOUT, async || {
            Ok(reveals.create(&PostParams::default(), &reveal).await?)
        })
        .await
    }

    /// Waits until a KeyReveal is granted or denied.
    async fn wait_for_answer(&self, reveal: &KeyReveal) -> KeyReveal {
        let reveals: Api<KeyReveal> = Api::namespaced(self.client.clone(), &self.namespace);
        eventually("the request is answered", TIMEOUT, async || {
            let reveal = reveals.get(&reveal.name_any()).await?;
            granted(&reveal).context("no answer")?;
            Ok(reveal)
        })
        .await
    }

    fn reveals(&self) -> Api<KeyReveal> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Returns a command of the kubectl plugin, as administrator in this namespace.
    fn plugin(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        command.env("KUBECONFIG", self.plane.kubeconfig()).args(args).args(["-n", &self.namespace]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn path(&self, name: &str) -> String {
        self.plane.folder().join(format!("{}-{name}", self.namespace)).to_string_lossy().into_owned()
    }

    /// Matches the operator's patches of a key's Secret.
    fn secret_writes(&self, name: &str) -> impl Fn(&Record) -> bool + Send + Sync + 'static {
        let path = format!("/namespaces/{}/secrets/{name}-secret", self.namespace);
        move |request| request.method == Method::PATCH && request.path.ends_with(&path)
    }

    /// Matches the operator's patches of KeyReveals.
    fn status_writes(&self) -> impl Fn(&Record) -> bool + Send + Sync + 'static {
        let path = format!("/namespaces/{}/keyreveals/", self.namespace);
        move |request| request.method == Method::PATCH && request.path.contains(&path)
    }

    /// Waits until the data of a key's Secret has exactly these names.
    async fn wait_for_data(&self, name: &str, title: &str, expected: &[&str]) {
        eventually(title, TIMEOUT, async || {
            let data = self.data_keys(name).await;
            ensure!(data.iter().eq(expected), "{data:?}");
            Ok(())
        })
        .await;
    }

    /// Requests a value and decrypts it; returns reason and message if the request is denied.
    async fn reveal(&self, key: &str, user: Option<&str>) -> Result<String, (String, String)> {
        let identity = Identity::generate();
        let reveal = self.request(key, user, &identity.to_public().to_string()).await;
        decrypt(&self.wait_for_answer(&reveal).await, &identity)
    }

    /// Searches the files of etcd: its database and its write-ahead log.
    fn etcd_contains(&self, part: &str) -> bool {
        fn search(folder: &Path, part: &[u8]) -> bool {
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
                if path.is_dir() {
                    return search(&path, part);
                }
                std::fs::read(&path).is_ok_and(|bytes| {
                    let first = part[0];
                    bytes.iter().enumerate().any(|(at, byte)| *byte == first && bytes[at..].starts_with(part))
                })
            })
        }
        search(&self.plane.folder().join("etcd"), part.as_bytes())
    }

    /// Asserts that objects and logs of the operator contain no value, and that it never listed Secrets.
    fn assert_no_leaks(&self, values: &[String]) {
        let kinds = "apikeys,keyreveals,events.v1.events.k8s.io,configmaps";
        let objects = output(self.plane.kubectl().args(["get", kinds, "-A", "-o", "json"])).unwrap();
        let log = self.operator.operator().log();
        assert!(log.contains("TRACE"));
        for (source, text) in [("an object", &objects), ("the log", &log)] {
            assert!(find_value(text).is_none(), "{source} contains text in the format of a value");
            assert!(!text.contains("AGE-SECRET-KEY-"), "{source} contains an age identity");
            for value in values {
                assert!(!text.contains(value) && !text.contains(&base64(value)), "{source} contains a value");
            }
        }
        assert!(!log.contains("AGE ENCRYPTED FILE"), "the log contains an age ciphertext");
        // The operator may list its own Secrets by name only.
        let own = ["keywright-webhook-ca", "keywright-verifier-tls"].map(|name| format!("metadata.name%3D{name}"));
        let listed = self.proxy.requests().into_iter().any(|request| {
            request.path.ends_with("/secrets")
                && request.method == Method::GET
                && !own.iter().any(|name| request.query.contains(name))
        });
        assert!(!listed, "the operator listed Secrets");
    }
}

fn granted(reveal: &KeyReveal) -> Option<&Condition> {
    let mut conditions = reveal.status.as_ref()?.conditions.iter();
    conditions.find(|condition| condition.type_ == "Granted" && condition.status != "Unknown")
}

fn decrypt(reveal: &KeyReveal, identity: &Identity) -> Result<String, (String, String)> {
    let condition = granted(reveal).expect("the request is answered");
    let status = reveal.status.as_ref().unwrap();
    if condition.status == "False" {
        assert!(status.ciphertext.is_none());
        return Err((condition.reason.clone(), condition.message.clone()));
    }
    let value = age::decrypt(identity, status.ciphertext.as_ref().expect("a ciphertext").as_bytes())
        .expect("the recipient can decrypt the value");
    let value = String::from_utf8(value).unwrap();
    assert!(status.id.as_ref().unwrap().ends_with(&sha256(&value)[..16]));
    Ok(value)
}

fn denial_reason<T>(result: &Result<T, (String, String)>) -> &str {
    result.as_ref().err().map_or("granted", |(reason, _)| reason.as_str())
}

fn status(key: &ApiKey) -> &ApiKeyStatus {
    key.status.as_ref().expect("a status")
}

fn reveal_state(status: &ApiKeyStatus) -> Option<(RevealMode, RevealState)> {
    status.reveal.as_ref().map(|reveal| (reveal.mode, reveal.state))
}

fn personal_key() -> Value {
    json!({"type": "Personal", "user": ALICE, "presets": ["Alerts"]})
}

fn team_key() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

fn with_rotation_request(mut spec: Value, at: &str) -> Value {
    spec["rotation"] = json!({"requestedAt": at, "overlap": "0s"});
    spec
}

#[tokio::test]
async fn a_personal_key_is_sealed_and_revealed_to_its_user_alone() {
    let fixture = Fixture::new(&[]).await;
    let key = fixture.create_minted("laptop", &personal_key()).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Unrevealed)));
    let ready = condition(&key, "Ready").unwrap();
    assert!(ready.message.contains("kubectl keywright reveal"), "{}", ready.message);
    assert_eq!(fixture.data_keys("laptop").await, ["sealed-value".to_owned()].into());
    fixture.grant_reveal(ALICE);
    fixture.grant_reveal(MALLORY);

    assert_eq!(denial_reason(&fixture.reveal("laptop", Some(MALLORY)).await), "OwnerDenied");
    assert_eq!(denial_reason(&fixture.reveal("laptop", None).await), "OwnerDenied", "an administrator is denied too");
    let value = fixture.reveal("laptop", Some(ALICE)).await.unwrap();
    assert!(value.starts_with("kwp_"));
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    let key = fixture
        .wait_for_key("laptop", "the status names the requester", |_, s| {
            s.reveal.as_ref().is_some_and(|r| r.by.is_some())
        })
        .await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Revealed)));
    assert_eq!(status(&key).reveal.as_ref().unwrap().by.as_deref(), Some(ALICE));
    assert_eq!(fixture.reveal("laptop", Some(ALICE)).await.unwrap(), value, "sealed values can be revealed repeatedly");
    let reveal = status(&fixture.keys().get("laptop").await.unwrap()).reveal.clone();
    assert_eq!(reveal, status(&key).reveal, "the status keeps the first reveal");

    // A rotation seals the new value, which is unrevealed.
    fixture.apply("laptop", &with_rotation_request(personal_key(), "2026-11-23T10:00:00Z")).await;
    let old = status(&key).tokens[0].sha256.clone();
    let key = fixture.wait_for_key("laptop", "rotated", |_, s| s.tokens[0].sha256 != old).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Unrevealed)));
    let rotated = fixture.reveal("laptop", Some(ALICE)).await.unwrap();
    assert_eq!(sha256(&rotated), status(&key).tokens[0].sha256);

    let events: Api<Event> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    eventually("an Event names the requester", TIMEOUT, async || {
        let events = events.list(&ListParams::default()).await?.items;
        let found =
            events.iter().any(|e| e.reason.as_deref() == Some("Revealed") && e.note.as_ref().unwrap().contains(ALICE));
        ensure!(found, "no Event");
        Ok(())
    })
    .await;
    fixture.assert_no_leaks(&[value, rotated]);
}

#[tokio::test]
async fn etcd_never_contains_a_sealed_value() {
    let fixture = Fixture::new(&[]).await;
    fixture.grant_reveal(ALICE);
    fixture.create_minted("plain", &team_key()).await;
    fixture.create_minted("sealed", &personal_key()).await;
    let plain = fixture.reveal("plain", Some(ALICE)).await.unwrap();
    let sealed = fixture.reveal("sealed", Some(ALICE)).await.unwrap();
    assert!(fixture.etcd_contains(&plain), "the search finds a plain value");
    assert!(!fixture.etcd_contains(&sealed) && !fixture.etcd_contains(&base64(&sealed)));
    assert_eq!(status(&fixture.keys().get("plain").await.unwrap()).reveal, None);
}

#[tokio::test]
async fn one_time_reveal_grants_exactly_one_of_many_requests() {
    let fixture = Fixture::new(&[]).await;
    fixture.create_minted("before", &team_key()).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    let key = fixture.create_minted("once", &team_key()).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Unrevealed)));
    assert_eq!(fixture.data_keys("once").await, ["sealed-value".to_owned()].into());

    let answers = join_all((0..20).map(|_| fixture.reveal("once", None))).await;
    let values: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    assert_eq!(values.len(), 1, "exactly one request is granted");
    assert_eq!(sha256(values[0]), status(&key).tokens[0].sha256);
    for (reason, message) in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert_eq!(reason, "AlreadyRevealed");
        assert!(message.contains("requestedAt"), "{message}");
    }
    let value = values[0].clone();
    eventually("the claimed value is removed from the Secret", TIMEOUT, async || {
        let data = fixture.data_keys("once").await;
        ensure!(data.is_empty(), "{data:?}");
        Ok(())
    })
    .await;
    let key = fixture
        .wait_for_key("once", "the status names the requester", |_, s| {
            s.reveal.as_ref().is_some_and(|r| r.by.is_some())
        })
        .await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Revealed)));
    // Later checks accept the empty Secret.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let key = fixture.keys().get("once").await.unwrap();
    assert_eq!(status(&key).state, Some(KeyState::Active));
    settled(&key).unwrap();
    assert!(!fixture.etcd_contains(&value) && !fixture.etcd_contains(&base64(&value)));

    // Removing the claim from the record does not allow another reveal.
    let record = fixture.secret("once").await.annotations()[RECORD].clone();
    let mut record: Value = serde_json::from_str(&record).unwrap();
    record["sealed"]["claim"] = Value::Null;
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    let patch = json!({"metadata": {"annotations": {RECORD: record.to_string()}}});
    secrets.patch("once-secret", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    assert_eq!(denial_reason(&fixture.reveal("once", None).await), "AlreadyRevealed");

    // After a rotation the new value can be revealed once.
    fixture.settings(json!({"oneTimeReveal": false})).await;
    fixture.apply("once", &with_rotation_request(team_key(), "2026-11-23T10:00:00Z")).await;
    let old = status(&key).tokens[0].sha256.clone();
    let key = fixture.wait_for_key("once", "rotated", |_, s| s.tokens[0].sha256 != old).await;
    assert_eq!(
        reveal_state(status(&key)),
        Some((RevealMode::OneTime, RevealState::Unrevealed)),
        "the key keeps its mode"
    );
    let second = fixture.reveal("once", None).await.unwrap();
    assert_eq!(sha256(&second), status(&key).tokens[0].sha256);
    assert_eq!(denial_reason(&fixture.reveal("once", None).await), "AlreadyRevealed");

    // Keys created before the setting are unchanged.
    let before = fixture.reveal("before", None).await.unwrap();
    assert_eq!(fixture.reveal("before", None).await.unwrap(), before);
    assert_eq!(fixture.data_keys("before").await, ["key-value".to_owned()].into());
    fixture.assert_no_leaks(&[value, second]);
}

/// The administrator restores the Secret. Users with write access to Secrets can do so where the admission policies are
/// disabled.
#[tokio::test]
async fn restoring_the_secret_before_the_answer_does_not_allow_a_second_reveal() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    let key = fixture.create_minted("once", &team_key()).await;
    let mut before = fixture.secret("once").await;
    let fault = fixture.proxy.inject(1, fixture.status_writes(), Fault::Delay(Duration::from_secs(10)));
    let identity = Identity::generate();
    let first = fixture.request("once", None, &identity.to_public().to_string()).await;
    eventually("the value is claimed, and the proxy delays the answer", TIMEOUT, async || {
        ensure!(fault.injected() == 1, "the fault has not occurred");
        Ok(())
    })
    .await;
    before.metadata.resource_version = None;
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    secrets.replace("once-secret", &PostParams::default(), &before).await.expect("the Secret is restored");
    assert_eq!(denial_reason(&fixture.reveal("once", None).await), "AlreadyRevealed");
    let value = decrypt(&fixture.wait_for_answer(&first).await, &identity).unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    assert_eq!(denial_reason(&fixture.reveal("once", None).await), "AlreadyRevealed");
}

#[tokio::test]
async fn with_workload_secrets_allow_the_secret_keeps_a_plain_copy() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true, "workloadSecrets": "Allow"})).await;
    let key = fixture.create_minted("both", &team_key()).await;
    assert_eq!(fixture.data_keys("both").await, ["key-value".to_owned(), "sealed-value".to_owned()].into());
    fixture.create_minted("mine", &personal_key()).await;
    assert_eq!(fixture.data_keys("mine").await, ["sealed-value".to_owned()].into(), "Personal keys have no plain copy");
    let value = fixture.reveal("both", None).await.unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    assert_eq!(denial_reason(&fixture.reveal("both", None).await), "AlreadyRevealed");
    eventually("the Secret holds only the plain copy", TIMEOUT, async || {
        let secret = fixture.secret("both").await;
        let ByteString(plain) = secret.data.unwrap_or_default().remove("key-value").context("no value")?;
        ensure!(plain == value.as_bytes());
        ensure!(fixture.data_keys("both").await.len() == 1);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_crash_after_any_write_of_a_reveal_grants_the_value_exactly_once() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    let namespace_path = format!("/namespaces/{}/", fixture.namespace);
    for write in 0..3 {
        let name = format!("key-{write}");
        let key = fixture.create_minted(&name, &team_key()).await;
        let (namespace, secret) = (namespace_path.clone(), format!("/secrets/{name}-secret"));
        let matches = move |request: &Record| {
            let of_secret = request.path.ends_with(&secret);
            let of_answer = request.path.contains("/keyreveals/") && request.path.ends_with("/status");
            let selected = if write == 1 { of_answer } else { of_secret };
            request.method == Method::PATCH && request.path.contains(&namespace) && selected
        };
        let fault =
            fixture.proxy.inject(if write == 2 { 2 } else { 1 }, matches, Fault::after_commit(fixture.killer()));
        let identity = Identity::generate();
        let recipient = identity.to_public().to_string();
        let first = fixture.request(&name, None, &recipient).await;
        eventually("the operator is killed", TIMEOUT, async || {
            ensure!(fault.injected() == 1, "the fault has not occurred");
            Ok(())
        })
        .await;
        fixture.ensure_leader().await;
        let second = fixture.request(&name, None, &recipient).await;
        let answers = [
            decrypt(&fixture.wait_for_answer(&first).await, &identity),
            decrypt(&fixture.wait_for_answer(&second).await, &identity),
        ];
        assert_eq!(sha256(answers[0].as_ref().unwrap()), status(&key).tokens[0].sha256, "write {write}");
        assert_eq!(denial_reason(&answers[1]), "AlreadyRevealed", "write {write}");
        eventually("the claimed value is removed from the Secret", TIMEOUT, async || {
            let data = fixture.data_keys(&name).await;
            ensure!(data.is_empty(), "{data:?}");
            Ok(())
        })
        .await;
        fixture.proxy.clear_faults();
        fixture
            .wait_for_key(&name, "the status names the requester", |_, s| {
                s.reveal.as_ref().is_some_and(|r| r.by.is_some())
            })
            .await;
    }
}

#[tokio::test]
async fn denied_requests_state_a_reason_and_are_deleted_after_the_ttl() {
    let fixture = Fixture::new(&["--reveal-ttl=20s"]).await;
    fixture.create_minted("checkout", &team_key()).await;
    let identity = Identity::generate().to_public().to_string();
    let request = fixture.request("missing", None, &identity).await;
    let answer = fixture.wait_for_answer(&request).await;
    assert_eq!(granted(&answer).unwrap().reason, "KeyNotFound");
    assert!(answer.status.as_ref().unwrap().expires_at.is_some());
    let bad = fixture.request("checkout", None, "age1nonsense").await;
    assert_eq!(granted(&fixture.wait_for_answer(&bad).await).unwrap().reason, "InvalidRecipient");

    // MALLORY may create KeyReveals but lacks the permissions of the key.
    let role = ["create", "role", "requester", "--verb=create,get", "--resource=keyreveals.keywright.dev"];
    let bind = ["create", "rolebinding", "requester", "--role=requester", &format!("--user={MALLORY}")];
    for args in [role.as_slice(), bind.as_slice()] {
        output(fixture.plane.kubectl().args(["-n", &fixture.namespace]).args(args)).unwrap();
    }
    let denied = fixture.reveal("checkout", Some(MALLORY)).await;
    assert_eq!(denial_reason(&denied), "RoleDenied");
    assert!(denied.unwrap_err().1.contains("team-custom-api-keys:ReadConfig"));

    let reveals: Api<KeyReveal> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    eventually("all requests are deleted", TIMEOUT, async || {
        let remaining = reveals.list(&ListParams::default()).await?.items;
        ensure!(remaining.is_empty(), "{} requests remain", remaining.len());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_value_not_revealed_within_erase_unrevealed_after_is_erased() {
    let fixture = Fixture::new(&[]).await;
    fixture.grant_reveal(ALICE);
    fixture.create_minted("revealed", &personal_key()).await;
    let value = fixture.reveal("revealed", Some(ALICE)).await.unwrap();
    fixture.create_minted("unrevealed", &personal_key()).await;
    fixture.settings(json!({"eraseUnrevealedAfter": "5s"})).await;
    let key = fixture.wait_for_key("unrevealed", "erased", |_, s| s.state == Some(KeyState::Lost)).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Erased)));
    let ready = condition(&key, "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "ValueErased"));
    assert!(ready.message.contains("rotation.requestedAt"), "{}", ready.message);
    assert!(fixture.data_keys("unrevealed").await.is_empty());
    assert_eq!(denial_reason(&fixture.reveal("unrevealed", Some(ALICE)).await), "ValueErased");
    assert_eq!(fixture.reveal("revealed", Some(ALICE)).await.unwrap(), value, "a revealed value is kept");
    let events: Api<Event> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    eventually("an Event reports the erasure", TIMEOUT, async || {
        let events = events.list(&ListParams::default()).await?.items;
        ensure!(
            events.iter().filter(|e| e.reason.as_deref() == Some("ValueErased")).count() == 1,
            "there must be exactly one Event"
        );
        Ok(())
    })
    .await;
    // A requested rotation mints a new value.
    fixture.settings(json!({"oneTimeReveal": false})).await;
    fixture.apply("unrevealed", &with_rotation_request(personal_key(), "2026-11-23T10:00:00Z")).await;
    let key = fixture.wait_for_key("unrevealed", "minted again", |key, _| settled(key).is_ok()).await;
    let value = fixture.reveal("unrevealed", Some(ALICE)).await.unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
}

#[tokio::test]
async fn after_a_requested_rotation_of_sealing_keys_old_values_can_still_be_revealed() {
    let fixture = Fixture::new(&[]).await;
    fixture.grant_reveal(ALICE);
    fixture.create_minted("old", &personal_key()).await;
    let value = fixture.reveal("old", Some(ALICE)).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), crate::support::operator::NAMESPACE);
    let name = "keywright-sealing-keys";
    let identities = async || {
        let ByteString(bytes) = secrets.get(name).await.unwrap().data.unwrap().remove("identities").unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let before = identities().await;
    let at = "2026-11-23T10:00:00Z";
    let patch = json!({"metadata": {"annotations": {"keywright.dev/rotate-requested-at": at}}});
    secrets.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    fixture.killer()();
    fixture.ensure_leader().await;
    assert_eq!(fixture.reveal("old", Some(ALICE)).await.unwrap(), value);
    let after = identities().await;
    assert!(after.ends_with(&before) && after.lines().count() == before.lines().count() + 1);
    assert_eq!(secrets.get(name).await.unwrap().annotations()["keywright.dev/rotated-at"], at);
    // The newest key seals new values.
    fixture.create_minted("new", &personal_key()).await;
    let sealed = fixture.secret("new").await.data.unwrap().remove("sealed-value").unwrap();
    let newest: Identity = after.lines().next().unwrap().parse().unwrap();
    assert!(age::decrypt(&newest, &sealed.0).is_ok());
    let oldest: Identity = before.lines().next().unwrap().parse().unwrap();
    assert!(age::decrypt(&oldest, &sealed.0).is_err());
    assert!(!newest.to_string().expose_secret().is_empty());
    fixture.assert_no_leaks(&[value]);
}

/// Quotas, admission policies and missing rights are reported in the same way.
#[tokio::test]
async fn a_claim_rejected_by_the_api_server_is_reported_in_the_request_and_by_the_plugin() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    fixture.create_minted("once", &team_key()).await;
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    let immutable = Patch::Merge(json!({"immutable": true}));
    secrets.patch("once-secret", &PatchParams::default(), &immutable).await.unwrap();

    let (reason, message) = fixture.reveal("once", None).await.unwrap_err();
    assert_eq!(reason, "RequestRefused");
    for word in ["immutable", "spec.rotation.requestedAt", "create the KeyReveal again"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    let file = fixture.path("once");
    let result = fixture.plugin(&["reveal", "once", "--output", &file]).output().unwrap();
    let err = String::from_utf8(result.stderr).unwrap();
    assert_eq!(result.status.code(), Some(1), "{err}");
    assert!(err.contains("RequestRefused") && err.contains("immutable: true"), "{err}");
    assert!(!Path::new(&file).exists());
    assert_eq!(fixture.data_keys("once").await, ["sealed-value".to_owned()].into(), "the value is still sealed");
}

#[tokio::test]
async fn an_exceeded_quota_is_reported_in_the_key_with_the_fix() {
    let fixture = Fixture::new(&[]).await;
    let quotas: Api<ResourceQuota> = Api::namespaced(fixture.client.clone(), &fixture.namespace);
    let quota = json!({"metadata": {"name": "none"}, "spec": {"hard": {"count/secrets": "0"}}});
    quotas.create(&PostParams::default(), &serde_json::from_value(quota).unwrap()).await.unwrap();
    eventually("the quota is in force", TIMEOUT, async || {
        let status = quotas.get("none").await?.status.context("no status")?;
        ensure!(status.hard.is_some(), "{status:?}");
        Ok(())
    })
    .await;
    fixture.apply("checkout", &team_key()).await;
    let write_failed =
        |key: &ApiKey, _: &ApiKeyStatus| condition(key, "Ready").is_some_and(|c| c.reason == "SecretWriteFailed");
    let key = fixture.wait_for_key("checkout", "the write failed", write_failed).await;
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("exceeded quota") && message.contains("raise the ResourceQuota"), "{message}");
    quotas.delete("none", &DeleteParams::default()).await.unwrap();
    fixture.wait_for_key("checkout", "minted after the quota is deleted", |key, _| settled(key).is_ok()).await;
}

/// The operator is killed between the two writes of a reveal, and stays down longer than the plugin waits.
#[tokio::test]
async fn a_reveal_that_times_out_after_the_claim_keeps_its_identity_file() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    let key = fixture.create_minted("once", &team_key()).await;
    let fault = fixture.proxy.inject(1, fixture.secret_writes("once"), Fault::after_commit(fixture.killer()));
    let file = fixture.path("identity");
    let result = fixture.plugin(&["reveal", "once", "--timeout", "5s", "--output", &file]).output().unwrap();
    let err = String::from_utf8(result.stderr).unwrap();
    assert_eq!((result.status.code(), fault.injected()), (Some(1), 1), "{err}");
    assert!(err.contains("stays") && err.contains("age --decrypt"), "{err}");
    fixture.wait_for_data("once", "the value is claimed", &["claimed"]).await;
    let identity: Identity = std::fs::read_to_string(&file).unwrap().parse().unwrap();
    let remaining = fixture.reveals().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(remaining.len(), 1, "the request is kept until it is answered");
    fixture.ensure_leader().await;
    let value = decrypt(&fixture.wait_for_answer(&remaining[0]).await, &identity).unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    fixture.assert_no_leaks(&[value]);
}

#[tokio::test]
async fn a_reveal_that_times_out_reports_the_cause_and_deletes_its_request() {
    let fixture = Fixture::new(&["--secret-check-interval=1h"]).await;
    fixture.create_minted("plain", &team_key()).await;
    let path = format!("/namespaces/{}/secrets/plain-secret", fixture.namespace);
    let reads = move |request: &Record| request.method == Method::GET && request.path.ends_with(&path);
    fixture.proxy.inject_times(1, 10_000, reads, Fault::Reject(500));
    let result = fixture.plugin(&["reveal", "plain", "--timeout", "5s"]).output().unwrap();
    let err = String::from_utf8(result.stderr).unwrap();
    assert_eq!((result.status.code(), result.stdout.len()), (Some(1), 0), "{err}");
    assert!(err.contains("Retrying: get Secret plain-secret") && err.contains("(500)"), "{err}");
    assert!(
        fixture.reveals().list(&ListParams::default()).await.unwrap().items.is_empty(),
        "the plugin deletes the request"
    );

    // An alert of the chart uses this metric: a deleted object must not keep it firing.
    let in_backoff = async |expected: f64| {
        eventually(&format!("{expected} objects in backoff"), TIMEOUT, async || {
            let operator = fixture.operator.operator();
            let found = metric(&operator.metrics().await?, "keywright_objects_in_backoff");
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    in_backoff(0.0).await;
    let request = fixture.request("plain", None, &Identity::generate().to_public().to_string()).await;
    in_backoff(1.0).await;
    fixture.reveals().delete(&request.name_any(), &DeleteParams::default()).await.unwrap();
    in_backoff(0.0).await;
}

#[tokio::test]
async fn deleting_a_request_before_its_answer_removes_the_claimed_value_from_the_secret() {
    let fixture = Fixture::new(&["--secret-check-interval=1h"]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    fixture.create_minted("once", &team_key()).await;
    let fault = fixture.proxy.inject_times(1, 10_000, fixture.status_writes(), Fault::Reject(500));
    let request = fixture.request("once", None, &Identity::generate().to_public().to_string()).await;
    fixture.wait_for_data("once", "the value is claimed", &["claimed"]).await;
    eventually("the proxy rejects the answer", TIMEOUT, async || {
        ensure!(fault.injected() > 0, "the fault has not occurred");
        Ok(())
    })
    .await;
    fixture.reveals().delete(&request.name_any(), &DeleteParams::default()).await.unwrap();
    fixture.wait_for_data("once", "the claimed value is removed from the Secret", &[]).await;
}

#[tokio::test]
async fn deleting_a_request_while_the_operator_is_down_removes_the_claimed_value_after_its_restart() {
    let fixture = Fixture::new(&[]).await;
    fixture.settings(json!({"oneTimeReveal": true})).await;
    fixture.create_minted("once", &team_key()).await;
    let fault = fixture.proxy.inject(1, fixture.secret_writes("once"), Fault::after_commit(fixture.killer()));
    let request = fixture.request("once", None, &Identity::generate().to_public().to_string()).await;
    eventually("the operator is killed", TIMEOUT, async || {
        ensure!(fault.injected() == 1, "the fault has not occurred");
        Ok(())
    })
    .await;
    fixture.reveals().delete(&request.name_any(), &DeleteParams::default()).await.unwrap();
    assert_eq!(fixture.data_keys("once").await, ["claimed".to_owned()].into());
    fixture.ensure_leader().await;
    fixture.wait_for_data("once", "the claimed value is removed from the Secret", &[]).await;
    let key = fixture
        .wait_for_key("once", "the status names the requester", |_, s| {
            s.reveal.as_ref().is_some_and(|r| r.by.is_some())
        })
        .await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Revealed)));
    assert_eq!(denial_reason(&fixture.reveal("once", None).await), "AlreadyRevealed");
}
