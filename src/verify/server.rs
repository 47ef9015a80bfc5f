//! All front ends as one service on one port, selected by the path.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::Either as EitherFuture;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use tower::Service;

use super::{Verifier, decision_log::FrontEnd, envoy_grpc, forward_auth, introspection};
use crate::net::listener::{Bodies, Unread};

/// The memory for the bodies of all concurrent requests, in bytes. A message of Envoy has one or two kilobytes and
/// arrives at once, so that only deliberately slow clients reach this limit; then the slowest requests are dropped.
pub const BODIES: usize = 8 << 20;

/// A response body: complete in memory, or of gRPC.
pub type Body = Either<Full<Bytes>, tonic::body::Body>;

/// A response that is ready at once, or that waits for the body of its request.
pub type CheckFuture = EitherFuture<
    Ready<Result<Response<Body>, Infallible>>,
    Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>,
>;

/// Every front end, as one service.
#[derive(Clone)]
pub struct CheckService {
    /// The state that all front ends share.
    pub verifier: Arc<Verifier>,
    /// The memory for bodies that all requests share.
    pub bodies: Arc<Bodies>,
}

impl Service<Request<Incoming>> for CheckService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = CheckFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> CheckFuture {
        let path = request.uri().path();
        let (grpc, introspects) = (path == envoy_grpc::PATH, path == introspection::PATH);
        if !grpc && !introspects {
            // The body is not needed and is not read.
            return EitherFuture::Left(ready(Ok(forward(&self.verifier, &request.into_parts().0).map(Either::Left))));
        }
        let Self { verifier, bodies } = self.clone();
        EitherFuture::Right(Box::pin(async move {
            Ok(if grpc {
                check(verifier, &bodies, request).await
            } else {
                introspect(&verifier, &bodies, request).await.map(Either::Left)
            })
        }))
    }
}

/// Answers a gRPC call of Envoy, after its whole message has arrived.
async fn check(verifier: Arc<Verifier>, bodies: &Bodies, request: Request<Incoming>) -> Response<Body> {
    match bodies.receive(request, envoy_grpc::LARGEST).await {
        Ok((head, received)) => {
            let call = Request::from_parts(head, Full::new(received.bytes.clone()));
            envoy_grpc::call(verifier, call).await.map(Either::Right)
        }
        Err(why) => unread(why).map(Either::Left),
    }
}

/// Returns the response for a request whose body was not received.
fn unread(why: Unread) -> Response<Full<Bytes>> {
    let mut response = introspection::plain(why.status(), &why.to_string());
    if why == Unread::NoRoom {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// Answers a front end that uses plain HTTP requests.
fn forward(verifier: &Verifier, head: &http::request::Parts) -> Response<Full<Bytes>> {
    match route(head.uri.path()) {
        Some((front_end, segment)) => forward_auth::check(verifier, front_end, head, segment),
        None => introspection::plain(
            StatusCode::NOT_FOUND,
            "no front end has this path: use /envoy/, /nginx/, /caddy/ or /traefik/, followed by the requirement of the \
             route as one segment, such as permission=alerts-map:Read",
        ),
    }
}

/// Returns the front end of a path, and the segment with the requirement of the route.
fn route(path: &str) -> Option<(FrontEnd, &str)> {
    let (name, rest) = path.strip_prefix('/')?.split_once('/')?;
    let front_end = match name {
        // Envoy appends the path of the client. It begins with a slash, so it can't change the segment before it.
        "envoy" => return Some((FrontEnd::EnvoyHttp, rest.split_once('/')?.0)),
        "nginx" => FrontEnd::Nginx,
        "caddy" => FrontEnd::Caddy,
        "traefik" => FrontEnd::Traefik,
        _ => return None,
    };
    // These append nothing. A further segment means that the proxy is misconfigured.
    (!rest.contains('/')).then_some((front_end, rest))
}

async fn introspect(verifier: &Verifier, bodies: &Bodies, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method().as_str() != "POST" {
        let description = "introspection requires POST (RFC 7662, section 2.1)";
        let mut response = introspection::plain(StatusCode::METHOD_NOT_ALLOWED, description);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let (head, body) = request.into_parts();
    // The caller is authenticated before the body is read.
    let caller = match introspection::authenticate(verifier, &head) {
        Ok(caller) => caller,
        Err(refusal) => return *refusal,
    };
    match bodies.receive(Request::from_parts(head, body), introspection::LARGEST).await {
        Ok((head, received)) => introspection::answer(verifier, &caller, &head, &received.bytes),
        Err(why) => unread(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_selects_the_front_end_and_client_paths_do_not_change_the_segment() {
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
        assert_eq!(
            route("/caddy/"),
            Some((FrontEnd::Caddy, "")),
            "an empty requirement is refused later, as misconfigured"
        );
    }
}
