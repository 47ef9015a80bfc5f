//! Durations in the format of the Gateway API (GEP-2257): `720h`, `90m`, `1h30m`.

use std::time::Duration;

/// Reads a duration. `None` unless it is one to three groups of one to five digits and a unit `h`, `m` or `s`.
#[must_use]
pub fn parse(text: &str) -> Option<Duration> {
    let mut seconds = 0_u64;
    let mut rest = text;
    let mut groups = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let unit = match rest.as_bytes().get(digits)? {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        if !(1..=5).contains(&digits) {
            return None;
        }
        seconds += rest[..digits].parse::<u64>().ok()? * unit;
        rest = &rest[digits + 1..];
        groups += 1;
    }
    (1..=3).contains(&groups).then(|| Duration::from_secs(seconds))
}

/// Writes a duration in hours, minutes and seconds, without the units that are zero.
#[must_use]
pub fn format(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let parts = [(seconds / 3600, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let text: String =
        parts.iter().filter(|(n, _)| *n > 0).flat_map(|(n, unit)| [n.to_string(), (*unit).to_owned()]).collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_accepts_only_the_format_of_the_crd() {
        for (text, seconds) in
            [("720h", 2_592_000), ("90m", 5400), ("1h30m", 5400), ("0s", 0), ("1h2m3s", 3723), ("99999h", 359_996_400)]
        {
            assert_eq!(parse(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "1", "1d", "-1h", "1.5h", "100000h", "1h 2m", "1h2m3s4s", "1ms", "１h"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn format_returns_the_text_that_was_parsed() {
        for text in ["0s", "59s", "1m", "1h30m", "24h", "720h", "1h2m3s"] {
            assert_eq!(format(parse(text).unwrap()), text);
        }
    }
}
