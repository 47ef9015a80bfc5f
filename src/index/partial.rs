//! Partial objects: the needed part of the metadata, with spec and status as unparsed JSON. Spec and status are parsed
//! for each object separately, so that an invalid object does not block other objects.
//!
//! managedFields and annotations are more than half of an object. The deserializer skips them, which saves most of the
//! time and memory of a start with 100,000 keys. Values in them that this program can't represent, such as a time in
//! the year
//! 9999, then have no effect. Users with the right to edit an object can write such values.

use std::{borrow::Cow, collections::BTreeMap, fmt, marker::PhantomData};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{Resource, api::ObjectMeta, runtime::watcher::Event};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::key_index::KeyIndex;
use crate::api::{
    ACCEPT_SECRET_ANNOTATION, AccessPolicy, AccessPolicySpec, AccessPolicyStatus, ApiKey, ApiKeySpec, ApiKeyStatus,
    CREATOR_ANNOTATION, KeyReveal, KeyRevealSpec, KeyRevealStatus, PermissionCatalog, PermissionCatalogSpec,
    PermissionCatalogStatus, RESTORED_BY_ANNOTATION, SecuritySettings, SecuritySettingsSpec, Token,
};

/// The annotations that are read. Users can write all others.
const ANNOTATIONS: [&str; 3] = [CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION, ACCEPT_SECRET_ANNOTATION];

/// A watched kind.
pub trait Watched: Resource<DynamicType = ()> + Clone + fmt::Debug + Send + Sized + 'static {
    /// The type of its spec.
    type Spec: DeserializeOwned;
    /// The type of its status.
    type Status: DeserializeOwned;
    /// A valid spec that replaces one that can't be read, for events that report an object as deleted.
    const PLACEHOLDER: &'static str;
    /// Whether objects of this kind restrict rights. If so, the last readable version of an unreadable object stays in
    /// force.
    const RESTRICTS: bool = false;

    /// Builds an object.
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

/// The read parts of an object. [`Self::open`] parses its spec and status, which may be of another version of
/// Keywright.
#[derive(Deserialize)]
#[serde(bound = "")]
pub struct PartialObject<K> {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    spec: Option<Box<RawValue>>,
    status: Option<Box<RawValue>>,
    #[serde(skip)]
    kind: PhantomData<fn() -> K>,
}

/// An ApiKey as the verifier reads it.
pub type PartialApiKey = PartialObject<ApiKey>;

impl<K> Clone for PartialObject<K> {
    fn clone(&self) -> Self {
        let Self { metadata, spec, status, kind } = self;
        Self { metadata: metadata.clone(), spec: spec.clone(), status: status.clone(), kind: *kind }
    }
}

impl<K> fmt::Debug for PartialObject<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ObjectMeta { namespace, name, .. } = &self.metadata;
        f.debug_struct("PartialObject").field("namespace", namespace).field("name", name).finish_non_exhaustive()
    }
}

impl<K: Watched> PartialObject<K> {
    /// Parses the object.
    ///
    /// # Errors
    /// If this version of Keywright can't read the spec or the status.
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
        // The error is not logged, since it could quote the content of the object.
        tracing::error!(
            kind = %K::kind(&()),
            namespace = metadata.namespace,
            name = metadata.name,
            "this version of Keywright can't read an object, which therefore allows nothing: upgrade Keywright, or \
             correct the object"
        );
        Err(Box::new(Unreadable { metadata, status, kind }))
    }

    /// Returns the object, without the parts that can't be read, for events that report it as deleted.
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

/// An object that this version of Keywright can't read.
pub struct Unreadable<K> {
    /// The part of its metadata that is read.
    pub metadata: ObjectMeta,
    status: Option<Box<RawValue>>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Watched> Unreadable<K> {
    /// Returns the object with a placeholder for its spec.
    #[must_use]
    pub fn name(self) -> Option<K> {
        Some(K::of(self.metadata, serde_json::from_str(K::PLACEHOLDER).ok()?, None))
    }
}

impl Unreadable<ApiKey> {
    /// Returns an inactive ApiKey with the readable digests of this one, so that no other ApiKey owns them.
    fn deactivated(self) -> Option<ApiKey> {
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

/// Applies a watch event to a key index. An ApiKey that can't be read is inactive.
pub fn apply(keys: &KeyIndex, event: Event<PartialApiKey>) {
    let put = |partial: PartialApiKey, event: fn(ApiKey) -> Event<ApiKey>| match partial.open() {
        Ok(key) => keys.apply(&event(key)),
        Err(unreadable) => {
            let ObjectMeta { namespace, name, .. } = unreadable.metadata.clone();
            match unreadable.deactivated() {
                Some(key) => keys.apply(&event(key)),
                None => keys.deactivate(namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default()),
            }
        }
    };
    match event {
        Event::Init => keys.apply(&Event::Init),
        Event::InitDone => keys.apply(&Event::InitDone),
        Event::InitApply(partial) => put(partial, Event::InitApply),
        Event::Apply(partial) => put(partial, Event::Apply),
        Event::Delete(partial) => {
            let metadata = partial.metadata;
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
        // Only the presence of the time matters.
        deletion_timestamp: needed.deletion_timestamp.map(|text| time(text).unwrap_or(Time(Timestamp::MIN))),
        annotations: needed.annotations,
        ..ObjectMeta::default()
    })
}

/// Deserializes [`ANNOTATIONS`] and skips all others.
fn annotations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    struct KnownAnnotations;

    impl<'de> Visitor<'de> for KnownAnnotations {
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

    deserializer.deserialize_any(KnownAnnotations)
}

impl<K: Watched> Resource for PartialObject<K> {
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

    fn partial(change: impl FnOnce(&mut serde_json::Value)) -> PartialApiKey {
        serde_json::from_str(&object(change)).unwrap()
    }

    #[test]
    fn only_the_needed_metadata_is_read() {
        let partial = partial(|_| {});
        assert_eq!((partial.name_any().as_str(), partial.resource_version().as_deref()), ("k", Some("7")));
        assert!(partial.metadata.managed_fields.is_none());
        assert_eq!(partial.annotations().keys().collect::<Vec<_>>(), ["keywright.dev/creator"]);
        let full: ApiKey = serde_json::from_str(&object(|_| {})).unwrap();
        let key = partial.open().ok().unwrap();
        assert_eq!((&key.spec, &key.status), (&full.spec, &full.status));
        assert_eq!(key.metadata.creation_timestamp, full.metadata.creation_timestamp);
        assert_eq!((key.uid(), key.metadata.generation), (full.uid(), Some(2)));
    }

    #[test]
    fn unreadable_object_keeps_its_name_and_uid() {
        for change in [
            (|object: &mut serde_json::Value| object["spec"]["type"] = json!("Future")) as fn(&mut serde_json::Value),
            |object| object["status"]["state"] = json!("Future"),
            |object| drop(object.as_object_mut().unwrap().remove("spec")),
        ] {
            let partial = partial(change);
            assert_eq!(partial.name_any(), "k");
            assert_eq!(partial.clone().name().unwrap().name_any(), "k");
            assert_eq!(partial.open().unwrap_err().name().unwrap().uid().as_deref(), Some("u"));
        }
    }

    impl<K> fmt::Debug for Unreadable<K> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Unreadable")
        }
    }

    /// Users with the right to edit an object can write times that Kubernetes accepts and this program can't represent,
    /// and fields that are nested deeper than its parser allows.
    #[test]
    fn times_of_the_year_9999_and_deep_managed_fields_block_neither_events_nor_lists() {
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
        let Ok(WatchEvent::Modified(partial)) = serde_json::from_str::<WatchEvent<PartialApiKey>>(&event) else {
            panic!("the event can't be parsed")
        };
        let key = partial.open().unwrap();
        assert_eq!(key.status.unwrap().last_used_at, None, "a time that can't be represented is not absent");
        let list = format!("{{\"metadata\":{{\"resourceVersion\":\"9\"}},\"items\":[{text},{}]}}", object(|_| {}));
        let list: kube::core::ObjectList<PartialApiKey> = serde_json::from_str(&list).unwrap();
        assert_eq!(list.items.len(), 2);
    }

    #[test]
    fn object_with_an_unreadable_deletion_time_is_being_deleted() {
        let key =
            partial(|object| object["metadata"]["deletionTimestamp"] = json!("9999-12-31T23:59:59Z")).open().unwrap();
        assert!(key.metadata.deletion_timestamp.is_some());
    }

    #[test]
    fn placeholder_of_every_kind_is_a_valid_spec() {
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

    /// Whether the key of a digest is active. `None` if no key has the digest.
    fn state(keys: &KeyIndex, digest: &str) -> Option<bool> {
        keys.look_up(&Digest::parse(digest).unwrap(), |_, known| known.map(|known| known.is_active()))
    }

    #[test]
    fn unreadable_key_is_inactive_and_keeps_its_digests() {
        let value = format!("{:064x}", 1);
        let with_value = |object: &mut serde_json::Value| {
            object["status"]["tokens"] = json!([{"id": "i", "sha256": value, "mintedAt": "2026-11-24T00:00:00Z"}]);
        };
        let unreadable = |object: &mut serde_json::Value| {
            with_value(object);
            object["status"]["state"] = json!("Future");
        };
        let without_tokens = |object: &mut serde_json::Value| object["status"] = json!({"tokens": "Future"});
        let duplicate = |object: &mut serde_json::Value| {
            with_value(object);
            object["metadata"]["name"] = json!("duplicate");
            object["status"]["tokens"][0]["mintedAt"] = json!("2026-11-25T00:00:00Z");
        };
        for event in [Event::Apply as fn(PartialApiKey) -> Event<PartialApiKey>, Event::InitApply] {
            for known_before in [true, false] {
                let keys = KeyIndex::default();
                apply(&keys, Event::Apply(partial(duplicate)));
                assert_eq!(state(&keys, &value), Some(true));
                if known_before {
                    apply(&keys, Event::Apply(partial(with_value)));
                }
                apply(&keys, event(partial(unreadable)));
                assert_eq!(state(&keys, &value), Some(false), "the duplicate owns the digest");
                apply(&keys, event(partial(without_tokens)));
                assert_eq!(state(&keys, &value), Some(false), "a status without readable tokens removes the digest");
                // A new list keeps the digest.
                apply(&keys, Event::Init);
                apply(&keys, Event::InitApply(partial(duplicate)));
                apply(&keys, Event::InitApply(partial(without_tokens)));
                apply(&keys, Event::InitDone);
                assert_eq!(state(&keys, &value), Some(false));
                apply(&keys, Event::Delete(partial(without_tokens)));
                assert_eq!(state(&keys, &value), Some(true), "an unreadable deleted key keeps the digest");
            }
        }
    }
}
