//! One folder a kind: observe, decide, act, report. Only the leader runs it.
//!
//! Reconciliation reads from memory and from at most one Secret by name. `decide` is [`crate::domain`]; only `act`
//! and `report` write.

pub mod access_policy;
pub mod api_key;
pub mod backoff;
pub mod events;
pub mod export;
pub mod key_reveal;
pub mod permission_catalog;

use kube::{ResourceExt, api::Patch, core::Status};
use serde::Serialize;
use serde_json::{Value, json};

use crate::domain::{redact::redact, status::Failure};

/// The longest that one request to the API server may take. The client retries by itself for minutes, which would
/// hold a place among the concurrent reconciliations for as long.
const REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

/// A request that failed, in words that may be shown: what the API server says passes through redaction, and errors
/// that could quote a body are not quoted.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// What the API server answered, if it did.
    pub status: Option<Box<Status>>,
    message: String,
}

impl RequestError {
    fn new(what: &str, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self {
                message: redact(&format!("{what}: the API server refused it ({}): {}", status.code, status.message))
                    .into_owned(),
                status: Some(status),
            },
            kube::Error::SerdeError(_) => {
                Self { status: None, message: format!("{what}: the API server's answer could not be read") }
            }
            _ => Self { status: None, message: format!("{what}: the API server could not be reached") },
        }
    }

    fn new_local(message: String) -> Self {
        Self { status: None, message }
    }

    fn is(&self, predicate: impl Fn(&Status) -> bool) -> bool {
        self.status.as_deref().is_some_and(predicate)
    }

    fn failure(&self, reason: &'static str) -> Failure {
        Failure { reason, message: format!("{self}; it will be tried again") }
    }
}

/// A patch of the status alone, for this version of the object alone. Not a replacement: that would carry the object's
/// metadata too, which is the user's and not even kept here.
fn status_patch<S: Serialize>(object: &impl ResourceExt, old: Option<&S>, new: &S) -> Patch<Value> {
    let fields = |status| match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    // In a merge patch, what is gone has to be said.
    let gone = old.map(fields).unwrap_or_default().into_iter().map(|(field, _)| (field, Value::Null));
    let status: serde_json::Map<_, _> = gone.chain(fields(new)).collect();
    Patch::Merge(json!({"metadata": {"resourceVersion": object.resource_version()}, "status": status}))
}

/// Runs one request with a bound on its time. `what` names it for people: "create Secret x".
async fn request<T>(what: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| RequestError::new(what, error)),
        Err(_) => {
            Err(RequestError { status: None, message: format!("{what}: no answer in {}s", REQUEST_TIMEOUT.as_secs()) })
        }
    }
}
