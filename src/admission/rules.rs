//! Each kind's rules: a few lines that call [`crate::domain`].

use kube::{Resource, core::admission::AdmissionRequest};

use super::Context;
use crate::{
    api::ApiKey,
    domain::{
        status::secret_ref,
        validate::{self, Rule},
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
    /// The rule, for the count.
    pub rule: Rule,
    /// The path of the field.
    pub field: String,
    /// What is wrong and how to mend it.
    pub message: String,
}

/// An ApiKey. An object on its way out passes whatever it says, so that nothing can get stuck.
pub(super) fn api_key(context: &Context, request: &AdmissionRequest<ApiKey>) -> Decision {
    let Some(new) = request.object.as_ref().filter(|new| new.metadata.deletion_timestamp.is_none()) else {
        return Decision::default();
    };
    let old = request.old_object.as_ref().map(|old| &old.spec);
    let namespace = request.namespace.as_deref().unwrap_or_default();
    let rival = if old.is_none() { context.index.rival(namespace, new, false) } else { None };
    let secret = secret_ref(new).name;
    let catalog = context.index.catalog();
    match validate::admit(&new.spec, old, &catalog, rival.as_deref(), &secret, context.clock.now()) {
        Ok(warnings) => Decision { warnings, ..Decision::default() },
        Err(problems) => {
            let problems =
                problems.into_iter().map(|p| Problem { rule: p.rule, field: p.field, message: p.message }).collect();
            Decision { problems, ..Decision::default() }
        }
    }
}

/// A kind whose behaviour is not part of this version: refused, since accepting it would promise what nobody keeps.
pub(super) fn not_enforced<K: Resource<DynamicType = ()>>(request: &AdmissionRequest<K>) -> Decision {
    let going = request.object.as_ref().is_none_or(|object| object.meta().deletion_timestamp.is_some());
    if going {
        return Decision::default();
    }
    let kind = K::kind(&());
    let message =
        format!("this version of Keywright does not enforce {kind}, so it refuses one instead of ignoring it");
    Decision {
        problems: vec![Problem { rule: Rule::NotEnforced, field: "kind".to_owned(), message }],
        ..Decision::default()
    }
}
