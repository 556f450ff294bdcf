//! TLS by rustls; certificate and key are read again when their files change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

const LOOK_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Error)]
pub enum TlsError {
    #[error("{path}: {source}; it must be a readable PEM file")]
    Pem {
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    #[error("{0}: no certificate in it; it must hold the chain, the server's own first")]
    NoCertificate(PathBuf),
    #[error("certificate {certificate} and key {key} can't be used: {source}")]
    Unusable {
        certificate: PathBuf,
        key: PathBuf,
        source: rustls::Error,
    },
}

/// Terminates TLS with whatever certificate is valid now.
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    acceptor: RwLock<TlsAcceptor>,
}

impl Tls {
    /// # Errors
    /// When the files don't hold a certificate chain and its key.
    pub fn new(certificate: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let acceptor = RwLock::new(load(&certificate, &key)?);
        Ok(Self {
            certificate,
            key,
            acceptor,
        })
    }

    /// # Errors
    /// When the handshake fails.
    pub async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let acceptor = self.acceptor.read().clone();
        acceptor.accept(stream).await
    }

    /// Looks for changed files for ever; while they can't be used the old ones stay.
    pub async fn reload(self: Arc<Self>) {
        self.reload_every(LOOK_EVERY).await;
    }

    /// `reload` with another period.
    pub async fn reload_every(self: Arc<Self>, period: Duration) {
        let mut seen = self.changed();
        loop {
            tokio::time::sleep(period).await;
            let now = self.changed();
            if now == seen {
                continue;
            }
            match load(&self.certificate, &self.key) {
                Ok(acceptor) => {
                    *self.acceptor.write() = acceptor;
                    seen = now;
                    tracing::info!(certificate = %self.certificate.display(), "certificate read");
                }
                Err(error) => tracing::error!(%error, "the old certificate stays"),
            }
        }
    }

    fn changed(&self) -> [Option<SystemTime>; 2] {
        // Through links, as mounted Secrets are.
        [&self.certificate, &self.key].map(|path| {
            std::fs::metadata(path)
                .and_then(|file| file.modified())
                .ok()
        })
    }
}

fn load(certificate: &PathBuf, key: &PathBuf) -> Result<TlsAcceptor, TlsError> {
    let pem = |path: &PathBuf| {
        let path = path.clone();
        move |source| TlsError::Pem { path, source }
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificate)
        .map_err(pem(certificate))?
        .collect::<Result<_, _>>()
        .map_err(pem(certificate))?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate(certificate.clone()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unusable = |source| TlsError::Unusable {
        certificate: certificate.clone(),
        key: key.clone(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
