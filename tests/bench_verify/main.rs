//! `make bench-verify`: what a check costs, beside an authorization server of the same stack that decides nothing, in the
//! same run on the same machine. The ratios count; absolute figures are what this machine did today.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
// Figures are parsed from /proc, and arguments are read where they are needed.
#![allow(clippy::disallowed_methods)]

#[path = "../support/mod.rs"]
mod support;

mod load;
mod noop;
mod plot;
mod proxied;
mod seed;
mod server;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
    core::v1::Namespace,
};
use keywright::api::ApiKey;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use load::Protocol;
use serde_json::{Value, json};
use server::Server;
use support::{ControlPlane, Operator, Options, Release, retry};

/// How long each server is asked at a time, and how often in turn.
const SLICE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 7;

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    if let Some("noop") = args.next().as_deref() {
        return noop::serve(&args.next().context("an address")?).await;
    }
    // Cargo passes --bench; a number limits the run, for a quick look.
    let most = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(100_000);
    let sizes: Vec<usize> = [10, 10_000, 100_000].into_iter().filter(|n| *n <= most).collect();
    eprintln!("starting the control plane, the chart and the operator");
    let plane = ControlPlane::start(&support::kubernetes_version()).await?;
    let release = Release::install(&plane, &[]).await?;
    let operator = Operator::start(&plane, &release, Options::default()).await?;
    operator.wait_ready().await?;
    let admin = plane.client().await?;
    let template = template(&admin).await?;
    // It would look at every key that is seeded, and say that their Secrets are missing.
    operator.terminate().await?;

    // Nobody is there to answer for it, and what is measured is not admission.
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(admin.clone());
    webhooks.delete("keywright", &DeleteParams::default()).await?;
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(admin.clone());
    webhooks.delete("keywright", &DeleteParams::default()).await?;

    let noop = Server::noop().await?;
    let mut rows = vec![];
    let mut seeded = 0;
    for size in sizes {
        eprintln!("{size} keys: seeding");
        seed::write(plane.etcd(), &template, seeded..size).await?;
        seeded = size;
        settle(&admin).await?;
        rows.push(measure(&plane, &admin, &noop, size).await?);
    }
    print(&rows);
    // The uses of a few keys are all told before there is anything to measure.
    if seeded >= 10_000 {
        println!("\n{}", uses(&plane, seeded).await?);
    }
    let proxied = proxied::measure(&plane, &noop, seeded).await?;
    proxied::print(&proxied);
    plot::write(&rows, &proxied)?;
    Ok(())
}

/// The apiserver takes in what appeared in etcd; a cold start of a verifier is not a cold start of that.
async fn settle(admin: &Client) -> Result<()> {
    let keys: Api<ApiKey> = Api::all(admin.clone());
    retry("the apiserver has settled", Duration::from_mins(3), async || {
        let asked = Instant::now();
        for _ in 0..3 {
            keys.list(&ListParams::default().limit(500)).await?;
        }
        ensure!(asked.elapsed() < Duration::from_millis(900), "it is busy: {:?}", asked.elapsed());
        Ok(())
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(())
}

/// An ApiKey as the operator leaves it and the apiserver stores it.
async fn template(admin: &Client) -> Result<Value> {
    for number in 0..100 {
        let metadata = ObjectMeta { name: Some(format!("bench-{number}")), ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        Api::all(admin.clone()).create(&PostParams::default(), &namespace).await?;
    }
    let spec = json!({
        "displayName": "Checkout service", "type": "Team", "presets": ["Alerts", "Dashboards"],
        "permissions": ["logs.data-api#high:ReadData"], "expiresAt": "2099-01-01T00:00:00Z",
    });
    let key = retry("the catalogue is accepted", support::PATIENCE, async || {
        support::keys::apply(admin, "bench-0", "template", &spec).await
    });
    key.await?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("keywright.dev", "v1alpha1", "ApiKey"));
    let keys: Api<DynamicObject> = Api::namespaced_with(admin.clone(), "bench-0", &resource);
    retry("a key is minted", support::PATIENCE, async || {
        let key = serde_json::to_value(keys.get("template").await?)?;
        ensure!(key["status"]["tokens"][0].is_object(), "not yet");
        Ok(key)
    })
    .await
}

pub struct Row {
    keys: usize,
    sync: Duration,
    index_bytes: f64,
    memory: u64,
    peak: u64,
    checks: Vec<Checks>,
    revocation: Option<(Duration, Duration, Duration)>,
}

/// One protocol, against both servers in turn.
pub struct Checks {
    protocol: Protocol,
    /// CPU a check of the verifier and of the no-op server, in microseconds: medians.
    cpu: (f64, f64),
    /// The median of the ratios of neighbours.
    ratio: f64,
    per_second: (f64, f64),
    p50: (Duration, Duration),
    p99: (Duration, Duration),
}

async fn measure(plane: &ControlPlane, admin: &Client, noop: &Server, keys: usize) -> Result<Row> {
    let started = Instant::now();
    let verifier = Server::verifier(plane).await?;
    retry("the verifier is ready", Duration::from_mins(2), async || verifier.get("/readyz").await).await?;
    let sync = started.elapsed();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let metrics = verifier.get("/metrics").await?;
    let metric = |name: &str| support::keys::metric(&metrics, name).unwrap_or_default();
    ensure!(metric("keywright_verifier_keys") >= keys as f64, "not every key is known");
    let index_bytes = metric("keywright_verifier_index_bytes") / metric("keywright_verifier_keys");
    eprintln!("{keys} keys: synced in {sync:.1?}, {index_bytes:.0} bytes a key, {} kB", verifier.memory()? / 1024);

    // At most ten thousand different keys are sent: more would measure this client.
    let values: Arc<Vec<String>> = Arc::new((0..keys).step_by((keys / 10_000).max(1)).map(seed::value).collect());
    let mut checks = vec![];
    for protocol in [Protocol::Grpc, Protocol::Http] {
        checks.push(compare(&verifier, noop, protocol, &values).await?);
    }
    let revocation = if keys >= 100_000 { Some(revocation(admin, &verifier).await?) } else { None };
    Ok(Row { keys, sync, index_bytes, memory: verifier.memory()?, peak: verifier.peak_memory()?, checks, revocation })
}

async fn compare(verifier: &Server, noop: &Server, protocol: Protocol, values: &Arc<Vec<String>>) -> Result<Checks> {
    let (mut ratios, mut ours, mut floor) = (vec![], vec![], vec![]);
    let (mut latencies, mut floor_latencies) = (vec![], vec![]);
    let mut rates = (vec![], vec![]);
    let slice = async |server: &Server| -> Result<(f64, load::Outcome)> {
        let before = server.cpu()?;
        let outcome = load::run(&server.address, protocol, values, SLICE).await?;
        let used = server.cpu()?.saturating_sub(before);
        Ok((used.as_secs_f64() * 1e6 / outcome.checks as f64, outcome))
    };
    // Neither is measured cold.
    slice(verifier).await?;
    slice(noop).await?;
    for round in 0..ROUNDS {
        let ((own, outcome), (other, floor_outcome)) = in_turn(round, slice(verifier), slice(noop)).await?;
        ratios.push(own / other);
        ours.push(own);
        floor.push(other);
        rates.0.push(outcome.checks as f64 / outcome.elapsed.as_secs_f64());
        rates.1.push(floor_outcome.checks as f64 / floor_outcome.elapsed.as_secs_f64());
        latencies.extend(outcome.latencies);
        floor_latencies.extend(floor_outcome.latencies);
    }
    latencies.sort_unstable();
    floor_latencies.sort_unstable();
    let at = |times: &[Duration], share: usize| times[(times.len() - 1) * share / 100];
    let checks = Checks {
        protocol,
        cpu: (median(ours), median(floor)),
        ratio: median(ratios),
        per_second: (median(rates.0), median(rates.1)),
        p50: (at(&latencies, 50), at(&floor_latencies, 50)),
        p99: (at(&latencies, 99), at(&floor_latencies, 99)),
    };
    eprintln!("{protocol:?}: {:.1} us against {:.1} us a check: {:.2}", checks.cpu.0, checks.cpu.1, checks.ratio);
    Ok(checks)
}

/// Runs both, one after the other; each is first in turn, so that a machine that slows down or speeds up favours neither.
async fn in_turn<T>(
    round: usize,
    ours: impl Future<Output = Result<T>>,
    floor: impl Future<Output = Result<T>>,
) -> Result<(T, T)> {
    if round.is_multiple_of(2) {
        return Ok((ours.await?, floor.await?));
    }
    let floor = floor.await?;
    Ok((ours.await?, floor))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How long from sending `active: false` until the first refusal, for 1,000 keys one after the other: p50, p99, most.
async fn revocation(admin: &Client, verifier: &Server) -> Result<(Duration, Duration, Duration)> {
    const KEYS: usize = 1000;
    let mut times = vec![];
    for number in (0..100_000).step_by(100_000 / KEYS) {
        let (namespace, name) = seed::place(number);
        let value = seed::value(number);
        ensure!(verifier.check(&value).await? == 200, "{name} does not work");
        let keys: Api<ApiKey> = Api::namespaced(admin.clone(), &namespace);
        let sent = Instant::now();
        let patch = Patch::Merge(json!({"spec": {"active": false}}));
        let patched = tokio::spawn(async move {
            let params = PatchParams::default();
            keys.patch(&name, &params, &patch).await.map(|key| key.name_any())
        });
        while verifier.check(&value).await? == 200 && sent.elapsed() < Duration::from_secs(10) {}
        let took = sent.elapsed();
        patched.await??;
        ensure!(took < Duration::from_secs(10), "{number} was never refused");
        times.push(took);
    }
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    Ok((at(50), at(99), at(100)))
}

/// What it costs to tell the cluster when keys were used, while every key is in use.
async fn uses(plane: &ControlPlane, keys: usize) -> Result<String> {
    const TIME: Duration = Duration::from_mins(1);
    let verifier = Server::verifier_that_tells(plane, "1h").await?;
    retry("the verifier is ready", Duration::from_mins(2), async || verifier.get("/readyz").await).await?;
    // All but those that were deactivated.
    let values: Arc<Vec<String>> = Arc::new((1..keys).filter(|number| number % 100 != 0).map(seed::value).collect());
    let outcome = load::run(&verifier.address, Protocol::Http, &values, 3 * SLICE).await?;
    ensure!(outcome.checks as usize >= values.len(), "not every key was used");
    drop(values);
    let written = async || -> Result<f64> {
        let name = "keywright_verifier_last_used_writes_total{outcome=\"Success\"}";
        support::keys::metric(&verifier.get("/metrics").await?, name).context("no such metric")
    };
    let (before, cpu) = (written().await?, verifier.cpu()?);
    tokio::time::sleep(TIME).await;
    let (writes, used) = (written().await? - before, verifier.cpu()?.saturating_sub(cpu));
    ensure!(writes > 0.0, "nothing was written");
    Ok(format!(
        "{keys} keys in use: {:.0} writes of lastUsedAt a second, {:.1}% of a core, resident {:.1} MB",
        writes / TIME.as_secs_f64(),
        used.as_secs_f64() / TIME.as_secs_f64() * 100.0,
        verifier.memory()? as f64 / 1e6
    ))
}

fn print(rows: &[Row]) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    for row in rows {
        println!(
            "\n{} keys: synced from a cold start in {:.1} s, {:.0} bytes of index a key, resident {:.1} MB (peak {:.1} MB)",
            row.keys,
            row.sync.as_secs_f64(),
            row.index_bytes,
            row.memory as f64 / 1e6,
            row.peak as f64 / 1e6
        );
        for c in &row.checks {
            println!(
                "  {:<5} CPU {:5.1} us a check, no-op {:5.1} us, ratio {:.2}; {:6.0}/s, no-op {:6.0}/s; p50 {:.2} ms, no-op {:.2}; p99 {:.2} ms, no-op {:.2}",
                format!("{:?}", c.protocol),
                c.cpu.0,
                c.cpu.1,
                c.ratio,
                c.per_second.0,
                c.per_second.1,
                ms(c.p50.0),
                ms(c.p50.1),
                ms(c.p99.0),
                ms(c.p99.1)
            );
        }
        if let Some((p50, p99, most)) = row.revocation {
            println!(
                "  from patching active: false to the first refusal: p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms",
                ms(p50),
                ms(p99),
                ms(most)
            );
        }
    }
}
