//! The age of the data from the API server. An idle watch and a dead connection can't be distinguished, so the age
//! counts from the last response of the API server to the list and watch requests.
//!
//! A response with status 200 does not suffice: an API server that has lost etcd or its watch cache accepts a watch and
//! then sends an event of type ERROR. A watch confirms the data as of its start, and only if no error arrives in it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Response, header::DATE};
use jiff::{Timestamp, fmt::rfc2822};
use kube::{Client, Config, client::ClientBuilder, runtime::watcher::Event};

use crate::{clock::Clock, domain::verification::Reason};

/// The heartbeats of the watches of ApiKeys and PermissionCatalogs.
#[derive(Clone, Debug, Default)]
pub struct Freshness {
    keys: Heartbeat,
    catalogs: Heartbeat,
}

/// The stage of a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A list begins.
    Listing,
    /// The list is complete.
    Listed,
    /// An event of a list or watch arrived.
    Watching,
}

impl Stage {
    /// Returns the stage that an event implies.
    #[must_use]
    pub const fn of<K>(event: &Event<K>) -> Self {
        match event {
            Event::Init => Self::Listing,
            Event::InitDone => Self::Listed,
            Event::InitApply(_) | Event::Apply(_) | Event::Delete(_) => Self::Watching,
        }
    }
}

/// The heartbeat of one watch: the last time at which its data was known to be current.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat(Arc<HeartbeatState>);

#[derive(Debug, Default)]
struct HeartbeatState {
    synced: AtomicBool,
    /// A list is in progress. Until it is complete, the data is as old as it was when the list began.
    listing: AtomicBool,
    /// The last time at which the data was current, in milliseconds since 1970. Wall-clock time, since a monotonic
    /// clock can stop while the machine sleeps.
    at: AtomicI64,
    /// The time at which the API server accepted the current watch, in the same unit; 0 if there is none, or an error
    /// arrived in it.
    granted: AtomicI64,
    /// The last time in a Date header of the API server, and the monotonic time of its arrival.
    server: Mutex<Option<(Timestamp, Instant)>>,
}

/// The time after its start, in milliseconds, at which a watch without an error counts. An API server that can't serve
/// a watch sends the error at once.
const CONFIRM_AFTER_MS: i64 = 2000;

impl Heartbeat {
    /// Records that the data is current. Has no effect during a list, since deletions are known only after its last
    /// page.
    pub fn beat(&self, now: Timestamp) {
        if !self.0.listing.load(Ordering::Relaxed) {
            self.0.at.store(now.as_millisecond(), Ordering::Relaxed);
        }
    }

    /// Records an event of the watch. Call it after the event was applied to the index.
    pub fn heard(&self, stage: Stage, now: Timestamp) {
        match stage {
            Stage::Listing => {
                self.0.listing.store(true, Ordering::Relaxed);
                self.0.granted.store(0, Ordering::Relaxed);
            }
            Stage::Listed => {
                self.0.listing.store(false, Ordering::Relaxed);
                self.beat(now);
                self.0.synced.store(true, Ordering::Release);
            }
            Stage::Watching => self.beat(now),
        }
    }

    /// Records that the API server accepted a watch. If the previous watch ended without an error, the data is current
    /// as of its start.
    fn granted(&self, now: Timestamp) {
        if self.0.listing.load(Ordering::Relaxed) {
            return;
        }
        let now = now.as_millisecond();
        let previous = self.0.granted.swap(now, Ordering::Relaxed);
        // A time in the future was recorded before the clock was corrected. It would make old data count as current.
        let latest = [self.0.at.load(Ordering::Relaxed), previous].into_iter().filter(|at| *at <= now).max();
        self.0.at.store(latest.unwrap_or(now), Ordering::Relaxed);
    }

    /// Records an error in the current watch, which then does not count.
    pub fn failed(&self) {
        self.0.granted.store(0, Ordering::Relaxed);
    }

    /// Returns a client for the requests of one watch. Watches are short (see [`WATCH`]), so that the data counts as
    /// current also in a cluster without changes.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn client(&self, mut config: Config, clock: Clock) -> Result<Client, kube::Error> {
        // Longer than a watch, which ends by itself before.
        config.read_timeout = Some(WATCH + Duration::from_secs(10));
        let heartbeat = self.clone();
        let record = tower::util::MapResponseLayer::new(move |response: Response<_>| {
            if response.status().is_success() {
                heartbeat.granted(clock.exact());
            }
            let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
            if let Some(date) = date.and_then(|date| rfc2822::parse(date).ok()) {
                heartbeat.set_server_time(date.timestamp(), Instant::now());
            }
            response
        });
        Ok(ClientBuilder::try_from(config)?.with_layer(&record).build())
    }

    fn set_server_time(&self, time: Timestamp, at: Instant) {
        *self.0.server.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, at));
    }

    /// Returns the current time by the clock of the API server, which all replicas share. `None` before its first
    /// response.
    #[must_use]
    pub fn server_time(&self) -> Option<Timestamp> {
        let (time, received_at) = (*self.0.server.lock().unwrap_or_else(PoisonError::into_inner))?;
        time.checked_add(received_at.elapsed()).ok()
    }

    /// Whether a list was completed at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.0.synced.load(Ordering::Acquire)
    }

    fn at(&self, now: Timestamp) -> Option<i64> {
        let (at, granted) = (self.0.at.load(Ordering::Relaxed), self.0.granted.load(Ordering::Relaxed));
        let counts = granted != 0 && now.as_millisecond() - granted >= CONFIRM_AFTER_MS;
        self.is_synced().then(|| if counts { at.max(granted) } else { at })
    }
}

/// The duration after which the API server ends a watch, and the next one continues from its resourceVersion.
pub const WATCH: Duration = Duration::from_secs(30);

impl Freshness {
    /// The heartbeat of the watch of ApiKeys.
    #[must_use]
    pub fn keys(&self) -> &Heartbeat {
        &self.keys
    }

    /// The heartbeat of the watch of PermissionCatalogs.
    #[must_use]
    pub fn catalogs(&self) -> &Heartbeat {
        &self.catalogs
    }

    /// Returns the age of the data. `None` before the first complete lists.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Option<Duration> {
        let oldest = self.keys.at(now)?.min(self.catalogs.at(now)?);
        Some(Duration::from_millis(u64::try_from(now.as_millisecond() - oldest).unwrap_or_default()))
    }

    /// Checks that the data is complete and not older than `max_age`.
    ///
    /// # Errors
    /// [`Reason::NotSynced`] or [`Reason::Stale`].
    pub fn check(&self, now: Timestamp, max_age: Option<Duration>) -> Result<(), Reason> {
        let age = self.age(now).ok_or(Reason::NotSynced)?;
        if max_age.is_some_and(|max_age| age > max_age) { Err(Reason::Stale) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_refused_before_the_first_list_and_when_the_data_is_too_old() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let minute = Some(Duration::from_mins(1));
        let freshness = Freshness::default();
        freshness.keys().heard(Stage::Listing, at(90));
        freshness.keys().heard(Stage::Watching, at(95));
        freshness.keys().heard(Stage::Listed, at(100));
        assert_eq!(freshness.check(at(100), minute), Err(Reason::NotSynced), "catalogs were not listed");
        freshness.catalogs().heard(Stage::Listed, at(110));
        assert_eq!(freshness.check(at(160), minute), Ok(()));
        assert_eq!(freshness.check(at(161), minute), Err(Reason::Stale), "the older of the two watches counts");
        assert_eq!(freshness.check(at(100_000), None), Ok(()));
        freshness.keys().beat(at(161));
        assert_eq!(freshness.check(at(170), minute), Ok(()));
        // Lists that never complete do not make the data current.
        for second in 171..230 {
            freshness.keys().heard(Stage::Listing, at(second));
            freshness.keys().heard(Stage::Watching, at(second));
            freshness.keys().beat(at(second));
            freshness.catalogs().beat(at(second));
        }
        assert_eq!(freshness.check(at(230), minute), Err(Reason::Stale));
        freshness.keys().heard(Stage::Listed, at(230));
        assert_eq!(freshness.check(at(230), minute), Ok(()));
        // A clock that goes back makes the age zero.
        assert_eq!(freshness.age(at(50)), Some(Duration::ZERO));
    }

    #[test]
    fn a_watch_counts_from_its_start_and_a_watch_with_an_error_does_not_count() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let freshness = Freshness::default();
        for heartbeat in [freshness.keys(), freshness.catalogs()] {
            heartbeat.heard(Stage::Listing, at(90));
            heartbeat.granted(at(95));
            heartbeat.heard(Stage::Listed, at(100));
            heartbeat.granted(at(100));
        }
        let age = |second| freshness.age(at(second)).unwrap().as_secs();
        assert_eq!((age(101), age(130)), (1, 30));
        // A cluster without changes: consecutive watches.
        for second in [130, 160, 190] {
            freshness.keys().granted(at(second));
            freshness.catalogs().granted(at(second));
            assert_eq!((age(second + 1), age(second + 2)), (31, 2));
        }
        // Every watch is accepted with status 200 and then sends an error.
        for second in 191..300 {
            freshness.keys().granted(at(second));
            freshness.keys().failed();
            freshness.catalogs().granted(at(second));
        }
        assert_eq!(age(300), 110, "the last watch without an error started at 190");
        freshness.keys().heard(Stage::Watching, at(301));
        assert_eq!(age(303), 4);
    }

    #[test]
    fn times_from_a_clock_that_was_ahead_are_ignored() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let freshness = Freshness::default();
        for heartbeat in [freshness.keys(), freshness.catalogs()] {
            heartbeat.heard(Stage::Listed, at(9000));
            heartbeat.granted(at(9001));
            // The clock is corrected.
            heartbeat.granted(at(100));
            heartbeat.granted(at(130));
        }
        assert_eq!(freshness.age(at(230)).unwrap().as_secs(), 100);
    }

    #[test]
    fn the_server_time_advances_between_responses() {
        let heartbeat = Heartbeat::default();
        assert_eq!(heartbeat.server_time(), None);
        let date = rfc2822::parse("Wed, 25 Nov 2026 13:20:22 GMT").unwrap().timestamp();
        heartbeat.set_server_time(date, Instant::now().checked_sub(Duration::from_secs(5)).unwrap());
        assert_eq!(heartbeat.server_time().unwrap().as_second(), date.as_second() + 5);
    }
}
