//! Limits on the reviews of the webhook.
//!
//! Without client certificates (`--webhook-client-ca`) the webhook cannot distinguish the API server from other
//! clients, and forged reviews cost as much as real ones. Therefore bodies have a deadline and a memory budget
//! ([`Bodies`]), and the numbers of active and waiting reviews are limited, in total and to half of that for one
//! address. Further reviews are rejected at once with `Retry-After`, and the API server retries until the time-out of
//! the webhook.

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

use crate::{
    net::listener::{Bodies, REQUEST_TIMEOUT, Unread},
    telemetry::metrics::Metrics,
};

/// Two objects of the maximum size in etcd.
const MAX_BODY_BYTES: usize = 4 << 20;

/// The budget for bodies: four of the maximum size, thousands of the usual size.
const BODY_BUDGET: usize = 16 << 20;

/// The memory budget for the objects of active reviews, in KiB.
const REVIEW_BUDGET: usize = 64 << 10;

/// The minimum weight of a review, in KiB, so that at most 32 reviews are active.
const MIN_WEIGHT: usize = 2 << 10;

/// The maximum memory of a parsed JSON value beyond its text, in bytes. `[],[],[]` takes 40 times the size of its text.
const BYTES_PER_VALUE: usize = 128;

/// The maximum number of active reviews of one address.
const MAX_ACTIVE_PER_PEER: usize = 16;

/// The maximum number of active and waiting reviews of one address. An API server has at most 200 mutating requests in
/// flight by default (`--max-mutating-requests-inflight`).
const MAX_PER_PEER: usize = 256;

/// The maximum number of active and waiting reviews of all addresses.
const MAX_REVIEWS: usize = 512;

/// The maximum time for which a review waits. The time-out of the API server is 5 s by default
/// (`webhook.timeoutSeconds`).
const MAX_WAIT: Duration = Duration::from_secs(3);

/// Limits reviews.
pub(super) struct Intake {
    bodies: Arc<Bodies>,
    budget: Arc<Semaphore>,
    open_reviews: Mutex<OpenReviews>,
    metrics: Metrics,
}

/// The active and waiting reviews.
#[derive(Default)]
struct OpenReviews {
    total: usize,
    by_peer: HashMap<Option<IpAddr>, PeerUsage>,
}

/// The reviews of one address.
struct PeerUsage {
    open: usize,
    active: Arc<Semaphore>,
}

/// The reason for the rejection of a review.
#[derive(Debug, thiserror::Error)]
enum IntakeError {
    #[error("keywright webhook: {0}")]
    Unread(#[from] Unread),
    #[error("keywright webhook: the review has too many values for its size")]
    TooComplex,
    #[error("keywright webhook: too many reviews are in progress; try again")]
    Busy,
    #[error("keywright webhook: the review took more than {}s; try again", REQUEST_TIMEOUT.as_secs())]
    Slow,
}

impl IntakeError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Unread(unread) => unread.name(),
            Self::TooComplex => "TooComplex",
            Self::Busy => "Busy",
            Self::Slow => "Slow",
        }
    }

    /// The response with a Status, which the API server returns to the client of the reviewed request.
    fn response(&self) -> Response {
        let code = match self {
            Self::Unread(unread) => unread.status(),
            Self::TooComplex => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy | Self::Slow => StatusCode::SERVICE_UNAVAILABLE,
        };
        let status = Status::failure(&self.to_string(), "ServiceUnavailable").with_code(code.as_u16());
        let mut response = (code, Json(status)).into_response();
        if code == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl Intake {
    pub(super) fn new(metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            bodies: Bodies::new(BODY_BUDGET),
            budget: Arc::new(Semaphore::new(REVIEW_BUDGET)),
            open_reviews: Mutex::default(),
            metrics,
        })
    }

    /// Passes a review with its complete body to the next service, within the limits. The body of a GET is ignored.
    pub(super) async fn enter(State(intake): State<Arc<Self>>, request: Request, next: Next) -> Response {
        if request.method() == Method::GET {
            return next.run(request).await;
        }
        match intake.review(request, next).await {
            Ok(response) => response,
            Err(error) => {
                intake.metrics.turned_away(error.reason());
                error.response()
            }
        }
    }

    async fn review(&self, request: Request, next: Next) -> Result<Response, IntakeError> {
        let (head, body) = self.bodies.receive(request, MAX_BODY_BYTES).await?;
        let _permit = self.admit(body.peer, weight(&body.bytes)).await?;
        let request = Request::from_parts(head, Body::from(body.bytes.clone()));
        // A later response would exceed the default time-out of the API server.
        timeout(REQUEST_TIMEOUT, next.run(request)).await.map_err(|_| IntakeError::Slow)
    }

    /// Waits for a permit for a review of `weight` KiB.
    async fn admit(&self, peer: Option<IpAddr>, weight: usize) -> Result<ReviewPermit<'_>, IntakeError> {
        let weight = u32::try_from(weight).ok().filter(|_| weight <= REVIEW_BUDGET).ok_or(IntakeError::TooComplex)?;
        let open = self.open(peer).ok_or(IntakeError::Busy)?;
        let acquire = async {
            let of_peer = Arc::clone(&open.active).acquire_owned().await?;
            Ok::<_, AcquireError>((of_peer, Arc::clone(&self.budget).acquire_many_owned(weight).await?))
        };
        match timeout(MAX_WAIT, acquire).await {
            Ok(Ok(permits)) => Ok(ReviewPermit { _permits: permits, _open: open }),
            _ => Err(IntakeError::Busy),
        }
    }

    /// Counts a review of an address. `None` at the limit.
    fn open(&self, peer: Option<IpAddr>) -> Option<OpenReview<'_>> {
        let mut reviews = self.open_reviews();
        let is_full = |usage: &PeerUsage| usage.open >= MAX_PER_PEER;
        if reviews.total >= MAX_REVIEWS || reviews.by_peer.get(&peer).is_some_and(is_full) {
            return None;
        }
        reviews.total += 1;
        let usage = reviews
            .by_peer
            .entry(peer)
            .or_insert_with(|| PeerUsage { open: 0, active: Arc::new(Semaphore::new(MAX_ACTIVE_PER_PEER)) });
        usage.open += 1;
        Some(OpenReview { intake: self, peer, active: Arc::clone(&usage.active) })
    }

    fn open_reviews(&self) -> MutexGuard<'_, OpenReviews> {
        self.open_reviews.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a review is active.
struct ReviewPermit<'a> {
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    _open: OpenReview<'a>,
}

/// Held while a review is active or waits.
struct OpenReview<'a> {
    intake: &'a Intake,
    peer: Option<IpAddr>,
    active: Arc<Semaphore>,
}

impl Drop for OpenReview<'_> {
    fn drop(&mut self) {
        let mut reviews = self.intake.open_reviews();
        reviews.total -= 1;
        if let Some(usage) = reviews.by_peer.get_mut(&self.peer) {
            usage.open -= 1;
            if usage.open == 0 {
                reviews.by_peer.remove(&self.peer);
            }
        }
    }
}

/// An upper bound of the memory of a parsed body, in KiB. Counts the characters that start or separate values, also
/// inside strings.
fn weight(body: &[u8]) -> usize {
    let values = body.iter().filter(|byte| matches!(byte, b'[' | b'{' | b',')).count();
    ((body.len() + values * BYTES_PER_VALUE) >> 10).max(MIN_WEIGHT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_of_a_review_grows_with_its_size_and_its_values() {
        let usual = br#"{"request":{"uid":"1","object":{"spec":{"type":"Team","presets":["Alerts"]}}}}"#;
        assert_eq!(weight(usual), MIN_WEIGHT);
        let text = vec![b'a'; MAX_BODY_BYTES];
        assert_eq!(weight(&text), MAX_BODY_BYTES >> 10);
        let empty_arrays = b"[],".repeat(MAX_BODY_BYTES / 3);
        assert!(weight(&empty_arrays) > REVIEW_BUDGET, "{}", weight(&empty_arrays));
        assert_eq!(REVIEW_BUDGET / MIN_WEIGHT, 32);
    }

    fn intake() -> Arc<Intake> {
        let keys = kube::runtime::reflector::store::Writer::default().as_reader();
        let clock = crate::clock::Clock::system();
        Intake::new(Metrics::new(keys, clock, || 0, || (None, None)))
    }

    const ADDRESSES: [Option<IpAddr>; 3] = [
        Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1))),
        Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2))),
        None,
    ];

    /// Starts `count` reviews.
    async fn start(intake: &'static Intake, peer: Option<IpAddr>, count: usize) -> Vec<ReviewPermit<'static>> {
        let mut permits = vec![];
        for _ in 0..count {
            permits.push(intake.admit(peer, MIN_WEIGHT).await.unwrap());
        }
        permits
    }

    #[tokio::test(start_paused = true)]
    async fn active_and_waiting_reviews_are_limited_and_further_ones_are_rejected_at_once() {
        let intake: &'static Intake = Box::leak(Box::new(Arc::into_inner(intake()).unwrap()));
        let [one, other, third] = ADDRESSES;
        let mut active = start(intake, one, MAX_ACTIVE_PER_PEER).await;
        let mut waiting = vec![];
        for _ in MAX_ACTIVE_PER_PEER..MAX_PER_PEER {
            waiting.push(tokio::spawn(intake.admit(one, MIN_WEIGHT)));
        }
        // The paused clock advances only when all tasks are idle.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begin = tokio::time::Instant::now();
        assert!(matches!(intake.admit(one, MIN_WEIGHT).await, Err(IntakeError::Busy)));
        // The limit of one address does not affect another.
        let others = start(intake, other, MAX_ACTIVE_PER_PEER).await;
        assert!(begin.elapsed().is_zero());
        assert!(matches!(intake.admit(third, MIN_WEIGHT).await, Err(IntakeError::Busy)), "the total is limited");
        assert_eq!(begin.elapsed(), MAX_WAIT);
        for waiting in waiting {
            assert!(matches!(waiting.await.unwrap(), Err(IntakeError::Busy)));
        }
        // The end of a review admits another.
        active.pop();
        active.push(intake.admit(one, MIN_WEIGHT).await.unwrap());
        drop((active, others));
        assert!(matches!(intake.admit(one, REVIEW_BUDGET + 1).await, Err(IntakeError::TooComplex)));
        drop(intake.admit(one, REVIEW_BUDGET).await.unwrap());
        let reviews = intake.open_reviews();
        assert!(reviews.total == 0 && reviews.by_peer.is_empty(), "no address is kept");
    }

    #[test]
    fn a_rejection_is_a_status_with_retry_after_if_a_retry_can_succeed() {
        for (error, code, retry) in [
            (IntakeError::Busy, 503, true),
            (IntakeError::Slow, 503, true),
            (IntakeError::Unread(Unread::NoRoom), 503, true),
            (IntakeError::Unread(Unread::Late), 408, false),
            (IntakeError::TooComplex, 413, false),
        ] {
            let response = error.response();
            let has_retry_after = response.headers().contains_key(header::RETRY_AFTER);
            assert_eq!((response.status().as_u16(), has_retry_after), (code, retry));
        }
    }
}
