//! Faults between the real operator and a real API server, injected by a proxy: crashes, lost responses, rejections and
//! broken watches, also at each single write.

// The compared metrics are integers.
#![allow(clippy::float_cmp)]

mod traces;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::time::{Duration, Instant};

use crate::support::exclusive::SoleOperator;
use crate::support::keys::{
    History, RECORD, apply, base64, condition, conditions, consistent, find_value, metric, metric_sum, settled, sha256,
    value_of,
};
use crate::support::proxy::{Planned, Record};
use crate::support::{Fault, eventually, namespace, output, plane, retry};
use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use hyper::Method;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use keywright::api::ApiKey;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

/// Longer than [`crate::support::TIMEOUT`], because faults cause backoff.
const TIMEOUT: Duration = Duration::from_mins(2);

/// The only operator, for one test.
struct Fixture(SoleOperator);

impl Deref for Fixture {
    type Target = SoleOperator;

    fn deref(&self) -> &SoleOperator {
        &self.0
    }
}

impl Fixture {
    async fn new(args: &[&str]) -> Self {
        let fixture = Self(SoleOperator::lock(args.iter().copied()).await);
        fixture.delete_namespaces().await;
        fixture.ensure_leader().await;
        fixture.wait_for_catalog().await;
        fixture
    }

    /// Deletes the namespaces of earlier tests, whose failing keys would cause requests.
    async fn delete_namespaces(&self) {
        let all: Api<Namespace> = Api::all(self.client.clone());
        let teams = async || {
            let mut names: Vec<_> =
                all.list(&ListParams::default()).await?.items.iter().map(ResourceExt::name_any).collect();
            names.retain(|name| name.starts_with("team-"));
            anyhow::Ok(names)
        };
        for team in teams().await.expect("the namespaces") {
            all.delete(&team, &DeleteParams::default()).await.expect("a deletion");
        }
        eventually("earlier namespaces are deleted", TIMEOUT, async || {
            let names = teams().await?;
            ensure!(names.is_empty(), "{names:?}");
            Ok(())
        })
        .await;
    }

    /// Waits until the running operator has reconciled every key.
    async fn wait_until_all_reconciled(&self) {
        let keys = Api::<ApiKey>::all(self.client.clone()).list(&ListParams::default()).await.unwrap().items.len();
        eventually("every key was reconciled", TIMEOUT, async || {
            self.ensure_leader().await;
            let done = metric_sum(&self.operator().metrics().await?, "keywright_reconcile_total");
            ensure!(done >= keys as f64, "{done} of {keys}");
            Ok(())
        })
        .await;
    }

    /// Asserts that no request had a value in its URL or listed Secrets other than the operator's own.
    fn assert_requests_are_minimal(&self) {
        for request in self.proxy.requests() {
            let whole = format!("{}?{}", request.path, request.query);
            assert!(find_value(&whole).is_none(), "a URL contains a value");
            let reads = request.method == Method::GET && request.path.ends_with("/secrets");
            if reads || request.path == "/api/v1/secrets" && request.method != Method::POST {
                assert_eq!(request.path, "/api/v1/namespaces/keywright-system/secrets", "a list of Secrets");
                let own = ["keywright-webhook-ca", "keywright-verifier-tls"];
                let selects = |name: &&str| request.query.contains(&format!("fieldSelector=metadata.name%3D{name}"));
                assert!(own.iter().any(selects), "a list of other Secrets: {whole}");
            }
        }
    }
}

fn in_namespace(namespace: &str) -> impl Fn(&Record) -> bool + Send + Sync + Clone + 'static {
    let part = format!("/namespaces/{namespace}/");
    move |request| request.path.contains(&part)
}

/// The three kinds of writes for a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    CreateSecret,
    PatchSecret,
    Status,
}

impl Kind {
    const ALL: [Self; 3] = [Self::CreateSecret, Self::PatchSecret, Self::Status];

    fn is(self, request: &Record) -> bool {
        match self {
            Self::CreateSecret => request.method == Method::POST && request.path.ends_with("/secrets"),
            Self::PatchSecret => request.method == Method::PATCH && request.path.contains("/secrets/"),
            Self::Status => request.method == Method::PATCH && request.path.ends_with("/status"),
        }
    }
}

/// A change of the spec, and the expected numbers of values and tokens after it.
struct Step {
    spec: Value,
    generations: usize,
    tokens: usize,
}

const NAME: &str = "checkout";
const REQUESTS: [&str; 2] = ["2026-11-23T10:00:00Z", "2026-11-24T10:00:00Z"];

/// The lifecycle in which faults are injected: mint, rotation with overlap, end of the overlap, another template,
/// rotation without overlap. It has ten writes: each step writes the Secret and the status.
fn steps() -> Vec<Step> {
    let step = |tier: &str, rotation: Option<(usize, &str)>, generations, tokens| {
        let mut spec = json!({
            "type": "Team", "presets": ["Alerts"],
            "secret": {"labels": {"example.com/tier": tier}, "annotations": {"example.com/note": tier}},
        });
        if let Some((request, overlap)) = rotation {
            spec["rotation"] = json!({"requestedAt": REQUESTS[request], "overlap": overlap});
        }
        Step { spec, generations, tokens }
    };
    vec![
        step("gold", None, 1, 1),
        step("gold", Some((0, "1h")), 2, 2),
        step("gold", Some((0, "0s")), 2, 1),
        step("silver", Some((0, "0s")), 2, 1),
        step("silver", Some((1, "0s")), 3, 1),
    ]
}
const WRITES: usize = 10;

/// An error unless the key is in the expected state of a step.
async fn reached(step: &Step, history: &History) -> Result<()> {
    let (key, secret, values) = history.current(NAME).await?;
    settled(&key)?;
    consistent(&key, &secret, &values)?;
    ensure!(
        values.len() == step.generations,
        "the Secret has held {} values in {} generations",
        values.len(),
        step.generations
    );
    let tokens = &key.status.as_ref().context("no status")?.tokens;
    ensure!(tokens.len() == step.tokens, "{} tokens instead of {}", tokens.len(), step.tokens);
    if step.tokens == 2 {
        ensure!(tokens[1].sha256 == sha256(&values[values.len() - 2]), "the token in overlap is not the value before");
    }
    let template = key.spec.secret.clone().unwrap_or_default();
    for (label, value) in &template.labels {
        ensure!(secret.labels().get(label) == Some(value), "label {label} is not {value}");
    }
    for (annotation, value) in &template.annotations {
        ensure!(secret.annotations().get(annotation) == Some(value), "annotation {annotation} is not {value}");
    }
    Ok(())
}

/// Runs the lifecycle in a namespace, and returns the final state without times and values.
async fn run_lifecycle(fixture: &Fixture, namespace: &str) -> Value {
    let history = History::of(&fixture.client, namespace);
    for (at, step) in steps().iter().enumerate() {
        eventually(&format!("step {at} is admitted"), TIMEOUT, async || {
            fixture.ensure_leader().await;
            apply(&fixture.client, namespace, NAME, &step.spec).await
        })
        .await;
        let goal = format!("the state of step {at}");
        let result = retry(&goal, TIMEOUT, async || {
            fixture.ensure_leader().await;
            reached(step, &history).await
        })
        .await;
        if let Err(error) = result {
            panic!(
                "{error:#}\n{:#?}\n{}",
                fixture.proxy.writes().iter().rev().take(20).collect::<Vec<_>>(),
                fixture.operator().log()
            );
        }
    }
    // Leftovers of a fault would be visible after another reconciliation.
    fixture.wait_until_all_reconciled().await;
    reached(steps().last().unwrap(), &history).await.unwrap();
    let versions = history.keys(NAME);
    assert!(
        versions.iter().flat_map(|key| &key.status).all(|status| status.tokens.len() <= 2),
        "a status has three tokens"
    );
    for version in &versions {
        let text = serde_json::to_string(version).unwrap();
        assert!(find_value(&text).is_none(), "an ApiKey contains a value");
    }
    let (key, secret, values) = history.current(NAME).await.unwrap();
    let mut record: Value = serde_json::from_str(&secret.annotations()[RECORD]).unwrap();
    // Each run has its own namespace and object.
    for own in ["namespace", "uid"] {
        assert!(record.as_object_mut().unwrap().remove(own).is_some(), "{own}");
    }
    let mut state = json!({
        "spec": key.spec, "status": key.status, "record": record,
        "secret": {
            "labels": secret.labels(), "annotations": secret.annotations().keys().collect::<Vec<_>>(),
            "type": secret.type_, "keys": secret.data.as_ref().map(|data| data.keys().collect::<Vec<_>>()),
            "owners": secret.owner_references().iter().map(|owner| (&owner.kind, &owner.name)).collect::<Vec<_>>(),
        },
    });
    let digests: Vec<_> = values.iter().map(|value| sha256(value)).collect();
    anonymize(&mut state, &digests);
    state
}

/// Replaces the parts that differ between runs: times, except those in [`REQUESTS`], and digests of values.
fn anonymize(value: &mut Value, digests: &[String]) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| anonymize(item, digests)),
        Value::Object(fields) => fields.values_mut().for_each(|field| anonymize(field, digests)),
        Value::String(text) if !REQUESTS.contains(&text.as_str()) => {
            for (at, digest) in digests.iter().enumerate() {
                *text =
                    text.replace(digest.as_str(), &format!("digest {at}")).replace(&digest[..16], &format!("id {at}"));
            }
            if text.parse::<Timestamp>().is_ok() {
                "a time".clone_into(text);
            }
        }
        _ => {}
    }
}

/// Runs the lifecycle once for each of its writes, with a fault at this write, and asserts that the final state is that
/// of a run without faults.
async fn at_each_write(fixture: &Fixture, fault: impl Fn() -> Fault) {
    let expected = run_lifecycle(fixture, &namespace(&fixture.client).await).await;
    for k in 1.. {
        let namespace = namespace(&fixture.client).await;
        let here = in_namespace(&namespace);
        let planned = fixture.proxy.inject(k, move |request| request.is_write() && here(request), fault());
        let state = run_lifecycle(fixture, &namespace).await;
        assert_eq!(state, expected, "with a fault at write {k}");
        if planned.injected() == 0 {
            assert!(k > WRITES, "the lifecycle has only {} writes", k - 1);
            break;
        }
        assert!(k < 40, "the lifecycle has too many writes");
    }
    fixture.assert_requests_are_minimal();
}

#[tokio::test]
async fn crash_after_any_write_does_not_change_the_final_state() {
    let fixture = Fixture::new(&[]).await;
    at_each_write(&fixture, || Fault::after_commit(fixture.killer())).await;
}

#[tokio::test]
async fn lost_response_to_any_write_does_not_change_the_final_state() {
    let fixture = Fixture::new(&[]).await;
    at_each_write(&fixture, || Fault::LoseAnswer).await;
}

/// The versions of the key with reason SecretWriteFailed.
fn reported(history: &History) -> Vec<ApiKey> {
    let failed = |key: &ApiKey| condition(key, "Ready").is_some_and(|ready| ready.reason == "SecretWriteFailed");
    history.keys(NAME).into_iter().filter(failed).collect()
}

fn assert_failure_report(kind: Kind, failed: &ApiKey) {
    let ready = condition(failed, "Ready").unwrap();
    let action =
        if kind == Kind::CreateSecret { "create Secret checkout-secret" } else { "update Secret checkout-secret" };
    assert_eq!(ready.status, "False");
    assert!(ready.message.starts_with(action), "{}", ready.message);
    assert!(ready.message.contains("the operator retries"), "{}", ready.message);
    assert!(condition(failed, "Reconciling").is_some_and(|c| c.status == "True"), "{:?}", conditions(failed));
    assert!(condition(failed, "Stalled").is_none(), "a transient failure is Stalled");
    assert_ne!(
        failed.status.as_ref().unwrap().observed_generation,
        failed.metadata.generation,
        "the status has the generation of the failed spec"
    );
}

#[tokio::test]
async fn rejected_writes_are_retried_and_do_not_change_the_final_state() {
    let fixture = Fixture::new(&[]).await;
    let expected = run_lifecycle(&fixture, &namespace(&fixture.client).await).await;
    let mut cases = vec![];
    for kind in Kind::ALL {
        for status in [409, 429, 500, 503] {
            let namespace = namespace(&fixture.client).await;
            let here = in_namespace(&namespace);
            let matches = move |request: &Record| here(request) && kind.is(request);
            let planned = fixture.proxy.inject_times(1, 3, matches, Fault::Reject(status));
            cases.push((kind, status, namespace, planned));
        }
    }
    let runs = cases.iter().map(async |(kind, status, namespace, planned)| {
        let history = History::of(&fixture.client, namespace);
        let state = run_lifecycle(&fixture, namespace).await;
        assert_eq!(state, expected, "{kind:?} answered {status}");
        assert_eq!(planned.injected(), 3, "{kind:?} answered {status}");
        // The client itself retries 429 and 503 for a short time, so these need not be reported.
        let reports = reported(&history);
        if *status == 500 && *kind != Kind::Status {
            assert!(!reports.is_empty(), "the failure of {kind:?} was not reported");
        }
        for failed in &reports {
            assert_failure_report(*kind, failed);
            let message = &condition(failed, "Ready").unwrap().message;
            assert!(message.contains(&status.to_string()), "{message}");
        }
    });
    join_all(runs).await;
    assert_eq!(
        metric(&fixture.operator().metrics().await.unwrap(), "keywright_objects_in_backoff"),
        Some(0.0),
        "an object is in backoff after its success"
    );
    fixture.assert_requests_are_minimal();
}

#[tokio::test]
async fn outage_is_reported_and_does_not_change_the_final_state() {
    let fixture = Fixture::new(&[]).await;
    let mut cases = vec![];
    for kind in [Kind::CreateSecret, Kind::PatchSecret] {
        for status in [429, 503] {
            let namespace = namespace(&fixture.client).await;
            let here = in_namespace(&namespace);
            let matches = move |request: &Record| here(request) && kind.is(request);
            let planned: Planned = fixture.proxy.inject_times(1, usize::MAX, matches, Fault::Reject(status));
            let history = History::of(&fixture.client, &namespace);
            cases.push((kind, namespace, history, planned));
        }
    }
    let runs = cases.iter().map(|(_, namespace, ..)| run_lifecycle(&fixture, namespace));
    let outage = async {
        for (kind, namespace, history, _) in &cases {
            // The client itself retries for up to 20 seconds.
            let failed = eventually("the failure is reported", TIMEOUT, async || {
                reported(history).pop().with_context(|| format!("{kind:?} in {namespace} is not reported"))
            })
            .await;
            assert_failure_report(*kind, &failed);
        }
        fixture.proxy.clear_faults();
    };
    futures::join!(join_all(runs), outage);
    assert!(cases.iter().all(|(.., planned)| planned.injected() > 3));
}

#[tokio::test]
async fn changes_during_broken_watches_are_not_missed() {
    let fixture = Fixture::new(&[]).await;
    let namespace = namespace(&fixture.client).await;
    let keys: Api<ApiKey> = Api::namespaced(fixture.client.clone(), &namespace);
    fixture.proxy.inject_times(1, usize::MAX, Record::is_watch, Fault::Delay(Duration::from_millis(700)));
    let spec = |request: usize| json!({"type": "Team", "presets": ["Alerts"], "rotation": {"requestedAt": REQUESTS[request], "overlap": "1h"}});
    for round in 0..2 {
        for number in 0..6 {
            fixture.proxy.cut_watches();
            apply(&fixture.client, &namespace, &format!("key-{number}"), &spec(round)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        for number in 0..6 {
            eventually("the key is minted", TIMEOUT, async || {
                let key = keys.get(&format!("key-{number}")).await?;
                settled(&key)?;
                ensure!(key.status.unwrap().tokens.len() == round + 1, "not rotated yet");
                Ok(())
            })
            .await;
        }
    }
    // Deletions while the watches are cut.
    for number in 0..3 {
        fixture.proxy.cut_watches();
        keys.delete(&format!("key-{number}"), &DeleteParams::default()).await.unwrap();
    }
    wait_for_key_count(&fixture).await;
    // The same with an expired resource version: the deletion is visible only in a new list.
    let apikeys = |request: &Record| request.is_watch() && request.path.ends_with("/apikeys");
    fixture.proxy.clear_faults();
    let expired = fixture.proxy.inject(1, apikeys, Fault::Expire);
    fixture.proxy.cut_watches();
    keys.delete("key-3", &DeleteParams::default()).await.unwrap();
    wait_for_key_count(&fixture).await;
    assert_eq!(expired.injected(), 1, "the watch was resumed");
    eventually("the Secrets of deleted keys are deleted", TIMEOUT, async || {
        let secrets =
            Api::<Secret>::namespaced(fixture.client.clone(), &namespace).list(&ListParams::default()).await?;
        let names: Vec<_> = secrets.items.iter().map(ResourceExt::name_any).collect();
        ensure!(names == ["key-4-secret", "key-5-secret"], "{names:?}");
        Ok(())
    })
    .await;
    fixture.assert_requests_are_minimal();
}

/// Waits until the operator's gauge equals the number of existing keys.
async fn wait_for_key_count(fixture: &Fixture) {
    eventually("the gauge counts the existing keys", TIMEOUT, async || {
        let gauge = metric_sum(&fixture.operator().metrics().await?, "keywright_api_keys");
        let keys = Api::<ApiKey>::all(fixture.client.clone()).list(&ListParams::default()).await?.items.len();
        ensure!(gauge == keys as f64, "the gauge is {gauge}, and {keys} keys exist");
        Ok(())
    })
    .await;
}

/// An alert of the chart fires while objects are in backoff, so a deleted object must not stay in backoff.
#[tokio::test]
async fn failing_key_deleted_during_a_relist_leaves_the_backoff() {
    let fixture = Fixture::new(&[]).await;
    let namespace = namespace(&fixture.client).await;
    // A conflict is not a failure and not in backoff, because only a user can fix it.
    let secret = serde_json::from_value::<Secret>(json!({"metadata": {"name": "taken-secret"}})).unwrap();
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &namespace);
    secrets.create(&PostParams::default(), &secret).await.unwrap();
    let taken =
        apply(&fixture.client, &namespace, "taken", &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    eventually("a conflict", TIMEOUT, async || {
        let key = Api::<ApiKey>::namespaced(fixture.client.clone(), &namespace).get(&taken.name_any()).await?;
        let reason = crate::support::keys::condition(&key, "Ready").map(|ready| ready.reason.clone());
        ensure!(reason.as_deref() == Some("SecretConflict"), "{reason:?}");
        Ok(())
    })
    .await;
    let path = format!("/namespaces/{namespace}/secrets");
    let creations = move |request: &Record| request.method == Method::POST && request.path.ends_with(&path);
    fixture.proxy.inject_times(1, 10_000, creations, Fault::Reject(500));
    apply(&fixture.client, &namespace, NAME, &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    let in_backoff = async |expected: f64| {
        eventually(&format!("{expected} in backoff"), Duration::from_secs(30), async || {
            let found = metric(&fixture.operator().metrics().await?, "keywright_objects_in_backoff");
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    in_backoff(1.0).await;
    let apikeys = |request: &Record| request.is_watch() && request.path.ends_with("/apikeys");
    fixture.proxy.inject(1, apikeys, Fault::Expire);
    fixture.proxy.cut_watches();
    Api::<ApiKey>::namespaced(fixture.client.clone(), &namespace).delete(NAME, &DeleteParams::default()).await.unwrap();
    wait_for_key_count(&fixture).await;
    in_backoff(0.0).await;
}

/// The operator may write only the catalog `coralogix`, so the other one is always rejected.
#[tokio::test]
async fn rejected_shipped_catalog_does_not_block_the_others() {
    let mut fixture = Fixture::new(&[]).await;
    fixture.killer()();
    let folder = fixture.plane.folder().join("catalogs");
    std::fs::create_dir(&folder).unwrap();
    let rejected = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": "another"},
        "spec": {"permissions": [], "presets": []},
    });
    std::fs::write(folder.join("a.yaml"), rejected.to_string()).unwrap();
    let shipped = crate::support::repository().join("charts/keywright/files/coralogix.yaml");
    std::fs::copy(shipped, folder.join("b.yaml")).unwrap();
    let catalogs: Api<keywright::api::PermissionCatalog> = Api::all(fixture.client.clone());
    catalogs.delete("coralogix", &DeleteParams::default()).await.unwrap();
    fixture.0.args.push(format!("--catalog-dir={}", folder.display()));
    fixture.ensure_leader().await;
    eventually("the other catalog is accepted", TIMEOUT, async || {
        let conditions = catalogs.get("coralogix").await?.status.context("no status")?.conditions;
        ensure!(conditions.iter().any(|c| c.type_ == "Accepted" && c.status == "True"), "{conditions:?}");
        Ok(())
    })
    .await;
    let log = fixture.operator().log();
    assert!(
        log.contains("a shipped PermissionCatalog could not be applied")
            && log.contains("the operator lacks this right")
    );
    assert!(catalogs.get_opt("another").await.unwrap().is_none());
}

/// Applies `count` keys with different specs, and waits until they are Ready.
async fn apply_varied_keys(fixture: &Fixture, namespace: &str, count: usize) {
    for number in 0..count {
        let mut spec = json!({"type": "Team", "presets": ["Alerts"]});
        match number % 5 {
            0 => spec["rotation"] = json!({"every": "720h", "overlap": "24h"}),
            1 => spec["expiresAt"] = json!("2099-01-01T00:00:00Z"),
            2 => {
                spec["type"] = json!("Personal");
                spec["user"] = json!("alice@example.com");
            }
            3 => spec["secret"] = json!({"labels": {"example.com/tier": "gold"}}),
            _ => spec["rotation"] = json!({"requestedAt": REQUESTS[0]}),
        }
        apply(&fixture.client, namespace, &format!("key-{number}"), &spec).await.unwrap();
    }
    all_settled(fixture, namespace, count).await;
}

async fn all_settled(fixture: &Fixture, namespace: &str, count: usize) {
    let keys: Api<ApiKey> = Api::namespaced(fixture.client.clone(), namespace);
    eventually("the keys are minted", TIMEOUT, async || {
        let keys = keys.list(&ListParams::default()).await?.items;
        ensure!(keys.len() == count, "{} keys", keys.len());
        keys.iter().try_for_each(settled)
    })
    .await;
}

#[tokio::test]
async fn idle_operator_only_renews_its_lease_and_writes_nothing() {
    let fixture = Fixture::new(&[]).await;
    let active = namespace(&fixture.client).await;
    let inactive = namespace(&fixture.client).await;
    apply_varied_keys(&fixture, &active, 20).await;
    for name in ["one", "two"] {
        let spec = json!({"type": "SendYourData", "presets": ["SendData"], "active": false});
        apply(&fixture.client, &inactive, name, &spec).await.unwrap();
    }
    all_settled(&fixture, &inactive, 2).await;
    // Events are written asynchronously.
    let mutating = |namespace: &str| -> Vec<Record> {
        let here = in_namespace(namespace);
        fixture.proxy.requests().into_iter().filter(|r| r.is_mutating() && here(r)).collect()
    };
    eventually("all Events are written", TIMEOUT, async || {
        let events = mutating(&active).iter().filter(|r| r.path.ends_with("/events") && r.status.is_some()).count();
        ensure!(events >= 20, "{events}");
        Ok(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    // A new key takes three writes: Secret, status and one Event.
    let of_kind = |namespace: &str, kind: Kind| mutating(namespace).iter().filter(|r| kind.is(r)).count();
    assert_eq!(of_kind(&active, Kind::CreateSecret), 20);
    assert_eq!(of_kind(&active, Kind::Status), 20, "not one write of the status for each key");
    assert_eq!(of_kind(&active, Kind::PatchSecret), 0);
    assert_eq!(mutating(&active).len(), 60, "not three writes for each key");
    assert_eq!(mutating(&inactive).len(), 6, "not three writes for each inactive key");

    let before = fixture.proxy.requests().len();
    let reconciled = metric_sum(&fixture.operator().metrics().await.unwrap(), "keywright_reconcile_total");
    tokio::time::sleep(Duration::from_mins(1)).await;
    let requests = fixture.proxy.requests().split_off(before);
    let writes: Vec<_> = requests.iter().filter(|r| r.is_mutating() && !r.path.contains("/leases/")).collect();
    assert!(writes.is_empty(), "an idle operator writes: {writes:#?}");
    let renewals = requests.iter().filter(|r| r.method == Method::PUT && r.path.contains("/leases/")).count();
    assert!((12..=26).contains(&renewals), "{renewals} renewals in a minute: expected one in 2.5 s");
    // Expected: one renewal in 2.5 s, two reads of certificates in 10 s, five watches renewed every 5 min, and one read
    // of each Secret in 10 min.
    let mut kinds = BTreeMap::new();
    for request in &requests {
        // All Secrets of keys are counted together.
        let path = if in_namespace(&active)(request) { "a key's Secret" } else { request.path.as_str() };
        *kinds.entry((request.method.as_str(), path)).or_insert(0) += 1;
    }
    println!("{} requests in an idle minute: {kinds:#?}", requests.len());
    let reads = requests.iter().filter(|r| r.path.ends_with("/keywright-webhook-ca")).count();
    assert!(reads <= 8, "{reads} reads of the CA in a minute: expected one in 10 s");
    assert!(requests.len() <= 60, "{} requests in an idle minute: {requests:#?}", requests.len());
    let after = metric_sum(&fixture.operator().metrics().await.unwrap(), "keywright_reconcile_total");
    let keys = Api::<ApiKey>::all(fixture.client.clone()).list(&ListParams::default()).await.unwrap().items.len();
    assert!(after - reconciled <= keys as f64 / 2.0, "{} reconciliations in an idle minute", after - reconciled);
    fixture.assert_requests_are_minimal();
}

/// The texts that must not contain values: all outputs of the operator and all objects except the data of Secrets.
async fn texts(fixture: &Fixture, logs: &[String]) -> Vec<(String, String)> {
    let kubectl = |args: &[&str]| output(fixture.plane.kubectl().args(args)).unwrap();
    let mut texts: Vec<_> = logs.iter().enumerate().map(|(at, log)| (format!("log {at}"), log.clone())).collect();
    let kinds = "apikeys,permissioncatalogs,events,events.v1.events.k8s.io,leases,configmaps";
    texts.push(("objects".to_owned(), kubectl(&["get", kinds, "-A", "-o", "json", "--show-managed-fields"])));
    texts.push(("kubectl get".to_owned(), kubectl(&["get", "apikeys", "-A", "-o", "wide"])));
    texts.push(("kubectl describe".to_owned(), kubectl(&["describe", "apikeys", "-A"])));
    texts.push(("metrics".to_owned(), fixture.operator().metrics().await.unwrap()));
    let secrets = Api::<Secret>::all(fixture.client.clone()).list(&ListParams::default()).await.unwrap();
    let metadata: Vec<_> = secrets.items.iter().map(|secret| &secret.metadata).collect();
    texts.push(("metadata of Secrets".to_owned(), serde_json::to_string(&metadata).unwrap()));
    let requests = fixture.proxy.requests();
    texts.push(("URLs".to_owned(), format!("{requests:?}")));
    texts
}

#[tokio::test]
async fn values_are_only_in_secrets_even_at_log_level_trace() {
    let fixture = Fixture::new(&["--log=trace"]).await;
    let namespace = namespace(&fixture.client).await;
    let history = History::of(&fixture.client, &namespace);
    let here = in_namespace(&namespace);
    // Faults produce error messages, which could contain a value.
    for (fault, kind) in [
        (Fault::Reject(500), Kind::CreateSecret),
        (Fault::LoseAnswer, Kind::CreateSecret),
        (Fault::Reject(409), Kind::PatchSecret),
        (Fault::Reject(500), Kind::PatchSecret),
        (Fault::LoseAnswer, Kind::PatchSecret),
    ] {
        let here = here.clone();
        fixture.proxy.inject(2, move |request| here(request) && kind.is(request), fault);
    }
    apply_varied_keys(&fixture, &namespace, 5).await;
    let rotate = async |request: usize| {
        for number in 0..5 {
            let mut spec =
                json!({"type": "Team", "presets": ["Alerts"], "rotation": {"requestedAt": REQUESTS[request]}});
            if number == 2 {
                spec["type"] = json!("Personal");
                spec["user"] = json!("alice@example.com");
            }
            if number == 4 {
                spec["rotation"]["requestedAt"] = json!(format!("2026-11-24T0{}:00:00Z", request + 1));
            }
            apply(&fixture.client, &namespace, &format!("key-{number}"), &spec).await.unwrap();
        }
        all_settled(&fixture, &namespace, 5).await;
    };
    rotate(0).await;
    let through_proxy = fixture.operator().log();
    // The second run uses TLS, without the proxy, because the TLS library also logs.
    fixture.killer()();
    eventually("the operator starts", TIMEOUT, async || fixture.start(None).await).await;
    fixture.ensure_leader().await;
    rotate(1).await;
    let logs = [through_proxy, fixture.operator().log()];
    for log in &logs {
        assert!(log.contains("TRACE"), "the log has no TRACE lines");
    }

    let mut values = vec![];
    // Key 2 is Personal: its Secret has no plain value.
    for number in [0, 1, 3, 4] {
        let secret = format!("key-{number}-secret");
        let of_key = history.values(&secret);
        assert_eq!(of_key.len(), 3, "values of {secret}: minted and rotated twice");
        values.extend(of_key);
    }
    assert!(values.iter().all(|value| find_value(value).is_some() && find_value(&base64(value)).is_some()));
    for (place, text) in texts(&fixture, &logs).await {
        for value in &values {
            assert!(!text.contains(value.as_str()), "{place} contains a value");
            assert!(!text.contains(&base64(value)), "{place} contains a value in base64");
        }
        // This also finds values that were never stored because their write was rejected.
        assert!(find_value(&text).is_none(), "{place} contains text in the format of a value");
    }
    fixture.assert_requests_are_minimal();
}

/// A policy may quote the rejected object in its message, which the API server returns. In CEL, as in JSON, the data of
/// a Secret is in base64.
#[tokio::test]
async fn value_quoted_in_a_rejection_is_redacted_everywhere() {
    let fixture = Fixture::new(&[]).await;
    let namespace = namespace(&fixture.client).await;
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "quotes"},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [{
                    "apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"],
                    "operations": ["CREATE", "UPDATE"],
                }],
            },
            "validations": [{
                "expression": "false", "messageExpression": "'quoted: ' + string(object.data['key-value'])",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "quotes"},
        "spec": {"policyName": "quotes", "validationActions": ["Deny"]},
    });
    let file = fixture.plane.folder().join("quotes.json");
    std::fs::write(&file, json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]}).to_string()).unwrap();
    output(fixture.plane.kubectl().args(["create", "-f"]).arg(&file)).unwrap();
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &namespace);
    let probe = json!({"metadata": {"name": "probe"}, "data": {"key-value": base64("probe")}});
    let probe: Secret = serde_json::from_value(probe).unwrap();
    eventually("the policy is in force", TIMEOUT, async || {
        let params = PostParams { dry_run: true, ..PostParams::default() };
        let error = secrets.create(&params, &probe).await.err().context("the create was admitted")?.to_string();
        ensure!(error.contains(&base64("probe")), "the message does not quote the value: {error}");
        Ok(())
    })
    .await;
    apply(&fixture.client, &namespace, NAME, &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    eventually("the rejection is reported", TIMEOUT, async || {
        let key = Api::<ApiKey>::namespaced(fixture.client.clone(), &namespace).get(NAME).await?;
        let ready = condition(&key, "Ready").context("no condition")?;
        ensure!(ready.reason == "SecretWriteFailed" && ready.message.contains("quoted"), "{}", ready.message);
        Ok(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let found: Vec<_> = texts(&fixture, &[fixture.operator().log()])
        .await
        .into_iter()
        .filter_map(|(place, text)| {
            let form = if find_value(&text)?.starts_with("kw") { "plain" } else { "base64" };
            Some((place, form))
        })
        .collect();
    output(fixture.plane.kubectl().args(["delete", "-f"]).arg(&file)).unwrap();
    assert!(found.is_empty(), "values were found in {found:?}");
}

#[tokio::test]
async fn key_whose_status_was_never_written_adopts_its_secret() {
    let fixture = Fixture::new(&[]).await;
    let namespace = namespace(&fixture.client).await;
    let history = History::of(&fixture.client, &namespace);
    let here = in_namespace(&namespace);
    let lost = fixture.proxy.inject_times(1, usize::MAX, move |r| here(r) && Kind::Status.is(r), Fault::Reject(500));
    apply(&fixture.client, &namespace, NAME, &steps()[0].spec).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &namespace);
    let value = eventually("the Secret exists, and the status write was retried", TIMEOUT, async || {
        ensure!(lost.injected() > 1, "the status write was not retried");
        value_of(&secrets.get("checkout-secret").await?).context("no value")
    })
    .await;
    fixture.killer()();
    let key = Api::<ApiKey>::namespaced(fixture.client.clone(), &namespace).get(NAME).await.unwrap();
    assert!(key.status.is_none(), "the status was written");
    fixture.proxy.clear_faults();
    fixture.ensure_leader().await;
    eventually("the key is adopted", TIMEOUT, async || reached(&steps()[0], &history).await).await;
    assert_eq!(history.values("checkout-secret"), [value]);
    let events: Api<Event> = Api::namespaced(fixture.client.clone(), &namespace);
    eventually("an Event reports the adoption", TIMEOUT, async || {
        let events = events.list(&ListParams::default()).await?.items;
        let reasons: Vec<_> = events.iter().map(|event| event.reason.clone().unwrap_or_default()).collect();
        ensure!(reasons == ["Adopted"], "{reasons:?}");
        Ok(())
    })
    .await;
}

/// A rotation completes even if another writer causes repeated conflicts on the Secret.
#[tokio::test]
async fn rotation_completes_despite_repeated_conflicts() {
    let fixture = Fixture::new(&[]).await;
    let namespace = namespace(&fixture.client).await;
    let history = History::of(&fixture.client, &namespace);
    let steps = steps();
    apply(&fixture.client, &namespace, NAME, &steps[0].spec).await.unwrap();
    eventually("the key is minted", TIMEOUT, async || reached(&steps[0], &history).await).await;
    // Six conflicts in a row exceed the retries of one reconciliation.
    for step in &steps[1..] {
        let here = in_namespace(&namespace);
        let planned = fixture.proxy.inject_times(1, 6, move |r| here(r) && Kind::PatchSecret.is(r), Fault::Reject(409));
        let started = Instant::now();
        apply(&fixture.client, &namespace, NAME, &step.spec).await.unwrap();
        let result =
            retry("the rotation despite conflicts", Duration::from_secs(45), async || reached(step, &history).await)
                .await;
        let key = history.keys(NAME).pop().unwrap();
        let (settled, conflicts) = (settled(&key).is_ok(), planned.injected());
        if let Err(error) = result {
            panic!("{error:#}; {conflicts} conflicts; the key is Ready in its generation: {settled}");
        }
        assert_eq!(conflicts, 6);
        assert!(started.elapsed() < Duration::from_secs(45));
    }
}
