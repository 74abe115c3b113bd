//! Which requests are sampled, in OpenTelemetry's words.

use headrace_otlp::TraceId;

/// A rule for traces that begin here, and whether a caller's decision comes before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sampler {
    root: Root,
    follows_parent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Root {
    All,
    None,
    /// Those whose id, as a number of 63 bits, lies below.
    Below(u64),
}

// === impl Sampler ===

impl Sampler {
    /// Takes nobody.
    pub(super) const OFF: Self = Self {
        root: Root::None,
        follows_parent: false,
    };

    /// By a name that config has checked.
    pub(super) fn new(name: &str, ratio: f64) -> Self {
        let (name, follows_parent) = match name.strip_prefix("parentbased_") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let root = match name {
            "always_off" => Root::None,
            "traceidratio" if ratio < 1.0 => Root::Below(threshold(ratio)),
            _ => Root::All,
        };
        Self {
            root,
            follows_parent,
        }
    }

    /// Whether it takes nobody, whoever calls.
    pub(super) fn is_off(self) -> bool {
        self == Self::OFF
    }

    /// Whether a request's trace is sampled; `parent` is its caller's decision, if it has a caller.
    pub(super) fn takes(self, trace: TraceId, parent: Option<bool>) -> bool {
        if let Some(parent) = parent.filter(|_| self.follows_parent) {
            return parent;
        }
        match self.root {
            Root::All => true,
            Root::None => false,
            Root::Below(threshold) => {
                let low = trace.0[8..].try_into().expect("eight bytes");
                u64::from_be_bytes(low) >> 1 < threshold
            }
        }
    }
}

/// This share of the numbers of 63 bits.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a ratio from 0 to below 1, times 2^63"
)]
fn threshold(ratio: f64) -> u64 {
    (ratio.clamp(0.0, 1.0) * (1_u64 << 63) as f64) as u64
}

#[cfg(test)]
mod tests {
    use headrace_otlp::TraceId;

    use super::Sampler;

    /// A trace whose id is this share of the way to the largest.
    fn trace(share: f64) -> TraceId {
        let mut id = [7; 16];
        let low = super::threshold(share) << 1;
        id[8..].copy_from_slice(&low.to_be_bytes());
        TraceId(id)
    }

    #[test]
    fn each_sampler_takes_what_its_name_says() {
        // Of a root, of one whose caller is sampled, of one whose caller is not; low and high ids.
        for (name, low, high) in [
            ("always_on", [true; 3], [true; 3]),
            ("always_off", [false; 3], [false; 3]),
            ("traceidratio", [true; 3], [false; 3]),
            (
                "parentbased_always_on",
                [true, true, false],
                [true, true, false],
            ),
            (
                "parentbased_always_off",
                [false, true, false],
                [false, true, false],
            ),
            (
                "parentbased_traceidratio",
                [true, true, false],
                [false, true, false],
            ),
        ] {
            let sampler = Sampler::new(name, 0.25);
            let parents = [None, Some(true), Some(false)];
            assert_eq!(parents.map(|p| sampler.takes(trace(0.2), p)), low, "{name}");
            assert_eq!(
                parents.map(|p| sampler.takes(trace(0.3), p)),
                high,
                "{name}"
            );
            assert_eq!(sampler.is_off(), name == "always_off", "{name}");
        }
    }

    #[test]
    fn a_ratio_of_one_takes_all_and_of_none_nobody() {
        let all = Sampler::new("traceidratio", 1.0);
        assert!(all.takes(TraceId([0xff; 16]), None));
        let none = Sampler::new("traceidratio", 0.0);
        assert!(!none.takes(TraceId([0; 16]), None));
    }
}
