//! Percentiles.

/// The value below which a share `q` of the values lies, interpolated linearly between the two
/// nearest ranks, as NumPy does by default. `None` without values.
pub(crate) fn percentile(values: &mut [f64], q: f64) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    values.sort_unstable_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * (values.len() - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank lies between 0 and the number of values"
    )]
    let below = at as usize;
    let above = (below + 1).min(values.len() - 1);
    Some(values[below] + (values[above] - values[below]) * (at - below as f64))
}

/// To so many decimals, for figures that are read.
pub(crate) fn rounded(value: f64, decimals: i32) -> f64 {
    let scale = 10_f64.powi(decimals);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([15, 20, 35, 40, 50], [0, 40, 50, 99, 100])
        let table = [
            (0.0, 15.0),
            (0.4, 29.0),
            (0.5, 35.0),
            (0.99, 49.6),
            (1.0, 50.0),
        ];
        for (q, expected) in table {
            let mut values = [50.0, 20.0, 35.0, 15.0, 40.0];
            let found = percentile(&mut values, q).expect("there are values");
            assert!((found - expected).abs() < 1e-9, "{q}: {found}");
        }
        assert_eq!(percentile(&mut [], 0.5), None);
        assert_eq!(percentile(&mut [7.0], 0.99), Some(7.0));
    }
}
