//! The permissions and presets that exist, merged from every PermissionCatalog of the cluster.
//!
//! Names compare without regard to case and are shown in the spelling of the catalog. Where two catalogs conflict,
//! the older one applies, so that a new catalog never changes the permissions of existing keys.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::api::{Evidence, LegacyKind, PermissionCatalogSpec};

/// A permission of the merged catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The canonical spelling.
    pub name: Arc<str>,
    /// Whether the permission only sends data.
    pub ingestion: bool,
    catalog: usize,
}

/// A preset of the merged catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The canonical spelling.
    pub name: Arc<str>,
    /// Whether a key that has it may have nothing else.
    pub standalone: bool,
    /// The permissions that it grants, in canonical spelling, without names that are in no catalog.
    pub permissions: Vec<Arc<str>>,
    /// The evidence for its list of permissions.
    pub evidence: Option<Evidence>,
    catalog: usize,
}

/// The result of the merge for one PermissionCatalog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The number of its permissions that are in force.
    pub permissions: usize,
    /// The number of its presets that are in force.
    pub presets: usize,
    /// Entries without effect because an older catalog differs, one sentence each.
    pub conflicts: Vec<String>,
    /// Entries without effect because they are invalid, one sentence each.
    pub invalid: Vec<String>,
}

/// The merged catalog.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    permissions: HashMap<String, Permission>,
    presets: HashMap<String, Preset>,
    legacy: BTreeMap<LegacyKind, Vec<Arc<str>>>,
}

impl Catalog {
    /// Merges catalogs, oldest first, and returns a report for each. The result depends only on the catalogs and their
    /// order. A preset may name permissions of any catalog.
    pub fn merge<'a>(
        oldest_first: impl IntoIterator<Item = (&'a str, &'a PermissionCatalogSpec)>,
    ) -> (Self, BTreeMap<String, Report>) {
        let sources: Vec<_> = oldest_first.into_iter().collect();
        let mut reports = vec![Report::default(); sources.len()];
        let mut merged = Self::default();
        for (index, (_, spec)) in sources.iter().enumerate() {
            merged.add_permissions(index, spec, &sources, &mut reports[index]);
        }
        for (index, (_, spec)) in sources.iter().enumerate() {
            merged.add_presets(index, spec, &sources, &mut reports[index]);
        }
        for (index, (_, spec)) in sources.iter().enumerate() {
            merged.add_legacy_roles(spec, &mut reports[index]);
        }
        (merged, sources.iter().map(|(name, _)| (*name).to_owned()).zip(reports).collect())
    }

    fn add_permissions(
        &mut self,
        index: usize,
        spec: &PermissionCatalogSpec,
        sources: &[(&str, &PermissionCatalogSpec)],
        report: &mut Report,
    ) {
        for entry in &spec.permissions {
            let ingestion = entry.ingestion.unwrap_or(false);
            let fresh = Permission { name: entry.name.as_str().into(), ingestion, catalog: index };
            match self.permissions.get(&fold(&entry.name)) {
                None => {
                    self.permissions.insert(fold(&entry.name), fresh);
                    report.permissions += 1;
                }
                Some(known) if known.catalog == index => {
                    report.invalid.push(format!("permission {} is listed twice", entry.name));
                }
                Some(known) if known.ingestion != ingestion => report.conflicts.push(format!(
                    "permission {}: ingestion is {} in catalog {}",
                    known.name, known.ingestion, sources[known.catalog].0
                )),
                // The same definition in two catalogs is not a conflict.
                Some(_) => report.permissions += 1,
            }
        }
    }

    fn add_presets(
        &mut self,
        index: usize,
        spec: &PermissionCatalogSpec,
        sources: &[(&str, &PermissionCatalogSpec)],
        report: &mut Report,
    ) {
        for entry in &spec.presets {
            let mut permissions = Vec::with_capacity(entry.permissions.len());
            for name in &entry.permissions {
                match self.permission(name) {
                    Some(known) => permissions.push(Arc::clone(&known.name)),
                    None => report.invalid.push(format!("preset {}: no catalog has permission {name}", entry.name)),
                }
            }
            permissions.sort_unstable();
            permissions.dedup();
            let fresh = Preset {
                name: entry.name.as_str().into(),
                standalone: entry.standalone.unwrap_or(false),
                permissions,
                evidence: entry.evidence,
                catalog: index,
            };
            match self.presets.get(&fold(&entry.name)) {
                None => {
                    self.presets.insert(fold(&entry.name), fresh);
                    report.presets += 1;
                }
                Some(known) if known.catalog == index => {
                    report.invalid.push(format!("preset {} is listed twice", entry.name));
                }
                Some(known) if known.standalone != fresh.standalone => report.conflicts.push(format!(
                    "preset {}: standalone is {} in catalog {}",
                    known.name, known.standalone, sources[known.catalog].0
                )),
                Some(known) if known.permissions != fresh.permissions => report.conflicts.push(format!(
                    "preset {}: catalog {} gives it other permissions",
                    known.name, sources[known.catalog].0
                )),
                Some(_) => report.presets += 1,
            }
        }
    }

    fn add_legacy_roles(&mut self, spec: &PermissionCatalogSpec, report: &mut Report) {
        for entry in &spec.legacy_roles {
            let Some(kind) = entry.legacy_kind else { continue };
            let mut permissions = Vec::with_capacity(entry.permissions.len());
            for name in &entry.permissions {
                match self.permission(name) {
                    Some(known) => permissions.push(Arc::clone(&known.name)),
                    None => {
                        report.invalid.push(format!("legacy role {}: no catalog has permission {name}", entry.name));
                    }
                }
            }
            permissions.sort_unstable();
            permissions.dedup();
            match self.legacy.get(&kind) {
                None => {
                    self.legacy.insert(kind, permissions);
                }
                Some(known) if *known != permissions => {
                    report.conflicts.push(format!(
                        "legacy role {}: an earlier entry gives {kind:?} keys other permissions",
                        entry.name
                    ));
                }
                Some(_) => {}
            }
        }
    }

    /// The permissions of legacy keys of a kind. Empty if no catalog lists the kind.
    #[must_use]
    pub fn legacy(&self, kind: LegacyKind) -> &[Arc<str>] {
        self.legacy.get(&kind).map_or(&[], Vec::as_slice)
    }

    /// The preset that grants exactly these permissions and is not standalone.
    #[must_use]
    pub fn preset_of(&self, permissions: &BTreeSet<Arc<str>>) -> Option<&str> {
        let same = |preset: &&Preset| {
            !preset.standalone
                && preset.permissions.len() == permissions.len()
                && preset.permissions.iter().all(|name| permissions.contains(name))
        };
        // The first by name, so that the result is deterministic.
        self.presets.values().filter(same).map(|preset| &*preset.name).min()
    }

    /// Whether the catalog is empty, which means that no PermissionCatalog is installed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.permissions.is_empty() && self.presets.is_empty()
    }

    /// Every permission, in no particular order.
    pub fn permissions(&self) -> impl Iterator<Item = &Permission> {
        self.permissions.values()
    }

    /// Finds a permission by name, in any case.
    #[must_use]
    pub fn permission(&self, name: &str) -> Option<&Permission> {
        self.permissions.get(&fold(name))
    }

    /// Finds a preset by name, in any case.
    #[must_use]
    pub fn preset(&self, name: &str) -> Option<&Preset> {
        self.presets.get(&fold(name))
    }

    /// The presets whose names are most similar to an unknown name, best first, at most three.
    #[must_use]
    pub fn presets_like(&self, name: &str) -> Vec<&str> {
        nearest(name, self.presets.values().map(|p| &*p.name))
    }

    /// The permissions whose names are most similar to an unknown name, best first, at most three.
    #[must_use]
    pub fn permissions_like(&self, name: &str) -> Vec<&str> {
        nearest(name, self.permissions.values().map(|p| &*p.name))
    }
}

/// The form in which names are compared. The CRD admits only ASCII names.
fn fold(name: &str) -> String {
    name.to_ascii_lowercase()
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    const MIN_SIMILARITY: f64 = 0.84;
    let name = fold(name);
    let mut scored: Vec<(f64, &str)> = known
        .map(|candidate| (strsim::jaro_winkler(&name, &fold(candidate)), candidate))
        .filter(|(score, _)| *score >= MIN_SIMILARITY)
        .collect();
    scored.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| x.cmp(y)));
    scored.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::test_support::{catalog_spec as spec, permission, preset};

    #[test]
    fn names_compare_without_case_and_keep_the_spelling_of_the_catalog() {
        let a = spec(vec![permission("alerts-map:Read", false)], vec![preset("Alerts", false, &["ALERTS-MAP:READ"])]);
        let (catalog, reports) = Catalog::merge([("a", &a)]);
        assert_eq!(&*catalog.permission("ALERTS-MAP:READ").unwrap().name, "alerts-map:Read");
        let alerts = catalog.preset("alerts").unwrap();
        assert_eq!((&*alerts.name, &*alerts.permissions[0]), ("Alerts", "alerts-map:Read"));
        assert_eq!(reports["a"], Report { permissions: 1, presets: 1, ..Default::default() });
    }

    #[test]
    fn a_conflicting_entry_has_no_effect_and_is_reported_for_the_younger_catalog() {
        let old =
            spec(vec![permission("a:Read", false), permission("b:Send", true)], vec![preset("P", false, &["a:Read"])]);
        let young = spec(
            vec![permission("A:READ", true), permission("c:Read", false)],
            vec![preset("p", false, &["a:Read", "c:Read"]), preset("Q", true, &["b:Send"])],
        );
        let (catalog, reports) = Catalog::merge([("old", &old), ("young", &young)]);
        assert!(!catalog.permission("a:Read").unwrap().ingestion);
        assert_eq!(catalog.preset("P").unwrap().permissions.len(), 1);
        assert!(catalog.preset("q").unwrap().standalone, "an entry without a conflict is in force");
        assert!(reports["old"].conflicts.is_empty());
        assert_eq!(
            reports["young"].conflicts,
            [
                "permission a:Read: ingestion is false in catalog old",
                "preset P: catalog old gives it other permissions"
            ]
        );
        assert_eq!((reports["young"].permissions, reports["young"].presets), (1, 1));
    }

    #[test]
    fn a_preset_may_name_permissions_of_a_younger_catalog() {
        let presets = spec(vec![], vec![preset("P", false, &["x:Read"])]);
        let permissions = spec(vec![permission("x:Read", false)], vec![]);
        let (catalog, reports) = Catalog::merge([("presets", &presets), ("permissions", &permissions)]);
        assert_eq!(catalog.preset("P").unwrap().permissions.len(), 1);
        assert!(reports["presets"].invalid.is_empty());
        let (catalog, reports) = Catalog::merge([("presets", &presets)]);
        assert!(catalog.preset("P").unwrap().permissions.is_empty());
        assert_eq!(reports["presets"].invalid, ["preset P: no catalog has permission x:Read"]);
    }

    #[test]
    fn the_same_definition_in_two_catalogs_is_in_force_and_twice_in_one_catalog_is_invalid() {
        let a = spec(vec![permission("x:Read", false)], vec![preset("P", false, &["x:Read"])]);
        let (_, reports) = Catalog::merge([("a", &a), ("b", &a.clone())]);
        assert_eq!(reports["b"], Report { permissions: 1, presets: 1, ..Default::default() });
        let twice = spec(vec![permission("x:Read", false), permission("X:read", false)], vec![]);
        let (_, reports) = Catalog::merge([("twice", &twice)]);
        assert_eq!(reports["twice"].invalid, ["permission X:read is listed twice"]);
    }

    #[test]
    fn suggestions_are_similar_at_most_three_and_best_first() {
        let names = ["Alerts", "APM", "Dashboards", "DataUsage", "DataSetup", "DataQuerying", "DataMap"];
        let a = spec(vec![], names.iter().map(|n| preset(n, false, &[])).collect());
        let (catalog, _) = Catalog::merge([("a", &a)]);
        assert_eq!(catalog.presets_like("Alrets"), ["Alerts"]);
        assert_eq!(catalog.presets_like("dashboard"), ["Dashboards"]);
        assert_eq!(catalog.presets_like("DataQuery")[0], "DataQuerying");
        assert!(catalog.presets_like("xyzzy").is_empty());
        assert!(catalog.presets_like("Data").len() <= 3);
    }
}
