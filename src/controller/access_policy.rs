//! Writes the status of AccessPolicies: the keys that refer to the policy, the groups without access, and whether any
//! group can change the policy.

use std::collections::BTreeMap;

use kube::{Api, Client, ResourceExt, core::Status};

use super::{RequestError, patch_params, request, status_patch};
use crate::{
    api::{AccessPolicy, KeyType},
    clock::Clock,
    domain::policy_status,
};

/// Writes the status of one policy if it changed. `keys` are the ApiKeys that refer to it.
///
/// # Errors
/// If the API server rejects the request or can't be reached.
pub async fn report(
    client: &Client,
    policy: &AccessPolicy,
    keys: &BTreeMap<String, KeyType>,
    clock: &Clock,
) -> Result<(), RequestError> {
    let status = policy_status::build(policy, keys, clock.now());
    if policy.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let namespace = policy.namespace().unwrap_or_default();
    let policies: Api<AccessPolicy> = Api::namespaced(client.clone(), &namespace);
    let (name, params) = (policy.name_any(), patch_params());
    let patch = status_patch(policy, policy.status.as_ref(), &status);
    match request("update status", policies.patch_status(&name, &params, &patch)).await {
        Ok(_) => Ok(()),
        // The policy was deleted, or it changed and its event causes another report.
        Err(error) if error.is(|status: &Status| status.is_conflict() || status.is_not_found()) => Ok(()),
        Err(error) => Err(error),
    }
}
