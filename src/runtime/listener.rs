//! Listeners, and what their peers can take of them: the verifier's front ends, the webhook and the health ports alike.
//!
//! Whoever reaches a port can hold connections open, trickle heads or bodies, or ask for many streams. Each of these ends
//! at a bound, so that memory does, and so that those who are in go on being answered.

use std::{
    convert::Infallible,
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::Service;

use super::{Fatal, lingering::LingeringAcceptor};

/// How many requests of one HTTP/2 connection are under way; a peer with more opens another.
const STREAMS: u32 = 128;

/// The largest head of a request. Proxies allow no more themselves, and a client can't make us hold more.
const LARGEST_HEAD: usize = 64 << 10;

/// How long a new connection may take until its first request is there, and a request until it is complete.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may be idle, or take for a later request. Longer than proxies keep theirs (nginx a minute,
/// Traefik and the API server a minute and a half, Caddy two), so that it is they who close: who sends a request into a
/// connection that is just being closed gets no answer.
const IDLE: Duration = Duration::from_mins(3);

/// How many connections a listener has at a time. Who comes when all places are taken is turned away at once: a proxy
/// that is told so soon can ask another replica, one that waits can't.
pub struct Places {
    free: Arc<Semaphore>,
    all: usize,
    turned_away: AtomicU64,
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} places", self.taken(), self.all)
    }
}

/// Every place is taken.
#[derive(Debug, thiserror::Error)]
#[error("as many connections are open as may be")]
pub struct Full;

impl Places {
    /// Places for so many connections.
    #[must_use]
    pub fn new(all: usize) -> Arc<Self> {
        let all = all.min(Semaphore::MAX_PERMITS);
        Arc::new(Self { free: Arc::new(Semaphore::new(all)), all, turned_away: AtomicU64::new(0) })
    }

    /// How many connections there are.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.all - self.free.available_permits()
    }

    /// How many there could not be.
    #[must_use]
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }

    fn take(&self) -> Result<OwnedSemaphorePermit, Full> {
        Arc::clone(&self.free).try_acquire_owned().map_err(|_| {
            let count = self.turned_away.fetch_add(1, Ordering::Relaxed) + 1;
            // Said, but not as often as somebody likes to hear it.
            if count.is_power_of_two() {
                tracing::warn!(
                    places = self.all,
                    turned_away = count,
                    "connections are turned away: all places are taken"
                );
            }
            Full
        })
    }
}

/// A service that has a place for as long as its connection lasts.
#[derive(Clone)]
struct Placed<S> {
    service: S,
    _place: Arc<OwnedSemaphorePermit>,
}

impl<S: Service<Request<Incoming>>> Service<Request<Incoming>> for Placed<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Incoming>) -> S::Future {
        self.service.call(request)
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
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let make = tower::service_fn(move |_: SocketAddr| {
        let place = places.take();
        std::future::ready(place.map(|place| Placed { service: service(), _place: Arc::new(place) }))
    });
    let mut server = axum_server::from_tcp(listener)?.handle(handle).first_request_timeout(PATIENCE);
    bound(server.http_builder());
    match tls {
        Some(tls) => {
            let tls = RustlsAcceptor::new(RustlsConfig::from_config(tls)).acceptor(LingeringAcceptor);
            server.acceptor(tls).serve(make).await
        }
        None => server.acceptor(LingeringAcceptor).serve(make).await,
    }
}

/// Bounds what one connection can take.
fn bound(builder: &mut Builder<TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(LARGEST_HEAD);
    let largest = u32::try_from(LARGEST_HEAD).unwrap_or(u32::MAX);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_header_list_size(largest).max_concurrent_streams(STREAMS);
    // A peer that is gone without a word is noticed.
    http2.keep_alive_interval(IDLE / 6).keep_alive_timeout(PATIENCE);
}
