//! Watches of the API server, as streams of events for the index. They retry with backoff, handle objects that can't be
//! read, and drop unneeded fields.

use std::{
    fmt::Debug,
    future::ready,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use super::partial::{PartialObject, Watched};
use crate::api::{ApiKey, CREATOR_ANNOTATION};

/// A backoff that starts at 250 ms and doubles up to 2 s.
#[derive(Debug, Default)]
struct ShortBackoff {
    doubled: u32,
    since: Option<Instant>,
}

impl Iterator for ShortBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = Duration::from_millis(250 << self.doubled);
        self.doubled = (self.doubled + 1).min(3);
        self.since = Some(Instant::now());
        Some(pause)
    }
}

impl Backoff for ShortBackoff {
    fn reset(&mut self) {
        // kube resets the backoff at the first event of each attempt, even if the list then fails.
        if self.since.is_none_or(|since| since.elapsed() > Duration::from_secs(5)) {
            self.doubled = 0;
        }
    }
}

/// Watches all objects of a kind. The stream does not end; errors are logged and retried with backoff. `compact`
/// reduces the memory of an object.
///
/// An object that this version of Keywright can't read is logged and counts as deleted, so that it allows nothing and
/// does not block other objects. [`Watched::RESTRICTS`] is the exception.
pub fn watch<K: Watched>(client: Client, compact: fn(&mut K)) -> impl Stream<Item = Event<K>> + Send {
    watch_at(client, compact, WatchMode::Patient, || ())
}

/// The length of watches and the backoff after failures.
#[derive(Clone, Copy, Debug)]
pub enum WatchMode {
    /// Long watches, and growing delays after failures. For the operator.
    Patient,
    /// Watches of this length, and short delays. For the verifier, which must receive revocations soon.
    Prompt(Duration),
}

/// Watches all objects of a kind as [`watch`] does, in a given mode. `failed` is called as by [`raw`].
pub fn watch_at<K: Watched>(
    client: Client,
    compact: fn(&mut K),
    mode: WatchMode,
    failed: impl Fn() + Send + 'static,
) -> impl Stream<Item = Event<K>> + Send {
    raw::<PartialObject<K>>(client, mode, failed).filter_map(move |event| ready(parsed(event, compact)))
}

/// Watches all objects of a kind, without parsing partial objects. `failed` is called when an accepted watch (status
/// 200) delivers an error instead of an event, or an event that can't be parsed.
pub fn raw<K>(
    client: Client,
    mode: WatchMode,
    failed: impl Fn() + Send + 'static,
) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<K> = Api::all(client);
    let config = match mode {
        WatchMode::Patient => watcher::Config::default(),
        WatchMode::Prompt(length) => watcher::Config::default().timeout(u32::try_from(length.as_secs()).unwrap_or(30)),
    };
    let stream = watcher::watcher(api, config);
    let stream = match mode {
        WatchMode::Patient => stream.default_backoff().left_stream(),
        WatchMode::Prompt(_) => stream.backoff(ShortBackoff::default()).right_stream(),
    };
    stream.filter_map(move |event| {
        ready(match event {
            Ok(event) => Some(event),
            Err(error) => {
                // An interrupted connection does not invalidate the events before it.
                let interrupted = matches!(&error, watcher::Error::WatchFailed(kube::Error::ReadEvents(_)));
                if matches!(&error, watcher::Error::WatchError(_) | watcher::Error::WatchFailed(_)) && !interrupted {
                    failed();
                }
                // The text of a watch error can quote an object, so only its class is logged.
                let class = match &error {
                    watcher::Error::InitialListFailed(_) => "the list failed",
                    watcher::Error::WatchStartFailed(_) => "the watch could not start",
                    watcher::Error::WatchError(_) => "the API server ended the watch",
                    watcher::Error::WatchFailed(_) => "the watch was interrupted",
                    watcher::Error::NoResourceVersion => "the list had no resourceVersion",
                };
                let code = match &error {
                    watcher::Error::InitialListFailed(kube::Error::Api(status))
                    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
                    | watcher::Error::WatchError(status) => Some(status.code),
                    _ => None,
                };
                tracing::warn!(kind = %K::kind(&()), code, "{class}; retrying");
                None
            }
        })
    })
}

/// Reduces the memory of an ApiKey: releases the unused capacity of vectors and removes annotations that are no longer
/// needed. The JSON parser reserves four elements for one; that is a fifth of the memory of the keys of a large
/// cluster.
pub fn compact_key(key: &mut ApiKey) {
    key.spec.presets.shrink_to_fit();
    key.spec.permissions.shrink_to_fit();
    if let Some(status) = &mut key.status {
        if status.creator.is_some()
            && let Some(annotations) = &mut key.metadata.annotations
        {
            annotations.remove(CREATOR_ANNOTATION);
            // The annotations of a restore or an acceptance matter only until the key has a value.
            if annotations.is_empty() || !status.tokens.is_empty() {
                key.metadata.annotations = None;
            }
        }
        status.conditions.shrink_to_fit();
        status.presets.shrink_to_fit();
        status.permissions.shrink_to_fit();
        status.tokens.shrink_to_fit();
    }
}

/// Parses the object of an event. Returns `None` if the event has no effect.
fn parsed<K: Watched>(event: Event<PartialObject<K>>, compact: fn(&mut K)) -> Option<Event<K>> {
    match event {
        Event::Init => Some(Event::Init),
        Event::InitDone => Some(Event::InitDone),
        // An object that is missing in the list is removed when the list is complete.
        Event::InitApply(partial) => partial.open().ok().map(|object| Event::InitApply(compacted(object, compact))),
        Event::Apply(partial) => match partial.open() {
            Ok(object) => Some(Event::Apply(compacted(object, compact))),
            Err(unreadable) if !K::RESTRICTS => unreadable.name().map(Event::Delete),
            Err(_) => None,
        },
        Event::Delete(partial) => partial.name().map(Event::Delete),
    }
}

fn compacted<K>(mut object: K, compact: fn(&mut K)) -> K {
    compact(&mut object);
    object
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::SecuritySettings;

    fn object<K: Watched>(spec: &Value) -> PartialObject<K> {
        let object = json!({"metadata": {"name": "default", "namespace": "shop", "uid": "u"}, "spec": spec});
        serde_json::from_str(&object.to_string()).unwrap()
    }

    /// Parses an event of an object with this spec. Returns the type of the resulting event and the name of the object.
    fn event_of<K: Watched>(
        event: fn(PartialObject<K>) -> Event<PartialObject<K>>,
        spec: &Value,
    ) -> Option<(&'static str, String)> {
        Some(match parsed(event(object::<K>(spec)), |_| {})? {
            Event::Init => ("Init", String::new()),
            Event::InitApply(object) => ("InitApply", object.name_any()),
            Event::InitDone => ("InitDone", String::new()),
            Event::Apply(object) => ("Apply", object.name_any()),
            Event::Delete(object) => ("Delete", object.name_any()),
        })
    }

    #[test]
    fn unreadable_objects_count_as_deleted_except_security_settings() {
        let (good, bad) = (json!({"type": "Team"}), json!({"type": "Future"}));
        let named = |event| Some((event, "default".to_owned()));
        assert_eq!(event_of::<ApiKey>(Event::Apply, &good), named("Apply"));
        assert_eq!(event_of::<ApiKey>(Event::Apply, &bad), named("Delete"));
        assert_eq!(event_of::<ApiKey>(Event::InitApply, &bad), None);
        assert_eq!(event_of::<ApiKey>(Event::Delete, &good), named("Delete"));
        assert_eq!(event_of::<ApiKey>(Event::Delete, &bad), named("Delete"));
        let bad = json!({"limits": "Future"});
        assert_eq!(
            event_of::<SecuritySettings>(Event::Apply, &bad),
            None,
            "unreadable settings replace the last readable ones"
        );
        assert_eq!(event_of::<SecuritySettings>(Event::Delete, &bad), named("Delete"));
    }
}
