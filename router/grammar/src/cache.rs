//! Compiled grammars by their text, the least recently used given up first.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::compile::Compiled;

/// Few entries, each worth milliseconds: a list is as good as anything.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Most recently used last.
    entries: VecDeque<(Arc<str>, Arc<Compiled>)>,
    entries_max: usize,
}

// === impl Cache ===

impl Cache {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            entries_max,
        }
    }

    /// The grammar of a text, unless a matcher of it has failed since.
    pub(crate) fn get(&mut self, key: &str) -> Option<Arc<Compiled>> {
        let at = self
            .entries
            .iter()
            .position(|(known, _)| known.as_ref() == key)?;
        let entry = self.entries.remove(at)?;
        if entry.1.is_spoilt() {
            return None;
        }
        let compiled = Arc::clone(&entry.1);
        self.entries.push_back(entry);
        Some(compiled)
    }

    pub(crate) fn put(&mut self, key: &str, compiled: &Arc<Compiled>) {
        self.entries.retain(|(known, _)| known.as_ref() != key);
        self.entries.push_back((key.into(), Arc::clone(compiled)));
        if self.entries.len() > self.entries_max {
            self.entries.pop_front();
        }
    }
}
