use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// Seed, "Security".
/// The settings of a team: one object a namespace, named default.
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
    doc = "The API key security settings of a namespace: whether values can be seen once only, limits for keys, and the groups that may not see Team keys.",
    printcolumn(name = "One-Time Reveal", type_ = "boolean", json_path = ".spec.oneTimeReveal"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name == 'default'")
        .message("a namespace has one SecuritySettings: name it default")
)]
#[serde(rename_all = "camelCase")]
pub struct SecuritySettingsSpec {
    /// Whether the value of a key can be seen only once. Applies to keys created afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_reveal: Option<bool>,

    /// Whether keys under one-time reveal are also written to a plain Secret for workloads. Absent means Deny. Never
    /// applies to Personal keys, which are for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "WorkloadSecrets")]
    pub workload_secrets: Option<WorkloadSecrets>,

    /// Erase a sealed value that nobody revealed within this time from when it was minted, as a duration such as 168h.
    /// Absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub erase_unrevealed_after: Option<String>,

    /// Limits for every key of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,

    /// Groups whose members see only part of the data, and so may neither create nor view Team keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(256)))]
    pub data_scoped_groups: Vec<String>,
}

/// Whether plain Secrets are written under one-time reveal.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadSecrets {
    /// A plain Secret is written as well.
    Allow,
    /// No plain Secret is written.
    Deny,
}

/// Limits that an organisation sets for its keys.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// The longest time from creation to expiry, as a duration such as 2160h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub max_lifetime: Option<String>,

    /// Whether every key must have expiresAt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require_expiry: Option<bool>,

    /// The longest rotation.every allowed, as a duration such as 720h; at least 1m. Setting it requires rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(
        validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"),
        validation = Rule::new(LEAST_RULE).message("must be at least 1m, which is the least rotation.every"),
    )]
    pub max_rotation_interval: Option<String>,

    /// Whether a change that adds presets or permissions to a key must also set a new rotation.requestedAt, so that
    /// whoever saw the value before does not get what was added. Until the overlap of that rotation ends, the value
    /// before carries it too: set rotation.overlap to 0s in the same change to prevent that. What a catalogue adds to a
    /// preset is no change of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require_rotation_on_raise: Option<bool>,

    /// How many ApiKeys the namespace may have. Checked when one is created; existing ones stay. Keys that are created at
    /// the same moment may exceed it by a few, since each replica of the webhook counts what it has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_keys: Option<i32>,

    /// Deactivate a key that was not used for this long, as a duration such as 2160h. Counts from the last use that a
    /// verifier reported, or from the last rotation if that is later; a key without any reported use stays active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"))]
    pub deactivate_unused_after: Option<String>,
}

const DURATION_RULE: &str = "self.matches('^([0-9]{1,5}(h|m|s)){1,3}$')";
const LEAST_RULE: &str = "!self.matches('^([0-9]{1,5}(h|m|s)){1,3}$') || duration(self) >= duration('1m')";
