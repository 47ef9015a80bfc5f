//! The requirement of a route, as set in the proxy's configuration: `permission=alerts-map:Read&team=shop`.
//!
//! The format is the same for every front end. A requirement comes only from the proxy's configuration, never from the
//! client: in a path it is one whole segment, never the query, since some proxies forward the client's query.

use std::borrow::Cow;

/// The word in place of a permission for routes that accept every working key.
pub const NONE: &str = "none";

/// The requirement of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement<'a> {
    /// The permissions that the key must have, all of them, separated by commas. `None` accepts every working key.
    permissions: Option<Cow<'a, str>>,
    /// The namespaces whose keys are accepted, separated by commas. `None` accepts every namespace.
    teams: Option<Cow<'a, str>>,
}

/// An error in the configuration of a route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misconfigured {
    /// The route names no permission, and there is no default.
    #[error(
        "the route names no permission: set permission=NAME in the proxy's configuration, or permission=none to accept \
         every working key"
    )]
    NoPermission,
    /// The route has an unknown parameter.
    #[error("the route has the unknown parameter {0}: use permission and team")]
    UnknownName(String),
    /// The route has a parameter twice.
    #[error("the route has parameter {0} twice: separate several values by commas")]
    Twice(&'static str),
    /// The route has an empty value.
    #[error("the route has an empty value in parameter {0}: remove it")]
    Empty(&'static str),
    /// The route has `none` and a permission.
    #[error("the route has permission=none and another permission: use one of the two")]
    NoneAndMore,
    /// The route requires a permission that is in no catalog, so that no key can have it.
    #[error("the route requires permission {0}, which no PermissionCatalog has")]
    UnknownPermission(String),
}

impl<'a> Requirement<'a> {
    /// Reads the parameters of a route. `default` is the permission of routes that name none.
    ///
    /// # Errors
    /// Any mistake in the parameters, so that a misconfigured route rejects requests.
    pub fn of(
        pairs: impl IntoIterator<Item = (Cow<'a, str>, Cow<'a, str>)>,
        default: Option<&'a str>,
    ) -> Result<Self, Misconfigured> {
        let (mut permissions, mut teams) = (None, None);
        for (name, value) in pairs {
            let (parameter, name) = match &*name {
                "permission" => (&mut permissions, "permission"),
                "team" => (&mut teams, "team"),
                // A misconfigured proxy may send a key here, so the error shows only names that can't be one.
                typo if typo.len() <= 12 && typo.bytes().all(|b| b.is_ascii_lowercase()) => {
                    return Err(Misconfigured::UnknownName(format!("{typo:?}")));
                }
                _ => return Err(Misconfigured::UnknownName("(not shown)".to_owned())),
            };
            if parameter.is_some() {
                return Err(Misconfigured::Twice(name));
            }
            *parameter = Some(list(value, name)?);
        }
        let permissions = match (permissions, default) {
            (Some(permissions), _) => permissions,
            (None, Some(default)) => list(Cow::Borrowed(default), "permission")?,
            (None, None) => return Err(Misconfigured::NoPermission),
        };
        let none = parts(&permissions).any(|name| name == NONE);
        if none && permissions.contains(',') {
            return Err(Misconfigured::NoneAndMore);
        }
        Ok(Self { permissions: (!none).then_some(permissions), teams })
    }

    /// Reads the parameters from one segment of a path.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_segment(segment: &'a str, default: Option<&'a str>) -> Result<Self, Misconfigured> {
        // This runs for each request, and few segments need decoding.
        if segment.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
            Self::of(form_urlencoded::parse(segment.as_bytes()), default)
        } else {
            Self::of(raw_pairs(segment), default)
        }
    }

    /// The permissions that the key must have, all of them.
    pub fn permissions(&self) -> impl Iterator<Item = &str> {
        self.permissions.iter().flat_map(|names| parts(names))
    }

    /// Whether the route accepts keys of a namespace.
    #[must_use]
    pub fn accepts(&self, team: &str) -> bool {
        self.teams.as_ref().is_none_or(|teams| parts(teams).any(|accepted| accepted == team))
    }
}

/// The pairs of a segment without encoded characters.
fn raw_pairs(segment: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let pairs = segment.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(name, value)| (name.into(), value.into()))
}

/// The parts between commas. Callers split on each use, which saves an allocation for each request.
fn parts(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim)
}

/// Checks that no part of a list is empty.
fn list<'a>(value: Cow<'a, str>, name: &'static str) -> Result<Cow<'a, str>, Misconfigured> {
    if parts(&value).any(str::is_empty) { Err(Misconfigured::Empty(name)) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(segment: &str) -> Result<(Vec<String>, bool), String> {
        let requirement = Requirement::of_segment(segment, None).map_err(|error| error.to_string())?;
        Ok((requirement.permissions().map(str::to_owned).collect(), requirement.accepts("shop")))
    }

    #[test]
    fn a_segment_sets_permissions_and_teams() {
        let one = |name: &str| vec![name.to_owned()];
        assert_eq!(read("permission=alerts-map:Read"), Ok((one("alerts-map:Read"), true)));
        assert_eq!(read("permission=logs.data-api%23high:ReadData"), Ok((one("logs.data-api#high:ReadData"), true)));
        assert_eq!(read("permission=a:Read,b:Write&team=shop,bank").unwrap().0, ["a:Read", "b:Write"]);
        assert_eq!(read("permission=none&team=bank"), Ok((vec![], false)));
        assert_eq!(read("team=shop&permission=a:Read"), Ok((one("a:Read"), true)));
    }

    #[test]
    fn a_mistake_in_a_segment_is_an_error_that_names_it() {
        for (segment, problem) in [
            ("", "names no permission"),
            ("team=shop", "names no permission"),
            ("permision=a:Read", "unknown parameter \"permision\""),
            ("kwt_0123456789abcdef=", "unknown parameter (not shown)"),
            ("3c9d2b8e-7a41-4f0e", "unknown parameter (not shown)"),
            ("permission=", "empty value in parameter permission"),
            ("permission=a:Read,", "empty value in parameter permission"),
            ("permission=a:Read&team=", "empty value in parameter team"),
            ("permission=a:Read&permission=none", "has parameter permission twice"),
            ("permission=none,a:Read", "permission=none and another permission"),
        ] {
            let error = read(segment).unwrap_err();
            assert!(error.contains(problem), "{segment}: {error}");
        }
    }

    #[test]
    fn raw_pairs_agree_with_the_decoded_pairs_of_a_segment_without_encoded_characters() {
        for segment in
            ["", "&", "a", "=", "a=", "=a", "&a&&b=c&", "a==b=", "permission=a:Read,b:Write&team=x", "\u{e9}=\u{fc}"]
        {
            let decoded: Vec<_> = form_urlencoded::parse(segment.as_bytes()).collect();
            assert_eq!(raw_pairs(segment).collect::<Vec<_>>(), decoded, "{segment}");
        }
    }

    #[test]
    fn the_default_applies_to_routes_that_name_no_permission() {
        let read = |segment| Requirement::of_segment(segment, Some("a:Read")).unwrap();
        assert_eq!(read("team=shop").permissions().collect::<Vec<_>>(), ["a:Read"]);
        assert_eq!(read("permission=b:Read").permissions().collect::<Vec<_>>(), ["b:Read"]);
        assert_eq!(read("permission=none").permissions().count(), 0);
    }
}
