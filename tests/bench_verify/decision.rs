//! The decision alone: SHA-256 of the value, a lookup in the key index, and the permissions, with 10 to 100,000 keys.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{hint::black_box, sync::Arc};

use criterion::{Criterion, criterion_group, criterion_main};
use jiff::Timestamp;
use keywright::{
    api::{ApiKey, CatalogPermission, PermissionCatalogSpec},
    domain::{
        catalog::Catalog,
        credential::{Credential, Source},
        key::{Digest, Key},
        requirement::Requirement,
    },
    index::key_index::KeyIndex,
    verify::decision::decide,
};
use kube::runtime::watcher::Event;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

fn filled_index(keys: usize) -> (KeyIndex, Vec<String>) {
    let index = KeyIndex::default();
    let permission: CatalogPermission = serde_json::from_value(json!({"name": "alerts:ReadConfig"})).unwrap();
    let spec = PermissionCatalogSpec { permissions: vec![permission], ..PermissionCatalogSpec::default() };
    index.set_catalog(Arc::new(Catalog::merge([("bench", &spec)]).0));
    let mut random = StdRng::seed_from_u64(1);
    let mut values = vec![];
    for number in 0..keys {
        let value = Key::mint(keywright::api::KeyType::Team, &mut random).unwrap();
        let digest = Digest::of(value.expose().as_bytes());
        let key: ApiKey = serde_json::from_value(json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
            "metadata": {"name": format!("key-{number}"), "namespace": format!("team-{}", number % 100)},
            "spec": {"type": "Team", "permissions": ["alerts:ReadConfig"]},
            "status": {
                "state": "Active", "permissions": ["alerts:ReadConfig"],
                "tokens": [{"id": digest.id(), "sha256": digest.to_string(), "mintedAt": "2026-11-24T00:00:00Z"}],
            },
        }))
        .unwrap();
        index.apply(&Event::Apply(key));
        if values.len() < 4096 {
            values.push(value.expose().to_owned());
        }
    }
    (index, values)
}

fn decisions(criterion: &mut Criterion) {
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let mut group = criterion.benchmark_group("decision");
    for keys in [10, 10_000, 100_000] {
        let (index, values) = filled_index(keys);
        let mut next = 0_usize;
        group.bench_function(format!("allowed, {keys} keys"), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % values.len();
                let credential = Credential::One(values[next].as_bytes().into(), &Source::Authorization);
                let requirement = Requirement::of_segment(black_box("permission=alerts:ReadConfig"), None);
                decide(&index, &credential, requirement, now).unwrap()
            });
        });
        group.bench_function(format!("unknown, {keys} keys"), |bencher| {
            let credential = Credential::One(b"kwt_unknown".as_slice().into(), &Source::Authorization);
            bencher.iter(|| {
                let requirement = Requirement::of_segment(black_box("permission=alerts:ReadConfig"), None);
                decide(&index, &credential, requirement, now).unwrap_err()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
