//! A last line of defence: texts that come from elsewhere (an error of the API server) pass through here before
//! they reach a log, an Event or a status.

use std::borrow::Cow;

/// Replaces everything that starts like a key (`kwp_`, `kws_`, `kwt_`) and cuts the text to 1024 bytes.
#[must_use]
pub fn redact(text: &str) -> Cow<'_, str> {
    const LIMIT: usize = 1024;
    let mut out = Cow::Borrowed(text);
    for prefix in ["kwp_", "kws_", "kwt_"] {
        while let Some(start) = find_value(&out, prefix) {
            let body = out[start + prefix.len()..].bytes().take_while(u8::is_ascii_alphanumeric).count();
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
        .find(|at| text[at + prefix.len()..].bytes().take_while(u8::is_ascii_alphanumeric).count() >= 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_and_the_rest_stays() {
        assert_eq!(redact("bad value \"kwt_0123456789abcdef\": no"), "bad value \"[redacted]\": no");
        assert_eq!(redact("kwp_AAAAAAAAAAAA kws_BBBBBBBBBBBB"), "[redacted] [redacted]");
        assert_eq!(redact("the prefix kwt_ is fine"), "the prefix kwt_ is fine");
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert_eq!(redact(&"é".repeat(2000)).len(), 1024);
    }
}
