//! What goes wrong between the operator and the API server, at every moment at which it can: crashes, lost answers,
//! refusals, broken watches. The real operator, the real API server, and a proxy between them that breaks things.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// Metrics are floating point numbers; those that are compared here count something.
#![allow(clippy::float_cmp)]

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use hyper::Method;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use keywright::api::ApiKey;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use support::keys::{
    History, RECORD, agree, apply, base64, condition, conditions, free_lease, looks_like_a_value, metric, metric_sum,
    settled, sha256, value_of,
};
use support::proxy::{Planned, Record};
use support::{ControlPlane, Fault, Operator, Options, Proxy, Release, eventually, namespace, output, plane, retry};
use tokio::sync::{MutexGuard, OnceCell};

/// Longer than [`support::PATIENCE`]: after a fault, backoffs come on top of a slow machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// The one operator of this control plane, behind a proxy, for one test. A second one would only wait for the lease.
struct Stage {
    plane: &'static ControlPlane,
    release: &'static Release,
    client: Client,
    proxy: Proxy,
    args: Vec<String>,
    operator: Arc<Mutex<Option<Arc<Operator>>>>,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    async fn enter(args: &[&str]) -> Self {
        static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        static RELEASE: OnceCell<Release> = OnceCell::const_new();
        let turn = TURN.lock().await;
        let plane = plane().await;
        let release = RELEASE.get_or_init(async || Release::install(plane, &[]).await.expect("the chart")).await;
        let stage = Self {
            plane,
            release,
            client: plane.client().await.expect("a client"),
            proxy: Proxy::start(plane).expect("a proxy"),
            args: args.iter().map(ToString::to_string).collect(),
            operator: Arc::default(),
            _turn: turn,
        };
        stage.clear().await;
        stage.mend().await;
        // The first operator of all installs the catalogue; before that, no key can be admitted.
        let accepted = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=5s"];
        eventually("the catalogue is accepted", PATIENCE, async || output(plane.kubectl().args(accepted))).await;
        stage
    }

    /// Takes away what earlier tests left: a key that fails for ever would be no idle one.
    async fn clear(&self) {
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
        eventually("earlier namespaces are gone", PATIENCE, async || {
            let left = teams().await?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .await;
    }

    /// Starts the operator if it is down, and waits until it leads and answers.
    async fn mend(&self) {
        eventually("the operator leads", PATIENCE, async || {
            let running = self.operator.lock().unwrap().clone();
            let operator = match running {
                Some(operator) => operator,
                None => self.start(Some(self.proxy.url())).await?,
            };
            operator.get("/readyz").await?;
            ensure!(metric(&operator.metrics().await?, "keywright_leader") == Some(1.0), "it does not lead");
            Ok(())
        })
        .await;
    }

    /// Starts the operator, which finds the lease free.
    async fn start(&self, server: Option<&str>) -> Result<Arc<Operator>> {
        free_lease(&self.client).await?;
        let options = Options { server: server.map(str::to_owned), args: self.args.clone(), ..Options::default() };
        let operator = Arc::new(Operator::start(self.plane, self.release, options).await?);
        *self.operator.lock().unwrap() = Some(Arc::clone(&operator));
        Ok(operator)
    }

    fn operator(&self) -> Arc<Operator> {
        self.operator.lock().unwrap().clone().expect("an operator")
    }

    /// What kills the operator, from wherever it is called.
    fn killer(&self) -> impl Fn() + Send + Sync + 'static {
        let operator = Arc::clone(&self.operator);
        move || {
            if let Some(operator) = operator.lock().unwrap().take() {
                operator.kill();
            }
        }
    }

    /// Waits until the operator that runs now has looked at every key that there is.
    async fn looked(&self) {
        let keys = Api::<ApiKey>::all(self.client.clone()).list(&ListParams::default()).await.unwrap().items.len();
        eventually("every key was reconciled", PATIENCE, async || {
            self.mend().await;
            let done = metric_sum(&self.operator().metrics().await?, "keywright_reconcile_total");
            ensure!(done >= keys as f64, "{done} of {keys}");
            Ok(())
        })
        .await;
    }

    /// What must hold for every request that was ever sent, whatever the test.
    fn requests_are_modest(&self) {
        for request in self.proxy.requests() {
            let whole = format!("{}?{}", request.path, request.query);
            assert!(looks_like_a_value(&whole).is_none(), "a value in a URL");
            let reads = request.method == Method::GET && request.path.ends_with("/secrets");
            if reads || request.path == "/api/v1/secrets" && request.method != Method::POST {
                assert_eq!(request.path, "/api/v1/namespaces/keywright-system/secrets", "a list of Secrets");
                let own = ["keywright-webhook-ca", "keywright-verifier-tls"];
                let named = |name: &&str| request.query.contains(&format!("fieldSelector=metadata.name%3D{name}"));
                assert!(own.iter().any(named), "more than Secrets of its own: {whole}");
            }
        }
    }
}

fn of(namespace: &str) -> impl Fn(&Record) -> bool + Send + Sync + Clone + 'static {
    let part = format!("/namespaces/{namespace}/");
    move |request| request.path.contains(&part)
}

/// The three kinds of write in the life of a key.
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

/// One wish of a user, and what it must have led to.
struct Wish {
    spec: Value,
    generations: usize,
    tokens: usize,
}

const NAME: &str = "checkout";
const REQUESTS: [&str; 2] = ["2026-11-23T10:00:00Z", "2026-11-24T10:00:00Z"];

/// The life that every fault is tried on: mint, rotation with overlap, the overlap withdrawn, another template,
/// rotation without overlap. Ten writes: each wish is one of the Secret and one of the status.
fn wishes() -> Vec<Wish> {
    let wish = |tier: &str, rotation: Option<(usize, &str)>, generations, tokens| {
        let mut spec = json!({
            "type": "Team", "presets": ["Alerts"],
            "secret": {"labels": {"example.com/tier": tier}, "annotations": {"example.com/note": tier}},
        });
        if let Some((request, overlap)) = rotation {
            spec["rotation"] = json!({"requestedAt": REQUESTS[request], "overlap": overlap});
        }
        Wish { spec, generations, tokens }
    };
    vec![
        wish("gold", None, 1, 1),
        wish("gold", Some((0, "1h")), 2, 2),
        wish("gold", Some((0, "0s")), 2, 1),
        wish("silver", Some((0, "0s")), 2, 1),
        wish("silver", Some((1, "0s")), 3, 1),
    ]
}
const WRITES: usize = 10;

/// An error unless a wish has come true, exactly.
async fn fulfilled(wish: &Wish, history: &History) -> Result<()> {
    let (key, secret, values) = history.now(NAME).await?;
    settled(&key)?;
    agree(&key, &secret, &values)?;
    ensure!(
        values.len() == wish.generations,
        "the Secret has held {} values in {} generations",
        values.len(),
        wish.generations
    );
    let tokens = &key.status.as_ref().context("no status")?.tokens;
    ensure!(tokens.len() == wish.tokens, "{} tokens instead of {}", tokens.len(), wish.tokens);
    if wish.tokens == 2 {
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

/// Lives that life in a namespace while faults strike, and returns its end.
async fn live(stage: &Stage, namespace: &str) -> Value {
    let history = History::of(&stage.client, namespace);
    for (at, wish) in wishes().iter().enumerate() {
        eventually(&format!("wish {at} is admitted"), PATIENCE, async || {
            stage.mend().await;
            apply(&stage.client, namespace, NAME, &wish.spec).await
        })
        .await;
        let what = format!("wish {at} comes true");
        let came_true = retry(&what, PATIENCE, async || {
            stage.mend().await;
            fulfilled(wish, &history).await
        })
        .await;
        if let Err(error) = came_true {
            panic!(
                "{error:#}\n{:#?}\n{}",
                stage.proxy.writes().iter().rev().take(20).collect::<Vec<_>>(),
                stage.operator().log()
            );
        }
    }
    // Whatever a fault left half done would show by now.
    stage.looked().await;
    fulfilled(wishes().last().unwrap(), &history).await.unwrap();
    let versions = history.keys(NAME);
    assert!(versions.iter().flat_map(|key| &key.status).all(|status| status.tokens.len() <= 2), "three tokens at once");
    for version in &versions {
        let text = serde_json::to_string(version).unwrap();
        assert!(looks_like_a_value(&text).is_none(), "a value in an ApiKey");
    }
    let (key, secret, values) = history.now(NAME).await.unwrap();
    let mut record: Value = serde_json::from_str(&secret.annotations()[RECORD]).unwrap();
    // Every life has a place and an object of its own.
    for own in ["namespace", "uid"] {
        assert!(record.as_object_mut().unwrap().remove(own).is_some(), "{own}");
    }
    let mut end = json!({
        "spec": key.spec, "status": key.status, "record": record,
        "secret": {
            "labels": secret.labels(), "annotations": secret.annotations().keys().collect::<Vec<_>>(),
            "type": secret.type_, "keys": secret.data.as_ref().map(|data| data.keys().collect::<Vec<_>>()),
            "owners": secret.owner_references().iter().map(|owner| (&owner.kind, &owner.name)).collect::<Vec<_>>(),
        },
    });
    let digests: Vec<_> = values.iter().map(|value| sha256(value)).collect();
    anonymize(&mut end, &digests);
    end
}

/// Takes out what is different in every life: times that the test did not choose, and the values.
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

/// Lives the life once for each of its writes, with a fault at that write, until a life has no such write any more.
async fn at_each_write(stage: &Stage, fault: impl Fn() -> Fault) {
    let expected = live(stage, &namespace(&stage.client).await).await;
    for k in 1.. {
        let namespace = namespace(&stage.client).await;
        let here = of(&namespace);
        let planned = stage.proxy.inject(k, move |request| request.is_write() && here(request), fault());
        let end = live(stage, &namespace).await;
        assert_eq!(end, expected, "with a fault at write {k}");
        if planned.struck() == 0 {
            assert!(k > WRITES, "only {} writes in a life: what else writes?", k - 1);
            break;
        }
        assert!(k < 40, "a life does not end");
    }
    stage.requests_are_modest();
}

#[tokio::test]
async fn a_key_survives_a_crash_after_each_write_in_turn() {
    let stage = Stage::enter(&[]).await;
    at_each_write(&stage, || Fault::after_commit(stage.killer())).await;
}

#[tokio::test]
async fn a_key_survives_a_lost_answer_to_each_write_in_turn() {
    let stage = Stage::enter(&[]).await;
    at_each_write(&stage, || Fault::LoseAnswer).await;
}

/// The conditions of the versions in which a write of the Secret was reported as failed.
fn reported(history: &History) -> Vec<ApiKey> {
    let failed = |key: &ApiKey| condition(key, "Ready").is_some_and(|ready| ready.reason == "SecretWriteFailed");
    history.keys(NAME).into_iter().filter(failed).collect()
}

fn report_is_useful(kind: Kind, failed: &ApiKey) {
    let ready = condition(failed, "Ready").unwrap();
    let what =
        if kind == Kind::CreateSecret { "create Secret checkout-secret" } else { "update Secret checkout-secret" };
    assert_eq!(ready.status, "False");
    assert!(ready.message.starts_with(what), "{}", ready.message);
    assert!(ready.message.contains("tried again"), "{}", ready.message);
    assert!(condition(failed, "Reconciling").is_some_and(|c| c.status == "True"), "{:?}", conditions(failed));
    assert!(condition(failed, "Stalled").is_none(), "it passes by itself");
    assert_ne!(
        failed.status.as_ref().unwrap().observed_generation,
        failed.metadata.generation,
        "a status that is not up to date must not claim to be"
    );
}

#[tokio::test]
async fn refused_writes_are_tried_again_until_the_end_is_right() {
    let stage = Stage::enter(&[]).await;
    let expected = live(&stage, &namespace(&stage.client).await).await;
    let mut cases = vec![];
    for kind in Kind::ALL {
        for status in [409, 429, 500, 503] {
            let namespace = namespace(&stage.client).await;
            let here = of(&namespace);
            let matches = move |request: &Record| here(request) && kind.is(request);
            let planned = stage.proxy.inject_times(1, 3, matches, Fault::Refuse(status));
            cases.push((kind, status, namespace, planned));
        }
    }
    let lives = cases.iter().map(async |(kind, status, namespace, planned)| {
        let history = History::of(&stage.client, namespace);
        let end = live(&stage, namespace).await;
        assert_eq!(end, expected, "{kind:?} answered {status}");
        assert_eq!(planned.struck(), 3, "{kind:?} answered {status}");
        // What the client tries again by itself within a moment (429, 503) is not worth a word to the user.
        let reports = reported(&history);
        if *status == 500 && *kind != Kind::Status {
            assert!(!reports.is_empty(), "{kind:?} failed, and nobody was told");
        }
        for failed in &reports {
            report_is_useful(*kind, failed);
            let message = &condition(failed, "Ready").unwrap().message;
            assert!(message.contains(&status.to_string()), "{message}");
        }
    });
    join_all(lives).await;
    assert_eq!(
        metric(&stage.operator().metrics().await.unwrap(), "keywright_objects_in_backoff"),
        Some(0.0),
        "who succeeded is forgotten"
    );
    stage.requests_are_modest();
}

#[tokio::test]
async fn an_outage_is_reported_and_ends_without_a_trace() {
    let stage = Stage::enter(&[]).await;
    let mut cases = vec![];
    for kind in [Kind::CreateSecret, Kind::PatchSecret] {
        for status in [429, 503] {
            let namespace = namespace(&stage.client).await;
            let here = of(&namespace);
            let matches = move |request: &Record| here(request) && kind.is(request);
            let planned: Planned = stage.proxy.inject_times(1, usize::MAX, matches, Fault::Refuse(status));
            let history = History::of(&stage.client, &namespace);
            cases.push((kind, namespace, history, planned));
        }
    }
    let lives = cases.iter().map(|(_, namespace, ..)| live(&stage, namespace));
    let outage = async {
        for (kind, namespace, history, _) in &cases {
            // The client itself tries for up to twenty seconds.
            let failed = eventually("the failure is reported", PATIENCE, async || {
                reported(history).pop().with_context(|| format!("{kind:?} in {namespace} is not reported"))
            })
            .await;
            report_is_useful(*kind, &failed);
        }
        stage.proxy.heal();
    };
    futures::join!(join_all(lives), outage);
    assert!(cases.iter().all(|(.., planned)| planned.struck() > 3));
}

#[tokio::test]
async fn what_happens_while_watches_break_is_not_missed() {
    let stage = Stage::enter(&[]).await;
    let namespace = namespace(&stage.client).await;
    let keys: Api<ApiKey> = Api::namespaced(stage.client.clone(), &namespace);
    stage.proxy.inject_times(1, usize::MAX, Record::is_watch, Fault::Delay(Duration::from_millis(700)));
    let spec = |request: usize| json!({"type": "Team", "presets": ["Alerts"], "rotation": {"requestedAt": REQUESTS[request], "overlap": "1h"}});
    for round in 0..2 {
        for number in 0..6 {
            stage.proxy.cut_watches();
            apply(&stage.client, &namespace, &format!("key-{number}"), &spec(round)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        for number in 0..6 {
            eventually("the key is minted", PATIENCE, async || {
                let key = keys.get(&format!("key-{number}")).await?;
                settled(&key)?;
                ensure!(key.status.unwrap().tokens.len() == round + 1, "not rotated yet");
                Ok(())
            })
            .await;
        }
    }
    // Deletions while nobody listens.
    for number in 0..3 {
        stage.proxy.cut_watches();
        keys.delete(&format!("key-{number}"), &DeleteParams::default()).await.unwrap();
    }
    counts_agree(&stage).await;
    // The same, but the API server has forgotten meanwhile what was deleted: only a new list tells.
    let apikeys = |request: &Record| request.is_watch() && request.path.ends_with("/apikeys");
    stage.proxy.heal();
    let expired = stage.proxy.inject(1, apikeys, Fault::Expire);
    stage.proxy.cut_watches();
    keys.delete("key-3", &DeleteParams::default()).await.unwrap();
    counts_agree(&stage).await;
    assert_eq!(expired.struck(), 1, "the watch was resumed");
    eventually("the Secrets of deleted keys are gone", PATIENCE, async || {
        let secrets = Api::<Secret>::namespaced(stage.client.clone(), &namespace).list(&ListParams::default()).await?;
        let names: Vec<_> = secrets.items.iter().map(ResourceExt::name_any).collect();
        ensure!(names == ["key-4-secret", "key-5-secret"], "{names:?}");
        Ok(())
    })
    .await;
    stage.requests_are_modest();
}

/// Waits until the operator's gauge counts just the keys that there are.
async fn counts_agree(stage: &Stage) {
    eventually("deleted keys are forgotten", PATIENCE, async || {
        let known = metric_sum(&stage.operator().metrics().await?, "keywright_api_keys");
        let keys = Api::<ApiKey>::all(stage.client.clone()).list(&ListParams::default()).await?.items.len();
        ensure!(known == keys as f64, "the operator knows {known} of {keys}");
        Ok(())
    })
    .await;
}

/// An alert of the chart fires while objects are in backoff. One that is gone must not keep it firing.
#[tokio::test]
async fn a_failing_key_that_is_deleted_while_the_watch_starts_over_leaves_the_backoff() {
    let stage = Stage::enter(&[]).await;
    let namespace = namespace(&stage.client).await;
    // A conflict waits for a person, and is no failure.
    let secret = serde_json::from_value::<Secret>(json!({"metadata": {"name": "taken-secret"}})).unwrap();
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    secrets.create(&PostParams::default(), &secret).await.unwrap();
    let taken =
        apply(&stage.client, &namespace, "taken", &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    eventually("a conflict", PATIENCE, async || {
        let key = Api::<ApiKey>::namespaced(stage.client.clone(), &namespace).get(&taken.name_any()).await?;
        let reason = support::keys::condition(&key, "Ready").map(|ready| ready.reason.clone());
        ensure!(reason.as_deref() == Some("SecretConflict"), "{reason:?}");
        Ok(())
    })
    .await;
    let path = format!("/namespaces/{namespace}/secrets");
    let creations = move |request: &Record| request.method == Method::POST && request.path.ends_with(&path);
    stage.proxy.inject_times(1, 10_000, creations, Fault::Refuse(500));
    apply(&stage.client, &namespace, NAME, &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    let in_backoff = async |expected: f64| {
        eventually(&format!("{expected} in backoff"), Duration::from_secs(30), async || {
            let found = metric(&stage.operator().metrics().await?, "keywright_objects_in_backoff");
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    in_backoff(1.0).await;
    let apikeys = |request: &Record| request.is_watch() && request.path.ends_with("/apikeys");
    stage.proxy.inject(1, apikeys, Fault::Expire);
    stage.proxy.cut_watches();
    Api::<ApiKey>::namespaced(stage.client.clone(), &namespace).delete(NAME, &DeleteParams::default()).await.unwrap();
    counts_agree(&stage).await;
    in_backoff(0.0).await;
}

/// The operator may write no other catalog than that of the chart, so that this one is refused for good.
#[tokio::test]
async fn a_shipped_catalog_that_is_refused_does_not_hold_up_the_others() {
    let mut stage = Stage::enter(&[]).await;
    stage.killer()();
    let folder = stage.plane.folder().join("catalogs");
    std::fs::create_dir(&folder).unwrap();
    let refused = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": "another"},
        "spec": {"permissions": [], "presets": []},
    });
    std::fs::write(folder.join("a.yaml"), refused.to_string()).unwrap();
    let shipped = support::repository().join("charts/keywright/files/coralogix.yaml");
    std::fs::copy(shipped, folder.join("b.yaml")).unwrap();
    let catalogs: Api<keywright::api::PermissionCatalog> = Api::all(stage.client.clone());
    catalogs.delete("coralogix", &DeleteParams::default()).await.unwrap();
    stage.args.push(format!("--catalog-dir={}", folder.display()));
    stage.mend().await;
    eventually("the other catalog is accepted", PATIENCE, async || {
        let conditions = catalogs.get("coralogix").await?.status.context("no status")?.conditions;
        ensure!(conditions.iter().any(|c| c.type_ == "Accepted" && c.status == "True"), "{conditions:?}");
        Ok(())
    })
    .await;
    let log = stage.operator().log();
    assert!(log.contains("a shipped catalogue could not be applied") && log.contains("the operator lacks this right"));
    assert!(catalogs.get_opt("another").await.unwrap().is_none());
}

/// Applies keys of every sort, and waits until they are minted.
async fn all_sorts(stage: &Stage, namespace: &str, count: usize) {
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
        apply(&stage.client, namespace, &format!("key-{number}"), &spec).await.unwrap();
    }
    all_settled(stage, namespace, count).await;
}

async fn all_settled(stage: &Stage, namespace: &str, count: usize) {
    let keys: Api<ApiKey> = Api::namespaced(stage.client.clone(), namespace);
    eventually("the keys are minted", PATIENCE, async || {
        let keys = keys.list(&ListParams::default()).await?.items;
        ensure!(keys.len() == count, "{} keys", keys.len());
        keys.iter().try_for_each(settled)
    })
    .await;
}

#[tokio::test]
async fn an_idle_minute_costs_lease_renewals_and_nothing_is_written() {
    let stage = Stage::enter(&[]).await;
    let active = namespace(&stage.client).await;
    let inactive = namespace(&stage.client).await;
    all_sorts(&stage, &active, 20).await;
    for name in ["one", "two"] {
        let spec = json!({"type": "SendYourData", "presets": ["SendData"], "active": false});
        apply(&stage.client, &inactive, name, &spec).await.unwrap();
    }
    all_settled(&stage, &inactive, 2).await;
    // Events are written beside the rest, and may come later.
    let mutating = |namespace: &str| -> Vec<Record> {
        let here = of(namespace);
        stage.proxy.requests().into_iter().filter(|r| r.is_mutating() && here(r)).collect()
    };
    eventually("all Events are written", PATIENCE, async || {
        let events = mutating(&active).iter().filter(|r| r.path.ends_with("/events") && r.status.is_some()).count();
        ensure!(events >= 20, "{events}");
        Ok(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    // A fresh key is worth its Secret, its status and one Event.
    let of_kind = |namespace: &str, kind: Kind| mutating(namespace).iter().filter(|r| kind.is(r)).count();
    assert_eq!(of_kind(&active, Kind::CreateSecret), 20);
    assert_eq!(of_kind(&active, Kind::Status), 20, "the status is written once");
    assert_eq!(of_kind(&active, Kind::PatchSecret), 0);
    assert_eq!(mutating(&active).len(), 60, "three requests a key");
    assert_eq!(mutating(&inactive).len(), 6, "and no more for one that starts inactive");

    let before = stage.proxy.requests().len();
    let reconciled = metric_sum(&stage.operator().metrics().await.unwrap(), "keywright_reconcile_total");
    tokio::time::sleep(Duration::from_mins(1)).await;
    let requests = stage.proxy.requests().split_off(before);
    let writes: Vec<_> = requests.iter().filter(|r| r.is_mutating() && !r.path.contains("/leases/")).collect();
    assert!(writes.is_empty(), "an idle operator writes: {writes:#?}");
    let renewals = requests.iter().filter(|r| r.method == Method::PUT && r.path.contains("/leases/")).count();
    assert!((12..=26).contains(&renewals), "{renewals} renewals in a minute: one in 2.5 s is meant");
    // Renewals: a write in 2.5 s. Certificates: two reads in 10 s. Watches: one in 5 min each, of five. Looks
    // at Secrets: one in 10 min a key.
    let mut kinds = BTreeMap::new();
    for request in &requests {
        // One line for all Secrets of keys.
        let path = if of(&active)(request) { "a key's Secret" } else { request.path.as_str() };
        *kinds.entry((request.method.as_str(), path)).or_insert(0) += 1;
    }
    println!("{} requests in an idle minute: {kinds:#?}", requests.len());
    let looks = requests.iter().filter(|r| r.path.ends_with("/keywright-webhook-ca")).count();
    assert!(looks <= 8, "{looks} looks at the CA in a minute: one in 10 s is meant");
    assert!(requests.len() <= 60, "{} requests in an idle minute: {requests:#?}", requests.len());
    let after = metric_sum(&stage.operator().metrics().await.unwrap(), "keywright_reconcile_total");
    let keys = Api::<ApiKey>::all(stage.client.clone()).list(&ListParams::default()).await.unwrap().items.len();
    assert!(after - reconciled <= keys as f64 / 2.0, "{} reconciliations in an idle minute", after - reconciled);
    stage.requests_are_modest();
}

/// The texts in which no value may be: everything but the Secrets' data.
async fn texts(stage: &Stage, logs: &[String]) -> Vec<(String, String)> {
    let kubectl = |args: &[&str]| output(stage.plane.kubectl().args(args)).unwrap();
    let mut texts: Vec<_> = logs.iter().enumerate().map(|(at, log)| (format!("log {at}"), log.clone())).collect();
    let kinds = "apikeys,permissioncatalogs,events,events.v1.events.k8s.io,leases,configmaps";
    texts.push(("objects".to_owned(), kubectl(&["get", kinds, "-A", "-o", "json", "--show-managed-fields"])));
    texts.push(("the list".to_owned(), kubectl(&["get", "apikeys", "-A", "-o", "wide"])));
    texts.push(("the description".to_owned(), kubectl(&["describe", "apikeys", "-A"])));
    texts.push(("metrics".to_owned(), stage.operator().metrics().await.unwrap()));
    let secrets = Api::<Secret>::all(stage.client.clone()).list(&ListParams::default()).await.unwrap();
    let metadata: Vec<_> = secrets.items.iter().map(|secret| &secret.metadata).collect();
    texts.push(("metadata of Secrets".to_owned(), serde_json::to_string(&metadata).unwrap()));
    let requests = stage.proxy.requests();
    texts.push(("URLs".to_owned(), format!("{requests:?}")));
    texts
}

#[tokio::test]
async fn no_value_leaves_its_secret_not_even_at_log_level_trace() {
    let stage = Stage::enter(&["--log=trace"]).await;
    let namespace = namespace(&stage.client).await;
    let history = History::of(&stage.client, &namespace);
    let here = of(&namespace);
    // Errors are where texts are put together that nobody reads before.
    for (fault, kind) in [
        (Fault::Refuse(500), Kind::CreateSecret),
        (Fault::LoseAnswer, Kind::CreateSecret),
        (Fault::Refuse(409), Kind::PatchSecret),
        (Fault::Refuse(500), Kind::PatchSecret),
        (Fault::LoseAnswer, Kind::PatchSecret),
    ] {
        let here = here.clone();
        stage.proxy.inject(2, move |request| here(request) && kind.is(request), fault);
    }
    all_sorts(&stage, &namespace, 5).await;
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
            apply(&stage.client, &namespace, &format!("key-{number}"), &spec).await.unwrap();
        }
        all_settled(&stage, &namespace, 5).await;
    };
    rotate(0).await;
    let through_proxy = stage.operator().log();
    // Once more without the proxy: TLS and what it negotiates log for themselves.
    stage.killer()();
    eventually("the operator starts", PATIENCE, async || stage.start(None).await).await;
    stage.mend().await;
    rotate(1).await;
    let logs = [through_proxy, stage.operator().log()];
    for log in &logs {
        assert!(log.contains("TRACE"), "the log is no trace");
    }

    let mut values = vec![];
    // The third is a Personal key, whose Secret never has a value.
    for number in [0, 1, 3, 4] {
        let place = format!("key-{number}-secret");
        let of_key = history.values(&place);
        assert_eq!(of_key.len(), 3, "mint and two rotations of {place}");
        values.extend(of_key);
    }
    assert!(
        values.iter().all(|value| looks_like_a_value(value).is_some() && looks_like_a_value(&base64(value)).is_some())
    );
    for (place, text) in texts(&stage, &logs).await {
        for value in &values {
            assert!(!text.contains(value.as_str()), "{place} holds a value");
            assert!(!text.contains(&base64(value)), "{place} holds a value in base64");
        }
        // Also those that were never stored, since their write was refused.
        assert!(looks_like_a_value(&text).is_none(), "{place} holds something that looks like a value");
    }
    stage.requests_are_modest();
}

/// A policy engine may quote what it refuses, and the API server passes that on. In CEL the data of a Secret is in
/// base64, as it is in JSON.
#[tokio::test]
async fn a_refusal_that_quotes_the_value_brings_it_nowhere() {
    let stage = Stage::enter(&[]).await;
    let namespace = namespace(&stage.client).await;
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
    let file = stage.plane.folder().join("quotes.json");
    std::fs::write(&file, json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]}).to_string()).unwrap();
    output(stage.plane.kubectl().args(["create", "-f"]).arg(&file)).unwrap();
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let probe = json!({"metadata": {"name": "probe"}, "data": {"key-value": base64("probe")}});
    let probe: Secret = serde_json::from_value(probe).unwrap();
    eventually("the policy is in force", PATIENCE, async || {
        let params = PostParams { dry_run: true, ..PostParams::default() };
        let error = secrets.create(&params, &probe).await.err().context("it was granted")?.to_string();
        ensure!(error.contains(&base64("probe")), "it does not quote: {error}");
        Ok(())
    })
    .await;
    apply(&stage.client, &namespace, NAME, &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    eventually("the refusal is reported", PATIENCE, async || {
        let key = Api::<ApiKey>::namespaced(stage.client.clone(), &namespace).get(NAME).await?;
        let ready = condition(&key, "Ready").context("no condition")?;
        ensure!(ready.reason == "SecretWriteFailed" && ready.message.contains("quoted"), "{}", ready.message);
        Ok(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let found: Vec<_> = texts(&stage, &[stage.operator().log()])
        .await
        .into_iter()
        .filter_map(|(place, text)| {
            let form = if looks_like_a_value(&text)?.starts_with("kw") { "plain" } else { "base64" };
            Some((place, form))
        })
        .collect();
    output(stage.plane.kubectl().args(["delete", "-f"]).arg(&file)).unwrap();
    assert!(found.is_empty(), "quoted values are in {found:?}");
}

#[tokio::test]
async fn a_key_whose_status_was_never_written_is_adopted_and_not_minted_again() {
    let stage = Stage::enter(&[]).await;
    let namespace = namespace(&stage.client).await;
    let history = History::of(&stage.client, &namespace);
    let here = of(&namespace);
    let lost = stage.proxy.inject_times(1, usize::MAX, move |r| here(r) && Kind::Status.is(r), Fault::Refuse(500));
    apply(&stage.client, &namespace, NAME, &wishes()[0].spec).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let value = eventually("the Secret is there, and the status was tried", PATIENCE, async || {
        ensure!(lost.struck() > 1, "the status was not tried again");
        value_of(&secrets.get("checkout-secret").await?).context("no value")
    })
    .await;
    stage.killer()();
    let key = Api::<ApiKey>::namespaced(stage.client.clone(), &namespace).get(NAME).await.unwrap();
    assert!(key.status.is_none(), "there is a status after all");
    stage.proxy.heal();
    stage.mend().await;
    eventually("the key is adopted", PATIENCE, async || fulfilled(&wishes()[0], &history).await).await;
    assert_eq!(history.values("checkout-secret"), [value]);
    let events: Api<Event> = Api::namespaced(stage.client.clone(), &namespace);
    eventually("an Event says so", PATIENCE, async || {
        let events = events.list(&ListParams::default()).await?.items;
        let reasons: Vec<_> = events.iter().map(|event| event.reason.clone().unwrap_or_default()).collect();
        ensure!(reasons == ["Adopted"], "{reasons:?}");
        Ok(())
    })
    .await;
}

/// The Secret comes to no harm, and the rotation to its end, when somebody else writes to it all the time.
#[tokio::test]
async fn a_rotation_gets_through_although_others_write_to_the_secret() {
    let stage = Stage::enter(&[]).await;
    let namespace = namespace(&stage.client).await;
    let history = History::of(&stage.client, &namespace);
    let wishes = wishes();
    apply(&stage.client, &namespace, NAME, &wishes[0].spec).await.unwrap();
    eventually("the key is minted", PATIENCE, async || fulfilled(&wishes[0], &history).await).await;
    // Six conflicts in a row: more than one reconciliation is patient for.
    for wish in &wishes[1..] {
        let here = of(&namespace);
        let planned = stage.proxy.inject_times(1, 6, move |r| here(r) && Kind::PatchSecret.is(r), Fault::Refuse(409));
        let started = Instant::now();
        apply(&stage.client, &namespace, NAME, &wish.spec).await.unwrap();
        let came_true =
            retry("in spite of conflicts", Duration::from_secs(45), async || fulfilled(wish, &history).await).await;
        let key = history.keys(NAME).pop().unwrap();
        let (settled, struck) = (settled(&key).is_ok(), planned.struck());
        if let Err(error) = came_true {
            panic!("{error:#}; {struck} conflicts; the key claims to be ready and up to date: {settled}");
        }
        assert_eq!(struck, 6);
        assert!(started.elapsed() < Duration::from_secs(45));
    }
}
