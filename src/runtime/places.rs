//! Places for connections. When all are taken, the peer with the most of them makes room for the connection that comes: the
//! one of its connections is closed that was idle the longest. So one address can't take the places of others, however many
//! connections it opens.
//!
//! A connection waits for its peer before its first request, between requests, and while the body of a request does not
//! arrive. It is at work while an answer is being made, and is not closed then. So a peer that holds connections open, or
//! trickles heads or bodies, does not keep others out: a kubelet, an API server or a proxy sends its request at once.

use std::{
    cmp::Reverse,
    collections::HashMap,
    fmt,
    net::IpAddr,
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

    /// Takes a place for a connection of `peer`, if need be from another.
    pub(super) fn take(self: &Arc<Self>, peer: IpAddr) -> Result<Place, Full> {
        let peer = peer.to_canonical();
        let mut seats = self.seats();
        while seats.taken.len() >= self.all {
            let mut held = HashMap::from([(peer, 1_usize)]);
            seats.taken.values().for_each(|seat| *held.entry(seat.peer).or_default() += 1);
            let of_peer = |seat: &Seat| held.get(&seat.peer).copied();
            let waiting =
                seats.taken.iter().filter_map(|(id, seat)| Some((of_peer(seat), Reverse(seat.waits_since()?), *id)));
            let Some((_, _, longest)) = waiting.max() else {
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
        let seat = Arc::new(Seat::new(peer, self.begin));
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
    peer: IpAddr,
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
    fn new(peer: IpAddr, begin: Instant) -> Self {
        let (at_work, since) = (AtomicUsize::new(0), AtomicU64::new(0));
        let seat = Self { peer, begin, at_work, since, task: AtomicWaker::new() };
        seat.wait();
        seat
    }

    /// The address at the other end.
    pub(super) fn peer(&self) -> IpAddr {
        self.peer
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
        Working { seat: Arc::clone(self), count: 1 }
    }

    /// A request waits for its body, or does not need it. When the answer is dropped, it was made.
    #[must_use]
    pub(super) fn expect(self: &Arc<Self>) -> Working {
        Working { seat: Arc::clone(self), count: 0 }
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

/// Held until a request is answered. From then on the connection waits for the next.
#[derive(Debug)]
pub(super) struct Working {
    seat: Arc<Seat>,
    /// How many requests this counts as at work: one or none.
    count: usize,
}

impl Drop for Working {
    fn drop(&mut self) {
        // First: as soon as nothing is at work, it counts.
        self.seat.wait();
        self.seat.at_work.fetch_sub(self.count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn the_peer_with_the_most_connections_makes_room() {
        let places = Places::new(4);
        let (api_server, attacker) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut first = vec![];
        for peer in [api_server, api_server, attacker, attacker] {
            first.push(places.take(peer).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let flood: Vec<_> = (0..100).map(|_| places.take(attacker).unwrap()).collect();
        assert!(!first[0].seat().is_gone() && !first[1].seat().is_gone(), "another took their places");
        assert!(first[2].seat().is_gone() && first[3].seat().is_gone());
        // The kubelet comes, and the first two have been idle for longer than any of the flood.
        let kubelet = places.take(IpAddr::from([10, 0, 0, 3])).unwrap();
        let left: Vec<_> = flood.iter().filter(|place| !place.seat().is_gone()).collect();
        assert_eq!((left.len(), first[0].seat().is_gone()), (2, true), "two each: the longest idle of them goes");
        assert!(!kubelet.seat().is_gone());
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_waits_the_longest_makes_room() {
        let places = Places::new(3);
        let mut open = vec![];
        for _ in 0..3 {
            open.push(places.take(HERE).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        // The first has answered a request since, so that the second has waited the longest.
        drop(open[0].seat().work());
        tokio::time::advance(Duration::from_secs(1)).await;
        let newest = places.take(HERE).unwrap();
        let gone = |open: &[Place]| open.iter().map(|place| place.seat().is_gone()).collect::<Vec<_>>();
        assert_eq!(gone(&open), [false, true, false]);
        assert!(!newest.seat().is_gone());
        assert_eq!((places.taken(), places.closed_idle(), places.turned_away()), (3, 1, 0));
        // The place of a connection that ends later is not given back a second time.
        drop(open.remove(1));
        assert_eq!(places.taken(), 3);
        let _next = places.take(HERE).unwrap();
        assert_eq!(gone(&open), [false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_at_work_is_never_closed() {
        let places = Places::new(2);
        let (busy, other) = (places.take(HERE).unwrap(), places.take(HERE).unwrap());
        let (first, second) = (busy.seat().work(), busy.seat().work());
        let newer = places.take(HERE).unwrap();
        assert!(other.seat().is_gone() && !busy.seat().is_gone());
        drop(first);
        let _work = newer.seat().work();
        assert!(places.take(HERE).is_err(), "one of two requests is still at work");
        assert_eq!(places.turned_away(), 1);
        drop(second);
        places.take(HERE).unwrap();
        assert!(busy.seat().is_gone() && !newer.seat().is_gone());
    }
}
