//! Rejects Secrets with a value that belongs to another ApiKey. A digest belongs to one ApiKey.

use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};

use super::ApiKeyContext;
use crate::{
    api::ApiKey,
    domain::{
        key::Digest,
        lifecycle::Observed,
        record::{Entry, Record},
        status::Note,
    },
    index::digests::Digests,
};

/// Claims the digests of a Secret for its ApiKey. If another ApiKey has one of them, the Secret becomes
/// [`Observed::Foreign`], and both ApiKeys get an Event.
pub(super) fn claim_digests(key: &ApiKey, namespace: &str, observed: Observed, context: &ApiKeyContext) -> Observed {
    let conflict = match &observed {
        Observed::Ours(secret) => find_conflict(key, &secret.record, &context.index.digests, &context.keys),
        _ => None,
    };
    let Some((id, other)) = conflict else { return observed };
    let other = other.and_then(|other| context.keys.get(&other));
    // The name of an ApiKey in another namespace is not disclosed.
    let holder = match &other {
        Some(other) if other.namespace().as_deref() == Some(namespace) => format!("ApiKey {}", other.name_any()),
        _ => "another ApiKey".to_owned(),
    };
    if let Some(other) = other
        && !is_reported(key, DIGEST_IN_USE)
    {
        let message =
            format!("another ApiKey names a Secret with value {id} of this ApiKey; that Secret was not accepted");
        context.events.note(&*other, Note { warning: true, reason: DIGEST_IN_USE, message });
    }
    let why = format!("its value {id} belongs to {holder}: delete the Secret, or put another value there");
    Observed::Foreign { reason: DIGEST_IN_USE, why, passing: false }
}

/// Claims the digests of a record that the status of the ApiKey lacks. Returns the id of the first value that another
/// ApiKey has, and that ApiKey.
pub(super) fn find_conflict(
    key: &ApiKey,
    record: &Record,
    digests: &Digests,
    keys: &Store<ApiKey>,
) -> Option<(String, Option<ObjectRef<ApiKey>>)> {
    let is_new = |entry: &&Entry| {
        let mut known = key.status.iter().flat_map(|status| &status.tokens);
        known.all(|token| token.sha256 != entry.sha256)
    };
    let entries = std::iter::once(&record.current).chain(record.previous.as_ref().map(|previous| &previous.entry));
    entries.filter(is_new).find_map(|entry| {
        let digest = Digest::parse(&entry.sha256)?;
        digests.accept(digest, key, keys).err().map(|other| (entry.id(), other))
    })
}

/// The reason of a condition and of an Event.
pub(super) const DIGEST_IN_USE: &str = "DigestInUse";

fn is_reported(key: &ApiKey, reason: &str) -> bool {
    let conditions = key.status.as_ref().map_or(&[][..], |status| &status.conditions);
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == reason)
}
