//! Gate 2: the evaluation of access policies (docs/specification.md, "Access policies").

use std::fmt;

use crate::api::{AccessLevel, AccessMode, AccessPolicySpec};

/// A user as authenticated by the cluster.
#[derive(Clone, Copy, Debug)]
pub struct User<'a> {
    /// The user name.
    pub name: &'a str,
    /// The groups.
    pub groups: &'a [String],
}

/// The level that a policy grants to a user, and the part of the policy that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ruling {
    /// The granted level.
    pub level: AccessLevel,
    /// The part of the policy that decides.
    pub by: By,
}

/// The part of a policy that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Mode Private, and the user is the creator.
    Creator,
    /// Mode Private, and the user is not the creator.
    NotCreator,
    /// The rule with this index.
    Rule(usize),
    /// General access, since no rule covers the user.
    General,
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Creator => f.write_str("mode Private: the creator"),
            Self::NotCreator => f.write_str("mode Private: only the creator has access"),
            Self::Rule(index) => write!(f, "spec.rules[{index}]"),
            Self::General => f.write_str("general access: no rule covers the user"),
        }
    }
}

/// The access of a user to a key that refers to this policy. `creator` is the creator of the key.
#[must_use]
pub fn key_access(policy: &AccessPolicySpec, creator: Option<&str>, user: User<'_>) -> Ruling {
    let rules = policy.rules.iter().map(|rule| (rule.groups.as_slice(), rule.access));
    ruling(policy.mode, rules, policy.general_access, creator, user)
}

/// The access of a user to the policy itself. `creator` is the creator of the policy. Where policy access is not set,
/// access to the keys applies to the policy too.
#[must_use]
pub fn policy_access(policy: &AccessPolicySpec, creator: Option<&str>, user: User<'_>) -> Ruling {
    let rules = policy.rules.iter().map(|rule| (rule.groups.as_slice(), rule.policy_access.unwrap_or(rule.access)));
    ruling(policy.mode, rules, policy.general_policy_access.or(policy.general_access), creator, user)
}

/// A matching NoAccess rule decides; otherwise the matching rule with the highest level; otherwise general access. An
/// absent level is NoAccess.
fn ruling<'a>(
    mode: AccessMode,
    rules: impl Iterator<Item = (&'a [String], AccessLevel)>,
    general: Option<AccessLevel>,
    creator: Option<&str>,
    user: User<'_>,
) -> Ruling {
    if mode == AccessMode::Private {
        return if creator == Some(user.name) {
            Ruling { level: AccessLevel::Manage, by: By::Creator }
        } else {
            Ruling { level: AccessLevel::NoAccess, by: By::NotCreator }
        };
    }
    let matching = rules
        .enumerate()
        .filter(|(_, (groups, _))| groups.iter().any(|group| user.groups.contains(group)))
        .map(|(index, (_, level))| Ruling { level, by: By::Rule(index) });
    matching
        .reduce(|best, next| match (best.level, next.level) {
            (AccessLevel::NoAccess, _) => best,
            (_, AccessLevel::NoAccess) => next,
            _ if next.level > best.level => next,
            _ => best,
        })
        .unwrap_or(Ruling { level: general.unwrap_or(AccessLevel::NoAccess), by: By::General })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::AccessRule;

    const LEVELS: [AccessLevel; 3] = [AccessLevel::NoAccess, AccessLevel::Read, AccessLevel::Manage];

    /// An independent implementation of the rules of docs/specification.md, "Access policies".
    fn oracle(
        mode: AccessMode,
        rules: &[(bool, AccessLevel)],
        general: Option<AccessLevel>,
        is_creator: bool,
    ) -> Ruling {
        if mode == AccessMode::Private {
            return if is_creator {
                Ruling { level: AccessLevel::Manage, by: By::Creator }
            } else {
                Ruling { level: AccessLevel::NoAccess, by: By::NotCreator }
            };
        }
        // NoAccess comes before the highest level. Of rules with the same level, the first decides.
        for level in [AccessLevel::NoAccess, AccessLevel::Manage, AccessLevel::Read] {
            if let Some(index) = rules.iter().position(|rule| *rule == (true, level)) {
                return Ruling { level, by: By::Rule(index) };
            }
        }
        Ruling { level: general.unwrap_or(AccessLevel::NoAccess), by: By::General }
    }

    /// Covers every combination of mode, two rules that match or not, their levels, policy access, general access and
    /// creator.
    #[test]
    fn rulings_agree_with_the_oracle_for_every_combination() {
        let optional = || LEVELS.map(Some).into_iter().chain([None]);
        let rules: Vec<(bool, AccessLevel, Option<AccessLevel>)> = [true, false]
            .into_iter()
            .flat_map(|matches| {
                LEVELS.into_iter().flat_map(move |access| optional().map(move |p| (matches, access, p)))
            })
            .collect();
        let groups = ["mine".to_owned(), "mine too".to_owned()];
        let user = User { name: "alice", groups: &groups };
        let mut cases = 0;
        for mode in [AccessMode::Private, AccessMode::Advanced] {
            for (first, second) in rules.iter().flat_map(|first| rules.iter().map(move |second| (first, second))) {
                let both = [first, second];
                let rule = |(matches, access, policy_access): &(bool, AccessLevel, Option<AccessLevel>)| AccessRule {
                    // The matching group is the last of the rule and of the user.
                    groups: vec!["other".to_owned(), if *matches { "mine too" } else { "not mine" }.to_owned()],
                    access: *access,
                    policy_access: *policy_access,
                };
                for (general, general_policy) in optional().flat_map(|g| optional().map(move |p| (g, p))) {
                    let policy = AccessPolicySpec {
                        mode,
                        rules: both.map(rule).to_vec(),
                        general_access: general,
                        general_policy_access: general_policy,
                    };
                    for creator in [Some("alice"), Some("bob"), None] {
                        let is_creator = creator == Some("alice");
                        let key_rules = both.map(|(matches, access, _)| (*matches, *access));
                        let expected = oracle(mode, &key_rules, general, is_creator);
                        assert_eq!(key_access(&policy, creator, user), expected, "keys: {policy:?} {creator:?}");
                        let policy_rules = both.map(|(matches, access, policy)| (*matches, policy.unwrap_or(*access)));
                        let expected = oracle(mode, &policy_rules, general_policy.or(general), is_creator);
                        assert_eq!(policy_access(&policy, creator, user), expected, "policy: {policy:?} {creator:?}");
                        cases += 1;
                    }
                }
            }
        }
        assert_eq!(cases, 2 * 24 * 24 * 16 * 3);
    }

    #[test]
    fn groups_match_exactly_and_never_match_the_user_name() {
        let rule = |group: &str| AccessRule {
            groups: vec![group.to_owned()],
            access: AccessLevel::Manage,
            policy_access: None,
        };
        let groups = ["sre".to_owned()];
        for group in ["alice", "SRE", "sr", "sre2", "*"] {
            let policy = AccessPolicySpec {
                mode: AccessMode::Advanced,
                rules: vec![rule(group)],
                general_access: Some(AccessLevel::NoAccess),
                general_policy_access: None,
            };
            let ruling = key_access(&policy, Some("alice"), User { name: "alice", groups: &groups });
            assert_eq!(ruling, Ruling { level: AccessLevel::NoAccess, by: By::General }, "{group}");
        }
    }
}
