//! Events of events.k8s.io, written beside reconciliation and never in its way.
//!
//! Only changes are worth an Event (see [`crate::domain::status::notes`]), so nothing here has to aggregate. While keys
//! are worked on, Events trickle: an Event costs the API server as much as a key. The queue is bounded: when there are
//! more changes than Events can be written, Events are dropped and counted, and the keys are not held up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::mpsc;

use super::{post_params, request};
use crate::{
    domain::status::Note,
    runtime::{clock::Clock, metrics::Metrics},
};

/// What the API server accepts of an Event, in bytes (`k8s.io/kubernetes/pkg/apis/core/validation/events.go`).
const LONGEST_NOTE: usize = 1024;
/// See [`LONGEST_NOTE`].
const LONGEST_INSTANCE: usize = 128;
/// The longest name of an object, which is that of a DNS subdomain (RFC 1123).
const LONGEST_NAME: usize = 253;

/// The name of the operator in `reportingController`.
const CONTROLLER: &str = "keywright.dev/operator";

const QUEUE: usize = 20_000;

/// Between two Events while keys are worked on.
const TRICKLE: Duration = Duration::from_millis(100);

/// Takes notes for publication.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<(Regarding, Note)>,
    metrics: Metrics,
    working: Arc<AtomicUsize>,
}

/// What an Event is about, as small as can be: a mass of new keys makes a long queue.
struct Regarding {
    api_version: fn() -> String,
    kind: fn() -> String,
    namespace: Option<Box<str>>,
    name: Box<str>,
    uid: Box<str>,
}

impl Regarding {
    fn of<K: Resource<DynamicType = ()>>(object: &K) -> Self {
        Self {
            api_version: || K::api_version(&()).into_owned(),
            kind: || K::kind(&()).into_owned(),
            namespace: object.namespace().map(String::into_boxed_str),
            name: object.name_any().into_boxed_str(),
            uid: object.uid().unwrap_or_default().into_boxed_str(),
        }
    }

    fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some((self.api_version)()),
            kind: Some((self.kind)()),
            namespace: self.namespace.as_deref().map(str::to_owned),
            name: Some(self.name.to_string()),
            uid: Some(self.uid.to_string()),
            ..ObjectReference::default()
        }
    }
}

/// Held while a key is worked on.
pub struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Events {
    /// Where notes are taken, and the task that publishes them, which does not end. `instance` is the name of the pod.
    pub fn new(
        client: Client,
        instance: &str,
        metrics: Metrics,
        clock: Clock,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (queue, mut notes) = mpsc::channel::<(Regarding, Note)>(QUEUE);
        let published = metrics.clone();
        let working = Arc::new(AtomicUsize::new(0));
        let keys = Arc::clone(&working);
        let instance = cut(instance, LONGEST_INSTANCE).to_owned();
        let publish = async move {
            while let Some((regarding, note)) = notes.recv().await {
                if keys.load(Ordering::Relaxed) > 0 {
                    tokio::time::sleep(TRICKLE).await;
                }
                let event = event(&regarding, &note, &instance, clock.exact());
                // Events of what is in no namespace are in this one, where kubectl looks for them.
                let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
                let events: Api<Event> = Api::namespaced(client.clone(), namespace);
                match request("create Event", events.create(&post_params(), &event)).await {
                    Ok(_) => published.event(true),
                    Err(error) => {
                        published.event(false);
                        tracing::warn!(object = &*regarding.name, namespace = regarding.namespace.as_deref(), %error, "Event lost");
                    }
                }
            }
        };
        (Self { queue, metrics, working }, publish)
    }

    /// Says that a key is worked on, for as long as the answer is held.
    #[must_use]
    pub fn working(&self) -> Working {
        self.working.fetch_add(1, Ordering::Relaxed);
        Working(Arc::clone(&self.working))
    }

    /// Hands a note over; never waits.
    pub fn note<K: Resource<DynamicType = ()>>(&self, regarding: &K, note: Note) {
        if self.queue.try_send((Regarding::of(regarding), note)).is_err() {
            self.metrics.event(false);
        }
    }
}

fn event(regarding: &Regarding, note: &Note, instance: &str, now: Timestamp) -> Event {
    Event {
        metadata: ObjectMeta {
            name: Some(name(&regarding.name, now)),
            namespace: regarding.namespace.as_deref().map(str::to_owned),
            ..ObjectMeta::default()
        },
        type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(note.reason.to_owned()),
        note: Some(cut(&note.message, LONGEST_NOTE).to_owned()),
        action: Some("Reconcile".to_owned()),
        event_time: Some(MicroTime(now)),
        regarding: Some(regarding.reference()),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(instance.to_owned()),
        ..Event::default()
    }
}

/// The name of an Event, in the form that client-go gives it: the object's name and the time in hexadecimal
/// nanoseconds. Of a name that leaves no room for the time, only the beginning is in it. Events are found by what they
/// regard, not by this.
fn name(object: &str, now: Timestamp) -> String {
    let suffix = format!("{:x}", now.as_nanosecond());
    let head = cut(object, LONGEST_NAME.saturating_sub(suffix.len() + 1));
    // Each part of a DNS subdomain ends in a letter or a digit.
    let head = head.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{head}.{suffix}")
}

/// The longest beginning of a text that has at most so many bytes.
fn cut(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_for_an_event_is_cut_and_not_lost() {
        let now: Timestamp = "2026-11-25T10:00:00.123456789Z".parse().unwrap();
        assert_eq!(name("checkout", now), format!("checkout.{:x}", now.as_nanosecond()));
        for long in
            ["k".repeat(236), "k".repeat(237), "k".repeat(253), format!("{}.-{}", "k".repeat(234), "k".repeat(17))]
        {
            let name = name(&long, now);
            assert!(name.len() <= LONGEST_NAME, "{name}");
            let parts: Vec<_> = name.split('.').collect();
            assert!(parts.iter().all(|part| part.ends_with(|c: char| c.is_ascii_alphanumeric())), "{name}");
        }
        assert_eq!(cut(&"ü".repeat(1000), LONGEST_NOTE).len(), LONGEST_NOTE);
        assert_eq!(cut(&format!("x{}", "ü".repeat(1000)), LONGEST_NOTE).len(), LONGEST_NOTE - 1);
        assert_eq!(cut("short", LONGEST_NOTE), "short");
    }
}
