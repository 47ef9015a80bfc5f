//! A suite's control plane for one test at a time: for tests whose operators would compete for the lease.

use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use kube::Client;
use tokio::sync::{MutexGuard, OnceCell};

use super::keys::{free_lease, metric};
use super::{ControlPlane, Operator, Options, PerSuite, Proxy, Release, eventually, plane, wait_for_catalog};

/// The control plane of this suite with the chart and without an operator, locked for one test.
pub struct ExclusivePlane {
    pub plane: &'static ControlPlane,
    pub release: &'static Release,
    pub client: Client,
    _lock: MutexGuard<'static, ()>,
}

impl ExclusivePlane {
    pub async fn lock() -> Self {
        static LOCK: PerSuite<tokio::sync::Mutex<()>> = PerSuite::new();
        static RELEASE: PerSuite<Release> = PerSuite::new();
        let lock = LOCK.cell().get_or_init(async || tokio::sync::Mutex::new(())).await.lock().await;
        let plane = plane().await;
        let install = async || Release::install(plane, &[]).await.expect("the chart");
        let release = RELEASE.cell().get_or_init(install).await;
        Self { plane, release, client: plane.client().await.expect("a client"), _lock: lock }
    }
}

/// The only operator of a locked control plane, behind a proxy.
pub struct SoleOperator {
    plane: ExclusivePlane,
    pub proxy: Proxy,
    /// Arguments of the operator after those of the chart.
    pub args: Vec<String>,
    running: Arc<Mutex<Option<Arc<Operator>>>>,
}

impl Deref for SoleOperator {
    type Target = ExclusivePlane;

    fn deref(&self) -> &ExclusivePlane {
        &self.plane
    }
}

/// Longer than [`super::TIMEOUT`], because faults cause backoff.
const TIMEOUT: Duration = Duration::from_mins(2);

impl SoleOperator {
    /// Locks the control plane. The operator is not started.
    pub async fn lock(args: impl IntoIterator<Item = &str>) -> Self {
        let plane = ExclusivePlane::lock().await;
        let proxy = Proxy::start(plane.plane).expect("a proxy");
        Self { plane, proxy, args: args.into_iter().map(str::to_owned).collect(), running: Arc::default() }
    }

    /// Starts the operator if it does not run, and waits until it leads and is ready.
    pub async fn ensure_leader(&self) {
        eventually("the operator leads", TIMEOUT, async || {
            let running = self.running.lock().unwrap().clone();
            let operator = match running {
                Some(operator) => operator,
                None => self.start(Some(self.proxy.url())).await?,
            };
            operator.get("/readyz").await?;
            ensure!(metric(&operator.metrics().await?, "keywright_leader") == Some(1.0), "the operator does not lead");
            Ok(())
        })
        .await;
    }

    /// Waits until the catalog, which the first operator installs, is accepted. Without it, no key is admitted.
    pub async fn wait_for_catalog(&self) {
        wait_for_catalog(self.plane.plane, TIMEOUT).await.unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Frees the lease and starts the operator.
    pub async fn start(&self, server: Option<&str>) -> Result<Arc<Operator>> {
        free_lease(&self.client).await?;
        let options = Options { server: server.map(str::to_owned), args: self.args.clone(), ..Options::default() };
        let operator = Arc::new(Operator::start(self.plane.plane, self.release, options).await?);
        *self.running.lock().unwrap() = Some(Arc::clone(&operator));
        Ok(operator)
    }

    /// The running operator.
    pub fn operator(&self) -> Arc<Operator> {
        self.running.lock().unwrap().clone().expect("an operator")
    }

    /// A function that kills the operator.
    pub fn killer(&self) -> impl Fn() + Send + Sync + use<> {
        let running = Arc::clone(&self.running);
        move || {
            if let Some(operator) = running.lock().unwrap().take() {
                operator.kill();
            }
        }
    }
}
