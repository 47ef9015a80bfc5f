//! The certificate that the TLS listener serves, and its status for metrics and readiness.

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use jiff::Timestamp;
use rustls::{
    RootCertStore, ServerConfig,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use tracing::{info, warn};

use super::{CertError, Certificate, Now, Validity};

/// The certificate that is served now. The listener reads it, and its source replaces it.
pub struct Resolver {
    now: Now,
    state: RwLock<ServingState>,
}

#[derive(Default)]
struct ServingState {
    leaf: Option<Leaf>,
    problem: Option<String>,
}

/// A certificate with its key, validity and issuer.
pub(super) struct Leaf {
    pub key: Arc<CertifiedKey>,
    pub validity: Validity,
    /// The CA that signed it, if known.
    pub issuer: Option<Certificate>,
}

/// The status of the served certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateStatus {
    /// The last second of the served certificate; `None` before the first one.
    pub leaf_not_after: Option<Timestamp>,
    /// The last second of its CA, if known.
    pub ca_not_after: Option<Timestamp>,
    /// The error of the last attempt to renew the certificate; `None` after a success.
    pub problem: Option<String>,
}

impl Resolver {
    pub(super) fn new(now: Now) -> Arc<Self> {
        Arc::new(Self { now, state: RwLock::default() })
    }

    /// Returns the status of the served certificate.
    #[must_use]
    pub fn status(&self) -> CertificateStatus {
        let state = self.state();
        let leaf = state.leaf.as_ref();
        CertificateStatus {
            leaf_not_after: leaf.map(|leaf| leaf.validity.until),
            ca_not_after: leaf.and_then(|leaf| Some(leaf.issuer.as_ref()?.validity().until)),
            problem: state.problem.clone(),
        }
    }

    /// Checks that a client that trusts `bundle` (PEM), such as an API server with this `caBundle`, accepts the served
    /// certificate for `dns_name` now.
    ///
    /// # Errors
    /// If there is no certificate, or the client would reject it.
    pub fn trusted_by(&self, bundle: &[u8], dns_name: &str) -> Result<(), CertError> {
        let chain = self.state().leaf.as_ref().map(|leaf| leaf.key.cert.clone()).ok_or(CertError::NoLeaf)?;
        verify(&chain, bundle, dns_name, (self.now)())
    }

    /// Returns a TLS configuration that serves the current certificate, with HTTP/2 and HTTP/1.1, TLS 1.2 and 1.3.
    ///
    /// # Errors
    /// If the crypto provider does not support these protocols. ring supports them.
    pub fn server_config(self: &Arc<Self>) -> Result<ServerConfig, CertError> {
        self.config(None)
    }

    /// As [`Self::server_config`], but only for clients with a certificate that `clients` accepts. No session is
    /// resumed, so that `clients` checks each connection.
    ///
    /// # Errors
    /// As [`Self::server_config`].
    pub fn server_config_for(
        self: &Arc<Self>,
        clients: Arc<dyn ClientCertVerifier>,
    ) -> Result<ServerConfig, CertError> {
        let mut config = self.config(Some(clients))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn config(self: &Arc<Self>, clients: Option<Arc<dyn ClientCertVerifier>>) -> Result<ServerConfig, CertError> {
        let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        let mut config = match clients {
            Some(clients) => config.with_client_cert_verifier(clients),
            None => config.with_no_client_auth(),
        }
        .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    pub(super) fn now(&self) -> Timestamp {
        (self.now)()
    }

    /// Serves `leaf` from the next handshake on.
    pub(super) fn serve(&self, leaf: Leaf) {
        info!(not_after = %leaf.validity.until, "serving a new certificate");
        self.state.write().unwrap_or_else(PoisonError::into_inner).leaf = Some(leaf);
    }

    /// Applies `f` to the leaf, if there is one.
    pub(super) fn with_leaf<T>(&self, f: impl FnOnce(&Leaf) -> T) -> Option<T> {
        self.state().leaf.as_ref().map(f)
    }

    /// Records the result of the last attempt to renew the certificate. Only changes are logged.
    pub(super) fn report(&self, result: Result<(), CertError>) {
        let problem = result.err().map(|error| error.to_string());
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.problem != problem {
            if let Some(error) = &problem {
                warn!(%error, "cannot renew the serving certificate; retrying");
            } else {
                info!("the serving certificate is current again");
            }
            state.problem = problem;
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, ServingState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.status().fmt(f)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.with_leaf(|leaf| leaf.key.clone())
    }
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Verifies `chain` as an API server does that trusts `bundle`.
pub(super) fn verify(
    chain: &[CertificateDer<'static>],
    bundle: &[u8],
    dns_name: &str,
    now: Timestamp,
) -> Result<(), CertError> {
    let mut roots = RootCertStore::empty();
    for root in Certificate::parse_all(bundle, "caBundle")? {
        // Unlike webpki, Go rejects a root outside of its validity.
        if root.validity().contains(now) {
            roots.add(root.der().clone())?;
        }
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|_| CertError::NotValidNow("caBundle"))?;
    let (leaf, intermediates) = chain.split_first().ok_or(CertError::NoLeaf)?;
    let name = ServerName::try_from(dns_name).map_err(|_| CertError::Unreadable("the DNS name"))?;
    let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap_or_default()));
    verifier.verify_server_cert(leaf, intermediates, &name, &[], at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConfig, pki_types::pem::PemObject};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::certs::Authority;

    const NAME: &str = "keywright.ns.svc";

    /// Returns a leaf of a new CA, and that CA.
    fn leaf(now: Timestamp) -> (Leaf, String) {
        let life = Duration::from_hours(1);
        let ca = Authority::generate(now, life).unwrap();
        let (key, validity) = ca.sign(&[NAME.to_owned()], now, life).unwrap();
        (Leaf { key: Arc::new(key), validity, issuer: Some(ca.cert().clone()) }, ca.cert().pem().to_owned())
    }

    #[tokio::test]
    async fn a_listener_serves_each_new_certificate_from_the_next_handshake() {
        // TLS clients use the system time.
        let clock = crate::clock::Clock::system();
        let now: Now = Arc::new(move || clock.now());
        let resolver = Resolver::new(now.clone());
        assert_eq!(resolver.status(), CertificateStatus::default());
        assert!(matches!(resolver.trusted_by(b"", NAME), Err(CertError::NoLeaf)));

        let acceptor = TlsAcceptor::from(Arc::new(resolver.server_config().unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(acceptor.accept(stream));
            }
        });
        let connect = async |ca: &str| {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
            let mut config = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let stream = TcpStream::connect(address).await.unwrap();
            let tls = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(NAME).unwrap(), stream).await?;
            std::io::Result::Ok(tls.get_ref().1.alpn_protocol().map(<[u8]>::to_vec))
        };

        let ((first, first_ca), (second, second_ca)) = (leaf(now()), leaf(now()));
        connect(&first_ca).await.unwrap_err();
        resolver.serve(first);
        assert_eq!(connect(&first_ca).await.unwrap().as_deref(), Some(b"h2".as_slice()));
        resolver.serve(second);
        connect(&second_ca).await.unwrap();
        connect(&first_ca).await.unwrap_err();
        resolver.trusted_by(second_ca.as_bytes(), NAME).unwrap();
        resolver.trusted_by(first_ca.as_bytes(), NAME).unwrap_err();
    }
}
