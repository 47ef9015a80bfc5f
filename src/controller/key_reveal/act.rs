//! The three writes of a reveal that change the Secret: recording the first view, claiming a one-time value, and
//! removing the answer.

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, Client, api::Patch};
use serde_json::{Value, json};

use crate::{
    api::ApiKey,
    controller::{RequestError, api_key::act::record_annotations, patch_params, request},
    domain::{
        lifecycle::OwnedSecret,
        record::{self, Claim, Record, Sealed, Subject},
        status::secret_ref,
    },
    sealing::SealingKeyStore,
};

/// Records the first reveal of a value. The value stays. Returns false if the Secret changed since it was read.
///
/// # Errors
/// If the API server rejects the request or can't be reached.
pub async fn record_first_view(
    client: &Client,
    sealing: &SealingKeyStore,
    namespace: &str,
    key: &ApiKey,
    secret: &OwnedSecret,
    claim: Claim,
) -> Result<bool, RequestError> {
    write(client, namespace, key, secret, Some(record_with_claim(sealing, key, secret, claim).await?), None).await
}

/// Claims a one-time value: replaces the sealed value by the answer, which is encrypted to the requester, and adds the
/// claim of the KeyReveal. One write of the version that was read does both, so that exactly one KeyReveal succeeds and
/// a crash afterwards loses nothing. Returns false if the Secret changed since it was read.
///
/// # Errors
/// If the API server rejects the request or can't be reached. The write may have happened then; the next read of the
/// Secret shows it.
pub async fn claim_value(
    client: &Client,
    sealing: &SealingKeyStore,
    namespace: &str,
    key: &ApiKey,
    secret: &OwnedSecret,
    claim: Claim,
    answer: &str,
) -> Result<bool, RequestError> {
    let answer = ByteString(answer.as_bytes().to_vec());
    let data = json!({ record::SEALED_VALUE: null, record::CLAIMED: answer });
    write(client, namespace, key, secret, Some(record_with_claim(sealing, key, secret, claim).await?), Some(data)).await
}

/// Removes the answer from the Secret. Returns false if the Secret changed since it was read.
///
/// # Errors
/// If the API server rejects the request or can't be reached.
pub async fn remove_answer(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    secret: &OwnedSecret,
) -> Result<bool, RequestError> {
    write(client, namespace, key, secret, None, Some(json!({ record::CLAIMED: null }))).await
}

/// Returns the annotations of the record with a claim.
async fn record_with_claim(
    sealing: &SealingKeyStore,
    key: &ApiKey,
    secret: &OwnedSecret,
    claim: Claim,
) -> Result<[(String, String); 2], RequestError> {
    let sealed = secret.record.sealed.clone().map(|sealed| Sealed { claim: Some(claim), ..sealed });
    record_annotations(sealing, &Record { sealed, subject: Subject::of(key), ..secret.record.clone() }).await
}

async fn write(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    secret: &OwnedSecret,
    annotations: Option<[(String, String); 2]>,
    data: Option<Value>,
) -> Result<bool, RequestError> {
    let name = secret_ref(key).name;
    let mut body = json!({"metadata": {"resourceVersion": secret.version}});
    if let Some(annotations) = annotations {
        body["metadata"]["annotations"] = Value::from_iter(annotations);
    }
    if let Some(data) = data {
        body["data"] = data;
    }
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let operation = format!("update Secret {name}");
    match request(&operation, secrets.patch(&name, &patch_params(), &Patch::Merge(body))).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|status| status.is_conflict() || status.is_not_found()) => Ok(false),
        Err(error) => Err(error),
    }
}
