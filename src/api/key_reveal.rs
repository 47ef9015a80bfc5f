use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// docs/specification.md, "Actions" (view, copy) and "Security settings" (one-time reveal). The shape follows
// CertificateSigningRequest.
/// The request to reveal the value of an ApiKey. Immutable.
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
    doc = "One request to reveal the value of an ApiKey. The answer is encrypted to the recipient alone. The request is deleted ten minutes after its creation. kubectl keywright reveal creates one with a one-off key.",
    printcolumn(name = "Key", type_ = "string", json_path = ".spec.apiKeyRef.name"),
    printcolumn(name = "Requester", type_ = "string", json_path = ".spec.requester.username"),
    printcolumn(name = "Granted", type_ = "string", json_path = r#".status.conditions[?(@.type=="Granted")].status"#),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Granted")].reason"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("a KeyReveal is immutable: create another"),
)]
pub struct KeyRevealSpec {
    /// The ApiKey whose value is requested.
    pub api_key_ref: ApiKeyRef,

    /// The key that the answer is encrypted to: an age recipient (age1...) or an SSH public key (ssh-ed25519 or
    /// ssh-rsa).
    #[schemars(length(min = 1, max = 4096))]
    #[x_kube(validation = Rule::new("self.startsWith('age1') || self.startsWith('ssh-ed25519 ') || self.startsWith('ssh-rsa ')")
        .message("must be an age recipient (age1...) or an SSH public key (ssh-ed25519 ... or ssh-rsa ...)"))]
    pub recipient: String,

    /// The user who created the request, as the cluster authenticated that user. The mutating webhook sets it and
    /// overwrites a value in the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requester: Option<Requester>,
}

/// A reference to an ApiKey in the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ApiKeyRef {
    /// The name of the ApiKey.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,
}

/// A user, as the cluster authenticated that user.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Requester {
    /// The user name.
    pub username: String,
    /// The unique id of the user, if the cluster has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The groups of the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub groups: Vec<String>,
    /// Further attributes that the authenticator provides.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The answer to a KeyReveal. Only the operator writes it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct KeyRevealStatus {
    /// Granted: True once ciphertext holds the value; False if the request was denied; Unknown while a failed request
    /// to the API server is repeated. Reason and message state the problem and the fix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The value, encrypted to spec.recipient: an age file in ASCII armor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ciphertext: Option<String>,

    /// The id of the value: key_ and the first 16 hex digits of its SHA-256 digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,

    /// Whether the value can be revealed only once. True means that this answer is the only copy of the sealed value in
    /// the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time: Option<bool>,

    /// The time at which this request is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
}
