//! All front ends as one service, on one port: told apart by the path.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::Either as EitherFuture;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::{Bytes, Incoming};
use tower::Service;

use super::{Verifier, envoy_grpc, forward_auth, introspection, journal::FrontEnd};
use crate::runtime::listener::PATIENCE;

/// A body is complete in memory, or gRPC's.
pub type Body = Either<Full<Bytes>, tonic::body::Body>;

/// An answer that is there at once, or that has to wait for the body of its request.
pub type Answer = EitherFuture<
    Ready<Result<Response<Body>, Infallible>>,
    Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>,
>;

/// Every front end, as one service.
#[derive(Clone)]
pub struct Checks(pub Arc<Verifier>);

impl Service<Request<Incoming>> for Checks {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path();
        if path == envoy_grpc::PATH {
            let call = envoy_grpc::call(Arc::clone(&self.0), request);
            return EitherFuture::Right(Box::pin(within_patience(async { call.await.map(Either::Right) })));
        }
        if path == introspection::PATH {
            let verifier = Arc::clone(&self.0);
            let answer = async move { introspect(&verifier, request).await.map(Either::Left) };
            return EitherFuture::Right(Box::pin(within_patience(answer)));
        }
        // Bodies are of no interest, and are not read.
        EitherFuture::Left(ready(Ok(forward(&self.0, &request.into_parts().0).map(Either::Left))))
    }
}

/// Answers a proxy that asks by a plain HTTP request.
fn forward(verifier: &Verifier, head: &http::request::Parts) -> Response<Full<Bytes>> {
    match route(head.uri.path()) {
        Some((front_end, segment)) => forward_auth::check(verifier, front_end, head, segment),
        None => introspection::plain(
            StatusCode::NOT_FOUND,
            "no front end has this path: see /envoy/, /nginx/, /caddy/ and /traefik/, each followed by what the route \
             asks for, such as permission=alerts-map:Read, as one segment",
        ),
    }
}

/// Nobody keeps a request in memory by never sending the rest of it.
///
/// # Errors
/// None.
pub async fn within_patience(answer: impl Future<Output = Response<Body>>) -> Result<Response<Body>, Infallible> {
    Ok(tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| {
        introspection::plain(StatusCode::REQUEST_TIMEOUT, "the rest of the request did not come").map(Either::Left)
    }))
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
