//! Wires the operator together: `watches` fill the index on every replica, `serving` answers admission requests and
//! probes on every replica, `controllers` write on the replica that leads.

mod controllers;
mod serving;
mod watches;

use std::{process::ExitCode, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Client, ResourceExt,
    client::ClientBuilder,
    runtime::reflector::{ObjectRef, Store, store::Writer},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::limit::ConcurrencyLimitLayer;

use self::serving::{Certificates, Serving};
use super::{
    StartupError,
    args::OperatorArgs,
    cluster_config,
    lease::{self, LeaseConfig},
    secret_notices::{self, LeaderAddress},
    supervisor::{EndedTask, Supervisor},
};
use crate::{
    admission,
    api::ApiKey,
    certs,
    clock::Clock,
    controller::{
        api_key::{self, SecretChecks},
        backoff::Backoff,
        events::Events,
        permission_catalog, reference,
    },
    sealing::SealingKeyStore,
    telemetry::metrics::Metrics,
};

/// The time for which the webhook serves after SIGTERM. API servers call this replica until they notice that it left
/// the endpoints of the Service.
const DRAIN: Duration = Duration::from_secs(5);

/// The time in which the controllers finish their writes after SIGTERM.
const FINISH: Duration = Duration::from_secs(10);

/// The maximum number of concurrent SubjectAccessReviews of the webhook. One admission request may need hundreds.
const CONCURRENT_REVIEWS: usize = 64;

type Queue = mpsc::UnboundedSender<ObjectRef<ApiKey>>;

/// The reason for the stop of the operator.
enum Stop {
    /// SIGTERM or SIGINT.
    Signal,
    /// Another replica may lead now.
    LeadershipLost,
    /// A task ended unexpectedly.
    TaskEnded(EndedTask),
}

/// Clients with connection pools of their own. The renewal of the lease and the controllers do not wait for the
/// requests of the webhook.
struct Clients {
    controllers: Client,
    lease: Client,
    webhook: Client,
}

impl Clients {
    async fn connect() -> Result<Self, StartupError> {
        let mut config = cluster_config().await?;
        // Each request has its own time-out. A read time-out would end watches without events.
        config.read_timeout = None;
        let builder = || ClientBuilder::try_from(config.clone()).map_err(StartupError::Client);
        Ok(Self {
            controllers: builder()?.build(),
            lease: builder()?.build(),
            webhook: builder()?.with_layer(&ConcurrencyLimitLayer::new(CONCURRENT_REVIEWS)).build(),
        })
    }
}

/// Notifications of changes for the controllers.
#[derive(Clone, Default)]
struct Changes {
    keys: Arc<Notify>,
    policies: Arc<Notify>,
    catalogs: Arc<Notify>,
}

/// The state that the parts of the operator share.
struct Shared {
    args: OperatorArgs,
    context: Arc<api_key::ApiKeyContext>,
    /// The failures of KeyReveals.
    reveal_backoff: Arc<Backoff>,
    /// Whether this replica leads.
    leader: watch::Receiver<bool>,
    /// Queues ApiKeys for reconciliation.
    requeue: Requeue,
    changes: Changes,
    shutdown: CancellationToken,
}

impl Shared {
    /// Also returns the task that publishes Events.
    fn new(
        args: OperatorArgs,
        client: Client,
        clock: &Clock,
        keys: Store<ApiKey>,
        resolver: Arc<certs::Resolver>,
        (leader, queue): (watch::Receiver<bool>, Queue),
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (backoff, reveal_backoff) = (Arc::new(Backoff::default()), Arc::new(Backoff::default()));
        let failing = {
            let (keys, reveals) = (Arc::clone(&backoff), Arc::clone(&reveal_backoff));
            move || keys.failing() + reveals.failing()
        };
        let metrics = Metrics::new(keys.clone(), clock.clone(), failing, move || {
            let seconds = |time: Timestamp| time.as_second() as f64;
            let status = resolver.status();
            (status.leaf_not_after.map(seconds), status.ca_not_after.map(seconds))
        });
        let (events, publish_events) = Events::new(client.clone(), &args.pod_name, metrics.clone(), clock.clone());
        let sealing =
            SealingKeyStore::new(client.clone(), &args.pod_namespace, &args.sealing_secret, !args.check_roles);
        let context = Arc::new(api_key::ApiKeyContext {
            client,
            index: Arc::default(),
            keys,
            clock: clock.clone(),
            events,
            metrics,
            backoff,
            checks: SecretChecks::every(args.secret_check_interval),
            sealing,
        });
        let (changes, shutdown) = (Changes::default(), CancellationToken::new());
        let requeue = Requeue { queue, leader: leader.clone() };
        (Self { args, context, reveal_backoff, leader, requeue, changes, shutdown }, publish_events)
    }
}

/// Requests reconciliations of ApiKeys.
#[derive(Clone)]
struct Requeue {
    queue: Queue,
    leader: watch::Receiver<bool>,
}

impl Requeue {
    /// Queues ApiKeys if this replica leads. A replica that begins to lead queues all of them.
    fn keys(&self, keys: impl IntoIterator<Item = ObjectRef<ApiKey>>) {
        if *self.leader.borrow() {
            // The queue is closed only when the process stops.
            let _ = keys.into_iter().try_for_each(|key| self.queue.send(key));
        }
    }

    /// Queues every ApiKey of a store if this replica leads.
    fn all(&self, keys: &Store<ApiKey>) {
        self.keys(keys.state().iter().map(|key| reference(&**key)));
    }
}

/// Runs until SIGTERM or SIGINT, or until leadership is lost.
///
/// # Errors
/// If the operator can't start, or if a task ends unexpectedly.
pub async fn run(args: OperatorArgs) -> Result<ExitCode, StartupError> {
    let clients = Clients::connect().await?;
    let clock = Clock::system();
    let shipped = match &args.catalog_dir {
        Some(directory) => permission_catalog::shipped(directory).map_err(StartupError::CatalogDirectory)?,
        None => vec![],
    };
    let client_ca = serving::client_ca(&args).await?;
    let certificates = Certificates::of(&args, &clients.controllers, &clock);
    let (leads, leader) = watch::channel(false);
    let (queue, queued) = mpsc::unbounded_channel();
    let keys = Writer::<ApiKey>::default();
    // The tasks of every replica, and those of the replica that leads.
    let (mut every_replica, mut leading) = (Supervisor::default(), Supervisor::default());
    let resolver = certificates.resolver();
    let (shared, publish_events) =
        Shared::new(args, clients.controllers.clone(), &clock, keys.as_reader(), resolver, (leader, queue));
    every_replica.spawn("the publication of Events", publish_events);

    let policies = watches::start(&shared, keys, &mut every_replica);
    let mut serving = Serving::start(&shared, clients.webhook, &certificates, client_ca, &mut every_replica)?;
    leading.spawn("the renewal of certificates", certificates.run(shared.leader.clone(), shared.shutdown.clone()));
    let lease_config = lease_config(&shared.args);
    spawn_secret_notices(&shared, &mut serving, &lease_config, &mut every_replica);
    let released = CancellationToken::new();
    let mut election =
        tokio::spawn(lease::run(clients.lease.clone(), lease_config.clone(), clock.clone(), leads, released.clone()));
    controllers::start(&shared, queued, policies, shipped, &mut leading);
    tracing::info!(webhook = %shared.args.webhook_address, health = %shared.args.health_address, "started");

    let stop = tokio::select! {
        () = stop_signal() => Stop::Signal,
        // The lease is no longer renewed.
        ended = &mut election => {
            if let Err(error) = ended {
                tracing::error!(%error, "the leader election ended unexpectedly");
            }
            Stop::LeadershipLost
        }
        ended = leading.ended() => Stop::TaskEnded(ended),
        ended = every_replica.ended() => Stop::TaskEnded(ended),
        ended = serving.webhook.ended() => Stop::TaskEnded(ended),
    };
    shared.shutdown.cancel();
    stop_writing(&stop, &mut leading).await;
    shared.context.metrics.set_leader(false);
    released.cancel();
    tokio::join!(release(election, clients.lease, lease_config), sleep(DRAIN));
    serving.stop().await;
    every_replica.abort().await;
    tracing::info!("stopped");
    match stop {
        Stop::Signal => Ok(ExitCode::SUCCESS),
        Stop::LeadershipLost => Ok(ExitCode::FAILURE),
        Stop::TaskEnded(ended) => Err(ended.into()),
    }
}

fn lease_config(args: &OperatorArgs) -> LeaseConfig {
    let mut config = LeaseConfig::new(&args.pod_namespace, &args.lease_name, &args.pod_name);
    config.identity = format!("{}_{}", args.pod_name, std::process::id());
    config.address = args.advertised();
    config
}

/// Forwards notices of writes to Secrets to the replica that leads, which reads these Secrets.
fn spawn_secret_notices(shared: &Shared, serving: &mut Serving, lease: &LeaseConfig, tasks: &mut Supervisor) {
    let Some(notices) = serving.notices.take() else { return };
    let leader = LeaderAddress {
        address: lease.leader.subscribe(),
        bundle: serving.readiness.bundle.clone(),
        server_name: serving.readiness.server_name.clone(),
    };
    let (context, requeue) = (Arc::clone(&shared.context), shared.requeue.clone());
    let check = move |notice: &admission::secrets::SecretNotice| {
        for name in context.index.claimants(&notice.namespace, &notice.secret) {
            let reference = ObjectRef::new(&name).within(&notice.namespace);
            if let Some(uid) = context.keys.get(&reference).and_then(|key| key.uid()) {
                context.checks.now(&uid);
                requeue.keys([reference]);
            }
        }
    };
    let metrics = shared.context.metrics.clone();
    let forward = secret_notices::run(notices, shared.leader.clone(), leader, metrics, check);
    tasks.spawn("the notices of writes to Secrets", forward);
}

/// Stops the tasks of the replica that leads.
async fn stop_writing(stop: &Stop, leading: &mut Supervisor) {
    match stop {
        Stop::LeadershipLost => {
            // Another replica may already write. Requests in flight are safe, since creates and resourceVersions detect
            // conflicts. No new request may start.
            tracing::error!("leadership lost; stopping");
            leading.abort().await;
            return;
        }
        Stop::TaskEnded(ended) => tracing::error!("{ended}; stopping"),
        Stop::Signal => tracing::info!("stopping"),
    }
    // Writes in flight are finished before another replica may start to write.
    leading.finish(FINISH).await;
}

/// Releases the lease, and then follows it while API servers still call this replica, so that it forwards notices of
/// writes to Secrets to the next leader.
async fn release(mut election: JoinHandle<lease::ElectionEnded>, client: Client, config: LeaseConfig) {
    if !election.is_finished() {
        let _ = timeout(FINISH, &mut election).await;
    }
    let _ = timeout(DRAIN, lease::follow(client, config)).await;
}

/// Waits for SIGTERM or SIGINT.
pub(super) async fn stop_signal() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("signals can't be received; stop the process by SIGKILL");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
