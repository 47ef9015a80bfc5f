//! `caBundle` in webhook configurations: the one field of them that is ours.

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

/// A webhook configuration that must trust our CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    resource: ApiResource,
    name: String,
}

impl Target {
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

    /// The configuration, if it is installed.
    pub(super) async fn read(&self, client: &Client) -> kube::Result<Option<DynamicObject>> {
        self.api(client).get_opt(&self.name).await
    }

    /// Makes every webhook in `read` trust `bundle`. Whether something had to be written.
    pub(super) async fn publish(&self, client: &Client, read: &DynamicObject, bundle: &str) -> kube::Result<bool> {
        let Some(patch) = patch(read, bundle) else { return Ok(false) };
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.api(client).patch(&self.name, &params, &Patch::Strategic(patch)).await?;
        Ok(true)
    }
}

/// The strategic merge patch, which finds webhooks by name, that makes each webhook of `config` trust `bundle`; none if
/// each does.
///
/// Not server-side apply: it would make us an owner of the whole entry, and an upgrade that drops a webhook from the
/// chart would be refused, since the API server keeps for us what is left of it.
///
/// It carries the resourceVersion of what was read: a leader that was away must not put an older bundle back over one
/// that it has not seen.
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
        let ours = Some("Q0E=");
        let cases: [(&str, &[Option<&str>], bool); 6] = [
            ("fresh from the chart", &[None], true),
            ("already published", &[ours], false),
            ("another bundle", &[Some("AAAA")], true),
            ("a Helm upgrade dropped one of two", &[ours, None], true),
            ("both published", &[ours, ours], false),
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
