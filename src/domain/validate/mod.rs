//! The rules for a spec beyond its CRD: those that need the catalog, the clock or other objects.
//!
//! Admission calls [`admit`]; reconciliation calls [`check`], which is a part of `admit`. A message names the field,
//! the value and the fix. Specs contain no secrets, so messages may contain their values.

use std::{fmt, sync::Arc};

use jiff::Timestamp;

use super::{
    authorization::Contents,
    catalog::{Catalog, Preset},
    duration, redact, time,
};
use crate::api::{ApiKeySpec, Evidence, KeyType, LegacyKind, Limits};

/// The rules. The name of a broken rule is the reason in conditions and the label in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// No catalog is installed, so no name can be checked.
    CatalogMissing,
    /// No catalog defines the preset.
    PresetNotFound,
    /// No catalog defines the permission.
    PermissionNotFound,
    /// A standalone preset with other presets or permissions (docs/specification.md, "Create a key").
    StandalonePreset,
    /// A SendYourData key with a permission other than an ingestion permission (docs/specification.md, "Key types").
    NotIngestion,
    /// An invalid time.
    InvalidTime,
    /// An invalid duration.
    InvalidDuration,
    /// The overlap is not shorter than the interval, so that more than two values would work at once.
    OverlapTooLong,
    /// A label or annotation that the API server would reject on the Secret.
    InvalidSecretMetadata,
    /// Another ApiKey already writes to the Secret.
    SecretNameTaken,
    /// The lifetime exceeds the limit of the SecuritySettings.
    LifetimeTooLong,
    /// The SecuritySettings require an expiry, and the spec has none.
    ExpiryRequired,
    /// The SecuritySettings require a rotation interval, and the spec has none or a longer one.
    RotationRequired,
    /// The SecuritySettings require a rotation together with added presets or permissions.
    RotationRequiredOnRaise,
    /// The namespace has as many ApiKeys as its SecuritySettings allow.
    TooManyKeys,
}

impl Rule {
    /// The reason in a condition.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::CatalogMissing => "CatalogMissing",
            Self::PresetNotFound => "PresetNotFound",
            Self::PermissionNotFound => "PermissionNotFound",
            Self::StandalonePreset => "StandalonePreset",
            Self::NotIngestion => "NotIngestion",
            Self::InvalidTime => "InvalidTime",
            Self::InvalidDuration => "InvalidDuration",
            Self::OverlapTooLong => "OverlapTooLong",
            Self::InvalidSecretMetadata => "InvalidSecretMetadata",
            Self::SecretNameTaken => "SecretNameTaken",
            Self::LifetimeTooLong => "LifetimeTooLong",
            Self::ExpiryRequired => "ExpiryRequired",
            Self::RotationRequired => "RotationRequired",
            Self::RotationRequiredOnRaise => "RotationRequiredOnRaise",
            Self::TooManyKeys => "TooManyKeys",
        }
    }

    /// Whether the rule depends on the catalogs only, so that a catalog that is applied first can fix the problem.
    #[must_use]
    pub const fn is_of_catalog(self) -> bool {
        matches!(
            self,
            Self::CatalogMissing
                | Self::PresetNotFound
                | Self::PermissionNotFound
                | Self::StandalonePreset
                | Self::NotIngestion
        )
    }
}

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The rule.
    pub rule: Rule,
    /// The path of the field, such as `spec.presets[1]`.
    pub field: String,
    /// The problem and the fix.
    pub message: String,
    /// The name or value that breaks the rule, independent of its position in a list. Two problems with the same rule
    /// and subject are the same problem.
    subject: String,
}

impl Problem {
    fn new(rule: Rule, field: impl Into<String>, subject: impl Into<String>, message: String) -> Self {
        // A user may have pasted the value of a key into a field.
        let [field, message] = [field.into(), message].map(|text| redact::redact(&text).into_owned());
        Self { rule, field, message, subject: subject.into() }
    }

    fn same_as(&self, other: &Self) -> bool {
        self.rule == other.rule && self.subject == other.subject
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// The presets and permissions of a key, in the spelling of the catalog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// The presets.
    pub presets: Vec<Arc<str>>,
    /// The individual permissions.
    pub permissions: Vec<Arc<str>>,
}

/// The result of the validation of a spec.
#[derive(Clone, Debug, Default)]
pub struct Validation {
    /// The presets and permissions of the spec that the catalog defines.
    pub grants: Grants,
    /// The broken rules. Empty means accepted.
    pub problems: Vec<Problem>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Checks the rules that depend neither on the clock nor on other ApiKeys.
#[must_use]
pub fn check(spec: &ApiKeySpec, catalog: &Catalog) -> Validation {
    let mut validation = Validation::default();
    check_grants(spec, catalog, &mut validation);
    check_times(spec, &mut validation.problems);
    check_secret_metadata(spec, &mut validation.problems);
    validation
}

/// The inputs of admission other than the object.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The limits of the SecuritySettings of the namespace.
    pub limits: Option<&'a Limits>,
    /// The namespace and its number of ApiKeys.
    pub namespace: (&'a str, usize),
    /// The last `spec.rotation.requestedAt` that was carried out.
    pub handled: Option<&'a str>,
    /// The creation time of the ApiKey. `None` if the request creates it.
    pub created_at: Option<Timestamp>,
    /// The time.
    pub now: Timestamp,
}

/// Validates a creation (`old` is `None`) or an update, and returns warnings. `conflicting_claim` is another ApiKey
/// that already claims the Secret. Problems that the old spec already had are no reason to reject an update: a catalog
/// may have changed, and users must be able to change labels, deactivate a key or remove the wrong names.
///
/// # Errors
/// All broken rules.
pub fn admit(
    new: &ApiKeySpec,
    old: Option<&ApiKeySpec>,
    catalog: &Catalog,
    conflicting_claim: Option<&str>,
    secret_name: &str,
    terms: &Terms<'_>,
) -> Result<Vec<String>, Vec<Problem>> {
    if old == Some(new) {
        return Ok(vec![]);
    }
    let Validation { mut problems, mut warnings, .. } = check(new, catalog);
    // Only a warning, since a cluster may be rebuilt from manifests of which some have expired.
    if let Some(text) = &new.expires_at
        && old.and_then(|old| old.expires_at.as_ref()) != Some(text)
        && time::parse(text).is_some_and(|expiry| expiry <= terms.now)
    {
        warnings
            .push(format!("spec.expiresAt: {text} is in the past: the key is Expired, and no request with it passes"));
    }
    if let Some(conflicting_claim) = conflicting_claim
        && old.is_none()
    {
        problems.push(Problem::new(
            Rule::SecretNameTaken,
            "spec.secret.name",
            secret_name,
            format!(
                "Invalid value: {secret_name:?}: ApiKey {conflicting_claim} already writes to this Secret: choose another name"
            ),
        ));
    }
    check_limits(new, terms, &mut problems);
    match old {
        None => check_count(terms, &mut problems),
        Some(old) => check_raise(new, old, catalog, terms, &mut problems, &mut warnings),
    }
    if let Some(old) = old
        && !problems.is_empty()
    {
        let mut before = check(old, catalog).problems;
        check_limits(old, terms, &mut before);
        problems.retain(|problem| !before.iter().any(|known| known.same_as(problem)));
    }
    if problems.is_empty() { Ok(warnings) } else { Err(problems) }
}

/// Checks the maximum number of keys in the namespace. Concurrent creations may exceed the limit by a few keys.
fn check_count(terms: &Terms<'_>, problems: &mut Vec<Problem>) {
    let Some(most) = terms.limits.and_then(|limits| limits.max_keys) else { return };
    let (namespace, count) = terms.namespace;
    if usize::try_from(most).is_ok_and(|most| count >= most) {
        problems.push(Problem::new(
            Rule::TooManyKeys,
            "metadata.namespace",
            "",
            format!(
                "Forbidden: namespace {namespace} has {count} ApiKeys, and limits.maxKeys of its SecuritySettings is \
                 {most}: delete ApiKeys that are not needed, or have limits.maxKeys raised"
            ),
        ));
    }
}

/// Checks that a raise comes with a rotation, if the settings require that: without it, every user who saw the value
/// would obtain the added permissions.
fn check_raise(
    new: &ApiKeySpec,
    old: &ApiKeySpec,
    catalog: &Catalog,
    terms: &Terms<'_>,
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<String>,
) {
    let required = terms.limits.is_some_and(|limits| limits.require_rotation_on_raise == Some(true));
    // A legacy key can be neither raised nor rotated.
    if !required || new.legacy.is_some() {
        return;
    }
    let added = Contents::of_spec(new, catalog).beyond(&Contents::of_spec(old, catalog), catalog);
    if added.is_empty() {
        return;
    }
    let requested_at = |spec: &ApiKeySpec| spec.rotation.as_ref().and_then(|rotation| rotation.requested_at.clone());
    let requested = requested_at(new);
    let before = requested_at(old);
    let last = [before.as_deref(), terms.handled].into_iter().flatten().filter_map(time::parse).max();
    // A request in the future is carried out at its time, and until then the previous value would get the added
    // permissions.
    let is_due = |requested: &Timestamp| *requested <= terms.now && last.is_none_or(|last| last < *requested);
    let is_newer = requested.as_deref().and_then(time::parse).as_ref().is_some_and(is_due);
    if !is_newer {
        let prefix =
            requested.map_or_else(|| "Required value: ".to_owned(), |text| format!("Invalid value: {text:?}: "));
        let later = last.map_or_else(String::new, |last| format!(" and later than {last}"));
        problems.push(Problem::new(
            Rule::RotationRequiredOnRaise,
            "spec.rotation.requestedAt",
            added.to_string(),
            format!(
                "{prefix}must be a new time and not in the future, such as {}{later}, since this change adds {added} and \
                 limits.requireRotationOnRaise of the SecuritySettings is true: set it in the same change, and \
                 rotation.overlap to 0s so that the previous value does not get the added permissions",
                Timestamp::from_second(terms.now.as_second()).unwrap_or(terms.now)
            ),
        ));
    } else if new.rotation.as_ref().and_then(|rotation| rotation.overlap.as_deref()).and_then(duration::parse)
        != Some(std::time::Duration::ZERO)
    {
        warnings.push(format!(
            "spec.rotation.overlap: until the overlap ends, the previous value carries {added} too: set it to 0s to prevent that"
        ));
    }
}

/// Checks the limits of the SecuritySettings. Reconciliation does not check them, so that a new limit breaks no
/// existing key.
fn check_limits(spec: &ApiKeySpec, terms: &Terms<'_>, problems: &mut Vec<Problem>) {
    let Some(limits) = terms.limits else { return };
    let longest = limits.max_lifetime.as_deref().and_then(duration::parse);
    let expiry = spec.expires_at.as_deref();
    let created = terms.created_at.unwrap_or(terms.now);
    // `None` if the limit exceeds the range of times.
    let last = longest.and_then(|longest| created.checked_add(longest).ok());
    let fix = match last {
        Some(last) if last > terms.now => format!("set {last} or earlier"),
        Some(_) => "that time has passed, so delete this ApiKey and create another".to_owned(),
        None => "set a time".to_owned(),
    };
    match (expiry, longest) {
        (None, Some(longest)) => problems.push(Problem::new(
            Rule::ExpiryRequired,
            "spec.expiresAt",
            "",
            format!(
                "Required value: must be at most {} after the creation of the key, by limits.maxLifetime of the \
                 SecuritySettings: {fix}",
                duration::format(longest)
            ),
        )),
        (None, None) if limits.require_expiry == Some(true) => problems.push(Problem::new(
            Rule::ExpiryRequired,
            "spec.expiresAt",
            "",
            "Required value: limits.requireExpiry of the SecuritySettings is true: set a time such as \
             2027-06-01T00:00:00Z"
                .to_owned(),
        )),
        (Some(text), Some(longest)) => {
            if let (Some(expiry), Some(last)) = (time::parse(text), last)
                && expiry > last
            {
                problems.push(Problem::new(
                    Rule::LifetimeTooLong,
                    "spec.expiresAt",
                    text,
                    format!(
                        "Invalid value: {text:?}: must be at most {} after the creation of the key, by \
                         limits.maxLifetime of the SecuritySettings: {fix}",
                        duration::format(longest)
                    ),
                ));
            }
        }
        _ => {}
    }
    let max_interval = limits.max_rotation_interval.as_deref().and_then(duration::parse);
    // A legacy key can't be minted, so it can't be rotated either.
    if let (Some(max_interval), None) = (max_interval, spec.legacy) {
        let every = spec.rotation.as_ref().and_then(|rotation| rotation.every.as_deref());
        let prefix = match every {
            None => "Required value".to_owned(),
            Some(text) if duration::parse(text).is_some_and(|every| every > max_interval) => {
                format!("Invalid value: {text:?}")
            }
            Some(_) => return,
        };
        problems.push(Problem::new(
            Rule::RotationRequired,
            "spec.rotation.every",
            every.unwrap_or_default(),
            format!(
                "{prefix}: must be at most {}, by limits.maxRotationInterval of the SecuritySettings",
                duration::format(max_interval)
            ),
        ));
    }
}

/// Returns the spec without the names that no catalog defines, for which the needed rights are not known yet.
#[must_use]
pub fn known_part(spec: &ApiKeySpec, catalog: &Catalog) -> ApiKeySpec {
    let mut known = spec.clone();
    known.presets.retain(|name| catalog.preset(name).is_some());
    known.permissions.retain(|name| catalog.permission(name).is_some());
    known
}

fn check_grants(spec: &ApiKeySpec, catalog: &Catalog, validation: &mut Validation) {
    if catalog.is_empty() {
        validation.problems.push(Problem::new(
            Rule::CatalogMissing,
            "spec",
            "",
            "Forbidden: no PermissionCatalog is installed, so no preset or permission is known: apply one, such as \
             catalog coralogix of the Helm chart"
                .to_owned(),
        ));
        return;
    }
    if let Some(kind) = spec.legacy {
        return check_legacy(kind, catalog, validation);
    }
    // The search for similar names is expensive, and a spec may contain hundreds of wrong names.
    let mut hints = MAX_HINTS;
    check_presets(spec, catalog, &mut hints, validation);
    check_permissions(spec, catalog, &mut hints, validation);
}

fn check_presets(spec: &ApiKeySpec, catalog: &Catalog, hints: &mut usize, validation: &mut Validation) {
    for (index, name) in spec.presets.iter().enumerate() {
        let field = || format!("spec.presets[{index}]");
        let Some(preset) = catalog.preset(name) else {
            let hint = match catalog.permission(name) {
                Some(permission) => format!("{} is a permission: list it under spec.permissions", permission.name),
                None => did_you_mean(
                    &hint(hints, || catalog.presets_like(name)),
                    "kubectl get permissioncatalogs -o yaml lists all presets",
                ),
            };
            validation.problems.push(not_found(Rule::PresetNotFound, "preset", field(), name, &hint));
            continue;
        };
        check_preset(spec, catalog, preset, &field(), validation);
        push_unique(&mut validation.grants.presets, &preset.name);
    }
}

fn not_found(rule: Rule, kind: &str, field: String, name: &str, hint: &str) -> Problem {
    let message = format!("Not found: {name:?}: no {kind} has this name: {hint}");
    Problem::new(rule, field, name.to_ascii_lowercase(), message)
}

fn check_preset(spec: &ApiKeySpec, catalog: &Catalog, preset: &Preset, field: &str, validation: &mut Validation) {
    if preset.standalone && spec.presets.len() + spec.permissions.len() > 1 {
        validation.problems.push(Problem::new(
            Rule::StandalonePreset,
            field,
            &*preset.name,
            format!(
                "Invalid value: {:?}: this preset is standalone: remove all other presets and permissions, or \
                 create a separate key for it",
                preset.name
            ),
        ));
    }
    if spec.key_type == KeyType::SendYourData {
        let other = preset.permissions.iter().find(|p| catalog.permission(p).is_none_or(|p| !p.ingestion));
        if let Some(other) = other {
            validation.problems.push(Problem::new(
                Rule::NotIngestion,
                field,
                &*preset.name,
                format!(
                    "Invalid value: {:?}: a SendYourData key may only send data, and this preset grants {other}: \
                     remove it, or create a key of type Team",
                    preset.name
                ),
            ));
        }
    }
    if preset.permissions.is_empty() {
        validation.warnings.push(format!(
            "{}: preset {} grants nothing yet: its catalog lists no permissions for it",
            field, preset.name
        ));
    } else if preset.evidence == Some(Evidence::Inferred) {
        validation.warnings.push(format!(
            "{}: the permissions of preset {} are inferred in its catalog, not documented",
            field, preset.name
        ));
    }
}

fn check_permissions(spec: &ApiKeySpec, catalog: &Catalog, hints: &mut usize, validation: &mut Validation) {
    for (index, name) in spec.permissions.iter().enumerate() {
        let field = || format!("spec.permissions[{index}]");
        let Some(permission) = catalog.permission(name) else {
            let hint = match catalog.preset(name) {
                Some(preset) => format!("{} is a preset: list it under spec.presets", preset.name),
                None => did_you_mean(
                    &hint(hints, || catalog.permissions_like(name)),
                    "a permission is written resource:Action; kubectl get permissioncatalogs -o yaml lists all",
                ),
            };
            validation.problems.push(not_found(Rule::PermissionNotFound, "permission", field(), name, &hint));
            continue;
        };
        if spec.key_type == KeyType::SendYourData && !permission.ingestion {
            validation.problems.push(Problem::new(
                Rule::NotIngestion,
                field(),
                &*permission.name,
                format!(
                    "Invalid value: {:?}: a SendYourData key may only send data, and this permission does more: \
                     remove it, or create a key of type Team",
                    permission.name
                ),
            ));
        }
        push_unique(&mut validation.grants.permissions, &permission.name);
    }
}

/// The catalog determines the permissions of a legacy key by its kind.
fn check_legacy(kind: LegacyKind, catalog: &Catalog, validation: &mut Validation) {
    validation.grants.permissions = catalog.legacy(kind).to_vec();
    if validation.grants.permissions.is_empty() {
        validation.problems.push(Problem::new(
            Rule::CatalogMissing,
            "spec.legacy",
            "",
            format!(
                "Invalid value: \"{kind:?}\": no PermissionCatalog lists the permissions of legacy keys of this kind: \
                 apply one with legacyRoles, such as catalog coralogix of the Helm chart"
            ),
        ));
    }
}

/// A name that is listed twice, in one or two spellings, is one grant.
fn push_unique(grants: &mut Vec<Arc<str>>, name: &Arc<str>) {
    if !grants.contains(name) {
        grants.push(Arc::clone(name));
    }
}

/// The maximum number of names for which similar names are searched.
const MAX_HINTS: usize = 3;

fn hint<'a>(left: &mut usize, search: impl FnOnce() -> Vec<&'a str>) -> Vec<&'a str> {
    let allowed = *left > 0;
    *left = left.saturating_sub(1);
    if allowed { search() } else { vec![] }
}

fn did_you_mean(similar: &[&str], otherwise: &str) -> String {
    match similar {
        [] => otherwise.to_owned(),
        [one] => format!("did you mean {one}?"),
        [first @ .., last] => format!("did you mean {} or {last}?", first.join(", ")),
    }
}

fn check_times(spec: &ApiKeySpec, problems: &mut Vec<Problem>) {
    let rotation = spec.rotation.as_ref();
    let times = [
        ("spec.expiresAt", spec.expires_at.as_deref()),
        ("spec.rotation.requestedAt", rotation.and_then(|r| r.requested_at.as_deref())),
    ];
    for (field, text) in times {
        if let Some(text) = text
            && time::parse(text).is_none()
        {
            problems.push(Problem::new(
                Rule::InvalidTime,
                field,
                text,
                format!("Invalid value: {text:?}: must be an RFC 3339 time that exists, such as 2027-06-01T00:00:00Z"),
            ));
        }
    }
    let durations = [
        ("spec.rotation.every", rotation.and_then(|r| r.every.as_deref())),
        ("spec.rotation.overlap", rotation.and_then(|r| r.overlap.as_deref())),
    ];
    let parsed = durations.map(|(field, text)| {
        let parsed = duration::parse(text?);
        if parsed.is_none() {
            problems.push(Problem::new(
                Rule::InvalidDuration,
                field,
                text.unwrap_or_default(),
                format!("Invalid value: {:?}: must be a duration such as 720h, 90m or 1h30m", text.unwrap_or_default()),
            ));
        }
        parsed
    });
    if let [Some(every), Some(overlap)] = parsed
        && overlap >= every
    {
        problems.push(Problem::new(
            Rule::OverlapTooLong,
            "spec.rotation.overlap",
            "",
            format!(
                "Invalid value: {:?}: must be shorter than every ({}), or more than two values would work at once",
                duration::format(overlap),
                duration::format(every)
            ),
        ));
    }
}

/// Checks labels and annotations by the rules of the API server, so that the ApiKey is rejected instead of a later
/// write of the Secret.
fn check_secret_metadata(spec: &ApiKeySpec, problems: &mut Vec<Problem>) {
    let Some(secret) = &spec.secret else { return };
    for (map, kind) in [(&secret.labels, "labels"), (&secret.annotations, "annotations")] {
        for (key, value) in map {
            let problem = if !is_qualified_name(key) {
                "must be a name of at most 63 letters, digits, -, _ and ., optionally after a DNS name and a slash"
            } else if kind == "labels" && !value.is_empty() && !is_name(value) {
                "must have at most 63 letters, digits, -, _ and ., and start and end with a letter or digit"
            } else {
                continue;
            };
            problems.push(Problem::new(
                Rule::InvalidSecretMetadata,
                format!("spec.secret.{kind}[{key}]"),
                key,
                format!("Invalid value: {:?}: {problem}", if is_qualified_name(key) { value } else { key }),
            ));
        }
    }
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

fn is_qualified_name(text: &str) -> bool {
    let is_dns_label = |label: &str| {
        is_name(label) && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match text.split_once('/') {
        Some((domain, name)) => domain.len() <= 253 && domain.split('.').all(is_dns_label) && is_name(name),
        None => is_name(text),
    }
}

mod tests;
