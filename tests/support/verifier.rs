//! The verifier's real binary, as the chart's Deployment would run it.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::Api;

use super::operator::{NAMESPACE, binary, listen};
use super::process::{Process, local, memory};
use super::{ControlPlane, PATIENCE, free_port, retry};

pub use super::gateways::{Answer, send};

/// What is different from how the Deployment would run it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The address of a [`super::Proxy`], if it is not to talk to the apiserver directly.
    pub server: Option<String>,
    /// A folder with `tls.crt` and `tls.key`; without one it serves plain HTTP.
    pub tls: Option<PathBuf>,
    /// Arguments, as `--name=value`, in place of those of the same name in the Deployment, or after them.
    pub args: Vec<String>,
}

/// A running verifier. Dropping it kills it.
pub struct Verifier {
    process: Process,
    address: SocketAddr,
    health: SocketAddr,
}

impl Verifier {
    /// Runs the binary with exactly the arguments of the Deployment `keywright-verifier`, as its service account: an
    /// argument that the binary does not know, or a right that the chart forgot, fails the test. Only addresses and
    /// certificates are other ones, and what `options` adds. It listens when this returns, and may not be ready yet.
    pub async fn start(plane: &ControlPlane, options: Options) -> Result<Self> {
        let deployments: Api<Deployment> = Api::namespaced(plane.client().await?, NAMESPACE);
        let deployment = deployments.get("keywright-verifier").await.context("the Deployment")?;
        let pod = deployment.spec.and_then(|spec| spec.template.spec).context("a Deployment without a pod")?;
        let container = pod.containers.iter().find(|container| container.name == "verifier");
        let container = container.context("no container named verifier in the Deployment")?;
        let account = pod.service_account_name.as_deref().unwrap_or("default");

        let (address, health) = (local(free_port()?), local(free_port()?));
        let mut args = container.args.clone().unwrap_or_default();
        listen(&mut args, "--address=", &address.to_string())?;
        listen(&mut args, "--health-address=", &health.to_string())?;
        match &options.tls {
            Some(folder) => listen(&mut args, "--tls-dir=", &folder.to_string_lossy())?,
            None => args.retain(|arg| !arg.starts_with("--tls-dir=")),
        }
        let names: Vec<&str> = options.args.iter().map(|arg| arg.split_inclusive('=').next().unwrap_or(arg)).collect();
        args.retain(|arg| !names.iter().any(|name| arg.starts_with(name)));
        args.extend(options.args.iter().cloned());

        let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, account, options.server.as_deref()).await?;
        let environment = [("KUBECONFIG", kubeconfig.as_path())];
        let process = Process::start(plane, &binary()?, plane.folder(), &args, &environment)?;
        process.wait_for(address).await.context("the verifier")?;
        Ok(Self { process, address, health })
    }

    /// Waits until it knows all keys.
    pub async fn wait_ready(&self) -> Result<()> {
        let ready = retry("the verifier is ready", PATIENCE, async || self.get("/readyz").await);
        ready.await.map(drop).with_context(|| self.process.tail())
    }

    /// The answer of the health address to `path`; an error unless it is 200.
    pub async fn get(&self, path: &str) -> Result<String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\n\r\n");
        let answer = send(self.health, request.as_bytes()).await?;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.body);
        Ok(answer.body)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The memory that it occupies now, in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.process.id(), "VmRSS:")
    }

    /// Everything that it has written.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Kills it.
    pub fn kill(&self) {
        self.process.kill();
    }
}
