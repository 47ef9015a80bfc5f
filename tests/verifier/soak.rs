//! Many keys, all that can happen to them in no order, the watch cut now and then, and every answer checked against a
//! model of what was asked for. Twenty seconds here; `make soak` takes as long as it is told.
//!
//! The model is a history for each value: what was true, from just before a change was sent. A change is in force at the
//! latest [`BOUND`] after the cluster acknowledged it; until then the answer may be of before or after, and then of after
//! alone. Any other answer, an error among them, is wrong.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::support::verifier::Options;
use crate::support::{self, PATIENCE, Proxy, eventually};
use crate::{Team, start};

/// How long a change may take, with a cut watch in between, in milliseconds.
const BOUND: i64 = 2000;

const KEYS: usize = 24;
const READ: &str = "alerts:ReadConfig";
const WRITE: &str = "alerts:UpdateConfig";

/// What is true of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Truth {
    /// It is one of its key's values.
    live: bool,
    active: bool,
    /// When its key expires, in milliseconds since 1970.
    expires: Option<i64>,
    writes: bool,
}

impl Truth {
    const GONE: Self = Self { live: false, active: false, expires: None, writes: false };

    fn status(self, permission: Option<&str>, at: i64) -> u16 {
        match permission {
            _ if !self.live || !self.active || self.expires.is_some_and(|end| end <= at) => 401,
            Some(WRITE) if !self.writes => 403,
            _ => 200,
        }
    }
}

/// What was true when.
#[derive(Clone, Debug)]
struct History {
    value: String,
    /// From when it may hold, and from when nothing before it may, in milliseconds since 1970.
    truths: Vec<(i64, i64, Truth)>,
}

impl History {
    fn may_be(&self, status: u16, permission: Option<&str>, from: i64, to: i64) -> bool {
        self.truths.iter().enumerate().any(|(at, (begins, _, truth))| {
            let ends = self.truths.get(at + 1).map_or(i64::MAX, |next| next.1);
            let possible = *begins <= to && from <= ends;
            possible && [from.max(*begins), to].into_iter().any(|at| truth.status(permission, at) == status)
        })
    }

    fn now(&self) -> Truth {
        self.truths.last().map_or(Truth::GONE, |(.., truth)| *truth)
    }
}

#[test]
fn the_model_allows_both_answers_only_while_a_change_is_under_way() {
    let live = Truth { live: true, active: true, expires: None, writes: false };
    let truths = vec![(0, 0, live), (100, 150, Truth { active: false, ..live })];
    let history = History { value: String::new(), truths };
    assert!(history.may_be(200, None, 10, 20) && !history.may_be(401, None, 10, 20));
    assert!(history.may_be(200, None, 120, 130) && history.may_be(401, None, 120, 130));
    assert!(history.may_be(401, None, 160, 170) && !history.may_be(200, None, 160, 170));
    assert!(!history.may_be(503, None, 120, 130) && !history.may_be(403, Some(READ), 120, 130));
    let expiring = History { value: String::new(), truths: vec![(0, 0, Truth { expires: Some(100), ..live })] };
    assert!(expiring.may_be(200, None, 90, 99) && !expiring.may_be(401, None, 90, 99));
    assert!(expiring.may_be(200, None, 95, 105) && expiring.may_be(401, None, 95, 105));
    assert!(!expiring.may_be(200, None, 100, 110));
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

struct World {
    team: Team,
    histories: Arc<Mutex<Vec<History>>>,
    keys: Vec<Key>,
    made: usize,
    random: StdRng,
}

impl World {
    /// The truth of these values changes: from `since` on it may, from now and a little more it must.
    fn change(&self, values: &[usize], since: i64, change: impl Fn(&mut Truth)) {
        let mut histories = self.histories.lock().unwrap();
        for value in values {
            let mut truth = histories[*value].now();
            change(&mut truth);
            histories[*value].truths.push((since, now() + BOUND, truth));
        }
    }

    fn learn(&mut self, value: String, since: i64, truth: Truth) -> usize {
        let mut histories = self.histories.lock().unwrap();
        let must = now() + BOUND;
        histories.push(History { value, truths: vec![(0, 0, Truth::GONE), (since, must, truth)] });
        histories.len() - 1
    }

    async fn create(&mut self) {
        self.made += 1;
        let name = format!("k{}", self.made);
        let since = now();
        let value = self.team.mint(&name, &json!({"type": "Team", "permissions": [READ]})).await;
        let truth = Truth { live: true, active: true, expires: None, writes: false };
        let values = vec![self.learn(value, since, truth)];
        self.keys.push(Key { name, values });
    }

    async fn act(&mut self) {
        let at = self.random.random_range(0..self.keys.len());
        let (name, values) = (self.keys[at].name.clone(), self.keys[at].values.clone());
        let truth = self.histories.lock().unwrap()[*values.last().unwrap()].now();
        let since = now();
        let expired = truth.expires.is_some();
        match self.random.random_range(0..10) {
            0 => {
                self.team.delete(&name).await;
                self.change(&values, since, |truth| *truth = Truth::GONE);
                self.keys.swap_remove(at);
                self.create().await;
            }
            1 | 2 if expired => {
                self.team.patch(&name, &json!({"expiresAt": null})).await;
                // Its new end counts when the operator has accepted it.
                if truth.active {
                    self.team.ready(&name).await;
                } else {
                    self.settled_expiry(&name).await;
                }
                // The value in overlap ends when it was once said to: what was revoked never comes back.
                self.change(&values[values.len() - 1..], since, |truth| truth.expires = None);
            }
            1 => {
                // Kubernetes knows whole seconds best; a second and more, so that admission takes it.
                let end = (now() / 1000 + 2) * 1000;
                self.team.patch(&name, &json!({"expiresAt": rfc3339(end)})).await;
                // Else the operator may see this and its undoing at once, and nothing ever ended.
                eventually("the expiry is accepted", PATIENCE, async || {
                    let status = self.team.keys.get(&name).await?.status.unwrap_or_default();
                    anyhow::ensure!(status.tokens.first().is_some_and(|token| token.expires_at.is_some()), "not yet");
                    Ok(())
                })
                .await;
                let sooner = |known: Option<i64>| Some(known.map_or(end, |known| known.min(end)));
                self.change(&values, since, |truth| truth.expires = sooner(truth.expires));
            }
            2..=4 if !expired => {
                let active = !truth.active;
                self.team.patch(&name, &json!({"active": active})).await;
                if active {
                    self.team.ready(&name).await;
                }
                self.change(&values, since, |truth| truth.active = active);
            }
            5 | 6 if !expired && truth.active => {
                let writes = !truth.writes;
                let permissions = if writes { vec![READ, WRITE] } else { vec![READ] };
                self.team.patch(&name, &json!({"permissions": permissions})).await;
                if writes {
                    self.team.ready(&name).await;
                }
                self.change(&values, since, |truth| truth.writes = writes);
            }
            7..=9 if !expired && truth.active => self.rotate(at, since, truth).await,
            _ => {}
        }
    }

    async fn settled_expiry(&self, name: &str) {
        eventually("the new expiry is accepted", PATIENCE, async || {
            let status = self.team.keys.get(name).await?.status.unwrap_or_default();
            // The second one ends with the overlap, whatever the key does.
            anyhow::ensure!(status.tokens.first().is_some_and(|token| token.expires_at.is_none()), "not yet");
            Ok(())
        })
        .await;
    }

    async fn rotate(&mut self, at: usize, since: i64, truth: Truth) {
        let overlap = if self.random.random_bool(0.5) { "1h" } else { "0s" };
        let name = self.keys[at].name.clone();
        let old = self.team.value(&name).await;
        self.team.patch(&name, &json!({"rotation": {"requestedAt": rfc3339(since), "overlap": overlap}})).await;
        let new = eventually("a new value", PATIENCE, async || {
            let value = self.team.value(&name).await;
            anyhow::ensure!(value != old, "not yet");
            Ok(value)
        })
        .await;
        self.team.ready(&name).await;
        // At most two values live: the one before the last one goes, and with no overlap the last one too.
        let kept = usize::from(overlap == "1h");
        let values = std::mem::take(&mut self.keys[at].values);
        let (gone, stay) = values.split_at(values.len() - kept.min(values.len()));
        self.change(gone, since, |truth| *truth = Truth::GONE);
        let new = self.learn(new, since, truth);
        self.keys[at].values = stay.iter().copied().chain([new]).collect();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_methods, reason = "how long is up to who runs it")]
async fn no_answer_is_ever_wrong_while_everything_changes() {
    let seconds = std::env::var("KEYWRIGHT_SOAK_SECONDS").map_or(20, |seconds| seconds.parse().expect("seconds"));
    let proxy = Proxy::start(support::shared().await.plane).unwrap();
    let verifier = start(Options { server: Some(proxy.url().to_owned()), ..Options::default() }).await.unwrap();
    let histories = Arc::new(Mutex::new(vec![]));
    let mut world = World {
        team: Team::new().await,
        histories: Arc::clone(&histories),
        keys: vec![],
        made: 0,
        random: StdRng::seed_from_u64(5),
    };
    for _ in 0..KEYS {
        world.create().await;
    }

    let (stop, checks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let odd: Arc<Mutex<Vec<_>>> = Arc::default();
    let checkers: Vec<_> = (0..2_u64)
        .map(|seed| {
            let (stop, checks, odd) = (Arc::clone(&stop), Arc::clone(&checks), Arc::clone(&odd));
            let (histories, address) = (Arc::clone(&histories), verifier.address());
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(seed);
                let client = legacy::Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
                while !stop.load(Ordering::Relaxed) {
                    let permission = [None, Some(READ), Some(WRITE)][random.random_range(0..3)];
                    let (at, value) = {
                        let histories = histories.lock().unwrap();
                        // The youngest are the most interesting.
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
                    // Judged at the end: what happened meanwhile is written down when it is complete.
                    let history = histories.lock().unwrap()[at].clone();
                    if !history.may_be(status, permission, from, to) {
                        odd.lock().unwrap().push((at, status, permission, from, to));
                    }
                }
            })
        })
        .collect();

    let end = now() + seconds * 1000;
    let mut changes = 0;
    while now() < end {
        world.act().await;
        changes += 1;
        if world.random.random_range(0..20) == 0 {
            proxy.cut_watches();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for checker in checkers {
        checker.await.unwrap();
    }
    let (checks, histories) = (checks.load(Ordering::Relaxed), histories.lock().unwrap());
    let is_wrong = |(at, status, permission, from, to): &(usize, u16, Option<&str>, i64, i64)| {
        !histories[*at].may_be(*status, *permission, *from, *to)
    };
    let told = |(at, status, permission, from, to): &(usize, u16, Option<&str>, i64, i64)| {
        format!("{from}..{to}: {status} for {permission:?}: {:?}", histories[*at].truths)
    };
    let wrong: Vec<_> = odd.lock().unwrap().iter().filter(|odd| is_wrong(odd)).map(told).collect();
    let values = histories.len();
    eprintln!("{seconds} s: {checks} checks, {changes} changes, {values} values, {} wrong answers", wrong.len());
    assert!(wrong.is_empty(), "{} of {checks} answers are wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    assert!(checks > 100 && changes > 5, "{checks} checks, {changes} changes");
}
