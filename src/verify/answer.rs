//! The responses to a proxy, which forwards refusals to the client.

use std::{borrow::Cow, fmt::Write};

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Bytes;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::decision::{KeyIdentity, Refusal};
use crate::{api::KeyType, domain::verification::Reason};

/// The identity headers. An allow response sets every one of them, empty if it has no value: otherwise a proxy could
/// let a header of the same name from the client through.
pub const IDENTITY: [&str; 5] =
    ["x-keywright-key-id", "x-keywright-key-name", "x-keywright-key-type", "x-keywright-team", "x-keywright-user"];

/// The characters of a user name that are percent-encoded in a header. The percent sign is one, so that the encoding is
/// reversible.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%').add(b' ');

/// Returns the values of the identity headers, in the order of [`IDENTITY`].
#[must_use]
pub fn identity(identity: KeyIdentity) -> [Cow<'static, str>; 5] {
    let KeyIdentity { id, name, team, user, key_type } = identity;
    let user = match Cow::from(utf8_percent_encode(&user, ESCAPED)) {
        Cow::Borrowed(_) => user,
        Cow::Owned(escaped) => escaped,
    };
    [id.into(), name.into(), type_name(key_type).into(), team.into(), user.into()]
}

/// Returns the name of a type, as in the spec.
#[must_use]
pub const fn type_name(key_type: KeyType) -> &'static str {
    match key_type {
        KeyType::Personal => "Personal",
        KeyType::SendYourData => "SendYourData",
        KeyType::Team => "Team",
    }
}

/// Returns the response that allows a request.
#[must_use]
pub fn allow(key: KeyIdentity) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    let headers = response.headers_mut();
    headers.reserve(IDENTITY.len() + 1);
    for (name, value) in IDENTITY.into_iter().zip(identity(key)) {
        let value = match value {
            Cow::Borrowed(value) => HeaderValue::from_static(value),
            Cow::Owned(value) => header_value(value),
        };
        headers.insert(HeaderName::from_static(name), value);
    }
    response
}

/// Returns a header value; empty if the text has bytes that no header may have.
fn header_value(value: String) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(value)).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Returns the response that refuses a request.
#[must_use]
pub fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body(refusal)));
    *response.status_mut() = status(refusal.reason);
    refusal_headers(refusal, response.headers_mut());
    response
}

/// Returns the status code of a refusal.
#[must_use]
pub fn status(reason: Reason) -> StatusCode {
    StatusCode::from_u16(reason.status()).unwrap_or(StatusCode::FORBIDDEN)
}

/// Adds the headers of a refusal.
pub fn refusal_headers(refusal: &Refusal, headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if refusal.reason.status() == 503 {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    } else {
        headers.insert(header::WWW_AUTHENTICATE, header_value(challenge(refusal)));
    }
}

/// Returns the challenge of RFC 6750, section 3.
fn challenge(refusal: &Refusal) -> String {
    let mut challenge = "Bearer realm=\"keywright\"".to_owned();
    if let Some(error) = refusal.reason.error() {
        let _ = write!(challenge, ", error=\"{error}\", error_description=\"{}\"", refusal.description);
    }
    if let Some(scope) = &refusal.scope {
        let _ = write!(challenge, ", scope=\"{scope}\"");
    }
    challenge
}

/// Returns the body of a refusal.
#[must_use]
pub fn body(refusal: &Refusal) -> String {
    let error = refusal.reason.error().unwrap_or(match refusal.reason.status() {
        503 => "temporarily_unavailable",
        _ => "unauthorized",
    });
    serde_json::json!({"error": error, "error_description": refusal.description}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of_user(user: &str) -> KeyIdentity {
        KeyIdentity {
            id: "key_0123456789abcdef".to_owned(),
            name: "checkout".to_owned(),
            team: "shop".to_owned(),
            user: user.to_owned(),
            key_type: KeyType::Personal,
        }
    }

    #[test]
    fn an_allow_response_has_every_identity_header_for_any_user_name() {
        for (user, header) in [
            ("", ""),
            ("alice@example.com", "alice@example.com"),
            ("system:serviceaccount:a:b", "system:serviceaccount:a:b"),
            ("a\r\nx-evil: 1", "a%0D%0Ax-evil:%201"),
            ("J\u{fc}rgen 100%", "J%C3%BCrgen%20100%25"),
        ] {
            let response = allow(key_of_user(user));
            assert_eq!(response.status(), 200);
            for name in IDENTITY {
                assert_eq!(response.headers().get_all(name).iter().count(), 1, "{name}");
            }
            assert_eq!(response.headers()["x-keywright-user"], header);
            assert_eq!(response.headers()["x-keywright-team"], "shop");
            assert_eq!(response.headers()["x-keywright-key-type"], "Personal");
        }
    }

    #[test]
    fn a_refusal_has_the_status_and_challenge_of_rfc_6750() {
        let of = |reason| refuse(&Refusal::of(reason));
        let challenge = |response: &Response<Full<Bytes>>| {
            response.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned())
        };
        let none = of(Reason::NoKey);
        assert_eq!((none.status().as_u16(), challenge(&none).unwrap().as_str()), (401, "Bearer realm=\"keywright\""));
        let unknown = of(Reason::Unknown);
        assert_eq!(unknown.status(), 401);
        assert!(challenge(&unknown).unwrap().contains("error=\"invalid_token\", error_description=\"there is no"));
        let lacking = refuse(&Refusal { scope: Some("a:Read b:Read".into()), ..Refusal::of(Reason::LacksPermission) });
        assert_eq!(lacking.status(), 403);
        assert!(challenge(&lacking).unwrap().contains("error=\"insufficient_scope\""));
        assert!(challenge(&lacking).unwrap().ends_with("scope=\"a:Read b:Read\""));
        let stale = of(Reason::Stale);
        assert_eq!((stale.status().as_u16(), challenge(&stale)), (503, None));
        assert!(stale.headers().contains_key("retry-after"));
        assert!(body(&Refusal::of(Reason::NotSynced)).contains("temporarily_unavailable"));
    }
}
