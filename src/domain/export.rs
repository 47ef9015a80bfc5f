//! The digests for gateways that check digests themselves: one entry for each value that works now, distributed over
//! ConfigMaps or Secrets.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::Serialize;

use super::{
    key::Digest,
    verification::{Precedence, Standing, StandingValue, created, standing},
};
use crate::api::{ApiKey, KeyType};

/// The kind of object that digests are exported in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// For gateways that read ConfigMaps. The entries are not secret.
    ConfigMap,
    /// For gateways that read credentials from Secrets only, as agentgateway does.
    Secret,
}

impl std::str::FromStr for ExportKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ConfigMap" => Ok(Self::ConfigMap),
            "Secret" => Ok(Self::Secret),
            _ => Err(format!("{text:?} is not a kind for exported digests: use ConfigMap or Secret")),
        }
    }
}

/// The type of Secrets that hold digests. No other controller uses it.
pub const SECRET_TYPE: &str = "keywright.dev/digests";

/// The limit of the data of one object, in bytes. The API server accepts ConfigMaps and Secrets of up to 1 MiB,
/// metadata included.
pub const LIMIT: usize = 900_000;

/// The maximum number of objects. The chart grants the right to write that many, by name. They hold about 40,000 keys.
pub const MAX_OBJECTS: usize = 32;

/// The data of one object: the entry of each value as JSON, by the id of the value.
pub type Data = BTreeMap<String, String>;

/// The entries of all values that work now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// The entries, in the order of the digests.
    pub entries: Data,
    /// When the first of the values expires.
    pub until: Option<Timestamp>,
}

/// One entry, in the format of credentials of agentgateway.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExportedCredential<'a> {
    key_hash: String,
    metadata: CredentialMetadata<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CredentialMetadata<'a> {
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

/// Builds the export of `keys`, which may be in any order.
///
/// A digest that several ApiKeys list is exported for its owner by [`Precedence`], and not at all while the owner is
/// inactive or expired. Otherwise another ApiKey with the same digest could reactivate a revoked value, change its
/// permissions or deactivate it.
#[must_use]
pub fn export<'a>(keys: impl IntoIterator<Item = &'a ApiKey>, now: Timestamp) -> Export {
    let mut owners: HashMap<Digest, (Precedence<'a>, &'a ApiKey)> = HashMap::new();
    for key in keys {
        let metadata = &key.metadata;
        for StandingValue { digest, minted, .. } in standing(key).values {
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
        // If a key lists a digest twice, the current value counts.
        let value = standing.values.iter().find(|value| value.digest == digest);
        let Some(StandingValue { ends, .. }) = value.filter(|_| standing.active) else { continue };
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

/// Whether a change of an ApiKey leaves its spec and its standing as they were, and so the export too. Changes of
/// `status.lastUsedAt` and of conditions are frequent.
#[must_use]
pub fn is_same(before: &ApiKey, after: &ApiKey) -> bool {
    before.spec == after.spec
        && before.metadata.uid == after.metadata.uid
        && before.metadata.deletion_timestamp == after.metadata.deletion_timestamp
        && standing(before) == standing(after)
}

fn entry(key: &ApiKey, standing: &Standing<'_>, digest: Digest, expires_at: Option<Timestamp>) -> Option<String> {
    let credential = ExportedCredential {
        key_hash: format!("sha256:{digest}"),
        metadata: CredentialMetadata {
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
    /// The number of entries that do not fit. Gateways reject their values as unknown.
    pub left_out: usize,
}

/// Distributes entries over the smallest number of objects with less than `limit` bytes each: 1, 2, 4 and so on up to
/// `most`. The object of an entry depends only on its digest and on the number of objects, so that the creation or
/// deletion of a key changes only one object.
#[must_use]
pub fn split(entries: &Data, limit: usize, most: usize) -> Split {
    let size = |(id, entry): (&String, &String)| id.len() + entry.len();
    let mut count = 1;
    loop {
        let mut sizes = vec![0; count];
        for (id, entry) in entries {
            sizes[object_index(id, count)] += size((id, entry));
        }
        if count * 2 > most || sizes.iter().all(|size| *size < limit) {
            break;
        }
        count *= 2;
    }
    let mut split = Split { maps: vec![Data::new(); count], left_out: 0 };
    let mut sizes = vec![0; count];
    for (id, entry) in entries {
        let index = object_index(id, count);
        sizes[index] += size((id, entry));
        if sizes[index] < limit {
            split.maps[index].insert(id.clone(), entry.clone());
        } else {
            split.left_out += 1;
        }
    }
    split
}

/// The index of the object that holds an id. `count`, the number of objects, is a power of two. Digests are evenly
/// distributed.
fn object_index(id: &str, count: usize) -> usize {
    let digits = id.strip_prefix("key_").and_then(|digits| digits.get(..4));
    let first = digits.and_then(|digits| usize::from_str_radix(digits, 16).ok()).unwrap_or_default();
    first * count / 0x1_0000
}

/// The name of the object with this index: NAME, NAME-2, NAME-3 and so on.
#[must_use]
pub fn map_name(name: &str, index: usize) -> String {
    if index == 0 { name.to_owned() } else { format!("{name}-{}", index + 1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{ApiKeyStatus, KeyState, Time, Token},
        test_support::key_spec as spec,
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

    /// An active key. The digest of its value starts with `first`.
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
    fn an_entry_has_the_digest_and_the_identity_and_grants_of_its_key() {
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
    fn only_values_that_work_now_are_exported() {
        type Edit = fn(&mut ApiKey);
        let table: [(&str, Edit, bool); 14] = [
            ("active", |_| {}, true),
            ("lost", |key| status(key).state = Some(KeyState::Lost), true),
            ("active: true", |key| key.spec.active = Some(true), true),
            ("active: false before the status has changed", |key| key.spec.active = Some(false), false),
            ("inactive", |key| status(key).state = Some(KeyState::Inactive), false),
            ("expired", |key| status(key).state = Some(KeyState::Expired), false),
            ("rejected", |key| status(key).state = Some(KeyState::Rejected), false),
            ("no state yet", |key| status(key).state = None, false),
            ("no status yet", |key| key.status = None, false),
            ("being deleted", |key| key.metadata.deletion_timestamp = Some(Time(at(NOW))), false),
            ("expires now", |key| key.spec.expires_at = Some(at(NOW).to_string()), false),
            ("an invalid expiry", |key| key.spec.expires_at = Some("soon".to_owned()), false),
            ("an invalid digest", |key| status(key).tokens[0].sha256 = "ab".to_owned(), false),
            ("the value expires now", |key| status(key).tokens = vec![token("ab", Some(NOW))], false),
        ];
        for (name, change, works) in table {
            let mut key = key("a", 1, "ab");
            change(&mut key);
            assert_eq!(!ids(&[&key]).is_empty(), works, "{name}");
        }
    }

    #[test]
    fn a_value_in_overlap_is_exported_until_its_overlap_ends() {
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
    fn a_digest_is_owned_by_the_key_with_the_earliest_mint_time_also_while_that_is_inactive() {
        let minted = |mut key: ApiKey, second| {
            status(&mut key).tokens[0].minted_at = Time(at(second));
            key
        };
        // The attacker's object is older and has the smaller name.
        let (mut owner, mut attacker) = (minted(key("z", 5, "ab"), 10), minted(key("a", 1, "ab"), 20));
        let exported_for = |keys: [&ApiKey; 2]| {
            let found = export(keys, at(NOW));
            let entry = found.entries.get("key_ab00000000000000")?;
            let entry: serde_json::Value = serde_json::from_str(entry).unwrap();
            Some(entry["metadata"]["name"].as_str().unwrap().to_owned())
        };
        for (first, second) in [(&owner, &attacker), (&attacker, &owner)] {
            assert_eq!(exported_for([first, second]).as_deref(), Some("z"));
        }
        let mut elsewhere = minted(key("0", 1, "ab"), 20);
        elsewhere.metadata.namespace = Some("warehouse".to_owned());
        assert_eq!(exported_for([&elsewhere, &attacker]).as_deref(), Some("a"), "the namespace comes first");

        attacker.spec.active = Some(false);
        assert_eq!(exported_for([&owner, &attacker]).as_deref(), Some("z"), "the attacker can't deactivate the value");
        attacker.spec.active = None;
        owner.spec.active = Some(false);
        assert_eq!(exported_for([&owner, &attacker]), None, "the value of an inactive owner stays revoked");
        owner.spec.active = None;
        owner.metadata.deletion_timestamp = Some(Time(at(NOW)));
        assert_eq!(exported_for([&owner, &attacker]), None, "a value of a deleted owner stays revoked");
        owner.metadata.deletion_timestamp = None;
        status(&mut owner).tokens[0].expires_at = Some(Time(at(NOW - 1)));
        assert_eq!(exported_for([&owner, &attacker]), None, "an expired value stays expired");
    }

    #[test]
    fn is_same_ignores_a_last_use_and_detects_a_change_of_each_exported_field() {
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

    /// A thousand entries of 100 bytes, distributed as digests are.
    fn many() -> Data {
        let entry = |n: u64| (format!("key_{:016x}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15)), "x".repeat(80));
        (1..=1000).map(entry).collect()
    }

    #[test]
    fn entries_are_distributed_by_digest_over_the_fewest_maps() {
        let entries = many();
        assert_eq!(split(&entries, 1_000_000, MAX_OBJECTS).maps, vec![entries.clone()]);
        let four = split(&entries, 30_000, MAX_OBJECTS);
        assert_eq!((four.maps.len(), four.left_out), (4, 0));
        let together: Data = four.maps.iter().flatten().map(|(id, entry)| (id.clone(), entry.clone())).collect();
        assert_eq!(together, entries);
        for (index, map) in four.maps.iter().enumerate() {
            let size: usize = map.iter().map(|(id, entry)| id.len() + entry.len()).sum();
            assert!(size < 30_000, "{index}: {size}");
            assert!(map.keys().all(|id| usize::from_str_radix(&id[4..5], 16).unwrap() / 4 == index));
        }

        let mut fewer = entries.clone();
        let removed = fewer.pop_first().unwrap().0;
        let changed = split(&fewer, 30_000, MAX_OBJECTS);
        let differ: Vec<_> = (0..4).filter(|index| four.maps[*index] != changed.maps[*index]).collect();
        assert_eq!(differ, [0], "only the map of {removed} changes");
        assert_eq!(split(&Data::new(), 100, MAX_OBJECTS).maps, [Data::new()], "no entries result in one empty map");
    }

    #[test]
    fn entries_beyond_the_limit_are_left_out_and_counted() {
        let entries = many();
        let two = split(&entries, 10_000, 2);
        let held: usize = two.maps.iter().map(Data::len).sum();
        assert_eq!((two.maps.len(), held + two.left_out), (2, 1000));
        assert!(two.left_out > 700 && two.maps.iter().all(|map| map.len() == 99), "{}", two.left_out);
    }

    #[test]
    fn map_names_are_numbered_from_the_second_on() {
        assert_eq!(["a", "a-2", "a-3"].map(str::to_owned), [0, 1, 2].map(|index| map_name("a", index)));
    }
}
