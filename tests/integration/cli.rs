//! The binary of the kubectl plugin, run directly and through a real kubectl, against a real operator. Each test has
//! its own namespace.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::keys::{self, find_value, settled};
use crate::support::{Shared, TIMEOUT, eventually};
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

/// The exit code and output of a command.
#[derive(Debug)]
struct CommandOutput {
    code: i32,
    stdout: String,
    stderr: String,
}

/// A namespace in the shared cluster.
struct Team {
    shared: &'static Shared,
    client: kube::Client,
    namespace: String,
}

impl Team {
    async fn new() -> Self {
        let shared = crate::support::shared().await;
        let client = shared.client().await;
        let namespace = crate::support::namespace(&client).await;
        Self { shared, client, namespace }
    }

    /// Runs the plugin in this namespace.
    fn run(&self, args: &[&str]) -> CommandOutput {
        self.run_with(args, "")
    }

    fn run_with(&self, args: &[&str], stdin: &str) -> CommandOutput {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        command.env("KUBECONFIG", self.shared.plane.kubeconfig()).args(args).args(["-n", &self.namespace]);
        run_command(&mut command, stdin)
    }

    /// Runs the plugin and returns its standard output; panics if it fails.
    fn run_ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.code, 0, "{args:?}: {output:?}");
        output.stdout
    }

    fn kubectl(&self, args: &[&str], stdin: &str) -> CommandOutput {
        let mut command = self.shared.plane.kubectl();
        command.args(args).args(["-n", &self.namespace]);
        run_command(&mut command, stdin)
    }

    fn apply(&self, object: &Value) {
        let output = self.kubectl(&["apply", "-f", "-"], &object.to_string());
        assert_eq!(output.code, 0, "{output:?}");
    }

    async fn key(&self, name: &str) -> ApiKey {
        Api::<ApiKey>::namespaced(self.client.clone(), &self.namespace).get(name).await.unwrap()
    }

    /// Creates a key, and waits until it has a value.
    async fn mint(&self, name: &str, spec: &Value) -> ApiKey {
        keys::apply(&self.client, &self.namespace, name, spec).await.unwrap();
        self.wait_until(name, |key| settled(key).is_ok()).await
    }

    async fn wait_until(&self, name: &str, condition: impl Fn(&ApiKey) -> bool) -> ApiKey {
        eventually(name, TIMEOUT, async || {
            let key = self.key(name).await;
            ensure!(condition(&key), "{:?}", key.status);
            Ok(key)
        })
        .await
    }

    /// Reads the value from the Secret as administrator.
    fn value(&self, name: &str) -> String {
        let path = "go-template={{index .data \"key-value\" | base64decode}}";
        let output = self.kubectl(&["get", "secret", &format!("{name}-secret"), "-o", path], "");
        assert_eq!(output.code, 0, "{output:?}");
        assert!(find_value(&output.stdout).is_some());
        output.stdout
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.shared.plane.folder().join(format!("{}-{name}", self.namespace));
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn run_command(command: &mut Command, stdin: &str) -> CommandOutput {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    // Fails if the process has ended without reading its input.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    CommandOutput { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn id(key: &ApiKey) -> String {
    key.status.as_ref().and_then(|status| status.id.clone()).unwrap_or_default()
}

fn state(key: &ApiKey) -> String {
    key.status.as_ref().and_then(|status| status.state).map(|state| format!("{state:?}")).unwrap_or_default()
}

fn alerts_key() -> Value {
    json!({"type": "Team", "displayName": "Checkout alerts", "presets": ["Alerts"]})
}

#[tokio::test(flavor = "multi_thread")]
async fn list_and_describe_show_keys_directly_and_through_kubectl() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts_key()).await;
    let list = team.run_ok(&["list"]);
    let head: Vec<_> = list.lines().next().unwrap().split("   ").map(str::trim).filter(|h| !h.is_empty()).collect();
    assert_eq!(head, ["NAME", "DISPLAY NAME", "TYPE", "CREATOR", "CREATOR TYPE", "CREATED", "STATE"], "{list}");
    for word in ["checkout", "Checkout alerts", "Team", "admin", "User", "Active"] {
        assert!(list.contains(word), "{list}");
    }
    assert!(!list.contains('\u{1b}'), "output to a pipe has no colors");
    assert!(team.run_ok(&["list", "-o", "wide"]).contains(&id(&key)));
    assert_eq!(team.run_ok(&["list", "-o", "name"]), "apikey.keywright.dev/checkout\n");
    let json: Value = serde_json::from_str(&team.run_ok(&["list", "-o", "json"])).unwrap();
    assert_eq!(json["items"][0]["kind"], "ApiKey");
    assert_eq!(team.run_ok(&["list", "-l", "no=such"]), "");

    let text = team.run_ok(&["describe", "checkout"]);
    for word in [&id(&key), "Alerts", "evidence:", "alerts:ReadConfig", "documented", "Ready", "checkout-secret"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let yaml = team.run_ok(&["describe", "checkout", "-o", "yaml"]);
    assert!(yaml.contains("kind: ApiKey"), "{yaml}");
    let missing = team.run(&["describe", "nothing"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (1, ""), "{missing:?}");
    assert!(missing.stderr.contains("not found"), "{missing:?}");
    assert_eq!(team.run(&["describe"]).code, 2);

    // kubectl finds the plugin in PATH.
    let plugin = Path::new(env!("CARGO_BIN_EXE_kubectl-keywright")).parent().unwrap();
    let mut kubectl = team.shared.plane.kubectl();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([plugin.to_owned()].into_iter().chain(std::env::split_paths(&path))).unwrap();
    let listed = run_command(kubectl.env("PATH", path).args(["keywright", "list", "-n", &team.namespace]), "");
    assert_eq!((listed.code, listed.stdout.as_str()), (0, list.as_str()), "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rotate_replaces_the_value_and_revoke_previous_ends_the_overlap() {
    let team = Team::new().await;
    let first = team.mint("checkout", &alerts_key()).await;
    team.run_ok(&["rotate", "checkout"]);
    let second = team.wait_until("checkout", |key| id(key) != id(&first) && settled(key).is_ok()).await;
    assert_eq!(second.status.as_ref().unwrap().tokens.len(), 2, "the previous value is in overlap");
    team.run_ok(&["rotate", "checkout", "--revoke-previous"]);
    let third = team.wait_until("checkout", |key| id(key) != id(&second) && settled(key).is_ok()).await;
    assert_eq!(third.status.as_ref().unwrap().tokens.len(), 1);
    assert_eq!(third.spec.rotation.unwrap().overlap.as_deref(), Some("0s"));
}

#[tokio::test(flavor = "multi_thread")]
async fn deactivate_activate_and_delete_change_the_named_or_selected_keys() {
    let team = Team::new().await;
    for name in ["a", "b", "c"] {
        team.mint(name, &alerts_key()).await;
    }
    team.run_ok(&["deactivate", "a"]);
    team.wait_until("a", |key| state(key) == "Inactive").await;
    team.run_ok(&["activate", "a"]);
    team.wait_until("a", |key| state(key) == "Active").await;
    let some = team.run(&["deactivate", "nothing", "b"]);
    assert_eq!(some.code, 1, "{some:?}");
    assert!(
        some.stderr.contains("nothing") && some.stdout.contains('b'),
        "a failure does not stop the command: {some:?}"
    );

    assert!(team.run_ok(&["delete", "a", "--dry-run=client"]).contains("dry run"));
    assert!(team.run_ok(&["delete", "a", "--dry-run=server"]).contains("dry run"));
    assert_eq!(team.key("a").await.metadata.deletion_timestamp, None);
    team.run_ok(&["delete", "a", "b"]);
    assert_eq!(team.kubectl(&["label", "apikey/c", "leaked=yes"], "").code, 0);
    team.run_ok(&["delete", "-l", "leaked=yes"]);
    eventually("all keys are deleted", TIMEOUT, async || {
        let list = team.run_ok(&["list", "-o", "name"]);
        ensure!(list.is_empty(), "{list}");
        Ok(())
    })
    .await;
    assert_eq!(team.run(&["delete"]).code, 2, "delete needs a name or a selector");
}

#[tokio::test(flavor = "multi_thread")]
async fn identify_finds_the_key_of_a_value_and_revoke_deactivates_it() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts_key()).await;
    team.mint("other", &alerts_key()).await;
    let value = team.value("checkout");
    let known = team.run_with(&["identify"], &format!("{value}\n"));
    assert_eq!(known.code, 0, "{}", known.stderr);
    for word in [format!("{}/checkout", team.namespace), id(&key), "Active".to_owned(), "deactivate -n".to_owned()] {
        assert!(known.stdout.contains(&word), "{word}: {}", known.stdout);
    }
    // status.id is that of the current value, so a value in overlap needs another search.
    team.run_ok(&["rotate", "checkout"]);
    team.wait_until("checkout", |now| id(now) != id(&key)).await;
    let previous = team.run_with(&["identify"], &value);
    assert!(previous.code == 0 && previous.stdout.contains("overlap"), "{}", previous.stdout);
    let unknown = Key::mint(KeyType::Team, &mut SysRng).unwrap();
    let unmatched = team.run_with(&["identify"], unknown.expose());
    assert_eq!(unmatched.code, 1, "{}", unmatched.stdout);
    let argument = team.run(&["identify", &value]);
    assert_eq!(argument.code, 2);
    assert_eq!(team.run_with(&["identify"], "\n").code, 2, "an empty value is a usage error");
    for output in [&known, &previous, &unmatched, &argument] {
        assert!(find_value(&format!("{}{}", output.stdout, output.stderr)).is_none(), "the output contains a value");
    }

    let plan = team.run_ok(&["revoke", "--id", &id(&key), "--dry-run"]);
    assert!(plan.contains("checkout") && plan.contains("deactivate") && !plan.contains("other"), "{plan}");
    let unconfirmed = team.run(&["revoke", "--id", &id(&key)]);
    assert_eq!((unconfirmed.code, unconfirmed.stdout.as_str()), (2, ""), "{unconfirmed:?}");
    assert_eq!(team.key("checkout").await.spec.active, None, "without --yes nothing changes");
    team.run_ok(&["revoke", "--id", &id(&key), "--yes"]);
    team.wait_until("checkout", |key| state(key) == "Inactive").await;
    assert_eq!(state(&team.key("other").await), "Active");
    assert_eq!(team.kubectl(&["label", "apikey", "--all", "leaked=yes"], "").code, 0);
    team.run_ok(&["revoke", "-l", "leaked=yes", "--yes"]);
    team.wait_until("other", |key| state(key) == "Inactive").await;
    assert_eq!(team.run(&["revoke", "--id", "key_0000000000000000", "--dry-run"]).code, 1);
}

/// Returns a team in which a Role lets alice manage and reveal SendYourData keys, and the flags to impersonate her.
async fn team_with_alice() -> (Team, [&'static str; 4]) {
    let team = Team::new().await;
    let subjects = json!([{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "alice"}]);
    let role = |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
    let uses = |resource: &str, names: &[&str]| {
        let groups = ["keywright.dev"];
        json!({"apiGroups": groups, "resources": [resource], "resourceNames": names, "verbs": ["use"]})
    };
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
async fn can_i_answers_yes_or_no_and_names_the_binding() {
    let (team, alice) = team_with_alice().await;
    let can_i = |args: &[&str]| team.run(&[&["can-i"], args, &alice].concat());
    let granted = async || {
        let output = can_i(&["use", "data-ingest-api-keys:manage"]);
        ensure!(output.code == 0, "{output:?}");
        Ok(output)
    };
    let yes = eventually("the RoleBinding applies", TIMEOUT, granted).await;
    assert!(yes.stdout.starts_with("yes") && yes.stdout.contains("alice-sends"), "{yes:?}");
    assert_eq!(can_i(&["use", "presets", "SendData"]).code, 0);
    let no = can_i(&["use", "presets", "Alerts"]);
    assert!(no.code == 1 && no.stdout.starts_with("no"), "{no:?}");
    assert!(can_i(&["use", "preset", "Alrets"]).stderr.contains("did you mean Alerts"));
    assert_eq!(can_i(&["use", "secrets", "x"]).code, 2);

    let allowed = can_i(&["create", "--type", "SendYourData", "--preset", "SendData"]);
    assert!(allowed.code == 0 && allowed.stdout.contains("alice-sends"), "{allowed:?}");
    let denied = can_i(&["create", "--type", "Team", "--preset", "Alerts"]);
    assert_eq!(denied.code, 1, "{denied:?}");
    for word in ["Role: no", "team-custom-api-keys:Manage: not granted", "preset Alerts: not granted"] {
        assert!(denied.stdout.contains(word), "{word}: {}", denied.stdout);
    }
    assert_eq!(can_i(&["view", "--type", "sendyourdata"]).code, 0);
    assert_eq!(can_i(&["delete", "--type", "Team"]).code, 1);
    assert_eq!(can_i(&["update", "--type", "SendYourData", "--preset", "Alerts"]).code, 1);
    assert_eq!(can_i(&["create"]).code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_names_the_checks_and_the_binding_of_a_user() {
    let (team, as_alice) = team_with_alice().await;
    team.mint("sends", &json!({"type": "SendYourData", "presets": ["SendData"]})).await;
    team.mint("reads", &alerts_key()).await;
    eventually("the RoleBinding applies", TIMEOUT, async || {
        let text = team.run_ok(&["explain", "alice", "sends"]);
        for word in ["view: yes", "manage: yes", "delete: yes", "alice-sends"] {
            ensure!(text.contains(word), "{word}: {text}");
        }
        Ok(())
    })
    .await;
    let text = team.run_ok(&["explain", "alice", "reads", "--groups", "sre,dev"]);
    for word in ["view: no", "manage: no", "delete: no", "Contents: no", "team-custom-api-keys:ReadConfig: not granted"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let unauthorized = team.run(&[&["explain", "bob", "sends"], &as_alice[..]].concat());
    assert!(unauthorized.code == 1 && unauthorized.stderr.contains("subjectaccessreviews"), "{unauthorized:?}");
}

/// docs/specification.md, "Actions" (view, copy) and "Security settings" (one-time reveal).
#[tokio::test(flavor = "multi_thread")]
async fn reveal_prints_a_value_and_writes_a_one_time_value_once_to_a_file() {
    use std::os::unix::fs::PermissionsExt;
    let team = Team::new().await;
    let digest = |key: &ApiKey| key.status.as_ref().unwrap().tokens[0].sha256.clone();
    let matches = |value: &str, key: &ApiKey| keys::sha256(value.trim_end()) == digest(key);

    let plain = team.mint("plain", &alerts_key()).await;
    assert!(matches(&team.run_ok(&["reveal", "plain"]), &plain));
    let mine = json!({"type": "Personal", "user": "admin", "presets": ["Alerts"]});
    let mine = team.mint("mine", &mine).await;
    for _ in 0..2 {
        assert!(matches(&team.run_ok(&["reveal", "mine"]), &mine), "sealed values can be revealed repeatedly");
    }

    team.apply(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "SecuritySettings", "metadata": {"name": "default"},
        "spec": {"oneTimeReveal": true},
    }));
    let once = team.mint("once", &alerts_key()).await;
    let refused = team.run(&["reveal", "once"]);
    assert!(refused.code == 2 || refused.code == 1, "{refused:?}");
    assert!(refused.stderr.contains("--output") && refused.stdout.is_empty(), "{refused:?}");
    let file = team.shared.plane.folder().join(format!("{}-once.txt", team.namespace));
    let stdout = team.run_ok(&["reveal", "once", "--output", file.to_str().unwrap()]);
    assert!(find_value(&stdout).is_none(), "the value is written only to the file");
    assert!(matches(&std::fs::read_to_string(&file).unwrap(), &once));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = file.with_extension("again");
    let refused = team.run(&["reveal", "once", "--output", again.to_str().unwrap()]);
    assert!(
        refused.code == 1 && refused.stderr.contains("admin"),
        "the message names the user who revealed it: {refused:?}"
    );
    assert!(!again.exists(), "no empty file remains");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_reveal_leaves_no_output_and_no_file() {
    let team = Team::new().await;
    team.mint("checkout", &alerts_key()).await;
    let missing = team.run(&["reveal", "nothing"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (1, ""), "{missing:?}");

    let file = team.file("value", "precious");
    let taken = team.run(&["reveal", "checkout", "--output", file.to_str().unwrap()]);
    assert!(taken.code == 1 && taken.stderr.contains("the value was not requested"), "{taken:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    std::fs::remove_file(&file).unwrap();
    let args = ["reveal", "checkout", "--timeout", "5s", "--output", file.to_str().unwrap(), "--as", "mallory"];
    let denied = team.run(&args);
    assert_eq!((denied.code, denied.stdout.as_str()), (1, ""), "{denied:?}");
    assert!(!file.exists());
    assert_eq!(team.run(&["reveal", "checkout", "--timeout", "soon"]).code, 2);
}

/// Writes an object directly to etcd, without admission, as objects from before a validation rule are stored.
async fn write_to_etcd(etcd: &str, namespace: &str, name: &str, object: &Value) {
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
async fn control_characters_in_stored_objects_are_escaped_in_output() {
    let team = Team::new().await;
    let honest = team.mint("honest", &alerts_key()).await;
    let forged = "x\u{1b}[1A\r\nother      Paid for by accounting   Team   admin\u{202e}\u{200b}";
    let object = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
        "metadata": {"name": "forged", "namespace": team.namespace, "uid": "0d4b1b7e-0000-4000-8000-000000000001",
            "creationTimestamp": "2026-11-25T10:00:00Z", "generation": 1,
            "annotations": {"keywright.dev/creator": "mallory\nalice   User"}},
        "spec": {"type": "Personal", "user": "mallory\u{2066}\nbob", "displayName": forged, "presets": ["Alerts"]},
    });
    write_to_etcd(team.shared.plane.etcd(), &team.namespace, "forged", &object).await;
    team.wait_until("forged", |key| key.status.is_some()).await;

    let harmless =
        |text: &str| text.chars().all(|c| c == '\n' || !(c.is_control() || "\u{202e}\u{200b}\u{2066}".contains(c)));
    let list = team.run_ok(&["list"]);
    assert!(harmless(&list), "{list:?}");
    let names: Vec<_> = list.lines().skip(1).map(|line| line.split("   ").next().unwrap()).collect();
    assert_eq!(names, ["forged", "honest"], "{list}");
    assert!(list.contains(r"x\u{1b}[1A\r\nother \u{20}"), "{list}");
    let columns = |line: &str| line.split("   ").filter(|cell| !cell.trim().is_empty()).count();
    let counts: Vec<_> = list.lines().map(columns).collect();
    assert_eq!(counts, [7, 7, 7], "each row has 7 cells: {list}");
    let described = team.run_ok(&["describe", "forged"]);
    assert!(harmless(&described) && described.contains(r"mallory\u{2066}\nbob"), "{described:?}");
    assert!(described.contains(r"mallory\nalice"), "{described}");
    for format in ["json", "yaml"] {
        let text = team.run_ok(&["list", "-o", format]);
        assert!(harmless(&text), "{text:?}");
        let parsed: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(parsed["items"][0]["spec"]["displayName"], forged, "the text is unchanged after parsing");
    }
    let found = team.run(&["revoke", "--id", &id(&honest), "--dry-run"]);
    assert_eq!(found.code, 0, "{found:?}");
    let plan = team.run(&["explain", "mallory\nview: yes", "forged"]);
    assert!(harmless(&plan.stdout) && plan.stdout.starts_with(r"mallory\nview: yes on "), "{plan:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_with_the_longest_names_have_events_and_can_be_revealed() {
    let team = Team::new().await;
    let events: Api<Event> = Api::namespaced(team.client.clone(), &team.namespace);
    for length in [236, 237, 253] {
        let name = format!("{}-{length}", "k".repeat(length - 4));
        let mut spec = alerts_key();
        spec["secret"] = json!({"name": format!("secret-{length}")});
        let key = team.mint(&name, &spec).await;
        eventually("the key has an Event", TIMEOUT, async || {
            let events = events.list(&ListParams::default()).await?.items;
            let of_key = |event: &&Event| event.regarding.as_ref().is_some_and(|object| object.uid == key.metadata.uid);
            let event = events.iter().find(of_key).context("no Event")?;
            ensure!(event.reason.as_deref() == Some("Minted"), "{:?}", event.reason);
            ensure!(
                event.regarding.as_ref().unwrap().name.as_ref() == Some(&name),
                "the Event must have the full name"
            );
            Ok(())
        })
        .await;
        let described = team.kubectl(&["describe", "apikey", &name], "");
        assert!(described.stdout.contains("Minted"), "{described:?}");
        let value = team.run_ok(&["reveal", &name]);
        assert_eq!(keys::sha256(value.trim_end()), key.status.unwrap().tokens[0].sha256);
    }
    let remaining =
        Api::<KeyReveal>::namespaced(team.client.clone(), &team.namespace).list(&ListParams::default()).await;
    assert!(remaining.unwrap().items.is_empty(), "the plugin deletes answered requests");
}

/// Grants alice verbs on a resource in the namespace.
fn allow_alice(team: &Team, name: &str, group: &str, resource: &str, verbs: &[&str]) {
    team.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name},
            "rules": [{"apiGroups": [group], "resources": [resource], "verbs": verbs}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "alice"}]},
    ]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn accept_needs_the_right_to_restore_and_the_digest_of_the_value() {
    let (team, alice) = team_with_alice().await;
    let value = Key::mint(KeyType::Team, &mut SysRng).unwrap();
    let sha256 = keys::sha256(value.expose());
    // The tests' API server runs OwnerReferencesPermissionEnforcement, so the operator needs this right to set the
    // owner of a restored Secret (values.yaml, rbac.ownerReferencesPermissionEnforcement).
    let operator = format!("system:serviceaccount:{}:keywright", crate::support::operator::NAMESPACE);
    let role = ["create", "role", "adopt", "--verb=delete", "--resource=secrets"];
    let bind = ["create", "rolebinding", "adopt", "--role=adopt", &format!("--user={operator}")];
    for args in [role.as_slice(), bind.as_slice()] {
        assert_eq!(team.kubectl(args, "").code, 0);
    }
    // A restored Secret without owner and without record.
    team.apply(&json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "restored-secret"}, "type": keys::SECRET_TYPE,
        "stringData": {"key-value": value.expose()},
    }));
    keys::apply(&team.client, &team.namespace, "restored", &alerts_key()).await.unwrap();
    team.wait_until("restored", |key| keys::condition(key, "Ready").is_some_and(|ready| ready.status == "False")).await;
    let accepted = async || team.key("restored").await.annotations().get(ACCEPT_SECRET_ANNOTATION).cloned();

    let as_alice = |args: &[&str]| team.run(&[&["accept", "restored"], args, &alice].concat());
    let denied = eventually("the ClusterRoleBinding applies", TIMEOUT, async || {
        let output = as_alice(&["--yes"]);
        ensure!(output.stderr.contains("restore"), "{output:?}");
        Ok(output)
    })
    .await;
    assert!(denied.code == 1 && denied.stderr.contains("ClusterRole keywright-restore"), "{denied:?}");
    allow_alice(&team, "restore", "keywright.dev", "apikeys", &["restore", "patch"]);
    let without_secret = eventually("the RoleBinding applies", TIMEOUT, async || {
        let output = as_alice(&["--yes"]);
        ensure!(!output.stderr.contains("lack the right"), "{output:?}");
        Ok(output)
    })
    .await;
    assert!(
        without_secret.code == 1
            && without_secret.stderr.contains("may not get the Secret")
            && without_secret.stderr.contains("--sha256"),
        "{without_secret:?}"
    );

    let unconfirmed = team.run(&["accept", "restored"]);
    assert!(unconfirmed.code == 2 && unconfirmed.stderr.contains(&format!("--sha256 {sha256}")), "{unconfirmed:?}");
    let other = team.run(&["accept", "restored", "--sha256", &"0".repeat(64)]);
    assert!(other.code == 1 && other.stderr.contains("another value"), "{other:?}");
    let pasted = team.run(&["accept", "restored", "--sha256", value.expose()]);
    assert_eq!(pasted.code, 2);
    for output in [&denied, &without_secret, &unconfirmed, &other, &pasted] {
        assert!(find_value(&format!("{}{}", output.stdout, output.stderr)).is_none(), "the output contains a value");
    }
    assert_eq!(accepted().await, None, "without --yes nothing changes");
    let output = team.run(&["accept", "restored", "--sha256", &format!("sha256:{}", sha256.to_uppercase())]);
    assert!(output.code == 0 && output.stderr.contains("computed from the plain value"), "{output:?}");
    assert!(find_value(&format!("{}{}", output.stdout, output.stderr)).is_none(), "the output contains a value");
    assert_eq!(accepted().await, Some(format!("sha256:{sha256}")));
    let key = team.wait_until("restored", |key| settled(key).is_ok()).await;
    assert_eq!(key.status.as_ref().unwrap().tokens[0].sha256, sha256, "the key has the accepted value");
    let managers = team.key("restored").await.metadata.managed_fields.unwrap();
    assert!(managers.iter().any(|field| field.manager.as_deref() == Some("kubectl-keywright")), "{managers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn accept_fails_with_the_fix_if_there_is_nothing_to_accept() {
    let team = Team::new().await;
    let key = team.mint("checkout", &alerts_key()).await;
    let active = team.run(&["accept", "checkout", "--yes"]);
    assert!(active.code == 1 && active.stderr.contains("nothing to accept"), "{active:?}");
    let minted = team.run(&["accept", "checkout", "--new-value"]);
    assert!(minted.code == 1 && minted.stderr.contains("kubectl keywright rotate checkout"), "{minted:?}");
    assert_eq!(team.run(&["accept", "checkout", "--new-value", "--sha256", &"0".repeat(64)]).code, 2);
    let missing = team.run(&["accept", "nothing", "--yes"]);
    assert!(missing.code == 1 && missing.stderr.contains("not found"), "{missing:?}");

    let secrets: Api<Secret> = Api::namespaced(team.client.clone(), &team.namespace);
    secrets.delete("checkout-secret", &kube::api::DeleteParams::default()).await.unwrap();
    // The change makes the operator check the Secret at once.
    assert_eq!(
        team.kubectl(&["patch", "apikey", "checkout", "--type=merge", "-p", r#"{"spec":{"displayName":"x"}}"#], "")
            .code,
        0
    );
    team.wait_until("checkout", |key| state(key) == "Lost").await;
    let lost = team.run(&["accept", "checkout", "--yes"]);
    assert!(lost.code == 1 && lost.stderr.contains("already has a value"), "{lost:?}");
    team.run_ok(&["accept", "checkout", "--new-value"]);
    team.wait_until("checkout", |now| id(now) != id(&key) && settled(now).is_ok()).await;
}

/// The samples of the Coralogix operator.
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
async fn migrate_converts_resources_of_the_coralogix_operator() {
    let team = Team::new().await;
    let file = team.file("samples.yaml", SAMPLES);
    let file = file.to_str().unwrap();
    let migrated = team.run(&["migrate", "-f", file]);
    assert_eq!(migrated.code, 0, "{migrated:?}");
    assert!(migrated.stdout.contains("# user-key-sample: "), "{}", migrated.stdout);
    assert!(migrated.stderr.contains("warning: user-key-sample: "), "{}", migrated.stderr);
    assert_eq!(team.run(&["migrate", "-f", file, "--strict"]).code, 1);
    let from_pipe = team.run_with(&["migrate", "-f", "-"], SAMPLES);
    assert_eq!(from_pipe.stdout, migrated.stdout);

    let documents: Vec<&str> = migrated.stdout.split("---\n").filter(|document| !document.trim().is_empty()).collect();
    assert_eq!(documents.len(), 4, "{}", migrated.stdout);
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
    assert!(not_legacy.code == 1 && not_legacy.stderr.contains("not a legacy key"), "{not_legacy:?}");
    assert_eq!(team.run_ok(&["legacy", "list"]), "");
    assert_eq!(team.run(&["legacy", "describe", "team-key-sample"]).code, 1);

    // Exporting and importing the policy again changes nothing.
    let json: Value = serde_json::from_str(&team.run_ok(&["policy", "export", "team-key-sample-policy"])).unwrap();
    assert_eq!(json["default"]["permissions"]["team-custom-api-keys:Manage"], "grant");
    let again = team.run_with(&["policy", "import", "-", "--name", "team-key-sample-policy"], &json.to_string());
    assert_eq!(again.code, 0, "{again:?}");
    let applied = team.kubectl(&["apply", "-f", "-"], &again.stdout);
    assert!(applied.stdout.contains("unchanged"), "{applied:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_converts_a_legacy_key_to_a_custom_key() {
    let team = Team::new().await;
    let value = "0123456789abcdef0123456789abcdef0123456789abcdef";
    team.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "old"}, "stringData": {"k": value}}));
    let spec = json!({"type": "SendYourData", "legacy": "SendYourData", "secret": {"name": "old", "key": "k"}});
    team.mint("shipper", &spec).await;
    team.mint("modern", &alerts_key()).await;
    let list = team.run_ok(&["legacy", "list"]);
    assert!(list.contains("LEGACY") && list.contains("shipper") && !list.contains("modern"), "{list}");
    let text = team.run_ok(&["legacy", "describe", "shipper"]);
    assert!(text.contains("logs.data-ingress:SendData  (legacy role)"), "{text}");
    let migrated = team.run_ok(&["migrate", "shipper"]);
    assert!(migrated.contains("name: shipper-custom") && !migrated.contains("legacy"), "{migrated}");
    let applied = team.kubectl(&["apply", "-f", "-"], &migrated);
    assert_eq!(applied.code, 0, "{applied:?}\n{migrated}");
    team.wait_until("shipper-custom", |key| settled(key).is_ok()).await;
    // identify also finds legacy values, which have another format.
    let known = team.run_with(&["identify"], value);
    assert!(known.code == 0 && known.stdout.contains("/shipper\n"), "{known:?}");
    assert!(!format!("{known:?}").contains(value), "the output contains a value");
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_import_and_export_report_what_they_can_not_convert() {
    let (team, alice) = team_with_alice().await;
    let deny = r#"{"version": "2025-01-01", "rules": [{"targets": [{"group": "7"}], "permissions": {
        "team-custom-api-keys:Manage": "deny", "team-custom-api-keys:ReadConfig": "grant"}}],
        "default": {"permissions": {}}}"#;
    let import = team.run_with(&["policy", "import", "-", "--name", "p"], deny);
    assert_eq!((import.code, import.stdout.as_str()), (1, ""), "{import:?}");
    assert!(import.stderr.contains("rules[0].permissions"), "{import:?}");
    team.apply(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "AccessPolicy", "metadata": {"name": "own"},
        "spec": {"mode": "Private"},
    }));
    let export = team.run(&["policy", "export", "own"]);
    assert!(export.code == 1 && export.stderr.contains("Private"), "{export:?}");
    let export = team.run(&[&["policy", "export", "own"], &alice[..]].concat());
    assert!(export.code == 1 && export.stderr.contains("ReadAccessPolicy"), "{export:?}");
}

#[test]
fn completion_and_man_need_no_cluster() {
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
        run_command(command.env("KUBECONFIG", "/nonexistent").args(args), "")
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completion", shell]);
        assert!(script.code == 0 && script.stdout.contains("kubectl-keywright"), "{shell}: {}", script.stderr);
        assert!(script.stdout.contains("revoke-previous"), "{shell}");
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
    assert_eq!(run(&["list"]).code, 1, "list needs a cluster");
    assert_eq!(run(&["nonsense"]).code, 2);
    assert_eq!(run(&["--help"]).code, 0);
}
