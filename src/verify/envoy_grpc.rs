//! Envoy's external authorization, `envoy.service.auth.v3.Authorization`, over gRPC.
//!
//! The requirement of a route comes from its `context_extensions`, which only the configuration of Envoy can set. The
//! message types here have only those fields of Envoy's messages that are read or written, under their original
//! numbers; the decoder skips other fields without copying them.

use std::{
    borrow::Cow,
    future::{Ready, ready},
    sync::Arc,
};

use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Bytes};
use tonic::{Status, server::UnaryService};
use tonic_prost::ProstCodec;

use super::{Verifier, answer, decision::KeyIdentity, decision_log::FrontEnd};
use crate::domain::{
    credential::{self, Credential, Source},
    requirement::Requirement,
    verification::Reason,
};

/// The path of the one method.
pub const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The maximum size of a message in bytes: the headers that Envoy accepts by default (60 KiB), the path once more, and
/// further attributes.
pub const LARGEST: usize = 128 << 10;

/// Answers one gRPC call.
pub async fn call<B>(verifier: Arc<Verifier>, request: Request<B>) -> Response<tonic::body::Body>
where
    B: Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let codec = ProstCodec::<CheckResponse, CheckRequest>::default();
    let mut grpc = tonic::server::Grpc::new(codec).apply_max_message_size_config(Some(LARGEST), None);
    grpc.unary(Check(verifier), request).await
}

struct Check(Arc<Verifier>);

impl UnaryService<CheckRequest> for Check {
    type Response = CheckResponse;
    type Future = Ready<Result<tonic::Response<CheckResponse>, Status>>;

    fn call(&mut self, request: tonic::Request<CheckRequest>) -> Self::Future {
        ready(Ok(tonic::Response::new(check(&self.0, &request.into_inner()))))
    }
}

/// Decides on a request message.
#[must_use]
pub fn check(verifier: &Verifier, message: &CheckRequest) -> CheckResponse {
    let defaults = (AttributeContext::default(), HttpRequest::default());
    let attributes = message.attributes.as_ref().unwrap_or(&defaults.0);
    let request = attributes.request.as_ref().and_then(|request| request.http.as_ref()).unwrap_or(&defaults.1);
    let options = &verifier.options;
    let extensions = attributes.context_extensions.iter();
    let requirement = Requirement::of(
        extensions.map(|pair| (pair.key.as_str().into(), pair.value.as_str().into())),
        options.default_permission.as_deref(),
    );
    let query = request.path.split_once('?').map(|(_, query)| query);
    let credential = credential::find(&options.sources, |name| request.values(name), query);
    let traceparent = || request.values("traceparent").next();
    match verifier.decide(FrontEnd::EnvoyGrpc, &credential, requirement, traceparent) {
        Ok(identity) => CheckResponse {
            status: Some(RpcStatus { code: 0 }),
            response: Some(check_response::HttpResponse::Ok(allow(identity, &credential, request))),
        },
        Err(refusal) => {
            let mut headers = HeaderMap::new();
            answer::refusal_headers(&refusal, &mut headers);
            let copied = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
            let headers = headers
                .iter()
                .map(|(name, value)| HeaderValueOption::set(copied(name.as_ref()), copied(value.as_bytes())));
            CheckResponse {
                status: Some(RpcStatus { code: code(refusal.reason) }),
                response: Some(check_response::HttpResponse::Denied(DeniedHttpResponse {
                    status: Some(HttpStatus { code: i32::from(refusal.reason.status()) }),
                    headers: headers.collect(),
                    body: answer::body(&refusal),
                })),
            }
        }
    }
}

fn allow(identity: KeyIdentity, credential: &Credential<'_>, request: &HttpRequest) -> OkHttpResponse {
    let values = answer::identity(identity);
    let names = answer::IDENTITY.into_iter();
    let headers = names.zip(values).map(|(name, value)| {
        let value = match value {
            Cow::Borrowed(value) => Bytes::from_static(value.as_bytes()),
            Cow::Owned(value) => Bytes::from(value),
        };
        HeaderValueOption::set(Bytes::from_static(name.as_bytes()), value)
    });
    let mut answer = OkHttpResponse { headers: headers.collect(), ..OkHttpResponse::default() };
    if let Credential::One(_, source) = credential {
        match source {
            Source::Query(name) => answer.query_parameters_to_remove.push(name.clone()),
            Source::Authorization | Source::Header(_) => {
                let name = source.header().map(|name| Bytes::copy_from_slice(name.as_bytes()));
                answer.headers_to_remove.extend(name);
            }
        }
    }
    // Many upstreams treat X_Keywright_User and X.Keywright.User as the same header, so such headers of the client are
    // removed.
    let alike = |name: &&Bytes| answer::IDENTITY.iter().any(|own| is_alike(name, own));
    let raw = request.header_map.iter().flat_map(|map| &map.headers).map(|header| &header.key);
    let names = request.headers.iter().map(|pair| &pair.key).chain(raw);
    answer.headers_to_remove.extend(names.filter(alike).cloned());
    answer
}

/// Whether a name differs from `own`, and an upstream could treat both as the same.
fn is_alike(name: &[u8], own: &str) -> bool {
    let folded = |byte: &u8| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' };
    name.len() == own.len() && !name.eq_ignore_ascii_case(own.as_bytes()) && name.iter().map(folded).eq(own.bytes())
}

/// Returns the gRPC code of a refusal (`google.rpc.Code`).
const fn code(reason: Reason) -> i32 {
    match reason.status() {
        400 => 3,
        401 => 16,
        403 => 7,
        _ => 14,
    }
}

/// `envoy.service.auth.v3.CheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckRequest {
    /// The attributes of the request.
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<AttributeContext>,
}

/// `envoy.service.auth.v3.AttributeContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AttributeContext {
    /// The request.
    #[prost(message, optional, tag = "4")]
    pub request: Option<AttributeRequest>,
    /// The extensions from the configuration of the route. A map, decoded as its entries on the wire.
    #[prost(message, repeated, tag = "10")]
    pub context_extensions: Vec<Extension>,
}

/// `envoy.service.auth.v3.AttributeContext.Request`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AttributeRequest {
    /// The HTTP request.
    #[prost(message, optional, tag = "2")]
    pub http: Option<HttpRequest>,
}

/// `envoy.service.auth.v3.AttributeContext.HttpRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HttpRequest {
    /// The headers; values of the same name are joined by commas.
    #[prost(message, repeated, tag = "3")]
    pub headers: Vec<HeaderPair>,
    /// The path with the query.
    #[prost(string, tag = "4")]
    pub path: String,
    /// The unmodified headers, if Envoy is configured to send them (`encode_raw_headers`).
    #[prost(message, optional, tag = "13")]
    pub header_map: Option<RawHeaders>,
}

impl HttpRequest {
    /// Returns the values of a header by its name in lower case.
    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        let of_map = self.headers.iter().map(|pair| (&pair.key, &*pair.value));
        let raw = self.header_map.iter().flat_map(|map| &map.headers).map(|header| {
            let value = if header.raw_value.is_empty() { &header.value } else { &header.raw_value };
            (&header.key, &**value)
        });
        let matches = move |key: &[u8]| key.eq_ignore_ascii_case(name.as_bytes());
        of_map.chain(raw).filter(move |(key, _)| matches(key)).map(|(_, value)| value)
    }
}

/// An entry of a map of headers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderPair {
    /// The name.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// `envoy.config.core.v3.HeaderMap`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RawHeaders {
    /// The headers, one entry for each value.
    #[prost(message, repeated, tag = "1")]
    pub headers: Vec<RawHeader>,
}

/// `envoy.config.core.v3.HeaderValue` in a request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RawHeader {
    /// The name.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value as text.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// The value as bytes, in place of `value`.
    #[prost(bytes = "bytes", tag = "3")]
    pub raw_value: Bytes,
}

/// An entry of a map of strings.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Extension {
    /// The name.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `envoy.service.auth.v3.CheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckResponse {
    /// The decision: only code 0 allows the request.
    #[prost(message, optional, tag = "1")]
    pub status: Option<RpcStatus>,
    /// The response to the client, or the changes to the request.
    #[prost(oneof = "check_response::HttpResponse", tags = "2, 3")]
    pub response: Option<check_response::HttpResponse>,
}

/// The oneof of a [`CheckResponse`].
pub mod check_response {
    /// The response to the client, or the changes to the request.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum HttpResponse {
        /// The request is refused.
        #[prost(message, tag = "2")]
        Denied(super::DeniedHttpResponse),
        /// The request is allowed.
        #[prost(message, tag = "3")]
        Ok(super::OkHttpResponse),
    }
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RpcStatus {
    /// `google.rpc.Code`.
    #[prost(int32, tag = "1")]
    pub code: i32,
}

/// `envoy.type.v3.HttpStatus`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HttpStatus {
    /// The status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
}

/// `envoy.service.auth.v3.DeniedHttpResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeniedHttpResponse {
    /// The status of the response to the client.
    #[prost(message, optional, tag = "1")]
    pub status: Option<HttpStatus>,
    /// The headers of the response.
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<HeaderValueOption>,
    /// The body of the response.
    #[prost(string, tag = "3")]
    pub body: String,
}

/// `envoy.service.auth.v3.OkHttpResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OkHttpResponse {
    /// Headers to set on the upstream request.
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<HeaderValueOption>,
    /// Headers to remove from the upstream request.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub headers_to_remove: Vec<Bytes>,
    /// Query parameters to remove from the upstream request.
    #[prost(string, repeated, tag = "8")]
    pub query_parameters_to_remove: Vec<String>,
}

/// `envoy.config.core.v3.HeaderValueOption`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderValueOption {
    /// Name and value.
    #[prost(message, optional, tag = "1")]
    pub header: Option<HeaderValue>,
    /// `HeaderAppendAction`: how to treat an existing header of the name.
    #[prost(int32, tag = "3")]
    pub append_action: i32,
    /// Whether to set the header even if its value is empty.
    #[prost(bool, tag = "4")]
    pub keep_empty_value: bool,
}

/// `envoy.config.core.v3.HeaderValue` in a response. Strings and bytes have the same encoding.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderValue {
    /// The name.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

impl HeaderValueOption {
    /// `OVERWRITE_IF_EXISTS_OR_ADD`.
    const OVERWRITE: i32 = 2;

    /// Returns the option that sets a header and overwrites a value of the client or another filter.
    #[must_use]
    pub fn set(name: Bytes, value: Bytes) -> Self {
        Self { header: Some(HeaderValue { key: name, value }), append_action: Self::OVERWRITE, keep_empty_value: true }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use jiff::Timestamp;
    use prost::Message;

    use super::*;
    use crate::{
        clock::Clock,
        test_support::key_index,
        verify::{
            VerifierOptions,
            decision_log::{DecisionLog, Sampling},
            freshness::{Freshness, Stage},
        },
    };

    const VALUE: &str = "legacy-value-of-twenty-characters";

    fn verifier() -> Verifier {
        let freshness = Freshness::default();
        for heartbeat in [freshness.keys(), freshness.catalogs()] {
            heartbeat.heard(Stage::Listed, Timestamp::from_second(1000).unwrap());
        }
        Verifier {
            keys: Arc::new(key_index(VALUE, |_| {})),
            freshness,
            clock: Clock::of(|| Timestamp::from_second(1000).unwrap()),
            options: VerifierOptions {
                sources: ["authorization", "header:x-api-key", "query:api_key"].map(|s| s.parse().unwrap()).into(),
                default_permission: None,
                introspection_permission: None,
                introspection_cluster_permission: None,
                tell_key_names: false,
                max_staleness: Some(Duration::from_mins(10)),
            },
            decision_log: DecisionLog::new(Sampling { allowed_one_in: 0, refused_per_second: 0 }),
        }
    }

    fn request(headers: &[(&str, &str)], path: &str, extensions: &[(&str, &str)]) -> CheckRequest {
        let pair = |(key, value): &(&str, &str)| HeaderPair {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::copy_from_slice(value.as_bytes()),
        };
        let http = HttpRequest { headers: headers.iter().map(pair).collect(), path: path.to_owned(), header_map: None };
        let extension = |(key, value): &(&str, &str)| Extension { key: (*key).into(), value: (*value).into() };
        CheckRequest {
            attributes: Some(AttributeContext {
                request: Some(AttributeRequest { http: Some(http) }),
                context_extensions: extensions.iter().map(extension).collect(),
            }),
        }
    }

    fn allowed(request: &CheckRequest) -> Result<OkHttpResponse, i32> {
        // Encoded and decoded, as Envoy sends it.
        let request = CheckRequest::decode(request.encode_to_vec().as_slice()).unwrap();
        let answer = check(&verifier(), &request);
        match answer.response.unwrap() {
            check_response::HttpResponse::Ok(ok) => {
                assert_eq!(answer.status.unwrap().code, 0);
                Ok(ok)
            }
            check_response::HttpResponse::Denied(denied) => {
                assert_ne!(answer.status.unwrap().code, 0, "Envoy would allow the request");
                assert!(!denied.body.contains(VALUE));
                Err(denied.status.unwrap().code)
            }
        }
    }

    #[test]
    fn the_key_and_spoofed_identity_headers_are_removed_from_the_upstream_request() {
        let route = [("permission", "a:Read"), ("team", "shop")];
        let bearer = format!("Bearer {VALUE}");
        let ok = allowed(&request(&[("authorization", &bearer)], "/", &route)).unwrap();
        assert_eq!(ok.headers_to_remove, ["authorization"]);
        assert_eq!(ok.headers.len(), 5);
        assert!(ok.headers.iter().all(|header| header.append_action == HeaderValueOption::OVERWRITE));
        let forged =
            [("x-api-key", VALUE), ("x_keywright_user", "root"), ("X-Keywright.Team", "bank"), ("x_other", "1")];
        let ok = allowed(&request(&forged, "/", &route)).unwrap();
        assert_eq!(ok.headers_to_remove, ["x-api-key", "x_keywright_user", "X-Keywright.Team"]);
        let ok = allowed(&request(&[], &format!("/a?x=1&api_key={VALUE}"), &route)).unwrap();
        assert_eq!((ok.headers_to_remove.len(), ok.query_parameters_to_remove), (0, vec!["api_key".to_owned()]));
    }

    #[test]
    fn the_requirement_comes_only_from_context_extensions() {
        let key = [("x-api-key", VALUE), ("permission", "none"), ("x-keywright-permission", "none")];
        let path = "/envoy/permission=none?permission=none";
        assert_eq!(allowed(&request(&key, path, &[])), Err(403));
        assert_eq!(allowed(&request(&key, path, &[("permission", "c:Read")])), Err(403));
        assert_eq!(allowed(&request(&key, path, &[("permission", "a:Read"), ("other", "1")])), Err(403));
        assert_eq!(allowed(&request(&key, path, &[("permission", "a:Read"), ("permission", "none")])), Err(403));
        assert!(allowed(&request(&key, path, &[("permission", "a:Read")])).is_ok());
        assert_eq!(allowed(&CheckRequest::default()), Err(403));
    }

    #[test]
    fn raw_headers_are_read() {
        let mut raw = request(&[], "/", &[("permission", "none")]);
        let http = raw.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
        let header = |value: &'static str| RawHeader {
            key: Bytes::from_static(b"x-api-key"),
            value: Bytes::new(),
            raw_value: Bytes::from_static(value.as_bytes()),
        };
        http.header_map = Some(RawHeaders { headers: vec![header(VALUE)] });
        assert!(allowed(&raw).is_ok());
        let http = raw.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
        http.header_map = Some(RawHeaders { headers: vec![header(VALUE), header(VALUE)] });
        assert_eq!(allowed(&raw), Err(400));
    }
}
