//! Exporters against collectors that answer, that are slow, and that are not there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Counts, Limits, exporter};
use crate::pb::{Any, ExportReply, ExportRequest, PartialSuccess};
use crate::{Kind, Protocol, Span, SpanId, Target, TraceId};

const LIMITS: Limits = Limits {
    queue_max: 4,
    batch_max: 3,
    delay: Duration::from_secs(3600),
};

fn span(id: u64) -> Span {
    Span {
        trace: TraceId([1; 16]),
        id: SpanId(id),
        parent: (id > 1).then_some(SpanId(1)),
        state: Some("a=b".into()),
        name: "name".into(),
        kind: Kind::Internal,
        begin: 10,
        end: 20,
        attributes: vec![("count", 3_u32.into())],
        events: Vec::new(),
        links: Vec::new(),
        error: (id == 2).then(|| "why".into()),
    }
}

fn target(protocol: Protocol, endpoint: String) -> Target {
    Target {
        protocol,
        endpoint,
        tls: None,
        headers: vec![("x-key".to_owned(), "sesame".to_owned())],
        timeout: Duration::from_secs(5),
    }
}

/// The head of a POST, and its body.
async fn read(stream: &mut TcpStream) -> (String, Bytes) {
    let mut bytes = Vec::new();
    loop {
        stream.read_buf(&mut bytes).await.unwrap();
        let Some(head) = bytes.windows(4).position(|end| end == b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8(bytes[..head].to_vec()).unwrap();
        let length = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let end = head + 4 + length.unwrap().parse::<usize>().unwrap();
        if bytes.len() >= end {
            return (text, bytes[head + 4..end].to_vec().into());
        }
    }
}

/// A collector that reads these many batches and answers each alike.
async fn collect(listener: TcpListener, status: &str, reply: ExportReply) -> Vec<Seen> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let (head, body) = read(&mut stream).await;
        seen.push((head, ExportRequest::decode(body).unwrap()));
        let body = reply.encode_to_vec();
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
    }
    seen
}

type Seen = (String, ExportRequest);

/// Four spans by HTTP: what the collector saw, and how they were counted.
async fn sent(status: &'static str, reply: ExportReply) -> (Vec<Seen>, Counts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let target = target(
        Protocol::HttpProtobuf,
        format!("http://{address}/v1/traces"),
    );
    let resource = vec![("service.name".to_owned(), "llm".to_owned())];
    let (exporter, worker) = exporter(&target, resource, LIMITS).unwrap();
    let collecting = tokio::spawn(collect(listener, status, reply));
    exporter.export(vec![span(1), span(2)]);
    exporter.export(vec![span(3), span(4)]);
    exporter.close();
    worker.run().await;
    (collecting.await.unwrap(), exporter.counts())
}

#[tokio::test]
async fn what_waits_at_the_end_is_sent_in_batches() {
    let (seen, counts) = sent("200 OK", ExportReply::default()).await;
    assert_eq!(
        counts,
        Counts {
            sent: 4,
            ..Counts::default()
        }
    );
    assert!(seen[0].0.starts_with("POST /v1/traces HTTP/1.1"));
    assert!(seen[0].0.contains("content-type: application/x-protobuf"));
    assert!(seen[0].0.contains("x-key: sesame"));
    let batches: Vec<_> = seen
        .iter()
        .map(|(_, batch)| &batch.resource_spans[0])
        .collect();
    let resource = batches[0].resource.as_ref().unwrap();
    let name = resource.attributes[0].value.clone().unwrap().value;
    assert_eq!(name, Some(Any::Text("llm".to_owned())));
    let spans: Vec<_> = batches
        .iter()
        .flat_map(|b| &b.scope_spans[0].spans)
        .collect();
    assert_eq!(spans.len(), 4);
    assert_eq!(batches[0].scope_spans[0].spans.len(), LIMITS.batch_max);
    assert_eq!(&spans[1].span_id[..], [0, 0, 0, 0, 0, 0, 0, 2]);
    assert_eq!(&spans[1].parent_span_id[..], [0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(spans[0].parent_span_id.is_empty());
    assert_eq!(spans[1].status.as_ref().unwrap().code, 2);
    assert_eq!(
        (spans[0].start_time_unix_nano, spans[0].end_time_unix_nano),
        (10, 20)
    );
}

#[tokio::test]
async fn what_a_collector_refuses_is_counted() {
    let partial = PartialSuccess {
        rejected_spans: 1,
        error_message: "too old".to_owned(),
    };
    let reply = ExportReply {
        partial_success: Some(partial),
    };
    let (_, counts) = sent("200 OK", reply).await;
    assert_eq!((counts.sent, counts.failed), (2, 2), "one of each batch");
    let (_, counts) = sent("503 Service Unavailable", ExportReply::default()).await;
    assert_eq!((counts.sent, counts.failed), (0, 4));
}

#[tokio::test]
async fn a_collector_that_is_not_there_keeps_nobody() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let target = target(protocol, format!("http://{address}"));
        let (exporter, worker) = exporter(&target, Vec::new(), LIMITS).unwrap();
        exporter.export(vec![span(1)]);
        exporter.close();
        worker.run().await;
        assert_eq!(exporter.counts().failed, 1, "{protocol:?}");
    }
}

#[tokio::test]
async fn spans_beyond_the_queue_are_dropped_whole_traces_at_a_time() {
    let target = target(Protocol::Grpc, "http://127.0.0.1:1".to_owned());
    let (exporter, worker) = exporter(&target, Vec::new(), LIMITS).unwrap();
    for _ in 0..3 {
        exporter.export(vec![span(1), span(2), span(3)]);
    }
    assert_eq!(exporter.counts().dropped, 6);
    exporter.export(vec![span(1)]);
    assert_eq!(exporter.counts().dropped, 6, "there is room for one more");
    drop(worker);
}

#[tokio::test]
async fn a_header_that_is_none_is_refused() {
    let mut target = target(Protocol::Grpc, "http://127.0.0.1:1".to_owned());
    target.headers[0].1 = "line\nbreak".to_owned();
    let error = exporter(&target, Vec::new(), LIMITS).unwrap_err();
    assert!(error.to_string().contains("x-key"), "{error}");
    assert!(
        !error.to_string().contains("break"),
        "the value may be a secret"
    );
}
