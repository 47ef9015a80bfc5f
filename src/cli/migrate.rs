//! `migrate`: translates legacy keys, and ApiKeys of Coralogix's own operator, to manifests of custom keys.

use std::{collections::BTreeSet, fmt::Write, sync::Arc};

use clap::Args;
use kube::ResourceExt;
use serde::Deserialize;
use serde_json::Value;

use super::{CliError, ClusterClient, Reply, Result, policy, print, refused, report};
use crate::{
    api::{AccessPolicy, AccessPolicyRef, AccessPolicySpec, ApiKey, ApiKeySpec, KeyType},
    domain::{catalog::Catalog, coralogix},
};

#[derive(Args)]
pub(super) struct MigrateArgs {
    /// The names of legacy keys.
    #[arg(required_unless_present = "filename", conflicts_with = "filename")]
    keys: Vec<String>,
    /// A file with ApiKeys of coralogix.com/v1alpha1; - is standard input.
    #[arg(short, long)]
    filename: Option<String>,
    /// Return exit code 1 if there are warnings.
    #[arg(long)]
    strict: bool,
}

/// The manifests that replace a key, and warnings about parts that have no equivalent.
#[derive(Debug, Default)]
struct Migrated {
    name: String,
    policy: Option<AccessPolicy>,
    key: Option<ApiKey>,
    warnings: Vec<String>,
}

pub(super) async fn migrate(cluster: &ClusterClient, args: &MigrateArgs) -> Result<Reply> {
    let (_, catalog) = cluster.catalog().await?;
    if catalog.is_empty() {
        return refused("no PermissionCatalog is installed: install one, because a translation requires it");
    }
    let mut all = vec![];
    if let Some(file) = &args.filename {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&policy::read(file)?)
            .map_err(|error| CliError::Refused(format!("{file}: {error}")))?;
        let documents = documents.into_iter().filter(|document| !document.is_null());
        all.extend(documents.enumerate().map(|(index, document)| from_coralogix(&document, index, &catalog)));
    }
    for name in &args.keys {
        let key = cluster.key(name).await?;
        match from_legacy(&key, &catalog) {
            Some(migrated) => all.push(migrated),
            None => return refused(format!("{name} is not a legacy key, so there is nothing to migrate")),
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
        // Quoted text must not start a new line outside the comment.
        let warning = print::line(&format!("{}: {warning}", migrated.name));
        report(&format!("warning: {warning}"));
        let _ = writeln!(text, "# {warning}");
    }
    let documents =
        [migrated.policy.as_ref().map(print::yaml).transpose()?, migrated.key.as_ref().map(print::yaml).transpose()?];
    text.push_str(&documents.into_iter().flatten().collect::<Vec<_>>().join("---\n"));
    Ok(())
}

/// Returns the custom key that replaces a legacy key, or `None` if `key` is not a legacy key.
fn from_legacy(key: &ApiKey, catalog: &Catalog) -> Option<Migrated> {
    let kind = key.spec.legacy?;
    let mut migrated = Migrated { name: key.name_any(), ..Migrated::default() };
    let permissions: BTreeSet<Arc<str>> = catalog.legacy(kind).iter().cloned().collect();
    if permissions.is_empty() {
        migrated.warnings.push(format!("no catalog defines the permissions of legacy {kind:?} keys: not migrated"));
        return Some(migrated);
    }
    let name = format!("{}-custom", key.name_any());
    let mut spec = ApiKeySpec { legacy: None, secret: None, rotation: None, ..key.spec.clone() };
    match catalog.preset_of(&permissions) {
        Some(preset) => spec.presets = vec![preset.to_owned()],
        None => spec.permissions = permissions.iter().map(ToString::to_string).collect(),
    }
    let mut custom = ApiKey::new(&name, spec);
    custom.metadata.namespace = key.namespace();
    migrated.key = Some(custom);
    Some(migrated)
}

/// The spec of an ApiKey of Coralogix's own operator.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CoralogixKeySpec {
    name: String,
    owner: CoralogixOwner,
    active: Option<bool>,
    #[serde(default)]
    presets: Vec<String>,
    #[serde(default)]
    permissions: Vec<String>,
    access_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CoralogixOwner {
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
        migrated.warnings.push("not an ApiKey of coralogix.com/v1alpha1: left out".to_owned());
        return migrated;
    }
    if name.is_empty() {
        migrated.warnings.push("metadata.name is missing: left out".to_owned());
        return migrated;
    }
    let namespace = metadata("namespace");
    let source: CoralogixKeySpec = match serde_json::from_value(document["spec"].clone()) {
        Ok(source) => source,
        Err(error) => {
            migrated.warnings.push(format!("spec: {error}: left out"));
            return migrated;
        }
    };
    let (presets, permissions) = names(&source, catalog, &mut migrated.warnings);
    if presets.is_empty() && permissions.is_empty() {
        migrated.warnings.push("it has no preset and no permission, and a key needs at least one: left out".to_owned());
        return migrated;
    }
    let key_type = match (&source.owner.user_id, source.owner.team_id) {
        (Some(user), None) => {
            migrated
                .warnings
                .push(format!("user {user:?} is a Coralogix id: replace it by the name of the user in the cluster"));
            KeyType::Personal
        }
        (None, Some(_)) if is_ingestion_only(&presets, &permissions, catalog) => KeyType::SendYourData,
        (None, Some(_)) => KeyType::Team,
        _ => {
            migrated.warnings.push("spec.owner must be a userId or a teamId: left out".to_owned());
            return migrated;
        }
    };
    let mut spec = ApiKeySpec {
        display_name: (!source.name.is_empty() && source.name != name).then(|| source.name.clone()),
        key_type,
        user: source.owner.user_id.clone(),
        presets,
        permissions,
        active: source.active.filter(|active| !active),
        access_policy_ref: None,
        legacy: None,
        expires_at: None,
        rotation: None,
        secret: None,
    };
    let policy = match policy_of(&source, key_type, &mut migrated.warnings) {
        Ok(policy) => policy,
        Err(error) => {
            // Without its policy, the key would be accessible to more users than before.
            let warning = format!("accessPolicy: {error}: the key is left out, because it must not lose its policy");
            migrated.warnings.push(warning);
            return migrated;
        }
    };
    if let Some(policy) = policy {
        let policy_name = format!("{name}-policy");
        let mut policy = AccessPolicy::new(&policy_name, policy);
        policy.metadata.namespace.clone_from(&namespace);
        migrated.policy = Some(policy);
        spec.access_policy_ref = Some(AccessPolicyRef { name: policy_name });
    }
    let mut key = ApiKey::new(&name, spec);
    key.metadata.namespace = namespace;
    migrated.key = Some(key);
    migrated
}

/// Translates the access policy of a key.
fn policy_of(
    source: &CoralogixKeySpec,
    key_type: KeyType,
    warnings: &mut Vec<String>,
) -> Result<Option<AccessPolicySpec>, coralogix::Untranslatable> {
    let Some(text) = source.access_policy.as_deref().filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    if key_type == KeyType::Personal {
        warnings.push("Personal keys have no access policy: accessPolicy is left out".to_owned());
        return Ok(None);
    }
    let policy = coralogix::import(text)?;
    if !policy.rules.is_empty() {
        let warning = "the groups of its access policy are Coralogix ids: replace them by groups of the cluster";
        warnings.push(warning.to_owned());
    }
    Ok(Some(policy))
}

/// Returns the presets and permissions of a key in the spelling of the catalog. Unknown names become warnings.
fn names(source: &CoralogixKeySpec, catalog: &Catalog, warnings: &mut Vec<String>) -> (Vec<String>, Vec<String>) {
    let (mut presets, mut permissions): (Vec<String>, Vec<String>) = Default::default();
    let mut unknown = |kind: &str, name: &str, near: &[&str]| {
        let hint = if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(" or ")) };
        warnings.push(format!("no catalog has a {kind} {name:?}: left out{hint}"));
    };
    for name in &source.presets {
        match catalog.preset(name) {
            Some(preset) if presets.iter().any(|known| **known == *preset.name) => {}
            Some(preset) => presets.push(preset.name.to_string()),
            None => unknown("preset", name, &catalog.presets_like(name)),
        }
    }
    for name in &source.permissions {
        match catalog.permission(name) {
            Some(permission) if permissions.iter().any(|known| **known == *permission.name) => {}
            Some(permission) => permissions.push(permission.name.to_string()),
            None => unknown("permission", name, &catalog.permissions_like(name)),
        }
    }
    (presets, permissions)
}

/// Whether all presets and permissions are for ingestion.
fn is_ingestion_only(presets: &[String], permissions: &[String], catalog: &Catalog) -> bool {
    let is_ingestion = |name: &str| catalog.permission(name).is_some_and(|permission| permission.ingestion);
    let preset_is_ingestion_only = |name: &String| {
        catalog.preset(name).is_some_and(|preset| {
            !preset.permissions.is_empty() && preset.permissions.iter().all(|name| is_ingestion(name))
        })
    };
    presets.iter().all(preset_is_ingestion_only) && permissions.iter().all(|name| is_ingestion(name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        api::{LegacyKind, LegacyRole},
        test_support::{catalog_spec as spec, permission, preset},
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

    fn migrate_coralogix(spec: &Value) -> Migrated {
        let document = json!({
            "apiVersion": "coralogix.com/v1alpha1", "kind": "ApiKey",
            "metadata": {"name": "sample", "namespace": "shop"}, "spec": spec,
        });
        from_coralogix(&document, 0, &catalog())
    }

    #[test]
    fn coralogix_samples_become_keys_of_the_matching_type() {
        let send = migrate_coralogix(&json!({"name": "x", "owner": {"teamId": 1_234_567}, "presets": ["SendData"]}));
        assert!(send.warnings.is_empty(), "{:?}", send.warnings);
        let key = send.key.unwrap();
        assert_eq!((key.spec.key_type, key.namespace().as_deref()), (KeyType::SendYourData, Some("shop")));
        assert_eq!((key.spec.display_name.as_deref(), key.spec.active), (Some("x"), None));

        let team = migrate_coralogix(&json!({
            "name": "team-key-sample", "owner": {"teamId": 4_013_254}, "active": false,
            "presets": ["apm"], "permissions": ["ALERTS-MAP:READ"],
            "accessPolicy": r#"{"version": "v2025-01-01", "rules": [], "default": {"permissions": {}}}"#,
        }));
        assert!(team.warnings.is_empty(), "{:?}", team.warnings);
        let spec = team.key.unwrap().spec;
        assert_eq!((spec.key_type, spec.active), (KeyType::Team, Some(false)));
        assert_eq!((spec.presets, spec.permissions), (vec!["APM".to_owned()], vec!["alerts-map:Read".to_owned()]));
        assert_eq!(spec.access_policy_ref.unwrap().name, team.policy.unwrap().name_any());

        let user = migrate_coralogix(&json!({"name": "u", "owner": {"userId": "aaaa"}, "presets": ["APM"]}));
        let spec = user.key.unwrap().spec;
        assert_eq!((spec.key_type, spec.user.as_deref()), (KeyType::Personal, Some("aaaa")));
        assert_eq!(user.warnings.len(), 1, "a warning that the user is a Coralogix id");
    }

    #[test]
    fn parts_without_an_equivalent_become_warnings() {
        let partial = migrate_coralogix(&json!({"name": "x", "owner": {"teamId": 1}, "presets": ["APN", "APM"]}));
        assert_eq!(partial.key.unwrap().spec.presets, ["APM"]);
        assert!(partial.warnings[0].contains("\"APN\": left out"), "{:?}", partial.warnings);
        for (spec, word) in [
            (json!({"name": "x", "owner": {"teamId": 1}, "presets": []}), "no preset and no permission"),
            (json!({"name": "x", "owner": {}, "presets": ["APM"]}), "spec.owner"),
            (json!({"name": "x", "owner": {"teamId": "one"}}), "spec:"),
            (json!({"name": "x", "owner": {"teamId": 1}, "presets": ["APM"], "accessPolicy": "{"}), "accessPolicy"),
        ] {
            let migrated = migrate_coralogix(&spec);
            assert!(migrated.key.is_none(), "{spec}");
            assert!(migrated.warnings.last().unwrap().contains(word), "{:?}", migrated.warnings);
        }
        assert_eq!(from_coralogix(&json!({"kind": "Secret"}), 2, &catalog()).name, "document 3");
    }

    #[test]
    fn a_legacy_key_becomes_the_preset_with_the_same_permissions_or_else_these_permissions() {
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
