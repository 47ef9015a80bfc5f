//! The verifier's real binary, run as the chart's Deployment says.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::Api;

use super::operator::{NAMESPACE, binary, listen};
use super::process::{Process, local, memory};
use super::{ControlPlane, TIMEOUT, free_port, retry};

pub use super::gateways::{Answer, send};

/// The differences from the Deployment of the verifier.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The URL of a [`super::Proxy`] that the verifier uses instead of the apiserver.
    pub server: Option<String>,
    /// A folder with `tls.crt` and `tls.key`. `None`: plain HTTP.
    pub tls: Option<PathBuf>,
    /// Arguments `--name=value`. Each replaces the Deployment's argument of the same name, or is added.
    pub args: Vec<String>,
}

/// A running verifier. Dropping it kills it.
pub struct Verifier {
    process: Process,
    address: SocketAddr,
    health: SocketAddr,
}

impl Verifier {
    /// Runs the binary with the arguments and the service account of the Deployment `keywright-verifier`, so that an
    /// unknown argument or a missing right in the chart fails the test. Only addresses, certificates and the changes in
    /// `options` differ. The verifier listens when this returns, but need not be ready.
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

    /// Waits until `/readyz` returns 200, that is, until the first complete list of keys is loaded.
    pub async fn wait_ready(&self) -> Result<()> {
        let ready = retry("the verifier is ready", TIMEOUT, async || self.get("/readyz").await);
        ready.await.map(drop).with_context(|| self.process.tail())
    }

    /// The body of the health address's response to `GET path`; an error unless the status is 200.
    pub async fn get(&self, path: &str) -> Result<String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\n\r\n");
        let answer = send(self.health, request.as_bytes()).await?;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.body);
        Ok(answer.body)
    }

    /// The address of its front ends.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its resident memory, in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.process.id(), "VmRSS:")
    }

    /// Its output until now.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) {
        self.process.kill();
    }
}
