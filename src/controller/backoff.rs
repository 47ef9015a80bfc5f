//! Exponential backoff with jitter for each object.
//!
//! The `error_policy` of kube receives no history, so this module keeps one, by uid. The entry of an object is removed
//! when the object succeeds or is deleted, which bounds the memory.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rand::{TryRng, rngs::SysRng};

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_mins(5);

/// The number of consecutive attempts of every object that fails or is blocked.
#[derive(Debug, Default)]
pub struct Backoff(Mutex<HashMap<String, Attempts>>);

#[derive(Debug, Default)]
struct Attempts {
    count: u32,
    /// Whether the last attempt failed. False if it found a state that a user has to change.
    failing: bool,
}

impl Backoff {
    /// Counts a failure and returns the delay until the next attempt.
    pub fn failed(&self, uid: &str) -> Duration {
        self.count(uid, true)
    }

    /// Counts an attempt that did not fail but found a state that a user has to change, such as a Secret that belongs
    /// to another object. Returns the delay until the next attempt. [`Backoff::failing`] does not count the object,
    /// since an alert for the administrator of the operator depends on that number.
    pub fn blocked(&self, uid: &str) -> Duration {
        self.count(uid, false)
    }

    fn count(&self, uid: &str, failing: bool) -> Duration {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let attempts = all.entry(uid.to_owned()).or_default();
        *attempts = Attempts { count: attempts.count.saturating_add(1), failing };
        delay(attempts.count, SysRng.try_next_u32().unwrap_or(u32::MAX / 2))
    }

    /// Removes the entry of an object that succeeded or was deleted.
    pub fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// Removes the entries of objects for which `keep` returns false.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| keep(uid));
    }

    /// The number of objects whose last attempt failed.
    #[must_use]
    pub fn failing(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().filter(|attempts| attempts.failing).count()
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// Returns a delay that doubles from [`FIRST`] to [`LONGEST`]. `random` selects a value from its upper half, so that
/// objects that failed together are retried at different times.
fn delay(failures: u32, random: u32) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST);
    full / 2 + (full / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_up_to_a_bound_and_is_random_within_its_upper_half() {
        assert_eq!(delay(1, u32::MAX), FIRST);
        assert_eq!(delay(2, u32::MAX), FIRST * 2);
        assert_eq!(delay(40, u32::MAX), LONGEST);
        assert_eq!(delay(40, 0), LONGEST / 2);
    }

    #[test]
    fn forget_removes_the_entry_of_an_object() {
        let backoff = Backoff::default();
        backoff.failed("a");
        backoff.failed("b");
        assert_eq!(backoff.failing(), 2);
        backoff.forget("a");
        backoff.forget("b");
        assert!(backoff.is_empty());
    }

    #[test]
    fn blocked_object_is_not_counted_as_failing() {
        let backoff = Backoff::default();
        backoff.failed("conflict");
        assert_eq!(backoff.failing(), 1);
        assert!(backoff.blocked("conflict") >= FIRST, "the second delay is not longer than the first");
        assert_eq!(backoff.failing(), 0);
        assert!(!backoff.is_empty(), "the attempts of a blocked object are not counted");
        backoff.failed("conflict");
        assert_eq!(backoff.failing(), 1, "a failure after a blocked attempt is not counted");
    }
}
