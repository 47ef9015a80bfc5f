//! The controllers, one module for each kind. Only the leader runs them.
//!
//! A reconciliation observes, decides, acts and reports. It reads the index and at most one Secret, by name. Decisions
//! are in [`crate::domain`]. Only `act` and `report` write.

pub mod access_policy;
pub mod api_key;
pub mod backoff;
pub mod events;
pub mod export;
pub mod key_reveal;
pub mod permission_catalog;
mod refusal;

use std::fmt::Debug;

use json_patch::{AddOperation, PatchOperation, TestOperation, jsonptr::PointerBuf};
use kube::{
    Api, Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams},
    core::Status,
    runtime::reflector::{ObjectRef, Store},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use self::refusal::RefusalKind;
use crate::domain::{redact::redact, status::Failure};

/// The field manager of the operator in `managedFields`. Certificates have another one, `keywright-certs`.
pub const FIELD_MANAGER: &str = "keywright";

/// The time limit of one request to the API server. Without it, the retries of the client could block one of the
/// concurrent reconciliations for minutes.
const REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

/// A failed request. Its message can be shown to users: messages of the API server are redacted, and errors that could
/// quote a body are not part of it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// The status that the API server returned. `None` if the request failed without one.
    pub status: Option<Box<Status>>,
    message: String,
}

impl RequestError {
    fn new(operation: &str, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self {
                message: redact(&format!(
                    "{operation}: the API server rejected the request ({}): {}",
                    status.code, status.message
                ))
                .into_owned(),
                status: Some(status),
            },
            kube::Error::SerdeError(_) => Self {
                status: None,
                message: format!("{operation}: the response of the API server could not be parsed"),
            },
            _ => Self { status: None, message: format!("{operation}: the API server could not be reached") },
        }
    }

    fn new_local(message: String) -> Self {
        Self { status: None, message }
    }

    fn is(&self, predicate: impl Fn(&Status) -> bool) -> bool {
        self.status.as_deref().is_some_and(predicate)
    }

    /// Whether the same request fails until a user changes something, for example because the Secret is immutable, or a
    /// quota, an admission policy or a missing right forbids the request. Conflicts, overload and an unreachable API
    /// server are temporary.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.advice().is_some()
    }

    /// The remedy for a permanent failure, as a clause. `None` if the failure is temporary.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        self.status.as_deref().and_then(RefusalKind::of).map(RefusalKind::advice)
    }

    /// The error, its remedy and the next attempt, for conditions.
    #[must_use]
    pub fn explained(&self) -> String {
        match self.advice() {
            Some(advice) => format!("{self}; {advice}; the operator retries every few minutes"),
            None => format!("{self}; the operator retries"),
        }
    }

    fn failure(&self, reason: &'static str) -> Failure {
        Failure { reason, message: self.explained(), passing: !self.is_permanent() }
    }
}

/// The parameters of patches. They set the field manager, which would otherwise be derived from the user agent.
fn patch_params() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

/// The parameters of creations. See [`patch_params`].
fn post_params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

/// Returns a patch of the status that applies only to this version of the object. A replacement would also write the
/// metadata, which belongs to the user and is not in memory completely.
fn status_patch<S: Serialize>(object: &impl ResourceExt, old: Option<&S>, new: &S) -> Patch<Value> {
    let fields = |status| match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    // A merge patch (RFC 7396) removes only the fields that it sets to null.
    let removed = old.map(fields).unwrap_or_default().into_iter().map(|(field, _)| (field, Value::Null));
    let status: serde_json::Map<_, _> = removed.chain(fields(new)).collect();
    Patch::Merge(json!({"metadata": {"resourceVersion": object.resource_version()}, "status": status}))
}

/// An operation of a JSON patch (RFC 6902). The patch fails unless `path` has this value.
fn test(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Test(TestOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

/// An operation of a JSON patch (RFC 6902) that sets `path` to this value.
fn add(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

/// Writes the status by a JSON patch (RFC 6902). Returns false if a test of the patch fails, or the object does not exist.
async fn patch_status_if<K>(api: &Api<K>, name: &str, operations: Vec<PatchOperation>) -> Result<bool, RequestError>
where
    K: Clone + DeserializeOwned + Debug,
{
    let patch: Patch<()> = Patch::Json(json_patch::Patch(operations));
    match request("update status", api.patch_status(name, &patch_params(), &patch)).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|s: &Status| s.is_conflict() || s.is_not_found() || s.is_invalid()) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The namespace and the name of an object alone: a queue keeps a reference for each object.
pub(crate) fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectRef<K> {
    ObjectRef::new(&object.name_any()).within(object.meta().namespace.as_deref().unwrap_or_default())
}

/// Whether the store still has this object, compared by uid. Failures of a deleted object are not recorded, since no
/// event would remove the record.
fn still_exists<K: Resource<DynamicType = ()> + Clone>(store: &Store<K>, object: &K) -> bool {
    store.get(&ObjectRef::from_obj(object)).is_some_and(|known| known.meta().uid == object.meta().uid)
}

/// Runs one request with time limit [`REQUEST_TIMEOUT`]. `operation` describes it in messages: "create Secret x".
async fn request<T>(operation: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
    let Ok(result) = tokio::time::timeout(REQUEST_TIMEOUT, call).await else {
        let message = format!("{operation}: no response within {}s", REQUEST_TIMEOUT.as_secs());
        return Err(RequestError { status: None, message });
    };
    result.map_err(|error| RequestError::new(operation, error))
}
