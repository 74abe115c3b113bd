//! Markers that are plain text, found character by character.

use super::Marker;

/// The markers that are looked for in a text, or other marks that a form has beside them. The
/// first character of each occurs in it only once, so that after a mismatch nothing before the
/// character at hand can begin one.
#[derive(Debug, Clone)]
pub(super) struct Needles<M = Marker>(Vec<(&'static str, M)>);

/// What a character makes of the beginning of a marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found<M = Marker> {
    Part,
    Whole(M),
    Nothing,
}

// === impl Needles ===

impl Needles {
    /// Those of a format's markers that are no special tokens.
    pub(super) fn new(markers: &[(&'static str, Marker)], special: &[Marker]) -> Self {
        let text = markers
            .iter()
            .filter(|(_, marker)| !special.contains(marker));
        Self(text.copied().collect())
    }
}

impl<M: Copy + PartialEq> Needles<M> {
    pub(super) fn of(marks: impl IntoIterator<Item = (&'static str, M)>) -> Self {
        Self(marks.into_iter().collect())
    }

    /// What `c` makes of `before`, which is empty or a part of a marker, for markers of one kind.
    pub(super) fn find(&self, before: &str, c: char, wanted: &[M]) -> Found<M> {
        let mut found = Found::Nothing;
        for (text, marker) in &self.0 {
            let Some(rest) = text.strip_prefix(before) else {
                continue;
            };
            match rest.strip_prefix(c) {
                Some("") if wanted.contains(marker) => return Found::Whole(*marker),
                Some(_) if wanted.contains(marker) => found = Found::Part,
                Some(_) | None => {}
            }
        }
        found
    }
}
