//! The catalogue: which permissions and presets exist, merged from every PermissionCatalog of the cluster.
//!
//! Names compare without regard to case and are shown in the spelling of the catalogue. Where two catalogues
//! contradict each other, the older one holds, so that adding a catalogue never changes what existing keys may do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::api::{Evidence, LegacyKind, PermissionCatalogSpec};

/// One permission as keys see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The canonical spelling.
    pub name: Arc<str>,
    /// Whether it only sends data.
    pub ingestion: bool,
    catalog: usize,
}

/// One preset as keys see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The canonical spelling.
    pub name: Arc<str>,
    /// Whether a key that has it may have nothing else.
    pub standalone: bool,
    /// What it grants, in canonical spelling, without names that no catalogue knows.
    pub permissions: Vec<Arc<str>>,
    /// How well its permissions are known.
    pub evidence: Option<Evidence>,
    catalog: usize,
}

/// What became of one PermissionCatalog in the merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many of its permissions are in force.
    pub permissions: usize,
    /// How many of its presets are in force.
    pub presets: usize,
    /// Entries without effect, since an older catalogue says otherwise: one sentence each.
    pub conflicts: Vec<String>,
    /// Entries without effect, since they are wrong in themselves: one sentence each.
    pub invalid: Vec<String>,
}

/// The merged catalogue.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    permissions: HashMap<String, Permission>,
    presets: HashMap<String, Preset>,
    legacy: BTreeMap<LegacyKind, Vec<Arc<str>>>,
}

impl Catalog {
    /// Merges catalogues, oldest first, and says what became of each. The result does not depend on anything else
    /// than the order given here: presets may name permissions of any catalogue.
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
                    "permission {}: ingestion is {} in catalogue {}",
                    known.name, known.ingestion, sources[known.catalog].0
                )),
                // The same thing said twice is no contradiction.
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
                    None => report.invalid.push(format!("preset {}: no catalogue has permission {name}", entry.name)),
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
                    "preset {}: standalone is {} in catalogue {}",
                    known.name, known.standalone, sources[known.catalog].0
                )),
                Some(known) if known.permissions != fresh.permissions => report.conflicts.push(format!(
                    "preset {}: catalogue {} gives it other permissions",
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
                        report.invalid.push(format!("legacy role {}: no catalogue has permission {name}", entry.name));
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
                    report
                        .conflicts
                        .push(format!("legacy role {}: {kind:?} keys have other permissions already", entry.name));
                }
                Some(_) => {}
            }
        }
    }

    /// What a legacy key of a kind may do. Nothing, if no catalogue says.
    #[must_use]
    pub fn legacy(&self, kind: LegacyKind) -> &[Arc<str>] {
        self.legacy.get(&kind).map_or(&[], Vec::as_slice)
    }

    /// The preset that grants exactly these permissions, if there is one that may stand among others.
    #[must_use]
    pub fn preset_of(&self, permissions: &BTreeSet<Arc<str>>) -> Option<&str> {
        let same = |preset: &&Preset| {
            !preset.standalone
                && preset.permissions.len() == permissions.len()
                && preset.permissions.iter().all(|name| permissions.contains(name))
        };
        // By name, so that the answer is always the same.
        self.presets.values().filter(same).map(|preset| &*preset.name).min()
    }

    /// Whether there is nothing in it, which means that no PermissionCatalog is installed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.permissions.is_empty() && self.presets.is_empty()
    }

    /// Every permission, in no order.
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

    /// The presets whose names are nearest to a name that does not exist, best first, at most three.
    #[must_use]
    pub fn presets_like(&self, name: &str) -> Vec<&str> {
        nearest(name, self.presets.values().map(|p| &*p.name))
    }

    /// The permissions whose names are nearest to a name that does not exist, best first, at most three.
    #[must_use]
    pub fn permissions_like(&self, name: &str) -> Vec<&str> {
        nearest(name, self.permissions.values().map(|p| &*p.name))
    }
}

/// The form in which names are compared. Catalogue names are ASCII, so this is all that case folding needs.
fn fold(name: &str) -> String {
    name.to_ascii_lowercase()
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    const ENOUGH: f64 = 0.84;
    let name = fold(name);
    let mut scored: Vec<(f64, &str)> = known
        .map(|candidate| (strsim::jaro_winkler(&name, &fold(candidate)), candidate))
        .filter(|(score, _)| *score >= ENOUGH)
        .collect();
    scored.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| x.cmp(y)));
    scored.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::{CatalogPermission, CatalogPreset};

    pub(crate) fn permission(name: &str, ingestion: bool) -> CatalogPermission {
        CatalogPermission {
            name: name.to_owned(),
            ingestion: ingestion.then_some(true),
            description: None,
            group: None,
            id: None,
            hidden: None,
            levels: vec![],
            roles_evidence: None,
            sources: vec![],
        }
    }

    pub(crate) fn preset(name: &str, standalone: bool, permissions: &[&str]) -> CatalogPreset {
        CatalogPreset {
            name: name.to_owned(),
            standalone: standalone.then_some(true),
            permissions: permissions.iter().map(|p| (*p).to_owned()).collect(),
            description: None,
            evidence: None,
            completeness: None,
            inferred: vec![],
            uncertain: vec![],
            people_permissions: vec![],
            note: None,
            sources: vec![],
        }
    }

    pub(crate) fn spec(permissions: Vec<CatalogPermission>, presets: Vec<CatalogPreset>) -> PermissionCatalogSpec {
        PermissionCatalogSpec { permissions, presets, ..Default::default() }
    }

    #[test]
    fn names_compare_without_case_and_keep_the_catalogues_spelling() {
        let a = spec(vec![permission("alerts-map:Read", false)], vec![preset("Alerts", false, &["ALERTS-MAP:READ"])]);
        let (catalog, reports) = Catalog::merge([("a", &a)]);
        assert_eq!(&*catalog.permission("ALERTS-MAP:READ").unwrap().name, "alerts-map:Read");
        let alerts = catalog.preset("alerts").unwrap();
        assert_eq!((&*alerts.name, &*alerts.permissions[0]), ("Alerts", "alerts-map:Read"));
        assert_eq!(reports["a"], Report { permissions: 1, presets: 1, ..Default::default() });
    }

    #[test]
    fn a_contradiction_changes_nothing_and_is_the_younger_ones_fault() {
        let old =
            spec(vec![permission("a:Read", false), permission("b:Send", true)], vec![preset("P", false, &["a:Read"])]);
        let young = spec(
            vec![permission("A:READ", true), permission("c:Read", false)],
            vec![preset("p", false, &["a:Read", "c:Read"]), preset("Q", true, &["b:Send"])],
        );
        let (catalog, reports) = Catalog::merge([("old", &old), ("young", &young)]);
        assert!(!catalog.permission("a:Read").unwrap().ingestion);
        assert_eq!(catalog.preset("P").unwrap().permissions.len(), 1);
        assert!(catalog.preset("q").unwrap().standalone, "what does not contradict is in force");
        assert!(reports["old"].conflicts.is_empty());
        assert_eq!(
            reports["young"].conflicts,
            [
                "permission a:Read: ingestion is false in catalogue old",
                "preset P: catalogue old gives it other permissions"
            ]
        );
        assert_eq!((reports["young"].permissions, reports["young"].presets), (1, 1));
    }

    #[test]
    fn a_preset_may_name_permissions_of_a_younger_catalogue() {
        let presets = spec(vec![], vec![preset("P", false, &["x:Read"])]);
        let permissions = spec(vec![permission("x:Read", false)], vec![]);
        let (catalog, reports) = Catalog::merge([("presets", &presets), ("permissions", &permissions)]);
        assert_eq!(catalog.preset("P").unwrap().permissions.len(), 1);
        assert!(reports["presets"].invalid.is_empty());
        let (catalog, reports) = Catalog::merge([("presets", &presets)]);
        assert!(catalog.preset("P").unwrap().permissions.is_empty());
        assert_eq!(reports["presets"].invalid, ["preset P: no catalogue has permission x:Read"]);
    }

    #[test]
    fn repeating_a_definition_is_no_contradiction_but_listing_twice_is_an_error() {
        let a = spec(vec![permission("x:Read", false)], vec![preset("P", false, &["x:Read"])]);
        let (_, reports) = Catalog::merge([("a", &a), ("b", &a.clone())]);
        assert_eq!(reports["b"], Report { permissions: 1, presets: 1, ..Default::default() });
        let twice = spec(vec![permission("x:Read", false), permission("X:read", false)], vec![]);
        let (_, reports) = Catalog::merge([("twice", &twice)]);
        assert_eq!(reports["twice"].invalid, ["permission X:read is listed twice"]);
    }

    #[test]
    fn suggestions_are_near_few_and_in_a_fixed_order() {
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
