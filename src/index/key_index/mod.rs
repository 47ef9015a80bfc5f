//! The key index of the verifier: for each ApiKey, the digests of its values and the data that decisions need. It
//! contains no value, and no user name except the user of a Personal key.
//!
//! It is compact, since there may be many keys: each key has a record of fixed size and its name, and data that keys
//! share is stored once. A lookup by digest takes constant time.

mod grants;
mod interned;
mod slots;

use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU32, Ordering},
    },
};

use hashbrown::HashTable;
use jiff::Timestamp;
use kube::runtime::watcher::Event;

use self::{
    grants::{GrantName, GrantSet, GrantedNames, MAX_UNKNOWN_NAMES, PermissionNumbers, case_insensitive_hash},
    interned::{Interned, table_bytes},
    slots::{IndexedKey, IndexedKeys, NO_END, NO_ID, OverlapValue, ValueSlot},
};
use crate::{
    api::{ApiKey, KeyType},
    domain::{
        catalog::Catalog,
        key::Digest,
        verification::{Precedence, Standing, created, standing},
    },
};

/// The index of all ApiKeys. Reads run concurrently. They wait for changes: shortly for the change of one key, longer
/// for a new catalog and for the end of a new list, which are rare.
pub struct KeyIndex {
    state: RwLock<KeyIndexState>,
    // Randomly keyed, so that users can't create keys whose hashes collide.
    hasher: RandomState,
}

/// The size of a key index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyIndexSize {
    /// The number of ApiKeys.
    pub keys: usize,
    /// The number of digests. A key has two during the overlap of a rotation.
    pub digests: usize,
    /// The number of different sets of grants.
    pub grants: usize,
    /// The number of digests that another ApiKey owns.
    pub duplicates: usize,
    /// The number of names of permissions and presets that are in no catalog and exceed the limit for such names. A
    /// name counts once for each set that lacks it.
    pub names_left_out: usize,
    /// The memory of the keys with all related data, in bytes, without the catalog.
    pub bytes: usize,
}

struct KeyIndexState {
    records: IndexedKeys,
    by_name: HashTable<u32>,
    by_digest: HashTable<ValueSlot>,
    namespaces: Interned<Box<str>>,
    users: Interned<Box<str>>,
    grants: Interned<GrantSet>,
    grant_names: Interned<GrantName>,
    /// The number of `grant_names` that are in no catalog.
    unknown_names: usize,
    names_left_out: usize,
    catalog: Arc<Catalog>,
    numbers: PermissionNumbers,
    duplicates: usize,
    /// The heap memory of names, users and sets, in bytes.
    heap: usize,
    epoch: u16,
    synced: bool,
}

impl Default for KeyIndex {
    fn default() -> Self {
        Self {
            state: RwLock::new(KeyIndexState {
                records: IndexedKeys::default(),
                by_name: HashTable::new(),
                by_digest: HashTable::new(),
                namespaces: Interned::default(),
                users: Interned::default(),
                grants: Interned::default(),
                grant_names: Interned::default(),
                unknown_names: 0,
                names_left_out: 0,
                catalog: Arc::default(),
                numbers: PermissionNumbers::default(),
                duplicates: 0,
                heap: 0,
                epoch: 0,
                synced: false,
            }),
            hasher: RandomState::new(),
        }
    }
}

impl KeyIndex {
    /// Applies a watch event.
    pub fn apply(&self, event: &Event<ApiKey>) {
        let mut state = self.write();
        match event {
            // The current keys stay until the new list is complete.
            Event::Init => {
                // Resets all epochs before the number overflows, so that two lists never share a number.
                if state.epoch == u16::MAX {
                    state.records.iter_mut().for_each(|record| record.epoch = 0);
                    state.epoch = 0;
                }
                state.epoch += 1;
            }
            Event::InitApply(key) | Event::Apply(key) => state.put(&self.hasher, key),
            Event::InitDone => {
                let epoch = state.epoch;
                let deleted: Vec<_> =
                    state.records.iter().filter(|(_, record)| record.epoch != epoch).map(|(slot, _)| slot).collect();
                for slot in deleted {
                    state.remove(&self.hasher, slot);
                }
                state.synced = true;
            }
            Event::Delete(key) => {
                let (namespace, name) = names(key);
                state.forget(&self.hasher, namespace, name);
            }
        }
    }

    /// Removes an ApiKey.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.write().forget(&self.hasher, namespace, name);
    }

    /// Deactivates an ApiKey that can't be read. It keeps its digests, so that no other ApiKey owns them.
    pub fn deactivate(&self, namespace: &str, name: &str) {
        let mut state = self.write();
        let epoch = state.epoch;
        if let Some(slot) = state.slot_of(&self.hasher, namespace, name)
            && let Some(record) = state.records.get_mut(slot)
        {
            record.active = false;
            record.epoch = epoch;
        }
    }

    /// Replaces the catalog and recomputes the permissions of each set of grants.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        let numbers = PermissionNumbers::of(&catalog, &self.hasher);
        let mut state = self.write();
        let KeyIndexState { grants, grant_names, unknown_names, heap, .. } = &mut *state;
        *unknown_names = 0;
        for name in grant_names.values_mut() {
            *heap -= name.heap();
            *name = GrantName::of(&name.text, &catalog, &numbers, &self.hasher);
            *heap += name.heap();
            *unknown_names += usize::from(!name.known);
        }
        for (set, _) in grants.entries.iter_mut().flatten() {
            *heap -= set.heap();
            set.bits = numbers.bits(&set.granted, grant_names, &catalog, &self.hasher);
            *heap += set.heap();
        }
        state.numbers = numbers;
        state.catalog = catalog;
    }

    /// Whether all ApiKeys were listed completely at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.read().synced
    }

    /// Calls `decide` with the key that owns a digest. The index does not change during the call.
    ///
    /// If several ApiKeys have the digest, the first by [`Precedence`] owns it, even if it is inactive or expired. An
    /// ApiKey with the digest of another can therefore neither take over the value, nor deactivate it, nor reactivate
    /// it.
    pub fn look_up<T>(&self, digest: &Digest, decide: impl FnOnce(&Permissions<'_>, Option<KnownKey<'_>>) -> T) -> T {
        let state = self.read();
        let hash = self.hasher.hash_one(digest);
        let owner = state
            .by_digest
            .iter_hash(hash)
            .filter(|value_slot| state.digest(**value_slot) == Some(digest))
            .filter_map(|value_slot| Some((*value_slot, state.records.get(value_slot.slot())?)))
            .min_by_key(|(value_slot, record)| (state.precedence(*value_slot, record), value_slot.is_other()));
        let known = owner.map(|(value_slot, record)| {
            let ends = match &record.other {
                Some(other) if value_slot.is_other() => other.ends,
                _ => record.ends,
            };
            KnownKey { state: &state, record, ends }
        });
        decide(&Permissions { state: &state, hasher: &self.hasher }, known)
    }

    /// Returns the size of the index.
    #[must_use]
    pub fn size(&self) -> KeyIndexSize {
        let state = self.read();
        let overlaps = state.by_digest.len() - state.records.len;
        KeyIndexSize {
            keys: state.records.len,
            digests: state.by_digest.len(),
            grants: state.grants.len(),
            duplicates: state.duplicates,
            names_left_out: state.names_left_out,
            bytes: state.records.bytes()
                + overlaps * size_of::<OverlapValue>()
                + state.heap
                + table_bytes::<u32>(state.by_name.capacity())
                + table_bytes::<ValueSlot>(state.by_digest.capacity())
                + state.namespaces.bytes()
                + state.users.bytes()
                + state.grants.bytes()
                + state.grant_names.bytes(),
        }
    }

    /// Returns at most `limit` keys whose last use is at least `interval` seconds later than the reported one, as
    /// namespace, name and time of the last use, in seconds since 1970. If the last use is later than `now`, because a
    /// clock was wrong, it becomes `now`.
    #[must_use]
    pub fn used_since(&self, interval: u32, limit: usize, now: u32) -> Vec<(String, String, u32)> {
        let state = self.read();
        let due = |record: &IndexedKey| {
            let (mut used, reported) = (record.used.load(Ordering::Relaxed), record.reported.load(Ordering::Relaxed));
            if used > now {
                record.used.fetch_min(now, Ordering::Relaxed);
                used = now;
            }
            (used > reported && used - reported >= interval).then_some(used)
        };
        let described = |(_, record): (u32, &IndexedKey)| {
            let used = due(record)?;
            let namespace = state.namespaces.get(record.namespace)?;
            Some((namespace.to_string(), record.name.to_string(), used))
        };
        state.records.iter().filter_map(described).take(limit).collect()
    }

    /// Whether a use of a key is still unreported. Another replica may have reported it.
    #[must_use]
    pub fn is_unreported(&self, namespace: &str, name: &str, used: u32, interval: u32) -> bool {
        let state = self.read();
        let record = state.of(&self.hasher, namespace, name);
        record.is_some_and(|record| used.saturating_sub(record.reported.load(Ordering::Relaxed)) >= interval.max(1))
    }

    /// Records that a use was reported, before the watch delivers the change.
    pub fn reported(&self, namespace: &str, name: &str, used: u32) {
        if let Some(record) = self.read().of(&self.hasher, namespace, name) {
            record.reported.fetch_max(used, Ordering::Relaxed);
        }
    }

    // No code panics while it holds the lock. If it did, an incomplete index would be better than none.
    fn read(&self) -> RwLockReadGuard<'_, KeyIndexState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, KeyIndexState> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Namespace and name.
fn names(key: &ApiKey) -> (&str, &str) {
    let metadata = &key.metadata;
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

/// Returns seconds since 1970, in the four bytes of a record. Times outside of their range become 0, which is no use.
fn seconds(time: Option<Timestamp>) -> u32 {
    time.and_then(|time| u32::try_from(time.as_second()).ok()).unwrap_or_default()
}

impl KeyIndexState {
    fn slot_of(&self, hasher: &RandomState, namespace: &str, name: &str) -> Option<u32> {
        let same = |slot: &u32| {
            self.records.get(*slot).is_some_and(|record| {
                *record.name == *name
                    && self.namespaces.get(record.namespace).is_some_and(|known| **known == *namespace)
            })
        };
        self.by_name.find(hasher.hash_one((namespace, name)), same).copied()
    }

    fn of(&self, hasher: &RandomState, namespace: &str, name: &str) -> Option<&IndexedKey> {
        self.records.get(self.slot_of(hasher, namespace, name)?)
    }

    fn digest(&self, value_slot: ValueSlot) -> Option<&Digest> {
        let record = self.records.get(value_slot.slot())?;
        if value_slot.is_other() { record.other.as_ref().map(|other| &other.digest) } else { Some(&record.digest) }
    }

    fn precedence<'a>(&'a self, value_slot: ValueSlot, record: &'a IndexedKey) -> Precedence<'a> {
        let minted = match &record.other {
            Some(other) if value_slot.is_other() => other.minted,
            _ => record.minted,
        };
        let namespace = self.namespaces.get(record.namespace).map_or("", |name| name);
        Precedence { minted, created: record.created, namespace, name: &record.name }
    }

    fn put(&mut self, hasher: &RandomState, key: &ApiKey) {
        let (namespace, name) = names(key);
        let created = created(key);
        let mut used = 0;
        if let Some(slot) = self.slot_of(hasher, namespace, name) {
            // A new ApiKey of the same name does not inherit the last use.
            used = self
                .records
                .get(slot)
                .filter(|record| record.created == created)
                .map_or(0, |record| record.used.load(Ordering::Relaxed));
            self.remove(hasher, slot);
        }
        let standing = standing(key);
        let mut values = standing.values.iter().map(|value| OverlapValue {
            digest: value.digest,
            ends: value.ends.map_or(NO_END, Timestamp::as_millisecond),
            minted: value.minted,
        });
        // An ApiKey without a value is not in the index.
        let Some(OverlapValue { digest, ends, minted }) = values.next() else { return };
        let other = values.next().map(Box::new);
        let owner = key.spec.user.as_deref().filter(|_| key.spec.key_type == KeyType::Personal);
        let record = IndexedKey {
            digest,
            ends,
            other,
            name: name.into(),
            namespace: acquire_text(&mut self.namespaces, &mut self.heap, hasher, namespace),
            user: owner.map_or(NO_ID, |user| acquire_text(&mut self.users, &mut self.heap, hasher, user)),
            grants: self.acquire_grants(hasher, &standing),
            minted,
            created,
            used: AtomicU32::new(used),
            reported: AtomicU32::new(seconds(
                key.status.as_ref().and_then(|s| s.last_used_at.as_ref()).map(|time| time.0),
            )),
            epoch: self.epoch,
            key_type: key.spec.key_type,
            active: standing.active,
        };
        self.insert(hasher, namespace, record);
    }

    fn acquire_grants(&mut self, hasher: &RandomState, standing: &Standing<'_>) -> u32 {
        let mut presets: Vec<_> = standing.presets.iter().filter_map(|name| self.acquire_name(hasher, name)).collect();
        let mut permissions: Vec<u64> = vec![];
        for name in &standing.permissions {
            let Some(id) = self.acquire_name(hasher, name) else { continue };
            let (word, bit) = (id as usize / 64, 1 << (id % 64));
            if permissions.len() <= word {
                permissions.resize(word + 1, 0);
            }
            if permissions[word] & bit == 0 {
                permissions[word] |= bit;
            } else {
                self.release_name(hasher, id);
            }
        }
        presets.sort_unstable();
        let granted = GrantedNames { presets: presets.into(), permissions: permissions.into() };
        let hash = hasher.hash_one(&granted);
        if let Some(id) = self.grants.acquire(hash, |known| known.granted == granted) {
            // A set counts as one use of each of its names, regardless of the number of keys with the set.
            granted.names().for_each(|id| self.release_name(hasher, id));
            return id;
        }
        let Self { grants, grant_names, numbers, catalog, heap, .. } = self;
        let bits = numbers.bits(&granted, grant_names, catalog, hasher);
        let set = GrantSet { granted, bits };
        *heap += set.heap();
        grants.add(hash, set, |known| hasher.hash_one(&known.granted))
    }

    /// Returns the id of a name. `None` if no catalog has it and the limit of such names is reached.
    fn acquire_name(&mut self, hasher: &RandomState, text: &str) -> Option<u32> {
        let Self { grant_names, unknown_names, names_left_out, numbers, catalog, heap, .. } = self;
        let hash = case_insensitive_hash(hasher, text);
        if let Some(id) = grant_names.acquire(hash, |known| known.text.eq_ignore_ascii_case(text)) {
            return Some(id);
        }
        let name = GrantName::of(text, catalog, numbers, hasher);
        if !name.known {
            if *unknown_names >= MAX_UNKNOWN_NAMES {
                *names_left_out += 1;
                return None;
            }
            *unknown_names += 1;
        }
        *heap += name.heap();
        Some(grant_names.add(hash, name, |name| case_insensitive_hash(hasher, &name.text)))
    }

    fn release_name(&mut self, hasher: &RandomState, id: u32) {
        if let Some(name) = self.grant_names.release(id, |name| case_insensitive_hash(hasher, &name.text)) {
            self.heap -= name.heap();
            self.unknown_names -= usize::from(!name.known);
        }
    }

    fn release_grants(&mut self, hasher: &RandomState, id: u32) {
        if let Some(set) = self.grants.release(id, |known| hasher.hash_one(&known.granted)) {
            self.heap -= set.heap();
            set.granted.names().for_each(|id| self.release_name(hasher, id));
        }
    }

    fn insert(&mut self, hasher: &RandomState, namespace: &str, record: IndexedKey) {
        let by_name = hasher.hash_one((namespace, &*record.name));
        self.heap += record.name.len();
        let has_other = record.other.is_some();
        let slot = self.records.insert(record);
        let Self { records, namespaces, .. } = self;
        self.by_name.insert_unique(by_name, slot, |slot| {
            records.get(*slot).map_or(0, |record| {
                hasher.hash_one((namespaces.get(record.namespace).map_or("", |name| &**name), &*record.name))
            })
        });
        for value_slot in
            [ValueSlot::of(slot, false), ValueSlot::of(slot, true)].into_iter().take(1 + usize::from(has_other))
        {
            let Some(digest) = self.digest(value_slot).copied() else { continue };
            let hash = hasher.hash_one(digest);
            if self.has_digest(hash, &digest) {
                self.duplicates += 1;
            }
            let Self { records, .. } = self;
            self.by_digest.insert_unique(hash, value_slot, |value_slot| {
                let record = records.get(value_slot.slot());
                record.map_or(0, |record| match &record.other {
                    Some(other) if value_slot.is_other() => hasher.hash_one(other.digest),
                    _ => hasher.hash_one(record.digest),
                })
            });
        }
    }

    fn has_digest(&self, hash: u64, digest: &Digest) -> bool {
        self.by_digest.find(hash, |value_slot| self.digest(*value_slot) == Some(digest)).is_some()
    }

    fn forget(&mut self, hasher: &RandomState, namespace: &str, name: &str) {
        if let Some(slot) = self.slot_of(hasher, namespace, name) {
            self.remove(hasher, slot);
        }
    }

    fn remove(&mut self, hasher: &RandomState, slot: u32) {
        for value_slot in [ValueSlot::of(slot, false), ValueSlot::of(slot, true)] {
            let Some(digest) = self.digest(value_slot).copied() else { continue };
            let hash = hasher.hash_one(digest);
            if let Ok(entry) = self.by_digest.find_entry(hash, |other| *other == value_slot) {
                entry.remove();
                if self.has_digest(hash, &digest) {
                    self.duplicates -= 1;
                }
            }
        }
        let Some(record) = self.records.get(slot) else { return };
        let namespace = self.namespaces.get(record.namespace).map_or("", |name| &**name);
        if let Ok(entry) = self.by_name.find_entry(hasher.hash_one((namespace, &*record.name)), |other| *other == slot)
        {
            entry.remove();
        }
        let Some(record) = self.records.remove(slot) else { return };
        self.heap -= record.name.len();
        for (texts, id) in [(&mut self.namespaces, record.namespace), (&mut self.users, record.user)] {
            if let Some(text) = texts.release(id, |text| hasher.hash_one(&**text)) {
                self.heap -= text.len();
            }
        }
        self.release_grants(hasher, record.grants);
    }
}

/// Returns the id of a text that keys share, with one more use.
fn acquire_text(texts: &mut Interned<Box<str>>, heap: &mut usize, hasher: &RandomState, text: &str) -> u32 {
    let hash = hasher.hash_one(text);
    texts.acquire(hash, |known| **known == *text).unwrap_or_else(|| {
        *heap += text.len();
        texts.add(hash, text.into(), |known| hasher.hash_one(&**known))
    })
}

/// A key that owns a digest.
#[derive(Clone, Copy)]
pub struct KnownKey<'a> {
    state: &'a KeyIndexState,
    record: &'a IndexedKey,
    ends: i64,
}

impl KnownKey<'_> {
    /// The name of the ApiKey.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// The namespace of the ApiKey.
    #[must_use]
    pub fn team(&self) -> &str {
        self.state.namespaces.get(self.record.namespace).map_or("", |name| name)
    }

    /// The user of a Personal key. Empty for other keys.
    #[must_use]
    pub fn user(&self) -> &str {
        self.state.users.get(self.record.user).map_or("", |name| name)
    }

    /// The type of the key.
    #[must_use]
    pub fn key_type(&self) -> KeyType {
        self.record.key_type
    }

    /// Whether the key is active, regardless of its expiry.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.record.active
    }

    /// The end of the value, in milliseconds since 1970. `None` if it has no end.
    #[must_use]
    pub fn ends(&self) -> Option<i64> {
        (self.ends != NO_END).then_some(self.ends)
    }

    /// The permissions of the key by the current catalog.
    pub fn permissions(&self) -> impl Iterator<Item = &str> {
        let names = &self.state.numbers.names;
        let has = |number: usize| self.has_number(number);
        names.iter().enumerate().filter(move |(number, _)| has(*number)).map(|(_, name)| &**name)
    }

    fn has_number(&self, number: usize) -> bool {
        let grants = self.state.grants.get(self.record.grants);
        grants.and_then(|grants| grants.bits.get(number / 64)).is_some_and(|bits| bits >> (number % 64) & 1 == 1)
    }

    /// Records a use, at most once a minute, since many concurrent writes to one cache line are slow.
    pub fn touch(&self, now: Timestamp) {
        let now = seconds(Some(now));
        if self.record.used.load(Ordering::Relaxed) / 60 != now / 60 {
            self.record.used.store(now, Ordering::Relaxed);
        }
    }
}

/// The permissions of the catalog.
pub struct Permissions<'a> {
    state: &'a KeyIndexState,
    hasher: &'a RandomState,
}

impl Permissions<'_> {
    /// Whether a key has a permission. The name is not case-sensitive. `None` if no catalog has the permission.
    #[must_use]
    pub fn has(&self, key: &KnownKey<'_>, permission: &str) -> Option<bool> {
        let number = self.state.numbers.find(permission, self.hasher)?;
        Some(key.has_number(number as usize))
    }
}

mod tests;
