//! Turns watches into events for the index: backed off, guarded against objects that can't be read, and stripped of
//! what nobody here needs.

use std::{
    fmt::Debug,
    future::ready,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt};
use kube::{
    Api, Client, Resource,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use crate::api::{ACCEPT_SECRET_ANNOTATION, ApiKey, CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION};

/// The annotations that the index keeps.
const KEPT_ANNOTATIONS: [&str; 3] = [CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION, ACCEPT_SECRET_ANNOTATION];

/// Pauses that stay short: a quarter of a second, then twice as long up to two seconds.
#[derive(Debug, Default)]
struct Short {
    doubled: u32,
    since: Option<Instant>,
}

impl Iterator for Short {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = Duration::from_millis(250 << self.doubled);
        self.doubled = (self.doubled + 1).min(3);
        self.since = Some(Instant::now());
        Some(pause)
    }
}

impl Backoff for Short {
    fn reset(&mut self) {
        // Each try of a list begins with an event of its own, which is no success.
        if self.since.is_none_or(|since| since.elapsed() > Duration::from_secs(5)) {
            self.doubled = 0;
        }
    }
}

/// Watches every object of a kind. Objects that do not parse are reported and left out, so that one of them can't
/// stop the others. The stream does not end; errors are logged and retried with backoff. `compact` makes an object
/// that will be kept small.
pub fn watch<K>(client: Client, compact: fn(&mut K)) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    watch_at(client, compact, Pace::Calm)
}

/// How a watch is kept alive and mended.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Long watches, and growing pauses after failures: for who writes.
    Calm,
    /// Watches of this length, and short pauses: for who lets requests pass, and has to know soon what was revoked.
    Brisk(Duration),
}

/// As [`watch`], at another pace.
pub fn watch_at<K>(client: Client, compact: fn(&mut K), pace: Pace) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    raw::<DeserializeGuard<K>>(client, pace).filter_map(move |event| ready(unguard(event, compact)))
}

/// Watches every object of a kind, as it comes.
pub fn raw<K>(client: Client, pace: Pace) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<K> = Api::all(client);
    let config = match pace {
        Pace::Calm => watcher::Config::default(),
        Pace::Brisk(length) => watcher::Config::default().timeout(u32::try_from(length.as_secs()).unwrap_or(30)),
    };
    let stream = watcher::watcher(api, config);
    let stream = match pace {
        Pace::Calm => stream.default_backoff().left_stream(),
        Pace::Brisk(_) => stream.backoff(Short::default()).right_stream(),
    };
    stream.filter_map(|event| async move {
        match event {
            Ok(event) => Some(event),
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
        // A key with a value was restored and accepted already, if it was.
        if status.creator.is_some() && !status.tokens.is_empty() {
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
            // managedFields and the last-applied annotation are most of an object's size and of no use here.
            let meta = object.meta_mut();
            meta.managed_fields = None;
            // Of annotations, only those are of use that the cluster itself writes. `compact` drops the creator where
            // the status has it.
            meta.annotations = meta.annotations.take().and_then(|mut all| {
                all.retain(|name, _| KEPT_ANNOTATIONS.contains(&name.as_str()));
                (!all.is_empty()).then_some(all)
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
