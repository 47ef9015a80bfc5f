//! Writes keys directly to etcd, in the format of the apiserver: 100,000 keys take seconds. They are copies of one key
//! that the operator minted, with different names, uids and digests.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes};
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::ByteString;
use keywright::{api::KeyType, domain::key::Key};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::support::keys::sha256;

/// The number of objects in one transaction. etcd's limit is 128.
const BATCH: usize = 100;

/// The value of key `number`. It is deterministic, so that values need not be stored.
pub fn value(number: usize) -> String {
    let mut random = StdRng::seed_from_u64(number as u64);
    Key::mint(KeyType::Team, &mut random).expect("a key").expose().to_owned()
}

/// The namespace and the name of key `number`.
pub fn location(number: usize) -> (String, String) {
    (format!("bench-{}", number % 100), format!("seeded-{number:06}"))
}

/// Writes the keys with these numbers as copies of `template`, an ApiKey as the apiserver returns it.
pub async fn write(etcd: &str, template: &Value, numbers: std::ops::Range<usize>) -> Result<()> {
    let client = legacy::Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let base64 = |text: &str| -> Result<Value> { Ok(serde_json::to_value(ByteString(text.as_bytes().to_vec()))?) };
    let mut puts = vec![];
    let last = numbers.end.saturating_sub(1);
    for number in numbers {
        let ((namespace, name), digest) = (location(number), sha256(&value(number)));
        let mut key = template.clone();
        key["metadata"]["name"] = json!(name);
        key["metadata"]["namespace"] = json!(namespace);
        key["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{number:012}"));
        if let Some(metadata) = key["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
        key["status"]["id"] = json!(format!("key_{}", &digest[..16]));
        key["status"]["tokens"][0]["sha256"] = json!(digest);
        key["status"]["tokens"][0]["id"] = key["status"]["id"].clone();
        let mut path = "/registry/keywright.dev/apikeys/".to_owned();
        write!(path, "{namespace}/{name}")?;
        puts.push(json!({"requestPut": {"key": base64(&path)?, "value": base64(&key.to_string())?}}));
        if puts.len() == BATCH || number == last {
            let body = serde_json::to_vec(&json!({"success": std::mem::take(&mut puts)}))?;
            let request = Request::post(format!("{etcd}/v3/kv/txn")).body(Full::from(body))?;
            let response = client.request(request).await.context("etcd")?;
            let status = response.status();
            let text = response.into_body().collect().await?.to_bytes();
            ensure!(status.is_success(), "etcd: {status}: {}", String::from_utf8_lossy(&text));
        }
    }
    Ok(())
}
