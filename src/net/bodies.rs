//! A memory budget for the request bodies of all connections of a listener, and a deadline for each body.
//!
//! The received bytes of a body and its head count against the budget. When the budget is exhausted, the request whose
//! body has been incomplete for the longest is canceled. A well-behaved peer sends a body in milliseconds, so the
//! canceled requests are the slow ones.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use http::{HeaderValue, Request, Response, StatusCode, header, request::Parts};
use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    connection_limit::{ConnectionGuard, RequestGuard},
    listener::REQUEST_TIMEOUT,
};

/// The unit of the budget, in bytes.
const UNIT: usize = 1024;

/// The initial capacity for a body of unknown or large size.
const INITIAL_CAPACITY: usize = 16 << 10;

/// The time for which a request waits for memory of canceled ones.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// The memory budget for the bodies of all requests of a listener.
pub struct Bodies {
    budget: Arc<Semaphore>,
    arriving: Mutex<Arriving>,
    refused: [AtomicU64; Unread::ALL.len()],
}

/// The incomplete bodies, the oldest first.
#[derive(Default)]
struct Arriving {
    next: u64,
    all: BTreeMap<u64, CancellationToken>,
}

/// A complete body. Until it is dropped, it counts against the budget, and its connection is active.
#[derive(Debug)]
pub struct Received {
    /// The body.
    pub bytes: Bytes,
    /// The address of the peer, if the request came through a listener.
    pub peer: Option<IpAddr>,
    _budget: Option<OwnedSemaphorePermit>,
    _request: Option<RequestGuard>,
}

/// The reason for an incomplete body. [`Unread::name`] is a label in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// The deadline passed.
    #[error("the body of the request did not arrive within {}s", REQUEST_TIMEOUT.as_secs())]
    Late,
    /// The budget was exhausted, and this body had been incomplete for the longest.
    #[error("the body of the request arrived too slowly, and its memory was needed for other requests")]
    GivenUp,
    /// The budget was exhausted, and no older body was incomplete.
    #[error("there is no memory for the body of another request now; try again")]
    NoRoom,
    /// The body exceeds the maximum size.
    #[error("the body of the request is too large")]
    TooLarge,
    /// The peer ended the body early.
    #[error("the body of the request ended early")]
    Broken,
}

impl Unread {
    /// All reasons.
    pub const ALL: [Self; 5] = [Self::Late, Self::GivenUp, Self::NoRoom, Self::TooLarge, Self::Broken];

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Late => "Late",
            Self::GivenUp => "GivenUp",
            Self::NoRoom => "NoRoom",
            Self::TooLarge => "TooLarge",
            Self::Broken => "Broken",
        }
    }

    /// The HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Late | Self::GivenUp => StatusCode::REQUEST_TIMEOUT,
            Self::NoRoom => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }

    /// The response, as text. With `Retry-After` if a retry may succeed.
    pub fn answer<B: From<String>>(self) -> Response<B> {
        let mut response = Response::new(B::from(self.to_string()));
        *response.status_mut() = self.status();
        if self == Self::NoRoom {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl fmt::Debug for Bodies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB available for bodies", self.budget.available_permits())
    }
}

impl Bodies {
    /// A budget of so many bytes, in whole KiB.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        let budget = Arc::new(Semaphore::new(bytes / UNIT));
        Arc::new(Self { budget, arriving: Mutex::default(), refused: Default::default() })
    }

    /// The number of rejected requests by reason.
    pub fn refused(&self) -> impl Iterator<Item = (Unread, u64)> {
        Unread::ALL.into_iter().zip(self.refused.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Reads the body of a request, up to `largest` bytes. The connection is idle until the body is complete.
    ///
    /// # Errors
    /// The reason for an incomplete body.
    pub async fn receive<B>(&self, request: Request<B>, largest: usize) -> Result<(Parts, Received), Unread>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let (mut head, mut body) = request.into_parts();
        let guard = head.extensions.remove::<Arc<ConnectionGuard>>();
        let received =
            timeout(REQUEST_TIMEOUT, self.collect(&head, &mut body, largest)).await.unwrap_or(Err(Unread::Late));
        match received {
            Ok((bytes, budget)) => {
                let peer = guard.as_ref().map(|guard| guard.peer());
                let request_guard = guard.map(|guard| guard.active_request());
                Ok((head, Received { bytes, peer, _budget: budget, _request: request_guard }))
            }
            Err(unread) => {
                if let Some(count) = Unread::ALL.iter().position(|other| *other == unread) {
                    self.refused[count].fetch_add(1, Ordering::Relaxed);
                }
                Err(unread)
            }
        }
    }

    async fn collect<B>(
        &self,
        head: &Parts,
        body: &mut B,
        largest: usize,
    ) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Unread>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let known = body.size_hint().exact().and_then(|size| usize::try_from(size).ok());
        if known.is_some_and(|size| size > largest) {
            return Err(Unread::TooLarge);
        }
        let head = head_size(head);
        let mut budget = None;
        let mut bytes = Vec::new();
        let mut arrival: Option<Arrival<'_>> = None;
        loop {
            let frame = match (body.frame().now_or_never(), &arrival) {
                (Some(frame), _) => frame,
                (None, Some(arrival)) => tokio::select! {
                    biased;
                    () = arrival.canceled.cancelled() => return Err(Unread::GivenUp),
                    frame = body.frame() => frame,
                },
                // The body is incomplete, and its head stays in memory.
                (None, None) => {
                    let arrival = arrival.insert(self.arrive());
                    self.enlarge(&mut budget, head, Some(arrival)).await?;
                    continue;
                }
            };
            let data = match frame.transpose().map_err(|_| Unread::Broken)?.map(Frame::into_data) {
                None => return Ok((bytes.into(), budget)),
                Some(Ok(data)) => data,
                // Trailers.
                Some(Err(_)) => continue,
            };
            let size = bytes.len() + data.len();
            if size > largest {
                return Err(Unread::TooLarge);
            }
            // A body in one frame, as most are, needs no copy.
            if bytes.is_empty() && body.is_end_stream() {
                self.enlarge(&mut budget, head + size, arrival.as_ref()).await?;
                return Ok((data, budget));
            }
            if size > bytes.capacity() {
                let capacity = (2 * bytes.capacity()).max(INITIAL_CAPACITY).min(known.unwrap_or(largest)).max(size);
                self.enlarge(&mut budget, head + capacity, arrival.as_ref()).await?;
                bytes.reserve_exact(capacity - bytes.len());
            }
            bytes.extend_from_slice(&data);
        }
    }

    /// Enlarges the share of a request to `bytes`.
    async fn enlarge(
        &self,
        budget: &mut Option<OwnedSemaphorePermit>,
        bytes: usize,
        own: Option<&Arrival<'_>>,
    ) -> Result<(), Unread> {
        let held = budget.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = bytes.div_ceil(UNIT).saturating_sub(held);
        let more = u32::try_from(more).map_err(|_| Unread::NoRoom)?;
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.budget).try_acquire_many_owned(more) {
                break permit;
            }
            if !self.cancel_oldest(own) {
                return Err(Unread::NoRoom);
            }
            // One canceled body may release too little. Then the next one is canceled too.
            let soon = (Instant::now() + RELEASE_TIMEOUT / 20).min(deadline);
            match timeout_at(soon, Arc::clone(&self.budget).acquire_many_owned(more)).await {
                Ok(Ok(permit)) => break permit,
                _ if Instant::now() >= deadline => return Err(Unread::NoRoom),
                _ => {}
            }
        };
        match budget {
            Some(budget) => budget.merge(permit),
            None => *budget = Some(permit),
        }
        Ok(())
    }

    /// Cancels the body that has been incomplete for the longest, other than `own`. Returns whether there was one.
    fn cancel_oldest(&self, own: Option<&Arrival<'_>>) -> bool {
        let mut arriving = self.arriving();
        let oldest = arriving.all.keys().copied().find(|id| own.is_none_or(|own| own.id != *id));
        match oldest.and_then(|id| arriving.all.remove(&id)) {
            Some(canceled) => {
                canceled.cancel();
                true
            }
            None => false,
        }
    }

    fn arrive(&self) -> Arrival<'_> {
        let mut arriving = self.arriving();
        let (id, canceled) = (arriving.next, CancellationToken::new());
        arriving.next += 1;
        arriving.all.insert(id, canceled.clone());
        Arrival { bodies: self, id, canceled }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An incomplete body.
struct Arrival<'a> {
    bodies: &'a Bodies,
    id: u64,
    canceled: CancellationToken,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.bodies.arriving().all.remove(&self.id);
    }
}

/// The approximate size of a head in memory, in bytes.
fn head_size(head: &Parts) -> usize {
    /// Per header, without name and value.
    const OVERHEAD: usize = 64;
    let headers = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + OVERHEAD);
    headers.sum::<usize>() + head.uri.path().len() + head.uri.query().map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::channel::mpsc;
    use http_body_util::{Full, StreamBody};

    use super::*;

    type Sent = mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>;

    const KIB: usize = 1024;

    /// A request whose body arrives in the frames that the sender sends.
    fn slow() -> (Sent, Request<impl Body<Data = Bytes, Error = Infallible> + Unpin>) {
        let (sender, body) = mpsc::unbounded();
        (sender, Request::new(StreamBody::new(body)))
    }

    fn send(to: &Sent, bytes: usize) {
        to.unbounded_send(Ok(Frame::data(vec![0; bytes].into()))).unwrap();
    }

    fn whole(bytes: usize) -> Request<Full<Bytes>> {
        Request::new(Full::new(vec![0; bytes].into()))
    }

    fn available(bodies: &Bodies) -> usize {
        bodies.budget.available_permits()
    }

    #[tokio::test(start_paused = true)]
    async fn received_bytes_count_against_the_budget_until_the_body_is_dropped() {
        let bodies = Bodies::new(100 * KIB);
        let (_, received) = bodies.receive(whole(10 * KIB), 50 * KIB).await.unwrap();
        // The head counts too.
        assert_eq!((received.bytes.len(), available(&bodies)), (10 * KIB, 89));
        let (sender, request) = slow();
        let task = tokio::spawn({
            let bodies = Arc::clone(&bodies);
            async move { bodies.receive(request, 50 * KIB).await.map(|(_, received)| received) }
        });
        for bytes in [5, 20, 15] {
            send(&sender, bytes * KIB);
            tokio::task::yield_now().await;
        }
        assert_eq!(available(&bodies), 89 - 51, "the capacity grows from 16 to 32 KiB and then to the maximum");
        drop(sender);
        let second = task.await.unwrap().unwrap();
        assert_eq!(second.bytes.len(), 40 * KIB);
        drop((received, second));
        assert_eq!(available(&bodies), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_body_and_a_large_body_are_rejected() {
        let bodies = Bodies::new(100 * KIB);
        let (sender, request) = slow();
        send(&sender, KIB);
        let begin = Instant::now();
        assert_eq!(bodies.receive(request, KIB).await.unwrap_err(), Unread::Late);
        assert_eq!(begin.elapsed(), REQUEST_TIMEOUT);
        assert_eq!(bodies.receive(whole(KIB + 1), KIB).await.unwrap_err(), Unread::TooLarge);
        let (sender, request) = slow();
        (0..3).for_each(|_| send(&sender, KIB));
        assert_eq!(bodies.receive(request, 2 * KIB).await.unwrap_err(), Unread::TooLarge);
        assert_eq!(available(&bodies), 100, "rejected bodies release their memory");
        assert_eq!(bodies.refused().map(|(_, count)| count).collect::<Vec<_>>(), [1, 0, 0, 2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_exhausted_budget_cancels_the_oldest_incomplete_bodies() {
        let bodies = Bodies::new(104 * KIB);
        let mut tasks = vec![];
        for _ in 0..4 {
            let (sender, request) = slow();
            send(&sender, 25 * KIB);
            let bodies = Arc::clone(&bodies);
            tasks.push((sender, tokio::spawn(async move { bodies.receive(request, 25 * KIB).await.map(drop) })));
            tokio::time::advance(Duration::from_millis(10)).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(available(&bodies), 0);
        // Two bodies of 25 KiB must end for one of 40 KiB.
        let (_, received) = bodies.receive(whole(40 * KIB), 50 * KIB).await.unwrap();
        let mut ends = vec![];
        for (sender, task) in tasks {
            drop(sender);
            ends.push(task.await.unwrap());
        }
        assert_eq!(ends, [Err(Unread::GivenUp), Err(Unread::GivenUp), Ok(()), Ok(())]);
        drop(received);
        assert_eq!(available(&bodies), 104);
    }

    #[tokio::test(start_paused = true)]
    async fn complete_bodies_are_not_canceled() {
        let bodies = Bodies::new(100 * KIB);
        let (_, _received) = bodies.receive(whole(80 * KIB), 80 * KIB).await.unwrap();
        assert_eq!(bodies.receive(whole(30 * KIB), 80 * KIB).await.unwrap_err(), Unread::NoRoom);
        bodies.receive(whole(18 * KIB), 80 * KIB).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_head_counts_against_the_budget_while_its_body_is_incomplete() {
        let bodies = Bodies::new(100 * KIB);
        let (_sender, mut request) = slow();
        request.headers_mut().insert("x-long", HeaderValue::from_bytes(&vec![b'a'; 60 * KIB]).unwrap());
        let task = tokio::spawn({
            let bodies = Arc::clone(&bodies);
            async move { bodies.receive(request, KIB).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert_eq!(available(&bodies), 39);
        task.abort();
        let _ = task.await;
        assert_eq!(available(&bodies), 100, "an aborted request releases its memory");
    }

    #[test]
    fn the_response_contains_the_reason_and_retry_after_only_without_memory() {
        let answer = Unread::NoRoom.answer::<String>();
        assert_eq!((answer.status().as_u16(), answer.headers()[header::RETRY_AFTER].to_str().unwrap()), (503, "1"));
        assert!(answer.body().contains("try again"));
        let answer = Unread::Late.answer::<String>();
        assert_eq!((answer.status().as_u16(), answer.headers().is_empty()), (408, true));
    }
}
