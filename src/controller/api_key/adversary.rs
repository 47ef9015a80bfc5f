//! Users with write access to Secrets and to their own keys write whatever they like, in any order, while the operator
//! works. No value may ever pass that the operator did not mint for that very key, and none that passed and was revoked.
//!
//! Everything that decides is the real thing: [`observe::classify`], [`Digests`], [`lifecycle`] and [`status`]. The
//! API server is a map. In most runs no admission policy guards the Secrets: this is what holds without one.

#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    ResourceExt,
    runtime::{
        reflector::{ObjectRef, store::Writer},
        watcher::Event,
    },
};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use super::observe::{self, Trust};
use crate::{
    api::{ApiKey, KeyType, RevealMode, Rotation, SecuritySettingsSpec, Time},
    domain::{
        key::{Digest, Key},
        lifecycle::{self, Held, Observed, Schedule, Step, World},
        record::{self, Record, Sealed, Subject},
        status::{self, Facts, secret_ref},
        validate::{
            check,
            tests::{catalog, spec},
        },
    },
    index::digests::Digests,
    sealing::Keyring,
};

const START: i64 = 1_800_000_000;

type Name = (String, String);

/// A cluster, the operator in it, and what attackers know.
struct Cluster {
    rng: Xoshiro256PlusPlus,
    ring: Keyring,
    /// Whether the policy of the chart is in force: then attackers delete Secrets, and leave them behind.
    guarded: bool,
    now: i64,
    versions: u64,
    keys: BTreeMap<Name, ApiKey>,
    secrets: BTreeMap<Name, Secret>,
    settings: SecuritySettingsSpec,
    digests: Digests,
    store: Writer<ApiKey>,
    /// Every Secret that was ever seen, as an attacker saved it.
    saved: Vec<Secret>,
    /// Values that an attacker made up, or saw.
    known: Vec<(KeyType, Vec<u8>)>,
    /// For which ApiKey, by uid, the operator minted a digest.
    minted: BTreeMap<String, String>,
    /// Digests that passed once and were revoked, or whose ApiKey is gone.
    revoked: BTreeSet<String>,
}

const NAMES: [(&str, &str, KeyType); 4] = [
    ("shop", "a", KeyType::Team),
    ("shop", "p", KeyType::Personal),
    ("bank", "a", KeyType::Team),
    ("bank", "s", KeyType::SendYourData),
];

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let settings =
            SecuritySettingsSpec { one_time_reveal: Some(rng.random_bool(0.3)), ..SecuritySettingsSpec::default() };
        let guarded = rng.random_bool(0.3);
        let known = NAMES.map(|(_, _, key_type)| {
            let value = Key::mint(key_type, &mut rand::rngs::SysRng).unwrap();
            (key_type, value.expose().as_bytes().to_vec())
        });
        Self {
            rng,
            guarded,
            ring: Keyring::generate().unwrap(),
            now: START,
            versions: 0,
            keys: BTreeMap::new(),
            secrets: BTreeMap::new(),
            settings,
            digests: Digests::default(),
            store: Writer::default(),
            saved: vec![],
            known: known.into(),
            minted: BTreeMap::new(),
            revoked: BTreeSet::new(),
        }
    }

    fn now(&self) -> jiff::Timestamp {
        jiff::Timestamp::from_second(self.now).unwrap()
    }

    fn chance(&mut self, share: f64) -> bool {
        self.rng.random_bool(share)
    }

    fn pick(&mut self, len: usize) -> Option<usize> {
        (len > 0).then(|| self.rng.random_range(0..len))
    }

    fn version(&mut self) -> String {
        self.versions += 1;
        self.versions.to_string()
    }

    /// The watch brings a change of an ApiKey.
    fn see(&mut self, name: &Name, after: Option<&ApiKey>) {
        let reference = ObjectRef::<ApiKey>::new(&name.1).within(&name.0);
        let before = self.store.as_reader().get(&reference);
        self.digests.replace(before.as_deref(), after);
        if let Some(after) = after {
            self.store.apply_watcher_event(&Event::Apply(after.clone()));
        } else if let Some(before) = before {
            self.digests.forget(&before.uid().unwrap());
            self.store.apply_watcher_event(&Event::Delete((*before).clone()));
        }
    }

    fn put(&mut self, name: &Name, mut secret: Secret) {
        secret.metadata.namespace = Some(name.0.clone());
        secret.metadata.name = Some(name.1.clone());
        secret.metadata.resource_version = Some(self.version());
        secret.metadata.creation_timestamp.get_or_insert(Time(self.now()));
        self.saved.push(secret.clone());
        self.secrets.insert(name.clone(), secret);
    }

    /// Somebody creates, edits or deletes an ApiKey, as the owner of that key may.
    fn manage(&mut self, n: usize) {
        let (namespace, key_name, key_type) = NAMES[n];
        let name = (namespace.to_owned(), key_name.to_owned());
        let Some(mut key) = self.keys.get(&name).cloned() else {
            let mut key = ApiKey::new(key_name, spec(key_type, &["Alerts"], &[]));
            key.metadata.namespace = Some(namespace.to_owned());
            key.metadata.uid = Some(self.version());
            key.metadata.creation_timestamp = Some(Time(self.now()));
            key.metadata.generation = Some(1);
            self.see(&name, Some(&key));
            self.keys.insert(name, key);
            return;
        };
        if self.chance(0.2) {
            let tokens = key.status.iter().flat_map(|status| &status.tokens);
            self.revoked.extend(tokens.map(|token| token.sha256.clone()));
            self.see(&name, None);
            self.keys.remove(&name);
            // The garbage collector may be late, or the Secret left behind without an owner.
            let place = (name.0, secret_ref(&key).name);
            if self.chance(0.6) {
                self.secrets.remove(&place);
            } else if let Some(secret) = self.secrets.get_mut(&place)
                && self.rng.random_bool(0.5)
            {
                secret.metadata.owner_references = None;
            }
            return;
        }
        let rotation = key.spec.rotation.get_or_insert_default();
        match self.rng.random_range(0..4) {
            0 | 1 => {
                rotation.requested_at = Some(self.now().to_string());
                rotation.overlap = Some(["0s", "1m", "1h"][self.rng.random_range(0..3)].to_owned());
            }
            2 => rotation.overlap = Some("0s".to_owned()),
            _ => rotation.requested_at = Some(jiff::Timestamp::from_second(START - 5).unwrap().to_string()),
        }
        key.spec.rotation = Some(Rotation { every: None, ..rotation.clone() });
        key.metadata.generation = key.metadata.generation.map(|generation| generation + 1);
        self.see(&name, Some(&key));
        self.keys.insert(name, key);
    }

    /// Somebody with all rights on Secrets writes one.
    fn attack(&mut self) {
        let (namespace, key_name, key_type) = NAMES[self.rng.random_range(0..NAMES.len())];
        let name = (namespace.to_owned(), format!("{key_name}-secret"));
        if self.chance(0.15) {
            self.secrets.remove(&name);
            return;
        }
        if self.guarded {
            return;
        }
        let here = self.secrets.get(&name).cloned();
        let one = self.pick(self.saved.len()).map(|n| self.saved[n].clone());
        let other = self.pick(self.saved.len()).map(|n| self.saved[n].clone());
        // Of the Secret that is there, or a saved one; of this place or of another.
        let base = if self.chance(0.5) { one.or(here) } else { here.or(one) };
        let mut secret = base.unwrap_or_default();
        secret.type_ = Some(if self.chance(0.95) { record::SECRET_TYPE } else { "Opaque" }.to_owned());
        if let Some(other) = &other {
            if self.chance(0.3) {
                secret.data.clone_from(&other.data);
            }
            if self.chance(0.2) {
                secret.metadata.annotations.clone_from(&other.metadata.annotations);
            }
            if self.chance(0.1) {
                let mac = other.annotations().get(record::MAC_ANNOTATION).cloned();
                secret.annotations_mut().extend(mac.map(|mac| (record::MAC_ANNOTATION.to_owned(), mac)));
            }
        }
        let fitting: Vec<_> = self.known.iter().filter(|(known, _)| *known == key_type).cloned().collect();
        let value = self.pick(fitting.len()).map(|n| fitting[n].1.clone()).unwrap_or_default();
        if self.chance(0.25) {
            let place = ["key-value", record::SEALED_VALUE, record::CLAIMED][self.rng.random_range(0..3)];
            secret.data.get_or_insert_default().insert(place.to_owned(), ByteString(value.clone()));
        }
        if self.chance(0.1) {
            secret.data.get_or_insert_default().remove(record::SEALED_VALUE);
        }
        if self.chance(0.3) {
            self.forge(&mut secret, &value, namespace, key_name);
        }
        if self.chance(0.4) {
            let owners = self.keys.values().map(|key| (key.name_any(), key.uid().unwrap_or_default()));
            let owners: Vec<_> = owners.collect();
            secret.metadata.owner_references = self.pick(owners.len()).map(|n| {
                let (name, uid) = owners[n].clone();
                vec![OwnerReference {
                    api_version: "keywright.dev/v1alpha1".to_owned(),
                    kind: "ApiKey".to_owned(),
                    name,
                    uid,
                    controller: Some(true),
                    ..OwnerReference::default()
                }]
            });
        }
        if self.chance(0.5) {
            secret.metadata.creation_timestamp = None;
        }
        self.put(&name, secret);
    }

    /// Changes the record of a Secret, as somebody without the record keys can.
    fn forge(&mut self, secret: &mut Secret, value: &[u8], namespace: &str, key_name: &str) {
        let text = secret.annotations().get(record::ANNOTATION);
        let parsed = text.and_then(|text| serde_json::from_str::<Record>(text).ok());
        let key = self.keys.get(&(namespace.to_owned(), key_name.to_owned()));
        let Some((mut record, key)) = parsed.zip(key) else { return };
        if self.rng.random_bool(0.7) {
            record.subject = Subject::of(key);
        }
        if self.rng.random_bool(0.7) {
            record.current.sha256 = Digest::of(value).to_string();
        }
        record.current.generation += self.rng.random_range(-2..10);
        if self.rng.random_bool(0.3) {
            record.sealed = self.rng.random_bool(0.5).then(|| Sealed {
                mode: RevealMode::OneTime,
                plain: self.rng.random_bool(0.3),
                claim: None,
                erased_at: self.rng.random_bool(0.5).then(|| jiff::Timestamp::from_second(self.now).unwrap()),
            });
        }
        let text = serde_json::to_string(&record).unwrap();
        if self.rng.random_bool(0.3) {
            let own = Keyring::generate().unwrap();
            secret.annotations_mut().insert(record::MAC_ANNOTATION.to_owned(), own.authenticate(&text).unwrap());
        }
        secret.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
    }

    /// The operator takes a key in hand. It may crash before the status is written.
    fn reconcile(&mut self, name: &Name) {
        let Some(key) = self.keys.get(name).cloned() else { return };
        let (now, verdict) = (self.now(), check(&key.spec, &catalog()));
        let place = (name.0.clone(), secret_ref(&key).name);
        let observed = match self.secrets.get(&place).cloned() {
            None => Observed::Missing,
            Some(secret) => {
                let trust = Trust { ring: &self.ring, guarded: self.guarded };
                self.claim(&key, observe::classify(secret, &key, &trust).observed)
            }
        };
        let settings = Some(&self.settings);
        let world = World { key: &key, verdict: &verdict, rival: None, secret: &observed, settings, now };
        let step = lifecycle::step(&world);
        let observed = self.act(&key, &place, step).map_or(observed, Observed::Ours);
        if self.chance(0.2) {
            return;
        }
        let facts = Facts {
            key: &key,
            verdict: &verdict,
            rival: None,
            secret: &observed,
            settings: Some(&self.settings),
            policy: None,
            import: None,
            failure: None,
            now,
        };
        let status = status::build(&facts);
        let live = |tokens: &[crate::api::Token]| -> BTreeSet<String> {
            tokens.iter().map(|token| token.sha256.clone()).collect()
        };
        let before = key.status.as_ref().map(|status| live(&status.tokens)).unwrap_or_default();
        let after = live(&status.tokens);
        self.revoked.extend(before.difference(&after).cloned());
        let key = ApiKey { status: Some(status), ..key };
        self.see(name, Some(&key));
        self.keys.insert(name.clone(), key);
    }

    fn claim(&self, key: &ApiKey, observed: Observed) -> Observed {
        let Observed::Ours(held) = &observed else { return observed };
        match super::taken(key, &held.record, &self.digests, &self.store.as_reader()) {
            None => observed,
            Some(_) => Observed::Foreign { reason: super::DIGEST_IN_USE, why: String::new(), passing: false },
        }
    }

    /// Writes what a step asks for, as `act` does.
    fn act(&mut self, key: &ApiKey, place: &Name, step: Step) -> Option<Held> {
        let now = self.now();
        let before = self.secrets.get(place).cloned();
        let mut secret = before.clone().unwrap_or_default();
        let record = match step {
            Step::Rest => return None,
            Step::Mint(_) if before.is_some() => panic!("a Secret is there"),
            Step::Mint(draft) | Step::Rotate { draft, .. } => {
                let draft = if draft.is_first() { draft.settled(&key.spec, Some(&self.settings)) } else { draft };
                let value = Key::mint(key.spec.key_type, &mut rand::rngs::SysRng).unwrap();
                let record = draft.seal(key, value.digest(), now);
                self.minted.insert(value.digest().to_string(), key.uid().unwrap());
                let bytes = value.expose().as_bytes();
                let mut data = BTreeMap::new();
                if record.sealed.is_some() {
                    let sealed = ByteString(self.ring.seal(&record, bytes).unwrap());
                    data.insert(record::SEALED_VALUE.to_owned(), sealed);
                } else {
                    data.insert("key-value".to_owned(), ByteString(bytes.to_vec()));
                }
                // Whoever may use a key knows its value.
                self.known.push((key.spec.key_type, bytes.to_vec()));
                secret.data = Some(data);
                record
            }
            Step::Amend { record, .. } | Step::Erase { record, .. } => record,
        };
        let text = serde_json::to_string(&record).unwrap();
        let mac = self.ring.authenticate(&text).unwrap();
        secret.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
        secret.annotations_mut().insert(record::MAC_ANNOTATION.to_owned(), mac);
        secret.labels_mut().insert(observe::MANAGED_BY.0.to_owned(), observe::MANAGED_BY.1.to_owned());
        secret.type_ = Some(record::SECRET_TYPE.to_owned());
        secret.metadata.owner_references = Some(vec![OwnerReference {
            api_version: "keywright.dev/v1alpha1".to_owned(),
            kind: "ApiKey".to_owned(),
            name: key.name_any(),
            uid: key.uid().unwrap(),
            controller: Some(true),
            ..OwnerReference::default()
        }]);
        self.put(place, secret.clone());
        let trust = Trust { ring: &self.ring, guarded: self.guarded };
        match observe::classify(self.secrets[place].clone(), key, &trust).observed {
            Observed::Ours(held) => Some(held),
            // Also its own write is judged by the status, which an attacker's copy may have been ahead of.
            _ => Some(Held {
                version: String::new(),
                written: Some(record.clone()),
                mac: None,
                record,
                intact: true,
                owned: true,
                in_order: true,
            }),
        }
    }

    /// Every digest that a verifier lets pass was minted for that very key, and was never revoked.
    fn check(&self, seed: u64, step: usize) {
        let mut owners = BTreeSet::new();
        for key in self.keys.values() {
            let tokens = key.status.iter().flat_map(|status| &status.tokens);
            let works = |token: &&crate::api::Token| token.expires_at.as_ref().is_none_or(|end| end.0 > self.now());
            for token in tokens.filter(works).filter(|_| Schedule::of(&key.spec).active) {
                let at = format!("seed {seed}, step {step}, {}/{}", key.namespace().unwrap(), key.name_any());
                assert_eq!(self.minted.get(&token.sha256), key.metadata.uid.as_ref(), "{at}: minted for another key");
                assert!(!self.revoked.contains(&token.sha256), "{at}: revoked");
                assert!(owners.insert(token.sha256.clone()), "{at}: two keys with one digest");
            }
        }
    }
}

#[test]
fn whoever_writes_whatever_to_secrets_no_value_passes_that_was_not_minted_for_that_key() {
    let (mut minted, mut adopted) = (0, 0);
    for seed in 0..400 {
        let mut cluster = Cluster::new(seed);
        // With few attacks there is more to attack.
        let attacks = [0.05, 0.15, 0.4][cluster.rng.random_range(0..3)];
        for step in 0..60 {
            if cluster.chance(attacks) {
                cluster.attack();
            }
            if cluster.chance(0.3) {
                let n = cluster.rng.random_range(0..NAMES.len());
                cluster.manage(n);
            } else {
                let names: Vec<_> = cluster.keys.keys().cloned().collect();
                if let Some(n) = cluster.pick(names.len()) {
                    cluster.reconcile(&names[n]);
                }
            }
            cluster.now += cluster.rng.random_range(0..40);
            cluster.check(seed, step);
        }
        minted += cluster.minted.len();
        adopted += cluster.keys.values().filter(|key| key.status.iter().any(|s| !s.tokens.is_empty())).count();
    }
    // The test would also pass if nothing was ever minted.
    assert!(minted > 1000 && adopted > 400, "{minted} minted, {adopted} in use");
}
