//! Remembers, for a few seconds and a bounded number of rights, that somebody holds a right.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Review, Reviewer, Unanswered};
use crate::{api::Requester, domain::rights::Right};

type Question = (Arc<Requester>, Arc<str>, Right);

/// A reviewer with a memory. It remembers only what was allowed: a right that was just granted counts at once, and one
/// that was taken away counts for as long as the memory lasts.
#[derive(Debug)]
pub struct Cached<R> {
    inner: R,
    lasting: Duration,
    most: usize,
    known: Mutex<HashMap<Question, (Review, Instant)>>,
}

impl<R> Cached<R> {
    /// Remembers at most `most` answers, each for `lasting`; zero for not at all.
    #[must_use]
    pub fn new(inner: R, lasting: Duration, most: usize) -> Self {
        Self { inner, lasting, most, known: Mutex::default() }
    }

    fn recall(&self, question: &Question) -> Option<Review> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(question).filter(|(_, until)| Instant::now() < *until).map(|(review, _)| review.clone())
    }

    fn remember(&self, question: Question, review: &Review, asked_at: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= self.most {
            let now = Instant::now();
            known.retain(|_, (_, until)| now < *until);
        }
        // Full of what is still good: to ask again is right, to grow is not.
        if known.len() < self.most {
            // From when it was asked: the answer may be as old as that.
            known.insert(question, (review.clone(), asked_at + self.lasting));
        }
    }
}

impl<R: Reviewer> Reviewer for Cached<R> {
    async fn review(&self, who: &Arc<Requester>, namespace: &Arc<str>, right: &Right) -> Result<Review, Unanswered> {
        if self.lasting.is_zero() {
            return self.inner.review(who, namespace, right).await;
        }
        let question = (Arc::clone(who), Arc::clone(namespace), right.clone());
        if let Some(known) = self.recall(&question) {
            return Ok(known);
        }
        let asked_at = Instant::now();
        let review = self.inner.review(who, namespace, right).await?;
        if review.allowed {
            self.remember(question, &review, asked_at);
        }
        Ok(review)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Says yes to everything but one name, and counts.
    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Reviewer for Counting {
        async fn review(&self, _: &Arc<Requester>, _: &Arc<str>, right: &Right) -> Result<Review, Unanswered> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Review { allowed: *right != Right::Permission("no".into()), reason: String::new() })
        }
    }

    async fn ask(cached: &Cached<Counting>, user: &str, name: &str) -> bool {
        let who = Arc::new(Requester { username: user.to_owned(), ..Requester::default() });
        cached.review(&who, &"shop".into(), &Right::Permission(name.into())).await.unwrap().allowed
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_never_outlives_its_seconds() {
        let cached = Cached::new(Counting::default(), Duration::from_secs(5), 10);
        assert!(ask(&cached, "alice", "a").await);
        tokio::time::advance(Duration::from_millis(4999)).await;
        assert!(ask(&cached, "alice", "a").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 1, "remembered");
        // That it was recalled does not make it younger.
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(ask(&cached, "alice", "a").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 2, "asked again after five seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn a_no_is_not_remembered_and_users_are_kept_apart() {
        let cached = Cached::new(Counting::default(), Duration::from_secs(5), 10);
        assert!(!ask(&cached, "alice", "no").await);
        assert!(!ask(&cached, "alice", "no").await);
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 2);
        ask(&cached, "alice", "a").await;
        ask(&cached, "bob", "a").await;
        assert_eq!(cached.inner.0.load(Ordering::Relaxed), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn it_does_not_grow_past_its_bound() {
        let cached = Cached::new(Counting::default(), Duration::from_secs(5), 3);
        for name in ["a", "b", "c", "d", "e"] {
            ask(&cached, "alice", name).await;
        }
        assert_eq!(cached.known.lock().unwrap().len(), 3);
        tokio::time::advance(Duration::from_secs(6)).await;
        ask(&cached, "alice", "f").await;
        assert_eq!(cached.known.lock().unwrap().len(), 1, "what is over makes room");
    }
}
