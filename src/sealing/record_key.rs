//! The key that authenticates records.

use rand::{TryRng, rngs::SysRng};
use ring::hmac;
use secrecy::{ExposeSecret, SecretString};

use super::SealError;
use crate::domain::hex;

/// The prefix of every authenticated text, so that a code is valid for records only.
const PURPOSE: &[u8] = b"keywright.dev/record/v1\0";

/// A key of 32 random bytes for HMAC-SHA-256.
pub(super) struct RecordKey {
    text: SecretString,
    key: hmac::Key,
}

impl RecordKey {
    /// Generates a key.
    pub(super) fn generate() -> Result<Self, SealError> {
        let mut bytes = [0_u8; 32];
        SysRng.try_fill_bytes(&mut bytes).map_err(|_| SealError::Random)?;
        let key = Self::of(&bytes);
        bytes.fill(0);
        Ok(key)
    }

    fn of(bytes: &[u8; 32]) -> Self {
        Self { text: hex::encode(bytes).into(), key: hmac::Key::new(hmac::HMAC_SHA256, bytes) }
    }

    /// Parses 64 hex digits.
    pub(super) fn parse(text: &str) -> Result<Self, SealError> {
        let mut bytes = hex::decode(text).ok_or(SealError::RecordKeys)?;
        let key = Self::of(&bytes);
        bytes.fill(0);
        Ok(key)
    }

    /// The key as 64 hex digits.
    pub(super) fn text(&self) -> &str {
        self.text.expose_secret()
    }

    /// Returns the message authentication code of the text of a record: 64 hex digits.
    pub(super) fn sign(&self, record: &str) -> String {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(PURPOSE);
        context.update(record.as_bytes());
        hex::encode(context.sign().as_ref())
    }

    /// Whether a code is that of the text of a record, compared in constant time.
    pub(super) fn verifies(&self, record: &str, mac: &str) -> bool {
        hex::decode(mac)
            .is_some_and(|mac| hmac::verify(&self.key, &[PURPOSE, record.as_bytes()].concat(), &mac).is_ok())
    }
}
