//! The authorization of requests: to create, change, delete and reveal keys, and to write policies and settings.
//!
//! Gate 1 is the role: the table of permissions (docs/specification.md, "Permissions"). Gate 2 is the access policy.
//! In addition, no user puts into a key, or obtains by revealing it, a permission that the user lacks. The functions
//! are pure: they return denials and the rights that the request needs; [`crate::access`] asks the API server for these
//! rights.

mod contents;
mod other_kinds;

pub use contents::Contents;
pub use other_kinds::{Stamps, stamps, write_policy, write_settings};

use std::sync::Arc;

use super::{
    catalog::Catalog,
    duration,
    policy::{self, Ruling, User},
    provenance,
    rights::{self, Need, Right, UPDATE_ALL_POLICIES},
    time,
};
use crate::api::{AccessLevel, AccessPolicySpec, ApiKeySpec, ApiKeyStatus, KeyType, Rotation, SecuritySettingsSpec};

/// The rule that a demand or a denial belongs to, for messages, metrics and `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gate {
    /// Gate 1: the permission of the table (docs/specification.md, "Permissions").
    Role,
    /// Gate 2: the access policy.
    Policy,
    /// The requester holds the permissions in the key.
    Contents,
    /// Members of data-scoped groups neither create nor view Team keys (docs/specification.md, "Data scopes").
    DataScope,
    /// A Personal key belongs to its user.
    Owner,
    /// The import of a legacy key needs the right to read the Secret with its value.
    Import,
    /// A change of the applied state needs the rights for the fields (see [`provenance`]).
    Provenance,
    /// The annotations of a restore need the right to restore.
    Restore,
}

impl Gate {
    /// The reason in conditions and metrics.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Role => "RoleDenied",
            Self::Policy => "PolicyDenied",
            Self::Contents => "ContentsDenied",
            Self::DataScope => "DataScopeDenied",
            Self::Owner => "OwnerDenied",
            Self::Import => "ImportDenied",
            Self::Provenance => "ProvenanceDenied",
            Self::Restore => "RestoreDenied",
        }
    }
}

/// Rights that a request needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The gate.
    pub gate: Gate,
    /// The path of the field that needs the rights.
    pub field: &'static str,
    /// The purpose, as it follows "to ": "create a Team key".
    pub purpose: String,
    /// The rights that are needed.
    pub need: Need,
}

/// The maximum number of missing rights in a message. Access reviews stop there, so that a rejected request costs few.
pub const MAX_MISSING: usize = 5;

impl Demand {
    /// The message for a requester who lacks these rights. If there are [`MAX_MISSING`] of them, more may be missing.
    #[must_use]
    pub fn lacking(&self, requester: &str, namespace: &str, missing: &[Right]) -> String {
        let names: Vec<_> = missing.iter().take(MAX_MISSING).map(ToString::to_string).collect();
        let more = if missing.len() >= MAX_MISSING { " and possibly more" } else { "" };
        format!(
            "{requester} lacks {}{more} in namespace {namespace}, which is needed to {}: ask for a role that grants it (kubectl keywright can-i)",
            names.join(", "),
            self.purpose
        )
    }
}

/// A denial that no right lifts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The gate.
    pub gate: Gate,
    /// The path of the field.
    pub field: &'static str,
    /// The reason and the fix.
    pub message: String,
}

/// The result for a request. The request is allowed if there are no denials and the requester meets all demands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authorization {
    /// The denials.
    pub denials: Vec<Denial>,
    /// The rights that the request needs.
    pub demands: Vec<Demand>,
    /// The ruling of the access policy, if there is one.
    pub ruling: Option<Ruling>,
}

/// An access policy and its creator.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownPolicy {
    /// The spec.
    pub spec: AccessPolicySpec,
    /// The name of the creator.
    pub creator: Option<String>,
}

/// The inputs of an authorization.
#[derive(Clone, Copy)]
pub struct AuthorizationInputs<'a> {
    /// The user of the request.
    pub requester: User<'a>,
    /// The merged catalog.
    pub catalog: &'a Catalog,
    /// The security settings of the namespace.
    pub settings: Option<&'a SecuritySettingsSpec>,
    /// Finds an AccessPolicy of the namespace.
    pub policy: &'a dyn Fn(&str) -> Option<Arc<KnownPolicy>>,
}

/// Authorizes the creation of a key. `secret` is the name of its Secret.
#[must_use]
pub fn create(inputs: &AuthorizationInputs<'_>, new: &ApiKeySpec, secret: &str) -> Authorization {
    let mut authorization = Authorization::default();
    let kind = kind(new);
    authorization.demand(Gate::Role, "spec.type", format!("create {kind}"), manage(new));
    if new.access_policy_ref.is_some() {
        let need = rights::any_permission(rights::update_policy(new.key_type));
        authorization.demand(Gate::Role, "spec.accessPolicyRef", format!("set the access policy of {kind}"), need);
    }
    if new.legacy.is_some() {
        let need = Need::Right(Right::ReadSecret(secret.into()));
        authorization.demand(Gate::Import, "spec.secret.name", format!("import {kind} from Secret {secret}"), need);
    }
    authorization.check_owner(inputs, new, "create", Gate::Owner);
    authorization.require_contents(inputs, new, &Contents::of_spec(new, inputs.catalog), "create");
    authorization
}

/// The changes of an update outside the spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherChanges {
    /// Whether labels, annotations, owner references or finalizers change.
    pub metadata: bool,
    /// The change of the applied state.
    pub provenance: provenance::ProvenanceChange,
}

/// Authorizes a change of a key. `creator` is the creator of the key.
#[must_use]
pub fn update(
    inputs: &AuthorizationInputs<'_>,
    old: &ApiKeySpec,
    new: &ApiKeySpec,
    creator: Option<&str>,
    changes: OtherChanges,
) -> Authorization {
    let mut authorization = Authorization::default();
    let kind = kind(new);
    // The API server checks gate 1 for changes of fields. It does not check changes of the applied state.
    let is_changed = changes.metadata || differ(old, new);
    if is_changed {
        authorization.demand(Gate::Role, "spec", format!("change {kind}"), manage(new));
        authorization.check_owner(inputs, new, "change", Gate::Owner);
    } else if changes.provenance.fields {
        let purpose = "change the fields that the next apply removes from";
        authorization.demand(Gate::Provenance, APPLIED_STATE, format!("{purpose} {kind}"), manage(new));
        authorization.check_owner(inputs, new, purpose, Gate::Provenance);
    }
    if is_changed || changes.provenance.fields {
        authorization.require_access(inputs, old, creator, AccessLevel::Manage);
    }
    let changes_policy = old.access_policy_ref != new.access_policy_ref;
    if changes_policy || changes.provenance.policy {
        let need = rights::any_permission(rights::update_policy(new.key_type));
        if changes_policy {
            authorization.demand(
                Gate::Role,
                "spec.accessPolicyRef",
                format!("change the access policy of {kind}"),
                need,
            );
        } else {
            let purpose = format!("change whether the next apply removes the access policy of {kind}");
            authorization.demand(Gate::Provenance, APPLIED_STATE, purpose, need);
        }
        let before = old.access_policy_ref.as_ref().and_then(|reference| (inputs.policy)(&reference.name));
        // A reference to a missing policy can be changed, since that is the fix for it.
        if let Some(before) = before {
            let creator = if before.spec.mode == crate::api::AccessMode::Private { creator } else { None };
            authorization.require_policy_access(&before.spec, creator, inputs.requester, "spec.accessPolicyRef");
        }
    }
    let (before, after) = (Contents::of_spec(old, inputs.catalog), Contents::of_spec(new, inputs.catalog));
    let added = after.beyond(&before, inputs.catalog);
    if let Some(action) = renewal(old, new).or_else(|| renewal_by_next_apply(old, changes.provenance)) {
        // A renewal has the effect of a new key, so it needs the same permissions.
        authorization.require_contents(inputs, new, &after, action);
    } else if !added.is_empty() {
        // A raise of a Team key needs all permissions in the key, as its creation does.
        let wanted = if new.key_type == KeyType::Team { &after } else { &added };
        authorization.require_contents(inputs, new, wanted, "raise the rights of");
    }
    authorization
}

/// The field of the applied state, for messages.
const APPLIED_STATE: &str = "metadata.managedFields";

/// Whether anything but `accessPolicyRef` differs.
fn differ(old: &ApiKeySpec, new: &ApiKeySpec) -> bool {
    let rest = |spec: &ApiKeySpec| ApiKeySpec { access_policy_ref: None, ..spec.clone() };
    rest(old) != rest(new)
}

/// Describes the renewal in a change: it makes a key work that did not, makes it work longer, or gives it a new value.
/// Deactivation, an earlier expiry and the removal of a rotation request are no renewals.
fn renewal(old: &ApiKeySpec, new: &ApiKeySpec) -> Option<&'static str> {
    let is_off = |spec: &ApiKeySpec| spec.active == Some(false);
    let extended = match (old.expires_at.as_deref(), new.expires_at.as_deref()) {
        (None, _) => false,
        (Some(_), None) => true,
        // A text that is not a time counts as a time in the past. A later version may read it differently.
        (Some(old), Some(new)) => {
            old != new && !matches!((time::parse(old), time::parse(new)), (Some(old), Some(new)) if new <= old)
        }
    };
    let field =
        |spec: &ApiKeySpec, of: fn(&Rotation) -> &Option<String>| spec.rotation.as_ref().and_then(|r| of(r).clone());
    let (requested, every, overlap) =
        (field(new, |r| &r.requested_at), field(new, |r| &r.every), field(new, |r| &r.overlap));
    let (old_requested, old_every, old_overlap) =
        (field(old, |r| &r.requested_at), field(old, |r| &r.every), field(old, |r| &r.overlap));
    let length = |text: &Option<String>| text.as_deref().and_then(duration::parse);
    let overlaps_less = matches!((length(&old_overlap), length(&overlap)), (Some(old), Some(new)) if new <= old);
    if is_off(old) && !is_off(new) {
        Some("turn on")
    } else if extended {
        Some("extend")
    } else if requested.is_some() && requested != old_requested || every != old_every {
        Some("rotate")
    } else if overlap != old_overlap && !overlaps_less {
        Some("prolong the overlap of")
    } else {
        None
    }
}

/// As [`renewal`], but by the fields that the next apply of an unchanged manifest would remove.
fn renewal_by_next_apply(old: &ApiKeySpec, provenance: provenance::ProvenanceChange) -> Option<&'static str> {
    let renewal = provenance.removes.active && old.active == Some(false)
        || provenance.removes.expiry && old.expires_at.is_some()
        || provenance.removes.rotation && old.rotation.is_some();
    renewal.then_some("let the next apply turn on, extend or rotate")
}

/// Authorizes the deletion of a key.
#[must_use]
pub fn delete(inputs: &AuthorizationInputs<'_>, old: &ApiKeySpec, creator: Option<&str>) -> Authorization {
    let mut authorization = Authorization::default();
    authorization.demand(Gate::Role, "spec.type", format!("delete {}", kind(old)), manage(old));
    authorization.check_owner(inputs, old, "delete", Gate::Owner);
    authorization.require_access(inputs, old, creator, AccessLevel::Manage);
    authorization
}

/// Authorizes a reveal of the value of a key. It needs every permission in the key (S6).
#[must_use]
pub fn reveal(
    inputs: &AuthorizationInputs<'_>,
    spec: &ApiKeySpec,
    status: Option<&ApiKeyStatus>,
    creator: Option<&str>,
) -> Authorization {
    let mut authorization = Authorization::default();
    let kind = kind(spec);
    let view = Need::permission(rights::view(spec.key_type, spec.legacy));
    authorization.demand(Gate::Role, "spec.apiKeyRef", format!("view {kind}"), view);
    authorization.require_access(inputs, spec, creator, AccessLevel::Read);
    match spec.key_type {
        KeyType::Personal if spec.user.as_deref() != Some(inputs.requester.name) => authorization.deny(
            Gate::Owner,
            "spec.apiKeyRef",
            format!("only {} may see the value of this Personal key", spec.user.as_deref().unwrap_or("its user")),
        ),
        KeyType::Team => authorization.check_data_scope(inputs, "spec.apiKeyRef", "view"),
        _ => {}
    }
    let need = Contents::in_force(spec, status, inputs.catalog).need(inputs.catalog);
    authorization.demand(Gate::Contents, "spec.apiKeyRef", format!("see the value of {kind} that carries it"), need);
    authorization
}

impl Authorization {
    /// Combines two results.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.denials.extend(other.denials);
        self.demands.extend(other.demands);
        self.ruling = self.ruling.or(other.ruling);
        self
    }

    pub(super) fn demand(&mut self, gate: Gate, field: &'static str, purpose: String, need: Need) {
        if need != Need::NOTHING {
            self.demands.push(Demand { gate, field, purpose, need });
        }
    }

    pub(super) fn deny(&mut self, gate: Gate, field: &'static str, message: String) {
        self.denials.push(Denial { gate, field, message });
    }

    /// Requires that the requester is the user of a Personal key, or may impersonate that user.
    fn check_owner(&mut self, inputs: &AuthorizationInputs<'_>, spec: &ApiKeySpec, action: &str, gate: Gate) {
        let user = spec.user.as_deref().unwrap_or_default();
        if spec.key_type == KeyType::Personal && user != inputs.requester.name {
            let need = Need::Right(Right::Impersonate(user.into()));
            self.demand(gate, "spec.user", format!("{action} a Personal key of {user}"), need);
        }
    }

    /// Requires the rights for a key with these contents.
    fn require_contents(
        &mut self,
        inputs: &AuthorizationInputs<'_>,
        spec: &ApiKeySpec,
        contents: &Contents,
        action: &str,
    ) {
        if spec.key_type == KeyType::Team {
            self.check_data_scope(inputs, "spec.type", action);
        }
        let need = contents.need(inputs.catalog);
        self.demand(Gate::Contents, "spec", format!("{action} a key that carries it"), need);
    }

    fn check_data_scope(&mut self, inputs: &AuthorizationInputs<'_>, field: &'static str, action: &str) {
        let scoped = inputs.settings.map_or(&[][..], |settings| &settings.data_scoped_groups);
        if let Some(group) = scoped.iter().find(|group| inputs.requester.groups.contains(group)) {
            self.deny(
                Gate::DataScope,
                field,
                format!("group {group} sees only part of the data, so its members may not {action} Team keys"),
            );
        }
    }

    /// Requires an access level by the policy of a key (gate 2).
    fn require_access(
        &mut self,
        inputs: &AuthorizationInputs<'_>,
        spec: &ApiKeySpec,
        creator: Option<&str>,
        least: AccessLevel,
    ) {
        let Some(reference) = &spec.access_policy_ref else { return };
        let verb = if least == AccessLevel::Manage { "manage" } else { "view" };
        let name = &reference.name;
        let Some(policy) = (inputs.policy)(name) else {
            return self.deny(
                Gate::Policy,
                "spec.accessPolicyRef",
                format!(
                    "AccessPolicy {name} does not exist, so no user may {verb} the key: create it, or name another"
                ),
            );
        };
        let ruling = policy::key_access(&policy.spec, creator, inputs.requester);
        self.ruling = Some(ruling);
        if ruling.level < least {
            self.deny(
                Gate::Policy,
                "spec.accessPolicyRef",
                format!(
                    "AccessPolicy {name} gives {} {:?} and {least:?} is needed to {verb} the key ({})",
                    inputs.requester.name, ruling.level, ruling.by
                ),
            );
        }
    }

    /// Requires the right to change a policy itself (gate 2).
    pub(super) fn require_policy_access(
        &mut self,
        policy: &AccessPolicySpec,
        creator: Option<&str>,
        requester: User<'_>,
        field: &'static str,
    ) {
        let ruling = policy::policy_access(policy, creator, requester);
        self.ruling = Some(ruling);
        if ruling.level < AccessLevel::Manage {
            let purpose =
                format!("change an access policy that gives {} {:?} ({})", requester.name, ruling.level, ruling.by);
            self.demand(Gate::Policy, field, purpose, Need::permission(UPDATE_ALL_POLICIES));
        }
    }
}

fn manage(spec: &ApiKeySpec) -> Need {
    Need::permission(rights::manage(spec.key_type, spec.legacy))
}

fn kind(spec: &ApiKeySpec) -> String {
    match spec.legacy {
        Some(legacy) => format!("a legacy {legacy:?} key"),
        None => format!("a {:?} key", spec.key_type),
    }
}

mod tests;
