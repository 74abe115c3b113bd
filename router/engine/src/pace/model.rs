//! How long a step with prompt tokens takes: a line in four features of it, fitted while serving.
//!
//! Least squares of relative errors over the last steps, older ones weighing less, with
//! coefficients that are never negative. Each fit starts from the last one and is held near it, so
//! that what the recent steps say nothing about (long contexts, when there were none) stays as it
//! was learnt. It is a pure function of what it was told.

use headrace_core::plan::{StepPlan, row_flag};

/// Of a step's weight after one more step: some fifty count.
const MEMORY: f64 = 0.98;
/// How strongly a fit is held to the one before, as a share of what the steps weigh.
const HOLD: f64 = 0.02;
/// Rounds of coordinate descent; four coefficients settle in fewer.
const ROUNDS: usize = 24;
/// Times beyond this say nothing of a step: a device that hangs, a machine that slept.
const TIME_MAX_US: f64 = 60e6;
/// A prediction misses by about this much until it is known better, and at least.
const MISS_FIRST: f64 = 0.1;
const MISS_MIN: f64 = 0.02;
/// A single miss counts for no more than this in the usual one.
const MISS_MAX: f64 = 0.5;
/// A miss of more than so many usual ones is an outlier and weighs less.
const OUTLIER: f64 = 3.0;
/// Weight of the newest miss in the usual one.
const MISS_GAIN: f64 = 1.0 / 16.0;

/// What a step's time depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StepShape {
    /// Sequences that decode.
    pub(crate) decode_rows: u32,
    /// Positions that they attend to, together.
    pub(crate) decode_context: u64,
    /// Tokens of prompts.
    pub(crate) prompt_tokens: u32,
    /// Pairs of a prompt token and one before it.
    pub(crate) prompt_pairs: u64,
}

/// Coefficients and what they were fitted to. Times are microseconds.
#[derive(Debug, Clone)]
pub(crate) struct StepTimeModel {
    /// One each for the step itself, a token, a position that a decoding sequence attends to, and a
    /// pair of prompt tokens.
    terms: [f64; 4],
    gram: [[f64; 4]; 4],
    moment: [f64; 4],
    known: bool,
    /// The most prompt tokens that a step was seen with.
    reach: u32,
    /// By what share predictions usually miss.
    miss: f64,
}

// === impl StepShape ===

impl StepShape {
    pub(crate) fn of(plan: &StepPlan) -> Self {
        let mut shape = Self::default();
        for (row, &flags) in plan.row_flags.iter().enumerate() {
            let start = u64::from(plan.row_start[row].unsigned_abs());
            let len = plan.row_len[row].unsigned_abs();
            if flags & row_flag::FROM_SLOT != 0 {
                shape.decode_rows += 1;
                shape.decode_context += start + 1;
            } else {
                shape.prompt_tokens += len;
                shape.prompt_pairs += u64::from(len) * (2 * start + u64::from(len)) / 2;
            }
        }
        shape
    }

    fn features(&self) -> [f64; 4] {
        [
            1.0,
            f64::from(self.decode_rows) + f64::from(self.prompt_tokens),
            self.decode_context as f64,
            self.prompt_pairs as f64,
        ]
    }
}

// === impl StepTimeModel ===

impl StepTimeModel {
    pub(crate) fn new() -> Self {
        Self {
            terms: [0.0; 4],
            gram: [[0.0; 4]; 4],
            moment: [0.0; 4],
            known: false,
            reach: 0,
            miss: MISS_FIRST,
        }
    }

    /// Whether a step was seen from which anything could be learnt.
    pub(crate) fn is_known(&self) -> bool {
        self.known
    }

    /// The most prompt tokens that a step was seen with: far beyond it nothing is known.
    pub(crate) fn reach(&self) -> u32 {
        self.reach
    }

    /// By what share predictions usually miss.
    pub(crate) fn miss(&self) -> f64 {
        self.miss
    }

    /// Microseconds of the step itself, a token, an attended position, a pair.
    pub(crate) fn terms(&self) -> [f64; 4] {
        self.terms
    }

    /// Microseconds of a step with prompt tokens; 0 while nothing is known.
    pub(crate) fn predict(&self, shape: &StepShape) -> f64 {
        dot(&self.terms, &shape.features())
    }

    /// Learns from a step that took `micros`. Steps without prompt tokens tell nothing: what bounds
    /// them (reading the weights) is another thing. Nor do times that cannot be.
    pub(crate) fn observe(&mut self, shape: &StepShape, micros: f64) {
        if shape.prompt_tokens == 0 || !(1.0..=TIME_MAX_US).contains(&micros) {
            return;
        }
        let features = shape.features();
        if !self.known {
            // A first guess that is never too low for more tokens: all of it is the tokens'.
            self.terms[1] = micros / features[1];
            self.known = true;
        }
        self.reach = self.reach.max(shape.prompt_tokens);
        // By the larger of the two: a time far too long then weighs little, and one far too short
        // does not weigh more than others.
        let scale = micros.max(dot(&self.terms, &features));
        let miss = (micros - dot(&self.terms, &features)).abs() / scale;
        let usual = OUTLIER * self.miss.max(MISS_MIN);
        let weight = if miss > usual { usual / miss } else { 1.0 };
        self.miss += (miss.min(MISS_MAX) - self.miss) * MISS_GAIN;

        let weighed = features.map(|feature| feature / scale);
        for (j, row) in self.gram.iter_mut().enumerate() {
            for (k, entry) in row.iter_mut().enumerate() {
                *entry = MEMORY * *entry + weight * weighed[j] * weighed[k];
            }
            self.moment[j] = MEMORY * self.moment[j] + weight * weighed[j] * micros / scale;
        }
        self.fit();
    }

    /// Minimises the squared errors plus the squared distance from the last fit, by coordinates.
    fn fit(&mut self) {
        let before = self.terms;
        for _ in 0..ROUNDS {
            for (j, last) in before.into_iter().enumerate() {
                let own = self.gram[j][j];
                let hold = HOLD * own;
                if own + hold <= f64::MIN_POSITIVE {
                    continue;
                }
                let others = dot(&self.gram[j], &self.terms) - own * self.terms[j];
                let best = (self.moment[j] - others + hold * last) / (own + hold);
                self.terms[j] = best.clamp(0.0, TIME_MAX_US);
            }
        }
    }
}

fn dot(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
