//! A server under load, as a process of its own: its CPU and its memory are what the kernel says.

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
    /// The verifier with the account that the chart gives it; without TLS, and without telling the cluster of uses: the
    /// no-op server does neither.
    pub async fn verifier(plane: &ControlPlane) -> Result<Self> {
        Self::verifier_that_tells(plane, "0s").await
    }

    /// The same, and the cluster is told of uses so often.
    pub async fn verifier_that_tells(plane: &ControlPlane, interval: &str) -> Result<Self> {
        let (address, health) = (local()?, local()?);
        let log = std::fs::File::create(plane.folder().join("verifier.log"))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_keywright"));
        command.arg("verifier").arg(format!("--last-used-interval={interval}"));
        command.arg(format!("--address={address}")).arg(format!("--health-address={health}"));
        let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, "keywright-verifier", None).await?;
        command.env("KUBECONFIG", kubeconfig).stderr(log);
        Self::start(command, address, health).await
    }

    /// The server that decides nothing: this very program.
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
        retry("it listens", Duration::from_secs(10), async || {
            Ok(tokio::net::TcpStream::connect(&server.address).await.map(drop)?)
        })
        .await?;
        Ok(server)
    }

    /// What its health address says.
    pub async fn get(&self, path: &str) -> Result<String> {
        let response = self.client.get(format!("http://{}{path}", self.health).parse()?).await?;
        let status = response.status();
        let text = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
        ensure!(status.is_success(), "{path}: {status}: {text}");
        Ok(text)
    }

    /// The status code for a key.
    pub async fn check(&self, key: &str) -> Result<u16> {
        let request = hyper::Request::get(format!("http://{}/nginx/permission=none", self.address))
            .header("authorization", format!("Bearer {key}"))
            .body(Empty::new())?;
        let response = self.client.request(request).await?;
        let status = response.status().as_u16();
        response.into_body().collect().await?;
        Ok(status)
    }

    /// The CPU time that it has used until now.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(") ").context("stat")?.1.split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        // Linux counts in hundredths of a second.
        Ok(Duration::from_millis(ticks * 10))
    }

    /// The memory that it occupies now, in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.child.id(), "VmRSS:")
    }

    /// The most that it ever occupied.
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
