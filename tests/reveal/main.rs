//! Sealed values in a real cluster: who gets to see them, how often, and where they must never be. The real operator
//! behind a proxy that kills it in the middle of an answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use support::keys::{RECORD, apply, base64, condition, free_lease, looks_like_a_value, metric, settled, sha256};
use support::proxy::Record;
use support::{ControlPlane, Fault, Operator, Options, Proxy, Release, eventually, output, plane};
use tokio::sync::{MutexGuard, OnceCell};

/// After a fault, backoffs come on top of a slow machine.
const PATIENCE: Duration = Duration::from_mins(2);

const ALICE: &str = "alice@example.com";
const MALLORY: &str = "mallory@example.com";

/// The one operator of this control plane, behind a proxy, for one test.
struct Stage {
    plane: &'static ControlPlane,
    release: &'static Release,
    client: Client,
    namespace: String,
    proxy: Proxy,
    args: Vec<String>,
    operator: Arc<Mutex<Option<Arc<Operator>>>>,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    async fn enter(args: &[&str]) -> Self {
        static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        static RELEASE: OnceCell<Release> = OnceCell::const_new();
        let turn = TURN.lock().await;
        let plane = plane().await;
        let release = RELEASE.get_or_init(async || Release::install(plane, &[]).await.expect("the chart")).await;
        let client = plane.client().await.expect("a client");
        let namespace = support::namespace(&client).await;
        let stage = Self {
            plane,
            release,
            client,
            namespace,
            proxy: Proxy::start(plane).expect("a proxy"),
            args: ["--secret-check-interval=2s", "--log=trace"].iter().chain(args).map(ToString::to_string).collect(),
            operator: Arc::default(),
            _turn: turn,
        };
        stage.mend().await;
        stage.let_requests_pass().await;
        let accepted = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=5s"];
        eventually("the catalogue is accepted", PATIENCE, async || output(plane.kubectl().args(accepted))).await;
        stage
    }

    /// Starts the operator if it is down, and waits until it leads and answers.
    async fn mend(&self) {
        eventually("the operator leads", PATIENCE, async || {
            let running = self.operator.lock().unwrap().clone();
            let operator = match running {
                Some(operator) => operator,
                None => self.start().await?,
            };
            operator.get("/readyz").await?;
            ensure!(metric(&operator.metrics().await?, "keywright_leader") == Some(1.0), "it does not lead");
            Ok(())
        })
        .await;
    }

    async fn start(&self) -> Result<Arc<Operator>> {
        free_lease(&self.client).await?;
        let server = Some(self.proxy.url().to_owned());
        let options = Options { server, args: self.args.clone(), ..Options::default() };
        let operator = Arc::new(Operator::start(self.plane, self.release, options).await?);
        *self.operator.lock().unwrap() = Some(Arc::clone(&operator));
        Ok(operator)
    }

    /// What kills the operator, from wherever it is called.
    fn killer(&self) -> impl Fn() + Send + Sync + 'static {
        let operator = Arc::clone(&self.operator);
        move || {
            if let Some(operator) = operator.lock().unwrap().take() {
                operator.kill();
            }
        }
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

    /// The webhook tells a requester at once what the controller would say. Here it is not asked about requests, so that
    /// what is seen is the decision of the controller, which is what counts.
    async fn let_requests_pass(&self) {
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let condition = json!({"name": "no-requests", "expression": "request.resource.resource != 'keyreveals'"});
        let patch = json!({"webhooks": [{"name": "apikeys.keywright.dev", "matchConditions": [condition]}]});
        let params = PatchParams::default();
        webhooks.patch("keywright", &params, &Patch::Strategic(patch)).await.expect("the webhook is changed");
    }

    async fn apply(&self, name: &str, spec: &Value) {
        apply(&self.client, &self.namespace, name, spec).await.expect("the ApiKey");
    }

    /// Waits until a key is what is waited for.
    async fn until(&self, name: &str, what: &str, is: impl Fn(&ApiKey, &ApiKeyStatus) -> bool) -> ApiKey {
        eventually(&format!("{name}: {what}"), PATIENCE, async || {
            let key = self.keys().get(name).await?;
            let status = key.status.clone().context("no status")?;
            ensure!(is(&key, &status), "{status:#?}");
            Ok(key)
        })
        .await
    }

    async fn minted(&self, name: &str, spec: &Value) -> ApiKey {
        self.apply(name, spec).await;
        self.until(name, "ready", |key, _| settled(key).is_ok()).await
    }

    async fn secret(&self, name: &str) -> Secret {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        secrets.get(&format!("{name}-secret")).await.expect("the Secret")
    }

    /// The names in the data of the Secret of a key.
    async fn data(&self, name: &str) -> BTreeSet<String> {
        self.secret(name).await.data.unwrap_or_default().into_keys().collect()
    }

    /// Lets users ask to see values, and holds for them every right that a key can carry.
    fn let_reveal(&self, user: &str) {
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

    /// Asks to see a value, as an administrator, or as a user.
    async fn ask(&self, key: &str, user: Option<&str>, recipient: &str) -> KeyReveal {
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
        // A right that was just granted takes a moment.
        eventually("the request is created", PATIENCE, async || {
            Ok(reveals.create(&PostParams::default(), &reveal).await?)
        })
        .await
    }

    /// Waits for the answer to a request.
    async fn answered(&self, reveal: &KeyReveal) -> KeyReveal {
        let reveals: Api<KeyReveal> = Api::namespaced(self.client.clone(), &self.namespace);
        eventually("an answer", PATIENCE, async || {
            let reveal = reveals.get(&reveal.name_any()).await?;
            granted(&reveal).context("no answer")?;
            Ok(reveal)
        })
        .await
    }

    fn reveals(&self) -> Api<KeyReveal> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The plugin, as an administrator in this namespace.
    fn plugin(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        command.env("KUBECONFIG", self.plane.kubeconfig()).args(args).args(["-n", &self.namespace]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A path for a file of this test.
    fn path(&self, name: &str) -> String {
        self.plane.folder().join(format!("{}-{name}", self.namespace)).to_string_lossy().into_owned()
    }

    /// Requests of the operator to change the Secret of a key.
    fn writes_of(&self, name: &str) -> impl Fn(&Record) -> bool + Send + Sync + 'static {
        let path = format!("/namespaces/{}/secrets/{name}-secret", self.namespace);
        move |request| request.method == Method::PATCH && request.path.ends_with(&path)
    }

    /// Requests of the operator to answer.
    fn answers(&self) -> impl Fn(&Record) -> bool + Send + Sync + 'static {
        let path = format!("/namespaces/{}/keyreveals/", self.namespace);
        move |request| request.method == Method::PATCH && request.path.contains(&path)
    }

    /// Waits until the Secret of a key has these names in its data.
    async fn until_data(&self, name: &str, what: &str, expected: &[&str]) {
        eventually(what, PATIENCE, async || {
            let data = self.data(name).await;
            ensure!(data.iter().eq(expected), "{data:?}");
            Ok(())
        })
        .await;
    }

    /// Asks, and opens the answer; the reason and the message if it is denied.
    async fn reveal(&self, key: &str, user: Option<&str>) -> Result<String, (String, String)> {
        let identity = Identity::generate();
        let reveal = self.ask(key, user, &identity.to_public().to_string()).await;
        open(&self.answered(&reveal).await, &identity)
    }

    /// Whether bytes are anywhere in what etcd keeps: its database and its log.
    fn etcd_has(&self, part: &str) -> bool {
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

    /// What must hold whatever the test: no value in what the operator wrote or said.
    fn nothing_leaked(&self, values: &[String]) {
        let kinds = "apikeys,keyreveals,events.v1.events.k8s.io,configmaps";
        let objects = output(self.plane.kubectl().args(["get", kinds, "-A", "-o", "json"])).unwrap();
        let log = self.operator.lock().unwrap().clone().expect("an operator").log();
        assert!(log.contains("TRACE"));
        for (place, text) in [("objects", &objects), ("the log", &log)] {
            assert!(looks_like_a_value(text).is_none(), "{place} has something like a value");
            assert!(!text.contains("AGE-SECRET-KEY-"), "{place} has an identity");
            for value in values {
                assert!(!text.contains(value) && !text.contains(&base64(value)), "{place} has a value");
            }
        }
        assert!(!log.contains("AGE ENCRYPTED FILE"), "the log has an answer");
        // Each of its own, by name.
        let own = ["keywright-webhook-ca", "keywright-verifier-tls"].map(|name| format!("metadata.name%3D{name}"));
        let listed = self.proxy.requests().into_iter().any(|request| {
            request.path.ends_with("/secrets")
                && request.method == Method::GET
                && !own.iter().any(|name| request.query.contains(name))
        });
        assert!(!listed, "a list of Secrets");
    }
}

fn granted(reveal: &KeyReveal) -> Option<&Condition> {
    let mut conditions = reveal.status.as_ref()?.conditions.iter();
    conditions.find(|condition| condition.type_ == "Granted" && condition.status != "Unknown")
}

fn open(reveal: &KeyReveal, identity: &Identity) -> Result<String, (String, String)> {
    let condition = granted(reveal).expect("an answer");
    let status = reveal.status.as_ref().unwrap();
    if condition.status == "False" {
        assert!(status.ciphertext.is_none());
        return Err((condition.reason.clone(), condition.message.clone()));
    }
    let value = age::decrypt(identity, status.ciphertext.as_ref().expect("a ciphertext").as_bytes()).expect("it opens");
    let value = String::from_utf8(value).unwrap();
    assert!(status.id.as_ref().unwrap().ends_with(&sha256(&value)[..16]));
    Ok(value)
}

fn reason<T>(result: &Result<T, (String, String)>) -> &str {
    result.as_ref().err().map_or("granted", |(reason, _)| reason.as_str())
}

fn status(key: &ApiKey) -> &ApiKeyStatus {
    key.status.as_ref().expect("a status")
}

fn reveal_state(status: &ApiKeyStatus) -> Option<(RevealMode, RevealState)> {
    status.reveal.as_ref().map(|reveal| (reveal.mode, reveal.state))
}

fn personal() -> Value {
    json!({"type": "Personal", "user": ALICE, "presets": ["Alerts"]})
}

fn team() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

fn requested(mut spec: Value, at: &str) -> Value {
    spec["rotation"] = json!({"requestedAt": at, "overlap": "0s"});
    spec
}

#[tokio::test]
async fn personal_keys_are_always_sealed() {
    let stage = Stage::enter(&[]).await;
    let key = stage.minted("laptop", &personal()).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Unrevealed)));
    let ready = condition(&key, "Ready").unwrap();
    assert!(ready.message.contains("kubectl keywright reveal"), "{}", ready.message);
    assert_eq!(stage.data("laptop").await, ["sealed-value".to_owned()].into());
    stage.let_reveal(ALICE);
    stage.let_reveal(MALLORY);

    assert_eq!(reason(&stage.reveal("laptop", Some(MALLORY)).await), "OwnerDenied");
    assert_eq!(reason(&stage.reveal("laptop", None).await), "OwnerDenied", "not even an administrator");
    let value = stage.reveal("laptop", Some(ALICE)).await.unwrap();
    assert!(value.starts_with("kwp_"));
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    let key = stage.until("laptop", "who saw it", |_, s| s.reveal.as_ref().is_some_and(|r| r.by.is_some())).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Revealed)));
    assert_eq!(status(&key).reveal.as_ref().unwrap().by.as_deref(), Some(ALICE));
    assert_eq!(stage.reveal("laptop", Some(ALICE)).await.unwrap(), value, "as often as alice likes");
    let reveal = status(&stage.keys().get("laptop").await.unwrap()).reveal.clone();
    assert_eq!(reveal, status(&key).reveal, "the first time counts");

    // A rotation seals the new value, which nobody has seen.
    stage.apply("laptop", &requested(personal(), "2026-11-23T10:00:00Z")).await;
    let old = status(&key).tokens[0].sha256.clone();
    let key = stage.until("laptop", "rotated", |_, s| s.tokens[0].sha256 != old).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Unrevealed)));
    let rotated = stage.reveal("laptop", Some(ALICE)).await.unwrap();
    assert_eq!(sha256(&rotated), status(&key).tokens[0].sha256);

    // An event names who saw it.
    let events: Api<Event> = Api::namespaced(stage.client.clone(), &stage.namespace);
    eventually("the Event", PATIENCE, async || {
        let events = events.list(&ListParams::default()).await?.items;
        let told =
            events.iter().any(|e| e.reason.as_deref() == Some("Revealed") && e.note.as_ref().unwrap().contains(ALICE));
        ensure!(told, "none");
        Ok(())
    })
    .await;
    stage.nothing_leaked(&[value, rotated]);
}

#[tokio::test]
async fn a_sealed_value_is_nowhere_in_etcd() {
    let stage = Stage::enter(&[]).await;
    stage.let_reveal(ALICE);
    stage.minted("plain", &team()).await;
    stage.minted("sealed", &personal()).await;
    let plain = stage.reveal("plain", Some(ALICE)).await.unwrap();
    let sealed = stage.reveal("sealed", Some(ALICE)).await.unwrap();
    assert!(stage.etcd_has(&plain), "this search finds what is there");
    assert!(!stage.etcd_has(&sealed) && !stage.etcd_has(&base64(&sealed)));
    assert_eq!(status(&stage.keys().get("plain").await.unwrap()).reveal, None);
}

#[tokio::test]
async fn one_time_reveal_gives_the_value_once() {
    let stage = Stage::enter(&[]).await;
    stage.minted("before", &team()).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    let key = stage.minted("once", &team()).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Unrevealed)));
    assert_eq!(stage.data("once").await, ["sealed-value".to_owned()].into());

    let answers = join_all((0..20).map(|_| stage.reveal("once", None))).await;
    let values: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    assert_eq!(values.len(), 1, "exactly one");
    assert_eq!(sha256(values[0]), status(&key).tokens[0].sha256);
    for (reason, message) in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert_eq!(reason, "AlreadyRevealed");
        assert!(message.contains("requestedAt"), "{message}");
    }
    let value = values[0].clone();
    eventually("the answer left the Secret", PATIENCE, async || {
        let data = stage.data("once").await;
        ensure!(data.is_empty(), "{data:?}");
        Ok(())
    })
    .await;
    let key = stage.until("once", "who saw it", |_, s| s.reveal.as_ref().is_some_and(|r| r.by.is_some())).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Revealed)));
    // Looks at the Secret find nothing, and that is as it should be.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let key = stage.keys().get("once").await.unwrap();
    assert_eq!(status(&key).state, Some(KeyState::Active));
    settled(&key).unwrap();
    assert!(!stage.etcd_has(&value) && !stage.etcd_has(&base64(&value)));

    // What was in the Secret, put back by hand, is not shown again.
    let record = stage.secret("once").await.annotations()[RECORD].clone();
    let mut record: Value = serde_json::from_str(&record).unwrap();
    record["sealed"]["claim"] = Value::Null;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &stage.namespace);
    let patch = json!({"metadata": {"annotations": {RECORD: record.to_string()}}});
    secrets.patch("once-secret", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    assert_eq!(reason(&stage.reveal("once", None).await), "AlreadyRevealed");

    // A rotation makes another value, which can be seen once.
    stage.settings(json!({"oneTimeReveal": false})).await;
    stage.apply("once", &requested(team(), "2026-11-23T10:00:00Z")).await;
    let old = status(&key).tokens[0].sha256.clone();
    let key = stage.until("once", "rotated", |_, s| s.tokens[0].sha256 != old).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::OneTime, RevealState::Unrevealed)), "it keeps its mode");
    let second = stage.reveal("once", None).await.unwrap();
    assert_eq!(sha256(&second), status(&key).tokens[0].sha256);
    assert_eq!(reason(&stage.reveal("once", None).await), "AlreadyRevealed");

    // Keys from before are as they were.
    let before = stage.reveal("before", None).await.unwrap();
    assert_eq!(stage.reveal("before", None).await.unwrap(), before);
    assert_eq!(stage.data("before").await, ["key-value".to_owned()].into());
    stage.nothing_leaked(&[value, second]);
}

/// The administrator puts the Secret back, as a user with write access to Secrets can where the admission policies are
/// disabled.
#[tokio::test]
async fn a_secret_that_is_put_back_before_the_answer_gives_no_second_one() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    let key = stage.minted("once", &team()).await;
    let mut before = stage.secret("once").await;
    let planned = stage.proxy.inject(1, stage.answers(), Fault::Delay(Duration::from_secs(10)));
    let identity = Identity::generate();
    let first = stage.ask("once", None, &identity.to_public().to_string()).await;
    eventually("the value is taken, and the answer is on its way", PATIENCE, async || {
        ensure!(planned.struck() == 1, "not yet");
        Ok(())
    })
    .await;
    before.metadata.resource_version = None;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &stage.namespace);
    secrets.replace("once-secret", &PostParams::default(), &before).await.expect("the Secret is put back");
    assert_eq!(reason(&stage.reveal("once", None).await), "AlreadyRevealed");
    let value = open(&stage.answered(&first).await, &identity).unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    assert_eq!(reason(&stage.reveal("once", None).await), "AlreadyRevealed");
}

#[tokio::test]
async fn workloads_get_a_plain_copy_if_the_settings_allow_it() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true, "workloadSecrets": "Allow"})).await;
    let key = stage.minted("both", &team()).await;
    assert_eq!(stage.data("both").await, ["key-value".to_owned(), "sealed-value".to_owned()].into());
    stage.minted("mine", &personal()).await;
    assert_eq!(stage.data("mine").await, ["sealed-value".to_owned()].into(), "never for a person");
    let value = stage.reveal("both", None).await.unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    assert_eq!(reason(&stage.reveal("both", None).await), "AlreadyRevealed");
    eventually("the plain copy alone is left", PATIENCE, async || {
        let secret = stage.secret("both").await;
        let ByteString(plain) = secret.data.unwrap_or_default().remove("key-value").context("no value")?;
        ensure!(plain == value.as_bytes());
        ensure!(stage.data("both").await.len() == 1);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_crash_after_any_write_loses_nothing_and_gives_the_value_once() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    let here = format!("/namespaces/{}/", stage.namespace);
    for write in 0..3 {
        let name = format!("key-{write}");
        let key = stage.minted(&name, &team()).await;
        let (namespace, secret) = (here.clone(), format!("/secrets/{name}-secret"));
        let matches = move |request: &Record| {
            let of_secret = request.path.ends_with(&secret);
            let of_answer = request.path.contains("/keyreveals/") && request.path.ends_with("/status");
            let of_it = if write == 1 { of_answer } else { of_secret };
            request.method == Method::PATCH && request.path.contains(&namespace) && of_it
        };
        let planned = stage.proxy.inject(if write == 2 { 2 } else { 1 }, matches, Fault::after_commit(stage.killer()));
        let identity = Identity::generate();
        let recipient = identity.to_public().to_string();
        let first = stage.ask(&name, None, &recipient).await;
        eventually("the operator is killed", PATIENCE, async || {
            ensure!(planned.struck() == 1, "not yet");
            Ok(())
        })
        .await;
        stage.mend().await;
        let second = stage.ask(&name, None, &recipient).await;
        let answers = [open(&stage.answered(&first).await, &identity), open(&stage.answered(&second).await, &identity)];
        assert_eq!(sha256(answers[0].as_ref().unwrap()), status(&key).tokens[0].sha256, "write {write}");
        assert_eq!(reason(&answers[1]), "AlreadyRevealed", "write {write}");
        eventually("the answer left the Secret", PATIENCE, async || {
            let data = stage.data(&name).await;
            ensure!(data.is_empty(), "{data:?}");
            Ok(())
        })
        .await;
        stage.proxy.heal();
        stage.until(&name, "who saw it", |_, s| s.reveal.as_ref().is_some_and(|r| r.by.is_some())).await;
    }
}

#[tokio::test]
async fn requests_are_denied_with_a_reason_and_end() {
    let stage = Stage::enter(&["--reveal-ttl=20s"]).await;
    stage.minted("checkout", &team()).await;
    let identity = Identity::generate().to_public().to_string();
    let asked = stage.ask("nobody", None, &identity).await;
    let answer = stage.answered(&asked).await;
    assert_eq!(granted(&answer).unwrap().reason, "KeyNotFound");
    assert!(answer.status.as_ref().unwrap().expires_at.is_some());
    let bad = stage.ask("checkout", None, "age1nonsense").await;
    assert_eq!(granted(&stage.answered(&bad).await).unwrap().reason, "InvalidRecipient");

    // Whoever may only ask has no right to anything in the key.
    let role = ["create", "role", "ask", "--verb=create,get", "--resource=keyreveals.keywright.dev"];
    let bind = ["create", "rolebinding", "ask", "--role=ask", &format!("--user={MALLORY}")];
    for args in [role.as_slice(), bind.as_slice()] {
        output(stage.plane.kubectl().args(["-n", &stage.namespace]).args(args)).unwrap();
    }
    let denied = stage.reveal("checkout", Some(MALLORY)).await;
    assert_eq!(reason(&denied), "RoleDenied");
    assert!(denied.unwrap_err().1.contains("team-custom-api-keys:ReadConfig"));

    let reveals: Api<KeyReveal> = Api::namespaced(stage.client.clone(), &stage.namespace);
    eventually("all requests are gone", PATIENCE, async || {
        let left = reveals.list(&ListParams::default()).await?.items;
        ensure!(left.is_empty(), "{} left", left.len());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_value_that_nobody_reveals_in_time_is_erased() {
    let stage = Stage::enter(&[]).await;
    stage.let_reveal(ALICE);
    stage.minted("seen", &personal()).await;
    let value = stage.reveal("seen", Some(ALICE)).await.unwrap();
    stage.minted("unseen", &personal()).await;
    stage.settings(json!({"eraseUnrevealedAfter": "5s"})).await;
    let key = stage.until("unseen", "erased", |_, s| s.state == Some(KeyState::Lost)).await;
    assert_eq!(reveal_state(status(&key)), Some((RevealMode::Sealed, RevealState::Erased)));
    let ready = condition(&key, "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "ValueErased"));
    assert!(ready.message.contains("rotation.requestedAt"), "{}", ready.message);
    assert!(stage.data("unseen").await.is_empty());
    assert_eq!(reason(&stage.reveal("unseen", Some(ALICE)).await), "ValueErased");
    assert_eq!(stage.reveal("seen", Some(ALICE)).await.unwrap(), value, "what was seen stays");
    let events: Api<Event> = Api::namespaced(stage.client.clone(), &stage.namespace);
    eventually("the Event", PATIENCE, async || {
        let events = events.list(&ListParams::default()).await?.items;
        ensure!(events.iter().filter(|e| e.reason.as_deref() == Some("ValueErased")).count() == 1, "not one");
        Ok(())
    })
    .await;
    // The way out.
    stage.settings(json!({"oneTimeReveal": false})).await;
    stage.apply("unseen", &requested(personal(), "2026-11-23T10:00:00Z")).await;
    let key = stage.until("unseen", "minted again", |key, _| settled(key).is_ok()).await;
    let value = stage.reveal("unseen", Some(ALICE)).await.unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
}

/// The value that was sealed before still opens, also for an operator that starts anew.
#[tokio::test]
async fn sealing_keys_are_rotated_on_request() {
    let stage = Stage::enter(&[]).await;
    stage.let_reveal(ALICE);
    stage.minted("old", &personal()).await;
    let value = stage.reveal("old", Some(ALICE)).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), support::operator::NAMESPACE);
    let name = "keywright-sealing-keys";
    let identities = async || {
        let ByteString(bytes) = secrets.get(name).await.unwrap().data.unwrap().remove("identities").unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let before = identities().await;
    let at = "2026-11-23T10:00:00Z";
    let patch = json!({"metadata": {"annotations": {"keywright.dev/rotate-requested-at": at}}});
    secrets.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    stage.killer()();
    stage.mend().await;
    assert_eq!(stage.reveal("old", Some(ALICE)).await.unwrap(), value);
    let after = identities().await;
    assert!(after.ends_with(&before) && after.lines().count() == before.lines().count() + 1);
    assert_eq!(secrets.get(name).await.unwrap().annotations()["keywright.dev/rotated-at"], at);
    // The newest seals.
    stage.minted("new", &personal()).await;
    let sealed = stage.secret("new").await.data.unwrap().remove("sealed-value").unwrap();
    let newest: Identity = after.lines().next().unwrap().parse().unwrap();
    assert!(age::decrypt(&newest, &sealed.0).is_ok());
    let oldest: Identity = before.lines().next().unwrap().parse().unwrap();
    assert!(age::decrypt(&oldest, &sealed.0).is_err());
    assert!(!newest.to_string().expose_secret().is_empty());
    stage.nothing_leaked(&[value]);
}

/// Quota, admission policies and missing rights are told the same way.
#[tokio::test]
async fn a_claim_that_the_api_server_refuses_is_told_in_the_request_and_by_the_plugin() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    stage.minted("once", &team()).await;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &stage.namespace);
    let frozen = Patch::Merge(json!({"immutable": true}));
    secrets.patch("once-secret", &PatchParams::default(), &frozen).await.unwrap();

    let (reason, message) = stage.reveal("once", None).await.unwrap_err();
    assert_eq!(reason, "RequestRefused");
    for word in ["immutable", "spec.rotation.requestedAt", "ask again"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    let file = stage.path("once");
    let said = stage.plugin(&["reveal", "once", "--output", &file]).output().unwrap();
    let err = String::from_utf8(said.stderr).unwrap();
    assert_eq!(said.status.code(), Some(1), "{err}");
    assert!(err.contains("RequestRefused") && err.contains("immutable: true"), "{err}");
    assert!(!Path::new(&file).exists());
    assert_eq!(stage.data("once").await, ["sealed-value".to_owned()].into(), "nothing was taken");
}

#[tokio::test]
async fn a_quota_that_is_used_up_is_told_in_the_key_with_the_way_out() {
    let stage = Stage::enter(&[]).await;
    let quotas: Api<ResourceQuota> = Api::namespaced(stage.client.clone(), &stage.namespace);
    let quota = json!({"metadata": {"name": "none"}, "spec": {"hard": {"count/secrets": "0"}}});
    quotas.create(&PostParams::default(), &serde_json::from_value(quota).unwrap()).await.unwrap();
    eventually("the quota counts", PATIENCE, async || {
        let status = quotas.get("none").await?.status.context("no status")?;
        ensure!(status.hard.is_some(), "{status:?}");
        Ok(())
    })
    .await;
    stage.apply("checkout", &team()).await;
    let refused =
        |key: &ApiKey, _: &ApiKeyStatus| condition(key, "Ready").is_some_and(|c| c.reason == "SecretWriteFailed");
    let key = stage.until("checkout", "refused", refused).await;
    let message = &condition(&key, "Ready").unwrap().message;
    assert!(message.contains("exceeded quota") && message.contains("raise the ResourceQuota"), "{message}");
    quotas.delete("none", &DeleteParams::default()).await.unwrap();
    stage.until("checkout", "minted after all", |key, _| settled(key).is_ok()).await;
}

/// The operator dies between the two writes of an answer, and is away for longer than anybody waits.
#[tokio::test]
async fn a_reveal_that_times_out_keeps_what_opens_a_one_time_value_that_was_taken() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    let key = stage.minted("once", &team()).await;
    let planned = stage.proxy.inject(1, stage.writes_of("once"), Fault::after_commit(stage.killer()));
    let file = stage.path("identity");
    let said = stage.plugin(&["reveal", "once", "--timeout", "5s", "--output", &file]).output().unwrap();
    let err = String::from_utf8(said.stderr).unwrap();
    assert_eq!((said.status.code(), planned.struck()), (Some(1), 1), "{err}");
    assert!(err.contains("stays") && err.contains("age --decrypt"), "{err}");
    stage.until_data("once", "the value is taken", &["claimed"]).await;
    let identity: Identity = std::fs::read_to_string(&file).unwrap().parse().unwrap();
    let left = stage.reveals().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(left.len(), 1, "the request waits for its answer");
    stage.mend().await;
    let value = open(&stage.answered(&left[0]).await, &identity).unwrap();
    assert_eq!(sha256(&value), status(&key).tokens[0].sha256);
    stage.nothing_leaked(&[value]);
}

#[tokio::test]
async fn a_reveal_that_times_out_says_why_and_leaves_nothing_behind() {
    let stage = Stage::enter(&["--secret-check-interval=1h"]).await;
    stage.minted("plain", &team()).await;
    let path = format!("/namespaces/{}/secrets/plain-secret", stage.namespace);
    let reads = move |request: &Record| request.method == Method::GET && request.path.ends_with(&path);
    stage.proxy.inject_times(1, 10_000, reads, Fault::Refuse(500));
    let said = stage.plugin(&["reveal", "plain", "--timeout", "5s"]).output().unwrap();
    let err = String::from_utf8(said.stderr).unwrap();
    assert_eq!((said.status.code(), said.stdout.len()), (Some(1), 0), "{err}");
    assert!(err.contains("Retrying: get Secret plain-secret") && err.contains("(500)"), "{err}");
    assert!(stage.reveals().list(&ListParams::default()).await.unwrap().items.is_empty(), "it is deleted");

    // An alert of the chart counts what is in backoff: one that is gone must not keep it firing.
    let in_backoff = async |expected: f64| {
        eventually(&format!("{expected} in backoff"), PATIENCE, async || {
            let operator = stage.operator.lock().unwrap().clone().context("no operator")?;
            let found = metric(&operator.metrics().await?, "keywright_objects_in_backoff");
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    in_backoff(0.0).await;
    let asked = stage.ask("plain", None, &Identity::generate().to_public().to_string()).await;
    in_backoff(1.0).await;
    stage.reveals().delete(&asked.name_any(), &DeleteParams::default()).await.unwrap();
    in_backoff(0.0).await;
}

#[tokio::test]
async fn an_answer_whose_request_is_deleted_early_is_wiped_from_the_secret() {
    let stage = Stage::enter(&["--secret-check-interval=1h"]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    stage.minted("once", &team()).await;
    let planned = stage.proxy.inject_times(1, 10_000, stage.answers(), Fault::Refuse(500));
    let asked = stage.ask("once", None, &Identity::generate().to_public().to_string()).await;
    stage.until_data("once", "the value is taken", &["claimed"]).await;
    eventually("the answer is refused", PATIENCE, async || {
        ensure!(planned.struck() > 0, "not yet");
        Ok(())
    })
    .await;
    stage.reveals().delete(&asked.name_any(), &DeleteParams::default()).await.unwrap();
    stage.until_data("once", "the answer left the Secret", &[]).await;
}

#[tokio::test]
async fn an_answer_whose_request_was_deleted_while_the_operator_was_down_is_wiped() {
    let stage = Stage::enter(&[]).await;
    stage.settings(json!({"oneTimeReveal": true})).await;
    stage.minted("once", &team()).await;
    let planned = stage.proxy.inject(1, stage.writes_of("once"), Fault::after_commit(stage.killer()));
    let asked = stage.ask("once", None, &Identity::generate().to_public().to_string()).await;
    eventually("the operator is killed", PATIENCE, async || {
        ensure!(planned.struck() == 1, "not yet");
        Ok(())
    })
    .await;
    stage.reveals().delete(&asked.name_any(), &DeleteParams::default()).await.unwrap();
    assert_eq!(stage.data("once").await, ["claimed".to_owned()].into());
    stage.mend().await;
    stage.until_data("once", "the answer left the Secret", &[]).await;
    let stage_key = stage.until("once", "who took it", |_, s| s.reveal.as_ref().is_some_and(|r| r.by.is_some())).await;
    assert_eq!(reveal_state(status(&stage_key)), Some((RevealMode::OneTime, RevealState::Revealed)));
    assert_eq!(reason(&stage.reveal("once", None).await), "AlreadyRevealed");
}
