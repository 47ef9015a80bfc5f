//! A fake API server for unit tests that need faults, or many writes in a short time. It stores objects by path with
//! resourceVersions and has no schemas. Integration tests use a real API server.

#![cfg(test)]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use kube::{Client, core::Status};
use serde_json::{Value, json};

/// The fault that affects requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    #[default]
    None,
    /// Requests get no response.
    Hang,
    /// The next request gets no response.
    HangOnce,
    /// Requests fail with status 500.
    Refuse,
    /// Responses take this many milliseconds.
    Slow(u64),
}

/// The state of the server.
#[derive(Debug, Default)]
pub struct Stored {
    /// The objects by path.
    pub objects: BTreeMap<String, Value>,
    /// The names of the written objects, in the order of the writes, without patches that change nothing.
    pub writes: Vec<String>,
    /// The fault.
    pub fault: Fault,
    version: u64,
}

/// A fake API server. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct FakeApiServer(Arc<Mutex<Stored>>);

impl FakeApiServer {
    /// A client of this server, whose default namespace is `ns`.
    pub fn client(&self) -> Client {
        Client::new(Router::new().fallback(Self::respond).with_state(self.clone()), "ns")
    }

    /// The state.
    pub fn stored(&self) -> MutexGuard<'_, Stored> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the fault.
    pub fn fail(&self, fault: Fault) {
        self.stored().fault = fault;
    }

    /// The object at a path.
    pub fn object(&self, path: &str) -> Option<Value> {
        self.stored().objects.get(path).cloned()
    }

    /// Stores an object as another client would.
    pub fn put(&self, path: &str, mut object: Value) {
        let mut stored = self.stored();
        stored.version += 1;
        object["metadata"]["resourceVersion"] = json!(stored.version.to_string());
        stored.objects.insert(path.to_owned(), object);
    }

    async fn respond(
        State(server): State<Self>,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Response {
        let fault = {
            let mut stored = server.stored();
            let fault = stored.fault;
            if fault == Fault::HangOnce {
                stored.fault = Fault::None;
            }
            fault
        };
        match fault {
            Fault::None => {}
            Fault::Slow(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
            Fault::Hang | Fault::HangOnce => return std::future::pending().await,
            Fault::Refuse => return refuse(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        }
        // Lists and watches are not supported. They hang, like a watch without events.
        let is_list = ["secrets", "configmaps", "configurations"].iter().any(|kind| uri.path().ends_with(kind));
        if method == Method::GET && is_list {
            return std::future::pending().await;
        }
        let is_apply =
            headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"));
        let body = serde_json::from_slice(&body).unwrap_or_default();
        server.stored().respond(&method, uri.path(), body, is_apply)
    }
}

impl Stored {
    fn respond(&mut self, method: &Method, path: &str, body: Value, is_apply: bool) -> Response {
        let mut path = path.to_owned();
        if *method == Method::POST {
            path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap_or_default());
        }
        let current = self.objects.get(&path).cloned();
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        let mut changed = match (method.as_str(), current) {
            ("GET", Some(current)) => return Json(current).into_response(),
            ("POST", Some(_)) => return refuse(StatusCode::CONFLICT, "AlreadyExists"),
            ("POST", None) => body,
            (_, None) => return refuse(StatusCode::NOT_FOUND, "NotFound"),
            (_, Some(current)) => {
                assert!(version(&body).is_string(), "a write of {path} without resourceVersion");
                if version(&current) != version(&body) {
                    return refuse(StatusCode::CONFLICT, "Conflict");
                }
                match method.as_str() {
                    "PATCH" if is_apply => apply_webhooks(current, &body),
                    "PATCH" => {
                        let mut merged = current.clone();
                        json_patch::merge(&mut merged, &body);
                        if merged == current {
                            return Json(current).into_response();
                        }
                        merged
                    }
                    _ => body,
                }
            }
        };
        self.version += 1;
        changed["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.writes.push(changed["metadata"]["name"].as_str().unwrap_or_default().to_owned());
        self.objects.insert(path, changed.clone());
        Json(changed).into_response()
    }
}

/// A server-side apply of webhooks, a list that is merged by name. Unit tests apply no other list.
fn apply_webhooks(mut current: Value, applied: &Value) -> Value {
    let webhooks = current["webhooks"].as_array_mut().into_iter().flatten();
    for (webhook, applied) in webhooks.zip(applied["webhooks"].as_array().into_iter().flatten()) {
        assert_eq!(webhook["name"], applied["name"]);
        json_patch::merge(webhook, applied);
    }
    current
}

fn refuse(code: StatusCode, reason: &str) -> Response {
    (code, Json(Status::failure(reason, reason).with_code(code.as_u16()))).into_response()
}
