use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// Seed, "Actions" (view, copy) and "Security" (one-time opportunity). Shaped like a CertificateSigningRequest.
/// One request to see the value of a key.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "keywright.dev",
    version = "v1alpha1",
    kind = "KeyReveal",
    plural = "keyreveals",
    shortname = "akr",
    category = "keywright",
    namespaced,
    status = "KeyRevealStatus",
    derive = "PartialEq",
    doc = "One request to see the value of an ApiKey. The answer is encrypted to the requester alone, and the request is deleted ten minutes after it was made. kubectl keywright reveal makes one with a key of its own.",
    printcolumn(name = "Key", type_ = "string", json_path = ".spec.apiKeyRef.name"),
    printcolumn(name = "Requester", type_ = "string", json_path = ".spec.requester.username"),
    printcolumn(name = "Granted", type_ = "string", json_path = r#".status.conditions[?(@.type=="Granted")].status"#),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Granted")].reason"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("a request can't be changed: make another"),
)]
pub struct KeyRevealSpec {
    /// The key whose value is asked for.
    pub api_key_ref: ApiKeyRef,

    /// To whom the answer is encrypted: an age recipient (age1...) or an SSH public key (ssh-ed25519 or ssh-rsa).
    #[schemars(length(min = 1, max = 4096))]
    #[x_kube(validation = Rule::new("self.startsWith('age1') || self.startsWith('ssh-ed25519 ') || self.startsWith('ssh-rsa ')")
        .message("must be an age recipient (age1...) or an SSH public key (ssh-ed25519 ... or ssh-rsa ...)"))]
    pub recipient: String,

    /// Who asks, as the cluster authenticated that user. Filled in by the cluster; what a request says here is
    /// written over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requester: Option<Requester>,
}

/// Names an ApiKey in the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ApiKeyRef {
    /// The name of the ApiKey.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,
}

/// A user, as the cluster authenticated it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Requester {
    /// The user name.
    pub username: String,
    /// The user's unique id, if the cluster has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The groups of the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub groups: Vec<String>,
    /// What else authentication says of the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The answer. Written by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct KeyRevealStatus {
    /// Granted: True once ciphertext holds the value, False if the request was denied; the reason and the message
    /// say why, and what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The value, encrypted to spec.recipient, in the ASCII armor of age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ciphertext: Option<String>,

    /// The id of the value: key_ and the first 16 hex digits of its SHA-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,

    /// Whether the value could be seen once only. True means that this answer is its last copy in the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time: Option<bool>,

    /// When this request is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
}
