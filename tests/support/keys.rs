//! What an administrator sees of keys: every version of the Secrets and ApiKeys of a namespace, and whether they agree.

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

/// The annotation with the record of a key.
pub const RECORD: &str = "keywright.dev/record";
/// The annotation with its message authentication code.
pub const RECORD_MAC: &str = "keywright.dev/record-mac";

/// Where a Secret holds a sealed value, and one on its way to the person who took it.
pub const SEALED: [&str; 2] = ["sealed-value", "claimed"];

/// The type of the Secrets that hold keys.
pub const SECRET_TYPE: &str = "keywright.dev/api-key";

/// All that happened in one namespace to Secrets and ApiKeys, version by version, as a watch of an administrator tells
/// it. Polling would miss a value that was there only for a moment; a watch does not.
pub struct History {
    client: Client,
    namespace: String,
    secrets: Arc<Mutex<Vec<Secret>>>,
    keys: Arc<Mutex<Vec<ApiKey>>>,
    watches: [JoinHandle<()>; 2],
}

impl History {
    /// Begins to watch.
    pub fn of(client: &Client, namespace: &str) -> Self {
        let (secrets, keys) = (Arc::default(), Arc::default());
        let watches = [
            tokio::spawn(follow(Api::namespaced(client.clone(), namespace), Arc::clone(&secrets))),
            tokio::spawn(follow(Api::namespaced(client.clone(), namespace), Arc::clone(&keys))),
        ];
        Self { client: client.clone(), namespace: namespace.to_owned(), secrets, keys, watches }
    }

    /// The values that the Secret of a key has held, in order. A value that came back counts again.
    pub fn values(&self, secret: &str) -> Vec<String> {
        let secrets = self.secrets.lock().unwrap();
        let mut values: Vec<String> =
            secrets.iter().filter(|seen| seen.name_any() == secret).filter_map(value_of).collect();
        values.dedup();
        values
    }

    /// Every version of an ApiKey.
    pub fn keys(&self, name: &str) -> Vec<ApiKey> {
        self.keys.lock().unwrap().iter().filter(|key| key.name_any() == name).cloned().collect()
    }

    /// The key, its Secret and all values until now; an error until the watch has seen both as they are.
    pub async fn now(&self, name: &str) -> Result<(ApiKey, Secret, Vec<String>)> {
        let key = Api::<ApiKey>::namespaced(self.client.clone(), &self.namespace).get(name).await?;
        let place = format!("{name}-secret");
        let secret = Api::<Secret>::namespaced(self.client.clone(), &self.namespace).get(&place).await?;
        let seen = self.secrets.lock().unwrap().iter().any(|s| s.resource_version() == secret.resource_version());
        ensure!(seen, "the watch is behind");
        Ok((key, secret, self.values(&place)))
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

/// The value in a Secret of ours, unless it is sealed.
pub fn value_of(secret: &Secret) -> Option<String> {
    if secret.type_.as_deref() != Some(SECRET_TYPE) {
        return None;
    }
    let (_, ByteString(bytes)) = secret.data.as_ref()?.iter().find(|(name, _)| !SEALED.contains(&name.as_str()))?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// SHA-256 in hex, computed here and not by the code under test.
pub fn sha256(value: &str) -> String {
    Sha256::digest(value).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// A value as the API transports it.
pub fn base64(value: &str) -> String {
    let encoded = serde_json::to_value(ByteString(value.as_bytes().to_vec())).expect("base64");
    encoded.as_str().expect("a string").to_owned()
}

/// Applies an ApiKey, as kubectl or Argo CD would.
pub async fn apply(client: &Client, namespace: &str, name: &str, spec: &Value) -> Result<ApiKey> {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    let manifest = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    });
    Ok(keys.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(manifest)).await?)
}

/// Every condition of a key; none before its first status.
pub fn conditions(key: &ApiKey) -> &[Condition] {
    key.status.as_ref().map_or(&[], |status| &status.conditions)
}

/// One condition of a key.
pub fn condition<'a>(key: &'a ApiKey, kind: &str) -> Option<&'a Condition> {
    conditions(key).iter().find(|condition| condition.type_ == kind)
}

/// An error unless the key is as its spec wants it, and says so as kstatus and Argo CD read it.
pub fn settled(key: &ApiKey) -> Result<()> {
    let status = key.status.as_ref().context("no status yet")?;
    ensure!(status.observed_generation == key.metadata.generation, "the status is of an older generation");
    let ready = condition(key, "Ready").context("no condition Ready")?;
    ensure!(ready.status == "True", "not ready: {}: {}", ready.reason, ready.message);
    for kind in ["Reconciling", "Stalled"] {
        ensure!(condition(key, kind).is_none(), "ready, and {kind} all the same");
    }
    Ok(())
}

/// An error unless value, record and status say the same. `values` are all that the Secret ever held.
pub fn agree(key: &ApiKey, secret: &Secret, values: &[String]) -> Result<()> {
    let status = key.status.as_ref().context("no status")?;
    let value = value_of(secret).context("no value in the Secret")?;
    ensure!(values.last() == Some(&value), "the Secret does not hold the last value that was seen");
    let token = status.tokens.first().context("no token in the status")?;
    ensure!(token.sha256 == sha256(&value), "the status has the digest of another value");
    ensure!(status.id.as_deref() == Some(token.id.as_str()), "the id is another token's");

    let record = secret.annotations().get(RECORD).context("no record")?;
    ensure!(!record.contains(&value), "the record holds the value");
    let record: Value = serde_json::from_str(record)?;
    let time = |at: &Value| at.as_str().map(str::parse::<Timestamp>).transpose();
    let entry = |entry: &Value| anyhow::Ok((entry["sha256"].as_str().map(str::to_owned), time(&entry["mintedAt"])?));
    let token = |at: usize| status.tokens.get(at).map(|t| (Some(t.sha256.clone()), Some(t.minted_at.0)));
    ensure!(Some(entry(&record["current"])?) == token(0), "record and status differ in the current value");
    ensure!(time(&record["createdAt"])? == status.created_at.as_ref().map(|t| t.0), "they differ in createdAt");
    ensure!(
        time(&record["lastRotatedAt"])? == status.last_rotated_at.as_ref().map(|t| t.0),
        "they differ in lastRotatedAt"
    );
    ensure!(
        record["requestedAt"].as_str() == status.last_handled_requested_at.as_deref(),
        "they differ in the request that was carried out"
    );
    match &record["previous"] {
        Value::Null => ensure!(status.tokens.len() == 1, "the status has a token that the record does not know"),
        previous => {
            ensure!(Some(entry(previous)?) == token(1), "record and status differ in the previous value");
            let end = status.tokens[1].expires_at.as_ref().map(|t| t.0);
            ensure!(time(&previous["expiresAt"])? == end, "they differ in the end of the overlap");
        }
    }
    Ok(())
}

/// Takes a Lease away, as if it had run out: a test that kills a leader need not wait for that each time.
pub async fn free_lease(client: &Client) -> Result<()> {
    use k8s_openapi::api::coordination::v1::Lease;
    let leases: Api<Lease> = Api::namespaced(client.clone(), super::operator::NAMESPACE);
    match leases.delete("keywright-operator", &kube::api::DeleteParams::default()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The value of a metric without labels.
pub fn metric(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.strip_prefix("{}").unwrap_or(rest).strip_prefix(' ')
    })?;
    rest.split(' ').next()?.parse().ok()
}

/// The sum of a metric over all its labels.
pub fn metric_sum(text: &str, name: &str) -> f64 {
    let of_it = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} "));
    of_it.filter_map(|(_, value)| value.split(' ').next()?.parse::<f64>().ok()).sum()
}

/// Whether a text holds something that has the form of a value, plain or in base64.
pub fn looks_like_a_value(text: &str) -> Option<&str> {
    let long = |at: usize, least: usize| {
        let of = text[at..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len() - at);
        (of >= least).then(|| &text[at..at + of])
    };
    // In base64, `kwp_` and the others begin like this whatever follows.
    let plain = ["kwp_", "kws_", "kwt_"].map(|prefix| (prefix, 12));
    let encoded = ["a3dwX", "a3dzX", "a3d0X"].map(|prefix| (prefix, 16));
    let all = plain.into_iter().chain(encoded);
    all.flat_map(|(prefix, least)| text.match_indices(prefix).map(move |(at, _)| (at, least)))
        .find_map(|(at, least)| long(at, least))
}
