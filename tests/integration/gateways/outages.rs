//! Failures of the verifier: all routes except public ones are closed.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::*;
use crate::support::gateways::{Example, VERIFIER_HOST};

/// Asserts that requests with and without a working key are rejected, except on public paths.
async fn assert_closed(edge: &Edge, what: &str) {
    for gateway in &edge.gateways {
        // Traefik answers 500 for every failure of a check.
        let statuses: &[u16] = if gateway.kind == Kind::Traefik { &[500, 503] } else { &[503] };
        for headers in [&[("X-API-Key", reader().await)][..], &[]] {
            for path in ["/alerts/1", "/ingest/1", "/account/1"] {
                let sent = edge.get(gateway, path, headers).await;
                Edge::assert_rejected(gateway, &sent, statuses, what);
            }
        }
        let sent = edge.get(gateway, "/public/1", &[]).await;
        Edge::assert_passed(gateway, &sent, "a public path");
    }
}

#[tokio::test]
async fn proxies_fail_closed_if_the_verifier_is_not_synced_or_not_running() {
    super::edge().await;
    reader().await;
    // A verifier that never reached the API server has no keys.
    let unreachable = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = Some(format!("http://{}", unreachable.local_addr().unwrap()));
    let unready = Edge::start(VerifierOptions { server, ..VerifierOptions::default() }).await.unwrap();
    assert_closed(&unready, "not synced").await;
    drop(unready);

    let edge = Edge::start(VerifierOptions::default()).await.unwrap();
    edge.verifier.wait_ready().await.unwrap();
    edge.wait_until_accepted(reader().await).await;
    edge.verifier.kill();
    assert_closed(&edge, "killed").await;
}

/// Writes `tls.crt` and `tls.key` for the verifier, and `ca.crt`, into a folder.
fn write_certificate(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let mut params = CertificateParams::new([]).unwrap();
    // Without a name of its own, the CA would have the same name as its certificates, which would then count as
    // self-signed.
    params.distinguished_name.push(DnType::CommonName, "test-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    // Traefik verifies the host of the address, which is an IP address in this test.
    let params = CertificateParams::new([VERIFIER_HOST.to_owned(), Ipv4Addr::LOCALHOST.to_string()]).unwrap();
    std::fs::write(folder.join("ca.crt"), ca.pem()).unwrap();
    std::fs::write(folder.join("tls.crt"), params.signed_by(&key, &ca).unwrap().pem()).unwrap();
    std::fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
}

#[tokio::test]
async fn proxies_verify_the_certificate_of_the_verifier() {
    super::edge().await;
    let plane = crate::support::shared().await.plane;
    let (first, second) = (plane.folder().join("verifier-tls"), plane.folder().join("another-tls"));
    write_certificate(&first);
    write_certificate(&second);
    let verifier = Verifier::start(plane, VerifierOptions { tls: Some(first.clone()), ..VerifierOptions::default() });
    let verifier = verifier.await.unwrap();
    verifier.wait_ready().await.unwrap();
    let upstream = Upstream::start().unwrap();
    let (mut trusting, mut distrusting) = (Vec::new(), Vec::new());
    for kind in Kind::ALL {
        for (folder, gateways) in [(&first, &mut trusting), (&second, &mut distrusting)] {
            let ca = folder.join("ca.crt");
            let gateway = Gateway::start_with_tls(plane, kind, verifier.address(), upstream.address, &ca);
            gateways.push(gateway.await.unwrap());
        }
    }
    let edge = Edge { verifier, gateways: trusting, upstream };
    edge.wait_until_accepted(reader().await).await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/alerts/1", &[]).await;
        Edge::assert_rejected(gateway, &sent, &[401], "without a key, over TLS");
    }
    let edge = Edge { gateways: distrusting, ..edge };
    assert_closed(&edge, "a certificate of another CA").await;

    // The verifier loads a new certificate without a restart.
    for file in ["tls.key", "tls.crt"] {
        std::fs::copy(second.join(file), first.join(file)).unwrap();
    }
    edge.wait_until_accepted(reader().await).await;
}

#[tokio::test]
async fn a_route_without_a_requirement_is_closed() {
    let edge = edge().await;
    let plane = crate::support::shared().await.plane;
    let mut gateways = Vec::new();
    for kind in Kind::ALL {
        let mut example = Example::of(kind).unwrap();
        let (from, to) = match kind {
            // A route without a requirement before the existing one.
            Kind::EnvoyGrpc | Kind::EnvoyHttp => {
                let from = "                        - match: { prefix: /alerts/ }\n";
                (from, format!("{from}                          route: {{ cluster: shop }}\n{from}"))
            }
            Kind::Nginx => ("set $keywright permission=alerts-map:Read;", String::new()),
            Kind::Caddy => ("import keywright permission=alerts-map:Read", "import keywright \"\"".to_owned()),
            Kind::Traefik => ("/traefik/permission=alerts-map:Read", "/traefik/".to_owned()),
        };
        example.replace(from, &to).unwrap();
        let gateway = Gateway::start_with(plane, kind, example, edge.verifier.address(), edge.upstream.address);
        gateways.push(gateway.await.unwrap());
    }
    for gateway in &gateways {
        for headers in [&[("X-API-Key", reader().await)][..], &[]] {
            let sent = edge.get(gateway, "/alerts/permission=none", headers).await;
            Edge::assert_rejected(gateway, &sent, &[401, 403], "a forgotten requirement");
        }
        let sent = edge.get(gateway, "/account/x", &[("X-API-Key", reader().await)]).await;
        Edge::assert_passed(gateway, &sent, "a route with a requirement");
    }
}
