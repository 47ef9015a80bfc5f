//! A lingering close, which lets the peer read the last response (RFC 9112, section 9.6).
//!
//! If a server responds to an incomplete request, for example because it is too large, and closes the connection, the
//! kernel resets the connection when the rest of the request arrives. The peer then loses the response. Behind a proxy,
//! a rejection becomes an error of the authorization server: with Traefik, a client that sends a large header gets 500
//! instead of 431.

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

use super::{connection_limit::ConnectionGuard, listener::WithPermit};

/// The maximum number of bytes that are read and discarded after the response. Proxies written in Go accept heads of 1
/// MB by default.
const MAX_DRAINED_BYTES: usize = 2 << 20;

/// The maximum time for that. It ends earlier when the peer closes the connection.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Accepts connections as [`LingeringStream`], with `TCP_NODELAY`.
#[derive(Clone, Copy, Debug)]
pub(super) struct LingeringAcceptor;

impl<S> Accept<TcpStream, WithPermit<S>> for LingeringAcceptor {
    type Stream = LingeringStream;
    type Service = WithPermit<S>;
    type Future = Ready<io::Result<(LingeringStream, WithPermit<S>)>>;

    fn accept(&self, stream: TcpStream, service: WithPermit<S>) -> Self::Future {
        let guard = Arc::clone(service.guard());
        std::future::ready(stream.set_nodelay(true).map(|()| (LingeringStream { stream, guard, drain: None }, service)))
    }
}

/// A connection that continues to read after the shutdown of its writing side, until the peer closes or a limit is
/// reached. It ends at once when the connection must close.
#[derive(Debug)]
pub(super) struct LingeringStream {
    stream: TcpStream,
    guard: Arc<ConnectionGuard>,
    /// Set after the shutdown of the writing side.
    drain: Option<Drain>,
}

/// The remaining limits.
#[derive(Debug)]
struct Drain {
    bytes: usize,
    until: Pin<Box<Sleep>>,
}

impl AsyncWrite for LingeringStream {
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, guard, drain } = self.get_mut();
        let drain = if let Some(drain) = drain {
            drain
        } else {
            ready!(Pin::new(&mut *stream).poll_shutdown(context))?;
            drain.insert(Drain { bytes: MAX_DRAINED_BYTES, until: Box::pin(sleep(DRAIN_TIMEOUT)) })
        };
        let mut buffer = [0; 16 << 10];
        while drain.bytes > 0 && !guard.must_close() {
            let mut buffer = ReadBuf::new(&mut buffer);
            match Pin::new(&mut *stream).poll_read(context, &mut buffer) {
                Poll::Pending if guard.must_close_or_wakes(context.waker()) => break,
                Poll::Pending => return drain.until.as_mut().poll(context).map(Ok),
                // The peer closed or reset the connection.
                Poll::Ready(result) if result.is_err() || buffer.filled().is_empty() => break,
                Poll::Ready(_) => drain.bytes = drain.bytes.saturating_sub(buffer.filled().len()),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, guard, .. } = self.get_mut();
        unless_closing(guard, context, |context| Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, guard, .. } = self.get_mut();
        unless_closing(guard, context, |context| Pin::new(stream).poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }
}

impl AsyncRead for LingeringStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, guard, .. } = self.get_mut();
        unless_closing(guard, context, |context| Pin::new(stream).poll_read(context, buffer))
    }
}

/// Reads or writes, unless the connection must close.
fn unless_closing<T>(
    guard: &ConnectionGuard,
    context: &mut Context<'_>,
    act: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> Poll<io::Result<T>> {
    let aborted = || Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
    if guard.must_close() {
        return aborted();
    }
    let done = act(context);
    if done.is_pending() && guard.must_close_or_wakes(context.waker()) { aborted() } else { done }
}
