//! Stop strings, matched inside tokens and across them.
//!
//! One rule for all of this file: the stop string that is *complete first* wins, and of several
//! complete at the same character the longest. So the outcome does not depend on how the text is
//! cut into pieces. (Preferring the match that begins first would: with `abcd` and `bc`, the text
//! `abc` could not be decided before its next character.) Empty stop strings never match.

/// What a piece of text released.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Released {
    /// Text that is certain to precede any stop string.
    pub text: String,
    /// Which stop string ended the text. Set from then on; nothing is released any more.
    pub stopped: Option<usize>,
}

/// Ends a text before the first stop string. What may be the beginning of one is held back.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text, as far as it is a beginning of some stop string.
    held: String,
    stopped: Option<usize>,
}

/// Where a stop string counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopPlace {
    /// Anywhere: also followed by more text of the same token.
    Anywhere,
    /// Only at the very end of the text right after a token, as TGI has it. One newline may
    /// follow, as it may before the end of a line in Python's regular expressions.
    Suffix,
}

/// Says when a text contains a stop string, without holding anything back: the text is sent on
/// as it comes, stop string included.
#[derive(Debug, Clone)]
pub struct StopDetector {
    stops: Vec<String>,
    place: StopPlace,
    /// The end of the text, one character short of the longest stop string or longer.
    tail: String,
    tail_max: usize,
}

/// A match in a text.
struct Match {
    start: usize,
    end: usize,
    stop: usize,
}

// === impl StopMatcher ===

impl StopMatcher {
    /// The strings are searched for as they are; their places are the indices reported.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            held: String::new(),
            stopped: None,
        }
    }

    /// Takes the next piece of text; gives what is now known not to be part of a stop string.
    pub fn push(&mut self, piece: &str) -> Released {
        if self.stopped.is_some() {
            return Released {
                text: String::new(),
                stopped: self.stopped,
            };
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some(found) = first_match(&self.stops, &text) {
            self.stopped = Some(found.stop);
            text.truncate(found.start);
            return Released {
                text,
                stopped: self.stopped,
            };
        }
        self.held = text.split_off(hold_from(&self.stops, &text));
        Released {
            text,
            stopped: None,
        }
    }

    /// The text held back, when no more will come.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

// === impl StopDetector ===

impl StopDetector {
    /// The strings are searched for as they are; their places are the indices reported.
    pub fn new(stops: &[String], place: StopPlace) -> Self {
        // With room for the newline that may follow.
        let tail_max = stops.iter().map(|stop| stop.len() + 1).max().unwrap_or(0);
        Self {
            stops: stops.to_vec(),
            place,
            tail: String::new(),
            tail_max,
        }
    }

    /// Takes the text of the next token; says which stop string the text now has.
    pub fn push(&mut self, piece: &str) -> Option<usize> {
        if self.tail_max == 0 {
            return None;
        }
        self.tail.push_str(piece);
        let found = match self.place {
            StopPlace::Anywhere => first_match(&self.stops, &self.tail).map(|found| found.stop),
            StopPlace::Suffix => self.suffix(),
        };
        let excess = self.tail.len().saturating_sub(self.tail_max);
        let cut = (0..=excess)
            .rev()
            .find(|at| self.tail.is_char_boundary(*at));
        self.tail.drain(..cut.unwrap_or(0));
        found
    }

    fn suffix(&self) -> Option<usize> {
        let before_newline = self.tail.strip_suffix('\n');
        let ends = |stop: &str| {
            let at_line_end = before_newline.is_some_and(|text| text.ends_with(stop));
            !stop.is_empty() && (self.tail.ends_with(stop) || at_line_end)
        };
        (0..self.stops.len())
            .filter(|stop| ends(&self.stops[*stop]))
            .max_by_key(|stop| (self.stops[*stop].len(), std::cmp::Reverse(*stop)))
    }
}

/// The match complete first; of those the longest; of equal strings the first listed.
fn first_match(stops: &[String], text: &str) -> Option<Match> {
    let mut best: Option<Match> = None;
    for (stop, needle) in stops.iter().enumerate() {
        if needle.is_empty() {
            continue;
        }
        // Nothing that ends after the best so far is of interest.
        let within = best.as_ref().map_or(text, |best| &text[..best.end]);
        if let Some(start) = within.find(needle.as_str()) {
            let end = start + needle.len();
            if best
                .as_ref()
                .is_none_or(|best| (end, start) < (best.end, best.start))
            {
                best = Some(Match { start, end, stop });
            }
        }
    }
    best
}

/// From where `text` may be the beginning of a stop string.
fn hold_from(stops: &[String], text: &str) -> usize {
    let longest = stops.iter().map(String::len).max().unwrap_or(0);
    let from = (text.len() + 1).saturating_sub(longest);
    (from..text.len())
        .filter(|at| text.is_char_boundary(*at))
        .find(|at| stops.iter().any(|stop| stop.starts_with(&text[*at..])))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::{StopDetector, StopMatcher, StopPlace};
    use proptest::prelude::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    /// All that a matcher lets through, and which stop string ended it.
    fn run(stops: &[String], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops);
        let mut text = String::new();
        let mut stopped = None;
        for piece in pieces {
            let released = matcher.push(piece);
            text.push_str(&released.text);
            stopped = released.stopped;
        }
        text.push_str(&matcher.flush());
        (text, stopped)
    }

    /// Character by character: the longest stop string that the text so far ends with.
    fn oracle(stops: &[String], text: &str) -> (String, Option<usize>) {
        for (at, c) in text.char_indices() {
            let so_far = &text[..at + c.len_utf8()];
            let mut ends: Vec<usize> = (0..stops.len())
                .filter(|i| !stops[*i].is_empty() && so_far.ends_with(&stops[*i]))
                .collect();
            ends.sort_by_key(|i| std::cmp::Reverse(stops[*i].len()));
            if let Some(&stop) = ends.first() {
                return (
                    so_far[..so_far.len() - stops[stop].len()].to_owned(),
                    Some(stop),
                );
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_stop_string_across_pieces_never_leaks() {
        let stops = strings(&["</s>", "\n\nUser:"]);
        assert_eq!(
            run(&stops, &["hi\n", "\nUs", "er: more"]),
            ("hi".into(), Some(1))
        );
        assert_eq!(run(&stops, &["a</", "s", "><b>"]), ("a".into(), Some(0)));
        assert_eq!(run(&stops, &["a</", "b>"]), ("a</b>".into(), None));
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut matcher = StopMatcher::new(&strings(&["STOP"]));
        assert_eq!(matcher.push("no ST").text, "no ");
        assert_eq!(matcher.push("S").text, "ST");
        assert_eq!(matcher.push("x").text, "Sx");
        assert_eq!(matcher.push("STO").text, "");
        assert_eq!(matcher.flush(), "STO");
    }

    #[test]
    fn the_first_complete_wins_and_then_the_longest() {
        let stops = strings(&["bc", "abcd", "abc"]);
        assert_eq!(run(&stops, &["xabcd"]), ("x".into(), Some(2)));
        assert_eq!(
            run(&strings(&["abcd", "bc"]), &["xabcd"]),
            ("xa".into(), Some(1))
        );
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut matcher = StopMatcher::new(&strings(&["."]));
        assert_eq!(matcher.push("a.b").stopped, Some(0));
        let after = matcher.push("c");
        assert_eq!((after.text.as_str(), after.stopped), ("", Some(0)));
        assert_eq!(matcher.flush(), "");
    }

    #[test]
    fn an_empty_stop_string_never_matches() {
        assert_eq!(
            run(&strings(&["", "b"]), &["a", "b"]),
            ("a".into(), Some(1))
        );
        assert_eq!(
            StopDetector::new(&strings(&[""]), StopPlace::Anywhere).push("a"),
            None
        );
        assert_eq!(
            StopDetector::new(&strings(&[""]), StopPlace::Suffix).push("a"),
            None
        );
    }

    #[test]
    fn tgi_wants_the_stop_string_at_the_end_of_a_token() {
        let stops = strings(&["ab"]);
        let mut suffix = StopDetector::new(&stops, StopPlace::Suffix);
        assert_eq!(suffix.push("abc"), None);
        assert_eq!(suffix.push("a"), None);
        assert_eq!(suffix.push("b"), Some(0));
        assert_eq!(
            StopDetector::new(&stops, StopPlace::Suffix).push("ab\n"),
            Some(0)
        );
        assert_eq!(
            StopDetector::new(&stops, StopPlace::Anywhere).push("abc"),
            Some(0)
        );
    }

    /// Texts over a tiny alphabet, of one to three bytes a character, so that matches are many.
    fn word(longest: usize) -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', '中']), 0..=longest)
            .prop_map(|chars| chars.into_iter().collect())
    }

    fn pieces<'a>(text: &'a str, cuts: &[usize]) -> Vec<&'a str> {
        let mut at: Vec<usize> = cuts
            .iter()
            .map(|cut| text.floor_char_boundary(cut % (text.len() + 1)))
            .collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
    }

    proptest! {
        #[test]
        fn any_split_stops_where_the_oracle_does(
            stops in prop::collection::vec(word(5), 0..4),
            text in word(30),
            cuts in prop::collection::vec(0usize..200, 0..12),
        ) {
            let pieces = pieces(&text, &cuts);
            prop_assert_eq!(run(&stops, &pieces), oracle(&stops, &text));

            let mut anywhere = StopDetector::new(&stops, StopPlace::Anywhere);
            let found = pieces.iter().any(|piece| anywhere.push(piece).is_some());
            prop_assert_eq!(found, oracle(&stops, &text).1.is_some());

            let mut suffix = StopDetector::new(&stops, StopPlace::Suffix);
            let mut so_far = String::new();
            for piece in pieces {
                so_far.push_str(piece);
                let ends = |stop: &String| !stop.is_empty() && so_far.ends_with(stop.as_str());
                prop_assert_eq!(suffix.push(piece).is_some(), stops.iter().any(ends));
            }
        }
    }
}
