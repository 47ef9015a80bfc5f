//! The harness itself: is the control plane a real one, and does nothing of it outlive a test?

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams, WatchParams};
use kube::config::KubeConfigOptions;
use support::control_plane::output;
use support::guardian::{Guardian, start_time};
use support::proxy::Record;
use support::{Fault, Operator, Options, PATIENCE, Proxy, eventually, namespace, plane};

#[tokio::test]
async fn is_the_kubernetes_that_was_asked_for() {
    let plane = plane().await;
    let version = plane.client().await.unwrap().apiserver_version().await.unwrap();
    let asked = support::kubernetes_version();
    assert!(asked == "oldest" || version.git_version.starts_with(&format!("v{asked}.")), "{}", version.git_version);
    let text = output(plane.kubectl().args(["version"])).unwrap();
    assert!(text.contains(&format!("Server Version: {}", version.git_version)), "{text}");
}

#[tokio::test]
async fn collects_garbage() {
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
    eventually("the dependent goes with its owner", PATIENCE, async || {
        ensure!(configs.get_opt("dependent").await?.is_none(), "it is still there");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn knows_who_is_asking() {
    let plane = plane().await;
    let namespace = namespace(&plane.client().await.unwrap()).await;
    let alice: Api<ConfigMap> = Api::namespaced(plane.client_as("alice", &["dev"]).await.unwrap(), &namespace);
    let refused = alice.get("any").await.unwrap_err().to_string();
    assert!(refused.contains(r#"User "alice" cannot get resource "configmaps""#), "{refused}");

    eventually("the namespace has its service account", PATIENCE, async || {
        plane.token_for(&namespace, "default").await
    })
    .await;
    let kubeconfig = plane.kubeconfig_for_service_account(&namespace, "default", None).await.unwrap();
    let whoami = output(plane.kubectl().env("KUBECONFIG", kubeconfig).args(["auth", "whoami"])).unwrap();
    assert!(whoami.contains(&format!("system:serviceaccount:{namespace}:default")), "{whoami}");
}

/// A service account that may do all with ConfigMaps, seen through a proxy.
async fn through(proxy: &Proxy) -> Api<ConfigMap> {
    let plane = plane().await;
    let namespace = namespace(&plane.client().await.unwrap()).await;
    eventually("the namespace has its service account", PATIENCE, async || {
        plane.token_for(&namespace, "default").await
    })
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
async fn proxy_lets_writes_go_wrong() {
    let proxy = Proxy::start(plane().await).unwrap();
    let configs = through(&proxy).await;
    let create = async |name: &str| configs.create(&PostParams::default(), &named(name)).await;

    create("plain").await.unwrap();
    assert_eq!(proxy.writes().len(), 1);
    assert_eq!(proxy.writes()[0].status.unwrap(), 201);

    let refusal = proxy.inject(2, Record::is_write, Fault::Refuse(409));
    create("first").await.unwrap();
    assert!(create("second").await.unwrap_err().to_string().contains("proxy refused"));
    assert_eq!(refusal.struck(), 1);
    assert!(configs.get_opt("second").await.unwrap().is_none());

    let (sender, committed) = std::sync::mpsc::channel();
    let lost = proxy.inject(1, Record::is_write, Fault::after_commit(move || sender.send(()).unwrap()));
    create("plain").await.unwrap_err();
    assert_eq!(lost.struck(), 0, "the apiserver refused this one itself: nothing was committed");
    create("third").await.unwrap_err();
    committed.try_recv().expect("the closure ran");
    assert!(configs.get_opt("third").await.unwrap().is_some(), "the write was committed");
    assert!(!format!("{:?}", proxy.requests()).contains("apiVersion"), "bodies are not recorded");
}

#[tokio::test]
async fn proxy_cuts_watches() {
    use futures::StreamExt;
    let proxy = Proxy::start(plane().await).unwrap();
    let configs = through(&proxy).await;
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
    tokio::time::timeout(PATIENCE, more).await.expect("the watch streams");
    proxy.cut_watches();
    let end = async { while let Some(Ok(_)) = watch.next().await {} };
    tokio::time::timeout(PATIENCE, end).await.expect("the watch ends");
}

/// Not a test of its own: the process that `nothing_outlives_a_killed_test` kills.
#[tokio::test]
#[ignore = "runs only as the victim of another test"]
async fn victim() {
    let plane = support::ControlPlane::start(&support::kubernetes_version()).await.unwrap();
    println!("folder {}", plane.folder().display());
    loop {
        tokio::time::sleep(Duration::from_mins(1)).await;
    }
}

#[tokio::test]
async fn nothing_outlives_a_killed_test() {
    use std::io::{BufRead, BufReader};
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "victim", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    // libtest writes `test victim ... ` in front of it.
    let folder = lines.find_map(|line| line.split_once("folder ").map(|(_, folder)| folder.to_owned()));
    let folder = std::path::PathBuf::from(folder.expect("the victim has a control plane"));
    let running = || -> Vec<u32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        // The parts of the control plane have its folder as working directory.
        ids.filter(|id| std::fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|cwd| cwd.starts_with(&folder)))
            .collect()
    };
    assert_eq!(running().len(), 3, "etcd, kube-apiserver, kube-controller-manager");

    victim.kill().unwrap(); // SIGKILL: no destructor runs
    victim.wait().unwrap();
    eventually("all processes have ended, and the folder is gone", PATIENCE, async || {
        ensure!(running().is_empty() && !folder.exists(), "left: {:?}", running());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_process_that_ignores_the_request_to_stop_is_killed() {
    let folder = plane().await.folder().join("stubborn");
    std::fs::create_dir(&folder).unwrap();
    let guardian = Guardian::new(&folder).unwrap();
    let mut stubborn = Guardian::command("/bin/sh".as_ref());
    stubborn.args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]).stdout(Stdio::piped());
    let mut stubborn = guardian.spawn(&mut stubborn).unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(&mut stubborn.stdout.take().unwrap(), &mut ready).unwrap();
    drop(guardian);
    assert!(start_time(stubborn.id()).is_none(), "it still runs");
    assert!(!folder.exists());
    stubborn.wait().context("its remains").unwrap();
}

/// What [`support::Release::route_webhook`] relies on: the apiserver dials the name of an ExternalName Service, and
/// holds the certificate to the name of the Service.
#[tokio::test]
async fn webhooks_are_reached_at_loopback_addresses() {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::PrivateKeyDer;
    let plane = plane().await;
    let client = plane.client().await.unwrap();
    let namespace = namespace(&client).await;

    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([format!("toy.{namespace}.svc")]).unwrap().self_signed(&key).unwrap();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let tls = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(tls));
        let refuse = async |axum::Json(review): axum::Json<serde_json::Value>| {
            axum::Json(serde_json::json!({
                "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
                "response": {"uid": review["request"]["uid"], "allowed": false, "status": {"message": "the toy says no"}},
            }))
        };
        let refuse = hyper_util::service::TowerToHyperService::new(axum::routing::post(refuse));
        while let Ok((connection, _)) = listener.accept().await {
            let connection = hyper_util::rt::TokioIo::new(tls.accept(connection).await.unwrap());
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(connection, refuse.clone()));
        }
    });

    let manifest = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "toy", "namespace": namespace},
            "spec": {"type": "ExternalName", "externalName": "127.0.0.2"},
        },
        {
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": namespace},
            "webhooks": [{
                "name": "toy.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["secrets"]}],
                "clientConfig": {
                    "service": {"name": "toy", "namespace": namespace, "port": port},
                    "caBundle": k8s_openapi::ByteString(certificate.pem().into_bytes()),
                },
            }],
        },
    ]});
    let file = plane.folder().join("toy.json");
    std::fs::write(&file, manifest.to_string()).unwrap();
    output(plane.kubectl().args(["create", "-f"]).arg(file)).unwrap();
    let kubectl = async || {
        // On another thread, so that the toy can answer meanwhile.
        let mut create = plane.kubectl();
        create.args(["create", "secret", "generic", "any", "--dry-run=server", "-n", &namespace]);
        let answer = tokio::task::spawn_blocking(move || output(&mut create)).await?;
        let refused = format!("{:#}", answer.err().context("it was allowed")?);
        ensure!(refused.contains("the toy says no"), "{refused}");
        Ok(())
    };
    eventually("the toy is asked", PATIENCE, kubectl).await;
}

/// The chart, the operator's binary and its service account, as in a cluster; a second replica through a proxy.
#[tokio::test]
async fn runs_the_operator_as_its_deployment_says() {
    let shared = support::shared().await;
    let client = shared.client().await;
    let proxy = Proxy::start(shared.plane).unwrap();
    let options = Options { replica: 2, server: Some(proxy.url().to_owned()), ..Options::default() };
    let second = Operator::start(shared.plane, &shared.release, options).await.unwrap();
    second.wait_ready().await.unwrap();
    assert!(proxy.requests().iter().any(Record::is_watch), "it watches through the proxy");
    assert!(second.metrics().await.unwrap().contains("keywright"));
    assert!(second.memory().unwrap() > 1 << 20);
    assert!(second.terminate().await.unwrap().success(), "{}", second.log());
    assert!(second.log().contains("keywright"), "its output is captured");

    let namespace = namespace(&client).await;
    let kubectl = |args: &[&str]| output(shared.plane.kubectl().args(["-n", &namespace]).args(args)).unwrap();
    let example = support::repository().join("examples/send-your-data.yaml");
    kubectl(&["apply", "-f", example.to_str().unwrap()]);
    kubectl(&["wait", "--for=condition=Ready", "apikeys", "--all", "--timeout=60s"]);
    assert!(kubectl(&["get", "secrets", "-o", "name"]).contains("checkout-telemetry-secret"));
    kubectl(&["delete", "apikeys", "--all"]);
    // Quickly, because kube-controller-manager was started anew after the CRDs.
    eventually("the Secret goes with its key", Duration::from_secs(15), async || {
        let secrets = kubectl(&["get", "secrets", "-o", "name"]);
        ensure!(secrets.is_empty(), "{secrets}");
        Ok(())
    })
    .await;
}
