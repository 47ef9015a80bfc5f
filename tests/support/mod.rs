//! Shared code of the integration tests: a real control plane, the chart, the real binaries. Nothing is mocked.
//!
//! - [`control_plane`]: etcd, kube-apiserver and kube-controller-manager on free ports of the loopback address
//! - [`exclusive`]: a control plane for one test at a time, with or without its only operator
//! - [`operator`]: the chart, installed with helm, and the operator, run as its Deployment says
//! - [`proxy`]: a proxy between an operator and the apiserver that records requests and injects faults
//! - [`keys`]: the versions of ApiKeys and Secrets as an administrator's watch receives them
//! - [`verifier`]: the verifier, run as its Deployment says
//! - [`gateways`]: real proxies with the configuration of the examples, and an upstream application
//! - [`collector`]: an OpenTelemetry Collector
//! - [`process`]: other processes of a test
//! - [`guardian`]: ends all these processes, also after the test was killed

// Each test binary compiles this module and uses a part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]
// Environment variables select the Kubernetes version and the folder of its binaries.
#![allow(clippy::disallowed_methods)]

pub mod collector;
pub mod control_plane;
pub mod exclusive;
pub mod gateways;
pub mod guardian;
pub mod keys;
pub mod operator;
pub mod process;
pub mod proxy;
pub mod tools;
pub mod verifier;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::OnceCell;

pub use control_plane::{ControlPlane, output};
pub use operator::{Operator, Options, Release};
pub use proxy::{Fault, Proxy};

/// The time-out of an asynchronous effect, unless a test sets another one. It is long because CI machines are slow.
pub const TIMEOUT: Duration = Duration::from_mins(1);

/// A control plane with the chart installed and one operator running.
pub struct Shared {
    pub plane: &'static ControlPlane,
    pub release: Release,
    pub operator: Operator,
}

impl Shared {
    /// A new administrator's client. A client works only in the runtime that created it, and each `#[tokio::test]` has
    /// its own runtime.
    pub async fn client(&self) -> Client {
        self.plane.client().await.expect("a client")
    }
}

/// Values that a suite has once, by the name of the suite. The suites of one process do not share a control plane.
struct PerSuite<T: 'static>(Mutex<BTreeMap<String, &'static OnceCell<T>>>);

impl<T> PerSuite<T> {
    const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// The cell of the suite of the current test, which runs on a thread of its name: `lifecycle::keys::...`.
    fn cell(&self) -> &'static OnceCell<T> {
        let thread = std::thread::current();
        let suite = thread.name().and_then(|name| name.split("::").next()).unwrap_or_default().to_owned();
        self.0.lock().unwrap().entry(suite).or_insert_with(|| Box::leak(Box::default()))
    }
}

/// The control plane of this suite, without the chart. The first call starts it.
pub async fn plane() -> &'static ControlPlane {
    static PLANE: PerSuite<Result<ControlPlane>> = PerSuite::new();
    let plane = PLANE.cell().get_or_init(async || ControlPlane::start(&kubernetes_version()).await).await;
    plane.as_ref().unwrap_or_else(|error| panic!("no control plane: {error:#}"))
}

/// The control plane of this suite, with chart and operator. The first call starts it.
pub async fn shared() -> &'static Shared {
    static SHARED: PerSuite<Result<Shared>> = PerSuite::new();
    let start = async || {
        let plane = plane().await;
        let (release, operator) = install(plane).await?;
        Ok(Shared { plane, release, operator })
    };
    let shared = SHARED.cell().get_or_init(start).await;
    shared.as_ref().unwrap_or_else(|error| panic!("no operator: {error:#}"))
}

/// Installs the chart, starts one operator, and waits until the chart's catalog is accepted.
pub async fn install(plane: &ControlPlane) -> Result<(Release, Operator)> {
    let release = Release::install(plane, &[]).await?;
    let operator = Operator::start(plane, &release, Options::default()).await?;
    operator.wait_ready().await?;
    let accepted = wait_for_catalog(plane, TIMEOUT).await;
    accepted.with_context(|| format!("the operator's log:\n{}", operator.log()))?;
    Ok((release, operator))
}

/// Waits until the catalog of the chart, which the operator installs, is accepted.
pub async fn wait_for_catalog(plane: &ControlPlane, timeout: Duration) -> Result<()> {
    let wait = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=5s"];
    retry("the catalog is accepted", timeout, async || output(plane.kubectl().args(wait))).await.map(drop)
}

/// The Kubernetes version that `KEYWRIGHT_TEST_KUBERNETES` names (tool set `tests/tools/kubernetes-...`); by default
/// the newest supported one.
pub fn kubernetes_version() -> String {
    std::env::var("KEYWRIGHT_TEST_KUBERNETES").unwrap_or_else(|_| "1.37".to_owned())
}

/// Creates a namespace with a generated name, so that tests that share a control plane do not affect each other.
pub async fn namespace(client: &Client) -> String {
    let metadata = ObjectMeta { generate_name: Some("team-".to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    let namespace = Api::all(client.clone()).create(&PostParams::default(), &namespace).await.expect("a namespace");
    namespace.metadata.name.expect("its name")
}

/// Calls `probe` until it succeeds; panics with its last error after `timeout`.
pub async fn eventually<T>(goal: &str, timeout: Duration, probe: impl AsyncFnMut() -> Result<T>) -> T {
    retry(goal, timeout, probe).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Calls `probe` until it succeeds; returns its last error after `timeout`.
pub async fn retry<T>(goal: &str, timeout: Duration, mut probe: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    let mut last = anyhow!("the probe has not returned");
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match tokio::time::timeout(left, probe()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(last.context(format!("{goal}: not reached within {timeout:?}")))
}

/// Returns a number that is unique in this process, for file names.
fn serial() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns a port that is free on all addresses. It is below the kernel's range for outgoing connections, so that it
/// stays free while an operator restarts.
pub fn free_port() -> Result<u16> {
    for _ in 0..100 {
        let port = 10_000 + u16::try_from(RandomState::new().hash_one(()) % 22_000)?;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port");
}

/// Cargo's target folder: the folder above this binary with Cargo's file `.rustc_info.json`.
pub fn target() -> Result<PathBuf> {
    let binary = std::env::current_exe()?;
    let target = binary.ancestors().find(|folder| folder.join(".rustc_info.json").exists());
    Ok(target.context("this binary is not in Cargo's target folder")?.to_owned())
}

/// The time `seconds` from now, in RFC 3339 with whole seconds, as Kubernetes stores times.
pub fn from_now(seconds: i64) -> String {
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
    (now + SignedDuration::from_secs(seconds)).to_string()
}

/// The root folder of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
