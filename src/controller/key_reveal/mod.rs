//! Answers requests to see a value.
//!
//! Each request is judged by the gates of [`crate::domain::gates`], and granted ones are answered encrypted to the
//! requester alone. A value that may be seen once is given in three writes, see [`act::take`]: its Secret, the answer,
//! its Secret again. After a crash between any two of them the same request finds its claim and goes on; every other
//! request is told who was first.

pub mod act;

use std::{convert::Infallible, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, PatchParams, Preconditions},
    core::Status,
    runtime::{
        applier,
        controller::{self, Action, ReconcileRequest},
        reflector::{ObjectRef, store::Writer},
        watcher::Event,
    },
};
use tokio_util::sync::CancellationToken;

use super::{
    RequestError, api_key,
    api_key::observe::{self, Found},
    request, status_patch,
};
use crate::{
    access::{self, Cluster},
    api::{ApiKey, KeyReveal, KeyRevealStatus, KeyState, Requester, RevealMode, Time, creator_of_key},
    domain::{
        gates::{self, Situation},
        lifecycle::{Held, Observed, Schedule},
        policy::Person,
        record::Claim,
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

/// How often an answer looks again when somebody else was faster.
const ROUNDS: u8 = 5;

/// Asks for a look at a key, by namespace and name.
pub type Look = Box<dyn Fn(&str, &str) + Send + Sync>;

/// What answering works with.
pub struct Context {
    /// What the keys themselves are reconciled with.
    pub keys: Arc<api_key::Context>,
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
}

fn denied(reason: &'static str, message: impl Into<String>) -> Outcome {
    Outcome::Denied { reason, message: message.into() }
}

/// Answers requests until shutdown. The caller leads, and the index is complete.
pub async fn run(context: Arc<Context>, shutdown: CancellationToken) {
    let writer = Writer::<KeyReveal>::default();
    let reveals = writer.as_reader();
    let events = feed::watch::<KeyReveal>(context.keys.client.clone(), |_| {});
    let requests = events
        .scan(writer, |writer, event| {
            writer.apply_watcher_event(&event);
            let reference = |reveal: &KeyReveal| {
                ObjectRef::new(&reveal.name_any()).within(reveal.metadata.namespace.as_deref().unwrap_or_default())
            };
            let due: Vec<ObjectRef<KeyReveal>> = match &event {
                Event::Apply(reveal) => vec![reference(reveal)],
                Event::InitDone => writer.as_reader().state().iter().map(|reveal| reference(reveal)).collect(),
                Event::Init | Event::InitApply(_) | Event::Delete(_) => vec![],
            };
            ready(Some(futures::stream::iter(due)))
        })
        .flatten()
        .map(|reveal| Ok::<_, Infallible>(ReconcileRequest::from(reveal)))
        .take_until(shutdown.cancelled_owned());
    applier(
        |reveal, context| reconcile(reveal, context).boxed(),
        |reveal: Arc<KeyReveal>, error: &RequestError, context: Arc<Context>| {
            let wait = context.keys.backoff.failed(&reveal.uid().unwrap_or_default());
            let (namespace, name) = (reveal.namespace(), reveal.name_any());
            tracing::warn!(namespace, name, %error, retry_in = ?wait, "a request to see a value could not be answered");
            Action::requeue(wait)
        },
        context,
        reveals,
        requests.boxed(),
        controller::Config::default().concurrency(CONCURRENCY),
    )
    .for_each(|_| ready(()))
    .await;
}

async fn reconcile(reveal: Arc<KeyReveal>, context: Arc<Context>) -> Result<Action, RequestError> {
    if reveal.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let now = context.keys.clock.now();
    let namespace = reveal.namespace().unwrap_or_default();
    let created = reveal.creation_timestamp().map_or(now, |at| at.0);
    let ends = created.checked_add(context.ttl).unwrap_or(Timestamp::MAX);
    let uid = reveal.uid().unwrap_or_default();
    if ends <= now {
        context.keys.backoff.forget(&uid);
        return delete(&reveal, &namespace, &context).await;
    }
    let answered = reveal.status.as_ref().filter(|status| status.conditions.iter().any(|c| c.type_ == "Granted"));
    if let Some(status) = answered {
        if status.one_time == Some(true) {
            tidy(&reveal, &namespace, &uid, &context).await?;
        }
        context.keys.backoff.forget(&uid);
        let left = Duration::try_from(ends.duration_since(now)).unwrap_or_default();
        return Ok(Action::requeue(left + Duration::from_millis(500)));
    }
    let Some(who) = reveal.spec.requester.clone().map(Arc::new) else {
        let message =
            "the cluster did not say who asks: the mutating webhook of Keywright has to be installed; ask again then";
        report(&reveal, &namespace, denied("RequesterMissing", message), ends, None, &context).await?;
        return Ok(Action::requeue(SOON));
    };
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), &namespace);
    let name = &reveal.spec.api_key_ref.name;
    // Asked for and not remembered: what is in memory may be older than the request.
    let Some(key) = request(&format!("get ApiKey {name}"), keys.get_opt(name)).await? else {
        let message = format!("there is no ApiKey {name} in namespace {namespace}: create it, or name another");
        report(&reveal, &namespace, denied("KeyNotFound", message), ends, None, &context).await?;
        return Ok(Action::requeue(SOON));
    };
    let outcome = match judge(&key, &who, &namespace, &context).await? {
        Some(denial) => denial,
        None => answer(&reveal, &key, &who, &namespace, created, &context).await?,
    };
    if !matches!(outcome, Outcome::Wait) {
        report(&reveal, &namespace, outcome, ends, Some((&key, &who)), &context).await?;
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
                    "the Secret of ApiKey {name} is gone: bring it back, or change spec.rotation.requestedAt to mint a new value"
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
            let message = "the value was erased, since nobody revealed it in time: change spec.rotation.requestedAt to mint a new one";
            return Ok(Some(denied("ValueErased", message)));
        }
        if let (true, Some(claim)) = (once, &sealed.claim) {
            let own = claim.uid == uid && !uid.is_empty();
            return Ok(Some(match found.claimed.filter(|_| own) {
                Some(ciphertext) => Outcome::Granted { ciphertext, id, one_time: true },
                None => denied(
                    "AlreadyRevealed",
                    format!(
                        "the value was revealed to {} at {} and can be revealed once: change spec.rotation.requestedAt to mint a new one",
                        claim.by, claim.at
                    ),
                ),
            }));
        }
    }
    let Some(value) = found.value.filter(|value| value.digest().to_string() == held.record.current.sha256) else {
        let message =
            "the Secret no longer holds the value that was minted: change spec.rotation.requestedAt to mint a new one";
        return Ok(Some(denied("SecretValueChanged", message)));
    };
    let ciphertext = match sealing::encrypt_to(&reveal.spec.recipient, value.expose().as_bytes()) {
        Ok(ciphertext) => ciphertext,
        Err(error) => return Ok(Some(denied("InvalidRecipient", format!("spec.recipient: {error}")))),
    };
    let claim = Claim { uid, by: who.username.clone(), at: context.keys.clock.now() };
    let done = match &held.record.sealed {
        Some(_) if once => act::take(client, &context.keys.sealing, namespace, key, held, claim, &ciphertext).await?,
        Some(sealed) if sealed.claim.is_none() => {
            act::note(client, &context.keys.sealing, namespace, key, held, claim).await?
        }
        _ => true,
    };
    Ok(done.then_some(Outcome::Granted { ciphertext, id, one_time: once }))
}

/// Takes the answer out of the Secret, now that its request has it.
async fn tidy(reveal: &KeyReveal, namespace: &str, uid: &str, context: &Context) -> Result<(), RequestError> {
    let keys: Api<ApiKey> = Api::namespaced(context.keys.client.clone(), namespace);
    let name = &reveal.spec.api_key_ref.name;
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
    let mut note = None;
    let status = match outcome {
        Outcome::Wait => return Ok(()),
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
    let reveals: Api<KeyReveal> = Api::namespaced(context.keys.client.clone(), namespace);
    let patch = status_patch(reveal, reveal.status.as_ref(), &status);
    match request("update status", reveals.patch_status(&name, &PatchParams::default(), &patch)).await {
        Ok(_) => {}
        // Its event is on the way, or it is gone.
        Err(error) if error.is(|s: &Status| s.is_conflict() || s.is_not_found()) => return Ok(()),
        Err(error) => return Err(error),
    }
    if let (Some(message), Some((key, _))) = (note, about) {
        tracing::info!(namespace, name = key.name_any(), reason = "Revealed", "{message}");
        context.keys.events.note(key, Note { warning: false, reason: "Revealed", message });
        context.keys.checks.now(&key.uid().unwrap_or_default());
        (context.look)(namespace, &key.name_any());
    }
    Ok(())
}
