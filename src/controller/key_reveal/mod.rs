//! The controller of KeyReveals.
//!
//! It authorizes each KeyReveal by the gates of [`crate::domain::authorization`]. The answer to a granted one is the
//! value, encrypted to `spec.recipient`. A one-time value is revealed by four writes: the Secret
//! ([`act::claim_value`]), the status of the ApiKey, the status of the KeyReveal, and the Secret again
//! ([`act::remove_answer`]). After a crash between two of them, the same KeyReveal finds its claim and continues; every
//! other KeyReveal is denied. If the KeyReveal is deleted before the last write, `remove_answers_of_deleted` removes
//! the answer. If its deletion caused no event, the next reconciliation that reads the Secret removes the answer
//! ([`orphan`]).

pub mod act;
pub mod orphan;

use std::{collections::HashSet, convert::Infallible, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Preconditions},
    core::Status,
    runtime::{
        applier,
        controller::{self, Action, ReconcileRequest},
        reflector::{ObjectRef, store::Writer},
        watcher::Event,
    },
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    RequestError, add, api_key,
    api_key::{
        act::SecretTarget,
        observe::{self, FoundSecret},
    },
    backoff::Backoff,
    patch_params, patch_status_if, reference, request, status_patch, still_exists, test,
};
use crate::{
    access::{self, ClusterReviewer},
    api::{ApiKey, KeyReveal, KeyRevealStatus, KeyState, Requester, RevealMode, Time, creator_of_key},
    domain::{
        authorization::{self, AuthorizationInputs},
        lifecycle::{Observed, OwnedSecret, Schedule},
        policy::User,
        record::{Claim, Sealed},
        status::{Note, merge_condition},
    },
    index::watch,
    sealing,
};

/// The number of KeyReveals that are reconciled concurrently.
const CONCURRENCY: u16 = 8;

/// The time after its creation for which a KeyReveal waits until the value of its key is minted.
const MINTING_TIMEOUT: SignedDuration = SignedDuration::from_secs(15);

/// The delay until the next reconciliation of a KeyReveal that waits.
const REQUEUE_DELAY: Duration = Duration::from_secs(1);

/// The maximum number of deleted KeyReveals whose answers wait for removal. Users can create and delete many of them.
const MAX_DELETED: usize = 10_000;

/// The maximum number of attempts when another writer changes the Secret.
const MAX_ATTEMPTS: u8 = 5;

/// Queues an ApiKey for reconciliation, by namespace and name.
pub type RequeueFn = Box<dyn Fn(&str, &str) + Send + Sync>;

/// The dependencies of the controller.
pub struct KeyRevealContext {
    /// The dependencies of the controller of ApiKeys.
    pub keys: Arc<api_key::ApiKeyContext>,
    /// The backoff of KeyReveals. It is separate from that of ApiKeys, which keeps entries of existing ApiKeys only.
    pub backoff: Arc<Backoff>,
    /// Queues the ApiKey of a KeyReveal, so that its status shows the reveal.
    pub requeue: RequeueFn,
    /// The time after its creation when a KeyReveal is deleted.
    pub ttl: SignedDuration,
}

/// The result of a KeyReveal.
enum RevealOutcome {
    Granted {
        ciphertext: String,
        id: String,
        one_time: bool,
    },
    Denied {
        reason: &'static str,
        message: String,
    },
    /// No result yet.
    Wait,
    /// No result yet, since a request to the API server failed. The operator retries.
    Retrying(String),
}

/// A deleted KeyReveal whose answer may still be in the Secret of its key.
struct DeletedReveal {
    namespace: String,
    key: String,
    uid: String,
}

impl DeletedReveal {
    /// `None` if the Secret holds no answer: the KeyReveal was denied, or the value is not a one-time value.
    fn of(reveal: &KeyReveal) -> Option<Self> {
        let status = reveal.status.as_ref();
        let has_no_answer = status.is_some_and(|status| is_answered(status) && status.one_time != Some(true));
        (!has_no_answer).then(|| Self {
            namespace: reveal.namespace().unwrap_or_default(),
            key: reveal.spec.api_key_ref.name.clone(),
            uid: reveal.uid().unwrap_or_default(),
        })
    }
}

fn is_answered(status: &KeyRevealStatus) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == "Granted" && condition.status != "Unknown")
}

fn denied(reason: &'static str, message: impl Into<String>) -> RevealOutcome {
    RevealOutcome::Denied { reason, message: message.into() }
}

/// Reconciles KeyReveals until shutdown. Call it while this replica leads and after the index is complete.
pub async fn run(context: Arc<KeyRevealContext>, shutdown: CancellationToken) {
    let writer = Writer::<KeyReveal>::default();
    let reveals = writer.as_reader();
    let events = watch::watch::<KeyReveal>(context.keys.client.clone(), |_| {});
    let (deleted_sender, deleted) = mpsc::channel(MAX_DELETED);
    let forget = {
        let context = Arc::clone(&context);
        move |reveal: &KeyReveal| {
            context.backoff.forget(&reveal.uid().unwrap_or_default());
            // If the channel is full, the next reconciliation that reads the Secret removes the answer.
            DeletedReveal::of(reveal).and_then(|deleted| deleted_sender.try_send(deleted).ok());
        }
    };
    let queued = events
        .scan(writer, move |writer, event| {
            let store = writer.as_reader();
            // A new list contains no deletions. They are the difference to the objects before it.
            let before = if matches!(event, Event::InitDone) { store.state() } else { vec![] };
            writer.apply_watcher_event(&event);
            let to_reconcile: Vec<ObjectRef<KeyReveal>> = match &event {
                Event::Apply(reveal) => vec![reference(reveal)],
                Event::InitDone => {
                    let now = store.state();
                    let live: HashSet<_> = now.iter().map(|reveal| reveal.metadata.uid.as_deref()).collect();
                    before
                        .iter()
                        .filter(|reveal| !live.contains(&reveal.metadata.uid.as_deref()))
                        .for_each(|r| forget(r));
                    now.iter().map(|reveal| reference(&**reveal)).collect()
                }
                Event::Delete(reveal) => {
                    forget(reveal);
                    vec![]
                }
                Event::Init | Event::InitApply(_) => vec![],
            };
            ready(Some(futures::stream::iter(to_reconcile)))
        })
        .flatten()
        .map(|reveal| Ok::<_, Infallible>(ReconcileRequest::from(reveal)))
        .take_until(shutdown.clone().cancelled_owned());
    let existing = reveals.clone();
    let reconciling = applier(
        |reveal, context| reconcile(reveal, context).boxed(),
        move |reveal: Arc<KeyReveal>, error: &RequestError, context: Arc<KeyRevealContext>| {
            if !still_exists(&existing, &*reveal) {
                return Action::await_change();
            }
            let (namespace, name) = (reveal.namespace(), reveal.name_any());
            let wait = context.backoff.failed(&reveal.uid().unwrap_or_default());
            tracing::warn!(namespace, name, %error, retry_in = ?wait, "reconciliation of a KeyReveal failed");
            Action::requeue(wait)
        },
        Arc::clone(&context),
        reveals,
        queued.boxed(),
        controller::Config::default().concurrency(CONCURRENCY),
    )
    .for_each(|_| ready(()));
    let removing = shutdown.run_until_cancelled(remove_answers_of_deleted(deleted, &context));
    futures::join!(reconciling, removing);
}

/// Removes the answers of deleted KeyReveals, one after the other. After [`MAX_ATTEMPTS`] failures, removal is left to
/// the next reconciliation that reads the Secret.
async fn remove_answers_of_deleted(mut deleted: mpsc::Receiver<DeletedReveal>, context: &KeyRevealContext) {
    while let Some(DeletedReveal { namespace, key, uid }) = deleted.recv().await {
        for _ in 0..MAX_ATTEMPTS {
            let Err(error) = remove_answer(&key, &namespace, &uid, context).await else { break };
            let wait = context.backoff.failed(&uid);
            tracing::warn!(
                namespace,
                name = key,
                %error,
                retry_in = ?wait,
                "the answer of a deleted KeyReveal could not be removed from the Secret"
            );
            tokio::time::sleep(wait).await;
        }
        context.backoff.forget(&uid);
    }
}

/// Reconciles one KeyReveal, and reports errors in its status.
async fn reconcile(reveal: Arc<KeyReveal>, context: Arc<KeyRevealContext>) -> Result<Action, RequestError> {
    let error = match try_reconcile(&reveal, &context).await {
        Ok(action) => return Ok(action),
        Err(error) => error,
    };
    if reveal.status.as_ref().is_some_and(is_answered) {
        return Err(error);
    }
    let namespace = reveal.namespace().unwrap_or_default();
    let expires_at = expires_at(&reveal, &context);
    let Some(advice) = error.advice() else {
        report(&reveal, &namespace, RevealOutcome::Retrying(error.explained()), expires_at, None, &context).await?;
        return Err(error);
    };
    // The API server would reject the same request again. After the cause is fixed, the user creates another KeyReveal.
    let message = format!("{error}; {advice}, then create the KeyReveal again");
    report(&reveal, &namespace, denied("RequestRefused", message), expires_at, None, &context).await?;
    let name = reveal.name_any();
    tracing::warn!(namespace, name, %error, "denied a KeyReveal: the API server rejected a write that it requires");
    Ok(Action::requeue(REQUEUE_DELAY))
}

/// The time when a KeyReveal is deleted.
fn expires_at(reveal: &KeyReveal, context: &KeyRevealContext) -> Timestamp {
    let created = reveal.creation_timestamp().map_or_else(|| context.keys.clock.now(), |at| at.0);
    created.checked_add(context.ttl).unwrap_or(Timestamp::MAX)
}

async fn try_reconcile(reveal: &KeyReveal, context: &KeyRevealContext) -> Result<Action, RequestError> {
    if reveal.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let now = context.keys.clock.now();
    let namespace = reveal.namespace().unwrap_or_default();
    let created = reveal.creation_timestamp().map_or(now, |at| at.0);
    let expires_at = expires_at(reveal, context);
    let uid = reveal.uid().unwrap_or_default();
    if expires_at <= now {
        context.backoff.forget(&uid);
        return delete(reveal, &namespace, context).await;
    }
    let answered = reveal.status.as_ref().filter(|status| is_answered(status));
    if let Some(status) = answered {
        if status.one_time == Some(true) {
            remove_answer(&reveal.spec.api_key_ref.name, &namespace, &uid, context).await?;
        }
        context.backoff.forget(&uid);
        let remaining = Duration::try_from(expires_at.duration_since(now)).unwrap_or_default();
        return Ok(Action::requeue(remaining + Duration::from_millis(500)));
    }
    let Some(requester) = reveal.spec.requester.clone().map(Arc::new) else {
        let message = "spec.requester is missing: install the mutating webhook of Keywright, which sets it, then \
                       create the KeyReveal again";
        report(reveal, &namespace, denied("RequesterMissing", message), expires_at, None, context).await?;
        return Ok(Action::requeue(REQUEUE_DELAY));
    };
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), &namespace);
    let name = &reveal.spec.api_key_ref.name;
    // Read from the API server, since the ApiKey in memory may be older than the KeyReveal.
    let Some(key) = request(&format!("get ApiKey {name}"), keys.get_opt(name)).await? else {
        let message = format!("there is no ApiKey {name} in namespace {namespace}: create it, or name another");
        report(reveal, &namespace, denied("KeyNotFound", message), expires_at, None, context).await?;
        return Ok(Action::requeue(REQUEUE_DELAY));
    };
    let outcome = match authorize(&key, &requester, &namespace, context).await? {
        Some(denial) => denial,
        None => answer(reveal, &key, &requester, &namespace, created, context).await?,
    };
    if !matches!(outcome, RevealOutcome::Wait) {
        report(reveal, &namespace, outcome, expires_at, Some((&key, &requester)), context).await?;
    }
    // The write of the status causes an event. The requeue covers a lost event and outcomes that wait.
    Ok(Action::requeue(REQUEUE_DELAY))
}

async fn delete(reveal: &KeyReveal, namespace: &str, context: &KeyRevealContext) -> Result<Action, RequestError> {
    let reveals: Api<KeyReveal> = Api::namespaced(context.keys.client.clone(), namespace);
    let name = reveal.name_any();
    let this = Preconditions { uid: reveal.uid(), resource_version: None };
    let params = DeleteParams { preconditions: Some(this), ..DeleteParams::default() };
    match request(&format!("delete KeyReveal {name}"), reveals.delete(&name, &params)).await {
        Ok(_) => Ok(Action::await_change()),
        Err(error) if error.is(|s: &Status| s.is_not_found() || s.is_conflict()) => Ok(Action::await_change()),
        Err(error) => Err(error),
    }
}

/// Evaluates the gates. Returns the denial, if any.
async fn authorize(
    key: &ApiKey,
    requester: &Arc<Requester>,
    namespace: &str,
    context: &KeyRevealContext,
) -> Result<Option<RevealOutcome>, RequestError> {
    let index = &context.keys.index;
    let (catalog, settings) = (index.catalog(), index.settings(namespace));
    let authorization = {
        let inputs = AuthorizationInputs {
            requester: User { name: &requester.username, groups: &requester.groups },
            catalog: &catalog,
            settings: settings.as_deref(),
            policy: &|name| index.policy(namespace, name),
        };
        let status = key.status.as_ref();
        let known = creator_of_key(key);
        authorization::reveal(&inputs, &key.spec, status, known.as_ref().map(|creator| creator.name.as_str()))
    };
    if let Some(denial) = authorization.denials.first() {
        return Ok(Some(denied(denial.gate.reason(), format!("{}: {}", denial.field, denial.message))));
    }
    let reviewer = ClusterReviewer::new(context.keys.client.clone());
    let namespace: Arc<str> = namespace.into();
    for demand in &authorization.demands {
        let answer = access::ask(&reviewer, requester, &namespace, &demand.need).await;
        let answer = answer.map_err(|error| RequestError::new_local(error.to_string()))?;
        if !answer.met {
            let message = demand.lacking(&requester.username, &namespace, &answer.missing(&demand.need));
            return Ok(Some(denied(demand.gate.reason(), message)));
        }
    }
    Ok(None)
}

/// Reads the value and encrypts it to the recipient.
async fn answer(
    reveal: &KeyReveal,
    key: &ApiKey,
    requester: &Requester,
    namespace: &str,
    created: Timestamp,
    context: &KeyRevealContext,
) -> Result<RevealOutcome, RequestError> {
    let now = context.keys.clock.now();
    let name = key.name_any();
    let Some(token) = key.status.as_ref().and_then(|status| status.tokens.first()) else {
        let is_final =
            matches!(key.status.as_ref().and_then(|s| s.state), Some(KeyState::Rejected | KeyState::Expired));
        if !is_final && now.duration_since(created) < MINTING_TIMEOUT {
            return Ok(RevealOutcome::Wait);
        }
        let message = format!("ApiKey {name} has no value yet: see its conditions, then create the KeyReveal again");
        return Ok(denied("NotMinted", message));
    };
    if Schedule::of(&key.spec).expired(now) {
        let message =
            format!("ApiKey {name} has expired: set spec.expiresAt to a later time, then create the KeyReveal again");
        return Ok(denied("Expired", message));
    }
    for _ in 0..MAX_ATTEMPTS {
        let found =
            observe::find(&SecretTarget::new(&context.keys.client, &context.keys.sealing, namespace, key)).await?;
        let secret = match &found.observed {
            // The status of a rotation is not written yet.
            Observed::Ours(secret) if secret.record.current.sha256 != token.sha256 => return Ok(RevealOutcome::Wait),
            Observed::Ours(secret) => secret.clone(),
            _ => {
                let message = format!(
                    "the Secret of ApiKey {name} is missing: restore it, or set spec.rotation.requestedAt to the \
                     current time to mint a new value"
                );
                return Ok(denied("SecretLost", message));
            }
        };
        if let Some(outcome) = try_answer(reveal, key, requester, namespace, &secret, found, context).await? {
            return Ok(outcome);
        }
    }
    // Another writer changed the Secret during each attempt.
    Ok(RevealOutcome::Wait)
}

/// Makes one attempt to answer. Returns `None` if another writer changed the Secret.
async fn try_answer(
    reveal: &KeyReveal,
    key: &ApiKey,
    requester: &Requester,
    namespace: &str,
    secret: &OwnedSecret,
    found: FoundSecret,
    context: &KeyRevealContext,
) -> Result<Option<RevealOutcome>, RequestError> {
    let client = &context.keys.client;
    let uid = reveal.uid().unwrap_or_default();
    let id = secret.record.current.id();
    let one_time = secret.record.sealed.as_ref().is_some_and(|sealed| sealed.mode == RevealMode::OneTime);
    if let Some(sealed) = &secret.record.sealed {
        if sealed.erased_at.is_some() {
            let message = "the value was erased because it was not revealed in time: set spec.rotation.requestedAt to \
                           the current time to mint a new one";
            return Ok(Some(denied("ValueErased", message)));
        }
        if let (true, Some(claim)) = (one_time, &sealed.claim) {
            let own = claim.uid == uid && !uid.is_empty();
            return Ok(Some(match found.claimed.filter(|_| own) {
                Some(_) if !record_claim_in_status(key, sealed, claim, namespace, context).await? => {
                    RevealOutcome::Wait
                }
                Some(ciphertext) => RevealOutcome::Granted { ciphertext, id, one_time: true },
                None => denied(
                    "AlreadyRevealed",
                    format!(
                        "the value was revealed to {} at {} and can't be revealed again: set spec.rotation.requestedAt \
                         to the current time to mint a new one",
                        claim.by, claim.at
                    ),
                ),
            }));
        }
    }
    let Some(value) = found.value.filter(|value| value.digest().to_string() == secret.record.current.sha256) else {
        let message = "the Secret no longer holds the value that was minted: set spec.rotation.requestedAt to the \
                       current time to mint a new one";
        return Ok(Some(denied("SecretValueChanged", message)));
    };
    let ciphertext = match sealing::encrypt_to(&reveal.spec.recipient, value.expose().as_bytes()) {
        Ok(ciphertext) => ciphertext,
        Err(error) => return Ok(Some(denied("InvalidRecipient", format!("spec.recipient: {error}")))),
    };
    let claim = Claim { uid, by: requester.username.clone(), at: context.keys.clock.now() };
    let written = match &secret.record.sealed {
        Some(sealed) if one_time => {
            let sealing = &context.keys.sealing;
            let claimed = act::claim_value(client, sealing, namespace, key, secret, claim.clone(), &ciphertext).await?;
            if claimed && !record_claim_in_status(key, sealed, &claim, namespace, context).await? {
                return Ok(Some(RevealOutcome::Wait));
            }
            claimed
        }
        Some(sealed) if sealed.claim.is_none() => {
            act::record_first_view(client, &context.keys.sealing, namespace, key, secret, claim).await?
        }
        _ => true,
    };
    Ok(written.then_some(RevealOutcome::Granted { ciphertext, id, one_time }))
}

/// Writes the claim of a one-time value to the status of its key, before the KeyReveal receives the answer. Where the
/// admission policies of the chart are disabled, users with write access to Secrets can restore the Secret as it was
/// before the claim. They can't change the status. Returns false if the status of the key changed meanwhile.
async fn record_claim_in_status(
    key: &ApiKey,
    sealed: &Sealed,
    claim: &Claim,
    namespace: &str,
    context: &KeyRevealContext,
) -> Result<bool, RequestError> {
    let Some(status) = &key.status else { return Ok(false) };
    let reveal = Sealed { claim: Some(claim.clone()), ..sealed.clone() }.reveal();
    if status.reveal.as_ref() == Some(&reveal) {
        return Ok(true);
    }
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), namespace);
    let operations = vec![
        test(&["metadata", "uid"], json!(key.metadata.uid)),
        test(&["status", "tokens"], json!(status.tokens)),
        add(&["status", "reveal"], json!(reveal)),
    ];
    patch_status_if(&keys, &key.name_any(), operations).await
}

/// Removes the answer to a KeyReveal, which has received it or was deleted, from the Secret of the key.
async fn remove_answer(name: &str, namespace: &str, uid: &str, context: &KeyRevealContext) -> Result<(), RequestError> {
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), namespace);
    for _ in 0..MAX_ATTEMPTS {
        let Some(key) = request(&format!("get ApiKey {name}"), keys.get_opt(name)).await? else { return Ok(()) };
        let found =
            observe::find(&SecretTarget::new(&context.keys.client, &context.keys.sealing, namespace, &key)).await?;
        let Observed::Ours(secret) = &found.observed else { return Ok(()) };
        let claim = secret.record.sealed.as_ref().and_then(|sealed| sealed.claim.as_ref());
        if found.claimed.is_none() || claim.is_none_or(|claim| claim.uid != uid) {
            return Ok(());
        }
        if act::remove_answer(&context.keys.client, namespace, &key, secret).await? {
            return Ok(());
        }
    }
    let message =
        format!("update the Secret of ApiKey {name}: conflict with another writer in {MAX_ATTEMPTS} attempts (409)");
    Err(RequestError::new_local(message))
}

/// Writes the outcome to the status of the KeyReveal. For a granted one, also publishes an Event for the ApiKey and
/// queues the ApiKey, so that its status follows.
async fn report(
    reveal: &KeyReveal,
    namespace: &str,
    outcome: RevealOutcome,
    expires_at: Timestamp,
    about: Option<(&ApiKey, &Arc<Requester>)>,
    context: &KeyRevealContext,
) -> Result<(), RequestError> {
    let now = context.keys.clock.now();
    let name = reveal.name_any();
    let condition = |status, reason, message: &str| {
        vec![merge_condition(&[], "Granted", status, reason, message, reveal.metadata.generation, now)]
    };
    let (mut note, mut lost_note) = (None, None);
    let status = match outcome {
        RevealOutcome::Wait => return Ok(()),
        RevealOutcome::Retrying(message) => KeyRevealStatus {
            conditions: condition("Unknown", "Retrying", &message),
            expires_at: Some(Time(expires_at)),
            ..KeyRevealStatus::default()
        },
        RevealOutcome::Denied { reason, message } => {
            tracing::info!(namespace, name, reason, "denied a KeyReveal");
            KeyRevealStatus {
                conditions: condition("False", reason, &message),
                expires_at: Some(Time(expires_at)),
                ..KeyRevealStatus::default()
            }
        }
        RevealOutcome::Granted { ciphertext, id, one_time } => {
            let by = about.map(|(_, requester)| requester.username.as_str()).unwrap_or_default();
            lost_note = one_time.then(|| {
                format!(
                    "KeyReveal {name} of {by} claimed {id} and was deleted before it received the value: set \
                     spec.rotation.requestedAt to the current time to mint a new value"
                )
            });
            note = Some(format!("{id} was revealed to {by} by KeyReveal {name}"));
            let message = format!("status.ciphertext holds the value of {id}, encrypted to spec.recipient");
            KeyRevealStatus {
                conditions: condition("True", "Granted", &message),
                ciphertext: Some(ciphertext),
                id: Some(id),
                one_time: Some(one_time),
                expires_at: Some(Time(expires_at)),
            }
        }
    };
    // Report the first failure only: each write of the status causes an event, so repeated reports would never end.
    let is_reported = reveal.status.as_ref().is_some_and(|old| !old.conditions.is_empty() && !is_answered(old));
    if is_reported && !is_answered(&status) {
        return Ok(());
    }
    let reveals: Api<KeyReveal> = Api::namespaced(context.keys.client.clone(), namespace);
    let patch = status_patch(reveal, reveal.status.as_ref(), &status);
    let mut warning = false;
    match request("update status", reveals.patch_status(&name, &patch_params(), &patch)).await {
        Ok(_) => {}
        // The event of the other write causes another reconciliation.
        Err(error) if error.is(Status::is_conflict) => return Ok(()),
        // The KeyReveal was deleted. A one-time value that it claimed is lost.
        Err(error) if error.is(Status::is_not_found) => (note, warning) = (lost_note, true),
        Err(error) => return Err(error),
    }
    if let (Some(message), Some((key, _))) = (note, about) {
        tracing::info!(namespace, name = key.name_any(), reason = "Revealed", "{message}");
        context.keys.events.note(key, Note { warning, reason: "Revealed", message });
        context.keys.checks.now(&key.uid().unwrap_or_default());
        (context.requeue)(namespace, &key.name_any());
    }
    Ok(())
}
