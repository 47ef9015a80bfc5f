//! The record: what the Secret itself says of the key, beside the value.
//!
//! It is written in the same request as the value, so it can't disagree with it, and it is all that is needed to
//! rebuild the status of an ApiKey after a crash, a lost status or a restored backup. It holds no value.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

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
    /// The labels and annotations that come from `spec.secret`, so that those taken out there are taken out here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// See `labels`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<String>,
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
