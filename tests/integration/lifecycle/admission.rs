//! The validating webhook behind a real apiserver: rejections, warnings and dry runs as users of kubectl and the API
//! see them.

use std::process::Output;

use keywright::api::{KeyState, PermissionCatalog};
use kube::core::Status;

use super::*;
use crate::support::keys::{metric, sha256};

impl Team {
    /// The rejection of a create request.
    async fn rejection(&self, name: &str, spec: Value) -> Status {
        match self.keys.create(&PostParams::default(), &key(name, &spec)).await {
            Err(kube::Error::Api(status)) => *status,
            Err(error) => panic!("{name}: {error}"),
            Ok(_) => panic!("{name} was not rejected"),
        }
    }

    /// The rejection of a change.
    async fn edit_rejection(&self, name: &str, spec: Value) -> Status {
        let patch = Patch::Merge(json!({"spec": spec}));
        match self.keys.patch(name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) => *status,
            other => panic!("{name} was not rejected: {other:?}"),
        }
    }

    /// Runs kubectl and returns its output, whether or not it succeeds.
    fn kubectl_output(&self, args: &[&str]) -> Output {
        self.cluster.plane.kubectl().args(["-n", &self.namespace]).args(args).output().unwrap()
    }
}

/// The fields and messages of a rejection, which must have the format of API errors.
#[track_caller]
fn causes(status: &Status) -> Vec<(String, String)> {
    assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"), "{}", status.message);
    assert!(status.message.contains("apikeys.keywright.dev"), "the webhook is not named: {}", status.message);
    let details = status.details.as_ref().expect("details");
    assert_eq!((details.group.as_str(), details.kind.as_str()), ("keywright.dev", "ApiKey"));
    for cause in &details.causes {
        assert_eq!(cause.reason, "FieldValueInvalid");
        assert!(status.message.contains(&cause.message), "the message lacks a cause: {}", status.message);
    }
    details.causes.iter().map(|cause| (cause.field.clone(), cause.message.clone())).collect()
}

#[track_caller]
fn assert_one_cause(status: &Status, field: &str, text: &str) {
    let causes = causes(status);
    assert!(causes.len() == 1 && causes[0].0 == field && causes[0].1.contains(text), "{causes:?}");
}

#[tokio::test]
async fn misspelled_name_is_rejected_with_a_suggestion() {
    let team = Team::new().await;
    let presets = team.rejection("a", spec_with(json!({"presets": ["Alertz"]}))).await;
    assert_one_cause(&presets, "spec.presets[0]", "did you mean Alerts");
    let permissions = json!({"type": "Team", "permissions": ["logs.data-ingres:SendData"]});
    assert_one_cause(&team.rejection("b", permissions).await, "spec.permissions[0]", "logs.data-ingress:SendData");
    let misplaced = json!({"type": "Team", "presets": ["logs.data-ingress:SendData"]});
    assert_one_cause(&team.rejection("c", misplaced).await, "spec.presets[0]", "list it under spec.permissions");
    let misplaced = json!({"type": "Team", "permissions": ["Alerts"]});
    assert_one_cause(&team.rejection("d", misplaced).await, "spec.permissions[0]", "list it under spec.presets");
    let unknown = json!({"type": "Team", "presets": ["Zzzzzz"]});
    assert_one_cause(&team.rejection("e", unknown).await, "spec.presets[0]", "kubectl get permissioncatalogs");
}

#[tokio::test]
async fn all_problems_are_listed_in_one_rejection() {
    let team = Team::new().await;
    let spec = json!({
        "type": "SendYourData", "presets": ["SendDatta", "Alerts"], "permissions": ["nope:Read"],
        "expiresAt": "2099-02-30T00:00:00Z",
        "secret": {"labels": {"a b": "c"}},
    });
    let rejection = team.rejection("all", spec.clone()).await;
    let fields: Vec<_> = causes(&rejection).into_iter().map(|(field, _)| field).collect();
    let expected =
        ["spec.presets[0]", "spec.presets[1]", "spec.permissions[0]", "spec.expiresAt", "spec.secret.labels[a b]"];
    assert_eq!(fields, expected);
    assert!(rejection.message.contains("5 problems"), "{}", rejection.message);

    let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest("all", &spec))]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for field in expected {
        assert!(text.contains(field), "kubectl does not show {field}: {text}");
    }
}

#[tokio::test]
async fn names_are_case_insensitive_and_the_status_has_the_spelling_of_the_catalog() {
    let team = Team::new().await;
    let spec = json!({"type": "Team", "presets": ["ALERTS"], "permissions": ["Logs.Data-Ingress:senddata", "logs.data-ingress:SENDDATA"]});
    let (key, _) = team.minted("case", spec.clone()).await;
    assert_eq!(status(&key).presets, ["Alerts"]);
    assert_eq!(status(&key).permissions, ["logs.data-ingress:SendData"], "the two spellings are not merged");
    assert_eq!(serde_json::to_value(&key.spec).unwrap(), spec, "the spec was changed");
}

#[tokio::test]
async fn rum_preset_with_other_grants_is_rejected() {
    let team = Team::new().await;
    let both = json!({"type": "SendYourData", "presets": ["SendData", "rum"]});
    assert_one_cause(&team.rejection("both", both).await, "spec.presets[1]", "is standalone");
    let mixed = json!({"type": "SendYourData", "presets": ["RUM"], "permissions": ["logs.data-ingress:SendData"]});
    assert_one_cause(&team.rejection("mixed", mixed).await, "spec.presets[0]", "is standalone");
    team.minted("alone", json!({"type": "SendYourData", "presets": ["RUM"]})).await;
    let rejection = team.edit_rejection("alone", json!({"presets": ["RUM", "SendData"]})).await;
    assert_one_cause(&rejection, "spec.presets[0]", "is standalone");
}

#[tokio::test]
async fn send_your_data_key_with_other_permissions_is_rejected() {
    let team = Team::new().await;
    let preset = json!({"type": "SendYourData", "presets": ["Alerts"]});
    assert_one_cause(&team.rejection("a", preset).await, "spec.presets[0]", "may only send data");
    let permission = json!({"type": "SendYourData", "presets": ["SendData"], "permissions": ["alerts:readconfig"]});
    assert_one_cause(&team.rejection("b", permission).await, "spec.permissions[0]", "alerts:ReadConfig");
    team.minted("c", json!({"type": "SendYourData", "presets": ["SendData"]})).await;
    let rejection = team.edit_rejection("c", json!({"permissions": ["alerts:ReadConfig"]})).await;
    assert_one_cause(&rejection, "spec.permissions[0]", "may only send data");
}

#[tokio::test]
async fn second_key_with_the_same_secret_is_rejected() {
    let team = Team::new().await;
    team.minted("first", spec_with(json!({"secret": {"name": "shared"}}))).await;
    let second = spec_with(json!({"secret": {"name": "shared"}}));
    assert_one_cause(
        &team.rejection("second", second.clone()).await,
        "spec.secret.name",
        "ApiKey first already writes",
    );
    // The same for a default name of the Secret.
    let default = spec_with(json!({"secret": {"name": "third-secret"}}));
    team.minted("taker", default).await;
    assert_one_cause(&team.rejection("third", team_spec()).await, "spec.secret.name", "ApiKey taker already writes");
    // Another namespace has another Secret, and a name is free again after its key was deleted.
    Team::new().await.minted("second", second.clone()).await;
    team.keys.delete("first", &DeleteParams::background()).await.unwrap();
    eventually("the name is free", TIMEOUT, async || {
        Ok(team.keys.create(&PostParams::default(), &key("second", &second)).await?)
    })
    .await;
}

/// The time `minutes` from now, written with an offset of `offset` hours from UTC.
fn with_offset(minutes: i64, offset: i64) -> String {
    let local = from_now(minutes * 60 + offset * 3600);
    format!("{}{}{:02}:00", local.trim_end_matches('Z'), if offset < 0 { '-' } else { '+' }, offset.abs())
}

/// A cluster can be rebuilt from Git, which may contain expired and inactive keys.
#[tokio::test]
async fn expired_and_inactive_keys_can_be_applied_from_git() {
    let team = Team::new().await;
    for (name, past) in [
        ("year", "2020-01-01T00:00:00Z".to_owned()),
        ("now", from_now(0)),
        ("east", with_offset(-30, 5)), // sorts after the current time as text
        ("west", with_offset(-30, -5)),
    ] {
        let manifest = manifest(name, &spec_with(json!({"expiresAt": past})));
        let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest)]);
        let warning = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && warning.contains("is in the past: the key is Expired"), "{warning}");
        let key = team.until(name, "expired", |key| state(key) == Some(KeyState::Expired)).await;
        assert!(tokens(&key).is_empty(), "a value was minted");
        let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest)]);
        assert!(String::from_utf8_lossy(&output.stdout).contains("unchanged"), "{output:?}");
    }
    let both = spec_with(json!({"expiresAt": "2020-01-01T00:00:00Z", "active": false}));
    team.create("both", both).await;
    let key = team.settled("both").await;
    assert!(tokens(&key).is_empty() && state(&key) != Some(KeyState::Active), "{:?}", state(&key));
    let inactive = spec_with(json!({"active": false}));
    team.create("inactive", inactive).await;
    assert_eq!(state(&team.settled("inactive").await), Some(KeyState::Inactive));
    let secrets = team.kubectl(&["get", "secrets", "-o", "name"]).unwrap();
    assert!(!secrets.contains("year-secret") && !secrets.contains("both-secret"), "{secrets}");

    let future = with_offset(30, -5); // sorts before the current time as text
    let (key, value) = team.minted("future", spec_with(json!({"expiresAt": future}))).await;
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0, future.parse::<Timestamp>().unwrap());
    // An expiry moved into the past takes effect at once. The key keeps its value, which works after the expiry is
    // moved back.
    team.edit("future", json!({"expiresAt": with_offset(-30, 5)})).await;
    team.until("future", "expired", |key| state(key) == Some(KeyState::Expired)).await;
    team.edit("future", json!({"expiresAt": future})).await;
    team.until("future", "active", |key| state(key) == Some(KeyState::Active)).await;
    assert_eq!(team.value("future").await, value);
}

#[tokio::test]
async fn nonexistent_times_and_too_long_overlaps_are_rejected() {
    let team = Team::new().await;
    let rejection = team.rejection("day", spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}))).await;
    assert_one_cause(&rejection, "spec.expiresAt", "time that exists");
    let requested = json!({"rotation": {"requestedAt": "2026-04-31T00:00:00Z"}});
    assert_one_cause(
        &team.rejection("requested", spec_with(requested)).await,
        "spec.rotation.requestedAt",
        "time that exists",
    );
    for (name, every, overlap) in [("longer", "1h", "2h"), ("equal", "1h", "60m")] {
        let rotation = json!({"rotation": {"every": every, "overlap": overlap}});
        let rejection = team.rejection(name, spec_with(rotation)).await;
        assert_eq!((rejection.code, rejection.reason.as_str()), (422, "Invalid"));
        assert!(rejection.message.contains("spec.rotation.overlap"), "{}", rejection.message);
    }
    // The sum of the parts is compared.
    let sum = json!({"rotation": {"every": "1h1m", "overlap": "59m120s"}});
    assert_eq!(team.rejection("sum", spec_with(sum)).await.code, 422);
    team.minted("fine", spec_with(json!({"rotation": {"every": "1h1m", "overlap": "59m119s"}}))).await;
}

/// A catalog may remove a permission that a key has. Changes of labels, annotations, finalizers, activation and
/// rotation of this key must still be accepted; only a newly added invalid name is rejected.
#[tokio::test]
async fn permission_removed_from_the_catalog_does_not_block_other_changes() {
    let team = Team::new().await;
    let own = format!("{}:Read", team.namespace);
    let catalogs: Api<PermissionCatalog> = Api::all(team.client.clone());
    let catalog = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": team.namespace},
        "spec": {"permissions": [{"name": own}]},
    });
    team.kubectl(&["apply", "-f", &team.file(&catalog)]).unwrap();
    let catalog_name = format!("permissioncatalog/{}", team.namespace);
    team.kubectl(&["wait", "--for=condition=Accepted", &catalog_name, "--timeout=60s"]).unwrap();
    let (before, value) = team.minted("stale", spec_with(json!({"permissions": [own]}))).await;
    assert_eq!(status(&before).permissions, std::slice::from_ref(&own));
    catalogs.delete(&team.namespace, &DeleteParams::default()).await.unwrap();
    let key = team.until("stale", "PermissionNotFound", |key| reason(key) == "PermissionNotFound").await;
    assert_eq!((state(&key), status(&key).presets.as_slice()), (Some(KeyState::Active), &["Alerts".to_owned()][..]));
    assert!(status(&key).permissions.is_empty(), "a permission that the catalog lacks is granted");
    let copy = team.rejection("copy", spec_with(json!({"permissions": [own]}))).await;
    assert_one_cause(&copy, "spec.permissions[0]", "no permission has this name");

    let change = async |metadata: Value| {
        let patch = Patch::Merge(json!({"metadata": metadata}));
        team.keys.patch("stale", &PatchParams::default(), &patch).await.expect("a change of metadata")
    };
    change(json!({"labels": {"a": "b"}, "annotations": {"c": "d"}})).await;
    change(json!({"finalizers": ["test.example.com/hold"]})).await;
    change(json!({"finalizers": null})).await;
    team.edit("stale", json!({"active": false})).await;
    team.edit("stale", json!({"active": true, "displayName": "x"})).await;
    team.edit("stale", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    team.until("stale", "rotated", |key| tokens(key) != tokens(&before)).await;
    assert_ne!(team.value("stale").await, value);
    let rejection = team.edit_rejection("stale", json!({"permissions": [own, "nope:Read"]})).await;
    assert_one_cause(&rejection, "spec.permissions[1]", "nope:Read");
    team.edit("stale", json!({"permissions": null})).await;
    team.ready("stale").await;
}

#[tokio::test]
async fn expired_key_can_be_changed_and_deleted() {
    let team = Team::new().await;
    team.create("old", spec_with(json!({"expiresAt": from_now(3)}))).await;
    team.until("old", "expired", |key| state(key) == Some(KeyState::Expired)).await;
    team.edit("old", json!({"displayName": "x", "presets": ["Actions"]})).await;
    team.settled("old").await;
    team.delete("old").await;
}

/// Validation must not block the deletion of an invalid object.
#[tokio::test]
async fn finalizer_of_an_invalid_key_in_deletion_can_be_removed() {
    let team = Team::bypassing().await;
    let mut broken = key("leaving", &spec_with(json!({"presets": ["NoSuchPreset"]})));
    broken.metadata.finalizers = Some(vec!["test.example.com/hold".to_owned()]);
    team.keys.create(&PostParams::default(), &broken).await.unwrap();
    let namespaces: Api<Namespace> = Api::all(team.client.clone());
    let guarded = Patch::Merge(json!({"metadata": {"labels": {BYPASS: null}}}));
    namespaces.patch(&team.namespace, &PatchParams::default(), &guarded).await.unwrap();
    eventually("admission applies again", TIMEOUT, async || {
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let wrong = spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}));
        ensure!(team.keys.create(&dry, &key("probe", &wrong)).await.is_err(), "admission is still bypassed");
        Ok(())
    })
    .await;
    team.keys.delete("leaving", &DeleteParams::background()).await.unwrap();
    let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    team.keys.patch("leaving", &PatchParams::default(), &patch).await.unwrap();
    eventually("the ApiKey is deleted", TIMEOUT, async || {
        ensure!(team.keys.get_opt("leaving").await?.is_none(), "the ApiKey still exists");
        Ok(())
    })
    .await;
}

fn invalid_spec() -> Value {
    spec_with(json!({"presets": ["NoSuchPreset"]}))
}

#[tokio::test]
async fn dry_run_has_the_same_result_and_changes_nothing() {
    let team = Team::new().await;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let invalid = || spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}));
    let rejection = team.rejection("dry", invalid()).await;
    let Err(kube::Error::Api(dry_rejection)) = team.keys.create(&dry, &key("dry", &invalid())).await else {
        panic!("the dry run was not rejected")
    };
    assert_eq!(causes(&dry_rejection), causes(&rejection));
    assert_eq!(dry_rejection.message, rejection.message);
    team.keys.create(&dry, &key("dry", &team_spec())).await.unwrap();
    // A dry run does not reserve the name of its Secret either.
    let taker = spec_with(json!({"secret": {"name": "dry-secret"}}));
    team.minted("taker", taker).await;
    let text =
        team.kubectl(&["apply", "--dry-run=server", "-f", &team.file(&manifest("other", &team_spec()))]).unwrap();
    assert!(text.contains("server dry run"), "{text}");
    let objects = team.kubectl(&["get", "apikeys,secrets", "-o", "name"]).unwrap();
    assert_eq!(objects.lines().collect::<Vec<_>>(), ["apikey.keywright.dev/taker", "secret/dry-secret"]);

    let value = value_of(&team.secrets.get("dry-secret").await.unwrap()).unwrap();
    let rotate = Patch::Merge(json!({"spec": {"rotation": {"requestedAt": from_now(0)}}}));
    team.keys.patch("taker", &PatchParams { dry_run: true, ..PatchParams::default() }, &rotate).await.unwrap();
    team.edit("taker", json!({"displayName": "x"})).await;
    let key = team.ready("taker").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&value), "a dry run rotated the key");
}

/// Flux applies each Kustomization with a dry run first, and so does `kubectl diff`. The dry run of an object does not
/// include the objects before it.
#[tokio::test]
async fn dry_run_of_a_catalog_and_a_key_that_uses_it_is_accepted_with_a_warning() {
    let team = Team::new().await;
    let own = format!("{}:Read", team.namespace);
    let catalog = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": team.namespace},
        "spec": {"permissions": [{"name": own}], "presets": [{"name": team.namespace, "permissions": [own]}]},
    });
    let spec = json!({"type": "Team", "presets": [team.namespace], "permissions": [own]});
    let set = json!({"apiVersion": "v1", "kind": "List", "metadata": {"name": "set"},
        "items": [catalog, manifest("key", &spec)]});
    let file = team.file(&set);
    for dry in [&["--server-side"][..], &[]] {
        let output = team.kubectl_output(&[&["apply", "--dry-run=server", "-f", &file], dry].concat());
        let warning = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{warning}");
        let text = "the key is rejected unless a PermissionCatalog that fixes this is applied before it";
        assert!(warning.contains("spec.presets[0]: Not found") && warning.contains(text), "{warning}");
        // A dry run can be made strict.
        let strict = ["apply", "--dry-run=server", "--warnings-as-errors", "-f", &file];
        assert!(!team.kubectl_output(&[&strict, dry].concat()).status.success());
    }
    // A real create of the key alone is rejected. An error that no catalog can fix is rejected by a dry run too.
    assert_eq!(team.rejection("key", spec.clone()).await.code, 422);
    let mut wrong = spec;
    wrong["expiresAt"] = json!("2099-02-30T00:00:00Z");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let Err(kube::Error::Api(status)) = team.keys.create(&dry, &key("key", &wrong)).await else {
        panic!("the dry run was accepted")
    };
    assert_one_cause(&status, "spec.expiresAt", "time that exists");
    eventually("the set is applied, the catalog first", TIMEOUT, async || team.kubectl(&["apply", "-f", &file])).await;
    team.ready("key").await;
}

#[tokio::test]
async fn uncertain_presets_cause_warnings_in_kubectl() {
    let team = Team::new().await;
    for (name, preset, text) in
        [("nothing", "Olly", "grants nothing"), ("guess", "OpenSearchDashboards", "are inferred in its catalog")]
    {
        let file = team.file(&manifest(name, &json!({"type": "Team", "presets": [preset]})));
        let output = team.kubectl_output(&["apply", "-f", &file]);
        let warning = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{warning}");
        assert!(warning.contains("Warning: ") && warning.contains(preset) && warning.contains(text), "{warning}");
        team.ready(name).await;
    }
    let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest("certain", &team_spec()))]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "a key without problems has a warning");
}

#[tokio::test]
async fn rejections_are_counted_by_rule() {
    let team = Team::new().await;
    let operator = team.cluster.operator.read().await;
    let cases = [
        ("PresetNotFound", invalid_spec()),
        ("PermissionNotFound", spec_with(json!({"permissions": ["nope:Read"]}))),
        ("StandalonePreset", spec_with(json!({"presets": ["RUM", "Alerts"]}))),
        ("NotIngestion", json!({"type": "SendYourData", "presets": ["Alerts"]})),
        ("InvalidTime", spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}))),
        ("InvalidSecretMetadata", spec_with(json!({"secret": {"labels": {"a b": ""}}}))),
    ];
    let counts = async || {
        let text = operator.metrics().await.unwrap();
        let count = |name: &str| metric(&text, name).unwrap_or_default();
        let rules = cases
            .each_ref()
            .map(|(rule, _)| count(&format!("keywright_admission_rejections_total{{rule=\"{rule}\"}}")));
        (rules, count("keywright_admission_total{kind=\"ApiKey\",verdict=\"Denied\"}"))
    };
    let (rules, denied) = counts().await;
    for (rule, spec) in &cases {
        team.rejection(&rule.to_ascii_lowercase(), spec.clone()).await;
    }
    let (rules_after, denied_after) = counts().await;
    for (index, (rule, _)) in cases.iter().enumerate() {
        assert!(rules_after[index] >= rules[index] + 1.0, "{rule} was not counted");
    }
    assert!(denied_after >= denied + cases.len() as f64);
}

/// The apiserver restricts the data keys of a Secret. The ApiKey must be rejected in these cases, so that the user gets
/// the error at `kubectl apply` and not later as a condition.
#[tokio::test]
async fn invalid_data_key_of_the_secret_is_rejected() {
    let team = Team::new().await;
    let mut accepted = vec![];
    for (name, key_name) in [("a", "."), ("b", ".."), ("c", "..data"), ("d", "a/b"), ("e", "")] {
        let spec = spec_with(json!({"secret": {"key": key_name}}));
        if team.keys.create(&PostParams::default(), &key(name, &spec)).await.is_ok() {
            let key = team.until(name, "a reason", |key| !reason(key).is_empty()).await;
            accepted.push(format!("{key_name:?}: {}", reason(&key)));
        }
    }
    assert!(accepted.is_empty(), "accepted: {accepted:?}");
}
