//! What a request comes to: who may create, change, delete and reveal keys, and change policies.
//!
//! Gate 1 is the role: the seed's permission table. Gate 2 is the access policy. Beside them, nobody attaches to a key
//! or sees by a key what they lack. Each function here is pure: it says what is denied outright, and which rights have
//! to be asked for; [`crate::access`] asks.

use std::{collections::BTreeSet, fmt, sync::Arc};

use super::{
    catalog::Catalog,
    duration,
    policy::{self, Person, Ruling},
    provenance,
    rights::{self, Need, Right, UPDATE_ALL_POLICIES},
    time,
};
use crate::api::{AccessLevel, AccessPolicySpec, ApiKeySpec, ApiKeyStatus, KeyType, Rotation, SecuritySettingsSpec};

/// What a request is about, for messages, metrics and `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gate {
    /// Gate 1: the permission that the seed's table names.
    Role,
    /// Gate 2: the access policy.
    Policy,
    /// Nobody gets by a key what they lack.
    Contents,
    /// Team keys are not for members of data-scoped groups.
    DataScope,
    /// A Personal key is its user's.
    Owner,
    /// A legacy key is imported by one who can read its value anyway.
    Import,
    /// What tools that apply know of earlier applies is changed by those who may change the fields.
    Provenance,
    /// The annotations of a restore are for those who may restore.
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

/// Something that has to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Which gate.
    pub gate: Gate,
    /// The path of the field that asks for it.
    pub field: &'static str,
    /// What it is for, as it stands after "to ": "create a Team key".
    pub purpose: String,
    /// The rights that are needed.
    pub need: Need,
}

/// How many missing rights are looked for. Nobody is asked for more, so that a request that is refused costs few questions.
pub const MOST_MISSING: usize = 5;

impl Demand {
    /// What somebody is told who lacks these rights. With [`MOST_MISSING`] of them, there may be more.
    #[must_use]
    pub fn lacking(&self, who: &str, namespace: &str, missing: &[Right]) -> String {
        let names: Vec<_> = missing.iter().take(MOST_MISSING).map(ToString::to_string).collect();
        let more = if missing.len() >= MOST_MISSING { " and possibly more" } else { "" };
        format!(
            "{who} lacks {}{more} in namespace {namespace}, which is needed to {}: ask for a role that grants it (kubectl keywright can-i)",
            names.join(", "),
            self.purpose
        )
    }
}

/// Something that was denied outright.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Which gate.
    pub gate: Gate,
    /// The path of the field.
    pub field: &'static str,
    /// Why, and the way out.
    pub message: String,
}

/// What a request comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What was denied outright.
    pub denials: Vec<Denial>,
    /// What has to hold beside.
    pub demands: Vec<Demand>,
    /// What gate 2 said, if it was asked.
    pub ruling: Option<Ruling>,
}

/// A policy, and who created it.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownPolicy {
    /// What it says.
    pub spec: AccessPolicySpec,
    /// The user who created it.
    pub creator: Option<String>,
}

/// What is known when a request is judged.
#[derive(Clone, Copy)]
pub struct Situation<'a> {
    /// Who asks.
    pub who: Person<'a>,
    /// The catalogue.
    pub catalog: &'a Catalog,
    /// The security settings of the namespace.
    pub settings: Option<&'a SecuritySettingsSpec>,
    /// Finds an AccessPolicy of the namespace.
    pub policy: &'a dyn Fn(&str) -> Option<Arc<KnownPolicy>>,
}

/// What a key may do, name by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    presets: BTreeSet<Arc<str>>,
    permissions: BTreeSet<Arc<str>>,
}

/// The names, as few as a message takes.
impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 3;
        let names = self.presets.iter().map(|name| ("preset", name));
        let names = names.chain(self.permissions.iter().map(|name| ("permission", name)));
        for (number, (kind, name)) in names.take(MOST).enumerate() {
            write!(f, "{}{kind} {name}", if number > 0 { ", " } else { "" })?;
        }
        match (self.presets.len() + self.permissions.len()).saturating_sub(MOST) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Contents {
    /// What a spec asks for. Names that no catalogue knows are kept: what they may come to mean is asked for too.
    #[must_use]
    pub fn of_spec(spec: &ApiKeySpec, catalog: &Catalog) -> Self {
        let mut contents = Self::of_names(&spec.presets, &spec.permissions, catalog);
        if let Some(kind) = spec.legacy {
            contents.permissions.extend(catalog.legacy(kind).iter().cloned());
        }
        contents
    }

    /// What a key carries: what is in force by its status, and what its spec asks for, which will be in force in a
    /// moment. Whoever has the value then has that too.
    #[must_use]
    pub fn in_force(spec: &ApiKeySpec, status: Option<&ApiKeyStatus>, catalog: &Catalog) -> Self {
        let mut contents = Self::of_spec(spec, catalog);
        if let Some(status) = status {
            let held = Self::of_names(&status.presets, &status.permissions, catalog);
            contents.presets.extend(held.presets);
            contents.permissions.extend(held.permissions);
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

    /// Every permission in it, those of its presets included.
    #[must_use]
    pub fn effective(&self, catalog: &Catalog) -> BTreeSet<Arc<str>> {
        let of_presets = self.presets.iter().filter_map(|name| catalog.preset(name)).flat_map(|p| &p.permissions);
        self.permissions.iter().chain(of_presets).cloned().collect()
    }

    /// What is here and not in `old`. A permission that `old` had by a preset is nothing new; a preset that `old` had
    /// not is, since it may grow.
    #[must_use]
    pub fn beyond(&self, old: &Self, catalog: &Catalog) -> Self {
        let had = old.effective(catalog);
        Self {
            presets: self.presets.difference(&old.presets).cloned().collect(),
            permissions: self.permissions.difference(&had).cloned().collect(),
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.presets.is_empty() && self.permissions.is_empty()
    }

    /// The rights that somebody needs who is to have all of it. A preset is one right, and so is every permission at
    /// once; only who has neither is asked for each.
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
            // Nobody holds each of no permissions: what an empty preset will grant is not known.
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

/// To create a key.
#[must_use]
pub fn create(situation: &Situation<'_>, new: &ApiKeySpec, secret: &str) -> Verdict {
    let mut verdict = Verdict::default();
    let kind = kind(new);
    verdict.demand(Gate::Role, "spec.type", format!("create {kind}"), manage(new));
    if new.access_policy_ref.is_some() {
        let need = rights::any_permission(rights::update_policy(new.key_type));
        verdict.demand(Gate::Role, "spec.accessPolicyRef", format!("set the access policy of {kind}"), need);
    }
    if new.legacy.is_some() {
        let need = Need::Right(Right::ReadSecret(secret.into()));
        verdict.demand(Gate::Import, "spec.secret.name", format!("import {kind} from Secret {secret}"), need);
    }
    verdict.check_owner(situation, new, "create", Gate::Owner);
    verdict.attach(situation, new, &Contents::of_spec(new, situation.catalog), "create");
    verdict
}

/// What an update changes beside the spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Metadata that people own: labels, annotations, owners, finalizers.
    pub metadata: bool,
    /// What tools that apply know of earlier applies.
    pub known: provenance::Change,
}

/// To change a key.
#[must_use]
pub fn update(
    situation: &Situation<'_>,
    old: &ApiKeySpec,
    new: &ApiKeySpec,
    creator: Option<&str>,
    beside: Beside,
) -> Verdict {
    let mut verdict = Verdict::default();
    let kind = kind(new);
    // The API server asks for gate 1 where it sees the change. What the next apply removes, it does not see.
    let touched = beside.metadata || differ(old, new);
    if touched {
        verdict.demand(Gate::Role, "spec", format!("change {kind}"), manage(new));
        verdict.check_owner(situation, new, "change", Gate::Owner);
    } else if beside.known.fields {
        verdict.demand(Gate::Provenance, KNOWN, format!("change what the next apply does to {kind}"), manage(new));
        verdict.check_owner(situation, new, "change what the next apply does to", Gate::Provenance);
    }
    if touched || beside.known.fields {
        verdict.consult(situation, old, creator, AccessLevel::Manage);
    }
    let another = old.access_policy_ref != new.access_policy_ref;
    if another || beside.known.policy {
        let need = rights::any_permission(rights::update_policy(new.key_type));
        if another {
            verdict.demand(Gate::Role, "spec.accessPolicyRef", format!("change the access policy of {kind}"), need);
        } else {
            let purpose = format!("change what the next apply does to the access policy of {kind}");
            verdict.demand(Gate::Provenance, KNOWN, purpose, need);
        }
        let before = old.access_policy_ref.as_ref().and_then(|reference| (situation.policy)(&reference.name));
        // A policy that is missing protects nothing, and to name another is the way out of it.
        if let Some(before) = before {
            let creator = if before.spec.mode == crate::api::AccessMode::Private { creator } else { None };
            verdict.consult_policy(&before.spec, creator, situation.who, "spec.accessPolicyRef");
        }
    }
    let (before, after) = (Contents::of_spec(old, situation.catalog), Contents::of_spec(new, situation.catalog));
    let added = after.beyond(&before, situation.catalog);
    if let Some(what) = revives(old, new).or_else(|| known_to_revive(old, beside.known)) {
        // To turn on, extend or rotate a key is to make it anew: it takes what creating it would take.
        verdict.attach(situation, new, &after, what);
    } else if !added.is_empty() {
        // Whoever raises a Team key holds all that is in it afterwards, as whoever creates one.
        let wanted = if new.key_type == KeyType::Team { &after } else { &added };
        verdict.attach(situation, new, wanted, "raise the rights of");
    }
    verdict
}

/// Where it is kept what tools that apply know.
const KNOWN: &str = "metadata.managedFields";

/// Whether anything but `accessPolicyRef` differs.
fn differ(old: &ApiKeySpec, new: &ApiKeySpec) -> bool {
    let rest = |spec: &ApiKeySpec| ApiKeySpec { access_policy_ref: None, ..spec.clone() };
    rest(old) != rest(new)
}

/// Whether a change makes a key work that did not, makes it work for longer, or gives it another value; and in which
/// words. Turning off, shortening and removing a request for a rotation do not.
fn revives(old: &ApiKeySpec, new: &ApiKeySpec) -> Option<&'static str> {
    let is_off = |spec: &ApiKeySpec| spec.active == Some(false);
    let extended = match (old.expires_at.as_deref(), new.expires_at.as_deref()) {
        (None, _) => false,
        (Some(_), None) => true,
        // What is no time counts as past, and may be anything else tomorrow.
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

/// As [`revives`], by what the next apply of an unchanged manifest would remove.
fn known_to_revive(old: &ApiKeySpec, known: provenance::Change) -> Option<&'static str> {
    let revives = known.removes.active && old.active == Some(false)
        || known.removes.expiry && old.expires_at.is_some()
        || known.removes.rotation && old.rotation.is_some();
    revives.then_some("let the next apply turn on, extend or rotate")
}

/// To delete a key.
#[must_use]
pub fn delete(situation: &Situation<'_>, old: &ApiKeySpec, creator: Option<&str>) -> Verdict {
    let mut verdict = Verdict::default();
    verdict.demand(Gate::Role, "spec.type", format!("delete {}", kind(old)), manage(old));
    verdict.check_owner(situation, old, "delete", Gate::Owner);
    verdict.consult(situation, old, creator, AccessLevel::Manage);
    verdict
}

/// To see the value of a key. Whoever sees it holds all that it can do (S6), whatever its type.
#[must_use]
pub fn reveal(
    situation: &Situation<'_>,
    spec: &ApiKeySpec,
    status: Option<&ApiKeyStatus>,
    creator: Option<&str>,
) -> Verdict {
    let mut verdict = Verdict::default();
    let kind = kind(spec);
    let view = Need::permission(rights::view(spec.key_type, spec.legacy));
    verdict.demand(Gate::Role, "spec.apiKeyRef", format!("view {kind}"), view);
    verdict.consult(situation, spec, creator, AccessLevel::Read);
    match spec.key_type {
        KeyType::Personal if spec.user.as_deref() != Some(situation.who.name) => verdict.deny(
            Gate::Owner,
            "spec.apiKeyRef",
            format!("only {} may see the value of this Personal key", spec.user.as_deref().unwrap_or("its user")),
        ),
        KeyType::Team => verdict.check_data_scope(situation, "spec.apiKeyRef", "view"),
        _ => {}
    }
    let need = Contents::in_force(spec, status, situation.catalog).need(situation.catalog);
    verdict.demand(Gate::Contents, "spec.apiKeyRef", format!("see the value of {kind} that carries it"), need);
    verdict
}

/// To create a policy (`old` is `None`), or to change or delete one. `types` are the types of the keys that refer to it.
#[must_use]
pub fn write_policy(who: Person<'_>, old: Option<&KnownPolicy>, types: &BTreeSet<KeyType>) -> Verdict {
    let mut verdict = Verdict::default();
    // What every type accepts counts for a policy that no key uses; the stricter type decides where one does.
    let strictest = if types.contains(&KeyType::SendYourData) { KeyType::SendYourData } else { KeyType::Team };
    let need = rights::any_permission(rights::update_policy(strictest));
    verdict.demand(Gate::Role, "spec", "write an access policy".to_owned(), need);
    if let Some(old) = old {
        verdict.consult_policy(&old.spec, old.creator.as_deref(), who, "spec");
    }
    verdict
}

/// The annotations of a restore, on an object that is created (`old` is `None`) or changed. The API server asks the same
/// where the policies of the chart are installed.
#[must_use]
pub fn stamps(who: &str, old: Option<&Stamps<'_>>, new: &Stamps<'_>) -> Verdict {
    let mut verdict = Verdict::default();
    let kept = match old {
        Some(old) => new.creator == old.creator && new.restored_by == old.restored_by,
        None => new.creator == Some(who) && new.restored_by.is_none(),
    };
    if !kept && (old.is_some() || new.creator.is_none() || new.restored_by != Some(who)) {
        let message = "keywright.dev/creator and keywright.dev/restored-by are written by the cluster when the object is \
                       created, and can't be chosen or changed";
        verdict.deny(Gate::Restore, "metadata.annotations", message.to_owned());
    } else if !kept {
        let purpose = "keep the creator of an ApiKey that is restored".to_owned();
        verdict.demand(
            Gate::Restore,
            "metadata.annotations[keywright.dev/creator]",
            purpose,
            Need::Right(Right::Restore),
        );
    }
    if new.accepts.is_some() && new.accepts != old.and_then(|old| old.accepts) {
        let purpose = "have the value of a Secret accepted that the operator can't authenticate".to_owned();
        let field = "metadata.annotations[keywright.dev/accept-secret]";
        verdict.demand(Gate::Restore, field, purpose, Need::Right(Right::Restore));
    }
    verdict
}

/// The annotations of an ApiKey that are not its users' alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamps<'a> {
    /// [`crate::api::CREATOR_ANNOTATION`].
    pub creator: Option<&'a str>,
    /// [`crate::api::RESTORED_BY_ANNOTATION`].
    pub restored_by: Option<&'a str>,
    /// [`crate::api::ACCEPT_SECRET_ANNOTATION`].
    pub accepts: Option<&'a str>,
}

/// To create, change or delete security settings.
#[must_use]
pub fn write_settings() -> Verdict {
    let mut verdict = Verdict::default();
    let need = Need::permission(rights::MANAGE_SETTINGS);
    verdict.demand(Gate::Role, "spec", "write the security settings".to_owned(), need);
    verdict
}

impl Verdict {
    /// Both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.denials.extend(other.denials);
        self.demands.extend(other.demands);
        self.ruling = self.ruling.or(other.ruling);
        self
    }

    fn demand(&mut self, gate: Gate, field: &'static str, purpose: String, need: Need) {
        if need != Need::NOTHING {
            self.demands.push(Demand { gate, field, purpose, need });
        }
    }

    fn deny(&mut self, gate: Gate, field: &'static str, message: String) {
        self.denials.push(Denial { gate, field, message });
    }

    /// A Personal key is its user's, or of one who may act as that user anyway.
    fn check_owner(&mut self, situation: &Situation<'_>, spec: &ApiKeySpec, what: &str, gate: Gate) {
        let user = spec.user.as_deref().unwrap_or_default();
        if spec.key_type == KeyType::Personal && user != situation.who.name {
            let need = Need::Right(Right::Impersonate(user.into()));
            self.demand(gate, "spec.user", format!("{what} a Personal key of {user}"), need);
        }
    }

    /// What putting these contents into a key takes.
    fn attach(&mut self, situation: &Situation<'_>, spec: &ApiKeySpec, contents: &Contents, what: &str) {
        if spec.key_type == KeyType::Team {
            self.check_data_scope(situation, "spec.type", what);
        }
        let need = contents.need(situation.catalog);
        self.demand(Gate::Contents, "spec", format!("{what} a key that carries it"), need);
    }

    fn check_data_scope(&mut self, situation: &Situation<'_>, field: &'static str, what: &str) {
        let scoped = situation.settings.map_or(&[][..], |settings| &settings.data_scoped_groups);
        if let Some(group) = scoped.iter().find(|group| situation.who.groups.contains(group)) {
            self.deny(
                Gate::DataScope,
                field,
                format!("group {group} sees only part of the data, so its members may not {what} Team keys"),
            );
        }
    }

    /// Asks gate 2 about a key.
    fn consult(&mut self, situation: &Situation<'_>, spec: &ApiKeySpec, creator: Option<&str>, least: AccessLevel) {
        let Some(reference) = &spec.access_policy_ref else { return };
        let verb = if least == AccessLevel::Manage { "manage" } else { "view" };
        let name = &reference.name;
        let Some(policy) = (situation.policy)(name) else {
            return self.deny(
                Gate::Policy,
                "spec.accessPolicyRef",
                format!("AccessPolicy {name} does not exist, so nobody may {verb} the key: create it, or name another"),
            );
        };
        let ruling = policy::key_access(&policy.spec, creator, situation.who);
        self.ruling = Some(ruling);
        if ruling.level < least {
            self.deny(
                Gate::Policy,
                "spec.accessPolicyRef",
                format!(
                    "AccessPolicy {name} gives {} {:?} and {least:?} is needed to {verb} the key ({})",
                    situation.who.name, ruling.level, ruling.by
                ),
            );
        }
    }

    /// Asks gate 2 about the policy itself.
    fn consult_policy(
        &mut self,
        policy: &AccessPolicySpec,
        creator: Option<&str>,
        who: Person<'_>,
        field: &'static str,
    ) {
        let ruling = policy::policy_access(policy, creator, who);
        self.ruling = Some(ruling);
        if ruling.level < AccessLevel::Manage {
            let purpose = format!("change an access policy that gives {} {:?} ({})", who.name, ruling.level, ruling.by);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{AccessMode, AccessPolicyRef, AccessRule, LegacyKind},
        domain::validate::tests::{catalog, spec},
    };

    /// What is needed, in words: rights by comma, alternatives by bar.
    fn words(need: &Need) -> String {
        let join = |needs: &[Need], by: &str| needs.iter().map(words).collect::<Vec<_>>().join(by);
        match need {
            Need::Right(right) => right.to_string(),
            Need::All(needs) => format!("({})", join(needs, ", ")),
            Need::Any(needs) => format!("[{}]", join(needs, " | ")),
        }
    }

    fn demands(verdict: &Verdict) -> Vec<(Gate, &'static str, String)> {
        verdict.demands.iter().map(|demand| (demand.gate, demand.field, words(&demand.need))).collect()
    }

    fn gates(verdict: &Verdict) -> (Vec<Gate>, Vec<Gate>) {
        (verdict.denials.iter().map(|d| d.gate).collect(), verdict.demands.iter().map(|d| d.gate).collect())
    }

    fn known(mode: AccessMode, rules: Vec<AccessRule>, general: Option<AccessLevel>, creator: &str) -> KnownPolicy {
        let spec = AccessPolicySpec { mode, rules, general_access: general, general_policy_access: None };
        KnownPolicy { spec, creator: Some(creator.to_owned()) }
    }

    /// What alice, of group sre, is told. There are the policies `open`, `read`, `closed`, `mine` and no other.
    fn ask<T>(settings: Option<&SecuritySettingsSpec>, question: impl FnOnce(&Situation<'_>) -> T) -> T {
        let groups = ["sre".to_owned()];
        let policy = |name: &str| {
            let advanced = |level| known(AccessMode::Advanced, vec![], Some(level), "bob");
            let found = match name {
                "open" => advanced(AccessLevel::Manage),
                "read" => advanced(AccessLevel::Read),
                "closed" => advanced(AccessLevel::NoAccess),
                "mine" => known(AccessMode::Private, vec![], None, "bob"),
                _ => return None,
            };
            Some(Arc::new(found))
        };
        let who = Person { name: "alice", groups: &groups };
        question(&Situation { who, catalog: &catalog(), settings, policy: &policy })
    }

    fn under(policy: &str, spec: ApiKeySpec) -> ApiKeySpec {
        ApiKeySpec { access_policy_ref: Some(AccessPolicyRef { name: policy.to_owned() }), ..spec }
    }

    fn team() -> ApiKeySpec {
        spec(KeyType::Team, &["Alerts"], &[])
    }

    fn personal(user: &str) -> ApiKeySpec {
        ApiKeySpec { user: Some(user.to_owned()), ..spec(KeyType::Personal, &[], &["alerts:ReadConfig"]) }
    }

    fn scoped() -> SecuritySettingsSpec {
        SecuritySettingsSpec { data_scoped_groups: vec!["x".to_owned(), "sre".to_owned()], ..Default::default() }
    }

    const CHANGED: Beside = Beside { metadata: true, known: provenance::Change::NOTHING };

    const ALERTS: &str = "([preset Alerts | (permission alerts:ReadConfig, permission alerts:UpdateConfig)])";

    #[test]
    fn creating_takes_the_role_and_all_that_is_in_the_key() {
        for (key_type, permission) in [
            (KeyType::Team, "permission team-custom-api-keys:Manage"),
            (KeyType::SendYourData, "permission data-ingest-api-keys:Manage"),
        ] {
            let verdict = ask(None, |s| create(s, &spec(key_type, &["alerts"], &[]), "x"));
            let contents = (Gate::Contents, "spec", ALERTS.to_owned());
            assert_eq!(demands(&verdict), [(Gate::Role, "spec.type", permission.to_owned()), contents]);
            assert!(verdict.denials.is_empty());
        }
        let many = spec(KeyType::Team, &[], &["ALERTS:readconfig", "nobody:Knows"]);
        let verdict = ask(None, |s| create(s, &many, "x"));
        let each = "([every permission | (permission alerts:ReadConfig, permission nobody:Knows)])";
        assert_eq!(demands(&verdict)[1].2, each, "in the catalogue's spelling, and also what it does not know");
    }

    #[test]
    fn an_empty_preset_takes_the_right_to_the_preset_itself() {
        for name in ["Olly", "NoSuchPreset"] {
            let verdict = ask(None, |s| create(s, &spec(KeyType::Team, &[name], &[]), "x"));
            assert_eq!(demands(&verdict)[1].2, format!("(preset {name})"));
        }
    }

    #[test]
    fn setting_a_policy_takes_the_right_to_update_policies() {
        let verdict = ask(None, |s| create(s, &under("missing", team()), "x"));
        let one_of = "[permission data-ingest-api-keys:UpdateAccessPolicy | permission \
                      team-custom-api-keys:UpdateAccessPolicy | permission access-policies:UpdateAll]";
        assert_eq!(demands(&verdict)[1], (Gate::Role, "spec.accessPolicyRef", one_of.to_owned()));
        let verdict = ask(None, |s| create(s, &under("open", spec(KeyType::SendYourData, &["SendData"], &[])), "x"));
        assert!(!demands(&verdict)[1].2.contains("team-custom"), "the spelling of Team keys is theirs alone");
    }

    #[test]
    fn members_of_data_scoped_groups_neither_create_nor_raise_nor_view_team_keys() {
        let settings = scoped();
        let told = |verdict: Verdict| verdict.denials.iter().map(|d| (d.gate, d.field)).collect::<Vec<_>>();
        let lower = spec(KeyType::Team, &[], &["alerts:ReadConfig"]);
        ask(Some(&settings), |s| {
            assert_eq!(told(create(s, &team(), "x")), [(Gate::DataScope, "spec.type")]);
            assert_eq!(told(reveal(s, &team(), None, None)), [(Gate::DataScope, "spec.apiKeyRef")]);
            assert_eq!(told(update(s, &lower, &team(), None, CHANGED)), [(Gate::DataScope, "spec.type")]);
            assert!(told(update(s, &team(), &lower, None, CHANGED)).is_empty(), "lowering shows nothing");
            assert!(told(delete(s, &team(), None)).is_empty());
            for other in [spec(KeyType::SendYourData, &["SendData"], &[]), personal("alice")] {
                assert!(told(create(s, &other, "x")).is_empty());
                assert!(told(reveal(s, &other, None, None)).is_empty());
            }
        });
    }

    #[test]
    fn a_personal_key_is_managed_by_its_user_or_one_who_may_impersonate_that_user() {
        let own = ask(None, |s| create(s, &personal("alice"), "x"));
        assert_eq!(gates(&own), (vec![], vec![Gate::Role, Gate::Contents]));
        let other = ask(None, |s| create(s, &personal("bob"), "x"));
        assert_eq!(demands(&other)[1], (Gate::Owner, "spec.user", "impersonate bob".to_owned()));
        let raised = ApiKeySpec { permissions: vec!["alerts:UpdateConfig".to_owned()], ..personal("bob") };
        let raised = ask(None, |s| update(s, &personal("bob"), &raised, None, CHANGED));
        assert_eq!(gates(&raised).1, [Gate::Role, Gate::Owner, Gate::Contents]);
        let old = ApiKeySpec { expires_at: Some("2027-01-01T00:00:00Z".to_owned()), ..personal("bob") };
        for new in [
            ApiKeySpec { display_name: Some("x".to_owned()), ..old.clone() },
            ApiKeySpec { active: Some(false), ..old.clone() },
            ApiKeySpec { expires_at: None, ..old.clone() },
            ApiKeySpec { rotation: Some(requested("2026-11-25T10:00:00Z")), ..old.clone() },
        ] {
            let changed = ask(None, |s| update(s, &old, &new, None, Beside::default()));
            assert_eq!(demands(&changed)[1], (Gate::Owner, "spec.user", "impersonate bob".to_owned()), "{new:?}");
        }
        let deleted = ask(None, |s| delete(s, &personal("bob"), Some("alice")));
        assert_eq!(gates(&deleted), (vec![], vec![Gate::Role, Gate::Owner]), "whoever created it");
        assert_eq!(gates(&ask(None, |s| delete(s, &personal("alice"), None))).1, [Gate::Role]);
        // To impersonate somebody is not to be shown what is theirs.
        assert_eq!(gates(&ask(None, |s| reveal(s, &personal("bob"), None, Some("alice")))).0, [Gate::Owner]);
        assert!(gates(&ask(None, |s| reveal(s, &personal("alice"), None, Some("bob")))).0.is_empty());
    }

    #[test]
    fn a_legacy_key_is_imported_by_one_who_can_read_its_value() {
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        let legacy = ApiKeySpec { user: Some("alice".to_owned()), ..legacy };
        let verdict = ask(None, |s| create(s, &legacy, "old"));
        assert_eq!(
            demands(&verdict),
            [
                (Gate::Role, "spec.type", "permission user-legacy-logs-query-api-keys:Manage".to_owned()),
                (Gate::Import, "spec.secret.name", "get Secret old".to_owned()),
            ]
        );
        let view = ask(None, |s| demands(&reveal(s, &legacy, None, None)));
        assert_eq!(view[0].2, "permission user-legacy-logs-query-api-keys:ReadConfig");
    }

    #[test]
    fn changing_takes_the_role_and_manage_of_the_policy() {
        let renamed = |old: &ApiKeySpec| ApiKeySpec { display_name: Some("new".to_owned()), ..old.clone() };
        for (policy, denied) in [("open", false), ("read", true), ("closed", true), ("mine", true), ("missing", true)] {
            let old = under(policy, team());
            let verdict = ask(None, |s| update(s, &old, &renamed(&old), Some("carol"), CHANGED));
            let denials = if denied { vec![Gate::Policy] } else { vec![] };
            assert_eq!(gates(&verdict), (denials.clone(), vec![Gate::Role]), "{policy}");
            assert_eq!(gates(&ask(None, |s| delete(s, &old, Some("carol")))), (denials, vec![Gate::Role]), "{policy}");
        }
        let private = under("mine", team());
        assert!(gates(&ask(None, |s| delete(s, &private, Some("alice")))).0.is_empty(), "the creator of the key");
        let message = ask(None, |s| delete(s, &under("read", team()), None)).denials.remove(0).message;
        assert_eq!(
            message,
            "AccessPolicy read gives alice Read and Manage is needed to manage the key (general access: no rule covers \
             the user)"
        );
    }

    #[test]
    fn a_missing_policy_denies_view_and_manage_but_another_may_be_named() {
        let old = under("missing", team());
        for (verdict, verb) in [
            (ask(None, |s| delete(s, &old, Some("alice"))), "manage"),
            (ask(None, |s| reveal(s, &old, None, Some("alice"))), "view"),
        ] {
            let [denial] = verdict.denials.as_slice() else { panic!("{verdict:?}") };
            assert_eq!((denial.gate, denial.field), (Gate::Policy, "spec.accessPolicyRef"));
            assert!(denial.message.contains(&format!("nobody may {verb} the key")), "{}", denial.message);
        }
        for new in [under("open", team()), team()] {
            let verdict = ask(None, |s| update(s, &old, &new, None, Beside::default()));
            assert_eq!(gates(&verdict), (vec![], vec![Gate::Role]));
            assert_eq!(verdict.demands[0].field, "spec.accessPolicyRef");
        }
    }

    #[test]
    fn naming_another_policy_asks_the_one_before_about_itself_and_needs_no_manage() {
        for (policy, more) in [("open", vec![]), ("read", vec![Gate::Policy]), ("closed", vec![Gate::Policy])] {
            let verdict =
                ask(None, |s| update(s, &under(policy, team()), &under("open2", team()), None, Beside::default()));
            assert_eq!(gates(&verdict), (vec![], [vec![Gate::Role], more].concat()), "{policy}");
        }
        let verdict = ask(None, |s| update(s, &under("closed", team()), &team(), None, Beside::default()));
        assert_eq!(demands(&verdict)[1].2, "permission access-policies:UpdateAll", "the way out");
        let verdict = ask(None, |s| update(s, &under("mine", team()), &team(), Some("alice"), Beside::default()));
        assert_eq!(gates(&verdict).1, [Gate::Role], "Private: the creator of the key");
        let verdict = ask(None, |s| update(s, &under("mine", team()), &team(), Some("bob"), Beside::default()));
        assert_eq!(gates(&verdict).1, [Gate::Role, Gate::Policy], "and not the creator of the policy");
    }

    #[test]
    fn lowering_takes_no_contents_and_raising_takes_what_is_added() {
        let whole = spec(KeyType::SendYourData, &["Alerts"], &["logs.data-ingress:SendData"]);
        for lower in [
            spec(KeyType::SendYourData, &["Alerts"], &[]),
            spec(KeyType::SendYourData, &[], &["alerts:ReadConfig"]),
            ApiKeySpec { active: Some(false), ..whole.clone() },
        ] {
            assert_eq!(gates(&ask(None, |s| update(s, &whole, &lower, None, CHANGED))), (vec![], vec![Gate::Role]));
        }
        let raised = spec(KeyType::SendYourData, &["Alerts", "RUM"], &["logs.data-ingress:SendData"]);
        let verdict = ask(None, |s| update(s, &whole, &raised, None, CHANGED));
        assert_eq!(demands(&verdict)[1].2, "([preset RUM | (permission rum-ingress:SendData)])");
        // From its permissions to the preset: it may grow.
        let parts = spec(KeyType::SendYourData, &[], &["alerts:ReadConfig", "alerts:UpdateConfig"]);
        let verdict = ask(None, |s| update(s, &parts, &spec(KeyType::SendYourData, &["Alerts"], &[]), None, CHANGED));
        assert_eq!(demands(&verdict)[1].2, ALERTS);
        // Whoever raises a Team key holds all of it.
        let verdict = ask(None, |s| update(s, &team(), &spec(KeyType::Team, &["Alerts", "RUM"], &[]), None, CHANGED));
        assert!(demands(&verdict)[1].2.contains("preset Alerts") && demands(&verdict)[1].2.contains("preset RUM"));
    }

    fn requested(at: &str) -> Rotation {
        Rotation { requested_at: Some(at.to_owned()), ..Rotation::default() }
    }

    fn rotating(every: Option<&str>, overlap: Option<&str>) -> Rotation {
        Rotation { every: every.map(str::to_owned), overlap: overlap.map(str::to_owned), requested_at: None }
    }

    #[test]
    fn turning_on_extending_and_rotating_take_all_that_is_in_the_key_and_their_opposites_nothing() {
        let expiring = |at: &str| ApiKeySpec { expires_at: Some(at.to_owned()), ..team() };
        let with = |rotation: Option<Rotation>| ApiKeySpec { rotation, ..team() };
        let off = ApiKeySpec { active: Some(false), ..team() };
        let (early, late) = (expiring("2027-01-01T00:00:00Z"), expiring("2027-01-01T00:00:00-01:00"));
        let broken = expiring("2027-02-31T00:00:00Z");
        let mut cases = vec![];
        for (new, old, what) in [
            (team(), off.clone(), "turn on"),
            (late.clone(), early.clone(), "extend"),
            (expiring("9999-12-31T23:59:59Z"), early.clone(), "extend"),
            (team(), early.clone(), "extend"),
        ] {
            cases.push((old.clone(), new.clone(), Some(what)));
            cases.push((new, old, None));
        }
        let hourly = with(Some(rotating(Some("1h"), Some("30m"))));
        cases.extend([
            (ApiKeySpec { active: Some(true), ..team() }, team(), None),
            (broken.clone(), early.clone(), Some("extend")),
            (early.clone(), broken, Some("extend")),
            (team(), with(Some(requested("2026-11-25T10:00:00Z"))), Some("rotate")),
            (
                with(Some(requested("2026-11-25T10:00:00Z"))),
                with(Some(requested("2026-11-24T10:00:00Z"))),
                Some("rotate"),
            ),
            (with(Some(requested("2026-11-25T10:00:00Z"))), team(), None),
            (team(), hourly.clone(), Some("rotate")),
            (hourly.clone(), with(Some(rotating(Some("2h"), Some("30m")))), Some("rotate")),
            (hourly.clone(), team(), Some("rotate")),
            (hourly.clone(), with(Some(rotating(Some("1h"), Some("59m")))), Some("prolong the overlap of")),
            (hourly.clone(), with(Some(rotating(Some("1h"), None))), Some("prolong the overlap of")),
            (hourly.clone(), with(Some(rotating(Some("1h"), Some("1800s")))), None),
            (hourly, with(Some(rotating(Some("1h"), Some("0s")))), None),
        ]);
        for (old, new, what) in cases {
            for key_type in [KeyType::Team, KeyType::SendYourData] {
                let of_type = |spec: &ApiKeySpec| ApiKeySpec { key_type, ..spec.clone() };
                let verdict = ask(None, |s| update(s, &of_type(&old), &of_type(&new), None, Beside::default()));
                let contents: Vec<_> = verdict.demands.iter().filter(|d| d.gate == Gate::Contents).collect();
                let purposes: Vec<_> = contents.iter().map(|demand| demand.purpose.as_str()).collect();
                let expected = what.map(|what| format!("{what} a key that carries it"));
                assert_eq!(purposes, Vec::from_iter(expected.as_deref()), "{old:?} to {new:?}");
                assert!(contents.iter().all(|demand| words(&demand.need) == ALERTS));
            }
        }
        // So that members of data-scoped groups turn on no Team key.
        let told = ask(Some(&scoped()), |s| update(s, &off, &team(), None, Beside::default()));
        assert_eq!(gates(&told).0, [Gate::DataScope]);
        let told = ask(Some(&scoped()), |s| update(s, &team(), &off, None, Beside::default()));
        assert!(gates(&told).0.is_empty());
    }

    #[test]
    fn what_the_next_apply_removes_takes_the_rights_to_the_fields() {
        let fields = provenance::Change { fields: true, ..Default::default() };
        let verdict = |old: &ApiKeySpec, known| {
            ask(None, |s| update(s, old, old, Some("carol"), Beside { metadata: false, known }))
        };
        let told = |old: &ApiKeySpec, known| gates(&verdict(old, known));
        assert_eq!(told(&team(), provenance::Change::NOTHING), (vec![], vec![]));
        assert_eq!(told(&team(), fields), (vec![], vec![Gate::Provenance]));
        assert_eq!(told(&under("read", team()), fields).0, [Gate::Policy]);
        assert_eq!(told(&personal("bob"), fields).1, [Gate::Provenance, Gate::Provenance]);
        let policy = provenance::Change { policy: true, ..Default::default() };
        assert_eq!(demands(&verdict(&under("open", team()), policy))[0].2.matches("UpdateAccessPolicy").count(), 2);
        assert_eq!(told(&under("closed", team()), policy).1, [Gate::Provenance, Gate::Policy]);
        // Of what would come alive, all that is in the key.
        let (off, expiring, rotating) = (
            ApiKeySpec { active: Some(false), ..team() },
            ApiKeySpec { expires_at: Some("2027-01-01T00:00:00Z".to_owned()), ..team() },
            ApiKeySpec { rotation: Some(rotating(Some("1h"), None)), ..team() },
        );
        let removes = [
            (
                &off,
                provenance::Change { removes: provenance::Removes { active: true, ..Default::default() }, ..fields },
            ),
            (
                &expiring,
                provenance::Change { removes: provenance::Removes { expiry: true, ..Default::default() }, ..fields },
            ),
            (
                &rotating,
                provenance::Change { removes: provenance::Removes { rotation: true, ..Default::default() }, ..fields },
            ),
        ];
        for (spec, known) in removes {
            assert_eq!(told(spec, known).1, [Gate::Provenance, Gate::Contents], "{known:?}");
            assert_eq!(told(&team(), known).1, [Gate::Provenance], "there is nothing to remove: {known:?}");
        }
    }

    #[test]
    fn the_annotations_of_a_restore_are_for_those_who_may_restore() {
        let of = |creator, restored_by, accepts| Stamps { creator, restored_by, accepts };
        let told = |old: Option<Stamps<'_>>, new| gates(&stamps("alice", old.as_ref(), &new));
        let (yes, no, restore) = ((vec![], vec![]), (vec![Gate::Restore], vec![]), (vec![], vec![Gate::Restore]));
        assert_eq!(told(None, of(Some("alice"), None, None)), yes);
        assert_eq!(told(None, of(Some("carol"), Some("alice"), None)), restore);
        assert_eq!(told(None, of(Some("alice"), None, Some("sha256:00"))), restore);
        for forged in [of(None, None, None), of(Some("carol"), None, None), of(Some("carol"), Some("bob"), None)] {
            assert_eq!(told(None, forged), no, "{forged:?}");
        }
        let old = of(Some("carol"), Some("bob"), Some("sha256:00"));
        assert_eq!(told(Some(old), old), yes);
        assert_eq!(told(Some(old), Stamps { accepts: None, ..old }), yes, "taking it out is free");
        assert_eq!(told(Some(old), Stamps { accepts: Some("sha256:01"), ..old }), restore);
        assert_eq!(told(Some(old), Stamps { creator: Some("alice"), ..old }), no);
        assert_eq!(told(Some(old), Stamps { restored_by: None, ..old }), no);
        assert_eq!(
            stamps("alice", None, &of(Some("carol"), Some("alice"), None)).demands[0].need,
            Need::Right(Right::Restore)
        );
    }

    #[test]
    fn seeing_a_value_takes_the_view_role_read_of_the_policy_and_all_that_the_key_carries() {
        for (policy, denied) in [("open", false), ("read", false), ("closed", true), ("mine", true)] {
            let verdict = ask(None, |s| reveal(s, &under(policy, team()), None, Some("carol")));
            let denials = if denied { vec![Gate::Policy] } else { vec![] };
            assert_eq!(gates(&verdict), (denials, vec![Gate::Role, Gate::Contents]), "{policy}");
            assert!(verdict.ruling.is_some());
        }
        let verdict = ask(None, |s| reveal(s, &team(), None, None));
        assert_eq!(demands(&verdict)[0].2, "permission team-custom-api-keys:ReadConfig");
        assert_eq!(demands(&verdict)[1].2, ALERTS);
        // What is in force and not taken out yet counts, and what will be in a moment.
        let status = ApiKeyStatus { permissions: vec!["rum-ingress:SendData".to_owned()], ..Default::default() };
        let verdict = ask(None, |s| reveal(s, &team(), Some(&status), None));
        let need = &demands(&verdict)[1].2;
        assert!(need.contains("preset Alerts") && need.contains("permission rum-ingress:SendData"), "{need}");
    }

    #[test]
    fn a_policy_is_written_by_those_whom_it_lets_and_settings_by_their_own_permission() {
        let who = Person { name: "alice", groups: &[] };
        let team: BTreeSet<_> = [KeyType::Team].into();
        let both: BTreeSet<_> = [KeyType::Team, KeyType::SendYourData].into();
        for (types, own_spelling) in [(&BTreeSet::new(), true), (&team, true), (&both, false)] {
            let verdict = write_policy(who, None, types);
            assert_eq!(gates(&verdict), (vec![], vec![Gate::Role]));
            assert_eq!(demands(&verdict)[0].2.contains("team-custom-api-keys:UpdateAccessPolicy"), own_spelling);
        }
        for (old, more) in [
            (known(AccessMode::Private, vec![], None, "alice"), vec![]),
            (known(AccessMode::Private, vec![], None, "bob"), vec![Gate::Policy]),
            (known(AccessMode::Advanced, vec![], Some(AccessLevel::Manage), "bob"), vec![]),
            (known(AccessMode::Advanced, vec![], Some(AccessLevel::Read), "alice"), vec![Gate::Policy]),
        ] {
            let verdict = write_policy(who, Some(&old), &team);
            assert_eq!(gates(&verdict), (vec![], [vec![Gate::Role], more].concat()), "{old:?}");
        }
        assert_eq!(
            demands(&write_settings()),
            [(Gate::Role, "spec", "permission team-api-keys-security-settings:Manage".to_owned())]
        );
    }

    #[test]
    fn every_gate_has_a_reason_of_its_own() {
        let gates = [
            Gate::Role,
            Gate::Policy,
            Gate::Contents,
            Gate::DataScope,
            Gate::Owner,
            Gate::Import,
            Gate::Provenance,
            Gate::Restore,
        ];
        let reasons: BTreeSet<_> = gates.iter().map(|gate| gate.reason()).collect();
        assert_eq!(reasons.len(), gates.len());
        assert!(reasons.iter().all(|reason| reason.ends_with("Denied")));
    }
}
