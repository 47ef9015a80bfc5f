//! Sealed values: encrypted at rest to the operator, and in an answer to the person who asked.
//!
//! [`Keyring`] is the operator's own: age identities, the newest first. What it seals, only it opens; since its
//! recipients are published nowhere, what it opens was also sealed by it. [`Keeper`] keeps it in a Secret.
//!
//! A backup of that Secret is what makes a backup of sealed values worth anything:
//! `kubectl -n keywright-system get secret keywright-sealing-keys -o yaml`.

mod keeper;

use std::{fmt, io::Read, iter};

use age::{
    secrecy::ExposeSecret,
    ssh,
    x25519::{Identity, Recipient},
};
use secrecy::{SecretSlice, SecretString};

pub use self::keeper::{IDENTITIES, Keeper, ROTATE_REQUESTED_AT, ROTATED_AT};

/// What could not be done; it quotes neither values nor identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The identities are no identity file of age.
    #[error("the sealing keys can't be read: restore them from a backup")]
    Identities,
    /// The recipient is neither of age nor of SSH.
    #[error("the recipient is no age recipient (age1...) and no SSH public key (ssh-ed25519 or ssh-rsa)")]
    Recipient,
    /// Encryption failed.
    #[error("the value could not be encrypted")]
    Encrypt,
    /// No identity opens it.
    #[error("no sealing key opens the value: restore the sealing keys from a backup")]
    Open,
}

/// The operator's identities, the newest first. It can't be printed; its identities leave memory zeroed.
pub struct Keyring(Vec<Identity>);

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring of {}", self.0.len())
    }
}

impl Keyring {
    /// A new keyring of one identity.
    #[must_use]
    pub fn generate() -> Self {
        Self(vec![Identity::generate()])
    }

    /// Reads an identity file of age: an identity a line, comments begin with `#`.
    ///
    /// # Errors
    /// If a line is no identity, or none is.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let identities = lines.map(|line| line.parse().map_err(|_| SealError::Identities));
        let identities = identities.collect::<Result<Vec<_>, _>>()?;
        if identities.is_empty() { Err(SealError::Identities) } else { Ok(Self(identities)) }
    }

    /// This keyring with a new identity before the others, which still open what they sealed.
    #[must_use]
    pub fn rotated(&self) -> Self {
        Self(iter::once(Identity::generate()).chain(self.0.iter().cloned()).collect())
    }

    /// The identity file, for the one Secret that holds it.
    #[must_use]
    pub fn to_text(&self) -> SecretString {
        let mut text = String::new();
        for identity in &self.0 {
            text.push_str(identity.to_string().expose_secret());
            text.push('\n');
        }
        text.into()
    }

    /// Encrypts a value to the newest identity.
    ///
    /// # Errors
    /// If encryption fails.
    pub fn seal(&self, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let newest = self.0.first().ok_or(SealError::Identities)?;
        age::encrypt(&newest.to_public(), value).map_err(|_| SealError::Encrypt)
    }

    /// Opens what this keyring sealed, whichever of its identities did.
    ///
    /// # Errors
    /// If none opens it.
    pub fn open(&self, ciphertext: &[u8]) -> Result<SecretSlice<u8>, SealError> {
        let decryptor = age::Decryptor::new_buffered(ciphertext).map_err(|_| SealError::Open)?;
        let identities = self.0.iter().map(|identity| identity as &dyn age::Identity);
        let mut reader = decryptor.decrypt(identities).map_err(|_| SealError::Open)?;
        // Room from the start: growing would leave copies behind.
        let mut value = Vec::with_capacity(1024);
        if reader.read_to_end(&mut value).is_err() {
            value.fill(0);
            return Err(SealError::Open);
        }
        Ok(value.into())
    }
}

/// Encrypts a value to a person: an age recipient (`age1...`) or an SSH public key. The answer is ASCII armor.
///
/// # Errors
/// If the recipient can't be read, or encryption fails.
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

    const VALUE: &[u8] = b"kwt_not-a-key";

    // A key pair for this test alone.
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

    #[test]
    fn what_is_sealed_opens_with_every_later_keyring_and_with_no_other() {
        let first = Keyring::generate();
        let old = first.seal(VALUE).unwrap();
        assert!(!old.windows(VALUE.len()).any(|part| part == VALUE));
        let second = Keyring::parse(second_text(&first).expose_secret()).unwrap();
        let new = second.seal(VALUE).unwrap();
        for (ring, sealed, opens) in
            [(&first, &old, true), (&second, &old, true), (&second, &new, true), (&first, &new, false)]
        {
            assert_eq!(ring.open(sealed).is_ok_and(|value| value.expose_secret() == VALUE), opens);
        }
        assert_eq!(Keyring::generate().open(&old).unwrap_err(), SealError::Open);
        let mut broken = old.clone();
        *broken.last_mut().unwrap() ^= 1;
        assert_eq!(first.open(&broken).unwrap_err(), SealError::Open);
    }

    fn second_text(first: &Keyring) -> SecretString {
        let second = first.rotated();
        assert_eq!(format!("{second:?}"), "Keyring of 2");
        second.to_text()
    }

    #[test]
    fn an_identity_file_is_read_strictly() {
        let one = Keyring::generate().to_text();
        assert!(Keyring::parse(&format!("# made by age-keygen\n\n{}", one.expose_secret())).is_ok());
        for broken in ["", "# nothing", "nonsense", &format!("{}nonsense", one.expose_secret())] {
            assert!(Keyring::parse(broken).is_err());
        }
    }

    #[test]
    fn an_answer_opens_for_its_recipient_alone() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let armored = encrypt_to(&alice.to_public().to_string(), VALUE).unwrap();
        assert!(armored.starts_with("-----BEGIN AGE ENCRYPTED FILE-----"));
        assert_eq!(age::decrypt(&alice, armored.as_bytes()).unwrap(), VALUE);
        assert!(age::decrypt(&bob, armored.as_bytes()).is_err());
    }

    #[test]
    fn an_answer_can_be_for_an_ssh_key() {
        let identity = ssh::Identity::from_buffer(SSH_PRIVATE.as_bytes(), None).unwrap();
        let armored = encrypt_to(SSH_PUBLIC, VALUE).unwrap();
        assert_eq!(age::decrypt(&identity, armored.as_bytes()).unwrap(), VALUE);
        assert!(age::decrypt(&Identity::generate(), armored.as_bytes()).is_err());
    }

    #[test]
    fn a_recipient_that_is_none_is_refused() {
        for nonsense in ["", "age1", "age1nonsense", "ssh-ed25519 AAAA", "ssh-dss AAAA", "mallory"] {
            assert_eq!(encrypt_to(nonsense, VALUE).unwrap_err(), SealError::Recipient, "{nonsense}");
        }
    }
}
