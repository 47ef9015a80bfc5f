//! An ApiKey as a verifier reads it from the API server: of its metadata only what a verifier needs. managedFields and
//! annotations are more than half of an object, and are skipped, not read and thrown away; with a hundred thousand keys
//! that is most of the time and the memory of a start.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, api::ObjectMeta, runtime::watcher::Event};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::keyring::Keyring;
use crate::api::{ApiKey, ApiKeySpec, ApiKeyStatus};

/// What was read. Its spec and its status may be of another version than this one, which is found out by [`Self::open`],
/// so that one object can't stop the others.
#[derive(Clone, Debug, Deserialize)]
pub struct WireKey {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    spec: Option<Box<RawValue>>,
    status: Option<Box<RawValue>>,
}

impl WireKey {
    /// The ApiKey.
    ///
    /// # Errors
    /// What this version of Keywright can't read.
    pub fn open(self) -> Result<ApiKey, serde_json::Error> {
        let spec: ApiKeySpec = serde_json::from_str(self.spec.as_deref().map_or("null", RawValue::get))?;
        let status: Option<ApiKeyStatus> = self.status.map(|status| serde_json::from_str(status.get())).transpose()?;
        Ok(ApiKey { metadata: self.metadata, spec, status })
    }
}

/// Takes what a watch said into a keyring. A key that can't be read works for nobody, whatever it was before.
pub fn apply(keys: &Keyring, event: Event<WireKey>) {
    let put = |wire: WireKey, event: fn(ApiKey) -> Event<ApiKey>| {
        let (namespace, name) = (wire.metadata.namespace.clone(), wire.metadata.name.clone());
        if let Ok(key) = wire.open() {
            keys.apply(&event(key));
        } else {
            keys.forget(namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default());
            // The error is not told: it could quote what is in the object.
            tracing::error!(
                namespace,
                name,
                "an ApiKey can't be read by this version of Keywright: its values are refused"
            );
        }
    };
    match event {
        Event::Init => keys.apply(&Event::Init),
        Event::InitDone => keys.apply(&Event::InitDone),
        Event::InitApply(wire) => put(wire, Event::InitApply),
        Event::Apply(wire) => put(wire, Event::Apply),
        Event::Delete(wire) => {
            let metadata = wire.metadata;
            keys.forget(
                metadata.namespace.as_deref().unwrap_or_default(),
                metadata.name.as_deref().unwrap_or_default(),
            );
        }
    }
}

fn metadata<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Needed {
        name: Option<String>,
        namespace: Option<String>,
        resource_version: Option<String>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
    }
    let Needed { name, namespace, resource_version, creation_timestamp, deletion_timestamp } =
        Needed::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name,
        namespace,
        resource_version,
        creation_timestamp,
        deletion_timestamp,
        ..ObjectMeta::default()
    })
}

impl Resource for WireKey {
    type DynamicType = ();
    type Scope = <ApiKey as Resource>::Scope;

    fn kind(dt: &()) -> Cow<'_, str> {
        ApiKey::kind(dt)
    }

    fn group(dt: &()) -> Cow<'_, str> {
        ApiKey::group(dt)
    }

    fn version(dt: &()) -> Cow<'_, str> {
        ApiKey::version(dt)
    }

    fn plural(dt: &()) -> Cow<'_, str> {
        ApiKey::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use serde_json::json;

    use super::*;

    fn object(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut object = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
            "metadata": {
                "name": "k", "namespace": "shop", "resourceVersion": "7", "uid": "u", "generation": 2,
                "creationTimestamp": "2026-11-24T00:00:00Z", "annotations": {"a": "b"},
                "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"type": "Team", "permissions": ["a:Read"]},
            "status": {"state": "Active", "tokens": []},
        });
        change(&mut object);
        object.to_string()
    }

    #[test]
    fn what_a_verifier_needs_is_read_and_the_rest_is_not() {
        let wire: WireKey = serde_json::from_str(&object(|_| {})).unwrap();
        assert_eq!((wire.name_any().as_str(), wire.resource_version().as_deref()), ("k", Some("7")));
        assert!(wire.metadata.managed_fields.is_none() && wire.metadata.annotations.is_none());
        let full: ApiKey = serde_json::from_str(&object(|_| {})).unwrap();
        let key = wire.open().unwrap();
        assert_eq!((&key.spec, &key.status), (&full.spec, &full.status));
        assert_eq!(key.metadata.creation_timestamp, full.metadata.creation_timestamp);
    }

    #[test]
    fn an_object_of_another_version_can_be_told_by_its_name() {
        for change in [
            (|object: &mut serde_json::Value| object["spec"]["type"] = json!("Future")) as fn(&mut serde_json::Value),
            |object| object["status"]["state"] = json!("Future"),
            |object| drop(object.as_object_mut().unwrap().remove("spec")),
        ] {
            let wire: WireKey = serde_json::from_str(&object(change)).unwrap();
            assert_eq!(wire.name_any(), "k");
            wire.open().unwrap_err();
        }
    }

    #[test]
    fn a_key_that_cant_be_read_any_longer_works_for_nobody() {
        let value = format!("{:064x}", 1);
        let with_value = |object: &mut serde_json::Value| {
            object["status"]["tokens"] = json!([{"id": "i", "sha256": value, "mintedAt": "2026-11-24T00:00:00Z"}]);
        };
        for event in [Event::Apply as fn(WireKey) -> Event<WireKey>, Event::InitApply] {
            let keys = Keyring::default();
            apply(&keys, Event::Apply(serde_json::from_str(&object(with_value)).unwrap()));
            assert_eq!(keys.size().keys, 1);
            let unreadable = object(|object| {
                with_value(object);
                object["status"]["state"] = json!("Future");
            });
            apply(&keys, event(serde_json::from_str(&unreadable).unwrap()));
            assert_eq!(keys.size().keys, 0);
        }
    }
}
