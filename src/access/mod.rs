//! Who is asking: the cluster's answers to whether somebody holds a right.
//!
//! [`Reviewer`] is the one question; [`Cluster`] asks it by SubjectAccessReview and [`Cached`] remembers the answer
//! for a few seconds. [`ask`] takes a [`Need`] apart, and stops at the first few rights that are lacking.

mod cache;
pub mod roles;

use std::{future::Future, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};

pub use self::cache::Cached;
use crate::{
    api::{GROUP, Requester},
    domain::{
        gates::MOST_MISSING,
        rights::{Need, Right},
    },
};

/// The verb on the virtual resources.
pub const VERB: &str = "use";

/// What the cluster says of one right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Review {
    /// Whether it is held.
    pub allowed: bool,
    /// By which binding, in the words of the authorizer.
    pub reason: String,
}

/// Asks whether somebody holds one right in a namespace.
pub trait Reviewer: Send + Sync {
    /// One question.
    ///
    /// # Errors
    /// If the cluster can't be asked. That is a no.
    fn review(
        &self,
        who: &Arc<Requester>,
        namespace: &Arc<str>,
        right: &Right,
    ) -> impl Future<Output = Result<Review, Unanswered>> + Send;
}

/// The cluster could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("whether {right} is held could not be asked; try again")]
pub struct Unanswered {
    /// The right.
    pub right: Right,
}

/// What became of a need.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Every right that was asked for, and what the cluster said.
    pub asked: Vec<(Right, Review)>,
    /// Whether the need is met.
    pub met: bool,
}

impl Answer {
    /// The rights that are lacking, as few as say it; of those that were asked for.
    #[must_use]
    pub fn missing(&self, need: &Need) -> Vec<Right> {
        let held =
            |right: &Right| self.asked.iter().find(|(asked, _)| asked == right).map(|(_, review)| review.allowed);
        let missing = need.missing(&mut |right| held(right) == Some(true));
        missing.into_iter().filter(|right| held(right).is_some()).collect()
    }
}

/// Finds out whether a need is met, and if not, by which rights; by [`MOST_MISSING`] of them at most, after which nothing
/// more is asked.
///
/// # Errors
/// If the cluster can't be asked.
pub fn ask<'a, R: Reviewer>(
    reviewer: &'a R,
    who: &'a Arc<Requester>,
    namespace: &'a Arc<str>,
    need: &'a Need,
) -> BoxFuture<'a, Result<Answer, Unanswered>> {
    ask_until(reviewer, who, namespace, need, (MOST_MISSING, WIDEST))
}

/// How many questions of one need are under way at once, at most.
const WIDEST: usize = 32;

/// As [`ask`]; nothing more is asked once `enough` of what has to hold together does not, and at most `widest` questions
/// are under way at once.
fn ask_until<'a, R: Reviewer>(
    reviewer: &'a R,
    who: &'a Arc<Requester>,
    namespace: &'a Arc<str>,
    need: &'a Need,
    (enough, widest): (usize, usize),
) -> BoxFuture<'a, Result<Answer, Unanswered>> {
    async move {
        match need {
            Need::Right(right) => {
                let review = reviewer.review(who, namespace, right).await?;
                Ok(Answer { met: review.allowed, asked: vec![(right.clone(), review)] })
            }
            Need::All(needs) => {
                let mut all = Answer { met: true, asked: vec![] };
                let (mut rest, mut width, mut unmet) = (needs.as_slice(), enough.min(widest), 0);
                // Few at first: who lacks everything is found out by them. Who lacks nothing is soon asked for many.
                while !rest.is_empty() && unmet < enough {
                    let (now, later) = rest.split_at(width.min(rest.len()));
                    let bounds = (enough, (widest / now.len()).max(1));
                    let answers = now.iter().map(|need| ask_until(reviewer, who, namespace, need, bounds));
                    for answer in futures::future::try_join_all(answers).await? {
                        unmet += usize::from(!answer.met);
                        all.asked.extend(answer.asked);
                    }
                    (rest, width) = (later, (width * 2).min(widest));
                }
                all.met = unmet == 0;
                Ok(all)
            }
            Need::Any(needs) => {
                let mut any = Answer::default();
                // Where a preset is lacking, its name says so; which of its permissions are lacking, nobody is told.
                let named = matches!(needs.first(), Some(Need::Right(first)) if *first != Right::EveryPermission);
                for need in needs {
                    let enough = if named { 1 } else { enough };
                    let answer = ask_until(reviewer, who, namespace, need, (enough, widest)).await?;
                    any.asked.extend(answer.asked);
                    if answer.met {
                        any.met = true;
                        break;
                    }
                }
                Ok(any)
            }
        }
    }
    .boxed()
}

/// Asks the API server.
#[derive(Clone)]
pub struct Cluster {
    reviews: Api<SubjectAccessReview>,
}

impl Cluster {
    /// Asks through this client, which needs the right to create SubjectAccessReviews.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { reviews: Api::all(client) }
    }
}

impl Reviewer for Cluster {
    async fn review(&self, who: &Arc<Requester>, namespace: &Arc<str>, right: &Right) -> Result<Review, Unanswered> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(who.username.clone()),
                uid: who.uid.clone(),
                groups: Some(who.groups.clone()),
                extra: Some(who.extra.clone()),
                resource_attributes: Some(attributes(namespace, right)),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let params = PostParams::default();
        let answer = tokio::time::timeout(TIMEOUT, self.reviews.create(&params, &review)).await;
        match answer {
            Ok(Ok(SubjectAccessReview { status: Some(status), .. })) => Ok(Review {
                allowed: status.allowed && !status.denied.unwrap_or_default(),
                reason: status.reason.unwrap_or_default(),
            }),
            _ => Err(Unanswered { right: right.clone() }),
        }
    }
}

/// Less than the time that the API server gives the webhook.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(4);

/// A right as the authorizer is asked for it.
#[must_use]
pub fn attributes(namespace: &str, right: &Right) -> ResourceAttributes {
    let of =
        |group: &str, resource: &str, verb: &str, namespace: Option<&str>, name: Option<&str>| ResourceAttributes {
            group: Some(group.to_owned()),
            version: Some("*".to_owned()),
            resource: Some(resource.to_owned()),
            verb: Some(verb.to_owned()),
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
            ..ResourceAttributes::default()
        };
    match right {
        Right::Permission(name) => of(GROUP, "permissions", VERB, Some(namespace), Some(name)),
        Right::EveryPermission => of(GROUP, "permissions", VERB, Some(namespace), None),
        Right::Preset(name) => of(GROUP, "presets", VERB, Some(namespace), Some(name)),
        Right::ReadSecret(name) => of("", "secrets", "get", Some(namespace), Some(name)),
        Right::Restore => of(GROUP, "apikeys", "restore", Some(namespace), None),
        Right::Impersonate(user) => match user.strip_prefix("system:serviceaccount:").and_then(|sa| sa.split_once(':'))
        {
            Some((namespace, name)) => of("", "serviceaccounts", "impersonate", Some(namespace), Some(name)),
            None => of("", "users", "impersonate", None, Some(user)),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// Knows who holds what, and counts the questions.
    #[derive(Default)]
    struct Known {
        held: BTreeSet<Right>,
        asked: AtomicUsize,
        under_way: AtomicUsize,
        most: AtomicUsize,
    }

    impl Reviewer for Known {
        async fn review(&self, _: &Arc<Requester>, _: &Arc<str>, right: &Right) -> Result<Review, Unanswered> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(now, Ordering::Relaxed);
            tokio::task::yield_now().await;
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            Ok(Review { allowed: self.held.contains(right), reason: String::new() })
        }
    }

    fn permission(number: usize) -> Right {
        Right::Permission(format!("p:{number:03}").into())
    }

    fn each(rights: impl IntoIterator<Item = Right>) -> Need {
        Need::All(rights.into_iter().map(Need::Right).collect())
    }

    /// As a key of 300 permissions and 60 presets of 14 permissions each needs it.
    fn large() -> Need {
        let permissions = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        let preset = |number: usize| {
            let whole = Need::Right(Right::Preset(format!("P{number}").into()));
            Need::Any(vec![whole, each((0..14).map(|n| permission(1000 + number * 14 + n)))])
        };
        Need::All((0..60).map(preset).chain([permissions]).collect())
    }

    async fn ask_of(known: &Known, need: &Need) -> Answer {
        ask(known, &Arc::default(), &"shop".into(), need).await.unwrap()
    }

    #[tokio::test]
    async fn a_refusal_stops_at_the_first_few_missing_rights() {
        let nobody = Known::default();
        let need = large();
        let answer = ask_of(&nobody, &need).await;
        assert!(!answer.met);
        let presets: Vec<_> = (0..MOST_MISSING).map(|n| Right::Preset(format!("P{n}").into())).collect();
        assert_eq!(answer.missing(&need), presets);
        assert_eq!(nobody.asked.load(Ordering::Relaxed), 2 * MOST_MISSING, "each preset, and one of its permissions");

        let nobody = Known::default();
        let need = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        let answer = ask_of(&nobody, &need).await;
        assert_eq!(answer.missing(&need), (0..MOST_MISSING).map(permission).collect::<Vec<_>>());
        assert_eq!(nobody.asked.load(Ordering::Relaxed), 1 + MOST_MISSING);
    }

    #[tokio::test]
    async fn what_is_lacking_is_found_wherever_it_stands_and_nothing_is_told_of_what_was_not_asked() {
        for lacking in [0, 7, 150, 299] {
            let known =
                Known { held: (0..300).filter(|n| *n != lacking).map(permission).collect(), ..Known::default() };
            let need = each((0..300).map(permission));
            let answer = ask_of(&known, &need).await;
            assert!(!answer.met);
            assert_eq!(answer.missing(&need), [permission(lacking)]);
        }
    }

    #[tokio::test]
    async fn who_holds_everything_is_asked_for_all_of_it_and_for_so_many_at_once() {
        let known = Known { held: (0..1000 + 60 * 14).map(permission).collect(), ..Known::default() };
        assert!(ask_of(&known, &large()).await.met);
        assert!(known.most.load(Ordering::Relaxed) <= WIDEST, "{:?}", known.most);
        assert!(known.asked.load(Ordering::Relaxed) > 300);
        let known = Known { held: [Right::EveryPermission].into(), ..Known::default() };
        let need = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        assert!(ask_of(&known, &need).await.met);
        assert_eq!(known.asked.load(Ordering::Relaxed), 1, "the common one comes first");
    }
}
