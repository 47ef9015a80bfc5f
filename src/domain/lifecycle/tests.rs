#![cfg(test)]

use super::*;
use crate::{
    api::{KeyState, KeyType, Rotation},
    domain::{status::build, validate::check},
    test_support::{catalog, key_spec as spec},
};

const START: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(START + seconds).unwrap()
}

fn time(seconds: i64) -> String {
    at(seconds).to_string()
}

/// A simulation of one key and its Secret. It calls the same functions as the controller.
struct Simulation {
    key: ApiKey,
    secret: Observed,
    settings: Option<SecuritySettingsSpec>,
    minted: u8,
}

impl Simulation {
    fn new(edit: impl FnOnce(&mut ApiKeySpec)) -> Self {
        let mut key = ApiKey::new("k", spec(KeyType::Team, &["Alerts"], &[]));
        edit(&mut key.spec);
        key.metadata.generation = Some(1);
        Self { key, secret: Observed::Missing, settings: None, minted: 0 }
    }

    fn edit(&mut self, edit: impl FnOnce(&mut ApiKeySpec)) {
        edit(&mut self.key.spec);
        self.key.metadata.generation = self.key.metadata.generation.map(|g| g + 1);
    }

    fn rotation(&mut self, edit: impl FnOnce(&mut Rotation)) {
        self.edit(|spec| edit(spec.rotation.get_or_insert_default()));
    }

    /// Reconciles at a time and returns the step.
    fn run(&mut self, seconds: i64) -> Step {
        let (step, held) = self.write(seconds);
        if let Some(held) = held {
            self.secret = Observed::Ours(held);
        }
        self.report(seconds);
        step
    }

    /// Decides and writes the Secret, without the status.
    fn write(&mut self, seconds: i64) -> (Step, Option<OwnedSecret>) {
        let now = at(seconds);
        let validation = check(&self.key.spec, &catalog());
        let unread = Observed::NotRead;
        let settings = self.settings.as_ref();
        let secret = if must_read(&self.key, settings, now, true) { &self.secret } else { &unread };
        let mut step = step(&Inputs { settings, ..Inputs::new(&self.key, &validation, secret, now) });
        if matches!(step, Step::Mint(_)) && self.secret != Observed::Missing {
            // The creation fails because the Secret exists, so the controller reads it and decides again.
            let secret = &self.secret;
            step = super::step(&Inputs { settings, ..Inputs::new(&self.key, &validation, secret, now) });
        }
        let record = match step.clone() {
            Step::Rest => return (step, None),
            Step::Mint(draft) | Step::Rotate { draft, .. } => {
                self.minted += 1;
                draft.seal(&self.key, Digest::of(&[self.minted]), now)
            }
            Step::Amend { record, .. } | Step::Erase { record, .. } => record,
        };
        let written = Some(record.clone());
        let version = format!("v{seconds}");
        (step, Some(OwnedSecret { version, record, written, mac: None, intact: true, owned: true, in_order: true }))
    }

    /// Writes the status.
    fn report(&mut self, seconds: i64) {
        let validation = check(&self.key.spec, &catalog());
        let settings = self.settings.as_ref();
        let inputs = Inputs { settings, ..Inputs::new(&self.key, &validation, &self.secret, at(seconds)) };
        self.key.status = Some(build(&inputs));
    }

    fn status(&self) -> &ApiKeyStatus {
        self.key.status.as_ref().unwrap()
    }

    /// The numbers of the values that a verifier accepts at a time.
    fn live(&self, seconds: i64) -> Vec<u8> {
        let schedule = Schedule::of(&self.key.spec);
        if !schedule.active || schedule.expired(at(seconds)) {
            return vec![];
        }
        let works = |t: &&Token| t.expires_at.as_ref().is_none_or(|end| end.0 > at(seconds));
        let number = |t: &Token| (1..=self.minted).find(|n| Digest::of(&[*n]).to_string() == t.sha256).unwrap();
        self.status().tokens.iter().filter(works).map(number).collect()
    }
}

#[test]
fn an_unused_key_is_inactive_until_a_rotation_is_requested() {
    let limits = crate::api::Limits { deactivate_unused_after: Some("1h".to_owned()), ..Default::default() };
    let mut sim = Simulation::new(|_| {});
    sim.settings = Some(SecuritySettingsSpec { limits: Some(limits), ..Default::default() });
    sim.rotation(|r| r.every = Some("90m".to_owned()));
    sim.run(0);
    sim.run(4000);
    assert_eq!(sim.status().state, Some(KeyState::Active), "no verifier reports uses");

    let used = |sim: &mut Simulation, seconds| {
        sim.key.status.as_mut().unwrap().last_used_at = Some(crate::api::Time(at(seconds)));
        sim.report(seconds);
    };
    used(&mut sim, 600);
    let wake = |sim: &Simulation, now| next_wake(&sim.key, sim.status(), sim.settings.as_ref(), at(now));
    assert_eq!(wake(&sim, 600), Some(at(4200)), "one hour after the use");
    sim.run(4199);
    assert_eq!(sim.status().state, Some(KeyState::Active));
    sim.run(4200);
    assert_eq!(sim.status().state, Some(KeyState::Inactive));
    let ready = &sim.status().conditions[0];
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Unused"));
    assert!(ready.message.contains("set spec.rotation.requestedAt"), "{}", ready.message);
    assert_eq!(sim.status().last_used_at.as_ref().unwrap().0, at(600), "preserved");

    assert_eq!(sim.run(5400), Step::Rest, "the schedule does not reactivate the key");
    sim.rotation(|r| r.requested_at = Some(time(5500)));
    assert!(matches!(sim.run(5500), Step::Rotate { .. }));
    assert_eq!(sim.status().state, Some(KeyState::Active));
    sim.run(9099);
    assert_eq!(sim.status().state, Some(KeyState::Active), "counted from the mint of the new value");
    sim.run(9100);
    assert_eq!(sim.status().state, Some(KeyState::Inactive));
    // Without the limit the key is active again.
    sim.settings = None;
    sim.run(9101);
    assert_eq!(sim.status().state, Some(KeyState::Active));
}

#[test]
fn the_first_creator_in_the_status_is_never_replaced() {
    let annotate = |sim: &mut Simulation, name: &str| {
        let annotation = (crate::api::CREATOR_ANNOTATION.to_owned(), name.to_owned());
        sim.key.metadata.annotations = Some([annotation].into());
    };
    let creator = |sim: &Simulation| sim.status().creator.clone();
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    assert_eq!(creator(&sim), None);
    annotate(&mut sim, "alice");
    sim.run(1);
    annotate(&mut sim, "mallory");
    sim.run(2);
    sim.key.metadata.annotations = None;
    sim.run(3);
    assert_eq!(creator(&sim).unwrap().name, "alice");
    assert_eq!(creator(&sim).unwrap().kind, crate::api::CreatorKind::User);
    let mut other = Simulation::new(|_| {});
    annotate(&mut other, "system:serviceaccount:argocd:argocd");
    other.run(0);
    assert_eq!(creator(&other).unwrap().kind, crate::api::CreatorKind::ServiceAccount);
}

#[test]
fn a_missing_policy_sets_policy_accepted_to_false_and_leaves_the_key_ready() {
    let mut sim = Simulation::new(|spec| {
        spec.access_policy_ref = Some(crate::api::AccessPolicyRef { name: "p".to_owned() });
    });
    sim.run(0);
    let status = sim.status();
    assert_eq!(status.conditions[0].status, "True", "Ready");
    let policy = status.conditions.iter().find(|c| c.type_ == "PolicyAccepted").unwrap();
    assert_eq!((policy.status.as_str(), policy.reason.as_str()), ("False", "PolicyNotFound"));
    let events = crate::domain::status::notes(None, status, true);
    assert!(events.iter().any(|note| note.warning && note.reason == "PolicyNotFound"), "{events:?}");
    let repeated = crate::domain::status::notes(Some(status), status, false);
    assert!(repeated.is_empty(), "{repeated:?}");
}

#[test]
fn a_key_is_minted_once() {
    let mut sim = Simulation::new(|_| {});
    assert!(matches!(sim.run(0), Step::Mint(_)));
    assert_eq!(sim.status().state, Some(KeyState::Active));
    for seconds in [0, 1, 1_000_000] {
        assert_eq!(sim.run(seconds), Step::Rest);
    }
    assert_eq!(sim.live(2_000_000), [1]);
}

#[test]
fn a_lost_status_is_rebuilt_from_the_record() {
    let mut sim =
        Simulation::new(|s| s.rotation = Some(Rotation { requested_at: Some(time(0)), ..Default::default() }));
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(10)));
    sim.run(10);
    let before = sim.key.status.take();
    assert_eq!(sim.run(20), Step::Rest);
    assert_eq!(sim.status().tokens, before.as_ref().unwrap().tokens);
    assert_eq!(sim.status().last_handled_requested_at, Some(time(10)));
    assert_eq!(sim.status().last_rotated_at, before.unwrap().last_rotated_at);
}

#[test]
fn a_scheduled_rotation_keeps_the_previous_value_until_the_overlap_ends() {
    let mut sim = Simulation::new(|s| {
        s.rotation =
            Some(Rotation { every: Some("1h".to_owned()), overlap: Some("10m".to_owned()), requested_at: None });
    });
    sim.run(0);
    assert_eq!(sim.run(3599), Step::Rest);
    assert!(matches!(sim.run(3600), Step::Rotate { .. }));
    assert_eq!(sim.live(3600), [2, 1]);
    assert_eq!(next_wake(&sim.key, sim.status(), None, at(3600)), Some(at(4200)));
    assert_eq!(sim.live(4200), [2], "the verifier uses the time, with or without a reconciliation");
    assert_eq!(sim.run(4200), Step::Rest, "the end of an overlap needs no write to the Secret");
    assert_eq!(sim.status().tokens.len(), 1);
    assert_eq!(sim.status().next_rotation_at.as_ref().map(|t| t.0), Some(at(7200)));
}

#[test]
fn a_crash_between_the_writes_of_secret_and_status_does_not_rotate_again() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(10)));
    let (_, held) = sim.write(10);
    sim.secret = Observed::Ours(held.unwrap());
    assert_eq!(sim.run(11), Step::Rest, "the record contains the request");
    assert_eq!(sim.live(11), [2, 1]);
}

#[test]
fn a_rotation_request_is_carried_out_once() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(1)));
    assert!(matches!(sim.run(1), Step::Rotate { .. }));
    sim.edit(|s| s.display_name = Some("other".to_owned()));
    assert_eq!(sim.run(2), Step::Rest);
    sim.rotation(|r| r.requested_at = None);
    assert_eq!(sim.run(3), Step::Rest);
    sim.rotation(|r| r.requested_at = Some(time(1)));
    assert_eq!(sim.run(4), Step::Rest);
    sim.rotation(|r| r.requested_at = Some(time(5)));
    assert!(matches!(sim.run(5), Step::Rotate { .. }));
}

#[test]
fn an_older_rotation_request_does_not_rotate() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(10)));
    assert!(matches!(sim.run(10), Step::Rotate { .. }));
    for older in [time(9), time(-100), time(10)] {
        sim.rotation(|r| r.requested_at = Some(older));
        assert_eq!(sim.run(20), Step::Rest);
    }
    // The same instant in another notation.
    sim.rotation(|r| r.requested_at = Some(time(10).replace('Z', "+00:00")));
    assert_eq!(sim.run(21), Step::Rest);
}

#[test]
fn a_rotation_request_in_the_future_is_carried_out_at_its_time() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(100)));
    assert_eq!(sim.run(50), Step::Rest);
    assert_eq!(next_wake(&sim.key, sim.status(), None, at(50)), Some(at(100)));
    assert!(matches!(sim.run(100), Step::Rotate { .. }));
    assert_eq!(sim.run(101), Step::Rest);
    // A request in the far future does not block a later edit to another time.
    sim.rotation(|r| r.requested_at = Some("9999-12-31T23:59:59Z".to_owned()));
    assert_eq!(sim.run(200), Step::Rest);
    sim.rotation(|r| r.requested_at = Some(time(300)));
    assert!(matches!(sim.run(300), Step::Rotate { .. }));
}

#[test]
fn a_restored_key_waits_for_its_secret_until_a_rotation_is_requested() {
    let mut sim =
        Simulation::new(|s| s.rotation = Some(Rotation { requested_at: Some(time(-50)), ..Default::default() }));
    sim.key.metadata.annotations = Some([(RESTORED_BY_ANNOTATION.to_owned(), "velero".to_owned())].into());
    sim.key.metadata.creation_timestamp = Some(crate::api::Time(at(0)));
    assert_eq!(sim.run(1), Step::Rest);
    let ready = &sim.status().conditions[0];
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "WaitingForSecret"));
    assert_eq!(sim.status().state, Some(KeyState::Pending));
    sim.rotation(|r| r.requested_at = Some(time(10)));
    assert!(matches!(sim.run(10), Step::Mint(_)));
    assert_eq!(sim.run(11), Step::Rest);
    sim.secret = Observed::Missing;
    sim.run(12);
    assert_eq!(sim.status().state, Some(KeyState::Lost), "the key no longer waits");
}

#[test]
fn generations_of_values_increase_also_after_a_lost_secret() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    for round in 1..4 {
        sim.rotation(|r| r.requested_at = Some(time(round)));
        sim.run(round);
        assert_eq!(sim.status().tokens[0].generation, Some(round + 1));
    }
    sim.secret = Observed::Missing;
    sim.run(5);
    sim.rotation(|r| r.requested_at = Some(time(6)));
    sim.run(6);
    assert_eq!(sim.status().tokens[0].generation, Some(5));
}

#[test]
fn at_most_two_values_work() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    for round in 1..6 {
        sim.rotation(|r| {
            r.requested_at = Some(time(round));
            r.overlap = Some("24h".to_owned());
        });
        sim.run(round);
        assert_eq!(sim.live(round).len(), 2, "round {round}");
    }
}

#[test]
fn a_zero_overlap_revokes_the_previous_value_for_good() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.rotation(|r| (r.requested_at, r.overlap) = (Some(time(1)), Some("0s".to_owned())));
    sim.run(1);
    assert_eq!(sim.live(1), [2]);

    sim.rotation(|r| (r.requested_at, r.overlap) = (Some(time(2)), Some("24h".to_owned())));
    sim.run(2);
    assert_eq!(sim.live(2), [3, 2]);
    sim.rotation(|r| r.overlap = Some("0s".to_owned()));
    assert!(matches!(sim.run(3), Step::Amend { .. }), "otherwise a rebuilt status would accept the value again");
    assert_eq!(sim.live(3), [3]);
    sim.rotation(|r| r.overlap = Some("24h".to_owned()));
    sim.key.status = None;
    sim.run(4);
    assert_eq!(sim.live(4), [3], "the revoked value does not work again");
}

#[test]
fn the_overlap_ends_at_the_expiry_of_the_key() {
    let mut sim = Simulation::new(|s| s.expires_at = Some(at(100).to_string()));
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(1)));
    sim.run(50);
    assert_eq!(sim.status().tokens[1].expires_at.as_ref().map(|t| t.0), Some(at(100)));
    assert!(sim.live(100).is_empty());
}

#[test]
fn an_expired_key_neither_rotates_nor_mints_until_its_expiry_is_moved() {
    let mut sim = Simulation::new(|s| s.expires_at = Some(at(100).to_string()));
    sim.run(0);
    sim.rotation(|r| r.requested_at = Some(time(1)));
    assert_eq!(sim.run(100), Step::Rest);
    assert_eq!(sim.status().state, Some(KeyState::Expired));
    sim.edit(|s| s.expires_at = Some(at(1000).to_string()));
    assert!(matches!(sim.run(200), Step::Rotate { .. }), "the request is still open");
    assert_eq!(sim.status().state, Some(KeyState::Active));

    let mut expired = Simulation::new(|s| s.expires_at = Some(at(-1).to_string()));
    assert_eq!(expired.run(0), Step::Rest);
    assert_eq!(expired.status().state, Some(KeyState::Expired));
}

#[test]
fn deactivation_keeps_the_value_and_suspends_the_schedule() {
    let mut sim =
        Simulation::new(|s| s.rotation = Some(Rotation { every: Some("1h".to_owned()), ..Default::default() }));
    sim.run(0);
    sim.edit(|s| s.active = Some(false));
    assert_eq!(sim.run(10), Step::Rest);
    assert_eq!(sim.status().state, Some(KeyState::Inactive));
    assert_eq!(sim.run(7200), Step::Rest);
    assert!(sim.live(7200).is_empty());
    sim.edit(|s| s.active = Some(true));
    sim.run(7300);
    assert_eq!(sim.live(7300), [2, 1], "the overdue rotation runs, and the previous value works in the overlap");
}

#[test]
fn a_lost_secret_is_replaced_only_on_request() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.secret = Observed::Missing;
    assert_eq!(sim.run(10), Step::Rest);
    assert_eq!(sim.status().state, Some(KeyState::Lost));
    assert_eq!(sim.live(10), [1], "the lost value still works");
    sim.edit(|s| s.display_name = Some("x".to_owned()));
    assert_eq!(sim.run(20), Step::Rest);
    sim.rotation(|r| r.requested_at = Some(time(1)));
    assert!(matches!(sim.run(30), Step::Mint(_)));
    assert_eq!(sim.status().state, Some(KeyState::Active));
    assert_eq!(sim.live(30), [2, 1]);
    assert_eq!(sim.status().created_at.as_ref().map(|t| t.0), Some(at(0)));
}

#[test]
fn a_key_with_a_conflicting_claim_or_a_broken_rule_is_not_minted() {
    let sim = Simulation::new(|_| {});
    let validation = check(&sim.key.spec, &catalog());
    let inputs =
        Inputs { conflicting_claim: Some("older"), ..Inputs::new(&sim.key, &validation, &Observed::NotRead, at(0)) };
    assert_eq!(step(&inputs), Step::Rest);
    let mut rejected = Simulation::new(|s| s.presets = vec!["Unknown".to_owned()]);
    assert_eq!(rejected.run(0), Step::Rest);
    assert_eq!(rejected.status().state, Some(KeyState::Rejected));
}

#[test]
fn added_permissions_are_not_in_force_while_the_write_of_the_secret_fails() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.edit(|s| s.permissions = vec!["alerts:ReadConfig".to_owned()]);
    let validation = check(&sim.key.spec, &catalog());
    assert!(validation.problems.is_empty());
    let failure =
        crate::domain::status::Failure { reason: "SecretWriteFailed", message: String::new(), passing: false };
    let inputs = Inputs { failure: Some(&failure), ..Inputs::new(&sim.key, &validation, &sim.secret, at(1)) };
    let status = build(&inputs);
    assert_eq!((status.presets.as_slice(), status.permissions.len()), (&["Alerts".to_owned()][..], 0));
    assert_eq!(build(&Inputs { failure: None, ..inputs }).permissions.len(), 1);
}

#[test]
fn a_rejected_change_leaves_a_working_key_unchanged() {
    let mut sim = Simulation::new(|_| {});
    sim.run(0);
    sim.edit(|s| s.permissions = vec!["alerts:ReadConfig".to_owned(), "unknown:Read".to_owned()]);
    assert_eq!(sim.run(10), Step::Rest);
    let status = sim.status();
    assert_eq!(status.state, Some(KeyState::Active));
    assert_eq!(
        (status.presets.as_slice(), status.permissions.len()),
        (&["Alerts".to_owned()][..], 0),
        "the added permission is not in force"
    );
    let ready = status.conditions.iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "PermissionNotFound"));
}

#[test]
fn a_reconciliation_without_changes_leaves_the_status_unchanged() {
    let mut sim =
        Simulation::new(|s| s.rotation = Some(Rotation { every: Some("1h".to_owned()), ..Default::default() }));
    sim.run(0);
    let before = sim.key.status.clone();
    for seconds in [1, 60, 3599] {
        sim.run(seconds);
        assert_eq!(sim.key.status, before, "otherwise each write of the status would cause the next");
    }
}

/// Random edits, waits, losses and crashes keep the invariants S1 to S3 of ARCHITECTURE.md.
#[test]
fn random_histories_keep_the_invariants() {
    use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
    for seed in 0..2000 {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut sim = Simulation::new(|_| {});
        let (mut now, mut revoked) = (0, std::collections::BTreeSet::new());
        for _ in 0..30 {
            let crash = match rng.random_range(0..9) {
                0 => {
                    sim.rotation(|r| r.requested_at = Some(time(now)));
                    false
                }
                1 => {
                    let o = ["0s", "30s", "24h"][rng.random_range(0..3)];
                    sim.rotation(|r| r.overlap = Some(o.to_owned()));
                    false
                }
                2 => {
                    let every = rng.random_bool(0.5).then(|| "2m".to_owned());
                    sim.rotation(|r| r.every = every);
                    false
                }
                3 => {
                    let active = rng.random_bool(0.5);
                    sim.edit(|s| s.active = Some(active));
                    false
                }
                4 => {
                    let end = at(now + rng.random_range(-10..500)).to_string();
                    sim.edit(|s| s.expires_at = Some(end));
                    false
                }
                5 => {
                    sim.key.status = None;
                    false
                }
                6 => {
                    sim.secret = Observed::Missing;
                    false
                }
                7 => true,
                _ => {
                    sim.edit(|s| s.expires_at = None);
                    false
                }
            };
            now += rng.random_range(0..90);
            if sim.secret == Observed::Missing && sim.key.status.is_none() {
                // Without record and status nothing is known of earlier values, so the history starts again.
                sim = Simulation::new(|_| {});
                revoked.clear();
            }
            let before: Vec<u8> = sim.key.status.as_ref().map_or_else(Vec::new, |_| sim.live(now));
            let minted = sim.minted;
            let (_, held) = sim.write(now);
            assert!(sim.minted - minted <= 1, "seed {seed}: S1");
            if let Some(held) = held {
                sim.secret = Observed::Ours(held);
            }
            if crash {
                continue;
            }
            sim.report(now);
            let working = sim.live(now);
            assert!(working.len() <= 2, "seed {seed}: S2: {working:?}");
            assert!(working.iter().all(|n| !revoked.contains(n)), "seed {seed}: S3: {working:?} of {revoked:?}");
            let usable = Schedule::of(&sim.key.spec).active && !Schedule::of(&sim.key.spec).expired(at(now));
            if usable {
                revoked.extend(before.into_iter().filter(|n| !working.contains(n)));
            }
        }
    }
}
