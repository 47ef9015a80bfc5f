//! A histogram without a lock, for the path of every check.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// The upper bounds of the buckets, in microseconds. A check takes a few microseconds. The last bounds show a process
/// that waits for CPU time.
const BOUNDS: [u64; 9] = [1, 2, 5, 10, 25, 100, 500, 5_000, 50_000];

/// Durations, counted in fixed buckets.
#[derive(Debug, Default)]
pub struct DurationHistogram {
    /// One counter for each bound, and one for longer durations.
    counts: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl DurationHistogram {
    /// Counts a duration.
    pub fn observe(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.iter().position(|bound| nanoseconds <= bound * 1000).unwrap_or(BOUNDS.len());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// The sum of the durations in seconds, and for each bucket its upper bound in seconds and the number of durations
    /// in it, not cumulated. The bound of the last bucket is the largest number, as the text format of Prometheus has
    /// it.
    #[must_use]
    pub fn snapshot(&self) -> (f64, Vec<(f64, u64)>) {
        let bounds = BOUNDS.iter().map(|bound| Duration::from_micros(*bound).as_secs_f64()).chain([f64::MAX]);
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let sum = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed));
        (sum.as_secs_f64(), bounds.zip(counts).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_in_the_first_bucket_that_holds_it() {
        let histogram = DurationHistogram::default();
        for microseconds in [0, 1, 2, 3, 50_000, 50_001] {
            histogram.observe(Duration::from_micros(microseconds));
        }
        let (sum, buckets) = histogram.snapshot();
        assert!((sum - 0.100_007).abs() < 1e-9, "{sum}");
        let counts: Vec<_> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 1, 1, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(buckets.len(), BOUNDS.len() + 1);
    }
}
