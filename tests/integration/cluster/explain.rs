//! The output of `kubectl explain` and `kubectl get`.

use serde_json::{Value, json};

use super::{Team, api_key};

const KINDS: [&str; 5] = ["accesspolicies", "apikeys", "keyreveals", "permissioncatalogs", "securitysettings"];

/// Calls `visit` with the path of each schema in a CRD and the schema.
fn walk(path: &str, schema: &Value, visit: &mut impl FnMut(&str, &Value)) {
    visit(path, schema);
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        walk(&format!("{path}.{name}"), below, visit);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            walk(&format!("{path}[]"), &schema[inner], visit);
        }
    }
}

#[tokio::test]
async fn every_field_has_a_description_and_no_default() {
    let team = Team::new().await;
    let mut fields = 0;
    for kind in KINDS {
        let crd = team.get(&format!("crd/{kind}.keywright.dev"));
        for version in crd["spec"]["versions"].as_array().unwrap() {
            walk(kind, &version["schema"]["openAPIV3Schema"], &mut |path, schema| {
                assert!(
                    schema.get("default").is_none(),
                    "{path} has a default: Argo CD would show a permanent difference"
                );
                let preserves = schema.get("x-kubernetes-preserve-unknown-fields");
                assert!(preserves.is_none(), "{path} preserves unknown fields: typos would be accepted");
                // List items need no description of their own; Kubernetes describes metadata.
                if path.ends_with("[]") || path.ends_with(".metadata") {
                    return;
                }
                fields += 1;
                let text = schema["description"].as_str().unwrap_or_default();
                assert!(text.len() > 5 && text.ends_with('.'), "{path}: {text:?}");
                assert!(!text.contains('`') && !text.contains("[`"), "{path}: markup in {text:?}");
            });
        }
        let explained = team.kubectl(&["explain", kind, "--recursive"]);
        assert!(explained.contains("GROUP:      keywright.dev"), "{explained}");
        assert!(explained.contains("spec\t<Object>"), "{explained}");
    }
    assert!(fields > 100, "{fields}");
}

#[tokio::test]
async fn kubectl_explain_describes_the_format_and_default_of_fields() {
    let team = Team::new().await;
    let mut wrong = vec![];
    for (field, text) in [
        ("apikey", "Keywright mints its value once, writes it to a Secret"),
        ("ak.spec.expiresAt", "2027-06-01T00:00:00Z"),
        ("apikey.spec.rotation.overlap", "0s revokes it at once"),
        ("apikey.spec.secret.name", "Absent means the ApiKey's name"),
        ("apikey.status.state", "and also of a Lost one, since clients may still have them"),
        ("permissioncatalog.spec.presets.evidence", "The evidence for the list of permissions"),
        ("permissioncatalog.spec.permissions.rolesEvidence", "The evidence for the roles that hold the permission"),
        ("accesspolicy.spec.generalAccess", "for every user that no rule covers"),
        ("accesspolicy.spec.rules.policyAccess", "Absent means the same as access"),
        ("securitysettings.spec.workloadSecrets", "Absent means Deny"),
        ("accesspolicy", "in addition to the role-based rights that they need anyway"),
        ("accesspolicy.status.lockedOut", "An asterisk stands for every user that no rule covers"),
        ("securitysettings", "limits for keys"),
        ("keyreveal.spec.recipient", "an age recipient (age1...) or an SSH public key"),
        ("apikey.spec.legacy", "which is read and never written"),
    ] {
        // kubectl wraps lines.
        let explained = team.kubectl(&["explain", field]).split_whitespace().collect::<Vec<_>>().join(" ");
        if !explained.contains(text) {
            wrong.push(format!("{field}: no {text:?} in {explained}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let types = team.kubectl(&["explain", "apikey.spec.type"]);
    for word in ["ENUM:", "Personal", "SendYourData", "Team"] {
        assert!(types.contains(word), "{types}");
    }
}

/// Returns the column names of a table and the cells of the row of that object.
fn table(text: &str, name: &str) -> (Vec<String>, Vec<String>) {
    let header = text.lines().next().unwrap();
    // kubectl separates columns by at least three spaces; column names contain single spaces.
    let starts: Vec<usize> = (0..header.len())
        .filter(|at| !header[*at..].starts_with(' ') && (*at == 0 || header[..*at].ends_with("   ")))
        .collect();
    let row = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {text}"));
    let row: Vec<char> = row.chars().collect();
    let cell = |line: &[char], n: usize| -> String {
        let end = starts.get(n + 1).copied().unwrap_or(usize::MAX).min(line.len());
        line[starts[n].min(end)..end].iter().collect::<String>().trim().to_owned()
    };
    let header: Vec<char> = header.chars().collect();
    (0..starts.len()).map(|n| (cell(&header, n), cell(&row, n))).unzip()
}

#[tokio::test]
async fn kubectl_get_shows_columns_categories_short_names_and_field_selectors() {
    let team = Team::new().await;
    let namespace = &team.namespace;
    let spec = json!({
        "displayName": "Shown", "type": "SendYourData", "presets": ["SendData"],
        "expiresAt": "2099-06-01T00:00:00Z", "rotation": {"every": "720h"},
    });
    team.apply(&api_key("shown", &spec));
    team.apply(&api_key("bob", &json!({"type": "Personal", "user": "bob", "presets": ["Alerts"], "active": false})));
    let key = team.wait_until_condition("apikey/shown", "Ready", "True", "Active").await;
    team.wait_until_condition("apikey/bob", "Ready", "True", "Inactive").await;

    let (header, row) = table(&team.kubectl(&["get", "ak"]), "shown");
    assert_eq!(header, ["NAME", "DISPLAY NAME", "TYPE", "CREATOR", "STATE", "READY", "AGE"]);
    assert_eq!(row[..6], ["shown", "Shown", "SendYourData", "admin", "Active", "True"]);

    let (header, row) = table(&team.kubectl(&["get", "apikeys", "-o", "wide"]), "shown");
    let wide = ["EXPIRES", "LAST USED", "CREATOR TYPE", "NEXT ROTATION", "SECRET", "ID", "REASON"];
    assert_eq!(header[7..], wide);
    let status = &key["status"];
    let [next, id] = ["nextRotationAt", "id"].map(|field| status[field].as_str().unwrap());
    assert_eq!(row[7..], ["2099-06-01T00:00:00Z", "", "User", next, "shown-secret", id, "Active"]);
    assert!(next > "2026" && id.starts_with("key_") && id.len() == 20, "{next} {id}");

    // The category `keywright` contains all kinds.
    let all = team.kubectl(&["get", "keywright", "-o", "name"]);
    assert!(all.contains("apikey.keywright.dev/shown"), "{all}");
    assert!(all.contains("permissioncatalog.keywright.dev/coralogix"), "{all}");
    let resources =
        team.kubectl(&["api-resources", "--api-group=keywright.dev", "--categories=keywright", "--no-headers"]);
    let resources: Vec<Vec<&str>> = resources.lines().map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<_> = resources.iter().map(|line| (line[0], line[1], line[3])).collect();
    assert_eq!(
        names,
        [
            ("accesspolicies", "akp", "true"),
            ("apikeys", "ak", "true"),
            ("keyreveals", "akr", "true"),
            ("permissioncatalogs", "akcat", "false"),
            ("securitysettings", "akss", "true"),
        ]
    );

    for (selector, expected) in [
        ("spec.type=SendYourData".to_owned(), "apikey.keywright.dev/shown\n"),
        ("spec.type=Personal".to_owned(), "apikey.keywright.dev/bob\n"),
        ("spec.user=bob".to_owned(), "apikey.keywright.dev/bob\n"),
        ("status.state=Active".to_owned(), "apikey.keywright.dev/shown\n"),
        ("status.state!=Active".to_owned(), "apikey.keywright.dev/bob\n"),
        (format!("status.id={id}"), "apikey.keywright.dev/shown\n"),
        (format!("status.id={id},spec.type=Personal"), ""),
    ] {
        assert_eq!(team.kubectl(&["get", "ak", "-o", "name", "--field-selector", &selector]), expected, "{selector}");
    }
    let refused = team.try_kubectl(&["get", "ak", "--field-selector", "spec.displayName=Shown"]).unwrap_err();
    assert!(format!("{refused:#}").contains("field label not supported"), "{refused:#} in {namespace}");

    let (header, row) = table(&team.kubectl(&["get", "akcat"]), "coralogix");
    assert_eq!(header, ["NAME", "PERMISSIONS", "PRESETS", "ACCEPTED", "AGE"]);
    assert_eq!(row[..4], ["coralogix", "301", "38", "True"]);
    for (kind, columns) in [
        ("accesspolicies", &["Mode", "General Access", "Keys", "Accepted", "Age"][..]),
        ("securitysettings", &["One-Time Reveal", "Age"]),
    ] {
        let crd = team.get(&format!("crd/{kind}.keywright.dev"));
        let shown = crd["spec"]["versions"][0]["additionalPrinterColumns"].as_array().unwrap();
        assert_eq!(shown.iter().map(|column| &column["name"]).collect::<Vec<_>>(), columns, "{kind}");
    }
}

/// kubectl uses strict field validation: unknown fields are errors.
#[tokio::test]
async fn an_unknown_field_is_rejected_and_a_valid_object_causes_no_warning() {
    let team = Team::new().await;
    let object = api_key("typo", &json!({"type": "Team", "presets": ["Alerts"], "expireAt": "2099-01-01T00:00:00Z"}));
    let refused = team.apply_error(&object);
    assert!(refused.contains(r#"unknown field "spec.expireAt""#), "{refused}");

    let file = team.file(&api_key("quiet", &json!({"type": "SendYourData", "presets": ["SendData"]})));
    let mut apply = team.shared.plane.kubectl();
    apply.args(["-n", &team.namespace, "apply", "-f", &file, "--validate=strict"]);
    let output = apply.output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "a valid object causes no warning");

    for kind in KINDS {
        let crd = team.get(&format!("crd/{kind}.keywright.dev"));
        let conditions = crd["status"]["conditions"].as_array().unwrap();
        let failed = conditions.iter().find(|c| {
            matches!(c["type"].as_str(), Some("NonStructuralSchema" | "KubernetesAPIApprovalPolicyConformant"))
                && c["status"] != "False"
        });
        assert!(failed.is_none(), "{kind}: {failed:?}");
    }
}
