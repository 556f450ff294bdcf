//! Connections to one replica: HTTP/1.1, kept alive, newest first.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

/// Kept open for later; more are closed.
const MAX_IDLE: usize = 256;
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
#[derive(Debug)]
pub struct Connection {
    sender: Option<SendRequest<Full<Bytes>>>,
    task: AbortHandle,
    /// It served another request before.
    pub reused: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Ends the socket at once, so that the replica sees that nobody waits any more.
        if self.sender.is_some() {
            self.task.abort();
        }
    }
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
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(SendError::Broken)?;
        let task = tokio::spawn(async move {
            // Its error reaches whoever waits for the response.
            let _ = connection.await;
        });
        Ok(Self {
            sender: Some(sender),
            task: task.abort_handle(),
            reused: false,
        })
    }

    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        let Some(sender) = &mut self.sender else {
            return Err(SendError::NotSent);
        };
        sender.try_send_request(request).await.map_err(|mut error| {
            if error.take_message().is_some() {
                SendError::NotSent
            } else {
                SendError::Broken(error.into_error())
            }
        })
    }
}

/// Idle connections to one replica.
#[derive(Debug)]
pub struct Pool {
    address: SocketAddr,
    idle: Mutex<Vec<Connection>>,
}

impl Pool {
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            idle: Mutex::default(),
        }
    }

    /// An idle connection that still lives, else a new one.
    pub async fn get(&self, timeout: Duration) -> Result<Connection, SendError> {
        loop {
            let idle = self.idle.lock().pop();
            let Some(mut connection) = idle else {
                return Connection::open(self.address, timeout).await;
            };
            let Some(sender) = &mut connection.sender else {
                continue;
            };
            if sender.is_ready() || sender.ready().await.is_ok() {
                return Ok(connection);
            }
        }
    }

    /// A connection of its own, whatever is idle.
    pub async fn open(&self, timeout: Duration) -> Result<Connection, SendError> {
        Connection::open(self.address, timeout).await
    }

    /// Takes back a connection whose response was read to its end.
    pub fn put(&self, mut connection: Connection) {
        let closed = connection.sender.as_ref().is_none_or(SendRequest::is_closed);
        if closed {
            return;
        }
        connection.reused = true;
        let mut idle = self.idle.lock();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }

    /// Drops connections that the replica closed.
    pub fn prune(&self) {
        let live = |connection: &Connection| match &connection.sender {
            Some(sender) => !sender.is_closed(),
            None => false,
        };
        self.idle.lock().retain(live);
    }

    /// Closes all idle connections.
    pub fn clear(&self) {
        self.idle.lock().clear();
    }
}
