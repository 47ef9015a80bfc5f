//! The custom resources of group `keywright.dev`, version `v1alpha1`.
//!
//! Types only: serde, schemars and the kube derive, no logic. Field documentation is the user manual,
//! since it becomes the text of `kubectl explain`. CEL rules here hold what one object shows alone; what
//! needs the catalogue or other objects is in [`crate::domain`]. No field has a default, so that what a
//! user wrote is what the cluster stores and GitOps tools see no difference.

mod access_policy;
mod api_key;
mod permission_catalog;
mod security_settings;

pub use access_policy::{AccessLevel, AccessMode, AccessPolicy, AccessPolicySpec, AccessRule};
pub use api_key::{
    AccessPolicyRef, ApiKey, ApiKeySpec, ApiKeyStatus, KeyState, KeyType, Rotation, SecretRef, SecretTemplate, Token,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResourceExt;
pub use permission_catalog::{
    CatalogLevel, CatalogPermission, CatalogPreset, CatalogRole, Completeness, Evidence, LegacyRole, PermissionCatalog,
    PermissionCatalogSpec, PermissionCatalogStatus,
};
pub use security_settings::{Limits, SecuritySettings, SecuritySettingsSpec, WorkloadSecrets};

/// The API group of every resource here, and the prefix of every label and annotation that Keywright writes.
pub const GROUP: &str = "keywright.dev";

/// Every CRD of the group, in the order in which they are shipped.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![ApiKey::crd(), AccessPolicy::crd(), PermissionCatalog::crd(), SecuritySettings::crd()]
}
