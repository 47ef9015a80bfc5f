use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LegacyKind;

/// Permissions, presets, roles and legacy roles that keys may carry. Several catalogues merge.
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
    doc = "The permissions, presets and roles that ApiKeys may carry. All catalogues of the cluster merge; where two contradict each other, the older one holds and the younger one says so in its conditions.",
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
    /// What this catalogue describes and where its facts come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    #[x_kube(validation = Rule::new(super::TEXT_RULE).message(super::TEXT_MESSAGE))]
    pub description: Option<String>,

    /// The permissions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub permissions: Vec<CatalogPermission>,

    /// The presets: named groups of permissions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub presets: Vec<CatalogPreset>,

    /// The system roles of people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub roles: Vec<CatalogRole>,

    /// The roles of legacy keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["name"]))]
    pub legacy_roles: Vec<LegacyRole>,
}

/// How well a fact is known.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// A source states it.
    Documented,
    /// A guess from names and patterns; no source states it.
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
    /// Nobody checked.
    Unverified,
    /// Not known.
    Unknown,
}

/// Where a permission applies.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CatalogLevel {
    /// Inside one team.
    Team,
    /// Across the organisation.
    Organization,
}

/// One permission.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogPermission {
    /// resource:Action, in the spelling that Keywright shows. Upper and lower case are the same.
    #[schemars(
        length(min = 3, max = 128),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._#-]*:[A-Za-z0-9][A-Za-z0-9._#-]*$")
    )]
    pub name: String,

    /// What it allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// The group under which it is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub group: Option<String>,

    /// The number that the described system gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<i64>,

    /// Whether it only sends data. SendYourData keys may carry ingestion permissions alone. Absent means false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingestion: Option<bool>,

    /// Whether the described system hides it in lists. Absent means false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<bool>,

    /// Where it applies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub levels: Vec<CatalogLevel>,

    /// How well it is known which roles hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub roles_evidence: Option<Evidence>,

    /// The sources for it, for its roles included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 512), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub sources: Vec<String>,
}

/// One preset: a named group of permissions.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogPreset {
    /// The name, in the spelling that Keywright shows. Upper and lower case are the same.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub name: String,

    /// What it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// Whether a key that has this preset may have nothing else. Absent means false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standalone: Option<bool>,

    /// What a key with this preset may do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// How well the list of permissions is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub evidence: Option<Evidence>,

    /// How complete the list of permissions is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Completeness")]
    pub completeness: Option<Completeness>,

    /// Those of permissions that are inferred, where evidence is Mixed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub inferred: Vec<String>,

    /// Permissions that may belong here and are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub uncertain: Vec<String>,

    /// Permissions that the described system gives to people under this preset, and not to keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub people_permissions: Vec<String>,

    /// What else to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub note: Option<String>,

    /// The sources for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 512), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub sources: Vec<String>,
}

/// One system role of people.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CatalogRole {
    /// The name.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,

    /// What it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub description: Option<String>,

    /// How well it is known, where that differs from what the two lists below say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub evidence: Option<Evidence>,

    /// Permissions that a source states for this role.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub documented_permissions: Vec<String>,

    /// Permissions that are guessed for this role from names and groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub inferred_permissions: Vec<String>,
}

/// One role of legacy keys.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LegacyRole {
    /// The name.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,

    /// What a legacy key with this role may do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 3, max = 128), regex(pattern = super::LINE_PATTERN)), extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// The kind of legacy key that has this role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "LegacyKind")]
    pub legacy_kind: Option<LegacyKind>,

    /// The legacy key that has this role, in the words of the described system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub legacy_key: Option<String>,

    /// How well the pairing of key and role is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Evidence")]
    pub legacy_key_evidence: Option<Evidence>,
}

/// What the cluster makes of a catalogue. Written by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct PermissionCatalogStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Accepted: every entry is in force. False with reason Conflict: some entries contradict an older catalogue
    /// and have no effect. False with reason Invalid: some entries are not well formed and have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// How many permissions this catalogue has in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permissions: Option<i64>,

    /// How many presets this catalogue has in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presets: Option<i64>,
}
