//! The API as users meet it: real kubectl, real apiserver, the chart as installed, one operator. Every test has a
//! namespace of its own, and names of its own for what is cluster-wide.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod catalog;
mod cel;
mod examples;
mod explain;
mod pasted;
mod secrets;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::{PATIENCE, Shared, output};

/// A namespace of one's own in the shared cluster, seen through kubectl.
pub(crate) struct Team {
    pub(crate) shared: &'static Shared,
    pub(crate) client: kube::Client,
    pub(crate) namespace: String,
}

impl Team {
    pub(crate) async fn new() -> Self {
        let shared = support::shared().await;
        let client = shared.client().await;
        let namespace = support::namespace(&client).await;
        Self { shared, client, namespace }
    }

    /// What kubectl prints, asked in this namespace; its error otherwise.
    pub(crate) fn try_kubectl(&self, args: &[&str]) -> Result<String> {
        output(self.shared.plane.kubectl().args(["-n", &self.namespace]).args(args))
    }

    /// What kubectl prints, asked in this namespace.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        self.try_kubectl(args).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Applies an object, as a user who writes `kubectl apply -f`.
    pub(crate) fn try_apply(&self, object: &Value) -> Result<String> {
        let file = self.file(object);
        self.try_kubectl(&["apply", "-f", &file])
    }

    pub(crate) fn apply(&self, object: &Value) {
        self.try_apply(object).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// As [`Team::apply`], for objects that are too large for the annotation of a client-side apply.
    pub(crate) fn apply_large(&self, object: &Value) {
        self.kubectl(&["apply", "--server-side", "-f", &self.file(object)]);
    }

    /// The error with which applying the object is refused.
    pub(crate) fn refusal(&self, object: &Value) -> String {
        match self.try_apply(object) {
            Ok(done) => panic!("not refused: {done}"),
            Err(error) => format!("{error:#}"),
        }
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[args, &["-o", "json"]].concat())).expect("JSON")
    }

    pub(crate) fn get(&self, what: &str) -> Value {
        self.json(&["get", what])
    }

    /// Waits until `probe` is content with the object.
    pub(crate) async fn until(&self, what: &str, title: &str, probe: impl Fn(&Value) -> bool) -> Value {
        self.wait_for(&format!("{what}: {title}"), async || {
            let found: Value = serde_json::from_str(&self.try_kubectl(&["get", what, "-o", "json"])?)?;
            ensure!(probe(&found), "{:#}", found["status"]);
            Ok(found)
        })
        .await
    }

    /// As [`support::eventually`], and a failure tells what the operator had to say.
    pub(crate) async fn wait_for<T>(&self, what: &str, probe: impl AsyncFnMut() -> Result<T>) -> T {
        support::retry(what, PATIENCE, probe).await.unwrap_or_else(|error| {
            let log = self.shared.operator.log();
            let lines: Vec<&str> = log.lines().collect();
            panic!("{error:#}\nthe operator's log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        })
    }

    /// Waits until a condition has this status and reason.
    pub(crate) async fn until_condition(&self, what: &str, kind: &str, status: &str, reason: &str) -> Value {
        self.until(what, &format!("{kind}={status} ({reason})"), |found| {
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

/// The condition of that type, if the object has it.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// An ApiKey with this spec.
pub(crate) fn api_key(name: &str, spec: &Value) -> Value {
    serde_json::json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    })
}
