#![cfg(test)]

use super::*;
use crate::{
    api::{AccessPolicyRef, Rotation, SecretTemplate},
    test_support::{catalog, key_spec as spec, legacy_catalog},
};

fn terms() -> Terms<'static> {
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
    messages(admit(spec, None, &catalog(), None, "x-secret", &terms()))
}

#[test]
fn names_match_in_any_case_and_grants_have_the_spelling_of_the_catalog() {
    let validation = check(&spec(KeyType::Team, &["ALERTS", "alerts"], &["ALERTS:READCONFIG"]), &catalog());
    assert!(validation.problems.is_empty());
    assert_eq!(validation.grants.presets, ["Alerts".into()]);
    assert_eq!(validation.grants.permissions, ["alerts:ReadConfig".into()]);
}

#[test]
fn a_message_about_an_unknown_name_suggests_similar_names() {
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
fn a_standalone_preset_allows_no_other_preset_or_permission() {
    assert!(create(&spec(KeyType::Team, &["RUM"], &[])).is_empty());
    for (presets, permissions) in [(&["rum", "Alerts"][..], &[][..]), (&["RUM"], &["alerts:ReadConfig"])] {
        let errors = create(&spec(KeyType::Team, presets, permissions));
        assert_eq!(
            errors,
            [
                "spec.presets[0]: Invalid value: \"RUM\": this preset is standalone: remove all other presets and permissions, or create a separate key for it"
            ]
        );
    }
}

#[test]
fn send_your_data_keys_allow_only_ingestion_permissions() {
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
fn invalid_times_are_rejected_and_a_past_expiry_is_a_warning() {
    let with_expiry =
        |text: &str| ApiKeySpec { expires_at: Some(text.to_owned()), ..spec(KeyType::Team, &["Alerts"], &[]) };
    let warnings =
        |new: &ApiKeySpec, old: Option<&ApiKeySpec>| admit(new, old, &catalog(), None, "s", &terms()).unwrap();
    assert!(warnings(&with_expiry("2026-11-23T10:00:01Z"), None).is_empty());
    let past = with_expiry("2026-11-23T11:00:00+02:00");
    let warning =
        "spec.expiresAt: 2026-11-23T11:00:00+02:00 is in the past: the key is Expired, and no request with it passes";
    for active in [None, Some(true), Some(false)] {
        assert_eq!(warnings(&ApiKeySpec { active, ..past.clone() }, None), [warning]);
    }
    assert_eq!(
        create(&with_expiry("2027-02-31T00:00:00Z")),
        [
            "spec.expiresAt: Invalid value: \"2027-02-31T00:00:00Z\": must be an RFC 3339 time that exists, such as 2027-06-01T00:00:00Z"
        ]
    );
    let renamed = ApiKeySpec { display_name: Some("new".to_owned()), ..past.clone() };
    assert!(warnings(&renamed, Some(&past)).is_empty(), "an unchanged expiry causes no warning");
    assert_eq!(warnings(&past, Some(&with_expiry("2027-01-01T00:00:00Z"))), [warning]);
}

#[test]
fn an_overlap_as_long_as_the_interval_is_rejected() {
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
fn a_secret_that_another_key_claims_is_rejected() {
    let spec = spec(KeyType::Team, &["Alerts"], &[]);
    assert_eq!(
        messages(admit(&spec, None, &catalog(), Some("first"), "shared", &terms())),
        [
            "spec.secret.name: Invalid value: \"shared\": ApiKey first already writes to this Secret: choose another name"
        ]
    );
}

#[test]
fn a_reference_to_a_missing_access_policy_is_accepted() {
    let reference = Some(AccessPolicyRef { name: "p".to_owned() });
    let spec = ApiKeySpec { access_policy_ref: reference, ..spec(KeyType::Team, &["Alerts"], &[]) };
    assert!(create(&spec).is_empty());
}

#[test]
fn a_legacy_key_has_the_permissions_that_the_catalog_lists_for_its_kind() {
    let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
    assert!(create(&legacy)[0].contains("no PermissionCatalog lists the permissions of legacy keys of this kind"));
    let validation = check(&legacy, &legacy_catalog());
    assert!(validation.problems.is_empty());
    assert_eq!(validation.grants.permissions, ["alerts:ReadConfig".into()]);
}

fn limited(spec: &ApiKeySpec, old: Option<&ApiKeySpec>, limits: &Limits) -> Vec<String> {
    // The creation was a day before.
    let created_at = old.map(|_| "2026-11-22T10:00:00Z".parse().unwrap());
    let terms = Terms { limits: Some(limits), created_at, ..terms() };
    messages(admit(spec, old, &catalog(), None, "s", &terms))
}

#[test]
fn an_expiry_after_max_lifetime_is_rejected() {
    let limits = Limits { max_lifetime: Some("48h".to_owned()), ..Limits::default() };
    let with = |text: &str| ApiKeySpec { expires_at: Some(text.to_owned()), ..spec(KeyType::Team, &["Alerts"], &[]) };
    let never = spec(KeyType::Team, &["Alerts"], &[]);
    assert!(limited(&with("2026-11-25T10:00:00Z"), None, &limits).is_empty());
    assert_eq!(
        limited(&with("2026-11-25T10:00:01Z"), None, &limits),
        ["spec.expiresAt: Invalid value: \"2026-11-25T10:00:01Z\": must be at most 48h after the creation of the \
          key, by limits.maxLifetime of the SecuritySettings: set 2026-11-25T10:00:00Z or earlier"]
    );
    assert!(limited(&never, None, &limits)[0].starts_with("spec.expiresAt: Required value: must be at most 48h"));
    // If the latest allowed time has passed, the message suggests another fix.
    let short = Limits { max_lifetime: Some("12h".to_owned()), ..Limits::default() };
    let late = limited(&with("2026-11-25T10:00:00Z"), Some(&with("2026-11-22T11:00:00Z")), &short);
    assert!(late[0].ends_with("that time has passed, so delete this ApiKey and create another"), "{late:?}");
    // The limit counts from the creation, not from the change.
    let old = with("2026-11-24T09:00:00Z");
    assert!(limited(&with("2026-11-24T10:00:00Z"), Some(&old), &limits).is_empty());
    assert_eq!(limited(&with("2026-11-24T10:00:01Z"), Some(&old), &limits).len(), 1);
    assert_eq!(limited(&never, Some(&old), &limits).len(), 1, "the expiry can't be removed");
    // An expiry from before the limit may stay while other fields change.
    for old in [never, with("2030-01-01T00:00:00Z")] {
        let renamed = ApiKeySpec { display_name: Some("new".to_owned()), ..old.clone() };
        assert!(limited(&renamed, Some(&old), &limits).is_empty());
        assert_eq!(limited(&with("2031-01-01T00:00:00Z"), Some(&old), &limits).len(), 1);
    }
}

#[test]
fn a_key_without_expiry_is_rejected_if_the_settings_require_one() {
    let limits = Limits { require_expiry: Some(true), ..Limits::default() };
    let never = spec(KeyType::Team, &["Alerts"], &[]);
    let expiring = ApiKeySpec { expires_at: Some("2099-01-01T00:00:00Z".to_owned()), ..never.clone() };
    assert_eq!(
        limited(&never, None, &limits),
        ["spec.expiresAt: Required value: limits.requireExpiry of the SecuritySettings is true: set a time such as \
          2027-06-01T00:00:00Z"]
    );
    assert!(limited(&expiring, None, &limits).is_empty());
    assert!(limited(&never, None, &Limits { require_expiry: Some(false), ..Limits::default() }).is_empty());
}

#[test]
fn a_rotation_interval_above_the_limit_of_the_settings_is_rejected() {
    let limits = Limits { max_rotation_interval: Some("720h".to_owned()), ..Limits::default() };
    let never = spec(KeyType::Team, &["Alerts"], &[]);
    let with = |every: &str| ApiKeySpec {
        rotation: Some(Rotation { every: Some(every.to_owned()), ..Rotation::default() }),
        ..never.clone()
    };
    assert!(limited(&with("720h"), None, &limits).is_empty());
    assert_eq!(
        limited(&with("721h"), None, &limits),
        ["spec.rotation.every: Invalid value: \"721h\": must be at most 720h, by limits.maxRotationInterval of the \
          SecuritySettings"]
    );
    assert!(limited(&never, None, &limits)[0].starts_with("spec.rotation.every: Required value: must be at most 720h"));
    assert!(limited(&with("1d"), None, &limits)[0].contains("must be a duration such as 720h"));
    let deactivated = ApiKeySpec { active: Some(false), ..never.clone() };
    assert!(limited(&deactivated, Some(&never), &limits).is_empty());
    assert_eq!(limited(&with("800h"), Some(&with("900h")), &limits).len(), 1);
    let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
    let terms = Terms { limits: Some(&limits), ..terms() };
    assert!(admit(&legacy, None, &legacy_catalog(), None, "s", &terms).is_ok(), "a legacy key can't be rotated");
}

#[test]
fn a_key_beyond_max_keys_of_the_namespace_is_rejected() {
    let key = spec(KeyType::Team, &["Alerts"], &[]);
    let of = |most: Option<i32>, count: usize, old: Option<&ApiKeySpec>| {
        let limits = Limits { max_keys: most, ..Limits::default() };
        let terms = Terms { limits: Some(&limits), namespace: ("shop", count), ..terms() };
        let new = ApiKeySpec { display_name: Some("new".to_owned()), ..key.clone() };
        messages(admit(&new, old, &catalog(), None, "s", &terms))
    };
    assert!(of(Some(3), 2, None).is_empty() && of(None, 1_000_000, None).is_empty());
    assert_eq!(
        of(Some(3), 3, None),
        ["metadata.namespace: Forbidden: namespace shop has 3 ApiKeys, and limits.maxKeys of its SecuritySettings is \
          3: delete ApiKeys that are not needed, or have limits.maxKeys raised"]
    );
    assert_eq!((of(Some(3), 4, None).len(), of(Some(0), 0, None).len()), (1, 1));
    assert!(of(Some(3), 4, Some(&key)).is_empty(), "existing keys can be changed");
}

#[test]
fn a_raise_without_rotation_is_rejected_if_the_settings_require_one() {
    let limits = Limits { require_rotation_on_raise: Some(true), ..Limits::default() };
    let raised = |presets: &[&str], permissions: &[&str], asked: Option<&str>, overlap: Option<&str>| {
        let (requested_at, overlap) = (asked.map(str::to_owned), overlap.map(str::to_owned));
        let rotation = requested_at.is_some().then_some(Rotation { every: None, overlap, requested_at });
        ApiKeySpec { rotation, ..spec(KeyType::Team, presets, permissions) }
    };
    let old = raised(&["Alerts"], &[], Some("2026-11-20T10:00:00Z"), None);
    let errors = |new: &ApiKeySpec, handled| {
        let terms = Terms { limits: Some(&limits), handled, ..terms() };
        messages(admit(new, Some(&old), &catalog(), None, "s", &terms))
    };
    let more = |asked, overlap| raised(&["Alerts"], &["rum-ingress:SendData"], asked, overlap);
    assert_eq!(
        errors(&more(Some("2026-11-20T10:00:00Z"), None), None),
        [
            "spec.rotation.requestedAt: Invalid value: \"2026-11-20T10:00:00Z\": must be a new time and not in the future, such as \
          2026-11-23T10:00:00Z and later than 2026-11-20T10:00:00Z, since this change adds permission \
          rum-ingress:SendData and limits.requireRotationOnRaise of the SecuritySettings is true: set it in the same \
          change, and rotation.overlap to 0s so that the previous value does not get the added permissions"
        ]
    );
    assert!(errors(&more(None, None), None)[0].starts_with("spec.rotation.requestedAt: Required value: must be"));
    for future in ["2026-11-23T10:00:01Z", "2099-01-01T00:00:00Z", "9999-12-31T23:59:59Z"] {
        assert_eq!(errors(&more(Some(future), None), None).len(), 1, "{future}: the previous value would carry it");
    }
    // A request that was already carried out does not count, even if the field changed since.
    let again = more(Some("2026-11-21T10:00:00Z"), None);
    assert_eq!((errors(&again, None).len(), errors(&again, Some("2026-11-21T10:00:00Z")).len()), (0, 1));
    // Lowering, permissions that a preset already granted, and a creation need no rotation.
    for new in [
        raised(&[], &["alerts:ReadConfig"], None, None),
        ApiKeySpec { active: Some(false), ..raised(&["Alerts"], &[], None, None) },
    ] {
        assert!(errors(&new, None).is_empty(), "{new:?}");
    }
    let terms = Terms { limits: Some(&limits), ..terms() };
    let warnings = |new: &ApiKeySpec, old| admit(new, old, &catalog(), None, "s", &terms).unwrap();
    assert!(warnings(&more(None, None), None).is_empty());
    let overlapping = warnings(&more(Some("2026-11-23T10:00:00Z"), None), Some(&old));
    assert!(overlapping[0].contains("until the overlap ends, the previous value carries permission rum"));
    assert!(warnings(&more(Some("2026-11-23T10:00:00Z"), Some("0s")), Some(&old)).is_empty());
    assert!(
        warnings(&more(Some("2026-11-20T10:00:00Z"), None), Some(&more(Some("2026-11-20T10:00:00Z"), Some("1h"))))
            .is_empty()
    );
}

#[test]
fn messages_redact_a_value_that_was_pasted_into_a_field() {
    let value = "kwt_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi012345";
    let label = [("app".to_owned(), format!("{value} "))].into();
    let template = SecretTemplate { labels: label, ..Default::default() };
    let pasted = ApiKeySpec { secret: Some(template), ..spec(KeyType::Team, &[value], &[value]) };
    let errors = create(&pasted);
    assert_eq!(errors.len(), 3);
    assert!(errors.iter().all(|error| error.contains("[redacted]") && !error.contains("0123")), "{errors:?}");
}

#[test]
fn a_spec_that_a_catalog_change_broke_can_still_be_edited() {
    let old = spec(KeyType::Team, &["Gone", "Alerts"], &[]);
    let deactivated = ApiKeySpec { active: Some(false), ..old.clone() };
    assert!(admit(&deactivated, Some(&old), &catalog(), None, "s", &terms()).is_ok());
    let reordered = spec(KeyType::Team, &["Alerts", "gone"], &[]);
    assert!(admit(&reordered, Some(&old), &catalog(), None, "s", &terms()).is_ok());
    let fixed = spec(KeyType::Team, &["Alerts"], &[]);
    assert!(admit(&fixed, Some(&old), &catalog(), None, "s", &terms()).is_ok());
    let worse = spec(KeyType::Team, &["Gone", "Alerts", "Missing"], &[]);
    let errors = messages(admit(&worse, Some(&old), &catalog(), None, "s", &terms()));
    assert_eq!(errors.len(), 1, "only new problems are reported: {errors:?}");
    assert!(errors[0].contains("Missing"));
    assert!(admit(&old, Some(&old), &Catalog::default(), None, "s", &terms()).is_ok(), "metadata-only updates pass");
}

#[test]
fn without_a_catalog_there_is_one_error() {
    let errors =
        messages(admit(&spec(KeyType::Team, &["A", "B"], &[]), None, &Catalog::default(), None, "s", &terms()));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("spec: Forbidden: no PermissionCatalog is installed"));
}

#[test]
fn a_preset_without_permissions_causes_a_warning() {
    let warnings = admit(&spec(KeyType::Team, &["Olly"], &[]), None, &catalog(), None, "s", &terms()).unwrap();
    assert_eq!(warnings, ["spec.presets[0]: preset Olly grants nothing yet: its catalog lists no permissions for it"]);
}

#[test]
fn secret_metadata_that_the_api_server_would_reject_is_rejected() {
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
