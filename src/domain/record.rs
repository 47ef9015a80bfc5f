//! The record: what the Secret itself says of the key, beside the value.
//!
//! The operator writes the record in the same request as the value, so that the two always agree. The record is all
//! that is needed to rebuild the status of an ApiKey after a crash, a lost status or a restored backup. It holds no value.
//!
//! Everybody with write access to Secrets can write a record. The operator therefore authenticates each record with a
//! message authentication code ([`MAC_ANNOTATION`]) and believes no other one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::status::secret_ref;
use crate::api::{ApiKey, KeyType, RevealMode, creator_of_key};

/// The annotation that holds the record, as JSON.
pub const ANNOTATION: &str = "keywright.dev/record";

/// The annotation that holds the message authentication code of the record: HMAC-SHA-256 (RFC 2104) over the text of
/// [`ANNOTATION`], as 64 hex digits.
pub const MAC_ANNOTATION: &str = "keywright.dev/record-mac";

/// The type of every Secret that Keywright writes. It never depends on user input, so that no ApiKey can make a
/// Secret that means something to another controller (CVE-2026-42876 of a peer).
pub const SECRET_TYPE: &str = "keywright.dev/api-key";

/// What a Secret says of its key.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The key and the Secret that the record is about.
    #[serde(flatten)]
    pub subject: Subject,
    /// When the first value was minted.
    pub created_at: Timestamp,
    /// When the value was last replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rotated_at: Option<Timestamp>,
    /// The last `spec.rotation.requestedAt` that was carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<String>,
    /// The value in the Secret.
    pub current: Entry,
    /// The value before it, while it still works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// How the value is kept, if it is sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Sealed>,
    /// The labels and annotations that come from `spec.secret`, so that those taken out there are taken out here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// See `labels`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<String>,
}

/// The key and the Secret that a record is about. A record that is copied to another place names the place that it
/// comes from, and is refused there.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    /// The namespace of the ApiKey and of the Secret.
    #[serde(default)]
    pub namespace: String,
    /// The name of the Secret.
    #[serde(default)]
    pub secret: String,
    /// The name of the ApiKey.
    pub api_key: String,
    /// The uid of the ApiKey. A restored ApiKey has another uid than the record.
    #[serde(default)]
    pub uid: String,
    /// The type of the ApiKey. Absent in records of earlier versions.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub key_type: Option<KeyType>,
    /// The user of a Personal key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The creator of the ApiKey, whom a restore keeps. A Secret that is left behind by a key of this name of another
    /// creator is not the Secret of this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creator: Option<String>,
}

impl Subject {
    /// The subject of the record of an ApiKey.
    #[must_use]
    pub fn of(key: &ApiKey) -> Self {
        Self {
            namespace: key.metadata.namespace.clone().unwrap_or_default(),
            secret: secret_ref(key).name,
            api_key: key.metadata.name.clone().unwrap_or_default(),
            uid: key.metadata.uid.clone().unwrap_or_default(),
            key_type: Some(key.spec.key_type),
            user: key.spec.user.clone(),
            creator: creator_of_key(key).map(|creator| creator.name),
        }
    }

    /// Whether both name the same namespace, Secret and ApiKey.
    #[must_use]
    pub fn has_names_of(&self, other: &Self) -> bool {
        let names = |subject: &Self| (subject.namespace.clone(), subject.secret.clone(), subject.api_key.clone());
        names(self) == names(other)
    }

    /// Whether both are about the same names, type and people. The uid may differ: a restore gives the ApiKey a new one.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let uid = other.uid.clone();
        Self { uid, ..self.clone() } == *other
    }
}

/// The key in a Secret's data that holds a sealed value.
pub const SEALED_VALUE: &str = "sealed-value";

/// The key in a Secret's data that holds a value on its way to the one who took it, encrypted to that person.
pub const CLAIMED: &str = "claimed";

/// How a sealed value is kept, and what became of it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Sealed {
    /// Whether it can be seen once only.
    pub mode: RevealMode,
    /// Whether a plain copy for workloads is beside it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// Who saw the value first; under one-time reveal, who took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// When it was erased, since nobody saw it in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub erased_at: Option<Timestamp>,
}

/// The first granted request to see a value.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// The uid of the KeyReveal. Empty if only the status knows of the claim, which has no room for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The user.
    pub by: String,
    /// When.
    pub at: Timestamp,
}

/// One value, by its digest.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// SHA-256 of the value, 64 hex digits.
    pub sha256: String,
    /// When it was minted.
    pub minted_at: Timestamp,
    /// Which value of its key it is, from 1; it only grows. 0 if an earlier version wrote it.
    #[serde(default)]
    pub generation: i64,
}

/// A replaced value that still works for a while.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Previous {
    /// The value.
    #[serde(flatten)]
    pub entry: Entry,
    /// The end of its overlap.
    pub expires_at: Timestamp,
}

impl Entry {
    /// `key_` and the first 16 hex digits of the digest.
    #[must_use]
    pub fn id(&self) -> String {
        format!("key_{}", self.sha256.get(..16).unwrap_or_default())
    }
}
