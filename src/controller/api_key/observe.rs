//! Reads the Secret of a key, and decides what is believed of it.
//!
//! Everybody with write access to Secrets is taken for an attacker here. The operator believes, in this order:
//!
//! 1. The status of the ApiKey, which only the operator can write. It is behind the Secret only after a crash between the
//!    write of the Secret and that of the status.
//! 2. A record in the Secret that the operator authenticated, for this very ApiKey, whose generation is later than that of
//!    the status.
//! 3. Without a status: such a record of an earlier ApiKey of this name (a restore), if a user with the restore right
//!    put it there.
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
pub async fn observe(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
) -> Result<Observed, RequestError> {
    find(client, sealing, namespace, key).await.map(|found| found.observed)
}

/// [`observe`], and what is in the Secret.
///
/// # Errors
/// See [`observe`].
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
    /// Whether the chart's ValidatingAdmissionPolicy on Secrets is in force: then a Secret with an authentic record that
    /// comes back was put there by a user with the restore right.
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
        let owned = owner.is_some_and(|owner| owner.uid == self.subject.uid);
        if let Some(owner) = owner.filter(|owner| !owned && !self.is_of_earlier(owner)) {
            let why = format!(
                "it belongs to {} {}: delete that, or name another Secret under spec.secret.name of a new ApiKey",
                owner.kind, owner.name
            );
            return Observed::Foreign { reason: CONFLICT, why, passing: false };
        }
        if self.secret.type_.as_deref() != Some(record::SECRET_TYPE) {
            let why = "it was not made by Keywright: delete it, or name another Secret under spec.secret.name of a new ApiKey";
            return foreign(CONFLICT, why);
        }
        let authentic = self.authentic();
        let believed = match self.key.status.as_ref().and_then(record_of_status) {
            Some(known) => self.by_status(known, authentic.as_ref(), owned),
            None if owned || owner.is_none() || self.is_restored(authentic.as_ref()) => {
                self.by_record(authentic.as_ref())
            }
            None => return self.being_collected(),
        };
        match believed {
            Err(denied) => denied,
            Ok(record) => Observed::Ours(Held {
                version: self.secret.resource_version().unwrap_or_default(),
                intact: self.evidence.is_intact(&record),
                owned,
                in_order: metadata_in_order(self.secret, self.key),
                record,
                written: authentic,
            }),
        }
    }

    /// The record in the Secret, if the operator wrote it for this key, or for an earlier ApiKey of this name.
    fn authentic(&self) -> Option<Record> {
        let text = self.secret.annotations().get(record::ANNOTATION)?;
        let mac = self.secret.annotations().get(record::MAC_ANNOTATION)?;
        let record: Record = self.trust.ring.is_authentic(text, mac).then(|| serde_json::from_str(text).ok())??;
        record.subject.is_same_place(&self.subject).then_some(record)
    }

    /// The status knows a value. It is right, unless the record is of a later value of this very ApiKey.
    fn by_status(&self, known: Record, authentic: Option<&Record>, owned: bool) -> Result<Record, Observed> {
        let own = authentic.filter(|record| record.subject.uid == self.subject.uid);
        if let Some(later) = own.filter(|record| record.current.generation > known.current.generation) {
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
        if owned || self.evidence.proves(&record.current) || same.is_some() {
            return Ok(record);
        }
        Err(foreign(
            CONFLICT,
            "it does not hold the current value of this ApiKey: delete it, and restore a newer Secret or set \
             spec.rotation.requestedAt to the current time to mint a new value",
        ))
    }

    /// There is no status.
    fn by_record(&self, authentic: Option<&Record>) -> Result<Record, Observed> {
        let accepted =
            self.key.annotations().get(ACCEPT_SECRET_ANNOTATION).and_then(|text| text.strip_prefix("sha256:"));
        let Some(record) = authentic else {
            return accepted.and_then(|sha256| self.accept(sha256)).ok_or_else(|| {
                foreign(
                    NOT_AUTHENTIC,
                    "its record was not written by this operator, or the sealing keys of the operator that wrote it are \
                     missing: restore the sealing keys, or have a user with the right to restore ApiKeys run kubectl \
                     keywright accept, or delete the Secret to have a new value minted",
                )
            });
        };
        // After a crash between the write of the Secret and that of the status.
        if record.subject.uid == self.subject.uid {
            return Ok(record.clone());
        }
        let is_allowed = self.trust.guarded
            || self.key.annotations().contains_key(RESTORED_BY_ANNOTATION)
            || accepted == Some(&*record.current.sha256);
        if !is_allowed {
            return Err(foreign(
                NOT_AUTHENTIC,
                "it is of an earlier ApiKey of this name: have a user with the right to restore ApiKeys run kubectl \
                 keywright accept, or delete the Secret to have a new value minted",
            ));
        }
        // What was taken or erased is not there; all else has to be.
        if !self.evidence.proves(&record.current) && !self.evidence.is_intact(record) {
            return Err(foreign(
                NOT_AUTHENTIC,
                "it no longer holds the value that its record is about: restore it once more, or delete it to have a new \
                 value minted",
            ));
        }
        Ok(Record { subject: self.subject.clone(), ..record.clone() })
    }

    /// The record of a value that a user with the restore right accepted, by its digest. What an unauthenticated record
    /// says of it counts only as far as it makes nothing more of the value.
    fn accept(&self, sha256: &str) -> Option<Record> {
        let text = self.secret.annotations().get(record::ANNOTATION);
        let claimed: Option<Record> = text.and_then(|text| serde_json::from_str(text).ok());
        let claimed = claimed.filter(|record| record.current.sha256 == sha256);
        let sealed = self.evidence.sealed.as_ref().filter(|(value, _)| is(Some(value), sha256));
        let plain = is(self.evidence.plain.as_ref(), sha256);
        // Without the sealing keys of the operator that sealed it, only the record tells the digest.
        let is_sealed = sealed.is_some() || !plain && claimed.as_ref().is_some_and(|record| record.sealed.is_some());
        if !plain && !is_sealed {
            return None;
        }
        let minted_at = self.secret.creation_timestamp()?.0;
        let generation = match (sealed, &claimed) {
            (Some((_, generation)), _) => *generation,
            (None, Some(record)) => record.current.generation,
            (None, None) => 1,
        };
        let mode = claimed.as_ref().and_then(|record| record.sealed.as_ref()).map(|sealed| sealed.mode);
        Some(Record {
            subject: self.subject.clone(),
            created_at: claimed.as_ref().map_or(minted_at, |record| record.created_at.min(minted_at)),
            last_rotated_at: None,
            requested_at: self.key.spec.rotation.as_ref().and_then(|r| r.requested_at.clone()),
            current: Entry { sha256: sha256.to_owned(), minted_at, generation: generation.max(1) },
            previous: None,
            sealed: is_sealed.then(|| Sealed {
                // How often it may be seen is not known: then once.
                mode: mode.filter(|_| sealed.is_some()).unwrap_or(RevealMode::OneTime),
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
        let why = "it belongs to an earlier ApiKey of this name and is being garbage collected".to_owned();
        Observed::Foreign { reason: CONFLICT, why, passing: true }
    }
}

fn foreign(reason: &'static str, why: &str) -> Observed {
    Observed::Foreign { reason, why: why.to_owned(), passing: false }
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
