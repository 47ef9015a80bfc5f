//! Where in a request its key is: the `Authorization` header (RFC 6750, section 2.1), a header, a query parameter.
//!
//! A request that carries two keys is refused, whichever they are: two readers of one request must never see two
//! different callers (RFC 6750, section 2).

use std::{borrow::Cow, fmt, str::FromStr};

/// A place where a key may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `Authorization: Bearer KEY`.
    Authorization,
    /// A header of its own; its name in lower case.
    Header(String),
    /// A parameter of the query. URLs end up in logs: the worst of the three.
    Query(String),
}

impl Source {
    /// The name of the header; none for a query parameter.
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
                Err("say authorization, which reads Authorization: Bearer KEY".to_owned())
            }
            Some(("header", name)) if token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("query", name)) if !name.is_empty() => Ok(Self::Query(name.to_owned())),
            _ => Err(format!("{text:?} is no place for a key: say authorization, header:NAME or query:NAME")),
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

/// What a request carries.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential<'a> {
    /// No key.
    None,
    /// One key, and where it was.
    One(Cow<'a, [u8]>, &'a Source),
    /// More than one.
    Several,
}

// A value must not get into a log by way of a debug format.
impl fmt::Debug for Credential<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::One(_, source) => write!(f, "One({source})"),
            Self::Several => f.write_str("Several"),
        }
    }
}

/// Looks for the key of a request. `header` gives the values of a header by its name in lower case, `query` is the
/// query of the original request without the question mark.
pub fn find<'a, H, V>(sources: &'a [Source], header: H, query: Option<&'a str>) -> Credential<'a>
where
    H: Fn(&'a str) -> V,
    V: Iterator<Item = &'a [u8]>,
{
    let mut found: Option<(Cow<'a, [u8]>, &'a Source)> = None;
    let mut take = |value: Cow<'a, [u8]>, source| {
        // An empty value is no key: a proxy that clears a header may send it empty.
        if value.is_empty() {
            return true;
        }
        found.replace((value, source)).is_none()
    };
    for source in sources {
        let alone = match source {
            Source::Authorization => {
                header("authorization").filter_map(bearer).all(|value| take(Cow::Borrowed(value), source))
            }
            Source::Header(name) => header(name).all(|value| take(Cow::Borrowed(value.trim_ascii()), source)),
            Source::Query(name) => {
                // By the name as it is written: a proxy that takes the parameter out looks for that and for no other
                // way to write it.
                let pairs = query.unwrap_or_default().split('&').filter(|pair| pair.split('=').next() == Some(name));
                pairs.flat_map(|pair| form_urlencoded::parse(pair.as_bytes())).all(|(_, value)| {
                    let value = match value {
                        Cow::Borrowed(value) => Cow::Borrowed(value.as_bytes()),
                        Cow::Owned(value) => Cow::Owned(value.into_bytes()),
                    };
                    take(value, source)
                })
            }
        };
        if !alone {
            return Credential::Several;
        }
    }
    match found {
        Some((value, source)) => Credential::One(value, source),
        None => Credential::None,
    }
}

/// The token of `Bearer TOKEN`; the scheme in any case (RFC 9110, section 11.1). Other schemes are somebody else's.
#[must_use]
pub fn bearer(value: &[u8]) -> Option<&[u8]> {
    let value = value.trim_ascii();
    let (scheme, rest) = value.split_at_checked(6)?;
    let separate = rest.first().is_none_or(|byte| *byte == b' ');
    (scheme.eq_ignore_ascii_case(b"bearer") && separate).then(|| rest.trim_ascii())
}

/// What is wrong with a value that is no key, where it shows what was done to one: what to do about it, for whoever sent it.
/// It never holds any of the value.
#[must_use]
pub fn slip(value: &[u8]) -> Option<&'static str> {
    // The first characters of the base64 of kwp_, kws_ and kwt_.
    const BASE64: [&[u8]; 3] = [b"a3dwX", b"a3dzX", b"a3d0X"];
    let quote = |byte: Option<&u8>| matches!(byte, Some(b'"' | b'\'' | b'`'));
    let line_end = |at: &[u8]| matches!(at, [b'\r' | b'\n', ..] | [b'\\', b'r' | b'n', ..]);
    if BASE64.iter().any(|beginning| value.starts_with(beginning)) {
        Some("this is the base64 of an API key, as the data of a Secret holds it: decode it, and send the result")
    } else if quote(value.first()) || quote(value.last()) {
        Some("there are quotes around the API key: send it without them")
    } else if bearer(value).is_some() {
        Some(
            "there is a word Bearer too many before the API key: it stands once in Authorization, and in no other header",
        )
    } else if (0..value.len()).any(|at| line_end(&value[at..])) {
        Some("there is a line end in the API key: send it without, and look for one in the file that it came from")
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

    /// The key that is found, and where; `Err` for several.
    fn look(headers: &[(&str, &str)], query: &str) -> Result<Option<(String, String)>, ()> {
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
    fn a_key_is_found_in_each_place() {
        let found = |value: &str, source: &str| Ok(Some((value.to_owned(), source.to_owned())));
        assert_eq!(look(&[("authorization", "Bearer k1")], ""), found("k1", "authorization"));
        assert_eq!(look(&[("authorization", "bEARER   k1 ")], ""), found("k1", "authorization"));
        assert_eq!(look(&[("x-api-key", " k1")], ""), found("k1", "header:x-api-key"));
        assert_eq!(look(&[], "a=b&api_key=k%31"), found("k1", "query:api_key"));
        assert_eq!(look(&[], "api%5Fkey=k1"), Ok(None), "nobody could take it out");
        // Somebody else's scheme is not ours to judge.
        assert_eq!(look(&[("authorization", "Basic eDp5"), ("x-api-key", "k1")], ""), found("k1", "header:x-api-key"));
    }

    #[test]
    fn an_empty_token_is_no_key() {
        for headers in [
            &[][..],
            &[("authorization", "")],
            &[("authorization", "Bearer")],
            &[("authorization", "Bearer  ")],
            &[("authorization", "Bearerk1")],
            &[("x-api-key", "")],
            &[("x-api-key", "  ")],
        ] {
            assert_eq!(look(headers, "api_key="), Ok(None), "{headers:?}");
        }
    }

    #[test]
    fn two_keys_are_refused_wherever_they_are_and_also_if_they_are_the_same() {
        for (headers, query) in [
            (&[("authorization", "Bearer k1"), ("authorization", "Bearer k1")][..], ""),
            (&[("authorization", "Bearer k1"), ("x-api-key", "k1")], ""),
            (&[("x-api-key", "k1"), ("x-api-key", "k2")], ""),
            (&[("x-api-key", "k1")], "api_key=k2"),
            (&[], "api_key=k1&api_key=k2"),
        ] {
            assert_eq!(look(headers, query), Err(()), "{headers:?} {query}");
        }
    }

    #[test]
    fn what_was_done_to_a_key_is_told_without_a_look_up_and_without_the_value() {
        let key = "kwt_0123456789";
        for (value, word) in [
            // printf and echo, piped into base64.
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
            let told = slip(value.as_bytes()).unwrap_or_else(|| panic!("{value:?}"));
            assert!(told.contains(word) && !told.contains(&key[4..]), "{value:?}: {told}");
            assert!(told.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\'), "{told}");
        }
        for value in [key, "", "something else", "bearers of news", "a3d", "back\\slash"] {
            assert_eq!(slip(value.as_bytes()), None, "{value:?}");
        }
    }

    #[test]
    fn places_are_read_and_written() {
        for text in ["authorization", "header:x-api-key", "query:Api_Key"] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
        for text in ["", "header:", "header:a b", "header:Authorization", "query:", "cookie:x", "bearer"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_value_is_not_in_the_debug_output() {
        let sources = all();
        let credential = find(&sources, |_| std::iter::once(&b"Bearer secret"[..]), None);
        assert_eq!(format!("{credential:?}"), "Several");
        let credential = find(&sources[1..], |_| std::iter::once(&b"secret"[..]), None);
        assert_eq!(format!("{credential:?}"), "One(header:x-api-key)");
    }
}
