//! Attacks of clients: one test for each class of published advisories about other verifiers and proxies.

use super::*;
use crate::support::gateways::values;

/// A client sends identity headers (CVE-2026-30851), also in spellings that CGI, WSGI or PHP treat as equal
/// (CVE-2026-52845).
#[tokio::test]
async fn identity_headers_of_a_client_never_reach_the_application() {
    let edge = edge().await;
    let mut forged = Vec::new();
    for name in IDENTITY {
        forged.extend([name.to_owned(), name.to_lowercase(), name.to_uppercase()]);
        forged.extend([name.replace('-', "_"), name.replace('-', "."), name.replacen('-', "_", 1)]);
        forged.extend([name.replacen("-K", ".K", 1), name.replace('-', "~")]);
    }
    for gateway in &edge.gateways {
        for name in &forged {
            for (path, headers) in [("/alerts/x", &[("X-API-Key", reader().await)][..]), ("/public/x", &[])] {
                let headers = [headers, &[(name, "forged")]].concat();
                let sent = edge.get(gateway, path, &headers).await;
                match &sent.upstream[..] {
                    [] => Edge::assert_rejected(gateway, &sent, &[400], name),
                    [head] => {
                        assert!(!head.contains("forged"), "{:?}: {name}: {head}", gateway.kind);
                        assert!(!head.to_lowercase().contains(&name.to_lowercase().replace('-', "_")), "{head}");
                    }
                    more => panic!("{:?}: {name}: {more:?}", gateway.kind),
                }
            }
            let sent = edge.get(gateway, "/alerts/x", &[(name, "forged")]).await;
            Edge::assert_rejected(gateway, &sent, &[400, 401], name);
        }
        // The same for headers that the verifier does not set.
        for name in ["X_Forwarded_For", "X.Forwarded.For", "X_Api_Key"] {
            let sent = edge.get(gateway, "/public/x", &[(name, "forged")]).await;
            for head in &sent.upstream {
                assert!(!head.contains("forged"), "{:?}: {name}: {head}", gateway.kind);
            }
        }
        // Several at once, before and after the key.
        let headers = [(IDENTITY[4], "forged"), ("X-API-Key", reader().await), (IDENTITY[4], "forged too")];
        let sent = edge.get(gateway, "/alerts/x", &headers).await;
        let head = Edge::assert_passed(gateway, &sent, "forged twice");
        assert!(!head.contains("forged"), "{:?}: {head}", gateway.kind);
    }
}

/// Trailers arrive after the check.
#[tokio::test]
async fn identity_trailers_of_a_client_do_not_become_headers_of_the_application() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        for announced in ["", "Trailer: X-Keywright-User, X-Keywright-Team, X-API-Key\r\n"] {
            for path in ["/alerts/x", "/public/x"] {
                let mark = mark();
                let request = format!(
                    "POST {path} HTTP/1.1\r\nHost: shop.example.com\r\nX-API-Key: {}\r\nX-Mark: {mark}\r\n{announced}\
                     Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n4\r\nbody\r\n0\r\n\
                     X-Keywright-User: forged\r\nX-Keywright-Team: forged\r\n\r\n",
                    reader().await
                );
                let answer = gateway.send(request.as_bytes()).await;
                let sent = Sent { answer, upstream: edge.upstream.seen(&mark) };
                for got in &sent.upstream {
                    // Caddy forwards announced trailers as trailers, and has no option to remove them.
                    let head = if gateway.kind == Kind::Caddy { got.split("\r\n\r\n").next().unwrap() } else { got };
                    assert!(!head.contains("forged"), "{:?}: {announced:?}: {got}", gateway.kind);
                }
                if sent.upstream.is_empty() {
                    Edge::assert_rejected(gateway, &sent, &[400], "trailers");
                }
            }
        }
    }
}

/// The interpretations of a path by applications: decoded once or twice, backslashes as slashes, parameters removed,
/// dots and doubled slashes resolved.
fn interpretations(path: &str) -> Vec<String> {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let decode = |text: &str| {
        let bytes = text.as_bytes();
        let (mut out, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let hex = bytes.get(at + 1..at + 3).and_then(|two| std::str::from_utf8(two).ok());
            if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| bytes[at] == b'%') {
                out.push(byte);
                at += 3;
            } else {
                out.push(bytes[at]);
                at += 1;
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let (once, twice) = (decode(path), decode(&decode(path)));
    let mut found = Vec::new();
    for text in [path.to_owned(), once, twice] {
        for text in [text.replace('\\', "/"), text] {
            let cut = text.split('/').map(|part| part.split(';').next().unwrap_or_default().to_owned());
            let cut = cut.collect::<Vec<_>>().join("/");
            for text in [cut, text] {
                let mut parts: Vec<&str> = Vec::new();
                for part in text.split('/') {
                    match part {
                        "" | "." => {}
                        ".." => drop(parts.pop()),
                        part => parts.push(part),
                    }
                }
                found.extend([format!("/{}", parts.join("/")), text]);
            }
        }
    }
    found
}

/// Proxy and application interpret a path differently, and only one of the interpretations is protected
/// (CVE-2026-33494, CVE-2025-66490, CVE-2026-33186).
#[tokio::test]
async fn no_forwarded_path_has_an_interpretation_that_the_key_may_not_access() {
    let edge = edge().await;
    assert!(interpretations("/public/..;a=b/alerts/x").contains(&"/alerts/x".to_owned()));
    assert!(interpretations("/public/%252e%252e%5Calerts/x").contains(&"/alerts/x".to_owned()));
    // Paths on route `from` that an application may interpret as paths on route `to`.
    let templates = [
        "/{from}/../{to}/x",
        "/{from}/./../{to}/x",
        "/{from}//../../{to}/x",
        "/{from}/x/../../{to}/x",
        "/{from}/%2e%2e/{to}/x",
        "/{from}/%2E./{to}/x",
        "/{from}/..%2f{to}/x",
        "/{from}/..%2F..%2f{to}/x",
        "/{from}%2f..%2f{to}%2fx",
        "/{from}/%252e%252e/{to}/x",
        "/{from}/%252e%252e%252f{to}/x",
        "/{from}/..;/{to}/x",
        "/{from}/..;a=b/{to}/x",
        "/{from}/..%3b/{to}/x",
        "/{from}/..\\{to}\\x",
        "/{from}/..%5c{to}%5Cx",
        "/{from}\\..\\{to}\\x",
        "/{from}/..%00/{to}/x",
        "/{from}/../%00{to}/x",
        "//{to}/x",
        "///{to}//x",
        "/./{to}/x",
        "/;/{to}/x",
        "/;a=b/{to}/x",
        "/{to};a=b/x",
        "/{to}%2fx",
        "/%2f{to}/x",
        "/.//{to}/x",
        "/{from}/../{to}/x?/../{from}/",
        "/{from}/x#/../../{to}/x",
        "http://shop.example.com/{from}/../{to}/x",
        "http://shop.example.com//{to}/x",
    ];
    for gateway in &edge.gateways {
        // Without a key, from the public route; with a key for alerts, to a route that needs another permission.
        for (from, to, headers) in [
            ("public", "alerts", &[][..]),
            ("alerts", "ingest", &[("X-API-Key", reader().await)]),
            ("account", "ingest", &[("X-API-Key", reader().await)]),
        ] {
            for template in templates {
                let path = template.replace("{from}", from).replace("{to}", to);
                let sent = edge.get(gateway, &path, headers).await;
                for head in &sent.upstream {
                    let got = head.split(' ').nth(1).unwrap_or_default();
                    let mut found = interpretations(got).into_iter();
                    let confused = found.find(|interpretation| interpretation.starts_with(&format!("/{to}/")));
                    assert_eq!(confused, None, "{:?}: {path} reached the application as {got}", gateway.kind);
                }
            }
        }
        // An unambiguous path passes, whatever its query contains.
        let path = "/public/a.b/..c/%C3%A4/x?u=/../;%2f%2e//";
        let sent = edge.get(gateway, path, &[]).await;
        let head = Edge::assert_passed(gateway, &sent, path);
        assert!(head.starts_with("GET /public/a.b/..c/"), "{:?}: {head}", gateway.kind);
    }
}

/// A client describes another request in the headers of a proxy (CVE-2026-33495, CVE-2026-40575).
#[tokio::test]
async fn forwarding_headers_of_a_client_are_not_trusted() {
    let edge = edge().await;
    let forged = [
        ("X-Forwarded-Uri", "/public/forged?permission=none"),
        ("X-Forwarded-Uri", "/caddy/permission=none"),
        ("X-Forwarded-Host", "forged.example.com"),
        ("X-Forwarded-Method", "FORGED"),
        ("X-Forwarded-Prefix", "/public/forged"),
        ("X-Original-URI", "/public/forged"),
        ("X-Original-URL", "/public/forged"),
        ("X-Original-Method", "FORGED"),
        ("X-Rewrite-URL", "/public/forged"),
        ("X-Envoy-Original-Path", "/public/forged"),
        ("X-Envoy-Original-Dst-Host", "127.0.0.1:1"),
        ("X-Envoy-Internal", "true"),
        ("X-Envoy-Auth-Headers-To-Remove", "x-forged"),
        ("Forwarded", "host=forged.example.com"),
        ("X-Keywright-Permission", "forged"),
        ("Permission", "none"),
        ("Team", OTHER),
    ];
    for gateway in &edge.gateways {
        let assert_rejected = async |path: &str, headers: &[(&str, &str)], status: u16| {
            let sent = edge.get(gateway, path, headers).await;
            Edge::assert_rejected(gateway, &sent, &[status], &format!("{path} {headers:?}"));
        };
        for (name, value) in forged {
            assert_rejected("/alerts/x", &[(name, value)], 401).await;
            let key = ("X-API-Key", reader().await);
            assert_rejected("/ingest/x", &[(name, value), key], 403).await;
            let sent = edge.get(gateway, "/alerts/x", &[(name, value), key]).await;
            let head = Edge::assert_passed(gateway, &sent, name);
            let is_forwarding_header = name.starts_with("X-F") || name.starts_with("X-O") || name == "Forwarded";
            assert!(!is_forwarding_header || !head.to_lowercase().contains("forged"), "{:?}: {head}", gateway.kind);
        }
        assert_rejected("/alerts/x", &forged, 401).await;
        assert_rejected("/alerts/x?permission=none", &[], 401).await;
        let key = ("X-API-Key", reader().await);
        assert_rejected("/ingest/x?permission=none&team=other", &[key], 403).await;
        assert_rejected("/ingest/permission=none", &[key], 403).await;
    }
}

/// A client names headers in Connection, so that the proxy removes them after the check (CVE-2024-45410,
/// CVE-2026-29054).
#[tokio::test]
async fn headers_named_in_connection_are_not_removed_after_the_check() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        for name in IDENTITY.into_iter().chain(["Authorization", "X-API-Key", "X-Forwarded-For", "Host"]) {
            for connection in [name.to_owned(), format!("close, {name}"), format!("{name}, close")] {
                let headers = [("Connection", &*connection), ("X-API-Key", reader().await), ("Connection", "close")];
                let sent = edge.get(gateway, "/alerts/x", &headers).await;
                if sent.upstream.is_empty() {
                    Edge::assert_rejected(gateway, &sent, &[400, 401, 403], &connection);
                    continue;
                }
                let head = Edge::assert_passed(gateway, &sent, &connection);
                for (name, expected) in [(IDENTITY[1], "reader"), (IDENTITY[2], "Team"), (IDENTITY[3], SHOP)] {
                    assert_eq!(values(head, name), [expected], "{:?}: {connection}: {head}", gateway.kind);
                }
                assert_eq!(values(head, IDENTITY[0]).len(), 1, "{:?}: {connection}: {head}", gateway.kind);
                assert!(!head.contains(reader().await), "{:?}: {connection}: the key came through", gateway.kind);
            }
        }
    }
}

/// CVE-2023-48312.
#[tokio::test]
async fn empty_keys_are_rejected_with_401() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        for (name, value) in [
            ("Authorization", ""),
            ("Authorization", "Bearer"),
            ("Authorization", "Bearer "),
            ("Authorization", "Bearer    "),
            ("Authorization", "Bearer \t"),
            ("Authorization", "bearer \"\""),
            ("Authorization", "Bearer null"),
            ("Authorization", "Basic Og=="),
            ("X-API-Key", ""),
            ("X-API-Key", " "),
            ("X-API-Key", "kwt_"),
        ] {
            let sent = edge.get(gateway, "/account/x", &[(name, value)]).await;
            Edge::assert_rejected(gateway, &sent, &[401], &format!("{name}: {value:?}"));
        }
    }
}

#[tokio::test]
async fn huge_headers_are_rejected_and_later_requests_pass() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        for length in [1_000, 7_000, 30_000, 200_000, 2_000_000] {
            let huge = "a".repeat(length);
            for name in ["Authorization", "X-API-Key", "X-Filling"] {
                let value = if name == "Authorization" { bearer(&huge) } else { huge.clone() };
                let sent = edge.get(gateway, "/alerts/x", &[(name, &value)]).await;
                // 0: the proxy closed the connection before the end of the request.
                let statuses = [0, 400, 401, 413, 414, 431, 503];
                Edge::assert_rejected(gateway, &sent, &statuses, &format!("{name} of {length}"));
            }
        }
        let many: Vec<_> = (0..2_000).map(|number| format!("X-Filling-{number}")).collect();
        let many: Vec<_> = many.iter().map(|name| (name.as_str(), "x")).collect();
        let sent = edge.get(gateway, "/alerts/x", &many).await;
        Edge::assert_rejected(gateway, &sent, &[0, 400, 401, 431], "many headers");
        let sent = edge.get(gateway, "/alerts/x", &[("X-API-Key", reader().await)]).await;
        Edge::assert_passed(gateway, &sent, "after huge headers");
    }
}

/// With two keys, a log could name one key while the other was checked.
#[tokio::test]
async fn a_request_with_two_keys_is_rejected() {
    let edge = edge().await;
    let good = reader().await;
    let (_, other) = Team::of(OTHER).await.minted("second", &team_key(&["alerts-map:Read"])).await;
    let (bearer_good, bearer_other) = (bearer(good), bearer(&other));
    for gateway in &edge.gateways {
        for headers in [
            [("Authorization", bearer_good.as_str()), ("X-API-Key", other.as_str())],
            [("X-API-Key", good), ("Authorization", &bearer_other)],
            [("X-API-Key", good), ("Authorization", &bearer_good)],
        ] {
            let sent = edge.get(gateway, "/alerts/x", &headers).await;
            Edge::assert_rejected(gateway, &sent, &[400], "in two headers");
        }
        for headers in [
            [("X-API-Key", good), ("X-API-Key", other.as_str())],
            [("Authorization", &*bearer_good), ("Authorization", &*bearer_other)],
            [("Authorization", &*bearer_other), ("Authorization", &*bearer_good)],
            [("X-API-Key", good), ("x-api-key", "")],
        ] {
            let sent = edge.get(gateway, "/alerts/x", &headers).await;
            // nginx before 1.23 passes only the first of two equal headers to the verifier, and none to the
            // application.
            for head in &sent.upstream {
                let first = if headers[0].1.contains(good) { "reader" } else { "second" };
                assert_eq!(values(head, IDENTITY[1]), [first], "{:?}: {head}", gateway.kind);
                assert!(!head.contains(good) && !head.contains(&other), "{:?}: a key came through", gateway.kind);
            }
            if sent.upstream.is_empty() {
                Edge::assert_rejected(gateway, &sent, &[400, 401], "the same header twice");
            }
        }
        let list = format!("{good},{other}");
        let sent = edge.get(gateway, "/alerts/x", &[("X-API-Key", &list)]).await;
        Edge::assert_rejected(gateway, &sent, &[400, 401], "a list");
    }
}
