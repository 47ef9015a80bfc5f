//! The status of an ApiKey and the Events for its changes.
//!
//! The status is a function of the inputs of a reconciliation. It contains no time that advances by itself, so that a
//! reconciliation without changes writes nothing.

use jiff::Timestamp;

use super::{
    inputs::Inputs,
    lifecycle::{self, Observed, Schedule, record_of_status},
    record::{Record, SEALED_VALUE, Sealed},
    validate::{Grants, Rule, Validation},
};
use crate::api::{
    ApiKey, ApiKeyStatus, Condition, KeyState, Reveal, RevealMode, RevealState, SecretRef, Time, Token, creator_of_key,
};

/// The Secret of a key and the key in its data. The defaults are those of the Coralogix operator, so that workloads
/// need no change (docs/specification.md, "Coralogix operator").
#[must_use]
pub fn secret_ref(key: &ApiKey) -> SecretRef {
    let template = key.spec.secret.as_ref();
    SecretRef {
        name: template
            .and_then(|t| t.name.clone())
            .unwrap_or_else(|| format!("{}-secret", key.metadata.name.as_deref().unwrap_or_default())),
        key: template.and_then(|t| t.key.clone()).unwrap_or_else(|| "key-value".to_owned()),
    }
}

/// The Secret of a record and the key of the value in its data.
fn value_ref_of(key: &ApiKey, record: &Record) -> SecretRef {
    let default = secret_ref(key);
    match &record.sealed {
        Some(sealed) if !sealed.plain => SecretRef { key: SEALED_VALUE.to_owned(), ..default },
        _ => default,
    }
}

/// A failed read or write. The controller retries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A reason in CamelCase.
    pub reason: &'static str,
    /// A sentence without any value.
    pub message: String,
    /// Whether a retry can succeed without a change by a user.
    pub passing: bool,
}

/// The state of a key and the content of its Ready condition.
struct Summary {
    state: KeyState,
    ready: bool,
    /// Whether the state changes without an action by a user.
    passing: bool,
    reason: &'static str,
    message: String,
}

/// Builds the status.
#[must_use]
pub fn build(inputs: &Inputs<'_>) -> ApiKeyStatus {
    let Inputs { key, validation, now, .. } = *inputs;
    let old = key.status.as_ref();
    let schedule = Schedule::of(&key.spec);
    // After a failure, the status keeps the record that it had.
    let known = match inputs.secret {
        Observed::Ours(owned) if inputs.failure.is_none() => Some(owned.record.clone()),
        _ => old.and_then(record_of_status),
    };
    let summary = summarize(inputs, &schedule, known.as_ref());
    let generation = key.metadata.generation;
    let grants = in_force(validation, old, known.is_some(), inputs.failure.is_some());
    let mut status = ApiKeyStatus {
        // After a failure, the status does not yet reflect the spec of this generation.
        observed_generation: if inputs.failure.is_some() {
            old.and_then(|s| s.observed_generation)
        } else {
            generation
        },
        state: Some(summary.state),
        presets: grants.presets.iter().map(ToString::to_string).collect(),
        permissions: grants.permissions.iter().map(ToString::to_string).collect(),
        conditions: conditions(inputs, &summary),
        creator: creator_of_key(key),
        // The verifier writes this field.
        last_used_at: old.and_then(|old| old.last_used_at.clone()),
        ..ApiKeyStatus::default()
    };
    if let Some(record) = known {
        status.id = Some(record.current.id());
        status.created_at = Some(Time(record.created_at));
        status.secret_ref = Some(value_ref_of(key, &record));
        status.last_rotated_at = record.last_rotated_at.map(Time);
        status.next_rotation_at = schedule.next_rotation(record.current.minted_at).map(Time);
        status.tokens = tokens(&schedule, &record, now);
        status.last_handled_requested_at = record.requested_at;
        status.reveal = record.sealed.map(|sealed| sealed.reveal());
    }
    status
}

fn tokens(schedule: &Schedule, record: &Record, now: Timestamp) -> Vec<Token> {
    let current = Token {
        id: record.current.id(),
        sha256: record.current.sha256.clone(),
        generation: Some(record.current.generation),
        minted_at: Time(record.current.minted_at),
        expires_at: schedule.expires_at.filter(|at| *at > Timestamp::MIN).map(Time),
    };
    let previous = lifecycle::live_previous(schedule, record, now).map(|previous| Token {
        id: previous.entry.id(),
        generation: Some(previous.entry.generation),
        minted_at: Time(previous.entry.minted_at),
        expires_at: Some(Time(previous.expires_at)),
        sha256: previous.entry.sha256,
    });
    std::iter::once(current).chain(previous).collect()
}

/// The grants in force. An accepted spec determines them. A spec that violates a rule adds nothing: the previous grants
/// that it still lists and that are in the catalog stay. A failed write of the Secret adds nothing either: added
/// permissions may require a rotation, and the previous value must not get them.
fn in_force(validation: &Validation, old: Option<&ApiKeyStatus>, minted: bool, failed: bool) -> Grants {
    if validation.problems.is_empty() && !failed {
        return if minted { validation.grants.clone() } else { Grants::default() };
    }
    let keep = |old: &[String], requested: &[std::sync::Arc<str>]| {
        requested.iter().filter(|name| old.iter().any(|o| **o == ***name)).cloned().collect()
    };
    old.map_or_else(Grants::default, |old| Grants {
        presets: keep(&old.presets, &validation.grants.presets),
        permissions: keep(&old.permissions, &validation.grants.permissions),
    })
}

fn summarize(inputs: &Inputs<'_>, schedule: &Schedule, known: Option<&Record>) -> Summary {
    let Inputs { key, validation, conflicting_claim, secret, settings, import, failure, now, .. } = *inputs;
    let value_ref = known.map_or_else(|| secret_ref(key), |record| value_ref_of(key, record));
    let secret_name = &value_ref.name;
    let minted = known.is_some();
    let sealed = known.and_then(|record| record.sealed.as_ref());
    let erased = sealed.is_some_and(Sealed::is_lost);
    let lost = minted && is_lost(inputs, erased);
    let unused = known
        .and_then(|record| lifecycle::unused_at(settings, key.status.as_ref(), record))
        .is_some_and(|at| at <= now);
    let state = if minted { minted_state(schedule, unused, lost, now) } else { unminted_state(inputs, schedule) };
    let summary = |ready, passing, reason, message| Summary { state, ready, passing, reason, message };

    if let Some(failure) = failure {
        return summary(false, failure.passing, failure.reason, failure.message.clone());
    }
    if let Observed::Foreign { reason, why, passing } = secret {
        let message = format!("Secret {secret_name} was not accepted: {why}");
        return summary(false, *passing, reason, message);
    }
    if let (false, Some(conflicting_claim)) = (minted, conflicting_claim) {
        let message = format!(
            "ApiKey {conflicting_claim} is older and writes to Secret {secret_name}: choose another spec.secret.name \
             in a new ApiKey"
        );
        return summary(false, false, "SecretConflict", message);
    }
    if let Some(first) = validation.problems.first() {
        let all: Vec<_> = validation.problems.iter().map(ToString::to_string).collect();
        return summary(false, first.rule == Rule::CatalogMissing, first.rule.reason(), all.join("; "));
    }
    if let Some(obstacle) = import {
        return summary(false, obstacle.passing, obstacle.reason, obstacle.message.clone());
    }
    let legacy = key.spec.legacy.is_some();
    if lost && state != KeyState::Expired {
        if erased && matches!(secret, Observed::Ours(_) | Observed::NotRead) {
            let message = "the value was erased because it was not revealed in time: set spec.rotation.requestedAt to \
                           the current time to mint a new one";
            return summary(false, false, "ValueErased", message.to_owned());
        }
        let (reason, message) = lost_value(matches!(secret, Observed::Ours(_)), legacy, &value_ref);
        return summary(false, false, reason, message);
    }
    match state {
        KeyState::Expired => {
            let at = key.spec.expires_at.as_deref().unwrap_or_default();
            let message = format!("expired at {at}: set a later spec.expiresAt to use the key again");
            summary(false, false, "Expired", message)
        }
        KeyState::Inactive if unused && schedule.active => {
            let fix = if legacy {
                "a legacy key can't be minted: replace it by a custom key, or raise the limit"
            } else {
                "set spec.rotation.requestedAt to the current time to mint a new value"
            };
            let message = format!("not used within limits.deactivateUnusedAfter of the SecuritySettings: {fix}");
            summary(false, false, "Unused", message)
        }
        KeyState::Inactive => {
            summary(true, false, "Inactive", "inactive because spec.active is false; the value is kept".to_owned())
        }
        KeyState::Active => summary(true, false, "Active", value_location(sealed, &value_ref)),
        KeyState::Pending if lifecycle::awaits_secret(key, now) => {
            let message = format!(
                "the ApiKey was restored from a backup without Secret {secret_name}: restore the Secret, or set \
                 spec.rotation.requestedAt to the current time to mint a new value"
            );
            summary(false, false, "WaitingForSecret", message)
        }
        KeyState::Pending | KeyState::Rejected | KeyState::Lost => {
            summary(false, true, "Minting", format!("the value is being written to Secret {secret_name}"))
        }
    }
}

/// Whether the value of a minted key is missing.
fn is_lost(inputs: &Inputs<'_>, erased: bool) -> bool {
    match inputs.secret {
        Observed::Missing | Observed::Foreign { .. } => true,
        Observed::Ours(owned) => erased || !owned.intact,
        // The Secret is not read while nothing is wrong, or the read failed: the state stays.
        Observed::NotRead => erased || inputs.key.status.as_ref().and_then(|s| s.state) == Some(KeyState::Lost),
    }
}

fn minted_state(schedule: &Schedule, unused: bool, lost: bool, now: Timestamp) -> KeyState {
    match () {
        () if schedule.expired(now) => KeyState::Expired,
        () if !schedule.active || unused => KeyState::Inactive,
        () if lost => KeyState::Lost,
        () => KeyState::Active,
    }
}

fn unminted_state(inputs: &Inputs<'_>, schedule: &Schedule) -> KeyState {
    let Inputs { validation, import, now, .. } = *inputs;
    if schedule.expired(now) && validation.problems.is_empty() {
        KeyState::Expired
    } else if validation.problems.iter().any(|p| p.rule != Rule::CatalogMissing) || import.is_some_and(|i| !i.passing) {
        KeyState::Rejected
    } else {
        KeyState::Pending
    }
}

/// The reason and message for a key whose value was changed in its Secret or whose Secret is missing.
fn lost_value(changed: bool, legacy: bool, value_ref: &SecretRef) -> (&'static str, String) {
    let SecretRef { name, key } = value_ref;
    let message = match (changed, legacy) {
        (true, false) => format!(
            "key {key} of Secret {name} no longer holds the value that was minted: set spec.rotation.requestedAt \
             to the current time to mint a new one"
        ),
        (false, false) => format!(
            "Secret {name} does not exist, and the operator has no copy of the value: restore the Secret, or set \
             spec.rotation.requestedAt to the current time to mint a new value"
        ),
        (true, true) => format!(
            "key {key} of Secret {name} no longer holds the value that was imported: restore that value; a legacy key \
             can't be minted, so for a new value replace it by a custom key"
        ),
        (false, true) => format!(
            "Secret {name} has no key {key}, or does not exist: restore it with the value that was imported; a legacy \
             key can't be minted, so for a new value replace it by a custom key"
        ),
    };
    (if changed { "SecretValueChanged" } else { "SecretLost" }, message)
}

/// The location of the value of an active key, and how to view it.
fn value_location(sealed: Option<&Sealed>, value_ref: &SecretRef) -> String {
    let Some(sealed) = sealed else {
        return format!("the value is in Secret {}, key {}", value_ref.name, value_ref.key);
    };
    let Reveal { mode, state, by, .. } = sealed.reveal();
    match (mode, state, by) {
        (RevealMode::OneTime, RevealState::Unrevealed, _) => {
            "the value is sealed and can be revealed once: kubectl keywright reveal shows it".to_owned()
        }
        (RevealMode::OneTime, RevealState::Revealed, by) => {
            format!("the value was revealed to {}, and can't be revealed again", by.unwrap_or_default())
        }
        (_, RevealState::Erased, _) => "the sealed value was erased because it was not revealed in time".to_owned(),
        (RevealMode::Sealed, ..) => "the value is sealed: kubectl keywright reveal shows it".to_owned(),
    }
}

fn conditions(inputs: &Inputs<'_>, summary: &Summary) -> Vec<Condition> {
    let problems = &inputs.validation.problems;
    let (accepted, reason) = problems.first().map_or(("True", "Accepted"), |p| ("False", p.rule.reason()));
    let message = if problems.is_empty() {
        "every preset and permission is known".to_owned()
    } else {
        problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    let ready = if summary.ready { "True" } else { "False" };
    let mut wanted =
        vec![("Ready", ready, summary.reason, summary.message.clone()), ("Accepted", accepted, reason, message)];
    if let Some(reference) = &inputs.key.spec.access_policy_ref {
        wanted.push(match inputs.policy {
            Some(_) => {
                ("PolicyAccepted", "True", "PolicyFound", format!("AccessPolicy {} is in force", reference.name))
            }
            None => ("PolicyAccepted", "False", POLICY_NOT_FOUND, policy_not_found(&reference.name)),
        });
    }
    // Present only while true, as kstatus and Argo CD expect.
    if !summary.ready {
        let kind = if summary.passing { "Reconciling" } else { "Stalled" };
        wanted.push((kind, "True", summary.reason, summary.message.clone()));
    }
    let old = inputs.key.status.as_ref().map_or(&[][..], |s| &s.conditions);
    wanted
        .into_iter()
        .map(|(kind, status, reason, message)| condition(old, kind, status, reason, &message, inputs))
        .collect()
}

const POLICY_NOT_FOUND: &str = "PolicyNotFound";

fn policy_not_found(name: &str) -> String {
    format!(
        "AccessPolicy {name} does not exist, so no user may view or manage the key: create it, or name another in \
         spec.accessPolicyRef"
    )
}

fn condition(
    old: &[Condition],
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    inputs: &Inputs<'_>,
) -> Condition {
    merge_condition(old, kind, status, reason, message, inputs.key.metadata.generation, inputs.now)
}

/// Builds a condition. It keeps its transition time unless its status changes.
#[must_use]
pub fn merge_condition(
    old: &[Condition],
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    const MAX_MESSAGE_CHARS: usize = 2048;
    let since = old.iter().find(|c| c.type_ == kind && c.status == status).map(|c| c.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(MAX_MESSAGE_CHARS).collect(),
        observed_generation: generation,
        last_transition_time: since.unwrap_or(Time(now)),
    }
}

/// The content of an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether the type of the Event is Warning.
    pub warning: bool,
    /// The reason, in CamelCase, from a fixed set.
    pub reason: &'static str,
    /// The message, without any value.
    pub message: String,
}

/// The Events for the change from one status to the next.
#[must_use]
pub fn notes(old: Option<&ApiKeyStatus>, new: &ApiKeyStatus, minted_now: bool) -> Vec<Note> {
    let mut notes = vec![];
    let mut note = |warning, reason, message| notes.push(Note { warning, reason, message });
    let secret = new.secret_ref.as_ref().map(|s| s.name.as_str()).unwrap_or_default();
    let id = new.id.as_deref().unwrap_or_default();
    match (old.and_then(|s| s.id.as_deref()), new.id.as_deref()) {
        (None, Some(_)) if minted_now => {
            note(false, "Minted", format!("{id} was minted and written to Secret {secret}"));
        }
        (None, Some(_)) => {
            note(false, "Adopted", format!("{id} was found in Secret {secret}; the status was rebuilt from it"));
        }
        (Some(before), Some(after)) if before != after => {
            let until = match new.tokens.get(1).and_then(|t| t.expires_at.as_ref()) {
                Some(end) => format!("{before} works until {}", end.0),
                None => format!("{before} is revoked"),
            };
            note(false, "Rotated", format!("{id} was minted and written to Secret {secret}; {until}"));
        }
        _ => {}
    }
    let had_previous = old.and_then(|s| s.tokens.get(1)).filter(|_| old.and_then(|s| s.id.as_deref()) == Some(id));
    if let Some(previous) = had_previous
        && new.tokens.len() < 2
    {
        note(false, "OverlapEnded", format!("{} no longer works", previous.id));
    }
    let condition = |status: &ApiKeyStatus, kind| status.conditions.iter().find(|c| c.type_ == kind).cloned();
    let unused = condition(new, "Ready").is_some_and(|c| c.reason == "Unused");
    let is_erased = |status: &ApiKeyStatus| status.reveal.as_ref().is_some_and(|r| r.state == RevealState::Erased);
    if is_erased(new) && !old.is_some_and(is_erased) {
        note(true, "ValueErased", format!("the sealed value of {id} was erased because it was not revealed in time"));
    }
    let state_before = old.and_then(|s| s.state);
    if state_before != new.state {
        match (state_before, new.state) {
            (Some(KeyState::Active | KeyState::Expired | KeyState::Lost), Some(KeyState::Inactive)) if !unused => {
                note(false, "Deactivated", format!("{id} is rejected until the ApiKey is active again"));
            }
            (_, Some(KeyState::Expired)) => note(true, "Expired", format!("{id} has expired").trim().to_owned()),
            (Some(KeyState::Inactive | KeyState::Expired | KeyState::Lost), Some(KeyState::Active)) => {
                note(false, "Reactivated", format!("{id} works again"));
            }
            _ => {}
        }
    }
    let ready = |status: &ApiKeyStatus| condition(status, "Ready");
    if let Some(now) = ready(new)
        && now.status == "False"
        && !matches!(now.reason.as_str(), "Expired" | "Minting")
        && old.and_then(ready).is_none_or(|before| before.reason != now.reason)
        && let Some(reason) = WARNINGS.iter().find(|known| **known == now.reason)
    {
        note(true, reason, now.message);
    }
    let policy = |status: &ApiKeyStatus| condition(status, "PolicyAccepted");
    if let Some(now) = policy(new)
        && now.status == "False"
        && old.and_then(policy).is_none_or(|before| before.message != now.message)
    {
        note(true, POLICY_NOT_FOUND, now.message);
    }
    notes
}

/// The reasons of warning Events. The set is fixed, since users and alerts filter by reason.
const WARNINGS: [&str; 21] = [
    "Unused",
    "DigestInUse",
    "LegacyValueMinted",
    "SecretNotAuthentic",
    "WaitingForSecret",
    "LegacyValueTooShort",
    "CatalogMissing",
    "PresetNotFound",
    "PermissionNotFound",
    "StandalonePreset",
    "NotIngestion",
    "InvalidTime",
    "InvalidDuration",
    "OverlapTooLong",
    "InvalidSecretMetadata",
    "SecretNameTaken",
    "SecretConflict",
    "SecretLost",
    "SecretValueChanged",
    "SecretReadFailed",
    "SecretWriteFailed",
];
