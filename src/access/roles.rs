//! The ClusterRoles for the roles and presets of a catalog, so that users get their rights by ordinary bindings.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::rbac::v1::{ClusterRole, PolicyRule},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::VERB;
use crate::api::{CatalogPreset, CatalogRole, Evidence, GROUP, PermissionCatalogSpec};

/// The annotation with the evidence for the rights of a ClusterRole, which marks inferred rights.
const EVIDENCE: &str = "keywright.dev/evidence";

/// Returns the ClusterRoles of a catalog: `role-NAME` and `preset-NAME`, in the order of the catalog.
#[must_use]
pub fn cluster_roles(catalog: &PermissionCatalogSpec) -> Vec<ClusterRole> {
    catalog.roles.iter().map(of_role).chain(catalog.presets.iter().map(of_preset)).collect()
}

fn of_role(role: &CatalogRole) -> ClusterRole {
    let (documented, inferred) = (&role.documented_permissions, &role.inferred_permissions);
    let evidence = format!("{} permissions documented, {} inferred", documented.len(), inferred.len());
    build(
        format!("role-{}", slug(&role.name)),
        &evidence,
        [rule("permissions", documented), rule("permissions", inferred)],
    )
}

/// Returns the ClusterRole of a preset: the right to put it into keys, each of its permissions, and its
/// `peoplePermissions`.
fn of_preset(preset: &CatalogPreset) -> ClusterRole {
    let permissions: Vec<_> = preset.permissions.iter().chain(&preset.people_permissions).cloned().collect();
    let evidence = match preset.evidence {
        Some(Evidence::Documented) => "documented".to_owned(),
        Some(Evidence::Mixed) => format!("partly inferred: {}", preset.inferred.join(", ")),
        Some(Evidence::Inferred) => "inferred".to_owned(),
        Some(Evidence::Unknown) | None => "unknown".to_owned(),
    };
    let name = format!("preset-{}", slug(&preset.name));
    build(name, &evidence, [rule("presets", std::slice::from_ref(&preset.name)), rule("permissions", &permissions)])
}

fn build<const N: usize>(name: String, evidence: &str, rules: [PolicyRule; N]) -> ClusterRole {
    // An RBAC rule without resource names grants every name.
    let has_names = |rule: &PolicyRule| rule.resource_names.as_ref().is_some_and(|names| !names.is_empty());
    ClusterRole {
        metadata: ObjectMeta {
            name: Some(name),
            annotations: Some(BTreeMap::from([(EVIDENCE.to_owned(), evidence.to_owned())])),
            ..ObjectMeta::default()
        },
        rules: Some(rules.into_iter().filter(has_names).collect()),
        ..ClusterRole::default()
    }
}

fn rule(resource: &str, names: &[String]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![GROUP.to_owned()]),
        resources: Some(vec![resource.to_owned()]),
        resource_names: Some(names.to_vec()),
        verbs: vec![VERB.to_owned()],
        ..PolicyRule::default()
    }
}

/// Returns the name in lower case with hyphens: `Platform Admin` becomes `platform-admin`.
fn slug(name: &str) -> String {
    name.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{catalog_spec as spec, preset};

    #[test]
    fn rules_without_resource_names_are_left_out() {
        let mut catalog = spec(vec![], vec![preset("Olly", false, &[]), preset("Alerts", false, &["alerts:Read"])]);
        catalog.roles.push(CatalogRole {
            name: "Read Only".to_owned(),
            description: None,
            evidence: None,
            documented_permissions: vec![],
            inferred_permissions: vec!["alerts:Read".to_owned()],
        });
        let roles = cluster_roles(&catalog);
        let names: Vec<_> = roles.iter().filter_map(|role| role.metadata.name.as_deref()).collect();
        assert_eq!(names, ["role-read-only", "preset-olly", "preset-alerts"]);
        for rule in roles.iter().flat_map(|role| role.rules.iter().flatten()) {
            assert!(rule.resource_names.as_ref().is_some_and(|names| !names.is_empty()), "{rule:?}");
        }
        assert_eq!(roles[2].rules.as_ref().map(Vec::len), Some(2));
    }
}
