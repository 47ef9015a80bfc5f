//! Reads the Secret of a key and decides whether it belongs to the key.
//!
//! Users with write access to Secrets are treated as attackers. The operator trusts, in this order:
//!
//! 1. The status of the ApiKey, which only the operator can write. It is older than the Secret only after a crash
//!    between the write of the Secret and that of the status.
//! 2. An authenticated record in the Secret for this ApiKey, whose generation is later than that of the status.
//! 3. Without a status: an authenticated record for an earlier ApiKey of this name, if a user with the right to restore
//!    created the ApiKey (a restore). That the admission policy protects Secrets is not sufficient: a user can delete an
//!    ApiKey and keep its Secret (`kubectl delete --cascade=orphan`), which another ApiKey of this name would adopt.
//! 4. Without any of these: a value whose digest a user with the right to restore accepted.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::SignedDuration,
};
use kube::ResourceExt;
use secrecy::ExposeSecret;

use super::act::SecretTarget;
use crate::{
    api::{ACCEPT_SECRET_ANNOTATION, ApiKey, KeyType, RESTORED_BY_ANNOTATION, RevealMode},
    controller::{RequestError, request},
    domain::{
        key::Key,
        lifecycle::{Observed, OwnedSecret, record_of_status},
        record::{self, Entry, Record, Sealed, Subject},
        status::secret_ref,
    },
    sealing::SealingKeys,
};

/// The label of every Secret that Keywright writes. Labels of the ApiKey are never copied: a GitOps tool would prune a
/// Secret with its tracking label.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "keywright");

/// A Secret that was read, with the values in it.
#[derive(Debug)]
pub struct FoundSecret {
    /// The classification of the Secret.
    pub observed: Observed,
    /// The value of the record, if the Secret holds it plain or sealed.
    pub value: Option<Key>,
    /// The answer to a KeyReveal: the claimed value, encrypted to the requester.
    pub claimed: Option<String>,
}

/// Reads the Secret of a key by name. The operator never lists or watches Secrets.
///
/// # Errors
/// If the API server rejects the request or can't be reached, or if the sealing keys can't be read.
pub async fn find(target: &SecretTarget<'_>) -> Result<FoundSecret, RequestError> {
    let name = &target.secret_ref.name;
    let Some(secret) = request(&format!("get Secret {name}"), target.secrets().get_opt(name)).await? else {
        return Ok(FoundSecret { observed: Observed::Missing, value: None, claimed: None });
    };
    let ring = target.sealing.ring().await.map_err(RequestError::new_local)?;
    Ok(classify(
        secret,
        target.key,
        &TrustAnchors { ring: &ring, policy_protects_secrets: target.sealing.is_guarded() },
    ))
}

/// The basis on which the operator trusts a Secret.
#[derive(Clone, Copy, Debug)]
pub struct TrustAnchors<'a> {
    /// The sealing keys and record keys of the operator.
    pub ring: &'a SealingKeys,
    /// Whether the ValidatingAdmissionPolicy of the chart protects Secrets. Then only the operator and users with the
    /// right to restore can write a Secret with an authenticated record.
    pub policy_protects_secrets: bool,
}

/// The values in a Secret.
struct FoundValues {
    plain: Option<Key>,
    /// The value that the operator sealed for this ApiKey, and its generation.
    sealed: Option<(Key, i64)>,
}

impl FoundValues {
    fn take(secret: &mut Secret, key: &ApiKey, subject: &Subject, ring: &SealingKeys) -> Self {
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

    /// Whether the Secret holds the value of an entry plain.
    fn has_plain(&self, entry: &Entry) -> bool {
        has_digest(self.plain.as_ref(), &entry.sha256)
    }

    /// Whether the Secret holds the value of an entry sealed.
    fn has_sealed(&self, entry: &Entry) -> bool {
        let sealed = self.sealed.as_ref().filter(|(_, generation)| *generation == entry.generation);
        has_digest(sealed.map(|(value, _)| value), &entry.sha256)
    }

    /// Whether the Secret holds the value of an entry.
    fn contains(&self, entry: &Entry) -> bool {
        self.has_plain(entry) || self.has_sealed(entry)
    }

    /// Whether the Secret holds every value that the record describes. A Secret without a value is intact if its value
    /// was claimed or erased.
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

/// Whether a plain value can't be the value of the key. The value of a Personal key is always sealed, unless the status
/// says that an earlier version of the operator wrote it plain.
fn is_never_plain(key: &ApiKey) -> bool {
    key.spec.key_type == KeyType::Personal
        && key.spec.legacy.is_none()
        && key.status.as_ref().and_then(record_of_status).is_none_or(|known| known.sealed.is_some())
}

fn has_digest(value: Option<&Key>, sha256: &str) -> bool {
    value.is_some_and(|value| value.digest().to_string() == sha256)
}

/// Classifies a Secret.
#[must_use]
pub fn classify(mut secret: Secret, key: &ApiKey, trust: &TrustAnchors<'_>) -> FoundSecret {
    let claimed = secret.data.as_mut().and_then(|data| data.remove(record::CLAIMED));
    let claimed = claimed.and_then(|ByteString(bytes)| String::from_utf8(bytes).ok());
    let subject = Subject::of(key);
    let values = FoundValues::take(&mut secret, key, &subject, trust.ring);
    let authenticated = authenticated_record(&secret, trust.ring);
    let observed = Classification { secret: &secret, key, subject, values: &values, authenticated, trust }.observed();
    let value = match &observed {
        Observed::Ours(owned) if values.has_sealed(&owned.record.current) => values.sealed.map(|(value, _)| value),
        Observed::Ours(owned) if values.has_plain(&owned.record.current) => values.plain,
        _ => None,
    };
    FoundSecret { observed, value, claimed }
}

/// The inputs of the classification of a Secret.
struct Classification<'a> {
    secret: &'a Secret,
    key: &'a ApiKey,
    subject: Subject,
    values: &'a FoundValues,
    /// The record in the Secret, if the operator wrote it, for any ApiKey.
    authenticated: Option<Record>,
    trust: &'a TrustAnchors<'a>,
}

fn authenticated_record(secret: &Secret, ring: &SealingKeys) -> Option<Record> {
    let text = secret.annotations().get(record::ANNOTATION)?;
    let mac = secret.annotations().get(record::MAC_ANNOTATION)?;
    ring.is_authentic(text, mac).then(|| serde_json::from_str(text).ok())?
}

/// The reasons of the condition for a foreign Secret.
const CONFLICT: &str = "SecretConflict";
const NOT_AUTHENTIC: &str = "SecretNotAuthentic";

impl Classification<'_> {
    fn observed(&self) -> Observed {
        let owner = self.secret.owner_references().iter().find(|owner| owner.controller == Some(true));
        let is_owned = owner.is_some_and(|owner| owner.uid == self.subject.uid);
        if let Some(owner) = owner.filter(|owner| !is_owned && !self.is_same_name(owner)) {
            let why = format!(
                "it belongs to {} {}: delete that object, or create an ApiKey with another spec.secret.name",
                owner.kind, owner.name
            );
            return Observed::Foreign { reason: CONFLICT, why, passing: false };
        }
        if self.secret.type_.as_deref() != Some(record::SECRET_TYPE) {
            let why = "Keywright did not create it: delete it, or create an ApiKey with another spec.secret.name";
            return ForeignReason { reason: CONFLICT, why }.into();
        }
        // Written for this ApiKey, or for an earlier ApiKey of this name.
        let authentic = self.authenticated.as_ref().filter(|record| record.subject.is_same_place(&self.subject));
        let record = match self.key.status.as_ref().and_then(record_of_status) {
            Some(known) => self.record_with_status(known, authentic, is_owned),
            None if is_owned || owner.is_none() || self.is_restored(authentic) => self.record_without_status(authentic),
            None => return self.owned_by_deleted_key(),
        };
        match record {
            Err(reason) => reason.into(),
            Ok(record) => Observed::Ours(OwnedSecret {
                version: self.secret.resource_version().unwrap_or_default(),
                intact: self.values.is_intact(&record),
                owned: is_owned,
                in_order: metadata_in_order(self.secret, self.key),
                record,
                mac: authentic.and_then(|_| self.secret.annotations().get(record::MAC_ANNOTATION).cloned()),
                written: authentic.cloned(),
            }),
        }
    }

    /// Returns the record of an ApiKey whose status has a value. The status takes precedence, unless the record in the
    /// Secret describes a later value of this ApiKey.
    fn record_with_status(
        &self,
        known: Record,
        authentic: Option<&Record>,
        is_owned: bool,
    ) -> Result<Record, ForeignReason> {
        let own = authentic.filter(|record| record.subject.uid == self.subject.uid);
        let is_later = |record: &&Record| {
            record.current.generation > known.current.generation && record.current.minted_at >= known.current.minted_at
        };
        if let Some(later) = own.filter(is_later) {
            return Ok(Record { created_at: known.created_at, ..later.clone() });
        }
        // The uid of the claim and the names of labels and annotations are only in the record.
        let same = authentic.filter(|record| record.current == known.current);
        let record = Record {
            subject: self.subject.clone(),
            sealed: known
                .sealed
                .as_ref()
                .map(|sealed| Sealed::merge(sealed, same.and_then(|record| record.sealed.as_ref()))),
            labels: authentic.map(|record| record.labels.clone()).unwrap_or_default(),
            annotations: authentic.map(|record| record.annotations.clone()).unwrap_or_default(),
            ..known
        };
        // A Secret without its owner reference, or a restored one, holds the value or has a record of it.
        if is_owned || self.values.contains(&record.current) || same.is_some() {
            return Ok(record);
        }
        Err(ForeignReason {
            reason: CONFLICT,
            why: "it does not hold the current value of this ApiKey: delete it, and restore a newer Secret or set \
                  spec.rotation.requestedAt to the current time to mint a new value",
        })
    }

    /// Returns the record of an ApiKey whose status has no value.
    fn record_without_status(&self, authentic: Option<&Record>) -> Result<Record, ForeignReason> {
        let accepted =
            self.key.annotations().get(ACCEPT_SECRET_ANNOTATION).and_then(|text| text.strip_prefix("sha256:"));
        let Some(record) = authentic else {
            // The right to restore in one namespace does not permit the use of values of another namespace.
            if self.authenticated.as_ref().is_some_and(|record| !record.subject.has_names_of(&self.subject)) {
                return Err(ForeignReason {
                    reason: NOT_AUTHENTIC,
                    why: "the operator wrote it for an ApiKey of another name or namespace, and a value belongs to one \
                          ApiKey: delete the Secret to mint a new value",
                });
            }
            let why = "its record was not written by this operator for this ApiKey, or the sealing keys of the \
                       operator that wrote it are missing: restore the sealing keys, or have a user with the right to \
                       restore ApiKeys run kubectl keywright accept, or delete the Secret to mint a new value";
            let record = accepted.and_then(|sha256| self.accepted_record(sha256));
            return record.ok_or(ForeignReason { reason: NOT_AUTHENTIC, why });
        };
        // The operator crashed between the write of the Secret and that of the status.
        if record.subject.uid == self.subject.uid {
            return Ok(record.clone());
        }
        let is_restored =
            self.trust.policy_protects_secrets && self.key.annotations().contains_key(RESTORED_BY_ANNOTATION);
        let is_allowed = is_restored || accepted == Some(&*record.current.sha256);
        if !is_allowed {
            return Err(ForeignReason {
                reason: NOT_AUTHENTIC,
                why: "it belongs to an earlier ApiKey of this name: have a user with the right to restore ApiKeys run \
                      kubectl keywright accept, or delete the Secret to mint a new value",
            });
        }
        // A Secret whose value was claimed or erased is intact without it.
        if !self.values.contains(&record.current) && !self.values.is_intact(record) {
            return Err(ForeignReason {
                reason: NOT_AUTHENTIC,
                why: "it no longer holds the value that its record describes: restore it again, or delete it to mint \
                      a new value",
            });
        }
        Ok(Record { subject: self.subject.clone(), ..record.clone() })
    }

    /// Returns a record of the value whose digest a user with the right to restore accepted. The Secret must hold the
    /// value, since a digest alone is public in the status. An unauthenticated record contributes only an
    /// earlier `createdAt`.
    fn accepted_record(&self, sha256: &str) -> Option<Record> {
        let text = self.secret.annotations().get(record::ANNOTATION);
        let unauthenticated: Option<Record> = text.and_then(|text| serde_json::from_str(text).ok());
        let unauthenticated = unauthenticated.filter(|record| record.current.sha256 == sha256);
        let sealed = self.values.sealed.as_ref().filter(|(value, _)| has_digest(Some(value), sha256));
        let plain = has_digest(self.values.plain.as_ref(), sha256);
        if !plain && sealed.is_none() {
            return None;
        }
        let minted_at = self.secret.creation_timestamp()?.0;
        let generation = sealed.map_or(1, |(_, generation)| *generation);
        Some(Record {
            subject: self.subject.clone(),
            created_at: unauthenticated.as_ref().map_or(minted_at, |record| record.created_at.min(minted_at)),
            last_rotated_at: None,
            requested_at: self.key.spec.rotation.as_ref().and_then(|r| r.requested_at.clone()),
            current: Entry { sha256: sha256.to_owned(), minted_at, generation: generation.max(1) },
            previous: None,
            sealed: sealed.map(|_| Sealed {
                // The mode is not known. One-time is the strictest.
                mode: RevealMode::OneTime,
                plain,
                claim: None,
                erased_at: None,
            }),
            labels: vec![],
            annotations: vec![],
        })
    }

    /// Whether an owner is an ApiKey of this name. It is an earlier one if its uid differs.
    fn is_same_name(&self, owner: &OwnerReference) -> bool {
        owner.kind == "ApiKey" && owner.name == self.subject.api_key
    }

    /// Whether a Secret whose owner no longer exists was restored. Such a Secret is younger than its value. The Secret
    /// of an ApiKey that was deleted and created again is not.
    fn is_restored(&self, authentic: Option<&Record>) -> bool {
        let created_at = self.secret.creation_timestamp().map(|at| at.0);
        let minted_at = authentic.map(|record| record.current.minted_at);
        let is_terminating = self.secret.metadata.deletion_timestamp.is_some();
        !is_terminating
            && created_at
                .zip(minted_at)
                .is_some_and(|(created, minted)| created.duration_since(minted) > SignedDuration::from_mins(1))
    }

    /// Classifies a Secret that garbage collection deletes, since its owner no longer exists.
    fn owned_by_deleted_key(&self) -> Observed {
        if self.secret.metadata.deletion_timestamp.is_some() && !self.secret.finalizers().is_empty() {
            let why = "it belongs to an earlier ApiKey of this name, and its deletion waits for its finalizers: let \
                       the controller that set them finish, or remove metadata.finalizers from the Secret";
            return ForeignReason { reason: CONFLICT, why }.into();
        }
        let why = "it belongs to an earlier ApiKey of this name and is being garbage collected".to_owned();
        Observed::Foreign { reason: CONFLICT, why, passing: true }
    }
}

/// The reason why a Secret is foreign until a user changes something, with an explanation as a clause.
struct ForeignReason {
    reason: &'static str,
    why: &'static str,
}

impl From<ForeignReason> for Observed {
    fn from(ForeignReason { reason, why }: ForeignReason) -> Self {
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

mod tests;
