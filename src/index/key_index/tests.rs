#![cfg(test)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    api::{KeyState, Time, Token},
    test_support::{abc_catalog as catalog, catalog_spec, key_with_values as key, permission},
};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn digest(n: u8) -> Digest {
    Digest::of(&[n])
}

/// Returns the name of the owner of a value, whether it is active, and its permissions.
fn lookup(keys: &KeyIndex, value: u8) -> Option<(String, bool, Vec<String>)> {
    keys.look_up(&digest(value), |_, known| {
        known.map(|known| {
            let name = format!("{}/{}", known.team(), known.name());
            (name, known.is_active(), known.permissions().map(str::to_owned).collect())
        })
    })
}

fn owner(keys: &KeyIndex, value: u8) -> Option<String> {
    lookup(keys, value).map(|(name, ..)| name)
}

#[test]
fn both_values_of_an_overlap_are_found_and_a_revoked_one_is_not() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Apply(key("shop", "k", 1, &[2, 1])));
    assert_eq!((owner(&keys, 1), owner(&keys, 2)), (Some("shop/k".into()), Some("shop/k".into())));
    keys.apply(&Event::Apply(key("shop", "k", 1, &[2])));
    assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/k".into())));
    keys.apply(&Event::Delete(key("shop", "k", 1, &[2])));
    assert_eq!(owner(&keys, 2), None);
    assert_eq!(KeyIndexSize { bytes: 0, ..keys.size() }, KeyIndexSize::default());
    assert_eq!(keys.read().heap, 0);
}

#[test]
fn permissions_follow_the_catalog_in_any_order_of_events() {
    for catalog_first in [true, false] {
        let keys = KeyIndex::default();
        if catalog_first {
            keys.set_catalog(catalog(&["a:Read"]));
        }
        keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
        keys.set_catalog(catalog(&["a:Read"]));
        assert_eq!(lookup(&keys, 1).unwrap().2, ["a:Read", "b:Read"]);
        keys.set_catalog(catalog(&["c:Read"]));
        assert_eq!(lookup(&keys, 1).unwrap().2, ["b:Read", "c:Read"]);
        let has = |name| keys.look_up(&digest(1), |permissions, known| permissions.has(&known.unwrap(), name));
        assert_eq!(["B:READ", "a:Read", "x:Read"].map(has), [Some(true), Some(false), None]);
        keys.set_catalog(Arc::default());
        assert_eq!(
            lookup(&keys, 1).unwrap().2,
            Vec::<String>::new(),
            "a name that is in no catalog grants a permission"
        );
    }
}

/// Sets the mint time of all values of a key.
fn minted(mut key: ApiKey, second: i64) -> ApiKey {
    for token in &mut key.status.as_mut().unwrap().tokens {
        token.minted_at = Time(at(second));
    }
    key
}

#[test]
fn key_with_the_earliest_mint_time_owns_a_digest_in_every_state() {
    // The ApiKey of the attacker is older, and its name comes first.
    let attacker = || minted(key("a", "attacker", 1, &[1]), 20);
    let owners = || minted(key("z", "owner", 15, &[1]), 15);
    let change = |change: fn(&mut ApiKey)| {
        let mut key = owners();
        change(&mut key);
        key
    };
    let inactive = change(|key| key.spec.active = Some(false));
    let deleted = change(|key| key.metadata.deletion_timestamp = Some(Time(at(30))));
    let pending = change(|key| key.status.as_mut().unwrap().state = Some(KeyState::Pending));
    for order in [[attacker(), owners()], [owners(), attacker()]] {
        let keys = KeyIndex::default();
        for key in order {
            keys.apply(&Event::Apply(key));
        }
        assert_eq!(owner(&keys, 1).as_deref(), Some("z/owner"));
        assert_eq!(keys.size().duplicates, 1);
        for unusable in [&inactive, &deleted, &pending] {
            keys.apply(&Event::Apply(unusable.clone()));
            let (name, active, _) = lookup(&keys, 1).unwrap();
            assert_eq!((name.as_str(), active), ("z/owner", false), "a duplicate reactivates the value");
        }
        let expired = change(|key| key.spec.expires_at = Some(at(40).to_string()));
        keys.apply(&Event::Apply(expired));
        let ends = keys.look_up(&digest(1), |_, known| known.unwrap().ends());
        assert_eq!(ends, Some(40_000), "a duplicate extends the value");
        keys.apply(&Event::Apply(owners()));
        // An inactive duplicate does not deactivate the owner.
        let mut duplicate = attacker();
        duplicate.spec.active = Some(false);
        keys.apply(&Event::Apply(duplicate));
        assert_eq!(lookup(&keys, 1).map(|(name, active, _)| (name, active)), Some(("z/owner".to_owned(), true)));
        keys.apply(&Event::Delete(owners()));
        let (name, active, _) = lookup(&keys, 1).unwrap();
        assert_eq!((name.as_str(), active), ("a/attacker", false), "the value is active although the duplicate is not");
        keys.apply(&Event::Apply(attacker()));
        assert_eq!(lookup(&keys, 1).map(|(name, active, _)| (name, active)), Some(("a/attacker".to_owned(), true)));
        assert_eq!(keys.size().duplicates, 0);
    }
}

#[test]
fn precedence_uses_the_mint_time_of_each_value() {
    let keys = KeyIndex::default();
    let mut rotated = key("z", "owner", 1, &[2, 1]);
    rotated.status.as_mut().unwrap().tokens[0].minted_at = Time(at(100));
    keys.apply(&Event::Apply(rotated));
    keys.apply(&Event::Apply(minted(key("a", "attacker", 1, &[1]), 50)));
    assert_eq!(owner(&keys, 1).as_deref(), Some("z/owner"));
    keys.apply(&Event::Apply(minted(key("a", "attacker", 1, &[2]), 50)));
    assert_eq!(owner(&keys, 2).as_deref(), Some("a/attacker"), "the earlier mint time has no precedence");
}

#[test]
fn digests_of_the_same_second_belong_to_the_older_key_and_then_by_name() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Apply(minted(key("a", "young", 20, &[1]), 30)));
    keys.apply(&Event::Apply(minted(key("z", "old", 10, &[1]), 30)));
    assert_eq!(owner(&keys, 1).as_deref(), Some("z/old"));
    keys.apply(&Event::Apply(minted(key("b", "old", 10, &[1]), 30)));
    assert_eq!(owner(&keys, 1).as_deref(), Some("b/old"));
    // A time that does not fit into four bytes gives no precedence.
    keys.apply(&Event::Apply(minted(key("a", "late", 5, &[1]), 10_000_000_000)));
    assert_eq!(owner(&keys, 1).as_deref(), Some("b/old"));
}

#[test]
fn deactivated_key_keeps_its_digests_and_is_inactive() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
    keys.deactivate("shop", "k");
    keys.deactivate("shop", "unknown");
    assert_eq!(lookup(&keys, 1).map(|(name, active, _)| (name, active)), Some(("shop/k".to_owned(), false)));
}

/// The epoch overflows after 65,535 incomplete lists.
#[test]
fn overflow_of_the_epoch_neither_removes_nor_keeps_keys() {
    let keys = KeyIndex::default();
    for event in [Event::Init, Event::InitApply(key("shop", "deleted", 1, &[1])), Event::InitDone] {
        keys.apply(&event);
    }
    // Without the reset, the next list would have the number of the list that contained "deleted".
    for _ in 0..=u16::MAX {
        keys.apply(&Event::Init);
    }
    keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
    keys.apply(&Event::InitDone);
    assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/stays".into())));
}

#[test]
fn record_has_at_most_96_bytes() {
    assert!(size_of::<Option<IndexedKey>>() <= 96, "{}", size_of::<Option<IndexedKey>>());
}

/// A catalog with this number of permissions.
fn large_catalog(permissions: usize) -> Arc<Catalog> {
    let permissions = (0..permissions).map(|n| permission(&long_name(n), false)).collect();
    Arc::new(Catalog::merge([("all", &catalog_spec(permissions, vec![]))]).0)
}

/// A name of about 130 bytes.
fn long_name(number: usize) -> String {
    format!("{:0>120}:Action{number}", "resource")
}

/// A key with a value and these permissions.
fn key_with(number: usize, permissions: Vec<String>) -> ApiKey {
    let mut key = key("shop", &format!("k{number}"), 1, &[]);
    key.spec.presets.clear();
    key.spec.permissions = permissions.clone();
    let status = key.status.as_mut().unwrap();
    status.presets.clear();
    status.permissions = permissions;
    let digest = Digest::of(&number.to_le_bytes());
    let (id, sha256) = (digest.id(), digest.to_string());
    status.tokens = vec![Token { id, sha256, generation: None, minted_at: Time(at(1)), expires_at: None }];
    key
}

/// 2,700 keys with different sets of about 300 names of 130 bytes. A user with role `edit` in one namespace can create
/// them.
#[test]
fn keys_with_different_sets_of_hundreds_of_names_use_less_than_600_bytes_each() {
    const KEYS: usize = 2700;
    let keys = KeyIndex::default();
    keys.set_catalog(large_catalog(600));
    let empty = keys.size().bytes;
    let mut names = 0;
    for number in 0..KEYS {
        // A random half of 600 names, different for each key.
        let mut state = number as u64;
        let mut chance = |_: &usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 63 == 1
        };
        let permissions: Vec<_> = (0..600).filter(|n| chance(n)).map(long_name).collect();
        names += permissions.iter().map(|name| name.len() + size_of::<Box<str>>()).sum::<usize>();
        keys.apply(&Event::Apply(key_with(number, permissions)));
    }
    let size = keys.size();
    assert_eq!(size.grants, KEYS);
    let each = (size.bytes - empty) / KEYS;
    println!("{KEYS} keys, {} sets of 300 names: {each} bytes a key; the names alone: {}", size.grants, names / KEYS);
    assert!(each < 600, "{each} bytes a key");
    for number in 0..KEYS {
        keys.forget("shop", &format!("k{number}"));
    }
    assert_eq!((keys.size().grants, keys.read().grant_names.len()), (0, 0));
    assert_eq!(
        (keys.read().heap, keys.read().unknown_names),
        (0, 0),
        "memory is still counted after all keys were removed"
    );
}

#[test]
fn names_in_no_catalog_are_limited_and_grant_permissions_once_a_catalog_has_them() {
    let keys = KeyIndex::default();
    for number in 0..MAX_UNKNOWN_NAMES / 100 + 10 {
        let names = (0..100).map(|n| format!("unknown-{number}:{n}")).collect();
        keys.apply(&Event::Apply(key_with(number, names)));
    }
    let size = keys.size();
    assert_eq!(keys.read().unknown_names, MAX_UNKNOWN_NAMES);
    assert_eq!(size.names_left_out, (MAX_UNKNOWN_NAMES / 100 + 10) * 100 - MAX_UNKNOWN_NAMES);
    // A name in the catalog is never left out.
    keys.set_catalog(large_catalog(3));
    keys.apply(&Event::Apply(key_with(1_000_000, vec![long_name(0), "unknown:x".to_owned()])));
    let has = |number: usize, name: &str| {
        keys.look_up(&Digest::of(&number.to_le_bytes()), |permissions, known| permissions.has(&known.unwrap(), name))
    };
    assert_eq!(has(1_000_000, &long_name(0)), Some(true));
    let late = catalog_spec(vec![permission("unknown-0:7", false)], vec![]);
    keys.set_catalog(Arc::new(Catalog::merge([("late", &late)]).0));
    assert_eq!((has(0, "unknown-0:7"), has(1, "unknown-0:7")), (Some(true), Some(false)));
    assert_eq!(keys.read().unknown_names, MAX_UNKNOWN_NAMES, "one name left the unknown ones, and another joined them");
    for number in (0..MAX_UNKNOWN_NAMES / 100 + 10).chain([1_000_000]) {
        keys.forget("shop", &format!("k{number}"));
    }
    assert_eq!((keys.read().heap, keys.read().unknown_names, keys.read().grant_names.len()), (0, 0, 0));
}

#[test]
fn new_list_removes_deleted_keys_when_it_is_complete() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Init);
    keys.apply(&Event::InitApply(key("shop", "deleted", 1, &[1])));
    keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
    assert!(!keys.is_synced());
    keys.apply(&Event::InitDone);
    assert!(keys.is_synced());
    // An incomplete list has no effect.
    keys.apply(&Event::Init);
    keys.apply(&Event::InitApply(key("shop", "deleted", 1, &[1])));
    keys.apply(&Event::Init);
    keys.apply(&Event::InitApply(key("shop", "stays", 1, &[2])));
    assert!(owner(&keys, 1).is_some(), "the key was removed before the list was complete");
    keys.apply(&Event::InitDone);
    assert_eq!((owner(&keys, 1), owner(&keys, 2)), (None, Some("shop/stays".into())));
}

#[test]
fn uses_are_due_once_in_each_interval_and_survive_a_change_of_the_key() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
    let touch = |second| keys.look_up(&digest(1), |_, known| known.unwrap().touch(at(second)));
    let used_since = |interval, most| keys.used_since(interval, most, 1_000_000);
    assert_eq!(used_since(3600, 10), []);
    touch(10_000);
    let due = ("shop".to_owned(), "k".to_owned(), 10_000);
    assert_eq!(used_since(3600, 10), [due]);
    assert!(keys.is_unreported("shop", "k", 10_000, 3600));
    keys.reported("shop", "k", 10_000);
    touch(13_000);
    assert_eq!(used_since(3600, 10), [], "the last report is less than an hour old");
    touch(13_700);
    // Another replica reports a use, and the watch delivers it.
    let mut reported = key("shop", "k", 1, &[1]);
    reported.status.as_mut().unwrap().last_used_at = Some(Time(at(11_000)));
    keys.apply(&Event::Apply(reported));
    assert_eq!(used_since(3600, 10), []);
    assert_eq!(used_since(2000, 10).len(), 1, "the unreported use is lost");
    keys.apply(&Event::Apply(key("shop", "k", 2, &[1])));
    assert_eq!(used_since(0, 10), [], "a new key of the same name has a use");
}

#[test]
fn use_in_the_future_counts_as_now() {
    let keys = KeyIndex::default();
    keys.apply(&Event::Apply(key("shop", "k", 1, &[1])));
    keys.look_up(&digest(1), |_, known| known.unwrap().touch(at(4_000_000_000)));
    let due = ("shop".to_owned(), "k".to_owned(), 10_000);
    assert_eq!(keys.used_since(3600, 10, 10_000), [due]);
    keys.reported("shop", "k", 10_000);
    assert_eq!(keys.used_since(3600, 10, 50_000), [], "one use is reported twice");
}

#[derive(Clone, Debug)]
enum Change {
    Put { name: u8, created: i64, values: Vec<u8> },
    Delete { name: u8 },
    Relist { broken: bool },
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let values = proptest::collection::vec(0_u8..12, 0..3);
    let change = prop_oneof![
        8 => (0_u8..8, 1_i64..4, values).prop_map(|(name, created, values)| Change::Put { name, created, values }),
        3 => (0_u8..8).prop_map(|name| Change::Delete { name }),
        1 => any::<bool>().prop_map(|broken| Change::Relist { broken }),
    ];
    proptest::collection::vec(change, 1..60)
}

proptest! {
    /// After any sequence of events, the index and a linear search of a list find the same keys.
    #[test]
    fn index_and_linear_search_find_the_same_keys_after_any_events(changes in changes()) {
        let keys = KeyIndex::default();
        keys.set_catalog(catalog(&["a:Read"]));
        let mut model: BTreeMap<u8, (i64, Vec<u8>)> = BTreeMap::new();
        let of = |name: u8, created, values: &[u8]| {
            key(&format!("ns{}", name % 3), &format!("k{name}"), created, values)
        };
        for change in changes {
            match change {
                Change::Put { name, created, mut values } => {
                    values.dedup();
                    keys.apply(&Event::Apply(of(name, created, &values)));
                    model.insert(name, (created, values));
                }
                Change::Delete { name } => {
                    keys.apply(&Event::Delete(of(name, 1, &[])));
                    model.remove(&name);
                }
                Change::Relist { broken } => {
                    keys.apply(&Event::Init);
                    if broken {
                        keys.apply(&Event::Init);
                    }
                    for (name, (created, values)) in &model {
                        keys.apply(&Event::InitApply(of(*name, *created, values)));
                    }
                    keys.apply(&Event::InitDone);
                }
            }
            for value in 0..12 {
                let holders = model.iter().filter(|(_, (_, values))| values.contains(&value));
                let names = holders.map(|(name, (created, _))| (*created, format!("ns{}/k{name}", name % 3)));
                prop_assert_eq!(owner(&keys, value), names.min().map(|(_, name)| name));
            }
            let size = keys.size();
            prop_assert_eq!(size.keys, model.values().filter(|(_, values)| !values.is_empty()).count());
            prop_assert_eq!(size.digests, model.values().map(|(_, values)| values.len()).sum::<usize>());
            let all: std::collections::BTreeSet<_> = model.values().flat_map(|(_, values)| values).collect();
            prop_assert_eq!(size.duplicates, size.digests - all.len());
        }
    }
}
