use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LegacyKind;

/// The permissions, presets, roles and legacy roles of this catalog.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
#[kube(
    group = "keywright.dev",
    version = "v1alpha1",
    kind = "PermissionCatalog",
    plural = "permissioncatalogs",
    shortname = "akcat",
    category = "keywright",
    status = "PermissionCatalogStatus",
    derive = "PartialEq",
    doc = "The permissions and presets that ApiKeys may carry, and the roles of users. All catalogs of the cluster merge. Where two contradict each other, the older one applies and a condition of the younger one lists the conflicts.",
    printcolumn(name = "Permissions", type_ = "integer", json_path = ".status.permissions"),
    printcolumn(name = "Presets", type_ = "integer", json_path = ".status.presets"),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Accepted")].status"#
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct PermissionCatalogSpec {
    /// The subject of this catalog and the sources of its facts. For information only; at most 4096 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    #[x_kube(validation = Rule::new(super::TEXT_RULE).message(super::TEXT_MESSAGE))]
    pub description: Option<String>,

    /// The permissions that this catalog defines; at most 2000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub permissions: Vec<CatalogPermission>,

    /// The presets that this catalog defines: named groups of permissions; at most 500.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub presets: Vec<CatalogPreset>,

    /// The system roles of users; at most 100. The command keywright cluster-roles prints a ClusterRole for each; the
    /// operator ignores them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub roles: Vec<CatalogRole>,

    /// The permissions of legacy keys, by kind; at most 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub legacy_roles: Vec<LegacyRole>,
}

/// The evidence for a fact.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// A source states it.
    Documented,
    /// Derived from names and patterns; no source states it.
    Inferred,
    /// Partly documented, partly inferred; the entry lists which.
    Mixed,
    /// Not known.
    Unknown,
}

/// How complete a list is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Completeness {
    /// Probably complete.
    Likely,
    /// Known to be incomplete.
    Partial,
    /// Not checked.
    Unverified,
    /// Not known.
    Unknown,
}

/// The scope of a permission.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CatalogLevel {
    /// Inside one team.
    Team,
    /// Across the organization.
    Organization,
}

/// A permission.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogPermission {
    /// The name, in the form resource:Action and in the spelling that Keywright shows; at most 128 characters. Names
    /// are not case-sensitive.
    #[schemars(
        length(min = 3, max = 128),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._#-]*:[A-Za-z0-9][A-Za-z0-9._#-]*$")
    )]
    pub name: String,

    /// The operations that the permission allows. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// The group that the permission is listed under. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub group: Option<String>,

    /// The number of the permission in the described system. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<i64>,

    /// Whether the permission only sends data. SendYourData keys may carry only ingestion permissions. Absent means
    /// false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingestion: Option<bool>,

    /// Whether the described system hides the permission in lists. Absent means false. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<bool>,

    /// The levels that the permission applies to: Team, Organization or both. For information only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub levels: Vec<CatalogLevel>,

    /// The evidence for the roles that hold the permission. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub roles_evidence: Option<Evidence>,

    /// The sources for the permission and its roles; at most 16. For information only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 512), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub sources: Vec<String>,
}

/// A preset: a named group of permissions.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogPreset {
    /// The name, in the spelling that Keywright shows; at most 128 characters. Names are not case-sensitive.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub name: String,

    /// The purpose of the preset. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// Whether a key with this preset can't have another preset or permission. Absent means false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standalone: Option<bool>,

    /// The permissions that the preset grants to a key; at most 1000. Names that no catalog defines have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// The evidence for the list of permissions. A key with a preset that is Inferred is accepted with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub evidence: Option<Evidence>,

    /// How complete the list of permissions is. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Completeness")]
    pub completeness: Option<Completeness>,

    /// The entries of permissions that are inferred, where evidence is Mixed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub inferred: Vec<String>,

    /// Permissions that may belong to the preset and are left out. For information only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub uncertain: Vec<String>,

    /// Permissions that the described system gives to users under this preset, and not to keys. The ClusterRole of the
    /// preset grants them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub people_permissions: Vec<String>,

    /// Further remarks. For information only; at most 1024 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub note: Option<String>,

    /// The sources for the preset; at most 16. For information only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 512), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub sources: Vec<String>,
}

/// A system role of users.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogRole {
    /// The name of the role; at most 128 characters.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,

    /// The purpose of the role. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// The evidence for the role as a whole, where it differs from that of the two lists below. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub evidence: Option<Evidence>,

    /// The permissions that a source states for this role; at most 2000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub documented_permissions: Vec<String>,

    /// The permissions that are inferred for this role from names and groups; at most 2000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub inferred_permissions: Vec<String>,
}

/// The permissions of one kind of legacy key.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LegacyRole {
    /// The name of the legacy role; at most 128 characters.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,

    /// The permissions of legacy keys with this role; at most 1000. Names that no catalog defines have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// The kind of legacy key that has this role. Absent means that the role has no effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "LegacyKind")]
    pub legacy_kind: Option<LegacyKind>,

    /// The name of the legacy key that has this role in the described system. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub legacy_key: Option<String>,

    /// The evidence for the pairing of key and role. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub legacy_key_evidence: Option<Evidence>,
}

/// The observed state of a PermissionCatalog. Only the operator writes it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct PermissionCatalogStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Accepted: every entry is in force. False with reason Conflict: some entries contradict an older catalog and have
    /// no effect. False with reason Invalid: some entries are invalid and have no effect. Ready: the same as Accepted.
    /// Stalled is present only while they are False.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The number of permissions of this catalog that are in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permissions: Option<i64>,

    /// The number of presets of this catalog that are in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presets: Option<i64>,
}
