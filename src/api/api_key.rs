use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// Seed, "Create an API key": a recognizable name, a type, presets or permissions or both.
/// The key that a team asks for.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "keywright.dev",
    version = "v1alpha1",
    kind = "ApiKey",
    plural = "apikeys",
    shortname = "ak",
    category = "keywright",
    namespaced,
    status = "ApiKeyStatus",
    derive = "PartialEq",
    doc = "An API key. Keywright mints its value once, writes it to a Secret that this object owns, and keeps only the SHA-256 digest in the status.",
    selectable = ".spec.type",
    selectable = ".spec.user",
    selectable = ".status.state",
    selectable = ".status.id",
    printcolumn(name = "Display Name", type_ = "string", json_path = ".spec.displayName"),
    printcolumn(name = "Type", type_ = "string", json_path = ".spec.type"),
    printcolumn(name = "Creator", type_ = "string", json_path = ".status.creator.name"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".spec.expiresAt", priority = 1),
    printcolumn(name = "Last Used", type_ = "date", json_path = ".status.lastUsedAt", priority = 1),
    printcolumn(name = "Creator Type", type_ = "string", json_path = ".status.creator.kind", priority = 1),
    printcolumn(name = "Next Rotation", type_ = "string", json_path = ".status.nextRotationAt", priority = 1),
    printcolumn(name = "Secret", type_ = "string", json_path = ".status.secretRef.name", priority = 1),
    printcolumn(name = "Id", type_ = "string", json_path = ".status.id", priority = 1),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        priority = 1
    ),
    validation = Rule::new("has(self.spec.secret) && has(self.spec.secret.name) || size(self.metadata.name) <= 246")
        .message("the name is too long for the default Secret name <name>-secret: use at most 246 characters, or set spec.secret.name"),
    validation = Rule::new(
        "(has(self.spec.secret) && has(self.spec.secret.name) ? self.spec.secret.name : self.metadata.name + '-secret') == (has(oldSelf.spec.secret) && has(oldSelf.spec.secret.name) ? oldSelf.spec.secret.name : oldSelf.metadata.name + '-secret')"
    )
    .message("secret.name is immutable, since the value is written once: delete this ApiKey and create another")
    .field_path(".spec.secret"),
    validation = Rule::new(
        "(has(self.spec.secret) && has(self.spec.secret.key) ? self.spec.secret.key : 'key-value') == (has(oldSelf.spec.secret) && has(oldSelf.spec.secret.key) ? oldSelf.spec.secret.key : 'key-value')"
    )
    .message("secret.key is immutable, since the value is written once: delete this ApiKey and create another")
    .field_path(".spec.secret"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.type != 'Personal' || has(self.user)")
        .message("a Personal key belongs to one user: set user to that user's name")
        .field_path(".user")
        .reason(Reason::FieldValueRequired),
    validation = Rule::new("self.type == 'Personal' || !has(self.user)")
        .message("only a Personal key has a user: remove user, or set type to Personal")
        .field_path(".user")
        .reason(Reason::FieldValueForbidden),
    validation = Rule::new("self.type != 'Personal' || !has(self.accessPolicyRef)")
        .message("only Team and SendYourData keys support access policies: remove accessPolicyRef")
        .field_path(".accessPolicyRef")
        .reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.legacy) || has(self.presets) && size(self.presets) > 0 || has(self.permissions) && size(self.permissions) > 0")
        .message("a key needs at least one entry in presets or permissions"),
    validation = Rule::new("!has(self.legacy) || (!has(self.presets) || size(self.presets) == 0) && (!has(self.permissions) || size(self.permissions) == 0)")
        .message("what a legacy key may do is fixed by its kind: remove presets and permissions, or remove legacy and make a custom key")
        .field_path(".legacy")
        .reason(Reason::FieldValueForbidden),
    validation = Rule::new("!has(self.legacy) || !has(self.rotation)")
        .message("a legacy key can't be minted, so it can't be rotated: remove rotation, and replace the key by a custom one (kubectl keywright migrate)")
        .field_path(".rotation")
        .reason(Reason::FieldValueForbidden),
    validation = Rule::new("!has(self.legacy) || has(self.secret) && has(self.secret.name) && has(self.secret.key)")
        .message("a legacy key is imported from a Secret that exists: set secret.name and secret.key to where its value is")
        .field_path(".secret")
        .reason(Reason::FieldValueRequired),
    validation = Rule::new("!has(self.legacy) || !has(self.secret) || !has(self.secret.labels) && !has(self.secret.annotations)")
        .message("the Secret of a legacy key is never written: remove secret.labels and secret.annotations")
        .field_path(".secret")
        .reason(Reason::FieldValueForbidden),
    validation = Rule::new("!has(self.legacy) || self.type == {'AlertsRulesTags': 'Personal', 'LogsQuery': 'Personal', 'Team': 'Personal', 'SendYourData': 'SendYourData', 'Scim': 'Team'}[self.legacy]")
        .message("legacy AlertsRulesTags, LogsQuery and Team keys are of type Personal, SendYourData of type SendYourData, Scim of type Team: correct type or legacy")
        .field_path(".legacy"),
    validation = Rule::new("has(self.legacy) == has(oldSelf.legacy) && (!has(self.legacy) || self.legacy == oldSelf.legacy)")
        .message("legacy is immutable: delete this ApiKey and create another")
        .field_path(".legacy"),
)]
pub struct ApiKeySpec {
    /// The recognizable name of the key, shown in lists. Free text; absent means the object's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub display_name: Option<String>,

    /// The kind of key. Personal: one user's, for tests and experiments, not for production. SendYourData:
    /// shared, ingestion permissions only. Team: shared, for programmatic access to the API. Immutable.
    #[serde(rename = "type")]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("type is immutable: delete this ApiKey and create another"))]
    pub key_type: KeyType,

    /// The user to whom a Personal key belongs, as the cluster authenticates that user. Required on a Personal
    /// key, not allowed on others. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(
        validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE),
        validation = Rule::new("self == oldSelf")
            .message("user is immutable: delete this ApiKey and create another"),
    )]
    pub user: Option<String>,

    /// Role presets: named groups of permissions from the PermissionCatalogs of the cluster. Upper and lower case
    /// are the same. A preset marked standalone (RUM) may not be combined with anything else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(128)))]
    pub presets: Vec<String>,

    /// Individual permissions, written resource:Action, from the PermissionCatalogs of the cluster. Upper and
    /// lower case are the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(128)))]
    pub permissions: Vec<String>,

    /// Whether the key may be used. Absent means true. false refuses the key at once and keeps its value, so that
    /// true restores the same value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<bool>,

    /// The AccessPolicy in this namespace that says who may view and manage the key. Team and SendYourData only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_policy_ref: Option<AccessPolicyRef>,

    /// Makes this a legacy key of the given kind: its value is not minted but imported from the Secret that
    /// secret.name and secret.key name, which is read and never written; what it may do is fixed by the legacy roles
    /// of the catalogue. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "LegacyKind")]
    pub legacy: Option<LegacyKind>,

    /// When the key stops working, as an RFC 3339 time such as 2027-06-01T00:00:00Z. Absent means never. May be
    /// moved: an expired key works again, with the same value, once this lies in the future.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    #[x_kube(
        validation = Rule::new(TIME_RULE).message("must be an RFC 3339 time such as 2027-06-01T00:00:00Z"),
        validation = Rule::new(TIME_CASE_RULE).message("must have T and Z in upper case, as in 2027-06-01T00:00:00Z"),
        validation = Rule::new(LEAP_SECOND_RULE).message("must not have 60 seconds, since leap seconds are not supported"),
    )]
    pub expires_at: Option<String>,

    /// When the value is replaced by a new one. Absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,

    /// Where the value is written. Absent means Secret NAME-secret, key key-value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretTemplate>,
}

/// A CEL test for RFC 3339, section 5.6 (`date-time`), also in lower case and with leap seconds, for which there are rules
/// of their own. That the day exists in its month is checked by [`crate::domain::validate`].
macro_rules! is_time {
    () => {
        "self.matches('(?i)^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$')"
    };
}
const TIME_RULE: &str = is_time!();
const TIME_CASE_RULE: &str = concat!("!", is_time!(), " || !self.matches('[tz]')");
const LEAP_SECOND_RULE: &str = concat!("!", is_time!(), " || !self.contains(':60')");

// Seed, "Types of API keys".
/// The kind of a key.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyType {
    /// One user's key.
    Personal,
    /// A shared key that only sends data.
    SendYourData,
    /// A shared key for the API.
    Team,
}

// Seed, "Migrate legacy keys to custom API keys": the kinds, and the type under which each is listed.
/// The kind of a legacy key.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LegacyKind {
    /// The Alerts, Rules and Tags API key; of type Personal.
    AlertsRulesTags,
    /// The Logs Query API key; of type Personal.
    LogsQuery,
    /// The Team API key; of type Personal.
    Team,
    /// The Send-Your-Data key; of type SendYourData.
    SendYourData,
    /// The SCIM key; of type Team.
    Scim,
}

/// Names an AccessPolicy in the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct AccessPolicyRef {
    /// The name of the AccessPolicy.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,
}

/// When a value is replaced.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.every) || has(self.overlap) || has(self.requestedAt)")
        .message("rotation is empty: set every or requestedAt, or remove rotation"),
    validation = Rule::new(OVERLAP_RULE)
        .message("overlap must be shorter than every, or more than two values would work at once")
        .field_path(".overlap"),
)]
pub struct Rotation {
    /// Replace the value when it is this old, as a duration such as 720h or 90m; at least 1m. Absent means only
    /// when requestedAt asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(
        validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"),
        validation = Rule::new(EVERY_RULE).message("must be at least 1m"),
    )]
    pub every: Option<String>,

    /// How long the replaced value keeps working, as a duration such as 24h. 0s revokes it at once. Absent means
    /// 24h, or half of every if that is shorter. It never outlives expiresAt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 24h, 30m or 0s"))]
    pub overlap: Option<String>,

    /// Set this to the current time to request one rotation. A time that is later than that of the last rotation is a
    /// request; the same or an older time is none, so that it can stay in Git and a revert does not rotate. A time in the
    /// future requests a rotation at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    #[x_kube(
        validation = Rule::new(TIME_RULE).message("must be an RFC 3339 time such as 2026-11-23T10:00:00Z"),
        validation = Rule::new(TIME_CASE_RULE).message("must have T and Z in upper case, as in 2026-11-23T10:00:00Z"),
        validation = Rule::new(LEAP_SECOND_RULE).message("must not have 60 seconds, since leap seconds are not supported"),
    )]
    pub requested_at: Option<String>,
}

/// GEP-2257, the duration format of the Gateway API, without fractions of a second.
const DURATION_RULE: &str = "self.matches('^([0-9]{1,5}(h|m|s)){1,3}$')";
const EVERY_RULE: &str = "!self.matches('^([0-9]{1,5}(h|m|s)){1,3}$') || duration(self) >= duration('1m')";
const OVERLAP_RULE: &str = "!has(self.every) || !has(self.overlap) || !self.every.matches('^([0-9]{1,5}(h|m|s)){1,3}$') || !self.overlap.matches('^([0-9]{1,5}(h|m|s)){1,3}$') || duration(self.overlap) < duration(self.every)";

/// The Secret that receives the value. Its type is always `keywright.dev/api-key`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Default)]

pub struct SecretTemplate {
    /// The name of the Secret. Absent means the ApiKey's name followed by -secret. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!format.dns1123Subdomain().validate(self).hasValue()")
        .message("must be a Secret name: lower case letters, digits, - and ., at most 253 characters"))]
    pub name: Option<String>,

    /// The key inside the Secret that holds the value. Absent means key-value. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new("self.matches('^[-._a-zA-Z0-9]+$')")
            .message("must consist of letters, digits, -, _ and ."),
        validation = Rule::new("self != '.' && !self.startsWith('..')").message("must not be . and not begin with .."),
        validation = Rule::new("!(self in ['sealed-value', 'claimed'])")
            .message("sealed-value and claimed are where sealed values are: choose another key"),
    )]
    pub key: Option<String>,

    /// Labels of the Secret. The ApiKey's own labels are not copied.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), extend("additionalProperties" = {"type": "string", "maxLength": 63}))]
    #[x_kube(validation = Rule::new(RESERVED_RULE).message("keys of keywright.dev are reserved"))]
    pub labels: BTreeMap<String, String>,

    /// Annotations of the Secret. The ApiKey's own annotations are not copied.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), extend("additionalProperties" = {"type": "string", "maxLength": 4096}))]
    #[x_kube(validation = Rule::new(RESERVED_RULE).message("keys of keywright.dev are reserved"))]
    pub annotations: BTreeMap<String, String>,
}

const RESERVED_RULE: &str = "self.all(k, !k.startsWith('keywright.dev/') && !k.contains('.keywright.dev/'))";

/// What the cluster knows of a key. Written by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct ApiKeyStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready: the key is as the spec wants it. Accepted: the spec is valid and every name in it is known.
    /// PolicyAccepted: the access policy is in force. Reconciling and Stalled are present only while true.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The state of the key in one word. The verifier accepts the values of an Active key, and of a Lost one for as
    /// long as somebody still has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "KeyState")]
    pub state: Option<KeyState>,

    /// The id of the current value: key_ and the first 16 hex digits of its SHA-256. It may be logged; the value
    /// may not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,

    /// Who created the ApiKey, as the cluster authenticated it. It never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creator: Option<Creator>,

    /// How the value is kept and whether somebody saw it. Absent while the value is plain in its Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reveal: Option<Reveal>,

    /// When the key was last used, as far as a verifier says. Coarse.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "time_if_any")]
    pub last_used_at: Option<Time>,

    /// When the first value of the key was minted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Time>,

    /// The Secret that holds the current value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,

    /// The presets in force, in the catalogue's spelling. A preset that left the catalogue is missing here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub presets: Vec<String>,

    /// The individual permissions in force, in the catalogue's spelling.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// The digests of the values that work: the current one first, then the one in overlap, if any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    pub tokens: Vec<Token>,

    /// The last spec.rotation.requestedAt that was carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_requested_at: Option<String>,

    /// When the value was last replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rotated_at: Option<Time>,

    /// When the value is due to be replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_rotation_at: Option<Time>,
}

// Seed, "Actions": a key is listed with its creator's name and type.
/// Who created an object.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct Creator {
    /// The user name.
    pub name: String,
    /// Whether that is a person or a workload.
    pub kind: CreatorKind,
}

/// What kind of user created an object.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CreatorKind {
    /// A user.
    User,
    /// A ServiceAccount, such as that of Argo CD.
    ServiceAccount,
}

/// A time that somebody else than the operator may have written. One that is out of range, as the year 9999 is for some time
/// zones, is as if it were not there, so that the rest of the object can be read.
fn time_if_any<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Time>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.and_then(|text| text.parse().ok()).map(Time))
}

/// How a sealed value is shown.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct Reveal {
    /// Whether the value can be seen once only.
    pub mode: RevealMode,
    /// Whether it was.
    pub state: RevealState,
    /// When the current value was first revealed, or erased.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
    /// Who saw it first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// How often a sealed value may be seen.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RevealMode {
    /// Sealed: whoever may view the key may reveal it, as often as they like.
    Sealed,
    /// Sealed, and gone from the cluster once it was revealed.
    OneTime,
}

/// What became of a sealed value.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RevealState {
    /// Nobody has seen the current value.
    Unrevealed,
    /// Somebody has.
    Revealed,
    /// Nobody did in time, and the value is gone.
    Erased,
}

/// The state of a key, in one word.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyState {
    /// The key works.
    Active,
    /// `active: false`.
    Inactive,
    /// `expiresAt` has passed.
    Expired,
    /// Not minted yet; Keywright is working on it or waits for something that can come by itself.
    Pending,
    /// The spec can't be accepted; the condition Accepted says why and what to do.
    Rejected,
    /// The Secret no longer holds the value, which can't be restored. It still works where it is known; ask for a
    /// rotation to mint a new one.
    Lost,
}

/// The Secret that holds the value.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct SecretRef {
    /// The name of the Secret.
    pub name: String,
    /// The key inside the Secret.
    pub key: String,
}

/// One value of a key, without the value.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// key_ and the first 16 hex digits of the digest.
    pub id: String,
    /// SHA-256 of the whole value, 64 hex digits.
    pub sha256: String,
    /// Which value of the key it is, counted from 1. It only grows, so that an older value that is put back into the
    /// Secret is recognized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// When the value was minted.
    pub minted_at: Time,
    /// When the value stops working: the end of the overlap, or the expiry of the key. Absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
}
