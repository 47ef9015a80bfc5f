//! The lifecycle of a key: a pure function that decides the next write to its Secret, so that tests can list all
//! states.
//!
//! The Secret is the commit point. Its [`Record`] describes the values; the status is a copy that can be rebuilt. If
//! the Secret was read, a step uses the record, otherwise the status.

mod schedule;

pub use schedule::{DEFAULT_OVERLAP, Schedule};
use schedule::{later, signed};

use jiff::{SignedDuration, Timestamp};

use super::{
    duration,
    inputs::Inputs,
    key::Digest,
    record::{Entry, Previous, Record, Sealed, Subject},
    sealing,
};
use crate::api::{ApiKey, ApiKeySpec, ApiKeyStatus, RESTORED_BY_ANNOTATION, SecuritySettingsSpec, Token};

/// The state of the Secret of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Observed {
    /// The Secret was not read, since the decision does not depend on it.
    #[default]
    NotRead,
    /// The Secret does not exist.
    Missing,
    /// The Secret belongs to this key.
    Ours(OwnedSecret),
    /// There is no proof that the Secret belongs to this key. It is never written.
    Foreign {
        /// The reason of the condition, in CamelCase.
        reason: &'static str,
        /// The explanation, as a clause.
        why: String,
        /// Whether the state can end without an action by a user.
        passing: bool,
    },
}

/// A Secret that belongs to the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedSecret {
    /// The resourceVersion, which every write carries.
    pub version: String,
    /// The record, merged with the status.
    pub record: Record,
    /// The record in the Secret. `None` if there is no record that the operator can authenticate.
    pub written: Option<Record>,
    /// The message authentication code of `written`.
    pub mac: Option<String>,
    /// Whether the Secret holds the value of the record. False if another writer changed or removed the value.
    pub intact: bool,
    /// Whether the ApiKey is in its owner references.
    pub owned: bool,
    /// Whether its labels and annotations match the spec.
    pub in_order: bool,
}

/// The record of a value that is not minted yet, without the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    generation: i64,
    created_at: Option<Timestamp>,
    requested_at: Option<String>,
    previous: Option<Previous>,
    sealed: Option<Sealed>,
}

impl Draft {
    /// Whether the value is the first of its key. The security settings determine how the first value is stored.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.created_at.is_none()
    }

    /// Applies the security settings of the namespace to the draft of a first value.
    #[must_use]
    pub fn settled(self, spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Self {
        Self { sealed: sealing::at_first(spec, settings), ..self }
    }

    /// Completes the draft with the digest of the value that was minted for `key`.
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

/// The next write to the Secret of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// No write.
    Rest,
    /// Create the Secret with a new value.
    Mint(Draft),
    /// Replace the value in the Secret, if the Secret did not change since it was read.
    Rotate {
        /// The Secret as it was read.
        held: OwnedSecret,
        /// The new record.
        draft: Draft,
    },
    /// Correct the metadata of the Secret, if the Secret did not change since it was read. The value stays.
    Amend {
        /// The Secret as it was read.
        held: OwnedSecret,
        /// The new record.
        record: Record,
    },
    /// Remove the sealed value, which is past its time limit, if the Secret did not change since it was read.
    Erase {
        /// The Secret as it was read.
        held: OwnedSecret,
        /// The new record.
        record: Record,
    },
}

/// The time from which a key counts as unused, by `limits.deactivateUnusedAfter`. It is counted from the last use that
/// a verifier reported, or from the mint of the value if that is later. `None` for a key without a reported use, since
/// it is possible that no verifier reports uses.
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
pub fn step(inputs: &Inputs<'_>) -> Step {
    let Inputs { key, validation, conflicting_claim, secret, now, .. } = *inputs;
    let schedule = Schedule::of(&key.spec);
    let known = key.status.as_ref().and_then(record_of_status);
    match (secret, known) {
        (Observed::NotRead | Observed::Missing, None) => {
            let may_mint = validation.problems.is_empty() && conflicting_claim.is_none() && !schedule.expired(now);
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
        // The value is lost. A new one is minted only on request: a silent new value would break the workloads that
        // hold the old one, and hide the deletion of the Secret.
        (Observed::Missing, Some(lost)) => {
            let requested = schedule.is_requested(lost.requested_at.as_deref(), now) && !schedule.expired(now);
            if !requested {
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
        (Observed::Ours(held), _) => step_of_owned(inputs, schedule, held),
        (Observed::Foreign { .. }, _) | (Observed::NotRead, Some(_)) => Step::Rest,
    }
}

/// The next write of a Secret of the key: rotation, erasure, or a change of its metadata.
fn step_of_owned(inputs: &Inputs<'_>, schedule: Schedule, held: &OwnedSecret) -> Step {
    let Inputs { key, settings, now, .. } = *inputs;
    let record = &held.record;
    // Only a request reactivates an unused key. A scheduled rotation would keep every unused key active.
    let unused = unused_at(settings, key.status.as_ref(), record).is_some_and(|at| at <= now);
    let is_paused = unused && !schedule.is_requested(record.requested_at.as_deref(), now);
    if !is_paused && schedule.is_due(record.current.minted_at, record.requested_at.as_deref(), now) {
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
    // The end of an overlap needs no write, since the record contains its time. An end that was moved to an
    // earlier time needs one, or else a status that is rebuilt from the record would accept the value again.
    let written = held
        .written
        .clone()
        .map(|written| Record { previous: written.previous.filter(|previous| previous.expires_at > now), ..written });
    if held.owned && held.in_order && written.as_ref() == Some(&wanted) {
        return Step::Rest;
    }
    Step::Amend { held: held.clone(), record: wanted }
}

/// Whether a restored ApiKey waits for its Secret. A backup contains both; if the operator minted a value first, the
/// restore of the Secret would fail. A rotation that is requested after the restore mints a new value.
#[must_use]
pub fn awaits_secret(key: &ApiKey, now: Timestamp) -> bool {
    let is_known = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let annotations = key.metadata.annotations.as_ref();
    let is_restored = annotations.is_some_and(|all| all.contains_key(RESTORED_BY_ANNOTATION));
    let is_restored = is_restored && key.spec.legacy.is_none();
    let created = key.metadata.creation_timestamp.as_ref().map(|at| at.0.to_string());
    is_restored && !is_known && !Schedule::of(&key.spec).is_requested(created.as_deref(), now)
}

/// The delay until the next read of a Secret that a user must create: half the age of the ApiKey, within bounds, so
/// that keys that wait forever cost few requests.
#[must_use]
pub fn recheck_delay(key: &ApiKey, now: Timestamp) -> SignedDuration {
    let created = key.metadata.creation_timestamp.as_ref().map_or(now, |at| at.0);
    (now.duration_since(created) / 2).clamp(SignedDuration::from_secs(10), SignedDuration::from_mins(5))
}

/// Whether the decision needs the Secret: the spec changed, a step is due, or a check is due (`check_due`).
#[must_use]
pub fn must_read(key: &ApiKey, settings: Option<&SecuritySettingsSpec>, now: Timestamp, check_due: bool) -> bool {
    if awaits_secret(key, now) {
        return true;
    }
    let Some(status) = &key.status else { return false };
    // A Secret with a problem is read at every reconciliation, so that the status neither flaps nor becomes outdated.
    let is_in_doubt = |reason: &str| reason.starts_with("Secret") || reason == "DigestInUse";
    if status.conditions.iter().any(|c| c.type_ == "Ready" && is_in_doubt(&c.reason)) {
        return true;
    }
    let Some(record) = record_of_status(status) else {
        // Without a known value, the creation of the Secret detects an existing one. That saves a request.
        return false;
    };
    let schedule = Schedule::of(&key.spec);
    check_due
        || status.observed_generation != key.metadata.generation
        || schedule.is_due(record.current.minted_at, record.requested_at.as_deref(), now)
        || sealing::erase_at(&record, settings).is_some_and(|at| at <= now)
}

/// The next time at which the status or the Secret changes without an event.
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
    let erasure = record_of_status(status).and_then(|record| sealing::erase_at(&record, settings));
    let request = schedule.request(status.last_handled_requested_at.as_deref());
    let all = [schedule.expires_at, overlap_end, rotation, unused, erasure, request];
    // A step that is due and was not taken waits for a change, and the change causes an event.
    all.into_iter().flatten().filter(|at| *at > now).min()
}

/// The previous value, if it works at `now` under this schedule.
pub(super) fn live_previous(schedule: &Schedule, record: &Record, now: Timestamp) -> Option<Previous> {
    record.previous.clone().and_then(|previous| schedule.tighten(&record.current, previous, now))
}

/// The part of the record that the status contains. `None` if no value was minted.
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

mod tests;
