//! The rights that RBAC grants to users, and the rights that a request needs.
//!
//! Each permission of the catalog is a right on a virtual resource, as `signers` are for certificates: verb `use`,
//! group `keywright.dev`, resource `permissions`, resourceName the permission, in the team's namespace. Presets are
//! rights on resource `presets`. A [`Need`] is only data; [`crate::access`] asks the cluster.

use std::{fmt, sync::Arc};

use crate::api::{KeyType, LegacyKind};

/// A right that a SubjectAccessReview can check.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Right {
    /// `use` of one permission.
    Permission(Arc<str>),
    /// `use` of every permission.
    EveryPermission,
    /// `use` of one preset, and so of its permissions.
    Preset(Arc<str>),
    /// To impersonate a user.
    Impersonate(Arc<str>),
    /// To read a Secret.
    ReadSecret(Arc<str>),
    /// To restore ApiKeys from a backup: verb `restore` on `apikeys`. It keeps the creators of restored objects and
    /// accepts the values of Secrets that the operator can't authenticate.
    Restore,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permission(name) => write!(f, "permission {name}"),
            Self::EveryPermission => f.write_str("every permission"),
            Self::Preset(name) => write!(f, "preset {name}"),
            Self::Impersonate(user) => write!(f, "impersonate {user}"),
            Self::ReadSecret(name) => write!(f, "get Secret {name}"),
            Self::Restore => f.write_str("restore apikeys.keywright.dev"),
        }
    }
}

/// The rights that a request needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// One right.
    Right(Right),
    /// All of these, checked concurrently.
    All(Vec<Self>),
    /// One of these. Each is checked only if the previous ones are lacking, so the most common one comes first.
    Any(Vec<Self>),
}

impl Need {
    /// No right.
    pub const NOTHING: Self = Self::All(Vec::new());

    /// The right to use one permission.
    #[must_use]
    pub fn permission(name: &str) -> Self {
        Self::Right(Right::Permission(name.into()))
    }

    /// Whether a user meets the need. `has` returns whether the user has a right.
    pub fn is_met(&self, has: &mut impl FnMut(&Right) -> bool) -> bool {
        match self {
            Self::Right(right) => has(right),
            Self::All(needs) => needs.iter().all(|need| need.is_met(has)),
            Self::Any(needs) => needs.iter().any(|need| need.is_met(has)),
        }
    }

    /// The rights that a user lacks. Of alternatives, those of the first, or of the last if the first is
    /// [`Right::EveryPermission`].
    pub fn missing(&self, has: &mut impl FnMut(&Right) -> bool) -> Vec<Right> {
        match self {
            Self::Right(right) if has(right) => vec![],
            Self::Right(right) => vec![right.clone()],
            Self::All(needs) => needs.iter().flat_map(|need| need.missing(has)).collect(),
            Self::Any(_) if self.is_met(has) => vec![],
            Self::Any(needs) => {
                let last = needs.last().map(|need| need.missing(has)).unwrap_or_default();
                let first = needs.first().map(|need| need.missing(has)).unwrap_or_default();
                // "preset Alerts" is a better message than its fourteen permissions; a list of permissions is a better
                // message than "every permission".
                if first == [Right::EveryPermission] { last } else { first }
            }
        }
    }
}

/// The permission to create, change and delete keys of a type (docs/specification.md, "Permissions"). For legacy keys,
/// a permission for their kind.
#[must_use]
pub const fn manage(key_type: KeyType, legacy: Option<LegacyKind>) -> &'static str {
    match (legacy, key_type) {
        (Some(LegacyKind::LogsQuery), _) => "user-legacy-logs-query-api-keys:Manage",
        (Some(LegacyKind::AlertsRulesTags | LegacyKind::Team), _) => "user-legacy-other-api-keys:Manage",
        (_, KeyType::Personal) => "personal-custom-api-keys:Manage",
        (_, KeyType::SendYourData) => "data-ingest-api-keys:Manage",
        (_, KeyType::Team) => "team-custom-api-keys:Manage",
    }
}

/// The permission to view keys of a type (docs/specification.md, "Permissions").
#[must_use]
pub const fn view(key_type: KeyType, legacy: Option<LegacyKind>) -> &'static str {
    match (legacy, key_type) {
        (Some(LegacyKind::LogsQuery), _) => "user-legacy-logs-query-api-keys:ReadConfig",
        (Some(LegacyKind::AlertsRulesTags | LegacyKind::Team), _) => "user-legacy-other-api-keys:ReadConfig",
        (_, KeyType::Personal) => "personal-custom-api-keys:ReadConfig",
        (_, KeyType::SendYourData) => "data-ingest-api-keys:ReadConfig",
        (_, KeyType::Team) => "team-custom-api-keys:ReadConfig",
    }
}

/// The permission to change every access policy, whatever its rules are (docs/specification.md, "Permissions"). It
/// allows the repair of a policy that locks out all groups.
pub const UPDATE_ALL_POLICIES: &str = "access-policies:UpdateAll";

/// The permission to change the security settings (docs/specification.md, "Security settings").
pub const MANAGE_SETTINGS: &str = "team-api-keys-security-settings:Manage";

/// The permissions to change the access policy of keys of a type; one of them is enough. For Team keys, sources of the
/// modeled system disagree on the name, so both names count (docs/specification.md, "Permissions").
#[must_use]
pub const fn update_policy(key_type: KeyType) -> &'static [&'static str] {
    match key_type {
        KeyType::Team => {
            &["data-ingest-api-keys:UpdateAccessPolicy", "team-custom-api-keys:UpdateAccessPolicy", UPDATE_ALL_POLICIES]
        }
        KeyType::SendYourData | KeyType::Personal => &["data-ingest-api-keys:UpdateAccessPolicy", UPDATE_ALL_POLICIES],
    }
}

/// The permissions to read the access policy of keys of a type; one of them is enough.
#[must_use]
pub const fn read_policy(key_type: KeyType) -> &'static [&'static str] {
    match key_type {
        KeyType::Team => &[
            "data-ingest-api-keys:ReadAccessPolicy",
            "team-custom-api-keys:ReadAccessPolicy",
            "access-policies:ReadAll",
        ],
        KeyType::SendYourData | KeyType::Personal => {
            &["data-ingest-api-keys:ReadAccessPolicy", "access-policies:ReadAll"]
        }
    }
}

/// The need for one of several permissions.
#[must_use]
pub fn any_permission(names: &[&str]) -> Need {
    Need::Any(names.iter().map(|name| Need::permission(name)).collect())
}
