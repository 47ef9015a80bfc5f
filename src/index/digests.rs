//! The owners of digests. A digest belongs to the ApiKey for which the operator first wrote it. The leader accepts no
//! value for one ApiKey that another one has.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};

use crate::{
    api::{ApiKey, ApiKeyStatus},
    domain::key::Digest,
};

/// The digests in the status of each ApiKey, and accepted digests whose status is not written yet.
#[derive(Default)]
pub struct Digests(Mutex<DigestState>);

#[derive(Default)]
struct DigestState {
    /// The number of digests in statuses, by their first eight bytes. If a prefix is present, the statuses are searched
    /// for the whole digest.
    known: HashMap<u64, u32>,
    /// The uid of the ApiKey for which a digest was accepted, until its status arrives with the digest.
    accepted: HashMap<Digest, String>,
}

impl Digests {
    /// Applies a change of an ApiKey, after the store. `before` is `None` for a new ApiKey, `after` for a deleted one.
    pub fn replace(&self, before: Option<&ApiKey>, after: Option<&ApiKey>) {
        let digests = |key: Option<&ApiKey>| digests(key.and_then(|key| key.status.as_ref()));
        let (before, after) = (digests(before), digests(after));
        if before == after {
            return;
        }
        let mut state = self.lock();
        for digest in &after {
            state.add(digest);
        }
        for digest in &before {
            state.remove(digest);
        }
        for digest in after {
            state.accepted.remove(&digest);
        }
    }

    /// Replaces the digests in statuses by those of a complete list.
    pub fn reset<'a>(&self, keys: impl IntoIterator<Item = &'a ApiKey>) {
        let mut state = self.lock();
        state.known.clear();
        for key in keys {
            for digest in digests(key.status.as_ref()) {
                state.add(&digest);
                state.accepted.remove(&digest);
            }
        }
    }

    /// Removes accepted digests of the ApiKeys for whose uid `keep` returns false.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().accepted.retain(|_, owner| keep(owner));
    }

    /// Removes accepted digests of a deleted ApiKey.
    pub fn forget(&self, uid: &str) {
        self.lock().accepted.retain(|_, owner| owner != uid);
    }

    /// Accepts a digest for an ApiKey whose status does not have it yet.
    ///
    /// # Errors
    /// The other ApiKey that has the digest. `None` while the digest is not in the status of that ApiKey yet.
    pub fn accept(&self, digest: Digest, key: &ApiKey, keys: &Store<ApiKey>) -> Result<(), Option<ObjectRef<ApiKey>>> {
        let uid = key.uid().unwrap_or_default();
        let mut state = self.lock();
        let exists = |uid: &str| keys.state().iter().any(|key| key.uid().as_deref() == Some(uid));
        if state.accepted.get(&digest).is_some_and(|owner| *owner != uid && exists(owner)) {
            return Err(None);
        }
        if state.known.contains_key(&prefix(&digest)) {
            let has = |other: &ApiKey| digests(other.status.as_ref()).contains(&digest);
            let other = keys.state().into_iter().find(|other| other.uid().as_deref() != Some(&uid) && has(other));
            if let Some(other) = other {
                return Err(Some(ObjectRef::from_obj(&*other)));
            }
        }
        state.accepted.insert(digest, uid);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, DigestState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DigestState {
    fn add(&mut self, digest: &Digest) {
        *self.known.entry(prefix(digest)).or_default() += 1;
    }

    fn remove(&mut self, digest: &Digest) {
        if let Some(count) = self.known.get_mut(&prefix(digest)) {
            *count -= 1;
            if *count == 0 {
                self.known.remove(&prefix(digest));
            }
        }
    }
}

fn digests(status: Option<&ApiKeyStatus>) -> Vec<Digest> {
    let tokens = status.into_iter().flat_map(|status| &status.tokens);
    tokens.filter_map(|token| Digest::parse(&token.sha256)).collect()
}

fn prefix(digest: &Digest) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector::store::Writer, watcher::Event};

    use super::*;
    use crate::test_support::key_with_values as with_values;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn key(name: &str, values: &[u8]) -> ApiKey {
        let mut key = with_values("shop", name, 1, values);
        key.metadata.uid = Some(name.to_owned());
        key
    }

    /// A reconciliation that runs while its ApiKey is deleted accepts a digest for the deleted ApiKey.
    #[test]
    fn digest_that_was_accepted_for_a_deleted_key_is_available() {
        let mut fixture = Fixture::default();
        let (deleted, other) = (key("deleted", &[]), key("other", &[]));
        fixture.put(&deleted);
        fixture.put(&other);
        fixture.delete(&deleted);
        assert_eq!(fixture.accept(1, &deleted), Ok(()));
        assert_eq!(fixture.accept(1, &other), Ok(()));
    }

    /// The digests and the store, updated as the operator updates them.
    #[derive(Default)]
    struct Fixture {
        digests: Digests,
        writer: Writer<ApiKey>,
    }

    impl Fixture {
        fn put(&mut self, key: &ApiKey) {
            let before = self.writer.as_reader().get(&ObjectRef::from_obj(key));
            self.writer.apply_watcher_event(&Event::Apply(key.clone()));
            self.digests.replace(before.as_deref(), Some(key));
        }

        fn delete(&mut self, key: &ApiKey) {
            let before = self.writer.as_reader().get(&ObjectRef::from_obj(key));
            self.digests.replace(before.as_deref(), None);
            self.digests.forget(&key.uid().unwrap());
            self.writer.apply_watcher_event(&Event::Delete(key.clone()));
        }

        /// Accepts a digest. The error is the name of the owner.
        fn accept(&self, value: u8, key: &ApiKey) -> Result<(), Option<String>> {
            let accepted = self.digests.accept(digest(value), key, &self.writer.as_reader());
            accepted.map_err(|other| other.map(|other| other.name))
        }
    }

    #[test]
    fn digest_belongs_to_the_first_key_for_which_it_was_accepted() {
        let mut fixture = Fixture::default();
        let (first, second) = (key("first", &[]), key("second", &[]));
        fixture.put(&first);
        assert_eq!(fixture.accept(1, &first), Ok(()));
        assert_eq!(fixture.accept(1, &first), Ok(()), "a second attempt after the write of the status failed");
        assert_eq!(fixture.accept(1, &second), Err(None), "before the status of the first key arrives");
        fixture.put(&key("first", &[1]));
        assert_eq!(fixture.accept(1, &second), Err(Some("first".to_owned())));
        assert_eq!(fixture.accept(1, &first), Ok(()));
        assert_eq!(fixture.accept(2, &second), Ok(()));
        fixture.put(&key("first", &[3, 1]));
        assert_eq!(fixture.accept(1, &second), Err(Some("first".to_owned())), "during the overlap");
        fixture.put(&key("first", &[3]));
        assert_eq!(fixture.accept(1, &second), Ok(()));
    }

    #[test]
    fn digest_is_available_after_its_key_is_deleted() {
        let mut fixture = Fixture::default();
        let (first, second) = (key("first", &[1]), key("second", &[]));
        fixture.put(&first);
        assert!(fixture.accept(1, &second).is_err());
        fixture.delete(&first);
        assert_eq!(fixture.accept(1, &second), Ok(()));
        fixture.delete(&second);
        assert_eq!(fixture.accept(1, &key("third", &[])), Ok(()), "the digest was accepted and never in a status");
    }

    #[test]
    fn reset_replaces_the_digests_in_statuses() {
        let mut fixture = Fixture::default();
        fixture.put(&key("first", &[1, 2]));
        let keys = [key("first", &[2])];
        fixture.digests.reset(&keys);
        fixture.writer.apply_watcher_event(&Event::Apply(keys[0].clone()));
        let second = key("second", &[]);
        assert_eq!(fixture.accept(1, &second), Ok(()));
        assert!(fixture.accept(2, &second).is_err());
        assert_eq!(fixture.digests.lock().known.len(), 1);
    }
}
