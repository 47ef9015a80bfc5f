//! Legacy keys: their value comes from a Secret of somebody else, which is read and never written (seed, "Migrate legacy
//! keys to custom API keys").

use jiff::Timestamp;

use super::{
    key::{Digest, is_well_formed},
    lifecycle::{Held, Observed, record_of_status},
    record::{Entry, Record, Subject},
};
use crate::api::{ApiKey, SecretRef};

/// The fewest bytes of a value. A digest does not protect what can be guessed.
pub const SHORTEST: usize = 20;

/// What the Secret of a legacy key holds, without the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is no such Secret, or it has no such key.
    Missing,
    /// The value can be guessed.
    TooShort,
    /// A value that Keywright minted for some key. It is that key's alone.
    Minted,
    /// A value.
    Value(Digest),
}

impl Content {
    /// Reads what is under the key. One newline at the end belongs to the file that it came from, not to the value.
    #[must_use]
    pub fn of(bytes: Option<&[u8]>) -> Self {
        let Some(bytes) = bytes else { return Self::Missing };
        let value = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let value = value.strip_suffix(b"\r").unwrap_or(value);
        match std::str::from_utf8(value) {
            _ if value.len() < SHORTEST => Self::TooShort,
            Ok(text) if is_well_formed(text) => Self::Minted,
            _ => Self::Value(Digest::of(value)),
        }
    }
}

/// What keeps a key from being imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Whether it can go without a change of the ApiKey or of the value.
    pub passing: bool,
    /// The reason, in CamelCase.
    pub reason: &'static str,
    /// What is wrong and how to mend it, without any value.
    pub message: String,
}

/// What a look at the Secret comes to. What was imported once stays: another value in the Secret is not this key's.
/// `may` says whether nothing else forbids to import.
///
/// # Errors
/// What keeps the key from being imported.
pub fn import(
    key: &ApiKey,
    place: &SecretRef,
    content: Content,
    may: bool,
    now: Timestamp,
) -> Result<Observed, Obstacle> {
    let known = key.status.as_ref().and_then(record_of_status);
    match (known, content) {
        (Some(_), Content::Missing) => Ok(Observed::Missing),
        (Some(record), content) => {
            let intact = matches!(content, Content::Value(digest) if digest.to_string() == record.current.sha256);
            Ok(Observed::Ours(held(record, intact)))
        }
        (None, Content::Value(digest)) if may => {
            let current = Entry { sha256: digest.to_string(), minted_at: now, generation: 1 };
            let record = Record {
                subject: Subject::of(key),
                created_at: now,
                last_rotated_at: None,
                requested_at: None,
                current,
                previous: None,
                sealed: None,
                labels: vec![],
                annotations: vec![],
            };
            Ok(Observed::Ours(held(record, true)))
        }
        (None, Content::Value(_)) => Ok(Observed::NotRead),
        (None, Content::Missing) => Err(Obstacle {
            passing: true,
            reason: "LegacySecretMissing",
            message: format!(
                "Secret {} has no key {}, or does not exist: put the value of the legacy key there",
                place.name, place.key
            ),
        }),
        (None, Content::Minted) => Err(Obstacle {
            passing: false,
            reason: "LegacyValueMinted",
            message: format!(
                "key {} of Secret {} holds a value that Keywright minted, which belongs to the ApiKey that it was minted \
                 for: put the value of the legacy key there, or use that ApiKey",
                place.key, place.name
            ),
        }),
        (None, Content::TooShort) => Err(Obstacle {
            passing: false,
            reason: "LegacyValueTooShort",
            message: format!(
                "key {} of Secret {} holds fewer than {SHORTEST} characters, which can be guessed from a digest: put the \
                 whole value there, or replace the legacy key by a custom one",
                place.key, place.name
            ),
        }),
    }
}

/// Nothing is ever written to the Secret, so nothing of it matters but the value.
fn held(record: Record, intact: bool) -> Held {
    let written = Some(record.clone());
    Held { version: String::new(), written, mac: None, record, intact, owned: true, in_order: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{ApiKeySpec, ApiKeyStatus, KeyState, KeyType, LegacyKind},
        domain::{
            status::{Facts, build},
            validate::{
                check,
                tests::{legacy_catalog, spec},
            },
        },
    };

    const VALUE: &[u8] = b"3c9d2b8e-7a41-4f0e-9d3c-5b7f6a1e2d4c";

    fn status(key: &ApiKey, content: Content, now: Timestamp) -> ApiKeyStatus {
        let place = SecretRef { name: "old".to_owned(), key: "value".to_owned() };
        let verdict = check(&key.spec, &legacy_catalog());
        let found = import(key, &place, content, true, now);
        let secret = found.clone().unwrap_or(Observed::NotRead);
        build(&Facts {
            key,
            verdict: &verdict,
            rival: None,
            secret: &secret,
            settings: None,
            policy: None,
            import: found.as_ref().err(),
            failure: None,
            now,
        })
    }

    #[test]
    fn a_newline_at_the_end_is_not_part_of_the_value_and_a_short_value_is_none() {
        let whole = Content::of(Some(VALUE));
        assert_eq!(whole, Content::Value(Digest::of(VALUE)));
        assert_eq!(Content::of(Some(&[VALUE, b"\n"].concat())), whole);
        assert_eq!(Content::of(Some(&[VALUE, b"\r\n"].concat())), whole);
        assert_ne!(Content::of(Some(&[VALUE, b" "].concat())), whole);
        assert_eq!(Content::of(Some(&[b'a'; SHORTEST - 1])), Content::TooShort);
        assert_eq!(Content::of(Some(b"nineteen characters\n")), Content::TooShort);
        assert!(matches!(Content::of(Some(&[b'a'; SHORTEST])), Content::Value(_)));
        assert_eq!(Content::of(None), Content::Missing);
    }

    #[test]
    fn a_legacy_key_waits_for_its_secret_and_keeps_the_value_that_it_found_first() {
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        let mut key = ApiKey::new("k", legacy);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let later = Timestamp::from_second(1_800_000_060).unwrap();

        for (content, state, reason) in [
            (Content::Missing, KeyState::Pending, "LegacySecretMissing"),
            (Content::TooShort, KeyState::Rejected, "LegacyValueTooShort"),
        ] {
            let waiting = status(&key, content, now);
            assert_eq!((waiting.state, waiting.conditions[0].reason.as_str()), (Some(state), reason));
            assert!(waiting.tokens.is_empty() && waiting.permissions.is_empty());
            key.status = Some(waiting);
        }

        let imported = status(&key, Content::of(Some(VALUE)), now);
        assert_eq!(imported.state, Some(KeyState::Active));
        assert_eq!(imported.permissions, ["alerts:ReadConfig"]);
        assert_eq!(imported.tokens[0].sha256, Digest::of(VALUE).to_string());
        key.status = Some(imported.clone());
        assert_eq!(status(&key, Content::of(Some(VALUE)), later), imported, "the same again");

        for (content, reason) in [
            (Content::of(Some(b"another value that is long")), "SecretValueChanged"),
            (Content::TooShort, "SecretValueChanged"),
            (Content::Missing, "SecretLost"),
        ] {
            let lost = status(&key, content, later);
            let ready = &lost.conditions[0];
            assert_eq!((lost.state, ready.reason.as_str()), (Some(KeyState::Lost), reason));
            assert!(ready.message.contains("a legacy key can't be minted"), "{}", ready.message);
            assert_eq!(lost.tokens, imported.tokens, "the value that was imported is the key's");
        }
    }
}
