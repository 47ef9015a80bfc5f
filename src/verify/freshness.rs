//! How old the knowledge is. A watch that is quiet and one that is dead look alike from outside, so what counts is when
//! the API server last answered the requests by which the knowledge is kept.
//!
//! An answer with status 200 is not enough: an API server that has lost its etcd, or what it remembers of it, grants a
//! watch and then sends an event of type ERROR. A watch counts from its beginning, and only while no error came in it.

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

use crate::{domain::verification::Reason, runtime::clock::Clock};

/// When each kind was last known to be as the cluster has it.
#[derive(Clone, Debug, Default)]
pub struct Freshness {
    keys: Heartbeat,
    catalogs: Heartbeat,
}

/// Where a watch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A list begins, for the first time or again.
    Listing,
    /// It is complete.
    Listed,
    /// Something of a list or a watch came.
    Watching,
}

impl Stage {
    /// The stage that an event tells.
    #[must_use]
    pub const fn of<K>(event: &Event<K>) -> Self {
        match event {
            Event::Init => Self::Listing,
            Event::InitDone => Self::Listed,
            Event::InitApply(_) | Event::Apply(_) | Event::Delete(_) => Self::Watching,
        }
    }
}

/// The life of one watch.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat(Arc<Beat>);

#[derive(Debug, Default)]
struct Beat {
    synced: AtomicBool,
    /// Everything is being listed anew: what is known is as old as it was when that began, until it is complete.
    listing: AtomicBool,
    /// In milliseconds since 1970. By the clock of the wall: a machine that slept must not believe that it is up to
    /// date.
    at: AtomicI64,
    /// When the API server granted the watch that is under way, likewise; 0 if there is none, or an error came in it.
    granted: AtomicI64,
    /// The time that the API server said last, and when it did by a clock that nobody sets.
    server: Mutex<Option<(Timestamp, Instant)>>,
}

/// How long an error has to come at the latest that the API server has for a watch at once. Until then the watch counts for
/// nothing.
const PROBATION: i64 = 2000;

impl Heartbeat {
    /// The API server was heard. A page of a list is no news before the last one is there: what went meanwhile is
    /// known only then.
    pub fn beat(&self, now: Timestamp) {
        if !self.0.listing.load(Ordering::Relaxed) {
            self.0.at.store(now.as_millisecond(), Ordering::Relaxed);
        }
    }

    /// Takes in what an event says of the life of the watch; after what it says of objects.
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

    /// The API server granted a watch. The one before it ended without an error: what is known is at least as new as its
    /// beginning.
    fn granted(&self, now: Timestamp) {
        if self.0.listing.load(Ordering::Relaxed) {
            return;
        }
        let now = now.as_millisecond();
        let before = self.0.granted.swap(now, Ordering::Relaxed);
        // A time that lies ahead is one of a clock that was put right since. It would make what is known new for as long.
        let latest = [self.0.at.load(Ordering::Relaxed), before].into_iter().filter(|at| *at <= now).max();
        self.0.at.store(latest.unwrap_or(now), Ordering::Relaxed);
    }

    /// An error came in a watch that had been granted: it was no news.
    pub fn failed(&self) {
        self.0.granted.store(0, Ordering::Relaxed);
    }

    /// A client whose requests serve one watch. Watches are short (see [`WATCH`]), so that there is one that counts also
    /// where nothing ever changes.
    ///
    /// # Errors
    /// If there is no client for this configuration.
    pub fn client(&self, mut config: Config, clock: Clock) -> Result<Client, kube::Error> {
        // Nothing stays quiet for longer: a watch ends by itself before.
        config.read_timeout = Some(WATCH + Duration::from_secs(10));
        let heartbeat = self.clone();
        let hear = tower::util::MapResponseLayer::new(move |response: Response<_>| {
            if response.status().is_success() {
                heartbeat.granted(clock.exact());
            }
            let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
            if let Some(said) = date.and_then(|date| rfc2822::parse(date).ok()) {
                heartbeat.said(said.timestamp(), Instant::now());
            }
            response
        });
        Ok(ClientBuilder::try_from(config)?.with_layer(&hear).build())
    }

    fn said(&self, time: Timestamp, at: Instant) {
        *self.0.server.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, at));
    }

    /// The time by the clock of the API server, which every replica shares, unlike its own. None if it never said.
    #[must_use]
    pub fn server_time(&self) -> Option<Timestamp> {
        let (said, at) = (*self.0.server.lock().unwrap_or_else(PoisonError::into_inner))?;
        said.checked_add(at.elapsed()).ok()
    }

    /// Whether everything was listed, at least once.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.0.synced.load(Ordering::Acquire)
    }

    fn at(&self, now: Timestamp) -> Option<i64> {
        let (at, granted) = (self.0.at.load(Ordering::Relaxed), self.0.granted.load(Ordering::Relaxed));
        let counts = granted != 0 && now.as_millisecond() - granted >= PROBATION;
        self.is_synced().then(|| if counts { at.max(granted) } else { at })
    }
}

/// How long a watch lasts before the API server ends it and the next one takes over from where it was.
pub const WATCH: Duration = Duration::from_secs(30);

impl Freshness {
    /// The life of the watch of ApiKeys.
    #[must_use]
    pub fn keys(&self) -> &Heartbeat {
        &self.keys
    }

    /// The life of the watch of PermissionCatalogs.
    #[must_use]
    pub fn catalogs(&self) -> &Heartbeat {
        &self.catalogs
    }

    /// How old the knowledge is. None before everything was listed.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Option<Duration> {
        let oldest = self.keys.at(now)?.min(self.catalogs.at(now)?);
        Some(Duration::from_millis(u64::try_from(now.as_millisecond() - oldest).unwrap_or_default()))
    }

    /// Whether the knowledge is good enough to let anybody pass.
    ///
    /// # Errors
    /// Why it is not.
    pub fn check(&self, now: Timestamp, most: Option<Duration>) -> Result<(), Reason> {
        let age = self.age(now).ok_or(Reason::NotSynced)?;
        if most.is_some_and(|most| age > most) { Err(Reason::Stale) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_passes_before_the_first_list_nor_after_too_long_a_silence() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let minute = Some(Duration::from_mins(1));
        let freshness = Freshness::default();
        freshness.keys().heard(Stage::Listing, at(90));
        freshness.keys().heard(Stage::Watching, at(95));
        freshness.keys().heard(Stage::Listed, at(100));
        assert_eq!(freshness.check(at(100), minute), Err(Reason::NotSynced), "catalogues were not listed");
        freshness.catalogs().heard(Stage::Listed, at(110));
        assert_eq!(freshness.check(at(160), minute), Ok(()));
        assert_eq!(freshness.check(at(161), minute), Err(Reason::Stale), "the older of the two counts");
        assert_eq!(freshness.check(at(100_000), None), Ok(()));
        freshness.keys().beat(at(161));
        assert_eq!(freshness.check(at(170), minute), Ok(()));
        // A list that never comes to its end is no news, however often it is begun.
        for second in 171..230 {
            freshness.keys().heard(Stage::Listing, at(second));
            freshness.keys().heard(Stage::Watching, at(second));
            freshness.keys().beat(at(second));
            freshness.catalogs().beat(at(second));
        }
        assert_eq!(freshness.check(at(230), minute), Err(Reason::Stale));
        freshness.keys().heard(Stage::Listed, at(230));
        assert_eq!(freshness.check(at(230), minute), Ok(()));
        // A clock that goes back is no reason to refuse.
        assert_eq!(freshness.age(at(50)), Some(Duration::ZERO));
    }

    #[test]
    fn a_granted_watch_counts_from_its_beginning_and_one_with_an_error_does_not() {
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
        // A quiet cluster: one watch after the other.
        for second in [130, 160, 190] {
            freshness.keys().granted(at(second));
            freshness.catalogs().granted(at(second));
            assert_eq!((age(second + 1), age(second + 2)), (31, 2));
        }
        // Nothing but errors, each after the status 200.
        for second in 191..300 {
            freshness.keys().granted(at(second));
            freshness.keys().failed();
            freshness.catalogs().granted(at(second));
        }
        assert_eq!(age(300), 110, "the watch that began at 190 is the last without an error");
        freshness.keys().heard(Stage::Watching, at(301));
        assert_eq!(age(303), 4);
    }

    #[test]
    fn a_clock_that_was_ahead_does_not_keep_old_knowledge_new() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let freshness = Freshness::default();
        for heartbeat in [freshness.keys(), freshness.catalogs()] {
            heartbeat.heard(Stage::Listed, at(9000));
            heartbeat.granted(at(9001));
            // It is put right.
            heartbeat.granted(at(100));
            heartbeat.granted(at(130));
        }
        assert_eq!(freshness.age(at(230)).unwrap().as_secs(), 100);
    }

    #[test]
    fn the_time_of_the_api_server_goes_on_by_itself() {
        let heartbeat = Heartbeat::default();
        assert_eq!(heartbeat.server_time(), None);
        let date = rfc2822::parse("Wed, 25 Nov 2026 13:20:22 GMT").unwrap().timestamp();
        heartbeat.said(date, Instant::now().checked_sub(Duration::from_secs(5)).unwrap());
        assert_eq!(heartbeat.server_time().unwrap().as_second(), date.as_second() + 5);
    }
}
