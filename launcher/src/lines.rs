//! Lines of a child's pipe, in bounded memory and without losing a byte.

use std::collections::VecDeque;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longer lines are passed on in pieces of this length.
pub(crate) const LINE_MAX: usize = 1 << 20;
/// Bytes asked of the pipe at once.
const READ: usize = 32 << 10;

/// Reads lines; each pipe has one.
pub(crate) struct Lines<R> {
    reader: R,
    /// Bytes read and not yet handed out: `buffer[start..]`.
    buffer: Vec<u8>,
    start: usize,
    /// No newline lies before this index.
    scanned: usize,
}

// === impl Lines ===

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::with_capacity(READ),
            start: 0,
            scanned: 0,
        }
    }

    /// The next line without its end, or the last one without a newline; `None` at the end.
    pub(crate) async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let newline = self.buffer[self.scanned..]
                .iter()
                .position(|byte| *byte == b'\n');
            if let Some(at) = newline.map(|at| self.scanned + at) {
                let line = self.start..at;
                (self.start, self.scanned) = (at + 1, at + 1);
                let line = &self.buffer[line];
                return Ok(Some(line.strip_suffix(b"\r").unwrap_or(line)));
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() - self.start >= LINE_MAX {
                let piece = self.start..self.start + LINE_MAX;
                (self.start, self.scanned) = (piece.end, piece.end);
                return Ok(Some(&self.buffer[piece]));
            }
            self.buffer.drain(..self.start);
            (self.start, self.scanned) = (0, self.buffer.len());
            self.buffer.reserve(READ);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                let rest = self.buffer.len();
                (self.start, self.scanned) = (rest, rest);
                return Ok((rest > 0).then(|| &self.buffer[..]));
            }
        }
    }
}

/// The end of a log, kept for the case that it explains a death.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<String>);

/// Lines and bytes of each that explain a death.
const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 1024;

// === impl Tail ===

impl Tail {
    pub(crate) fn push(&mut self, line: &[u8]) {
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        let line = &line[..line.len().min(TAIL_LINE_BYTES)];
        self.0.push_back(String::from_utf8_lossy(line).into_owned());
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{LINE_MAX, Lines, Tail};

    async fn all(bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Lines::new(bytes);
        let mut all = Vec::new();
        while let Some(line) = lines.next().await.expect("a slice reads without errors") {
            all.push(line.to_vec());
        }
        all
    }

    #[tokio::test(flavor = "current_thread")]
    async fn lines_come_whole_and_the_last_needs_no_newline() {
        assert!(all(b"").await.is_empty());
        let expected: [&[u8]; 5] = [b"a", b"", b"b", b"c\xff", b"d"];
        assert_eq!(all(b"a\n\nb\r\nc\xff\nd").await, expected);
        assert_eq!(all(b"d\n").await, [b"d"]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_line_of_three_megabytes_loses_nothing() {
        let mut long = vec![b'x'; 3_000_000];
        long[2_999_999] = b'y';
        let mut bytes = b"before\n".to_vec();
        bytes.extend_from_slice(&long);
        bytes.extend_from_slice(b"\nafter");
        let lines = all(&bytes).await;
        assert_eq!(lines.len(), 2 + long.len().div_ceil(LINE_MAX));
        assert_eq!(lines[1..lines.len() - 1].concat(), long);
        assert_eq!(lines[lines.len() - 1], b"after");
    }

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::default();
        for n in 0..100 {
            tail.push(format!("line {n}").as_bytes());
            tail.push(b"  ");
        }
        tail.push(&[b'z'; 5000]);
        let lines = tail.lines();
        assert_eq!(lines.len(), 20);
        assert_eq!(lines[0], "line 81");
        assert_eq!(lines[19].len(), 1024);
    }
}
