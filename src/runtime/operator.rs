//! Wires the operator together. Read it from top to bottom: that is the order in which things start.

use std::{collections::BTreeSet, convert::Infallible, future::ready, process::ExitCode, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::{api::admissionregistration::v1::ValidatingWebhookConfiguration, jiff::SignedDuration};
use kube::{
    Api, Client, ResourceExt,
    client::ClientBuilder,
    runtime::{
        WatchStreamExt, applier,
        controller::{self, ReconcileRequest},
        reflector::{ObjectRef, Store, store::Writer},
        watcher::{self, Event},
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Mutex, Notify, mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    Fatal,
    args::OperatorArgs,
    clock::Clock,
    cluster_config, health,
    lease::{self, LeaseConfig},
    listener::{self, Places},
    metrics::Metrics,
    news::{self, Peer},
    supervisor::{self, Supervisor},
};
use crate::{
    access::{Cached, Cluster},
    admission,
    api::{AccessPolicy, ApiKey, PermissionCatalog, SecuritySettings},
    certs,
    controller::{
        access_policy,
        api_key::{self, Checks},
        backoff::Backoff,
        events::Events,
        export::{self, Exporter},
        key_reveal, permission_catalog,
    },
    domain::export::is_same,
    index::{Index, feed},
    sealing::Keeper,
};

/// How long the webhook keeps answering after SIGTERM: until no API server sends anything here any more.
const DRAIN: Duration = Duration::from_secs(5);

/// How long work that only a leader does may take to come to an end.
const FINISH: Duration = Duration::from_secs(10);

/// How many connections the webhook has at a time: a few of each API server, and whoever else comes to see it.
const WEBHOOK_CONNECTIONS: usize = 256;

/// How many questions of the webhook the API server is asked at a time. One review may have hundreds.
const WEBHOOK_QUESTIONS: usize = 64;

/// How long it is believed that the webhook answered. Each look is a TLS handshake, and anyone can ask for one.
const READINESS_LASTS: Duration = Duration::from_millis(500);

/// How many rights are remembered at most: some megabytes.
const MOST_REMEMBERED: usize = 10_000;

type Queue = mpsc::UnboundedSender<ObjectRef<ApiKey>>;

/// Why the operator stops.
enum Stop {
    /// SIGTERM or SIGINT.
    Asked,
    /// Another replica may lead now.
    Lost,
    /// A task that must not end has ended.
    Broken(supervisor::Ended),
}

/// Runs until SIGTERM or SIGINT, or until leadership is lost.
///
/// # Errors
/// If it can't start: no API server, no address to listen on. If a task ends that must not.
#[expect(clippy::too_many_lines, reason = "one list of what starts, in its order")]
pub async fn run(args: OperatorArgs) -> Result<ExitCode, Fatal> {
    let clock = Clock::system();
    let mut config = cluster_config().await?;
    // Every request has its own bound; a read timeout on top would cut quiet watches.
    config.read_timeout = None;
    // Connections of its own for the lease, and for what the webhook asks: however much of that there is, the lease is
    // renewed, and keys are worked on.
    let builder =
        || ClientBuilder::try_from(config.clone()).map_err(|error| Fatal(format!("no Kubernetes client: {error}")));
    let (client, lease_client) = (builder()?.build(), builder()?.build());
    let webhook_client = builder()?.with_layer(&ConcurrencyLimitLayer::new(WEBHOOK_QUESTIONS)).build();
    let shipped = match &args.catalog_dir {
        Some(directory) => {
            permission_catalog::shipped(directory).map_err(|why| Fatal(format!("--catalog-dir: {why}")))?
        }
        None => vec![],
    };
    let client_ca = match &args.webhook_client_ca {
        Some(file) => Some(
            certs::ClientCa::load(file)
                .await
                .map_err(|error| Fatal(format!("--webhook-client-ca {}: {error}", file.display())))?,
        ),
        None => None,
    };
    let shutdown = CancellationToken::new();
    let (leads, leader) = watch::channel(false);
    // What every replica does until the process ends, and what the leader does until the lease is another's.
    let (mut serving, mut leading) = (Supervisor::default(), Supervisor::default());

    // What every replica knows.
    let index = Arc::new(Index::default());
    let writer = Writer::<ApiKey>::default();
    let keys = writer.as_reader();
    let backoff = Arc::new(Backoff::default());
    let reveal_backoff = Arc::new(Backoff::default());
    let certificates = Certificates::of(&args, &client, &clock);
    let resolver = certificates.resolver();

    let metrics = {
        let (backoff, reveals, resolver) = (Arc::clone(&backoff), Arc::clone(&reveal_backoff), Arc::clone(&resolver));
        Metrics::new(
            keys.clone(),
            clock.clone(),
            move || backoff.failing() + reveals.failing(),
            move || {
                let status = resolver.status();
                let seconds = |t: k8s_openapi::jiff::Timestamp| t.as_second() as f64;
                (status.leaf_not_after.map(seconds), status.ca_not_after.map(seconds))
            },
        )
    };
    let (events, publish) = Events::new(client.clone(), &args.pod_name, metrics.clone(), clock.clone());
    serving.spawn("the publication of Events", publish);
    let context = Arc::new(api_key::Context {
        client: client.clone(),
        index: Arc::clone(&index),
        keys: keys.clone(),
        clock: clock.clone(),
        events: events.clone(),
        metrics: metrics.clone(),
        backoff,
        checks: Checks::every(args.secret_check_interval),
        sealing: Keeper::new(client.clone(), &args.pod_namespace, &args.sealing_secret, !args.check_roles),
    });

    // Watches feed the index on every replica, and the queue on the one that leads.
    let (queue, queued) = mpsc::unbounded_channel();
    let catalogs_changed = Arc::new(Notify::new());
    let policies_changed = Arc::new(Notify::new());
    let keys_changed = Arc::new(Notify::new());
    let policies_writer = Writer::<AccessPolicy>::default();
    let policies = policies_writer.as_reader();
    let looks = Looks { index: Arc::clone(&index), keys: keys.clone(), queue: queue.clone(), leader: leader.clone() };
    serving.spawn(
        "the watch of ApiKeys",
        feed_keys(
            client.clone(),
            Arc::clone(&context),
            writer,
            queue.clone(),
            leader.clone(),
            [Arc::clone(&policies_changed), Arc::clone(&keys_changed)],
        ),
    );
    serving.spawn(
        "the watch of AccessPolicies",
        feed_policies(client.clone(), looks.clone(), policies_writer, Arc::clone(&policies_changed)),
    );
    serving.spawn("the watch of SecuritySettings", feed_settings(client.clone(), looks));
    serving.spawn(
        "the watch of PermissionCatalogs",
        feed_catalogs(
            client.clone(),
            Arc::clone(&index),
            keys.clone(),
            queue.clone(),
            leader.clone(),
            Arc::clone(&catalogs_changed),
        ),
    );

    // The webhook, on every replica.
    let (news, heard) = admission::secrets::News::new(Arc::clone(&index), leader.clone(), metrics.clone());
    leading.spawn("the renewal of certificates", certificates.run(leader.clone(), shutdown.clone()));
    let tls = match &client_ca {
        Some(ca) => {
            serving.spawn("the watch of the webhook's client CA", Arc::clone(ca).follow());
            resolver.server_config_for(Arc::clone(ca) as _)
        }
        None => resolver.server_config(),
    };
    let tls = Some(Arc::new(tls.map_err(|error| Fatal(format!("no TLS: {error}")))?));
    let router = admission::router(admission::Context {
        index: Arc::clone(&index),
        keys: keys.clone(),
        reviewer: Arc::new(Cached::new(Cluster::new(webhook_client), args.access_cache_ttl, MOST_REMEMBERED)),
        roles: args.check_roles,
        clock: clock.clone(),
        metrics: metrics.clone(),
        news,
    });
    let socket = listener::bind("--webhook-address", args.webhook_address)?;
    let (webhook, places) = (axum_server::Handle::new(), Places::new(WEBHOOK_CONNECTIONS));
    let mut webhook_server = Supervisor::default();
    webhook_server
        .spawn("the webhook's server", listener::serve(socket, tls, webhook.clone(), places, move || router.clone()));

    // Health and metrics.
    let (readiness, follow) = Readiness::new(&args, client.clone(), Arc::clone(&index), client_ca, shutdown.clone());
    serving.spawn("the watch of the webhook configuration", follow);
    let socket = listener::bind("--health-address", args.health_address)?;
    serving.spawn("the server of health and metrics", health::serve(socket, readiness.probe(), metrics.registry()));

    // The one that leads writes.
    let mut lease_config = LeaseConfig::new(&args.pod_namespace, &args.lease_name, &args.pod_name);
    lease_config.identity = format!("{}_{}", args.pod_name, std::process::id());
    lease_config.address = args.advertised();
    let released = CancellationToken::new();
    let mut election =
        tokio::spawn(lease::run(lease_client.clone(), lease_config.clone(), clock.clone(), leads, released.clone()));
    // Writes to Secrets lead to looks at them, by the one that leads.
    let peer = Peer {
        address: lease_config.leader.subscribe(),
        bundle: readiness.bundle.clone(),
        server_name: readiness.server_name.clone(),
    };
    let look = look_at_secret(Arc::clone(&context), keys.clone(), queue.clone());
    serving.spawn("the notices of writes to Secrets", news::run(heard, leader.clone(), peer, metrics.clone(), look));
    let revealer = key_reveal::Context {
        keys: Arc::clone(&context),
        backoff: reveal_backoff,
        look: {
            let queue = queue.clone();
            Box::new(move |namespace, name| drop(queue.send(ObjectRef::new(name).within(namespace))))
        },
        ttl: args.reveal_ttl.try_into().unwrap_or(SignedDuration::MAX),
    };
    leading.spawn("the controller of KeyReveals", reveal(Arc::new(revealer), leader.clone(), shutdown.clone()));
    if let Some(to) = &args.export_digests {
        let exporter = Exporter::new(client, args.export_kind, &to.namespace, &to.name, &args.pod_name);
        let export = export::run(exporter, keys.clone(), clock.clone(), leader.clone(), keys_changed, shutdown.clone());
        leading.spawn("the export of digests", export);
    }
    leading.spawn(
        "the controller of ApiKeys",
        control(Arc::clone(&context), keys, (queue, queued), leader.clone(), args.concurrency, shutdown.clone()),
    );
    leading.spawn(
        "the controller of AccessPolicies",
        report_policies(Arc::clone(&context), policies, leader.clone(), policies_changed, shutdown.clone()),
    );
    leading.spawn(
        "the controller of PermissionCatalogs",
        keep_catalogs(context, shipped, leader, catalogs_changed, (clock, events), shutdown.clone()),
    );
    tracing::info!(webhook = %args.webhook_address, health = %args.health_address, "started");

    let stop = tokio::select! {
        () = stop_signal() => Stop::Asked,
        // However it ended, nobody renews the lease any more.
        ended = &mut election => {
            if let Err(error) = ended {
                tracing::error!(%error, "the election has ended, which it must not");
            }
            Stop::Lost
        }
        ended = leading.ended() => Stop::Broken(ended),
        ended = serving.ended() => Stop::Broken(ended),
        ended = webhook_server.ended() => Stop::Broken(ended),
    };
    shutdown.cancel();
    if matches!(stop, Stop::Lost) {
        // Another replica may write already. Whatever is under way is safe (creates and resourceVersions see to it), but
        // nothing new may start.
        tracing::error!("leadership lost; stopping");
        leading.abort().await;
    } else {
        if let Stop::Broken(ended) = &stop {
            tracing::error!("{ended}; stopping");
        } else {
            tracing::info!("stopping");
        }
        // What is being written is finished before somebody else may start to write.
        leading.finish(FINISH).await;
    }
    metrics.set_leader(false);
    released.cancel();
    // The webhook needs no lead: requests are answered until no API server sends any here, whatever the reason is.
    let release = async {
        if !election.is_finished() {
            let _ = timeout(FINISH, &mut election).await;
        }
        // The API server still calls this replica for a while, so that there are notices for the next leader.
        let _ = timeout(DRAIN, lease::follow(lease_client, lease_config)).await;
    };
    tokio::join!(release, sleep(DRAIN));
    webhook.graceful_shutdown(Some(DRAIN));
    webhook_server.finish(DRAIN + Duration::from_secs(1)).await;
    serving.abort().await;
    tracing::info!("stopped");
    match stop {
        Stop::Asked => Ok(ExitCode::SUCCESS),
        Stop::Lost => Ok(ExitCode::FAILURE),
        Stop::Broken(ended) => Err(Fatal(ended.to_string())),
    }
}

/// Has the keys that claim a Secret read it.
fn look_at_secret(
    context: Arc<api_key::Context>,
    keys: Store<ApiKey>,
    queue: Queue,
) -> impl Fn(&admission::secrets::Notice) + Send {
    move |notice| {
        for name in context.index.claimants(&notice.namespace, &notice.secret) {
            let reference = ObjectRef::new(&name).within(&notice.namespace);
            if let Some(uid) = keys.get(&reference).and_then(|key| key.uid()) {
                context.checks.now(&uid);
                // A closed queue means that the process is stopping.
                let _ = queue.send(reference);
            }
        }
    }
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

/// ApiKeys into the store, the index and, on the leader, the queue.
async fn feed_keys(
    client: Client,
    context: Arc<api_key::Context>,
    mut writer: Writer<ApiKey>,
    queue: Queue,
    leader: watch::Receiver<bool>,
    changed: [Arc<Notify>; 2],
) {
    let mut events = std::pin::pin!(feed::watch::<ApiKey>(client, feed::compact_key));
    let store = writer.as_reader();
    while let Some(event) = events.next().await {
        let before = match &event {
            Event::Apply(key) | Event::Delete(key) => store.get(&reference(key)),
            _ => None,
        };
        context.index.apply_key(&event);
        writer.apply_watcher_event(&event);
        match &event {
            Event::Apply(key) => context.index.digests.replace(before.as_deref(), Some(key)),
            Event::Delete(key) => {
                context.index.digests.replace(before.as_deref(), None);
                api_key::forget(key, &context);
            }
            Event::InitDone => {
                let keys = store.state();
                context.index.digests.reset(keys.iter().map(AsRef::as_ref));
                api_key::retain(&keys, &context);
            }
            Event::Init | Event::InitApply(_) => {}
        }
        // A last use that was written is no news for the export, nor for the reports on policies.
        let is_news = match (&event, &before) {
            (Event::Apply(key), Some(before)) => !is_same(before, key),
            _ => true,
        };
        for changed in changed.iter().filter(|_| is_news) {
            changed.notify_one();
        }
        if !*leader.borrow() {
            continue;
        }
        // A closed queue means that the process is stopping.
        let _ = match &event {
            Event::Apply(key) => queue.send(reference(key)),
            Event::Delete(key) => {
                let namespace = key.namespace().unwrap_or_default();
                let others = context.index.others_like(&namespace, key);
                others.iter().try_for_each(|name| queue.send(ObjectRef::new(name).within(&namespace)))
            }
            Event::InitDone => send_all(&writer.as_reader(), &queue),
            Event::Init | Event::InitApply(_) => Ok(()),
        };
    }
}

/// PermissionCatalogs into the index; when the merged catalogue changes, every key is looked at again, which costs no
/// request unless something changes for it.
async fn feed_catalogs(
    client: Client,
    index: Arc<Index>,
    keys: Store<ApiKey>,
    queue: Queue,
    leader: watch::Receiver<bool>,
    changed: Arc<Notify>,
) {
    let mut events = std::pin::pin!(feed::watch::<PermissionCatalog>(client, |_| {}));
    while let Some(event) = events.next().await {
        if index.apply_catalog(&event) {
            changed.notify_one();
            if *leader.borrow() {
                let _ = send_all(&keys, &queue);
            }
        }
    }
}

/// What it takes to have keys looked at again.
#[derive(Clone)]
struct Looks {
    index: Arc<Index>,
    keys: Store<ApiKey>,
    queue: Queue,
    leader: watch::Receiver<bool>,
}

impl Looks {
    /// Asks for a look at these keys, if this replica leads.
    fn ask(&self, keys: impl IntoIterator<Item = ObjectRef<ApiKey>>) {
        if *self.leader.borrow() {
            // A closed queue means that the process is stopping.
            let _ = keys.into_iter().try_for_each(|key| self.queue.send(key));
        }
    }
}

/// AccessPolicies into the store and the index; the keys that refer to one that changed are looked at again.
async fn feed_policies(client: Client, looks: Looks, mut writer: Writer<AccessPolicy>, changed: Arc<Notify>) {
    let mut events = std::pin::pin!(feed::watch::<AccessPolicy>(client, |_| {}));
    while let Some(event) = events.next().await {
        let policies = looks.index.apply_policy(&event);
        writer.apply_watcher_event(&event);
        changed.notify_one();
        for (namespace, policy) in policies {
            let keys = looks.index.keys_of_policy(&namespace, &policy);
            looks.ask(keys.keys().map(|name| ObjectRef::new(name).within(&namespace)));
        }
    }
}

/// SecuritySettings into the index; the keys of a namespace whose settings changed are looked at again.
async fn feed_settings(client: Client, looks: Looks) {
    let mut events = std::pin::pin!(feed::watch::<SecuritySettings>(client, |_| {}));
    while let Some(event) = events.next().await {
        let changed: BTreeSet<_> = looks.index.apply_settings(&event).into_iter().map(|(ns, _)| ns).collect();
        if !changed.is_empty() {
            let keys = looks.keys.state();
            let concerned = |key: &&Arc<ApiKey>| key.namespace().is_some_and(|namespace| changed.contains(&namespace));
            looks.ask(keys.iter().filter(concerned).map(|key| reference(key)));
        }
    }
}

/// Answers KeyReveals from the moment of leadership until shutdown.
async fn reveal(context: Arc<key_reveal::Context>, mut leader: watch::Receiver<bool>, shutdown: CancellationToken) {
    let start = async {
        let led = leader.wait_for(|leads| *leads).await.is_ok();
        while !context.keys.index.is_synced() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        led
    };
    if shutdown.run_until_cancelled(start).await == Some(true) {
        key_reveal::run(context, shutdown).await;
    }
}

/// Name and namespace alone: the queue keeps a reference for every key, and needs no more to find it.
fn reference(key: &ApiKey) -> ObjectRef<ApiKey> {
    ObjectRef::new(&key.name_any()).within(key.metadata.namespace.as_deref().unwrap_or_default())
}

fn send_all(keys: &Store<ApiKey>, queue: &Queue) -> Result<(), mpsc::error::SendError<ObjectRef<ApiKey>>> {
    keys.state().iter().try_for_each(|key| queue.send(reference(key)))
}

/// Reconciles from the moment of leadership until shutdown; ends when what was under way is done.
async fn control(
    context: Arc<api_key::Context>,
    keys: Store<ApiKey>,
    (queue, queued): (Queue, mpsc::UnboundedReceiver<ObjectRef<ApiKey>>),
    mut leader: watch::Receiver<bool>,
    concurrency: u16,
    shutdown: CancellationToken,
) {
    tokio::select! {
    () = shutdown.cancelled() => return,
    led = leader.wait_for(|leads| *leads) => if led.is_err() { return },
    }
    context.metrics.set_leader(true);
    // Names can't be judged before the catalogues are known.
    while !context.index.is_synced() {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
    let _ = send_all(&keys, &queue);
    let requests = stream::unfold(queued, |mut queued| async move {
        queued.recv().await.map(|key| (Ok::<_, Infallible>(ReconcileRequest::from(key)), queued))
    })
    .take_until(shutdown.cancelled_owned());
    applier(
        |key, context| api_key::reconcile(key, context).boxed(),
        |key, error, context| api_key::retry(&key, error, &context),
        context,
        keys,
        requests.boxed(),
        controller::Config::default().concurrency(concurrency),
    )
    .for_each(|result| {
        if let Err(error @ controller::Error::RunnerError(_)) = &result {
            tracing::error!(%error, "the controller stopped working");
        }
        // Failures were logged where they happened; that an object is gone is no failure.
        ready(())
    })
    .await;
}

/// Applies the catalogues that are shipped, then writes the status of all whenever the merge may have changed.
async fn keep_catalogs(
    context: Arc<api_key::Context>,
    mut shipped: Vec<PermissionCatalog>,
    mut leader: watch::Receiver<bool>,
    changed: Arc<Notify>,
    (clock, events): (Clock, Events),
    shutdown: CancellationToken,
) {
    if shutdown.run_until_cancelled(leader.wait_for(|leads| *leads)).await.is_none_or(|led| led.is_err()) {
        return;
    }
    let backoff = Backoff::default();
    let mut next_try = tokio::time::Instant::now();
    loop {
        let mut failed = false;
        if !shipped.is_empty() && next_try <= tokio::time::Instant::now() {
            shipped = permission_catalog::install(&context.client, shipped).await;
            next_try = tokio::time::Instant::now() + backoff.failed("shipped");
        }
        for (catalog, report) in context.index.catalogs() {
            if shutdown.is_cancelled() {
                return;
            }
            if let Err(error) = permission_catalog::report(&context.client, &catalog, &report, &clock, &events).await {
                tracing::warn!(catalog = catalog.name_any(), %error, "the catalogue's status could not be written");
                failed = true;
            }
        }
        let pause = async {
            if failed {
                sleep(Duration::from_secs(5)).await;
            } else if shipped.is_empty() {
                changed.notified().await;
            } else {
                // A change of another catalogue is reported while this one is refused.
                let _ = tokio::time::timeout_at(next_try, changed.notified()).await;
            }
        };
        if shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// Writes the status of AccessPolicies when they or the keys that refer to them change.
async fn report_policies(
    context: Arc<api_key::Context>,
    policies: Store<AccessPolicy>,
    mut leader: watch::Receiver<bool>,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) {
    /// Many keys change at once when a team is set up: one report is enough.
    const PAUSE: Duration = Duration::from_millis(500);

    let begin = async {
        let led = leader.wait_for(|leads| *leads).await.is_ok();
        // Before everything is listed, the count of keys would be wrong.
        while !context.index.is_synced() {
            sleep(Duration::from_millis(50)).await;
        }
        led
    };
    if shutdown.run_until_cancelled(begin).await != Some(true) {
        return;
    }
    loop {
        let mut failed = false;
        for policy in policies.state() {
            if shutdown.is_cancelled() {
                return;
            }
            let keys = context.index.keys_of_policy(&policy.namespace().unwrap_or_default(), &policy.name_any());
            if let Err(error) = access_policy::report(&context.client, &policy, &keys, &context.clock).await {
                tracing::warn!(
                    namespace = policy.namespace(),
                    name = policy.name_any(),
                    %error,
                    "the policy's status could not be written"
                );
                failed = true;
            }
        }
        let pause = async {
            if failed {
                sleep(Duration::from_secs(5)).await;
            } else {
                changed.notified().await;
                sleep(PAUSE).await;
            }
        };
        if shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// The two sources of the webhook's certificate.
enum Certificates {
    SelfManaged(certs::SelfManaged),
    Files(certs::Files),
}

impl Certificates {
    fn of(args: &OperatorArgs, client: &Client, clock: &Clock) -> Self {
        let now: certs::Now = {
            let clock = clock.clone();
            Arc::new(move || clock.now())
        };
        if let Some(directory) = &args.webhook_cert_dir {
            return Self::Files(certs::Files::new(directory, now));
        }
        // Readiness looks at the last: once that has the bundle, so have those before it.
        let targets = vec![
            certs::Target::mutating(&args.stamp_configuration),
            certs::Target::validating(&args.webhook_configuration),
        ];
        let mut config =
            certs::Config::new(&args.pod_namespace, &args.webhook_ca_secret, &args.webhook_service, targets);
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

    fn resolver(&self) -> Arc<certs::Resolver> {
        match self {
            Self::SelfManaged(source) => source.resolver(),
            Self::Files(source) => source.resolver(),
        }
    }

    async fn run(self, leader: watch::Receiver<bool>, shutdown: CancellationToken) {
        match self {
            Self::SelfManaged(source) => source.run(leader, shutdown).await,
            Self::Files(source) => source.run(shutdown).await,
        }
    }
}

/// Knows whether an admission request that arrived now would be answered.
struct Readiness {
    index: Arc<Index>,
    bundle: watch::Receiver<Option<Vec<u8>>>,
    address: std::net::SocketAddr,
    server_name: String,
    client_ca: Option<Arc<certs::ClientCa>>,
    /// When the webhook was last asked, and how that went. Held while it is asked, so that one look serves all who wait.
    asked: Mutex<Option<(Instant, Result<(), String>)>>,
    shutdown: CancellationToken,
}

impl Readiness {
    /// With the task that follows the webhook configuration, to know whom the API server trusts.
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
                // As long as one of them lacks it, there is more to be published.
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
            asked: Mutex::default(),
            shutdown,
        };
        (Arc::new(readiness), follow)
    }

    fn probe(self: &Arc<Self>) -> health::Readiness {
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
        let mut asked = self.asked.lock().await;
        if let Some((_, answer)) = asked.as_ref().filter(|(at, _)| at.elapsed() < READINESS_LASTS) {
            return answer.clone();
        }
        let identity = self.client_ca.as_ref().map(|ca| (ca.own().certificate.clone(), ca.own().key()));
        let answer = admission::self_check::ask(self.address, &self.server_name, &bundle, identity).await;
        *asked = Some((Instant::now(), answer.clone()));
        answer
    }
}
