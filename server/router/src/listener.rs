//! Client connections: accepted, guarded against slow clients, drained politely.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::proxy;
use crate::registry::Router;
use crate::tls::Tls;
use crate::workers::Workers;

const MAX_HEAD: usize = 64 << 10;
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Accepts connections until `stop`; each is tracked, and told to end then.
pub async fn listen(
    router: Arc<Router>,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    workers: Workers,
    connections: TaskTracker,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: give others time to close some.
                tracing::warn!(%error, "no connection could be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let open = router.metrics.connections.get();
        if usize::try_from(open).is_ok_and(|open| open >= router.config.max_connections) {
            tracing::warn!(%client, open, "too many connections: one was closed");
            continue;
        }
        // From here on the connection belongs to the worker's own reactor.
        let (Some(place), Ok(stream)) = (workers.place(), stream.into_std()) else {
            continue;
        };
        router.metrics.connections.inc();
        let router = Arc::clone(&router);
        let (tls, stop) = (tls.clone(), stop.clone());
        let runtime = place.runtime.clone();
        let served = connections.track_future(async move {
            let _place = place;
            let _open = Open(router.metrics.connections.clone());
            let _ = stream.set_nodelay(true);
            let Ok(stream) = TcpStream::from_std(stream) else {
                return;
            };
            match tls {
                None => serve(router, stream, client, stop).await,
                Some(tls) => {
                    let handshake = tokio::time::timeout(HANDSHAKE, tls.accept(stream));
                    if let Ok(Ok(stream)) = handshake.await {
                        Box::pin(serve(router, stream, client, stop)).await;
                    }
                }
            }
        });
        runtime.spawn(served);
    }
}

/// Counts an open connection.
struct Open(prometheus::IntGauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

async fn serve<S>(router: Arc<Router>, stream: S, client: SocketAddr, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let timeouts = router.config.timeouts;
    let stream = TokioIo::new(Patient {
        stream,
        limit: timeouts.write_stall,
        stalled: None,
    });
    let service = service_fn(move |request| {
        let answer = proxy::serve(Arc::clone(&router), client.ip(), request);
        let router = Arc::clone(&router);
        // Boxed: else the connection keeps the room for it as long as the answer streams.
        Box::pin(async move {
            let mut answer = answer.await;
            if router.is_draining() {
                // Closed from this side it could meet the client's next request halfway.
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(CONNECTION, close);
            }
            Ok::<_, std::convert::Infallible>(answer)
        })
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.header_read)
        .max_buf_size(MAX_HEAD)
        .serve_connection(stream, service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%client, %error, "a connection ended early");
    }
}

/// A stream whose other side must take what is written within a limit.
struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Set while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    fn watch<T>(
        &mut self,
        polled: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stalled = None;
            return polled;
        }
        let limit = self.limit;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if stalled.as_mut().poll(context).is_ready() {
            let message = "the client takes nothing of what is written to it";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, data);
        self.watch(polled, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, data);
        self.watch(polled, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(polled, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(polled, context)
    }
}

/// Listens on an address; the error says which.
///
/// # Errors
/// When the address can't be bound.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))
}
