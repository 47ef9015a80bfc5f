//! What gateways that check digests themselves are given: one entry for each value that works now, and over which
//! ConfigMaps, or Secrets, the entries are spread.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::Serialize;

use super::{
    key::Digest,
    verification::{Precedence, Standing, Value, created, standing},
};
use crate::api::{ApiKey, KeyType};

/// The kind of object that digests are exported in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// There is nothing secret in it.
    ConfigMap,
    /// For gateways that read credentials from Secrets only, as agentgateway does.
    Secret,
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ConfigMap" => Ok(Self::ConfigMap),
            "Secret" => Ok(Self::Secret),
            _ => Err(format!("{text:?} is no kind for digests: write ConfigMap or Secret")),
        }
    }
}

/// The type of Secrets that hold digests: no controller takes them for something else.
pub const SECRET_TYPE: &str = "keywright.dev/digests";

/// How much one object holds. The API server takes 1 MiB of a ConfigMap or Secret; its metadata counts too.
pub const LIMIT: usize = 900_000;

/// How many objects there are at most. The chart grants the right to write so many, by name. They hold some
/// 40 000 keys.
pub const MOST: usize = 32;

/// The data of one object: what is known of a value, as JSON, by the id of the value.
pub type Data = BTreeMap<String, String>;

/// Every value that works now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// The entries. Their order is that of the digests.
    pub entries: Data,
    /// When the first of them stops working by itself.
    pub until: Option<Timestamp>,
}

/// One entry, in the shape that agentgateway reads credentials in.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Credential<'a> {
    key_hash: String,
    metadata: Metadata<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    team: &'a str,
    name: &'a str,
    #[serde(rename = "type")]
    type_: KeyType,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    presets: &'a [&'a str],
    permissions: &'a [&'a str],
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
}

/// What to export of `keys`, in whatever order they come.
///
/// A digest that several ApiKeys name is exported for the one that owns it by [`Precedence`], or not at all while that one
/// is inactive or expired: another that names the same digest could otherwise bring a revoked value back, give it other
/// rights, or turn it off.
#[must_use]
pub fn export<'a>(keys: impl IntoIterator<Item = &'a ApiKey>, now: Timestamp) -> Export {
    let mut owners: HashMap<Digest, (Precedence<'a>, &'a ApiKey)> = HashMap::new();
    for key in keys {
        let metadata = &key.metadata;
        for Value { digest, minted, .. } in standing(key).values {
            let namespace = metadata.namespace.as_deref().unwrap_or_default();
            let name = metadata.name.as_deref().unwrap_or_default();
            let claim = Precedence { minted, created: created(key), namespace, name };
            let owner = owners.entry(digest).or_insert((claim, key));
            if claim < owner.0 {
                *owner = (claim, key);
            }
        }
    }
    let mut export = Export::default();
    for (digest, (_, key)) in owners {
        let standing = standing(key);
        // A key that names one digest twice has the value that is its current one.
        let value = standing.values.iter().find(|value| value.digest == digest);
        let Some(Value { ends, .. }) = value.filter(|_| standing.active) else { continue };
        if ends.is_some_and(|at| at <= now) {
            continue;
        }
        if let Some(entry) = entry(key, &standing, digest, *ends) {
            export.entries.insert(digest.id(), entry);
            export.until = export.until.into_iter().chain(*ends).min();
        }
    }
    export
}

/// Whether what an ApiKey became changes nothing of an export, nor of anything else that follows from what it is and from
/// what its values are: `status.lastUsedAt` changes often, and conditions do.
#[must_use]
pub fn is_same(before: &ApiKey, after: &ApiKey) -> bool {
    before.spec == after.spec
        && before.metadata.uid == after.metadata.uid
        && before.metadata.deletion_timestamp == after.metadata.deletion_timestamp
        && standing(before) == standing(after)
}

fn entry(key: &ApiKey, standing: &Standing<'_>, digest: Digest, expires_at: Option<Timestamp>) -> Option<String> {
    let credential = Credential {
        key_hash: format!("sha256:{digest}"),
        metadata: Metadata {
            team: key.metadata.namespace.as_deref()?,
            name: key.metadata.name.as_deref()?,
            type_: key.spec.key_type,
            user: key.spec.user.as_deref(),
            presets: &standing.presets,
            permissions: &standing.permissions,
            expires_at,
        },
    };
    serde_json::to_string(&credential).ok()
}

/// The objects of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// The data of each, in the order of [`map_name`].
    pub maps: Vec<Data>,
    /// How many entries have no room. Their values are refused, as are all that a gateway does not know.
    pub left_out: usize,
}

/// Spreads entries over as few objects as hold less than `limit` bytes each: 1, 2, 4 and so on up to `most`. Which
/// one an entry is in depends on its digest and on their number alone, so that a key that comes or goes changes one
/// of them and not all that follow it.
#[must_use]
pub fn split(entries: &Data, limit: usize, most: usize) -> Split {
    let size = |(id, entry): (&String, &String)| id.len() + entry.len();
    let mut count = 1;
    loop {
        let mut sizes = vec![0; count];
        for (id, entry) in entries {
            sizes[place(id, count)] += size((id, entry));
        }
        if count * 2 > most || sizes.iter().all(|size| *size < limit) {
            break;
        }
        count *= 2;
    }
    let mut split = Split { maps: vec![Data::new(); count], left_out: 0 };
    let mut sizes = vec![0; count];
    for (id, entry) in entries {
        let at = place(id, count);
        sizes[at] += size((id, entry));
        if sizes[at] < limit {
            split.maps[at].insert(id.clone(), entry.clone());
        } else {
            split.left_out += 1;
        }
    }
    split
}

/// Which of `count` objects an id belongs to; `count` is a power of two. Digests are evenly spread.
fn place(id: &str, count: usize) -> usize {
    let digits = id.strip_prefix("key_").and_then(|digits| digits.get(..4));
    let first = digits.and_then(|digits| usize::from_str_radix(digits, 16).ok()).unwrap_or_default();
    first * count / 0x1_0000
}

/// The name of the object at `place`: NAME, NAME-2, NAME-3 and so on.
#[must_use]
pub fn map_name(name: &str, place: usize) -> String {
    if place == 0 { name.to_owned() } else { format!("{name}-{}", place + 1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{ApiKeyStatus, KeyState, Time, Token},
        domain::validate::tests::spec,
    };

    const NOW: i64 = 1_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn digest(first: &str) -> String {
        format!("{first:0<64}")
    }

    fn token(first: &str, expires_at: Option<i64>) -> Token {
        let sha256 = digest(first);
        Token {
            id: format!("key_{}", &sha256[..16]),
            sha256,
            generation: None,
            minted_at: Time(at(1)),
            expires_at: expires_at.map(|second| Time(at(second))),
        }
    }

    /// An active key whose value has a digest that begins with `first`.
    fn key(name: &str, created: i64, first: &str) -> ApiKey {
        let mut key = ApiKey::new(name, spec(KeyType::Team, &["Alerts"], &["logs:Read"]));
        key.metadata.namespace = Some("shop".to_owned());
        key.metadata.creation_timestamp = Some(Time(at(created)));
        key.status = Some(ApiKeyStatus {
            state: Some(KeyState::Active),
            presets: vec!["Alerts".to_owned()],
            permissions: vec!["logs:Read".to_owned()],
            tokens: vec![token(first, None)],
            ..ApiKeyStatus::default()
        });
        key
    }

    fn status(key: &mut ApiKey) -> &mut ApiKeyStatus {
        key.status.as_mut().unwrap()
    }

    fn ids(keys: &[&ApiKey]) -> Vec<String> {
        export(keys.iter().copied(), at(NOW)).entries.into_keys().collect()
    }

    #[test]
    fn an_entry_says_who_and_what_and_no_more() {
        let plain = key("checkout", 1, "ab");
        let found = export([&plain], at(NOW));
        assert_eq!(
            found.entries["key_ab00000000000000"],
            format!(
                r#"{{"keyHash":"sha256:{}","metadata":{{"team":"shop","name":"checkout","type":"Team","presets":["Alerts"],"permissions":["logs:Read"]}}}}"#,
                digest("ab")
            )
        );
        assert_eq!(found.until, None);

        let mut personal = key("alice", 1, "ab");
        personal.spec.key_type = KeyType::Personal;
        personal.spec.user = Some("alice@example.com".to_owned());
        personal.spec.expires_at = Some("1970-01-01T01:00:00+00:00".to_owned());
        let found = export([&personal], at(NOW));
        let entry: serde_json::Value = serde_json::from_str(&found.entries["key_ab00000000000000"]).unwrap();
        assert_eq!(entry["metadata"]["user"], "alice@example.com");
        assert_eq!(entry["metadata"]["expiresAt"], "1970-01-01T01:00:00Z");
        assert_eq!(found.until, Some(at(3600)));
    }

    #[test]
    fn only_what_works_now_is_exported() {
        type Change = fn(&mut ApiKey);
        let table: [(&str, Change, bool); 14] = [
            ("active", |_| {}, true),
            ("lost", |key| status(key).state = Some(KeyState::Lost), true),
            ("active: true", |key| key.spec.active = Some(true), true),
            ("active: false, and the status does not say so yet", |key| key.spec.active = Some(false), false),
            ("inactive", |key| status(key).state = Some(KeyState::Inactive), false),
            ("expired", |key| status(key).state = Some(KeyState::Expired), false),
            ("rejected", |key| status(key).state = Some(KeyState::Rejected), false),
            ("no state yet", |key| status(key).state = None, false),
            ("no status yet", |key| key.status = None, false),
            ("being deleted", |key| key.metadata.deletion_timestamp = Some(Time(at(NOW))), false),
            ("expires now", |key| key.spec.expires_at = Some(at(NOW).to_string()), false),
            ("an expiry that nobody can read", |key| key.spec.expires_at = Some("soon".to_owned()), false),
            ("no digest", |key| status(key).tokens[0].sha256 = "ab".to_owned(), false),
            ("the value expires now", |key| status(key).tokens = vec![token("ab", Some(NOW))], false),
        ];
        for (name, change, works) in table {
            let mut key = key("a", 1, "ab");
            change(&mut key);
            assert_eq!(!ids(&[&key]).is_empty(), works, "{name}");
        }
    }

    #[test]
    fn a_value_in_overlap_ends_before_its_key() {
        let mut key = key("a", 1, "ab");
        key.spec.expires_at = Some(at(NOW + 100).to_string());
        status(&mut key).tokens.push(token("cd", Some(NOW + 10)));
        let found = export([&key], at(NOW));
        assert_eq!((found.entries.len(), found.until), (2, Some(at(NOW + 10))));
        let found = export([&key], at(NOW + 10));
        assert_eq!((found.entries.len(), found.until), (1, Some(at(NOW + 100))));
        let found = export([&key], at(NOW + 100));
        assert_eq!((found.entries.len(), found.until), (0, None));
    }

    #[test]
    fn the_key_for_which_a_digest_was_written_first_owns_it_also_while_it_is_inactive() {
        let minted = |mut key: ApiKey, second| {
            status(&mut key).tokens[0].minted_at = Time(at(second));
            key
        };
        // The attacker's object is older, and its name comes first.
        let (mut owners, mut thief) = (minted(key("z", 5, "ab"), 10), minted(key("a", 1, "ab"), 20));
        let owner = |keys: [&ApiKey; 2]| {
            let found = export(keys, at(NOW));
            let entry = found.entries.get("key_ab00000000000000")?;
            let entry: serde_json::Value = serde_json::from_str(entry).unwrap();
            Some(entry["metadata"]["name"].as_str().unwrap().to_owned())
        };
        for (first, second) in [(&owners, &thief), (&thief, &owners)] {
            assert_eq!(owner([first, second]).as_deref(), Some("z"));
        }
        let mut elsewhere = minted(key("0", 1, "ab"), 20);
        elsewhere.metadata.namespace = Some("warehouse".to_owned());
        assert_eq!(owner([&elsewhere, &thief]).as_deref(), Some("a"), "the namespace before the name");

        thief.spec.active = Some(false);
        assert_eq!(owner([&owners, &thief]).as_deref(), Some("z"), "the loser does not turn the owner off");
        thief.spec.active = None;
        owners.spec.active = Some(false);
        assert_eq!(owner([&owners, &thief]), None, "what was revoked stays revoked");
        owners.spec.active = None;
        owners.metadata.deletion_timestamp = Some(Time(at(NOW)));
        assert_eq!(owner([&owners, &thief]), None, "also while a finalizer holds it");
        owners.metadata.deletion_timestamp = None;
        status(&mut owners).tokens[0].expires_at = Some(Time(at(NOW - 1)));
        assert_eq!(owner([&owners, &thief]), None, "what has expired stays expired");
    }

    #[test]
    fn a_last_use_changes_nothing_and_all_that_an_export_says_does() {
        let before = key("a", 1, "ab");
        let same = |change: fn(&mut ApiKey)| {
            let mut after = before.clone();
            change(&mut after);
            is_same(&before, &after)
        };
        assert!(same(|key| status(key).last_used_at = Some(Time(at(NOW)))));
        assert!(same(|key| status(key).observed_generation = Some(7)));
        for change in [
            (|key| key.spec.active = Some(false)) as fn(&mut ApiKey),
            |key| key.spec.expires_at = Some(at(NOW).to_string()),
            |key| key.metadata.deletion_timestamp = Some(Time(at(NOW))),
            |key| key.metadata.uid = Some("another".to_owned()),
            |key| status(key).state = Some(KeyState::Inactive),
            |key| status(key).permissions.clear(),
            |key| status(key).presets.clear(),
            |key| status(key).tokens.clear(),
            |key| status(key).tokens[0] = token("cd", None),
            |key| status(key).tokens[0].expires_at = Some(Time(at(NOW))),
            |key| status(key).tokens[0].minted_at = Time(at(NOW)),
        ] {
            assert!(!same(change));
        }
    }

    /// A thousand entries of 100 bytes, spread as digests are.
    fn many() -> Data {
        let entry = |n: u64| (format!("key_{:016x}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15)), "x".repeat(80));
        (1..=1000).map(entry).collect()
    }

    #[test]
    fn entries_are_spread_by_digest_over_as_few_maps_as_hold_them() {
        let entries = many();
        assert_eq!(split(&entries, 1_000_000, MOST).maps, vec![entries.clone()]);
        let four = split(&entries, 30_000, MOST);
        assert_eq!((four.maps.len(), four.left_out), (4, 0));
        let together: Data = four.maps.iter().flatten().map(|(id, entry)| (id.clone(), entry.clone())).collect();
        assert_eq!(together, entries);
        for (place, map) in four.maps.iter().enumerate() {
            let size: usize = map.iter().map(|(id, entry)| id.len() + entry.len()).sum();
            assert!(size < 30_000, "{place}: {size}");
            assert!(map.keys().all(|id| usize::from_str_radix(&id[4..5], 16).unwrap() / 4 == place));
        }

        let mut fewer = entries.clone();
        let gone = fewer.pop_first().unwrap().0;
        let changed = split(&fewer, 30_000, MOST);
        let differ: Vec<_> = (0..4).filter(|place| four.maps[*place] != changed.maps[*place]).collect();
        assert_eq!(differ, [0], "{gone} was in one");
        assert_eq!(split(&Data::new(), 100, MOST).maps, [Data::new()], "none is one empty map");
    }

    #[test]
    fn what_has_no_room_is_left_out_and_counted() {
        let entries = many();
        let two = split(&entries, 10_000, 2);
        let held: usize = two.maps.iter().map(Data::len).sum();
        assert_eq!((two.maps.len(), held + two.left_out), (2, 1000));
        assert!(two.left_out > 700 && two.maps.iter().all(|map| map.len() == 99), "{}", two.left_out);
    }

    #[test]
    fn maps_are_numbered_from_the_second_on() {
        assert_eq!(["a", "a-2", "a-3"].map(str::to_owned), [0, 1, 2].map(|place| map_name("a", place)));
    }
}
