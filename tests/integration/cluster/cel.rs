//! The validation rules of the CRDs: rejected values with the exact message, and the nearest accepted values.
//!
//! Three tables: the schema limits of each field (`BOUNDS`), the rules for one object (`creates`), the rules for
//! changes (`updates`). One test compares the tables with the CRDs, so that no limit and no rule is missing.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use keywright::api;
use kube::api::{Api, DynamicObject, GroupVersionKind, PostParams};
use kube::discovery::pinned_kind;
use serde_json::{Value, json};

use super::{Team, api_key};

/// The API server's response to an object.
#[derive(Debug)]
enum ApiResult {
    Accepted,
    /// One `field: message` for each cause, as kubectl prints them.
    Rejected(Vec<String>),
}

async fn api_for(team: &Team, kind: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("keywright.dev", "v1alpha1", kind);
    let (resource, _) = pinned_kind(&team.client, &gvk).await.unwrap();
    if kind == "PermissionCatalog" {
        Api::all_with(team.client.clone(), &resource)
    } else {
        Api::namespaced_with(team.client.clone(), &team.namespace, &resource)
    }
}

/// Sends a dry run: an update if the object has a `resourceVersion`, otherwise a create.
async fn dry_run(api: &Api<DynamicObject>, object: &Value) -> ApiResult {
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let parsed: DynamicObject = serde_json::from_value(object.clone()).unwrap();
    let answer = match object["metadata"]["resourceVersion"] {
        Value::Null => api.create(&params, &parsed).await,
        _ => api.replace(object["metadata"]["name"].as_str().unwrap(), &params, &parsed).await,
    };
    let status = match answer {
        Ok(_) => return ApiResult::Accepted,
        Err(kube::Error::Api(status)) => status,
        Err(error) => panic!("{error}"),
    };
    let details = status.details.unwrap_or_else(|| panic!("{}", status.message));
    // Kubernetes 1.33 prints the Go type of objects.
    let causes = details
        .causes
        .iter()
        .map(|cause| format!("{}: {}", cause.field, cause.message).replace("map[string]interface {}", ""));
    ApiResult::Rejected(causes.filter(|cause| !cause.ends_with(UNCHECKED_RULES)).collect())
}

/// The API server adds this cause to errors of the schema.
const UNCHECKED_RULES: &str = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";

/// Reports whether `cause` is `expected`, without the value after `Invalid value: `, whose format differs between
/// versions of the API server.
fn cause_matches(cause: &str, expected: &str) -> bool {
    match expected.split_once(": Invalid value: ") {
        _ if cause == expected => true,
        Some((field, message)) => {
            cause.strip_prefix(field).is_some_and(|rest| rest.starts_with(": Invalid value: "))
                && (cause.ends_with(&format!(": {message}")) || cause.ends_with(&format!("\": {message}")))
        }
        None => false,
    }
}

enum Expected {
    Accepted,
    Rejected(&'static str),
}
use Expected::{Accepted, Rejected};

fn is_expected(answer: &ApiResult, expected: &Expected) -> bool {
    match (answer, expected) {
        (ApiResult::Accepted, Accepted) => true,
        (ApiResult::Rejected(causes), Rejected(text)) => matches!(causes.as_slice(), [one] if cause_matches(one, text)),
        _ => false,
    }
}

/// Checks all cases concurrently and reports every failure, not only the first.
async fn assert_cases(cases: Vec<(String, Api<DynamicObject>, Value, Expected)>) {
    assert!(!cases.is_empty());
    let wrong: Vec<String> = stream::iter(cases)
        .map(async |(title, api, object, expected)| {
            let answer = dry_run(&api, &object).await;
            let wanted = match expected {
                Accepted => "accepted".to_owned(),
                Rejected(text) => format!("rejected: {text}"),
            };
            (!is_expected(&answer, &expected)).then(|| format!("{title}\n    wanted {wanted}\n    got    {answer:?}"))
        })
        .buffered(16)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} cases failed:\n{}", wrong.len(), wrong.join("\n"));
}

// --- The bounds of every field ---------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Bound {
    MinLength(usize),
    /// In characters.
    MaxLength(usize),
    MaxItems(usize),
    MinItems(usize),
    MaxProperties(usize),
    /// `x-kubernetes-list-type: set`.
    UniqueItems,
    /// `x-kubernetes-list-type: map`, by name.
    UniqueNames,
    Enum(&'static [&'static str]),
    Pattern(&'static str),
    Required,
}
use Bound::{
    Enum, MaxItems, MaxLength, MaxProperties, MinItems, MinLength, Pattern, Required, UniqueItems, UniqueNames,
};

const NAME: &[Bound] = &[Required, MinLength(1), MaxLength(128)];
const LEVELS: Bound = Enum(&["NoAccess", "Read", "Manage"]);
const EVIDENCE: &[Bound] = &[Enum(&["Documented", "Inferred", "Mixed", "Unknown"])];
/// Single-line text, in lists that are too long for a CEL rule.
const SINGLE_LINE: &str = r"^[^\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]*$";
const PERMISSION_ITEM: &[Bound] = &[MinLength(3), MaxLength(128), Pattern(SINGLE_LINE)];

/// Kind, field of the spec, bounds.
const BOUNDS: &[(&str, &str, &[Bound])] = &[
    ("ApiKey", "displayName", &[MinLength(1), MaxLength(128)]),
    ("ApiKey", "type", &[Required, Enum(&["Personal", "SendYourData", "Team"])]),
    ("ApiKey", "user", &[MinLength(1), MaxLength(256)]),
    ("ApiKey", "presets", &[MaxItems(64), UniqueItems]),
    ("ApiKey", "presets[]", &[MinLength(1), MaxLength(128)]),
    ("ApiKey", "permissions", &[MaxItems(512), UniqueItems]),
    ("ApiKey", "permissions[]", &[MinLength(1), MaxLength(128)]),
    ("ApiKey", "accessPolicyRef.name", &[Required, MinLength(1), MaxLength(253)]),
    ("ApiKey", "legacy", &[Enum(&["AlertsRulesTags", "LogsQuery", "Team", "SendYourData", "Scim"])]),
    ("ApiKey", "expiresAt", &[MaxLength(40)]),
    ("ApiKey", "rotation.every", &[MaxLength(24)]),
    ("ApiKey", "rotation.overlap", &[MaxLength(24)]),
    ("ApiKey", "rotation.requestedAt", &[MaxLength(40)]),
    ("ApiKey", "secret.name", &[MinLength(1), MaxLength(253)]),
    ("ApiKey", "secret.key", &[MinLength(1), MaxLength(253)]),
    ("ApiKey", "secret.labels", &[MaxProperties(32)]),
    ("ApiKey", "secret.labels[entry]", &[MaxLength(63)]),
    ("ApiKey", "secret.annotations", &[MaxProperties(32)]),
    ("ApiKey", "secret.annotations[entry]", &[MaxLength(4096)]),
    ("AccessPolicy", "mode", &[Required, Enum(&["Private", "Advanced"])]),
    ("AccessPolicy", "rules", &[MaxItems(64)]),
    ("AccessPolicy", "rules[].groups", &[Required, MinItems(1), MaxItems(64), UniqueItems]),
    ("AccessPolicy", "rules[].groups[]", &[MinLength(1), MaxLength(256)]),
    ("AccessPolicy", "rules[].access", &[Required, LEVELS]),
    ("AccessPolicy", "rules[].policyAccess", &[LEVELS]),
    ("AccessPolicy", "generalAccess", &[LEVELS]),
    ("AccessPolicy", "generalPolicyAccess", &[LEVELS]),
    ("SecuritySettings", "workloadSecrets", &[Enum(&["Allow", "Deny"])]),
    ("SecuritySettings", "eraseUnrevealedAfter", &[MaxLength(24)]),
    ("SecuritySettings", "limits.maxLifetime", &[MaxLength(24)]),
    ("SecuritySettings", "limits.maxRotationInterval", &[MaxLength(24)]),
    ("SecuritySettings", "limits.deactivateUnusedAfter", &[MaxLength(24)]),
    ("SecuritySettings", "dataScopedGroups", &[MaxItems(128), UniqueItems]),
    ("SecuritySettings", "dataScopedGroups[]", &[MinLength(1), MaxLength(256)]),
    ("KeyReveal", "apiKeyRef", &[Required]),
    ("KeyReveal", "apiKeyRef.name", &[Required, MinLength(1), MaxLength(253)]),
    ("KeyReveal", "recipient", &[Required, MinLength(1), MaxLength(4096)]),
    ("KeyReveal", "requester.username", &[Required]),
    ("PermissionCatalog", "description", &[MaxLength(4096)]),
    ("PermissionCatalog", "permissions", &[MaxItems(2000), UniqueNames]),
    (
        "PermissionCatalog",
        "permissions[].name",
        &[Required, MinLength(3), MaxLength(128), Pattern("^[A-Za-z0-9][A-Za-z0-9._#-]*:[A-Za-z0-9][A-Za-z0-9._#-]*$")],
    ),
    ("PermissionCatalog", "permissions[].description", &[MaxLength(512)]),
    ("PermissionCatalog", "permissions[].group", &[MaxLength(128)]),
    ("PermissionCatalog", "permissions[].levels", &[MaxItems(2), UniqueItems]),
    ("PermissionCatalog", "permissions[].levels[]", &[Enum(&["Team", "Organization"])]),
    ("PermissionCatalog", "permissions[].rolesEvidence", EVIDENCE),
    ("PermissionCatalog", "permissions[].sources", &[MaxItems(16)]),
    ("PermissionCatalog", "permissions[].sources[]", &[MaxLength(512), Pattern(SINGLE_LINE)]),
    ("PermissionCatalog", "presets", &[MaxItems(500), UniqueNames]),
    (
        "PermissionCatalog",
        "presets[].name",
        &[Required, MinLength(1), MaxLength(128), Pattern("^[A-Za-z0-9][A-Za-z0-9._-]*$")],
    ),
    ("PermissionCatalog", "presets[].description", &[MaxLength(512)]),
    ("PermissionCatalog", "presets[].permissions", &[MaxItems(1000)]),
    ("PermissionCatalog", "presets[].permissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].evidence", EVIDENCE),
    ("PermissionCatalog", "presets[].completeness", &[Enum(&["Likely", "Partial", "Unverified", "Unknown"])]),
    ("PermissionCatalog", "presets[].inferred", &[MaxItems(1000)]),
    ("PermissionCatalog", "presets[].inferred[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].uncertain", &[MaxItems(1000)]),
    ("PermissionCatalog", "presets[].uncertain[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].peoplePermissions", &[MaxItems(1000)]),
    ("PermissionCatalog", "presets[].peoplePermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].note", &[MaxLength(1024)]),
    ("PermissionCatalog", "presets[].sources", &[MaxItems(16)]),
    ("PermissionCatalog", "presets[].sources[]", &[MaxLength(512), Pattern(SINGLE_LINE)]),
    ("PermissionCatalog", "roles", &[MaxItems(100), UniqueNames]),
    ("PermissionCatalog", "roles[].name", NAME),
    ("PermissionCatalog", "roles[].description", &[MaxLength(512)]),
    ("PermissionCatalog", "roles[].evidence", EVIDENCE),
    ("PermissionCatalog", "roles[].documentedPermissions", &[MaxItems(2000)]),
    ("PermissionCatalog", "roles[].documentedPermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "roles[].inferredPermissions", &[MaxItems(2000)]),
    ("PermissionCatalog", "roles[].inferredPermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "legacyRoles", &[MaxItems(100), UniqueNames]),
    ("PermissionCatalog", "legacyRoles[].name", NAME),
    ("PermissionCatalog", "legacyRoles[].permissions", &[MaxItems(1000)]),
    ("PermissionCatalog", "legacyRoles[].permissions[]", PERMISSION_ITEM),
    (
        "PermissionCatalog",
        "legacyRoles[].legacyKind",
        &[Enum(&["AlertsRulesTags", "LogsQuery", "Team", "SendYourData", "Scim"])],
    ),
    ("PermissionCatalog", "legacyRoles[].legacyKey", &[MaxLength(128)]),
    ("PermissionCatalog", "legacyRoles[].legacyKeyEvidence", EVIDENCE),
];

/// Returns an object of the kind with one entry in each list, so that every field can be set.
fn full_object(kind: &str) -> Value {
    let spec = match kind {
        "ApiKey" => json!({
            "type": "Team", "presets": ["Alerts"], "permissions": ["alerts:Snooze"], "accessPolicyRef": {"name": "a"},
            "rotation": {"every": "24h"}, "secret": {"labels": {}, "annotations": {}},
        }),
        "AccessPolicy" => json!({
            "mode": "Advanced", "generalAccess": "Read", "rules": [{"groups": ["a"], "access": "Read"}],
        }),
        "KeyReveal" => json!({
            "apiKeyRef": {"name": "a"}, "recipient": "age1a", "requester": {"username": "a"},
        }),
        "SecuritySettings" => json!({"limits": {}, "dataScopedGroups": ["a"]}),
        _ => json!({
            "permissions": [{"name": "a:A", "levels": ["Team"], "sources": ["a"]}],
            "presets": [{
                "name": "a", "permissions": ["a:A"], "inferred": ["a:A"], "uncertain": ["a:A"],
                "peoplePermissions": ["a:A"], "sources": ["a"],
            }],
            "roles": [{"name": "a", "documentedPermissions": ["a:A"], "inferredPermissions": ["a:A"]}],
            "legacyRoles": [{"name": "a", "permissions": ["a:A"]}],
        }),
    };
    json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": "default"}, "spec": spec,
    })
}

/// Sets a field, named as in `BOUNDS`; removes it if the value is null.
fn set(object: &mut Value, field: &str, value: &Value) {
    let pointer = format!("/spec/{}", field.replace("[entry]", ".entry").replace("[]", ".0").replace('.', "/"));
    let (parent, last) = pointer.rsplit_once('/').unwrap();
    let parent = object.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"));
    match (parent, value) {
        (Value::Array(items), value) => items[last.parse::<usize>().unwrap()] = value.clone(),
        (Value::Object(map), Value::Null) => drop(map.remove(last)),
        (Value::Object(map), value) => drop(map.insert(last.to_owned(), value.clone())),
        (other, _) => panic!("{field}: {other}"),
    }
}

/// Returns distinct list entries that satisfy the schema of the items.
fn entries(kind: &str, field: &str, number: usize) -> Value {
    let entry = |n: usize| match (kind, field) {
        ("AccessPolicy", "rules") => json!({"groups": ["a"], "access": "Read"}),
        ("PermissionCatalog", "permissions") => json!({"name": format!("a:A{n}")}),
        ("PermissionCatalog", "presets" | "roles" | "legacyRoles") => json!({"name": format!("a{n}")}),
        ("PermissionCatalog", "permissions[].levels") => json!(["Team", "Organization", "Team"][n]),
        _ => json!(format!("a:A{n}")),
    };
    (0..number).map(entry).collect()
}

/// Returns the nearest value outside the bound, the API server's message for it, and the nearest value inside.
fn probe(kind: &str, field: &str, bound: Bound) -> (Value, String, Value) {
    let path = format!("spec.{}", field.replace("[entry]", ".entry").replace("[]", "[0]"));
    // Matches the pattern of all names; the names of permissions need a colon.
    let text = |length: usize| if length < 3 { "a".repeat(length) } else { format!("a:{}", "A".repeat(length - 2)) };
    let text = |length| if field == "presets[].name" { "a".repeat(length) } else { text(length) };
    // The limit counts characters, not bytes.
    let wide = |length| {
        if matches!(field, "displayName" | "permissions[].description") { "é".repeat(length) } else { text(length) }
    };
    match bound {
        MinLength(n) => (
            json!(text(n - 1)),
            format!("{path}: Invalid value: {path} in body should be at least {n} chars long"),
            json!(text(n)),
        ),
        MaxLength(n) => {
            (json!(text(n + 1)), format!("{path}: Too long: may not be more than {n} bytes"), json!(wide(n)))
        }
        MaxItems(n) => (
            entries(kind, field, n + 1),
            format!("{path}: Too many: {}: must have at most {n} items", n + 1),
            entries(kind, field, n),
        ),
        MinItems(n) => (
            entries(kind, field, n - 1),
            format!("{path}: Invalid value: {path} in body should have at least {n} items"),
            entries(kind, field, n),
        ),
        MaxProperties(n) => {
            let map = |n| (0..n).map(|n| (format!("entry{n}"), json!("a"))).collect::<serde_json::Map<_, _>>();
            (json!(map(n + 1)), format!("{path}: Too many: {}: must have at most {n} items", n + 1), json!(map(n)))
        }
        UniqueItems => {
            let (one, other) = if field == "permissions[].levels" { ("Team", "Organization") } else { ("a:A", "b:B") };
            (json!([one, one]), format!("{path}[1]: Duplicate value: \"{one}\""), json!([one, other]))
        }
        UniqueNames => {
            let list = |a: &str, b: &str| json!([{"name": a}, {"name": b}]);
            (list("a:A", "a:A"), format!("{path}[1]: Duplicate value: {{\"name\":\"a:A\"}}"), list("a:A", "a:B"))
        }
        Enum(words) => {
            let known: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
            let text = format!("{path}: Unsupported value: \"Other\": supported values: {}", known.join(", "));
            (json!("Other"), text, json!(words[0]))
        }
        Pattern(SINGLE_LINE) => (
            json!("a:A\u{202e}"),
            format!("{path}: Invalid value: {path} in body should match '{SINGLE_LINE}'"),
            json!("a:\u{e9} \u{200d}"),
        ),
        Pattern(pattern) => (
            json!("_a:A"),
            format!("{path}: Invalid value: {path} in body should match '{pattern}'"),
            json!(if field.starts_with("presets") { "a._-" } else { "logs.data-api#high:Read_x" }),
        ),
        Required => (Value::Null, format!("{path}: Required value"), json!("Team")),
    }
}

#[tokio::test]
async fn values_outside_each_bound_are_rejected_with_its_message_and_values_inside_are_not() {
    let team = Team::new().await;
    let mut probes = vec![];
    for (kind, field, bounds) in BOUNDS {
        let api = api_for(&team, kind).await;
        for bound in *bounds {
            let (outside, text, inside) = probe(kind, field, *bound);
            let objects = [outside, inside].map(|value| {
                let mut object = full_object(kind);
                set(&mut object, field, &value);
                object
            });
            probes.push((format!("{kind} {field} {bound:?}"), api.clone(), objects, text, *bound));
        }
    }
    let wrong: Vec<String> = stream::iter(probes)
        .map(async |(title, api, [outside, inside], text, bound)| {
            let refused = dry_run(&api, &outside).await;
            let named = matches!(&refused, ApiResult::Rejected(causes)
                if causes.iter().any(|cause| cause_matches(cause, &text)));
            // The mutating webhook overwrites the requester.
            if title.starts_with("KeyReveal requester.") {
                return (!matches!(refused, ApiResult::Accepted)).then(|| format!("{title}: {refused:?}"));
            }
            if !named {
                return Some(format!("{title}\n    wanted {text}\n    got    {refused:?}"));
            }
            if bound == Required {
                return None;
            }
            // Other rules may reject this value (a time of 40 letters); this bound must not.
            let accepted = dry_run(&api, &inside).await;
            let (field, message) = text.split_once(": ").unwrap();
            let message = message.trim_start_matches("Invalid value: ").split(": must have").next().unwrap();
            let again = matches!(&accepted, ApiResult::Rejected(causes)
                if causes.iter().any(|cause| cause.starts_with(field) && cause.contains(message)));
            again.then(|| format!("{title}: rejected inside the bound: {accepted:?}"))
        })
        .buffered(16)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} cases failed:\n{}", wrong.len(), wrong.join("\n"));
}

/// Collects all bounds of the schema, in the format of `BOUNDS`.
fn collect_bounds(kind: &str, field: &str, schema: &Value, required: bool, found: &mut BTreeSet<String>) {
    type Make = fn(usize) -> Bound;
    let number = |name: &str| schema[name].as_u64().map(|n| usize::try_from(n).unwrap());
    let mut add = |bound: String| {
        found.insert(format!("{kind} {field} {bound}"));
    };
    let numbers: [(&str, Make); 5] = [
        ("minLength", MinLength),
        ("maxLength", MaxLength),
        ("maxItems", MaxItems),
        ("minItems", MinItems),
        ("maxProperties", MaxProperties),
    ];
    for (name, bound) in numbers {
        if let Some(n) = number(name) {
            add(format!("{:?}", bound(n)));
        }
    }
    match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => add(format!("{UniqueItems:?}")),
        Some("map") => add(format!("{UniqueNames:?}")),
        _ => {}
    }
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
        add(format!("Enum({words:?})"));
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        add(format!("Pattern({pattern:?})"));
    }
    if required {
        add(format!("{Required:?}"));
    }
    let is_required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        let below_field = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
        collect_bounds(kind, &below_field, below, is_required(name), found);
    }
    if schema["items"].is_object() {
        collect_bounds(kind, &format!("{field}[]"), &schema["items"], false, found);
    }
    if schema["additionalProperties"].is_object() {
        collect_bounds(kind, &format!("{field}[entry]"), &schema["additionalProperties"], false, found);
    }
}

#[test]
fn the_tables_cover_every_bound_and_every_rule_of_the_crds() {
    let mut found = BTreeSet::new();
    let mut messages = BTreeSet::new();
    for crd in api::crds() {
        let crd = serde_json::to_value(crd).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        collect_bounds(
            crd["spec"]["names"]["kind"].as_str().unwrap(),
            "",
            &schema["properties"]["spec"],
            false,
            &mut found,
        );
        collect_messages(schema, &mut messages);
    }
    let listed = BOUNDS
        .iter()
        .flat_map(|(kind, field, bounds)| bounds.iter().map(move |bound| format!("{kind} {field} {bound:?}")));
    let listed: BTreeSet<String> = listed.collect();
    let missing: Vec<_> = found.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&found).collect();
    assert!(missing.is_empty() && stale.is_empty(), "not in BOUNDS: {missing:#?}\nnot in the CRDs: {stale:#?}");

    assert!(messages.len() > 15, "{messages:#?}");
    let texts: Vec<_> = creates()
        .into_iter()
        .map(|(.., expected)| expected)
        .chain(updates().into_iter().map(|(.., expected)| expected))
        .chain([Rejected(REVEAL_IMMUTABLE)])
        .filter_map(|expected| if let Rejected(text) = expected { Some(text) } else { None })
        .collect();
    let untested: Vec<_> = messages.iter().filter(|m| !texts.iter().any(|text| text.ends_with(m.as_str()))).collect();
    assert!(untested.is_empty(), "rules without a case: {untested:#?}");
}

fn collect_messages(schema: &Value, found: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            for rule in map.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten() {
                found.insert(rule["message"].as_str().expect("a rule without a message").to_owned());
            }
            map.values().for_each(|below| collect_messages(below, found));
        }
        Value::Array(items) => items.iter().for_each(|below| collect_messages(below, found)),
        _ => {}
    }
}

// --- Rules for one object --------------------------------------------------------------------------------------------

const USER_REQUIRED: &str =
    "spec.user: Required value: a Personal key belongs to one user: set user to that user's name";
const USER_FORBIDDEN: &str =
    "spec.user: Forbidden: only a Personal key has a user: remove user, or set type to Personal";
const NO_PERMISSIONS: &str = "spec: Invalid value: a key needs at least one entry in presets or permissions";
const BAD_EXPIRES_AT: &str = "spec.expiresAt: Invalid value: must be an RFC 3339 time such as 2027-06-01T00:00:00Z";
const BAD_REQUESTED_AT: &str =
    "spec.rotation.requestedAt: Invalid value: must be an RFC 3339 time such as 2026-11-23T10:00:00Z";
const LOWERCASE_EXPIRES_AT: &str =
    "spec.expiresAt: Invalid value: must have T and Z in upper case, as in 2027-06-01T00:00:00Z";
const LOWERCASE_REQUESTED_AT: &str =
    "spec.rotation.requestedAt: Invalid value: must have T and Z in upper case, as in 2026-11-23T10:00:00Z";
const LEAP_SECOND_EXPIRES_AT: &str =
    "spec.expiresAt: Invalid value: must not have 60 seconds, since leap seconds are not supported";
const LEAP_SECOND_REQUESTED_AT: &str =
    "spec.rotation.requestedAt: Invalid value: must not have 60 seconds, since leap seconds are not supported";
const BAD_EVERY: &str = "spec.rotation.every: Invalid value: must be a duration such as 720h, 90m or 1h30m";
const BAD_OVERLAP: &str = "spec.rotation.overlap: Invalid value: must be a duration such as 24h, 30m or 0s";
const EVERY_TOO_SHORT: &str = "spec.rotation.every: Invalid value: must be at least 1m";
const OVERLAP_TOO_LONG: &str = "spec.rotation.overlap: Invalid value: overlap must be shorter than every, or more than two values would work at once";
const BAD_SECRET_NAME: &str = "spec.secret.name: Invalid value: must be a Secret name: lower case letters, digits, - and ., at most 253 characters";
const SECRET_KEY_DOTS: &str = "spec.secret.key: Invalid value: must not be . and not begin with ..";
const SECRET_KEY_SEALED: &str =
    "spec.secret.key: Invalid value: sealed-value and claimed are reserved for sealed values: choose another key";
const BAD_SECRET_KEY: &str = "spec.secret.key: Invalid value: must consist of letters, digits, -, _ and .";
const RESERVED_LABEL: &str = "spec.secret.labels: Invalid value: keys of keywright.dev are reserved";
const RESERVED_ANNOTATION: &str = "spec.secret.annotations: Invalid value: keys of keywright.dev are reserved";
const PRIVATE_WITH_SETTINGS: &str = "spec: Invalid value: a Private policy has no further settings: remove rules, generalAccess and generalPolicyAccess, or set mode to Advanced";
const BAD_ERASE_AFTER: &str = "spec.eraseUnrevealedAfter: Invalid value: must be a duration such as 720h, 90m or 1h30m";
const LEGACY_WITH_PERMISSIONS: &str = "spec.legacy: Forbidden: the kind of a legacy key fixes its permissions: remove presets and permissions, or remove legacy to create a custom key";
const LEGACY_WITH_ROTATION: &str = "spec.rotation: Forbidden: a legacy key can't be minted, so it can't be rotated: remove rotation, and replace the key by a custom one (kubectl keywright migrate)";
const LEGACY_SECRET_REQUIRED: &str = "spec.secret: Required value: a legacy key is imported from a Secret that exists: set secret.name and secret.key to where its value is";
const LEGACY_WITH_METADATA: &str =
    "spec.secret: Forbidden: the Secret of a legacy key is never written: remove secret.labels and secret.annotations";
const LEGACY_TYPE: &str = "spec.legacy: Invalid value: legacy AlertsRulesTags, LogsQuery and Team keys are of type Personal, SendYourData of type SendYourData, Scim of type Team: correct type or legacy";
const BAD_RECIPIENT: &str = "spec.recipient: Invalid value: must be an age recipient (age1...) or an SSH public key (ssh-ed25519 ... or ssh-rsa ...)";

/// Kind, name, spec and expected result.
type Create = (&'static str, String, Value, Expected);

/// A Team key with one more field.
fn key_with(field: &str, value: Value, expected: Expected) -> Create {
    let mut spec = json!({"type": "Team", "presets": ["Alerts"]});
    spec[field] = value;
    ("ApiKey", "k".to_owned(), spec, expected)
}

fn case(kind: &'static str, spec: Value, expected: Expected) -> Create {
    (kind, "default".to_owned(), spec, expected)
}

fn key_named(length: usize, secret: &Value, expected: Expected) -> Create {
    ("ApiKey", "k".repeat(length), json!({"type": "Team", "presets": ["Alerts"], "secret": secret}), expected)
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn creates() -> Vec<Create> {
    let mut cases = vec![
        case("ApiKey", json!({"type": "Team", "presets": ["Alerts"]}), Accepted),
        case("ApiKey", json!({"type": "Team", "permissions": ["alerts:Snooze"]}), Accepted),
        case("ApiKey", json!({"type": "Team", "presets": [], "permissions": ["alerts:Snooze"]}), Accepted),
        case("ApiKey", json!({"type": "SendYourData", "presets": ["SendData"]}), Accepted),
        case("ApiKey", json!({"type": "Personal", "user": "alice", "presets": ["Alerts"]}), Accepted),
        case("ApiKey", json!({"type": "Personal", "presets": ["Alerts"]}), Rejected(USER_REQUIRED)),
        key_with("user", json!("alice"), Rejected(USER_FORBIDDEN)),
        case("ApiKey", json!({"type": "SendYourData", "user": "a", "presets": ["SendData"]}), Rejected(USER_FORBIDDEN)),
        case("ApiKey", json!({"type": "Team"}), Rejected(NO_PERMISSIONS)),
        case("ApiKey", json!({"type": "Team", "presets": [], "permissions": []}), Rejected(NO_PERMISSIONS)),
        case(
            "ApiKey",
            json!({"type": "Personal", "user": "alice", "presets": ["Alerts"], "accessPolicyRef": {"name": "a"}}),
            Rejected(
                "spec.accessPolicyRef: Forbidden: only Team and SendYourData keys support access policies: remove accessPolicyRef",
            ),
        ),
        key_with("accessPolicyRef", json!({"name": "a"}), Accepted),
        key_with("active", json!(false), Accepted),
        key_with("displayName", json!("Ключ №1 🔑"), Accepted),
        // A rotation is not empty, and its overlap ends before the next one.
        key_with(
            "rotation",
            json!({}),
            Rejected("spec.rotation: Invalid value: rotation is empty: set every or requestedAt, or remove rotation"),
        ),
        key_with("rotation", json!({"every": "720h"}), Accepted),
        key_with("rotation", json!({"overlap": "24h"}), Accepted),
        key_with("rotation", json!({"requestedAt": "2026-11-23T10:00:00Z"}), Accepted),
        key_with("rotation", json!({"requestedAt": "2026-11-23T10:00:00Z", "overlap": "99999h"}), Accepted),
        key_with("rotation", json!({"every": "24h", "overlap": "24h"}), Rejected(OVERLAP_TOO_LONG)),
        key_with("rotation", json!({"every": "24h", "overlap": "25h"}), Rejected(OVERLAP_TOO_LONG)),
        key_with("rotation", json!({"every": "24h", "overlap": "86400s"}), Rejected(OVERLAP_TOO_LONG)),
        key_with("rotation", json!({"every": "24h", "overlap": "23h59m59s"}), Accepted),
        key_with("rotation", json!({"every": "24h", "overlap": "86399s"}), Accepted),
        key_with("rotation", json!({"every": "24h", "overlap": "0s"}), Accepted),
        key_with("rotation", json!({"every": "59s"}), Rejected(EVERY_TOO_SHORT)),
        key_with("rotation", json!({"every": "0h"}), Rejected(EVERY_TOO_SHORT)),
        key_with("rotation", json!({"every": "60s"}), Accepted),
        key_with("rotation", json!({"every": "1m"}), Accepted),
        key_with("rotation", json!({"every": "99999h99999m99999s"}), Accepted),
        key_with("secret", json!({}), Accepted),
        key_with("secret", json!({"name": "a.b-c", "key": "A_b.c-d"}), Accepted),
        key_with("secret", json!({"key": "a..b"}), Accepted),
        key_with("secret", json!({"key": "a b"}), Rejected(BAD_SECRET_KEY)),
        key_with("secret", json!({"key": "a/b"}), Rejected(BAD_SECRET_KEY)),
        key_with("secret", json!({"key": "é"}), Rejected(BAD_SECRET_KEY)),
        // The API server rejects these as keys of a Secret.
        key_with("secret", json!({"key": "."}), Rejected(SECRET_KEY_DOTS)),
        key_with("secret", json!({"key": ".."}), Rejected(SECRET_KEY_DOTS)),
        key_with("secret", json!({"key": "..data"}), Rejected(SECRET_KEY_DOTS)),
        key_with("secret", json!({"key": ".data"}), Accepted),
        key_with("secret", json!({"key": "sealed-value"}), Rejected(SECRET_KEY_SEALED)),
        key_with("secret", json!({"key": "claimed"}), Rejected(SECRET_KEY_SEALED)),
        // keywright.dev and its subdomains are reserved; similar names are not.
        key_with("secret", json!({"labels": {"keywright.dev/a": "b"}}), Rejected(RESERVED_LABEL)),
        key_with("secret", json!({"labels": {"a.keywright.dev/a": "b"}}), Rejected(RESERVED_LABEL)),
        key_with("secret", json!({"annotations": {"keywright.dev/a": "b"}}), Rejected(RESERVED_ANNOTATION)),
        key_with("secret", json!({"annotations": {"a.keywright.dev/a": "b"}}), Rejected(RESERVED_ANNOTATION)),
        key_with(
            "secret",
            json!({"labels": {"keywright.dev": "b", "notkeywright.dev/a": "b", "example.com/keywright.dev": "b"}}),
            Accepted,
        ),
        key_with("secret", json!({"annotations": {"keywright.dev.example.com/a": "b"}}), Accepted),
        // The default name of the Secret is seven characters longer.
        key_named(246, &json!({}), Accepted),
        key_named(247, &json!({"name": "short"}), Accepted),
        key_named(253, &json!({"name": "short"}), Accepted),
        key_named(
            247,
            &json!({}),
            Rejected(
                "<nil>: Invalid value: the name is too long for the default Secret name <name>-secret: use at most 246 characters, or set spec.secret.name",
            ),
        ),
        case("AccessPolicy", json!({"mode": "Private"}), Accepted),
        case("AccessPolicy", json!({"mode": "Advanced", "generalAccess": "NoAccess"}), Accepted),
        case(
            "AccessPolicy",
            json!({
                "mode": "Advanced", "generalAccess": "Read", "generalPolicyAccess": "NoAccess",
                "rules": [{"groups": ["sre"], "access": "Manage", "policyAccess": "Read"}],
            }),
            Accepted,
        ),
        case("AccessPolicy", json!({"mode": "Private", "generalAccess": "Read"}), Rejected(PRIVATE_WITH_SETTINGS)),
        case(
            "AccessPolicy",
            json!({"mode": "Private", "generalPolicyAccess": "Read"}),
            Rejected(PRIVATE_WITH_SETTINGS),
        ),
        case(
            "AccessPolicy",
            json!({"mode": "Private", "rules": [{"groups": ["a"], "access": "Read"}]}),
            Rejected(PRIVATE_WITH_SETTINGS),
        ),
        case(
            "AccessPolicy",
            json!({"mode": "Advanced"}),
            Rejected(
                "spec.generalAccess: Required value: an Advanced policy needs the access of users that no rule covers: set generalAccess to Manage, Read or NoAccess",
            ),
        ),
        case("SecuritySettings", json!({}), Accepted),
        case(
            "SecuritySettings",
            json!({"oneTimeReveal": true, "workloadSecrets": "Deny", "limits": {"maxLifetime": "2160h"}}),
            Accepted,
        ),
        case("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "age1a"}), Accepted),
        case("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-ed25519 AAAA"}), Accepted),
        case("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-rsa AAAA me@here"}), Accepted),
        case("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-dss AAAA"}), Rejected(BAD_RECIPIENT)),
        case("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": " age1a"}), Rejected(BAD_RECIPIENT)),
        (
            "SecuritySettings",
            "other".to_owned(),
            json!({}),
            Rejected("<nil>: Invalid value: a namespace has one SecuritySettings: name it default"),
        ),
        case("PermissionCatalog", json!({}), Accepted),
        case("PermissionCatalog", json!({"permissions": [{"name": "logs.data-api#high:Read"}]}), Accepted),
        case("PermissionCatalog", json!({"presets": [{"name": "a"}, {"name": "A"}]}), Accepted),
    ];
    for good in [
        "2099-06-01T00:00:00Z",
        "2099-12-31T23:59:59Z",
        "2099-02-28T12:00:00.5Z",
        "2099-06-01T00:00:00.123456789+14:00",
        "2099-06-01T00:00:00-23:59",
        // Later than the last time that the operator can represent.
        "9999-12-30T22:00:01Z",
        "9999-12-31T23:59:59Z",
    ] {
        cases.push(key_with("expiresAt", json!(good), Accepted));
        cases.push(key_with("rotation", json!({"requestedAt": good}), Accepted));
    }
    for bad in [
        "",
        "tomorrow",
        "2099-06-01",
        "2099-06-01T00:00:00",
        "2099-06-01 00:00:00Z",
        "2099-06-01T00:00Z",
        "99-06-01T00:00:00Z",
        "2099-00-01T00:00:00Z",
        "2099-13-01T00:00:00Z",
        "2099-06-00T00:00:00Z",
        "2099-06-32T00:00:00Z",
        "2099-06-01T24:00:00Z",
        "2099-06-01T00:60:00Z",
        "2099-06-01T00:00:00+24:00",
        "2099-06-01T00:00:00+0200",
        "2099-06-01T00:00:00.Z",
        "2099-06-01T00:00:00.1234567890Z",
        " 2099-06-01T00:00:00Z",
        "2099-06-01T00:00:00Z\n",
        "2099-06-01T00:00:00Z[UTC]",
    ] {
        cases.push(key_with("expiresAt", json!(bad), Rejected(BAD_EXPIRES_AT)));
        cases.push(key_with("rotation", json!({"requestedAt": bad}), Rejected(BAD_REQUESTED_AT)));
    }
    for small in ["2099-06-01t00:00:00Z", "2099-06-01T00:00:00z", "2099-06-01t00:00:00.5+01:00"] {
        cases.push(key_with("expiresAt", json!(small), Rejected(LOWERCASE_EXPIRES_AT)));
        cases.push(key_with("rotation", json!({"requestedAt": small}), Rejected(LOWERCASE_REQUESTED_AT)));
    }
    for leap in ["2099-06-30T23:59:60Z", "2099-06-30T23:59:60.5+01:00"] {
        cases.push(key_with("expiresAt", json!(leap), Rejected(LEAP_SECOND_EXPIRES_AT)));
        cases.push(key_with("rotation", json!({"requestedAt": leap}), Rejected(LEAP_SECOND_REQUESTED_AT)));
    }
    cases.extend(single_line_cases());
    for (kind, right) in [
        ("AlertsRulesTags", "Personal"),
        ("LogsQuery", "Personal"),
        ("Team", "Personal"),
        ("SendYourData", "SendYourData"),
        ("Scim", "Team"),
    ] {
        for key_type in ["Personal", "SendYourData", "Team"] {
            let mut spec = json!({"type": key_type, "legacy": kind, "secret": {"name": "old", "key": "token"}});
            if key_type == "Personal" {
                spec["user"] = json!("alice");
            }
            cases.push(case("ApiKey", spec, if key_type == right { Accepted } else { Rejected(LEGACY_TYPE) }));
        }
    }
    let secret = json!({"name": "old", "key": "token"});
    for (field, value, expected) in [
        ("presets", json!([]), Accepted),
        ("permissions", json!([]), Accepted),
        ("presets", json!(["Alerts"]), Rejected(LEGACY_WITH_PERMISSIONS)),
        ("permissions", json!(["alerts:Snooze"]), Rejected(LEGACY_WITH_PERMISSIONS)),
        ("rotation", json!({"every": "24h"}), Rejected(LEGACY_WITH_ROTATION)),
        ("secret", json!({"name": "old"}), Rejected(LEGACY_SECRET_REQUIRED)),
        ("secret", json!({"key": "token"}), Rejected(LEGACY_SECRET_REQUIRED)),
        ("secret", json!({"name": "old", "key": "token", "labels": {"a": "b"}}), Rejected(LEGACY_WITH_METADATA)),
        ("secret", json!({"name": "old", "key": "token", "annotations": {"a": "b"}}), Rejected(LEGACY_WITH_METADATA)),
        ("expiresAt", json!("2099-06-01T00:00:00Z"), Accepted),
        ("active", json!(false), Accepted),
    ] {
        let mut spec = json!({"type": "Team", "legacy": "Scim", "secret": secret});
        spec[field] = value;
        cases.push(case("ApiKey", spec, expected));
    }
    cases.push(case("ApiKey", json!({"type": "Team", "legacy": "Scim"}), Rejected(LEGACY_SECRET_REQUIRED)));
    for bad in ["", "1", "h", "1d", "1.5h", "-1h", "+1h", "1H", "100000h", "1h 2m", "1h2m3s4s", "1ms", "PT1H", "1h\n"] {
        cases.push(key_with("rotation", json!({"every": bad}), Rejected(BAD_EVERY)));
        cases.push(key_with("rotation", json!({"overlap": bad}), Rejected(BAD_OVERLAP)));
        cases.push(case("SecuritySettings", json!({"eraseUnrevealedAfter": bad}), Rejected(BAD_ERASE_AFTER)));
        let limit = |name: &str, text| case("SecuritySettings", json!({"limits": {name: bad}}), Rejected(text));
        cases.push(limit(
            "maxLifetime",
            "spec.limits.maxLifetime: Invalid value: must be a duration such as 720h, 90m or 1h30m",
        ));
        cases.push(limit(
            "maxRotationInterval",
            "spec.limits.maxRotationInterval: Invalid value: must be a duration such as 720h, 90m or 1h30m",
        ));
        cases.push(limit(
            "deactivateUnusedAfter",
            "spec.limits.deactivateUnusedAfter: Invalid value: must be a duration such as 720h, 90m or 1h30m",
        ));
    }
    let max_interval = |every: &str| json!({"limits": {"maxRotationInterval": every}});
    let text = "spec.limits.maxRotationInterval: Invalid value: must be at least 1m, the minimum of rotation.every";
    cases.push(case("SecuritySettings", max_interval("59s"), Rejected(text)));
    cases.push(case("SecuritySettings", max_interval("60s"), Accepted));
    for bad in ["Upper", "under_score", "-a", "a-", ".a", "a.", "a..b", "a b", "a/b", "é"] {
        cases.push(key_with("secret", json!({"name": bad}), Rejected(BAD_SECRET_NAME)));
    }
    cases
}

/// Characters that change how text is displayed, or break lines, in each field with free text or names.
fn single_line_cases() -> Vec<Create> {
    macro_rules! line {
        ($field:literal) => {
            Rejected(concat!(
                $field,
                ": Invalid value: must not have control characters, line ends or characters that change the direction of text"
            ))
        };
    }
    let mut cases = vec![
        key_with("displayName", json!("\u{1f469}\u{200d}\u{1f4bb} caf\u{e9} \u{5d0}\u{5d1}"), Accepted),
        case("PermissionCatalog", json!({"description": "one line\nand another"}), Accepted),
        case(
            "PermissionCatalog",
            json!({"description": "one line\rand another"}),
            Rejected(
                "spec.description: Invalid value: must not have control characters other than line feeds, nor characters that change the direction of text",
            ),
        ),
    ];
    for bad in [
        "a\nb",
        "a\rb",
        "a\n",
        "a\tb",
        "\u{0}",
        "\u{1b}[1m",
        "\u{7f}",
        "\u{85}",
        "\u{61c}",
        "\u{200e}",
        "\u{200f}",
        "\u{2028}",
        "\u{2029}",
        "a\u{202a}b",
        "a\u{202e}b",
        "a\u{2066}b",
        "a\u{2069}b",
    ] {
        cases.push(key_with("displayName", json!(bad), line!("spec.displayName")));
        let personal = json!({"type": "Personal", "user": bad, "presets": ["Alerts"]});
        cases.push(case("ApiKey", personal, line!("spec.user")));
        cases.push(key_with("presets", json!([bad]), line!("spec.presets[0]")));
        cases.push(key_with("permissions", json!([bad]), line!("spec.permissions[0]")));
        cases.push(key_with("accessPolicyRef", json!({"name": bad}), line!("spec.accessPolicyRef.name")));
        let rules = json!([{"groups": ["sre", bad], "access": "Read"}]);
        let policy = json!({"mode": "Advanced", "generalAccess": "Read", "rules": rules});
        cases.push(case("AccessPolicy", policy, line!("spec.rules[0].groups[1]")));
        cases.push(case("SecuritySettings", json!({"dataScopedGroups": [bad]}), line!("spec.dataScopedGroups[0]")));
        let reveal = json!({"apiKeyRef": {"name": bad}, "recipient": "age1a"});
        cases.push(case("KeyReveal", reveal, line!("spec.apiKeyRef.name")));
        let catalog = |list: &str, field: &str, expected| {
            let mut entry = json!({"name": "a:A"});
            if list == "presets" {
                entry["name"] = json!("a");
            }
            entry[field] = json!(bad);
            case("PermissionCatalog", json!({list: [entry]}), expected)
        };
        cases.extend([
            catalog("permissions", "description", line!("spec.permissions[0].description")),
            catalog("permissions", "group", line!("spec.permissions[0].group")),
            catalog("presets", "description", line!("spec.presets[0].description")),
            catalog("presets", "note", line!("spec.presets[0].note")),
            catalog("roles", "name", line!("spec.roles[0].name")),
            catalog("roles", "description", line!("spec.roles[0].description")),
            catalog("legacyRoles", "name", line!("spec.legacyRoles[0].name")),
            catalog("legacyRoles", "legacyKey", line!("spec.legacyRoles[0].legacyKey")),
        ]);
    }
    cases
}

#[tokio::test]
async fn invalid_objects_are_rejected_with_the_message_of_the_rule_and_similar_valid_ones_accepted() {
    let team = Team::new().await;
    let mut cases = vec![];
    for (kind, name, spec, expected) in creates() {
        let object = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
        });
        cases.push((format!("{kind} {}: {spec}", name.len()), api_for(&team, kind).await, object, expected));
    }
    assert_cases(cases).await;
}

#[tokio::test]
async fn a_key_with_512_permissions_and_64_presets_is_minted() {
    let team = Team::new().await;
    let permissions: Vec<_> = (0..512).map(|n| format!("cel-largest:{}{n:03}", "A".repeat(113))).collect();
    let presets: Vec<_> = (0..64).map(|n| format!("cel-largest-{}{n:02}", "a".repeat(114))).collect();
    assert_eq!((permissions[0].len(), presets[0].len()), (128, 128));
    let named = |names: &[String]| -> Vec<Value> { names.iter().map(|name| json!({"name": name})).collect() };
    team.apply_large(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": "cel-largest"},
        "spec": {"permissions": named(&permissions), "presets": named(&presets)},
    }));
    team.wait_until_condition("permissioncatalog/cel-largest", "Accepted", "True", "Accepted").await;
    team.apply_large(&api_key("largest", &json!({"type": "Team", "presets": presets, "permissions": permissions})));
    let key = team.wait_until_condition("apikey/largest", "Ready", "True", "Active").await;
    assert_eq!(key["status"]["permissions"], json!(permissions));
    assert_eq!(key["status"]["presets"], json!(presets));
    team.kubectl(&["delete", "permissioncatalog/cel-largest"]);
}

/// The operator can represent times until 9999-12-30T22:00:00Z only.
#[tokio::test]
async fn a_key_that_expires_at_the_last_time_of_rfc_3339_is_active() {
    let team = Team::new().await;
    let last = "9999-12-31T23:59:59Z";
    let rotation = json!({"requestedAt": "9999-12-31T00:00:00+01:00", "overlap": "0s"});
    for (name, rotation) in [("last", Value::Null), ("last-rotation", rotation)] {
        let mut spec = json!({"type": "Team", "presets": ["Alerts"], "expiresAt": last});
        if !rotation.is_null() {
            spec["rotation"] = rotation;
        }
        team.apply(&api_key(name, &spec));
        let key = team.wait_until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
        assert_eq!(key["spec"]["expiresAt"], last);
        assert_eq!(key["status"]["state"], "Active");
        let expiry = key["status"]["tokens"][0]["expiresAt"].as_str().unwrap();
        assert!(expiry.starts_with("9999-12-30T22:00:00"), "{expiry}");
    }
    // The operator can still read and reconcile the key.
    team.kubectl(&["patch", "apikey/last", "--type=merge", "-p", r#"{"spec": {"active": false}}"#]);
    team.wait_until("apikey/last", "Inactive", |key| key["status"]["state"] == "Inactive").await;
}

// --- Rules for changes -----------------------------------------------------------------------------------------------

const TYPE_IMMUTABLE: &str = "spec.type: Invalid value: type is immutable: delete this ApiKey and create another";
const USER_IMMUTABLE: &str = "spec.user: Invalid value: user is immutable: delete this ApiKey and create another";
const SECRET_NAME_IMMUTABLE: &str = "spec.secret: Invalid value: secret.name is immutable, since the value is written once: delete this ApiKey and create another";
const SECRET_KEY_IMMUTABLE: &str = "spec.secret: Invalid value: secret.key is immutable, since the value is written once: delete this ApiKey and create another";

const REVEAL_IMMUTABLE: &str = "spec: Invalid value: a KeyReveal is immutable: create another";
const LEGACY_IMMUTABLE: &str = "spec.legacy: Invalid value: legacy is immutable: delete this ApiKey and create another";

/// Name of the stored key, merge patch of its spec and expected result.
fn updates() -> Vec<(&'static str, Value, Expected)> {
    vec![
        ("team", json!({"type": "SendYourData", "presets": ["SendData"]}), Rejected(TYPE_IMMUTABLE)),
        ("team", json!({"type": "Personal", "user": "alice"}), Rejected(TYPE_IMMUTABLE)),
        ("personal", json!({"type": "Team", "user": null}), Rejected(TYPE_IMMUTABLE)),
        ("personal", json!({"user": "bob"}), Rejected(USER_IMMUTABLE)),
        ("personal", json!({"user": null}), Rejected(USER_REQUIRED)),
        ("personal", json!({"user": "alice", "displayName": "x"}), Accepted),
        // An absent field and its explicit default are equal.
        ("team", json!({"secret": {}}), Accepted),
        ("team", json!({"secret": {"name": "team-secret"}}), Accepted),
        ("team", json!({"secret": {"name": "team-secret", "key": "key-value"}}), Accepted),
        ("team", json!({"secret": {"key": "key-value"}}), Accepted),
        ("team", json!({"secret": {"labels": {"a": "b"}}}), Accepted),
        ("team", json!({"secret": {"name": "other"}}), Rejected(SECRET_NAME_IMMUTABLE)),
        ("team", json!({"secret": {"key": "other"}}), Rejected(SECRET_KEY_IMMUTABLE)),
        ("default", json!({"secret": null}), Accepted),
        ("default", json!({"secret": {"name": null}}), Accepted),
        ("default", json!({"secret": {"key": null}}), Accepted),
        ("default", json!({"secret": {"name": "other"}}), Rejected(SECRET_NAME_IMMUTABLE)),
        ("default", json!({"secret": {"key": "other"}}), Rejected(SECRET_KEY_IMMUTABLE)),
        ("custom", json!({"secret": {"labels": {"a": "b"}}}), Accepted),
        ("custom", json!({"secret": {"name": null}}), Rejected(SECRET_NAME_IMMUTABLE)),
        ("custom", json!({"secret": {"key": null}}), Rejected(SECRET_KEY_IMMUTABLE)),
        ("custom", json!({"secret": {"name": "custom-secret"}}), Rejected(SECRET_NAME_IMMUTABLE)),
        ("custom", json!({"secret": {"key": "key-value"}}), Rejected(SECRET_KEY_IMMUTABLE)),
        // All other fields are mutable; the rules still apply.
        ("team", json!({"displayName": "x", "active": false, "expiresAt": "2099-01-01T00:00:00Z"}), Accepted),
        ("team", json!({"presets": ["Dashboards"], "permissions": ["alerts:Snooze"]}), Accepted),
        ("team", json!({"rotation": {"every": "24h", "overlap": "1h"}}), Accepted),
        ("team", json!({"rotation": {"every": "24h", "overlap": "24h"}}), Rejected(OVERLAP_TOO_LONG)),
        ("team", json!({"presets": null}), Rejected(NO_PERMISSIONS)),
        ("team", json!({"user": "alice"}), Rejected(USER_FORBIDDEN)),
        ("legacy", json!({"active": false}), Accepted),
        ("legacy", json!({"legacy": null, "permissions": ["alerts:Snooze"]}), Rejected(LEGACY_IMMUTABLE)),
        ("legacy-logs", json!({"legacy": "Team"}), Rejected(LEGACY_IMMUTABLE)),
        (
            "personal",
            json!({"legacy": "Team", "presets": null, "secret": {"name": "personal-secret", "key": "key-value"}}),
            Rejected(LEGACY_IMMUTABLE),
        ),
    ]
}

#[tokio::test]
async fn type_user_secret_and_legacy_of_a_key_are_immutable() {
    let team = Team::new().await;
    let stored = [
        ("team", json!({"type": "Team", "presets": ["Alerts"]})),
        ("personal", json!({"type": "Personal", "user": "alice", "presets": ["Alerts"]})),
        (
            "default",
            json!({"type": "Team", "presets": ["Alerts"], "secret": {"name": "default-secret", "key": "key-value"}}),
        ),
        ("custom", json!({"type": "Team", "presets": ["Alerts"], "secret": {"name": "own", "key": "KEY"}})),
        ("legacy", json!({"type": "Team", "legacy": "Scim", "secret": {"name": "old-scim", "key": "token"}})),
        (
            "legacy-logs",
            json!({"type": "Personal", "user": "a", "legacy": "LogsQuery", "secret": {"name": "old-logs", "key": "token"}}),
        ),
    ];
    for secret in ["old-scim", "old-logs"] {
        let data = json!({"token": format!("a value of {secret} with twenty characters or more")});
        team.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "stringData": data}));
    }
    for (name, spec) in &stored {
        team.apply(&api_key(name, spec));
        // The operator does not write to a Ready key, so its resourceVersion stays valid.
        team.wait_until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
    }
    let api = api_for(&team, "ApiKey").await;
    let mut cases = vec![];
    for (name, patch, expected) in updates() {
        let mut object = team.get(&format!("apikey/{name}"));
        merge(&mut object["spec"], &patch);
        cases.push((format!("{name}: {patch}"), api.clone(), object, expected));
    }
    assert_cases(cases).await;
}

#[tokio::test]
async fn the_spec_of_a_key_reveal_is_immutable() {
    let team = Team::new().await;
    let reveal = |recipient: &str| {
        json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"name": "r"},
            "spec": {"apiKeyRef": {"name": "nothing"}, "recipient": recipient},
        })
    };
    team.apply(&reveal("age1a"));
    let api = api_for(&team, "KeyReveal").await;
    let mut cases = vec![];
    for (recipient, expected) in [("age1a", Accepted), ("age1b", Rejected(REVEAL_IMMUTABLE))] {
        let mut object = team.get("keyreveal/r");
        object["spec"]["recipient"] = json!(recipient);
        cases.push((recipient.to_owned(), api.clone(), object, expected));
    }
    assert_cases(cases).await;
}

/// Applies a JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else { return target.clone_from(patch) };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut target[name], value);
        }
    }
}
