//! The front ends that ask by a plain HTTP request: Envoy ext_authz over HTTP, nginx `auth_request`, Caddy
//! `forward_auth`, Traefik `ForwardAuth`.
//!
//! What the route asks for is one segment of the path, which the proxy's configuration writes whole. Nothing else of the
//! request has a say: not the query (Caddy hands on the client's), not the rest of the path (Envoy appends the
//! client's), not a header. Where a header tells the original URI, it is only searched for a key, and a client could
//! have sent that key anyhow.

use http::{HeaderValue, Response, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;

use super::{Verifier, answer, journal::FrontEnd};
use crate::domain::{
    credential::{self, Credential, Source},
    requirement::Requirement,
};

/// Answers a proxy. `segment` is what its configuration says that the route asks for.
#[must_use]
pub fn check(verifier: &Verifier, front_end: FrontEnd, head: &Parts, segment: &str) -> Response<Full<Bytes>> {
    let options = &verifier.options;
    let requirement = Requirement::of_segment(segment, options.default_permission.as_deref());
    let query = if verifier.reads_queries() { original_query(front_end, head) } else { None };
    let header = |name| head.headers.get_all(name).into_iter().map(HeaderValue::as_bytes);
    let credential = credential::find(&options.sources, header, query);
    let traceparent = || head.headers.get("traceparent").map(HeaderValue::as_bytes);
    match verifier.decide(front_end, &credential, requirement, traceparent) {
        Ok(identity) => {
            let mut response = answer::allow(identity);
            if front_end == FrontEnd::EnvoyHttp {
                strip(&credential, &mut response);
            }
            response
        }
        Err(refusal) => answer::refuse(&refusal),
    }
}

/// The query of the request that the client sent.
fn original_query(front_end: FrontEnd, head: &Parts) -> Option<&str> {
    let header = match front_end {
        FrontEnd::EnvoyHttp => return head.uri.query(),
        FrontEnd::Nginx => "x-original-uri",
        FrontEnd::Caddy | FrontEnd::Traefik => "x-forwarded-uri",
        FrontEnd::EnvoyGrpc | FrontEnd::Introspection => return None,
    };
    Some(head.headers.get(header)?.to_str().ok()?.split_once('?')?.1)
}

/// Has Envoy take the key out of what goes upstream. Of the four, it is the one that can be told.
fn strip(credential: &Credential<'_>, response: &mut Response<Full<Bytes>>) {
    if let Credential::One(_, source) = credential
        && let Some(header) = Source::header(source)
        && let Ok(name) = HeaderValue::from_str(header)
    {
        response.headers_mut().insert("x-envoy-auth-headers-to-remove", name);
    }
}
