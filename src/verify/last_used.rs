//! When keys were used: remembered in the keyring, and told to the cluster now and then, far from any request.
//!
//! One patch a key and interval, however often it is used and however many replicas see it: whoever comes first writes,
//! and the others see that by their watch. What is behind is written at a bounded rate. A failed write is tried again
//! at the next look, since what was used stays remembered.
//!
//! No time is written that lies in the future of the API server: admission lets the field move forward only, so that one
//! machine whose clock is wrong would make it useless for as long.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use jiff::Timestamp;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::freshness::Heartbeat;
use crate::{api::ApiKey, index::keyring::Keyring};

/// How many keys are written down in one second at most. At the usual hour between two writes of a key, that is enough
/// for 180,000 keys in steady use.
const PER_SECOND: usize = 50;

/// How many of these requests are under way at once.
const CONCURRENCY: usize = 4;

/// Nobody waits for an answer for longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long after a failure nothing is tried.
const PAUSE: Duration = Duration::from_secs(10);

/// What became of the writes.
#[derive(Debug, Default)]
pub struct Writes {
    /// Written.
    pub written: AtomicU64,
    /// Not written: tried again.
    pub failed: AtomicU64,
}

/// Tells the cluster.
pub struct LastUsed {
    /// Where the uses are.
    pub keys: Arc<Keyring>,
    /// With the right to patch the status of ApiKeys; admission lets it change this one field alone.
    pub client: Client,
    /// The watch of the keys, which knows the time of the API server.
    pub heartbeat: Heartbeat,
    /// How old the last use may be that the cluster knows of.
    pub interval: Duration,
    /// Counts.
    pub writes: Arc<Writes>,
}

impl LastUsed {
    /// Looks once a second, until it is dropped.
    pub async fn run(self) {
        let mut looks = interval(Duration::from_secs(1));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let seconds = u32::try_from(self.interval.as_secs()).unwrap_or(u32::MAX);
        loop {
            looks.tick().await;
            // An API server says its time with each answer (RFC 9110, section 6.6.1).
            let Some(now) = self.heartbeat.server_time().and_then(|now| u32::try_from(now.as_second()).ok()) else {
                continue;
            };
            let due = self.keys.used_since(seconds, PER_SECOND, now);
            let writes = stream::iter(due).map(|(namespace, name, used)| self.write(namespace, name, used, seconds));
            let done: Vec<_> = writes.buffer_unordered(CONCURRENCY).collect().await;
            // A right that is lacking, or an API server that is away, is not asked for fifty times a second.
            if done.contains(&false) {
                sleep(PAUSE).await;
            }
        }
    }

    /// Whether there is nothing left to do for this use.
    async fn write(&self, namespace: String, name: String, used: u32, interval: u32) -> bool {
        // Another replica may have been faster since.
        let Some(at) = Timestamp::from_second(i64::from(used))
            .ok()
            .filter(|_| self.keys.is_unreported(&namespace, &name, used, interval))
        else {
            return true;
        };
        let keys: Api<ApiKey> = Api::namespaced(self.client.clone(), &namespace);
        let patch = Patch::Merge(json!({"status": {"lastUsedAt": at}}));
        let params = PatchParams::default();
        let done = match timeout(PATIENCE, keys.patch_status(&name, &params, &patch)).await {
            Ok(Ok(_)) => {
                self.writes.written.fetch_add(1, Ordering::Relaxed);
                true
            }
            // Gone, or somebody wrote a later time, which admission does not let us take back.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 422) => true,
            Ok(Err(error)) => {
                let code = if let kube::Error::Api(status) = &error { Some(status.code) } else { None };
                tracing::warn!(namespace, name, code, "lastUsedAt could not be written; trying again");
                false
            }
            Err(_) => false,
        };
        if done {
            self.keys.reported(&namespace, &name, used);
        } else {
            self.writes.failed.fetch_add(1, Ordering::Relaxed);
        }
        done
    }
}
