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
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use super::wire::{Watched, Wire};
use crate::api::{ApiKey, CREATOR_ANNOTATION};

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

/// Watches every object of a kind. The stream does not end; errors are logged and retried with backoff. `compact` makes an
/// object that will be kept small.
///
/// An object that this version of Keywright can't read is logged, and then is as one that was deleted, so that it allows
/// nothing and can't stop the others; see [`Watched::RESTRICTS`] for the exception.
pub fn watch<K: Watched>(client: Client, compact: fn(&mut K)) -> impl Stream<Item = Event<K>> + Send {
    watch_at(client, compact, Pace::Calm, || ())
}

/// How a watch is kept alive and mended.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Long watches, and growing pauses after failures: for who writes.
    Calm,
    /// Watches of this length, and short pauses: for who lets requests pass, and has to know soon what was revoked.
    Brisk(Duration),
}

/// As [`watch`], at another pace. `failed` is called as by [`raw`].
pub fn watch_at<K: Watched>(
    client: Client,
    compact: fn(&mut K),
    pace: Pace,
    failed: impl Fn() + Send + 'static,
) -> impl Stream<Item = Event<K>> + Send {
    raw::<Wire<K>>(client, pace, failed).filter_map(move |event| ready(opened(event, compact)))
}

/// Watches every object of a kind, as it comes. `failed` is called when a watch that the API server granted turns out to
/// say nothing: with an error in place of an event, which comes after the status 200, or with what can't be read.
pub fn raw<K>(client: Client, pace: Pace, failed: impl Fn() + Send + 'static) -> impl Stream<Item = Event<K>> + Send
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
    stream.filter_map(move |event| {
        ready(match event {
            Ok(event) => Some(event),
            Err(error) => {
                // A connection that broke says nothing of what it had said before.
                let broke = matches!(&error, watcher::Error::WatchFailed(kube::Error::ReadEvents(_)));
                if matches!(&error, watcher::Error::WatchError(_) | watcher::Error::WatchFailed(_)) && !broke {
                    failed();
                }
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
        })
    })
}

/// Gives back what the vectors of an ApiKey have to spare: reading JSON leaves room for four elements where there is
/// one, which is a fifth of the memory of a large cluster's keys.
pub fn compact_key(key: &mut ApiKey) {
    key.spec.presets.shrink_to_fit();
    key.spec.permissions.shrink_to_fit();
    if let Some(status) = &mut key.status {
        if status.creator.is_some()
            && let Some(annotations) = &mut key.metadata.annotations
        {
            annotations.remove(CREATOR_ANNOTATION);
            // A key with a value was restored and accepted already, if it was.
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

/// The event with the object in it; none if there is nothing to tell.
fn opened<K: Watched>(event: Event<Wire<K>>, compact: fn(&mut K)) -> Option<Event<K>> {
    match event {
        Event::Init => Some(Event::Init),
        Event::InitDone => Some(Event::InitDone),
        // One that is not among those of the list is gone when the list is done.
        Event::InitApply(wire) => wire.open().ok().map(|object| Event::InitApply(compacted(object, compact))),
        Event::Apply(wire) => match wire.open() {
            Ok(object) => Some(Event::Apply(compacted(object, compact))),
            Err(unreadable) if !K::RESTRICTS => unreadable.name().map(Event::Delete),
            Err(_) => None,
        },
        Event::Delete(wire) => wire.name().map(Event::Delete),
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

    fn object<K: Watched>(spec: &Value) -> Wire<K> {
        let object = json!({"metadata": {"name": "default", "namespace": "shop", "uid": "u"}, "spec": spec});
        serde_json::from_str(&object.to_string()).unwrap()
    }

    /// What an event of an object with this spec says: the word for it, and the name of the object.
    fn said<K: Watched>(event: fn(Wire<K>) -> Event<Wire<K>>, spec: &Value) -> Option<(&'static str, String)> {
        Some(match opened(event(object::<K>(spec)), |_| {})? {
            Event::Init => ("Init", String::new()),
            Event::InitApply(object) => ("InitApply", object.name_any()),
            Event::InitDone => ("InitDone", String::new()),
            Event::Apply(object) => ("Apply", object.name_any()),
            Event::Delete(object) => ("Delete", object.name_any()),
        })
    }

    #[test]
    fn an_object_that_cant_be_read_is_gone_and_so_is_one_that_was_deleted() {
        let (good, bad) = (json!({"type": "Team"}), json!({"type": "Future"}));
        let named = |event| Some((event, "default".to_owned()));
        assert_eq!(said::<ApiKey>(Event::Apply, &good), named("Apply"));
        assert_eq!(said::<ApiKey>(Event::Apply, &bad), named("Delete"));
        assert_eq!(said::<ApiKey>(Event::InitApply, &bad), None);
        assert_eq!(said::<ApiKey>(Event::Delete, &good), named("Delete"));
        assert_eq!(said::<ApiKey>(Event::Delete, &bad), named("Delete"));
        let bad = json!({"limits": "Future"});
        assert_eq!(said::<SecuritySettings>(Event::Apply, &bad), None, "settings restrict: the last ones stay");
        assert_eq!(said::<SecuritySettings>(Event::Delete, &bad), named("Delete"));
    }
}
