//! The webhook under load: several connections, each of which sends its next request after the response.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Api;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::support::{ControlPlane, Operator, Release, operator::NAMESPACE};

pub struct Latency {
    pub p50: Duration,
    pub p99: Duration,
    pub per_second: f64,
}

/// The name of a preset, and of the group whose members hold each of its permissions but not the preset.
pub const FIFTY: &str = "Fifty";

/// The users of the reviews.
#[derive(Clone, Copy)]
pub enum Requesters {
    /// One cluster administrator, whose rights are cached after the first review.
    Cached,
    /// A new user in each review, and a preset of 50 permissions, so that each review requires 50 uncached rights.
    Uncached,
}

/// Sends `total` reviews of new keys, `concurrent` at a time.
pub async fn measure(
    plane: &ControlPlane,
    release: &Release,
    operator: &Operator,
    (concurrent, total): (usize, usize),
    requesters: Requesters,
) -> Result<Latency> {
    let left = Arc::new(AtomicUsize::new(total));
    let mut connections = vec![];
    for _ in 0..concurrent {
        connections.push(connect(plane, &release.webhook_address(operator)).await?);
    }
    let started = Instant::now();
    let workers = connections.into_iter().map(|mut connection| {
        let left = Arc::clone(&left);
        let cached = Bytes::from(serde_json::to_vec(&review("admin", "system:masters", &["Alerts", "Dashboards"]))?);
        Ok(tokio::spawn(async move {
            let mut times = vec![];
            while let Ok(number) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
                let body = match requesters {
                    Requesters::Cached => cached.clone(),
                    Requesters::Uncached => {
                        serde_json::to_vec(&review(&format!("user-{number}"), FIFTY, &[FIFTY]))?.into()
                    }
                };
                let request = Request::post("/validate?timeout=5s")
                    .header("host", "webhook")
                    .header("content-type", "application/json")
                    .body(Full::new(body))?;
                let sent = Instant::now();
                let answer = connection.send_request(request).await?.into_body().collect().await?.to_bytes();
                times.push(sent.elapsed());
                ensure!(answer.windows(14).any(|w| w == b"\"allowed\":true"), "{}", String::from_utf8_lossy(&answer));
            }
            anyhow::Ok(times)
        }))
    });
    let workers: Vec<_> = workers.collect::<Result<_>>()?;
    let mut times = vec![];
    for worker in workers {
        times.extend(worker.await??);
    }
    let took = started.elapsed();
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    Ok(Latency { p50: at(0.5), p99: at(0.99), per_second: times.len() as f64 / took.as_secs_f64() })
}

async fn connect(plane: &ControlPlane, address: &str) -> Result<SendRequest<Full<Bytes>>> {
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(plane.client().await?);
    let webhooks = configurations.get("keywright").await?.webhooks.unwrap_or_default();
    let bundle = webhooks.into_iter().find_map(|w| w.client_config.ca_bundle).context("no caBundle")?.0;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bundle) {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(format!("keywright-webhook.{NAMESPACE}.svc"))?;
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A review as kube-apiserver sends it, including managedFields.
fn review(user: &str, group: &str, presets: &[&str]) -> serde_json::Value {
    json!({
        "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "b3b0ff2e-9f3e-4a43-8f0a-2f7d9fbb0d0d",
            "kind": {"group": "keywright.dev", "version": "v1alpha1", "kind": "ApiKey"},
            "resource": {"group": "keywright.dev", "version": "v1alpha1", "resource": "apikeys"},
            "requestKind": {"group": "keywright.dev", "version": "v1alpha1", "kind": "ApiKey"},
            "requestResource": {"group": "keywright.dev", "version": "v1alpha1", "resource": "apikeys"},
            "name": "bench", "namespace": "team-0", "operation": "CREATE",
            "userInfo": {"username": user, "groups": [group, "system:authenticated"]},
            "object": {
                "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey",
                "metadata": {
                    "name": "bench", "namespace": "team-0", "uid": "0f0ad4f5-6b1b-4a40-8f1b-0d9f0a1b2c3d",
                    "creationTimestamp": "2026-11-23T10:00:00Z", "generation": 1,
                    "labels": {"app.kubernetes.io/name": "checkout", "argocd.argoproj.io/instance": "shop"},
                    "managedFields": [{
                        "manager": "kubectl", "operation": "Apply", "apiVersion": "keywright.dev/v1alpha1",
                        "time": "2026-11-23T10:00:00Z", "fieldsType": "FieldsV1",
                        "fieldsV1": {"f:spec": {"f:displayName": {}, "f:presets": {}, "f:permissions": {}, "f:type": {}}},
                    }],
                },
                "spec": {
                    "displayName": "Checkout service", "type": "Team", "presets": presets, "expiresAt": "2099-01-01T00:00:00Z",
                    "rotation": {"every": "720h", "overlap": "24h"},
                },
            },
            "oldObject": null, "dryRun": false,
            "options": {"kind": "PatchOptions", "apiVersion": "meta.k8s.io/v1", "fieldManager": "kubectl"},
        },
    })
}
