//! The watches, on every replica. They fill the stores and the index, and queue the ApiKeys that a change affects.

use std::{collections::BTreeSet, sync::Arc};

use futures::StreamExt;
use kube::{
    ResourceExt,
    runtime::{
        reflector::{ObjectRef, Store, store::Writer},
        watcher::Event,
    },
};
use tokio::sync::Notify;

use super::{Changes, Requeue, Shared};
use crate::{
    api::{AccessPolicy, ApiKey, PermissionCatalog, SecuritySettings},
    controller::{
        api_key::{self, ApiKeyContext},
        reference,
    },
    domain::export::is_same,
    index::watch,
    runtime::supervisor::Supervisor,
};

/// Starts the watches. Returns the store of AccessPolicies.
pub(super) fn start(shared: &Shared, keys: Writer<ApiKey>, tasks: &mut Supervisor) -> Store<AccessPolicy> {
    let context = || Arc::clone(&shared.context);
    let changes = shared.changes.clone();
    let writer = Writer::<AccessPolicy>::default();
    let policies = writer.as_reader();
    let policies_changed = Arc::clone(&changes.policies);
    let catalogs_changed = Arc::clone(&changes.catalogs);
    tasks.spawn("the watch of ApiKeys", watch_keys(context(), keys, shared.requeue.clone(), changes));
    tasks.spawn(
        "the watch of AccessPolicies",
        watch_policies(context(), writer, shared.requeue.clone(), policies_changed),
    );
    tasks.spawn("the watch of SecuritySettings", watch_settings(context(), shared.requeue.clone()));
    tasks.spawn("the watch of PermissionCatalogs", watch_catalogs(context(), shared.requeue.clone(), catalogs_changed));
    policies
}

/// ApiKeys: into the store, the index and the queue.
async fn watch_keys(context: Arc<ApiKeyContext>, mut writer: Writer<ApiKey>, requeue: Requeue, changes: Changes) {
    let mut events = std::pin::pin!(watch::watch::<ApiKey>(context.client.clone(), watch::compact_key));
    let store = writer.as_reader();
    while let Some(event) = events.next().await {
        let before = match &event {
            Event::Apply(key) | Event::Delete(key) => store.get(&reference(key)),
            _ => None,
        };
        context.index.apply_key(&event);
        writer.apply_watcher_event(&event);
        match &event {
            Event::Apply(key) => context.index.digests.replace(before.as_deref(), Some(key)),
            Event::Delete(key) => {
                context.index.digests.replace(before.as_deref(), None);
                api_key::forget(key, &context);
            }
            Event::InitDone => {
                let keys = store.state();
                context.index.digests.reset(keys.iter().map(AsRef::as_ref));
                api_key::retain(&keys, &context);
            }
            Event::Init | Event::InitApply(_) => {}
        }
        // A write of status.lastUsedAt alone changes neither the export nor the status of a policy.
        let only_last_use = matches!((&event, &before), (Event::Apply(key), Some(before)) if is_same(before, key));
        if !only_last_use {
            changes.policies.notify_one();
            changes.keys.notify_one();
        }
        match &event {
            Event::Apply(key) => requeue.keys([reference(key)]),
            Event::Delete(key) => {
                let namespace = key.namespace().unwrap_or_default();
                let others = context.index.other_claimants(&namespace, key);
                requeue.keys(others.iter().map(|name| ObjectRef::new(name).within(&namespace)));
            }
            Event::InitDone => requeue.all(&store),
            Event::Init | Event::InitApply(_) => {}
        }
    }
}

/// PermissionCatalogs: into the index. A change of the merged catalog queues every ApiKey, which costs a request only
/// for those whose status changes.
async fn watch_catalogs(context: Arc<ApiKeyContext>, requeue: Requeue, changed: Arc<Notify>) {
    let mut events = std::pin::pin!(watch::watch::<PermissionCatalog>(context.client.clone(), |_| {}));
    while let Some(event) = events.next().await {
        if context.index.apply_catalog(&event) {
            changed.notify_one();
            requeue.all(&context.keys);
        }
    }
}

/// AccessPolicies: into the store and the index. A change queues the ApiKeys that refer to the policy.
async fn watch_policies(
    context: Arc<ApiKeyContext>,
    mut writer: Writer<AccessPolicy>,
    requeue: Requeue,
    changed: Arc<Notify>,
) {
    let mut events = std::pin::pin!(watch::watch::<AccessPolicy>(context.client.clone(), |_| {}));
    while let Some(event) = events.next().await {
        let policies = context.index.apply_policy(&event);
        writer.apply_watcher_event(&event);
        changed.notify_one();
        for (namespace, policy) in policies {
            let keys = context.index.keys_of_policy(&namespace, &policy);
            requeue.keys(keys.keys().map(|name| ObjectRef::new(name).within(&namespace)));
        }
    }
}

/// SecuritySettings: into the index. A change queues the ApiKeys of the namespace.
async fn watch_settings(context: Arc<ApiKeyContext>, requeue: Requeue) {
    let mut events = std::pin::pin!(watch::watch::<SecuritySettings>(context.client.clone(), |_| {}));
    while let Some(event) = events.next().await {
        let changed: BTreeSet<_> =
            context.index.apply_settings(&event).into_iter().map(|(namespace, _)| namespace).collect();
        if !changed.is_empty() {
            let keys = context.keys.state();
            let affected = |key: &&Arc<ApiKey>| key.namespace().is_some_and(|namespace| changed.contains(&namespace));
            requeue.keys(keys.iter().filter(affected).map(|key| reference(&**key)));
        }
    }
}
