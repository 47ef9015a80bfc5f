use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// docs/specification.md, "Access policies".
/// The access of users to the keys that refer to this policy.
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
    doc = "An access policy: it limits which users may view and manage the ApiKeys that refer to it, in addition to the role-based rights that they need anyway.",
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
        .message("an Advanced policy needs the access of users that no rule covers: set generalAccess to Manage, Read or NoAccess")
        .field_path(".generalAccess")
        .reason(Reason::FieldValueRequired),
)]
pub struct AccessPolicySpec {
    /// Private: only the creator of a key may view and manage it, and only the creator of the policy may change the
    /// policy. Advanced: rules and generalAccess apply.
    pub mode: AccessMode,

    /// Access by group, for mode Advanced; at most 64 rules. A NoAccess rule that matches wins; otherwise the highest
    /// level that matches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub rules: Vec<AccessRule>,

    /// Access to the keys for every user that no rule covers. Required for mode Advanced, forbidden for Private.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub general_access: Option<AccessLevel>,

    /// Access to the policy itself for every user that no rule covers. Absent means the same as generalAccess.
    /// Forbidden for mode Private.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub general_policy_access: Option<AccessLevel>,
}

/// The mode of a policy.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// Only the creator has access.
    Private,
    /// Rules by group and general access apply.
    Advanced,
}

/// The access of groups.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// The groups that this rule covers, by the names that the cluster authenticates; 1 to 64.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(256)))]
    pub groups: Vec<String>,
    /// Access to the keys: Manage, Read or NoAccess.
    pub access: AccessLevel,
    /// Access to the policy itself. Absent means the same as access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AccessLevel")]
    pub policy_access: Option<AccessLevel>,
}

/// A level of access.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccessLevel {
    /// No access.
    NoAccess,
    /// View.
    Read,
    /// View and change.
    Manage,
}

/// The observed state of an AccessPolicy. Only the operator writes it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicyStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Accepted: the policy is in force. Ready: the same. Unmanageable is present, and True, while no group may change
    /// the policy. Then only holders of access-policies:UpdateAll can, and the creator of a Private policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The number of ApiKeys that refer to this policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_count: Option<i64>,

    /// The names of the ApiKeys that refer to this policy, sorted; at most the first 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "atomic"))]
    pub keys: Vec<String>,

    /// The groups without access to these keys, by a NoAccess rule. An asterisk stands for every user that no rule
    /// covers; in a Private policy, for every user but the creator of the key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub locked_out: Vec<String>,
}
