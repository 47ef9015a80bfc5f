//! The rules of the house that no compiler holds: who may use what, who may write, what is generated.
//!
//! Code is read as text, without comments and without unit tests (`#[cfg(test)]` is the end of a file here).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use keywright::api;
use serde_json::Value;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.map(|entry| entry.unwrap().path()) {
        // What Cargo and git keep for themselves; the folder with this tag is Cargo's, whatever its name.
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

/// What is compiled into the program, by path below `src/`: no comments, no unit tests.
fn program(folder: &str) -> BTreeMap<String, String> {
    let files = files(&format!("src/{folder}")).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let code = files.map(|path| {
        let text = text(&path);
        // A file of tests alone begins with the inner attribute.
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

/// Whether `word` is in `code` and is not part of a longer name.
fn has_word(code: &str, word: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part_of_name) && !code[at + word.len()..].starts_with(part_of_name))
}

/// The names that follow `crate::` in `code`, also those in braces.
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
fn siblings_are_found_in_all_spellings() {
    let code = "use crate::api;\nuse crate::{\n    domain::{catalog::{A, B}, status},\n    index::Index,\n};\ncrate::certs::x()";
    assert_eq!(Vec::from_iter(siblings(code)), ["api", "certs", "domain", "index"]);
    assert!(has_word("use kube::Api;", "kube") && !has_word("kubelet, my_kube", "kube"));
}

#[test]
fn the_domain_is_pure() {
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
            assert!(!has_word(&code, name), "src/{file} uses {name}: rules are pure");
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
            assert!(!code.contains(effect), "src/{file} uses {effect}: what a rule needs is passed in");
        }
    }
}

/// Data goes one way, and so do imports.
#[test]
fn modules_use_only_what_is_below_them() {
    let allowed: [(&str, &[&str]); 10] = [
        ("api", &["api"]),
        ("domain", &["api", "domain"]),
        ("index", &["api", "domain", "index"]),
        ("access", &["access", "api", "domain"]),
        ("certs", &["certs"]),
        ("sealing", &["domain", "sealing"]),
        ("cli", &["access", "api", "cli", "domain", "runtime"]),
        ("admission", &["access", "admission", "api", "domain", "index", "runtime"]),
        ("verify", &["api", "domain", "index", "runtime", "verify"]),
        ("controller", &["access", "api", "controller", "domain", "index", "runtime", "sealing"]),
    ];
    for (module, below) in allowed {
        for (file, code) in program(module) {
            let above: Vec<_> = siblings(&code).into_iter().filter(|name| !below.contains(&name.as_str())).collect();
            assert!(above.is_empty(), "src/{file} uses {above:?}, which {module} must not know");
        }
    }
    // Of the runtime, only what has no effect on the cluster.
    for (file, code) in
        program("admission").into_iter().chain(program("controller")).chain(program("cli")).chain(program("verify"))
    {
        for wiring in ["runtime::operator", "runtime::verifier", "runtime::lease", "runtime::health", "runtime::args"] {
            assert!(!code.contains(wiring), "src/{file} uses {wiring}");
        }
    }
}

/// Each write through kube takes one of these.
const WRITES: [&str; 8] =
    ["PostParams", "PatchParams", "DeleteParams", "EvictParams", "Recorder", "commit", "patch_params", "post_params"];

#[test]
fn only_act_report_certs_sealing_and_the_lease_write() {
    let writers: BTreeSet<String> = program("")
        .into_iter()
        .filter(|(_, code)| WRITES.iter().any(|write| has_word(code, write)))
        .map(|(file, _)| file)
        .collect();
    let expected = [
        "access/mod.rs",                    // SubjectAccessReviews, which are questions
        "certs/issued.rs",                  // the verifier's certificate, in its own Secret, and the CA for its clients
        "certs/mod.rs",                     // as whom the three others here write
        "certs/self_managed.rs",            // the CA, in its own Secret
        "certs/webhooks.rs",                // the caBundle
        "cli/accept.rs",                    // an annotation of an ApiKey, as the person who runs the plugin
        "cli/change.rs",                    // ApiKeys, likewise
        "cli/reveal.rs",                    // KeyReveals, likewise
        "cli/rights.rs",                    // SelfSubjectAccessReviews, which are questions
        "controller/access_policy.rs",      // report: the status
        "controller/api_key/act.rs",        // Secrets of keys
        "controller/api_key/mod.rs",        // report: the status
        "controller/events.rs",             // report: Events
        "controller/export.rs",             // report: digests, for gateways
        "controller/key_reveal/act.rs",     // Secrets of keys: who saw the value
        "controller/key_reveal/mod.rs",     // report: the status; the end of a request
        "controller/mod.rs",                // the name under which they write
        "controller/permission_catalog.rs", // the shipped catalogue; report: the status
        "runtime/lease.rs",                 // the election
        "sealing/keeper.rs",                // the sealing keys, in their own Secret
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
            // A notice to another replica, which is no write.
            let is_notice = file == "runtime/news.rs" && raw == "Request::post";
            assert!(is_notice || !code.contains(raw), "src/{file}: {raw} is a write past kube's Api");
        }
    }
}

/// Nobody but the code that writes Secrets can name one, and nobody lists or watches them.
#[test]
fn secrets_are_touched_in_nine_files_and_never_listed() {
    let secret = |code: &str| has_word(code, "Api<Secret>") || has_word(code, "Secret") && code.contains("core::v1::");
    let files: Vec<_> = program("").into_iter().filter(|(_, code)| secret(code)).collect();
    let names: Vec<_> = files.iter().map(|(file, _)| file.as_str()).collect();
    let expected = [
        "certs/issued.rs", // the verifier's alone, by its one name
        "certs/self_managed.rs",
        "cli/accept.rs", // reads alone, by name, as the person who runs the plugin
        "controller/api_key/act.rs",
        "controller/api_key/legacy.rs", // reads alone: it is not among those that write
        "controller/api_key/observe.rs",
        "controller/export.rs", // digests, for gateways that read Secrets only
        "controller/key_reveal/act.rs",
        "sealing/keeper.rs",
    ];
    assert_eq!(names, expected);
    for (file, code) in files.iter().filter(|(file, _)| !file.starts_with("certs")) {
        for listing in [".list(", "list_metadata", "watcher(", "watch(", "Api::<Secret>::all", "Api::all"] {
            assert!(!code.contains(listing), "src/{file}: {listing}");
        }
    }
}

#[test]
fn the_time_and_the_random_source_are_read_where_they_should_be() {
    for (file, code) in program("") {
        for clock in ["Timestamp::now", "SystemTime::now", "Zoned::now", "Utc::now"] {
            assert!(file == "runtime/clock.rs" || !code.contains(clock), "src/{file}: {clock}: take a Clock");
        }
        let excepted = code.contains("clippy::disallowed_methods");
        assert!(file == "runtime/clock.rs" || !excepted, "src/{file} excepts itself from a rule of .clippy.toml");
        // The first makes the one-off key of a reveal, the second the values, the last two the keys that seal and authenticate; the
        // others spread attempts, and looks at Secrets, over time.
        let makers = [
            "cli/reveal.rs",
            "controller/api_key/act.rs",
            "controller/api_key/mod.rs",
            "controller/backoff.rs",
            "sealing/mod.rs",
            "sealing/record_key.rs",
        ];
        let may = makers.contains(&file.as_str());
        let random =
            ["SysRng", "OsRng", "getrandom", "Identity::generate"].iter().any(|source| has_word(&code, source));
        assert!(may || !random, "src/{file} makes random values of its own");
    }
    let rules = text(&repository().join(".clippy.toml"));
    for method in ["jiff::Timestamp::now", "std::time::SystemTime::now"] {
        assert!(rules.contains(method), "clippy no longer forbids {method}");
    }
    assert!(program("runtime")["runtime/clock.rs"].contains("Timestamp::now"), "the clock reads the time elsewhere");
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

/// S8: a default would be a permanent difference between Git and the cluster.
#[test]
fn no_field_has_a_default() {
    for crd in api::crds() {
        let yaml = serde_json::to_string(&crd).unwrap();
        assert!(!yaml.contains("\"default\":"), "{}", crd.metadata.name.unwrap());
    }
}

#[test]
fn the_crds_in_the_repository_are_those_of_the_code() {
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
            assert!(here == fresh, "{} is not what the code says: run `make generate`", copies.join(name).display());
            printed.insert(fresh.split_once('\n').unwrap().1.to_owned());
        }
    }
    let stdout = keywright(&["crds"]);
    let documents: BTreeSet<_> = stdout.split("---\n").filter(|part| !part.is_empty()).map(ToOwned::to_owned).collect();
    assert_eq!(documents, printed, "`keywright crds` prints the same");
}

#[test]
fn the_chart_is_of_the_version_of_the_program() {
    let chart = text(&repository().join("charts/keywright/Chart.yaml"));
    let field = |name: &str| {
        let line = chart.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).expect(name);
        line.trim_matches('"').to_owned()
    };
    assert_eq!(field("appVersion"), env!("CARGO_PKG_VERSION"));
    assert_eq!(field("version"), env!("CARGO_PKG_VERSION"));
}

#[test]
fn no_file_depends_on_one_machine_or_one_registry() {
    // Put together, so that this file passes too.
    let hosts = ["docker", "ghcr", "quay", "gcr", "azurecr"].map(|name| format!("{name}.io"));
    let hosts = hosts.into_iter().chain(["registry.", "index.", "public.ecr."].map(|name| format!("://{name}")));
    let paths = ["root", "home", "Users"].map(|name| format!("/{name}/")).into_iter();
    let here = format!("{}/", repository().display());
    let forbidden: Vec<String> = hosts.chain(paths).chain([here]).collect();
    let mut read = 0;
    for path in files("") {
        // What is not text has no such thing that a person would read.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        read += 1;
        for (number, line) in text.lines().enumerate() {
            for word in &forbidden {
                let found = line.match_indices(word.as_str()).any(|(at, _)| {
                    // A path is absolute if no folder is before it.
                    !word.starts_with('/')
                        || !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$".contains(c))
                });
                assert!(!found, "{}:{}: {word} in {line:?}", path.display(), number + 1);
            }
        }
    }
    assert!(read > 60, "{read}");
}

/// As soon as there is a manual, each reason that people meet in conditions and refusals is in it.
#[test]
fn every_reason_of_a_refusal_is_in_the_manual() {
    let manual: String =
        files("").iter().filter(|path| path.extension().is_some_and(|e| e == "md")).map(|path| text(path)).collect();
    let code = &program("domain")["domain/validate.rs"];
    let reasons: Vec<_> =
        code.lines().filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \"")).collect();
    assert!(reasons.len() >= 12, "{reasons:?}");
    let reasons: Vec<_> = reasons.into_iter().map(|(rule, reason)| (rule, reason.trim_end_matches("\","))).collect();
    assert!(reasons.iter().all(|(rule, reason)| rule == reason), "the reason is the rule's name: {reasons:?}");
    let missing: Vec<_> = reasons.iter().filter(|(_, reason)| !has_word(&manual, reason)).collect();
    assert!(manual.is_empty() || missing.is_empty(), "in no .md file: {missing:?}");
}
