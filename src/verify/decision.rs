//! The decision on a request. It depends only on its arguments; every refusal has a [`Reason`].

use std::{borrow::Cow, fmt::Write};

use jiff::Timestamp;

use crate::{
    api::KeyType,
    domain::{
        credential::{self, Credential},
        key::{self, Digest},
        redact::redact,
        requirement::{Misconfigured, Requirement},
        verification::Reason,
    },
    index::key_index::{KeyIndex, KnownKey},
};

/// The identity of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyIdentity {
    /// The id of the value in the request: `key_` and 16 hex digits.
    pub id: String,
    /// The name of the ApiKey.
    pub name: String,
    /// The namespace of the ApiKey.
    pub team: String,
    /// The user of a Personal key; empty for others.
    pub user: String,
    /// The type of the key.
    pub key_type: KeyType,
}

impl KeyIdentity {
    fn of(id: String, key: &KnownKey<'_>) -> Self {
        Self {
            id,
            name: key.name().to_owned(),
            team: key.team().to_owned(),
            user: key.user().to_owned(),
            key_type: key.key_type(),
        }
    }
}

/// The refusal of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The reason in one word.
    pub reason: Reason,
    /// The problem and the fix. Printable ASCII without quotes and backslashes (RFC 6750, section 3). It names neither
    /// the ApiKey nor its namespace, since the holder of a stolen value must not learn whose it is.
    pub description: Cow<'static, str>,
    /// The permissions that the route requires, if the key lacks one.
    pub scope: Option<String>,
    /// The identity of the key, if known. For logs only; clients receive the description.
    pub key: Option<Box<KeyIdentity>>,
}

impl Refusal {
    /// Returns a refusal that depends only on its reason.
    #[must_use]
    pub fn of(reason: Reason) -> Self {
        let description = match reason {
            Reason::NoKey => "send an API key, as in Authorization: Bearer KEY",
            Reason::SeveralKeys => "the request carries more than one API key: send one",
            Reason::Malformed => "the API key is damaged (its checksum does not match): copy the whole key again",
            Reason::Unknown => "there is no such API key: it was deleted, was replaced by a rotation, or never existed",
            Reason::NotSynced => "the verifier has not received all API keys yet: try again in a moment",
            Reason::Stale => "the verifier has received no data from the API server for too long: try again later",
            Reason::Inactive
            | Reason::Expired
            | Reason::OtherTeam
            | Reason::LacksPermission
            | Reason::Misconfigured => "the request is not allowed",
        };
        Self { reason, description: description.into(), scope: None, key: None }
    }

    /// Adds the name and namespace of the ApiKey, if known, to the description.
    #[must_use]
    pub fn naming_the_key(mut self) -> Self {
        if let Some(key) = &self.key {
            let _ = write!(self.description.to_mut(), "; it is ApiKey {} in namespace {}", key.name, key.team);
        }
        self
    }

    fn about(reason: Reason, key: KeyIdentity, description: String) -> Self {
        Self { reason, description: description.into(), scope: None, key: Some(Box::new(key)) }
    }
}

/// Decides on a request by its credential and the requirement of its route.
///
/// # Errors
/// A [`Refusal`], if the request is not allowed.
pub fn decide(
    keys: &KeyIndex,
    credential: &Credential<'_>,
    requirement: Result<Requirement<'_>, Misconfigured>,
    now: Timestamp,
) -> Result<KeyIdentity, Refusal> {
    decide_and(keys, credential, requirement, now, |identity, _| identity)
}

/// Like [`decide`]; maps the key of an allowed request by `then` under the same lock, so that both see one state of the
/// key.
///
/// # Errors
/// A [`Refusal`], if the request is not allowed.
pub fn decide_and<T>(
    keys: &KeyIndex,
    credential: &Credential<'_>,
    requirement: Result<Requirement<'_>, Misconfigured>,
    now: Timestamp,
    then: impl FnOnce(KeyIdentity, &KnownKey<'_>) -> T,
) -> Result<T, Refusal> {
    // Checked first, so that any request shows that the route is misconfigured.
    let requirement = requirement.map_err(|error| misconfigured(&error))?;
    let value = match credential {
        Credential::One(value, _) => &**value,
        Credential::None => return Err(Refusal::of(Reason::NoKey)),
        Credential::Several => return Err(Refusal::of(Reason::SeveralKeys)),
    };
    let digest = Digest::of(value);
    keys.look_up(&digest, |permissions, known| {
        let Some(known) = known else {
            // A proxy may join two headers of one name by a comma (RFC 9110, section 5.3).
            if value.contains(&b',') {
                return Err(Refusal::of(Reason::SeveralKeys));
            }
            if let Some(mistake) = credential::describe_mistake(value) {
                return Err(Refusal { description: mistake.into(), ..Refusal::of(Reason::Malformed) });
            }
            let damaged = key::has_prefix(value) && !std::str::from_utf8(value).is_ok_and(key::is_well_formed);
            return Err(Refusal::of(if damaged { Reason::Malformed } else { Reason::Unknown }));
        };
        let identity = || KeyIdentity::of(digest.id(), &known);
        check_state(&known, now, identity)?;
        if !requirement.accepts(known.team()) {
            let key = identity();
            let description = format!("API key {} belongs to a team that this route does not accept", key.id);
            return Err(Refusal::about(Reason::OtherTeam, key, description));
        }
        let mut first_missing = Ok(());
        for permission in requirement.permissions() {
            match permissions.has(&known, permission) {
                Some(true) => {}
                None => return Err(misconfigured(&Misconfigured::UnknownPermission(permission.to_owned()))),
                Some(false) => first_missing = first_missing.and(Err(permission)),
            }
        }
        if let Err(permission) = first_missing {
            let key = identity();
            let mut description = format!("API key {} lacks permission ", key.id);
            push_printable(&mut description, permission);
            description.push_str(": add it to the ApiKey, or use another key");
            let mut scope = String::new();
            for permission in requirement.permissions() {
                if !scope.is_empty() {
                    scope.push(' ');
                }
                push_printable(&mut scope, permission);
            }
            return Err(Refusal { scope: Some(scope), ..Refusal::about(Reason::LacksPermission, key, description) });
        }
        known.touch(now);
        Ok(then(identity(), &known))
    })
}

/// Checks that the value works now, independent of the route.
fn check_state(known: &KnownKey<'_>, now: Timestamp, identity: impl Fn() -> KeyIdentity) -> Result<(), Refusal> {
    if !known.is_active() {
        let key = identity();
        let description = format!("API key {} is not active", key.id);
        return Err(Refusal::about(Reason::Inactive, key, description));
    }
    if let Some(end) = known.ends().filter(|end| *end <= now.as_millisecond()) {
        let key = identity();
        let mut description = format!("API key {} expired", key.id);
        // An expiry that could not be parsed has no time to show.
        if let Some(end) = Timestamp::from_millisecond(end).ok().filter(|end| *end > Timestamp::UNIX_EPOCH) {
            let _ = write!(description, " at {end}");
        }
        return Err(Refusal::about(Reason::Expired, key, description));
    }
    Ok(())
}

fn misconfigured(error: &Misconfigured) -> Refusal {
    let mut description = String::new();
    push_printable(&mut description, &redact(&error.to_string()));
    Refusal { description: description.into(), ..Refusal::of(Reason::Misconfigured) }
}

/// Appends the characters that may stand in a quoted string of a header, and omits others.
fn push_printable(text: &mut String, more: &str) {
    text.extend(more.chars().filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\')));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::ApiKey,
        domain::{credential::Source, key::Key},
        test_support::key_index,
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn value() -> String {
        Key::mint(KeyType::Team, &mut rand::rngs::SysRng).unwrap().expose().to_owned()
    }

    fn decide_bearer(keys: &KeyIndex, value: &str, route: &str) -> Result<KeyIdentity, Refusal> {
        let credential = Credential::One(value.as_bytes().into(), &Source::Authorization);
        decide(keys, &credential, Requirement::of_segment(route, None), at(1000))
    }

    fn reason(decision: Result<KeyIdentity, Refusal>) -> Reason {
        let refusal = decision.unwrap_err();
        let description = &refusal.description;
        assert!(description.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\'), "{description}");
        refusal.reason
    }

    #[test]
    fn a_key_is_allowed_if_the_route_accepts_its_permissions_and_team() {
        let value = value();
        let keys = key_index(&value, |_| {});
        for route in
            ["permission=none", "permission=a:Read", "permission=A:READ,b:Read", "permission=b:Read&team=shop,bank"]
        {
            let identity = decide_bearer(&keys, &value, route).unwrap();
            assert_eq!(
                (identity.name.as_str(), identity.team.as_str(), identity.user.as_str()),
                ("k", "shop", ""),
                "{route}"
            );
            assert_eq!(identity.id, Digest::of(value.as_bytes()).id());
        }
        assert_eq!(reason(decide_bearer(&keys, &value, "permission=c:Read")), Reason::LacksPermission);
        assert_eq!(reason(decide_bearer(&keys, &value, "permission=a:Read,c:Read")), Reason::LacksPermission);
        assert_eq!(reason(decide_bearer(&keys, &value, "permission=none&team=bank")), Reason::OtherTeam);
        let refusal = decide_bearer(&keys, &value, "permission=a:Read,c:Read").unwrap_err();
        assert_eq!(refusal.scope.as_deref(), Some("a:Read c:Read"));
        assert!(refusal.description.contains("lacks permission c:Read: add it to the ApiKey, or"));
    }

    #[test]
    fn a_misconfigured_route_refuses_every_request() {
        let value = value();
        let keys = key_index(&value, |_| {});
        for route in ["", "team=shop", "permission=no.such:Thing", "permission=a:Read,no.such:Thing", "perm=none"] {
            assert_eq!(reason(decide_bearer(&keys, &value, route)), Reason::Misconfigured, "{route}");
        }
        assert_eq!(reason(decide_bearer(&keys, &value, "permission=no\"such\r\n:Thing")), Reason::Misconfigured);
        let none = decide(&keys, &Credential::None, Requirement::of_segment("", None), at(1000));
        assert_eq!(reason(none), Reason::Misconfigured, "also without a key");
    }

    #[test]
    fn missing_several_damaged_and_unknown_keys_have_distinct_reasons() {
        let value = value();
        let keys = key_index(&value, |_| {});
        let route = || Requirement::of_segment("permission=none", None);
        assert_eq!(reason(decide(&keys, &Credential::None, route(), at(1000))), Reason::NoKey);
        assert_eq!(reason(decide(&keys, &Credential::Several, route(), at(1000))), Reason::SeveralKeys);
        let other = Key::mint(KeyType::Team, &mut rand::rngs::SysRng).unwrap();
        for (sent, expected) in [
            (other.expose().to_owned(), Reason::Unknown),
            ("something else".to_owned(), Reason::Unknown),
            (format!("{value}x"), Reason::Malformed),
            (value[..52].to_owned(), Reason::Malformed),
            ("kwt_\u{e9}".to_owned(), Reason::Malformed),
            (format!("{value},{value}"), Reason::SeveralKeys),
            (format!("{value}, x"), Reason::SeveralKeys),
            (format!("\"{value}\""), Reason::Malformed),
            (format!("Bearer {value}"), Reason::Malformed),
            (format!("{value}\n"), Reason::Malformed),
        ] {
            assert_eq!(reason(decide_bearer(&keys, &sent, "permission=none")), expected, "{expected:?}");
        }
    }

    #[test]
    fn inactive_expired_and_unminted_keys_are_refused() {
        let value = value();
        let with =
            |change: fn(&mut ApiKey)| reason(decide_bearer(&key_index(&value, change), &value, "permission=none"));
        assert_eq!(with(|key| key.spec.active = Some(false)), Reason::Inactive);
        assert_eq!(
            with(|key| key.spec.expires_at = Some(at(1000).to_string())),
            Reason::Expired,
            "expires at exactly this second"
        );
        assert_eq!(with(|key| key.spec.expires_at = Some("soon".to_owned())), Reason::Expired);
        assert_eq!(with(|key| key.status = None), Reason::Unknown);
        let keys = key_index(&value, |key| key.spec.expires_at = Some(at(1001).to_string()));
        decide_bearer(&keys, &value, "permission=none").unwrap();
        let keys = key_index(&value, |key| key.spec.expires_at = Some(at(10).to_string()));
        let refusal = decide_bearer(&keys, &value, "permission=none").unwrap_err();
        assert!(refusal.description.contains("expired at 1970-01-01T00:00:10Z"), "{refusal:?}");
    }

    #[test]
    fn a_description_names_the_api_key_only_on_request() {
        let value = value();
        let with =
            |change: fn(&mut ApiKey), route| decide_bearer(&key_index(&value, change), &value, route).unwrap_err();
        for refusal in [
            with(|key| key.spec.active = Some(false), "permission=none"),
            with(|key| key.spec.expires_at = Some(at(10).to_string()), "permission=none"),
            with(|_| {}, "permission=none&team=bank"),
            with(|_| {}, "permission=c:Read"),
        ] {
            let (id, description) = (Digest::of(value.as_bytes()).id(), &refusal.description);
            assert!(description.contains(&id) && !description.contains("shop"), "{description}");
            assert_eq!(refusal.key.as_ref().unwrap().team, "shop", "for the log");
            let description = refusal.naming_the_key().description;
            assert!(description.ends_with("; it is ApiKey k in namespace shop"), "{description}");
        }
        assert_eq!(Refusal::of(Reason::Unknown).naming_the_key(), Refusal::of(Reason::Unknown));
    }

    #[test]
    fn a_refusal_never_contains_the_value() {
        let value = value();
        let keys = key_index(&value, |key| key.spec.active = Some(false));
        for sent in [
            value.clone(),
            format!("{value}x"),
            format!("{value},{value}"),
            format!("'{value}'"),
            "kws_0123456789".to_owned(),
        ] {
            // Also if a misconfigured proxy passes client input as the requirement.
            let (name, permission) = (format!("{sent}=x"), format!("permission={sent}:x"));
            for route in ["permission=none", "permission=c:Read", "", &sent, &name, &permission] {
                let refusal = decide_bearer(&keys, &sent, route).unwrap_err();
                assert!(!format!("{refusal:?}").contains(&sent[4..]), "{refusal:?}");
            }
        }
    }
}
