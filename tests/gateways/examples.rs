//! What holds for all examples, also for those whose proxies do not run here.

use std::collections::BTreeSet;
use std::path::PathBuf;

use keywright::domain::requirement::Requirement;

use crate::support::repository;
use crate::*;

/// Each folder, with what its files say.
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

/// What comes after `start` in a text, wherever it is, up to a space, a quote or a semicolon.
fn after<'a>(text: &'a str, start: &'a str) -> impl Iterator<Item = &'a str> {
    let ends = |c: char| c.is_whitespace() || c == '"' || c == ';';
    text.match_indices(start).filter_map(move |(at, _)| text[at..].split(ends).next())
}

#[test]
fn every_example_has_all_routes_and_all_that_is_said_of_who_it_is() {
    for (folder, files) in folders() {
        let text: String = files.iter().map(|(_, text)| text.to_lowercase()).collect();
        for name in IDENTITY {
            let name = name.to_lowercase();
            let (kept_out, prefix) = (text.contains(&name), text.contains("prefix: x-keywright-"));
            assert!(kept_out || prefix || text.contains("value: x-keywright-"), "{folder}: {name}");
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
fn every_requirement_is_one_that_the_verifier_reads_and_the_catalogue_has() {
    let catalogue = std::fs::read_to_string(repository().join("charts/keywright/files/coralogix.yaml")).unwrap();
    let mut found = BTreeSet::new();
    for (folder, files) in folders() {
        for (file, text) in &files {
            for segment in after(text, "permission=") {
                // Where comments and shell commands speak of them.
                let segment = segment.trim_end_matches([',', '.', ')', ':']);
                let requirement = Requirement::of_segment(segment, None);
                let requirement = requirement.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
                for name in requirement.permissions().filter(|name| *name != "no-requirement:Forgotten") {
                    assert!(catalogue.contains(&format!("{{name: {name},")), "{}: {name}", file.display());
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
fn what_is_yaml_is_yaml_with_tls_and_without() {
    let mut documents = 0;
    for (_, files) in folders() {
        for (file, text) in files.iter().filter(|(file, _)| file.extension().is_some_and(|e| e == "yaml")) {
            for text in [text.clone(), support::gateways::with_tls(text)] {
                let read: Result<Vec<Value>, _> = serde_saphyr::from_multiple(&text);
                documents += read.unwrap_or_else(|error| panic!("{}: {error}", file.display())).len();
            }
        }
    }
    assert!(documents > 50, "{documents}");
}
