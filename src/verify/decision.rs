//! The decision. It depends on its arguments alone, and each way out of it is a [`Reason`].

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
    index::keyring::{Keyring, Known},
};

/// Whose request passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The id of the value that was sent: `key_` and 16 hex digits.
    pub id: String,
    /// The name of the ApiKey.
    pub name: String,
    /// Its namespace.
    pub team: String,
    /// The user of a Personal key; empty for others.
    pub user: String,
    /// The type of the key.
    pub key_type: KeyType,
}

impl Identity {
    fn of(id: String, key: &Known<'_>) -> Self {
        Self {
            id,
            name: key.name().to_owned(),
            team: key.team().to_owned(),
            user: key.user().to_owned(),
            key_type: key.key_type(),
        }
    }
}

/// Why a request may not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In one word.
    pub reason: Reason,
    /// In a sentence, with what to do. Printable ASCII without quotes and backslashes (RFC 6750, section 3). It names no
    /// ApiKey and no namespace: whoever holds a value need not know to whom it belongs.
    pub description: Cow<'static, str>,
    /// The permissions that the route needs, where the key lacks one.
    pub scope: Option<String>,
    /// Whose key it is, if that is known. For logs; the client is not told more than the description says.
    pub key: Option<Box<Identity>>,
}

impl Refusal {
    /// A refusal that depends on nothing but its reason.
    #[must_use]
    pub fn of(reason: Reason) -> Self {
        let description = match reason {
            Reason::NoKey => "send an API key, as in Authorization: Bearer KEY",
            Reason::SeveralKeys => "the request carries more than one API key: send one",
            Reason::Malformed => "the API key is damaged: its checksum does not match; copy it again, whole",
            Reason::Unknown => "there is no such API key: it was deleted, or replaced by a rotation, or never was",
            Reason::NotSynced => "the verifier does not know every API key yet: try again in a moment",
            Reason::Stale => "the verifier has not heard from the cluster for too long: try again later",
            Reason::Inactive
            | Reason::Expired
            | Reason::OtherTeam
            | Reason::LacksPermission
            | Reason::Misconfigured => "the request may not pass",
        };
        Self { reason, description: description.into(), scope: None, key: None }
    }

    /// As it is, and its description says which ApiKey it is about, if any.
    #[must_use]
    pub fn naming_the_key(mut self) -> Self {
        if let Some(key) = &self.key {
            let _ = write!(self.description.to_mut(), "; it is ApiKey {} in namespace {}", key.name, key.team);
        }
        self
    }

    fn about(reason: Reason, key: Identity, description: String) -> Self {
        Self { reason, description: description.into(), scope: None, key: Some(Box::new(key)) }
    }
}

/// Judges a request by what it carries and what its route asks for.
///
/// # Errors
/// Why it may not pass.
pub fn decide(
    keys: &Keyring,
    credential: &Credential<'_>,
    requirement: Result<Requirement<'_>, Misconfigured>,
    now: Timestamp,
) -> Result<Identity, Refusal> {
    decide_and(keys, credential, requirement, now, |identity, _| identity)
}

/// As [`decide`], and hands the key of a request that passes to `then`, as it was when that was decided.
///
/// # Errors
/// Why it may not pass.
pub fn decide_and<T>(
    keys: &Keyring,
    credential: &Credential<'_>,
    requirement: Result<Requirement<'_>, Misconfigured>,
    now: Timestamp,
    then: impl FnOnce(Identity, &Known<'_>) -> T,
) -> Result<T, Refusal> {
    // First, so that a route that nobody may pass is noticed by whoever tries it.
    let requirement = requirement.map_err(|error| misconfigured(&error))?;
    let value = match credential {
        Credential::One(value, _) => &**value,
        Credential::None => return Err(Refusal::of(Reason::NoKey)),
        Credential::Several => return Err(Refusal::of(Reason::SeveralKeys)),
    };
    let digest = Digest::of(value);
    keys.look_up(&digest, |permissions, known| {
        let Some(known) = known else {
            // A proxy joined two headers of one name (RFC 9110, section 5.3).
            if value.contains(&b',') {
                return Err(Refusal::of(Reason::SeveralKeys));
            }
            if let Some(slip) = credential::slip(value) {
                return Err(Refusal { description: slip.into(), ..Refusal::of(Reason::Malformed) });
            }
            let damaged = key::has_prefix(value) && !std::str::from_utf8(value).is_ok_and(key::is_well_formed);
            return Err(Refusal::of(if damaged { Reason::Malformed } else { Reason::Unknown }));
        };
        let identity = || Identity::of(digest.id(), &known);
        standing(&known, now, identity)?;
        if !requirement.accepts(known.team()) {
            let key = identity();
            let description = format!("API key {} is of a team whose keys may not pass here", key.id);
            return Err(Refusal::about(Reason::OtherTeam, key, description));
        }
        let mut lacking = Ok(());
        for permission in requirement.permissions() {
            match permissions.has(&known, permission) {
                Some(true) => {}
                None => return Err(misconfigured(&Misconfigured::UnknownPermission(permission.to_owned()))),
                Some(false) => lacking = lacking.and(Err(permission)),
            }
        }
        if let Err(permission) = lacking {
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

/// Whether a value works now, whatever the route asks for.
fn standing(known: &Known<'_>, now: Timestamp, identity: impl Fn() -> Identity) -> Result<(), Refusal> {
    if !known.is_active() {
        let key = identity();
        let description = format!("API key {} is not active", key.id);
        return Err(Refusal::about(Reason::Inactive, key, description));
    }
    if let Some(end) = known.ends().filter(|end| *end <= now.as_millisecond()) {
        let key = identity();
        let mut description = format!("API key {} expired", key.id);
        // What could not be read has no time to tell.
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

/// Appends what may stand in a quoted string of a header; the rest is left out.
fn push_printable(text: &mut String, more: &str) {
    text.extend(more.chars().filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\')));
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        api::ApiKey,
        domain::{credential::Source, key::Key},
        index::keyring::tests::{catalog, key},
    };

    use kube::runtime::watcher::Event;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A keyring in which `shop/k` has the given value, permissions a:Read and b:Read, and what `change` says.
    pub(crate) fn keyring(value: &str, change: impl FnOnce(&mut ApiKey)) -> Keyring {
        let keys = Keyring::default();
        keys.set_catalog(catalog(&["a:Read"]));
        let mut key = key("shop", "k", 1, &[0]);
        key.status.as_mut().unwrap().tokens[0].sha256 = Digest::of(value.as_bytes()).to_string();
        change(&mut key);
        keys.apply(&Event::Apply(key));
        keys
    }

    fn value() -> String {
        Key::mint(KeyType::Team, &mut rand::rngs::SysRng).unwrap().expose().to_owned()
    }

    fn judge(keys: &Keyring, value: &str, route: &str) -> Result<Identity, Refusal> {
        let credential = Credential::One(value.as_bytes().into(), &Source::Authorization);
        decide(keys, &credential, Requirement::of_segment(route, None), at(1000))
    }

    fn reason(verdict: Result<Identity, Refusal>) -> Reason {
        let refusal = verdict.unwrap_err();
        let description = &refusal.description;
        assert!(description.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\'), "{description}");
        refusal.reason
    }

    #[test]
    fn a_key_passes_where_its_permissions_and_its_team_do() {
        let value = value();
        let keys = keyring(&value, |_| {});
        for route in
            ["permission=none", "permission=a:Read", "permission=A:READ,b:Read", "permission=b:Read&team=shop,bank"]
        {
            let who = judge(&keys, &value, route).unwrap();
            assert_eq!((who.name.as_str(), who.team.as_str(), who.user.as_str()), ("k", "shop", ""), "{route}");
            assert_eq!(who.id, Digest::of(value.as_bytes()).id());
        }
        assert_eq!(reason(judge(&keys, &value, "permission=c:Read")), Reason::LacksPermission);
        assert_eq!(reason(judge(&keys, &value, "permission=a:Read,c:Read")), Reason::LacksPermission);
        assert_eq!(reason(judge(&keys, &value, "permission=none&team=bank")), Reason::OtherTeam);
        let refusal = judge(&keys, &value, "permission=a:Read,c:Read").unwrap_err();
        assert_eq!(refusal.scope.as_deref(), Some("a:Read c:Read"));
        assert!(refusal.description.contains("lacks permission c:Read: add it to the ApiKey, or"));
    }

    #[test]
    fn a_route_that_is_not_configured_lets_nobody_pass() {
        let value = value();
        let keys = keyring(&value, |_| {});
        for route in ["", "team=shop", "permission=no.such:Thing", "permission=a:Read,no.such:Thing", "perm=none"] {
            assert_eq!(reason(judge(&keys, &value, route)), Reason::Misconfigured, "{route}");
        }
        assert_eq!(reason(judge(&keys, &value, "permission=no\"such\r\n:Thing")), Reason::Misconfigured);
        let none = decide(&keys, &Credential::None, Requirement::of_segment("", None), at(1000));
        assert_eq!(reason(none), Reason::Misconfigured, "also told to those without a key");
    }

    #[test]
    fn each_way_not_to_have_a_key_has_its_reason() {
        let value = value();
        let keys = keyring(&value, |_| {});
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
            assert_eq!(reason(judge(&keys, &sent, "permission=none")), expected, "{expected:?}");
        }
    }

    #[test]
    fn what_was_taken_away_does_not_pass() {
        let value = value();
        let with = |change: fn(&mut ApiKey)| reason(judge(&keyring(&value, change), &value, "permission=none"));
        assert_eq!(with(|key| key.spec.active = Some(false)), Reason::Inactive);
        assert_eq!(with(|key| key.spec.expires_at = Some(at(1000).to_string())), Reason::Expired, "to the second");
        assert_eq!(with(|key| key.spec.expires_at = Some("soon".to_owned())), Reason::Expired);
        assert_eq!(with(|key| key.status = None), Reason::Unknown);
        let keys = keyring(&value, |key| key.spec.expires_at = Some(at(1001).to_string()));
        judge(&keys, &value, "permission=none").unwrap();
        let keys = keyring(&value, |key| key.spec.expires_at = Some(at(10).to_string()));
        let refusal = judge(&keys, &value, "permission=none").unwrap_err();
        assert!(refusal.description.contains("expired at 1970-01-01T00:00:10Z"), "{refusal:?}");
    }

    #[test]
    fn names_are_told_only_where_that_is_asked_for() {
        let value = value();
        let with = |change: fn(&mut ApiKey), route| judge(&keyring(&value, change), &value, route).unwrap_err();
        for refusal in [
            with(|key| key.spec.active = Some(false), "permission=none"),
            with(|key| key.spec.expires_at = Some(at(10).to_string()), "permission=none"),
            with(|_| {}, "permission=none&team=bank"),
            with(|_| {}, "permission=c:Read"),
        ] {
            let (id, told) = (Digest::of(value.as_bytes()).id(), &refusal.description);
            assert!(told.contains(&id) && !told.contains("shop"), "{told}");
            assert_eq!(refusal.key.as_ref().unwrap().team, "shop", "for the log");
            let told = refusal.naming_the_key().description;
            assert!(told.ends_with("; it is ApiKey k in namespace shop"), "{told}");
        }
        assert_eq!(Refusal::of(Reason::Unknown).naming_the_key(), Refusal::of(Reason::Unknown));
    }

    #[test]
    fn nothing_that_is_said_or_written_down_holds_the_value() {
        let value = value();
        let keys = keyring(&value, |key| key.spec.active = Some(false));
        for sent in [
            value.clone(),
            format!("{value}x"),
            format!("{value},{value}"),
            format!("'{value}'"),
            "kws_0123456789".to_owned(),
        ] {
            // Also where a proxy is configured so badly that the client writes the requirement.
            let (name, permission) = (format!("{sent}=x"), format!("permission={sent}:x"));
            for route in ["permission=none", "permission=c:Read", "", &sent, &name, &permission] {
                let refusal = judge(&keys, &sent, route).unwrap_err();
                assert!(!format!("{refusal:?}").contains(&sent[4..]), "{refusal:?}");
            }
        }
    }
}
