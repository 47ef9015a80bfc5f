//! The validating webhook: what needs the catalogue or other objects, asked before anything is stored.
//!
//! It only reads memory, has no effect and needs no request of its own, so it is safe for dry runs and takes
//! microseconds. It sees nothing but this project's own kinds, never Secrets.

mod rules;
pub mod self_check;

use std::{future::ready, sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use kube::{
    Resource,
    core::{
        Status,
        admission::{AdmissionRequest, AdmissionResponse, AdmissionReview},
        response::{StatusCause, StatusDetails, StatusSummary},
    },
};
use serde::{Deserialize, de::DeserializeOwned};

use self::rules::Decision;
use crate::{
    api::{AccessPolicy, ApiKey, SecuritySettings},
    index::Index,
    runtime::{
        clock::Clock,
        metrics::{Kind, Metrics, Verdict},
    },
};

/// The path that the webhook configuration names.
pub const PATH: &str = "/validate";

/// Two objects of the largest size that etcd stores.
const LARGEST_BODY: usize = 4 * 1024 * 1024;

/// What admission works with.
#[derive(Clone)]
pub struct Context {
    /// What is known without asking.
    pub index: Arc<Index>,
    /// The time.
    pub clock: Clock,
    /// Where counts go.
    pub metrics: Metrics,
}

/// The webhook as a router. A GET is the question of [`self_check`].
pub fn router(context: Context) -> Router {
    Router::new()
        .route(PATH, post(validate).get(|| ready(StatusCode::NO_CONTENT)))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
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
        Ok("ApiKey") => (Kind::ApiKey, decide::<ApiKey>(&body, |request| rules::api_key(&context, request))),
        Ok("AccessPolicy") => (Kind::AccessPolicy, decide::<AccessPolicy>(&body, rules::not_enforced)),
        Ok("SecuritySettings") => (Kind::SecuritySettings, decide::<SecuritySettings>(&body, rules::not_enforced)),
        Ok(_) => (Kind::Other, Err("this webhook does not know the kind".to_owned())),
        Err(_) => (Kind::Other, Err("the body is no AdmissionReview".to_owned())),
    };
    let (response, verdict) = match answer {
        Ok((response, decision)) => {
            decision.problems.iter().map(|p| p.rule).for_each(|rule| context.metrics.broke(rule));
            let verdict = if response.allowed { Verdict::Allowed } else { Verdict::Denied };
            (Json(response.into_review()).into_response(), verdict)
        }
        Err(why) => ((StatusCode::BAD_REQUEST, why).into_response(), Verdict::Denied),
    };
    context.metrics.admitted(kind, verdict, started.elapsed());
    response
}

fn decide<K>(
    body: &[u8],
    rule: impl FnOnce(&AdmissionRequest<K>) -> Decision,
) -> Result<(AdmissionResponse, Decision), String>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
{
    let review: AdmissionReview<K> = serde_json::from_slice(body)
        .map_err(|error| format!("{} can't be read by this version of Keywright: {error}", K::kind(&())))?;
    let request: AdmissionRequest<K> = review.try_into().map_err(|_| "the review has no request".to_owned())?;
    let decision = rule(&request);
    let mut response = AdmissionResponse::from(&request);
    if !decision.warnings.is_empty() {
        response.warnings = Some(decision.warnings.clone());
    }
    if !decision.problems.is_empty() {
        response.allowed = false;
        response.result = refusal(&request, &decision);
    }
    Ok((response, decision))
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
        reason: "FieldValueInvalid".to_owned(),
        message: problem.message.clone(),
        field: problem.field.clone(),
    });
    Status {
        status: Some(StatusSummary::Failure),
        code: StatusCode::UNPROCESSABLE_ENTITY.as_u16(),
        reason: "Invalid".to_owned(),
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
