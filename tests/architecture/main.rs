//! Rules that the compiler does not check: imports between modules, writes to the cluster, generated files.
//!
//! Code is read as text, without comments and unit tests: a file is read up to `#[cfg(test)]`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

mod documents;

use keywright::api;
use serde_json::Value;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.map(|entry| entry.unwrap().path()) {
        // Skip the folders of git and Cargo. .rustc_info.json marks a target folder of any name.
        if path.file_name().is_some_and(|name| name == ".git") || path.join(".rustc_info.json").exists() {
            continue;
        }
        if path.is_dir() { walk(&path, found) } else { found.push(path) }
    }
}

fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    walk(&repository().join(folder), &mut found);
    found.sort();
    found
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The code without comments and unit tests, by path below `src/`.
fn program(folder: &str) -> BTreeMap<String, String> {
    let files = files(&format!("src/{folder}")).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let code = files.map(|path| {
        let text = text(&path);
        // A file that contains only tests begins with the inner attribute.
        let tests = ["#![cfg(test)]", "#[cfg(test)]"];
        let code = tests.iter().fold(&*text, |code, start| code.split(start).next().unwrap());
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let name = path.strip_prefix(repository().join("src")).unwrap().to_str().unwrap().to_owned();
        (name, lines.collect::<Vec<_>>().join("\n"))
    });
    let code: BTreeMap<_, _> = code.collect();
    assert!(!code.is_empty(), "src/{folder} is empty");
    code
}

/// Whether `code` contains `word`, not as part of a longer name.
fn has_word(code: &str, word: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part_of_name) && !code[at + word.len()..].starts_with(part_of_name))
}

/// The names that follow `crate::` in `code`, including names in braces.
fn siblings(code: &str) -> BTreeSet<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for (_, rest) in code.match_indices("crate::").map(|(at, part)| (at, &code[at + part.len()..])) {
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        let mut depth = 1;
        let mut item = String::new();
        for letter in group.chars() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || depth == 1 && letter == ',' {
                found.insert(name(item.trim()));
                item.clear();
            } else {
                item.push(letter);
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.remove("");
    found
}

#[test]
fn siblings_finds_paths_and_nested_groups() {
    let code = "use crate::api;\nuse crate::{\n    domain::{catalog::{A, B}, status},\n    index::Index,\n};\ncrate::certs::x()";
    assert_eq!(Vec::from_iter(siblings(code)), ["api", "certs", "domain", "index"]);
    assert!(has_word("use kube::Api;", "kube") && !has_word("kubelet, my_kube", "kube"));
}

#[test]
fn domain_uses_no_client_runtime_clock_or_random_source() {
    for (file, code) in program("domain") {
        let outside = [
            "kube",
            "k8s_openapi",
            "tokio",
            "futures",
            "axum",
            "hyper",
            "rustls",
            "tracing",
            "clap",
            "async",
            "unsafe",
        ];
        for name in outside {
            assert!(!has_word(&code, name), "src/{file} uses {name}, but domain must be pure");
        }
        for effect in [
            "std::env",
            "std::fs",
            "std::net",
            "std::process",
            "Instant",
            "SystemTime",
            "::now()",
            "SysRng",
            "rand::rng",
            "thread_rng",
        ] {
            assert!(!code.contains(effect), "src/{file} uses {effect}: pass the data as an argument");
        }
    }
}

/// Imports have one direction, so that there is no cycle between the folders of `src`.
#[test]
fn modules_import_only_lower_modules() {
    let allowed: [(&str, &[&str]); 14] = [
        ("api", &[]),
        ("clock", &[]),
        ("net", &[]),
        ("certs", &[]),
        ("domain", &["api"]),
        ("telemetry", &["api", "clock"]),
        ("index", &["api", "domain"]),
        ("access", &["api", "domain"]),
        ("sealing", &["domain"]),
        ("cli", &["access", "api", "clock", "domain"]),
        ("verify", &["api", "clock", "domain", "index", "net", "telemetry"]),
        ("admission", &["access", "api", "clock", "domain", "index", "net", "telemetry"]),
        ("controller", &["access", "api", "clock", "domain", "index", "sealing", "telemetry"]),
        (
            "runtime",
            &[
                "access",
                "admission",
                "api",
                "certs",
                "clock",
                "controller",
                "domain",
                "index",
                "net",
                "sealing",
                "telemetry",
                "verify",
            ],
        ),
    ];
    let lower: BTreeMap<&str, &[&str]> = allowed.into();
    for (file, code) in program("") {
        let module = file.split(['/', '.']).next().unwrap();
        if ["bin", "lib", "test_support"].contains(&module) {
            continue;
        }
        let lower =
            lower.get(module).unwrap_or_else(|| panic!("src/{file} is of a module that this test does not list"));
        let not_lower: Vec<_> =
            siblings(&code).into_iter().filter(|name| name != module && !lower.contains(&name.as_str())).collect();
        assert!(not_lower.is_empty(), "src/{file} imports {not_lower:?}, which {module} must not import");
    }
    // Each module of the list imports only modules that precede it, so the list is an order without a cycle.
    for (number, (module, lower)) in allowed.iter().enumerate() {
        let before: Vec<_> = allowed[..number].iter().map(|(name, _)| name).collect();
        assert!(lower.iter().all(|name| before.contains(&name)), "{module} imports a module that follows it");
    }
}

/// The first and the last line of each function of `code`, by the indentation that rustfmt makes, with its name.
fn functions(code: &str) -> Vec<(String, usize)> {
    let lines: Vec<_> = code.lines().collect();
    let name = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("pub ").or_else(|| line.split_once(") ").map(|(_, rest)| rest)).unwrap_or(line);
        let line = ["const ", "async "].iter().fold(line, |line, word| line.strip_prefix(word).unwrap_or(line));
        line.strip_prefix("fn ").and_then(|rest| rest.split(['(', '<']).next()).map(str::to_owned)
    };
    let mut found = vec![];
    for (first, line) in lines.iter().enumerate() {
        let Some(name) = name(line).filter(|_| !line.ends_with(['}', ';'])) else { continue };
        let end = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        let length = lines[first..].iter().position(|line| *line == end).map_or(1, |last| last + 1);
        found.push((name, length));
    }
    found
}

#[test]
fn no_function_is_longer_than_80_lines() {
    let mut seen = 0;
    for (file, code) in program("") {
        for (name, length) in functions(&code) {
            seen += 1;
            assert!(length <= 80, "src/{file}: {name} has {length} lines: split it");
        }
    }
    assert!(seen > 500, "{seen}");
}

#[test]
fn no_two_types_share_a_name() {
    let mut types = BTreeMap::<String, String>::new();
    for (file, code) in program("") {
        for line in code.lines() {
            let line = line.strip_prefix("pub ").or_else(|| line.strip_prefix("pub(super) ")).unwrap_or(line);
            let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
            let kinds = ["struct ", "enum ", "trait ", "type "];
            let Some(rest) = kinds.iter().find_map(|kind| line.strip_prefix(kind)) else { continue };
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric()).collect();
            let before = types.insert(name.clone(), file.clone());
            assert!(before.is_none(), "src/{file} and src/{} define {name}", before.unwrap());
        }
    }
    assert!(types.len() > 200, "{}", types.len());
}

/// Each write through kube needs one of these names.
const WRITES: [&str; 8] =
    ["PostParams", "PatchParams", "DeleteParams", "EvictParams", "Recorder", "commit", "patch_params", "post_params"];

#[test]
fn only_listed_files_write_to_the_cluster() {
    let writers: BTreeSet<String> = program("")
        .into_iter()
        .filter(|(_, code)| WRITES.iter().any(|write| has_word(code, write)))
        .map(|(file, _)| file)
        .collect();
    let expected = [
        "access/mod.rs",                    // SubjectAccessReviews, which store nothing
        "certs/issued.rs",                  // the verifier's certificate, in its own Secret, and the CA for its clients
        "certs/mod.rs",                     // the field manager of the writes of certs
        "certs/self_managed.rs",            // the CA, in its own Secret
        "certs/webhooks.rs",                // the caBundle
        "cli/accept.rs",                    // an annotation of an ApiKey, as the user of the plugin
        "cli/change.rs",                    // ApiKeys, likewise
        "cli/reveal.rs",                    // KeyReveals, likewise
        "cli/rights.rs",                    // SelfSubjectAccessReviews, which store nothing
        "controller/access_policy.rs",      // report: the status
        "controller/api_key/act.rs",        // Secrets of keys
        "controller/api_key/report.rs",     // report: the status
        "controller/events.rs",             // report: Events
        "controller/export.rs",             // report: digests, for gateways
        "controller/key_reveal/act.rs",     // Secrets of keys: the first reader of a value
        "controller/key_reveal/mod.rs",     // report: the status; deletion of expired KeyReveals
        "controller/mod.rs",                // the field manager
        "controller/permission_catalog.rs", // the shipped catalogs; report: the status
        "runtime/lease/mod.rs",             // the election
        "sealing/key_store.rs",             // the sealing keys, in their own Secret
        "verify/last_used.rs",              // report: when keys were used
    ];
    assert_eq!(writers.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    for (file, code) in program("") {
        for raw in [
            "Request::post",
            "Request::put",
            "Request::patch",
            "Request::delete",
            "Method::POST",
            "Method::PUT",
            "Method::PATCH",
            "Method::DELETE",
        ] {
            // A notice to another replica, which does not go to the API server.
            let is_notice = file == "runtime/secret_notices.rs" && raw == "Request::post";
            assert!(is_notice || !code.contains(raw), "src/{file}: {raw}: write through kube's Api");
        }
    }
}

/// Only `certs` lists and watches Secrets: its own, by name.
#[test]
fn only_listed_files_access_secrets_and_none_lists_secrets_of_keys() {
    let secret = |code: &str| has_word(code, "Api<Secret>") || has_word(code, "Secret") && code.contains("core::v1::");
    let files: Vec<_> = program("").into_iter().filter(|(_, code)| secret(code)).collect();
    let names: Vec<_> = files.iter().map(|(file, _)| file.as_str()).collect();
    let expected = [
        "certs/issued.rs", // only the verifier's Secret, by name
        "certs/self_managed.rs",
        "cli/accept.rs", // reads by name, as the user of the plugin
        "controller/api_key/act.rs",
        "controller/api_key/legacy.rs", // reads only
        "controller/api_key/observe/mod.rs",
        "controller/export.rs", // digests, for gateways that read only Secrets
        "controller/key_reveal/act.rs",
        "sealing/key_store.rs",
    ];
    assert_eq!(names, expected);
    for (file, code) in files.iter().filter(|(file, _)| !file.starts_with("certs")) {
        for listing in [".list(", "list_metadata", "watcher(", "watch(", "Api::<Secret>::all", "Api::all"] {
            assert!(!code.contains(listing), "src/{file}: {listing}");
        }
    }
}

#[test]
fn only_listed_files_read_the_time_and_the_random_source() {
    for (file, code) in program("") {
        for clock in ["Timestamp::now", "SystemTime::now", "Zoned::now", "Utc::now"] {
            assert!(file == "clock.rs" || !code.contains(clock), "src/{file}: {clock}: pass a Clock");
        }
        let excepted = code.contains("clippy::disallowed_methods");
        assert!(file == "clock.rs" || !excepted, "src/{file} allows a method that .clippy.toml disallows");
        let listed = [
            "cli/reveal.rs",                        // the temporary key of a reveal
            "controller/api_key/act.rs",            // values
            "controller/api_key/check_schedule.rs", // jitter of the periodic checks
            "controller/backoff.rs",                // jitter of the backoff
            "sealing/mod.rs",                       // sealing keys
            "sealing/record_key.rs",                // the key that authenticates records
        ];
        let may = listed.contains(&file.as_str());
        let random =
            ["SysRng", "OsRng", "getrandom", "Identity::generate"].iter().any(|source| has_word(&code, source));
        assert!(may || !random, "src/{file} reads the random source");
    }
    let rules = text(&repository().join(".clippy.toml"));
    for method in ["jiff::Timestamp::now", "std::time::SystemTime::now"] {
        assert!(rules.contains(method), "clippy no longer forbids {method}");
    }
    assert!(program("")["clock.rs"].contains("Timestamp::now"), "the clock does not read the time");
}

fn fields(path: &str, schema: &Value, visit: &mut impl FnMut(&str, &str)) {
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        visit(path, name);
        fields(&format!("{path}.{name}"), below, visit);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            fields(&format!("{path}[]"), &schema[inner], visit);
        }
    }
}

#[test]
fn no_field_names_another_namespace() {
    let mut seen = 0;
    for crd in api::crds() {
        let crd = serde_json::to_value(crd).unwrap();
        for version in crd["spec"]["versions"].as_array().unwrap() {
            let kind = crd["spec"]["names"]["kind"].as_str().unwrap();
            fields(kind, &version["schema"]["openAPIV3Schema"], &mut |path, name| {
                seen += 1;
                assert!(!name.to_lowercase().contains("namespace"), "{path}.{name}: a team is a namespace");
            });
        }
    }
    assert!(seen > 80, "{seen}");
}

/// S8: a default would cause a permanent difference between Git and the cluster.
#[test]
fn no_field_has_a_default() {
    for crd in api::crds() {
        let yaml = serde_json::to_string(&crd).unwrap();
        assert!(!yaml.contains("\"default\":"), "{}", crd.metadata.name.unwrap());
    }
}

#[test]
fn the_stored_crds_equal_the_generated_ones() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("architecture-crds");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let keywright = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_keywright")).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    keywright(&["crds", "--directory", folder.to_str().unwrap()]);
    let names = |folder: &Path| -> Vec<_> {
        let mut found = vec![];
        walk(folder, &mut found);
        found.sort();
        found.iter().map(|path| path.file_name().unwrap().to_owned()).collect()
    };
    let generated = names(&folder);
    assert_eq!(generated.len(), 5);
    let mut printed = BTreeSet::new();
    for copies in ["crds", "charts/keywright/files/crds"] {
        let copies = repository().join(copies);
        assert_eq!(names(&copies), generated, "{}", copies.display());
        for name in &generated {
            let (here, fresh) = (text(&copies.join(name)), text(&folder.join(name)));
            assert!(
                here == fresh,
                "{} differs from the generated file: run `make generate`",
                copies.join(name).display()
            );
            printed.insert(fresh.split_once('\n').unwrap().1.to_owned());
        }
    }
    let stdout = keywright(&["crds"]);
    let documents: BTreeSet<_> = stdout.split("---\n").filter(|part| !part.is_empty()).map(ToOwned::to_owned).collect();
    assert_eq!(documents, printed, "`keywright crds` prints other CRDs than it writes");
}

#[test]
fn the_chart_and_the_crate_have_the_same_version() {
    let chart = text(&repository().join("charts/keywright/Chart.yaml"));
    let field = |name: &str| {
        let line = chart.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).expect(name);
        line.trim_matches('"').to_owned()
    };
    assert_eq!(field("appVersion"), env!("CARGO_PKG_VERSION"));
    assert_eq!(field("version"), env!("CARGO_PKG_VERSION"));
}

#[test]
fn no_file_contains_a_machine_path_or_a_registry_host() {
    // The words are assembled, so that this file passes too.
    let hosts = ["docker", "ghcr", "quay", "gcr", "azurecr"].map(|name| format!("{name}.io"));
    let hosts = hosts.into_iter().chain(["registry.", "index.", "public.ecr."].map(|name| format!("://{name}")));
    let paths = ["root", "home", "Users"].map(|name| format!("/{name}/")).into_iter();
    let here = format!("{}/", repository().display());
    let forbidden: Vec<String> = hosts.chain(paths).chain([here]).collect();
    let mut read = 0;
    for path in files("") {
        // Skip binary files.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        read += 1;
        for (number, line) in text.lines().enumerate() {
            for word in &forbidden {
                let found = line.match_indices(word.as_str()).any(|(at, _)| {
                    // A path is absolute if no folder name precedes it.
                    !word.starts_with('/')
                        || !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$".contains(c))
                });
                assert!(!found, "{}:{}: {word} in {line:?}", path.display(), number + 1);
            }
        }
    }
    assert!(read > 60, "{read}");
}

/// The reasons of rejections and conditions, which users look up.
#[test]
fn every_reason_is_documented() {
    let manual: String =
        files("").iter().filter(|path| path.extension().is_some_and(|e| e == "md")).map(|path| text(path)).collect();
    let code = &program("domain")["domain/validate/mod.rs"];
    let reasons: Vec<_> =
        code.lines().filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \"")).collect();
    assert!(reasons.len() >= 12, "{reasons:?}");
    let reasons: Vec<_> = reasons.into_iter().map(|(rule, reason)| (rule, reason.trim_end_matches("\","))).collect();
    assert!(reasons.iter().all(|(rule, reason)| rule == reason), "a reason differs from its rule: {reasons:?}");
    let missing: Vec<_> = reasons.iter().filter(|(_, reason)| !has_word(&manual, reason)).collect();
    assert!(manual.is_empty() || missing.is_empty(), "in no .md file: {missing:?}");
}
