//! RFC 7662: a protected resource asks what a key is. It authenticates by a key of its own, which has to have one
//! permission, so that nobody can try values here who could not try them at a route.

use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Serialize;

use super::{Verifier, answer, decision, journal::FrontEnd};
use crate::domain::{
    credential::{self, Credential, Source},
    requirement::Requirement,
};

/// The path.
pub const PATH: &str = "/introspect";

/// The largest body that is read: a key is short, and legacy ones are not long.
pub const LARGEST: usize = 16 << 10;

/// RFC 7662, section 2.2. Of a key that does not work, nothing else is said.
#[derive(Debug, Default, Serialize)]
struct Answer {
    active: bool,
    /// The permissions, separated by spaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    username: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sub: Option<String>,
    /// Names of our own (section 2.2 allows them).
    #[serde(rename = "keywright_key_name", skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "keywright_key_type", skip_serializing_if = "Option::is_none")]
    key_type: Option<&'static str>,
    #[serde(rename = "keywright_team", skip_serializing_if = "Option::is_none")]
    team: Option<String>,
}

/// Whether somebody may not ask: by the head alone, before anything else is read.
///
/// The answer, if they may not.
#[must_use]
pub fn refuse(verifier: &Verifier, head: &Parts) -> Option<Response<Full<Bytes>>> {
    let Some(permission) = &verifier.options.introspection_permission else {
        return Some(plain(StatusCode::NOT_FOUND, "introspection is off: see --introspection-permission"));
    };
    // Only the header: the body is where the other key is.
    let own = [Source::Authorization];
    let header = |name| head.headers.get_all(name).into_iter().map(HeaderValue::as_bytes);
    let credential = credential::find(&own, header, None);
    let requirement = Requirement::of([("permission".into(), permission.as_str().into())], None);
    let traceparent = || head.headers.get("traceparent").map(HeaderValue::as_bytes);
    let verdict = verifier.decide(FrontEnd::Introspection, &credential, requirement, traceparent);
    verdict.err().map(|refusal| answer::refuse(&refusal))
}

/// Answers somebody who may ask.
#[must_use]
pub fn answer(verifier: &Verifier, head: &Parts, body: &[u8]) -> Response<Full<Bytes>> {
    let form = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_form = form.is_some_and(|form| {
        form.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
    });
    let mut tokens = form_urlencoded::parse(body).filter(|(name, _)| name == "token").map(|(_, value)| value);
    let (true, Some(token), None) = (is_form, tokens.next(), tokens.next()) else {
        return plain(StatusCode::BAD_REQUEST, "send the key as the one parameter token of a form");
    };
    let body = serde_json::to_vec(&introspect(verifier, token.as_bytes())).unwrap_or_default();
    json(StatusCode::OK, body)
}

fn introspect(verifier: &Verifier, token: &[u8]) -> Answer {
    let now = verifier.clock.exact();
    let source = Source::Authorization;
    let credential = Credential::One(token.into(), &source);
    let any = Requirement::of([("permission".into(), crate::domain::requirement::NONE.into())], None);
    let answer = decision::decide_and(&verifier.keys, &credential, any, now, |key, known| Answer {
        active: true,
        scope: Some(known.permissions().collect::<Vec<_>>().join(" ")),
        username: Some(key.user.clone()).filter(|user| !user.is_empty()),
        token_type: Some("Bearer"),
        exp: known.ends().map(|end| end.div_euclid(1000)),
        sub: Some(if key.user.is_empty() { key.id.clone() } else { key.user }),
        client_id: Some(key.id),
        name: Some(key.name),
        key_type: Some(answer::type_name(key.key_type)),
        team: Some(key.team),
    });
    answer.unwrap_or_default()
}

/// An answer that is no decision.
#[must_use]
pub fn plain(status: StatusCode, description: &str) -> Response<Full<Bytes>> {
    let error = if status == StatusCode::NOT_FOUND { "not_found" } else { "invalid_request" };
    json(status, serde_json::json!({"error": error, "error_description": description}).to_string().into_bytes())
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
