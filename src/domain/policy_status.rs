//! The status of an AccessPolicy: its keys, the groups without access, and whether a group may still change it.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::status::merge_condition;
use crate::api::{AccessLevel, AccessMode, AccessPolicy, AccessPolicySpec, AccessPolicyStatus, KeyType, creator};

/// The maximum number of keys in a status.
const MOST_KEYS: usize = 100;

/// The entry for all users whom no rule covers.
const EVERYONE_ELSE: &str = "*";

/// Builds the status. `keys` are the ApiKeys that refer to the policy.
#[must_use]
pub fn build(policy: &AccessPolicy, keys: &BTreeMap<String, KeyType>, now: Timestamp) -> AccessPolicyStatus {
    let old = policy.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let generation = policy.metadata.generation;
    let condition = |kind, reason, message: &str| merge_condition(old, kind, "True", reason, message, generation, now);
    let mut conditions = vec![
        condition("Accepted", "Accepted", "the policy is in force"),
        condition("Ready", "Accepted", "the policy is in force"),
    ];
    if !is_manageable(&policy.spec) {
        let creator = creator(policy).map_or_else(|| "its creator".to_owned(), |creator| creator.name);
        let (reason, message) = match policy.spec.mode {
            AccessMode::Private => {
                ("Private", format!("only {creator} and holders of access-policies:UpdateAll may change this policy"))
            }
            // An Advanced policy has no special access for its creator.
            AccessMode::Advanced => (
                "NoGroupManages",
                "only holders of access-policies:UpdateAll may change this policy: give a group policyAccess Manage"
                    .to_owned(),
            ),
        };
        conditions.push(condition("Unmanageable", reason, &message));
    }
    AccessPolicyStatus {
        observed_generation: generation,
        conditions,
        key_count: Some(i64::try_from(keys.len()).unwrap_or(i64::MAX)),
        keys: keys.keys().take(MOST_KEYS).cloned().collect(),
        locked_out: locked_out(&policy.spec),
    }
}

/// The groups without access to the keys, in the order of the rules, without duplicates.
fn locked_out(spec: &AccessPolicySpec) -> Vec<String> {
    if spec.mode == AccessMode::Private {
        return vec![EVERYONE_ELSE.to_owned()];
    }
    let mut groups = vec![];
    for group in spec.rules.iter().filter(|rule| rule.access == AccessLevel::NoAccess).flat_map(|rule| &rule.groups) {
        if !groups.contains(group) {
            groups.push(group.clone());
        }
    }
    if spec.general_access.is_none_or(|general| general == AccessLevel::NoAccess) {
        groups.push(EVERYONE_ELSE.to_owned());
    }
    groups
}

/// Whether a group, or the users whom no rule covers, may change the policy. A NoAccess rule for a group overrides its
/// other rules.
fn is_manageable(spec: &AccessPolicySpec) -> bool {
    if spec.mode == AccessMode::Private {
        return false;
    }
    let groups_with = |level| {
        let rules = spec.rules.iter().filter(move |rule| rule.policy_access.unwrap_or(rule.access) == level);
        rules.flat_map(|rule| &rule.groups)
    };
    spec.general_policy_access.or(spec.general_access) == Some(AccessLevel::Manage)
        || groups_with(AccessLevel::Manage).any(|group| !groups_with(AccessLevel::NoAccess).any(|other| other == group))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{AccessRule, CREATOR_ANNOTATION};

    fn rule(groups: &[&str], access: AccessLevel, policy_access: Option<AccessLevel>) -> AccessRule {
        AccessRule { groups: groups.iter().map(|g| (*g).to_owned()).collect(), access, policy_access }
    }

    fn policy(mode: AccessMode, rules: Vec<AccessRule>, general: Option<AccessLevel>) -> AccessPolicy {
        let spec = AccessPolicySpec { mode, rules, general_access: general, general_policy_access: None };
        AccessPolicy::new("p", spec)
    }

    fn status(policy: &AccessPolicy) -> AccessPolicyStatus {
        build(policy, &BTreeMap::new(), Timestamp::UNIX_EPOCH)
    }

    fn unmanageable(policy: &AccessPolicy) -> Option<String> {
        status(policy).conditions.iter().find(|c| c.type_ == "Unmanageable").map(|c| c.reason.clone())
    }

    #[test]
    fn status_counts_all_keys_and_lists_the_first_hundred_in_order() {
        let keys: BTreeMap<_, _> = (0..101).map(|n| (format!("key-{n:03}"), KeyType::Team)).collect();
        let mut policy = policy(AccessMode::Advanced, vec![], Some(AccessLevel::Manage));
        policy.metadata.generation = Some(3);
        let status = build(&policy, &keys, Timestamp::UNIX_EPOCH);
        assert_eq!((status.key_count, status.keys.len(), status.observed_generation), (Some(101), 100, Some(3)));
        assert_eq!((status.keys[0].as_str(), status.keys[99].as_str()), ("key-000", "key-099"));
        let kinds: Vec<_> = status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
        assert_eq!(kinds, [("Accepted", "True"), ("Ready", "True")]);
        let later = Timestamp::from_second(60).unwrap();
        policy.status = Some(status.clone());
        assert_eq!(build(&policy, &keys, later), status, "an unchanged policy does not change the status");
    }

    #[test]
    fn status_lists_the_groups_that_are_locked_out() {
        use AccessLevel::{Manage, NoAccess, Read};
        let rules =
            vec![rule(&["b", "a"], NoAccess, None), rule(&["c"], Read, None), rule(&["a", "d"], NoAccess, None)];
        assert_eq!(status(&policy(AccessMode::Advanced, rules.clone(), Some(Read))).locked_out, ["b", "a", "d"]);
        assert_eq!(status(&policy(AccessMode::Advanced, rules, Some(NoAccess))).locked_out, ["b", "a", "d", "*"]);
        assert!(status(&policy(AccessMode::Advanced, vec![], Some(Manage))).locked_out.is_empty());
        assert_eq!(status(&policy(AccessMode::Private, vec![], None)).locked_out, ["*"]);
    }

    #[test]
    fn a_policy_that_no_group_may_change_is_unmanageable() {
        use AccessLevel::{Manage, NoAccess, Read};
        let advanced = |rules, general| unmanageable(&policy(AccessMode::Advanced, rules, Some(general)));
        assert_eq!(advanced(vec![], Manage), None);
        assert_eq!(advanced(vec![], Read).as_deref(), Some("NoGroupManages"));
        assert_eq!(advanced(vec![rule(&["a"], Manage, None)], NoAccess), None);
        assert_eq!(advanced(vec![rule(&["a"], Manage, Some(Read))], NoAccess).as_deref(), Some("NoGroupManages"));
        assert_eq!(advanced(vec![rule(&["a"], NoAccess, Some(Manage))], NoAccess), None);
        let overridden = vec![rule(&["a"], Manage, None), rule(&["b", "a"], NoAccess, None)];
        assert_eq!(advanced(overridden, NoAccess).as_deref(), Some("NoGroupManages"));
        let mut general = policy(AccessMode::Advanced, vec![], Some(Manage));
        general.spec.general_policy_access = Some(Read);
        assert_eq!(unmanageable(&general).as_deref(), Some("NoGroupManages"));

        let mut private = policy(AccessMode::Private, vec![], None);
        private.metadata.annotations = Some([(CREATOR_ANNOTATION.to_owned(), "alice".to_owned())].into());
        let condition = status(&private).conditions.into_iter().find(|c| c.type_ == "Unmanageable").unwrap();
        assert_eq!(condition.reason, "Private");
        assert!(condition.message.starts_with("only alice and holders"), "{}", condition.message);
    }
}
