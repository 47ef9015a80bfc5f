//! The chart, installed with helm, and the operator's real binary, run as the chart's Deployment says.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, PodSpec, Service};
use kube::api::{Api, Patch, PatchParams};

use super::control_plane::{output, tail};
use super::guardian::Guardian;
use super::process::memory;
use super::{ControlPlane, TIMEOUT, free_port, repository, retry, serial};

/// The namespace that the chart is installed into.
pub const NAMESPACE: &str = "keywright-system";

/// An installed chart.
pub struct Release {
    webhook_port: u16,
}

impl Release {
    /// Installs the chart with helm; each of `values` is passed by `--set`.
    pub async fn install(plane: &ControlPlane, values: &[&str]) -> Result<Self> {
        Self::install_at(plane, free_port()?, values).await
    }

    /// Like [`Self::install`], with the webhook on `port`.
    pub async fn install_at(plane: &ControlPlane, port: u16, values: &[&str]) -> Result<Self> {
        let release = Self { webhook_port: port };
        let port = format!("webhook.port={port}");
        helm(plane, &[&[port.as_str()], values].concat())?;
        output(plane.kubectl().args(["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]))?;
        release.route_webhook(plane, 1).await?;
        plane.restart_controller_manager().await?;
        Ok(release)
    }

    /// A release that was installed without helm; routes the webhook to the operator with number `replica`.
    pub async fn adopt(plane: &ControlPlane, replica: u8) -> Result<Self> {
        let services: Api<Service> = Api::namespaced(plane.client().await?, NAMESPACE);
        let ports = services.get("keywright-webhook").await?.spec.and_then(|spec| spec.ports).unwrap_or_default();
        let release = Self { webhook_port: u16::try_from(ports.first().context("a Service without a port")?.port)? };
        release.route_webhook(plane, replica).await?;
        plane.restart_controller_manager().await?;
        Ok(release)
    }

    /// The address of an operator's webhook.
    pub fn webhook_address(&self, operator: &Operator) -> String {
        format!("{}:{}", address(operator.replica), self.webhook_port)
    }

    /// Upgrades the release with additional values.
    pub fn upgrade(plane: &ControlPlane, values: &[&str]) -> Result<()> {
        helm(plane, values)
    }

    /// Routes the webhook to the operator with number `replica`.
    ///
    /// Without kube-proxy, a Service's cluster IP is not reachable. For a Service of type ExternalName the apiserver
    /// connects to the external name, and still verifies the certificate for `keywright-webhook.{namespace}.svc`.
    pub async fn route_webhook(&self, plane: &ControlPlane, replica: u8) -> Result<()> {
        let services: Api<Service> = Api::namespaced(plane.client().await?, NAMESPACE);
        let external = serde_json::json!({"spec": {
            "type": "ExternalName", "externalName": address(replica), "clusterIP": null, "clusterIPs": null,
        }});
        services.patch("keywright-webhook", &PatchParams::default(), &Patch::Merge(external)).await?;
        Ok(())
    }
}

/// The differences from the Deployment of the operator.
#[derive(Clone, Debug)]
pub struct Options {
    /// The number of the replica. Replica N listens on 127.0.0.N, so that all replicas use the webhook port of the
    /// Service.
    pub replica: u8,
    /// The URL of a [`super::Proxy`] that the operator uses instead of the apiserver.
    pub server: Option<String>,
    /// Arguments `--name=value`. Each replaces the Deployment's argument of the same name, or is added.
    pub args: Vec<String>,
    /// Environment variables in addition to those of the Deployment.
    pub env: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { replica: 1, server: None, args: Vec::new(), env: Vec::new() }
    }
}

/// A running operator. Dropping it kills it.
pub struct Operator {
    child: Mutex<Child>,
    id: u32,
    replica: u8,
    health: String,
    log: PathBuf,
}

impl Operator {
    /// Runs the operator's binary with the arguments, the environment and the service account of the Deployment
    /// `keywright`, so that an unknown argument or a missing right in the chart fails the test. Only the listen
    /// addresses and the changes in `options` differ.
    pub async fn start(plane: &ControlPlane, release: &Release, options: Options) -> Result<Self> {
        let deployments: Api<Deployment> = Api::namespaced(plane.client().await?, NAMESPACE);
        let deployment = deployments.get("keywright").await.context("the Deployment")?;
        let pod = deployment.spec.and_then(|spec| spec.template.spec).context("a Deployment without a pod")?;
        let container = pod.containers.iter().find(|container| container.name == "operator");
        let container = container.context("no container named operator in the Deployment")?;
        let account = pod.service_account_name.as_deref().unwrap_or("default");

        let address = address(options.replica);
        let health = format!("{address}:{}", free_port()?);
        let webhook = format!("{address}:{}", release.webhook_port);
        let mut args = container.args.clone().unwrap_or_default();
        listen(&mut args, "--health-address=", &health)?;
        listen(&mut args, "--webhook-address=", &webhook)?;

        mount(plane, &pod, container, &mut args).await?;
        for arg in &options.args {
            let name = arg.split_inclusive('=').next().unwrap_or(arg);
            args.retain(|known| !known.starts_with(name));
            args.push(arg.clone());
        }

        let log = plane.folder().join(format!("operator-{}.log", serial()));
        let output = File::create(&log)?;
        let mut command = Guardian::command(&binary()?);
        command.args(args).current_dir("/").stdout(output.try_clone()?).stderr(output);
        command.env_clear();
        for variable in container.env.iter().flatten() {
            command.env(&variable.name, value(variable, options.replica)?);
        }
        let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, account, options.server.as_deref()).await?;
        command.env("KUBECONFIG", kubeconfig).envs(options.env);
        let child = plane.guardian.spawn(&mut command)?;
        Ok(Self {
            id: child.id(),
            replica: options.replica,
            child: Mutex::new(child),
            health: format!("http://{health}"),
            log,
        })
    }

    /// Waits until `/readyz` returns 200.
    pub async fn wait_ready(&self) -> Result<()> {
        let ready = retry("the operator is ready", TIMEOUT, async || {
            if let Some(status) = self.child.lock().unwrap().try_wait()? {
                return Ok(Err(status));
            }
            self.get("/readyz").await?;
            Ok(Ok(()))
        });
        match ready.await.with_context(|| tail(&self.log))? {
            Ok(()) => Ok(()),
            Err(status) => bail!("the operator ended with {status}; {}", tail(&self.log)),
        }
    }

    /// The text of `/metrics`.
    pub async fn metrics(&self) -> Result<String> {
        self.get("/metrics").await
    }

    /// The response of the health address to `GET path`; an error unless its status is 2xx.
    pub async fn get(&self, path: &str) -> Result<String> {
        let client = legacy::Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
        let response = client.get(format!("{}{path}", self.health).parse()?).await?;
        let status = response.status();
        let text = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
        ensure!(status.is_success(), "{path}: {status}: {text}");
        Ok(text)
    }

    /// The address of `/healthz`, `/readyz` and `/metrics`.
    pub fn health_address(&self) -> &str {
        self.health.trim_start_matches("http://")
    }

    /// Its standard output and standard error until now.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its resident memory, in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.id, "VmRSS:")
    }

    /// Its peak resident memory, in bytes.
    pub fn peak_memory(&self) -> Result<u64> {
        memory(self.id, "VmHWM:")
    }

    /// Sends SIGTERM, as the kubelet does when a pod is deleted, and waits up to 30 seconds until the process has
    /// ended.
    pub async fn terminate(&self) -> Result<ExitStatus> {
        self.send_sigterm()?;
        self.ended(Duration::from_secs(30)).await
    }

    /// Sends SIGTERM without waiting.
    pub fn send_sigterm(&self) -> Result<()> {
        output(Command::new("/bin/sh").args(["-c", "kill -s TERM $1", "kill", &self.id.to_string()]))?;
        Ok(())
    }

    /// Waits until the process has ended.
    pub async fn ended(&self, timeout: Duration) -> Result<ExitStatus> {
        retry("the operator ends", timeout, async || {
            self.child.lock().unwrap().try_wait()?.context("the operator still runs")
        })
        .await
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.kill();
    }
}

fn helm(plane: &ControlPlane, values: &[&str]) -> Result<()> {
    let mut helm = plane.helm();
    helm.args(["upgrade", "--install", "keywright"]).arg(repository().join("charts/keywright"));
    helm.args(["--namespace", NAMESPACE, "--create-namespace", "--reset-then-reuse-values"]);
    output(helm.args(values.iter().flat_map(|value| ["--set", value])))?;
    Ok(())
}

fn address(replica: u8) -> String {
    format!("127.0.0.{replica}")
}

/// Replaces the value of the argument that begins with `flag`.
pub(super) fn listen(args: &mut [String], flag: &str, value: &str) -> Result<()> {
    let arg = args.iter_mut().find(|arg| arg.starts_with(flag));
    *arg.with_context(|| format!("the Deployment has no argument {flag}"))? = format!("{flag}{value}");
    Ok(())
}

/// Writes the ConfigMaps of the volumes into folders, as the kubelet mounts them, and replaces the mount paths in the
/// arguments.
async fn mount(plane: &ControlPlane, pod: &PodSpec, container: &Container, args: &mut [String]) -> Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(plane.client().await?, NAMESPACE);
    for mount in container.volume_mounts.iter().flatten() {
        let volume = pod
            .volumes
            .iter()
            .flatten()
            .find(|volume| volume.name == mount.name)
            .with_context(|| format!("no volume {}", mount.name))?;
        let Some(source) = &volume.config_map else { continue };
        let folder = plane.folder().join(format!("{}-{}", mount.name, serial()));
        std::fs::create_dir(&folder)?;
        for (file, text) in maps.get(&source.name).await?.data.unwrap_or_default() {
            std::fs::write(folder.join(file), text)?;
        }
        for arg in args.iter_mut() {
            *arg = arg.replace(&mount.mount_path, &folder.to_string_lossy());
        }
    }
    Ok(())
}

/// The value that the kubelet sets for a variable.
fn value(variable: &EnvVar, replica: u8) -> Result<String> {
    let Some(source) = &variable.value_from else { return Ok(variable.value.clone().unwrap_or_default()) };
    match source.field_ref.as_ref().map(|field| field.field_path.as_str()) {
        Some("metadata.name") => Ok(format!("keywright-{replica}")),
        Some("metadata.namespace") => Ok(NAMESPACE.to_owned()),
        Some("status.podIP") => Ok(address(replica)),
        _ => bail!("unsupported source of variable {}", variable.name),
    }
}

/// The path of the binary `keywright`: from Cargo's environment in tests; for examples, in the parent of their folder.
pub(super) fn binary() -> Result<PathBuf> {
    if let Some(path) = option_env!("CARGO_BIN_EXE_keywright") {
        return Ok(Path::new(path).to_owned());
    }
    let example = std::env::current_exe()?;
    let path = example.ancestors().nth(2).context("no folder above this binary")?.join("keywright");
    ensure!(path.exists(), "{} is missing: run `cargo build` first", path.display());
    Ok(path)
}
