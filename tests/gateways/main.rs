//! The examples in `examples/gateways` with the proxies themselves: Envoy over gRPC and over HTTP, nginx, Caddy and Traefik
//! in front of the real verifier, with keys that the real operator minted. [`keys`] has what a key can and can't do,
//! [`attacks`] what clients try, [`outages`] what happens without the verifier, [`examples`] what holds for those of other
//! proxies too.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod attacks;
mod examples;
mod keys;
mod outages;

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::jiff::Timestamp;
use keywright::api::ApiKey;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use support::gateways::{Answer, Gateway, Kind, Upstream};
use support::verifier::{Options as VerifierOptions, Verifier};
use support::{PATIENCE, eventually, from_now};
use tokio::sync::OnceCell;

/// The namespace whose keys alone may pass at `/ingest/`, as the examples say.
pub(crate) const SHOP: &str = "shop";
/// Another one.
pub(crate) const OTHER: &str = "other";

/// What the verifier tells the application.
pub(crate) const IDENTITY: [&str; 5] =
    ["X-Keywright-Key-Id", "X-Keywright-Key-Name", "X-Keywright-Key-Type", "X-Keywright-Team", "X-Keywright-User"];

/// One of each: the verifier, the proxies in front of it, the application behind them.
pub(crate) struct Edge {
    pub(crate) verifier: Verifier,
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) upstream: Upstream,
}

pub(crate) async fn edge() -> &'static Edge {
    static EDGE: OnceCell<Result<Edge>> = OnceCell::const_new();
    let edge = EDGE.get_or_init(async || {
        let shared = support::shared().await;
        let client = shared.client().await;
        for name in [SHOP, OTHER] {
            let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
            let namespace = Namespace { metadata, ..Namespace::default() };
            Api::all(client.clone()).create(&PostParams::default(), &namespace).await?;
        }
        let edge = Edge::start(VerifierOptions::default()).await?;
        edge.verifier.wait_ready().await?;
        Ok(edge)
    });
    edge.await.as_ref().unwrap_or_else(|error| panic!("no edge: {error:#}"))
}

impl Edge {
    /// Starts a verifier, which may not be ready yet, and all proxies.
    pub(crate) async fn start(options: VerifierOptions) -> Result<Self> {
        let plane = support::shared().await.plane;
        let upstream = Upstream::start()?;
        let verifier = Verifier::start(plane, options).await?;
        let mut gateways = Vec::new();
        for kind in Kind::ALL {
            gateways.push(Gateway::start(plane, kind, verifier.address(), upstream.address).await?);
        }
        Ok(Self { verifier, gateways, upstream })
    }
}

/// A request of a test, to be found again at the application.
pub(crate) struct Sent {
    pub(crate) answer: Answer,
    /// The heads of what came through to the application, to the byte.
    pub(crate) upstream: Vec<String>,
}

impl Edge {
    /// Sends a request through one proxy, with a mark by which the application's part is found.
    pub(crate) async fn get(&self, gateway: &Gateway, path: &str, headers: &[(&str, &str)]) -> Sent {
        let mark = mark();
        let headers = [headers, &[("X-Mark", &mark)]].concat();
        let answer = gateway.get(path, &headers).await;
        Sent { answer, upstream: self.upstream.seen(&mark) }
    }

    /// Asserts that a request is refused with one of `statuses`, and that the application never hears of it.
    #[track_caller]
    pub(crate) fn assert_refused(gateway: &Gateway, sent: &Sent, statuses: &[u16], what: &str) {
        let kind = gateway.kind;
        assert!(sent.upstream.is_empty(), "{kind:?}: {what}: the application got {:?}", sent.upstream);
        assert!(statuses.contains(&sent.answer.status), "{kind:?}: {what}: {} {}", sent.answer.head, sent.answer.body);
    }

    /// Asserts that a request came through once, and returns what the application got.
    #[track_caller]
    pub(crate) fn assert_passed<'a>(gateway: &Gateway, sent: &'a Sent, what: &str) -> &'a str {
        let kind = gateway.kind;
        assert_eq!(sent.answer.status, 200, "{kind:?}: {what}: {} {}", sent.answer.head, sent.answer.body);
        assert_eq!(sent.upstream.len(), 1, "{kind:?}: {what}");
        &sent.upstream[0]
    }

    /// Waits until a key is accepted by every proxy.
    pub(crate) async fn wait_until_accepted(&self, value: &str) {
        self.wait_until(value, 200).await;
    }

    /// Waits until every proxy answers requests with this key with `status`.
    pub(crate) async fn wait_until(&self, value: &str, status: u16) {
        eventually(&format!("the answer is {status}"), PATIENCE, async || {
            for gateway in &self.gateways {
                let answer = gateway.get("/account/wait", &[("X-API-Key", value)]).await;
                ensure!(answer.status == status, "{:?}: {}", gateway.kind, answer.head);
            }
            Ok(())
        })
        .await;
    }
}

pub(crate) fn mark() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("mark-{}-end", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `Authorization: Bearer VALUE`.
pub(crate) fn bearer(value: &str) -> String {
    format!("Bearer {value}")
}

/// The keys of a namespace, and an administrator.
pub(crate) struct Team {
    pub(crate) client: Client,
    pub(crate) namespace: &'static str,
    pub(crate) keys: Api<ApiKey>,
}

impl Team {
    pub(crate) async fn of(namespace: &'static str) -> Self {
        let client = support::shared().await.client().await;
        let keys = Api::namespaced(client.clone(), namespace);
        Self { client, namespace, keys }
    }

    pub(crate) async fn ready(&self, name: &str) -> ApiKey {
        eventually(&format!("{name} is ready"), PATIENCE, async || {
            let key = self.keys.get(name).await?;
            support::keys::settled(&key)?;
            Ok(key)
        })
        .await
    }

    /// The value that the Secret of a key holds now.
    pub(crate) async fn value(&self, name: &str) -> String {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), self.namespace);
        let secret = secrets.get(&format!("{name}-secret")).await.expect("the Secret");
        support::keys::value_of(&secret).expect("a value in the Secret")
    }

    /// Creates a key, waits for its value, and until the verifier knows it.
    pub(crate) async fn minted(&self, name: &str, spec: &Value) -> (ApiKey, String) {
        support::keys::apply(&self.client, self.namespace, name, spec).await.expect("the ApiKey");
        let key = self.ready(name).await;
        let value = self.value(name).await;
        edge().await.wait_until_accepted(&value).await;
        (key, value)
    }

    /// Changes a spec by a merge patch.
    pub(crate) async fn edit(&self, name: &str, spec: Value) -> ApiKey {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.keys.patch(name, &PatchParams::default(), &patch).await.expect("the ApiKey is changed")
    }
}

/// A Team key with these permissions.
pub(crate) fn team_key(permissions: &[&str]) -> Value {
    json!({"type": "Team", "permissions": permissions})
}

/// A key of namespace shop that may read alerts, and nothing else; the same one for all tests that do not change it.
pub(crate) async fn reader() -> &'static str {
    static READER: OnceCell<String> = OnceCell::const_new();
    let reader = READER.get_or_init(async || {
        edge().await;
        Team::of(SHOP).await.minted("reader", &team_key(&["alerts-map:Read"])).await.1
    });
    reader.await
}

/// The id of the value that works now.
pub(crate) fn id(key: &ApiKey) -> String {
    let id = key.status.as_ref().and_then(|status| status.id.clone());
    id.with_context(|| key.name_any()).expect("an id")
}
