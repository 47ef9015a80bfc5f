//! What anyone who reaches the operator's ports can take of it, and what a slow API server can: the leader keeps its lease,
//! the API server its answers, the kubelet its probes.

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

/// Connections to a webhook, as any pod can make them.
#[derive(Clone)]
struct Door {
    address: String,
    tls: TlsConnector,
}

impl Door {
    async fn of(stage: &Stage, operator: &Operator) -> Self {
        Self::with(&stage.bundle().await.expect("a bundle"), &stage.release.webhook_address(operator), None)
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

    /// From an address of its own, as a pod has one.
    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(format!("keywright-webhook.{NAMESPACE}.svc")).unwrap();
        let socket = TcpSocket::new_v4()?;
        socket.bind("127.0.0.66:0".parse().unwrap())?;
        self.tls.connect(name, socket.connect(self.address.parse().unwrap()).await?).await
    }

    /// Sends one request over a connection of its own, and returns the whole answer.
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

/// `HTTP/1.1 200`, or what went wrong.
fn status(answer: &std::io::Result<String>) -> String {
    match answer {
        Ok(answer) => answer.lines().next().unwrap_or_default().chars().take(12).collect(),
        Err(error) => error.kind().to_string(),
    }
}

/// A review that nobody asked for: somebody creates a key with every permission that there is.
async fn made_up(stage: &Stage, user: &str) -> Vec<u8> {
    let catalogs: Api<keywright::api::PermissionCatalog> = Api::all(stage.client.clone());
    let catalog =
        eventually("the catalogue is there", PATIENCE, async || Ok(catalogs.get("coralogix").await?.spec)).await;
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

/// The holder of the lease, and how often it changed.
async fn lead(stage: &Stage) -> (Option<String>, Option<i32>) {
    let spec = stage.leases().get("keywright-operator").await.expect("the lease").spec.expect("a spec");
    (spec.holder_identity, spec.lease_transitions)
}

/// Twenty a second cost the leader its lease once.
#[tokio::test]
async fn a_flood_of_made_up_reviews_costs_no_lease() {
    let stage = Stage::enter().await;
    let proxy = Proxy::start(stage.plane).unwrap();
    let operator = stage.replica(1, &[], Some(&proxy)).await;
    stage.route(1).await;
    eventually("it leads", PATIENCE, async || leads(&operator).await).await;
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "before").await;
    let before = lead(&stage).await;

    let door = Door::of(&stage, &operator).await;
    let flooded = Instant::now();
    let sent = Arc::new(AtomicUsize::new(0));
    let template = String::from_utf8(made_up(&stage, "mallory").await).unwrap();
    let attackers: Vec<_> = (0..400)
        .map(|number| {
            let (door, sent) = (door.clone(), Arc::clone(&sent));
            let user = format!("user-{number}");
            let body = template.replace("mallory", &user).into_bytes();
            async move {
                let mut answers = std::collections::BTreeMap::<String, usize>::new();
                while flooded.elapsed() < Duration::from_secs(20) {
                    sent.fetch_add(1, Ordering::Relaxed);
                    *answers.entry(status(&door.post(&body).await)).or_default() += 1;
                }
                answers
            }
        })
        .collect();
    let honest = async {
        let (mut done, mut failed) = (0, vec![]);
        while flooded.elapsed() < Duration::from_secs(20) {
            match stage.try_key(&namespace, &["Alerts"]).await {
                Ok(()) => done += 1,
                Err(error) => failed.push(error.to_string()),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        (done, failed)
    };
    let (answers, (done, failed)) = tokio::join!(join_all(attackers), honest);
    let mut total = std::collections::BTreeMap::<String, usize>::new();
    for (answer, count) in answers.into_iter().flatten() {
        *total.entry(answer).or_default() += count;
    }
    let questions = proxy.requests().iter().filter(|request| request.path.ends_with("reviews")).count();
    let memory = operator.peak_memory().unwrap() / MIB;
    println!("{total:?}; {questions} questions; honest: {done} done, {} failed; {memory} MiB", failed.len());
    println!("{:?}", failed.last());
    // The API server always gets in. Its review may find the API server busy with the questions of others.
    let unanswered = failed.iter().filter(|error| error.contains("could not be asked")).count();
    assert!(done > failed.len() && unanswered == failed.len(), "the API server was not answered: {done}, {failed:#?}");
    assert!(sent.load(Ordering::Relaxed) > 400, "no flood");
    assert!(total.keys().any(|answer| answer.contains("503")), "nothing was refused: {total:?}");
    assert_eq!(lead(&stage).await, before, "the lease was lost");
    assert!(!operator.log().contains("cannot take or renew the lease"), "{}", operator.log());
    assert!(memory < 256, "{memory} MiB");
    stage.apply(&namespace, "after").await;
    stage.minted(&namespace, "after").await;
    let metrics = operator.metrics().await.unwrap();
    assert!(support::keys::metric_sum(&metrics, "keywright_admission_turned_away_total") > 0.0);
}

/// 40 slow bodies of 3 MB held 160 MB of 256 once.
#[tokio::test]
async fn slow_bodies_hold_no_more_memory_than_their_budget() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
    stage.route(1).await;
    let namespace = namespace(&stage.client).await;
    eventually("admission works", PATIENCE, async || Ok(stage.try_key(&namespace, &["Alerts"]).await?)).await;
    let before = operator.memory().unwrap();

    let door = Door::of(&stage, &operator).await;
    let slow = |_| {
        let door = door.clone();
        tokio::spawn(async move {
            let mut connection = door.connect().await?;
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
    let mut most = 0;
    let mut tried = 0;
    while began.elapsed() < Duration::from_secs(9) {
        stage.try_key(&namespace, &["Alerts"]).await.expect("an honest body finds room");
        tried += 1;
        most = most.max(operator.memory().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut answers = std::collections::BTreeMap::<String, usize>::new();
    for body in bodies {
        let answer = tokio::time::timeout(Duration::from_secs(15), body).await.expect("each is answered").unwrap();
        *answers.entry(status(&answer)).or_default() += 1;
    }
    let grown = most.saturating_sub(before) / MIB;
    println!("{answers:?}; {} MiB before, {grown} MiB more at most; {tried} honest ones", before / MIB);
    assert!(grown < 64, "it grew by {grown} MiB");
    assert!(answers.keys().any(|answer| answer.contains("408")), "{answers:?}");
    assert!(tried > 10, "{tried}");
}

/// Objects whose text is small and whose values are many: 4 MB of `[],` would take 200 MB.
#[tokio::test]
async fn a_body_that_grows_when_it_is_read_is_refused_unread() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
    stage.route(1).await;
    let before = operator.memory().unwrap();
    let door = Door::of(&stage, &operator).await;
    let review = String::from_utf8(made_up(&stage, "mallory").await).unwrap();
    let (begin, end) = review.split_once("\"spec\":{").unwrap();
    let body = format!("{begin}\"spec\":{{\"x\":[{}0],{end}", "[],".repeat(1_200_000));
    let answers = join_all((0..8).map(|_| door.post(body.as_bytes()))).await;
    for answer in &answers {
        assert!(["HTTP/1.1 413", "HTTP/1.1 503", "HTTP/1.1 408"].contains(&&*status(answer)), "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.as_ref().is_ok_and(|text| text.contains("too many values"))));
    let grown = operator.peak_memory().unwrap().saturating_sub(before) / MIB;
    println!("{grown} MiB more at most");
    assert!(grown < 64, "it grew by {grown} MiB");
}

#[tokio::test]
async fn connections_that_are_held_open_do_not_keep_the_probes_out() {
    let stage = Stage::enter().await;
    let operator = stage.replica(1, &[], None).await;
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
            answer.expect("in the time that the kubelet gives").expect("an answer");
            probes += 1;
        }
        // Whatever was closed is opened again.
        held.push(TcpStream::connect(operator.health_address()).await.unwrap());
    }
    println!("{probes} probes");
    assert!(probes > 20, "{probes}");
}

#[tokio::test]
async fn an_api_server_that_takes_three_seconds_keeps_its_leader() {
    let stage = Stage::enter().await;
    let proxy = Proxy::start(stage.plane).unwrap();
    let operator = stage.replica(1, &[], Some(&proxy)).await;
    stage.route(1).await;
    eventually("it leads", PATIENCE, async || leads(&operator).await).await;
    let before = lead(&stage).await;
    // Not questions of access, which admission waits for, and for three seconds only.
    let slow = |request: &Record| !request.path.ends_with("reviews");
    let slow = proxy.inject_times(1, usize::MAX, slow, Fault::Delay(Duration::from_secs(3)));
    let namespace = namespace(&stage.client).await;
    stage.apply(&namespace, "slowly").await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(slow.struck() > 10, "{}", slow.struck());
    leads(&operator).await.unwrap();
    assert_eq!(lead(&stage).await, before, "{}", operator.log());
    stage.minted(&namespace, "slowly").await;
    // And it is let go as slowly, but let go.
    assert!(operator.terminate().await.unwrap().success(), "{}", operator.log());
    assert_eq!(stage.holder().await, None, "{}", operator.log());
}

#[tokio::test]
async fn losing_the_lease_ends_no_review_that_is_under_way() {
    let stage = Stage::enter().await;
    let proxy = Proxy::start(stage.plane).unwrap();
    let operator = stage.replica(1, &["--access-cache-ttl=0s"], Some(&proxy)).await;
    stage.route(1).await;
    eventually("it leads", PATIENCE, async || leads(&operator).await).await;
    let namespace = namespace(&stage.client).await;
    eventually("admission works", PATIENCE, async || Ok(stage.try_key(&namespace, &["Alerts"]).await?)).await;
    let review = |request: &Record| request.path.ends_with("subjectaccessreviews");
    let slow = proxy.inject_times(1, usize::MAX, review, Fault::Delay(Duration::from_secs(2)));

    let taken = json!({"spec": {"holderIdentity": "somebody-else"}});
    stage.leases().patch("keywright-operator", &PatchParams::default(), &Patch::Merge(taken)).await.unwrap();
    // A review begins every 100 ms and takes two seconds; the last begins two seconds after the lease was lost.
    let (mut reviews, mut lost) = (vec![], None::<Instant>);
    while lost.is_none_or(|lost| lost.elapsed() < Duration::from_secs(2)) {
        let (client, namespace) = (stage.client.clone(), namespace.clone());
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
    println!("{count} reviews, {} slow questions", slow.struck());
    assert!(slow.struck() > 20, "{}", slow.struck());
    assert!(!operator.ended(Duration::from_secs(20)).await.unwrap().success(), "ended as if all were well");
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

/// As the README tells administrators to set it up.
#[tokio::test]
async fn a_webhook_with_a_client_ca_answers_the_api_server_alone() {
    let (ca, certificate, key) = client_certificate();
    let (_, other_certificate, other_key) = client_certificate();
    let port = free_port().unwrap();
    let plane = ControlPlane::start_with_webhook_client(port, &certificate, &key).await.unwrap();
    let release = Release::install_at(&plane, port, &["webhook.clientCA.configMap=webhook-client-ca"]).await.unwrap();
    let mut command = plane.kubectl();
    command.args(["-n", NAMESPACE, "create", "configmap", "webhook-client-ca"]);
    output(command.arg(format!("--from-literal=ca.crt={ca}"))).unwrap();
    let operator = Operator::start(&plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.expect("it can ask its own webhook");

    let client = plane.client().await.unwrap();
    let namespace = namespace(&client).await;
    eventually("the API server is answered", PATIENCE, async || apply(&client, &namespace, "k", &spec()).await).await;

    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let configuration = webhooks.get("keywright").await.unwrap();
    let bundle = configuration.webhooks.unwrap()[0].client_config.ca_bundle.clone().unwrap().0;
    let address = release.webhook_address(&operator);
    let body = br#"{"request":{"kind":{"kind":"Nothing"}}}"#;
    let own = Door::with(&bundle, &address, Some((&certificate, &key))).post(body).await;
    assert_eq!(status(&own), "HTTP/1.1 400", "{own:?}");
    for identity in [None, Some((&*other_certificate, &*other_key))] {
        let answer = Door::with(&bundle, &address, identity).post(body).await;
        assert!(answer.is_err(), "{answer:?}");
    }
    let name = format!("keywright-webhook.{NAMESPACE}.svc");
    self_check::ask(address.parse().unwrap(), &name, &bundle, None).await.expect_err("no certificate");
}
