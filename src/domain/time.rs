//! Times in a spec: RFC 3339 texts.

use jiff::{Timestamp, fmt::temporal::Pieces};

/// Reads a time. `None` if it does not exist, such as the 30th of February.
///
/// RFC 3339 and Kubernetes accept times up to `9999-12-31T23:59:59Z`. [`Timestamp`] ends a day earlier, so that each of
/// its times exists in every time zone. Times between the two are read as [`Timestamp::MAX`].
#[must_use]
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| {
        let pieces = Pieces::parse(text).ok()?;
        let local = pieces.date().to_datetime(pieces.time()?);
        let is_beyond = pieces.to_numeric_offset()?.to_timestamp(local).is_err() && local.year() == 9999;
        is_beyond.then_some(Timestamp::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_after_the_last_timestamp_are_read_as_the_last_timestamp() {
        for text in [
            "9999-12-31T23:59:59Z",
            "9999-12-31T23:59:59.999999999Z",
            "9999-12-30T22:00:01Z",
            "9999-12-31T00:00:00+01:00",
            "9999-12-31T23:59:59-23:59",
        ] {
            assert_eq!(parse(text), Some(Timestamp::MAX), "{text}");
        }
        assert_eq!(parse("9999-12-30T22:00:00Z"), Timestamp::from_second(253_402_207_200).ok());
        assert!(parse("9999-12-30T21:59:59Z") < Some(Timestamp::MAX));
    }

    #[test]
    fn times_with_an_offset_are_read_and_invalid_times_are_none() {
        assert_eq!(parse("1970-01-01T01:00:00+01:00"), Some(Timestamp::UNIX_EPOCH));
        for text in [
            "",
            "soon",
            "2099-02-30T00:00:00Z",
            "9999-12-32T00:00:00Z",
            "9999-02-30T00:00:00Z",
            "9999-12-31",
            "9999-12-31T23:59:59",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
