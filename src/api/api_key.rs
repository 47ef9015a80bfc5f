use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// docs/specification.md, "Actions": a recognizable name, a type, presets or permissions or both.
/// The desired state of an ApiKey.
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
        .message("the kind of a legacy key fixes its permissions: remove presets and permissions, or remove legacy to create a custom key")
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
    /// The name of the key in lists: free text on one line, at most 128 characters. Absent means the name of the
    /// object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub display_name: Option<String>,

    /// The type of the key. Personal: belongs to one user, for tests and experiments, not for production. SendYourData:
    /// shared, ingestion permissions only. Team: shared, for programmatic access to the API. Immutable.
    #[serde(rename = "type")]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("type is immutable: delete this ApiKey and create another"))]
    pub key_type: KeyType,

    /// The user that a Personal key belongs to, by the user name that the cluster authenticates. Required for a
    /// Personal key, forbidden for others. At most 256 characters. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(
        validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE),
        validation = Rule::new("self == oldSelf")
            .message("user is immutable: delete this ApiKey and create another"),
    )]
    pub user: Option<String>,

    /// Role presets: named groups of permissions from the PermissionCatalogs of the cluster; at most 64. Names are not
    /// case-sensitive. A standalone preset (RUM) can't be combined with another preset or permission.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(128)))]
    pub presets: Vec<String>,

    /// Individual permissions, written resource:Action, from the PermissionCatalogs of the cluster; at most 512. Names
    /// are not case-sensitive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "set", "items" = super::name_item(128)))]
    pub permissions: Vec<String>,

    /// Whether the key may be used. Absent means true. If false, verifiers reject the key. The value is kept, so that
    /// true makes the same value work again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<bool>,

    /// The AccessPolicy in this namespace that limits which users may view and manage the key. While it does not exist,
    /// access is denied. Absent means no limit beyond permissions. Team and SendYourData only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_policy_ref: Option<AccessPolicyRef>,

    /// Makes this a legacy key of the given kind. Its value is not minted but imported from the Secret that secret.name
    /// and secret.key name, which is read and never written. The legacy roles of the PermissionCatalogs define its
    /// permissions. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "LegacyKind")]
    pub legacy: Option<LegacyKind>,

    /// The time at which the key stops working, in RFC 3339 format such as 2027-06-01T00:00:00Z. Absent means never. If
    /// the time of an expired key is moved to the future, the same value works again.
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

    /// The Secret that receives the value. Absent means Secret NAME-secret, key key-value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretTemplate>,
}

/// A CEL test for RFC 3339, section 5.6 (`date-time`). It accepts lower case and leap seconds, which [`TIME_CASE_RULE`]
/// and [`LEAP_SECOND_RULE`] reject with messages of their own. [`crate::domain::validate`] checks that the month has
/// the day.
macro_rules! is_time {
    () => {
        "self.matches('(?i)^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$')"
    };
}
const TIME_RULE: &str = is_time!();
const TIME_CASE_RULE: &str = concat!("!", is_time!(), " || !self.matches('[tz]')");
const LEAP_SECOND_RULE: &str = concat!("!", is_time!(), " || !self.contains(':60')");

// docs/specification.md, "Key types".
/// The type of a key.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyType {
    /// Belongs to one user.
    Personal,
    /// Shared; only sends data.
    SendYourData,
    /// Shared; for programmatic access to the API.
    Team,
}

// docs/specification.md, "Legacy keys": the kinds, and the type under which each is listed.
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

/// A reference to an AccessPolicy in the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct AccessPolicyRef {
    /// The name of the AccessPolicy.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new(super::LINE_RULE).message(super::LINE_MESSAGE))]
    pub name: String,
}

/// The rotation of a value.
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
    /// The age at which the value is replaced, as a duration such as 720h, 90m or 1h30m; at least 1m. Absent means that
    /// only requestedAt replaces the value. An inactive or expired key is not rotated by its age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(
        validation = Rule::new(DURATION_RULE).message("must be a duration such as 720h, 90m or 1h30m"),
        validation = Rule::new(EVERY_RULE).message("must be at least 1m"),
    )]
    pub every: Option<String>,

    /// The time for which the replaced value keeps working, as a duration such as 24h; shorter than every. 0s revokes
    /// it at once. Absent means 24h, or half of every if that is shorter. The replaced value never works past
    /// expiresAt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    #[x_kube(validation = Rule::new(DURATION_RULE).message("must be a duration such as 24h, 30m or 0s"))]
    pub overlap: Option<String>,

    /// Requests one rotation: set it to the current time, in RFC 3339 format. A time later than
    /// status.lastHandledRequestedAt is a request. The same or an earlier time is not, so that the field can stay in
    /// Git and a revert does not rotate. A time in the future requests a rotation at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    #[x_kube(
        validation = Rule::new(TIME_RULE).message("must be an RFC 3339 time such as 2026-11-23T10:00:00Z"),
        validation = Rule::new(TIME_CASE_RULE).message("must have T and Z in upper case, as in 2026-11-23T10:00:00Z"),
        validation = Rule::new(LEAP_SECOND_RULE).message("must not have 60 seconds, since leap seconds are not supported"),
    )]
    pub requested_at: Option<String>,
}

/// GEP-2257, the duration format of the Gateway API, without milliseconds.
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

    /// The key inside the Secret that holds the value. Absent means key-value. Immutable. A sealed value is under key
    /// sealed-value instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new("self.matches('^[-._a-zA-Z0-9]+$')")
            .message("must consist of letters, digits, -, _ and ."),
        validation = Rule::new("self != '.' && !self.startsWith('..')").message("must not be . and not begin with .."),
        validation = Rule::new("!(self in ['sealed-value', 'claimed'])")
            .message("sealed-value and claimed are reserved for sealed values: choose another key"),
    )]
    pub key: Option<String>,

    /// Labels of the Secret, at most 32. The labels of the ApiKey are not copied.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), extend("additionalProperties" = {"type": "string", "maxLength": 63}))]
    #[x_kube(validation = Rule::new(RESERVED_RULE).message("keys of keywright.dev are reserved"))]
    pub labels: BTreeMap<String, String>,

    /// Annotations of the Secret, at most 32. The annotations of the ApiKey are not copied.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), extend("additionalProperties" = {"type": "string", "maxLength": 4096}))]
    #[x_kube(validation = Rule::new(RESERVED_RULE).message("keys of keywright.dev are reserved"))]
    pub annotations: BTreeMap<String, String>,
}

const RESERVED_RULE: &str = "self.all(k, !k.startsWith('keywright.dev/') && !k.contains('.keywright.dev/'))";

/// The observed state of an ApiKey. Only the operator writes it; verifiers write lastUsedAt.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
pub struct ApiKeyStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready: the key is as the spec requests. Accepted: the spec is valid and every preset and permission in it
    /// exists. PolicyAccepted: the AccessPolicy exists; present only with accessPolicyRef. Reconciling and Stalled are
    /// present only while True.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map"), extend("x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The state of the key. Verifiers accept the values of an Active key, and also of a Lost one, since clients may
    /// still have them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "KeyState")]
    pub state: Option<KeyState>,

    /// The id of the current value: key_ and the first 16 hex digits of its SHA-256 digest. Unlike the value, it may be
    /// logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,

    /// The user who created the ApiKey, as the cluster authenticated that user. It never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creator: Option<Creator>,

    /// How the sealed value is kept and whether it was revealed. Absent while the value is plain in its Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reveal: Option<Reveal>,

    /// The time of the last use that a verifier reported. By default it is updated at most once an hour.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "time_if_any")]
    pub last_used_at: Option<Time>,

    /// The time at which the first value was minted or imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Time>,

    /// The Secret that holds the current value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,

    /// The presets in force, in the spelling of the PermissionCatalog. A preset that left the catalog is missing here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub presets: Vec<String>,

    /// The individual permissions in force, in the spelling of the PermissionCatalog.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub permissions: Vec<String>,

    /// The values that work, by their digests: the current one first, then the one in overlap, if any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    pub tokens: Vec<Token>,

    /// The last spec.rotation.requestedAt that was carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_requested_at: Option<String>,

    /// The time at which the value was last replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rotated_at: Option<Time>,

    /// The time at which the value is due to be replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_rotation_at: Option<Time>,
}

// docs/specification.md, "Actions": a key is listed with the name and type of its creator.
/// The user who created an object.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct Creator {
    /// The user name.
    pub name: String,
    /// Whether the user is a person or a workload.
    pub kind: CreatorKind,
}

/// The kind of user that created an object.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CreatorKind {
    /// A user.
    User,
    /// A ServiceAccount, such as that of Argo CD.
    ServiceAccount,
}

/// Reads a time that another writer than the operator may have written. A time out of range, such as the year 9999 in
/// some time zones, is read as absent, so that the rest of the object can be read.
fn time_if_any<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Time>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.and_then(|text| text.parse().ok()).map(Time))
}

/// The state of a sealed value.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct Reveal {
    /// Sealed: the value can be revealed any number of times. OneTime: it can be revealed once.
    pub mode: RevealMode,
    /// Whether the current value is Unrevealed, Revealed or Erased.
    pub state: RevealState,
    /// The time at which the current value was first revealed, or erased.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
    /// The user that the current value was first revealed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// How often a sealed value can be revealed.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RevealMode {
    /// Any number of times, to users who may reveal the key.
    Sealed,
    /// Once; then the sealed value is removed from the cluster.
    OneTime,
}

/// Whether a sealed value was revealed.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RevealState {
    /// The current value was not revealed.
    Unrevealed,
    /// The current value was revealed.
    Revealed,
    /// The current value was not revealed in time and was erased.
    Erased,
}

/// The state of a key.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyState {
    /// The key works.
    Active,
    /// `active` is false, or the key was unused for `limits.deactivateUnusedAfter`.
    Inactive,
    /// `expiresAt` has passed.
    Expired,
    /// Not minted yet: Keywright is minting the value, or waits for another object.
    Pending,
    /// The spec violates a rule, or the value can't be imported. The conditions state the problem and the fix.
    Rejected,
    /// The Secret no longer holds the value, which can't be restored. Clients that have the value can still use it.
    /// Request a rotation to mint a new one.
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

/// One value of a key, by its digest.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// The id of the value: key_ and the first 16 hex digits of the digest.
    pub id: String,
    /// The SHA-256 digest of the whole value: 64 hex digits.
    pub sha256: String,
    /// The number of the value, counted from 1. It only grows, so that the operator recognizes an older value that was
    /// put back into the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The time at which the value was minted or imported.
    pub minted_at: Time,
    /// The time at which the value stops working: the end of the overlap, or the expiry of the key. Absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
}
