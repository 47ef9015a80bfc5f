//! Fixtures of the unit tests.
#![cfg(test)]

pub mod api_server;

use std::sync::Arc;

use jiff::Timestamp;
use kube::runtime::watcher::Event;

use crate::{
    api::{
        ApiKey, ApiKeySpec, ApiKeyStatus, CatalogPermission, CatalogPreset, KeyState, KeyType, LegacyKind, LegacyRole,
        PermissionCatalogSpec, Time, Token,
    },
    domain::{catalog::Catalog, key::Digest},
    index::key_index::KeyIndex,
};

/// A permission of a catalog.
pub fn permission(name: &str, ingestion: bool) -> CatalogPermission {
    CatalogPermission {
        name: name.to_owned(),
        ingestion: ingestion.then_some(true),
        description: None,
        group: None,
        id: None,
        hidden: None,
        levels: vec![],
        roles_evidence: None,
        sources: vec![],
    }
}

/// A preset of a catalog.
pub fn preset(name: &str, standalone: bool, permissions: &[&str]) -> CatalogPreset {
    CatalogPreset {
        name: name.to_owned(),
        standalone: standalone.then_some(true),
        permissions: permissions.iter().map(|p| (*p).to_owned()).collect(),
        description: None,
        evidence: None,
        completeness: None,
        inferred: vec![],
        uncertain: vec![],
        people_permissions: vec![],
        note: None,
        sources: vec![],
    }
}

/// A catalog with these permissions and presets.
pub fn catalog_spec(permissions: Vec<CatalogPermission>, presets: Vec<CatalogPreset>) -> PermissionCatalogSpec {
    PermissionCatalogSpec { permissions, presets, ..Default::default() }
}

/// A merged catalog with four permissions and four presets.
pub fn catalog() -> Catalog {
    let spec = catalog_spec(
        vec![
            permission("alerts:ReadConfig", false),
            permission("alerts:UpdateConfig", false),
            permission("logs.data-ingress:SendData", true),
            permission("rum-ingress:SendData", true),
        ],
        vec![
            preset("Alerts", false, &["alerts:ReadConfig", "alerts:UpdateConfig"]),
            preset("SendData", false, &["logs.data-ingress:SendData"]),
            preset("RUM", true, &["rum-ingress:SendData"]),
            preset("Olly", false, &[]),
        ],
    );
    Catalog::merge([("test", &spec)]).0
}

/// A merged catalog in which legacy Logs Query keys may read alerts.
pub fn legacy_catalog() -> Catalog {
    let mut spec = catalog_spec(vec![permission("alerts:ReadConfig", false)], vec![]);
    spec.legacy_roles = vec![LegacyRole {
        name: "Logs Query".to_owned(),
        permissions: vec!["alerts:ReadConfig".to_owned()],
        legacy_kind: Some(LegacyKind::LogsQuery),
        legacy_key: None,
        legacy_key_evidence: None,
    }];
    Catalog::merge([("test", &spec)]).0
}

/// The spec of an ApiKey without optional fields.
pub fn key_spec(key_type: KeyType, presets: &[&str], permissions: &[&str]) -> ApiKeySpec {
    ApiKeySpec {
        legacy: None,
        display_name: None,
        key_type,
        user: None,
        presets: presets.iter().map(|s| (*s).to_owned()).collect(),
        permissions: permissions.iter().map(|s| (*s).to_owned()).collect(),
        active: None,
        access_policy_ref: None,
        expires_at: None,
        rotation: None,
        secret: None,
    }
}

/// A merged catalog with the permissions a:Read, b:Read and c:Read, and the preset P.
pub fn abc_catalog(presets: &[&str]) -> Arc<Catalog> {
    let permissions = ["a:Read", "b:Read", "c:Read"].map(|name| permission(name, false)).into();
    let all = catalog_spec(permissions, vec![preset("P", false, presets)]);
    Arc::new(Catalog::merge([("all", &all)]).0)
}

/// An ApiKey with preset P, permission b:Read and a value for each number.
pub fn key_with_values(namespace: &str, name: &str, created: i64, values: &[u8]) -> ApiKey {
    let mut key = ApiKey::new(name, key_spec(KeyType::Team, &["P"], &["b:Read"]));
    key.metadata.namespace = Some(namespace.to_owned());
    key.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
    let token = |value: &u8| Token {
        id: Digest::of(&[*value]).id(),
        generation: None,
        sha256: Digest::of(&[*value]).to_string(),
        minted_at: Time(Timestamp::from_second(created).unwrap()),
        expires_at: None,
    };
    key.status = Some(ApiKeyStatus {
        state: Some(KeyState::Active),
        presets: vec!["P".to_owned()],
        permissions: vec!["b:Read".to_owned()],
        tokens: values.iter().map(token).collect(),
        ..ApiKeyStatus::default()
    });
    key
}

/// An index with the ApiKey `shop/k`, which has this value and the permissions a:Read and b:Read, after `change`.
pub fn key_index(value: &str, change: impl FnOnce(&mut ApiKey)) -> KeyIndex {
    let keys = KeyIndex::default();
    keys.set_catalog(abc_catalog(&["a:Read"]));
    let mut key = key_with_values("shop", "k", 1, &[0]);
    key.status.as_mut().unwrap().tokens[0].sha256 = Digest::of(value.as_bytes()).to_string();
    change(&mut key);
    keys.apply(&Event::Apply(key));
    keys
}
