//! `caBundle` in webhook configurations, the only field of them that the operator writes.

use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};

use super::FIELD_MANAGER;

/// A webhook configuration that must trust the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookTarget {
    resource: ApiResource,
    name: String,
}

impl WebhookTarget {
    /// The `ValidatingWebhookConfiguration` of this name.
    #[must_use]
    pub fn validating(name: impl Into<String>) -> Self {
        Self::of::<ValidatingWebhookConfiguration>(name)
    }

    /// The `MutatingWebhookConfiguration` of this name.
    #[must_use]
    pub fn mutating(name: impl Into<String>) -> Self {
        Self::of::<MutatingWebhookConfiguration>(name)
    }

    fn of<K: Resource<DynamicType = ()>>(name: impl Into<String>) -> Self {
        Self { resource: ApiResource::erase::<K>(&()), name: name.into() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn resource(&self) -> &ApiResource {
        &self.resource
    }

    fn api(&self, client: &Client) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.resource)
    }

    /// Reads the configuration, if it is installed.
    pub(super) async fn read(&self, client: &Client) -> kube::Result<Option<DynamicObject>> {
        self.api(client).get_opt(&self.name).await
    }

    /// Writes `bundle` to every webhook in `read`. Returns whether a write was necessary.
    pub(super) async fn publish(&self, client: &Client, read: &DynamicObject, bundle: &str) -> kube::Result<bool> {
        let Some(patch) = patch(read, bundle) else { return Ok(false) };
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.api(client).patch(&self.name, &params, &Patch::Strategic(patch)).await?;
        Ok(true)
    }
}

/// Returns the strategic merge patch, which finds webhooks by name, that writes `bundle` to each webhook of `config`;
/// `None` if all of them hold it.
///
/// Server-side apply would make the operator an owner of the whole entry. An upgrade that removes a webhook from the
/// chart would then be rejected, because the API server would keep an incomplete entry for the operator.
///
/// The patch has the resourceVersion that was read, so that a leader with an outdated state cannot overwrite a newer
/// bundle.
fn patch(config: &DynamicObject, bundle: &str) -> Option<Value> {
    let bundle = serde_json::to_value(ByteString(bundle.as_bytes().to_vec())).ok()?;
    let webhooks = config.data.get("webhooks")?.as_array()?;
    if webhooks.iter().all(|webhook| webhook.pointer("/clientConfig/caBundle") == Some(&bundle)) {
        return None;
    }
    let webhooks =
        webhooks.iter().map(|webhook| json!({"name": webhook["name"], "clientConfig": {"caBundle": bundle}}));
    Some(json!({
        "metadata": {"resourceVersion": config.metadata.resource_version},
        "webhooks": webhooks.collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bundles: &[Option<&str>]) -> DynamicObject {
        let webhook = |(i, bundle): (usize, Option<&str>)| {
            let mut webhook = json!({
                "name": format!("w{i}.keywright.dev"),
                "clientConfig": {"service": {"name": "keywright", "namespace": "ns", "path": "/validate"}},
                "sideEffects": "None",
            });
            if let Some(bundle) = bundle {
                webhook["clientConfig"]["caBundle"] = json!(bundle);
            }
            webhook
        };
        serde_json::from_value(json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "keywright", "resourceVersion": "7"},
            "webhooks": bundles.iter().copied().enumerate().map(webhook).collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    #[test]
    fn only_the_bundle_is_written_and_only_when_it_differs() {
        // "CA" in base64.
        let same = Some("Q0E=");
        let cases: [(&str, &[Option<&str>], bool); 6] = [
            ("one webhook without a bundle", &[None], true),
            ("already published", &[same], false),
            ("another bundle", &[Some("AAAA")], true),
            ("one of two webhooks without the bundle", &[same, None], true),
            ("both published", &[same, same], false),
            ("no webhooks", &[], false),
        ];
        for (name, bundles, written) in cases {
            let patch = patch(&config(bundles), "CA");
            assert_eq!(patch.is_some(), written, "{name}");
            let Some(patch) = patch else { continue };
            assert_eq!(patch["metadata"]["resourceVersion"], "7", "{name}");
            let expected: Vec<Value> = (0..bundles.len())
                .map(|i| json!({"name": format!("w{i}.keywright.dev"), "clientConfig": {"caBundle": "Q0E="}}))
                .collect();
            assert_eq!(patch["webhooks"], Value::Array(expected), "{name}");
        }
    }
}
