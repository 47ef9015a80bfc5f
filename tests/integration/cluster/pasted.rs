//! Objects with the value of a key in any field are rejected, and the message does not contain the value.

use keywright::api::KeyType;
use keywright::domain::key::Key;
use rand::rngs::SysRng;
use serde_json::{Value, json};

use super::{Team, api_key};
use crate::support::{keys::find_value, output};

fn value() -> String {
    Key::mint(KeyType::Team, &mut SysRng).unwrap().expose().to_owned()
}

/// Returns a title, an object with the placeholder `TEXT`, and the field that the message names.
fn cases() -> Vec<(&'static str, Value, &'static str)> {
    let key = |more: Value| {
        let mut spec = json!({"type": "Team", "presets": ["Alerts"]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        api_key("pasted", &spec)
    };
    let with_metadata = |metadata: Value| {
        let mut key = key(json!({}));
        key["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        key
    };
    let object = |kind: &str, name: &str, spec: Value| {
        let metadata = json!({"name": name});
        json!({"apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
    };
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
        ("label", with_metadata(json!({"labels": {"example.com/a": "TEXT"}})), "metadata.labels[example.com/a]"),
        ("annotation", with_metadata(json!({"annotations": {"a": "TEXT"}})), "metadata.annotations.a"),
        ("name", with_metadata(json!({"name": "TEXT"})), "metadata.name"),
        (
            "group of a rule",
            object(
                "AccessPolicy",
                "pasted",
                json!({"mode": "Advanced", "generalAccess": "Read", "rules": [{"groups": ["TEXT"], "access": "Read"}]}),
            ),
            "spec.rules[0].groups[0]",
        ),
        (
            "group",
            object("SecuritySettings", "default", json!({"dataScopedGroups": ["TEXT"]})),
            "spec.dataScopedGroups[0]",
        ),
        (
            "limit",
            object("SecuritySettings", "default", json!({"limits": {"maxLifetime": "TEXT"}})),
            "spec.limits.maxLifetime",
        ),
        (
            "key to reveal",
            object("KeyReveal", "pasted", json!({"apiKeyRef": {"name": "TEXT"}, "recipient": "age1a"})),
            "spec.apiKeyRef.name",
        ),
        (
            "recipient",
            object("KeyReveal", "pasted", json!({"apiKeyRef": {"name": "a"}, "recipient": "TEXT"})),
            "spec.recipient",
        ),
    ]
}

/// Returns the object with `text` instead of the placeholder.
fn with_text(object: &Value, text: &str) -> Value {
    let quoted = serde_json::to_string(text).unwrap();
    serde_json::from_str(&object.to_string().replace("TEXT", quoted.trim_matches('"'))).unwrap()
}

#[tokio::test]
async fn an_object_with_a_key_value_in_any_field_is_rejected_without_repeating_the_value() {
    let team = Team::new().await;
    let mut wrong = vec![];
    for (title, object, field) in cases() {
        let value = value();
        // The value alone, at the end of a long text, and in an Authorization header.
        for text in [value.clone(), format!("{}{value}", "x".repeat(256)), format!("Bearer {value}\n")] {
            let file = team.file(&with_text(&object, &text));
            let commands: [&[&str]; 3] = [
                &["create", "--save-config", "-f", &file],
                &["apply", "-f", &file],
                &["apply", "--server-side", "-f", &file],
            ];
            for command in commands {
                // kubectl apply sends the name in the URL. A server-side apply rejects duplicate entries of a set
                // before admission.
                if title == "name" && command[0] == "apply" || title.ends_with("twice") && command[1] == "--server-side"
                {
                    continue;
                }
                let answer = match team.try_kubectl(command) {
                    Ok(output) => format!("accepted: {output}"),
                    Err(error) => format!("{error:#}"),
                };
                let named = answer.contains(&format!("{field}: Invalid value: must not hold the value of an API key"));
                if !named || answer.contains(&value) || find_value(&answer).is_some() {
                    wrong.push(format!("{title}, {command:?}: {answer}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} cases failed:\n{}", wrong.len(), wrong.join("\n"));
    for kind in ["apikeys", "accesspolicies", "securitysettings", "keyreveals"] {
        assert_eq!(team.kubectl(&["get", kind, "-o", "name"]), "", "rejected objects are not stored");
    }
    assert_eq!(find_value(&team.shared.operator.log()), None, "the operator's log must not contain the value");
}

#[tokio::test]
async fn a_change_that_adds_a_key_value_is_rejected_and_similar_text_is_accepted() {
    let team = Team::new().await;
    let key = |spec: Value| api_key("there", &spec);
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"]})));
    let pasted = key(json!({"type": "Team", "presets": ["Alerts"], "displayName": value()}));
    let error = team.apply_error(&pasted);
    assert!(error.contains("spec.displayName: Invalid value: must not hold the value of an API key"), "{error}");
    assert_eq!(find_value(&error), None);
    for patch in [
        json!({"metadata": {"labels": {"a": value()}}}),
        json!({"metadata": {"annotations": {"a": format!("see {}", value())}}}),
    ] {
        let patch = patch.to_string();
        let result = output(team.shared.plane.kubectl().args([
            "-n",
            &team.namespace,
            "patch",
            "apikey/there",
            "--type=merge",
            "-p",
            &patch,
        ]));
        let error = format!("{:#}", result.expect_err("the value must be rejected"));
        // The first line of the error is the command line, which contains the value.
        let (_, message) = error.split_once('\n').unwrap();
        assert!(message.contains("must not hold the value of an API key"), "{message}");
        assert_eq!(find_value(message), None);
    }
    // A key prefix alone, or a value with a wrong checksum, is accepted.
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"], "displayName": "keys that begin with kwt_"})));
    let mut wrong = value();
    wrong.replace_range(20..21, if &wrong[20..21] == "a" { "b" } else { "a" });
    team.apply(&key(json!({"type": "Team", "presets": ["Alerts"], "displayName": wrong})));
}
