//! Notices of writes to Secrets, and the checks of these Secrets by the leader.
//!
//! The API server calls any replica. The leader checks the Secret after a delay, since the API server calls a webhook
//! before it stores the write. Other replicas send the notice to the leader and keep it for a while in case they become
//! the leader.
//!
//! Clients can forge notices, so there are limits on the number of kept notices, the checks of one Secret and the
//! checks per second. The periodic check covers notices that are dropped at a limit.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use axum::body::Body;
use http::{Request, StatusCode};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use crate::admission::{
    secrets::{BATCH, NOTICE_PATH, SecretNotice},
    self_check,
};
use crate::telemetry::metrics::{Metrics, NoticeResult};

/// The delays of the checks after a notice. Nearly every write is stored before the first check. A busy API server
/// takes longer, and other webhooks may delay a write by 30 seconds.
const CHECK_DELAYS: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(700), Duration::from_secs(5), Duration::from_secs(35)];

/// The minimum time between two checks of one Secret.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(400);

/// The maximum rate of checks, and also the maximum burst.
const CHECKS_PER_SECOND: f64 = 100.0;

/// The maximum number of Secrets with kept notices, a few megabytes.
const MAX_SECRETS: usize = 20_000;

/// The time for which a replica that does not lead keeps a notice. Longer than a change of the leader takes.
const RETENTION: Duration = Duration::from_mins(1);

/// The time-out of a request to the leader.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

/// The minimum time between two requests to the leader, and between two batches of checks at the maximum rate.
const BATCH_INTERVAL: Duration = Duration::from_millis(50);

/// The delay after a failed request.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// The address and the TLS parameters of the leader's webhook.
pub struct LeaderAddress {
    /// The address of the leader's webhook, if another replica leads.
    pub address: watch::Receiver<Option<SocketAddr>>,
    /// The CA certificates of the webhook (PEM), as in `caBundle`.
    pub bundle: watch::Receiver<Option<Vec<u8>>>,
    /// The name in the webhook's certificate.
    pub server_name: String,
}

impl LeaderAddress {
    async fn send(&self, notices: &[SecretNotice]) -> Result<(), String> {
        let Some(address) = *self.address.borrow() else { return Err("the leader's address is not known".to_owned()) };
        let bundle = self.bundle.borrow().clone().ok_or("the webhook's CA is not known")?;
        let body = serde_json::to_vec(notices).map_err(|error| error.to_string())?;
        let request = Request::post(NOTICE_PATH)
            .header("host", &self.server_name)
            .header("content-type", "application/json")
            .body(Body::from(body))
            .map_err(|error| error.to_string())?;
        let response = timeout(SEND_TIMEOUT, self_check::send(address, &self.server_name, &bundle, None, request));
        match response.await.map_err(|_| format!("no response in {SEND_TIMEOUT:?}"))?? {
            StatusCode::NO_CONTENT => Ok(()),
            other => Err(format!("the replica at {address} responded with {other}")),
        }
    }
}

/// Runs until the sender of `notices` is dropped. `check` requests a check of a Secret.
pub async fn run(
    mut notices: mpsc::Receiver<SecretNotice>,
    mut leader: watch::Receiver<bool>,
    leader_address: LeaderAddress,
    metrics: Metrics,
    check: impl Fn(&SecretNotice),
) {
    let mut pending = PendingWrites::new(Instant::now());
    let mut received = Vec::new();
    // No request is sent to the leader before this time.
    let mut next_send = Instant::now();
    loop {
        let leads = *leader.borrow_and_update();
        let wake = if leads { pending.next_check() } else { pending.is_unsent().then_some(next_send) };
        tokio::select! {
            count = notices.recv_many(&mut received, BATCH) => if count == 0 { return },
            // An error means that the election has ended.
            Ok(()) = leader.changed() => if *leader.borrow() { pending.restart(Instant::now()) },
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
        }
        let now = Instant::now();
        let lost = received.drain(..).filter(|notice| !pending.record(notice, now)).count();
        if *leader.borrow() {
            let due = pending.take_due(now);
            metrics.noticed(NoticeResult::Lost, lost);
            metrics.noticed(NoticeResult::Taken, due.len());
            due.iter().for_each(&check);
            continue;
        }
        metrics.noticed(NoticeResult::Lost, lost + pending.forget(now));
        if now < next_send {
            continue;
        }
        let batch = pending.unsent();
        if batch.is_empty() {
            continue;
        }
        let sent = leader_address.send(&batch).await;
        next_send = Instant::now() + if sent.is_ok() { BATCH_INTERVAL } else { RETRY_DELAY };
        match sent {
            Ok(()) => {
                pending.mark_sent(&batch, now);
                metrics.noticed(NoticeResult::Forwarded, batch.len());
            }
            Err(error) => tracing::debug!(notices = batch.len(), error, "cannot send notices to the leader; retrying"),
        }
    }
}

/// The Secrets with recent writes.
struct PendingWrites {
    secrets: HashMap<SecretNotice, PendingCheck>,
    /// The number of checks that the rate allows, and the time of this number.
    budget: (f64, Instant),
}

/// The checks of one Secret.
#[derive(Clone, Copy, Debug)]
struct PendingCheck {
    /// The time of the last notice.
    last_notice: Instant,
    /// The time of the next check.
    next: Instant,
    /// The time of the last check.
    last_check: Option<Instant>,
    /// Whether the last notice was sent to the leader.
    sent: bool,
}

impl PendingCheck {
    fn new(now: Instant) -> Self {
        Self { last_notice: now, next: now + CHECK_DELAYS[0], last_check: None, sent: false }
    }

    fn record(&mut self, now: Instant) {
        let earliest = self.last_check.map_or(now, |at| at + MIN_CHECK_INTERVAL);
        (self.last_notice, self.sent) = (now, false);
        self.next = self.next.min((now + CHECK_DELAYS[0]).max(earliest));
    }

    /// Records a check. Returns the time of the next one, if there is one.
    fn record_check(&mut self, now: Instant) -> Option<Instant> {
        let next = CHECK_DELAYS.iter().map(|after| self.last_notice + *after).find(|at| *at > now)?;
        self.last_check = Some(now);
        self.next = next.max(now + MIN_CHECK_INTERVAL);
        Some(self.next)
    }
}

impl PendingWrites {
    fn new(now: Instant) -> Self {
        Self { secrets: HashMap::new(), budget: (CHECKS_PER_SECOND, now) }
    }

    /// Records a notice. Returns false if the maximum number is reached.
    fn record(&mut self, notice: &SecretNotice, now: Instant) -> bool {
        if let Some(check) = self.secrets.get_mut(notice) {
            check.record(now);
        } else if self.secrets.len() < MAX_SECRETS {
            self.secrets.insert(notice.clone(), PendingCheck::new(now));
        } else {
            return false;
        }
        true
    }

    /// Restarts all checks. A new leader calls this, since the previous leader may not have completed them.
    fn restart(&mut self, now: Instant) {
        self.secrets.values_mut().for_each(|check| *check = PendingCheck::new(now));
    }

    /// The time of the next call of [`Self::take_due`].
    fn next_check(&self) -> Option<Instant> {
        let next = self.secrets.values().map(|check| check.next).min()?;
        // At the maximum rate, checks run in batches, since each call sorts all due ones.
        let (left, since) = self.budget;
        Some(if left < 1.0 { next.max(since + BATCH_INTERVAL) } else { next })
    }

    /// Takes the Secrets with a due check, up to the allowed number. The longest due come first.
    fn take_due(&mut self, now: Instant) -> Vec<SecretNotice> {
        let (left, since) = self.budget;
        let mut left = (left + now.duration_since(since).as_secs_f64() * CHECKS_PER_SECOND).min(CHECKS_PER_SECOND);
        self.budget = (left, now);
        if left < 1.0 {
            return vec![];
        }
        let mut due: Vec<_> = self.secrets.iter().filter(|(_, check)| check.next <= now).collect();
        due.sort_unstable_by_key(|(_, check)| check.next);
        let mut checks = Vec::new();
        for (notice, _) in due {
            if left < 1.0 {
                break;
            }
            left -= 1.0;
            checks.push(notice.clone());
        }
        self.budget = (left, now);
        for notice in &checks {
            if self.secrets.get_mut(notice).and_then(|check| check.record_check(now)).is_none() {
                self.secrets.remove(notice);
            }
        }
        checks
    }

    fn is_unsent(&self) -> bool {
        self.secrets.values().any(|check| !check.sent)
    }

    /// The notices that were not sent to the leader, up to one batch. The oldest come first.
    fn unsent(&self) -> Vec<SecretNotice> {
        let mut unsent: Vec<_> = self.secrets.iter().filter(|(_, check)| !check.sent).collect();
        unsent.sort_unstable_by_key(|(_, check)| check.last_notice);
        unsent.into_iter().take(BATCH).map(|(notice, _)| notice.clone()).collect()
    }

    /// Marks notices as sent, if there is none after `then`.
    fn mark_sent(&mut self, notices: &[SecretNotice], then: Instant) {
        for notice in notices {
            if let Some(check) = self.secrets.get_mut(notice)
                && check.last_notice <= then
            {
                check.sent = true;
            }
        }
    }

    /// Removes old notices. Returns the number of them that were not sent.
    fn forget(&mut self, now: Instant) -> usize {
        let mut lost = 0;
        self.secrets.retain(|_, check| {
            let keep = now.duration_since(check.last_notice) < RETENTION;
            lost += usize::from(!keep && !check.sent);
            keep
        });
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(number: usize) -> SecretNotice {
        SecretNotice { namespace: "shop".to_owned(), secret: format!("s{number}") }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Advances the clock in steps of a millisecond. `writes` returns the Secrets that are written in a millisecond.
    /// Returns the checks with their check in milliseconds.
    fn checks(
        known: &mut PendingWrites,
        start: Instant,
        span: u64,
        writes: impl Fn(u64) -> Vec<usize>,
    ) -> Vec<(u64, SecretNotice)> {
        let mut seen = vec![];
        for at in 0..span {
            let now = start + ms(at);
            for number in writes(at) {
                known.record(&notice(number), now);
            }
            if known.next_check().is_some_and(|next| next <= now) {
                seen.extend(known.take_due(now).into_iter().map(|notice| (at, notice)));
            }
        }
        seen
    }

    #[test]
    fn a_write_is_checked_soon_and_again_in_case_it_was_stored_late() {
        let start = Instant::now();
        let mut known = PendingWrites::new(start);
        let seen = checks(&mut known, start, 60_000, |at| if at == 0 { vec![1] } else { vec![] });
        assert_eq!(seen.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [200, 700, 5000, 35_000]);
        assert!(known.secrets.is_empty(), "the notice is removed after the last check");
    }

    #[test]
    fn many_writes_to_one_secret_cause_few_checks_and_the_last_is_checked_within_a_second() {
        let start = Instant::now();
        let mut known = PendingWrites::new(start);
        let seen = checks(&mut known, start, 20_000, |at| if at < 10_000 { vec![1] } else { vec![] });
        let during = seen.iter().filter(|(at, _)| *at < 10_000).count();
        assert!((20..=25).contains(&during), "{during} checks in ten seconds");
        let after: Vec<_> = seen.iter().map(|(at, _)| *at).filter(|at| *at >= 10_000).collect();
        assert!(after[0] < 10_600, "{after:?}");
    }

    #[test]
    fn a_write_right_after_a_check_is_checked_within_a_second() {
        for second in [1, 150, 199, 201, 250, 450, 699, 701, 1000, 4999, 5001] {
            let start = Instant::now();
            let mut known = PendingWrites::new(start);
            let seen = checks(&mut known, start, 9000, |at| if at == 0 || at == second { vec![1] } else { vec![] });
            let first = seen.iter().map(|(at, _)| *at).find(|at| *at > second + 50).unwrap();
            assert!(first <= second + 700, "written at {second}, checked at {first}");
        }
    }

    #[test]
    fn a_flood_of_notices_causes_bounded_checks_and_the_longest_due_come_first() {
        let start = Instant::now();
        let mut known = PendingWrites::new(start);
        let seen = checks(&mut known, start, 5000, |at| if at % 10 == 0 { (0..1000).collect() } else { vec![] });
        assert!(seen.len() <= 600, "{} checks in five seconds", seen.len());
        let distinct: std::collections::HashSet<_> = seen.iter().map(|(_, notice)| notice.clone()).collect();
        assert!(distinct.len() == seen.len(), "one Secret was checked twice while others waited");
    }

    #[test]
    fn notices_beyond_the_maximum_number_of_secrets_are_dropped() {
        let start = Instant::now();
        let mut known = PendingWrites::new(start);
        let taken = (0..MAX_SECRETS + 500).filter(|number| known.record(&notice(*number), start)).count();
        assert_eq!((taken, known.secrets.len()), (MAX_SECRETS, MAX_SECRETS));
        assert!(known.record(&notice(0), start), "another notice of a kept Secret is accepted");
    }

    #[test]
    fn each_notice_is_sent_to_the_leader_and_a_new_leader_repeats_the_checks() {
        let start = Instant::now();
        let mut known = PendingWrites::new(start);
        (0..=BATCH).for_each(|number| assert!(known.record(&notice(number), start)));
        let batch = known.unsent();
        assert_eq!(batch.len(), BATCH);
        // A notice that arrives while a batch is being sent.
        known.record(&batch[0], start + ms(5));
        known.mark_sent(&batch, start);
        let left = known.unsent();
        assert_eq!(left.len(), 2);
        assert_eq!(left[1], batch[0], "the later notice comes last");
        known.mark_sent(&left, start + ms(10));
        assert!(!known.is_unsent());
        known.restart(start + ms(1000));
        let seen = checks(&mut known, start, 3000, |_| vec![]);
        let distinct: std::collections::HashSet<_> = seen.into_iter().map(|(_, notice)| notice).collect();
        assert_eq!(distinct.len(), BATCH + 1);
        known.mark_sent(&known.unsent(), start + ms(3000));
        known.mark_sent(&known.unsent(), start + ms(3000));
        known.record(&notice(1), start + ms(7000));
        assert_eq!(known.forget(start + ms(7000) + RETENTION), 1, "one notice was not sent");
        assert!(known.secrets.is_empty());
    }
}
