//! What a verifier knows of every key: the digests of its values, and what a decision needs. No value, no name of a
//! person but a Personal key's user.
//!
//! Small, since there may be many keys: a record of fixed size a key, its name beside it, everything that keys have in
//! common kept once. Found by digest in one step, however many there are.

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

use crate::{
    api::{ApiKey, KeyType},
    domain::{
        catalog::Catalog,
        key::Digest,
        verification::{Standing, standing},
    },
};

/// Every key. Reads do not wait for each other, and for a change of a key only as long as that takes; a new catalogue and
/// the end of a new list take longer, and are rare.
pub struct Keyring {
    state: RwLock<State>,
    // Keyed by chance, so that nobody can make up keys that all land in one place.
    hasher: RandomState,
}

/// How much a keyring holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// ApiKeys.
    pub keys: usize,
    /// Digests; two for a key in the overlap of a rotation.
    pub digests: usize,
    /// Different sets of permissions.
    pub grants: usize,
    /// Digests that an older ApiKey has too.
    pub duplicates: usize,
    /// The bytes that all of it occupies.
    pub bytes: usize,
}

struct State {
    records: Records,
    by_name: HashTable<u32>,
    by_digest: HashTable<Place>,
    namespaces: Interned<Box<str>>,
    users: Interned<Box<str>>,
    grants: Interned<GrantSet>,
    catalog: Arc<Catalog>,
    numbers: Numbers,
    duplicates: usize,
    /// The bytes of all names.
    names: usize,
    epoch: u32,
    synced: bool,
}

/// One ApiKey. Nothing in it has a lifetime or a lock of its own.
struct Record {
    digest: Digest,
    /// When the current value ends, in milliseconds since 1970.
    ends: i64,
    /// The value in overlap, of the few keys that have one.
    other: Option<Box<(Digest, i64)>>,
    name: Box<str>,
    namespace: u32,
    user: u32,
    grants: u32,
    /// In seconds since 1970.
    created: u32,
    /// When a value was last let pass here, in seconds since 1970.
    used: AtomicU32,
    /// The last use that the cluster knows of, likewise.
    reported: AtomicU32,
    epoch: u32,
    key_type: KeyType,
    active: bool,
}

/// No end, no user.
const NEVER: i64 = i64::MAX;
const NOBODY: u32 = u32::MAX;

/// A record and which of its two values.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u32);

impl Place {
    const fn of(slot: u32, other: bool) -> Self {
        Self(slot << 1 | other as u32)
    }

    const fn slot(self) -> u32 {
        self.0 >> 1
    }

    const fn is_other(self) -> bool {
        self.0 & 1 == 1
    }
}

/// Records in pieces, so that growing neither copies them nor asks for twice their room.
#[derive(Default)]
struct Records {
    pieces: Vec<Vec<Option<Record>>>,
    free: Vec<u32>,
    len: usize,
}

const PIECE: usize = 1024;

impl Records {
    fn get(&self, slot: u32) -> Option<&Record> {
        self.pieces.get(slot as usize / PIECE)?.get(slot as usize % PIECE)?.as_ref()
    }

    fn insert(&mut self, record: Record) -> u32 {
        self.len += 1;
        if let Some(slot) = self.free.pop() {
            self.pieces[slot as usize / PIECE][slot as usize % PIECE] = Some(record);
            return slot;
        }
        if self.pieces.last().is_none_or(|piece| piece.len() == PIECE) {
            self.pieces.push(Vec::with_capacity(PIECE));
        }
        let at = self.pieces.len() - 1;
        self.pieces[at].push(Some(record));
        u32::try_from(at * PIECE + self.pieces[at].len() - 1).unwrap_or(u32::MAX)
    }

    fn remove(&mut self, slot: u32) -> Option<Record> {
        let place = self.pieces.get_mut(slot as usize / PIECE)?.get_mut(slot as usize % PIECE)?;
        let record = place.take()?;
        self.len -= 1;
        self.free.push(slot);
        Some(record)
    }

    /// Every record with its slot.
    fn iter(&self) -> impl Iterator<Item = (u32, &Record)> {
        (0_u32..).zip(self.pieces.iter().flatten()).filter_map(|(slot, record)| Some((slot, record.as_ref()?)))
    }
}

/// Things that many keys have in common, each kept once and for as long as a key has it.
struct Interned<T> {
    entries: Vec<Option<(T, u32)>>,
    free: Vec<u32>,
    table: HashTable<u32>,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), table: HashTable::new() }
    }
}

impl<T> Interned<T> {
    fn get(&self, id: u32) -> Option<&T> {
        Some(&self.entries.get(id as usize)?.as_ref()?.0)
    }

    fn take(
        &mut self,
        hash: u64,
        is: impl Fn(&T) -> bool,
        make: impl FnOnce() -> T,
        rehash: impl Fn(&T) -> u64,
    ) -> u32 {
        let Self { entries, free, table } = self;
        let found = table.find(hash, |id| entries[*id as usize].as_ref().is_some_and(|(value, _)| is(value)));
        if let Some(id) = found.copied() {
            if let Some((_, uses)) = &mut entries[id as usize] {
                *uses += 1;
            }
            return id;
        }
        let entry = Some((make(), 1));
        let id = if let Some(id) = free.pop() {
            entries[id as usize] = entry;
            id
        } else {
            entries.push(entry);
            u32::try_from(entries.len() - 1).unwrap_or(NOBODY)
        };
        table.insert_unique(hash, id, |id| entries[*id as usize].as_ref().map_or(0, |(value, _)| rehash(value)));
        id
    }

    fn release(&mut self, id: u32, hash: impl Fn(&T) -> u64) {
        let Some(Some((value, uses))) = self.entries.get_mut(id as usize) else { return };
        *uses -= 1;
        if *uses == 0 {
            let hash = hash(value);
            if let Ok(entry) = self.table.find_entry(hash, |other| *other == id) {
                entry.remove();
            }
            self.entries[id as usize] = None;
            self.free.push(id);
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }
}

/// What some keys may do: as it was granted, and what that comes to by the catalogue.
struct GrantSet {
    presets: Box<[Box<str>]>,
    permissions: Box<[Box<str>]>,
    /// A bit for the number of each permission.
    bits: Box<[u64]>,
}

/// The permissions of the catalogue, numbered.
#[derive(Default)]
struct Numbers {
    names: Vec<Arc<str>>,
    table: HashTable<u32>,
}

impl Numbers {
    fn of(catalog: &Catalog, hasher: &RandomState) -> Self {
        let mut names: Vec<_> = catalog.permissions().map(|permission| permission.name.clone()).collect();
        names.sort_unstable();
        let mut table = HashTable::with_capacity(names.len());
        for (number, name) in (0_u32..).zip(&names) {
            table.insert_unique(folded(hasher, name), number, |number| folded(hasher, &names[*number as usize]));
        }
        Self { names, table }
    }

    fn find(&self, name: &str, hasher: &RandomState) -> Option<u32> {
        let same = |number: &u32| self.names[*number as usize].eq_ignore_ascii_case(name);
        self.table.find(folded(hasher, name), same).copied()
    }

    /// The numbers of all that presets and permissions come to. What no catalogue knows any longer is no grant.
    fn bits(
        &self,
        presets: &[Box<str>],
        permissions: &[Box<str>],
        catalog: &Catalog,
        hasher: &RandomState,
    ) -> Box<[u64]> {
        let mut bits = vec![0_u64; self.names.len().div_ceil(64)];
        let of_presets = presets.iter().filter_map(|name| catalog.preset(name)).flat_map(|preset| &preset.permissions);
        let names = of_presets.map(|name| &**name).chain(permissions.iter().map(|name| &**name));
        for number in names.filter_map(|name| self.find(name, hasher)) {
            bits[number as usize / 64] |= 1 << (number % 64);
        }
        bits.into()
    }
}

/// A hash that is the same in upper and lower case, as names are, and that copies nothing.
fn folded(hasher: &RandomState, name: &str) -> u64 {
    use std::hash::Hasher;
    let mut state = hasher.build_hasher();
    let mut piece = [0_u8; 64];
    for bytes in name.as_bytes().chunks(piece.len()) {
        let piece = &mut piece[..bytes.len()];
        piece.copy_from_slice(bytes);
        piece.make_ascii_lowercase();
        state.write(piece);
    }
    state.finish()
}

impl Default for Keyring {
    fn default() -> Self {
        Self {
            state: RwLock::new(State {
                records: Records::default(),
                by_name: HashTable::new(),
                by_digest: HashTable::new(),
                namespaces: Interned::default(),
                users: Interned::default(),
                grants: Interned::default(),
                catalog: Arc::default(),
                numbers: Numbers::default(),
                duplicates: 0,
                names: 0,
                epoch: 0,
                synced: false,
            }),
            hasher: RandomState::new(),
        }
    }
}

impl Keyring {
    /// Takes in what happened to an ApiKey.
    pub fn apply(&self, event: &Event<ApiKey>) {
        let mut state = self.write();
        match event {
            // What is known stays in force until the new list is complete.
            Event::Init => state.epoch = state.epoch.wrapping_add(1),
            Event::InitApply(key) | Event::Apply(key) => state.put(&self.hasher, key),
            Event::InitDone => {
                let epoch = state.epoch;
                let gone: Vec<_> =
                    state.records.iter().filter(|(_, record)| record.epoch != epoch).map(|(slot, _)| slot).collect();
                for slot in gone {
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

    /// Forgets a key.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.write().forget(&self.hasher, namespace, name);
    }

    /// Takes in another catalogue: what each set of grants comes to.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        let numbers = Numbers::of(&catalog, &self.hasher);
        let mut state = self.write();
        for (grants, _) in state.grants.entries.iter_mut().flatten() {
            grants.bits = numbers.bits(&grants.presets, &grants.permissions, &catalog, &self.hasher);
        }
        state.numbers = numbers;
        state.catalog = catalog;
    }

    /// Whether all ApiKeys were listed completely, at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.read().synced
    }

    /// Looks for the key that has a digest, and hands it to `judge` while nothing can change.
    ///
    /// If several ApiKeys have it, the oldest owns it, whatever became of that one: who imports somebody's value
    /// neither takes its key over nor brings it back.
    pub fn look_up<T>(&self, digest: &Digest, judge: impl FnOnce(&Permissions<'_>, Option<Known<'_>>) -> T) -> T {
        let state = self.read();
        let hash = self.hasher.hash_one(digest);
        let owner = state
            .by_digest
            .iter_hash(hash)
            .filter(|place| state.digest(**place) == Some(digest))
            .filter_map(|place| Some((*place, state.records.get(place.slot())?)))
            .min_by_key(|(place, record)| (state.age(record), place.is_other()));
        let known = owner.map(|(place, record)| {
            let ends = match &record.other {
                Some(other) if place.is_other() => other.1,
                _ => record.ends,
            };
            Known { state: &state, record, ends }
        });
        judge(&Permissions { state: &state, hasher: &self.hasher }, known)
    }

    /// How much there is.
    #[must_use]
    pub fn size(&self) -> Size {
        let state = self.read();
        let overlaps = state.by_digest.len() - state.records.len;
        let table = |capacity: usize, entry: usize| capacity * 8 / 7 * (entry + 1);
        Size {
            keys: state.records.len,
            digests: state.by_digest.len(),
            grants: state.grants.len(),
            duplicates: state.duplicates,
            bytes: state.records.pieces.len() * PIECE * size_of::<Option<Record>>()
                + overlaps * size_of::<(Digest, i64)>()
                + state.names
                + table(state.by_name.capacity(), size_of::<u32>())
                + table(state.by_digest.capacity(), size_of::<Place>()),
        }
    }

    /// The keys, by namespace and name, that were used since `interval` seconds or more after the last use that the
    /// cluster knows of; with the time of the use in seconds since 1970. At most `most`.
    #[must_use]
    pub fn used_since(&self, interval: u32, most: usize) -> Vec<(String, String, u32)> {
        let state = self.read();
        let due = |record: &Record| {
            let (used, reported) = (record.used.load(Ordering::Relaxed), record.reported.load(Ordering::Relaxed));
            (used > reported && used - reported >= interval).then_some(used)
        };
        let described = |(_, record): (u32, &Record)| {
            let used = due(record)?;
            let namespace = state.namespaces.get(record.namespace)?;
            Some((namespace.to_string(), record.name.to_string(), used))
        };
        state.records.iter().filter_map(described).take(most).collect()
    }

    /// Whether a use of a key still has to be reported, after somebody else may have done it.
    #[must_use]
    pub fn is_unreported(&self, namespace: &str, name: &str, used: u32, interval: u32) -> bool {
        let state = self.read();
        let record = state.of(&self.hasher, namespace, name);
        record.is_some_and(|record| used.saturating_sub(record.reported.load(Ordering::Relaxed)) >= interval.max(1))
    }

    /// A use was reported: nobody has to wait until the watch says so.
    pub fn reported(&self, namespace: &str, name: &str, used: u32) {
        if let Some(record) = self.read().of(&self.hasher, namespace, name) {
            record.reported.fetch_max(used, Ordering::Relaxed);
        }
    }

    // A section under the lock does not stop half way; should one ever panic, what is there is better than nothing.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Namespace and name.
fn names(key: &ApiKey) -> (&str, &str) {
    let metadata = &key.metadata;
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

/// Seconds since 1970, which a record keeps in four bytes.
fn seconds(time: Option<Timestamp>) -> u32 {
    time.and_then(|time| u32::try_from(time.as_second()).ok()).unwrap_or_default()
}

impl State {
    fn slot_of(&self, hasher: &RandomState, namespace: &str, name: &str) -> Option<u32> {
        let same = |slot: &u32| {
            self.records.get(*slot).is_some_and(|record| {
                *record.name == *name
                    && self.namespaces.get(record.namespace).is_some_and(|known| **known == *namespace)
            })
        };
        self.by_name.find(hasher.hash_one((namespace, name)), same).copied()
    }

    fn of(&self, hasher: &RandomState, namespace: &str, name: &str) -> Option<&Record> {
        self.records.get(self.slot_of(hasher, namespace, name)?)
    }

    fn digest(&self, place: Place) -> Option<&Digest> {
        let record = self.records.get(place.slot())?;
        if place.is_other() { record.other.as_ref().map(|other| &other.0) } else { Some(&record.digest) }
    }

    /// The order of age; of the same second, that of the names, so that every replica sees the same one first.
    fn age<'a>(&'a self, record: &'a Record) -> (u32, Option<&'a str>, &'a str) {
        (record.created, self.namespaces.get(record.namespace).map(|name| &**name), &record.name)
    }

    fn put(&mut self, hasher: &RandomState, key: &ApiKey) {
        let (namespace, name) = names(key);
        let created = seconds(key.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let mut used = 0;
        if let Some(slot) = self.slot_of(hasher, namespace, name) {
            // Another key of the same name was not used yet.
            used = self
                .records
                .get(slot)
                .filter(|record| record.created == created)
                .map_or(0, |record| record.used.load(Ordering::Relaxed));
            self.remove(hasher, slot);
        }
        let standing = standing(key);
        let mut tokens =
            standing.tokens.iter().map(|(digest, end)| (*digest, end.map_or(NEVER, Timestamp::as_millisecond)));
        // A key without a value is nobody's concern until it has one.
        let Some((digest, ends)) = tokens.next() else { return };
        let other = tokens.next().map(Box::new);
        let owner = key.spec.user.as_deref().filter(|_| key.spec.key_type == KeyType::Personal);
        let record = Record {
            digest,
            ends,
            other,
            name: name.into(),
            namespace: self.namespaces.take(
                hasher.hash_one(namespace),
                |n| **n == *namespace,
                || namespace.into(),
                |n| hasher.hash_one(&**n),
            ),
            user: owner.map_or(NOBODY, |user| {
                self.users.take(hasher.hash_one(user), |u| **u == *user, || user.into(), |u| hasher.hash_one(&**u))
            }),
            grants: self.take_grants(hasher, &standing),
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

    fn take_grants(&mut self, hasher: &RandomState, standing: &Standing<'_>) -> u32 {
        let same = |known: &[Box<str>], names: &[&str]| {
            known.len() == names.len() && known.iter().zip(names).all(|(known, name)| **known == **name)
        };
        let owned = |names: &[&str]| -> Box<[Box<str>]> { names.iter().map(|name| Box::from(*name)).collect() };
        let Self { grants, numbers, catalog, .. } = self;
        grants.take(
            hasher.hash_one((&standing.presets, &standing.permissions)),
            |known| same(&known.presets, &standing.presets) && same(&known.permissions, &standing.permissions),
            || {
                let (presets, permissions) = (owned(&standing.presets), owned(&standing.permissions));
                let bits = numbers.bits(&presets, &permissions, catalog, hasher);
                GrantSet { presets, permissions, bits }
            },
            |known| hasher.hash_one((&known.presets, &known.permissions)),
        )
    }

    fn insert(&mut self, hasher: &RandomState, namespace: &str, record: Record) {
        let by_name = hasher.hash_one((namespace, &*record.name));
        self.names += record.name.len();
        let has_other = record.other.is_some();
        let slot = self.records.insert(record);
        let Self { records, namespaces, .. } = self;
        self.by_name.insert_unique(by_name, slot, |slot| {
            records.get(*slot).map_or(0, |record| {
                hasher.hash_one((namespaces.get(record.namespace).map_or("", |name| &**name), &*record.name))
            })
        });
        for place in [Place::of(slot, false), Place::of(slot, true)].into_iter().take(1 + usize::from(has_other)) {
            let Some(digest) = self.digest(place).copied() else { continue };
            let hash = hasher.hash_one(digest);
            if self.has_digest(hash, &digest) {
                self.duplicates += 1;
            }
            let Self { records, .. } = self;
            self.by_digest.insert_unique(hash, place, |place| {
                let record = records.get(place.slot());
                record.map_or(0, |record| match &record.other {
                    Some(other) if place.is_other() => hasher.hash_one(other.0),
                    _ => hasher.hash_one(record.digest),
                })
            });
        }
    }

    fn has_digest(&self, hash: u64, digest: &Digest) -> bool {
        self.by_digest.find(hash, |place| self.digest(*place) == Some(digest)).is_some()
    }

    fn forget(&mut self, hasher: &RandomState, namespace: &str, name: &str) {
        if let Some(slot) = self.slot_of(hasher, namespace, name) {
            self.remove(hasher, slot);
        }
    }

    fn remove(&mut self, hasher: &RandomState, slot: u32) {
        for place in [Place::of(slot, false), Place::of(slot, true)] {
            let Some(digest) = self.digest(place).copied() else { continue };
            let hash = hasher.hash_one(digest);
            if let Ok(entry) = self.by_digest.find_entry(hash, |other| *other == place) {
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
        self.names -= record.name.len();
        self.namespaces.release(record.namespace, |name| hasher.hash_one(&**name));
        self.users.release(record.user, |name| hasher.hash_one(&**name));
        self.grants.release(record.grants, |known| hasher.hash_one((&known.presets, &known.permissions)));
    }
}

/// A key that was found.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    state: &'a State,
    record: &'a Record,
    ends: i64,
}

impl Known<'_> {
    /// The name of the ApiKey.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Its namespace.
    #[must_use]
    pub fn team(&self) -> &str {
        self.state.namespaces.get(self.record.namespace).map_or("", |name| name)
    }

    /// The user of a Personal key; empty for others.
    #[must_use]
    pub fn user(&self) -> &str {
        self.state.users.get(self.record.user).map_or("", |name| name)
    }

    /// Its type.
    #[must_use]
    pub fn key_type(&self) -> KeyType {
        self.record.key_type
    }

    /// Whether its values work at all, whatever the time.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.record.active
    }

    /// When this value ends, in milliseconds since 1970.
    #[must_use]
    pub fn ends(&self) -> Option<i64> {
        (self.ends != NEVER).then_some(self.ends)
    }

    /// The permissions that it has by the catalogue as it is now.
    pub fn permissions(&self) -> impl Iterator<Item = &str> {
        let names = &self.state.numbers.names;
        let has = |number: usize| self.has_number(number);
        names.iter().enumerate().filter(move |(number, _)| has(*number)).map(|(_, name)| &**name)
    }

    fn has_number(&self, number: usize) -> bool {
        let grants = self.state.grants.get(self.record.grants);
        grants.and_then(|grants| grants.bits.get(number / 64)).is_some_and(|bits| bits >> (number % 64) & 1 == 1)
    }

    /// Remembers that it was used, to the minute: a cache line that many requests write to is a slow one.
    pub fn touch(&self, now: Timestamp) {
        let now = seconds(Some(now));
        if self.record.used.load(Ordering::Relaxed) / 60 != now / 60 {
            self.record.used.store(now, Ordering::Relaxed);
        }
    }
}

/// The permissions that there are.
pub struct Permissions<'a> {
    state: &'a State,
    hasher: &'a RandomState,
}

impl Permissions<'_> {
    /// Whether a key has a permission, named in any case. None if no catalogue has it.
    #[must_use]
    pub fn has(&self, key: &Known<'_>, permission: &str) -> Option<bool> {
        let number = self.state.numbers.find(permission, self.hasher)?;
        Some(key.has_number(number as usize))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        api::{ApiKeyStatus, KeyState, Time, Token},
        domain::{
            catalog::tests::{permission, preset, spec as catalog_spec},
            validate::tests::spec,
        },
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    pub(crate) fn catalog(presets: &[&str]) -> Arc<Catalog> {
        let permissions = ["a:Read", "b:Read", "c:Read"].map(|name| permission(name, false)).into();
        let all = catalog_spec(permissions, vec![preset("P", false, presets)]);
        Arc::new(Catalog::merge([("all", &all)]).0)
    }

    /// A key with these values, by number.
    pub(crate) fn key(namespace: &str, name: &str, created: i64, values: &[u8]) -> ApiKey {
        let mut key = ApiKey::new(name, spec(KeyType::Team, &["P"], &["b:Read"]));
        key.metadata.namespace = Some(namespace.to_owned());
        key.metadata.creation_timestamp = Some(Time(at(created)));
        let token = |value: &u8| Token {
            id: digest(*value).id(),
            generation: None,
            sha256: digest(*value).to_string(),
            minted_at: Time(at(created)),
            expires_at: None,
        };
        key.status = Some(ApiKeyStatus {
            state: Some(KeyState::Active),
            presets: vec!["P".to_owned()],
            permissions: vec!["b:Read".to_owned()],
            tokens: values.iter().map(token).collect(),
            ..ApiKeyStatus::default()
        });
        key
    }

    /// The name of the key that a value belongs to, and what it may do.
    fn look(keys: &Keyring, value: u8) -> Option<(String, bool, Vec<String>)> {
        keys.look_up(&digest(value), |_, known| {
            known.map(|known| {
                let name = format!("{}/{}", known.team(), known.name());
                (name, known.is_active(), known.permissions().map(str::to_owned).collect())
            })
        })
    }

    fn owner(keys: &Keyring, value: u8) -> Option<String> {
        look(keys, value).map(|(name, ..)| name)
    }

    #[test]
    fn every_value_of_an_overlap_is_found_and_a_replaced_one_is_not() {
        let keys = Keyring::default();
        keys.apply(&Event::Apply(key("shop", "k", 1, &[2, 1])));
        assert_eq!((owner(&keys, 1), owner(&keys, 2)), (Some("shop/k".into()), Some("shop/k".into())));
        keys.apply(&Event::Apply(key("shop", "k", 1, &[2])));
        assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/k".into())));
        keys.apply(&Event::Delete(key("shop", "k", 1, &[2])));
        assert_eq!(owner(&keys, 2), None);
        assert_eq!(Size { bytes: 0, ..keys.size() }, Size::default());
    }

    #[test]
    fn permissions_follow_the_catalogue_in_any_order_of_events() {
        for catalog_first in [true, false] {
            let keys = Keyring::default();
            if catalog_first {
                keys.set_catalog(catalog(&["a:Read"]));
            }
            keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
            keys.set_catalog(catalog(&["a:Read"]));
            assert_eq!(look(&keys, 1).unwrap().2, ["a:Read", "b:Read"]);
            keys.set_catalog(catalog(&["c:Read"]));
            assert_eq!(look(&keys, 1).unwrap().2, ["b:Read", "c:Read"]);
            let has = |name| keys.look_up(&digest(1), |permissions, known| permissions.has(&known.unwrap(), name));
            assert_eq!(["B:READ", "a:Read", "x:Read"].map(has), [Some(true), Some(false), None]);
            keys.set_catalog(Arc::default());
            assert_eq!(look(&keys, 1).unwrap().2, Vec::<String>::new(), "what no catalogue knows is no grant");
        }
    }

    #[test]
    fn the_oldest_key_with_a_value_owns_it_whatever_became_of_it() {
        let young = || key("a", "young", 20, &[1]);
        let mut old = key("z", "old", 10, &[1]);
        for order in [[young(), old.clone()], [old.clone(), young()]] {
            let keys = Keyring::default();
            for key in order {
                keys.apply(&Event::Apply(key));
            }
            assert_eq!(owner(&keys, 1).as_deref(), Some("z/old"));
            assert_eq!(keys.size().duplicates, 1);
            old.spec.active = Some(false);
            keys.apply(&Event::Apply(old.clone()));
            let (name, active, _) = look(&keys, 1).unwrap();
            assert_eq!((name.as_str(), active), ("z/old", false), "a twin does not bring a revoked value back");
            keys.apply(&Event::Delete(old.clone()));
            assert_eq!(owner(&keys, 1).as_deref(), Some("a/young"));
            assert_eq!(keys.size().duplicates, 0);
            old.spec.active = None;
        }
    }

    #[test]
    fn a_new_list_forgets_what_is_gone_and_serves_what_it_had_until_then() {
        let keys = Keyring::default();
        keys.apply(&Event::Init);
        keys.apply(&Event::InitApply(key("shop", "gone", 1, &[1])));
        keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
        assert!(!keys.is_synced());
        keys.apply(&Event::InitDone);
        assert!(keys.is_synced());
        // A list that broke off counts for nothing.
        keys.apply(&Event::Init);
        keys.apply(&Event::InitApply(key("shop", "gone", 1, &[1])));
        keys.apply(&Event::Init);
        keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
        assert!(owner(&keys, 1).is_some(), "in force until the list is complete");
        keys.apply(&Event::InitDone);
        assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/stays".into())));
    }

    #[test]
    fn uses_are_due_once_an_interval_and_survive_a_change_of_the_key() {
        let keys = Keyring::default();
        keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
        let touch = |second| keys.look_up(&digest(1), |_, known| known.unwrap().touch(at(second)));
        assert_eq!(keys.used_since(3600, 10), []);
        touch(10_000);
        let due = ("shop".to_owned(), "k".to_owned(), 10_000);
        assert_eq!(keys.used_since(3600, 10), [due]);
        assert!(keys.is_unreported("shop", "k", 10_000, 3600));
        keys.reported("shop", "k", 10_000);
        touch(13_000);
        assert_eq!(keys.used_since(3600, 10), [], "told less than an hour ago");
        touch(13_700);
        // Another replica tells, and the watch brings it here.
        let mut told = key("shop", "k", 1, &[1]);
        told.status.as_mut().unwrap().last_used_at = Some(Time(at(11_000)));
        keys.apply(&Event::Apply(told));
        assert_eq!(keys.used_since(3600, 10), []);
        assert_eq!(keys.used_since(2000, 10).len(), 1, "what was used is still known");
        keys.apply(&Event::Apply(key("shop", "k", 2, &[1])));
        assert_eq!(keys.used_since(0, 10), [], "another key of the same name was not used");
    }

    #[derive(Clone, Debug)]
    enum Happening {
        Put { name: u8, created: i64, values: Vec<u8> },
        Delete { name: u8 },
        Relist { broken: bool },
    }

    fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let values = proptest::collection::vec(0_u8..12, 0..3);
        let happening = prop_oneof![
            8 => (0_u8..8, 1_i64..4, values).prop_map(|(name, created, values)| Happening::Put { name, created, values }),
            3 => (0_u8..8).prop_map(|name| Happening::Delete { name }),
            1 => any::<bool>().prop_map(|broken| Happening::Relist { broken }),
        ];
        proptest::collection::vec(happening, 1..60)
    }

    proptest! {
        /// Whatever happens in whatever order, the keyring answers as a list that is searched from end to end.
        #[test]
        fn it_answers_as_a_plain_list_would(happenings in happenings()) {
            let keys = Keyring::default();
            keys.set_catalog(catalog(&["a:Read"]));
            let mut model: BTreeMap<u8, (i64, Vec<u8>)> = BTreeMap::new();
            let of = |name: u8, created, values: &[u8]| key(&format!("ns{}", name % 3), &format!("k{name}"), created, values);
            for happening in happenings {
                match happening {
                    Happening::Put { name, created, mut values } => {
                        values.dedup();
                        keys.apply(&Event::Apply(of(name, created, &values)));
                        model.insert(name, (created, values));
                    }
                    Happening::Delete { name } => {
                        keys.apply(&Event::Delete(of(name, 1, &[])));
                        model.remove(&name);
                    }
                    Happening::Relist { broken } => {
                        keys.apply(&Event::Init);
                        if broken {
                            keys.apply(&Event::Init);
                        }
                        for (name, (created, values)) in &model {
                            keys.apply(&Event::InitApply(of(*name, *created, values)));
                        }
                        keys.apply(&Event::InitDone);
                    }
                }
                for value in 0..12 {
                    let holders = model.iter().filter(|(_, (_, values))| values.contains(&value));
                    let names = holders.map(|(name, (created, _))| (*created, format!("ns{}/k{name}", name % 3)));
                    prop_assert_eq!(owner(&keys, value), names.min().map(|(_, name)| name));
                }
                let size = keys.size();
                prop_assert_eq!(size.keys, model.values().filter(|(_, values)| !values.is_empty()).count());
                prop_assert_eq!(size.digests, model.values().map(|(_, values)| values.len()).sum::<usize>());
                let all: std::collections::BTreeSet<_> = model.values().flat_map(|(_, values)| values).collect();
                prop_assert_eq!(size.duplicates, size.digests - all.len());
            }
        }
    }
}
