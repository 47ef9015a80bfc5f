//! Orphaned answers: answers in the Secret of a key whose KeyReveal was deleted before the answer was removed.

use kube::{Api, Client, ResourceExt, api::ListParams};

use super::act;
use crate::{
    api::{ApiKey, KeyReveal},
    controller::{RequestError, request},
    domain::{lifecycle::OwnedSecret, record::Sealed},
};

/// Removes the answer from the Secret of a key if its KeyReveal no longer exists. Returns whether it was removed. The
/// caller has found an answer in the Secret. This covers deletions without an event, such as those before a
/// restart. It is rare, and costs one list of the KeyReveals of the namespace.
///
/// # Errors
/// If the API server rejects a request or can't be reached.
pub async fn remove_if_orphaned(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    secret: &OwnedSecret,
) -> Result<bool, RequestError> {
    let claim = secret.record.sealed.as_ref().and_then(|sealed: &Sealed| sealed.claim.as_ref());
    // No KeyReveal can receive an answer without a claim.
    let uid = claim.map(|claim| claim.uid.as_str()).unwrap_or_default();
    if !uid.is_empty() && exists(client, namespace, uid).await? {
        return Ok(false);
    }
    let removed = act::remove_answer(client, namespace, key, secret).await?;
    if removed {
        tracing::info!(namespace, name = key.name_any(), "removed the answer of a deleted KeyReveal from the Secret");
    }
    Ok(removed)
}

/// Whether a KeyReveal exists. A list without a resourceVersion is consistent, and a uid is never used again: a
/// KeyReveal that is absent here never exists later.
async fn exists(client: &Client, namespace: &str, uid: &str) -> Result<bool, RequestError> {
    const PAGE: u32 = 500;
    let reveals: Api<KeyReveal> = Api::namespaced(client.clone(), namespace);
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = request("list KeyReveals", reveals.list_metadata(&params)).await?;
        if page.items.iter().any(|reveal| reveal.metadata.uid.as_deref() == Some(uid)) {
            return Ok(true);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(false),
        }
    }
}
