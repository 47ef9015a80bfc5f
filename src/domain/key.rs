//! The value of a key: its format, its generation and its digest.
//!
//! The format is `kwp_`, `kws_` or `kwt_` (Personal, SendYourData, Team), 43 base62 characters from a cryptographic
//! random source (256 bits), and the CRC-32 of these as 6 base62 characters. A double click selects the whole key, and
//! secret scanners can verify the checksum offline.

use std::fmt;

use rand::TryCryptoRng;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest as _, Sha256};

use super::hex;
use crate::api::KeyType;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const RANDOM_LEN: usize = 43;
const CHECKSUM_LEN: usize = 6;

/// The length of every key, prefix and checksum included.
pub const LEN: usize = 4 + RANDOM_LEN + CHECKSUM_LEN;

/// The prefix of keys of a type.
#[must_use]
pub const fn prefix(key_type: KeyType) -> &'static str {
    match key_type {
        KeyType::Personal => "kwp_",
        KeyType::SendYourData => "kws_",
        KeyType::Team => "kwt_",
    }
}

/// The value of a key. It can't be printed, compared or serialized, and is zeroed on drop.
#[derive(Debug)]
pub struct Key(SecretString);

impl Key {
    /// Generates a new value from a cryptographic random source.
    ///
    /// # Errors
    /// An error of the random source.
    pub fn mint<R: TryCryptoRng>(key_type: KeyType, rng: &mut R) -> Result<Self, R::Error> {
        let mut value = String::with_capacity(LEN);
        value.push_str(prefix(key_type));
        let mut bytes = [0_u8; RANDOM_LEN];
        while value.len() < 4 + RANDOM_LEN {
            rng.try_fill_bytes(&mut bytes)?;
            // 248 is the largest multiple of 62 in a byte. Bytes from 248 on are discarded, so that each character is
            // equally likely.
            let fresh = bytes.iter().filter(|b| **b < 248).map(|b| ALPHABET[usize::from(b % 62)] as char);
            value.extend(fresh.take(4 + RANDOM_LEN - value.len()));
        }
        bytes.fill(0);
        let checksum = checksum(value.as_bytes());
        value.extend(checksum.iter().map(|c| *c as char));
        Ok(Self(value.into()))
    }

    /// Reads a value back, for example from a Secret. `None` if it is not a key of this type.
    #[must_use]
    pub fn parse(key_type: KeyType, bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        (is_well_formed(text) && text.starts_with(prefix(key_type))).then(|| Self(text.to_owned().into()))
    }

    /// The digest, which may be stored, logged and compared in place of the value.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(self.0.expose_secret().as_bytes())
    }

    /// The value in plain text. Only for storing it in the Secret of the key or encrypting it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// Whether a value starts with the prefix of a key.
#[must_use]
pub fn has_prefix(value: &[u8]) -> bool {
    [KeyType::Personal, KeyType::SendYourData, KeyType::Team].iter().any(|t| value.starts_with(prefix(*t).as_bytes()))
}

/// Whether a text has the format and the checksum of a key. Computes no digest and does not allocate.
#[must_use]
pub fn is_well_formed(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == LEN
        && bytes.starts_with(b"kw")
        && matches!(bytes[2], b'p' | b's' | b't')
        && bytes[3] == b'_'
        && bytes[4..].iter().all(u8::is_ascii_alphanumeric)
        && checksum(&bytes[..LEN - CHECKSUM_LEN]) == bytes[LEN - CHECKSUM_LEN..]
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut rest = crc32fast::hash(bytes) as usize;
    let mut out = [b'0'; CHECKSUM_LEN];
    for digit in out.iter_mut().rev() {
        *digit = ALPHABET[rest % 62];
        rest /= 62;
    }
    out
}

/// The SHA-256 digest of a whole key. A fast hash is sufficient, since 256 random bits can't be guessed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of a value.
    #[must_use]
    pub fn of(value: &[u8]) -> Self {
        Self(Sha256::digest(value).into())
    }

    /// Reads a digest of 64 lower-case hex digits. `None` for any other text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return None;
        }
        hex::decode(text).map(Self)
    }

    /// The bytes of the digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The id of the key for logs, headers and users: `key_` and the first 16 hex digits.
    #[must_use]
    pub fn id(&self) -> String {
        let mut id = String::with_capacity(20);
        id.push_str("key_");
        for byte in &self.0[..8] {
            id.extend([byte >> 4, byte & 15].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])));
        }
        id
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SysRng;

    use super::*;

    #[test]
    fn a_minted_key_has_the_documented_format() {
        for (key_type, prefix) in
            [(KeyType::Personal, "kwp_"), (KeyType::SendYourData, "kws_"), (KeyType::Team, "kwt_")]
        {
            let key = Key::mint(key_type, &mut SysRng).unwrap();
            assert_eq!(key.expose().len(), 53);
            assert!(key.expose().starts_with(prefix));
            assert!(is_well_formed(key.expose()));
            assert!(Key::parse(key_type, key.expose().as_bytes()).is_some());
        }
    }

    /// A test vector computed from the definition of the format, so that a change of the format fails this test.
    #[test]
    fn checksum_is_crc32_in_base62() {
        // CRC-32 of "123456789" is 0xCBF43926 = 3421780262, the standard check value.
        let value = [3_u64, 45, 35, 27, 22, 14].iter().fold(0, |sum, digit| sum * 62 + digit);
        assert_eq!(value, 3_421_780_262);
        assert_eq!(&checksum(b"123456789"), b"3jZRME");
    }

    #[test]
    fn a_key_with_one_changed_character_is_not_well_formed() {
        let key = Key::mint(KeyType::Team, &mut SysRng).unwrap();
        for at in 0..LEN {
            let mut bytes = key.expose().as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'x' { b'y' } else { b'x' };
            assert!(!is_well_formed(std::str::from_utf8(&bytes).unwrap()), "position {at}");
        }
        for text in ["", "kwt_", "kwt_é", &key.expose()[1..], &format!("{}0", key.expose())] {
            assert!(!is_well_formed(text));
        }
    }

    #[test]
    fn parse_rejects_a_key_of_another_type() {
        let key = Key::mint(KeyType::Team, &mut SysRng).unwrap();
        assert!(Key::parse(KeyType::Personal, key.expose().as_bytes()).is_none());
    }

    #[test]
    fn debug_output_does_not_contain_the_value() {
        let key = Key::mint(KeyType::Team, &mut SysRng).unwrap();
        assert!(!format!("{key:?}").contains(&key.expose()[4..]));
    }

    #[test]
    fn digest_is_sha256_and_the_id_its_first_16_digits() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.id(), "key_ba7816bf8f01cfea");
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
    }

    /// Discarding bytes from 248 on must not bias the characters.
    #[test]
    fn mint_uses_every_character_of_the_alphabet_evenly() {
        let mut counts = [0_u32; 128];
        for _ in 0..400 {
            let key = Key::mint(KeyType::Team, &mut SysRng).unwrap();
            key.expose()[4..47].bytes().for_each(|b| counts[usize::from(b)] += 1);
        }
        // 17,200 draws over 62 characters: 277 expected; 6 sigma is about 100.
        for c in ALPHABET {
            let n = counts[usize::from(*c)];
            assert!((170..390).contains(&n), "{} occurs {n} times", *c as char);
        }
    }
}
