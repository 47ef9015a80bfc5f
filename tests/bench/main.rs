//! `make bench`: compares the operator with a bare client that makes the same writes on the same control plane in the
//! same run. Only the ratios are meaningful; absolute times depend on the machine and its load.
//!
//! The bare client does the minimum: for each key it creates the Secret and patches the status with the bytes that the
//! operator writes, with the same concurrency. It has no watches and makes no decisions.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// Metrics are floating point numbers; the converted ones are small counts.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

#[path = "../support/mod.rs"]
mod support;

mod secrets;
mod webhook;

use webhook::{FIFTY, Requesters};

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::Lease,
        core::v1::{Namespace, Secret},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    jiff::Timestamp,
};
use keywright::{
    access,
    api::{ApiKey, PermissionCatalog, Requester},
    domain::{
        catalog::Catalog,
        inputs::Inputs,
        key::Key,
        lifecycle::{self, Observed, OwnedSecret, Step},
        record,
        rights::Need,
        status, validate,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use rand::rngs::SysRng;
use serde_json::json;
use support::{ControlPlane, Operator, Options, Proxy, Release, operator::NAMESPACE, retry};

/// The number of keys that are processed at a time: the chart's default.
const CONCURRENCY: usize = 16;
const NAMESPACES: usize = 10;

#[tokio::main]
async fn main() -> Result<()> {
    // Cargo passes --bench. A number limits the number of keys; `idle` measures only the requests of an idle operator;
    // `secrets` measures only the policy for Secrets.
    let most = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(10_000);
    let sizes: Vec<usize> = [1000, 10_000].into_iter().filter(|n| *n <= most).collect();
    eprintln!("starting the control plane, the chart and the operator");
    let plane = ControlPlane::start(&support::kubernetes_version()).await?;
    let release = Release::install(&plane, &[]).await?;
    let bench = Bench::new(&plane, &release).await?;
    if std::env::args().any(|arg| arg == "idle") {
        for n in sizes {
            bench.idle(n).await?;
        }
        return Ok(());
    }
    secrets::measure(&plane, &bench.admin, &namespace(0)).await?;
    if std::env::args().any(|arg| arg == "secrets") {
        return Ok(());
    }
    bench.rights().await?;
    let mut rows = vec![];
    for n in sizes {
        rows.push(bench.run(n).await?);
    }
    print(&rows);
    bench.idle(rows.iter().map(|row| row.keys).max().unwrap_or_default()).await
}

struct Row {
    keys: usize,
    bare_backlog: Duration,
    backlog: Duration,
    bare_live: Duration,
    live: Duration,
    writes: BTreeMap<String, u64>,
    memory: u64,
    peak: u64,
    webhook: webhook::Latency,
}

struct Bench<'a> {
    plane: &'a ControlPlane,
    release: &'a Release,
    admin: Client,
    /// A client with the operator's account, because only it may write a status, and the additional right to patch it.
    bare: Client,
    catalog: Catalog,
}

impl<'a> Bench<'a> {
    async fn new(plane: &'a ControlPlane, release: &'a Release) -> Result<Self> {
        let operator = Operator::start(plane, release, Options::default()).await?;
        operator.wait_ready().await?;
        support::wait_for_catalog(plane, support::TIMEOUT).await?;
        operator.terminate().await?;
        let admin = plane.client().await?;
        let role: ClusterRole = serde_json::from_value(json!({
            "metadata": {"name": "bare-client"},
            "rules": [{"apiGroups": ["keywright.dev"], "resources": ["apikeys/status"], "verbs": ["patch"]}],
        }))?;
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": "bare-client"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "bare-client"},
            "subjects": [{"kind": "ServiceAccount", "name": "keywright", "namespace": NAMESPACE}],
        }))?;
        Api::all(admin.clone()).create(&PostParams::default(), &role).await?;
        Api::all(admin.clone()).create(&PostParams::default(), &binding).await?;
        for team in 0..NAMESPACES {
            let metadata = ObjectMeta { name: Some(namespace(team)), ..ObjectMeta::default() };
            let namespace = Namespace { metadata, ..Namespace::default() };
            Api::all(admin.clone()).create(&PostParams::default(), &namespace).await?;
        }
        let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, "keywright", None).await?;
        let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
        let options = kube::config::KubeConfigOptions::default();
        let bare = Client::try_from(kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?)?;
        let coralogix: PermissionCatalog = Api::all(admin.clone()).get("coralogix").await?;
        let catalog = Catalog::merge([("coralogix", &coralogix.spec)]).0;
        Ok(Self { plane, release, admin, bare, catalog })
    }

    /// Measures admission with 50 rights that are not cached, and the same 50 reviews by a bare client in parallel.
    async fn rights(&self) -> Result<()> {
        const REQUESTS: usize = 300;
        let names: Vec<_> = (0..50).map(|i| format!("fifty.part-{i}:Read")).collect();
        let permissions: Vec<_> = names.iter().map(|name| json!({"name": name})).collect();
        let catalog: PermissionCatalog = serde_json::from_value(json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": "fifty"},
            "spec": {"permissions": permissions, "presets": [{"name": FIFTY, "permissions": names}]},
        }))?;
        Api::all(self.admin.clone()).create(&PostParams::default(), &catalog).await?;
        let role: ClusterRole = serde_json::from_value(json!({
            "metadata": {"name": "fifty"},
            "rules": [{"apiGroups": ["keywright.dev"], "resources": ["permissions"], "resourceNames": names, "verbs": ["use"]}],
        }))?;
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": "fifty"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "fifty"},
            "subjects": [{"kind": "Group", "name": FIFTY, "apiGroup": "rbac.authorization.k8s.io"}],
        }))?;
        Api::all(self.admin.clone()).create(&PostParams::default(), &role).await?;
        Api::all(self.admin.clone()).create(&PostParams::default(), &binding).await?;
        let operator = Operator::start(self.plane, self.release, Options::default()).await?;
        operator.wait_ready().await?;
        tokio::time::sleep(Duration::from_secs(2)).await;

        let reviewer = access::ClusterReviewer::new(self.bare.clone());
        let need = Need::All(names.iter().map(|name| Need::permission(name)).collect());
        let mut bare = vec![];
        for number in 0..REQUESTS {
            let requester = Arc::new(Requester {
                username: format!("bare-{number}"),
                groups: vec![FIFTY.to_owned()],
                ..Requester::default()
            });
            let started = Instant::now();
            let answer = access::ask(&reviewer, &requester, &namespace(0).as_str().into(), &need).await?;
            bare.push(started.elapsed());
            ensure!(answer.met, "the requester lacks the rights");
        }
        bare.sort_unstable();
        let found = webhook::measure(self.plane, self.release, &operator, (1, REQUESTS), Requesters::Uncached).await?;
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        println!("admission with 50 rights that are not cached, one request at a time: p50, p99 in ms");
        println!("  webhook (51 reviews)           {:7.2} {:7.2}", milliseconds(found.p50), milliseconds(found.p99));
        let at = |share: usize| milliseconds(bare[(bare.len() - 1) * share / 100]);
        println!("  the 50 reviews alone, parallel {:7.2} {:7.2}", at(50), at(99));
        operator.terminate().await?;
        Ok(())
    }

    async fn run(&self, n: usize) -> Result<Row> {
        // Another holder of the lease: the operator serves admission and writes nothing.
        self.lease(Some("bench")).await?;
        let operator = Operator::start(self.plane, self.release, Options::default()).await?;
        operator.wait_ready().await?;

        eprintln!("{n} keys: bare client, apply and write");
        let started = Instant::now();
        self.each(n, async |team, name| {
            let key = self.apply(team, name).await?;
            self.write(team, key).await
        })
        .await?;
        let bare_live = started.elapsed();
        self.clear().await?;

        eprintln!("{n} keys: bare client, write for existing keys");
        let keys = self.each(n, async |team, name| Ok((team, self.apply(team, name).await?))).await?;
        let started = Instant::now();
        stream::iter(keys)
            .map(|(team, key)| self.write(team, key))
            .buffer_unordered(CONCURRENCY)
            .try_collect::<Vec<_>>()
            .await?;
        let bare_backlog = started.elapsed();
        self.clear().await?;

        eprintln!("{n} keys: operator, existing keys");
        self.each(n, async |team, name| self.apply(team, name).await).await?;
        let before = self.writes().await?;
        self.lease(None).await?;
        let leads = |text: &str| text.contains("keywright_leader 1");
        wait_for(&operator, leads).await?;
        let started = Instant::now();
        wait_for(&operator, |text| active(text) == n).await?;
        let backlog = started.elapsed();
        // Events are written asynchronously, after the keys.
        wait_for(&operator, |text| metric(text, "keywright_events_total{outcome=\"Success\"}") >= n as f64).await?;
        let writes = self.writes().await?.into_iter().map(|(request, count)| {
            let before = before.get(&request).copied().unwrap_or(0);
            (request, count - before)
        });
        let writes = writes.filter(|(request, count)| *count > n as u64 / 2 || request.contains("secrets")).collect();
        let (memory, peak) = (operator.memory()?, operator.peak_memory()?);
        let webhook = webhook::measure(self.plane, self.release, &operator, (50, 20_000), Requesters::Cached).await?;
        self.clear().await?;
        wait_for(&operator, |text| active(text) == 0).await?;

        eprintln!("{n} keys: operator, apply");
        let started = Instant::now();
        let applied = self.each(n, async |team, name| self.apply(team, name).await);
        let (applied, ready) = tokio::join!(applied, wait_for(&operator, |text| active(text) == n));
        applied?;
        ready?;
        let live = started.elapsed();
        operator.terminate().await?;
        self.clear().await?;
        Ok(Row { keys: n, bare_backlog, backlog, bare_live, live, writes, memory, peak, webhook })
    }

    /// Measures the requests of an idle operator.
    async fn idle(&self, n: usize) -> Result<()> {
        const SPAN: Duration = Duration::from_mins(1);
        /// Keys created together are checked again after 80 to 100 % of the interval of six hours. In seconds.
        const MEAN_INTERVAL: f64 = 0.9 * 6.0 * 3600.0;

        eprintln!("{n} keys: requests of an idle operator");
        let measure = async |proxy: &Proxy| {
            // Waits until the requests of the start are over.
            tokio::time::sleep(Duration::from_secs(45)).await;
            let from = Instant::now();
            tokio::time::sleep(SPAN).await;
            let requests = proxy.requests().into_iter().filter(|request| request.at >= from);
            let (reads, others): (Vec<_>, Vec<_>) = requests.partition(|request| request.path.contains("/secrets/"));
            let of_keys = reads.iter().filter(|request| !request.path.contains(NAMESPACE)).count();
            let per_second = |count: usize| count as f64 / SPAN.as_secs_f64();
            (per_second(of_keys), per_second(reads.len() - of_keys + others.len()))
        };
        let start = async |proxy: &Proxy, args: &[&str]| {
            let args = args.iter().map(ToString::to_string).collect();
            let options = Options { server: Some(proxy.url().to_owned()), args, ..Options::default() };
            let operator = Operator::start(self.plane, self.release, options).await?;
            operator.wait_ready().await?;
            wait_for(&operator, |text| text.contains("keywright_leader 1")).await?;
            Ok::<_, anyhow::Error>(operator)
        };
        self.lease(None).await?;
        let proxy = Proxy::start(self.plane)?;
        let operator = start(&proxy, &[]).await?;
        self.each(n, async |team, name| self.apply(team, name).await).await?;
        wait_for(&operator, |text| active(text) == n).await?;
        let (reads, others) = measure(&proxy).await;
        let planned = n as f64 / MEAN_INTERVAL;
        operator.terminate().await?;
        // In its first ten minutes, a leader checks as often as with an interval of ten minutes.
        let proxy = Proxy::start(self.plane)?;
        let operator = start(&proxy, &["--secret-check-interval=10m"]).await?;
        let (before, others_before) = measure(&proxy).await;
        operator.terminate().await?;
        self.clear().await?;
        println!("requests a second of an idle operator, {n} keys, one replica: reads of Secrets of keys + all others");
        println!("  interval 10m, and the first ten minutes of a leader {before:7.2} + {others_before:.2}");
        println!("  interval 6h, measured in the first two minutes      {reads:7.2} + {others:.2}");
        println!("  interval 6h, mean (computed)                        {planned:7.2} + {others:.2}");
        Ok(())
    }

    /// Calls `work` for each of `n` keys, with the concurrency of the operator.
    async fn each<T>(&self, n: usize, work: impl AsyncFn(usize, String) -> Result<T>) -> Result<Vec<T>> {
        stream::iter(0..n)
            .map(|i| work(i % NAMESPACES, format!("key-{i}")))
            .buffer_unordered(CONCURRENCY)
            .try_collect()
            .await
    }

    async fn apply(&self, team: usize, name: String) -> Result<ApiKey> {
        let key: ApiKey = serde_json::from_value(json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name},
            "spec": {
                "displayName": "Checkout service", "type": "Team", "presets": ["Alerts", "Dashboards"],
                "permissions": ["logs.data-api#high:ReadData"], "expiresAt": "2099-01-01T00:00:00Z",
            },
        }))?;
        let keys: Api<ApiKey> = Api::namespaced(self.admin.clone(), &namespace(team));
        Ok(keys.create(&PostParams::default(), &key).await?)
    }

    /// Makes the writes of the operator for a new key.
    async fn write(&self, team: usize, key: ApiKey) -> Result<()> {
        let now = Timestamp::from_second(key.creation_timestamp().context("no creation timestamp")?.0.as_second())?;
        let validation = validate::check(&key.spec, &self.catalog);
        let unread = Observed::NotRead;
        let inputs = Inputs::new(&key, &validation, &unread, now);
        let Step::Mint(draft) = lifecycle::step(&inputs) else { anyhow::bail!("the key needs no Secret") };
        let value = Key::mint(key.spec.key_type, &mut SysRng)?;
        let record = draft.seal(&key, value.digest(), now);
        let secret_ref = status::secret_ref(&key);
        let owner = key.controller_owner_ref(&()).context("no owner reference")?;
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(secret_ref.name),
                owner_references: Some(vec![owner]),
                labels: Some([("app.kubernetes.io/managed-by".to_owned(), "keywright".to_owned())].into()),
                annotations: Some([(record::ANNOTATION.to_owned(), serde_json::to_string(&record)?)].into()),
                ..ObjectMeta::default()
            },
            type_: Some(record::SECRET_TYPE.to_owned()),
            data: Some([(secret_ref.key, ByteString(value.expose().as_bytes().to_vec()))].into()),
            ..Secret::default()
        };
        let secrets: Api<Secret> = Api::namespaced(self.bare.clone(), &namespace(team));
        secrets.create(&PostParams::default(), &secret).await?;
        let written = Some(record.clone());
        let version = String::new();
        let observed = Observed::Ours(OwnedSecret {
            version,
            record,
            written,
            mac: None,
            intact: true,
            owned: true,
            in_order: true,
        });
        let inputs = Inputs::new(&key, &validation, &observed, now);
        let patch = Patch::Merge(json!({"status": status::build(&inputs)}));
        let keys: Api<ApiKey> = Api::namespaced(self.bare.clone(), &namespace(team));
        keys.patch_status(&key.name_any(), &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Assigns the Lease to `holder` for ten hours, or frees it.
    async fn lease(&self, holder: Option<&str>) -> Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.admin.clone(), NAMESPACE);
        let duration = if holder.is_some() { 36_000 } else { 1 };
        let spec = json!({"spec": {"holderIdentity": holder, "leaseDurationSeconds": duration}});
        leases.patch("keywright-operator", &PatchParams::default(), &Patch::Merge(spec)).await?;
        Ok(())
    }

    /// Deletes all keys and Secrets, and waits until the keys are deleted.
    async fn clear(&self) -> Result<()> {
        for team in 0..NAMESPACES {
            let secrets: Api<Secret> = Api::namespaced(self.admin.clone(), &namespace(team));
            secrets.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
            let keys: Api<ApiKey> = Api::namespaced(self.admin.clone(), &namespace(team));
            keys.delete_collection(&DeleteParams::background(), &ListParams::default()).await?;
            retry("the keys are deleted", support::TIMEOUT, async || {
                ensure!(keys.list(&ListParams::default().limit(1)).await?.items.is_empty(), "keys still exist");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// The numbers of write requests that the apiserver has served, by verb and resource.
    async fn writes(&self) -> Result<BTreeMap<String, u64>> {
        let text = self.admin.request_text(http::Request::get("/metrics").body(vec![])?).await?;
        let mut counts = BTreeMap::new();
        for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let label = |name: &str| line.split(&format!("{name}=\"")).nth(1).and_then(|rest| rest.split('"').next());
            let (Some(verb), Some(resource)) = (label("verb"), label("resource")) else { continue };
            if ["POST", "PUT", "PATCH", "APPLY"].contains(&verb) && resource != "leases" {
                let subresource = label("subresource").unwrap_or_default();
                let count = line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
                *counts
                    .entry(format!("{verb} {resource}/{subresource}").trim_end_matches('/').to_owned())
                    .or_default() += count as u64;
            }
        }
        Ok(counts)
    }
}

fn namespace(team: usize) -> String {
    format!("team-{team}")
}

fn metric(text: &str, name: &str) -> f64 {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0.0)
}

fn active(text: &str) -> usize {
    metric(text, "keywright_api_keys{type=\"Team\",state=\"Active\"}") as usize
}

/// Polls the operator's metrics until `reached` returns true for them.
async fn wait_for(operator: &Operator, reached: impl Fn(&str) -> bool) -> Result<()> {
    retry("the expected metrics", Duration::from_mins(10), async || {
        ensure!(reached(&operator.metrics().await?), "the metrics differ");
        Ok(())
    })
    .await
}

fn print(rows: &[Row]) {
    let seconds = |d: Duration| format!("{:.1} s", d.as_secs_f64());
    let ratio = |a: Duration, b: Duration| format!("{:.2}", a.as_secs_f64() / b.as_secs_f64());
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1024.0 / 1024.0);
    let line = |title: &str, cell: &dyn Fn(&Row) -> String| {
        println!(
            "| {title:<62} |{}",
            rows.iter().map(|row| format!(" {:>12} |", cell(row))).collect::<Vec<_>>().concat()
        );
    };
    line("keys", &|r| r.keys.to_string());
    println!("| {:-<62} |{}", "", rows.iter().map(|_| format!("{:->13}:|", "")).collect::<Vec<_>>().concat());
    line("bare client, existing keys: Secret + status", &|r| seconds(r.bare_backlog));
    line("operator, existing keys: until all are Ready", &|r| seconds(r.backlog));
    line("ratio (at most 1.5)", &|r| ratio(r.backlog, r.bare_backlog));
    line("bare client, apply + Secret + status", &|r| seconds(r.bare_live));
    line("operator, apply until all are Ready", &|r| seconds(r.live));
    line("ratio (at most 1.5)", &|r| ratio(r.live, r.bare_live));
    line("write requests for each key (at most 3)", &|r| {
        format!("{:.2}", r.writes.values().sum::<u64>() as f64 / r.keys as f64)
    });
    line("operator, resident memory with these keys (at most 60 MB)", &|r| mib(r.memory));
    line("operator, peak resident memory", &|r| mib(r.peak));
    line("webhook, 50 at a time: p50", &|r| format!("{:.2} ms", r.webhook.p50.as_secs_f64() * 1e3));
    line("webhook, 50 at a time: p99 (at most 10 ms)", &|r| format!("{:.2} ms", r.webhook.p99.as_secs_f64() * 1e3));
    line("webhook, 50 at a time: requests a second", &|r| format!("{:.0}", r.webhook.per_second));
    for row in rows {
        println!("writes for {} keys: {:?}", row.keys, row.writes);
    }
}
