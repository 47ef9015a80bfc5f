//! What all integration tests share: a real control plane, the chart, the operator's real binary. Nothing is mocked.
//!
//! - [`control_plane`]: etcd, kube-apiserver and kube-controller-manager on free ports of the loopback address
//! - [`operator`]: the chart as users install it, and the operator as its Deployment would run it
//! - [`proxy`]: a place between an operator and the apiserver where requests are counted, and go wrong on demand
//! - [`keys`]: what an administrator sees of keys, from the first to the last version
//! - [`verifier`]: the verifier as its Deployment would run it
//! - [`gateways`]: real proxies as the examples configure them, and an application behind them
//! - [`process`]: whatever else a test starts
//! - [`guardian`]: ends all of it, also after a test that was killed

// Every test binary compiles this module for itself and uses its own part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]
// A test that cannot go on has to say so, and stop.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]
// Tests are told by the environment which Kubernetes to use, and where its binaries are.
#![allow(clippy::disallowed_methods)]

pub mod control_plane;
pub mod gateways;
pub mod guardian;
pub mod keys;
pub mod operator;
pub mod process;
pub mod proxy;
pub mod tools;
pub mod verifier;

use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
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

/// Anything here that is asynchronous is given this long, unless a test says otherwise: CI machines are slow.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A control plane with the chart installed and one operator running.
pub struct Shared {
    pub plane: &'static ControlPlane,
    pub release: Release,
    pub operator: Operator,
}

impl Shared {
    /// An administrator's client. Each `#[tokio::test]` has a runtime of its own, and a client dies with the runtime
    /// that made it: so every test takes a new one.
    pub async fn client(&self) -> Client {
        self.plane.client().await.expect("a client")
    }
}

/// The control plane of this test binary, without the chart; started by whichever test asks first.
pub async fn plane() -> &'static ControlPlane {
    static PLANE: OnceCell<Result<ControlPlane>> = OnceCell::const_new();
    let plane = PLANE.get_or_init(async || ControlPlane::start(&kubernetes_version()).await).await;
    plane.as_ref().unwrap_or_else(|error| panic!("no control plane: {error:#}"))
}

/// The control plane of this test binary with chart and operator; started by whichever test asks first.
pub async fn shared() -> &'static Shared {
    static SHARED: OnceCell<Result<Shared>> = OnceCell::const_new();
    let start = async || {
        let plane = plane().await;
        let (release, operator) = install(plane).await?;
        Ok(Shared { plane, release, operator })
    };
    let shared = SHARED.get_or_init(start).await;
    shared.as_ref().unwrap_or_else(|error| panic!("no operator: {error:#}"))
}

/// Installs the chart, runs one operator, and waits for the chart's catalogue.
pub async fn install(plane: &ControlPlane) -> Result<(Release, Operator)> {
    let release = Release::install(plane, &[]).await?;
    let operator = Operator::start(plane, &release, Options::default()).await?;
    operator.wait_ready().await?;
    let catalog = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=5s"];
    let accepted = retry("the catalogue is accepted", PATIENCE, async || output(plane.kubectl().args(catalog)));
    accepted.await.with_context(|| format!("the operator's log:\n{}", operator.log()))?;
    Ok((release, operator))
}

/// The tool set that `KEYWRIGHT_TEST_KUBERNETES` names (`tests/tools/kubernetes-...`), by default the newest supported.
pub fn kubernetes_version() -> String {
    std::env::var("KEYWRIGHT_TEST_KUBERNETES").unwrap_or_else(|_| "1.37".to_owned())
}

/// A fresh namespace whose name the apiserver makes up, so that tests that share a control plane do not meet.
pub async fn namespace(client: &Client) -> String {
    let metadata = ObjectMeta { generate_name: Some("team-".to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    let namespace = Api::all(client.clone()).create(&PostParams::default(), &namespace).await.expect("a namespace");
    namespace.metadata.name.expect("its name")
}

/// Asks `probe` until it succeeds; panics with its last answer after `timeout`.
pub async fn eventually<T>(what: &str, timeout: Duration, probe: impl AsyncFnMut() -> Result<T>) -> T {
    retry(what, timeout, probe).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Asks `probe` until it succeeds; returns its last answer after `timeout`.
pub async fn retry<T>(what: &str, timeout: Duration, mut probe: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    let mut last = anyhow!("no answer");
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match tokio::time::timeout(left, probe()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(last.context(format!("{what}: not so after {timeout:?}")))
}

/// A number that this process has not used yet, for names of files.
fn serial() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A port that is free on all addresses. It is below those that the kernel gives to outgoing connections, so that it
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

/// Cargo's target folder, above this binary: Cargo keeps this file in it, whoever made the folder.
pub fn target() -> Result<PathBuf> {
    let binary = std::env::current_exe()?;
    let target = binary.ancestors().find(|folder| folder.join(".rustc_info.json").exists());
    Ok(target.context("this binary is not in Cargo's target folder")?.to_owned())
}

/// So many seconds from now, as RFC 3339 with whole seconds, as Kubernetes keeps times.
pub fn from_now(seconds: i64) -> String {
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
    (now + SignedDuration::from_secs(seconds)).to_string()
}

/// The folder of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
