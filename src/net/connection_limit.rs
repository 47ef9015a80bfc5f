//! A limit on the connections of a listener. At the limit, a new connection replaces an idle one: the longest idle
//! connection of the peer with the most connections. One address thus cannot displace the connections of others,
//! however many it opens.
//!
//! A connection is idle before its first request, between requests, and while the body of a request is incomplete. It
//! is active while a response is computed, and is never closed then. A peer that holds connections open, or sends heads
//! or bodies slowly, does not block others, since a kubelet, an API server or a proxy sends its request at once.

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

/// The connections of a listener and their maximum number. If all are active, further connections are rejected at once,
/// so that a proxy can fail over to another replica.
pub struct ConnectionLimit {
    max: usize,
    epoch: Instant,
    connections: Mutex<OpenConnections>,
    rejected: AtomicU64,
    closed_idle: AtomicU64,
}

#[derive(Default)]
struct OpenConnections {
    next_id: u64,
    guards: HashMap<u64, Arc<ConnectionGuard>>,
}

impl fmt::Debug for ConnectionLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} connections", self.open(), self.max)
    }
}

/// The maximum number of connections is open, and all are active.
#[derive(Debug, thiserror::Error)]
#[error("the maximum number of connections is open, and none is idle")]
pub struct LimitReached;

impl ConnectionLimit {
    /// Allows `max` connections.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            epoch: Instant::now(),
            connections: Mutex::default(),
            rejected: AtomicU64::new(0),
            closed_idle: AtomicU64::new(0),
        })
    }

    /// The number of open connections.
    #[must_use]
    pub fn open(&self) -> usize {
        self.connections().guards.len()
    }

    /// The number of connections that were rejected because all others were active.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// The number of idle connections that were closed for new ones.
    #[must_use]
    pub fn closed_idle(&self) -> u64 {
        self.closed_idle.load(Ordering::Relaxed)
    }

    /// Returns a permit for a connection of `peer`. At the limit, closes an idle connection for it.
    pub(super) fn acquire(self: &Arc<Self>, peer: IpAddr) -> Result<ConnectionPermit, LimitReached> {
        let peer = peer.to_canonical();
        let mut open = self.connections();
        while open.guards.len() >= self.max {
            let mut counts = HashMap::from([(peer, 1_usize)]);
            open.guards.values().for_each(|guard| *counts.entry(guard.peer).or_default() += 1);
            let count = |guard: &ConnectionGuard| counts.get(&guard.peer).copied();
            let idle =
                open.guards.iter().filter_map(|(id, guard)| Some((count(guard), Reverse(guard.idle_since()?), *id)));
            let Some((_, _, longest)) = idle.max() else {
                drop(open);
                log_rarely(&self.rejected, self.max, "connections are rejected: the limit is reached and none is idle");
                return Err(LimitReached);
            };
            // If this fails, the connection has become active, and the loop selects another one.
            if open.guards.get(&longest).is_some_and(|guard| guard.close_if_idle()) {
                open.guards.remove(&longest);
                log_rarely(
                    &self.closed_idle,
                    self.max,
                    "idle connections are closed for new ones: the limit is reached",
                );
            }
        }
        let id = open.next_id;
        open.next_id += 1;
        let guard = Arc::new(ConnectionGuard::new(peer, self.epoch));
        open.guards.insert(id, Arc::clone(&guard));
        Ok(ConnectionPermit { id, guard, limit: Arc::clone(self) })
    }

    fn connections(&self) -> MutexGuard<'_, OpenConnections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Increments a counter, and logs when it reaches a power of two, so that many connections cause few log lines.
fn log_rarely(counter: &AtomicU64, limit: usize, message: &str) {
    let count = counter.fetch_add(1, Ordering::Relaxed) + 1;
    if count.is_power_of_two() {
        tracing::warn!(limit, count, "{message}");
    }
}

/// The permit of an open connection. Its drop allows another connection.
pub(super) struct ConnectionPermit {
    id: u64,
    guard: Arc<ConnectionGuard>,
    limit: Arc<ConnectionLimit>,
}

impl ConnectionPermit {
    pub(super) fn guard(&self) -> &Arc<ConnectionGuard> {
        &self.guard
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.limit.connections().guards.remove(&self.id);
    }
}

/// The state of one connection: active or idle, and whether it must close.
pub struct ConnectionGuard {
    peer: IpAddr,
    epoch: Instant,
    /// The number of active requests, or [`CLOSING`].
    active: AtomicUsize,
    /// The start of the idle time, in microseconds since `epoch`.
    idle_since: AtomicU64,
    /// The task of the connection.
    task: AtomicWaker,
}

/// The bit of a connection that must close.
const CLOSING: usize = 1 << (usize::BITS - 1);

impl fmt::Debug for ConnectionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionGuard")
            .field("idle_since", &self.idle_since())
            .field("must_close", &self.must_close())
            .finish()
    }
}

impl ConnectionGuard {
    fn new(peer: IpAddr, epoch: Instant) -> Self {
        let (active, idle_since) = (AtomicUsize::new(0), AtomicU64::new(0));
        let guard = Self { peer, epoch, active, idle_since, task: AtomicWaker::new() };
        guard.mark_idle();
        guard
    }

    /// The address of the peer.
    pub(super) fn peer(&self) -> IpAddr {
        self.peer
    }

    fn mark_idle(&self) {
        let since = u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.idle_since.store(since, Ordering::Relaxed);
    }

    /// The start of the idle time. `None` if the connection is active.
    fn idle_since(&self) -> Option<u64> {
        (self.active.load(Ordering::Acquire) == 0).then(|| self.idle_since.load(Ordering::Relaxed))
    }

    /// Marks a request as active until the guard is dropped.
    #[must_use]
    pub(super) fn active_request(self: &Arc<Self>) -> RequestGuard {
        self.active.fetch_add(1, Ordering::AcqRel);
        RequestGuard { guard: Arc::clone(self), count: 1 }
    }

    /// Leaves the connection idle while the body of a request is incomplete. The drop of the guard restarts the idle
    /// time.
    #[must_use]
    pub(super) fn waiting_request(self: &Arc<Self>) -> RequestGuard {
        RequestGuard { guard: Arc::clone(self), count: 0 }
    }

    /// Closes the connection unless it is active. Returns whether it closes.
    fn close_if_idle(&self) -> bool {
        let closes = self.active.compare_exchange(0, CLOSING, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if closes {
            self.task.wake();
        }
        closes
    }

    /// Whether the connection must close.
    pub(super) fn must_close(&self) -> bool {
        self.active.load(Ordering::Acquire) & CLOSING != 0
    }

    /// Whether the connection must close. If not, `task` is woken when it must.
    pub(super) fn must_close_or_wakes(&self, task: &Waker) -> bool {
        self.task.register(task);
        self.must_close()
    }
}

/// Held until the response to a request is complete. Its drop starts the idle time.
#[derive(Debug)]
pub(super) struct RequestGuard {
    guard: Arc<ConnectionGuard>,
    /// The number of active requests that this guard counts for: one or none.
    count: usize,
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        // Before the decrement, since the idle time counts as soon as no request is active.
        self.guard.mark_idle();
        self.guard.active.fetch_sub(self.count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_the_peer_with_the_most_connections_loses_one() {
        let limit = ConnectionLimit::new(4);
        let (api_server, attacker) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut first = vec![];
        for peer in [api_server, api_server, attacker, attacker] {
            first.push(limit.acquire(peer).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let flood: Vec<_> = (0..100).map(|_| limit.acquire(attacker).unwrap()).collect();
        assert!(
            !first[0].guard().must_close() && !first[1].guard().must_close(),
            "the API server keeps its connections"
        );
        assert!(first[2].guard().must_close() && first[3].guard().must_close());
        // The connections of the API server have been idle longer than those of the attacker.
        let kubelet = limit.acquire(IpAddr::from([10, 0, 0, 3])).unwrap();
        let left: Vec<_> = flood.iter().filter(|permit| !permit.guard().must_close()).collect();
        let closed = (left.len(), first[0].guard().must_close());
        assert_eq!(closed, (2, true), "both peers have two connections, and the longest idle one closes");
        assert!(!kubelet.guard().must_close());
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_the_longest_idle_connection_closes() {
        let limit = ConnectionLimit::new(3);
        let mut open = vec![];
        for _ in 0..3 {
            open.push(limit.acquire(HERE).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        // The first has handled a request since, so the second has been idle longest.
        drop(open[0].guard().active_request());
        tokio::time::advance(Duration::from_secs(1)).await;
        let newest = limit.acquire(HERE).unwrap();
        let closing =
            |open: &[ConnectionPermit]| open.iter().map(|permit| permit.guard().must_close()).collect::<Vec<_>>();
        assert_eq!(closing(&open), [false, true, false]);
        assert!(!newest.guard().must_close());
        assert_eq!((limit.open(), limit.closed_idle(), limit.rejected()), (3, 1, 0));
        // The end of a closed connection does not release its permit a second time.
        drop(open.remove(1));
        assert_eq!(limit.open(), 3);
        let _next = limit.acquire(HERE).unwrap();
        assert_eq!(closing(&open), [false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_active_connection_is_never_closed() {
        let limit = ConnectionLimit::new(2);
        let (busy, other) = (limit.acquire(HERE).unwrap(), limit.acquire(HERE).unwrap());
        let (first, second) = (busy.guard().active_request(), busy.guard().active_request());
        let newer = limit.acquire(HERE).unwrap();
        assert!(other.guard().must_close() && !busy.guard().must_close());
        drop(first);
        let _work = newer.guard().active_request();
        assert!(limit.acquire(HERE).is_err(), "one of two requests is still active");
        assert_eq!(limit.rejected(), 1);
        drop(second);
        limit.acquire(HERE).unwrap();
        assert!(busy.guard().must_close() && !newer.guard().must_close());
    }
}
