//! The front ends that use plain HTTP requests: Envoy ext_authz over HTTP, nginx `auth_request`, Caddy
//! `forward_auth`, Traefik `ForwardAuth`.
//!
//! The requirement of a route is one segment of the path, which the configuration of the proxy sets completely. It is
//! read from no other part of the request: not from the query (Caddy forwards that of the client), not from the rest of
//! the path (Envoy appends that of the client), and not from a header. A header with the original URI is only searched
//! for a key, which the client could have sent anyway.

use http::{HeaderValue, Response, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;

use super::{Verifier, answer, decision_log::FrontEnd};
use crate::domain::{
    credential::{self, Credential, Source},
    requirement::Requirement,
};

/// Answers a proxy. `segment` is the requirement of the route, from the configuration of the proxy.
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

/// Returns the query of the original request of the client.
fn original_query(front_end: FrontEnd, head: &Parts) -> Option<&str> {
    let header = match front_end {
        FrontEnd::EnvoyHttp => return head.uri.query(),
        FrontEnd::Nginx => "x-original-uri",
        FrontEnd::Caddy | FrontEnd::Traefik => "x-forwarded-uri",
        FrontEnd::EnvoyGrpc | FrontEnd::Introspection => return None,
    };
    Some(head.headers.get(header)?.to_str().ok()?.split_once('?')?.1)
}

/// Makes Envoy remove the key from the upstream request. The other three proxies have no header for that.
fn strip(credential: &Credential<'_>, response: &mut Response<Full<Bytes>>) {
    if let Credential::One(_, source) = credential
        && let Some(header) = Source::header(source)
        && let Ok(name) = HeaderValue::from_str(header)
    {
        response.headers_mut().insert("x-envoy-auth-headers-to-remove", name);
    }
}
