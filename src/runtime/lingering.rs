//! A close that leaves the peer time to read the last answer (RFC 9112 section 9.6).
//!
//! Who answers a request that is still being written, as too large for example, and closes, makes the kernel answer the
//! rest of it with a reset, which takes the answer away from the peer too. Behind a proxy this turns a refusal into an
//! error of the authorization server: with Traefik, a client that sends a large header gets 500 instead of 431.

use std::{
    future::{Future, Ready},
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum_server::accept::Accept;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use super::{listener::Placed, places::Seat};

/// How much of a peer's request is still taken, and thrown away: proxies written in Go take heads of 1 MB by default.
const MOST: usize = 2 << 20;

/// For how long. A peer that reads its answer closes, and this ends.
const LONGEST: Duration = Duration::from_secs(2);

/// Accepts connections as [`Lingering`], whose answers do not wait for each other to be acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct LingeringAcceptor;

impl<S> Accept<TcpStream, Placed<S>> for LingeringAcceptor {
    type Stream = Lingering;
    type Service = Placed<S>;
    type Future = Ready<io::Result<(Lingering, Placed<S>)>>;

    fn accept(&self, stream: TcpStream, service: Placed<S>) -> Self::Future {
        let seat = Arc::clone(service.seat());
        std::future::ready(stream.set_nodelay(true).map(|()| (Lingering { stream, seat, rest: None }, service)))
    }
}

/// A connection that goes on reading when its writing side is shut down, until the peer closes too, or a bound is met. It
/// breaks off when its place is given to another.
#[derive(Debug)]
pub(super) struct Lingering {
    stream: TcpStream,
    seat: Arc<Seat>,
    /// Since the writing side is shut down.
    rest: Option<Rest>,
}

/// What is still read.
#[derive(Debug)]
struct Rest {
    bytes: usize,
    until: Pin<Box<Sleep>>,
}

impl AsyncWrite for Lingering {
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, seat, rest } = self.get_mut();
        let rest = if let Some(rest) = rest {
            rest
        } else {
            ready!(Pin::new(&mut *stream).poll_shutdown(context))?;
            rest.insert(Rest { bytes: MOST, until: Box::pin(sleep(LONGEST)) })
        };
        let mut buffer = [0; 16 << 10];
        while rest.bytes > 0 && !seat.is_gone() {
            let mut buffer = ReadBuf::new(&mut buffer);
            match Pin::new(&mut *stream).poll_read(context, &mut buffer) {
                Poll::Pending if seat.is_gone_or_wakes(context.waker()) => break,
                Poll::Pending => return rest.until.as_mut().poll(context).map(Ok),
                // Closed by the peer, in one way or another.
                Poll::Ready(result) if result.is_err() || buffer.filled().is_empty() => break,
                Poll::Ready(_) => rest.bytes = rest.bytes.saturating_sub(buffer.filled().len()),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, seat, .. } = self.get_mut();
        unless_gone(seat, context, |context| Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, seat, .. } = self.get_mut();
        unless_gone(seat, context, |context| Pin::new(stream).poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }
}

impl AsyncRead for Lingering {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, seat, .. } = self.get_mut();
        unless_gone(seat, context, |context| Pin::new(stream).poll_read(context, buffer))
    }
}

/// Reads or writes, until the place of the connection is given to another.
fn unless_gone<T>(
    seat: &Seat,
    context: &mut Context<'_>,
    act: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> Poll<io::Result<T>> {
    let gone = || Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
    if seat.is_gone() {
        return gone();
    }
    let done = act(context);
    if done.is_pending() && seat.is_gone_or_wakes(context.waker()) { gone() } else { done }
}
