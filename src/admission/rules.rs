//! The rules of each kind. They call [`crate::domain`] and review the rights that it demands.

use std::{collections::BTreeSet, sync::Arc};

use kube::{
    Resource, ResourceExt,
    core::admission::{AdmissionRequest, Operation},
    runtime::reflector::ObjectRef,
};

use serde_json::Value;

use super::{AdmissionContext, mutation};
use crate::{
    access,
    api::{self, AccessPolicy, ApiKey, KeyReveal, Requester, SecuritySettings},
    domain::{
        authorization::{self, Authorization, AuthorizationInputs, Gate, OtherChanges, Stamps},
        policy::{self, User},
        provenance,
        status::secret_ref,
        validate::{self, Rule, Terms},
    },
};

/// The result of an admission request.
#[derive(Default)]
pub(super) struct AdmissionDecision {
    /// The reasons for a rejection. Empty means allowed.
    pub problems: Vec<AdmissionProblem>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// One reason for a rejection.
pub(super) struct AdmissionProblem {
    /// The rule or the gate, for metrics.
    pub reason: &'static str,
    /// Whether the object is valid and the requester lacks rights.
    pub forbidden: bool,
    /// The path of the field.
    pub field: String,
    /// The problem and the fix.
    pub message: String,
}

/// The rules for an ApiKey. While it is being deleted, updates that leave its spec unchanged are allowed, so that its
/// finalizers can be removed.
pub(super) async fn api_key(context: &AdmissionContext, request: &AdmissionRequest<ApiKey>) -> AdmissionDecision {
    let authorizer = Authorizer::of(context, request);
    let old = request.old_object.as_ref();
    let creator = |key: &ApiKey| api::creator(key).map(|creator| creator.name);
    let Some(new) = &request.object else {
        let Some(old) = old else { return AdmissionDecision::default() };
        let authorization =
            authorizer.authorize(|inputs| authorization::delete(inputs, &old.spec, creator(old).as_deref()));
        return authorizer.decide(context, authorization, AdmissionDecision::default(), context.roles).await;
    };
    if let Some(old) = old.filter(|old| is_being_deleted(*old)) {
        return update_while_deleting(old.spec == new.spec);
    }
    let conflicting_claim =
        if old.is_none() { context.index.conflicting_claim(&authorizer.namespace, new, false) } else { None };
    let secret = secret_ref(new).name;
    let before = old.map(|old| &old.spec);
    let catalog = &authorizer.catalog;
    let terms = Terms {
        limits: authorizer.settings.as_ref().and_then(|settings| settings.limits.as_ref()),
        namespace: (&authorizer.namespace, context.index.count(&authorizer.namespace)),
        handled: old.and_then(|old| old.status.as_ref()?.last_handled_requested_at.as_deref()),
        created_at: old.and(new.metadata.creation_timestamp.as_ref()).map(|time| time.0),
        now: context.clock.now(),
    };
    let (mut decision, mut known_part) = (AdmissionDecision::default(), None);
    match validate::admit(&new.spec, before, catalog, conflicting_claim.as_deref(), &secret, &terms) {
        Ok(warnings) => decision.warnings = warnings,
        Err(problems) => {
            // A dry run of a set of objects stores none of them. Problems that a catalog of the same set may fix are
            // only warnings there: a real apply creates the catalog before the key.
            let (fixable, problems): (Vec<_>, Vec<_>) =
                problems.into_iter().partition(|problem| request.dry_run && problem.rule.is_of_catalog());
            let warning = |problem: &validate::Problem| {
                format!(
                    "{problem}; the key is rejected unless a PermissionCatalog that fixes this is applied before it"
                )
            };
            decision.warnings = fixable.iter().take(MAX_WARNINGS).map(warning).collect();
            decision.problems = problems.into_iter().map(AdmissionProblem::from).collect();
            // The rights that unknown names need are unknown too.
            known_part = (!fixable.is_empty()).then(|| validate::known_part(&new.spec, catalog));
        }
    }
    // An invalid object costs no access reviews, and its rejection does not disclose rights.
    if !decision.problems.is_empty() {
        return decision;
    }
    let spec = known_part.as_ref().unwrap_or(&new.spec);
    let authorization = authorizer.authorize(|inputs| match old {
        None => authorization::create(inputs, spec, &secret),
        Some(old) => authorization::update(inputs, &old.spec, spec, creator(old).as_deref(), other_changes(old, new)),
    });
    let stamps = if context.roles {
        authorization::stamps(&authorizer.requester.username, old.map(stamps_of).as_ref(), &stamps_of(new))
    } else {
        Authorization::default()
    };
    authorizer.decide(context, authorization.and(stamps), decision, context.roles).await
}

/// The maximum number of problems that a dry run reports as warnings. The API server truncates warnings beyond 4096
/// characters in total.
const MAX_WARNINGS: usize = 10;

impl From<validate::Problem> for AdmissionProblem {
    fn from(problem: validate::Problem) -> Self {
        let forbidden = problem.rule == Rule::TooManyKeys;
        Self { reason: problem.rule.reason(), forbidden, field: problem.field, message: problem.message }
    }
}

/// The changes of an update outside the spec.
fn other_changes(old: &ApiKey, new: &ApiKey) -> OtherChanges {
    let annotations = |key: &ApiKey| {
        let mut all = key.annotations().clone();
        all.remove(provenance::LAST_APPLIED);
        all
    };
    let metadata = annotations(old) != annotations(new)
        || old.labels() != new.labels()
        || old.owner_references() != new.owner_references()
        || old.finalizers() != new.finalizers();
    OtherChanges { metadata, provenance: provenance::change(&applied_state(old), &applied_state(new)) }
}

fn applied_state(key: &ApiKey) -> provenance::AppliedState<'_> {
    let owners = key.managed_fields().iter().filter(|entry| entry.subresource.as_deref().is_none_or(str::is_empty));
    provenance::AppliedState {
        last_applied: key.annotations().get(provenance::LAST_APPLIED).map(String::as_str),
        owners: owners
            .map(|entry| provenance::FieldOwner {
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

/// The rules for an AccessPolicy.
pub(super) async fn access_policy(
    context: &AdmissionContext,
    request: &AdmissionRequest<AccessPolicy>,
) -> AdmissionDecision {
    let authorizer = Authorizer::of(context, request);
    if let Some(decision) = while_being_deleted(request, |old, new| old.spec == new.spec) {
        return decision;
    }
    let types: BTreeSet<_> = context.index.keys_of_policy(&authorizer.namespace, &request.name).into_values().collect();
    let old = request.old_object.as_ref().map(|old| authorization::KnownPolicy {
        spec: old.spec.clone(),
        creator: api::creator(old).map(|creator| creator.name),
    });
    let authorization = authorization::write_policy(authorizer.user(), old.as_ref(), &types);
    let mut decision = AdmissionDecision::default();
    if let Some(new) = &request.object {
        let ruling = policy::policy_access(&new.spec, api::creator(new).map(|c| c.name).as_deref(), authorizer.user());
        if ruling.level < api::AccessLevel::Manage {
            decision.warnings.push(format!(
                "this policy gives you {:?} ({}): after this, you can't change it without access-policies:UpdateAll",
                ruling.level, ruling.by
            ));
        }
    }
    // The accepted permissions depend on the keys that refer to the policy. The API server can't check that.
    let roles = context.roles || !types.is_empty();
    authorizer.decide(context, authorization, decision, roles).await
}

/// The rules for SecuritySettings: gate 1.
pub(super) async fn security_settings(
    context: &AdmissionContext,
    request: &AdmissionRequest<SecuritySettings>,
) -> AdmissionDecision {
    if let Some(decision) = while_being_deleted(request, |old, new| old.spec == new.spec) {
        return decision;
    }
    let authorizer = Authorizer::of(context, request);
    authorizer.decide(context, authorization::write_settings(), AdmissionDecision::default(), context.roles).await
}

/// The rules for a KeyReveal. The controller checks them again before it reveals the value; the webhook gives immediate
/// feedback.
pub(super) async fn key_reveal(context: &AdmissionContext, request: &AdmissionRequest<KeyReveal>) -> AdmissionDecision {
    let Some(new) = request.object.as_ref().filter(|_| request.operation == Operation::Create) else {
        return AdmissionDecision::default();
    };
    let authorizer = Authorizer::of(context, request);
    let name = &new.spec.api_key_ref.name;
    // An unknown key may be new. The controller rejects the reveal if the key does not exist.
    let Some(key) = context.keys.get(&ObjectRef::new(name).within(&authorizer.namespace)) else {
        return AdmissionDecision::default();
    };
    let status = key.status.as_ref();
    let creator = api::creator_of_key(&key);
    let authorization = authorizer.authorize(|inputs| {
        authorization::reveal(inputs, &key.spec, status, creator.map(|creator| creator.name).as_deref())
    });
    authorizer.decide(context, authorization, AdmissionDecision::default(), true).await
}

fn is_being_deleted<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// The decision on an update of an object that is being deleted. `None` for other requests.
fn while_being_deleted<K: Resource>(
    request: &AdmissionRequest<K>,
    same: impl FnOnce(&K, &K) -> bool,
) -> Option<AdmissionDecision> {
    match (&request.old_object, &request.object) {
        (Some(old), Some(new)) if is_being_deleted(old) => Some(update_while_deleting(same(old, new))),
        _ => None,
    }
}

/// Allows an update of an object that is being deleted if the spec stays the same, so that finalizers can be removed.
/// The spec must not change: a policy that a finalizer keeps is still in effect.
fn update_while_deleting(same_spec: bool) -> AdmissionDecision {
    let problem = || AdmissionProblem {
        reason: "BeingDeleted",
        forbidden: true,
        field: "spec".to_owned(),
        message:
            "Forbidden: the object is being deleted, so its spec can't change any more: remove metadata.finalizers, \
                  and create it again"
                .to_owned(),
    };
    AdmissionDecision { problems: if same_spec { vec![] } else { vec![problem()] }, ..AdmissionDecision::default() }
}

/// Authorizes one request: its requester, and the state of its namespace.
struct Authorizer {
    requester: Arc<Requester>,
    namespace: Arc<str>,
    catalog: Arc<crate::domain::catalog::Catalog>,
    settings: Option<Arc<api::SecuritySettingsSpec>>,
    index: Arc<crate::index::Index>,
}

impl Authorizer {
    fn of<K: Resource>(context: &AdmissionContext, request: &AdmissionRequest<K>) -> Self {
        let namespace = request.namespace.as_deref().unwrap_or_default();
        Self {
            requester: Arc::new(mutation::requester(request)),
            namespace: namespace.into(),
            catalog: context.index.catalog(),
            settings: context.index.settings(namespace),
            index: Arc::clone(&context.index),
        }
    }

    fn user(&self) -> User<'_> {
        User { name: &self.requester.username, groups: &self.requester.groups }
    }

    fn authorize(&self, rule: impl FnOnce(&AuthorizationInputs<'_>) -> Authorization) -> Authorization {
        rule(&AuthorizationInputs {
            requester: self.user(),
            catalog: &self.catalog,
            settings: self.settings.as_deref(),
            policy: &|name| self.index.policy(&self.namespace, name),
        })
    }

    /// Adds the denials, and reviews the demanded rights concurrently. With `roles` false, gate 1 and the owner are
    /// skipped, since the API server has checked them.
    async fn decide(
        &self,
        context: &AdmissionContext,
        authorization: Authorization,
        mut decision: AdmissionDecision,
        roles: bool,
    ) -> AdmissionDecision {
        decision.problems.extend(authorization.denials.into_iter().map(|denial| AdmissionProblem {
            reason: denial.gate.reason(),
            forbidden: true,
            field: denial.field.to_owned(),
            message: denial.message,
        }));
        if !decision.problems.is_empty() {
            return decision;
        }
        let is_checked = |gate| matches!(gate, Gate::Role | Gate::Owner);
        let demands: Vec<_> = authorization.demands.into_iter().filter(|d| roles || !is_checked(d.gate)).collect();
        let reviews =
            demands.iter().map(|d| access::ask(&*context.reviewer, &self.requester, &self.namespace, &d.need));
        let answers = futures::future::join_all(reviews).await;
        for (demand, answer) in demands.iter().zip(answers) {
            let message = match answer {
                Ok(answer) if answer.met => continue,
                Ok(answer) => demand.lacking(&self.requester.username, &self.namespace, &answer.missing(&demand.need)),
                Err(unanswered) => unanswered.to_string(),
            };
            let (reason, field) = (demand.gate.reason(), demand.field.to_owned());
            decision.problems.push(AdmissionProblem { reason, forbidden: true, field, message });
        }
        decision
    }
}
