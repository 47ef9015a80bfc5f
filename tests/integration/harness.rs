//! Tests of the harness: the control plane, the fault proxy, and the end of all processes with the test.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::control_plane::output;
use crate::support::guardian::{Guardian, start_time};
use crate::support::proxy::Record;
use crate::support::{Fault, Operator, Options, Proxy, TIMEOUT, eventually, namespace, plane};
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams, WatchParams};
use kube::config::KubeConfigOptions;

#[tokio::test]
async fn control_plane_has_the_requested_version() {
    let plane = plane().await;
    let version = plane.client().await.unwrap().apiserver_version().await.unwrap();
    let requested = crate::support::kubernetes_version();
    assert!(
        requested == "oldest" || version.git_version.starts_with(&format!("v{requested}.")),
        "{}",
        version.git_version
    );
    let text = output(plane.kubectl().args(["version"])).unwrap();
    assert!(text.contains(&format!("Server Version: {}", version.git_version)), "{text}");
}

#[tokio::test]
async fn garbage_collector_deletes_dependents() {
    let client = plane().await.client().await.unwrap();
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace(&client).await);
    let config = |name: &str, owner: Option<OwnerReference>| ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let owner = configs.create(&PostParams::default(), &config("owner", None)).await.unwrap();
    let reference = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ConfigMap".to_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap(),
        ..OwnerReference::default()
    };
    configs.create(&PostParams::default(), &config("dependent", Some(reference))).await.unwrap();
    configs.delete("owner", &DeleteParams::default()).await.unwrap();
    eventually("the dependent is deleted", TIMEOUT, async || {
        ensure!(configs.get_opt("dependent").await?.is_none(), "the dependent still exists");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn apiserver_identifies_users_and_service_accounts() {
    let plane = plane().await;
    let namespace = namespace(&plane.client().await.unwrap()).await;
    let alice: Api<ConfigMap> = Api::namespaced(plane.client_as("alice", &["dev"]).await.unwrap(), &namespace);
    let error = alice.get("any").await.unwrap_err().to_string();
    assert!(error.contains(r#"User "alice" cannot get resource "configmaps""#), "{error}");

    eventually("the namespace has its service account", TIMEOUT, async || plane.token_for(&namespace, "default").await)
        .await;
    let kubeconfig = plane.kubeconfig_for_service_account(&namespace, "default", None).await.unwrap();
    let whoami = output(plane.kubectl().env("KUBECONFIG", kubeconfig).args(["auth", "whoami"])).unwrap();
    assert!(whoami.contains(&format!("system:serviceaccount:{namespace}:default")), "{whoami}");
}

/// A client of a service account with role `admin`, through a proxy.
async fn config_maps_through(proxy: &Proxy) -> Api<ConfigMap> {
    let plane = plane().await;
    let namespace = namespace(&plane.client().await.unwrap()).await;
    eventually("the namespace has its service account", TIMEOUT, async || plane.token_for(&namespace, "default").await)
        .await;
    let account = format!("--serviceaccount={namespace}:default");
    output(plane.kubectl().args(["create", "rolebinding", "all", "--clusterrole=admin", &account, "-n", &namespace]))
        .unwrap();
    let kubeconfig = plane.kubeconfig_for_service_account(&namespace, "default", Some(proxy.url())).await.unwrap();
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Api::namespaced(kube::Client::try_from(config).unwrap(), &namespace)
}

fn named(name: &str) -> ConfigMap {
    ConfigMap { metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }, ..ConfigMap::default() }
}

#[tokio::test]
async fn proxy_injects_faults_into_writes() {
    let proxy = Proxy::start(plane().await).unwrap();
    let configs = config_maps_through(&proxy).await;
    let create = async |name: &str| configs.create(&PostParams::default(), &named(name)).await;

    create("plain").await.unwrap();
    assert_eq!(proxy.writes().len(), 1);
    assert_eq!(proxy.writes()[0].status.unwrap(), 201);

    let rejection = proxy.inject(2, Record::is_write, Fault::Reject(409));
    create("first").await.unwrap();
    assert!(create("second").await.unwrap_err().to_string().contains("rejected by the proxy"));
    assert_eq!(rejection.injected(), 1);
    assert!(configs.get_opt("second").await.unwrap().is_none());

    let (sender, committed) = std::sync::mpsc::channel();
    let lost = proxy.inject(1, Record::is_write, Fault::after_commit(move || sender.send(()).unwrap()));
    create("plain").await.unwrap_err();
    assert_eq!(lost.injected(), 0, "a request that the apiserver rejected was counted");
    create("third").await.unwrap_err();
    committed.try_recv().expect("the closure was called");
    assert!(configs.get_opt("third").await.unwrap().is_some(), "the write was not committed");
    assert!(!format!("{:?}", proxy.requests()).contains("apiVersion"), "a body was recorded");
}

#[tokio::test]
async fn proxy_cuts_watches() {
    use futures::StreamExt;
    let proxy = Proxy::start(plane().await).unwrap();
    let configs = config_maps_through(&proxy).await;
    let mut watch = configs.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    watch.next().await.expect("an event").unwrap();
    configs.create(&PostParams::default(), &named("more")).await.unwrap();
    let more = async {
        while let Some(event) = watch.next().await {
            if matches!(event, Ok(kube::api::WatchEvent::Added(config)) if config.name_any() == "more") {
                return;
            }
        }
        panic!("the watch ended");
    };
    tokio::time::timeout(TIMEOUT, more).await.expect("the watch streams");
    proxy.cut_watches();
    let end = async { while let Some(Ok(_)) = watch.next().await {} };
    tokio::time::timeout(TIMEOUT, end).await.expect("the watch ends");
}

/// Not a test: the process that `processes_end_when_the_test_is_killed` kills.
#[tokio::test]
#[ignore = "another test runs and kills it"]
async fn victim() {
    let plane = crate::support::ControlPlane::start(&crate::support::kubernetes_version()).await.unwrap();
    println!("folder {}", plane.folder().display());
    loop {
        tokio::time::sleep(Duration::from_mins(1)).await;
    }
}

#[tokio::test]
async fn processes_end_when_the_test_is_killed() {
    use std::io::{BufRead, BufReader};
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "harness::victim", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    // libtest prints `test victim ... ` before the line.
    let folder = lines.find_map(|line| line.split_once("folder ").map(|(_, folder)| folder.to_owned()));
    let folder = std::path::PathBuf::from(folder.expect("the victim has a control plane"));
    let running = || -> Vec<u32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        // The components of the control plane have its folder as working directory.
        ids.filter(|id| std::fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|cwd| cwd.starts_with(&folder)))
            .collect()
    };
    assert_eq!(running().len(), 3, "etcd, kube-apiserver, kube-controller-manager");

    victim.kill().unwrap(); // SIGKILL: no destructor runs
    victim.wait().unwrap();
    eventually("all processes have ended, and the folder is removed", TIMEOUT, async || {
        ensure!(running().is_empty() && !folder.exists(), "still running: {:?}", running());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn process_that_ignores_sigterm_is_killed() {
    let folder = plane().await.folder().join("ignores-sigterm");
    std::fs::create_dir(&folder).unwrap();
    let guardian = Guardian::new(&folder).unwrap();
    let mut command = Guardian::command("/bin/sh".as_ref());
    command.args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]).stdout(Stdio::piped());
    let mut process = guardian.spawn(&mut command).unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(&mut process.stdout.take().unwrap(), &mut ready).unwrap();
    drop(guardian);
    assert!(start_time(process.id()).is_none(), "the process still runs");
    assert!(!folder.exists());
    process.wait().context("the zombie").unwrap();
}

/// [`crate::support::Release::route_webhook`] relies on this: the apiserver connects to the name of an ExternalName Service,
/// and verifies the certificate for the name of the Service.
#[tokio::test]
async fn webhooks_are_reached_at_loopback_addresses() {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::PrivateKeyDer;
    let plane = plane().await;
    let client = plane.client().await.unwrap();
    let namespace = namespace(&client).await;

    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([format!("webhook.{namespace}.svc")]).unwrap().self_signed(&key).unwrap();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let tls = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(tls));
        let deny = async |axum::Json(review): axum::Json<serde_json::Value>| {
            axum::Json(serde_json::json!({
                "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
                "response": {
                    "uid": review["request"]["uid"], "allowed": false,
                    "status": {"message": "denied by the test webhook"},
                },
            }))
        };
        let deny = hyper_util::service::TowerToHyperService::new(axum::routing::post(deny));
        while let Ok((connection, _)) = listener.accept().await {
            let connection = hyper_util::rt::TokioIo::new(tls.accept(connection).await.unwrap());
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(connection, deny.clone()));
        }
    });

    let manifest = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "webhook", "namespace": namespace},
            "spec": {"type": "ExternalName", "externalName": "127.0.0.2"},
        },
        {
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": namespace},
            "webhooks": [{
                "name": "webhook.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["secrets"]}],
                "clientConfig": {
                    "service": {"name": "webhook", "namespace": namespace, "port": port},
                    "caBundle": k8s_openapi::ByteString(certificate.pem().into_bytes()),
                },
            }],
        },
    ]});
    let file = plane.folder().join("webhook.json");
    std::fs::write(&file, manifest.to_string()).unwrap();
    output(plane.kubectl().args(["create", "-f"]).arg(file)).unwrap();
    let kubectl = async || {
        // On another thread, so that the webhook of this test can respond.
        let mut create = plane.kubectl();
        create.args(["create", "secret", "generic", "any", "--dry-run=server", "-n", &namespace]);
        let answer = tokio::task::spawn_blocking(move || output(&mut create)).await?;
        let error = format!("{:#}", answer.err().context("the create was admitted")?);
        ensure!(error.contains("denied by the test webhook"), "{error}");
        Ok(())
    };
    eventually("the webhook is called", TIMEOUT, kubectl).await;
}

/// Uses the chart, the operator's binary and its service account; a second replica connects through a proxy.
#[tokio::test]
async fn operator_runs_as_its_deployment_says() {
    let shared = crate::support::shared().await;
    let client = shared.client().await;
    let proxy = Proxy::start(shared.plane).unwrap();
    let options = Options { replica: 2, server: Some(proxy.url().to_owned()), ..Options::default() };
    let second = Operator::start(shared.plane, &shared.release, options).await.unwrap();
    second.wait_ready().await.unwrap();
    assert!(proxy.requests().iter().any(Record::is_watch), "no watch through the proxy");
    assert!(second.metrics().await.unwrap().contains("keywright"));
    assert!(second.memory().unwrap() > 1 << 20);
    assert!(second.terminate().await.unwrap().success(), "{}", second.log());
    assert!(second.log().contains("keywright"), "the output is not captured");

    let namespace = namespace(&client).await;
    let kubectl = |args: &[&str]| output(shared.plane.kubectl().args(["-n", &namespace]).args(args)).unwrap();
    let example = crate::support::repository().join("examples/send-your-data.yaml");
    kubectl(&["apply", "-f", example.to_str().unwrap()]);
    kubectl(&["wait", "--for=condition=Ready", "apikeys", "--all", "--timeout=60s"]);
    assert!(kubectl(&["get", "secrets", "-o", "name"]).contains("checkout-telemetry-secret"));
    kubectl(&["delete", "apikeys", "--all"]);
    // The short time-out tests that kube-controller-manager was restarted after the CRDs were installed.
    eventually("the Secret is deleted with its key", Duration::from_secs(15), async || {
        let secrets = kubectl(&["get", "secrets", "-o", "name"]);
        ensure!(secrets.is_empty(), "{secrets}");
        Ok(())
    })
    .await;
}
