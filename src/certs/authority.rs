//! The CA that all replicas share: the content of its Secret, and the next step of the leader ([`step`]).
//!
//! A CA is replaced in an order in which every bundle in use trusts every leaf in use:
//!
//! 1. After two thirds of the lifetime of the CA, a successor is generated and stored (`next`). It signs nothing yet.
//! 2. The bundle with both certificates is published.
//! 3. When every configuration has held that bundle for the settle time, so that every API server has read it, the
//!    successor is promoted. Each replica signs a new leaf when it reads the promoted CA, at any later time.
//! 4. The old certificate stays in the bundle until it has expired, and with it every leaf that it signed.
//!
//! Each step is one write with the resourceVersion that was read, and the next step depends on the stored state only. A
//! crash between two steps therefore only delays the replacement.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use tracing::warn;

use super::{Authority, CertError, Certificate};

const CURRENT: (&str, &str) = ("ca.crt", "ca.key");
const NEXT: (&str, &str) = ("next.crt", "next.key");
const PREVIOUS: &str = "previous.crt";

/// The content of the Secret.
#[derive(Debug)]
pub struct CaState {
    /// The CA that signs leaves.
    pub current: Authority,
    /// The successor. It signs leaves once every API server trusts it.
    pub next: Option<Authority>,
    /// Earlier CAs whose leaves may still be served, oldest first; usually at most one.
    pub previous: Vec<Certificate>,
}

/// A step of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaStep {
    /// Generate a new CA: the current one has expired, and so have its leaves.
    Replace,
    /// Generate the successor.
    AddNext,
    /// Make the successor the current CA.
    Promote,
    /// Remove expired certificates.
    DropExpired,
    /// Do nothing before this time.
    Wait(Timestamp),
}

/// Returns the next step of the leader for `ca`. `published` is the time for which every webhook configuration has held
/// the bundle of `ca`; `None` if at least one does not hold it.
#[must_use]
pub fn step(ca: &CaState, now: Timestamp, published: Option<Duration>, settle: Duration) -> CaStep {
    let current = ca.current.cert().validity();
    let next = ca.next.as_ref().filter(|next| now < next.cert().validity().until);
    let settled = published.is_some_and(|published| published >= settle);
    // No leaf of an expired CA is valid, so there is no reason to wait before the promotion.
    let expired = current.until <= now;
    match next {
        Some(_) if settled || expired => return CaStep::Promote,
        None if expired => return CaStep::Replace,
        None if current.renew_at() <= now => return CaStep::AddNext,
        _ => {}
    }
    if ca.previous.iter().any(|old| old.validity().until < now) {
        return CaStep::DropExpired;
    }
    let change = match (next, published) {
        (Some(_), Some(published)) => now + settle.saturating_sub(published),
        (Some(_), None) => current.until,
        (None, _) => current.renew_at(),
    };
    // The last second of a validity is included.
    let drops = ca.previous.iter().map(|old| old.validity().until + Duration::from_secs(1));
    CaStep::Wait(drops.fold(change.min(current.until), Ord::min))
}

impl CaState {
    /// Generates a new CA.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn generate(now: Timestamp, life: Duration) -> Result<Self, CertError> {
        Ok(Self { current: Authority::generate(now, life)?, next: None, previous: Vec::new() })
    }

    /// Returns the state after `step`, which must be stored before it is used.
    ///
    /// # Errors
    /// If the random source fails.
    pub fn after(self, step: CaStep, now: Timestamp, life: Duration) -> Result<Self, CertError> {
        match (step, self) {
            (CaStep::Replace, _) => Self::generate(now, life),
            (CaStep::AddNext, ca) => Ok(Self { next: Some(Authority::generate(now, life)?), ..ca }),
            (CaStep::Promote, Self { current, next: Some(next), mut previous }) => {
                previous.push(current.cert().clone());
                Ok(Self { current: next, next: None, previous })
            }
            (CaStep::DropExpired, mut ca) => {
                ca.previous.retain(|old| now <= old.validity().until);
                Ok(ca)
            }
            (CaStep::Promote | CaStep::Wait(_), ca) => Ok(ca),
        }
    }

    /// Returns the certificates that API servers must trust, as PEM, oldest first, so that a promotion does not change
    /// the bundle.
    #[must_use]
    pub fn bundle(&self) -> String {
        let signing = [Some(&self.current), self.next.as_ref()].into_iter().flatten().map(Authority::cert);
        self.previous.iter().chain(signing).map(Certificate::pem).collect()
    }

    /// Returns the data of the Secret.
    #[must_use]
    pub fn data(&self) -> BTreeMap<String, ByteString> {
        let pair = |names: (&'static str, &'static str), ca: &Authority| {
            [(names.0, ca.cert().pem().to_owned()), (names.1, ca.key_pem())]
        };
        let previous: String = self.previous.iter().map(Certificate::pem).collect();
        pair(CURRENT, &self.current)
            .into_iter()
            .chain(self.next.iter().flat_map(|next| pair(NEXT, next)))
            .chain((!previous.is_empty()).then_some((PREVIOUS, previous)))
            .map(|(name, text)| (name.to_owned(), ByteString(text.into_bytes())))
            .collect()
    }

    /// Parses the data of the Secret. Damaged entries other than the current CA are ignored.
    ///
    /// # Errors
    /// If the current CA is missing or damaged.
    pub fn parse(data: &BTreeMap<String, ByteString>) -> Result<Self, CertError> {
        let get = |name: &'static str| data.get(name).map(|text| text.0.as_slice()).ok_or(CertError::Missing(name));
        let pair = |(cert, key)| Authority::parse(get(cert)?, get(key)?, cert, key);
        let warn_damaged = |error: &CertError| warn!(%error, "ignoring a damaged entry in the Secret of the CA");
        let next = data.contains_key(NEXT.0).then(|| pair(NEXT).inspect_err(warn_damaged).ok()).flatten();
        let previous =
            data.get(PREVIOUS).map(|text| Certificate::parse_all(&text.0, PREVIOUS).inspect_err(warn_damaged));
        Ok(Self { current: pair(CURRENT)?, next, previous: previous.and_then(Result::ok).unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rustls::pki_types::CertificateDer;

    use super::{super::serving::verify, *};

    const LIFE: Duration = Duration::from_mins(15);
    const LEAF_LIFE: Duration = Duration::from_mins(5);
    const SETTLE: Duration = Duration::from_mins(1);
    const NAME: &str = "keywright.keywright-system.svc";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn ca(next: Option<i64>, previous: Option<i64>) -> CaState {
        CaState {
            current: Authority::generate(at(0), LIFE).unwrap(),
            next: next.map(|made| Authority::generate(at(made), LIFE).unwrap()),
            previous: previous
                .map(|made| Authority::generate(at(made), LIFE).unwrap().cert().clone())
                .into_iter()
                .collect(),
        }
    }

    #[test]
    fn step_returns_the_next_step_for_each_state() {
        use CaStep::{AddNext, DropExpired, Promote, Replace, Wait};
        let (unpublished, recent, settled) = (None, Some(Duration::from_secs(20)), Some(SETTLE));
        // The validity begins 90 s early and lasts 990 s: two thirds end at 570.
        let table = [
            ("new", ca(None, None), 0, unpublished, Wait(at(570))),
            ("new and published", ca(None, None), 0, settled, Wait(at(570))),
            ("one second before two thirds", ca(None, None), 569, settled, Wait(at(570))),
            ("two thirds have passed, not published", ca(None, None), 570, unpublished, AddNext),
            ("next is not published", ca(Some(570), None), 600, unpublished, Wait(at(900))),
            ("next was published 20 s ago", ca(Some(570), None), 600, recent, Wait(at(640))),
            ("next was published for the settle time", ca(Some(570), None), 630, settled, Promote),
            ("a previous CA has expired", ca(None, Some(-1000)), 0, settled, DropExpired),
            ("a previous CA expires first", ca(None, Some(-600)), 0, settled, Wait(at(301))),
            ("expired, next is not published", ca(Some(570), None), 900, unpublished, Promote),
            ("expired without next", ca(None, None), 900, settled, Replace),
            ("expired, next has expired too", ca(Some(570), None), 1500, settled, Replace),
            ("two thirds have passed, next has expired", ca(Some(-901), None), 600, settled, AddNext),
        ];
        for (name, ca, now, published, expected) in table {
            assert_eq!(step(&ca, at(now), published, SETTLE), expected, "{name}");
        }
    }

    #[test]
    fn a_promotion_does_not_change_the_bundle() {
        let ca = ca(Some(570), Some(-100));
        let bundle = ca.bundle();
        let next = ca.next.as_ref().unwrap().cert().clone();
        let ca = ca.after(CaStep::Promote, at(640), LIFE).unwrap();
        assert_eq!((ca.bundle(), ca.current.cert()), (bundle, &next));
    }

    #[test]
    fn parse_returns_the_state_that_data_stores() {
        for ca in [ca(None, None), ca(Some(570), None), ca(Some(570), Some(-100))] {
            let read = CaState::parse(&ca.data()).unwrap();
            assert_eq!((read.data(), read.bundle()), (ca.data(), ca.bundle()));
        }
    }

    #[test]
    fn parse_fails_for_a_damaged_current_ca_and_ignores_other_damaged_entries() {
        let good = ca(Some(570), Some(-100)).data();
        let other = ca(None, None).data();
        let with = |name: &str, text: Option<&[u8]>| {
            let mut data = good.clone();
            match text {
                Some(text) => data.insert(name.to_owned(), ByteString(text.to_owned())),
                None => data.remove(name),
            };
            CaState::parse(&data)
        };
        let message = |result: Result<CaState, CertError>| result.unwrap_err().to_string();
        assert_eq!(message(with("ca.crt", None)), "ca.crt is missing");
        assert_eq!(message(with("ca.key", None)), "ca.key is missing");
        assert_eq!(message(with("ca.crt", Some(b""))), "ca.crt is missing");
        assert_eq!(message(with("ca.crt", Some(b"\xff"))), "ca.crt cannot be read as PEM");
        assert_eq!(message(with("ca.key", Some(b"s3cret"))), "ca.key cannot be read as PEM");
        assert_eq!(message(with("ca.key", Some(&other["ca.key"].0))), "ca.key does not belong to its certificate");

        let (key, _) = Authority::generate(at(0), LIFE).unwrap().sign(&[NAME.to_owned()], at(0), LIFE).unwrap();
        let leaf = to_pem(key.cert[0].as_ref());
        assert_eq!(message(with("ca.crt", Some(leaf.as_bytes()))), "ca.crt is not a CA certificate");

        let no_next = with("next.key", Some(b"s3cret")).unwrap();
        assert!(no_next.next.is_none() && no_next.previous.len() == 1);
        let no_previous = with("previous.crt", Some(b"x")).unwrap();
        assert!(no_previous.next.is_some() && no_previous.previous.is_empty());
    }

    fn to_pem(der: &[u8]) -> String {
        use k8s_openapi::serde_json;
        let base64 = serde_json::to_value(ByteString(der.to_vec())).unwrap();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", base64.as_str().unwrap())
    }

    #[test]
    fn debug_output_contains_no_key() {
        let ca = ca(Some(570), None);
        let debug = format!("{ca:?}");
        for name in ["ca.key", "next.key"] {
            let pem = String::from_utf8(ca.data()[name].0.clone()).unwrap();
            let secret = pem.lines().nth(1).unwrap();
            assert!(!debug.contains(secret), "{name}");
        }
        assert!(debug.contains("[secret key elided]"));
    }

    /// A simulated cluster in the worst case: API servers read a new bundle up to `lag` seconds late, and replicas
    /// serve each signed leaf until it expires.
    struct Simulation {
        now: i64,
        lag: i64,
        secret: BTreeMap<String, ByteString>,
        bundles: Vec<(i64, String)>,
        leaves: Vec<(Vec<CertificateDer<'static>>, Timestamp)>,
        signers: HashSet<String>,
    }

    impl Simulation {
        /// Checks the invariant: every bundle that may be in use now trusts every leaf that may be in use now.
        fn check(&self) -> Result<(), String> {
            let old = self.bundles.iter().rposition(|(published, _)| *published <= self.now - self.lag);
            let held = &self.bundles[old.unwrap_or_default()..];
            for (leaf, until) in self.leaves.iter().filter(|(_, until)| at(self.now) <= *until) {
                for (published, bundle) in held {
                    verify(leaf, bundle.as_bytes(), NAME, at(self.now)).map_err(|error| {
                        format!("at {}: leaf until {until}, bundle of {published}: {error}", self.now)
                    })?;
                }
            }
            Ok(())
        }

        /// Signs a leaf, as a replica does that reads the Secret now.
        fn sign(&mut self, ca: &CaState) {
            let (key, validity) = ca.current.sign(&[NAME.to_owned()], at(self.now), LEAF_LIFE).unwrap();
            self.leaves.push((key.cert.clone(), validity.until));
            self.signers.insert(ca.current.cert().pem().to_owned());
        }
    }

    /// Simulates 1600 s: two rotations, beyond the end of the second CA. The leader crashes after write number `crash`,
    /// and another replica without its memory takes over 30 s later. Returns the number of writes and the final state.
    fn simulate(settle: Duration, lag: i64, crash: Option<usize>) -> Result<(usize, Simulation), String> {
        let secret = CaState::generate(at(0), LIFE).unwrap().data();
        let mut simulation =
            Simulation { now: 0, lag, secret, bundles: Vec::new(), leaves: Vec::new(), signers: HashSet::new() };
        let mut writes = 0;
        let mut absent_until = 0;
        let mut published: Option<(String, i64)> = None;
        while simulation.now < 1600 {
            while simulation.now >= absent_until {
                let ca = CaState::parse(&simulation.secret).unwrap();
                let bundle = ca.bundle();
                if simulation.bundles.last().is_none_or(|(_, held)| *held != bundle) {
                    simulation.bundles.push((simulation.now, bundle.clone()));
                    published = Some((bundle, simulation.now));
                } else {
                    published = published.filter(|(held, _)| *held == bundle).or(Some((bundle, simulation.now)));
                    let since = published.as_ref().map(|(_, since)| u64::try_from(simulation.now - since).unwrap());
                    let step = step(&ca, at(simulation.now), since.map(Duration::from_secs), settle);
                    if let CaStep::Wait(until) = step {
                        assert!(until > at(simulation.now), "the time to wait for must be in the future");
                        break;
                    }
                    assert_ne!(step, CaStep::Replace, "the CA expired at {}", simulation.now);
                    simulation.secret = ca.after(step, at(simulation.now), LIFE).unwrap().data();
                    // The fastest replica signs at once. From then on, its leaf must be trusted everywhere.
                    simulation.sign(&CaState::parse(&simulation.secret).unwrap());
                }
                writes += 1;
                simulation.check()?;
                if crash == Some(writes) {
                    published = None;
                    absent_until = simulation.now + 30;
                }
            }
            if simulation.now % 90 == 0 {
                simulation.sign(&CaState::parse(&simulation.secret).unwrap());
            }
            simulation.check()?;
            simulation.now += 30;
        }
        Ok((writes, simulation))
    }

    #[test]
    fn every_bundle_in_use_trusts_every_leaf_in_use_after_a_crash_at_any_write() {
        let (writes, simulation) = simulate(SETTLE, 50, None).unwrap();
        // The writes of a rotation: store next, publish, promote, drop the old CA, publish.
        assert_eq!((writes, simulation.signers.len()), (1 + 2 * 5, 3));
        assert_eq!(simulation.bundles.last().unwrap().1.matches("BEGIN").count(), 1);
        for crash in 1..=writes {
            let (_, simulation) =
                simulate(SETTLE, 50, Some(crash)).unwrap_or_else(|error| panic!("crash {crash}: {error}"));
            assert_eq!(simulation.signers.len(), 3, "crash {crash}");
        }
    }

    #[test]
    fn a_settle_time_shorter_than_the_lag_breaks_trust() {
        let error = simulate(Duration::from_secs(20), 50, None).err().unwrap();
        assert!(error.starts_with("at 600: ") && error.contains("bundle of 0"), "{error}");
    }

    #[test]
    fn an_expired_ca_is_replaced_by_one_that_is_trusted_at_once() {
        let ca = ca(None, Some(-100));
        let ca = ca.after(CaStep::Replace, at(5000), LIFE).unwrap();
        let (leaf, _) = ca.current.sign(&[NAME.to_owned()], at(5000), LEAF_LIFE).unwrap();
        verify(&leaf.cert, ca.bundle().as_bytes(), NAME, at(5000)).unwrap();
        assert_eq!(ca.bundle().matches("BEGIN").count(), 1);
    }

    #[test]
    fn a_leaf_expires_with_its_ca_and_is_valid_for_its_name_only() {
        let ca = ca(None, None);
        let (leaf, validity) = ca.current.sign(&[NAME.to_owned()], at(800), LEAF_LIFE).unwrap();
        assert_eq!(validity.until, at(900));
        let bundle = ca.bundle();
        let check = |name, now| verify(&leaf.cert, bundle.as_bytes(), name, at(now)).is_ok();
        assert!(check(NAME, 800) && check(NAME, 899));
        assert!(!check("kubernetes.default.svc", 800) && !check(NAME, 901) && !check(NAME, 700));
    }
}
