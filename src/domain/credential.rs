//! Finds the key in a request: in the `Authorization` header (RFC 6750, section 2.1), another header or a query
//! parameter.
//!
//! A request with two keys is rejected, also if they are equal: two readers of one request must not see different
//! callers (RFC 6750, section 2).

use std::{borrow::Cow, fmt, str::FromStr};

/// A part of the request that may hold the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `Authorization: Bearer KEY`.
    Authorization,
    /// Another header, by its name in lower case.
    Header(String),
    /// A query parameter. The least safe of the three, since URLs are logged.
    Query(String),
}

impl Source {
    /// The name of the header. `None` for a query parameter.
    #[must_use]
    pub fn header(&self) -> Option<&str> {
        match self {
            Self::Authorization => Some("authorization"),
            Self::Header(name) => Some(name),
            Self::Query(_) => None,
        }
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // RFC 9110, section 5.6.2: a token.
        let token = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
        };
        match text.split_once(':') {
            None if text == "authorization" => Ok(Self::Authorization),
            Some(("header", name)) if name.eq_ignore_ascii_case("authorization") => {
                Err("use authorization, which reads Authorization: Bearer KEY".to_owned())
            }
            Some(("header", name)) if token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("query", name)) if !name.is_empty() => Ok(Self::Query(name.to_owned())),
            _ => Err(format!("{text:?} is not a key source: use authorization, header:NAME or query:NAME")),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authorization => f.write_str("authorization"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Query(name) => write!(f, "query:{name}"),
        }
    }
}

/// The key of a request.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential<'a> {
    /// No key.
    None,
    /// One key and its source.
    One(Cow<'a, [u8]>, &'a Source),
    /// More than one.
    Several,
}

// Without the value, which must not be logged.
impl fmt::Debug for Credential<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::One(_, source) => write!(f, "One({source})"),
            Self::Several => f.write_str("Several"),
        }
    }
}

/// Finds the key of a request. `header` returns the values of a header by its name in lower case. `query` is the query
/// of the original request without the question mark.
pub fn find<'a, H, V>(sources: &'a [Source], header: H, query: Option<&'a str>) -> Credential<'a>
where
    H: Fn(&'a str) -> V,
    V: Iterator<Item = &'a [u8]>,
{
    let mut found: Option<(Cow<'a, [u8]>, &'a Source)> = None;
    let mut is_only_key = |value: Cow<'a, [u8]>, source| {
        // A proxy that clears a header may send it empty.
        if value.is_empty() {
            return true;
        }
        found.replace((value, source)).is_none()
    };
    for source in sources {
        let at_most_one = match source {
            Source::Authorization => {
                header("authorization").filter_map(bearer).all(|value| is_only_key(Cow::Borrowed(value), source))
            }
            Source::Header(name) => header(name).all(|value| is_only_key(Cow::Borrowed(value.trim_ascii()), source)),
            Source::Query(name) => {
                // The name is compared before percent-decoding: a proxy that removes the parameter matches only this
                // spelling.
                let pairs = query.unwrap_or_default().split('&').filter(|pair| pair.split('=').next() == Some(name));
                pairs.flat_map(|pair| form_urlencoded::parse(pair.as_bytes())).all(|(_, value)| {
                    let value = match value {
                        Cow::Borrowed(value) => Cow::Borrowed(value.as_bytes()),
                        Cow::Owned(value) => Cow::Owned(value.into_bytes()),
                    };
                    is_only_key(value, source)
                })
            }
        };
        if !at_most_one {
            return Credential::Several;
        }
    }
    match found {
        Some((value, source)) => Credential::One(value, source),
        None => Credential::None,
    }
}

/// The token of `Bearer TOKEN`, with the scheme in any case (RFC 9110, section 11.1). `None` for other schemes.
#[must_use]
pub fn bearer(value: &[u8]) -> Option<&[u8]> {
    let value = value.trim_ascii();
    let (scheme, rest) = value.split_at_checked(6)?;
    let separate = rest.first().is_none_or(|byte| *byte == b' ');
    (scheme.eq_ignore_ascii_case(b"bearer") && separate).then(|| rest.trim_ascii())
}

/// Recognizes a common mistake in a value that is not a key, and returns the problem and the fix for the client. The
/// text never contains a part of the value.
#[must_use]
pub fn describe_mistake(value: &[u8]) -> Option<&'static str> {
    // The first characters of the base64 of `kwp_`, `kws_` and `kwt_`.
    const BASE64_PREFIXES: [&[u8]; 3] = [b"a3dwX", b"a3dzX", b"a3d0X"];
    let quote = |byte: Option<&u8>| matches!(byte, Some(b'"' | b'\'' | b'`'));
    let line_end = |at: &[u8]| matches!(at, [b'\r' | b'\n', ..] | [b'\\', b'r' | b'n', ..]);
    if BASE64_PREFIXES.iter().any(|prefix| value.starts_with(prefix)) {
        Some("the value is the base64 of an API key, as in the data of a Secret: decode it first")
    } else if quote(value.first()) || quote(value.last()) {
        Some("there are quotes around the API key: send it without quotes")
    } else if bearer(value).is_some() {
        Some(
            "there is an extra word Bearer before the API key: send it once in Authorization, and not in other headers",
        )
    } else if (0..value.len()).any(|at| line_end(&value[at..])) {
        Some("there is a line end in the API key: remove it, also from the file that holds the key")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Source> {
        ["authorization", "header:X-API-Key", "query:api_key"].map(|text| text.parse().unwrap()).into()
    }

    /// The key that `find` returns and its source. `Err` for several.
    fn find_in(headers: &[(&str, &str)], query: &str) -> Result<Option<(String, String)>, ()> {
        let sources = all();
        let header = |name| headers.iter().filter(move |(n, _)| *n == name).map(|(_, value)| value.as_bytes());
        match find(&sources, header, Some(query)) {
            Credential::None => Ok(None),
            Credential::One(value, source) => {
                Ok(Some((String::from_utf8(value.into_owned()).unwrap(), source.to_string())))
            }
            Credential::Several => Err(()),
        }
    }

    #[test]
    fn find_returns_the_key_of_each_source() {
        let found = |value: &str, source: &str| Ok(Some((value.to_owned(), source.to_owned())));
        assert_eq!(find_in(&[("authorization", "Bearer k1")], ""), found("k1", "authorization"));
        assert_eq!(find_in(&[("authorization", "bEARER   k1 ")], ""), found("k1", "authorization"));
        assert_eq!(find_in(&[("x-api-key", " k1")], ""), found("k1", "header:x-api-key"));
        assert_eq!(find_in(&[], "a=b&api_key=k%31"), found("k1", "query:api_key"));
        assert_eq!(find_in(&[], "api%5Fkey=k1"), Ok(None), "a proxy could not remove it");
        // Other authentication schemes are ignored.
        assert_eq!(
            find_in(&[("authorization", "Basic eDp5"), ("x-api-key", "k1")], ""),
            found("k1", "header:x-api-key")
        );
    }

    #[test]
    fn find_ignores_an_empty_value() {
        for headers in [
            &[][..],
            &[("authorization", "")],
            &[("authorization", "Bearer")],
            &[("authorization", "Bearer  ")],
            &[("authorization", "Bearerk1")],
            &[("x-api-key", "")],
            &[("x-api-key", "  ")],
        ] {
            assert_eq!(find_in(headers, "api_key="), Ok(None), "{headers:?}");
        }
    }

    #[test]
    fn find_reports_several_keys_from_any_sources_and_also_if_they_are_equal() {
        for (headers, query) in [
            (&[("authorization", "Bearer k1"), ("authorization", "Bearer k1")][..], ""),
            (&[("authorization", "Bearer k1"), ("x-api-key", "k1")], ""),
            (&[("x-api-key", "k1"), ("x-api-key", "k2")], ""),
            (&[("x-api-key", "k1")], "api_key=k2"),
            (&[], "api_key=k1&api_key=k2"),
        ] {
            assert_eq!(find_in(headers, query), Err(()), "{headers:?} {query}");
        }
    }

    #[test]
    fn describe_mistake_never_contains_the_value() {
        let key = "kwt_0123456789";
        for (value, word) in [
            // The output of printf, then of echo, piped into base64.
            ("a3d0XzAxMjM0NTY3ODk=", "base64"),
            ("a3d0XzAxMjM0NTY3ODkK", "base64"),
            ("a3dwXzAxMjM0NTY3ODk", "base64"),
            ("\"kwt_0123456789\"", "quotes"),
            ("'kwt_0123456789'", "quotes"),
            ("kwt_0123456789\"", "quotes"),
            ("Bearer kwt_0123456789", "Bearer"),
            ("bearer  kwt_0123456789", "Bearer"),
            ("kwt_01234\n56789", "line end"),
            ("kwt_0123456789\r\n", "line end"),
            ("kwt_0123456789\\n", "line end"),
        ] {
            let hint = describe_mistake(value.as_bytes()).unwrap_or_else(|| panic!("{value:?}"));
            assert!(hint.contains(word) && !hint.contains(&key[4..]), "{value:?}: {hint}");
            assert!(hint.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\'), "{hint}");
        }
        for value in [key, "", "something else", "bearers of tokens", "a3d", "back\\slash"] {
            assert_eq!(describe_mistake(value.as_bytes()), None, "{value:?}");
        }
    }

    #[test]
    fn sources_are_parsed_and_written() {
        for text in ["authorization", "header:x-api-key", "query:Api_Key"] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
        for text in ["", "header:", "header:a b", "header:Authorization", "query:", "cookie:x", "bearer"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    #[test]
    fn debug_output_does_not_contain_the_value() {
        let sources = all();
        let credential = find(&sources, |_| std::iter::once(&b"Bearer secret"[..]), None);
        assert_eq!(format!("{credential:?}"), "Several");
        let credential = find(&sources[1..], |_| std::iter::once(&b"secret"[..]), None);
        assert_eq!(format!("{credential:?}"), "One(header:x-api-key)");
    }
}
