//! The door of the webhook: what anyone who reaches it can take of the process and of the API server.
//!
//! Without a client certificate (`--webhook-client-ca`) the API server looks like everybody else here, and made-up reviews
//! cost as much as real ones. So bodies have a deadline and a budget ([`Bodies`]), few reviews are under way at a time, and
//! few wait; of one address half as many. Further ones are refused at once, with `Retry-After`: the API server tries again
//! by itself, as long as the request that it reviews has time.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use kube::core::Status;
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::runtime::{
    listener::{Bodies, PATIENCE, Unread},
    metrics::Metrics,
};

/// Two objects of the largest size that etcd stores.
const LARGEST_BODY: usize = 4 << 20;

/// For bodies, over all connections: four of the largest, thousands of the usual.
const BODIES: usize = 16 << 20;

/// For reviews that are under way, in KiB: what their objects take in memory.
const WORK: usize = 64 << 10;

/// What the smallest review counts for, in KiB; so no more than 32 are under way.
const LEAST: usize = 2 << 10;

/// What a value in JSON takes in memory at most, in bytes, however short its text. `[],[],[]` becomes 40 times as large
/// when it is read.
const VALUE: usize = 128;

/// How many reviews of one address are under way, so that others are not kept out.
const UNDER_WAY_OF_ONE: usize = 16;

/// How many reviews of one address are under way or wait. An API server has no more than 200 changes under way by default
/// (`--max-mutating-requests-inflight`).
const MOST_OF_ONE: usize = 256;

/// How many of all addresses.
const MOST: usize = 512;

/// How long a review waits for others to end. The API server waits for 5 s by default (`webhook.timeoutSeconds`).
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// Bounds reviews.
pub(super) struct Door {
    bodies: Arc<Bodies>,
    work: Arc<Semaphore>,
    present: Mutex<Present>,
    metrics: Metrics,
}

/// The reviews that are under way or wait.
#[derive(Default)]
struct Present {
    all: usize,
    of: HashMap<Option<IpAddr>, Peer>,
}

/// Those of one address.
struct Peer {
    present: usize,
    under_way: Arc<Semaphore>,
}

/// Why a review is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("keywright webhook: {0}")]
    Unread(#[from] Unread),
    #[error("keywright webhook: the review has too many values for its size")]
    TooComplex,
    #[error("keywright webhook: too many reviews are under way; try again")]
    Busy,
    #[error("keywright webhook: the review took more than {}s; try again", PATIENCE.as_secs())]
    Slow,
}

impl Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::Unread(unread) => unread.name(),
            Self::TooComplex => "TooComplex",
            Self::Busy => "Busy",
            Self::Slow => "Slow",
        }
    }

    /// As a Status, which the API server passes on to whoever made the request.
    fn answer(&self) -> Response {
        let code = match self {
            Self::Unread(unread) => unread.status(),
            Self::TooComplex => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy | Self::Slow => StatusCode::SERVICE_UNAVAILABLE,
        };
        let status = Status::failure(&self.to_string(), "ServiceUnavailable").with_code(code.as_u16());
        let mut answer = (code, Json(status)).into_response();
        if code == StatusCode::SERVICE_UNAVAILABLE {
            answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }
}

impl Door {
    pub(super) fn new(metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            bodies: Bodies::new(BODIES),
            work: Arc::new(Semaphore::new(WORK)),
            present: Mutex::default(),
            metrics,
        })
    }

    /// Lets a review through, with its whole body. A GET has none that anybody reads.
    pub(super) async fn enter(State(door): State<Arc<Self>>, request: Request, next: Next) -> Response {
        if request.method() == Method::GET {
            return next.run(request).await;
        }
        match door.review(request, next).await {
            Ok(response) => response,
            Err(refusal) => {
                door.metrics.turned_away(refusal.reason());
                refusal.answer()
            }
        }
    }

    async fn review(&self, request: Request, next: Next) -> Result<Response, Refusal> {
        let (head, body) = self.bodies.receive(request, LARGEST_BODY).await?;
        let _place = self.place(body.peer, weight(&body.bytes)).await?;
        let request = Request::from_parts(head, Body::from(body.bytes.clone()));
        // What waits for the API server's answers too long would be too late for its question.
        timeout(PATIENCE, next.run(request)).await.map_err(|_| Refusal::Slow)
    }

    /// A place among the reviews under way, for `weight` KiB.
    async fn place(&self, peer: Option<IpAddr>, weight: usize) -> Result<Place<'_>, Refusal> {
        let weight = u32::try_from(weight).ok().filter(|_| weight <= WORK).ok_or(Refusal::TooComplex)?;
        let visit = self.visit(peer).ok_or(Refusal::Busy)?;
        let acquire = async {
            let of_one = Arc::clone(&visit.under_way).acquire_owned().await?;
            Ok::<_, AcquireError>((of_one, Arc::clone(&self.work).acquire_many_owned(weight).await?))
        };
        match timeout(LONGEST_WAIT, acquire).await {
            Ok(Ok(permits)) => Ok(Place { _permits: permits, _visit: visit }),
            _ => Err(Refusal::Busy),
        }
    }

    /// Counts a review of an address, if there are not too many.
    fn visit(&self, peer: Option<IpAddr>) -> Option<Visit<'_>> {
        let mut present = self.present();
        if present.all >= MOST || present.of.get(&peer).is_some_and(|peer| peer.present >= MOST_OF_ONE) {
            return None;
        }
        present.all += 1;
        let of_one = present
            .of
            .entry(peer)
            .or_insert_with(|| Peer { present: 0, under_way: Arc::new(Semaphore::new(UNDER_WAY_OF_ONE)) });
        of_one.present += 1;
        Some(Visit { door: self, peer, under_way: Arc::clone(&of_one.under_way) })
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a review is under way.
struct Place<'a> {
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    _visit: Visit<'a>,
}

/// Held while a review is under way or waits.
struct Visit<'a> {
    door: &'a Door,
    peer: Option<IpAddr>,
    under_way: Arc<Semaphore>,
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut present = self.door.present();
        present.all -= 1;
        if let Some(of_one) = present.of.get_mut(&self.peer) {
            of_one.present -= 1;
            if of_one.present == 0 {
                present.of.remove(&self.peer);
            }
        }
    }
}

/// What a body takes in memory when it is read, in KiB. Counts what begins or follows a value, also inside of texts, which
/// is more than there are.
fn weight(body: &[u8]) -> usize {
    let values = body.iter().filter(|byte| matches!(byte, b'[' | b'{' | b',')).count();
    ((body.len() + values * VALUE) >> 10).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_weighs_what_its_values_take() {
        let usual = br#"{"request":{"uid":"1","object":{"spec":{"type":"Team","presets":["Alerts"]}}}}"#;
        assert_eq!(weight(usual), LEAST);
        let texts = vec![b'a'; LARGEST_BODY];
        assert_eq!(weight(&texts), LARGEST_BODY >> 10);
        let nothings = b"[],".repeat(LARGEST_BODY / 3);
        assert!(weight(&nothings) > WORK, "{}", weight(&nothings));
        assert_eq!(WORK / LEAST, 32);
    }

    fn door() -> Arc<Door> {
        let keys = kube::runtime::reflector::store::Writer::default().as_reader();
        let clock = crate::runtime::clock::Clock::system();
        Door::new(Metrics::new(keys, clock, || 0, || (None, None)))
    }

    const ADDRESSES: [Option<IpAddr>; 3] = [
        Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1))),
        Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2))),
        None,
    ];

    /// As many reviews that last, one after another.
    async fn enter(door: &'static Door, peer: Option<IpAddr>, count: usize) -> Vec<Place<'static>> {
        let mut places = vec![];
        for _ in 0..count {
            places.push(door.place(peer, LEAST).await.unwrap());
        }
        places
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_reviews_are_under_way_so_many_wait_and_further_ones_are_refused_at_once() {
        let door: &'static Door = Box::leak(Box::new(Arc::into_inner(door()).unwrap()));
        let [one, other, third] = ADDRESSES;
        let mut under_way = enter(door, one, UNDER_WAY_OF_ONE).await;
        let mut waiting = vec![];
        for _ in UNDER_WAY_OF_ONE..MOST_OF_ONE {
            waiting.push(tokio::spawn(door.place(one, LEAST)));
        }
        // All of them, since this time passes only when nobody has anything to do.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begin = tokio::time::Instant::now();
        assert!(matches!(door.place(one, LEAST).await, Err(Refusal::Busy)));
        // Another address is not kept out by that one.
        let others = enter(door, other, UNDER_WAY_OF_ONE).await;
        assert!(begin.elapsed().is_zero());
        assert!(matches!(door.place(third, LEAST).await, Err(Refusal::Busy)), "there is a bound for all");
        assert_eq!(begin.elapsed(), LONGEST_WAIT);
        for waiting in waiting {
            assert!(matches!(waiting.await.unwrap(), Err(Refusal::Busy)));
        }
        // One that ends lets one in.
        under_way.pop();
        under_way.push(door.place(one, LEAST).await.unwrap());
        drop((under_way, others));
        assert!(matches!(door.place(one, WORK + 1).await, Err(Refusal::TooComplex)));
        drop(door.place(one, WORK).await.unwrap());
        assert!(door.present().all == 0 && door.present().of.is_empty(), "nobody is remembered");
    }

    #[test]
    fn a_refusal_is_a_status_that_says_when_to_come_again() {
        for (refusal, code, again) in [
            (Refusal::Busy, 503, true),
            (Refusal::Slow, 503, true),
            (Refusal::Unread(Unread::NoRoom), 503, true),
            (Refusal::Unread(Unread::Late), 408, false),
            (Refusal::TooComplex, 413, false),
        ] {
            let answer = refusal.answer();
            assert_eq!((answer.status().as_u16(), answer.headers().contains_key(header::RETRY_AFTER)), (code, again));
        }
    }
}
