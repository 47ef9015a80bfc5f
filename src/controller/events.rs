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

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client, Resource, ResourceExt,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use super::request;
use crate::{domain::status::Note, runtime::metrics::Metrics};

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
    /// Starts the task that publishes.
    #[must_use]
    pub fn start(client: Client, instance: String, metrics: Metrics) -> Self {
        let (queue, mut notes) = mpsc::channel::<(Regarding, Note)>(QUEUE);
        let published = metrics.clone();
        let working = Arc::new(AtomicUsize::new(0));
        let keys = Arc::clone(&working);
        tokio::spawn(async move {
            let reporter = Reporter { controller: "keywright.dev/operator".to_owned(), instance: Some(instance) };
            while let Some((regarding, note)) = notes.recv().await {
                if keys.load(Ordering::Relaxed) > 0 {
                    tokio::time::sleep(TRICKLE).await;
                }
                let event = Event {
                    type_: if note.warning { EventType::Warning } else { EventType::Normal },
                    reason: note.reason.to_owned(),
                    note: Some(note.message.chars().take(1000).collect()),
                    action: "Reconcile".to_owned(),
                    secondary: None,
                };
                // A new recorder each time: its cache keeps every Event for six minutes and is scanned at each one.
                let recorder = Recorder::new(client.clone(), reporter.clone());
                match request("create Event", recorder.publish(&event, &regarding.reference())).await {
                    Ok(()) => published.event(true),
                    Err(error) => {
                        published.event(false);
                        tracing::warn!(object = &*regarding.name, namespace = regarding.namespace.as_deref(), %error, "Event lost");
                    }
                }
            }
        });
        Self { queue, metrics, working }
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
