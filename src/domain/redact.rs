//! Removes key values from texts of other components, such as errors of the API server, before they reach a log, an
//! Event or a status.

use std::borrow::Cow;

/// The prefixes of values, plain and in base64, as in the data of a Secret.
const PREFIXES: [&str; 6] = ["kwp_", "kws_", "kwt_", "a3dwX", "a3dzX", "a3d0X"];

/// Replaces every part of a text that starts like a key, plain or in base64, and truncates the text to 1024 bytes.
#[must_use]
pub fn redact(text: &str) -> Cow<'_, str> {
    const LIMIT: usize = 1024;
    let mut out = Cow::Borrowed(text);
    for prefix in PREFIXES {
        while let Some(start) = find_value(&out, prefix) {
            let body = out[start + prefix.len()..].bytes().take_while(|byte| is_value_byte(*byte)).count();
            let mut clean = out[..start].to_owned();
            clean.push_str("[redacted]");
            clean.push_str(&out[start + prefix.len() + body..]);
            out = Cow::Owned(clean);
        }
    }
    if out.len() > LIMIT {
        let end = (0..=LIMIT).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out = Cow::Owned(out[..end].to_owned());
    }
    out
}

/// The position of the first prefix that at least eight characters of a value follow. Texts may mention the prefix
/// alone.
fn find_value(text: &str, prefix: &str) -> Option<usize> {
    text.match_indices(prefix)
        .map(|(at, _)| at)
        .find(|at| text[at + prefix.len()..].bytes().take_while(|byte| is_value_byte(*byte)).count() >= 8)
}

fn is_value_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redact_replaces_values_and_keeps_the_rest() {
        assert_eq!(redact("bad value \"kwt_0123456789abcdef\": no"), "bad value \"[redacted]\": no");
        assert_eq!(redact("kwp_AAAAAAAAAAAA kws_BBBBBBBBBBBB"), "[redacted] [redacted]");
        assert_eq!(redact("data: a3d0X0FBQUFBQUFBQUFBQQ==."), "data: [redacted].");
        assert_eq!(redact("the prefix kwt_ is fine"), "the prefix kwt_ is fine");
    }

    #[test]
    fn redact_truncates_long_texts_at_a_character_boundary() {
        assert_eq!(redact(&"é".repeat(2000)).len(), 1024);
    }
}
