//! Property test: users with write access to Secrets and to their own ApiKeys make random writes while the operator
//! reconciles. A verifier never accepts a value that the operator did not mint for that ApiKey, nor a revoked value.
//!
//! Decisions use the production code: [`observe::classify`], [`Digests`], [`lifecycle`] and [`status`]. The API server
//! is a map. In most runs no admission policy protects Secrets.

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

use super::observe::{self, TrustAnchors};
use crate::{
    api::{ApiKey, KeyType, RevealMode, Rotation, SecuritySettingsSpec, Time},
    domain::{
        inputs::Inputs,
        key::{Digest, Key},
        lifecycle::{self, Observed, OwnedSecret, Schedule, Step},
        record::{self, Record, Sealed, Subject},
        status::{self, secret_ref},
        validate::check,
    },
    index::digests::Digests,
    sealing::SealingKeys,
    test_support::{catalog, key_spec as spec},
};

const START: i64 = 1_800_000_000;

type ModelName = (String, String);

/// A model of a cluster, of the operator and of the knowledge of attackers.
struct ModelCluster {
    rng: Xoshiro256PlusPlus,
    ring: SealingKeys,
    /// Whether the policy of the chart protects Secrets. Then attackers can only delete Secrets, or keep those of
    /// deleted ApiKeys.
    policy_protects_secrets: bool,
    now: i64,
    versions: u64,
    keys: BTreeMap<ModelName, ApiKey>,
    secrets: BTreeMap<ModelName, Secret>,
    settings: SecuritySettingsSpec,
    digests: Digests,
    store: Writer<ApiKey>,
    /// Copies of all versions of Secrets, as saved by attackers.
    saved: Vec<Secret>,
    /// Values that attackers generated or read.
    known: Vec<(KeyType, Vec<u8>)>,
    /// The uid of the ApiKey for which the operator minted each digest.
    minted: BTreeMap<String, String>,
    /// Digests that were revoked, or whose ApiKey was deleted.
    revoked: BTreeSet<String>,
}

const NAMES: [(&str, &str, KeyType); 4] = [
    ("shop", "a", KeyType::Team),
    ("shop", "p", KeyType::Personal),
    ("bank", "a", KeyType::Team),
    ("bank", "s", KeyType::SendYourData),
];

impl ModelCluster {
    fn new(seed: u64) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let settings =
            SecuritySettingsSpec { one_time_reveal: Some(rng.random_bool(0.3)), ..SecuritySettingsSpec::default() };
        let policy_protects_secrets = rng.random_bool(0.3);
        let known = NAMES.map(|(_, _, key_type)| {
            let value = Key::mint(key_type, &mut rand::rngs::SysRng).unwrap();
            (key_type, value.expose().as_bytes().to_vec())
        });
        Self {
            rng,
            policy_protects_secrets,
            ring: SealingKeys::generate().unwrap(),
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

    /// Delivers a change of an ApiKey as a watch event.
    fn deliver(&mut self, name: &ModelName, after: Option<&ApiKey>) {
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

    fn put(&mut self, name: &ModelName, mut secret: Secret) {
        secret.metadata.namespace = Some(name.0.clone());
        secret.metadata.name = Some(name.1.clone());
        secret.metadata.resource_version = Some(self.version());
        secret.metadata.creation_timestamp.get_or_insert(Time(self.now()));
        self.saved.push(secret.clone());
        self.secrets.insert(name.clone(), secret);
    }

    /// Creates, edits or deletes an ApiKey, as its owner can.
    fn change_key(&mut self, n: usize) {
        let (namespace, key_name, key_type) = NAMES[n];
        let name = (namespace.to_owned(), key_name.to_owned());
        let Some(mut key) = self.keys.get(&name).cloned() else {
            let mut key = ApiKey::new(key_name, spec(key_type, &["Alerts"], &[]));
            key.metadata.namespace = Some(namespace.to_owned());
            key.metadata.uid = Some(self.version());
            key.metadata.creation_timestamp = Some(Time(self.now()));
            key.metadata.generation = Some(1);
            self.deliver(&name, Some(&key));
            self.keys.insert(name, key);
            return;
        };
        if self.chance(0.2) {
            let tokens = key.status.iter().flat_map(|status| &status.tokens);
            self.revoked.extend(tokens.map(|token| token.sha256.clone()));
            self.deliver(&name, None);
            self.keys.remove(&name);
            // The garbage collector may be late, or the user keeps the Secret without an owner reference.
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
        self.deliver(&name, Some(&key));
        self.keys.insert(name, key);
    }

    /// Writes or deletes a Secret as a user with write access to Secrets.
    fn attack(&mut self) {
        let (namespace, key_name, key_type) = NAMES[self.rng.random_range(0..NAMES.len())];
        let name = (namespace.to_owned(), format!("{key_name}-secret"));
        if self.chance(0.15) {
            self.secrets.remove(&name);
            return;
        }
        if self.policy_protects_secrets {
            return;
        }
        let current = self.secrets.get(&name).cloned();
        let saved = self.pick(self.saved.len()).map(|n| self.saved[n].clone());
        let other = self.pick(self.saved.len()).map(|n| self.saved[n].clone());
        // The new Secret starts as the current one or as a saved one, which may have another name or namespace.
        let base = if self.chance(0.5) { saved.or(current) } else { current.or(saved) };
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

    /// Changes the record of a Secret, as a user without the record keys can.
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
            let own = SealingKeys::generate().unwrap();
            secret.annotations_mut().insert(record::MAC_ANNOTATION.to_owned(), own.authenticate(&text).unwrap());
        }
        secret.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
    }

    /// Reconciles a key. The operator may crash before it writes the status.
    fn reconcile(&mut self, name: &ModelName) {
        let Some(key) = self.keys.get(name).cloned() else { return };
        let (now, validation) = (self.now(), check(&key.spec, &catalog()));
        let place = (name.0.clone(), secret_ref(&key).name);
        let observed = match self.secrets.get(&place).cloned() {
            None => Observed::Missing,
            Some(secret) => {
                let trust = TrustAnchors { ring: &self.ring, policy_protects_secrets: self.policy_protects_secrets };
                self.claim_digests(&key, observe::classify(secret, &key, &trust).observed)
            }
        };
        let settings = Some(&self.settings);
        let step = lifecycle::step(&Inputs { settings, ..Inputs::new(&key, &validation, &observed, now) });
        let observed = self.act(&key, &place, step).map_or(observed, Observed::Ours);
        if self.chance(0.2) {
            return;
        }
        let settings = Some(&self.settings);
        let inputs = Inputs { settings, ..Inputs::new(&key, &validation, &observed, now) };
        let status = status::build(&inputs);
        let live = |tokens: &[crate::api::Token]| -> BTreeSet<String> {
            tokens.iter().map(|token| token.sha256.clone()).collect()
        };
        let before = key.status.as_ref().map(|status| live(&status.tokens)).unwrap_or_default();
        let after = live(&status.tokens);
        self.revoked.extend(before.difference(&after).cloned());
        let key = ApiKey { status: Some(status), ..key };
        self.deliver(name, Some(&key));
        self.keys.insert(name.clone(), key);
    }

    fn claim_digests(&self, key: &ApiKey, observed: Observed) -> Observed {
        let Observed::Ours(owned) = &observed else { return observed };
        match super::digest_claims::find_conflict(key, &owned.record, &self.digests, &self.store.as_reader()) {
            None => observed,
            Some(_) => {
                Observed::Foreign { reason: super::digest_claims::DIGEST_IN_USE, why: String::new(), passing: false }
            }
        }
    }

    /// Carries out a step, as `act` does.
    fn act(&mut self, key: &ApiKey, place: &ModelName, step: Step) -> Option<OwnedSecret> {
        let now = self.now();
        let before = self.secrets.get(place).cloned();
        let mut secret = before.clone().unwrap_or_default();
        let record = match step {
            Step::Rest => return None,
            Step::Mint(_) if before.is_some() => panic!("the operator mints although the Secret exists"),
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
                // Users of a key know its value.
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
        let trust = TrustAnchors { ring: &self.ring, policy_protects_secrets: self.policy_protects_secrets };
        match observe::classify(self.secrets[place].clone(), key, &trust).observed {
            Observed::Ours(owned) => Some(owned),
            // The operator treats the result of its own write as its Secret, even if the status disagrees.
            _ => Some(OwnedSecret {
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

    /// Asserts that every digest that a verifier accepts was minted for that ApiKey and was not revoked.
    fn check(&self, seed: u64, step: usize) {
        let mut owners = BTreeSet::new();
        for key in self.keys.values() {
            let tokens = key.status.iter().flat_map(|status| &status.tokens);
            let works = |token: &&crate::api::Token| token.expires_at.as_ref().is_none_or(|end| end.0 > self.now());
            for token in tokens.filter(works).filter(|_| Schedule::of(&key.spec).active) {
                let at = format!("seed {seed}, step {step}, {}/{}", key.namespace().unwrap(), key.name_any());
                assert_eq!(
                    self.minted.get(&token.sha256),
                    key.metadata.uid.as_ref(),
                    "{at}: a value works that was not minted for this key"
                );
                assert!(!self.revoked.contains(&token.sha256), "{at}: a revoked value works");
                assert!(owners.insert(token.sha256.clone()), "{at}: two keys have the same digest");
            }
        }
    }
}

#[test]
fn writes_to_secrets_never_make_a_value_work_that_was_not_minted_for_its_key() {
    let (mut minted, mut adopted) = (0, 0);
    for seed in 0..400 {
        let mut cluster = ModelCluster::new(seed);
        // With few attacks, more ApiKeys have values.
        let attacks = [0.05, 0.15, 0.4][cluster.rng.random_range(0..3)];
        for step in 0..60 {
            if cluster.chance(attacks) {
                cluster.attack();
            }
            if cluster.chance(0.3) {
                let n = cluster.rng.random_range(0..NAMES.len());
                cluster.change_key(n);
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
    // Without minted values, the test would assert nothing.
    assert!(minted > 1000 && adopted > 400, "{minted} minted, {adopted} in use");
}
