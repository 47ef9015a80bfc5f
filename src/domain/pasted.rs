//! Values of keys in places that are for names and texts.
//!
//! An object is not secret: whoever may view keys reads it, and so do backups, audit logs and Git. A value that somebody
//! pasted into it must be found before it is stored, and must not be repeated in the answer.

use std::collections::BTreeSet;

use serde_json::Value;

use super::key;

/// How the base64 of a value begins, as in the data of a Secret.
const IN_BASE64: [&str; 3] = ["a3dwX", "a3dzX", "a3d0X"];

/// How many characters of the base64 of a value tell something of it: [`key::LEN`] bytes, without padding.
const BASE64_LEN: usize = (key::LEN * 4).div_ceil(3);

/// What kubectl notes of an applied object: it repeats the whole of it.
const APPLIED: &str = "metadata.annotations[kubectl.kubernetes.io/last-applied-configuration]";

/// The values of keys in a text, with right checksums, or in base64.
fn values(text: &str) -> impl Iterator<Item = &str> {
    let plain = text
        .match_indices("kw")
        .filter_map(|(at, _)| text.get(at..at + key::LEN))
        .filter(|part| key::is_well_formed(part));
    let encoded = IN_BASE64.iter().flat_map(|begin| text.match_indices(begin)).filter_map(|(at, _)| {
        let part = text.get(at..at + BASE64_LEN)?;
        part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/')).then_some(part)
    });
    plain.chain(encoded)
}

/// Whether a text has the value of a key in it.
#[must_use]
pub fn holds_value(text: &str) -> bool {
    values(text).next().is_some()
}

/// The fields of an object that hold the value of a key, which the object before did not hold. What is stored already is
/// no reason to refuse a change, least of all the one that takes it out. No returned path holds a value.
#[must_use]
pub fn fields(object: &Value, old: Option<&Value>) -> Vec<String> {
    let mut known = BTreeSet::new();
    if let Some(old) = old {
        visit(old, "", &mut |_, text| known.extend(values(text).map(str::to_owned)));
    }
    let mut found = BTreeSet::new();
    visit(object, "", &mut |path, text| {
        if values(text).any(|value| !known.contains(value)) {
            found.insert(path.to_owned());
        }
    });
    if found.len() > 1 {
        found.remove(APPLIED);
    }
    found.into_iter().collect()
}

/// Calls `see` with each text of a JSON value, and with each name in it. The path of a name is that of its parent.
fn visit(value: &Value, path: &str, see: &mut impl FnMut(&str, &str)) {
    match value {
        Value::String(text) => see(path, text),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| visit(item, &format!("{path}[{index}]"), see));
        }
        Value::Object(map) => {
            for (name, below) in map {
                see(path, name);
                let path = match path {
                    _ if holds_value(name) => path.to_owned(),
                    "" => name.clone(),
                    _ if name.bytes().all(|byte| byte.is_ascii_alphanumeric()) => format!("{path}.{name}"),
                    _ => format!("{path}[{name}]"),
                };
                // Names of fields that are in the object itself.
                if path != "metadata.managedFields" {
                    visit(below, &path, see);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SysRng;
    use serde_json::json;

    use super::*;
    use crate::{api::KeyType, domain::key::Key};

    fn value() -> String {
        Key::mint(KeyType::Team, &mut SysRng).unwrap().expose().to_owned()
    }

    /// Base64 by hand, since nothing else here needs it.
    fn base64(text: &str) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bits: Vec<u8> = text.bytes().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
        let digit = |six: &[u8]| six.iter().chain(&[0; 6]).take(6).fold(0, |sum, bit| sum * 2 + usize::from(*bit));
        bits.chunks(6).map(|six| char::from(ALPHABET[digit(six)])).collect()
    }

    #[test]
    fn a_value_is_found_in_any_text_and_a_mention_of_its_beginning_is_none() {
        let value = value();
        for text in [value.clone(), format!("Bearer {value}\n"), format!("é{value}{value}"), format!("kwt_{value}x")] {
            assert!(holds_value(&text), "{text}");
        }
        for text in [base64(&value), format!("key-value: {}=", base64(&value))] {
            assert!(holds_value(&text), "{text}");
        }
        let mut wrong = value.clone();
        wrong.replace_range(10..11, if &value[10..11] == "a" { "b" } else { "a" });
        for text in ["", "kwt_", "kw", "keys begin with kwt_", &value[..52], &wrong, &base64(&value)[..70]] {
            assert!(!holds_value(text), "{text}");
        }
    }

    #[test]
    fn fields_are_named_and_values_are_not() {
        let value = value();
        let object = json!({
            "metadata": {
                "name": "k", "labels": {"a": value, "example.com/b": value, &value: "c"},
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": format!("{{\"a\": \"{value}\"}}")},
                "managedFields": [{"fieldsV1": {"f:metadata": {&value: {}}}}],
            },
            "spec": {"user": value, "presets": ["Alerts", value], "secret": {"labels": {"x-y": value}}},
        });
        let expected = [
            "metadata.labels",
            "metadata.labels.a",
            "metadata.labels[example.com/b]",
            "spec.presets[1]",
            "spec.secret.labels[x-y]",
            "spec.user",
        ];
        assert_eq!(fields(&object, None), expected);
        assert_eq!(fields(&object, Some(&object)), Vec::<String>::new(), "it was there before");
        assert_eq!(fields(&object, Some(&json!({"spec": {"user": self::value()}}))), expected);
        let noted = json!({"metadata": {"annotations": object["metadata"]["annotations"]}});
        assert_eq!(fields(&noted, None), [APPLIED]);
    }
}
