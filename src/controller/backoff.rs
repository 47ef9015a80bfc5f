//! How long to wait before an object is tried again: its own exponential backoff, with jitter.
//!
//! kube's `error_policy` knows no history, so the history is kept here, by uid. It is dropped on success and on
//! deletion, so that it can't grow without end.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rand::{TryRng, rngs::SysRng};

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_mins(5);

/// The tries in a row of every object that fails or is blocked.
#[derive(Debug, Default)]
pub struct Backoff(Mutex<HashMap<String, Tries>>);

#[derive(Debug, Default)]
struct Tries {
    count: u32,
    /// Whether the last of them failed, and did not only find a state that a person has to end.
    failing: bool,
}

impl Backoff {
    /// Counts one more failure and says how long to wait.
    pub fn failed(&self, uid: &str) -> Duration {
        self.again(uid, true)
    }

    /// As [`Backoff::failed`], for an object of which nothing failed: a person has to end its state, such as a Secret
    /// that belongs to something else. It is not among those that [`Backoff::failing`] counts, since an alert for the
    /// administrator of the operator depends on that number.
    pub fn blocked(&self, uid: &str) -> Duration {
        self.again(uid, false)
    }

    fn again(&self, uid: &str, failing: bool) -> Duration {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tries = all.entry(uid.to_owned()).or_default();
        *tries = Tries { count: tries.count.saturating_add(1), failing };
        delay(tries.count, SysRng.try_next_u32().unwrap_or(u32::MAX / 2))
    }

    /// Forgets the failures of an object that succeeded or is gone.
    pub fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// Forgets the failures of every object that is not to be kept.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| keep(uid));
    }

    /// How many objects failed and wait for another try.
    #[must_use]
    pub fn failing(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().filter(|tries| tries.failing).count()
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// Doubles from [`FIRST`] to [`LONGEST`]; `random` spreads the result over its upper half, so that objects that
/// failed together do not come back together.
fn delay(failures: u32, random: u32) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST);
    full / 2 + (full / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_a_bound_and_spreads() {
        assert_eq!(delay(1, u32::MAX), FIRST);
        assert_eq!(delay(2, u32::MAX), FIRST * 2);
        assert_eq!(delay(40, u32::MAX), LONGEST);
        assert_eq!(delay(40, 0), LONGEST / 2);
    }

    #[test]
    fn success_and_deletion_leave_nothing_behind() {
        let backoff = Backoff::default();
        backoff.failed("a");
        backoff.failed("b");
        assert_eq!(backoff.failing(), 2);
        backoff.forget("a");
        backoff.forget("b");
        assert!(backoff.is_empty());
    }

    #[test]
    fn what_a_person_has_to_end_is_no_failure() {
        let backoff = Backoff::default();
        backoff.failed("conflict");
        assert_eq!(backoff.failing(), 1);
        assert!(backoff.blocked("conflict") >= FIRST, "the second try comes later than the first");
        assert_eq!(backoff.failing(), 0);
        assert!(!backoff.is_empty(), "its waits grow");
        backoff.failed("conflict");
        assert_eq!(backoff.failing(), 1, "a failure counts again");
    }
}
