//! Access reviews: whether a user holds a right.
//!
//! A [`Reviewer`] answers for one right: [`ClusterReviewer`] by SubjectAccessReview, [`Cached`] from a cache of granted
//! rights. [`ask`] answers for a [`Need`] of several rights and stops after the first few missing ones.

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
        authorization::MAX_MISSING,
        rights::{Need, Right},
    },
};

/// The verb on the virtual resources.
pub const VERB: &str = "use";

/// The answer for one right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessReview {
    /// Whether the user holds the right.
    pub allowed: bool,
    /// The reason that the authorizer gives, which names the binding.
    pub reason: String,
}

/// Answers whether a user holds one right in a namespace.
pub trait Reviewer: Send + Sync {
    /// Reviews one right.
    ///
    /// # Errors
    /// If the API server does not answer. Callers treat that as a denial.
    fn review(
        &self,
        requester: &Arc<Requester>,
        namespace: &Arc<str>,
        right: &Right,
    ) -> impl Future<Output = Result<AccessReview, Unanswered>> + Send;
}

/// The API server did not answer the review of a right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the API server could not be asked for {right}: try again")]
pub struct Unanswered {
    /// The right that was not reviewed.
    pub right: Right,
}

/// The answer for a need.
#[derive(Clone, Debug, Default)]
pub struct AccessAnswer {
    /// Every right that was reviewed, with its answer.
    pub asked: Vec<(Right, AccessReview)>,
    /// Whether the need is met.
    pub met: bool,
}

impl AccessAnswer {
    /// Returns the missing rights among those that were reviewed, as few as explain the denial.
    #[must_use]
    pub fn missing(&self, need: &Need) -> Vec<Right> {
        let held =
            |right: &Right| self.asked.iter().find(|(asked, _)| asked == right).map(|(_, review)| review.allowed);
        let missing = need.missing(&mut |right| held(right) == Some(true));
        missing.into_iter().filter(|right| held(right).is_some()).collect()
    }
}

/// Reviews the rights of a need, and stops after [`MAX_MISSING`] missing ones.
///
/// # Errors
/// If the API server does not answer.
pub fn ask<'a, R: Reviewer>(
    reviewer: &'a R,
    requester: &'a Arc<Requester>,
    namespace: &'a Arc<str>,
    need: &'a Need,
) -> BoxFuture<'a, Result<AccessAnswer, Unanswered>> {
    ask_until(reviewer, requester, namespace, need, (MAX_MISSING, MAX_CONCURRENT_REVIEWS))
}

/// The maximum number of concurrent reviews for one need.
const MAX_CONCURRENT_REVIEWS: usize = 32;

/// Like [`ask`]; stops once `max_unmet` needs of one [`Need::All`] are not met, and runs at most `max_concurrent`
/// reviews at a time.
fn ask_until<'a, R: Reviewer>(
    reviewer: &'a R,
    requester: &'a Arc<Requester>,
    namespace: &'a Arc<str>,
    need: &'a Need,
    (max_unmet, max_concurrent): (usize, usize),
) -> BoxFuture<'a, Result<AccessAnswer, Unanswered>> {
    async move {
        match need {
            Need::Right(right) => {
                let review = reviewer.review(requester, namespace, right).await?;
                Ok(AccessAnswer { met: review.allowed, asked: vec![(right.clone(), review)] })
            }
            Need::All(needs) => {
                let mut all = AccessAnswer { met: true, asked: vec![] };
                let (mut rest, mut width, mut unmet) = (needs.as_slice(), max_unmet.min(max_concurrent), 0);
                // The first batch is small, since it suffices for a user who lacks everything. Each next batch is twice
                // as large, so that a user who lacks nothing waits for few batches.
                while !rest.is_empty() && unmet < max_unmet {
                    let (now, later) = rest.split_at(width.min(rest.len()));
                    let bounds = (max_unmet, (max_concurrent / now.len()).max(1));
                    let answers = now.iter().map(|need| ask_until(reviewer, requester, namespace, need, bounds));
                    for answer in futures::future::try_join_all(answers).await? {
                        unmet += usize::from(!answer.met);
                        all.asked.extend(answer.asked);
                    }
                    (rest, width) = (later, (width * 2).min(max_concurrent));
                }
                all.met = unmet == 0;
                Ok(all)
            }
            Need::Any(needs) => {
                let mut any = AccessAnswer::default();
                // A missing preset is reported by its own name, so one missing permission of it suffices.
                let is_preset = matches!(needs.first(), Some(Need::Right(first)) if *first != Right::EveryPermission);
                for need in needs {
                    let max_unmet = if is_preset { 1 } else { max_unmet };
                    let answer = ask_until(reviewer, requester, namespace, need, (max_unmet, max_concurrent)).await?;
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

/// Reviews rights by SubjectAccessReview.
#[derive(Clone)]
pub struct ClusterReviewer {
    reviews: Api<SubjectAccessReview>,
}

impl ClusterReviewer {
    /// Creates a reviewer. The client needs the right to create SubjectAccessReviews.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { reviews: Api::all(client) }
    }
}

impl Reviewer for ClusterReviewer {
    async fn review(
        &self,
        requester: &Arc<Requester>,
        namespace: &Arc<str>,
        right: &Right,
    ) -> Result<AccessReview, Unanswered> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(requester.username.clone()),
                uid: requester.uid.clone(),
                groups: Some(requester.groups.clone()),
                extra: Some(requester.extra.clone()),
                resource_attributes: Some(attributes(namespace, right)),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let params = PostParams::default();
        let answer = tokio::time::timeout(TIMEOUT, self.reviews.create(&params, &review)).await;
        match answer {
            Ok(Ok(SubjectAccessReview { status: Some(status), .. })) => Ok(AccessReview {
                allowed: status.allowed && !status.denied.unwrap_or_default(),
                reason: status.reason.unwrap_or_default(),
            }),
            _ => Err(Unanswered { right: right.clone() }),
        }
    }
}

/// Shorter than the default of `webhook.timeoutSeconds` in the chart.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(4);

/// Returns the resource attributes of a right for an access review.
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

    /// Grants the rights in `held`, and counts the reviews.
    #[derive(Default)]
    struct FakeReviewer {
        held: BTreeSet<Right>,
        asked: AtomicUsize,
        concurrent: AtomicUsize,
        max_concurrent: AtomicUsize,
    }

    impl Reviewer for FakeReviewer {
        async fn review(&self, _: &Arc<Requester>, _: &Arc<str>, right: &Right) -> Result<AccessReview, Unanswered> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let now = self.concurrent.fetch_add(1, Ordering::Relaxed) + 1;
            self.max_concurrent.fetch_max(now, Ordering::Relaxed);
            tokio::task::yield_now().await;
            self.concurrent.fetch_sub(1, Ordering::Relaxed);
            Ok(AccessReview { allowed: self.held.contains(right), reason: String::new() })
        }
    }

    fn permission(number: usize) -> Right {
        Right::Permission(format!("p:{number:03}").into())
    }

    fn each(rights: impl IntoIterator<Item = Right>) -> Need {
        Need::All(rights.into_iter().map(Need::Right).collect())
    }

    /// The need of a key with 300 permissions and 60 presets of 14 permissions each.
    fn large_need() -> Need {
        let permissions = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        let preset = |number: usize| {
            let whole = Need::Right(Right::Preset(format!("P{number}").into()));
            Need::Any(vec![whole, each((0..14).map(|n| permission(1000 + number * 14 + n)))])
        };
        Need::All((0..60).map(preset).chain([permissions]).collect())
    }

    async fn ask_fake(reviewer: &FakeReviewer, need: &Need) -> AccessAnswer {
        ask(reviewer, &Arc::default(), &"shop".into(), need).await.unwrap()
    }

    #[tokio::test]
    async fn a_denial_stops_after_the_first_few_missing_rights() {
        let reviewer = FakeReviewer::default();
        let need = large_need();
        let answer = ask_fake(&reviewer, &need).await;
        assert!(!answer.met);
        let presets: Vec<_> = (0..MAX_MISSING).map(|n| Right::Preset(format!("P{n}").into())).collect();
        assert_eq!(answer.missing(&need), presets);
        assert_eq!(reviewer.asked.load(Ordering::Relaxed), 2 * MAX_MISSING, "each preset and one permission of it");

        let reviewer = FakeReviewer::default();
        let need = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        let answer = ask_fake(&reviewer, &need).await;
        assert_eq!(answer.missing(&need), (0..MAX_MISSING).map(permission).collect::<Vec<_>>());
        assert_eq!(reviewer.asked.load(Ordering::Relaxed), 1 + MAX_MISSING);
    }

    #[tokio::test]
    async fn a_single_missing_right_is_reported_at_any_position() {
        for missing in [0, 7, 150, 299] {
            let reviewer = FakeReviewer {
                held: (0..300).filter(|n| *n != missing).map(permission).collect(),
                ..FakeReviewer::default()
            };
            let need = each((0..300).map(permission));
            let answer = ask_fake(&reviewer, &need).await;
            assert!(!answer.met);
            assert_eq!(answer.missing(&need), [permission(missing)]);
        }
    }

    #[tokio::test]
    async fn a_need_that_is_met_is_reviewed_completely_with_bounded_concurrency() {
        let reviewer = FakeReviewer { held: (0..1000 + 60 * 14).map(permission).collect(), ..FakeReviewer::default() };
        assert!(ask_fake(&reviewer, &large_need()).await.met);
        assert!(
            reviewer.max_concurrent.load(Ordering::Relaxed) <= MAX_CONCURRENT_REVIEWS,
            "{:?}",
            reviewer.max_concurrent
        );
        assert!(reviewer.asked.load(Ordering::Relaxed) > 300);
        let reviewer = FakeReviewer { held: [Right::EveryPermission].into(), ..FakeReviewer::default() };
        let need = Need::Any(vec![Need::Right(Right::EveryPermission), each((0..300).map(permission))]);
        assert!(ask_fake(&reviewer, &need).await.met);
        assert_eq!(reviewer.asked.load(Ordering::Relaxed), 1, "the right to every permission is reviewed first");
    }
}
