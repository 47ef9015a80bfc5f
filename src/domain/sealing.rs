//! Sealed values: which values are sealed, how often a value may be revealed, and when an unrevealed value is erased.

use jiff::{SignedDuration, Timestamp};

use super::{
    duration,
    record::{Claim, Record, SEALED_VALUE, Sealed},
};
use crate::api::{
    ApiKeySpec, ApiKeyStatus, KeyType, Reveal, RevealMode, RevealState, SecuritySettingsSpec, Time, WorkloadSecrets,
};

/// How the first value of a key is stored; `None` for plain. The value of a Personal key is never plain, since the key
/// is for a person and not for a workload.
#[must_use]
pub fn at_first(spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Option<Sealed> {
    if spec.legacy.is_some() {
        return None;
    }
    let one_time = settings.and_then(|settings| settings.one_time_reveal).unwrap_or_default();
    match (one_time, spec.key_type) {
        (true, _) => Some(unrevealed(RevealMode::OneTime, spec, settings)),
        (false, KeyType::Personal) => Some(unrevealed(RevealMode::Sealed, spec, settings)),
        (false, KeyType::SendYourData | KeyType::Team) => None,
    }
}

/// How the value after a rotation is stored: in the mode of the previous one, whatever the settings are now.
#[must_use]
pub fn after(before: Option<&Sealed>, spec: &ApiKeySpec) -> Option<Sealed> {
    match before {
        Some(before) => Some(Sealed { claim: None, erased_at: None, ..before.clone() }),
        None if spec.key_type == KeyType::Personal && spec.legacy.is_none() => {
            Some(unrevealed(RevealMode::Sealed, spec, None))
        }
        None => None,
    }
}

fn unrevealed(mode: RevealMode, spec: &ApiKeySpec, settings: Option<&SecuritySettingsSpec>) -> Sealed {
    let allowed = settings.and_then(|settings| settings.workload_secrets) == Some(WorkloadSecrets::Allow);
    let plain = spec.key_type != KeyType::Personal && allowed;
    Sealed { mode, plain, claim: None, erased_at: None }
}

impl Sealed {
    /// Whether the Secret still holds the sealed value.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.erased_at.is_none() && !(self.mode == RevealMode::OneTime && self.claim.is_some())
    }

    /// Whether the value was erased without a plain copy.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.erased_at.is_some() && !self.plain
    }

    /// Merges the state in the status, which only the operator writes, with the state in the record. The status takes
    /// precedence: a change of the record can't make a revealed or erased value unrevealed.
    #[must_use]
    pub fn merge(known: &Self, written: Option<&Self>) -> Self {
        let Some(written) = written else { return known.clone() };
        let same = |claim: &&Claim| known.claim.as_ref().is_none_or(|k| k.by == claim.by && k.at == claim.at);
        Self {
            mode: known.mode,
            plain: known.plain,
            claim: written.claim.as_ref().filter(same).or(known.claim.as_ref()).cloned(),
            erased_at: known.erased_at.or(written.erased_at),
        }
    }

    /// The state in the form of the status.
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

    /// The state that a status contains.
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

/// The time at which the value of a record is erased unless it is revealed before.
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
        domain::record::{Entry, Subject},
        test_support::key_spec as spec,
    };

    const PLAIN: Option<(RevealMode, bool)> = None;
    const SEALED: Option<(RevealMode, bool)> = Some((RevealMode::Sealed, false));
    const ONE_TIME: Option<(RevealMode, bool)> = Some((RevealMode::OneTime, false));
    const ONE_TIME_AND_PLAIN: Option<(RevealMode, bool)> = Some((RevealMode::OneTime, true));

    fn settings(one_time: bool, workloads: Option<WorkloadSecrets>) -> SecuritySettingsSpec {
        SecuritySettingsSpec {
            one_time_reveal: Some(one_time),
            workload_secrets: workloads,
            ..SecuritySettingsSpec::default()
        }
    }

    fn mode_and_plain(sealed: Option<Sealed>) -> Option<(RevealMode, bool)> {
        sealed.map(|sealed| (sealed.mode, sealed.plain))
    }

    #[test]
    fn type_and_settings_determine_how_the_first_value_is_stored() {
        use KeyType::{Personal, SendYourData, Team};
        let (allow, deny) = (Some(WorkloadSecrets::Allow), Some(WorkloadSecrets::Deny));
        for (key_type, settings, expected) in [
            (Team, None, PLAIN),
            (SendYourData, Some(settings(false, allow)), PLAIN),
            (Team, Some(settings(true, None)), ONE_TIME),
            (Team, Some(settings(true, deny)), ONE_TIME),
            (SendYourData, Some(settings(true, allow)), ONE_TIME_AND_PLAIN),
            (Personal, None, SEALED),
            (Personal, Some(settings(false, allow)), SEALED),
            (Personal, Some(settings(true, allow)), ONE_TIME),
        ] {
            let spec = spec(key_type, &["Alerts"], &[]);
            let kept = at_first(&spec, settings.as_ref());
            assert_eq!(mode_and_plain(kept.clone()), expected, "{key_type:?} {settings:?}");
            assert_eq!(mode_and_plain(after(kept.as_ref(), &spec)), expected, "a rotation keeps the mode");
        }
    }

    #[test]
    fn settings_do_not_change_how_the_values_of_existing_keys_are_stored() {
        let team = spec(KeyType::Team, &["Alerts"], &[]);
        assert_eq!(mode_and_plain(after(None, &team)), PLAIN);
        assert_eq!(mode_and_plain(after(None, &spec(KeyType::Personal, &["Alerts"], &[]))), SEALED, "a Personal key");
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn claim(uid: &str) -> Claim {
        Claim { uid: uid.to_owned(), by: "alice".to_owned(), at: at(5) }
    }

    #[test]
    fn the_status_keeps_reveal_and_erasure_against_changes_of_the_record() {
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
        assert_eq!(Sealed::merge(&known(&claimed), Some(&claimed)), claimed, "the uid comes from the record");
        assert_eq!(Sealed::merge(&known(&once), Some(&claimed)), claimed, "the record is newer than the status");
        assert!(Sealed::merge(&known(&claimed), Some(&once)).claim.is_some(), "a claim can't be removed");
        assert!(Sealed::merge(&known(&erased), Some(&once)).erased_at.is_some());
        let weakened = Sealed { mode: RevealMode::Sealed, ..once.clone() };
        assert_eq!(Sealed::merge(&known(&once), Some(&weakened)).mode, RevealMode::OneTime);
    }

    #[test]
    fn only_sealed_unrevealed_values_are_erased() {
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
        assert_eq!(erase_at(&record, Some(&settings)), None, "the value was revealed");
        record.sealed = None;
        assert_eq!(erase_at(&record, Some(&settings)), None, "the value is plain");
    }
}
