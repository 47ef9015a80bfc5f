//! Turns watches into events for the index: backed off, guarded against objects that can't be read, and stripped of
//! what nobody here needs.

use std::fmt::Debug;

use futures::{Stream, StreamExt};
use kube::{
    Api, Client, Resource,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use crate::api::{ApiKey, CREATOR_ANNOTATION};

/// Watches every object of a kind. Objects that do not parse are reported and left out, so that one of them can't
/// stop the others. The stream does not end; errors are logged and retried with backoff. `compact` makes an object
/// that will be kept small.
pub fn watch<K>(client: Client, compact: fn(&mut K)) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<DeserializeGuard<K>> = Api::all(client);
    // managedFields and the last-applied annotation are most of an object's size and of no use here.
    let config = watcher::Config::default();
    watcher::watcher(api, config).default_backoff().filter_map(move |event| async move {
        match event {
            Ok(event) => unguard(event, compact),
            Err(error) => {
                // The text of a watch error could quote an object; its class can't.
                let class = match &error {
                    watcher::Error::InitialListFailed(_) => "list failed",
                    watcher::Error::WatchStartFailed(_) => "watch could not start",
                    watcher::Error::WatchError(_) => "watch was ended by the API server",
                    watcher::Error::WatchFailed(_) => "watch broke off",
                    watcher::Error::NoResourceVersion => "list had no resourceVersion",
                };
                let code = match &error {
                    watcher::Error::InitialListFailed(kube::Error::Api(status))
                    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
                    | watcher::Error::WatchError(status) => Some(status.code),
                    _ => None,
                };
                tracing::warn!(kind = %K::kind(&()), code, "{class}; trying again");
                None
            }
        }
    })
}

/// Gives back what the vectors of an ApiKey have to spare: reading JSON leaves room for four elements where there is
/// one, which is a fifth of the memory of a large cluster's keys.
pub fn compact_key(key: &mut ApiKey) {
    key.spec.presets.shrink_to_fit();
    key.spec.permissions.shrink_to_fit();
    if let Some(status) = &mut key.status {
        if status.creator.is_some() {
            key.metadata.annotations = None;
        }
        status.conditions.shrink_to_fit();
        status.presets.shrink_to_fit();
        status.permissions.shrink_to_fit();
        status.tokens.shrink_to_fit();
    }
}

fn unguard<K: Resource<DynamicType = ()>>(event: Event<DeserializeGuard<K>>, compact: fn(&mut K)) -> Option<Event<K>> {
    let open = |guarded: DeserializeGuard<K>| match guarded.0 {
        Ok(mut object) => {
            let meta = object.meta_mut();
            meta.managed_fields = None;
            // Of annotations, only who created the object is of use, and `compact` drops that where the status has it.
            meta.annotations = meta.annotations.take().and_then(|mut all| {
                all.remove_entry(CREATOR_ANNOTATION).map(|entry| std::collections::BTreeMap::from([entry]))
            });
            meta.labels = None;
            meta.owner_references = None;
            compact(&mut object);
            Some(object)
        }
        Err(invalid) => {
            tracing::error!(
                kind = %K::kind(&()),
                namespace = invalid.metadata.namespace,
                name = invalid.metadata.name,
                error = %invalid.error,
                "an object can't be read by this version of Keywright and is left out"
            );
            None
        }
    };
    match event {
        Event::Init => Some(Event::Init),
        Event::InitDone => Some(Event::InitDone),
        Event::InitApply(object) => open(object).map(Event::InitApply),
        Event::Apply(object) => open(object).map(Event::Apply),
        Event::Delete(object) => open(object).map(Event::Delete),
    }
}
