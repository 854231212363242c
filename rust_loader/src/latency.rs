//! Latencies in a fixed number of buckets: four to an octave, so a percentile is right to 19 %.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const STEPS: u32 = 4;
const BUCKETS: usize = (u64::BITS * STEPS) as usize;

/// Counts of latencies, from any thread.
#[derive(Debug)]
pub struct Latencies {
    counts: [AtomicU64; BUCKETS],
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanoseconds)].fetch_add(1, Ordering::Relaxed);
    }

    /// How many were counted.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// True before the first.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The latency that `per_mille` of a thousand do not exceed: its bucket's upper edge; 0 when empty.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> Duration {
        let wanted = (self.len() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count.load(Ordering::Relaxed);
            if seen >= wanted && seen > 0 {
                return Duration::from_nanos(upper_edge(index));
            }
        }
        Duration::ZERO
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let value = nanoseconds.max(1);
    let octave = value.ilog2();
    // The two bits below the leading one.
    let step = if octave >= 2 { value >> (octave - 2) & 3 } else { value << (2 - octave) & 3 };
    (octave * STEPS) as usize + crate::sizes::to_usize(step)
}

fn upper_edge(bucket: usize) -> u64 {
    let (octave, step) = (bucket / STEPS as usize, (bucket % STEPS as usize) as u128);
    u64::try_from(((5 + step) << octave) / 4).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_latency_has_no_quantile() {
        assert!(Latencies::default().is_empty());
        assert_eq!(Latencies::default().quantile(999), Duration::ZERO);
    }

    #[test]
    fn quantiles_are_right_to_the_width_of_a_bucket() {
        let latencies = Latencies::default();
        for microseconds in 1..=1000 {
            latencies.record(Duration::from_micros(microseconds));
        }
        for (per_mille, expected) in [(500, 500.0), (990, 990.0), (999, 999.0)] {
            let found = latencies.quantile(per_mille).as_secs_f64() * 1e6;
            assert!((1.0..1.25).contains(&(found / expected)), "{per_mille}: {found}");
        }
    }

    #[test]
    fn the_shortest_and_the_longest_have_buckets() {
        let latencies = Latencies::default();
        latencies.record(Duration::ZERO);
        latencies.record(Duration::MAX);
        assert_eq!(latencies.len(), 2);
        assert!(latencies.quantile(1) <= Duration::from_nanos(2));
        assert!(latencies.quantile(1000) > Duration::from_secs(1 << 33));
    }
}
