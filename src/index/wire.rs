//! Objects as they are read from the API server: of their metadata only what is needed here, the rest one part after the
//! other, so that no object can stop the others.
//!
//! managedFields and annotations are more than half of an object, and are skipped, not read and thrown away; with a hundred
//! thousand keys that is most of the time and the memory of a start. It also keeps out what whoever may edit an object may
//! write into them, such as a time of the year 9999, which this program has no number for.

use std::{borrow::Cow, collections::BTreeMap, fmt, marker::PhantomData};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{Resource, api::ObjectMeta, runtime::watcher::Event};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::keyring::Keyring;
use crate::api::{
    ACCEPT_SECRET_ANNOTATION, AccessPolicy, AccessPolicySpec, AccessPolicyStatus, ApiKey, ApiKeySpec, ApiKeyStatus,
    CREATOR_ANNOTATION, KeyReveal, KeyRevealSpec, KeyRevealStatus, PermissionCatalog, PermissionCatalogSpec,
    PermissionCatalogStatus, RESTORED_BY_ANNOTATION, SecuritySettings, SecuritySettingsSpec, Token,
};

/// The annotations that are read; all others are anybody's.
const ANNOTATIONS: [&str; 3] = [CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION, ACCEPT_SECRET_ANNOTATION];

/// A kind that is watched.
pub trait Watched: Resource<DynamicType = ()> + Clone + fmt::Debug + Send + Sized + 'static {
    /// Its spec.
    type Spec: DeserializeOwned;
    /// Its status.
    type Status: DeserializeOwned;
    /// A spec that can be read, for an object whose own can't, so that it can be said by its name that it is gone.
    const PLACEHOLDER: &'static str;
    /// Whether such an object takes rights away. What it said while it could be read then goes on to count.
    const RESTRICTS: bool = false;

    /// The object of these parts.
    fn of(metadata: ObjectMeta, spec: Self::Spec, status: Option<Self::Status>) -> Self;
}

macro_rules! watched {
    ($kind:ident, $spec:ident, $status:ident, $placeholder:literal) => {
        impl Watched for $kind {
            type Spec = $spec;
            type Status = $status;
            const PLACEHOLDER: &'static str = $placeholder;

            fn of(metadata: ObjectMeta, spec: $spec, status: Option<$status>) -> Self {
                Self { metadata, spec, status }
            }
        }
    };
}

watched!(ApiKey, ApiKeySpec, ApiKeyStatus, r#"{"type": "Team"}"#);
watched!(AccessPolicy, AccessPolicySpec, AccessPolicyStatus, r#"{"mode": "Private"}"#);
watched!(KeyReveal, KeyRevealSpec, KeyRevealStatus, r#"{"apiKeyRef": {"name": ""}, "recipient": ""}"#);
watched!(PermissionCatalog, PermissionCatalogSpec, PermissionCatalogStatus, "{}");

impl Watched for SecuritySettings {
    type Spec = SecuritySettingsSpec;
    type Status = IgnoredAny;
    const PLACEHOLDER: &'static str = "{}";
    const RESTRICTS: bool = true;

    fn of(metadata: ObjectMeta, spec: SecuritySettingsSpec, _: Option<IgnoredAny>) -> Self {
        Self { metadata, spec }
    }
}

/// What was read of an object. Its spec and its status may be of another version than this one, which is found out by
/// [`Self::open`].
#[derive(Deserialize)]
#[serde(bound = "")]
pub struct Wire<K> {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    spec: Option<Box<RawValue>>,
    status: Option<Box<RawValue>>,
    #[serde(skip)]
    kind: PhantomData<fn() -> K>,
}

/// An ApiKey as a verifier reads it.
pub type WireKey = Wire<ApiKey>;

impl<K> Clone for Wire<K> {
    fn clone(&self) -> Self {
        let Self { metadata, spec, status, kind } = self;
        Self { metadata: metadata.clone(), spec: spec.clone(), status: status.clone(), kind: *kind }
    }
}

impl<K> fmt::Debug for Wire<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ObjectMeta { namespace, name, .. } = &self.metadata;
        f.debug_struct("Wire").field("namespace", namespace).field("name", name).finish_non_exhaustive()
    }
}

impl<K: Watched> Wire<K> {
    /// The object.
    ///
    /// # Errors
    /// By its metadata, one that this version of Keywright can't read.
    pub fn open(self) -> Result<K, Box<Unreadable<K>>> {
        let Self { metadata, spec, status, kind } = self;
        let read = || -> serde_json::Result<(K::Spec, Option<K::Status>)> {
            let spec = serde_json::from_str(spec.as_deref().map_or("null", RawValue::get))?;
            let status = status.as_deref().map(|status| serde_json::from_str(status.get())).transpose()?;
            Ok((spec, status))
        };
        if let Ok((spec, status)) = read() {
            return Ok(K::of(metadata, spec, status));
        }
        // The error is not told: it could quote what is in the object.
        tracing::error!(
            kind = %K::kind(&()),
            namespace = metadata.namespace,
            name = metadata.name,
            "an object can't be read by this version of Keywright: it allows nothing"
        );
        Err(Box::new(Unreadable { metadata, status, kind }))
    }

    /// The object without its content, if that can't be read: for events that say that it is gone.
    #[must_use]
    pub fn name(self) -> Option<K> {
        let metadata = self.metadata.clone();
        let read = self.spec.as_deref().and_then(|spec| serde_json::from_str(spec.get()).ok());
        match (read, &self.status) {
            (Some(spec), None) => Some(K::of(metadata, spec, None)),
            (Some(spec), Some(status)) => Some(K::of(metadata, spec, serde_json::from_str(status.get()).ok())),
            (None, _) => Unreadable { metadata, status: None, kind: self.kind }.name(),
        }
    }
}

/// An object that can't be read.
pub struct Unreadable<K> {
    /// The part of its metadata that is read.
    pub metadata: ObjectMeta,
    status: Option<Box<RawValue>>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Watched> Unreadable<K> {
    /// The object without its content.
    #[must_use]
    pub fn name(self) -> Option<K> {
        Some(K::of(self.metadata, serde_json::from_str(K::PLACEHOLDER).ok()?, None))
    }
}

impl Unreadable<ApiKey> {
    /// An ApiKey that allows nothing and has the digests that this one names, as far as these can be read: while it has
    /// them, no other ApiKey does.
    fn shut(self) -> Option<ApiKey> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<serde_json::Value>,
        }
        let Tokens { tokens } = serde_json::from_str(self.status.as_ref()?.get()).ok()?;
        let tokens: Vec<Token> = tokens.into_iter().filter_map(|token| serde_json::from_value(token).ok()).collect();
        let mut key = self.name()?;
        key.spec.active = Some(false);
        key.status = Some(ApiKeyStatus { tokens, ..ApiKeyStatus::default() });
        key.status.as_ref().is_some_and(|status| !status.tokens.is_empty()).then_some(key)
    }
}

/// Takes what a watch said into a keyring. A key that can't be read works for nobody, whatever it was before.
pub fn apply(keys: &Keyring, event: Event<WireKey>) {
    let put = |wire: WireKey, event: fn(ApiKey) -> Event<ApiKey>| match wire.open() {
        Ok(key) => keys.apply(&event(key)),
        Err(unreadable) => {
            let ObjectMeta { namespace, name, .. } = unreadable.metadata.clone();
            match unreadable.shut() {
                Some(key) => keys.apply(&event(key)),
                None => keys.shut(namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default()),
            }
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

fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Needed {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        generation: Option<i64>,
        creation_timestamp: Option<String>,
        deletion_timestamp: Option<String>,
        #[serde(default, deserialize_with = "annotations")]
        annotations: Option<BTreeMap<String, String>>,
    }
    let needed = Needed::deserialize(deserializer)?;
    let time = |text: String| text.parse().ok().map(Time);
    Ok(ObjectMeta {
        name: needed.name,
        namespace: needed.namespace,
        uid: needed.uid,
        resource_version: needed.resource_version,
        generation: needed.generation,
        creation_timestamp: needed.creation_timestamp.and_then(time),
        // That it is being deleted is all that counts.
        deletion_timestamp: needed.deletion_timestamp.map(|text| time(text).unwrap_or(Time(Timestamp::MIN))),
        annotations: needed.annotations,
        ..ObjectMeta::default()
    })
}

/// Those of [`ANNOTATIONS`] alone.
fn annotations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    struct Known;

    impl<'de> Visitor<'de> for Known {
        type Value = Option<BTreeMap<String, String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("annotations")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut known = BTreeMap::new();
            while let Some(name) = map.next_key::<Cow<'_, str>>()? {
                if ANNOTATIONS.contains(&&*name) {
                    known.insert(name.into_owned(), map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(Some(known).filter(|known| !known.is_empty()))
        }
    }

    deserializer.deserialize_any(Known)
}

impl<K: Watched> Resource for Wire<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(dt: &()) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &()) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &()) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &()) -> Cow<'_, str> {
        K::plural(dt)
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
    use kube::{ResourceExt, core::WatchEvent};
    use serde_json::json;

    use super::*;
    use crate::domain::key::Digest;

    fn object(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut object = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
            "metadata": {
                "name": "k", "namespace": "shop", "resourceVersion": "7", "uid": "u", "generation": 2,
                "creationTimestamp": "2026-11-24T00:00:00Z",
                "annotations": {"a": "b", "keywright.dev/creator": "alice"},
                "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"type": "Team", "permissions": ["a:Read"]},
            "status": {"state": "Active", "tokens": []},
        });
        change(&mut object);
        object.to_string()
    }

    fn wire(change: impl FnOnce(&mut serde_json::Value)) -> WireKey {
        serde_json::from_str(&object(change)).unwrap()
    }

    #[test]
    fn what_is_needed_is_read_and_the_rest_is_not() {
        let wire = wire(|_| {});
        assert_eq!((wire.name_any().as_str(), wire.resource_version().as_deref()), ("k", Some("7")));
        assert!(wire.metadata.managed_fields.is_none());
        assert_eq!(wire.annotations().keys().collect::<Vec<_>>(), ["keywright.dev/creator"]);
        let full: ApiKey = serde_json::from_str(&object(|_| {})).unwrap();
        let key = wire.open().ok().unwrap();
        assert_eq!((&key.spec, &key.status), (&full.spec, &full.status));
        assert_eq!(key.metadata.creation_timestamp, full.metadata.creation_timestamp);
        assert_eq!((key.uid(), key.metadata.generation), (full.uid(), Some(2)));
    }

    #[test]
    fn an_object_of_another_version_can_be_told_by_its_name() {
        for change in [
            (|object: &mut serde_json::Value| object["spec"]["type"] = json!("Future")) as fn(&mut serde_json::Value),
            |object| object["status"]["state"] = json!("Future"),
            |object| drop(object.as_object_mut().unwrap().remove("spec")),
        ] {
            let wire = wire(change);
            assert_eq!(wire.name_any(), "k");
            assert_eq!(wire.clone().name().unwrap().name_any(), "k");
            assert_eq!(wire.open().unwrap_err().name().unwrap().uid().as_deref(), Some("u"));
        }
    }

    impl<K> fmt::Debug for Unreadable<K> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Unreadable")
        }
    }

    /// Times that Kubernetes accepts and this program has no number for, and fields that are nested deeper than its parser
    /// goes: whoever may edit an object can write them into its managedFields.
    #[test]
    fn a_time_of_the_year_9999_and_deep_managed_fields_stop_nothing() {
        let late = "9999-12-31T23:59:59Z";
        late.parse::<Timestamp>().unwrap_err();
        let deep = format!("{}{}", "{\"f:a\":".repeat(1000), "{}".to_owned() + &"}".repeat(1000));
        let text = object(|object| {
            object["metadata"]["managedFields"] = json!([{"manager": "m", "time": late, "fieldsV1": "DEEP"}]);
            object["metadata"]["creationTimestamp"] = json!(late);
            object["status"]["lastUsedAt"] = json!(late);
        });
        let text = text.replace("\"DEEP\"", &deep);
        let event = format!("{{\"type\":\"MODIFIED\",\"object\":{text}}}");
        let Ok(WatchEvent::Modified(wire)) = serde_json::from_str::<WatchEvent<WireKey>>(&event) else {
            panic!("the event is lost")
        };
        let key = wire.open().unwrap();
        assert_eq!(key.status.unwrap().last_used_at, None, "as if it were not there");
        let list = format!("{{\"metadata\":{{\"resourceVersion\":\"9\"}},\"items\":[{text},{}]}}", object(|_| {}));
        let list: kube::core::ObjectList<WireKey> = serde_json::from_str(&list).unwrap();
        assert_eq!(list.items.len(), 2);
    }

    #[test]
    fn what_is_being_deleted_is_so_whatever_its_time() {
        let key =
            wire(|object| object["metadata"]["deletionTimestamp"] = json!("9999-12-31T23:59:59Z")).open().unwrap();
        assert!(key.metadata.deletion_timestamp.is_some());
    }

    #[test]
    fn every_kind_has_a_placeholder_that_can_be_read() {
        fn name<K: Watched>() -> Option<String> {
            let metadata = ObjectMeta { name: Some("n".to_owned()), ..ObjectMeta::default() };
            Unreadable::<K> { metadata, status: None, kind: PhantomData }.name().map(|object| object.name_any())
        }
        let names = [
            name::<ApiKey>(),
            name::<AccessPolicy>(),
            name::<KeyReveal>(),
            name::<PermissionCatalog>(),
            name::<SecuritySettings>(),
        ];
        assert!(names.iter().all(|name| name.as_deref() == Some("n")), "{names:?}");
    }

    /// Whether the value of digest 1 is known, and whether it works.
    fn state(keys: &Keyring, digest: &str) -> Option<bool> {
        keys.look_up(&Digest::parse(digest).unwrap(), |_, known| known.map(|known| known.is_active()))
    }

    #[test]
    fn a_key_that_cant_be_read_works_for_nobody_and_keeps_its_digest_from_others() {
        let value = format!("{:064x}", 1);
        let with_value = |object: &mut serde_json::Value| {
            object["status"]["tokens"] = json!([{"id": "i", "sha256": value, "mintedAt": "2026-11-24T00:00:00Z"}]);
        };
        let unreadable = |object: &mut serde_json::Value| {
            with_value(object);
            object["status"]["state"] = json!("Future");
        };
        let nothing_left = |object: &mut serde_json::Value| object["status"] = json!({"tokens": "Future"});
        let twin = |object: &mut serde_json::Value| {
            with_value(object);
            object["metadata"]["name"] = json!("twin");
            object["status"]["tokens"][0]["mintedAt"] = json!("2026-11-25T00:00:00Z");
        };
        for event in [Event::Apply as fn(WireKey) -> Event<WireKey>, Event::InitApply] {
            for known_before in [true, false] {
                let keys = Keyring::default();
                apply(&keys, Event::Apply(wire(twin)));
                assert_eq!(state(&keys, &value), Some(true));
                if known_before {
                    apply(&keys, Event::Apply(wire(with_value)));
                }
                apply(&keys, event(wire(unreadable)));
                assert_eq!(state(&keys, &value), Some(false), "the twin does not get it");
                apply(&keys, event(wire(nothing_left)));
                assert_eq!(state(&keys, &value), Some(false), "what it had is what it keeps");
                // A new list has it still.
                apply(&keys, Event::Init);
                apply(&keys, Event::InitApply(wire(twin)));
                apply(&keys, Event::InitApply(wire(nothing_left)));
                apply(&keys, Event::InitDone);
                assert_eq!(state(&keys, &value), Some(false));
                apply(&keys, Event::Delete(wire(nothing_left)));
                assert_eq!(state(&keys, &value), Some(true), "a deleted key is gone, whether it can be read or not");
            }
        }
    }
}
