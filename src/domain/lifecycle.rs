//! What happens to a key next: mint, rotate, amend or nothing. A pure step, so that every state can be tabled.
//!
//! The Secret is the commit point. Its [`Record`] is the truth about values; the status is a copy of it that can be
//! rebuilt. A step therefore looks at the record whenever the Secret was read, and at the status only otherwise.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{
    duration,
    key::Digest,
    record::{Entry, Previous, Record, Sealed, Subject},
    sealing, time,
    validate::Verdict,
};
use crate::api::{ApiKey, ApiKeySpec, ApiKeyStatus, RESTORED_BY_ANNOTATION, SecuritySettingsSpec, Token};

/// How long a replaced value keeps working when the spec does not say.
pub const DEFAULT_OVERLAP: Duration = Duration::from_hours(24);

/// The parts of a spec that concern time, read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Whether the key may be used.
    pub active: bool,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
    /// How old a value may become.
    pub every: Option<SignedDuration>,
    /// How long a replaced value keeps working.
    pub overlap: SignedDuration,
    /// The rotation that is asked for.
    pub requested_at: Option<String>,
}

impl Schedule {
    /// Reads a spec. A time that can't be read counts as past: what is not understood must not keep a key alive.
    #[must_use]
    pub fn of(spec: &ApiKeySpec) -> Self {
        let rotation = spec.rotation.as_ref();
        let every = rotation.and_then(|r| r.every.as_deref()).and_then(duration::parse);
        let overlap = match rotation.and_then(|r| r.overlap.as_deref()) {
            Some(text) => duration::parse(text).unwrap_or_default(),
            None => every.map_or(DEFAULT_OVERLAP, |every| DEFAULT_OVERLAP.min(every / 2)),
        };
        Self {
            active: spec.active.unwrap_or(true),
            expires_at: spec.expires_at.as_deref().map(|text| time::parse(text).unwrap_or(Timestamp::MIN)),
            every: every.map(signed),
            overlap: signed(overlap),
            requested_at: rotation.and_then(|r| r.requested_at.clone()),
        }
    }

    /// Whether the key has expired.
    #[must_use]
    pub fn expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// When the value that was minted at a time is due to be replaced; `None` for never. While the key is inactive
    /// the schedule rests, so that reactivation finds the value that it left.
    #[must_use]
    pub fn next_rotation(&self, minted_at: Timestamp) -> Option<Timestamp> {
        let due = later(minted_at, self.every?);
        (self.active && self.expires_at.is_none_or(|expiry| due < expiry)).then_some(due)
    }

    /// Whether a rotation is requested that was not carried out yet.
    #[must_use]
    pub fn is_requested(&self, handled: Option<&str>, now: Timestamp) -> bool {
        self.request(handled).is_some_and(|at| at <= now)
    }

    /// The time of the requested rotation that was not carried out yet. Only a time after the last handled one is a
    /// request: an older manifest that Git, self-heal or a revert brings back never rotates. A time in the future is
    /// a request for that time.
    fn request(&self, handled: Option<&str>) -> Option<Timestamp> {
        let requested = time::parse(self.requested_at.as_deref()?)?;
        let handled = handled.and_then(time::parse);
        handled.is_none_or(|handled| handled < requested).then_some(requested)
    }

    /// The request that a value minted at `now` answers.
    fn handles(&self, now: Timestamp) -> Option<String> {
        self.requested_at.clone().filter(|_| self.is_requested(None, now))
    }

    fn is_due(&self, minted_at: Timestamp, handled: Option<&str>, now: Timestamp) -> bool {
        !self.expired(now)
            && (self.is_requested(handled, now) || self.next_rotation(minted_at).is_some_and(|due| due <= now))
    }

    /// The value that was current until `now`, for as long as it keeps working.
    fn retire(&self, entry: Entry, now: Timestamp) -> Option<Previous> {
        let end = later(now, self.overlap);
        let expires_at = self.expires_at.map_or(end, |expiry| end.min(expiry));
        (expires_at > now).then_some(Previous { entry, expires_at })
    }

    /// The replaced value as the spec now wants it: gone if its time is over, shorter if the overlap was shortened
    /// since, never longer. A value that was revoked must not come back.
    fn tighten(&self, current: &Entry, previous: Previous, now: Timestamp) -> Option<Previous> {
        let end = previous.expires_at.min(later(current.minted_at, self.overlap));
        let expires_at = self.expires_at.map_or(end, |expiry| end.min(expiry));
        (expires_at > now).then_some(Previous { expires_at, ..previous })
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

fn later(time: Timestamp, by: SignedDuration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// What is known of the Secret of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Nobody looked, since nothing depends on it.
    NotRead,
    /// There is none.
    Missing,
    /// It is this key's.
    Ours(Held),
    /// It is not believed to be this key's, and is left alone. `passing` is true if that will end by itself.
    Foreign {
        /// The reason of the condition, in CamelCase.
        reason: &'static str,
        /// Why it is not believed, as a clause.
        why: String,
        /// Whether waiting helps.
        passing: bool,
    },
}

/// A Secret that is this key's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its resourceVersion, which every write carries.
    pub version: String,
    /// What is believed of it.
    pub record: Record,
    /// The record that the operator wrote into it, if it still has one: a record that the operator can't authenticate
    /// is none.
    pub written: Option<Record>,
    /// The message authentication code of `written`.
    pub mac: Option<String>,
    /// Whether it still holds the value of the record. False if somebody changed or removed the value.
    pub intact: bool,
    /// Whether this ApiKey is its owner.
    pub owned: bool,
    /// Whether labels and annotations are as the spec wants them.
    pub in_order: bool,
}

/// Everything but the digest of a record, for a value that is yet to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    generation: i64,
    created_at: Option<Timestamp>,
    requested_at: Option<String>,
    previous: Option<Previous>,
    sealed: Option<Sealed>,
}

impl Draft {
    /// Whether the value is the first of its key: how it is kept depends on the security settings.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.created_at.is_none()
    }

    /// This draft of a first value, once the security settings of its namespace are known.
    #[must_use]
    pub fn settled(self, spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Self {
        Self { sealed: sealing::at_first(spec, settings), ..self }
    }

    /// The record of a value that was just minted for `key`.
    #[must_use]
    pub fn seal(self, key: &ApiKey, digest: Digest, now: Timestamp) -> Record {
        let template = key.spec.secret.clone().unwrap_or_default();
        Record {
            subject: Subject::of(key),
            created_at: self.created_at.unwrap_or(now),
            last_rotated_at: self.created_at.map(|_| now),
            requested_at: self.requested_at,
            current: Entry { sha256: digest.to_string(), minted_at: now, generation: self.generation },
            previous: self.previous,
            sealed: self.sealed,
            labels: template.labels.into_keys().collect(),
            annotations: template.annotations.into_keys().collect(),
        }
    }
}

/// The one write that a key needs now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to write.
    Rest,
    /// Create the Secret with a new value.
    Mint(Draft),
    /// Replace the value in the Secret, if it is still as it was read.
    Rotate {
        /// The Secret as it was read.
        held: Held,
        /// The record to be.
        draft: Draft,
    },
    /// Mend the metadata of the Secret, if it is still as it was read; the value stays.
    Amend {
        /// The Secret as it was read.
        held: Held,
        /// The record to be.
        record: Record,
    },
    /// Take the sealed value out of the Secret, if it is still as it was read: nobody saw it in time.
    Erase {
        /// The Secret as it was read.
        held: Held,
        /// The record to be.
        record: Record,
    },
}

/// What a step is decided on.
#[derive(Clone, Copy, Debug)]
pub struct World<'a> {
    /// The ApiKey.
    pub key: &'a ApiKey,
    /// What the catalogue says of its spec.
    pub verdict: &'a Verdict,
    /// An older ApiKey that claims the same Secret.
    pub rival: Option<&'a str>,
    /// Its Secret.
    pub secret: &'a Observed,
    /// The security settings of its namespace.
    pub settings: Option<&'a SecuritySettingsSpec>,
    /// The time.
    pub now: Timestamp,
}

/// When a key counts as unused, if the settings know such a time: counted from the last use that a verifier reported,
/// or from when the value was minted if that is later. A key without any reported use never does, since it may be that
/// no verifier reports.
#[must_use]
pub fn unused_at(
    settings: Option<&SecuritySettingsSpec>,
    status: Option<&ApiKeyStatus>,
    record: &Record,
) -> Option<Timestamp> {
    let limit = settings?.limits.as_ref()?.deactivate_unused_after.as_deref().and_then(duration::parse)?;
    let used = status?.last_used_at.as_ref()?.0;
    let last = used.max(record.current.minted_at).max(record.last_rotated_at.unwrap_or(used));
    Some(later(last, signed(limit)))
}

/// Decides the next write.
#[must_use]
pub fn step(world: &World<'_>) -> Step {
    let World { key, verdict, rival, secret, settings, now } = *world;
    let schedule = Schedule::of(&key.spec);
    let known = key.status.as_ref().and_then(record_of_status);
    match (secret, known) {
        (Observed::NotRead | Observed::Missing, None) => {
            let may_mint = verdict.problems.is_empty() && rival.is_none() && !schedule.expired(now);
            if !may_mint || awaits_secret(key, now) {
                return Step::Rest;
            }
            Step::Mint(Draft {
                generation: 1,
                created_at: None,
                requested_at: schedule.handles(now),
                previous: None,
                sealed: None,
            })
        }
        // The value is lost. Only an explicit request makes a new one: a silent new key would break every workload
        // that still has the old one, and hide that a Secret was deleted.
        (Observed::Missing, Some(lost)) => {
            let asked = schedule.is_requested(lost.requested_at.as_deref(), now) && !schedule.expired(now);
            if !asked {
                return Step::Rest;
            }
            Step::Mint(Draft {
                generation: lost.current.generation.saturating_add(1),
                created_at: Some(lost.created_at),
                previous: schedule.retire(lost.current, now),
                requested_at: schedule.handles(now),
                sealed: sealing::after(lost.sealed.as_ref(), &key.spec),
            })
        }
        (Observed::Ours(held), _) => {
            let record = &held.record;
            // An unused key comes back by a request alone: the schedule would make it last for ever.
            let unused = unused_at(settings, key.status.as_ref(), record).is_some_and(|at| at <= now);
            let rests = unused && !schedule.is_requested(record.requested_at.as_deref(), now);
            if !rests && schedule.is_due(record.current.minted_at, record.requested_at.as_deref(), now) {
                return Step::Rotate {
                    held: held.clone(),
                    draft: Draft {
                        generation: record.current.generation.saturating_add(1),
                        created_at: Some(record.created_at),
                        previous: schedule.retire(record.current.clone(), now),
                        requested_at: if schedule.is_requested(record.requested_at.as_deref(), now) {
                            schedule.requested_at
                        } else {
                            record.requested_at.clone()
                        },
                        sealed: sealing::after(record.sealed.as_ref(), &key.spec),
                    },
                };
            }
            if let Some(sealed) = &record.sealed
                && sealing::erase_at(record, settings).is_some_and(|at| at <= now)
            {
                let sealed = Some(Sealed { erased_at: Some(now), ..sealed.clone() });
                return Step::Erase { held: held.clone(), record: Record { sealed, ..record.clone() } };
            }
            let template = key.spec.secret.clone().unwrap_or_default();
            let wanted = Record {
                previous: live_previous(&schedule, record, now),
                labels: template.labels.into_keys().collect(),
                annotations: template.annotations.into_keys().collect(),
                ..record.clone()
            };
            // The natural end of an overlap needs no write: what is written says when it is. An end that came sooner
            // does, or a rebuilt status would bring the value back.
            let written = held.written.clone().map(|written| Record {
                previous: written.previous.filter(|previous| previous.expires_at > now),
                ..written
            });
            if held.owned && held.in_order && written.as_ref() == Some(&wanted) {
                return Step::Rest;
            }
            Step::Amend { held: held.clone(), record: wanted }
        }
        (Observed::Foreign { .. }, _) | (Observed::NotRead, Some(_)) => Step::Rest,
    }
}

/// Whether a restored ApiKey waits for its Secret. A backup holds both; a new value would take the place of the restored
/// one, and the restore of the Secret would fail. A rotation that is requested after the restore mints a new value.
#[must_use]
pub fn awaits_secret(key: &ApiKey, now: Timestamp) -> bool {
    let is_known = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let annotations = key.metadata.annotations.as_ref();
    let is_restored = annotations.is_some_and(|all| all.contains_key(RESTORED_BY_ANNOTATION));
    let is_restored = is_restored && key.spec.legacy.is_none();
    let created = key.metadata.creation_timestamp.as_ref().map(|at| at.0.to_string());
    is_restored && !is_known && !Schedule::of(&key.spec).is_requested(created.as_deref(), now)
}

/// How long to wait before the next look for a Secret that a person has to bring: soon while the ApiKey is young, and
/// then less often, so that keys that wait for ever cost next to nothing.
#[must_use]
pub fn patience(key: &ApiKey, now: Timestamp) -> SignedDuration {
    let created = key.metadata.creation_timestamp.as_ref().map_or(now, |at| at.0);
    (now.duration_since(created) / 2).clamp(SignedDuration::from_secs(10), SignedDuration::from_mins(5))
}

/// Whether the Secret must be read before deciding: the spec changed, something is due, or it is time for a look.
#[must_use]
pub fn must_read(key: &ApiKey, settings: Option<&SecuritySettingsSpec>, now: Timestamp, check_due: bool) -> bool {
    if awaits_secret(key, now) {
        return true;
    }
    let Some(status) = &key.status else { return false };
    // A Secret that was not in order is looked at each time, so that the status neither flaps nor grows old.
    let is_in_doubt = |reason: &str| reason.starts_with("Secret") || reason == "DigestInUse";
    if status.conditions.iter().any(|c| c.type_ == "Ready" && is_in_doubt(&c.reason)) {
        return true;
    }
    let Some(record) = record_of_status(status) else {
        // Not minted, as far as is known: creating the Secret finds out, in one request instead of two.
        return false;
    };
    let schedule = Schedule::of(&key.spec);
    check_due
        || status.observed_generation != key.metadata.generation
        || schedule.is_due(record.current.minted_at, record.requested_at.as_deref(), now)
        || sealing::erase_at(&record, settings).is_some_and(|at| at <= now)
}

/// When something will be due that no event announces.
#[must_use]
pub fn next_wake(
    key: &ApiKey,
    status: &ApiKeyStatus,
    settings: Option<&SecuritySettingsSpec>,
    now: Timestamp,
) -> Option<Timestamp> {
    let schedule = Schedule::of(&key.spec);
    let overlap_end = status.tokens.get(1).and_then(|t| t.expires_at.as_ref()).map(|t| t.0);
    let rotation = status.tokens.first().and_then(|t| schedule.next_rotation(t.minted_at.0));
    let unused = record_of_status(status).and_then(|record| unused_at(settings, Some(status), &record));
    // A rotation that is due although it lies in the past is blocked by something that will announce itself.
    let erasure = record_of_status(status).and_then(|record| sealing::erase_at(&record, settings));
    let request = schedule.request(status.last_handled_requested_at.as_deref());
    let all = [schedule.expires_at, overlap_end, rotation, unused, erasure, request];
    all.into_iter().flatten().filter(|at| *at > now).min()
}

/// The replaced value, if it works at `now` under this schedule.
pub(super) fn live_previous(schedule: &Schedule, record: &Record, now: Timestamp) -> Option<Previous> {
    record.previous.clone().and_then(|previous| schedule.tighten(&record.current, previous, now))
}

/// The record, as far as the status knows it. `None` if nothing was minted.
#[must_use]
pub fn record_of_status(status: &ApiKeyStatus) -> Option<Record> {
    let entry = |token: &Token| Entry {
        sha256: token.sha256.clone(),
        minted_at: token.minted_at.0,
        generation: token.generation.unwrap_or_default(),
    };
    let current = entry(status.tokens.first()?);
    Some(Record {
        subject: Subject::default(),
        created_at: status.created_at.as_ref().map_or(current.minted_at, |t| t.0),
        last_rotated_at: status.last_rotated_at.as_ref().map(|t| t.0),
        requested_at: status.last_handled_requested_at.clone(),
        previous: status.tokens.get(1).map(|token| Previous {
            entry: entry(token),
            expires_at: token.expires_at.as_ref().map_or(Timestamp::MIN, |t| t.0),
        }),
        current,
        sealed: Sealed::of(status),
        labels: vec![],
        annotations: vec![],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{KeyState, KeyType, Rotation},
        domain::{
            status::{Facts, build},
            validate::{
                check,
                tests::{catalog, spec},
            },
        },
    };

    const START: i64 = 1_800_000_000;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(START + seconds).unwrap()
    }

    fn time(seconds: i64) -> String {
        at(seconds).to_string()
    }

    /// One key, its Secret and a clock, driven by the same functions as the controller.
    struct Life {
        key: ApiKey,
        secret: Observed,
        settings: Option<SecuritySettingsSpec>,
        minted: u8,
    }

    impl Life {
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

        /// Carries out what is due at a time, as the controller does, and returns the step.
        fn run(&mut self, seconds: i64) -> Step {
            let (step, held) = self.write(seconds);
            if let Some(held) = held {
                self.secret = Observed::Ours(held);
            }
            self.report(seconds);
            step
        }

        fn write(&mut self, seconds: i64) -> (Step, Option<Held>) {
            let now = at(seconds);
            let verdict = check(&self.key.spec, &catalog());
            let unread = Observed::NotRead;
            let settings = self.settings.as_ref();
            let secret = if must_read(&self.key, settings, now, true) { &self.secret } else { &unread };
            let mut step = step(&World { key: &self.key, verdict: &verdict, rival: None, secret, settings, now });
            if matches!(step, Step::Mint(_)) && self.secret != Observed::Missing {
                // The create meets the Secret that is there: look, and decide again.
                let secret = &self.secret;
                step = super::step(&World { key: &self.key, verdict: &verdict, rival: None, secret, settings, now });
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
            (step, Some(Held { version, record, written, mac: None, intact: true, owned: true, in_order: true }))
        }

        fn report(&mut self, seconds: i64) {
            let verdict = check(&self.key.spec, &catalog());
            let facts = Facts {
                key: &self.key,
                verdict: &verdict,
                rival: None,
                secret: &self.secret,
                settings: self.settings.as_ref(),
                policy: None,
                import: None,
                failure: None,
                now: at(seconds),
            };
            self.key.status = Some(build(&facts));
        }

        fn status(&self) -> &ApiKeyStatus {
            self.key.status.as_ref().unwrap()
        }

        /// The digests that work at a time: what a verifier would accept.
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
        let mut life = Life::new(|_| {});
        life.settings = Some(SecuritySettingsSpec { limits: Some(limits), ..Default::default() });
        life.rotation(|r| r.every = Some("90m".to_owned()));
        life.run(0);
        life.run(4000);
        assert_eq!(life.status().state, Some(KeyState::Active), "nobody reports the use of keys");

        let used = |life: &mut Life, seconds| {
            life.key.status.as_mut().unwrap().last_used_at = Some(crate::api::Time(at(seconds)));
            life.report(seconds);
        };
        used(&mut life, 600);
        let wake = |life: &Life, now| next_wake(&life.key, life.status(), life.settings.as_ref(), at(now));
        assert_eq!(wake(&life, 600), Some(at(4200)), "the use and an hour");
        life.run(4199);
        assert_eq!(life.status().state, Some(KeyState::Active));
        life.run(4200);
        assert_eq!(life.status().state, Some(KeyState::Inactive));
        let ready = &life.status().conditions[0];
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Unused"));
        assert!(ready.message.contains("set spec.rotation.requestedAt"), "{}", ready.message);
        assert_eq!(life.status().last_used_at.as_ref().unwrap().0, at(600), "carried over");

        assert_eq!(life.run(5400), Step::Rest, "the schedule does not bring it back");
        life.rotation(|r| r.requested_at = Some(time(5500)));
        assert!(matches!(life.run(5500), Step::Rotate { .. }));
        assert_eq!(life.status().state, Some(KeyState::Active));
        life.run(9099);
        assert_eq!(life.status().state, Some(KeyState::Active), "counted from the new value");
        life.run(9100);
        assert_eq!(life.status().state, Some(KeyState::Inactive));
        // Without the limit it works again.
        life.settings = None;
        life.run(9101);
        assert_eq!(life.status().state, Some(KeyState::Active));
    }

    #[test]
    fn the_first_stamp_of_a_creator_wins() {
        let stamp = |life: &mut Life, name: &str| {
            let annotation = (crate::api::CREATOR_ANNOTATION.to_owned(), name.to_owned());
            life.key.metadata.annotations = Some([annotation].into());
        };
        let creator = |life: &Life| life.status().creator.clone();
        let mut life = Life::new(|_| {});
        life.run(0);
        assert_eq!(creator(&life), None);
        stamp(&mut life, "alice");
        life.run(1);
        stamp(&mut life, "mallory");
        life.run(2);
        life.key.metadata.annotations = None;
        life.run(3);
        assert_eq!(creator(&life).unwrap().name, "alice");
        assert_eq!(creator(&life).unwrap().kind, crate::api::CreatorKind::User);
        let mut other = Life::new(|_| {});
        stamp(&mut other, "system:serviceaccount:argocd:argocd");
        other.run(0);
        assert_eq!(creator(&other).unwrap().kind, crate::api::CreatorKind::ServiceAccount);
    }

    #[test]
    fn a_missing_policy_is_told_and_leaves_the_key_ready() {
        let mut life = Life::new(|spec| {
            spec.access_policy_ref = Some(crate::api::AccessPolicyRef { name: "p".to_owned() });
        });
        life.run(0);
        let status = life.status();
        assert_eq!(status.conditions[0].status, "True", "Ready");
        let policy = status.conditions.iter().find(|c| c.type_ == "PolicyAccepted").unwrap();
        assert_eq!((policy.status.as_str(), policy.reason.as_str()), ("False", "PolicyNotFound"));
        let told = crate::domain::status::notes(None, status, true);
        assert!(told.iter().any(|note| note.warning && note.reason == "PolicyNotFound"), "{told:?}");
        let again = crate::domain::status::notes(Some(status), status, false);
        assert!(again.is_empty(), "{again:?}");
    }

    #[test]
    fn a_key_is_minted_once_and_then_rests() {
        let mut life = Life::new(|_| {});
        assert!(matches!(life.run(0), Step::Mint(_)));
        assert_eq!(life.status().state, Some(KeyState::Active));
        for seconds in [0, 1, 1_000_000] {
            assert_eq!(life.run(seconds), Step::Rest);
        }
        assert_eq!(life.live(2_000_000), [1]);
    }

    #[test]
    fn a_lost_status_is_rebuilt_from_the_record() {
        let mut life = Life::new(|s| s.rotation = Some(Rotation { requested_at: Some(time(0)), ..Default::default() }));
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(10)));
        life.run(10);
        let before = life.key.status.take();
        assert_eq!(life.run(20), Step::Rest);
        assert_eq!(life.status().tokens, before.as_ref().unwrap().tokens);
        assert_eq!(life.status().last_handled_requested_at, Some(time(10)));
        assert_eq!(life.status().last_rotated_at, before.unwrap().last_rotated_at);
    }

    #[test]
    fn scheduled_rotation_overlaps_and_then_ends() {
        let mut life = Life::new(|s| {
            s.rotation =
                Some(Rotation { every: Some("1h".to_owned()), overlap: Some("10m".to_owned()), requested_at: None });
        });
        life.run(0);
        assert_eq!(life.run(3599), Step::Rest);
        assert!(matches!(life.run(3600), Step::Rotate { .. }));
        assert_eq!(life.live(3600), [2, 1]);
        assert_eq!(next_wake(&life.key, life.status(), None, at(3600)), Some(at(4200)));
        assert_eq!(life.live(4200), [2], "the verifier goes by the time, whether or not anybody reconciles");
        assert_eq!(life.run(4200), Step::Rest, "the end of an overlap needs no write to the Secret");
        assert_eq!(life.status().tokens.len(), 1);
        assert_eq!(life.status().next_rotation_at.as_ref().map(|t| t.0), Some(at(7200)));
    }

    #[test]
    fn a_crash_after_the_write_of_a_rotation_does_not_rotate_again() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(10)));
        let (_, held) = life.write(10);
        life.secret = Observed::Ours(held.unwrap());
        assert_eq!(life.run(11), Step::Rest, "the record says that the request was carried out");
        assert_eq!(life.live(11), [2, 1]);
    }

    #[test]
    fn the_same_request_is_carried_out_once() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(1)));
        assert!(matches!(life.run(1), Step::Rotate { .. }));
        life.edit(|s| s.display_name = Some("other".to_owned()));
        assert_eq!(life.run(2), Step::Rest);
        life.rotation(|r| r.requested_at = None);
        assert_eq!(life.run(3), Step::Rest);
        life.rotation(|r| r.requested_at = Some(time(1)));
        assert_eq!(life.run(4), Step::Rest);
        life.rotation(|r| r.requested_at = Some(time(5)));
        assert!(matches!(life.run(5), Step::Rotate { .. }));
    }

    #[test]
    fn an_older_request_that_git_brings_back_does_not_rotate() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(10)));
        assert!(matches!(life.run(10), Step::Rotate { .. }));
        for older in [time(9), time(-100), time(10)] {
            life.rotation(|r| r.requested_at = Some(older));
            assert_eq!(life.run(20), Step::Rest);
        }
        // The same instant, written in another way.
        life.rotation(|r| r.requested_at = Some(time(10).replace('Z', "+00:00")));
        assert_eq!(life.run(21), Step::Rest);
    }

    #[test]
    fn a_request_for_a_time_to_come_waits_for_it() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(100)));
        assert_eq!(life.run(50), Step::Rest);
        assert_eq!(next_wake(&life.key, life.status(), None, at(50)), Some(at(100)));
        assert!(matches!(life.run(100), Step::Rotate { .. }));
        assert_eq!(life.run(101), Step::Rest);
        // One in the far future does not stand in the way of another.
        life.rotation(|r| r.requested_at = Some("9999-12-31T23:59:59Z".to_owned()));
        assert_eq!(life.run(200), Step::Rest);
        life.rotation(|r| r.requested_at = Some(time(300)));
        assert!(matches!(life.run(300), Step::Rotate { .. }));
    }

    #[test]
    fn a_restored_key_waits_for_its_secret_until_a_value_is_requested() {
        let mut life =
            Life::new(|s| s.rotation = Some(Rotation { requested_at: Some(time(-50)), ..Default::default() }));
        life.key.metadata.annotations = Some([(RESTORED_BY_ANNOTATION.to_owned(), "velero".to_owned())].into());
        life.key.metadata.creation_timestamp = Some(crate::api::Time(at(0)));
        assert_eq!(life.run(1), Step::Rest);
        let ready = &life.status().conditions[0];
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "WaitingForSecret"));
        assert_eq!(life.status().state, Some(KeyState::Pending));
        life.rotation(|r| r.requested_at = Some(time(10)));
        assert!(matches!(life.run(10), Step::Mint(_)));
        assert_eq!(life.run(11), Step::Rest);
        life.secret = Observed::Missing;
        life.run(12);
        assert_eq!(life.status().state, Some(KeyState::Lost), "from then on it is a key like others");
    }

    #[test]
    fn generations_of_values_only_grow() {
        let mut life = Life::new(|_| {});
        life.run(0);
        for round in 1..4 {
            life.rotation(|r| r.requested_at = Some(time(round)));
            life.run(round);
            assert_eq!(life.status().tokens[0].generation, Some(round + 1));
        }
        life.secret = Observed::Missing;
        life.run(5);
        life.rotation(|r| r.requested_at = Some(time(6)));
        life.run(6);
        assert_eq!(life.status().tokens[0].generation, Some(5), "also after the Secret was lost");
    }

    #[test]
    fn never_more_than_two_values_work() {
        let mut life = Life::new(|_| {});
        life.run(0);
        for round in 1..6 {
            life.rotation(|r| {
                r.requested_at = Some(time(round));
                r.overlap = Some("24h".to_owned());
            });
            life.run(round);
            assert_eq!(life.live(round).len(), 2, "round {round}");
        }
    }

    #[test]
    fn no_overlap_revokes_at_once_and_for_good() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.rotation(|r| (r.requested_at, r.overlap) = (Some(time(1)), Some("0s".to_owned())));
        life.run(1);
        assert_eq!(life.live(1), [2]);

        life.rotation(|r| (r.requested_at, r.overlap) = (Some(time(2)), Some("24h".to_owned())));
        life.run(2);
        assert_eq!(life.live(2), [3, 2]);
        life.rotation(|r| r.overlap = Some("0s".to_owned()));
        assert!(
            matches!(life.run(3), Step::Amend { .. }),
            "the record must know, or a lost status would bring it back"
        );
        assert_eq!(life.live(3), [3]);
        life.rotation(|r| r.overlap = Some("24h".to_owned()));
        life.key.status = None;
        life.run(4);
        assert_eq!(life.live(4), [3], "what was revoked stays revoked");
    }

    #[test]
    fn the_overlap_never_outlives_the_key() {
        let mut life = Life::new(|s| s.expires_at = Some(at(100).to_string()));
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(1)));
        life.run(50);
        assert_eq!(life.status().tokens[1].expires_at.as_ref().map(|t| t.0), Some(at(100)));
        assert!(life.live(100).is_empty());
    }

    #[test]
    fn an_expired_key_neither_rotates_nor_mints_until_its_expiry_is_moved() {
        let mut life = Life::new(|s| s.expires_at = Some(at(100).to_string()));
        life.run(0);
        life.rotation(|r| r.requested_at = Some(time(1)));
        assert_eq!(life.run(100), Step::Rest);
        assert_eq!(life.status().state, Some(KeyState::Expired));
        life.edit(|s| s.expires_at = Some(at(1000).to_string()));
        assert!(matches!(life.run(200), Step::Rotate { .. }), "the request was kept");
        assert_eq!(life.status().state, Some(KeyState::Active));

        let mut stillborn = Life::new(|s| s.expires_at = Some(at(-1).to_string()));
        assert_eq!(stillborn.run(0), Step::Rest);
        assert_eq!(stillborn.status().state, Some(KeyState::Expired));
    }

    #[test]
    fn deactivation_keeps_the_value_and_rests_the_schedule() {
        let mut life =
            Life::new(|s| s.rotation = Some(Rotation { every: Some("1h".to_owned()), ..Default::default() }));
        life.run(0);
        life.edit(|s| s.active = Some(false));
        assert_eq!(life.run(10), Step::Rest);
        assert_eq!(life.status().state, Some(KeyState::Inactive));
        assert_eq!(life.run(7200), Step::Rest);
        assert!(life.live(7200).is_empty());
        life.edit(|s| s.active = Some(true));
        life.run(7300);
        assert_eq!(life.live(7300), [2, 1], "overdue, so it rotates, and what came back still works");
    }

    #[test]
    fn a_lost_secret_stays_lost_until_somebody_asks() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.secret = Observed::Missing;
        assert_eq!(life.run(10), Step::Rest);
        assert_eq!(life.status().state, Some(KeyState::Lost));
        assert_eq!(life.live(10), [1], "who still has the value can go on");
        life.edit(|s| s.display_name = Some("x".to_owned()));
        assert_eq!(life.run(20), Step::Rest);
        life.rotation(|r| r.requested_at = Some(time(1)));
        assert!(matches!(life.run(30), Step::Mint(_)));
        assert_eq!(life.status().state, Some(KeyState::Active));
        assert_eq!(life.live(30), [2, 1]);
        assert_eq!(life.status().created_at.as_ref().map(|t| t.0), Some(at(0)));
    }

    #[test]
    fn a_rival_or_a_broken_rule_keeps_a_key_from_being_minted() {
        let life = Life::new(|_| {});
        let verdict = check(&life.key.spec, &catalog());
        let world = World {
            key: &life.key,
            verdict: &verdict,
            rival: Some("older"),
            secret: &Observed::NotRead,
            settings: None,
            now: at(0),
        };
        assert_eq!(step(&world), Step::Rest);
        let mut broken = Life::new(|s| s.presets = vec!["Nope".to_owned()]);
        assert_eq!(broken.run(0), Step::Rest);
        assert_eq!(broken.status().state, Some(KeyState::Rejected));
    }

    #[test]
    fn a_key_gains_nothing_while_its_rotation_fails() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.edit(|s| s.permissions = vec!["alerts:ReadConfig".to_owned()]);
        let verdict = check(&life.key.spec, &catalog());
        assert!(verdict.problems.is_empty());
        let failure =
            crate::domain::status::Failure { reason: "SecretWriteFailed", message: String::new(), passing: false };
        let facts = Facts {
            key: &life.key,
            verdict: &verdict,
            rival: None,
            secret: &life.secret,
            settings: None,
            policy: None,
            import: None,
            failure: Some(&failure),
            now: at(1),
        };
        let status = build(&facts);
        assert_eq!((status.presets.as_slice(), status.permissions.len()), (&["Alerts".to_owned()][..], 0));
        assert_eq!(build(&Facts { failure: None, ..facts }).permissions.len(), 1);
    }

    #[test]
    fn a_broken_rule_changes_nothing_for_a_key_that_works() {
        let mut life = Life::new(|_| {});
        life.run(0);
        life.edit(|s| s.permissions = vec!["alerts:ReadConfig".to_owned(), "nope:Read".to_owned()]);
        assert_eq!(life.run(10), Step::Rest);
        let status = life.status();
        assert_eq!(status.state, Some(KeyState::Active));
        assert_eq!(
            (status.presets.as_slice(), status.permissions.len()),
            (&["Alerts".to_owned()][..], 0),
            "nothing is gained"
        );
        let ready = status.conditions.iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "PermissionNotFound"));
    }

    #[test]
    fn an_event_that_changes_nothing_changes_no_status() {
        let mut life =
            Life::new(|s| s.rotation = Some(Rotation { every: Some("1h".to_owned()), ..Default::default() }));
        life.run(0);
        let before = life.key.status.clone();
        for seconds in [1, 60, 3599] {
            life.run(seconds);
            assert_eq!(life.key.status, before, "a status that moves by itself would reconcile itself for ever");
        }
    }

    /// Any order of edits, waits, losses and crashes keeps the invariants S1 to S3 of the design.
    #[test]
    fn random_lives_keep_the_invariants() {
        use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
        for seed in 0..2000 {
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
            let mut life = Life::new(|_| {});
            let (mut now, mut revoked) = (0, std::collections::BTreeSet::new());
            for _ in 0..30 {
                let crash = match rng.random_range(0..9) {
                    0 => {
                        life.rotation(|r| r.requested_at = Some(time(now)));
                        false
                    }
                    1 => {
                        let o = ["0s", "30s", "24h"][rng.random_range(0..3)];
                        life.rotation(|r| r.overlap = Some(o.to_owned()));
                        false
                    }
                    2 => {
                        let every = rng.random_bool(0.5).then(|| "2m".to_owned());
                        life.rotation(|r| r.every = every);
                        false
                    }
                    3 => {
                        let active = rng.random_bool(0.5);
                        life.edit(|s| s.active = Some(active));
                        false
                    }
                    4 => {
                        let end = at(now + rng.random_range(-10..500)).to_string();
                        life.edit(|s| s.expires_at = Some(end));
                        false
                    }
                    5 => {
                        life.key.status = None;
                        false
                    }
                    6 => {
                        life.secret = Observed::Missing;
                        false
                    }
                    7 => true,
                    _ => {
                        life.edit(|s| s.expires_at = None);
                        false
                    }
                };
                now += rng.random_range(0..90);
                if life.secret == Observed::Missing && life.key.status.is_none() {
                    // Both the record and the status are gone: nothing can know what was, so a new life begins.
                    life = Life::new(|_| {});
                    revoked.clear();
                }
                let before: Vec<u8> = life.key.status.as_ref().map_or_else(Vec::new, |_| life.live(now));
                let minted = life.minted;
                let (_, held) = life.write(now);
                assert!(life.minted - minted <= 1, "seed {seed}: S1");
                if let Some(held) = held {
                    life.secret = Observed::Ours(held);
                }
                if crash {
                    continue;
                }
                life.report(now);
                let working = life.live(now);
                assert!(working.len() <= 2, "seed {seed}: S2: {working:?}");
                assert!(working.iter().all(|n| !revoked.contains(n)), "seed {seed}: S3: {working:?} of {revoked:?}");
                let usable = Schedule::of(&life.key.spec).active && !Schedule::of(&life.key.spec).expired(at(now));
                if usable {
                    revoked.extend(before.into_iter().filter(|n| !working.contains(n)));
                }
            }
        }
    }
}
