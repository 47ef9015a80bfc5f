//! The controller of ApiKeys.
//!
//! A new ApiKey usually costs three requests: it reads the SecuritySettings, creates the Secret and writes the status.
//! An event that changes nothing costs no request.

pub mod act;
mod check_schedule;
mod digest_claims;
mod legacy;
pub mod observe;
mod report;

use std::{collections::HashSet, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Client, ResourceExt,
    runtime::{controller::Action, reflector::Store},
};

use tracing::Instrument;

pub use self::check_schedule::SecretChecks;
use self::{
    act::{ConflictPolicy, SecretTarget, StepResult},
    check_schedule::CheckInterval,
};
use super::{RequestError, backoff::Backoff, events::Events, key_reveal::orphan, still_exists};
use crate::{
    api::{ApiKey, ApiKeyStatus, SecuritySettingsSpec},
    clock::Clock,
    domain::{
        authorization::KnownPolicy,
        inputs::Inputs,
        legacy::Obstacle,
        lifecycle::{self, Observed, Step},
        status,
        validate::{self, Validation},
    },
    index::Index,
    sealing::SealingKeyStore,
    telemetry::{
        metrics::{Metrics, ReconcileResult},
        traces::TARGET as SPAN_TARGET,
    },
};

/// The dependencies of the controller.
pub struct ApiKeyContext {
    /// The client of the API server.
    pub client: Client,
    /// The state that watches keep in memory.
    pub index: Arc<Index>,
    /// Every ApiKey.
    pub keys: Store<ApiKey>,
    /// The source of the current time.
    pub clock: Clock,
    /// The queue of Events.
    pub events: Events,
    /// The metrics.
    pub metrics: Metrics,
    /// The backoff of ApiKeys.
    pub backoff: Arc<Backoff>,
    /// The times of the next checks of Secrets.
    pub checks: SecretChecks,
    /// The store of the sealing keys.
    pub sealing: SealingKeyStore,
}

/// The maximum number of attempts when another writer changes the Secret.
const MAX_ATTEMPTS: u8 = 3;

/// Removes the state in memory of a deleted ApiKey.
pub fn forget(key: &ApiKey, context: &ApiKeyContext) {
    let uid = key.uid().unwrap_or_default();
    context.backoff.forget(&uid);
    context.checks.forget(&uid);
    context.index.digests.forget(&uid);
}

/// Removes the state in memory of ApiKeys that are not in `keys`, which is a complete list. A new list contains no
/// deletions.
pub fn retain(keys: &[Arc<ApiKey>], context: &ApiKeyContext) {
    let live: HashSet<&str> = keys.iter().filter_map(|key| key.metadata.uid.as_deref()).collect();
    context.backoff.retain(|uid| live.contains(uid));
    context.checks.retain(|uid| live.contains(uid));
    context.index.digests.retain(|uid| live.contains(uid));
}

/// Reconciles one ApiKey, with at most one write of its Secret, and records metrics and a span.
///
/// # Errors
/// If a request failed. The status reports the failure, if it could be written.
pub async fn reconcile(key: Arc<ApiKey>, context: Arc<ApiKeyContext>) -> Result<Action, RequestError> {
    let started = std::time::Instant::now();
    let _working = context.events.working();
    let span = tracing::info_span!(
        target: SPAN_TARGET,
        "reconcile",
        k8s.object.kind = "ApiKey",
        k8s.namespace.name = key.metadata.namespace,
        k8s.object.name = key.metadata.name,
        k8s.object.uid = key.metadata.uid,
        keywright.key.id = key.status.as_ref().and_then(|status| status.id.as_deref()),
        error = tracing::field::Empty,
    );
    let result = run(&key, &context).instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("error", tracing::field::display(error));
    }
    let outcome = if result.is_ok() { ReconcileResult::Success } else { ReconcileResult::Error };
    context.metrics.reconciled(outcome, started.elapsed());
    result
}

/// Schedules the next attempt after a failure.
#[must_use]
pub fn retry(key: &ApiKey, error: &RequestError, context: &ApiKeyContext) -> Action {
    if !still_exists(&context.keys, key) {
        return Action::await_change();
    }
    let uid = key.uid().unwrap_or_default();
    let wait = if error.is_permanent() { context.backoff.blocked(&uid) } else { context.backoff.failed(&uid) };
    let (namespace, name) = (key.namespace(), key.name_any());
    tracing::warn!(namespace, name, %error, retry_in = ?wait, "reconciliation failed");
    Action::requeue(wait)
}

/// Reconciles one ApiKey: gather, observe, decide, act, report, schedule.
async fn run(key: &ApiKey, context: &ApiKeyContext) -> Result<Action, RequestError> {
    if key.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let gathered = Gathered::of(key, context);
    let outcome = if key.spec.legacy.is_some() {
        legacy::observe(&gathered, context).await
    } else {
        observe_and_act(&gathered, context).await
    };
    let status = gathered.status(&outcome);
    let next_change = lifecycle::next_wake(key, &status, gathered.settings.as_deref(), gathered.now);
    let reported = report::report(key, &gathered.namespace, status, outcome.minted, context).await?;
    if !reported {
        // The ApiKey changed meanwhile. The watch queues it again; the requeue covers an event that is lost.
        return Ok(Action::requeue(Duration::from_secs(5)));
    }
    if let Some((_, error)) = outcome.error {
        return Err(error);
    }
    if let (true, Observed::Ours(secret)) = (outcome.claimed, &outcome.secret) {
        orphan::remove_if_orphaned(&context.client, &gathered.namespace, key, secret).await?;
    }
    Ok(schedule(&gathered, &outcome, next_change, context))
}

/// The inputs of a reconciliation that need no request.
struct Gathered<'a> {
    key: &'a ApiKey,
    uid: String,
    namespace: String,
    now: Timestamp,
    validation: Validation,
    conflicting_claim: Option<String>,
    settings: Option<Arc<SecuritySettingsSpec>>,
    policy: Option<Arc<KnownPolicy>>,
    /// The time of the next check of the Secret.
    check_at: Timestamp,
}

impl<'a> Gathered<'a> {
    fn of(key: &'a ApiKey, context: &ApiKeyContext) -> Self {
        let (now, uid) = (context.clock.now(), key.uid().unwrap_or_default());
        let (index, namespace) = (&context.index, key.namespace().unwrap_or_default());
        let policy = key.spec.access_policy_ref.as_ref();
        Self {
            validation: validate::check(&key.spec, &index.catalog()),
            conflicting_claim: index.conflicting_claim(&namespace, key, true),
            settings: index.settings(&namespace),
            policy: policy.and_then(|policy| index.policy(&namespace, &policy.name)),
            check_at: context.checks.due_at(&uid, now),
            key,
            uid,
            namespace,
            now,
        }
    }

    fn must_read(&self) -> bool {
        lifecycle::must_read(self.key, self.settings.as_deref(), self.now, self.check_at <= self.now)
    }

    fn inputs<'b>(&'b self, secret: &'b Observed) -> Inputs<'b> {
        Inputs {
            conflicting_claim: self.conflicting_claim.as_deref(),
            settings: self.settings.as_deref(),
            policy: self.policy.as_deref(),
            ..Inputs::new(self.key, &self.validation, secret, self.now)
        }
    }

    fn status(&self, outcome: &Outcome) -> ApiKeyStatus {
        let failure = outcome.error.as_ref().map(|(reason, error)| error.failure(reason));
        status::build(&Inputs {
            import: outcome.import.as_ref(),
            failure: failure.as_ref(),
            ..self.inputs(&outcome.secret)
        })
    }
}

/// The result of observing and acting.
#[derive(Default)]
struct Outcome {
    /// The state of the Secret after the step.
    secret: Observed,
    /// Whether the Secret holds the answer to a KeyReveal.
    claimed: bool,
    /// Whether a value was minted.
    minted: bool,
    /// The reason why a legacy key can't be imported.
    import: Option<Obstacle>,
    /// The failed request, with the reason of the condition.
    error: Option<(&'static str, RequestError)>,
}

/// Reads the Secret if necessary, decides on a step and carries it out. Repeats this at most [`MAX_ATTEMPTS`] times
/// while another writer changes the Secret; then the backoff applies.
async fn observe_and_act(gathered: &Gathered<'_>, context: &ApiKeyContext) -> Outcome {
    let Gathered { key, namespace, now, .. } = gathered;
    let target = SecretTarget::new(&context.client, &context.sealing, namespace, key);
    let mut outcome = Outcome::default();
    let mut read = gathered.must_read();
    for attempt in 1..=MAX_ATTEMPTS {
        if read {
            match observe::find(&target).await {
                Ok(found) => {
                    outcome.claimed = found.claimed.is_some();
                    outcome.secret = digest_claims::claim_digests(key, namespace, found.observed, context);
                }
                Err(error) => {
                    outcome.error = Some(("SecretReadFailed", error));
                    break;
                }
            }
        }
        let step = lifecycle::step(&gathered.inputs(&outcome.secret));
        let verb = if matches!(step, Step::Mint(_)) { "create" } else { "update" };
        let policy = if attempt == MAX_ATTEMPTS { ConflictPolicy::Override } else { ConflictPolicy::Yield };
        match target.act(step, policy, *now).await {
            Ok(StepResult::Conflict) if attempt == MAX_ATTEMPTS => {
                let message = format!(
                    "{verb} Secret {}: conflict with another writer in {MAX_ATTEMPTS} attempts (409)",
                    target.secret_ref.name
                );
                outcome.error = Some(("SecretWriteFailed", RequestError::new_local(message)));
            }
            Ok(StepResult::Conflict) => read = true,
            Ok(StepResult::NothingToDo) => break,
            Ok(StepResult::Written { secret, minted }) => {
                outcome.secret = Observed::Ours(secret);
                outcome.minted = minted;
                break;
            }
            Err(error) => {
                outcome.error = Some(("SecretWriteFailed", error));
                break;
            }
        }
    }
    outcome
}

/// Schedules the next reconciliation without an event. `next_change` is the next time at which the state of the ApiKey
/// changes.
fn schedule(
    gathered: &Gathered<'_>,
    outcome: &Outcome,
    next_change: Option<Timestamp>,
    context: &ApiKeyContext,
) -> Action {
    let Gathered { key, uid, now, check_at, .. } = gathered;
    let is_legacy = key.spec.legacy.is_some();
    if outcome.secret != Observed::NotRead {
        context.checks.done(uid, *check_at, *now, CheckInterval::of(&outcome.secret, is_legacy));
    }
    if let (Observed::Foreign { passing, .. }, false) = (&outcome.secret, is_legacy) {
        // A conflict that a user has to resolve is not a failure of the operator.
        let wait = if *passing { context.backoff.failed(uid) } else { context.backoff.blocked(uid) };
        return Action::requeue(wait);
    }
    context.backoff.forget(uid);
    // The Secret that a restored or a legacy key waits for causes no event.
    let waits = outcome.import.is_some() || lifecycle::awaits_secret(key, *now);
    let recheck_at = waits.then(|| now.checked_add(lifecycle::recheck_delay(key, *now)).ok()).flatten();
    let next = [next_change, recheck_at].into_iter().flatten().fold(context.checks.due_at(uid, *now), Timestamp::min);
    // Times in a status have whole seconds. Half a second is added, so that the change is due then.
    let wait = Duration::try_from(next.duration_since(*now)).unwrap_or_default() + Duration::from_millis(500);
    Action::requeue(wait)
}

#[cfg(test)]
mod property_tests;
