//! Several replicas, none, and the moments in between: election, handover, certificates, admission, and what holds when
//! nobody is there. Two real operators on one real control plane.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// Metrics are floating point numbers; those that are compared here count something.
#![allow(clippy::float_cmp)]

mod support;

#[path = "ha/door.rs"]
mod door;

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use keywright::admission::self_check;
use keywright::api::ApiKey;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde_json::{Value, json};
use support::keys::{History, agree, apply, free_lease, metric, settled};
use support::operator::NAMESPACE;
use support::proxy::Record;
use support::{ControlPlane, Fault, Operator, Options, PATIENCE, Proxy, Release, eventually, namespace, output, plane};
use tokio::sync::{MutexGuard, OnceCell};

const CA_SECRET: &str = "keywright-webhook-ca";

/// The control plane with the chart, for one test at a time, without any operator at first.
struct Stage {
    plane: &'static ControlPlane,
    release: &'static Release,
    client: Client,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    async fn enter() -> Self {
        static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        static RELEASE: OnceCell<Release> = OnceCell::const_new();
        let turn = TURN.lock().await;
        let plane = plane().await;
        let release = RELEASE.get_or_init(async || Release::install(plane, &[]).await.expect("the chart")).await;
        let client = plane.client().await.expect("a client");
        // What a test left that killed its operators.
        free_lease(&client).await.expect("the lease is free");
        Self { plane, release, client, _turn: turn }
    }

    /// Starts one replica, and waits until it is ready and the API server asks it.
    async fn replica(&self, replica: u8, args: &[&str], server: Option<&Proxy>) -> Operator {
        let options = Options {
            replica,
            args: args.iter().map(ToString::to_string).collect(),
            server: server.map(|proxy| proxy.url().to_owned()),
            ..Options::default()
        };
        let operator = Operator::start(self.plane, self.release, options).await.expect("an operator");
        operator.wait_ready().await.expect("a ready operator");
        operator
    }

    /// Starts replica 1, which leads, then replica 2, which follows.
    async fn pair(&self, args: &[&str]) -> (Operator, Operator) {
        let first = self.replica(1, args, None).await;
        self.route(1).await;
        eventually("replica 1 leads", PATIENCE, async || leads(&first).await).await;
        let second = self.replica(2, args, None).await;
        (first, second)
    }

    /// Lets the API server ask this replica.
    async fn route(&self, replica: u8) {
        self.release.route_webhook(self.plane, replica).await.expect("a route");
    }

    fn keys(&self, namespace: &str) -> Api<ApiKey> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// What a user sees who tries whether a key would be admitted.
    async fn try_key(&self, namespace: &str, presets: &[&str]) -> kube::Result<()> {
        let key = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"generateName": "trial-"},
            "spec": {"type": "Team", "presets": presets},
        });
        let key: ApiKey = serde_json::from_value(key).expect("an ApiKey");
        // A dry run is not refused for what a catalogue may mend.
        let params = PostParams { dry_run: presets == ["Alerts"], ..PostParams::default() };
        self.keys(namespace).create(&params, &key).await.map(drop)
    }

    /// Waits until the API server asks this replica, which says yes.
    async fn until_asked(&self, namespace: &str, operator: &Operator) {
        let asked = admitted(operator).await;
        eventually("this replica is asked, and says yes", PATIENCE, async || {
            self.try_key(namespace, &["Alerts"]).await?;
            ensure!(admitted(operator).await > asked, "another replica was asked");
            Ok(())
        })
        .await;
    }

    async fn apply(&self, namespace: &str, name: &str) {
        eventually("the key is admitted", PATIENCE, async || apply(&self.client, namespace, name, &spec()).await).await;
    }

    async fn minted(&self, namespace: &str, name: &str) {
        eventually("the key is minted", PATIENCE, async || settled(&self.keys(namespace).get(name).await?)).await;
    }

    fn webhooks(&self) -> Api<ValidatingWebhookConfiguration> {
        Api::all(self.client.clone())
    }

    /// Waits until the key is Ready, then until value, record and status agree on the only value there ever was.
    async fn minted_once(&self, namespace: &str, name: &str, history: &History, although: &str) {
        self.minted(namespace, name).await;
        eventually("value, record and status agree", PATIENCE, async || {
            let (key, secret, values) = history.now(name).await?;
            agree(&key, &secret, &values)?;
            ensure!(values.len() == 1, "{although}: minted {} times", values.len());
            Ok(())
        })
        .await;
    }

    async fn bundle(&self) -> Option<Vec<u8>> {
        let configuration = self.webhooks().get("keywright").await.expect("the webhook configuration");
        configuration.webhooks?.into_iter().next()?.client_config.ca_bundle.map(|bundle| bundle.0)
    }

    async fn remove_bundle(&self) {
        let remove = json!([{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]);
        let patch = Patch::Json::<()>(serde_json::from_value(remove).unwrap());
        self.webhooks().patch("keywright", &PatchParams::default(), &patch).await.expect("the caBundle is removed");
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn holder(&self) -> Option<String> {
        let lease = self.leases().get_opt("keywright-operator").await.expect("an answer")?;
        lease.spec?.holder_identity.filter(|holder| !holder.is_empty())
    }
}

fn spec() -> Value {
    json!({"type": "Team", "presets": ["Alerts"]})
}

async fn is_leader(operator: &Operator) -> Result<bool> {
    let found = metric(&operator.metrics().await?, "keywright_leader").context("no such metric")?;
    Ok(found == 1.0)
}

async fn leads(operator: &Operator) -> Result<()> {
    ensure!(is_leader(operator).await?, "it does not lead");
    Ok(())
}

#[tokio::test]
async fn of_two_replicas_one_leads_both_admit_and_each_key_is_minted_once() {
    let stage = Stage::enter().await;
    // Both at the same time, so that they compete for everything that they create.
    let (first, second) = tokio::join!(stage.replica(1, &[], None), stage.replica(2, &[], None));
    let leaders = async || Ok::<_, anyhow::Error>([is_leader(&first).await?, is_leader(&second).await?]);
    eventually("one leads", PATIENCE, async || {
        let leaders = leaders().await?;
        ensure!(leaders[0] != leaders[1], "{leaders:?}");
        Ok(())
    })
    .await;
    let before = leaders().await.unwrap();

    let namespace = namespace(&stage.client).await;
    let history = History::of(&stage.client, &namespace);
    for (replica, operator) in [(1, &first), (2, &second)] {
        stage.route(replica).await;
        stage.until_asked(&namespace, operator).await;
        let refused = stage.try_key(&namespace, &["NoSuchPreset"]).await.unwrap_err().to_string();
        assert!(refused.contains("NoSuchPreset"), "{refused}");
        for number in 0..10 {
            stage.apply(&namespace, &format!("key-{replica}-{number}")).await;
        }
    }
    for replica in [1, 2] {
        for number in 0..10 {
            let name = format!("key-{replica}-{number}");
            stage.minted_once(&namespace, &name, &history, "two replicas run").await;
        }
    }
    assert_eq!(leaders().await.unwrap(), before, "leadership moved although nothing happened");
    // A follower knows as much as the leader, but says of nothing that it did it.
    let follower = if before[0] { &second } else { &first };
    let metrics = follower.metrics().await.unwrap();
    assert_eq!(support::keys::metric_sum(&metrics, "keywright_reconcile_total"), 0.0, "a follower reconciles");
}

#[tokio::test]
async fn when_the_leader_is_killed_the_other_takes_over_and_finishes_its_work() {
    let stage = Stage::enter().await;
    let (first, second) = stage.pair(&[]).await;
    stage.route(2).await;
    let namespace = namespace(&stage.client).await;
    let history = History::of(&stage.client, &namespace);
    stage.apply(&namespace, "before").await;
    stage.minted(&namespace, "before").await;

    first.kill();
    let killed = Instant::now();
    // Nobody leads, and yet users are served.
    let mut rotated = spec();
    rotated["rotation"] = json!({"requestedAt": "2026-11-23T10:00:00Z", "overlap": "1h"});
    apply(&stage.client, &namespace, "before", &rotated).await.expect("the follower admits");
    apply(&stage.client, &namespace, "after", &spec()).await.expect("the follower admits");
    assert!(!is_leader(&second).await.unwrap(), "it leads although the lease has not run out");
    eventually("the other leads", Duration::from_secs(20).saturating_sub(killed.elapsed()), async || {
        leads(&second).await
    })
    .await;
    println!("took over after {:?}", killed.elapsed());
    for (name, values) in [("before", 2), ("after", 1)] {
        eventually("what was pending is done", PATIENCE, async || {
            let (key, secret, seen) = history.now(name).await?;
            settled(&key)?;
            agree(&key, &secret, &seen)?;
            ensure!(seen.len() == values, "{} values", seen.len());
            Ok(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_leader_that_is_asked_to_stop_hands_over_and_admission_goes_on_meanwhile() {
    let stage = Stage::enter().await;
    let (first, second) = stage.pair(&[]).await;
    let namespace = namespace(&stage.client).await;
    let id = first.id();
    assert!(stage.holder().await.unwrap().ends_with(&id.to_string()));

    first.ask_to_stop().unwrap();
    let asked = Instant::now();
    let mut led = None;
    // The API server still asks the one that stops: it answers until it is known everywhere that it stops.
    while asked.elapsed() < Duration::from_secs(3) {
        stage.try_key(&namespace, &["Alerts"]).await.expect("a replica that drains still admits");
        if led.is_none() && is_leader(&second).await.unwrap() {
            led = Some(asked.elapsed());
        }
        if asked.elapsed() > Duration::from_millis(500) {
            let answer = first.get("/readyz").await.expect_err("it is not ready any more").to_string();
            assert!(answer.contains("503") && answer.contains("stopping"), "{answer}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stage.route(2).await;
    eventually("the other leads", PATIENCE, async || leads(&second).await).await;
    let led = led.unwrap_or_else(|| asked.elapsed());
    println!("handed over after {led:?}");
    // A lease that was not released would have lasted for at least ten seconds more.
    assert!(led < Duration::from_secs(8), "handed over after {led:?}");
    assert!(first.ended(Duration::from_secs(25)).await.unwrap().success(), "{}", first.log());
    assert!(asked.elapsed() < Duration::from_secs(30), "Kubernetes would have killed it");
    assert!(stage.holder().await.unwrap().ends_with(&second.id().to_string()));
    stage.apply(&namespace, "after").await;
    stage.minted(&namespace, "after").await;

    // The last one leaves a lease that is nobody's.
    assert!(second.terminate().await.unwrap().success(), "{}", second.log());
    assert_eq!(stage.holder().await, None, "the lease was not released");
}

/// What a leader wrote, other than to its lease and about questions of access.
fn writes_after(proxy: &Proxy, since: Instant) -> Vec<Record> {
    proxy.writes().into_iter().filter(|write| write.at > since).collect()
}

#[tokio::test]
async fn a_leader_whose_lease_another_holds_ends_and_writes_nothing_afterwards() {
    let stage = Stage::enter().await;
    let proxy = Proxy::start(stage.plane).unwrap();
    let first = stage.replica(1, &[], Some(&proxy)).await;
    stage.route(1).await;
    eventually("it leads", PATIENCE, async || leads(&first).await).await;
    let second = stage.replica(2, &[], None).await;
    let namespace = namespace(&stage.client).await;

    let taken = json!({"spec": {"holderIdentity": "somebody-else"}});
    stage.leases().patch("keywright-operator", &PatchParams::default(), &Patch::Merge(taken)).await.unwrap();
    let since = Instant::now();
    eventually("it stops to lead", Duration::from_secs(7), async || {
        ensure!(!is_leader(&first).await?, "it leads");
        Ok(())
    })
    .await;
    println!("stopped to lead after {:?}", since.elapsed());
    // The webhook goes on for a while.
    stage.try_key(&namespace, &["Alerts"]).await.expect("a replica that drains still admits");
    let status = first.ended(Duration::from_secs(20)).await.unwrap();
    println!("ended after {:?}", since.elapsed());
    assert!(!status.success(), "ended as if all were well");
    assert!(first.log().contains("leadership lost"), "{}", first.log());
    stage.route(2).await;
    stage.apply(&namespace, "after").await;
    assert_eq!(stage.holder().await.as_deref(), Some("somebody-else"), "it took back what another held");
    stage.minted(&namespace, "after").await;
    leads(&second).await.unwrap();
    let writes = writes_after(&proxy, since + Duration::from_secs(6));
    assert!(writes.is_empty(), "{writes:#?}");
}

/// How many reviews a replica has answered.
async fn admitted(operator: &Operator) -> f64 {
    support::keys::metric_sum(&operator.metrics().await.unwrap(), "keywright_admission_total")
}

/// How an ApiKey is, as of now: ready, or the reason why it is not.
async fn condition_of(stage: &Stage, namespace: &str, name: &str) -> Result<String> {
    let key = stage.keys(namespace).get(name).await?;
    let ready = support::keys::condition(&key, "Ready").context("no condition Ready")?;
    Ok(if ready.status == "True" { "ready".to_owned() } else { ready.reason.clone() })
}

/// Does something to a Secret three times, and undoes it; the shortest time until `is` holds after it.
async fn seen(what: &str, act: impl AsyncFn(), is: impl AsyncFn() -> bool, undo: impl AsyncFn()) -> Duration {
    let mut times = vec![];
    for _ in 0..3 {
        let started = Instant::now();
        act().await;
        while !is().await {
            assert!(started.elapsed() < Duration::from_secs(20), "{what}: not seen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        times.push(started.elapsed());
        undo().await;
    }
    println!("{what}: seen after {times:?}");
    times.into_iter().min().unwrap()
}

/// The chart's interval between looks at a Secret is hours, so that only a notice can be as fast.
#[tokio::test]
async fn a_secret_that_is_deleted_changed_unlabelled_or_restored_is_seen_within_a_second_by_whichever_replica() {
    let stage = Stage::enter().await;
    let (first, second) = stage.pair(&[]).await;
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "checkout").await;
    stage.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let secret = secrets.get("checkout-secret").await.unwrap();
    let mut backup = secret.clone();
    (backup.metadata.uid, backup.metadata.resource_version) = (None, None);
    let calls = async |operator: &Operator| {
        let metrics = operator.metrics().await.unwrap();
        metric(&metrics, "keywright_admission_total{kind=\"Secret\",verdict=\"Allowed\"}").unwrap_or(0.0)
    };
    let patch = async |patch: Value| {
        let params = PatchParams::default();
        secrets.patch("checkout-secret", &params, &Patch::Merge(patch)).await.expect("the Secret is changed");
    };
    let delete = async || drop(secrets.delete("checkout-secret", &DeleteParams::default()).await.expect("deleted"));
    let delete_all = async || {
        let (params, list) = (DeleteParams::default(), ListParams::default());
        drop(secrets.delete_collection(&params, &list).await.expect("deleted"));
    };
    let restore = async || drop(secrets.create(&PostParams::default(), &backup).await.expect("restored"));
    let is = async |wanted: &str| condition_of(&stage, &namespace, "checkout").await.is_ok_and(|found| found == wanted);
    let ready = async || {
        eventually("it is ready", PATIENCE, async || {
            ensure!(is("ready").await, "it is not");
            Ok(())
        })
        .await;
    };
    let is_amiss =
        async || condition_of(&stage, &namespace, "checkout").await.is_ok_and(|found| found.starts_with("Secret"));
    let label = "app.kubernetes.io/managed-by";
    let is_labelled = async || secrets.get("checkout-secret").await.is_ok_and(|s| s.labels().contains_key(label));
    let other = json!({"data": {"key-value": "b3RoZXI="}});
    let same = json!({"data": secret.data});
    for (replica, operator) in [(1, &first), (2, &second)] {
        stage.route(replica).await;
        let before = calls(operator).await;
        let mut number = 0;
        eventually("this replica is asked", PATIENCE, async || {
            number += 1;
            patch(json!({"metadata": {"labels": {"asked": number.to_string()}}})).await;
            ensure!(calls(operator).await > before, "the other replica was asked");
            Ok(())
        })
        .await;
        let who = if replica == 1 { "the leader is called" } else { "the follower is called" };
        let undo_deletion = async || {
            restore().await;
            ready().await;
        };
        let undo_change = async || {
            patch(same.clone()).await;
            ready().await;
        };
        let mut times = vec![
            seen(&format!("{who}: deleted"), delete, async || is("SecretLost").await, undo_deletion).await,
            seen(
                &format!("{who}: deleted with all others"),
                delete_all,
                async || is("SecretLost").await,
                undo_deletion,
            )
            .await,
            seen(&format!("{who}: changed"), async || patch(other.clone()).await, is_amiss, undo_change).await,
            seen(
                &format!("{who}: label taken out"),
                async || patch(json!({"metadata": {"labels": {label: null}}})).await,
                is_labelled,
                ready,
            )
            .await,
        ];
        let hidden = async || {
            patch(json!({"metadata": {"labels": {label: null}}})).await;
            patch(other.clone()).await;
        };
        times.push(seen(&format!("{who}: label taken out, then changed"), hidden, is_amiss, undo_change).await);
        let lose = async || {
            delete().await;
            eventually("it is lost", PATIENCE, async || {
                ensure!(is("SecretLost").await, "it is not");
                Ok(())
            })
            .await;
        };
        lose().await;
        times.push(seen(&format!("{who}: restored"), restore, async || is("ready").await, lose).await);
        restore().await;
        ready().await;
        assert!(times.iter().all(|time| *time < Duration::from_secs(1)), "{who}: {times:?}");
        assert!(calls(operator).await > before + 20.0, "the other replica was asked");
    }
}

#[tokio::test]
async fn a_dry_run_a_secret_of_another_type_and_the_operator_itself_wake_nobody() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
    stage.route(1).await;
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "checkout").await;
    stage.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let seen = async || {
        let metrics = operator.metrics().await.unwrap();
        [
            "keywright_admission_total{kind=\"Secret\",verdict=\"Allowed\"}",
            "keywright_secret_notices_total{outcome=\"Taken\"}",
        ]
        .map(|name| metric(&metrics, name).unwrap_or(0.0))
    };
    let labels = json!({"app.kubernetes.io/managed-by": "keywright"});
    let other = json!({"metadata": {"name": "other", "labels": labels}, "stringData": {"password": "x"}});
    let other: Secret = serde_json::from_value(other).unwrap();
    secrets.create(&PostParams::default(), &other).await.unwrap();
    secrets.delete("other", &DeleteParams::default()).await.unwrap();
    let dry_run = DeleteParams { dry_run: true, ..DeleteParams::default() };
    let tried = secrets.delete("checkout-secret", &dry_run).await.expect("tried");
    assert!(secrets.get_opt("checkout-secret").await.unwrap().is_some(), "{tried:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(seen().await, [1.0, 0.0], "one review, of the dry run, and no look");
    secrets.delete("checkout-secret", &DeleteParams::default()).await.unwrap();
    eventually("it is looked at", PATIENCE, async || {
        ensure!(seen().await[1] > 0.0, "not yet");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_secret_deleted_while_nobody_leads_or_the_leader_hands_over_is_seen_by_the_next_leader() {
    let stage = Stage::enter().await;
    let (first, second) = stage.pair(&[]).await;
    let namespace = namespace(&stage.client).await;
    for name in ["one", "two"] {
        stage.apply(&namespace, name).await;
        stage.minted(&namespace, name).await;
    }
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let is_lost = async |name: &str| {
        let found = condition_of(&stage, &namespace, name).await?;
        ensure!(found == "SecretLost", "{found}");
        Ok(())
    };
    // The API server still calls the one that hands over.
    first.ask_to_stop().unwrap();
    eventually("the other leads", PATIENCE, async || leads(&second).await).await;
    secrets.delete("one-secret", &DeleteParams::default()).await.unwrap();
    eventually("it is seen", Duration::from_secs(5), async || is_lost("one").await).await;
    assert!(first.ended(Duration::from_secs(25)).await.unwrap().success(), "{}", first.log());

    let third = stage.replica(3, &[], None).await;
    stage.route(3).await;
    stage.until_asked(&namespace, &third).await;
    second.kill();
    secrets.delete("two-secret", &DeleteParams::default()).await.unwrap();
    assert!(!is_leader(&third).await.unwrap(), "it leads although the lease has not run out");
    eventually("the other leads", PATIENCE, async || leads(&third).await).await;
    eventually("it is seen", Duration::from_secs(5), async || is_lost("two").await).await;
}

#[tokio::test]
async fn an_operator_that_is_down_or_hangs_holds_up_no_write_of_a_secret() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
    stage.route(1).await;
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "checkout").await;
    stage.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespace);
    let signal = |signal: &str| {
        let id = operator.id().to_string();
        output(std::process::Command::new("/bin/sh").args(["-c", "kill -s $1 $2", "kill", signal, &id])).unwrap();
    };
    let write = async |what: &str, at_most: u64| {
        let label = json!({"metadata": {"labels": {"written": what}}});
        let started = Instant::now();
        secrets.patch("checkout-secret", &PatchParams::default(), &Patch::Merge(label)).await.expect(what);
        let took = started.elapsed();
        println!("a write of a key's Secret while the operator {what}: {took:?}");
        assert!(took < Duration::from_millis(at_most), "{what}: {took:?}");
    };
    write("runs", 1000).await;
    signal("STOP");
    write("hangs", 2000).await;
    let started = Instant::now();
    let other: Secret = serde_json::from_value(json!({"metadata": {"name": "other"}})).unwrap();
    secrets.create(&PostParams::default(), &other).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(900), "another Secret waits for the operator");
    signal("CONT");
    operator.kill();
    write("is-down", 2000).await;
    secrets.delete("checkout-secret", &DeleteParams::default()).await.expect("deleted without the operator");
}

/// Whether renewals are refused or lead nowhere: the leader ends before anybody else may begin.
#[tokio::test]
async fn a_leader_that_cannot_renew_ends_before_the_lease_runs_out() {
    for fault in [Fault::Refuse(500), Fault::Delay(Duration::from_hours(1))] {
        let stage = Stage::enter().await;
        let proxy = Proxy::start(stage.plane).unwrap();
        let first = stage.replica(1, &[], Some(&proxy)).await;
        stage.route(1).await;
        eventually("it leads", PATIENCE, async || leads(&first).await).await;
        let second = stage.replica(2, &[], None).await;
        let renewal = |request: &Record| request.method == Method::PUT && request.path.contains("/leases/");
        proxy.inject_times(1, usize::MAX, renewal, fault.clone());
        let namespace = namespace(&stage.client).await;
        // What is wanted meanwhile may be done by the old leader or by the new one, but once.
        let history = History::of(&stage.client, &namespace);
        stage.route(2).await;
        let mut number = 0;
        let overlap = async {
            while !is_leader(&second).await.unwrap() {
                if number < 30 {
                    number += 1;
                    stage.apply(&namespace, &format!("key-{number}")).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            // It may still answer the API server, but it is no leader.
            assert!(!is_leader(&first).await.unwrap_or(false), "two lead");
            Instant::now()
        };
        let led = tokio::time::timeout(Duration::from_secs(40), overlap).await.expect("the other takes over");
        assert!(first.log().contains("leadership lost"), "{}", first.log());
        let status = first.ended(Duration::from_secs(20)).await.unwrap();
        assert!(!status.success(), "ended as if all were well");
        let writes = writes_after(&proxy, led);
        assert!(writes.is_empty(), "{writes:#?}");
        for number in 1..=number {
            let name = format!("key-{number}");
            stage.minted_once(&namespace, &name, &history, &format!("{fault:?}")).await;
        }
    }
}

/// A whole life of certificates in two minutes. The API server here notices a new bundle within milliseconds, and so
/// would forgive much; therefore a second, slower one is played: it trusts what was published two seconds ago. And the
/// follower is slow too: its watches of the CA's Secret lead nowhere, so that it learns of a new CA up to ten seconds
/// after the leader.
#[tokio::test]
async fn two_changes_of_the_ca_fail_not_one_admission_even_if_all_others_notice_late() {
    let stage = Stage::enter().await;
    // A CA of this chart lives for a year; start with a short one.
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), NAMESPACE);
    let _ = secrets.delete(CA_SECRET, &DeleteParams::default()).await;
    let lives = ["--webhook-ca-validity=45s", "--webhook-cert-validity=20s", "--webhook-ca-settle=4s"];
    let proxy = Proxy::start(stage.plane).unwrap();
    let certificates =
        |r: &Record| r.is_watch() && (r.path.ends_with("/secrets") || r.path.ends_with("webhookconfigurations"));
    let first = stage.replica(1, &lives, None).await;
    stage.route(1).await;
    eventually("replica 1 leads", PATIENCE, async || leads(&first).await).await;
    let second = stage.replica(2, &lives, Some(&proxy)).await;
    proxy.inject_times(1, usize::MAX, certificates, Fault::Delay(Duration::from_hours(1)));
    proxy.cut_watches();
    let namespace = namespace(&stage.client).await;
    eventually("admission works", PATIENCE, async || Ok(stage.try_key(&namespace, &["Alerts"]).await?)).await;

    let done = AtomicBool::new(false);
    let stream = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        for number in 0.. {
            ticks.tick().await;
            if done.load(Ordering::SeqCst) {
                break;
            }
            if number % 17 == 0 {
                stage.route(if number % 34 == 0 { 2 } else { 1 }).await;
            }
            if let Err(error) = stage.try_key(&namespace, &["Alerts"]).await {
                panic!("admission {number} failed: {error}\n{}\n{}", first.log(), second.log());
            }
        }
    };
    let slow_server = async {
        let (mut published, mut asked) = (VecDeque::new(), 0);
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while !done.load(Ordering::SeqCst) {
            ticks.tick().await;
            published.push_back((Instant::now(), stage.bundle().await.expect("a bundle")));
            while published.get(1).is_some_and(|(at, _)| at.elapsed() >= Duration::from_secs(2)) {
                published.pop_front();
            }
            // What it trusts, and what one trusts that notices at once.
            for (at, bundle) in [published.front().unwrap(), published.back().unwrap()] {
                for (replica, operator) in [(1, &first), (2, &second)] {
                    let address = stage.release.webhook_address(operator).parse().expect("an address");
                    let name = format!("keywright-webhook.{NAMESPACE}.svc");
                    if let Err(why) = self_check::ask(address, &name, bundle, None).await {
                        let late = at.elapsed();
                        panic!(
                            "who is {late:?} late cannot ask replica {replica}: {why}\n{}\n{}",
                            first.log(),
                            second.log()
                        );
                    }
                    asked += 1;
                }
            }
        }
        println!("{asked} questions of a slow API server");
    };
    let changes = async {
        let mut seen = BTreeSet::new();
        let started = Instant::now();
        while seen.len() < 3 {
            let secret = secrets.get(CA_SECRET).await.expect("the CA's Secret");
            seen.insert(secret.data.unwrap_or_default().remove("ca.crt").expect("a certificate").0);
            assert!(started.elapsed() < Duration::from_mins(4), "the CA was changed only {} times", seen.len() - 1);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        // Until the leaves of the old one are gone as well.
        tokio::time::sleep(Duration::from_secs(15)).await;
        done.store(true, Ordering::SeqCst);
        println!("two changes in {:?}", started.elapsed());
    };
    tokio::join!(stream, slow_server, changes);
    for (name, operator) in [("first", &first), ("second", &second)] {
        let admitted = admitted(operator).await;
        println!("{admitted} admissions by the {name} replica");
        assert!(admitted > 50.0, "too few to prove anything of the {name} replica: {admitted}");
    }
    // The short-lived CA must not stay for the next test.
    drop((first, second));
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn a_bundle_or_a_ca_that_somebody_removes_is_put_back() {
    let stage = Stage::enter().await;
    let (_first, _second) = stage.pair(&["--webhook-ca-settle=3s"]).await;
    let namespace = namespace(&stage.client).await;
    let works = async |what: &str, patience: u64| {
        for replica in [1, 2] {
            stage.route(replica).await;
            eventually(what, Duration::from_secs(patience), async || {
                Ok(stage.try_key(&namespace, &["Alerts"]).await?)
            })
            .await;
        }
    };
    works("admission works", 30).await;
    let bundle = stage.bundle().await.unwrap();

    stage.remove_bundle().await;
    eventually("the bundle is put back", Duration::from_secs(8), async || {
        ensure!(stage.bundle().await.as_ref() == Some(&bundle), "it is gone, or another one");
        Ok(())
    })
    .await;
    works("admission works with the bundle put back", 10).await;

    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), NAMESPACE);
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    eventually("there is a new CA, and it is published", Duration::from_secs(15), async || {
        secrets.get(CA_SECRET).await?;
        ensure!(stage.bundle().await.is_some_and(|now| now != bundle), "the old bundle is still there");
        Ok(())
    })
    .await;
    works("both replicas have certificates of the new CA", 15).await;
}

#[tokio::test]
async fn without_an_operator_nothing_is_admitted_and_everything_can_be_deleted() {
    let stage = Stage::enter().await;
    let namespaces = [namespace(&stage.client).await, namespace(&stage.client).await];
    {
        let operator = stage.replica(1, &[], None).await;
        stage.route(1).await;
        for namespace in &namespaces {
            for name in ["one", "two"] {
                stage.apply(namespace, name).await;
                stage.minted(namespace, name).await;
            }
        }
        operator.kill();
    }
    let refused = stage.try_key(&namespaces[0], &["Alerts"]).await.unwrap_err().to_string();
    assert!(refused.contains("failed calling webhook") && refused.contains(".keywright.dev"), "{refused}");
    let mut changed = spec();
    changed["active"] = json!(false);
    let refused = apply(&stage.client, &namespaces[0], "one", &changed).await.unwrap_err().to_string();
    assert!(refused.contains("failed calling webhook"), "{refused}");

    stage.keys(&namespaces[0]).delete("one", &DeleteParams::default()).await.expect("a key can be deleted");
    let all: Api<Namespace> = Api::all(stage.client.clone());
    all.delete(&namespaces[1], &DeleteParams::default()).await.expect("a namespace can be deleted");
    eventually("the key and its Secret are gone", PATIENCE, async || {
        let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), &namespaces[0]);
        ensure!(stage.keys(&namespaces[0]).get_opt("one").await?.is_none(), "the key is there");
        ensure!(secrets.get_opt("one-secret").await?.is_none(), "the Secret is there");
        ensure!(secrets.get_opt("two-secret").await?.is_some(), "the other key's Secret is gone");
        Ok(())
    })
    .await;
    eventually("the namespace is gone", PATIENCE, async || {
        ensure!(all.get_opt(&namespaces[1]).await?.is_none(), "it hangs");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_replica_is_ready_when_the_api_server_trusts_it_and_not_before() {
    let stage = Stage::enter().await;
    stage.remove_bundle_if_any().await;
    let proxy = Proxy::start(stage.plane).unwrap();
    let publication = |r: &Record| r.method == Method::PATCH && r.path.contains("/validatingwebhookconfigurations/");
    let refused = proxy.inject_times(1, usize::MAX, publication, Fault::Refuse(500));
    let options = Options { server: Some(proxy.url().to_owned()), ..Options::default() };
    let operator = Operator::start(stage.plane, stage.release, options).await.unwrap();
    stage.route(1).await;
    eventually("it has tried to publish", PATIENCE, async || {
        ensure!(refused.struck() > 1, "{}", refused.struck());
        // Its first lists come at their own pace, and are waited for before the bundle.
        let answer = operator.get("/readyz").await.expect_err("nobody trusts it yet").to_string();
        ensure!(!answer.contains("first list"), "{answer}");
        Ok(())
    })
    .await;
    for _ in 0..10 {
        let answer = operator.get("/readyz").await.expect_err("nobody trusts it yet").to_string();
        assert!(answer.contains("503") && answer.contains("caBundle"), "{answer}");
        operator.get("/healthz").await.expect("alive all the same");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let namespace = namespace(&stage.client).await;
    stage.try_key(&namespace, &["Alerts"]).await.expect_err("ready or not, it can't be asked");
    proxy.heal();
    operator.wait_ready().await.unwrap();
    // An API server takes a moment to see the bundle that the replica sees.
    eventually("admission works", Duration::from_secs(5), async || Ok(stage.try_key(&namespace, &["Alerts"]).await?))
        .await;
}

impl Stage {
    async fn remove_bundle_if_any(&self) {
        if self.bundle().await.is_some() {
            self.remove_bundle().await;
        }
    }
}

#[tokio::test]
async fn nobody_but_the_operator_writes_the_status_of_a_key() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
    stage.route(1).await;
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "checkout").await;
    stage.minted(&namespace, "checkout").await;
    let key = stage.keys(&namespace).get("checkout").await.unwrap();
    let forged = json!({"status": {"tokens": [{
        "id": "key_0000000000000000", "sha256": "0".repeat(64), "mintedAt": "2026-11-23T10:00:00Z",
    }]}});
    // With the operator and without: the policy needs nobody.
    for running in [true, false] {
        if !running {
            operator.kill();
        }
        for kind in ["merge", "json"] {
            let patch = if kind == "merge" {
                forged.to_string()
            } else {
                json!([{"op": "replace", "path": "/status/tokens", "value": forged["status"]["tokens"]}]).to_string()
            };
            let mut kubectl = stage.plane.kubectl();
            kubectl.args(["-n", &namespace, "patch", "apikey", "checkout", "--subresource=status"]);
            let refused = output(kubectl.args(["--type", kind, "-p", &patch])).expect_err("a forged key").to_string();
            assert!(refused.contains("only the operator"), "{refused}");
        }
        let manifest = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "checkout"},
            "status": forged["status"],
        });
        let params = PatchParams::apply("forger").force();
        let applied = stage.keys(&namespace).patch_status("checkout", &params, &Patch::Apply(manifest)).await;
        let refused = applied.expect_err("a forged key").to_string();
        assert!(refused.contains("only the operator"), "{refused}");
    }
    assert_eq!(stage.keys(&namespace).get("checkout").await.unwrap().status, key.status);
    // A status in a manifest is ignored, as the subresource promises.
    let _second = stage.replica(2, &[], None).await;
    stage.route(2).await;
    let mut manifest = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "other"}, "spec": spec(),
    });
    manifest["status"] = forged["status"].clone();
    let other = eventually("the key is admitted", PATIENCE, async || {
        let params = PatchParams::apply("test").force();
        Ok(stage.keys(&namespace).patch("other", &params, &Patch::Apply(manifest.clone())).await?)
    })
    .await;
    assert!(other.status.is_none());
}

#[tokio::test]
async fn who_steals_the_operators_token_cannot_list_secrets_nor_make_other_ones() {
    let stage = Stage::enter().await;
    let team = namespace(&stage.client).await;
    let kubeconfig = stage.plane.kubeconfig_for_service_account(NAMESPACE, "keywright", None).await.unwrap();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    let thief = Client::try_from(config).unwrap();
    let refused = |what: &str, answer: kube::Result<()>, why: &str| {
        let error = answer.expect_err(what).to_string();
        assert!(error.contains(why), "{what}: {error}");
    };
    let all: Api<Secret> = Api::all(thief.clone());
    refused("a list of all", all.list(&ListParams::default()).await.map(drop), "cannot list resource \"secrets\"");
    let in_ = |namespace: &str| -> Api<Secret> { Api::namespaced(thief.clone(), namespace) };
    for namespace in [&team, NAMESPACE, "kube-system"] {
        let list = in_(namespace).list(&ListParams::default()).await.map(drop);
        refused("a list", list, "cannot list resource \"secrets\"");
        let gone = in_(namespace).delete("any", &DeleteParams::default()).await.map(drop);
        refused("a deletion", gone, "cannot delete resource \"secrets\"");
    }
    let secret = |name: &str, kind: &str| -> Secret {
        let annotations = json!({"kubernetes.io/service-account.name": "default"});
        serde_json::from_value(json!({"metadata": {"name": name, "annotations": annotations}, "type": kind})).unwrap()
    };
    let create = async |namespace: &str, name: &str, kind: &str| {
        in_(namespace).create(&PostParams::default(), &secret(name, kind)).await.map(drop)
    };
    let policy = "the operator may write Secrets of type keywright.dev/api-key";
    for kind in ["Opaque", "kubernetes.io/service-account-token", "example.com/other"] {
        for namespace in [&team, "kube-system", NAMESPACE] {
            refused(kind, create(namespace, "loot", kind).await, policy);
        }
    }
    refused("the CA's name elsewhere", create(&team, CA_SECRET, "Opaque").await, policy);
    create(&team, "honest", "keywright.dev/api-key").await.expect("what it is for");

    // Nor does it change what others made, although it may patch.
    let others: Api<Secret> = Api::namespaced(stage.client.clone(), &team);
    others.create(&PostParams::default(), &secret("theirs", "Opaque")).await.unwrap();
    let patch = Patch::Merge(json!({"data": {"key-value": "AAAA"}}));
    refused("a patch", in_(&team).patch("theirs", &PatchParams::default(), &patch).await.map(drop), policy);
    // Nor users' objects.
    let keys: Api<ApiKey> = Api::namespaced(thief.clone(), &team);
    let patch = Patch::Merge(json!({"spec": {"active": false}}));
    let patched = keys.patch("any", &PatchParams::default(), &patch).await.map(drop);
    refused("a patch of a spec", patched, "cannot patch resource \"apikeys\"");
    let names: Vec<_> =
        others.list(&ListParams::default()).await.unwrap().items.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["honest", "theirs"]);
}
