//! The three writes of an answer that change a Secret: who saw a value first, who takes it, and that it was taken.

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{
    api::ApiKey,
    controller::{RequestError, request},
    domain::{
        lifecycle::Held,
        record::{self, Claim, Record, Sealed},
        status::secret_ref,
    },
};

/// Writes down who saw a value first. The value stays. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses.
pub async fn note(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    claim: Claim,
) -> Result<bool, RequestError> {
    write(client, namespace, key, held, Some(claim), None).await
}

/// Takes a value that may be seen once: out goes the sealed value, in come the answer, encrypted to one person, and the
/// claim of that request. It is one write of the version that was read, so that exactly one request wins; and all that
/// the request needs is in it, so that a crash afterwards loses nothing. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses. Whether it happened is then open: the next look tells.
pub async fn take(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    claim: Claim,
    answer: &str,
) -> Result<bool, RequestError> {
    let answer = ByteString(answer.as_bytes().to_vec());
    let data = json!({ record::SEALED_VALUE: null, record::CLAIMED: answer });
    write(client, namespace, key, held, Some(claim), Some(data)).await
}

/// Removes the answer once its request has it. False if the Secret is not as it was read.
///
/// # Errors
/// If the API server can't be asked or refuses.
pub async fn clear(client: &Client, namespace: &str, key: &ApiKey, held: &Held) -> Result<bool, RequestError> {
    write(client, namespace, key, held, None, Some(json!({ record::CLAIMED: null }))).await
}

async fn write(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    held: &Held,
    claim: Option<Claim>,
    data: Option<Value>,
) -> Result<bool, RequestError> {
    let name = secret_ref(key).name;
    let mut body = json!({"metadata": {"resourceVersion": held.version}});
    if let (Some(claim), Some(sealed)) = (claim, &held.record.sealed) {
        let sealed = Some(Sealed { claim: Some(claim), ..sealed.clone() });
        let record = Record { sealed, api_key: key.name_any(), ..held.record.clone() };
        body["metadata"]["annotations"] =
            json!({ record::ANNOTATION: serde_json::to_string(&record).unwrap_or_default() });
    }
    if let Some(data) = data {
        body["data"] = data;
    }
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let what = format!("update Secret {name}");
    match request(&what, secrets.patch(&name, &PatchParams::default(), &Patch::Merge(body))).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|status| status.is_conflict() || status.is_not_found()) => Ok(false),
        Err(error) => Err(error),
    }
}
