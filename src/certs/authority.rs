//! The CA that all replicas share: what its Secret holds, and what the leader does next ([`step`]).
//!
//! A CA is replaced in an order that never lets a served leaf and a held bundle disagree:
//!
//! 1. At two thirds of its life a successor is made and stored (`next`). Nothing is signed with it yet.
//! 2. The bundle that is published now holds both.
//! 3. When every configuration has held that bundle for the settle time, so that every API server has seen it, the
//!    successor is promoted, and replicas sign new leaves as they learn of it, whenever that is.
//! 4. The old certificate stays in the bundle until it has expired, and with it every leaf that it signed.
//!
//! Each step is one write that carries the resourceVersion of what was read, and the next step follows from what is
//! stored alone, so a crash between any two changes nothing but the time it takes.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use tracing::warn;

use super::{Authority, Certificate, Error};

const CURRENT: (&str, &str) = ("ca.crt", "ca.key");
const NEXT: (&str, &str) = ("next.crt", "next.key");
const PREVIOUS: &str = "previous.crt";

/// What the Secret holds.
#[derive(Debug)]
pub struct CaState {
    /// Signs leaves now.
    pub current: Authority,
    /// Will sign them as soon as every API server trusts it.
    pub next: Option<Authority>,
    /// Signed leaves that may still be served. Oldest first; usually one.
    pub previous: Vec<Certificate>,
}

/// What the leader does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start over: nothing signed by this CA is valid any more.
    Replace,
    /// Make the successor.
    AddNext,
    /// Let the successor sign.
    Promote,
    /// Forget certificates that have expired.
    DropExpired,
    /// Nothing before this time.
    Wait(Timestamp),
}

/// What the leader does next with `ca`, whose bundle every webhook configuration has held for `published`
/// (none: not every one holds it).
#[must_use]
pub fn step(ca: &CaState, now: Timestamp, published: Option<Duration>, settle: Duration) -> Step {
    let current = ca.current.cert().validity();
    let next = ca.next.as_ref().filter(|next| now < next.cert().validity().until);
    let settled = published.is_some_and(|published| published >= settle);
    // An expired CA protects nothing any more: no reason to wait before using the next.
    let expired = current.until <= now;
    match next {
        Some(_) if settled || expired => return Step::Promote,
        None if expired => return Step::Replace,
        None if current.renew_at() <= now => return Step::AddNext,
        _ => {}
    }
    if ca.previous.iter().any(|old| old.validity().until < now) {
        return Step::DropExpired;
    }
    let change = match (next, published) {
        (Some(_), Some(published)) => now + settle.saturating_sub(published),
        (Some(_), None) => current.until,
        (None, _) => current.renew_at(),
    };
    // A certificate is still valid in its last second.
    let drops = ca.previous.iter().map(|old| old.validity().until + Duration::from_secs(1));
    Step::Wait(drops.fold(change.min(current.until), Ord::min))
}

impl CaState {
    /// A new CA.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate(now: Timestamp, life: Duration) -> Result<Self, Error> {
        Ok(Self { current: Authority::generate(now, life)?, next: None, previous: Vec::new() })
    }

    /// The state after `step`; to be stored before anything follows from it.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn after(self, step: Step, now: Timestamp, life: Duration) -> Result<Self, Error> {
        match (step, self) {
            (Step::Replace, _) => Self::generate(now, life),
            (Step::AddNext, ca) => Ok(Self { next: Some(Authority::generate(now, life)?), ..ca }),
            (Step::Promote, Self { current, next: Some(next), mut previous }) => {
                previous.push(current.cert().clone());
                Ok(Self { current: next, next: None, previous })
            }
            (Step::DropExpired, mut ca) => {
                ca.previous.retain(|old| now <= old.validity().until);
                Ok(ca)
            }
            (Step::Promote | Step::Wait(_), ca) => Ok(ca),
        }
    }

    /// The certificates that API servers must trust, as PEM. Oldest first, so that a promotion leaves it as it is.
    #[must_use]
    pub fn bundle(&self) -> String {
        let signing = [Some(&self.current), self.next.as_ref()].into_iter().flatten().map(Authority::cert);
        self.previous.iter().chain(signing).map(Certificate::pem).collect()
    }

    /// The data of the Secret.
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

    /// Reads the data of the Secret. Without the current CA there is none; damage to the rest costs only the rest.
    ///
    /// # Errors
    /// When the current CA is missing or damaged.
    pub fn parse(data: &BTreeMap<String, ByteString>) -> Result<Self, Error> {
        let get = |name: &'static str| data.get(name).map(|text| text.0.as_slice()).ok_or(Error::Missing(name));
        let pair = |(cert, key)| Authority::parse(get(cert)?, get(key)?, cert, key);
        let damaged = |error: &Error| warn!(%error, "ignoring a damaged part of the CA's Secret");
        let next = data.contains_key(NEXT.0).then(|| pair(NEXT).inspect_err(damaged).ok()).flatten();
        let previous = data.get(PREVIOUS).map(|text| Certificate::parse_all(&text.0, PREVIOUS).inspect_err(damaged));
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
    fn what_the_leader_does_next() {
        use Step::{AddNext, DropExpired, Promote, Replace, Wait};
        let (unpublished, fresh, settled) = (None, Some(Duration::from_secs(20)), Some(SETTLE));
        // Two thirds of a life that began 90 s early end at 570.
        let table = [
            ("new", ca(None, None), 0, unpublished, Wait(at(570))),
            ("new and published", ca(None, None), 0, settled, Wait(at(570))),
            ("a second before two thirds", ca(None, None), 569, settled, Wait(at(570))),
            ("two thirds, whatever is published", ca(None, None), 570, unpublished, AddNext),
            ("next is not published", ca(Some(570), None), 600, unpublished, Wait(at(900))),
            ("next was published 20 s ago", ca(Some(570), None), 600, fresh, Wait(at(640))),
            ("every API server knows next", ca(Some(570), None), 630, settled, Promote),
            ("the previous one expired", ca(None, Some(-1000)), 0, settled, DropExpired),
            ("the previous one expires first", ca(None, Some(-600)), 0, settled, Wait(at(301))),
            ("expired with an unpublished next: nothing to lose", ca(Some(570), None), 900, unpublished, Promote),
            ("away for long: expired", ca(None, None), 900, settled, Replace),
            ("away for very long: next expired too", ca(Some(570), None), 1500, settled, Replace),
            ("next expired before its time", ca(Some(-901), None), 600, settled, AddNext),
        ];
        for (name, ca, now, published, expected) in table {
            assert_eq!(step(&ca, at(now), published, SETTLE), expected, "{name}");
        }
    }

    #[test]
    fn a_promotion_leaves_the_bundle_as_it_is() {
        let ca = ca(Some(570), Some(-100));
        let bundle = ca.bundle();
        let next = ca.next.as_ref().unwrap().cert().clone();
        let ca = ca.after(Step::Promote, at(640), LIFE).unwrap();
        assert_eq!((ca.bundle(), ca.current.cert()), (bundle, &next));
    }

    #[test]
    fn what_is_stored_is_what_is_read() {
        for ca in [ca(None, None), ca(Some(570), None), ca(Some(570), Some(-100))] {
            let read = CaState::parse(&ca.data()).unwrap();
            assert_eq!((read.data(), read.bundle()), (ca.data(), ca.bundle()));
        }
    }

    #[test]
    fn damage_is_named_and_costs_no_more_than_it_must() {
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
        let message = |result: Result<CaState, Error>| result.unwrap_err().to_string();
        assert_eq!(message(with("ca.crt", None)), "ca.crt is missing");
        assert_eq!(message(with("ca.key", None)), "ca.key is missing");
        assert_eq!(message(with("ca.crt", Some(b""))), "ca.crt is missing");
        assert_eq!(message(with("ca.crt", Some(b"\xff"))), "ca.crt cannot be read as PEM");
        assert_eq!(message(with("ca.key", Some(b"s3cret"))), "ca.key cannot be read as PEM");
        assert_eq!(message(with("ca.key", Some(&other["ca.key"].0))), "ca.key does not belong to its certificate");

        let (key, _) = Authority::generate(at(0), LIFE).unwrap().sign(&[NAME.to_owned()], at(0), LIFE).unwrap();
        let leaf = rcgen_pem(key.cert[0].as_ref());
        assert_eq!(message(with("ca.crt", Some(leaf.as_bytes()))), "ca.crt is not a CA certificate");

        let no_next = with("next.key", Some(b"s3cret")).unwrap();
        assert!(no_next.next.is_none() && no_next.previous.len() == 1);
        let no_previous = with("previous.crt", Some(b"x")).unwrap();
        assert!(no_previous.next.is_some() && no_previous.previous.is_empty());
    }

    fn rcgen_pem(der: &[u8]) -> String {
        use k8s_openapi::serde_json;
        let base64 = serde_json::to_value(ByteString(der.to_vec())).unwrap();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", base64.as_str().unwrap())
    }

    #[test]
    fn no_debug_output_holds_a_key() {
        let ca = ca(Some(570), None);
        let debug = format!("{ca:?}");
        for name in ["ca.key", "next.key"] {
            let pem = String::from_utf8(ca.data()[name].0.clone()).unwrap();
            let secret = pem.lines().nth(1).unwrap();
            assert!(!debug.contains(secret), "{name}");
        }
        assert!(debug.contains("[secret key elided]"));
    }

    /// Everything outside the leader's memory, and more patience than any real cluster has: API servers that learn of
    /// a bundle `lag` late, and replicas that serve any leaf ever signed until it expires.
    struct World {
        now: i64,
        lag: i64,
        secret: BTreeMap<String, ByteString>,
        bundles: Vec<(i64, String)>,
        leaves: Vec<(Vec<CertificateDer<'static>>, Timestamp)>,
        signers: HashSet<String>,
    }

    impl World {
        /// The invariant: every leaf that may be served now is trusted by every bundle that may be held now.
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

        /// Signs as a replica does that looks at the Secret now.
        fn sign(&mut self, ca: &CaState) {
            let (key, validity) = ca.current.sign(&[NAME.to_owned()], at(self.now), LEAF_LIFE).unwrap();
            self.leaves.push((key.cert.clone(), validity.until));
            self.signers.insert(ca.current.cert().pem().to_owned());
        }
    }

    /// Walks through 1600 s: two rotations, past the end of the second CA. The leader dies right after its `crash`th write, forgets
    /// everything, and another takes over half a minute later. How many writes there were.
    fn walk(settle: Duration, lag: i64, crash: Option<usize>) -> Result<(usize, World), String> {
        let secret = CaState::generate(at(0), LIFE).unwrap().data();
        let mut world = World { now: 0, lag, secret, bundles: Vec::new(), leaves: Vec::new(), signers: HashSet::new() };
        let mut writes = 0;
        let mut absent_until = 0;
        let mut published: Option<(String, i64)> = None;
        while world.now < 1600 {
            while world.now >= absent_until {
                let ca = CaState::parse(&world.secret).unwrap();
                let bundle = ca.bundle();
                if world.bundles.last().is_none_or(|(_, held)| *held != bundle) {
                    world.bundles.push((world.now, bundle.clone()));
                    published = Some((bundle, world.now));
                } else {
                    published = published.filter(|(held, _)| *held == bundle).or(Some((bundle, world.now)));
                    let since = published.as_ref().map(|(_, since)| u64::try_from(world.now - since).unwrap());
                    let step = step(&ca, at(world.now), since.map(Duration::from_secs), settle);
                    if let Step::Wait(until) = step {
                        assert!(until > at(world.now), "waiting for the past");
                        break;
                    }
                    assert_ne!(step, Step::Replace, "the CA ran out at {}", world.now);
                    world.secret = ca.after(step, at(world.now), LIFE).unwrap().data();
                    // The quickest replica signs at once, and from then on it must be trusted everywhere.
                    world.sign(&CaState::parse(&world.secret).unwrap());
                }
                writes += 1;
                world.check()?;
                if crash == Some(writes) {
                    published = None;
                    absent_until = world.now + 30;
                }
            }
            if world.now % 90 == 0 {
                world.sign(&CaState::parse(&world.secret).unwrap());
            }
            world.check()?;
            world.now += 30;
        }
        Ok((writes, world))
    }

    #[test]
    fn every_leaf_that_may_be_served_is_trusted_by_every_bundle_that_may_be_held() {
        let (writes, world) = walk(SETTLE, 50, None).unwrap();
        // A rotation: next stored and published, promoted, the old one dropped, and that published.
        assert_eq!((writes, world.signers.len()), (1 + 2 * 5, 3));
        assert_eq!(world.bundles.last().unwrap().1.matches("BEGIN").count(), 1);
        for crash in 1..=writes {
            let (_, world) = walk(SETTLE, 50, Some(crash)).unwrap_or_else(|error| panic!("crash {crash}: {error}"));
            assert_eq!(world.signers.len(), 3, "crash {crash}");
        }
    }

    #[test]
    fn the_settle_time_is_what_holds_it() {
        let error = walk(Duration::from_secs(20), 50, None).err().unwrap();
        assert!(error.starts_with("at 600: ") && error.contains("bundle of 0"), "{error}");
    }

    #[test]
    fn a_ca_that_expired_is_replaced_by_one_that_works_at_once() {
        let ca = ca(None, Some(-100));
        let ca = ca.after(Step::Replace, at(5000), LIFE).unwrap();
        let (leaf, _) = ca.current.sign(&[NAME.to_owned()], at(5000), LEAF_LIFE).unwrap();
        verify(&leaf.cert, ca.bundle().as_bytes(), NAME, at(5000)).unwrap();
        assert_eq!(ca.bundle().matches("BEGIN").count(), 1);
    }

    #[test]
    fn no_leaf_outlives_its_ca_or_answers_to_another_name() {
        let ca = ca(None, None);
        let (leaf, validity) = ca.current.sign(&[NAME.to_owned()], at(800), LEAF_LIFE).unwrap();
        assert_eq!(validity.until, at(900));
        let bundle = ca.bundle();
        let check = |name, now| verify(&leaf.cert, bundle.as_bytes(), name, at(now)).is_ok();
        assert!(check(NAME, 800) && check(NAME, 899));
        assert!(!check("kubernetes.default.svc", 800) && !check(NAME, 901) && !check(NAME, 700));
    }
}
