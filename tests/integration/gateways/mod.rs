//! The configurations in `examples/gateways` with the real proxies: Envoy over gRPC and over HTTP, nginx, Caddy and
//! Traefik in front of the verifier, with keys that the operator minted. [`keys`] tests the life cycle and the
//! permissions of keys, [`attacks`] attacks of clients, [`outages`] failures of the verifier, and [`examples`] rules
//! for the configurations of all proxies.

mod attacks;
mod examples;
mod keys;
mod outages;

use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::gateways::{Answer, Gateway, Kind, Upstream};
use crate::support::verifier::{Options as VerifierOptions, Verifier};
use crate::support::{TIMEOUT, eventually, from_now};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::jiff::Timestamp;
use keywright::api::ApiKey;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

/// The only namespace whose keys may pass at `/ingest/` in the examples.
pub(crate) const SHOP: &str = "shop";
/// Another namespace.
pub(crate) const OTHER: &str = "other";

/// The headers in which the verifier identifies a key to the application.
pub(crate) const IDENTITY: [&str; 5] =
    ["X-Keywright-Key-Id", "X-Keywright-Key-Name", "X-Keywright-Key-Type", "X-Keywright-Team", "X-Keywright-User"];

/// The verifier, the proxies, and the application behind them.
pub(crate) struct Edge {
    pub(crate) verifier: Verifier,
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) upstream: Upstream,
}

pub(crate) async fn edge() -> &'static Edge {
    static EDGE: OnceCell<Result<Edge>> = OnceCell::const_new();
    let edge = EDGE.get_or_init(async || {
        let shared = crate::support::shared().await;
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
        let plane = crate::support::shared().await.plane;
        let upstream = Upstream::start()?;
        let verifier = Verifier::start(plane, options).await?;
        let mut gateways = Vec::new();
        for kind in Kind::ALL {
            gateways.push(Gateway::start(plane, kind, verifier.address(), upstream.address).await?);
        }
        Ok(Self { verifier, gateways, upstream })
    }
}

/// The result of a request.
pub(crate) struct Sent {
    pub(crate) answer: Answer,
    /// The requests that the application received for it, unchanged.
    pub(crate) upstream: Vec<String>,
}

impl Edge {
    /// Sends a request through one proxy, with a mark that identifies it at the application.
    pub(crate) async fn get(&self, gateway: &Gateway, path: &str, headers: &[(&str, &str)]) -> Sent {
        let mark = mark();
        let headers = [headers, &[("X-Mark", &mark)]].concat();
        let answer = gateway.get(path, &headers).await;
        Sent { answer, upstream: self.upstream.seen(&mark) }
    }

    /// Asserts that a request is rejected with one of `statuses` and does not reach the application.
    #[track_caller]
    pub(crate) fn assert_rejected(gateway: &Gateway, sent: &Sent, statuses: &[u16], what: &str) {
        let kind = gateway.kind;
        assert!(sent.upstream.is_empty(), "{kind:?}: {what}: the application received {:?}", sent.upstream);
        assert!(statuses.contains(&sent.answer.status), "{kind:?}: {what}: {} {}", sent.answer.head, sent.answer.body);
    }

    /// Asserts that a request reached the application once, and returns it as received.
    #[track_caller]
    pub(crate) fn assert_passed<'a>(gateway: &Gateway, sent: &'a Sent, what: &str) -> &'a str {
        let kind = gateway.kind;
        assert_eq!(sent.answer.status, 200, "{kind:?}: {what}: {} {}", sent.answer.head, sent.answer.body);
        assert_eq!(sent.upstream.len(), 1, "{kind:?}: {what}");
        &sent.upstream[0]
    }

    /// Waits until every proxy accepts a key.
    pub(crate) async fn wait_until_accepted(&self, value: &str) {
        self.wait_until(value, 200).await;
    }

    /// Waits until every proxy answers requests with this key with `status`.
    pub(crate) async fn wait_until(&self, value: &str, status: u16) {
        eventually(&format!("the status is {status}"), TIMEOUT, async || {
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

/// The keys of a namespace, and a client of an administrator.
pub(crate) struct Team {
    pub(crate) client: Client,
    pub(crate) namespace: &'static str,
    pub(crate) keys: Api<ApiKey>,
}

impl Team {
    pub(crate) async fn of(namespace: &'static str) -> Self {
        let client = crate::support::shared().await.client().await;
        let keys = Api::namespaced(client.clone(), namespace);
        Self { client, namespace, keys }
    }

    pub(crate) async fn ready(&self, name: &str) -> ApiKey {
        eventually(&format!("{name} is ready"), TIMEOUT, async || {
            let key = self.keys.get(name).await?;
            crate::support::keys::settled(&key)?;
            Ok(key)
        })
        .await
    }

    /// The current value in the Secret of a key.
    pub(crate) async fn value(&self, name: &str) -> String {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), self.namespace);
        let secret = secrets.get(&format!("{name}-secret")).await.expect("the Secret");
        crate::support::keys::value_of(&secret).expect("a value in the Secret")
    }

    /// Creates a key, and waits until every proxy accepts its value.
    pub(crate) async fn minted(&self, name: &str, spec: &Value) -> (ApiKey, String) {
        crate::support::keys::apply(&self.client, self.namespace, name, spec).await.expect("the ApiKey");
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

/// A key of namespace shop that has only permission `alerts-map:Read`, shared by the tests that do not change it.
pub(crate) async fn reader() -> &'static str {
    static READER: OnceCell<String> = OnceCell::const_new();
    let reader = READER.get_or_init(async || {
        edge().await;
        Team::of(SHOP).await.minted("reader", &team_key(&["alerts-map:Read"])).await.1
    });
    reader.await
}

/// The id of the current value.
pub(crate) fn id(key: &ApiKey) -> String {
    let id = key.status.as_ref().and_then(|status| status.id.clone());
    id.with_context(|| key.name_any()).expect("an id")
}
