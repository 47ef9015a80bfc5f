//! What a route asks of a key, as the proxy's configuration says it: `permission=alerts-map:Read&team=shop`.
//!
//! One spelling for every front end. It comes from the proxy's configuration and from nothing that a client can set:
//! in a path it is one whole segment, never the query, since some proxies hand the client's own query on.

use std::borrow::Cow;

/// The word that stands where a permission would, for a route that any working key may pass.
pub const NONE: &str = "none";

/// What a route asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement<'a> {
    /// The permissions that the key must have, all of them, between commas; none if any working key may pass.
    permissions: Option<Cow<'a, str>>,
    /// The namespaces whose keys may pass, between commas; none for every one.
    teams: Option<Cow<'a, str>>,
}

/// What is wrong with a route's configuration, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misconfigured {
    /// The route says nothing at all.
    #[error(
        "the route names no permission: say permission=NAME, or permission=none if any working key may pass, in the \
         proxy's configuration"
    )]
    NoPermission,
    /// The route says something that nobody here understands.
    #[error("the route says {0}, which is unknown: it may say permission and team")]
    UnknownName(String),
    /// The route says one thing twice.
    #[error("the route says {0} twice: separate several by commas")]
    Twice(&'static str),
    /// The route names nothing where it should name something.
    #[error("the route's {0} is empty")]
    Empty(&'static str),
    /// `none` beside a permission.
    #[error("the route asks for none and for a permission: say one of the two")]
    NoneAndMore,
    /// A permission that no catalogue has, so that no key can have it.
    #[error("the route asks for permission {0}, which no PermissionCatalog has")]
    UnknownPermission(String),
}

impl<'a> Requirement<'a> {
    /// Reads the names and values that a configuration gives. `default` is what a route asks for that names no
    /// permission.
    ///
    /// # Errors
    /// Whatever a route must not say, so that a slip of the pen closes a route and does not open it.
    pub fn of(
        pairs: impl IntoIterator<Item = (Cow<'a, str>, Cow<'a, str>)>,
        default: Option<&'a str>,
    ) -> Result<Self, Misconfigured> {
        let (mut permissions, mut teams) = (None, None);
        for (name, value) in pairs {
            let (place, name) = match &*name {
                "permission" => (&mut permissions, "permission"),
                "team" => (&mut teams, "team"),
                // Where a proxy is configured badly, this may be anything, a key too: only what looks like a slip is told.
                slip if slip.len() <= 12 && slip.bytes().all(|b| b.is_ascii_lowercase()) => {
                    return Err(Misconfigured::UnknownName(format!("{slip:?}")));
                }
                _ => return Err(Misconfigured::UnknownName("something".to_owned())),
            };
            if place.is_some() {
                return Err(Misconfigured::Twice(name));
            }
            *place = Some(list(value, name)?);
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

    /// Reads one segment of a path.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_segment(segment: &'a str, default: Option<&'a str>) -> Result<Self, Misconfigured> {
        // Few segments have anything to decode, and each request has one.
        if segment.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
            Self::of(form_urlencoded::parse(segment.as_bytes()), default)
        } else {
            Self::of(plain(segment), default)
        }
    }

    /// The permissions that the key must have, all of them.
    pub fn permissions(&self) -> impl Iterator<Item = &str> {
        self.permissions.iter().flat_map(|names| parts(names))
    }

    /// Whether keys of a namespace may pass.
    #[must_use]
    pub fn accepts(&self, team: &str) -> bool {
        self.teams.as_ref().is_none_or(|teams| parts(teams).any(|accepted| accepted == team))
    }
}

/// The pairs of a segment in which nothing is encoded.
fn plain(segment: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let pairs = segment.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(name, value)| (name.into(), value.into()))
}

/// The parts between commas. A list is read each time it is asked, so that no request has to keep one.
fn parts(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim)
}

/// A list in which every part names something.
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
    fn a_segment_says_permissions_and_teams() {
        let one = |name: &str| vec![name.to_owned()];
        assert_eq!(read("permission=alerts-map:Read"), Ok((one("alerts-map:Read"), true)));
        assert_eq!(read("permission=logs.data-api%23high:ReadData"), Ok((one("logs.data-api#high:ReadData"), true)));
        assert_eq!(read("permission=a:Read,b:Write&team=shop,bank").unwrap().0, ["a:Read", "b:Write"]);
        assert_eq!(read("permission=none&team=bank"), Ok((vec![], false)));
        assert_eq!(read("team=shop&permission=a:Read"), Ok((one("a:Read"), true)));
    }

    #[test]
    fn a_slip_closes_the_route_and_says_why() {
        for (segment, why) in [
            ("", "names no permission"),
            ("team=shop", "names no permission"),
            ("permision=a:Read", "says \"permision\", which is unknown"),
            ("kwt_0123456789abcdef=", "says something, which is unknown"),
            ("3c9d2b8e-7a41-4f0e", "says something, which is unknown"),
            ("permission=", "permission is empty"),
            ("permission=a:Read,", "permission is empty"),
            ("permission=a:Read&team=", "team is empty"),
            ("permission=a:Read&permission=none", "says permission twice"),
            ("permission=none,a:Read", "asks for none and for a permission"),
        ] {
            let error = read(segment).unwrap_err();
            assert!(error.contains(why), "{segment}: {error}");
        }
    }

    #[test]
    fn a_segment_without_anything_to_decode_reads_as_if_it_were_decoded() {
        for segment in
            ["", "&", "a", "=", "a=", "=a", "&a&&b=c&", "a==b=", "permission=a:Read,b:Write&team=x", "\u{e9}=\u{fc}"]
        {
            let decoded: Vec<_> = form_urlencoded::parse(segment.as_bytes()).collect();
            assert_eq!(plain(segment).collect::<Vec<_>>(), decoded, "{segment}");
        }
    }

    #[test]
    fn a_default_is_for_routes_that_name_no_permission() {
        let read = |segment| Requirement::of_segment(segment, Some("a:Read")).unwrap();
        assert_eq!(read("team=shop").permissions().collect::<Vec<_>>(), ["a:Read"]);
        assert_eq!(read("permission=b:Read").permissions().collect::<Vec<_>>(), ["b:Read"]);
        assert_eq!(read("permission=none").permissions().count(), 0);
    }
}
