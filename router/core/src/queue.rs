//! The waiting sequences, in order of arrival.

use std::collections::VecDeque;

use crate::ids::SeqId;

/// Sequence ids ascending: ids are given in order of arrival, so one that comes back after it had
/// run is in front of all that never did.
#[derive(Debug, Default)]
pub(crate) struct WaitQueue {
    ids: VecDeque<SeqId>,
}

// === impl WaitQueue ===

impl WaitQueue {
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(crate) fn front(&self) -> Option<SeqId> {
        self.ids.front().copied()
    }

    /// In order of arrival.
    pub(crate) fn iter(&self) -> impl Iterator<Item = SeqId> {
        self.ids.iter().copied()
    }

    pub(crate) fn pop_front(&mut self) -> Option<SeqId> {
        self.ids.pop_front()
    }

    /// Puts `id` at its place of arrival.
    pub(crate) fn put(&mut self, id: SeqId) {
        if self.ids.back().is_none_or(|&back| back < id) {
            self.ids.push_back(id);
        } else {
            let at = self.ids.partition_point(|&other| other < id);
            self.ids.insert(at, id);
        }
    }

    /// Takes `id` out, wherever it stands.
    pub(crate) fn remove(&mut self, id: SeqId) {
        let at = self
            .ids
            .binary_search(&id)
            .expect("a waiting sequence is in the queue; this is a router bug");
        self.ids.remove(at);
    }

    /// Ascending, so also: no id twice.
    pub(crate) fn audit(&self) {
        let ascending = self
            .ids
            .iter()
            .zip(self.ids.iter().skip(1))
            .all(|(a, b)| a < b);
        assert!(ascending, "the queue is not in order of arrival");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back_stands_where_it_arrived() {
        let mut queue = WaitQueue::default();
        for id in [5, 6, 9, 2, 4] {
            queue.put(SeqId(id));
        }
        queue.audit();
        queue.remove(SeqId(5));
        let order = std::iter::from_fn(|| queue.pop_front())
            .map(|id| id.0)
            .collect::<Vec<_>>();
        assert_eq!(order, [2, 4, 6, 9]);
    }
}
