//! One batch to the collector: a unary call of gRPC, or a POST.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use prost::Message;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use crate::pb::{ExportReply, ExportRequest};
use crate::tls::{self, Tls};

const METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// What is read of a collector's answer.
const REPLY_BYTES_MAX: usize = 1 << 20;

/// How spans travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// A collector.
#[derive(Debug, Clone)]
pub struct Target {
    pub protocol: Protocol,
    /// `http://host:port` or `https://host:port`, with the path for HTTP.
    pub endpoint: String,
    /// What `https` is made with; without it no collector is trusted.
    pub tls: Option<Tls>,
    /// Sent with every batch.
    pub headers: Vec<(String, String)>,
    /// What it may take to answer.
    pub timeout: Duration,
}

/// Why nothing can ever be sent to a collector.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("the collector's address is none: {0}")]
    Endpoint(String),
    #[error("{name:?} cannot be a header of HTTP, or its value cannot")]
    Header { name: String },
    #[error("{}: {why}", path.display())]
    Pem { path: PathBuf, why: String },
}

/// Why a batch did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("it did not answer within {0:?}")]
    Late(Duration),
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    #[error("there is no TLS with it: {0}")]
    Untrusted(String),
    #[error("it refused them: {0}")]
    Refused(String),
    #[error("it took all but {count}: {message}")]
    Partly { count: u64, message: String },
}

/// A connection that is made when it is needed.
pub(crate) struct Client {
    way: Way,
    headers: HeaderMap,
    timeout: Duration,
}

#[expect(clippy::large_enum_variant, reason = "there is one of a process")]
enum Way {
    Grpc(Channel),
    Http {
        client: HttpClient<Connector, Full<Bytes>>,
        uri: Uri,
    },
}

/// TCP, and TLS upon it where the address says `https`.
type Connector = HttpsConnector<HttpConnector>;

// === impl Client ===

impl Client {
    /// Connects to nothing yet. Needs a runtime.
    pub(crate) fn new(target: &Target) -> Result<Self, TargetError> {
        let wrong = |error: &dyn std::fmt::Display| TargetError::Endpoint(error.to_string());
        let way = match target.protocol {
            Protocol::Grpc => {
                let endpoint = Endpoint::from_shared(target.endpoint.clone());
                let endpoint = endpoint.map_err(|error| wrong(&error))?;
                let endpoint = endpoint.connect_timeout(target.timeout);
                Way::Grpc(endpoint.connect_with_connector_lazy(connector(target, b"h2")?))
            }
            Protocol::HttpProtobuf => Way::Http {
                client: HttpClient::builder(TokioExecutor::new())
                    .build(connector(target, b"http/1.1")?),
                uri: target.endpoint.parse().map_err(|error| wrong(&error))?,
            },
        };
        Ok(Self {
            way,
            headers: headers(&target.headers)?,
            timeout: target.timeout,
        })
    }

    pub(crate) async fn send(&self, batch: ExportRequest) -> Result<(), SendError> {
        let sending = async {
            match &self.way {
                Way::Grpc(channel) => self.call(channel, batch).await,
                Way::Http { client, uri } => self.post(client, uri, &batch).await,
            }
        };
        let reply = timeout(self.timeout, sending)
            .await
            .map_err(|_| SendError::Late(self.timeout))??;
        match reply.partial_success {
            Some(partial) if partial.rejected_spans > 0 => Err(SendError::Partly {
                count: partial.rejected_spans.unsigned_abs(),
                message: partial.error_message,
            }),
            _ => Ok(()),
        }
    }

    async fn call(
        &self,
        channel: &Channel,
        batch: ExportRequest,
    ) -> Result<ExportReply, SendError> {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.map_err(|error| unreachable(&error))?;
        let mut request = tonic::Request::new(batch);
        *request.metadata_mut() = MetadataMap::from_headers(self.headers.clone());
        let codec = ProstCodec::<ExportRequest, ExportReply>::default();
        let reply = grpc
            .unary(request, PathAndQuery::from_static(METHOD), codec)
            .await;
        match reply {
            Ok(reply) => Ok(reply.into_inner()),
            // A status that a collector sent has no error beneath it.
            Err(status) if status.source().is_some() => Err(unreachable(&status)),
            Err(status) => Err(SendError::Refused(format!(
                "{:?}: {}",
                status.code(),
                status.message()
            ))),
        }
    }

    async fn post(
        &self,
        client: &HttpClient<Connector, Full<Bytes>>,
        uri: &Uri,
        batch: &ExportRequest,
    ) -> Result<ExportReply, SendError> {
        let refused = |why: String| SendError::Refused(why);
        let mut request = hyper::Request::new(Full::new(Bytes::from(batch.encode_to_vec())));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-protobuf"),
        );
        let reply = client
            .request(request)
            .await
            .map_err(|error| unreachable(&error))?;
        let status = reply.status();
        if !status.is_success() {
            return Err(refused(format!("HTTP status {status}")));
        }
        let body = Limited::new(reply.into_body(), REPLY_BYTES_MAX);
        let body = body.collect().await.map_err(|e| refused(e.to_string()))?;
        ExportReply::decode(body.to_bytes()).map_err(|error| refused(error.to_string()))
    }
}

// === free functions ===

fn headers(pairs: &[(String, String)]) -> Result<HeaderMap, TargetError> {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let wrong = || TargetError::Header { name: name.clone() };
        let key: HeaderName = name.parse().map_err(|_| wrong())?;
        let mut value: HeaderValue = value.parse().map_err(|_| wrong())?;
        value.set_sensitive(true);
        headers.insert(key, value);
    }
    Ok(headers)
}

fn connector(target: &Target, protocol: &[u8]) -> Result<Connector, TargetError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    let tls = tls::config(target.tls.as_ref(), protocol)?;
    Ok(Connector::from((tcp, tls)))
}

/// Says what happened, which is the sentence at the bottom.
fn unreachable(error: &(dyn Error + 'static)) -> SendError {
    let mut error = error;
    loop {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return SendError::Untrusted(tls.to_string());
        }
        // An I/O error that wraps another one does not call it its source.
        let io = error.downcast_ref::<io::Error>();
        let wrapped = io.and_then(io::Error::get_ref);
        let below = wrapped.map(|wrapped| wrapped as &(dyn Error + 'static));
        let Some(below) = below.or_else(|| error.source()) else {
            return SendError::Unreachable(error.to_string());
        };
        error = below;
    }
}
