//! The formats of the output: escaped text, tables, JSON and YAML.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::{CliError, Format, Result};
use crate::api::{ApiKey, CreatorKind, KeyState, Time, creator_of_key};

/// Whether a character can make text imitate other output: it ends a line, moves the cursor, changes the writing
/// direction, or is invisible (Unicode general categories Cc, Zl and Zp, the property `Bidi_Control`, and the invisible
/// characters and tags that Unicode Technical Standard 39 calls restricted). Joiners, which scripts and emoji need, are
/// allowed.
const fn misleads(c: char) -> bool {
    c.is_ascii_control()
        || matches!(c,
            '\u{80}'..='\u{9f}'
            | '\u{ad}' | '\u{61c}' | '\u{180e}'
            | '\u{200b}' | '\u{200e}' | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// Escapes misleading characters as Rust does (`\n`, `\u{202e}`), so that text from the cluster stays in one line.
pub(super) fn line(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if misleads(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        shown
    })
}

/// [`line()`] for a cell of a table. A run of spaces could imitate the start of the next column, so all spaces of a run
/// but the first are escaped.
fn cell(text: &str) -> String {
    let mut after_space = true;
    let leading = text.len() - text.trim_start_matches(' ').len();
    line(text).chars().enumerate().fold(String::with_capacity(text.len()), |mut shown, (at, c)| {
        // Two leading spaces are the indentation that `describe` uses.
        if c.is_whitespace() && after_space && at >= leading.min(2) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
        after_space = c.is_whitespace();
        shown
    })
}

/// A table in the format of kubectl, with three spaces between columns. Known words are colored if `color` is set.
pub(super) fn table(head: &[&str], rows: &[Vec<String>], color: bool) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|text| cell(text)).collect()).collect();
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&head).chain(&rows) {
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let shown = paint(cell, color);
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

/// Colors a known word by its meaning.
pub(super) fn paint(word: &str, color: bool) -> String {
    let code = match word {
        "Active" | "yes" | "True" => 32,
        "Inactive" | "Expired" | "Pending" => 33,
        "Rejected" | "Lost" | "no" | "False" => 31,
        _ => return word.to_owned(),
    };
    if color { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() }
}

pub(super) fn yaml(value: &impl Serialize) -> Result<String> {
    // Through a JSON value, so that absent fields stay absent.
    let value = serde_json::to_value(value).map_err(|error| CliError::Refused(error.to_string()))?;
    let text = serde_saphyr::to_string(&value).map_err(|error| CliError::Refused(error.to_string()))?;
    // YAML has escapes in double-quoted strings only. JSON is valid YAML and quotes every string.
    if text.chars().any(|c| c != '\n' && misleads(c)) { json(&value) } else { Ok(text) }
}

pub(super) fn json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Refused(error.to_string()))?;
    // Misleading characters occur in strings only. JSON escapes are UTF-16 code units (RFC 8259, section 7).
    let escaped = text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c != '\n' && misleads(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(c);
        }
        shown
    });
    Ok(escaped + "\n")
}

/// Formats keys for `-o`. `None` if the output is a table.
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
            let _ = writeln!(text, "apikey.keywright.dev/{}", line(key.metadata.name.as_deref().unwrap_or_default()));
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

/// Returns the name and the type of the creator, or `<unknown>` for both.
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
    fn columns_are_aligned_with_and_without_color() {
        let rows = [vec!["a".to_owned(), "Active".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["NAME", "STATE", "ID"], &rows, false), "NAME   STATE    ID\na      Active   x\n");
        assert!(table(&["NAME", "STATE", "ID"], &rows, true).contains("\u{1b}[32mActive\u{1b}[0m   x"));
    }

    /// A display name that imitates another row of a list.
    const FORGED: &str = "x\u{1b}[2K\r\nother   Team   admin\u{202e}\u{2028}\u{85}\u{200b}";

    #[test]
    fn text_from_the_cluster_imitates_no_row_and_no_column() {
        assert_eq!(line(FORGED), r"x\u{1b}[2K\r\nother   Team   admin\u{202e}\u{2028}\u{85}\u{200b}", "a single line");
        for harmless in ["Zahlungen für Öl", "支付", "كشف", "👩\u{200d}💻", "a b"] {
            assert_eq!(line(harmless), harmless);
            assert_eq!(cell(harmless), harmless);
        }
        let shown = table(&["NAME", "STATE"], &[vec![FORGED.to_owned(), "Active".to_owned()]], false);
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(!shown.chars().any(|c| c != '\n' && misleads(c)), "{shown}");
        assert!(shown.contains(r"other \u{20}\u{20}Team"), "{shown}");
        assert!(
            table(&["  TYPE"], &[vec!["  Ready".to_owned()]], false).contains("\n  Ready\n"),
            "the indentation is not escaped"
        );
        assert!(table(&["X"], &[vec!["a\u{a0}\u{a0}b".to_owned()]], false).contains(r"\u{a0}b"));
    }

    #[test]
    fn json_and_yaml_escape_misleading_characters_and_keep_the_value() {
        let value = json!({"displayName": format!("{FORGED}\u{e0041}")});
        for text in [json(&value).unwrap(), yaml(&value).unwrap()] {
            assert!(!text.chars().any(|c| c != '\n' && misleads(c)), "{text}");
            assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), value, "{text}");
        }
        assert_eq!(serde_json::from_str::<Value>(&json(&value).unwrap()).unwrap(), value);
        assert!(yaml(&json!({"a": "b"})).unwrap().contains("a: b"), "YAML if no character needs an escape");
    }
}
