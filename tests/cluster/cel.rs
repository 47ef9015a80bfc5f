//! What the apiserver refuses by the CRDs alone, with the exact text, and the nearest that it accepts.
//!
//! Three tables: the bounds of every field (`BOUNDS`), what one object may say (`CREATES`), what may change (`UPDATES`).
//! That none is forgotten is a test of its own: the tables are held against the CRDs.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use keywright::api;
use kube::api::{Api, DynamicObject, GroupVersionKind, PostParams};
use kube::discovery::pinned_kind;
use serde_json::{Value, json};

use crate::{Team, api_key};

/// What is said of an object.
#[derive(Debug)]
enum Answer {
    Accepted,
    /// By the apiserver: one `field: message` a cause, as kubectl prints them.
    Refused(Vec<String>),
}

async fn apis(team: &Team, kind: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("keywright.dev", "v1alpha1", kind);
    let (resource, _) = pinned_kind(&team.client, &gvk).await.unwrap();
    if kind == "PermissionCatalog" {
        Api::all_with(team.client.clone(), &resource)
    } else {
        Api::namespaced_with(team.client.clone(), &team.namespace, &resource)
    }
}

/// Asks by dry run: a create, or an update if there is a `resourceVersion`.
async fn ask(api: &Api<DynamicObject>, object: &Value) -> Answer {
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let parsed: DynamicObject = serde_json::from_value(object.clone()).unwrap();
    let answer = match object["metadata"]["resourceVersion"] {
        Value::Null => api.create(&dry_run, &parsed).await,
        _ => api.replace(object["metadata"]["name"].as_str().unwrap(), &dry_run, &parsed).await,
    };
    let status = match answer {
        Ok(_) => return Answer::Accepted,
        Err(kube::Error::Api(status)) => status,
        Err(error) => panic!("{error}"),
    };
    let details = status.details.unwrap_or_else(|| panic!("{}", status.message));
    // Kubernetes 1.33 shows objects as Go does.
    let causes = details
        .causes
        .iter()
        .map(|cause| format!("{}: {}", cause.field, cause.message).replace("map[string]interface {}", ""));
    // What the apiserver adds to an error of the schema.
    Answer::Refused(causes.filter(|cause| !cause.ends_with(UNCHECKED)).collect())
}

const UNCHECKED: &str = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";

/// Whether the refusal is exactly this one. The apiserver shows the value after `Invalid value: `, in other ways in
/// other versions; here it is left out.
fn is(cause: &str, expected: &str) -> bool {
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
    Refused(&'static str),
}
use Expected::{Accepted, Refused};

fn holds(answer: &Answer, expected: &Expected) -> bool {
    match (answer, expected) {
        (Answer::Accepted, Accepted) => true,
        (Answer::Refused(causes), Refused(text)) => matches!(causes.as_slice(), [one] if is(one, text)),
        _ => false,
    }
}

/// Asks all at once, and tells all differences and not only the first.
async fn check(cases: Vec<(String, Api<DynamicObject>, Value, Expected)>) {
    assert!(!cases.is_empty());
    let wrong: Vec<String> = stream::iter(cases)
        .map(async |(title, api, object, expected)| {
            let answer = ask(&api, &object).await;
            let wanted = match expected {
                Accepted => "accepted".to_owned(),
                Refused(text) => format!("refused: {text}"),
            };
            (!holds(&answer, &expected)).then(|| format!("{title}\n    wanted {wanted}\n    got    {answer:?}"))
        })
        .buffered(16)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} are not as they should be:\n{}", wrong.len(), wrong.join("\n"));
}

// --- The bounds of every field ---------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Bound {
    /// The shortest text.
    Shortest(usize),
    /// The longest text, in characters.
    Longest(usize),
    /// The most entries of a list.
    Items(usize),
    /// The fewest entries of a list.
    Fewest(usize),
    /// The most entries of a map.
    Entries(usize),
    /// No entry twice.
    Set,
    /// No name twice.
    Names,
    /// One of these words.
    Words(&'static [&'static str]),
    /// The pattern.
    Pattern(&'static str),
    /// Cannot be left out.
    Required,
}
use Bound::{Entries, Fewest, Items, Longest, Names, Pattern, Required, Set, Shortest, Words};

const NAME: &[Bound] = &[Required, Shortest(1), Longest(128)];
const LEVELS: Bound = Words(&["NoAccess", "Read", "Manage"]);
const EVIDENCE: &[Bound] = &[Words(&["Documented", "Inferred", "Mixed", "Unknown"])];
/// Texts of one line, where there are too many for a rule of CEL.
const LINE: &str = r"^[^\p{Cc}\x{61C}\x{200E}\x{200F}\x{2028}-\x{202E}\x{2066}-\x{2069}]*$";
const PERMISSION_ITEM: &[Bound] = &[Shortest(3), Longest(128), Pattern(LINE)];

/// Kind, field of the spec, bounds.
const BOUNDS: &[(&str, &str, &[Bound])] = &[
    ("ApiKey", "displayName", &[Shortest(1), Longest(128)]),
    ("ApiKey", "type", &[Required, Words(&["Personal", "SendYourData", "Team"])]),
    ("ApiKey", "user", &[Shortest(1), Longest(256)]),
    ("ApiKey", "presets", &[Items(64), Set]),
    ("ApiKey", "presets[]", &[Shortest(1), Longest(128)]),
    ("ApiKey", "permissions", &[Items(512), Set]),
    ("ApiKey", "permissions[]", &[Shortest(1), Longest(128)]),
    ("ApiKey", "accessPolicyRef.name", &[Required, Shortest(1), Longest(253)]),
    ("ApiKey", "legacy", &[Words(&["AlertsRulesTags", "LogsQuery", "Team", "SendYourData", "Scim"])]),
    ("ApiKey", "expiresAt", &[Longest(40)]),
    ("ApiKey", "rotation.every", &[Longest(24)]),
    ("ApiKey", "rotation.overlap", &[Longest(24)]),
    ("ApiKey", "rotation.requestedAt", &[Longest(40)]),
    ("ApiKey", "secret.name", &[Shortest(1), Longest(253)]),
    ("ApiKey", "secret.key", &[Shortest(1), Longest(253)]),
    ("ApiKey", "secret.labels", &[Entries(32)]),
    ("ApiKey", "secret.labels[entry]", &[Longest(63)]),
    ("ApiKey", "secret.annotations", &[Entries(32)]),
    ("ApiKey", "secret.annotations[entry]", &[Longest(4096)]),
    ("AccessPolicy", "mode", &[Required, Words(&["Private", "Advanced"])]),
    ("AccessPolicy", "rules", &[Items(64)]),
    ("AccessPolicy", "rules[].groups", &[Required, Fewest(1), Items(64), Set]),
    ("AccessPolicy", "rules[].groups[]", &[Shortest(1), Longest(256)]),
    ("AccessPolicy", "rules[].access", &[Required, LEVELS]),
    ("AccessPolicy", "rules[].policyAccess", &[LEVELS]),
    ("AccessPolicy", "generalAccess", &[LEVELS]),
    ("AccessPolicy", "generalPolicyAccess", &[LEVELS]),
    ("SecuritySettings", "workloadSecrets", &[Words(&["Allow", "Deny"])]),
    ("SecuritySettings", "eraseUnrevealedAfter", &[Longest(24)]),
    ("SecuritySettings", "limits.maxLifetime", &[Longest(24)]),
    ("SecuritySettings", "limits.maxRotationInterval", &[Longest(24)]),
    ("SecuritySettings", "limits.deactivateUnusedAfter", &[Longest(24)]),
    ("SecuritySettings", "dataScopedGroups", &[Items(128), Set]),
    ("SecuritySettings", "dataScopedGroups[]", &[Shortest(1), Longest(256)]),
    ("KeyReveal", "apiKeyRef", &[Required]),
    ("KeyReveal", "apiKeyRef.name", &[Required, Shortest(1), Longest(253)]),
    ("KeyReveal", "recipient", &[Required, Shortest(1), Longest(4096)]),
    ("KeyReveal", "requester.username", &[Required]),
    ("PermissionCatalog", "description", &[Longest(4096)]),
    ("PermissionCatalog", "permissions", &[Items(2000), Names]),
    (
        "PermissionCatalog",
        "permissions[].name",
        &[Required, Shortest(3), Longest(128), Pattern("^[A-Za-z0-9][A-Za-z0-9._#-]*:[A-Za-z0-9][A-Za-z0-9._#-]*$")],
    ),
    ("PermissionCatalog", "permissions[].description", &[Longest(512)]),
    ("PermissionCatalog", "permissions[].group", &[Longest(128)]),
    ("PermissionCatalog", "permissions[].levels", &[Items(2), Set]),
    ("PermissionCatalog", "permissions[].levels[]", &[Words(&["Team", "Organization"])]),
    ("PermissionCatalog", "permissions[].rolesEvidence", EVIDENCE),
    ("PermissionCatalog", "permissions[].sources", &[Items(16)]),
    ("PermissionCatalog", "permissions[].sources[]", &[Longest(512), Pattern(LINE)]),
    ("PermissionCatalog", "presets", &[Items(500), Names]),
    (
        "PermissionCatalog",
        "presets[].name",
        &[Required, Shortest(1), Longest(128), Pattern("^[A-Za-z0-9][A-Za-z0-9._-]*$")],
    ),
    ("PermissionCatalog", "presets[].description", &[Longest(512)]),
    ("PermissionCatalog", "presets[].permissions", &[Items(1000)]),
    ("PermissionCatalog", "presets[].permissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].evidence", EVIDENCE),
    ("PermissionCatalog", "presets[].completeness", &[Words(&["Likely", "Partial", "Unverified", "Unknown"])]),
    ("PermissionCatalog", "presets[].inferred", &[Items(1000)]),
    ("PermissionCatalog", "presets[].inferred[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].uncertain", &[Items(1000)]),
    ("PermissionCatalog", "presets[].uncertain[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].peoplePermissions", &[Items(1000)]),
    ("PermissionCatalog", "presets[].peoplePermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "presets[].note", &[Longest(1024)]),
    ("PermissionCatalog", "presets[].sources", &[Items(16)]),
    ("PermissionCatalog", "presets[].sources[]", &[Longest(512), Pattern(LINE)]),
    ("PermissionCatalog", "roles", &[Items(100), Names]),
    ("PermissionCatalog", "roles[].name", NAME),
    ("PermissionCatalog", "roles[].description", &[Longest(512)]),
    ("PermissionCatalog", "roles[].evidence", EVIDENCE),
    ("PermissionCatalog", "roles[].documentedPermissions", &[Items(2000)]),
    ("PermissionCatalog", "roles[].documentedPermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "roles[].inferredPermissions", &[Items(2000)]),
    ("PermissionCatalog", "roles[].inferredPermissions[]", PERMISSION_ITEM),
    ("PermissionCatalog", "legacyRoles", &[Items(100), Names]),
    ("PermissionCatalog", "legacyRoles[].name", NAME),
    ("PermissionCatalog", "legacyRoles[].permissions", &[Items(1000)]),
    ("PermissionCatalog", "legacyRoles[].permissions[]", PERMISSION_ITEM),
    (
        "PermissionCatalog",
        "legacyRoles[].legacyKind",
        &[Words(&["AlertsRulesTags", "LogsQuery", "Team", "SendYourData", "Scim"])],
    ),
    ("PermissionCatalog", "legacyRoles[].legacyKey", &[Longest(128)]),
    ("PermissionCatalog", "legacyRoles[].legacyKeyEvidence", EVIDENCE),
];

/// An object of the kind whose lists have an entry, so that any field of it can be set.
fn full(kind: &str) -> Value {
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

/// Sets (or, with null, takes out) a field that is named as in `BOUNDS`.
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

/// Entries for a list that differ from each other and satisfy the items' own schema.
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

/// Values just outside and just inside the bound, and what the apiserver says of the one outside.
fn probe(kind: &str, field: &str, bound: Bound) -> (Value, String, Value) {
    let path = format!("spec.{}", field.replace("[entry]", ".entry").replace("[]", "[0]"));
    // Fits the pattern of every name, which needs a colon in permissions.
    let text = |length: usize| if length < 3 { "a".repeat(length) } else { format!("a:{}", "A".repeat(length - 2)) };
    let text = |length| if field == "presets[].name" { "a".repeat(length) } else { text(length) };
    // Characters and not bytes.
    let wide = |length| {
        if matches!(field, "displayName" | "permissions[].description") { "é".repeat(length) } else { text(length) }
    };
    match bound {
        Shortest(n) => (
            json!(text(n - 1)),
            format!("{path}: Invalid value: {path} in body should be at least {n} chars long"),
            json!(text(n)),
        ),
        Longest(n) => (json!(text(n + 1)), format!("{path}: Too long: may not be more than {n} bytes"), json!(wide(n))),
        Items(n) => (
            entries(kind, field, n + 1),
            format!("{path}: Too many: {}: must have at most {n} items", n + 1),
            entries(kind, field, n),
        ),
        Fewest(n) => (
            entries(kind, field, n - 1),
            format!("{path}: Invalid value: {path} in body should have at least {n} items"),
            entries(kind, field, n),
        ),
        Entries(n) => {
            let map = |n| (0..n).map(|n| (format!("entry{n}"), json!("a"))).collect::<serde_json::Map<_, _>>();
            (json!(map(n + 1)), format!("{path}: Too many: {}: must have at most {n} items", n + 1), json!(map(n)))
        }
        Set => {
            let (one, other) = if field == "permissions[].levels" { ("Team", "Organization") } else { ("a:A", "b:B") };
            (json!([one, one]), format!("{path}[1]: Duplicate value: \"{one}\""), json!([one, other]))
        }
        Names => {
            let list = |a: &str, b: &str| json!([{"name": a}, {"name": b}]);
            (list("a:A", "a:A"), format!("{path}[1]: Duplicate value: {{\"name\":\"a:A\"}}"), list("a:A", "a:B"))
        }
        Words(words) => {
            let known: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
            let text = format!("{path}: Unsupported value: \"Other\": supported values: {}", known.join(", "));
            (json!("Other"), text, json!(words[0]))
        }
        Pattern(LINE) => (
            json!("a:A\u{202e}"),
            format!("{path}: Invalid value: {path} in body should match '{LINE}'"),
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
async fn every_bound_of_every_field_is_held_with_its_text_and_not_sooner() {
    let team = Team::new().await;
    let mut probes = vec![];
    for (kind, field, bounds) in BOUNDS {
        let api = apis(&team, kind).await;
        for bound in *bounds {
            let (outside, text, inside) = probe(kind, field, *bound);
            let objects = [outside, inside].map(|value| {
                let mut object = full(kind);
                set(&mut object, field, &value);
                object
            });
            probes.push((format!("{kind} {field} {bound:?}"), api.clone(), objects, text, *bound));
        }
    }
    let wrong: Vec<String> = stream::iter(probes)
        .map(async |(title, api, [outside, inside], text, bound)| {
            let refused = ask(&api, &outside).await;
            let named = matches!(&refused, Answer::Refused(causes) if causes.iter().any(|cause| is(cause, &text)));
            // What the cluster writes over can't be wrong.
            if title.starts_with("KeyReveal requester.") {
                return (!matches!(refused, Answer::Accepted)).then(|| format!("{title}: {refused:?}"));
            }
            if !named {
                return Some(format!("{title}\n    wanted {text}\n    got    {refused:?}"));
            }
            if bound == Required {
                return None;
            }
            // Other rules may refuse the text of this length (a time of 40 letters); this bound must not.
            let accepted = ask(&api, &inside).await;
            let (field, message) = text.split_once(": ").unwrap();
            let message = message.trim_start_matches("Invalid value: ").split(": must have").next().unwrap();
            let again = matches!(&accepted, Answer::Refused(causes)
                if causes.iter().any(|cause| cause.starts_with(field) && cause.contains(message)));
            again.then(|| format!("{title}: refused inside the bound: {accepted:?}"))
        })
        .buffered(16)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} are not as they should be:\n{}", wrong.len(), wrong.join("\n"));
}

/// All bounds that the schema has, in the form of `BOUNDS`.
fn bounds_of(kind: &str, field: &str, schema: &Value, required: bool, found: &mut BTreeSet<String>) {
    type Make = fn(usize) -> Bound;
    let number = |name: &str| schema[name].as_u64().map(|n| usize::try_from(n).unwrap());
    let mut add = |bound: String| {
        found.insert(format!("{kind} {field} {bound}"));
    };
    let numbers: [(&str, Make); 5] = [
        ("minLength", Shortest),
        ("maxLength", Longest),
        ("maxItems", Items),
        ("minItems", Fewest),
        ("maxProperties", Entries),
    ];
    for (name, bound) in numbers {
        if let Some(n) = number(name) {
            add(format!("{:?}", bound(n)));
        }
    }
    match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => add(format!("{Set:?}")),
        Some("map") => add(format!("{Names:?}")),
        _ => {}
    }
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
        add(format!("Words({words:?})"));
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
        bounds_of(kind, &below_field, below, is_required(name), found);
    }
    if schema["items"].is_object() {
        bounds_of(kind, &format!("{field}[]"), &schema["items"], false, found);
    }
    if schema["additionalProperties"].is_object() {
        bounds_of(kind, &format!("{field}[entry]"), &schema["additionalProperties"], false, found);
    }
}

#[test]
fn the_tables_have_every_bound_and_every_rule_of_the_crds() {
    let mut found = BTreeSet::new();
    let mut messages = BTreeSet::new();
    for crd in api::crds() {
        let crd = serde_json::to_value(crd).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        bounds_of(crd["spec"]["names"]["kind"].as_str().unwrap(), "", &schema["properties"]["spec"], false, &mut found);
        collect_messages(schema, &mut messages);
    }
    let listed = BOUNDS
        .iter()
        .flat_map(|(kind, field, bounds)| bounds.iter().map(move |bound| format!("{kind} {field} {bound:?}")));
    let listed: BTreeSet<String> = listed.collect();
    let missing: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(missing.is_empty() && gone.is_empty(), "not in BOUNDS: {missing:#?}\nnot in the CRDs: {gone:#?}");

    assert!(messages.len() > 15, "{messages:#?}");
    let texts: Vec<_> = creates()
        .into_iter()
        .map(|(.., expected)| expected)
        .chain(updates().into_iter().map(|(.., expected)| expected))
        .chain([Refused(CHANGED)])
        .filter_map(|expected| if let Refused(text) = expected { Some(text) } else { None })
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

// --- What one object may say -----------------------------------------------------------------------------------------

const NO_USER: &str = "spec.user: Required value: a Personal key belongs to one user: set user to that user's name";
const NO_USER_HERE: &str = "spec.user: Forbidden: only a Personal key has a user: remove user, or set type to Personal";
const EMPTY: &str = "spec: Invalid value: a key needs at least one entry in presets or permissions";
const NO_TIME: &str = "spec.expiresAt: Invalid value: must be an RFC 3339 time such as 2027-06-01T00:00:00Z";
const NO_REQUEST: &str =
    "spec.rotation.requestedAt: Invalid value: must be an RFC 3339 time such as 2026-11-23T10:00:00Z";
const SMALL: &str = "spec.expiresAt: Invalid value: must have T and Z in upper case, as in 2027-06-01T00:00:00Z";
const SMALL_REQUEST: &str =
    "spec.rotation.requestedAt: Invalid value: must have T and Z in upper case, as in 2026-11-23T10:00:00Z";
const LEAP: &str = "spec.expiresAt: Invalid value: must not have 60 seconds, since leap seconds are not supported";
const LEAP_REQUEST: &str =
    "spec.rotation.requestedAt: Invalid value: must not have 60 seconds, since leap seconds are not supported";
const NO_EVERY: &str = "spec.rotation.every: Invalid value: must be a duration such as 720h, 90m or 1h30m";
const NO_OVERLAP: &str = "spec.rotation.overlap: Invalid value: must be a duration such as 24h, 30m or 0s";
const TOO_OFTEN: &str = "spec.rotation.every: Invalid value: must be at least 1m";
const OVERLAPS: &str = "spec.rotation.overlap: Invalid value: overlap must be shorter than every, or more than two values would work at once";
const SECRET_NAME: &str = "spec.secret.name: Invalid value: must be a Secret name: lower case letters, digits, - and ., at most 253 characters";
const SECRET_KEY_DOTS: &str = "spec.secret.key: Invalid value: must not be . and not begin with ..";
const SECRET_KEY_SEALED: &str =
    "spec.secret.key: Invalid value: sealed-value and claimed are where sealed values are: choose another key";
const SECRET_KEY: &str = "spec.secret.key: Invalid value: must consist of letters, digits, -, _ and .";
const RESERVED_LABEL: &str = "spec.secret.labels: Invalid value: keys of keywright.dev are reserved";
const RESERVED_ANNOTATION: &str = "spec.secret.annotations: Invalid value: keys of keywright.dev are reserved";
const PRIVATE: &str = "spec: Invalid value: a Private policy has no further settings: remove rules, generalAccess and generalPolicyAccess, or set mode to Advanced";
const NO_ERASE: &str = "spec.eraseUnrevealedAfter: Invalid value: must be a duration such as 720h, 90m or 1h30m";
const NOT_BOTH: &str = "spec.legacy: Forbidden: what a legacy key may do is fixed by its kind: remove presets and permissions, or remove legacy and make a custom key";
const NO_LEGACY_ROTATION: &str = "spec.rotation: Forbidden: a legacy key can't be minted, so it can't be rotated: remove rotation, and replace the key by a custom one (kubectl keywright migrate)";
const LEGACY_SECRET: &str = "spec.secret: Required value: a legacy key is imported from a Secret that exists: set secret.name and secret.key to where its value is";
const LEGACY_METADATA: &str =
    "spec.secret: Forbidden: the Secret of a legacy key is never written: remove secret.labels and secret.annotations";
const LEGACY_TYPE: &str = "spec.legacy: Invalid value: legacy AlertsRulesTags, LogsQuery and Team keys are of type Personal, SendYourData of type SendYourData, Scim of type Team: correct type or legacy";
const NO_RECIPIENT: &str = "spec.recipient: Invalid value: must be an age recipient (age1...) or an SSH public key (ssh-ed25519 ... or ssh-rsa ...)";

/// Kind, name, spec, what becomes of it.
type Create = (&'static str, String, Value, Expected);

/// A Team key with one thing more.
fn key(field: &str, value: Value, expected: Expected) -> Create {
    let mut spec = json!({"type": "Team", "presets": ["Alerts"]});
    spec[field] = value;
    ("ApiKey", "k".to_owned(), spec, expected)
}

fn of(kind: &'static str, spec: Value, expected: Expected) -> Create {
    (kind, "default".to_owned(), spec, expected)
}

fn named(length: usize, secret: &Value, expected: Expected) -> Create {
    ("ApiKey", "k".repeat(length), json!({"type": "Team", "presets": ["Alerts"], "secret": secret}), expected)
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn creates() -> Vec<Create> {
    let mut cases = vec![
        of("ApiKey", json!({"type": "Team", "presets": ["Alerts"]}), Accepted),
        of("ApiKey", json!({"type": "Team", "permissions": ["alerts:Snooze"]}), Accepted),
        of("ApiKey", json!({"type": "Team", "presets": [], "permissions": ["alerts:Snooze"]}), Accepted),
        of("ApiKey", json!({"type": "SendYourData", "presets": ["SendData"]}), Accepted),
        of("ApiKey", json!({"type": "Personal", "user": "alice", "presets": ["Alerts"]}), Accepted),
        of("ApiKey", json!({"type": "Personal", "presets": ["Alerts"]}), Refused(NO_USER)),
        key("user", json!("alice"), Refused(NO_USER_HERE)),
        of("ApiKey", json!({"type": "SendYourData", "user": "a", "presets": ["SendData"]}), Refused(NO_USER_HERE)),
        of("ApiKey", json!({"type": "Team"}), Refused(EMPTY)),
        of("ApiKey", json!({"type": "Team", "presets": [], "permissions": []}), Refused(EMPTY)),
        of(
            "ApiKey",
            json!({"type": "Personal", "user": "alice", "presets": ["Alerts"], "accessPolicyRef": {"name": "a"}}),
            Refused(
                "spec.accessPolicyRef: Forbidden: only Team and SendYourData keys support access policies: remove accessPolicyRef",
            ),
        ),
        key("accessPolicyRef", json!({"name": "a"}), Accepted),
        key("active", json!(false), Accepted),
        key("displayName", json!("Ключ №1 🔑"), Accepted),
        // A rotation says something, and its overlap ends before the next one.
        key(
            "rotation",
            json!({}),
            Refused("spec.rotation: Invalid value: rotation is empty: set every or requestedAt, or remove rotation"),
        ),
        key("rotation", json!({"every": "720h"}), Accepted),
        key("rotation", json!({"overlap": "24h"}), Accepted),
        key("rotation", json!({"requestedAt": "2026-11-23T10:00:00Z"}), Accepted),
        key("rotation", json!({"requestedAt": "2026-11-23T10:00:00Z", "overlap": "99999h"}), Accepted),
        key("rotation", json!({"every": "24h", "overlap": "24h"}), Refused(OVERLAPS)),
        key("rotation", json!({"every": "24h", "overlap": "25h"}), Refused(OVERLAPS)),
        key("rotation", json!({"every": "24h", "overlap": "86400s"}), Refused(OVERLAPS)),
        key("rotation", json!({"every": "24h", "overlap": "23h59m59s"}), Accepted),
        key("rotation", json!({"every": "24h", "overlap": "86399s"}), Accepted),
        key("rotation", json!({"every": "24h", "overlap": "0s"}), Accepted),
        key("rotation", json!({"every": "59s"}), Refused(TOO_OFTEN)),
        key("rotation", json!({"every": "0h"}), Refused(TOO_OFTEN)),
        key("rotation", json!({"every": "60s"}), Accepted),
        key("rotation", json!({"every": "1m"}), Accepted),
        key("rotation", json!({"every": "99999h99999m99999s"}), Accepted),
        // Names and keys of the Secret.
        key("secret", json!({}), Accepted),
        key("secret", json!({"name": "a.b-c", "key": "A_b.c-d"}), Accepted),
        key("secret", json!({"key": "a..b"}), Accepted),
        key("secret", json!({"key": "a b"}), Refused(SECRET_KEY)),
        key("secret", json!({"key": "a/b"}), Refused(SECRET_KEY)),
        key("secret", json!({"key": "é"}), Refused(SECRET_KEY)),
        // An apiserver takes none of these as the key of a Secret.
        key("secret", json!({"key": "."}), Refused(SECRET_KEY_DOTS)),
        key("secret", json!({"key": ".."}), Refused(SECRET_KEY_DOTS)),
        key("secret", json!({"key": "..data"}), Refused(SECRET_KEY_DOTS)),
        key("secret", json!({"key": ".data"}), Accepted),
        key("secret", json!({"key": "sealed-value"}), Refused(SECRET_KEY_SEALED)),
        key("secret", json!({"key": "claimed"}), Refused(SECRET_KEY_SEALED)),
        // Names of an own domain of keywright.dev, and those that only look like it.
        key("secret", json!({"labels": {"keywright.dev/a": "b"}}), Refused(RESERVED_LABEL)),
        key("secret", json!({"labels": {"a.keywright.dev/a": "b"}}), Refused(RESERVED_LABEL)),
        key("secret", json!({"annotations": {"keywright.dev/a": "b"}}), Refused(RESERVED_ANNOTATION)),
        key("secret", json!({"annotations": {"a.keywright.dev/a": "b"}}), Refused(RESERVED_ANNOTATION)),
        key(
            "secret",
            json!({"labels": {"keywright.dev": "b", "notkeywright.dev/a": "b", "example.com/keywright.dev": "b"}}),
            Accepted,
        ),
        key("secret", json!({"annotations": {"keywright.dev.example.com/a": "b"}}), Accepted),
        // The default name of the Secret is seven characters longer.
        named(246, &json!({}), Accepted),
        named(247, &json!({"name": "short"}), Accepted),
        named(253, &json!({"name": "short"}), Accepted),
        named(
            247,
            &json!({}),
            Refused(
                "<nil>: Invalid value: the name is too long for the default Secret name <name>-secret: use at most 246 characters, or set spec.secret.name",
            ),
        ),
        // AccessPolicy and SecuritySettings: what the CRD accepts, the webhook refuses.
        of("AccessPolicy", json!({"mode": "Private"}), Accepted),
        of("AccessPolicy", json!({"mode": "Advanced", "generalAccess": "NoAccess"}), Accepted),
        of(
            "AccessPolicy",
            json!({
                "mode": "Advanced", "generalAccess": "Read", "generalPolicyAccess": "NoAccess",
                "rules": [{"groups": ["sre"], "access": "Manage", "policyAccess": "Read"}],
            }),
            Accepted,
        ),
        of("AccessPolicy", json!({"mode": "Private", "generalAccess": "Read"}), Refused(PRIVATE)),
        of("AccessPolicy", json!({"mode": "Private", "generalPolicyAccess": "Read"}), Refused(PRIVATE)),
        of(
            "AccessPolicy",
            json!({"mode": "Private", "rules": [{"groups": ["a"], "access": "Read"}]}),
            Refused(PRIVATE),
        ),
        of(
            "AccessPolicy",
            json!({"mode": "Advanced"}),
            Refused(
                "spec.generalAccess: Required value: an Advanced policy says what everyone else may do: set generalAccess to Manage, Read or NoAccess",
            ),
        ),
        of("SecuritySettings", json!({}), Accepted),
        of(
            "SecuritySettings",
            json!({"oneTimeReveal": true, "workloadSecrets": "Deny", "limits": {"maxLifetime": "2160h"}}),
            Accepted,
        ),
        of("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "age1a"}), Accepted),
        of("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-ed25519 AAAA"}), Accepted),
        of("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-rsa AAAA me@here"}), Accepted),
        of("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": "ssh-dss AAAA"}), Refused(NO_RECIPIENT)),
        of("KeyReveal", json!({"apiKeyRef": {"name": "a"}, "recipient": " age1a"}), Refused(NO_RECIPIENT)),
        (
            "SecuritySettings",
            "other".to_owned(),
            json!({}),
            Refused("<nil>: Invalid value: a namespace has one SecuritySettings: name it default"),
        ),
        of("PermissionCatalog", json!({}), Accepted),
        of("PermissionCatalog", json!({"permissions": [{"name": "logs.data-api#high:Read"}]}), Accepted),
        of("PermissionCatalog", json!({"presets": [{"name": "a"}, {"name": "A"}]}), Accepted),
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
        cases.push(key("expiresAt", json!(good), Accepted));
        cases.push(key("rotation", json!({"requestedAt": good}), Accepted));
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
        cases.push(key("expiresAt", json!(bad), Refused(NO_TIME)));
        cases.push(key("rotation", json!({"requestedAt": bad}), Refused(NO_REQUEST)));
    }
    for small in ["2099-06-01t00:00:00Z", "2099-06-01T00:00:00z", "2099-06-01t00:00:00.5+01:00"] {
        cases.push(key("expiresAt", json!(small), Refused(SMALL)));
        cases.push(key("rotation", json!({"requestedAt": small}), Refused(SMALL_REQUEST)));
    }
    for leap in ["2099-06-30T23:59:60Z", "2099-06-30T23:59:60.5+01:00"] {
        cases.push(key("expiresAt", json!(leap), Refused(LEAP)));
        cases.push(key("rotation", json!({"requestedAt": leap}), Refused(LEAP_REQUEST)));
    }
    cases.extend(lines());
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
            cases.push(of("ApiKey", spec, if key_type == right { Accepted } else { Refused(LEGACY_TYPE) }));
        }
    }
    let place = json!({"name": "old", "key": "token"});
    for (field, value, expected) in [
        ("presets", json!([]), Accepted),
        ("permissions", json!([]), Accepted),
        ("presets", json!(["Alerts"]), Refused(NOT_BOTH)),
        ("permissions", json!(["alerts:Snooze"]), Refused(NOT_BOTH)),
        ("rotation", json!({"every": "24h"}), Refused(NO_LEGACY_ROTATION)),
        ("secret", json!({"name": "old"}), Refused(LEGACY_SECRET)),
        ("secret", json!({"key": "token"}), Refused(LEGACY_SECRET)),
        ("secret", json!({"name": "old", "key": "token", "labels": {"a": "b"}}), Refused(LEGACY_METADATA)),
        ("secret", json!({"name": "old", "key": "token", "annotations": {"a": "b"}}), Refused(LEGACY_METADATA)),
        ("expiresAt", json!("2099-06-01T00:00:00Z"), Accepted),
        ("active", json!(false), Accepted),
    ] {
        let mut spec = json!({"type": "Team", "legacy": "Scim", "secret": place});
        spec[field] = value;
        cases.push(of("ApiKey", spec, expected));
    }
    cases.push(of("ApiKey", json!({"type": "Team", "legacy": "Scim"}), Refused(LEGACY_SECRET)));
    for bad in ["", "1", "h", "1d", "1.5h", "-1h", "+1h", "1H", "100000h", "1h 2m", "1h2m3s4s", "1ms", "PT1H", "1h\n"] {
        cases.push(key("rotation", json!({"every": bad}), Refused(NO_EVERY)));
        cases.push(key("rotation", json!({"overlap": bad}), Refused(NO_OVERLAP)));
        cases.push(of("SecuritySettings", json!({"eraseUnrevealedAfter": bad}), Refused(NO_ERASE)));
        let limit = |name: &str, text| of("SecuritySettings", json!({"limits": {name: bad}}), Refused(text));
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
    let rarest = |every: &str| json!({"limits": {"maxRotationInterval": every}});
    let text = "spec.limits.maxRotationInterval: Invalid value: must be at least 1m, which is the least rotation.every";
    cases.push(of("SecuritySettings", rarest("59s"), Refused(text)));
    cases.push(of("SecuritySettings", rarest("60s"), Accepted));
    for bad in ["Upper", "under_score", "-a", "a-", ".a", "a.", "a..b", "a b", "a/b", "é"] {
        cases.push(key("secret", json!({"name": bad}), Refused(SECRET_NAME)));
    }
    cases
}

/// Texts that would be shown as other text, or as several lines, in each field that takes free text or names.
fn lines() -> Vec<Create> {
    macro_rules! line {
        ($field:literal) => {
            Refused(concat!(
                $field,
                ": Invalid value: must not have control characters, line ends or characters that change the direction of text"
            ))
        };
    }
    let mut cases = vec![
        key("displayName", json!("\u{1f469}\u{200d}\u{1f4bb} caf\u{e9} \u{5d0}\u{5d1}"), Accepted),
        of("PermissionCatalog", json!({"description": "one line\nand another"}), Accepted),
        of(
            "PermissionCatalog",
            json!({"description": "one line\rand another"}),
            Refused(
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
        cases.push(key("displayName", json!(bad), line!("spec.displayName")));
        let personal = json!({"type": "Personal", "user": bad, "presets": ["Alerts"]});
        cases.push(of("ApiKey", personal, line!("spec.user")));
        cases.push(key("presets", json!([bad]), line!("spec.presets[0]")));
        cases.push(key("permissions", json!([bad]), line!("spec.permissions[0]")));
        cases.push(key("accessPolicyRef", json!({"name": bad}), line!("spec.accessPolicyRef.name")));
        let rules = json!([{"groups": ["sre", bad], "access": "Read"}]);
        let policy = json!({"mode": "Advanced", "generalAccess": "Read", "rules": rules});
        cases.push(of("AccessPolicy", policy, line!("spec.rules[0].groups[1]")));
        cases.push(of("SecuritySettings", json!({"dataScopedGroups": [bad]}), line!("spec.dataScopedGroups[0]")));
        let reveal = json!({"apiKeyRef": {"name": bad}, "recipient": "age1a"});
        cases.push(of("KeyReveal", reveal, line!("spec.apiKeyRef.name")));
        let catalog = |list: &str, field: &str, expected| {
            let mut entry = json!({"name": "a:A"});
            if list == "presets" {
                entry["name"] = json!("a");
            }
            entry[field] = json!(bad);
            of("PermissionCatalog", json!({list: [entry]}), expected)
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
async fn the_apiserver_says_what_is_wrong_with_an_object_and_accepts_its_neighbour() {
    let team = Team::new().await;
    let mut cases = vec![];
    for (kind, name, spec, expected) in creates() {
        let object = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
        });
        cases.push((format!("{kind} {}: {spec}", name.len()), apis(&team, kind).await, object, expected));
    }
    check(cases).await;
}

/// 512 permissions and 64 presets: the largest key there can be is minted.
#[tokio::test]
async fn the_largest_key_is_minted() {
    let team = Team::new().await;
    let permissions: Vec<_> = (0..512).map(|n| format!("cel-largest:{}{n:03}", "A".repeat(113))).collect();
    let presets: Vec<_> = (0..64).map(|n| format!("cel-largest-{}{n:02}", "a".repeat(114))).collect();
    assert_eq!((permissions[0].len(), presets[0].len()), (128, 128));
    let named = |names: &[String]| -> Vec<Value> { names.iter().map(|name| json!({"name": name})).collect() };
    team.apply_large(&json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": "cel-largest"},
        "spec": {"permissions": named(&permissions), "presets": named(&presets)},
    }));
    team.until_condition("permissioncatalog/cel-largest", "Accepted", "True", "Accepted").await;
    team.apply_large(&api_key("largest", &json!({"type": "Team", "presets": presets, "permissions": permissions})));
    let key = team.until_condition("apikey/largest", "Ready", "True", "Active").await;
    assert_eq!(key["status"]["permissions"], json!(permissions));
    assert_eq!(key["status"]["presets"], json!(presets));
    team.kubectl(&["delete", "permissioncatalog/cel-largest"]);
}

/// The operator can represent times until a day before that.
#[tokio::test]
async fn a_key_that_expires_at_the_last_time_of_rfc_3339_works_until_then() {
    let team = Team::new().await;
    let last = "9999-12-31T23:59:59Z";
    let rotation = json!({"requestedAt": "9999-12-31T00:00:00+01:00", "overlap": "0s"});
    for (name, rotation) in [("last", Value::Null), ("last-rotation", rotation)] {
        let mut spec = json!({"type": "Team", "presets": ["Alerts"], "expiresAt": last});
        if !rotation.is_null() {
            spec["rotation"] = rotation;
        }
        team.apply(&api_key(name, &spec));
        let key = team.until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
        assert_eq!(key["spec"]["expiresAt"], last);
        assert_eq!(key["status"]["state"], "Active");
        let expiry = key["status"]["tokens"][0]["expiresAt"].as_str().unwrap();
        assert!(expiry.starts_with("9999-12-30T22:00:00"), "{expiry}");
    }
    // Both are read back: by kubectl, and by the operator that goes on with its work.
    team.kubectl(&["patch", "apikey/last", "--type=merge", "-p", r#"{"spec": {"active": false}}"#]);
    team.until("apikey/last", "Inactive", |key| key["status"]["state"] == "Inactive").await;
}

// --- What may change -------------------------------------------------------------------------------------------------

const TYPE: &str = "spec.type: Invalid value: type is immutable: delete this ApiKey and create another";
const USER: &str = "spec.user: Invalid value: user is immutable: delete this ApiKey and create another";
const MOVED: &str = "spec.secret: Invalid value: secret.name is immutable, since the value is written once: delete this ApiKey and create another";
const REKEYED: &str = "spec.secret: Invalid value: secret.key is immutable, since the value is written once: delete this ApiKey and create another";

const CHANGED: &str = "spec: Invalid value: a request can't be changed: make another";
const LEGACY: &str = "spec.legacy: Invalid value: legacy is immutable: delete this ApiKey and create another";

/// Name of the stored key (see `STORED`), what the merge patch of its spec is, what becomes of it.
fn updates() -> Vec<(&'static str, Value, Expected)> {
    vec![
        ("team", json!({"type": "SendYourData", "presets": ["SendData"]}), Refused(TYPE)),
        ("team", json!({"type": "Personal", "user": "alice"}), Refused(TYPE)),
        ("personal", json!({"type": "Team", "user": null}), Refused(TYPE)),
        ("personal", json!({"user": "bob"}), Refused(USER)),
        ("personal", json!({"user": null}), Refused(NO_USER)),
        ("personal", json!({"user": "alice", "displayName": "x"}), Accepted),
        // Absent, and its default written out, are the same.
        ("team", json!({"secret": {}}), Accepted),
        ("team", json!({"secret": {"name": "team-secret"}}), Accepted),
        ("team", json!({"secret": {"name": "team-secret", "key": "key-value"}}), Accepted),
        ("team", json!({"secret": {"key": "key-value"}}), Accepted),
        ("team", json!({"secret": {"labels": {"a": "b"}}}), Accepted),
        ("team", json!({"secret": {"name": "other"}}), Refused(MOVED)),
        ("team", json!({"secret": {"key": "other"}}), Refused(REKEYED)),
        ("default", json!({"secret": null}), Accepted),
        ("default", json!({"secret": {"name": null}}), Accepted),
        ("default", json!({"secret": {"key": null}}), Accepted),
        ("default", json!({"secret": {"name": "other"}}), Refused(MOVED)),
        ("default", json!({"secret": {"key": "other"}}), Refused(REKEYED)),
        ("custom", json!({"secret": {"labels": {"a": "b"}}}), Accepted),
        ("custom", json!({"secret": {"name": null}}), Refused(MOVED)),
        ("custom", json!({"secret": {"key": null}}), Refused(REKEYED)),
        ("custom", json!({"secret": {"name": "custom-secret"}}), Refused(MOVED)),
        ("custom", json!({"secret": {"key": "key-value"}}), Refused(REKEYED)),
        // All else may change, and has to keep the rules.
        ("team", json!({"displayName": "x", "active": false, "expiresAt": "2099-01-01T00:00:00Z"}), Accepted),
        ("team", json!({"presets": ["Dashboards"], "permissions": ["alerts:Snooze"]}), Accepted),
        ("team", json!({"rotation": {"every": "24h", "overlap": "1h"}}), Accepted),
        ("team", json!({"rotation": {"every": "24h", "overlap": "24h"}}), Refused(OVERLAPS)),
        ("team", json!({"presets": null}), Refused(EMPTY)),
        ("team", json!({"user": "alice"}), Refused(NO_USER_HERE)),
        ("legacy", json!({"active": false}), Accepted),
        ("legacy", json!({"legacy": null, "permissions": ["alerts:Snooze"]}), Refused(LEGACY)),
        ("legacy-logs", json!({"legacy": "Team"}), Refused(LEGACY)),
        (
            "personal",
            json!({"legacy": "Team", "presets": null, "secret": {"name": "personal-secret", "key": "key-value"}}),
            Refused(LEGACY),
        ),
    ]
}

#[tokio::test]
async fn what_identifies_a_key_or_its_secret_never_changes() {
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
        // From here on nothing else writes to it, so that its resourceVersion stays.
        team.until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await;
    }
    let api = apis(&team, "ApiKey").await;
    let mut cases = vec![];
    for (name, patch, expected) in updates() {
        let mut object = team.get(&format!("apikey/{name}"));
        merge(&mut object["spec"], &patch);
        cases.push((format!("{name}: {patch}"), api.clone(), object, expected));
    }
    check(cases).await;
}

#[tokio::test]
async fn a_request_to_reveal_never_changes() {
    let team = Team::new().await;
    let reveal = |recipient: &str| {
        json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"name": "r"},
            "spec": {"apiKeyRef": {"name": "nothing"}, "recipient": recipient},
        })
    };
    team.apply(&reveal("age1a"));
    let api = apis(&team, "KeyReveal").await;
    let mut cases = vec![];
    for (recipient, expected) in [("age1a", Accepted), ("age1b", Refused(CHANGED))] {
        let mut object = team.get("keyreveal/r");
        object["spec"]["recipient"] = json!(recipient);
        cases.push((recipient.to_owned(), api.clone(), object, expected));
    }
    check(cases).await;
}

/// RFC 7396.
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
