//! What a spec must satisfy beyond its CRD: rules that need the catalogue, the clock or other objects.
//!
//! Admission calls [`admit`]; reconciliation calls [`check`], which `admit` is built on. An error names the field,
//! the value and the way out. Specs hold no secrets, so their values may be shown.

use std::{fmt, sync::Arc};

use jiff::Timestamp;

use super::{catalog::Catalog, duration, time};
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
    /// The key would be expired from the start.
    ExpiryInPast,
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
            Self::ExpiryInPast => "ExpiryInPast",
            Self::InvalidSecretMetadata => "InvalidSecretMetadata",
            Self::SecretNameTaken => "SecretNameTaken",
            Self::LifetimeTooLong => "LifetimeTooLong",
            Self::ExpiryRequired => "ExpiryRequired",
            Self::RotationRequired => "RotationRequired",
        }
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
        Self { rule, field: field.into(), message, subject: subject.into() }
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
    let Verdict { mut problems, warnings, .. } = check(new, catalog);
    if let Some(text) = &new.expires_at
        && old.and_then(|old| old.expires_at.as_ref()) != Some(text)
        && time::parse(text).is_some_and(|expiry| expiry <= terms.now)
    {
        problems.push(Problem::new(
            Rule::ExpiryInPast,
            "spec.expiresAt",
            text,
            format!("{text} is in the past: set a later time, or set active to false to refuse the key now"),
        ));
    }
    if let Some(rival) = rival
        && old.is_none()
    {
        problems.push(Problem::new(
            Rule::SecretNameTaken,
            "spec.secret.name",
            secret_name,
            format!("ApiKey {rival} already writes to Secret {secret_name}: choose another name"),
        ));
    }
    check_limits(new, terms, &mut problems);
    if let Some(old) = old
        && !problems.is_empty()
    {
        let mut before = check(old, catalog).problems;
        check_limits(old, terms, &mut before);
        problems.retain(|problem| !before.iter().any(|known| known.same_as(problem)));
    }
    if problems.is_empty() { Ok(warnings) } else { Err(problems) }
}

/// What the SecuritySettings demand of every key. Reconciliation does not ask: a limit that comes later breaks no key.
fn check_limits(spec: &ApiKeySpec, terms: &Terms<'_>, problems: &mut Vec<Problem>) {
    let Some(limits) = terms.limits else { return };
    let longest = limits.max_lifetime.as_deref().and_then(duration::parse);
    let expiry = spec.expires_at.as_deref();
    match (expiry, longest) {
        (None, Some(longest)) => problems.push(Problem::new(
            Rule::ExpiryRequired,
            "spec.expiresAt",
            "",
            format!(
                "expiresAt is not set, and limits.maxLifetime of the SecuritySettings is {}: set a time at most that \
                 long after the creation of the key",
                duration::format(longest)
            ),
        )),
        (None, None) if limits.require_expiry == Some(true) => problems.push(Problem::new(
            Rule::ExpiryRequired,
            "spec.expiresAt",
            "",
            "expiresAt is not set, and limits.requireExpiry of the SecuritySettings is true: set a time such as \
             2027-06-01T00:00:00Z"
                .to_owned(),
        )),
        (Some(text), Some(longest)) => {
            let created = terms.created_at.unwrap_or(terms.now);
            // Where the limit lies beyond all times, nothing is too late.
            let last = created.checked_add(longest).ok();
            if let (Some(expiry), Some(last)) = (time::parse(text), last)
                && expiry > last
            {
                problems.push(Problem::new(
                    Rule::LifetimeTooLong,
                    "spec.expiresAt",
                    text,
                    format!(
                        "{text} is more than {} after the creation of the key, which limits.maxLifetime of the \
                         SecuritySettings forbids: set {last} or earlier",
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
        let parsed = every.and_then(duration::parse);
        let what = match every {
            None => "rotation.every is not set".to_owned(),
            Some(text) if parsed.is_some_and(|every| every > rarest) => format!("{text} is too rare"),
            Some(_) => return,
        };
        let rarest = duration::format(rarest);
        problems.push(Problem::new(
            Rule::RotationRequired,
            "spec.rotation.every",
            every.unwrap_or_default(),
            format!("{what}, and limits.maxRotationInterval of the SecuritySettings is {rarest}: set {rarest} or less"),
        ));
    }
}

fn check_grants(spec: &ApiKeySpec, catalog: &Catalog, verdict: &mut Verdict) {
    if catalog.is_empty() {
        verdict.problems.push(Problem::new(
            Rule::CatalogMissing,
            "spec",
            "",
            "no PermissionCatalog is installed, so no preset or permission is known: apply one, such as the \
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
            let message = format!("no preset is named {name:?}: {hint}");
            verdict.problems.push(Problem::new(Rule::PresetNotFound, field(), name.to_ascii_lowercase(), message));
            continue;
        };
        if preset.standalone && spec.presets.len() + spec.permissions.len() > 1 {
            verdict.problems.push(Problem::new(
                Rule::StandalonePreset,
                field(),
                &*preset.name,
                format!(
                    "preset {} stands alone: remove every other preset and permission, or make a key of its own for it",
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
                        "a SendYourData key may only send data, but preset {} grants {other}: remove it, or make a key of type Team",
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
            let message = format!("no permission is named {name:?}: {hint}");
            verdict.problems.push(Problem::new(Rule::PermissionNotFound, field(), name.to_ascii_lowercase(), message));
            continue;
        };
        if only_ingestion && !permission.ingestion {
            verdict.problems.push(Problem::new(
                Rule::NotIngestion,
                field(),
                &*permission.name,
                format!(
                    "a SendYourData key may only send data, but {} does more: remove it, or make a key of type Team",
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
                "no PermissionCatalog says what a legacy {kind:?} key may do: apply one with legacyRoles, such as the \
                 catalogue coralogix of the Helm chart"
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
                format!("{text:?} is no time that exists: write an RFC 3339 time such as 2027-06-01T00:00:00Z"),
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
                format!("{:?} is no duration: write one such as 720h, 90m or 1h30m", text.unwrap_or_default()),
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
                "{} is not shorter than every ({}), so more than two values would work at once: shorten overlap",
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
                "the key must be a name of at most 63 letters, digits, -, _ and ., optionally after a DNS name and a slash"
            } else if kind == "labels" && !value.is_empty() && !is_name(value) {
                "the value must have at most 63 letters, digits, -, _ and ., and start and end with a letter or digit"
            } else {
                continue;
            };
            problems.push(Problem::new(
                Rule::InvalidSecretMetadata,
                format!("spec.secret.{kind}[{key}]"),
                key,
                problem.to_owned(),
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
        Terms { limits: None, created_at: None, now: "2026-11-23T10:00:00Z".parse().unwrap() }
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
                "spec.presets[0]: no preset is named \"Alrets\": did you mean Alerts?",
                "spec.permissions[0]: no permission is named \"alerts:Read\": did you mean alerts:ReadConfig or alerts:UpdateConfig?"
            ]
        );
        assert_eq!(
            create(&spec(KeyType::Team, &["alerts:ReadConfig"], &["alerts"])),
            [
                "spec.presets[0]: no preset is named \"alerts:ReadConfig\": alerts:ReadConfig is a permission: list it under spec.permissions",
                "spec.permissions[0]: no permission is named \"alerts\": Alerts is a preset: list it under spec.presets"
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
                    "spec.presets[0]: preset RUM stands alone: remove every other preset and permission, or make a key of its own for it"
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
                "spec.presets[0]: a SendYourData key may only send data, but preset Alerts grants alerts:ReadConfig: remove it, or make a key of type Team",
                "spec.permissions[0]: a SendYourData key may only send data, but alerts:ReadConfig does more: remove it, or make a key of type Team"
            ]
        );
        assert!(create(&spec(KeyType::Team, &["Alerts", "SendData"], &[])).is_empty());
    }

    #[test]
    fn times_must_exist_and_lie_ahead() {
        let with_expiry =
            |text: &str| ApiKeySpec { expires_at: Some(text.to_owned()), ..spec(KeyType::Team, &["Alerts"], &[]) };
        assert!(create(&with_expiry("2026-11-23T10:00:01Z")).is_empty());
        assert_eq!(
            create(&with_expiry("2026-11-23T11:00:00+02:00")),
            [
                "spec.expiresAt: 2026-11-23T11:00:00+02:00 is in the past: set a later time, or set active to false to refuse the key now"
            ]
        );
        assert_eq!(
            create(&with_expiry("2027-02-31T00:00:00Z")),
            [
                "spec.expiresAt: \"2027-02-31T00:00:00Z\" is no time that exists: write an RFC 3339 time such as 2027-06-01T00:00:00Z"
            ]
        );
        let old = with_expiry("2026-01-01T00:00:00Z");
        let relabelled = ApiKeySpec { display_name: Some("new".to_owned()), ..old.clone() };
        assert!(admit(&relabelled, Some(&old), &catalog(), None, "s", &now()).is_ok(), "an expired key can be edited");
        let moved_back = with_expiry("2026-01-02T00:00:00Z");
        assert!(admit(&moved_back, Some(&old), &catalog(), None, "s", &now()).is_err());
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
                "spec.rotation.overlap: 1h is not shorter than every (1h), so more than two values would work at once: shorten overlap"
            ]
        );
        assert!(create(&with("1d", "1h"))[0].contains("spec.rotation.every: \"1d\" is no duration"));
    }

    #[test]
    fn one_secret_has_one_key() {
        let spec = spec(KeyType::Team, &["Alerts"], &[]);
        assert_eq!(
            messages(admit(&spec, None, &catalog(), Some("first"), "shared", &now())),
            ["spec.secret.name: ApiKey first already writes to Secret shared: choose another name"]
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
        assert!(create(&legacy)[0].contains("no PermissionCatalog says what a legacy LogsQuery key may do"));
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
            ["spec.expiresAt: 2026-11-25T10:00:01Z is more than 48h after the creation of the key, which \
              limits.maxLifetime of the SecuritySettings forbids: set 2026-11-25T10:00:00Z or earlier"]
        );
        assert!(
            limited(&never, None, &limits)[0].starts_with("spec.expiresAt: expiresAt is not set, and limits.maxLif")
        );
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
            ["spec.expiresAt: expiresAt is not set, and limits.requireExpiry of the SecuritySettings is true: set a \
              time such as 2027-06-01T00:00:00Z"]
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
            ["spec.rotation.every: 721h is too rare, and limits.maxRotationInterval of the SecuritySettings is 720h: \
              set 720h or less"]
        );
        assert!(limited(&never, None, &limits)[0].starts_with("spec.rotation.every: rotation.every is not set, and"));
        assert!(limited(&with("1d"), None, &limits)[0].contains("no duration"));
        let deactivated = ApiKeySpec { active: Some(false), ..never.clone() };
        assert!(limited(&deactivated, Some(&never), &limits).is_empty());
        assert_eq!(limited(&with("800h"), Some(&with("900h")), &limits).len(), 1);
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        let terms = Terms { limits: Some(&limits), ..now() };
        assert!(admit(&legacy, None, &legacy_catalog(), None, "s", &terms).is_ok(), "a legacy key can't be rotated");
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
        assert!(errors[0].starts_with("spec: no PermissionCatalog is installed"));
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
