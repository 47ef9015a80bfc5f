//! Listeners, and what their peers can take of them: the verifier's front ends, the webhook and the health ports alike.
//!
//! Whoever reaches a port can hold connections open, trickle heads or bodies, or ask for many streams. Each of these ends
//! at a bound, so that memory does, and so that others are answered: [`Places`] bounds connections, [`Bodies`] what is held
//! of bodies. When a bound is reached, those make room that hold the most or were waited for the longest.

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

use super::{
    Fatal,
    lingering::LingeringAcceptor,
    places::{Place, Seat, Working},
};
pub use super::{
    bodies::{Bodies, Received, Unread},
    places::{Full, Places},
};

/// How many requests of one HTTP/2 connection are under way; a peer with more opens another.
const STREAMS: u32 = 128;

/// The largest head of a request. Proxies allow no more themselves, and a client can't make us hold more.
const LARGEST_HEAD: usize = 64 << 10;

/// How much of one body, and of all bodies of one HTTP/2 connection, a peer may send before any of it is read (RFC 9113,
/// section 6.9.1), and how much of the answers is kept for a peer that does not take them. It is read at once, so that a small
/// window makes nothing slow.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
const SEND_BUFFER: usize = 64 << 10;

/// How long a new connection may take until its first request is there, and a request until it is complete.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may be idle, or take for a later request. Longer than proxies keep theirs (nginx a minute,
/// Traefik and the API server a minute and a half, Caddy two), so that it is they who close: who sends a request into a
/// connection that is just being closed gets no answer.
const IDLE: Duration = Duration::from_mins(3);

/// A service that has a place for as long as its connection lasts.
#[derive(Clone)]
pub(super) struct Placed<S> {
    service: S,
    place: Arc<Place>,
}

impl<S> Placed<S> {
    pub(super) fn seat(&self) -> &Arc<Seat> {
        self.place.seat()
    }
}

impl<S> Service<Request<Incoming>> for Placed<S>
where
    S: Service<Request<Incoming>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = AtWork<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> AtWork<S::Future> {
        let working = if request.body().is_end_stream() {
            self.seat().work()
        } else {
            // Until the body is there, the connection waits for its peer; see `Bodies::receive`.
            request.extensions_mut().insert(Arc::clone(self.seat()));
            self.seat().expect()
        };
        AtWork { answer: self.service.call(request), working: Some(working) }
    }
}

/// An answer that is being made. Its connection is at work until it is there.
pub(super) struct AtWork<F> {
    answer: F,
    working: Option<Working>,
}

impl<F: Future + Unpin> Future for AtWork<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let answer = Pin::new(&mut self.answer).poll(context);
        if answer.is_ready() {
            self.working = None;
        }
        answer
    }
}

/// A socket that listens on the address that a flag says.
///
/// # Errors
/// If it can't be had, with the flag and the address.
pub fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, Fatal> {
    TcpListener::bind(address).map_err(|error| Fatal(format!("{flag} {address}: {error}")))
}

/// Serves until the handle says otherwise, with a service of its own for each connection. HTTP/1.1 and HTTP/2, plain or
/// TLS; `tls` is asked for a certificate at each handshake, so that a new one needs no new listener.
///
/// # Errors
/// If the socket can't be used.
pub async fn serve<S, B>(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    handle: Handle<SocketAddr>,
    places: Arc<Places>,
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
        let place = places.take(peer.ip());
        std::future::ready(place.map(|place| Placed { service: service(), place: Arc::new(place) }))
    });
    let mut server = axum_server::from_tcp(listener)?.handle(handle).first_request_timeout(PATIENCE);
    bound(server.http_builder());
    let (dead, mut died) = watch::channel(None);
    let server = server.accept_error_handler(move |peer: Option<&SocketAddr>, error| {
        // With a peer, it is one connection that failed.
        if peer.is_none() {
            tracing::warn!(%error, "no connection could be accepted");
            // Too many open files, for example, pass. A socket that does not listen never will.
            if error.kind() == io::ErrorKind::InvalidInput {
                dead.send_replace(Some(error.to_string()));
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
        Ok(error) = died.wait_for(Option::is_some) => {
            let error = error.as_deref().unwrap_or_default();
            Err(io::Error::other(format!("the socket no longer accepts connections: {error}")))
        }
    }
}

/// Bounds what one connection can take.
fn bound(builder: &mut Builder<TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(LARGEST_HEAD);
    let largest = u32::try_from(LARGEST_HEAD).unwrap_or(u32::MAX);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_header_list_size(largest).max_concurrent_streams(STREAMS);
    http2.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
    http2.max_send_buf_size(SEND_BUFFER);
    // A peer that is gone without a word is noticed.
    http2.keep_alive_interval(IDLE / 6).keep_alive_timeout(PATIENCE);
}
