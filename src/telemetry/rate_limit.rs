//! A limit on the number of log lines per second, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;

/// Allows a number of events in each second of the clock.
#[derive(Debug)]
pub struct RateLimit {
    per_second: u32,
    /// The current second in the upper 32 bits, the number of events in it in the lower.
    state: AtomicU64,
    exceeded: AtomicU64,
}

impl RateLimit {
    /// Allows so many events per second; 0 for none.
    #[must_use]
    pub const fn new(per_second: u32) -> Self {
        Self { per_second, state: AtomicU64::new(0), exceeded: AtomicU64::new(0) }
    }

    /// Whether an event at `now` is within the limit. It is counted.
    pub fn allows(&self, now: Timestamp) -> bool {
        let second = u64::try_from(now.as_second()).unwrap_or_default() << 32;
        let max = u64::from(self.per_second);
        let next = |seen: u64| match seen {
            seen if seen < second => (max > 0).then_some(second | 1),
            seen if seen & 0xffff_ffff < max => Some(seen + 1),
            _ => None,
        };
        let allowed = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok();
        if !allowed {
            self.exceeded.fetch_add(1, Ordering::Relaxed);
        }
        allowed
    }

    /// The number of events beyond the limit since the start.
    #[must_use]
    pub fn exceeded(&self) -> u64 {
        self.exceeded.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_allows_the_configured_number_of_events() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let limit = RateLimit::new(3);
        assert_eq!((0..100).filter(|_| limit.allows(at(5))).count(), 3);
        assert_eq!((0..100).filter(|_| limit.allows(at(6))).count(), 3);
        assert_eq!(limit.exceeded(), 194);
        assert!(!RateLimit::new(0).allows(at(5)));
    }
}
