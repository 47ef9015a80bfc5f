//! A last line of defence: texts that come from elsewhere (an error of the API server) pass through here before
//! they reach a log, an Event or a status.

use std::borrow::Cow;

/// How a value begins, plain and in base64, as in the data of a Secret.
const BEGINNINGS: [&str; 6] = ["kwp_", "kws_", "kwt_", "a3dwX", "a3dzX", "a3d0X"];

/// Replaces everything that starts like a key, plain or in base64, and cuts the text to 1024 bytes.
#[must_use]
pub fn redact(text: &str) -> Cow<'_, str> {
    const LIMIT: usize = 1024;
    let mut out = Cow::Borrowed(text);
    for prefix in BEGINNINGS {
        while let Some(start) = find_value(&out, prefix) {
            let body = out[start + prefix.len()..].bytes().take_while(|byte| is_of_a_value(*byte)).count();
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

/// Where a prefix is followed by enough characters to be more than a mention of the prefix.
fn find_value(text: &str, prefix: &str) -> Option<usize> {
    text.match_indices(prefix)
        .map(|(at, _)| at)
        .find(|at| text[at + prefix.len()..].bytes().take_while(|byte| is_of_a_value(*byte)).count() >= 8)
}

fn is_of_a_value(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_and_the_rest_stays() {
        assert_eq!(redact("bad value \"kwt_0123456789abcdef\": no"), "bad value \"[redacted]\": no");
        assert_eq!(redact("kwp_AAAAAAAAAAAA kws_BBBBBBBBBBBB"), "[redacted] [redacted]");
        assert_eq!(redact("data: a3d0X0FBQUFBQUFBQUFBQQ==."), "data: [redacted].");
        assert_eq!(redact("the prefix kwt_ is fine"), "the prefix kwt_ is fine");
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert_eq!(redact(&"é".repeat(2000)).len(), 1024);
    }
}
