//! A cache of granted access reviews, bounded in time and number.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{AccessReview, Reviewer, Unanswered};
use crate::{api::Requester, domain::rights::Right};

type CacheKey = (Arc<Requester>, Arc<str>, Right);

/// A reviewer that caches the answers of another. It caches only granted rights, so that a new right applies at once; a
/// revoked right applies until its entry expires.
#[derive(Debug)]
pub struct Cached<R> {
    inner: R,
    ttl: Duration,
    capacity: usize,
    entries: Mutex<HashMap<CacheKey, (AccessReview, Instant)>>,
}

impl<R> Cached<R> {
    /// Caches at most `capacity` answers, each for `ttl`; with a `ttl` of zero, none.
    #[must_use]
    pub fn new(inner: R, ttl: Duration, capacity: usize) -> Self {
        Self { inner, ttl, capacity, entries: Mutex::default() }
    }

    fn get(&self, key: &CacheKey) -> Option<AccessReview> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(key).filter(|(_, expires_at)| Instant::now() < *expires_at).map(|(review, _)| review.clone())
    }

    fn insert(&self, key: CacheKey, review: &AccessReview, asked_at: Instant) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= self.capacity {
            let now = Instant::now();
            entries.retain(|_, (_, expires_at)| now < *expires_at);
        }
        // A cache that is full of valid entries does not grow: further rights are asked for each time.
        if entries.len() < self.capacity {
            // The time counts from the request, since the answer may be that old.
            entries.insert(key, (review.clone(), asked_at + self.ttl));
        }
    }
}

impl<R: Reviewer> Reviewer for Cached<R> {
    async fn review(
        &self,
        requester: &Arc<Requester>,
        namespace: &Arc<str>,
        right: &Right,
    ) -> Result<AccessReview, Unanswered> {
        if self.ttl.is_zero() {
            return self.inner.review(requester, namespace, right).await;
        }
        let key = (Arc::clone(requester), Arc::clone(namespace), right.clone());
        if let Some(review) = self.get(&key) {
            return Ok(review);
        }
        let asked_at = Instant::now();
        let review = self.inner.review(requester, namespace, right).await?;
        if review.allowed {
            self.insert(key, &review, asked_at);
        }
        Ok(review)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Grants every permission but `no`, and counts the reviews.
    #[derive(Default)]
    struct CountingReviewer(AtomicUsize);

    impl Reviewer for CountingReviewer {
        async fn review(&self, _: &Arc<Requester>, _: &Arc<str>, right: &Right) -> Result<AccessReview, Unanswered> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(AccessReview { allowed: *right != Right::Permission("no".into()), reason: String::new() })
        }
    }

    async fn ask(cached: &Cached<CountingReviewer>, user: &str, name: &str) -> bool {
        let requester = Arc::new(Requester { username: user.to_owned(), ..Requester::default() });
        cached.review(&requester, &"shop".into(), &Right::Permission(name.into())).await.unwrap().allowed
    }

    #[tokio::test(start_paused = true)]
    async fn a_cached_answer_expires_after_the_ttl_although_it_was_read() {
        let cached = Cached::new(CountingReviewer::default(), Duration::from_secs(5), 10);
        assert!(ask(&cached, "alice", "a").await);
        tokio::time::advance(Duration::from_millis(4999)).await;
        assert!(ask(&cached, "alice", "a").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 1, "the second answer comes from the cache");
        // Reading an entry does not extend it.
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(ask(&cached, "alice", "a").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 2, "the entry expired after five seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn denials_are_not_cached_and_users_do_not_share_entries() {
        let cached = Cached::new(CountingReviewer::default(), Duration::from_secs(5), 10);
        assert!(!ask(&cached, "alice", "no").await);
        assert!(!ask(&cached, "alice", "no").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 2);
        ask(&cached, "alice", "a").await;
        ask(&cached, "bob", "a").await;
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_does_not_grow_past_its_capacity() {
        let cached = Cached::new(CountingReviewer::default(), Duration::from_secs(5), 3);
        for name in ["a", "b", "c", "d", "e"] {
            ask(&cached, "alice", name).await;
        }
        assert_eq!(cached.entries.lock().unwrap().len(), 3);
        tokio::time::advance(Duration::from_secs(6)).await;
        ask(&cached, "alice", "f").await;
        assert_eq!(cached.entries.lock().unwrap().len(), 1, "expired entries are removed");
    }
}
