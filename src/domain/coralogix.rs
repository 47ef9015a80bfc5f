//! Translates the access policies of the Coralogix API (JSON) to AccessPolicies and back.
//!
//! A part without an equivalent is an error that names its path, and is never approximated: a policy that loses a
//! restriction would show a key to more users.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::api::{AccessLevel, AccessMode, AccessPolicySpec, AccessRule, KeyType};

/// The versions that `import` reads. `export` writes the first.
const VERSIONS: [&str; 2] = ["v2025-01-01", "2025-01-01"];
const RESOURCES: [&str; 2] = ["data-ingest-api-keys", "team-custom-api-keys"];
/// The actions of levels Manage and Read on a key.
const KEY_ACTIONS: [&str; 2] = ["Manage", "ReadConfig"];
/// The actions of levels Manage and Read on its policy.
const POLICY_ACTIONS: [&str; 2] = ["UpdateAccessPolicy", "ReadAccessPolicy"];

/// A part of a policy that can't be translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untranslatable {
    /// The path of the part, such as `rules[1].permissions`.
    pub path: String,
    /// The problem and the fix.
    pub message: String,
}

impl fmt::Display for Untranslatable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for Untranslatable {}

fn error_at<T>(path: impl Into<String>, message: impl Into<String>) -> Result<T, Untranslatable> {
    Err(Untranslatable { path: path.into(), message: message.into() })
}

/// Reads a policy of Coralogix.
///
/// # Errors
/// The first part of it that an AccessPolicy can't express.
pub fn import(text: &str) -> Result<AccessPolicySpec, Untranslatable> {
    let document: Value = match serde_json::from_str(text) {
        Ok(document) => document,
        Err(error) => return error_at("", format!("not valid JSON: {error}")),
    };
    let document = object(&document, "", &["version", "rules", "default"])?;
    match document.get("version").and_then(Value::as_str) {
        Some(version) if VERSIONS.contains(&version) => {}
        Some(version) => return error_at("version", format!("{version:?} is not supported: use {:?}", VERSIONS[0])),
        None => return error_at("version", format!("is missing: use {:?}", VERSIONS[0])),
    }
    let none = Value::Array(vec![]);
    let Some(rules) = document.get("rules").unwrap_or(&none).as_array() else {
        return error_at("rules", "must be a list");
    };
    let rules = rules.iter().enumerate().map(|(index, rule)| import_rule(rule, &format!("rules[{index}]")));
    let Some(default) = document.get("default") else {
        return error_at("default", "is missing: it sets the access of users whom no rule covers");
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
    let targets_path = format!("{path}.targets");
    let targets = match rule.get("targets").and_then(Value::as_array) {
        Some(targets) if !targets.is_empty() => targets,
        _ => return error_at(targets_path, "must name at least one group"),
    };
    let mut groups: Vec<String> = vec![];
    for (index, target) in targets.iter().enumerate() {
        let target_path = format!("{targets_path}[{index}]");
        let target = object(target, &target_path, &["group"])?;
        match target.get("group").and_then(Value::as_str) {
            Some(group) if !group.is_empty() && groups.iter().all(|known| known != group) => {
                groups.push(group.to_owned());
            }
            Some(group) if !group.is_empty() => {}
            _ => return error_at(target_path, "must name a group, by name or id, as a string"),
        }
    }
    let (access, policy_access) = levels(rule, path)?;
    Ok(AccessRule { groups, access, policy_access })
}

/// The level of access to the keys, and to the policy if that differs.
fn levels(holder: &Map<String, Value>, path: &str) -> Result<(AccessLevel, Option<AccessLevel>), Untranslatable> {
    if holder.get("additionalInfo").is_some_and(|info| !info.is_null()) {
        return error_at(format!("{path}.additionalInfo"), "must be null");
    }
    let path = format!("{path}.permissions");
    let Some(permissions) = holder.get("permissions").and_then(Value::as_object) else {
        return error_at(path, "must be an object that maps permissions to effects");
    };
    let mut effects = vec![];
    for (name, effect) in permissions {
        let permission_path = format!("{path}.{name}");
        let action =
            name.split_once(':').filter(|(resource, _)| RESOURCES.contains(resource)).map(|(_, action)| action);
        let Some(action) = action.filter(|action| KEY_ACTIONS.contains(action) || POLICY_ACTIONS.contains(action))
        else {
            return error_at(
                permission_path,
                format!(
                    "is not supported: use {} or {} of {}",
                    KEY_ACTIONS.join(", "),
                    POLICY_ACTIONS.join(", "),
                    RESOURCES.join(", ")
                ),
            );
        };
        let granted = match effect.as_str() {
            Some("grant") => true,
            Some("deny") => false,
            _ => return error_at(permission_path, "must be grant or deny"),
        };
        if effects.iter().any(|(known, was)| *known == action && *was != granted) {
            return error_at(permission_path, "is granted under one resource and denied under the other");
        }
        effects.push((action, granted));
    }
    let access = level(&effects, KEY_ACTIONS, &path)?;
    let policy_access = level(&effects, POLICY_ACTIONS, &path)?;
    Ok((access, (policy_access != access).then_some(policy_access)))
}

fn level(effects: &[(&str, bool)], actions: [&str; 2], path: &str) -> Result<AccessLevel, Untranslatable> {
    let effect = |action: &str| effects.iter().find(|(known, _)| *known == action).map(|(_, granted)| *granted);
    match actions.map(effect) {
        [Some(true), Some(false)] | [Some(false), Some(true)] => error_at(
            path,
            format!(
                "{} and {}: an AccessPolicy can't express a deny beside a grant: remove the deny",
                actions[0], actions[1]
            ),
        ),
        [Some(true), _] => Ok(AccessLevel::Manage),
        [_, Some(true)] => Ok(AccessLevel::Read),
        _ => Ok(AccessLevel::NoAccess),
    }
}

fn object<'a>(value: &'a Value, path: &str, known: &[&str]) -> Result<&'a Map<String, Value>, Untranslatable> {
    let Some(object) = value.as_object() else { return error_at(path, "must be an object") };
    let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match object.keys().find(|name| !known.contains(&name.as_str())) {
        Some(unknown) => error_at(at(unknown), format!("is not supported: the fields are {}", known.join(", "))),
        None => Ok(object),
    }
}

/// Writes a policy for keys of this type in the JSON of Coralogix.
///
/// # Errors
/// If the policy is Private or the keys are Personal: Coralogix has no JSON for either.
pub fn export(policy: &AccessPolicySpec, key_type: KeyType) -> Result<Value, Untranslatable> {
    let resource = match key_type {
        KeyType::SendYourData => RESOURCES[0],
        KeyType::Team => RESOURCES[1],
        KeyType::Personal => return error_at("type", "Personal keys have no access policy"),
    };
    if policy.mode == AccessMode::Private {
        return error_at(
            "spec.mode",
            "mode Private depends on the creator of the key, and the JSON of Coralogix only names groups: \
             set mode Advanced first",
        );
    }
    let permissions = |access: AccessLevel, policy_access: Option<AccessLevel>| {
        let mut permissions = Map::new();
        for (level, actions) in [(access, KEY_ACTIONS), (policy_access.unwrap_or(access), POLICY_ACTIONS)] {
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

    /// `policyAccess` is set only where it differs.
    fn policy_access_if_different(access: AccessLevel, policy: AccessLevel) -> Option<AccessLevel> {
        (policy != access).then_some(policy)
    }

    #[test]
    fn export_and_import_keep_every_combination_of_levels() {
        let pairs: Vec<_> = LEVELS.iter().flat_map(|a| LEVELS.iter().map(|p| (*a, *p))).collect();
        for key_type in [KeyType::Team, KeyType::SendYourData] {
            for (access, policy) in &pairs {
                for (general, general_policy) in &pairs {
                    let spec = AccessPolicySpec {
                        mode: AccessMode::Advanced,
                        rules: vec![AccessRule {
                            groups: vec!["120173".to_owned(), "sre".to_owned()],
                            access: *access,
                            policy_access: policy_access_if_different(*access, *policy),
                        }],
                        general_access: Some(*general),
                        general_policy_access: policy_access_if_different(*general, *general_policy),
                    };
                    let json = export(&spec, key_type).unwrap();
                    assert_eq!(import(&json.to_string()).unwrap(), spec, "{json}");
                }
            }
        }
    }

    /// The sample of the Coralogix operator.
    #[test]
    fn import_reads_the_sample_policy_in_both_spellings_of_the_version() {
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
    fn permissions_that_are_not_listed_are_no_access() {
        let spec = import(&document(&json!({"targets": [{"group": "2"}], "permissions": {
            "data-ingest-api-keys:Manage": "deny", "data-ingest-api-keys:ReadAccessPolicy": "grant"}})))
        .unwrap();
        assert_eq!((spec.rules[1].access, spec.rules[1].policy_access), (NoAccess, Some(Read)));
        assert_eq!((spec.rules[0].access, spec.general_access), (NoAccess, Some(NoAccess)));
    }

    #[test]
    fn parts_without_an_equivalent_are_errors_with_their_path() {
        let group = json!([{"group": "2"}]);
        for (rule, path) in [
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
            assert_eq!(import(&document(&rule)).unwrap_err().path, path, "{rule}");
        }
        for (text, path) in [
            ("{", ""),
            ("[]", ""),
            (r#"{"rules": []}"#, "version"),
            (r#"{"version": "2026-01-01"}"#, "version"),
            (r#"{"version": "2025-01-01", "rules": {}}"#, "rules"),
            (r#"{"version": "2025-01-01"}"#, "default"),
            (r#"{"version": "2025-01-01", "more": 1}"#, "more"),
        ] {
            assert_eq!(import(text).unwrap_err().path, path, "{text}");
        }
    }

    #[test]
    fn export_of_a_private_policy_is_an_error() {
        let spec = AccessPolicySpec {
            mode: AccessMode::Private,
            rules: vec![],
            general_access: None,
            general_policy_access: None,
        };
        assert_eq!(export(&spec, KeyType::Team).unwrap_err().path, "spec.mode");
    }
}
