//! The state that every replica keeps in memory: the merged catalog, the claims of ApiKeys to Secrets, access policies
//! with the keys that refer to them, and security settings.
//!
//! Watch events are its only input. It never calls the API server. Admission and reconciliation read it instead of
//! sending requests.

pub mod catalogs;
pub mod digests;
pub mod key_index;
pub mod partial;
pub mod watch;

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
        authorization::KnownPolicy,
        catalog::{Catalog, Report},
        status::secret_ref,
    },
};

/// The index. All tasks of the process share it.
#[derive(Default)]
pub struct Index {
    /// The digests in the status of each ApiKey.
    pub digests: digests::Digests,
    catalogs: RwLock<Catalogs>,
    claims: RwLock<SecretClaims>,
    references: RwLock<References>,
    policies: RwLock<ByName<KnownPolicy>>,
    settings: RwLock<ByName<SecuritySettingsSpec>>,
}

/// Namespace and name.
type NamespacedName = (String, String);

/// Objects of one kind, by namespace and name.
struct ByName<T> {
    known: HashMap<NamespacedName, Arc<T>>,
    relisted: Option<BTreeSet<NamespacedName>>,
    synced: bool,
}

impl<T> Default for ByName<T> {
    fn default() -> Self {
        Self { known: HashMap::new(), relisted: None, synced: false }
    }
}

impl<T: PartialEq> ByName<T> {
    /// Applies a watch event. Returns the names of the objects that changed.
    fn apply<K: ResourceExt>(&mut self, event: &Event<K>, of: impl Fn(&K) -> T) -> Vec<NamespacedName> {
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
                let deleted: Vec<_> = self.known.keys().filter(|name| !seen.contains(*name)).cloned().collect();
                for name in &deleted {
                    self.known.remove(name);
                }
                deleted
            }
            Event::Delete(object) => {
                let name = name(object);
                self.known.remove(&name).map(|_| name).into_iter().collect()
            }
        }
    }
}

/// The ApiKeys that refer to each AccessPolicy.
#[derive(Default)]
struct References {
    by_policy: BTreeMap<NamespacedName, BTreeMap<String, KeyType>>,
    relisted: Option<BTreeSet<(NamespacedName, String)>>,
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

    /// Removes the references of an ApiKey. The event does not contain its previous policy, so all policies of the
    /// namespace are searched. There are few.
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
struct SecretClaims {
    /// By namespace and Secret name. Nearly every Secret has one claim.
    by_secret: HashMap<(String, String), Vec<SecretClaim>>,
    /// The number of claims in each namespace.
    by_namespace: HashMap<String, usize>,
    relisted: Option<BTreeSet<(String, String, String)>>,
    synced: bool,
}

/// An ApiKey that names a Secret. Ordered by age, then by name; the first claim has precedence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SecretClaim {
    since: Option<Timestamp>,
    name: String,
}

impl Index {
    /// Returns the merged catalog. The call only increments a reference count.
    #[must_use]
    pub fn catalog(&self) -> Arc<Catalog> {
        read(&self.catalogs).merged()
    }

    /// Returns every PermissionCatalog with its report of the merge.
    #[must_use]
    pub fn catalogs(&self) -> Vec<(Arc<PermissionCatalog>, Report)> {
        read(&self.catalogs).all()
    }

    /// Whether each kind was listed completely at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        read(&self.catalogs).is_synced()
            && read(&self.claims).synced
            && read(&self.policies).synced
            && read(&self.settings).synced
    }

    /// Returns an AccessPolicy.
    #[must_use]
    pub fn policy(&self, namespace: &str, name: &str) -> Option<Arc<KnownPolicy>> {
        read(&self.policies).known.get(&(namespace.to_owned(), name.to_owned())).map(Arc::clone)
    }

    /// Returns the security settings of a namespace.
    #[must_use]
    pub fn settings(&self, namespace: &str) -> Option<Arc<SecuritySettingsSpec>> {
        read(&self.settings).known.get(&(namespace.to_owned(), "default".to_owned())).map(Arc::clone)
    }

    /// Returns the names and types of the ApiKeys that refer to an AccessPolicy.
    #[must_use]
    pub fn keys_of_policy(&self, namespace: &str, name: &str) -> BTreeMap<String, KeyType> {
        let references = read(&self.references);
        references.by_policy.get(&(namespace.to_owned(), name.to_owned())).cloned().unwrap_or_default()
    }

    /// Applies a watch event of AccessPolicies. Returns the namespaces and names of those that changed.
    pub fn apply_policy(&self, event: &Event<AccessPolicy>) -> Vec<(String, String)> {
        write(&self.policies).apply(event, |policy| KnownPolicy {
            spec: policy.spec.clone(),
            creator: crate::api::creator(policy).map(|creator| creator.name),
        })
    }

    /// Applies a watch event of SecuritySettings. Returns the namespaces and names of those that changed.
    pub fn apply_settings(&self, event: &Event<SecuritySettings>) -> Vec<(String, String)> {
        write(&self.settings).apply(event, |settings| settings.spec.clone())
    }

    /// Returns the number of ApiKeys in a namespace.
    #[must_use]
    pub fn count(&self, namespace: &str) -> usize {
        read(&self.claims).by_namespace.get(namespace).copied().unwrap_or_default()
    }

    /// Returns the name of another ApiKey that claims the same Secret. If `key` exists, only claims with precedence
    /// over its own count.
    #[must_use]
    pub fn conflicting_claim(&self, namespace: &str, key: &ApiKey, exists: bool) -> Option<String> {
        let claims = read(&self.claims);
        let conflicting_claims = claims.by_secret.get(&(namespace.to_owned(), secret_ref(key).name))?;
        let own = claim_of(key);
        conflicting_claims
            .iter()
            .filter(|other| other.name != own.name && (!exists || **other < own))
            .min()
            .map(|other| other.name.clone())
    }

    /// Returns the names of the other ApiKeys that claim the Secret of `key`. One of them can use the Secret when `key`
    /// is deleted.
    #[must_use]
    pub fn other_claimants(&self, namespace: &str, key: &ApiKey) -> Vec<String> {
        let own = key.name_any();
        self.claimants(namespace, &secret_ref(key).name).into_iter().filter(|name| *name != own).collect()
    }

    /// Returns the names of the ApiKeys that claim a Secret.
    #[must_use]
    pub fn claimants(&self, namespace: &str, secret: &str) -> Vec<String> {
        let claims = read(&self.claims);
        let found = claims.by_secret.get(&(namespace.to_owned(), secret.to_owned()));
        found.into_iter().flatten().map(|claim| claim.name.clone()).collect()
    }

    /// Applies a watch event of PermissionCatalogs. Returns whether the merged catalog may have changed.
    pub fn apply_catalog(&self, event: &Event<PermissionCatalog>) -> bool {
        write(&self.catalogs).apply(event)
    }

    /// Applies a watch event of ApiKeys.
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

impl SecretClaims {
    /// Adds a claim. The CRD makes the Secret of an ApiKey immutable, so a claim never moves to another Secret.
    fn insert(&mut self, key: &ApiKey) -> (String, String, String) {
        let namespace = key.namespace().unwrap_or_default();
        let secret = secret_ref(key).name;
        // Nearly every Secret has one claim, so the vector reserves no space for more.
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
        let own = |claim: &SecretClaim| claim.name == key.name_any();
        let secret = match self.by_secret.get(&id) {
            Some(claims) if claims.iter().any(own) => Some(id),
            // The event of an ApiKey that can't be read does not contain the Secret that it claimed.
            _ => self
                .by_secret
                .iter()
                .find(|((namespace, _), claims)| *namespace == id.0 && claims.iter().any(own))
                .map(|(secret, _)| secret.clone()),
        };
        let Some(secret) = secret else { return };
        let Some(claims) = self.by_secret.get_mut(&secret) else { return };
        let before = claims.len();
        claims.retain(|claim| !own(claim));
        let removed = before - claims.len();
        if claims.is_empty() {
            self.by_secret.remove(&secret);
        }
        if let Some(count) = self.by_namespace.get_mut(&secret.0) {
            *count -= removed;
            if *count == 0 {
                self.by_namespace.remove(&secret.0);
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

fn claim_of(key: &ApiKey) -> SecretClaim {
    SecretClaim { since: key.creation_timestamp().map(|t| t.0), name: key.name_any() }
}

// No code panics while it holds a lock. If it did, an incomplete index would be better than a process in which every
// request fails.
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
        test_support::{catalog_spec, key_spec as spec, permission},
    };

    fn key(name: &str, secret: &str, second: i64) -> ApiKey {
        let mut key = ApiKey::new(name, spec(KeyType::Team, &["Alerts"], &[]));
        key.spec.secret = Some(SecretTemplate { name: Some(secret.to_owned()), ..Default::default() });
        key.metadata.namespace = Some("shop".to_owned());
        key.metadata.creation_timestamp = Some(crate::api::Time(Timestamp::from_second(second).unwrap()));
        key
    }

    #[test]
    fn older_claim_has_precedence_and_then_the_name() {
        let index = Index::default();
        let (old, young, twin) = (key("z", "s", 1), key("a", "s", 2), key("b", "s", 2));
        for key in [&young, &old, &twin] {
            index.apply_key(&Event::Apply(key.clone()));
        }
        assert_eq!(index.conflicting_claim("shop", &old, true), None);
        assert_eq!(index.conflicting_claim("shop", &young, true).as_deref(), Some("z"));
        assert_eq!(index.conflicting_claim("shop", &twin, true).as_deref(), Some("z"));
        assert_eq!(index.conflicting_claim("shop", &key("new", "s", 3), false).as_deref(), Some("z"));
        assert_eq!(
            index.conflicting_claim("other", &key("new", "s", 3), false),
            None,
            "a claim in another namespace is a conflict"
        );
        index.apply_key(&Event::Delete(old));
        assert_eq!(index.conflicting_claim("shop", &young, true), None);
        assert_eq!(index.conflicting_claim("shop", &twin, true).as_deref(), Some("a"));
        assert_eq!(index.other_claimants("shop", &young), ["b"]);
    }

    #[test]
    fn deletion_of_an_unreadable_key_removes_its_claim() {
        let index = Index::default();
        index.apply_key(&Event::Apply(key("old", "s", 1)));
        let mut unreadable = key("old", "s", 1);
        unreadable.spec.secret = None;
        index.apply_key(&Event::Delete(unreadable));
        assert_eq!(index.conflicting_claim("shop", &key("young", "s", 2), true), None);
    }

    #[test]
    fn count_of_keys_is_correct_after_changes_deletions_and_relists() {
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
    fn relist_removes_deleted_keys() {
        let index = Index::default();
        index.apply_key(&Event::Apply(key("deleted", "s", 1)));
        for event in [Event::Init, Event::InitApply(key("stays", "s", 2)), Event::InitDone] {
            index.apply_key(&event);
        }
        assert_eq!(index.conflicting_claim("shop", &key("new", "s", 3), false).as_deref(), Some("stays"));
        assert!(!index.is_synced(), "the index is synced although catalogs were not listed");
    }

    #[test]
    fn catalogs_merge_by_age_in_any_order_of_events() {
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
            assert!(!index.apply_catalog(&Event::Apply(young.clone())), "an event without a change reports a change");
            index.apply_catalog(&Event::Delete(old.clone()));
            assert!(index.catalog().permission("a:Read").unwrap().ingestion);
        }
    }
}
