//! Random changes of many keys, with interrupted watches; every answer is compared with a model. The test takes 20
//! seconds, or `KEYWRIGHT_SOAK_SECONDS`, which `make soak` sets.
//!
//! The model is a history of states for each value. A change may take effect from the moment before it is sent, and
//! must have taken effect [`BOUND`] after the API server acknowledged it. In between, the answer may follow the old or
//! the new state. Any other answer, including an error, is wrong.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::{Team, start};
use crate::support::verifier::Options;
use crate::support::{Proxy, TIMEOUT, eventually};

/// The time within which a change must take effect, with an interrupted watch in between, in milliseconds.
const BOUND: i64 = 2000;

const KEYS: usize = 24;
const READ: &str = "alerts:ReadConfig";
const WRITE: &str = "alerts:UpdateConfig";

/// The expected state of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// Whether it is the current value of its key or the one in overlap.
    live: bool,
    active: bool,
    /// The expiry of its key, in milliseconds since 1970.
    expires: Option<i64>,
    /// Whether the key has permission [`WRITE`].
    writes: bool,
}

impl State {
    const GONE: Self = Self { live: false, active: false, expires: None, writes: false };

    fn status(self, permission: Option<&str>, at: i64) -> u16 {
        match permission {
            _ if !self.live || !self.active || self.expires.is_some_and(|end| end <= at) => 401,
            Some(WRITE) if !self.writes => 403,
            _ => 200,
        }
    }
}

/// The states of a value.
#[derive(Clone, Debug)]
struct History {
    value: String,
    /// The time from which the state may apply, the time from which earlier states may not, both in milliseconds since
    /// 1970, and the state.
    states: Vec<(i64, i64, State)>,
}

impl History {
    /// Whether the status is correct for a check that was sent and answered between `from` and `to`.
    fn allows(&self, status: u16, permission: Option<&str>, from: i64, to: i64) -> bool {
        self.states.iter().enumerate().any(|(at, (begins, _, state))| {
            let ends = self.states.get(at + 1).map_or(i64::MAX, |next| next.1);
            let possible = *begins <= to && from <= ends;
            possible && [from.max(*begins), to].into_iter().any(|at| state.status(permission, at) == status)
        })
    }

    fn current(&self) -> State {
        self.states.last().map_or(State::GONE, |(.., state)| *state)
    }
}

#[test]
fn the_model_allows_both_answers_only_until_a_change_must_have_taken_effect() {
    let live = State { live: true, active: true, expires: None, writes: false };
    let states = vec![(0, 0, live), (100, 150, State { active: false, ..live })];
    let history = History { value: String::new(), states };
    assert!(history.allows(200, None, 10, 20) && !history.allows(401, None, 10, 20));
    assert!(history.allows(200, None, 120, 130) && history.allows(401, None, 120, 130));
    assert!(history.allows(401, None, 160, 170) && !history.allows(200, None, 160, 170));
    assert!(!history.allows(503, None, 120, 130) && !history.allows(403, Some(READ), 120, 130));
    let expiring = History { value: String::new(), states: vec![(0, 0, State { expires: Some(100), ..live })] };
    assert!(expiring.allows(200, None, 90, 99) && !expiring.allows(401, None, 90, 99));
    assert!(expiring.allows(200, None, 95, 105) && expiring.allows(401, None, 95, 105));
    assert!(!expiring.allows(200, None, 100, 110));
}

#[allow(clippy::disallowed_methods, reason = "tests live in real time")]
fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

fn rfc3339(at: i64) -> String {
    Timestamp::from_millisecond(at).expect("a time").to_string()
}

/// One ApiKey and its values, the current one last.
struct Key {
    name: String,
    values: Vec<usize>,
}

/// The keys and their model.
struct Model {
    team: Team,
    histories: Arc<Mutex<Vec<History>>>,
    keys: Vec<Key>,
    created: usize,
    random: StdRng,
}

impl Model {
    /// Changes the state of these values: it may apply from `since` on, and must apply from [`BOUND`] after now.
    fn change(&self, values: &[usize], since: i64, change: impl Fn(&mut State)) {
        let mut histories = self.histories.lock().unwrap();
        for value in values {
            let mut state = histories[*value].current();
            change(&mut state);
            histories[*value].states.push((since, now() + BOUND, state));
        }
    }

    /// Adds a value that may work from `since` on, and returns its index.
    fn add_value(&mut self, value: String, since: i64, state: State) -> usize {
        let mut histories = self.histories.lock().unwrap();
        let must = now() + BOUND;
        histories.push(History { value, states: vec![(0, 0, State::GONE), (since, must, state)] });
        histories.len() - 1
    }

    async fn create(&mut self) {
        self.created += 1;
        let name = format!("k{}", self.created);
        let since = now();
        let value = self.team.mint(&name, &json!({"type": "Team", "permissions": [READ]})).await;
        let state = State { live: true, active: true, expires: None, writes: false };
        let values = vec![self.add_value(value, since, state)];
        self.keys.push(Key { name, values });
    }

    /// Changes a random key in a random way.
    async fn change_a_key(&mut self) {
        let at = self.random.random_range(0..self.keys.len());
        let (name, values) = (self.keys[at].name.clone(), self.keys[at].values.clone());
        let state = self.histories.lock().unwrap()[*values.last().unwrap()].current();
        let since = now();
        let has_expiry = state.expires.is_some();
        match self.random.random_range(0..10) {
            0 => {
                self.team.delete(&name).await;
                self.change(&values, since, |state| *state = State::GONE);
                self.keys.swap_remove(at);
                self.create().await;
            }
            1 | 2 if has_expiry => {
                self.team.patch(&name, &json!({"expiresAt": null})).await;
                // A later expiry takes effect after the operator has accepted it.
                if state.active {
                    self.team.ready(&name).await;
                } else {
                    self.wait_until_expiry_is_removed(&name).await;
                }
                // The value in overlap keeps its end, since a revoked value never works again.
                self.change(&values[values.len() - 1..], since, |state| state.expires = None);
            }
            1 => {
                // A whole second, more than one second in the future.
                let end = (now() / 1000 + 2) * 1000;
                self.team.patch(&name, &json!({"expiresAt": rfc3339(end)})).await;
                // Otherwise the operator could observe the expiry and its removal at once, and the value would not end.
                eventually("the expiry is accepted", TIMEOUT, async || {
                    let status = self.team.keys.get(&name).await?.status.unwrap_or_default();
                    let accepted = status.tokens.first().is_some_and(|token| token.expires_at.is_some());
                    anyhow::ensure!(accepted, "status.tokens has no expiry");
                    Ok(())
                })
                .await;
                let earlier = |known: Option<i64>| Some(known.map_or(end, |known| known.min(end)));
                self.change(&values, since, |state| state.expires = earlier(state.expires));
            }
            2..=4 if !has_expiry => {
                let active = !state.active;
                self.team.patch(&name, &json!({"active": active})).await;
                if active {
                    self.team.ready(&name).await;
                }
                self.change(&values, since, |state| state.active = active);
            }
            5 | 6 if !has_expiry && state.active => {
                let writes = !state.writes;
                let permissions = if writes { vec![READ, WRITE] } else { vec![READ] };
                self.team.patch(&name, &json!({"permissions": permissions})).await;
                if writes {
                    self.team.ready(&name).await;
                }
                self.change(&values, since, |state| state.writes = writes);
            }
            7..=9 if !has_expiry && state.active => self.rotate(at, since, state).await,
            _ => {}
        }
    }

    async fn wait_until_expiry_is_removed(&self, name: &str) {
        eventually("the removal of the expiry is accepted", TIMEOUT, async || {
            let status = self.team.keys.get(name).await?.status.unwrap_or_default();
            // Only the current value: the one in overlap always has an end.
            let removed = status.tokens.first().is_some_and(|token| token.expires_at.is_none());
            anyhow::ensure!(removed, "status.tokens has an expiry");
            Ok(())
        })
        .await;
    }

    async fn rotate(&mut self, at: usize, since: i64, state: State) {
        let overlap = if self.random.random_bool(0.5) { "1h" } else { "0s" };
        let name = self.keys[at].name.clone();
        let old = self.team.value(&name).await;
        self.team.patch(&name, &json!({"rotation": {"requestedAt": rfc3339(since), "overlap": overlap}})).await;
        let new = eventually("a new value", TIMEOUT, async || {
            let value = self.team.value(&name).await;
            anyhow::ensure!(value != old, "the value is still the old one");
            Ok(value)
        })
        .await;
        self.team.ready(&name).await;
        // At most two values work: an earlier value in overlap is revoked, and without overlap the previous one too.
        let kept = usize::from(overlap == "1h");
        let values = std::mem::take(&mut self.keys[at].values);
        let (revoked, in_overlap) = values.split_at(values.len() - kept.min(values.len()));
        self.change(revoked, since, |state| *state = State::GONE);
        let new = self.add_value(new, since, state);
        self.keys[at].values = in_overlap.iter().copied().chain([new]).collect();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_methods, reason = "the environment sets the duration")]
async fn every_answer_matches_the_model_during_random_changes() {
    let seconds = std::env::var("KEYWRIGHT_SOAK_SECONDS").map_or(20, |seconds| seconds.parse().expect("seconds"));
    let proxy = Proxy::start(crate::support::shared().await.plane).unwrap();
    let verifier = start(Options { server: Some(proxy.url().to_owned()), ..Options::default() }).await.unwrap();
    let histories = Arc::new(Mutex::new(vec![]));
    let mut model = Model {
        team: Team::new().await,
        histories: Arc::clone(&histories),
        keys: vec![],
        created: 0,
        random: StdRng::seed_from_u64(5),
    };
    for _ in 0..KEYS {
        model.create().await;
    }

    let (stop, checks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let suspects: Arc<Mutex<Vec<_>>> = Arc::default();
    let checkers: Vec<_> = (0..2_u64)
        .map(|seed| {
            let (stop, checks, suspects) = (Arc::clone(&stop), Arc::clone(&checks), Arc::clone(&suspects));
            let (histories, address) = (Arc::clone(&histories), verifier.address());
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(seed);
                let client = legacy::Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
                while !stop.load(Ordering::Relaxed) {
                    let permission = [None, Some(READ), Some(WRITE)][random.random_range(0..3)];
                    let (at, value) = {
                        let histories = histories.lock().unwrap();
                        // Prefer the newest values, which change most.
                        let at =
                            histories.len() - 1 - random.random_range(0..histories.len()) * random.random_range(0..2);
                        let at = if random.random_bool(0.3) { at } else { random.random_range(0..histories.len()) };
                        (at, histories[at].value.clone())
                    };
                    let uri = format!("http://{address}/nginx/permission={}", permission.unwrap_or("none"));
                    let request = hyper::Request::get(uri).header("x-api-key", &value).body(Empty::new()).unwrap();
                    let from = now();
                    let status = match client.request(request).await {
                        Ok(response) => {
                            let status = response.status().as_u16();
                            response.into_body().collect().await.expect("a body");
                            status
                        }
                        Err(_) => 0,
                    };
                    let to = now();
                    checks.fetch_add(1, Ordering::Relaxed);
                    // A suspect is evaluated again at the end, when the history contains changes that were in progress.
                    let history = histories.lock().unwrap()[at].clone();
                    if !history.allows(status, permission, from, to) {
                        suspects.lock().unwrap().push((at, status, permission, from, to));
                    }
                }
            })
        })
        .collect();

    let end = now() + seconds * 1000;
    let mut changes = 0;
    while now() < end {
        model.change_a_key().await;
        changes += 1;
        if model.random.random_range(0..20) == 0 {
            proxy.cut_watches();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for checker in checkers {
        checker.await.unwrap();
    }
    let (checks, histories) = (checks.load(Ordering::Relaxed), histories.lock().unwrap());
    let is_wrong = |(at, status, permission, from, to): &(usize, u16, Option<&str>, i64, i64)| {
        !histories[*at].allows(*status, *permission, *from, *to)
    };
    let describe = |(at, status, permission, from, to): &(usize, u16, Option<&str>, i64, i64)| {
        format!("{from}..{to}: {status} for {permission:?}: {:?}", histories[*at].states)
    };
    let wrong: Vec<_> = suspects.lock().unwrap().iter().filter(|suspect| is_wrong(suspect)).map(describe).collect();
    let values = histories.len();
    eprintln!("{seconds} s: {checks} checks, {changes} changes, {values} values, {} wrong answers", wrong.len());
    assert!(wrong.is_empty(), "{} of {checks} answers are wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    assert!(checks > 100 && changes > 5, "{checks} checks, {changes} changes");
}
