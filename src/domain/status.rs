//! What the status of an ApiKey says, and which Events its change is worth.
//!
//! A status is a function of what is known. It holds no time that moves by itself, so that writing it once is
//! enough: a controller that finds nothing to change writes nothing.

use jiff::Timestamp;

use super::{
    gates::KnownPolicy,
    legacy::Obstacle,
    lifecycle::{self, Observed, Schedule, record_of_status},
    record::{Record, SEALED_VALUE, Sealed},
    validate::{Grants, Rule, Verdict},
};
use crate::api::{
    ApiKey, ApiKeyStatus, Condition, KeyState, Reveal, RevealMode, RevealState, SecretRef, SecuritySettingsSpec, Time,
    Token, creator_of_key,
};

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

/// Where the value of a record is.
fn place_of(key: &ApiKey, record: &Record) -> SecretRef {
    let place = secret_ref(key);
    match &record.sealed {
        Some(sealed) if !sealed.plain => SecretRef { key: SEALED_VALUE.to_owned(), ..place },
        _ => place,
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
    /// The security settings of the namespace.
    pub settings: Option<&'a SecuritySettingsSpec>,
    /// The access policy that it refers to, if that exists.
    pub policy: Option<&'a KnownPolicy>,
    /// What keeps a legacy key from being imported.
    pub import: Option<&'a Obstacle>,
    /// What could not be done, if anything.
    pub failure: Option<&'a Failure>,
    /// The time.
    pub now: Timestamp,
}

/// A write or read that failed; it is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A reason in CamelCase.
    pub reason: &'static str,
    /// A sentence without any value.
    pub message: String,
    /// Whether it can succeed without a change by a person.
    pub passing: bool,
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
    let grants = in_force(verdict, old, known.is_some(), facts.failure.is_some());
    let mut status = ApiKeyStatus {
        // A status that could not be brought up to date must not claim to be.
        observed_generation: if facts.failure.is_some() { old.and_then(|s| s.observed_generation) } else { generation },
        state: Some(summary.state),
        presets: grants.presets.iter().map(ToString::to_string).collect(),
        permissions: grants.permissions.iter().map(ToString::to_string).collect(),
        conditions: conditions(facts, &summary),
        // The first stamp wins, so that whoever copies an object does not become its creator.
        creator: creator_of_key(key),
        // Somebody else writes it.
        last_used_at: old.and_then(|old| old.last_used_at.clone()),
        ..ApiKeyStatus::default()
    };
    if let Some(record) = known {
        status.id = Some(record.current.id());
        status.created_at = Some(Time(record.created_at));
        status.secret_ref = Some(place_of(key, &record));
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

/// What the key may do: what its spec asks for, once that is accepted. A spec that breaks a rule changes nothing:
/// what was accepted before stays, less what left the catalogue. Nor does a key gain anything while a write of its Secret
/// fails: a change that adds permissions may demand a rotation, and the value before must not get them.
fn in_force(verdict: &Verdict, old: Option<&ApiKeyStatus>, minted: bool, failed: bool) -> Grants {
    if verdict.problems.is_empty() && !failed {
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
    let Facts { key, verdict, rival, secret, settings, import, failure, now, .. } = *facts;
    let place = known.map_or_else(|| secret_ref(key), |record| place_of(key, record));
    let minted = known.is_some();
    let sealed = known.and_then(|record| record.sealed.as_ref());
    let erased = sealed.is_some_and(Sealed::is_lost);
    let lost = minted
        && match secret {
            Observed::Missing | Observed::Foreign { .. } => true,
            Observed::Ours(held) => erased || !held.intact,
            // Nobody looks only while all was well; a failed look leaves what was known.
            Observed::NotRead => erased || key.status.as_ref().and_then(|s| s.state) == Some(KeyState::Lost),
        };
    let unused = known
        .and_then(|record| lifecycle::unused_at(settings, key.status.as_ref(), record))
        .is_some_and(|at| at <= now);
    let state = if minted {
        match () {
            () if schedule.expired(now) => KeyState::Expired,
            () if !schedule.active || unused => KeyState::Inactive,
            () if lost => KeyState::Lost,
            () => KeyState::Active,
        }
    } else if schedule.expired(now) && verdict.problems.is_empty() {
        KeyState::Expired
    } else if verdict.problems.iter().any(|p| p.rule != Rule::CatalogMissing) || import.is_some_and(|i| !i.passing) {
        KeyState::Rejected
    } else {
        KeyState::Pending
    };
    let summary = |ready, passing, reason, message| Summary { state, ready, passing, reason, message };

    if let Some(failure) = failure {
        return summary(false, failure.passing, failure.reason, failure.message.clone());
    }
    if let Observed::Foreign { reason, why, passing } = secret {
        let message = format!("Secret {} was left alone: {why}", place.name);
        return summary(false, *passing, reason, message);
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
    if let Some(obstacle) = import {
        return summary(false, obstacle.passing, obstacle.reason, obstacle.message.clone());
    }
    let legacy = key.spec.legacy.is_some();
    if lost && state != KeyState::Expired {
        if erased && matches!(secret, Observed::Ours(_) | Observed::NotRead) {
            let message = "the value was erased, since nobody revealed it in time: set spec.rotation.requestedAt to the current time to mint a new one";
            return summary(false, false, "ValueErased", message.to_owned());
        }
        let (reason, message) = loss(matches!(secret, Observed::Ours(_)), legacy, &place);
        return summary(false, false, reason, message);
    }
    match state {
        KeyState::Expired => {
            let at = key.spec.expires_at.as_deref().unwrap_or_default();
            summary(false, false, "Expired", format!("expired at {at}: move spec.expiresAt to use the key again"))
        }
        KeyState::Inactive if unused && schedule.active => {
            let way = if legacy {
                "a legacy key can't be minted: replace it by a custom key, or raise the limit"
            } else {
                "set spec.rotation.requestedAt to the current time to mint a new value"
            };
            let message =
                format!("not used for as long as limits.deactivateUnusedAfter of the SecuritySettings: {way}");
            summary(false, false, "Unused", message)
        }
        KeyState::Inactive => {
            summary(true, false, "Inactive", "inactive, as spec.active asks; the value is kept".to_owned())
        }
        KeyState::Active => summary(true, false, "Active", whereabouts(sealed, &place)),
        KeyState::Pending if lifecycle::awaits_secret(key, now) => {
            let message = format!(
                "the ApiKey was restored from a backup, and Secret {} was not yet: restore the Secret, or set \
                 spec.rotation.requestedAt to the current time to mint a new value",
                place.name
            );
            summary(false, false, "WaitingForSecret", message)
        }
        KeyState::Pending | KeyState::Rejected | KeyState::Lost => {
            summary(false, true, "Minting", format!("the value is being written to Secret {}", place.name))
        }
    }
}

/// What became of the value: it was changed in its Secret, or is gone with it.
fn loss(changed: bool, legacy: bool, place: &SecretRef) -> (&'static str, String) {
    let SecretRef { name, key } = place;
    let message = match (changed, legacy) {
        (true, false) => format!(
            "key {key} of Secret {name} no longer holds the value that was minted: set spec.rotation.requestedAt \
             to the current time to mint a new one"
        ),
        (false, false) => format!(
            "Secret {name} is gone and the value can't be restored: bring the Secret back, or set \
             spec.rotation.requestedAt to the current time to mint a new value"
        ),
        (true, true) => format!(
            "key {key} of Secret {name} no longer holds the value that was imported: bring that value back; a legacy \
             key can't be minted, so for a new value replace it by a custom key"
        ),
        (false, true) => format!(
            "Secret {name} is gone: bring it back with the value that was imported; a legacy key can't be minted, so \
             for a new value replace it by a custom key"
        ),
    };
    (if changed { "SecretValueChanged" } else { "SecretLost" }, message)
}

/// Where the value of a key that works is, and how to see it.
fn whereabouts(sealed: Option<&Sealed>, place: &SecretRef) -> String {
    let Some(sealed) = sealed else {
        return format!("the value is in Secret {}, key {}", place.name, place.key);
    };
    let Reveal { mode, state, by, .. } = sealed.reveal();
    match (mode, state, by) {
        (RevealMode::OneTime, RevealState::Unrevealed, _) => {
            "the value is sealed and can be revealed once: kubectl keywright reveal shows it".to_owned()
        }
        (RevealMode::OneTime, RevealState::Revealed, by) => {
            format!("the value was revealed to {}, and can't be revealed again", by.unwrap_or_default())
        }
        (_, RevealState::Erased, _) => "the sealed value was erased, since nobody revealed it in time".to_owned(),
        (RevealMode::Sealed, ..) => "the value is sealed: kubectl keywright reveal shows it".to_owned(),
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
    if let Some(reference) = &facts.key.spec.access_policy_ref {
        wanted.push(match facts.policy {
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
    let old = facts.key.status.as_ref().map_or(&[][..], |s| &s.conditions);
    wanted
        .into_iter()
        .map(|(kind, status, reason, message)| condition(old, kind, status, reason, &message, facts))
        .collect()
}

const POLICY_NOT_FOUND: &str = "PolicyNotFound";

fn policy_not_found(name: &str) -> String {
    format!(
        "AccessPolicy {name} does not exist, so nobody may view or manage the key: create it, or name another under \
         spec.accessPolicyRef"
    )
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
    let condition = |status: &ApiKeyStatus, kind| status.conditions.iter().find(|c| c.type_ == kind).cloned();
    let unused = condition(new, "Ready").is_some_and(|c| c.reason == "Unused");
    let is_erased = |status: &ApiKeyStatus| status.reveal.as_ref().is_some_and(|r| r.state == RevealState::Erased);
    if is_erased(new) && !old.is_some_and(is_erased) {
        note(true, "ValueErased", format!("the sealed value of {id} was erased: nobody revealed it in time"));
    }
    let state_before = old.and_then(|s| s.state);
    if state_before != new.state {
        match (state_before, new.state) {
            (Some(KeyState::Active | KeyState::Expired | KeyState::Lost), Some(KeyState::Inactive)) if !unused => {
                note(false, "Deactivated", format!("{id} is refused until active again"));
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

/// The reasons of warning Events: a fixed set, since reasons are what people and alerts filter by.
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
