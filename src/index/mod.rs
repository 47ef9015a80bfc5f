//! What every replica knows: the merged catalogue, which ApiKey claims which Secret, access policies and who refers to
//! them, and security settings.
//!
//! Fed by watch events and by nothing else; it never calls the API server. Admission and reconciliation read from
//! it, so that neither needs a request of its own.

pub mod catalogs;
pub mod digests;
pub mod feed;
pub mod keyring;
pub mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, RwLock},
};

use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt, runtime::watcher::Event};

use catalogs::Catalogs;

use crate::{
    api::{AccessPolicy, ApiKey, KeyType, PermissionCatalog, SecuritySettings, SecuritySettingsSpec},
    domain::{
        catalog::{Catalog, Report},
        gates::KnownPolicy,
        status::secret_ref,
    },
};

/// Shared by everything in the process that has to know.
#[derive(Default)]
pub struct Index {
    /// Which ApiKey has which digest.
    pub digests: digests::Digests,
    catalogs: RwLock<Catalogs>,
    claims: RwLock<Claims>,
    references: RwLock<References>,
    policies: RwLock<ByName<KnownPolicy>>,
    settings: RwLock<ByName<SecuritySettingsSpec>>,
}

/// Namespace and name.
type Name = (String, String);

/// Objects of one kind.
struct ByName<T> {
    known: HashMap<Name, Arc<T>>,
    relisted: Option<BTreeSet<Name>>,
    synced: bool,
}

impl<T> Default for ByName<T> {
    fn default() -> Self {
        Self { known: HashMap::new(), relisted: None, synced: false }
    }
}

impl<T: PartialEq> ByName<T> {
    /// Takes in what happened to an object; the names of those that are not as they were.
    fn apply<K: ResourceExt>(&mut self, event: &Event<K>, of: impl Fn(&K) -> T) -> Vec<Name> {
        let name = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        match event {
            Event::Init => {
                self.relisted = Some(BTreeSet::new());
                vec![]
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let (name, new) = (name(object), of(object));
                if let (Event::InitApply(_), Some(seen)) = (event, &mut self.relisted) {
                    seen.insert(name.clone());
                }
                if self.known.get(&name).is_some_and(|known| **known == new) {
                    return vec![];
                }
                self.known.insert(name.clone(), Arc::new(new));
                vec![name]
            }
            Event::InitDone => {
                self.synced = true;
                let Some(seen) = self.relisted.take() else { return vec![] };
                let gone: Vec<_> = self.known.keys().filter(|name| !seen.contains(*name)).cloned().collect();
                for name in &gone {
                    self.known.remove(name);
                }
                gone
            }
            Event::Delete(object) => {
                let name = name(object);
                self.known.remove(&name).map(|_| name).into_iter().collect()
            }
        }
    }
}

/// Which ApiKeys refer to which AccessPolicy, by namespace and policy.
#[derive(Default)]
struct References {
    by_policy: BTreeMap<Name, BTreeMap<String, KeyType>>,
    relisted: Option<BTreeSet<(Name, String)>>,
}

impl References {
    fn apply(&mut self, event: &Event<ApiKey>) {
        match event {
            Event::Init => self.relisted = Some(BTreeSet::new()),
            Event::InitApply(key) | Event::Apply(key) => {
                self.remove(key);
                let Some(reference) = &key.spec.access_policy_ref else { return };
                let policy = (key.namespace().unwrap_or_default(), reference.name.clone());
                if let (Event::InitApply(_), Some(seen)) = (event, &mut self.relisted) {
                    seen.insert((policy.clone(), key.name_any()));
                }
                self.by_policy.entry(policy).or_default().insert(key.name_any(), key.spec.key_type);
            }
            Event::InitDone => {
                if let Some(seen) = self.relisted.take() {
                    self.by_policy.retain(|policy, keys| {
                        keys.retain(|key, _| seen.contains(&(policy.clone(), key.clone())));
                        !keys.is_empty()
                    });
                }
            }
            Event::Delete(key) => self.remove(key),
        }
    }

    /// What a key referred to before is not said, so every policy of its namespace is looked at: there are few.
    fn remove(&mut self, key: &ApiKey) {
        let namespace = key.namespace().unwrap_or_default();
        let name = key.name_any();
        let first = (namespace.clone(), String::new());
        let mut empty = None;
        for (policy, keys) in self.by_policy.range_mut(first..).take_while(|((ns, _), _)| *ns == namespace) {
            if keys.remove(&name).is_some() && keys.is_empty() {
                empty = Some(policy.clone());
            }
        }
        if let Some(policy) = empty {
            self.by_policy.remove(&policy);
        }
    }
}

#[derive(Default)]
struct Claims {
    /// By namespace and Secret name; nearly always one claim each.
    by_secret: HashMap<(String, String), Vec<Claim>>,
    /// How many there are in each namespace.
    by_namespace: HashMap<String, usize>,
    relisted: Option<BTreeSet<(String, String, String)>>,
    synced: bool,
}

/// An ApiKey that names a Secret. Ordered by age, then by name: the first of the order has the better right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    since: Option<Timestamp>,
    name: String,
}

impl Index {
    /// The merged catalogue. Cheap: a reference count.
    #[must_use]
    pub fn catalog(&self) -> Arc<Catalog> {
        read(&self.catalogs).merged()
    }

    /// Every PermissionCatalog, and what became of it in the merge.
    #[must_use]
    pub fn catalogs(&self) -> Vec<(Arc<PermissionCatalog>, Report)> {
        read(&self.catalogs).all()
    }

    /// Whether every kind was listed completely, at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        read(&self.catalogs).is_synced()
            && read(&self.claims).synced
            && read(&self.policies).synced
            && read(&self.settings).synced
    }

    /// An AccessPolicy.
    #[must_use]
    pub fn policy(&self, namespace: &str, name: &str) -> Option<Arc<KnownPolicy>> {
        read(&self.policies).known.get(&(namespace.to_owned(), name.to_owned())).map(Arc::clone)
    }

    /// The security settings of a namespace.
    #[must_use]
    pub fn settings(&self, namespace: &str) -> Option<Arc<SecuritySettingsSpec>> {
        read(&self.settings).known.get(&(namespace.to_owned(), "default".to_owned())).map(Arc::clone)
    }

    /// The ApiKeys that refer to an AccessPolicy, in the order of their names, with their types.
    #[must_use]
    pub fn keys_of_policy(&self, namespace: &str, name: &str) -> BTreeMap<String, KeyType> {
        let references = read(&self.references);
        references.by_policy.get(&(namespace.to_owned(), name.to_owned())).cloned().unwrap_or_default()
    }

    /// Takes in what happened to an AccessPolicy; the namespaces and names of those that are not as they were.
    pub fn apply_policy(&self, event: &Event<AccessPolicy>) -> Vec<(String, String)> {
        write(&self.policies).apply(event, |policy| KnownPolicy {
            spec: policy.spec.clone(),
            creator: crate::api::creator(policy).map(|creator| creator.name),
        })
    }

    /// Takes in what happened to security settings; the namespaces and names of those that are not as they were.
    pub fn apply_settings(&self, event: &Event<SecuritySettings>) -> Vec<(String, String)> {
        write(&self.settings).apply(event, |settings| settings.spec.clone())
    }

    /// How many ApiKeys a namespace has.
    #[must_use]
    pub fn count(&self, namespace: &str) -> usize {
        read(&self.claims).by_namespace.get(namespace).copied().unwrap_or_default()
    }

    /// Another ApiKey that claims the same Secret: any, if `key` does not exist yet; an older one, if it does.
    #[must_use]
    pub fn rival(&self, namespace: &str, key: &ApiKey, exists: bool) -> Option<String> {
        let claims = read(&self.claims);
        let rivals = claims.by_secret.get(&(namespace.to_owned(), secret_ref(key).name))?;
        let own = claim_of(key);
        rivals
            .iter()
            .filter(|other| other.name != own.name && (!exists || **other < own))
            .min()
            .map(|other| other.name.clone())
    }

    /// The other ApiKeys that claim the Secret that `key` names: they may have their turn when it goes.
    #[must_use]
    pub fn others_like(&self, namespace: &str, key: &ApiKey) -> Vec<String> {
        let own = key.name_any();
        self.claimants(namespace, &secret_ref(key).name).into_iter().filter(|name| *name != own).collect()
    }

    /// The ApiKeys that claim a Secret, nearly always one or none.
    #[must_use]
    pub fn claimants(&self, namespace: &str, secret: &str) -> Vec<String> {
        let claims = read(&self.claims);
        let found = claims.by_secret.get(&(namespace.to_owned(), secret.to_owned()));
        found.into_iter().flatten().map(|claim| claim.name.clone()).collect()
    }

    /// Takes in what happened to a PermissionCatalog. True if the merged catalogue may have changed.
    pub fn apply_catalog(&self, event: &Event<PermissionCatalog>) -> bool {
        write(&self.catalogs).apply(event)
    }

    /// Takes in what happened to an ApiKey.
    pub fn apply_key(&self, event: &Event<ApiKey>) {
        write(&self.references).apply(event);
        let mut state = write(&self.claims);
        match event {
            Event::Init => state.relisted = Some(BTreeSet::new()),
            Event::InitApply(key) => {
                let id = state.insert(key);
                if let Some(seen) = &mut state.relisted {
                    seen.insert(id);
                }
            }
            Event::InitDone => {
                if let Some(seen) = state.relisted.take() {
                    state.by_secret.retain(|(namespace, secret), claims| {
                        claims.retain(|c| seen.contains(&(namespace.clone(), secret.clone(), c.name.clone())));
                        !claims.is_empty()
                    });
                    state.recount();
                }
                state.synced = true;
            }
            Event::Apply(key) => {
                state.insert(key);
            }
            Event::Delete(key) => state.remove(key),
        }
    }
}

impl Claims {
    /// The Secret of an ApiKey can't change (the CRD forbids it), so that a claim only ever comes and goes.
    fn insert(&mut self, key: &ApiKey) -> (String, String, String) {
        let namespace = key.namespace().unwrap_or_default();
        let secret = secret_ref(key).name;
        // Nearly always the only one, so without room for more.
        let claims = self.by_secret.entry((namespace.clone(), secret.clone())).or_insert_with(|| Vec::with_capacity(1));
        let before = claims.len();
        claims.retain(|c| c.name != key.name_any());
        let is_new = claims.len() == before;
        claims.push(claim_of(key));
        if is_new {
            *self.by_namespace.entry(namespace.clone()).or_default() += 1;
        }
        (namespace, secret, key.name_any())
    }

    fn remove(&mut self, key: &ApiKey) {
        let id = (key.namespace().unwrap_or_default(), secret_ref(key).name);
        let own = |claim: &Claim| claim.name == key.name_any();
        let place = match self.by_secret.get(&id) {
            Some(claims) if claims.iter().any(own) => Some(id),
            // A key that can't be read any longer does not say which Secret it claimed.
            _ => self
                .by_secret
                .iter()
                .find(|((namespace, _), claims)| *namespace == id.0 && claims.iter().any(own))
                .map(|(place, _)| place.clone()),
        };
        let Some(place) = place else { return };
        let Some(claims) = self.by_secret.get_mut(&place) else { return };
        let before = claims.len();
        claims.retain(|claim| !own(claim));
        let gone = before - claims.len();
        if claims.is_empty() {
            self.by_secret.remove(&place);
        }
        if let Some(count) = self.by_namespace.get_mut(&place.0) {
            *count -= gone;
            if *count == 0 {
                self.by_namespace.remove(&place.0);
            }
        }
    }

    fn recount(&mut self) {
        self.by_namespace.clear();
        for ((namespace, _), claims) in &self.by_secret {
            *self.by_namespace.entry(namespace.clone()).or_default() += claims.len();
        }
    }
}

fn claim_of(key: &ApiKey) -> Claim {
    Claim { since: key.creation_timestamp().map(|t| t.0), name: key.name_any() }
}

// A panic while a lock is held would leave half of an update behind; these sections can't panic, and if one ever
// does, serving what is there is better than a process in which every request fails.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{KeyType, SecretTemplate},
        domain::{
            catalog::tests::{permission, spec as catalog_spec},
            validate::tests::spec,
        },
    };

    fn key(name: &str, secret: &str, second: i64) -> ApiKey {
        let mut key = ApiKey::new(name, spec(KeyType::Team, &["Alerts"], &[]));
        key.spec.secret = Some(SecretTemplate { name: Some(secret.to_owned()), ..Default::default() });
        key.metadata.namespace = Some("shop".to_owned());
        key.metadata.creation_timestamp = Some(crate::api::Time(Timestamp::from_second(second).unwrap()));
        key
    }

    #[test]
    fn the_older_claim_wins_and_then_the_name() {
        let index = Index::default();
        let (old, young, twin) = (key("z", "s", 1), key("a", "s", 2), key("b", "s", 2));
        for key in [&young, &old, &twin] {
            index.apply_key(&Event::Apply(key.clone()));
        }
        assert_eq!(index.rival("shop", &old, true), None);
        assert_eq!(index.rival("shop", &young, true).as_deref(), Some("z"));
        assert_eq!(index.rival("shop", &twin, true).as_deref(), Some("z"));
        assert_eq!(index.rival("shop", &key("new", "s", 3), false).as_deref(), Some("z"));
        assert_eq!(index.rival("other", &key("new", "s", 3), false), None, "another namespace is another Secret");
        index.apply_key(&Event::Delete(old));
        assert_eq!(index.rival("shop", &young, true), None);
        assert_eq!(index.rival("shop", &twin, true).as_deref(), Some("a"));
        assert_eq!(index.others_like("shop", &young), ["b"]);
    }

    #[test]
    fn a_key_that_cant_be_read_claims_nothing() {
        let index = Index::default();
        index.apply_key(&Event::Apply(key("old", "s", 1)));
        let mut unreadable = key("old", "s", 1);
        unreadable.spec.secret = None;
        index.apply_key(&Event::Delete(unreadable));
        assert_eq!(index.rival("shop", &key("young", "s", 2), true), None);
    }

    #[test]
    fn the_keys_of_a_namespace_are_counted_through_changes_deletions_and_relists() {
        let index = Index::default();
        for event in [
            Event::Apply(key("a", "s", 1)),
            Event::Apply(key("b", "s", 2)),
            Event::Apply(key("a", "s", 1)),
            Event::Apply(key("c", "t", 3)),
            Event::Delete(key("b", "s", 2)),
            Event::Delete(key("b", "s", 2)),
        ] {
            index.apply_key(&event);
        }
        assert_eq!((index.count("shop"), index.count("other")), (2, 0));
        for event in [Event::Init, Event::InitApply(key("c", "t", 3)), Event::InitApply(key("d", "u", 4))] {
            index.apply_key(&event);
        }
        index.apply_key(&Event::InitDone);
        assert_eq!(index.count("shop"), 2);
        index.apply_key(&Event::Delete(key("c", "t", 3)));
        index.apply_key(&Event::Delete(key("d", "u", 4)));
        assert_eq!(index.count("shop"), 0);
        assert!(read(&index.claims).by_namespace.is_empty());
    }

    #[test]
    fn a_relist_forgets_what_is_gone() {
        let index = Index::default();
        index.apply_key(&Event::Apply(key("gone", "s", 1)));
        for event in [Event::Init, Event::InitApply(key("stays", "s", 2)), Event::InitDone] {
            index.apply_key(&event);
        }
        assert_eq!(index.rival("shop", &key("new", "s", 3), false).as_deref(), Some("stays"));
        assert!(!index.is_synced(), "catalogues were not listed yet");
    }

    #[test]
    fn catalogues_merge_by_age_whatever_the_order_of_events() {
        let catalog = |name: &str, second: i64, ingestion: bool| {
            let mut c = PermissionCatalog::new(name, catalog_spec(vec![permission("a:Read", ingestion)], vec![]));
            c.metadata.creation_timestamp = Some(crate::api::Time(Timestamp::from_second(second).unwrap()));
            c
        };
        let (old, young) = (catalog("z-old", 1, false), catalog("a-young", 2, true));
        for order in [[&old, &young], [&young, &old]] {
            let index = Index::default();
            for c in order {
                assert!(index.apply_catalog(&Event::Apply(c.clone())));
            }
            assert!(!index.catalog().permission("A:Read").unwrap().ingestion);
            assert_eq!(index.catalogs()[0].1.conflicts.len(), 1);
            assert!(!index.apply_catalog(&Event::Apply(young.clone())), "nothing new");
            index.apply_catalog(&Event::Delete(old.clone()));
            assert!(index.catalog().permission("a:Read").unwrap().ingestion);
        }
    }
}
