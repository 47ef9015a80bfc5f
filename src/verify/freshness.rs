//! How old the knowledge is. A watch that is quiet and one that is dead look alike from outside, so what counts is when
//! the API server last answered the requests by which the knowledge is kept.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use http::Response;
use jiff::Timestamp;
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
}

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
            Stage::Listing => self.0.listing.store(true, Ordering::Relaxed),
            Stage::Listed => {
                self.0.listing.store(false, Ordering::Relaxed);
                self.beat(now);
                self.0.synced.store(true, Ordering::Release);
            }
            Stage::Watching => self.beat(now),
        }
    }

    /// A client whose requests serve one watch: each answer of the API server is a beat. Watches are short (see
    /// [`WATCH`]), so that there is a beat also where nothing ever changes.
    ///
    /// # Errors
    /// If there is no client for this configuration.
    pub fn client(&self, mut config: Config, clock: Clock) -> Result<Client, kube::Error> {
        // Nothing stays quiet for longer: a watch ends by itself before.
        config.read_timeout = Some(WATCH + Duration::from_secs(10));
        let heartbeat = self.clone();
        let beat = tower::util::MapResponseLayer::new(move |response: Response<_>| {
            if response.status().is_success() {
                heartbeat.beat(clock.exact());
            }
            response
        });
        Ok(ClientBuilder::try_from(config)?.with_layer(&beat).build())
    }

    fn at(&self) -> Option<i64> {
        self.0.synced.load(Ordering::Acquire).then(|| self.0.at.load(Ordering::Relaxed))
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
        let oldest = self.keys.at()?.min(self.catalogs.at()?);
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
}
