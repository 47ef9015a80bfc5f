//! Detection of key values in fields for names and texts.
//!
//! Objects are not secret: users who may view keys read them, and backups, audit logs and Git hold them. A request with
//! a key value in such a field must be rejected before the object is stored, and the answer must not repeat the value.

use std::collections::BTreeSet;

use serde_json::Value;

use super::key;

/// The first characters of the base64 of `kwp_`, `kws_` and `kwt_`, as in the data of a Secret.
const BASE64_PREFIXES: [&str; 3] = ["a3dwX", "a3dzX", "a3d0X"];

/// The length of the base64 of a value of [`key::LEN`] bytes, without padding.
const BASE64_LEN: usize = (key::LEN * 4).div_ceil(3);

/// The annotation in which kubectl stores a copy of the applied object.
const APPLIED: &str = "metadata.annotations[kubectl.kubernetes.io/last-applied-configuration]";

/// The key values in a text: with a valid checksum, or in base64.
fn values(text: &str) -> impl Iterator<Item = &str> {
    let plain = text
        .match_indices("kw")
        .filter_map(|(at, _)| text.get(at..at + key::LEN))
        .filter(|part| key::is_well_formed(part));
    let encoded = BASE64_PREFIXES.iter().flat_map(|prefix| text.match_indices(prefix)).filter_map(|(at, _)| {
        let part = text.get(at..at + BASE64_LEN)?;
        part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/')).then_some(part)
    });
    plain.chain(encoded)
}

/// Whether a text contains a key value.
#[must_use]
pub fn holds_value(text: &str) -> bool {
    values(text).next().is_some()
}

/// The paths of the fields with a key value that the previous object did not contain. A stored value must not block
/// later changes, least of all its removal. No returned path contains a value.
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

/// Calls `see` with each string and each field name of a JSON value. The path of a field name is that of its parent.
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
                // managedFields only repeats the field names of the object.
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

    /// Base64 without padding, implemented here to save a dependency.
    fn base64(text: &str) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bits: Vec<u8> = text.bytes().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
        let digit = |six: &[u8]| six.iter().chain(&[0; 6]).take(6).fold(0, |sum, bit| sum * 2 + usize::from(*bit));
        bits.chunks(6).map(|six| char::from(ALPHABET[digit(six)])).collect()
    }

    #[test]
    fn values_are_found_inside_texts_and_prefixes_are_ignored() {
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
    fn fields_returns_the_paths_of_new_values_without_the_values() {
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
        assert_eq!(fields(&object, Some(&object)), Vec::<String>::new(), "the previous object contains the value");
        assert_eq!(fields(&object, Some(&json!({"spec": {"user": self::value()}}))), expected);
        let noted = json!({"metadata": {"annotations": object["metadata"]["annotations"]}});
        assert_eq!(fields(&noted, None), [APPLIED]);
    }
}
