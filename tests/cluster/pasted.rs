//! The value of a key, pasted into a field that takes a name or a text: refused before it is stored, and not repeated.

use keywright::api::KeyType;
use keywright::domain::key::Key;
use rand::rngs::SysRng;
use serde_json::{Value, json};

use crate::support::{keys::looks_like_a_value, output};
use crate::{Team, api_key};

fn value() -> String {
    Key::mint(KeyType::Team, &mut SysRng).unwrap().expose().to_owned()
}

/// Places for a text: title, the object with `TEXT` there, the field that the answer names.
fn places() -> Vec<(&'static str, Value, &'static str)> {
    let key = |more: Value| {
        let mut spec = json!({"type": "Team", "presets": ["Alerts"]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        api_key("pasted", &spec)
    };
    let noted = |metadata: Value| {
        let mut key = key(json!({}));
        key["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        key
    };
    let of = |kind: &str, name: &str, spec: Value| json!({"apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    vec![
        ("display name", key(json!({"displayName": "TEXT"})), "spec.displayName"),
        ("user", key(json!({"type": "Personal", "user": "TEXT"})), "spec.user"),
        ("user of a Team key", key(json!({"user": "TEXT"})), "spec.user"),
        ("type", key(json!({"type": "TEXT"})), "spec.type"),
        ("preset", key(json!({"presets": ["Alerts", "TEXT"]})), "spec.presets[1]"),
        ("preset twice", key(json!({"presets": ["TEXT", "TEXT"]})), "spec.presets[0]"),
        ("permission", key(json!({"permissions": ["TEXT"]})), "spec.permissions[0]"),
        ("permission twice", key(json!({"permissions": ["TEXT", "TEXT"]})), "spec.permissions[1]"),
        ("policy", key(json!({"accessPolicyRef": {"name": "TEXT"}})), "spec.accessPolicyRef.name"),
        ("expiry", key(json!({"expiresAt": "TEXT"})), "spec.expiresAt"),
        ("interval", key(json!({"rotation": {"every": "TEXT"}})), "spec.rotation.every"),
        ("legacy kind", key(json!({"legacy": "TEXT"})), "spec.legacy"),
        ("Secret's name", key(json!({"secret": {"name": "TEXT"}})), "spec.secret.name"),
        ("Secret's key", key(json!({"secret": {"key": "TEXT"}})), "spec.secret.key"),
        ("Secret's label", key(json!({"secret": {"labels": {"a": "TEXT"}}})), "spec.secret.labels.a"),
        ("Secret's label's name", key(json!({"secret": {"labels": {"TEXT": "a"}}})), "spec.secret.labels"),
        ("Secret's annotation", key(json!({"secret": {"annotations": {"a": "TEXT"}}})), "spec.secret.annotations.a"),
        ("label", noted(json!({"labels": {"example.com/a": "TEXT"}})), "metadata.labels[example.com/a]"),
        ("annotation", noted(json!({"annotations": {"a": "TEXT"}})), "metadata.annotations.a"),
        ("name", noted(json!({"name": "TEXT"})), "metadata.name"),
        (
            "group of a rule",
            of(
                "AccessPolicy",
                "pasted",
                json!({"mode": "Advanced", "generalAccess": "Read", "rules": [{"groups": ["TEXT"], "access": "Read"}]}),
            ),
            "spec.rules[0].groups[0]",
        ),
        ("group", of("SecuritySettings", "default", json!({"dataScopedGroups": ["TEXT"]})), "spec.dataScopedGroups[0]"),
        (
            "limit",
            of("SecuritySettings", "default", json!({"limits": {"maxLifetime": "TEXT"}})),
            "spec.limits.maxLifetime",
        ),
        (
            "key to reveal",
            of("KeyReveal", "pasted", json!({"apiKeyRef": {"name": "TEXT"}, "recipient": "age1a"})),
            "spec.apiKeyRef.name",
        ),
        (
            "recipient",
            of("KeyReveal", "pasted", json!({"apiKeyRef": {"name": "a"}, "recipient": "TEXT"})),
            "spec.recipient",
        ),
    ]
}

/// The object with a text in its place.
fn with(object: &Value, text: &str) -> Value {
    let quoted = serde_json::to_string(text).unwrap();
    serde_json::from_str(&object.to_string().replace("TEXT", quoted.trim_matches('"'))).unwrap()
}

#[tokio::test]
async fn the_value_of_a_key_in_a_field_for_names_is_refused_and_not_repeated() {
    let team = Team::new().await;
    let mut wrong = vec![];
    for (title, object, field) in places() {
        let value = value();
        // As it is, in a long text, and as the data of a Secret has it.
        for text in [value.clone(), format!("{}{value}", "x".repeat(256)), format!("Bearer {value}\n")] {
            let file = team.file(&with(&object, &text));
            let commands: [&[&str]; 3] = [
                &["create", "--save-config", "-f", &file],
                &["apply", "-f", &file],
                &["apply", "--server-side", "-f", &file],
            ];
            for command in commands {
                // A name is part of the path of these two. Entries of a set that are the same are refused by a server-side
                // apply before there is any admission.
                if title == "name" && command[0] == "apply" || title.ends_with("twice") && command[1] == "--server-side"
                {
                    continue;
                }
                let answer = match team.try_kubectl(command) {
                    Ok(done) => format!("accepted: {done}"),
                    Err(error) => format!("{error:#}"),
                };
                let named = answer.contains(&format!("{field}: Invalid value: must not hold the value of an API key"));
                if !named || answer.contains(&value) || looks_like_a_value(&answer).is_some() {
                    wrong.push(format!("{title}, {command:?}: {answer}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} are not as they should be:\n{}", wrong.len(), wrong.join("\n"));
    for kind in ["apikeys", "accesspolicies", "securitysettings", "keyreveals"] {
        assert_eq!(team.kubectl(&["get", kind, "-o", "name"]), "", "stored");
    }
    assert_eq!(looks_like_a_value(&team.shared.operator.log()), None, "the operator's log");
}

#[tokio::test]
async fn a_value_pasted_into_an_object_that_is_there_is_refused_and_a_look_alike_is_not() {
    let team = Team::new().await;
    let key = |spec: Value| api_key("there", &spec);
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"]})));
    let pasted = key(json!({"type": "Team", "presets": ["Alerts"], "displayName": value()}));
    let refusal = team.refusal(&pasted);
    assert!(refusal.contains("spec.displayName: Invalid value: must not hold the value of an API key"), "{refusal}");
    assert_eq!(looks_like_a_value(&refusal), None);
    for patch in [
        json!({"metadata": {"labels": {"a": value()}}}),
        json!({"metadata": {"annotations": {"a": format!("see {}", value())}}}),
    ] {
        let patch = patch.to_string();
        let refusal = output(team.shared.plane.kubectl().args([
            "-n",
            &team.namespace,
            "patch",
            "apikey/there",
            "--type=merge",
            "-p",
            &patch,
        ]));
        let refusal = format!("{:#}", refusal.expect_err("a value"));
        // The command line is in this message of the test.
        let (_, refusal) = refusal.split_once('\n').unwrap();
        assert!(refusal.contains("must not hold the value of an API key"), "{refusal}");
        assert_eq!(looks_like_a_value(refusal), None);
    }
    // A text about keys is none, nor is one with a wrong checksum.
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"], "displayName": "keys that begin with kwt_"})));
    let mut wrong = value();
    wrong.replace_range(20..21, if &wrong[20..21] == "a" { "b" } else { "a" });
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"], "displayName": wrong})));
}
