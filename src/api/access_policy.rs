use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// Seed, "Access policies for API keys".
/// Who may view and manage the keys that refer to this policy.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "keywright.dev",
    version = "v1alpha1",
    kind = "AccessPolicy",
    plural = "accesspolicies",
    shortname = "akp",
    category = "keywright",
    namespaced,
    status = "AccessPolicyStatus",
    derive = "PartialEq",
    doc = "Who may view and manage the ApiKeys that refer to it, in addition to the role-based rights that they need anyway.",
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "General Access", type_ = "string", json_path = ".spec.generalAccess"),
    printcolumn(name = "Keys", type_ = "integer", json_path = ".status.keyCount"),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Accepted")].status"#
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.mode == 'Advanced' || !has(self.rules) && !has(self.generalAccess) && !has(self.generalPolicyAccess)")
        .message("a Private policy has no further settings: remove rules, generalAccess and generalPolicyAccess, or set mode to Advanced"),
    validation = Rule::new("self.mode == 'Private' || has(self.generalAccess)")
        .message("an Advanced policy says what everyone else may do: set generalAccess to Manage, Read or NoAccess")
        .field_path(".generalAccess")
        .reason(Reason::FieldValueRequired),
)]
pub struct AccessPolicySpec {
    /// Private: only the creator of a key may view and manage it, and only the creator of the policy may change the
    /// policy. Advanced: rules and generalAccess decide.
    pub mode: AccessMode,

    /// Access by group. A NoAccess rule that matches wins; otherwise the highest level that matches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub rules: Vec<AccessRule>,

    /// Access to the keys for everyone whom no rule covers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub general_access: Option<AccessLevel>,

    /// Access to the policy itself for everyone whom no rule covers. Absent means generalAccess.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub general_policy_access: Option<AccessLevel>,
}

/// Who decides.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// Only the creator of a key.
    Private,
    /// Rules by group, and general access.
    Advanced,
}

/// What a group may do.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// The groups that this rule covers, as the cluster authenticates them.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(256)))]
    pub groups: Vec<String>,
    /// Access to the keys.
    pub access: AccessLevel,
    /// Access to the policy itself. Absent means the same as access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub policy_access: Option<AccessLevel>,
}

/// How much a subject may do.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccessLevel {
    /// Nothing.
    NoAccess,
    /// View.
    Read,
    /// View and change.
    Manage,
}

/// What the cluster makes of a policy. Written by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicyStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Accepted: the policy is in force. Ready: the same. Unmanageable is present, and True, while no group may
    /// change the policy, so that only its creator or a holder of access-policies:UpdateAll can.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// How many ApiKeys refer to this policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_count: Option<i64>,

    /// The names of the ApiKeys that refer to this policy, in order; at most the first hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "atomic"))]
    pub keys: Vec<String>,

    /// The groups that are locked out of these keys by a NoAccess rule. An asterisk stands for everyone whom no rule
    /// covers; in a Private policy, for everyone but the creator of the key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub locked_out: Vec<String>,
}
