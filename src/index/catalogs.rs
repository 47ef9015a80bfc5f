//! The PermissionCatalogs and the merged catalog.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kube::{ResourceExt, runtime::watcher::Event};

use crate::{
    api::PermissionCatalog,
    domain::catalog::{Catalog, Report},
};

/// Every PermissionCatalog, and the result of their merge.
#[derive(Debug, Default)]
pub struct Catalogs {
    known: BTreeMap<String, Arc<PermissionCatalog>>,
    merged: Arc<Catalog>,
    reports: BTreeMap<String, Report>,
    relisted: Option<BTreeSet<String>>,
    synced: bool,
}

impl Catalogs {
    /// Returns the merged catalog. The call only increments a reference count.
    #[must_use]
    pub fn merged(&self) -> Arc<Catalog> {
        Arc::clone(&self.merged)
    }

    /// Returns every PermissionCatalog with its report of the merge.
    #[must_use]
    pub fn all(&self) -> Vec<(Arc<PermissionCatalog>, Report)> {
        let report = |name| self.reports.get(name).cloned().unwrap_or_default();
        self.known.iter().map(|(name, catalog)| (Arc::clone(catalog), report(name))).collect()
    }

    /// Whether they were listed completely at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Applies a watch event. Returns whether the merged catalog may have changed.
    pub fn apply(&mut self, event: &Event<PermissionCatalog>) -> bool {
        match event {
            Event::Init => {
                self.relisted = Some(BTreeSet::new());
                return false;
            }
            Event::InitApply(catalog) => {
                if let Some(names) = &mut self.relisted {
                    names.insert(catalog.name_any());
                }
                self.known.insert(catalog.name_any(), Arc::new(catalog.clone()));
                return false;
            }
            Event::InitDone => {
                if let Some(names) = self.relisted.take() {
                    self.known.retain(|name, _| names.contains(name));
                }
                self.synced = true;
            }
            Event::Apply(catalog) => {
                let before = self.known.insert(catalog.name_any(), Arc::new(catalog.clone()));
                // A change of the status does not affect the merge.
                if before.is_some_and(|b| b.spec == catalog.spec && b.uid() == catalog.uid()) {
                    return false;
                }
            }
            Event::Delete(catalog) => {
                self.known.remove(&catalog.name_any());
            }
        }
        let mut oldest_first: Vec<_> = self.known.iter().collect();
        oldest_first.sort_by_key(|(name, c)| (c.creation_timestamp().map(|t| t.0), *name));
        let (merged, reports) = Catalog::merge(oldest_first.into_iter().map(|(name, c)| (name.as_str(), &c.spec)));
        self.merged = Arc::new(merged);
        self.reports = reports;
        true
    }
}
