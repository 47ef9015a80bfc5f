//! Events of events.k8s.io, written beside reconciliation and never in its way.
//!
//! Only changes are worth an Event (see [`crate::domain::status::notes`]), so nothing here has to aggregate. The
//! queue is bounded: when the API server is slower than the changes, Events are dropped and counted, as in every
//! Kubernetes component, and the keys are not held up.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use super::request;
use crate::{domain::status::Note, runtime::metrics::Metrics};

const QUEUE: usize = 20_000;

/// Takes notes for publication.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<(ObjectReference, Note)>,
    metrics: Metrics,
}

impl Events {
    /// Starts the task that publishes.
    #[must_use]
    pub fn start(client: Client, instance: String, metrics: Metrics) -> Self {
        let (queue, mut notes) = mpsc::channel::<(ObjectReference, Note)>(QUEUE);
        let published = metrics.clone();
        tokio::spawn(async move {
            let reporter = Reporter { controller: "keywright.dev/operator".to_owned(), instance: Some(instance) };
            while let Some((regarding, note)) = notes.recv().await {
                let event = Event {
                    type_: if note.warning { EventType::Warning } else { EventType::Normal },
                    reason: note.reason.to_owned(),
                    note: Some(note.message.chars().take(1000).collect()),
                    action: "Reconcile".to_owned(),
                    secondary: None,
                };
                // A new recorder each time: its cache keeps every Event for six minutes and is scanned at each one.
                let recorder = Recorder::new(client.clone(), reporter.clone());
                match request("create Event", recorder.publish(&event, &regarding)).await {
                    Ok(()) => published.event(true),
                    Err(error) => {
                        published.event(false);
                        tracing::warn!(object = regarding.name, namespace = regarding.namespace, %error, "Event lost");
                    }
                }
            }
        });
        Self { queue, metrics }
    }

    /// Hands a note over; never waits.
    pub fn note(&self, regarding: ObjectReference, note: Note) {
        if self.queue.try_send((regarding, note)).is_err() {
            self.metrics.event(false);
        }
    }
}
