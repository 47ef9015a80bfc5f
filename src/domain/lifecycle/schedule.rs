//! The times and durations of a spec.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::{
    api::ApiKeySpec,
    domain::{
        duration,
        record::{Entry, Previous},
        time,
    },
};

/// The default of `spec.rotation.overlap`, if `every` does not shorten it.
pub const DEFAULT_OVERLAP: Duration = Duration::from_hours(24);

/// The parsed times and durations of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Whether the key is active.
    pub active: bool,
    /// The expiry.
    pub expires_at: Option<Timestamp>,
    /// The interval of scheduled rotations.
    pub every: Option<SignedDuration>,
    /// The time for which a value works after its replacement.
    pub overlap: SignedDuration,
    /// `spec.rotation.requestedAt`.
    pub requested_at: Option<String>,
}

impl Schedule {
    /// Parses a spec. An invalid expiry counts as past, so that it never extends a key.
    #[must_use]
    pub fn of(spec: &ApiKeySpec) -> Self {
        let rotation = spec.rotation.as_ref();
        let every = rotation.and_then(|r| r.every.as_deref()).and_then(duration::parse);
        let overlap = match rotation.and_then(|r| r.overlap.as_deref()) {
            Some(text) => duration::parse(text).unwrap_or_default(),
            None => every.map_or(DEFAULT_OVERLAP, |every| DEFAULT_OVERLAP.min(every / 2)),
        };
        Self {
            active: spec.active.unwrap_or(true),
            expires_at: spec.expires_at.as_deref().map(|text| time::parse(text).unwrap_or(Timestamp::MIN)),
            every: every.map(signed),
            overlap: signed(overlap),
            requested_at: rotation.and_then(|r| r.requested_at.clone()),
        }
    }

    /// Whether the key has expired.
    #[must_use]
    pub fn expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// The time of the scheduled rotation of a value. `None` for never. The schedule of an inactive key is suspended,
    /// so that the value is the same after reactivation.
    #[must_use]
    pub fn next_rotation(&self, minted_at: Timestamp) -> Option<Timestamp> {
        let due = later(minted_at, self.every?);
        (self.active && self.expires_at.is_none_or(|expiry| due < expiry)).then_some(due)
    }

    /// Whether a requested rotation is due that was not carried out yet. `handled` is the last request that was.
    #[must_use]
    pub fn is_requested(&self, handled: Option<&str>, now: Timestamp) -> bool {
        self.request(handled).is_some_and(|at| at <= now)
    }

    /// The time of the requested rotation that was not carried out yet. Only a time after the last handled one is a
    /// request, so that an older manifest (a Git revert, self-heal) never rotates. A time in the future is a request
    /// for that time.
    pub(in crate::domain) fn request(&self, handled: Option<&str>) -> Option<Timestamp> {
        let requested = time::parse(self.requested_at.as_deref()?)?;
        let handled = handled.and_then(time::parse);
        handled.is_none_or(|handled| handled < requested).then_some(requested)
    }

    /// The request that a mint at `now` carries out.
    pub(in crate::domain) fn handles(&self, now: Timestamp) -> Option<String> {
        self.requested_at.clone().filter(|_| self.is_requested(None, now))
    }

    pub(in crate::domain) fn is_due(&self, minted_at: Timestamp, handled: Option<&str>, now: Timestamp) -> bool {
        !self.expired(now)
            && (self.is_requested(handled, now) || self.next_rotation(minted_at).is_some_and(|due| due <= now))
    }

    /// The value that was current until `now`, with its end. `None` if it has no overlap.
    pub(in crate::domain) fn retire(&self, entry: Entry, now: Timestamp) -> Option<Previous> {
        let end = later(now, self.overlap);
        let expires_at = self.expires_at.map_or(end, |expiry| end.min(expiry));
        (expires_at > now).then_some(Previous { entry, expires_at })
    }

    /// Applies the current overlap to the previous value. A shorter overlap moves its end, a longer one does not, so
    /// that a revoked value never works again. `None` if its end has passed.
    pub(in crate::domain) fn tighten(&self, current: &Entry, previous: Previous, now: Timestamp) -> Option<Previous> {
        let end = previous.expires_at.min(later(current.minted_at, self.overlap));
        let expires_at = self.expires_at.map_or(end, |expiry| end.min(expiry));
        (expires_at > now).then_some(Previous { expires_at, ..previous })
    }
}

pub(super) fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

pub(super) fn later(time: Timestamp, by: SignedDuration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}
