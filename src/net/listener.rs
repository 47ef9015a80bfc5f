//! Listeners with limits, for the front ends of the verifier, the webhook and the health ports.
//!
//! Any client that reaches a port can hold connections open, send heads or bodies slowly, or open many streams. Limits
//! bound the memory for this and keep the port available for others: [`ConnectionLimit`] for connections, [`Bodies`]
//! for request bodies. At a limit, the connections and bodies end that use the most or have been incomplete for the
//! longest.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum_server::{
    Handle,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::sync::watch;
use tower::Service;

pub use super::{
    bodies::{Bodies, Received, Unread},
    connection_limit::{ConnectionLimit, LimitReached},
};
use super::{
    connection_limit::{ConnectionGuard, ConnectionPermit, RequestGuard},
    lingering::LingeringAcceptor,
};

/// The maximum number of concurrent requests on one HTTP/2 connection. A peer with more opens another connection.
const MAX_STREAMS: u32 = 128;

/// The maximum size of a request head. Proxies have limits at or below this size.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// The flow-control windows of HTTP/2 (RFC 9113, section 6.9.1): the bytes of one body, and of all bodies of a
/// connection, that a peer may send before the server reads them; and the bytes of responses that are buffered for a
/// slow peer. Bodies are read at once, so small windows do not reduce the throughput.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
const SEND_BUFFER: usize = 64 << 10;

/// The time in which the first request of a connection must start, and in which a request must be complete.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum time between requests, and for the head of a later request. It is longer than the idle time-outs of
/// proxies (nginx 60 s, Traefik and the API server 90 s, Caddy 120 s), so that the proxy closes the connection: a
/// request that is sent while the server closes the connection gets no response.
const IDLE_TIMEOUT: Duration = Duration::from_mins(3);

/// A service with the permit of its connection.
#[derive(Clone)]
pub(super) struct WithPermit<S> {
    service: S,
    permit: Arc<ConnectionPermit>,
}

impl<S> WithPermit<S> {
    pub(super) fn guard(&self) -> &Arc<ConnectionGuard> {
        self.permit.guard()
    }
}

impl<S> Service<Request<Incoming>> for WithPermit<S>
where
    S: Service<Request<Incoming>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> ResponseFuture<S::Future> {
        let request_guard = if request.body().is_end_stream() {
            self.guard().active_request()
        } else {
            // The connection is idle until the body is complete, see `Bodies::receive`.
            request.extensions_mut().insert(Arc::clone(self.guard()));
            self.guard().waiting_request()
        };
        ResponseFuture { response: self.service.call(request), request_guard: Some(request_guard) }
    }
}

/// The future of a response. It holds the guard of the request.
pub(super) struct ResponseFuture<F> {
    response: F,
    request_guard: Option<RequestGuard>,
}

impl<F: Future + Unpin> Future for ResponseFuture<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let response = Pin::new(&mut self.response).poll(context);
        if response.is_ready() {
            self.request_guard = None;
        }
        response
    }
}

/// An error of [`bind`], with the flag and the address.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {address}: {source}")]
pub struct BindError {
    flag: String,
    address: SocketAddr,
    source: io::Error,
}

/// Listens on the address of a flag.
///
/// # Errors
/// If that fails.
pub fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).map_err(|source| BindError { flag: flag.to_owned(), address, source })
}

/// Serves HTTP/1.1 and HTTP/2, plain or over TLS, until the handle stops the server. `service` makes a service for each
/// connection. The resolver of `tls` selects the certificate at each handshake, so that a new certificate needs no new
/// listener.
///
/// # Errors
/// If the socket fails.
pub async fn serve<S, B>(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    handle: Handle<SocketAddr>,
    limit: Arc<ConnectionLimit>,
    service: impl Fn() -> S + Send,
) -> io::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + Unpin + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let make = tower::service_fn(move |peer: SocketAddr| {
        let permit = limit.acquire(peer.ip());
        std::future::ready(permit.map(|permit| WithPermit { service: service(), permit: Arc::new(permit) }))
    });
    let mut server = axum_server::from_tcp(listener)?.handle(handle).first_request_timeout(REQUEST_TIMEOUT);
    limit_connection(server.http_builder());
    let (failure, mut failed) = watch::channel(None);
    let server = server.accept_error_handler(move |peer: Option<&SocketAddr>, error| {
        // An error with a peer concerns one connection only.
        if peer.is_none() {
            tracing::warn!(%error, "cannot accept connections");
            // Other errors, such as too many open files, are temporary. This one means that the socket does not listen.
            if error.kind() == io::ErrorKind::InvalidInput {
                failure.send_replace(Some(error.to_string()));
            }
        }
    });
    let until_shutdown = async {
        match tls {
            Some(tls) => {
                let tls = RustlsAcceptor::new(RustlsConfig::from_config(tls)).acceptor(LingeringAcceptor);
                server.acceptor(tls).serve(make).await
            }
            None => server.acceptor(LingeringAcceptor).serve(make).await,
        }
    };
    tokio::select! {
        ended = until_shutdown => ended,
        Ok(error) = failed.wait_for(Option::is_some) => {
            let error = error.as_deref().unwrap_or_default();
            Err(io::Error::other(format!("the socket no longer accepts connections: {error}")))
        }
    }
}

/// Sets the limits of one connection.
fn limit_connection(builder: &mut Builder<TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
    let largest = u32::try_from(MAX_HEAD_BYTES).unwrap_or(u32::MAX);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_header_list_size(largest).max_concurrent_streams(MAX_STREAMS);
    http2.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
    http2.max_send_buf_size(SEND_BUFFER);
    // Detects peers that are gone without closing the connection.
    http2.keep_alive_interval(IDLE_TIMEOUT / 6).keep_alive_timeout(REQUEST_TIMEOUT);
}
