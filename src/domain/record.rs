//! The record: an annotation of the Secret that describes the key, without its value.
//!
//! The operator writes the record in the same request as the value, so that the two always agree. From the record, the
//! operator rebuilds the status of an ApiKey after a crash, a lost status or a restored backup.
//!
//! Users with write access to Secrets can write a record. The operator therefore authenticates each record with a
//! message authentication code ([`MAC_ANNOTATION`]) and ignores records without a valid one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::status::secret_ref;
use crate::api::{ApiKey, KeyType, RevealMode, creator_of_key};

/// The annotation that holds the record, as JSON.
pub const ANNOTATION: &str = "keywright.dev/record";

/// The annotation that holds the message authentication code of the record: HMAC-SHA-256 (RFC 2104) over the text of
/// [`ANNOTATION`], as 64 hex digits.
pub const MAC_ANNOTATION: &str = "keywright.dev/record-mac";

/// The type of every Secret that Keywright writes. It never depends on user input, so that an ApiKey can't create a
/// Secret of a type that another controller acts on (see CVE-2026-42876 of another operator).
pub const SECRET_TYPE: &str = "keywright.dev/api-key";

/// The content of a record.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The key and the Secret that the record is about.
    #[serde(flatten)]
    pub subject: Subject,
    /// The time at which the first value was minted.
    pub created_at: Timestamp,
    /// The time of the last rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rotated_at: Option<Timestamp>,
    /// The last `spec.rotation.requestedAt` that the operator handled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<String>,
    /// The value in the Secret.
    pub current: Entry,
    /// The previous value, during its overlap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// The state of a sealed value. `None` if the value is plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Sealed>,
    /// The labels that come from `spec.secret`, so that the operator removes those that leave the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// The annotations that come from `spec.secret`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<String>,
}

/// The key and the Secret that a record is about. They differ from the actual ones if the record was copied to another
/// Secret, and the operator rejects the record there.
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
    /// The uid of the ApiKey. A restored ApiKey has a new uid, which differs from that of the record.
    #[serde(default)]
    pub uid: String,
    /// The type of the ApiKey. Absent in records of earlier versions.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub key_type: Option<KeyType>,
    /// The user of a Personal key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The creator of the ApiKey, which a restore keeps. A Secret left by an ApiKey with the same name and another
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
        self.namespace == other.namespace && self.secret == other.secret && self.api_key == other.api_key
    }

    /// Whether both are equal except for the uid, which a restore changes.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let uid = other.uid.clone();
        Self { uid, ..self.clone() } == *other
    }
}

/// The key in a Secret's data that holds a sealed value.
pub const SEALED_VALUE: &str = "sealed-value";

/// The key in a Secret's data that holds a claimed value, encrypted to the recipient, until it is delivered.
pub const CLAIMED: &str = "claimed";

/// The state of a sealed value.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Sealed {
    /// Whether the value can be revealed once or several times.
    pub mode: RevealMode,
    /// Whether the Secret also holds a plain copy for workloads.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// The first granted reveal. Under one-time reveal, it removes the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// The time at which the operator erased the value because it was not revealed in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub erased_at: Option<Timestamp>,
}

/// The first granted reveal of a value.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// The uid of the KeyReveal. Empty if the claim is known only from the status, which has no field for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The user who revealed the value.
    pub by: String,
    /// The time of the claim.
    pub at: Timestamp,
}

/// One value, by its digest.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// SHA-256 of the value, 64 hex digits.
    pub sha256: String,
    /// The time at which it was minted.
    pub minted_at: Timestamp,
    /// The number of the value among the values of its key. It starts at 1 and only increases. 0 in records of earlier
    /// versions.
    #[serde(default)]
    pub generation: i64,
}

/// A replaced value that works until the end of its overlap.
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
