//! A real control plane: etcd, kube-apiserver and kube-controller-manager. It has no nodes, so no pods run; RBAC,
//! admission, CRDs, garbage collection, namespaces and service accounts are real.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::{Client, ResourceExt};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::guardian::Guardian;
use super::tools::Tools;
use super::{TIMEOUT, free_port, retry, serial, target};

/// A running control plane. Its processes end and its folder is removed when it is dropped or when this process ends.
pub struct ControlPlane {
    folder: PathBuf,
    url: String,
    etcd: String,
    ca: String,
    tools: Tools,
    controller_manager: Mutex<Child>,
    pub(super) guardian: Guardian,
}

impl ControlPlane {
    /// Starts a control plane of the tool set `kubernetes-{version}`, in a new folder.
    pub async fn start(version: &str) -> Result<Self> {
        let folder = target()?.join("control-planes").join(format!("{}-{}", std::process::id(), serial()));
        Self::start_in(&folder, version).await
    }

    /// Starts a control plane in `folder`, which must not exist. The folder is removed when the control plane ends.
    pub async fn start_in(folder: &Path, version: &str) -> Result<Self> {
        Self::start_with(folder, version, &[]).await
    }

    /// Starts a control plane whose apiserver presents the client certificate `certificate` with `key` (both PEM) to
    /// webhooks on `port`, with the configuration from docs/operations.md ("By a client certificate").
    pub async fn start_with_webhook_client(port: u16, certificate: &str, key: &str) -> Result<Self> {
        let folder = target()?.join("control-planes").join(format!("{}-{}", std::process::id(), serial()));
        let admission = folder.with_extension("admission");
        std::fs::create_dir_all(&admission)?;
        let write = |name: &str, text: &str| std::fs::write(admission.join(name), text);
        write("client.crt", certificate)?;
        write("client.key", key)?;
        let manual = std::fs::read_to_string(super::repository().join("docs/operations.md"))?;
        for (name, begin) in [("config.yaml", "# config.yaml"), ("kubeconfig", "# kubeconfig")] {
            let text = manual.split_once(begin).and_then(|(_, rest)| rest.split_once("```"));
            let text = text.with_context(|| format!("docs/operations.md has no example {name}"))?.0;
            let text = text.replace(":9443", &format!(":{port}"));
            write(name, &format!("#{}", text.replace("/etc/kubernetes/admission", &admission.to_string_lossy())))?;
        }
        let config = format!("--admission-control-config-file={}", admission.join("config.yaml").display());
        let plane = Self::start_with(&folder, &super::kubernetes_version(), &[&config]).await;
        // The apiserver has read it when it is ready.
        std::fs::remove_file(admission.join("config.yaml"))?;
        plane
    }

    async fn start_with(folder: &Path, version: &str, flags: &[&str]) -> Result<Self> {
        let tools = Tools::find(version)?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let guardian = Guardian::new(folder)?;
        let (port, etcd_port, peer_port) = (free_port()?, free_port()?, free_port()?);
        let url = format!("https://127.0.0.1:{port}");
        let ca = write_certificates(folder, &url)?;

        let (etcd, peer) = (format!("http://127.0.0.1:{etcd_port}"), format!("http://127.0.0.1:{peer_port}"));
        start(
            &guardian,
            folder,
            &tools.etcd,
            &[
                "--data-dir=etcd",
                &format!("--listen-client-urls={etcd}"),
                &format!("--advertise-client-urls={etcd}"),
                &format!("--listen-peer-urls={peer}"),
                &format!("--initial-advertise-peer-urls={peer}"),
                &format!("--initial-cluster=default={peer}"),
                // The data of a test need not survive a power loss.
                "--unsafe-no-fsync",
            ],
        )?;
        let mut apiserver = start(
            &guardian,
            folder,
            &tools.apiserver,
            &[
                flags,
                &[
                    &format!("--etcd-servers={etcd}"),
                    "--bind-address=127.0.0.1",
                    "--advertise-address=127.0.0.1",
                    &format!("--secure-port={port}"),
                    "--endpoint-reconciler-type=none",
                    "--service-cluster-ip-range=10.96.0.0/16",
                    "--tls-cert-file=apiserver.crt",
                    "--tls-private-key-file=apiserver.key",
                    "--client-ca-file=ca.crt",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    "--service-account-key-file=service-accounts.pub",
                    "--service-account-signing-key-file=service-accounts.key",
                    "--authorization-mode=RBAC",
                    // OpenShift enables this plugin, which is off by default: setting blockOwnerDeletion requires the
                    // right to set finalizers of the owner.
                    "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
                    "--cert-dir=apiserver",
                ],
            ]
            .concat(),
        )?;

        let client = client(&folder.join("kubeconfig")).await?;
        let ready = retry("kube-apiserver is ready", TIMEOUT, async || {
            if let Some(status) = apiserver.try_wait()? {
                return Ok(Err(status));
            }
            client.request_text(hyper::Request::get("/readyz").body(vec![])?).await?;
            Ok(Ok(()))
        });
        match ready.await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => {
                bail!("kube-apiserver ended with {status}:\n{}", tail(&folder.join("kube-apiserver.log")))
            }
            Err(error) => return Err(error.context(tail(&folder.join("kube-apiserver.log")))),
        }
        let controller_manager = start_controller_manager(&guardian, folder, &tools)?;
        let plane = Self {
            folder: folder.to_owned(),
            url,
            etcd,
            ca,
            tools,
            controller_manager: Mutex::new(controller_manager),
            guardian,
        };
        plane.wait_for_controllers(&client).await?;
        Ok(plane)
    }

    /// Restarts kube-controller-manager. Its garbage collector discovers new kinds only every 30 seconds and at start,
    /// so a restart after the CRDs were installed saves each test this wait.
    pub async fn restart_controller_manager(&self) -> Result<()> {
        {
            let mut running = self.controller_manager.lock().unwrap();
            running.kill()?;
            running.wait()?;
            *running = start_controller_manager(&self.guardian, &self.folder, &self.tools)?;
        }
        self.wait_for_controllers(&self.client().await?).await
    }

    /// Waits until an object without owner is collected: then the garbage collector has discovered all kinds.
    async fn wait_for_controllers(&self, client: &Client) -> Result<()> {
        let log = || tail(&self.folder.join("kube-controller-manager.log"));
        let configs: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "ConfigMap".to_owned(),
            name: "missing-owner".to_owned(),
            uid: "00000000-0000-0000-0000-000000000000".to_owned(),
            ..OwnerReference::default()
        };
        let metadata = ObjectMeta {
            generate_name: Some("garbage-".to_owned()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        };
        let garbage = ConfigMap { metadata, ..ConfigMap::default() };
        let garbage = configs.create(&PostParams::default(), &garbage).await?.name_any();
        let collected = retry("garbage is collected", TIMEOUT, async || {
            ensure!(configs.get_opt(&garbage).await?.is_none(), "ConfigMap {garbage} still exists");
            Ok(())
        });
        collected.await.with_context(log)
    }

    /// The folder with data, certificates and logs. It is removed with the control plane.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The URL of the apiserver, `https://127.0.0.1:...`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The URL of etcd, `http://127.0.0.1:...`, for tests that write more objects than an apiserver can in the time.
    pub fn etcd(&self) -> &str {
        &self.etcd
    }

    /// The certificate of the CA that issued the apiserver's certificate, in PEM.
    pub fn ca(&self) -> &str {
        &self.ca
    }

    /// The administrator's kubeconfig: group `system:masters`, which bypasses RBAC.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// A new administrator's client for the current runtime.
    pub async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig()).await
    }

    /// A new client that impersonates `user` in `groups` and `system:authenticated`.
    pub async fn client_as(&self, user: &str, groups: &[&str]) -> Result<Client> {
        let mut config = config(&self.kubeconfig()).await?;
        let authenticated = ["system:authenticated"];
        config.auth_info.impersonate = Some(user.to_owned());
        config.auth_info.impersonate_groups =
            Some(groups.iter().chain(&authenticated).map(ToString::to_string).collect());
        Ok(Client::try_from(config)?)
    }

    /// A kubectl command with the administrator's kubeconfig.
    pub fn kubectl(&self) -> Command {
        let mut kubectl = Command::new(&self.tools.kubectl);
        kubectl.env("KUBECONFIG", self.kubeconfig()).env("KUBECACHEDIR", self.folder.join("kubectl"));
        // The developer's kuberc must not affect tests.
        kubectl.env("KUBERC", "off");
        kubectl
    }

    /// A helm command with the administrator's kubeconfig.
    pub fn helm(&self) -> Command {
        let mut helm = Command::new(&self.tools.helm);
        helm.env("KUBECONFIG", self.kubeconfig());
        for (name, folder) in [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            helm.env(name, self.folder.join("helm").join(folder));
        }
        helm
    }

    /// Requests a token of a service account, valid for 24 hours.
    pub async fn token_for(&self, namespace: &str, account: &str) -> Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let spec = TokenRequestSpec { expiration_seconds: Some(24 * 60 * 60), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| format!("no token for {namespace}/{account}"))?;
        Ok(answer.status.context("the token request has no status")?.token)
    }

    /// Writes a kubeconfig with a token of a service account, and returns its path. `server` replaces the URL of the
    /// apiserver, for instance by that of a [`super::Proxy`].
    pub async fn kubeconfig_for_service_account(
        &self,
        namespace: &str,
        account: &str,
        server: Option<&str>,
    ) -> Result<PathBuf> {
        let token = self.token_for(namespace, account).await?;
        let path = self.folder.join(format!("{namespace}.{account}.{}.kubeconfig", serial()));
        write_kubeconfig(&path, server.unwrap_or(&self.url), &format!("{{token: {token}}}"))?;
        Ok(path)
    }
}

/// Runs `command` and returns its standard output. If it fails, the error contains its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        let (status, errors) = (output.status, String::from_utf8_lossy(&output.stderr));
        bail!("{} {}: {status}\n{errors}", Path::new(command.get_program()).display(), arguments(command));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn arguments(command: &Command) -> String {
    command.get_args().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The last 20 lines of a log, for error messages.
pub(super) fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("the end of {}:\n{}", log.display(), lines[lines.len().saturating_sub(20)..].join("\n"))
}

/// Starts a component of the control plane in `folder`; its output is appended to a log file there.
fn start(guardian: &Guardian, folder: &Path, program: &Path, arguments: &[&str]) -> Result<Child> {
    let name = program.file_name().context("a program without a name")?.to_string_lossy();
    let log = File::options().create(true).append(true).open(folder.join(format!("{name}.log")))?;
    let mut command = Guardian::command(program);
    command.args(arguments).current_dir(folder).stdout(log.try_clone()?).stderr(log);
    guardian.spawn(&mut command).with_context(|| format!("cannot start {name}"))
}

fn start_controller_manager(guardian: &Guardian, folder: &Path, tools: &Tools) -> Result<Child> {
    start(
        guardian,
        folder,
        &tools.controller_manager,
        &[
            "--kubeconfig=controller-manager.kubeconfig",
            "--use-service-account-credentials",
            "--service-account-private-key-file=service-accounts.key",
            "--root-ca-file=ca.crt",
            "--leader-elect=false",
            // No test uses its endpoints.
            "--secure-port=0",
        ],
    )
}

async fn config(kubeconfig: &Path) -> Result<Config> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    Ok(Client::try_from(config(kubeconfig).await?)?)
}

/// Writes the keys, certificates and kubeconfigs of the control plane; returns the CA certificate in PEM.
fn write_certificates(folder: &Path, url: &str) -> Result<String> {
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text);

    let mut params = CertificateParams::new([])?;
    params.distinguished_name.push(DnType::CommonName, "test-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    write("ca.crt", ca.pem())?;

    let issue = |file: &str, user: &str, group: Option<&str>, names: &[&str]| -> Result<()> {
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        write(&format!("{file}.crt"), params.signed_by(&key, &ca)?.pem())?;
        write(&format!("{file}.key"), key.serialize_pem())?;
        Ok(())
    };
    issue("apiserver", "kube-apiserver", None, &["localhost", "127.0.0.1", "kubernetes.default.svc"])?;
    issue("admin", "admin", Some("system:masters"), &[])?;
    issue("controller-manager", "system:kube-controller-manager", None, &[])?;
    for (kubeconfig, user) in [("kubeconfig", "admin"), ("controller-manager.kubeconfig", "controller-manager")] {
        let credentials =
            format!("{{client-certificate: '{0}/{user}.crt', client-key: '{0}/{user}.key'}}", folder.display());
        write_kubeconfig(&folder.join(kubeconfig), url, &credentials)?;
    }

    let accounts = KeyPair::generate()?;
    write("service-accounts.key", accounts.serialize_pem())?;
    write("service-accounts.pub", accounts.public_key_pem())?;
    Ok(ca.pem())
}

/// Writes a kubeconfig for `server` that trusts the `ca.crt` in the same folder.
fn write_kubeconfig(path: &Path, server: &str, user: &str) -> Result<()> {
    let ca = path.with_file_name("ca.crt");
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: '{server}', certificate-authority: '{}'}}}}]
users: [{{name: test, user: {user}}}]
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
current-context: test
",
        ca.display()
    );
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
