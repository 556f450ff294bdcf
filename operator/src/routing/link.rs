//! What is kept up with one router: it has the latest table, and its reports come in.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::reports::Line;
use super::{Routing, Table};
use crate::actuate::{Signer, TokenError};
use crate::http::{self, PodError, accepted};
use crate::scaling::{Board, Key};

const DEADLINE: Duration = Duration::from_secs(5);
/// Before what failed is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// A report comes each second: silence means that the router hangs.
const SILENCE: Duration = Duration::from_secs(4);
/// A line is about 300 bytes a service and replica.
const LONGEST_LINE: usize = 32 << 20;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("it has said nothing for {} s", SILENCE.as_secs())]
    Silent,
    #[error("a line of its reports is too long")]
    TooLong,
}

/// Talks to routers' control ports.
pub struct Caller {
    http: reqwest::Client,
    port: u16,
    signer: Signer,
}

impl Caller {
    pub fn new(port: u16, signer: Signer) -> Result<Self, reqwest::Error> {
        let http = http::client(DEADLINE).build()?;
        Ok(Caller { http, port, signer })
    }

    async fn put_table(&self, at: IpAddr, uid: &str, table: &Table) -> Result<(), LinkError> {
        let request = self.http.put(self.url(at, "table")).timeout(DEADLINE);
        let token = self.signer.sign(uid)?;
        let response = request.bearer_auth(token).json(table).send().await;
        accepted(response).await?;
        Ok(())
    }

    async fn watch(&self, at: IpAddr, uid: &str) -> Result<reqwest::Response, LinkError> {
        let token = self.signer.sign(uid)?;
        let request = self.http.get(self.url(at, "watch")).bearer_auth(token);
        Ok(accepted(request.send().await).await?)
    }

    fn url(&self, at: IpAddr, what: &str) -> String {
        format!(
            "http://{}/control/v1/{what}",
            SocketAddr::new(at, self.port)
        )
    }
}

pub struct Link {
    pub uid: String,
    pub address: IpAddr,
    pub caller: Arc<Caller>,
    pub routing: Arc<Routing>,
    pub board: Arc<Board>,
}

impl Link {
    /// Until it is aborted: the router's pod is gone.
    pub async fn keep(self, table: watch::Receiver<Option<Arc<Table>>>) {
        tokio::join!(self.inform(table), self.listen());
    }

    async fn inform(&self, mut table: watch::Receiver<Option<Arc<Table>>>) {
        table.mark_changed();
        let mut failing = false;
        while table.changed().await.is_ok() {
            let Some(latest) = table.borrow_and_update().clone() else {
                continue;
            };
            let pushed = self
                .caller
                .put_table(self.address, &self.uid, &latest)
                .await;
            let outcome = if pushed.is_ok() { "ok" } else { "error" };
            metrics::counter!("stoker_operator_tables_total", "result" => outcome).increment(1);
            match pushed {
                Ok(()) => {
                    debug!(router = self.uid, version = latest.version, "table pushed");
                    failing = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(router = self.uid, %error, "could not push the table");
                    }
                    tokio::time::sleep(PAUSE).await;
                    table.mark_changed();
                }
            }
        }
    }

    async fn listen(&self) {
        let mut failing = false;
        loop {
            let mut heard = false;
            let Err(error) = self.read(&mut heard).await else {
                continue;
            };
            failing &= !heard;
            if !std::mem::replace(&mut failing, true) {
                warn!(router = self.uid, %error, "lost its reports");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reads lines until the stream ends.
    async fn read(&self, heard: &mut bool) -> Result<(), LinkError> {
        let watching = self.caller.watch(self.address, &self.uid);
        let response = timeout(DEADLINE, watching).await;
        let mut chunks = response.map_err(|_| LinkError::Silent)??.bytes_stream();
        let mut buffer = Vec::new();
        loop {
            let chunk = timeout(SILENCE, chunks.next()).await;
            let Some(chunk) = chunk.map_err(|_| LinkError::Silent)? else {
                return Ok(());
            };
            buffer.extend_from_slice(&chunk.map_err(PodError::from)?);
            if buffer.len() > LONGEST_LINE {
                return Err(LinkError::TooLong);
            }
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                *heard |= self.take(&line);
            }
        }
    }

    /// Whether the line could be read.
    fn take(&self, line: &[u8]) -> bool {
        match serde_json::from_slice(line) {
            Ok(Line::Queues { services }) => self.routing.reports.keep(&self.uid, services),
            Ok(Line::Wake { namespace, name }) => {
                let key = Key { namespace, name };
                self.routing.reports.woken(&self.uid, &key);
                self.board.rouse(&key);
            }
            Err(error) => {
                debug!(router = self.uid, %error, "not a report");
                return false;
            }
        }
        true
    }
}
