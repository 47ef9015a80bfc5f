//! The webhooks. The mutating webhook stamps the creator of an object. The validating webhook checks the rules that
//! need the catalog, other objects or the rights of the requester.
//!
//! Both have no side effects, so they support dry runs. They receive only the kinds of Keywright, never Secrets. They
//! read from memory, except for access reviews.
//!
//! A separate webhook, [`secrets`], receives writes to the Secrets of keys. It rejects none.

mod intake;
mod mutation;
mod pasted;
mod rules;
pub mod secrets;
pub mod self_check;

use std::{borrow::Cow, collections::BTreeSet, future::ready, sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, HeaderValue, StatusCode},
    middleware,
    response::{IntoResponse, Response},
    routing::post,
};
use kube::{
    Resource,
    core::{
        DynamicObject, Status, TypeMeta,
        admission::{AdmissionRequest, AdmissionResponse},
        response::{StatusCause, StatusDetails, StatusSummary},
    },
    runtime::reflector::Store,
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;
use tracing::{Instrument, Span};

use self::rules::AdmissionDecision;
use crate::{
    access::{Cached, ClusterReviewer},
    api::{AccessPolicy, ApiKey, KeyReveal, SecuritySettings},
    clock::Clock,
    domain::redact::redact,
    index::Index,
    telemetry::{
        metrics::{AdmissionKind, AdmissionResult, Metrics},
        rate_limit::RateLimit,
        traces,
    },
};

/// The path of the validating webhook.
pub const PATH: &str = "/validate";

/// The path of the mutating webhook.
pub const MUTATION_PATH: &str = "/stamp";

/// The dependencies of the webhooks.
#[derive(Clone)]
pub struct AdmissionContext {
    /// The index.
    pub index: Arc<Index>,
    /// All ApiKeys.
    pub keys: Store<ApiKey>,
    /// Access reviews.
    pub reviewer: Arc<Cached<ClusterReviewer>>,
    /// Whether the webhook checks gate 1, because the cluster has no ValidatingAdmissionPolicies for it.
    pub roles: bool,
    /// The clock.
    pub clock: Clock,
    /// The metrics.
    pub metrics: Metrics,
    /// The receiver of writes to Secrets.
    pub notices: secrets::SecretNotices,
}

/// The router of the webhooks, with limits. [`self_check`] sends the GET.
pub fn router(context: AdmissionContext) -> Router {
    let intake = intake::Intake::new(context.metrics.clone());
    Router::new()
        .route(PATH, post(validate).get(|| ready(StatusCode::NO_CONTENT)))
        .route(MUTATION_PATH, post(mutate))
        .route(secrets::PATH, post(secrets::review))
        .route(secrets::NOTICE_PATH, secrets::notices())
        // The intake limits the size of bodies.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(intake, intake::Intake::enter))
        .with_state(context)
}

/// The part of a review for spans and logs, and for the choice of the rules.
#[derive(Deserialize)]
struct ReviewSummary<'a> {
    #[serde(borrow)]
    request: RequestSummary<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RequestSummary<'a> {
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    kind: KindSummary<'a>,
    #[serde(borrow, default)]
    namespace: Cow<'a, str>,
    #[serde(borrow, default)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    operation: Cow<'a, str>,
    #[serde(default)]
    dry_run: bool,
    #[serde(borrow)]
    user_info: UserSummary<'a>,
}

#[derive(Deserialize)]
struct KindSummary<'a> {
    #[serde(borrow)]
    kind: Cow<'a, str>,
}

#[derive(Deserialize)]
struct UserSummary<'a> {
    #[serde(borrow, default)]
    username: Cow<'a, str>,
}

async fn validate(State(context): State<AdmissionContext>, headers: HeaderMap, body: Bytes) -> Response {
    let started = Instant::now();
    let summary = serde_json::from_slice::<ReviewSummary<'_>>(&body).map(|review| review.request);
    let summary = summary.as_ref().ok();
    let span = span(summary, &headers);
    let (kind, answer) = decide(&context, summary, &body).instrument(span.clone()).await;
    let (response, result) = match answer {
        Ok((response, decision)) => {
            decision.problems.iter().for_each(|problem| context.metrics.broke(problem.reason));
            let result = if response.allowed { AdmissionResult::Allowed } else { AdmissionResult::Denied };
            if let (AdmissionResult::Denied, Some(summary)) = (result, summary) {
                log_denial(&context, summary, &decision);
            }
            (Json(response.into_review()).into_response(), result)
        }
        Err(error) => ((StatusCode::BAD_REQUEST, error).into_response(), AdmissionResult::Denied),
    };
    span.record("keywright.allowed", result == AdmissionResult::Allowed);
    context.metrics.admitted(kind, result, started.elapsed());
    response
}

/// Applies the rules of the kind.
async fn decide(
    context: &AdmissionContext,
    summary: Option<&RequestSummary<'_>>,
    body: &[u8],
) -> (AdmissionKind, ReviewAnswer) {
    match summary.map(|summary| &*summary.kind.kind) {
        Some("ApiKey") => (AdmissionKind::ApiKey, api_key(context, body).await),
        Some("AccessPolicy") => (AdmissionKind::AccessPolicy, access_policy(context, body).await),
        Some("SecuritySettings") => (AdmissionKind::SecuritySettings, security_settings(context, body).await),
        Some("KeyReveal") => (AdmissionKind::KeyReveal, key_reveal(context, body).await),
        Some(_) => (AdmissionKind::Other, Err("this webhook does not support the kind".to_owned())),
        None => (AdmissionKind::Other, Err("the body is not an AdmissionReview".to_owned())),
    }
}

/// The span of a request. The API server sends its own span if its tracing is enabled (KEP-647).
fn span(summary: Option<&RequestSummary<'_>>, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        target: traces::TARGET,
        "admission",
        k8s.object.kind = summary.map(|request| &*request.kind.kind),
        k8s.namespace.name = summary.map(|request| redact(&request.namespace)).as_deref(),
        k8s.object.name = summary.map(|request| redact(&request.name)).as_deref(),
        keywright.request.uid = summary.map(|request| &*request.uid),
        keywright.operation = summary.map(|request| &*request.operation),
        keywright.allowed = tracing::field::Empty,
    );
    if !span.is_disabled() {
        traces::continue_trace(&span, headers.get("traceparent").map(HeaderValue::as_bytes));
    }
    span
}

/// Logs the rules and the fields of a denial, but neither the messages nor other parts of the object. Names are
/// redacted, since they may contain pasted values.
fn log_denial(context: &AdmissionContext, request: &RequestSummary<'_>, decision: &AdmissionDecision) {
    /// Users can send any number of requests that are denied.
    const PER_SECOND: u32 = 20;
    static LIMIT: RateLimit = RateLimit::new(PER_SECOND);

    if !LIMIT.allows(context.clock.now()) {
        return;
    }
    let reasons: BTreeSet<_> = decision.problems.iter().map(|problem| problem.reason).collect();
    let fields: BTreeSet<_> = decision.problems.iter().take(MAX_SHOWN).map(|problem| redact(&problem.field)).collect();
    tracing::info!(
        kind = &*request.kind.kind,
        operation = &*request.operation,
        namespace = %redact(&request.namespace),
        name = %redact(&request.name),
        uid = &*request.uid,
        user = %redact(&request.user_info.username),
        dry_run = request.dry_run,
        reasons = Vec::from_iter(reasons).join(","),
        fields = Vec::from_iter(fields).join(","),
        "admission request denied"
    );
}

type ReviewAnswer = Result<(AdmissionResponse, AdmissionDecision), String>;

async fn api_key(context: &AdmissionContext, body: &[u8]) -> ReviewAnswer {
    let request = read::<ApiKey>(body)?;
    Ok(answer(&request, rules::api_key(context, &request).await))
}

async fn access_policy(context: &AdmissionContext, body: &[u8]) -> ReviewAnswer {
    let request = read::<AccessPolicy>(body)?;
    Ok(answer(&request, rules::access_policy(context, &request).await))
}

async fn security_settings(context: &AdmissionContext, body: &[u8]) -> ReviewAnswer {
    let request = read::<SecuritySettings>(body)?;
    Ok(answer(&request, rules::security_settings(context, &request).await))
}

async fn key_reveal(context: &AdmissionContext, body: &[u8]) -> ReviewAnswer {
    let request = read::<KeyReveal>(body)?;
    Ok(answer(&request, rules::key_reveal(context, &request).await))
}

/// Rejects objects with pasted values, and stamps the creator.
async fn mutate(State(context): State<AdmissionContext>, body: Bytes) -> Response {
    let request = match read::<DynamicObject>(&body) {
        Ok(request) => request,
        Err(error) => return (StatusCode::BAD_REQUEST, error).into_response(),
    };
    if let Some(rejection) = pasted::reject(&request, &body) {
        return Json(rejection.into_review()).into_response();
    }
    let response = AdmissionResponse::from(&request);
    let patch = match mutation::patch(&request, &*context.reviewer).await {
        Ok(patch) => patch,
        Err(unanswered) => return Json(response.deny(unanswered).into_review()).into_response(),
    };
    match response.with_patch(patch) {
        Ok(response) => Json(response.into_review()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn read<K>(body: &[u8]) -> Result<AdmissionRequest<K>, String>
where
    K: Resource + DeserializeOwned,
{
    let review: TypedReview<K> = serde_json::from_slice(body)
        .or_else(|_| serde_json::from_value(without_times(body)?))
        .map_err(|error| format!("the object can't be read by this version of Keywright: {error}"))?;
    Ok(AdmissionRequest { types: review.types, ..review.request })
}

/// The AdmissionReview of a request. The type of kube buffers the review a second time while it is parsed, since it
/// flattens its `TypeMeta`.
struct TypedReview<K: Resource> {
    types: TypeMeta,
    request: AdmissionRequest<K>,
}

impl<'de, K: Resource + DeserializeOwned> Deserialize<'de> for TypedReview<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", bound = "K: Resource + DeserializeOwned")]
        struct Fields<K: Resource> {
            api_version: String,
            kind: String,
            request: AdmissionRequest<K>,
        }
        let Fields { api_version, kind, request } = Fields::deserialize(deserializer)?;
        Ok(Self { types: TypeMeta { api_version, kind }, request })
    }
}

/// The review without the times in managedFields. Users can write times that k8s-openapi can't parse. Without them, an
/// object with such a time can still be changed. A policy of the chart rejects new ones.
fn without_times(body: &[u8]) -> serde_json::Result<Value> {
    let mut review: Value = serde_json::from_slice(body)?;
    for object in ["/request/object", "/request/oldObject"] {
        let entries = review.pointer_mut(&format!("{object}/metadata/managedFields")).and_then(Value::as_array_mut);
        for entry in entries.into_iter().flatten().filter_map(Value::as_object_mut) {
            entry.remove("time");
        }
    }
    Ok(review)
}

fn answer<K>(request: &AdmissionRequest<K>, decision: AdmissionDecision) -> (AdmissionResponse, AdmissionDecision)
where
    K: Resource<DynamicType = ()>,
{
    let mut response = AdmissionResponse::from(request);
    if !decision.warnings.is_empty() {
        response.warnings = Some(decision.warnings.clone());
    }
    if !decision.problems.is_empty() {
        response.allowed = false;
        response.result = rejection(request, &decision);
    }
    (response, decision)
}

/// The maximum number of problems in a response.
const MAX_SHOWN: usize = 20;

/// The Status that kubectl and Argo CD show: all problems with their fields and fixes.
fn rejection<K: Resource<DynamicType = ()>>(request: &AdmissionRequest<K>, decision: &AdmissionDecision) -> Status {
    let lines: Vec<_> = decision.problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect();
    let message = match lines.as_slice() {
        [one] => one.clone(),
        many => {
            let shown = &many[..many.len().min(MAX_SHOWN)];
            let rest = if many.len() > shown.len() { "\n- and so on" } else { "" };
            format!("{} problems:\n- {}{rest}", many.len(), shown.join("\n- "))
        }
    };
    let causes = decision.problems.iter().take(MAX_SHOWN).map(|problem| StatusCause {
        reason: if problem.forbidden { "FieldValueForbidden" } else { "FieldValueInvalid" }.to_owned(),
        message: problem.message.clone(),
        field: problem.field.clone(),
    });
    // 403 if the object is valid and the requester lacks rights.
    let (code, reason) = if decision.problems.iter().all(|problem| problem.forbidden) {
        (StatusCode::FORBIDDEN, "Forbidden")
    } else {
        (StatusCode::UNPROCESSABLE_ENTITY, "Invalid")
    };
    Status {
        status: Some(StatusSummary::Failure),
        code: code.as_u16(),
        reason: reason.to_owned(),
        message,
        details: Some(StatusDetails {
            name: request.name.clone(),
            group: K::group(&()).into_owned(),
            kind: K::kind(&()).into_owned(),
            causes: causes.collect(),
            uid: String::new(),
            retry_after_seconds: 0,
        }),
        ..Status::default()
    }
}
