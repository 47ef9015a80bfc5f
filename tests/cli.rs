//! The plugin as people meet it: its real binary, alone and through the real kubectl, against the real operator.
//! Every test has a namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes};
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use keywright::api::{ACCEPT_SECRET_ANNOTATION, ApiKey, KeyReveal, KeyType};
use keywright::domain::key::Key;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use rand::rngs::SysRng;
use serde_json::{Value, json};
use support::keys::{self, looks_like_a_value, settled};
use support::{PATIENCE, Shared, eventually};

/// What the program said.
#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    err: String,
}

/// A namespace of one's own.
struct Team {
    shared: &'static Shared,
    client: kube::Client,
    namespace: String,
}

impl Team {
    async fn new() -> Self {
        let shared = support::shared().await;
        let client = shared.client().await;
        let namespace = support::namespace(&client).await;
        Self { shared, client, namespace }
    }

    /// The plugin in this namespace.
    fn run(&self, args: &[&str]) -> Said {
        self.run_with(args, "")
    }

    fn run_with(&self, args: &[&str], stdin: &str) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        command.env("KUBECONFIG", self.shared.plane.kubeconfig()).args(args).args(["-n", &self.namespace]);
        said(&mut command, stdin)
    }

    /// As [`Team::run`]; a panic unless it says yes.
    fn ok(&self, args: &[&str]) -> String {
        let said = self.run(args);
        assert_eq!(said.code, 0, "{args:?}: {said:?}");
        said.out
    }

    fn kubectl(&self, args: &[&str], stdin: &str) -> Said {
        let mut command = self.shared.plane.kubectl();
        command.args(args).args(["-n", &self.namespace]);
        said(&mut command, stdin)
    }

    fn apply(&self, object: &Value) {
        let said = self.kubectl(&["apply", "-f", "-"], &object.to_string());
        assert_eq!(said.code, 0, "{said:?}");
    }

    async fn key(&self, name: &str) -> ApiKey {
        Api::<ApiKey>::namespaced(self.client.clone(), &self.namespace).get(name).await.unwrap()
    }

    /// Makes a key, and waits until it has a value.
    async fn mint(&self, name: &str, spec: &Value) -> ApiKey {
        keys::apply(&self.client, &self.namespace, name, spec).await.unwrap();
        self.until(name, |key| settled(key).is_ok()).await
    }

    async fn until(&self, name: &str, is: impl Fn(&ApiKey) -> bool) -> ApiKey {
        eventually(name, PATIENCE, async || {
            let key = self.key(name).await;
            ensure!(is(&key), "{:?}", key.status);
            Ok(key)
        })
        .await
    }

    /// The value, read by an administrator.
    fn value(&self, name: &str) -> String {
        let path = "go-template={{index .data \"key-value\" | base64decode}}";
        let said = self.kubectl(&["get", "secret", &format!("{name}-secret"), "-o", path], "");
        assert_eq!(said.code, 0, "{said:?}");
        assert!(looks_like_a_value(&said.out).is_some());
        said.out
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.shared.plane.folder().join(format!("{}-{name}", self.namespace));
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn said(command: &mut Command, stdin: &str) -> Said {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    // A program that does not read may be gone already.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

fn id(key: &ApiKey) -> String {
    key.status.as_ref().and_then(|status| status.id.clone()).unwrap_or_default()
}

fn state(key: &ApiKey) -> String {
    key.status.as_ref().and_then(|status| status.state).map(|state| format!("{state:?}")).unwrap_or_default()
}

fn alerts() -> Value {
    json!({"type": "Team", "displayName": "Checkout alerts", "presets": ["Alerts"]})
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_and_described_also_through_kubectl() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts()).await;
    let list = team.ok(&["list"]);
    let head: Vec<_> = list.lines().next().unwrap().split("   ").map(str::trim).filter(|h| !h.is_empty()).collect();
    assert_eq!(head, ["NAME", "DISPLAY NAME", "TYPE", "CREATOR", "CREATOR TYPE", "CREATED", "STATE"], "{list}");
    for word in ["checkout", "Checkout alerts", "Team", "admin", "User", "Active"] {
        assert!(list.contains(word), "{list}");
    }
    assert!(!list.contains('\u{1b}'), "no colours in a pipe");
    assert!(team.ok(&["list", "-o", "wide"]).contains(&id(&key)));
    assert_eq!(team.ok(&["list", "-o", "name"]), "apikey.keywright.dev/checkout\n");
    let json: Value = serde_json::from_str(&team.ok(&["list", "-o", "json"])).unwrap();
    assert_eq!(json["items"][0]["kind"], "ApiKey");
    assert_eq!(team.ok(&["list", "-l", "no=such"]), "");

    let text = team.ok(&["describe", "checkout"]);
    for word in [&id(&key), "Alerts", "evidence:", "alerts:ReadConfig", "documented", "Ready", "checkout-secret"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let yaml = team.ok(&["describe", "checkout", "-o", "yaml"]);
    assert!(yaml.contains("kind: ApiKey"), "{yaml}");
    let missing = team.run(&["describe", "nothing"]);
    assert_eq!((missing.code, missing.out.as_str()), (1, ""), "{missing:?}");
    assert!(missing.err.contains("not found"), "{missing:?}");
    assert_eq!(team.run(&["describe"]).code, 2);

    // kubectl finds the plugin by the PATH.
    let plugin = Path::new(env!("CARGO_BIN_EXE_kubectl-keywright")).parent().unwrap();
    let mut kubectl = team.shared.plane.kubectl();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([plugin.to_owned()].into_iter().chain(std::env::split_paths(&path))).unwrap();
    let listed = said(kubectl.env("PATH", path).args(["keywright", "list", "-n", &team.namespace]), "");
    assert_eq!((listed.code, listed.out.as_str()), (0, list.as_str()), "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_replaces_the_value_and_can_revoke_the_former_one() {
    let team = Team::new().await;
    let first = team.mint("checkout", &alerts()).await;
    team.ok(&["rotate", "checkout"]);
    let second = team.until("checkout", |key| id(key) != id(&first) && settled(key).is_ok()).await;
    assert_eq!(second.status.as_ref().unwrap().tokens.len(), 2, "the former value works for a while");
    team.ok(&["rotate", "checkout", "--revoke-previous"]);
    let third = team.until("checkout", |key| id(key) != id(&second) && settled(key).is_ok()).await;
    assert_eq!(third.status.as_ref().unwrap().tokens.len(), 1);
    assert_eq!(third.spec.rotation.unwrap().overlap.as_deref(), Some("0s"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_switched_off_and_on_and_deleted() {
    let team = Team::new().await;
    for name in ["a", "b", "c"] {
        team.mint(name, &alerts()).await;
    }
    team.ok(&["deactivate", "a"]);
    team.until("a", |key| state(key) == "Inactive").await;
    team.ok(&["activate", "a"]);
    team.until("a", |key| state(key) == "Active").await;
    let some = team.run(&["deactivate", "nothing", "b"]);
    assert_eq!(some.code, 1, "{some:?}");
    assert!(
        some.err.contains("nothing") && some.out.contains('b'),
        "one that fails does not stop the others: {some:?}"
    );

    assert!(team.ok(&["delete", "a", "--dry-run=client"]).contains("dry run"));
    assert!(team.ok(&["delete", "a", "--dry-run=server"]).contains("dry run"));
    assert_eq!(team.key("a").await.metadata.deletion_timestamp, None);
    team.ok(&["delete", "a", "b"]);
    assert_eq!(team.kubectl(&["label", "apikey/c", "leaked=yes"], "").code, 0);
    team.ok(&["delete", "-l", "leaked=yes"]);
    eventually("all are gone", PATIENCE, async || {
        let list = team.ok(&["list", "-o", "name"]);
        ensure!(list.is_empty(), "{list}");
        Ok(())
    })
    .await;
    assert_eq!(team.run(&["delete"]).code, 2, "which?");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leaked_is_identified_and_revoked() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts()).await;
    team.mint("other", &alerts()).await;
    let value = team.value("checkout");
    let known = team.run_with(&["identify"], &format!("{value}\n"));
    assert_eq!(known.code, 0, "{}", known.err);
    for word in [format!("{}/checkout", team.namespace), id(&key), "Active".to_owned(), "deactivate -n".to_owned()] {
        assert!(known.out.contains(&word), "{word}: {}", known.out);
    }
    // A value in overlap is not the one whose id is indexed.
    team.ok(&["rotate", "checkout"]);
    team.until("checkout", |now| id(now) != id(&key)).await;
    let former = team.run_with(&["identify"], &value);
    assert!(former.code == 0 && former.out.contains("overlap"), "{}", former.out);
    let unknown = Key::mint(KeyType::Team, &mut SysRng).unwrap();
    let stranger = team.run_with(&["identify"], unknown.expose());
    assert_eq!(stranger.code, 1, "{}", stranger.out);
    let argument = team.run(&["identify", &value]);
    assert_eq!(argument.code, 2);
    assert_eq!(team.run_with(&["identify"], "\n").code, 2, "nothing to identify");
    for said in [&known, &former, &stranger, &argument] {
        assert!(looks_like_a_value(&format!("{}{}", said.out, said.err)).is_none(), "a value was printed");
    }

    let plan = team.ok(&["revoke", "--id", &id(&key), "--dry-run"]);
    assert!(plan.contains("checkout") && plan.contains("deactivate") && !plan.contains("other"), "{plan}");
    let unasked = team.run(&["revoke", "--id", &id(&key)]);
    assert_eq!((unasked.code, unasked.out.as_str()), (2, ""), "{unasked:?}");
    assert_eq!(team.key("checkout").await.spec.active, None, "nothing was done yet");
    team.ok(&["revoke", "--id", &id(&key), "--yes"]);
    team.until("checkout", |key| state(key) == "Inactive").await;
    assert_eq!(state(&team.key("other").await), "Active");
    assert_eq!(team.kubectl(&["label", "apikey", "--all", "leaked=yes"], "").code, 0);
    team.ok(&["revoke", "-l", "leaked=yes", "--yes"]);
    team.until("other", |key| state(key) == "Inactive").await;
    assert_eq!(team.run(&["revoke", "--id", "key_0000000000000000", "--dry-run"]).code, 1);
}

/// Alice may send data, by a real Role.
async fn alice() -> (Team, [&'static str; 4]) {
    let team = Team::new().await;
    let subjects = json!([{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "alice"}]);
    let role = |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
    let uses = |resource: &str, names: &[&str]| json!({"apiGroups": ["keywright.dev"], "resources": [resource], "resourceNames": names, "verbs": ["use"]});
    let permissions = ["data-ingest-api-keys:Manage", "data-ingest-api-keys:ReadConfig"];
    team.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "senders"},
            "rules": [uses("permissions", &permissions), uses("presets", &["SendData"])]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "alice-sends"},
            "roleRef": role("Role", "senders"), "subjects": subjects},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": format!("{}-reads", team.namespace)},
            "roleRef": role("ClusterRole", "keywright-view"), "subjects": subjects},
    ]}));
    (team, ["--as", "alice", "--as-group", "system:authenticated"])
}

#[tokio::test(flavor = "multi_thread")]
async fn can_i_says_yes_or_no_and_which_binding() {
    let (team, alice) = alice().await;
    let ask = |args: &[&str]| team.run(&[&["can-i"], args, &alice].concat());
    let granted = async || {
        let said = ask(&["use", "data-ingest-api-keys:manage"]);
        ensure!(said.code == 0, "{said:?}");
        Ok(said)
    };
    let yes = eventually("the binding is known", PATIENCE, granted).await;
    assert!(yes.out.starts_with("yes") && yes.out.contains("alice-sends"), "{yes:?}");
    assert_eq!(ask(&["use", "presets", "SendData"]).code, 0);
    let no = ask(&["use", "presets", "Alerts"]);
    assert!(no.code == 1 && no.out.starts_with("no"), "{no:?}");
    assert!(ask(&["use", "preset", "Alrets"]).err.contains("did you mean Alerts"));
    assert_eq!(ask(&["use", "secrets", "x"]).code, 2);

    let may = ask(&["create", "--type", "SendYourData", "--preset", "SendData"]);
    assert!(may.code == 0 && may.out.contains("alice-sends"), "{may:?}");
    let not = ask(&["create", "--type", "Team", "--preset", "Alerts"]);
    assert_eq!(not.code, 1, "{not:?}");
    for word in ["Role: no", "team-custom-api-keys:Manage: not granted", "preset Alerts: not granted"] {
        assert!(not.out.contains(word), "{word}: {}", not.out);
    }
    assert_eq!(ask(&["view", "--type", "sendyourdata"]).code, 0);
    assert_eq!(ask(&["delete", "--type", "Team"]).code, 1);
    assert_eq!(ask(&["update", "--type", "SendYourData", "--preset", "Alerts"]).code, 1);
    assert_eq!(ask(&["create"]).code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_names_gate_and_binding() {
    let (team, as_alice) = alice().await;
    team.mint("sends", &json!({"type": "SendYourData", "presets": ["SendData"]})).await;
    team.mint("reads", &alerts()).await;
    eventually("the binding is known", PATIENCE, async || {
        let text = team.ok(&["explain", "alice", "sends"]);
        for word in ["view: yes", "manage: yes", "delete: yes", "alice-sends"] {
            ensure!(text.contains(word), "{word}: {text}");
        }
        Ok(())
    })
    .await;
    let text = team.ok(&["explain", "alice", "reads", "--groups", "sre,dev"]);
    for word in ["view: no", "manage: no", "delete: no", "Contents: no", "team-custom-api-keys:ReadConfig: not granted"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let curious = team.run(&[&["explain", "bob", "sends"], &as_alice[..]].concat());
    assert!(curious.code == 1 && curious.err.contains("subjectaccessreviews"), "{curious:?}");
}

/// What the operator answers is tested beside it. Here: nothing is left behind when nothing comes.
/// The seed's "view" and "copy", and its "one-time opportunity": required to download it, and gone afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_value_is_revealed_and_a_one_time_value_once_into_a_file() {
    use std::os::unix::fs::PermissionsExt;
    let team = Team::new().await;
    let digest = |key: &ApiKey| key.status.as_ref().unwrap().tokens[0].sha256.clone();
    let matches = |value: &str, key: &ApiKey| keys::sha256(value.trim_end()) == digest(key);

    let plain = team.mint("plain", &alerts()).await;
    assert!(matches(&team.ok(&["reveal", "plain"]), &plain));
    let mine = json!({"type": "Personal", "user": "admin", "presets": ["Alerts"]});
    let mine = team.mint("mine", &mine).await;
    for _ in 0..2 {
        assert!(matches(&team.ok(&["reveal", "mine"]), &mine), "sealed, and shown as often as its user likes");
    }

    team.apply(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "SecuritySettings", "metadata": {"name": "default"},
        "spec": {"oneTimeReveal": true},
    }));
    let once = team.mint("once", &alerts()).await;
    let refused = team.run(&["reveal", "once"]);
    assert!(refused.code == 2 || refused.code == 1, "{refused:?}");
    assert!(refused.err.contains("--output") && refused.out.is_empty(), "{refused:?}");
    let file = team.shared.plane.folder().join(format!("{}-once.txt", team.namespace));
    let said = team.ok(&["reveal", "once", "--output", file.to_str().unwrap()]);
    assert!(looks_like_a_value(&said).is_none(), "the value is in the file alone");
    assert!(matches(&std::fs::read_to_string(&file).unwrap(), &once));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = file.with_extension("again");
    let refused = team.run(&["reveal", "once", "--output", again.to_str().unwrap()]);
    assert!(refused.code == 1 && refused.err.contains("admin"), "who saw it is said: {refused:?}");
    assert!(!again.exists(), "no empty file is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reveal_that_is_refused_leaves_nothing() {
    let team = Team::new().await;
    team.mint("checkout", &alerts()).await;
    let missing = team.run(&["reveal", "nothing"]);
    assert_eq!((missing.code, missing.out.as_str()), (1, ""), "{missing:?}");

    let file = team.file("value", "precious");
    let taken = team.run(&["reveal", "checkout", "--output", file.to_str().unwrap()]);
    assert!(taken.code == 1 && taken.err.contains("nothing was asked for"), "{taken:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    std::fs::remove_file(&file).unwrap();
    let args = ["reveal", "checkout", "--timeout", "5s", "--output", file.to_str().unwrap(), "--as", "mallory"];
    let denied = team.run(&args);
    assert_eq!((denied.code, denied.out.as_str()), (1, ""), "{denied:?}");
    assert!(!file.exists());
    assert_eq!(team.run(&["reveal", "checkout", "--timeout", "soon"]).code, 2);
}

/// An object as a store may hold it from before a rule was there: no admission sees it.
async fn store(etcd: &str, namespace: &str, name: &str, object: &Value) {
    let key = keys::base64(&format!("/registry/keywright.dev/apikeys/{namespace}/{name}"));
    let body = json!({"key": key, "value": keys::base64(&object.to_string())}).to_string();
    let client = legacy::Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let request = Request::post(format!("{etcd}/v3/kv/put")).body(Full::from(body)).unwrap();
    let response = client.request(request).await.unwrap();
    let status = response.status();
    let text = response.into_body().collect().await.unwrap().to_bytes();
    assert!(status.is_success(), "etcd: {}", String::from_utf8_lossy(&text));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_display_name_cannot_forge_a_row_of_a_list() {
    let team = Team::new().await;
    let honest = team.mint("honest", &alerts()).await;
    let forged = "x\u{1b}[1A\r\nother      Paid for by accounting   Team   admin\u{202e}\u{200b}";
    let object = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
        "metadata": {"name": "forged", "namespace": team.namespace, "uid": "0d4b1b7e-0000-4000-8000-000000000001",
            "creationTimestamp": "2026-11-25T10:00:00Z", "generation": 1,
            "annotations": {"keywright.dev/creator": "mallory\nalice   User"}},
        "spec": {"type": "Personal", "user": "mallory\u{2066}\nbob", "displayName": forged, "presets": ["Alerts"]},
    });
    store(team.shared.plane.etcd(), &team.namespace, "forged", &object).await;
    team.until("forged", |key| key.status.is_some()).await;

    let harmless =
        |text: &str| text.chars().all(|c| c == '\n' || !(c.is_control() || "\u{202e}\u{200b}\u{2066}".contains(c)));
    let list = team.ok(&["list"]);
    assert!(harmless(&list), "{list:?}");
    let names: Vec<_> = list.lines().skip(1).map(|line| line.split("   ").next().unwrap()).collect();
    assert_eq!(names, ["forged", "honest"], "{list}");
    assert!(list.contains(r"x\u{1b}[1A\r\nother \u{20}"), "{list}");
    let columns = |line: &str| line.split("   ").filter(|cell| !cell.trim().is_empty()).count();
    let counts: Vec<_> = list.lines().map(columns).collect();
    assert_eq!(counts, [7, 7, 7], "no cell is two: {list}");
    let described = team.ok(&["describe", "forged"]);
    assert!(harmless(&described) && described.contains(r"mallory\u{2066}\nbob"), "{described:?}");
    assert!(described.contains(r"mallory\nalice"), "{described}");
    for form in ["json", "yaml"] {
        let text = team.ok(&["list", "-o", form]);
        assert!(harmless(&text), "{text:?}");
        let parsed: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(parsed["items"][0]["spec"]["displayName"], forged, "and nothing is lost");
    }
    let found = team.run(&["revoke", "--id", &id(&honest), "--dry-run"]);
    assert_eq!(found.code, 0, "{found:?}");
    let plan = team.run(&["explain", "mallory\nview: yes", "forged"]);
    assert!(harmless(&plan.out) && plan.out.starts_with(r"mallory\nview: yes on "), "{plan:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_the_longest_name_has_its_events_and_is_revealed() {
    let team = Team::new().await;
    let events: Api<Event> = Api::namespaced(team.client.clone(), &team.namespace);
    for length in [236, 237, 253] {
        let name = format!("{}-{length}", "k".repeat(length - 4));
        let mut spec = alerts();
        spec["secret"] = json!({"name": format!("secret-{length}")});
        let key = team.mint(&name, &spec).await;
        eventually("the Event", PATIENCE, async || {
            let events = events.list(&ListParams::default()).await?.items;
            let of_key = |event: &&Event| event.regarding.as_ref().is_some_and(|object| object.uid == key.metadata.uid);
            let event = events.iter().find(of_key).context("none")?;
            ensure!(event.reason.as_deref() == Some("Minted"), "{:?}", event.reason);
            ensure!(event.regarding.as_ref().unwrap().name.as_ref() == Some(&name), "its name is cut");
            Ok(())
        })
        .await;
        let described = team.kubectl(&["describe", "apikey", &name], "");
        assert!(described.out.contains("Minted"), "{described:?}");
        let value = team.ok(&["reveal", &name]);
        assert_eq!(keys::sha256(value.trim_end()), key.status.unwrap().tokens[0].sha256);
    }
    let left = Api::<KeyReveal>::namespaced(team.client.clone(), &team.namespace).list(&ListParams::default()).await;
    assert!(left.unwrap().items.is_empty(), "requests that were answered are deleted");
}

/// Lets alice do these things in a namespace.
fn allow(team: &Team, name: &str, group: &str, resource: &str, verbs: &[&str]) {
    team.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name},
            "rules": [{"apiGroups": [group], "resources": [resource], "verbs": verbs}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "alice"}]},
    ]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_accepted_by_whoever_may_restore_keys_and_by_its_digest() {
    let (team, alice) = alice().await;
    let value = Key::mint(KeyType::Team, &mut SysRng).unwrap();
    let sha256 = keys::sha256(value.expose());
    // The API server of the tests runs OwnerReferencesPermissionEnforcement: to become the owner of a restored Secret asks
    // for this right (values.yaml, rbac.ownerReferencesPermissionEnforcement).
    let operator = format!("system:serviceaccount:{}:keywright", support::operator::NAMESPACE);
    let role = ["create", "role", "adopt", "--verb=delete", "--resource=secrets"];
    let bind = ["create", "rolebinding", "adopt", "--role=adopt", &format!("--user={operator}")];
    for args in [role.as_slice(), bind.as_slice()] {
        assert_eq!(team.kubectl(args, "").code, 0);
    }
    // It came from somewhere, and nothing in it says from where.
    team.apply(&json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "restored-secret"}, "type": keys::SECRET_TYPE,
        "stringData": {"key-value": value.expose()},
    }));
    keys::apply(&team.client, &team.namespace, "restored", &alerts()).await.unwrap();
    team.until("restored", |key| keys::condition(key, "Ready").is_some_and(|ready| ready.status == "False")).await;
    let accepted = async || team.key("restored").await.annotations().get(ACCEPT_SECRET_ANNOTATION).cloned();

    let as_alice = |args: &[&str]| team.run(&[&["accept", "restored"], args, &alice].concat());
    let denied = eventually("alice may view", PATIENCE, async || {
        let said = as_alice(&["--yes"]);
        ensure!(said.err.contains("restore"), "{said:?}");
        Ok(said)
    })
    .await;
    assert!(denied.code == 1 && denied.err.contains("ClusterRole keywright-restore"), "{denied:?}");
    allow(&team, "restore", "keywright.dev", "apikeys", &["restore", "patch"]);
    let unread = eventually("alice may restore", PATIENCE, async || {
        let said = as_alice(&["--yes"]);
        ensure!(!said.err.contains("lack the right"), "{said:?}");
        Ok(said)
    })
    .await;
    assert!(
        unread.code == 1 && unread.err.contains("may not get the Secret") && unread.err.contains("--sha256"),
        "{unread:?}"
    );

    let unasked = team.run(&["accept", "restored"]);
    assert!(unasked.code == 2 && unasked.err.contains(&format!("--sha256 {sha256}")), "{unasked:?}");
    let other = team.run(&["accept", "restored", "--sha256", &"0".repeat(64)]);
    assert!(other.code == 1 && other.err.contains("another value"), "{other:?}");
    let pasted = team.run(&["accept", "restored", "--sha256", value.expose()]);
    assert_eq!(pasted.code, 2);
    for said in [&denied, &unread, &unasked, &other, &pasted] {
        assert!(looks_like_a_value(&format!("{}{}", said.out, said.err)).is_none(), "a value was printed");
    }
    assert_eq!(accepted().await, None, "nothing was done yet");
    let said = team.run(&["accept", "restored", "--sha256", &format!("sha256:{}", sha256.to_uppercase())]);
    assert!(said.code == 0 && said.err.contains("computed from the plain value"), "{said:?}");
    assert!(looks_like_a_value(&format!("{}{}", said.out, said.err)).is_none(), "a value was printed");
    assert_eq!(accepted().await, Some(format!("sha256:{sha256}")));
    let key = team.until("restored", |key| settled(key).is_ok()).await;
    assert_eq!(key.status.as_ref().unwrap().tokens[0].sha256, sha256, "the value that was accepted works");
    let managers = team.key("restored").await.metadata.managed_fields.unwrap();
    assert!(managers.iter().any(|field| field.manager.as_deref() == Some("kubectl-keywright")), "{managers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_nothing_to_accept_it_says_so_and_what_to_do() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts()).await;
    let in_order = team.run(&["accept", "checkout", "--yes"]);
    assert!(in_order.code == 1 && in_order.err.contains("nothing to accept"), "{in_order:?}");
    let minted = team.run(&["accept", "checkout", "--new-value"]);
    assert!(minted.code == 1 && minted.err.contains("kubectl keywright rotate checkout"), "{minted:?}");
    assert_eq!(team.run(&["accept", "checkout", "--new-value", "--sha256", &"0".repeat(64)]).code, 2);
    let missing = team.run(&["accept", "nothing", "--yes"]);
    assert!(missing.code == 1 && missing.err.contains("not found"), "{missing:?}");

    let secrets: Api<Secret> = Api::namespaced(team.client.clone(), &team.namespace);
    secrets.delete("checkout-secret", &kube::api::DeleteParams::default()).await.unwrap();
    // So that the operator looks at it at once.
    assert_eq!(
        team.kubectl(&["patch", "apikey", "checkout", "--type=merge", "-p", r#"{"spec":{"displayName":"x"}}"#], "")
            .code,
        0
    );
    team.until("checkout", |key| state(key) == "Lost").await;
    let lost = team.run(&["accept", "checkout", "--yes"]);
    assert!(lost.code == 1 && lost.err.contains("knows its value already"), "{lost:?}");
    team.ok(&["accept", "checkout", "--new-value"]);
    team.until("checkout", |now| id(now) != id(&key) && settled(now).is_ok()).await;
}

/// The samples of Coralogix's own operator.
const SAMPLES: &str = r#"
apiVersion: coralogix.com/v1alpha1
kind: ApiKey
metadata: {name: send-your-data-key-sample}
spec: {name: send-your-data-key-sample, owner: {teamId: 1234567}, presets: [SendData]}
---
apiVersion: coralogix.com/v1alpha1
kind: ApiKey
metadata: {name: team-key-sample}
spec:
  name: team-key-sample
  owner: {teamId: 4013254}
  presets: [APM]
  permissions: [ALERTS-MAP:READ]
  accessPolicy: '{ "version": "v2025-01-01", "rules": [], "default": { "permissions": { "team-custom-api-keys:ReadConfig": "grant",
    "team-custom-api-keys:Manage": "grant", "team-custom-api-keys:ReadAccessPolicy": "grant", "team-custom-api-keys:UpdateAccessPolicy": "grant" }, "additionalInfo": null } }'
---
apiVersion: coralogix.com/v1alpha1
kind: ApiKey
metadata: {name: user-key-sample}
spec: {name: user-key-sample, owner: {userId: aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee}, presets: [APM], permissions: [ALERTS-MAP:READ]}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_coralogix_become_ours() {
    let team = Team::new().await;
    let file = team.file("samples.yaml", SAMPLES);
    let file = file.to_str().unwrap();
    let migrated = team.run(&["migrate", "-f", file]);
    assert_eq!(migrated.code, 0, "{migrated:?}");
    assert!(migrated.out.contains("# user-key-sample: "), "{}", migrated.out);
    assert!(migrated.err.contains("warning: user-key-sample: "), "{}", migrated.err);
    assert_eq!(team.run(&["migrate", "-f", file, "--strict"]).code, 1);
    let from_pipe = team.run_with(&["migrate", "-f", "-"], SAMPLES);
    assert_eq!(from_pipe.out, migrated.out);

    let documents: Vec<&str> = migrated.out.split("---\n").filter(|document| !document.trim().is_empty()).collect();
    assert_eq!(documents.len(), 4, "{}", migrated.out);
    assert!(documents[1].contains("kind: AccessPolicy") && documents[2].contains("name: team-key-sample-policy"));
    for document in &documents {
        let applied = team.kubectl(&["apply", "-f", "-"], document);
        assert_eq!(applied.code, 0, "{applied:?}\n{document}");
    }
    let types =
        [("send-your-data-key-sample", "SendYourData"), ("team-key-sample", "Team"), ("user-key-sample", "Personal")];
    for (name, key_type) in types {
        assert_eq!(format!("{:?}", team.key(name).await.spec.key_type), key_type);
    }
    let not_legacy = team.run(&["migrate", "team-key-sample"]);
    assert!(not_legacy.code == 1 && not_legacy.err.contains("no legacy key"), "{not_legacy:?}");
    assert_eq!(team.ok(&["legacy", "list"]), "");
    assert_eq!(team.run(&["legacy", "describe", "team-key-sample"]).code, 1);

    // The policy comes back as the JSON that it was.
    let json: Value = serde_json::from_str(&team.ok(&["policy", "export", "team-key-sample-policy"])).unwrap();
    assert_eq!(json["default"]["permissions"]["team-custom-api-keys:Manage"], "grant");
    let again = team.run_with(&["policy", "import", "-", "--name", "team-key-sample-policy"], &json.to_string());
    assert_eq!(again.code, 0, "{again:?}");
    let applied = team.kubectl(&["apply", "-f", "-"], &again.out);
    assert!(applied.out.contains("unchanged"), "{applied:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn legacy_keys_become_custom_keys() {
    let team = Team::new().await;
    let value = "0123456789abcdef0123456789abcdef0123456789abcdef";
    team.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "old"}, "stringData": {"k": value}}));
    let spec = json!({"type": "SendYourData", "legacy": "SendYourData", "secret": {"name": "old", "key": "k"}});
    team.mint("shipper", &spec).await;
    team.mint("modern", &alerts()).await;
    let list = team.ok(&["legacy", "list"]);
    assert!(list.contains("LEGACY") && list.contains("shipper") && !list.contains("modern"), "{list}");
    let text = team.ok(&["legacy", "describe", "shipper"]);
    assert!(text.contains("logs.data-ingress:SendData  (legacy role)"), "{text}");
    let migrated = team.ok(&["migrate", "shipper"]);
    assert!(migrated.contains("name: shipper-custom") && !migrated.contains("legacy"), "{migrated}");
    let applied = team.kubectl(&["apply", "-f", "-"], &migrated);
    assert_eq!(applied.code, 0, "{applied:?}\n{migrated}");
    team.until("shipper-custom", |key| settled(key).is_ok()).await;
    // A legacy value has another form, and is known all the same.
    let known = team.run_with(&["identify"], value);
    assert!(known.code == 0 && known.out.contains("/shipper\n"), "{known:?}");
    assert!(!format!("{known:?}").contains(value), "a value was printed");
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_cannot_be_translated_say_where() {
    let (team, alice) = alice().await;
    let deny = r#"{"version": "2025-01-01", "rules": [{"targets": [{"group": "7"}], "permissions": {
        "team-custom-api-keys:Manage": "deny", "team-custom-api-keys:ReadConfig": "grant"}}],
        "default": {"permissions": {}}}"#;
    let import = team.run_with(&["policy", "import", "-", "--name", "p"], deny);
    assert_eq!((import.code, import.out.as_str()), (1, ""), "{import:?}");
    assert!(import.err.contains("rules[0].permissions"), "{import:?}");
    team.apply(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "AccessPolicy", "metadata": {"name": "own"},
        "spec": {"mode": "Private"},
    }));
    let export = team.run(&["policy", "export", "own"]);
    assert!(export.code == 1 && export.err.contains("Private"), "{export:?}");
    let export = team.run(&[&["policy", "export", "own"], &alice[..]].concat());
    assert!(export.code == 1 && export.err.contains("ReadAccessPolicy"), "{export:?}");
}

/// Without a cluster.
#[test]
fn completion_and_manual_are_written() {
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        said(command.env("KUBECONFIG", "/nonexistent").args(args), "")
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completion", shell]);
        assert!(script.code == 0 && script.out.contains("kubectl-keywright"), "{shell}: {}", script.err);
        assert!(script.out.contains("revoke-previous"), "{shell}");
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-man");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let man = run(&["man", folder.to_str().unwrap()]);
    assert_eq!(man.code, 0, "{man:?}");
    for page in ["kubectl-keywright.1", "kubectl-keywright-reveal.1"] {
        let text = std::fs::read_to_string(folder.join(page)).with_context(|| page.to_owned()).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
    assert_eq!(run(&["man", "/nonexistent/folder"]).code, 1);
    assert_eq!(run(&["list"]).code, 1, "no cluster");
    assert_eq!(run(&["nonsense"]).code, 2);
    assert_eq!(run(&["--help"]).code, 0);
}
