//! Whether a value works, and the reasons for which the verifier rejects a request.
//!
//! The verifier and the export of digests use [`standing`], which combines the current spec of an ApiKey with its
//! status. Restrictions in the spec apply at once, also while the operator is down. Additions apply after the operator
//! has accepted them.

use jiff::Timestamp;

use super::{key::Digest, lifecycle::Schedule};
use crate::api::{ApiKey, KeyState};

/// Whether the values of an ApiKey work, and with which grants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing<'a> {
    /// Whether its values work, apart from their expiry.
    pub active: bool,
    /// Its values: the current one first, then the one in overlap.
    pub values: Vec<StandingValue>,
    /// The presets in force.
    pub presets: Vec<&'a str>,
    /// The individual permissions in force. For a legacy key, all its permissions.
    pub permissions: Vec<&'a str>,
}

/// One value of an ApiKey, by its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandingValue {
    /// The digest.
    pub digest: Digest,
    /// The time at which it was minted or imported, in seconds since 1970.
    pub minted: u32,
    /// The time from which it no longer works.
    pub ends: Option<Timestamp>,
}

/// The order of ApiKeys that list the same digest: the first owns it. That is the ApiKey for which the operator wrote
/// the digest first, by `status.tokens[].mintedAt`. Only the operator writes that field, while users choose the name of
/// an object and the time of its creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence<'a> {
    /// See [`StandingValue::minted`].
    pub minted: u32,
    /// See [`created`].
    pub created: u32,
    /// The namespace of the ApiKey.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
}

/// The creation time of an ApiKey, in seconds since 1970. `u32::MAX` if it has none.
#[must_use]
pub fn created(key: &ApiKey) -> u32 {
    key.metadata.creation_timestamp.as_ref().map_or(u32::MAX, |time| seconds(time.0))
}

/// Seconds since 1970. A time beyond `u32` is `u32::MAX`, so that it comes last in an order by time.
fn seconds(time: Timestamp) -> u32 {
    u32::try_from(time.as_second().max(0)).unwrap_or(u32::MAX)
}

/// Computes the standing of an ApiKey. Invalid digests are left out.
#[must_use]
pub fn standing(key: &ApiKey) -> Standing<'_> {
    let spec = &key.spec;
    let Some(status) = &key.status else { return Standing::default() };
    let schedule = Schedule::of(spec);
    let minted_at = status.tokens.first().map(|token| token.minted_at.0);
    let values = status.tokens.iter().enumerate().filter_map(|(at, token)| {
        // A shorter overlap in the spec applies before the operator has updated the status.
        let overlap =
            minted_at.filter(|_| at > 0).map(|minted| minted.checked_add(schedule.overlap).unwrap_or(Timestamp::MAX));
        // The state is Expired, but the status has no end.
        let expired = (status.state == Some(KeyState::Expired) && token.expires_at.is_none()).then_some(Timestamp::MIN);
        let ends = [token.expires_at.as_ref().map(|end| end.0), schedule.expires_at, overlap, expired];
        let digest = Digest::parse(&token.sha256)?;
        Some(StandingValue { digest, minted: seconds(token.minted_at.0), ends: ends.into_iter().flatten().min() })
    });
    Standing {
        // Expiry depends on the current time, not on the state, which is as old as the status.
        active: schedule.active
            && key.metadata.deletion_timestamp.is_none()
            && matches!(status.state, Some(KeyState::Active | KeyState::Lost | KeyState::Expired)),
        values: values.collect(),
        presets: still_requested(&status.presets, &spec.presets),
        permissions: match spec.legacy {
            // Its permissions come from the catalog, not from the spec.
            Some(_) => status.permissions.iter().map(String::as_str).collect(),
            None => still_requested(&status.permissions, &spec.permissions),
        },
    }
}

/// The names in force that the spec still requests. Both lists usually have the same order, so equal positions are
/// compared first.
fn still_requested<'a>(in_force: &'a [String], requested: &[String]) -> Vec<&'a str> {
    let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
    let is_requested = |(index, name): &(usize, &'a String)| {
        requested.get(*index).is_some_and(|r| same(r, name)) || requested.iter().any(|r| same(r, name))
    };
    in_force.iter().enumerate().filter(is_requested).map(|(_, name)| name.as_str()).collect()
}

/// The reason why the verifier rejects a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The request has no key.
    NoKey,
    /// The request has more than one key.
    SeveralKeys,
    /// The value is a damaged or wrongly encoded key.
    Malformed,
    /// No key has this value, or no longer.
    Unknown,
    /// The key is inactive or is being deleted.
    Inactive,
    /// The key, or this value of it, has expired.
    Expired,
    /// The route does not accept keys of this namespace.
    OtherTeam,
    /// The key lacks a permission that the route needs.
    LacksPermission,
    /// The route's configuration is invalid.
    Misconfigured,
    /// The verifier has not yet read all keys.
    NotSynced,
    /// The data of the verifier is too old.
    Stale,
}

impl Reason {
    /// Every reason, in a fixed order.
    pub const ALL: [Self; 11] = [
        Self::NoKey,
        Self::SeveralKeys,
        Self::Malformed,
        Self::Unknown,
        Self::Inactive,
        Self::Expired,
        Self::OtherTeam,
        Self::LacksPermission,
        Self::Misconfigured,
        Self::NotSynced,
        Self::Stale,
    ];

    /// The HTTP status code (RFC 6750, section 3.1). 503 while the verifier can't decide.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::SeveralKeys => 400,
            Self::NoKey | Self::Malformed | Self::Unknown | Self::Inactive | Self::Expired => 401,
            Self::OtherTeam | Self::LacksPermission | Self::Misconfigured => 403,
            Self::NotSynced | Self::Stale => 503,
        }
    }

    /// The error code of the challenge (RFC 6750, section 3.1). `None` if the key is not the problem.
    #[must_use]
    pub const fn error(self) -> Option<&'static str> {
        match self {
            Self::SeveralKeys => Some("invalid_request"),
            Self::Malformed | Self::Unknown | Self::Inactive | Self::Expired => Some("invalid_token"),
            Self::OtherTeam | Self::LacksPermission | Self::Misconfigured => Some("insufficient_scope"),
            // The answer to a request without a key has no error code (RFC 6750, section 3.1).
            Self::NoKey | Self::NotSynced | Self::Stale => None,
        }
    }

    /// The name in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoKey => "NoKey",
            Self::SeveralKeys => "SeveralKeys",
            Self::Malformed => "Malformed",
            Self::Unknown => "Unknown",
            Self::Inactive => "Inactive",
            Self::Expired => "Expired",
            Self::OtherTeam => "OtherTeam",
            Self::LacksPermission => "LacksPermission",
            Self::Misconfigured => "Misconfigured",
            Self::NotSynced => "NotSynced",
            Self::Stale => "Stale",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ApiKeySpec, ApiKeyStatus, KeyType, Rotation, Time, Token};
    use crate::test_support::key_spec as spec;

    const HOUR: i64 = 3600;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn token(fill: char, minted: i64, end: Option<i64>) -> Token {
        let sha256 = fill.to_string().repeat(64);
        Token {
            id: String::new(),
            sha256,
            generation: None,
            minted_at: Time(at(minted)),
            expires_at: end.map(|end| Time(at(end))),
        }
    }

    /// A key during the overlap of a rotation: minted at 100 h, the previous value works until 124 h.
    fn key(change: impl FnOnce(&mut ApiKeySpec, &mut ApiKeyStatus)) -> ApiKey {
        let mut key = ApiKey::new("k", spec(KeyType::Team, &["Alerts"], &["a:Read", "b:Read"]));
        let mut status = ApiKeyStatus {
            state: Some(KeyState::Active),
            presets: vec!["Alerts".to_owned()],
            permissions: vec!["a:Read".to_owned(), "b:Read".to_owned()],
            tokens: vec![token('a', 100 * HOUR, None), token('b', 0, Some(124 * HOUR))],
            ..ApiKeyStatus::default()
        };
        change(&mut key.spec, &mut status);
        key.status = Some(status);
        key
    }

    fn ends(key: &ApiKey) -> Vec<Option<i64>> {
        standing(key).values.iter().map(|value| value.ends.map(|end| end.as_second() / HOUR)).collect()
    }

    #[test]
    fn both_values_of_a_rotation_work_until_their_ends() {
        let key = key(|_, _| {});
        let standing = standing(&key);
        assert!(standing.active);
        assert_eq!(standing.values[0].digest.to_string(), "a".repeat(64));
        assert_eq!(ends(&key), [None, Some(124)]);
        assert_eq!((standing.presets, standing.permissions), (vec!["Alerts"], vec!["a:Read", "b:Read"]));
    }

    #[test]
    fn restrictions_in_the_spec_apply_before_the_status_changes() {
        let expires = |hour: i64| Some(at(hour * HOUR).to_string());
        assert!(!standing(&key(|spec, _| spec.active = Some(false))).active);
        assert_eq!(ends(&key(|spec, _| spec.expires_at = expires(110))), [Some(110), Some(110)]);
        assert_eq!(ends(&key(|spec, _| spec.expires_at = expires(200))), [Some(200), Some(124)]);
        let overlap = |text: &str| Some(Rotation { overlap: Some(text.to_owned()), ..Rotation::default() });
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("1h"))), [None, Some(101)]);
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("0s"))), [None, Some(100)]);
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("90h"))), [None, Some(124)], "not extended");
        let reduced = key(|spec, _| {
            spec.presets.clear();
            spec.permissions = vec!["B:READ".to_owned(), "c:Read".to_owned()];
        });
        assert_eq!(standing(&reduced).presets, Vec::<&str>::new());
        assert_eq!(standing(&reduced).permissions, ["b:Read"], "in any case, and only accepted permissions");
        // An invalid expiry is in the past.
        assert!(ends(&key(|spec, _| spec.expires_at = Some("soon".to_owned())))[0].unwrap() < 0);
    }

    #[test]
    fn only_active_and_lost_keys_that_are_not_being_deleted_are_active() {
        let in_state = |state| standing(&key(|_, status| status.state = state)).active;
        for state in [KeyState::Active, KeyState::Lost] {
            assert!(in_state(Some(state)), "{state:?}");
        }
        for state in [Some(KeyState::Inactive), Some(KeyState::Pending), Some(KeyState::Rejected), None] {
            assert!(!in_state(state), "{state:?}");
        }
        let mut deleted = key(|_, _| {});
        deleted.metadata.deletion_timestamp = Some(Time(at(0)));
        assert!(!standing(&deleted).active);
        deleted.status = None;
        assert_eq!(standing(&deleted), Standing::default());
    }

    #[test]
    fn a_later_expiry_applies_after_the_operator_has_updated_the_status() {
        let moved = |token_end| {
            key(|spec, status| {
                spec.expires_at = Some(at(500 * HOUR).to_string());
                status.state = Some(KeyState::Expired);
                status.tokens = vec![token('a', 0, token_end)];
            })
        };
        assert_eq!(ends(&moved(Some(10 * HOUR))), [Some(10)]);
        assert_eq!(ends(&moved(Some(500 * HOUR))), [Some(500)]);
        assert!(ends(&moved(None))[0].unwrap() < 0);
    }

    #[test]
    fn invalid_digests_are_left_out() {
        for sha256 in ["", "zz", &"g".repeat(64), &"a".repeat(63), &"A".repeat(64), &"é".repeat(32)] {
            let key = key(|_, status| status.tokens[0].sha256 = sha256.to_owned());
            assert_eq!(standing(&key).values.len(), 1, "{sha256}");
        }
    }

    #[test]
    fn reasons_have_unique_names_and_an_error_code_if_the_key_is_the_problem() {
        let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(reason.name(), format!("{reason:?}"));
            let of_key = matches!(reason.status(), 400 | 403) || reason.status() == 401 && reason != Reason::NoKey;
            assert_eq!(reason.error().is_some(), of_key, "{reason:?}");
        }
    }
}
