//! The readiness check of the webhook: a request as from the API server, over TLS, to the name of the Service, with the
//! published `caBundle`.
//!
//! A replica that could not serve admission requests is not ready, so the Service does not route requests to it.

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
pub type ClientIdentity = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// Sends a request to the listener of this process. `bundle` contains the CA certificates that the API server trusts,
/// in PEM.
///
/// # Errors
/// The reason why an admission request would fail.
pub async fn ask(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<ClientIdentity>,
) -> Result<(), String> {
    tokio::time::timeout(TIMEOUT, try_ask(address, server_name, bundle, identity))
        .await
        .unwrap_or_else(|_| Err(format!("the webhook did not respond within {}s", TIMEOUT.as_secs())))
}

async fn try_ask(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<ClientIdentity>,
) -> Result<(), String> {
    let request =
        Request::get(super::PATH).header("host", server_name).body(Body::empty()).map_err(|error| error.to_string())?;
    match send(address, server_name, bundle, identity, request).await?.as_u16() {
        204 => Ok(()),
        other => Err(format!("the webhook responded with status {other}")),
    }
}

/// Sends a request to the webhook of the replica at `address`, over a new connection and without a deadline.
///
/// # Errors
/// If the connection fails, the server has no certificate for `server_name` from a CA of `bundle` (PEM), or there is no
/// response.
pub async fn send(
    address: SocketAddr,
    server_name: &str,
    bundle: &[u8],
    identity: Option<ClientIdentity>,
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
            .map_err(|error| format!("the client certificate can't be used: {error}"))?,
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from(server_name.to_owned()).map_err(|error| error.to_string())?;
    let failed = |error: &dyn std::fmt::Display| format!("cannot send a request to the webhook: {error}");
    let tcp = TcpStream::connect(reachable(address)).await.map_err(|e| failed(&e))?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|e| failed(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| failed(&e))?;
    // The connection is not a separate task, so that it ends with this future, which the caller may drop.
    let (mut connection, mut response) = (pin!(connection), pin!(sender.send_request(request)));
    let response = tokio::select! {
        response = &mut response => response,
        _ = &mut connection => response.await,
    };
    Ok(response.map_err(|e| failed(&e))?.status())
}

/// Replaces a wildcard address of a listener by the loopback address.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => ([127, 0, 0, 1], v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}
