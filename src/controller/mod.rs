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
mod refusal;

use json_patch::{AddOperation, PatchOperation, TestOperation, jsonptr::PointerBuf};
use kube::{
    Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams},
    core::Status,
    runtime::reflector::{ObjectRef, Store},
};
use serde::Serialize;
use serde_json::{Value, json};

use self::refusal::Refusal;
use crate::domain::{redact::redact, status::Failure};

/// Who writes, in `managedFields`: the operator, except for certificates, which are `keywright-certs`.
pub const FIELD_MANAGER: &str = "keywright";

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

    /// Whether the same request fails until a person changes something, as far as the API server's answer tells: the
    /// Secret is immutable, a quota, an admission policy or missing rights forbid it. A conflict, an overload and an
    /// API server that can't be reached pass by themselves.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.advice().is_some()
    }

    /// The way out of a permanent refusal, as a clause without any value. `None` if the failure passes by itself.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        self.status.as_deref().and_then(Refusal::of).map(Refusal::advice)
    }

    /// The error and what follows from it, for conditions.
    #[must_use]
    pub fn explained(&self) -> String {
        match self.advice() {
            Some(advice) => format!("{self}; {advice}; it is tried again every few minutes"),
            None => format!("{self}; it will be tried again"),
        }
    }

    fn failure(&self, reason: &'static str) -> Failure {
        Failure { reason, message: self.explained(), passing: !self.is_permanent() }
    }
}

/// How the operator patches: under its name, also where its client's user agent would give another.
fn patch_params() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

/// How the operator creates objects. See [`patch_params`].
fn post_params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
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

/// An operation of a JSON patch (RFC 6902): the patch fails unless `path` has this value.
fn test(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Test(TestOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

/// An operation of a JSON patch: sets `path` to this value.
fn add(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

/// Whether this very object is still in the store. The failures of one that was deleted meanwhile are not remembered, since
/// nothing would make them forgotten.
fn is_there<K: Resource<DynamicType = ()> + Clone>(store: &Store<K>, object: &K) -> bool {
    store.get(&ObjectRef::from_obj(object)).is_some_and(|known| known.meta().uid == object.meta().uid)
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
