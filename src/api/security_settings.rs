use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// docs/specification.md, "Security settings".
/// The API key security settings of a team.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
#[kube(
    group = "keywright.dev",
    version = "v1alpha1",
    kind = "SecuritySettings",
    plural = "securitysettings",
    shortname = "akss",
    category = "keywright",
    namespaced,
    derive = "PartialEq",
    doc = "The API key security settings of a namespace: one-time reveal of values, limits for keys, and the groups that can't use Team keys. The only object of a namespace is named default.",
    printcolumn(name = "One-Time Reveal", type_ = "boolean", json_path = ".spec.oneTimeReveal"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name == 'default'")
        .message("a namespace has one SecuritySettings: name it default")
)]
#[serde(rename_all = "camelCase")]
pub struct SecuritySettingsSpec {
    /// Whether the value of a key can be revealed only once. Absent means false. Applies to keys created afterwards; a
    /// rotation keeps the mode of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_reveal: Option<bool>,

    /// Whether the value of a key under one-time reveal is also written in plain to its Secret, for workloads. Absent
    /// means Deny. Applies to keys created afterwards, and never to Personal keys, whose values are for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "WorkloadSecrets")]
    pub workload_secrets: Option<WorkloadSecrets>,

    /// The time after minting at which a sealed value that was not revealed is erased, as a duration such as 168h.
    /// Absent means never. An erased value can't be restored; request a rotation to mint a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub erase_unrevealed_after: Option<String>,

    /// Limits for the keys of the namespace. Absent means none. A key is checked when it is created or changed; a key
    /// that violated a limit before may stay as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,

    /// Groups whose members see only part of the data; at most 128. Their members can't create, reactivate,
    /// extend, rotate or reveal Team keys, nor add rights to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(256)))]
    pub data_scoped_groups: Vec<String>,
}

/// Whether values under one-time reveal are also written in plain.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadSecrets {
    /// The value is also written in plain.
    Allow,
    /// Only the sealed value is written.
    Deny,
}

/// Limits for the keys of a namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// The longest time from the creation of a key to expiresAt, as a duration such as 2160h. If set, every key must
    /// have expiresAt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub max_lifetime: Option<String>,

    /// Whether every key must have expiresAt. Absent means false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require_expiry: Option<bool>,

    /// The longest rotation.every, as a duration such as 720h; at least 1m. If set, every key but a legacy key must
    /// have rotation.every.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(
        validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"),
        validation = Rule::new(MINIMUM_RULE).message("must be at least 1m, the minimum of rotation.every"),
    )]
    pub max_rotation_interval: Option<String>,

    /// Whether a change that adds presets or permissions to a key must also set a new rotation.requestedAt, so that
    /// users who saw the previous value do not get the added rights. Absent means false. The previous value has the
    /// added rights too until its overlap ends; to prevent that, set rotation.overlap to 0s in the same change.
    /// Permissions that a PermissionCatalog adds to a preset are not a change of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require_rotation_on_raise: Option<bool>,

    /// The number of ApiKeys that the namespace may have. It is checked when a key is created; existing keys stay. Keys
    /// that are created at the same moment may exceed it by a few, since each replica of the webhook counts the keys
    /// that it has received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_keys: Option<i32>,

    /// The time after which an unused key is deactivated, as a duration such as 2160h. It counts from the last use that
    /// a verifier reported, or from the last rotation if that is later. A key without any reported use stays active.
    /// Absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub deactivate_unused_after: Option<String>,
}

const DURATION_RULE: &str = "self.matches('^([0-9]{1,5}(h|m|s)){1,3}$')";
const MINIMUM_RULE: &str = "!self.matches('^([0-9]{1,5}(h|m|s)){1,3}$') || duration(self) >= duration('1m')";
