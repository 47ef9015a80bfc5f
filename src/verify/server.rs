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
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use tower::Service;

use super::{Verifier, envoy_grpc, forward_auth, introspection, journal::FrontEnd};
use crate::runtime::listener::{Bodies, Unread};

/// The memory for the bodies of all requests that are under way. A message of Envoy has one or two kilobytes and is there at
/// once, so that this is reached by those alone who send slowly on purpose; the slowest then make room.
pub const BODIES: usize = 8 << 20;

/// A body is complete in memory, or gRPC's.
pub type Body = Either<Full<Bytes>, tonic::body::Body>;

/// An answer that is there at once, or that has to wait for the body of its request.
pub type Answer = EitherFuture<
    Ready<Result<Response<Body>, Infallible>>,
    Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>,
>;

/// Every front end, as one service.
#[derive(Clone)]
pub struct Checks {
    /// What all front ends share.
    pub verifier: Arc<Verifier>,
    /// What all requests share.
    pub bodies: Arc<Bodies>,
}

impl Service<Request<Incoming>> for Checks {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path();
        let (grpc, introspects) = (path == envoy_grpc::PATH, path == introspection::PATH);
        if !grpc && !introspects {
            // Bodies are of no interest, and are not read.
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

/// Answers Envoy's call, once all of its message is there.
async fn check(verifier: Arc<Verifier>, bodies: &Bodies, request: Request<Incoming>) -> Response<Body> {
    match bodies.receive(request, envoy_grpc::LARGEST).await {
        Ok((head, received)) => {
            let call = Request::from_parts(head, Full::new(received.bytes.clone()));
            envoy_grpc::call(verifier, call).await.map(Either::Right)
        }
        Err(why) => unread(why).map(Either::Left),
    }
}

/// A request whose body did not arrive.
fn unread(why: Unread) -> Response<Full<Bytes>> {
    let mut response = introspection::plain(why.status(), &why.to_string());
    if why == Unread::NoRoom {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
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

async fn introspect(verifier: &Verifier, bodies: &Bodies, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method().as_str() != "POST" {
        let description = "introspection is a POST (RFC 7662, section 2.1)";
        let mut response = introspection::plain(StatusCode::METHOD_NOT_ALLOWED, description);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let (head, body) = request.into_parts();
    // The body of a request that may not ask is not read.
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
