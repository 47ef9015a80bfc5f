//! Storage for values that keys share.

use hashbrown::HashTable;

/// Values that keys share, with reference counts. Each is stored once, as long as a key uses it.
pub(super) struct Interned<T> {
    pub(super) entries: Vec<Option<(T, u32)>>,
    free: Vec<u32>,
    table: HashTable<u32>,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), table: HashTable::new() }
    }
}

impl<T> Interned<T> {
    pub(super) fn get(&self, id: u32) -> Option<&T> {
        Some(&self.entries.get(id as usize)?.as_ref()?.0)
    }

    /// Returns the id of an existing value, and adds one use.
    pub(super) fn acquire(&mut self, hash: u64, is: impl Fn(&T) -> bool) -> Option<u32> {
        let Self { entries, table, .. } = self;
        let same = |id: &u32| entries[*id as usize].as_ref().is_some_and(|(value, _)| is(value));
        let id = *table.find(hash, same)?;
        if let Some((_, uses)) = &mut entries[id as usize] {
            *uses += 1;
        }
        Some(id)
    }

    /// Adds a new value with one use, and returns its id.
    pub(super) fn add(&mut self, hash: u64, value: T, rehash: impl Fn(&T) -> u64) -> u32 {
        let Self { entries, free, table } = self;
        let entry = Some((value, 1));
        let id = if let Some(id) = free.pop() {
            entries[id as usize] = entry;
            id
        } else {
            entries.push(entry);
            u32::try_from(entries.len() - 1).unwrap_or(u32::MAX)
        };
        table.insert_unique(hash, id, |id| entries[*id as usize].as_ref().map_or(0, |(value, _)| rehash(value)));
        id
    }

    /// Removes one use. Returns the value if this was the last one.
    pub(super) fn release(&mut self, id: u32, hash: impl Fn(&T) -> u64) -> Option<T> {
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

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().flatten().map(|(value, _)| value)
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The memory in bytes, without the heap memory of the values.
    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Option<(T, u32)>>()
            + self.free.capacity() * size_of::<u32>()
            + table_bytes::<u32>(self.table.capacity())
    }
}

/// The memory of a hash table in bytes. Seven of eight buckets can be used, and each has a control byte.
pub(super) const fn table_bytes<T>(capacity: usize) -> usize {
    capacity * 8 / 7 * (size_of::<T>() + 1)
}
