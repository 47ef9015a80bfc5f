//! The controllers, which run on the leader only.

use std::{convert::Infallible, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::jiff::SignedDuration;
use kube::{
    ResourceExt,
    runtime::{
        applier,
        controller::{self, ReconcileRequest},
        reflector::{ObjectRef, Store},
    },
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{Requeue, Shared};
use crate::{
    api::{AccessPolicy, ApiKey, PermissionCatalog},
    clock::Clock,
    controller::{
        access_policy,
        api_key::{self, ApiKeyContext},
        backoff::Backoff,
        export::{self, DigestExporter},
        key_reveal::{self, KeyRevealContext},
        permission_catalog,
    },
    runtime::supervisor::Supervisor,
};

/// The delay before a controller retries a failed write.
const RETRY: Duration = Duration::from_secs(5);

/// Starts the controllers. Each of them waits until this replica leads and the index is complete.
pub(super) fn start(
    shared: &Shared,
    queued: mpsc::UnboundedReceiver<ObjectRef<ApiKey>>,
    policies: Store<AccessPolicy>,
    shipped: Vec<PermissionCatalog>,
    leading: &mut Supervisor,
) {
    let Shared { args, context, changes, .. } = shared;
    let lead = || Lead { leader: shared.leader.clone(), shutdown: shared.shutdown.clone() };
    let requeue = shared.requeue.clone();
    let reveals = KeyRevealContext {
        keys: Arc::clone(context),
        backoff: Arc::clone(&shared.reveal_backoff),
        requeue: Box::new(move |namespace, name| requeue.keys([ObjectRef::new(name).within(namespace)])),
        ttl: args.reveal_ttl.try_into().unwrap_or(SignedDuration::MAX),
    };
    leading.spawn("the controller of KeyReveals", answer_reveals(Arc::new(reveals), lead()));
    if let Some(to) = &args.export_digests {
        let client = context.client.clone();
        let exporter = DigestExporter::new(client, args.export_kind, &to.namespace, &to.name, &args.pod_name);
        let (keys, clock, changed) = (context.keys.clone(), context.clock.clone(), Arc::clone(&changes.keys));
        leading.spawn("the export of digests", export_digests(exporter, keys, clock, changed, lead()));
    }
    let queue = (shared.requeue.clone(), queued);
    leading.spawn("the controller of ApiKeys", reconcile_keys(Arc::clone(context), queue, args.concurrency, lead()));
    leading.spawn(
        "the controller of AccessPolicies",
        report_policies(Arc::clone(context), policies, Arc::clone(&changes.policies), lead()),
    );
    leading.spawn(
        "the controller of PermissionCatalogs",
        report_catalogs(Arc::clone(context), shipped, Arc::clone(&changes.catalogs), lead()),
    );
}

/// Waits for leadership and for the index.
struct Lead {
    leader: watch::Receiver<bool>,
    shutdown: CancellationToken,
}

impl Lead {
    /// Waits until this replica leads. Returns false if the process stops first.
    async fn begins(&mut self) -> bool {
        let leads = self.leader.wait_for(|leads| *leads);
        self.shutdown.run_until_cancelled(leads).await.is_some_and(|leads| leads.is_ok())
    }

    /// Waits until the index is complete. Returns false if the process stops first.
    async fn is_synced(&self, context: &ApiKeyContext) -> bool {
        let synced = async {
            while !context.index.is_synced() {
                sleep(Duration::from_millis(50)).await;
            }
        };
        self.shutdown.run_until_cancelled(synced).await.is_some()
    }
}

/// Answers KeyReveals.
async fn answer_reveals(context: Arc<KeyRevealContext>, mut lead: Lead) {
    if lead.begins().await && lead.is_synced(&context.keys).await {
        key_reveal::run(context, lead.shutdown).await;
    }
}

/// Exports the digests of the values that work.
async fn export_digests(
    exporter: DigestExporter,
    keys: Store<ApiKey>,
    clock: Clock,
    changed: Arc<Notify>,
    mut lead: Lead,
) {
    if lead.begins().await {
        export::run(exporter, keys, clock, changed, lead.shutdown).await;
    }
}

/// Reconciles ApiKeys. Reconciliations in flight are finished at shutdown.
async fn reconcile_keys(
    context: Arc<ApiKeyContext>,
    (requeue, queued): (Requeue, mpsc::UnboundedReceiver<ObjectRef<ApiKey>>),
    concurrency: u16,
    mut lead: Lead,
) {
    if !lead.begins().await {
        return;
    }
    context.metrics.set_leader(true);
    // Permissions can't be checked before the catalogs are known.
    if !lead.is_synced(&context).await {
        return;
    }
    let keys = context.keys.clone();
    requeue.all(&keys);
    let requests = stream::unfold(queued, |mut queued| async move {
        queued.recv().await.map(|key| (Ok::<_, Infallible>(ReconcileRequest::from(key)), queued))
    })
    .take_until(lead.shutdown.cancelled_owned());
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
        // api_key::retry logs failed reconciliations. An object that no longer exists is not a failure.
        ready(())
    })
    .await;
}

/// Applies the shipped catalogs, and writes the status of each catalog when the merged catalog may have changed.
async fn report_catalogs(
    context: Arc<ApiKeyContext>,
    mut shipped: Vec<PermissionCatalog>,
    changed: Arc<Notify>,
    mut lead: Lead,
) {
    if !lead.begins().await {
        return;
    }
    let ApiKeyContext { client, clock, events, .. } = &*context;
    let backoff = Backoff::default();
    let mut next_try = Instant::now();
    loop {
        let mut failed = false;
        if !shipped.is_empty() && next_try <= Instant::now() {
            shipped = permission_catalog::install(client, shipped).await;
            next_try = Instant::now() + backoff.failed("shipped");
        }
        for (catalog, report) in context.index.catalogs() {
            if lead.shutdown.is_cancelled() {
                return;
            }
            if let Err(error) = permission_catalog::report(client, &catalog, &report, clock, events).await {
                let catalog = catalog.name_any();
                tracing::warn!(catalog, %error, "cannot write the status of the PermissionCatalog; retrying");
                failed = true;
            }
        }
        let pause = async {
            if failed {
                sleep(RETRY).await;
            } else if shipped.is_empty() {
                changed.notified().await;
            } else {
                // The statuses of other catalogs are written while the API server rejects a shipped one.
                let _ = timeout_at(next_try, changed.notified()).await;
            }
        };
        if lead.shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// Writes the status of AccessPolicies when they or the ApiKeys that refer to them change.
async fn report_policies(
    context: Arc<ApiKeyContext>,
    policies: Store<AccessPolicy>,
    changed: Arc<Notify>,
    mut lead: Lead,
) {
    /// When many ApiKeys of a team are created, one report covers them.
    const PAUSE: Duration = Duration::from_millis(500);

    // The report contains the number of ApiKeys, so it needs the complete list.
    if !lead.begins().await || !lead.is_synced(&context).await {
        return;
    }
    loop {
        let mut failed = false;
        for policy in policies.state() {
            if lead.shutdown.is_cancelled() {
                return;
            }
            let keys = context.index.keys_of_policy(&policy.namespace().unwrap_or_default(), &policy.name_any());
            if let Err(error) = access_policy::report(&context.client, &policy, &keys, &context.clock).await {
                tracing::warn!(
                    namespace = policy.namespace(),
                    name = policy.name_any(),
                    %error,
                    "cannot write the status of the AccessPolicy; retrying"
                );
                failed = true;
            }
        }
        let pause = async {
            if failed {
                sleep(RETRY).await;
            } else {
                changed.notified().await;
                sleep(PAUSE).await;
            }
        };
        if lead.shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}
