//! Maintains the CA's Secret, the leaf of this replica and the published bundle by [`authority`](super::authority).
//!
//! Watches and a timer only trigger passes. Each pass reads the current state and performs the steps that are due, so
//! that events missed during a crash, a lost watch or a suspension of the machine have no effect.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{
    StreamExt,
    future::ready,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{
    Api, Client, Resource,
    api::{DynamicObject, PartialObjectMeta},
    runtime::{WatchStreamExt, watcher::watch_object},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    CertError, IssuedConfig, Now, Resolver, Validity, WebhookTarget,
    authority::{CaState, CaStep, step},
    check_managed,
    issued::Issued,
    metadata, post_params,
    serving::Leaf,
};

/// The maximum time between two passes.
const TICK: Duration = Duration::from_secs(10);
/// The delay after a failure, and the minimum delay before a scheduled pass.
const RETRY: Duration = Duration::from_secs(1);
/// The time limit of a pass: kube's client may retry a single request for minutes.
const PASS_TIMEOUT: Duration = Duration::from_secs(10);

/// The configuration of [`SelfManaged`].
#[derive(Clone, Debug)]
pub struct SelfManagedConfig {
    /// The namespace of the operator and of the Secret.
    pub namespace: String,
    /// The name of the Secret that holds the CA.
    pub secret: String,
    /// The DNS names or addresses of the webhook.
    pub names: Vec<String>,
    /// The configurations that must trust the CA. A configuration may be installed later.
    pub targets: Vec<WebhookTarget>,
    /// The lifetime of a CA, which is replaced after two thirds.
    pub ca_life: Duration,
    /// The lifetime of a leaf, which is replaced after two thirds.
    pub leaf_life: Duration,
    /// The time that API servers have to read a bundle before a certificate depends on it.
    pub settle: Duration,
    /// The certificate that the leader issues for the verifier, if any. It has the lifetime of a leaf.
    pub issued: Option<IssuedConfig>,
}

impl SelfManagedConfig {
    /// Returns the default lifetimes (one year for a CA, one week for a leaf, one minute for a bundle to settle) for a
    /// webhook behind `service`.
    #[must_use]
    pub fn new(namespace: &str, secret: &str, service: &str, targets: Vec<WebhookTarget>) -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            namespace: namespace.to_owned(),
            secret: secret.to_owned(),
            // API servers use the last name. The other names are for tests from a Pod.
            names: vec![service.to_owned(), format!("{service}.{namespace}"), format!("{service}.{namespace}.svc")],
            targets,
            ca_life: DAY * 365,
            leaf_life: DAY * 7,
            settle: Duration::from_mins(1),
            issued: None,
        }
    }
}

/// Serves certificates of a CA that the operator manages.
pub struct SelfManaged {
    client: Client,
    secrets: Api<Secret>,
    config: SelfManagedConfig,
    resolver: Arc<Resolver>,
    issued: Option<Issued>,
    /// The bundle that every configuration holds, and the time of that observation. The monotonic clock excludes a
    /// suspension of the machine, during which API servers read nothing.
    published: Option<(String, Instant)>,
    tick: Duration,
}

impl SelfManaged {
    /// Creates the source. Nothing is read or written before [`Self::run`].
    #[must_use]
    pub fn new(client: Client, config: SelfManagedConfig, now: Now) -> Self {
        let secrets = Api::namespaced(client.clone(), &config.namespace);
        let issued = config.issued.clone().map(|issued| Issued::new(&client, &config.namespace, issued));
        Self { client, secrets, config, resolver: Resolver::new(now), issued, published: None, tick: TICK }
    }

    /// Returns the resolver for the listener.
    #[must_use]
    pub fn resolver(&self) -> Arc<Resolver> {
        self.resolver.clone()
    }

    /// Keeps everything current until `shutdown`. Every replica runs this, and changes or publishes the CA only while
    /// `leader` is true.
    pub async fn run(mut self, mut leader: watch::Receiver<bool>, shutdown: CancellationToken) {
        let mut changes = self.changes();
        let keep_current = async {
            let mut pause = Duration::ZERO;
            loop {
                tokio::select! {
                    Some(()) = changes.next() => {}
                    Ok(()) = leader.changed() => {}
                    () = sleep(pause) => {}
                }
                let leading = *leader.borrow_and_update();
                let result =
                    timeout(PASS_TIMEOUT, Box::pin(self.pass(leading))).await.map_err(CertError::from).flatten();
                pause = *result.as_ref().unwrap_or(&RETRY);
                self.resolver.report(result.map(drop));
            }
        };
        shutdown.run_until_cancelled(keep_current).await;
    }

    /// Returns one item for each change of an object that a pass reads. Only metadata is watched, so that no private
    /// key is transferred.
    fn changes(&self) -> BoxStream<'static, ()> {
        let secret = Api::<PartialObjectMeta<Secret>>::namespaced(self.client.clone(), &self.config.namespace);
        let targets = self.config.targets.iter().map(|target| {
            let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(self.client.clone(), target.resource());
            changes_of(api, target.name())
        });
        let issued = self.config.issued.iter().flat_map(|issued| {
            let map = Api::<PartialObjectMeta<ConfigMap>>::namespaced(self.client.clone(), &self.config.namespace);
            [changes_of(secret.clone(), &issued.secret), changes_of(map, &issued.config_map)]
        });
        stream::select_all(targets.chain(issued).chain([changes_of(secret.clone(), &self.config.secret)])).boxed()
    }

    /// Reads the state once and performs the steps that are due. Returns the delay before the next pass.
    async fn pass(&mut self, leading: bool) -> Result<Duration, CertError> {
        // Read before the Secret, so that the write conflicts if another replica publishes a newer bundle meanwhile.
        let mut configurations = Vec::new();
        for target in self.config.targets.iter().filter(|_| leading) {
            configurations.extend(target.read(&self.client).await?.map(|read| (target.clone(), read)));
        }
        let map = match &self.issued {
            Some(issued) if leading => Some(issued.read().await),
            _ => None,
        };
        let secret = self.secret().await?;
        let now = self.resolver.now();
        let ca = match CaState::parse(secret.data.as_ref().unwrap_or(&BTreeMap::new())) {
            Ok(ca) => ca,
            Err(error) if leading => {
                warn!(secret = %self.config.secret, %error, "cannot read the CA: generating a new one");
                self.store(secret, &CaState::generate(now, self.config.ca_life)?).await?;
                return Ok(Duration::ZERO);
            }
            Err(error) => return Err(error),
        };
        let renew = self.sign(&ca, now)?;
        if !leading {
            self.published = None;
            // Without a valid CA, a replica waits for the leader.
            return renew.map(|renew| self.delay_until(renew, now)).ok_or(CertError::NotValidNow("ca.crt"));
        }
        self.publish(&configurations, &ca.bundle()).await?;
        // A failure here must not stop the webhook's certificate, so it is returned after the next step of the CA.
        let issued = self.issue(map, &ca, now).await;
        let published = self.published.as_ref().map(|(_, since)| since.elapsed());
        match step(&ca, now, published, self.config.settle) {
            CaStep::Wait(until) => {
                let due = [Some(until), renew, issued?].into_iter().flatten().min();
                Ok(self.delay_until(due.unwrap_or(until), now))
            }
            step => {
                info!(secret = %self.config.secret, ?step, "changing the CA");
                self.store(secret, &ca.after(step, now, self.config.ca_life)?).await?;
                Ok(Duration::ZERO)
            }
        }
    }

    /// Publishes the CA for clients of the verifier, and renews its certificate. Returns when the next one is due.
    async fn issue(
        &mut self,
        map: Option<Result<Option<ConfigMap>, CertError>>,
        ca: &CaState,
        now: Timestamp,
    ) -> Result<Option<Timestamp>, CertError> {
        let (Some(issued), Some(map)) = (&self.issued, map) else { return Ok(None) };
        // Absent after a failure, because a successor must not be promoted before clients of the verifier trust it.
        let published = self.published.take();
        if issued.publish(map?, &ca.bundle()).await? {
            info!(config_map = issued.name(), "published the CA for clients of the verifier");
            self.published = Some((ca.bundle(), Instant::now()));
        } else {
            self.published = published;
        }
        issued.keep(ca, now, self.config.leaf_life).await.map(Some)
    }

    fn delay_until(&self, then: Timestamp, now: Timestamp) -> Duration {
        Duration::try_from(then.duration_since(now)).unwrap_or_default().max(RETRY).min(self.tick)
    }

    /// Reads the Secret. The first replica creates it.
    async fn secret(&self) -> Result<Secret, CertError> {
        let name = &self.config.secret;
        let secret = match self.secrets.get_opt(name).await? {
            Some(secret) => secret,
            None => self.create().await?,
        };
        check_managed(&secret)?;
        Ok(secret)
    }

    async fn create(&self) -> Result<Secret, CertError> {
        let ca = CaState::generate(self.resolver.now(), self.config.ca_life)?;
        let secret = Secret {
            metadata: metadata(&self.config.secret),
            type_: Some("Opaque".to_owned()),
            data: Some(ca.data()),
            ..Secret::default()
        };
        match self.secrets.create(&post_params(), &secret).await {
            Ok(secret) => {
                info!(secret = %self.config.secret, "created the CA of the webhook");
                Ok(secret)
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                Ok(self.secrets.get(&self.config.secret).await?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces the content of the Secret `read` by `ca`, with the resourceVersion of `read`.
    async fn store(&self, read: Secret, ca: &CaState) -> Result<(), CertError> {
        let secret = Secret { data: Some(ca.data()), ..read };
        self.secrets.replace(&self.config.secret, &post_params(), &secret).await?;
        Ok(())
    }

    /// Signs a new leaf if the served one is of another CA or has passed two thirds of its lifetime. Returns when the
    /// next one is due; `None` if the CA has expired.
    fn sign(&self, ca: &CaState, now: Timestamp) -> Result<Option<Timestamp>, CertError> {
        let issuer = ca.current.cert();
        let end = issuer.validity().until;
        if end <= now {
            return Ok(None);
        }
        // A leaf expires with its CA at the latest. Then a renewal before the CA changes would not extend its validity.
        let due = |leaf: Validity| if leaf.until < end { leaf.renew_at() } else { end };
        let validity_if_current = |leaf: &Leaf| (leaf.issuer.as_ref() == Some(issuer)).then_some(leaf.validity);
        if let Some(leaf) = self.resolver.with_leaf(validity_if_current).flatten()
            && leaf.from <= now
            && now < due(leaf)
        {
            return Ok(Some(due(leaf)));
        }
        let (key, validity) = ca.current.sign(&self.config.names, now, self.config.leaf_life)?;
        self.resolver.serve(Leaf { key: Arc::new(key), validity, issuer: Some(issuer.clone()) });
        Ok(Some(due(validity)))
    }

    /// Writes `bundle` to every installed configuration, and records since when all of them hold it.
    async fn publish(
        &mut self,
        configurations: &[(WebhookTarget, DynamicObject)],
        bundle: &str,
    ) -> Result<(), CertError> {
        // Absent until all writes succeed, so that a failure leaves no outdated time.
        let mut since = self.published.take().filter(|(held, _)| held == bundle);
        for (target, read) in configurations {
            if target.publish(&self.client, read, bundle).await? {
                info!(configuration = target.name(), "published the webhook's CA");
                since = None;
            }
        }
        self.published = Some(since.unwrap_or_else(|| (bundle.to_owned(), Instant::now())));
        Ok(())
    }
}

/// Returns one item for each change of the object with this name. The watch itself retries after errors.
fn changes_of<K>(api: Api<K>, name: &str) -> BoxStream<'static, ()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watch_object(api, name).default_backoff().filter_map(|event| ready(event.ok().map(drop))).boxed()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::test_support::api_server::FakeApiServer;

    const SECRET: &str = "/api/v1/namespaces/ns/secrets/ca";
    const TLS: &str = "/api/v1/namespaces/ns/secrets/verifier-tls";
    const CLIENT_CA: &str = "/api/v1/namespaces/ns/configmaps/verifier-ca";
    const WEBHOOKS: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/keywright";
    const NAME: &str = "keywright.ns.svc";

    impl FakeApiServer {
        fn install_webhooks(&self) {
            let config = json!({
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": "ValidatingWebhookConfiguration",
                "metadata": {"name": "keywright"},
                "webhooks": [{"name": "keys.keywright.dev", "clientConfig": {"service": {"name": "keywright"}}}],
            });
            self.put(WEBHOOKS, config);
        }

        fn bundle(&self) -> Option<Vec<u8>> {
            let bundle = self.object(WEBHOOKS)?.pointer("/webhooks/0/clientConfig/caBundle")?.clone();
            Some(serde_json::from_value::<k8s_openapi::ByteString>(bundle).unwrap().0)
        }

        fn secret(&self) -> Option<Value> {
            self.object(SECRET)
        }

        fn put_secret(&self, labels: &Value, data: &Value) {
            let metadata = json!({"name": "ca", "labels": labels});
            self.put(SECRET, json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}));
        }
    }

    /// A clock that runs `speed` times as fast as the system clock.
    fn clock(speed: u32) -> Now {
        let (start, origin) = (std::time::Instant::now(), Timestamp::from_second(1_800_000_000).unwrap());
        Arc::new(move || origin + start.elapsed() * speed)
    }

    fn start(server: &FakeApiServer, now: &Now, leads: bool) -> Arc<Resolver> {
        start_with(server, now, leads, None)
    }

    fn start_with(server: &FakeApiServer, now: &Now, leads: bool, issued: Option<IssuedConfig>) -> Arc<Resolver> {
        let mut config = SelfManagedConfig::new("ns", "ca", "keywright", vec![WebhookTarget::validating("keywright")]);
        config.ca_life = Duration::from_mins(10);
        config.leaf_life = Duration::from_mins(3);
        config.settle = Duration::from_millis(50);
        config.issued = issued;
        let mut certs = SelfManaged::new(server.client(), config, now.clone());
        certs.tick = Duration::from_millis(10);
        let resolver = certs.resolver();
        let (sender, leader) = watch::channel(leads);
        tokio::spawn(async move {
            certs.run(leader, CancellationToken::new()).await;
            drop(sender);
        });
        resolver
    }

    /// As [`start`], with a certificate for the verifier.
    fn start_issuing(server: &FakeApiServer, now: &Now) -> Arc<Resolver> {
        start_with(server, now, true, Some(IssuedConfig::new("ns", "verifier", "verifier-tls", "verifier-ca")))
    }

    async fn until(expected: &str, condition: impl Fn() -> bool) {
        for _ in 0..1000 {
            if condition() {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("timed out: {expected}");
    }

    fn trusted(server: &FakeApiServer, resolver: &Resolver) -> bool {
        server.bundle().is_some_and(|bundle| resolver.trusted_by(&bundle, NAME).is_ok())
    }

    #[tokio::test]
    async fn two_replicas_share_one_ca_and_stay_trusted_while_it_changes_twice() {
        let server = FakeApiServer::default();
        let now = clock(150);
        let replicas = [start(&server, &now, false), start(&server, &now, true)];
        until("both serve before anything is published", || {
            replicas.iter().all(|r| r.status().leaf_not_after.is_some())
        })
        .await;
        assert!(server.bundle().is_none());
        // The chart installs the configuration later.
        server.install_webhooks();
        until("both trusted", || replicas.iter().all(|r| trusted(&server, r))).await;

        let current = || server.secret().unwrap()["data"]["ca.crt"].clone();
        for _ in 0..2 {
            let old = current();
            until("the CA is changed", || {
                for replica in &replicas {
                    replica.trusted_by(&server.bundle().unwrap(), NAME).unwrap();
                }
                current() != old
            })
            .await;
        }
        // An upgrade of the chart resets the configuration.
        server.install_webhooks();
        until("published again", || replicas.iter().all(|r| trusted(&server, r))).await;
        assert_eq!(replicas[0].status().problem, None);
    }

    #[tokio::test]
    async fn a_secret_without_the_managed_by_label_is_not_changed() {
        let server = FakeApiServer::default();
        server.install_webhooks();
        server.put_secret(&json!({"app.kubernetes.io/managed-by": "Helm"}), &json!({"ca.crt": "eA=="}));
        let before = server.secret();
        let leader = start(&server, &clock(1), true);
        until("reported", || leader.status().problem.is_some()).await;
        assert!(leader.status().problem.unwrap().starts_with("Secret ca exists without label"));
        assert_eq!((server.secret(), server.bundle()), (before, None));
    }

    #[tokio::test]
    async fn only_the_leader_replaces_a_damaged_ca() {
        let server = FakeApiServer::default();
        server.install_webhooks();
        server.put_secret(&json!({"app.kubernetes.io/managed-by": "keywright"}), &json!({"ca.crt": "eA=="}));
        let before = server.secret();
        let follower = start(&server, &clock(1), false);
        until("reported", || follower.status().problem.is_some()).await;
        assert_eq!(server.secret(), before);
        let leader = start(&server, &clock(1), true);
        until("replaced", || trusted(&server, &leader)).await;
        until("followed", || trusted(&server, &follower) && follower.status().problem.is_none()).await;
    }

    /// Checks that clients that read the ConfigMap accept the certificate in the Secret.
    fn verifier_trusted(server: &FakeApiServer, now: &Now) -> Result<(), CertError> {
        let (Some(secret), Some(map)) = (server.object(TLS), server.object(CLIENT_CA)) else {
            return Err(CertError::NoLeaf);
        };
        let cert: k8s_openapi::ByteString = serde_json::from_value(secret["data"]["tls.crt"].clone()).unwrap();
        let leaf = super::super::Certificate::parse_all(&cert.0, "tls.crt")?.swap_remove(0);
        let bundle = map["data"]["ca.crt"].as_str().unwrap();
        super::super::serving::verify(&[leaf.der().clone()], bundle.as_bytes(), "verifier.ns.svc", now())
    }

    #[tokio::test]
    async fn clients_trust_the_certificate_of_the_verifier_while_the_ca_changes_twice() {
        let server = FakeApiServer::default();
        server.install_webhooks();
        let now = clock(150);
        let leader = start_issuing(&server, &now);
        until("issued", || verifier_trusted(&server, &now).is_ok()).await;
        let secret = server.object(TLS).unwrap();
        assert_eq!(secret["type"], "kubernetes.io/tls");
        let current = || server.secret().unwrap()["data"]["ca.crt"].clone();
        for _ in 0..2 {
            let old = current();
            until("the CA is changed", || {
                verifier_trusted(&server, &now).unwrap();
                current() != old
            })
            .await;
        }
        assert_ne!(server.object(TLS).unwrap()["data"]["tls.crt"], secret["data"]["tls.crt"], "it was renewed");

        for path in [TLS, CLIENT_CA] {
            server.stored().objects.remove(path);
            until("the object is created again", || verifier_trusted(&server, &now).is_ok()).await;
        }
        assert_eq!(leader.status().problem, None);
    }

    #[tokio::test]
    async fn the_webhook_is_trusted_although_the_ca_of_the_verifier_cannot_be_published() {
        let server = FakeApiServer::default();
        server.install_webhooks();
        let metadata = json!({"name": "verifier-ca", "resourceVersion": "1"});
        server.put(CLIENT_CA, json!({"metadata": metadata, "data": {"ca.crt": "mine"}}));
        let leader = start_issuing(&server, &clock(1));
        until("trusted", || trusted(&server, &leader)).await;
        until("reported", || leader.status().problem.is_some()).await;
        assert!(leader.status().problem.unwrap().starts_with("ConfigMap verifier-ca exists without label"));
        let objects = server.stored().objects.clone();
        assert!(!objects.contains_key(TLS), "no certificate is issued before its CA is published");
        assert_eq!(objects[CLIENT_CA]["data"]["ca.crt"], "mine");
    }
}
