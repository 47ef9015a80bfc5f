//! Load on the operator's ports and a slow API server: the leader keeps its lease, and requests of the API server and
//! probes of the kubelet are answered.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use futures::future::join_all;
use kube::ResourceExt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::support::free_port;

const MIB: u64 = 1 << 20;

/// A client of a webhook with an address of its own, like a pod.
#[derive(Clone)]
struct WebhookClient {
    address: String,
    tls: TlsConnector,
}

impl WebhookClient {
    async fn of(cluster: &Cluster, operator: &Operator) -> Self {
        Self::with(&cluster.bundle().await.expect("a bundle"), &cluster.release.webhook_address(operator), None)
    }

    fn with(bundle: &[u8], address: &str, identity: Option<(&str, &str)>) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(bundle) {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        Self { address: address.to_owned(), tls: TlsConnector::from(Arc::new(config)) }
    }

    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(format!("keywright-webhook.{NAMESPACE}.svc")).unwrap();
        let socket = TcpSocket::new_v4()?;
        socket.bind("127.0.0.66:0".parse().unwrap())?;
        self.tls.connect(name, socket.connect(self.address.parse().unwrap()).await?).await
    }

    /// Sends one request over a new connection, and returns the whole answer.
    async fn post(&self, body: &[u8]) -> std::io::Result<String> {
        let mut connection = self.connect().await?;
        connection.write_all(head(body.len()).as_bytes()).await?;
        connection.write_all(body).await?;
        read(&mut connection).await
    }
}

fn head(length: usize) -> String {
    format!(
        "POST /validate HTTP/1.1\r\nHost: webhook\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    )
}

async fn read(connection: &mut TlsStream<TcpStream>) -> std::io::Result<String> {
    let mut answer = vec![];
    match connection.read_to_end(&mut answer).await {
        Err(error) if answer.is_empty() => Err(error),
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// `HTTP/1.1 200`, or the kind of the error.
fn status(answer: &std::io::Result<String>) -> String {
    match answer {
        Ok(answer) => answer.lines().next().unwrap_or_default().chars().take(12).collect(),
        Err(error) => error.kind().to_string(),
    }
}

/// A forged review: a user creates a key with up to 300 permissions.
async fn forged_review(cluster: &Cluster, user: &str) -> Vec<u8> {
    let catalogs: Api<keywright::api::PermissionCatalog> = Api::all(cluster.client.clone());
    let catalog = eventually("the catalog exists", TIMEOUT, async || Ok(catalogs.get("coralogix").await?.spec)).await;
    let permissions: Vec<_> = catalog.permissions.iter().map(|permission| permission.name.clone()).take(300).collect();
    assert!(permissions.len() > 200, "{}", permissions.len());
    let kind = json!({"group": "keywright.dev", "version": "v1alpha1", "kind": "ApiKey"});
    let review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "1", "kind": kind, "operation": "CREATE", "name": "x", "namespace": "shop",
            "resource": {"group": "keywright.dev", "version": "v1alpha1", "resource": "apikeys"},
            "userInfo": {"username": user, "groups": ["system:authenticated"]},
            "object": {
                "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "x", "namespace": "shop"},
                "spec": {"type": "Team", "permissions": permissions},
            },
            "oldObject": null,
        },
    });
    review.to_string().into_bytes()
}

/// The holder of the lease and the number of its transitions.
async fn lease_state(cluster: &Cluster) -> (Option<String>, Option<i32>) {
    let spec = cluster.leases().get("keywright-operator").await.expect("the lease").spec.expect("a spec");
    (spec.holder_identity, spec.lease_transitions)
}

/// Regression: twenty forged reviews a second made the leader lose its lease.
#[tokio::test]
async fn the_leader_keeps_its_lease_under_a_flood_of_forged_reviews() {
    let cluster = Cluster::lock().await;
    let proxy = Proxy::start(cluster.plane).unwrap();
    let operator = cluster.leader(&[], Some(&proxy)).await;
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "before").await;
    let before = lease_state(&cluster).await;

    let webhook = WebhookClient::of(&cluster, &operator).await;
    let flooded = Instant::now();
    let sent = Arc::new(AtomicUsize::new(0));
    let template = String::from_utf8(forged_review(&cluster, "mallory").await).unwrap();
    let attackers: Vec<_> = (0..400)
        .map(|number| {
            let (webhook, sent) = (webhook.clone(), Arc::clone(&sent));
            let user = format!("user-{number}");
            let body = template.replace("mallory", &user).into_bytes();
            async move {
                let mut answers = std::collections::BTreeMap::<String, usize>::new();
                while flooded.elapsed() < Duration::from_secs(20) {
                    sent.fetch_add(1, Ordering::Relaxed);
                    *answers.entry(status(&webhook.post(&body).await)).or_default() += 1;
                }
                answers
            }
        })
        .collect();
    let api_server = async {
        let (mut done, mut failed) = (0, vec![]);
        while flooded.elapsed() < Duration::from_secs(20) {
            match cluster.try_key(&namespace, &["Alerts"]).await {
                Ok(()) => done += 1,
                Err(error) => failed.push(error.to_string()),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        (done, failed)
    };
    let (answers, (done, failed)) = tokio::join!(join_all(attackers), api_server);
    let mut total = std::collections::BTreeMap::<String, usize>::new();
    for (answer, count) in answers.into_iter().flatten() {
        *total.entry(answer).or_default() += count;
    }
    let access_reviews = proxy.requests().iter().filter(|request| request.path.ends_with("reviews")).count();
    let memory = operator.peak_memory().unwrap() / MIB;
    println!(
        "{total:?}; {access_reviews} access reviews; API server: {done} done, {} failed; {memory} MiB",
        failed.len()
    );
    println!("{:?}", failed.last());
    // The webhook always answers the API server. The access review of an answer may fail while the API server is busy.
    let unanswered = failed.iter().filter(|error| error.contains("could not be asked")).count();
    assert!(done > failed.len() && unanswered == failed.len(), "the API server was not answered: {done}, {failed:#?}");
    assert!(sent.load(Ordering::Relaxed) > 400, "too few forged reviews");
    assert!(total.keys().any(|answer| answer.contains("503")), "no review was rejected: {total:?}");
    assert_eq!(lease_state(&cluster).await, before, "the lease was lost");
    assert!(!operator.log().contains("cannot take or renew the lease"), "{}", operator.log());
    assert!(memory < 256, "{memory} MiB");
    cluster.apply(&namespace, "after").await;
    cluster.minted(&namespace, "after").await;
    let metrics = operator.metrics().await.unwrap();
    assert!(crate::support::keys::metric_sum(&metrics, "keywright_admission_turned_away_total") > 0.0);
}

/// Regression: 40 slow bodies of 3 MB held 160 MB of the limit of 256 MB.
#[tokio::test]
async fn slow_bodies_use_no_more_memory_than_the_budget_of_bodies() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    cluster.route(1).await;
    let namespace = namespace(&cluster.client).await;
    eventually("admission works", TIMEOUT, async || Ok(cluster.try_key(&namespace, &["Alerts"]).await?)).await;
    let before = operator.memory().unwrap();

    let webhook = WebhookClient::of(&cluster, &operator).await;
    let slow = |_| {
        let webhook = webhook.clone();
        tokio::spawn(async move {
            let mut connection = webhook.connect().await?;
            connection.write_all(head(3 << 20).as_bytes()).await?;
            let part = vec![b' '; 64 << 10];
            for _ in 0..47 {
                connection.write_all(&part).await?;
            }
            read(&mut connection).await
        })
    };
    let began = Instant::now();
    let bodies: Vec<_> = (0..120).map(slow).collect();
    let mut peak = 0;
    let mut admitted = 0;
    while began.elapsed() < Duration::from_secs(9) {
        cluster.try_key(&namespace, &["Alerts"]).await.expect("the API server is answered");
        admitted += 1;
        peak = peak.max(operator.memory().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut answers = std::collections::BTreeMap::<String, usize>::new();
    for body in bodies {
        let answer =
            tokio::time::timeout(Duration::from_secs(15), body).await.expect("every request is answered").unwrap();
        *answers.entry(status(&answer)).or_default() += 1;
    }
    let growth = peak.saturating_sub(before) / MIB;
    println!("{answers:?}; {} MiB before, {growth} MiB more at most; {admitted} admitted", before / MIB);
    assert!(growth < 64, "the memory grew by {growth} MiB");
    assert!(answers.keys().any(|answer| answer.contains("408")), "{answers:?}");
    assert!(admitted > 10, "{admitted}");
}

/// JSON with many values in little text: 4 MB of `[],` would take 200 MB when parsed.
#[tokio::test]
async fn a_body_with_too_many_values_is_rejected_before_it_is_parsed() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    cluster.route(1).await;
    let before = operator.memory().unwrap();
    let webhook = WebhookClient::of(&cluster, &operator).await;
    let review = String::from_utf8(forged_review(&cluster, "mallory").await).unwrap();
    let (begin, end) = review.split_once("\"spec\":{").unwrap();
    let body = format!("{begin}\"spec\":{{\"x\":[{}0],{end}", "[],".repeat(1_200_000));
    let answers = join_all((0..8).map(|_| webhook.post(body.as_bytes()))).await;
    for answer in &answers {
        assert!(["HTTP/1.1 413", "HTTP/1.1 503", "HTTP/1.1 408"].contains(&&*status(answer)), "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.as_ref().is_ok_and(|text| text.contains("too many values"))));
    let growth = operator.peak_memory().unwrap().saturating_sub(before) / MIB;
    println!("{growth} MiB more at most");
    assert!(growth < 64, "the memory grew by {growth} MiB");
}

#[tokio::test]
async fn probes_are_answered_while_clients_hold_connections_open() {
    let cluster = Cluster::lock().await;
    let operator = cluster.replica(1, &[], None).await;
    let mut held = vec![];
    for number in 0..100 {
        let mut connection = TcpStream::connect(operator.health_address()).await.unwrap();
        let begin: &[u8] = match number % 3 {
            0 => b"",
            1 => b"GET /healthz HTTP/1.1\r\nHost: x",
            _ => b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",
        };
        let _ = connection.write_all(begin).await;
        held.push(connection);
    }
    let began = Instant::now();
    let mut probes = 0;
    while began.elapsed() < Duration::from_secs(3) {
        for path in ["/healthz", "/readyz"] {
            let answer = tokio::time::timeout(Duration::from_secs(1), operator.get(path)).await;
            answer.expect("an answer within the time-out of the kubelet").expect("an answer");
            probes += 1;
        }
        // Replaces a connection that the operator closed.
        held.push(TcpStream::connect(operator.health_address()).await.unwrap());
    }
    println!("{probes} probes");
    assert!(probes > 20, "{probes}");
}

#[tokio::test]
async fn the_leader_keeps_its_lease_if_the_api_server_takes_three_seconds_for_each_answer() {
    let cluster = Cluster::lock().await;
    let proxy = Proxy::start(cluster.plane).unwrap();
    let operator = cluster.leader(&[], Some(&proxy)).await;
    let before = lease_state(&cluster).await;
    // Except access reviews: admission waits for their answers, and only for three seconds.
    let slow = |request: &Record| !request.path.ends_with("reviews");
    let slow = proxy.inject_times(1, usize::MAX, slow, Fault::Delay(Duration::from_secs(3)));
    let namespace = namespace(&cluster.client).await;
    cluster.apply(&namespace, "slowly").await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(slow.injected() > 10, "{}", slow.injected());
    leads(&operator).await.unwrap();
    assert_eq!(lease_state(&cluster).await, before, "{}", operator.log());
    cluster.minted(&namespace, "slowly").await;
    // The release of the lease is slow too, but completes before the process exits.
    assert!(operator.terminate().await.unwrap().success(), "{}", operator.log());
    assert_eq!(cluster.holder().await, None, "{}", operator.log());
}

#[tokio::test]
async fn reviews_complete_after_the_lease_is_lost() {
    let cluster = Cluster::lock().await;
    let proxy = Proxy::start(cluster.plane).unwrap();
    let operator = cluster.leader(&["--access-cache-ttl=0s"], Some(&proxy)).await;
    let namespace = namespace(&cluster.client).await;
    eventually("admission works", TIMEOUT, async || Ok(cluster.try_key(&namespace, &["Alerts"]).await?)).await;
    let review = |request: &Record| request.path.ends_with("subjectaccessreviews");
    let slow = proxy.inject_times(1, usize::MAX, review, Fault::Delay(Duration::from_secs(2)));

    let taken = json!({"spec": {"holderIdentity": "another-holder"}});
    cluster.leases().patch("keywright-operator", &PatchParams::default(), &Patch::Merge(taken)).await.unwrap();
    // A review begins every 100 ms and takes two seconds; the last begins two seconds after the lease was lost.
    let (mut reviews, mut lost) = (vec![], None::<Instant>);
    while lost.is_none_or(|lost| lost.elapsed() < Duration::from_secs(2)) {
        let (client, namespace) = (cluster.client.clone(), namespace.clone());
        reviews.push(tokio::spawn(async move {
            let key = json!({
                "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"generateName": "trial-"},
                "spec": spec(),
            });
            let key: ApiKey = serde_json::from_value(key).unwrap();
            let params = PostParams { dry_run: true, ..PostParams::default() };
            Api::<ApiKey>::namespaced(client, &namespace).create(&params, &key).await.map(|key| key.name_any())
        }));
        if lost.is_none() && operator.log().contains("leadership lost") {
            lost = Some(Instant::now());
        }
        assert!(reviews.len() < 200, "the lease is not lost");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let count = reviews.len();
    for (number, review) in reviews.into_iter().enumerate() {
        if let Err(error) = review.await.unwrap() {
            panic!("review {number} of {count} failed: {error}\n{}", operator.log());
        }
    }
    println!("{count} reviews, {} slow access reviews", slow.injected());
    assert!(slow.injected() > 20, "{}", slow.injected());
    assert!(!operator.ended(Duration::from_secs(20)).await.unwrap().success(), "the process exited with success");
}

/// A CA and a client's certificate and key, in PEM.
fn client_certificate() -> (String, String, String) {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new([]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &ca).unwrap();
    (ca.pem(), certificate.pem(), key.serialize_pem())
}

/// The setup of docs/operations.md, "Restrict the webhook".
#[tokio::test]
async fn a_webhook_with_a_client_ca_answers_only_clients_with_a_certificate_of_that_ca() {
    let (ca, certificate, key) = client_certificate();
    let (_, other_certificate, other_key) = client_certificate();
    let port = free_port().unwrap();
    let plane = ControlPlane::start_with_webhook_client(port, &certificate, &key).await.unwrap();
    let release = Release::install_at(&plane, port, &["webhook.clientCA.configMap=webhook-client-ca"]).await.unwrap();
    let mut command = plane.kubectl();
    command.args(["-n", NAMESPACE, "create", "configmap", "webhook-client-ca"]);
    output(command.arg(format!("--from-literal=ca.crt={ca}"))).unwrap();
    let operator = Operator::start(&plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.expect("the operator can call its own webhook");

    let client = plane.client().await.unwrap();
    let namespace = namespace(&client).await;
    eventually("the API server is answered", TIMEOUT, async || apply(&client, &namespace, "k", &spec()).await).await;

    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let configuration = webhooks.get("keywright").await.unwrap();
    let bundle = configuration.webhooks.unwrap()[0].client_config.ca_bundle.clone().unwrap().0;
    let address = release.webhook_address(&operator);
    let body = br#"{"request":{"kind":{"kind":"Nothing"}}}"#;
    let own = WebhookClient::with(&bundle, &address, Some((&certificate, &key))).post(body).await;
    assert_eq!(status(&own), "HTTP/1.1 400", "{own:?}");
    for identity in [None, Some((&*other_certificate, &*other_key))] {
        let answer = WebhookClient::with(&bundle, &address, identity).post(body).await;
        assert!(answer.is_err(), "{answer:?}");
    }
    let name = format!("keywright-webhook.{NAMESPACE}.svc");
    self_check::ask(address.parse().unwrap(), &name, &bundle, None).await.expect_err("a client without a certificate");
}
