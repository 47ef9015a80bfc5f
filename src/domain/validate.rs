//! What a spec must satisfy beyond its CRD: rules that need the catalogue, the clock or other objects.
//!
//! Admission calls [`admit`]; reconciliation calls [`check`], which `admit` is built on. An error names the field,
//! the value and the way out. Specs hold no secrets, so their values may be shown.

use std::{fmt, sync::Arc};

use jiff::Timestamp;

use super::{catalog::Catalog, duration, gates::Contents, redact, time};
use crate::api::{ApiKeySpec, Evidence, KeyType, LegacyKind, Limits};

/// Which rule a spec breaks. The name is the reason in conditions and the label in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// No catalogue is installed, so no name can be checked.
    CatalogMissing,
    /// No catalogue has the preset.
    PresetNotFound,
    /// No catalogue has the permission.
    PermissionNotFound,
    /// A standalone preset is combined with something (seed, "Create an API key": the RUM note).
    StandalonePreset,
    /// A SendYourData key with a permission that does more than send data (seed, "Send-Your-Data API keys").
    NotIngestion,
    /// Not a time that exists.
    InvalidTime,
    /// Not a duration.
    InvalidDuration,
    /// The overlap is not shorter than the interval, so that more than two values would work at once.
    OverlapTooLong,
    /// A label or annotation that the API server would refuse on the Secret.
    InvalidSecretMetadata,
    /// Another ApiKey already writes to that Secret.
    SecretNameTaken,
    /// The key would live longer than the SecuritySettings allow.
    LifetimeTooLong,
    /// The SecuritySettings want an expiry, and there is none.
    ExpiryRequired,
    /// The SecuritySettings want rotation, and there is none or it is too rare.
    RotationRequired,
    /// The SecuritySettings want a rotation with whatever raises what a key carries.
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

    /// Whether the catalogues alone decide, so that a catalogue that is applied first would mend it.
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
    /// What is wrong and how to mend it.
    pub message: String,
    /// What the problem is about, independent of its place in a list: two problems with the same rule and subject
    /// are the same problem.
    subject: String,
}

impl Problem {
    fn new(rule: Rule, field: impl Into<String>, subject: impl Into<String>, message: String) -> Self {
        // Somebody may have pasted a value where a name belongs.
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

/// What a key may do, in the catalogue's spelling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// The presets.
    pub presets: Vec<Arc<str>>,
    /// The individual permissions.
    pub permissions: Vec<Arc<str>>,
}

/// What the catalogue says of a spec.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What the spec asks for, as far as the catalogue knows it.
    pub grants: Grants,
    /// The rules that it breaks. Empty means accepted.
    pub problems: Vec<Problem>,
    /// What is worth saying though nothing is wrong.
    pub warnings: Vec<String>,
}

/// Checks everything about a spec that does not depend on the clock or on other ApiKeys.
#[must_use]
pub fn check(spec: &ApiKeySpec, catalog: &Catalog) -> Verdict {
    let mut verdict = Verdict::default();
    check_grants(spec, catalog, &mut verdict);
    check_times(spec, &mut verdict.problems);
    check_secret_metadata(spec, &mut verdict.problems);
    verdict
}

/// What admission knows beside the objects themselves.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The limits of the SecuritySettings of the namespace.
    pub limits: Option<&'a Limits>,
    /// The namespace, and how many ApiKeys it has.
    pub namespace: (&'a str, usize),
    /// The last `spec.rotation.requestedAt` that was carried out.
    pub handled: Option<&'a str>,
    /// When the ApiKey was created; `None` if it is being created.
    pub created_at: Option<Timestamp>,
    /// The time.
    pub now: Timestamp,
}

/// Decides on a create (`old` is `None`) or an update. `rival` is another ApiKey that already claims the Secret.
/// What was wrong before and stays as it was is no reason to refuse: a catalogue may have changed since, and people
/// must still be able to change labels, deactivate a key or take out what is wrong.
///
/// # Errors
/// Every broken rule, not only the first.
pub fn admit(
    new: &ApiKeySpec,
    old: Option<&ApiKeySpec>,
    catalog: &Catalog,
    rival: Option<&str>,
    secret_name: &str,
    terms: &Terms<'_>,
) -> Result<Vec<String>, Vec<Problem>> {
    if old == Some(new) {
        return Ok(vec![]);
    }
    let Verdict { mut problems, mut warnings, .. } = check(new, catalog);
    // A cluster can be built again from Git, where keys stay that have expired.
    if let Some(text) = &new.expires_at
        && old.and_then(|old| old.expires_at.as_ref()) != Some(text)
        && time::parse(text).is_some_and(|expiry| expiry <= terms.now)
    {
        warnings
            .push(format!("spec.expiresAt: {text} is in the past: the key is Expired, and no request with it passes"));
    }
    if let Some(rival) = rival
        && old.is_none()
    {
        problems.push(Problem::new(
            Rule::SecretNameTaken,
            "spec.secret.name",
            secret_name,
            format!(
                "Invalid value: {secret_name:?}: ApiKey {rival} already writes to this Secret: choose another name"
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

/// A namespace has so many keys at most. Near the limit, keys that are created at the same time may exceed it by a few.
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

/// Whoever saw the value of a key before it was raised gets what was added, unless the value is replaced.
fn check_raise(
    new: &ApiKeySpec,
    old: &ApiKeySpec,
    catalog: &Catalog,
    terms: &Terms<'_>,
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<String>,
) {
    let demanded = terms.limits.is_some_and(|limits| limits.require_rotation_on_raise == Some(true));
    // A legacy key can be neither raised nor rotated.
    if !demanded || new.legacy.is_some() {
        return;
    }
    let added = Contents::of_spec(new, catalog).beyond(&Contents::of_spec(old, catalog), catalog);
    if added.is_empty() {
        return;
    }
    let requested = |spec: &ApiKeySpec| spec.rotation.as_ref().and_then(|rotation| rotation.requested_at.clone());
    let asked = requested(new);
    let before = requested(old);
    let last = [before.as_deref(), terms.handled].into_iter().flatten().filter_map(time::parse).max();
    // A time to come is a request for that time, and until then the value before would carry what is added.
    let is_due = |asked: &Timestamp| *asked <= terms.now && last.is_none_or(|last| last < *asked);
    let is_newer = asked.as_deref().and_then(time::parse).as_ref().is_some_and(is_due);
    if !is_newer {
        let what = asked.map_or_else(|| "Required value: ".to_owned(), |asked| format!("Invalid value: {asked:?}: "));
        let later = last.map_or_else(String::new, |last| format!(" and later than {last}"));
        problems.push(Problem::new(
            Rule::RotationRequiredOnRaise,
            "spec.rotation.requestedAt",
            added.to_string(),
            format!(
                "{what}must be a new time and not in the future, such as {}{later}, since this change adds {added} and \
                 limits.requireRotationOnRaise of the SecuritySettings is true: set it in the same change, and \
                 rotation.overlap to 0s so that the value before gets nothing of it",
                Timestamp::from_second(terms.now.as_second()).unwrap_or(terms.now)
            ),
        ));
    } else if new.rotation.as_ref().and_then(|rotation| rotation.overlap.as_deref()).and_then(duration::parse)
        != Some(std::time::Duration::ZERO)
    {
        warnings.push(format!(
            "spec.rotation.overlap: until the overlap ends, the value before carries {added} too: set it to 0s to prevent that"
        ));
    }
}

/// What the SecuritySettings demand of every key. Reconciliation does not ask: a limit that comes later breaks no key.
fn check_limits(spec: &ApiKeySpec, terms: &Terms<'_>, problems: &mut Vec<Problem>) {
    let Some(limits) = terms.limits else { return };
    let longest = limits.max_lifetime.as_deref().and_then(duration::parse);
    let expiry = spec.expires_at.as_deref();
    let created = terms.created_at.unwrap_or(terms.now);
    // Where the limit lies beyond all times, nothing is too late.
    let last = longest.and_then(|longest| created.checked_add(longest).ok());
    let way_out = match last {
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
                 SecuritySettings: {way_out}",
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
                         limits.maxLifetime of the SecuritySettings: {way_out}",
                        duration::format(longest)
                    ),
                ));
            }
        }
        _ => {}
    }
    let rarest = limits.max_rotation_interval.as_deref().and_then(duration::parse);
    // A legacy key can't be minted, so it can't be rotated either.
    if let (Some(rarest), None) = (rarest, spec.legacy) {
        let every = spec.rotation.as_ref().and_then(|rotation| rotation.every.as_deref());
        let what = match every {
            None => "Required value".to_owned(),
            Some(text) if duration::parse(text).is_some_and(|every| every > rarest) => {
                format!("Invalid value: {text:?}")
            }
            Some(_) => return,
        };
        problems.push(Problem::new(
            Rule::RotationRequired,
            "spec.rotation.every",
            every.unwrap_or_default(),
            format!(
                "{what}: must be at most {}, by limits.maxRotationInterval of the SecuritySettings",
                duration::format(rarest)
            ),
        ));
    }
}

/// A spec without the names that no catalogue knows, for which no right can be asked yet.
#[must_use]
pub fn known_part(spec: &ApiKeySpec, catalog: &Catalog) -> ApiKeySpec {
    let mut known = spec.clone();
    known.presets.retain(|name| catalog.preset(name).is_some());
    known.permissions.retain(|name| catalog.permission(name).is_some());
    known
}

fn check_grants(spec: &ApiKeySpec, catalog: &Catalog, verdict: &mut Verdict) {
    if catalog.is_empty() {
        verdict.problems.push(Problem::new(
            Rule::CatalogMissing,
            "spec",
            "",
            "Forbidden: no PermissionCatalog is installed, so no preset or permission is known: apply one, such as the \
             catalogue coralogix of the Helm chart"
                .to_owned(),
        ));
        return;
    }
    if let Some(kind) = spec.legacy {
        return check_legacy(kind, catalog, verdict);
    }
    // Looking for near names is work, and a spec may hold hundreds of wrong ones.
    let mut hints = MOST_HINTS;
    let only_ingestion = spec.key_type == KeyType::SendYourData;
    for (index, name) in spec.presets.iter().enumerate() {
        let field = || format!("spec.presets[{index}]");
        let Some(preset) = catalog.preset(name) else {
            let hint = match catalog.permission(name) {
                Some(permission) => format!("{} is a permission: list it under spec.permissions", permission.name),
                None => did_you_mean(
                    &hint(&mut hints, || catalog.presets_like(name)),
                    "kubectl get permissioncatalogs -o yaml lists all presets",
                ),
            };
            let message = format!("Not found: {name:?}: no preset has this name: {hint}");
            verdict.problems.push(Problem::new(Rule::PresetNotFound, field(), name.to_ascii_lowercase(), message));
            continue;
        };
        if preset.standalone && spec.presets.len() + spec.permissions.len() > 1 {
            verdict.problems.push(Problem::new(
                Rule::StandalonePreset,
                field(),
                &*preset.name,
                format!(
                    "Invalid value: {:?}: a preset that stands alone: remove every other preset and permission, or \
                     create a key of its own for it",
                    preset.name
                ),
            ));
        }
        if only_ingestion {
            let other = preset.permissions.iter().find(|p| catalog.permission(p).is_none_or(|p| !p.ingestion));
            if let Some(other) = other {
                verdict.problems.push(Problem::new(
                    Rule::NotIngestion,
                    field(),
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
            verdict.warnings.push(format!(
                "{}: preset {} grants nothing yet: its catalogue does not know its permissions",
                field(),
                preset.name
            ));
        } else if preset.evidence == Some(Evidence::Inferred) {
            verdict.warnings.push(format!(
                "{}: the permissions of preset {} are inferred in its catalogue, not documented",
                field(),
                preset.name
            ));
        }
        push_unique(&mut verdict.grants.presets, &preset.name);
    }
    for (index, name) in spec.permissions.iter().enumerate() {
        let field = || format!("spec.permissions[{index}]");
        let Some(permission) = catalog.permission(name) else {
            let hint = match catalog.preset(name) {
                Some(preset) => format!("{} is a preset: list it under spec.presets", preset.name),
                None => did_you_mean(
                    &hint(&mut hints, || catalog.permissions_like(name)),
                    "a permission is written resource:Action; kubectl get permissioncatalogs -o yaml lists all",
                ),
            };
            let message = format!("Not found: {name:?}: no permission has this name: {hint}");
            verdict.problems.push(Problem::new(Rule::PermissionNotFound, field(), name.to_ascii_lowercase(), message));
            continue;
        };
        if only_ingestion && !permission.ingestion {
            verdict.problems.push(Problem::new(
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
        push_unique(&mut verdict.grants.permissions, &permission.name);
    }
}

/// A legacy key may do what the catalogue says of its kind.
fn check_legacy(kind: LegacyKind, catalog: &Catalog, verdict: &mut Verdict) {
    verdict.grants.permissions = catalog.legacy(kind).to_vec();
    if verdict.grants.permissions.is_empty() {
        verdict.problems.push(Problem::new(
            Rule::CatalogMissing,
            "spec.legacy",
            "",
            format!(
                "Invalid value: \"{kind:?}\": no PermissionCatalog says what a legacy key of this kind may do: apply one \
                 with legacyRoles, such as the catalogue coralogix of the Helm chart"
            ),
        ));
    }
}

/// Two spellings of one name are one grant.
fn push_unique(grants: &mut Vec<Arc<str>>, name: &Arc<str>) {
    if !grants.contains(name) {
        grants.push(Arc::clone(name));
    }
}

/// How many names get suggestions.
const MOST_HINTS: usize = 3;

fn hint<'a>(left: &mut usize, near: impl FnOnce() -> Vec<&'a str>) -> Vec<&'a str> {
    let allowed = *left > 0;
    *left = left.saturating_sub(1);
    if allowed { near() } else { vec![] }
}

fn did_you_mean(near: &[&str], otherwise: &str) -> String {
    match near {
        [] => otherwise.to_owned(),
        [one] => format!("did you mean {one}?"),
        [most @ .., last] => format!("did you mean {} or {last}?", most.join(", ")),
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

/// The rules of the API server for labels and annotations, so that a mistake is refused with the ApiKey instead of
/// failing later with the Secret.
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        api::{AccessPolicyRef, LegacyRole, Rotation, SecretTemplate},
        domain::catalog::tests::{permission, preset, spec as catalog_spec},
    };

    pub(crate) fn catalog() -> Catalog {
        let spec = catalog_spec(
            vec![
                permission("alerts:ReadConfig", false),
                permission("alerts:UpdateConfig", false),
                permission("logs.data-ingress:SendData", true),
                permission("rum-ingress:SendData", true),
            ],
            vec![
                preset("Alerts", false, &["alerts:ReadConfig", "alerts:UpdateConfig"]),
                preset("SendData", false, &["logs.data-ingress:SendData"]),
                preset("RUM", true, &["rum-ingress:SendData"]),
                preset("Olly", false, &[]),
            ],
        );
        Catalog::merge([("test", &spec)]).0
    }

    /// A catalogue in which legacy Logs Query keys may read alerts.
    pub(crate) fn legacy_catalog() -> Catalog {
        let mut spec = catalog_spec(vec![permission("alerts:ReadConfig", false)], vec![]);
        spec.legacy_roles = vec![LegacyRole {
            name: "Logs Query".to_owned(),
            permissions: vec!["alerts:ReadConfig".to_owned()],
            legacy_kind: Some(LegacyKind::LogsQuery),
            legacy_key: None,
            legacy_key_evidence: None,
        }];
        Catalog::merge([("test", &spec)]).0
    }

    pub(crate) fn spec(key_type: KeyType, presets: &[&str], permissions: &[&str]) -> ApiKeySpec {
        ApiKeySpec {
            legacy: None,
            display_name: None,
            key_type,
            user: None,
            presets: presets.iter().map(|s| (*s).to_owned()).collect(),
            permissions: permissions.iter().map(|s| (*s).to_owned()).collect(),
            active: None,
            access_policy_ref: None,
            expires_at: None,
            rotation: None,
            secret: None,
        }
    }

    fn now() -> Terms<'static> {
        Terms {
            limits: None,
            namespace: ("shop", 0),
            handled: None,
            created_at: None,
            now: "2026-11-23T10:00:00Z".parse().unwrap(),
        }
    }

    fn messages(result: Result<Vec<String>, Vec<Problem>>) -> Vec<String> {
        result.map_or_else(|problems| problems.iter().map(ToString::to_string).collect(), |_| vec![])
    }

    fn create(spec: &ApiKeySpec) -> Vec<String> {
        messages(admit(spec, None, &catalog(), None, "x-secret", &now()))
    }

    #[test]
    fn names_are_found_in_any_case_and_shown_in_one() {
        let verdict = check(&spec(KeyType::Team, &["ALERTS", "alerts"], &["ALERTS:READCONFIG"]), &catalog());
        assert!(verdict.problems.is_empty());
        assert_eq!(verdict.grants.presets, ["Alerts".into()]);
        assert_eq!(verdict.grants.permissions, ["alerts:ReadConfig".into()]);
    }

    #[test]
    fn unknown_names_come_with_the_nearest_ones() {
        assert_eq!(
            create(&spec(KeyType::Team, &["Alrets"], &["alerts:Read"])),
            [
                "spec.presets[0]: Not found: \"Alrets\": no preset has this name: did you mean Alerts?",
                "spec.permissions[0]: Not found: \"alerts:Read\": no permission has this name: did you mean alerts:ReadConfig or alerts:UpdateConfig?"
            ]
        );
        assert_eq!(
            create(&spec(KeyType::Team, &["alerts:ReadConfig"], &["alerts"])),
            [
                "spec.presets[0]: Not found: \"alerts:ReadConfig\": no preset has this name: alerts:ReadConfig is a permission: list it under spec.permissions",
                "spec.permissions[0]: Not found: \"alerts\": no permission has this name: Alerts is a preset: list it under spec.presets"
            ]
        );
        assert!(create(&spec(KeyType::Team, &["xyzzy"], &[]))[0].ends_with("lists all presets"));
    }

    #[test]
    fn a_standalone_preset_stands_alone() {
        assert!(create(&spec(KeyType::Team, &["RUM"], &[])).is_empty());
        for (presets, permissions) in [(&["rum", "Alerts"][..], &[][..]), (&["RUM"], &["alerts:ReadConfig"])] {
            let errors = create(&spec(KeyType::Team, presets, permissions));
            assert_eq!(
                errors,
                [
                    "spec.presets[0]: Invalid value: \"RUM\": a preset that stands alone: remove every other preset and permission, or create a key of its own for it"
                ]
            );
        }
    }

    #[test]
    fn send_your_data_keys_only_send_data() {
        assert!(create(&spec(KeyType::SendYourData, &["SendData"], &["rum-ingress:SendData"])).is_empty());
        assert_eq!(
            create(&spec(KeyType::SendYourData, &["Alerts"], &["alerts:ReadConfig"])),
            [
                "spec.presets[0]: Invalid value: \"Alerts\": a SendYourData key may only send data, and this preset grants alerts:ReadConfig: remove it, or create a key of type Team",
                "spec.permissions[0]: Invalid value: \"alerts:ReadConfig\": a SendYourData key may only send data, and this permission does more: remove it, or create a key of type Team"
            ]
        );
        assert!(create(&spec(KeyType::Team, &["Alerts", "SendData"], &[])).is_empty());
    }

    #[test]
    fn times_must_exist_and_may_lie_in_the_past_with_a_warning() {
        let with_expiry =
            |text: &str| ApiKeySpec { expires_at: Some(text.to_owned()), ..spec(KeyType::Team, &["Alerts"], &[]) };
        let warned =
            |new: &ApiKeySpec, old: Option<&ApiKeySpec>| admit(new, old, &catalog(), None, "s", &now()).unwrap();
        assert!(warned(&with_expiry("2026-11-23T10:00:01Z"), None).is_empty());
        let past = with_expiry("2026-11-23T11:00:00+02:00");
        let warning = "spec.expiresAt: 2026-11-23T11:00:00+02:00 is in the past: the key is Expired, and no request with it passes";
        for active in [None, Some(true), Some(false)] {
            assert_eq!(warned(&ApiKeySpec { active, ..past.clone() }, None), [warning]);
        }
        assert_eq!(
            create(&with_expiry("2027-02-31T00:00:00Z")),
            [
                "spec.expiresAt: Invalid value: \"2027-02-31T00:00:00Z\": must be an RFC 3339 time that exists, such as 2027-06-01T00:00:00Z"
            ]
        );
        let renamed = ApiKeySpec { display_name: Some("new".to_owned()), ..past.clone() };
        assert!(warned(&renamed, Some(&past)).is_empty(), "what was so before is not told again");
        assert_eq!(warned(&past, Some(&with_expiry("2027-01-01T00:00:00Z"))), [warning]);
    }

    #[test]
    fn overlap_is_shorter_than_the_interval() {
        let with = |every: &str, overlap: &str| ApiKeySpec {
            rotation: Some(Rotation {
                every: Some(every.to_owned()),
                overlap: Some(overlap.to_owned()),
                requested_at: None,
            }),
            ..spec(KeyType::Team, &["Alerts"], &[])
        };
        assert!(create(&with("1h", "59m")).is_empty());
        assert_eq!(
            create(&with("1h", "60m")),
            [
                "spec.rotation.overlap: Invalid value: \"1h\": must be shorter than every (1h), or more than two values would work at once"
            ]
        );
        assert_eq!(
            create(&with("1d", "1h")),
            ["spec.rotation.every: Invalid value: \"1d\": must be a duration such as 720h, 90m or 1h30m"]
        );
    }

    #[test]
    fn one_secret_has_one_key() {
        let spec = spec(KeyType::Team, &["Alerts"], &[]);
        assert_eq!(
            messages(admit(&spec, None, &catalog(), Some("first"), "shared", &now())),
            [
                "spec.secret.name: Invalid value: \"shared\": ApiKey first already writes to this Secret: choose another name"
            ]
        );
    }

    #[test]
    fn an_access_policy_may_be_named_before_it_exists() {
        let reference = Some(AccessPolicyRef { name: "p".to_owned() });
        let spec = ApiKeySpec { access_policy_ref: reference, ..spec(KeyType::Team, &["Alerts"], &[]) };
        assert!(create(&spec).is_empty());
    }

    #[test]
    fn a_legacy_key_may_do_what_the_catalogue_says_of_its_kind() {
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        assert!(create(&legacy)[0].contains("no PermissionCatalog says what a legacy key of this kind may do"));
        let verdict = check(&legacy, &legacy_catalog());
        assert!(verdict.problems.is_empty());
        assert_eq!(verdict.grants.permissions, ["alerts:ReadConfig".into()]);
    }

    fn limited(spec: &ApiKeySpec, old: Option<&ApiKeySpec>, limits: &Limits) -> Vec<String> {
        // Updates come a day after the creation.
        let created_at = old.map(|_| "2026-11-22T10:00:00Z".parse().unwrap());
        let terms = Terms { limits: Some(limits), created_at, ..now() };
        messages(admit(spec, old, &catalog(), None, "s", &terms))
    }

    #[test]
    fn a_key_lives_no_longer_than_the_settings_allow() {
        let limits = Limits { max_lifetime: Some("48h".to_owned()), ..Limits::default() };
        let with =
            |text: &str| ApiKeySpec { expires_at: Some(text.to_owned()), ..spec(KeyType::Team, &["Alerts"], &[]) };
        let never = spec(KeyType::Team, &["Alerts"], &[]);
        assert!(limited(&with("2026-11-25T10:00:00Z"), None, &limits).is_empty());
        assert_eq!(
            limited(&with("2026-11-25T10:00:01Z"), None, &limits),
            ["spec.expiresAt: Invalid value: \"2026-11-25T10:00:01Z\": must be at most 48h after the creation of the \
              key, by limits.maxLifetime of the SecuritySettings: set 2026-11-25T10:00:00Z or earlier"]
        );
        assert!(limited(&never, None, &limits)[0].starts_with("spec.expiresAt: Required value: must be at most 48h"));
        // No advice that can't be followed.
        let short = Limits { max_lifetime: Some("12h".to_owned()), ..Limits::default() };
        let late = limited(&with("2026-11-25T10:00:00Z"), Some(&with("2026-11-22T11:00:00Z")), &short);
        assert!(late[0].ends_with("that time has passed, so delete this ApiKey and create another"), "{late:?}");
        // It counts from the creation, not from the change.
        let old = with("2026-11-24T09:00:00Z");
        assert!(limited(&with("2026-11-24T10:00:00Z"), Some(&old), &limits).is_empty());
        assert_eq!(limited(&with("2026-11-24T10:00:01Z"), Some(&old), &limits).len(), 1);
        assert_eq!(limited(&never, Some(&old), &limits).len(), 1, "the expiry can't be taken out");
        // What was so before the limit came may stay, and other things may change.
        for old in [never, with("2030-01-01T00:00:00Z")] {
            let renamed = ApiKeySpec { display_name: Some("new".to_owned()), ..old.clone() };
            assert!(limited(&renamed, Some(&old), &limits).is_empty());
            assert_eq!(limited(&with("2031-01-01T00:00:00Z"), Some(&old), &limits).len(), 1);
        }
    }

    #[test]
    fn an_expiry_can_be_required() {
        let limits = Limits { require_expiry: Some(true), ..Limits::default() };
        let never = spec(KeyType::Team, &["Alerts"], &[]);
        let expiring = ApiKeySpec { expires_at: Some("2099-01-01T00:00:00Z".to_owned()), ..never.clone() };
        assert_eq!(
            limited(&never, None, &limits),
            [
                "spec.expiresAt: Required value: limits.requireExpiry of the SecuritySettings is true: set a time such as \
              2027-06-01T00:00:00Z"
            ]
        );
        assert!(limited(&expiring, None, &limits).is_empty());
        assert!(limited(&never, None, &Limits { require_expiry: Some(false), ..Limits::default() }).is_empty());
    }

    #[test]
    fn rotation_can_be_required() {
        let limits = Limits { max_rotation_interval: Some("720h".to_owned()), ..Limits::default() };
        let never = spec(KeyType::Team, &["Alerts"], &[]);
        let with = |every: &str| ApiKeySpec {
            rotation: Some(Rotation { every: Some(every.to_owned()), ..Rotation::default() }),
            ..never.clone()
        };
        assert!(limited(&with("720h"), None, &limits).is_empty());
        assert_eq!(
            limited(&with("721h"), None, &limits),
            [
                "spec.rotation.every: Invalid value: \"721h\": must be at most 720h, by limits.maxRotationInterval of the \
              SecuritySettings"
            ]
        );
        assert!(
            limited(&never, None, &limits)[0].starts_with("spec.rotation.every: Required value: must be at most 720h")
        );
        assert!(limited(&with("1d"), None, &limits)[0].contains("must be a duration such as 720h"));
        let deactivated = ApiKeySpec { active: Some(false), ..never.clone() };
        assert!(limited(&deactivated, Some(&never), &limits).is_empty());
        assert_eq!(limited(&with("800h"), Some(&with("900h")), &limits).len(), 1);
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        let terms = Terms { limits: Some(&limits), ..now() };
        assert!(admit(&legacy, None, &legacy_catalog(), None, "s", &terms).is_ok(), "a legacy key can't be rotated");
    }

    #[test]
    fn a_namespace_has_so_many_keys_at_most() {
        let key = spec(KeyType::Team, &["Alerts"], &[]);
        let of = |most: Option<i32>, count: usize, old: Option<&ApiKeySpec>| {
            let limits = Limits { max_keys: most, ..Limits::default() };
            let terms = Terms { limits: Some(&limits), namespace: ("shop", count), ..now() };
            let new = ApiKeySpec { display_name: Some("new".to_owned()), ..key.clone() };
            messages(admit(&new, old, &catalog(), None, "s", &terms))
        };
        assert!(of(Some(3), 2, None).is_empty() && of(None, 1_000_000, None).is_empty());
        assert_eq!(
            of(Some(3), 3, None),
            [
                "metadata.namespace: Forbidden: namespace shop has 3 ApiKeys, and limits.maxKeys of its SecuritySettings is \
              3: delete ApiKeys that are not needed, or have limits.maxKeys raised"
            ]
        );
        assert_eq!((of(Some(3), 4, None).len(), of(Some(0), 0, None).len()), (1, 1));
        assert!(of(Some(3), 4, Some(&key)).is_empty(), "keys that are there can be changed");
    }

    #[test]
    fn a_rotation_can_be_required_with_what_raises_a_key() {
        let limits = Limits { require_rotation_on_raise: Some(true), ..Limits::default() };
        let raised = |presets: &[&str], permissions: &[&str], asked: Option<&str>, overlap: Option<&str>| {
            let (requested_at, overlap) = (asked.map(str::to_owned), overlap.map(str::to_owned));
            let rotation = requested_at.is_some().then_some(Rotation { every: None, overlap, requested_at });
            ApiKeySpec { rotation, ..spec(KeyType::Team, presets, permissions) }
        };
        let old = raised(&["Alerts"], &[], Some("2026-11-20T10:00:00Z"), None);
        let told = |new: &ApiKeySpec, handled| {
            let terms = Terms { limits: Some(&limits), handled, ..now() };
            messages(admit(new, Some(&old), &catalog(), None, "s", &terms))
        };
        let more = |asked, overlap| raised(&["Alerts"], &["rum-ingress:SendData"], asked, overlap);
        assert_eq!(
            told(&more(Some("2026-11-20T10:00:00Z"), None), None),
            [
                "spec.rotation.requestedAt: Invalid value: \"2026-11-20T10:00:00Z\": must be a new time and not in the future, such as \
              2026-11-23T10:00:00Z and later than 2026-11-20T10:00:00Z, since this change adds permission \
              rum-ingress:SendData and limits.requireRotationOnRaise of the SecuritySettings is true: set it in the same \
              change, and rotation.overlap to 0s so that the value before gets nothing of it"
            ]
        );
        assert!(told(&more(None, None), None)[0].starts_with("spec.rotation.requestedAt: Required value: must be"));
        for future in ["2026-11-23T10:00:01Z", "2099-01-01T00:00:00Z", "9999-12-31T23:59:59Z"] {
            assert_eq!(told(&more(Some(future), None), None).len(), 1, "{future}: the value before would carry it");
        }
        // One that was carried out already is none, however the field was changed meanwhile.
        let again = more(Some("2026-11-21T10:00:00Z"), None);
        assert_eq!((told(&again, None).len(), told(&again, Some("2026-11-21T10:00:00Z")).len()), (0, 1));
        // Lowering, and what the key had by its preset, need none; nor does creating.
        for new in [
            raised(&[], &["alerts:ReadConfig"], None, None),
            ApiKeySpec { active: Some(false), ..raised(&["Alerts"], &[], None, None) },
        ] {
            assert!(told(&new, None).is_empty(), "{new:?}");
        }
        let terms = Terms { limits: Some(&limits), ..now() };
        let warnings = |new: &ApiKeySpec, old| admit(new, old, &catalog(), None, "s", &terms).unwrap();
        assert!(warnings(&more(None, None), None).is_empty());
        let overlapping = warnings(&more(Some("2026-11-23T10:00:00Z"), None), Some(&old));
        assert!(overlapping[0].contains("until the overlap ends, the value before carries permission rum"));
        assert!(warnings(&more(Some("2026-11-23T10:00:00Z"), Some("0s")), Some(&old)).is_empty());
        assert!(
            warnings(&more(Some("2026-11-20T10:00:00Z"), None), Some(&more(Some("2026-11-20T10:00:00Z"), Some("1h"))))
                .is_empty()
        );
    }

    #[test]
    fn a_value_that_was_pasted_into_a_field_is_not_repeated() {
        let value = "kwt_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi012345";
        let label = [("app".to_owned(), format!("{value} "))].into();
        let template = SecretTemplate { labels: label, ..Default::default() };
        let pasted = ApiKeySpec { secret: Some(template), ..spec(KeyType::Team, &[value], &[value]) };
        let errors = create(&pasted);
        assert_eq!(errors.len(), 3);
        assert!(errors.iter().all(|error| error.contains("[redacted]") && !error.contains("0123")), "{errors:?}");
    }

    #[test]
    fn what_a_catalogue_change_broke_can_still_be_edited() {
        let old = spec(KeyType::Team, &["Gone", "Alerts"], &[]);
        let deactivated = ApiKeySpec { active: Some(false), ..old.clone() };
        assert!(admit(&deactivated, Some(&old), &catalog(), None, "s", &now()).is_ok());
        let reordered = spec(KeyType::Team, &["Alerts", "gone"], &[]);
        assert!(admit(&reordered, Some(&old), &catalog(), None, "s", &now()).is_ok());
        let mended = spec(KeyType::Team, &["Alerts"], &[]);
        assert!(admit(&mended, Some(&old), &catalog(), None, "s", &now()).is_ok());
        let worse = spec(KeyType::Team, &["Gone", "Alerts", "Missing"], &[]);
        let errors = messages(admit(&worse, Some(&old), &catalog(), None, "s", &now()));
        assert_eq!(errors.len(), 1, "only what is new is refused: {errors:?}");
        assert!(errors[0].contains("Missing"));
        assert!(admit(&old, Some(&old), &Catalog::default(), None, "s", &now()).is_ok(), "metadata-only updates pass");
    }

    #[test]
    fn without_a_catalogue_there_is_one_clear_error() {
        let errors =
            messages(admit(&spec(KeyType::Team, &["A", "B"], &[]), None, &Catalog::default(), None, "s", &now()));
        assert_eq!(errors.len(), 1);
        assert!(errors[0].starts_with("spec: Forbidden: no PermissionCatalog is installed"));
    }

    #[test]
    fn a_preset_without_known_permissions_is_worth_a_warning() {
        let warnings = admit(&spec(KeyType::Team, &["Olly"], &[]), None, &catalog(), None, "s", &now()).unwrap();
        assert_eq!(
            warnings,
            ["spec.presets[0]: preset Olly grants nothing yet: its catalogue does not know its permissions"]
        );
    }

    #[test]
    fn secret_metadata_follows_the_rules_of_the_api_server() {
        let with = |key: &str, value: &str| {
            let map = [(key.to_owned(), value.to_owned())].into();
            let template = SecretTemplate { labels: map, ..Default::default() };
            create(&ApiKeySpec { secret: Some(template), ..spec(KeyType::Team, &["Alerts"], &[]) })
        };
        for (key, value) in [("app", "shop"), ("example.com/team", ""), ("a-b_c.d", "X-1")] {
            assert!(with(key, value).is_empty(), "{key}={value}");
        }
        for (key, value) in [("", "x"), ("-a", "x"), ("Example.com/a", "x"), ("a/b/c", "x"), ("app", "two words")] {
            assert!(with(key, value)[0].starts_with("spec.secret.labels["), "{key}={value}");
        }
    }
}
