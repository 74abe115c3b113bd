//! What children tell the launcher: JSON objects on their standard output, one a line.

use std::path::PathBuf;

use serde::Deserialize;

/// A control line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Control {
    /// The router's port is bound; it answers 503 until it is ready.
    Listening { port: u16 },
    /// The group is prepared: requests are served.
    Ready {
        #[serde(default)]
        model: Option<String>,
        #[serde(default)]
        device: Option<String>,
        #[serde(default)]
        dtype: Option<String>,
    },
    /// A shard's socket listens.
    Serving,
    /// The model is on this machine.
    Model {
        path: PathBuf,
        #[serde(default)]
        sha: Option<String>,
    },
    /// The sender ends, for the reason given.
    Fatal { message: String },
}

// === impl Control ===

impl Control {
    /// `None`: an ordinary line, for the log.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        if line.first() != Some(&b'{') {
            return None;
        }
        serde_json::from_slice(line).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::Control;

    #[test]
    fn control_lines_are_told_from_the_log() {
        let listening = Control::parse(br#"{"event":"listening","port":3000,"later":1}"#);
        assert_eq!(listening, Some(Control::Listening { port: 3000 }));
        assert_eq!(
            Control::parse(br#"{"event":"serving"}"#),
            Some(Control::Serving)
        );
        let ready = Control::parse(br#"{"event":"ready"}"#);
        assert_eq!(
            ready,
            Some(Control::Ready {
                model: None,
                device: None,
                dtype: None
            })
        );
        let others: [&[u8]; 4] = [
            b"",
            b"hello",
            br#"{"level":"INFO"}"#,
            br#"{"event":"serving"} and more"#,
        ];
        for line in others {
            assert_eq!(Control::parse(line), None);
        }
    }
}
