//! `can-i` and `explain`: evaluate the rules of admission for a user, and name the bindings that decide.

use std::{fmt::Write, sync::Arc};

use clap::{Args, ValueEnum};
use k8s_openapi::api::{
    authentication::v1::SelfSubjectReview,
    authorization::v1::{SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
};
use kube::{Api, ResourceExt, api::PostParams};

use super::{ClusterClient, Reply, Result, key_type, print, refused, report, usage};
use crate::{
    access::{self, AccessReview, Reviewer, Unanswered, attributes},
    api::{
        AccessPolicy, ApiKeySpec, KeyType, Requester, SecuritySettings, SecuritySettingsSpec, creator, creator_of_key,
    },
    domain::{
        authorization::{self, Authorization, AuthorizationInputs, KnownPolicy},
        catalog::Catalog,
        policy::User,
        provenance,
        rights::{Need, Right},
    },
};

/// Reviews the rights of the user of the plugin by SelfSubjectAccessReview.
struct SelfReviewer {
    reviews: Api<SelfSubjectAccessReview>,
}

impl Reviewer for SelfReviewer {
    async fn review(
        &self,
        _: &Arc<Requester>,
        namespace: &Arc<str>,
        right: &Right,
    ) -> Result<AccessReview, Unanswered> {
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes(namespace, right)),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        match self.reviews.create(&PostParams::default(), &review).await {
            Ok(SelfSubjectAccessReview { status: Some(status), .. }) => Ok(AccessReview {
                allowed: status.allowed && !status.denied.unwrap_or_default(),
                reason: status.reason.unwrap_or_default(),
            }),
            _ => Err(Unanswered { right: right.clone() }),
        }
    }
}

fn self_reviewer(cluster: &ClusterClient) -> SelfReviewer {
    SelfReviewer { reviews: Api::all(cluster.client.clone()) }
}

impl From<Unanswered> for super::CliError {
    fn from(unanswered: Unanswered) -> Self {
        Self::Refused(unanswered.to_string())
    }
}

/// Whether the user of the plugin has the rights.
pub(super) async fn may(cluster: &ClusterClient, need: &Need) -> Result<bool> {
    // SelfReviewer ignores the requester: the API server derives it from the credentials.
    let (requester, namespace) = (Arc::default(), cluster.namespace.as_str().into());
    Ok(access::ask(&self_reviewer(cluster), &requester, &namespace, need).await?.met)
}

/// A change of metadata, which affects neither the rights nor the lifetime of a key.
const CHANGE: authorization::OtherChanges =
    authorization::OtherChanges { metadata: true, provenance: provenance::ProvenanceChange::NOTHING };

#[derive(Args)]
pub(super) struct CanIArgs {
    /// The operation: use a permission or a preset; create, view, update or delete a key.
    verb: CanIVerb,
    /// For use: permissions or presets (the default is permissions), and the name.
    #[arg(num_args = 0..=2)]
    target: Vec<String>,
    /// The type of the key.
    #[arg(long = "type", value_parser = key_type)]
    key_type: Option<KeyType>,
    /// A preset in the key; may be repeated.
    #[arg(long = "preset")]
    presets: Vec<String>,
    /// A permission in the key; may be repeated.
    #[arg(long = "permission")]
    permissions: Vec<String>,
    /// The user of a Personal key; the default is you.
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

pub(super) async fn can_i(cluster: &ClusterClient, args: &CanIArgs) -> Result<Reply> {
    if args.verb == CanIVerb::Use {
        let (kind, name) = match args.target.as_slice() {
            [name] => ("permissions", name),
            [kind, name] => (kind.as_str(), name),
            _ => return usage("name a permission or a preset: kubectl keywright can-i use [permissions|presets] NAME"),
        };
        // A user who may not read the catalogs can still name a right exactly.
        let (_, catalog) = cluster.catalog().await.unwrap_or_default();
        let right = match kind {
            "permission" | "permissions" => {
                let known = catalog.permission(name).map(|known| Arc::clone(&known.name));
                warn_if_unknown(&catalog, "permission", name, known.is_none(), &catalog.permissions_like(name));
                Right::Permission(known.unwrap_or_else(|| name.as_str().into()))
            }
            "preset" | "presets" => {
                let known = catalog.preset(name).map(|known| Arc::clone(&known.name));
                warn_if_unknown(&catalog, "preset", name, known.is_none(), &catalog.presets_like(name));
                Right::Preset(known.unwrap_or_else(|| name.as_str().into()))
            }
            other => return usage(format!("{other:?} is not supported: use permissions or presets")),
        };
        let namespace = cluster.namespace.as_str().into();
        let review = self_reviewer(cluster).review(&Arc::default(), &namespace, &right).await?;
        let (right, why) = (print::line(&right.to_string()), print::line(why(&review)));
        let text = format!("{}: {right}: {why}\n", yes_no(review.allowed, cluster));
        return Ok(Reply { text, yes: review.allowed });
    }
    if !args.target.is_empty() {
        return usage("for an existing key, use kubectl keywright explain USER KEY; for a new key, use --type");
    }
    let Some(key_type) = args.key_type else { return usage("add the type of the key, for example --type Team") };
    let requester = whoami(cluster).await?;
    let spec = spec(args, key_type, &requester);
    let mut empty = spec.clone();
    empty.presets.clear();
    empty.permissions.clear();
    let (_, catalog) = cluster.catalog().await?;
    let settings = settings(cluster).await;
    let inputs = AuthorizationInputs {
        requester: User { name: &requester.username, groups: &requester.groups },
        catalog: &catalog,
        settings: settings.as_ref(),
        policy: &|_| None,
    };
    let decision = match args.verb {
        CanIVerb::View => authorization::reveal(&inputs, &spec, None, None),
        CanIVerb::Update => authorization::update(&inputs, &empty, &spec, None, CHANGE),
        CanIVerb::Delete => authorization::delete(&inputs, &spec, None),
        CanIVerb::Create | CanIVerb::Use => authorization::create(&inputs, &spec, ""),
    };
    let title = format!("{:?}", args.verb).to_lowercase();
    let (text, yes) = evaluate(cluster, &self_reviewer(cluster), &Arc::new(requester), &title, &decision).await?;
    Ok(Reply { text, yes })
}

fn spec(args: &CanIArgs, key_type: KeyType, requester: &Requester) -> ApiKeySpec {
    let user = args.user.clone().unwrap_or_else(|| requester.username.clone());
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

fn warn_if_unknown(catalog: &Catalog, kind: &str, name: &str, unknown: bool, near: &[&str]) {
    if unknown && !catalog.is_empty() {
        let hint = if near.is_empty() { String::new() } else { format!(": did you mean {}?", near.join(" or ")) };
        report(&print::line(&format!("warning: no catalog has a {kind} {name}{hint}")));
    }
}

async fn whoami(cluster: &ClusterClient) -> Result<Requester> {
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

async fn settings(cluster: &ClusterClient) -> Option<SecuritySettingsSpec> {
    let all: Api<SecuritySettings> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    if let Ok(settings) = all.get_opt("default").await {
        return settings.map(|settings| settings.spec);
    }
    report("warning: cannot read SecuritySettings default, so data-scoped groups are ignored");
    None
}

#[derive(Args)]
pub(super) struct ExplainArgs {
    /// The name of the user in the cluster.
    user: String,
    /// The name of the key.
    key: String,
    /// The groups of the user.
    #[arg(long, value_delimiter = ',')]
    groups: Vec<String>,
}

pub(super) async fn explain(cluster: &ClusterClient, args: &ExplainArgs) -> Result<Reply> {
    let key = cluster.key(&args.key).await?;
    let mut groups = args.groups.clone();
    // Every authenticated user is in this group.
    if groups.iter().all(|group| group != "system:authenticated") {
        groups.push("system:authenticated".to_owned());
    }
    let requester = Requester { username: args.user.clone(), groups, ..Requester::default() };
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
    let inputs = AuthorizationInputs {
        requester: User { name: &requester.username, groups: &requester.groups },
        catalog: &catalog,
        settings: settings.as_ref(),
        policy: &|_| policy.clone(),
    };
    let known = creator_of_key(&key);
    let creator = known.as_ref().map(|creator| creator.name.as_str());
    let (spec, status) = (&key.spec, key.status.as_ref());
    let decisions = [
        ("view", authorization::reveal(&inputs, spec, status, creator)),
        ("manage", authorization::update(&inputs, spec, spec, creator, CHANGE)),
        ("delete", authorization::delete(&inputs, spec, creator)),
    ];
    let reviewer = access::ClusterReviewer::new(cluster.client.clone());
    let mut text = format!("{} on {}/{}\n", print::line(&requester.username), cluster.namespace, key.name_any());
    let requester = Arc::new(requester);
    for (title, decision) in &decisions {
        match evaluate(cluster, &reviewer, &requester, title, decision).await {
            Ok((lines, _)) => text += &lines,
            Err(_) => {
                return refused(
                    "cannot review the rights of other users: you need the right to create subjectaccessreviews \
                     (authorization.k8s.io); for your own rights, use kubectl keywright can-i",
                );
            }
        }
    }
    Ok(Reply::yes(text))
}

/// Reviews the rights that a decision requires. Returns the result of each gate as text, and whether all gates hold.
async fn evaluate<R: Reviewer>(
    cluster: &ClusterClient,
    reviewer: &R,
    requester: &Arc<Requester>,
    title: &str,
    decision: &Authorization,
) -> Result<(String, bool)> {
    let namespace: Arc<str> = cluster.namespace.as_str().into();
    let mut yes = decision.denials.is_empty();
    let mut lines = String::new();
    if let Some(ruling) = &decision.ruling {
        let _ = writeln!(lines, "  Policy: {:?}, by {}", ruling.level, print::line(&ruling.by.to_string()));
    }
    for denial in &decision.denials {
        let _ = writeln!(lines, "  {:?}: no: {}", denial.gate, print::line(&denial.message));
    }
    for demand in &decision.demands {
        let answer = access::ask(reviewer, requester, &namespace, &demand.need).await?;
        yes &= answer.met;
        let result = if answer.met { "yes" } else { "no" };
        let _ = writeln!(lines, "  {:?}: {result}, to {}:", demand.gate, print::line(&demand.purpose));
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

fn yes_no(yes: bool, cluster: &ClusterClient) -> String {
    print::paint(if yes { "yes" } else { "no" }, cluster.color)
}

/// The reason that the authorizer gives, which names the binding.
fn why(review: &AccessReview) -> &str {
    match (review.reason.as_str(), review.allowed) {
        ("", true) => "allowed (the authorizer gives no reason)",
        ("", false) => "no binding grants it",
        (reason, _) => reason,
    }
}
