//! Each kind's rules: a few lines that call [`crate::domain`], and ask for the rights that it demands.

use std::{collections::BTreeSet, sync::Arc};

use kube::{
    Resource, ResourceExt,
    core::admission::{AdmissionRequest, Operation},
    runtime::reflector::ObjectRef,
};

use super::{Context, stamp};
use crate::{
    access,
    api::{self, AccessPolicy, ApiKey, KeyReveal, Requester, SecuritySettings},
    domain::{
        gates::{self, Gate, Situation, Verdict},
        policy::{self, Person},
        status::secret_ref,
        validate::{self, Terms},
    },
};

/// What admission says.
#[derive(Default)]
pub(super) struct Decision {
    /// Why not. Empty means yes.
    pub problems: Vec<Problem>,
    /// What is worth saying all the same.
    pub warnings: Vec<String>,
}

/// One reason to refuse.
pub(super) struct Problem {
    /// The rule or the gate, for the count.
    pub reason: &'static str,
    /// Whether the object is right and the user may not.
    pub forbidden: bool,
    /// The path of the field.
    pub field: String,
    /// What is wrong and how to mend it.
    pub message: String,
}

/// An ApiKey. An object on its way out passes whatever it says, so that nothing can get stuck.
pub(super) async fn api_key(context: &Context, request: &AdmissionRequest<ApiKey>) -> Decision {
    let asking = Asking::of(context, request);
    let old = request.old_object.as_ref();
    let creator = |key: &ApiKey| api::creator(key).map(|creator| creator.name);
    let Some(new) = &request.object else {
        let Some(old) = old else { return Decision::default() };
        let verdict = asking.judge(|situation| gates::delete(situation, &old.spec, creator(old).as_deref()));
        return asking.decide(context, verdict, Decision::default(), context.roles).await;
    };
    if new.metadata.deletion_timestamp.is_some() {
        return Decision::default();
    }
    let rival = if old.is_none() { context.index.rival(&asking.namespace, new, false) } else { None };
    let secret = secret_ref(new).name;
    let before = old.map(|old| &old.spec);
    let catalog = context.index.catalog();
    let created_at = old.and(new.metadata.creation_timestamp.as_ref()).map(|time| time.0);
    let limits = asking.settings.as_ref().and_then(|settings| settings.limits.as_ref());
    let terms = Terms { limits, created_at, now: context.clock.now() };
    let decision = match validate::admit(&new.spec, before, &catalog, rival.as_deref(), &secret, &terms) {
        Ok(warnings) => Decision { warnings, ..Decision::default() },
        Err(problems) => {
            let problems = problems.into_iter().map(|problem| Problem {
                reason: problem.rule.reason(),
                forbidden: false,
                field: problem.field,
                message: problem.message,
            });
            Decision { problems: problems.collect(), ..Decision::default() }
        }
    };
    // What is wrong in itself is not worth a question; and who may not learns no more than that it is wrong.
    if !decision.problems.is_empty() {
        return decision;
    }
    let verdict = asking.judge(|situation| match old {
        None => gates::create(situation, &new.spec, &secret),
        Some(old) => gates::update(situation, &old.spec, &new.spec, creator(old).as_deref(), touched(old, new)),
    });
    asking.decide(context, verdict, decision, context.roles).await
}

/// kubectl notes here what was applied; that it changes follows from what changes.
const NOTE: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Whether an update changes more than `spec.accessPolicyRef`: the rest of the spec, or metadata that people own.
/// The chart's policy on roles says the same in CEL.
fn touched(old: &ApiKey, new: &ApiKey) -> bool {
    let rest = |key: &ApiKey| {
        let mut spec = key.spec.clone();
        spec.access_policy_ref = None;
        spec
    };
    let annotations = |key: &ApiKey| {
        let mut all = key.annotations().clone();
        all.remove(NOTE);
        all
    };
    rest(old) != rest(new)
        || annotations(old) != annotations(new)
        || old.labels() != new.labels()
        || old.owner_references() != new.owner_references()
        || old.finalizers() != new.finalizers()
}

/// An AccessPolicy.
pub(super) async fn access_policy(context: &Context, request: &AdmissionRequest<AccessPolicy>) -> Decision {
    let asking = Asking::of(context, request);
    if is_going(request) {
        return Decision::default();
    }
    let types: BTreeSet<_> = context.index.keys_of_policy(&asking.namespace, &request.name).into_values().collect();
    let old = request.old_object.as_ref().map(|old| gates::KnownPolicy {
        spec: old.spec.clone(),
        creator: api::creator(old).map(|creator| creator.name),
    });
    let verdict = gates::write_policy(asking.person(), old.as_ref(), &types);
    let mut decision = Decision::default();
    if let Some(new) = &request.object {
        let ruling = policy::policy_access(&new.spec, api::creator(new).map(|c| c.name).as_deref(), asking.person());
        if ruling.level < api::AccessLevel::Manage {
            decision.warnings.push(format!(
                "this policy gives you {:?} ({}): after this, you can't change it without access-policies:UpdateAll",
                ruling.level, ruling.by
            ));
        }
    }
    // Which spelling of the right a policy needs depends on the keys that refer to it, which only this side knows.
    let roles = context.roles || !types.is_empty();
    asking.decide(context, verdict, decision, roles).await
}

/// SecuritySettings: gate 1 is all there is.
pub(super) async fn security_settings(context: &Context, request: &AdmissionRequest<SecuritySettings>) -> Decision {
    if is_going(request) {
        return Decision::default();
    }
    let asking = Asking::of(context, request);
    asking.decide(context, gates::write_settings(), Decision::default(), context.roles).await
}

/// A KeyReveal. The controller decides again before it answers; here the requester learns at once.
pub(super) async fn key_reveal(context: &Context, request: &AdmissionRequest<KeyReveal>) -> Decision {
    let Some(new) = request.object.as_ref().filter(|_| request.operation == Operation::Create) else {
        return Decision::default();
    };
    let asking = Asking::of(context, request);
    let name = &new.spec.api_key_ref.name;
    // A key that is not known here may be a moment old: the controller will say.
    let Some(key) = context.keys.get(&ObjectRef::new(name).within(&asking.namespace)) else {
        return Decision::default();
    };
    let status = key.status.as_ref();
    let creator = api::creator_of_key(&key);
    let verdict = asking
        .judge(|situation| gates::reveal(situation, &key.spec, status, creator.map(|creator| creator.name).as_deref()));
    asking.decide(context, verdict, Decision::default(), true).await
}

fn is_going<K: Resource>(request: &AdmissionRequest<K>) -> bool {
    request.object.as_ref().is_some_and(|object| object.meta().deletion_timestamp.is_some())
}

/// Who asks, and what is known where they ask.
struct Asking {
    who: Arc<Requester>,
    namespace: Arc<str>,
    catalog: Arc<crate::domain::catalog::Catalog>,
    settings: Option<Arc<api::SecuritySettingsSpec>>,
    index: Arc<crate::index::Index>,
}

impl Asking {
    fn of<K: Resource>(context: &Context, request: &AdmissionRequest<K>) -> Self {
        let namespace = request.namespace.as_deref().unwrap_or_default();
        Self {
            who: Arc::new(stamp::requester(request)),
            namespace: namespace.into(),
            catalog: context.index.catalog(),
            settings: context.index.settings(namespace),
            index: Arc::clone(&context.index),
        }
    }

    fn person(&self) -> Person<'_> {
        Person { name: &self.who.username, groups: &self.who.groups }
    }

    fn judge(&self, rule: impl FnOnce(&Situation<'_>) -> Verdict) -> Verdict {
        rule(&Situation {
            who: self.person(),
            catalog: &self.catalog,
            settings: self.settings.as_deref(),
            policy: &|name| self.index.policy(&self.namespace, name),
        })
    }

    /// Asks for what the verdict demands, all at once. Gate 1 is usually the API server's, which asked already.
    async fn decide(&self, context: &Context, verdict: Verdict, mut decision: Decision, roles: bool) -> Decision {
        decision.problems.extend(verdict.denials.into_iter().map(|denial| Problem {
            reason: denial.gate.reason(),
            forbidden: true,
            field: denial.field.to_owned(),
            message: denial.message,
        }));
        if !decision.problems.is_empty() {
            return decision;
        }
        let demands: Vec<_> = verdict.demands.into_iter().filter(|d| roles || d.gate != Gate::Role).collect();
        let asked = demands.iter().map(|d| access::ask(&*context.reviewer, &self.who, &self.namespace, &d.need));
        let answers = futures::future::join_all(asked).await;
        for (demand, answer) in demands.iter().zip(answers) {
            let message = match answer {
                Ok(answer) if answer.met => continue,
                Ok(answer) => demand.lacking(&self.who.username, &self.namespace, &answer.missing(&demand.need)),
                Err(unanswered) => unanswered.to_string(),
            };
            let (reason, field) = (demand.gate.reason(), demand.field.to_owned());
            decision.problems.push(Problem { reason, forbidden: true, field, message });
        }
        decision
    }
}
