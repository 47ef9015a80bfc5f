//! The verifier's binary, called directly like a proxy calls it, with keys that the operator minted on a real control
//! plane. [`keys`] tests the life cycle of keys, [`knowledge`] the state of the verifier and its age, [`uses`]
//! `status.lastUsedAt`, [`introspection`] RFC 7662, [`bounds`] the limits of connections and bodies, and [`soak`]
//! compares random changes of many keys with a model.

mod bounds;
mod introspection;
mod keys;
mod knowledge;
mod soak;
mod uses;

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use crate::support::keys::{apply, settled, value_of};
use crate::support::verifier::{Answer, Options, Verifier, send};
use crate::support::{TIMEOUT, eventually, from_now};
use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use keywright::api::ApiKey;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

/// The time within which a change must take effect.
const PROPAGATION_LIMIT: Duration = Duration::from_secs(1);

/// The verifier that most tests share.
async fn verifier() -> &'static Verifier {
    static VERIFIER: OnceCell<Result<Verifier>> = OnceCell::const_new();
    let start = async || {
        // Every decision is logged, so that a test can search the whole log for values.
        let args = ["--log-allowed-one-in=1", "--log-refused-per-second=100000", "--log=trace"].map(str::to_owned);
        start(Options { args: args.into(), ..Options::default() }).await
    };
    let verifier = VERIFIER.get_or_init(start).await;
    verifier.as_ref().unwrap_or_else(|error| panic!("no verifier: {error:#}"))
}

/// Starts another verifier, and waits until it has listed all keys.
async fn start(options: Options) -> Result<Verifier> {
    let verifier = Verifier::start(crate::support::shared().await.plane, options).await?;
    verifier.wait_ready().await?;
    Ok(verifier)
}

/// A namespace and its keys.
struct Team {
    client: Client,
    namespace: String,
    keys: Api<ApiKey>,
    secrets: Api<Secret>,
}

impl Team {
    async fn new() -> Self {
        let client = crate::support::shared().await.client().await;
        let namespace = crate::support::namespace(&client).await;
        let keys = Api::namespaced(client.clone(), &namespace);
        let secrets = Api::namespaced(client.clone(), &namespace);
        Self { client, namespace, keys, secrets }
    }

    /// Applies a key, waits until it is ready, and returns its value.
    async fn mint(&self, name: &str, spec: &Value) -> String {
        self.apply(name, spec).await;
        self.value(name).await
    }

    async fn apply(&self, name: &str, spec: &Value) {
        apply(&self.client, &self.namespace, name, spec).await.expect("the key is applied");
        self.ready(name).await;
    }

    async fn ready(&self, name: &str) -> ApiKey {
        eventually(&format!("{name} is ready"), TIMEOUT, async || {
            let key = self.keys.get(name).await?;
            settled(&key)?;
            Ok(key)
        })
        .await
    }

    async fn value(&self, name: &str) -> String {
        let secret = self.secrets.get(&format!("{name}-secret")).await.expect("a Secret");
        value_of(&secret).expect("a value")
    }

    async fn patch(&self, name: &str, spec: &Value) {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.keys.patch(name, &PatchParams::default(), &patch).await.expect("the key is changed");
    }

    async fn delete(&self, name: &str) {
        self.keys.delete(name, &DeleteParams::default()).await.expect("the key is deleted");
    }
}

/// A key that may read alerts.
fn reader() -> Value {
    json!({"type": "Team", "permissions": ["alerts:ReadConfig"]})
}

/// Sends a check like nginx.
async fn check(verifier: &Verifier, requirement: &str, value: &str) -> Answer {
    check_with(verifier.address(), &format!("/nginx/{requirement}"), &[("Authorization", &format!("Bearer {value}"))])
        .await
}

async fn check_with(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut text = format!("GET {path} HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\n");
    for (name, value) in headers {
        let _ = write!(text, "{name}: {value}\r\n");
    }
    send(address, format!("{text}\r\n").as_bytes()).await.expect("an answer")
}

/// Waits until a check of the key has the status, and returns that answer.
async fn wait_for_status(
    verifier: &Verifier,
    requirement: &str,
    value: &str,
    status: u16,
    timeout: Duration,
) -> Answer {
    eventually(&format!("the status is {status}"), timeout, async || {
        let answer = check(verifier, requirement, value).await;
        ensure!(answer.status == status, "{} {}", answer.head, answer.body);
        Ok(answer)
    })
    .await
}
