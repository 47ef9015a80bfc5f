//! Who may do what, and why: the same rules and questions as admission has.

use std::{fmt::Write, sync::Arc};

use clap::{Args, ValueEnum};
use k8s_openapi::api::{
    authentication::v1::SelfSubjectReview,
    authorization::v1::{SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
};
use kube::{Api, ResourceExt, api::PostParams};

use super::{Cluster, Reply, Result, key_type, print, refused, say, usage};
use crate::{
    access::{self, Review, Reviewer, Unanswered, attributes},
    api::{
        AccessPolicy, ApiKeySpec, KeyType, Requester, SecuritySettings, SecuritySettingsSpec, creator, creator_of_key,
    },
    domain::{
        catalog::Catalog,
        gates::{self, KnownPolicy, Situation, Verdict},
        policy::Person,
        provenance,
        rights::{Need, Right},
    },
};

/// Asks the API server about whoever asks.
struct Myself {
    reviews: Api<SelfSubjectAccessReview>,
}

impl Reviewer for Myself {
    async fn review(&self, _: &Arc<Requester>, namespace: &Arc<str>, right: &Right) -> Result<Review, Unanswered> {
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes(namespace, right)),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        match self.reviews.create(&PostParams::default(), &review).await {
            Ok(SelfSubjectAccessReview { status: Some(status), .. }) => Ok(Review {
                allowed: status.allowed && !status.denied.unwrap_or_default(),
                reason: status.reason.unwrap_or_default(),
            }),
            _ => Err(Unanswered { right: right.clone() }),
        }
    }
}

fn myself(cluster: &Cluster) -> Myself {
    Myself { reviews: Api::all(cluster.client.clone()) }
}

impl From<Unanswered> for super::Failure {
    fn from(unanswered: Unanswered) -> Self {
        Self::Refused(unanswered.to_string())
    }
}

/// Whether whoever asks has the rights.
pub(super) async fn may(cluster: &Cluster, need: &Need) -> Result<bool> {
    // Who that is, the API server knows.
    let (who, namespace) = (Arc::default(), cluster.namespace.as_str().into());
    Ok(access::ask(&myself(cluster), &who, &namespace, need).await?.met)
}

/// Some change that leaves what a key carries, and for how long, as it is.
const CHANGE: gates::Beside = gates::Beside { metadata: true, known: provenance::Change::NOTHING };

#[derive(Args)]
pub(super) struct CanIArgs {
    /// What: use a permission or a preset; create, view, update or delete a key.
    verb: CanIVerb,
    /// For use: permissions or presets, and the name; the name alone is that of a permission.
    #[arg(num_args = 0..=2)]
    what: Vec<String>,
    /// The type of the key.
    #[arg(long = "type", value_parser = key_type)]
    key_type: Option<KeyType>,
    /// A preset in the key; may be repeated.
    #[arg(long = "preset")]
    presets: Vec<String>,
    /// A permission in the key; may be repeated.
    #[arg(long = "permission")]
    permissions: Vec<String>,
    /// The user of a Personal key; otherwise yourself.
    #[arg(long)]
    user: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CanIVerb {
    Use,
    Create,
    View,
    Update,
    Delete,
}

pub(super) async fn can_i(cluster: &Cluster, args: &CanIArgs) -> Result<Reply> {
    if args.verb == CanIVerb::Use {
        let (kind, name) = match args.what.as_slice() {
            [name] => ("permissions", name),
            [kind, name] => (kind.as_str(), name),
            _ => return usage("say what to use: kubectl keywright can-i use [permissions|presets] NAME"),
        };
        // Who may not read the catalogue can still ask for a right by its exact name.
        let (_, catalog) = cluster.catalog().await.unwrap_or_default();
        let right = match kind {
            "permission" | "permissions" => {
                let known = catalog.permission(name).map(|known| Arc::clone(&known.name));
                warn_of_unknown(&catalog, "permission", name, known.is_none(), &catalog.permissions_like(name));
                Right::Permission(known.unwrap_or_else(|| name.as_str().into()))
            }
            "preset" | "presets" => {
                let known = catalog.preset(name).map(|known| Arc::clone(&known.name));
                warn_of_unknown(&catalog, "preset", name, known.is_none(), &catalog.presets_like(name));
                Right::Preset(known.unwrap_or_else(|| name.as_str().into()))
            }
            other => return usage(format!("{other:?} can't be used: only permissions and presets can")),
        };
        let namespace = cluster.namespace.as_str().into();
        let review = myself(cluster).review(&Arc::default(), &namespace, &right).await?;
        let (right, why) = (print::line(&right.to_string()), print::line(why(&review)));
        let text = format!("{}: {right}: {why}\n", yes_no(review.allowed, cluster));
        return Ok(Reply { text, yes: review.allowed });
    }
    if !args.what.is_empty() {
        return usage("for a key that exists: kubectl keywright explain USER KEY; for one that does not, give --type");
    }
    let Some(key_type) = args.key_type else { return usage("say which type of key: --type Team, for example") };
    let who = whoami(cluster).await?;
    let spec = spec(args, key_type, &who);
    let mut empty = spec.clone();
    empty.presets.clear();
    empty.permissions.clear();
    let (_, catalog) = cluster.catalog().await?;
    let settings = settings(cluster).await;
    let situation = Situation {
        who: Person { name: &who.username, groups: &who.groups },
        catalog: &catalog,
        settings: settings.as_ref(),
        policy: &|_| None,
    };
    let verdict = match args.verb {
        CanIVerb::View => gates::reveal(&situation, &spec, None, None),
        CanIVerb::Update => gates::update(&situation, &empty, &spec, None, CHANGE),
        CanIVerb::Delete => gates::delete(&situation, &spec, None),
        CanIVerb::Create | CanIVerb::Use => gates::create(&situation, &spec, ""),
    };
    let title = format!("{:?}", args.verb).to_lowercase();
    let (text, yes) = judge(cluster, &myself(cluster), &Arc::new(who), &title, &verdict).await?;
    Ok(Reply { text, yes })
}

fn spec(args: &CanIArgs, key_type: KeyType, who: &Requester) -> ApiKeySpec {
    let user = args.user.clone().unwrap_or_else(|| who.username.clone());
    ApiKeySpec {
        display_name: None,
        key_type,
        user: (key_type == KeyType::Personal).then_some(user),
        presets: args.presets.clone(),
        permissions: args.permissions.clone(),
        active: None,
        access_policy_ref: None,
        legacy: None,
        expires_at: None,
        rotation: None,
        secret: None,
    }
}

fn warn_of_unknown(catalog: &Catalog, kind: &str, name: &str, unknown: bool, near: &[&str]) {
    if unknown && !catalog.is_empty() {
        let hint = if near.is_empty() { String::new() } else { format!(": did you mean {}?", near.join(" or ")) };
        say(&print::line(&format!("warning: no catalogue has a {kind} {name}{hint}")));
    }
}

async fn whoami(cluster: &Cluster) -> Result<Requester> {
    let reviews: Api<SelfSubjectReview> = Api::all(cluster.client.clone());
    let review = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await?;
    let user = review.status.and_then(|status| status.user_info).unwrap_or_default();
    Ok(Requester {
        username: user.username.unwrap_or_default(),
        uid: user.uid,
        groups: user.groups.unwrap_or_default(),
        extra: user.extra.unwrap_or_default(),
    })
}

async fn settings(cluster: &Cluster) -> Option<SecuritySettingsSpec> {
    let all: Api<SecuritySettings> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    if let Ok(settings) = all.get_opt("default").await {
        return settings.map(|settings| settings.spec);
    }
    say("warning: the security settings can't be read, so data-scoped groups are not considered");
    None
}

#[derive(Args)]
pub(super) struct ExplainArgs {
    /// The user, as the cluster authenticates that user.
    user: String,
    /// The key.
    key: String,
    /// The groups of the user.
    #[arg(long, value_delimiter = ',')]
    groups: Vec<String>,
}

pub(super) async fn explain(cluster: &Cluster, args: &ExplainArgs) -> Result<Reply> {
    let key = cluster.key(&args.key).await?;
    let mut groups = args.groups.clone();
    // Everybody whom the cluster authenticates is in it.
    if groups.iter().all(|group| group != "system:authenticated") {
        groups.push("system:authenticated".to_owned());
    }
    let who = Requester { username: args.user.clone(), groups, ..Requester::default() };
    let (_, catalog) = cluster.catalog().await?;
    let settings = settings(cluster).await;
    let policy = match &key.spec.access_policy_ref {
        Some(reference) => {
            let all: Api<AccessPolicy> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
            let found = all.get_opt(&reference.name).await?;
            found.map(|p| Arc::new(KnownPolicy { creator: creator(&p).map(|c| c.name), spec: p.spec }))
        }
        None => None,
    };
    let situation = Situation {
        who: Person { name: &who.username, groups: &who.groups },
        catalog: &catalog,
        settings: settings.as_ref(),
        policy: &|_| policy.clone(),
    };
    let known = creator_of_key(&key);
    let creator = known.as_ref().map(|creator| creator.name.as_str());
    let (spec, status) = (&key.spec, key.status.as_ref());
    let verdicts = [
        ("view", gates::reveal(&situation, spec, status, creator)),
        ("manage", gates::update(&situation, spec, spec, creator, CHANGE)),
        ("delete", gates::delete(&situation, spec, creator)),
    ];
    let reviewer = access::Cluster::new(cluster.client.clone());
    let mut text = format!("{} on {}/{}\n", print::line(&who.username), cluster.namespace, key.name_any());
    let who = Arc::new(who);
    for (title, verdict) in &verdicts {
        match judge(cluster, &reviewer, &who, title, verdict).await {
            Ok((judged, _)) => text += &judged,
            Err(_) => {
                return refused(
                    "the cluster does not say what others may do: you need the right to create subjectaccessreviews \
                     (authorization.k8s.io); about yourself, ask kubectl keywright can-i",
                );
            }
        }
    }
    Ok(Reply::yes(text))
}

/// Asks for what a verdict demands, and says gate by gate what came of it.
async fn judge<R: Reviewer>(
    cluster: &Cluster,
    reviewer: &R,
    who: &Arc<Requester>,
    title: &str,
    verdict: &Verdict,
) -> Result<(String, bool)> {
    let namespace: Arc<str> = cluster.namespace.as_str().into();
    let mut yes = verdict.denials.is_empty();
    let mut lines = String::new();
    if let Some(ruling) = &verdict.ruling {
        let _ = writeln!(lines, "  Policy: {:?}, by {}", ruling.level, print::line(&ruling.by.to_string()));
    }
    for denial in &verdict.denials {
        let _ = writeln!(lines, "  {:?}: no: {}", denial.gate, print::line(&denial.message));
    }
    for demand in &verdict.demands {
        let answer = access::ask(reviewer, who, &namespace, &demand.need).await?;
        yes &= answer.met;
        let verdict = if answer.met { "yes" } else { "no" };
        let _ = writeln!(lines, "  {:?}: {verdict}, to {}:", demand.gate, print::line(&demand.purpose));
        if answer.met {
            for (right, review) in answer.asked.iter().filter(|(_, review)| review.allowed) {
                let _ = writeln!(lines, "    {}: {}", print::line(&right.to_string()), print::line(why(review)));
            }
        }
        for right in answer.missing(&demand.need) {
            let _ = writeln!(lines, "    {}: not granted", print::line(&right.to_string()));
        }
    }
    Ok((format!("{title}: {}\n{lines}", yes_no(yes, cluster)), yes))
}

fn yes_no(yes: bool, cluster: &Cluster) -> String {
    print::paint(if yes { "yes" } else { "no" }, cluster.colour)
}

/// The authorizer's own words: they name the binding.
fn why(review: &Review) -> &str {
    match (review.reason.as_str(), review.allowed) {
        ("", true) => "allowed (the authorizer gives no reason)",
        ("", false) => "no binding grants it",
        (reason, _) => reason,
    }
}
