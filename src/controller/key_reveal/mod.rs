//! Answers requests to see a value.
//!
//! Each request is judged by the gates of [`crate::domain::gates`], and granted ones are answered encrypted to the
//! requester alone. A value that may be seen once is given in four writes: its Secret ([`act::take`]), the status of
//! the key, the answer, its Secret again ([`act::clear`]). After a crash between any two of them the same request finds its claim and goes on; every other
//! request is told who was first. If the request is deleted before the last, the answer is removed all the same: by the
//! sweeper below, or, where the deletion was missed, by whoever finds it ([`orphan`]).

pub mod act;
pub mod orphan;

use std::{collections::HashSet, convert::Infallible, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, Preconditions},
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
    api_key::observe::{self, Found},
    backoff::Backoff,
    is_there, patch_params, request, status_patch, test,
};
use crate::{
    access::{self, Cluster},
    api::{ApiKey, KeyReveal, KeyRevealStatus, KeyState, Requester, RevealMode, Time, creator_of_key},
    domain::{
        gates::{self, Situation},
        lifecycle::{Held, Observed, Schedule},
        policy::Person,
        record::{Claim, Sealed},
        status::{Note, merge_condition},
    },
    index::feed,
    sealing,
};

/// How many requests are answered at the same time.
const CONCURRENCY: u16 = 8;

/// How long a request for a key that is being minted waits for it.
const MINTING: SignedDuration = SignedDuration::from_secs(15);

/// When to look again at what changes by itself soon.
const SOON: Duration = Duration::from_secs(1);

/// How many deleted requests wait to be cleaned up after. Whoever may ask may make many of them.
const MOST_TO_SWEEP: usize = 10_000;

/// How often an answer looks again when somebody else was faster.
const ROUNDS: u8 = 5;

/// Asks for a look at a key, by namespace and name.
pub type Look = Box<dyn Fn(&str, &str) + Send + Sync>;

/// What answering works with.
pub struct Context {
    /// What the keys themselves are reconciled with.
    pub keys: Arc<api_key::Context>,
    /// Which requests failed how often. Not that of the keys, which forgets whatever is no key.
    pub backoff: Arc<Backoff>,
    /// Lets the controller of keys look at one: its status has to say who saw the value.
    pub look: Look,
    /// How long a request lives.
    pub ttl: SignedDuration,
}

/// What a request comes to.
enum Outcome {
    /// The answer.
    Granted {
        ciphertext: String,
        id: String,
        one_time: bool,
    },
    Denied {
        reason: &'static str,
        message: String,
    },
    /// It is too early to say.
    Wait,
    /// It can't be said, since a request to the API server failed; it is tried again.
    Retrying(String),
}

/// A request that was deleted, and may have left its answer in the Secret of its key.
struct Gone {
    namespace: String,
    key: String,
    uid: String,
}

impl Gone {
    /// `None` if it left nothing: it was denied, or its value can be seen more than once.
    fn of(reveal: &KeyReveal) -> Option<Self> {
        let status = reveal.status.as_ref();
        let left_nothing = status.is_some_and(|status| is_answered(status) && status.one_time != Some(true));
        (!left_nothing).then(|| Self {
            namespace: reveal.namespace().unwrap_or_default(),
            key: reveal.spec.api_key_ref.name.clone(),
            uid: reveal.uid().unwrap_or_default(),
        })
    }
}

fn is_answered(status: &KeyRevealStatus) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == "Granted" && condition.status != "Unknown")
}

fn denied(reason: &'static str, message: impl Into<String>) -> Outcome {
    Outcome::Denied { reason, message: message.into() }
}

/// Answers requests until shutdown. The caller leads, and the index is complete.
pub async fn run(context: Arc<Context>, shutdown: CancellationToken) {
    let writer = Writer::<KeyReveal>::default();
    let reveals = writer.as_reader();
    let events = feed::watch::<KeyReveal>(context.keys.client.clone(), |_| {});
    let (gone, to_sweep) = mpsc::channel(MOST_TO_SWEEP);
    let forget = {
        let context = Arc::clone(&context);
        move |reveal: &KeyReveal| {
            context.backoff.forget(&reveal.uid().unwrap_or_default());
            // If there are too many, whoever looks at the Secret next finds the answer.
            Gone::of(reveal).and_then(|left| gone.try_send(left).ok());
        }
    };
    let requests = events
        .scan(writer, move |writer, event| {
            let store = writer.as_reader();
            let reference = |reveal: &KeyReveal| {
                ObjectRef::new(&reveal.name_any()).within(reveal.metadata.namespace.as_deref().unwrap_or_default())
            };
            // A list that starts over does not say what is gone.
            let before = if matches!(event, Event::InitDone) { store.state() } else { vec![] };
            writer.apply_watcher_event(&event);
            let due: Vec<ObjectRef<KeyReveal>> = match &event {
                Event::Apply(reveal) => vec![reference(reveal)],
                Event::InitDone => {
                    let now = store.state();
                    let live: HashSet<_> = now.iter().map(|reveal| reveal.metadata.uid.as_deref()).collect();
                    before
                        .iter()
                        .filter(|reveal| !live.contains(&reveal.metadata.uid.as_deref()))
                        .for_each(|r| forget(r));
                    now.iter().map(|reveal| reference(reveal)).collect()
                }
                Event::Delete(reveal) => {
                    forget(reveal);
                    vec![]
                }
                Event::Init | Event::InitApply(_) => vec![],
            };
            ready(Some(futures::stream::iter(due)))
        })
        .flatten()
        .map(|reveal| Ok::<_, Infallible>(ReconcileRequest::from(reveal)))
        .take_until(shutdown.clone().cancelled_owned());
    let live = reveals.clone();
    let answering = applier(
        |reveal, context| reconcile(reveal, context).boxed(),
        move |reveal: Arc<KeyReveal>, error: &RequestError, context: Arc<Context>| {
            if !is_there(&live, &*reveal) {
                return Action::await_change();
            }
            let (namespace, name) = (reveal.namespace(), reveal.name_any());
            let wait = context.backoff.failed(&reveal.uid().unwrap_or_default());
            tracing::warn!(namespace, name, %error, retry_in = ?wait, "a request to see a value could not be answered");
            Action::requeue(wait)
        },
        Arc::clone(&context),
        reveals,
        requests.boxed(),
        controller::Config::default().concurrency(CONCURRENCY),
    )
    .for_each(|_| ready(()));
    let sweeping = shutdown.run_until_cancelled(sweep(to_sweep, &context));
    futures::join!(answering, sweeping);
}

/// Removes the answers of requests that were deleted, one at a time. It gives up after some tries: then whoever looks at
/// the Secret next finds the answer.
async fn sweep(mut gone: mpsc::Receiver<Gone>, context: &Context) {
    while let Some(Gone { namespace, key, uid }) = gone.recv().await {
        for _ in 0..ROUNDS {
            let Err(error) = tidy(&key, &namespace, &uid, context).await else { break };
            let wait = context.backoff.failed(&uid);
            tracing::warn!(namespace, name = key, %error, retry_in = ?wait, "the answer of a deleted request could not be removed");
            tokio::time::sleep(wait).await;
        }
        context.backoff.forget(&uid);
    }
}

/// One turn of a request. What went wrong is told in its status, as far as that can be written.
async fn reconcile(reveal: Arc<KeyReveal>, context: Arc<Context>) -> Result<Action, RequestError> {
    let error = match step(&reveal, &context).await {
        Ok(action) => return Ok(action),
        Err(error) => error,
    };
    if reveal.status.as_ref().is_some_and(is_answered) {
        return Err(error);
    }
    let namespace = reveal.namespace().unwrap_or_default();
    let ends = ends(&reveal, &context);
    let Some(advice) = error.advice() else {
        report(&reveal, &namespace, Outcome::Retrying(error.explained()), ends, None, &context).await?;
        return Err(error);
    };
    // It was not carried out, and would be refused again: whoever asked is told, and can ask again.
    let message = format!("{error}; {advice}, and ask again");
    report(&reveal, &namespace, denied("RequestRefused", message), ends, None, &context).await?;
    tracing::warn!(namespace, name = reveal.name_any(), %error, "a request to see a value was denied, since the API server refused to carry it out");
    Ok(Action::requeue(SOON))
}

/// When a request is deleted.
fn ends(reveal: &KeyReveal, context: &Context) -> Timestamp {
    let created = reveal.creation_timestamp().map_or_else(|| context.keys.clock.now(), |at| at.0);
    created.checked_add(context.ttl).unwrap_or(Timestamp::MAX)
}

async fn step(reveal: &KeyReveal, context: &Context) -> Result<Action, RequestError> {
    if reveal.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let now = context.keys.clock.now();
    let namespace = reveal.namespace().unwrap_or_default();
    let created = reveal.creation_timestamp().map_or(now, |at| at.0);
    let ends = ends(reveal, context);
    let uid = reveal.uid().unwrap_or_default();
    if ends <= now {
        context.backoff.forget(&uid);
        return delete(reveal, &namespace, context).await;
    }
    let answered = reveal.status.as_ref().filter(|status| is_answered(status));
    if let Some(status) = answered {
        if status.one_time == Some(true) {
            tidy(&reveal.spec.api_key_ref.name, &namespace, &uid, context).await?;
        }
        context.backoff.forget(&uid);
        let left = Duration::try_from(ends.duration_since(now)).unwrap_or_default();
        return Ok(Action::requeue(left + Duration::from_millis(500)));
    }
    let Some(who) = reveal.spec.requester.clone().map(Arc::new) else {
        let message =
            "the cluster did not say who asks: the mutating webhook of Keywright has to be installed; ask again then";
        report(reveal, &namespace, denied("RequesterMissing", message), ends, None, context).await?;
        return Ok(Action::requeue(SOON));
    };
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), &namespace);
    let name = &reveal.spec.api_key_ref.name;
    // Asked for and not remembered: what is in memory may be older than the request.
    let Some(key) = request(&format!("get ApiKey {name}"), keys.get_opt(name)).await? else {
        let message = format!("there is no ApiKey {name} in namespace {namespace}: create it, or name another");
        report(reveal, &namespace, denied("KeyNotFound", message), ends, None, context).await?;
        return Ok(Action::requeue(SOON));
    };
    let outcome = match judge(&key, &who, &namespace, context).await? {
        Some(denial) => denial,
        None => answer(reveal, &key, &who, &namespace, created, context).await?,
    };
    if !matches!(outcome, Outcome::Wait) {
        report(reveal, &namespace, outcome, ends, Some((&key, &who)), context).await?;
    }
    // The answer comes back as an event; this is in case it does not, and for what has to be waited for.
    Ok(Action::requeue(SOON))
}

async fn delete(reveal: &KeyReveal, namespace: &str, context: &Context) -> Result<Action, RequestError> {
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

/// The gates. `None` if all are open.
async fn judge(
    key: &ApiKey,
    who: &Arc<Requester>,
    namespace: &str,
    context: &Context,
) -> Result<Option<Outcome>, RequestError> {
    let index = &context.keys.index;
    let (catalog, settings) = (index.catalog(), index.settings(namespace));
    let verdict = {
        let situation = Situation {
            who: Person { name: &who.username, groups: &who.groups },
            catalog: &catalog,
            settings: settings.as_deref(),
            policy: &|name| index.policy(namespace, name),
        };
        let status = key.status.as_ref();
        let known = creator_of_key(key);
        gates::reveal(&situation, &key.spec, status, known.as_ref().map(|creator| creator.name.as_str()))
    };
    if let Some(denial) = verdict.denials.first() {
        return Ok(Some(denied(denial.gate.reason(), format!("{}: {}", denial.field, denial.message))));
    }
    let reviewer = Cluster::new(context.keys.client.clone());
    let namespace: Arc<str> = namespace.into();
    for demand in &verdict.demands {
        let answer = access::ask(&reviewer, who, &namespace, &demand.need).await;
        let answer = answer.map_err(|error| RequestError::new_local(error.to_string()))?;
        if !answer.met {
            let message = demand.lacking(&who.username, &namespace, &answer.missing(&demand.need));
            return Ok(Some(denied(demand.gate.reason(), message)));
        }
    }
    Ok(None)
}

/// Finds the value, and encrypts it.
async fn answer(
    reveal: &KeyReveal,
    key: &ApiKey,
    who: &Requester,
    namespace: &str,
    created: Timestamp,
    context: &Context,
) -> Result<Outcome, RequestError> {
    let now = context.keys.clock.now();
    let name = key.name_any();
    let Some(token) = key.status.as_ref().and_then(|status| status.tokens.first()) else {
        let ends = matches!(key.status.as_ref().and_then(|s| s.state), Some(KeyState::Rejected | KeyState::Expired));
        if !ends && now.duration_since(created) < MINTING {
            return Ok(Outcome::Wait);
        }
        return Ok(denied("NotMinted", format!("ApiKey {name} has no value yet: see its conditions, and ask again")));
    };
    if Schedule::of(&key.spec).expired(now) {
        return Ok(denied("Expired", format!("ApiKey {name} has expired: move its spec.expiresAt, and ask again")));
    }
    for _ in 0..ROUNDS {
        let found = observe::find(&context.keys.client, &context.keys.sealing, namespace, key).await?;
        let held = match &found.observed {
            // A rotation is under way: its status comes first.
            Observed::Ours(held) if held.record.current.sha256 != token.sha256 => return Ok(Outcome::Wait),
            Observed::Ours(held) => held.clone(),
            _ => {
                let message = format!(
                    "the Secret of ApiKey {name} is gone: bring it back, or set spec.rotation.requestedAt to the current time to mint a new value"
                );
                return Ok(denied("SecretLost", message));
            }
        };
        if let Some(outcome) = attempt(reveal, key, who, namespace, &held, found, context).await? {
            return Ok(outcome);
        }
    }
    // Others keep writing to the Secret.
    Ok(Outcome::Wait)
}

/// One attempt to answer; `None` if somebody else wrote to the Secret meanwhile.
async fn attempt(
    reveal: &KeyReveal,
    key: &ApiKey,
    who: &Requester,
    namespace: &str,
    held: &Held,
    found: Found,
    context: &Context,
) -> Result<Option<Outcome>, RequestError> {
    let client = &context.keys.client;
    let uid = reveal.uid().unwrap_or_default();
    let id = held.record.current.id();
    let once = held.record.sealed.as_ref().is_some_and(|sealed| sealed.mode == RevealMode::OneTime);
    if let Some(sealed) = &held.record.sealed {
        if sealed.erased_at.is_some() {
            let message = "the value was erased, since nobody revealed it in time: set spec.rotation.requestedAt to the current time to mint a new one";
            return Ok(Some(denied("ValueErased", message)));
        }
        if let (true, Some(claim)) = (once, &sealed.claim) {
            let own = claim.uid == uid && !uid.is_empty();
            return Ok(Some(match found.claimed.filter(|_| own) {
                Some(_) if !remember(key, sealed, claim, namespace, context).await? => Outcome::Wait,
                Some(ciphertext) => Outcome::Granted { ciphertext, id, one_time: true },
                None => denied(
                    "AlreadyRevealed",
                    format!(
                        "the value was revealed to {} at {} and can be revealed once: set spec.rotation.requestedAt to the current time to mint a new one",
                        claim.by, claim.at
                    ),
                ),
            }));
        }
    }
    let Some(value) = found.value.filter(|value| value.digest().to_string() == held.record.current.sha256) else {
        let message = "the Secret no longer holds the value that was minted: set spec.rotation.requestedAt to the current time to mint a new one";
        return Ok(Some(denied("SecretValueChanged", message)));
    };
    let ciphertext = match sealing::encrypt_to(&reveal.spec.recipient, value.expose().as_bytes()) {
        Ok(ciphertext) => ciphertext,
        Err(error) => return Ok(Some(denied("InvalidRecipient", format!("spec.recipient: {error}")))),
    };
    let claim = Claim { uid, by: who.username.clone(), at: context.keys.clock.now() };
    let done = match &held.record.sealed {
        Some(sealed) if once => {
            let sealing = &context.keys.sealing;
            let taken = act::take(client, sealing, namespace, key, held, claim.clone(), &ciphertext).await?;
            if taken && !remember(key, sealed, &claim, namespace, context).await? {
                return Ok(Some(Outcome::Wait));
            }
            taken
        }
        Some(sealed) if sealed.claim.is_none() => {
            act::note(client, &context.keys.sealing, namespace, key, held, claim).await?
        }
        _ => true,
    };
    Ok(done.then_some(Outcome::Granted { ciphertext, id, one_time: once }))
}

/// Writes the claim of a one-time value to the status of its key, before the request gets the answer. Users with write
/// access to Secrets can put the Secret back as it was before the claim where the chart's admission policies are
/// disabled; they can't change the status. False if the status of the key changed meanwhile.
async fn remember(
    key: &ApiKey,
    sealed: &Sealed,
    claim: &Claim,
    namespace: &str,
    context: &Context,
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
    let patch: Patch<()> = Patch::Json(json_patch::Patch(operations));
    match request("update status", keys.patch_status(&key.name_any(), &patch_params(), &patch)).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|s: &Status| s.is_conflict() || s.is_not_found() || s.is_invalid()) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the answer of a request out of the Secret of a key, now that the request has it or is gone.
async fn tidy(name: &str, namespace: &str, uid: &str, context: &Context) -> Result<(), RequestError> {
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), namespace);
    for _ in 0..ROUNDS {
        let Some(key) = request(&format!("get ApiKey {name}"), keys.get_opt(name)).await? else { return Ok(()) };
        let found = observe::find(&context.keys.client, &context.keys.sealing, namespace, &key).await?;
        let Observed::Ours(held) = &found.observed else { return Ok(()) };
        let claim = held.record.sealed.as_ref().and_then(|sealed| sealed.claim.as_ref());
        if found.claimed.is_none() || claim.is_none_or(|claim| claim.uid != uid) {
            return Ok(());
        }
        if act::clear(&context.keys.client, namespace, &key, held).await? {
            return Ok(());
        }
    }
    Err(RequestError::new_local("others keep writing to the Secret (409)".to_owned()))
}

/// Writes the answer, tells of it in an Event on the key, and lets the key's own status follow.
async fn report(
    reveal: &KeyReveal,
    namespace: &str,
    outcome: Outcome,
    ends: Timestamp,
    about: Option<(&ApiKey, &Arc<Requester>)>,
    context: &Context,
) -> Result<(), RequestError> {
    let now = context.keys.clock.now();
    let name = reveal.name_any();
    let condition = |status, reason, message: &str| {
        vec![merge_condition(&[], "Granted", status, reason, message, reveal.metadata.generation, now)]
    };
    let (mut note, mut taken) = (None, None);
    let status = match outcome {
        Outcome::Wait => return Ok(()),
        Outcome::Retrying(message) => KeyRevealStatus {
            conditions: condition("Unknown", "Retrying", &message),
            expires_at: Some(Time(ends)),
            ..KeyRevealStatus::default()
        },
        Outcome::Denied { reason, message } => {
            tracing::info!(namespace, name, reason, "a request to see a value was denied");
            KeyRevealStatus {
                conditions: condition("False", reason, &message),
                expires_at: Some(Time(ends)),
                ..KeyRevealStatus::default()
            }
        }
        Outcome::Granted { ciphertext, id, one_time } => {
            let by = about.map(|(_, who)| who.username.as_str()).unwrap_or_default();
            taken = one_time.then(|| {
                format!(
                    "{id} was taken by {by}, whose KeyReveal {name} was deleted before it was answered: set \
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
                expires_at: Some(Time(ends)),
            }
        }
    };
    // Once is enough: each write has the request looked at again at once, and failures would chase each other.
    let told = reveal.status.as_ref().is_some_and(|old| !old.conditions.is_empty() && !is_answered(old));
    if told && !is_answered(&status) {
        return Ok(());
    }
    let reveals: Api<KeyReveal> = Api::namespaced(context.keys.client.clone(), namespace);
    let patch = status_patch(reveal, reveal.status.as_ref(), &status);
    let mut warning = false;
    match request("update status", reveals.patch_status(&name, &patch_params(), &patch)).await {
        Ok(_) => {}
        // Its event is on the way.
        Err(error) if error.is(Status::is_conflict) => return Ok(()),
        // Nobody gets the answer, and a value that can be seen once is gone with it.
        Err(error) if error.is(Status::is_not_found) => (note, warning) = (taken, true),
        Err(error) => return Err(error),
    }
    if let (Some(message), Some((key, _))) = (note, about) {
        tracing::info!(namespace, name = key.name_any(), reason = "Revealed", "{message}");
        context.keys.events.note(key, Note { warning, reason: "Revealed", message });
        context.keys.checks.now(&key.uid().unwrap_or_default());
        (context.look)(namespace, &key.name_any());
    }
    Ok(())
}
