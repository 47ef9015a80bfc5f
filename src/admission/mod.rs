//! The webhooks: who made an object is stamped, and what needs the catalogue, other objects or somebody's rights is
//! asked before anything is stored.
//!
//! They have no effect, so they are safe for dry runs. They see nothing but this project's own kinds, never Secrets.
//! Everything is read from memory, except whether somebody holds the rights that are being put into a key.
//!
//! [`secrets`] is apart from them: it hears of writes to the Secrets of keys, and refuses none.

mod door;
mod pasted;
mod rules;
pub mod secrets;
pub mod self_check;
mod stamp;

use std::{future::ready, sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
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

use self::rules::Decision;
use crate::{
    access::{Cached, Cluster},
    api::{AccessPolicy, ApiKey, KeyReveal, SecuritySettings},
    index::Index,
    runtime::{
        clock::Clock,
        metrics::{Kind, Metrics, Verdict},
    },
};

/// The path of the validating webhook.
pub const PATH: &str = "/validate";

/// The path of the mutating webhook, which stamps.
pub const STAMP_PATH: &str = "/stamp";

/// What admission works with.
#[derive(Clone)]
pub struct Context {
    /// What is known without asking.
    pub index: Arc<Index>,
    /// Every ApiKey.
    pub keys: Store<ApiKey>,
    /// Who holds which right.
    pub reviewer: Arc<Cached<Cluster>>,
    /// Whether gate 1 is asked here, since no ValidatingAdmissionPolicy does.
    pub roles: bool,
    /// The time.
    pub clock: Clock,
    /// Where counts go.
    pub metrics: Metrics,
    /// Who is told which Secrets are written to.
    pub news: secrets::News,
}

/// The webhook as a router, behind its door. A GET is the question of [`self_check`].
pub fn router(context: Context) -> Router {
    let door = door::Door::new(context.metrics.clone());
    Router::new()
        .route(PATH, post(validate).get(|| ready(StatusCode::NO_CONTENT)))
        .route(STAMP_PATH, post(stamp))
        .route(secrets::PATH, post(secrets::review))
        .route(secrets::NOTICE_PATH, secrets::notices())
        // The door has a limit of its own.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(door, door::Door::enter))
        .with_state(context)
}

/// Just enough of a review to know what kind it is about.
#[derive(Deserialize)]
struct Peek {
    request: PeekRequest,
}

#[derive(Deserialize)]
struct PeekRequest {
    kind: PeekKind,
}

#[derive(Deserialize)]
struct PeekKind {
    kind: String,
}

async fn validate(State(context): State<Context>, body: Bytes) -> Response {
    let started = Instant::now();
    let kind = serde_json::from_slice::<Peek>(&body).map(|peek| peek.request.kind.kind);
    let (kind, answer) = match kind.as_deref() {
        Ok("ApiKey") => (Kind::ApiKey, api_key(&context, &body).await),
        Ok("AccessPolicy") => (Kind::AccessPolicy, access_policy(&context, &body).await),
        Ok("SecuritySettings") => (Kind::SecuritySettings, security_settings(&context, &body).await),
        Ok("KeyReveal") => (Kind::KeyReveal, key_reveal(&context, &body).await),
        Ok(_) => (Kind::Other, Err("this webhook does not know the kind".to_owned())),
        Err(_) => (Kind::Other, Err("the body is no AdmissionReview".to_owned())),
    };
    let (response, verdict) = match answer {
        Ok((response, decision)) => {
            decision.problems.iter().for_each(|problem| context.metrics.broke(problem.reason));
            let verdict = if response.allowed { Verdict::Allowed } else { Verdict::Denied };
            (Json(response.into_review()).into_response(), verdict)
        }
        Err(why) => ((StatusCode::BAD_REQUEST, why).into_response(), Verdict::Denied),
    };
    context.metrics.admitted(kind, verdict, started.elapsed());
    response
}

type Answer = Result<(AdmissionResponse, Decision), String>;

async fn api_key(context: &Context, body: &[u8]) -> Answer {
    let request = read::<ApiKey>(body)?;
    Ok(answer(&request, rules::api_key(context, &request).await))
}

async fn access_policy(context: &Context, body: &[u8]) -> Answer {
    let request = read::<AccessPolicy>(body)?;
    Ok(answer(&request, rules::access_policy(context, &request).await))
}

async fn security_settings(context: &Context, body: &[u8]) -> Answer {
    let request = read::<SecuritySettings>(body)?;
    Ok(answer(&request, rules::security_settings(context, &request).await))
}

async fn key_reveal(context: &Context, body: &[u8]) -> Answer {
    let request = read::<KeyReveal>(body)?;
    Ok(answer(&request, rules::key_reveal(context, &request).await))
}

/// Says who made an object, in the object.
async fn stamp(State(context): State<Context>, body: Bytes) -> Response {
    let request = match read::<DynamicObject>(&body) {
        Ok(request) => request,
        Err(why) => return (StatusCode::BAD_REQUEST, why).into_response(),
    };
    if let Some(refusal) = pasted::refuse(&request, &body) {
        return Json(refusal.into_review()).into_response();
    }
    let response = AdmissionResponse::from(&request);
    let patch = match stamp::patch(&request, &*context.reviewer).await {
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
    let review: Review<K> = serde_json::from_slice(body)
        .or_else(|_| serde_json::from_value(without_times(body)?))
        .map_err(|error| format!("the object can't be read by this version of Keywright: {error}"))?;
    Ok(AdmissionRequest { types: review.types, ..review.request })
}

/// An AdmissionReview that is a question. kube's own keeps the whole of it a second time while it is read, since its types
/// are flattened into it.
struct Review<K: Resource> {
    types: TypeMeta,
    request: AdmissionRequest<K>,
}

impl<'de, K: Resource + DeserializeOwned> Deserialize<'de> for Review<K> {
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

/// The review without the times in managedFields, which anybody who changes an object can write and which this program can't
/// represent all. An object that was stored with such a time can still be changed; a policy of the chart refuses new ones.
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

fn answer<K>(request: &AdmissionRequest<K>, decision: Decision) -> (AdmissionResponse, Decision)
where
    K: Resource<DynamicType = ()>,
{
    let mut response = AdmissionResponse::from(request);
    if !decision.warnings.is_empty() {
        response.warnings = Some(decision.warnings.clone());
    }
    if !decision.problems.is_empty() {
        response.allowed = false;
        response.result = refusal(request, &decision);
    }
    (response, decision)
}

/// How many problems are told at once.
const MOST_SHOWN: usize = 20;

/// What kubectl and Argo CD show: every problem, each with its field and the way out.
fn refusal<K: Resource<DynamicType = ()>>(request: &AdmissionRequest<K>, decision: &Decision) -> Status {
    let lines: Vec<_> = decision.problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect();
    let message = match lines.as_slice() {
        [one] => one.clone(),
        many => {
            let shown = &many[..many.len().min(MOST_SHOWN)];
            let rest = if many.len() > shown.len() { "\n- and so on" } else { "" };
            format!("{} problems:\n- {}{rest}", many.len(), shown.join("\n- "))
        }
    };
    let causes = decision.problems.iter().take(MOST_SHOWN).map(|problem| StatusCause {
        reason: if problem.forbidden { "FieldValueForbidden" } else { "FieldValueInvalid" }.to_owned(),
        message: problem.message.clone(),
        field: problem.field.clone(),
    });
    // What somebody may not do is no mistake in the object.
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
