//! Certificates and keys (ECDSA P-256), generated with rcgen and parsed with x509-parser.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use rustls::{
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::CertError;

/// The tolerated clock difference between two machines: the validity of a certificate begins this long ago.
const SKEW: Duration = Duration::from_mins(5);

const PEM_END: &str = "-----END CERTIFICATE-----";

/// The period in which a certificate is valid, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: Timestamp,
    /// The last second.
    pub until: Timestamp,
}

impl Validity {
    fn starting(now: Timestamp, life: Duration) -> Self {
        // The skew is at most a tenth of a short lifetime, so that a third of the lifetime is left at the renewal.
        Self { from: whole_seconds(now - SKEW.min(life / 10)), until: whole_seconds(now + life) }
    }

    /// Whether a certificate is valid at `now`.
    #[must_use]
    pub fn contains(self, now: Timestamp) -> bool {
        self.from <= now && now <= self.until
    }

    /// Returns the time of the renewal: after two thirds of the validity, so that a third is left for retries.
    #[must_use]
    pub fn renew_at(self) -> Timestamp {
        self.until - self.until.duration_since(self.from) / 3
    }
}

fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// A certificate without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    der: CertificateDer<'static>,
    pem: String,
    validity: Validity,
}

impl Certificate {
    /// Parses every certificate of a PEM text; `name` names the text in errors.
    ///
    /// # Errors
    /// If a certificate does not parse, or there is none.
    pub fn parse_all(pem: &[u8], name: &'static str) -> Result<Vec<Self>, CertError> {
        let text = std::str::from_utf8(pem).map_err(|_| CertError::Unreadable(name))?;
        let blocks = text.split_inclusive(PEM_END).map(str::trim).filter(|block| !block.is_empty());
        let parse = |block: &str| {
            let der = CertificateDer::from_pem_slice(block.as_bytes()).map_err(|_| CertError::Unreadable(name))?;
            Self::new(der, format!("{block}\n"), name)
        };
        let all = blocks.map(parse).collect::<Result<Vec<_>, _>>()?;
        if all.is_empty() { Err(CertError::Missing(name)) } else { Ok(all) }
    }

    fn new(der: CertificateDer<'static>, pem: String, name: &'static str) -> Result<Self, CertError> {
        let validity = parse(&der, name)?.validity().clone();
        let second = |at: i64| Timestamp::from_second(at).map_err(|_| CertError::Unreadable(name));
        let validity =
            Validity { from: second(validity.not_before.timestamp())?, until: second(validity.not_after.timestamp())? };
        Ok(Self { der, pem, validity })
    }

    /// Returns the certificate in DER.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Returns the certificate as one PEM block.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns the validity.
    #[must_use]
    pub fn validity(&self) -> Validity {
        self.validity
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>, name: &'static str) -> Result<X509Certificate<'a>, CertError> {
    Ok(X509Certificate::from_der(der).map_err(|_| CertError::Unreadable(name))?.1)
}

/// A CA certificate with its key. `Debug` omits the key.
#[derive(Debug)]
pub struct Authority {
    cert: Certificate,
    key: KeyPair,
}

impl Authority {
    /// Generates a CA that is valid for `life` and may sign leaves, but no other CA.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn generate(now: Timestamp, life: Duration) -> Result<Self, CertError> {
        let key = KeyPair::generate()?;
        let mut params = params("keywright webhook CA", Validity::starting(now, life));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let cert = params.self_signed(&key)?;
        Ok(Self { cert: Certificate::new(cert.der().clone(), cert.pem(), "new CA")?, key })
    }

    /// Parses a CA; `cert_name` and `key_name` name the texts in errors.
    ///
    /// # Errors
    /// If a text does not parse, the key is of another certificate, or the certificate may not sign others.
    pub fn parse(cert: &[u8], key: &[u8], cert_name: &'static str, key_name: &'static str) -> Result<Self, CertError> {
        let cert = Certificate::parse_all(cert, cert_name)?.swap_remove(0);
        let key = std::str::from_utf8(key).ok().and_then(|key| KeyPair::from_pem(key).ok());
        let key = key.ok_or(CertError::Unreadable(key_name))?;
        let x509 = parse(&cert.der, cert_name)?;
        if !x509.is_ca() {
            return Err(CertError::NotCa(cert_name));
        }
        if x509.public_key().raw != key.subject_public_key_info() {
            return Err(CertError::Mismatch(key_name));
        }
        Ok(Self { cert, key })
    }

    /// Returns the certificate.
    #[must_use]
    pub fn cert(&self) -> &Certificate {
        &self.cert
    }

    /// Returns the key as PKCS#8 PEM. It must be written to the Secret only.
    pub(super) fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// Generates a key and a certificate for a TLS server with `names`. The certificate is valid for `life`, and at
    /// most until the CA expires.
    pub(super) fn sign(
        &self,
        names: &[String],
        now: Timestamp,
        life: Duration,
    ) -> Result<(CertifiedKey, Validity), CertError> {
        let (leaf, key, validity) = self.generate_leaf("keywright webhook", names, now, life)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((CertifiedKey::new(vec![leaf.der().clone()], any_ecdsa_type(&key)?), validity))
    }

    /// As [`Self::sign`], for the verifier. Returns the certificate and the key as PEM, for its Secret only.
    pub(super) fn issue(
        &self,
        names: &[String],
        now: Timestamp,
        life: Duration,
    ) -> Result<(String, String), CertError> {
        let (leaf, key, _) = self.generate_leaf("keywright verifier", names, now, life)?;
        Ok((leaf.pem(), key.serialize_pem()))
    }

    fn generate_leaf(
        &self,
        name: &str,
        names: &[String],
        now: Timestamp,
        life: Duration,
    ) -> Result<(rcgen::Certificate, KeyPair, Validity), CertError> {
        let mut validity = Validity::starting(now, life);
        validity.until = validity.until.min(self.cert.validity.until);
        let mut params = params(name, validity);
        params.subject_alt_names = CertificateParams::new(names)?.subject_alt_names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &Issuer::from_ca_cert_der(&self.cert.der, &self.key)?)?;
        Ok((leaf, key, validity))
    }
}

/// Whether the private key in the PEM text `key` belongs to `cert`.
pub(super) fn owns(key: &[u8], cert: &Certificate) -> bool {
    let key = std::str::from_utf8(key).ok().and_then(|key| KeyPair::from_pem(key).ok());
    let public = |key: KeyPair| key.subject_public_key_info();
    key.map(public).is_some_and(|key| parse(&cert.der, "tls.crt").is_ok_and(|x509| x509.public_key().raw == key))
}

fn params(name: &str, validity: Validity) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |at: Timestamp| epoch + Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default());
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (at(validity.from), at(validity.until));
    params
}
