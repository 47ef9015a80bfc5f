//! What the webhook lets in, through a real apiserver, as users of kubectl and of the API see it.

use std::process::Output;

use keywright::api::{KeyState, PermissionCatalog};
use kube::core::Status;

use crate::support::keys::{metric, sha256};
use crate::*;

impl Team {
    /// The refusal of a create.
    async fn refusal(&self, name: &str, spec: Value) -> Status {
        match self.keys.create(&PostParams::default(), &key(name, &spec)).await {
            Err(kube::Error::Api(status)) => *status,
            Err(error) => panic!("{name}: {error}"),
            Ok(_) => panic!("{name} was not refused"),
        }
    }

    /// The refusal of a change.
    async fn edit_refusal(&self, name: &str, spec: Value) -> Status {
        let patch = Patch::Merge(json!({"spec": spec}));
        match self.keys.patch(name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) => *status,
            other => panic!("{name} was not refused: {other:?}"),
        }
    }

    /// Everything that kubectl says, whether or not it succeeds.
    fn kubectl_output(&self, args: &[&str]) -> Output {
        self.cluster.plane.kubectl().args(["-n", &self.namespace]).args(args).output().unwrap()
    }
}

/// Fields and messages of a refusal, which must be in the form that clients understand.
#[track_caller]
fn causes(status: &Status) -> Vec<(String, String)> {
    assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"), "{}", status.message);
    assert!(status.message.contains("apikeys.keywright.dev"), "it says who refused: {}", status.message);
    let details = status.details.as_ref().expect("details");
    assert_eq!((details.group.as_str(), details.kind.as_str()), ("keywright.dev", "ApiKey"));
    for cause in &details.causes {
        assert_eq!(cause.reason, "FieldValueInvalid");
        assert!(status.message.contains(&cause.message), "the message has all: {}", status.message);
    }
    details.causes.iter().map(|cause| (cause.field.clone(), cause.message.clone())).collect()
}

#[track_caller]
fn assert_one_cause(status: &Status, field: &str, text: &str) {
    let causes = causes(status);
    assert!(causes.len() == 1 && causes[0].0 == field && causes[0].1.contains(text), "{causes:?}");
}

#[tokio::test]
async fn a_misspelt_name_is_refused_with_the_right_one() {
    let team = Team::new().await;
    let presets = team.refusal("a", spec_with(json!({"presets": ["Alertz"]}))).await;
    assert_one_cause(&presets, "spec.presets[0]", "did you mean Alerts");
    let permissions = json!({"type": "Team", "permissions": ["logs.data-ingres:SendData"]});
    assert_one_cause(&team.refusal("b", permissions).await, "spec.permissions[0]", "logs.data-ingress:SendData");
    let misplaced = json!({"type": "Team", "presets": ["logs.data-ingress:SendData"]});
    assert_one_cause(&team.refusal("c", misplaced).await, "spec.presets[0]", "list it under spec.permissions");
    let misplaced = json!({"type": "Team", "permissions": ["Alerts"]});
    assert_one_cause(&team.refusal("d", misplaced).await, "spec.permissions[0]", "list it under spec.presets");
    let hopeless = json!({"type": "Team", "presets": ["Zzzzzz"]});
    assert_one_cause(&team.refusal("e", hopeless).await, "spec.presets[0]", "kubectl get permissioncatalogs");
}

#[tokio::test]
async fn every_problem_is_listed_in_one_refusal() {
    let team = Team::new().await;
    let spec = json!({
        "type": "SendYourData", "presets": ["SendDatta", "Alerts"], "permissions": ["nope:Read"],
        "expiresAt": "2099-02-30T00:00:00Z",
        "secret": {"labels": {"a b": "c"}},
    });
    let refusal = team.refusal("all", spec.clone()).await;
    let fields: Vec<_> = causes(&refusal).into_iter().map(|(field, _)| field).collect();
    let expected =
        ["spec.presets[0]", "spec.presets[1]", "spec.permissions[0]", "spec.expiresAt", "spec.secret.labels[a b]"];
    assert_eq!(fields, expected);
    assert!(refusal.message.contains("5 problems"), "{}", refusal.message);

    let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest("all", &spec))]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for field in expected {
        assert!(text.contains(field), "kubectl does not show {field}: {text}");
    }
}

#[tokio::test]
async fn upper_and_lower_case_are_the_same_and_the_status_has_the_spelling_of_the_catalogue() {
    let team = Team::new().await;
    let spec = json!({"type": "Team", "presets": ["ALERTS"], "permissions": ["Logs.Data-Ingress:senddata", "logs.data-ingress:SENDDATA"]});
    let (key, _) = team.minted("case", spec.clone()).await;
    assert_eq!(status(&key).presets, ["Alerts"]);
    assert_eq!(status(&key).permissions, ["logs.data-ingress:SendData"], "two spellings are one grant");
    assert_eq!(serde_json::to_value(&key.spec).unwrap(), spec, "the spec stays as it was written");
}

#[tokio::test]
async fn a_rum_preset_stands_alone() {
    let team = Team::new().await;
    let both = json!({"type": "SendYourData", "presets": ["SendData", "rum"]});
    assert_one_cause(&team.refusal("both", both).await, "spec.presets[1]", "stands alone");
    let mixed = json!({"type": "SendYourData", "presets": ["RUM"], "permissions": ["logs.data-ingress:SendData"]});
    assert_one_cause(&team.refusal("mixed", mixed).await, "spec.presets[0]", "stands alone");
    team.minted("alone", json!({"type": "SendYourData", "presets": ["RUM"]})).await;
    let refusal = team.edit_refusal("alone", json!({"presets": ["RUM", "SendData"]})).await;
    assert_one_cause(&refusal, "spec.presets[0]", "stands alone");
}

#[tokio::test]
async fn a_send_your_data_key_only_sends_data() {
    let team = Team::new().await;
    let preset = json!({"type": "SendYourData", "presets": ["Alerts"]});
    assert_one_cause(&team.refusal("a", preset).await, "spec.presets[0]", "may only send data");
    let permission = json!({"type": "SendYourData", "presets": ["SendData"], "permissions": ["alerts:readconfig"]});
    assert_one_cause(&team.refusal("b", permission).await, "spec.permissions[0]", "alerts:ReadConfig");
    team.minted("c", json!({"type": "SendYourData", "presets": ["SendData"]})).await;
    let refusal = team.edit_refusal("c", json!({"permissions": ["alerts:ReadConfig"]})).await;
    assert_one_cause(&refusal, "spec.permissions[0]", "may only send data");
}

#[tokio::test]
async fn one_secret_has_one_key() {
    let team = Team::new().await;
    team.minted("first", spec_with(json!({"secret": {"name": "shared"}}))).await;
    let second = spec_with(json!({"secret": {"name": "shared"}}));
    assert_one_cause(&team.refusal("second", second.clone()).await, "spec.secret.name", "ApiKey first already writes");
    // By its default name too.
    let default = spec_with(json!({"secret": {"name": "third-secret"}}));
    team.minted("taker", default).await;
    assert_one_cause(&team.refusal("third", team_spec()).await, "spec.secret.name", "ApiKey taker already writes");
    // Another namespace is another Secret; and a name is free again once its key is gone.
    Team::new().await.minted("second", second.clone()).await;
    team.keys.delete("first", &DeleteParams::background()).await.unwrap();
    eventually("the name is free", PATIENCE, async || {
        Ok(team.keys.create(&PostParams::default(), &key("second", &second)).await?)
    })
    .await;
}

/// A time of day with this offset from UTC, so many minutes from now.
fn with_offset(minutes: i64, offset: i64) -> String {
    let local = from_now(minutes * 60 + offset * 3600);
    format!("{}{}{:02}:00", local.trim_end_matches('Z'), if offset < 0 { '-' } else { '+' }, offset.abs())
}

/// A cluster can be built again from Git, where keys stay that have expired or were turned off.
#[tokio::test]
async fn an_expired_or_inactive_key_can_be_applied_again_from_git() {
    let team = Team::new().await;
    for (name, past) in [
        ("year", "2020-01-01T00:00:00Z".to_owned()),
        ("now", from_now(0)),
        ("east", with_offset(-30, 5)), // its text is later than now
        ("west", with_offset(-30, -5)),
    ] {
        let manifest = manifest(name, &spec_with(json!({"expiresAt": past})));
        let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest)]);
        let warning = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && warning.contains("is in the past: the key is Expired"), "{warning}");
        let key = team.until(name, "expired", |key| state(key) == Some(KeyState::Expired)).await;
        assert!(tokens(&key).is_empty(), "no value is minted");
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
    let left = team.kubectl(&["get", "secrets", "-o", "name"]).unwrap();
    assert!(!left.contains("year-secret") && !left.contains("both-secret"), "{left}");

    let future = with_offset(30, -5); // its text is earlier than now
    let (key, value) = team.minted("future", spec_with(json!({"expiresAt": future}))).await;
    assert_eq!(tokens(&key)[0].expires_at.as_ref().unwrap().0, future.parse::<Timestamp>().unwrap());
    // Moved into the past, it expires at once, and keeps its value for when it is moved back.
    team.edit("future", json!({"expiresAt": with_offset(-30, 5)})).await;
    team.until("future", "expired", |key| state(key) == Some(KeyState::Expired)).await;
    team.edit("future", json!({"expiresAt": future})).await;
    team.until("future", "active", |key| state(key) == Some(KeyState::Active)).await;
    assert_eq!(team.value("future").await, value);
}

#[tokio::test]
async fn times_and_durations_that_make_no_sense_are_refused() {
    let team = Team::new().await;
    let refusal = team.refusal("day", spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}))).await;
    assert_one_cause(&refusal, "spec.expiresAt", "time that exists");
    let asked = json!({"rotation": {"requestedAt": "2026-04-31T00:00:00Z"}});
    assert_one_cause(&team.refusal("asked", spec_with(asked)).await, "spec.rotation.requestedAt", "time that exists");
    for (name, every, overlap) in [("longer", "1h", "2h"), ("equal", "1h", "60m")] {
        let rotation = json!({"rotation": {"every": every, "overlap": overlap}});
        let refusal = team.refusal(name, spec_with(rotation)).await;
        assert_eq!((refusal.code, refusal.reason.as_str()), (422, "Invalid"));
        assert!(refusal.message.contains("spec.rotation.overlap"), "{}", refusal.message);
    }
    // The sum is what counts, not the first number.
    let sum = json!({"rotation": {"every": "1h1m", "overlap": "59m120s"}});
    assert_eq!(team.refusal("sum", spec_with(sum)).await.code, 422);
    team.minted("fine", spec_with(json!({"rotation": {"every": "1h1m", "overlap": "59m119s"}}))).await;
}

/// A catalogue may take away what a key already has. Then the key must still be usable as an object: labels, owners,
/// finalizers, deactivation, and the way out; only what is wrong anew is refused.
#[tokio::test]
async fn what_was_right_once_does_not_hold_up_other_changes() {
    let team = Team::new().await;
    let own = format!("{}:Read", team.namespace);
    let catalogs: Api<PermissionCatalog> = Api::all(team.client.clone());
    let catalog = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": team.namespace},
        "spec": {"permissions": [{"name": own}]},
    });
    team.kubectl(&["apply", "-f", &team.file(&catalog)]).unwrap();
    let known = format!("permissioncatalog/{}", team.namespace);
    team.kubectl(&["wait", "--for=condition=Accepted", &known, "--timeout=60s"]).unwrap();
    let (before, value) = team.minted("stale", spec_with(json!({"permissions": [own]}))).await;
    assert_eq!(status(&before).permissions, std::slice::from_ref(&own));
    catalogs.delete(&team.namespace, &DeleteParams::default()).await.unwrap();
    let key = team.until("stale", "noticed", |key| reason(key) == "PermissionNotFound").await;
    assert_eq!((state(&key), status(&key).presets.as_slice()), (Some(KeyState::Active), &["Alerts".to_owned()][..]));
    assert!(status(&key).permissions.is_empty(), "what left the catalogue is not in force");
    let copy = team.refusal("copy", spec_with(json!({"permissions": [own]}))).await;
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
    let refusal = team.edit_refusal("stale", json!({"permissions": [own, "nope:Read"]})).await;
    assert_one_cause(&refusal, "spec.permissions[1]", "nope:Read");
    team.edit("stale", json!({"permissions": null})).await;
    team.ready("stale").await;
}

#[tokio::test]
async fn an_expired_key_can_still_be_changed_and_deleted() {
    let team = Team::new().await;
    team.create("old", spec_with(json!({"expiresAt": from_now(3)}))).await;
    team.until("old", "expired", |key| state(key) == Some(KeyState::Expired)).await;
    team.edit("old", json!({"displayName": "x", "presets": ["Actions"]})).await;
    team.settled("old").await;
    team.delete("old").await;
}

/// An object on its way out must not be held up by what it says.
#[tokio::test]
async fn a_key_that_is_being_deleted_can_always_lose_its_finalizer() {
    let team = Team::bypassing().await;
    let mut broken = key("leaving", &spec_with(json!({"presets": ["NoSuchPreset"]})));
    broken.metadata.finalizers = Some(vec!["test.example.com/hold".to_owned()]);
    team.keys.create(&PostParams::default(), &broken).await.unwrap();
    let namespaces: Api<Namespace> = Api::all(team.client.clone());
    let guarded = Patch::Merge(json!({"metadata": {"labels": {BYPASS: null}}}));
    namespaces.patch(&team.namespace, &PatchParams::default(), &guarded).await.unwrap();
    eventually("admission is asked again", PATIENCE, async || {
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let wrong = spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}));
        ensure!(team.keys.create(&dry, &key("probe", &wrong)).await.is_err(), "it is not");
        Ok(())
    })
    .await;
    team.keys.delete("leaving", &DeleteParams::background()).await.unwrap();
    let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    team.keys.patch("leaving", &PatchParams::default(), &patch).await.unwrap();
    eventually("it is gone", PATIENCE, async || {
        ensure!(team.keys.get_opt("leaving").await?.is_none(), "it is there");
        Ok(())
    })
    .await;
}

fn broken_spec() -> Value {
    spec_with(json!({"presets": ["NoSuchPreset"]}))
}

#[tokio::test]
async fn a_dry_run_has_the_same_verdict_and_leaves_no_trace() {
    let team = Team::new().await;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let broken = || spec_with(json!({"expiresAt": "2099-02-30T00:00:00Z"}));
    let refused = team.refusal("dry", broken()).await;
    let Err(kube::Error::Api(dry_refused)) = team.keys.create(&dry, &key("dry", &broken())).await else {
        panic!("not refused")
    };
    assert_eq!(causes(&dry_refused), causes(&refused));
    assert_eq!(dry_refused.message, refused.message);
    team.keys.create(&dry, &key("dry", &team_spec())).await.unwrap();
    // Nor does it take the name of its Secret.
    let taker = spec_with(json!({"secret": {"name": "dry-secret"}}));
    team.minted("taker", taker).await;
    let text =
        team.kubectl(&["apply", "--dry-run=server", "-f", &team.file(&manifest("other", &team_spec()))]).unwrap();
    assert!(text.contains("server dry run"), "{text}");
    let left = team.kubectl(&["get", "apikeys,secrets", "-o", "name"]).unwrap();
    assert_eq!(left.lines().collect::<Vec<_>>(), ["apikey.keywright.dev/taker", "secret/dry-secret"]);

    let value = value_of(&team.secrets.get("dry-secret").await.unwrap()).unwrap();
    let rotate = Patch::Merge(json!({"spec": {"rotation": {"requestedAt": from_now(0)}}}));
    team.keys.patch("taker", &PatchParams { dry_run: true, ..PatchParams::default() }, &rotate).await.unwrap();
    team.edit("taker", json!({"displayName": "x"})).await;
    let key = team.ready("taker").await;
    assert_eq!(tokens(&key)[0].sha256, sha256(&value), "a dry run rotated it");
}

/// Flux tries each Kustomization so, and `kubectl diff` does: a dry run of one object does not know those before it.
#[tokio::test]
async fn one_dry_run_of_a_set_with_a_catalogue_and_a_key_that_uses_it_refuses_nothing_that_a_real_apply_accepts() {
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
        let text = "refused unless a PermissionCatalog that mends it is applied before this key";
        assert!(warning.contains("spec.presets[0]: Not found") && warning.contains(text), "{warning}");
        // Who wants a dry run as strict as before can have it.
        let strict = ["apply", "--dry-run=server", "--warnings-as-errors", "-f", &file];
        assert!(!team.kubectl_output(&[&strict, dry].concat()).status.success());
    }
    // Alone, and not as a dry run, the key is refused; what is wrong whatever a catalogue says is refused by a dry run too.
    assert_eq!(team.refusal("key", spec.clone()).await.code, 422);
    let mut wrong = spec;
    wrong["expiresAt"] = json!("2099-02-30T00:00:00Z");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let Err(kube::Error::Api(status)) = team.keys.create(&dry, &key("key", &wrong)).await else { panic!("accepted") };
    assert_one_cause(&status, "spec.expiresAt", "time that exists");
    eventually("the set is applied, the catalogue first", PATIENCE, async || team.kubectl(&["apply", "-f", &file]))
        .await;
    team.ready("key").await;
}

#[tokio::test]
async fn what_is_uncertain_is_said_as_a_warning_that_kubectl_shows() {
    let team = Team::new().await;
    for (name, preset, text) in
        [("nothing", "Olly", "grants nothing"), ("guess", "OpenSearchDashboards", "are inferred in its catalogue")]
    {
        let file = team.file(&manifest(name, &json!({"type": "Team", "presets": [preset]})));
        let output = team.kubectl_output(&["apply", "-f", &file]);
        let warning = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{warning}");
        assert!(warning.contains("Warning: ") && warning.contains(preset) && warning.contains(text), "{warning}");
        team.ready(name).await;
    }
    let output = team.kubectl_output(&["apply", "-f", &team.file(&manifest("sure", &team_spec()))]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "no warning without a reason");
}

#[tokio::test]
async fn refusals_are_counted_by_rule() {
    let team = Team::new().await;
    let operator = team.cluster.operator.read().await;
    let cases = [
        ("PresetNotFound", broken_spec()),
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
            .map(|(rule, _)| count(&format!("keywright_admission_broken_rules_total{{rule=\"{rule}\"}}")));
        (rules, count("keywright_admission_total{kind=\"ApiKey\",verdict=\"Denied\"}"))
    };
    let (rules, denied) = counts().await;
    for (rule, spec) in &cases {
        team.refusal(&rule.to_ascii_lowercase(), spec.clone()).await;
    }
    let (rules_after, denied_after) = counts().await;
    for (index, (rule, _)) in cases.iter().enumerate() {
        assert!(rules_after[index] >= rules[index] + 1.0, "{rule} was not counted");
    }
    assert!(denied_after >= denied + cases.len() as f64);
}

/// A Secret takes names by rules of its own, beyond those of a label or file: what it would refuse has to be refused
/// with the ApiKey, or the key stays without a value and the user without a reason at `kubectl apply`.
#[tokio::test]
async fn a_key_of_the_secret_that_the_apiserver_would_refuse_is_refused_at_once() {
    let team = Team::new().await;
    let mut accepted = vec![];
    for (name, key_name) in [("a", "."), ("b", ".."), ("c", "..data"), ("d", "a/b"), ("e", "")] {
        let spec = spec_with(json!({"secret": {"key": key_name}}));
        if team.keys.create(&PostParams::default(), &key(name, &spec)).await.is_ok() {
            let key = team.until(name, "taken in", |key| !reason(key).is_empty()).await;
            accepted.push(format!("{key_name:?}: {}", reason(&key)));
        }
    }
    assert!(accepted.is_empty(), "accepted: {accepted:?}");
}
