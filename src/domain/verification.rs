//! Whether a value works, and what somebody is told whose request may not pass.
//!
//! The verifier, and whoever exports digests, ask [`standing`]: what an ApiKey allows its values, by its spec as it is
//! now and by its status. The spec alone can only ever take away, at once and also while the operator is down; what it
//! adds counts when the operator has accepted it.

use jiff::Timestamp;

use super::{key::Digest, lifecycle::Schedule};
use crate::api::{ApiKey, KeyState};

/// What an ApiKey allows its values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing<'a> {
    /// Whether its values work at all, whatever the time.
    pub active: bool,
    /// Its values: the current one first, then the one in overlap.
    pub values: Vec<Value>,
    /// The presets in force.
    pub presets: Vec<&'a str>,
    /// The individual permissions in force; of a legacy key, all of them.
    pub permissions: Vec<&'a str>,
}

/// One value of an ApiKey, by its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// The digest.
    pub digest: Digest,
    /// When it was minted or imported, in seconds since 1970.
    pub minted: u32,
    /// When it ends.
    pub ends: Option<Timestamp>,
}

/// Which of several ApiKeys that name one digest owns it: the first in this order. That is the one for which the operator
/// wrote the digest first, by `status.tokens[].mintedAt`; only the operator writes that, while the age of an object is
/// anybody's choice, as is its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence<'a> {
    /// When the value was minted or imported, in seconds since 1970: see [`Value`].
    pub minted: u32,
    /// When the ApiKey was created: see [`created`].
    pub created: u32,
    /// The namespace of the ApiKey.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
}

/// When an ApiKey was created, in seconds since 1970. One without a time is as young as can be.
#[must_use]
pub fn created(key: &ApiKey) -> u32 {
    key.metadata.creation_timestamp.as_ref().map_or(u32::MAX, |time| seconds(time.0))
}

/// Seconds since 1970 for an order in time: a time beyond what four bytes hold is the last of all, and never the first.
fn seconds(time: Timestamp) -> u32 {
    u32::try_from(time.as_second().max(0)).unwrap_or(u32::MAX)
}

/// What an ApiKey allows its values. A digest that can't be read is left out: it works for nobody.
#[must_use]
pub fn standing(key: &ApiKey) -> Standing<'_> {
    let spec = &key.spec;
    let Some(status) = &key.status else { return Standing::default() };
    let schedule = Schedule::of(spec);
    let minted_at = status.tokens.first().map(|token| token.minted_at.0);
    let values = status.tokens.iter().enumerate().filter_map(|(at, token)| {
        // What a shorter overlap revokes is revoked before the operator has written it down.
        let overlap =
            minted_at.filter(|_| at > 0).map(|minted| minted.checked_add(schedule.overlap).unwrap_or(Timestamp::MAX));
        // Of an expired key whose end nobody knows, this much is known.
        let expired = (status.state == Some(KeyState::Expired) && token.expires_at.is_none()).then_some(Timestamp::MIN);
        let ends = [token.expires_at.as_ref().map(|end| end.0), schedule.expires_at, overlap, expired];
        let digest = Digest::parse(&token.sha256)?;
        Some(Value { digest, minted: seconds(token.minted_at.0), ends: ends.into_iter().flatten().min() })
    });
    Standing {
        // Expired is not told from the state, which is as old as the status, but from the time.
        active: schedule.active
            && key.metadata.deletion_timestamp.is_none()
            && matches!(status.state, Some(KeyState::Active | KeyState::Lost | KeyState::Expired)),
        values: values.collect(),
        presets: still_asked(&status.presets, &spec.presets),
        permissions: match spec.legacy {
            // They come from the catalogue; its spec has none to take away.
            Some(_) => status.permissions.iter().map(String::as_str).collect(),
            None => still_asked(&status.permissions, &spec.permissions),
        },
    }
}

/// The names in force that the spec still asks for. Both are nearly always in the same order.
fn still_asked<'a>(in_force: &'a [String], asked: &[String]) -> Vec<&'a str> {
    let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
    let still = |(at, name): &(usize, &'a String)| {
        asked.get(*at).is_some_and(|a| same(a, name)) || asked.iter().any(|a| same(a, name))
    };
    in_force.iter().enumerate().filter(still).map(|(_, name)| name.as_str()).collect()
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// It carries no key.
    NoKey,
    /// It carries more than one key.
    SeveralKeys,
    /// What it carries looks like a key and is damaged.
    Malformed,
    /// No key has this value, or has it any longer.
    Unknown,
    /// The key is deactivated, or is being deleted.
    Inactive,
    /// The key, or this value of it, has expired.
    Expired,
    /// The route is not for keys of this namespace.
    OtherTeam,
    /// The key lacks a permission that the route needs.
    LacksPermission,
    /// The route's configuration can't be followed.
    Misconfigured,
    /// Not every key is known yet.
    NotSynced,
    /// What is known is too old.
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

    /// The status code of the answer (RFC 6750, section 3.1; 503 while nobody can know).
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::SeveralKeys => 400,
            Self::NoKey | Self::Malformed | Self::Unknown | Self::Inactive | Self::Expired => 401,
            Self::OtherTeam | Self::LacksPermission | Self::Misconfigured => 403,
            Self::NotSynced | Self::Stale => 503,
        }
    }

    /// The error code of the challenge (RFC 6750, section 3.1). None where the key is not what is wrong.
    #[must_use]
    pub const fn error(self) -> Option<&'static str> {
        match self {
            Self::SeveralKeys => Some("invalid_request"),
            Self::Malformed | Self::Unknown | Self::Inactive | Self::Expired => Some("invalid_token"),
            Self::OtherTeam | Self::LacksPermission | Self::Misconfigured => Some("insufficient_scope"),
            // A request without a key is not told of errors (RFC 6750, section 3).
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
    use crate::domain::validate::tests::spec;

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

    /// A key in the middle of a rotation: minted anew at 100 h, the old value lives until 124 h.
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
    fn both_values_of_a_rotation_work_each_until_its_end() {
        let key = key(|_, _| {});
        let standing = standing(&key);
        assert!(standing.active);
        assert_eq!(standing.values[0].digest.to_string(), "a".repeat(64));
        assert_eq!(ends(&key), [None, Some(124)]);
        assert_eq!((standing.presets, standing.permissions), (vec!["Alerts"], vec!["a:Read", "b:Read"]));
    }

    #[test]
    fn the_spec_takes_away_before_the_operator_has_said_so() {
        let expires = |hour: i64| Some(at(hour * HOUR).to_string());
        assert!(!standing(&key(|spec, _| spec.active = Some(false))).active);
        assert_eq!(ends(&key(|spec, _| spec.expires_at = expires(110))), [Some(110), Some(110)]);
        assert_eq!(ends(&key(|spec, _| spec.expires_at = expires(200))), [Some(200), Some(124)]);
        let overlap = |text: &str| Some(Rotation { overlap: Some(text.to_owned()), ..Rotation::default() });
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("1h"))), [None, Some(101)]);
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("0s"))), [None, Some(100)]);
        assert_eq!(ends(&key(|spec, _| spec.rotation = overlap("90h"))), [None, Some(124)], "never longer");
        let poorer = key(|spec, _| {
            spec.presets.clear();
            spec.permissions = vec!["B:READ".to_owned(), "c:Read".to_owned()];
        });
        assert_eq!(standing(&poorer).presets, Vec::<&str>::new());
        assert_eq!(standing(&poorer).permissions, ["b:Read"], "in any case; what was not accepted does not count");
        // A time that can't be read must not keep a key alive.
        assert!(ends(&key(|spec, _| spec.expires_at = Some("soon".to_owned())))[0].unwrap() < 0);
    }

    #[test]
    fn the_state_takes_away_what_the_spec_does_not_know() {
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
    fn an_expiry_that_was_moved_counts_when_the_operator_has_seen_it() {
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
    fn a_digest_that_cant_be_read_works_for_nobody() {
        for sha256 in ["", "zz", &"g".repeat(64), &"a".repeat(63), &"A".repeat(64), &"é".repeat(32)] {
            let key = key(|_, status| status.tokens[0].sha256 = sha256.to_owned());
            assert_eq!(standing(&key).values.len(), 1, "{sha256}");
        }
    }

    #[test]
    fn every_reason_has_a_name_and_a_code_of_its_own() {
        let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(reason.name(), format!("{reason:?}"));
            let of_a_key = matches!(reason.status(), 400 | 403) || reason.status() == 401 && reason != Reason::NoKey;
            assert_eq!(reason.error().is_some(), of_a_key, "{reason:?}");
        }
    }
}
