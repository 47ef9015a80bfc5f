//! The API through a real kubectl and a real API server, with the installed chart and one operator. Each test has its
//! own namespace, and unique names for cluster-scoped objects.

mod catalog;
mod cel;
mod examples;
mod explain;
mod pasted;
mod secrets;

use crate::support::{Shared, TIMEOUT, output};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A namespace in the shared cluster, used through kubectl.
pub(crate) struct Team {
    pub(crate) shared: &'static Shared,
    pub(crate) client: kube::Client,
    pub(crate) namespace: String,
}

impl Team {
    pub(crate) async fn new() -> Self {
        let shared = crate::support::shared().await;
        let client = shared.client().await;
        let namespace = crate::support::namespace(&client).await;
        Self { shared, client, namespace }
    }

    /// Runs kubectl in this namespace and returns its output or its error.
    pub(crate) fn try_kubectl(&self, args: &[&str]) -> Result<String> {
        output(self.shared.plane.kubectl().args(["-n", &self.namespace]).args(args))
    }

    /// Runs kubectl in this namespace and returns its output; panics if it fails.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        self.try_kubectl(args).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Applies an object with `kubectl apply -f`.
    pub(crate) fn try_apply(&self, object: &Value) -> Result<String> {
        let file = self.file(object);
        self.try_kubectl(&["apply", "-f", &file])
    }

    pub(crate) fn apply(&self, object: &Value) {
        self.try_apply(object).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Applies an object that is too large for the annotation of a client-side apply.
    pub(crate) fn apply_large(&self, object: &Value) {
        self.kubectl(&["apply", "--server-side", "-f", &self.file(object)]);
    }

    /// Returns the error of applying the object; panics if it is accepted.
    pub(crate) fn apply_error(&self, object: &Value) -> String {
        match self.try_apply(object) {
            Ok(output) => panic!("the object was accepted: {output}"),
            Err(error) => format!("{error:#}"),
        }
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[args, &["-o", "json"]].concat())).expect("JSON")
    }

    pub(crate) fn get(&self, resource: &str) -> Value {
        self.json(&["get", resource])
    }

    /// Waits until `probe` returns true for the object.
    pub(crate) async fn wait_until(&self, resource: &str, title: &str, probe: impl Fn(&Value) -> bool) -> Value {
        self.wait_for(&format!("{resource}: {title}"), async || {
            let found: Value = serde_json::from_str(&self.try_kubectl(&["get", resource, "-o", "json"])?)?;
            ensure!(probe(&found), "{:#}", found["status"]);
            Ok(found)
        })
        .await
    }

    /// Like [`crate::support::eventually`]; on failure it also prints the end of the operator's log.
    pub(crate) async fn wait_for<T>(&self, title: &str, probe: impl AsyncFnMut() -> Result<T>) -> T {
        crate::support::retry(title, TIMEOUT, probe).await.unwrap_or_else(|error| {
            let log = self.shared.operator.log();
            let lines: Vec<&str> = log.lines().collect();
            panic!("{error:#}\nthe operator's log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        })
    }

    /// Waits until a condition has this status and reason.
    pub(crate) async fn wait_until_condition(&self, resource: &str, kind: &str, status: &str, reason: &str) -> Value {
        self.wait_until(resource, &format!("{kind}={status} ({reason})"), |found| {
            condition(found, kind).is_some_and(|c| c["status"] == status && c["reason"] == reason)
        })
        .await
    }

    fn file(&self, object: &Value) -> String {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}.json", self.namespace, NEXT.fetch_add(1, Ordering::Relaxed));
        let path = self.shared.plane.folder().join(name);
        std::fs::write(&path, object.to_string()).with_context(|| path.display().to_string()).unwrap();
        path.to_str().expect("a path in UTF-8").to_owned()
    }
}

/// Returns the condition of that type, if the object has it.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// Returns the manifest of an ApiKey.
pub(crate) fn api_key(name: &str, spec: &Value) -> Value {
    serde_json::json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    })
}
