//! Answers whose request was deleted before it was over. The answer is still in the Secret of its key then, encrypted to
//! a person who no longer asks for it.

use kube::{Api, Client, ResourceExt, api::ListParams};

use super::act;
use crate::{
    api::{ApiKey, KeyReveal},
    controller::{RequestError, request},
    domain::{lifecycle::Held, record::Sealed},
};

/// Removes the answer that waits in the Secret of a key if its request no longer exists, and says whether it did. The
/// caller has read the Secret and found `claimed` in it. The deletion of a request may have been missed, by a restart
/// for instance, so that whoever finds an answer asks the API server; that is rare, and costs one list of the requests
/// of the namespace.
///
/// # Errors
/// If the API server can't be asked or refuses.
pub async fn clear(client: &Client, namespace: &str, key: &ApiKey, held: &Held) -> Result<bool, RequestError> {
    let claim = held.record.sealed.as_ref().and_then(|sealed: &Sealed| sealed.claim.as_ref());
    // An answer without a request that could take it serves nobody.
    let uid = claim.map(|claim| claim.uid.as_str()).unwrap_or_default();
    if !uid.is_empty() && exists(client, namespace, uid).await? {
        return Ok(false);
    }
    let cleared = act::clear(client, namespace, key, held).await?;
    if cleared {
        tracing::info!(namespace, name = key.name_any(), "an answer whose request is gone was removed from its Secret");
    }
    Ok(cleared)
}

/// Whether a request exists. A list without a version is as of now, and a uid never comes back: what is absent here is
/// gone for good.
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
