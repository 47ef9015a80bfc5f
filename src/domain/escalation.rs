//! S6, tried at random: whatever people with whatever rights ask for, in whatever order, nobody gets by a key what they
//! lack.
//!
//! The model keeps keys and policies as the cluster would, lets [`gates`] judge each request, and holds what was granted
//! against rules that are written here once more, in terms of sets of permissions alone.

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
    catalog::{
        Catalog,
        tests::{permission, preset, spec as catalog_spec},
    },
    gates::{self, Beside, KnownPolicy, Situation, Verdict},
    policy::{self, Person},
    rights::{self, Right},
    validate::tests::spec as key_spec,
};
use crate::api::{
    AccessLevel, AccessMode, AccessPolicyRef, AccessPolicySpec, AccessRule, ApiKeySpec, ApiKeyStatus, KeyType,
    SecuritySettingsSpec,
};

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

/// The permissions that let somebody do anything at all.
fn roles() -> BTreeSet<&'static str> {
    let of_type = |key_type| {
        let updates = rights::update_policy(key_type).iter().copied();
        [rights::manage(key_type, None), rights::view(key_type, None)].into_iter().chain(updates)
    };
    TYPES.into_iter().flat_map(of_type).collect()
}

/// Takes random bits off a number.
struct Bits(u64);

impl Bits {
    fn below(&mut self, n: u32) -> u32 {
        let taken = self.0 % u64::from(n);
        self.0 /= u64::from(n);
        u32::try_from(taken).unwrap()
    }

    fn chance(&mut self) -> bool {
        self.below(2) == 1
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(u32::try_from(all.len()).unwrap()) as usize]
    }

    fn some<T: Copy>(&mut self, all: &[T]) -> Vec<T> {
        all.iter().copied().filter(|_| self.chance()).collect()
    }
}

struct User {
    name: &'static str,
    groups: Vec<String>,
    rights: BTreeSet<Right>,
}

impl User {
    fn new(name: &'static str, seed: u64) -> Self {
        let mut bits = Bits(seed);
        let groups = bits.some(&GROUPS).into_iter().map(str::to_owned).collect();
        let mut rights: BTreeSet<Right> = bits
            .some(&PERMISSIONS)
            .into_iter()
            .chain(if bits.below(8) == 0 { vec![] } else { bits.some(&Vec::from_iter(roles())) })
            .map(|name| Right::Permission(name.into()))
            .collect();
        rights.extend(bits.some(&PRESETS).into_iter().map(|(name, _)| Right::Preset(name.into())));
        rights.extend(bits.some(&USERS).into_iter().map(|name| Right::Impersonate(name.into())));
        if bits.below(16) == 0 {
            rights.insert(Right::EveryPermission);
        }
        Self { name, groups, rights }
    }

    fn has(&self, right: &Right) -> bool {
        // As RBAC: who may use every name may use each.
        let every = matches!(right, Right::Permission(_)) && self.rights.contains(&Right::EveryPermission);
        every || self.rights.contains(right)
    }

    fn may(&self, name: &str) -> bool {
        self.has(&Right::Permission(name.into()))
    }

    /// Whether the user holds a permission, by itself or by a preset.
    fn holds(&self, name: &str) -> bool {
        let by_preset = |(preset, permissions): &(&str, &[&str])| {
            permissions.contains(&name) && self.has(&Right::Preset((*preset).into()))
        };
        self.may(name) || PRESETS.iter().any(by_preset)
    }

    fn holds_all<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> bool {
        names.into_iter().all(|name| self.holds(name))
    }

    fn person(&self) -> Person<'_> {
        Person { name: self.name, groups: &self.groups }
    }

    fn is_scoped(&self) -> bool {
        self.groups.iter().any(|group| group == "scoped")
    }

    fn may_update_policy(&self, key_type: KeyType) -> bool {
        rights::update_policy(key_type).iter().any(|name| self.may(name))
    }
}

/// Every permission of a list of presets and permissions, without a look at [`gates::Contents`].
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

fn contents(bits: &mut Bits) -> (Vec<String>, Vec<String>) {
    // Few of each, so that some requests are granted.
    let presets: Vec<_> = if bits.chance() { vec![bits.of(&PRESETS).0.to_owned()] } else { vec![] };
    let mut permissions: Vec<_> = if bits.chance() { vec![bits.of(&PERMISSIONS).to_owned()] } else { vec![] };
    if presets.is_empty() && permissions.is_empty() {
        permissions.push(PERMISSIONS[0].to_owned());
    }
    (presets, permissions)
}

fn reference(bits: &mut Bits) -> Option<AccessPolicyRef> {
    bits.chance().then(|| AccessPolicyRef { name: bits.of(&POLICIES).to_owned() })
}

fn policy_spec(bits: &mut Bits) -> AccessPolicySpec {
    const LEVELS: [AccessLevel; 3] = [AccessLevel::NoAccess, AccessLevel::Read, AccessLevel::Manage];
    if bits.below(4) == 0 {
        let mode = AccessMode::Private;
        return AccessPolicySpec { mode, rules: vec![], general_access: None, general_policy_access: None };
    }
    let mut rule = || AccessRule {
        groups: vec![bits.of(&GROUPS).to_owned()],
        access: bits.of(&LEVELS),
        policy_access: bits.chance().then(|| bits.of(&LEVELS)),
    };
    AccessPolicySpec {
        mode: AccessMode::Advanced,
        rules: vec![rule(), rule()],
        general_access: Some(bits.of(&LEVELS)),
        general_policy_access: bits.chance().then(|| bits.of(&LEVELS)),
    }
}

impl Cluster {
    fn new() -> Self {
        let settings = SecuritySettingsSpec { data_scoped_groups: vec!["scoped".to_owned()], ..Default::default() };
        let (keys, policies, granted) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { catalog: catalog(), settings, keys, policies, granted }
    }

    fn judge(&self, user: &User, question: impl FnOnce(&Situation<'_>) -> Verdict) -> bool {
        let policy = |name: &str| self.policies.get(name).cloned();
        let situation =
            Situation { who: user.person(), catalog: &self.catalog, settings: Some(&self.settings), policy: &policy };
        let verdict = question(&situation);
        verdict.denials.is_empty() && verdict.demands.iter().all(|demand| demand.need.is_met(&mut |r| user.has(r)))
    }

    /// How much the policy of a key gives to a user. Nothing, if it is missing.
    fn access(&self, user: &User, key: &Key) -> AccessLevel {
        let Some(reference) = &key.spec.access_policy_ref else { return AccessLevel::Manage };
        let policy = self.policies.get(reference.name.as_str());
        policy.map_or(AccessLevel::NoAccess, |policy| {
            policy::key_access(&policy.spec, Some(key.creator), user.person()).level
        })
    }

    /// Whether a user may change and delete a key: by the role, the policy, and as the owner.
    fn manages(&self, user: &User, key: &Key) -> bool {
        let owner = key.spec.user.as_deref().unwrap_or(user.name);
        user.may(rights::manage(key.spec.key_type, None))
            && self.access(user, key) == AccessLevel::Manage
            && (owner == user.name || user.has(&Right::Impersonate(owner.into())))
    }

    fn count(&mut self, what: &'static str) {
        *self.granted.entry(what).or_default() += 1;
    }

    /// One request; an error if it was granted and must not have been, or the other way round.
    fn request(&mut self, user: &User, seed: u64) -> Result<(), TestCaseError> {
        let mut bits = Bits(seed);
        let slot = bits.below(KEYS);
        match (bits.below(8), self.keys.contains_key(&slot)) {
            (0, true) => self.delete(user, slot),
            (1 | 2, true) => self.update(user, slot, &mut bits),
            (3, true) => self.name_policy(user, slot, &mut bits),
            (4, true) => self.reveal(user, slot),
            (5, _) => self.write_policy(user, &mut bits),
            (6, true) => {
                // The operator takes in the spec: until then the status says what was before.
                let key = self.keys.get_mut(&slot).unwrap();
                let (presets, permissions) = (key.spec.presets.clone(), key.spec.permissions.clone());
                key.status = Some(ApiKeyStatus { presets, permissions, ..Default::default() });
                Ok(())
            }
            (_, false) => self.create(user, slot, &mut bits),
            _ => Ok(()),
        }
    }

    fn create(&mut self, user: &User, slot: u32, bits: &mut Bits) -> Result<(), TestCaseError> {
        let key_type = bits.of(&TYPES);
        let (presets, permissions) = contents(bits);
        let mut spec = ApiKeySpec { presets, permissions, ..key_spec(key_type, &[], &[]) };
        if key_type == KeyType::Personal {
            spec.user = Some(bits.of(&USERS).to_owned());
        } else {
            spec.access_policy_ref = reference(bits);
        }
        if !self.judge(user, |s| gates::create(s, &spec, "x")) {
            return Ok(());
        }
        prop_assert!(user.may(rights::manage(key_type, None)), "created without the role: {spec:?}");
        prop_assert!(user.holds_all(&of_spec(&spec)), "created with more than the creator has: {spec:?}");
        prop_assert!(spec.access_policy_ref.is_none() || user.may_update_policy(key_type));
        prop_assert!(key_type != KeyType::Team || !user.is_scoped(), "a Team key by a data-scoped person");
        if let Some(owner) = &spec.user {
            let may = owner == user.name || user.has(&Right::Impersonate(owner.as_str().into()));
            prop_assert!(may, "a Personal key of somebody else");
        }
        self.keys.insert(slot, Key { spec, status: None, creator: user.name });
        self.count("create");
        Ok(())
    }

    fn update(&mut self, user: &User, slot: u32, bits: &mut Bits) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        let mut new = key.spec.clone();
        let off = new.active == Some(false);
        let lower = !off && bits.chance();
        if lower {
            new.presets.pop();
            new.permissions.pop();
            new.active = Some(false);
        } else if off && bits.below(4) > 0 {
            new.active = None;
        } else {
            (new.presets, new.permissions) = contents(bits);
        }
        if bits.below(4) == 0 && new.key_type != KeyType::Personal {
            new.access_policy_ref = reference(bits);
        }
        let key_type = new.key_type;
        let renamed = new.access_policy_ref != key.spec.access_policy_ref;
        if new == key.spec {
            return Ok(());
        }
        let touched = new != ApiKeySpec { access_policy_ref: new.access_policy_ref.clone(), ..key.spec.clone() };
        let beside = Beside::default();
        let granted = self.judge(user, |s| gates::update(s, &key.spec, &new, Some(key.creator), beside));
        let manages = self.manages(user, key);
        if !granted {
            prop_assert!(!(lower && manages && !renamed), "lowering was refused: {new:?}");
            return Ok(());
        }
        let (before, after) = (of_spec(&key.spec), of_spec(&new));
        let raised = !after.is_subset(&before);
        prop_assert!(manages || !touched, "changed without Manage: {new:?}");
        prop_assert!(user.may_update_policy(key_type) || !renamed, "another policy without the role");
        prop_assert!(user.holds_all(after.difference(&before)), "raised to more than the person has: {new:?}");
        if raised && key_type == KeyType::Team {
            prop_assert!(user.holds_all(&after) && !user.is_scoped(), "a Team key raised: {new:?}");
        }
        let revived = key.spec.active == Some(false) && new.active != Some(false);
        if revived {
            prop_assert!(user.holds_all(&after), "turned on with more than the person has: {new:?}");
            prop_assert!(key_type != KeyType::Team || !user.is_scoped(), "a Team key by a data-scoped person");
        }
        self.keys.get_mut(&slot).unwrap().spec = new;
        self.count(if raised {
            "raise"
        } else if revived {
            "turn on"
        } else {
            "lower"
        });
        Ok(())
    }

    fn name_policy(&mut self, user: &User, slot: u32, bits: &mut Bits) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        if key.spec.key_type == KeyType::Personal {
            return Ok(());
        }
        let new = ApiKeySpec { access_policy_ref: reference(bits), ..key.spec.clone() };
        if !self.judge(user, |s| gates::update(s, &key.spec, &new, Some(key.creator), Beside::default())) {
            return Ok(());
        }
        if new == key.spec {
            return Ok(());
        }
        prop_assert!(user.may_update_policy(new.key_type), "another policy without the role");
        let old = key.spec.access_policy_ref.as_ref().and_then(|r| self.policies.get(r.name.as_str()));
        if let Some(old) = old {
            let creator = (old.spec.mode == AccessMode::Private).then_some(key.creator);
            let level = policy::policy_access(&old.spec, creator, user.person()).level;
            let may = level == AccessLevel::Manage || user.may(rights::UPDATE_ALL_POLICIES);
            prop_assert!(may, "the policy before does not let them: {old:?}");
        }

        self.keys.get_mut(&slot).unwrap().spec = new;
        self.count("name policy");
        Ok(())
    }

    fn delete(&mut self, user: &User, slot: u32) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        let granted = self.judge(user, |s| gates::delete(s, &key.spec, Some(key.creator)));
        let may = self.manages(user, key);
        prop_assert_eq!(granted, may);
        if granted {
            self.keys.remove(&slot);
            self.count("delete");
        }
        Ok(())
    }

    fn reveal(&mut self, user: &User, slot: u32) -> Result<(), TestCaseError> {
        let key = &self.keys[&slot];
        if !self.judge(user, |s| gates::reveal(s, &key.spec, key.status.as_ref(), Some(key.creator))) {
            return Ok(());
        }
        prop_assert!(user.holds_all(&key.carries()), "revealed more than the person has: {:?}", key.spec);
        prop_assert!(user.may(rights::view(key.spec.key_type, None)), "revealed without the role");
        prop_assert!(self.access(user, key) >= AccessLevel::Read, "revealed past the policy");
        prop_assert!(key.spec.user.as_deref().is_none_or(|owner| owner == user.name), "somebody else's Personal key");
        prop_assert!(key.spec.key_type != KeyType::Team || !user.is_scoped(), "a Team key to a data-scoped person");
        self.count("reveal");
        Ok(())
    }

    fn write_policy(&mut self, user: &User, bits: &mut Bits) -> Result<(), TestCaseError> {
        let name = bits.of(&POLICIES);
        let old = self.policies.get(name).cloned();
        let refers = |key: &&Key| key.spec.access_policy_ref.as_ref().is_some_and(|reference| reference.name == name);
        let types: BTreeSet<_> = self.keys.values().filter(refers).map(|key| key.spec.key_type).collect();
        if !self.judge(user, |s| gates::write_policy(s.who, old.as_deref(), &types)) {
            return Ok(());
        }
        for key_type in &types {
            prop_assert!(user.may_update_policy(*key_type), "a policy of {key_type:?} keys, without the role");
        }
        prop_assert!(user.may_update_policy(KeyType::Team), "a policy without any role");
        if let Some(old) = &old {
            let level = policy::policy_access(&old.spec, old.creator.as_deref(), user.person()).level;
            prop_assert!(level == AccessLevel::Manage || user.may(rights::UPDATE_ALL_POLICIES));
        }
        if old.is_some() && bits.below(4) == 0 {
            self.policies.remove(name);
        } else {
            let creator = old.map_or_else(|| Some(user.name.to_owned()), |old| old.creator.clone());
            self.policies.insert(name, Arc::new(KnownPolicy { spec: policy_spec(bits), creator }));
        }
        self.count("write policy");
        Ok(())
    }
}

#[test]
fn nobody_gets_by_a_key_what_they_lack() {
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    // The same cases each time.
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let scenario = (any::<[u64; 3]>(), vec((0..USERS.len(), any::<u64>()), 1..40));
    let total = std::cell::RefCell::new(BTreeMap::<&str, u32>::new());
    let outcome = runner.run(&scenario, |(seeds, requests)| {
        let users: Vec<_> = USERS.into_iter().zip(seeds).map(|(name, seed)| User::new(name, seed)).collect();
        let mut cluster = Cluster::new();
        for (index, seed) in requests {
            let user = &users[index];
            let before = cluster.granted.values().sum::<u32>();
            cluster.request(user, seed)?;
            let changed = cluster.granted.values().sum::<u32>() > before;
            let powerless = !roles().iter().any(|role| user.may(role));
            prop_assert!(!(powerless && changed), "{} has no role and was granted something", user.name);
        }
        for (what, count) in cluster.granted {
            *total.borrow_mut().entry(what).or_default() += count;
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    // A model in which nothing is ever granted would prove nothing.
    let total = total.into_inner();
    for what in ["create", "raise", "turn on", "lower", "name policy", "delete", "reveal", "write policy"] {
        assert!(total.get(what).is_some_and(|count| *count > 100), "{what} is hardly ever granted: {total:?}");
    }
}
