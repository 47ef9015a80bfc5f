//! The webhook, the probes and the metrics, on every replica.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{DRAIN, Shared};
use crate::{
    access::{Cached, ClusterReviewer},
    admission::{self, secrets::SecretNotice},
    certs,
    clock::Clock,
    index::Index,
    net::listener::{self, ConnectionLimit},
    runtime::{StartupError, args::OperatorArgs, health, supervisor::Supervisor},
};

/// The maximum number of connections to the webhook. An API server needs a few.
const WEBHOOK_CONNECTIONS: usize = 256;

/// The time for which the result of a readiness check is reused. Each check makes a TLS handshake, and any client that
/// reaches the health port can request one.
const READINESS_TTL: Duration = Duration::from_millis(500);

/// The maximum number of cached SubjectAccessReviews, a few megabytes.
const MAX_CACHED_REVIEWS: usize = 10_000;

/// The running servers.
pub(super) struct Serving {
    /// The server of the webhook. It stops after the other tasks, when API servers no longer call it.
    pub(super) webhook: Supervisor,
    /// The notices of writes to Secrets, from the webhook.
    pub(super) notices: Option<mpsc::Receiver<SecretNotice>>,
    pub(super) readiness: Arc<WebhookReadiness>,
    handle: axum_server::Handle<SocketAddr>,
}

impl Serving {
    /// Starts the servers.
    ///
    /// # Errors
    /// If the process can't listen on an address, or TLS can't be configured with the certificates.
    pub(super) fn start(
        shared: &Shared,
        webhook_client: Client,
        certificates: &Certificates,
        client_ca: Option<Arc<certs::ClientCa>>,
        tasks: &mut Supervisor,
    ) -> Result<Self, StartupError> {
        let Shared { args, context, .. } = shared;
        let (notifier, notices) = admission::secrets::SecretNotices::new(
            Arc::clone(&context.index),
            shared.leader.clone(),
            context.metrics.clone(),
        );
        let resolver = certificates.resolver();
        let tls = match &client_ca {
            Some(ca) => {
                tasks.spawn("the watch of the webhook's client CA", Arc::clone(ca).follow());
                resolver.server_config_for(Arc::clone(ca) as _)
            }
            None => resolver.server_config(),
        };
        let tls = Some(Arc::new(tls.map_err(StartupError::Tls)?));
        let reviewer = Cached::new(ClusterReviewer::new(webhook_client), args.access_cache_ttl, MAX_CACHED_REVIEWS);
        let router = admission::router(admission::AdmissionContext {
            index: Arc::clone(&context.index),
            keys: context.keys.clone(),
            reviewer: Arc::new(reviewer),
            roles: args.check_roles,
            clock: context.clock.clone(),
            metrics: context.metrics.clone(),
            notices: notifier,
        });
        let socket = listener::bind("--webhook-address", args.webhook_address)?;
        let (handle, limit) = (axum_server::Handle::new(), ConnectionLimit::new(WEBHOOK_CONNECTIONS));
        let mut webhook = Supervisor::default();
        let server = listener::serve(socket, tls, handle.clone(), limit, move || router.clone());
        webhook.spawn("the webhook's server", server);

        let client = context.client.clone();
        let (readiness, follow) =
            WebhookReadiness::new(args, client, Arc::clone(&context.index), client_ca, shared.shutdown.clone());
        tasks.spawn("the watch of the webhook configuration", follow);
        let socket = listener::bind("--health-address", args.health_address)?;
        let server = health::serve(socket, readiness.probe(), context.metrics.registry());
        tasks.spawn("the server of health and metrics", server);
        Ok(Self { webhook, notices: Some(notices), readiness, handle })
    }

    /// Stops the webhook's server after the requests in flight.
    pub(super) async fn stop(&mut self) {
        self.handle.graceful_shutdown(Some(DRAIN));
        self.webhook.finish(DRAIN + Duration::from_secs(1)).await;
    }
}

/// The CA whose certificates clients of the webhook have to present, if `--webhook-client-ca` is set.
pub(super) async fn client_ca(args: &OperatorArgs) -> Result<Option<Arc<certs::ClientCa>>, StartupError> {
    let Some(file) = &args.webhook_client_ca else { return Ok(None) };
    let loaded = certs::ClientCa::load(file).await;
    loaded.map(Some).map_err(|source| StartupError::ClientCa { file: file.clone(), source })
}

/// The two sources of the webhook's certificate.
pub(super) enum Certificates {
    SelfManaged(certs::SelfManaged),
    Files(certs::Files),
}

impl Certificates {
    pub(super) fn of(args: &OperatorArgs, client: &Client, clock: &Clock) -> Self {
        let now: certs::Now = {
            let clock = clock.clone();
            Arc::new(move || clock.now())
        };
        if let Some(directory) = &args.webhook_cert_dir {
            return Self::Files(certs::Files::new(directory, now));
        }
        // Readiness reads the last of these. The caBundle is written to it after the others.
        let targets = vec![
            certs::WebhookTarget::mutating(&args.mutating_webhook_configuration),
            certs::WebhookTarget::validating(&args.webhook_configuration),
        ];
        let mut config =
            certs::SelfManagedConfig::new(&args.pod_namespace, &args.webhook_ca_secret, &args.webhook_service, targets);
        config.ca_life = args.webhook_ca_validity;
        config.leaf_life = args.webhook_cert_validity;
        config.settle = args.webhook_ca_settle;
        if let (Some(service), Some(secret), Some(map)) =
            (&args.verifier_service, &args.verifier_tls_secret, &args.verifier_ca_config_map)
        {
            config.issued = Some(certs::IssuedConfig::new(&args.pod_namespace, service, secret, map));
        }
        Self::SelfManaged(certs::SelfManaged::new(client.clone(), config, now))
    }

    pub(super) fn resolver(&self) -> Arc<certs::Resolver> {
        match self {
            Self::SelfManaged(source) => source.resolver(),
            Self::Files(source) => source.resolver(),
        }
    }

    pub(super) async fn run(self, leader: watch::Receiver<bool>, shutdown: CancellationToken) {
        match self {
            Self::SelfManaged(source) => source.run(leader, shutdown).await,
            Self::Files(source) => source.run(shutdown).await,
        }
    }
}

/// Checks whether this replica would answer an admission request.
pub(super) struct WebhookReadiness {
    index: Arc<Index>,
    pub(super) bundle: watch::Receiver<Option<Vec<u8>>>,
    address: SocketAddr,
    pub(super) server_name: String,
    client_ca: Option<Arc<certs::ClientCa>>,
    /// The last check and its result. Locked during a check, so that concurrent probes share one.
    last_check: Mutex<Option<(Instant, Result<(), String>)>>,
    shutdown: CancellationToken,
}

impl WebhookReadiness {
    /// Also returns the task that watches the webhook configuration for the CA that the API server trusts.
    fn new(
        args: &OperatorArgs,
        client: Client,
        index: Arc<Index>,
        client_ca: Option<Arc<certs::ClientCa>>,
        shutdown: CancellationToken,
    ) -> (Arc<Self>, impl Future<Output = ()> + Send + 'static) {
        let (published, bundle) = watch::channel(None);
        let name = args.webhook_configuration.clone();
        let follow = async move {
            let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
            let stream = watcher::watch_object(api, &name).default_backoff();
            let mut stream = std::pin::pin!(stream);
            while let Some(seen) = stream.next().await {
                let Ok(configuration) = seen else { continue };
                let webhooks = configuration.and_then(|c| c.webhooks).unwrap_or_default();
                // While one webhook has no caBundle, the CA is not completely published.
                let bundles = webhooks.into_iter().map(|w| w.client_config.ca_bundle).collect::<Option<Vec<_>>>();
                let bundle = bundles.and_then(|bundles| bundles.into_iter().next()).map(|bundle| bundle.0);
                published.send_replace(bundle);
            }
        };
        let readiness = Self {
            index,
            bundle,
            address: args.webhook_address,
            server_name: format!("{}.{}.svc", args.webhook_service, args.pod_namespace),
            client_ca,
            last_check: Mutex::default(),
            shutdown,
        };
        (Arc::new(readiness), follow)
    }

    fn probe(self: &Arc<Self>) -> health::ReadinessProbe {
        let this = Arc::clone(self);
        Arc::new(move || {
            let this = Arc::clone(&this);
            async move { this.check().await }.boxed()
        })
    }

    async fn check(&self) -> Result<(), String> {
        if self.shutdown.is_cancelled() {
            return Err("stopping".to_owned());
        }
        if !self.index.is_synced() {
            return Err("waiting for the first list of ApiKeys and PermissionCatalogs".to_owned());
        }
        let Some(bundle) = self.bundle.borrow().clone() else {
            return Err("waiting for a caBundle in the webhook configuration".to_owned());
        };
        let mut last_check = self.last_check.lock().await;
        if let Some((_, result)) = last_check.as_ref().filter(|(at, _)| at.elapsed() < READINESS_TTL) {
            return result.clone();
        }
        let identity = self.client_ca.as_ref().map(|ca| (ca.own().certificate.clone(), ca.own().key()));
        let result = admission::self_check::ask(self.address, &self.server_name, &bundle, identity).await;
        *last_check = Some((Instant::now(), result.clone()));
        result
    }
}
