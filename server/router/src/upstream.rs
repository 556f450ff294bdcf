//! Connections to one replica: HTTP/1.1, kept alive, newest first.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::net::TcpStream;

use crate::workers;

/// Workers beyond this share.
const SHELVES: usize = 16;
/// Kept open for later by a worker; more are closed.
const MAX_IDLE: usize = 256;
/// Of each connection: some twenty events, and little for thousands of streams that wait.
const READ_BUFFER: usize = 4096;
/// Most bytes that are copied together into one piece.
const GATHERED: usize = 16 << 10;
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Unacknowledged data for this long means that the other side's machine is gone.
const GONE_AFTER: Duration = Duration::from_secs(20);

#[derive(Debug, Error)]
pub enum SendError {
    #[error("no connection to {address}: {source}")]
    Connect {
        address: SocketAddr,
        source: std::io::Error,
    },
    /// Nothing of the request was sent.
    #[error("the connection was closed before the request was sent")]
    NotSent,
    /// The replica may have begun; the client has seen nothing of it.
    #[error("the connection broke before the answer began: {0}")]
    Broken(hyper::Error),
}

/// One connection; closed when dropped unless it goes back to the pool.
///
/// Nothing drives it in the background: whoever waits for its response or body does, in its own
/// task. So all events that came in one read are passed on in one go, and an answer costs no
/// switch between tasks.
#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// None once the replica has closed it.
    driver: Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    /// How the body ended, when that came together with its last piece.
    end: Option<Option<hyper::Error>>,
    /// It served another request before.
    pub reused: bool,
}

impl Connection {
    async fn open(address: SocketAddr, timeout: Duration) -> Result<Self, SendError> {
        let error = |source| SendError::Connect { address, source };
        let connecting = tokio::time::timeout(timeout, TcpStream::connect(address));
        let stream = match connecting.await {
            Ok(stream) => stream.map_err(error)?,
            Err(_) => return Err(error(std::io::ErrorKind::TimedOut.into())),
        };
        stream.set_nodelay(true).map_err(error)?;
        let socket = socket2::SockRef::from(&stream);
        let keep_alive = socket2::TcpKeepalive::new()
            .with_time(KEEP_ALIVE)
            .with_interval(KEEP_ALIVE / 2);
        socket.set_tcp_keepalive(&keep_alive).map_err(error)?;
        #[cfg(target_os = "linux")]
        socket
            .set_tcp_user_timeout(Some(GONE_AFTER))
            .map_err(error)?;
        let (sender, driver) = http1::Builder::new()
            .read_buf_exact_size(Some(READ_BUFFER))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(SendError::Broken)?;
        Ok(Self {
            sender,
            driver: Some(driver),
            end: None,
            reused: false,
        })
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// # Errors
    /// Whether the request may have reached the replica.
    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        let mut response = std::pin::pin!(self.sender.try_send_request(request));
        let driver = &mut self.driver;
        let sent = poll_fn(|context| {
            if let Poll::Ready(response) = response.as_mut().poll(context) {
                return Poll::Ready(response);
            }
            drive(driver, context);
            response.as_mut().poll(context)
        });
        sent.await.map_err(|mut error| {
            if error.take_message().is_some() {
                SendError::NotSent
            } else {
                SendError::Broken(error.into_error())
            }
        })
    }

    /// The next piece of a response's body.
    pub fn poll_frame(
        &mut self,
        body: &mut Incoming,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        drive(&mut self.driver, context);
        Pin::new(body).poll_frame(context)
    }

    /// All of a response's body that is here now: pieces that came together go on together.
    pub fn poll_data(
        &mut self,
        body: &mut Incoming,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, hyper::Error>>> {
        if let Some(end) = self.end.take() {
            return Poll::Ready(end.map(Err));
        }
        let mut first = Bytes::new();
        let mut more = BytesMut::new();
        while more.len() < GATHERED {
            let end = match self.poll_frame(body, context) {
                Poll::Ready(Some(Ok(frame))) => {
                    // Trailers mean nothing to an HTTP/1 client of this API.
                    let data = frame.into_data().unwrap_or_default();
                    if first.is_empty() {
                        first = data;
                    } else {
                        if more.is_empty() {
                            more.reserve(READ_BUFFER);
                            more.extend_from_slice(&first);
                        }
                        more.extend_from_slice(&data);
                    }
                    continue;
                }
                Poll::Pending if first.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Err(error))) => Some(error),
                Poll::Ready(None) => None,
            };
            if first.is_empty() {
                return Poll::Ready(end.map(Err));
            }
            self.end = Some(end);
            break;
        }
        let data = if more.is_empty() {
            first
        } else {
            more.freeze()
        };
        Poll::Ready(Some(Ok(data)))
    }

    /// The next piece of a response's body.
    pub async fn frame(
        &mut self,
        body: &mut Incoming,
    ) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        poll_fn(|context| self.poll_frame(body, context)).await
    }

    /// A body of at most so many bytes; None when it is longer or breaks off.
    pub async fn collect(&mut self, mut body: Incoming, most: usize) -> Option<Bytes> {
        let mut whole = BytesMut::new();
        while let Some(frame) = self.frame(&mut body).await {
            if let Ok(data) = frame.ok()?.into_data() {
                whole.extend_from_slice(&data);
            }
            if whole.len() > most {
                return None;
            }
        }
        Some(whole.freeze())
    }

    /// It can take a request now. Looks without waiting: what isn't ready at once isn't worth
    /// keeping.
    fn is_ready(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        drive(&mut self.driver, &mut context);
        let ready = self.sender.poll_ready(&mut context);
        self.driver.is_some() && matches!(ready, Poll::Ready(Ok(())))
    }
}

fn drive(
    driver: &mut Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    context: &mut Context<'_>,
) {
    let polled = driver.as_mut().map(|driver| Pin::new(driver).poll(context));
    if let Some(Poll::Ready(_)) = polled {
        // Its error reaches whoever waits for the response or its body.
        *driver = None;
    }
}

/// Idle connections to one replica, by the worker that opened them.
#[derive(Debug)]
pub struct Pool {
    address: SocketAddr,
    idle: [Mutex<Vec<Connection>>; SHELVES],
}

impl Pool {
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            idle: Default::default(),
        }
    }

    fn shelf(&self) -> &Mutex<Vec<Connection>> {
        &self.idle[workers::index() % SHELVES]
    }

    /// An idle connection that still lives, else a new one.
    ///
    /// # Errors
    /// When none can be opened in time.
    pub async fn get(&self, timeout: Duration) -> Result<Connection, SendError> {
        loop {
            let idle = self.shelf().lock().pop();
            let Some(mut connection) = idle else {
                return self.open(timeout).await;
            };
            if connection.is_ready() {
                return Ok(connection);
            }
        }
    }

    /// A connection of its own, whatever is idle.
    ///
    /// # Errors
    /// When none can be opened in time.
    pub async fn open(&self, timeout: Duration) -> Result<Connection, SendError> {
        Connection::open(self.address, timeout).await
    }

    /// Takes back a connection whose response was read to its end.
    pub fn put(&self, mut connection: Connection) {
        if !connection.is_ready() {
            return;
        }
        connection.reused = true;
        let mut idle = self.shelf().lock();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }

    /// Drops connections that the replica closed.
    pub fn prune(&self) {
        for shelf in &self.idle {
            shelf.lock().retain_mut(Connection::is_ready);
        }
    }

    /// Closes all idle connections.
    pub fn clear(&self) {
        for shelf in &self.idle {
            shelf.lock().clear();
        }
    }
}
