//! What must stand in no log: the API key, the tokens of hubs and what a collector's headers say,
//! wherever a child, a library or an error brings them up. Everything that the launcher writes
//! passes here.

use std::borrow::Cow;
use std::env;

use headrace_config::{SECRET_VARIABLES, Typed};

/// What stands in the place of a secret.
const REDACTED: &[u8] = b"[redacted]";
/// Shorter ones are no secrets, and words that logs are full of.
const SECRET_BYTES_MIN: usize = 6;

/// The secrets of one server.
#[derive(Clone, Default)]
pub(crate) struct Secrets(Vec<Vec<u8>>);

// === impl Secrets ===

impl Secrets {
    /// Those of the command line and of the environment.
    pub(crate) fn of(typed: &Typed) -> Self {
        let variables = SECRET_VARIABLES
            .iter()
            .filter_map(|name| env::var(name).ok());
        // What a collector is told beside the spans is most often a key of its owner's.
        let headers = typed.traces.otlp_headers.as_deref().unwrap_or_default();
        let values = headers.split(',').filter_map(|pair| pair.split_once('='));
        let values = values.map(|(_, value)| value.trim().to_owned());
        Self::new(variables.chain(typed.http.api_key.clone()).chain(values))
    }

    fn new(texts: impl Iterator<Item = String>) -> Self {
        let mut secrets = Vec::new();
        for text in texts.filter(|text| text.len() >= SECRET_BYTES_MIN) {
            // As it is, and as a string of JSON has it.
            let quoted = serde_json::Value::from(text.as_str()).to_string();
            secrets.push(quoted.as_bytes()[1..quoted.len() - 1].to_vec());
            secrets.push(text.into_bytes());
        }
        // The longest first: one may be the beginning of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets.dedup();
        Self(secrets)
    }

    /// The text without them.
    pub(crate) fn hide<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let mut text = Cow::Borrowed(text);
        for secret in &self.0 {
            let mut kept = Vec::new();
            let mut from = 0;
            while let Some(at) = find(&text[from..], secret) {
                kept.extend_from_slice(&text[from..from + at]);
                kept.extend_from_slice(REDACTED);
                from += at + secret.len();
            }
            if from > 0 {
                kept.extend_from_slice(&text[from..]);
                text = Cow::Owned(kept);
            }
        }
        text
    }
}

/// How many there are, and no more.
impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Secrets").field(&self.0.len()).finish()
    }
}

// === free functions ===

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use headrace_config::Typed;

    use super::Secrets;

    fn hidden(secrets: &[&str], text: &str) -> String {
        let secrets = Secrets::new(secrets.iter().map(|&secret| secret.to_owned()));
        String::from_utf8(secrets.hide(text.as_bytes()).into_owned()).expect("text stays text")
    }

    #[test]
    fn secrets_are_replaced_wherever_they_stand() {
        let secrets = ["sesame", "sesame-open", "a\"b\\c\"d"];
        for (text, expected) in [
            ("nothing", "nothing"),
            ("sesame", "[redacted]"),
            ("key=sesame, sesame", "key=[redacted], [redacted]"),
            ("sesame-open!", "[redacted]!"),
            ("sesam e", "sesam e"),
            ("said a\"b\\c\"d", "said [redacted]"),
            (r#"{"message":"a\"b\\c\"d"}"#, r#"{"message":"[redacted]"}"#),
        ] {
            assert_eq!(hidden(&secrets, text), expected);
        }
    }

    #[test]
    fn what_a_collector_is_told_is_one() {
        let words = [
            "headrace",
            "--otlp-headers",
            "authorization=Bearer sesame, team=blue",
        ];
        let typed = Typed::parse(words.map(OsString::from), &|_| None).expect("flags are right");
        let shown = Secrets::of(&typed).hide(b"sent Bearer sesame for team=blue");
        assert_eq!(shown, b"sent [redacted] for team=blue".as_slice());
    }

    #[test]
    fn words_that_are_too_short_to_be_secrets_are_kept() {
        assert_eq!(hidden(&["", "k", "hub"], "a hub, ok"), "a hub, ok");
    }

    #[test]
    fn the_secrets_themselves_show_nothing() {
        let secrets = Secrets::new(std::iter::once("sesame".to_owned()));
        assert_eq!(format!("{secrets:?}"), "Secrets(1)");
    }
}
