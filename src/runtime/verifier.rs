//! Wires the verifier together. [`run`] starts its parts from top to bottom.

use std::{
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use kube::Client;
use rustls::{ServerConfig, server::NoServerSessionStorage};
use tokio_util::sync::CancellationToken;

use super::{
    StartupError, args::VerifierArgs, cluster_config, health, operator::stop_signal, supervisor::Supervisor,
    verifier_metrics,
};
use crate::{
    api::PermissionCatalog,
    certs::{CertError, Files, Resolver},
    clock::Clock,
    index::{
        catalogs::Catalogs,
        key_index::KeyIndex,
        partial::{self, PartialApiKey},
        watch::{self, WatchMode},
    },
    net::listener::{self, Bodies, ConnectionLimit},
    verify::{
        Verifier, VerifierOptions,
        decision_log::{DecisionLog, Sampling},
        freshness::{Freshness, Stage, WATCH},
        last_used::LastUsed,
        server::{BODIES, CheckService},
    },
};

/// The time for which the verifier serves after SIGTERM, until proxies no longer call it.
const DRAIN: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// If the verifier can't start, or if a task ends unexpectedly.
pub async fn run(args: VerifierArgs) -> Result<ExitCode, StartupError> {
    let clock = Clock::system();
    let config = cluster_config().await?;
    let no_client = StartupError::Client;
    let shutdown = CancellationToken::new();

    // The in-memory state and its age.
    let keys = Arc::new(KeyIndex::default());
    let freshness = Freshness::default();
    let lists = Arc::new(AtomicU64::new(0));
    let keys_client = freshness.keys().client(config.clone(), clock.clone()).map_err(no_client)?;
    let catalogs_client = freshness.catalogs().client(config.clone(), clock.clone()).map_err(no_client)?;
    let mut tasks = Supervisor::default();
    tasks.spawn(
        "the watch of ApiKeys",
        watch_keys(keys_client, Arc::clone(&keys), freshness.clone(), clock.clone(), Arc::clone(&lists)),
    );
    tasks.spawn(
        "the watch of PermissionCatalogs",
        watch_catalogs(catalogs_client, Arc::clone(&keys), freshness.clone(), clock.clone()),
    );

    let heartbeat = freshness.keys().clone();
    let verifier = Arc::new(verifier(&args, Arc::clone(&keys), freshness, clock.clone()));

    // Writes of lastUsedAt. They have a separate client, since their responses do not prove that the watch is current.
    let last_used = if args.last_used_interval.is_zero() {
        None
    } else {
        let client = Client::try_from(config).map_err(no_client)?;
        let last_used = LastUsed { keys, client, heartbeat, interval: args.last_used_interval, writes: Arc::default() };
        let writes = Arc::clone(&last_used.writes);
        tasks.spawn("the writer of lastUsedAt", last_used.run());
        Some(writes)
    };

    // The front ends.
    let certificate = args.tls_dir.as_ref().map(|directory| watch_certificate(directory, &clock, &mut tasks));
    let tls = certificate.as_ref().map(tls_config).transpose().map_err(StartupError::Tls)?;
    let socket = listener::bind("--address", args.address)?;
    let connections = ConnectionLimit::new(args.max_connections.get());
    let bodies = Bodies::new(BODIES);
    let handle = axum_server::Handle::new();
    let mut checks = Supervisor::default();
    checks.spawn("the listener", {
        let checks = CheckService { verifier: Arc::clone(&verifier), bodies: Arc::clone(&bodies) };
        listener::serve(socket, tls, handle.clone(), Arc::clone(&connections), move || checks.clone())
    });

    // Health and metrics.
    let metrics = verifier_metrics::registry(verifier_metrics::Sources {
        verifier: Arc::clone(&verifier),
        last_used,
        lists,
        connections,
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
        return Err(ended.into());
    }
    tracing::info!("stopping");
    // The verifier is no longer ready, so that no new requests are routed to it, but it still serves them.
    shutdown.cancel();
    tokio::time::sleep(DRAIN).await;
    handle.graceful_shutdown(Some(DRAIN));
    checks.finish(DRAIN + Duration::from_secs(1)).await;
    tasks.abort().await;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// The state that the front ends share.
fn verifier(args: &VerifierArgs, keys: Arc<KeyIndex>, freshness: Freshness, clock: Clock) -> Verifier {
    let unless_off = |permission: &String| Some(permission.clone()).filter(|permission| permission != "off");
    Verifier {
        keys,
        freshness,
        clock,
        options: VerifierOptions {
            sources: args.key_from.clone(),
            default_permission: args.default_permission.clone(),
            introspection_permission: unless_off(&args.introspection_permission),
            introspection_cluster_permission: unless_off(&args.introspection_cluster_permission),
            tell_key_names: args.tell_key_names,
            max_staleness: Some(args.max_staleness).filter(|max| !max.is_zero()),
        },
        decision_log: DecisionLog::new(Sampling {
            allowed_one_in: args.log_allowed_one_in,
            refused_per_second: args.log_refused_per_second,
        }),
    }
}

/// Starts the watch of the certificate in a directory.
fn watch_certificate(directory: &Path, clock: &Clock, tasks: &mut Supervisor) -> Arc<Resolver> {
    let clock = clock.clone();
    let files = Files::new(directory, Arc::new(move || clock.now()));
    let resolver = files.resolver();
    // This watch does not stop at shutdown, since the verifier serves longer.
    tasks.spawn("the watch of the certificate", files.run(CancellationToken::new()));
    resolver
}

fn tls_config(certificate: &Arc<Resolver>) -> Result<Arc<ServerConfig>, CertError> {
    let mut config = certificate.server_config()?;
    // No session resumption. nginx stores the verification result of the certificate with a session, so after an invalid
    // certificate it would reject a valid one while it resumes that session.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// ApiKeys: into the key index. The catalogs come first, so that the names in the first list of ApiKeys can be
/// resolved.
async fn watch_keys(client: Client, keys: Arc<KeyIndex>, freshness: Freshness, clock: Clock, lists: Arc<AtomicU64>) {
    while !freshness.catalogs().is_synced() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let heartbeat = freshness.keys().clone();
    let mut events =
        std::pin::pin!(watch::raw::<PartialApiKey>(client, WatchMode::Prompt(WATCH), move || heartbeat.failed()));
    while let Some(event) = events.next().await {
        let stage = Stage::of(&event);
        partial::apply(&keys, event);
        freshness.keys().heard(stage, clock.exact());
        if stage == Stage::Listed {
            lists.fetch_add(1, Ordering::Relaxed);
            let size = keys.size();
            tracing::info!(keys = size.keys, digests = size.digests, bytes = size.bytes, "all ApiKeys are listed");
        }
    }
}

/// PermissionCatalogs: into the key index.
async fn watch_catalogs(client: Client, keys: Arc<KeyIndex>, freshness: Freshness, clock: Clock) {
    let mut catalogs = Catalogs::default();
    let heartbeat = freshness.catalogs().clone();
    let failed = move || heartbeat.failed();
    let mut events =
        std::pin::pin!(watch::watch_at::<PermissionCatalog>(client, |_| {}, WatchMode::Prompt(WATCH), failed));
    while let Some(event) = events.next().await {
        if catalogs.apply(&event) {
            keys.set_catalog(catalogs.merged());
        }
        freshness.catalogs().heard(Stage::of(&event), clock.exact());
    }
}

/// Ready from the first complete lists, with a certificate, until shutdown. Readiness does not depend on the API
/// server: while it is unavailable, it cannot learn of the change, and the state is still usable.
fn readiness(
    verifier: Arc<Verifier>,
    certificate: Option<Arc<Resolver>>,
    shutdown: CancellationToken,
) -> health::ReadinessProbe {
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
