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
        verification::{Precedence, Standing, created, standing},
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
    /// Digests that another ApiKey has too, which owns them.
    pub duplicates: usize,
    /// Names of permissions and presets that no catalogue has and for which there was no room, counted once for each set
    /// that lacks one therefore.
    pub names_left_out: usize,
    /// The bytes that keys occupy, with everything that is kept on their account. The catalogue is not part of it.
    pub bytes: usize,
}

struct State {
    records: Records,
    by_name: HashTable<u32>,
    by_digest: HashTable<Place>,
    namespaces: Interned<Box<str>>,
    users: Interned<Box<str>>,
    grants: Interned<GrantSet>,
    grant_names: Interned<Name>,
    /// How many of `grant_names` no catalogue has.
    unknown_names: usize,
    names_left_out: usize,
    catalog: Arc<Catalog>,
    numbers: Numbers,
    duplicates: usize,
    /// The bytes on the heap of names, users, sets and the like.
    heap: usize,
    epoch: u16,
    synced: bool,
}

/// One ApiKey. Nothing in it has a lifetime or a lock of its own.
struct Record {
    digest: Digest,
    /// When the current value ends, in milliseconds since 1970.
    ends: i64,
    /// The value in overlap, of the few keys that have one.
    other: Option<Box<Other>>,
    name: Box<str>,
    namespace: u32,
    user: u32,
    grants: u32,
    /// When the current value was minted or imported, in seconds since 1970.
    minted: u32,
    /// In seconds since 1970.
    created: u32,
    /// When a value was last let pass here, in seconds since 1970.
    used: AtomicU32,
    /// The last use that the cluster knows of, likewise.
    reported: AtomicU32,
    /// The list that it was last in. Two bytes, so that a record stays as small as it is.
    epoch: u16,
    key_type: KeyType,
    active: bool,
}

/// The value in overlap: as the first fields of a [`Record`].
struct Other {
    digest: Digest,
    ends: i64,
    minted: u32,
}

/// No end, no user, no permission.
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

    fn get_mut(&mut self, slot: u32) -> Option<&mut Record> {
        self.pieces.get_mut(slot as usize / PIECE)?.get_mut(slot as usize % PIECE)?.as_mut()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        self.pieces.iter_mut().flatten().flatten()
    }

    fn bytes(&self) -> usize {
        self.pieces.len() * PIECE * size_of::<Option<Record>>() + self.free.capacity() * size_of::<u32>()
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

    /// The id of what is there already, for one more use of it.
    fn use_again(&mut self, hash: u64, is: impl Fn(&T) -> bool) -> Option<u32> {
        let Self { entries, table, .. } = self;
        let same = |id: &u32| entries[*id as usize].as_ref().is_some_and(|(value, _)| is(value));
        let id = *table.find(hash, same)?;
        if let Some((_, uses)) = &mut entries[id as usize] {
            *uses += 1;
        }
        Some(id)
    }

    /// The id of what is new, with its first use.
    fn add(&mut self, hash: u64, value: T, rehash: impl Fn(&T) -> u64) -> u32 {
        let Self { entries, free, table } = self;
        let entry = Some((value, 1));
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

    /// Ends one use; what nobody uses any longer is handed back.
    fn release(&mut self, id: u32, hash: impl Fn(&T) -> u64) -> Option<T> {
        let (value, uses) = self.entries.get_mut(id as usize)?.as_mut()?;
        *uses -= 1;
        if *uses > 0 {
            return None;
        }
        let hash = hash(value);
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == id) {
            entry.remove();
        }
        self.free.push(id);
        self.entries[id as usize].take().map(|(value, _)| value)
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().flatten().map(|(value, _)| value)
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    /// Without what the things themselves have on the heap.
    fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Option<(T, u32)>>()
            + self.free.capacity() * size_of::<u32>()
            + table_bytes::<u32>(self.table.capacity())
    }
}

/// The bytes of a hash table: seven of eight places can be taken, and each has a byte beside it.
const fn table_bytes<T>(capacity: usize) -> usize {
    capacity * 8 / 7 * (size_of::<T>() + 1)
}

/// What some keys may do: as it was granted, and what that comes to by the catalogue. Bits and numbers, since whoever may
/// make keys can make each of them have a set of its own, of hundreds of long names.
#[derive(PartialEq, Eq, Hash)]
struct Granted {
    /// The presets, by the ids of their names, in order.
    presets: Box<[u32]>,
    /// A bit for the id of the name of each permission, without zeros at the end.
    permissions: Box<[u64]>,
}

struct GrantSet {
    granted: Granted,
    /// A bit for the number of each permission.
    bits: Box<[u64]>,
}

impl GrantSet {
    fn heap(&self) -> usize {
        size_of_val(&*self.granted.presets) + size_of_val(&*self.granted.permissions) + size_of_val(&*self.bits)
    }
}

impl Granted {
    /// The id of the name of every preset and permission.
    fn names(&self) -> impl Iterator<Item = u32> {
        self.presets.iter().copied().chain(ones(&self.permissions))
    }
}

/// The name of a preset or permission that some set has.
struct Name {
    /// Shared with the catalogue, if that has it.
    text: Arc<str>,
    /// Whether a catalogue has it.
    known: bool,
    /// The number of the permission of this name.
    number: u32,
}

impl Name {
    /// What `text` means by a catalogue.
    fn of(text: &str, catalog: &Catalog, numbers: &Numbers, hasher: &RandomState) -> Self {
        let number = numbers.find(text, hasher);
        let known = match number {
            Some(number) => Some(&numbers.names[number as usize]),
            None => catalog.preset(text).map(|preset| &preset.name),
        };
        Self {
            known: known.is_some(),
            number: number.unwrap_or(NOBODY),
            text: known.map_or_else(|| text.into(), Arc::clone),
        }
    }

    /// A text that the catalogue has costs nothing here.
    fn heap(&self) -> usize {
        if self.known { 0 } else { self.text.len() + 2 * size_of::<usize>() }
    }
}

/// How many names that no catalogue has are remembered, so that they count once a catalogue has them: keys and catalogues
/// are two watches, and either can be ahead. In the status, where they come from, there are only names that some catalogue
/// had, each of at most 128 bytes.
const MOST_UNKNOWN: usize = 4096;

/// The places of the ones.
fn ones(bits: &[u64]) -> impl Iterator<Item = u32> {
    (0_u32..)
        .zip(bits)
        .flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit))
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

    /// The numbers of all that a set comes to. What no catalogue knows any longer is no grant.
    fn bits(&self, granted: &Granted, names: &Interned<Name>, catalog: &Catalog, hasher: &RandomState) -> Box<[u64]> {
        let mut bits = vec![0_u64; self.names.len().div_ceil(64)];
        let presets = granted.presets.iter().filter_map(|id| catalog.preset(&names.get(*id)?.text));
        let of_presets = presets.flat_map(|preset| &preset.permissions).filter_map(|name| self.find(name, hasher));
        let own = ones(&granted.permissions).filter_map(|id| names.get(id)).map(|name| name.number);
        for number in of_presets.chain(own.filter(|number| *number != NOBODY)) {
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
                grant_names: Interned::default(),
                unknown_names: 0,
                names_left_out: 0,
                catalog: Arc::default(),
                numbers: Numbers::default(),
                duplicates: 0,
                heap: 0,
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
            Event::Init => {
                // A number that a record still has is never that of another list.
                if state.epoch == u16::MAX {
                    state.records.iter_mut().for_each(|record| record.epoch = 0);
                    state.epoch = 0;
                }
                state.epoch += 1;
            }
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

    /// Takes in that a key can't be read: what was known of it works no longer. It keeps the digests that it has, so that
    /// no other key gets them.
    pub fn shut(&self, namespace: &str, name: &str) {
        let mut state = self.write();
        let epoch = state.epoch;
        if let Some(slot) = state.slot_of(&self.hasher, namespace, name)
            && let Some(record) = state.records.get_mut(slot)
        {
            record.active = false;
            record.epoch = epoch;
        }
    }

    /// Takes in another catalogue: what each set of grants comes to.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        let numbers = Numbers::of(&catalog, &self.hasher);
        let mut state = self.write();
        let State { grants, grant_names, unknown_names, heap, .. } = &mut *state;
        *unknown_names = 0;
        for name in grant_names.values_mut() {
            *heap -= name.heap();
            *name = Name::of(&name.text, &catalog, &numbers, &self.hasher);
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

    /// Whether all ApiKeys were listed completely, at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.read().synced
    }

    /// Looks for the key that has a digest, and hands it to `judge` while nothing can change.
    ///
    /// If several ApiKeys have it, the first of the order of [`Precedence`] owns it, whatever became of that one: an
    /// ApiKey that names the digest of another neither takes its value over, nor turns it off, nor brings it back.
    pub fn look_up<T>(&self, digest: &Digest, judge: impl FnOnce(&Permissions<'_>, Option<Known<'_>>) -> T) -> T {
        let state = self.read();
        let hash = self.hasher.hash_one(digest);
        let owner = state
            .by_digest
            .iter_hash(hash)
            .filter(|place| state.digest(**place) == Some(digest))
            .filter_map(|place| Some((*place, state.records.get(place.slot())?)))
            .min_by_key(|(place, record)| (state.precedence(*place, record), place.is_other()));
        let known = owner.map(|(place, record)| {
            let ends = match &record.other {
                Some(other) if place.is_other() => other.ends,
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
        Size {
            keys: state.records.len,
            digests: state.by_digest.len(),
            grants: state.grants.len(),
            duplicates: state.duplicates,
            names_left_out: state.names_left_out,
            bytes: state.records.bytes()
                + overlaps * size_of::<Other>()
                + state.heap
                + table_bytes::<u32>(state.by_name.capacity())
                + table_bytes::<Place>(state.by_digest.capacity())
                + state.namespaces.bytes()
                + state.users.bytes()
                + state.grants.bytes()
                + state.grant_names.bytes(),
        }
    }

    /// The keys, by namespace and name, that were used since `interval` seconds or more after the last use that the
    /// cluster knows of; with the time of the use in seconds since 1970. At most `most`. A use that is remembered as later
    /// than `now`, by a clock that was wrong, was at `now`.
    #[must_use]
    pub fn used_since(&self, interval: u32, most: usize, now: u32) -> Vec<(String, String, u32)> {
        let state = self.read();
        let due = |record: &Record| {
            let (mut used, reported) = (record.used.load(Ordering::Relaxed), record.reported.load(Ordering::Relaxed));
            if used > now {
                record.used.fetch_min(now, Ordering::Relaxed);
                used = now;
            }
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

/// Seconds since 1970 of a use, which a record keeps in four bytes. A time that lies beyond them is no use.
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
        if place.is_other() { record.other.as_ref().map(|other| &other.digest) } else { Some(&record.digest) }
    }

    fn precedence<'a>(&'a self, place: Place, record: &'a Record) -> Precedence<'a> {
        let minted = match &record.other {
            Some(other) if place.is_other() => other.minted,
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
            // Another key of the same name was not used yet.
            used = self
                .records
                .get(slot)
                .filter(|record| record.created == created)
                .map_or(0, |record| record.used.load(Ordering::Relaxed));
            self.remove(hasher, slot);
        }
        let standing = standing(key);
        let mut values = standing.values.iter().map(|value| Other {
            digest: value.digest,
            ends: value.ends.map_or(NEVER, Timestamp::as_millisecond),
            minted: value.minted,
        });
        // A key without a value is nobody's concern until it has one.
        let Some(Other { digest, ends, minted }) = values.next() else { return };
        let other = values.next().map(Box::new);
        let owner = key.spec.user.as_deref().filter(|_| key.spec.key_type == KeyType::Personal);
        let record = Record {
            digest,
            ends,
            other,
            name: name.into(),
            namespace: take_text(&mut self.namespaces, &mut self.heap, hasher, namespace),
            user: owner.map_or(NOBODY, |user| take_text(&mut self.users, &mut self.heap, hasher, user)),
            grants: self.take_grants(hasher, &standing),
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

    fn take_grants(&mut self, hasher: &RandomState, standing: &Standing<'_>) -> u32 {
        let mut presets: Vec<_> = standing.presets.iter().filter_map(|name| self.take_name(hasher, name)).collect();
        let mut permissions: Vec<u64> = vec![];
        for name in &standing.permissions {
            let Some(id) = self.take_name(hasher, name) else { continue };
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
        let granted = Granted { presets: presets.into(), permissions: permissions.into() };
        let hash = hasher.hash_one(&granted);
        if let Some(id) = self.grants.use_again(hash, |known| known.granted == granted) {
            // A set uses each of its names once, however many keys have the set.
            granted.names().for_each(|id| self.release_name(hasher, id));
            return id;
        }
        let Self { grants, grant_names, numbers, catalog, heap, .. } = self;
        let bits = numbers.bits(&granted, grant_names, catalog, hasher);
        let set = GrantSet { granted, bits };
        *heap += set.heap();
        grants.add(hash, set, |known| hasher.hash_one(&known.granted))
    }

    /// The id of a name; none if no catalogue has it and there is no room for it.
    fn take_name(&mut self, hasher: &RandomState, text: &str) -> Option<u32> {
        let Self { grant_names, unknown_names, names_left_out, numbers, catalog, heap, .. } = self;
        let hash = folded(hasher, text);
        if let Some(id) = grant_names.use_again(hash, |known| known.text.eq_ignore_ascii_case(text)) {
            return Some(id);
        }
        let name = Name::of(text, catalog, numbers, hasher);
        if !name.known {
            if *unknown_names >= MOST_UNKNOWN {
                *names_left_out += 1;
                return None;
            }
            *unknown_names += 1;
        }
        *heap += name.heap();
        Some(grant_names.add(hash, name, |name| folded(hasher, &name.text)))
    }

    fn release_name(&mut self, hasher: &RandomState, id: u32) {
        if let Some(name) = self.grant_names.release(id, |name| folded(hasher, &name.text)) {
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

    fn insert(&mut self, hasher: &RandomState, namespace: &str, record: Record) {
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
                    Some(other) if place.is_other() => hasher.hash_one(other.digest),
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
        self.heap -= record.name.len();
        for (texts, id) in [(&mut self.namespaces, record.namespace), (&mut self.users, record.user)] {
            if let Some(text) = texts.release(id, |text| hasher.hash_one(&**text)) {
                self.heap -= text.len();
            }
        }
        self.release_grants(hasher, record.grants);
    }
}

/// The id of a text that many keys have in common.
fn take_text(texts: &mut Interned<Box<str>>, heap: &mut usize, hasher: &RandomState, text: &str) -> u32 {
    let hash = hasher.hash_one(text);
    texts.use_again(hash, |known| **known == *text).unwrap_or_else(|| {
        *heap += text.len();
        texts.add(hash, text.into(), |known| hasher.hash_one(&**known))
    })
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
        assert_eq!(keys.read().heap, 0);
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

    /// A key whose values were minted at a time of their own.
    fn minted(mut key: ApiKey, second: i64) -> ApiKey {
        for token in &mut key.status.as_mut().unwrap().tokens {
            token.minted_at = Time(at(second));
        }
        key
    }

    #[test]
    fn the_key_for_which_a_digest_was_written_first_owns_it_whatever_became_of_it() {
        // The attacker's object is older, and its name comes first.
        let thief = || minted(key("a", "thief", 1, &[1]), 20);
        let owners = || minted(key("z", "owner", 15, &[1]), 15);
        let change = |change: fn(&mut ApiKey)| {
            let mut key = owners();
            change(&mut key);
            key
        };
        let inactive = change(|key| key.spec.active = Some(false));
        let deleted = change(|key| key.metadata.deletion_timestamp = Some(Time(at(30))));
        let pending = change(|key| key.status.as_mut().unwrap().state = Some(KeyState::Pending));
        for order in [[thief(), owners()], [owners(), thief()]] {
            let keys = Keyring::default();
            for key in order {
                keys.apply(&Event::Apply(key));
            }
            assert_eq!(owner(&keys, 1).as_deref(), Some("z/owner"));
            assert_eq!(keys.size().duplicates, 1);
            for unusable in [&inactive, &deleted, &pending] {
                keys.apply(&Event::Apply(unusable.clone()));
                let (name, active, _) = look(&keys, 1).unwrap();
                assert_eq!((name.as_str(), active), ("z/owner", false), "a twin does not bring a revoked value back");
            }
            let expired = change(|key| key.spec.expires_at = Some(at(40).to_string()));
            keys.apply(&Event::Apply(expired));
            let ends = keys.look_up(&digest(1), |_, known| known.unwrap().ends());
            assert_eq!(ends, Some(40_000), "nor one that expired");
            keys.apply(&Event::Apply(owners()));
            // A twin that is inactive does not turn the owner off.
            let mut off = thief();
            off.spec.active = Some(false);
            keys.apply(&Event::Apply(off.clone()));
            assert_eq!(look(&keys, 1).map(|(name, active, _)| (name, active)), Some(("z/owner".to_owned(), true)));
            keys.apply(&Event::Delete(owners()));
            let (name, active, _) = look(&keys, 1).unwrap();
            assert_eq!((name.as_str(), active), ("a/thief", false), "only if it is active by itself");
            keys.apply(&Event::Apply(thief()));
            assert_eq!(look(&keys, 1).map(|(name, active, _)| (name, active)), Some(("a/thief".to_owned(), true)));
            assert_eq!(keys.size().duplicates, 0);
        }
    }

    #[test]
    fn the_value_in_overlap_has_a_time_of_its_own() {
        let keys = Keyring::default();
        let mut rotated = key("z", "owner", 1, &[2, 1]);
        rotated.status.as_mut().unwrap().tokens[0].minted_at = Time(at(100));
        keys.apply(&Event::Apply(rotated));
        keys.apply(&Event::Apply(minted(key("a", "thief", 1, &[1]), 50)));
        assert_eq!(owner(&keys, 1).as_deref(), Some("z/owner"));
        keys.apply(&Event::Apply(minted(key("a", "thief", 1, &[2]), 50)));
        assert_eq!(owner(&keys, 2).as_deref(), Some("a/thief"), "written for it first");
    }

    #[test]
    fn digests_of_the_same_second_are_told_apart_by_the_age_of_the_keys_then_by_their_names() {
        let keys = Keyring::default();
        keys.apply(&Event::Apply(minted(key("a", "young", 20, &[1]), 30)));
        keys.apply(&Event::Apply(minted(key("z", "old", 10, &[1]), 30)));
        assert_eq!(owner(&keys, 1).as_deref(), Some("z/old"));
        keys.apply(&Event::Apply(minted(key("b", "old", 10, &[1]), 30)));
        assert_eq!(owner(&keys, 1).as_deref(), Some("b/old"));
        // A time that four bytes don't hold is no way to be the first.
        keys.apply(&Event::Apply(minted(key("a", "late", 5, &[1]), 10_000_000_000)));
        assert_eq!(owner(&keys, 1).as_deref(), Some("b/old"));
    }

    #[test]
    fn a_key_that_cant_be_read_keeps_its_digests_and_works_for_nobody() {
        let keys = Keyring::default();
        keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
        keys.shut("shop", "k");
        keys.shut("shop", "never heard of");
        assert_eq!(look(&keys, 1).map(|(name, active, _)| (name, active)), Some(("shop/k".to_owned(), false)));
    }

    /// Lists that break off, so many that their numbers start over, forget nothing and keep nothing alive.
    #[test]
    fn the_numbers_of_lists_start_over_without_a_key_coming_back() {
        let keys = Keyring::default();
        for event in [Event::Init, Event::InitApply(key("shop", "gone", 1, &[1])), Event::InitDone] {
            keys.apply(&event);
        }
        // The list that "gone" was in has this number again, if there were no more than 65,536.
        for _ in 0..=u16::MAX {
            keys.apply(&Event::Init);
        }
        keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
        keys.apply(&Event::InitDone);
        assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/stays".into())));
    }

    #[test]
    fn a_record_is_as_small_as_ever() {
        assert!(size_of::<Option<Record>>() <= 96, "{}", size_of::<Option<Record>>());
    }

    /// A catalogue of these many permissions.
    fn large_catalog(permissions: usize) -> Arc<Catalog> {
        let permissions = (0..permissions).map(|n| permission(&long_name(n), false)).collect();
        Arc::new(Catalog::merge([("all", &catalog_spec(permissions, vec![]))]).0)
    }

    /// As long as names may be.
    fn long_name(number: usize) -> String {
        format!("{:0>120}:Action{number}", "resource")
    }

    /// A key with a value and these permissions.
    fn key_with(number: usize, permissions: Vec<String>) -> ApiKey {
        let mut key = key("shop", &format!("k{number}"), 1, &[]);
        key.spec.presets.clear();
        key.spec.permissions = permissions.clone();
        let status = key.status.as_mut().unwrap();
        status.presets.clear();
        status.permissions = permissions;
        let digest = Digest::of(&number.to_le_bytes());
        let (id, sha256) = (digest.id(), digest.to_string());
        status.tokens = vec![Token { id, sha256, generation: None, minted_at: Time(at(1)), expires_at: None }];
        key
    }

    /// 2,700 keys with sets of their own, some 300 names of 128 bytes in each: what `edit` in one namespace can make.
    #[test]
    fn thousands_of_different_sets_of_hundreds_of_names_are_small() {
        const KEYS: usize = 2700;
        let keys = Keyring::default();
        keys.set_catalog(large_catalog(600));
        let empty = keys.size().bytes;
        let mut names = 0;
        for number in 0..KEYS {
            // Half of 600 by chance, no two alike.
            let mut state = number as u64;
            let mut chance = |_: &usize| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state >> 63 == 1
            };
            let permissions: Vec<_> = (0..600).filter(|n| chance(n)).map(long_name).collect();
            names += permissions.iter().map(|name| name.len() + size_of::<Box<str>>()).sum::<usize>();
            keys.apply(&Event::Apply(key_with(number, permissions)));
        }
        let size = keys.size();
        assert_eq!(size.grants, KEYS);
        let each = (size.bytes - empty) / KEYS;
        println!(
            "{KEYS} keys, {} sets of 300 names: {each} bytes a key; the names alone: {}",
            size.grants,
            names / KEYS
        );
        assert!(each < 600, "{each} bytes a key");
        for number in 0..KEYS {
            keys.forget("shop", &format!("k{number}"));
        }
        assert_eq!((keys.size().grants, keys.read().grant_names.len()), (0, 0));
        assert_eq!((keys.read().heap, keys.read().unknown_names), (0, 0), "all of it is given back");
    }

    #[test]
    fn names_that_no_catalogue_has_take_a_bounded_room_and_count_when_one_has_them() {
        let keys = Keyring::default();
        for number in 0..MOST_UNKNOWN / 100 + 10 {
            let names = (0..100).map(|n| format!("unknown-{number}:{n}")).collect();
            keys.apply(&Event::Apply(key_with(number, names)));
        }
        let size = keys.size();
        assert_eq!(keys.read().unknown_names, MOST_UNKNOWN);
        assert_eq!(size.names_left_out, (MOST_UNKNOWN / 100 + 10) * 100 - MOST_UNKNOWN);
        // What a catalogue has is never left out, whatever else there is.
        keys.set_catalog(large_catalog(3));
        keys.apply(&Event::Apply(key_with(1_000_000, vec![long_name(0), "unknown:x".to_owned()])));
        let has = |number: usize, name: &str| {
            keys.look_up(&Digest::of(&number.to_le_bytes()), |permissions, known| {
                permissions.has(&known.unwrap(), name)
            })
        };
        assert_eq!(has(1_000_000, &long_name(0)), Some(true));
        let late = catalog_spec(vec![permission("unknown-0:7", false)], vec![]);
        keys.set_catalog(Arc::new(Catalog::merge([("late", &late)]).0));
        assert_eq!((has(0, "unknown-0:7"), has(1, "unknown-0:7")), (Some(true), Some(false)));
        assert_eq!(keys.read().unknown_names, MOST_UNKNOWN, "one is known now, and one is not any longer");
        for number in (0..MOST_UNKNOWN / 100 + 10).chain([1_000_000]) {
            keys.forget("shop", &format!("k{number}"));
        }
        assert_eq!((keys.read().heap, keys.read().unknown_names, keys.read().grant_names.len()), (0, 0, 0));
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
        let used_since = |interval, most| keys.used_since(interval, most, 1_000_000);
        assert_eq!(used_since(3600, 10), []);
        touch(10_000);
        let due = ("shop".to_owned(), "k".to_owned(), 10_000);
        assert_eq!(used_since(3600, 10), [due]);
        assert!(keys.is_unreported("shop", "k", 10_000, 3600));
        keys.reported("shop", "k", 10_000);
        touch(13_000);
        assert_eq!(used_since(3600, 10), [], "told less than an hour ago");
        touch(13_700);
        // Another replica tells, and the watch brings it here.
        let mut told = key("shop", "k", 1, &[1]);
        told.status.as_mut().unwrap().last_used_at = Some(Time(at(11_000)));
        keys.apply(&Event::Apply(told));
        assert_eq!(used_since(3600, 10), []);
        assert_eq!(used_since(2000, 10).len(), 1, "what was used is still known");
        keys.apply(&Event::Apply(key("shop", "k", 2, &[1])));
        assert_eq!(used_since(0, 10), [], "another key of the same name was not used");
    }

    #[test]
    fn a_use_in_the_future_was_now() {
        let keys = Keyring::default();
        keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
        keys.look_up(&digest(1), |_, known| known.unwrap().touch(at(4_000_000_000)));
        let due = ("shop".to_owned(), "k".to_owned(), 10_000);
        assert_eq!(keys.used_since(3600, 10, 10_000), [due]);
        keys.reported("shop", "k", 10_000);
        assert_eq!(keys.used_since(3600, 10, 50_000), [], "it was used once");
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
