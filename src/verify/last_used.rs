//! Writes of `status.lastUsedAt`, outside the path of requests. The key index holds the times of use.
//!
//! Each key gets one patch per interval, independent of the number of uses and replicas: the first replica writes, and
//! the others see its write by their watch. Outstanding writes are sent at a bounded rate. A failed write is retried in
//! the next round.
//!
//! No time is written that is later than the time of the API server: admission lets the field move forward only, so
//! that a clock that is ahead would block the field until that time.

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
use crate::{api::ApiKey, index::key_index::KeyIndex};

/// The maximum number of writes per second. With the default interval of one hour, it suffices for 180,000 keys in
/// constant use.
const PER_SECOND: usize = 50;

/// The maximum number of concurrent writes.
const CONCURRENCY: usize = 4;

/// The timeout of one write.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause after a failed write.
const PAUSE: Duration = Duration::from_secs(10);

/// The counters of writes.
#[derive(Debug, Default)]
pub struct Writes {
    /// Successful writes.
    pub written: AtomicU64,
    /// Failed writes, which are retried.
    pub failed: AtomicU64,
}

/// The writer of `status.lastUsedAt`.
pub struct LastUsed {
    /// The index, which holds the times of use.
    pub keys: Arc<KeyIndex>,
    /// A client with the right to patch the status of ApiKeys; admission lets it change this one field only.
    pub client: Client,
    /// The heartbeat of the watch of ApiKeys, which knows the time of the API server.
    pub heartbeat: Heartbeat,
    /// The minimum interval between two writes for one key.
    pub interval: Duration,
    /// The counters of writes.
    pub writes: Arc<Writes>,
}

impl LastUsed {
    /// Runs a round of writes every second, until the future is dropped.
    pub async fn run(self) {
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let seconds = u32::try_from(self.interval.as_secs()).unwrap_or(u32::MAX);
        loop {
            ticks.tick().await;
            // The time of the API server comes from the Date header of its responses (RFC 9110, section 6.6.1).
            let Some(now) = self.heartbeat.server_time().and_then(|now| u32::try_from(now.as_second()).ok()) else {
                continue;
            };
            let due = self.keys.used_since(seconds, PER_SECOND, now);
            let writes = stream::iter(due).map(|(namespace, name, used)| self.write(namespace, name, used, seconds));
            let done: Vec<_> = writes.buffer_unordered(CONCURRENCY).collect().await;
            // Without the pause, a missing right or an unavailable API server would cause fifty failed requests a
            // second.
            if done.contains(&false) {
                sleep(PAUSE).await;
            }
        }
    }

    /// Writes one time of use. Returns false if the write must be retried.
    async fn write(&self, namespace: String, name: String, used: u32, interval: u32) -> bool {
        // Another replica may have written a time since.
        let Some(at) = Timestamp::from_second(i64::from(used))
            .ok()
            .filter(|_| self.keys.is_unreported(&namespace, &name, used, interval))
        else {
            return true;
        };
        let keys: Api<ApiKey> = Api::namespaced(self.client.clone(), &namespace);
        let patch = Patch::Merge(json!({"status": {"lastUsedAt": at}}));
        let params = PatchParams::default();
        let done = match timeout(REQUEST_TIMEOUT, keys.patch_status(&name, &params, &patch)).await {
            Ok(Ok(_)) => {
                self.writes.written.fetch_add(1, Ordering::Relaxed);
                true
            }
            // 404: the ApiKey was deleted. 422: another replica wrote a later time, and admission rejects an earlier
            // one.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 422) => true,
            Ok(Err(error)) => {
                let code = if let kube::Error::Api(status) = &error { Some(status.code) } else { None };
                tracing::warn!(namespace, name, code, "cannot write status.lastUsedAt of the ApiKey; retrying");
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
