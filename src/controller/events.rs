//! Publishes Events of API group events.k8s.io without delaying reconciliations.
//!
//! Only changes cause Events (see [`crate::domain::status::notes`]), so Events need no aggregation. An Event costs the
//! API server as much as a key; during reconciliations, Events are therefore written at a limited rate. If the bounded
//! queue is full, Events are dropped and counted.

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
use crate::{clock::Clock, domain::status::Note, telemetry::metrics::Metrics};

/// The maximum length of the note of an Event, in bytes (`k8s.io/kubernetes/pkg/apis/core/validation/events.go`).
const MAX_NOTE_LENGTH: usize = 1024;
/// The maximum length of `reportingInstance`, in bytes. See [`MAX_NOTE_LENGTH`].
const MAX_INSTANCE_LENGTH: usize = 128;
/// The maximum length of the name of an object, a DNS subdomain (RFC 1123).
const MAX_NAME_LENGTH: usize = 253;

/// The name of the operator in `reportingController`.
const CONTROLLER: &str = "keywright.dev/operator";

/// The maximum number of Events that wait for publication.
const QUEUE_CAPACITY: usize = 20_000;

/// The delay before each Event while a reconciliation runs.
const DELAY_WHILE_WORKING: Duration = Duration::from_millis(100);

/// Queues notes for publication as Events.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<(Regarding, Note)>,
    metrics: Metrics,
    working: Arc<AtomicUsize>,
}

/// The object that an Event regards. It holds no more than needed, since many new keys make the queue long.
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

/// Exists while a reconciliation runs. See [`Events::working`].
pub struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Events {
    /// Returns the queue, and the task that publishes its notes. The task does not end. `instance` is the name of the
    /// pod.
    pub fn new(
        client: Client,
        instance: &str,
        metrics: Metrics,
        clock: Clock,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (queue, mut notes) = mpsc::channel::<(Regarding, Note)>(QUEUE_CAPACITY);
        let published = metrics.clone();
        let working = Arc::new(AtomicUsize::new(0));
        let running = Arc::clone(&working);
        let instance = truncate(instance, MAX_INSTANCE_LENGTH).to_owned();
        let publish = async move {
            while let Some((regarding, note)) = notes.recv().await {
                if running.load(Ordering::Relaxed) > 0 {
                    tokio::time::sleep(DELAY_WHILE_WORKING).await;
                }
                let event = event(&regarding, &note, &instance, clock.exact());
                // Events of cluster-scoped objects belong to namespace `default`, where kubectl searches for them.
                let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
                let events: Api<Event> = Api::namespaced(client.clone(), namespace);
                match request("create Event", events.create(&post_params(), &event)).await {
                    Ok(_) => published.event(true),
                    Err(error) => {
                        published.event(false);
                        tracing::warn!(
                            object = &*regarding.name,
                            namespace = regarding.namespace.as_deref(),
                            %error,
                            "an Event could not be written and is dropped"
                        );
                    }
                }
            }
        };
        (Self { queue, metrics, working }, publish)
    }

    /// Marks a reconciliation as running until the returned guard is dropped.
    #[must_use]
    pub fn working(&self) -> Working {
        self.working.fetch_add(1, Ordering::Relaxed);
        Working(Arc::clone(&self.working))
    }

    /// Queues a note without waiting. Drops and counts it if the queue is full.
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
        note: Some(truncate(&note.message, MAX_NOTE_LENGTH).to_owned()),
        action: Some("Reconcile".to_owned()),
        event_time: Some(MicroTime(now)),
        regarding: Some(regarding.reference()),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(instance.to_owned()),
        ..Event::default()
    }
}

/// Returns the name of an Event in the form that client-go uses: the name of the object and the time in hexadecimal
/// nanoseconds. A long name of an object is truncated. Clients find Events by the field `regarding`, not by their name.
fn name(object: &str, now: Timestamp) -> String {
    let suffix = format!("{:x}", now.as_nanosecond());
    let head = truncate(object, MAX_NAME_LENGTH.saturating_sub(suffix.len() + 1));
    // Each label of a DNS subdomain ends in a letter or a digit (RFC 1123).
    let head = head.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{head}.{suffix}")
}

/// Truncates a text to at most `max_length` bytes, at a character boundary.
fn truncate(text: &str, max_length: usize) -> &str {
    &text[..text.floor_char_boundary(max_length)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_notes_that_are_too_long_are_truncated() {
        let now: Timestamp = "2026-11-25T10:00:00.123456789Z".parse().unwrap();
        assert_eq!(name("checkout", now), format!("checkout.{:x}", now.as_nanosecond()));
        for long in
            ["k".repeat(236), "k".repeat(237), "k".repeat(253), format!("{}.-{}", "k".repeat(234), "k".repeat(17))]
        {
            let name = name(&long, now);
            assert!(name.len() <= MAX_NAME_LENGTH, "{name}");
            let labels: Vec<_> = name.split('.').collect();
            assert!(labels.iter().all(|label| label.ends_with(|c: char| c.is_ascii_alphanumeric())), "{name}");
        }
        assert_eq!(truncate(&"ü".repeat(1000), MAX_NOTE_LENGTH).len(), MAX_NOTE_LENGTH);
        assert_eq!(truncate(&format!("x{}", "ü".repeat(1000)), MAX_NOTE_LENGTH).len(), MAX_NOTE_LENGTH - 1);
        assert_eq!(truncate("short", MAX_NOTE_LENGTH), "short");
    }
}
