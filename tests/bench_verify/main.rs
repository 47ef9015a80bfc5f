//! `make bench-verify`: compares the verifier with a no-op authorization server of the same stack in the same run on
//! the same machine. Only the ratios are meaningful; absolute figures depend on the machine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
// The benchmark reads environment variables and arguments.
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

/// The length of a measurement of one server.
const SLICE: Duration = Duration::from_secs(2);
/// The number of measurements of each server.
const ROUNDS: usize = 7;

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    if let Some("noop") = args.next().as_deref() {
        return noop::serve(&args.next().context("an address")?).await;
    }
    // Cargo passes --bench. A number limits the number of keys.
    let most = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(100_000);
    let sizes: Vec<usize> = [10, 10_000, 100_000].into_iter().filter(|n| *n <= most).collect();
    eprintln!("starting the control plane, the chart and the operator");
    let plane = ControlPlane::start(&support::kubernetes_version()).await?;
    let release = Release::install(&plane, &[]).await?;
    let operator = Operator::start(&plane, &release, Options::default()).await?;
    operator.wait_ready().await?;
    let admin = plane.client().await?;
    let template = template(&admin).await?;
    // It would reconcile the seeded keys, which have no Secrets.
    operator.terminate().await?;

    // Without operator there is no webhook, and admission is not measured here.
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
        wait_for_apiserver(&admin).await?;
        rows.push(measure(&plane, &admin, &noop, size).await?);
    }
    print(&rows);
    // With few keys, all uses are reported before the measurement starts.
    if seeded >= 10_000 {
        println!("\n{}", uses(&plane, seeded).await?);
    }
    let proxied = proxied::measure(&plane, &noop, seeded).await?;
    proxied::print(&proxied);
    plot::write(&rows, &proxied)?;
    Ok(())
}

/// Waits until the apiserver has cached the keys that were written to etcd, so that the start of a verifier does not
/// include this time.
async fn wait_for_apiserver(admin: &Client) -> Result<()> {
    let keys: Api<ApiKey> = Api::all(admin.clone());
    retry("the apiserver responds quickly", Duration::from_mins(3), async || {
        let started = Instant::now();
        for _ in 0..3 {
            keys.list(&ListParams::default().limit(500)).await?;
        }
        ensure!(started.elapsed() < Duration::from_millis(900), "three lists took {:?}", started.elapsed());
        Ok(())
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(())
}

/// Creates the namespaces and a key, and returns the minted key as the apiserver stores it.
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
    let key = retry("the catalog is accepted", support::TIMEOUT, async || {
        support::keys::apply(admin, "bench-0", "template", &spec).await
    });
    key.await?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("keywright.dev", "v1alpha1", "ApiKey"));
    let keys: Api<DynamicObject> = Api::namespaced_with(admin.clone(), "bench-0", &resource);
    retry("a key is minted", support::TIMEOUT, async || {
        let key = serde_json::to_value(keys.get("template").await?)?;
        ensure!(key["status"]["tokens"][0].is_object(), "the key has no token");
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

/// The figures of one protocol: verifier and no-op server.
pub struct Checks {
    protocol: Protocol,
    /// The median CPU time for each check, in microseconds.
    cpu: (f64, f64),
    /// The median of the ratios of consecutive measurements.
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
    ensure!(metric("keywright_verifier_keys") >= keys as f64, "the verifier does not have all keys");
    let index_bytes = metric("keywright_verifier_index_bytes") / metric("keywright_verifier_keys");
    eprintln!(
        "{keys} keys: synced in {sync:.1?}, {index_bytes:.0} bytes for each key, {} kB",
        verifier.memory()? / 1024
    );

    // At most 10,000 different keys are sent; with more, the cost of this client would dominate.
    let values: Arc<Vec<String>> = Arc::new((0..keys).step_by((keys / 10_000).max(1)).map(seed::value).collect());
    let mut checks = vec![];
    for protocol in [Protocol::Grpc, Protocol::Http] {
        checks.push(compare(&verifier, noop, protocol, &values).await?);
    }
    let revocation = if keys >= 100_000 { Some(revocation(admin, &verifier).await?) } else { None };
    Ok(Row { keys, sync, index_bytes, memory: verifier.memory()?, peak: verifier.peak_memory()?, checks, revocation })
}

async fn compare(verifier: &Server, noop: &Server, protocol: Protocol, values: &Arc<Vec<String>>) -> Result<Checks> {
    let (mut ratios, mut cpu, mut noop_cpu) = (vec![], vec![], vec![]);
    let (mut latencies, mut noop_latencies) = (vec![], vec![]);
    let mut rates = (vec![], vec![]);
    let slice = async |server: &Server| -> Result<(f64, load::Outcome)> {
        let before = server.cpu()?;
        let outcome = load::run(&server.address, protocol, values, SLICE).await?;
        let used = server.cpu()?.saturating_sub(before);
        Ok((used.as_secs_f64() * 1e6 / outcome.checks as f64, outcome))
    };
    // Warm-up.
    slice(verifier).await?;
    slice(noop).await?;
    for round in 0..ROUNDS {
        let ((with_verifier, outcome), (with_noop, noop_outcome)) =
            in_turn(round, slice(verifier), slice(noop)).await?;
        ratios.push(with_verifier / with_noop);
        cpu.push(with_verifier);
        noop_cpu.push(with_noop);
        rates.0.push(outcome.checks as f64 / outcome.elapsed.as_secs_f64());
        rates.1.push(noop_outcome.checks as f64 / noop_outcome.elapsed.as_secs_f64());
        latencies.extend(outcome.latencies);
        noop_latencies.extend(noop_outcome.latencies);
    }
    latencies.sort_unstable();
    noop_latencies.sort_unstable();
    let at = |times: &[Duration], share: usize| times[(times.len() - 1) * share / 100];
    let checks = Checks {
        protocol,
        cpu: (median(cpu), median(noop_cpu)),
        ratio: median(ratios),
        per_second: (median(rates.0), median(rates.1)),
        p50: (at(&latencies, 50), at(&noop_latencies, 50)),
        p99: (at(&latencies, 99), at(&noop_latencies, 99)),
    };
    eprintln!(
        "{protocol:?}: {:.1} us for each check, no-op {:.1} us, ratio {:.2}",
        checks.cpu.0, checks.cpu.1, checks.ratio
    );
    Ok(checks)
}

/// Runs both measurements one after the other. The order alternates between rounds, so that a drift of the machine's
/// speed affects both equally.
async fn in_turn<T>(
    round: usize,
    verifier: impl Future<Output = Result<T>>,
    noop: impl Future<Output = Result<T>>,
) -> Result<(T, T)> {
    if round.is_multiple_of(2) {
        return Ok((verifier.await?, noop.await?));
    }
    let noop = noop.await?;
    Ok((verifier.await?, noop))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures the time from the patch `active: false` until the first 401, for 1,000 keys one after the other: p50, p99
/// and maximum.
async fn revocation(admin: &Client, verifier: &Server) -> Result<(Duration, Duration, Duration)> {
    const KEYS: usize = 1000;
    let mut times = vec![];
    for number in (0..100_000).step_by(100_000 / KEYS) {
        let (namespace, name) = seed::location(number);
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
        ensure!(took < Duration::from_secs(10), "key {number} was not rejected within 10 s");
        times.push(took);
    }
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    Ok((at(50), at(99), at(100)))
}

/// Measures the cost of reporting uses (`lastUsedAt`) while every key is in use.
async fn uses(plane: &ControlPlane, keys: usize) -> Result<String> {
    const TIME: Duration = Duration::from_mins(1);
    let verifier = Server::verifier_with_last_used_interval(plane, "1h").await?;
    retry("the verifier is ready", Duration::from_mins(2), async || verifier.get("/readyz").await).await?;
    // Without the keys that `revocation` deactivated.
    let values: Arc<Vec<String>> = Arc::new((1..keys).filter(|number| number % 100 != 0).map(seed::value).collect());
    let outcome = load::run(&verifier.address, Protocol::Http, &values, 3 * SLICE).await?;
    ensure!(outcome.checks as usize >= values.len(), "not every key was used");
    drop(values);
    let written = async || -> Result<f64> {
        let name = "keywright_verifier_last_used_writes_total{outcome=\"Success\"}";
        support::keys::metric(&verifier.get("/metrics").await?, name).with_context(|| format!("no metric {name}"))
    };
    let (before, cpu) = (written().await?, verifier.cpu()?);
    tokio::time::sleep(TIME).await;
    let (writes, used) = (written().await? - before, verifier.cpu()?.saturating_sub(cpu));
    ensure!(writes > 0.0, "no lastUsedAt was written");
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
            "\n{} keys: synced from a cold start in {:.1} s, {:.0} bytes of index for each key, resident {:.1} MB (peak {:.1} MB)",
            row.keys,
            row.sync.as_secs_f64(),
            row.index_bytes,
            row.memory as f64 / 1e6,
            row.peak as f64 / 1e6
        );
        for c in &row.checks {
            println!(
                "  {:<5} CPU {:5.1} us for each check, no-op {:5.1} us, ratio {:.2}; {:6.0}/s, no-op {:6.0}/s; p50 {:.2} ms, no-op {:.2}; p99 {:.2} ms, no-op {:.2}",
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
        if let Some((p50, p99, maximum)) = row.revocation {
            println!(
                "  from the patch active: false to the first 401: p50 {:.1} ms, p99 {:.1} ms, maximum {:.1} ms",
                ms(p50),
                ms(p99),
                ms(maximum)
            );
        }
    }
}
