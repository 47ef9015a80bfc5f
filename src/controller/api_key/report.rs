//! Writes the status of an ApiKey and publishes its Events.

use kube::{Api, ResourceExt, core::Status};
use serde_json::json;

use super::ApiKeyContext;
use crate::{
    api::{ApiKey, ApiKeyStatus},
    controller::{RequestError, add, patch_params, patch_status_if, request, status_patch, test},
    domain::status,
};

/// Writes the status after a conflict. A change of the spec, of the digests or of the reveal state is a conflict still.
/// Other changes, such as those of labels, are not, since they must not delay a revocation. Returns false on a
/// conflict.
async fn override_conflict(key: &ApiKey, keys: &Api<ApiKey>, status: &ApiKeyStatus) -> Result<bool, RequestError> {
    let name = key.name_any();
    let Some(now) = request(&format!("get ApiKey {name}"), keys.get_opt(&name)).await? else { return Ok(false) };
    let known = |key: &ApiKey| key.status.as_ref().map(|status| (status.tokens.clone(), status.reveal.clone()));
    if now.metadata.uid != key.metadata.uid
        || now.metadata.generation != key.metadata.generation
        || known(&now) != known(key)
    {
        return Ok(false);
    }
    // The verifier writes the last use, which may be later now.
    let last_used_at = now.status.as_ref().and_then(|status| status.last_used_at.clone());
    let status = json!(ApiKeyStatus { last_used_at, ..status.clone() });
    let mut operations = vec![
        test(&["metadata", "uid"], json!(key.metadata.uid)),
        test(&["metadata", "generation"], json!(key.metadata.generation)),
    ];
    let known = known(&now).filter(|(tokens, _)| !tokens.is_empty());
    operations.extend(known.iter().map(|(tokens, _)| test(&["status", "tokens"], json!(tokens))));
    let reveal = known.and_then(|(_, reveal)| reveal);
    operations.extend(reveal.map(|reveal| test(&["status", "reveal"], json!(reveal))));
    operations.push(add(&["status"], status));
    patch_status_if(keys, &name, operations).await
}

/// Writes the status and publishes Events if the status changed. Returns false if the object changed meanwhile.
pub(super) async fn report(
    key: &ApiKey,
    namespace: &str,
    status: ApiKeyStatus,
    minted: bool,
    context: &ApiKeyContext,
) -> Result<bool, RequestError> {
    if key.status.as_ref() == Some(&status) {
        return Ok(true);
    }
    let name = key.name_any();
    let notes = status::notes(key.status.as_ref(), &status, minted);
    let keys: Api<ApiKey> = Api::namespaced(context.client.clone(), namespace);
    let patch = status_patch(key, key.status.as_ref(), &status);
    match request("update status", keys.patch_status(&name, &patch_params(), &patch)).await {
        Ok(_) => {}
        Err(error) if error.is(Status::is_not_found) => return Ok(false),
        Err(error) if error.is(Status::is_conflict) => {
            if !override_conflict(key, &keys, &status).await? {
                return Ok(false);
            }
        }
        Err(error) => return Err(error),
    }
    for note in notes {
        tracing::info!(namespace, name, reason = note.reason, "{}", note.message);
        context.events.note(key, note);
    }
    Ok(true)
}
