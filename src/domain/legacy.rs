//! Legacy keys. The operator reads their value from an existing Secret and never writes that Secret
//! (docs/specification.md, "Legacy keys").

use jiff::Timestamp;

use super::{
    key::{Digest, is_well_formed},
    lifecycle::{Observed, OwnedSecret, record_of_status},
    record::{Entry, Record, Subject},
};
use crate::api::{ApiKey, SecretRef};

/// The minimum length of a value, in bytes. A shorter value can be guessed from its digest.
pub const MIN_VALUE_LENGTH: usize = 20;

/// The content of the Secret of a legacy key, without the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegacyContent {
    /// The Secret does not exist, or has no such key.
    Missing,
    /// The value has fewer than [`MIN_VALUE_LENGTH`] bytes.
    TooShort,
    /// A value that Keywright minted. It belongs to the ApiKey for which it was minted.
    Minted,
    /// Any other value.
    Value(Digest),
}

impl LegacyContent {
    /// Classifies the data of the key. One line end at its end is not part of the value, since files often end with
    /// one.
    #[must_use]
    pub fn of(bytes: Option<&[u8]>) -> Self {
        let Some(bytes) = bytes else { return Self::Missing };
        let value = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let value = value.strip_suffix(b"\r").unwrap_or(value);
        match std::str::from_utf8(value) {
            _ if value.len() < MIN_VALUE_LENGTH => Self::TooShort,
            Ok(text) if is_well_formed(text) => Self::Minted,
            _ => Self::Value(Digest::of(value)),
        }
    }
}

/// The reason why a key can't be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Whether the import can succeed later without a change of the ApiKey or of an existing value.
    pub passing: bool,
    /// The reason, in CamelCase.
    pub reason: &'static str,
    /// The problem and the fix, without any value.
    pub message: String,
}

/// Compares the content of the Secret with the status. The first imported value stays the value of the key: a later
/// value in the Secret is not imported. `allowed` is false if another check forbids the import.
///
/// # Errors
/// The reason why the key can't be imported.
pub fn import(
    key: &ApiKey,
    secret_ref: &SecretRef,
    content: LegacyContent,
    allowed: bool,
    now: Timestamp,
) -> Result<Observed, Obstacle> {
    let known = key.status.as_ref().and_then(record_of_status);
    match (known, content) {
        (Some(_), LegacyContent::Missing) => Ok(Observed::Missing),
        (Some(record), content) => {
            let intact = matches!(content, LegacyContent::Value(digest) if digest.to_string() == record.current.sha256);
            Ok(Observed::Ours(owned_secret(record, intact)))
        }
        (None, LegacyContent::Value(digest)) if allowed => {
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
            Ok(Observed::Ours(owned_secret(record, true)))
        }
        (None, LegacyContent::Value(_)) => Ok(Observed::NotRead),
        (None, LegacyContent::Missing) => Err(Obstacle {
            passing: true,
            reason: "LegacySecretMissing",
            message: format!(
                "Secret {} has no key {}, or does not exist: put the value of the legacy key there",
                secret_ref.name, secret_ref.key
            ),
        }),
        (None, LegacyContent::Minted) => Err(Obstacle {
            passing: false,
            reason: "LegacyValueMinted",
            message: format!(
                "key {} of Secret {} holds a value that Keywright minted, which belongs to another ApiKey: put the \
                 value of the legacy key there, or use that ApiKey",
                secret_ref.key, secret_ref.name
            ),
        }),
        (None, LegacyContent::TooShort) => Err(Obstacle {
            passing: false,
            reason: "LegacyValueTooShort",
            message: format!(
                "key {} of Secret {} has fewer than {MIN_VALUE_LENGTH} bytes, so it can be guessed from its digest: put the \
                 whole value there, or replace the legacy key by a custom one",
                secret_ref.key, secret_ref.name
            ),
        }),
    }
}

/// The operator never writes the Secret, so only the value matters.
fn owned_secret(record: Record, intact: bool) -> OwnedSecret {
    let written = Some(record.clone());
    OwnedSecret { version: String::new(), written, mac: None, record, intact, owned: true, in_order: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{ApiKeySpec, ApiKeyStatus, KeyState, KeyType, LegacyKind},
        domain::{inputs::Inputs, status::build, validate::check},
        test_support::{key_spec as spec, legacy_catalog},
    };

    const VALUE: &[u8] = b"3c9d2b8e-7a41-4f0e-9d3c-5b7f6a1e2d4c";

    fn status(key: &ApiKey, content: LegacyContent, now: Timestamp) -> ApiKeyStatus {
        let secret_ref = SecretRef { name: "old".to_owned(), key: "value".to_owned() };
        let validation = check(&key.spec, &legacy_catalog());
        let found = import(key, &secret_ref, content, true, now);
        let secret = found.clone().unwrap_or(Observed::NotRead);
        let import = found.as_ref().err();
        build(&Inputs { import, ..Inputs::new(key, &validation, &secret, now) })
    }

    #[test]
    fn legacy_content_ignores_one_line_end_at_the_end_and_rejects_short_values() {
        let whole = LegacyContent::of(Some(VALUE));
        assert_eq!(whole, LegacyContent::Value(Digest::of(VALUE)));
        assert_eq!(LegacyContent::of(Some(&[VALUE, b"\n"].concat())), whole);
        assert_eq!(LegacyContent::of(Some(&[VALUE, b"\r\n"].concat())), whole);
        assert_ne!(LegacyContent::of(Some(&[VALUE, b" "].concat())), whole);
        assert_eq!(LegacyContent::of(Some(&[b'a'; MIN_VALUE_LENGTH - 1])), LegacyContent::TooShort);
        assert_eq!(LegacyContent::of(Some(b"nineteen characters\n")), LegacyContent::TooShort);
        assert!(matches!(LegacyContent::of(Some(&[b'a'; MIN_VALUE_LENGTH])), LegacyContent::Value(_)));
        assert_eq!(LegacyContent::of(None), LegacyContent::Missing);
    }

    #[test]
    fn a_legacy_key_waits_for_its_secret_and_keeps_the_first_imported_value() {
        let legacy = ApiKeySpec { legacy: Some(LegacyKind::LogsQuery), ..spec(KeyType::Personal, &[], &[]) };
        let mut key = ApiKey::new("k", legacy);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let later = Timestamp::from_second(1_800_000_060).unwrap();

        for (content, state, reason) in [
            (LegacyContent::Missing, KeyState::Pending, "LegacySecretMissing"),
            (LegacyContent::TooShort, KeyState::Rejected, "LegacyValueTooShort"),
        ] {
            let waiting = status(&key, content, now);
            assert_eq!((waiting.state, waiting.conditions[0].reason.as_str()), (Some(state), reason));
            assert!(waiting.tokens.is_empty() && waiting.permissions.is_empty());
            key.status = Some(waiting);
        }

        let imported = status(&key, LegacyContent::of(Some(VALUE)), now);
        assert_eq!(imported.state, Some(KeyState::Active));
        assert_eq!(imported.permissions, ["alerts:ReadConfig"]);
        assert_eq!(imported.tokens[0].sha256, Digest::of(VALUE).to_string());
        key.status = Some(imported.clone());
        assert_eq!(status(&key, LegacyContent::of(Some(VALUE)), later), imported, "no change");

        for (content, reason) in [
            (LegacyContent::of(Some(b"another value that is long")), "SecretValueChanged"),
            (LegacyContent::TooShort, "SecretValueChanged"),
            (LegacyContent::Missing, "SecretLost"),
        ] {
            let lost = status(&key, content, later);
            let ready = &lost.conditions[0];
            assert_eq!((lost.state, ready.reason.as_str()), (Some(KeyState::Lost), reason));
            assert!(ready.message.contains("a legacy key can't be minted"), "{}", ready.message);
            assert_eq!(lost.tokens, imported.tokens, "the imported value stays the value of the key");
        }
    }
}
