//! The client: every stream is one connection whose events are read as they come. HTTP is spoken
//! by hand, so that the client takes as little of the cores as it can.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::Instant;

use crate::process::{Usage, usage};
use crate::stamp::age_us;

/// Bytes read at one time.
const READ_BYTES: usize = 16 << 10;
/// Before the id of an event's token, which is the event's first id.
const ID: &[u8] = b"\"id\":";

/// Who is watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watched {
    pub(crate) router: u32,
    pub(crate) stub: u32,
}

/// One edge of the time in which every stream is open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edge {
    pub(crate) at: Instant,
    pub(crate) tokens: u64,
    pub(crate) router: Usage,
    pub(crate) stub: Usage,
    pub(crate) client: Usage,
}

/// What happened in one wave of streams.
#[derive(Debug, Default)]
pub(crate) struct Wave {
    /// When the last stream had its first token, and when the first had its last.
    pub(crate) edges: Option<(Edge, Edge)>,
    /// Ages of the tokens between the edges.
    pub(crate) ages_us: Vec<u32>,
    /// Streams that did not get all their tokens.
    pub(crate) failed: u32,
}

/// Shared by the streams of a wave, which run on one thread.
#[derive(Debug)]
struct Tally {
    streams: u32,
    watched: Watched,
    started: u32,
    tokens: u64,
    begin: Option<Edge>,
    wave: Wave,
}

/// Opens all streams at once and reads them to their end.
pub(crate) async fn wave(
    address: SocketAddr,
    (streams, tokens): (u32, u32),
    watched: Watched,
) -> Wave {
    let tally = Tally {
        streams,
        watched,
        started: 0,
        tokens: 0,
        begin: None,
        wave: Wave::default(),
    };
    let tally = Rc::new(RefCell::new(tally));
    let local = LocalSet::new();
    for n in 0..streams {
        let tally = Rc::clone(&tally);
        local.spawn_local(async move {
            let got = read(address, request(n, tokens), &tally).await;
            if !got.is_ok_and(|got| got == tokens) {
                tally.borrow_mut().wave.failed += 1;
            }
        });
    }
    local.await;
    std::mem::take(&mut tally.borrow_mut().wave)
}

fn request(n: u32, tokens: u32) -> String {
    let body =
        format!(r#"{{"inputs":"stream {n:06}","parameters":{{"max_new_tokens":{tokens}}}}}"#);
    format!(
        "POST /generate_stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads one stream to its end; the number of its tokens.
async fn read(
    address: SocketAddr,
    request: String,
    tally: &RefCell<Tally>,
) -> Result<u32, io::Error> {
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(request.as_bytes()).await?;
    let mut buffer = Vec::with_capacity(READ_BYTES);
    let mut got = 0;
    while connection.read_buf(&mut buffer).await? > 0 {
        let mut tally = tally.borrow_mut();
        let read = events(&buffer, |id| {
            tally.token(got == 0, age_us(id));
            got += 1;
        });
        buffer.drain(..read);
    }
    tally.borrow_mut().ended();
    Ok(got)
}

/// Calls `each` with the token of every complete event; how many bytes they took.
fn events(buffer: &[u8], mut each: impl FnMut(u32)) -> usize {
    let mut read = 0;
    while let Some(len) = find(&buffer[read..], b"\n\n") {
        let event = &buffer[read..read + len];
        read += len + 2;
        let Some(at) = find(event, ID) else { continue };
        let digits = event[at + ID.len()..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit());
        each(digits.fold(0, |id, digit| id * 10 + u32::from(digit - b'0')));
    }
    read
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = needle[0];
    let mut from = 0;
    while let Some(at) = haystack[from..].iter().position(|&byte| byte == first) {
        if haystack[from + at..].starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

// === impl Tally ===

impl Tally {
    fn token(&mut self, first: bool, age_us: u32) {
        self.tokens += 1;
        if first {
            self.started += 1;
            if self.started == self.streams {
                self.begin = self.edge();
            }
        }
        if self.begin.is_some() && self.wave.edges.is_none() {
            self.wave.ages_us.push(age_us);
        }
    }

    fn ended(&mut self) {
        if let (Some(begin), None) = (self.begin, self.wave.edges) {
            self.wave.edges = self.edge().map(|end| (begin, end));
        }
    }

    /// `None` when a process has ended: then there is nothing to measure.
    fn edge(&self) -> Option<Edge> {
        Some(Edge {
            at: Instant::now(),
            tokens: self.tokens,
            router: usage(self.watched.router).ok()?,
            stub: usage(self.watched.stub).ok()?,
            client: usage(std::process::id()).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_in_pieces() {
        let text = b"c8\r\ndata: {\"token\":{\"id\":417,\"text\":\"a\"}}\n\n\r\n10\r\ndata: {\"id\":5}\n\nda";
        let mut ids = Vec::new();
        let read = events(text, |id| ids.push(id));
        assert_eq!(ids, [417, 5]);
        assert_eq!(&text[read..], b"da");
    }
}
