//! Reads the Secret of a key, and says whose it is.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::SignedDuration,
};
use kube::{Api, Client, ResourceExt};

use crate::{
    api::ApiKey,
    controller::{RequestError, request},
    domain::{
        key::Key,
        lifecycle::{Held, Observed, record_of_status},
        record::{self, Entry, Previous, Record},
        status::secret_ref,
    },
};

/// The label on every Secret that Keywright writes. The labels of the ApiKey are never copied: a tracking label of a
/// GitOps tool would make it prune the Secret.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "keywright");

/// Reads the one Secret of a key by name. There is no list and no watch of Secrets anywhere.
///
/// # Errors
/// If the API server can't be asked.
pub async fn observe(client: &Client, namespace: &str, key: &ApiKey) -> Result<Observed, RequestError> {
    let name = secret_ref(key).name;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = request(&format!("get Secret {name}"), secrets.get_opt(&name)).await?;
    Ok(found.map_or(Observed::Missing, |secret| classify(secret, key)))
}

/// Decides whose a Secret is. It is this key's if it is owned by this very object (uid); or, after a restore that
/// lost owner and status, if its record names this ApiKey and holds the digest of the value that is in it.
#[must_use]
pub fn classify(mut secret: Secret, key: &ApiKey) -> Observed {
    let value = secret.data.take().and_then(|mut data| data.remove(&secret_ref(key).key));
    let digest = value.and_then(|ByteString(mut bytes)| {
        let digest = Key::parse(key.spec.key_type, &bytes).map(|key| key.digest().to_string());
        bytes.fill(0);
        digest
    });
    let written = secret
        .annotations()
        .get(record::ANNOTATION)
        .and_then(|json| serde_json::from_str::<Record>(json).ok())
        .filter(|record| record.api_key == key.name_any());
    let owner = secret.owner_references().iter().find(|owner| owner.controller == Some(true));
    let is_ours = owner.is_some_and(|owner| Some(&owner.uid) == key.metadata.uid.as_ref());
    if !is_ours && !is_restored(&secret, owner, written.as_ref(), digest.as_deref()) {
        return foreign(owner, key);
    }
    let Some(record) = believe(&secret, written.as_ref(), digest.as_deref(), key) else {
        let why =
            "it belongs to this ApiKey but holds neither a key nor a record of it: delete it to have a key minted";
        return Observed::Foreign { why: why.to_owned(), passing: false };
    };
    Observed::Ours(Held {
        version: secret.resource_version().unwrap_or_default(),
        intact: digest.as_deref() == Some(record.current.sha256.as_str()),
        owned: is_ours,
        in_order: metadata_in_order(&secret, key),
        record,
        written,
    })
}

/// What to believe of a Secret. Who may write Secrets may write any record, so that a record alone proves nothing: a
/// forged digest would be a forged key. The value proves the current digest. The status, which only the operator
/// writes, proves the rest; where it knows the current value, it is right. After a crash in the middle of a rotation
/// it knows the value before, and only that can be the one in overlap. Only a lost status leaves the record alone.
fn believe(secret: &Secret, written: Option<&Record>, digest: Option<&str>, key: &ApiKey) -> Option<Record> {
    let known = key.status.as_ref().and_then(record_of_status).map(|known| Record {
        api_key: key.name_any(),
        labels: written.map(|w| w.labels.clone()).unwrap_or_default(),
        annotations: written.map(|w| w.annotations.clone()).unwrap_or_default(),
        ..known
    });
    let proven = written.filter(|written| digest == Some(written.current.sha256.as_str())).cloned();
    match (proven, known) {
        (Some(proven), Some(known)) if proven.current.sha256 != known.current.sha256 => {
            let before = |previous: &Previous| previous.entry == known.current;
            Some(Record { previous: proven.previous.filter(before), created_at: known.created_at, ..proven })
        }
        (_, Some(known)) => Some(known),
        (Some(proven), None) => Some(proven),
        (None, None) => {
            let minted_at = secret.creation_timestamp()?.0;
            Some(Record {
                api_key: key.name_any(),
                created_at: minted_at,
                last_rotated_at: None,
                requested_at: key.spec.rotation.as_ref().and_then(|r| r.requested_at.clone()),
                current: Entry { sha256: digest?.to_owned(), minted_at },
                previous: None,
                labels: vec![],
                annotations: vec![],
            })
        }
    }
}

/// A restored Secret has no owner, or an owner that the restore did not bring back under the same uid; in the second
/// case it is younger than the value in it, which the Secret of a deleted and re-created ApiKey never is.
fn is_restored(secret: &Secret, owner: Option<&OwnerReference>, record: Option<&Record>, digest: Option<&str>) -> bool {
    let Some(record) = record else { return false };
    let proven = secret.type_.as_deref() == Some(record::SECRET_TYPE) && digest == Some(&record.current.sha256);
    let made = secret.creation_timestamp().map(|t| t.0);
    let younger = made.is_some_and(|made| made.duration_since(record.current.minted_at) > SignedDuration::from_mins(1));
    let going = secret.metadata.deletion_timestamp.is_some();
    proven && !going && owner.is_none_or(|owner| owner.kind == "ApiKey" && owner.name == record.api_key && younger)
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
