//! The schedule of the checks of Secrets. A check reads the Secret of an ApiKey again.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use rand::{TryRng, rngs::SysRng};

use crate::domain::lifecycle::Observed;

/// The time of the next check of the Secret of each ApiKey. The webhook reports writes by other clients (see
/// [`crate::admission::secrets`]). Checks find the writes that it does not report: those while no replica ran, and
/// those to a Secret without the label.
#[derive(Debug)]
pub struct SecretChecks {
    interval: SignedDuration,
    next: Mutex<HashMap<String, Timestamp>>,
}

/// The time within which a new leader first checks each Secret, since no replica received the notices of writes while
/// there was no leader.
const FIRST_CHECK_WITHIN: SignedDuration = SignedDuration::from_mins(10);

/// How soon a Secret is checked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckInterval {
    /// The Secret is in order, and the webhook reports writes to it. It is checked after the whole interval.
    Notified,
    /// The Secret belongs to a legacy key. It has no label of Keywright, so the webhook does not report writes to it.
    NotNotified,
    /// The Secret is missing or not in order. The webhook reports its replacement only if that has the label, which a
    /// backup may have lost.
    NotInOrder,
}

impl CheckInterval {
    /// The upper limit of the interval.
    fn limit(self) -> SignedDuration {
        match self {
            Self::Notified => SignedDuration::MAX,
            Self::NotNotified => SignedDuration::from_mins(30),
            Self::NotInOrder => SignedDuration::from_mins(10),
        }
    }

    /// The interval for a Secret that was just read.
    pub(super) fn of(secret: &Observed, is_legacy: bool) -> Self {
        match secret {
            Observed::Ours(held) if held.intact && is_legacy => Self::NotNotified,
            Observed::Ours(held) if held.intact => Self::Notified,
            _ => Self::NotInOrder,
        }
    }
}

impl SecretChecks {
    /// Creates a schedule that checks every Secret once in each interval.
    #[must_use]
    pub fn every(interval: Duration) -> Self {
        let interval = SignedDuration::try_from(interval).unwrap_or(SignedDuration::from_hours(6));
        Self { interval, next: Mutex::default() }
    }

    /// The time of the next check. A new key gets a random time within [`FIRST_CHECK_WITHIN`], so that the operator
    /// does not read all Secrets at once after a restart.
    pub(super) fn due_at(&self, uid: &str, now: Timestamp) -> Timestamp {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next.entry(uid.to_owned()).or_insert_with(|| after(self.interval.min(FIRST_CHECK_WITHIN), 0.0, now))
    }

    /// Schedules the check after the one that was due at `due`. A check that was requested meanwhile stays due.
    pub(super) fn done(&self, uid: &str, due: Timestamp, now: Timestamp, interval: CheckInterval) {
        // The random part separates the checks of keys that were created together.
        let at = after(self.interval.min(interval.limit()), 0.8, now);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.get(uid).is_none_or(|requested| *requested == due) {
            next.insert(uid.to_owned(), at);
        }
    }

    /// Makes a check due at the next reconciliation, after another client wrote to the Secret.
    pub fn now(&self, uid: &str) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // A time that differs from that of a running check, so that `done` does not remove this request.
        let tick = SignedDuration::from_nanos(1);
        let requested =
            next.get(uid).filter(|at| **at < Timestamp::UNIX_EPOCH).and_then(|at| at.checked_add(tick).ok());
        next.insert(uid.to_owned(), requested.unwrap_or(Timestamp::MIN));
    }

    pub(super) fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| keep(uid));
    }

    pub(super) fn forget(&self, uid: &str) {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// Returns a random time in the interval that begins now, after at least the share `min` of it.
fn after(interval: SignedDuration, min: f64, now: Timestamp) -> Timestamp {
    let random = f64::from(SysRng.try_next_u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
    let wait = SignedDuration::try_from_secs_f64(interval.as_secs_f64() * (min + (1.0 - min) * random));
    now.checked_add(wait.unwrap_or(interval)).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const SECOND: i64 = 1_800_000_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(SECOND + second).unwrap()
    }

    #[test]
    fn first_check_is_early_and_later_checks_follow_the_interval_of_the_secret() {
        let checks = SecretChecks::every(Duration::from_hours(6));
        for number in 0..100 {
            let uid = format!("u{number}");
            let first = checks.due_at(&uid, at(0));
            assert!(at(0) <= first && first <= at(600), "{first}");
            assert_eq!(checks.due_at(&uid, at(5)), first, "the time of a check changed");
            for (interval, min, max) in [
                (CheckInterval::Notified, 17_280, 21_600),
                (CheckInterval::NotNotified, 1440, 1800),
                (CheckInterval::NotInOrder, 480, 600),
            ] {
                let due = checks.due_at(&uid, at(0));
                checks.done(&uid, due, at(0), interval);
                let next = checks.due_at(&uid, at(0));
                assert!(at(min) <= next && next <= at(max), "{interval:?}: {next}");
            }
        }
        let dues = (0..100).map(|number| checks.due_at(&format!("u{number}"), at(0)));
        assert!(dues.collect::<HashSet<_>>().len() > 50, "checks at the same time stay at the same time");
    }

    #[test]
    fn short_interval_limits_every_check() {
        let checks = SecretChecks::every(Duration::from_secs(2));
        assert!(checks.due_at("u", at(0)) <= at(2));
        for interval in [CheckInterval::Notified, CheckInterval::NotNotified, CheckInterval::NotInOrder] {
            let due = checks.due_at("u", at(0));
            checks.done("u", due, at(0), interval);
            assert!(checks.due_at("u", at(0)) <= at(2), "{interval:?}");
        }
    }

    #[test]
    fn check_that_is_requested_during_another_stays_due() {
        let checks = SecretChecks::every(Duration::from_hours(6));
        checks.now("u");
        let due = checks.due_at("u", at(0));
        assert!(due <= at(0));
        checks.now("u");
        checks.done("u", due, at(0), CheckInterval::Notified);
        assert!(checks.due_at("u", at(0)) <= at(0), "the second request was lost");
    }
}
