//! Bytes as hex digits.

use std::fmt::Write;

/// The hex digits of the bytes, in lower case.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of 64 hex digits in either case. `None` for any other text.
#[must_use]
pub fn decode(text: &str) -> Option<[u8; 32]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let mut bytes = [0; 32];
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_accepts_the_output_of_encode_in_either_case_and_rejects_other_texts() {
        let bytes: [u8; 32] = std::array::from_fn(|at| u8::try_from(at * 7).unwrap());
        let text = encode(&bytes);
        assert_eq!((decode(&text), decode(&text.to_uppercase())), (Some(bytes), Some(bytes)));
        for wrong in ["", &text[1..], &text[2..], &format!("{text}00"), &format!("{text}0"), &text.replace('7', "g")] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }
}
