//! Asks the webhook the way the API server would: over TLS, by its Service's name, trusting the published `caBundle`.
//!
//! This is what readiness means here. A replica that is ready answers admission requests; one that could not is kept
//! out of the Service, instead of failing requests until somebody finds out.

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Request, StatusCode},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const TIMEOUT: Duration = Duration::from_secs(2);

/// A client certificate and its key, for a webhook that demands one.
pub type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// Sends one request to our own listener and expects an answer. `bundle` is what the API server trusts, in PEM.
///
/// # Errors
/// What an admission request would fail on, in words.
pub async fn ask(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<Identity>,
) -> Result<(), String> {
    tokio::time::timeout(TIMEOUT, try_ask(address, server_name, bundle, identity))
        .await
        .unwrap_or_else(|_| Err(format!("the webhook did not answer in {}s", TIMEOUT.as_secs())))
}

async fn try_ask(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<Identity>,
) -> Result<(), String> {
    let request =
        Request::get(super::PATH).header("host", server_name).body(Body::empty()).map_err(|error| error.to_string())?;
    match send(address, server_name, bundle, identity, request).await?.as_u16() {
        204 => Ok(()),
        other => Err(format!("the webhook answered {other}")),
    }
}

/// Sends one request to the webhook of a replica at `address`, over a connection of its own. It has no deadline.
///
/// # Errors
/// If there is no connection to a server with a certificate for `server_name` that `bundle` (PEM) vouches for, or no
/// answer, in words.
pub async fn send(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<Identity>,
    request: Request<Body>,
) -> Result<StatusCode, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        let certificate = certificate.map_err(|_| "the published caBundle can't be read".to_owned())?;
        roots.add(certificate).map_err(|error| format!("the published caBundle can't be used: {error}"))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let config = match identity {
        Some((certificate, key)) => config
            .with_client_auth_cert(vec![certificate], key)
            .map_err(|error| format!("no certificate for a question: {error}"))?,
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from(server_name.to_owned()).map_err(|error| error.to_string())?;
    let failed = |error: &dyn std::fmt::Display| format!("the webhook could not be asked: {error}");
    let tcp = TcpStream::connect(reachable(address)).await.map_err(|e| failed(&e))?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|e| failed(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| failed(&e))?;
    // The connection is no task of its own, so that it ends with this future, whose caller may lose patience.
    let (mut connection, mut answer) = (pin!(connection), pin!(sender.send_request(request)));
    let answer = tokio::select! {
        answer = &mut answer => answer,
        _ = &mut connection => answer.await,
    };
    Ok(answer.map_err(|e| failed(&e))?.status())
}

/// Where a listener on a wildcard address can be reached from here.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => ([127, 0, 0, 1], v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}
