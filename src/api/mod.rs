//! The custom resources of group `keywright.dev`, version `v1alpha1`.
//!
//! Types only: serde, schemars and the kube derive, no logic. Doc comments of fields become the text of `kubectl
//! explain`. CEL rules here check one object alone; rules that need the catalog or other objects are in
//! [`crate::domain`]. No field has a default, so that the cluster stores exactly the spec that the user wrote and
//! GitOps tools show no difference.

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

/// The annotation with the name of the user who created an object. The mutating webhook sets it at creation; requests
/// that choose or change it are rejected.
pub const CREATOR_ANNOTATION: &str = "keywright.dev/creator";

/// The annotation with the name of the user who restored an ApiKey, that is, created it with an existing
/// [`CREATOR_ANNOTATION`]. The mutating webhook sets it; it is absent from every other ApiKey, and requests that choose
/// or change it are rejected.
pub const RESTORED_BY_ANNOTATION: &str = "keywright.dev/restored-by";

/// The annotation of an ApiKey with the digest of the value that the operator accepts from a Secret that it can't
/// authenticate: `sha256:` and 64 lower case hex digits. Adding or changing it requires the right to restore keys;
/// removing it requires only the right to change the key.
pub const ACCEPT_SECRET_ANNOTATION: &str = "keywright.dev/accept-secret";

/// A CEL rule for texts that are shown on one line. Control characters, line ends and characters that change the
/// direction of text could make one line resemble another. The API server does not apply the rule to values stored
/// before it.
const LINE_RULE: &str = r"!self.matches(r'[\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]')";

/// The message of [`LINE_RULE`].
const LINE_MESSAGE: &str =
    "must not have control characters, line ends or characters that change the direction of text";

/// Like [`LINE_RULE`], for a text of several lines.
const TEXT_RULE: &str = r"!self.matches(r'[\x{0}-\x{9}\x{B}-\x{1F}\x{7F}-\x{9F}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]')";

/// The message of [`TEXT_RULE`].
const TEXT_MESSAGE: &str =
    "must not have control characters other than line feeds, nor characters that change the direction of text";

/// [`LINE_RULE`] as a pattern, for lists in lists: the cost limit of the API server allows no CEL rule on so many
/// texts.
const LINE_PATTERN: &str = r"^[^\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]*$";

/// The schema of an entry of a list of names with at most `max_length` characters.
fn name_item(max_length: u32) -> serde_json::Value {
    let rules = serde_json::json!([{"rule": LINE_RULE, "message": LINE_MESSAGE}]);
    serde_json::json!({"type": "string", "minLength": 1, "maxLength": max_length, "x-kubernetes-validations": rules})
}

/// Returns the user who created an object, from [`CREATOR_ANNOTATION`].
#[must_use]
pub fn creator(object: &impl kube::ResourceExt) -> Option<Creator> {
    let name = object.annotations().get(CREATOR_ANNOTATION)?.clone();
    let kind = if name.starts_with("system:serviceaccount:") { CreatorKind::ServiceAccount } else { CreatorKind::User };
    Some(Creator { name, kind })
}

/// Returns the user who created a key: from its status, or from [`CREATOR_ANNOTATION`] while the status has no creator.
#[must_use]
pub fn creator_of_key(key: &ApiKey) -> Option<Creator> {
    key.status.as_ref().and_then(|status| status.creator.clone()).or_else(|| creator(key))
}

/// Returns every CRD of the group, in the order of the chart.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![ApiKey::crd(), AccessPolicy::crd(), KeyReveal::crd(), PermissionCatalog::crd(), SecuritySettings::crd()]
}
