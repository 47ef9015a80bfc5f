//! `make bench`: what a key costs, beside a bare client that makes the same writes on the same control plane in the
//! same run. Machines are noisy, so the ratios count; absolute times are only what this machine did today.
//!
//! The bare client is the least that could do the job: for each key it creates the Secret and patches the status, byte
//! for byte what the operator would write, with as many keys at a time. It watches nothing and decides nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// Counts of at most some ten thousand, as metrics give them.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

#[path = "../support/mod.rs"]
mod support;

mod secrets;
mod webhook;

use webhook::{Asking, FIFTY};

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
        key::Key,
        lifecycle::{self, Held, Observed, Step, World},
        record,
        rights::Need,
        status::{self, Facts},
        validate,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use rand::rngs::SysRng;
use serde_json::json;
use support::{ControlPlane, Operator, Options, Proxy, Release, operator::NAMESPACE, output, retry};

/// As many keys at a time as the chart's default.
const CONCURRENCY: usize = 16;
const NAMESPACES: usize = 10;

#[tokio::main]
async fn main() -> Result<()> {
    // Cargo passes --bench; a number limits the run, for a quick look; `idle` asks for the requests at rest alone.
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
    // Only that, for a quick look.
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
    /// The operator's own account, since nobody else may write a status; with the right to patch it.
    bare: Client,
    catalog: Catalog,
}

impl<'a> Bench<'a> {
    async fn new(plane: &'a ControlPlane, release: &'a Release) -> Result<Self> {
        let operator = Operator::start(plane, release, Options::default()).await?;
        operator.wait_ready().await?;
        let accepted = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=5s"];
        retry("the catalogue is accepted", support::PATIENCE, async || output(plane.kubectl().args(accepted))).await?;
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

    /// What it costs to ask for 50 rights that nobody remembers, beside a bare client that asks for the same 50 at once.
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

        let reviewer = access::Cluster::new(self.bare.clone());
        let need = Need::All(names.iter().map(|name| Need::permission(name)).collect());
        let mut bare = vec![];
        for number in 0..REQUESTS {
            let who = Arc::new(Requester {
                username: format!("bare-{number}"),
                groups: vec![FIFTY.to_owned()],
                ..Requester::default()
            });
            let started = Instant::now();
            let answer = access::ask(&reviewer, &who, &namespace(0).as_str().into(), &need).await?;
            bare.push(started.elapsed());
            ensure!(answer.met, "the rights are lacking");
        }
        bare.sort_unstable();
        let found = webhook::measure(self.plane, self.release, &operator, (1, REQUESTS), Asking::Anew).await?;
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        println!("admission with 50 rights that nobody remembers, one request at a time: p50, p99 in ms");
        println!("  webhook (51 reviews)          {:7.2} {:7.2}", milliseconds(found.p50), milliseconds(found.p99));
        let at = |share: usize| milliseconds(bare[(bare.len() - 1) * share / 100]);
        println!("  the 50 reviews alone, at once {:7.2} {:7.2}", at(50), at(99));
        operator.terminate().await?;
        Ok(())
    }

    async fn run(&self, n: usize) -> Result<Row> {
        // Nobody leads: the operator answers admission and writes nothing.
        self.lease(Some("nobody")).await?;
        let operator = Operator::start(self.plane, self.release, Options::default()).await?;
        operator.wait_ready().await?;

        eprintln!("{n} keys: bare client, applying and writing");
        let started = Instant::now();
        self.each(n, async |team, name| {
            let key = self.apply(team, name).await?;
            self.write(team, key).await
        })
        .await?;
        let bare_live = started.elapsed();
        self.clear().await?;

        eprintln!("{n} keys: bare client, writing for keys that are there");
        let keys = self.each(n, async |team, name| Ok((team, self.apply(team, name).await?))).await?;
        let started = Instant::now();
        stream::iter(keys)
            .map(|(team, key)| self.write(team, key))
            .buffer_unordered(CONCURRENCY)
            .try_collect::<Vec<_>>()
            .await?;
        let bare_backlog = started.elapsed();
        self.clear().await?;

        eprintln!("{n} keys: operator, keys that are there");
        self.each(n, async |team, name| self.apply(team, name).await).await?;
        let before = self.writes().await?;
        self.lease(None).await?;
        let led = |text: &str| text.contains("keywright_leader 1");
        wait_for(&operator, led).await?;
        let started = Instant::now();
        wait_for(&operator, |text| active(text) == n).await?;
        let backlog = started.elapsed();
        // Events come after the keys, at their own pace.
        wait_for(&operator, |text| metric(text, "keywright_events_total{outcome=\"Success\"}") >= n as f64).await?;
        let writes = self.writes().await?.into_iter().map(|(what, count)| {
            let before = before.get(&what).copied().unwrap_or(0);
            (what, count - before)
        });
        let writes = writes.filter(|(what, count)| *count > n as u64 / 2 || what.contains("secrets")).collect();
        let (memory, peak) = (operator.memory()?, operator.peak_memory()?);
        let webhook = webhook::measure(self.plane, self.release, &operator, (50, 20_000), Asking::Again).await?;
        self.clear().await?;
        wait_for(&operator, |text| active(text) == 0).await?;

        eprintln!("{n} keys: operator, applying");
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

    /// What the operator asks the API server when nothing happens.
    async fn idle(&self, n: usize) -> Result<()> {
        const SPAN: Duration = Duration::from_mins(1);
        /// Keys that are made together are looked at again after four fifths to a whole interval.
        const MEAN_INTERVAL: f64 = 0.9 * 6.0 * 3600.0;

        eprintln!("{n} keys: requests at rest");
        let measure = async |proxy: &Proxy| {
            // Until what has to do with the start is over.
            tokio::time::sleep(Duration::from_secs(45)).await;
            let from = Instant::now();
            tokio::time::sleep(SPAN).await;
            let requests = proxy.requests().into_iter().filter(|request| request.at >= from);
            let (reads, others): (Vec<_>, Vec<_>) = requests.partition(|request| request.path.contains("/secrets/"));
            let of_keys = reads.iter().filter(|request| !request.path.contains(NAMESPACE)).count();
            let second = |count: usize| count as f64 / SPAN.as_secs_f64();
            (second(of_keys), second(reads.len() - of_keys + others.len()))
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
        // The first ten minutes of a leader are what the interval of ten minutes was for ever.
        let proxy = Proxy::start(self.plane)?;
        let operator = start(&proxy, &["--secret-check-interval=10m"]).await?;
        let (before, others_before) = measure(&proxy).await;
        operator.terminate().await?;
        self.clear().await?;
        println!("requests a second at rest, {n} keys, one replica: looks at Secrets of keys + all others");
        println!("  interval 10m, and the first ten minutes of a leader {before:7.2} + {others_before:.2}");
        println!("  interval 6h, measured in the first two minutes      {reads:7.2} + {others:.2}");
        println!("  interval 6h, in the mean                            {planned:7.2} + {others:.2}");
        Ok(())
    }

    /// Does something for each of n keys, as many at a time as the operator.
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

    /// What the operator writes for a new key.
    async fn write(&self, team: usize, key: ApiKey) -> Result<()> {
        let now = Timestamp::from_second(key.creation_timestamp().context("a time")?.0.as_second())?;
        let verdict = validate::check(&key.spec, &self.catalog);
        let unread = Observed::NotRead;
        let world = World { key: &key, verdict: &verdict, rival: None, secret: &unread, settings: None, now };
        let Step::Mint(draft) = lifecycle::step(&world) else { anyhow::bail!("a key that needs no Secret") };
        let value = Key::mint(key.spec.key_type, &mut SysRng)?;
        let record = draft.seal(&key, value.digest(), now);
        let place = status::secret_ref(&key);
        let owner = key.controller_owner_ref(&()).context("an owner")?;
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(place.name),
                owner_references: Some(vec![owner]),
                labels: Some([("app.kubernetes.io/managed-by".to_owned(), "keywright".to_owned())].into()),
                annotations: Some([(record::ANNOTATION.to_owned(), serde_json::to_string(&record)?)].into()),
                ..ObjectMeta::default()
            },
            type_: Some(record::SECRET_TYPE.to_owned()),
            data: Some([(place.key, ByteString(value.expose().as_bytes().to_vec()))].into()),
            ..Secret::default()
        };
        let secrets: Api<Secret> = Api::namespaced(self.bare.clone(), &namespace(team));
        secrets.create(&PostParams::default(), &secret).await?;
        let written = Some(record.clone());
        let version = String::new();
        let held =
            Observed::Ours(Held { version, record, written, mac: None, intact: true, owned: true, in_order: true });
        let facts = Facts {
            key: &key,
            verdict: &verdict,
            rival: None,
            secret: &held,
            settings: None,
            policy: None,
            import: None,
            failure: None,
            now,
        };
        let patch = Patch::Merge(json!({"status": status::build(&facts)}));
        let keys: Api<ApiKey> = Api::namespaced(self.bare.clone(), &namespace(team));
        keys.patch_status(&key.name_any(), &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Lets somebody hold the Lease for a long time, or nobody.
    async fn lease(&self, holder: Option<&str>) -> Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.admin.clone(), NAMESPACE);
        let duration = if holder.is_some() { 36_000 } else { 1 };
        let spec = json!({"spec": {"holderIdentity": holder, "leaseDurationSeconds": duration}});
        leases.patch("keywright-operator", &PatchParams::default(), &Patch::Merge(spec)).await?;
        Ok(())
    }

    /// Deletes all keys and Secrets, and waits until they are gone.
    async fn clear(&self) -> Result<()> {
        for team in 0..NAMESPACES {
            let secrets: Api<Secret> = Api::namespaced(self.admin.clone(), &namespace(team));
            secrets.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
            let keys: Api<ApiKey> = Api::namespaced(self.admin.clone(), &namespace(team));
            keys.delete_collection(&DeleteParams::background(), &ListParams::default()).await?;
            retry("the keys are gone", support::PATIENCE, async || {
                ensure!(keys.list(&ListParams::default().limit(1)).await?.items.is_empty(), "some are left");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// The write requests that the apiserver has served, by verb and resource.
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

/// Looks at the operator's metrics, ten times a second, until they show something.
async fn wait_for(operator: &Operator, shown: impl Fn(&str) -> bool) -> Result<()> {
    retry("the metrics show it", Duration::from_mins(10), async || {
        ensure!(shown(&operator.metrics().await?), "not yet");
        Ok(())
    })
    .await
}

fn print(rows: &[Row]) {
    let seconds = |d: Duration| format!("{:.1} s", d.as_secs_f64());
    let ratio = |a: Duration, b: Duration| format!("{:.2}", a.as_secs_f64() / b.as_secs_f64());
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1024.0 / 1024.0);
    let line = |what: &str, cell: &dyn Fn(&Row) -> String| {
        println!(
            "| {what:<62} |{}",
            rows.iter().map(|row| format!(" {:>12} |", cell(row))).collect::<Vec<_>>().concat()
        );
    };
    line("keys", &|r| r.keys.to_string());
    println!("| {:-<62} |{}", "", rows.iter().map(|_| format!("{:->13}:|", "")).collect::<Vec<_>>().concat());
    line("bare client, keys that are there: Secret + status", &|r| seconds(r.bare_backlog));
    line("operator, keys that are there: until all are Ready", &|r| seconds(r.backlog));
    line("ratio (at most 1.5)", &|r| ratio(r.backlog, r.bare_backlog));
    line("bare client, apply + Secret + status", &|r| seconds(r.bare_live));
    line("operator, apply until all are Ready", &|r| seconds(r.live));
    line("ratio (at most 1.5)", &|r| ratio(r.live, r.bare_live));
    line("write requests a key (at most 3)", &|r| {
        format!("{:.2}", r.writes.values().sum::<u64>() as f64 / r.keys as f64)
    });
    line("operator, resident memory with these keys (at most 60 MB)", &|r| mib(r.memory));
    line("operator, most memory ever", &|r| mib(r.peak));
    line("webhook, 50 at a time: p50", &|r| format!("{:.2} ms", r.webhook.p50.as_secs_f64() * 1e3));
    line("webhook, 50 at a time: p99 (at most 10 ms)", &|r| format!("{:.2} ms", r.webhook.p99.as_secs_f64() * 1e3));
    line("webhook, 50 at a time: requests a second", &|r| format!("{:.0}", r.webhook.per_second));
    for row in rows {
        println!("writes for {} keys: {:?}", row.keys, row.writes);
    }
}
