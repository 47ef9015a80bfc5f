//! Storage for the records of ApiKeys, in reusable slots.

use std::sync::atomic::AtomicU32;

use crate::{api::KeyType, domain::key::Digest};

/// The record of one ApiKey.
pub(super) struct IndexedKey {
    pub(super) digest: Digest,
    /// The end of the current value, in milliseconds since 1970.
    pub(super) ends: i64,
    /// The value in overlap. Few keys have one.
    pub(super) other: Option<Box<OverlapValue>>,
    pub(super) name: Box<str>,
    pub(super) namespace: u32,
    pub(super) user: u32,
    pub(super) grants: u32,
    /// The time when the current value was minted or imported, in seconds since 1970.
    pub(super) minted: u32,
    /// The creation time of the ApiKey, in seconds since 1970.
    pub(super) created: u32,
    /// The time of the last use at this replica, in seconds since 1970.
    pub(super) used: AtomicU32,
    /// The last use in the status, in seconds since 1970.
    pub(super) reported: AtomicU32,
    /// The number of the last list that contained the ApiKey. Two bytes, to keep the record small.
    pub(super) epoch: u16,
    pub(super) key_type: KeyType,
    pub(super) active: bool,
}

/// The value in overlap. The fields have the same meaning as in [`IndexedKey`].
pub(super) struct OverlapValue {
    pub(super) digest: Digest,
    pub(super) ends: i64,
    pub(super) minted: u32,
}

/// The end of a value that has none.
pub(super) const NO_END: i64 = i64::MAX;

/// The id of an absent user or permission.
pub(super) const NO_ID: u32 = u32::MAX;

/// The slot of a record, and which of its two values is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ValueSlot(u32);

impl ValueSlot {
    pub(super) const fn of(slot: u32, other: bool) -> Self {
        Self(slot << 1 | other as u32)
    }

    pub(super) const fn slot(self) -> u32 {
        self.0 >> 1
    }

    pub(super) const fn is_other(self) -> bool {
        self.0 & 1 == 1
    }
}

/// Records in chunks, so that growth neither copies records nor doubles the memory.
#[derive(Default)]
pub(super) struct IndexedKeys {
    chunks: Vec<Vec<Option<IndexedKey>>>,
    free: Vec<u32>,
    pub(super) len: usize,
}

pub(super) const CHUNK_SIZE: usize = 1024;

impl IndexedKeys {
    pub(super) fn get(&self, slot: u32) -> Option<&IndexedKey> {
        self.chunks.get(slot as usize / CHUNK_SIZE)?.get(slot as usize % CHUNK_SIZE)?.as_ref()
    }

    pub(super) fn insert(&mut self, record: IndexedKey) -> u32 {
        self.len += 1;
        if let Some(slot) = self.free.pop() {
            self.chunks[slot as usize / CHUNK_SIZE][slot as usize % CHUNK_SIZE] = Some(record);
            return slot;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK_SIZE) {
            self.chunks.push(Vec::with_capacity(CHUNK_SIZE));
        }
        let at = self.chunks.len() - 1;
        self.chunks[at].push(Some(record));
        u32::try_from(at * CHUNK_SIZE + self.chunks[at].len() - 1).unwrap_or(u32::MAX)
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<IndexedKey> {
        let slot_entry = self.chunks.get_mut(slot as usize / CHUNK_SIZE)?.get_mut(slot as usize % CHUNK_SIZE)?;
        let record = slot_entry.take()?;
        self.len -= 1;
        self.free.push(slot);
        Some(record)
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut IndexedKey> {
        self.chunks.get_mut(slot as usize / CHUNK_SIZE)?.get_mut(slot as usize % CHUNK_SIZE)?.as_mut()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut IndexedKey> {
        self.chunks.iter_mut().flatten().flatten()
    }

    pub(super) fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK_SIZE * size_of::<Option<IndexedKey>>() + self.free.capacity() * size_of::<u32>()
    }

    /// Returns every record with its slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &IndexedKey)> {
        (0_u32..).zip(self.chunks.iter().flatten()).filter_map(|(slot, record)| Some((slot, record.as_ref()?)))
    }
}
