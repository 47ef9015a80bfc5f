//! Which values are sealed, how often a sealed value may be seen, and when one that nobody saw is erased.

use jiff::{SignedDuration, Timestamp};

use super::{
    duration,
    record::{Claim, Record, SEALED_VALUE, Sealed},
};
use crate::api::{
    ApiKeySpec, ApiKeyStatus, KeyType, Reveal, RevealMode, RevealState, SecuritySettingsSpec, Time, WorkloadSecrets,
};

/// How the first value of a key is kept; `None` for plain. A Personal key is for a person, so its value is never plain.
#[must_use]
pub fn at_first(spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Option<Sealed> {
    if spec.legacy.is_some() {
        return None;
    }
    let one_time = settings.and_then(|settings| settings.one_time_reveal).unwrap_or_default();
    match (one_time, spec.key_type) {
        (true, _) => Some(fresh(RevealMode::OneTime, spec, settings)),
        (false, KeyType::Personal) => Some(fresh(RevealMode::Sealed, spec, settings)),
        (false, KeyType::SendYourData | KeyType::Team) => None,
    }
}

/// How the value after another is kept: as that was, whatever the settings say by now.
#[must_use]
pub fn after(before: Option<&Sealed>, spec: &ApiKeySpec) -> Option<Sealed> {
    match before {
        Some(before) => Some(Sealed { claim: None, erased_at: None, ..before.clone() }),
        None if spec.key_type == KeyType::Personal && spec.legacy.is_none() => {
            Some(fresh(RevealMode::Sealed, spec, None))
        }
        None => None,
    }
}

fn fresh(mode: RevealMode, spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Sealed {
    let allowed = settings.and_then(|settings| settings.workload_secrets) == Some(WorkloadSecrets::Allow);
    let plain = spec.key_type != KeyType::Personal && allowed;
    Sealed { mode, plain, claim: None, erased_at: None }
}

impl Sealed {
    /// Whether the Secret still has the sealed value.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.erased_at.is_none() && !(self.mode == RevealMode::OneTime && self.claim.is_some())
    }

    /// Whether nobody can ever see the value.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.erased_at.is_some() && !self.plain
    }

    /// What is believed of a sealed value: what the status says, which only the operator writes, and beyond that the
    /// record. What was revealed or erased once can't become unrevealed by a change of the record.
    #[must_use]
    pub fn believed(known: &Self, written: Option<&Self>) -> Self {
        let Some(written) = written else { return known.clone() };
        let same = |claim: &&Claim| known.claim.as_ref().is_none_or(|k| k.by == claim.by && k.at == claim.at);
        Self {
            mode: known.mode,
            plain: known.plain,
            claim: written.claim.as_ref().filter(same).or(known.claim.as_ref()).cloned(),
            erased_at: known.erased_at.or(written.erased_at),
        }
    }

    /// What the status says of it.
    #[must_use]
    pub fn reveal(&self) -> Reveal {
        let (state, at) = match (self.erased_at, &self.claim) {
            (Some(at), _) => (RevealState::Erased, Some(at)),
            (None, Some(claim)) => (RevealState::Revealed, Some(claim.at)),
            (None, None) => (RevealState::Unrevealed, None),
        };
        let by = self.claim.as_ref().map(|claim| claim.by.clone());
        Reveal { mode: self.mode, state, at: at.map(Time), by }
    }

    /// What a status knows of it.
    #[must_use]
    pub fn of(status: &ApiKeyStatus) -> Option<Self> {
        let reveal = status.reveal.as_ref()?;
        let at = reveal.at.as_ref().map(|at| at.0);
        let claim = |at| reveal.by.clone().map(|by| Claim { uid: String::new(), by, at });
        let (claim, erased_at) = match reveal.state {
            RevealState::Unrevealed => (None, None),
            RevealState::Revealed => (at.and_then(claim), None),
            RevealState::Erased => (None, at),
        };
        let plain = status.secret_ref.as_ref().is_some_and(|place| place.key != SEALED_VALUE);
        Some(Self { mode: reveal.mode, plain, claim, erased_at })
    }
}

/// When the value of a record is erased, unless somebody sees it before.
#[must_use]
pub fn erase_at(record: &Record, settings: Option<&SecuritySettingsSpec>) -> Option<Timestamp> {
    record.sealed.as_ref().filter(|sealed| sealed.claim.is_none() && sealed.is_kept())?;
    let after = duration::parse(settings?.erase_unrevealed_after.as_deref()?)?;
    let after = SignedDuration::try_from(after).unwrap_or(SignedDuration::MAX);
    record.current.minted_at.checked_add(after).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::SecretRef,
        domain::{
            record::{Entry, Subject},
            validate::tests::spec,
        },
    };

    const PLAIN: Option<(RevealMode, bool)> = None;
    const SEALED: Option<(RevealMode, bool)> = Some((RevealMode::Sealed, false));
    const ONCE: Option<(RevealMode, bool)> = Some((RevealMode::OneTime, false));
    const ONCE_AND_PLAIN: Option<(RevealMode, bool)> = Some((RevealMode::OneTime, true));

    fn settings(one_time: bool, workloads: Option<WorkloadSecrets>) -> SecuritySettingsSpec {
        SecuritySettingsSpec {
            one_time_reveal: Some(one_time),
            workload_secrets: workloads,
            ..SecuritySettingsSpec::default()
        }
    }

    fn short(sealed: Option<Sealed>) -> Option<(RevealMode, bool)> {
        sealed.map(|sealed| (sealed.mode, sealed.plain))
    }

    #[test]
    fn a_first_value_is_kept_as_type_and_settings_say() {
        use KeyType::{Personal, SendYourData, Team};
        let (allow, deny) = (Some(WorkloadSecrets::Allow), Some(WorkloadSecrets::Deny));
        for (key_type, settings, expected) in [
            (Team, None, PLAIN),
            (SendYourData, Some(settings(false, allow)), PLAIN),
            (Team, Some(settings(true, None)), ONCE),
            (Team, Some(settings(true, deny)), ONCE),
            (SendYourData, Some(settings(true, allow)), ONCE_AND_PLAIN),
            (Personal, None, SEALED),
            (Personal, Some(settings(false, allow)), SEALED),
            (Personal, Some(settings(true, allow)), ONCE),
        ] {
            let spec = spec(key_type, &["Alerts"], &[]);
            let kept = at_first(&spec, settings.as_ref());
            assert_eq!(short(kept.clone()), expected, "{key_type:?} {settings:?}");
            assert_eq!(short(after(kept.as_ref(), &spec)), expected, "a rotation keeps the mode");
        }
    }

    #[test]
    fn settings_are_for_keys_created_afterwards() {
        let team = spec(KeyType::Team, &["Alerts"], &[]);
        assert_eq!(short(after(None, &team)), PLAIN);
        assert_eq!(short(after(None, &spec(KeyType::Personal, &["Alerts"], &[]))), SEALED, "never plain");
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn claim(uid: &str) -> Claim {
        Claim { uid: uid.to_owned(), by: "alice".to_owned(), at: at(5) }
    }

    #[test]
    fn the_status_keeps_what_happened_to_a_value() {
        let once = Sealed { mode: RevealMode::OneTime, plain: false, claim: None, erased_at: None };
        let claimed = Sealed { claim: Some(claim("u")), ..once.clone() };
        let erased = Sealed { erased_at: Some(at(6)), ..once.clone() };
        let known = |sealed: &Sealed| {
            let key = if sealed.plain { "key-value" } else { SEALED_VALUE };
            let status = ApiKeyStatus {
                reveal: Some(sealed.reveal()),
                secret_ref: Some(SecretRef { name: "k-secret".to_owned(), key: key.to_owned() }),
                ..ApiKeyStatus::default()
            };
            Sealed::of(&status).unwrap()
        };
        let both = Sealed { plain: true, ..claimed.clone() };
        for (sealed, kept) in [(&once, true), (&claimed, false), (&erased, false), (&both, false)] {
            assert_eq!(known(sealed).reveal(), sealed.reveal());
            assert_eq!((known(sealed).plain, sealed.is_kept()), (sealed.plain, kept));
        }
        assert_eq!(Sealed::of(&ApiKeyStatus::default()), None);
        assert_eq!(Sealed::believed(&known(&claimed), Some(&claimed)), claimed, "the uid is the record's");
        assert_eq!(Sealed::believed(&known(&once), Some(&claimed)), claimed, "the status is behind");
        assert!(Sealed::believed(&known(&claimed), Some(&once)).claim.is_some(), "a claim can't be taken back");
        assert!(Sealed::believed(&known(&erased), Some(&once)).erased_at.is_some());
        let softened = Sealed { mode: RevealMode::Sealed, ..once.clone() };
        assert_eq!(Sealed::believed(&known(&once), Some(&softened)).mode, RevealMode::OneTime);
    }

    #[test]
    fn what_nobody_saw_in_time_is_erased() {
        let settings =
            SecuritySettingsSpec { erase_unrevealed_after: Some("1h".to_owned()), ..SecuritySettingsSpec::default() };
        let mut record = Record {
            subject: Subject::default(),
            created_at: at(0),
            last_rotated_at: None,
            requested_at: None,
            current: Entry { sha256: String::new(), minted_at: at(0), generation: 1 },
            previous: None,
            sealed: at_first(&spec(KeyType::Personal, &["Alerts"], &[]), None),
            labels: vec![],
            annotations: vec![],
        };
        assert_eq!(erase_at(&record, Some(&settings)), Some(at(3600)));
        assert_eq!(erase_at(&record, Some(&SecuritySettingsSpec::default())), None);
        assert_eq!(erase_at(&record, None), None);
        record.sealed.as_mut().unwrap().claim = Some(claim("u"));
        assert_eq!(erase_at(&record, Some(&settings)), None, "somebody saw it");
        record.sealed = None;
        assert_eq!(erase_at(&record, Some(&settings)), None, "it is plain");
    }
}
