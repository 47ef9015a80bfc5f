//! Memory for the bodies of requests: bounded over all connections of a listener, and each body by a deadline.
//!
//! A body is charged for what has arrived of it, and its head with it. When there is no room for what arrives next, the
//! request whose body has been arriving for the longest is given up. An honest peer sends a body in milliseconds, so it is
//! the slow ones that make room.

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
    listener::PATIENCE,
    places::{Seat, Working},
};

/// Room is counted in so many bytes.
const UNIT: usize = 1024;

/// How much room a body of unknown or large size takes at first.
const FIRST: usize = 16 << 10;

/// How long a request waits for a given-up one to leave.
const HANDOVER: Duration = Duration::from_secs(1);

/// Room for the bodies of all requests of a listener.
pub struct Bodies {
    room: Arc<Semaphore>,
    arriving: Mutex<Arriving>,
    refused: [AtomicU64; Unread::ALL.len()],
}

/// The bodies that are waited for, the oldest first.
#[derive(Default)]
struct Arriving {
    next: u64,
    all: BTreeMap<u64, CancellationToken>,
}

/// A body that has arrived. Its room is taken, and its connection is at work, until this is dropped.
#[derive(Debug)]
pub struct Received {
    /// All of it.
    pub bytes: Bytes,
    /// The address that it came from, if the request came through a listener.
    pub peer: Option<IpAddr>,
    _room: Option<OwnedSemaphorePermit>,
    _working: Option<Working>,
}

/// Why a body did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It took too long.
    #[error("the body of the request did not arrive within {}s", PATIENCE.as_secs())]
    Late,
    /// There was no room for more, and it had been arriving for the longest.
    #[error("the body of the request arrived too slowly, and its memory was needed for other requests")]
    GivenUp,
    /// There was no room for it, and no slower one that could make room.
    #[error("there is no memory for the body of another request now; try again")]
    NoRoom,
    /// It is larger than any that is taken.
    #[error("the body of the request is too large")]
    TooLarge,
    /// The peer broke it off.
    #[error("the body of the request broke off")]
    Broken,
}

impl Unread {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Late, Self::GivenUp, Self::NoRoom, Self::TooLarge, Self::Broken];

    /// A name for metrics.
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

    /// The status that says so.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Late | Self::GivenUp => StatusCode::REQUEST_TIMEOUT,
            Self::NoRoom => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }

    /// An answer that says so, as text. With `Retry-After` where another try may succeed.
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
        write!(f, "room for {} KiB of bodies", self.room.available_permits())
    }
}

impl Bodies {
    /// Room for so many bytes, in whole KiB.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(bytes / UNIT));
        Arc::new(Self { room, arriving: Mutex::default(), refused: Default::default() })
    }

    /// How many bodies did not arrive, by reason.
    pub fn refused(&self) -> impl Iterator<Item = (Unread, u64)> {
        Unread::ALL.into_iter().zip(self.refused.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Waits for the body of a request, of `largest` bytes at most. While it does not arrive, the connection counts as one
    /// that waits for its peer.
    ///
    /// # Errors
    /// Why the body did not arrive.
    pub async fn receive<B>(&self, request: Request<B>, largest: usize) -> Result<(Parts, Received), Unread>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let (mut head, mut body) = request.into_parts();
        let seat = head.extensions.remove::<Arc<Seat>>();
        let received = timeout(PATIENCE, self.collect(&head, &mut body, largest)).await.unwrap_or(Err(Unread::Late));
        match received {
            Ok((bytes, room)) => {
                let peer = seat.as_ref().map(|seat| seat.peer());
                let working = seat.map(|seat| seat.work());
                Ok((head, Received { bytes, peer, _room: room, _working: working }))
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
        let head = weight(head);
        let mut room = None;
        let mut bytes = Vec::new();
        let mut waited: Option<Arrival<'_>> = None;
        loop {
            let frame = match (body.frame().now_or_never(), &waited) {
                (Some(frame), _) => frame,
                (None, Some(arrival)) => tokio::select! {
                    biased;
                    () = arrival.given_up.cancelled() => return Err(Unread::GivenUp),
                    frame = body.frame() => frame,
                },
                // From here on it is one of those that have to be waited for, and its head stays in memory.
                (None, None) => {
                    let arrival = waited.insert(self.arrive());
                    self.enlarge(&mut room, head, Some(arrival)).await?;
                    continue;
                }
            };
            let data = match frame.transpose().map_err(|_| Unread::Broken)?.map(Frame::into_data) {
                None => return Ok((bytes.into(), room)),
                Some(Ok(data)) => data,
                // Trailers.
                Some(Err(_)) => continue,
            };
            let size = bytes.len() + data.len();
            if size > largest {
                return Err(Unread::TooLarge);
            }
            // What is complete at once, as most bodies are, needs no copy.
            if bytes.is_empty() && body.is_end_stream() {
                self.enlarge(&mut room, head + size, waited.as_ref()).await?;
                return Ok((data, room));
            }
            if size > bytes.capacity() {
                let capacity = (2 * bytes.capacity()).max(FIRST).min(known.unwrap_or(largest)).max(size);
                self.enlarge(&mut room, head + capacity, waited.as_ref()).await?;
                bytes.reserve_exact(capacity - bytes.len());
            }
            bytes.extend_from_slice(&data);
        }
    }

    /// Takes room until a request has `bytes` of it.
    async fn enlarge(
        &self,
        room: &mut Option<OwnedSemaphorePermit>,
        bytes: usize,
        own: Option<&Arrival<'_>>,
    ) -> Result<(), Unread> {
        let held = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = bytes.div_ceil(UNIT).saturating_sub(held);
        let more = u32::try_from(more).map_err(|_| Unread::NoRoom)?;
        let deadline = Instant::now() + HANDOVER;
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.room).try_acquire_many_owned(more) {
                break permit;
            }
            if !self.give_up_the_oldest(own) {
                return Err(Unread::NoRoom);
            }
            // What leaves may be too little; then the next has to leave too.
            let soon = (Instant::now() + HANDOVER / 20).min(deadline);
            match timeout_at(soon, Arc::clone(&self.room).acquire_many_owned(more)).await {
                Ok(Ok(permit)) => break permit,
                _ if Instant::now() >= deadline => return Err(Unread::NoRoom),
                _ => {}
            }
        };
        match room {
            Some(room) => room.merge(permit),
            None => *room = Some(permit),
        }
        Ok(())
    }

    /// Gives up the body that has been arriving for the longest, other than `own`. Whether there was one.
    fn give_up_the_oldest(&self, own: Option<&Arrival<'_>>) -> bool {
        let mut arriving = self.arriving();
        let oldest = arriving.all.keys().copied().find(|id| own.is_none_or(|own| own.id != *id));
        match oldest.and_then(|id| arriving.all.remove(&id)) {
            Some(given_up) => {
                given_up.cancel();
                true
            }
            None => false,
        }
    }

    fn arrive(&self) -> Arrival<'_> {
        let mut arriving = self.arriving();
        let (id, given_up) = (arriving.next, CancellationToken::new());
        arriving.next += 1;
        arriving.all.insert(id, given_up.clone());
        Arrival { bodies: self, id, given_up }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One body that is waited for.
struct Arrival<'a> {
    bodies: &'a Bodies,
    id: u64,
    given_up: CancellationToken,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.bodies.arriving().all.remove(&self.id);
    }
}

/// About how many bytes a head takes in memory.
fn weight(head: &Parts) -> usize {
    /// Of each header, besides its name and value.
    const EACH: usize = 64;
    let headers = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + EACH);
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

    /// A request whose body comes as it is sent.
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

    fn free(bodies: &Bodies) -> usize {
        bodies.room.available_permits()
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_taken_for_what_has_arrived_and_given_back_with_it() {
        let bodies = Bodies::new(100 * KIB);
        let (_, received) = bodies.receive(whole(10 * KIB), 50 * KIB).await.unwrap();
        // The head takes some room too.
        assert_eq!((received.bytes.len(), free(&bodies)), (10 * KIB, 89));
        let (sender, request) = slow();
        let task = tokio::spawn({
            let bodies = Arc::clone(&bodies);
            async move { bodies.receive(request, 50 * KIB).await.map(|(_, received)| received) }
        });
        for bytes in [5, 20, 15] {
            send(&sender, bytes * KIB);
            tokio::task::yield_now().await;
        }
        assert_eq!(free(&bodies), 89 - 51, "16, then 32, then as many as may be");
        drop(sender);
        let second = task.await.unwrap().unwrap();
        assert_eq!(second.bytes.len(), 40 * KIB);
        drop((received, second));
        assert_eq!(free(&bodies), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_a_deadline_and_a_largest_size() {
        let bodies = Bodies::new(100 * KIB);
        let (sender, request) = slow();
        send(&sender, KIB);
        let begin = Instant::now();
        assert_eq!(bodies.receive(request, KIB).await.unwrap_err(), Unread::Late);
        assert_eq!(begin.elapsed(), PATIENCE);
        assert_eq!(bodies.receive(whole(KIB + 1), KIB).await.unwrap_err(), Unread::TooLarge);
        let (sender, request) = slow();
        (0..3).for_each(|_| send(&sender, KIB));
        assert_eq!(bodies.receive(request, 2 * KIB).await.unwrap_err(), Unread::TooLarge);
        assert_eq!(free(&bodies), 100, "what was refused holds nothing");
        assert_eq!(bodies.refused().map(|(_, count)| count).collect::<Vec<_>>(), [1, 0, 0, 2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_body_makes_room_for_the_next() {
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
        assert_eq!(free(&bodies), 0);
        // Two of 25 have to leave for one of 40.
        let (_, received) = bodies.receive(whole(40 * KIB), 50 * KIB).await.unwrap();
        let mut ends = vec![];
        for (sender, task) in tasks {
            drop(sender);
            ends.push(task.await.unwrap());
        }
        assert_eq!(ends, [Err(Unread::GivenUp), Err(Unread::GivenUp), Ok(()), Ok(())]);
        drop(received);
        assert_eq!(free(&bodies), 104);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_arrived_is_not_given_up() {
        let bodies = Bodies::new(100 * KIB);
        let (_, _received) = bodies.receive(whole(80 * KIB), 80 * KIB).await.unwrap();
        assert_eq!(bodies.receive(whole(30 * KIB), 80 * KIB).await.unwrap_err(), Unread::NoRoom);
        bodies.receive(whole(18 * KIB), 80 * KIB).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_is_charged_while_its_body_does_not_arrive() {
        let bodies = Bodies::new(100 * KIB);
        let (_sender, mut request) = slow();
        request.headers_mut().insert("x-long", HeaderValue::from_bytes(&vec![b'a'; 60 * KIB]).unwrap());
        let task = tokio::spawn({
            let bodies = Arc::clone(&bodies);
            async move { bodies.receive(request, KIB).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert_eq!(free(&bodies), 39);
        task.abort();
        let _ = task.await;
        assert_eq!(free(&bodies), 100, "also if the peer goes away");
    }

    #[test]
    fn who_is_refused_learns_why_and_whether_to_come_again() {
        let answer = Unread::NoRoom.answer::<String>();
        assert_eq!((answer.status().as_u16(), answer.headers()[header::RETRY_AFTER].to_str().unwrap()), (503, "1"));
        assert!(answer.body().contains("try again"));
        let answer = Unread::Late.answer::<String>();
        assert_eq!((answer.status().as_u16(), answer.headers().is_empty()), (408, true));
    }
}
