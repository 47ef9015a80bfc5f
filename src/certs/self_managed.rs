//! Keeps the CA's Secret, our leaf and the published bundle in step with [`authority`](super::authority).
//!
//! Watches and a tick only say *when* to look; each pass reads what there is and does what is due, so that it does not
//! matter what was missed, by a crash, by a lost watch or by a machine that slept.

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
    Error, IssuedConfig, Now, Resolver, Target, Validity,
    authority::{CaState, Step, step},
    issued::Issued,
    metadata, ours, post_params,
    serving::Leaf,
};

/// The longest time between two looks at the wall clock.
const TICK: Duration = Duration::from_secs(10);
/// After a failure, and the shortest time between two passes that nothing has asked for.
const RETRY: Duration = Duration::from_secs(1);
/// A pass makes a handful of calls; kube's client may retry one of them for minutes.
const PASS_TIMEOUT: Duration = Duration::from_secs(10);

/// What [`SelfManaged`] manages.
#[derive(Clone, Debug)]
pub struct Config {
    /// Our namespace, where the Secret is.
    pub namespace: String,
    /// Name of the Secret that holds the CA.
    pub secret: String,
    /// The names, or addresses, under which we are called.
    pub names: Vec<String>,
    /// The configurations that must trust our CA. One that is not installed is waited for.
    pub targets: Vec<Target>,
    /// How long a CA lives; replaced after two thirds.
    pub ca_life: Duration,
    /// How long a leaf lives; replaced after two thirds.
    pub leaf_life: Duration,
    /// How long API servers get to notice a bundle before anything depends on it.
    pub settle: Duration,
    /// The certificate that the leader issues for the verifier, if any. It lives as long as a leaf.
    pub issued: Option<IssuedConfig>,
}

impl Config {
    /// The usual lives: a CA one year, a leaf one week, one minute to notice a bundle. Called through `service`.
    #[must_use]
    pub fn new(namespace: &str, secret: &str, service: &str, targets: Vec<Target>) -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            namespace: namespace.to_owned(),
            secret: secret.to_owned(),
            // API servers use the last; the others are for whoever tries it from a Pod.
            names: vec![service.to_owned(), format!("{service}.{namespace}"), format!("{service}.{namespace}.svc")],
            targets,
            ca_life: DAY * 365,
            leaf_life: DAY * 7,
            settle: Duration::from_mins(1),
            issued: None,
        }
    }
}

/// The certificate from a CA of our own.
pub struct SelfManaged {
    client: Client,
    secrets: Api<Secret>,
    config: Config,
    resolver: Arc<Resolver>,
    issued: Option<Issued>,
    /// The bundle that every configuration holds, and since when we know. By the monotonic clock, which stands still
    /// while a machine sleeps: API servers notice nothing then.
    published: Option<(String, Instant)>,
    tick: Duration,
}

impl SelfManaged {
    /// Nothing is read or written before [`Self::run`].
    #[must_use]
    pub fn new(client: Client, config: Config, now: Now) -> Self {
        let secrets = Api::namespaced(client.clone(), &config.namespace);
        let issued = config.issued.clone().map(|issued| Issued::new(&client, &config.namespace, issued));
        Self { client, secrets, config, resolver: Resolver::new(now), issued, published: None, tick: TICK }
    }

    /// What the listener serves.
    #[must_use]
    pub fn resolver(&self) -> Arc<Resolver> {
        self.resolver.clone()
    }

    /// Keeps everything current until `shutdown`. Every replica runs this; only while `leader` is true it changes the
    /// CA or publishes it.
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
                let result = timeout(PASS_TIMEOUT, Box::pin(self.pass(leading))).await.map_err(Error::from).flatten();
                pause = *result.as_ref().unwrap_or(&RETRY);
                self.resolver.report(result.map(drop));
            }
        };
        shutdown.run_until_cancelled(keep_current).await;
    }

    /// Something that a pass reads has changed. Metadata only: no key travels for this.
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

    /// Looks at everything once and does what is due. How long to wait before the next pass.
    async fn pass(&mut self, leading: bool) -> Result<Duration, Error> {
        // Before the Secret: if anyone publishes a newer bundle than what the Secret says now, our write conflicts.
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
                warn!(secret = %self.config.secret, %error, "the CA cannot be read: making a new one");
                self.store(secret, &CaState::generate(now, self.config.ca_life)?).await?;
                return Ok(Duration::ZERO);
            }
            Err(error) => return Err(error),
        };
        let renew = self.sign(&ca, now)?;
        if !leading {
            self.published = None;
            // Only the leader can help when there is nothing to sign with.
            return renew.map(|renew| self.until(renew, now)).ok_or(Error::NotValidNow("ca.crt"));
        }
        self.publish(&configurations, &ca.bundle()).await?;
        // The webhook goes on without the verifier's certificate; what is wrong with that is said at the end.
        let issued = self.issue(map, &ca, now).await;
        let published = self.published.as_ref().map(|(_, since)| since.elapsed());
        match step(&ca, now, published, self.config.settle) {
            Step::Wait(until) => {
                let due = [Some(until), renew, issued?].into_iter().flatten().min();
                Ok(self.until(due.unwrap_or(until), now))
            }
            step => {
                info!(secret = %self.config.secret, ?step, "changing the CA");
                self.store(secret, &ca.after(step, now, self.config.ca_life)?).await?;
                Ok(Duration::ZERO)
            }
        }
    }

    /// Publishes the CA for clients of the verifier, and keeps its certificate. When the next is due.
    async fn issue(
        &mut self,
        map: Option<Result<Option<ConfigMap>, Error>>,
        ca: &CaState,
        now: Timestamp,
    ) -> Result<Option<Timestamp>, Error> {
        let (Some(issued), Some(map)) = (&self.issued, map) else { return Ok(None) };
        // While the clients may not know it, a successor is not promoted.
        let published = self.published.take();
        if issued.publish(map?, &ca.bundle()).await? {
            info!(config_map = issued.name(), "published the CA for clients of the verifier");
            self.published = Some((ca.bundle(), Instant::now()));
        } else {
            self.published = published;
        }
        issued.keep(ca, now, self.config.leaf_life).await.map(Some)
    }

    fn until(&self, then: Timestamp, now: Timestamp) -> Duration {
        Duration::try_from(then.duration_since(now)).unwrap_or_default().max(RETRY).min(self.tick)
    }

    /// The Secret, made by whoever comes first.
    async fn secret(&self) -> Result<Secret, Error> {
        let name = &self.config.secret;
        let secret = match self.secrets.get_opt(name).await? {
            Some(secret) => secret,
            None => self.create().await?,
        };
        ours(&secret)?;
        Ok(secret)
    }

    async fn create(&self) -> Result<Secret, Error> {
        let ca = CaState::generate(self.resolver.now(), self.config.ca_life)?;
        let secret = Secret {
            metadata: metadata(&self.config.secret),
            type_: Some("Opaque".to_owned()),
            data: Some(ca.data()),
            ..Secret::default()
        };
        match self.secrets.create(&post_params(), &secret).await {
            Ok(secret) => {
                info!(secret = %self.config.secret, "made the webhook's CA");
                Ok(secret)
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                Ok(self.secrets.get(&self.config.secret).await?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes `ca` over what was read, which carries its resourceVersion.
    async fn store(&self, read: Secret, ca: &CaState) -> Result<(), Error> {
        let secret = Secret { data: Some(ca.data()), ..read };
        self.secrets.replace(&self.config.secret, &post_params(), &secret).await?;
        Ok(())
    }

    /// Signs a new leaf if the one that is served is another CA's or has passed two thirds of its life. Says when the
    /// next is due; none if the CA has expired.
    fn sign(&self, ca: &CaState, now: Timestamp) -> Result<Option<Timestamp>, Error> {
        let issuer = ca.current.cert();
        let end = issuer.validity().until;
        if end <= now {
            return Ok(None);
        }
        // No leaf outlives its CA: one that lasts as long gains nothing from being renewed.
        let due = |leaf: Validity| if leaf.until < end { leaf.renew_at() } else { end };
        let ours = |leaf: &Leaf| (leaf.issuer.as_ref() == Some(issuer)).then_some(leaf.validity);
        if let Some(leaf) = self.resolver.with_leaf(ours).flatten()
            && leaf.from <= now
            && now < due(leaf)
        {
            return Ok(Some(due(leaf)));
        }
        let (key, validity) = ca.current.sign(&self.config.names, now, self.config.leaf_life)?;
        self.resolver.serve(Leaf { key: Arc::new(key), validity, issuer: Some(issuer.clone()) });
        Ok(Some(due(validity)))
    }

    /// Makes every installed configuration hold `bundle`, and remembers since when each does.
    async fn publish(&mut self, configurations: &[(Target, DynamicObject)], bundle: &str) -> Result<(), Error> {
        // Forgotten until all is known again: a failure below must not leave an old time behind.
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

/// One item for each change of the object of this name. Errors are retried by the watch itself.
fn changes_of<K>(api: Api<K>, name: &str) -> BoxStream<'static, ()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watch_object(api, name).default_backoff().filter_map(|event| ready(event.ok().map(drop))).boxed()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::{
        Json, Router,
        body::Bytes,
        extract::State,
        http::{Method, StatusCode, Uri},
        response::{IntoResponse, Response},
    };
    use serde_json::{Value, json};

    use super::*;

    const SECRET: &str = "/api/v1/namespaces/ns/secrets/ca";
    const TLS: &str = "/api/v1/namespaces/ns/secrets/verifier-tls";
    const CLIENTS: &str = "/api/v1/namespaces/ns/configmaps/verifier-ca";
    const WEBHOOKS: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/keywright";
    const NAME: &str = "keywright.ns.svc";

    /// Objects by path, with resourceVersions. Lists and watches hang, so that ticks alone must do.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<BTreeMap<String, Value>>>);

    impl Server {
        fn client(&self) -> Client {
            Client::new(Router::new().fallback(Self::answer).with_state(self.clone()), "ns")
        }

        async fn answer(State(server): State<Self>, method: Method, uri: Uri, body: Bytes) -> Response {
            let mut body: Value = serde_json::from_slice(&body).unwrap_or_default();
            let mut path = uri.path().to_owned();
            if method == Method::GET
                && ["secrets", "configmaps", "configurations"].iter().any(|all| path.ends_with(all))
            {
                return std::future::pending().await;
            }
            let mut objects = server.0.lock().unwrap();
            if method == Method::POST {
                path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
            }
            let refuse = |code: u16, reason: &str| {
                let status = kube::core::Status::failure(reason, reason).with_code(code);
                (StatusCode::from_u16(code).unwrap(), Json(status)).into_response()
            };
            let stored = objects.get(&path).cloned();
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            match (method, stored) {
                (Method::GET, Some(stored)) => return Json(stored).into_response(),
                (Method::POST, Some(_)) => return refuse(409, "AlreadyExists"),
                (Method::POST, None) => {}
                (_, None) => return refuse(404, "NotFound"),
                (_, Some(stored)) if version(&stored) != version(&body) => return refuse(409, "Conflict"),
                (Method::PATCH, Some(mut stored)) => {
                    assert!(uri.query().unwrap().contains("fieldManager=keywright-certs"));
                    let applied = body["webhooks"].as_array().unwrap().iter();
                    for (old, new) in stored["webhooks"].as_array_mut().unwrap().iter_mut().zip(applied) {
                        assert_eq!(old["name"], new["name"]);
                        old["clientConfig"]["caBundle"] = new["clientConfig"]["caBundle"].clone();
                    }
                    body = stored;
                }
                (_, Some(_)) => {}
            }
            let next = version(&body).as_str().map_or(1, |v| v.parse::<u64>().unwrap() + 1);
            body["metadata"]["resourceVersion"] = json!(next.to_string());
            objects.insert(path, body.clone());
            Json(body).into_response()
        }

        fn install_webhooks(&self) {
            let config = json!({
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": "ValidatingWebhookConfiguration",
                "metadata": {"name": "keywright", "resourceVersion": "1"},
                "webhooks": [{"name": "keys.keywright.dev", "clientConfig": {"service": {"name": "keywright"}}}],
            });
            self.0.lock().unwrap().insert(WEBHOOKS.to_owned(), config);
        }

        fn bundle(&self) -> Option<Vec<u8>> {
            let bundle = self.0.lock().unwrap().get(WEBHOOKS)?.pointer("/webhooks/0/clientConfig/caBundle")?.clone();
            Some(serde_json::from_value::<k8s_openapi::ByteString>(bundle).unwrap().0)
        }

        fn secret(&self) -> Option<Value> {
            self.0.lock().unwrap().get(SECRET).cloned()
        }

        fn put_secret(&self, labels: &Value, data: &Value) {
            let metadata = json!({"name": "ca", "resourceVersion": "1", "labels": labels});
            let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data});
            self.0.lock().unwrap().insert(SECRET.to_owned(), secret);
        }
    }

    /// A clock that runs `speed` times as fast as ours.
    fn clock(speed: u32) -> Now {
        let (start, origin) = (std::time::Instant::now(), Timestamp::from_second(1_800_000_000).unwrap());
        Arc::new(move || origin + start.elapsed() * speed)
    }

    fn start(server: &Server, now: &Now, leads: bool) -> Arc<Resolver> {
        start_with(server, now, leads, None)
    }

    fn start_with(server: &Server, now: &Now, leads: bool, issued: Option<IssuedConfig>) -> Arc<Resolver> {
        let mut config = Config::new("ns", "ca", "keywright", vec![Target::validating("keywright")]);
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
    fn start_issuing(server: &Server, now: &Now) -> Arc<Resolver> {
        start_with(server, now, true, Some(IssuedConfig::new("ns", "verifier", "verifier-tls", "verifier-ca")))
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..1000 {
            if condition() {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("not in time: {what}");
    }

    fn trusted(server: &Server, resolver: &Resolver) -> bool {
        server.bundle().is_some_and(|bundle| resolver.trusted_by(&bundle, NAME).is_ok())
    }

    #[tokio::test]
    async fn two_replicas_share_one_ca_and_stay_trusted_while_it_changes_twice() {
        let server = Server::default();
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
        // An upgrade puts the configuration back as the chart has it.
        server.install_webhooks();
        until("published again", || replicas.iter().all(|r| trusted(&server, r))).await;
        assert_eq!(replicas[0].status().problem, None);
    }

    #[tokio::test]
    async fn a_foreign_secret_is_left_alone() {
        let server = Server::default();
        server.install_webhooks();
        server.put_secret(&json!({"app.kubernetes.io/managed-by": "Helm"}), &json!({"ca.crt": "eA=="}));
        let before = server.secret();
        let leader = start(&server, &clock(1), true);
        until("reported", || leader.status().problem.is_some()).await;
        assert!(leader.status().problem.unwrap().starts_with("Secret ca exists but is not labelled"));
        assert_eq!((server.secret(), server.bundle()), (before, None));
    }

    #[tokio::test]
    async fn only_the_leader_replaces_a_damaged_ca_of_ours() {
        let server = Server::default();
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

    /// Whether clients that read the ConfigMap accept what the Secret holds.
    fn verifier_trusted(server: &Server, now: &Now) -> Result<(), Error> {
        let objects = server.0.lock().unwrap();
        let (Some(secret), Some(map)) = (objects.get(TLS), objects.get(CLIENTS)) else { return Err(Error::NoLeaf) };
        let cert: k8s_openapi::ByteString = serde_json::from_value(secret["data"]["tls.crt"].clone()).unwrap();
        let leaf = super::super::Certificate::parse_all(&cert.0, "tls.crt")?.swap_remove(0);
        let bundle = map["data"]["ca.crt"].as_str().unwrap();
        super::super::serving::verify(&[leaf.der().clone()], bundle.as_bytes(), "verifier.ns.svc", now())
    }

    #[tokio::test]
    async fn the_verifier_gets_a_certificate_that_its_clients_trust_while_the_ca_changes_twice() {
        let server = Server::default();
        server.install_webhooks();
        let now = clock(150);
        let leader = start_issuing(&server, &now);
        until("issued", || verifier_trusted(&server, &now).is_ok()).await;
        let secret = server.0.lock().unwrap()[TLS].clone();
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
        assert_ne!(server.0.lock().unwrap()[TLS]["data"]["tls.crt"], secret["data"]["tls.crt"], "it was renewed");

        for path in [TLS, CLIENTS] {
            server.0.lock().unwrap().remove(path);
            until("it is back", || verifier_trusted(&server, &now).is_ok()).await;
        }
        assert_eq!(leader.status().problem, None);
    }

    #[tokio::test]
    async fn the_webhook_goes_on_without_what_the_verifier_lacks() {
        let server = Server::default();
        server.install_webhooks();
        let metadata = json!({"name": "verifier-ca", "resourceVersion": "1"});
        server.0.lock().unwrap().insert(CLIENTS.to_owned(), json!({"metadata": metadata, "data": {"ca.crt": "mine"}}));
        let leader = start_issuing(&server, &clock(1));
        until("trusted", || trusted(&server, &leader)).await;
        until("reported", || leader.status().problem.is_some()).await;
        assert!(leader.status().problem.unwrap().starts_with("ConfigMap verifier-ca exists but is not labelled"));
        let objects = server.0.lock().unwrap();
        assert!(!objects.contains_key(TLS), "nothing depends on what is not published");
        assert_eq!(objects[CLIENTS]["data"]["ca.crt"], "mine");
    }
}
