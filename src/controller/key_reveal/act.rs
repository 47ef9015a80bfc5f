//! The three writes of an answer that change a Secret: who saw a value first, who takes it, and that it was taken.

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, Client, api::Patch};
use serde_json::{Value, json};

use crate::{
    api::ApiKey,
    controller::{RequestError, api_key::act::written, patch_params, request},
    domain::{
        lifecycle::Held,
        record::{self, Claim, Record, Sealed, Subject},
        status::secret_ref,
    },
    sealing::Keeper,
};

/// Writes down who saw a value first. The value stays. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses.
pub async fn note(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    claim: Claim,
) -> Result<bool, RequestError> {
    write(client, namespace, key, held, Some(claimed(sealing, key, held, claim).await?), None).await
}

/// Takes a value that may be seen once: out goes the sealed value, in come the answer, encrypted to one person, and the
/// claim of that request. It is one write of the version that was read, so that exactly one request wins; and all that
/// the request needs is in it, so that a crash afterwards loses nothing. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses. Whether it happened is then open: the next look tells.
pub async fn take(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    claim: Claim,
    answer: &str,
) -> Result<bool, RequestError> {
    let answer = ByteString(answer.as_bytes().to_vec());
    let data = json!({ record::SEALED_VALUE: null, record::CLAIMED: answer });
    write(client, namespace, key, held, Some(claimed(sealing, key, held, claim).await?), Some(data)).await
}

/// Removes the answer once its request has it. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses.
pub async fn clear(client: &Client, namespace: &str, key: &ApiKey, held: &Held) -> Result<bool, RequestError> {
    write(client, namespace, key, held, None, Some(json!({ record::CLAIMED: null }))).await
}

/// The annotations of the record with a claim.
async fn claimed(
    sealing: &Keeper,
    key: &ApiKey,
    held: &Held,
    claim: Claim,
) -> Result<[(String, String); 2], RequestError> {
    let sealed = held.record.sealed.clone().map(|sealed| Sealed { claim: Some(claim), ..sealed });
    written(sealing, &Record { sealed, subject: Subject::of(key), ..held.record.clone() }).await
}

async fn write(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    annotations: Option<[(String, String); 2]>,
    data: Option<Value>,
) -> Result<bool, RequestError> {
    let name = secret_ref(key).name;
    let mut body = json!({"metadata": {"resourceVersion": held.version}});
    if let Some(annotations) = annotations {
        body["metadata"]["annotations"] = Value::from_iter(annotations);
    }
    if let Some(data) = data {
        body["data"] = data;
    }
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let what = format!("update Secret {name}");
    match request(&what, secrets.patch(&name, &patch_params(), &Patch::Merge(body))).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|status| status.is_conflict() || status.is_not_found()) => Ok(false),
        Err(error) => Err(error),
    }
}
