//! The certificate of the verifier, which has no CA of its own because it may not read Secrets. The leader issues the
//! certificate from the webhook's CA into a Secret that the verifier mounts, and publishes the CA in a ConfigMap for
//! clients.
//!
//! Clients receive a new CA late: an updated ConfigMap reaches a pod after a minute or two. A successor is therefore
//! promoted only when the ConfigMap, too, has held it for the settle time. After the promotion, a certificate of the
//! predecessor is kept until it is due, because clients trust it until it expires. [`next`] implements this rule.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{Api, Client};
use tracing::info;

use super::{
    CertError, Certificate, authority::CaState, check_managed, metadata, post_params, serving::verify, x509::owns,
};

const CERT: &str = "tls.crt";
const KEY: &str = "tls.key";
const CA: &str = "ca.crt";

/// The certificate to issue, and the objects that receive it. Both are in the namespace of the operator.
#[derive(Clone, Debug)]
pub struct IssuedConfig {
    /// The DNS names of the server.
    pub names: Vec<String>,
    /// The name of the Secret that receives the certificate and its key.
    pub secret: String,
    /// The name of the ConfigMap that receives the CA.
    pub config_map: String,
}

impl IssuedConfig {
    /// Returns the configuration for a server behind `service`.
    #[must_use]
    pub fn new(namespace: &str, service: &str, secret: &str, config_map: &str) -> Self {
        let qualified = format!("{service}.{namespace}");
        Self {
            // The last name is for clients that require a fully qualified name. In a cluster with another domain, they
            // use the one before.
            names: vec![
                service.to_owned(),
                qualified.clone(),
                format!("{qualified}.svc"),
                format!("{qualified}.svc.cluster.local"),
            ],
            secret: secret.to_owned(),
            config_map: config_map.to_owned(),
        }
    }
}

/// The next action for the issued certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Issue a new certificate, for this reason.
    Issue(&'static str),
    /// Do nothing before this time.
    Wait(Timestamp),
}

/// Returns the next action for the data `held` of the Secret. Certificates are issued by `ca` for `names` and are valid
/// for `life`.
#[must_use]
pub fn next(
    held: &BTreeMap<String, ByteString>,
    ca: &CaState,
    names: &[String],
    now: Timestamp,
    life: Duration,
) -> Next {
    let Some(leaf) = held.get(CERT).and_then(|pem| Certificate::parse_all(&pem.0, CERT).ok()) else {
        return Next::Issue("no certificate can be read");
    };
    let leaf = &leaf[0];
    if !held.get(KEY).is_some_and(|key| owns(&key.0, leaf)) {
        return Next::Issue("the key is missing or does not belong to the certificate");
    }
    let chain = [leaf.der().clone()];
    let accepted = |bundle: &str| names.iter().all(|name| verify(&chain, bundle.as_bytes(), name, now).is_ok());
    if !accepted(&ca.bundle()) {
        return Next::Issue("a client that trusts the CA rejects it");
    }
    let (validity, issuer) = (leaf.validity(), ca.current.cert().validity());
    let due = if !accepted(ca.current.cert().pem()) {
        // The predecessor signed it, and clients trust it until it expires. They have an eighth of `life` to receive
        // the new CA, but at most half of the time between renewal and expiry.
        let latest = validity.until - validity.until.duration_since(validity.renew_at()) / 2;
        validity.renew_at().max((issuer.from + life / 8).min(latest))
    } else if validity.until < issuer.until {
        validity.renew_at()
    } else {
        // It expires with its CA. A new certificate would not last longer before the CA changes.
        issuer.until
    };
    if due <= now { Next::Issue("the renewal is due") } else { Next::Wait(due) }
}

/// Writes the Secret and the ConfigMap.
pub(super) struct Issued {
    config: IssuedConfig,
    secrets: Api<Secret>,
    maps: Api<ConfigMap>,
}

impl Issued {
    pub(super) fn new(client: &Client, namespace: &str, config: IssuedConfig) -> Self {
        let (secrets, maps) = (Api::namespaced(client.clone(), namespace), Api::namespaced(client.clone(), namespace));
        Self { config, secrets, maps }
    }

    /// The name of the ConfigMap.
    pub(super) fn name(&self) -> &str {
        &self.config.config_map
    }

    /// Reads the ConfigMap, if it exists.
    pub(super) async fn read(&self) -> Result<Option<ConfigMap>, CertError> {
        Ok(self.maps.get_opt(&self.config.config_map).await?)
    }

    /// Writes `bundle` to the ConfigMap that was read. Returns whether a write was necessary.
    pub(super) async fn publish(&self, read: Option<ConfigMap>, bundle: &str) -> Result<bool, CertError> {
        let name = &self.config.config_map;
        let data = BTreeMap::from([(CA.to_owned(), bundle.to_owned())]);
        let Some(read) = read else {
            let map = ConfigMap { metadata: metadata(name), data: Some(data), ..ConfigMap::default() };
            self.maps.create(&post_params(), &map).await?;
            return Ok(true);
        };
        check_managed(&read)?;
        if read.data.as_ref() == Some(&data) {
            return Ok(false);
        }
        let map = ConfigMap { data: Some(data), ..read };
        self.maps.replace(name, &post_params(), &map).await?;
        Ok(true)
    }

    /// Issues a certificate if one is due. The bundle must be published before. Returns when the next one is due.
    pub(super) async fn keep(&self, ca: &CaState, now: Timestamp, life: Duration) -> Result<Timestamp, CertError> {
        let name = &self.config.secret;
        let read = self.secrets.get_opt(name).await?;
        if let Some(read) = &read {
            check_managed(read)?;
        }
        let held = read.as_ref().and_then(|secret| secret.data.clone()).unwrap_or_default();
        let mut data = held.clone();
        let text = |text: String| ByteString(text.into_bytes());
        let mut due = next(&held, ca, &self.config.names, now, life);
        if let Next::Issue(reason) = due {
            let (cert, key) = ca.current.issue(&self.config.names, now, life)?;
            data = BTreeMap::from([(CERT.to_owned(), text(cert)), (KEY.to_owned(), text(key))]);
            due = next(&data, ca, &self.config.names, now, life);
            info!(secret = name, reason, "issuing a certificate for the verifier");
        }
        data.insert(CA.to_owned(), text(ca.bundle()));
        if data != held {
            if let Some(read) = read {
                let secret = Secret { data: Some(data), ..read };
                self.secrets.replace(name, &post_params(), &secret).await?;
            } else {
                let secret = Secret {
                    metadata: metadata(name),
                    type_: Some("kubernetes.io/tls".to_owned()),
                    data: Some(data),
                    ..Secret::default()
                };
                self.secrets.create(&post_params(), &secret).await?;
            }
        }
        match due {
            Next::Wait(until) => Ok(until),
            // The CA has expired; its next step replaces it.
            Next::Issue(_) => Ok(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::authority::{CaStep, step},
        *,
    };

    const CA_LIFE: Duration = Duration::from_mins(15);
    const LIFE: Duration = Duration::from_mins(5);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn names() -> Vec<String> {
        IssuedConfig::new("ns", "verifier", "s", "m").names
    }

    fn data(cert: &str, key: &str) -> BTreeMap<String, ByteString> {
        [(CERT, cert), (KEY, key)].map(|(name, text)| (name.to_owned(), ByteString(text.as_bytes().to_vec()))).into()
    }

    fn issue(ca: &CaState, now: i64) -> BTreeMap<String, ByteString> {
        let (cert, key) = ca.current.issue(&names(), at(now), LIFE).unwrap();
        data(&cert, &key)
    }

    fn next_at(held: &BTreeMap<String, ByteString>, ca: &CaState, now: i64) -> Next {
        next(held, ca, &names(), at(now), LIFE)
    }

    #[test]
    fn next_issues_after_two_thirds_and_for_a_certificate_that_clients_reject() {
        let ca = CaState::generate(at(0), CA_LIFE).unwrap();
        let held = issue(&ca, 0);
        // The validity begins 30 s early and lasts 330 s: two thirds end at 190.
        assert_eq!(next_at(&held, &ca, 0), Next::Wait(at(190)));
        assert_eq!(next_at(&held, &ca, 189), Next::Wait(at(190)));
        assert_eq!(next_at(&held, &ca, 190), Next::Issue("the renewal is due"));
        assert_eq!(next_at(&held, &ca, 301), Next::Issue("a client that trusts the CA rejects it"));
        assert_eq!(next_at(&issue(&ca, 700), &ca, 700), Next::Wait(at(900)), "it expires with its CA");

        let unreadable = Next::Issue("no certificate can be read");
        assert_eq!(next_at(&BTreeMap::new(), &ca, 0), unreadable);
        assert_eq!(next_at(&data("x", "y"), &ca, 0), unreadable);
        let mut mixed = held.clone();
        mixed.insert(KEY.to_owned(), issue(&ca, 0)[KEY].clone());
        let no_key = Next::Issue("the key is missing or does not belong to the certificate");
        assert_eq!(next_at(&mixed, &ca, 0), no_key);
        mixed.remove(KEY);
        assert_eq!(next_at(&mixed, &ca, 0), no_key);

        let another = CaState::generate(at(0), CA_LIFE).unwrap();
        assert_eq!(next_at(&held, &another, 0), Next::Issue("a client that trusts the CA rejects it"));
        let renamed = [names(), vec!["other.ns.svc".to_owned()]].concat();
        assert!(
            matches!(next(&held, &ca, &renamed, at(0), LIFE), Next::Issue(_)),
            "a name that is not in the certificate"
        );
    }

    /// Simulates two changes of the CA, with clients that receive a bundle `lag` seconds late. Returns the number of
    /// CAs that signed certificates.
    fn simulate(lag: i64) -> Result<usize, String> {
        const SETTLE: Duration = Duration::from_secs(5);
        let mut ca = CaState::generate(at(0), CA_LIFE).unwrap();
        let mut held = BTreeMap::new();
        let mut bundles = vec![(0, ca.bundle())];
        let mut issuers = std::collections::HashSet::new();
        for now in 0..1600 {
            if bundles.last().is_none_or(|(_, bundle)| *bundle != ca.bundle()) {
                bundles.push((now, ca.bundle()));
            }
            if matches!(next_at(&held, &ca, now), Next::Issue(_)) {
                held = issue(&ca, now);
                issuers.insert(ca.current.cert().pem().to_owned());
            }
            let since = u64::try_from(now - bundles.last().unwrap().0).unwrap();
            let due = step(&ca, at(now), Some(Duration::from_secs(since)), SETTLE);
            ca = ca.after(due, at(now), CA_LIFE).unwrap();
            assert_ne!(due, CaStep::Replace);

            let leaf = Certificate::parse_all(&held[CERT].0, CERT).unwrap().swap_remove(0);
            let old = bundles.iter().rposition(|(published, _)| *published <= now - lag).unwrap_or_default();
            for (published, bundle) in &bundles[old..] {
                verify(&[leaf.der().clone()], bundle.as_bytes(), "verifier.ns.svc", at(now))
                    .map_err(|error| format!("at {now}: bundle of {published}: {error}"))?;
            }
        }
        Ok(issuers.len())
    }

    #[test]
    fn clients_that_receive_a_new_ca_late_accept_the_certificate() {
        assert_eq!(simulate(30), Ok(3), "a lag much longer than the settle time");
        // A lag that breaks trust, so the simulation detects it.
        simulate(200).unwrap_err();
    }
}
