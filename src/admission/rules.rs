//! Each kind's rules: a few lines that call [`crate::domain`], and ask for the rights that it demands.

use std::{collections::BTreeSet, sync::Arc};

use kube::{
    Resource, ResourceExt,
    core::admission::{AdmissionRequest, Operation},
    runtime::reflector::ObjectRef,
};

use serde_json::Value;

use super::{Context, stamp};
use crate::{
    access,
    api::{self, AccessPolicy, ApiKey, KeyReveal, Requester, SecuritySettings},
    domain::{
        gates::{self, Beside, Gate, Situation, Stamps, Verdict},
        policy::{self, Person},
        provenance,
        status::secret_ref,
        validate::{self, Rule, Terms},
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

/// An ApiKey. An object on its way out passes if its spec stays as it was, so that nothing can get stuck.
pub(super) async fn api_key(context: &Context, request: &AdmissionRequest<ApiKey>) -> Decision {
    let asking = Asking::of(context, request);
    let old = request.old_object.as_ref();
    let creator = |key: &ApiKey| api::creator(key).map(|creator| creator.name);
    let Some(new) = &request.object else {
        let Some(old) = old else { return Decision::default() };
        let verdict = asking.judge(|situation| gates::delete(situation, &old.spec, creator(old).as_deref()));
        return asking.decide(context, verdict, Decision::default(), context.roles).await;
    };
    if let Some(old) = old.filter(|old| is_going(*old)) {
        return while_going(old.spec == new.spec);
    }
    let rival = if old.is_none() { context.index.rival(&asking.namespace, new, false) } else { None };
    let secret = secret_ref(new).name;
    let before = old.map(|old| &old.spec);
    let catalog = &asking.catalog;
    let terms = Terms {
        limits: asking.settings.as_ref().and_then(|settings| settings.limits.as_ref()),
        namespace: (&asking.namespace, context.index.count(&asking.namespace)),
        handled: old.and_then(|old| old.status.as_ref()?.last_handled_requested_at.as_deref()),
        created_at: old.and(new.metadata.creation_timestamp.as_ref()).map(|time| time.0),
        now: context.clock.now(),
    };
    let (mut decision, mut dry) = (Decision::default(), None);
    match validate::admit(&new.spec, before, catalog, rival.as_deref(), &secret, &terms) {
        Ok(warnings) => decision.warnings = warnings,
        Err(problems) => {
            // A dry run sees a set of objects one by one, and stores none. What a catalogue of the same set may mend is
            // no reason to refuse there: where the objects are applied in order, the catalogue is there before the key.
            let (curable, problems): (Vec<_>, Vec<_>) =
                problems.into_iter().partition(|problem| request.dry_run && problem.rule.is_of_catalog());
            let warning = |problem: &validate::Problem| {
                format!("{problem}; refused unless a PermissionCatalog that mends it is applied before this key")
            };
            decision.warnings = curable.iter().take(MOST_WARNINGS).map(warning).collect();
            decision.problems = problems.into_iter().map(Problem::from).collect();
            // Which rights a name takes that no catalogue knows is not known either.
            dry = (!curable.is_empty()).then(|| validate::known_part(&new.spec, catalog));
        }
    }
    // What is wrong in itself is not worth a question; and who may not learns no more than that it is wrong.
    if !decision.problems.is_empty() {
        return decision;
    }
    let spec = dry.as_ref().unwrap_or(&new.spec);
    let verdict = asking.judge(|situation| match old {
        None => gates::create(situation, spec, &secret),
        Some(old) => gates::update(situation, &old.spec, spec, creator(old).as_deref(), beside(old, new)),
    });
    let stamps = if context.roles {
        gates::stamps(&asking.who.username, old.map(stamps_of).as_ref(), &stamps_of(new))
    } else {
        Verdict::default()
    };
    asking.decide(context, verdict.and(stamps), decision, context.roles).await
}

/// How many problems a dry run is told as warnings. The API server cuts what is longer than 4096 characters in all.
const MOST_WARNINGS: usize = 10;

impl From<validate::Problem> for Problem {
    fn from(problem: validate::Problem) -> Self {
        let forbidden = problem.rule == Rule::TooManyKeys;
        Self { reason: problem.rule.reason(), forbidden, field: problem.field, message: problem.message }
    }
}

/// What an update changes beside the spec.
fn beside(old: &ApiKey, new: &ApiKey) -> Beside {
    let annotations = |key: &ApiKey| {
        let mut all = key.annotations().clone();
        all.remove(provenance::LAST_APPLIED);
        all
    };
    let metadata = annotations(old) != annotations(new)
        || old.labels() != new.labels()
        || old.owner_references() != new.owner_references()
        || old.finalizers() != new.finalizers();
    Beside { metadata, known: provenance::change(&known_of(old), &known_of(new)) }
}

fn known_of(key: &ApiKey) -> provenance::Known<'_> {
    let owners = key.managed_fields().iter().filter(|entry| entry.subresource.as_deref().is_none_or(str::is_empty));
    provenance::Known {
        last_applied: key.annotations().get(provenance::LAST_APPLIED).map(String::as_str),
        owners: owners
            .map(|entry| provenance::Owner {
                manager: entry.manager.as_deref().unwrap_or_default(),
                operation: entry.operation.as_deref().unwrap_or_default(),
                version: entry.api_version.as_deref().unwrap_or_default(),
                fields: entry.fields_v1.as_ref().map_or(&Value::Null, |fields| &fields.0),
            })
            .collect(),
    }
}

fn stamps_of(key: &ApiKey) -> Stamps<'_> {
    let of = |name| key.annotations().get(name).map(String::as_str);
    Stamps {
        creator: of(api::CREATOR_ANNOTATION),
        restored_by: of(api::RESTORED_BY_ANNOTATION),
        accepts: of(api::ACCEPT_SECRET_ANNOTATION),
    }
}

/// An AccessPolicy.
pub(super) async fn access_policy(context: &Context, request: &AdmissionRequest<AccessPolicy>) -> Decision {
    let asking = Asking::of(context, request);
    if let Some(decision) = going(request, |old, new| old.spec == new.spec) {
        return decision;
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
    if let Some(decision) = going(request, |old, new| old.spec == new.spec) {
        return decision;
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

fn is_going<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// What is decided of an update of an object on its way out; nothing if it is none.
fn going<K: Resource>(request: &AdmissionRequest<K>, same: impl FnOnce(&K, &K) -> bool) -> Option<Decision> {
    match (&request.old_object, &request.object) {
        (Some(old), Some(new)) if is_going(old) => Some(while_going(same(old, new))),
        _ => None,
    }
}

/// An object on its way out loses its finalizers, by whoever has to remove them. Nothing else of it changes: a policy that
/// is held by a finalizer still decides.
fn while_going(same_spec: bool) -> Decision {
    let problem = || Problem {
        reason: "BeingDeleted",
        forbidden: true,
        field: "spec".to_owned(),
        message:
            "Forbidden: the object is being deleted, so its spec can't change any more: remove metadata.finalizers, \
                  and create it again"
                .to_owned(),
    };
    Decision { problems: if same_spec { vec![] } else { vec![problem()] }, ..Decision::default() }
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

    /// Asks for what the verdict demands, all at once. Gate 1 and the owner are usually the API server's, which asked
    /// already.
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
        let asked_before = |gate| matches!(gate, Gate::Role | Gate::Owner);
        let demands: Vec<_> = verdict.demands.into_iter().filter(|d| roles || !asked_before(d.gate)).collect();
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
