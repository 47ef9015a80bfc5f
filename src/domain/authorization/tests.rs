#![cfg(test)]

use std::collections::BTreeSet;

use super::*;
use crate::{
    api::{AccessMode, AccessPolicyRef, AccessRule, LegacyKind},
    test_support::{catalog, key_spec as spec},
};

/// The text of a need: commas separate rights, bars alternatives.
fn words(need: &Need) -> String {
    let join = |needs: &[Need], by: &str| needs.iter().map(words).collect::<Vec<_>>().join(by);
    match need {
        Need::Right(right) => right.to_string(),
        Need::All(needs) => format!("({})", join(needs, ", ")),
        Need::Any(needs) => format!("[{}]", join(needs, " | ")),
    }
}

fn demands(authorization: &Authorization) -> Vec<(Gate, &'static str, String)> {
    authorization.demands.iter().map(|demand| (demand.gate, demand.field, words(&demand.need))).collect()
}

/// The gates of the denials and those of the demands.
fn gates(authorization: &Authorization) -> (Vec<Gate>, Vec<Gate>) {
    (authorization.denials.iter().map(|d| d.gate).collect(), authorization.demands.iter().map(|d| d.gate).collect())
}

fn known(mode: AccessMode, rules: Vec<AccessRule>, general: Option<AccessLevel>, creator: &str) -> KnownPolicy {
    let spec = AccessPolicySpec { mode, rules, general_access: general, general_policy_access: None };
    KnownPolicy { spec, creator: Some(creator.to_owned()) }
}

/// Calls a function with the inputs for user alice of group sre. The policies are `open`, `read`, `closed` and `mine`.
fn ask<T>(settings: Option<&SecuritySettingsSpec>, question: impl FnOnce(&AuthorizationInputs<'_>) -> T) -> T {
    let groups = ["sre".to_owned()];
    let policy = |name: &str| {
        let advanced = |level| known(AccessMode::Advanced, vec![], Some(level), "bob");
        let found = match name {
            "open" => advanced(AccessLevel::Manage),
            "read" => advanced(AccessLevel::Read),
            "closed" => advanced(AccessLevel::NoAccess),
            "mine" => known(AccessMode::Private, vec![], None, "bob"),
            _ => return None,
        };
        Some(Arc::new(found))
    };
    let requester = User { name: "alice", groups: &groups };
    question(&AuthorizationInputs { requester, catalog: &catalog(), settings, policy: &policy })
}

fn under(policy: &str, spec: ApiKeySpec) -> ApiKeySpec {
    ApiKeySpec { access_policy_ref: Some(AccessPolicyRef { name: policy.to_owned() }), ..spec }
}

fn team() -> ApiKeySpec {
    spec(KeyType::Team, &["Alerts"], &[])
}

fn personal(user: &str) -> ApiKeySpec {
    ApiKeySpec { user: Some(user.to_owned()), ..spec(KeyType::Personal, &[], &["alerts:ReadConfig"]) }
}

fn scoped() -> SecuritySettingsSpec {
    SecuritySettingsSpec { data_scoped_groups: vec!["x".to_owned(), "sre".to_owned()], ..Default::default() }
}

const CHANGED: OtherChanges = OtherChanges { metadata: true, provenance: provenance::ProvenanceChange::NOTHING };

const ALERTS: &str = "([preset Alerts | (permission alerts:ReadConfig, permission alerts:UpdateConfig)])";

#[test]
fn creation_needs_the_role_and_the_permissions_in_the_key() {
    for (key_type, permission) in [
        (KeyType::Team, "permission team-custom-api-keys:Manage"),
        (KeyType::SendYourData, "permission data-ingest-api-keys:Manage"),
    ] {
        let authorization = ask(None, |s| create(s, &spec(key_type, &["alerts"], &[]), "x"));
        let contents = (Gate::Contents, "spec", ALERTS.to_owned());
        assert_eq!(demands(&authorization), [(Gate::Role, "spec.type", permission.to_owned()), contents]);
        assert!(authorization.denials.is_empty());
    }
    let many = spec(KeyType::Team, &[], &["ALERTS:readconfig", "unknown:Read"]);
    let authorization = ask(None, |s| create(s, &many, "x"));
    let each = "([every permission | (permission alerts:ReadConfig, permission unknown:Read)])";
    assert_eq!(demands(&authorization)[1].2, each, "in the spelling of the catalog, with unknown names");
}

#[test]
fn a_preset_without_permissions_needs_the_right_to_the_preset_itself() {
    for name in ["Olly", "NoSuchPreset"] {
        let authorization = ask(None, |s| create(s, &spec(KeyType::Team, &[name], &[]), "x"));
        assert_eq!(demands(&authorization)[1].2, format!("(preset {name})"));
    }
}

#[test]
fn creation_with_a_policy_needs_the_permission_to_update_policies() {
    let authorization = ask(None, |s| create(s, &under("missing", team()), "x"));
    let one_of = "[permission data-ingest-api-keys:UpdateAccessPolicy | permission \
                  team-custom-api-keys:UpdateAccessPolicy | permission access-policies:UpdateAll]";
    assert_eq!(demands(&authorization)[1], (Gate::Role, "spec.accessPolicyRef", one_of.to_owned()));
    let authorization = ask(None, |s| create(s, &under("open", spec(KeyType::SendYourData, &["SendData"], &[])), "x"));
    assert!(!demands(&authorization)[1].2.contains("team-custom"), "the second spelling counts for Team keys only");
}

#[test]
fn members_of_data_scoped_groups_neither_create_nor_raise_nor_view_team_keys() {
    let settings = scoped();
    let denials =
        |authorization: Authorization| authorization.denials.iter().map(|d| (d.gate, d.field)).collect::<Vec<_>>();
    let lower = spec(KeyType::Team, &[], &["alerts:ReadConfig"]);
    ask(Some(&settings), |s| {
        assert_eq!(denials(create(s, &team(), "x")), [(Gate::DataScope, "spec.type")]);
        assert_eq!(denials(reveal(s, &team(), None, None)), [(Gate::DataScope, "spec.apiKeyRef")]);
        assert_eq!(denials(update(s, &lower, &team(), None, CHANGED)), [(Gate::DataScope, "spec.type")]);
        assert!(denials(update(s, &team(), &lower, None, CHANGED)).is_empty(), "lowering reveals no data");
        assert!(denials(delete(s, &team(), None)).is_empty());
        for other in [spec(KeyType::SendYourData, &["SendData"], &[]), personal("alice")] {
            assert!(denials(create(s, &other, "x")).is_empty());
            assert!(denials(reveal(s, &other, None, None)).is_empty());
        }
    });
}

#[test]
fn managing_a_personal_key_needs_its_user_or_the_right_to_impersonate_that_user() {
    let own = ask(None, |s| create(s, &personal("alice"), "x"));
    assert_eq!(gates(&own), (vec![], vec![Gate::Role, Gate::Contents]));
    let other = ask(None, |s| create(s, &personal("bob"), "x"));
    assert_eq!(demands(&other)[1], (Gate::Owner, "spec.user", "impersonate bob".to_owned()));
    let raised = ApiKeySpec { permissions: vec!["alerts:UpdateConfig".to_owned()], ..personal("bob") };
    let raised = ask(None, |s| update(s, &personal("bob"), &raised, None, CHANGED));
    assert_eq!(gates(&raised).1, [Gate::Role, Gate::Owner, Gate::Contents]);
    let old = ApiKeySpec { expires_at: Some("2027-01-01T00:00:00Z".to_owned()), ..personal("bob") };
    for new in [
        ApiKeySpec { display_name: Some("x".to_owned()), ..old.clone() },
        ApiKeySpec { active: Some(false), ..old.clone() },
        ApiKeySpec { expires_at: None, ..old.clone() },
        ApiKeySpec { rotation: Some(requested("2026-11-25T10:00:00Z")), ..old.clone() },
    ] {
        let changed = ask(None, |s| update(s, &old, &new, None, OtherChanges::default()));
        assert_eq!(demands(&changed)[1], (Gate::Owner, "spec.user", "impersonate bob".to_owned()), "{new:?}");
    }
    let deleted = ask(None, |s| delete(s, &personal("bob"), Some("alice")));
    assert_eq!(gates(&deleted), (vec![], vec![Gate::Role, Gate::Owner]), "the creator does not matter");
    assert_eq!(gates(&ask(None, |s| delete(s, &personal("alice"), None))).1, [Gate::Role]);
    // The right to impersonate a user is not enough to view the user's key.
    assert_eq!(gates(&ask(None, |s| reveal(s, &personal("bob"), None, Some("alice")))).0, [Gate::Owner]);
    assert!(gates(&ask(None, |s| reveal(s, &personal("alice"), None, Some("bob")))).0.is_empty());
}

#[test]
fn importing_a_legacy_key_needs_the_right_to_read_its_secret() {
    let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
    let legacy = ApiKeySpec { user: Some("alice".to_owned()), ..legacy };
    let authorization = ask(None, |s| create(s, &legacy, "old"));
    assert_eq!(
        demands(&authorization),
        [
            (Gate::Role, "spec.type", "permission user-legacy-logs-query-api-keys:Manage".to_owned()),
            (Gate::Import, "spec.secret.name", "get Secret old".to_owned()),
        ]
    );
    let view = ask(None, |s| demands(&reveal(s, &legacy, None, None)));
    assert_eq!(view[0].2, "permission user-legacy-logs-query-api-keys:ReadConfig");
}

#[test]
fn a_change_needs_the_role_and_manage_of_the_policy() {
    let renamed = |old: &ApiKeySpec| ApiKeySpec { display_name: Some("new".to_owned()), ..old.clone() };
    for (policy, denied) in [("open", false), ("read", true), ("closed", true), ("mine", true), ("missing", true)] {
        let old = under(policy, team());
        let authorization = ask(None, |s| update(s, &old, &renamed(&old), Some("carol"), CHANGED));
        let denials = if denied { vec![Gate::Policy] } else { vec![] };
        assert_eq!(gates(&authorization), (denials.clone(), vec![Gate::Role]), "{policy}");
        assert_eq!(gates(&ask(None, |s| delete(s, &old, Some("carol")))), (denials, vec![Gate::Role]), "{policy}");
    }
    let private = under("mine", team());
    assert!(gates(&ask(None, |s| delete(s, &private, Some("alice")))).0.is_empty(), "the creator of the key");
    let message = ask(None, |s| delete(s, &under("read", team()), None)).denials.remove(0).message;
    assert_eq!(
        message,
        "AccessPolicy read gives alice Read and Manage is needed to manage the key (general access: no rule covers \
         the user)"
    );
}

#[test]
fn a_missing_policy_denies_view_and_manage_but_can_be_replaced() {
    let old = under("missing", team());
    for (authorization, verb) in [
        (ask(None, |s| delete(s, &old, Some("alice"))), "manage"),
        (ask(None, |s| reveal(s, &old, None, Some("alice"))), "view"),
    ] {
        let [denial] = authorization.denials.as_slice() else { panic!("{authorization:?}") };
        assert_eq!((denial.gate, denial.field), (Gate::Policy, "spec.accessPolicyRef"));
        assert!(denial.message.contains(&format!("no user may {verb} the key")), "{}", denial.message);
    }
    for new in [under("open", team()), team()] {
        let authorization = ask(None, |s| update(s, &old, &new, None, OtherChanges::default()));
        assert_eq!(gates(&authorization), (vec![], vec![Gate::Role]));
        assert_eq!(authorization.demands[0].field, "spec.accessPolicyRef");
    }
}

#[test]
fn replacing_a_policy_needs_manage_of_the_old_policy_itself_and_not_of_the_key() {
    for (policy, more) in [("open", vec![]), ("read", vec![Gate::Policy]), ("closed", vec![Gate::Policy])] {
        let authorization =
            ask(None, |s| update(s, &under(policy, team()), &under("open2", team()), None, OtherChanges::default()));
        assert_eq!(gates(&authorization), (vec![], [vec![Gate::Role], more].concat()), "{policy}");
    }
    let authorization = ask(None, |s| update(s, &under("closed", team()), &team(), None, OtherChanges::default()));
    assert_eq!(demands(&authorization)[1].2, "permission access-policies:UpdateAll", "the remedy");
    let authorization =
        ask(None, |s| update(s, &under("mine", team()), &team(), Some("alice"), OtherChanges::default()));
    assert_eq!(gates(&authorization).1, [Gate::Role], "Private: the creator of the key may");
    let authorization = ask(None, |s| update(s, &under("mine", team()), &team(), Some("bob"), OtherChanges::default()));
    assert_eq!(gates(&authorization).1, [Gate::Role, Gate::Policy], "the creator of the policy may not");
}

#[test]
fn a_raise_needs_the_added_permissions_and_lowering_needs_none() {
    let whole = spec(KeyType::SendYourData, &["Alerts"], &["logs.data-ingress:SendData"]);
    for lower in [
        spec(KeyType::SendYourData, &["Alerts"], &[]),
        spec(KeyType::SendYourData, &[], &["alerts:ReadConfig"]),
        ApiKeySpec { active: Some(false), ..whole.clone() },
    ] {
        assert_eq!(gates(&ask(None, |s| update(s, &whole, &lower, None, CHANGED))), (vec![], vec![Gate::Role]));
    }
    let raised = spec(KeyType::SendYourData, &["Alerts", "RUM"], &["logs.data-ingress:SendData"]);
    let authorization = ask(None, |s| update(s, &whole, &raised, None, CHANGED));
    assert_eq!(demands(&authorization)[1].2, "([preset RUM | (permission rum-ingress:SendData)])");
    // A preset instead of its permissions is a raise, since the preset may grow.
    let parts = spec(KeyType::SendYourData, &[], &["alerts:ReadConfig", "alerts:UpdateConfig"]);
    let authorization = ask(None, |s| update(s, &parts, &spec(KeyType::SendYourData, &["Alerts"], &[]), None, CHANGED));
    assert_eq!(demands(&authorization)[1].2, ALERTS);
    // A raise of a Team key needs all permissions in the key.
    let authorization = ask(None, |s| update(s, &team(), &spec(KeyType::Team, &["Alerts", "RUM"], &[]), None, CHANGED));
    assert!(
        demands(&authorization)[1].2.contains("preset Alerts") && demands(&authorization)[1].2.contains("preset RUM")
    );
}

fn requested(at: &str) -> Rotation {
    Rotation { requested_at: Some(at.to_owned()), ..Rotation::default() }
}

fn rotating(every: Option<&str>, overlap: Option<&str>) -> Rotation {
    Rotation { every: every.map(str::to_owned), overlap: overlap.map(str::to_owned), requested_at: None }
}

#[test]
fn renewals_need_the_permissions_in_the_key_and_their_opposites_need_none() {
    let expiring = |at: &str| ApiKeySpec { expires_at: Some(at.to_owned()), ..team() };
    let with = |rotation: Option<Rotation>| ApiKeySpec { rotation, ..team() };
    let off = ApiKeySpec { active: Some(false), ..team() };
    let (early, late) = (expiring("2027-01-01T00:00:00Z"), expiring("2027-01-01T00:00:00-01:00"));
    let broken = expiring("2027-02-31T00:00:00Z");
    let mut cases = vec![];
    for (new, old, action) in [
        (team(), off.clone(), "turn on"),
        (late.clone(), early.clone(), "extend"),
        (expiring("9999-12-31T23:59:59Z"), early.clone(), "extend"),
        (team(), early.clone(), "extend"),
    ] {
        cases.push((old.clone(), new.clone(), Some(action)));
        cases.push((new, old, None));
    }
    let hourly = with(Some(rotating(Some("1h"), Some("30m"))));
    cases.extend([
        (ApiKeySpec { active: Some(true), ..team() }, team(), None),
        (broken.clone(), early.clone(), Some("extend")),
        (early.clone(), broken, Some("extend")),
        (team(), with(Some(requested("2026-11-25T10:00:00Z"))), Some("rotate")),
        (with(Some(requested("2026-11-25T10:00:00Z"))), with(Some(requested("2026-11-24T10:00:00Z"))), Some("rotate")),
        (with(Some(requested("2026-11-25T10:00:00Z"))), team(), None),
        (team(), hourly.clone(), Some("rotate")),
        (hourly.clone(), with(Some(rotating(Some("2h"), Some("30m")))), Some("rotate")),
        (hourly.clone(), team(), Some("rotate")),
        (hourly.clone(), with(Some(rotating(Some("1h"), Some("59m")))), Some("prolong the overlap of")),
        (hourly.clone(), with(Some(rotating(Some("1h"), None))), Some("prolong the overlap of")),
        (hourly.clone(), with(Some(rotating(Some("1h"), Some("1800s")))), None),
        (hourly, with(Some(rotating(Some("1h"), Some("0s")))), None),
    ]);
    for (old, new, action) in cases {
        for key_type in [KeyType::Team, KeyType::SendYourData] {
            let of_type = |spec: &ApiKeySpec| ApiKeySpec { key_type, ..spec.clone() };
            let authorization = ask(None, |s| update(s, &of_type(&old), &of_type(&new), None, OtherChanges::default()));
            let contents: Vec<_> = authorization.demands.iter().filter(|d| d.gate == Gate::Contents).collect();
            let purposes: Vec<_> = contents.iter().map(|demand| demand.purpose.as_str()).collect();
            let expected = action.map(|action| format!("{action} a key that carries it"));
            assert_eq!(purposes, Vec::from_iter(expected.as_deref()), "{old:?} to {new:?}");
            assert!(contents.iter().all(|demand| words(&demand.need) == ALERTS));
        }
    }
    let activated = ask(Some(&scoped()), |s| update(s, &off, &team(), None, OtherChanges::default()));
    assert_eq!(gates(&activated).0, [Gate::DataScope]);
    let deactivated = ask(Some(&scoped()), |s| update(s, &team(), &off, None, OtherChanges::default()));
    assert!(gates(&deactivated).0.is_empty());
}

#[test]
fn a_change_of_the_applied_state_needs_the_rights_for_the_fields() {
    let fields = provenance::ProvenanceChange { fields: true, ..Default::default() };
    let authorize = |old: &ApiKeySpec, provenance| {
        ask(None, |s| update(s, old, old, Some("carol"), OtherChanges { metadata: false, provenance }))
    };
    let gates_of = |old: &ApiKeySpec, provenance| gates(&authorize(old, provenance));
    assert_eq!(gates_of(&team(), provenance::ProvenanceChange::NOTHING), (vec![], vec![]));
    assert_eq!(gates_of(&team(), fields), (vec![], vec![Gate::Provenance]));
    assert_eq!(gates_of(&under("read", team()), fields).0, [Gate::Policy]);
    assert_eq!(gates_of(&personal("bob"), fields).1, [Gate::Provenance, Gate::Provenance]);
    let policy = provenance::ProvenanceChange { policy: true, ..Default::default() };
    assert_eq!(demands(&authorize(&under("open", team()), policy))[0].2.matches("UpdateAccessPolicy").count(), 2);
    assert_eq!(gates_of(&under("closed", team()), policy).1, [Gate::Provenance, Gate::Policy]);
    // If the next apply would renew the key, the request also needs the permissions in the key.
    let (off, expiring, rotating) = (
        ApiKeySpec { active: Some(false), ..team() },
        ApiKeySpec { expires_at: Some("2027-01-01T00:00:00Z".to_owned()), ..team() },
        ApiKeySpec { rotation: Some(rotating(Some("1h"), None)), ..team() },
    );
    let removes = [
        (
            &off,
            provenance::ProvenanceChange {
                removes: provenance::Removes { active: true, ..Default::default() },
                ..fields
            },
        ),
        (
            &expiring,
            provenance::ProvenanceChange {
                removes: provenance::Removes { expiry: true, ..Default::default() },
                ..fields
            },
        ),
        (
            &rotating,
            provenance::ProvenanceChange {
                removes: provenance::Removes { rotation: true, ..Default::default() },
                ..fields
            },
        ),
    ];
    for (spec, change) in removes {
        assert_eq!(gates_of(spec, change).1, [Gate::Provenance, Gate::Contents], "{change:?}");
        assert_eq!(gates_of(&team(), change).1, [Gate::Provenance], "the key lacks the field: {change:?}");
    }
}

#[test]
fn the_annotations_of_a_restore_need_the_right_to_restore() {
    let of = |creator, restored_by, accepts| Stamps { creator, restored_by, accepts };
    let gates_of = |old: Option<Stamps<'_>>, new| gates(&stamps("alice", old.as_ref(), &new));
    let (allowed, denied) = ((vec![], vec![]), (vec![Gate::Restore], vec![]));
    let needs_restore = (vec![], vec![Gate::Restore]);
    assert_eq!(gates_of(None, of(Some("alice"), None, None)), allowed);
    assert_eq!(gates_of(None, of(Some("carol"), Some("alice"), None)), needs_restore);
    assert_eq!(gates_of(None, of(Some("alice"), None, Some("sha256:00"))), needs_restore);
    for forged in [of(None, None, None), of(Some("carol"), None, None), of(Some("carol"), Some("bob"), None)] {
        assert_eq!(gates_of(None, forged), denied, "{forged:?}");
    }
    let old = of(Some("carol"), Some("bob"), Some("sha256:00"));
    assert_eq!(gates_of(Some(old), old), allowed);
    assert_eq!(gates_of(Some(old), Stamps { accepts: None, ..old }), allowed, "a removal needs no right");
    assert_eq!(gates_of(Some(old), Stamps { accepts: Some("sha256:01"), ..old }), needs_restore);
    assert_eq!(gates_of(Some(old), Stamps { creator: Some("alice"), ..old }), denied);
    assert_eq!(gates_of(Some(old), Stamps { restored_by: None, ..old }), denied);
    assert_eq!(
        stamps("alice", None, &of(Some("carol"), Some("alice"), None)).demands[0].need,
        Need::Right(Right::Restore)
    );
}

#[test]
fn a_reveal_needs_the_view_role_read_of_the_policy_and_the_permissions_in_the_key() {
    for (policy, denied) in [("open", false), ("read", false), ("closed", true), ("mine", true)] {
        let authorization = ask(None, |s| reveal(s, &under(policy, team()), None, Some("carol")));
        let denials = if denied { vec![Gate::Policy] } else { vec![] };
        assert_eq!(gates(&authorization), (denials, vec![Gate::Role, Gate::Contents]), "{policy}");
        assert!(authorization.ruling.is_some());
    }
    let authorization = ask(None, |s| reveal(s, &team(), None, None));
    assert_eq!(demands(&authorization)[0].2, "permission team-custom-api-keys:ReadConfig");
    assert_eq!(demands(&authorization)[1].2, ALERTS);
    // The permissions in force and those of the spec count.
    let status = ApiKeyStatus { permissions: vec!["rum-ingress:SendData".to_owned()], ..Default::default() };
    let authorization = ask(None, |s| reveal(s, &team(), Some(&status), None));
    let need = &demands(&authorization)[1].2;
    assert!(need.contains("preset Alerts") && need.contains("permission rum-ingress:SendData"), "{need}");
}

#[test]
fn writes_of_policies_need_manage_of_the_policy_and_writes_of_settings_need_their_permission() {
    let requester = User { name: "alice", groups: &[] };
    let team: BTreeSet<_> = [KeyType::Team].into();
    let both: BTreeSet<_> = [KeyType::Team, KeyType::SendYourData].into();
    for (types, own_spelling) in [(&BTreeSet::new(), true), (&team, true), (&both, false)] {
        let authorization = write_policy(requester, None, types);
        assert_eq!(gates(&authorization), (vec![], vec![Gate::Role]));
        assert_eq!(demands(&authorization)[0].2.contains("team-custom-api-keys:UpdateAccessPolicy"), own_spelling);
    }
    for (old, more) in [
        (known(AccessMode::Private, vec![], None, "alice"), vec![]),
        (known(AccessMode::Private, vec![], None, "bob"), vec![Gate::Policy]),
        (known(AccessMode::Advanced, vec![], Some(AccessLevel::Manage), "bob"), vec![]),
        (known(AccessMode::Advanced, vec![], Some(AccessLevel::Read), "alice"), vec![Gate::Policy]),
    ] {
        let authorization = write_policy(requester, Some(&old), &team);
        assert_eq!(gates(&authorization), (vec![], [vec![Gate::Role], more].concat()), "{old:?}");
    }
    assert_eq!(
        demands(&write_settings()),
        [(Gate::Role, "spec", "permission team-api-keys-security-settings:Manage".to_owned())]
    );
}

#[test]
fn every_gate_has_its_own_reason() {
    let gates = [
        Gate::Role,
        Gate::Policy,
        Gate::Contents,
        Gate::DataScope,
        Gate::Owner,
        Gate::Import,
        Gate::Provenance,
        Gate::Restore,
    ];
    let reasons: BTreeSet<_> = gates.iter().map(|gate| gate.reason()).collect();
    assert_eq!(reasons.len(), gates.len());
    assert!(reasons.iter().all(|reason| reason.ends_with("Denied")));
}
