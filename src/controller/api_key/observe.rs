//! Reads the Secret of a key, and says whose it is.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::SignedDuration,
};
use kube::{Api, Client, ResourceExt};
use secrecy::ExposeSecret;

use crate::{
    api::{ApiKey, KeyType, RevealMode},
    controller::{RequestError, request},
    domain::{
        key::Key,
        lifecycle::{Held, Observed, record_of_status},
        record::{self, Entry, Previous, Record, Sealed},
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
    let is_sealed = secret.data.as_ref().is_some_and(|data| data.contains_key(record::SEALED_VALUE));
    let ring = if is_sealed { Some(sealing.ring().await.map_err(RequestError::new_local)?) } else { None };
    Ok(classify(secret, key, ring.as_deref()))
}

/// What the values in a Secret prove.
struct Evidence {
    plain: Option<Key>,
    /// Nobody else can seal to the operator, so what opens was sealed by it.
    sealed: Option<Key>,
}

impl Evidence {
    fn take(secret: &mut Secret, key: &ApiKey, ring: Option<&Keyring>) -> Self {
        let mut data = secret.data.take().unwrap_or_default();
        let plain = data.remove(&secret_ref(key).key).and_then(|ByteString(mut bytes)| {
            let value = Key::parse(key.spec.key_type, &bytes);
            bytes.fill(0);
            value
        });
        let plain = plain.filter(|_| !is_never_plain(key));
        let opened = data.remove(record::SEALED_VALUE).and_then(|sealed| ring?.open(&sealed.0).ok());
        let sealed = opened.and_then(|value| Key::parse(key.spec.key_type, value.expose_secret()));
        Self { plain, sealed }
    }

    fn digest(&self) -> Option<String> {
        self.sealed.as_ref().or(self.plain.as_ref()).map(|value| value.digest().to_string())
    }

    /// Whether a value of this digest is there.
    fn proves(&self, sha256: &str) -> bool {
        is(self.plain.as_ref(), sha256) || is(self.sealed.as_ref(), sha256)
    }

    /// Whether all is there that a record says.
    fn is_intact(&self, record: &Record) -> bool {
        let sha256 = &record.current.sha256;
        match &record.sealed {
            None => is(self.plain.as_ref(), sha256),
            Some(sealed) => {
                (!sealed.plain || is(self.plain.as_ref(), sha256))
                    && (!sealed.is_kept() || is(self.sealed.as_ref(), sha256))
            }
        }
    }
}

/// Whether a plain value would be somebody else's: who may create Secrets could otherwise have a value of their own
/// taken for that of a person's key. One that the operator itself once wrote plain, it knows from the status.
fn is_never_plain(key: &ApiKey) -> bool {
    key.spec.key_type == KeyType::Personal
        && key.spec.legacy.is_none()
        && key.status.as_ref().and_then(record_of_status).is_none_or(|known| known.sealed.is_some())
}

fn is(value: Option<&Key>, sha256: &str) -> bool {
    value.is_some_and(|value| value.digest().to_string() == sha256)
}

/// Decides whose a Secret is. It is this key's if it is owned by this very object (uid); or, after a restore that
/// lost owner and status, if its record names this ApiKey and holds the digest of the value that is in it.
#[must_use]
pub fn classify(mut secret: Secret, key: &ApiKey, ring: Option<&Keyring>) -> Found {
    let claimed = secret.data.as_mut().and_then(|data| data.remove(record::CLAIMED));
    let claimed = claimed.and_then(|ByteString(bytes)| String::from_utf8(bytes).ok());
    let evidence = Evidence::take(&mut secret, key, ring);
    let observed = judge(&secret, key, &evidence);
    Found { observed, value: evidence.sealed.or(evidence.plain), claimed }
}

fn judge(secret: &Secret, key: &ApiKey, evidence: &Evidence) -> Observed {
    let written = secret
        .annotations()
        .get(record::ANNOTATION)
        .and_then(|json| serde_json::from_str::<Record>(json).ok())
        .filter(|record| record.api_key == key.name_any());
    let owner = secret.owner_references().iter().find(|owner| owner.controller == Some(true));
    let is_ours = owner.is_some_and(|owner| Some(&owner.uid) == key.metadata.uid.as_ref());
    if !is_ours && !is_restored(secret, owner, written.as_ref(), evidence, key) {
        return foreign(owner, key);
    }
    let Some(record) = believe(secret, written.as_ref(), evidence, key) else {
        let why =
            "it belongs to this ApiKey but holds neither a key nor a record of it: delete it to have a key minted";
        return Observed::Foreign { why: why.to_owned(), passing: false };
    };
    Observed::Ours(Held {
        version: secret.resource_version().unwrap_or_default(),
        intact: evidence.is_intact(&record),
        owned: is_ours,
        in_order: metadata_in_order(secret, key),
        record,
        written,
    })
}

/// What to believe of a Secret. Who may write Secrets may write any record, so that a record alone proves nothing: a
/// forged digest would be a forged key. The value proves the current digest. The status, which only the operator
/// writes, proves the rest; where it knows the current value, it is right. After a crash in the middle of a rotation
/// it knows the value before, and only that can be the one in overlap. Only a lost status leaves the record alone. So
/// does a value that was taken or erased: nothing is left to prove it.
fn believe(secret: &Secret, written: Option<&Record>, evidence: &Evidence, key: &ApiKey) -> Option<Record> {
    let known = key.status.as_ref().and_then(record_of_status).map(|known| Record {
        api_key: key.name_any(),
        sealed: known.sealed.as_ref().map(|sealed| {
            let written = written.filter(|written| written.current.sha256 == known.current.sha256);
            Sealed::believed(sealed, written.and_then(|written| written.sealed.as_ref()))
        }),
        labels: written.map(|w| w.labels.clone()).unwrap_or_default(),
        annotations: written.map(|w| w.annotations.clone()).unwrap_or_default(),
        ..known
    });
    let gone = |written: &Record| known.is_none() && is_gone(key, written);
    let proven = written.filter(|w| evidence.proves(&w.current.sha256) || gone(w)).cloned();
    match (proven, known) {
        (Some(proven), Some(known)) if proven.current.sha256 != known.current.sha256 => {
            let before = |previous: &Previous| previous.entry == known.current;
            Some(Record { previous: proven.previous.filter(before), created_at: known.created_at, ..proven })
        }
        (_, Some(known)) => Some(known),
        (Some(proven), None) => Some(proven),
        (None, None) => {
            let sha256 = evidence.digest()?;
            // How often it may be seen is not known: then once.
            let sealed = evidence.sealed.as_ref().map(|_| Sealed {
                mode: RevealMode::OneTime,
                plain: evidence.plain.is_some(),
                claim: None,
                erased_at: None,
            });
            let minted_at = secret.creation_timestamp()?.0;
            Some(Record {
                api_key: key.name_any(),
                created_at: minted_at,
                last_rotated_at: None,
                requested_at: key.spec.rotation.as_ref().and_then(|r| r.requested_at.clone()),
                current: Entry { sha256, minted_at },
                previous: None,
                sealed,
                labels: vec![],
                annotations: vec![],
            })
        }
    }
}

/// A restored Secret has no owner, or an owner that the restore did not bring back under the same uid; in the second
/// case it is younger than the value in it, which the Secret of a deleted and re-created ApiKey never is.
fn is_restored(
    secret: &Secret,
    owner: Option<&OwnerReference>,
    record: Option<&Record>,
    evidence: &Evidence,
    key: &ApiKey,
) -> bool {
    let Some(record) = record else { return false };
    let proven = secret.type_.as_deref() == Some(record::SECRET_TYPE)
        && (evidence.proves(&record.current.sha256) || is_gone(key, record));
    let made = secret.creation_timestamp().map(|t| t.0);
    let younger = made.is_some_and(|made| made.duration_since(record.current.minted_at) > SignedDuration::from_mins(1));
    let going = secret.metadata.deletion_timestamp.is_some();
    proven && !going && owner.is_none_or(|owner| owner.kind == "ApiKey" && owner.name == record.api_key && younger)
}

/// Whether a record says that its value was taken or erased. For a person's key, that alone is not believed: whoever
/// wrote it may know the value.
fn is_gone(key: &ApiKey, record: &Record) -> bool {
    let believed = key.spec.key_type != KeyType::Personal;
    believed && record.sealed.as_ref().is_some_and(|sealed| !sealed.is_kept() && !sealed.plain)
}

fn foreign(owner: Option<&OwnerReference>, key: &ApiKey) -> Observed {
    match owner {
        Some(owner) if owner.kind == "ApiKey" && owner.name == key.name_any() => Observed::Foreign {
            why: "it belongs to an earlier ApiKey of this name and is being garbage collected".to_owned(),
            passing: true,
        },
        Some(owner) => Observed::Foreign {
            why: format!("it belongs to {} {}: give this ApiKey another spec.secret.name", owner.kind, owner.name),
            passing: false,
        },
        None => Observed::Foreign {
            why: "it exists and was not made for this ApiKey: delete it, or give this ApiKey another spec.secret.name"
                .to_owned(),
            passing: false,
        },
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
    use crate::domain::validate::tests::spec;

    const SHA256: &str = "00";

    fn key(key_type: KeyType) -> ApiKey {
        let mut key = ApiKey::new("k", spec(key_type, &["Alerts"], &[]));
        key.metadata.uid = Some("u".to_owned());
        key
    }

    /// A Secret without owner, as a restore makes it, or somebody who wants it to be taken for one.
    fn secret(record: &Record, data: &[(&str, &[u8])]) -> Secret {
        let json = serde_json::json!({
            "metadata": {
                "name": "k-secret", "creationTimestamp": "2026-11-23T10:00:00Z",
                "annotations": {record::ANNOTATION: serde_json::to_string(record).unwrap()},
            },
            "type": record::SECRET_TYPE,
        });
        let data = data.iter().map(|(name, bytes)| ((*name).to_owned(), ByteString(bytes.to_vec()))).collect();
        Secret { data: Some(data), ..serde_json::from_value(json).unwrap() }
    }

    fn record_of(sha256: &str, sealed: Option<Sealed>) -> Record {
        let at = "2026-11-23T09:00:00Z".parse().unwrap();
        Record {
            api_key: "k".to_owned(),
            created_at: at,
            last_rotated_at: None,
            requested_at: None,
            current: Entry { sha256: sha256.to_owned(), minted_at: at },
            previous: None,
            sealed,
            labels: vec![],
            annotations: vec![],
        }
    }

    fn is_taken(found: &Found) -> bool {
        matches!(found.observed, Observed::Ours(_))
    }

    #[test]
    fn a_value_of_somebody_else_is_never_taken_for_that_of_a_personal_key() {
        let ring = Keyring::generate();
        let unseen = Sealed { mode: RevealMode::Sealed, plain: false, claim: None, erased_at: None };
        let erased = Sealed { erased_at: Some("2026-11-23T09:30:00Z".parse().unwrap()), ..unseen.clone() };
        for (key_type, forged) in [(KeyType::Personal, false), (KeyType::Team, true)] {
            let key = key(key_type);
            let value = Key::mint(key_type, &mut rand::rngs::SysRng).unwrap();
            let sha256 = value.digest().to_string();
            let bytes = value.expose().as_bytes();
            let plain = secret(&record_of(&sha256, None), &[("key-value", bytes)]);
            assert_eq!(is_taken(&classify(plain, &key, None)), forged, "a plain value, restored or forged");
            let gone = secret(&record_of(SHA256, Some(erased.clone())), &[]);
            assert_eq!(is_taken(&classify(gone, &key, None)), forged, "a record alone");
            // What opens, the operator sealed.
            let sealed = record_of(&sha256, Some(unseen.clone()));
            let own = secret(&sealed, &[(record::SEALED_VALUE, &ring.seal(bytes).unwrap())]);
            let found = classify(own, &key, Some(&ring));
            assert!(is_taken(&found) && found.value.is_some());
            let other = secret(&sealed, &[(record::SEALED_VALUE, &Keyring::generate().seal(bytes).unwrap())]);
            assert!(!is_taken(&classify(other, &key, Some(&ring))));
        }
    }
}
