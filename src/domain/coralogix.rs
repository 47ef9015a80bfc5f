//! The access policies of Coralogix, as its API writes them (JSON), to ours and back.
//!
//! What one side can't express is an error that names the place, never a guess: a policy that says a little less than
//! before is a key that too many people can see.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::api::{AccessLevel, AccessMode, AccessPolicySpec, AccessRule, KeyType};

/// The versions that are read. The first is the one that is written.
const VERSIONS: [&str; 2] = ["v2025-01-01", "2025-01-01"];
const RESOURCES: [&str; 2] = ["data-ingest-api-keys", "team-custom-api-keys"];
/// The actions for Manage and for Read, on the key and on its policy.
const KEY: [&str; 2] = ["Manage", "ReadConfig"];
const POLICY: [&str; 2] = ["UpdateAccessPolicy", "ReadAccessPolicy"];

/// What can't be translated, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untranslatable {
    /// The place, as a path such as `rules[1].permissions`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Untranslatable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for Untranslatable {}

fn wrong<T>(path: impl Into<String>, message: impl Into<String>) -> Result<T, Untranslatable> {
    Err(Untranslatable { path: path.into(), message: message.into() })
}

/// Reads a policy of Coralogix.
///
/// # Errors
/// The first thing in it that ours can't express.
pub fn import(text: &str) -> Result<AccessPolicySpec, Untranslatable> {
    let document: Value = match serde_json::from_str(text) {
        Ok(document) => document,
        Err(error) => return wrong("", format!("no JSON: {error}")),
    };
    let document = object(&document, "", &["version", "rules", "default"])?;
    match document.get("version").and_then(Value::as_str) {
        Some(version) if VERSIONS.contains(&version) => {}
        Some(version) => return wrong("version", format!("{version:?} is not known: only {} is", VERSIONS[0])),
        None => return wrong("version", format!("missing: only {} is known", VERSIONS[0])),
    }
    let none = Value::Array(vec![]);
    let Some(rules) = document.get("rules").unwrap_or(&none).as_array() else {
        return wrong("rules", "must be a list");
    };
    let rules = rules.iter().enumerate().map(|(index, rule)| import_rule(rule, &format!("rules[{index}]")));
    let Some(default) = document.get("default") else {
        return wrong("default", "missing: it says what everyone else may do");
    };
    let rules = rules.collect::<Result<Vec<_>, _>>()?;
    let default = object(default, "default", &["permissions", "additionalInfo"])?;
    let (access, policy_access) = levels(default, "default")?;
    Ok(AccessPolicySpec {
        mode: AccessMode::Advanced,
        rules,
        general_access: Some(access),
        general_policy_access: policy_access,
    })
}

fn import_rule(rule: &Value, path: &str) -> Result<AccessRule, Untranslatable> {
    let rule = object(rule, path, &["targets", "permissions", "additionalInfo"])?;
    let place = format!("{path}.targets");
    let targets = match rule.get("targets").and_then(Value::as_array) {
        Some(targets) if !targets.is_empty() => targets,
        _ => return wrong(place, "must name at least one group"),
    };
    let mut groups: Vec<String> = vec![];
    for (index, target) in targets.iter().enumerate() {
        let place = format!("{place}[{index}]");
        let target = object(target, &place, &["group"])?;
        match target.get("group").and_then(Value::as_str) {
            Some(group) if !group.is_empty() && groups.iter().all(|known| known != group) => {
                groups.push(group.to_owned());
            }
            Some(group) if !group.is_empty() => {}
            _ => return wrong(place, "must be a group by name or id, as a string"),
        }
    }
    let (access, policy_access) = levels(rule, path)?;
    Ok(AccessRule { groups, access, policy_access })
}

/// Access to the keys; access to the policy, where that is another.
fn levels(holder: &Map<String, Value>, path: &str) -> Result<(AccessLevel, Option<AccessLevel>), Untranslatable> {
    if holder.get("additionalInfo").is_some_and(|info| !info.is_null()) {
        return wrong(format!("{path}.additionalInfo"), "is not understood: only null is");
    }
    let path = format!("{path}.permissions");
    let Some(permissions) = holder.get("permissions").and_then(Value::as_object) else {
        return wrong(path, "must be an object of permissions and effects");
    };
    let mut effects = vec![];
    for (name, effect) in permissions {
        let place = format!("{path}.{name}");
        let action =
            name.split_once(':').filter(|(resource, _)| RESOURCES.contains(resource)).map(|(_, action)| action);
        let Some(action) = action.filter(|action| KEY.contains(action) || POLICY.contains(action)) else {
            return wrong(
                place,
                format!(
                    "is not known: only {} and {} of {} are",
                    KEY.join(", "),
                    POLICY.join(", "),
                    RESOURCES.join(", ")
                ),
            );
        };
        let granted = match effect.as_str() {
            Some("grant") => true,
            Some("deny") => false,
            _ => return wrong(place, "must be grant or deny"),
        };
        if effects.iter().any(|(known, was)| *known == action && *was != granted) {
            return wrong(place, "is granted under one resource and denied under the other");
        }
        effects.push((action, granted));
    }
    let access = level(&effects, KEY, &path)?;
    let policy_access = level(&effects, POLICY, &path)?;
    Ok((access, (policy_access != access).then_some(policy_access)))
}

fn level(effects: &[(&str, bool)], actions: [&str; 2], path: &str) -> Result<AccessLevel, Untranslatable> {
    let effect = |action: &str| effects.iter().find(|(known, _)| *known == action).map(|(_, granted)| *granted);
    match actions.map(effect) {
        [Some(true), Some(false)] | [Some(false), Some(true)] => wrong(
            path,
            format!(
                "{} and {}: a deny together with a grant can't be expressed: leave the deny out",
                actions[0], actions[1]
            ),
        ),
        [Some(true), _] => Ok(AccessLevel::Manage),
        [_, Some(true)] => Ok(AccessLevel::Read),
        _ => Ok(AccessLevel::NoAccess),
    }
}

fn object<'a>(value: &'a Value, path: &str, known: &[&str]) -> Result<&'a Map<String, Value>, Untranslatable> {
    let Some(object) = value.as_object() else { return wrong(path, "must be an object") };
    let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match object.keys().find(|name| !known.contains(&name.as_str())) {
        Some(unknown) => wrong(at(unknown), format!("is not known: only {} are", known.join(", "))),
        None => Ok(object),
    }
}

/// Writes a policy as Coralogix has it, for keys of this type.
///
/// # Errors
/// If it is Private, or for Personal keys: Coralogix has no JSON for either.
pub fn export(policy: &AccessPolicySpec, key_type: KeyType) -> Result<Value, Untranslatable> {
    let resource = match key_type {
        KeyType::SendYourData => RESOURCES[0],
        KeyType::Team => RESOURCES[1],
        KeyType::Personal => return wrong("type", "Personal keys have no access policy"),
    };
    if policy.mode == AccessMode::Private {
        return wrong(
            "spec.mode",
            "Private depends on who created the key, and the JSON of Coralogix can only name groups: \
             set mode Advanced first",
        );
    }
    let permissions = |access: AccessLevel, policy_access: Option<AccessLevel>| {
        let mut permissions = Map::new();
        for (level, actions) in [(access, KEY), (policy_access.unwrap_or(access), POLICY)] {
            let effects: &[(&str, &str)] = match level {
                AccessLevel::Manage => &[(actions[1], "grant"), (actions[0], "grant")],
                AccessLevel::Read => &[(actions[1], "grant")],
                AccessLevel::NoAccess => &[(actions[1], "deny"), (actions[0], "deny")],
            };
            permissions.extend(effects.iter().map(|(action, effect)| (format!("{resource}:{action}"), json!(effect))));
        }
        json!({"permissions": permissions, "additionalInfo": null})
    };
    let rules = policy.rules.iter().map(|rule| {
        let mut written = permissions(rule.access, rule.policy_access);
        written["targets"] = rule.groups.iter().map(|group| json!({"group": group})).collect();
        written
    });
    let general = policy.general_access.unwrap_or(AccessLevel::NoAccess);
    Ok(json!({
        "version": VERSIONS[0],
        "rules": rules.collect::<Vec<_>>(),
        "default": permissions(general, policy.general_policy_access),
    }))
}

#[cfg(test)]
mod tests {
    use AccessLevel::{Manage, NoAccess, Read};

    use super::*;

    const LEVELS: [AccessLevel; 3] = [Manage, Read, NoAccess];

    /// Access to the policy is written down only where it is another.
    fn other(access: AccessLevel, policy: AccessLevel) -> Option<AccessLevel> {
        (policy != access).then_some(policy)
    }

    #[test]
    fn every_combination_of_levels_comes_back() {
        let pairs: Vec<_> = LEVELS.iter().flat_map(|a| LEVELS.iter().map(|p| (*a, *p))).collect();
        for key_type in [KeyType::Team, KeyType::SendYourData] {
            for (access, policy) in &pairs {
                for (general, general_policy) in &pairs {
                    let spec = AccessPolicySpec {
                        mode: AccessMode::Advanced,
                        rules: vec![AccessRule {
                            groups: vec!["120173".to_owned(), "sre".to_owned()],
                            access: *access,
                            policy_access: other(*access, *policy),
                        }],
                        general_access: Some(*general),
                        general_policy_access: other(*general, *general_policy),
                    };
                    let json = export(&spec, key_type).unwrap();
                    assert_eq!(import(&json.to_string()).unwrap(), spec, "{json}");
                }
            }
        }
    }

    /// The sample of Coralogix's own operator.
    #[test]
    fn the_policy_of_the_sample_is_read() {
        let text = r#"{ "version": "v2025-01-01", "rules": [], "default": { "permissions": {
            "team-custom-api-keys:ReadConfig": "grant", "team-custom-api-keys:Manage": "grant",
            "team-custom-api-keys:ReadAccessPolicy": "grant", "team-custom-api-keys:UpdateAccessPolicy": "grant"
        }, "additionalInfo": null } }"#;
        let spec = import(text).unwrap();
        assert_eq!((spec.general_access, spec.general_policy_access, spec.rules.len()), (Some(Manage), None, 0));
        assert_eq!(import(&text.replace("v2025", "2025")).unwrap(), spec);
    }

    fn document(rule: &Value) -> String {
        json!({"version": "2025-01-01", "rules": [
            {"targets": [{"group": "1"}], "permissions": {}}, rule,
        ], "default": {"permissions": {}}})
        .to_string()
    }

    #[test]
    fn what_is_not_said_is_no_access() {
        let spec = import(&document(&json!({"targets": [{"group": "2"}], "permissions": {
            "data-ingest-api-keys:Manage": "deny", "data-ingest-api-keys:ReadAccessPolicy": "grant"}})))
        .unwrap();
        assert_eq!((spec.rules[1].access, spec.rules[1].policy_access), (NoAccess, Some(Read)));
        assert_eq!((spec.rules[0].access, spec.general_access), (NoAccess, Some(NoAccess)));
    }

    #[test]
    fn what_cannot_be_expressed_is_an_error_that_names_the_place() {
        let group = json!([{"group": "2"}]);
        for (rule, place) in [
            (json!({"targets": [], "permissions": {}}), "rules[1].targets"),
            (json!({"targets": [{"user": "x"}], "permissions": {}}), "rules[1].targets[0].user"),
            (json!({"targets": [{"group": 7}], "permissions": {}}), "rules[1].targets[0]"),
            (json!({"targets": group}), "rules[1].permissions"),
            (json!({"targets": group, "permissions": {}, "additionalInfo": {}}), "rules[1].additionalInfo"),
            (json!({"targets": group, "permissions": {"alerts:Read": "grant"}}), "rules[1].permissions.alerts:Read"),
            (
                json!({"targets": group, "permissions": {"team-custom-api-keys:Manage": "maybe"}}),
                "rules[1].permissions.team-custom-api-keys:Manage",
            ),
            (
                json!({"targets": group, "permissions": {
                    "team-custom-api-keys:Manage": "deny", "team-custom-api-keys:ReadConfig": "grant"}}),
                "rules[1].permissions",
            ),
            (
                json!({"targets": group, "permissions": {
                    "data-ingest-api-keys:Manage": "deny", "team-custom-api-keys:Manage": "grant"}}),
                "rules[1].permissions.team-custom-api-keys:Manage",
            ),
        ] {
            assert_eq!(import(&document(&rule)).unwrap_err().path, place, "{rule}");
        }
        for (text, place) in [
            ("{", ""),
            ("[]", ""),
            (r#"{"rules": []}"#, "version"),
            (r#"{"version": "2026-01-01"}"#, "version"),
            (r#"{"version": "2025-01-01", "rules": {}}"#, "rules"),
            (r#"{"version": "2025-01-01"}"#, "default"),
            (r#"{"version": "2025-01-01", "more": 1}"#, "more"),
        ] {
            assert_eq!(import(text).unwrap_err().path, place, "{text}");
        }
    }

    #[test]
    fn private_is_not_exported() {
        let spec = AccessPolicySpec {
            mode: AccessMode::Private,
            rules: vec![],
            general_access: None,
            general_policy_access: None,
        };
        assert_eq!(export(&spec, KeyType::Team).unwrap_err().path, "spec.mode");
    }
}
