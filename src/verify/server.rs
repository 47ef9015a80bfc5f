//! The listener: HTTP/1.1 and HTTP/2, plain or TLS, all front ends on one port, told apart by the path.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum_server::Handle;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioTimer;
use tower::Service;

use super::{Verifier, envoy_grpc, forward_auth, introspection, journal::FrontEnd};

/// How many requests of one HTTP/2 connection are under way; a proxy with more opens another.
const STREAMS: u32 = 128;

/// The largest head of a request. Proxies allow no more themselves, and a client can't make us hold more.
const LARGEST_HEAD: usize = 64 << 10;

/// How long a new connection may take until its first request is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may be idle, or take for a later request. Longer than proxies keep theirs (nginx a minute,
/// Traefik a minute and a half, Caddy two), so that it is they who close: who sends a request into a connection that is
/// just being closed gets no answer.
const IDLE: Duration = Duration::from_mins(3);

/// A body is complete in memory, or gRPC's.
pub type Body = Either<Full<Bytes>, tonic::body::Body>;

/// Every front end, as one service.
#[derive(Clone)]
pub struct Checks(pub Arc<Verifier>);

impl Service<Request<Incoming>> for Checks {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let verifier = Arc::clone(&self.0);
        Box::pin(async move { Ok(answer(verifier, request).await) })
    }
}

async fn answer(verifier: Arc<Verifier>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path();
    if path == envoy_grpc::PATH {
        let call = envoy_grpc::call(verifier, request);
        return within_patience(async { call.await.map(Either::Right) }).await;
    }
    if path == introspection::PATH {
        return within_patience(async { introspect(&verifier, request).await.map(Either::Left) }).await;
    }
    // Bodies are of no interest, and are not read.
    let (head, _) = request.into_parts();
    let response = match route(head.uri.path()) {
        Some((front_end, segment)) => forward_auth::check(&verifier, front_end, &head, segment),
        None => introspection::plain(
            StatusCode::NOT_FOUND,
            "no front end has this path: see /envoy/, /nginx/, /caddy/ and /traefik/, each followed by what the route \
             asks for, such as permission=alerts-map:Read, as one segment",
        ),
    };
    response.map(Either::Left)
}

/// Nobody keeps a request in memory by never sending the rest of it.
pub async fn within_patience(answer: impl Future<Output = Response<Body>>) -> Response<Body> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| {
        introspection::plain(StatusCode::REQUEST_TIMEOUT, "the rest of the request did not come").map(Either::Left)
    })
}

/// The front end of a path, and the segment that says what the route asks for.
fn route(path: &str) -> Option<(FrontEnd, &str)> {
    let (name, rest) = path.strip_prefix('/')?.split_once('/')?;
    let front_end = match name {
        // Envoy appends the client's path; it begins with a slash, so it can't reach into the segment before it.
        "envoy" => return Some((FrontEnd::EnvoyHttp, rest.split_once('/')?.0)),
        "nginx" => FrontEnd::Nginx,
        "caddy" => FrontEnd::Caddy,
        "traefik" => FrontEnd::Traefik,
        _ => return None,
    };
    // These append nothing; if something comes after all, the proxy is not configured as it should be.
    (!rest.contains('/')).then_some((front_end, rest))
}

async fn introspect(verifier: &Verifier, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method().as_str() != "POST" {
        let description = "introspection is a POST (RFC 7662, section 2.1)";
        let mut response = introspection::plain(StatusCode::METHOD_NOT_ALLOWED, description);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let (head, body) = request.into_parts();
    // Who may not ask is not listened to either.
    if let Some(refusal) = introspection::refuse(verifier, &head) {
        return refusal;
    }
    match Limited::new(body, introspection::LARGEST).collect().await {
        Ok(body) => introspection::answer(verifier, &head, &body.to_bytes()),
        Err(_) => introspection::plain(StatusCode::PAYLOAD_TOO_LARGE, "the form is too large"),
    }
}

/// Serves until the handle says otherwise. `tls` is asked for a certificate at each handshake, so that a new one needs
/// no new listener.
///
/// # Errors
/// If the socket can't be used.
pub async fn serve(
    verifier: Arc<Verifier>,
    listener: std::net::TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    handle: Handle<std::net::SocketAddr>,
) -> std::io::Result<()> {
    let checks = Checks(verifier);
    let make =
        tower::service_fn(move |_: std::net::SocketAddr| std::future::ready(Ok::<_, Infallible>(checks.clone())));
    if let Some(tls) = tls {
        let tls = axum_server::tls_rustls::RustlsConfig::from_config(tls);
        let mut server = axum_server::from_tcp_rustls(listener, tls)?.handle(handle).first_request_timeout(PATIENCE);
        limit(server.http_builder());
        server.serve(make).await
    } else {
        let mut server = axum_server::from_tcp(listener)?.handle(handle).first_request_timeout(PATIENCE);
        limit(server.http_builder());
        server.serve(make).await
    }
}

/// Bounds what one client can take, and lets one proxy have many requests under way on one connection.
pub fn limit(builder: &mut hyper_util::server::conn::auto::Builder<hyper_util::rt::TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(LARGEST_HEAD);
    let largest = u32::try_from(LARGEST_HEAD).unwrap_or(u32::MAX);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_header_list_size(largest).max_concurrent_streams(STREAMS);
    // A peer that is gone without a word is noticed.
    http2.keep_alive_interval(IDLE / 6).keep_alive_timeout(PATIENCE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_the_front_end_and_nothing_of_the_clients_gets_into_the_segment() {
        assert_eq!(route("/nginx/permission=a:Read"), Some((FrontEnd::Nginx, "permission=a:Read")));
        assert_eq!(route("/traefik/permission=none&team=a"), Some((FrontEnd::Traefik, "permission=none&team=a")));
        for client in
            ["/", "/x", "//permission=none", "/../permission=none", "/%2e%2e/permission=none", "/envoy/permission=none"]
        {
            let path = format!("/envoy/permission=a:Read{client}");
            assert_eq!(route(&path), Some((FrontEnd::EnvoyHttp, "permission=a:Read")), "{client}");
        }
        for path in [
            "/",
            "/nginx",
            "/nginx/a/b",
            "/caddy/permission=none/",
            "//nginx/permission=none",
            "/other/x",
            "*",
            "/envoy/permission=a:Read*",
        ] {
            assert_eq!(route(path), None, "{path}");
        }
        assert_eq!(route("/caddy/"), Some((FrontEnd::Caddy, "")), "a route that says nothing is refused as such");
    }
}
