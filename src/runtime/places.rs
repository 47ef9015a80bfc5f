//! Places for connections. When all are taken, the connection that has waited for its peer the longest is closed for the
//! one that comes.
//!
//! A connection waits for its peer before its first request, between requests, and while the body of a request does not
//! arrive. It is at work while an answer is being made, and is not closed then. So a peer that holds connections open, or
//! trickles heads or bodies, does not keep others out: a kubelet, an API server or a proxy sends its request at once.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
};

use futures::task::AtomicWaker;
use tokio::time::Instant;

/// How many connections a listener has at a time. If all of them are at work, a further one is rejected at once, so that a
/// proxy can ask another replica.
pub struct Places {
    all: usize,
    begin: Instant,
    seats: Mutex<Seats>,
    turned_away: AtomicU64,
    closed_idle: AtomicU64,
}

#[derive(Default)]
struct Seats {
    next: u64,
    taken: HashMap<u64, Arc<Seat>>,
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} places", self.taken(), self.all)
    }
}

/// Every place is taken by a connection that is at work.
#[derive(Debug, thiserror::Error)]
#[error("as many connections are at work as may be open")]
pub struct Full;

impl Places {
    /// Places for so many connections.
    #[must_use]
    pub fn new(all: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            begin: Instant::now(),
            seats: Mutex::default(),
            turned_away: AtomicU64::new(0),
            closed_idle: AtomicU64::new(0),
        })
    }

    /// How many connections there are.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.seats().taken.len()
    }

    /// How many connections were rejected, since all others were at work.
    #[must_use]
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }

    /// How many connections that waited for their peer were closed, since another came.
    #[must_use]
    pub fn closed_idle(&self) -> u64 {
        self.closed_idle.load(Ordering::Relaxed)
    }

    /// Takes a place, if need be from the connection that has waited the longest.
    pub(super) fn take(self: &Arc<Self>) -> Result<Place, Full> {
        let mut seats = self.seats();
        while seats.taken.len() >= self.all {
            let waiting = seats.taken.iter().filter_map(|(id, seat)| Some((seat.waits_since()?, *id)));
            let Some((_, longest)) = waiting.min() else {
                drop(seats);
                log_rarely(&self.turned_away, self.all, "connections are rejected: all others are at work");
                return Err(Full);
            };
            // Otherwise it has begun to work since.
            if seats.taken.get(&longest).is_some_and(|seat| seat.give_up()) {
                seats.taken.remove(&longest);
                log_rarely(&self.closed_idle, self.all, "idle connections are closed to make room for others");
            }
        }
        let id = seats.next;
        seats.next += 1;
        let seat = Arc::new(Seat::new(self.begin));
        seats.taken.insert(id, Arc::clone(&seat));
        Ok(Place { id, seat, places: Arc::clone(self) })
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts, and logs at 1, 2, 4, 8 and so on: a flood of connections is no flood of lines.
fn log_rarely(counter: &AtomicU64, places: usize, message: &str) {
    let count = counter.fetch_add(1, Ordering::Relaxed) + 1;
    if count.is_power_of_two() {
        tracing::warn!(places, count, "{message}");
    }
}

/// The place of one connection, for as long as it is open.
pub(super) struct Place {
    id: u64,
    seat: Arc<Seat>,
    places: Arc<Places>,
}

impl Place {
    pub(super) fn seat(&self) -> &Arc<Seat> {
        &self.seat
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.seats().taken.remove(&self.id);
    }
}

/// Whether one connection is at work or waits for its peer, and whether it must close.
pub struct Seat {
    begin: Instant,
    /// How many of its requests are at work; [`GONE`] once the place is another's.
    at_work: AtomicUsize,
    /// Since when it waits, in microseconds since `begin`, if it waits.
    since: AtomicU64,
    /// The task of the connection.
    task: AtomicWaker,
}

/// The bit that says that the connection must close.
const GONE: usize = 1 << (usize::BITS - 1);

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("waits_since", &self.waits_since()).field("gone", &self.is_gone()).finish()
    }
}

impl Seat {
    fn new(begin: Instant) -> Self {
        let seat = Self { begin, at_work: AtomicUsize::new(0), since: AtomicU64::new(0), task: AtomicWaker::new() };
        seat.wait();
        seat
    }

    fn wait(&self) {
        let since = u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.since.store(since, Ordering::Relaxed);
    }

    /// Since when the connection waits for its peer; none if it is at work.
    fn waits_since(&self) -> Option<u64> {
        (self.at_work.load(Ordering::Acquire) == 0).then(|| self.since.load(Ordering::Relaxed))
    }

    /// A request is at work for as long as the answer is held.
    #[must_use]
    pub(super) fn work(self: &Arc<Self>) -> Working {
        self.at_work.fetch_add(1, Ordering::AcqRel);
        Working(Arc::clone(self))
    }

    /// Closes the connection, unless it is at work.
    fn give_up(&self) -> bool {
        let gone = self.at_work.compare_exchange(0, GONE, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if gone {
            self.task.wake();
        }
        gone
    }

    /// Whether the connection must close.
    pub(super) fn is_gone(&self) -> bool {
        self.at_work.load(Ordering::Acquire) & GONE != 0
    }

    /// Whether the connection must close; if not, `task` is woken when it must.
    pub(super) fn is_gone_or_wakes(&self, task: &Waker) -> bool {
        self.task.register(task);
        self.is_gone()
    }
}

/// Held while a request is at work.
#[derive(Debug)]
pub(super) struct Working(Arc<Seat>);

impl Drop for Working {
    fn drop(&mut self) {
        // First: as soon as nothing is at work, it counts.
        self.0.wait();
        self.0.at_work.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_waits_the_longest_makes_room() {
        let places = Places::new(3);
        let mut open = vec![];
        for _ in 0..3 {
            open.push(places.take().unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        // The first has answered a request since, so that the second has waited the longest.
        drop(open[0].seat().work());
        tokio::time::advance(Duration::from_secs(1)).await;
        let newest = places.take().unwrap();
        let gone = |open: &[Place]| open.iter().map(|place| place.seat().is_gone()).collect::<Vec<_>>();
        assert_eq!(gone(&open), [false, true, false]);
        assert!(!newest.seat().is_gone());
        assert_eq!((places.taken(), places.closed_idle(), places.turned_away()), (3, 1, 0));
        // The place of a connection that ends later is not given back a second time.
        drop(open.remove(1));
        assert_eq!(places.taken(), 3);
        let _next = places.take().unwrap();
        assert_eq!(gone(&open), [false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_at_work_is_never_closed() {
        let places = Places::new(2);
        let (busy, other) = (places.take().unwrap(), places.take().unwrap());
        let (first, second) = (busy.seat().work(), busy.seat().work());
        let newer = places.take().unwrap();
        assert!(other.seat().is_gone() && !busy.seat().is_gone());
        drop(first);
        let _work = newer.seat().work();
        assert!(places.take().is_err(), "one of two requests is still at work");
        assert_eq!(places.turned_away(), 1);
        drop(second);
        places.take().unwrap();
        assert!(busy.seat().is_gone() && !newer.seat().is_gone());
    }
}
