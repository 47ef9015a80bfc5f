//! The presets and permissions of a key, and the rights that a user needs for them.

use std::{collections::BTreeSet, fmt, sync::Arc};

use crate::{
    api::{ApiKeySpec, ApiKeyStatus},
    domain::{
        catalog::Catalog,
        rights::{Need, Right},
    },
};

/// The names of presets and permissions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    presets: BTreeSet<Arc<str>>,
    permissions: BTreeSet<Arc<str>>,
}

/// The first names and the number of the others.
impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_NAMES: usize = 3;
        let names = self.presets.iter().map(|name| ("preset", name));
        let names = names.chain(self.permissions.iter().map(|name| ("permission", name)));
        for (number, (kind, name)) in names.take(MAX_NAMES).enumerate() {
            write!(f, "{}{kind} {name}", if number > 0 { ", " } else { "" })?;
        }
        match (self.presets.len() + self.permissions.len()).saturating_sub(MAX_NAMES) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Contents {
    /// The contents of a spec. Names that no catalog defines are kept, since a catalog may define them later.
    #[must_use]
    pub fn of_spec(spec: &ApiKeySpec, catalog: &Catalog) -> Self {
        let mut contents = Self::of_names(&spec.presets, &spec.permissions, catalog);
        if let Some(kind) = spec.legacy {
            contents.permissions.extend(catalog.legacy(kind).iter().cloned());
        }
        contents
    }

    /// The contents of a key: those in force by its status, and those of its spec, which the operator is about to put
    /// in force.
    #[must_use]
    pub fn in_force(spec: &ApiKeySpec, status: Option<&ApiKeyStatus>, catalog: &Catalog) -> Self {
        let mut contents = Self::of_spec(spec, catalog);
        if let Some(status) = status {
            let in_force = Self::of_names(&status.presets, &status.permissions, catalog);
            contents.presets.extend(in_force.presets);
            contents.permissions.extend(in_force.permissions);
        }
        contents
    }

    fn of_names(presets: &[String], permissions: &[String], catalog: &Catalog) -> Self {
        let preset = |name: &String| catalog.preset(name).map_or_else(|| name.as_str().into(), |p| Arc::clone(&p.name));
        let permission =
            |name: &String| catalog.permission(name).map_or_else(|| name.as_str().into(), |p| Arc::clone(&p.name));
        Self {
            presets: presets.iter().map(preset).collect(),
            permissions: permissions.iter().map(permission).collect(),
        }
    }

    /// All permissions, including those of the presets.
    #[must_use]
    pub fn effective(&self, catalog: &Catalog) -> BTreeSet<Arc<str>> {
        let of_presets = self.presets.iter().filter_map(|name| catalog.preset(name)).flat_map(|p| &p.permissions);
        self.permissions.iter().chain(of_presets).cloned().collect()
    }

    /// The contents that `old` lacks. A permission that a preset of `old` grants is not new. A new preset always
    /// counts, since its permissions may grow.
    #[must_use]
    pub fn beyond(&self, old: &Self, catalog: &Catalog) -> Self {
        let before = old.effective(catalog);
        Self {
            presets: self.presets.difference(&old.presets).cloned().collect(),
            permissions: self.permissions.difference(&before).cloned().collect(),
        }
    }

    /// Whether there are no presets and no permissions.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.presets.is_empty() && self.permissions.is_empty()
    }

    /// The rights that a user needs for these contents. The right to a preset, or to every permission, is one review;
    /// only users without it are reviewed for each permission.
    #[must_use]
    pub fn need(&self, catalog: &Catalog) -> Need {
        let mut needs: Vec<_> = self.presets.iter().map(|name| Self::need_of_preset(name, catalog)).collect();
        if !self.permissions.is_empty() {
            needs.push(Self::need_of_permissions(&self.permissions));
        }
        Need::All(needs)
    }

    fn need_of_preset(name: &Arc<str>, catalog: &Catalog) -> Need {
        let whole = Need::Right(Right::Preset(Arc::clone(name)));
        match catalog.preset(name) {
            // Without this guard, every user would meet the empty list. Later permissions of the preset are not known.
            Some(preset) if !preset.permissions.is_empty() => {
                let each = preset.permissions.iter().map(|p| Need::Right(Right::Permission(Arc::clone(p)))).collect();
                Need::Any(vec![whole, Need::All(each)])
            }
            _ => whole,
        }
    }

    fn need_of_permissions(names: &BTreeSet<Arc<str>>) -> Need {
        let each: Vec<_> = names.iter().map(|name| Need::Right(Right::Permission(Arc::clone(name)))).collect();
        match each.len() {
            1 => Need::All(each),
            _ => Need::Any(vec![Need::Right(Right::EveryPermission), Need::All(each)]),
        }
    }
}
