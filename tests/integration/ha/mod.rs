//! Two operators on one control plane: election, handover, certificates and admission, and the cluster without a
//! running operator.

// The compared metrics are counters and gauges with integral values.
#![allow(clippy::float_cmp)]

mod intake;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::exclusive::ExclusivePlane;
use crate::support::keys::{History, apply, consistent, free_lease, metric, settled};
use crate::support::operator::NAMESPACE;
use crate::support::proxy::Record;
use crate::support::{ControlPlane, Fault, Operator, Options, Proxy, Release, TIMEOUT, eventually, namespace, output};
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

const CA_SECRET: &str = "keywright-webhook-ca";

/// The control plane with the chart and without an operator, for one test.
struct Cluster(ExclusivePlane);

impl Deref for Cluster {
    type Target = ExclusivePlane;

    fn deref(&self) -> &ExclusivePlane {
        &self.0
    }
}

impl Cluster {
    async fn lock() -> Self {
        let plane = ExclusivePlane::lock().await;
        // A test that killed its operators leaves the Lease behind.
        free_lease(&plane.client).await.expect("the lease is free");
        Self(plane)
    }

    /// Starts one replica, and waits until it is ready.
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

    /// Starts replica 1, routes webhook calls to it, and waits until it leads.
    async fn leader(&self, args: &[&str], server: Option<&Proxy>) -> Operator {
        let first = self.replica(1, args, server).await;
        self.route(1).await;
        eventually("replica 1 leads", TIMEOUT, async || leads(&first).await).await;
        first
    }

    /// Starts replica 1, which leads, then replica 2, which follows.
    async fn pair(&self, args: &[&str]) -> (Operator, Operator) {
        let first = self.leader(args, None).await;
        let second = self.replica(2, args, None).await;
        (first, second)
    }

    /// Routes webhook calls of the API server to this replica.
    async fn route(&self, replica: u8) {
        self.release.route_webhook(self.plane, replica).await.expect("a route");
    }

    fn keys(&self, namespace: &str) -> Api<ApiKey> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Creates a key with a generated name, and returns the answer of admission.
    async fn try_key(&self, namespace: &str, presets: &[&str]) -> kube::Result<()> {
        let key = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"generateName": "trial-"},
            "spec": {"type": "Team", "presets": presets},
        });
        let key: ApiKey = serde_json::from_value(key).expect("an ApiKey");
        // In a dry run, unknown names are only warnings, because a catalog applied together with the key may define
        // them.
        let params = PostParams { dry_run: presets == ["Alerts"], ..PostParams::default() };
        self.keys(namespace).create(&params, &key).await.map(drop)
    }

    /// Waits until the API server calls this replica and the replica allows a key.
    async fn wait_until_called(&self, namespace: &str, operator: &Operator) {
        let before = admitted(operator).await;
        eventually("the API server calls this replica, which allows the key", TIMEOUT, async || {
            self.try_key(namespace, &["Alerts"]).await?;
            ensure!(admitted(operator).await > before, "the API server called another replica");
            Ok(())
        })
        .await;
    }

    async fn apply(&self, namespace: &str, name: &str) {
        eventually("the key is admitted", TIMEOUT, async || apply(&self.client, namespace, name, &spec()).await).await;
    }

    async fn minted(&self, namespace: &str, name: &str) {
        eventually("the key is minted", TIMEOUT, async || settled(&self.keys(namespace).get(name).await?)).await;
    }

    fn webhooks(&self) -> Api<ValidatingWebhookConfiguration> {
        Api::all(self.client.clone())
    }

    /// Waits until the key is Ready and value, record and status are consistent, and asserts that the Secret never held
    /// another value.
    async fn minted_once(&self, namespace: &str, name: &str, history: &History, context: &str) {
        self.minted(namespace, name).await;
        eventually("value, record and status are consistent", TIMEOUT, async || {
            let (key, secret, values) = history.current(name).await?;
            consistent(&key, &secret, &values)?;
            ensure!(values.len() == 1, "{context}: minted {} times", values.len());
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
    ensure!(is_leader(operator).await?, "the replica does not lead");
    Ok(())
}

#[tokio::test]
async fn one_of_two_replicas_leads_both_admit_and_each_key_is_minted_once() {
    let cluster = Cluster::lock().await;
    // Both start at the same time, so that they compete for the objects that they create.
    let (first, second) = tokio::join!(cluster.replica(1, &[], None), cluster.replica(2, &[], None));
    let leaders = async || Ok::<_, anyhow::Error>([is_leader(&first).await?, is_leader(&second).await?]);
    eventually("exactly one replica leads", TIMEOUT, async || {
        let leaders = leaders().await?;
        ensure!(leaders[0] != leaders[1], "{leaders:?}");
        Ok(())
    })
    .await;
    let before = leaders().await.unwrap();

    let namespace = namespace(&cluster.client).await;
    let history = History::of(&cluster.client, &namespace);
    for (replica, operator) in [(1, &first), (2, &second)] {
        cluster.route(replica).await;
        cluster.wait_until_called(&namespace, operator).await;
        let rejection = cluster.try_key(&namespace, &["NoSuchPreset"]).await.unwrap_err().to_string();
        assert!(rejection.contains("NoSuchPreset"), "{rejection}");
        for number in 0..10 {
            cluster.apply(&namespace, &format!("key-{replica}-{number}")).await;
        }
    }
    for replica in [1, 2] {
        for number in 0..10 {
            let name = format!("key-{replica}-{number}");
            cluster.minted_once(&namespace, &name, &history, "two replicas run").await;
        }
    }
    assert_eq!(leaders().await.unwrap(), before, "the leader changed without a cause");
    let follower = if before[0] { &second } else { &first };
    let metrics = follower.metrics().await.unwrap();
    assert_eq!(crate::support::keys::metric_sum(&metrics, "keywright_reconcile_total"), 0.0, "the follower reconciled");
}

#[tokio::test]
async fn after_the_leader_is_killed_the_other_replica_leads_and_completes_pending_work() {
    let cluster = Cluster::lock().await;
    let (first, second) = cluster.pair(&[]).await;
    cluster.route(2).await;
    let namespace = namespace(&cluster.client).await;
    let history = History::of(&cluster.client, &namespace);
    cluster.apply(&namespace, "before").await;
    cluster.minted(&namespace, "before").await;

    first.kill();
    let killed = Instant::now();
    // Without a leader, the follower still admits requests.
    let mut rotated = spec();
    rotated["rotation"] = json!({"requestedAt": "2026-11-23T10:00:00Z", "overlap": "1h"});
    apply(&cluster.client, &namespace, "before", &rotated).await.expect("the follower admits");
    apply(&cluster.client, &namespace, "after", &spec()).await.expect("the follower admits");
    assert!(!is_leader(&second).await.unwrap(), "the follower leads before the lease expired");
    eventually("the other replica leads", Duration::from_secs(20).saturating_sub(killed.elapsed()), async || {
        leads(&second).await
    })
    .await;
    println!("the other replica leads after {:?}", killed.elapsed());
    for (name, values) in [("before", 2), ("after", 1)] {
        eventually("pending work is done", TIMEOUT, async || {
            let (key, secret, seen) = history.current(name).await?;
            settled(&key)?;
            consistent(&key, &secret, &seen)?;
            ensure!(seen.len() == values, "{} values", seen.len());
            Ok(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_leader_that_receives_sigterm_releases_its_lease_and_admission_continues() {
    let cluster = Cluster::lock().await;
    let (first, second) = cluster.pair(&[]).await;
    let namespace = namespace(&cluster.client).await;
    let id = first.id();
    assert!(cluster.holder().await.unwrap().ends_with(&id.to_string()));

    first.send_sigterm().unwrap();
    let signaled = Instant::now();
    let mut led = None;
    // The API server still calls the stopping replica, which answers until its endpoint is removed.
    while signaled.elapsed() < Duration::from_secs(3) {
        cluster.try_key(&namespace, &["Alerts"]).await.expect("a stopping replica admits");
        if led.is_none() && is_leader(&second).await.unwrap() {
            led = Some(signaled.elapsed());
        }
        if signaled.elapsed() > Duration::from_millis(500) {
            let answer = first.get("/readyz").await.expect_err("a stopping replica is not ready").to_string();
            assert!(answer.contains("503") && answer.contains("stopping"), "{answer}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.route(2).await;
    eventually("the other replica leads", TIMEOUT, async || leads(&second).await).await;
    let led = led.unwrap_or_else(|| signaled.elapsed());
    println!("the other replica leads after {led:?}");
    // A lease that is not released lasts for at least ten more seconds.
    assert!(led < Duration::from_secs(8), "the other replica leads after {led:?}");
    assert!(first.ended(Duration::from_secs(25)).await.unwrap().success(), "{}", first.log());
    assert!(signaled.elapsed() < Duration::from_secs(30), "the kubelet would have killed the process");
    assert!(cluster.holder().await.unwrap().ends_with(&second.id().to_string()));
    cluster.apply(&namespace, "after").await;
    cluster.minted(&namespace, "after").await;

    // The last replica leaves a lease without a holder.
    assert!(second.terminate().await.unwrap().success(), "{}", second.log());
    assert_eq!(cluster.holder().await, None, "the lease was not released");
}

/// The writes after a time, other than to the lease and access reviews.
fn writes_after(proxy: &Proxy, since: Instant) -> Vec<Record> {
    proxy.writes().into_iter().filter(|write| write.at > since).collect()
}

#[tokio::test]
async fn a_leader_whose_lease_was_taken_exits_and_writes_nothing_afterwards() {
    let cluster = Cluster::lock().await;
    let proxy = Proxy::start(cluster.plane).unwrap();
    let first = cluster.leader(&[], Some(&proxy)).await;
    let second = cluster.replica(2, &[], None).await;
    let namespace = namespace(&cluster.client).await;

    let taken = json!({"spec": {"holderIdentity": "another-holder"}});
    cluster.leases().patch("keywright-operator", &PatchParams::default(), &Patch::Merge(taken)).await.unwrap();
    let since = Instant::now();
    eventually("the replica stops leading", Duration::from_secs(7), async || {
        ensure!(!is_leader(&first).await?, "the replica leads");
        Ok(())
    })
    .await;
    println!("stopped leading after {:?}", since.elapsed());
    // The webhook answers until the process exits.
    cluster.try_key(&namespace, &["Alerts"]).await.expect("a stopping replica admits");
    let status = first.ended(Duration::from_secs(20)).await.unwrap();
    println!("exited after {:?}", since.elapsed());
    assert!(!status.success(), "the process exited with success");
    assert!(first.log().contains("leadership lost"), "{}", first.log());
    cluster.route(2).await;
    cluster.apply(&namespace, "after").await;
    assert_eq!(cluster.holder().await.as_deref(), Some("another-holder"), "the replica took the lease back");
    cluster.minted(&namespace, "after").await;
    leads(&second).await.unwrap();
    let writes = writes_after(&proxy, since + Duration::from_secs(6));
    assert!(writes.is_empty(), "{writes:#?}");
}

/// The number of reviews that a replica has answered.
async fn admitted(operator: &Operator) -> f64 {
    crate::support::keys::metric_sum(&operator.metrics().await.unwrap(), "keywright_admission_total")
}

/// `ready`, or the reason of condition Ready of an ApiKey.
async fn ready_reason(cluster: &Cluster, namespace: &str, name: &str) -> Result<String> {
    let key = cluster.keys(namespace).get(name).await?;
    let ready = crate::support::keys::condition(&key, "Ready").context("no condition Ready")?;
    Ok(if ready.status == "True" { "ready".to_owned() } else { ready.reason.clone() })
}

/// Changes a Secret and undoes it three times; returns the shortest time until `detected` returned true.
async fn detection_time(
    change: &str,
    act: impl AsyncFn(),
    detected: impl AsyncFn() -> bool,
    undo: impl AsyncFn(),
) -> Duration {
    let mut times = vec![];
    for _ in 0..3 {
        let started = Instant::now();
        act().await;
        while !detected().await {
            assert!(started.elapsed() < Duration::from_secs(20), "{change}: not detected");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        times.push(started.elapsed());
        undo().await;
    }
    println!("{change}: detected after {times:?}");
    times.into_iter().min().unwrap()
}

/// The interval of the periodic check is hours, so only a notice can be this fast.
#[tokio::test]
async fn a_deleted_changed_unlabeled_or_restored_secret_is_detected_within_a_second_whichever_replica_is_called() {
    let cluster = Cluster::lock().await;
    let (first, second) = cluster.pair(&[]).await;
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "checkout").await;
    cluster.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &namespace);
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
    let is =
        async |wanted: &str| ready_reason(&cluster, &namespace, "checkout").await.is_ok_and(|found| found == wanted);
    let ready = async || {
        eventually("the key is ready", TIMEOUT, async || {
            ensure!(is("ready").await, "the key is not ready");
            Ok(())
        })
        .await;
    };
    let is_changed =
        async || ready_reason(&cluster, &namespace, "checkout").await.is_ok_and(|found| found.starts_with("Secret"));
    let label = "app.kubernetes.io/managed-by";
    let is_labelled = async || secrets.get("checkout-secret").await.is_ok_and(|s| s.labels().contains_key(label));
    let other = json!({"data": {"key-value": "b3RoZXI="}});
    let same = json!({"data": secret.data});
    for (replica, operator) in [(1, &first), (2, &second)] {
        cluster.route(replica).await;
        let before = calls(operator).await;
        let mut number = 0;
        eventually("the API server calls this replica", TIMEOUT, async || {
            number += 1;
            patch(json!({"metadata": {"labels": {"attempt": number.to_string()}}})).await;
            ensure!(calls(operator).await > before, "the API server called the other replica");
            Ok(())
        })
        .await;
        let called = if replica == 1 { "the leader is called" } else { "the follower is called" };
        let undo_deletion = async || {
            restore().await;
            ready().await;
        };
        let undo_change = async || {
            patch(same.clone()).await;
            ready().await;
        };
        let mut times = vec![
            detection_time(&format!("{called}: deleted"), delete, async || is("SecretLost").await, undo_deletion).await,
            detection_time(
                &format!("{called}: deleted with all others"),
                delete_all,
                async || is("SecretLost").await,
                undo_deletion,
            )
            .await,
            detection_time(&format!("{called}: changed"), async || patch(other.clone()).await, is_changed, undo_change)
                .await,
            detection_time(
                &format!("{called}: label removed"),
                async || patch(json!({"metadata": {"labels": {label: null}}})).await,
                is_labelled,
                ready,
            )
            .await,
        ];
        let change_without_label = async || {
            patch(json!({"metadata": {"labels": {label: null}}})).await;
            patch(other.clone()).await;
        };
        let change = format!("{called}: label removed, then changed");
        times.push(detection_time(&change, change_without_label, is_changed, undo_change).await);
        let lose = async || {
            delete().await;
            eventually("the key is lost", TIMEOUT, async || {
                ensure!(is("SecretLost").await, "the key is not lost");
                Ok(())
            })
            .await;
        };
        lose().await;
        times.push(detection_time(&format!("{called}: restored"), restore, async || is("ready").await, lose).await);
        restore().await;
        ready().await;
        assert!(times.iter().all(|time| *time < Duration::from_secs(1)), "{called}: {times:?}");
        assert!(calls(operator).await > before + 20.0, "the API server called the other replica");
    }
}

#[tokio::test]
async fn a_dry_run_a_secret_of_another_type_and_a_write_of_the_operator_cause_no_check() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    cluster.route(1).await;
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "checkout").await;
    cluster.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &namespace);
    let counters = async || {
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
    let deleted = secrets.delete("checkout-secret", &dry_run).await.expect("a dry run");
    assert!(secrets.get_opt("checkout-secret").await.unwrap().is_some(), "{deleted:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(counters().await, [1.0, 0.0], "one review, of the dry run, and no notice");
    secrets.delete("checkout-secret", &DeleteParams::default()).await.unwrap();
    eventually("the notice is taken", TIMEOUT, async || {
        ensure!(counters().await[1] > 0.0, "no notice");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_secret_deleted_without_a_leader_or_during_a_handover_is_detected_by_the_next_leader() {
    let cluster = Cluster::lock().await;
    let (first, second) = cluster.pair(&[]).await;
    let namespace = namespace(&cluster.client).await;
    for name in ["one", "two"] {
        cluster.apply(&namespace, name).await;
        cluster.minted(&namespace, name).await;
    }
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &namespace);
    let is_lost = async |name: &str| {
        let found = ready_reason(&cluster, &namespace, name).await?;
        ensure!(found == "SecretLost", "{found}");
        Ok(())
    };
    // The API server still calls the stopping replica.
    first.send_sigterm().unwrap();
    eventually("the other replica leads", TIMEOUT, async || leads(&second).await).await;
    secrets.delete("one-secret", &DeleteParams::default()).await.unwrap();
    eventually("the deletion is detected", Duration::from_secs(5), async || is_lost("one").await).await;
    assert!(first.ended(Duration::from_secs(25)).await.unwrap().success(), "{}", first.log());

    let third = cluster.replica(3, &[], None).await;
    cluster.route(3).await;
    cluster.wait_until_called(&namespace, &third).await;
    second.kill();
    secrets.delete("two-secret", &DeleteParams::default()).await.unwrap();
    assert!(!is_leader(&third).await.unwrap(), "the follower leads before the lease expired");
    eventually("the other replica leads", TIMEOUT, async || leads(&third).await).await;
    eventually("the deletion is detected", Duration::from_secs(5), async || is_lost("two").await).await;
}

#[tokio::test]
async fn an_operator_that_hangs_or_is_down_does_not_block_writes_of_secrets() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    cluster.route(1).await;
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "checkout").await;
    cluster.minted(&namespace, "checkout").await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &namespace);
    let signal = |signal: &str| {
        let id = operator.id().to_string();
        output(std::process::Command::new("/bin/sh").args(["-c", "kill -s $1 $2", "kill", signal, &id])).unwrap();
    };
    let write = async |operator_state: &str, limit_ms: u64| {
        let label = json!({"metadata": {"labels": {"written": operator_state}}});
        let started = Instant::now();
        secrets.patch("checkout-secret", &PatchParams::default(), &Patch::Merge(label)).await.expect(operator_state);
        let took = started.elapsed();
        println!("a write of a key's Secret while the operator {operator_state}: {took:?}");
        assert!(took < Duration::from_millis(limit_ms), "{operator_state}: {took:?}");
    };
    write("runs", 1000).await;
    signal("STOP");
    write("hangs", 2000).await;
    let started = Instant::now();
    let other: Secret = serde_json::from_value(json!({"metadata": {"name": "other"}})).unwrap();
    secrets.create(&PostParams::default(), &other).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(900), "a write of another Secret waited for the operator");
    signal("CONT");
    operator.kill();
    write("is-down", 2000).await;
    secrets.delete("checkout-secret", &DeleteParams::default()).await.expect("deleted without the operator");
}

/// Renewals fail with 500 or receive no answer. In both cases the leader stops before another replica may lead.
#[tokio::test]
async fn a_leader_that_cannot_renew_its_lease_exits_before_the_lease_expires() {
    for fault in [Fault::Reject(500), Fault::Delay(Duration::from_hours(1))] {
        let cluster = Cluster::lock().await;
        let proxy = Proxy::start(cluster.plane).unwrap();
        let first = cluster.leader(&[], Some(&proxy)).await;
        let second = cluster.replica(2, &[], None).await;
        let renewal = |request: &Record| request.method == Method::PUT && request.path.contains("/leases/");
        proxy.inject_times(1, usize::MAX, renewal, fault.clone());
        let namespace = namespace(&cluster.client).await;
        // The old or the new leader may mint keys that are created meanwhile, but only once.
        let history = History::of(&cluster.client, &namespace);
        cluster.route(2).await;
        let mut number = 0;
        let overlap = async {
            while !is_leader(&second).await.unwrap() {
                if number < 30 {
                    number += 1;
                    cluster.apply(&namespace, &format!("key-{number}")).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            // The first replica may still answer the API server, but does not lead.
            assert!(!is_leader(&first).await.unwrap_or(false), "two replicas lead");
            Instant::now()
        };
        let led = tokio::time::timeout(Duration::from_secs(40), overlap).await.expect("the other replica leads");
        assert!(first.log().contains("leadership lost"), "{}", first.log());
        let status = first.ended(Duration::from_secs(20)).await.unwrap();
        assert!(!status.success(), "the process exited with success");
        let writes = writes_after(&proxy, led);
        assert!(writes.is_empty(), "{writes:#?}");
        for number in 1..=number {
            let name = format!("key-{number}");
            cluster.minted_once(&namespace, &name, &history, &format!("{fault:?}")).await;
        }
    }
}

/// The API server of the test observes a new bundle within milliseconds. So the test also simulates a slow API server,
/// which trusts the bundle that was published two seconds ago. The watches of the CA's Secret by the follower receive
/// no answer, so that the follower observes a new CA up to ten seconds after the leader.
#[tokio::test]
async fn two_replacements_of_the_ca_fail_no_admission_even_if_others_observe_them_late() {
    let cluster = Cluster::lock().await;
    // The default validity of a CA is a year, so start with a short-lived one.
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let _ = secrets.delete(CA_SECRET, &DeleteParams::default()).await;
    let validity = ["--webhook-ca-validity=45s", "--webhook-cert-validity=20s", "--webhook-ca-settle=4s"];
    let proxy = Proxy::start(cluster.plane).unwrap();
    let certificates =
        |r: &Record| r.is_watch() && (r.path.ends_with("/secrets") || r.path.ends_with("webhookconfigurations"));
    let first = cluster.leader(&validity, None).await;
    let second = cluster.replica(2, &validity, Some(&proxy)).await;
    proxy.inject_times(1, usize::MAX, certificates, Fault::Delay(Duration::from_hours(1)));
    proxy.cut_watches();
    let namespace = namespace(&cluster.client).await;
    eventually("admission works", TIMEOUT, async || Ok(cluster.try_key(&namespace, &["Alerts"]).await?)).await;

    let done = AtomicBool::new(false);
    let requests = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        for number in 0.. {
            ticks.tick().await;
            if done.load(Ordering::SeqCst) {
                break;
            }
            if number % 17 == 0 {
                cluster.route(if number % 34 == 0 { 2 } else { 1 }).await;
            }
            if let Err(error) = cluster.try_key(&namespace, &["Alerts"]).await {
                panic!("admission {number} failed: {error}\n{}\n{}", first.log(), second.log());
            }
        }
    };
    let slow_server = async {
        let (mut published, mut calls) = (VecDeque::new(), 0);
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while !done.load(Ordering::SeqCst) {
            ticks.tick().await;
            published.push_back((Instant::now(), cluster.bundle().await.expect("a bundle")));
            while published.get(1).is_some_and(|(at, _)| at.elapsed() >= Duration::from_secs(2)) {
                published.pop_front();
            }
            // The bundle that the slow API server trusts, and the newest one.
            for (at, bundle) in [published.front().unwrap(), published.back().unwrap()] {
                for (replica, operator) in [(1, &first), (2, &second)] {
                    let address = cluster.release.webhook_address(operator).parse().expect("an address");
                    let name = format!("keywright-webhook.{NAMESPACE}.svc");
                    if let Err(error) = self_check::ask(address, &name, bundle, None).await {
                        let age = at.elapsed();
                        panic!(
                            "a client with a bundle of {age:?} can't call replica {replica}: {error}\n{}\n{}",
                            first.log(),
                            second.log()
                        );
                    }
                    calls += 1;
                }
            }
        }
        println!("{calls} calls of a slow API server");
    };
    let replacements = async {
        let mut seen = BTreeSet::new();
        let started = Instant::now();
        while seen.len() < 3 {
            let secret = secrets.get(CA_SECRET).await.expect("the CA's Secret");
            seen.insert(secret.data.unwrap_or_default().remove("ca.crt").expect("a certificate").0);
            assert!(started.elapsed() < Duration::from_mins(4), "the CA was replaced only {} times", seen.len() - 1);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        // Wait until the certificates of the old CA are replaced too.
        tokio::time::sleep(Duration::from_secs(15)).await;
        done.store(true, Ordering::SeqCst);
        println!("two replacements in {:?}", started.elapsed());
    };
    tokio::join!(requests, slow_server, replacements);
    for (name, operator) in [("first", &first), ("second", &second)] {
        let admitted = admitted(operator).await;
        println!("{admitted} admissions by the {name} replica");
        assert!(admitted > 50.0, "too few admissions by the {name} replica: {admitted}");
    }
    // The next test must not use the short-lived CA.
    drop((first, second));
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn a_removed_bundle_and_a_deleted_ca_are_restored() {
    let cluster = Cluster::lock().await;
    let (_first, _second) = cluster.pair(&["--webhook-ca-settle=3s"]).await;
    let namespace = namespace(&cluster.client).await;
    let works = async |goal: &str, timeout: u64| {
        for replica in [1, 2] {
            cluster.route(replica).await;
            eventually(goal, Duration::from_secs(timeout), async || {
                Ok(cluster.try_key(&namespace, &["Alerts"]).await?)
            })
            .await;
        }
    };
    works("admission works", 30).await;
    let bundle = cluster.bundle().await.unwrap();

    cluster.remove_bundle().await;
    eventually("the bundle is restored", Duration::from_secs(8), async || {
        ensure!(cluster.bundle().await.as_ref() == Some(&bundle), "there is no bundle, or another one");
        Ok(())
    })
    .await;
    works("admission works with the restored bundle", 10).await;

    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    eventually("a new CA exists and is published", Duration::from_secs(15), async || {
        secrets.get(CA_SECRET).await?;
        ensure!(cluster.bundle().await.is_some_and(|current| current != bundle), "the old bundle is published");
        Ok(())
    })
    .await;
    works("both replicas have certificates of the new CA", 15).await;
}

#[tokio::test]
async fn without_an_operator_writes_are_rejected_and_deletions_succeed() {
    let cluster = Cluster::lock().await;
    let namespaces = [namespace(&cluster.client).await, namespace(&cluster.client).await];
    {
        let operator = cluster.replica(1, &[], None).await;
        cluster.route(1).await;
        for namespace in &namespaces {
            for name in ["one", "two"] {
                cluster.apply(namespace, name).await;
                cluster.minted(namespace, name).await;
            }
        }
        operator.kill();
    }
    let rejection = cluster.try_key(&namespaces[0], &["Alerts"]).await.unwrap_err().to_string();
    assert!(rejection.contains("failed calling webhook") && rejection.contains(".keywright.dev"), "{rejection}");
    let mut changed = spec();
    changed["active"] = json!(false);
    let rejection = apply(&cluster.client, &namespaces[0], "one", &changed).await.unwrap_err().to_string();
    assert!(rejection.contains("failed calling webhook"), "{rejection}");

    cluster.keys(&namespaces[0]).delete("one", &DeleteParams::default()).await.expect("a key can be deleted");
    let all: Api<Namespace> = Api::all(cluster.client.clone());
    all.delete(&namespaces[1], &DeleteParams::default()).await.expect("a namespace can be deleted");
    eventually("the key and its Secret are gone", TIMEOUT, async || {
        let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &namespaces[0]);
        ensure!(cluster.keys(&namespaces[0]).get_opt("one").await?.is_none(), "the key exists");
        ensure!(secrets.get_opt("one-secret").await?.is_none(), "the Secret exists");
        ensure!(secrets.get_opt("two-secret").await?.is_some(), "the other key's Secret is gone");
        Ok(())
    })
    .await;
    eventually("the namespace is gone", TIMEOUT, async || {
        ensure!(all.get_opt(&namespaces[1]).await?.is_none(), "the namespace is terminating");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_replica_is_not_ready_before_its_ca_is_published() {
    let cluster = Cluster::lock().await;
    cluster.remove_bundle_if_any().await;
    let proxy = Proxy::start(cluster.plane).unwrap();
    let publication = |r: &Record| r.method == Method::PATCH && r.path.contains("/validatingwebhookconfigurations/");
    let refused = proxy.inject_times(1, usize::MAX, publication, Fault::Reject(500));
    let options = Options { server: Some(proxy.url().to_owned()), ..Options::default() };
    let operator = Operator::start(cluster.plane, cluster.release, options).await.unwrap();
    cluster.route(1).await;
    eventually("the replica tried to publish the CA", TIMEOUT, async || {
        ensure!(refused.injected() > 1, "{}", refused.injected());
        // /readyz names the missing bundle only after the first lists are complete.
        let answer = operator.get("/readyz").await.expect_err("not ready without a bundle").to_string();
        ensure!(!answer.contains("first list"), "{answer}");
        Ok(())
    })
    .await;
    for _ in 0..10 {
        let answer = operator.get("/readyz").await.expect_err("not ready without a bundle").to_string();
        assert!(answer.contains("503") && answer.contains("caBundle"), "{answer}");
        operator.get("/healthz").await.expect("the replica is alive");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let namespace = namespace(&cluster.client).await;
    cluster.try_key(&namespace, &["Alerts"]).await.expect_err("the API server does not trust the replica");
    proxy.clear_faults();
    operator.wait_ready().await.unwrap();
    // The API server may observe the bundle later than the replica does.
    eventually("admission works", Duration::from_secs(5), async || {
        Ok(cluster.try_key(&namespace, &["Alerts"]).await?)
    })
    .await;
}

impl Cluster {
    async fn remove_bundle_if_any(&self) {
        if self.bundle().await.is_some() {
            self.remove_bundle().await;
        }
    }
}

#[tokio::test]
async fn only_the_operator_writes_the_status_of_a_key() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    cluster.route(1).await;
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "checkout").await;
    cluster.minted(&namespace, "checkout").await;
    let key = cluster.keys(&namespace).get("checkout").await.unwrap();
    let forged = json!({"status": {"tokens": [{
        "id": "key_0000000000000000", "sha256": "0".repeat(64), "mintedAt": "2026-11-23T10:00:00Z",
    }]}});
    // The policy holds with and without a running operator.
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
            let mut kubectl = cluster.plane.kubectl();
            kubectl.args(["-n", &namespace, "patch", "apikey", "checkout", "--subresource=status"]);
            let rejection = output(kubectl.args(["--type", kind, "-p", &patch])).expect_err("a forged key").to_string();
            assert!(rejection.contains("only the operator"), "{rejection}");
        }
        let manifest = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "checkout"},
            "status": forged["status"],
        });
        let params = PatchParams::apply("forger").force();
        let applied = cluster.keys(&namespace).patch_status("checkout", &params, &Patch::Apply(manifest)).await;
        let rejection = applied.expect_err("a forged key").to_string();
        assert!(rejection.contains("only the operator"), "{rejection}");
    }
    assert_eq!(cluster.keys(&namespace).get("checkout").await.unwrap().status, key.status);
    // Because status is a subresource, a status in a manifest is ignored.
    let _second = cluster.replica(2, &[], None).await;
    cluster.route(2).await;
    let mut manifest = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "other"}, "spec": spec(),
    });
    manifest["status"] = forged["status"].clone();
    let other = eventually("the key is admitted", TIMEOUT, async || {
        let params = PatchParams::apply("test").force();
        Ok(cluster.keys(&namespace).patch("other", &params, &Patch::Apply(manifest.clone())).await?)
    })
    .await;
    assert!(other.status.is_none());
}

#[tokio::test]
async fn the_operators_token_can_neither_list_secrets_nor_write_secrets_of_other_types() {
    let cluster = Cluster::lock().await;
    let team = namespace(&cluster.client).await;
    let kubeconfig = cluster.plane.kubeconfig_for_service_account(NAMESPACE, "keywright", None).await.unwrap();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    let client = Client::try_from(config).unwrap();
    let assert_rejected = |request: &str, answer: kube::Result<()>, message: &str| {
        let error = answer.expect_err(request).to_string();
        assert!(error.contains(message), "{request}: {error}");
    };
    let all: Api<Secret> = Api::all(client.clone());
    assert_rejected(
        "a list of all",
        all.list(&ListParams::default()).await.map(drop),
        "cannot list resource \"secrets\"",
    );
    let in_ = |namespace: &str| -> Api<Secret> { Api::namespaced(client.clone(), namespace) };
    for namespace in [&team, NAMESPACE, "kube-system"] {
        let list = in_(namespace).list(&ListParams::default()).await.map(drop);
        assert_rejected("a list", list, "cannot list resource \"secrets\"");
        let deleted = in_(namespace).delete("any", &DeleteParams::default()).await.map(drop);
        assert_rejected("a deletion", deleted, "cannot delete resource \"secrets\"");
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
            assert_rejected(kind, create(namespace, "stolen", kind).await, policy);
        }
    }
    assert_rejected("the CA's name in another namespace", create(&team, CA_SECRET, "Opaque").await, policy);
    create(&team, "allowed", "keywright.dev/api-key").await.expect("a Secret of a key");

    // The policy also rejects patches of other Secrets, although RBAC allows the verb.
    let others: Api<Secret> = Api::namespaced(cluster.client.clone(), &team);
    others.create(&PostParams::default(), &secret("other", "Opaque")).await.unwrap();
    let patch = Patch::Merge(json!({"data": {"key-value": "AAAA"}}));
    assert_rejected("a patch", in_(&team).patch("other", &PatchParams::default(), &patch).await.map(drop), policy);
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    let patch = Patch::Merge(json!({"spec": {"active": false}}));
    let patched = keys.patch("any", &PatchParams::default(), &patch).await.map(drop);
    assert_rejected("a patch of a spec", patched, "cannot patch resource \"apikeys\"");
    let names: Vec<_> =
        others.list(&ListParams::default()).await.unwrap().items.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["allowed", "other"]);
}
