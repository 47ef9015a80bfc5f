//! The keys of before as custom keys: manifests for Git, and nothing else.

use std::{collections::BTreeSet, fmt::Write, sync::Arc};

use clap::Args;
use kube::ResourceExt;
use serde::Deserialize;
use serde_json::Value;

use super::{Cluster, Failure, Reply, Result, policy, print, refused, say};
use crate::{
    api::{AccessPolicy, AccessPolicyRef, ApiKey, ApiKeySpec, KeyType},
    domain::{catalog::Catalog, coralogix},
};

#[derive(Args)]
pub(super) struct MigrateArgs {
    /// Legacy keys.
    #[arg(required_unless_present = "filename", conflicts_with = "filename")]
    keys: Vec<String>,
    /// A file with ApiKeys of coralogix.com/v1alpha1; - is standard input.
    #[arg(short, long)]
    filename: Option<String>,
    /// Fail if there is anything to warn about.
    #[arg(long)]
    strict: bool,
}

/// What a key becomes: manifests, and what did not come along.
#[derive(Debug, Default)]
struct Migrated {
    name: String,
    policy: Option<AccessPolicy>,
    key: Option<ApiKey>,
    warnings: Vec<String>,
}

pub(super) async fn migrate(cluster: &Cluster, args: &MigrateArgs) -> Result<Reply> {
    let (_, catalog) = cluster.catalog().await?;
    if catalog.is_empty() {
        return refused("no PermissionCatalog is installed, so nothing can be translated");
    }
    let mut all = vec![];
    if let Some(file) = &args.filename {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&policy::read(file)?)
            .map_err(|error| Failure::Refused(format!("{file}: {error}")))?;
        let documents = documents.into_iter().filter(|document| !document.is_null());
        all.extend(documents.enumerate().map(|(index, document)| from_coralogix(&document, index, &catalog)));
    }
    for name in &args.keys {
        let key = cluster.key(name).await?;
        match from_legacy(&key, &catalog) {
            Some(migrated) => all.push(migrated),
            None => return refused(format!("{name} is no legacy key, so there is nothing to migrate")),
        }
    }
    let mut text = String::new();
    for migrated in &all {
        write(&mut text, migrated)?;
    }
    let warned = all.iter().any(|migrated| !migrated.warnings.is_empty());
    Ok(Reply { text, yes: !(warned && args.strict) })
}

fn write(text: &mut String, migrated: &Migrated) -> Result<()> {
    text.push_str("---\n");
    for warning in &migrated.warnings {
        // What a message quotes must not begin a line that is no comment.
        let warning = print::line(&format!("{}: {warning}", migrated.name));
        say(&format!("warning: {warning}"));
        let _ = writeln!(text, "# {warning}");
    }
    let documents =
        [migrated.policy.as_ref().map(print::yaml).transpose()?, migrated.key.as_ref().map(print::yaml).transpose()?];
    text.push_str(&documents.into_iter().flatten().collect::<Vec<_>>().join("---\n"));
    Ok(())
}

/// The custom key in place of a legacy key; `None` if it is none.
fn from_legacy(key: &ApiKey, catalog: &Catalog) -> Option<Migrated> {
    let kind = key.spec.legacy?;
    let mut migrated = Migrated { name: key.name_any(), ..Migrated::default() };
    let held: BTreeSet<Arc<str>> = catalog.legacy(kind).iter().cloned().collect();
    if held.is_empty() {
        migrated.warnings.push(format!("no catalogue says what legacy {kind:?} keys may do: not migrated"));
        return Some(migrated);
    }
    let name = format!("{}-custom", key.name_any());
    let mut spec = ApiKeySpec { legacy: None, secret: None, rotation: None, ..key.spec.clone() };
    match catalog.preset_of(&held) {
        Some(preset) => spec.presets = vec![preset.to_owned()],
        None => spec.permissions = held.iter().map(ToString::to_string).collect(),
    }
    let mut custom = ApiKey::new(&name, spec);
    custom.metadata.namespace = key.namespace();
    migrated.key = Some(custom);
    Some(migrated)
}

/// An ApiKey of Coralogix's own operator.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Theirs {
    name: String,
    owner: Owner,
    active: Option<bool>,
    #[serde(default)]
    presets: Vec<String>,
    #[serde(default)]
    permissions: Vec<String>,
    access_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Owner {
    user_id: Option<String>,
    team_id: Option<u64>,
}

fn from_coralogix(document: &Value, index: usize, catalog: &Catalog) -> Migrated {
    let metadata = |name: &str| document["metadata"][name].as_str().map(str::to_owned);
    let name = metadata("name").unwrap_or_default();
    let title = if name.is_empty() { format!("document {}", index + 1) } else { name.clone() };
    let mut migrated = Migrated { name: title, ..Migrated::default() };
    let (version, kind) = (&document["apiVersion"], &document["kind"]);
    if version != "coralogix.com/v1alpha1" || kind != "ApiKey" {
        migrated.warnings.push("no ApiKey of coralogix.com/v1alpha1: left out".to_owned());
        return migrated;
    }
    if name.is_empty() {
        migrated.warnings.push("metadata.name is missing: left out".to_owned());
        return migrated;
    }
    let namespace = metadata("namespace");
    let theirs: Theirs = match serde_json::from_value(document["spec"].clone()) {
        Ok(theirs) => theirs,
        Err(error) => {
            migrated.warnings.push(format!("spec: {error}: left out"));
            return migrated;
        }
    };
    let (presets, permissions) = names(&theirs, catalog, &mut migrated.warnings);
    if presets.is_empty() && permissions.is_empty() {
        migrated
            .warnings
            .push("it may do nothing, and a key needs at least one preset or permission: left out".to_owned());
        return migrated;
    }
    let key_type = match (&theirs.owner.user_id, theirs.owner.team_id) {
        (Some(user), None) => {
            migrated.warnings.push(format!(
                "user {user:?} is an id of Coralogix: write the name by which the cluster knows that user"
            ));
            KeyType::Personal
        }
        (None, Some(_)) if only_sends(&presets, &permissions, catalog) => KeyType::SendYourData,
        (None, Some(_)) => KeyType::Team,
        _ => {
            migrated.warnings.push("spec.owner must be a userId or a teamId: left out".to_owned());
            return migrated;
        }
    };
    let mut spec = ApiKeySpec {
        display_name: (!theirs.name.is_empty() && theirs.name != name).then(|| theirs.name.clone()),
        key_type,
        user: theirs.owner.user_id.clone(),
        presets,
        permissions,
        active: theirs.active.filter(|active| !active),
        access_policy_ref: None,
        legacy: None,
        expires_at: None,
        rotation: None,
        secret: None,
    };
    match theirs.access_policy.as_deref().filter(|text| !text.trim().is_empty()) {
        None => {}
        Some(_) if key_type == KeyType::Personal => {
            migrated.warnings.push("Personal keys have no access policy: accessPolicy is left out".to_owned());
        }
        Some(text) => match coralogix::import(text) {
            Ok(policy) => {
                if !policy.rules.is_empty() {
                    migrated.warnings.push(
                        "the groups of its access policy are ids of Coralogix: write the groups of the cluster"
                            .to_owned(),
                    );
                }
                let policy_name = format!("{name}-policy");
                let mut policy = AccessPolicy::new(&policy_name, policy);
                policy.metadata.namespace.clone_from(&namespace);
                migrated.policy = Some(policy);
                spec.access_policy_ref = Some(AccessPolicyRef { name: policy_name });
            }
            Err(error) => {
                // A key without its policy would be open to more people than before.
                migrated
                    .warnings
                    .push(format!("accessPolicy: {error}: left out, as a key without its policy would be"));
                return migrated;
            }
        },
    }
    let mut key = ApiKey::new(&name, spec);
    key.metadata.namespace = namespace;
    migrated.key = Some(key);
    migrated
}

/// What it asks for, in the spelling of the catalogue.
fn names(theirs: &Theirs, catalog: &Catalog, warnings: &mut Vec<String>) -> (Vec<String>, Vec<String>) {
    let (mut presets, mut permissions): (Vec<String>, Vec<String>) = Default::default();
    let mut unknown = |kind: &str, name: &str, near: &[&str]| {
        let hint = if near.is_empty() { String::new() } else { format!("; did it mean {}?", near.join(" or ")) };
        warnings.push(format!("no catalogue has a {kind} {name:?}: left out{hint}"));
    };
    for name in &theirs.presets {
        match catalog.preset(name) {
            Some(preset) if presets.iter().any(|known| **known == *preset.name) => {}
            Some(preset) => presets.push(preset.name.to_string()),
            None => unknown("preset", name, &catalog.presets_like(name)),
        }
    }
    for name in &theirs.permissions {
        match catalog.permission(name) {
            Some(permission) if permissions.iter().any(|known| **known == *permission.name) => {}
            Some(permission) => permissions.push(permission.name.to_string()),
            None => unknown("permission", name, &catalog.permissions_like(name)),
        }
    }
    (presets, permissions)
}

/// Whether there is nothing in it but ingestion.
fn only_sends(presets: &[String], permissions: &[String], catalog: &Catalog) -> bool {
    let sends = |name: &str| catalog.permission(name).is_some_and(|permission| permission.ingestion);
    let preset_sends = |name: &String| {
        catalog
            .preset(name)
            .is_some_and(|preset| !preset.permissions.is_empty() && preset.permissions.iter().all(|name| sends(name)))
    };
    presets.iter().all(preset_sends) && permissions.iter().all(|name| sends(name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        api::{LegacyKind, LegacyRole},
        domain::catalog::tests::{permission, preset, spec},
    };

    fn catalog() -> Catalog {
        let mut spec = spec(
            vec![
                permission("alerts-map:Read", false),
                permission("spans:Read", false),
                permission("logs.data-ingress:SendData", true),
            ],
            vec![preset("APM", false, &["spans:Read"]), preset("SendData", false, &["logs.data-ingress:SendData"])],
        );
        let role = |name: &str, kind: LegacyKind, permissions: &[&str]| LegacyRole {
            name: name.to_owned(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            legacy_kind: Some(kind),
            legacy_key: None,
            legacy_key_evidence: None,
        };
        spec.legacy_roles = vec![
            role("Send Data", LegacyKind::SendYourData, &["logs.data-ingress:SendData"]),
            role("Query", LegacyKind::LogsQuery, &["spans:Read", "alerts-map:Read"]),
        ];
        Catalog::merge([("test", &spec)]).0
    }

    fn theirs(spec: &Value) -> Migrated {
        let document = json!({
            "apiVersion": "coralogix.com/v1alpha1", "kind": "ApiKey",
            "metadata": {"name": "sample", "namespace": "shop"}, "spec": spec,
        });
        from_coralogix(&document, 0, &catalog())
    }

    #[test]
    fn the_samples_of_coralogix_become_ours() {
        let send = theirs(&json!({"name": "x", "owner": {"teamId": 1_234_567}, "presets": ["SendData"]}));
        assert!(send.warnings.is_empty(), "{:?}", send.warnings);
        let key = send.key.unwrap();
        assert_eq!((key.spec.key_type, key.namespace().as_deref()), (KeyType::SendYourData, Some("shop")));
        assert_eq!((key.spec.display_name.as_deref(), key.spec.active), (Some("x"), None));

        let team = theirs(&json!({
            "name": "team-key-sample", "owner": {"teamId": 4_013_254}, "active": false,
            "presets": ["apm"], "permissions": ["ALERTS-MAP:READ"],
            "accessPolicy": r#"{"version": "v2025-01-01", "rules": [], "default": {"permissions": {}}}"#,
        }));
        assert!(team.warnings.is_empty(), "{:?}", team.warnings);
        let spec = team.key.unwrap().spec;
        assert_eq!((spec.key_type, spec.active), (KeyType::Team, Some(false)));
        assert_eq!((spec.presets, spec.permissions), (vec!["APM".to_owned()], vec!["alerts-map:Read".to_owned()]));
        assert_eq!(spec.access_policy_ref.unwrap().name, team.policy.unwrap().name_any());

        let user = theirs(&json!({"name": "u", "owner": {"userId": "aaaa"}, "presets": ["APM"]}));
        let spec = user.key.unwrap().spec;
        assert_eq!((spec.key_type, spec.user.as_deref()), (KeyType::Personal, Some("aaaa")));
        assert_eq!(user.warnings.len(), 1, "the user is named by an id of another system");
    }

    #[test]
    fn what_does_not_come_along_is_said() {
        let some = theirs(&json!({"name": "x", "owner": {"teamId": 1}, "presets": ["APN", "APM"]}));
        assert_eq!(some.key.unwrap().spec.presets, ["APM"]);
        assert!(some.warnings[0].contains("\"APN\": left out"), "{:?}", some.warnings);
        for (spec, word) in [
            (json!({"name": "x", "owner": {"teamId": 1}, "presets": []}), "may do nothing"),
            (json!({"name": "x", "owner": {}, "presets": ["APM"]}), "spec.owner"),
            (json!({"name": "x", "owner": {"teamId": "one"}}), "spec:"),
            (json!({"name": "x", "owner": {"teamId": 1}, "presets": ["APM"], "accessPolicy": "{"}), "accessPolicy"),
        ] {
            let migrated = theirs(&spec);
            assert!(migrated.key.is_none(), "{spec}");
            assert!(migrated.warnings.last().unwrap().contains(word), "{:?}", migrated.warnings);
        }
        assert_eq!(from_coralogix(&json!({"kind": "Secret"}), 2, &catalog()).name, "document 3");
    }

    #[test]
    fn a_legacy_key_becomes_the_preset_that_equals_it_or_its_permissions() {
        let legacy = |key_type: &str, kind: &str| -> ApiKey {
            serde_json::from_value(json!({
                "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
                "metadata": {"name": "old", "namespace": "shop"},
                "spec": {"type": key_type, "legacy": kind, "secret": {"name": "s", "key": "k"},
                    "expiresAt": "2030-01-01T00:00:00Z"},
            }))
            .unwrap()
        };
        let send = from_legacy(&legacy("SendYourData", "SendYourData"), &catalog()).unwrap().key.unwrap();
        assert_eq!(
            (send.name_any().as_str(), send.spec.presets.as_slice()),
            ("old-custom", &["SendData".to_owned()][..])
        );
        assert!(send.spec.legacy.is_none() && send.spec.secret.is_none());
        assert_eq!(send.spec.expires_at.as_deref(), Some("2030-01-01T00:00:00Z"));
        let query = from_legacy(&legacy("Personal", "LogsQuery"), &catalog()).unwrap().key.unwrap();
        assert_eq!(query.spec.permissions, ["alerts-map:Read", "spans:Read"]);
        let scim = from_legacy(&legacy("Team", "Scim"), &catalog()).unwrap();
        assert!(scim.key.is_none() && scim.warnings.len() == 1);
    }
}
