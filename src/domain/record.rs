//! The record: what the Secret itself says of the key, beside the value.
//!
//! It is written in the same request as the value, so it can't disagree with it, and it is all that is needed to
//! rebuild the status of an ApiKey after a crash, a lost status or a restored backup. It holds no value.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::RevealMode;

/// The annotation that holds the record, as JSON.
pub const ANNOTATION: &str = "keywright.dev/record";

/// The type of every Secret that Keywright writes. It never depends on user input, so that no ApiKey can make a
/// Secret that means something to another controller (CVE-2026-42876 of a peer).
pub const SECRET_TYPE: &str = "keywright.dev/api-key";

/// What a Secret says of its key.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The name of the ApiKey. Its namespace is the Secret's own.
    pub api_key: String,
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
