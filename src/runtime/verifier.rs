//! Wires the verifier together. Read it from top to bottom: that is the order in which things start.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use kube::Client;
use rustls::server::NoServerSessionStorage;
use tokio_util::sync::CancellationToken;

use super::{
    Fatal,
    args::VerifierArgs,
    clock::Clock,
    cluster_config, health,
    listener::{self, Bodies, Places},
    operator::stop_signal,
    supervisor::Supervisor,
    verifier_metrics,
};
use crate::{
    api::PermissionCatalog,
    certs::{Files, Resolver},
    index::{
        catalogs::Catalogs,
        feed::{self, Pace},
        keyring::Keyring,
        wire::{self, WireKey},
    },
    verify::{
        Options, Verifier,
        freshness::{Freshness, Stage, WATCH},
        journal::{Journal, Sampling},
        last_used::LastUsed,
        server::{BODIES, Checks},
    },
};

/// How long requests are still answered after SIGTERM: until no proxy sends anything here any more.
const DRAIN: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// If it can't start: no API server, no address to listen on. If a task ends that must not.
pub async fn run(args: VerifierArgs) -> Result<ExitCode, Fatal> {
    let clock = Clock::system();
    let config = cluster_config().await?;
    let no_client = |error: kube::Error| Fatal(format!("no Kubernetes client: {error}"));
    let shutdown = CancellationToken::new();

    // What is known, and how old that is.
    let keys = Arc::new(Keyring::default());
    let freshness = Freshness::default();
    let lists = Arc::new(AtomicU64::new(0));
    let keys_client = freshness.keys().client(config.clone(), clock.clone()).map_err(no_client)?;
    let catalogs_client = freshness.catalogs().client(config.clone(), clock.clone()).map_err(no_client)?;
    let mut tasks = Supervisor::default();
    tasks.spawn(
        "the watch of ApiKeys",
        feed_keys(keys_client, Arc::clone(&keys), freshness.clone(), clock.clone(), Arc::clone(&lists)),
    );
    tasks.spawn(
        "the watch of PermissionCatalogs",
        feed_catalogs(catalogs_client, Arc::clone(&keys), freshness.clone(), clock.clone()),
    );

    let unless_off = |permission| Some(permission).filter(|permission| permission != "off");
    let heartbeat = freshness.keys().clone();
    let verifier = Arc::new(Verifier {
        keys: Arc::clone(&keys),
        freshness,
        clock: clock.clone(),
        options: Options {
            sources: args.key_from,
            default_permission: args.default_permission,
            introspection_permission: unless_off(args.introspection_permission),
            introspection_cluster_permission: unless_off(args.introspection_cluster_permission),
            tell_key_names: args.tell_key_names,
            max_staleness: Some(args.max_staleness).filter(|most| !most.is_zero()),
        },
        journal: Journal::new(Sampling {
            allowed_one_in: args.log_allowed_one_in,
            refused_per_second: args.log_refused_per_second,
        }),
    });

    // What is told to the cluster, by a client of its own: its requests say nothing of how fresh the watch is.
    let last_used = if args.last_used_interval.is_zero() {
        None
    } else {
        let client = Client::try_from(config).map_err(no_client)?;
        let told = LastUsed { keys, client, heartbeat, interval: args.last_used_interval, writes: Arc::default() };
        let writes = Arc::clone(&told.writes);
        tasks.spawn("the writing of lastUsedAt", told.run());
        Some(writes)
    };

    // The front ends.
    let certificate = args.tls_dir.map(|directory| {
        let clock = clock.clone();
        let files = Files::new(directory, Arc::new(move || clock.now()));
        let resolver = files.resolver();
        // Not until shutdown alone: requests are answered for a while longer.
        tasks.spawn("the watch of the certificate", files.run(CancellationToken::new()));
        resolver
    });
    let tls = certificate.as_ref().map(Resolver::server_config).transpose();
    let tls = tls.map_err(|error| Fatal(format!("no TLS: {error}")))?.map(|mut config| {
        // No session outlives its connection: nginx keeps with a session what it thought of the certificate, and would
        // refuse a good one for as long as it resumes one that was not.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    });
    let socket = listener::bind("--address", args.address)?;
    let places = Places::new(args.max_connections.get());
    let bodies = Bodies::new(BODIES);
    let handle = axum_server::Handle::new();
    let mut checks = Supervisor::default();
    checks.spawn("the listener", {
        let checks = Checks { verifier: Arc::clone(&verifier), bodies: Arc::clone(&bodies) };
        listener::serve(socket, tls, handle.clone(), Arc::clone(&places), move || checks.clone())
    });

    // Health and metrics.
    let metrics = verifier_metrics::registry(verifier_metrics::Sources {
        verifier: Arc::clone(&verifier),
        last_used,
        lists,
        places,
        bodies,
        certificate: certificate.clone(),
    });
    let socket = listener::bind("--health-address", args.health_address)?;
    let ready = readiness(verifier, certificate, shutdown.clone());
    tasks.spawn("the server of health and metrics", health::serve(socket, ready, metrics));
    tracing::info!(address = %args.address, health = %args.health_address, "started");

    let ended = tokio::select! {
        () = stop_signal() => None,
        ended = checks.ended() => Some(ended),
        ended = tasks.ended() => Some(ended),
    };
    if let Some(ended) = ended {
        tracing::error!("{ended}");
        return Err(Fatal(ended.to_string()));
    }
    tracing::info!("stopping");
    // Not ready from here on, so that nothing new is sent here; what comes all the same is answered.
    shutdown.cancel();
    tokio::time::sleep(DRAIN).await;
    handle.graceful_shutdown(Some(DRAIN));
    checks.finish(DRAIN + Duration::from_secs(1)).await;
    tasks.abort().await;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// ApiKeys into the keyring. After the catalogues, so that every name in the first list can be told from one that no
/// catalogue has.
async fn feed_keys(client: Client, keys: Arc<Keyring>, freshness: Freshness, clock: Clock, lists: Arc<AtomicU64>) {
    while !freshness.catalogs().is_synced() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let heartbeat = freshness.keys().clone();
    let mut events = std::pin::pin!(feed::raw::<WireKey>(client, Pace::Brisk(WATCH), move || heartbeat.failed()));
    while let Some(event) = events.next().await {
        let stage = Stage::of(&event);
        wire::apply(&keys, event);
        freshness.keys().heard(stage, clock.exact());
        if stage == Stage::Listed {
            lists.fetch_add(1, Ordering::Relaxed);
            let size = keys.size();
            tracing::info!(keys = size.keys, digests = size.digests, bytes = size.bytes, "all ApiKeys are known");
        }
    }
}

/// PermissionCatalogs into the keyring.
async fn feed_catalogs(client: Client, keys: Arc<Keyring>, freshness: Freshness, clock: Clock) {
    let mut catalogs = Catalogs::default();
    let heartbeat = freshness.catalogs().clone();
    let failed = move || heartbeat.failed();
    let mut events = std::pin::pin!(feed::watch_at::<PermissionCatalog>(client, |_| {}, Pace::Brisk(WATCH), failed));
    while let Some(event) = events.next().await {
        if catalogs.apply(&event) {
            keys.set_catalog(catalogs.merged());
        }
        freshness.catalogs().heard(Stage::of(&event), clock.exact());
    }
}

/// Ready once everything was listed and there is a certificate, until shutdown. Not while the API server is away: it
/// could not be told, and what is known is still good.
fn readiness(
    verifier: Arc<Verifier>,
    certificate: Option<Arc<Resolver>>,
    shutdown: CancellationToken,
) -> health::Readiness {
    Arc::new(move || {
        let ready = if shutdown.is_cancelled() {
            Err("stopping".to_owned())
        } else if !verifier.is_synced() {
            Err("waiting for the first list of ApiKeys and PermissionCatalogs".to_owned())
        } else {
            match certificate.as_ref().map(|resolver| resolver.status()) {
                Some(status) if status.leaf_not_after.is_none() => {
                    Err(format!("waiting for a certificate: {}", status.problem.unwrap_or_default()))
                }
                _ => Ok(()),
            }
        };
        std::future::ready(ready).boxed()
    })
}
