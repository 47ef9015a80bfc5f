//! Rules for all examples, including those of proxies that the tests do not run.

use std::collections::BTreeSet;
use std::path::PathBuf;

use keywright::domain::requirement::Requirement;

use super::*;
use crate::support::repository;

/// Each folder with the texts of its files.
fn folders() -> Vec<(String, Vec<(PathBuf, String)>)> {
    let read = |folder: &PathBuf| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let folders = read(&repository().join("examples/gateways")).filter(|path| path.is_dir());
    let folders = folders.map(|folder| {
        let files = read(&folder).map(|file| (file.clone(), std::fs::read_to_string(&file).unwrap()));
        (folder.file_name().unwrap().to_string_lossy().into_owned(), files.collect())
    });
    let folders: Vec<_> = folders.collect();
    assert_eq!(folders.len(), 7);
    folders
}

/// Each occurrence of `start` in a text, up to the next space, quote or semicolon.
fn occurrences<'a>(text: &'a str, start: &'a str) -> impl Iterator<Item = &'a str> {
    let ends = |c: char| c.is_whitespace() || c == '"' || c == ';';
    text.match_indices(start).filter_map(move |(at, _)| text[at..].split(ends).next())
}

#[test]
fn every_example_has_all_routes_and_identity_headers_and_fails_closed() {
    for (folder, files) in folders() {
        let text: String = files.iter().map(|(_, text)| text.to_lowercase()).collect();
        for name in IDENTITY {
            let name = name.to_lowercase();
            let (by_name, by_prefix) = (text.contains(&name), text.contains("prefix: x-keywright-"));
            assert!(by_name || by_prefix || text.contains("value: x-keywright-"), "{folder}: {name}");
        }
        for part in ["alerts-map:read", "logs.data-ingress:senddata", "/public/", "authorization", "x-api-key", "tls"] {
            assert!(text.contains(part) || folder == "ingress-nginx" && part == "tls", "{folder}: {part}");
        }
        for open in
            ["failopen: true", "failure_mode_allow: true", "insecureskipverify", "skip_verify", "ssl_verify off"]
        {
            assert!(!text.contains(open), "{folder}: {open}");
        }
    }
}

#[test]
fn every_requirement_is_valid_and_names_permissions_of_the_catalog() {
    let catalog = std::fs::read_to_string(repository().join("charts/keywright/files/coralogix.yaml")).unwrap();
    let mut found = BTreeSet::new();
    for (folder, files) in folders() {
        for (file, text) in &files {
            for segment in occurrences(text, "permission=") {
                // Punctuation after a requirement in a comment or a shell command.
                let segment = segment.trim_end_matches([',', '.', ')', ':']);
                let requirement = Requirement::of_segment(segment, None);
                let requirement = requirement.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
                for name in requirement.permissions().filter(|name| *name != "no-requirement:Forgotten") {
                    assert!(catalog.contains(&format!("{{name: {name},")), "{}: {name}", file.display());
                }
                assert!(requirement.accepts(SHOP), "{}: {segment}", file.display());
                found.insert((folder.clone(), segment.to_owned()));
            }
        }
    }
    for folder in ["caddy", "envoy", "envoy-gateway", "ingress-nginx", "istio", "nginx", "traefik"] {
        for segment in
            ["permission=alerts-map:Read", "permission=logs.data-ingress:SendData&team=shop", "permission=none"]
        {
            assert!(found.contains(&(folder.to_owned(), segment.to_owned())), "{folder} has no {segment}");
        }
    }
}

#[test]
fn yaml_files_are_valid_yaml_with_and_without_tls() {
    let mut documents = 0;
    for (_, files) in folders() {
        for (file, text) in files.iter().filter(|(file, _)| file.extension().is_some_and(|e| e == "yaml")) {
            for text in [text.clone(), crate::support::gateways::with_tls(text)] {
                let read: Result<Vec<Value>, _> = serde_saphyr::from_multiple(&text);
                documents += read.unwrap_or_else(|error| panic!("{}: {error}", file.display())).len();
            }
        }
    }
    assert!(documents > 50, "{documents}");
}
