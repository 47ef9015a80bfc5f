//! Reconciles one ApiKey.
//!
//! In the usual life of a key this costs one create of its Secret and one write of its status; afterwards, an event
//! that changes nothing costs no request at all.

pub mod act;
mod legacy;
pub mod observe;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    Api, Client, ResourceExt,
    api::Patch,
    core::Status,
    runtime::{
        controller::Action,
        reflector::{ObjectRef, Store},
    },
};
use rand::{TryRng, rngs::SysRng};
use serde_json::json;

use self::act::{Acted, Manner};
use super::{
    RequestError, add, backoff::Backoff, events::Events, is_there, key_reveal::orphan, patch_params, request,
    status_patch, test,
};
use crate::{
    api::{ApiKey, ApiKeyStatus},
    domain::{
        gates::KnownPolicy,
        key::Digest,
        lifecycle::{self, Observed, Step, World},
        record::{Entry, Record},
        status::{self, Facts, Note},
        validate,
    },
    index::{Index, digests::Digests},
    runtime::{
        clock::Clock,
        metrics::{Metrics, Outcome},
    },
    sealing::Keeper,
};

/// What reconciliation works with.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What is known without asking.
    pub index: Arc<Index>,
    /// Every ApiKey.
    pub keys: Store<ApiKey>,
    /// The time.
    pub clock: Clock,
    /// Where Events go.
    pub events: Events,
    /// Where counts go.
    pub metrics: Metrics,
    /// Who failed how often.
    pub backoff: Arc<Backoff>,
    /// When which Secret is looked at again.
    pub checks: Checks,
    /// The keys that seal values.
    pub sealing: Keeper,
}

/// When the Secret of each key is looked at again. The API server announces writes of others (see
/// [`crate::admission::secrets`]), so that this is for what it could not announce: while no replica ran, or of a Secret
/// that lost its label.
#[derive(Debug)]
pub struct Checks {
    interval: SignedDuration,
    next: Mutex<HashMap<String, Timestamp>>,
}

/// The first look at a Secret after a replica began to lead comes within this time: what happened while nobody led was
/// announced to nobody.
const FIRST: SignedDuration = SignedDuration::from_mins(10);

/// How soon a Secret is looked at again if no write to it is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// It is as it should be, and writes to it are announced: after the whole interval.
    Announced,
    /// It is the Secret of a legacy key, which carries no label of ours, so that nothing announces writes to it.
    Unannounced,
    /// It is gone or is not as it should be. Its replacement is announced only if it has the label, which a backup may
    /// have lost.
    Amiss,
}

impl Pace {
    /// The most that a Secret of this kind waits, however long the interval is.
    fn most(self) -> SignedDuration {
        match self {
            Self::Announced => SignedDuration::MAX,
            Self::Unannounced => SignedDuration::from_mins(30),
            Self::Amiss => SignedDuration::from_mins(10),
        }
    }

    /// The pace for a Secret of ours that was just read.
    fn of(secret: &Observed) -> Self {
        match secret {
            Observed::Ours(held) if held.intact => Self::Announced,
            _ => Self::Amiss,
        }
    }
}

impl Checks {
    /// Every Secret is looked at once an interval.
    #[must_use]
    pub fn every(interval: Duration) -> Self {
        let interval = SignedDuration::try_from(interval).unwrap_or(SignedDuration::from_hours(6));
        Self { interval, next: Mutex::default() }
    }

    /// When a key is due. A key that is seen for the first time gets a random moment of [`FIRST`], so that a restart
    /// does not read every Secret at once.
    fn due_at(&self, uid: &str, now: Timestamp) -> Timestamp {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next.entry(uid.to_owned()).or_insert_with(|| after(self.interval.min(FIRST), 0.0, now))
    }

    /// A look that was due at `due` is done. If another was asked for meanwhile, that stays.
    fn done(&self, uid: &str, due: Timestamp, now: Timestamp, pace: Pace) {
        // Keys that were made together are not looked at together ever after.
        let at = after(self.interval.min(pace.most()), 0.8, now);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.get(uid).is_none_or(|asked| *asked == due) {
            next.insert(uid.to_owned(), at);
        }
    }

    /// Has the Secret looked at when its key has its turn: somebody else wrote to it.
    pub fn now(&self, uid: &str) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // Never twice the same, so that a look that is under way does not count for this.
        let tick = SignedDuration::from_nanos(1);
        let asked = next.get(uid).filter(|at| **at < Timestamp::UNIX_EPOCH).and_then(|at| at.checked_add(tick).ok());
        next.insert(uid.to_owned(), asked.unwrap_or(Timestamp::MIN));
    }

    fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| keep(uid));
    }

    fn forget(&self, uid: &str) {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// A random moment of an interval that begins now, not before this share of it has passed.
fn after(interval: SignedDuration, least: f64, now: Timestamp) -> Timestamp {
    let random = f64::from(SysRng.try_next_u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
    let wait = SignedDuration::try_from_secs_f64(interval.as_secs_f64() * (least + (1.0 - least) * random));
    now.checked_add(wait.unwrap_or(interval)).unwrap_or(Timestamp::MAX)
}

/// How often a reconciliation looks again when somebody else was faster.
const ROUNDS: u8 = 3;

/// Forgets all that is kept in memory for an ApiKey that is gone.
pub fn forget(key: &ApiKey, context: &Context) {
    let uid = key.uid().unwrap_or_default();
    context.backoff.forget(&uid);
    context.checks.forget(&uid);
    context.index.digests.forget(&uid);
}

/// Forgets all that is kept in memory for ApiKeys that are not among these: a list that starts over does not say what
/// is gone.
pub fn retain(keys: &[Arc<ApiKey>], context: &Context) {
    let live: HashSet<&str> = keys.iter().filter_map(|key| key.metadata.uid.as_deref()).collect();
    context.backoff.retain(|uid| live.contains(uid));
    context.checks.retain(|uid| live.contains(uid));
    context.index.digests.retain(|uid| live.contains(uid));
}

/// Brings one key to where its spec wants it, one write of its Secret at a time.
///
/// # Errors
/// If a request failed. The status says so already; the caller tries again later.
pub async fn reconcile(key: Arc<ApiKey>, context: Arc<Context>) -> Result<Action, RequestError> {
    let started = std::time::Instant::now();
    let _working = context.events.working();
    let result = run(&key, &context).await;
    let outcome = if result.is_ok() { Outcome::Success } else { Outcome::Error };
    context.metrics.reconciled(outcome, started.elapsed());
    result
}

/// What to do after a failure.
#[must_use]
pub fn retry(key: &ApiKey, error: &RequestError, context: &Context) -> Action {
    if !is_there(&context.keys, key) {
        return Action::await_change();
    }
    let uid = key.uid().unwrap_or_default();
    let wait = if error.is_permanent() { context.backoff.blocked(&uid) } else { context.backoff.failed(&uid) };
    tracing::warn!(namespace = key.namespace(), name = key.name_any(), %error, retry_in = ?wait, "reconciliation failed");
    Action::requeue(wait)
}

async fn run(key: &ApiKey, context: &Context) -> Result<Action, RequestError> {
    if key.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    if key.spec.legacy.is_some() {
        return legacy::run(key, context).await;
    }
    let now = context.clock.now();
    let uid = key.uid().unwrap_or_default();
    let namespace = key.namespace().unwrap_or_default();
    let verdict = validate::check(&key.spec, &context.index.catalog());
    let rival = context.index.rival(&namespace, key, true);
    let settings = context.index.settings(&namespace);
    let policy = policy_of(key, &namespace, context);
    let settings = settings.as_deref();
    let check_at = context.checks.due_at(&uid, now);

    let mut minted = false;
    let mut error = None;
    let mut secret = Observed::NotRead;
    let mut claimed = false;
    let mut look = lifecycle::must_read(key, settings, now, check_at <= now);
    // Look, decide, act; and once more if somebody else was faster. Three rounds are more than any order of events
    // needs; if others keep writing to the Secret, the backoff takes over.
    for round in 1..=ROUNDS {
        if look {
            match observe::find(&context.client, &context.sealing, &namespace, key).await {
                Ok(found) => {
                    claimed = found.claimed.is_some();
                    secret = claim(key, &namespace, found.observed, context);
                }
                Err(failed) => {
                    error = Some(("SecretReadFailed", failed));
                    break;
                }
            }
        }
        let world = World { key, verdict: &verdict, rival: rival.as_deref(), secret: &secret, settings, now };
        let step = lifecycle::step(&world);
        let verb = if matches!(step, Step::Mint(_)) { "create" } else { "update" };
        let manner = if round == ROUNDS { Manner::Insistent } else { Manner::Careful };
        match act::act(&context.client, &context.sealing, &namespace, key, step, manner, now).await {
            Ok(Acted::Changed) if round == ROUNDS => {
                let name = status::secret_ref(key).name;
                let why = format!("{verb} Secret {name}: others keep writing to it (409)");
                error = Some(("SecretWriteFailed", RequestError::new_local(why)));
            }
            Ok(Acted::Changed) => look = true,
            Ok(Acted::Rested) => break,
            Ok(Acted::Wrote { held, minted: new }) => {
                secret = Observed::Ours(held);
                minted = new;
                break;
            }
            Err(failed) => {
                error = Some(("SecretWriteFailed", failed));
                break;
            }
        }
    }

    let failure = error.as_ref().map(|(reason, error)| error.failure(reason));
    let facts = Facts {
        key,
        verdict: &verdict,
        rival: rival.as_deref(),
        secret: &secret,
        settings,
        policy: policy.as_deref(),
        import: None,
        failure: failure.as_ref(),
        now,
    };
    let status = status::build(&facts);
    let next = lifecycle::next_wake(key, &status, settings, now);
    if !report(key, &namespace, status, minted, context).await? {
        // The object changed meanwhile; its event is on the way, and this is in case it is not.
        return Ok(Action::requeue(Duration::from_secs(5)));
    }
    if let Some((_, error)) = error {
        return Err(error);
    }
    if let (true, Observed::Ours(held)) = (claimed, &secret) {
        orphan::clear(&context.client, &namespace, key, held).await?;
    }
    if secret != Observed::NotRead {
        context.checks.done(&uid, check_at, now, Pace::of(&secret));
    }
    if let Observed::Foreign { passing, .. } = secret {
        // A conflict that only a person can end is no failure of the operator.
        let wait = if passing { context.backoff.failed(&uid) } else { context.backoff.blocked(&uid) };
        return Ok(Action::requeue(wait));
    }
    context.backoff.forget(&uid);
    let awaited = lifecycle::awaits_secret(key, now).then(|| now.checked_add(lifecycle::patience(key, now)).ok());
    let next = next.unwrap_or(Timestamp::MAX).min(awaited.flatten().unwrap_or(Timestamp::MAX));
    let next = next.min(context.checks.due_at(&uid, now));
    // A second late rather than early: times have whole seconds.
    let wait = Duration::try_from(next.duration_since(now)).unwrap_or_default() + Duration::from_millis(500);
    Ok(Action::requeue(wait))
}

/// What was observed, unless another ApiKey has the digest that is new to this one: then it is left alone, and both
/// ApiKeys are told in an Event.
fn claim(key: &ApiKey, namespace: &str, observed: Observed, context: &Context) -> Observed {
    let taken = match &observed {
        Observed::Ours(held) => taken(key, &held.record, &context.index.digests, &context.keys),
        _ => None,
    };
    let Some((id, other)) = taken else { return observed };
    let other = other.and_then(|other| context.keys.get(&other));
    // The name of an ApiKey of another team is no business of this one.
    let whose = match &other {
        Some(other) if other.namespace().as_deref() == Some(namespace) => format!("ApiKey {}", other.name_any()),
        _ => "another ApiKey".to_owned(),
    };
    if let Some(other) = other
        && !is_told(key, DIGEST_IN_USE)
    {
        let message = format!("another ApiKey names a Secret with the value {id} of this one; it was refused there");
        context.events.note(&*other, Note { warning: true, reason: DIGEST_IN_USE, message });
    }
    let why = format!("its value {id} belongs to {whose}: delete it, or put a value of its own there");
    Observed::Foreign { reason: DIGEST_IN_USE, why, passing: false }
}

/// The id of a value in a record that is new to a key and that another ApiKey has, and that ApiKey.
fn taken(
    key: &ApiKey,
    record: &Record,
    digests: &Digests,
    keys: &Store<ApiKey>,
) -> Option<(String, Option<ObjectRef<ApiKey>>)> {
    let is_new = |entry: &&Entry| {
        let mut known = key.status.iter().flat_map(|status| &status.tokens);
        known.all(|token| token.sha256 != entry.sha256)
    };
    let entries = std::iter::once(&record.current).chain(record.previous.as_ref().map(|previous| &previous.entry));
    entries.filter(is_new).find_map(|entry| {
        let digest = Digest::parse(&entry.sha256)?;
        digests.accept(digest, key, keys).err().map(|other| (entry.id(), other))
    })
}

/// The reason of a condition and of an Event.
const DIGEST_IN_USE: &str = "DigestInUse";

fn is_told(key: &ApiKey, reason: &str) -> bool {
    let conditions = key.status.as_ref().map_or(&[][..], |status| &status.conditions);
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == reason)
}

/// The AccessPolicy that a key refers to.
fn policy_of(key: &ApiKey, namespace: &str, context: &Context) -> Option<Arc<KnownPolicy>> {
    context.index.policy(namespace, &key.spec.access_policy_ref.as_ref()?.name)
}

/// Writes the status over whatever else changed in the object, such as its labels: those must not hold up a revocation. It
/// gives way to another spec, and to another writer of digests or of who saw the value. False if it did.
async fn insist(key: &ApiKey, keys: &Api<ApiKey>, status: &ApiKeyStatus) -> Result<bool, RequestError> {
    let name = key.name_any();
    let Some(now) = request(&format!("get ApiKey {name}"), keys.get_opt(&name)).await? else { return Ok(false) };
    let known = |key: &ApiKey| key.status.as_ref().map(|status| (status.tokens.clone(), status.reveal.clone()));
    if now.metadata.uid != key.metadata.uid
        || now.metadata.generation != key.metadata.generation
        || known(&now) != known(key)
    {
        return Ok(false);
    }
    // Somebody else writes the last use, and it may be later by now.
    let last_used_at = now.status.as_ref().and_then(|status| status.last_used_at.clone());
    let status = json!(ApiKeyStatus { last_used_at, ..status.clone() });
    let mut operations = vec![
        test(&["metadata", "uid"], json!(key.metadata.uid)),
        test(&["metadata", "generation"], json!(key.metadata.generation)),
    ];
    let known = known(&now).filter(|(tokens, _)| !tokens.is_empty());
    operations.extend(known.iter().map(|(tokens, _)| test(&["status", "tokens"], json!(tokens))));
    let reveal = known.and_then(|(_, reveal)| reveal);
    operations.extend(reveal.map(|reveal| test(&["status", "reveal"], json!(reveal))));
    operations.push(add(&["status"], status));
    let patch: Patch<()> = Patch::Json(json_patch::Patch(operations));
    match request("update status", keys.patch_status(&name, &patch_params(), &patch)).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(|s: &Status| s.is_conflict() || s.is_not_found() || s.is_invalid()) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes the status if it changed, and the Events that the change is worth. False if the object changed meanwhile.
async fn report(
    key: &ApiKey,
    namespace: &str,
    status: ApiKeyStatus,
    minted: bool,
    context: &Context,
) -> Result<bool, RequestError> {
    if key.status.as_ref() == Some(&status) {
        return Ok(true);
    }
    let name = key.name_any();
    let notes = status::notes(key.status.as_ref(), &status, minted);
    let keys: Api<ApiKey> = Api::namespaced(context.client.clone(), namespace);
    let patch = status_patch(key, key.status.as_ref(), &status);
    match request("update status", keys.patch_status(&name, &patch_params(), &patch)).await {
        Ok(_) => {}
        Err(error) if error.is(Status::is_not_found) => return Ok(false),
        Err(error) if error.is(Status::is_conflict) => {
            if !insist(key, &keys, &status).await? {
                return Ok(false);
            }
        }
        Err(error) => return Err(error),
    }
    for note in notes {
        tracing::info!(namespace, name, reason = note.reason, "{}", note.message);
        context.events.note(key, note);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_800_000_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(SECOND + second).unwrap()
    }

    #[test]
    fn the_first_look_comes_soon_and_later_ones_after_the_interval_unless_something_is_amiss() {
        let checks = Checks::every(Duration::from_hours(6));
        for number in 0..100 {
            let uid = format!("u{number}");
            let first = checks.due_at(&uid, at(0));
            assert!(at(0) <= first && first <= at(600), "{first}");
            assert_eq!(checks.due_at(&uid, at(5)), first, "a key keeps its turn");
            for (pace, least, most) in
                [(Pace::Announced, 17_280, 21_600), (Pace::Unannounced, 1440, 1800), (Pace::Amiss, 480, 600)]
            {
                let due = checks.due_at(&uid, at(0));
                checks.done(&uid, due, at(0), pace);
                let next = checks.due_at(&uid, at(0));
                assert!(at(least) <= next && next <= at(most), "{pace:?}: {next}");
            }
        }
        let dues = (0..100).map(|number| checks.due_at(&format!("u{number}"), at(0)));
        assert!(dues.collect::<HashSet<_>>().len() > 50, "keys that were looked at together stay together");
    }

    #[test]
    fn a_short_interval_bounds_every_look() {
        let checks = Checks::every(Duration::from_secs(2));
        assert!(checks.due_at("u", at(0)) <= at(2));
        for pace in [Pace::Announced, Pace::Unannounced, Pace::Amiss] {
            let due = checks.due_at("u", at(0));
            checks.done("u", due, at(0), pace);
            assert!(checks.due_at("u", at(0)) <= at(2), "{pace:?}");
        }
    }

    #[test]
    fn a_look_that_is_asked_for_during_another_is_not_taken_for_it() {
        let checks = Checks::every(Duration::from_hours(6));
        checks.now("u");
        let due = checks.due_at("u", at(0));
        assert!(due <= at(0));
        checks.now("u");
        checks.done("u", due, at(0), Pace::Announced);
        assert!(checks.due_at("u", at(0)) <= at(0), "the second request was lost");
    }
}

#[cfg(test)]
mod adversary;
