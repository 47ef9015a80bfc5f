//! The grants of keys: sets of names, and the permissions that the merged catalog gives to them.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

use super::{NO_ID, interned::Interned};
use crate::domain::catalog::Catalog;

/// The names of presets and permissions that keys have. Ids and bits keep it small, since users can create many keys
/// with different sets of hundreds of long names.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct GrantedNames {
    /// The ids of the names of the presets, sorted.
    pub(super) presets: Box<[u32]>,
    /// One bit for the id of the name of each permission, without trailing zero words.
    pub(super) permissions: Box<[u64]>,
}

/// A set of names, with the permissions that the current catalog gives to it.
pub(super) struct GrantSet {
    pub(super) granted: GrantedNames,
    /// One bit for the number of each permission.
    pub(super) bits: Box<[u64]>,
}

impl GrantSet {
    pub(super) fn heap(&self) -> usize {
        size_of_val(&*self.granted.presets) + size_of_val(&*self.granted.permissions) + size_of_val(&*self.bits)
    }
}

impl GrantedNames {
    /// Returns the ids of the names of all presets and permissions.
    pub(super) fn names(&self) -> impl Iterator<Item = u32> {
        self.presets.iter().copied().chain(set_bits(&self.permissions))
    }
}

/// The name of a preset or permission in a set.
pub(super) struct GrantName {
    /// Shared with the catalog, if the name is in it.
    pub(super) text: Arc<str>,
    /// Whether the name is in the catalog.
    pub(super) known: bool,
    /// The number of the permission with this name, or [`NO_ID`].
    pub(super) number: u32,
}

impl GrantName {
    /// Looks a name up in the catalog.
    pub(super) fn of(text: &str, catalog: &Catalog, numbers: &PermissionNumbers, hasher: &RandomState) -> Self {
        let number = numbers.find(text, hasher);
        let known = match number {
            Some(number) => Some(&numbers.names[number as usize]),
            None => catalog.preset(text).map(|preset| &preset.name),
        };
        Self {
            known: known.is_some(),
            number: number.unwrap_or(NO_ID),
            text: known.map_or_else(|| text.into(), Arc::clone),
        }
    }

    /// The heap memory in bytes. A text that is shared with the catalog counts as 0.
    pub(super) fn heap(&self) -> usize {
        if self.known { 0 } else { self.text.len() + 2 * size_of::<usize>() }
    }
}

/// The maximum number of stored names that are in no catalog. They take effect once a catalog has them, since either of
/// the watches of keys and catalogs can be ahead. They come from statuses, which contain only names that were in a
/// catalog, of at most 128 bytes.
pub(super) const MAX_UNKNOWN_NAMES: usize = 4096;

/// Returns the positions of the set bits.
pub(super) fn set_bits(bits: &[u64]) -> impl Iterator<Item = u32> {
    (0_u32..)
        .zip(bits)
        .flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit))
}

/// The permissions of the catalog, numbered in the order of their names.
#[derive(Default)]
pub(super) struct PermissionNumbers {
    pub(super) names: Vec<Arc<str>>,
    table: HashTable<u32>,
}

impl PermissionNumbers {
    pub(super) fn of(catalog: &Catalog, hasher: &RandomState) -> Self {
        let mut names: Vec<_> = catalog.permissions().map(|permission| permission.name.clone()).collect();
        names.sort_unstable();
        let mut table = HashTable::with_capacity(names.len());
        for (number, name) in (0_u32..).zip(&names) {
            table.insert_unique(case_insensitive_hash(hasher, name), number, |number| {
                case_insensitive_hash(hasher, &names[*number as usize])
            });
        }
        Self { names, table }
    }

    pub(super) fn find(&self, name: &str, hasher: &RandomState) -> Option<u32> {
        let same = |number: &u32| self.names[*number as usize].eq_ignore_ascii_case(name);
        self.table.find(case_insensitive_hash(hasher, name), same).copied()
    }

    /// Returns one bit for the number of each permission of a set. Names that are not in the catalog grant nothing.
    pub(super) fn bits(
        &self,
        granted: &GrantedNames,
        names: &Interned<GrantName>,
        catalog: &Catalog,
        hasher: &RandomState,
    ) -> Box<[u64]> {
        let mut bits = vec![0_u64; self.names.len().div_ceil(64)];
        let presets = granted.presets.iter().filter_map(|id| catalog.preset(&names.get(*id)?.text));
        let of_presets = presets.flat_map(|preset| &preset.permissions).filter_map(|name| self.find(name, hasher));
        let own = set_bits(&granted.permissions).filter_map(|id| names.get(id)).map(|name| name.number);
        for number in of_presets.chain(own.filter(|number| *number != NO_ID)) {
            bits[number as usize / 64] |= 1 << (number % 64);
        }
        bits.into()
    }
}

/// Returns a hash of a name that ignores the case of ASCII letters. It needs no heap memory.
pub(super) fn case_insensitive_hash(hasher: &RandomState, name: &str) -> u64 {
    use std::hash::Hasher;
    let mut state = hasher.build_hasher();
    let mut chunk = [0_u8; 64];
    for bytes in name.as_bytes().chunks(chunk.len()) {
        let chunk = &mut chunk[..bytes.len()];
        chunk.copy_from_slice(bytes);
        chunk.make_ascii_lowercase();
        state.write(chunk);
    }
    state.finish()
}
