//! Versions of the Secrets and ApiKeys of a namespace as an administrator's watch receives them, and their consistency.

use std::fmt::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use keywright::api::{ApiKey, Condition};
use kube::api::{Api, Patch, PatchParams, WatchEvent, WatchParams};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

/// The annotation of a Secret with the record of its key.
pub const RECORD: &str = "keywright.dev/record";
/// The annotation with the message authentication code of the record.
pub const RECORD_MAC: &str = "keywright.dev/record-mac";

/// The data keys of a sealed value, and of a value that a KeyReveal has claimed.
pub const SEALED: [&str; 2] = ["sealed-value", "claimed"];

/// The type of the Secrets that hold keys.
pub const SECRET_TYPE: &str = "keywright.dev/api-key";

/// Every version of the Secrets and ApiKeys of a namespace. It uses watches, because polling would miss a value that
/// existed only for a moment.
pub struct History {
    client: Client,
    namespace: String,
    secrets: Arc<Mutex<Vec<Secret>>>,
    keys: Arc<Mutex<Vec<ApiKey>>>,
    watches: [JoinHandle<()>; 2],
}

impl History {
    /// Starts the watches.
    pub fn of(client: &Client, namespace: &str) -> Self {
        let (secrets, keys) = (Arc::default(), Arc::default());
        let watches = [
            tokio::spawn(follow(Api::namespaced(client.clone(), namespace), Arc::clone(&secrets))),
            tokio::spawn(follow(Api::namespaced(client.clone(), namespace), Arc::clone(&keys))),
        ];
        Self { client: client.clone(), namespace: namespace.to_owned(), secrets, keys, watches }
    }

    /// The values that a Secret has held, in order. A value that returned is listed again.
    pub fn values(&self, secret: &str) -> Vec<String> {
        let secrets = self.secrets.lock().unwrap();
        let mut values: Vec<String> =
            secrets.iter().filter(|seen| seen.name_any() == secret).filter_map(value_of).collect();
        values.dedup();
        values
    }

    /// The versions of an ApiKey.
    pub fn keys(&self, name: &str) -> Vec<ApiKey> {
        self.keys.lock().unwrap().iter().filter(|key| key.name_any() == name).cloned().collect()
    }

    /// The key, its Secret and all values of the Secret; an error until the watch has received the Secret's current
    /// version.
    pub async fn current(&self, name: &str) -> Result<(ApiKey, Secret, Vec<String>)> {
        let key = Api::<ApiKey>::namespaced(self.client.clone(), &self.namespace).get(name).await?;
        let secret_name = format!("{name}-secret");
        let secret = Api::<Secret>::namespaced(self.client.clone(), &self.namespace).get(&secret_name).await?;
        let seen = self.secrets.lock().unwrap().iter().any(|s| s.resource_version() == secret.resource_version());
        ensure!(seen, "the watch has not received the current version of the Secret");
        Ok((key, secret, self.values(&secret_name)))
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.watches.iter().for_each(JoinHandle::abort);
    }
}

async fn follow<K>(api: Api<K>, seen: Arc<Mutex<Vec<K>>>)
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned,
{
    let mut version = "0".to_owned();
    loop {
        if let Ok(stream) = api.watch(&WatchParams::default(), &version).await {
            let mut stream = std::pin::pin!(stream);
            while let Some(Ok(event)) = stream.next().await {
                if let WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) = event {
                    version = object.resource_version().unwrap_or_default();
                    seen.lock().unwrap().push(object);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The plain value in a Secret of the operator; `None` if the value is sealed.
pub fn value_of(secret: &Secret) -> Option<String> {
    if secret.type_.as_deref() != Some(SECRET_TYPE) {
        return None;
    }
    let (_, ByteString(bytes)) = secret.data.as_ref()?.iter().find(|(name, _)| !SEALED.contains(&name.as_str()))?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// SHA-256 in hex, computed independently of the code under test.
pub fn sha256(value: &str) -> String {
    Sha256::digest(value).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// A value as it appears in the data of a Secret.
pub fn base64(value: &str) -> String {
    let encoded = serde_json::to_value(ByteString(value.as_bytes().to_vec())).expect("base64");
    encoded.as_str().expect("a string").to_owned()
}

/// Applies an ApiKey by server-side apply.
pub async fn apply(client: &Client, namespace: &str, name: &str, spec: &Value) -> Result<ApiKey> {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    let manifest = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    });
    Ok(keys.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(manifest)).await?)
}

/// The conditions of a key; empty before its first status.
pub fn conditions(key: &ApiKey) -> &[Condition] {
    key.status.as_ref().map_or(&[], |status| &status.conditions)
}

/// One condition of a key.
pub fn condition<'a>(key: &'a ApiKey, kind: &str) -> Option<&'a Condition> {
    conditions(key).iter().find(|condition| condition.type_ == kind)
}

/// An error unless the status is of the current generation and Ready by the rules of kstatus.
pub fn settled(key: &ApiKey) -> Result<()> {
    let status = key.status.as_ref().context("no status yet")?;
    ensure!(status.observed_generation == key.metadata.generation, "the status is of an older generation");
    let ready = condition(key, "Ready").context("no condition Ready")?;
    ensure!(ready.status == "True", "not ready: {}: {}", ready.reason, ready.message);
    for kind in ["Reconciling", "Stalled"] {
        ensure!(condition(key, kind).is_none(), "the key is Ready and has condition {kind}");
    }
    Ok(())
}

/// An error unless value, record and status are consistent. `values` are all values that the Secret ever held.
pub fn consistent(key: &ApiKey, secret: &Secret, values: &[String]) -> Result<()> {
    let status = key.status.as_ref().context("no status")?;
    let value = value_of(secret).context("no value in the Secret")?;
    ensure!(values.last() == Some(&value), "the Secret does not hold the last value that the watch received");
    let token = status.tokens.first().context("no token in the status")?;
    ensure!(token.sha256 == sha256(&value), "the status has the digest of another value");
    ensure!(status.id.as_deref() == Some(token.id.as_str()), "the id in the status is not that of the current token");

    let record = secret.annotations().get(RECORD).context("no record")?;
    ensure!(!record.contains(&value), "the record contains the value");
    let record: Value = serde_json::from_str(record)?;
    let time = |at: &Value| at.as_str().map(str::parse::<Timestamp>).transpose();
    let entry = |entry: &Value| anyhow::Ok((entry["sha256"].as_str().map(str::to_owned), time(&entry["mintedAt"])?));
    let token = |at: usize| status.tokens.get(at).map(|t| (Some(t.sha256.clone()), Some(t.minted_at.0)));
    ensure!(Some(entry(&record["current"])?) == token(0), "record and status differ in the current value");
    ensure!(
        time(&record["createdAt"])? == status.created_at.as_ref().map(|t| t.0),
        "record and status differ in createdAt"
    );
    ensure!(
        time(&record["lastRotatedAt"])? == status.last_rotated_at.as_ref().map(|t| t.0),
        "record and status differ in lastRotatedAt"
    );
    ensure!(
        record["requestedAt"].as_str() == status.last_handled_requested_at.as_deref(),
        "record and status differ in the last handled rotation request"
    );
    match &record["previous"] {
        Value::Null => ensure!(status.tokens.len() == 1, "the status has a token that is not in the record"),
        previous => {
            ensure!(Some(entry(previous)?) == token(1), "record and status differ in the previous value");
            let end = status.tokens[1].expires_at.as_ref().map(|t| t.0);
            ensure!(time(&previous["expiresAt"])? == end, "record and status differ in the end of the overlap");
        }
    }
    Ok(())
}

/// Deletes the operator's Lease, so that a test that killed the leader need not wait until the Lease expires.
pub async fn free_lease(client: &Client) -> Result<()> {
    use k8s_openapi::api::coordination::v1::Lease;
    let leases: Api<Lease> = Api::namespaced(client.clone(), super::operator::NAMESPACE);
    match leases.delete("keywright-operator", &kube::api::DeleteParams::default()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The value of a metric that has no labels.
pub fn metric(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.strip_prefix("{}").unwrap_or(rest).strip_prefix(' ')
    })?;
    rest.split(' ').next()?.parse().ok()
}

/// The sum of a metric over all its labels.
pub fn metric_sum(text: &str, name: &str) -> f64 {
    let samples = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} "));
    samples.filter_map(|(_, value)| value.split(' ').next()?.parse::<f64>().ok()).sum()
}

/// The first part of a text that has the form of a value, plain or in base64.
pub fn find_value(text: &str) -> Option<&str> {
    let word = |at: usize, least: usize| {
        let length = text[at..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len() - at);
        (length >= least).then(|| &text[at..at + length])
    };
    // Base64 of `kwp_`, `kws_` and `kwt_` starts with these characters, whatever follows.
    let plain = ["kwp_", "kws_", "kwt_"].map(|prefix| (prefix, 12));
    let encoded = ["a3dwX", "a3dzX", "a3d0X"].map(|prefix| (prefix, 16));
    let all = plain.into_iter().chain(encoded);
    all.flat_map(|(prefix, least)| text.match_indices(prefix).map(move |(at, _)| (at, least)))
        .find_map(|(at, least)| word(at, least))
}
