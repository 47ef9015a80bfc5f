//! Property test of invariant S6: no sequence of requests gives a user, by a key, a permission that the user lacks.
//!
//! The model keeps keys and policies as the cluster does and asks [`authorization`] about each random request. It
//! checks each granted request against an independent version of the rules, in terms of sets of permissions.

#![cfg(test)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};

use super::{
    authorization::{self, Authorization, AuthorizationInputs, KnownPolicy, OtherChanges},
    catalog::Catalog,
    policy::{self, User},
    rights::{self, Right},
};
use crate::api::{
    AccessLevel, AccessMode, AccessPolicyRef, AccessPolicySpec, AccessRule, ApiKeySpec, ApiKeyStatus, KeyType,
    SecuritySettingsSpec,
};
use crate::test_support::{catalog_spec, key_spec, permission, preset};

const CASES: u32 = 3000;
const USERS: [&str; 3] = ["alice", "bob", "carol"];
const GROUPS: [&str; 3] = ["sre", "dev", "scoped"];
const PERMISSIONS: [&str; 5] = ["a:A", "b:B", "c:C", "d:D", "e:E"];
const PRESETS: [(&str, &[&str]); 4] =
    [("Pair", &["a:A", "b:B"]), ("Chain", &["b:B", "c:C"]), ("One", &["d:D"]), ("Empty", &[])];
const TYPES: [KeyType; 3] = [KeyType::Personal, KeyType::SendYourData, KeyType::Team];
const POLICIES: [&str; 2] = ["first", "second"];
const KEYS: u32 = 3;

fn catalog() -> Catalog {
    let spec = catalog_spec(
        PERMISSIONS.iter().map(|name| permission(name, false)).collect(),
        PRESETS.iter().map(|(name, permissions)| preset(name, false, permissions)).collect(),
    );
    Catalog::merge([("test", &spec)]).0
}

/// The permissions of gate 1. A user without any of them may do nothing.
fn role_permissions() -> BTreeSet<&'static str> {
    let of_type = |key_type| {
        let updates = rights::update_policy(key_type).iter().copied();
        [rights::manage(key_type, None), rights::view(key_type, None)].into_iter().chain(updates)
    };
    TYPES.into_iter().flat_map(of_type).collect()
}

/// A source of random choices, seeded by a number.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: u32) -> u32 {
        let taken = self.0 % u64::from(n);
        self.0 /= u64::from(n);
        u32::try_from(taken).unwrap()
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(u32::try_from(all.len()).unwrap()) as usize]
    }

    fn subset<T: Copy>(&mut self, all: &[T]) -> Vec<T> {
        all.iter().copied().filter(|_| self.coin()).collect()
    }
}

struct ModelUser {
    name: &'static str,
    groups: Vec<String>,
    rights: BTreeSet<Right>,
}

impl ModelUser {
    fn new(name: &'static str, seed: u64) -> Self {
        let mut choices = Choices(seed);
        let groups = choices.subset(&GROUPS).into_iter().map(str::to_owned).collect();
        let mut rights: BTreeSet<Right> = choices
            .subset(&PERMISSIONS)
            .into_iter()
            .chain(if choices.below(8) == 0 { vec![] } else { choices.subset(&Vec::from_iter(role_permissions())) })
            .map(|name| Right::Permission(name.into()))
            .collect();
        rights.extend(choices.subset(&PRESETS).into_iter().map(|(name, _)| Right::Preset(name.into())));
        rights.extend(choices.subset(&USERS).into_iter().map(|name| Right::Impersonate(name.into())));
        if choices.below(16) == 0 {
            rights.insert(Right::EveryPermission);
        }
        Self { name, groups, rights }
    }

    fn has(&self, right: &Right) -> bool {
        // As in RBAC, a rule without resourceNames covers every name.
        let every = matches!(right, Right::Permission(_)) && self.rights.contains(&Right::EveryPermission);
        every || self.rights.contains(right)
    }

    fn may(&self, name: &str) -> bool {
        self.has(&Right::Permission(name.into()))
    }

    /// Whether the user holds a permission, individually or by a preset.
    fn holds(&self, name: &str) -> bool {
        let by_preset = |(preset, permissions): &(&str, &[&str])| {
            permissions.contains(&name) && self.has(&Right::Preset((*preset).into()))
        };
        self.may(name) || PRESETS.iter().any(by_preset)
    }

    fn holds_all<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> bool {
        names.into_iter().all(|name| self.holds(name))
    }

    fn user(&self) -> User<'_> {
        User { name: self.name, groups: &self.groups }
    }

    fn is_scoped(&self) -> bool {
        self.groups.iter().any(|group| group == "scoped")
    }

    fn may_update_policy(&self, key_type: KeyType) -> bool {
        rights::update_policy(key_type).iter().any(|name| self.may(name))
    }
}

/// Every permission of a list of presets and permissions, computed independently of [`authorization::Contents`].
fn effective(presets: &[String], permissions: &[String]) -> BTreeSet<String> {
    let of_presets = PRESETS.iter().filter(|(name, _)| presets.iter().any(|p| p == name)).flat_map(|(_, all)| *all);
    permissions.iter().cloned().chain(of_presets.map(|name| (*name).to_owned())).collect()
}

fn of_spec(spec: &ApiKeySpec) -> BTreeSet<String> {
    effective(&spec.presets, &spec.permissions)
}

struct Key {
    spec: ApiKeySpec,
    status: Option<ApiKeyStatus>,
    creator: &'static str,
}

impl Key {
    fn carries(&self) -> BTreeSet<String> {
        let status = self.status.clone().unwrap_or_default();
        of_spec(&self.spec).into_iter().chain(effective(&status.presets, &status.permissions)).collect()
    }
}

struct Cluster {
    catalog: Catalog,
    settings: SecuritySettingsSpec,
    keys: BTreeMap<u32, Key>,
    policies: BTreeMap<&'static str, Arc<KnownPolicy>>,
    granted: BTreeMap<&'static str, u32>,
}

fn contents(choices: &mut Choices) -> (Vec<String>, Vec<String>) {
    // At most one of each, so that some requests are granted.
    let presets: Vec<_> = if choices.coin() { vec![choices.one_of(&PRESETS).0.to_owned()] } else { vec![] };
    let mut permissions: Vec<_> = if choices.coin() { vec![choices.one_of(&PERMISSIONS).to_owned()] } else { vec![] };
    if presets.is_empty() && permissions.is_empty() {
        permissions.push(PERMISSIONS[0].to_owned());
    }
    (presets, permissions)
}

fn reference(choices: &mut Choices) -> Option<AccessPolicyRef> {
    choices.coin().then(|| AccessPolicyRef { name: choices.one_of(&POLICIES).to_owned() })
}

fn policy_spec(choices: &mut Choices) -> AccessPolicySpec {
    const LEVELS: [AccessLevel; 3] = [AccessLevel::NoAccess, AccessLevel::Read, AccessLevel::Manage];
    if choices.below(4) == 0 {
        let mode = AccessMode::Private;
        return AccessPolicySpec { mode, rules: vec![], general_access: None, general_policy_access: None };
    }
    let mut rule = || AccessRule {
        groups: vec![choices.one_of(&GROUPS).to_owned()],
        access: choices.one_of(&LEVELS),
        policy_access: choices.coin().then(|| choices.one_of(&LEVELS)),
    };
    AccessPolicySpec {
        mode: AccessMode::Advanced,
        rules: vec![rule(), rule()],
        general_access: Some(choices.one_of(&LEVELS)),
        general_policy_access: choices.coin().then(|| choices.one_of(&LEVELS)),
    }
}

impl Cluster {
    fn new() -> Self {
        let settings = SecuritySettingsSpec { data_scoped_groups: vec!["scoped".to_owned()], ..Default::default() };
        let (keys, policies, granted) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { catalog: catalog(), settings, keys, policies, granted }
    }

    fn is_granted(&self, user: &ModelUser, authorize: impl FnOnce(&AuthorizationInputs<'_>) -> Authorization) -> bool {
        let policy = |name: &str| self.policies.get(name).cloned();
        let inputs = AuthorizationInputs {
            requester: user.user(),
            catalog: &self.catalog,
            settings: Some(&self.settings),
            policy: &policy,
        };
        let authorization = authorize(&inputs);
        authorization.denials.is_empty()
            && authorization.demands.iter().all(|demand| demand.need.is_met(&mut |r| user.has(r)))
    }

    /// The level that the policy of a key gives to a user. `NoAccess` if the policy does not exist.
    fn access(&self, user: &ModelUser, key: &Key) -> AccessLevel {
        let Some(reference) = &key.spec.access_policy_ref else { return AccessLevel::Manage };
        let policy = self.policies.get(reference.name.as_str());
        policy.map_or(AccessLevel::NoAccess, |policy| {
            policy::key_access(&policy.spec, Some(key.creator), user.user()).level
        })
    }

    /// Whether a user may change and delete a key: by role, by policy, and as the owner.
    fn manages(&self, user: &ModelUser, key: &Key) -> bool {
        let owner = key.spec.user.as_deref().unwrap_or(user.name);
        user.may(rights::manage(key.spec.key_type, None))
            && self.access(user, key) == AccessLevel::Manage
            && (owner == user.name || user.has(&Right::Impersonate(owner.into())))
    }

    fn count(&mut self, action: &'static str) {
        *self.granted.entry(action).or_default() += 1;
    }

    /// Makes one random request. An error if the answer violates a rule.
    fn request(&mut self, user: &ModelUser, seed: u64) -> Result<(), TestCaseError> {
        let mut choices = Choices(seed);
        let slot = choices.below(KEYS);
        match (choices.below(8), self.keys.contains_key(&slot)) {
            (0, true) => self.delete(user, slot),
            (1 | 2, true) => self.update(user, slot, &mut choices),
            (3, true) => self.set_policy_ref(user, slot, &mut choices),
            (4, true) => self.reveal(user, slot),
            (5, _) => self.write_policy(user, &mut choices),
            (6, true) => {
                // The operator accepts the spec. Until then the status has the previous grants.
                let key = self.keys.get_mut(&slot).unwrap();
                let (presets, permissions) = (key.spec.presets.clone(), key.spec.permissions.clone());
                key.status = Some(ApiKeyStatus { presets, permissions, ..Default::default() });
                Ok(())
            }
            (_, false) => self.create(user, slot, &mut choices),
            _ => Ok(()),
        }
    }

    fn create(&mut self, user: &ModelUser, slot: u32, choices: &mut Choices) -> Result<(), TestCaseError> {
        let key_type = choices.one_of(&TYPES);
        let (presets, permissions) = contents(choices);
        let mut spec = ApiKeySpec { presets, permissions, ..key_spec(key_type, &[], &[]) };
        if key_type == KeyType::Personal {
            spec.user = Some(choices.one_of(&USERS).to_owned());
        } else {
            spec.access_policy_ref = reference(choices);
        }
        if !self.is_granted(user, |s| authorization::create(s, &spec, "x")) {
            return Ok(());
        }
        prop_assert!(user.may(rights::manage(key_type, None)), "created without the role: {spec:?}");
        prop_assert!(user.holds_all(&of_spec(&spec)), "created with permissions that the creator lacks: {spec:?}");
        prop_assert!(spec.access_policy_ref.is_none() || user.may_update_policy(key_type));
        prop_assert!(key_type != KeyType::Team || !user.is_scoped(), "a Team key by a data-scoped user");
        if let Some(owner) = &spec.user {
            let may = owner == user.name || user.has(&Right::Impersonate(owner.as_str().into()));
            prop_assert!(may, "created a Personal key of another user");
        }
        self.keys.insert(slot, Key { spec, status: None, creator: user.name });
        self.count("create");
        Ok(())
    }

    fn update(&mut self, user: &ModelUser, slot: u32, choices: &mut Choices) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        let mut new = key.spec.clone();
        let was_inactive = new.active == Some(false);
        let only_lowers = !was_inactive && choices.coin();
        if only_lowers {
            new.presets.pop();
            new.permissions.pop();
            new.active = Some(false);
        } else if was_inactive && choices.below(4) > 0 {
            new.active = None;
        } else {
            (new.presets, new.permissions) = contents(choices);
        }
        if choices.below(4) == 0 && new.key_type != KeyType::Personal {
            new.access_policy_ref = reference(choices);
        }
        let key_type = new.key_type;
        let policy_ref_changed = new.access_policy_ref != key.spec.access_policy_ref;
        if new == key.spec {
            return Ok(());
        }
        let others_changed = new != ApiKeySpec { access_policy_ref: new.access_policy_ref.clone(), ..key.spec.clone() };
        let changes = OtherChanges::default();
        let granted = self.is_granted(user, |s| authorization::update(s, &key.spec, &new, Some(key.creator), changes));
        let manages = self.manages(user, key);
        if !granted {
            prop_assert!(!(only_lowers && manages && !policy_ref_changed), "a reduction was denied: {new:?}");
            return Ok(());
        }
        let (before, after) = (of_spec(&key.spec), of_spec(&new));
        let raised = !after.is_subset(&before);
        prop_assert!(manages || !others_changed, "changed without Manage: {new:?}");
        prop_assert!(user.may_update_policy(key_type) || !policy_ref_changed, "changed the policy without the role");
        prop_assert!(user.holds_all(after.difference(&before)), "added permissions that the user lacks: {new:?}");
        if raised && key_type == KeyType::Team {
            prop_assert!(user.holds_all(&after) && !user.is_scoped(), "added permissions to a Team key: {new:?}");
        }
        let activated = key.spec.active == Some(false) && new.active != Some(false);
        if activated {
            prop_assert!(user.holds_all(&after), "activated with permissions that the user lacks: {new:?}");
            prop_assert!(key_type != KeyType::Team || !user.is_scoped(), "a Team key by a data-scoped user");
        }
        self.keys.get_mut(&slot).unwrap().spec = new;
        self.count(if raised {
            "raise"
        } else if activated {
            "activate"
        } else {
            "lower"
        });
        Ok(())
    }

    fn set_policy_ref(&mut self, user: &ModelUser, slot: u32, choices: &mut Choices) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        if key.spec.key_type == KeyType::Personal {
            return Ok(());
        }
        let new = ApiKeySpec { access_policy_ref: reference(choices), ..key.spec.clone() };
        if !self
            .is_granted(user, |s| authorization::update(s, &key.spec, &new, Some(key.creator), OtherChanges::default()))
        {
            return Ok(());
        }
        if new == key.spec {
            return Ok(());
        }
        prop_assert!(user.may_update_policy(new.key_type), "changed the policy without the role");
        let old = key.spec.access_policy_ref.as_ref().and_then(|r| self.policies.get(r.name.as_str()));
        if let Some(old) = old {
            let creator = (old.spec.mode == AccessMode::Private).then_some(key.creator);
            let level = policy::policy_access(&old.spec, creator, user.user()).level;
            let may = level == AccessLevel::Manage || user.may(rights::UPDATE_ALL_POLICIES);
            prop_assert!(may, "the previous policy forbids the change: {old:?}");
        }

        self.keys.get_mut(&slot).unwrap().spec = new;
        self.count("set policy ref");
        Ok(())
    }

    fn delete(&mut self, user: &ModelUser, slot: u32) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        let granted = self.is_granted(user, |s| authorization::delete(s, &key.spec, Some(key.creator)));
        let may = self.manages(user, key);
        prop_assert_eq!(granted, may);
        if granted {
            self.keys.remove(&slot);
            self.count("delete");
        }
        Ok(())
    }

    fn reveal(&mut self, user: &ModelUser, slot: u32) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        if !self.is_granted(user, |s| authorization::reveal(s, &key.spec, key.status.as_ref(), Some(key.creator))) {
            return Ok(());
        }
        prop_assert!(user.holds_all(&key.carries()), "revealed permissions that the user lacks: {:?}", key.spec);
        prop_assert!(user.may(rights::view(key.spec.key_type, None)), "revealed without the role");
        prop_assert!(self.access(user, key) >= AccessLevel::Read, "revealed against the policy");
        let is_owner = key.spec.user.as_deref().is_none_or(|owner| owner == user.name);
        prop_assert!(is_owner, "revealed the Personal key of another user");
        prop_assert!(key.spec.key_type != KeyType::Team || !user.is_scoped(), "revealed to a data-scoped user");
        self.count("reveal");
        Ok(())
    }

    fn write_policy(&mut self, user: &ModelUser, choices: &mut Choices) -> Result<(), TestCaseError> {
        let name = choices.one_of(&POLICIES);
        let old = self.policies.get(name).cloned();
        let refers = |key: &&Key| key.spec.access_policy_ref.as_ref().is_some_and(|reference| reference.name == name);
        let types: BTreeSet<_> = self.keys.values().filter(refers).map(|key| key.spec.key_type).collect();
        if !self.is_granted(user, |s| authorization::write_policy(s.requester, old.as_deref(), &types)) {
            return Ok(());
        }
        for key_type in &types {
            prop_assert!(user.may_update_policy(*key_type), "changed a policy of {key_type:?} keys without the role");
        }
        prop_assert!(user.may_update_policy(KeyType::Team), "changed a policy without any role");
        if let Some(old) = &old {
            let level = policy::policy_access(&old.spec, old.creator.as_deref(), user.user()).level;
            prop_assert!(level == AccessLevel::Manage || user.may(rights::UPDATE_ALL_POLICIES));
        }
        if old.is_some() && choices.below(4) == 0 {
            self.policies.remove(name);
        } else {
            let creator = old.map_or_else(|| Some(user.name.to_owned()), |old| old.creator.clone());
            self.policies.insert(name, Arc::new(KnownPolicy { spec: policy_spec(choices), creator }));
        }
        self.count("write policy");
        Ok(())
    }
}

#[test]
fn no_sequence_of_requests_grants_a_permission_that_the_user_lacks() {
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    // A fixed seed, so that every run has the same cases.
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let scenario = (any::<[u64; 3]>(), vec((0..USERS.len(), any::<u64>()), 1..40));
    let total = std::cell::RefCell::new(BTreeMap::<&str, u32>::new());
    let outcome = runner.run(&scenario, |(seeds, requests)| {
        let users: Vec<_> = USERS.into_iter().zip(seeds).map(|(name, seed)| ModelUser::new(name, seed)).collect();
        let mut cluster = Cluster::new();
        for (index, seed) in requests {
            let user = &users[index];
            let before = cluster.granted.values().sum::<u32>();
            cluster.request(user, seed)?;
            let changed = cluster.granted.values().sum::<u32>() > before;
            let has_no_role = !role_permissions().iter().any(|role| user.may(role));
            prop_assert!(!(has_no_role && changed), "a request of {} without any role was granted", user.name);
        }
        for (action, count) in cluster.granted {
            *total.borrow_mut().entry(action).or_default() += count;
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    // The test is meaningful only if each kind of request is granted often enough.
    let total = total.into_inner();
    for action in ["create", "raise", "activate", "lower", "set policy ref", "delete", "reveal", "write policy"] {
        assert!(total.get(action).is_some_and(|count| *count > 100), "{action} is rarely granted: {total:?}");
    }
}
