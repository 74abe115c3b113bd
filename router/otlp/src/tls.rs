//! TLS to a collector: whom we trust, and what we show.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::client::TargetError;

/// What connections by `https` are made with: files of PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Root certificates that are trusted; no others are.
    pub roots: PathBuf,
    /// What a collector that asks for one is shown.
    pub client: Option<ClientCertificate>,
}

/// A certificate of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// It, and those between it and a root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

// === free functions ===

/// What a connection is made with; without `tls` nobody is trusted. `protocol` is the one that is
/// spoken, as ALPN names it.
pub(crate) fn config(tls: Option<&Tls>, protocol: &[u8]) -> Result<ClientConfig, TargetError> {
    let roots = tls.map_or_else(|| Ok(RootCertStore::empty()), |tls| roots(&tls.roots))?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has what TLS 1.2 and 1.3 need; this is a bug of our manifest")
        .with_root_certificates(roots);
    let mut config = match tls.and_then(|tls| tls.client.as_ref()) {
        None => config.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::from_pem_file(&own.key);
            let none = "it has no private key in PEM that needs no password";
            let key = key.map_err(|error| unread(&own.key, &error, none))?;
            let chain = certificates(&own.certificate)?;
            let config = config.with_client_auth_cert(chain, key);
            config.map_err(|error| wrong(&own.certificate, error))?
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

fn roots(path: &Path) -> Result<RootCertStore, TargetError> {
    let mut roots = RootCertStore::empty();
    // A system's file may have old ones among it, of forms that nobody reads any more.
    let (added, ignored) = roots.add_parsable_certificates(certificates(path)?);
    if added == 0 {
        return Err(wrong(
            path,
            format!("none of its {ignored} certificates can be a root"),
        ));
    }
    Ok(roots)
}

/// One at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TargetError> {
    let unread = |error| unread(path, &error, "it has no certificate in PEM");
    let found = CertificateDer::pem_file_iter(path).map_err(unread)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unread)?;
    if found.is_empty() {
        return Err(unread(PemError::NoItemsFound));
    }
    Ok(found)
}

fn unread(path: &Path, error: &PemError, none: &str) -> TargetError {
    if matches!(error, PemError::NoItemsFound) {
        return wrong(path, none);
    }
    wrong(path, error)
}

fn wrong(path: &Path, why: impl Display) -> TargetError {
    TargetError::Pem {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

#[cfg(test)]
mod tests;
