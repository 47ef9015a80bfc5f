//! Token introspection (RFC 7662): a protected resource asks for the properties of a key. It authenticates by a key of
//! its own with a configured permission, so that introspection does not help to guess values. The answer covers only
//! keys of its own team, unless its key has a second permission.
//!
//! It sends its key as `Bearer KEY`, or by HTTP Basic as a client secret (RFC 6749, section 2.3.1), as most libraries
//! of resource servers do.

use std::borrow::Cow;

use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;
use k8s_openapi::ByteString;
use percent_encoding::percent_decode;
use serde::Serialize;

use super::{Refusal, Verifier, answer, decision, decision_log::FrontEnd};
use crate::domain::{
    credential::{self, Credential, Source},
    key::{self, Digest},
    requirement::{Misconfigured, NONE, Requirement},
};

/// The path of the endpoint.
pub const PATH: &str = "/introspect";

/// The maximum size of a request body in bytes: minted keys are short, and legacy keys are not long.
pub const LARGEST: usize = 16 << 10;

/// The response of RFC 7662, section 2.2. For a key that does not work it contains only `active`.
#[derive(Debug, Default, Serialize)]
struct IntrospectionResponse {
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
    // Extensions, which section 2.2 allows.
    #[serde(rename = "keywright_key_name", skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "keywright_key_type", skip_serializing_if = "Option::is_none")]
    key_type: Option<&'static str>,
    #[serde(rename = "keywright_team", skip_serializing_if = "Option::is_none")]
    team: Option<String>,
}

/// An authenticated caller of introspection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntrospectionCaller {
    /// The namespace whose keys the caller may introspect; `None` for every namespace.
    team: Option<String>,
}

/// Authenticates a caller by the head of the request, before the body is read.
///
/// # Errors
/// The response, if the caller may not introspect.
pub fn authenticate(verifier: &Verifier, head: &Parts) -> Result<IntrospectionCaller, Box<Response<Full<Bytes>>>> {
    let options = &verifier.options;
    let Some(permission) = &options.introspection_permission else {
        let disabled = plain(StatusCode::NOT_FOUND, "introspection is disabled: set --introspection-permission");
        return Err(Box::new(disabled));
    };
    let source = Source::Authorization;
    let credential = credential(verifier, head, &source);
    let traceparent = || head.headers.get("traceparent").map(HeaderValue::as_bytes);
    let identity = verifier.decide(FrontEnd::Introspection, &credential, requirement_of(permission), traceparent);
    let identity = identity.map_err(|refusal| Box::new(refuse(&refusal)))?;
    // A permission that no catalog has is a permission that no key has.
    let everywhere = options.introspection_cluster_permission.as_ref().is_some_and(|permission| {
        let now = verifier.clock.exact();
        decision::decide(&verifier.keys, &credential, requirement_of(permission), now).is_ok()
    });
    Ok(IntrospectionCaller { team: (!everywhere).then_some(identity.team) })
}

fn requirement_of(permission: &str) -> Result<Requirement<'_>, Misconfigured> {
    Requirement::of([("permission".into(), permission.into())], None)
}

/// Returns the response for a refusal. With status 401 it also offers HTTP Basic.
fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    let mut response = answer::refuse(refusal);
    if refusal.reason.status() == 401 {
        response.headers_mut().append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"keywright\""));
    }
    response
}

/// Finds the key of the caller, only in the header: the body holds the key to introspect.
fn credential<'a>(verifier: &Verifier, head: &'a Parts, source: &'a Source) -> Credential<'a> {
    let mut values = head.headers.get_all(header::AUTHORIZATION).into_iter().map(HeaderValue::as_bytes);
    let (first, second) = (values.next(), values.next());
    let found = match (first, second) {
        (Some(value), None) => basic(value).map_or_else(
            || credential::bearer(value).map(|value| Some(Cow::Borrowed(value))),
            |pair| Some(of_pair(verifier, &pair).map(Cow::Owned)),
        ),
        (None, _) => None,
        (Some(_), Some(_)) => Some(None),
    };
    match found {
        Some(Some(value)) if !value.is_empty() => Credential::One(value, source),
        Some(Some(_)) | None => Credential::None,
        Some(None) => Credential::Several,
    }
}

/// Returns user name and password of `Basic` (RFC 7617, section 2), as sent.
fn basic(value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (scheme, rest) = value.trim_ascii().split_at_checked(5)?;
    let encoded = rest.strip_prefix(b" ").filter(|_| scheme.eq_ignore_ascii_case(b"basic"))?;
    let encoded = std::str::from_utf8(encoded.trim_ascii()).ok()?;
    let mut user = serde_json::from_value::<ByteString>(encoded.into()).ok()?.0;
    let colon = user.iter().position(|byte| *byte == b':')?;
    let password = user.split_off(colon + 1);
    user.truncate(colon);
    Some((user, password))
}

/// Returns the key of a pair: the password; or the user name, if the password is empty or only the user name has the
/// form of a minted key. `None` if both have it.
fn of_pair(verifier: &Verifier, (user, password): &(Vec<u8>, Vec<u8>)) -> Option<Vec<u8>> {
    let is_key = |value: &[u8]| std::str::from_utf8(value).is_ok_and(key::is_well_formed);
    let sent = match (is_key(user), is_key(password)) {
        (true, true) => return None,
        (true, false) => user,
        (false, _) if password.is_empty() => user,
        (false, _) => password,
    };
    // RFC 6749 requires form encoding, which many clients omit. A minted key is the same with and without it. A legacy
    // key may differ: the value as sent is used if it is a known key.
    let known = verifier.keys.look_up(&Digest::of(sent), |_, known| known.is_some());
    Some(if known { sent.clone() } else { decoded(sent) })
}

/// Decodes a form-encoded value.
fn decoded(value: &[u8]) -> Vec<u8> {
    let spaced: Vec<u8> = value.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
    percent_decode(&spaced).collect()
}

/// Answers an authenticated caller.
#[must_use]
pub fn answer(verifier: &Verifier, caller: &IntrospectionCaller, head: &Parts, body: &[u8]) -> Response<Full<Bytes>> {
    let form = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_form = form.is_some_and(|form| {
        form.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
    });
    let mut tokens = form_urlencoded::parse(body).filter(|(name, _)| name == "token").map(|(_, value)| value);
    let (true, Some(token), None) = (is_form, tokens.next(), tokens.next()) else {
        return plain(StatusCode::BAD_REQUEST, "send the key once, as form parameter token");
    };
    let body = serde_json::to_vec(&introspect(verifier, caller, token.as_bytes())).unwrap_or_default();
    json(StatusCode::OK, body)
}

fn introspect(verifier: &Verifier, caller: &IntrospectionCaller, token: &[u8]) -> IntrospectionResponse {
    let now = verifier.clock.exact();
    let source = Source::Authorization;
    let credential = Credential::One(token.into(), &source);
    let team = caller.team.iter().map(|team| ("team".into(), team.as_str().into()));
    let requirement = Requirement::of([("permission".into(), NONE.into())].into_iter().chain(team), None);
    let answer =
        decision::decide_and(&verifier.keys, &credential, requirement, now, |key, known| IntrospectionResponse {
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

/// Returns an error response for a request that was not decided.
#[must_use]
pub fn plain(status: StatusCode, description: &str) -> Response<Full<Bytes>> {
    let error = match status {
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::SERVICE_UNAVAILABLE => "temporarily_unavailable",
        _ => "invalid_request",
    };
    json(status, serde_json::json!({"error": error, "error_description": description}).to_string().into_bytes())
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use http::Request;
    use jiff::Timestamp;
    use kube::runtime::watcher::Event;

    use super::*;
    use crate::{
        api::{ApiKey, KeyType, Time},
        clock::Clock,
        domain::{catalog::Catalog, key::Key},
        index::key_index::KeyIndex,
        test_support::{catalog_spec, key_with_values as key, permission},
        verify::{
            VerifierOptions,
            decision_log::{DecisionLog, Sampling},
            freshness::{Freshness, Stage},
        },
    };

    /// A legacy value that form decoding would change.
    const LEGACY: &str = "legacy+value%41:of some length";

    fn minted() -> String {
        Key::mint(KeyType::Team, &mut rand::rngs::SysRng).unwrap().expose().to_owned()
    }

    fn key_of(team: &str, name: &str, value: &str, permissions: &[&str]) -> ApiKey {
        let mut key = key(team, name, 1, &[0]);
        let permissions: Vec<_> = permissions.iter().map(ToString::to_string).collect();
        key.spec.permissions.clone_from(&permissions);
        let status = key.status.as_mut().unwrap();
        status.permissions = permissions;
        status.tokens[0].sha256 = Digest::of(value.as_bytes()).to_string();
        status.tokens[0].minted_at = Time(Timestamp::from_second(1).unwrap());
        key
    }

    fn verifier(keys: &[ApiKey]) -> Verifier {
        let freshness = Freshness::default();
        let at = Timestamp::from_second(1000).unwrap();
        for heartbeat in [freshness.keys(), freshness.catalogs()] {
            heartbeat.heard(Stage::Listed, at);
        }
        let key_index = KeyIndex::default();
        let permissions = ["keys:Read", "keys:ReadAll", "b:Read"].map(|name| permission(name, false)).into();
        key_index.set_catalog(Arc::new(Catalog::merge([("all", &catalog_spec(permissions, vec![]))]).0));
        for key in keys {
            key_index.apply(&Event::Apply(key.clone()));
        }
        Verifier {
            keys: Arc::new(key_index),
            freshness,
            clock: Clock::of(move || at),
            options: VerifierOptions {
                sources: vec![Source::Authorization],
                default_permission: None,
                introspection_permission: Some("keys:Read".to_owned()),
                introspection_cluster_permission: Some("keys:ReadAll".to_owned()),
                tell_key_names: false,
                max_staleness: Some(Duration::from_mins(10)),
            },
            decision_log: DecisionLog::new(Sampling { allowed_one_in: 0, refused_per_second: 0 }),
        }
    }

    fn head(authorization: &[&[u8]]) -> Parts {
        let mut request = Request::post(PATH).header("content-type", "application/x-www-form-urlencoded;charset=UTF-8");
        for value in authorization {
            request = request.header("authorization", *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn base64(text: &[u8]) -> String {
        serde_json::to_value(ByteString(text.to_vec())).unwrap().as_str().unwrap().to_owned()
    }

    fn basic_of(user: &str, password: &str) -> Vec<u8> {
        format!("Basic {}", base64(format!("{user}:{password}").as_bytes())).into_bytes()
    }

    fn encoded(text: &str) -> String {
        form_urlencoded::byte_serialize(text.as_bytes()).collect()
    }

    /// Introspects `token`; returns the status and `active` of the response.
    fn ask(verifier: &Verifier, authorization: &[&[u8]], token: &str) -> (u16, Option<bool>) {
        let head = head(authorization);
        let caller = match authenticate(verifier, &head) {
            Ok(caller) => caller,
            Err(refusal) => return (refusal.status().as_u16(), None),
        };
        let answer = answer(verifier, &caller, &head, format!("token={}", encoded(token)).as_bytes());
        assert_eq!(answer.status(), 200);
        (200, Some(introspect(verifier, &caller, token.as_bytes()).active))
    }

    #[test]
    fn a_caller_authenticates_by_bearer_or_by_either_part_of_basic() {
        let (own, other) = (minted(), minted());
        let verifier = verifier(&[
            key_of("shop", "own", &own, &["keys:Read"]),
            key_of("shop", "legacy", LEGACY, &["keys:Read"]),
            key_of("shop", "other", &other, &["b:Read"]),
        ]);
        let bearer = format!("Bearer {own}").into_bytes();
        let lower = String::from_utf8(basic_of("id", &own)).unwrap().replacen("Basic", "basic", 1).into_bytes();
        for authorization in [
            bearer.clone(),
            // Spring and others: client id and secret, each form-encoded.
            basic_of("resource-server", &own),
            basic_of(&encoded("a client: 100%"), &encoded(&own)),
            basic_of("", &own),
            lower,
            // curl -u KEY: and clients that require a password.
            basic_of(&own, ""),
            basic_of(&own, "x"),
            // A legacy value with a colon, a plus and a percent sign, form-encoded and as it is.
            basic_of("client", &encoded(LEGACY)),
            basic_of("client", LEGACY),
        ] {
            assert_eq!(ask(&verifier, &[&authorization], &other), (200, Some(true)), "{}", authorization.len());
        }
        for (authorization, status) in [
            (basic_of("client", "nothing"), 401),
            (basic_of("", ""), 401),
            (basic_of("client", &other), 403),
            (basic_of(&own, &other), 400),
            (basic_of(&own, &own), 400),
            (b"Basic not base64".to_vec(), 401),
            (format!("Basic {}", base64(own.as_bytes())).into_bytes(), 401),
            (format!("Digest {own}").into_bytes(), 401),
        ] {
            assert_eq!(ask(&verifier, &[&authorization], &other).0, status, "{}", authorization.len());
        }
        assert_eq!(ask(&verifier, &[], &other).0, 401);
        assert_eq!(ask(&verifier, &[&bearer, &bearer], &other).0, 400);
        assert_eq!(ask(&verifier, &[&bearer, &basic_of("client", &own)], &other).0, 400);
    }

    #[test]
    fn a_401_response_offers_bearer_and_basic() {
        let refusal = authenticate(&verifier(&[]), &head(&[])).unwrap_err();
        let challenges: Vec<_> = refusal.headers().get_all("www-authenticate").into_iter().collect();
        assert_eq!(challenges, ["Bearer realm=\"keywright\"", "Basic realm=\"keywright\""]);
    }

    #[test]
    fn keys_of_other_teams_are_inactive_without_the_cluster_permission() {
        let (own, everywhere, theirs) = (minted(), minted(), minted());
        let mut verifier = verifier(&[
            key_of("shop", "own", &own, &["keys:Read"]),
            key_of("shop", "everywhere", &everywhere, &["keys:Read", "keys:ReadAll"]),
            key_of("bank", "theirs", &theirs, &["b:Read"]),
        ]);
        let (bearer, all) = (format!("Bearer {own}").into_bytes(), format!("Bearer {everywhere}").into_bytes());
        assert_eq!(ask(&verifier, &[&bearer], &everywhere), (200, Some(true)));
        assert_eq!(ask(&verifier, &[&bearer], &theirs), (200, Some(false)));
        assert_eq!(ask(&verifier, &[&all], &theirs), (200, Some(true)));
        // The cluster permission alone does not suffice.
        verifier.keys.apply(&Event::Apply(key_of("shop", "everywhere", &everywhere, &["keys:ReadAll"])));
        assert_eq!(ask(&verifier, &[&all], &theirs).0, 403);
        // Nor does a cluster permission that is in no catalog, or that is not configured.
        verifier.keys.apply(&Event::Apply(key_of("shop", "everywhere", &everywhere, &["keys:Read", "keys:ReadAll"])));
        for permission in [Some("no.such:Thing".to_owned()), None] {
            verifier.options.introspection_cluster_permission = permission;
            assert_eq!(ask(&verifier, &[&all], &theirs), (200, Some(false)));
        }
    }
}
