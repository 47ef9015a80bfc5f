//! A server under load in a separate process. The kernel reports its CPU time and its memory.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

use crate::support::{ControlPlane, free_port, operator::NAMESPACE, process::memory, retry};

/// A running server. Dropping it kills it.
pub struct Server {
    child: Child,
    client: Client<HttpConnector, Empty<Bytes>>,
    pub address: String,
    health: String,
}

impl Server {
    /// Starts the verifier with the service account of the chart, without TLS and without reports of uses, like the
    /// no-op server.
    pub async fn verifier(plane: &ControlPlane) -> Result<Self> {
        Self::verifier_with_last_used_interval(plane, "0s").await
    }

    /// Like [`Self::verifier`], with `--last-used-interval`.
    pub async fn verifier_with_last_used_interval(plane: &ControlPlane, interval: &str) -> Result<Self> {
        let (address, health) = (local()?, local()?);
        let log = std::fs::File::create(plane.folder().join("verifier.log"))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_keywright"));
        command.arg("verifier").arg(format!("--last-used-interval={interval}"));
        command.arg(format!("--address={address}")).arg(format!("--health-address={health}"));
        let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, "keywright-verifier", None).await?;
        command.env("KUBECONFIG", kubeconfig).stderr(log);
        Self::start(command, address, health).await
    }

    /// Starts the no-op server, which is this program.
    pub async fn noop() -> Result<Self> {
        let address = local()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["noop", &address]);
        Self::start(command, address.clone(), address).await
    }

    async fn start(mut command: Command, address: String, health: String) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        let server = Self { child, client, address, health };
        retry("the server listens", Duration::from_secs(10), async || {
            Ok(tokio::net::TcpStream::connect(&server.address).await.map(drop)?)
        })
        .await?;
        Ok(server)
    }

    /// The response of the health address; an error unless its status is 2xx.
    pub async fn get(&self, path: &str) -> Result<String> {
        let response = self.client.get(format!("http://{}{path}", self.health).parse()?).await?;
        let status = response.status();
        let text = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
        ensure!(status.is_success(), "{path}: {status}: {text}");
        Ok(text)
    }

    /// The status code of a check of `key`.
    pub async fn check(&self, key: &str) -> Result<u16> {
        let request = hyper::Request::get(format!("http://{}/nginx/permission=none", self.address))
            .header("authorization", format!("Bearer {key}"))
            .body(Empty::new())?;
        let response = self.client.request(request).await?;
        let status = response.status().as_u16();
        response.into_body().collect().await?;
        Ok(status)
    }

    /// The CPU time that the process has used.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(") ").context("stat")?.1.split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        // The unit is 1/100 s (USER_HZ).
        Ok(Duration::from_millis(ticks * 10))
    }

    /// The resident memory, in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.child.id(), "VmRSS:")
    }

    /// The peak resident memory, in bytes.
    pub fn peak_memory(&self) -> Result<u64> {
        memory(self.child.id(), "VmHWM:")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn local() -> Result<String> {
    Ok(format!("127.0.0.1:{}", free_port()?))
}
