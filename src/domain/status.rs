//! What the status of an ApiKey says, and which Events its change is worth.
//!
//! A status is a function of what is known. It holds no time that moves by itself, so that writing it once is
//! enough: a controller that finds nothing to change writes nothing.

use jiff::Timestamp;

use super::{
    lifecycle::{self, Observed, Schedule, record_of_status},
    record::Record,
    validate::{Grants, Rule, Verdict},
};
use crate::api::{ApiKey, ApiKeyStatus, Condition, KeyState, SecretRef, Time, Token};

/// The Secret that a key writes to when its spec names none (the names of Coralogix's own operator, so that
/// workloads need not change).
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

/// What a reconciliation found out and did.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The ApiKey, with the status as it was.
    pub key: &'a ApiKey,
    /// What the catalogue says of its spec.
    pub verdict: &'a Verdict,
    /// An older ApiKey that claims the same Secret.
    pub rival: Option<&'a str>,
    /// Its Secret, after what was done.
    pub secret: &'a Observed,
    /// What could not be done, if anything.
    pub failure: Option<&'a Failure>,
    /// The time.
    pub now: Timestamp,
}

/// A write or read that failed; it will be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A reason in CamelCase.
    pub reason: &'static str,
    /// A sentence without any value.
    pub message: String,
}

/// How a key is, before it is spread over state and conditions.
struct Summary {
    state: KeyState,
    ready: bool,
    /// Whether it will change without anybody doing something.
    passing: bool,
    reason: &'static str,
    message: String,
}

/// Builds the status.
#[must_use]
pub fn build(facts: &Facts<'_>) -> ApiKeyStatus {
    let Facts { key, verdict, now, .. } = *facts;
    let old = key.status.as_ref();
    let schedule = Schedule::of(&key.spec);
    // What could not be carried out is not yet so.
    let known = match facts.secret {
        Observed::Ours(held) if facts.failure.is_none() => Some(held.record.clone()),
        _ => old.and_then(record_of_status),
    };
    let summary = summarize(facts, &schedule, known.as_ref());
    let generation = key.metadata.generation;
    let grants = in_force(verdict, old, known.is_some());
    let mut status = ApiKeyStatus {
        // A status that could not be brought up to date must not claim to be.
        observed_generation: if facts.failure.is_some() { old.and_then(|s| s.observed_generation) } else { generation },
        state: Some(summary.state),
        presets: grants.presets.iter().map(ToString::to_string).collect(),
        permissions: grants.permissions.iter().map(ToString::to_string).collect(),
        conditions: conditions(facts, &summary),
        ..ApiKeyStatus::default()
    };
    if let Some(record) = known {
        status.id = Some(record.current.id());
        status.created_at = Some(Time(record.created_at));
        status.secret_ref = Some(secret_ref(key));
        status.last_rotated_at = record.last_rotated_at.map(Time);
        status.next_rotation_at = schedule.next_rotation(record.current.minted_at).map(Time);
        status.tokens = tokens(&schedule, &record, now);
        status.last_handled_requested_at = record.requested_at;
    }
    status
}

fn tokens(schedule: &Schedule, record: &Record, now: Timestamp) -> Vec<Token> {
    let current = Token {
        id: record.current.id(),
        sha256: record.current.sha256.clone(),
        minted_at: Time(record.current.minted_at),
        expires_at: schedule.expires_at.filter(|at| *at > Timestamp::MIN).map(Time),
    };
    let previous = lifecycle::live_previous(schedule, record, now).map(|previous| Token {
        id: previous.entry.id(),
        minted_at: Time(previous.entry.minted_at),
        expires_at: Some(Time(previous.expires_at)),
        sha256: previous.entry.sha256,
    });
    std::iter::once(current).chain(previous).collect()
}

/// What the key may do: what its spec asks for, once that is accepted. A spec that breaks a rule changes nothing:
/// what was accepted before stays, less what left the catalogue.
fn in_force(verdict: &Verdict, old: Option<&ApiKeyStatus>, minted: bool) -> Grants {
    if verdict.problems.is_empty() {
        return if minted { verdict.grants.clone() } else { Grants::default() };
    }
    let keep = |old: &[String], asked: &[std::sync::Arc<str>]| {
        asked.iter().filter(|name| old.iter().any(|o| **o == ***name)).cloned().collect()
    };
    old.map_or_else(Grants::default, |old| Grants {
        presets: keep(&old.presets, &verdict.grants.presets),
        permissions: keep(&old.permissions, &verdict.grants.permissions),
    })
}

fn summarize(facts: &Facts<'_>, schedule: &Schedule, known: Option<&Record>) -> Summary {
    let Facts { key, verdict, rival, secret, failure, now } = *facts;
    let place = secret_ref(key);
    let minted = known.is_some();
    let lost = minted
        && match secret {
            Observed::Missing | Observed::Foreign { .. } => true,
            Observed::Ours(held) => !held.intact,
            // Nobody looks only while all was well; a failed look leaves what was known.
            Observed::NotRead => key.status.as_ref().and_then(|s| s.state) == Some(KeyState::Lost),
        };
    let state = if minted {
        match () {
            () if schedule.expired(now) => KeyState::Expired,
            () if !schedule.active => KeyState::Inactive,
            () if lost => KeyState::Lost,
            () => KeyState::Active,
        }
    } else if schedule.expired(now) && verdict.problems.is_empty() {
        KeyState::Expired
    } else if verdict.problems.iter().any(|p| p.rule != Rule::CatalogMissing) {
        KeyState::Rejected
    } else {
        KeyState::Pending
    };
    let summary = |ready, passing, reason, message| Summary { state, ready, passing, reason, message };

    if let Some(failure) = failure {
        return summary(false, true, failure.reason, failure.message.clone());
    }
    if let Observed::Foreign { why, passing } = secret {
        let message = format!("Secret {} was left alone: {why}", place.name);
        return summary(false, *passing, "SecretConflict", message);
    }
    if let (false, Some(rival)) = (minted, rival) {
        let message = format!(
            "ApiKey {rival} is older and writes to Secret {}: choose another spec.secret.name in a new ApiKey",
            place.name
        );
        return summary(false, false, "SecretConflict", message);
    }
    if let Some(first) = verdict.problems.first() {
        let all: Vec<_> = verdict.problems.iter().map(ToString::to_string).collect();
        return summary(false, first.rule == Rule::CatalogMissing, first.rule.reason(), all.join("; "));
    }
    if lost && state != KeyState::Expired {
        return match secret {
            Observed::Ours(_) => summary(
                false,
                false,
                "SecretValueChanged",
                format!(
                    "key {} of Secret {} no longer holds the value that was minted: change spec.rotation.requestedAt to mint a new one",
                    place.key, place.name
                ),
            ),
            _ => summary(
                false,
                false,
                "SecretLost",
                format!(
                    "Secret {} is gone and the value can't be restored: bring the Secret back, or change spec.rotation.requestedAt to mint a new value",
                    place.name
                ),
            ),
        };
    }
    match state {
        KeyState::Expired => {
            let at = key.spec.expires_at.as_deref().unwrap_or_default();
            summary(false, false, "Expired", format!("expired at {at}: move spec.expiresAt to use the key again"))
        }
        KeyState::Inactive => {
            summary(true, false, "Inactive", "inactive, as spec.active asks; the value is kept".to_owned())
        }
        KeyState::Active => {
            summary(true, false, "Active", format!("the value is in Secret {}, key {}", place.name, place.key))
        }
        KeyState::Pending | KeyState::Rejected | KeyState::Lost => {
            summary(false, true, "Minting", format!("the value is being written to Secret {}", place.name))
        }
    }
}

fn conditions(facts: &Facts<'_>, summary: &Summary) -> Vec<Condition> {
    let problems = &facts.verdict.problems;
    let (accepted, reason) = problems.first().map_or(("True", "Accepted"), |p| ("False", p.rule.reason()));
    let message = if problems.is_empty() {
        "every preset and permission is known".to_owned()
    } else {
        problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    let ready = if summary.ready { "True" } else { "False" };
    let mut wanted =
        vec![("Ready", ready, summary.reason, summary.message.clone()), ("Accepted", accepted, reason, message)];
    // Present only while true, as kstatus and Argo CD expect.
    if !summary.ready {
        let kind = if summary.passing { "Reconciling" } else { "Stalled" };
        wanted.push((kind, "True", summary.reason, summary.message.clone()));
    }
    let old = facts.key.status.as_ref().map_or(&[][..], |s| &s.conditions);
    wanted
        .into_iter()
        .map(|(kind, status, reason, message)| condition(old, kind, status, reason, &message, facts))
        .collect()
}

fn condition(old: &[Condition], kind: &str, status: &str, reason: &str, message: &str, facts: &Facts<'_>) -> Condition {
    merge_condition(old, kind, status, reason, message, facts.key.metadata.generation, facts.now)
}

/// A condition that keeps its transition time unless its status flips.
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
    const LONGEST_MESSAGE: usize = 2048;
    let since = old.iter().find(|c| c.type_ == kind && c.status == status).map(|c| c.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(LONGEST_MESSAGE).collect(),
        observed_generation: generation,
        last_transition_time: since.unwrap_or(Time(now)),
    }
}

/// Something worth an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether somebody should look at it.
    pub warning: bool,
    /// The reason, in CamelCase; one of a fixed few.
    pub reason: &'static str,
    /// What happened, without any value.
    pub message: String,
}

/// The Events that the change from one status to the next is worth.
#[must_use]
pub fn notes(old: Option<&ApiKeyStatus>, new: &ApiKeyStatus, minted_now: bool) -> Vec<Note> {
    let mut notes = vec![];
    let mut note = |warning, reason, message| notes.push(Note { warning, reason, message });
    let place = new.secret_ref.as_ref().map(|s| s.name.as_str()).unwrap_or_default();
    let id = new.id.as_deref().unwrap_or_default();
    match (old.and_then(|s| s.id.as_deref()), new.id.as_deref()) {
        (None, Some(_)) if minted_now => note(false, "Minted", format!("{id} minted and written to Secret {place}")),
        (None, Some(_)) => {
            note(false, "Adopted", format!("{id} found in Secret {place}; the status was rebuilt from it"));
        }
        (Some(before), Some(after)) if before != after => {
            let until = match new.tokens.get(1).and_then(|t| t.expires_at.as_ref()) {
                Some(end) => format!("{before} works until {}", end.0),
                None => format!("{before} is revoked"),
            };
            note(false, "Rotated", format!("{id} minted and written to Secret {place}; {until}"));
        }
        _ => {}
    }
    let had_previous = old.and_then(|s| s.tokens.get(1)).filter(|_| old.and_then(|s| s.id.as_deref()) == Some(id));
    if let Some(previous) = had_previous
        && new.tokens.len() < 2
    {
        note(false, "OverlapEnded", format!("{} no longer works", previous.id));
    }
    let state_before = old.and_then(|s| s.state);
    if state_before != new.state {
        match (state_before, new.state) {
            (Some(KeyState::Active | KeyState::Expired | KeyState::Lost), Some(KeyState::Inactive)) => {
                note(false, "Deactivated", format!("{id} is refused until active again"));
            }
            (_, Some(KeyState::Expired)) => note(true, "Expired", format!("{id} has expired").trim().to_owned()),
            (Some(KeyState::Inactive | KeyState::Expired | KeyState::Lost), Some(KeyState::Active)) => {
                note(false, "Reactivated", format!("{id} works again"));
            }
            _ => {}
        }
    }
    let ready = |status: &ApiKeyStatus| status.conditions.iter().find(|c| c.type_ == "Ready").cloned();
    if let Some(now) = ready(new)
        && now.status == "False"
        && !matches!(now.reason.as_str(), "Expired" | "Minting")
        && old.and_then(ready).is_none_or(|before| before.reason != now.reason)
        && let Some(reason) = WARNINGS.iter().find(|known| **known == now.reason)
    {
        note(true, reason, now.message);
    }
    notes
}

/// The reasons of warning Events: a fixed set, since reasons are what people and alerts filter by.
const WARNINGS: [&str; 16] = [
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
    "NotEnforced",
    "SecretConflict",
    "SecretLost",
    "SecretValueChanged",
    "SecretReadFailed",
    "SecretWriteFailed",
];
