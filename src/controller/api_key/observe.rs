//! Reads the Secret of a key, and decides what is believed of it.
//!
//! Everybody with write access to Secrets is taken for an attacker here. The operator believes, in this order:
//!
//! 1. The status of the ApiKey, which only the operator can write. It is behind the Secret only after a crash between the
//!    write of the Secret and that of the status.
//! 2. A record in the Secret that the operator authenticated, for this very ApiKey, whose generation is later than that of
//!    the status.
//! 3. Without a status: such a record of an earlier ApiKey of this name (a restore), if a user with the restore right
//!    put both the ApiKey and the Secret there. That the Secret is guarded is not enough: the owner of an ApiKey can leave
//!    its Secret behind (`kubectl delete --cascade=orphan`), where another ApiKey of this name would find it.
//! 4. Without any of these: a value whose digest a user with the restore right accepted.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::SignedDuration,
};
use kube::{Api, Client, ResourceExt};
use secrecy::ExposeSecret;

use crate::{
    api::{ACCEPT_SECRET_ANNOTATION, ApiKey, KeyType, RESTORED_BY_ANNOTATION, RevealMode},
    controller::{RequestError, request},
    domain::{
        key::Key,
        lifecycle::{Held, Observed, record_of_status},
        record::{self, Entry, Record, Sealed, Subject},
        status::secret_ref,
    },
    sealing::{Keeper, Keyring},
};

/// The label on every Secret that Keywright writes. The labels of the ApiKey are never copied: a tracking label of a
/// GitOps tool would make it prune the Secret.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "keywright");

/// A Secret as it was found, with the values that are in it.
#[derive(Debug)]
pub struct Found {
    /// What is made of it.
    pub observed: Observed,
    /// The value, if the Secret has one: plain, or opened.
    pub value: Option<Key>,
    /// A value on its way to the one who took it, encrypted to that person.
    pub claimed: Option<String>,
}

/// Reads the one Secret of a key by name. There is no list and no watch of Secrets anywhere.
///
/// # Errors
/// If the API server can't be asked, or the sealing keys can't be read.
pub async fn find(client: &Client, sealing: &Keeper, namespace: &str, key: &ApiKey) -> Result<Found, RequestError> {
    let name = secret_ref(key).name;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let Some(secret) = request(&format!("get Secret {name}"), secrets.get_opt(&name)).await? else {
        return Ok(Found { observed: Observed::Missing, value: None, claimed: None });
    };
    let ring = sealing.ring().await.map_err(RequestError::new_local)?;
    Ok(classify(secret, key, &Trust { ring: &ring, guarded: sealing.is_guarded() }))
}

/// On what the operator believes a Secret.
#[derive(Clone, Copy, Debug)]
pub struct Trust<'a> {
    /// The operator's own keys.
    pub ring: &'a Keyring,
    /// Whether the chart's ValidatingAdmissionPolicy on Secrets is in force: then nobody writes a Secret with an authentic
    /// record but the operator and users with the restore right.
    pub guarded: bool,
}

/// What the values in a Secret prove.
struct Evidence {
    plain: Option<Key>,
    /// A sealed value that the operator sealed for this very key, and its generation.
    sealed: Option<(Key, i64)>,
}

impl Evidence {
    fn take(secret: &mut Secret, key: &ApiKey, subject: &Subject, ring: &Keyring) -> Self {
        let mut data = secret.data.take().unwrap_or_default();
        let plain = data.remove(&secret_ref(key).key).and_then(|ByteString(mut bytes)| {
            let value = Key::parse(key.spec.key_type, &bytes);
            bytes.fill(0);
            value
        });
        let plain = plain.filter(|_| !is_never_plain(key));
        let opened = data.remove(record::SEALED_VALUE).and_then(|sealed| ring.open(subject, &sealed.0).ok());
        let sealed = opened
            .and_then(|opened| Some((Key::parse(key.spec.key_type, opened.value.expose_secret())?, opened.generation)));
        Self { plain, sealed }
    }

    /// Whether the value of an entry is there, plain.
    fn has_plain(&self, entry: &Entry) -> bool {
        is(self.plain.as_ref(), &entry.sha256)
    }

    /// Whether the value of an entry is there, sealed.
    fn has_sealed(&self, entry: &Entry) -> bool {
        let sealed = self.sealed.as_ref().filter(|(_, generation)| *generation == entry.generation);
        is(sealed.map(|(value, _)| value), &entry.sha256)
    }

    /// Whether the value of an entry is there.
    fn proves(&self, entry: &Entry) -> bool {
        self.has_plain(entry) || self.has_sealed(entry)
    }

    /// Whether all is there that a record says. Also a Secret without any value is intact, if its value was taken or
    /// erased.
    fn is_intact(&self, record: &Record) -> bool {
        match &record.sealed {
            None => self.has_plain(&record.current),
            Some(sealed) => {
                (!sealed.plain || self.has_plain(&record.current))
                    && (!sealed.is_kept() || self.has_sealed(&record.current))
            }
        }
    }
}

/// Whether a plain value would be somebody else's: the value of a Personal key is always sealed. One that the operator
/// itself once wrote plain, it knows from the status.
fn is_never_plain(key: &ApiKey) -> bool {
    key.spec.key_type == KeyType::Personal
        && key.spec.legacy.is_none()
        && key.status.as_ref().and_then(record_of_status).is_none_or(|known| known.sealed.is_some())
}

fn is(value: Option<&Key>, sha256: &str) -> bool {
    value.is_some_and(|value| value.digest().to_string() == sha256)
}

/// Decides what is believed of a Secret. The value of `Found` is the one that the record is about, or none.
#[must_use]
pub fn classify(mut secret: Secret, key: &ApiKey, trust: &Trust<'_>) -> Found {
    let claimed = secret.data.as_mut().and_then(|data| data.remove(record::CLAIMED));
    let claimed = claimed.and_then(|ByteString(bytes)| String::from_utf8(bytes).ok());
    let subject = Subject::of(key);
    let evidence = Evidence::take(&mut secret, key, &subject, trust.ring);
    let observed = Case { secret: &secret, key, subject, evidence: &evidence, trust }.judge();
    let value = match &observed {
        Observed::Ours(held) if evidence.has_sealed(&held.record.current) => evidence.sealed.map(|(value, _)| value),
        Observed::Ours(held) if evidence.has_plain(&held.record.current) => evidence.plain,
        _ => None,
    };
    Found { observed, value, claimed }
}

/// One Secret, and the key that it is looked at for.
struct Case<'a> {
    secret: &'a Secret,
    key: &'a ApiKey,
    subject: Subject,
    evidence: &'a Evidence,
    trust: &'a Trust<'a>,
}

/// The reasons of the condition of a Secret that is left alone.
const CONFLICT: &str = "SecretConflict";
const NOT_AUTHENTIC: &str = "SecretNotAuthentic";

impl Case<'_> {
    fn judge(&self) -> Observed {
        let owner = self.secret.owner_references().iter().find(|owner| owner.controller == Some(true));
        let is_owned = owner.is_some_and(|owner| owner.uid == self.subject.uid);
        if let Some(owner) = owner.filter(|owner| !is_owned && !self.is_of_earlier(owner)) {
            let why = format!(
                "it belongs to {} {}: delete that, or name another Secret under spec.secret.name of a new ApiKey",
                owner.kind, owner.name
            );
            return Observed::Foreign { reason: CONFLICT, why, passing: false };
        }
        if self.secret.type_.as_deref() != Some(record::SECRET_TYPE) {
            let why = "it was not made by Keywright: delete it, or name another Secret under spec.secret.name of a new ApiKey";
            return Disbelief { reason: CONFLICT, why }.into();
        }
        let authentic = self.authentic();
        let believed = match self.key.status.as_ref().and_then(record_of_status) {
            Some(known) => self.by_status(known, authentic.as_ref(), is_owned),
            None if is_owned || owner.is_none() || self.is_restored(authentic.as_ref()) => {
                self.by_record(authentic.as_ref())
            }
            None => return self.being_collected(),
        };
        match believed {
            Err(disbelief) => disbelief.into(),
            Ok(record) => Observed::Ours(Held {
                version: self.secret.resource_version().unwrap_or_default(),
                intact: self.evidence.is_intact(&record),
                owned: is_owned,
                in_order: metadata_in_order(self.secret, self.key),
                record,
                mac: authentic.as_ref().and_then(|_| self.secret.annotations().get(record::MAC_ANNOTATION).cloned()),
                written: authentic,
            }),
        }
    }

    /// The record in the Secret, if the operator wrote it for this key, or for an earlier ApiKey of this name.
    fn authentic(&self) -> Option<Record> {
        self.signed().filter(|record| record.subject.is_same_place(&self.subject))
    }

    /// The record in the Secret, if the operator wrote it, for whichever key.
    fn signed(&self) -> Option<Record> {
        let text = self.secret.annotations().get(record::ANNOTATION)?;
        let mac = self.secret.annotations().get(record::MAC_ANNOTATION)?;
        self.trust.ring.is_authentic(text, mac).then(|| serde_json::from_str(text).ok())?
    }

    /// The status knows a value. It is right, unless the record is of a later value of this very ApiKey.
    fn by_status(&self, known: Record, authentic: Option<&Record>, is_owned: bool) -> Result<Record, Disbelief> {
        let own = authentic.filter(|record| record.subject.uid == self.subject.uid);
        let is_later = |record: &&Record| {
            record.current.generation > known.current.generation && record.current.minted_at >= known.current.minted_at
        };
        if let Some(later) = own.filter(is_later) {
            return Ok(Record { created_at: known.created_at, ..later.clone() });
        }
        // Who saw the value and which labels were set is the record's to say, if it is about the same value.
        let same = authentic.filter(|record| record.current == known.current);
        let record = Record {
            subject: self.subject.clone(),
            sealed: known
                .sealed
                .as_ref()
                .map(|sealed| Sealed::believed(sealed, same.and_then(|record| record.sealed.as_ref()))),
            labels: authentic.map(|record| record.labels.clone()).unwrap_or_default(),
            annotations: authentic.map(|record| record.annotations.clone()).unwrap_or_default(),
            ..known
        };
        // A Secret of ours that lost its owner, or was restored, holds the value, or says that it was taken.
        if is_owned || self.evidence.proves(&record.current) || same.is_some() {
            return Ok(record);
        }
        Err(Disbelief {
            reason: CONFLICT,
            why: "it does not hold the current value of this ApiKey: delete it, and restore a newer Secret or set \
             spec.rotation.requestedAt to the current time to mint a new value",
        })
    }

    /// There is no status.
    fn by_record(&self, authentic: Option<&Record>) -> Result<Record, Disbelief> {
        let accepted =
            self.key.annotations().get(ACCEPT_SECRET_ANNOTATION).and_then(|text| text.strip_prefix("sha256:"));
        let Some(record) = authentic else {
            // The right to restore ApiKeys in one namespace makes no value of another namespace work there.
            if self.signed().is_some_and(|record| !record.subject.has_names_of(&self.subject)) {
                return Err(Disbelief {
                    reason: NOT_AUTHENTIC,
                    why: "the operator wrote it for an ApiKey of another name or namespace, and a value belongs to one \
                     ApiKey: delete the Secret to have a new value minted",
                });
            }
            let why = "its record was not written by this operator for this ApiKey, or the sealing keys of the operator that \
                       wrote it are missing: restore the sealing keys, or have a user with the right to restore ApiKeys run \
                       kubectl keywright accept, or delete the Secret to have a new value minted";
            let accepted = accepted.and_then(|sha256| self.accept(sha256));
            return accepted.ok_or(Disbelief { reason: NOT_AUTHENTIC, why });
        };
        // After a crash between the write of the Secret and that of the status.
        if record.subject.uid == self.subject.uid {
            return Ok(record.clone());
        }
        let is_restored = self.trust.guarded && self.key.annotations().contains_key(RESTORED_BY_ANNOTATION);
        let is_allowed = is_restored || accepted == Some(&*record.current.sha256);
        if !is_allowed {
            return Err(Disbelief {
                reason: NOT_AUTHENTIC,
                why: "it is of an earlier ApiKey of this name: have a user with the right to restore ApiKeys run kubectl \
                 keywright accept, or delete the Secret to have a new value minted",
            });
        }
        // What was taken or erased is not there; all else has to be.
        if !self.evidence.proves(&record.current) && !self.evidence.is_intact(record) {
            return Err(Disbelief {
                reason: NOT_AUTHENTIC,
                why: "it no longer holds the value that its record is about: restore it once more, or delete it to have a new \
                 value minted",
            });
        }
        Ok(Record { subject: self.subject.clone(), ..record.clone() })
    }

    /// The record of a value that a user with the restore right accepted, by its digest. The value has to be there: a
    /// digest alone, which everybody can read in a status, proves nothing. What an unauthenticated record says of the value
    /// counts only as far as it makes nothing more of it.
    fn accept(&self, sha256: &str) -> Option<Record> {
        let text = self.secret.annotations().get(record::ANNOTATION);
        let claimed: Option<Record> = text.and_then(|text| serde_json::from_str(text).ok());
        let claimed = claimed.filter(|record| record.current.sha256 == sha256);
        let sealed = self.evidence.sealed.as_ref().filter(|(value, _)| is(Some(value), sha256));
        let plain = is(self.evidence.plain.as_ref(), sha256);
        if !plain && sealed.is_none() {
            return None;
        }
        let minted_at = self.secret.creation_timestamp()?.0;
        let generation = sealed.map_or(1, |(_, generation)| *generation);
        let mode = claimed.as_ref().and_then(|record| record.sealed.as_ref()).map(|sealed| sealed.mode);
        Some(Record {
            subject: self.subject.clone(),
            created_at: claimed.as_ref().map_or(minted_at, |record| record.created_at.min(minted_at)),
            last_rotated_at: None,
            requested_at: self.key.spec.rotation.as_ref().and_then(|r| r.requested_at.clone()),
            current: Entry { sha256: sha256.to_owned(), minted_at, generation: generation.max(1) },
            previous: None,
            sealed: sealed.map(|_| Sealed {
                // How often it may be seen is not known: then once.
                mode: mode.unwrap_or(RevealMode::OneTime),
                plain,
                claim: None,
                erased_at: None,
            }),
            labels: vec![],
            annotations: vec![],
        })
    }

    /// Whether an owner is an ApiKey of this name, so an earlier one.
    fn is_of_earlier(&self, owner: &OwnerReference) -> bool {
        owner.kind == "ApiKey" && owner.name == self.subject.api_key
    }

    /// Whether a Secret with an owner that is no more was restored. It is then younger than the value in it, which the
    /// Secret of a deleted and re-created ApiKey never is.
    fn is_restored(&self, authentic: Option<&Record>) -> bool {
        let made = self.secret.creation_timestamp().map(|at| at.0);
        let minted = authentic.map(|record| record.current.minted_at);
        let is_going = self.secret.metadata.deletion_timestamp.is_some();
        !is_going
            && made.zip(minted).is_some_and(|(made, minted)| made.duration_since(minted) > SignedDuration::from_mins(1))
    }

    fn being_collected(&self) -> Observed {
        if self.secret.metadata.deletion_timestamp.is_some() && !self.secret.finalizers().is_empty() {
            let why = "it belongs to an earlier ApiKey of this name, and its deletion waits for its finalizers: let the \
                       controller that set them finish, or remove metadata.finalizers from the Secret";
            return Disbelief { reason: CONFLICT, why }.into();
        }
        let why = "it belongs to an earlier ApiKey of this name and is being garbage collected".to_owned();
        Observed::Foreign { reason: CONFLICT, why, passing: true }
    }
}

/// Why a Secret is not believed, as a clause. It takes a person to end that.
struct Disbelief {
    reason: &'static str,
    why: &'static str,
}

impl From<Disbelief> for Observed {
    fn from(Disbelief { reason, why }: Disbelief) -> Self {
        Self::Foreign { reason, why: why.to_owned(), passing: false }
    }
}

fn metadata_in_order(secret: &Secret, key: &ApiKey) -> bool {
    let template = key.spec.secret.clone().unwrap_or_default();
    let has = |map: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>| {
        wanted.iter().all(|(key, value)| map.get(key) == Some(value))
    };
    has(secret.labels(), &template.labels)
        && has(secret.annotations(), &template.annotations)
        && secret.labels().contains_key(MANAGED_BY.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{ApiKeyStatus, CREATOR_ANNOTATION, SecretRef, Time, Token},
        domain::validate::tests::spec,
    };

    /// The value of a key, and what the operator wrote of it.
    struct Minted {
        value: Key,
        record: Record,
    }

    fn key(key_type: KeyType) -> ApiKey {
        named("k", "u", key_type)
    }

    fn named(name: &str, uid: &str, key_type: KeyType) -> ApiKey {
        let mut key = ApiKey::new(name, spec(key_type, &["Alerts"], &[]));
        key.metadata.namespace = Some("shop".to_owned());
        key.metadata.uid = Some(uid.to_owned());
        key
    }

    fn sealed(mode: RevealMode) -> Sealed {
        Sealed { mode, plain: false, claim: None, erased_at: None }
    }

    fn mint(key: &ApiKey, generation: i64, sealed: Option<Sealed>) -> Minted {
        let value = Key::mint(key.spec.key_type, &mut rand::rngs::SysRng).unwrap();
        let at = "2026-11-23T09:00:00Z".parse().unwrap();
        let record = Record {
            subject: Subject::of(key),
            created_at: at,
            last_rotated_at: None,
            requested_at: None,
            current: Entry { sha256: value.digest().to_string(), minted_at: at, generation },
            previous: None,
            sealed,
            labels: vec![],
            annotations: vec![],
        };
        Minted { value, record }
    }

    impl Minted {
        /// The Secret, as the operator with this keyring writes it, without an owner.
        fn secret(&self, ring: &Keyring) -> Secret {
            let text = serde_json::to_string(&self.record).unwrap();
            let mac = ring.authenticate(&text).unwrap();
            let json = serde_json::json!({
                "metadata": {
                    "name": self.record.subject.secret, "creationTimestamp": "2026-11-23T10:00:00Z",
                    "annotations": {record::ANNOTATION: text, record::MAC_ANNOTATION: mac},
                },
                "type": record::SECRET_TYPE,
            });
            let bytes = self.value.expose().as_bytes();
            let data = match &self.record.sealed {
                None => ("key-value", bytes.to_vec()),
                Some(_) => (record::SEALED_VALUE, ring.seal(&self.record, bytes).unwrap()),
            };
            let data = [(data.0.to_owned(), ByteString(data.1))].into();
            Secret { data: Some(data), ..serde_json::from_value(json).unwrap() }
        }

        /// The key, with the status that says so.
        fn reported(&self, key: &ApiKey) -> ApiKey {
            let entry = &self.record.current;
            let token = Token {
                id: entry.id(),
                sha256: entry.sha256.clone(),
                generation: Some(entry.generation),
                minted_at: Time(entry.minted_at),
                expires_at: None,
            };
            let place = if self.record.sealed.is_some() { record::SEALED_VALUE } else { "key-value" };
            let status = ApiKeyStatus {
                tokens: vec![token],
                created_at: Some(Time(self.record.created_at)),
                reveal: self.record.sealed.as_ref().map(Sealed::reveal),
                secret_ref: Some(SecretRef { name: "k-secret".to_owned(), key: place.to_owned() }),
                ..ApiKeyStatus::default()
            };
            ApiKey { status: Some(status), ..key.clone() }
        }
    }

    fn owned_by(mut secret: Secret, key: &ApiKey) -> Secret {
        let owner = serde_json::json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "name": key.name_any(), "uid": key.uid(),
            "controller": true,
        });
        secret.metadata.owner_references = Some(vec![serde_json::from_value(owner).unwrap()]);
        secret
    }

    fn annotated(key: &ApiKey, name: &str, value: &str) -> ApiKey {
        let mut key = key.clone();
        key.annotations_mut().insert(name.to_owned(), value.to_owned());
        key
    }

    /// The digest that is believed and whether its value is there; otherwise the reason.
    fn verdict(secret: Secret, key: &ApiKey, ring: &Keyring, guarded: bool) -> Result<(String, bool), &'static str> {
        match classify(secret, key, &Trust { ring, guarded }).observed {
            Observed::Ours(held) => Ok((held.record.current.sha256, held.intact)),
            Observed::Foreign { reason, .. } => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    const KINDS: [(KeyType, Option<RevealMode>); 4] = [
        (KeyType::Team, None),
        (KeyType::SendYourData, None),
        (KeyType::Team, Some(RevealMode::OneTime)),
        (KeyType::Personal, Some(RevealMode::Sealed)),
    ];

    #[test]
    fn what_the_operator_wrote_for_this_very_key_is_believed_without_a_status() {
        let ring = Keyring::generate().unwrap();
        for (key_type, mode) in KINDS {
            let key = key(key_type);
            let minted = mint(&key, 1, mode.map(sealed));
            let own = Ok((minted.record.current.sha256.clone(), true));
            assert_eq!(verdict(owned_by(minted.secret(&ring), &key), &key, &ring, false), own);
            assert_eq!(verdict(minted.secret(&ring), &key, &ring, false), own, "its owner was taken out");
        }
    }

    #[test]
    fn a_made_up_record_proves_nothing() {
        let ring = Keyring::generate().unwrap();
        for (key_type, mode) in KINDS {
            let key = key(key_type);
            let minted = mint(&key, 1, mode.map(sealed));
            let mut no_code = minted.secret(&ring);
            no_code.annotations_mut().remove(record::MAC_ANNOTATION);
            let mut changed = minted.secret(&ring);
            let text = &changed.annotations()[record::ANNOTATION];
            let text = text.replace("2026-11-23T09:00:00Z", "2026-11-23T09:00:01Z");
            changed.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
            let other_operator = minted.secret(&Keyring::generate().unwrap());
            for secret in [no_code, changed, other_operator] {
                for secret in [owned_by(secret.clone(), &key), secret] {
                    assert_eq!(verdict(secret, &key, &ring, true), Err(NOT_AUTHENTIC), "{key_type:?} {mode:?}");
                }
            }
            let mut of_another_type = minted.secret(&ring);
            of_another_type.type_ = Some("Opaque".to_owned());
            assert_eq!(verdict(owned_by(of_another_type, &key), &key, &ring, true), Err(CONFLICT));
        }
    }

    #[test]
    fn a_record_of_another_place_is_not_believed() {
        let ring = Keyring::generate().unwrap();
        let mut elsewhere = named("k", "u2", KeyType::Team);
        elsewhere.metadata.namespace = Some("bank".to_owned());
        for other in [named("other", "u2", KeyType::Team), named("k", "u2", KeyType::SendYourData), elsewhere] {
            let minted = mint(&other, 1, None);
            let restored = annotated(&key(KeyType::Team), RESTORED_BY_ANNOTATION, "velero");
            let sha256 = format!("sha256:{}", minted.record.current.sha256);
            let accepted = annotated(&restored, ACCEPT_SECRET_ANNOTATION, &sha256);
            for key in [restored, accepted] {
                let answer = verdict(minted.secret(&ring), &key, &ring, true);
                assert_eq!(answer, Err(NOT_AUTHENTIC), "{:?}", other.metadata);
            }
        }
    }

    #[test]
    fn the_status_wins_over_an_older_or_equal_record() {
        let ring = Keyring::generate().unwrap();
        for (key_type, mode) in KINDS {
            let key = key(key_type);
            let values = [1, 2, 2, 3].map(|generation| mint(&key, generation, mode.map(sealed)));
            let reported = values[1].reported(&key);
            let known = &values[1].record.current.sha256;
            for (n, expected) in [(0, (known, false)), (1, (known, true)), (2, (known, false))] {
                let secret = owned_by(values[n].secret(&ring), &key);
                let (sha256, intact) = verdict(secret, &reported, &ring, true).unwrap();
                assert_eq!((&sha256, intact), expected, "value {n} of {key_type:?} {mode:?}");
            }
            let later = owned_by(values[3].secret(&ring), &key);
            let after_a_crash = Ok((values[3].record.current.sha256.clone(), true));
            assert_eq!(verdict(later, &reported, &ring, false), after_a_crash);
            // Without an owner it is not overwritten either.
            assert_eq!(verdict(values[0].secret(&ring), &reported, &ring, true), Err(CONFLICT));
        }
    }

    /// An operator of an earlier version knew no generations.
    #[test]
    fn a_later_generation_of_an_older_value_is_not_later() {
        let ring = Keyring::generate().unwrap();
        let key = key(KeyType::Team);
        let (old, mut current) = (mint(&key, 7, None), mint(&key, 0, None));
        current.record.current.minted_at = "2026-11-24T09:00:00Z".parse().unwrap();
        let (sha256, intact) =
            verdict(owned_by(old.secret(&ring), &key), &current.reported(&key), &ring, true).unwrap();
        assert_eq!((sha256, intact), (current.record.current.sha256, false));
    }

    #[test]
    fn a_later_record_of_an_earlier_key_of_this_name_does_not_win_over_the_status() {
        let ring = Keyring::generate().unwrap();
        let (earlier, key) = (named("k", "before", KeyType::Team), key(KeyType::Team));
        let minted = mint(&key, 1, None);
        let later = mint(&earlier, 5, None).secret(&ring);
        let reported = minted.reported(&key);
        assert!(!verdict(owned_by(later.clone(), &key), &reported, &ring, true).unwrap().1);
        assert_eq!(verdict(later, &reported, &ring, true), Err(CONFLICT));
    }

    #[test]
    fn a_sealed_value_of_another_key_is_no_value() {
        let ring = Keyring::generate().unwrap();
        let (victim, thief) = (named("victim", "1", KeyType::Personal), named("thief", "2", KeyType::Personal));
        let own = mint(&victim, 1, Some(sealed(RevealMode::Sealed)));
        let stolen = mint(&thief, 1, Some(sealed(RevealMode::Sealed)));
        let mut mixed = owned_by(own.secret(&ring), &victim);
        mixed.data = stolen.secret(&ring).data;
        let text =
            mixed.annotations()[record::ANNOTATION].replace(&own.record.current.sha256, &stolen.record.current.sha256);
        mixed.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
        let found = classify(mixed.clone(), &own.reported(&victim), &Trust { ring: &ring, guarded: true });
        assert!(found.value.is_none());
        let Observed::Ours(held) = found.observed else { panic!("{:?}", found.observed) };
        assert_eq!((held.record.current, held.intact), (own.record.current, false));
        assert_eq!(verdict(mixed, &victim, &ring, true), Err(NOT_AUTHENTIC), "also without a status");
    }

    #[test]
    fn a_restored_secret_takes_somebody_with_the_right() {
        let ring = Keyring::generate().unwrap();
        for (key_type, mode) in KINDS {
            let (earlier, key) = (named("k", "before", key_type), key(key_type));
            let minted = mint(&earlier, 3, mode.map(sealed));
            let sha256 = &minted.record.current.sha256;
            let restored = Ok((sha256.clone(), true));
            let secret = || minted.secret(&ring);
            assert_eq!(verdict(secret(), &key, &ring, false), Err(NOT_AUTHENTIC), "everybody may write Secrets");
            assert_eq!(
                verdict(secret(), &key, &ring, true),
                Err(NOT_AUTHENTIC),
                "a deleted ApiKey may leave it behind"
            );
            let by_velero = annotated(&key, RESTORED_BY_ANNOTATION, "velero");
            assert_eq!(verdict(secret(), &by_velero, &ring, false), Err(NOT_AUTHENTIC), "everybody may write Secrets");
            assert_eq!(verdict(secret(), &by_velero, &ring, true), restored);
            let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
            assert_eq!(verdict(secret(), &accepted, &ring, false), restored);
            let other = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{}", "0".repeat(64)));
            assert_eq!(verdict(secret(), &other, &ring, false), Err(NOT_AUTHENTIC));
            let found = classify(secret(), &by_velero, &Trust { ring: &ring, guarded: true });
            let Observed::Ours(held) = found.observed else { panic!() };
            assert_eq!((held.record.subject, held.record.current.generation), (Subject::of(&key), 3));
            // An owner that is no more: restored if the Secret is younger than its value.
            let dangling = owned_by(secret(), &earlier);
            assert_eq!(verdict(dangling.clone(), &by_velero, &ring, true), restored);
            let mut being_collected = dangling;
            being_collected.metadata.creation_timestamp = Some(Time(minted.record.current.minted_at));
            assert_eq!(verdict(being_collected, &by_velero, &ring, true), Err(CONFLICT));
        }
    }

    /// Mallory deletes a key of her own and leaves the Secret behind, and alice creates a key of that name.
    #[test]
    fn a_secret_that_a_key_of_another_person_left_behind_is_not_believed() {
        let ring = Keyring::generate().unwrap();
        for (key_type, mode) in KINDS {
            let of = |user: &str| {
                let mut key = annotated(&named("k", user, key_type), CREATOR_ANNOTATION, user);
                key.spec.user = (key_type == KeyType::Personal).then(|| user.to_owned());
                key
            };
            let left = mint(&of("mallory"), 1, mode.map(sealed)).secret(&ring);
            assert_eq!(verdict(left.clone(), &of("alice"), &ring, true), Err(NOT_AUTHENTIC));
            let restored = annotated(&of("alice"), RESTORED_BY_ANNOTATION, "velero");
            assert_eq!(verdict(left, &restored, &ring, true), Err(NOT_AUTHENTIC), "also before a restore of alice's");
        }
    }

    #[test]
    fn a_secret_of_another_operator_is_believed_as_far_as_it_was_accepted() {
        let (ring, other) = (Keyring::generate().unwrap(), Keyring::generate().unwrap());
        for (key_type, mode) in KINDS {
            let key = key(key_type);
            let minted = mint(&key, 3, mode.map(sealed));
            let sha256 = &minted.record.current.sha256;
            let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
            let secret = minted.secret(&other);
            // A value that is sealed to another operator can't be opened here, so that nothing proves the digest.
            let expected = if mode.is_none() { Ok((sha256.clone(), true)) } else { Err(NOT_AUTHENTIC) };
            assert_eq!(verdict(secret.clone(), &accepted, &ring, false), expected);
            let another = mint(&key, 3, mode.map(sealed)).secret(&other);
            assert_eq!(verdict(another, &accepted, &ring, true), Err(NOT_AUTHENTIC), "changed after it was accepted");
            let restored = annotated(&key, RESTORED_BY_ANNOTATION, "velero");
            assert_eq!(verdict(secret, &restored, &ring, true), Err(NOT_AUTHENTIC), "a restore alone is not enough");
        }
    }

    #[test]
    fn the_generation_of_a_record_that_is_not_authentic_counts_for_nothing() {
        let ring = Keyring::generate().unwrap();
        let key = key(KeyType::Team);
        let minted = mint(&key, i64::MAX, None);
        let sha256 = &minted.record.current.sha256;
        let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
        let secret = minted.secret(&Keyring::generate().unwrap());
        let found = classify(secret, &accepted, &Trust { ring: &ring, guarded: true });
        let Observed::Ours(held) = found.observed else { panic!("{:?}", found.observed) };
        assert_eq!(held.record.current.generation, 1);
    }

    #[test]
    fn a_plain_value_is_never_that_of_a_personal_key() {
        let ring = Keyring::generate().unwrap();
        let key = key(KeyType::Personal);
        let mut minted = mint(&key, 1, None);
        let sha256 = minted.record.current.sha256.clone();
        let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
        assert_eq!(verdict(minted.secret(&Keyring::generate().unwrap()), &accepted, &ring, true), Err(NOT_AUTHENTIC));
        minted.record.sealed = Some(sealed(RevealMode::Sealed));
        let mut secret = minted.secret(&ring);
        let plain = ByteString(minted.value.expose().as_bytes().to_vec());
        secret.data = Some([("key-value".to_owned(), plain)].into());
        let found = classify(secret, &minted.reported(&key), &Trust { ring: &ring, guarded: true });
        assert!(found.value.is_none());
    }
}
