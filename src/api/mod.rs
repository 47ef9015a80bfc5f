//! The custom resources of group `keywright.dev`, version `v1alpha1`.
//!
//! Types only: serde, schemars and the kube derive, no logic. Field documentation is the user manual,
//! since it becomes the text of `kubectl explain`. CEL rules here hold what one object shows alone; what
//! needs the catalogue or other objects is in [`crate::domain`]. No field has a default, so that what a
//! user wrote is what the cluster stores and GitOps tools see no difference.

mod access_policy;
mod api_key;
mod key_reveal;
mod permission_catalog;
mod security_settings;

pub use access_policy::{AccessLevel, AccessMode, AccessPolicy, AccessPolicySpec, AccessPolicyStatus, AccessRule};
pub use api_key::{
    AccessPolicyRef, ApiKey, ApiKeySpec, ApiKeyStatus, Creator, CreatorKind, KeyState, KeyType, LegacyKind, Reveal,
    RevealMode, RevealState, Rotation, SecretRef, SecretTemplate, Token,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
pub use key_reveal::{ApiKeyRef, KeyReveal, KeyRevealSpec, KeyRevealStatus, Requester};
use kube::CustomResourceExt;
pub use permission_catalog::{
    CatalogLevel, CatalogPermission, CatalogPreset, CatalogRole, Completeness, Evidence, LegacyRole, PermissionCatalog,
    PermissionCatalogSpec, PermissionCatalogStatus,
};
pub use security_settings::{Limits, SecuritySettings, SecuritySettingsSpec, WorkloadSecrets};

/// The API group of every resource here, and the prefix of every label and annotation that Keywright writes.
pub const GROUP: &str = "keywright.dev";

/// The annotation in which the cluster stamps the name of the user who created an object. It is written when the object
/// is created, and nobody can choose or change it.
pub const CREATOR_ANNOTATION: &str = "keywright.dev/creator";

/// The annotation in which the cluster stamps the name of the user who created an ApiKey whose creator was kept, as a
/// restore does. It is absent from every other ApiKey, and nobody can choose or change it.
pub const RESTORED_BY_ANNOTATION: &str = "keywright.dev/restored-by";

/// The annotation of an ApiKey with the digest of the value that the operator shall accept from a Secret that it can't
/// authenticate: `sha256:` and 64 lower case hex digits. Adding or changing it needs the right to restore keys; whoever
/// may change the key may remove it.
pub const ACCEPT_SECRET_ANNOTATION: &str = "keywright.dev/accept-secret";
/// A CEL rule for texts that are shown in one line: control characters, line ends and characters that change the direction
/// of text could make a line look like another. The API server leaves alone what was stored before the rule.
const LINE_RULE: &str = r"!self.matches(r'[\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]')";

/// The message of [`LINE_RULE`].
const LINE_MESSAGE: &str =
    "must not have control characters, line ends or characters that change the direction of text";

/// As [`LINE_RULE`], for a text of several lines.
const TEXT_RULE: &str = r"!self.matches(r'[\x{0}-\x{9}\x{B}-\x{1F}\x{7F}-\x{9F}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]')";

/// The message of [`TEXT_RULE`].
const TEXT_MESSAGE: &str =
    "must not have control characters other than line feeds, nor characters that change the direction of text";

/// [`LINE_RULE`] as a pattern, for lists in lists: the API server allows no CEL rule on so many texts.
const LINE_PATTERN: &str = r"^[^\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]*$";

/// The schema of an entry of a list of names.
fn name_item(longest: u32) -> serde_json::Value {
    let rules = serde_json::json!([{"rule": LINE_RULE, "message": LINE_MESSAGE}]);
    serde_json::json!({"type": "string", "minLength": 1, "maxLength": longest, "x-kubernetes-validations": rules})
}

/// Who created an object, as the cluster stamped it.
#[must_use]
pub fn creator(object: &impl kube::ResourceExt) -> Option<Creator> {
    let name = object.annotations().get(CREATOR_ANNOTATION)?.clone();
    let kind = if name.starts_with("system:serviceaccount:") { CreatorKind::ServiceAccount } else { CreatorKind::User };
    Some(Creator { name, kind })
}

/// Who created a key: as its status says, or before there is one, as it was stamped.
#[must_use]
pub fn creator_of_key(key: &ApiKey) -> Option<Creator> {
    key.status.as_ref().and_then(|status| status.creator.clone()).or_else(|| creator(key))
}

/// Every CRD of the group, in the order in which they are shipped.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![ApiKey::crd(), AccessPolicy::crd(), KeyReveal::crd(), PermissionCatalog::crd(), SecuritySettings::crd()]
}
