//! What a request comes to: who may create, change, delete and reveal keys, and change policies.
//!
//! Gate 1 is the role: the seed's permission table. Gate 2 is the access policy. Beside them, nobody attaches to a key
//! or sees by a key what they lack. Each function here is pure: it says what is denied outright, and which rights have
//! to be asked for; [`crate::access`] asks.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    catalog::Catalog,
    policy::{self, Person, Ruling},
    rights::{self, Need, Right, UPDATE_ALL_POLICIES},
};
use crate::api::{AccessLevel, AccessPolicySpec, ApiKeySpec, ApiKeyStatus, KeyType, SecuritySettingsSpec};

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

impl Demand {
    /// What somebody is told who lacks these rights.
    #[must_use]
    pub fn lacking(&self, who: &str, namespace: &str, missing: &[Right]) -> String {
        const MOST: usize = 5;
        let names: Vec<_> = missing.iter().take(MOST).map(ToString::to_string).collect();
        let rest = missing.len().saturating_sub(MOST);
        let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
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
    verdict.attach(situation, new, &Contents::of_spec(new, situation.catalog), "create");
    verdict
}

/// To change a key. `touched` says whether anything but `spec.accessPolicyRef` changes: fields of the spec, or
/// metadata that people own.
#[must_use]
pub fn update(
    situation: &Situation<'_>,
    old: &ApiKeySpec,
    new: &ApiKeySpec,
    creator: Option<&str>,
    touched: bool,
) -> Verdict {
    let mut verdict = Verdict::default();
    let kind = kind(new);
    if touched {
        verdict.demand(Gate::Role, "spec", format!("change {kind}"), manage(new));
        verdict.consult(situation, old, creator, AccessLevel::Manage);
    }
    if old.access_policy_ref != new.access_policy_ref {
        let need = rights::any_permission(rights::update_policy(new.key_type));
        verdict.demand(Gate::Role, "spec.accessPolicyRef", format!("change the access policy of {kind}"), need);
        let before = old.access_policy_ref.as_ref().and_then(|reference| (situation.policy)(&reference.name));
        // A policy that is missing protects nothing, and to name another is the way out of it.
        if let Some(before) = before {
            let creator = if before.spec.mode == crate::api::AccessMode::Private { creator } else { None };
            verdict.consult_policy(&before.spec, creator, situation.who, "spec.accessPolicyRef");
        }
    }
    let (before, after) = (Contents::of_spec(old, situation.catalog), Contents::of_spec(new, situation.catalog));
    let added = after.beyond(&before, situation.catalog);
    if !added.is_empty() {
        // Whoever raises a Team key holds all that is in it afterwards, as whoever creates one.
        let wanted = if new.key_type == KeyType::Team { &after } else { &added };
        verdict.attach(situation, new, wanted, "raise the rights of");
    }
    verdict
}

/// To delete a key.
#[must_use]
pub fn delete(situation: &Situation<'_>, old: &ApiKeySpec, creator: Option<&str>) -> Verdict {
    let mut verdict = Verdict::default();
    verdict.demand(Gate::Role, "spec.type", format!("delete {}", kind(old)), manage(old));
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

/// To create, change or delete security settings.
#[must_use]
pub fn write_settings() -> Verdict {
    let mut verdict = Verdict::default();
    let need = Need::permission(rights::MANAGE_SETTINGS);
    verdict.demand(Gate::Role, "spec", "write the security settings".to_owned(), need);
    verdict
}

impl Verdict {
    fn demand(&mut self, gate: Gate, field: &'static str, purpose: String, need: Need) {
        if need != Need::NOTHING {
            self.demands.push(Demand { gate, field, purpose, need });
        }
    }

    fn deny(&mut self, gate: Gate, field: &'static str, message: String) {
        self.denials.push(Denial { gate, field, message });
    }

    /// What putting these contents into a key takes.
    fn attach(&mut self, situation: &Situation<'_>, spec: &ApiKeySpec, contents: &Contents, what: &str) {
        match spec.key_type {
            KeyType::Personal => {
                let user = spec.user.as_deref().unwrap_or_default();
                if user != situation.who.name {
                    let need = Need::Right(Right::Impersonate(user.into()));
                    self.demand(Gate::Owner, "spec.user", format!("{what} a Personal key of {user}"), need);
                }
            }
            KeyType::Team => self.check_data_scope(situation, "spec.type", what),
            KeyType::SendYourData => {}
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
            assert_eq!(told(update(s, &lower, &team(), None, true)), [(Gate::DataScope, "spec.type")]);
            assert!(told(update(s, &team(), &lower, None, true)).is_empty(), "lowering shows nothing");
            assert!(told(delete(s, &team(), None)).is_empty());
            for other in [spec(KeyType::SendYourData, &["SendData"], &[]), personal("alice")] {
                assert!(told(create(s, &other, "x")).is_empty());
                assert!(told(reveal(s, &other, None, None)).is_empty());
            }
        });
    }

    #[test]
    fn a_personal_key_is_for_its_user_or_one_whom_the_creator_may_impersonate() {
        let own = ask(None, |s| create(s, &personal("alice"), "x"));
        assert_eq!(gates(&own), (vec![], vec![Gate::Role, Gate::Contents]));
        let other = ask(None, |s| create(s, &personal("bob"), "x"));
        assert_eq!(demands(&other)[1], (Gate::Owner, "spec.user", "impersonate bob".to_owned()));
        let raised = ApiKeySpec { permissions: vec!["alerts:UpdateConfig".to_owned()], ..personal("bob") };
        let raised = ask(None, |s| update(s, &personal("bob"), &raised, None, true));
        assert_eq!(gates(&raised).1, [Gate::Role, Gate::Owner, Gate::Contents]);
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
            let verdict = ask(None, |s| update(s, &old, &renamed(&old), Some("carol"), true));
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
            let verdict = ask(None, |s| update(s, &old, &new, None, false));
            assert_eq!(gates(&verdict), (vec![], vec![Gate::Role]));
            assert_eq!(verdict.demands[0].field, "spec.accessPolicyRef");
        }
    }

    #[test]
    fn naming_another_policy_asks_the_one_before_about_itself_and_needs_no_manage() {
        for (policy, more) in [("open", vec![]), ("read", vec![Gate::Policy]), ("closed", vec![Gate::Policy])] {
            let verdict = ask(None, |s| update(s, &under(policy, team()), &under("open2", team()), None, false));
            assert_eq!(gates(&verdict), (vec![], [vec![Gate::Role], more].concat()), "{policy}");
        }
        let verdict = ask(None, |s| update(s, &under("closed", team()), &team(), None, false));
        assert_eq!(demands(&verdict)[1].2, "permission access-policies:UpdateAll", "the way out");
        let verdict = ask(None, |s| update(s, &under("mine", team()), &team(), Some("alice"), false));
        assert_eq!(gates(&verdict).1, [Gate::Role], "Private: the creator of the key");
        let verdict = ask(None, |s| update(s, &under("mine", team()), &team(), Some("bob"), false));
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
            assert_eq!(gates(&ask(None, |s| update(s, &whole, &lower, None, true))), (vec![], vec![Gate::Role]));
        }
        let raised = spec(KeyType::SendYourData, &["Alerts", "RUM"], &["logs.data-ingress:SendData"]);
        let verdict = ask(None, |s| update(s, &whole, &raised, None, true));
        assert_eq!(demands(&verdict)[1].2, "([preset RUM | (permission rum-ingress:SendData)])");
        // From its permissions to the preset: it may grow.
        let parts = spec(KeyType::SendYourData, &[], &["alerts:ReadConfig", "alerts:UpdateConfig"]);
        let verdict = ask(None, |s| update(s, &parts, &spec(KeyType::SendYourData, &["Alerts"], &[]), None, true));
        assert_eq!(demands(&verdict)[1].2, ALERTS);
        // Whoever raises a Team key holds all of it.
        let verdict = ask(None, |s| update(s, &team(), &spec(KeyType::Team, &["Alerts", "RUM"], &[]), None, true));
        assert!(demands(&verdict)[1].2.contains("preset Alerts") && demands(&verdict)[1].2.contains("preset RUM"));
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
        let gates = [Gate::Role, Gate::Policy, Gate::Contents, Gate::DataScope, Gate::Owner, Gate::Import];
        let reasons: BTreeSet<_> = gates.iter().map(|gate| gate.reason()).collect();
        assert_eq!(reasons.len(), gates.len());
        assert!(reasons.iter().all(|reason| reason.ends_with("Denied")));
    }
}
