//! How things look.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::{Failure, Format, Result};
use crate::api::{ApiKey, CreatorKind, KeyState, Time, creator_of_key};

/// A table with columns two spaces apart, as kubectl has it. A colour may be given to cells by their text.
pub(super) fn table(head: &[&str], rows: &[Vec<String>], colour: bool) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&head).chain(rows) {
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let shown = paint(cell, colour);
            if index + 1 == row.len() {
                text.push_str(&shown);
            } else {
                let _ = write!(text, "{shown}{:1$}", "", width - cell.chars().count() + 3);
            }
        }
        text.push('\n');
    }
    text
}

/// A word in the colour that it has by its meaning.
pub(super) fn paint(word: &str, colour: bool) -> String {
    let code = match word {
        "Active" | "yes" | "True" => 32,
        "Inactive" | "Expired" | "Pending" => 33,
        "Rejected" | "Lost" | "no" | "False" => 31,
        _ => return word.to_owned(),
    };
    if colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() }
}

pub(super) fn yaml(value: &impl Serialize) -> Result<String> {
    // By way of JSON: so what is absent stays absent.
    let value = serde_json::to_value(value).map_err(|error| Failure::Refused(error.to_string()))?;
    serde_saphyr::to_string(&value).map_err(|error| Failure::Refused(error.to_string()))
}

pub(super) fn json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Refused(error.to_string()))?;
    Ok(text + "\n")
}

/// Keys in one of the forms of `-o`; `None` if it is a table that is asked for.
pub(super) fn keys(keys: &[ApiKey], format: Option<Format>, single: bool) -> Result<Option<String>> {
    let value = || -> Value {
        match keys {
            [key] if single => json!(key),
            _ => json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": keys}),
        }
    };
    Ok(match format {
        Some(Format::Json) => Some(json(&value())?),
        Some(Format::Yaml) => Some(yaml(&value())?),
        Some(Format::Name) => Some(keys.iter().fold(String::new(), |mut text, key| {
            let _ = writeln!(text, "apikey.keywright.dev/{}", key.metadata.name.as_deref().unwrap_or_default());
            text
        })),
        Some(Format::Wide) | None => None,
    })
}

pub(super) fn time(at: Option<&Time>) -> String {
    at.map_or_else(|| "<none>".to_owned(), |at| at.0.to_string())
}

pub(super) fn text(text: Option<&str>) -> String {
    text.unwrap_or("<none>").to_owned()
}

/// The creator's name and type, as far as the cluster knows.
pub(super) fn creator_of(key: &ApiKey) -> (String, &'static str) {
    let known = creator_of_key(key);
    match known {
        Some(known) => (
            known.name,
            match known.kind {
                CreatorKind::User => "User",
                CreatorKind::ServiceAccount => "ServiceAccount",
            },
        ),
        None => ("<unknown>".to_owned(), "<unknown>"),
    }
}

pub(super) fn state_of(key: &ApiKey) -> String {
    key.status
        .as_ref()
        .and_then(|status| status.state)
        .map_or_else(|| "Pending".to_owned(), |state: KeyState| format!("{state:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_colour_does_not_count() {
        let rows = [vec!["a".to_owned(), "Active".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["NAME", "STATE", "ID"], &rows, false), "NAME   STATE    ID\na      Active   x\n");
        assert!(table(&["NAME", "STATE", "ID"], &rows, true).contains("\u{1b}[32mActive\u{1b}[0m   x"));
    }
}
