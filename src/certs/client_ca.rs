//! Who may call the webhook: clients with a certificate of a CA that the administrator names.
//!
//! An API server presents a certificate to a webhook if its admission configuration says so
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#authenticate-apiservers>).
//! The process itself, which asks its own webhook to know whether it is ready, has a certificate that it makes at its
//! start; the key stays in memory.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use tokio::{fs, time::sleep};

use super::{Certificate, Error, serving::provider};

const POLL: Duration = Duration::from_secs(10);

/// Accepts clients with a certificate of the CA in a file, and this process.
pub struct ClientCa {
    file: PathBuf,
    own: Own,
    trusted: RwLock<Trusted>,
}

/// A certificate for this process as a client of itself.
pub struct Own {
    /// The certificate, signed by its own key.
    pub certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

struct Trusted {
    pem: Vec<u8>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Own {
    /// The key, for one more connection.
    #[must_use]
    pub fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Own")
    }
}

impl fmt::Debug for ClientCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientCa({})", self.file.display())
    }
}

impl ClientCa {
    /// Reads the file: one or more certificates in PEM.
    ///
    /// # Errors
    /// If it can't be read, or holds no certificate of a CA.
    pub async fn load(file: &Path) -> Result<Arc<Self>, Error> {
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(vec![])?.self_signed(&key)?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| Error::Unreadable("a new key"))?;
        let trusted = RwLock::new(Trusted::of(read(file).await?)?);
        Ok(Arc::new(Self { file: file.to_owned(), own: Own { certificate, key }, trusted }))
    }

    /// The certificate of this process.
    #[must_use]
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// Follows the file for as long as it is polled. A file that can't be used leaves the CA as it is.
    pub async fn follow(self: Arc<Self>) {
        let mut problem = None;
        loop {
            sleep(POLL).await;
            let failed = self.look().await.err().map(|error| error.to_string());
            if let Some(error) = failed.as_ref().filter(|error| problem.as_ref() != Some(*error)) {
                tracing::warn!(file = %self.file.display(), error, "the webhook's client CA can't be read; the last is kept");
            }
            problem = failed;
        }
    }

    async fn look(&self) -> Result<(), Error> {
        let pem = read(&self.file).await?;
        let same = self.trusted.read().unwrap_or_else(PoisonError::into_inner).pem == pem;
        if !same {
            let new = Trusted::of(pem)?;
            *self.trusted.write().unwrap_or_else(PoisonError::into_inner) = new;
            tracing::info!(file = %self.file.display(), "the webhook takes client certificates of a new CA");
        }
        Ok(())
    }

    fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.trusted.read().unwrap_or_else(PoisonError::into_inner).verifier)
    }
}

async fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).await.map_err(|error| Error::File("the client CA", error))
}

impl Trusted {
    fn of(pem: Vec<u8>) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in Certificate::parse_all(&pem, "the client CA")? {
            roots.add(certificate.der().clone())?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|_| Error::Missing("a certificate in the client CA"))?;
        Ok(Self { pem, verifier })
    }
}

impl ClientCertVerifier for ClientCa {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints could not change with the file. A client that was configured for this webhook needs none.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        // That it has the key is what the signature of the handshake says.
        if *end_entity == self.own.certificate {
            return if intermediates.is_empty() {
                Ok(ClientCertVerified::assertion())
            } else {
                Err(CertificateError::UnknownIssuer.into())
            };
        }
        self.verifier().verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier().verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier().verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier().supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CA in PEM and a certificate of it.
    fn issue(usage: rcgen::ExtendedKeyUsagePurpose) -> (String, CertificateDer<'static>) {
        let mut params = rcgen::CertificateParams::new([]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        let mut params = rcgen::CertificateParams::new([]).unwrap();
        params.extended_key_usages = vec![usage];
        let leaf = params.signed_by(&rcgen::KeyPair::generate().unwrap(), &ca).unwrap();
        (ca.pem(), leaf.der().clone())
    }

    #[tokio::test]
    async fn clients_of_the_ca_in_the_file_are_let_in_and_the_process_itself() {
        use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let file = std::env::temp_dir().join(format!("keywright-client-ca-{}", std::process::id()));
        let ((first, client), (second, other), (_, server)) = (issue(ClientAuth), issue(ClientAuth), issue(ServerAuth));
        fs::write(&file, "no PEM").await.unwrap();
        ClientCa::load(&file).await.unwrap_err();
        fs::write(&file, &first).await.unwrap();
        let ca = ClientCa::load(&file).await.unwrap();
        let now = UnixTime::now();
        let accepts = |certificate: &CertificateDer<'_>| ca.verify_client_cert(certificate, &[], now).is_ok();
        assert!(ca.offer_client_auth() && ca.client_auth_mandatory());
        assert_eq!([&client, &other, &server, &ca.own().certificate].map(accepts), [true, false, false, true]);

        // A file that can't be used leaves the CA as it is.
        fs::write(&file, "no PEM").await.unwrap();
        ca.look().await.unwrap_err();
        assert!(accepts(&client));
        fs::write(&file, format!("{first}{second}")).await.unwrap();
        ca.look().await.unwrap();
        assert!(accepts(&client) && accepts(&other));
        fs::write(&file, &second).await.unwrap();
        ca.look().await.unwrap();
        assert_eq!([&client, &other, &ca.own().certificate].map(accepts), [false, true, true]);
        fs::remove_file(&file).await.unwrap();
        ca.look().await.unwrap_err();
        assert!(accepts(&other));

        // A process has no use for another's certificate, nor for a certificate for servers.
        let second_process = ClientCa::load(&file).await;
        assert!(second_process.is_err());
        fs::write(&file, &first).await.unwrap();
        assert!(!accepts(&ClientCa::load(&file).await.unwrap().own().certificate));
        fs::remove_file(&file).await.unwrap();
    }
}
