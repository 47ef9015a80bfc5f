//! The documents: the length of the README, links and anchors, the table of contents, and the names of tests and files.
//!
//! Documents are read as text, without fenced code blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{files, repository, text};

/// The documents outside the book.
const TOP: [&str; 5] = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"];

/// The folder of the book.
const BOOK: &str = "docs";

/// The chapter whose headings comments in the code refer to, as in `docs/NAME.md, "Heading"`.
const REFERENCED: &str = "specification.md";

/// The documents that name files of the source tree.
const GUIDES: [&str; 2] = ["CONTRIBUTING.md", "ARCHITECTURE.md"];

const MOST_LINES_OF_README: usize = 150;

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// The chapters of the book, with its table of contents.
fn chapters() -> Vec<PathBuf> {
    files(BOOK).into_iter().filter(|path| has_extension(path, "md")).collect()
}

fn documents() -> Vec<PathBuf> {
    TOP.iter().map(|name| repository().join(name)).chain(chapters()).collect()
}

/// The path of a document for messages.
fn name(path: &Path) -> String {
    path.strip_prefix(repository()).unwrap_or(path).display().to_string()
}

/// The text of a document without fenced code blocks.
fn prose(path: &Path) -> String {
    let mut in_code = false;
    let text = text(path);
    let lines = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !is_fence && !in_code
    });
    let prose = lines.collect::<Vec<_>>().join("\n");
    assert!(!in_code, "{}: a code block has no end", name(path));
    prose
}

/// The text outside and the text inside of inline code.
fn split_code(prose: &str) -> (String, Vec<&str>) {
    let parts: Vec<_> = prose.split('`').collect();
    let outside: String = parts.iter().step_by(2).copied().collect();
    (outside, parts.into_iter().skip(1).step_by(2).collect())
}

/// The targets of the links and images of a document.
fn links(path: &Path) -> Vec<String> {
    let prose = prose(path);
    // Brackets inside code are not links.
    let (outside, _) = split_code(&prose);
    let starts = outside.match_indices("](").map(|(at, start)| at + start.len());
    starts.filter_map(|at| outside[at..].split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

/// The anchor of a heading, by the rule that GitHub and mdBook share.
fn anchor(heading: &str) -> String {
    let lower = heading.trim().to_lowercase();
    let kept = lower.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The anchors of all headings of a document. A repeated heading gets a number.
fn anchors(path: &Path) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let prose = prose(path);
    let headings = prose.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#'));
    headings
        .map(|heading| {
            let anchor = anchor(heading);
            let count = seen.entry(anchor.clone()).or_default();
            *count += 1;
            if *count == 1 { anchor } else { format!("{anchor}-{}", *count - 1) }
        })
        .collect()
}

fn is_external(target: &str) -> bool {
    ["http://", "https://", "mailto:"].iter().any(|scheme| target.starts_with(scheme))
}

/// The problem of one link, if it has one.
fn problem(document: &Path, target: &str) -> Option<String> {
    if is_external(target) {
        return None;
    }
    let (file, fragment) = target.split_once('#').map_or((target, None), |(file, fragment)| (file, Some(fragment)));
    let path = if file.is_empty() { document.to_owned() } else { document.parent().unwrap().join(file) };
    let Ok(path) = path.canonicalize() else { return Some(format!("{file} does not exist")) };
    let book = repository().join(BOOK).canonicalize().unwrap();
    if document.canonicalize().unwrap().starts_with(&book) && !path.starts_with(&book) {
        return Some(format!("{file} is not part of the book, so that the link is broken in the built book"));
    }
    let fragment = fragment?;
    let has_anchors = has_extension(&path, "md");
    (!has_anchors || !anchors(&path).contains(fragment)).then(|| format!("{} has no heading #{fragment}", name(&path)))
}

/// The names of all functions that are tests, in `tests` and `src`.
fn tests() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let sources = files("tests").into_iter().chain(files("src")).filter(|path| has_extension(path, "rs"));
    for path in sources {
        let mut is_test = false;
        for line in text(&path).lines().map(str::trim_start) {
            if line.starts_with("#[") {
                is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            } else if !line.starts_with("//") {
                let function = line.split_once("fn ").map(|(_, rest)| rest);
                let name = function.and_then(|rest| rest.split(['(', '<']).next());
                found.extend(name.filter(|_| is_test).map(str::to_owned));
                is_test = false;
            }
        }
    }
    found
}

/// The headings that comments refer to after the name of a chapter: `, "One", "Two"`, also across lines of a comment.
fn headings_after(text: &str) -> Vec<String> {
    let markers = ["//!", "///", "//", "\n"];
    let line = markers.iter().fold(text.to_owned(), |line, marker| line.replace(marker, " "));
    let mut rest = line.as_str();
    let mut found = vec![];
    while let Some((heading, after)) =
        rest.strip_prefix(',').and_then(|quoted| quoted.trim_start().strip_prefix('"')?.split_once('"'))
    {
        found.push(heading.split_whitespace().collect::<Vec<_>>().join(" "));
        rest = after;
    }
    found
}

#[test]
fn anchors_follow_the_rule_of_github_and_mdbook() {
    assert_eq!(anchor(" Access policies"), "access-policies");
    assert_eq!(anchor(" `requestedAt`, and a time: 24 h"), "requestedat-and-a-time-24-h");
    let (outside, code) = split_code("see `a[0](b)` in [x](y)");
    assert_eq!((outside.as_str(), code), ("see  in [x](y)", vec!["a[0](b)"]));
    assert_eq!(headings_after(", \"Key\n/// types\", \"Actions\" (view)"), ["Key types", "Actions"]);
}

#[test]
fn the_readme_has_at_most_150_lines() {
    let lines = text(&repository().join("README.md")).lines().count();
    assert!(lines <= MOST_LINES_OF_README, "README.md has {lines} lines: move details to {BOOK}/");
}

#[test]
fn inline_code_is_closed_in_every_document() {
    for document in documents() {
        let count = prose(&document).matches('`').count();
        assert!(count.is_multiple_of(2), "{}: {count} backticks", name(&document));
    }
}

#[test]
fn every_link_points_to_an_existing_file_and_heading() {
    let mut count = 0;
    let mut problems = vec![];
    for document in documents() {
        for target in links(&document) {
            count += 1;
            problems.extend(problem(&document, &target).map(|why| format!("{}: {why}", name(&document))));
        }
    }
    assert!(count > 50, "only {count} links were found");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn every_chapter_is_in_the_table_of_contents() {
    let contents = repository().join(BOOK).join("SUMMARY.md");
    let listed: BTreeSet<_> = links(&contents).into_iter().collect();
    let missing: Vec<_> = chapters()
        .into_iter()
        .filter(|chapter| *chapter != contents)
        .map(|chapter| chapter.strip_prefix(repository().join(BOOK)).unwrap().display().to_string())
        .filter(|chapter| !listed.contains(chapter))
        .collect();
    assert!(missing.is_empty(), "not in {}: {missing:?}", name(&contents));
}

#[test]
fn every_test_named_in_the_architecture_exists() {
    let prose = prose(&repository().join("ARCHITECTURE.md"));
    let section = prose.split("\n## ").find(|section| section.starts_with("Invariants")).expect("a section Invariants");
    let (_, code) = split_code(section);
    let named: Vec<_> = code.into_iter().filter(|code| code.contains("::")).collect();
    assert!(named.len() >= 8, "each invariant names a test: {named:?}");
    let tests = tests();
    let missing: Vec<_> =
        named.into_iter().filter(|path| !tests.contains(path.rsplit("::").next().unwrap_or_default())).collect();
    assert!(missing.is_empty(), "no such tests: {missing:#?}");
}

/// A path without an extension names a module: a folder, or a file with `.rs`.
#[test]
fn every_path_named_in_a_guide_exists() {
    let folders = ["src/", "tests/", "charts/", "docs/", "examples/"];
    let mut missing = vec![];
    for guide in GUIDES {
        let prose = prose(&repository().join(guide));
        let (_, code) = split_code(&prose);
        let is_path = |code: &&str| folders.iter().any(|folder| code.starts_with(folder)) && !code.contains([' ', '*']);
        for path in code.into_iter().filter(is_path) {
            let exact = repository().join(path);
            if !exact.exists() && !repository().join(format!("{path}.rs")).exists() {
                missing.push(format!("{guide}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "no such files: {missing:#?}");
}

#[test]
fn every_heading_of_the_specification_named_in_a_comment_exists() {
    let chapter = format!("{BOOK}/{REFERENCED}");
    let existing = anchors(&repository().join(&chapter));
    let mut missing = vec![];
    for path in files("src").into_iter().chain(files("tests")).filter(|path| has_extension(path, "rs")) {
        let text = text(&path);
        for (at, reference) in text.match_indices(&chapter) {
            let headings = headings_after(&text[at + reference.len()..]);
            let unknown = headings.into_iter().filter(|heading| !existing.contains(&anchor(heading)));
            missing.extend(unknown.map(|heading| format!("{}: {heading}", name(&path))));
        }
    }
    assert!(missing.is_empty(), "no such headings in {chapter}: {missing:#?}");
}
