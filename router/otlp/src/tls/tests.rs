//! Both transports against collectors with certificates of `testdata`, good and bad.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::{ClientCertificate, Tls, certificates};
use crate::client::Client;
use crate::pb::{ExportRequest, Resource, request};
use crate::{Kind, Limits, Protocol, Span, SpanId, Target, TraceId, exporter};

const BOTH: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

fn file(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "testdata", name]
        .iter()
        .collect()
}

fn trusting(roots: &str) -> Tls {
    Tls {
        roots: file(roots),
        client: None,
    }
}

fn showing(certificate: &str, key: &str) -> Tls {
    Tls {
        client: Some(ClientCertificate {
            certificate: file(certificate),
            key: file(key),
        }),
        ..trusting("ca.pem")
    }
}

/// Whether a collector asks who we are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    Nothing,
    Certificate,
}

/// What a collector shows.
fn acceptor(asks: Asks, protocol: Protocol) -> TlsAcceptor {
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = if asks == Asks::Certificate {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates(&file("ca.pem")).unwrap());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        config.with_client_cert_verifier(verifier.build().unwrap())
    } else {
        config.with_no_client_auth()
    };
    let chain = certificates(&file("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(file("server.key")).unwrap();
    let mut config = config.with_single_cert(chain, key).unwrap();
    // Whoever asks for another protocol is refused.
    config.alpn_protocols = match protocol {
        Protocol::Grpc => vec![b"h2".to_vec()],
        Protocol::HttpProtobuf => vec![b"http/1.1".to_vec()],
    };
    TlsAcceptor::from(Arc::new(config))
}

/// A collector: its port, and what it gets.
async fn collector(asks: Asks, protocol: Protocol) -> (u16, mpsc::Receiver<ExportRequest>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = acceptor(asks, protocol);
    let (taken, batches) = mpsc::channel(8);
    let service = service_fn(move |request| take(request, protocol, taken.clone()));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let stream = match acceptor.accept(stream).into_fallible().await {
                Ok(stream) => TokioIo::new(stream),
                Err((_, mut stream)) => {
                    // Closed with something unread, it would take the reason along.
                    tokio::io::copy(&mut stream, &mut tokio::io::sink())
                        .await
                        .unwrap_or_default();
                    continue;
                }
            };
            // A client that goes away is none of a collector's mistakes.
            match protocol {
                Protocol::Grpc => http2::Builder::new(TokioExecutor::new())
                    .serve_connection(stream, service.clone())
                    .await
                    .unwrap_or_default(),
                Protocol::HttpProtobuf => http1::Builder::new()
                    .serve_connection(stream, service.clone())
                    .await
                    .unwrap_or_default(),
            }
        }
    });
    (port, batches)
}

/// Takes all spans of a request.
async fn take(
    request: Request<Incoming>,
    protocol: Protocol,
    taken: mpsc::Sender<ExportRequest>,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    // A message of gRPC comes after a byte and its length, and its status after the answer.
    let (prefix, kind) = match protocol {
        Protocol::Grpc => (5, "application/grpc"),
        Protocol::HttpProtobuf => (0, "application/x-protobuf"),
    };
    let batch = ExportRequest::decode(body.slice(prefix..)).unwrap();
    taken.send(batch).await.unwrap();
    let trailers = (protocol == Protocol::Grpc).then(|| {
        let status = ("grpc-status".parse().unwrap(), "0".parse().unwrap());
        Ok(HeaderMap::from_iter([status]))
    });
    let reply = Full::new(Bytes::from(vec![0; prefix])).with_trailers(async { trailers });
    let reply = Response::builder().header("content-type", kind).body(reply);
    Ok(reply.unwrap())
}

fn target(protocol: Protocol, endpoint: String, tls: Option<Tls>) -> Target {
    Target {
        protocol,
        endpoint,
        tls,
        headers: Vec::new(),
        timeout: Duration::from_secs(60),
    }
}

fn span() -> Span {
    Span {
        trace: TraceId([1; 16]),
        id: SpanId(1),
        parent: None,
        state: None,
        name: "name".into(),
        kind: Kind::Internal,
        begin: 10,
        end: 20,
        attributes: Vec::new(),
        events: Vec::new(),
        links: Vec::new(),
        error: None,
    }
}

/// A span to a collector: `name` or why it did not arrive.
async fn sent(asks: Asks, host: &str, tls: Option<&Tls>, protocol: Protocol) -> String {
    let (port, mut batches) = collector(asks, protocol).await;
    let target = target(protocol, format!("https://{host}:{port}"), tls.cloned());
    let client = Client::new(&target).unwrap();
    let batch = request(&Resource::new(Vec::new()), vec![span()]);
    match client.send(batch).await {
        Ok(()) => batches.recv().await.unwrap().resource_spans[0].scope_spans[0].spans[0]
            .name
            .clone(),
        Err(error) => {
            batches.try_recv().unwrap_err();
            error.to_string()
        }
    }
}

#[tokio::test]
async fn a_collector_whose_root_is_trusted_gets_spans() {
    for protocol in BOTH {
        let tls = trusting("ca.pem");
        let told = sent(Asks::Nothing, "127.0.0.1", Some(&tls), protocol).await;
        assert_eq!(told, "name", "{protocol:?}");
    }
}

#[tokio::test]
async fn whom_nobody_vouches_for_gets_none_and_the_reason_is_told() {
    let (ca, other) = (trusting("ca.pem"), trusting("other.pem"));
    for (host, tls, why) in [
        ("127.0.0.1", Some(&other), "UnknownIssuer"),
        ("127.0.0.1", None, "UnknownIssuer"),
        ("localhost", Some(&ca), "not valid for name \"localhost\""),
    ] {
        for protocol in BOTH {
            let told = sent(Asks::Nothing, host, tls, protocol).await;
            assert!(told.starts_with("there is no TLS with it: "), "{told}");
            assert!(told.contains(why), "{protocol:?}: {told}");
        }
    }
}

#[tokio::test]
async fn a_collector_that_asks_for_a_certificate_gets_ours() {
    for protocol in BOTH {
        let own = showing("client.pem", "client.key");
        let told = sent(Asks::Certificate, "127.0.0.1", Some(&own), protocol).await;
        assert_eq!(told, "name", "{protocol:?}");
        let none = trusting("ca.pem");
        let told = sent(Asks::Certificate, "127.0.0.1", Some(&none), protocol).await;
        assert!(told.contains("CertificateRequired"), "{protocol:?}: {told}");
    }
}

#[tokio::test]
async fn a_collector_without_tls_is_told_of() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let reply = b"HTTP/1.1 400 Bad Request\r\n\r\n";
            tokio::io::AsyncWriteExt::write_all(&mut stream, reply)
                .await
                .unwrap();
        }
    });
    for protocol in BOTH {
        let endpoint = format!("https://{address}");
        let client = Client::new(&target(protocol, endpoint, Some(trusting("ca.pem")))).unwrap();
        let batch = request(&Resource::new(Vec::new()), vec![span()]);
        let told = client.send(batch).await.unwrap_err().to_string();
        assert!(told.starts_with("there is no TLS with it: "), "{told}");
    }
}

#[tokio::test]
async fn spans_for_an_untrusted_collector_are_counted_as_failed() {
    let (port, _batches) = collector(Asks::Nothing, Protocol::Grpc).await;
    let endpoint = format!("https://127.0.0.1:{port}");
    let target = target(Protocol::Grpc, endpoint, Some(trusting("other.pem")));
    let limits = Limits {
        queue_max: 8,
        batch_max: 8,
        delay: Duration::from_secs(3600),
    };
    let (exporter, worker) = exporter(&target, Vec::new(), limits).unwrap();
    exporter.export(vec![span(), span()]);
    exporter.close();
    worker.run().await;
    let counts = exporter.counts();
    assert_eq!((counts.failed, counts.sent), (2, 0));
}

#[tokio::test]
async fn files_that_say_nothing_are_refused_at_once() {
    for (tls, why) in [
        (trusting("missing.pem"), "testdata/missing.pem: I/O error"),
        (
            trusting("server.key"),
            "testdata/server.key: it has no certificate in PEM",
        ),
        (
            showing("server.key", "client.key"),
            "testdata/server.key: it has no certificate in PEM",
        ),
        (
            showing("client.pem", "client.pem"),
            "testdata/client.pem: it has no private key in PEM that needs no password",
        ),
        (
            showing("client.pem", "server.key"),
            "testdata/client.pem: keys may not be consistent",
        ),
    ] {
        let target = target(Protocol::Grpc, "https://127.0.0.1:1".to_owned(), Some(tls));
        let error = Client::new(&target).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
}
