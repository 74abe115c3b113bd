//! The launcher's own standard output. A thread of its own writes it, fed by a bounded queue that
//! drops and counts: whoever reads our output may be slow, the children never wait for that.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use crate::secrets::Secrets;

/// Lines that wait for the terminal at most, and their bytes.
const QUEUE_LINES: usize = 8192;
const QUEUE_BYTES: usize = 16 << 20;
/// Lines are written together up to this size.
const WRITE_BYTES: usize = 64 << 10;
/// What is still queued at the end gets this long to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// A handle to the log; clones feed the same queue.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    queue: SyncSender<Item>,
    counts: Arc<Counts>,
    is_json: bool,
    secrets: Arc<Secrets>,
}

#[derive(Debug, Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Item {
    /// Whole lines, ends included.
    Lines(Vec<u8>),
    Flush(SyncSender<()>),
}

// === impl Output ===

impl Output {
    /// Starts the thread that writes to `sink`, without the secrets.
    pub(crate) fn start<W: Write + Send + 'static>(
        sink: W,
        is_json: bool,
        secrets: Secrets,
    ) -> io::Result<Self> {
        let (queue, items) = sync_channel(QUEUE_LINES);
        let counts = Arc::new(Counts::default());
        let output = Self {
            queue,
            counts: counts.clone(),
            is_json,
            secrets: Arc::new(secrets),
        };
        let writer = output.clone();
        thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || writer.write_all(&items, sink))?;
        Ok(output)
    }

    pub(crate) fn is_json(&self) -> bool {
        self.is_json
    }

    /// Queues whole lines, or drops and counts them.
    pub(crate) fn push(&self, lines: Vec<u8>) {
        let bytes = lines.len();
        let queued = self.counts.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let is_full = queued + bytes > QUEUE_BYTES;
        if is_full || self.queue.try_send(Item::Lines(lines)).is_err() {
            self.counts.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line of a child's log, with the child's name.
    pub(crate) fn child_line(&self, name: &str, line: &[u8]) {
        let is_object = || serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok();
        let mut bytes = Vec::with_capacity(name.len() + line.len() + 4);
        if !self.is_json {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b" | ");
            bytes.extend_from_slice(line);
        } else if line.first() == Some(&b'{') && is_object() {
            bytes.extend_from_slice(line);
        } else {
            let message = String::from_utf8_lossy(line);
            let object = serde_json::json!({"level": "INFO", "message": message, "target": name});
            bytes.extend_from_slice(object.to_string().as_bytes());
        }
        bytes.push(b'\n');
        self.push(bytes);
    }

    /// Returns when everything queued so far is written, or after a second.
    pub(crate) fn flush(&self) {
        let (done, is_done) = sync_channel(1);
        match self.queue.try_send(Item::Flush(done)) {
            // A full queue is one that nobody reads; the thread ends with the process.
            Ok(()) => drop(is_done.recv_timeout(FLUSH)),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }

    fn write_all<W: Write>(&self, items: &Receiver<Item>, mut sink: W) {
        let mut is_open = true;
        let mut text = Vec::new();
        while let Ok(item) = items.recv() {
            let mut flushes = Vec::new();
            text.clear();
            let mut next = Some(item);
            while let Some(item) = next {
                match item {
                    Item::Lines(lines) => {
                        self.counts
                            .queued_bytes
                            .fetch_sub(lines.len(), Ordering::Relaxed);
                        text.extend_from_slice(&self.secrets.hide(&lines));
                    }
                    Item::Flush(done) => flushes.push(done),
                }
                next = if text.len() < WRITE_BYTES {
                    items.try_recv().ok()
                } else {
                    None
                };
            }
            text.extend_from_slice(self.dropped_notice().as_bytes());
            // A closed output is no reason to stop serving.
            is_open = is_open && sink.write_all(&text).and_then(|()| sink.flush()).is_ok();
            for done in flushes {
                done.try_send(()).ok();
            }
        }
    }

    fn dropped_notice(&self) -> String {
        let dropped = self.counts.dropped.swap(0, Ordering::Relaxed);
        let mut notice = String::new();
        if dropped > 0 {
            let message =
                format!("{dropped} log lines were dropped: this output is read too slowly");
            let written = if self.is_json {
                let object = serde_json::json!({"level": "WARN", "message": message});
                writeln!(notice, "{object}")
            } else {
                writeln!(notice, "headrace | {message}")
            };
            written.expect("writing to a string cannot fail");
        }
        notice
    }
}

/// One event of the launcher's own log: `tracing` writes it whole.
impl Write for &Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::Output;
    use crate::secrets::Secrets;

    /// A terminal that takes a write only when told to.
    struct Gate {
        tickets: Receiver<()>,
        written: Sender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.tickets.recv().map_err(io::Error::other)?;
            self.written
                .send(bytes.to_vec())
                .map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated(is_json: bool) -> (Output, Sender<()>, Receiver<Vec<u8>>) {
        let ((ticket, tickets), (written, texts)) = (channel(), channel());
        let gate = Gate { tickets, written };
        let output = Output::start(gate, is_json, Secrets::default()).expect("a thread starts");
        (output, ticket, texts)
    }

    #[test]
    fn a_stuck_reader_costs_lines_and_never_time() {
        let (output, ticket, texts) = gated(false);
        let line = vec![b'x'; 1 << 20];
        for _ in 0..40 {
            output.child_line("shard-0", &line);
        }
        for _ in 0..40 {
            ticket.send(()).expect("the gate is open");
        }
        output.flush();
        let text = texts.try_iter().collect::<Vec<_>>().concat();
        let text = String::from_utf8_lossy(&text);
        let kept = text.lines().filter(|line| line.ends_with('x')).count();
        assert!((10..=17).contains(&kept), "{kept} lines of a mebibyte");
        // Told in one notice or in several, as the writer finds them.
        let told = text
            .lines()
            .filter_map(|line| line.split_once(" log lines were dropped"))
            .filter_map(|(before, _)| before.rsplit(' ').next()?.parse::<usize>().ok())
            .sum::<usize>();
        assert_eq!(kept + told, 40);
    }

    #[test]
    fn json_output_stays_json() {
        let (output, ticket, texts) = gated(true);
        output.child_line("router", br#"{"level":"INFO","message":"a"}"#);
        output.child_line("shard-0", b"Traceback \"x\" \xff");
        for _ in 0..3 {
            ticket.send(()).expect("the gate is open");
        }
        output.flush();
        let text = String::from_utf8(texts.try_iter().collect::<Vec<_>>().concat());
        let text = text.expect("json is utf-8");
        let messages: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("a json line"))
            .collect();
        assert_eq!(messages[0]["message"], "a");
        assert_eq!(messages[1]["message"], "Traceback \"x\" \u{fffd}");
        assert_eq!(messages[1]["target"], "shard-0");
    }
}
