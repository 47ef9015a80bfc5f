//! Which ApiKey has which digest. A digest belongs to the ApiKey for which the operator first wrote it: the leader
//! accepts no value for one ApiKey that another one has.

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

/// The digests in the status of every ApiKey, and those that are on their way there.
#[derive(Default)]
pub struct Digests(Mutex<State>);

#[derive(Default)]
struct State {
    /// How many statuses have a digest with this beginning. The whole digest is in the status: this only says, in one
    /// step and few bytes, that it is worth looking there.
    known: HashMap<u64, u32>,
    /// The uid of the ApiKey for which a digest was accepted whose status was not seen yet.
    accepted: HashMap<Digest, String>,
}

impl Digests {
    /// Takes in that the status of an ApiKey changed, after the store did. Either is absent if there is no such ApiKey.
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

    /// Starts anew from a complete list.
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

    /// Forgets what was accepted for ApiKeys that are not to be kept.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().accepted.retain(|_, owner| keep(owner));
    }

    /// Forgets what was accepted for an ApiKey that is gone.
    pub fn forget(&self, uid: &str) {
        self.lock().accepted.retain(|_, owner| owner != uid);
    }

    /// Accepts a digest for an ApiKey whose status does not have it yet.
    ///
    /// # Errors
    /// The other ApiKey that has it; without a name while its status is being written.
    pub fn accept(&self, digest: Digest, key: &ApiKey, keys: &Store<ApiKey>) -> Result<(), Option<ObjectRef<ApiKey>>> {
        let uid = key.uid().unwrap_or_default();
        let mut state = self.lock();
        let lives = |uid: &str| keys.state().iter().any(|key| key.uid().as_deref() == Some(uid));
        if state.accepted.get(&digest).is_some_and(|owner| *owner != uid && lives(owner)) {
            return Err(None);
        }
        if state.known.contains_key(&beginning(&digest)) {
            let has = |other: &ApiKey| digests(other.status.as_ref()).contains(&digest);
            let other = keys.state().into_iter().find(|other| other.uid().as_deref() != Some(&uid) && has(other));
            if let Some(other) = other {
                return Err(Some(ObjectRef::from_obj(&*other)));
            }
        }
        state.accepted.insert(digest, uid);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, digest: &Digest) {
        *self.known.entry(beginning(digest)).or_default() += 1;
    }

    fn remove(&mut self, digest: &Digest) {
        if let Some(count) = self.known.get_mut(&beginning(digest)) {
            *count -= 1;
            if *count == 0 {
                self.known.remove(&beginning(digest));
            }
        }
    }
}

fn digests(status: Option<&ApiKeyStatus>) -> Vec<Digest> {
    let tokens = status.into_iter().flat_map(|status| &status.tokens);
    tokens.filter_map(|token| Digest::parse(&token.sha256)).collect()
}

fn beginning(digest: &Digest) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector::store::Writer, watcher::Event};

    use super::*;
    use crate::index::keyring::tests::key as with_values;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn key(name: &str, values: &[u8]) -> ApiKey {
        let mut key = with_values("shop", name, 1, values);
        key.metadata.uid = Some(name.to_owned());
        key
    }

    /// A look that was under way when its key was deleted accepts a digest for a key that is gone.
    #[test]
    fn what_was_accepted_for_a_key_that_is_gone_is_free() {
        let mut world = World::default();
        let (gone, other) = (key("gone", &[]), key("other", &[]));
        world.put(&gone);
        world.put(&other);
        world.delete(&gone);
        assert_eq!(world.accept(1, &gone), Ok(()));
        assert_eq!(world.accept(1, &other), Ok(()));
    }

    /// Digests and the store, fed as the operator feeds them.
    #[derive(Default)]
    struct World {
        digests: Digests,
        writer: Writer<ApiKey>,
    }

    impl World {
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

        /// Whose the digest is, if it is another key's.
        fn accept(&self, value: u8, key: &ApiKey) -> Result<(), Option<String>> {
            let accepted = self.digests.accept(digest(value), key, &self.writer.as_reader());
            accepted.map_err(|other| other.map(|other| other.name))
        }
    }

    #[test]
    fn a_digest_belongs_to_the_first_key_that_it_was_accepted_for() {
        let mut world = World::default();
        let (first, second) = (key("first", &[]), key("second", &[]));
        world.put(&first);
        assert_eq!(world.accept(1, &first), Ok(()));
        assert_eq!(world.accept(1, &first), Ok(()), "the write of its status failed, and it tries again");
        assert_eq!(world.accept(1, &second), Err(None), "before the status of the first is seen");
        world.put(&key("first", &[1]));
        assert_eq!(world.accept(1, &second), Err(Some("first".to_owned())));
        assert_eq!(world.accept(1, &first), Ok(()));
        assert_eq!(world.accept(2, &second), Ok(()));
        world.put(&key("first", &[3, 1]));
        assert_eq!(world.accept(1, &second), Err(Some("first".to_owned())), "in overlap");
        world.put(&key("first", &[3]));
        assert_eq!(world.accept(1, &second), Ok(()));
    }

    #[test]
    fn a_digest_is_free_when_its_key_is_gone() {
        let mut world = World::default();
        let (first, second) = (key("first", &[1]), key("second", &[]));
        world.put(&first);
        assert!(world.accept(1, &second).is_err());
        world.delete(&first);
        assert_eq!(world.accept(1, &second), Ok(()));
        world.delete(&second);
        assert_eq!(world.accept(1, &key("third", &[])), Ok(()), "it was never in a status");
    }

    #[test]
    fn a_new_list_replaces_what_was_known() {
        let mut world = World::default();
        world.put(&key("first", &[1, 2]));
        let keys = [key("first", &[2])];
        world.digests.reset(&keys);
        world.writer.apply_watcher_event(&Event::Apply(keys[0].clone()));
        let second = key("second", &[]);
        assert_eq!(world.accept(1, &second), Ok(()));
        assert!(world.accept(2, &second).is_err());
        assert_eq!(world.digests.lock().known.len(), 1);
    }
}
