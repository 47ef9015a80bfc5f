//! The operator's own keys, which encrypt values at rest and authenticate the records in Secrets, and the encryption of
//! a revealed value to its recipient.
//!
//! [`SealingKeys`] holds age identities, which seal values, and record keys, which authenticate records; the newest of
//! each is first. A sealed value names its ApiKey, so that it can't be used for another one. The recipients of the
//! identities are not published, so that only the operator can seal to them. [`SealingKeyStore`] keeps the keys in a
//! Secret.
//!
//! Restored sealed values and records are usable only with a backup of that Secret:
//! `kubectl -n keywright-system get secret keywright-sealing-keys -o yaml`.

mod key_store;
mod record_key;

use std::{fmt, io::Read};

use age::{
    secrecy::ExposeSecret,
    ssh,
    x25519::{Identity, Recipient},
};
use secrecy::{SecretSlice, SecretString};

pub use self::key_store::{IDENTITIES, RECORD_KEYS, ROTATE_REQUESTED_AT, ROTATED_AT, SealingKeyStore};
use self::record_key::RecordKey;
use crate::domain::record::{Record, Subject};

/// An error of sealing. Messages quote neither values nor keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The identities are not an age identity file.
    #[error("the sealing keys can't be read: restore them from a backup")]
    Identities,
    /// The record keys are not lines of 64 hex digits.
    #[error("the record keys can't be read: restore them from a backup")]
    RecordKeys,
    /// The random source of the system failed.
    #[error("the system's random source failed")]
    Random,
    /// The recipient is neither an age recipient nor an SSH public key.
    #[error("the recipient is neither an age recipient (age1...) nor an SSH public key (ssh-ed25519 or ssh-rsa)")]
    Recipient,
    /// Encryption failed.
    #[error("the value could not be encrypted")]
    Encrypt,
    /// No identity opens the value.
    #[error("no sealing key opens the value: restore the sealing keys from a backup")]
    Open,
}

/// The operator's keys, the newest first. Debug output omits the keys; identities are zeroed when dropped.
pub struct SealingKeys {
    identities: Vec<Identity>,
    record_keys: Vec<RecordKey>,
}

impl fmt::Debug for SealingKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealingKeys of {} identities and {} record keys", self.identities.len(), self.record_keys.len())
    }
}

/// A value that was sealed, with its generation.
pub struct Opened {
    /// The value.
    pub value: SecretSlice<u8>,
    /// The number of the value of its ApiKey, counted from 1.
    pub generation: i64,
}

/// Returns the start of the first line inside a sealed value, which names the ApiKey; its generation follows. The
/// second line is the value.
fn heading(subject: &Subject) -> String {
    // A restore without a backup of the uid and the creator changes both.
    let stable = Subject { uid: String::new(), creator: None, ..subject.clone() };
    // Compact JSON has no line ends.
    format!("keywright.dev/sealed/v1 {} ", serde_json::to_string(&stable).unwrap_or_default())
}

impl SealingKeys {
    /// Generates one identity and one record key.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn generate() -> Result<Self, SealError> {
        Ok(Self { identities: vec![Identity::generate()], record_keys: vec![RecordKey::generate()?] })
    }

    /// Parses an age identity file (one identity per line, comments begin with `#`), and record keys in the same
    /// format. Earlier versions wrote no record keys.
    ///
    /// # Errors
    /// If a line is not an identity or record key, or there is no identity.
    pub fn parse(identities: &str, record_keys: &str) -> Result<Self, SealError> {
        let identities = lines(identities).map(|line| line.parse().map_err(|_| SealError::Identities));
        let identities = identities.collect::<Result<Vec<_>, _>>()?;
        if identities.is_empty() {
            return Err(SealError::Identities);
        }
        let record_keys = lines(record_keys).map(RecordKey::parse).collect::<Result<_, _>>()?;
        Ok(Self { identities, record_keys })
    }

    /// Whether there is a record key.
    #[must_use]
    pub fn has_record_key(&self) -> bool {
        !self.record_keys.is_empty()
    }

    /// Adds a record key before the others, which still authenticate their records.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn add_record_key(&mut self) -> Result<(), SealError> {
        self.record_keys.insert(0, RecordKey::generate()?);
        Ok(())
    }

    /// Adds an identity and a record key before the others, which still open their values and authenticate their
    /// records.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn rotate(&mut self) -> Result<(), SealError> {
        self.identities.insert(0, Identity::generate());
        self.add_record_key()
    }

    /// The identity file, for the Secret of the sealing keys.
    #[must_use]
    pub fn identities_text(&self) -> SecretString {
        let mut text = String::new();
        for identity in &self.identities {
            text.push_str(identity.to_string().expose_secret());
            text.push('\n');
        }
        text.into()
    }

    /// The record keys, for the Secret of the sealing keys: 64 hex digits per line.
    #[must_use]
    pub fn record_keys_text(&self) -> SecretString {
        self.record_keys.iter().fold(String::new(), |text, key| text + key.text() + "\n").into()
    }

    /// Encrypts a value to the newest identity, together with its ApiKey and generation.
    ///
    /// # Errors
    /// If encryption fails.
    pub fn seal(&self, record: &Record, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let newest = self.identities.first().ok_or(SealError::Identities)?;
        let heading = format!("{}{}\n", heading(&record.subject), record.current.generation);
        // Allocated at full size: growing the buffer would leave copies of the value in memory.
        let mut text = Vec::with_capacity(heading.len() + value.len());
        text.extend(heading.as_bytes());
        text.extend(value);
        let sealed = age::encrypt(&newest.to_public(), &text).map_err(|_| SealError::Encrypt);
        text.fill(0);
        sealed
    }

    /// Opens a value that was sealed for an ApiKey by any of these identities.
    ///
    /// # Errors
    /// If no identity opens the value, or it was sealed for another ApiKey.
    pub fn open(&self, subject: &Subject, ciphertext: &[u8]) -> Result<Opened, SealError> {
        let decryptor = age::Decryptor::new_buffered(ciphertext).map_err(|_| SealError::Open)?;
        let identities = self.identities.iter().map(|identity| identity as &dyn age::Identity);
        let mut reader = decryptor.decrypt(identities).map_err(|_| SealError::Open)?;
        // Allocated at full size: growing the buffer would leave copies of the value in memory.
        let mut text = Vec::with_capacity(ciphertext.len());
        let opened = match reader.read_to_end(&mut text) {
            Ok(_) => unwrap(subject, &text),
            Err(_) => None,
        };
        text.fill(0);
        opened.ok_or(SealError::Open)
    }

    /// Returns the message authentication code of the text of a record, by the newest record key: 64 hex digits.
    ///
    /// # Errors
    /// If there is no record key.
    pub fn authenticate(&self, record: &str) -> Result<String, SealError> {
        self.record_keys.first().map(|key| key.sign(record)).ok_or(SealError::RecordKeys)
    }

    /// Whether one of the record keys made this message authentication code of the text of a record.
    #[must_use]
    pub fn is_authentic(&self, record: &str, mac: &str) -> bool {
        self.record_keys.iter().any(|key| key.verifies(record, mac))
    }
}

/// Returns the lines of a key file that hold a key.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Returns the value in the text of a sealed value, if it was sealed for this ApiKey.
fn unwrap(subject: &Subject, text: &[u8]) -> Option<Opened> {
    let rest = text.strip_prefix(heading(subject).as_bytes())?;
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let generation = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
    Some(Opened { value: rest[end + 1..].to_vec().into(), generation })
}

/// Encrypts a value to an age recipient (`age1...`) or an SSH public key. The result is ASCII armor.
///
/// # Errors
/// If the recipient is invalid, or encryption fails.
pub fn encrypt_to(recipient: &str, value: &[u8]) -> Result<String, SealError> {
    let recipient = recipient.trim();
    if recipient.starts_with("age1") {
        let recipient: Recipient = recipient.parse().map_err(|_| SealError::Recipient)?;
        return age::encrypt_and_armor(&recipient, value).map_err(|_| SealError::Encrypt);
    }
    let recipient: ssh::Recipient = recipient.parse().map_err(|_| SealError::Recipient)?;
    age::encrypt_and_armor(&recipient, value).map_err(|_| SealError::Encrypt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::KeyType, domain::record::Entry};

    const VALUE: &[u8] = b"kwt_not-a-key";

    // A key pair for this test only.
    const SSH_PUBLIC: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPzut6S2Nxq53UHQcdrX6Pvc1gMQBNNC96/GCcsugRJT test";
    const SSH_PRIVATE: &str = "\
-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
QyNTUxOQAAACD87rektjcaud1B0HHa1+j73NYDEATTQvevxgnLLoESUwAAAIjGvhIuxr4S
LgAAAAtzc2gtZWQyNTUxOQAAACD87rektjcaud1B0HHa1+j73NYDEATTQvevxgnLLoESUw
AAAEAFeNFMfPHvxvtPzHecKvIWTlgzDd9j359RtPl68rnREfzut6S2Nxq53UHQcdrX6Pvc
1gMQBNNC96/GCcsugRJTAAAABHRlc3QB
-----END OPENSSH PRIVATE KEY-----
";

    fn subject(name: &str) -> Subject {
        Subject {
            namespace: "shop".to_owned(),
            secret: format!("{name}-secret"),
            api_key: name.to_owned(),
            uid: "1".to_owned(),
            key_type: Some(KeyType::Team),
            user: Some("alice\n".to_owned()),
            creator: None,
        }
    }

    fn record(name: &str, generation: i64) -> Record {
        let at = "2026-11-23T09:00:00Z".parse().unwrap();
        Record {
            subject: subject(name),
            created_at: at,
            last_rotated_at: None,
            requested_at: None,
            current: Entry { sha256: String::new(), minted_at: at, generation },
            previous: None,
            sealed: None,
            labels: vec![],
            annotations: vec![],
        }
    }

    /// Writes the keys as their Secret holds them, and parses them again.
    fn reread(ring: &SealingKeys) -> SealingKeys {
        SealingKeys::parse(ring.identities_text().expose_secret(), ring.record_keys_text().expose_secret()).unwrap()
    }

    #[test]
    fn a_sealed_value_opens_with_its_own_and_later_keys_only() {
        let first = SealingKeys::generate().unwrap();
        let old = first.seal(&record("k", 3), VALUE).unwrap();
        assert!(!old.windows(VALUE.len()).any(|part| part == VALUE));
        let mut second = reread(&first);
        second.rotate().unwrap();
        let second = reread(&second);
        assert_eq!(format!("{second:?}"), "SealingKeys of 2 identities and 2 record keys");
        let new = second.seal(&record("k", 4), VALUE).unwrap();
        for (ring, sealed, generation) in
            [(&first, &old, Some(3)), (&second, &old, Some(3)), (&second, &new, Some(4)), (&first, &new, None)]
        {
            let opened = ring.open(&subject("k"), sealed).ok();
            assert!(opened.as_ref().is_none_or(|opened| opened.value.expose_secret() == VALUE));
            assert_eq!(opened.map(|opened| opened.generation), generation);
        }
        let fails_to_open = |ring: &SealingKeys, sealed: &[u8]| {
            matches!(ring.open(&subject("k"), sealed).map(|_| ()), Err(SealError::Open))
        };
        assert!(fails_to_open(&SealingKeys::generate().unwrap(), &old));
        let mut broken = old.clone();
        *broken.last_mut().unwrap() ^= 1;
        assert!(fails_to_open(&first, &broken));
    }

    #[test]
    fn a_value_sealed_for_one_api_key_does_not_open_for_another() {
        let ring = SealingKeys::generate().unwrap();
        let sealed = ring.seal(&record("k", 1), VALUE).unwrap();
        let own = subject("k");
        assert!(ring.open(&Subject { uid: "restored".to_owned(), ..own.clone() }, &sealed).is_ok());
        for other in [
            subject("other"),
            Subject { namespace: "bank".to_owned(), ..own.clone() },
            Subject { secret: "k-secret2".to_owned(), ..own.clone() },
            Subject { key_type: Some(KeyType::Personal), ..own.clone() },
            Subject { user: Some("bob".to_owned()), ..own.clone() },
            Subject { key_type: None, ..own },
        ] {
            assert!(ring.open(&other, &sealed).is_err(), "{other:?}");
        }
    }

    #[test]
    fn a_record_is_authentic_only_with_its_own_code() {
        let first = SealingKeys::generate().unwrap();
        let mac = first.authenticate("{}").unwrap();
        let mut second = reread(&first);
        second.rotate().unwrap();
        assert!(first.is_authentic("{}", &mac) && reread(&second).is_authentic("{}", &mac), "also with later keys");
        assert_ne!(second.authenticate("{}").unwrap(), mac);
        for (text, mac) in [("{ }", mac.as_str()), ("{}", ""), ("{}", "00"), ("{}", &mac[2..]), ("{}", "xyz")] {
            assert!(!first.is_authentic(text, mac), "{text} {mac}");
        }
        assert!(!SealingKeys::generate().unwrap().is_authentic("{}", &mac));
        let before = SealingKeys::parse(first.identities_text().expose_secret(), "").unwrap();
        assert!(!before.has_record_key() && !before.is_authentic("{}", &mac) && before.authenticate("{}").is_err());
    }

    #[test]
    fn invalid_key_files_are_rejected() {
        let ring = SealingKeys::generate().unwrap();
        let (identities, keys) = (ring.identities_text(), ring.record_keys_text());
        let (identities, keys) = (identities.expose_secret(), keys.expose_secret());
        assert!(
            SealingKeys::parse(&format!("# made by age-keygen\n\n{identities}"), &format!("# none\n{keys}")).is_ok()
        );
        for broken in ["", "# nothing", "nonsense", &format!("{identities}nonsense")] {
            assert!(SealingKeys::parse(broken, keys).is_err());
        }
        for broken in ["nonsense", &format!("{keys}00"), &keys.replace('\n', "00")] {
            assert!(SealingKeys::parse(identities, broken).is_err());
        }
    }

    #[test]
    fn an_encrypted_value_opens_for_its_recipient_only() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let armored = encrypt_to(&alice.to_public().to_string(), VALUE).unwrap();
        assert!(armored.starts_with("-----BEGIN AGE ENCRYPTED FILE-----"));
        assert_eq!(age::decrypt(&alice, armored.as_bytes()).unwrap(), VALUE);
        assert!(age::decrypt(&bob, armored.as_bytes()).is_err());
    }

    #[test]
    fn a_value_can_be_encrypted_to_an_ssh_key() {
        let identity = ssh::Identity::from_buffer(SSH_PRIVATE.as_bytes(), None).unwrap();
        let armored = encrypt_to(SSH_PUBLIC, VALUE).unwrap();
        assert_eq!(age::decrypt(&identity, armored.as_bytes()).unwrap(), VALUE);
        assert!(age::decrypt(&Identity::generate(), armored.as_bytes()).is_err());
    }

    #[test]
    fn invalid_recipients_are_rejected() {
        for nonsense in ["", "age1", "age1nonsense", "ssh-ed25519 AAAA", "ssh-dss AAAA", "mallory"] {
            assert_eq!(encrypt_to(nonsense, VALUE).unwrap_err(), SealError::Recipient, "{nonsense}");
        }
    }
}
