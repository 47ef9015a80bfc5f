//! Who is asking: the cluster's answers to whether somebody holds a right.
//!
//! [`Reviewer`] is the one question; [`Cluster`] asks it by SubjectAccessReview and [`Cached`] remembers the answer
//! for a few seconds. [`ask`] takes a [`Need`] apart: what has to hold together goes out at once.

mod cache;
pub mod roles;

use std::{future::Future, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};

pub use self::cache::Cached;
use crate::{
    api::{GROUP, Requester},
    domain::rights::{Need, Right},
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
    /// The rights that are lacking, as few as say it.
    #[must_use]
    pub fn missing(&self, need: &Need) -> Vec<Right> {
        need.missing(&mut |right| self.asked.iter().any(|(asked, review)| asked == right && review.allowed))
    }
}

/// Finds out whether a need is met.
///
/// # Errors
/// If the cluster can't be asked.
pub fn ask<'a, R: Reviewer>(
    reviewer: &'a R,
    who: &'a Arc<Requester>,
    namespace: &'a Arc<str>,
    need: &'a Need,
) -> BoxFuture<'a, Result<Answer, Unanswered>> {
    async move {
        match need {
            Need::Right(right) => {
                let review = reviewer.review(who, namespace, right).await?;
                Ok(Answer { met: review.allowed, asked: vec![(right.clone(), review)] })
            }
            Need::All(needs) => {
                let answers = needs.iter().map(|need| ask(reviewer, who, namespace, need));
                let answers = futures::future::try_join_all(answers).await?;
                let met = answers.iter().all(|answer| answer.met);
                Ok(Answer { met, asked: answers.into_iter().flat_map(|answer| answer.asked).collect() })
            }
            Need::Any(needs) => {
                let mut all = Answer::default();
                for need in needs {
                    let answer = ask(reviewer, who, namespace, need).await?;
                    all.asked.extend(answer.asked);
                    if answer.met {
                        all.met = true;
                        break;
                    }
                }
                Ok(all)
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
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(3);

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
