//! Client authentication of the webhook: clients need a certificate of a CA that the administrator configures.
//!
//! An API server presents a certificate to a webhook if its admission configuration says so
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#authenticate-apiservers>).
//! For its readiness check, the process calls its own webhook with a certificate that it generates at its start. The
//! key stays in memory.

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

use super::{CertError, Certificate, serving::provider};

const POLL: Duration = Duration::from_secs(10);

/// Accepts clients with a certificate of the CA in a file, and the process itself.
pub struct ClientCa {
    file: PathBuf,
    own: Own,
    trusted: RwLock<Trusted>,
}

/// The certificate of this process as a client of its own webhook.
pub struct Own {
    /// The self-signed certificate.
    pub certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

struct Trusted {
    pem: Vec<u8>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Own {
    /// Returns a copy of the key for a connection.
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
    /// If the file cannot be read, or holds no valid certificate.
    pub async fn load(file: &Path) -> Result<Arc<Self>, CertError> {
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(vec![])?.self_signed(&key)?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| CertError::Unreadable("a new key"))?;
        let trusted = RwLock::new(Trusted::of(read(file).await?)?);
        Ok(Arc::new(Self { file: file.to_owned(), own: Own { certificate, key }, trusted }))
    }

    /// Returns the client certificate of this process.
    #[must_use]
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// Reloads the file when it changes, and never returns. An invalid file does not change the CA.
    pub async fn follow(self: Arc<Self>) {
        let mut problem = None;
        loop {
            sleep(POLL).await;
            let failed = self.reload().await.err().map(|error| error.to_string());
            if let Some(error) = failed.as_ref().filter(|error| problem.as_ref() != Some(*error)) {
                tracing::warn!(
                    file = %self.file.display(),
                    error,
                    "cannot read the client CA of the webhook: keeping the previous one"
                );
            }
            problem = failed;
        }
    }

    async fn reload(&self) -> Result<(), CertError> {
        let pem = read(&self.file).await?;
        let same = self.trusted.read().unwrap_or_else(PoisonError::into_inner).pem == pem;
        if !same {
            let new = Trusted::of(pem)?;
            *self.trusted.write().unwrap_or_else(PoisonError::into_inner) = new;
            tracing::info!(file = %self.file.display(), "loaded a new client CA for the webhook");
        }
        Ok(())
    }

    fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.trusted.read().unwrap_or_else(PoisonError::into_inner).verifier)
    }
}

async fn read(file: &Path) -> Result<Vec<u8>, CertError> {
    fs::read(file).await.map_err(|error| CertError::File("the client CA", error))
}

impl Trusted {
    fn of(pem: Vec<u8>) -> Result<Self, CertError> {
        let mut roots = RootCertStore::empty();
        for certificate in Certificate::parse_all(&pem, "the client CA")? {
            roots.add(certificate.der().clone())?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|_| CertError::Missing("a certificate in the client CA"))?;
        Ok(Self { pem, verifier })
    }
}

impl ClientCertVerifier for ClientCa {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // The returned slice could not follow changes of the file, and a client of this webhook needs no hints.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        // The signature of the handshake proves that the client has the key.
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

    /// Returns a CA in PEM and a certificate that it signed.
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
    async fn clients_of_the_ca_in_the_file_and_the_process_itself_are_accepted() {
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

        // An invalid file does not change the CA.
        fs::write(&file, "no PEM").await.unwrap();
        ca.reload().await.unwrap_err();
        assert!(accepts(&client));
        fs::write(&file, format!("{first}{second}")).await.unwrap();
        ca.reload().await.unwrap();
        assert!(accepts(&client) && accepts(&other));
        fs::write(&file, &second).await.unwrap();
        ca.reload().await.unwrap();
        assert_eq!([&client, &other, &ca.own().certificate].map(accepts), [false, true, true]);
        fs::remove_file(&file).await.unwrap();
        ca.reload().await.unwrap_err();
        assert!(accepts(&other));

        // The certificate of another process is not accepted.
        let second_process = ClientCa::load(&file).await;
        assert!(second_process.is_err());
        fs::write(&file, &first).await.unwrap();
        assert!(!accepts(&ClientCa::load(&file).await.unwrap().own().certificate));
        fs::remove_file(&file).await.unwrap();
    }
}
