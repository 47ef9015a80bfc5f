//! From notices that Secrets are written to, to looks at these Secrets by the replica that leads.
//!
//! The API server calls any replica. One that leads looks at the Secret itself, some time later: a webhook is called
//! before the write is stored. One that does not lead tells the leader, and remembers the notice for a while in case that
//! it comes to lead itself.
//!
//! Notices can be made up, so that all is bounded: how many are remembered, how often one Secret is looked at, and how
//! many looks there are a second. What is lost at a bound is left to the periodic look.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use axum::body::Body;
use http::{Request, StatusCode};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use super::metrics::{Metrics, Notice as Outcome};
use crate::admission::{
    secrets::{BATCH, NOTICE_PATH, Notice},
    self_check,
};

/// When a Secret is looked at, counted from the notice. Nearly every write is stored by the first of them; a busy API
/// server takes longer, and other webhooks may hold up a write for 30 seconds.
const LOOKS: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(700), Duration::from_secs(5), Duration::from_secs(35)];

/// The shortest time between two looks at one Secret, however often it is written to.
const GAP: Duration = Duration::from_millis(400);

/// How many looks there are a second. It is also how many there are at once after a quiet second.
const LOOKS_A_SECOND: f64 = 100.0;

/// How many Secrets are remembered: some megabytes.
const MOST: usize = 20_000;

/// How long a replica that does not lead remembers a notice: longer than it takes until another leads.
const MEMORY: Duration = Duration::from_mins(1);

/// How long the leader may take to answer another replica.
const DEADLINE: Duration = Duration::from_millis(500);

/// The shortest time between two requests to the leader, and between two batches of looks at the bound: what comes
/// meanwhile is taken together.
const PACE: Duration = Duration::from_millis(50);

/// How long to wait after a request that failed.
const RETRY: Duration = Duration::from_millis(500);

/// How to reach the leader.
pub struct Peer {
    /// The address of the leader's webhook, if another replica leads.
    pub address: watch::Receiver<Option<SocketAddr>>,
    /// The certificates (PEM) that vouch for the webhook, as the API server knows them.
    pub bundle: watch::Receiver<Option<Vec<u8>>>,
    /// The name in the webhook's certificate.
    pub server_name: String,
}

impl Peer {
    /// Tells the leader.
    async fn tell(&self, notices: &[Notice]) -> Result<(), String> {
        let Some(address) = *self.address.borrow() else { return Err("the leader's address is not known".to_owned()) };
        let bundle = self.bundle.borrow().clone().ok_or("the webhook's CA is not known")?;
        let body = serde_json::to_vec(notices).map_err(|error| error.to_string())?;
        let request = Request::post(NOTICE_PATH)
            .header("host", &self.server_name)
            .header("content-type", "application/json")
            .body(Body::from(body))
            .map_err(|error| error.to_string())?;
        let answer = timeout(DEADLINE, self_check::send(address, &self.server_name, &bundle, None, request));
        match answer.await.map_err(|_| format!("no answer in {DEADLINE:?}"))?? {
            StatusCode::NO_CONTENT => Ok(()),
            other => Err(format!("the replica at {address} answered {other}")),
        }
    }
}

/// Works until the other end of `notices` is gone. `look` has a Secret looked at.
pub async fn run(
    mut notices: mpsc::Receiver<Notice>,
    mut leader: watch::Receiver<bool>,
    peer: Peer,
    metrics: Metrics,
    look: impl Fn(&Notice),
) {
    let mut known = Known::new(Instant::now());
    let mut heard = Vec::new();
    // Before this time, nothing is sent to the leader.
    let mut quiet_until = Instant::now();
    loop {
        let leads = *leader.borrow_and_update();
        let wake = if leads { known.next_look() } else { known.is_unsent().then_some(quiet_until) };
        tokio::select! {
            count = notices.recv_many(&mut heard, BATCH) => if count == 0 { return },
            // Once the election has ended, nothing changes any more.
            Ok(()) = leader.changed() => if *leader.borrow() { known.inherit(Instant::now()) },
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
        }
        let now = Instant::now();
        let lost = heard.drain(..).filter(|notice| !known.hear(notice, now)).count();
        if *leader.borrow() {
            let due = known.due(now);
            metrics.noticed(Outcome::Lost, lost);
            metrics.noticed(Outcome::Taken, due.len());
            due.iter().for_each(&look);
            continue;
        }
        metrics.noticed(Outcome::Lost, lost + known.forget(now));
        if now < quiet_until {
            continue;
        }
        let batch = known.unsent();
        if batch.is_empty() {
            continue;
        }
        let told = peer.tell(&batch).await;
        quiet_until = Instant::now() + if told.is_ok() { PACE } else { RETRY };
        match told {
            Ok(()) => {
                known.sent(&batch, now);
                metrics.noticed(Outcome::Forwarded, batch.len());
            }
            Err(why) => tracing::debug!(notices = batch.len(), why, "the leader could not be told; trying again"),
        }
    }
}

/// The Secrets that somebody wrote to lately.
struct Known {
    secrets: HashMap<Notice, Times>,
    /// How many looks may happen now, as of a time.
    budget: (f64, Instant),
}

/// What is known of one Secret.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// When a write to it was last heard of.
    heard: Instant,
    /// When it is to be looked at.
    next: Instant,
    /// When it was last looked at.
    looked: Option<Instant>,
    /// Whether the leader knows of the last write.
    sent: bool,
}

impl Times {
    fn new(now: Instant) -> Self {
        Self { heard: now, next: now + LOOKS[0], looked: None, sent: false }
    }

    fn hear(&mut self, now: Instant) {
        let earliest = self.looked.map_or(now, |at| at + GAP);
        (self.heard, self.sent) = (now, false);
        self.next = self.next.min((now + LOOKS[0]).max(earliest));
    }

    /// It is being looked at. The time of the next look, if there is one.
    fn look(&mut self, now: Instant) -> Option<Instant> {
        let next = LOOKS.iter().map(|after| self.heard + *after).find(|at| *at > now)?;
        self.looked = Some(now);
        self.next = next.max(now + GAP);
        Some(self.next)
    }
}

impl Known {
    fn new(now: Instant) -> Self {
        Self { secrets: HashMap::new(), budget: (LOOKS_A_SECOND, now) }
    }

    /// Takes in a notice. False if there is no room for it.
    fn hear(&mut self, notice: &Notice, now: Instant) -> bool {
        if let Some(times) = self.secrets.get_mut(notice) {
            times.hear(now);
        } else if self.secrets.len() < MOST {
            self.secrets.insert(notice.clone(), Times::new(now));
        } else {
            return false;
        }
        true
    }

    /// What this replica heard before it came to lead is to be looked at: the leader before may not have.
    fn inherit(&mut self, now: Instant) {
        self.secrets.values_mut().for_each(|times| *times = Times::new(now));
    }

    /// When to ask for [`Self::due`].
    fn next_look(&self) -> Option<Instant> {
        let next = self.secrets.values().map(|times| times.next).min()?;
        // Some at a time: to find those that wait longest costs a look at all.
        let (left, since) = self.budget;
        Some(if left < 1.0 { next.max(since + PACE) } else { next })
    }

    /// The Secrets that are to be looked at now, within the budget: those first that wait longest.
    fn due(&mut self, now: Instant) -> Vec<Notice> {
        let (left, since) = self.budget;
        let mut left = (left + now.duration_since(since).as_secs_f64() * LOOKS_A_SECOND).min(LOOKS_A_SECOND);
        self.budget = (left, now);
        if left < 1.0 {
            return vec![];
        }
        let mut due: Vec<_> = self.secrets.iter().filter(|(_, times)| times.next <= now).collect();
        due.sort_unstable_by_key(|(_, times)| times.next);
        let mut looks = Vec::new();
        for (notice, _) in due {
            if left < 1.0 {
                break;
            }
            left -= 1.0;
            looks.push(notice.clone());
        }
        self.budget = (left, now);
        for notice in &looks {
            if self.secrets.get_mut(notice).and_then(|times| times.look(now)).is_none() {
                self.secrets.remove(notice);
            }
        }
        looks
    }

    fn is_unsent(&self) -> bool {
        self.secrets.values().any(|times| !times.sent)
    }

    /// What the leader does not know yet, as much as goes into one request: what was heard first comes first.
    fn unsent(&self) -> Vec<Notice> {
        let mut unsent: Vec<_> = self.secrets.iter().filter(|(_, times)| !times.sent).collect();
        unsent.sort_unstable_by_key(|(_, times)| times.heard);
        unsent.into_iter().take(BATCH).map(|(notice, _)| notice.clone()).collect()
    }

    /// The leader was told at `then`; what was heard of since is not yet told.
    fn sent(&mut self, notices: &[Notice], then: Instant) {
        for notice in notices {
            if let Some(times) = self.secrets.get_mut(notice)
                && times.heard <= then
            {
                times.sent = true;
            }
        }
    }

    /// Forgets what was heard too long ago; how many of them nobody was told.
    fn forget(&mut self, now: Instant) -> usize {
        let mut lost = 0;
        self.secrets.retain(|_, times| {
            let keep = now.duration_since(times.heard) < MEMORY;
            lost += usize::from(!keep && !times.sent);
            keep
        });
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(number: usize) -> Notice {
        Notice { namespace: "shop".to_owned(), secret: format!("s{number}") }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Runs the clock in steps of a millisecond; the looks, in milliseconds from the start.
    fn looks(known: &mut Known, start: Instant, span: u64, hear: impl Fn(u64) -> Vec<usize>) -> Vec<(u64, Notice)> {
        let mut seen = vec![];
        for at in 0..span {
            let now = start + ms(at);
            for number in hear(at) {
                known.hear(&notice(number), now);
            }
            if known.next_look().is_some_and(|next| next <= now) {
                seen.extend(known.due(now).into_iter().map(|notice| (at, notice)));
            }
        }
        seen
    }

    #[test]
    fn a_write_is_looked_at_soon_and_again_in_case_it_was_slow_to_be_stored() {
        let start = Instant::now();
        let mut known = Known::new(start);
        let seen = looks(&mut known, start, 60_000, |at| if at == 0 { vec![1] } else { vec![] });
        assert_eq!(seen.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [200, 700, 5000, 35_000]);
        assert!(known.secrets.is_empty(), "nothing is remembered for ever");
    }

    #[test]
    fn many_writes_to_one_secret_cost_a_few_looks_a_second_and_the_last_is_seen_within_a_second() {
        let start = Instant::now();
        let mut known = Known::new(start);
        let seen = looks(&mut known, start, 20_000, |at| if at < 10_000 { vec![1] } else { vec![] });
        let during = seen.iter().filter(|(at, _)| *at < 10_000).count();
        assert!((20..=25).contains(&during), "{during} looks in ten seconds");
        let after: Vec<_> = seen.iter().map(|(at, _)| *at).filter(|at| *at >= 10_000).collect();
        assert!(after[0] < 10_600, "{after:?}");
    }

    #[test]
    fn a_write_right_after_a_look_is_seen_within_a_second() {
        for second in [1, 150, 199, 201, 250, 450, 699, 701, 1000, 4999, 5001] {
            let start = Instant::now();
            let mut known = Known::new(start);
            let seen = looks(&mut known, start, 9000, |at| if at == 0 || at == second { vec![1] } else { vec![] });
            let first = seen.iter().map(|(at, _)| *at).find(|at| *at > second + 50).unwrap();
            assert!(first <= second + 700, "written at {second}, seen at {first}");
        }
    }

    #[test]
    fn a_flood_of_known_names_costs_a_bounded_number_of_looks_and_what_waits_longest_comes_first() {
        let start = Instant::now();
        let mut known = Known::new(start);
        let seen = looks(&mut known, start, 5000, |at| if at % 10 == 0 { (0..1000).collect() } else { vec![] });
        assert!(seen.len() <= 600, "{} looks in five seconds", seen.len());
        let distinct: std::collections::HashSet<_> = seen.iter().map(|(_, notice)| notice.clone()).collect();
        assert!(distinct.len() == seen.len(), "one Secret was looked at twice while others waited");
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let start = Instant::now();
        let mut known = Known::new(start);
        let taken = (0..MOST + 500).filter(|number| known.hear(&notice(*number), start)).count();
        assert_eq!((taken, known.secrets.len()), (MOST, MOST));
        assert!(known.hear(&notice(0), start), "what is known can be heard of again");
    }

    #[test]
    fn the_leader_is_told_of_each_write_and_a_new_leader_looks_at_what_was_told_to_the_old_one() {
        let start = Instant::now();
        let mut known = Known::new(start);
        (0..=BATCH).for_each(|number| assert!(known.hear(&notice(number), start)));
        let batch = known.unsent();
        assert_eq!(batch.len(), BATCH);
        // A write that is heard of while the leader is being told.
        known.hear(&batch[0], start + ms(5));
        known.sent(&batch, start);
        let left = known.unsent();
        assert_eq!(left.len(), 2);
        assert_eq!(left[1], batch[0], "the later one comes later");
        known.sent(&left, start + ms(10));
        assert!(!known.is_unsent());
        known.inherit(start + ms(1000));
        let seen = looks(&mut known, start, 3000, |_| vec![]);
        let distinct: std::collections::HashSet<_> = seen.into_iter().map(|(_, notice)| notice).collect();
        assert_eq!(distinct.len(), BATCH + 1);
        known.sent(&known.unsent(), start + ms(3000));
        known.sent(&known.unsent(), start + ms(3000));
        known.hear(&notice(1), start + ms(7000));
        assert_eq!(known.forget(start + ms(7000) + MEMORY), 1, "the last was told to nobody");
        assert!(known.secrets.is_empty());
    }
}
